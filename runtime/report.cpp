#include "runtime/report.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace orthrus::runtime {
namespace {

using nlohmann::json;

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

// ---- reading ------------------------------------------------------------------------------------

double number(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number() ? it->get<double>() : nan_value;
}

std::string text(const json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return {};
  return it->is_string() ? it->get<std::string>()
                         : it->dump(-1, ' ', false, json::error_handler_t::replace);
}

json parse_object(const std::string& document) {
  json value = json::parse(document, nullptr, /*allow_exceptions=*/false);
  return value.is_object() ? value : json::object();
}

/// What a phase of a step is called in a row's "ms", and what the page says it is.
struct Phase {
  const char* key;
  const char* label;
  const char* doc;
};
// In the order of the walk. `update` is shown without `lmo`, which lies inside it.
constexpr std::array<Phase, 7> phases{{{"copy", "copy", "packing gradients, unpacking weights"},
                                       {"reduce", "reduce", "waiting for gradients"},
                                       {"control", "control", "flags and norms"},
                                       {"lmo", "lmo", "orthogonalization"},
                                       {"update", "update", "momentum and weights"},
                                       {"gather", "gather", "waiting for weights"},
                                       {"rest", "rest", "everything else in step()"}}};

/// One line of metrics.jsonl, as far as charts need it.
struct Row {
  double step = nan_value, loss = nan_value, lr = nan_value;
  double step_ms = nan_value, gradient_ms = nan_value, optimizer_ms = nan_value;
  std::array<double, phases.size()> phase_ms{};
  double bytes = nan_value, bytes_max = nan_value, messages = nan_value, items_per_s = nan_value;
  double exceptional = nan_value;
  std::vector<double> update_rms;
  std::map<std::string, double> validation;
  bool skipped = false;
};

std::vector<Row> read_rows(const std::string& metrics_jsonl) {
  std::vector<Row> rows;
  std::size_t at = 0;
  while (at < metrics_jsonl.size()) {
    const std::size_t end = std::min(metrics_jsonl.find('\n', at), metrics_jsonl.size());
    const json line = json::parse(metrics_jsonl.begin() + static_cast<std::ptrdiff_t>(at),
                                  metrics_jsonl.begin() + static_cast<std::ptrdiff_t>(end), nullptr,
                                  /*allow_exceptions=*/false);
    at = end + 1;
    if (!line.is_object()) continue;
    Row row;
    row.step = number(line, "step");
    if (!std::isfinite(row.step)) continue;
    row.loss = number(line, "loss");
    row.lr = number(line, "lr_multiplier");
    if (const auto ms = line.find("ms"); ms != line.end() && ms->is_object()) {
      row.step_ms = number(*ms, "step");
      row.gradient_ms = number(*ms, "gradient");
      row.optimizer_ms = number(*ms, "total");
      double named = 0;
      for (std::size_t p = 0; p < phases.size(); ++p) {
        const double value = number(*ms, phases[p].key);
        row.phase_ms[p] = std::isfinite(value) ? value : 0;
      }
      row.phase_ms[4] = std::max(0.0, row.phase_ms[4] - row.phase_ms[3]);
      for (std::size_t p = 0; p + 1 < phases.size(); ++p) named += row.phase_ms[p];
      row.phase_ms.back() =
          std::isfinite(row.optimizer_ms) ? std::max(0.0, row.optimizer_ms - named) : 0;
    }
    row.bytes = number(line, "bytes_sent");
    row.bytes_max = number(line, "bytes_sent_max");
    row.messages = number(line, "messages");
    row.exceptional = number(line, "exceptional_bytes");
    row.items_per_s = number(line, "items_per_s");
    if (const auto rms = line.find("update_rms"); rms != line.end() && rms->is_array()) {
      for (const json& value : *rms) {
        row.update_rms.push_back(value.is_number() ? value.get<double>() : nan_value);
      }
    }
    for (const auto& [key, value] : line.items()) {
      if (key.starts_with("val_") && value.is_number()) row.validation[key] = value.get<double>();
    }
    const auto skipped = line.find("skipped");
    row.skipped = skipped != line.end() && skipped->is_boolean() && skipped->get<bool>();
    rows.push_back(std::move(row));
  }
  return rows;
}

double median(std::vector<double> values) {
  std::erase_if(values, [](double v) { return !std::isfinite(v); });
  if (values.empty()) return nan_value;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

template <class Get>
double median_of(const std::vector<Row>& rows, Get get) {
  std::vector<double> values;
  const std::size_t from = rows.size() > 2 ? 1 : 0;
  for (std::size_t i = from; i < rows.size(); ++i) values.push_back(get(rows[i]));
  return median(std::move(values));
}

json number_or_null(double value) { return std::isfinite(value) ? json(value) : json(nullptr); }
json whole_or_null(double value) {
  return std::isfinite(value) ? json(static_cast<std::int64_t>(std::llround(value)))
                              : json(nullptr);
}

json summarize(const std::vector<Row>& rows) {
  json out = json::object();
  json final = json::object();
  std::int64_t skipped = 0;
  for (const Row& row : rows) {
    if (std::isfinite(row.loss)) final["loss"] = row.loss;
    for (const auto& [key, value] : row.validation) final[key] = number_or_null(value);
    skipped += row.skipped ? 1 : 0;
  }
  out["steps"] = rows.empty() ? json(0) : whole_or_null(rows.back().step);
  out["final"] = std::move(final);
  out["skipped"] = skipped;
  out["step_ms"] = number_or_null(median_of(rows, [](const Row& r) { return r.step_ms; }));
  out["gradient_ms"] = number_or_null(median_of(rows, [](const Row& r) { return r.gradient_ms; }));
  json optimizer = json::object();
  optimizer["total"] = number_or_null(median_of(rows, [](const Row& r) { return r.optimizer_ms; }));
  for (std::size_t p = 0; p + 1 < phases.size(); ++p) {
    // As in StepTimes: `update` holds `lmo`.
    optimizer[phases[p].key] = number_or_null(median_of(
        rows, [p](const Row& r) { return r.phase_ms[p] + (p == 4 ? r.phase_ms[3] : 0); }));
  }
  out["optimizer_ms"] = std::move(optimizer);
  out["items_per_s"] = number_or_null(median_of(rows, [](const Row& r) { return r.items_per_s; }));
  out["bytes_per_step"] = whole_or_null(median_of(rows, [](const Row& r) { return r.bytes; }));
  out["bytes_per_step_max"] =
      whole_or_null(median_of(rows, [](const Row& r) { return r.bytes_max; }));
  out["messages_per_step"] =
      whole_or_null(median_of(rows, [](const Row& r) { return r.messages; }));
  return out;
}

/// The summary, with what it lacks taken from the metrics.
json complete_summary(const std::string& summary_json, const std::vector<Row>& rows) {
  json summary = parse_object(summary_json);
  const json from_metrics = summarize(rows);
  for (const auto& [key, value] : from_metrics.items()) {
    if (!summary.contains(key)) summary[key] = value;
  }
  if (!summary.contains("status")) summary["status"] = "unfinished";
  return summary;
}

json child(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_object() ? *it : json::object();
}

double state_bytes(const json& summary) {
  double most = number(summary, "state_bytes_max");
  if (std::isfinite(most)) return most;
  const auto memory = summary.find("memory");
  if (memory == summary.end() || !memory->is_array()) return nan_value;
  for (const json& rank : *memory) {
    if (!rank.is_object()) continue;
    const double state = number(rank, "state");
    if (!(most >= state)) most = state;
  }
  return most;
}

// ---- writing numbers ----------------------------------------------------------------------------

std::string escape(std::string_view raw) {
  std::string out;
  out.reserve(raw.size());
  for (const char c : raw) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        // Control characters are not allowed in HTML, not even escaped.
        if (static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t') {
          out += ' ';
        } else {
          out += c;
        }
    }
  }
  return out;
}

