#pragma once
/// @file
/// One trial of a study on the ranks of a group: its training, its files, what it came to.

#include <filesystem>
#include <functional>
#include <orthrus/communicator.hpp>
#include <orthrus/config.hpp>
#include <string>

#include "runtime/runner/expansion.hpp"

namespace orthrus::cli {

struct TrialTask {
  runner::Trial trial;
  int attempt = 1;
};

[[nodiscard]] std::string to_text(const TrialTask& task);
[[nodiscard]] TrialTask trial_task(const std::string& text);

struct TrialEnd {
  bool stopped = false;  ///< was asked to stop: there is no record
  bool retry = false;    ///< failed, and may do better another time
  runner::Json record;   ///< the line of results.jsonl
  double seconds = 0;
};

/// Trains until the target, the budget, its rung, a divergence, an error, or a request to stop.
/// What the workload or the configuration throws is the trial's result; what files and messages
/// throw is the study's end. Collective.
/// @param stop       asked between steps; one rank that answers true stops the group
/// @param directory  of the trial; the first rank writes there
[[nodiscard]] TrialEnd run_trial(const runner::Study& study, const Config& base,
                                 const TrialTask& task, Communicator& group,
                                 const std::filesystem::path& directory,
                                 const std::function<bool()>& stop);

}  // namespace orthrus::cli
