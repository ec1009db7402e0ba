#include "runtime/report_svg.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "runtime/report_page.hpp"

namespace orthrus::runtime::report {

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
  if (ticks.size() < 3) {
    for (int e = first; e <= last; ++e) {
      for (const double factor : {2.0, 5.0}) {
        const double tick = factor * std::pow(10.0, e);
        if (tick >= low && tick <= high) ticks.push_back(tick);
      }
    }
    std::sort(ticks.begin(), ticks.end());
  }
  if (ticks.size() >= 2) return ticks;
  // Less than an octave: all but straight.
  ticks = linear_ticks(low, high, 4, false);
  std::erase_if(ticks, [&](double t) { return t < low * (1 - 1e-9) || t > high * (1 + 1e-9); });
  return ticks;
}

std::string svg_open(double height, std::string_view title) {
  return fmt::format(
      "<svg viewBox=\"0 0 {:.0f} {:.0f}\" role=\"img\" aria-label=\"{}\"><title>{}</title>",
      chart_width, height, escape(title), escape(title));
}

std::string legend(const std::vector<std::pair<std::string, std::string>>& entries) {
  if (entries.size() < 2) return {};
  std::string out = "<ul class=\"legend\">";
  for (const auto& [classes, label] : entries) {
    out += fmt::format("<li><span class=\"key {}\"></span>{}</li>", classes, escape(label));
  }
  return out + "</ul>\n";
}

}  // namespace orthrus::runtime::report
