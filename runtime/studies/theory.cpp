#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <orthrus/error.hpp>
#include <orthrus/studies/theory.hpp>

#include "runtime/studies/minimize.hpp"

namespace orthrus::studies {
namespace {

void check_momentum(double beta) {
  expects<ConfigError>(beta >= 0 && beta < 1, "momentum lies in [0, 1)");
}
void check_positive(double x, const char* what) { expects<ConfigError>(x > 0, what); }

void check(const Assumptions& a) {
  check_momentum(a.momentum);
  expects<ConfigError>(a.weight_decay >= 0 && a.smoothness >= 0 && a.noise >= 0 && a.gap >= 0 &&
                           a.gradient_norm >= 0 && a.momentum_error >= 0,
                       "no constant of a bound is negative");
  check_positive(a.distortion, "distortion is positive");
}

/// √D·σ
double dual_noise(const Assumptions& a) { return std::sqrt(a.distortion) * a.noise; }

}  // namespace

double momentum_noise(double momentum) {
  check_momentum(momentum);
  return momentum * std::sqrt((1 - momentum) / (1 + momentum)) + (1 - momentum);
}

double momentum_variance(double momentum) {
  check_momentum(momentum);
  const double first = (1 - momentum) * (1 + momentum);
  return first * first + std::pow(momentum, 4) * (1 - momentum) / (1 + momentum);
}

double effective_batch(double batch, double momentum) {
  return batch / momentum_variance(momentum);
}

double StepsBatchLaw::level(double steps, double batch) const {
  return floor + steps_factor / std::pow(steps, steps_exponent) +
         batch_factor / std::pow(batch, batch_exponent);
}

double StepsBatchLaw::steps_to(double target, double batch) const {
  const double left = target - floor - batch_factor / std::pow(batch, batch_exponent);
  if (!(left > 0)) return std::numeric_limits<double>::infinity();
  return std::pow(steps_factor / left, 1 / steps_exponent);
}

double StepsBatchLaw::token_optimal_batch(double target) const {
  expects<ConfigError>(target > floor, "no batch reaches a target at or below the floor");
  return std::pow(batch_factor * (1 + batch_exponent / steps_exponent) / (target - floor),
                  1 / batch_exponent);
}

StepsBatchLaw form_a(const Assumptions& a, double lr, double floor) {
  check(a);
  check_positive(lr, "lr is positive");
  const double beta = a.momentum, inverse = 1 / (a.distortion * a.distortion);
  const double x = a.gap / lr + 2 * std::numbers::sqrt2 * beta / (1 - beta) * a.gradient_norm +
                   beta * inverse / (1 - beta) * a.gradient_norm * a.gradient_norm;
  const double y = 0.5 * ((2 * beta + inverse) * (1 - beta) + a.weight_decay) * a.noise * a.noise;
  return {floor, x, 1, y, 1};
}

StepsBatchLaw form_b(const Assumptions& a, double lr, double rho) {
  check(a);
  check_positive(lr, "lr is positive");
  expects<ConfigError>(rho >= 0 && rho < 1, "rho lies in [0, 1)");
  const double beta = a.momentum, k = (3 - rho) / (1 - rho);
  const double x = a.gap / (lr * (1 - rho)) + k * 2 * beta / (1 - beta) * a.gradient_norm;
  const double y = k * (beta * std::sqrt(2 * (1 - beta) / (1 + beta)) + (1 - beta)) * dual_noise(a);
  const double z = (k * 4 * beta * beta / (1 - beta) + 2 / (1 - rho)) * a.smoothness * lr;
  return {z, x, 1, y, 0.5};
}

FrankWolfeGap::FrankWolfeGap(const Assumptions& a) : a_(a) {
  check(a);
  check_positive(a.weight_decay, "this bound needs weight decay");
  const double beta = a.momentum;
  batch_term = 2 * momentum_noise(beta) / a.weight_decay * dual_noise(a);
  lr_term = 2 * a.smoothness / a.weight_decay * (1 + 2 * beta * beta / (1 - beta));
}

double FrankWolfeGap::bound(double steps, double batch, double lr) const {
  const double beta = a_.momentum, lambda = a_.weight_decay;
  return a_.gap / (lambda * lr * steps) +
         2 * beta * a_.momentum_error / ((1 - beta) * lambda * steps) +
         batch_term / std::sqrt(batch) + lr_term * lr;
}

StarConvex::StarConvex(const Assumptions& a, double frank_wolfe_constant)
    : a_(a), contraction_(frank_wolfe_constant * a.weight_decay) {
  check(a);
  check_positive(a.weight_decay, "this bound needs weight decay");
  check_positive(frank_wolfe_constant, "the Frank-Wolfe constant is positive");
  const double beta = a.momentum;
  batch_term = 2 * momentum_noise(beta) / contraction_ * dual_noise(a);
  lr_term = 4 * a.smoothness / contraction_ * (1 + beta * beta / (1 - beta)) +
            2 * beta / (1 - beta) * a.momentum_error;
}

double StarConvex::bound(double steps, double batch, double lr) const {
  const double shrink = contraction_ * lr;
  expects<ConfigError>(shrink <= 1, "the bound holds for lr * weight_decay up to 1");
  // log1p: λη is far below the resolution of 1 − λη where T is large.
  const double left = shrink < 1 ? std::exp(steps * std::log1p(-shrink)) : 0;
  return left * a_.gap + batch_term / std::sqrt(batch) + lr_term * lr;
}

double StarConvex::best_lr(double steps) const {
  check_positive(steps - 1, "the best lr needs more than one step");
  const double ratio = lr_term / (contraction_ * steps * a_.gap);
  if (!(ratio < 1)) return 0;
  return -std::expm1(std::log(ratio) / (steps - 1)) / contraction_;
}

BatchAndLr best_batch(const Assumptions& a, const FrankWolfeGap& bound, double examples) {
  check_positive(examples, "examples is positive");
  check_positive(a.gap, "the gap is positive");
  check_positive(bound.lr_term, "the smoothness is positive");
  const double share = a.gap / (a.weight_decay * bound.lr_term * examples);  // η*² = share·b
  const auto at = [&](double batch) {
    return bound.bound(examples / batch, batch, std::sqrt(share * batch));
  };
  double batch =
      bound.batch_term / 2 * std::sqrt(a.weight_decay * examples / (a.gap * bound.lr_term));
  if (a.momentum_error > 0) {
    // One more term that grows with b: the least is further down.
    batch = std::exp(golden_section([&](double x) { return at(std::exp(x)); }, std::log(batch) - 40,
                                    std::log(batch)));
  }
  return {batch, std::sqrt(share * batch), at(batch)};
}

BatchAndLr best_batch(const StarConvex& bound, double examples) {
  expects<ConfigError>(examples > 2, "examples is more than 2");
  const auto at = [&](double log_batch) {
    const double batch = std::exp(log_batch), steps = examples / batch;
    return bound.bound(steps, batch, bound.best_lr(steps));
  };
  // Where η* reaches 0 the bound has a shelf that falls for ever: the valley is left of it. A
  // coarse walk finds it, as golden sections know no shelf.
  const double last = std::log(examples / 2);
  double best = 0, least = at(0);
  constexpr int points = 2000;
  for (int i = 1; i <= points; ++i) {
    const double x = last * i / points;
    if (const double y = at(x); y < least) {
      least = y;
      best = x;
    }
  }
  const double width = last / points;
  const double x = golden_section(at, std::max(0.0, best - width), std::min(last, best + width));
  const double batch = std::exp(x);
  return {batch, bound.best_lr(examples / batch), at(x)};
}

double critical_weight_decay(const Assumptions& a, double steps) {
  check(a);
  check_positive(steps, "steps is positive");
  check_positive(a.gap, "the gap is positive");
  const double beta = a.momentum;
  const double square = a.gap * steps, linear = 2 * beta / (1 - beta) * a.momentum_error;
  const double constant = 4 * a.smoothness * (1 + beta * beta / (1 - beta));
  return (linear + std::sqrt(linear * linear + 4 * square * constant)) / (2 * square);
}

double scaled_lr(LrRule rule, double base_lr, double base_batch, double batch, double noise_scale) {
  check_positive(base_batch, "batches are positive");
  check_positive(batch, "batches are positive");
  const double ratio = batch / base_batch;
  switch (rule) {
    case LrRule::constant:
      return base_lr;
    case LrRule::sqrt:
      return base_lr * std::sqrt(ratio);
    case LrRule::linear:
      return base_lr * ratio;
    case LrRule::surge: {
      check_positive(noise_scale, "the surge rule needs a noise scale");
      const auto below = [&](double b) {
        return std::sqrt(noise_scale / b) + std::sqrt(b / noise_scale);
      };
      return base_lr * below(base_batch) / below(batch);
    }
  }
  return base_lr;
}

double optimal_step(double largest, double noise_scale, double batch) {
  check_positive(batch, "batches are positive");
  return largest / (1 + noise_scale / batch);
}

double scaled_momentum(double momentum, double base_batch, double batch) {
  check_momentum(momentum);
  check_positive(base_batch, "batches are positive");
  return std::pow(momentum, batch / base_batch);
}

double scaled_weight_decay(double weight_decay, double base_lr, double base_batch, double lr,
                           double batch) {
  check_positive(base_batch, "batches are positive");
  check_positive(lr, "lr is positive");
  return weight_decay * (batch / base_batch) * (base_lr / lr);
}

}  // namespace orthrus::studies
