#pragma once
/// @file
/// Experiments on the runner of studies and on messages, beside those of the mathematics: what a
/// study's record must be, whatever happens to it, and what a step must send.

#include <span>

#include "runtime/studies/reproduce.hpp"

namespace orthrus::cli {

/// In the order of the README. They write below the system's directory for temporary files.
[[nodiscard]] std::span<const studies::Experiment> runner_experiments();

}  // namespace orthrus::cli
