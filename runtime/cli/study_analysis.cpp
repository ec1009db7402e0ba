#include "runtime/cli/study_analysis.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <orthrus/error.hpp>
#include <set>
#include <stdexcept>
#include <string_view>
#include <tuple>

#include "runtime/cli/json_number.hpp"
#include "runtime/report_page.hpp"
#include "runtime/report_plots.hpp"
#include "runtime/runner/expression.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::cli {

using nlohmann::ordered_json;
using runtime::report::format_number;
using studies::CbsDefinition;
using studies::Cell;
using studies::Interval;
using studies::IntervalKind;
using studies::RateMetric;
using studies::StepsModel;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

std::string numbers_text(const std::vector<double>& values) {
  std::vector<std::string> texts;
  for (const double v : values) texts.push_back(format_number(v));
  return fmt::format("{}", fmt::join(texts, ", "));
}

ordered_json or_null(double value) {
  return std::isnan(value) ? ordered_json(nullptr) : json_number(value);
}

// ---- what the study file asks for ----

struct Item {
  std::string fit;  ///< hyper, hyper_alpha, three_term_inv, auto, lr_exponent, local_cbs; or empty:
  std::string numerator, denominator;  ///< a token ratio
  std::vector<CbsDefinition> definitions;
  double reference_batch = 256, overhead = 0.2;
  double epsilon = 0.01;
  std::string loss = "smoothed_loss";  ///< of local_cbs
};

/// Did its trials leave a base run?
bool branches(const StudyResults& study) { return number_of(study.setting("branch.steps")) > 0; }

[[noreturn]] void refuse(const StudyResults& study, const std::string& what) {
  throw DataError((study.directory / "study.resolved.json").string() + ": " + what);
}

