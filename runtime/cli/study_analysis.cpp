#include "runtime/cli/study_analysis.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>

#include "runtime/cli/study_items.hpp"
#include "runtime/cli/study_verdicts.hpp"
#include "runtime/cli/study_warnings.hpp"
#include "runtime/report_page.hpp"

namespace orthrus::cli {

using nlohmann::ordered_json;
using runtime::report::format_number;
using studies::Cell;
using studies::Interval;
using studies::IntervalKind;
using studies::RateMetric;
using studies::StepsModel;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

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

std::size_t parameters_of(StepsModel model) {
  return model == StepsModel::hyper ? 2 : model == StepsModel::hyper_alpha ? 3 : 4;
}
constexpr std::array models{StepsModel::hyper, StepsModel::hyper_alpha, StepsModel::three_term_inv};

void fit_steps(StudyAnalysis& analysis, const AnalysisItem& item,
               const studies::Bootstrap& bootstrap, Warnings& warn) {
  for (const std::string& series : analysis.series) {
    const std::vector<Cell> cells = analysis.of(series);
    SeriesSteps fit;
    fit.series = series;
    fit.question = {{},        item.definitions, item.reference_batch, item.overhead,
                    bootstrap, item.tobit};
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
      const double aicc =
          studies::fit_steps(model, fit.study.batches, fit.study.steps, fit.study.above).aicc;
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
    const std::optional<studies::SurgeLaw>& surge = rates.study.surge;
    if (surge &&
        surge->aicc < std::min(studies::fit_power(rates.study.batches, rates.study.lrs).aicc,
                               rates.study.bent->below.aicc)) {
      warn.add("surge", fmt::format("{}: AICc prefers learning rates that rise as the root of the "
                                    "batch to {:.3g} at batch {} and fall beyond",
                                    series, surge->peak, format_number(surge->at)));
    }
    analysis.rates.push_back(std::move(rates));
  }
}

void fit_branches(StudyAnalysis& analysis, const StudyResults& study,
                  const std::vector<std::string>& keys, const AnalysisItem& item, Warnings& warn) {
  for (const std::string& series : analysis.series) {
    SeriesBranches fit;
    fit.series = series;
    fit.loss = item.loss;
    std::map<double, std::map<std::int64_t, double>> losses;
    for (const StudyTrial& trial : study.trials) {
      const double batch = trial.param("batch_size"), seed = trial.param("seed");
      if (!trial.result() || !(batch > 0) || !(trial.number("fork_steps") > 0) ||
          series_name(trial, keys).label() != series) {
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

/// Those that report a cell, at the rate it took.
std::vector<const StudyTrial*> reporting(const StudyResults& study,
                                         const std::vector<std::string>& keys, const Cell& cell) {
  std::vector<const StudyTrial*> out;
  for (const StudyTrial& trial : study.trials) {
    const bool reports = (trial.role == studies::SeedRole::report) == cell.fresh;
    if (trial.result() && trial.state != "diverged" && reports && !cell.choice.censored &&
        series_name(trial, keys).label() == cell.series &&
        trial.param("batch_size") == cell.batch &&
        std::abs(trial.param("lr") - cell.choice.lr) <= 1e-9 * cell.choice.lr) {
      out.push_back(&trial);
    }
  }
  return out;
}

void fit_laws(StudyAnalysis& analysis, const StudyResults& study,
              const std::vector<std::string>& keys, const studies::Bootstrap& bootstrap,
              Warnings& warn) {
  for (const std::string& series : analysis.series) {
    std::vector<LawRun> runs;
    for (const Cell& cell : analysis.of(series)) {
      for (const StudyTrial* trial : reporting(study, keys, cell)) {
        runs.push_back(law_run(study, *trial, analysis.metric_name));
      }
    }
    const auto law = fit_law(series, runs, std::min(bootstrap.resamples, 100), bootstrap.level);
    if (!law) {
      warn.add("too_few_points",
               series + ": a law of the loss needs three batch sizes and ten evaluations");
      continue;
    }
    if (law->law.rms_log > SeriesLaw::misses) {
      warn.add("rms_log", fmt::format("{}: the law of the loss misses by {:.2g} (RMS of ln L): it "
                                      "holds at constant rates, after warm-up",
                                      series, law->law.rms_log));
    }
    analysis.laws.push_back(*law);
  }
}

std::vector<NoiseRun> reporting_runs(const StudyAnalysis& analysis, const StudyResults& study,
                                     const std::vector<std::string>& keys) {
  std::vector<NoiseRun> runs;
  for (const Cell& cell : analysis.cells) {
    for (const StudyTrial* trial : reporting(study, keys, cell))
      runs.push_back({trial, cell.series});
  }
  return runs;
}

void measure_noise(StudyAnalysis& analysis, const StudyResults& study,
                   const std::vector<NoiseRun>& runs, bool asked, Warnings& warn) {
  analysis.noise = noise_of_runs(study, runs);
  if (asked && analysis.noise.empty()) {
    warn.add("not_measured", "definition noise_scale: no probes (probes.gns.every)");
  }
  for (const SeriesNoise& noise : analysis.noise) {
    const std::string of = noise.series + ", noise in " + noise.geometry;
    if (noise.near.value.unresolved) {
      warn.add("unresolved", of + ": the signal of the probes near the target is below two "
                                  "standard errors: a lower bound at best");
    }
    if (!noise.equal_splits && noise.geometry != "l2") {
      warn.add("unequal_splits", of + ": probes of different numbers of gradients, which moves it");
    }
  }
}

/// The pairs of series that an item compares: of one name each, where it has names, else the first
/// one over each of the others.
std::vector<std::pair<std::string, std::string>> pairs_of(const std::vector<SeriesName>& names,
                                                          const AnalysisItem& item,
                                                          Warnings& warn) {
  std::vector<std::pair<std::string, std::string>> pairs;
  for (const SeriesName& above : names) {
    for (const SeriesName& under : names) {
      if (above.rest != under.rest || above.optimizer == under.optimizer) continue;
      const bool asked = item.numerator.empty() ? above.optimizer == names.front().optimizer
                                                : above.optimizer == item.numerator &&
                                                      under.optimizer == item.denominator;
      if (asked) pairs.emplace_back(above.label(), under.label());
    }
  }
  if (pairs.empty() && !item.numerator.empty()) {
    warn.add("missing_cells", fmt::format("{} of {} over {}: one of them has no trials",
                                          item.compare, item.numerator, item.denominator));
  }
  return pairs;
}

void undecided(const std::string& above, const std::string& under, const std::vector<double>& open,
               Warnings& warn) {
  if (open.empty()) return;
  warn.add("inconclusive",
           fmt::format("{} over {}, batch {}: which needs fewer examples is not decided", above,
                       under, numbers_text(open)));
}

void compare(StudyAnalysis& analysis, const std::vector<SeriesName>& names,
             const AnalysisItem& item, double level, Warnings& warn) {
  for (const auto& [above, under] : pairs_of(names, item, warn)) {
    SeriesRatios ratios{above, under, {}};
    ratios.ratios = token_ratios(analysis.of(above), analysis.of(under), level);
    std::vector<double> open;
    for (const studies::TokenRatio& ratio : ratios.ratios) {
      if (!ratio.conclusive()) open.push_back(ratio.batch);
    }
    undecided(above, under, open, warn);
    analysis.ratios.push_back(std::move(ratios));
  }
}

void compare_efficiency(StudyAnalysis& analysis, const StudyResults& study,
                        const std::vector<SeriesName>& names, const std::vector<std::string>& keys,
                        const AnalysisItem& item, const studies::Bootstrap& bootstrap,
                        Warnings& warn) {
  const auto runs_of = [&](const Cell& cell) {
    std::vector<LawRun> runs;
    for (const StudyTrial* const trial : reporting(study, keys, cell))
      runs.push_back(law_run(study, *trial, analysis.metric_name));
    return runs;
  };
  for (const auto& [above, under] : pairs_of(names, item, warn)) {
    std::vector<double> open, few;
    for (const Cell& first : analysis.of(above)) {
      for (const Cell& second : analysis.of(under)) {
        if (first.batch != second.batch) continue;
        auto fit = fit_efficiency(runs_of(first), runs_of(second),
                                  std::min(bootstrap.resamples, 100), bootstrap.level);
        if (!fit) {
          few.push_back(first.batch);
          continue;
        }
        fit->numerator = above;
        fit->denominator = under;
        if (!fit->conclusive()) open.push_back(fit->batch);
        if (fit->law.rms_log > SeriesLaw::misses) {
          warn.add("rms_log",
                   fmt::format("{} over {}, batch {}: the law of their data efficiency misses by "
                               "{:.2g} (RMS of ln L): it holds at constant rates, after warm-up",
                               above, under, format_number(fit->batch), fit->law.rms_log));
        }
        analysis.efficiencies.push_back(std::move(*fit));
      }
    }
    if (!few.empty()) {
      warn.add("too_few_points",
               fmt::format("{} over {}, batch {}: data efficiency needs five evaluations of each",
                           above, under, numbers_text(few)));
    }
    undecided(above, under, open, warn);
  }
}

/// Series that differ in `over` alone are one model that grows.
void transfer(StudyAnalysis& analysis, const StudyResults& study,
              const std::vector<std::string>& keys, const AnalysisItem& item,
              const studies::Bootstrap& bootstrap, Warnings& warn) {
  // By what does not grow, and the batch: cells by size.
  std::map<std::pair<std::string, double>, std::map<double, Cell>> models;
  std::vector<std::string> others;
  std::copy_if(keys.begin(), keys.end(), std::back_inserter(others),
               [&](const std::string& key) { return key != item.over; });
  for (const std::string& series : analysis.series) {
    const auto trial =
        std::find_if(study.trials.begin(), study.trials.end(),
                     [&](const StudyTrial& t) { return series_name(t, keys).label() == series; });
    if (trial == study.trials.end() || !(trial->param(item.over.c_str()) > 0)) continue;
    for (Cell& cell : analysis.of(series))
      models[{series_name(*trial, others).label(), cell.batch}].emplace(
          trial->param(item.over.c_str()), cell);
  }
  bool found = false;
  for (const auto& [model, by_size] : models) {
    std::vector<Cell> cells;
    std::vector<double> sizes;
    for (const auto& [size, cell] : by_size) {
      sizes.push_back(size);
      cells.push_back(cell);
    }
    if (cells.size() < 2) continue;
    SeriesTransfer out{model.first, item.over, model.second,
                       studies::rate_shifts(cells, sizes, bootstrap)};
    found = found || out.shifts.size() > 1;
    for (const studies::RateShift& shift : out.shifts) {
      if (shift.stays() != std::optional(false)) continue;
      warn.add("lr_moves",
               fmt::format("{}, batch {}: the best rate at {} = {} is {:+.2f} octaves from that of "
                           "the least: it does not transfer",
                           out.series, format_number(out.batch), item.over,
                           format_number(shift.size), shift.shift));
    }
    analysis.transfers.push_back(std::move(out));
  }
  if (!found) {
    warn.add("too_few_points", fmt::format("transfer of rates over {}: needs two sizes with a best "
                                           "rate, that differ in nothing else",
                                           item.over));
  }
}

/// @param reference  an optimizer; empty: the first
void converge(StudyAnalysis& analysis, const std::vector<SeriesName>& names,
              const AnalysisItem& item, Warnings& warn) {
  const std::string optimizer =
      item.reference.empty() && !names.empty() ? names.front().optimizer : item.reference;
  bool found = false;
  for (const SeriesName& name : names) {
    std::vector<Cell> reference;
    for (const SeriesName& other : names) {
      if (other.rest == name.rest && other.optimizer == optimizer)
        reference = analysis.of(other.label());
    }
    found = found || !reference.empty();
    if (name.optimizer == optimizer) reference.clear();
    analysis.convergence.push_back(
        convergence_of(name.label(), analysis.of(name.label()), reference));
  }
  if (!found && !item.reference.empty()) {
    warn.add("missing_cells",
             fmt::format("convergence points: the reference {} has no trials", item.reference));
  }
}

}  // namespace

std::vector<Cell> StudyAnalysis::of(const std::string& name) const {
  std::vector<Cell> out;
  std::copy_if(cells.begin(), cells.end(), std::back_inserter(out),
               [&](const Cell& cell) { return cell.series == name; });
  return out;
}

const char* StudyAnalysis::value_name() const {
  return metric == RateMetric::loss ? metric_name.c_str() : "steps to target";
}

namespace {

/// Series, and the cells of their trials. @param[out] names  of the series
StudyAnalysis cells_in(const StudyResults& study, std::vector<SeriesName>& names) {
  StudyAnalysis analysis;
  analysis.target = number_of(study.setting("search.metric.target"));
  analysis.metric = std::isnan(analysis.target) ? RateMetric::loss : RateMetric::steps_to_target;
  const ordered_json& metric = study.setting("search.metric.name");
  analysis.metric_name = metric.is_string() ? metric.get<std::string>() : "val_loss";
  const std::vector<std::string> keys = series_keys(study);
  std::vector<studies::TrialOutcome> outcomes;
  for (const StudyTrial& trial : study.trials) {
    const double batch = trial.param("batch_size"), lr = trial.param("lr");
    if (!trial.result() || !(batch > 0 && lr > 0 && std::isfinite(batch) && std::isfinite(lr))) {
      continue;
    }
    const SeriesName name = series_name(trial, keys);
    if (std::find(analysis.series.begin(), analysis.series.end(), name.label()) ==
        analysis.series.end()) {
      analysis.series.push_back(name.label());
      names.push_back(name);
    }
    const double seed = trial.param("seed");
    outcomes.push_back({name.label(), batch, lr,
                        std::isfinite(seed) ? static_cast<std::int64_t>(seed) : trial.index,
                        trial.role,
                        analysis.metric == RateMetric::loss ? loss_of(trial) : steps_of(trial),
                        trial.state == "censored" ? trial.number("steps") : 0});
  }
  analysis.cells = studies::cells_of(outcomes, analysis.metric);
  return analysis;
}

}  // namespace

std::vector<StudyWarning> missing_cells(const StudyResults& study) {
  std::vector<SeriesName> names;
  const StudyAnalysis analysis = cells_in(study, names);
  std::vector<StudyWarning> list;
  Warnings warn(list);
  warn_of_missing_cells(study, analysis, warn);
  return list;
}

StudyAnalysis analyse(const StudyResults& study) {
  std::vector<SeriesName> names;
  StudyAnalysis analysis = cells_in(study, names);
  Warnings warn(analysis.warnings);
  for (const std::string& text : study.warnings) warn.add("cut_off", text);
  const std::vector<AnalysisItem> items = items_of(study, analysis.warnings);
  const studies::Bootstrap bootstrap = bootstrap_of(study);
  const std::vector<std::string> keys = series_keys(study);
  analysis.scaling = scaling_of(study);
  analysis.messages = messages_of(study);
  warn_of_trials(study, analysis, keys, warn);
  warn_of_cells(study, analysis, warn);
  const bool steps = analysis.metric == RateMetric::steps_to_target;
  if (steps) analysis.spread = studies::seed_spread(analysis.cells);
  for (const AnalysisItem& item : items) {
    if (item.fit == "local_cbs") {
      fit_branches(analysis, study, keys, item, warn);
    } else if (item.fit == "loss_law") {
      fit_laws(analysis, study, keys, bootstrap, warn);
    } else if (item.fit == "lr_exponent") {
      fit_rates(analysis, bootstrap, warn);
    } else if (item.compare == "lr_transfer") {
      transfer(analysis, study, keys, item, bootstrap, warn);
    } else if (item.compare == "data_efficiency") {
      compare_efficiency(analysis, study, names, keys, item, bootstrap, warn);
    } else if (!steps) {
      continue;  // said by `no_target`
    } else if (item.fit == "convergence_points") {
      converge(analysis, names, item, warn);
    } else if (item.fit.empty()) {
      compare(analysis, names, item, bootstrap.level, warn);
    } else {
      fit_steps(analysis, item, bootstrap, warn);
    }
  }
  const bool asked = std::any_of(items.begin(), items.end(),
                                 [](const AnalysisItem& item) { return item.noise_scale; });
  const std::vector<NoiseRun> runs = reporting_runs(analysis, study, keys);
  measure_noise(analysis, study, runs, asked, warn);
  analysis.classes = classes_of(study, runs);
  for (const MessageSeries& series : analysis.messages) {
    if (!series.fit)
      warn.add("too_few_points", series.name() + ": latency and bandwidth need five sizes");
  }
  analysis.verdicts = verdict_tables(analysis);
  analysis.cell_table = cells_table(analysis);
  analysis.trial_table = trials_table(study);
  return analysis;
}

}  // namespace orthrus::cli
