// `diagnostics.advisor: auto`: which of a matrix's steps are spectral, polar(M), and which
// Euclidean, f·M. It is decided every `train.save_every` steps, where a checkpoint is due, and at
// no other time: whether one is written then, or between, changes nothing.
#include <array>
#include <cmath>
#include <cstdio>
#include <orthrus/error.hpp>

#include "runtime/checkpoint.hpp"
#include "runtime/engine.hpp"

namespace orthrus {

using Advice = studies::GeometryAdvisor::Advice;

namespace {

std::string three_digits(double x) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.3g", x);
  return text.data();
}

}  // namespace

bool ShardedOptimizer::Impl::chooses_in(std::int64_t step) const {
  const std::int64_t every = config_.train.save_every;
  return config_.diagnostics.advisor == "auto" && every > 0 && step % every == 0;
}

double ShardedOptimizer::Impl::euclidean_of(const runtime::MatrixPlan& m) const {
  return euclidean_[static_cast<std::size_t>(&m - plan_.matrices.data())];
}

/// In the units of what Gram modes and the grid work on, 2^-e·X.
double ShardedOptimizer::Impl::scaled_euclidean_of(const runtime::MatrixPlan& m) const {
  return std::ldexp(euclidean_of(m), gram_exponent(m));
}

/// What looks until now, this step's the last, say of steps from now on: rank 0's word, though all
/// have the same numbers.
void ShardedOptimizer::Impl::choose_geometry() {
  if (!looking_.now || !chooses_in(steps_)) return;
  std::vector<double> chosen = euclidean_;
  for (std::size_t i = 0; i < plan_.probed.size(); ++i) {
    const runtime::Probed& p = plan_.probed[i];
    if (p.matrix < 0 || !plan_.group(p.parameter).is_spectral_descent()) continue;
    double& factor = chosen[static_cast<std::size_t>(p.matrix)];
    const Advice advice = looking_.advisors[i].advice();
    if (advice == Advice::spectral) factor = 0;
    if (advice != Advice::euclidean || factor > 0) continue;
    const studies::Spectrum& m = looking_.results[i].momentum;
    const double ratio = m.nuclear_norm / (m.frobenius_norm * m.frobenius_norm);
    if (std::isfinite(ratio)) factor = ratio;  // of a zero momentum nothing is known
  }
  {
    const TrafficScope scope(all_ranks(), TrafficClass::setup);
    all_ranks().broadcast(Span{chosen.data(), std::ssize(chosen), DType::f64}, 0);
  }
  for (const runtime::Probed& p : plan_.probed) {
    if (p.matrix < 0) continue;
    const auto m = static_cast<std::size_t>(p.matrix);
    if ((euclidean_[m] > 0) == (chosen[m] > 0)) continue;
    add_notice("matrix '" + p.name + "': " +
               (chosen[m] > 0
                    ? "steps are Euclidean from now on, " + three_digits(chosen[m]) + "·momentum"
                    : "steps are spectral again"));
  }
  euclidean_ = std::move(chosen);
}

/// For the next report.
void ShardedOptimizer::Impl::add_notice(const std::string& what) {
  if (!notice_.empty()) notice_ += "; ";
  notice_ += what;
}

/// A matrix's probe has changed the advice of its advisor.
void ShardedOptimizer::Impl::note_advice(std::size_t probed, Advice advice) {
  if (config_.diagnostics.advisor == "report") return;
  add_notice("matrix '" + plan_.probed[probed].name +
             "': " + (advice == Advice::spectral ? "spectral" : "Euclidean") +
             " steps promise more (nuclear rank of the gradient / stable rank of what it "
             "multiplies: " +
             three_digits(looking_.advisors[probed].average_ratio()) + ")");
}

void ShardedOptimizer::Impl::save_geometry(runtime::Manifest& m) const {
  const bool chooses = config_.diagnostics.advisor == "auto";
  for (std::size_t i = 0; i < plan_.probed.size(); ++i) {
    const runtime::Probed& p = plan_.probed[i];
    const auto& advisor = looking_.advisors[i].state();
    if (!chooses && advisor.weight == 0) continue;
    m.geometry[p.name] = {p.matrix < 0 ? 0 : euclidean_[static_cast<std::size_t>(p.matrix)],
                          advisor};
  }
  if (!chooses) return;
  // What decides must be what it was, to the bit.
  m.next_look = looking_.next;
  for (std::size_t i = 0; i < looking_.activations.size(); ++i) {
    const std::vector<float>& vector = looking_.activations[i].vector;
    if (!vector.empty()) m.activations[plan_.parameters[i].name] = vector;
  }
}

void ShardedOptimizer::Impl::load_geometry(const runtime::Manifest& m) {
  const bool chooses = config_.diagnostics.advisor == "auto";
  std::fill(euclidean_.begin(), euclidean_.end(), 0.0);
  for (std::size_t i = 0; i < plan_.probed.size(); ++i) {
    const runtime::Probed& p = plan_.probed[i];
    looking_.results[i] = {};
    looking_.results[i].name = p.name;
    looking_.results[i].parameter = p.parameter;
    looking_.advisors[i] = {};
    const auto it = m.geometry.find(p.name);
    if (it == m.geometry.end()) continue;
    looking_.advisors[i].restore(it->second.advisor);
    if (!chooses || p.matrix < 0 || !plan_.group(p.parameter).is_spectral_descent()) continue;
    euclidean_[static_cast<std::size_t>(p.matrix)] = it->second.euclidean;
  }
  looking_.next = chooses ? m.next_look : 0;
  for (std::size_t i = 0; i < looking_.activations.size(); ++i) {
    auto& of = looking_.activations[i];
    of.vector.clear();
    const auto it = m.activations.find(plan_.parameters[i].name);
    if (chooses && it != m.activations.end() && it->second.size() == of.sum.size()) {
      of.vector = it->second;
    }
  }
  looking_.since = runtime::Clock::now();
  looking_.since_step = steps_;
  looking_.observing_ms = 0;
}

}  // namespace orthrus
