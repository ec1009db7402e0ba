#pragma once
/// @file
/// The commands of `orthrus study` that run studies and look at them.

#include <CLI/CLI.hpp>
#include <functional>
#include <optional>

#include "runtime/cli/command.hpp"

namespace orthrus::cli {

/// run, init, status, ls, retry, check, schema; critical-batch, lr, compare, scaling.
/// @return what runs the one that was given; nothing, where it was none of these.
std::function<std::optional<int>(Context&)> add_study_runner(CLI::App& app);

}  // namespace orthrus::cli
