#include "runtime/cli/study_presets.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <orthrus/error.hpp>
#include <string_view>
#include <utility>
#include <variant>

#include "runtime/config_scalar.hpp"
#include "runtime/runner/expansion.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::cli {
namespace {

using runtime::config_file::shortest;

template <class T>
std::string list(const std::vector<T>& values) {
  return fmt::format("[{}]", fmt::join(values, ", "));
}

/// Schedules that decay would need a run for every number of steps.
std::string constant_schedules(const Config& config) {
  std::string text;
  for (std::size_t g = 0; g < config.groups.size(); ++g) {
    if (config.groups[g].schedule.kind != "constant")
      text += fmt::format("    groups.{}.schedule.kind: constant\n", g);
  }
  return text;
}

std::string critical_batch(const std::vector<PresetBase>& bases, const PresetOptions& options) {
  const Config& c = bases[0].config;
  std::vector<std::int64_t> batches = options.batches;
  for (std::int64_t k = -3; k <= 3 && options.batches.empty(); ++k) {
    const double batch = std::exp2(k) * static_cast<double>(c.train.batch);
    if (batch >= 1 && batch == std::floor(batch))
      batches.push_back(static_cast<std::int64_t>(batch));
  }
  const std::int64_t steps = options.steps > 0 ? options.steps : c.train.steps;
  return fmt::format(
      R"(# Critical batch size by steps to a target loss: for every batch size the rate is tuned with two
# seeds, and what is fitted comes from three others.
orthrus_study: 1
name: {}
base: {}
search:
  metric:
    name: val_loss
    target: {}
  parameters:
    batch_size: {{values: {}}}
    lr:                                # sqrt(2) apart, about the base's rate scaled with the batch
      center: {{rule: sqrt, at: {{batch_size: {}}}, value: {}}}
      multipliers: {{sqrt2: [-2, 2]}}
      extend_on_edge: 3
    seed: {{tune: [0, 1], report: [10, 11, 12]}}
{}budget: {{max_examples: {}}}         # four times the base's: large batches need more of them
eval: {{every_frac: 0.005}}            # of the budget; the target is to be passed after many of them
analysis:
  items:
    - {{fit: hyper, definitions: [mccandlish, overhead20], b_ref: {}}}
    - {{fit: lr_exponent}}
)",
      options.name, bases[0].file,
      options.target ? shortest(*options.target)
                     : "none   # to be filled in: what the base reaches with a constant rate",
      list(batches), c.train.batch, shortest(base_rate(c)), constant_schedules(c),
      4 * steps * c.train.batch, batches.empty() ? c.train.batch : batches.front());
}

std::string branches(const std::vector<PresetBase>& bases, const PresetOptions& options) {
  const Config& c = bases[0].config;
  std::vector<std::int64_t> batches = options.batches;
  for (const std::int64_t k : {1, 2, 3, 4, 6, 8, 12, 16}) {
    if (options.batches.empty()) batches.push_back(k * c.train.batch);
  }
  std::int64_t whole = c.train.batch;  // a number of batches of every branch
  for (const std::int64_t batch : batches) whole = std::lcm(whole, batch);
  const std::int64_t least = 20 * *std::max_element(batches.begin(), batches.end());
  return fmt::format(
      R"(# Critical batch size at a point of a run: branches leave it there with larger batches, see the
# same examples, and the largest one that loses nothing counts (arXiv:2505.23971).
orthrus_study: 1
name: {}
base: {}
branch: {{steps: {}, batch: {}}}         # the run they leave, trained once for every seed
search:
  metric: {{name: val_loss}}
  parameters:
    batch_size: {{values: {}}}
    lr: {}                             # of the run; of a branch times sqrt(k), of sgd times k
    seed: {{values: [1, 2, 3]}}
{}budget: {{max_examples: {}}}           # of every branch: 20 steps of the largest one
eval: {{every_frac: 0.25}}
analysis:
  items:
    - {{fit: local_cbs, epsilon: 0.01}}  # or two standard errors, where they are more
)",
      options.name, bases[0].file, options.steps > 0 ? options.steps : c.train.steps, c.train.batch,
      list(batches), shortest(base_rate(c)), constant_schedules(c),
      (least + whole - 1) / whole * whole);
}