/// 1234567 → "1,234,567".
std::string format_count(double value) {
  if (!std::isfinite(value)) return "-";
  std::string digits = fmt::format("{:.0f}", value);
  for (std::ptrdiff_t i = static_cast<std::ptrdiff_t>(digits.size()) - 3; i > (value < 0 ? 1 : 0);
       i -= 3) {
    digits.insert(static_cast<std::size_t>(i), ",");
  }
  return digits;
}

std::string format_number(double value) {
  if (!std::isfinite(value)) return "-";
  const double size = std::abs(value);
  if (size != 0 && (size < 1e-3 || size >= 1e7)) return fmt::format("{:.3g}", value);
  if (value == std::round(value) || size >= 1e4) return format_count(value);
  return fmt::format("{:.4g}", value);
}

std::string format_ms(double ms) {
  if (!std::isfinite(ms)) return "-";
  if (ms == 0) return "0 ms";
  if (ms >= 100) return fmt::format("{:.0f} ms", ms);
  if (ms >= 1) return fmt::format("{:.3g} ms", ms);
  return fmt::format("{:.3g} us", ms * 1e3);
}

/// Ticks at 1, 2 or 5 times a power of ten, about `wanted` of them, inside [low, high].
std::vector<double> linear_ticks(double low, double high, int wanted, bool whole) {
  const double span = high - low;
  if (!(span > 0)) return {low};
  const double raw = span / wanted;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  double pitch = 10 * power;
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= raw) {
      pitch = factor * power;
      break;
    }
  }
  if (whole) pitch = std::max(1.0, std::round(pitch));
  std::vector<double> ticks;
  const double first = std::ceil(low / pitch - 1e-9);
  for (double i = first; i * pitch <= high + 1e-9 * span && ticks.size() < 64; ++i) {
    ticks.push_back(i == 0 ? 0.0 : i * pitch);
  }
  return ticks;
}

std::vector<double> log_ticks(double low, double high) {
  std::vector<double> ticks;
  const int first = static_cast<int>(std::floor(std::log10(low)));
  const int last = static_cast<int>(std::ceil(std::log10(high)));
  const int stride = std::max(1, (last - first) / 6);
  for (int e = first; e <= last; e += stride) {
    const double tick = std::pow(10.0, e);
    if (tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9)) ticks.push_back(tick);
  }
  if (ticks.size() < 2) {
    for (int e = first; e <= last; ++e) {
      for (const double factor : {2.0, 5.0}) {
        const double tick = factor * std::pow(10.0, e);
        if (tick >= low && tick <= high) ticks.push_back(tick);
      }
    }
    std::sort(ticks.begin(), ticks.end());
  }
  return ticks;
}

// ---- drawing ------------------------------------------------------------------------------------

struct Point {
  double x, y;
};

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

/// Exponential mean over about 1 % of the run; starts unbiased.
std::vector<Point> smooth(const std::vector<Point>& points) {
  const double keep = 1 - 1 / std::max(4.0, static_cast<double>(points.size()) / 100);
  std::vector<Point> out;
  out.reserve(points.size());
  double sum = 0, weight = 0;
  for (const Point& p : points) {
    sum = keep * sum + (1 - keep) * p.y;
    weight = keep * weight + (1 - keep);
    out.push_back({p.x, sum / weight});
  }
  return out;
}

