#pragma once
/// @file
/// Steepest descent under a norm with momentum, weight decay and noise: bounds, and what they say
/// of batch size and learning rate.
///
/// M ← βM + (1−β)g, C = βM + (1−β)g, W ← (1−λη)W + ηA with A the LMO of C. All bounds are worst
/// cases: they tell which hyperparameter matters and in which direction, not how large a number is.
/// Losses and norms are in the trainer's units, batches in independent examples.
///
/// Sources: F. L. Cesista, *Critical Batch Size for Steepest Descent Under Arbitrary Norms* and
/// *Convergence Bounds for Steepest Descent Under Arbitrary Norms*, leloykun.github.io/ponder; its
/// Lean formalisation, github.com/leloykun/steepest-descent-lean; S. McCandlish et al., arXiv
/// 1812.06162; S. Li et al., *Surge Phenomenon …*, NeurIPS 2024. A function that takes a number
/// outside the range it names throws ConfigError.

#include <cstdint>

namespace orthrus::studies {

/// φ(β) = β·√((1−β)/(1+β)) + (1−β): what is left of the gradient noise in C, as a bound. 0 ≤ β < 1.
[[nodiscard]] double momentum_noise(double momentum);

/// v(β) = (1−β)²(1+β)² + β⁴(1−β)/(1+β): what is left of its variance, exactly, for an inner-product
/// norm.
[[nodiscard]] double momentum_variance(double momentum);

/// b/v(β): the batch without momentum whose gradient is as noisy as C.
[[nodiscard]] double effective_batch(double batch, double momentum);

/// What a bound assumes of a problem and a run.
struct Assumptions {
  double momentum = 0.9;    ///< β
  double weight_decay = 0;  ///< λ
  double smoothness = 1;    ///< L: ‖∇f(X) − ∇f(Y)‖† ≤ L‖X − Y‖
  double noise = 1;         ///< σ: E‖ξ‖†² ≤ σ² for one example
  double distortion = 1;  ///< D: ½‖·‖†² is D-smooth; 1 for inner products (see `distortion`)
  double gap = 1;         ///< Δ0 = f(W_0) − f*
  double gradient_norm = 0;   ///< ‖∇f(W_0)‖†
  double momentum_error = 0;  ///< E0 = E‖∇f(W_0) − M_0‖†
};

/// level(T, b) = floor + C/T^γ + B/b^β: what T steps of batch b reach. Form A (γ = β = 1) and Form
/// B (γ = 1, β = ½) are instances.
struct StepsBatchLaw {
  double floor = 0;
  double steps_factor = 1, steps_exponent = 1;  ///< C, γ
  double batch_factor = 1, batch_exponent = 1;  ///< B, β

  [[nodiscard]] double level(double steps, double batch) const;
  /// T with level(T, b) = `target`; infinite when batch b never reaches it.
  [[nodiscard]] double steps_to(double target, double batch) const;
  /// argmin over b of b·steps_to(target, b) = (B(1 + β/γ)/(target − floor))^(1/β). target > floor.
  [[nodiscard]] double token_optimal_batch(double target) const;
};

/// Form A: (1/T)ΣE‖∇f‖† ≤ X/T + Y/b + Z, with
/// X = Δ0/η + 2√2·β/(1−β)·‖∇f(W_0)‖† + β/(D²(1−β))·‖∇f(W_0)‖†² and
/// Y = ½[(2β + 1/D²)(1−β) + λ]σ². Z (terms in D², L/λ, Lη and σ/√b) is taken as constant by the
/// source, and is yours to give. Its token-optimal batch is the post's b_crit = 2Y/ε'; the
/// hyperbola X/ε'·(1 + b_c/b) of large b has b_c = Y/ε', half of that.
[[nodiscard]] StepsBatchLaw form_a(const Assumptions& a, double lr, double floor);

/// Form B: the same average, with noise falling as 1/√b. `rho` bounds λ‖W_t‖ (0 ≤ ρ < 1).
[[nodiscard]] StepsBatchLaw form_b(const Assumptions& a, double lr, double rho);

/// (1/T)Σ𝒢(W_t) ≤ Δ0/(ληT) + 2βE0/((1−β)λT) + Y/√b + Zη, 𝒢(X) = ⟨∇f, X⟩ + ‖∇f‖†/λ, with
/// Y = (2φ/λ)√D·σ and Z = (2L/λ)(1 + 2β²/(1−β)). λ > 0.
struct FrankWolfeGap {
  explicit FrankWolfeGap(const Assumptions& a);
  double batch_term;  ///< Y
  double lr_term;     ///< Z
  [[nodiscard]] double bound(double steps, double batch, double lr) const;

