// Gradient noise: from two sums per parameter that ride on a step's first all-reduce.
#include <algorithm>
#include <cmath>
#include <orthrus/error.hpp>

#include "runtime/checkpoint.hpp"
#include "runtime/engine.hpp"

namespace orthrus {

bool ShardedOptimizer::Impl::is_noise_step(std::int64_t step) const {
  return plan_.noise_slots > 0 && step % config_.diagnostics.every_steps == 0;
}

/// Of gradients that become ready from now on, which are those of step `step`.
void ShardedOptimizer::Impl::measure_noise_of(std::int64_t step) {
  if (plan_.noise_slots == 0 || plan_.noise_of_examples) return;
  if (gradients_->idle()) std::fill(local_squares_.begin(), local_squares_.end(), 0.0);
  gradients_->measure(is_noise_step(step) ? std::span(local_squares_) : std::span<double>());
}

const GradientNoise& ShardedOptimizer::Impl::noise(int id) const {
  expects<ConfigError>(id >= 0 && static_cast<std::size_t>(id) < noise_.size(),
                       "noise(id): the position of a parameter in the list");
  return noise_[static_cast<std::size_t>(id)];
}

void ShardedOptimizer::Impl::observe_examples(int id, ConstMatrixView gradients) {
  const auto i = static_cast<std::size_t>(id);
  expects<ConfigError>(id >= 0 && i < plan_.parameters.size(),
                       "observe_examples(id): the position of a parameter in the list");
  const runtime::ParameterShape& p = plan_.parameters[i];
  if (gradients.cols != p.size() || gradients.dtype != DType::f32) {
    throw ShapeError("observe_examples: '" + p.name + "' has " + std::to_string(p.size()) +
                     " elements; given were rows of " + std::to_string(gradients.cols) + " " +
                     std::string(name_of(gradients.dtype)) + ", f32 is expected");
  }
  if (!wants_examples()) return;
  const auto* const data = static_cast<const float*>(gradients.data);
  for (Index r = 0; r < gradients.rows; ++r) {
    for (Index c = 0; c < gradients.cols; ++c) {
      const double x = data[r * gradients.ld + c];
      example_squares_[i] += x * x;
    }
  }
  example_counts_[i] += static_cast<double>(gradients.rows);
}

/// What this rank has to add for each parameter, but for the mean.
void ShardedOptimizer::Impl::put_squares(double* sums) {
  const auto slots = static_cast<std::size_t>(plan_.noise_sums());
  for (std::size_t i = 0; i < plan_.parameters.size(); ++i) {
    sums[slots * i] = plan_.noise_of_examples ? example_squares_[i] : local_squares_[i];
    if (plan_.noise_of_examples) sums[slots * i + 2] = example_counts_[i];
  }
  std::fill(example_squares_.begin(), example_squares_.end(), 0.0);
  std::fill(example_counts_.begin(), example_counts_.end(), 0.0);
}

/// Why the noise between examples cannot be told; empty: it can. The same on all ranks.
std::string ShardedOptimizer::Impl::uneven_examples(const double* sums) const {
  std::size_t first = plan_.parameters.size();
  for (std::size_t i = 0; plan_.noise_of_examples && i < plan_.parameters.size(); ++i) {
    if (sums[3 * i + 2] == 0) continue;
    if (first == plan_.parameters.size()) first = i;
    if (sums[3 * i + 2] == sums[3 * first + 2]) continue;
    const auto count = [&](std::size_t k) { return std::to_string(std::llround(sums[3 * k + 2])); };
    return "observe_examples: step " + std::to_string(steps_) + " has " + count(first) +
           " gradients of '" + plan_.parameters[first].name + "' and " + count(i) + " of '" +
           plan_.parameters[i].name + "'; every example is expected, of either";
  }
  return {};
}

/// @param sums  of all ranks, for each parameter: its contributions squared, and their mean; of
/// examples also their number.
void ShardedOptimizer::Impl::take_noise(const double* sums) {
  constexpr double kept = 0.9;
  const bool of_examples = plan_.noise_of_examples;
  const auto slots = static_cast<std::size_t>(plan_.noise_sums());
  std::int64_t n = of_examples ? 0 : plan_.contributions();
  const auto measured = [&](GradientNoise& noise, double mean_squared, double squared_mean) {
    noise.step = steps_;
    noise.contributions = n;
    noise.examples = of_examples ? 1 : examples_each();
    noise.mean_squared = mean_squared;
    noise.squared_mean = squared_mean;
    noise.absolute_deviation = noise.absolute_mean = 0;  // unless they are looked at in this step
    const double before = kept * noise.weight;
    noise.weight = before + 1;
    noise.weight_squares = kept * kept * noise.weight_squares + 1;
    const auto average = [&](double& trend, double x) {
      trend = (before * trend + x) / noise.weight;
    };
    average(noise.trace_trend, noise.trace());
    average(noise.signal_trend, noise.signal());
    average(noise.signal_squares, noise.signal() * noise.signal());
  };
  // Sums of both over parameters are sums over all their elements.
  std::fill(group_sums_.begin(), group_sums_.end(), NoiseSums{});
  NoiseSums model;
  for (std::size_t i = 0; i < noise_.size(); ++i) {
    const runtime::ParameterShape& p = plan_.parameters[i];
    const auto elements = static_cast<double>(p.size());
    NoiseSums& group = group_sums_[static_cast<std::size_t>(plan_.group_of[i])];
    group.all += elements;
    model.all += elements;
    if (p.gradient_state != GradientState::local) continue;
    if (of_examples) {
      const auto given = std::llround(sums[slots * i + 2]);
      if (given < 2) continue;  // none of this parameter
      n = given;
    }
    const double q = sums[slots * i] / static_cast<double>(n), r = sums[slots * i + 1];
    measured(noise_[i], q, r);
    for (NoiseSums* const total : {&group, &model}) {
      total->q += q;
      total->r += r;
      total->measured += elements;
    }
  }
  const auto sum_up = [&](GradientNoise& noise, const NoiseSums& s) {
    if (s.measured == 0) return;
    noise.share = s.measured / s.all;
    measured(noise, s.q, s.r);
  };
  for (std::size_t g = 0; g < group_sums_.size(); ++g) sum_up(report_.noise[g], group_sums_[g]);
  sum_up(report_.model_noise, model);
}

namespace {

runtime::Manifest::NoiseTrend trend_of(const GradientNoise& noise) {
  return {noise.trace_trend, noise.signal_trend, noise.signal_squares, noise.weight,
          noise.weight_squares};
}
void set_trend(GradientNoise& noise, const runtime::Manifest::NoiseTrend& trend) {
  noise.trace_trend = trend[0];
  noise.signal_trend = trend[1];
  noise.signal_squares = trend[2];
  noise.weight = trend[3];
  noise.weight_squares = trend[4];
}

}  // namespace

void ShardedOptimizer::Impl::save_noise(runtime::Manifest& m) const {
  if (plan_.noise_slots == 0) return;
  for (std::size_t i = 0; i < noise_.size(); ++i) {
    m.parameter_noise[plan_.parameters[i].name] = trend_of(noise_[i]);
  }
  for (const GradientNoise& noise : report_.noise) m.group_noise.push_back(trend_of(noise));
  m.model_noise = trend_of(report_.model_noise);
}

/// Averages go on, on another number of ranks too: both of them are of one example. Those of groups
/// only where there are as many.
void ShardedOptimizer::Impl::load_noise(const runtime::Manifest& m) {
  std::fill(noise_.begin(), noise_.end(), GradientNoise{});
  std::fill(report_.noise.begin(), report_.noise.end(), GradientNoise{});
  report_.model_noise = {};
  if (plan_.noise_slots == 0 || m.parameter_noise.empty()) return;
  for (std::size_t i = 0; i < noise_.size(); ++i) {
    const auto it = m.parameter_noise.find(plan_.parameters[i].name);
    const bool local = plan_.parameters[i].gradient_state == GradientState::local;
    if (it != m.parameter_noise.end() && local) set_trend(noise_[i], it->second);
  }
  for (std::size_t g = 0; g < report_.noise.size(); ++g) {
    if (m.group_noise.size() == report_.noise.size()) set_trend(report_.noise[g], m.group_noise[g]);
  }
  set_trend(report_.model_noise, m.model_noise);
}

}  // namespace orthrus
