#pragma once
/// @file
/// The parameters `orthrus plan` and `orthrus simulate` plan for.

#include <CLI/CLI.hpp>
#include <orthrus/config.hpp>
#include <string>
#include <vector>

#include "kernels/backend.hpp"
#include "runtime/machine.hpp"
#include "runtime/plan.hpp"

namespace orthrus::cli {

/// What both commands are asked.
struct PlanOptions {
  std::string config, params, model, profile;
  int ranks = 1;
  bool codes = false;  ///< the trainer computes with codes, where there are any
  std::vector<std::string> set;
};
void add_plan_options(CLI::App& app, PlanOptions& options);

/// Everything a plan is made of.
struct PlanInput {
  Config config;
  runtime::MachineProfile profile;
  std::vector<runtime::ParameterShape> shapes;

  [[nodiscard]] runtime::Plan plan(int ranks) const {
    return runtime::make_plan(config, shapes, ranks, profile, 0x7fffffff,
                              kernels::tasks_at_once(config.device));
  }
};
/// Reads configuration, profile and shapes: of a safetensors file, a known model, or the
/// configuration's workload.
/// @throws ConfigError  usage: fewer ranks than one, or none of the three; else what is wrong with
/// them.
[[nodiscard]] PlanInput load_plan_input(const PlanOptions& options);

}  // namespace orthrus::cli
