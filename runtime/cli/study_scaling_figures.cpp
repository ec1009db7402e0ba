#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <string_view>

#include "runtime/cli/study_figure.hpp"
#include "runtime/report_svg.hpp"

namespace orthrus::cli {
namespace {

using runtime::report::csv_field;
using runtime::report::csv_number;
using runtime::report::Curve;
using runtime::report::format_number;
using runtime::report::Measured;
using runtime::report::Plot;
using runtime::report::Scale;
using runtime::report::Stroke;

std::string label_of(const ScalingSeries& series, const std::string& what) {
  return series.series.empty() ? what : series.series + ": " + what;
}

template <class F>
Curve over_ranks(const ScalingSeries& series, const std::string& label, int color, Stroke stroke,
                 F value) {
  Curve curve{label, color, stroke, {}, true, stroke == Stroke::plain};
  for (const ScalingPoint& p : series.points) {
    Measured at = value(p);
    at.x = p.ranks;
    if (std::isfinite(at.y)) curve.points.push_back(at);
  }
  return curve;
}

Plot times_plot(const std::vector<ScalingSeries>& all) {
  Plot plot{"scaling-times",
            "Times over ranks",
            "The slowest rank's, medians with 95 % intervals; faint: what the planner foretold.",
            "ranks",
            "optimizer, ms",
            Scale::log2,
            Scale::log10,
            {},
            {}};
  int color = 0;
  for (const ScalingSeries& series : all) {
    plot.curves.push_back(over_ranks(series, label_of(series, "measured"), color, Stroke::plain,
                                     [](const ScalingPoint& p) {
                                       return Measured{0, p.optimizer_ms, p.lo, p.hi};
                                     }));
    plot.curves.push_back(over_ranks(series, label_of(series, "predicted"), color, Stroke::faint,
                                     [](const ScalingPoint& p) {
                                       return Measured{0, p.predicted_ms};
                                     }));
    ++color;
  }
  return plot;
}

/// Over the base's median, so that an interval is that of the time.
Plot speedup_plot(const std::vector<ScalingSeries>& all) {
  Plot plot{"scaling-speedup",
            "Speed-up",
            "Over the fewest ranks, whose time is in the table; dashed: as many times as ranks. "
            "Intervals are those of the times.",
            "ranks",
            "speed-up",
            Scale::log2,
            Scale::log2,
            {},
            {}};
  int color = 0;
  double least = INFINITY, most = 0;
  for (const ScalingSeries& series : all) {
    const ScalingPoint& base = series.points.front();
    if (!series.weak) {
      plot.curves.push_back(over_ranks(
          series, label_of(series, "measured"), color, Stroke::plain, [&](const ScalingPoint& p) {
            return Measured{0, p.speedup, base.optimizer_ms / p.hi, base.optimizer_ms / p.lo};
          }));
      least = std::min(least, base.ranks);
      most = std::max(most, series.points.back().ranks);
    }
    ++color;
  }
  if (most > least) {
    plot.curves.push_back(
        {"ideal", color, Stroke::dashed, {{least, 1}, {most, most / least}}, true, false});
  }
  return plot;
}

Plot efficiency_plot(const std::vector<ScalingSeries>& all) {
  Plot plot{"scaling-efficiency",
            "Efficiency",
            "Strong: p0 T(p0)/(p T(p)); weak: T(p0)/T(p). 1 is perfect.",
            "ranks",
            "efficiency",
            Scale::log2,
            Scale::linear,
            {},
            {}};
  int color = 0;
  for (const ScalingSeries& series : all) {
    plot.curves.push_back(over_ranks(series, label_of(series, series.weak ? "weak" : "strong"),
                                     color++, Stroke::plain, [&](const ScalingPoint& p) {
                                       const double share = p.efficiency * p.optimizer_ms;
                                       return Measured{0, p.efficiency, share / p.hi, share / p.lo};
                                     }));
  }
  return plot;
}

Plot bytes_plot(const std::vector<ScalingSeries>& all) {
  Plot plot{"scaling-bytes",
            "Bytes per step",
            "Sent by the rank that sends most: circles are counted, lines the plan's.",
            "ranks",
            "bytes",
            Scale::log2,
            Scale::log10,
            {},
            {}};
  int color = 0;
  for (const ScalingSeries& series : all) {
    Curve counted = over_ranks(series, label_of(series, "counted"), color, Stroke::plain,
                               [](const ScalingPoint& p) {
                                 return Measured{0, p.bytes};
                               });
    counted.line = false;
    plot.curves.push_back(std::move(counted));
    plot.curves.push_back(over_ranks(series, label_of(series, "planned"), color++, Stroke::faint,
                                     [](const ScalingPoint& p) {
                                       return Measured{0, p.predicted_bytes};
                                     }));
  }
  return plot;
}

/// Roofs of the point with most ranks, and work of all of them.
Plot roofline_plot(const std::vector<ScalingSeries>& all) {
  Plot plot{
      "scaling-roofline",
      "Roofline",
      "Lines: what the machine can do at an intensity, by memory and, dashed, by the network, "
      "measured beside the trial with most ranks. Circles: what was done.",
      "flop per byte",
      "flop/s",
      Scale::log10,
      Scale::log10,
      {},
      {}};
  double least = INFINITY, most = 0;
  const ScalingPoint* widest = nullptr;
  for (const ScalingSeries& series : all) {
    for (const ScalingPoint& p : series.points) {
      for (const ScalingPoint::Work& work : p.works) {
        least = std::min(least, work.intensity);
        most = std::max(most, work.intensity);
        if (widest == nullptr || p.ranks > widest->ranks) widest = &p;
      }
    }
  }
  if (widest == nullptr) return plot;
  const auto roof = [&](const std::string& name, double width, Stroke stroke) {
    plot.curves.push_back(
        {name, 0, stroke, along(least / 2, 2 * most, [&](double intensity) {
           return Measured{intensity, std::min(widest->peak_flops_per_s, intensity * width)};
         })});
  };
  roof("memory", widest->memory_bytes_per_s, Stroke::plain);
  if (widest->network_bytes_per_s > 0) roof("network", widest->network_bytes_per_s, Stroke::dashed);
  int color = 1;
  for (const char* const name : {"lmo", "update", "step"}) {
    Curve curve{name, color++, Stroke::plain, {}, false, true};
    for (const ScalingSeries& series : all) {
      for (const ScalingPoint& p : series.points) {
        for (const ScalingPoint::Work& work : p.works) {
          if (work.name == name) curve.points.push_back({work.intensity, work.flops_per_s});
        }
      }
    }
    if (!curve.points.empty()) plot.curves.push_back(std::move(curve));
  }
  return plot;
}

/// Two bars a number of ranks: measured, predicted.
StudyFigure phases_figure(const ScalingSeries& series, const std::string& name) {
  std::vector<runtime::report::HorizontalBar> bars;
  std::string csv = "ranks,kind,phase,ms\n";
  for (const ScalingPoint& p : series.points) {
    for (const bool predicted : {false, true}) {
      runtime::report::HorizontalBar bar;
      bar.label = fmt::format("{:g} {}", p.ranks, predicted ? "predicted" : "measured");
      int color = 0;
      for (const ScalingPoint::Phase& phase : p.phases) {
        const double ms = predicted ? phase.predicted_ms : phase.ms;
        if (std::isfinite(ms)) {
          bar.segments.push_back({color, ms, phase.name});
          csv += fmt::format("{},{},{},{}\n", csv_number(p.ranks),
                             predicted ? "predicted" : "measured", csv_field(phase.name),
                             csv_number(ms));
        }
        ++color;
      }
      if (!bar.segments.empty()) bars.push_back(std::move(bar));
    }
  }
  std::vector<std::pair<std::string, std::string>> keys;
  for (const ScalingPoint::Phase& phase : series.points.front().phases)
    keys.emplace_back(fmt::format("f{}", keys.size()), phase.name);
  const std::string title = label_of(series, "phases of the optimizer's step");
  return {name, title,
          "Medians of the slowest rank's in each phase, in ms, so that their sum is at least the "
          "step's; the planner's beside them.",
          bars_chart(title, bars, [](double ms) { return format_number(ms) + " ms"; }) +
              runtime::report::legend(keys),
          csv};
}

}  // namespace

std::vector<StudyFigure> scaling_figures(const std::vector<ScalingSeries>& all) {
  std::vector<StudyFigure> out;
  if (all.empty()) return out;
  out.push_back(figure(times_plot(all)));
  for (const Plot& plot : {speedup_plot(all), efficiency_plot(all)}) {
    if (std::any_of(plot.curves.begin(), plot.curves.end(), [](const Curve& curve) {
          return curve.stroke == Stroke::plain && !curve.points.empty();
        })) {
      out.push_back(figure(plot));
    }
  }
  out.push_back(figure(bytes_plot(all)));
  if (const Plot roofs = roofline_plot(all); !roofs.curves.empty()) out.push_back(figure(roofs));
  for (std::size_t i = 0; i < all.size(); ++i) {
    out.push_back(phases_figure(
        all[i], all.size() == 1 ? "scaling-phases" : fmt::format("scaling-phases-{}", i + 1)));
  }
  return out;
}

std::vector<StudyFigure> message_figures(const std::vector<MessageSeries>& all) {
  if (all.empty()) return {};
  Plot times{"message-times",
             "Times of messages",
             "Circles are measured, lines the law of a ring: latency below n_1/2, bandwidth above.",
             "bytes of the whole buffer",
             "seconds",
             Scale::log10,
             Scale::log10,
             {},
             {}};
  Plot bus{"message-busbw",
           "Bus bandwidth",
           "Bytes per second that every link carries, as nccl-tests counts them: of an all-reduce "
           "2(p-1)/p, of the others (p-1)/p of the buffer.",
           "bytes of the whole buffer",
           "bytes/s",
           Scale::log10,
           Scale::log10,
           {},
           {}};
  int color = 0;
  for (const MessageSeries& series : all) {
    Curve time{series.name(), color, Stroke::plain, {}, false, true};
    Curve width{series.name(), color, Stroke::plain, {}, true, true};
    for (std::size_t i = 0; i < series.bytes.size(); ++i) {
      time.points.push_back({series.bytes[i], series.seconds[i]});
      width.points.push_back(
          {series.bytes[i], series.bus_bytes_per_s(series.bytes[i], series.seconds[i])});
    }
    times.curves.push_back(std::move(time));
    bus.curves.push_back(std::move(width));
    if (series.fit) {
      times.curves.push_back({"", color, Stroke::faint,
                              along(series.bytes.front(), series.bytes.back(), [&](double bytes) {
                                return Measured{bytes, series.fit->seconds(bytes, series.shape)};
                              })});
    }
    ++color;
  }
  return {figure(times), figure(bus)};
}

}  // namespace orthrus::cli
