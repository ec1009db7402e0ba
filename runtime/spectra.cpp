// `diagnostics.spectra`: every matrix is looked at whole, before and after a step; all ranks get
// the numbers.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <orthrus/error.hpp>
#include <orthrus/studies/noise.hpp>

#include "kernels/bf16.hpp"
#include "kernels/device_memory.hpp"
#include "runtime/engine.hpp"
#include "runtime/region.hpp"

namespace orthrus {

using runtime::Clock;
using runtime::ms_since;
using runtime::Probe;
using runtime::ProbeTable;
using Advice = studies::GeometryAdvisor::Advice;

namespace {

studies::Spectrum MatrixSpectra::*spectrum_of(Probe what) {
  switch (what) {
    case Probe::gradient:
      return &MatrixSpectra::gradient;
    case Probe::momentum:
      return &MatrixSpectra::momentum;
    case Probe::weights:
      return &MatrixSpectra::weights;
    case Probe::update:
      return &MatrixSpectra::update;
  }
  return nullptr;
}

/// As they travel. @param f  of a number and the rank's copy of it
template <class S, class F>
void for_each_number(S& spectrum, F&& f) {
  for (auto* x : {&spectrum.operator_norm, &spectrum.frobenius_norm, &spectrum.nuclear_norm,
                  &spectrum.stable_rank, &spectrum.nuclear_rank, &spectrum.erank1, &spectrum.erank2,
                  &spectrum.participation, &spectrum.cond_eff}) {
    f(*x);
  }
}

double* row_of(std::vector<double>& table, std::size_t matrix) {
  return table.data() + static_cast<Index>(matrix) * ProbeTable::of_matrix;
}
/// What follows the four spectra of a matrix.
enum More : std::uint8_t {
  cosine,
  alignment,
  polar_batch,
  polar_ratio,
  saturated,
  nuclear_noise,
  orthogonality,
  least_direction,
  largest_direction,
  flattening,
  first_quantile,
  first_moved = first_quantile + ProbeTable::quantiles
};
double* more_of(std::vector<double>& table, std::size_t matrix) {
  return row_of(table, matrix) + std::ssize(runtime::probes) * ProbeTable::spectrum;
}

/// Of `MatrixSpectra::momentum_quantiles`.
constexpr std::array<double, ProbeTable::quantiles> shares{0, 0.01, 0.1, 0.5, 0.9};

ConstMatrixView dense(const float* values, const Region& r) {
  return {values, r.rows, r.cols, r.cols, DType::f32};
}

}  // namespace

void ShardedOptimizer::Impl::prepare_to_look() {
  if (plan_.probed.empty()) return;
  const int me = mesh_.world.rank();
  for (const runtime::Bucket& b : plan_.buckets) {
    auto& of_bucket = looking_.meetings.emplace_back();
    for (const Probe what : runtime::probes) {
      of_bucket[static_cast<std::size_t>(what)] = runtime::make_probe_meeting(plan_, b, me, what);
    }
  }
  Index own = 0;
  for (const auto& of_bucket : looking_.meetings) {
    own += of_bucket[static_cast<std::size_t>(Probe::weights)].sent;
  }
  for (const runtime::Probed& p : plan_.probed) {
    auto& gradient = looking_.gradients.emplace_back();
    auto& whole = looking_.wholes.emplace_back();
    auto& weights = looking_.weights.emplace_back();
    MatrixSpectra& result = looking_.results.emplace_back();
    result.name = p.name;
    result.parameter = p.parameter;
    if (p.analyst != me) continue;
    gradient.resize(static_cast<std::size_t>(p.region.size()));
    whole.resize(gradient.size());
    if (plan_.looks_at_dynamics) weights.resize(gradient.size());
  }
  looking_.before.resize(static_cast<std::size_t>(own));
  looking_.allowance_s = runtime::look_allowance_s(plan_);
  looking_.places = runtime::make_probe_table(plan_);
  looking_.table.resize(static_cast<std::size_t>(looking_.places.size));
  looking_.advisors.resize(plan_.probed.size());
  looking_.activations.resize(plan_.parameters.size());
  for (std::size_t i = 0; i < plan_.parameters.size(); ++i) {
    if (looking_.places.activations[i] < 0) continue;
    looking_.activations[i].sum.resize(static_cast<std::size_t>(plan_.parameters[i].cols()));
  }
  if (runtime::measures_dual_noise(plan_)) {
    for (const runtime::Bucket& b : plan_.buckets) {
      looking_.noise.push_back(runtime::make_noise_meeting(plan_, b));
    }
  }
  looking_.since = Clock::now();
}

/// Also where steps are chosen: not by what was seen long ago.
bool ShardedOptimizer::Impl::looks_in(std::int64_t step) const {
  if (plan_.probed.empty()) return false;
  return chooses_in(step) || (step >= looking_.next && step % config_.diagnostics.every_steps == 0);
}

double ShardedOptimizer::Impl::examples_each() const {
  const auto batch = static_cast<double>(config_.train.batch);
  return batch > 0 ? batch / static_cast<double>(plan_.contributions()) : 1;
}

/// Gradient, momentum and weights as this step finds them.
void ShardedOptimizer::Impl::look_before_update() {
  looking_.now = looks_in(steps_);
  if (!looking_.now) return;
  const auto start = Clock::now();
  std::fill(looking_.table.begin(), looking_.table.end(), 0.0);
  look(Probe::gradient);
  look_at_noise();
  look(Probe::momentum);
  look(Probe::weights);
  report_.ms.probe = ms_since(start);
}

/// What the step has added to the weights; then all ranks get everything. Which step is the next
/// must not differ between ranks: it follows from sums over all of them.
void ShardedOptimizer::Impl::look_after_update() {
  if (!looking_.now) return;
  const auto start = Clock::now();
  look(Probe::update);
  double* const time = &looking_.table[static_cast<std::size_t>(looking_.places.times)];
  time[0] = report_.ms.probe + ms_since(start) + looking_.observing_ms;
  time[1] =
      (ms_since(looking_.since) - time[0]) / static_cast<double>(steps_ - looking_.since_step);
  share_spectra();
  choose_geometry();
  looking_.next = runtime::next_look(steps_, config_.diagnostics.every_steps, time[0] / plan_.ranks,
                                     time[1] / plan_.ranks, config_.diagnostics.budget_frac);
  looking_.since = Clock::now();
  looking_.since_step = steps_;
  looking_.observing_ms = 0;
  report_.ms.probe += ms_since(start);
}

/// A bucket at a time, pieces go to the analysts of their matrices; who has much to describe holds
/// up no exchange.
void ShardedOptimizer::Impl::look(Probe what) {
  auto* const send = reinterpret_cast<float*>(looking_.send.data());
  auto* const receive = reinterpret_cast<float*>(looking_.receive.data());
  float* before = looking_.before.data();
  std::vector<std::size_t> arrived;
  for (std::size_t b = 0; b < plan_.buckets.size(); ++b) {
    const runtime::ProbeMeeting& meeting = looking_.meetings[b][static_cast<std::size_t>(what)];
    if (!meeting.happens) continue;
    const auto list = segments(b);
    for (std::size_t i = 0; i < list.size(); ++i) {
      if (meeting.departures[i] < 0) continue;
      const runtime::OwnSegment& own = list[i];
      const MatrixView to{send + meeting.departures[i], own.rows, own.cols, own.cols, DType::f32};
      switch (what) {
        case Probe::gradient:
          backend_->convert(gradient_of(own), 1, to);
          break;
        case Probe::momentum:
          open_momentum(own, runtime::whole(own), to);
          break;
        case Probe::weights:
        case Probe::update:
          read_weights(own, to);
          break;
      }
    }
    backend_->wait();
    if (what == Probe::weights || what == Probe::update) {
      kernels::OnHost<float> here(*backend_, send, static_cast<std::size_t>(meeting.sent));
      if (what == Probe::weights) {
        std::copy_n(here.data(), meeting.sent, before);
      } else {
        std::transform(here.data(), here.data() + meeting.sent, before, here.data(),
                       std::minus<>());
        here.put_back();
      }
      before += meeting.sent;
    }
    mesh_.world.all_to_all({send, meeting.sent, DType::f32}, meeting.sends,
                           {receive, meeting.received, DType::f32}, meeting.receives);
    if (meeting.arrivals.empty()) continue;
    kernels::OnHost<const float> pieces(*backend_, receive,
                                        static_cast<std::size_t>(meeting.received));
    for (std::size_t i = 0; i < meeting.arrivals.size(); ++i) {
      const auto& [index, region, offset] = meeting.arrivals[i];
      const auto probed = static_cast<std::size_t>(index);
      auto& whole = whole_of(what, probed);
      runtime::place_piece(pieces.data() + offset, region, plan_.probed[probed], whole.data());
      const bool last = i + 1 == meeting.arrivals.size() || meeting.arrivals[i + 1].probed != index;
      if (last) arrived.push_back(probed);
    }
  }
  for (const std::size_t probed : arrived) describe(probed, what);
}

std::vector<float>& ShardedOptimizer::Impl::whole_of(Probe what, std::size_t i) {
  if (what == Probe::gradient) return looking_.gradients[i];
  return what == Probe::weights && plan_.looks_at_dynamics ? looking_.weights[i]
                                                           : looking_.wholes[i];
}

/// What the step does to the singular values of the weights; and, of Muon's spectral steps, how
/// near to orthogonal their direction was, ΔW = −η(λW + sO).
void ShardedOptimizer::Impl::describe_dynamics(std::size_t i) {
  const runtime::Probed& p = plan_.probed[i];
  double* const more = more_of(looking_.table, i);
  const ConstMatrixView weights = dense(looking_.weights[i].data(), p.region);
  const ConstMatrixView update = dense(looking_.wholes[i].data(), p.region);
  const studies::Flattening moved = studies::flattening(weights, update);
  more[flattening] = moved.rate;
  constexpr Index half = ProbeTable::moved / 2;
  const Index n = std::ssize(moved.dsigma);
  for (Index k = 0; k < half; ++k) {
    const double none = std::numeric_limits<double>::quiet_NaN();
    more[first_moved + k] = k < n ? moved.dsigma[static_cast<std::size_t>(k)] : none;
    more[first_moved + half + k] = k < n ? moved.dsigma[static_cast<std::size_t>(n - 1 - k)] : none;
  }
  const runtime::Group& group = plan_.group(p.parameter);
  if (p.matrix < 0 || !group.is_spectral_descent() ||
      euclidean_[static_cast<std::size_t>(p.matrix)] > 0) {
    return;
  }
  const auto g = static_cast<std::size_t>(plan_.group_of[static_cast<std::size_t>(p.parameter)]);
  const double lr = lr_at(g, steps_) * lr_multiplier_;
  const double step = lr * group.scale(plan_.matrices[static_cast<std::size_t>(p.matrix)]);
  if (!(step > 0)) return;
  std::vector<float> direction(looking_.wholes[i]);
  const double decay = lr * weight_decay_[g];
  for (std::size_t e = 0; e < direction.size(); ++e) {
    const double undone =
        static_cast<double>(direction[e]) + decay * static_cast<double>(looking_.weights[i][e]);
    direction[e] = static_cast<float>(-undone / step);
  }
  const ConstMatrixView o = dense(direction.data(), p.region);
  const std::vector<double> s = studies::gram_singular_values(o);
  more[orthogonality] = studies::orthogonality_error(o);
  more[least_direction] = s.back();
  more[largest_direction] = s.front();
}

/// The analyst's part: what is whole here now, in numbers.
void ShardedOptimizer::Impl::describe(std::size_t i, Probe what) {
  const runtime::Probed& p = plan_.probed[i];
  const auto n = static_cast<std::size_t>(p.region.size());
  const std::vector<float>& gradient = looking_.gradients[i];
  const float* const values = whole_of(what, i).data();
  double* const more = more_of(looking_.table, i);
  MatrixSpectra found;
  try {
    const std::vector<double> s = studies::gram_singular_values(dense(values, p.region));
    // What is left of f32's rounding is no rank.
    const auto longer = static_cast<double>(std::max(p.region.rows, p.region.cols));
    found.*spectrum_of(what) = studies::spectrum_of(s, 0x1p-23 * longer);
    for (std::size_t k = 0; what == Probe::momentum && s[0] > 0 && k < shares.size(); ++k) {
      // From the least to the largest; `s` descends.
      const auto at =
          static_cast<std::size_t>(std::lround(shares[k] * static_cast<double>(s.size() - 1)));
      more[first_quantile + static_cast<Index>(k)] = s[s.size() - 1 - at] / s[0];
    }
    if (what == Probe::update && plan_.looks_at_dynamics) describe_dynamics(i);
    const runtime::Group& group = plan_.group(p.parameter);
    const GradientNoise& noise = noise_[static_cast<std::size_t>(p.parameter)];
    // Of Muon's polar factor of an average that clipping has not scaled, one gradient ahead, where
    // the noise of this step's gradient is known.
    const RuleConfig rule = optim::with_defaults(group.config->rule);
    const auto form = rule.values.find("momentum_form");
    const auto* const word =
        form == rule.values.end() ? nullptr : std::get_if<std::string>(&form->second);
    const bool is_polar = group.is_spectral_descent() && group.config->clip_norm <= 0 &&
                          rule.flag("nesterov") && (word == nullptr || *word != "heavy_ball");
    if (what == Probe::momentum && is_polar && noise.step == steps_ && noise.trace_trend > 0 &&
        rule.number("momentum") < 1) {
      const auto elements =
          static_cast<double>(plan_.parameters[static_cast<std::size_t>(p.parameter)].size());
      found.polar = studies::polar_batch(s, p.region.rows, p.region.cols,
                                         noise.trace_trend / elements, rule.number("momentum"),
                                         noise.examples * static_cast<double>(noise.contributions));
    }
  } catch (const Error&) {  // no rank throws alone
    for_each_number(found.*spectrum_of(what),
                    [](double& x) { x = std::numeric_limits<double>::quiet_NaN(); });
  }
  double* const row = row_of(looking_.table, i);
  double* at = row + static_cast<Index>(what) * ProbeTable::spectrum;
  const studies::Spectrum& spectrum = found.*spectrum_of(what);
  for_each_number(spectrum, [&](double x) { *at++ = x; });
  *at = static_cast<double>(spectrum.rank);
  if (what == Probe::momentum) {
    more[polar_batch] = found.polar.batch;
    more[polar_ratio] = found.polar.noise_ratio;
    more[saturated] = found.polar.saturated ? 1 : 0;
  } else if (what == Probe::update) {
    const double* const of_gradient =
        row + static_cast<Index>(Probe::gradient) * ProbeTable::spectrum;
    const double both = std::inner_product(values, values + n, gradient.begin(), 0.0);
    const auto ratio = [](double x, double y) { return y > 0 ? x / y : 0; };
    more[cosine] = ratio(-both, spectrum.frobenius_norm * of_gradient[1]);
    more[alignment] = ratio(-both, spectrum.operator_norm * of_gradient[2]);
  }
}

/// Noise of an example in the norms dual to those of sign and spectral steps: what squares and Gram
/// matrices of all ranks' own gradients say beside their mean.
void ShardedOptimizer::Impl::look_at_noise() {
  for (std::size_t b = 0; b < looking_.noise.size(); ++b) {
    if (looking_.noise[b].all_squares == 0) continue;
    look_at_squares(b);
    look_at_grams(b);
  }
}

/// What this rank gave: it is still where the trainer had it.
void ShardedOptimizer::Impl::load_own_gradient(int parameter, const Region& region, float* to) {
  const auto p = static_cast<std::size_t>(parameter);
  runtime::pack(plan_.parameters[p], parameters_[p].gradient, parameters_[p].gradient_dtype, region,
                {to, region.size(), DType::f32}, *backend_);
}

void ShardedOptimizer::Impl::look_at_squares(std::size_t b) {
  const runtime::NoiseMeeting& meeting = looking_.noise[b];
  const Index mine = meeting.squares[static_cast<std::size_t>(mesh_.world.rank())];
  runtime::Carver room(looking_.noise_room);
  const MatrixView send = room.matrix(1, meeting.all_squares);
  const MatrixView receive = room.matrix(1, mine);
  auto* to = static_cast<float*>(send.data);
  for (const std::size_t i : meeting.segments) {
    const runtime::Segment& s = plan_.buckets[b].segments[i];
    load_own_gradient(s.parameter, s.region, to);
    to += s.size();
  }
  backend_->wait();
  {
    kernels::OnHost<float> here(*backend_, static_cast<float*>(send.data),
                                static_cast<std::size_t>(send.cols));
    for (float& x : here.span()) x *= x;
    here.put_back();
  }
  mesh_.world.reduce_scatter({send.data, send.cols, DType::f32}, meeting.squares,
                             {receive.data, mine, DType::f32});
  kernels::OnHost<const float> sums(*backend_, static_cast<const float*>(receive.data),
                                    static_cast<std::size_t>(mine));
  const float* square = sums.data();
  const auto n = static_cast<double>(plan_.ranks);
  for (const runtime::OwnSegment& own : segments(b)) {
    if (own.size() == 0) continue;
    // Dense, as it has travelled.
    kernels::OnHost<const float> mean(*backend_, static_cast<const float*>(gradient_of(own).data),
                                      static_cast<std::size_t>(own.size()));
    double deviation = 0, absolute = 0;
    for (const float m : mean.span()) {
      const auto x = static_cast<double>(m);
      const double rest = static_cast<double>(*square++) - n * x * x;
      deviation += std::sqrt(std::max(rest, 0.0) * examples_each() / (n - 1));
      absolute += std::abs(x);
    }
    double* const slot =
        &looking_
             .table[static_cast<std::size_t>(looking_.places.noise + 2 * own.segment.parameter)];
    slot[0] += deviation;
    slot[1] += absolute;
  }
}

void ShardedOptimizer::Impl::look_at_grams(std::size_t b) {
  const runtime::NoiseMeeting& meeting = looking_.noise[b];
  const Index mine = meeting.triangles[static_cast<std::size_t>(mesh_.world.rank())];
  runtime::Carver room(looking_.noise_room);
  const auto take = [&](Index n) {
    return reinterpret_cast<double*>(
        room.take(static_cast<std::size_t>(n) * sizeof(double)).data());
  };
  double* const send = take(meeting.all_triangles);
  double* const receive = take(mine);
  auto* const whole = reinterpret_cast<float*>(room.rest().data());
  const auto triangle = [](const Region& r) {
    const Index k = std::min(r.rows, r.cols);
    return static_cast<std::size_t>(k * (k + 1) / 2);
  };
  {
    kernels::OnHost<double> here(*backend_, send, static_cast<std::size_t>(meeting.all_triangles),
                                 /*fetch=*/false);
    std::fill_n(here.data(), meeting.all_triangles, 0.0);
    double* to = here.data();
    for (const int i : meeting.probed) {
      const runtime::Probed& p = plan_.probed[static_cast<std::size_t>(i)];
      load_own_gradient(p.parameter, p.region, whole);
      backend_->wait();
      kernels::OnHost<const float> gradient(*backend_, whole,
                                            static_cast<std::size_t>(p.region.size()));
      studies::add_gram(dense(gradient.data(), p.region), {to, triangle(p.region)});
      to += triangle(p.region);
    }
    here.put_back();
  }
  mesh_.world.reduce_scatter({send, meeting.all_triangles, DType::f64}, meeting.triangles,
                             {receive, mine, DType::f64});
  kernels::OnHost<const double> sums(*backend_, receive, static_cast<std::size_t>(mine));
  const double* at = sums.data();
  for (const int i : meeting.probed) {
    const auto probed = static_cast<std::size_t>(i);
    const runtime::Probed& p = plan_.probed[probed];
    if (p.analyst != mesh_.world.rank()) continue;
    double& found = more_of(looking_.table, probed)[nuclear_noise];
    try {
      found = studies::spectral_noise(plan_.ranks, examples_each(), {at, triangle(p.region)},
                                      dense(looking_.gradients[probed].data(), p.region));
    } catch (const Error&) {  // no rank throws alone
      found = std::numeric_limits<double>::quiet_NaN();
    }
    at += triangle(p.region);
  }
}

void ShardedOptimizer::Impl::observe_activation(int id, ConstMatrixView a) {
  const auto i = static_cast<std::size_t>(id);
  expects<ConfigError>(id >= 0 && i < plan_.parameters.size(),
                       "observe_activation(id): the position of a parameter in the list");
  const Index inputs = plan_.parameters[i].cols();
  if (a.cols != inputs || (a.dtype != DType::f32 && a.dtype != DType::bf16)) {
    throw ShapeError("observe_activation: '" + plan_.parameters[i].name + "' multiplies " +
                     std::to_string(inputs) + " inputs per token, in f32 or bf16; given are " +
                     std::to_string(a.cols) + " in " + std::string(name_of(a.dtype)));
  }
  if (!wants_activations() || looking_.places.activations[i] < 0) return;
  const auto start = Clock::now();
  Looking::Activation& of = looking_.activations[i];
  looking_.observed = true;
  std::vector<double> token(static_cast<std::size_t>(inputs));
  for (Index t = 0; t < std::min(a.rows, activation_rows); ++t) {
    for (std::size_t j = 0; j < token.size(); ++j) {
      const Index e = t * a.ld + static_cast<Index>(j);
      token[j] =
          a.dtype == DType::f32
              ? static_cast<double>(static_cast<const float*>(a.data)[e])
              : static_cast<double>(kernels::to_float(static_cast<const BFloat16*>(a.data)[e]));
    }
    const auto inner = [&](const auto& v) {
      return std::inner_product(token.begin(), token.end(), v.begin(), 0.0);
    };
    of.squares += inner(token);
    const double along = of.vector.empty() ? 1 : inner(of.vector);
    for (std::size_t j = 0; j < token.size(); ++j) of.sum[j] += along * token[j];
  }
  looking_.observing_ms += ms_since(start);
}

void ShardedOptimizer::Impl::forget_activations() {
  if (!looking_.observed) return;
  looking_.observed = false;
  for (Looking::Activation& of : looking_.activations) {
    std::fill(of.sum.begin(), of.sum.end(), 0.0);
    of.squares = 0;
  }
}

void ShardedOptimizer::Impl::share_spectra() {
  std::vector<double>& table = looking_.table;
  for (std::size_t i = 0; i < looking_.activations.size(); ++i) {
    if (looking_.places.activations[i] < 0) continue;
    const Looking::Activation& of = looking_.activations[i];
    double* const at = &table[static_cast<std::size_t>(looking_.places.activations[i])];
    *std::copy(of.sum.begin(), of.sum.end(), at) = of.squares;
  }
  {
    const TrafficScope scope(all_ranks(), TrafficClass::control);
    all_ranks().all_reduce(Span{table.data(), std::ssize(table), DType::f64}, ReduceOp::sum);
  }
  for (std::size_t i = 0; i < looking_.results.size(); ++i) {
    MatrixSpectra& result = looking_.results[i];
    result.step = steps_;
    const int matrix = plan_.probed[i].matrix;
    result.euclidean = matrix < 0 ? 0 : euclidean_[static_cast<std::size_t>(matrix)];
    const runtime::Group& group = plan_.group(result.parameter);
    const double* at = row_of(table, i);
    for (const Probe what : runtime::probes) {
      studies::Spectrum& spectrum = result.*spectrum_of(what);
      for_each_number(spectrum, [&](double& x) { x = *at++; });
      spectrum.rank = static_cast<Index>(*at++);
    }
    if (matrix >= 0 && group.is_spectral_descent() && result.euclidean == 0) {
      const auto g =
          static_cast<std::size_t>(plan_.group_of[static_cast<std::size_t>(result.parameter)]);
      result.rho = weight_decay_[g] * result.weights.operator_norm /
                   group.scale(plan_.matrices[static_cast<std::size_t>(matrix)]);
    }
    result.cosine = at[cosine];
    result.alignment = at[alignment];
    result.polar = {at[polar_batch], at[polar_ratio], at[saturated] > 0};
    result.nuclear_noise = at[nuclear_noise];
    std::copy_n(at + first_quantile, shares.size(), result.momentum_quantiles.begin());
    if (!plan_.looks_at_dynamics) continue;
    result.orthogonality_error = at[orthogonality];
    result.direction_least = at[least_direction];
    result.direction_largest = at[largest_direction];
    result.flattening_rate = at[flattening];
    std::copy_n(at + first_moved, ProbeTable::moved, result.dsigma.begin());
  }
  if (!looking_.noise.empty()) take_dual_noise();
  take_activations();
}

void ShardedOptimizer::Impl::take_dual_noise() {
  const auto clear = [](GradientNoise& noise) {
    noise.absolute_deviation = noise.absolute_mean = 0;
  };
  std::for_each(noise_.begin(), noise_.end(), clear);
  std::for_each(report_.noise.begin(), report_.noise.end(), clear);
  clear(report_.model_noise);
  const double* of = &looking_.table[static_cast<std::size_t>(looking_.places.noise)];
  for (std::size_t i = 0; i < noise_.size(); ++i, of += 2) {
    GradientNoise& group = report_.noise[static_cast<std::size_t>(plan_.group_of[i])];
    for (GradientNoise* const noise : {&noise_[i], &group, &report_.model_noise}) {
      noise->absolute_deviation += of[0];
      noise->absolute_mean += of[1];
    }
  }
}

/// A step of each power iteration, and what the condition nr(G) ≥ st(A) says.
void ShardedOptimizer::Impl::take_activations() {
  std::vector<double> ranks(plan_.parameters.size());
  for (std::size_t i = 0; i < looking_.activations.size(); ++i) {
    Looking::Activation& of = looking_.activations[i];
    if (of.sum.empty()) continue;
    const auto first = looking_.table.begin() + looking_.places.activations[i];
    const auto last = first + std::ssize(of.sum);
    const double length = std::sqrt(std::inner_product(first, last, first, 0.0));
    if (!(length > 0) || !std::isfinite(length)) continue;
    if (!of.vector.empty()) {  // ‖AAᵀv‖ ≤ ‖A‖_op²·‖v‖
      const std::vector<double> v(of.vector.begin(), of.vector.end());
      ranks[i] = *last * std::sqrt(std::inner_product(v.begin(), v.end(), v.begin(), 0.0)) / length;
    }
    of.vector.resize(of.sum.size());
    std::transform(first, last, of.vector.begin(),
                   [&](double x) { return static_cast<float>(x / length); });
  }
  for (std::size_t i = 0; i < looking_.results.size(); ++i) {
    MatrixSpectra& result = looking_.results[i];
    result.activation_rank = ranks[static_cast<std::size_t>(result.parameter)];
    // A block of columns multiplies a part of the inputs.
    const Region& region = plan_.probed[i].region;
    if (region.cols != plan_.parameters[static_cast<std::size_t>(result.parameter)].cols()) {
      result.activation_rank = 0;
    }
    const double nuclear_rank = result.gradient.nuclear_rank;
    if (!(result.activation_rank > 0) || !(nuclear_rank > 0)) continue;  // not known
    const Advice before = looking_.advisors[i].advice();
    result.advice = looking_.advisors[i].probe(std::max(nuclear_rank, 1.0),  // but for rounding
                                               std::max(result.activation_rank, 1.0));
    result.spectral_ratio = looking_.advisors[i].average_ratio();
    if (result.advice != before) note_advice(i, result.advice);
  }
}

}  // namespace orthrus
