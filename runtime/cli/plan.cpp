// orthrus plan: what a job will cost, before it starts. No MPI, no device.
#include "runtime/plan.hpp"

#include <cstdio>

#include "runtime/cli/command.hpp"
#include "runtime/cli/shape_source.hpp"
#include "runtime/timeline.hpp"

namespace orthrus::cli {
namespace {

int plan(const PlanOptions& o, Context& context) {
  if (context.rank() != 0) return 0;
  const PlanInput input = load_plan_input(o);
  const runtime::Plan result = input.plan(o.ranks);
  runtime::TimelineOptions options;
  options.blocking = input.config.comm.blocking;
  options.ranks_shown = 0;
  const double seconds = runtime::make_timeline(result, input.profile, options).seconds;
  std::printf("%s", (context.json ? runtime::plan_json(result, -1, seconds) + "\n"
                                  : runtime::plan_table(result, seconds))
                        .c_str());
  return 0;
}

}  // namespace

Run add_plan(CLI::App& app) {
  auto options = std::make_shared<PlanOptions>();
  add_plan_options(app, *options);
  return [options](Context& context) { return plan(*options, context); };
}

}  // namespace orthrus::cli
