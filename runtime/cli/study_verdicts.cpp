#include "runtime/cli/study_verdicts.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "runtime/cli/study_warnings.hpp"

namespace orthrus::cli {

using nlohmann::ordered_json;
using studies::CbsDefinition;
using studies::Cell;
using studies::Interval;
using studies::IntervalKind;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

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
  for (const SeriesNoise& noise : analysis.noise) {
    const studies::NoiseScale::Value& value = noise.near.value;
    const bool known = value.interval.hi > 0;
    const char* where = std::isnan(analysis.target) ? "in the second half" : "near the target";
    table.rows.push_back(
        {noise.series, "gradient noise, " + noise.geometry, "noise_scale",
         end_of(value.scale, noise.near.probes > 0), end_of(value.interval.lo, known),
         end_of(value.interval.hi, known), known ? "blocks" : "none", nullptr, nullptr,
         fmt::format("{}{} probes {}, {} runs", value.unresolved ? "unresolved: " : "",
                     noise.near.probes, where, noise.trials)});
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

StudyTable transfer_table(const StudyAnalysis& analysis) {
  StudyTable table{"lr_transfer",
                   "Transfer of the learning rate",
                   "Octaves from the best rate of the least size: it transfers within half of one. "
                   "Penalty: loss at that rate over the own best one, on the seeds that chose.",
                   {"series", "batch", "over", "size", "shift", "lo", "hi", "interval", "penalty",
                    "error", "reading"},
                   {}};
  for (const SeriesTransfer& of : analysis.transfers) {
    for (const studies::RateShift& s : of.shifts) {
      const bool known = s.kind != studies::IntervalKind::none;
      const bool least = s.size == of.shifts.front().size;
      const std::string reading = least         ? "-"
                                  : !s.stays()  ? "inconclusive"
                                  : !*s.stays() ? "moves"
                                  : s.costs_nothing() == std::optional(false)
                                      ? "stays, at a penalty"
                                      : "transfers";
      table.rows.push_back({of.series, of.batch, of.over, s.size, s.shift,
                            end_of(s.interval.lo, known && !least),
                            end_of(s.interval.hi, known && !least), studies::name_of(s.kind),
                            json_number(s.penalty), s.penalty_error, reading});
    }
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
                          law.rms_log > SeriesLaw::misses ? "doubtful: the law does not fit"
                          : fit.measured()                ? "measured"
                                                          : "outside the batches"});
  }
  return table;
}

StudyTable efficiency_table(const StudyAnalysis& analysis) {
  StudyTable table{
      "data_efficiency",
      "Data efficiency",
      "E + A/D^beta through the evaluations of both, E and beta shared: examples of the "
      "first for each of the second, at every loss alike.",
      {"numerator", "denominator", "batch", "ratio", "lo", "hi", "E", "beta", "RMS", "runs",
       "reading"},
      {}};
  for (const SeriesEfficiency& fit : analysis.efficiencies) {
    const std::string& fewer = fit.ratio > 1 ? fit.denominator : fit.numerator;
    table.rows.push_back({fit.numerator, fit.denominator, fit.batch, json_number(fit.ratio),
                          fit.interval ? json_number(fit.interval->lo) : nullptr,
                          fit.interval ? json_number(fit.interval->hi) : nullptr,
                          fit.law.irreducible, fit.law.exponent, fit.law.rms_log, fit.runs,
                          fit.law.rms_log > SeriesLaw::misses ? "doubtful: the law does not fit"
                          : !fit.conclusive()                 ? "inconclusive"
                                                              : fewer + " needs fewer"});
  }
  return table;
}

StudyTable convergence_table(const StudyAnalysis& analysis) {
  StudyTable table{"convergence_points",
                   "Convergence points",
                   "Examples to the target, the mean without the best and the worst run. Left out: "
                   "slower than the line between its neighbours. Slower: than the reference, by a "
                   "one-sided t-test at 5 %.",
                   {"series", "batch", "examples", "runs", "left out", "slower"},
                   {}};
  for (const SeriesConvergence& of : analysis.convergence) {
    for (const SeriesConvergence::Point& point : of.points) {
      table.rows.push_back(
          {of.series, point.at.batch, json_number(point.at.examples), point.runs,
           point.kept ? "no" : "yes",
           point.slower ? ordered_json(*point.slower ? "yes" : "no") : ordered_json(nullptr)});
    }
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

}  // namespace

ordered_json or_null(double value) {
  return std::isnan(value) ? ordered_json(nullptr) : json_number(value);
}

std::string definition_name(const studies::CbsEstimate& cbs, double overhead) {
  return cbs.definition == CbsDefinition::overhead ? fmt::format("overhead{:.0f}", 100 * overhead)
                                                   : std::string(studies::name_of(cbs.definition));
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

std::vector<StudyTable> verdict_tables(const StudyAnalysis& analysis) {
  std::vector<StudyTable> tables;
  for (StudyTable table :
       {critical_table(analysis), branch_table(analysis), rate_table(analysis),
        ratio_table(analysis), transfer_table(analysis), efficiency_table(analysis),
        convergence_table(analysis), law_table(analysis), classes_table(analysis.classes),
        scaling_table(analysis.scaling), planned_table(analysis.scaling),
        phases_table(analysis.scaling), roofline_table(analysis.scaling),
        messages_table(analysis.messages)}) {
    if (!table.rows.empty()) tables.push_back(std::move(table));
  }
  if (StudyTable best = best_rate_table(analysis);
      analysis.metric == studies::RateMetric::loss && !best.rows.empty()) {
    tables.push_back(std::move(best));
  }
  return tables;
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
