#pragma once
/// @file
/// Coefficients of the coupled iterations for P^(±1/r): tables, and how many steps they need.

#include <span>

namespace orthrus::kernels {

/// One step multiplies by W = aI + bP + cP²: on x = λ^(1/r) it is p(x) = a·x + b·x^(r+1) +
/// c·x^(2r+1), which brings x nearer to 1.
struct RootStep {
  double a, b, c;
  /// W on an eigenvalue λ.
  [[nodiscard]] constexpr double operator()(double lambda) const noexcept {
    return a + lambda * (b + lambda * c);
  }
  friend bool operator==(const RootStep&, const RootStep&) = default;
};

/// Steps for eigenvalues in [least, 1], each optimal for what the one before leaves; cushion 0.1,
/// recentred. The last row, the limit as the interval shrinks to 1, repeats.
struct RootTable {
  int r;
  double least;
  std::span<const RootStep> steps;

  /// Step k, from 0, of p(x/safety); the limit row is not divided, as it needs no safety, and would
  /// miss 1 by a few (safety − 1)³.
  [[nodiscard]] RootStep step(int k, double safety) const;
};

/// Of r = 1, 2, 4: the published tables for least = 1e-4, then those for 1e-5, 1e-6 and 1e-7.
/// Source: J. Su, kexue.fm/archives/11175; the others by the same rule, in 50 digits.
std::span<const RootTable> root_tables();

struct RootPlan {
  const RootTable* table = nullptr;
  int steps = 0;
  double error = 1;  ///< max |x − 1| over λ in [least, 1], exact arithmetic
};

/// The table, and how many of its steps, that bring λ in [least, 1] within `tolerance` of x = 1
/// soonest; with `most` steps where no table does, the one that ends nearest. Pure, and nothing is
/// allocated: equal on all ranks.
/// @throws ConfigError  r is not 1, 2 or 4, least is not in (0, 1], or there are no steps.
RootPlan plan_root(int r, double least, double tolerance, double safety, int most);

}  // namespace orthrus::kernels
