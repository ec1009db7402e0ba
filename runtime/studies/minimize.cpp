#include "runtime/studies/minimize.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace orthrus::studies {
namespace {

/// x with Ax = b for a small positive matrix (k×k, overwritten), by Cholesky. @return false: it is
/// not positive.
bool solve_positive(std::vector<double>& a, std::vector<double>& b, std::size_t k) {
  for (std::size_t j = 0; j < k; ++j) {
    for (std::size_t i = j; i < k; ++i) {
      double sum = a[i * k + j];
      for (std::size_t l = 0; l < j; ++l) sum -= a[i * k + l] * a[j * k + l];
      if (i == j) {
        if (!(sum > 0)) return false;
        a[j * k + j] = std::sqrt(sum);
      } else {
        a[i * k + j] = sum / a[j * k + j];
      }
    }
  }
  for (std::size_t i = 0; i < k; ++i) {
    for (std::size_t l = 0; l < i; ++l) b[i] -= a[i * k + l] * b[l];
    b[i] /= a[i * k + i];
  }
  for (std::size_t i = k; i-- > 0;) {
    for (std::size_t l = i + 1; l < k; ++l) b[i] -= a[l * k + i] * b[l];
    b[i] /= a[i * k + i];
  }
  return true;
}

double cost_of(std::span<const double> r, double huber) {
  double sum = 0;
  for (const double x : r) {
    if (!std::isfinite(x)) return std::numeric_limits<double>::infinity();
    const double size = std::abs(x);
    sum += huber > 0 && size > huber ? huber * (2 * size - huber) : x * x;
  }
  return sum;
}

}  // namespace

Minimum least_squares(const Residuals& residuals, std::size_t count, std::span<const double> start,
                      const SearchOptions& options) {
  const std::size_t k = start.size();
  std::vector<double> p(start.begin(), start.end()), next(k);
  const auto bound = [&](std::vector<double>& x) {
    for (std::size_t j = 0; j < k; ++j) {
      if (!options.lower.empty()) x[j] = std::max(x[j], options.lower[j]);
      if (!options.upper.empty()) x[j] = std::min(x[j], options.upper[j]);
    }
  };
  bound(p);
  std::vector<double> r(count), jacobian(count * k), next_r(count), next_jacobian(count * k);
  residuals(p, r, jacobian);
  double cost = cost_of(r, options.huber);
  double damping = 1e-3;
  std::vector<double> normal(k * k), slope(k), damped, step;
  for (int iteration = 0; iteration < options.iterations && std::isfinite(cost); ++iteration) {
    std::fill(normal.begin(), normal.end(), 0.0);
    std::fill(slope.begin(), slope.end(), 0.0);
    for (std::size_t i = 0; i < count; ++i) {
      const double size = std::abs(r[i]);
      const double weight = options.huber > 0 && size > options.huber ? options.huber / size : 1;
      const double* row = jacobian.data() + i * k;
      for (std::size_t a = 0; a < k; ++a) {
        slope[a] -= weight * row[a] * r[i];
        for (std::size_t b = 0; b <= a; ++b) normal[a * k + b] += weight * row[a] * row[b];
      }
    }
    bool better = false, still = false;
    while (!better && !still && damping < 1e12) {
      damped = normal;
      step = slope;
      for (std::size_t a = 0; a < k; ++a) damped[a * k + a] += damping * normal[a * k + a] + 1e-300;
      if (!solve_positive(damped, step, k)) {
        damping *= 10;
        continue;
      }
      for (std::size_t a = 0; a < k; ++a) next[a] = p[a] + step[a];
      bound(next);
      residuals(next, next_r, next_jacobian);
      const double next_cost = cost_of(next_r, options.huber);
      double moved = 0;
      for (std::size_t a = 0; a < k; ++a) {
        moved = std::max(moved, std::abs(next[a] - p[a]) / (1 + std::abs(p[a])));
      }
      if (next_cost <= cost) {
        still = moved < 1e-13 || cost - next_cost <= 1e-15 * cost;
        better = true;
        damping = std::max(damping * 0.2, 1e-15);
        p.swap(next);
        r.swap(next_r);
        jacobian.swap(next_jacobian);
        cost = next_cost;
      } else {
        still = moved < 1e-15;
        damping *= 5;
      }
    }
    if (still || !better) break;
  }
  return {std::move(p), cost};
}

double golden_section(const std::function<double(double)>& f, double lo, double hi) {
  const double ratio = (std::sqrt(5.0) - 1) / 2;
  double left = hi - ratio * (hi - lo), right = lo + ratio * (hi - lo);
  double at_left = f(left), at_right = f(right);
  for (int i = 0; i < 200 && hi - lo > 1e-12 * (1 + std::abs(lo)); ++i) {
    if (at_left <= at_right) {
      hi = right;
      right = left;
      at_right = at_left;
      left = hi - ratio * (hi - lo);
      at_left = f(left);
    } else {
      lo = left;
      left = right;
      at_left = at_right;
      right = lo + ratio * (hi - lo);
      at_right = f(right);
    }
  }
  return (lo + hi) / 2;
}

}  // namespace orthrus::studies
