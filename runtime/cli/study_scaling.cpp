#include "runtime/cli/study_scaling.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>
#include <string_view>
#include <utility>

#include "runtime/cli/json_number.hpp"
#include "runtime/cli/study_fit.hpp"
#include "runtime/cli/study_verdicts.hpp"

namespace orthrus::cli {
namespace {

using nlohmann::ordered_json;

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();
constexpr std::array<std::string_view, 3> waits{"reduce", "meet", "gather"};

/// Parameters that advance with the number of ranks.
std::set<std::string> grown_with_ranks(const StudyResults& study) {
  std::set<std::string> out{"ranks", "seed"};
  for (const ordered_json& names : study.setting("search.zip")) {
    if (!names.is_array() || std::find(names.begin(), names.end(), "ranks") == names.end())
      continue;
    for (const ordered_json& name : names) out.insert(name.get<std::string>());
  }
  return out;
}

/// min(peak, intensity × bandwidth) above each.
void add_works(const ordered_json& timing, const ordered_json& roofs, ScalingPoint& p) {
  p.peak_flops_per_s = number_at(roofs, "flops_per_s");
  p.memory_bytes_per_s = number_at(roofs, "memory_bytes_per_s");
  p.network_bytes_per_s = number_at(roofs, "network_bytes_per_s");
  const auto add = [&](const std::string& name, double flops, double bytes, double ms,
                       bool network) {
    if (!(flops > 0 && bytes > 0 && ms > 0)) return;
    const double intensity = flops / bytes;
    const double width = network ? p.network_bytes_per_s : p.memory_bytes_per_s;
    p.works.push_back({name, intensity, 1e3 * flops / ms,
                       std::min(p.peak_flops_per_s, intensity * width), network});
  };
  const ordered_json none = ordered_json::object();
  const ordered_json& ms = timing.contains("phases_ms") ? timing["phases_ms"] : none;
  const double lmo = number_at(roofs, "lmo_flops"), update = number_at(roofs, "update_flops");
  add("lmo", lmo, number_at(roofs, "lmo_bytes"), number_at(ms, "lmo"), false);
  add("update", update, number_at(roofs, "update_bytes"), number_at(ms, "update"), false);
  add("step", lmo + update, number_at(roofs, "sent_bytes"), p.optimizer_ms, true);
}

ScalingPoint point_of(const ordered_json& timing) {
  ScalingPoint p;
  p.ranks = number_at(timing, "ranks");
  p.elements = number_at(timing, "elements");
  p.optimizer_ms = number_at(timing, "optimizer_ms");
  p.lo = number_at(timing, "optimizer_ms_lo");
  p.hi = number_at(timing, "optimizer_ms_hi");
  p.step_ms = number_at(timing, "step_ms");
  p.predicted_ms = number_at(timing, "predicted_ms");
  p.bytes = number_at(timing, "bytes_per_step_max");
  p.predicted_bytes = number_at(timing, "predicted_bytes_per_step_max");
  p.imbalance = number_at(timing, "imbalance");
  p.predicted_imbalance = number_at(timing, "predicted_imbalance");
  p.oversubscribed = timing.value("oversubscribed", false);
  if (const auto roofs = timing.find("roofline"); roofs != timing.end())
    add_works(timing, *roofs, p);
  if (!timing.contains("phases_ms")) return p;
  for (const auto& [name, ms] : timing["phases_ms"].items()) {
    p.phases.push_back({name, number_of(ms),
                        timing.contains("predicted_phases_ms")
                            ? number_at(timing["predicted_phases_ms"], name)
                            : nan_value,
                        std::find(waits.begin(), waits.end(), name) != waits.end()});
  }
  return p;
}

void compare_with_base(ScalingSeries& series) {
  std::stable_sort(series.points.begin(), series.points.end(),
                   [](const auto& a, const auto& b) { return a.ranks < b.ranks; });
  const ScalingPoint& base = series.points.front();
  series.weak = std::any_of(series.points.begin(), series.points.end(),
                            [&](const auto& p) { return p.elements != base.elements; });
  for (ScalingPoint& p : series.points) {
    if (p.oversubscribed || base.oversubscribed) continue;
    const double more = p.ranks / base.ranks;
    p.speedup = base.optimizer_ms / p.optimizer_ms;
    p.efficiency = series.weak ? p.speedup : p.speedup / more;
    if (!series.weak && more != 1) p.serial = (1 / p.speedup - 1 / more) / (1 - 1 / more);
  }
}

}  // namespace

double ScalingPoint::overlap() const {
  double waiting = 0;
  for (const Phase& phase : phases) waiting += phase.waits ? phase.ms : 0;
  return 1 - waiting / optimizer_ms;
}

bool ScalingSeries::suppressed() const {
  return std::any_of(points.begin(), points.end(),
                     [](const ScalingPoint& p) { return std::isnan(p.efficiency); });
}

std::vector<ScalingSeries> scaling_of(const StudyResults& study) {
  const std::set<std::string> grown = grown_with_ranks(study);
  std::vector<ScalingSeries> out;
  for (const StudyTrial& trial : study.trials) {
    const auto timing = trial.line.find("timing");
    if (!trial.result() || timing == trial.line.end() || !timing->is_object()) continue;
    std::string name;
    for (const auto& [key, value] : trial.params.items()) {
      if (!grown.contains(key))
        name += (name.empty() ? "" : ", ") + key + "=" + trial.param_text(key);
    }
    auto of = std::find_if(out.begin(), out.end(), [&](const auto& s) { return s.series == name; });
    if (of == out.end()) of = out.insert(out.end(), ScalingSeries{name, false, {}});
    of->points.push_back(point_of(*timing));
  }
  for (ScalingSeries& series : out) compare_with_base(series);
  return out;
}

StudyTable scaling_table(const std::vector<ScalingSeries>& all) {
  StudyTable table{
      "scaling",
      "Scaling of the optimizer's step",
      "Median of the slowest rank's times, in ms, with its 95 % interval; efficiency "
      "against the fewest ranks (strong: p0 T(p0)/(p T(p)), weak: T(p0)/T(p)), Karp and "
      "Flatt's serial fraction; never where there are more ranks than cores.",
      {"series", "kind", "ranks", "elements", "optimizer ms", "lo", "hi", "step ms", "speed-up",
       "efficiency", "serial"},
      {}};
  for (const ScalingSeries& series : all) {
    for (const ScalingPoint& p : series.points) {
      const auto known = [&](double value) {
        return std::isnan(p.efficiency) ? ordered_json("oversubscribed") : or_null(value);
      };
      table.rows.push_back({series.series, series.weak ? "weak" : "strong", p.ranks, p.elements,
                            or_null(p.optimizer_ms), or_null(p.lo), or_null(p.hi),
                            or_null(p.step_ms), known(p.speedup), known(p.efficiency),
                            or_null(p.serial)});
    }
  }
  return table;
}

StudyTable planned_table(const std::vector<ScalingSeries>& all) {
  StudyTable table{"scaling_plan",
                   "The planner's predictions",
                   "Milliseconds, and bytes sent per step by the rank that sends most; imbalance: "
                   "most over mean of the ranks' work. Overlap: what of the step is no waiting.",
                   {"series", "ranks", "optimizer ms", "predicted", "residual", "sent", "planned",
                    "imbalance", "predicted imbalance", "overlap"},
                   {}};
  for (const ScalingSeries& series : all) {
    for (const ScalingPoint& p : series.points) {
      table.rows.push_back({series.series, p.ranks, or_null(p.optimizer_ms),
                            or_null(p.predicted_ms), or_null(p.optimizer_ms - p.predicted_ms),
                            or_null(p.bytes), or_null(p.predicted_bytes), or_null(p.imbalance),
                            or_null(p.predicted_imbalance), or_null(p.overlap())});
    }
  }
  return table;
}

StudyTable phases_table(const std::vector<ScalingSeries>& all) {
  StudyTable table{"scaling_phases",
                   "Phases of the optimizer's step",
                   "Medians of the slowest rank's, in ms, beside the planner's, and what is left "
                   "between them.",
                   {"series", "ranks", "phase", "ms", "predicted", "residual", "relative"},
                   {}};
  for (const ScalingSeries& series : all) {
    for (const ScalingPoint& p : series.points) {
      for (const ScalingPoint::Phase& phase : p.phases) {
        const double left = phase.ms - phase.predicted_ms;
        table.rows.push_back(
            {series.series, p.ranks, phase.name, or_null(phase.ms), or_null(phase.predicted_ms),
             or_null(left),
             phase.predicted_ms > 0 ? or_null(left / phase.predicted_ms) : ordered_json(nullptr)});
      }
    }
  }
  return table;
}

StudyTable roofline_table(const std::vector<ScalingSeries>& all) {
  StudyTable table{
      "scaling_roofline",
      "Roofline",
      "Of the busiest rank, in flop and s: attainable is the lesser of a product of "
      "512x512 and of intensity times bandwidth (a triad; an all-reduce of 4 MB), "
      "measured beside the trial. Memory traffic is the least there can be.",
      {"series", "ranks", "work", "roof", "flop/byte", "GFLOP/s", "attainable", "share"},
      {}};
  for (const ScalingSeries& series : all) {
    for (const ScalingPoint& p : series.points) {
      for (const ScalingPoint::Work& work : p.works) {
        table.rows.push_back({series.series, p.ranks, work.name,
                              work.network ? "network" : "memory", or_null(work.intensity),
                              or_null(1e-9 * work.flops_per_s), or_null(1e-9 * work.attainable),
                              or_null(work.flops_per_s / work.attainable)});
      }
    }
  }
  return table;
}

std::string MessageSeries::name() const { return fmt::format("{}, {} ranks", collective, ranks); }

double MessageSeries::bus_bytes_per_s(double size, double time) const {
  return size / time * shape.traffic;
}

std::vector<MessageSeries> messages_of(const StudyResults& study) {
  std::map<std::pair<std::string, int>, std::map<double, double>> times;
  for (const StudyTrial& trial : study.trials) {
    const auto collective = trial.params.find("collective");
    const double ranks = trial.param("ranks"), bytes = trial.param("bytes"),
                 seconds = trial.number("final_val");
    if (!trial.result() || collective == trial.params.end() || !collective->is_string() ||
        !(ranks >= 2) || !(bytes > 0) || !(seconds > 0)) {
      continue;
    }
    double& least = times[{collective->get<std::string>(), static_cast<int>(ranks)}][bytes];
    least = least > 0 ? std::min(least, seconds) : seconds;
  }
  std::vector<MessageSeries> out;
  for (const auto& [key, of] : times) {
    MessageSeries& series = out.emplace_back();
    std::tie(series.collective, series.ranks) = key;
    series.shape = ring_shape(series.collective, series.ranks);
    for (const auto& [bytes, seconds] : of) {
      series.bytes.push_back(bytes);
      series.seconds.push_back(seconds);
    }
    constexpr std::size_t least_sizes = 5;
    if (of.size() >= least_sizes)
      series.fit = studies::fit_message(series.bytes, series.seconds, series.shape);
  }
  return out;
}

StudyTable messages_table(const std::vector<MessageSeries>& all) {
  StudyTable table{"messages",
                   "What a message costs",
                   "T = alpha (p-1) + beta (p-1)/p n of a ring, n the whole buffer (an all-reduce: "
                   "twice that), by least squares of relative errors; two pieces where AICc asks "
                   "for them. n_1/2 = alpha/beta.",
                   {"collective", "ranks", "from bytes", "alpha us", "1/beta GB/s", "n_1/2 bytes",
                    "RMS", "sizes", "best busbw GB/s"},
                   {}};
  for (const MessageSeries& series : all) {
    double best = 0;
    for (std::size_t i = 0; i < series.bytes.size(); ++i)
      best = std::max(best, series.bus_bytes_per_s(series.bytes[i], series.seconds[i]));
    if (!series.fit) continue;
    for (const studies::MessageCost& piece : series.fit->pieces) {
      table.rows.push_back(
          {series.collective, series.ranks, piece.from_bytes, json_number(1e6 * piece.latency_s),
           json_number(1e-9 * piece.bytes_per_s()), json_number(piece.half_bytes()),
           json_number(piece.rms_relative), series.bytes.size(), json_number(1e-9 * best)});
    }
  }
  return table;
}

}  // namespace orthrus::cli
