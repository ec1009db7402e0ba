#include "runtime/cli/study_presets.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <orthrus/error.hpp>
#include <string_view>

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
execution: {{exclusive: true, order: by_index}}
)",
      options.name, bases[0].file, list(options.ranks), options.steps > 0 ? options.steps : 30);
}

// Of the contract, and to come.
constexpr std::array<std::string_view, 9> not_there{
    "three-term-law",     "lr-transfer", "weak-scaling-depth",
    "weak-scaling-width", "collectives", "random-features",
    "matrix-sensing",     "imbalance",   "nqm"};

}  // namespace

const std::vector<Preset>& presets() {
  static const std::vector<Preset> table{
      {"cbs-steps-to-target", "critical batch size: steps to a target over batch sizes", 1,
       critical_batch},
      {"cbs-branch", "critical batch size at a point of a run: branches with larger batches", 1,
       branches},
      {"learning-rate", "the best rate and its plateau", 1, learning_rate},
      {"compare", "recipes at their best rates", 2, compare},
      {"strong-scaling", "times of a step over numbers of ranks", 1, strong_scaling},
  };
  return table;
}

const Preset& find_preset(const std::string& name) {
  std::vector<std::string_view> known;
  for (const Preset& preset : presets()) {
    if (name == preset.name) return preset;
    known.emplace_back(preset.name);
  }
  const bool to_come = std::find(not_there.begin(), not_there.end(), name) != not_there.end();
  throw ConfigError(fmt::format("study init {}: {}; there are: {}{}", name,
                                to_come ? "this preset is not there yet" : "no such preset",
                                fmt::join(known, ", "),
                                to_come ? "" : runtime::nearest_hint(name, known)));
}

double base_rate(const Config& config) {
  const std::optional<double> rate = runner::main_rate(config);
  if (!rate) throw ConfigError(config.source + ": groups: no rule has a rate to be swept");
  return *rate;
}

}  // namespace orthrus::cli
