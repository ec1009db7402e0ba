#include "runtime/cli/study_results.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <orthrus/error.hpp>
#include <string_view>
#include <system_error>
#include <utility>

#include "runtime/safetensors.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::cli {

using nlohmann::ordered_json;

namespace {

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

double number_at(const ordered_json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() ? nan_value : number_of(*found);
}

const ordered_json& field(const ordered_json& line, const char* key,
                          bool (ordered_json::*is)() const noexcept, const char* what,
                          const std::string& where) {
  const auto found = line.find(key);
  if (found == line.end()) throw DataError(fmt::format("{}{}: missing", where, key));
  if (!((*found).*is)()) throw DataError(fmt::format("{}{}: not {}", where, key, what));
  return *found;
}

std::string word(const ordered_json& line, const char* key, const std::string& where) {
  return field(line, key, &ordered_json::is_string, "a text", where).get<std::string>();
}

StudyTrial trial_of(ordered_json line, const std::string& where) {
  static constexpr std::array<std::string_view, 5> states{"complete", "censored", "diverged",
                                                          "failed", "pruned"};
  StudyTrial trial;
  trial.id = word(line, "trial", where);
  trial.state = word(line, "state", where);
  if (std::find(states.begin(), states.end(), trial.state) == states.end()) {
    throw DataError(fmt::format("{}state: {} is not a state; known: {}", where,
                                runtime::quoted_for_message(trial.state), fmt::join(states, ", ")));
  }
  trial.params = field(line, "params", &ordered_json::is_object, "an object", where);
  if (line.contains("role")) {
    const std::string role = word(line, "role", where);
    if (role != "tune" && role != "report" && role != "only") {
      throw DataError(fmt::format("{}role: {} is not a role; known: tune, report, only", where,
                                  runtime::quoted_for_message(role)));
    }
    trial.role = role == "tune"     ? studies::SeedRole::tune
                 : role == "report" ? studies::SeedRole::report
                                    : studies::SeedRole::only;
  }
  const double index = number_at(line, "index");
  if (std::isfinite(index)) trial.index = static_cast<std::int64_t>(index);
  trial.line = std::move(line);
  return trial;
}

}  // namespace

double number_of(const ordered_json& value) {
  if (value.is_number()) return value.get<double>();
  if (value.is_boolean()) return value.get<bool>() ? 1 : 0;
  if (!value.is_string()) return nan_value;
  const auto& text = value.get_ref<const std::string&>();
  constexpr double infinity = std::numeric_limits<double>::infinity();
  if (text == "inf" || text == "Infinity") return infinity;
  if (text == "-inf" || text == "-Infinity") return -infinity;
  return nan_value;
}

double StudyTrial::number(const char* key) const { return number_at(line, key); }
double StudyTrial::param(const char* key) const { return number_at(params, key); }

std::string StudyTrial::directory() const { return fmt::format("trials/{:04d}-{}", index, id); }

std::string StudyTrial::param_text(const std::string& key) const {
  const auto found = params.find(key);
  if (found == params.end() || found->is_null()) return {};
  return found->is_string() ? found->get<std::string>() : found->dump();
}

const ordered_json& StudyResults::setting(const std::string& path) const {
  static const ordered_json none;
  const ordered_json* at = &resolved;
  for (std::size_t begin = 0; begin <= path.size();) {
    const std::size_t end = std::min(path.find('.', begin), path.size());
    if (!at->is_object()) return none;
    const auto found = at->find(path.substr(begin, end - begin));
    if (found == at->end()) return none;
    at = &*found;
    begin = end + 1;
  }
  return *at;
}

std::vector<JsonLine> StudyResults::metric_lines(const StudyTrial& trial,
                                                 const std::string& type) const {
  const std::filesystem::path file = directory / trial.directory() / "metrics.jsonl";
  std::error_code error;
  if (!std::filesystem::exists(file, error)) return {};
  std::vector<JsonLine> lines = read_json_lines(file).lines;
  std::erase_if(lines, [&](const JsonLine& line) { return line.record.value("t", "") != type; });
  return lines;
}

std::vector<ordered_json> StudyResults::metrics(const StudyTrial& trial,
                                                const std::string& type) const {
  std::vector<ordered_json> records;
  for (JsonLine& line : metric_lines(trial, type)) records.push_back(std::move(line.record));
  return records;
}

double number_at(const ordered_json& object, const std::string& key) {
  const auto found = object.find(key);
  return found == object.end() ? nan_value : number_of(*found);
}

StudyResults read_study(const std::filesystem::path& directory) {
  std::error_code error;
  if (!std::filesystem::is_directory(directory, error)) {
    throw ConfigError(directory.string() + ": no such study directory");
  }
  StudyResults study;
  study.directory = directory;
  const std::filesystem::path settings = directory / "study.resolved.json";
  study.resolved = ordered_json::parse(runtime::read_file(settings), nullptr,
                                       /*allow_exceptions=*/false);
  if (!study.resolved.is_object()) throw DataError(settings.string() + ": not a JSON object");
  const ordered_json& name = study.setting("name");
  study.name = name.is_string()
                   ? name.get<std::string>()
                   : std::filesystem::weakly_canonical(directory, error).filename().string();
  const std::filesystem::path results = directory / "results.jsonl";
  JsonLines lines = read_json_lines(results);
  if (!lines.warning.empty()) study.warnings.push_back(lines.warning);
  const std::filesystem::path journal = directory / "journal.jsonl";
  if (std::filesystem::exists(journal, error)) {
    for (const JsonLine& line : read_json_lines(journal).lines) {
      const std::string version = line.record.value("version", "");
      if (!version.empty() && std::find(study.versions.begin(), study.versions.end(), version) ==
                                  study.versions.end()) {
        study.versions.push_back(version);
      }
    }
  }
  std::map<std::string, StudyTrial> last;
  for (JsonLine& line : lines.lines) {
    StudyTrial trial =
        trial_of(std::move(line.record), fmt::format("{}:{}: ", results.string(), line.number));
    trial.line_number = line.number;
    last.insert_or_assign(trial.id, std::move(trial));
  }
  for (auto& [id, trial] : last) study.trials.push_back(std::move(trial));
  std::stable_sort(study.trials.begin(), study.trials.end(),
                   [](const StudyTrial& a, const StudyTrial& b) { return a.index < b.index; });
  return study;
}

}  // namespace orthrus::cli
