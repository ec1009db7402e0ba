#include "runtime/runner/study_conflicts.hpp"

#include <algorithm>
#include <stdexcept>

#include "runtime/config_scalar.hpp"
#include "runtime/config_tree.hpp"
#include "runtime/runner/study_keys.hpp"

namespace orthrus::runner {
namespace {

using runtime::Origin;
using runtime::YamlNode;
using runtime::config_file::join;

class Conflicts {
 public:
  Conflicts(const Study& study, const Kept& kept, const YamlNode& root)
      : study_(study), kept_(kept), root_(root) {}

  std::vector<std::string> all() {
    conflicts();
    if (errors_.empty()) {
      conflicts_of_goals();
      conflicts_of_keep();
      conflicts_of_commands();
    }
    return std::move(errors_);
  }

 private:
  void error(const Origin& at, const std::string& path, const std::string& what) {
    errors_.push_back(at.str() + ": " + path + ": " + what);
  }

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

  const Study& study_;
  const Kept& kept_;
  const YamlNode& root_;
  std::vector<std::string> errors_;
};

}  // namespace

std::vector<std::string> conflicts_of(const Study& study, const Kept& kept, const YamlNode& root) {
  return Conflicts(study, kept, root).all();
}

}  // namespace orthrus::runner
