#include "runtime/cli/study_fit.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <map>
#include <optional>
#include <orthrus/error.hpp>
#include <orthrus/studies/horizon.hpp>
#include <set>
#include <string_view>
#include <utility>

#include "runtime/cli/json_number.hpp"
#include "runtime/cli/records.hpp"

namespace orthrus::cli {

using nlohmann::ordered_json;
using studies::Interval;

using Columns = std::vector<std::vector<double>>;

namespace {

std::string range_text(const std::optional<Interval>& interval) {
  return interval ? fmt::format("[{:.6g}, {:.6g}]", interval->lo, interval->hi) : "";
}

void add_interval(ordered_json& row, const std::optional<Interval>& interval) {
  if (!interval) return;
  row["lo"] = json_number(interval->lo);
  row["hi"] = json_number(interval->hi);
}

}  // namespace

/// Says everything twice: as one JSON document, and line by line.
class FitPage {
 public:
  FitReport report;

  void line(const std::string& text) { report.text += "  " + text + "\n"; }
  void value(const std::string& name, double value, const std::optional<Interval>& interval,
             const std::string& what) {
    std::string text =
        fmt::format("{:<14} {:<13.7g} {:<26} {}", name, value, range_text(interval), what);
    text.erase(text.find_last_not_of(' ') + 1);
    line(text);
  }
  void parameter(const std::string& name, double value,
                 const std::optional<Interval>& interval = {}, const std::string& what = "") {
    ordered_json row{{"value", json_number(value)}};
    add_interval(row, interval);
    report.document["parameters"][name] = std::move(row);
    this->value(name, value, interval, what);
  }
  void figure(const std::string& key, double value, const std::string& what) {
    report.document[key] = json_number(value);
    this->value(key, value, {}, what);
  }
  void intervals(const std::string& kind, const std::string& text) {
    report.document["ci_kind"] = kind;
    line(text);
  }
  void warn(const std::string& text) { warnings_.push_back(text); }

  /// Measured and fitted; x has a column per key.
  void points(const FitOptions& options, const Columns& x, std::span<const double> y,
              const std::function<double(std::size_t)>& fitted) {
    ordered_json rows = ordered_json::array();
    std::string head;
    for (const std::string& key : options.x) head += fmt::format("{:>16} ", key);
    report.text += "\n";
    line(head + fmt::format("{:>16} {:>13} {:>10}", options.y, "fitted", "ln error"));
    for (std::size_t i = 0; i < y.size(); ++i) {
      const double law = fitted(i), residual = std::log(y[i] / law);
      ordered_json row{{"x", ordered_json::array()}};
      std::string text;
      for (const std::vector<double>& column : x) {
        row["x"].push_back(column[i]);
        text += fmt::format("{:>16.7g} ", column[i]);
      }
      if (x.size() == 1) row["x"] = x[0][i];
      row["y"] = y[i];
      row["fitted"] = json_number(law);
      row["log_residual"] = json_number(residual);
      line(text + fmt::format("{:>16.7g} {:>13.7g} {:>+10.2g}", y[i], law, residual));
      rows.push_back(std::move(row));
    }
    report.document["points"] = std::move(rows);
    report.text += "\n";
  }
  void finish() {
    report.document["warnings"] = warnings_;
    for (const std::string& text : warnings_) line("warning: " + text);
  }