std::string text_of(const ordered_json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

std::vector<std::string> texts_of(const ordered_json& object, const char* key) {
  std::vector<std::string> texts;
  const auto found = object.find(key);
  if (found == object.end() || !found->is_array()) return texts;
  for (const ordered_json& value : *found) {
    if (value.is_string()) texts.push_back(value.get<std::string>());
  }
  return texts;
}

/// Reads "overhead20" as an overhead of 20 %.
void add_definition(Item& item, const std::string& name, std::vector<StudyWarning>& warnings) {
  if (name == "mccandlish") {
    item.definitions.push_back(CbsDefinition::mccandlish);
  } else if (name == "token_optimal") {
    item.definitions.push_back(CbsDefinition::token_optimal);
  } else if (name.starts_with("overhead") && name.size() > 8 &&
             name.find_first_not_of("0123456789", 8) == std::string::npos && name.size() < 12) {
    item.definitions.push_back(CbsDefinition::overhead);
    item.overhead = std::stod(name.substr(8)) / 100;
  } else {
    warnings.push_back({"not_measured", fmt::format("definition {}: not one that a curve of steps "
                                                    "against batch gives; known: mccandlish, "
                                                    "overhead20, token_optimal",
                                                    runtime::quoted_for_message(name))});
  }
}

std::vector<Item> items_of(const StudyResults& study, std::vector<StudyWarning>& warnings) {
  static constexpr std::array<std::string_view, 8> fits{
      "hyper", "hyper_alpha", "three_term_inv", "three_term",
      "auto",  "lr_exponent", "local_cbs",      "loss_law"};
  const ordered_json& listed = study.setting("analysis.items");
  std::vector<Item> items;
  for (const ordered_json& entry : listed) {
    if (!entry.is_object()) refuse(study, "analysis.items: not a list of objects");
    Item item;
    item.fit = text_of(entry, "fit");
    if (const std::string compare = text_of(entry, "compare"); !compare.empty()) {
      if (compare != "token_ratio") {
        refuse(study, fmt::format("analysis.items: compare: {} is not known; known: token_ratio",
                                  runtime::quoted_for_message(compare)));
      }
      item.numerator = text_of(entry, "numerator");
      item.denominator = text_of(entry, "denominator");
    } else if (std::find(fits.begin(), fits.end(), item.fit) == fits.end()) {
      refuse(study, fmt::format("analysis.items: fit: {} is not known; known: {}",
                                runtime::quoted_for_message(item.fit), fmt::join(fits, ", ")));
    }
    // To one target, the three-term law of the loss is this law of the steps.
    if (item.fit == "three_term") item.fit = "three_term_inv";
    for (const std::string& name : texts_of(entry, "definitions")) {
      add_definition(item, name, warnings);
    }
    if (item.definitions.empty()) {
      item.definitions = {CbsDefinition::mccandlish, CbsDefinition::overhead,
                          CbsDefinition::token_optimal};
    }
    if (entry.contains("b_ref") && number_of(entry["b_ref"]) > 0) {
      item.reference_batch = number_of(entry["b_ref"]);
    }
    if (entry.contains("epsilon") && number_of(entry["epsilon"]) >= 0) {
      item.epsilon = number_of(entry["epsilon"]);
    }
    if (const std::string loss = text_of(entry, "loss"); loss == "final") {
      item.loss = "final_val";
    } else if (!loss.empty() && loss != "smoothed") {
      refuse(study, fmt::format("analysis.items: loss: {} is not known; known: smoothed, final",
                                runtime::quoted_for_message(loss)));
    }
    items.push_back(std::move(item));
  }
  if (items.empty() && branches(study)) {
    items.emplace_back().fit = "local_cbs";
  } else if (items.empty()) {
    Item hyper, rates, ratio;
    hyper.fit = "hyper";
    hyper.definitions = {CbsDefinition::mccandlish, CbsDefinition::overhead};
    rates.fit = "lr_exponent";
    items = {hyper, rates, ratio};
  }
  return items;
}

studies::Bootstrap bootstrap_of(const StudyResults& study) {
  studies::Bootstrap bootstrap;
  const double resamples = number_of(study.setting("analysis.bootstrap.resamples"));
  const double level = number_of(study.setting("analysis.bootstrap.level"));
  if (resamples >= 0 && resamples <= 1e6) bootstrap.resamples = static_cast<int>(resamples);
  if (level > 0 && level < 1) bootstrap.level = level;
  return bootstrap;
}

// ---- series ----

/// Parameters whose values are told apart: those that items name in `per`, and those that take
/// several values where all of these, batch, rate and seed are the same.
std::vector<std::string> series_keys(const StudyResults& study) {
  static const std::set<std::string> own{"batch_size", "lr", "seed"};
  std::vector<std::string> keys;
  const auto add = [&](const std::string& key) {
    const bool known = std::any_of(study.trials.begin(), study.trials.end(),
                                   [&](const StudyTrial& t) { return t.params.contains(key); });
    if (known && !own.contains(key) && std::find(keys.begin(), keys.end(), key) == keys.end()) {
      keys.push_back(key);
    }
  };
  add("optimizer");
  for (const ordered_json& item : study.setting("analysis.items")) {
    if (!item.is_object()) continue;
    for (const std::string& key : texts_of(item, "per")) add(key);
  }
  std::set<std::string> others;
  for (const StudyTrial& trial : study.trials) {
    for (const auto& entry : trial.params.items()) {
      if (!own.contains(entry.key())) others.insert(entry.key());
    }
  }
  for (const std::string& other : others) {
    std::map<std::string, std::string> values;
    for (const StudyTrial& trial : study.trials) {
      std::string place;
      for (const std::string& key : keys) place += trial.param_text(key) + "\n";
      for (const std::string& key : own) place += trial.param_text(key) + "\n";
      const std::string value = trial.param_text(other);
      if (values.emplace(place, value).first->second != value) {
        add(other);
        break;
      }
    }
  }
  return keys;
}

struct SeriesName {
  std::string optimizer, rest;
  [[nodiscard]] std::string label() const {
    if (optimizer.empty()) return rest.empty() ? "all" : rest;
    return rest.empty() ? optimizer : optimizer + ", " + rest;
  }
};
SeriesName name_of(const StudyTrial& trial, const std::vector<std::string>& keys) {
  SeriesName name;
  for (const std::string& key : keys) {
    if (key == "optimizer") {
      name.optimizer = trial.param_text(key);
    } else {
      name.rest += (name.rest.empty() ? "" : ", ") + key + "=" + trial.param_text(key);
    }
  }
  return name;
}

double loss_of(const StudyTrial& trial) {
  if (trial.state == "diverged" || trial.state == "pruned") return infinity;
  for (const char* key : {"final_val", "best_val"}) {
    if (const double loss = trial.number(key); std::isfinite(loss)) return loss;
  }
  return infinity;
}

double steps_of(const StudyTrial& trial) {
  const double steps = trial.number("steps_to_target");
  return steps > 0 ? steps : infinity;
}

// ---- warnings ----

class Warnings {
 public:
  explicit Warnings(std::vector<StudyWarning>& list) : list_(list) {}
  void add(const char* kind, std::string text) { list_.push_back({kind, std::move(text)}); }

  /// One line for all batches of a series that `wrong` holds for.
  template <class Wrong>
  void batches(const char* kind, const std::vector<Cell>& cells, const std::string& what,
               Wrong wrong) {
    std::vector<double> found;
    for (const Cell& cell : cells) {
      if (wrong(cell)) found.push_back(cell.batch);
    }
    if (found.empty()) return;
    add(kind, fmt::format("{}, batch {}: {}", cells.front().series, numbers_text(found), what));
  }

 private:
  std::vector<StudyWarning>& list_;
};

/// Batch sizes or optimizers that a parameter of the study file lists.
std::vector<std::string> listed_values(const ordered_json& parameter) {
  std::vector<std::string> out;
  if (!parameter.is_object()) return out;
  if (const auto values = parameter.find("values"); values != parameter.end()) {
    for (const ordered_json& v : *values) {
      out.push_back(v.is_string() ? v.get<std::string>() : v.dump());
    }
  }
  if (const auto log2 = parameter.find("log2");
      log2 != parameter.end() && log2->is_array() && log2->size() >= 2) {
    const double lo = number_of((*log2)[0]), hi = number_of((*log2)[1]);
    const double step = log2->size() > 2 ? number_of((*log2)[2]) : 1;
    for (double e = lo; step > 0 && e <= hi + 1e-9 && out.size() < 64; e += step) {
      out.push_back(fmt::format("{:.17g}", std::exp2(e)));
    }
  }
  return out;
}

/// Does `search.exclude` say so by optimizer and batch size alone? What asks for more leaves part
/// of a cell.
bool is_excluded(const StudyResults& study, const std::string& series, double batch) {
  const ordered_json& list = study.setting("search.exclude");
  if (!list.is_array()) return false;
  const auto variable = [&](const std::string& name) -> std::optional<runner::Value> {
    if (name == "batch_size") return batch;
    if (name == "optimizer") return series.substr(0, series.find(','));
    return {};
  };
  return std::any_of(list.begin(), list.end(), [&](const ordered_json& text) {
    const runner::Expression expression(text.get<std::string>());
    for (const std::string& name : expression.names()) {
      if (!study.setting("search.parameters." + name).is_null() && !variable(name)) return false;
    }
    try {
      return expression.truth(variable);
    } catch (const std::invalid_argument&) {
      return false;  // it asks for a name that is none here
    }
  });
}

void warn_of_cells(const StudyResults& study, const StudyAnalysis& analysis, Warnings& warn) {
  std::set<double> batches;
  for (const Cell& cell : analysis.cells) batches.insert(cell.batch);
  for (const std::string& value : listed_values(study.setting("search.parameters.batch_size"))) {
    if (const double batch = number_of(ordered_json::parse(value, nullptr, false)); batch > 0) {
      batches.insert(batch);
    }
  }
  for (const std::string& name : listed_values(study.setting("search.parameters.optimizer"))) {
    const bool there =
        std::any_of(analysis.series.begin(), analysis.series.end(),
                    [&](const std::string& s) { return s == name || s.starts_with(name + ", "); });
    if (!there) warn.add("missing_cells", name + ": no finished trial");
  }
  for (const std::string& series : analysis.series) {
    const std::vector<Cell> cells = analysis.of(series);
    std::vector<double> missing;
    for (const double batch : batches) {
      if (std::none_of(cells.begin(), cells.end(),
                       [&](const Cell& c) { return c.batch == batch; }) &&
          !is_excluded(study, series, batch)) {
        missing.push_back(batch);
      }
    }
    if (!missing.empty()) {
      warn.add("missing_cells",
               fmt::format("{}: no finished trial at batch {}", series, numbers_text(missing)));
    }
    for (const studies::GridEdge edge : {studies::GridEdge::low, studies::GridEdge::high}) {
      warn.batches("edge_optimum", cells,
                   fmt::format("the best learning rate is the {} one tried: the optimum may lie "
                               "beyond",
                               edge == studies::GridEdge::low ? "smallest" : "largest"),
                   [&](const Cell& c) { return c.choice.edge == edge; });
    }
    warn.batches("few_rates", cells, "fewer than 3 learning rates: no tuning curve",
                 [&](const Cell& c) { return c.rates.size() < 3 && !branches(study); });
    warn.batches("few_seeds", cells, "fewer than 3 seeds behind the reported value",
                 [](const Cell& c) { return !c.choice.censored && c.record.size() < 3; });
    warn.batches("selected_on_report", cells,
                 "reported by the seeds that chose the learning rate: values are too good",
                 [&](const Cell& c) { return !c.choice.censored && !c.fresh && !branches(study); });
    if (analysis.metric != RateMetric::steps_to_target) continue;
    const auto censored = [](const Cell& c) { return c.censored(); };
    warn.batches("censored", cells,
                 "the target was not reached at the chosen learning rate: right-censored, not part "
                 "of the fits",
                 censored);
    if (static_cast<double>(std::count_if(cells.begin(), cells.end(), censored)) >
        0.3 * static_cast<double>(cells.size())) {
      warn.add("censored_share", series + ": more than 30 % of the batch sizes are censored");
    }
    warn.batches("quantised", cells,
                 "the target is reached in fewer than 20 steps, a step is more than 5 %",
                 [](const Cell& c) { return !c.censored() && c.value < 20; });
  }
}

/// What only lines of results say.
void warn_of_trials(const StudyResults& study, const StudyAnalysis& analysis,
                    const std::vector<std::string>& keys, Warnings& warn) {
  std::size_t failed = 0, without = 0;
  std::map<std::string, std::set<double>> coarse;
  double epochs = 0;
  for (const StudyTrial& trial : study.trials) {
    failed += trial.result() ? 0 : 1;
    without += trial.param("batch_size") > 0 && trial.param("lr") > 0 ? 0 : 1;
    if (const double seen = trial.number("epochs_seen"); seen > epochs) epochs = seen;
    const double hi = trial.number("steps_to_target_hi"), lo = trial.number("steps_to_target_lo");
    // The interval of one evaluation: there were hi/(hi − lo) until the crossing.
    if (trial.role != studies::SeedRole::tune && hi > lo && hi < 10 * (hi - lo)) {
      coarse[name_of(trial, keys).label()].insert(trial.param("batch_size"));
    }
  }
  for (const auto& [series, batches] : coarse) {
    warn.add("coarse_evaluation",
             fmt::format("{}, batch {}: fewer than 10 evaluations before the target was reached",
                         series, numbers_text({batches.begin(), batches.end()})));
  }
  if (failed > 0) {
    warn.add("failed_trials",
             fmt::format("{} of {} trials failed and are left out", failed, study.trials.size()));
  }
  if (without > 0) {
    warn.add("not_cells",
             fmt::format("{} trials have no batch_size or no lr and belong to no cell", without));
  }
  if (epochs > 1) {
    warn.add("repeated_data", fmt::format("data was seen up to {} times, which moves the critical "
                                          "batch size",
                                          format_number(epochs)));
  }
  if (study.trials.empty()) warn.add("empty", "no trial has finished");
  if (std::isnan(analysis.target) && !study.trials.empty() && !branches(study)) {
    warn.add("no_target",
             "search.metric.target is not given: no steps to it, and no critical "
             "batch size; rates are judged by the loss");
  }
}

bool wide(const Interval& interval) { return interval.hi > 4 * interval.lo; }

void warn_of_fit(const SeriesSteps& fit, Warnings& warn) {
  const auto say = [&](const char* kind, const std::string& text) {
    warn.add(kind,
             fmt::format("{}, {}: {}", fit.series, studies::name_of(fit.study.fit.model), text));
  };
  const studies::StepsFit& law = fit.study.fit;
  if (!law.accepted()) {
    say("rms_log", fmt::format("RMS log residual {:.3g} is above 0.10", law.rms_log));
  }
  if (law.structured()) say("structured", "the residuals bend: the law is another one");
  if (fit.preferred != law.model) {
    say("rejected_by_aicc", fmt::format("AICc prefers {}", studies::name_of(fit.preferred)));
  }
  if (fit.study.kind == IntervalKind::residual) {
    say("residual_interval",
        "some cell has one seed: intervals are of residuals, and know nothing of the choice of "
        "learning rates");
  }
  if (fit.study.kind == IntervalKind::none) say("no_interval", "no intervals");
  for (const studies::CbsEstimate& cbs : fit.study.critical) {
    const std::string_view name = studies::name_of(cbs.definition);
    if (fit.study.kind != IntervalKind::none && wide(cbs.interval)) {
      say("wide_interval",
          fmt::format("inconclusive: the interval of {} is {} to {}", name,
                      format_number(cbs.interval.lo), format_number(cbs.interval.hi)));
    }
    const auto [least, most] =
        std::minmax_element(fit.study.batches.begin(), fit.study.batches.end());
    if (!(cbs.value >= *least && cbs.value <= *most)) {
      say("extrapolated",
          fmt::format("{} of {} lies outside the batch sizes that reached the "
                      "target, {} to {}",
                      name, format_number(cbs.value), format_number(*least), format_number(*most)));
    }
  }
}

// ---- fits ----

std::size_t parameters_of(StepsModel model) {
  return model == StepsModel::hyper ? 2 : model == StepsModel::hyper_alpha ? 3 : 4;
}
constexpr std::array models{StepsModel::hyper, StepsModel::hyper_alpha, StepsModel::three_term_inv};

void fit_steps(StudyAnalysis& analysis, const Item& item, const studies::Bootstrap& bootstrap,
               Warnings& warn) {
  for (const std::string& series : analysis.series) {
    const std::vector<Cell> cells = analysis.of(series);
    SeriesSteps fit;
    fit.series = series;
    fit.question = {{}, item.definitions, item.reference_batch, item.overhead, bootstrap};
    for (const StepsModel model : models) {
      if (item.fit == studies::name_of(model)) fit.question.model = model;
    }
    const auto there = static_cast<std::size_t>(
        std::count_if(cells.begin(), cells.end(), [](const Cell& c) { return !c.censored(); }));
    const std::size_t needed = 1 + parameters_of(fit.question.model.value_or(StepsModel::hyper));
    if (there < needed) {
      warn.add("too_few_points",
               fmt::format("{}: {} batch sizes reached the target, the law {} needs at least {}",
                           series, there, item.fit, needed));
      continue;
    }
    fit.study = study_steps(cells, fit.question);
    double least = infinity;
    for (const StepsModel model : models) {
      // Without a degree of freedom left AICc is infinite.
      if (there <= parameters_of(model) + 2) continue;
      const double aicc = studies::fit_steps(model, fit.study.batches, fit.study.steps).aicc;
      fit.rivals.emplace_back(model, aicc);
      if (aicc < least) fit.preferred = model;
      least = std::min(least, aicc);
    }
    if (fit.rivals.empty()) fit.preferred = fit.study.fit.model;
    warn_of_fit(fit, warn);
    analysis.steps.push_back(std::move(fit));
  }
}

void fit_rates(StudyAnalysis& analysis, const studies::Bootstrap& bootstrap, Warnings& warn) {
  for (const std::string& series : analysis.series) {
    const std::vector<Cell> cells = analysis.of(series);
    const auto there =
        std::count_if(cells.begin(), cells.end(), [](const Cell& c) { return !c.choice.censored; });
    if (there < 3) {
      warn.add("too_few_points", fmt::format("{}: {} batch sizes have a best learning rate, its "
                                             "law needs at least 3",
                                             series, there));
      continue;
    }
    SeriesRates rates{series, study_rates(cells, bootstrap)};
    const Interval p = rates.study.exponent;
    if (rates.study.kind != IntervalKind::none && p.lo < 0 && p.hi > 0) {
      warn.add("inconclusive", fmt::format("{}: the exponent of the learning rate may have either "
                                           "sign: {:.3g} to {:.3g}",
                                           series, p.lo, p.hi));
    }
    if (rates.study.bent && rates.study.bent->preferred) {
      warn.add("saturates", fmt::format("{}: AICc prefers learning rates that are constant from "
                                        "batch {} on; the exponent is of the batches below",
                                        series, format_number(rates.study.bent->knee)));
    }
    analysis.rates.push_back(std::move(rates));
  }
}

void fit_branches(StudyAnalysis& analysis, const StudyResults& study,
                  const std::vector<std::string>& keys, const Item& item, Warnings& warn) {
  for (const std::string& series : analysis.series) {
    SeriesBranches fit;
    fit.series = series;
    fit.loss = item.loss;
    std::map<double, std::map<std::int64_t, double>> losses;
    for (const StudyTrial& trial : study.trials) {
      const double batch = trial.param("batch_size"), seed = trial.param("seed");
      if (!trial.result() || !(batch > 0) || !(trial.number("fork_steps") > 0) ||
          name_of(trial, keys).label() != series) {
        continue;
      }
      fit.fork_steps = trial.number("fork_steps");
      fit.fork_batch = trial.number("fork_batch");
      const double loss = trial.number(item.loss.c_str());
      const bool ended = trial.state == "complete" && std::isfinite(loss);
      losses[batch][std::isfinite(seed) ? static_cast<std::int64_t>(seed) : 0] =
          ended ? loss : infinity;
    }
    for (const auto& [batch, of] : losses) {
      studies::Branch& branch = fit.branches.emplace_back();
      branch.batch = batch;
      for (const auto& [seed, loss] : of) branch.losses.push_back({seed, loss});
    }
    if (fit.branches.size() < 2) {
      warn.add("too_few_points", fmt::format("{}: {} branches, a local critical batch needs two",
                                             series, fit.branches.size()));
      continue;
    }
    if (fit.branches.front().batch != fit.fork_batch) {
      warn.add("missing_cells", fmt::format("{}: no branch goes on with the base's batch {}",
                                            series, format_number(fit.fork_batch)));
    }
    fit.local = studies::local_cbs(fit.branches, item.epsilon);
    if (fit.local.epsilon > item.epsilon) {
      warn.add("noisy",
               fmt::format("{}: two standard errors between branches are {:.2g}: what they "
                           "cannot tell apart counts as recovered",
                           series, fit.local.epsilon));
    }
    if (std::any_of(fit.branches.begin(), fit.branches.end(),
                    [](const studies::Branch& b) { return b.losses.size() < 2; })) {
      warn.add("no_interval", series + ": one seed does not say how noisy branches are");
    }
    analysis.branches.push_back(std::move(fit));
  }
}

/// RMS of ln L from which on a law of the loss is doubted.
constexpr double misses = 0.03;

/// Of the trials that report, at the rate their cell took.
void fit_laws(StudyAnalysis& analysis, const StudyResults& study,
              const std::vector<std::string>& keys, const studies::Bootstrap& bootstrap,
              Warnings& warn) {
  for (const std::string& series : analysis.series) {
    std::vector<LawRun> runs;
    for (const Cell& cell : analysis.of(series)) {
      for (const StudyTrial& trial : study.trials) {
        const bool reports = (trial.role == studies::SeedRole::report) == cell.fresh;
        if (!trial.result() || trial.state == "diverged" || !reports ||
            name_of(trial, keys).label() != series || trial.param("batch_size") != cell.batch ||
            cell.choice.censored ||
            std::abs(trial.param("lr") - cell.choice.lr) > 1e-9 * cell.choice.lr) {
          continue;
        }
        runs.push_back(law_run(study, trial, analysis.metric_name));
      }
    }
    const auto law = fit_law(series, runs, std::min(bootstrap.resamples, 100), bootstrap.level);
    if (!law) {
      warn.add("too_few_points",
               series + ": a law of the loss needs three batch sizes and ten evaluations");
      continue;
    }
    if (law->law.rms_log > misses) {
      warn.add("rms_log", fmt::format("{}: the law of the loss misses by {:.2g} (RMS of ln L): it "
                                      "holds at constant rates, after warm-up",
                                      series, law->law.rms_log));
    }
    analysis.laws.push_back(*law);
  }
}

void compare(StudyAnalysis& analysis, const std::vector<SeriesName>& names, const Item& item,
             double level, Warnings& warn) {
  bool found = false;
  for (const SeriesName& above : names) {
    for (const SeriesName& under : names) {
      if (above.rest != under.rest || above.optimizer == under.optimizer) continue;
      // Without names: the first one over each of the others.
      const bool asked = item.numerator.empty() ? above.optimizer == names.front().optimizer
                                                : above.optimizer == item.numerator &&
                                                      under.optimizer == item.denominator;
      if (!asked) continue;
      found = true;
      SeriesRatios ratios{above.label(), under.label(), {}};
      ratios.ratios =
          token_ratios(analysis.of(ratios.numerator), analysis.of(ratios.denominator), level);
      std::vector<double> open;
      for (const studies::TokenRatio& ratio : ratios.ratios) {
        if (!ratio.conclusive()) open.push_back(ratio.batch);
      }
      if (!open.empty()) {
        warn.add("inconclusive",
                 fmt::format("{} over {}, batch {}: which needs fewer examples is not decided",
                             ratios.numerator, ratios.denominator, numbers_text(open)));
      }
      analysis.ratios.push_back(std::move(ratios));
    }
  }
  if (!found && !item.numerator.empty()) {
    warn.add("missing_cells", fmt::format("token ratio of {} over {}: one of them has no trials",
                                          item.numerator, item.denominator));
  }
}

// ---- tables ----

std::string definition_name(const studies::CbsEstimate& cbs, double overhead) {
  return cbs.definition == CbsDefinition::overhead ? fmt::format("overhead{:.0f}", 100 * overhead)
                                                   : std::string(studies::name_of(cbs.definition));
}

ordered_json end_of(double value, bool known) { return known ? json_number(value) : nullptr; }

StudyTable critical_table(const StudyAnalysis& analysis) {
  StudyTable table{"critical_batch",
                   "Critical batch size",
                   "In examples, by the definition that stands beside it: they differ by factors.",
                   {"series", "law", "definition", "value", "lo", "hi", "interval", "least steps",
                    "RMS", "reading"},
                   {}};
  for (const SeriesSteps& fit : analysis.steps) {
    const bool known = fit.study.kind != IntervalKind::none;
    const auto row = [&](const ordered_json& definition, const ordered_json& value,
                         const Interval& interval, bool has, const std::string& reading) {
      table.rows.push_back(
          {fit.series, studies::name_of(fit.study.fit.model), definition, value,
           end_of(interval.lo, has), end_of(interval.hi, has), studies::name_of(fit.study.kind),
           json_number(fit.study.fit.parameters[0]), fit.study.fit.rms_log, reading});
    };
    if (fit.study.critical.empty()) {
      row(nullptr, nullptr, {}, false, "this law has no such point");
    }
    for (const studies::CbsEstimate& cbs : fit.study.critical) {
      const double most = *std::max_element(fit.study.batches.begin(), fit.study.batches.end());
      std::string reading = "measured";
      if (!known) {
        reading = "no interval";
      } else if (wide(cbs.interval)) {
        reading = "inconclusive: wide interval";
      } else if (cbs.value > most) {
        reading = "extrapolated";
      } else if (fit.preferred != fit.study.fit.model || !fit.study.fit.accepted()) {
        reading = "doubtful: the law does not fit";
      }
      row(definition_name(cbs, fit.question.overhead), json_number(cbs.value), cbs.interval, known,
          reading);
    }
  }
  for (const SeriesBranches& fit : analysis.branches) {
    const bool bounded = std::isfinite(fit.local.next);
    table.rows.push_back({fit.series, "branches", "recovery", json_number(fit.local.batch),
                          json_number(fit.local.batch), end_of(fit.local.next, bounded), "tried",
                          nullptr, nullptr,
                          bounded ? fmt::format("within {:.2g} of all smaller ones at step {:.0f}",
                                                fit.local.epsilon, fit.fork_steps)
                                  : "at least: no branch was too large"});
  }
  return table;
}

/// What each branch came to.
StudyTable branch_table(const StudyAnalysis& analysis) {
  StudyTable table{
      "branches",
      "Branches",
      "After as many examples from the fork on; a batch recovers where it loses at "
      "most epsilon to every smaller one.",
      {"series", "fork at", "batch", "loss", "over the least smaller", "epsilon", "seeds"},
      {}};
  for (const SeriesBranches& fit : analysis.branches) {
    double least = infinity;
    for (std::size_t k = 0; k < fit.branches.size(); ++k) {
      const double loss = fit.local.losses[k];
      table.rows.push_back(
          {fit.series, fit.fork_steps, fit.branches[k].batch, json_number(loss),
           k == 0 || std::isinf(least) ? ordered_json(nullptr) : json_number(loss - least),
           fit.local.epsilons[k], fit.branches[k].losses.size()});
      least = std::min(least, loss);
    }
  }
  return table;
}

StudyTable rate_table(const StudyAnalysis& analysis) {
  StudyTable table{
      "learning_rate",
      "Learning rate",
      "Best rate = factor × batch^exponent; plateau: octaves of rates within 10 % of "
      "the least steps, 1 % of the least loss, median over batches.",
      {"series", "exponent", "lo", "hi", "interval", "factor", "constant from", "plateau"},
      {}};
  for (const SeriesRates& rates : analysis.rates) {
    const bool known = rates.study.kind != IntervalKind::none;
    std::vector<double> plateaus;
    for (const Cell& cell : analysis.of(rates.series)) {
      if (!cell.choice.censored) plateaus.push_back(cell.choice.plateau_octaves);
    }
    std::sort(plateaus.begin(), plateaus.end());
    const bool bent = rates.study.bent && rates.study.bent->preferred;
    table.rows.push_back(
        {rates.series, rates.study.law.exponent, end_of(rates.study.exponent.lo, known),
         end_of(rates.study.exponent.hi, known), studies::name_of(rates.study.kind),
         rates.study.law.factor, bent ? json_number(rates.study.bent->knee) : ordered_json(nullptr),
         plateaus[plateaus.size() / 2]});
  }
  return table;
}

StudyTable ratio_table(const StudyAnalysis& analysis) {
  StudyTable table{
      "token_ratio",
      "Token ratio",
      "Examples to the target of the first over those of the second, paired by seed. "
      "A claim needs 3.09 standard errors of the pooled spread over seeds.",
      {"numerator", "denominator", "batch", "ratio", "lo", "hi", "pairs", "sigmas", "reading"},
      {}};
  for (const SeriesRatios& pair : analysis.ratios) {
    for (const studies::TokenRatio& r : pair.ratios) {
      const std::string& fewer = r.ratio > 1 ? pair.denominator : pair.numerator;
      const std::string reading = !r.conclusive() ? "inconclusive"
                                  : r.claimed()   ? fewer + " needs fewer"
                                                  : fewer + " needs fewer, below 3.09 sigma";
      table.rows.push_back({pair.numerator, pair.denominator, r.batch, json_number(r.ratio),
                            end_of(r.interval.lo, r.pairs >= 2),
                            end_of(r.interval.hi, r.pairs >= 2), r.pairs, r.sigmas, reading});
    }
  }
  return table;
}

std::string_view edge_name(studies::GridEdge edge) {
  return edge == studies::GridEdge::none ? "none" : edge == studies::GridEdge::low ? "low" : "high";
}

StudyTable cells_table(const StudyAnalysis& analysis) {
  StudyTable table{"cells",
                   "Cells",
                   "The rate each batch size took, and what the reporting seeds came to.",
                   {"series", "batch", "lr", "fitted lr", "edge", "plateau", "rates", "seeds",
                    "fresh", analysis.value_name()},
                   {}};
  for (const Cell& cell : analysis.cells) {
    const bool chosen = !cell.choice.censored;
    table.rows.push_back({cell.series, cell.batch,
                          chosen ? ordered_json(cell.choice.lr) : ordered_json(nullptr),
                          chosen ? ordered_json(cell.choice.fitted_lr) : ordered_json(nullptr),
                          edge_name(cell.choice.edge), cell.choice.plateau_octaves,
                          cell.rates.size(), cell.record.size(), cell.fresh ? "yes" : "no",
                          cell.censored() ? ordered_json("censored") : ordered_json(cell.value)});
  }
  return table;
}

StudyTable law_table(const StudyAnalysis& analysis) {
  StudyTable table{"loss_law",
                   "Law of the loss",
                   "E + B/M^beta + C/K^gamma over batch M and steps K, of all evaluations; M*: the "
                   "batch of least loss at D examples, M* = k D^p.",
                   {"series", "E", "B", "beta", "C", "gamma", "p", "p lo", "p hi", "D", "M*",
                    "M* lo", "M* hi", "RMS", "runs", "reading"},
                   {}};
  for (const SeriesLaw& fit : analysis.laws) {
    const auto lo = [](const std::optional<Interval>& i) {
      return i ? json_number(i->lo) : nullptr;
    };
    const auto hi = [](const std::optional<Interval>& i) {
      return i ? json_number(i->hi) : nullptr;
    };
    const studies::LossLaw& law = fit.law;
    table.rows.push_back({fit.series, law.irreducible, law.batch_factor, law.batch_exponent,
                          law.steps_factor, law.steps_exponent,
                          json_number(law.best_batch_exponent()), lo(fit.best_exponent),
                          hi(fit.best_exponent), fit.examples, json_number(fit.best_batch),
                          lo(fit.best), hi(fit.best), law.rms_log, fit.runs,
                          law.rms_log > misses ? "doubtful: the law does not fit"
                          : fit.measured()     ? "measured"
                                               : "outside the batches"});
  }
  return table;
}

/// Of a study that is judged by its losses.
StudyTable best_rate_table(const StudyAnalysis& analysis) {
  StudyTable table{
      "best_rate",
      "Best learning rate",
      "By the loss; plateau: octaves of rates within 1 % of the least loss.",
      {"series", "batch", "lr", "edge", "plateau", "rates", "seeds", analysis.value_name()},
      {}};
  for (const Cell& cell : analysis.cells) {
    if (cell.choice.censored || cell.rates.size() < 2) continue;
    table.rows.push_back({cell.series, cell.batch, cell.choice.lr, edge_name(cell.choice.edge),
                          cell.choice.plateau_octaves, cell.rates.size(), cell.record.size(),
                          json_number(cell.value)});
  }
  return table;
}

StudyTable trials_table(const StudyResults& study) {
  StudyTable table{"trials", "All trials", "As results.jsonl has them.", {}, {}};
  std::vector<std::string> params;
  for (const StudyTrial& trial : study.trials) {
    for (const auto& entry : trial.params.items()) {
      if (std::find(params.begin(), params.end(), entry.key()) == params.end()) {
        params.push_back(entry.key());
      }
    }
  }
  static constexpr std::array figures{"steps", "examples", "final_val", "best_val",
                                      "steps_to_target"};
  table.columns = {"index", "trial", "state", "role"};
  table.columns.insert(table.columns.end(), params.begin(), params.end());
  table.columns.insert(table.columns.end(), figures.begin(), figures.end());
  for (const StudyTrial& trial : study.trials) {
    std::vector<ordered_json> row{trial.index, trial.id, trial.state,
                                  trial.line.value("role", "only")};
    for (const std::string& key : params) {
      const auto found = trial.params.find(key);
      row.push_back(found == trial.params.end() ? ordered_json(nullptr) : *found);
    }
    for (const char* key : figures) row.push_back(or_null(trial.number(key)));
    table.rows.push_back(std::move(row));
  }
  return table;
}

}  // namespace

