#include <algorithm>
#include <cmath>
#include <limits>
#include <orthrus/error.hpp>
#include <orthrus/studies/ramp.hpp>
#include <sstream>
#include <string>

namespace orthrus::studies {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::string text_of(double x) {
  std::ostringstream out;
  out << x;
  return out.str();
}

}  // namespace

BatchRamp::BatchRamp(std::int64_t batch, const Options& options)
    : options_(options), first_(batch) {
  expects<ConfigError>(options.ranks > 0, "ranks is positive");
  expects<ConfigError>(options.micro_batches > 0, "micro_batches is positive");
  expects<ConfigError>(batch > 0 && batch % (options.ranks * options.micro_batches) == 0,
                       "batch is a positive multiple of ranks and micro_batches");
  expects<ConfigError>(options.most >= batch, "most is no less than the first batch");
  expects<ConfigError>(options.most_local >= 0, "most_local is not negative");
  expects<ConfigError>(options.factor > 0, "factor is positive");
  expects<ConfigError>(options.decay >= 0 && options.decay < 1, "decay lies in [0, 1)");
  expects<ConfigError>(options.every > 0, "every is positive");
  const BatchPrice& p = options.price;
  expects<ConfigError>(p.step >= 0 && p.example >= 0 && p.second >= 0 && p.step_seconds >= 0 &&
                           p.example_seconds >= 0,
                       "prices and seconds are not negative");
  expects<ConfigError>(!p.given() || p.second > 0 || (p.step > 0 && p.example > 0),
                       "a price needs the cost of a step and of an example: without either the "
                       "best batch is the smallest or the largest");
  now_ = {.batch = batch,
          .local = batch / (options.ranks * options.micro_batches),
          .micro_batches = options.micro_batches};
}

void BatchRamp::add(double noise, double signal) {
  expects<NumericError>(std::isfinite(noise) && std::isfinite(signal),
                        "noise and signal are finite");
  noise_ = options_.decay * noise_ + (1 - options_.decay) * noise;
  signal_ = options_.decay * signal_ + (1 - options_.decay) * signal;
  weight_ = options_.decay * weight_ + (1 - options_.decay);
}

void BatchRamp::set_seconds(double of_step, double of_example) {
  expects<ConfigError>(of_step >= 0 && of_example >= 0, "seconds are not negative");
  options_.price.step_seconds = of_step;
  options_.price.example_seconds = of_example;
}

void BatchRamp::restore(const State& state) {
  noise_ = state.noise;
  signal_ = state.signal;
  weight_ = state.weight;
  now_ = state.now;
  if (now_.batch == options_.ranks * now_.local * now_.micro_batches) return;
  // On another number of ranks.
  const double lr_multiplier = now_.lr_multiplier;
  now_ = divided(static_cast<double>(now_.batch));
  now_.lr_multiplier = lr_multiplier;
}

double BatchRamp::noise_scale() const {
  if (weight_ == 0) return 0;
  return signal_ > 0 ? std::max(noise_, 0.0) / signal_ : std::numeric_limits<double>::infinity();
}

double BatchRamp::wanted() const {
  const BatchPrice& p = options_.price;
  if (!p.given()) return options_.factor * noise_scale();
  const double of_step = p.step + p.second * p.step_seconds,
               of_example = p.example + p.second * p.example_seconds;
  if (of_step <= 0 || of_example <= 0) return 0;  // seconds that are not known
  return std::sqrt(noise_scale() * of_step / of_example);
}

std::string BatchRamp::objective() const {
  const BatchPrice& p = options_.price;
  if (!p.given()) return "none: " + text_of(options_.factor) + " of the noise scale";
  std::string words;
  const auto add = [&](double price, const char* unit) {
    if (price > 0) words += (words.empty() ? "" : " + ") + text_of(price) + " per " + unit;
  };
  add(p.step, "step");
  add(p.example, "example");
  add(p.second, "second");
  return words;
}

/// At least `batch` examples, unless that is more than `most`, of ranks that all have as many: the
/// local batch grows first, then the number of micro-batches.
BatchRamp::Decision BatchRamp::divided(double batch) const {
  const auto whole =
      static_cast<std::int64_t>(std::ceil(std::min(batch, static_cast<double>(options_.most))));
  const std::int64_t each = ceil_div(whole, options_.ranks);
  Decision d;
  d.micro_batches = options_.micro_batches;
  if (options_.most_local > 0)
    d.micro_batches = std::max(d.micro_batches, ceil_div(each, options_.most_local));
  const std::int64_t groups = options_.ranks * d.micro_batches;
  d.local =
      std::max<std::int64_t>(1, std::min(ceil_div(each, d.micro_batches), options_.most / groups));
  d.batch = options_.ranks * d.local * d.micro_batches;
  d.lr_multiplier = std::sqrt(static_cast<double>(d.batch) / static_cast<double>(first_));
  return d;
}

const BatchRamp::Decision& BatchRamp::decide(std::int64_t step) {
  now_.changed = false;
  if (step < options_.warmup_steps || step % options_.every != 0) return now_;
  const double batch = wanted();
  if (!std::isfinite(batch) || batch <= static_cast<double>(now_.batch)) return now_;
  const Decision next = divided(batch);
  if (next.batch <= now_.batch) return now_;
  now_ = next;
  now_.changed = true;
  return now_;
}

}  // namespace orthrus::studies
