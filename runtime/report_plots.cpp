#include "runtime/report_plots.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "runtime/report_svg.hpp"

namespace orthrus::runtime::report {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
/// Below the ticks and above the frame the axes are named.
constexpr double title_height = 20;

/// One axis: what is shown, and where on the page.
class Placed {
 public:
  Placed(Scale scale, double page_low, double page_high)
      : scale_(scale), page_low_(page_low), page_high_(page_high) {}

  [[nodiscard]] bool shows(double v) const {
    return std::isfinite(v) && (scale_ == Scale::linear || v > 0);
  }
  void include(double v) {
    if (!shows(v)) return;
    low_ = std::min(low_, at(v));
    high_ = std::max(high_, at(v));
  }
  [[nodiscard]] bool empty() const { return !(low_ <= high_); }
  void pad(double share) {
    // One value stands in the middle.
    const double span = high_ - low_, margin = span > 1e-12 ? share * span : 0.5;
    low_ -= margin;
    high_ += margin;
  }
  /// Infinite values stand at the frame.
  [[nodiscard]] double operator()(double v) const {
    const double part = v == infinity ? 1
                        : shows(v)    ? std::clamp((at(v) - low_) / (high_ - low_), 0.0, 1.0)
                                      : 0;
    return page_low_ + part * (page_high_ - page_low_);
  }
  [[nodiscard]] std::vector<double> ticks() const {
    if (scale_ == Scale::linear) return linear_ticks(low_, high_, 6, false);
    if (scale_ == Scale::log10) return log_ticks(std::pow(10, low_), std::pow(10, high_));
    std::vector<double> out;
    const double stride = std::max(1.0, std::ceil((high_ - low_) / 12));
    for (double e = std::ceil(low_); e <= high_; e += stride) out.push_back(std::exp2(e));
    return out.size() < 2 ? log_ticks(std::exp2(low_), std::exp2(high_)) : out;
  }

 private:
  [[nodiscard]] double at(double v) const {
    return scale_ == Scale::linear ? v : scale_ == Scale::log2 ? std::log2(v) : std::log10(v);
  }
  Scale scale_;
  double page_low_, page_high_, low_ = infinity, high_ = -infinity;
};

std::string text_at(double x, double y, const char* classes, const char* anchor,
                    const std::string& text) {
  return fmt::format("<text class=\"{}\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\">{}</text>",
                     classes, x, y, anchor, escape(text));
}

std::string line_between(const char* classes, double x1, double y1, double x2, double y2) {
  return fmt::format("<line class=\"{}\" x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\"/>",
                     classes, x1, y1, x2, y2);
}

constexpr double frame_top = chart_top + title_height;

/// Grid and labels inside `height`; the axes' names at their ends.
std::string frame(const Placed& x, const Placed& y, double height, const std::string& x_title,
                  const std::string& y_title) {
  const double floor = height - chart_bottom - title_height, end = chart_width - chart_right;
  std::string out = text_at(chart_left, chart_top + 8, "tick", "start", y_title);
  for (const double tick : y.ticks()) {
    out += line_between("grid", chart_left, y(tick), end, y(tick));
    out += text_at(chart_left - 8, y(tick) + 4, "tick", "end", format_number(tick));
  }
  for (const double tick : x.ticks()) {
    out += line_between("grid", x(tick), frame_top, x(tick), floor);
    out += text_at(x(tick), floor + 18, "tick", "middle", format_number(tick));
  }
  out += line_between("axis", chart_left, floor, end, floor);
  return out + text_at(end, height - 8, "tick", "end", x_title);
}

const char* stroke_class(Stroke stroke) {
  return stroke == Stroke::faint    ? " faint"
         : stroke == Stroke::dashed ? " dashed"
         : stroke == Stroke::thick  ? " thick"
         : stroke == Stroke::wide   ? " wide"
                                    : "";
}

std::string point_title(const Curve& curve, const Measured& point) {
  std::string text = fmt::format("{}{}: {}", curve.label.empty() ? "" : curve.label + ", ",
                                 format_number(point.x), format_number(point.y));
  if (!std::isnan(point.lo)) {
    text += fmt::format(" [{}, {}]", format_number(point.lo), format_number(point.hi));
  }
  return text;
}

/// The entries of a page's legend as rows below a picture. @param[in,out] height  of the picture
std::string drawn_legend(const std::string& html, double& height) {
  const std::string item = "<li><span class=\"key ", behind = "\"></span>";
  std::string out;
  double at = chart_left, row = height;
  for (std::size_t from = html.find(item); from != std::string::npos;
       from = html.find(item, from + 1)) {
    const std::size_t classes = from + item.size(), label = html.find(behind, classes);
    const std::size_t end = html.find("</li>", label);
    const std::string text = html.substr(label + behind.size(), end - label - behind.size());
    // Letters are about 6.4 wide; escaped ones count a little more.
    const double width = 34 + 6.4 * static_cast<double>(text.size());
    if (at > chart_left && at + width > chart_width) {
      at = chart_left;
      row += 20;
    }
    out += fmt::format(
        "<rect class=\"key {}\" x=\"{:.0f}\" y=\"{:.0f}\" width=\"11\" height=\"11\" rx=\"3\"/>"
        "<text class=\"tick\" x=\"{:.0f}\" y=\"{:.0f}\">{}</text>",
        html.substr(classes, label - classes), at, row + 2, at + 17, row + 12, text);
    at += width;
  }
  if (!out.empty()) height = row + 26;
  return out;
}

}  // namespace