std::string shown(const ordered_json& cell) {
  if (cell.is_null()) return "-";
  if (cell.is_number()) return format_number(cell.get<double>());
  return cell.is_string() ? cell.get<std::string>() : cell.dump();
}

std::string table_text(const StudyTable& table) {
  std::vector<std::size_t> widths;
  for (const std::string& column : table.columns) widths.push_back(column.size());
  for (const auto& row : table.rows) {
    for (std::size_t c = 0; c < row.size(); ++c) {
      widths[c] = std::max(widths[c], shown(row[c]).size());
    }
  }
  std::string out = table.title + "\n";
  const auto line = [&](const auto& cell, const auto& numeric) {
    std::string text = " ";
    for (std::size_t c = 0; c < widths.size(); ++c) {
      text += numeric(c) ? fmt::format(" {:>{}} ", cell(c), widths[c])
                         : fmt::format(" {:<{}} ", cell(c), widths[c]);
    }
    text.erase(text.find_last_not_of(' ') + 1);
    out += text + "\n";
  };
  const auto numeric = [&](std::size_t c) {
    return std::any_of(table.rows.begin(), table.rows.end(),
                       [&](const auto& row) { return row[c].is_number(); });
  };
  line([&](std::size_t c) { return table.columns[c]; }, numeric);
  for (const auto& row : table.rows) line([&](std::size_t c) { return shown(row[c]); }, numeric);
  return out;
}

