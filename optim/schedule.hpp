#pragma once
/// @file
/// Schedules: what multiplies the learning rate.

#include <cstdint>
#include <orthrus/recipe.hpp>

namespace orthrus::optim {

/// The factor of step t = 1, 2, … of a run of `total_steps`.
///
/// Warm-up: t/w for t ≤ w. `constant`: 1. `cosine`: from 1 at t = w to `final` at t = T
/// (decay_steps, or total_steps), constant after. `wsd` (warm-up, stable, decay): 1 until the last
/// `decay_steps` of the run, then linear to `final` at t = total_steps.
double schedule_factor(const ScheduleConfig& schedule, std::int64_t t, std::int64_t total_steps);

}  // namespace orthrus::optim
