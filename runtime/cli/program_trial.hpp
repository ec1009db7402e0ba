#pragma once
/// @file
/// A trial that is a program (`task.command`): started by one rank, watched through the lines that
/// it writes.

#include <filesystem>
#include <functional>

#include "runtime/cli/trial.hpp"

namespace orthrus::cli {

/// Starts the program, reads its evaluations, and ends it where they decide the trial, where it has
/// been silent for four heartbeats, and where a stop is asked for: SIGTERM to its process group, a
/// heartbeat later SIGKILL. What it wrote decides the record, never when it was read.
/// @param base  the configuration that it gets; null: its parameters alone
/// @param stop  asked some fifty times a second
[[nodiscard]] TrialEnd run_program(const runner::Study& study, const Config* base,
                                   const TrialTask& task, const std::filesystem::path& directory,
                                   const std::function<bool()>& stop);

}  // namespace orthrus::cli
