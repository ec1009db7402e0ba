#include "runtime/cli/study_directory.hpp"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <ctime>
#include <functional>
#include <orthrus/error.hpp>
#include <string_view>
#include <utility>

#include "runtime/safetensors.hpp"

namespace orthrus::cli {
namespace {

namespace fs = std::filesystem;
using runner::Json;

// What may change when a study is resumed: none of it decides what a trial comes to.
constexpr std::array<std::string_view, 5> free_keys{"description", "execution", "analysis",
                                                    "report", "budget.run_cap"};

bool may_change(const std::string& key) {
  return key != "execution.exclusive" &&
         std::any_of(free_keys.begin(), free_keys.end(), [&](std::string_view free) {
           return key == free || key.substr(0, free.size() + 1) == std::string(free) + ".";
         });
}

/// Is anything there but what a start leaves that was cut off at once?
bool is_occupied(const fs::path& directory) {
  std::error_code ignored;
  if (fs::exists(directory, ignored) && !fs::is_directory(directory, ignored)) return true;
  return std::any_of(fs::directory_iterator(directory, ignored), fs::directory_iterator(),
                     [](const fs::directory_entry& entry) {
                       const std::string name = entry.path().filename().string();
                       return name != ".lock" && name != "trials" &&
                              !name.starts_with("study.resolved.json.tmp");
                     });
}

Json base_hashes(const runner::Bases& bases) {
  Json out = Json::object();
  for (const auto& [word, config] : bases) out[word] = config_hash(config);
  return out;
}

Json read_resolved(const fs::path& directory) {
  std::error_code ignored;
  const fs::path file = directory / "study.resolved.json";
  if (!fs::exists(file, ignored)) return nullptr;
  return Json::parse(runtime::read_file(file), nullptr, /*allow_exceptions=*/false);
}

}  // namespace

std::string utc_now() {
  return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
}

StudyRecord read_study_record(const fs::path& directory) {
  StudyRecord out;
  out.resolved = read_resolved(directory);
  const std::vector<Json> lines = runner::read_lines(directory / "journal.jsonl");
  if (!out.resolved.is_object() || lines.empty()) {
    throw ConfigError(directory.string() +
                      ": not a study: study.resolved.json or journal.jsonl is missing");
  }
  for (const Json& line : lines) {
    const std::string type = line.value("t", "");
    if (type == "study") {
      if (out.first.is_null()) out.first = line;
      const std::string version = line.value("version", "");
      if (std::find(out.versions.begin(), out.versions.end(), version) == out.versions.end())
        out.versions.push_back(version);
    } else if (type == "phase") {
      out.groups = std::max<std::int64_t>(line.value("groups", 1), 1);
    } else if (type == "due") {
      for (const Json& pair : line.at("costs"))
        out.costs[pair.at(0).get<std::int64_t>()] = pair.at(1).get<double>();
    } else if (type == "choice") {
      out.choices.push_back(line);
    } else if (type == "assign" || type == "state") {
      TrialHistory& trial = out.trials[line.at("index").get<std::int64_t>()];
      trial.id = line.value("trial", "");
      if (type == "assign") {
        trial.state = "running";
        ++trial.attempts;
      } else {
        trial.state = line.value("state", "waiting");
        trial.seconds = line.value("seconds", trial.seconds);
        trial.record = line.contains("result") ? line["result"] : Json(nullptr);
      }
    }
    out.known = line.value("known", out.known);
  }
  out.last = lines.back();
  return out;
}

double StudyRecord::seconds_left() const {
  double seconds = 0, cost = 0;
  std::int64_t finished = 0;
  const auto cost_of = [this](std::int64_t index) {
    const auto found = costs.find(index);
    return found == costs.end() ? 0 : found->second;
  };
  std::vector<double> left;
  for (const auto& [index, foreseen] : costs) {
    const auto trial = trials.find(index);
    if (trial == trials.end() || !trial->second.finished()) left.push_back(foreseen);
  }
  for (const auto& [index, trial] : trials) {
    if (!trial.finished()) continue;
    ++finished;
    seconds += trial.seconds;
    cost += cost_of(index);
  }
  if (finished == 0) return std::nan("");
  if (!(cost > 0)) {  // all are the same to who knows nothing of them
    left.assign(static_cast<std::size_t>(std::max<std::int64_t>(known - finished, 0)), 1);
    cost = static_cast<double>(finished);
  }
  std::sort(left.begin(), left.end(), std::greater<>());
  std::vector<double> loads(static_cast<std::size_t>(groups));
  for (const double trial : left) *std::min_element(loads.begin(), loads.end()) += trial;
  return seconds / cost * *std::max_element(loads.begin(), loads.end());
}

StudyDirectory::StudyDirectory(fs::path directory, const std::string& study_text,
                               const runner::Expansion& expansion, const Terms& terms)
    : path_(std::move(directory)) {
  std::error_code ignored;
  const Json now = runner::resolved(expansion.study());
  const Json bases = base_hashes(expansion.bases());
  const std::string where = path_.string();
  // A kill may have come before the first line of the journal.
  const bool begun = fs::exists(path_ / "journal.jsonl", ignored);
  if (is_occupied(path_)) {
    const Json then = read_resolved(path_);
    if (!then.is_object()) {
      throw ConfigError(where + ": exists and is no study's directory; give another --dir");
    }
    if (then.value("name", "") != expansion.study().name) {
      throw ConfigError(where + ": is of the study '" + then.value("name", "") +
                        "'; give another --dir");
    }
    if (!terms.resume) {
      throw ConfigError(where +
                        ": the study was begun already; continue it with --resume, or give "
                        "another --dir");
    }
    // A key that the study was begun without is as if it had been left out.
    const auto with_defaults = [](const Json& given) {
      Json all = runner::resolved(runner::Study());
      all.merge_patch(given);
      return all;
    };
    std::vector<std::string> changed = runner::differences(with_defaults(then), with_defaults(now));
    std::erase_if(changed, may_change);
    if (!changed.empty()) {
      throw ConfigError(fmt::format(
          "{}: --resume: the study has changed since it was begun: {}; a changed study is another "
          "one: give another --dir",
          expansion.study().source, fmt::join(changed, ", ")));
    }
  } else if (terms.resume && !fs::exists(path_, ignored)) {
    throw ConfigError(where + ": --resume: there is no study to continue");
  }

  make_directories(path_);
  lock_.emplace(path_);
  if (begun) {
    before_ = read_study_record(path_);
    for (const auto& [word, config] : expansion.bases()) {
      if (before_.first.contains("bases") && before_.first["bases"].contains(word) &&
          before_.first["bases"][word] != bases[word]) {
        throw ConfigError((config.source.empty() ? "the base" : config.source) +
                          ": --resume: this configuration has changed since the study was begun");
      }
    }
    const bool mixed = std::any_of(before_.versions.begin(), before_.versions.end(),
                                   [](const std::string& v) { return v != ORTHRUS_VERSION; });
    if (mixed && !terms.allow_version_mix) {
      throw ConfigError(fmt::format(
          "{}: --resume: begun by version {}, this is {}; --allow-version-mix goes on all the same",
          where, fmt::join(before_.versions, ", "), ORTHRUS_VERSION));
    }
  }
  make_directories(path_ / "trials");
  runtime::write_file_atomically(path_ / "study.resolved.json", now.dump(2) + "\n");
  runtime::write_file_atomically(path_ / "study.yaml", study_text);
  journal_.emplace(path_ / "journal.jsonl");
  journal_->write({{"t", "study"},
                   {"name", expansion.study().name},
                   {"version", ORTHRUS_VERSION},
                   {"bases", bases},
                   {"known", std::ssize(expansion.initial())},
                   {"time", utc_now()}});
}

void StudyDirectory::append_result(const Json& record) {
  if (results_.is_open())
    results_.line(record.dump(-1, ' ', false, Json::error_handler_t::replace));
}

void StudyDirectory::write_results(const std::map<std::int64_t, Json>& results) {
  std::string text;
  for (const auto& [index, record] : results)
    text += record.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  runtime::write_file_atomically(path_ / "results.jsonl", text);
  results_.open(path_ / "results.jsonl", /*append=*/true);
}

}  // namespace orthrus::cli
