// analysis_json: a line for every fit, cell and warning.
#include <optional>
#include <utility>

#include "runtime/cli/json_number.hpp"
#include "runtime/cli/study_analysis.hpp"
#include "runtime/cli/study_verdicts.hpp"

namespace orthrus::cli {

using nlohmann::ordered_json;
using studies::Cell;
using studies::Interval;
using studies::IntervalKind;
using studies::StepsModel;

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
    row["above"] = ordered_json::array();
    for (const studies::StepsAbove& above : fit.study.above) {
      row["above"].push_back({{"batch_size", above.batch}, {"steps", above.steps}});
    }
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
      row["surge"] = {{"peak", rates.study.surge->peak},
                      {"at", rates.study.surge->at},
                      {"rms_log", rates.study.surge->rms_log},
                      {"aicc", json_number(rates.study.surge->aicc)}};
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
  for (const SeriesTransfer& of : analysis.transfers) {
    for (const studies::RateShift& s : of.shifts) {
      const bool known = s.kind != studies::IntervalKind::none;
      const auto answer = [](std::optional<bool> x) {
        return x ? ordered_json(*x) : ordered_json(nullptr);
      };
      fits.push_back({{"t", "fit"},
                      {"model", "lr_transfer"},
                      {"per", {{"series", of.series}}},
                      {"batch_size", of.batch},
                      {"over", of.over},
                      {"size", s.size},
                      {"shift_octaves", s.shift},
                      {"lo", end_of(s.interval.lo, known)},
                      {"hi", end_of(s.interval.hi, known)},
                      {"ci_kind", studies::name_of(s.kind)},
                      {"penalty", json_number(s.penalty)},
                      {"penalty_error", s.penalty_error},
                      {"stays", answer(s.stays())},
                      {"costs_nothing", answer(s.costs_nothing())}});
    }
  }
  for (const SeriesEfficiency& fit : analysis.efficiencies) {
    fits.push_back({{"t", "fit"},
                    {"model", "data_efficiency"},
                    {"numerator", fit.numerator},
                    {"denominator", fit.denominator},
                    {"batch_size", fit.batch},
                    {"ratio", json_number(fit.ratio)},
                    {"lo", fit.interval ? json_number(fit.interval->lo) : ordered_json(nullptr)},
                    {"hi", fit.interval ? json_number(fit.interval->hi) : ordered_json(nullptr)},
                    {"E", fit.law.irreducible},
                    {"beta", fit.law.exponent},
                    {"rms_log", fit.law.rms_log},
                    {"runs", fit.runs},
                    {"conclusive", fit.conclusive()}});
  }
  for (const SeriesConvergence& of : analysis.convergence) {
    ordered_json points = ordered_json::array();
    for (const SeriesConvergence::Point& point : of.points) {
      points.push_back(
          {{"batch_size", point.at.batch},
           {"examples", json_number(point.at.examples)},
           {"runs", point.runs},
           {"kept", point.kept},
           {"slower", point.slower ? ordered_json(*point.slower) : ordered_json(nullptr)}});
    }
    fits.push_back({{"t", "fit"},
                    {"model", "convergence_points"},
                    {"per", {{"series", of.series}}},
                    {"points", std::move(points)}});
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
                    {"n_points", fit.cells.size()}});
  }
  for (const SeriesNoise& noise : analysis.noise) {
    const studies::NoiseScale::Value& value = noise.near.value;
    const bool known = value.interval.hi > 0;
    fits.push_back({{"t", "fit"},
                    {"model", "noise_scale"},
                    {"per", {{"series", noise.series}}},
                    {"geometry", noise.geometry},
                    {"cbs",
                     {{"definition", "noise_scale"},
                      {"value", end_of(value.scale, noise.near.probes > 0)},
                      {"lo", end_of(value.interval.lo, known)},
                      {"hi", end_of(value.interval.hi, known)},
                      {"unit", "examples"}}},
                    {"unresolved", value.unresolved},
                    {"examples", end_of(noise.near.examples, noise.near.probes > 0)},
                    {"probes", noise.near.probes},
                    {"runs", noise.trials}});
  }
  for (const SeriesClasses& series : analysis.classes) {
    ordered_json classes = ordered_json::array();
    for (const SeriesClasses::Class& one : series.classes) {
      classes.push_back({{"number", one.number},
                         {"learning_time", or_null(one.time)},
                         {"loss", or_null(one.loss)},
                         {"accuracy", or_null(one.accuracy)}});
    }
    fits.push_back({{"t", "fit"},
                    {"model", "learning_times"},
                    {"per", {{"series", series.series}}},
                    {"batch_size", series.batch},
                    {"of", series.deciles ? "tokens" : "classes"},
                    {"learning_time_ratio", or_null(series.ratio)},
                    {"runs", series.runs},
                    {"classes", std::move(classes)}});
  }
  for (const ScalingSeries& series : analysis.scaling) {
    ordered_json points = ordered_json::array();
    for (const ScalingPoint& p : series.points) {
      ordered_json point{{"ranks", p.ranks},
                         {"elements", or_null(p.elements)},
                         {"optimizer_ms", or_null(p.optimizer_ms)},
                         {"lo", or_null(p.lo)},
                         {"hi", or_null(p.hi)},
                         {"speedup", or_null(p.speedup)},
                         {"efficiency", or_null(p.efficiency)},
                         {"serial_fraction", or_null(p.serial)},
                         {"predicted_ms", or_null(p.predicted_ms)},
                         {"bytes", or_null(p.bytes)},
                         {"predicted_bytes", or_null(p.predicted_bytes)},
                         {"imbalance", or_null(p.imbalance)},
                         {"predicted_imbalance", or_null(p.predicted_imbalance)},
                         {"overlap", or_null(p.overlap())},
                         {"oversubscribed", p.oversubscribed},
                         {"phases", ordered_json::object()}};
      for (const ScalingPoint::Phase& phase : p.phases) {
        point["phases"][phase.name] = {{"ms", or_null(phase.ms)},
                                       {"predicted_ms", or_null(phase.predicted_ms)}};
      }
      points.push_back(std::move(point));
    }
    fits.push_back({{"t", "fit"},
                    {"model", series.weak ? "weak_scaling" : "strong_scaling"},
                    {"per", {{"series", series.series}}},
                    {"points", std::move(points)}});
  }
  for (const MessageSeries& series : analysis.messages) {
    if (!series.fit) continue;
    ordered_json pieces = ordered_json::array();
    for (const studies::MessageCost& piece : series.fit->pieces) {
      pieces.push_back({{"from_bytes", piece.from_bytes},
                        {"latency_s", piece.latency_s},
                        {"bytes_per_s", json_number(piece.bytes_per_s())},
                        {"half_bytes", json_number(piece.half_bytes())},
                        {"rms_relative", piece.rms_relative}});
    }
    fits.push_back({{"t", "fit"},
                    {"model", "alpha_beta"},
                    {"per", {{"collective", series.collective}, {"ranks", series.ranks}}},
                    {"pieces", std::move(pieces)},
                    {"n_points", series.bytes.size()}});
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

}  // namespace orthrus::cli
