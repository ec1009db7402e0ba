#include "runtime/runner/study_file.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <orthrus/error.hpp>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <variant>

#include "runtime/config_scalar.hpp"
#include "runtime/config_tree.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::runner {
namespace {

using runtime::Origin;
using runtime::YamlNode;
using runtime::config_file::join;
using runtime::config_file::Overloaded;
using runtime::config_file::Parsed;
using runtime::config_file::shortest;
using Kind = YamlNode::Kind;
using Words = std::vector<std::string_view>;

// ---- the table of keys --------------------------------------------------------------------------

using Slot =
    std::variant<bool Study::*, std::int64_t Study::*, double Study::*, std::string Study::*,
                 std::vector<std::string> Study::*, std::vector<std::int64_t> Study::*>;

struct Row {
  std::string_view path;
  Slot slot;
  std::string_view doc;
  double min = 0, max = 0;                     ///< of numbers; both 0: any
  std::array<std::string_view, 5> words = {};  ///< of texts and lists of them; none: any
  std::string_view none = "";                  ///< what an absent number is called
};

constexpr double many = 1e15;

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

/// Keys whose values have a form of their own, beside the table.
struct Special {
  std::string_view path, type, doc;
};
constexpr std::array specials{
    Special{"task", "{builtin: NAME, sizes…} | {command: [PROGRAM, ARGUMENT…]}",
            "the workload and its sizes; or in `base`. With execution.mode: subprocess a program: "
            "{config}, {metrics}, {trial_dir}, {seed}, {ranks}, {steps}, {examples} and {NAME} of "
            "a parameter are filled in; it writes eval lines to {metrics}, and ends with 0, or "
            "with 75 to be run again"},
    Special{"bases", "{WORD: file}", "a configuration for each word of the parameter `optimizer`"},
    Special{
        "search.parameters",
        "{NAME: scalar | {values: […]} | {log2: [lo, hi, step]} | {range: [lo, hi, step]} | "
        "{distribution: uniform | log_uniform, min, max}}",
        "optimizer, batch_size, lr, seed, ranks, weight_decay, momentum, beta2, warmup_examples; "
        "names with dots are keys of `base`; others serve expressions. lr: {center: {rule: sqrt | "
        "linear | constant, at: {batch_size: N}, per: optimizer, value}, multipliers: {sqrt2: "
        "[lo, hi]}, extend_on_edge: 3}, or rule: surge with noise_scale: N, the batch of the "
        "largest rate. seed: {tune: […], report: […]}"},
    Special{"search.points", "[{NAME: scalar, …}, …]", "method list: the points"},
    Special{"search.telescope", "{over: NAME, of: [lr, …], points: [5, 3, 1], carry: {NAME: e}}",
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

/// Keys directly below `section`, in the order of the tables.
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
  for (const Special& special : specials) add(special.path);
  return names;
}

template <std::size_t N>
Words nonempty(const std::array<std::string_view, N>& words) {
  Words out;
  for (const std::string_view word : words) {
    if (!word.empty()) out.push_back(word);
  }
  return out;
}

// ---- reading ------------------------------------------------------------------------------------

class Reader {
 public:
  explicit Reader(const YamlNode& root) : root_(root) {}

  Study read(const std::string& source) {
    study_.source = source;
    if (root_.find("orthrus_study") == nullptr) {
      error(root_.origin, "orthrus_study",
            root_.find("schema") != nullptr ? "is required; this is a configuration, not a study"
                                            : "is required: orthrus_study: 1");
      finish();
    }
    read_map(root_, "");
    if (study_.name.empty() && root_.find("name") == nullptr)
      error(root_.origin, "name", "is required");
    if (errors_.empty()) conflicts();
    if (errors_.empty()) {
      conflicts_of_goals();
      conflicts_of_keep();
      conflicts_of_commands();
    }
    finish();
    return std::move(study_);
  }

 private:
  void error(const Origin& at, const std::string& path, const std::string& what) {
    errors_.push_back(at.str() + ": " + (path.empty() ? "" : path + ": ") + what);
  }
  void finish() const {
    if (errors_.empty()) return;
    std::string message;
    for (const std::string& e : errors_) message += (message.empty() ? "" : "\n") + e;
    throw ConfigError(message);
  }
  void unknown(const Origin& at, const std::string& path, const std::string& key,
               const Words& known) {
    error(at, path, "unknown key; known: " + join(known) + runtime::nearest_hint(key, known));
  }
  bool expect(const YamlNode& node, Kind kind, const std::string& path, const std::string& what) {
    if (node.kind == kind) return true;
    error(node.origin, path, "expects " + what + ", found " + node.describe());
    return false;
  }

  void read_map(const YamlNode& map, const std::string& section) {
    if (!expect(map, Kind::map, section, "a mapping with " + join(children(section)))) return;
    for (std::size_t i = 0; i < map.keys.size(); ++i) {
      const std::string path = section.empty() ? map.keys[i] : section + "." + map.keys[i];
      const YamlNode& node = map.items[i];
      const auto row =
          std::find_if(rows().begin(), rows().end(), [&](const Row& r) { return r.path == path; });
      if (row != rows().end()) {
        read_row(*row, node);
      } else if (std::any_of(specials.begin(), specials.end(),
                             [&](const Special& s) { return s.path == path; })) {
        read_special(path, node);
      } else if (!children(path).empty()) {
        read_map(node, path);
      } else {
        unknown(map.key_origins[i], path, map.keys[i], children(section));
      }
    }
  }

  void read_row(const Row& row, const YamlNode& node) {
    const std::string path(row.path);
    std::visit(
        Overloaded{[&](bool Study::*flag) {
                     if (node.text == "true" || node.text == "false") {
                       study_.*flag = node.text == "true";
                     } else {
                       error(node.origin, path, "expects true or false, found " + node.describe());
                     }
                   },
                   [&](std::int64_t Study::*whole) {
                     if (!row.none.empty() && node.text == row.none) {
                       study_.*whole = 0;
                     } else if (const auto x = read_number(node, path, row.min, row.max, true)) {
                       study_.*whole = static_cast<std::int64_t>(*x);
                     }
                   },
                   [&](double Study::*real) {
                     if (!row.none.empty() && (node.text == row.none || node.kind == Kind::null)) {
                       study_.*real = std::numeric_limits<double>::quiet_NaN();
                     } else if (const auto x = read_number(node, path, row.min, row.max, false)) {
                       study_.*real = *x;
                     }
                   },
                   [&](std::string Study::*text) {
                     if (expect(node, Kind::scalar, path, "a text") && check_word(row, node))
                       study_.*text = node.text;
                   },
                   [&](std::vector<std::int64_t> Study::*list) {
                     if (!expect(node, Kind::list, path, "a list")) return;
                     (study_.*list).clear();
                     for (const YamlNode& item : node.items) {
                       if (const auto x = read_number(item, path, row.min, row.max, true))
                         (study_.*list).push_back(static_cast<std::int64_t>(*x));
                     }
                   },
                   [&](std::vector<std::string> Study::*list) {
                     if (!expect(node, Kind::list, path, "a list")) return;
                     (study_.*list).clear();
                     for (const YamlNode& item : node.items) {
                       if (expect(item, Kind::scalar, path, "a text") && check_word(row, item))
                         (study_.*list).push_back(item.text);
                     }
                   }},
        row.slot);
  }

  bool check_word(const Row& row, const YamlNode& node) {
    const Words known = nonempty(row.words);
    if (known.empty() || std::find(known.begin(), known.end(), node.text) != known.end())
      return true;
    error(node.origin, std::string(row.path),
          node.describe() + " is not known; known: " + join(known) +
              runtime::nearest_hint(node.text, known));
    return false;
  }

  std::optional<double> read_number(const YamlNode& node, const std::string& path, double min,
                                    double max, bool whole) {
    double x = 0;
    const bool plain = node.kind == Kind::scalar && !node.quoted &&
                       runtime::config_file::parse_real(node.text, x) == Parsed::ok;
    const bool any = min == 0 && max == 0;
    if (plain && (any || (x >= min && x <= max)) && (!whole || x == std::floor(x))) return x;
    error(node.origin, path,
          std::string("expects a ") + (whole ? "whole number" : "number") +
              (any           ? ""
               : max >= many ? " from " + shortest(min)
                             : " from " + shortest(min) + " to " + shortest(max)) +
              ", found " + node.describe());
    return {};
  }

  // ---- values with a form of their own ----------------------------------------------------------

  void read_special(const std::string& path, const YamlNode& node) {
    if (path == "task") {
      if (!expect(node, Kind::map, path, "{builtin: NAME, …}")) return;
      study_.task = to_json(node);
      if (const YamlNode* const command = node.find("command")) {
        read_command(node, *command);
      } else if (node.find("builtin") == nullptr) {
        unknown(node.origin, path, node.keys.empty() ? "" : node.keys.front(),
                {"builtin", "command"});
      }
    } else if (path == "bases") {
      if (!expect(node, Kind::map, path, "a file for each word of `optimizer`")) return;
      for (std::size_t i = 0; i < node.keys.size(); ++i) {
        if (expect(node.items[i], Kind::scalar, path + "." + node.keys[i], "a file"))
          study_.bases[node.keys[i]] = node.items[i].text;
      }
    } else if (path == "search.parameters") {
      if (!expect(node, Kind::map, path, "a mapping")) return;
      for (std::size_t i = 0; i < node.keys.size(); ++i) {
        ParameterSpec spec;
        spec.name = node.keys[i];
        spec.origin = node.key_origins[i];
        read_parameter(node.items[i], path + "." + spec.name, spec);
        study_.parameters.push_back(std::move(spec));
      }
    } else if (path == "search.points") {
      if (!expect(node, Kind::list, path, "a list of mappings")) return;
      for (const YamlNode& item : node.items) {
        if (expect(item, Kind::map, path, "{NAME: scalar, …}"))
          study_.points.push_back(to_json(item));
      }
    } else if (path == "search.telescope") {
      read_telescope(node, path);
    } else if (path == "search.zip") {
      if (!expect(node, Kind::list, path, "a list of lists of names")) return;
      for (const YamlNode& item : node.items) {
        if (!expect(item, Kind::list, path, "a list of names")) continue;
        std::vector<std::string> names;
        for (const YamlNode& name : item.items) names.push_back(name.text);
        study_.zip.push_back(std::move(names));
      }
    } else if (path == "search.exclude") {
      if (!expect(node, Kind::list, path, "a list of expressions")) return;
      for (const YamlNode& item : node.items) {
        if (auto e = read_expression(item, path)) study_.exclude.push_back(std::move(*e));
      }
    } else if (path == "search.keep") {
      read_keep(node, path);
    } else if (path == "search.derive") {
      if (!expect(node, Kind::map, path, "{NAME: expression}")) return;
      for (std::size_t i = 0; i < node.keys.size(); ++i) {
        if (auto e = read_expression(node.items[i], path + "." + node.keys[i]))
          study_.derive.emplace_back(node.keys[i], std::move(*e));
      }
    } else if (path == "analysis.items") {
      static const Words known{"fit",      "compare",   "per",  "definitions", "b_ref",
                               "group",    "epsilon",   "loss", "numerator",   "denominator",
                               "censored", "reference", "over"};
      if (!expect(node, Kind::list, path, "a list of mappings")) return;
      for (const YamlNode& item : node.items) {
        if (!expect(item, Kind::map, path, "{fit: NAME, …} or {compare: NAME, …}")) continue;
        for (std::size_t i = 0; i < item.keys.size(); ++i) {
          if (std::find(known.begin(), known.end(), item.keys[i]) == known.end())
            unknown(item.key_origins[i], path, item.keys[i], known);
        }
      }
      study_.analysis_items = to_json(node);
    }
  }

  void read_command(const YamlNode& task, const YamlNode& command) {
    const std::string path = "task.command";
    if (task.keys.size() > 1)
      error(task.origin, "task", "a command has no sizes; its arguments do: {NAME} of a parameter");
    if (!expect(command, Kind::list, path, "[PROGRAM, ARGUMENT, …]")) return;
    for (const YamlNode& word : command.items) {
      if (expect(word, Kind::scalar, path, "a text")) study_.command.push_back(word.text);
    }
    if (study_.command.empty()) error(command.origin, path, "expects [PROGRAM, ARGUMENT, …]");
  }

  void read_telescope(const YamlNode& node, const std::string& path) {
    static const Words known{"over", "of", "points", "carry"};
    if (!expect(node, Kind::map, path, "a mapping with " + join(known))) return;
    Telescope& telescope = study_.telescope;
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      const YamlNode& value = node.items[i];
      const std::string at = path + "." + node.keys[i];
      if (node.keys[i] == "over") {
        if (expect(value, Kind::scalar, at, "a parameter")) telescope.over = value.text;
      } else if (node.keys[i] == "of") {
        telescope.of.clear();
        if (!expect(value, Kind::list, at, "a list of parameters")) continue;
        for (const YamlNode& item : value.items) telescope.of.push_back(item.text);
      } else if (node.keys[i] == "points") {
        telescope.points.clear();
        if (!expect(value, Kind::list, at, "a list of numbers of points")) continue;
        for (const YamlNode& item : value.items) {
          if (const auto x = read_number(item, at, 1, 1000, true))
            telescope.points.push_back(static_cast<std::int64_t>(*x));
        }
        if (value.items.empty()) error(value.origin, at, "expects a number of points at least");
      } else if (node.keys[i] == "carry") {
        if (!expect(value, Kind::map, at, "{NAME: exponent}")) continue;
        for (std::size_t k = 0; k < value.keys.size(); ++k) {
          if (const auto x = read_number(value.items[k], at, -10, 10, false))
            telescope.carry[value.keys[k]] = *x;
        }
      } else {
        unknown(node.key_origins[i], path, node.keys[i], known);
      }
    }
  }

  /// What stays as it is from batch to batch, as expressions of `derive`.
  void read_keep(const YamlNode& node, const std::string& path) {
    static const Words known{"tau", "lambda_eta", "momentum", "beta2"};
    if (!expect(node, Kind::map, path, "a mapping with " + join(known))) return;
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      const std::string& key = node.keys[i];
      const YamlNode& value = node.items[i];
      const std::string at = path + "." + key;
      if (key == "tau" || key == "lambda_eta") {
        const auto x = read_number(value, at, 0, 1e6, false);
        if (!x) continue;
        const std::string number = runtime::config_file::shortest(*x);
        if (key == "tau" && !(*x > 0)) error(value.origin, at, "expects a number above 0");
        keep(node.key_origins[i], "weight_decay",
             key == "tau" ? "batch_size/(lr*" + number + "*max_examples)" : number + "/lr");
      } else if (key == "momentum" || key == "beta2") {
        if (!expect(value, Kind::map, at, "{value: BETA, at: {batch_size: N}}")) continue;
        std::optional<double> beta, batch;
        for (std::size_t k = 0; k < value.keys.size(); ++k) {
          const YamlNode* const size =
              value.keys[k] == "at" ? value.items[k].find("batch_size") : nullptr;
          if (value.keys[k] == "value") {
            beta = read_number(value.items[k], at + ".value", 0, 1, false);
          } else if (size != nullptr) {
            batch = read_number(*size, at + ".at.batch_size", 1, many, true);
          } else {
            unknown(value.key_origins[k], at, value.keys[k], {"value", "at"});
          }
        }
        if (!beta || !batch) {
          error(value.origin, at, "expects {value: BETA, at: {batch_size: N}}");
          continue;
        }
        keep(node.key_origins[i], key,
             runtime::config_file::shortest(*beta) + "^(batch_size/" +
                 runtime::config_file::shortest(*batch) + ")");
      } else {
        unknown(node.key_origins[i], path, key, known);
      }
    }
  }
  void keep(const runtime::Origin& origin, const std::string& name, const std::string& text) {
    kept_.emplace_back(origin, name);
    study_.derive.emplace(study_.derive.begin(), name, Expression(text));
  }

