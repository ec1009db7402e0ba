#pragma once
/// @file
/// StudyDirectory: what a study leaves behind, and what it finds when it is resumed. Rank 0 has
/// one.
///
///     STUDY/study.yaml  study.resolved.json  journal.jsonl  results.jsonl
///     STUDY/trials/0042-3fa9c1…/config.resolved.yaml  overrides.txt  provenance.json
///                               metrics.jsonl  summary.json

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "runtime/cli/run_directory.hpp"
#include "runtime/runner/expansion.hpp"
#include "runtime/runner/journal.hpp"

namespace orthrus::cli {

/// What a journal says about one trial.
struct TrialHistory {
  std::string id;
  /// waiting | running | paused (on a rung) | complete | censored | diverged | failed | pruned
  std::string state = "waiting";
  int attempts = 0;
  double seconds = 0;   ///< of the last attempt that ended
  runner::Json record;  ///< the line of results.jsonl, or what it said on a rung; null: none

  [[nodiscard]] bool finished() const {
    return record.is_object() && record.value("state", "") != "paused";
  }
};

/// A study directory that is only looked at.
struct StudyRecord {
  runner::Json resolved;                        ///< study.resolved.json
  runner::Json first;                           ///< the journal's first line: version, bases
  std::map<std::int64_t, TrialHistory> trials;  ///< those that were ever assigned
  std::vector<runner::Json> choices;            ///< lines "choice": the rate of each cell
  std::vector<std::string> versions;            ///< of the code that ran parts of it
  runner::Json last;                            ///< the journal's last line
  std::int64_t known = 0;                       ///< trials, as the last run knew them
  std::map<std::int64_t, double> costs;         ///< foreseen, of trials that are or were due
  std::int64_t groups = 1;                      ///< of the last run

  /// Seconds until all that is known has ended, longest first on the groups of the last run:
  /// foreseen costs, at the seconds per cost of those that ended. NaN: none has.
  [[nodiscard]] double seconds_left() const;
};
/// @throws ConfigError  there is no study.
[[nodiscard]] StudyRecord read_study_record(const std::filesystem::path& directory);

class StudyDirectory {
 public:
  struct Terms {
    bool resume = false;
    bool allow_version_mix = false;
  };
  /// Creates the directory, or continues in it, and takes its lock.
  /// @throws ConfigError  it exists and `resume` is not set; it is of another study, or of a file
  ///                      that has changed since (the keys are named).
  StudyDirectory(std::filesystem::path directory, const std::string& study_text,
                 const runner::Expansion& expansion, const Terms& terms);

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] const StudyRecord& before() const { return before_; }
  [[nodiscard]] runner::Journal& journal() { return *journal_; }
  /// One more line, for those who watch.
  void append_result(const runner::Json& record);
  /// All of them, by index.
  void write_results(const std::map<std::int64_t, runner::Json>& results);

 private:
  std::filesystem::path path_;
  std::optional<DirectoryLock> lock_;
  StudyRecord before_;
  std::optional<runner::Journal> journal_;
  LineFile results_;
};

/// "2026-01-31T23:59:59Z".
[[nodiscard]] std::string utc_now();

}  // namespace orthrus::cli
