// `diagnostics.advisor: auto`: which of a matrix's steps are spectral, polar(M), and which
// Euclidean, f·M. It changes when a checkpoint is saved, and only then: who loads it goes on as who
// saved it.
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

bool ShardedOptimizer::Impl::may_choose(const runtime::Probed& p) const {
  return config_.diagnostics.advisor == "auto" && p.matrix >= 0 &&
         plan_.group(p.parameter).is_spectral_descent();
}

double ShardedOptimizer::Impl::euclidean_of(const runtime::MatrixPlan& m) const {
  return euclidean_[static_cast<std::size_t>(&m - plan_.matrices.data())];
}

/// In the units of what Gram modes and the grid work on, 2^-e·X.
double ShardedOptimizer::Impl::scaled_euclidean_of(const runtime::MatrixPlan& m) const {
  return std::ldexp(euclidean_of(m), gram_exponent(m));
}

/// What looks until now say, per matrix of the plan: rank 0's word, though all have the same
/// numbers.
std::vector<double> ShardedOptimizer::Impl::choose_geometry() {
  std::vector<double> chosen = euclidean_;
  if (config_.diagnostics.advisor != "auto") return chosen;
  for (std::size_t i = 0; i < plan_.probed.size(); ++i) {
    const runtime::Probed& p = plan_.probed[i];
    if (!may_choose(p)) continue;
    double& factor = chosen[static_cast<std::size_t>(p.matrix)];
    const Advice advice = looking_.advisors[i].advice();
    if (advice == Advice::spectral) factor = 0;
    if (advice != Advice::euclidean || factor > 0) continue;
    const studies::Spectrum& m = looking_.results[i].momentum;
    const double ratio = m.nuclear_norm / (m.frobenius_norm * m.frobenius_norm);
    if (std::isfinite(ratio)) factor = ratio;  // of a zero momentum nothing is known
  }
  const TrafficScope scope(setup_, TrafficClass::setup);
  setup_.broadcast(Span{chosen.data(), std::ssize(chosen), DType::f64}, 0);
  return chosen;
}

void ShardedOptimizer::Impl::save_geometry(runtime::Manifest& m,
                                           const std::vector<double>& chosen) const {
  for (std::size_t i = 0; i < plan_.probed.size(); ++i) {
    const runtime::Probed& p = plan_.probed[i];
    if (!may_choose(p)) continue;
    m.geometry[p.name] = {chosen[static_cast<std::size_t>(p.matrix)], looking_.advisors[i].state()};
  }
}

/// The checkpoint is written: steps from now on are what it says.
void ShardedOptimizer::Impl::adopt_geometry(const std::vector<double>& chosen) {
  if (config_.diagnostics.advisor != "auto") return;
  for (std::size_t i = 0; i < plan_.probed.size(); ++i) {
    const runtime::Probed& p = plan_.probed[i];
    if (!may_choose(p)) continue;
    const double before = euclidean_[static_cast<std::size_t>(p.matrix)];
    const double now = chosen[static_cast<std::size_t>(p.matrix)];
    if ((before > 0) == (now > 0)) continue;
    note_advice(i, now > 0 ? "steps are Euclidean from now on, " + three_digits(now) + "·momentum"
                           : "steps are spectral again");
  }
  euclidean_ = chosen;
  look_anew();
}

void ShardedOptimizer::Impl::load_geometry(const runtime::Manifest& m) {
  std::fill(euclidean_.begin(), euclidean_.end(), 0.0);
  for (MatrixSpectra& result : looking_.results) result.step = 0;
  for (auto& advisor : looking_.advisors) advisor = {};
  for (std::size_t i = 0; i < plan_.probed.size(); ++i) {
    const runtime::Probed& p = plan_.probed[i];
    const auto it = m.geometry.find(p.name);
    if (!may_choose(p) || it == m.geometry.end()) continue;
    euclidean_[static_cast<std::size_t>(p.matrix)] = it->second.euclidean;
    looking_.advisors[i].restore(it->second.advisor);
  }
  look_anew();
}

/// As after a checkpoint is loaded: the next step that may look does, at activations with a vector
/// of its own.
void ShardedOptimizer::Impl::look_anew() {
  looking_.next = 0;
  for (auto& activation : looking_.activations) activation.vector.clear();
  looking_.since = runtime::Clock::now();
  looking_.since_step = steps_;
  looking_.observing_ms = 0;
}

/// For the next report.
void ShardedOptimizer::Impl::note_advice(std::size_t probed, const std::string& what) {
  if (!notice_.empty()) notice_ += "; ";
  notice_ += "matrix '" + plan_.probed[probed].name + "': " + what +
             " (nuclear rank of the gradient / stable rank of what it multiplies: " +
             three_digits(looking_.advisors[probed].average_ratio()) + ")";
}

}  // namespace orthrus
