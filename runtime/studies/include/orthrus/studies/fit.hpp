#pragma once
/// @file
/// Curves through measurements: steps to a target against batch size, losses against steps and
/// batch, learning rates, message times; with intervals.
///
/// Steps, losses and times are fitted in log space, where relative errors are alike. A function
/// throws ShapeError when its lists differ in length or are too short, NumericError when a number
/// in them is not finite and positive.

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace orthrus::studies {

struct Interval {
  double lo = 0, hi = 0;
};

/// Steps to a target as a function of the batch B.
enum class StepsModel : std::uint8_t {
  hyper,        ///< a + b/B: parameters {a, b}
  hyper_alpha,  ///< a + b/B^α: {a, b, α}
  three_term_inv,  ///< s·(1 − d·B^−β)^(−1/γ): {s, d, β, γ}; (C/(ε' − Bc·B^−β))^(1/γ) has
                   ///< s = (C/ε')^(1/γ), d = Bc/ε': of the five only these four are determined
};
[[nodiscard]] std::string_view name_of(StepsModel model) noexcept;

struct StepsFit {
  StepsModel model = StepsModel::hyper;
  std::vector<double> parameters;
  std::vector<double> log_residuals;  ///< ln S − ln S(B), in the order given
  double rms_log = 0;                 ///< √mean of their squares
  double aicc = 0;  ///< n·ln(RSS/n) + 2k + 2k(k+1)/(n−k−1), k with the variance; ∞ if n ≤ k+1
  double left_out_rms = 0;  ///< RMS log error of each point as the fit to the others predicts it
  double trend = 0;         ///< curvature of the residuals in ln B, over its standard error
  [[nodiscard]] double steps(double batch) const;
  /// RMS log residual at most 0.10.
  [[nodiscard]] bool accepted() const noexcept { return rms_log <= 0.10; }
  /// The residuals bend: |trend| above 2.5, which white noise exceeds in about 4 of 100 fits of ten
  /// points.
  [[nodiscard]] bool structured() const noexcept;
};

/// A batch that had not reached the target after so many steps: S(B) > steps.
struct StepsAbove {
  double batch = 0, steps = 0;
};

/// Fits `model` by Levenberg–Marquardt on the logarithms of its parameters: from a = 0.9·min S,
/// b = S(B_min)·B_min for `hyper`, from 20 starts for the others.
///
/// With `censored` batches, by maximum likelihood with normal log residuals (J. Tobin, Econometrica
/// 26, 1958): −ln L = n·ln σ + Σ r²/2σ² − Σ ln Φ((ln S(B) − ln above)/σ), the last sum over them.
/// Found by expectation and maximization, least squares with censored values at their conditional
/// means μ + σ·φ(z)/(1 − Φ(z)), z = (ln above − μ)/σ (M. Aitkin, Technometrics 23, 1981). Then AICc
/// has −2·ln L for n·ln(RSS/n); residuals are those of the others.
/// @param batches  distinct, at least as many as parameters
[[nodiscard]] StepsFit fit_steps(StepsModel model, std::span<const double> batches,
                                 std::span<const double> steps,
                                 std::span<const StepsAbove> censored = {});

/// The fit with the lowest AICc among `hyper`, `hyper_alpha`, `three_term_inv`.
[[nodiscard]] StepsFit select_steps(std::span<const double> batches, std::span<const double> steps,
                                    std::span<const StepsAbove> censored = {});

/// The model of `fit` through other data, searched for from where `fit` ended: for resamples of its
/// data. Without left_out_rms and trend.
[[nodiscard]] StepsFit refit_steps(const StepsFit& fit, std::span<const double> batches,
                                   std::span<const double> steps,
                                   std::span<const StepsAbove> censored = {});

/// What is meant by a critical batch size. They differ by factors, and in exponent.
enum class CbsDefinition : std::uint8_t {
  mccandlish,  ///< steps and examples both twice their minimum: b/a
  overhead,  ///< examples a share above linear scaling from a reference batch: (1+h)B_ref + h·b/a
  token_optimal,  ///< least examples to the target: (d(1 + β/γ))^(1/β) of `three_term_inv`
};
[[nodiscard]] std::string_view name_of(CbsDefinition definition) noexcept;

struct CbsEstimate {
  CbsDefinition definition = CbsDefinition::mccandlish;
  double value = 0;
  Interval interval;  ///< {0, 0}: not asked for
  std::string unit = "examples";
};

/// `overhead` of 0.2 over batch 256 is that of H. Zhang et al., arXiv 2410.21676. @throws
/// ConfigError the model has no such point.
[[nodiscard]] CbsEstimate critical_batch(const StepsFit& fit, CbsDefinition definition,
                                         double reference_batch = 256, double overhead = 0.2);

/// How intervals come about. Draws are keyed: the same arguments give the same interval.
struct Bootstrap {
  int resamples = 2000;
  std::uint64_t seed = 0;
  double level = 0.95;
};

/// Percentile interval of a statistic of `resamples` fits to S(B)·exp(residual), residuals drawn
/// with replacement and scaled by √(n/(n−k)). For one seed per batch. Censored batches are drawn,
/// too, and measured where they come out below what was known of them.
[[nodiscard]] Interval residual_interval(const StepsFit& fit, std::span<const double> batches,
                                         const std::function<double(const StepsFit&)>& statistic,
                                         const Bootstrap& options = {},
                                         std::span<const StepsAbove> censored = {});

/// The same over seeds: each batch's m values are drawn anew from themselves, their mean's
/// deviation scaled by √(m/(m−1)) (with 3 seeds an interval would otherwise be a fifth too narrow).
/// Fits go through geometric means. `steps[i]`: at least two values for batch i.
[[nodiscard]] Interval stratified_interval(StepsModel model, std::span<const double> batches,
                                           std::span<const std::vector<double>> steps,
                                           const std::function<double(const StepsFit&)>& statistic,
                                           const Bootstrap& options = {});

/// Smallest and largest of the middle `level` of `values`, by linear interpolation.
[[nodiscard]] Interval percentile_interval(std::vector<double> values, double level);

/// y = factor·x^exponent, by least squares on logarithms.
struct PowerLaw {
  double factor = 1, exponent = 0;
  double exponent_error = 0;   ///< standard error; 0 when two points leave none
  Interval exponent_interval;  ///< 95 %, of Student's t
  double rms_log = 0, aicc = 0;
  [[nodiscard]] double operator()(double x) const;
};
/// @param weights  of squared log residuals; empty: all 1
[[nodiscard]] PowerLaw fit_power(std::span<const double> x, std::span<const double> y,
                                 std::span<const double> weights = {});

/// y = factor·min(x, knee)^exponent.
struct SaturatingPowerLaw {
  PowerLaw below;  ///< its rms_log and aicc are those of both parts
  double knee = 0;
  bool preferred = false;  ///< its AICc is below that of the pure power law
};
/// At least 5 points; two lie on each side of the knee.
[[nodiscard]] SaturatingPowerLaw fit_saturating_power(std::span<const double> x,
                                                      std::span<const double> y);

/// y = 2·peak/(√(x₀/x) + √(x/x₀)): rates that rise as √x, are largest at x₀ and fall beyond (S. Li
/// et al., NeurIPS 2024, where x is the batch and x₀ the noise scale).
struct SurgeLaw {
  double peak = 0;
  double at = 0;  ///< x₀, looked for within a factor 1000 of the abscissas
  double rms_log = 0, aicc = 0;
  [[nodiscard]] double operator()(double x) const;
};
/// Least squares of logarithms, at least 3 points of 2 abscissas.
[[nodiscard]] SurgeLaw fit_surge(std::span<const double> x, std::span<const double> y);

/// Where a tuning curve is least: a parabola in ln η through the best points and their neighbours.
struct Tuned {
  double lr = 0;
  double value = 0;      ///< of the parabola there
  double curvature = 0;  ///< d²value/d(ln η)²
  double plateau_octaves =
      0;              ///< log₂ of largest over smallest η within `slack` of the least value
  bool edge = false;  ///< the best η is the first or last
};
/// @param lrs    ascending, at least 3
/// @param slack  0.01 for losses, 0.10 for steps
[[nodiscard]] Tuned tuned_lr(std::span<const double> lrs, std::span<const double> values,
                             double slack = 0.01);

/// One run: N parameters, K steps of batch M, and the loss it ended with.
struct LossCell {
  double parameters = 0;  ///< 0 for all: the law has no such term
  double steps = 0, batch = 0, loss = 0;
};

/// L = E + A/N^α + B/M^β + C/K^γ (F. Schaipp, arXiv 2607.01487).
struct LossLaw {
  double irreducible = 0;                       ///< E
  double size_factor = 0, size_exponent = 0;    ///< A, α; 0 without N
  double batch_factor = 0, batch_exponent = 0;  ///< B, β
  double steps_factor = 0, steps_exponent = 0;  ///< C, γ
  double rms_log = 0;
  [[nodiscard]] double loss(const LossCell& cell) const;
  /// M*(D) = (βB/(γC))^(1/(β+γ))·D^(γ/(β+γ)) for D = M·K examples.
  [[nodiscard]] double best_batch(double examples) const;
  [[nodiscard]] double best_batch_exponent() const;
};
/// min Σ Huber_δ(ln L̂ − ln L) over logarithms, from a grid of starts, the sum and not the mean
/// (J. Hoffmann et al., arXiv 2203.15556, as corrected by T. Besiroglu et al., arXiv 2404.10102).
/// @param huber  δ; 0 is plain least squares, better when noise is normal
[[nodiscard]] LossLaw fit_loss(std::span<const LossCell> cells, double huber = 1e-3);

/// T = α·latency_steps + β·traffic·bytes (Hockney).
struct MessageCost {
  double latency_s = 0;   ///< α
  double s_per_byte = 0;  ///< β
  double from_bytes = 0;  ///< the smallest size it was fitted to
  double rms_relative = 0;
  [[nodiscard]] double half_bytes() const { return latency_s / s_per_byte; }  ///< n_½
  [[nodiscard]] double bytes_per_s() const { return 1 / s_per_byte; }
};
/// How a collective's time splits: {p−1, (p−1)/p} for a ring all-gather, doubled for an all-reduce.
struct CollectiveShape {
  double latency_steps = 1, traffic = 1;
};
struct MessageFit {
  std::vector<MessageCost> pieces;  ///< one, or two: below and from the breakpoint
  double breakpoint_bytes = 0;      ///< 0: one piece
  double aicc = 0;
  [[nodiscard]] double seconds(double bytes, const CollectiveShape& shape = {}) const;
};
/// Weighted least squares on relative errors; two pieces, of 4 sizes or more each, where AICc asks
/// for them. `bytes` ascend, at least 5. A negative α or β becomes 0.
[[nodiscard]] MessageFit fit_message(std::span<const double> bytes, std::span<const double> seconds,
                                     const CollectiveShape& shape = {});

/// Strong scaling: fixed work on `ranks`, ascending.
struct Scaling {
  double ranks = 1, speedup = 1;  ///< T(p0)/T(p)
  double efficiency = 1;          ///< p0·T(p0)/(p·T(p))
  double serial_fraction = 0;     ///< Karp–Flatt, of q = p/p0: (1/S − 1/q)/(1 − 1/q); 0 at p0
};
[[nodiscard]] std::vector<Scaling> strong_scaling(std::span<const double> ranks,
                                                  std::span<const double> seconds);
/// T(p) = T(1)·(s + (1 − s)/p) by relative least squares: the serial fraction s of Amdahl, in [0,
/// 1].
[[nodiscard]] double amdahl_fraction(std::span<const double> ranks,
                                     std::span<const double> seconds);

}  // namespace orthrus::studies