 private:
  Assumptions a_;
};

/// E[f(W_T) − f*] ≤ (1−μλη)^T·Δ0 + Y/√b + Zη, with Y = (2φ/(μλ))√D·σ and
/// Z = (4L/(μλ))(1 + β²/(1−β)) + 2β/(1−β)·E0. μ = 1 for a star-convex f; otherwise the constant of
/// 𝒢(W_t) ≥ μ(f(W_t) − f*). E0 fades as βᵗ, which sums without the contraction: it has no 1/μ.
struct StarConvex {
  explicit StarConvex(const Assumptions& a, double frank_wolfe_constant = 1);
  double batch_term;  ///< Y
  double lr_term;     ///< Z
  [[nodiscard]] double bound(double steps, double batch, double lr) const;
  /// η* = [1 − (Z/(μλTΔ0))^(1/(T−1))]/(μλ), T steps at a fixed batch; 0 when Z ≥ μλTΔ0. T > 1.
  [[nodiscard]] double best_lr(double steps) const;

 private:
  Assumptions a_;
  double contraction_;  // μλ
};

/// Batch and learning rate that make a bound least.
struct BatchAndLr {
  double batch, lr, bound;
};
/// For N = b·T examples. Frank–Wolfe gap: with E0 = 0, b* = (Y/2)√(λN/(Δ0Z)) and
/// η* = √(Δ0b*/(λZN)); otherwise by search. Star-convex: by search; b* ∝ (N/ln N)^⅔ far out.
[[nodiscard]] BatchAndLr best_batch(const Assumptions& a, const FrankWolfeGap& bound,
                                    double examples);
[[nodiscard]] BatchAndLr best_batch(const StarConvex& bound, double examples);

/// λ_c: only above it does the star-convex bound have a best η > 0 after T steps; the positive root
/// of Δ0·T·λ² = 4L(1 + β²/(1−β)) + 2β/(1−β)·E0·λ.
[[nodiscard]] double critical_weight_decay(const Assumptions& a, double steps);

/// How a learning rate is carried from one batch to another. None is right in general: it is where
/// a search begins.
enum class LrRule : std::uint8_t { constant, sqrt, linear, surge };

/// η at `batch`, given η at `base_batch`. surge: η ∝ 1/(√(B_n/B) + √(B/B_n)), which falls beyond
/// `noise_scale` B_n; the others do not ask for it.
[[nodiscard]] double scaled_lr(LrRule rule, double base_lr, double base_batch, double batch,
                               double noise_scale = 0);

/// ε_max/(1 + B_noise/B): the best step of a noisy quadratic (McCandlish et al., eq. 2.6).
[[nodiscard]] double optimal_step(double largest, double noise_scale, double batch);

/// β^(batch/base_batch): the same half-life in examples.
[[nodiscard]] double scaled_momentum(double momentum, double base_batch, double batch);

/// λ with the same timescale τ = B/(ηλD), the share of the data an AdamW weight remembers
/// (S. Bergsma et al., arXiv 2505.13738): λ·(B/B_0)·(η_0/η) at a fixed number of examples D.
[[nodiscard]] double scaled_weight_decay(double weight_decay, double base_lr, double base_batch,
                                         double lr, double batch);

}  // namespace orthrus::studies