std::string learning_rate(const std::vector<PresetBase>& bases, const PresetOptions& options) {
  const Config& c = bases[0].config;
  return fmt::format(
      R"(# The best learning rate, and how wide the range around it is.
orthrus_study: 1
name: {}
base: {}
search:
  metric: {{name: val_loss}}
  parameters:
    lr:
      center: {{value: {}}}
      multipliers: {{log2: [-2, 2]}}     # factors of two
      extend_on_edge: 3
    seed: {{tune: [0, 1], report: [10, 11, 12]}}
budget: {{max_steps: {}}}
eval: {{every_frac: 0.1}}
)",
      options.name, bases[0].file, shortest(base_rate(c)),
      options.steps > 0 ? options.steps : c.train.steps);
}

std::string compare(const std::vector<PresetBase>& bases, const PresetOptions& options) {
  std::string files, rates;
  std::vector<std::string> words;
  std::int64_t steps = options.steps;
  for (const PresetBase& base : bases) {
    std::string word = base.config.name;
    for (int n = 2; std::find(words.begin(), words.end(), word) != words.end(); ++n)
      word = fmt::format("{}_{}", base.config.name, n);
    words.push_back(word);
    files += fmt::format("  {}: {}\n", word, base.file);
    rates +=
        fmt::format("{}{}: {}", rates.empty() ? "" : ", ", word, shortest(base_rate(base.config)));
    if (base.config.workload != bases[0].config.workload) {
      throw ConfigError(fmt::format("{}: workload.name: {} beside {}: losses that do not compare",
                                    base.file, base.config.workload, bases[0].config.workload));
    }
    if (options.steps == 0) steps = std::max(steps, base.config.train.steps);
  }
  return fmt::format(
      R"(# Recipes beside each other, each at its own best rate of as many tries, with seeds that chose
# nothing.
orthrus_study: 1
name: {}
bases:
{}search:
  metric: {{name: val_loss}}
  parameters:
    optimizer: {{values: {}}}
    lr:
      center: {{per: optimizer, value: {{{}}}}}
      multipliers: {{log2: [-2, 2]}}
      extend_on_edge: 2
    seed: {{tune: [0], report: [10, 11, 12]}}
budget: {{max_steps: {}}}
eval: {{every_frac: 0.1}}
)",
      options.name, files, list(words), rates, steps);
}

std::string strong_scaling(const std::vector<PresetBase>& bases, const PresetOptions& options) {
  return fmt::format(
      R"(# Strong scaling of a step: the same batch on more and more ranks, one trial at a time.
orthrus_study: 1
name: {}
base: {}
search:
  metric: {{name: val_loss}}
  parameters:
    ranks: {{values: {}}}
    seed: 1
budget: {{max_steps: {}}}
eval: {{every_frac: 1}}
stop: {{timed_to: 0.05}}               # the interval of the median step is below 5 % of it
execution: {{exclusive: true, order: by_index}}
)",
      options.name, bases[0].file, list(options.ranks), options.steps > 0 ? options.steps : 305);
}

