#pragma once
/// @file
/// Plots of measurements against each other, with error bars, as SVG and as the CSV behind it:
/// curves, marks with intervals, and maps of tuning curves.

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "runtime/report_charts.hpp"

namespace orthrus::runtime::report {

/// Logarithmic axes leave out what is not above zero.
enum class Scale { linear, log2, log10 };

struct Measured {
  double x = 0, y = 0;
  double lo = std::numeric_limits<double>::quiet_NaN();  ///< of y; NaN: no error bar
  double hi = std::numeric_limits<double>::quiet_NaN();
};

struct Curve {
  std::string label;  ///< empty: not in the legend
  int color = 0;
  Stroke stroke = Stroke::plain;
  std::vector<Measured> points;
  bool line = true;      ///< joined
  bool markers = false;  ///< a circle at every point
  std::string note{};    ///< beside its last point
};

/// A vertical line at x, and what it is known to within: NaN for nothing.
struct Mark {
  std::string label;
  int color = 0;
  double x = 0;
  double lo = std::numeric_limits<double>::quiet_NaN();
  double hi = std::numeric_limits<double>::quiet_NaN();
};

struct Plot {
  std::string name;   ///< of its files
  std::string title;  ///< of the card
  std::string why;    ///< how to read it
  std::string x_title, y_title;
  Scale x = Scale::linear, y = Scale::linear;
  std::vector<Curve> curves;
  std::vector<Mark> marks;
  double height = 320;
};

/// @return a line of words where nothing can be drawn.
std::string plot_svg(const Plot& plot);
/// series,x,y,lo,hi of every point and mark (whose y is empty).
std::string plot_csv(const Plot& plot);

/// A value for every tried (x, y), darker where it is nearer to the row's best.
struct HeatMap {
  std::string name, title, why, x_title, y_title;
  struct Row {
    std::string label;
    std::vector<Measured> values;  ///< x, and y the value: not finite where it diverged
    double best = std::numeric_limits<double>::quiet_NaN();  ///< x of the ridge
  };
  std::vector<Row> rows;  ///< from below
};
std::string heat_svg(const HeatMap& map);
/// row,x,value,best
std::string heat_csv(const HeatMap& map);

/// `text` as a field of CSV: in quotes where it must be.
std::string csv_field(const std::string& text);
/// Shortest digits that read back the same; empty when NaN, "inf", "-inf".
std::string csv_number(double value);

/// An SVG of the page as a file of its own, with the style it needs.
std::string standalone_svg(const std::string& svg);

}  // namespace orthrus::runtime::report
