#pragma once
/// @file
/// Charts of a report, as SVG inside the page: lines over steps, phases of a step, horizontal bars.

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/report_data.hpp"
#include "runtime/report_page.hpp"

namespace orthrus::runtime::report {

struct Point {
  double x, y;
};

/// `wide` is a translucent band along a line.
enum class Stroke { plain, faint, dashed, thick, wide };

struct Line {
  std::string label;  ///< empty: not in the legend
  int color = 0;      ///< index into the palette
  Stroke stroke = Stroke::plain;
  std::vector<Point> points;
  bool markers = false;
};

struct Axis {
  bool from_zero = false;
  bool allow_log = false;
  std::function<std::string(double)> format = format_number;
  double height = 260;
};

/// What `get` says of each row, where it is finite.
std::vector<Point> series(const std::vector<Row>& rows,
                          const std::function<double(const Row&)>& get);
std::vector<Point> validation_series(const std::vector<Row>& rows, const std::string& key);
/// Train losses are noisy: many points are shown twice, as they are and smoothed.
void add_train_loss(std::vector<Line>& lines, const std::vector<Row>& rows,
                    const std::string& label, int color, bool with_raw);
std::string line_chart(std::string_view title, const std::vector<Line>& raw, const Axis& axis);

/// The walk of the optimizer over the run: at most 110 bars, each the mean of its steps.
std::string phase_chart(const std::vector<Row>& rows);

struct Segment {
  int color;
  double value;
  std::string label;
};
struct HorizontalBar {
  std::string label;
  std::vector<Segment> segments;
};

/// Horizontal stacked bars, the total written behind each.
std::string bars_chart(std::string_view title, const std::vector<HorizontalBar>& bars,
                       const std::function<std::string(double)>& format);
/// @param memory  the list of ranks in a summary. @return nothing when it is empty.
std::string memory_chart(const json& memory);

}  // namespace orthrus::runtime::report