std::string three_term(const std::vector<PresetBase>& bases, const PresetOptions& options) {
  const Config& c = bases[0].config;
  std::vector<std::int64_t> batches = options.batches, steps;
  const std::int64_t most = options.steps > 0 ? options.steps : c.train.steps;
  for (std::int64_t k = 0; k < 4; ++k) {
    if (const std::int64_t batch = (2 * c.train.batch) >> k; batch > 0 && options.batches.empty())
      batches.insert(batches.begin(), batch);
    if (const std::int64_t count = most >> k; count > 0) steps.insert(steps.begin(), count);
  }
  return fmt::format(
      R"(# The loss over batch size M and steps K, L = E + B/M^beta + C/K^gamma: each with its own rate, and with the
# schedule to its own end. The law is of the seeds that chose no rate:
#   grep '"role":"report"' studies/{0}/results.jsonl > cells.jsonl
#   orthrus study fit cells.jsonl --law three_term --x params.batch_size,steps --y final_val
orthrus_study: 1
name: {0}
base: {1}
search:
  metric: {{name: val_loss}}
  parameters:
    batch_size: {{values: {2}}}
    train.steps: {{values: {3}}}
    lr:
      center: {{rule: sqrt, at: {{batch_size: {4}}}, value: {5}}}
      multipliers: {{log2: [-1, 1]}}
      extend_on_edge: 2
    seed: {{tune: [0], report: [10, 11, 12]}}
budget: {{max_steps: {6}}}
eval: {{every_frac: 1}}                # at the ends alone
)",
      options.name, bases[0].file, list(batches), list(steps), c.train.batch,
      shortest(base_rate(c)), most);
}

/// What makes a workload wider, and what deeper.
struct Sizes {
  std::string_view workload;
  std::vector<std::pair<std::string_view, std::int64_t>> width;  ///< keys and their defaults
  std::pair<std::string_view, std::int64_t> depth;               ///< "": it has none
};

const Sizes& sizes_of(const PresetBase& base) {
  static const std::vector<Sizes> table{
      {"gpt", {{"width", 128}}, {"layers", 4}},
      {"residual_mlp_lm", {{"width", 256}, {"hidden", 1024}}, {"layers", 2}},
      {"residual_mlp", {{"d", 32}, {"width", 64}}, {"blocks", 4}},
      {"mlp", {{"hidden", 256}}, {"depth", 2}},
      {"convnet", {{"channels", 16}}, {"", 0}},
      {"noisy_quadratic", {{"rows", 32}, {"cols", 32}}, {"matrices", 2}},
      {"matrix_least_squares", {{"rows", 16}, {"cols", 16}}, {"", 0}},
  };
  for (const Sizes& row : table) {
    if (row.workload == base.config.workload) return row;
  }
  std::vector<std::string_view> known;
  for (const Sizes& row : table) known.push_back(row.workload);
  throw ConfigError(
      fmt::format("{}: workload.name: '{}' has no width that is known here; known: {}", base.file,
                  base.config.workload, fmt::join(known, ", ")));
}

/// The size of the base times each factor, in whole eights where that is what it is made of.
std::string scaled(const PresetBase& base, const std::pair<std::string_view, std::int64_t>& key,
                   const std::vector<double>& factors) {
  std::int64_t size = key.second;
  if (const auto own = base.config.workload_values.find(std::string(key.first));
      own != base.config.workload_values.end())
    size = static_cast<std::int64_t>(std::get<double>(own->second));
  const double unit = size % 8 == 0 && size >= 64 ? 8 : 1;
  std::vector<std::int64_t> values;
  for (const double factor : factors)
    values.push_back(static_cast<std::int64_t>(
        unit * std::max(1.0, std::round(static_cast<double>(size) * factor / unit))));
  return fmt::format("    workload.{}: {{values: {}}}\n", key.first, list(values));
}

/// All widths of a workload, and the names of what advances together.
std::string widths(const PresetBase& base, const std::vector<double>& factors,
                   std::vector<std::string>& together) {
  std::string text;
  for (const auto& key : sizes_of(base).width) {
    text += scaled(base, key, factors);
    together.push_back(fmt::format("workload.{}", key.first));
  }
  return text;
}

