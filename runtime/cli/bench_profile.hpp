#pragma once
/// @file
/// orthrus bench --profile: measures what the planner predicts with.

#include <string>

#include "runtime/cli/command.hpp"

namespace orthrus::cli {

/// Measures products, passes and, with several ranks, links; rank 0 writes the profile to `file`
/// and prints it. Below 30 s where a rank has a core to itself. Collective over the launch.
/// @return the exit code. @throws IoError  before anything is measured where `file` cannot be made.
int bench_profile(const std::string& file, Context& context);

}  // namespace orthrus::cli
