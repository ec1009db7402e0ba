#pragma once
/// @file
/// What singular values tell: ranks, entropies, how the polar factor answers to noise, and whether
/// a spectral update pays.
///
/// Sources: D. Davis, D. Drusvyatskiy, arXiv 2512.04299 (nuclear and stable rank); P. Beneventano,
/// M. Abdelmoneum, T. Poggio, arXiv 2606.08388 (self-polar flow; its sensitivity is re-derived
/// here). Matrices are f32, bf16 or f64, of the host, finite; everything is computed in f64, by
/// LAPACK. A shape that does not fit throws ShapeError, an entry that is not finite NumericError.

#include <cstdint>
#include <orthrus/view.hpp>
#include <span>
#include <vector>

namespace orthrus::studies {

/// Descending. @par Cost  about 4·max·min² flops and a copy in f64.
[[nodiscard]] std::vector<double> singular_values(ConstMatrixView a);

/// The same from the eigenvalues of the smaller Gram matrix: a fifth of the time, nothing of σ
/// below 1.5e-8·σ₁. @par Cost  min²·max + 4/3·min³ flops, a copy and the Gram matrix in f64.
[[nodiscard]] std::vector<double> gram_singular_values(ConstMatrixView a);

/// Always 1 ≤ stable_rank ≤ participation ≤ erank2 ≤ nuclear_rank ≤ rank: exponentials of the Rényi
/// entropies of σᵢ²/Σσⱼ², of orders ∞, 2, 1, ½, 0. All 0 for a zero matrix.
struct Spectrum {
  double operator_norm = 0, frobenius_norm = 0, nuclear_norm = 0;
  double stable_rank = 0;    ///< ‖X‖_F²/‖X‖_op²
  double nuclear_rank = 0;   ///< ‖X‖_*²/‖X‖_F²
  double erank1 = 0;         ///< exp of the entropy of σᵢ/Σσⱼ
  double erank2 = 0;         ///< exp of the entropy of σᵢ²/Σσⱼ²
  double participation = 0;  ///< (Σσ²)²/Σσ⁴
  double cond_eff = 0;       ///< σ₁/σ_k with k = ⌈0.9·rank⌉
  Index rank = 0;            ///< values above `cutoff`·σ₁
};
/// @param values  singular values, in any order, none negative
[[nodiscard]] Spectrum spectrum_of(std::span<const double> values, double cutoff = 1e-12);
[[nodiscard]] Spectrum spectrum_of(ConstMatrixView a, double cutoff = 1e-12);
/// Of squared singular values, such as the eigenvalues of AAᵀ that ranks have summed: what is below
/// 0 by rounding counts as 0. Their relative error of 2⁻⁵² leaves nothing of σ below 1.5e-8·σ₁.
[[nodiscard]] Spectrum spectrum_of_gram(std::span<const double> eigenvalues, double cutoff = 3e-8);

/// S(µ) = 4·Σ_{i<j} 1/(µᵢ+µⱼ)² + (n−m)·Σ 1/µᵢ²: E‖polar(M+E) − polar(M)‖_F² = τ²·S to first order,
/// for M of m×n (m ≤ n, m values µ > 0) and E of i.i.d. entries of variance τ².
/// @param noise  τ; above 0 the denominators are (µᵢ+µⱼ)² + τ²n and µᵢ² + τ²n
[[nodiscard]] double polar_sensitivity(std::span<const double> values, Index rows, Index cols,
                                       double noise = 0);

/// The batch at which noise and signal of a polar update are equal.
struct PolarBatch {
  double batch = 0;        ///< v(β)·s²·S(µ)/m
  double noise_ratio = 0;  ///< r = τ²S/m at the batch given; first order holds for r up to 0.2
  bool saturated = false;  ///< µ_min ≤ τ√n: the smallest values are noise, S is regularized
};
/// @param values             of the momentum, min(rows, cols) of them
/// @param entry_variance  s²: of one example's gradient noise, per entry, trΣ/(rows·cols)
/// @param at_batch        the batch in use
[[nodiscard]] PolarBatch polar_batch(std::span<const double> values, Index rows, Index cols,
                                     double entry_variance, double momentum, double at_batch);

/// ‖polar(M_a) − polar(M_b)‖_F²/(2k) of the momenta of two independent halves of a batch, on the
/// smaller side k: what `PolarBatch::noise_ratio` is of a half, measured instead of derived.
/// Between 0 and 1 (2 for opposite ones).
[[nodiscard]] double update_noise(ConstMatrixView a, ConstMatrixView b);

/// dσᵢ = uᵢᵀΔW·vᵢ for the singular pairs of W, largest first, and what they do to entropy.
struct Flattening {
  std::vector<double> dsigma;
  double rate = 0;  ///< Σ dσᵢ·(−(ln pᵢ + H))/Σσ, the change of H, pᵢ = σᵢ/Σσ; positive: W flattens
};
[[nodiscard]] Flattening flattening(ConstMatrixView weights, ConstMatrixView update);

/// ‖X‖_op by power iteration on XXᵀ or XᵀX, whichever is smaller; for matrices too large for SVDs.
struct PowerIteration {
  int iterations = 20;        ///< at most
  double tolerance = 1e-3;    ///< on the relative change
  std::vector<double> start;  ///< kept from call to call; another length starts anew
  [[nodiscard]] double operator_norm(ConstMatrixView a);
};

/// ‖OOᵀ − I‖_F/√k on the smaller side k: 0 for a polar factor.
[[nodiscard]] double orthogonality_error(ConstMatrixView o);
/// ⟨G, O⟩/‖G‖_*: 1 where O = polar(G). 0 for a zero G.
[[nodiscard]] double alignment(ConstMatrixView gradient, ConstMatrixView direction);

/// Which geometry the one-step condition nr(G) ≥ st(A) favours, from probes of one weight.
///
/// It compares bounds on one step of plain gradient and plain spectral descent with ideal steps:
/// not AdamW, not momentum, not many steps.
class GeometryAdvisor {
 public:
  enum class Advice : std::uint8_t { keep, spectral, euclidean };
  struct Options {
    double hysteresis = 0.25;  ///< h: spectral above 1 + h, Euclidean below 1 − h
    int consecutive = 5;       ///< probes that must agree
    double decay = 0.8;        ///< of the average of ln(nr/st) over probes
  };
  GeometryAdvisor() : GeometryAdvisor(Options{}) {}
  explicit GeometryAdvisor(const Options& options);
  /// One probe; both ranks are at least 1. @return the advice from now on.
  Advice probe(double nuclear_rank_of_gradient, double stable_rank_of_activations);
  [[nodiscard]] Advice advice() const noexcept { return state_.advice; }
  [[nodiscard]] double average_ratio() const noexcept;

  /// All that probes have left behind, for checkpoints.
  struct State {
    double log_ratio = 0, weight = 0;  ///< the average, and what its weights add up to
    int above = 0, below = 0;          ///< probes in a row beyond 1 ± h
    Advice advice = Advice::keep;
  };
  [[nodiscard]] const State& state() const noexcept { return state_; }
  void restore(const State& state) noexcept { state_ = state; }

 private:
  Options options_;
  State state_;
};

}  // namespace orthrus::studies
