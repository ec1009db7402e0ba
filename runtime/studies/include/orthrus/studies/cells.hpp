#pragma once
/// @file
/// From the trials of a study to what it says: a learning rate for every cell, chosen on some seeds
/// and reported on others; critical batch sizes, the law of the rates, and one optimizer against
/// another, with intervals that know of the choice.

#include <cstdint>
#include <optional>
#include <orthrus/studies/fit.hpp>
#include <orthrus/studies/tuning.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace orthrus::studies {

/// What a trial's seed is for: to choose the learning rate, to report what it comes to, or both,
/// which reports too little: of noisy means the least was taken.
enum class SeedRole : std::uint8_t { tune, report, only };

struct TrialOutcome {
  std::string series;  ///< what is told apart: an optimizer
  double batch = 0, lr = 0;
  std::int64_t seed = 0;
  SeedRole role = SeedRole::only;
  double value = 0;  ///< the metric; +inf where it diverged or was censored
  double above = 0;  ///< steps after which it was censored, short of the target; 0: it was not
};

struct SeedValue {
  std::int64_t seed = 0;
  double value = 0;
  double above = 0;  ///< as of the trial
};

struct CellRate {
  double lr = 0;
  std::vector<SeedValue> tuning, reporting;  ///< seeds ascending; `only`: the same in both
};

/// A series at one batch size.
struct Cell {
  std::string series;
  double batch = 0;
  RateMetric metric = RateMetric::steps_to_target;
  std::vector<CellRate> rates;    ///< ascending
  RateChoice choice;              ///< on the tuning seeds
  std::vector<SeedValue> record;  ///< at the chosen rate, on reporting seeds where it has any
  bool fresh = false;             ///< the seeds of `record` had no part in the choice
  double value = 0;               ///< mean of `record`, as choose_rate's; +inf: right-censored
  double above = 0;  ///< censored: its steps are more than so many; 0: nothing is known of them
  [[nodiscard]] bool censored() const noexcept;
};

/// By series in order of appearance, then by batch. Of two trials that differ in nothing but their
/// value the later one counts. @throws NumericError  a batch or a rate that is not above zero.
[[nodiscard]] std::vector<Cell> cells_of(std::span<const TrialOutcome> trials, RateMetric metric);

/// What an interval was made of.
enum class IntervalKind : std::uint8_t {
  none,
  stratified,  ///< seeds drawn anew inside every cell and rate, the rate chosen anew, and refitted
  residual,    ///< residuals of the fit: some cell has one seed
  student_t
};
[[nodiscard]] std::string_view name_of(IntervalKind kind) noexcept;

struct StepsQuestion {
  std::optional<StepsModel> model = StepsModel::hyper;  ///< none: the one of least AICc
  /// Those that the model has no point for are passed over.
  std::vector<CbsDefinition> definitions{CbsDefinition::mccandlish, CbsDefinition::overhead};
  double reference_batch = 256, overhead = 0.2;
  Bootstrap bootstrap;  ///< 0 resamples: no intervals
  bool tobit = true;    ///< censored cells take part by what their steps are more than
};

/// Steps to the target against batch size, of one series.
struct StepsStudy {
  std::vector<double> batches, steps;
  std::vector<Interval> steps_intervals;  ///< {0, 0} unless stratified
  std::vector<double> censored;           ///< batches whose S lies above
  std::vector<StepsAbove> above;          ///< those of them that are part of the fit
  StepsFit fit;
  std::vector<Interval> parameter_intervals;
  std::vector<CbsEstimate> critical;
  std::vector<std::vector<double>> critical_draws;  ///< of every resample, ascending
  IntervalKind kind = IntervalKind::none;
};
/// @param cells  of one series, metric steps_to_target. @throws ShapeError  fewer uncensored cells
/// than parameters.
[[nodiscard]] StepsStudy study_steps(std::span<const Cell> cells, const StepsQuestion& question);

