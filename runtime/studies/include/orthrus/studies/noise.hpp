#pragma once
/// @file
/// Gradient noise: how much of a gradient is chance, in the norms optimizers use.
///
/// Sources: S. McCandlish et al., arXiv 1812.06162 (trΣ, |G|², two batches); H. Naganuma et al.,
/// arXiv 2602.03001 (sign and spectral noise scales). Measure before clipping, on gradients that
/// are means over their examples. Units: gradients squared, examples.

#include <cstdint>
#include <orthrus/studies/fit.hpp>
#include <orthrus/view.hpp>
#include <span>
#include <vector>

namespace orthrus::studies {

/// Unbiased estimates of trΣ (per-example covariance) and |G|² from one probe; either may be
/// negative by chance. Averages are taken of each, ratios of averages: never averages of ratios.
/// Probes of several tensors add.
struct NoiseProbe {
  double trace = 0;   ///< trΣ
  double signal = 0;  ///< |G|²
};

/// From squared norms of the gradients of a small and a large batch:
/// |G|² = (B·|G_B|² − b·|G_b|²)/(B − b), trΣ = (|G_b|² − |G_B|²)/(1/b − 1/B). @throws ConfigError
/// unless 0 < b < B.
[[nodiscard]] NoiseProbe two_batch_noise(double small_batch, double small_squared,
                                         double large_batch, double large_squared);

/// From n gradients over b_s examples each (n = ranks × micro-steps), with q the mean of their
/// squared norms and r that of their mean: trΣ = b_s·n/(n−1)·(q − r), |G|² = (n·r − q)/(n − 1).
/// @throws ConfigError n < 2 or b_s ≤ 0
[[nodiscard]] NoiseProbe distributed_noise(Index gradients, double examples_each,
                                           double mean_squared, double squared_of_mean);

/// The same from gradients over unequal counts tᵢ: with weights wᵢ = tᵢ/Σt in q and in the mean,
/// and noise per example, q − r has mean (n − 1)·trΣ/Σt exactly, whatever the counts.
/// @param squared  ‖gᵢ‖²
[[nodiscard]] NoiseProbe distributed_noise(std::span<const double> examples,
                                           std::span<const double> squared,
                                           double squared_of_weighted_mean);

/// The same from gradients of single examples, n×d, an example a row. Those of a transformer's
/// normalization gains alone follow the whole model's noise scale closely (G. Gray et al., NeurIPS
/// 2024): a proxy for trainers that have these and not the rest. @throws ConfigError n < 2
[[nodiscard]] NoiseProbe example_noise(ConstMatrixView gradients);

/// Collects probes over steps, and divides last.
class NoiseScale {
 public:
  struct Value {
    double scale = 0;  ///< Σ trΣ/Σ|G|² over probes, in examples; ∞ when the denominator is ≤ 0
    Interval
        interval;  ///< 95 %, of a bootstrap of blocks of probes; {0, 0} with fewer than two blocks
    bool unresolved = true;  ///< the averaged |G|² is below 2 of its standard errors
  };
  void add(const NoiseProbe& probe) { probes_.push_back(probe); }
  [[nodiscard]] Value value(Index block = 5, int resamples = 2000, std::uint64_t seed = 0) const;
  /// Exponential averages of numerator and denominator, divided: the trend. 0 before the first
  /// probe.
  [[nodiscard]] double trend(double decay = 0.9) const;

 private:
  std::vector<NoiseProbe> probes_;
};

/// A norm of steepest descent. The LMO of C is the unit A that makes ⟨C, A⟩ least.
enum class DescentNorm : std::uint8_t {
  frobenius,  ///< dual Frobenius; −C/‖C‖_F
  sign,       ///< largest entry; dual Σ|c|; −sign(C)
  spectral,   ///< dual nuclear; −polar(C)
  row,        ///< largest row; dual the sum of row norms; −C with unit rows
  column,     ///< largest column; dual the sum of column norms; −C with unit columns
};
[[nodiscard]] double norm(DescentNorm norm, ConstMatrixView a);
[[nodiscard]] double dual_norm(DescentNorm norm, ConstMatrixView a);
/// Row-major, rows·cols numbers. Zero rows, columns and directions of no singular value stay zero.
[[nodiscard]] std::vector<double> descent_direction(DescentNorm norm, ConstMatrixView a);

/// V† = E‖ξ‖†² of gradients of b_s examples: the mean of ‖(g_i − g_j)/√2‖†² over disjoint pairs.
/// Two or more gradients of one shape; an odd one is left out.
[[nodiscard]] double dual_noise(DescentNorm norm, std::span<const ConstMatrixView> gradients);

/// V† at b_s, 2b_s, 4b_s, … by averaging neighbours first, as far as two averages remain.
struct NoiseDecay {
  std::vector<double> batches;     ///< in units of b_s
  std::vector<double> noise;       ///< V†
  std::vector<double> distortion;  ///< D_eff = (b/b_s)·V†(b)/V†(b_s): 1 for inner products
  double exponent = 0;             ///< d ln V†/d ln b; −1 is ideal; 0 with one size
};
[[nodiscard]] NoiseDecay dual_noise_decay(DescentNorm norm,
                                          std::span<const ConstMatrixView> gradients);

/// Σ sd (sign), tr(C^½) (spectral), √trΣ (Frobenius) per example, and the dual norm of the mean
/// gradient: what a non-Euclidean noise scale is made of. Tensors add in both before anything is
/// squared, as dual norms of a model add.
struct DualNoise {
  double noise = 0, signal = 0;
  [[nodiscard]] double scale() const { return noise * noise / (signal * signal); }
  DualNoise& operator+=(const DualNoise& other) {
    noise += other.noise;
    signal += other.signal;
    return *this;
  }
};
/// From n ≥ 2 gradients over b_s examples each. C = b_s/(n−1)·Σ(gᵢ−ḡ)(gᵢ−ḡ)ᵀ on the smaller side.
/// The signal contains noise/B, and C has at most (n−1)·rank directions: compare only equal n.
/// Only frobenius, sign and spectral. @throws ConfigError for others
[[nodiscard]] DualNoise dual_noise_scale(DescentNorm norm, double examples_each,
                                         std::span<const ConstMatrixView> gradients);

/// A non-Euclidean noise scale of n₁ gradients and of n₂ (halves of the same examples): what their
/// line over 1/n says of infinitely many. @throws ConfigError  n₁ = n₂, or one below 2
[[nodiscard]] double extrapolated_noise_scale(Index n1, double scale1, Index n2, double scale2);

/// Σ gᵢgᵢᵀ on the smaller side k, as the packed upper triangle of k(k+1)/2 numbers: what ranks add
/// up. @par Cost  k²·max flops
void add_gram(ConstMatrixView gradient, std::span<double> triangle);
/// tr(C^½) of one example, from such a sum over n ≥ 2 gradients of b_s examples and their mean.
[[nodiscard]] double spectral_noise(Index gradients, double examples_each,
                                    std::span<const double> gram_sum, ConstMatrixView mean);

}  // namespace orthrus::studies
