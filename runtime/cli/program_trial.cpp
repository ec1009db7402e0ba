#include "runtime/cli/program_trial.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fstream>
#include <map>
#include <orthrus/error.hpp>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "runtime/cli/child.hpp"
#include "runtime/cli/learning_times.hpp"
#include "runtime/cli/provenance.hpp"
#include "runtime/cli/run_directory.hpp"
#include "runtime/report.hpp"
#include "runtime/runner/reported.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::cli {
namespace {

namespace fs = std::filesystem;
using runner::Json;
using Clock = std::chrono::steady_clock;

constexpr int requeue = static_cast<int>(ExitCode::preempted);

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

class ProgramTrial {
 public:
  ProgramTrial(const runner::Study& study, const TrialTask& task, const fs::path& directory)
      : study_(study), task_(task), directory_(fs::absolute(directory)) {}

  TrialEnd run(const Config* base, const std::function<bool()>& stop) {
    prepare(base);
    Child child(command_, output(), directory_.string(), "task.command");
    runtime::write_file_atomically(pid_file(), std::to_string(child.pid()) + "\n");
    Pulse written({metrics()});
    const auto decided = [&] {
      if (written.moved()) read();
      return reported_.decided;
    };
    const Watched watched = watch(child, {.alive = {metrics(), output()},
                                          .heartbeat_s = study_.heartbeat_s,
                                          .max_seconds = study_.max_seconds,
                                          .decided = decided,
                                          .stop = stop});
    const Child::Ending& ending = watched.ending;
    fs::remove(pid_file());
    const bool again = ending.signal == 0 && ending.code == requeue;
    if (again) runtime::write_file_atomically(requeued_file(), "");
    read();
    // What it wrote before it was ended, or ended by itself, may decide it all the same.
    if (reported_.decided) return ended(reported_.state, reported_.message);
    using Why = Watched::Why;
    switch (watched.why) {
      case Why::stopped:
        return {true, false, {}, seconds_since(start_)};
      case Why::silent:
        return failed(fmt::format("neither {} nor output for {} s: ended", metrics().string(),
                                  4 * study_.heartbeat_s),
                      true);
      case Why::late:
        return reported_.state.empty() ? failed("budget.max_seconds: nothing was evaluated", false)
                                       : ended("censored", "budget.max_seconds");
      case Why::none:
      case Why::decided:
        break;
    }
    if (again) return failed("asked to be run again (75)", true);
    if (ending.signal != 0) {
      return failed(
          fmt::format("killed by signal {} ({})", ending.signal, ::strsignal(ending.signal)), true);
    }
    if (ending.code != 0) return failed(fmt::format("ended with {}", ending.code), true);
    if (reported_.state.empty()) {
      return failed(
          fmt::format("wrote no evaluation of '{}' to {}", study_.metric, metrics().string()),
          false);
    }
    return ended(reported_.state, reported_.message);
  }

 private:
  [[nodiscard]] fs::path metrics() const { return directory_ / "metrics.jsonl"; }
  [[nodiscard]] fs::path output() const { return directory_ / "output.txt"; }
  [[nodiscard]] fs::path pid_file() const { return directory_ / "pid"; }
  [[nodiscard]] fs::path requeued_file() const { return directory_ / "requeued"; }

  void prepare(const Config* base) {
    make_directories(directory_);
    // Of a runner that was killed: it would write into this trial's files.
    pid_t orphan = 0;
    if (std::ifstream(pid_file()) >> orphan) kill_orphan(orphan, directory_.string());
    const runner::Trial& trial = task_.trial;
    const fs::path config = directory_ / "config.resolved.yaml";
    const std::map<std::string, std::string> places{{"config", config.string()},
                                                    {"metrics", metrics().string()},
                                                    {"trial_dir", directory_.string()}};
    for (const std::string& word : study_.command)
      command_.push_back(runner::filled(word, trial, places));
    if (base != nullptr) {
      runtime::write_file_atomically(config, to_yaml(runner::trial_config(*base, trial)));
    } else {
      // JSON is YAML, so that any reader will do.
      runtime::write_file_atomically(config, trial.params.dump(2) + "\n");
    }
    Communicator alone = self_communicator();
    Json origin = provenance(alone);
    origin["ranks_per_trial"] = trial.ranks;
    origin["command"] = command_;
    write_provenance(directory_ / "provenance.json", std::move(origin), task_.attempt);
    // A program that asked to be run again goes on where it was.
    if (!fs::remove(requeued_file())) runtime::write_file_atomically(metrics(), "");
  }

  void read() {
    evaluations_ = runner::read_evaluations(metrics());
    reported_ = runner::judge(study_, task_.trial, evaluations_);
  }

  /// With a file of metrics as every trial's: what counted, in JSON that all can read.
  TrialEnd ended(const std::string& state, const std::string& message) {
    std::string lines;
    LearningTimes learning;
    for (Json line : evaluations_) {
      const auto step = line["step"].get<std::int64_t>();
      if (step > reported_.progress.steps) break;
      std::map<std::string, double> metrics;
      for (const auto& [key, value] : line.items()) {
        if (value.is_number()) metrics[key] = value.get<double>();
      }
      learning.add(static_cast<double>(step), metrics);
      line["trial"] = task_.trial.id;
      if (!line.contains("examples")) line["examples"] = step * task_.trial.batch;
      for (const char* const key : {"tokens", "wall_s"}) {  // which nobody but it could know
        if (!line.contains(key)) line[key] = nullptr;
      }
      lines += line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
    }
    runtime::write_file_atomically(metrics(), lines);
    TrialEnd end;
    end.seconds = reported_.progress.wall_s = seconds_since(start_);
    end.record =
        runner::summary(task_.trial, task_.attempt, state, message,
                        state == "failed" ? nullptr : &reported_.score, reported_.progress);
    learning.write_to(end.record);
    runtime::write_file_atomically(directory_ / "summary.json", end.record.dump(2) + "\n");
    return end;
  }

  TrialEnd failed(std::string message, bool retry) {
    if (const std::string said = last_line(output()); !said.empty()) message += ": " + said;
    return {false, retry,
            runner::summary(task_.trial, task_.attempt, "failed", message, nullptr, {}),
            seconds_since(start_)};
  }

  const runner::Study& study_;
  const TrialTask& task_;
  const fs::path directory_;
  const Clock::time_point start_ = Clock::now();
  std::vector<std::string> command_;
  std::vector<Json> evaluations_;
  runner::Reported reported_{"", "", false, runner::Score(study_), {}};
};

}  // namespace

TrialEnd run_program(const runner::Study& study, const Config* base, const TrialTask& task,
                     const fs::path& directory, const std::function<bool()>& stop) {
  try {
    return ProgramTrial(study, task, directory).run(base, stop);
  } catch (const IoError&) {
    throw;  // the next trial's files would be no better
  } catch (const Error& error) {
    return {false, false,
            runner::summary(task.trial, task.attempt, "failed", error.what(), nullptr, {}), 0};
  }
}

}  // namespace orthrus::cli
