#include "optim/schedule.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace orthrus::optim {

double schedule_factor(const ScheduleConfig& s, std::int64_t t, std::int64_t total_steps) {
  const auto w = s.warmup_steps;
  if (t <= w) return static_cast<double>(t) / static_cast<double>(w);
  const auto progress = [&](std::int64_t from, std::int64_t to) {
    if (to <= from) return 1.0;
    return std::clamp(static_cast<double>(t - from) / static_cast<double>(to - from), 0.0, 1.0);
  };
  if (s.kind == "cosine") {
    const double p = progress(w, s.decay_steps > 0 ? s.decay_steps : total_steps);
    return s.final + (1 - s.final) * 0.5 * (1 + std::cos(std::numbers::pi * p));
  }
  if (s.kind == "wsd") {
    const std::int64_t from = std::max(w, total_steps - s.decay_steps);
    if (t <= from) return 1;
    return 1 - (1 - s.final) * progress(from, total_steps);
  }
  return 1;
}

}  // namespace orthrus::optim
