#pragma once
/// @file
/// orthrus study run: the trials of a study on groups of ranks.
///
///     world:   0 1 | 2 3 | 4 5 | 6       groups of ranks_per_trial; what is left over idles
///              S,L     L     L           rank 0 schedules, and leads group 0 between its steps
///
/// Leaders alone talk to the scheduler: ready → trial → result → …, until it says end. It answers
/// between the steps of its own trials, by messages that wait for nobody. A dedicated scheduler has
/// no trials, and groups begin with rank 1.

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "runtime/cli/command.hpp"
#include "runtime/runner/expansion.hpp"

namespace orthrus::cli {

struct StudyRunOptions {
  std::string file;
  std::string text;  ///< in place of the file's, for a study that a command has made
  std::string directory;
  std::vector<std::string> set;
  std::string time_limit;
  bool resume = false, dry_run = false, allow_version_mix = false;
};

/// "3h", "90m", "2h30m", "45" (seconds). @throws ConfigError (64).
[[nodiscard]] double duration_s(const std::string& text);

/// What a study came to, on rank 0.
struct StudyEnd {
  bool complete = false;
  std::filesystem::path directory;
  std::map<std::int64_t, runner::Json> results;
  runner::Json document;  ///< what --json prints
};
/// `orthrus study trial JOB`, which nobody but `run_study` calls (isolated_trial.hpp): one trial on
/// all ranks of this job.
[[nodiscard]] int run_trial_job(const std::string& file, Context& context);

/// Collective over all ranks. @return on rank 0 how it ended; elsewhere whether it is complete.
[[nodiscard]] StudyEnd run_study(const StudyRunOptions& options, Context& context);
/// The same on any ranks, those that are threads included; signals are not listened to.
/// @param quiet   rank 0 prints nothing
/// @param settle  called where a rank fails while others may wait for it, before it unwinds
[[nodiscard]] StudyEnd run_study(
    const StudyRunOptions& options, Communicator world, bool quiet,
    const std::function<void()>& settle = [] {});

}  // namespace orthrus::cli
