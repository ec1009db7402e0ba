#pragma once
/// @file
/// Newton–Schulz coefficients: published tables, and the solver for optimal ones.

#include <span>
#include <string_view>
#include <vector>

namespace orthrus::kernels {

/// One Newton–Schulz iteration: p(x) = a·x + b·x³ + c·x⁵ on every singular value x.
struct Quintic {
  double a, b, c;
  [[nodiscard]] constexpr double operator()(double x) const noexcept {
    const double r = x * x;
    return x * (a + r * (b + r * c));
  }
  friend bool operator==(const Quintic&, const Quintic&) = default;
};

/// A named list of iterations; past its end the last entry repeats.
struct CoefficientTable {
  std::string_view name;
  std::span<const Quintic> iterations;
  /// The input is divided by safety·‖X‖_F: what the table's authors feed it.
  double safety;
  std::string_view source;
};

/// Every table there is, for `orthrus info` and the tests.
std::span<const CoefficientTable> coefficient_tables();
/// @return nullptr when no table has that name.
const CoefficientTable* find_coefficients(std::string_view name);
/// The first `count` iterations of `table`, its last entry repeated where it is shorter.
std::vector<Quintic> first_iterations(const CoefficientTable& table, int count);

/// The best odd approximation of 1 on [l, u] of degree 5: it equioscillates at four points.
/// @pre 0 < l <= u. Source: Polar Express, arXiv:2505.16932; CANS, arXiv:2506.10935.
Quintic optimal_quintic(double l, double u);
/// The same of degree 3 (c = 0), in closed form.
Quintic optimal_cubic(double l, double u);
/// Composition of `count` optimal quintics for singular values in [l, 1]; `cushion` shortens every
/// interval to [max(l, cushion·u), u] (0: exactly optimal), `safety` evaluates p(x/safety).
std::vector<Quintic> optimal_composition(double l, int count, double cushion, double safety = 1.0);
/// The smallest number of exactly optimal quintics with max |p − 1| <= tolerance on [l, 1]; at
/// most 64.
int iterations_for(double l, double tolerance);

}  // namespace orthrus::kernels
