#include <algorithm>
#include <cmath>
#include <numeric>
#include <orthrus/error.hpp>
#include <orthrus/studies/horizon.hpp>

#include "runtime/studies/minimize.hpp"
#include "runtime/studies/student.hpp"

namespace orthrus::studies {
namespace {

void check(const LossCurve& curve) {
  expects(curve.examples.size() == curve.losses.size() && curve.losses.size() >= 2,
          "a curve has as many losses as examples, two or more");
  for (std::size_t i = 0; i < curve.losses.size(); ++i) {
    expects<NumericError>(std::isfinite(curve.examples[i]) && curve.examples[i] > 0 &&
                              std::isfinite(curve.losses[i]) && curve.losses[i] > 0,
                          "examples and losses are finite and positive");
  }
}

double mean_of(std::span<const double> x) {
  return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

/// At b, on the line through two points.
double between(const ConvergencePoint& p, const ConvergencePoint& q, double b) {
  return p.examples + (q.examples - p.examples) * (b - p.batch) / (q.batch - p.batch);
}

}  // namespace

PowerLines fit_power_lines(std::span<const LossCurve> curves, std::span<const double> targets) {
  PowerLines out;
  for (const LossCurve& curve : curves) {
    check(curve);
    out.curves.push_back(fit_power(curve.examples, curve.losses));
  }
  std::vector<double> least, critical;
  for (const double target : targets) {
    std::vector<double> batches, steps;
    for (std::size_t i = 0; i < curves.size(); ++i) {
      const auto [low, high] =
          std::minmax_element(curves[i].losses.begin(), curves[i].losses.end());
      const PowerLaw& law = out.curves[i];
      if (target < *low || target > *high || !(law.exponent < 0)) continue;
      batches.push_back(curves[i].batch);
      steps.push_back(std::pow(target / law.factor, 1 / law.exponent) / curves[i].batch);
    }
    if (batches.size() < 3) continue;
    // S = D/B = D_min/B_crit + D_min/B.
    const StepsFit fit = fit_steps(StepsModel::hyper, batches, steps);
    const double d_min = fit.parameters[1], b_crit = fit.parameters[1] / fit.parameters[0];
    out.targets.push_back({target, d_min, b_crit, fit.rms_log});
    least.push_back(d_min);
    critical.push_back(b_crit);
  }
  if (least.size() >= 2) out.growth = fit_power(least, critical);
  return out;
}

double DataEfficiency::ratio(std::size_t s, std::size_t of) const {
  return std::pow(factors.at(s) / factors.at(of), 1 / exponent);
}

DataEfficiency fit_data_efficiency(std::span<const LossCurve> series, double huber) {
  struct Point {
    std::size_t series;
    double log_examples, log_loss;
  };
  std::vector<Point> points;
  double least = 0;
  for (std::size_t s = 0; s < series.size(); ++s) {
    check(series[s]);
    for (std::size_t i = 0; i < series[s].losses.size(); ++i) {
      points.push_back({s, std::log(series[s].examples[i]), std::log(series[s].losses[i])});
      least = least > 0 ? std::min(least, series[s].losses[i]) : series[s].losses[i];
    }
  }
  const std::size_t k = 2 + series.size();
  expects(!series.empty() && points.size() >= k, "fewer losses than the law has parameters");
  // p = ln E, ln β, ln A of each.
  const Residuals residuals = [&](std::span<const double> p, std::span<double> r,
                                  std::span<double> jacobian) {
    std::fill(jacobian.begin(), jacobian.end(), 0.0);
    for (std::size_t i = 0; i < points.size(); ++i) {
      const auto& [s, x, y] = points[i];
      const double floor = std::exp(p[0]), exponent = std::exp(p[1]);
      const double term = std::exp(p[2 + s] - exponent * x);
      double* const row = jacobian.data() + i * k;
      row[0] = floor / (floor + term);
      row[1] = -term * exponent * x / (floor + term);
      row[2 + s] = term / (floor + term);
      r[i] = std::log(floor + term) - y;
    }
  };
  SearchOptions options;
  options.lower.assign(k, -40.0);
  options.upper.assign(k, 80.0);
  options.lower[1] = std::log(0.02);
  options.upper[1] = std::log(10.0);
  Minimum best;
  for (const double exponent : {0.15, 0.35, 0.6, 1.0, 1.6}) {
    for (const double share : {0.3, 0.7, 0.95}) {
      std::vector<double> start{std::log(share * least), std::log(exponent)};
      for (const LossCurve& curve : series) {
        const double left = std::max(curve.losses.front() - share * least, 1e-3 * least);
        start.push_back(std::log(left) + exponent * std::log(curve.examples.front()));
      }
      // Squares first: they lead from afar.
      Minimum found = least_squares(residuals, points.size(), start, options);
      if (best.parameters.empty() || found.cost < best.cost) best = std::move(found);
    }
  }
  if (huber > 0) {
    options.huber = huber;
    best = least_squares(residuals, points.size(), best.parameters, options);
  }
  DataEfficiency out;
  out.irreducible = std::exp(best.parameters[0]);
  out.exponent = std::exp(best.parameters[1]);
  for (std::size_t s = 0; s < series.size(); ++s) {
    out.factors.push_back(std::exp(best.parameters[2 + s]));
  }
  std::vector<double> r(points.size()), jacobian(points.size() * k);
  residuals(best.parameters, r, jacobian);
  out.rms_log = std::sqrt(std::inner_product(r.begin(), r.end(), r.begin(), 0.0) /
                          static_cast<double>(r.size()));
  return out;
}

double olympic_mean(std::span<const double> values) {
  expects(!values.empty(), "a mean of one value or more");
  std::vector<double> sorted(values.begin(), values.end());
  std::sort(sorted.begin(), sorted.end());
  if (sorted.size() < 3) return mean_of(sorted);
  return mean_of(std::span(sorted).subspan(1, sorted.size() - 2));
}

std::vector<ConvergencePoint> convergence_points(std::vector<ConvergencePoint> points) {
  for (std::size_t i = 1; i < points.size(); ++i) {
    expects(points[i - 1].batch < points[i].batch, "batches ascend");
  }
  // Whoever goes may make its neighbours stand out: from the left, and back after each.
  for (std::size_t i = 1; i + 1 < points.size();) {
    if (points[i].examples > between(points[i - 1], points[i + 1], points[i].batch)) {
      points.erase(points.begin() + static_cast<std::ptrdiff_t>(i));
      i = std::max<std::size_t>(1, i - 1);
    } else {
      ++i;
    }
  }
  return points;
}

double examples_at(std::span<const ConvergencePoint> points, double batch) {
  for (std::size_t i = 1; i < points.size(); ++i) {
    if (points[i - 1].batch <= batch && batch <= points[i].batch) {
      return between(points[i - 1], points[i], batch);
    }
  }
  throw ConfigError("batch " + std::to_string(batch) + " lies outside the convergence points");
}

bool slower_than(std::span<const double> runs, double examples, double alpha) {
  expects(runs.size() >= 2, "a test needs two runs");
  const double mean = mean_of(runs);
  double squares = 0;
  for (const double x : runs) squares += (x - mean) * (x - mean);
  const auto n = static_cast<double>(runs.size());
  const double error = std::sqrt(squares / (n - 1) / n);
  return mean - examples > student_quantile(1 - alpha, n - 1) * error;
}

}  // namespace orthrus::studies