std::string plot_svg(const Plot& plot) {
  const double floor = plot.height - chart_bottom - title_height;
  Placed x(plot.x, chart_left, chart_width - chart_right), y(plot.y, floor, frame_top);
  for (const Curve& curve : plot.curves) {
    for (const Measured& p : curve.points) {
      if (!x.shows(p.x) || !y.shows(p.y)) continue;
      x.include(p.x);
      for (const double v : {p.y, p.lo, p.hi}) y.include(v);
    }
  }
  if (x.empty() || y.empty()) return "<p class=\"none\">Nothing measured.</p>\n";
  // Intervals may reach far: marks widen the picture, their ends do not.
  for (const Mark& mark : plot.marks) x.include(mark.x);
  x.pad(0.04);
  y.pad(0.06);
  std::vector<std::pair<std::string, std::string>> keys;
  std::string out = svg_open(plot.height, plot.title);
  out += frame(x, y, plot.height, plot.x_title, plot.y_title);
  for (const Mark& mark : plot.marks) {
    if (!x.shows(mark.x)) continue;
    const int color = mark.color % palette;
    const std::string known = std::isnan(mark.lo) ? ""
                                                  : fmt::format(" [{}, {}]", format_number(mark.lo),
                                                                format_number(mark.hi));
    out +=
        fmt::format("<g><title>{} {}{}</title>", escape(mark.label), format_number(mark.x), known);
    if (!std::isnan(mark.lo)) {
      out += fmt::format(
          "<rect class=\"f{} band\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" "
          "height=\"{:.1f}\"/>",
          color, x(mark.lo), frame_top, std::max(1.0, x(mark.hi) - x(mark.lo)), floor - frame_top);
    }
    out += line_between(fmt::format("line s{} dashed", color).c_str(), x(mark.x), frame_top,
                        x(mark.x), floor) +
           "</g>";
    if (!mark.label.empty()) keys.emplace_back(fmt::format("f{} faint", color), mark.label);
  }
  for (const Curve& curve : plot.curves) {
    const int color = curve.color % palette;
    std::string path, points, note;
    for (const Measured& p : curve.points) {
      if (!x.shows(p.x) || !y.shows(p.y)) continue;
      if (!curve.note.empty()) note = text_at(x(p.x), y(p.y) - 5, "tick", "end", curve.note);
      path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", x(p.x), y(p.y));
      if (!curve.markers) continue;
      if (!std::isnan(p.lo)) {
        points +=
            line_between(fmt::format("line s{}", color).c_str(), x(p.x), y(p.lo), x(p.x), y(p.hi));
      }
      points += fmt::format(
          "<circle class=\"f{}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3.5\"><title>{}</title></circle>",
          color, x(p.x), y(p.y), escape(point_title(curve, p)));
    }
    if (path.empty()) continue;
    if (curve.line) {
      out += fmt::format("<path class=\"line s{}{}\" d=\"{}\"/>", color, stroke_class(curve.stroke),
                         path);
    }
    out += points + note;
    if (!curve.label.empty()) {
      keys.emplace_back(fmt::format("f{}{}", color, stroke_class(curve.stroke)), curve.label);
    }
  }
  return out + "</svg>\n" + legend(keys);
}

std::string plot_csv(const Plot& plot) {
  std::string out = "series,x,y,lo,hi\n";
  for (const Curve& curve : plot.curves) {
    for (const Measured& p : curve.points) {
      out += fmt::format("{},{},{},{},{}\n", csv_field(curve.label), csv_number(p.x),
                         csv_number(p.y), csv_number(p.lo), csv_number(p.hi));
    }
  }
  for (const Mark& mark : plot.marks) {
    out += fmt::format("{},{},,{},{}\n", csv_field(mark.label), csv_number(mark.x),
                       csv_number(mark.lo), csv_number(mark.hi));
  }
  return out;
}

