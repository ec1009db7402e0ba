#pragma once
/// @file
/// What a study left in its directory, finished or not: the resolved study file, its trials, their
/// metrics. Nothing is written here.

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <orthrus/studies/cells.hpp>
#include <string>
#include <vector>

#include "runtime/cli/records.hpp"

namespace orthrus::cli {

/// One line of results.jsonl. Numbers that are not there are NaN.
struct StudyTrial {
  std::string id;
  std::int64_t index = 0;
  std::string state;  ///< complete, censored, diverged, failed, pruned
  studies::SeedRole role = studies::SeedRole::only;
  nlohmann::ordered_json params;
  nlohmann::ordered_json line;  ///< all of it
  std::size_t line_number = 0;  ///< in results.jsonl, from 1

  [[nodiscard]] std::string directory() const;  ///< "trials/0042-3fa9c1…", of the study's

  [[nodiscard]] double number(const char* key) const;  ///< of the line
  [[nodiscard]] double param(const char* key) const;
  /// As people write it; empty when there is none.
  [[nodiscard]] std::string param_text(const std::string& key) const;
  /// Not `failed`: a trial that diverged or was censored has said something.
  [[nodiscard]] bool result() const { return state != "failed"; }
};

struct StudyResults {
  std::filesystem::path directory;
  std::string name;
  nlohmann::ordered_json resolved;  ///< study.resolved.json
  std::vector<StudyTrial> trials;   ///< by index; of one trial's lines the last
  std::vector<std::string> warnings;
  std::vector<std::string> versions;  ///< of the code that ran it, as its journal says

  /// Below dots: "search.metric"; null when there is none.
  [[nodiscard]] const nlohmann::ordered_json& setting(const std::string& path) const;
  /// Lines of the trial's metrics.jsonl of type `type`; none where there is no such file.
  [[nodiscard]] std::vector<JsonLine> metric_lines(const StudyTrial& trial,
                                                   const std::string& type) const;
  [[nodiscard]] std::vector<nlohmann::ordered_json> metrics(const StudyTrial& trial,
                                                            const std::string& type) const;
};

/// "inf", "-inf", "NaN" are numbers; what is none, or null, is NaN.
[[nodiscard]] double number_of(const nlohmann::ordered_json& value);
/// Of a key; NaN where there is none.
[[nodiscard]] double number_at(const nlohmann::ordered_json& object, const std::string& key);

/// @throws ConfigError  no such directory, no study.resolved.json or results.jsonl in it
/// @throws DataError    with file, line and key: malformed
[[nodiscard]] StudyResults read_study(const std::filesystem::path& directory);

}  // namespace orthrus::cli