enum class Stroke { plain, faint, dashed };

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

constexpr int palette = 8;
constexpr double chart_width = 880, left = 66, right = 14, top = 10, bottom = 32;

std::string legend(const std::vector<std::pair<std::string, std::string>>& entries) {
  if (entries.size() < 2) return {};
  std::string out = "<ul class=\"legend\">";
  for (const auto& [classes, label] : entries) {
    out += fmt::format("<li><span class=\"key {}\"></span>{}</li>", classes, escape(label));
  }
  return out + "</ul>\n";
}

/// Grid, labels and the frame of a chart; `x` and `y` map values to the page.
template <class X, class Y>
std::string frame(const std::vector<double>& x_ticks, const std::vector<double>& y_ticks, X x, Y y,
                  double height, const std::function<std::string(double)>& format) {
  std::string out;
  for (const double tick : y_ticks) {
    out += fmt::format(
        "<line class=\"grid\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>", left,
        chart_width - right, y(tick), y(tick));
    out +=
        fmt::format("<text class=\"tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>",
                    left - 8, y(tick) + 4, escape(format(tick)));
  }
  for (const double tick : x_ticks) {
    const std::string shown = format_count(tick);
    // A long number under the right end would be cut by the edge of the picture.
    const double half = 3.8 * static_cast<double>(shown.size());
    const double at = std::min(x(tick), chart_width - half);
    out += fmt::format(
        "<text class=\"tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>", at,
        height - bottom + 18, shown);
  }
  out +=
      fmt::format("<line class=\"axis\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>",
                  left, chart_width - right, height - bottom, height - bottom);
  return out;
}

std::string svg_open(double height, std::string_view title) {
  return fmt::format(
      "<svg viewBox=\"0 0 {:.0f} {:.0f}\" role=\"img\" aria-label=\"{}\"><title>{}</title>",
      chart_width, height, escape(title), escape(title));
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
  const double plot_width = chart_width - left - right, plot_height = axis.height - top - bottom;
  const auto x = [&](double v) { return left + plot_width * (v - x0) / (x1 - x0); };
  const auto y = [&](double v) {
    const double part = log ? std::log(v / y0) / std::log(y1 / y0) : (v - y0) / (y1 - y0);
    return top + plot_height * (1 - part);
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

/// The walk of the optimizer over the run: at most `limit` bars, each the mean of its steps.
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
  const double plot_width = chart_width - left - right, plot_height = height - top - bottom;
  const double pitch = std::min(plot_width / static_cast<double>(bars.size()), 120.0);
  const double gap = pitch > 6 ? 2 : (pitch > 3 ? 1 : 0);
  const auto y = [&](double v) { return top + plot_height * (1 - v / y1); };
  const double x_first = bars.front().from, x_last = std::max(bars.back().to, x_first + 1);
  // A tick stands under the middle of the bar that holds its step.
  const auto x = [&](double step) {
    std::size_t b = 0;
    while (b + 1 < bars.size() && bars[b].to < step) ++b;
    return left + pitch * (static_cast<double>(b) + 0.5);
  };
  std::vector<double> x_ticks =
      bars.size() == 1 ? std::vector<double>{x_first} : linear_ticks(x_first, x_last, 8, true);
  std::erase_if(x_ticks, [&](double t) { return t > bars.back().to; });
  std::string out = svg_open(height, "Milliseconds of the optimizer per step, by phase");
  out += frame(x_ticks, linear_ticks(0, y1, 4, false), x, y, height, format_ms);
  std::array<bool, phases.size()> seen{};
  for (std::size_t b = 0; b < bars.size(); ++b) {
    const Bar& bar = bars[b];
    const double at = left + pitch * static_cast<double>(b);
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

/// At most `most` bytes, never cut inside a UTF-8 sequence.
std::string shorten(const std::string& label, std::size_t most) {
  if (label.size() <= most) return label;
  std::size_t end = most - 3;
  while (end > 0 && (static_cast<unsigned char>(label[end]) & 0xC0) == 0x80) --end;
  return label.substr(0, end) + "...";
}

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

// ---- the page -----------------------------------------------------------------------------------

constexpr std::string_view style = R"css(
:root{color-scheme:light dark;--page:#f6f7f9;--card:#ffffff;--ink:#1b2330;--soft:#5a6677;--rule:#e1e5ea;
--c0:#2f6fd0;--c1:#e08a1e;--c2:#2a9d78;--c3:#c3477f;--c4:#7b61c9;--c5:#8d9a2b;--c6:#8593a3;--c7:#c8523a}
@media(prefers-color-scheme:dark){:root{--page:#12161c;--card:#1a2029;--ink:#e6eaf0;--soft:#98a4b3;--rule:#2b3440;
--c0:#6ea3f2;--c1:#f0ac55;--c2:#56c4a0;--c3:#e37fae;--c4:#a791ea;--c5:#bcc85c;--c6:#7d8a99;--c7:#ea8069}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif}
main{max-width:980px;margin:0 auto;padding:28px 20px 56px}
main.wide{max-width:1180px}
h1{font-size:25px;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:16px;margin:0 0 2px}
.sub{color:var(--soft);margin:4px 0 20px}
.status{display:inline-block;margin-left:10px;padding:1px 9px;border-radius:10px;font-size:13px;font-weight:600;
vertical-align:middle;color:var(--card);background:var(--c6)}
.finished{background:var(--c2)}.stopped{background:var(--c7)}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px 18px;margin:0 0 16px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(136px,1fr));gap:12px;margin:0 0 16px}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px 14px}
.tile dt{color:var(--soft);font-size:13px}
.tile dd{margin:0;font-size:21px;font-weight:600;font-variant-numeric:tabular-nums}
.why{color:var(--soft);font-size:13.5px;margin:0 0 10px}
.note,.none{color:var(--soft);font-size:13px;margin:6px 0 0}
svg{display:block;width:100%;height:auto}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.tick,.label{fill:var(--soft);font-size:12px;font-family:inherit}.label{fill:var(--ink)}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.line.faint{opacity:.32;stroke-width:1}.line.dashed{stroke-dasharray:6 4}.key.faint{opacity:.4}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 0;padding:0;font-size:13px;color:var(--soft)}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top}
thead th{color:var(--soft);font-weight:500;font-size:13px}
tbody th{font-weight:500}
.wide tbody th{white-space:nowrap}
tr:last-child td,tr:last-child th{border-bottom:0}
.num{text-align:right;white-space:nowrap}
.pairs th{width:34%;color:var(--soft);font-weight:400}
.pairs td{overflow-wrap:anywhere}
.share{width:38%}.share span{display:block;height:11px;margin-top:6px;border-radius:3px;min-width:1px}
.best{font-weight:700}
pre{overflow-x:auto;font-size:13px;line-height:1.45;margin:10px 0 0}
summary{cursor:pointer;color:var(--soft)}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:13px}
)css";

