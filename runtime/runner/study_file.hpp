#pragma once
/// @file
/// Study: a study file, read as strictly as a configuration. One table of keys serves reading,
/// `study schema` and `study.resolved.json`; an unknown key is refused with its line and the
/// nearest known one.

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runtime/runner/expression.hpp"
#include "runtime/runner/identity.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::runner {

/// A rate about a centre that moves with the batch: `studies::scaled_lr` of value·2^e, for the
/// multipliers e.
struct Center {
  std::string rule = "constant";  ///< sqrt | linear | surge | constant
  double noise_scale = 0;         ///< of surge: the batch at which rates are largest
  double reference_batch = 0;     ///< `at: {batch_size: …}`; 0 where the rule is constant
  std::string per;                ///< the parameter whose words `values` has; empty: one value
  std::map<std::string, double> values;  ///< of each word; of "" without `per`
  double first = 0, last = 0, step = 0;  ///< e
};

/// One entry of `search.parameters`.
struct ParameterSpec {
  std::string name;
  std::vector<Json> values;  ///< one: fixed. Of `lr` with a centre: none
  std::optional<Center> center;
  std::int64_t extend_on_edge = 0;  ///< how often two values may be added beyond an end
  std::string distribution;         ///< of method random: uniform | log_uniform; empty: none
  double min = 0, max = 0;
  std::vector<std::int64_t> tune, report;  ///< of `seed`
  runtime::Origin origin;
};

/// Of method telescoping: a grid at the least size, and fewer points around the best at each next
/// one.
struct Telescope {
  std::string over;                           ///< the size; empty: the method is another one
  std::vector<std::string> of{"lr"};          ///< whose grid it is
  std::vector<std::int64_t> points{5, 3, 1};  ///< of each at the second size, the third, …
  std::map<std::string, double> carry;        ///< a point goes on as (size ratio)^carry; absent: 0
};

struct Study {
  std::int64_t schema = 1;
  std::string name, description;
  Json task = Json::object();                ///< {"builtin": …, sizes…}, or {"command": […]}
  std::vector<std::string> command;          ///< of a task that is a program; empty: it is none
  std::string base;                          ///< a configuration, beside the study file
  std::map<std::string, std::string> bases;  ///< of each word of the parameter `optimizer`

  std::string method = "grid";
  std::int64_t samples = 0, draw_seed = 0;
  std::int64_t first_rung = 0, eta = 3;  ///< of method asha: rungs at first_rung·eta^k examples
  Telescope telescope;
  std::string metric = "val_loss", goal = "minimize";
  double target = std::numeric_limits<double>::quiet_NaN();  ///< NaN: none
  std::vector<ParameterSpec> parameters;                     ///< in the order of the file
  std::vector<std::vector<std::string>> zip;
  std::vector<Json> points;  ///< of method list: values of several parameters each
  std::vector<Expression> exclude;
  std::vector<std::pair<std::string, Expression>> derive;

  std::int64_t max_examples = 0, max_steps = 0, run_cap = 1000;  ///< 0: no limit
  double max_seconds = 0;
  double eval_every_frac = 0.02, ema_halflife_examples = 0;
  std::vector<std::string> eval_on{"raw"};
  /// Trials leave a base run after so many of its steps, with batches that are multiples of its
  /// own; 0: they start at its beginning.
  std::int64_t branch_steps = 0, branch_batch = 0;
  std::string branch_rate = "auto";
  double branch_rewarm_frac = 0;      ///< of a branch, in which its rate rises from 0
  std::string branch_state = "keep";  ///< of the optimizer
  /// So many horizons, half octaves apart up to the budget, each reached by a branch that decays.
  std::int64_t decay_horizons = 0;
  double decay_frac = 0.2, decay_final = 0;
  [[nodiscard]] bool decays() const { return decay_horizons > 0; }
  bool stop_on_target = true;
  double timed_to = 0;  ///< a share of the median step; 0: trials do not end by their times
  std::string diverged = "loss > 10*loss0 || !isfinite(loss)";

  std::int64_t gns_every = 0;
  std::vector<std::string> gns_geometry{"l2"};
  std::string gns_source = "gradients";
  std::string advisor = "off";
  std::int64_t sharpness_every = 0;  ///< steps; 0: never
  double probe_budget_frac = 0.01;
  /// Steps after which pre-activations are measured, and the size that they must not depend on.
  std::vector<std::int64_t> coordinate_steps;
  std::string coordinates_over;
  /// Noise in the norms dual to those of sign and spectral steps?
  [[nodiscard]] bool asks_dual_noise() const {
    return gns_geometry != std::vector<std::string>{"l2"};
  }

  std::int64_t ranks_per_trial = 1, max_parallel = 0, max_retries = 2;
  std::string mode = "inprocess", order = "longest_first";
  std::vector<std::string>
      launcher;  ///< of jobs of their own; empty: mpirun, where they want ranks
  double heartbeat_s = 30;
  bool exclusive = false, dedicated_scheduler = false;

  Json analysis_items = Json::array();
  std::int64_t resamples = 2000;
  std::string bootstrap_kind = "stratified";
  double bootstrap_level = 0.95;
  std::vector<std::string> report_formats{"html", "json", "csv"};
  std::string report_plots = "default", report_pdf = "if_available";

  std::string source;  ///< the file's name, for messages

  [[nodiscard]] const ParameterSpec* find(const std::string& parameter) const;
  [[nodiscard]] bool has_target() const { return target == target; }
  /// A metric, turned so that less is better.
  [[nodiscard]] double loss_of(double metric_value) const {
    return goal == "maximize" ? -metric_value : metric_value;
  }
  /// Is a trial a program, and has it a configuration of this library?
  [[nodiscard]] bool runs_command() const { return !command.empty(); }
  /// Is every trial a process of its own, or a job of them?
  [[nodiscard]] bool isolates() const { return mode == "subprocess"; }
  [[nodiscard]] bool configures() const {
    return !runs_command() || !base.empty() || !bases.empty();
  }
  [[nodiscard]] bool halves() const { return method == "asha"; }
  [[nodiscard]] bool telescopes() const { return method == "telescoping"; }
  [[nodiscard]] bool branches() const { return branch_steps > 0; }
  [[nodiscard]] bool resets() const { return branch_state == "reset"; }
  /// Has `seed` two lists: rates are chosen with one and reported with the other?
  [[nodiscard]] bool tunes() const;
  /// Are averaged weights evaluated beside the trained ones?
  [[nodiscard]] bool averages() const;
};

/// @param overrides  `key.path=value` of the file's own keys; any other name is a parameter, with
///                   one value or several: `lr=0.01,0.02`.
/// @throws ConfigError  `file:line:column: key.path: what, and a hint`; all that is wrong at once.
[[nodiscard]] Study parse_study(const std::string& text, const std::string& source,
                                std::span<const std::string> overrides = {});
[[nodiscard]] Study load_study(const std::string& file,
                               std::span<const std::string> overrides = {});
/// With all defaults, keys as in the file: what study.resolved.json holds.
[[nodiscard]] Json resolved(const Study& study);
/// Dotted keys of which two resolved studies differ.
[[nodiscard]] std::vector<std::string> differences(const Json& a, const Json& b);

}  // namespace orthrus::runner