std::string table_csv(const StudyTable& table) {
  std::string out;
  const auto line = [&](std::size_t count, const auto& field) {
    for (std::size_t c = 0; c < count; ++c) out += (c > 0 ? "," : "") + field(c);
    out += "\n";
  };
  line(table.columns.size(),
       [&](std::size_t c) { return runtime::report::csv_field(table.columns[c]); });
  for (const auto& row : table.rows) {
    line(row.size(), [&](std::size_t c) {
      if (row[c].is_null()) return std::string();
      if (row[c].is_number_float()) return runtime::report::csv_number(row[c].get<double>());
      return runtime::report::csv_field(row[c].is_string() ? row[c].get<std::string>()
                                                           : row[c].dump());
    });
  }
  return out;
}

std::vector<Cell> StudyAnalysis::of(const std::string& name) const {
  std::vector<Cell> out;
  std::copy_if(cells.begin(), cells.end(), std::back_inserter(out),
               [&](const Cell& cell) { return cell.series == name; });
  return out;
}

const char* StudyAnalysis::value_name() const {
  return metric == RateMetric::loss ? metric_name.c_str() : "steps to target";
}

StudyAnalysis analyse(const StudyResults& study) {
  StudyAnalysis analysis;
  Warnings warn(analysis.warnings);
  for (const std::string& text : study.warnings) warn.add("cut_off", text);
  analysis.target = number_of(study.setting("search.metric.target"));
  analysis.metric = std::isnan(analysis.target) ? RateMetric::loss : RateMetric::steps_to_target;
  const ordered_json& metric = study.setting("search.metric.name");
  analysis.metric_name = metric.is_string() ? metric.get<std::string>() : "val_loss";
  const std::vector<Item> items = items_of(study, analysis.warnings);
  const studies::Bootstrap bootstrap = bootstrap_of(study);

  const std::vector<std::string> keys = series_keys(study);
  std::vector<studies::TrialOutcome> outcomes;
  std::vector<SeriesName> names;
  for (const StudyTrial& trial : study.trials) {
    const double batch = trial.param("batch_size"), lr = trial.param("lr");
    if (!trial.result() || !(batch > 0 && lr > 0 && std::isfinite(batch) && std::isfinite(lr))) {
      continue;
    }
    const SeriesName name = name_of(trial, keys);
    if (std::find(analysis.series.begin(), analysis.series.end(), name.label()) ==
        analysis.series.end()) {
      analysis.series.push_back(name.label());
      names.push_back(name);
    }
    const double seed = trial.param("seed");
    outcomes.push_back({name.label(), batch, lr,
                        std::isfinite(seed) ? static_cast<std::int64_t>(seed) : trial.index,
                        trial.role,
                        analysis.metric == RateMetric::loss ? loss_of(trial) : steps_of(trial)});
  }
  analysis.cells = studies::cells_of(outcomes, analysis.metric);
  warn_of_trials(study, analysis, keys, warn);
  warn_of_cells(study, analysis, warn);
  const bool steps = analysis.metric == RateMetric::steps_to_target;
  if (steps) analysis.spread = studies::seed_spread(analysis.cells);
  for (const Item& item : items) {
    if (item.fit == "local_cbs") {
      fit_branches(analysis, study, keys, item, warn);
    } else if (item.fit == "loss_law") {
      fit_laws(analysis, study, keys, bootstrap, warn);
    } else if (item.fit == "lr_exponent") {
      fit_rates(analysis, bootstrap, warn);
    } else if (!steps) {
      continue;  // said by `no_target`
    } else if (item.fit.empty()) {
      compare(analysis, names, item, bootstrap.level, warn);
    } else {
      fit_steps(analysis, item, bootstrap, warn);
    }
  }
  for (StudyTable table : {critical_table(analysis), branch_table(analysis), rate_table(analysis),
                           ratio_table(analysis), law_table(analysis)}) {
    if (!table.rows.empty()) analysis.verdicts.push_back(std::move(table));
  }
  if (StudyTable best = best_rate_table(analysis); !steps && !best.rows.empty()) {
    analysis.verdicts.push_back(std::move(best));
  }
  analysis.cell_table = cells_table(analysis);
  analysis.trial_table = trials_table(study);
  return analysis;
}

