#include "runtime/cli/gns_ramp.hpp"

#include <fmt/format.h>

#include <cmath>
#include <orthrus/error.hpp>
#include <span>
#include <sstream>

namespace orthrus::cli {
namespace {

/// The runs of units that a batch is cut into whatever its size.
std::int64_t parts_of(const Training& training) {
  const Config& config = training.config();
  return config.virtual_shards > 0 ? config.virtual_shards : training.size();
}

studies::BatchRamp::Options options_of(const Training& training) {
  const Config& config = training.config();
  const GnsRampConfig& ramp = config.gns_ramp;
  const std::int64_t micro = config.virtual_shards > 0 ? 1 : config.train.micro_batches;
  const auto refuse = [&](const std::string& what) {
    throw ConfigError((config.source.empty() ? "" : config.source + ": ") +
                      "gns_ramp.geometry: " + ramp.geometry + what);
  };
  if (ramp.geometry == "l2" && config.diagnostics.gns_source == "gradients" &&
      parts_of(training) * micro < 2)
    refuse(": noise shows between ranks and micro-batches, and here is one of each");
  if (ramp.geometry != "l2" && training.size() < 2)
    refuse(" is measured between ranks, and here is one");
  studies::BatchRamp::Options o;
  o.ranks = parts_of(training);
  o.micro_batches = micro;
  o.most_local = ramp.max_local > 0 ? ramp.max_local
                 : micro > 1        ? config.train.batch / (o.ranks * micro)
                                    : 0;
  if (ramp.max_batch > 0) o.most = ramp.max_batch;
  o.factor = ramp.factor;
  o.decay = ramp.decay;
  o.every = ramp.every_steps;
  o.warmup_steps = ramp.warmup_steps;
  o.price.step = ramp.price_step;
  o.price.example = ramp.price_example;
  o.price.second = ramp.price_second;
  return o;
}

}  // namespace

GnsRamp::GnsRamp(const Training& training)
    : config_(training.config().gns_ramp),
      ramp_(training.config().train.batch, options_of(training)) {}

/// Sums over tensors are squared where the norm of the model is their sum.
void GnsRamp::measure(const Training::Step& step, const Training& training) {
  const StepReport& report = step.report;
  const GradientNoise& noise = report.model_noise;
  if (report.skipped) return;
  if (config_.geometry == "l2") {
    if (noise.step == report.step) ramp_.add(noise.trace(), noise.signal());
    return;
  }
  double deviation = 0, mean = 0;
  if (config_.geometry == "l1" && noise.step == report.step) {
    deviation = noise.absolute_deviation;
    mean = noise.absolute_mean;
  } else if (config_.geometry == "nuc") {
    for (const MatrixSpectra& m : training.optimizer().spectra()) {
      if (m.step != report.step || m.nuclear_noise == 0) continue;
      deviation += m.nuclear_noise;
      mean += m.gradient.nuclear_norm;
    }
  }
  if (mean > 0 && std::isfinite(deviation) && std::isfinite(mean))
    ramp_.add(deviation * deviation, mean * mean);
}

/// As the first rank saw them, so that all decide alike.
void GnsRamp::tell_seconds(Training& training) {
  double seconds[] = {step_seconds_ / timed_,
                      gradient_seconds_ / (timed_ * static_cast<double>(training.batch()))};
  training.control().broadcast(std::span<double>(seconds), 0);
  ramp_.set_seconds(seconds[0], seconds[1]);
  timed_ = step_seconds_ = gradient_seconds_ = 0;
}

std::optional<GnsRamp::Decision> GnsRamp::after(const Training::Step& step, Training& training) {
  measure(step, training);
  ++timed_;
  step_seconds_ += (step.step_ms - step.gradient_ms) / 1e3;
  gradient_seconds_ += step.gradient_ms / 1e3;
  const std::int64_t at = training.steps();
  if (config_.price_second > 0 && at % config_.every_steps == 0) tell_seconds(training);
  const Decision& next = ramp_.decide(at);
  return next.changed ? std::optional<Decision>(next) : std::nullopt;
}

void GnsRamp::write_to(std::map<std::string, std::string>& user) const {
  const studies::BatchRamp::State state = ramp_.state();
  user["gns_ramp"] =
      fmt::format("{} {} {} {} {} {} {}", state.noise, state.signal, state.weight, state.now.batch,
                  state.now.local, state.now.micro_batches, state.now.lr_multiplier);
}

bool GnsRamp::read_from(const std::map<std::string, std::string>& user) {
  const auto found = user.find("gns_ramp");
  if (found == user.end()) return false;
  studies::BatchRamp::State state;
  std::istringstream in(found->second);
  in >> state.noise >> state.signal >> state.weight >> state.now.batch >> state.now.local >>
      state.now.micro_batches >> state.now.lr_multiplier;
  if (!in) throw DataError("gns_ramp of the checkpoint: '" + found->second + "' is not its state");
  ramp_.restore(state);
  return true;
}

}  // namespace orthrus::cli
