#include "runtime/cli/training.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <numeric>
#include <orthrus/error.hpp>
#include <span>
#include <utility>

#include "kernels/cuda/devices.hpp"
#include "runtime/agree.hpp"
#include "runtime/cli/json_number.hpp"
#include "runtime/device.hpp"
#include "runtime/tree.hpp"

namespace orthrus::cli {
namespace {

using Clock = std::chrono::steady_clock;

double ms_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

/// Under ZeRO-3 a step's forward and backward use what was gathered once.
Config with_one_gather(Config config) {
  config.gathers = 1;
  return config;
}

/// Of every matrix by the name in its spectra: of a block where a parameter is split.
std::map<std::string, double> matrix_elements(const ShardedOptimizer& optimizer,
                                              std::span<const Parameter> parameters) {
  std::map<std::string, double> elements;
  for (const Parameter& p : parameters) elements[p.name] = static_cast<double>(elements_of(p));
  for (const nlohmann::json& m : nlohmann::json::parse(optimizer.plan_json())["matrices"]) {
    elements[m["name"]] = m["rows"].get<double>() * m["cols"].get<double>();
  }
  return elements;
}

}  // namespace

nlohmann::json noise_of(const StepReport& report, const Config& config) {
  nlohmann::json list = nlohmann::json::array();
  const auto add = [&](const GradientNoise& noise, const std::string& group) {
    if (noise.step != report.step || report.skipped) return;
    const double scale = noise.scale();
    list.push_back({{"group", group},
                    {"n_splits", noise.contributions},
                    {"examples_each", noise.examples},
                    {"q", noise.mean_squared},
                    {"r", noise.squared_mean},
                    {"trS", noise.trace()},
                    {"g2", noise.signal()},
                    {"gns_l2", json_number(scale)},
                    {"gns_unresolved", noise.unresolved()}});
    if (noise.share < 1) list.back()["share"] = noise.share;
    if (noise.absolute_mean > 0) {
      const double ratio = noise.absolute_deviation / noise.absolute_mean;
      list.back()["gns_l1"] = ratio * ratio;
    }
  };
  for (std::size_t g = 0; g < report.noise.size(); ++g) {
    add(report.noise[g], config.groups[g].match);
  }
  add(report.model_noise, "all");
  return list;
}

nlohmann::json spectra_of(const ShardedOptimizer& optimizer, const StepReport& report,
                          std::span<const Parameter> parameters) {
  nlohmann::json list = nlohmann::json::array();
  double noise = 0, signal = 0;
  std::map<std::string, double> elements;
  for (const MatrixSpectra& m : optimizer.spectra()) {
    if (m.step != report.step || report.skipped) continue;
    if (elements.empty()) elements = matrix_elements(optimizer, parameters);
    nlohmann::json row{{"matrix", m.name}, {"elements", elements.at(m.name)}};
    const auto add = [&](const std::string& of, const studies::Spectrum& s) {
      if (s.frobenius_norm == 0) return;  // it has none
      row["nr_" + of] = json_number(s.nuclear_rank);
      row["st_" + of] = json_number(s.stable_rank);
      row["erank1_" + of] = json_number(s.erank1);
      row["erank2_" + of] = json_number(s.erank2);
      row["participation_" + of] = json_number(s.participation);
      row["cond_eff_" + of] = json_number(s.cond_eff);
    };
    add("grad", m.gradient);
    add("mom", m.momentum);
    add("w", m.weights);
    add("update", m.update);
    row["update_rms"] = json_number(m.update.frobenius_norm / std::sqrt(elements.at(m.name)));
    row["update_op"] = json_number(m.update.operator_norm);
    row["w_op"] = json_number(m.weights.operator_norm);
    if (m.weights.frobenius_norm > 0) {
      row["update_to_weight"] = json_number(m.update.frobenius_norm / m.weights.frobenius_norm);
    }
    if (m.rho > 0) row["rho"] = json_number(m.rho);
    row["cosine"] = json_number(m.cosine);
    row["alignment"] = json_number(m.alignment);
    if (m.momentum.frobenius_norm > 0) row["ns_spectrum_q"] = m.momentum_quantiles;
    if (m.orthogonality_error > 0) {
      row["orth_error"] = json_number(m.orthogonality_error);
      row["orth_sigma"] = {json_number(m.direction_least), json_number(m.direction_largest)};
    }
    if (m.dsigma != decltype(m.dsigma){}) {
      row["flattening_rate"] = json_number(m.flattening_rate);
      for (const double moved : m.dsigma) {
        row["dsigma"].push_back(std::isnan(moved) ? nlohmann::json(nullptr)
                                                  : nlohmann::json(moved));
      }
    }
    if (m.polar.batch > 0) {
      row["b_polar"] = json_number(m.polar.batch);
      row["r_polar"] = json_number(m.polar.noise_ratio);
      row["b_polar_saturated"] = m.polar.saturated;
    }
    if (m.nuclear_noise > 0) {
      const double ratio = m.nuclear_noise / m.gradient.nuclear_norm;
      row["gns_nuc"] = json_number(ratio * ratio);
      noise += m.nuclear_noise;
      signal += m.gradient.nuclear_norm;
    }
    for (const char* const key : {"st_act", "spec_ratio", "advice"}) row[key] = nullptr;
    if (m.activation_rank > 0) {
      using Advice = studies::GeometryAdvisor::Advice;
      row["st_act"] = m.activation_rank;
      row["spec_ratio"] = m.spectral_ratio;
      row["advice"] = m.advice == Advice::spectral    ? "spectral"
                      : m.advice == Advice::euclidean ? "euclidean"
                                                      : "keep";
    }
    if (m.euclidean > 0) row["euclidean"] = json_number(m.euclidean);
    list.push_back(std::move(row));
  }
  if (list.empty()) return list;
  nlohmann::json all{{"matrix", "all"}, {"diag_ms", report.ms.probe}};
  if (signal > 0) all["gns_nuc"] = json_number(noise / signal * (noise / signal));
  list.push_back(std::move(all));
  return list;
}

namespace {

bool is_clipped(const Config& config, const StepReport& report) {
  for (std::size_t g = 0; g < config.groups.size(); ++g) {
    const double most = config.groups[g].clip_norm;
    if (most > 0 && report.gradient_norm[g] > most && !report.skipped) return true;
  }
  return false;
}

}  // namespace

std::int64_t elements_of(const Parameter& parameter) {
  return std::accumulate(parameter.shape.begin(), parameter.shape.end(), std::int64_t{1},
                         std::multiplies<>());
}

/// Leaf v of V, or micro-batch k of rank r, is the contiguous run of units that its place in the
/// order of ranks says. @throws ConfigError  the batch cannot be divided so.
Training::Deal Training::divide(const Config& config, int rank, int ranks) {
  const std::int64_t batch = config.train.batch;
  const auto where = [&](const char* key) {
    return (config.source.empty() ? "" : config.source + ": ") + std::string(key) + ": ";
  };
  Deal deal;
  if (config.virtual_shards > 0) {
    const std::int64_t leaves = config.virtual_shards;
    if (ranks > leaves) {
      throw ConfigError(
          where("reproducible.virtual_shards") +
          fmt::format("{} ranks, but only {} virtual shards to deal; start at most {} ranks", ranks,
                      leaves, leaves));
    }
    if (batch % leaves != 0) {
      throw ConfigError(
          where("train.batch") +
          fmt::format("{} is not divisible by reproducible.virtual_shards = {}", batch, leaves));
    }
    const std::int64_t units = batch / leaves;
    const runtime::Leaves run = runtime::leaf_run(leaves, ranks, rank);
    for (std::int64_t leaf = run.begin; leaf < run.end; ++leaf)
      deal.parts.push_back({leaf * units, units});
    deal.all_parts = leaves;
    return deal;
  }
  const std::int64_t micro_batches = std::max<std::int64_t>(config.train.micro_batches, 1);
  const std::int64_t parts = ranks * micro_batches;
  if (batch % parts != 0) {
    throw ConfigError(where("train.batch") +
                      fmt::format("{} is not divisible by {} ranks x {} micro-batches = {}", batch,
                                  ranks, micro_batches, parts));
  }
  const std::int64_t units = batch / parts;
  for (std::int64_t k = 0; k < micro_batches; ++k) {
    deal.parts.push_back({(rank * micro_batches + k) * units, units});
  }
  deal.all_parts = parts;
  return deal;
}

Training::Training(Config config, Communicator world, Communicator control, Trust trust,
                   Start start)
    : config_(with_one_gather(std::move(config))),
      now_(config_),
      rank_(world.rank()),
      size_(world.size()),
      trust_(trust),
      start_(start),
      control_(std::move(control)) {
  deal();
  open(std::move(world));
}

void Training::deal() {
  deal_ = divide(now_, rank_, size_);
  parts_.clear();
  for (int r = 0; r < size_; ++r) {
    parts_.push_back(static_cast<Index>(divide(now_, r, size_).parts.size()));
  }
}

/// @param weights  of each parameter, to begin with; empty: the workload's
void Training::open(Communicator world, const std::vector<std::vector<float>>& weights) {
  DeviceChoice device;
  if (config_.device == "cuda") {
    const auto devices = static_cast<int>(kernels::cuda_report().devices.size());
    device.ordinal = runtime::default_ordinal(control_, std::max(devices, 1));
  }
  runtime::agree(control_, [&] {
    workload_ = workloads::open_workload(config_, device.ordinal);
    place_ = workload_->device();
    if (config_.diagnostics.every_steps > 0 && config_.diagnostics.gns_source == "norm_layers" &&
        !workload_->watch_examples({})) {
      throw ConfigError("diagnostics.gns_source: norm_layers: '" + config_.workload +
                        "' has no normalization layers, whose gradients of single examples are at "
                        "hand; gpt has");
    }
    if (config_.zero_stage == 3 && config_.device != "cpu" && !place_) {
      throw ConfigError(
          "zero.stage: 3 keeps whole weights on the device, but this workload computes on the "
          "host here: device: cpu, or stage 1 or 2");
    }
  });
  parameters_ = workload_->parameters();
  for (std::size_t p = 0; p < weights.size(); ++p)
    std::copy(weights[p].begin(), weights[p].end(), static_cast<float*>(parameters_[p].weights));
  optimizer_.emplace(now_, std::move(world), parameters_, place_.value_or(device));
  ids_.clear();
  for (int id = 0; id < std::ssize(parameters_); ++id) {
    ids_.push_back(id);
    if (config_.zero_stage == 3) workload_->place_weights(id, optimizer_->weights(id));
  }
}

void Training::go_on_from(const std::string& checkpoint, std::int64_t unit, std::int64_t batch,
                          std::int64_t micro_batches) {
  now_.train.batch = batch;
  now_.train.micro_batches = micro_batches;
  deal();
  optimizer_.reset();
  workload_.reset();
  open(control_.duplicate("job"));
  optimizer_->load(checkpoint);
  begin_at(unit);
  remember();
}

void Training::begin_with_weights_of(const std::string& checkpoint) {
  require_host_weights("branch.optimizer_state: reset");
  optimizer_->load(checkpoint);
  optimizer_->gather(ids_);
  const std::vector<std::vector<float>> weights = copy_of_weights();
  optimizer_->release(ids_);
  optimizer_.reset();
  workload_.reset();
  open(control_.duplicate("job"), weights);
}

workloads::Slice Training::slice(std::int64_t step, std::size_t part) const {
  const Deal::Part& own = deal_.parts[part];
  return {unit_of(step) + own.first, own.count};
}

void Training::compute_gradients() {
  const std::int64_t index = optimizer_->steps();
  const auto ready = [this](int id) { optimizer_->gradient_ready(id); };
  const bool watches = optimizer_->wants_activations();
  if (watches || looks_) {
    workload_->watch([this, watches](int id, ConstMatrixView inputs) {
      if (watches) optimizer_->observe_activation(id, inputs);
      if (looks_) add_preactivations(id, inputs);
    });
  }
  const bool examples = optimizer_->wants_examples();
  if (examples) {
    workload_->watch_examples(
        [this](int id, ConstMatrixView gradients) { optimizer_->observe_examples(id, gradients); });
  }
  for (std::size_t k = 0; k < deal_.parts.size(); ++k) {
    if (config_.virtual_shards > 0 || deal_.parts.size() > 1) {
      optimizer_->micro_batch(static_cast<std::int64_t>(k));
    }
    losses_.push_back(workload_->gradient(slice(index, k), ready));
  }
  if (watches || looks_) workload_->watch({});
  if (examples) workload_->watch_examples({});
}

void Training::look_at_preactivations() {
  require_host_weights("pre-activations");
  looks_ = true;
  squares_.assign(parameters_.size(), 0);
  counts_.assign(parameters_.size(), 0);
}

void Training::add_preactivations(int id, ConstMatrixView inputs) {
  const auto p = static_cast<std::size_t>(id);
  const std::vector<Index>& shape = parameters_[p].shape;
  if (shape.size() != 2 || shape[1] != inputs.cols) return;
  const std::span<const float> w = weights(id);
  const auto* const x = static_cast<const float*>(inputs.data);
  for (Index token = 0; token < inputs.rows; ++token) {
    for (Index out = 0; out < shape[0]; ++out) {
      double sum = 0;
      for (Index k = 0; k < shape[1]; ++k)
        sum += static_cast<double>(w[static_cast<std::size_t>(out * shape[1] + k)]) *
               x[token * inputs.ld + k];
      squares_[p] += sum * sum;
    }
  }
  counts_[p] += static_cast<double>(inputs.rows * shape[0]);
}

Training::Step Training::step(const std::function<Word()>& word) {
  const Clock::time_point begin = Clock::now();
  losses_.clear();
  optimizer_->gather(ids_);
  if (trust_ == Trust::nobody && size_ > 1) {
    runtime::agree(control_, [this] { compute_gradients(); });
  } else {
    compute_gradients();
  }
  if (sharpness_) before_ = copy_of_weights();
  const Clock::time_point computed = Clock::now();
  Step step;
  if (looks_) {
    control_.all_reduce(std::span<double>(squares_));
    control_.all_reduce(std::span<double>(counts_));
    for (const int id : ids_) {
      const auto p = static_cast<std::size_t>(id);
      if (counts_[p] > 0) step.preactivations.emplace_back(id, std::sqrt(squares_[p] / counts_[p]));
    }
    looks_ = false;
  }
  step.report = optimizer_->step();
  ++taken_;
  clipped_ += is_clipped(config_, step.report) ? 1 : 0;
  share(word(), step);
  step.gradient_ms = ms_between(begin, computed);
  step.step_ms = ms_between(begin, Clock::now());
  if (!average_.empty()) follow();
  if (sharpness_) measure_sharpness(step);
  return step;
}

void Training::look_at_sharpness() {
  require_host_weights("sharpness");
  sharpness_ = true;
}

/// While they are gathered.
std::vector<std::vector<float>> Training::copy_of_weights() {
  std::vector<std::vector<float>> out;
  for (const int id : ids_) out.emplace_back(weights(id).begin(), weights(id).end());
  return out;
}

/// Of the batch of a step, with the weights as they are.
double Training::batch_loss(std::int64_t index) {
  double sum = 0;
  runtime::agree(control_, [&] {
    for (std::size_t k = 0; k < deal_.parts.size(); ++k)
      sum += workload_->gradient(slice(index, k), [](int) {});
  });
  control_.all_reduce(std::span<double>(&sum, 1));
  return sum / static_cast<double>(deal_.all_parts);
}

void Training::measure_sharpness(Step& step) {
  sharpness_ = false;
  const std::int64_t index = optimizer_->steps() - 1;
  optimizer_->gather(ids_);
  const std::vector<std::vector<float>> after = copy_of_weights();
  const auto put_back = [&] {
    for (const int id : ids_)
      std::copy_n(after[static_cast<std::size_t>(id)].begin(), weights(id).size(),
                  weights(id).begin());
  };
  double squares = 0;
  for (const int id : ids_) {
    const std::vector<float>& from = before_[static_cast<std::size_t>(id)];
    const std::vector<float>& to = after[static_cast<std::size_t>(id)];
    for (std::size_t e = 0; e < to.size(); ++e) {
      const double moved = static_cast<double>(to[e]) - static_cast<double>(from[e]);
      squares += moved * moved;
      weights(id)[e] = static_cast<float>(static_cast<double>(from[e]) + 0.5 * moved);
    }
  }
  if (!step.report.skipped && squares > 0) {
    const double middle = batch_loss(index);
    put_back();
    const double end = batch_loss(index);
    step.sharpness = 4 * (step.loss - 2 * middle + end) / squares;
    step.update_norm = std::sqrt(squares);
  }
  put_back();
  optimizer_->release(ids_);
  before_.clear();
}

void Training::share(const Word& mine, Step& step) {
  constexpr std::size_t facts = 7;
  std::vector<double> facts_and_losses{mine.problem ? 1.0 : 0.0,
                                       mine.stop ? 1.0 : 0.0,
                                       mine.save ? 1.0 : 0.0,
                                       static_cast<double>(step.report.bytes_sent),
                                       static_cast<double>(step.report.messages),
                                       static_cast<double>(step.report.exceptional_bytes),
                                       static_cast<double>(step.report.matrices)};
  facts_and_losses.insert(facts_and_losses.end(), losses_.begin(), losses_.end());
  std::vector<Index> counts = parts_;
  for (Index& count : counts) count += facts;
  std::vector<double> all(
      static_cast<std::size_t>(std::accumulate(counts.begin(), counts.end(), Index{0})));
  control_.all_gather(
      ConstSpan{facts_and_losses.data(), static_cast<Index>(facts_and_losses.size()), DType::f64},
      counts, Span{all.data(), static_cast<Index>(all.size()), DType::f64});
  auto at = all.begin();
  for (const Index count : counts) {
    step.any.problem = step.any.problem || at[0] != 0;
    step.any.stop = step.any.stop || at[1] != 0;
    step.any.save = step.any.save || at[2] != 0;
    step.bytes += at[3];
    step.bytes_max = std::max(step.bytes_max, at[3]);
    step.messages += at[4];
    step.exceptional += at[5];
    step.matrices += at[6];
    step.loss = std::accumulate(at + facts, at + count, step.loss);
    at += count;
  }
  step.loss /= static_cast<double>(deal_.all_parts);
  step.own_loss =
      std::accumulate(losses_.begin(), losses_.end(), 0.0) / static_cast<double>(losses_.size());
}

std::map<std::string, double> Training::evaluate() {
  optimizer_->gather(ids_);
  const workloads::Workload::Evaluation mine = workload_->evaluate(rank_, size_);
  optimizer_->release(ids_);
  return means(mine);
}

std::map<std::string, double> Training::means(const workloads::Workload::Evaluation& mine) {
  std::vector<double> sums{mine.count};
  for (const auto& [key, value] : mine.sums) sums.push_back(value);
  control_.all_reduce(std::span<double>(sums));
  std::map<std::string, double> all;
  std::size_t i = 1;
  for (const auto& [key, value] : mine.sums) all[key] = sums[i++] / sums[0];
  return all;
}

std::span<float> Training::weights(int id) const {
  return {static_cast<float*>(optimizer_->weights(id)),
          static_cast<std::size_t>(elements_of(parameters_[static_cast<std::size_t>(id)]))};
}

void Training::require_host_weights(const char* what) const {
  for (const Parameter& p : parameters_) {
    if (place_ || p.dtype != DType::f32 || !p.strides.empty() || p.weights == nullptr) {
      throw ConfigError(std::string(what) + ": of f32 weights on the host; '" + p.name +
                        (place_ ? "' is on a device" : "' is held otherwise"));
    }
  }
}

void Training::keep_average(double halflife_examples) {
  require_host_weights("averaged weights");
  halflife_ = halflife_examples;
  remember();
  optimizer_->gather(ids_);
  for (const int id : ids_) average_.emplace_back(weights(id).begin(), weights(id).end());
  optimizer_->release(ids_);
}

void Training::remember() {
  if (halflife_ == 0) return;
  forgotten_ =
      static_cast<float>(-std::expm1(-std::log(2.0) * static_cast<double>(batch()) / halflife_));
}

void Training::follow() {
  optimizer_->gather(ids_);
  for (const int id : ids_) {
    const std::span<const float> now = weights(id);
    std::vector<float>& average = average_[static_cast<std::size_t>(id)];
    for (std::size_t i = 0; i < now.size(); ++i) average[i] += forgotten_ * (now[i] - average[i]);
  }
  optimizer_->release(ids_);
}

void Training::exchange_average() {
  for (const int id : ids_) {
    std::vector<float>& average = average_[static_cast<std::size_t>(id)];
    std::swap_ranges(average.begin(), average.end(), weights(id).begin());
  }
}

std::map<std::string, double> Training::evaluate_average() {
  optimizer_->gather(ids_);
  exchange_average();
  const workloads::Workload::Evaluation mine = workload_->evaluate(rank_, size_);
  exchange_average();
  optimizer_->release(ids_);
  return means(mine);
}

std::int64_t Training::elements() const {
  return std::accumulate(parameters_.begin(), parameters_.end(), std::int64_t{0},
                         [](std::int64_t sum, const Parameter& p) { return sum + elements_of(p); });
}

std::optional<double> Training::clip_fraction() const {
  const bool clips = std::any_of(config_.groups.begin(), config_.groups.end(),
                                 [](const GroupConfig& g) { return g.clip_norm > 0; });
  if (!clips || taken_ == 0) return {};
  return static_cast<double>(clipped_) / static_cast<double>(taken_);
}

std::int64_t Training::items_per_step() const { return batch() * workload_->items_per_unit(); }

}  // namespace orthrus::cli