ordered_json analysis_json(const StudyResults& study, const StudyAnalysis& analysis) {
  ordered_json fits = ordered_json::array(), cells = ordered_json::array(),
               warnings = ordered_json::array();
  for (const SeriesSteps& fit : analysis.steps) {
    const studies::StepsFit& law = fit.study.fit;
    const bool known = fit.study.kind != IntervalKind::none;
    ordered_json row{{"t", "fit"},
                     {"model", studies::name_of(law.model)},
                     {"per", {{"series", fit.series}}},
                     {"S_min", json_number(law.parameters[0])}};
    if (law.model == StepsModel::hyper) row["E_min"] = json_number(law.parameters[1]);
    row["parameters"] = ordered_json::array();
    for (std::size_t i = 0; i < law.parameters.size(); ++i) {
      row["parameters"].push_back({{"value", json_number(law.parameters[i])},
                                   {"lo", end_of(fit.study.parameter_intervals[i].lo, known)},
                                   {"hi", end_of(fit.study.parameter_intervals[i].hi, known)}});
    }
    row["cbs_definitions"] = ordered_json::array();
    for (const studies::CbsEstimate& cbs : fit.study.critical) {
      row["cbs_definitions"].push_back({{"definition", definition_name(cbs, fit.question.overhead)},
                                        {"value", json_number(cbs.value)},
                                        {"lo", end_of(cbs.interval.lo, known)},
                                        {"hi", end_of(cbs.interval.hi, known)},
                                        {"unit", cbs.unit}});
    }
    if (!row["cbs_definitions"].empty()) row["cbs"] = row["cbs_definitions"].front();
    row["rms_log"] = law.rms_log;
    row["left_out_rms"] = law.left_out_rms;
    row["trend"] = json_number(law.trend);
    row["aicc"] = ordered_json::object();
    for (const auto& [model, aicc] : fit.rivals) {
      row["aicc"][std::string(studies::name_of(model))] = json_number(aicc);
    }
    row["preferred"] = studies::name_of(fit.preferred);
    row["n_points"] = fit.study.batches.size();
    row["batches"] = fit.study.batches;
    row["steps"] = fit.study.steps;
    row["log_residuals"] = law.log_residuals;
    row["ci_kind"] = studies::name_of(fit.study.kind);
    row["resamples"] = fit.question.bootstrap.resamples;
    row["level"] = fit.question.bootstrap.level;
    row["b_ref"] = fit.question.reference_batch;
    row["censored"] = fit.study.censored.size();
    row["censored_batches"] = fit.study.censored;
    fits.push_back(std::move(row));
  }
  for (const SeriesRates& rates : analysis.rates) {
    const bool known = rates.study.kind != IntervalKind::none;
    ordered_json row{{"t", "fit"},
                     {"model", "lr_exponent"},
                     {"per", {{"series", rates.series}}},
                     {"factor", rates.study.law.factor},
                     {"exponent",
                      {{"value", rates.study.law.exponent},
                       {"lo", end_of(rates.study.exponent.lo, known)},
                       {"hi", end_of(rates.study.exponent.hi, known)}}},
                     {"ci_kind", studies::name_of(rates.study.kind)},
                     {"rms_log", rates.study.law.rms_log},
                     {"batches", rates.study.batches},
                     {"lrs", rates.study.lrs}};
    if (rates.study.bent) {
      row["saturating"] = {{"knee", rates.study.bent->knee},
                           {"exponent", rates.study.bent->below.exponent},
                           {"aicc", json_number(rates.study.bent->below.aicc)},
                           {"preferred", rates.study.bent->preferred}};
    }
    fits.push_back(std::move(row));
  }
  for (const SeriesRatios& pair : analysis.ratios) {
    for (const studies::TokenRatio& r : pair.ratios) {
      fits.push_back({{"t", "fit"},
                      {"model", "token_ratio"},
                      {"numerator", pair.numerator},
                      {"denominator", pair.denominator},
                      {"batch_size", r.batch},
                      {"ratio", json_number(r.ratio)},
                      {"lo", end_of(r.interval.lo, r.pairs >= 2)},
                      {"hi", end_of(r.interval.hi, r.pairs >= 2)},
                      {"pairs", r.pairs},
                      {"sigmas", r.sigmas},
                      {"conclusive", r.conclusive()},
                      {"claimed", r.claimed()}});
    }
  }
  for (const SeriesBranches& fit : analysis.branches) {
    const bool bounded = std::isfinite(fit.local.next);
    ordered_json row{{"t", "fit"},
                     {"model", "local_cbs"},
                     {"per", {{"series", fit.series}}},
                     {"cbs",
                      {{"definition", "recovery"},
                       {"value", json_number(fit.local.batch)},
                       {"lo", json_number(fit.local.batch)},
                       {"hi", end_of(fit.local.next, bounded)},
                       {"unit", "examples"}}},
                     {"epsilon", fit.local.epsilon},
                     {"loss", fit.loss},
                     {"fork_steps", fit.fork_steps},
                     {"fork_batch", fit.fork_batch},
                     {"branches", ordered_json::array()}};
    for (std::size_t k = 0; k < fit.branches.size(); ++k) {
      ordered_json branch{{"batch_size", fit.branches[k].batch},
                          {"loss", json_number(fit.local.losses[k])},
                          {"epsilon", fit.local.epsilons[k]},
                          {"seeds", ordered_json::array()}};
      for (const studies::SeedValue& seed : fit.branches[k].losses) {
        branch["seeds"].push_back({{"seed", seed.seed}, {"value", json_number(seed.value)}});
      }
      row["branches"].push_back(std::move(branch));
    }
    fits.push_back(std::move(row));
  }
  for (const SeriesLaw& fit : analysis.laws) {
    const auto interval = [](double value, const std::optional<Interval>& i) {
      return ordered_json{{"value", json_number(value)},
                          {"lo", i ? json_number(i->lo) : ordered_json(nullptr)},
                          {"hi", i ? json_number(i->hi) : ordered_json(nullptr)}};
    };
    const studies::LossLaw& law = fit.law;
    fits.push_back({{"t", "fit"},
                    {"model", "loss_law"},
                    {"per", {{"series", fit.series}}},
                    {"E", law.irreducible},
                    {"B", law.batch_factor},
                    {"beta", interval(law.batch_exponent, fit.batch_exponent)},
                    {"C", law.steps_factor},
                    {"gamma", interval(law.steps_exponent, fit.steps_exponent)},
                    {"best_batch_exponent", interval(law.best_batch_exponent(), fit.best_exponent)},
                    {"examples", fit.examples},
                    {"best_batch", interval(fit.best_batch, fit.best)},
                    {"measured", fit.measured()},
                    {"rms_log", law.rms_log},
                    {"runs", fit.runs},
                    {"n_points", fit.cells}});
  }
  for (const Cell& cell : analysis.cells) {
    ordered_json row{{"series", cell.series},
                     {"batch_size", cell.batch},
                     {"lr", cell.choice.lr},
                     {"fitted_lr", cell.choice.fitted_lr},
                     {"curvature", cell.choice.curvature},
                     {"lr_plateau_octaves", cell.choice.plateau_octaves},
                     {"edge", edge_name(cell.choice.edge)},
                     {"censored", cell.censored()},
                     {"fresh", cell.fresh},
                     {"value", json_number(cell.value)},
                     {"seeds", ordered_json::array()}};
    for (const studies::SeedValue& seed : cell.record) {
      row["seeds"].push_back({{"seed", seed.seed}, {"value", json_number(seed.value)}});
    }
    cells.push_back(std::move(row));
  }
  for (const StudyWarning& warning : analysis.warnings) {
    warnings.push_back({{"t", "warn"}, {"kind", warning.kind}, {"text", warning.text}});
  }
  return {{"t", "analysis"},
          {"study", study.name},
          {"metric", analysis.value_name()},
          {"target", or_null(analysis.target)},
          {"n_trials", study.trials.size()},
          {"seed_sigma", analysis.spread.freedom > 0 ? ordered_json(analysis.spread.sigma)
                                                     : ordered_json(nullptr)},
          {"fits", std::move(fits)},
          {"cells", std::move(cells)},
          {"warnings", std::move(warnings)}};
}

std::string verdict_text(const StudyResults& study, const StudyAnalysis& analysis) {
  std::string out = fmt::format("{}: {} finished trials, {} series, {} cells\n", study.name,
                                study.trials.size(), analysis.series.size(), analysis.cells.size());
  for (const StudyTable& table : analysis.verdicts) out += "\n" + table_text(table);
  if (!analysis.warnings.empty()) out += "\n";
  for (const StudyWarning& warning : analysis.warnings) {
    out += fmt::format("warning: {}: {}\n", warning.kind, warning.text);
  }
  return out;
}

}  // namespace orthrus::cli