std::string page(const std::string& title, const std::string& body, bool wide = false) {
  std::string colors;
  for (int c = 0; c < palette; ++c) {
    colors += fmt::format(
        ".s{0}{{stroke:var(--c{0})}}.f{0}{{fill:var(--c{0});background:var(--c{0})}}\n", c);
  }
  return fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
      "<title>{}</title>\n<style>{}{}</style>\n</head>\n<body>\n<main{}>\n{}</main>\n</body>\n</"
      "html>\n",
      escape(title), style, colors, wide ? " class=\"wide\"" : "", body);
}

std::string card(std::string_view title, std::string_view why, const std::string& content) {
  return fmt::format(
      "<section class=\"card\">\n<h2>{}</h2>\n<p class=\"why\">{}</p>\n{}</section>\n",
      escape(title), escape(why), content);
}

class Tiles {
 public:
  void add(std::string_view name, const std::string& value) {
    if (value.empty() || value == "-") return;
    items_ += fmt::format("<div class=\"tile\"><dt>{}</dt><dd>{}</dd></div>\n", escape(name),
                          escape(value));
  }
  [[nodiscard]] std::string html() const {
    return items_.empty() ? items_ : "<dl class=\"tiles\">\n" + items_ + "</dl>\n";
  }

 private:
  std::string items_;
};

class Pairs {
 public:
  void add(std::string_view name, const std::string& value, bool code = false) {
    if (value.empty() || value == "-") return;
    rows_ += fmt::format("<tr><th scope=\"row\">{}</th><td>{}{}{}</td></tr>\n", escape(name),
                         code ? "<code>" : "", escape(value), code ? "</code>" : "");
  }
  [[nodiscard]] bool empty() const { return rows_.empty(); }
  [[nodiscard]] std::string html() const {
    return "<table class=\"pairs\"><tbody>\n" + rows_ + "</tbody></table>\n";
  }

 private:
  std::string rows_;
};

std::vector<Point> series(const std::vector<Row>& rows,
                          const std::function<double(const Row&)>& get) {
  std::vector<Point> out;
  for (const Row& row : rows) {
    const double value = get(row);
    if (std::isfinite(value)) out.push_back({row.step, value});
  }
  return out;
}

std::string validation_label(const std::string& key) {
  std::string out = "validation " + key.substr(4);
  std::replace(out.begin(), out.end(), '_', ' ');
  return out;
}

std::vector<Point> validation_series(const std::vector<Row>& rows, const std::string& key) {
  return series(rows, [&](const Row& row) {
    const auto it = row.validation.find(key);
    return it == row.validation.end() ? nan_value : it->second;
  });
}

/// Train losses are noisy: many points are shown twice, as they are and smoothed.
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

std::string rules_of(const json& summary) {
  const auto groups = summary.find("groups");
  if (groups == summary.end() || !groups->is_array()) return {};
  std::string out;
  for (const json& group : *groups) {
    if (!group.is_object()) continue;
    const std::string rule = text(group, "rule");
    if (rule.empty() || (", " + out + ",").find(", " + rule + ",") != std::string::npos) continue;
    out += (out.empty() ? "" : ", ") + rule;
  }
  return out;
}

std::string final_figures(const json& summary) {
  Pairs figures;
  const json final = child(summary, "final");
  figures.add("training loss, last step", format_number(number(final, "loss")));
  for (const auto& [key, value] : final.items()) {
    if (key.starts_with("val_") && value.is_number()) {
      figures.add(validation_label(key), format_number(value.get<double>()));
    }
  }
  figures.add("steps", format_count(number(summary, "steps")));
  figures.add("steps skipped", format_count(number(summary, "skipped")));
  figures.add("wall time of this launch", format_seconds(number(summary, "seconds")));
  figures.add("items per second, median", format_number(number(summary, "items_per_s")));
  figures.add("bytes per step, all ranks", format_count(number(summary, "bytes_per_step")));
  figures.add("bytes per step, busiest rank", format_count(number(summary, "bytes_per_step_max")));
  figures.add("messages per step, all ranks", format_count(number(summary, "messages_per_step")));
  figures.add("matrices orthogonalized per step",
              format_count(number(summary, "matrices_per_step")));
  figures.add("optimizer state per rank, most", format_bytes(state_bytes(summary)));
  figures.add("weights hash", text(summary, "weights_hash"), true);
  figures.add("plan hash", text(summary, "plan_hash"), true);
  figures.add("config hash", text(summary, "config_hash"), true);
  return figures.html();
}

