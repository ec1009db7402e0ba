#include "runtime/runner/study_keys.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "runtime/config_scalar.hpp"
#include "runtime/config_tree.hpp"

namespace orthrus::runner {

using runtime::config_file::Overloaded;

const std::vector<Row>& rows() {
  static const std::vector<Row> table{
      {.path = "orthrus_study",
       .slot = &Study::schema,
       .doc = "version of the keys in this file; required",
       .min = 1,
       .max = 1},
      {.path = "name", .slot = &Study::name, .doc = "of the study's directory; required"},
      {.path = "description", .slot = &Study::description, .doc = "free text"},
      {.path = "base",
       .slot = &Study::base,
       .doc = "configuration of every trial, relative to this file"},
      {.path = "search.method",
       .slot = &Study::method,
       .doc = "every combination; draws; points one by one; every combination of which the best go "
              "on from rung to rung; every combination at the least size, then fewer and fewer "
              "around the best",
       .words = {"grid", "random", "list", "asha", "telescoping"}},
      {.path = "search.samples",
       .slot = &Study::samples,
       .doc = "methods random and asha: how many points are drawn",
       .max = 1e6},
      {.path = "search.seed",
       .slot = &Study::draw_seed,
       .doc = "methods random and asha: of the draws",
       .max = many},
      {.path = "search.early_terminate.min_examples",
       .slot = &Study::first_rung,
       .doc = "method asha: the first rung; the next ones are eta times as far",
       .max = many},
      {.path = "search.early_terminate.eta",
       .slot = &Study::eta,
       .doc = "method asha: of trials that differ in lr, seed and what is drawn alone, one of so "
              "many goes on; with seed: {tune, report} of their means, and the best is reported",
       .min = 2,
       .max = 1000},
      {.path = "search.metric.name",
       .slot = &Study::metric,
       .doc = "what is evaluated and compared"},
      {.path = "search.metric.goal",
       .slot = &Study::goal,
       .doc = "which way is better",
       .words = {"minimize", "maximize"}},
      {.path = "search.metric.target",
       .slot = &Study::target,
       .doc = "steps are counted until the metric is at most (maximize: at least) this",
       .min = -1e300,
       .max = 1e300,
       .none = "none"},
      {.path = "branch.steps",
       .slot = &Study::branch_steps,
       .doc = "a trial goes on from this step of a base run, with another batch, on the examples "
              "that come next; 0: none",
       .max = 1e12},
      {.path = "branch.batch",
       .slot = &Study::branch_batch,
       .doc = "of the base run; batch_size is a multiple of it",
       .max = many},
      {.path = "branch.rate",
       .slot = &Study::branch_rate,
       .doc = "how a branch's rate grows with its batch over the base run's, which lr is the rate "
              "of; auto: linear for sgd, else sqrt",
       .words = {"auto", "sqrt", "linear", "constant"}},
      {.path = "branch.rewarm_frac",
       .slot = &Study::branch_rewarm_frac,
       .doc = "part of a branch in which its rate rises linearly from 0, so that the jump of batch "
              "and rate is no shock; 0: none",
       .max = 1},
      {.path = "branch.optimizer_state",
       .slot = &Study::branch_state,
       .doc = "a branch goes on with moments and step count of the base run, or with its weights "
              "alone and no warm-up but rewarm_frac",
       .words = {"keep", "reset"}},
      {.path = "wsd_branch.horizons",
       .slot = &Study::decay_horizons,
       .doc =
           "numbers of steps that a decaying schedule is judged at: the budget, and half octaves "
           "below; the constant rate is trained once, and a branch decays to each; 0: none",
       .max = 40},
      {.path = "wsd_branch.decay_frac",
       .slot = &Study::decay_frac,
       .doc = "part of a horizon in which the rate decays, linearly",
       .min = 0.001,
       .max = 0.999},
      {.path = "wsd_branch.final",
       .slot = &Study::decay_final,
       .doc = "part of the rate that is left at the end",
       .max = 1},
      {.path = "budget.max_examples",
       .slot = &Study::max_examples,
       .doc = "per trial; 0: base's train.steps",
       .max = many},
      {.path = "budget.max_steps",
       .slot = &Study::max_steps,
       .doc = "per trial; 0: no limit of its own",
       .max = 1e12},
      {.path = "budget.max_seconds",
       .slot = &Study::max_seconds,
       .doc = "per trial, which then is censored, and no longer the same on any machine; 0: none",
       .max = 1e9},
      {.path = "budget.run_cap",
       .slot = &Study::run_cap,
       .doc = "a study of more trials is refused before it starts",
       .min = 1,
       .max = 1e6},
      {.path = "eval.every_frac",
       .slot = &Study::eval_every_frac,
       .doc = "evaluations are at most this part of a trial's steps apart",
       .min = 1e-6,
       .max = 1},
      {.path = "eval.on",
       .slot = &Study::eval_on,
       .doc = "which weights: with ema, metrics of the averaged ones are there as val_loss_ema",
       .words = {"raw", "ema"}},
      {.path = "eval.ema_halflife_examples",
       .slot = &Study::ema_halflife_examples,
       .doc = "weights of so many examples ago count half in the average",
       .max = many},
      {.path = "stop.on_target",
       .slot = &Study::stop_on_target,
       .doc = "a trial ends where it has reached the target"},
      {.path = "stop.timed_to",
       .slot = &Study::timed_to,
       .doc = "with execution.exclusive: a trial ends where the 95 % interval of its median "
              "optimizer time is below this share of it, after 30 timed steps or more; 0: never",
       .max = 1},
      {.path = "stop.diverged",
       .slot = &Study::diverged,
       .doc = "over loss, loss0 (the first step's) and step: a trial of which this holds has "
              "diverged"},
      {.path = "probes.gns.every",
       .slot = &Study::gns_every,
       .doc = "steps between noise scales (diagnostics.every_steps); 0: as the base says",
       .max = many},
      {.path = "probes.gns.source",
       .slot = &Study::gns_source,
       .doc = "noise between gradients of ranks and micro-batches, or between those of single "
              "examples in normalization layers (diagnostics.gns_source)",
       .words = {"gradients", "norm_layers"}},
      {.path = "probes.gns.geometry",
       .slot = &Study::gns_geometry,
       .doc = "norms of noise scales",
       .words = {"l2", "l1", "nuc"}},
      {.path = "probes.advisor",
       .slot = &Study::advisor,
       .doc = "which norm fits which matrix; auto: muon's steps change with it, wherever it looks",
       .words = {"off", "report", "advise", "auto"}},
      {.path = "probes.sharpness",
       .slot = &Study::sharpness_every,
       .doc = "steps between measurements of the loss's curvature along a step, on its own batch, "
              "which is passed twice more; 0: never",
       .max = many},
      {.path = "probes.coordinates.steps",
       .slot = &Study::coordinate_steps,
       .doc = "after so many steps: the root mean square of what each linear layer makes of its "
              "inputs, in the step that follows",
       .max = 1e12},
      {.path = "probes.coordinates.over",
       .slot = &Study::coordinates_over,
       .doc = "a size; `study check` says how those grow with it"},
      {.path = "probes.budget_frac",
       .slot = &Study::probe_budget_frac,
       .doc = "part of the time that probes may take (diagnostics.budget_frac)",
       .max = 1},
      {.path = "execution.ranks_per_trial",
       .slot = &Study::ranks_per_trial,
       .doc = "the parameter `ranks` sweeps it",
       .min = 1,
       .max = 1e6},
      {.path = "execution.max_parallel",
       .slot = &Study::max_parallel,
       .doc = "trials at a time",
       .min = 1,
       .max = 1e6,
       .none = "auto"},
      {.path = "execution.mode",
       .slot = &Study::mode,
       .doc = "trials share this job's ranks, or each is a job of its own that one of them starts "
              "and watches, so that it may crash: this program's, or task.command",
       .words = {"inprocess", "subprocess"}},
      {.path = "execution.launcher",
       .slot = &Study::launcher,
       .doc =
           "of such jobs of this program, with {ranks} filled in: [srun, -n, \"{ranks}\"]; empty: "
           "mpirun without binding where a trial wants several ranks"},
      {.path = "execution.max_retries",
       .slot = &Study::max_retries,
       .doc = "of a trial that failed",
       .max = 100},
      {.path = "execution.heartbeat_s",
       .slot = &Study::heartbeat_s,
       .doc = "between lines of the journal that say the study is alive; a program that is silent "
              "for four of them is ended, and its trial tried again",
       .min = 0.1,
       .max = 1e6},
      {.path = "execution.order",
       .slot = &Study::order,
       .doc = "by predicted cost, or as numbered",
       .words = {"longest_first", "by_index"}},
      {.path = "execution.exclusive",
       .slot = &Study::exclusive,
       .doc = "one trial at a time, so that times can be compared; results then have them"},
      {.path = "execution.dedicated_scheduler",
       .slot = &Study::dedicated_scheduler,
       .doc = "the first rank only schedules, and trains nothing"},
      {.path = "analysis.bootstrap.resamples",
       .slot = &Study::resamples,
       .doc = "behind an interval; 0: none",
       .max = 1e6},
      {.path = "analysis.bootstrap.kind",
       .slot = &Study::bootstrap_kind,
       .doc = "seeds within each batch size are drawn anew",
       .words = {"stratified"}},
      {.path = "analysis.bootstrap.level",
       .slot = &Study::bootstrap_level,
       .doc = "of intervals",
       .min = 0.5,
       .max = 0.999},
      {.path = "report.formats",
       .slot = &Study::report_formats,
       .doc = "what `study report` writes: the page, analysis/*.json, tables/*.csv, MLPerf's event "
              "log, figures/*.png (by rsvg-convert or inkscape)",
       .words = {"html", "json", "csv", "mllog", "png"}},
      {.path = "report.plots",
       .slot = &Study::report_plots,
       .doc = "figures of the report",
       .words = {"default", "none"}},
      {.path = "report.pdf",
       .slot = &Study::report_pdf,
       .doc = "report/report.pdf of the page, where weasyprint, wkhtmltopdf or chromium is",
       .words = {"if_available", "never"}},
  };
  return table;
}

std::span<const Special> specials() {
  static constexpr std::array table{
      Special{
          "task", "{builtin: NAME, sizes…} | {command: [PROGRAM, ARGUMENT…]}",
          "the workload and its sizes; or in `base`. With execution.mode: subprocess a program: "
          "{config}, {metrics}, {trial_dir}, {seed}, {ranks}, {steps}, {examples} and {NAME} of "
          "a parameter are filled in; it writes eval lines to {metrics}, and ends with 0, or "
          "with 75 to be run again"},
      Special{"bases", "{WORD: file}",
              "a configuration for each word of the parameter `optimizer`"},
      Special{
          "search.parameters",
          "{NAME: scalar | {values: […]} | {log2: [lo, hi, step]} | {range: [lo, hi, step]} | "
          "{distribution: uniform | log_uniform, min, max}}",
          "optimizer, batch_size, lr, seed, ranks, weight_decay, momentum, beta2, warmup_examples; "
          "names with dots are keys of `base`; others serve expressions. lr: {center: {rule: sqrt "
          "| "
          "linear | constant, at: {batch_size: N}, per: optimizer, value}, multipliers: {sqrt2: "
          "[lo, hi]}, extend_on_edge: 3}, or rule: surge with noise_scale: N, the batch of the "
          "largest rate. seed: {tune: […], report: […]}"},
      Special{"search.points", "[{NAME: scalar, …}, …]", "method list: the points"},
      Special{
          "search.telescope", "{over: NAME, of: [lr, …], points: [5, 3, 1], carry: {NAME: e}}",
          "method telescoping: the whole grid of `of` at the least value of `over`, then so many "
          "points of each around the best; a point goes on as it is, or as (ratio of `over`)^e "
          "times as much"},
      Special{"search.zip", "[[NAME, NAME], …]", "parameters whose values advance together"},
      Special{"search.exclude", "[expression, …]", "points that are left out"},
      Special{"search.keep", "{tau | lambda_eta: VALUE, momentum | beta2: {value, at}}",
              "from batch to batch: B/(lr*lambda*D), lr*lambda, half-lives in examples"},
      Special{"search.derive", "{NAME: expression}", "parameters that follow from others"},
      Special{"analysis.items", "[{fit | compare: NAME, per, definitions, …}]", "what is fitted"},
  };
  return table;
}

Words children(const std::string& section) {
  Words names;
  const auto add = [&](std::string_view path) {
    if (!section.empty()) {
      if (path.substr(0, section.size() + 1) != section + ".") return;
      path.remove_prefix(section.size() + 1);
    }
    path = path.substr(0, path.find('.'));
    if (std::find(names.begin(), names.end(), path) == names.end()) names.push_back(path);
  };
  for (const Row& row : rows()) add(row.path);
  for (const Special& special : specials()) add(special.path);
  return names;
}

Words words_of(const Row& row) {
  Words out;
  for (const std::string_view word : row.words) {
    if (!word.empty()) out.push_back(word);
  }
  return out;
}

Json value_of(const Row& row, const Study& study) {
  return std::visit(Overloaded{[&](std::int64_t Study::*p) -> Json {
                                 if (!row.none.empty() && study.*p == 0)
                                   return std::string(row.none);
                                 return study.*p;
                               },
                               [&](double Study::*p) -> Json {
                                 if (!row.none.empty() && std::isnan(study.*p)) return nullptr;
                                 return study.*p;
                               },
                               [&](auto p) -> Json { return study.*p; }},
                    row.slot);
}

std::vector<StudyKey> study_keys() {
  std::vector<StudyKey> keys;
  const Study defaults;
  for (const Row& row : rows()) {
    std::string type = runtime::config_file::join(words_of(row));
    if (type.empty()) {
      type = std::visit(Overloaded{[](bool Study::*) { return "true | false"; },
                                   [](std::int64_t Study::*) { return "whole number"; },
                                   [](double Study::*) { return "number"; },
                                   [](std::string Study::*) { return "text"; },
                                   [](std::vector<std::int64_t> Study::*) { return "list"; },
                                   [](std::vector<std::string> Study::*) { return "list"; }},
                        row.slot);
    }
    const Json value = value_of(row, defaults);
    keys.push_back({std::string(row.path), std::move(type),
                    value.is_string() ? value.get<std::string>() : value.dump(),
                    std::string(row.doc)});
  }
  for (const Special& special : specials()) {
    const std::string section(special.path.substr(0, special.path.find('.')));
    // Beside the keys of its section.
    const auto after = std::find_if(keys.rbegin(), keys.rend(), [&](const StudyKey& k) {
      return k.path.substr(0, k.path.find('.')) == section;
    });
    keys.insert(
        after == keys.rend() ? keys.begin() + 4 : after.base(),
        {std::string(special.path), std::string(special.type), "", std::string(special.doc)});
  }
  return keys;
}

}  // namespace orthrus::runner