std::string heat_svg(const HeatMap& map) {
  constexpr double pitch = 26;
  const double height =
      pitch * static_cast<double>(map.rows.size()) + frame_top + chart_bottom + title_height;
  const double floor = height - chart_bottom - title_height;
  Placed x(Scale::log10, chart_left, chart_width - chart_right);
  // Two neighbours' distance: how wide a field is.
  double gap = infinity;
  for (const HeatMap::Row& row : map.rows) {
    for (std::size_t i = 0; i < row.values.size(); ++i) {
      x.include(row.values[i].x);
      if (i > 0) gap = std::min(gap, row.values[i].x / row.values[i - 1].x);
    }
  }
  if (x.empty()) return "<p class=\"none\">Nothing measured.</p>\n";
  if (!std::isfinite(gap)) gap = 2;
  for (const HeatMap::Row& row : map.rows) {
    for (const Measured& v : row.values) {
      x.include(v.x * std::sqrt(gap));
      x.include(v.x / std::sqrt(gap));
    }
  }
  std::string out = svg_open(height, map.title);
  out += text_at(chart_left, chart_top + 8, "tick", "start", map.y_title);
  for (const double tick : x.ticks()) {
    out += text_at(x(tick), floor + 18, "tick", "middle", format_number(tick));
  }
  for (std::size_t r = 0; r < map.rows.size(); ++r) {
    const HeatMap::Row& row = map.rows[r];
    const double top = floor - pitch * static_cast<double>(r + 1);
    out += text_at(chart_left - 8, top + 17, "tick", "end", row.label);
    double least = infinity;
    for (const Measured& v : row.values) least = std::isfinite(v.y) ? std::min(least, v.y) : least;
    for (const Measured& v : row.values) {
      const double left = x(v.x / std::sqrt(gap)), width = x(v.x * std::sqrt(gap)) - left - 1;
      const bool finite = std::isfinite(v.y);
      // Half as dark at 1.2 times the row's best, whatever its own size.
      const double shade = finite ? 1 / (1 + (v.y - least) / (0.2 * std::abs(least))) : 0;
      out += fmt::format(
          "<rect class=\"f0 cell\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" "
          "fill-opacity=\"{:.2f}\"><title>{} {}, {} {}: {}</title></rect>",
          left, top, width, pitch - 2, std::max(0.04, shade), escape(map.y_title),
          escape(row.label), escape(map.x_title), format_number(v.x),
          finite ? format_number(v.y) : "diverged or not reached");
      if (!finite) out += text_at(left + width / 2, top + 16, "tick", "middle", "×");
      if (v.x == row.best) {
        out += fmt::format("<circle class=\"ridge\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"5\"/>",
                           left + width / 2, top + pitch / 2 - 1);
      }
    }
  }
  return out + text_at(chart_width - chart_right, height - 8, "tick", "end", map.x_title) +
         "</svg>\n";
}

std::string heat_csv(const HeatMap& map) {
  std::string out = "row,x,value,best\n";
  for (const HeatMap::Row& row : map.rows) {
    for (const Measured& v : row.values) {
      out += fmt::format("{},{},{},{}\n", csv_field(row.label), csv_number(v.x), csv_number(v.y),
                         v.x == row.best ? 1 : 0);
    }
  }
  return out;
}

std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"') out += '"';
    out += c;
  }
  return out + "\"";
}

std::string csv_number(double value) {
  if (std::isnan(value)) return "";
  return fmt::format("{}", value);
}

std::string standalone_svg(const std::string& svg) {
  const std::size_t begin = svg.find("<svg"), end = svg.find("</svg>");
  if (begin == std::string::npos || end == std::string::npos) return {};
  const std::size_t open = svg.find('>', begin) + 1;
  std::string tag = svg.substr(begin + 5, open - begin - 5);
  const std::size_t size = tag.find("viewBox=\"0 0 "), size_end = tag.find('"', size + 9);
  double height = std::strtod(tag.c_str() + tag.rfind(' ', size_end), nullptr);
  const std::string key = drawn_legend(svg.substr(end), height);
  tag.replace(size, size_end - size,
              fmt::format("viewBox=\"0 0 {:.0f} {:.0f}", chart_width, height));
  return "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<svg xmlns=\"http://www.w3.org/2000/svg\" " +
         tag + "<style>" + chart_style() +
         "text{font-family:system-ui,sans-serif}</style><rect width=\"100%\" height=\"100%\" "
         "style=\"fill:var(--card)\"/>" +
         svg.substr(open, end - open) + key + "</svg>\n";
}

}  // namespace orthrus::runtime::report