std::string configuration(const json& summary) {
  Pairs pairs;
  pairs.add("workload", text(summary, "workload"));
  pairs.add("configuration", text(summary, "config"));
  pairs.add("run directory", text(summary, "run_dir"));
  pairs.add("ranks", format_count(number(summary, "ranks")));
  pairs.add("virtual shards", format_count(number(summary, "virtual_shards")));
  pairs.add("ZeRO stage", format_count(number(summary, "zero_stage")));
  pairs.add("batch per step", format_count(number(summary, "batch")));
  pairs.add("micro-batches per rank", format_count(number(summary, "micro_batches")));
  pairs.add("parameters", format_count(number(summary, "parameters")));
  pairs.add("tensors", format_count(number(summary, "tensors")));
  pairs.add("seed", text(summary, "seed"));
  if (const auto groups = summary.find("groups"); groups != summary.end() && groups->is_array()) {
    std::size_t index = 0;
    for (const json& group : *groups) {
      if (!group.is_object()) continue;
      std::string line = text(group, "rule");
      for (const char* key : {"lr", "norm", "weights", "schedule", "parameters"}) {
        const std::string value = text(group, key);
        if (!value.empty()) line += fmt::format(", {} {}", key, value);
      }
      pairs.add(fmt::format("group {}: {}", index, text(group, "match")), line);
      ++index;
    }
  }
  pairs.add("Orthrus", text(summary, "version"));
  pairs.add("started", text(summary, "started"));
  pairs.add("resumed from step",
            number(summary, "first_step") > 0 ? format_count(number(summary, "first_step")) : "");
  pairs.add("error", text(summary, "error"));
  return pairs.empty() ? std::string{} : pairs.html();
}

std::string median_step(const json& summary) {
  const json optimizer = child(summary, "optimizer_ms");
  struct Part {
    std::string label, doc;
    double ms;
    int color;
  };
  std::vector<Part> parts;
  const double gradient = number(summary, "gradient_ms");
  if (std::isfinite(gradient)) {
    parts.push_back({"gradient", "forward and backward, not the optimizer's", gradient, 7});
  }
  double named = 0;
  for (std::size_t p = 0; p + 1 < phases.size(); ++p) {
    double ms = number(optimizer, phases[p].key);
    if (!std::isfinite(ms)) continue;
    // `update` holds `lmo`; the table shows each millisecond once.
    if (const double lmo = number(optimizer, "lmo"); p == 4 && std::isfinite(lmo))
      ms = std::max(0.0, ms - lmo);
    named += ms;
    parts.push_back({phases[p].label, phases[p].doc, ms, static_cast<int>(p)});
  }
  const double total = number(optimizer, "total");
  if (std::isfinite(total) && total > named) {
    parts.push_back({phases.back().label, phases.back().doc, total - named, 6});
  }
  double sum = 0;
  for (const Part& part : parts) sum += part.ms;
  if (!(sum > 0)) return {};
  std::string out =
      "<table><thead><tr><th>phase</th><th>what happens</th><th class=\"num\">median</th><th "
      "class=\"num\">share</th><th></th></tr></thead><tbody>\n";
  for (const Part& part : parts) {
    const double share = 100 * part.ms / sum;
    out += fmt::format(
        "<tr><th scope=\"row\">{}</th><td>{}</td><td class=\"num\">{}</td><td class=\"num\">{:.1f} "
        "%</td>"
        "<td class=\"share\"><span class=\"f{}\" style=\"width:{:.2f}%\"></span></td></tr>\n",
        escape(part.label), escape(part.doc), format_ms(part.ms), share, part.color, share);
  }
  return "<div class=\"scroll\">" + out + "</tbody></table></div>\n";
}

// ---- several runs -------------------------------------------------------------------------------

struct Compared {
  std::string label;
  json summary;
  std::vector<Row> rows;
};

std::vector<Compared> read_runs(std::span<const RunRecord> runs) {
  std::vector<Compared> out;
  for (const RunRecord& run : runs) {
    std::vector<Row> rows = read_rows(run.metrics_jsonl);
    json summary = complete_summary(run.summary_json, rows);
    out.push_back({run.label, std::move(summary), std::move(rows)});
  }
  return out;
}

/// A column of the comparison: where it comes from, how it looks, and whether less is better.
struct Column {
  const char* key;  ///< in the JSON document
  const char* title;
  std::function<json(const json&)> value;
  std::function<std::string(double)> format;  ///< none: text
  int better = 0;                             ///< -1: the least is best, +1: the most
};

