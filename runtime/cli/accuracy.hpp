#pragma once
/// @file
/// How far from 1 a way to msign leaves the singular values of matrices that are known by their
/// factors: no SVD is in the judgement.

#include <orthrus/recipe.hpp>
#include <orthrus/view.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace orthrus::kernels {
class Backend;
}

namespace orthrus::cli {

/// Singular values σ₁ ≥ … ≥ σ_m ≥ 0 with σ₁ of about 1.
struct Spectrum {
  std::string_view name;
  std::vector<double> (*values)(Index m);
};

/// flat; those of a square Gaussian matrix (quarter circle); i^-1/2; 1/i; from 1 to 1e-4 in equal
/// ratios; 1 for one in eight and 0 for the rest.
std::span<const Spectrum> spectra();

/// max |uᵢᵀOvᵢ − 1| over σᵢ of at least a share of σ₁; 0 where there is none.
struct SignError {
  double above_1e2 = 0, above_5e3 = 0, above_2e3 = 0;
  double largest = 0;  ///< ‖O‖₂
};

/// U (m×m) and V (n×m) with orthonormal columns, the same every time: random, made orthogonal by
/// Gram-Schmidt twice over, in f64.
class Factors {
 public:
  /// @pre 0 < m <= n. @par Cost  4·m²·(m + n) flops, in plain loops.
  Factors(Index m, Index n);
  /// X = U·diag(σ)·Vᵀ, rounded to f32.
  [[nodiscard]] std::vector<float> matrix(std::span<const double> sigma,
                                          kernels::Backend& backend) const;
  /// Of O, m×n: what has become of `matrix(sigma)`. @par Cost  2·m²·n + 48·m³ flops in f64.
  [[nodiscard]] SignError error(std::span<const float> o, std::span<const double> sigma,
                                kernels::Backend& backend) const;
  [[nodiscard]] Index rows() const { return m_; }
  [[nodiscard]] Index cols() const { return n_; }

 private:
  Index m_, n_;
  std::vector<double> u_, v_;  // row i is uᵢᵀ, vᵢᵀ
};

/// A way to msign, as a config names it.
struct SignMethod {
  std::string name;  ///< of the table, or "rational"
  int steps = 0;     ///< iterations, or terms
  LmoConfig config;  ///< in f32
  bool in_bf16 = true;
};

/// Every table with five iterations, and with all it lists where that is more; the rational
/// functions.
std::vector<SignMethod> sign_methods();

/// Runs one. @return f32, m×n.
std::vector<float> run_sign(const LmoConfig& config, std::span<const float> x, Index m, Index n,
                            kernels::Backend& backend);

/// A cell of the table: two digits, but nothing below a thousandth, where rounding decides.
std::string error_text(double error);

}  // namespace orthrus::cli