std::string lr_transfer(const std::vector<PresetBase>& bases, const PresetOptions& options) {
  const Config& c = bases[0].config;
  std::vector<std::string> together;
  const std::string parameters = widths(bases[0], {1, 2, 4}, together);
  const auto width = std::find_if(together.begin(), together.end(),
                                  [](const std::string& name) { return name.ends_with("width"); });
  const std::string& size = width == together.end() ? together.front() : *width;
  return fmt::format(
      R"(# Does the best rate stay where it is when the model becomes two and four times as wide? `study report` has
# how far it moves, in octaves: it passes with half of one between the ends; and what the narrowest model's
# rate costs the others. The rule under
# test is lmo.scale of the base; rates of other groups stay. `study check` says whether pre-activations are as
# large in all widths, after a few steps: ln rms over ln width within 0.1.
orthrus_study: 1
name: {}
base: {}
search:
  metric: {{name: val_loss}}
  parameters:
{}    batch_size: {}
    lr:
      center: {{value: {}}}
      multipliers: {{sqrt2: [-2, 2]}}
      extend_on_edge: 3
    seed: {{tune: [0, 1], report: [10, 11, 12]}}
  zip: [{}]
budget: {{max_steps: {}}}
eval: {{every_frac: 0.1}}
probes: {{coordinates: {{over: {}, steps: [1, 2, 5, 10]}}}}
analysis: {{items: [{{compare: lr_transfer, over: {}}}]}}
)",
      options.name, bases[0].file, parameters, c.train.batch, shortest(base_rate(c)),
      list(together), options.steps > 0 ? options.steps : c.train.steps, size, size);
}

std::string weak_scaling(const PresetBase& base, const PresetOptions& options,
                         std::vector<std::string> together, const std::string& parameters,
                         const char* what) {
  together.insert(together.begin(), "ranks");
  return fmt::format(
      R"(# Weak scaling of a step: {}, one trial at a time. `timing` in
# results.jsonl: optimizer_ms is the optimizer's step alone, on the slowest rank.
orthrus_study: 1
name: {}
base: {}
search:
  metric: {{name: val_loss}}
  parameters:
    ranks: {{values: {}}}
{}    seed: 1
  zip: [{}]
budget: {{max_steps: {}}}
eval: {{every_frac: 1}}
stop: {{timed_to: 0.05}}               # the interval of the median step is below 5 % of it
execution: {{exclusive: true, order: by_index}}
)",
      what, options.name, base.file, list(options.ranks), parameters, list(together),
      options.steps > 0 ? options.steps : 305);
}

std::string weak_scaling_depth(const std::vector<PresetBase>& bases, const PresetOptions& options) {
  const auto& depth = sizes_of(bases[0]).depth;
  if (depth.first.empty()) {
    throw ConfigError(bases[0].file + ": workload.name: '" + bases[0].config.workload +
                      "' has no depth to grow");
  }
  const std::vector<double> factors(options.ranks.begin(), options.ranks.end());
  std::string parameters = scaled(bases[0], depth, factors);
  return weak_scaling(bases[0], options, {fmt::format("workload.{}", depth.first)}, parameters,
                      "as many more layers as ranks, of one size");
}

std::string weak_scaling_width(const std::vector<PresetBase>& bases, const PresetOptions& options) {
  std::vector<double> factors;
  for (const std::int64_t ranks : options.ranks)
    factors.push_back(std::sqrt(static_cast<double>(ranks)));
  std::vector<std::string> together;
  const std::string parameters = widths(bases[0], factors, together);
  return weak_scaling(bases[0], options, together, parameters,
                      "matrices wider by the root of the number of ranks, rounded");
}

