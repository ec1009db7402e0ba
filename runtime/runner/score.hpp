#pragma once
/// @file
/// Score: what a trial's evaluations have come to so far: the best of the metric, and when it
/// reached its target.

#include <cmath>
#include <cstdint>
#include <limits>

#include "runtime/runner/crossing.hpp"
#include "runtime/runner/study_file.hpp"

namespace orthrus::runner {

class Score {
 public:
  explicit Score(const Study& study) : study_(&study) {}

  void add(std::int64_t step, double value) {
    if (std::isfinite(value) && !(study_->loss_of(value) >= study_->loss_of(best_))) best_ = value;
    if (!reached_ && step > 0 && meets(value)) {
      reached_ = true;
      low_ = step_;
      high_ = step;
      steps_to_target_ = std::isnan(value_)
                             ? static_cast<double>(step)
                             : crossing(static_cast<double>(step_), value_,
                                        static_cast<double>(step), value, study_->target);
    }
    value_ = value;
    step_ = step;
  }

  [[nodiscard]] bool meets(double value) const {
    return study_->has_target() && study_->loss_of(value) <= study_->loss_of(study_->target);
  }
  [[nodiscard]] double value() const { return value_; }  ///< the last; NaN: none
  [[nodiscard]] double best() const {                    ///< infinitely bad: none is finite
    return std::isnan(best_) ? study_->loss_of(std::numeric_limits<double>::infinity()) : best_;
  }
  /// Was the target reached, when, and between which evaluations?
  [[nodiscard]] bool reached() const { return reached_; }
  [[nodiscard]] double steps_to_target() const { return steps_to_target_; }
  [[nodiscard]] std::int64_t low() const { return low_; }
  [[nodiscard]] std::int64_t high() const { return high_; }

 private:
  const Study* study_;
  double value_ = std::nan(""), best_ = std::nan("");
  std::int64_t step_ = 0;
  bool reached_ = false;
  double steps_to_target_ = 0;
  std::int64_t low_ = 0, high_ = 0;
};

}  // namespace orthrus::runner
