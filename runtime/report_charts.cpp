#include "runtime/report_charts.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "runtime/report.hpp"
#include "runtime/report_svg.hpp"

namespace orthrus::runtime::report {
namespace {

/// Keeps the lowest and the highest point of each of `buckets` equal runs of x, so that the outline
/// of 100 000 points survives in 2·`buckets`.
std::vector<Point> downsample(const std::vector<Point>& points, std::size_t buckets) {
  if (points.size() <= 2 * buckets) return points;
  std::vector<Point> out;
  out.reserve(2 * buckets + 2);
  out.push_back(points.front());
  for (std::size_t b = 0; b < buckets; ++b) {
    const std::size_t begin = points.size() * b / buckets;
    const std::size_t end = points.size() * (b + 1) / buckets;
    std::size_t low = begin, high = begin;
    for (std::size_t i = begin; i < end; ++i) {
      if (points[i].y < points[low].y) low = i;
      if (points[i].y > points[high].y) high = i;
    }
    out.push_back(points[std::min(low, high)]);
    if (low != high) out.push_back(points[std::max(low, high)]);
  }
  out.push_back(points.back());
  return out;
}

std::vector<Point> finite(std::vector<Point> points) {
  std::erase_if(points, [](const Point& p) { return !std::isfinite(p.x) || !std::isfinite(p.y); });
  return points;
}

/// The mean of about 2 % of the run around each point; fewer at the ends. Not a running mean of the
/// past, which would lag behind where the loss falls fastest.
std::vector<Point> smooth(const std::vector<Point>& points) {
  std::vector<double> sums{0};
  sums.reserve(points.size() + 1);
  for (const Point& p : points) sums.push_back(sums.back() + p.y);
  const std::size_t reach = std::max<std::size_t>(2, points.size() / 100);
  std::vector<Point> out;
  out.reserve(points.size());
  for (std::size_t i = 0; i < points.size(); ++i) {
    const std::size_t half = std::min({reach, i, points.size() - 1 - i});
    out.push_back(
        {points[i].x, (sums[i + half + 1] - sums[i - half]) / static_cast<double>(2 * half + 1)});
  }
  return out;
}

/// Grid, labels and the frame of a chart; `x` and `y` map values to the page.
template <class X, class Y>
std::string frame(const std::vector<double>& x_ticks, const std::vector<double>& y_ticks, X x, Y y,
                  double height, const std::function<std::string(double)>& format) {
  std::string out;
  for (const double tick : y_ticks) {
    out += fmt::format(
        "<line class=\"grid\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>",
        chart_left, chart_width - chart_right, y(tick), y(tick));
    out +=
        fmt::format("<text class=\"tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>",
                    chart_left - 8, y(tick) + 4, escape(format(tick)));
  }
  for (const double tick : x_ticks) {
    const std::string shown = format_count(tick);
    // A long number under the right end would be cut by the edge of the picture.
    const double half = 3.8 * static_cast<double>(shown.size());
    const double at = std::min(x(tick), chart_width - half);
    out += fmt::format(
        "<text class=\"tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>", at,
        height - chart_bottom + 18, shown);
  }
  out += fmt::format(
      "<line class=\"axis\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>", chart_left,
      chart_width - chart_right, height - chart_bottom, height - chart_bottom);
  return out;
}

/// At most `most` bytes, never cut inside a UTF-8 sequence.
std::string shorten(const std::string& label, std::size_t most) {
  if (label.size() <= most) return label;
  std::size_t end = most - 3;
  while (end > 0 && (static_cast<unsigned char>(label[end]) & 0xC0) == 0x80) --end;
  return label.substr(0, end) + "...";
}

}  // namespace

std::vector<Point> series(const std::vector<Row>& rows,
                          const std::function<double(const Row&)>& get) {
  std::vector<Point> out;
  for (const Row& row : rows) {
    const double value = get(row);
    if (std::isfinite(value)) out.push_back({row.step, value});
  }
  return out;
}

std::vector<Point> validation_series(const std::vector<Row>& rows, const std::string& key) {
  return series(rows, [&](const Row& row) {
    const auto it = row.validation.find(key);
    return it == row.validation.end() ? nan_value : it->second;
  });
}

void add_train_loss(std::vector<Line>& lines, const std::vector<Row>& rows,
                    const std::string& label, int color, bool with_raw) {
  const std::vector<Point> points = series(rows, [](const Row& row) { return row.loss; });
  if (points.size() < 60) {
    lines.push_back({label, color, Stroke::plain, points, false});
    return;
  }
  if (with_raw) lines.push_back({"", color, Stroke::faint, points, false});
  lines.push_back({label, color, Stroke::plain, smooth(points), false});
}

std::string line_chart(std::string_view title, const std::vector<Line>& raw, const Axis& axis) {
  std::vector<Line> lines;
  double x0 = std::numeric_limits<double>::infinity(), x1 = -x0, y0 = x0, y1 = -x0;
  for (Line line : raw) {
    line.points = finite(std::move(line.points));
    for (const Point& p : line.points) {
      x0 = std::min(x0, p.x);
      x1 = std::max(x1, p.x);
      y0 = std::min(y0, p.y);
      y1 = std::max(y1, p.y);
    }
    if (!line.points.empty()) lines.push_back(std::move(line));
  }
  if (lines.empty()) return "<p class=\"none\">No finite values.</p>\n";
  const bool log = axis.allow_log && y0 > 0 && y1 / y0 > 50;
  if (log) {
    const double margin = std::pow(y1 / y0, 0.04);
    y0 /= margin;
    y1 *= margin;
  } else {
    if (axis.from_zero) y0 = std::min(0.0, y0);
    double span = y1 - y0;
    if (!(span > 1e-12 * std::max(std::abs(y0), std::abs(y1)))) {
      span = y1 != 0 ? std::abs(y1) : 1;  // one value: put it in the middle
      y0 -= span / 2;
    }
    y1 += 0.06 * span;
    if (!axis.from_zero) y0 -= 0.06 * span;
  }
  if (!(x1 > x0)) {
    x0 -= 1;
    x1 += 1;
  }
  const double plot_width = chart_width - chart_left - chart_right,
               plot_height = axis.height - chart_top - chart_bottom;
  const auto x = [&](double v) { return chart_left + plot_width * (v - x0) / (x1 - x0); };
  const auto y = [&](double v) {
    const double part = log ? std::log(v / y0) / std::log(y1 / y0) : (v - y0) / (y1 - y0);
    return chart_top + plot_height * (1 - part);
  };
  const std::vector<double> y_ticks = log ? log_ticks(y0, y1) : linear_ticks(y0, y1, 5, false);
  std::vector<double> x_ticks = linear_ticks(std::max(0.0, x0), x1, 8, true);
  std::vector<std::pair<std::string, std::string>> keys;
  std::string out = svg_open(axis.height, title);
  out += frame(x_ticks, y_ticks, x, y, axis.height, axis.format);
  for (const Line& line : lines) {
    const std::vector<Point> points = downsample(line.points, 500);
    const int color = line.color % palette;
    const char* stroke = line.stroke == Stroke::faint    ? " faint"
                         : line.stroke == Stroke::dashed ? " dashed"
                                                         : "";
    if (!line.label.empty()) keys.emplace_back(fmt::format("f{}{}", color, stroke), line.label);
    if (points.size() > 1) {
      std::string d;
      for (const Point& p : points) {
        d += fmt::format("{}{:.1f} {:.1f}", d.empty() ? "M" : "L", x(p.x), y(p.y));
      }
      out += fmt::format("<path class=\"line s{}{}\" d=\"{}\"/>", color, stroke, d);
    }
    if (points.size() == 1 || (line.markers && points.size() <= 60)) {
      for (const Point& p : points) {
        out += fmt::format(
            "<circle class=\"f{}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\"><title>{}step {}: "
            "{}</title></circle>",
            color, x(p.x), y(p.y), line.label.empty() ? "" : escape(line.label) + ", ",
            format_count(p.x), escape(axis.format(p.y)));
      }
    }
  }
  return out + "</svg>\n" + legend(keys);
}

std::string phase_chart(const std::vector<Row>& rows) {
  constexpr std::size_t limit = 110;
  constexpr double height = 240;
  struct Bar {
    double from = 0, to = 0;
    std::array<double, phases.size()> ms{};
    double total = 0;
  };
  std::vector<Bar> bars;
  const std::size_t count = std::min(limit, rows.size());
  for (std::size_t b = 0; b < count; ++b) {
    const std::size_t begin = rows.size() * b / count, end = rows.size() * (b + 1) / count;
    Bar bar{rows[begin].step, rows[end - 1].step, {}, 0};
    for (std::size_t i = begin; i < end; ++i) {
      for (std::size_t p = 0; p < phases.size(); ++p) {
        bar.ms[p] += rows[i].phase_ms[p] / static_cast<double>(end - begin);
      }
    }
    for (const double ms : bar.ms) bar.total += ms;
    bars.push_back(bar);
  }
  std::vector<double> totals;
  for (const Bar& bar : bars) totals.push_back(bar.total);
  std::sort(totals.begin(), totals.end());
  if (totals.empty() || !(totals.back() > 0)) return "<p class=\"none\">No times.</p>\n";
  // The first step warms caches and libraries up and may be many times the rest: cut it, and say
  // so.
  double y1 = totals.back();
  const double usual = totals[totals.size() * 9 / 10 - (totals.size() >= 10 ? 1 : 0)];
  const double typical = totals.size() >= 10 ? usual : totals[totals.size() / 2];
  const bool cut = totals.size() > 2 && y1 > 2.5 * typical && typical > 0;
  if (cut) y1 = 1.6 * typical;
  y1 *= 1.05;
  const double plot_width = chart_width - chart_left - chart_right,
               plot_height = height - chart_top - chart_bottom;
  const double pitch = std::min(plot_width / static_cast<double>(bars.size()), 120.0);
  const double gap = pitch > 6 ? 2 : (pitch > 3 ? 1 : 0);
  const auto y = [&](double v) { return chart_top + plot_height * (1 - v / y1); };
  const double x_first = bars.front().from, x_last = std::max(bars.back().to, x_first + 1);
  // A tick stands under the middle of the bar that holds its step.
  const auto x = [&](double step) {
    std::size_t b = 0;
    while (b + 1 < bars.size() && bars[b].to < step) ++b;
    return chart_left + pitch * (static_cast<double>(b) + 0.5);
  };
  std::vector<double> x_ticks =
      bars.size() == 1 ? std::vector<double>{x_first} : linear_ticks(x_first, x_last, 8, true);
  std::erase_if(x_ticks, [&](double t) { return t > bars.back().to; });
  std::string out = svg_open(height, "Milliseconds of the optimizer per step, by phase");
  out += frame(x_ticks, linear_ticks(0, y1, 4, false), x, y, height, format_ms);
  std::array<bool, phases.size()> seen{};
  for (std::size_t b = 0; b < bars.size(); ++b) {
    const Bar& bar = bars[b];
    const double at = chart_left + pitch * static_cast<double>(b);
    out += "<g>";
    out += bar.from == bar.to
               ? fmt::format("<title>step {}: {}</title>", format_count(bar.from),
                             format_ms(bar.total))
               : fmt::format("<title>steps {} to {}, mean: {}</title>", format_count(bar.from),
                             format_count(bar.to), format_ms(bar.total));
    double sum = 0;
    for (std::size_t p = 0; p < phases.size(); ++p) {
      if (!(bar.ms[p] > 0)) continue;
      seen[p] = true;
      const double low = std::min(sum, y1), high = std::min(sum + bar.ms[p], y1);
      sum += bar.ms[p];
      if (y(low) - y(high) < 0.05) continue;
      out += fmt::format(
          "<rect class=\"f{}\" x=\"{:.2f}\" y=\"{:.2f}\" width=\"{:.2f}\" height=\"{:.2f}\"/>", p,
          at, y(high), std::max(0.5, pitch - gap), y(low) - y(high));
    }
    out += "</g>";
  }
  std::string note;
  if (cut) {
    std::size_t beyond = 0;
    double most = 0;
    for (const Bar& bar : bars) {
      if (bar.total > y1) {
        ++beyond;
        most = std::max(most, bar.total);
      }
    }
    note = fmt::format("<p class=\"note\">{} of {} bars {} cut; the longest is {}.</p>\n", beyond,
                       bars.size(), beyond == 1 ? "is" : "are", format_ms(most));
  }
  out += "</svg>\n";
  std::vector<std::pair<std::string, std::string>> keys;
  for (std::size_t p = 0; p < phases.size(); ++p) {
    if (seen[p]) keys.emplace_back(fmt::format("f{}", p), phases[p].label);
  }
  return out + legend(keys) + note;
}

std::string bars_chart(std::string_view title, const std::vector<HorizontalBar>& bars,
                       const std::function<std::string(double)>& format) {
  constexpr double pitch = 24, label_width = 150, value_width = 96;
  double most = 0;
  for (const HorizontalBar& bar : bars) {
    double total = 0;
    for (const Segment& s : bar.segments) total += std::isfinite(s.value) ? s.value : 0;
    most = std::max(most, total);
  }
  if (bars.empty()) return "<p class=\"none\">No values.</p>\n";
  const double height = pitch * static_cast<double>(bars.size()) + 8;
  const double scale = most > 0 ? (chart_width - label_width - value_width) / most : 0;
  std::string out = svg_open(height, title);
  for (std::size_t b = 0; b < bars.size(); ++b) {
    const double y = 4 + pitch * static_cast<double>(b);
    const std::string shown = shorten(bars[b].label, 22);
    out += fmt::format(
        "<g><title>{}</title><text class=\"label\" x=\"{:.1f}\" y=\"{:.1f}\" "
        "text-anchor=\"end\">{}</text></g>",
        escape(bars[b].label), label_width - 8, y + 15, escape(shown));
    double at = label_width, total = 0;
    for (const Segment& s : bars[b].segments) {
      if (!(s.value > 0)) continue;
      const double width = s.value * scale;
      out += fmt::format(
          "<rect class=\"f{}\" x=\"{:.2f}\" y=\"{:.1f}\" width=\"{:.2f}\" "
          "height=\"{:.1f}\"><title>{}</title></rect>",
          s.color % palette, at, y + 2, std::max(0.4, width), pitch - 6,
          escape(s.label.empty() ? format(s.value) : s.label + ": " + format(s.value)));
      at += width;
      total += s.value;
    }
    out += fmt::format("<text class=\"label\" x=\"{:.1f}\" y=\"{:.1f}\">{}</text>", at + 8, y + 15,
                       escape(format(total)));
  }
  return out + "</svg>\n";
}

std::string memory_chart(const json& memory) {
  constexpr std::array<std::pair<const char*, const char*>, 4> categories{
      {{"weights", "weights"},
       {"gradients", "gradients"},
       {"state", "optimizer state"},
       {"work", "buckets and scratch"}}};
  constexpr std::size_t limit = 16;
  struct Rank {
    double rank;
    std::array<double, 4> bytes{};
    double total = 0;
  };
  std::vector<Rank> ranks;
  for (const json& entry : memory) {
    if (!entry.is_object()) continue;
    Rank rank{number(entry, "rank"), {}, 0};
    if (!std::isfinite(rank.rank)) rank.rank = static_cast<double>(ranks.size());
    for (std::size_t c = 0; c < categories.size(); ++c) {
      const double value = number(entry, categories[c].first);
      rank.bytes[c] = std::isfinite(value) ? value : 0;
      rank.total += rank.bytes[c];
    }
    ranks.push_back(rank);
  }
  if (ranks.empty()) return {};
  std::vector<HorizontalBar> bars;
  const std::size_t count = std::min(limit, ranks.size());
  for (std::size_t b = 0; b < count; ++b) {
    const std::size_t begin = ranks.size() * b / count, end = ranks.size() * (b + 1) / count;
    std::size_t most = begin;
    for (std::size_t i = begin; i < end; ++i) {
      if (ranks[i].total > ranks[most].total) most = i;
    }
    HorizontalBar bar;
    bar.label = fmt::format("rank {:.0f}", ranks[most].rank);
    if (end - begin > 1) {
      bar.label = fmt::format("rank {:.0f} of {:.0f} to {:.0f}", ranks[most].rank,
                              ranks[begin].rank, ranks[end - 1].rank);
    }
    for (std::size_t c = 0; c < categories.size(); ++c) {
      bar.segments.push_back({static_cast<int>(c), ranks[most].bytes[c], categories[c].second});
    }
    bars.push_back(std::move(bar));
  }
  std::string out = bars_chart("Bytes per rank, by category", bars, format_bytes);
  std::vector<std::pair<std::string, std::string>> keys;
  for (std::size_t c = 0; c < categories.size(); ++c) {
    keys.emplace_back(fmt::format("f{}", c), categories[c].second);
  }
  out += legend(keys);
  if (ranks.size() > limit) {
    out += fmt::format("<p class=\"note\">{} ranks: of neighbours, the one that holds most.</p>\n",
                       ranks.size());
  }
  return out;
}

}  // namespace orthrus::runtime::report
