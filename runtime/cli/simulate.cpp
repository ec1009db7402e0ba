// orthrus simulate: the timeline of a step on a cluster one does not have. No MPI, no device.
#include <cstdio>
#include <optional>

#include "runtime/cli/command.hpp"
#include "runtime/cli/shape_source.hpp"
#include "runtime/posix_file.hpp"
#include "runtime/timeline.hpp"

namespace orthrus::cli {
namespace {

struct Options {
  PlanOptions plan;
  runtime::TimelineOptions timeline;
  std::string trace, overlap = "auto";
};

int simulate(const Options& o, Context& context) {
  if (context.rank() != 0) return 0;
  const PlanInput input = load_plan_input(o.plan);
  // Found wrong before anything is computed.
  std::optional<runtime::NewFile> trace;
  if (!o.trace.empty()) trace.emplace(o.trace);
  const runtime::Plan plan = input.plan(o.plan.ranks);
  runtime::TimelineOptions options = o.timeline;
  options.blocking = input.config.comm.blocking;
  if (o.overlap != "auto") options.progress = o.overlap == "yes";
  if (!trace) options.ranks_shown = 0;
  const runtime::Timeline timeline = runtime::make_timeline(plan, input.profile, options);
  if (trace) {
    runtime::write_trace(plan, timeline, [&](const std::string& text) {
      trace->write(text.data(), static_cast<std::int64_t>(text.size()));
    });
    trace->commit();
  }
  std::printf("%s", (context.json ? runtime::timeline_json(plan, timeline) + "\n"
                                  : runtime::timeline_table(plan, timeline))
                        .c_str());
  return 0;
}

}  // namespace

Run add_simulate(CLI::App& app) {
  auto options = std::make_shared<Options>();
  add_plan_options(app, options->plan);
  app.add_option("--backward", options->timeline.backward_s,
                 "Seconds of a micro-batch's backward, which gradients overlap (else all are ready "
                 "when the step begins)")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--overlap", options->overlap,
                 "Do calls go on while their ranks compute? (auto: where the profile has nodes)")
      ->check(CLI::IsMember({"auto", "yes", "no"}));
  app.add_option("--trace", options->trace,
                 "Write the events of some ranks for Perfetto (ui.perfetto.dev, chrome://tracing)");
  app.add_option("--ranks-shown", options->timeline.ranks_shown,
                 "How many: the busiest, rank 0, and more at equal distances")
      ->check(CLI::Range(1, 1 << 20));
  return [options](Context& context) { return simulate(*options, context); };
}

}  // namespace orthrus::cli
