#include "runtime/studies/student.hpp"

#include <cmath>
#include <numbers>

namespace orthrus::studies {
namespace {

/// P(T ≤ t) of Student's t, by Simpson's rule on the density; t ≥ 0, any degrees of freedom ≥ 1.
double student_cdf(double t, double freedom) {
  const double norm = std::exp(std::lgamma((freedom + 1) / 2) - std::lgamma(freedom / 2)) /
                      std::sqrt(freedom * std::numbers::pi);
  constexpr int pieces = 2000;
  double sum = 0;
  for (int i = 0; i <= pieces; ++i) {
    const double x = t * i / pieces;
    const double weight = i == 0 || i == pieces ? 1 : i % 2 == 1 ? 4 : 2;
    sum += weight * std::pow(1 + x * x / freedom, -(freedom + 1) / 2);
  }
  return 0.5 + norm * sum * t / pieces / 3;
}

}  // namespace

double student_quantile(double probability, double freedom) {
  double lo = 0, hi = 100;
  for (int i = 0; i < 60; ++i) {
    const double mid = (lo + hi) / 2;
    (student_cdf(mid, freedom) < probability ? lo : hi) = mid;
  }
  return (lo + hi) / 2;
}

}  // namespace orthrus::studies
