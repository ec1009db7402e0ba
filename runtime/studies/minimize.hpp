#pragma once
/// @file
/// Least squares by Levenberg and Marquardt, and a search along a line.

#include <functional>
#include <span>
#include <vector>

namespace orthrus::studies {

/// Fills r (n) and its Jacobian, row-major n×k: ∂r_i/∂p_j. A r that is not finite refuses p.
using Residuals =
    std::function<void(std::span<const double> p, std::span<double> r, std::span<double> jacobian)>;

/// What bounds a least-squares search.
struct SearchOptions {
  std::vector<double> lower, upper;  ///< of each parameter; empty is none
  double huber = 0;                  ///< δ: residuals beyond it count linearly. 0: they do not
  int iterations = 200;
};

struct Minimum {
  std::vector<double> parameters;
  double cost = 0;  ///< Σ r² (Huber: Σ 2δ|r| − δ² beyond δ)
};

/// Local minimum of Σ r_i² from `start`, which is put into its bounds first. Damping is Marquardt's
/// (scaled by the diagonal); steps that leave the bounds are cut to them.
/// @par Cost  per iteration one call of `residuals` and k²(n + k) flops.
Minimum least_squares(const Residuals& residuals, std::size_t count, std::span<const double> start,
                      const SearchOptions& options = {});

/// x in [lo, hi] with f least, by golden sections; f has one valley there.
double golden_section(const std::function<double(double)>& f, double lo, double hi);

}  // namespace orthrus::studies
