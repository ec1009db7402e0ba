#pragma once
/// @file
/// A batch that grows with the gradient's noise scale: an opt-in policy (H. Naganuma et al., arXiv
/// 2602.03001). It knows no trainer: it says what the next steps should be.
///
/// At a fixed number of examples small batches were not beaten at toy scale: a noise scale is a
/// trend, and what it is worth depends on what a step and an example cost.

#include <cstdint>
#include <string>

namespace orthrus::studies {

/// What is paid. Nothing given: the batch is κ times the noise scale.
struct BatchPrice {
  double step = 0, example = 0, second = 0;  ///< of each
  /// Of a step without examples, and of an example: where seconds are paid.
  double step_seconds = 0, example_seconds = 0;
  [[nodiscard]] bool given() const { return step > 0 || example > 0 || second > 0; }
};

class BatchRamp {
 public:
  struct Options {
    std::int64_t ranks = 1;
    std::int64_t most_local = 0;  ///< of a rank's forward and backward; then micro-batches. 0: any
    std::int64_t micro_batches = 1;  ///< no fewer: noise shows between them on a single rank
    std::int64_t most = 1 << 20;     ///< examples in all
    double factor = 0.6;             ///< κ
    double decay = 0.9;              ///< of the averages of noise and of signal
    std::int64_t every = 100;        ///< steps between decisions
    std::int64_t warmup_steps = 0;   ///< none before
    BatchPrice price;
  };
  struct Decision {
    std::int64_t batch = 0, local = 0, micro_batches = 1;  ///< batch = ranks·local·micro_batches
    double lr_multiplier = 1;                              ///< √(batch/first batch)
    bool changed = false;                                  ///< in this call
  };
  /// What decisions come of: for checkpoints.
  struct State {
    double noise = 0, signal = 0, weight = 0;
    Decision now;
  };
  /// @param batch  to begin with, a multiple of `ranks`·`micro_batches`.
  /// @throws ConfigError  naming the option.
  BatchRamp(std::int64_t batch, const Options& options);
  /// What a step measured, in any geometry: trΣ and |G|², or the squares of a dual norm's noise and
  /// signal.
  void add(double noise, double signal);
  /// After step `step`: the batch never falls. While the averaged signal is not above 0 it stays.
  const Decision& decide(std::int64_t step);
  [[nodiscard]] const Decision& now() const noexcept { return now_; }
  /// The seconds of a step without examples and of an example, as measured by now; where seconds
  /// are paid and these are not known, the batch stays.
  void set_seconds(double of_step, double of_example);
  [[nodiscard]] State state() const { return {noise_, signal_, weight_, now_}; }
  /// Of another number of ranks, too: the batch may then be a little larger.
  void restore(const State& state);
  /// Of the averages; 0 before the first measurement, ∞ without signal.
  [[nodiscard]] double noise_scale() const;
  /// The batch that costs least on the way to a target, S(b) = S_min(1 + B/b) steps and
  /// S_min(b + B) examples, B the noise scale: √(B·(cost of a step)/(cost of an example)); without
  /// a price κ·B.
  [[nodiscard]] double wanted() const;
  /// What `wanted` makes least, in words, for logs.
  [[nodiscard]] std::string objective() const;

 private:
  [[nodiscard]] Decision divided(double batch) const;
  Options options_;
  std::int64_t first_;
  double noise_ = 0, signal_ = 0, weight_ = 0;
  Decision now_;
};

}  // namespace orthrus::studies