std::vector<Column> columns() {
  const auto top_level = [](const char* key) {
    return [key](const json& s) { return number_or_null(number(s, key)); };
  };
  const auto whole = [](const char* key) {
    return [key](const json& s) { return whole_or_null(number(s, key)); };
  };
  const auto string = [](const char* key) {
    return [key](const json& s) { return json(text(s, key)); };
  };
  const auto final = [](const char* key) {
    return [key](const json& s) { return number_or_null(number(child(s, "final"), key)); };
  };
  return {
      {"rules", "rules", [](const json& s) { return json(rules_of(s)); }, {}, 0},
      {"workload", "workload", string("workload"), {}, 0},
      {"status", "status", string("status"), {}, 0},
      {"ranks", "ranks", whole("ranks"), format_count, 0},
      {"steps", "steps", whole("steps"), format_count, 0},
      {"loss", "loss", final("loss"), format_number, 0},
      {"val_loss", "val loss", final("val_loss"), format_number, -1},
      {"val_accuracy", "val accuracy", final("val_accuracy"), format_number, +1},
      {"optimizer_ms", "optimizer",
       [](const json& s) { return number_or_null(number(child(s, "optimizer_ms"), "total")); },
       format_ms, -1},
      {"step_ms", "step", top_level("step_ms"), format_ms, 0},
      {"bytes_per_step", "bytes per step", whole("bytes_per_step"), format_bytes, -1},
      {"state_bytes_max", "state per rank",
       [](const json& s) { return whole_or_null(state_bytes(s)); }, format_bytes, -1},
      {"items_per_s", "items/s", top_level("items_per_s"), format_number, 0},
      {"weights_hash", "weights", string("weights_hash"), {}, 0},
  };
}

struct Cell {
  json value;
  std::string shown;
  bool best = false, numeric = false;
};
struct Table {
  std::vector<std::string> titles;
  std::vector<bool> numeric;
  std::vector<std::vector<Cell>> rows;  ///< one per run
};

/// Columns that no run has anything for are left out, and those that say the same of all runs
/// without being a result.
Table compare(const std::vector<Compared>& runs) {
  Table table;
  table.rows.resize(runs.size());
  for (const Column& column : columns()) {
    std::vector<Cell> cells;
    bool any = false;
    double best = nan_value;
    std::size_t numbers = 0;
    for (const Compared& run : runs) {
      Cell cell;
      cell.value = column.value(run.summary);
      cell.numeric = static_cast<bool>(column.format);
      if (cell.value.is_number()) {
        const double value = cell.value.get<double>();
        cell.shown = column.format(value);
        any = true;
        ++numbers;
        if (column.better != 0 && !(column.better * best >= column.better * value)) best = value;
      } else if (cell.value.is_string() && !cell.value.get_ref<const std::string&>().empty()) {
        cell.shown = cell.value.get<std::string>();
        if (std::string_view(column.key) == "weights_hash") cell.shown = cell.shown.substr(0, 8);
        any = true;
      } else {
        cell.shown = "-";
      }
      cells.push_back(std::move(cell));
    }
    if (!any) continue;
    bool all_equal = true;
    for (const Cell& cell : cells) all_equal = all_equal && cell.shown == cells.front().shown;
    const std::string_view key = column.key;
    if (all_equal && key == "status" && cells.front().shown == "finished") continue;
    if (all_equal && key == "workload" && runs.size() > 1) continue;
    for (Cell& cell : cells) {
      cell.best = numbers > 1 && !all_equal && column.better != 0 && cell.value.is_number() &&
                  cell.value.get<double>() == best;
    }
    table.titles.emplace_back(column.title);
    table.numeric.push_back(static_cast<bool>(column.format));
    for (std::size_t r = 0; r < runs.size(); ++r) table.rows[r].push_back(std::move(cells[r]));
  }
  return table;
}

}  // namespace

std::string format_bytes(double bytes) {
  if (!std::isfinite(bytes)) return "-";
  constexpr std::array units{"B", "kB", "MB", "GB", "TB", "PB"};
  std::size_t unit = 0;
  while (std::abs(bytes) >= 999.5 && unit + 1 < units.size()) {
    bytes /= 1000;
    ++unit;
  }
  if (unit == 0) return fmt::format("{:.0f} B", bytes);
  const int digits = std::abs(bytes) >= 99.95 ? 0 : (std::abs(bytes) >= 9.995 ? 1 : 2);
  return fmt::format("{:.{}f} {}", bytes, digits, units.at(unit));
}

std::string format_seconds(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "-";
  if (seconds < 1e-3) return fmt::format("{:.3g} us", seconds * 1e6);
  if (seconds < 1) return fmt::format("{:.3g} ms", seconds * 1e3);
  if (seconds < 59.95) return fmt::format("{:.3g} s", seconds);
  const auto whole = static_cast<std::int64_t>(std::llround(seconds));
  if (whole < 3600) return fmt::format("{} min {} s", whole / 60, whole % 60);
  if (whole < 86400) return fmt::format("{} h {} min", whole / 3600, whole % 3600 / 60);
  return fmt::format("{} d {} h", whole / 86400, whole % 86400 / 3600);
}

std::string metrics_summary(const std::string& metrics_jsonl) {
  return summarize(read_rows(metrics_jsonl)).dump();
}

