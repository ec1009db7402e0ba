#include <algorithm>
#include <cmath>
#include <orthrus/error.hpp>
#include <orthrus/studies/loggp.hpp>
#include <vector>

namespace orthrus::studies {

namespace {

/// y = a + b·x by least squares of weighted errors; neither is negative.
struct Line {
  double a = 0, b = 0;
};
struct Point {
  double x, y, weight;
};
Line line_through(const std::vector<Point>& points) {
  double w = 0, wx = 0, wxx = 0, wy = 0, wxy = 0;
  for (const Point& p : points) {
    w += p.weight;
    wx += p.weight * p.x;
    wxx += p.weight * p.x * p.x;
    wy += p.weight * p.y;
    wxy += p.weight * p.x * p.y;
  }
  const double determinant = w * wxx - wx * wx;
  expects<ConfigError>(determinant > 0, "LogGP needs round trips of different sizes");
  Line line;
  line.b = std::max(0.0, (w * wxy - wx * wy) / determinant);
  line.a = (wy - line.b * wx) / w;
  if (line.a < 0) line = {0, std::max(0.0, wxy / wxx)};
  return line;
}

}  // namespace

LogGp fit_loggp(std::span<const RoundTrips> samples) {
  expects<ConfigError>(samples.size() >= 3, "LogGP needs round trips of 3 sizes");
  std::vector<Point> gaps, overheads;
  const auto gap = [](const RoundTrips& s) { return (s.burst - s.single) / (s.messages - 1); };
  for (const RoundTrips& s : samples) {
    expects<ConfigError>(s.messages >= 2 && s.bytes >= 1, "bursts are of 2 messages of a byte");
    const double y = gap(s), x = s.bytes - 1;
    expects<ConfigError>(y > 0, "a burst takes longer than a message");
    expects<ConfigError>(s.delay > y, "a delay is longer than the gap between two messages");
    gaps.push_back({x, y, 1 / (y * y)});
    const double o = (s.delayed - s.single) / (s.messages - 1) - s.delay;
    // Relative, but for what is small beside the delay that it was taken from.
    const double scale = std::max(std::abs(o), 0.05 * s.delay);
    overheads.push_back({x, o, 1 / (scale * scale)});
  }
  LogGp out;
  const Line of_gaps = line_through(gaps), of_overheads = line_through(overheads);
  out.gap_s = of_gaps.a;
  out.s_per_byte = of_gaps.b;
  out.overhead_s = of_overheads.a;
  out.overhead_s_per_byte = of_overheads.b;
  const auto least =
      std::min_element(samples.begin(), samples.end(),
                       [](const RoundTrips& a, const RoundTrips& b) { return a.bytes < b.bytes; });
  out.latency_s =
      std::max(0.0, least->single / 2 - 2 * out.overhead_s - (least->bytes - 1) * out.s_per_byte);
  double squares = 0;
  for (const RoundTrips& s : samples) {
    const double off = (out.gap_s + (s.bytes - 1) * out.s_per_byte) / gap(s) - 1;
    squares += off * off;
  }
  out.rms_relative = std::sqrt(squares / static_cast<double>(samples.size()));
  return out;
}

}  // namespace orthrus::studies