  std::optional<Expression> read_expression(const YamlNode& node, const std::string& path) {
    if (!expect(node, Kind::scalar, path, "an expression")) return {};
    try {
      return Expression(node.text);
    } catch (const std::invalid_argument& wrong) {
      error(node.origin, path, wrong.what());
      return {};
    }
  }

  void read_parameter(const YamlNode& node, const std::string& path, ParameterSpec& spec) {
    if (node.kind == Kind::scalar) {
      spec.values = {to_json(node)};
      return;
    }
    if (!expect(node, Kind::map, path, "a scalar or one of values, log2, range, distribution"))
      return;
    Words known{"values", "log2", "range", "distribution", "min", "max"};
    if (spec.name == "lr") known.insert(known.end(), {"center", "multipliers", "extend_on_edge"});
    if (spec.name == "seed") known.insert(known.end(), {"tune", "report"});
    int forms = 0;
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      const std::string& key = node.keys[i];
      const YamlNode& value = node.items[i];
      const std::string at = path + "." + key;
      if (std::find(known.begin(), known.end(), key) == known.end()) {
        unknown(node.key_origins[i], path, key, known);
      } else if (key == "values") {
        ++forms;
        if (!expect(value, Kind::list, at, "a list")) continue;
        for (const YamlNode& item : value.items) {
          if (expect(item, Kind::scalar, at, "a scalar")) spec.values.push_back(to_json(item));
        }
      } else if (key == "log2" || key == "range") {
        ++forms;
        for (const double x : read_range(value, at)) {
          const double y = key == "log2" ? std::exp2(x) : x;
          // A batch of 16 is a whole number.
          spec.values.push_back(y == std::floor(y) && std::abs(y) < many
                                    ? Json(static_cast<std::int64_t>(y))
                                    : Json(y));
        }
      } else if (key == "distribution") {
        ++forms;
        static const Words kinds{"uniform", "log_uniform"};
        spec.distribution = value.text;
        if (std::find(kinds.begin(), kinds.end(), value.text) == kinds.end()) {
          error(value.origin, at,
                value.describe() + " is not known; known: " + join(kinds) +
                    runtime::nearest_hint(value.text, kinds));
        }
      } else if (key == "min" || key == "max") {
        if (const auto x = read_number(value, at, 0, 0, false))
          (key == "min" ? spec.min : spec.max) = *x;
      } else if (key == "tune" || key == "report") {
        if (key == "tune") ++forms;
        if (!expect(value, Kind::list, at, "a list of seeds")) continue;
        for (const YamlNode& item : value.items) {
          if (const auto x = read_number(item, at, 0, many, true))
            (key == "tune" ? spec.tune : spec.report).push_back(static_cast<std::int64_t>(*x));
        }
      } else if (key == "center") {
        ++forms;
        if (!spec.center) spec.center.emplace();
        read_center(value, at, *spec.center);
      } else if (key == "multipliers") {
        if (!spec.center) spec.center.emplace();
        read_multipliers(value, at, *spec.center);
      } else if (key == "extend_on_edge") {
        if (const auto x = read_number(value, at, 0, 20, true))
          spec.extend_on_edge = static_cast<std::int64_t>(*x);
      }
    }
    if (forms != 1) {
      error(node.origin, path,
            "says how its values come about " + std::to_string(forms) + " times; once is needed");
    }
    if (node.find("multipliers") != nullptr && node.find("center") == nullptr)
      error(node.origin, path, "multipliers are of a center");
    if (spec.center && spec.center->step == 0) spec.center->step = 1;
    std::vector<Json> seen;
    for (const Json& value : spec.values) {
      if (std::find(seen.begin(), seen.end(), value) != seen.end())
        error(node.origin, path, value.dump() + " is there twice");
      seen.push_back(value);
    }
    if (!spec.distribution.empty() &&
        !(spec.min < spec.max && (spec.distribution == "uniform" || spec.min > 0))) {
      error(
          node.origin, path,
          "needs min < max" + std::string(spec.distribution == "uniform" ? "" : ", both above 0"));
    }
  }

  /// lo, lo + step, … up to hi. @param step  where the list has no third entry
  std::vector<double> read_range(const YamlNode& node, const std::string& path, double step = 1) {
    if (!expect(node, Kind::list, path, "[lo, hi] or [lo, hi, step]")) return {};
    std::vector<double> x;
    for (const YamlNode& item : node.items) {
      if (const auto number = read_number(item, path, 0, 0, false)) x.push_back(*number);
    }
    if (x.size() == 3) step = x[2];
    if ((x.size() != 2 && x.size() != 3) || !(step > 0) || x[1] < x[0] ||
        (x[1] - x[0]) / step > 1e4) {
      error(node.origin, path, "expects [lo, hi] or [lo, hi, step], with lo <= hi and step > 0");
      return {};
    }
    std::vector<double> out;
    // Multiples of the step, not sums: 0.1 ten times is not 1.
    for (int i = 0; x[0] + i * step <= x[1] + 1e-9 * step; ++i) out.push_back(x[0] + i * step);
    return out;
  }

  void read_center(const YamlNode& node, const std::string& path, Center& center) {
    static const Words known{"rule", "at", "noise_scale", "per", "value"};
    static const Words rules{"sqrt", "linear", "surge", "constant"};
    if (!expect(node, Kind::map, path, "a mapping with " + join(known))) return;
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      const YamlNode& value = node.items[i];
      const std::string at = path + "." + node.keys[i];
      if (node.keys[i] == "rule") {
        center.rule = value.text;
        if (std::find(rules.begin(), rules.end(), value.text) == rules.end())
          error(value.origin, at,
                value.describe() + " is not a rule; known: " + join(rules) +
                    runtime::nearest_hint(value.text, rules));
      } else if (node.keys[i] == "at") {
        const YamlNode* const batch = value.find("batch_size");
        if (batch == nullptr || value.keys.size() != 1) {
          error(value.origin, at, "expects {batch_size: N}");
        } else if (const auto x = read_number(*batch, at + ".batch_size", 1, many, true)) {
          center.reference_batch = *x;
        }
      } else if (node.keys[i] == "noise_scale") {
        if (const auto x = read_number(value, at, 1, many, false)) center.noise_scale = *x;
      } else if (node.keys[i] == "per") {
        center.per = value.text;
      } else if (node.keys[i] == "value") {
        const auto take = [&](const std::string& word, const YamlNode& number) {
          const auto x = read_number(number, at, 0, 0, false);
          if (x && !(*x > 0)) error(number.origin, at, "expects a number above 0");
          if (x) center.values[word] = *x;
        };
        if (value.kind == Kind::map) {
          for (std::size_t k = 0; k < value.keys.size(); ++k) take(value.keys[k], value.items[k]);
        } else {
          take("", value);
        }
      } else {
        unknown(node.key_origins[i], path, node.keys[i], known);
      }
    }
    if (center.values.empty()) error(node.origin, path, "value is required");
    if (center.rule != "constant" && center.reference_batch == 0)
      error(node.origin, path, "rule " + center.rule + " needs at: {batch_size: N}");
    if ((center.rule == "surge") != (center.noise_scale > 0))
      error(node.origin, path,
            "rule surge and noise_scale, the batch of the largest rate, come together");
    if (center.per.empty() != (center.values.count("") == 1))
      error(node.origin, path, "value is a number, or with `per` a number for each word");
  }

  /// Halves of an octave (sqrt2), or octaves (log2).
  void read_multipliers(const YamlNode& node, const std::string& path, Center& center) {
    static const Words known{"sqrt2", "log2"};
    if (!expect(node, Kind::map, path, "{sqrt2: [lo, hi]}")) return;
    if (node.keys.size() != 1 ||
        std::find(known.begin(), known.end(), node.keys[0]) == known.end()) {
      unknown(node.origin, path, node.keys.empty() ? "" : node.keys[0], known);
      return;
    }
    const double unit = node.keys[0] == "sqrt2" ? 0.5 : 1;
    const std::vector<double> e = read_range(node.items[0], path + "." + node.keys[0]);
    if (e.empty()) return;
    center.first = unit * e.front();
    center.last = unit * e.back();
    center.step = unit * (e.size() > 1 ? e[1] - e[0] : 1);
  }

  // ---- what no single key can see ---------------------------------------------------------------

  void conflicts() {
    const auto key = [&](const char* path) { return runtime::config_file::origin_of(root_, path); };
    const auto letters = study_.name.find_first_not_of(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.");
    if (study_.name.empty() || study_.name[0] == '.' || letters != std::string::npos ||
        study_.name.size() > 100)
      error(key("name"), "name", "becomes a directory: letters, digits, '-', '_' and '.'");
    try {
      const Expression diverged(study_.diverged);
      for (const std::string& name : diverged.names()) {
        static const Words known{"loss", "loss0", "step"};
        if (std::find(known.begin(), known.end(), name) == known.end())
          error(key("stop.diverged"), "stop.diverged",
                "'" + name + "' is no variable here; known: " + join(known));
      }
    } catch (const std::invalid_argument& wrong) {
      error(key("stop.diverged"), "stop.diverged", wrong.what());
    }
    if (std::find(study_.eval_on.begin(), study_.eval_on.end(), "raw") == study_.eval_on.end())
      error(key("eval.on"), "eval.on", "the trained weights always are evaluated: [raw, ema]");
    if (study_.timed_to > 0 && !study_.exclusive)
      error(key("stop.timed_to"), "stop.timed_to",
            "trials beside each other have no times of their own: execution: {exclusive: true}");
    if (study_.averages() && !(study_.ema_halflife_examples > 0))
      error(key("eval.on"), "eval.on", "ema needs eval.ema_halflife_examples");
    if (!study_.averages() && study_.metric.ends_with("_ema"))
      error(key("search.metric.name"), "search.metric.name",
            "is of averaged weights: eval: {on: [raw, ema], ema_halflife_examples: N}");
    if (!study_.base.empty() && !study_.bases.empty())
      error(key("bases"), "bases", "beside `base`: give one of them");
    bool random = false;
    for (const ParameterSpec& spec : study_.parameters) {
      const std::string path = "search.parameters." + spec.name;
      if (!spec.distribution.empty() && study_.method != "random" && !study_.halves())
        error(spec.origin, path, "draws need search.method: random or asha");
      if (!spec.distribution.empty() && study_.halves() && spec.name == "batch_size")
        error(spec.origin, path, "asha compares trials of one batch size: give values");
      random = random || !spec.distribution.empty();
      if (spec.tune.empty() != spec.report.empty())
        error(spec.origin, path, "tune and report come together");
      for (const std::int64_t seed : spec.report) {
        if (std::find(spec.tune.begin(), spec.tune.end(), seed) != spec.tune.end())
          error(spec.origin, path,
                "seed " + std::to_string(seed) +
                    " both tunes and reports: the chosen rate would be reported with its luck");
      }
    }
    if ((study_.method == "random" || random) && (!random || study_.samples == 0))
      error(key("search.method"), "search.method",
            "draws need search.samples and a parameter with a distribution");
    if (study_.halves() != (study_.first_rung > 0))
      error(key("search.method"), "search.method",
            "asha and search.early_terminate.min_examples come together");
    if (study_.halves() && study_.tunes() && study_.find("lr") != nullptr &&
        study_.find("lr")->extend_on_edge > 0)
      error(study_.find("lr")->origin, "search.parameters.lr.extend_on_edge",
            "asha has left most rates behind when the best one is known: give a wider grid");
    conflicts_of_telescopes();
    if ((study_.method == "list") != !study_.points.empty())
      error(key("search.method"), "search.method", "list and search.points come together");
    if (study_.branches()) {
      if (study_.branch_batch == 0)
        error(key("branch"), "branch.batch", "of the base run: is required with branch.steps");
      if (study_.max_examples == 0 || study_.max_steps > 0)
        error(key("budget"), "budget",
              "branches see the same examples: give max_examples, and no max_steps");
      if (study_.has_target())
        error(key("search.metric"), "search.metric.target", "branches have none");
      if (study_.tunes())
        error(study_.find("seed")->origin, "search.parameters.seed",
              "branches choose no rate, it follows from the base's: give values");
    } else if (study_.branch_batch > 0 || study_.branch_rewarm_frac > 0 || study_.resets()) {
      error(key("branch"), "branch.steps",
            "is required with branch.batch, branch.rewarm_frac and branch.optimizer_state");
    }
    if (study_.decays()) {
      const auto refuse = [&](const char* what) {
        error(key("wsd_branch"), "wsd_branch.horizons", what);
      };
      if (study_.branches()) refuse("and branch are two ways to leave a run; give one of them");
      if (study_.halves()) refuse("asha's rungs are of one schedule");
      if (study_.averages()) refuse("averages stand for a decay: eval.on: [raw]");
      if (study_.runs_command()) refuse("a program leaves no branches");
      if (study_.exclusive) refuse("are for losses; execution.exclusive is for times");
    }
    for (const auto& [path, asked] : {std::pair("probes.gns.geometry", study_.asks_dual_noise()),
                                      std::pair("probes.advisor", study_.advisor != "off")}) {
      if (asked && study_.gns_every == 0)
        error(runtime::config_file::origin_of(root_, path), path,
              "is looked at every probes.gns.every steps: say how often");
    }
    if (study_.coordinate_steps.empty() != study_.coordinates_over.empty() ||
        (!study_.coordinates_over.empty() && study_.find(study_.coordinates_over) == nullptr))
      error(key("probes.coordinates"), "probes.coordinates",
            "steps, and over: the parameter that is the size, come together");
    if (study_.tunes() && study_.find("lr") == nullptr)
      error(study_.find("seed")->origin, "search.parameters.seed",
            "tune chooses among rates: the parameter lr is missing");
  }

  void conflicts_of_telescopes() {
    const Telescope& telescope = study_.telescope;
    const auto refuse = [this](const char* path, const std::string& what) {
      error(runtime::config_file::origin_of(root_, path), path, what);
    };
    if (study_.telescopes() != !telescope.over.empty())
      refuse("search.telescope", "telescoping and search.telescope.over come together");
    if (!study_.telescopes()) return;
    const ParameterSpec* const over = study_.find(telescope.over);
    const bool sizes = over != nullptr && over->values.size() > 1 &&
                       std::all_of(over->values.begin(), over->values.end(), [](const Json& v) {
                         return v.is_number() && v.get<double>() > 0;
                       });
    if (!sizes)
      refuse("search.telescope", "over: '" + telescope.over + "' is no parameter with two sizes");
    if (std::find(telescope.of.begin(), telescope.of.end(), "lr") == telescope.of.end())
      refuse("search.telescope", "of: lr is always among them");
    for (const std::string& name : telescope.of) {
      const ParameterSpec* const spec = study_.find(name);
      const bool grid =
          spec != nullptr && name != telescope.over && spec->extend_on_edge == 0 &&
          (spec->center ? spec->center->last > spec->center->first : spec->values.size() > 1) &&
          std::all_of(spec->values.begin(), spec->values.end(),
                      [](const Json& v) { return v.is_number() && v.get<double>() > 0; });
      if (!grid) {
        refuse("search.telescope",
               "of: '" + name +
                   "' is no parameter with two positive values or more (and no extend_on_edge: the "
                   "grid moves with the best)");
      }
    }
    for (const auto& [name, exponent] : telescope.carry) {
      if (std::find(telescope.of.begin(), telescope.of.end(), name) == telescope.of.end())
        refuse("search.telescope", "carry: '" + name + "' is not in `of`");
    }
    if (study_.tunes())
      error(study_.find("seed")->origin, "search.parameters.seed",
            "telescoping takes means over its seeds at every size: give values");
  }

  void conflicts_of_keep() {
    for (const auto& kept : kept_) {
      const std::string& name = kept.second;
      const auto times = std::count_if(study_.derive.begin(), study_.derive.end(),
                                       [&](const auto& d) { return d.first == name; });
      if (times > 1 || study_.find(name) != nullptr)
        error(kept.first, "search.keep", "says what " + name + " is, and so does something else");
    }
  }

  void conflicts_of_goals() {
    if (study_.goal == "minimize") return;
    for (const Json& item : study_.analysis_items) {
      const std::string of = item.value("fit", item.value("compare", ""));
      if (of == "loss_law" || of == "local_cbs" || of == "data_efficiency") {
        error(runtime::config_file::origin_of(root_, "analysis.items"), "analysis.items",
              "'" + of + "' is of losses; goal: maximize has none");
      }
    }
  }

  /// Of trials that are programs: what a program does by itself, and what it cannot be made to do.
  void conflicts_of_commands() {
    const auto refuse = [this](const char* path, const std::string& what) {
      error(runtime::config_file::origin_of(root_, path), path, what);
    };
    if (study_.runs_command() && !study_.isolates())
      refuse("execution.mode", "a program (task.command) needs subprocess");
    if (!study_.launcher.empty() && (study_.runs_command() || !study_.isolates()))
      refuse(
          "execution.launcher",
          "is of trials of this program in execution.mode: subprocess; a program's own launcher is "
          "part of task.command");
    if (!study_.runs_command()) return;
    if (study_.halves())
      refuse("search.method", "asha takes trials from rung to rung; a program goes to its end");
    if (study_.branches()) refuse("branch", "a program leaves no base run");
    if (study_.averages())
      refuse("eval.on", "a program writes what it evaluates; search.metric.name says which counts");
    if (study_.gns_every > 0) refuse("probes.gns.every", "a program measures its own noise");
    if (study_.sharpness_every > 0)
      refuse("probes.sharpness", "a program measures its own curvature");
    if (!study_.coordinate_steps.empty())
      refuse("probes.coordinates", "a program measures its own activations");
  }

  const YamlNode& root_;
  std::vector<std::pair<runtime::Origin, std::string>> kept_;  // what `search.keep` derives
  Study study_;
  std::vector<std::string> errors_;
};

