#include "kernels/zolotarev.hpp"

#include <array>
#include <cmath>
#include <numbers>
#include <orthrus/error.hpp>

namespace orthrus::kernels {
namespace {

/// The arithmetic-geometric mean of 1 and k', and the way there: it gives K(k) and am(u; k).
class Means {
 public:
  /// @param complement  k' = √(1 − k²), in (0, 1): of a modulus near 1 only this keeps its digits.
  explicit Means(double complement) {
    double a = 1;
    double b = complement;
    // Quadratic: seven steps from 1e-8 to the last digit.
    while (steps_ < most && std::abs(a - b) > 1e-16 * a) {
      ratio_[steps_++] = (a - b) / (a + b);
      const double mean = (a + b) / 2;
      b = std::sqrt(a * b);
      a = mean;
    }
    limit_ = a;
  }
  [[nodiscard]] double quarter_period() const { return std::numbers::pi / (2 * limit_); }
  /// sc(u; k) = tan(am u).
  [[nodiscard]] double sc(double u) const {
    double phi = std::ldexp(limit_ * u, static_cast<int>(steps_));
    for (std::size_t n = steps_; n-- > 0;) {
      phi = (phi + std::asin(ratio_[n] * std::sin(phi))) / 2;
    }
    return std::tan(phi);
  }

 private:
  static constexpr std::size_t most = 16;
  std::array<double, most> ratio_{};  // cₙ/aₙ, n = 1, 2, …
  std::size_t steps_ = 0;
  double limit_ = 1;
};

}  // namespace

RationalSign rational_sign(double l, int r) {
  expects<ConfigError>(l >= 1e-8 && l < 1, "the smallest singular value must be in [1e-8, 1)");
  expects<ConfigError>(r >= 1 && r <= 16, "the number of shifts must be 1 to 16");
  const Means means(l);
  const auto count = static_cast<std::size_t>(r);
  std::vector<double> c(2 * count + 1);  // from c[1] on
  for (std::size_t i = 1; i <= count; ++i) {
    const double u = static_cast<double>(i) * means.quarter_period() / (2 * r + 1);
    const double sc = means.sc(u);
    c[i] = l * l * sc * sc;
    c[2 * count + 1 - i] = 1 / (sc * sc);
  }

  RationalSign f;
  f.l = l;
  f.r = r;
  for (std::size_t j = 1; j <= count; ++j) {
    const double pole = c[2 * j - 1];
    double residue = 1;
    for (std::size_t k = 1; k <= count; ++k) {
      residue *= c[2 * k] - pole;
      if (k != j) residue /= c[2 * k - 1] - pole;
    }
    f.poles.push_back(pole);
    f.residues.push_back(residue);
  }
  // f equioscillates from its smallest value at l to its largest at 1.
  f.scale = 1;
  const double least = f(l);
  const double most = f(1);
  f.scale = 2 / (least + most);
  f.error = (most - least) / (most + least);
  return f;
}

}  // namespace orthrus::kernels
