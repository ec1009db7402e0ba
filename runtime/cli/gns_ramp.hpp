#pragma once
/// @file
/// GnsRamp: `gns_ramp` of a configuration at a training's side. It feeds a `studies::BatchRamp`
/// with what steps measured, and says when the training is to go on with another batch.

#include <map>
#include <optional>
#include <orthrus/studies/ramp.hpp>
#include <string>

#include "runtime/cli/training.hpp"

namespace orthrus::cli {

class GnsRamp {
 public:
  using Decision = studies::BatchRamp::Decision;

  /// @throws ConfigError  on all ranks: noise cannot be measured with so many ranks and
  ///                      micro-batches.
  explicit GnsRamp(const Training& training);
  /// @return what the next step begins with, where that is another batch. Collective.
  std::optional<Decision> after(const Training::Step& step, Training& training);
  [[nodiscard]] double noise_scale() const { return ramp_.noise_scale(); }
  /// In words: what the batch minimises.
  [[nodiscard]] std::string objective() const { return ramp_.objective(); }
  [[nodiscard]] const Decision& now() const { return ramp_.now(); }

  /// For a checkpoint, and back: false where there is nothing of it.
  void write_to(std::map<std::string, std::string>& user) const;
  bool read_from(const std::map<std::string, std::string>& user);

 private:
  void measure(const Training::Step& step, const Training& training);
  void tell_seconds(Training& training);

  const GnsRampConfig config_;
  studies::BatchRamp ramp_;
  /// Since the last decision: steps, and their seconds in the optimizer and in gradients.
  double timed_ = 0, step_seconds_ = 0, gradient_seconds_ = 0;
};

}  // namespace orthrus::cli