std::string random_features(const std::vector<PresetBase>& /*none*/, const PresetOptions& options) {
  return fmt::format(
      R"(# Where spectral descent is ahead: regression on ReLU features, whole batch, steps to a hundredth of the loss.
# With workload.activation=gated_silu it is ahead for the first of them alone (arXiv:2512.04299).
orthrus_study: 1
name: {}
task: {{builtin: random_features, outputs: 100, features: 100, inputs: 50, samples: 400}}
search:
  metric: {{name: relative_loss, target: 0.01}}
  parameters:
    optimizer: {{values: [sgd, muon]}}
    momentum: 0
    batch_size: 400
    lr:
      center: {{per: optimizer, value: {{sgd: 0.1, muon: 0.1}}}}
      multipliers: {{log2: [-2, 2]}}
      extend_on_edge: 3
    seed: {{tune: [0, 1], report: [10, 11, 12]}}
budget: {{max_steps: {}}}
eval: {{every_frac: 0.001}}            # every step
analysis:
  items: [{{compare: token_ratio, numerator: sgd, denominator: muon}}]
)",
      options.name, options.steps > 0 ? options.steps : 1000);
}

std::string matrix_sensing(const std::vector<PresetBase>& /*none*/, const PresetOptions& options) {
  return fmt::format(
      R"(# Which of the matrices that fit the measurements an optimizer finds: final_val is its nuclear norm, and the
# last evaluation of metrics.jsonl has relative_residual, stable_rank and operator_norm. Descent in the
# Frobenius norm finds the interpolant of least Frobenius norm; the least nuclear norm is known to `orthrus
# study reproduce matrix-sensing`.
orthrus_study: 1
name: {}
task: {{builtin: matrix_sensing, rows: 10, cols: 10, measurements: 50, rank: 2}}
search:
  metric: {{name: nuclear_norm}}
  parameters:
    optimizer: muon
    groups.0.lmo.norm: {{values: [spectral, frobenius]}}
    groups.0.lmo.scale: original
    groups.0.schedule.kind: cosine
    groups.0.schedule.final: 1.0e-6
    momentum: {{values: [0, 0.9]}}
    batch_size: 50
    lr: {{center: {{per: groups.0.lmo.norm, value: {{spectral: 0.05, frobenius: 0.16}}}}}}
    seed: {{range: [0, 9]}}
budget: {{max_steps: {}}}
eval: {{every_frac: 0.1}}
)",
      options.name, options.steps > 0 ? options.steps : 4000);
}

std::string imbalance(const std::vector<PresetBase>& /*none*/, const PresetOptions& options) {
  std::string points;
  for (const auto& [of, rate] :
       {std::pair("optimizer: sgd", 0.4),
        std::pair("optimizer: muon, groups.0.lmo.norm: spectral", 0.04),
        std::pair("optimizer: muon, groups.0.lmo.norm: frobenius", 0.04)}) {
    for (const double factor : {0.5, 1.0, 2.0})
      points += fmt::format("    - {{{}, lr: {}}}\n", of, shortest(factor * rate));
  }
  return fmt::format(
      R"(# Which classes are learnt first: ten, the first 20 times as frequent as the last, whole batch. Evaluations
# have majority_learnt, minority_learnt and rare_accuracy; val_loss weighs all classes alike. Beside sgd and
# muon the descent whose steps are as long, but along the gradient (norm frobenius). Rates are those of
# slow, steady descent: with larger ones a step or two fit everything.
orthrus_study: 1
name: {}
task: {{builtin: imbalanced_mixture, classes: 10, inputs: 64, noise: 0.2, imbalance: 20, samples: 2000}}
search:
  method: list
  metric: {{name: val_loss}}
  points:
{}  parameters:
    momentum: 0
    batch_size: 2000
    seed: {{values: [0, 1, 2]}}
budget: {{max_steps: {}}}
eval: {{every_frac: 0.02}}
)",
      options.name, points, options.steps > 0 ? options.steps : 100);
}