/// `lr=0.01,0.02` becomes search.parameters.lr: {values: [0.01, 0.02]}.
void apply_override(YamlNode& root, const std::string& text) {
  const auto equals = text.find('=');
  if (equals == std::string::npos)
    throw ConfigError("--set " + text + ": not of the form key=value", ExitCode::usage);
  const std::string key = text.substr(0, equals);
  const Words own = children("");
  if (std::find(own.begin(), own.end(), key.substr(0, key.find('.'))) != own.end()) {
    runtime::config_file::apply_override(root, text);
    return;
  }
  const std::string source = "--set " + text.substr(0, 200);
  const std::string value = text.substr(equals + 1);
  YamlNode given = value.find(',') == std::string::npos
                       ? runtime::parse_yaml_value(value, source)
                       : runtime::parse_yaml_value("[" + value + "]", source);
  if (given.kind == Kind::list) {
    YamlNode values;
    values.kind = Kind::map;
    values.keys = {"values"};
    values.key_origins = {given.origin};
    values.origin = given.origin;
    values.items = {std::move(given)};
    given = std::move(values);
  }
  // A name with dots is one key here.
  const auto child = [](YamlNode& map, const std::string& name, const Origin& at) -> YamlNode& {
    if (map.find(name) == nullptr) {
      map.kind = Kind::map;
      map.keys.push_back(name);
      map.key_origins.push_back(at);
      map.items.emplace_back();
      map.items.back().origin = at;
    }
    return *map.find(name);
  };
  const Origin at = given.origin;
  child(child(child(root, "search", at), "parameters", at), key, at) = std::move(given);
}

