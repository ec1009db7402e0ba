#include "runtime/cli/trial_timing.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "runtime/cli/ceilings.hpp"
#include "runtime/cli/run_directory.hpp"
#include "runtime/machine.hpp"
#include "runtime/plan.hpp"
#include "runtime/timeline.hpp"

namespace orthrus::cli {
namespace {

using runner::Json;

constexpr std::array names{"step", "optimizer", "reduce", "control", "update",
                           "lmo",  "meet",      "gather", "copy",    "probe"};

constexpr std::size_t warm_up = 5;

/// The planner's phases of each of `names`, from `reduce` on.
const std::vector<std::vector<runtime::Phase>>& planned_phases() {
  using runtime::Phase;
  static const std::vector<std::vector<Phase>> phases{{Phase::reduce},
                                                      {Phase::control, Phase::audit},
                                                      {Phase::update},
                                                      {Phase::lmo},
                                                      {Phase::meet},
                                                      {Phase::gather},
                                                      {Phase::pack, Phase::unpack},
                                                      {}};
  return phases;
}

/// Of the rank that spends most in them.
double predicted_ms(const runtime::Timeline& timeline, const std::vector<runtime::Phase>& phases) {
  double most = 0;
  for (const auto& rank : timeline.ranks) {
    double seconds = 0;
    for (const runtime::Phase phase : phases) {
      const runtime::PhaseTime& t = rank[static_cast<std::size_t>(phase)];
      seconds += t.compute + t.exposed + t.waiting;
    }
    most = std::max(most, seconds);
  }
  return 1e3 * most;
}

/// Has some machine more of these ranks than processors?
bool is_oversubscribed(Communicator& ranks) {
  const std::string mine = host_name();
  const std::vector<std::string> all = ranks.all_gather_strings(mine);
  const auto here = std::count(all.begin(), all.end(), mine);
  // Of the machine: a launcher may have bound this rank to one of them.
  double over = here > ::sysconf(_SC_NPROCESSORS_ONLN) ? 1 : 0;
  ranks.all_reduce(std::span<double>(&over, 1), ReduceOp::max);
  return over > 0;
}

}  // namespace

double quantile(std::vector<double> values, double q) {
  if (values.empty()) return std::nan("");
  std::sort(values.begin(), values.end());
  return values[static_cast<std::size_t>(std::lround(q * static_cast<double>(values.size() - 1)))];
}

MedianInterval median_interval(std::vector<double> values) {
  if (values.empty()) return {std::nan(""), std::nan("")};
  std::sort(values.begin(), values.end());
  const auto n = static_cast<double>(values.size());
  const double reach = 1.96 * std::sqrt(n) / 2;
  const double low = std::floor(n / 2 - reach), high = std::ceil(n / 2 + reach);  // from 0
  return {values[static_cast<std::size_t>(std::max(low, 0.0))],
          values[static_cast<std::size_t>(std::min(high, n - 1))]};
}

void TrialTiming::add(double step_ms, const StepTimes& t, double bytes_max, double late_s) {
  late_.push_back(late_s);
  steps_.push_back({step_ms, t.total, t.reduce, t.control, t.update - t.lmo, t.lmo, t.meet,
                    t.gather, t.copy, t.probe});
  bytes_max_ = bytes_max;
}

std::vector<double> TrialTiming::slowest(Communicator& ranks) const {
  std::vector<double> all;
  for (const auto& step : steps_) all.insert(all.end(), step.begin(), step.end());
  if (!all.empty()) ranks.all_reduce(std::span(all), ReduceOp::max);
  return all;
}

bool TrialTiming::settled(Communicator& ranks, double share) const {
  constexpr std::size_t least = 30, apart = 5;
  if (steps_.size() < warm_up + least || steps_.size() % apart != 0) return false;
  const std::vector<double> all = slowest(ranks);
  std::vector<double> optimizer;
  for (std::size_t i = warm_up; i < steps_.size(); ++i)
    optimizer.push_back(all[i * names.size() + 1]);
  const MedianInterval interval = median_interval(optimizer);
  return interval.hi - interval.lo < share * quantile(optimizer, 0.5);
}

Json TrialTiming::roofline(Training& training, const runtime::Plan& plan) const {
  // Roofs, and what lies under them: of the LMO its products over the least that must be read and
  // written; of the update three operations on each element, and 20 bytes; of the step all of them
  // over what is sent.
  double flops = 0;
  for (const runtime::RankPlan& rank : plan.per_rank) flops = std::max(flops, rank.flops);
  Index in_matrices = 0;
  for (const runtime::MatrixPlan& m : plan.matrices) in_matrices += m.rows * m.cols;
  const Ceilings roofs = measure_ceilings(training.control());
  const double share = 1.0 / training.size();
  return {{"flops_per_s", roofs.flops_per_s},
          {"memory_bytes_per_s", roofs.memory_bytes_per_s},
          {"network_bytes_per_s", roofs.network_bytes_per_s},
          {"lmo_flops", flops},
          {"lmo_bytes", 8 * share * static_cast<double>(in_matrices)},
          {"update_flops", 6 * share * static_cast<double>(training.elements())},
          {"update_bytes", 20 * share * static_cast<double>(training.elements())},
          {"sent_bytes", bytes_max_}};
}

Json TrialTiming::summary(Training& training) const {
  const std::vector<double> all = slowest(training.control());
  const std::size_t first = std::min(warm_up, steps_.size() / 2);
  const auto column = [&](std::size_t k) {
    std::vector<double> values;
    for (std::size_t i = first; i < steps_.size(); ++i) values.push_back(all[i * names.size() + k]);
    return values;
  };
  const std::vector<double> step = column(0), optimizer = column(1);
  const MedianInterval of_step = median_interval(step), of_optimizer = median_interval(optimizer);
  Json out{{"ranks", training.size()},
           {"oversubscribed", is_oversubscribed(training.control())},
           {"steps", step.size()},
           {"step_ms", quantile(step, 0.5)},
           {"step_ms_lo", of_step.lo},
           {"step_ms_hi", of_step.hi},
           {"optimizer_ms", quantile(optimizer, 0.5)},
           {"optimizer_ms_lo", of_optimizer.lo},
           {"optimizer_ms_hi", of_optimizer.hi},
           {"optimizer_ms_p05", quantile(optimizer, 0.05)},
           {"optimizer_ms_p95", quantile(optimizer, 0.95)},
           {"optimizer_ms_min", quantile(optimizer, 0)},
           {"bytes_per_step_max", bytes_max_},
           {"elements", training.elements()},
           {"memory", training.optimizer().memory().total()}};
  for (std::size_t k = 2; k < names.size(); ++k) {
    out["phases_ms"][names[k]] = quantile(column(k), 0.5);
  }
  std::vector<double> late(late_.begin() + static_cast<std::ptrdiff_t>(first), late_.end());
  if (!late.empty()) training.control().all_reduce(std::span(late), ReduceOp::max);
  out["start_late_us"] = 1e6 * quantile(late, 0.5);
  // What a rank computes by itself: momentum, LMO, weights.
  std::vector<double> work;
  for (std::size_t i = first; i < steps_.size(); ++i) work.push_back(steps_[i][4] + steps_[i][5]);
  double most = quantile(work, 0.5), sum = most;
  training.control().all_reduce(std::span<double>(&most, 1), ReduceOp::max);
  training.control().all_reduce(std::span<double>(&sum, 1), ReduceOp::sum);
  out["imbalance"] = sum > 0 ? Json(most * training.size() / sum) : Json(nullptr);
  std::vector<runtime::ParameterShape> shapes;
  for (const Parameter& p : training.parameters()) shapes.push_back(runtime::shape_of(p));
  const runtime::MachineProfile profile = runtime::load_profile(training.config().profile);
  const runtime::Plan plan =
      runtime::make_plan(training.config(), std::move(shapes), training.size(), profile);
  runtime::TimelineOptions options;
  options.blocking = training.config().comm.blocking;
  options.ranks_shown = 0;
  const runtime::Timeline timeline = runtime::make_timeline(plan, profile, options);
  out["predicted_ms"] = 1e3 * timeline.seconds;
  for (std::size_t k = 0; k < planned_phases().size(); ++k)
    out["predicted_phases_ms"][names[k + 2]] = predicted_ms(timeline, planned_phases()[k]);
  out["predicted_imbalance"] = plan.imbalance;
  double bytes = 0, computing = 0;
  for (const runtime::RankPlan& rank : plan.per_rank) {
    bytes = std::max(bytes, static_cast<double>(rank.traffic.bytes));
    computing = std::max(computing, rank.seconds);
  }
  if (training.config().device == "cpu") out["roofline"] = roofline(training, plan);
  out["predicted_computing_ms"] = 1e3 * computing;
  out["predicted_bytes_per_step_max"] = bytes;
  return out;
}

}  // namespace orthrus::cli