std::string noisy_quadratic(const std::vector<PresetBase>& /*none*/, const PresetOptions& options) {
  return fmt::format(
      R"(# Critical batch sizes on a noisy quadratic model, whose loss is exact: perfect scaling, then diminishing returns.
orthrus_study: 1
name: {}
task: {{builtin: noisy_quadratic, matrices: 4, rows: 16, cols: 16}}
search:
  metric: {{name: val_loss, target: 1}}
  parameters:
    optimizer: {{values: [sgd, muon]}}
    batch_size: {{log2: [2, 7]}}         # 4 … 128
    lr:
      center: {{rule: sqrt, at: {{batch_size: 16}}, per: optimizer, value: {{sgd: 0.07, muon: 0.05}}}}
      multipliers: {{sqrt2: [-2, 2]}}
      extend_on_edge: 3
    seed: {{tune: [0, 1], report: [10, 11, 12]}}
budget: {{max_examples: {}}}
eval: {{every_frac: 0.002}}
analysis:
  items:
    - {{fit: hyper, per: [optimizer], definitions: [mccandlish, overhead20], b_ref: 4}}
    - {{fit: lr_exponent, per: [optimizer]}}
    - {{compare: token_ratio, numerator: sgd, denominator: muon}}
)",
      options.name, options.steps > 0 ? 16 * options.steps : 12800);
}

std::string collectives(const std::vector<PresetBase>& /*none*/, const PresetOptions& options) {
  return fmt::format(
      R"(# What a message costs: every trial is a job that times one collective at one size. `orthrus study report` has latency
# and bandwidth of a ring, for each collective and number of ranks.
orthrus_study: 1
name: {0}
task:
  command: [mpirun, -np, "{{ranks}}", orthrus, bench, comm, --collective, "{{collective}}", --sizes, "{{bytes}}",
            --metrics, "{{metrics}}"]
search:
  metric: {{name: seconds}}
  parameters:
    ranks: {{values: {1}}}
    collective: {{values: [reduce_scatter, all_gather, all_to_all, all_reduce]}}
    bytes: {{log2: [4, 26, 2]}}          # of the whole buffer
execution: {{mode: subprocess, exclusive: true, order: by_index}}
)",
      options.name, list(options.ranks));
}

}  // namespace

const std::vector<Preset>& presets() {
  static const std::vector<Preset> table{
      {"cbs-steps-to-target", "critical batch size: steps to a target over batch sizes", 1,
       critical_batch},
      {"cbs-branch", "critical batch size at a point of a run: branches with larger batches", 1,
       branches},
      {"learning-rate", "the best rate and its plateau", 1, learning_rate},
      {"compare", "recipes at their best rates", 2, compare},
      {"three-term-law", "the loss over batch sizes and numbers of steps", 1, three_term},
      {"lr-transfer", "the best rate of a model two and four times as wide", 1, lr_transfer},
      {"strong-scaling", "times of a step over numbers of ranks", 1, strong_scaling},
      {"weak-scaling-depth", "as many more layers as ranks", 1, weak_scaling_depth},
      {"weak-scaling-width", "matrices wider by the root of the ranks", 1, weak_scaling_width},
      {"random-features", "where spectral descent is ahead of gradient descent", 0,
       random_features},
      {"matrix-sensing", "nuclear norms of what fits the measurements", 0, matrix_sensing},
      {"imbalance", "which classes are learnt first", 0, imbalance},
      {"nqm", "critical batch sizes on a noisy quadratic model", 0, noisy_quadratic},
      {"collectives", "what a message costs, by size and ranks", 0, collectives},
  };
  return table;
}

const Preset& find_preset(const std::string& name) {
  std::vector<std::string_view> known;
  for (const Preset& preset : presets()) {
    if (name == preset.name) return preset;
    known.emplace_back(preset.name);
  }
  throw ConfigError(fmt::format("study init {}: no such preset; there are: {}{}", name,
                                fmt::join(known, ", "), runtime::nearest_hint(name, known)));
}

double base_rate(const Config& config) {
  const std::optional<double> rate = runner::main_rate(config);
  if (!rate) throw ConfigError(config.source + ": groups: no rule has a rate to be swept");
  return *rate;
}

}  // namespace orthrus::cli