void put(Json& out, std::string_view path, Json value) {
  Json* at = &out;
  while (path.find('.') != std::string_view::npos) {
    at = &(*at)[std::string(path.substr(0, path.find('.')))];
    path.remove_prefix(path.find('.') + 1);
  }
  (*at)[std::string(path)] = std::move(value);
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

Json to_json(const ParameterSpec& spec) {
  if (spec.center) {
    const Center& c = *spec.center;
    Json center{{"rule", c.rule}};
    if (c.noise_scale > 0) center["noise_scale"] = c.noise_scale;
    if (c.reference_batch > 0) center["at"] = {{"batch_size", c.reference_batch}};
    if (c.per.empty()) {
      center["value"] = c.values.at("");
    } else {
      center["per"] = c.per;
      center["value"] = c.values;
    }
    return {{"center", std::move(center)},
            {"multipliers", {{"log2", {c.first, c.last, c.step}}}},
            {"extend_on_edge", spec.extend_on_edge}};
  }
  if (!spec.tune.empty()) return {{"tune", spec.tune}, {"report", spec.report}};
  if (!spec.distribution.empty())
    return {{"distribution", spec.distribution}, {"min", spec.min}, {"max", spec.max}};
  if (spec.values.size() == 1 && spec.extend_on_edge == 0) return spec.values.front();
  Json out{{"values", spec.values}};
  if (spec.name == "lr") out["extend_on_edge"] = spec.extend_on_edge;
  return out;
}

void compare(const Json& a, const Json& b, const std::string& path, std::vector<std::string>& out) {
  if (!a.is_object() || !b.is_object()) {
    if (canonical_json(a) != canonical_json(b)) out.push_back(path);
    return;
  }
  const auto below = [&](const std::string& key) { return path.empty() ? key : path + "." + key; };
  for (const auto& [key, value] : a.items()) {
    if (b.contains(key)) {
      compare(value, b[key], below(key), out);
    } else {
      out.push_back(below(key));
    }
  }
  for (const auto& [key, value] : b.items()) {
    if (!a.contains(key)) out.push_back(below(key));
  }
}

}  // namespace

