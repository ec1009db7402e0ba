#pragma once
/// @file
/// A trial of this library as a job of its own (`execution.mode: subprocess` without
/// `task.command`): a crash, a hang or an abort is the end of one attempt, not of the study.
///
///     a rank of the study                the job: mpirun -np {ranks} orthrus study trial job.json
///     job.json ────────────────────────▶ run_trial on all its ranks
///     watches metrics.jsonl, beat,       a touch of `beat` between steps; end.json: what it came
///     to output.txt; reads end.json ◀──────

#include <filesystem>
#include <functional>

#include "runtime/cli/trial.hpp"

namespace orthrus::cli {

/// Starts the job and waits for it. SIGTERM ends it where a stop is asked for, and where it has
/// been silent for four heartbeats; a heartbeat later SIGKILL.
/// @param source  what the job needs to know of the study
/// @param stop    asked some fifty times a second
[[nodiscard]] TrialEnd run_isolated(const runner::Study& study, const runner::Json& source,
                                    const TrialTask& task, const std::filesystem::path& directory,
                                    const std::function<bool()>& stop);

/// The job's side: what it was given, signs of life, and what it answers.
[[nodiscard]] runner::Json read_job(const std::filesystem::path& file);
void touch_beat(const std::filesystem::path& directory);
void write_end(const std::filesystem::path& directory, const TrialEnd& end);

}  // namespace orthrus::cli
