#include "runtime/cli/isolated_trial.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <fstream>
#include <orthrus/error.hpp>
#include <string>
#include <vector>

#include "runtime/cli/child.hpp"
#include "runtime/cli/run_directory.hpp"
#include "runtime/runner/reported.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::cli {
namespace {

namespace fs = std::filesystem;
using runner::Json;

constexpr const char* answer = "end.json";
constexpr const char* sign_of_life = "beat";

std::vector<std::string> command_of(const runner::Study& study, const runner::Trial& trial,
                                    const fs::path& job) {
  std::vector<std::string> launcher = study.launcher;
  // Jobs side by side would all be bound to the first cores.
  if (launcher.empty() && trial.ranks > 1)
    launcher = {"mpirun", "-np", "{ranks}", "--bind-to", "none"};
  std::vector<std::string> command;
  for (const std::string& word : launcher) command.push_back(runner::filled(word, trial, {}));
  for (const std::string& word : {fs::read_symlink("/proc/self/exe").string(), std::string("study"),
                                  std::string("trial"), job.string()})
    command.push_back(word);
  return command;
}

/// What ended the study's own job, were the trial in it.
bool of_files(int code) {
  return code == static_cast<int>(ExitCode::cannot_create) ||
         code == static_cast<int>(ExitCode::io) || code == static_cast<int>(ExitCode::permission);
}

}  // namespace

TrialEnd run_isolated(const runner::Study& study, const Json& source, const TrialTask& task,
                      const fs::path& directory, const std::function<bool()>& stop) {
  const auto start = std::chrono::steady_clock::now();
  const fs::path place = fs::absolute(directory), job = place / "job.json",
                 output = place / "output.txt", pid = place / "pid";
  make_directories(place);
  pid_t orphan = 0;
  if (std::ifstream(pid) >> orphan) kill_orphan(orphan, place.string());
  for (const char* const name : {answer, sign_of_life}) fs::remove(place / name);
  runtime::write_file_atomically(
      job, Json{{"study", source}, {"task", to_text(task)}, {"trial_dir", place.string()}}.dump());

  Child child(command_of(study, task.trial, job), output, place.string(), "execution.launcher");
  runtime::write_file_atomically(pid, std::to_string(child.pid()) + "\n");
  const Watched watched =
      watch(child, {.alive = {place / "metrics.jsonl", place / sign_of_life, output},
                    .heartbeat_s = study.heartbeat_s,
                    .decided = [] { return false; },
                    .stop = stop});
  fs::remove(pid);
  fs::remove(job);
  fs::remove(place / sign_of_life);

  TrialEnd end;
  end.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (std::ifstream in(place / answer); in) {
    // A job that has come to its end has an answer, whatever was asked of it meanwhile.
    const Json said = Json::parse(in);
    end.stopped = said["stopped"];
    end.retry = said["retry"];
    end.record = said["record"];
    if (!end.stopped || watched.why == Watched::Why::stopped) {
      fs::remove(place / answer);
      return end;
    }
  }
  if (watched.why == Watched::Why::stopped) return {true, false, {}, end.seconds};
  const Child::Ending& ending = watched.ending;
  std::string message =
      watched.why == Watched::Why::silent
          ? fmt::format("no step for {} s: ended", 4 * study.heartbeat_s)
      : ending.signal != 0
          ? fmt::format("killed by signal {} ({})", ending.signal, ::strsignal(ending.signal))
          : fmt::format("ended with {}", ending.code);
  if (const std::string said = last_line(output); !said.empty()) message += ": " + said;
  if (ending.signal == 0 && of_files(ending.code))
    throw IoError(place.string() + ": " + message, static_cast<ExitCode>(ending.code));
  end.stopped = false;
  end.retry = ending.code != static_cast<int>(ExitCode::config);
  end.record = runner::summary(task.trial, task.attempt, "failed", message, nullptr, {});
  return end;
}

Json read_job(const fs::path& file) {
  Json job = Json::parse(runtime::read_file(file), nullptr, /*allow_exceptions=*/false);
  if (!job.is_object() || !job.contains("study") || !job.contains("task"))
    throw DataError(file.string() + ": no trial of `orthrus study run`");
  return job;
}

void touch_beat(const fs::path& directory) { std::ofstream(directory / sign_of_life) << '.'; }

void write_end(const fs::path& directory, const TrialEnd& end) {
  runtime::write_file_atomically(
      directory / answer,
      Json{{"stopped", end.stopped}, {"retry", end.retry}, {"record", end.record}}.dump(
          -1, ' ', false, Json::error_handler_t::replace));
}

}  // namespace orthrus::cli
