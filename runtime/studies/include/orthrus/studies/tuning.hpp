#pragma once
/// @file
/// The choice of a learning rate from what was tried, as a study makes it for each of its cells.

#include <cstdint>
#include <span>
#include <vector>

namespace orthrus::studies {

/// What one learning rate came to in one cell (an optimizer at a batch size), over its seeds.
struct RateOutcome {
  double lr = 0;
  std::vector<double> values;  ///< metric per seed; +inf where it diverged or was censored
};

enum class GridEdge : std::uint8_t { none, low, high };

/// What a learning rate is judged by. Less is better.
enum class RateMetric : std::uint8_t { steps_to_target, loss };

struct RateChoice {
  double lr = 0;         ///< the tried rate with the least mean over its seeds
  double fitted_lr = 0;  ///< vertex of a parabola in ln η around it; lr where there is none
  double curvature = 0;  ///< d²/d(ln η)² there, of the loss or of ln S; 0 without a parabola
  double plateau_octaves = 0;  ///< log₂ of the range within +1 % of the loss, +10 % of the steps
  GridEdge edge = GridEdge::none;  ///< the end of the grid `lr` lies on; a single rate has none
  bool censored = false;           ///< no rate has a finite mean; lr is 0
  double value = 0;                ///< the mean at `lr`; +inf when censored
};

/// Means are arithmetic for losses and geometric for steps; a seed that is not finite makes its
/// rate's mean infinite. Of equal means the smaller rate is taken, which is farther from diverging.
/// @param outcomes  in any order, rates distinct, each with a seed
/// @throws ShapeError    no outcomes, one without seeds, or two of one rate
/// @throws NumericError  a rate, or a number of steps, that is not above zero
[[nodiscard]] RateChoice choose_rate(std::span<const RateOutcome> outcomes, RateMetric metric);

}  // namespace orthrus::studies