const ParameterSpec* Study::find(const std::string& parameter) const {
  const auto found = std::find_if(parameters.begin(), parameters.end(),
                                  [&](const ParameterSpec& p) { return p.name == parameter; });
  return found == parameters.end() ? nullptr : &*found;
}

bool Study::tunes() const {
  const ParameterSpec* const seed = find("seed");
  return seed != nullptr && !seed->tune.empty();
}

bool Study::averages() const {
  return std::find(eval_on.begin(), eval_on.end(), "ema") != eval_on.end();
}

Study parse_study(const std::string& text, const std::string& source,
                  std::span<const std::string> overrides) {
  YamlNode root = runtime::parse_yaml(text, source);
  for (const std::string& override_text : overrides) apply_override(root, override_text);
  return Reader(root).read(source);
}

Study load_study(const std::string& file, std::span<const std::string> overrides) {
  try {
    return parse_study(runtime::read_file(file, static_cast<std::int64_t>(runtime::yaml_max_bytes)),
                       file, overrides);
  } catch (const DataError& error) {  // too large: what was given, not damaged data
    throw ConfigError(error.what());
  }
}

Json resolved(const Study& study) {
  Json out = Json::object();
  for (const Row& row : rows()) put(out, row.path, value_of(row, study));
  out["task"] = study.task;
  out["bases"] = study.bases;
  Json parameters = Json::object();
  for (const ParameterSpec& spec : study.parameters) parameters[spec.name] = to_json(spec);
  out["search"]["parameters"] = std::move(parameters);
  out["search"]["telescope"] = Json::object();
  if (study.telescopes()) {
    out["search"]["telescope"] = {{"over", study.telescope.over},
                                  {"of", study.telescope.of},
                                  {"points", study.telescope.points},
                                  {"carry", study.telescope.carry}};
  }
  out["search"]["points"] = study.points;
  out["search"]["zip"] = study.zip;
  out["search"]["exclude"] = Json::array();
  for (const Expression& e : study.exclude) out["search"]["exclude"].push_back(e.text());
  out["search"]["derive"] = Json::object();
  for (const auto& [name, e] : study.derive) out["search"]["derive"][name] = e.text();
  out["analysis"]["items"] = study.analysis_items;
  return out;
}

std::vector<std::string> differences(const Json& a, const Json& b) {
  std::vector<std::string> out;
  compare(a, b, "", out);
  return out;
}

std::vector<StudyKey> study_keys() {
  std::vector<StudyKey> keys;
  const Study defaults;
  for (const Row& row : rows()) {
    std::string type = join(nonempty(row.words));
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
  for (const Special& special : specials) {
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
