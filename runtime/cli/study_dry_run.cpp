#include "runtime/cli/study_dry_run.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <vector>

#include "runtime/agree.hpp"
#include "runtime/cli/training.hpp"
#include "runtime/cli/trial.hpp"
#include "runtime/report.hpp"

namespace orthrus::cli {
namespace {

using runner::Json;
using runner::Trial;
using Clock = std::chrono::steady_clock;

/// What a few steps cost.
struct Measured {
  double example_s = 0;  ///< gradient of one example, on all ranks of the trial
  double step_s = 0;     ///< what every step costs beside
  double evaluation_s = 0;
  double parameters = 0;
  double items = 0;   ///< per example
  double memory = 0;  ///< bytes planned per rank
};

Measured measure(const runner::Study& study, const Config& base, const Trial& trial,
                 Communicator& group) {
  Training training(runner::trial_config(base, trial), group.duplicate("trial"),
                    group.duplicate("control"), Training::Trust::nobody);
  const auto since = [](Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  if (study.averages()) training.keep_average(study.ema_halflife_examples);
  const auto begin_of_evaluation = Clock::now();
  static_cast<void>(training.evaluate());
  if (study.averages()) static_cast<void>(training.evaluate_average());
  Measured out;
  out.evaluation_s = since(begin_of_evaluation);
  out.parameters = static_cast<double>(training.elements());
  out.items = static_cast<double>(training.items_per_step()) / static_cast<double>(trial.batch);
  out.memory = static_cast<double>(training.optimizer().memory().total());
  if (study.averages()) out.memory += sizeof(float) * out.parameters;
  const auto begin = Clock::now();
  // The first step pays for page faults.
  double gradient_ms = 0, step_ms = 0;
  int steps = 0;
  for (bool more = true; more && training.steps() < trial.steps;) {
    const Training::Step step = training.step([&]() -> Training::Word {
      return {steps >= 5 || since(begin) > 2, false, false};
    });
    more = !step.any.stop;
    if (training.steps() == 1 && trial.steps > 1) continue;
    ++steps;
    gradient_ms += step.gradient_ms;
    step_ms += step.step_ms;
  }
  const double taken = std::max(steps, 1);
  out.example_s = 1e-3 * gradient_ms / taken / static_cast<double>(trial.batch);
  out.step_s = 1e-3 * (step_ms - gradient_ms) / taken;
  return out;
}

double seconds_of(const runner::Expansion::Run& run, const Measured& m, double eval_every_frac) {
  const auto steps = static_cast<double>(run.steps);
  const double share = steps / static_cast<double>(run.trial->steps);
  return steps * (m.step_s + static_cast<double>(run.trial->batch) * m.example_s) +
         m.evaluation_s * std::min(steps, share / eval_every_frac);
}

/// Of each base run that branches leave, a trial that leaves it.
std::map<std::string, const Trial*> forks_of(const runner::Expansion& expansion) {
  std::map<std::string, const Trial*> forks;
  for (const Trial& trial : expansion.initial()) {
    if (!trial.fork.empty()) forks.emplace(trial.fork, &trial);
  }
  return forks;
}

std::string describe(const Trial& trial) {
  std::string line = trial.directory();
  for (const auto& [name, value] : trial.params.items())
    line += " " + name + "=" + (value.is_string() ? value.get<std::string>() : value.dump());
  return line + fmt::format(" | {} steps of {}", trial.steps, trial.batch);
}

void add_first(const runner::Expansion& expansion, Json& out) {
  out["first"] = Json::array();
  for (std::size_t i = 0; i < std::min<std::size_t>(5, expansion.initial().size()); ++i)
    out["first"].push_back(describe(expansion.initial()[i]));
}

void print_first(const Json& out) {
  for (const Json& line : out["first"]) fmt::print("  {}\n", line.get<std::string>());
  std::fflush(stdout);
}

Json dry_run_of_programs(const runner::Expansion& expansion, bool quiet) {
  Json out{{"schema", 1},
           {"study", expansion.study().name},
           {"trials", expansion.initial().size()},
           {"trials_most", expansion.most()},
           {"excluded", expansion.excluded()}};
  add_first(expansion, out);
  if (quiet) return out;
  fmt::print("{}\n", describe_size(expansion));
  print_first(out);
  return out;
}

}  // namespace

std::string describe_size(const runner::Expansion& expansion) {
  double examples = 0;
  for (const auto& [trial, steps] : expansion.runs())
    examples += static_cast<double>(steps * trial->batch);
  const runner::Study& study = expansion.study();
  const auto forks = std::ssize(forks_of(expansion));
  examples += static_cast<double>(forks * study.branch_steps * study.branch_batch);
  const std::int64_t trials = std::ssize(expansion.initial());
  std::string text = fmt::format("study {}: {} trials", expansion.study().name, trials);
  if (const auto runs = std::ssize(expansion.runs()); runs > trials)
    text += fmt::format(" in {} runs, each from the start to a rung", runs);
  if (expansion.most() > trials)
    text += fmt::format(", up to {} with what results add", expansion.most());
  if (forks > 0)
    text += fmt::format(" that leave {} base run{} of {} steps of {}", forks, forks == 1 ? "" : "s",
                        study.branch_steps, study.branch_batch);
  text += fmt::format("; {:.3g} examples", examples);
  if (expansion.excluded() > 0) text += fmt::format("; {} points excluded", expansion.excluded());
  if (expansion.equal() > 0) text += fmt::format("; {} equal ones left out", expansion.equal());
  return text;
}

Json dry_run(const runner::Study& study, const runner::Bases& bases,
             const runner::Expansion* expansion, Communicator& world, bool quiet) {
  std::map<std::string, Measured> measured;
  for (const auto& [word, base] : bases) {
    if (study.runs_command()) break;  // what a program costs is known to nobody
    std::string text;
    if (expansion != nullptr) {
      for (const Trial& trial : expansion->initial()) {
        if (text.empty() && trial.base == word) text = to_text({trial, 1});
      }
    }
    world.broadcast(text, 0);
    if (text.empty()) continue;
    const Trial trial = trial_task(text).trial;
    Communicator group = world.split(world.rank() < trial.ranks ? 0 : 1, world.rank(), "trial");
    runtime::agree(world, [&] {
      if (world.rank() < trial.ranks) measured[word] = measure(study, base, trial, group);
    });
  }
  if (expansion == nullptr) return nullptr;
  if (study.runs_command()) return dry_run_of_programs(*expansion, quiet);

  double total_s = 0, longest_s = 0, flops = 0, memory = 0, examples = 0;
  const std::vector<runner::Expansion::Run> runs = expansion->runs();
  for (const runner::Expansion::Run& run : runs) {
    const Measured& m = measured.at(run.trial->base);
    const double seconds = seconds_of(run, m, study.eval_every_frac);
    const auto of_trial = static_cast<double>(run.steps * run.trial->batch);
    total_s += seconds * static_cast<double>(run.trial->ranks);
    longest_s = std::max(longest_s, seconds);
    examples += of_trial;
    flops += 6 * m.parameters * m.items * of_trial;
    memory = std::max(memory, m.memory);
  }
  for (const auto& [id, trial] : forks_of(*expansion)) {
    const Measured& m = measured.at(trial->base);
    const auto steps = static_cast<double>(study.branch_steps),
               of_run = steps * static_cast<double>(study.branch_batch);
    const double seconds = steps * m.step_s + of_run * m.example_s;
    total_s += seconds * static_cast<double>(trial->ranks);
    longest_s = std::max(longest_s, seconds);
    examples += of_run;
    flops += 6 * m.parameters * m.items * of_run;
  }
  const int ranks = world.size() - (study.dedicated_scheduler ? 1 : 0);
  const std::int64_t groups =
      study.exclusive    ? 1
      : study.isolates() ? ranks
                         : std::max<std::int64_t>(ranks / expansion->initial()[0].ranks, 1);
  const double wall_s =
      std::max(total_s / static_cast<double>(groups * expansion->initial()[0].ranks), longest_s);
  Json out{{"schema", 1},
           {"study", study.name},
           {"trials", expansion->initial().size()},
           {"trials_most", expansion->most()},
           {"excluded", expansion->excluded()},
           {"runs", runs.size()},
           {"examples", examples},
           {"gradient_flops", flops},
           {"rank_seconds", total_s},
           {"wall_s", wall_s},
           {"groups", groups},
           {"memory_per_rank", memory}};
  add_first(*expansion, out);
  if (quiet) return out;
  fmt::print("{}\n", describe_size(*expansion));
  fmt::print(
      "predicted from a few steps: {} on {} group{} of {}, to the end of every trial of the file\n"
      "gradients: about {:.2g} flop (6 x parameters x items); planned memory {} per rank\n",
      runtime::format_seconds(wall_s), groups, groups == 1 ? "" : "s",
      expansion->initial()[0].ranks, flops, runtime::format_bytes(memory));
  print_first(out);
  return out;
}

}  // namespace orthrus::cli