 private:
  std::vector<std::string> warnings_;
};

namespace {

/// One more point than parameters, or there are no residuals to judge a fit by.
void need(const FitOptions& o, const std::string& key, std::size_t there, std::size_t needed) {
  if (there >= needed) return;
  throw DataError(fmt::format("{}: {}: {} different values, the law {} needs at least {}", o.file,
                              key, there, o.law->name, needed));
}

std::size_t different(std::span<const double> values) {
  return std::set<double>(values.begin(), values.end()).size();
}

/// x ascending, y along with it.
std::pair<std::vector<double>, std::vector<double>> ascending(const Columns& columns) {
  std::vector<std::pair<double, double>> pairs;
  for (std::size_t i = 0; i < columns[0].size(); ++i) {
    pairs.emplace_back(columns[0][i], columns[1][i]);
  }
  std::sort(pairs.begin(), pairs.end());
  std::pair<std::vector<double>, std::vector<double>> out;
  for (const auto& [x, y] : pairs) {
    out.first.push_back(x);
    out.second.push_back(y);
  }
  return out;
}

/// Each x has one y.
void need_single(const FitOptions& o, std::span<const double> x) {
  const auto twice = std::adjacent_find(x.begin(), x.end());
  if (twice == x.end()) return;
  throw DataError(
      fmt::format("{}: {}: {:g} stands in several records, the law {} takes one of each", o.file,
                  o.x[0], *twice, o.law->name));
}

// ---- steps to a target against batch size ----

using studies::StepsFit;
using studies::StepsModel;

struct StepsForm {
  StepsModel model;
  const char* formula;
  std::vector<std::pair<const char*, const char*>> parameters;  ///< and what they are
};
const std::vector<StepsForm>& steps_forms() {
  static const std::vector<StepsForm> forms{
      {StepsModel::hyper, "S = a + b/B", {{"a", "least steps"}, {"b", "least examples"}}},
      {StepsModel::hyper_alpha,
       "S = a + b/B^alpha",
       {{"a", "least steps"}, {"b", ""}, {"alpha", ""}}},
      {StepsModel::three_term_inv,
       "S = s (1 - d/B^beta)^(-1/gamma)",
       {{"s", "least steps"}, {"d", ""}, {"beta", ""}, {"gamma", ""}}},
  };
  return forms;
}

/// A number of a fit, and where the document has it.
struct Statistic {
  std::string name, what;
  std::function<double(const StepsFit&)> of;
  std::optional<Interval> interval = {};
};

/// The records of one batch size are seeds of one point: their geometric mean.
struct Batches {
  std::vector<double> batch, steps;
  std::vector<std::vector<double>> seeds;
  std::size_t least_seeds = 0, most_seeds = 0;
};
Batches by_batch(const Columns& columns) {
  std::map<double, std::vector<double>> grouped;
  for (std::size_t i = 0; i < columns[0].size(); ++i) {
    grouped[columns[0][i]].push_back(columns[1][i]);
  }
  Batches out;
  for (auto& [batch, seeds] : grouped) {
    // What is drawn shall not depend on the order of the records.
    std::sort(seeds.begin(), seeds.end());
    double sum = 0;
    for (const double steps : seeds) sum += std::log(steps);
    out.batch.push_back(batch);
    out.steps.push_back(std::exp(sum / static_cast<double>(seeds.size())));
    out.least_seeds = out.seeds.empty() ? seeds.size() : std::min(out.least_seeds, seeds.size());
    out.most_seeds = std::max(out.most_seeds, seeds.size());
    out.seeds.push_back(std::move(seeds));
  }
  return out;
}

void steps_intervals(FitPage& page, const FitOptions& o, const StepsFit& fit, const Batches& data,
                     std::span<Statistic* const> statistics) {
  if (o.bootstrap.resamples == 0) {
    page.report.document["ci_kind"] = "none";
    return;
  }
  const bool stratified = data.least_seeds >= 2;
  std::vector<std::vector<double>> draws(statistics.size());
  // One bootstrap for all of them.
  const auto record = [&](const StepsFit& drawn) {
    for (std::size_t i = 0; i < draws.size(); ++i) draws[i].push_back(statistics[i]->of(drawn));
    return 0.0;
  };
  if (stratified) {
    (void)studies::stratified_interval(fit.model, data.batch, data.seeds, record, o.bootstrap);
  } else {
    (void)studies::residual_interval(fit, data.batch, record, o.bootstrap);
  }
  for (std::size_t i = 0; i < draws.size(); ++i) {
    statistics[i]->interval = studies::percentile_interval(std::move(draws[i]), o.bootstrap.level);
  }
  page.report.document["ci_kind"] = stratified ? "stratified" : "residual";
  page.report.document["resamples"] = o.bootstrap.resamples;
  page.report.document["seed"] = o.bootstrap.seed;
  page.report.document["level"] = o.bootstrap.level;
  page.line(fmt::format("intervals: {:g} % of {} resamples of {}", 100 * o.bootstrap.level,
                        o.bootstrap.resamples, stratified ? "seeds" : "residuals"));
}

void fit_steps_law(FitPage& page, const Columns& columns, const FitOptions& o) {
  const Batches data = by_batch(columns);
  const std::string asked = o.law->name;
  const auto named = std::find_if(steps_forms().begin(), steps_forms().end(),
                                  [&](const StepsForm& f) { return name_of(f.model) == asked; });
  need(o, o.x[0], data.batch.size(),
       1 + (named == steps_forms().end() ? 2 : named->parameters.size()));
  const StepsFit best = studies::select_steps(data.batch, data.steps);
  const StepsFit fit = named == steps_forms().end()
                           ? best
                           : studies::fit_steps(named->model, data.batch, data.steps);
  const StepsForm& form = *std::find_if(steps_forms().begin(), steps_forms().end(),
                                        [&](const StepsForm& f) { return f.model == fit.model; });
  ordered_json& document = page.report.document;
  document["model"] = name_of(fit.model);
  document["formula"] = form.formula;
  document["n_points"] = data.batch.size();
  page.line(fmt::format("{}: {}, {} batch sizes, {} records", name_of(fit.model), form.formula,
                        data.batch.size(), columns[0].size()));

  std::vector<Statistic> parameters, critical;
  for (std::size_t i = 0; i < form.parameters.size(); ++i) {
    parameters.push_back({form.parameters[i].first, form.parameters[i].second,
                          [i](const StepsFit& f) { return f.parameters[i]; }});
  }
  const auto define = [&](const char* name, studies::CbsDefinition definition,
                          const std::string& what) {
    critical.push_back({name, what, [definition, reference = o.b_ref](const StepsFit& f) {
                          return studies::critical_batch(f, definition, reference).value;
                        }});
  };
  if (fit.model == StepsModel::hyper) {
    define("mccandlish", studies::CbsDefinition::mccandlish, "critical batch: b/a");
    define("overhead20", studies::CbsDefinition::overhead,
           fmt::format("critical batch: 20 % more examples than scaling from {:g}", o.b_ref));
  } else if (fit.model == StepsModel::three_term_inv) {
    define("token_optimal", studies::CbsDefinition::token_optimal,
           "critical batch: least examples");
  }
  std::vector<Statistic*> all;
  for (Statistic& s : parameters) all.push_back(&s);
  for (Statistic& s : critical) all.push_back(&s);
  steps_intervals(page, o, fit, data, all);
  for (const Statistic& s : parameters) page.parameter(s.name, s.of(fit), s.interval, s.what);
  document["S_min"] = fit.parameters[0];
  if (fit.model == StepsModel::hyper) document["E_min"] = fit.parameters[1];
  for (const Statistic& s : critical) {
    const double value = s.of(fit);
    ordered_json row{{"definition", s.name}, {"value", json_number(value)}};
    add_interval(row, s.interval);
    row["unit"] = "examples";
    if (!document.contains("cbs")) document["cbs"] = row;
    document["cbs_definitions"].push_back(std::move(row));
    page.value(s.name, value, s.interval, s.what);
    if (s.interval && s.interval->hi > 4 * s.interval->lo) {
      page.warn(fmt::format("the interval of {} spans a factor {:.3g}", s.name,
                            s.interval->hi / s.interval->lo));
    }
  }

  page.points(o, {data.batch}, data.steps, [&](std::size_t i) { return fit.steps(data.batch[i]); });
  document["rms_log"] = fit.rms_log;
  document["accepted"] = fit.accepted();
  document["left_out_rms"] = fit.left_out_rms;
  document["trend"] = json_number(fit.trend);
  document["structured"] = fit.structured();
  page.line(
      fmt::format("residuals: RMS {:.3g}, of points left out {:.3g}, bend {:.2g} standard "
                  "errors",
                  fit.rms_log, fit.left_out_rms, fit.trend));
  ordered_json models = ordered_json::array();
  for (const StepsForm& other : steps_forms()) {
    if (data.batch.size() <= other.parameters.size()) continue;
    const StepsFit rival = studies::fit_steps(other.model, data.batch, data.steps);
    models.push_back({{"model", name_of(other.model)},
                      {"aicc", json_number(rival.aicc)},
                      {"rms_log", rival.rms_log},
                      {"left_out_rms", rival.left_out_rms}});
    page.line(fmt::format("{:<15} AICc {:<9.4g} RMS {:<9.3g} left out {:.3g}", name_of(other.model),
                          rival.aicc, rival.rms_log, rival.left_out_rms));
    if (other.model == fit.model) document["aicc"] = json_number(rival.aicc);
  }
  document["models"] = std::move(models);

  if (!fit.accepted()) page.warn(fmt::format("RMS log residual {:.3g} is above 0.10", fit.rms_log));
  if (fit.structured()) page.warn("the residuals bend: the law is another one");
  if (best.model != fit.model) {
    page.warn(fmt::format("AICc prefers {}", name_of(best.model)));
  }
  if (data.least_seeds < 3) page.warn("fewer than 3 seeds at some batch size");
  if (data.least_seeds < 2 && data.most_seeds >= 2 && o.bootstrap.resamples > 0) {
    page.warn("some batch sizes have one seed: intervals are of residuals");
  }
  if (*std::min_element(columns[1].begin(), columns[1].end()) < 20) {
    page.warn("a target reached in under 20 steps is coarse");
  }
}

// ---- power laws ----

void fit_power_law(FitPage& page, const Columns& columns, const FitOptions& o) {
  const auto& [x, y] = std::pair(columns[0], columns[1]);
  need(o, o.x[0], different(x), 3);
  const studies::PowerLaw law = studies::fit_power(x, y);
  ordered_json& document = page.report.document;
  document["model"] = "power";
  document["formula"] = "y = factor x^exponent";
  document["n_points"] = x.size();
  page.line(fmt::format("y = factor x^exponent, {} records", x.size()));
  page.intervals("student_t", "interval: 95 % of Student's t");
  document["level"] = 0.95;
  page.parameter("factor", law.factor);
  page.parameter("exponent", law.exponent, law.exponent_interval,
                 fmt::format("standard error {:.3g}", law.exponent_error));
  document["parameters"]["exponent"]["error"] = law.exponent_error;
  page.points(o, {x}, y, [&](std::size_t i) { return law(x[i]); });
  page.figure("rms_log", law.rms_log, "RMS log residual");
  page.figure("aicc", law.aicc, "AICc");
  if (different(x) < 5) return;
  const studies::SaturatingPowerLaw bent = studies::fit_saturating_power(x, y);
  ordered_json row{{"factor", bent.below.factor}, {"exponent", bent.below.exponent}};
  add_interval(row, bent.below.exponent_interval);
  row["knee"] = bent.knee;
  row["rms_log"] = bent.below.rms_log;
  row["aicc"] = json_number(bent.below.aicc);
  row["preferred"] = bent.preferred;
  document["saturating"] = std::move(row);
  const studies::SurgeLaw surge = studies::fit_surge(x, y);
  document["surge"] = {{"peak", surge.peak},
                       {"at", surge.at},
                       {"rms_log", surge.rms_log},
                       {"aicc", json_number(surge.aicc)},
                       {"preferred", surge.aicc < std::min(law.aicc, bent.below.aicc)}};
  page.line(fmt::format("largest somewhere (surge): {:.6g} at {:.6g}, RMS {:.3g}, AICc {:.4g}",
                        surge.peak, surge.at, surge.rms_log, surge.aicc));
  page.line(
      fmt::format("constant from a knee on: knee {:.6g}, exponent {:.6g} {}, RMS {:.3g}, "
                  "AICc {:.4g}",
                  bent.knee, bent.below.exponent, range_text(bent.below.exponent_interval),
                  bent.below.rms_log, bent.below.aicc));
  if (bent.preferred) {
    page.warn(fmt::format("AICc prefers a power law that is constant from {:.6g} on", bent.knee));
  }
}

// ---- losses ----

void fit_loss_law(FitPage& page, const Columns& columns, const FitOptions& o) {
  const bool sized = o.x.size() == 3;
  const std::vector<double>& loss = columns.back();
  const std::size_t needed = sized ? 8 : 6;
  if (loss.size() < needed) {
    throw DataError(fmt::format("{}: {} records, the law {} needs at least {}", o.file, loss.size(),
                                o.law->name, needed));
  }
  // A curve E + A/x^α has three numbers.
  for (std::size_t k = 0; k < o.x.size(); ++k) need(o, o.x[k], different(columns[k]), 3);
  std::vector<studies::LossCell> cells;
  for (std::size_t i = 0; i < loss.size(); ++i) {
    cells.push_back({sized ? columns[2][i] : 0, columns[1][i], columns[0][i], loss[i]});
  }
  const studies::LossLaw law = studies::fit_loss(cells);
  ordered_json& document = page.report.document;
  document["model"] = "three_term";
  document["formula"] =
      sized ? "L = E + A/N^alpha + B/M^beta + C/K^gamma" : "L = E + B/M^beta + C/K^gamma";
  document["n_points"] = cells.size();
  page.line(fmt::format("{}, {} records: M {}, K {}{}", document["formula"].get<std::string>(),
                        cells.size(), o.x[0], o.x[1], sized ? ", N " + o.x[2] : ""));
  page.intervals("none", "no intervals; Huber's weights beyond an error of 0.001");
  page.parameter("E", law.irreducible);
  if (sized) {
    page.parameter("A", law.size_factor);
    page.parameter("alpha", law.size_exponent);
  }
  page.parameter("B", law.batch_factor);
  page.parameter("beta", law.batch_exponent);
  page.parameter("C", law.steps_factor);
  page.parameter("gamma", law.steps_exponent);
  document["best_batch"] = {{"factor", json_number(law.best_batch(1))},
                            {"exponent", json_number(law.best_batch_exponent())}};
  page.line(fmt::format("best batch of D = M K examples: {:.6g} D^{:.6g}", law.best_batch(1),
                        law.best_batch_exponent()));
  page.points(o, {columns.begin(), columns.end() - 1}, loss,
              [&](std::size_t i) { return law.loss(cells[i]); });
  page.figure("rms_log", law.rms_log, "RMS log residual");
}

/// Targets between the losses that all batches reach and those that all have left behind.
void fit_power_lines_law(FitPage& page, const Columns& columns, const FitOptions& o) {
  std::map<double, studies::LossCurve> by_batch;
  for (std::size_t i = 0; i < columns[0].size(); ++i) {
    studies::LossCurve& curve = by_batch[columns[0][i]];
    curve.batch = columns[0][i];
    curve.examples.push_back(columns[1][i]);
    curve.losses.push_back(columns[2][i]);
  }
  need(o, o.x[0], by_batch.size(), 3);
  std::vector<studies::LossCurve> curves;
  double low = 0, high = INFINITY;
  for (const auto& [batch, curve] : by_batch) {
    if (curve.losses.size() < 3) {
      throw DataError(fmt::format("{}: batch {:g} has {} records, the law {} needs at least 3",
                                  o.file, batch, curve.losses.size(), o.law->name));
    }
    curves.push_back(curve);
    low = std::max(low, *std::min_element(curve.losses.begin(), curve.losses.end()));
    high = std::min(high, *std::max_element(curve.losses.begin(), curve.losses.end()));
  }
  if (!(low < high)) throw DataError(fmt::format("{}: no loss that all batches have had", o.file));
  constexpr int count = 5;
  std::vector<double> targets;
  for (int k = 0; k < count; ++k) {
    targets.push_back(high * std::pow(low / high, (k + 0.5) / count));
  }
  const studies::PowerLines law = studies::fit_power_lines(curves, targets);
  ordered_json& document = page.report.document;
  document["formula"] = "D = D_min (1 + B/B_crit) of each loss";
  page.line(fmt::format("D = D_min (1 + B/B_crit), {} batches: B {}, D {}", curves.size(), o.x[0],
                        o.x[1]));
  ordered_json rows = ordered_json::array();
  for (const auto& t : law.targets) {
    page.line(fmt::format("{} {:<10.5g} D_min {:<12.6g} B_crit {:<12.6g} RMS {:.3g}", o.y, t.loss,
                          t.least_examples, t.critical_batch, t.rms_log));
    rows.push_back({{"target", json_number(t.loss)},
                    {"D_min", json_number(t.least_examples)},
                    {"B_crit", json_number(t.critical_batch)},
                    {"rms_log", json_number(t.rms_log)}});
  }
  document["targets"] = std::move(rows);
  document["growth"] = {{"factor", json_number(law.growth.factor)},
                        {"exponent", json_number(law.growth.exponent)}};
  page.line(fmt::format("B_crit = {:.6g} D_min^{:.4g}", law.growth.factor, law.growth.exponent));
}

// ---- times ----

/// Seconds, where the key says that it is of another unit.
std::vector<double> seconds_of(const std::string& key, std::vector<double> values) {
  const double unit = key.ends_with("_ms") ? 1e-3 : key.ends_with("_us") ? 1e-6 : 1;
  for (double& v : values) v *= unit;
  return values;
}

void fit_message_law(FitPage& page, const Columns& columns, const FitOptions& o) {
  const auto [bytes, seconds] = ascending({columns[0], seconds_of(o.y, columns[1])});
  need(o, o.x[0], different(bytes), 5);
  const studies::MessageFit fit = studies::fit_message(bytes, seconds, o.collective);
  ordered_json& document = page.report.document;
  document["model"] = "alpha_beta";
  document["formula"] = "T = alpha latency_steps + beta traffic bytes";
  document["n_points"] = bytes.size();
  document["latency_steps"] = o.collective.latency_steps;
  document["traffic"] = o.collective.traffic;
  page.line(fmt::format("T = {:g} alpha + {:g} beta bytes, {} records", o.collective.latency_steps,
                        o.collective.traffic, bytes.size()));
  page.intervals("none", "no intervals");
  ordered_json pieces = ordered_json::array();
  for (const studies::MessageCost& piece : fit.pieces) {
    pieces.push_back({{"from_bytes", piece.from_bytes},
                      {"latency_s", piece.latency_s},
                      {"s_per_byte", piece.s_per_byte},
                      {"bytes_per_s", json_number(piece.bytes_per_s())},
                      {"half_bytes", json_number(piece.half_bytes())},
                      {"rms_relative", piece.rms_relative}});
    page.line(
        fmt::format("from {:g} bytes: alpha {:.6g} us, 1/beta {:.6g} GB/s, half of it at "
                    "{:.6g} bytes, RMS relative error {:.3g}",
                    piece.from_bytes, piece.latency_s * 1e6, piece.bytes_per_s() * 1e-9,
                    piece.half_bytes(), piece.rms_relative));
  }
  document["pieces"] = std::move(pieces);
  document["breakpoint_bytes"] = fit.breakpoint_bytes;
  if (fit.breakpoint_bytes > 0)
    page.line(fmt::format("breakpoint {:.6g} bytes", fit.breakpoint_bytes));
  FitOptions in_seconds = o;
  in_seconds.y = "seconds";
  page.points(in_seconds, {bytes}, seconds,
              [&](std::size_t i) { return fit.seconds(bytes[i], o.collective); });
  page.figure("aicc", fit.aicc, "AICc");
}

void fit_amdahl_law(FitPage& page, const Columns& columns, const FitOptions& o) {
  const auto [ranks, seconds] = ascending({columns[0], seconds_of(o.y, columns[1])});
  need_single(o, ranks);
  need(o, o.x[0], ranks.size(), 3);
  ordered_json& document = page.report.document;
  document["model"] = "amdahl";
  document["formula"] = "T = T1 (s + (1 - s)/p)";
  document["n_points"] = ranks.size();
  page.line(fmt::format("T = T1 (s + (1 - s)/p), {} records", ranks.size()));
  page.intervals("none", "no intervals");
  page.parameter("s", studies::amdahl_fraction(ranks, seconds), {}, "serial fraction");
  page.report.text += "\n";
  page.line(fmt::format("{:>8} {:>13} {:>9} {:>11} {:>16}", "ranks", "seconds", "speed-up",
                        "efficiency", "serial fraction"));
  const std::vector<studies::Scaling> curve = studies::strong_scaling(ranks, seconds);
  ordered_json rows = ordered_json::array();
  for (std::size_t i = 0; i < curve.size(); ++i) {
    rows.push_back({{"ranks", curve[i].ranks},
                    {"seconds", seconds[i]},
                    {"speedup", curve[i].speedup},
                    {"efficiency", curve[i].efficiency},
                    {"serial_fraction", json_number(curve[i].serial_fraction)}});
    page.line(fmt::format("{:>8g} {:>13.6g} {:>9.4g} {:>11.4g} {:>16.4g}", curve[i].ranks,
                          seconds[i], curve[i].speedup, curve[i].efficiency,
                          curve[i].serial_fraction));
  }
  page.line(fmt::format("speed-up and efficiency are against {:g} ranks", ranks.front()));
  document["base_ranks"] = ranks.front();
  document["points"] = std::move(rows);
}

}  // namespace

std::span<const FitLaw> fit_laws() {
  static constexpr std::array laws{
      FitLaw{"hyper", "S = a + b/B", "batch_size", "steps_to_target", true, fit_steps_law},
      FitLaw{"hyper_alpha", "S = a + b/B^alpha", "batch_size", "steps_to_target", true,
             fit_steps_law},
      FitLaw{"three_term_inv", "S = s (1 - d/B^beta)^(-1/gamma)", "batch_size", "steps_to_target",
             true, fit_steps_law},
      FitLaw{"auto", "the one of these three that AICc prefers", "batch_size", "steps_to_target",
             true, fit_steps_law},
      FitLaw{"power", "y = factor x^exponent, and constant from a knee on", "", "", false,
             fit_power_law},
      FitLaw{"lr_exponent", "the same for the best learning rate against batch size", "batch_size",
             "lr", false, fit_power_law},
      FitLaw{"three_term", "L = E + B/M^beta + C/K^gamma; + A/N^alpha with a third key",
             "batch_size,step", "val_loss", false, fit_loss_law},
      FitLaw{"power_lines", "D = D_min (1 + B/B_crit) of each loss that all batches have had",
             "batch_size,examples", "val_loss", false, fit_power_lines_law},
      FitLaw{"alpha_beta", "T = alpha + beta bytes, in one piece or two", "bytes", "seconds", false,
             fit_message_law},
      FitLaw{"amdahl", "T = T1 (s + (1 - s)/p)", "ranks", "seconds", false, fit_amdahl_law},
  };
  return laws;
}

studies::CollectiveShape ring_shape(const std::string& collective, int ranks) {
  const auto p = static_cast<double>(ranks);
  const double passes = collective == "all_reduce" ? 2 : 1;
  return {passes * (p - 1), passes * (p - 1) / p};
}

FitReport fit_file(const FitOptions& options) {
  std::vector<std::string> keys = options.x;
  keys.push_back(options.y);
  const Records records = read_records(options.file, keys);
  FitPage page;
  page.report.document = {
      {"t", "fit"},
      {"model", options.law->name},
      {"formula", ""},
      {"file", options.file},
      {"x", options.x.size() == 1 ? ordered_json(options.x[0]) : ordered_json(options.x)},
      {"y", options.y},
      {"n_records", records.columns[0].size()}};
  page.report.text =
      fmt::format("{}: {} against {}\n", options.file, options.y, fmt::join(options.x, ", "));
  if (!records.warning.empty()) page.warn(records.warning);
  options.law->fit(page, records.columns, options);
  page.finish();
  return std::move(page.report);
}

}  // namespace orthrus::cli
