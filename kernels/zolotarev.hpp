#pragma once
/// @file
/// Zolotarev's rational approximation of the sign, solved in double for any interval and degree.

#include <cstddef>
#include <vector>

namespace orthrus::kernels {

/// f(x) = scale·x·(1 + Σⱼ residues[j]/(x² + poles[j])): of all odd rational functions of type
/// (2r + 1, 2r) the one nearest to 1 on [l, 1]. On [0, l] it rises from 0 and stays below 1.
struct RationalSign {
  double l = 0;
  int r = 0;
  double error = 0;           ///< max |f − 1| on [l, 1]
  double scale = 0;           ///< C
  std::vector<double> poles;  ///< c₁ < c₃ < … in units of the largest squared singular value
  std::vector<double> residues;  ///< a₁, a₂, …: all positive

  [[nodiscard]] double operator()(double x) const noexcept {
    double sum = 1;
    for (std::size_t j = 0; j < poles.size(); ++j) sum += residues[j] / (x * x + poles[j]);
    return scale * x * sum;
  }
};

/// The best f for singular values in [l, 1] with r shifts. In f32, c₁ must stay above the rounding
/// error of a Gram matrix, about 1e-7: l ≥ 1e-3.
///
/// With K' = K(k'), k'² = 1 − l² and cᵢ = l²·sc²(iK'/(2r+1); k'), f is proportional to
/// x·Πⱼ (x² + c₂ⱼ)/(x² + c₂ⱼ₋₁). The elliptic functions come from arithmetic-geometric means, of
/// arguments up to K'/2 only: cᵢ·c₂ᵣ₊₁₋ᵢ = l².
///
/// @throws ConfigError  l is not in [1e-8, 1), or r not in 1 … 16.
/// @see    Y. Nakatsukasa, R. Freund, SIAM Review 58(3), 2016: the same function, for the polar
///         decomposition; M. Abramowitz, I. Stegun, 16.4 and 17.6: the means.
RationalSign rational_sign(double l, int r);

}  // namespace orthrus::kernels