/// Best learning rates against batch size, of one series: η* = factor·B^p, perhaps up to a knee.
struct RateStudy {
  std::vector<double> batches, lrs;  ///< vertices of the tuning curves
  std::vector<Interval> lr_intervals;
  PowerLaw law;                            ///< of batches below the knee, where there is one
  std::optional<SaturatingPowerLaw> bent;  ///< five batches or more
  std::optional<SurgeLaw> surge;           ///< with it
  Interval exponent;
  IntervalKind kind = IntervalKind::none;
};
/// Seeds are drawn anew where every rate of every cell has two; else the interval is Student's.
/// @throws ShapeError  fewer than two uncensored cells.
[[nodiscard]] RateStudy study_rates(std::span<const Cell> cells, const Bootstrap& bootstrap = {});

/// What becomes of the best rate where a model grows (spec: transfer over width).
struct RateShift {
  double size = 0;
  double shift = 0;  ///< log₂ of the best rate over that of the least size: octaves
  Interval interval;
  IntervalKind kind = IntervalKind::none;
  /// Loss at the least size's best rate over the own best one's, the mean over tuning seeds and its
  /// standard error (of two or more); NaN where that rate was not tried, or the metric is no loss.
  double penalty = 0, penalty_error = 0;
  /// Within half an octave. Nothing where the interval holds both.
  [[nodiscard]] std::optional<bool> stays() const;
  /// Not worse by more than .01, or by two standard errors. Nothing where it is not known.
  [[nodiscard]] std::optional<bool> costs_nothing() const;
};
/// @param cells  one for each size, which ascend. Those without a best rate are passed over.
[[nodiscard]] std::vector<RateShift> rate_shifts(std::span<const Cell> cells,
                                                 std::span<const double> sizes,
                                                 const Bootstrap& bootstrap = {});

/// Standard deviation of ln(value) from seed to seed, pooled over cells.
struct SeedSpread {
  double sigma = 0;
  int freedom = 0;
};
[[nodiscard]] SeedSpread seed_spread(std::span<const Cell> cells);

/// What the speed-run community asks of a claim, in standard errors of a known σ:
/// |difference|/(σ√(1/n₁ + 1/n₂)) of at least this, one chance in a thousand.
inline constexpr double claim_sigmas = 3.09;

/// Examples of one series over those of another, to the same target at the same batch size.
struct TokenRatio {
  double batch = 0;
  double ratio = 0;   ///< geometric mean over pairs; without pairs that of the cells' means
  Interval interval;  ///< Student's t on log ratios of equal seeds; {0, ∞} below two pairs
  int pairs = 0;      ///< seeds that both cells report
  double sigmas = 0;  ///< |ln ratio| in pooled standard errors of both series; 0: no spread
  [[nodiscard]] bool conclusive() const noexcept { return interval.lo > 1 || interval.hi < 1; }
  [[nodiscard]] bool claimed() const noexcept { return sigmas >= claim_sigmas; }
};
/// At every batch size where both reach the target.
[[nodiscard]] std::vector<TokenRatio> token_ratios(std::span<const Cell> numerator,
                                                   std::span<const Cell> denominator,
                                                   double level = 0.95);

/// What a branch came to: a run that left a base run at a step, with another batch and rate, for as
/// many examples as the others.
struct Branch {
  double batch = 0;
  std::vector<SeedValue> losses;  ///< +inf where it diverged
};

/// The critical batch at the fork, by recovery (arXiv 2505.23971): of the batches whose loss is at
/// most ε above that of every smaller one, the largest.
struct LocalCbs {
  double batch = 0;    ///< the smallest one always recovers
  double next = 0;     ///< the next larger one that was tried; +inf: none
  double epsilon = 0;  ///< that `batch` was granted
  /// In the order of `branches`: means over seeds, and what each was granted.
  std::vector<double> losses, epsilons;
};
/// ε is `least_epsilon`, or two standard errors where two seeds or more tell them: of a difference
/// of two branches up to this one, what branches of one seed have in common left out. Larger ones
/// are noisier, and have no say.
/// @param branches  ascending batches, each with a seed. @throws ShapeError  otherwise.
[[nodiscard]] LocalCbs local_cbs(std::span<const Branch> branches, double least_epsilon = 0.01);

}  // namespace orthrus::studies