std::string run_report(const std::string& summary_json, const std::string& metrics_jsonl,
                       const std::string& config_yaml) {
  const std::vector<Row> rows = read_rows(metrics_jsonl);
  const json summary = complete_summary(summary_json, rows);
  const json final = child(summary, "final");

  std::string name = text(summary, "name");
  if (name.empty()) name = "run";
  const std::string status = text(summary, "status");
  std::string sub;
  const auto say = [&](const std::string& what) {
    if (!what.empty()) sub += (sub.empty() ? "" : " · ") + what;
  };
  say(text(summary, "workload"));
  say(rules_of(summary));
  if (const double ranks = number(summary, "ranks"); std::isfinite(ranks)) {
    say(fmt::format("{:.0f} rank{}", ranks, ranks == 1 ? "" : "s"));
  }
  const double steps = number(summary, "steps");
  if (std::isfinite(steps)) say(format_count(steps) + (steps == 1 ? " step" : " steps"));
  if (const double seconds = number(summary, "seconds"); std::isfinite(seconds))
    say(format_seconds(seconds));

  std::string body = fmt::format(
      "<h1>{}<span class=\"status {}\">{}</span></h1>\n<p class=\"sub\">{}</p>\n", escape(name),
      status == "finished" ? "finished" : (status == "stopped" ? "stopped" : "open"),
      escape(status), escape(sub));

  Tiles tiles;
  const double val_loss = number(final, "val_loss");
  tiles.add("validation loss", format_number(val_loss));
  tiles.add("training loss", format_number(number(final, "loss")));
  if (const double accuracy = number(final, "val_accuracy"); std::isfinite(accuracy)) {
    tiles.add("validation accuracy", fmt::format("{:.2f} %", 100 * accuracy));
  }
  tiles.add("optimizer per step", format_ms(number(child(summary, "optimizer_ms"), "total")));
  tiles.add("sent per step", format_bytes(number(summary, "bytes_per_step")));
  tiles.add("state per rank", format_bytes(state_bytes(summary)));
  body += tiles.html();

  if (!rows.empty()) {
    std::vector<Line> loss;
    add_train_loss(loss, rows, "training", 0, true);
    const std::vector<Point> validation = validation_series(rows, "val_loss");
    loss.push_back({"validation", 1, Stroke::plain, validation, true});
    body += card("Loss",
                 loss.front().stroke == Stroke::faint
                     ? "Per step; training as it was (faint) and smoothed."
                     : "Per step.",
                 line_chart("Loss per step", loss, {false, true, format_number, 290}));
    std::vector<std::string> others;
    for (const Row& row : rows) {
      for (const auto& [key, value] : row.validation) {
        if (key != "val_loss" && std::find(others.begin(), others.end(), key) == others.end()) {
          others.push_back(key);
        }
      }
    }
    for (const std::string& key : others) {
      body += card(validation_label(key), "On held-out data.",
                   line_chart(validation_label(key),
                              {{key, 2, Stroke::plain, validation_series(rows, key), true}},
                              {false, false, format_number, 200}));
    }
  }
  if (const std::string table = median_step(summary); !table.empty()) {
    body += card(
        "A step, by phase",
        "Medians of rank 0. reduce and gather count only waiting that computation did not hide.",
        table);
  }
  if (!rows.empty()) {
    body += card("The optimizer over the run",
                 "Milliseconds per step on rank 0, without the gradient.", phase_chart(rows));
    std::vector<Line> bytes;
    bytes.push_back({"sent, all ranks", 0, Stroke::plain,
                     series(rows, [](const Row& r) { return r.bytes; }), false});
    bytes.push_back({"busiest rank", 4, Stroke::plain,
                     series(rows, [](const Row& r) { return r.bytes_max; }), false});
    const double planned = number(summary, "planned_bytes_per_step");
    if (std::isfinite(planned)) {
      bytes.push_back({"plan, all ranks",
                       1,
                       Stroke::dashed,
                       {{rows.front().step, planned}, {rows.back().step, planned}},
                       false});
    }
    body +=
        card("Bytes sent per step", "Counted where they are sent; the plan is made before step 1.",
             line_chart("Bytes sent per step", bytes, {true, false, format_bytes, 180}));
  }
  if (const auto memory = summary.find("memory"); memory != summary.end() && memory->is_array()) {
    if (const std::string chart = memory_chart(*memory); !chart.empty()) {
      body += card("Memory per rank",
                   "As planned and allocated before step 1; the trainer's activations are its own.",
                   chart);
    }
  }
  if (!rows.empty()) {
    std::size_t groups = 0;
    for (const Row& row : rows) groups = std::max(groups, row.update_rms.size());
    std::vector<Line> rms;
    const auto names = summary.find("groups");
    for (std::size_t g = 0; g < groups; ++g) {
      std::string label = fmt::format("group {}", g);
      if (names != summary.end() && names->is_array() && g < names->size() &&
          names->at(g).is_object()) {
        label += fmt::format(": {}, {}", text(names->at(g), "rule"), text(names->at(g), "match"));
      }
      rms.push_back({label, static_cast<int>(g), Stroke::plain,
                     series(rows,
                            [g](const Row& r) {
                              return g < r.update_rms.size() ? r.update_rms[g] : nan_value;
                            }),
                     false});
    }
    if (groups > 0) {
      body += card("Update RMS",
                   "Root mean square of the update of each group, before the learning rate.",
                   line_chart("Update RMS per step", rms, {true, true, format_number, 200}));
    }
  }
  body += card("Final figures", "Medians leave out the first step.", final_figures(summary));
  if (const std::string table = configuration(summary); !table.empty()) {
    body += card("Configuration", "What ran.", table);
  }
  if (!config_yaml.empty()) {
    body += fmt::format(
        "<details class=\"card\">\n<summary>The resolved "
        "configuration</summary>\n<pre><code>{}</code></pre>\n</details>\n",
        escape(config_yaml));
  }
  return page(name + " - Orthrus", body);
}

