#include "runtime/cli/study_warnings.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>

#include "runtime/cli/study_items.hpp"
#include "runtime/report_page.hpp"
#include "runtime/runner/expression.hpp"

namespace orthrus::cli {

using nlohmann::ordered_json;
using runtime::report::format_number;
using studies::Cell;
using studies::Interval;
using studies::IntervalKind;
using studies::RateMetric;

namespace {

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

/// Does `search.exclude` say so by batch size and what tells the series apart? What asks for more
/// leaves part of a cell.
bool is_excluded(const StudyResults& study, const std::string& series, double batch) {
  const ordered_json& list = study.setting("search.exclude");
  if (!list.is_array()) return false;
  const std::vector<std::string> keys = series_keys(study);
  const auto trial =
      std::find_if(study.trials.begin(), study.trials.end(),
                   [&](const StudyTrial& t) { return series_name(t, keys).label() == series; });
  const auto variable = [&](const std::string& name) -> std::optional<runner::Value> {
    if (name == "batch_size") return batch;
    if (trial == study.trials.end() || std::find(keys.begin(), keys.end(), name) == keys.end())
      return {};
    const double number = trial->param(name.c_str());
    return std::isnan(number) ? runner::Value(trial->param_text(name)) : runner::Value(number);
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

}  // namespace

std::string numbers_text(const std::vector<double>& values) {
  std::vector<std::string> texts;
  for (const double v : values) texts.push_back(format_number(v));
  return fmt::format("{}", fmt::join(texts, ", "));
}

void Warnings::batches(const char* kind, const std::vector<Cell>& cells, const std::string& what,
                       const std::function<bool(const Cell&)>& wrong) {
  std::vector<double> found;
  for (const Cell& cell : cells) {
    if (wrong(cell)) found.push_back(cell.batch);
  }
  if (found.empty()) return;
  add(kind, fmt::format("{}, batch {}: {}", cells.front().series, numbers_text(found), what));
}

void warn_of_missing_cells(const StudyResults& study, const StudyAnalysis& analysis,
                           Warnings& warn) {
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
  }
}

void warn_of_cells(const StudyResults& study, const StudyAnalysis& analysis, Warnings& warn) {
  warn_of_missing_cells(study, analysis, warn);
  for (const std::string& series : analysis.series) {
    const std::vector<Cell> cells = analysis.of(series);
    for (const studies::GridEdge edge : {studies::GridEdge::low, studies::GridEdge::high}) {
      warn.batches("edge_optimum", cells,
                   fmt::format("the best learning rate is the {} one tried: the optimum may lie "
                               "beyond",
                               edge == studies::GridEdge::low ? "smallest" : "largest"),
                   [&](const Cell& c) { return c.choice.edge == edge; });
    }
    warn.batches("few_rates", cells, "fewer than 3 learning rates: no tuning curve",
                 [&](const Cell& c) { return c.rates.size() < 3 && !is_branched(study); });
    warn.batches("few_seeds", cells, "fewer than 3 seeds behind the reported value",
                 [](const Cell& c) { return !c.choice.censored && c.record.size() < 3; });
    warn.batches(
        "selected_on_report", cells,
        "reported by the seeds that chose the learning rate: values are too good",
        [&](const Cell& c) { return !c.choice.censored && !c.fresh && !is_branched(study); });
    if (analysis.metric != RateMetric::steps_to_target) continue;
    const auto censored = [](const Cell& c) { return c.censored(); };
    warn.batches("censored", cells,
                 "the target was not reached at the chosen learning rate: right-censored",
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

namespace {

/// Trials that were timed, by all that they were given but the seed.
void warn_of_times(const StudyResults& study, Warnings& warn) {
  std::map<std::string, std::size_t> repeated;
  bool over = false;
  for (const StudyTrial& trial : study.trials) {
    const auto timing = trial.line.find("timing");
    if (!trial.result() || timing == trial.line.end() || !timing->is_object()) continue;
    over = over || timing->value("oversubscribed", false);
    ordered_json given = trial.params;
    given.erase("seed");
    ++repeated[given.dump()];
  }
  if (over) {
    warn.add("oversubscribed",
             "more ranks than cores: times are of waiting for a core, and no "
             "efficiency follows from them");
  }
  const auto once = std::count_if(repeated.begin(), repeated.end(),
                                  [](const auto& entry) { return entry.second < 2; });
  if (once > 0) {
    warn.add("single_times", fmt::format("{} of {} timed settings ran once: how far their times "
                                         "vary is not known",
                                         once, repeated.size()));
  }
}

}  // namespace

void warn_of_trials(const StudyResults& study, const StudyAnalysis& analysis,
                    const std::vector<std::string>& keys, Warnings& warn) {
  std::size_t failed = 0, without = 0;
  std::map<std::string, std::set<double>> coarse;
  double epochs = 0;
  // A study of times has no cells, and no target.
  const bool times = !analysis.scaling.empty() || !analysis.messages.empty();
  for (const StudyTrial& trial : study.trials) {
    failed += trial.result() ? 0 : 1;
    without += times || (trial.param("batch_size") > 0 && trial.param("lr") > 0) ? 0 : 1;
    if (const double seen = trial.number("epochs_seen"); seen > epochs) epochs = seen;
    const double hi = trial.number("steps_to_target_hi"), lo = trial.number("steps_to_target_lo");
    // The interval of one evaluation: there were hi/(hi − lo) until the crossing.
    if (trial.role != studies::SeedRole::tune && hi > lo && hi < 10 * (hi - lo)) {
      coarse[series_name(trial, keys).label()].insert(trial.param("batch_size"));
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
  if (study.versions.size() > 1) {
    warn.add("mixed_versions", fmt::format("run by several versions of the code: {}",
                                           fmt::join(study.versions, ", ")));
  }
  warn_of_times(study, warn);
  if (study.trials.empty()) warn.add("empty", "no trial has finished");
  if (std::isnan(analysis.target) && !study.trials.empty() && !is_branched(study) && !times) {
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
  if (fit.study.above.size() < fit.study.censored.size()) {
    say("left_out",
        fmt::format("{} of {} censored batch sizes have no part in it",
                    fit.study.censored.size() - fit.study.above.size(), fit.study.censored.size()));
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

}  // namespace orthrus::cli
