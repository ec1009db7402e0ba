#pragma once
/// @file
/// A figure of a study's report, and those of its times.

#include <string>
#include <vector>

#include "runtime/cli/study_scaling.hpp"
#include "runtime/report_plots.hpp"

namespace orthrus::cli {

/// A figure as it stands in the page, and its numbers.
struct StudyFigure {
  std::string name, title, why;
  std::string html;  ///< SVG and legend
  std::string csv;
};
[[nodiscard]] inline StudyFigure figure(const runtime::report::Plot& plot) {
  return {plot.name, plot.title, plot.why, plot_svg(plot), plot_csv(plot)};
}
[[nodiscard]] inline StudyFigure figure(const runtime::report::HeatMap& map) {
  return {map.name, map.title, map.why, heat_svg(map), heat_csv(map)};
}
/// Points from `lo` to `hi`, evenly in the logarithm. @param point  of an x
template <class F>
std::vector<runtime::report::Measured> along(double lo, double hi, F point) {
  constexpr int pieces = 80;
  std::vector<runtime::report::Measured> out;
  for (int i = 0; i <= pieces; ++i)
    out.push_back(point(lo * std::pow(hi / lo, static_cast<double>(i) / pieces)));
  return out;
}

/// Times, speed-up, efficiency and phases over ranks; of efficiencies only those that mean
/// something.
[[nodiscard]] std::vector<StudyFigure> scaling_figures(const std::vector<ScalingSeries>& all);
/// Times and bus bandwidth over the sizes of messages.
[[nodiscard]] std::vector<StudyFigure> message_figures(const std::vector<MessageSeries>& all);

}  // namespace orthrus::cli