std::string comparison_report(std::span<const RunRecord> records, const std::string& title) {
  const std::vector<Compared> runs = read_runs(records);
  const Table table = compare(runs);
  const std::string heading = title.empty() ? "Comparison of runs" : title;
  std::string body = fmt::format("<h1>{}</h1>\n<p class=\"sub\">{} run{}</p>\n", escape(heading),
                                 runs.size(), runs.size() == 1 ? "" : "s");

  std::string html = "<div class=\"scroll\"><table><thead><tr><th>run</th>";
  for (std::size_t c = 0; c < table.titles.size(); ++c) {
    html += fmt::format("<th{}>{}</th>", table.numeric[c] ? " class=\"num\"" : "",
                        escape(table.titles[c]));
  }
  html += "</tr></thead><tbody>\n";
  for (std::size_t r = 0; r < runs.size(); ++r) {
    html += fmt::format("<tr><th scope=\"row\"><span class=\"key f{}\"></span>{}</th>", r % palette,
                        escape(runs[r].label));
    for (const Cell& cell : table.rows[r]) {
      const std::string classes =
          fmt::format("{}{}", cell.numeric ? "num" : "", cell.best ? " best" : "");
      html += fmt::format("<td{}>{}</td>", classes.empty() ? "" : " class=\"" + classes + "\"",
                          escape(cell.shown));
    }
    html += "</tr>\n";
  }
  html += "</tbody></table></div>\n";
  body += card("Final figures",
               "Times are medians of rank 0, without the first step; bytes are sums over ranks. "
               "The best of a column is bold.",
               html);

  // Beyond the palette's end colours come again, dashed.
  const auto stroke = [](std::size_t r) {
    return (r / palette) % 2 == 0 ? Stroke::plain : Stroke::dashed;
  };
  std::vector<Line> validation, training, accuracy;
  for (std::size_t r = 0; r < runs.size(); ++r) {
    const int color = static_cast<int>(r);
    validation.push_back(
        {runs[r].label, color, stroke(r), validation_series(runs[r].rows, "val_loss"), true});
    accuracy.push_back(
        {runs[r].label, color, stroke(r), validation_series(runs[r].rows, "val_accuracy"), true});
    add_train_loss(training, runs[r].rows, runs[r].label, color, false);
    training.back().stroke = stroke(r);
  }
  const auto any = [](const std::vector<Line>& lines) {
    return std::any_of(lines.begin(), lines.end(), [](const Line& l) { return !l.points.empty(); });
  };
  if (any(validation)) {
    body +=
        card("Validation loss", "On held-out data, at equal steps.",
             line_chart("Validation loss per step", validation, {false, true, format_number, 290}));
  }
  if (any(accuracy)) {
    body += card(
        "Validation accuracy", "On held-out data, at equal steps.",
        line_chart("Validation accuracy per step", accuracy, {false, false, format_number, 240}));
  }
  if (any(training)) {
    body += card("Training loss", "Smoothed where there are 60 steps or more.",
                 line_chart("Training loss per step", training, {false, true, format_number, 290}));
  }
  struct Cost {
    const char* title;
    const char* why;
    std::function<double(const json&)> get;
    std::string (*format)(double);
  };
  const std::array<Cost, 3> costs{{
      {"Optimizer per step", "Median milliseconds of step(), gradient not included.",
       [](const json& s) { return number(child(s, "optimizer_ms"), "total"); }, format_ms},
      {"Bytes per step", "Sent by all ranks together.",
       [](const json& s) { return number(s, "bytes_per_step"); }, format_bytes},
      {"Optimizer state per rank", "On the rank that holds most.", state_bytes, format_bytes},
  }};
  for (const Cost& cost : costs) {
    std::vector<HorizontalBar> bars;
    for (std::size_t r = 0; r < runs.size(); ++r) {
      const double value = cost.get(runs[r].summary);
      if (std::isfinite(value)) bars.push_back({runs[r].label, {{static_cast<int>(r), value, ""}}});
    }
    if (!bars.empty())
      body += card(cost.title, cost.why, bars_chart(cost.title, bars, cost.format));
  }
  return page(heading + " - Orthrus", body, /*wide=*/true);
}

std::string comparison_table(std::span<const RunRecord> records) {
  const std::vector<Compared> runs = read_runs(records);
  const Table table = compare(runs);
  std::vector<std::size_t> widths{3};
  for (const Compared& run : runs) widths[0] = std::max(widths[0], run.label.size());
  for (std::size_t c = 0; c < table.titles.size(); ++c) {
    std::size_t width = table.titles[c].size();
    for (const auto& row : table.rows) width = std::max(width, row[c].shown.size());
    widths.push_back(width);
  }
  std::string out = fmt::format("{:<{}}", "run", widths[0]);
  for (std::size_t c = 0; c < table.titles.size(); ++c) {
    out += table.numeric[c] ? fmt::format("  {:>{}}", table.titles[c], widths[c + 1])
                            : fmt::format("  {:<{}}", table.titles[c], widths[c + 1]);
  }
  const auto end_line = [&] {
    out.erase(out.find_last_not_of(' ') + 1);
    out += '\n';
  };
  end_line();
  for (std::size_t r = 0; r < runs.size(); ++r) {
    out += fmt::format("{:<{}}", runs[r].label, widths[0]);
    for (std::size_t c = 0; c < table.titles.size(); ++c) {
      const Cell& cell = table.rows[r][c];
      out += cell.numeric ? fmt::format("  {:>{}}", cell.shown, widths[c + 1])
                          : fmt::format("  {:<{}}", cell.shown, widths[c + 1]);
    }
    end_line();
  }
  return out;
}

std::string comparison_json(std::span<const RunRecord> records) {
  json document{{"schema", 1}, {"runs", json::array()}};
  for (const Compared& run : read_runs(records)) {
    json row{{"label", run.label}};
    for (const Column& column : columns()) {
      const json value = column.value(run.summary);
      row[column.key] =
          value.is_string() && value.get_ref<const std::string&>().empty() ? json(nullptr) : value;
    }
    document["runs"].push_back(std::move(row));
  }
  return document.dump(2, ' ', false, json::error_handler_t::replace);
}

}  // namespace orthrus::runtime
