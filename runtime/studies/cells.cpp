#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <orthrus/error.hpp>
#include <orthrus/studies/cells.hpp>
#include <utility>

#include "runtime/studies/random.hpp"
#include "runtime/studies/student.hpp"

namespace orthrus::studies {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

/// Steps are averaged by their logarithms, losses as they are.
double scaled(RateMetric metric, double value) {
  return metric == RateMetric::loss ? value : std::log(value);
}
double unscaled(RateMetric metric, double value) {
  return metric == RateMetric::loss ? value : std::exp(value);
}

double mean_of(std::span<const SeedValue> seeds, RateMetric metric) {
  double sum = 0;
  for (const SeedValue& seed : seeds) {
    if (!std::isfinite(seed.value)) return infinity;
    sum += scaled(metric, seed.value);
  }
  return sum / static_cast<double>(seeds.size());
}

/// What the mean of seeds is more than, if those that were censored are: 0 where one of them is not
/// known.
double mean_above(std::span<const SeedValue> seeds) {
  double sum = 0;
  for (const SeedValue& seed : seeds) {
    const double least = std::isfinite(seed.value) ? seed.value : seed.above;
    if (!(least > 0)) return 0;
    sum += std::log(least);
  }
  return seeds.empty() ? 0 : std::exp(sum / static_cast<double>(seeds.size()));
}

/// The mean of seeds drawn anew, its deviation scaled as in `stratified_interval`. One seed stays
/// as it is, and so does a rate that diverged.
double drawn_mean(std::span<const SeedValue> seeds, RateMetric metric, Random& random) {
  const double mean = mean_of(seeds, metric);
  if (seeds.size() < 2 || !std::isfinite(mean)) return mean;
  const auto count = static_cast<double>(seeds.size());
  double sum = 0;
  for (std::size_t i = 0; i < seeds.size(); ++i) {
    sum += scaled(metric, seeds[random.below(seeds.size())].value);
  }
  return mean + std::sqrt(count / (count - 1)) * (sum / count - mean);
}

/// Standard error of the difference of two of the branches' means, pooled: of a table of seeds and
/// branches without gaps what neither explains. 0: not known.
double difference_error(std::span<const Branch> branches) {
  std::map<std::int64_t, std::vector<double>> rows;
  std::size_t finite = 0;
  for (const Branch& branch : branches) {
    if (!std::isfinite(mean_of(branch.losses, RateMetric::loss))) continue;
    ++finite;
    for (const SeedValue& seed : branch.losses) rows[seed.seed].push_back(seed.value);
  }
  std::erase_if(rows, [&](const auto& row) { return row.second.size() != finite; });
  if (rows.size() < 2 || finite < 2) return 0;
  const auto seeds = static_cast<double>(rows.size()), tried = static_cast<double>(finite);
  std::vector<double> means(finite, 0.0);
  for (const auto& [seed, row] : rows) {
    for (std::size_t k = 0; k < finite; ++k) means[k] += row[k] / seeds;
  }
  const double all = std::accumulate(means.begin(), means.end(), 0.0) / tried;
  double squares = 0;
  for (const auto& [seed, row] : rows) {
    const double own = std::accumulate(row.begin(), row.end(), 0.0) / tried;
    for (std::size_t k = 0; k < finite; ++k) {
      const double rest = row[k] - own - means[k] + all;
      squares += rest * rest;
    }
  }
  return std::sqrt(2 * squares / ((seeds - 1) * (tried - 1)) / seeds);
}

bool tuned(const CellRate& rate) { return !rate.tuning.empty(); }

/// Rates that took part in the choice, `value` of each.
std::vector<RateOutcome> outcomes_of(const Cell& cell,
                                     const std::function<double(const CellRate&)>& value) {
  std::vector<RateOutcome> outcomes;
  for (const CellRate& rate : cell.rates) {
    if (tuned(rate)) outcomes.push_back({rate.lr, {unscaled(cell.metric, value(rate))}});
  }
  return outcomes;
}

const CellRate& rate_of(const Cell& cell, double lr) {
  return *std::find_if(cell.rates.begin(), cell.rates.end(),
                       [&](const CellRate& rate) { return rate.lr == lr; });
}

void choose(Cell& cell) {
  // A cell whose reports came first is chosen on them.
  if (std::none_of(cell.rates.begin(), cell.rates.end(), tuned)) {
    for (CellRate& rate : cell.rates) rate.tuning = rate.reporting;
  }
  cell.choice = choose_rate(
      outcomes_of(cell, [&](const CellRate& r) { return mean_of(r.tuning, cell.metric); }),
      cell.metric);
  cell.value = infinity;
  if (cell.choice.censored) {
    // The best of the rates is above what the lowest of them is; one that diverged is not the best.
    for (const CellRate& rate : cell.rates) {
      const double above = mean_above(rate.tuning);
      if (above > 0 && (cell.above == 0 || above < cell.above)) cell.above = above;
    }
    return;
  }
  const CellRate& rate = rate_of(cell, cell.choice.lr);
  cell.record = rate.reporting.empty() ? rate.tuning : rate.reporting;
  const auto among_tuning = [&](const SeedValue& seed) {
    return std::any_of(rate.tuning.begin(), rate.tuning.end(),
                       [&](const SeedValue& other) { return other.seed == seed.seed; });
  };
  cell.fresh = std::none_of(cell.record.begin(), cell.record.end(), among_tuning);
  cell.value = unscaled(cell.metric, mean_of(cell.record, cell.metric));
  if (cell.censored()) cell.above = mean_above(cell.record);
}

/// One resample of a cell: what its rate and its record might have been.
struct CellDraw {
  double value = infinity;
  double lr = 0;  ///< of the tuning curve's vertex
};
CellDraw draw(const Cell& cell, Random& random) {
  const std::vector<RateOutcome> outcomes = outcomes_of(
      cell, [&](const CellRate& r) { return drawn_mean(r.tuning, cell.metric, random); });
  const RateChoice choice = choose_rate(outcomes, cell.metric);
  if (choice.censored) return {};
  if (!cell.fresh) return {choice.value, choice.fitted_lr};
  const CellRate& rate = rate_of(cell, choice.lr);
  if (!rate.reporting.empty()) {
    return {unscaled(cell.metric, drawn_mean(rate.reporting, cell.metric, random)),
            choice.fitted_lr};
  }
  // Nobody reported this rate: what was reported, moved by what tuning says of the two.
  const double moved = mean_of(rate.tuning, cell.metric) -
                       mean_of(rate_of(cell, cell.choice.lr).tuning, cell.metric);
  return {unscaled(cell.metric, drawn_mean(cell.record, cell.metric, random) + moved),
          choice.fitted_lr};
}

std::vector<double> column(std::span<const std::vector<double>> rows, std::size_t j) {
  std::vector<double> values;
  for (const std::vector<double>& row : rows) values.push_back(row[j]);
  return values;
}

std::vector<const Cell*> uncensored(std::span<const Cell> cells) {
  std::vector<const Cell*> out;
  for (const Cell& cell : cells) {
    if (!cell.censored()) out.push_back(&cell);
  }
  return out;
}

}  // namespace

bool Cell::censored() const noexcept { return !std::isfinite(value); }

std::string_view name_of(IntervalKind kind) noexcept {
  switch (kind) {
    case IntervalKind::none:
      return "none";
    case IntervalKind::stratified:
      return "stratified";
    case IntervalKind::residual:
      return "residual";
    case IntervalKind::student_t:
      return "student_t";
  }
  return "?";
}

std::vector<Cell> cells_of(std::span<const TrialOutcome> trials, RateMetric metric) {
  struct Seeds {
    std::map<std::int64_t, SeedValue> tuning, reporting;
  };
  std::vector<std::string> series;
  std::map<std::string, std::map<double, std::map<double, Seeds>>> sorted;
  for (const TrialOutcome& trial : trials) {
    expects<NumericError>(
        std::isfinite(trial.batch) && trial.batch > 0 && std::isfinite(trial.lr) && trial.lr > 0,
        "batch sizes and learning rates are finite and positive");
    if (!sorted.contains(trial.series)) series.push_back(trial.series);
    Seeds& seeds = sorted[trial.series][trial.batch][trial.lr];
    const SeedValue value{trial.seed, trial.value, trial.above};
    if (trial.role != SeedRole::report) seeds.tuning[trial.seed] = value;
    if (trial.role != SeedRole::tune) seeds.reporting[trial.seed] = value;
  }
  const auto listed = [](const std::map<std::int64_t, SeedValue>& seeds) {
    std::vector<SeedValue> out;
    for (const auto& [seed, value] : seeds) out.push_back(value);
    return out;
  };
  std::vector<Cell> cells;
  for (const std::string& name : series) {
    for (const auto& [batch, rates] : sorted[name]) {
      Cell cell;
      cell.series = name;
      cell.batch = batch;
      cell.metric = metric;
      for (const auto& [lr, seeds] : rates) {
        cell.rates.push_back({lr, listed(seeds.tuning), listed(seeds.reporting)});
      }
      choose(cell);
      cells.push_back(std::move(cell));
    }
  }
  return cells;
}

StepsStudy study_steps(std::span<const Cell> cells, const StepsQuestion& question) {
  StepsStudy study;
  const std::vector<const Cell*> used = uncensored(cells);
  bool resampled = true;
  for (const Cell& cell : cells) {
    if (!cell.censored()) continue;
    study.censored.push_back(cell.batch);
    if (question.tobit && cell.above > 0) study.above.push_back({cell.batch, cell.above});
  }
  for (const Cell* cell : used) {
    study.batches.push_back(cell->batch);
    study.steps.push_back(cell->value);
    resampled = resampled && cell->record.size() >= 2;
  }
  study.fit = question.model ? fit_steps(*question.model, study.batches, study.steps, study.above)
                             : select_steps(study.batches, study.steps, study.above);
  const std::size_t parameters = study.fit.parameters.size();
  for (const CbsDefinition definition : question.definitions) {
    const StepsModel needed =
        definition == CbsDefinition::token_optimal ? StepsModel::three_term_inv : StepsModel::hyper;
    if (study.fit.model != needed) continue;
    study.critical.push_back(
        critical_batch(study.fit, definition, question.reference_batch, question.overhead));
  }
  study.steps_intervals.resize(used.size());
  study.parameter_intervals.resize(parameters);
  study.critical_draws.resize(study.critical.size());
  if (question.bootstrap.resamples == 0) return study;

  // Per resample: the parameters, then the critical batches.
  std::vector<std::vector<double>> draws;
  const auto record = [&](const StepsFit& fit) {
    std::vector<double> row = fit.parameters;
    for (const CbsEstimate& estimate : study.critical) {
      row.push_back(
          critical_batch(fit, estimate.definition, question.reference_batch, question.overhead)
              .value);
    }
    draws.push_back(std::move(row));
    return 0.0;
  };
  if (resampled) {
    study.kind = IntervalKind::stratified;
    std::vector<std::vector<double>> steps(used.size());
    Random random(question.bootstrap.seed, 3);
    for (int i = 0; i < question.bootstrap.resamples; ++i) {
      std::vector<double> batches, values;
      for (std::size_t c = 0; c < used.size(); ++c) {
        const double value = draw(*used[c], random).value;
        // A rate that is chosen in this resample alone may not have reached the target.
        if (!std::isfinite(value)) continue;
        steps[c].push_back(value);
        batches.push_back(used[c]->batch);
        values.push_back(value);
      }
      if (values.size() >= parameters) record(refit_steps(study.fit, batches, values, study.above));
    }
    for (std::size_t c = 0; c < used.size(); ++c) {
      if (!steps[c].empty()) {
        study.steps_intervals[c] =
            percentile_interval(std::move(steps[c]), question.bootstrap.level);
      }
    }
  } else if (used.size() > parameters) {
    study.kind = IntervalKind::residual;
    (void)residual_interval(study.fit, study.batches, record, question.bootstrap, study.above);
  }
  if (draws.empty()) {
    study.kind = IntervalKind::none;
    return study;
  }
  const double level = question.bootstrap.level;
  for (std::size_t j = 0; j < parameters; ++j) {
    study.parameter_intervals[j] = percentile_interval(column(draws, j), level);
  }
  for (std::size_t j = 0; j < study.critical.size(); ++j) {
    study.critical_draws[j] = column(draws, parameters + j);
    std::sort(study.critical_draws[j].begin(), study.critical_draws[j].end());
    study.critical[j].interval = percentile_interval(study.critical_draws[j], level);
  }
  return study;
}

RateStudy study_rates(std::span<const Cell> cells, const Bootstrap& bootstrap) {
  RateStudy study;
  std::vector<const Cell*> used;
  bool resampled = bootstrap.resamples > 0;
  for (const Cell& cell : cells) {
    if (cell.choice.censored) continue;
    used.push_back(&cell);
    study.batches.push_back(cell.batch);
    study.lrs.push_back(cell.choice.fitted_lr);
    for (const CellRate& rate : cell.rates) {
      resampled = resampled && (!tuned(rate) || rate.tuning.size() >= 2);
    }
  }
  if (used.size() >= 5) {
    study.bent = fit_saturating_power(study.batches, study.lrs);
    study.surge = fit_surge(study.batches, study.lrs);
  }
  // Above the knee rates no longer follow the batch: the exponent is of those below.
  std::vector<std::size_t> below;
  for (std::size_t c = 0; c < used.size(); ++c) {
    if (!study.bent || !study.bent->preferred || study.batches[c] <= study.bent->knee) {
      below.push_back(c);
    }
  }
  std::vector<double> x, y;
  for (const std::size_t c : below) {
    x.push_back(study.batches[c]);
    y.push_back(study.lrs[c]);
  }
  study.law = fit_power(x, y);
  study.exponent = study.law.exponent_interval;
  study.kind = below.size() > 2 ? IntervalKind::student_t : IntervalKind::none;
  study.lr_intervals.resize(used.size());
  if (!resampled) return study;
  // The exponent is linear in ln η: its slope there needs no fit per resample.
  double mean = 0, squares = 0;
  for (const double batch : x) mean += std::log(batch) / static_cast<double>(x.size());
  for (const double batch : x) squares += (std::log(batch) - mean) * (std::log(batch) - mean);
  std::vector<std::vector<double>> draws;
  std::vector<double> exponents;
  Random random(bootstrap.seed, 4);
  for (int i = 0; i < bootstrap.resamples; ++i) {
    std::vector<double> lrs;
    for (const Cell* cell : used) lrs.push_back(draw(*cell, random).lr);
    double exponent = 0;
    for (const std::size_t c : below) {
      exponent += (std::log(study.batches[c]) - mean) / squares * std::log(lrs[c]);
    }
    exponents.push_back(exponent);
    draws.push_back(std::move(lrs));
  }
  study.exponent = percentile_interval(std::move(exponents), bootstrap.level);
  for (std::size_t c = 0; c < used.size(); ++c) {
    study.lr_intervals[c] = percentile_interval(column(draws, c), bootstrap.level);
  }
  study.kind = IntervalKind::stratified;
  return study;
}

std::optional<bool> RateShift::stays() const {
  constexpr double most = 0.5;  // of an octave
  if (kind == IntervalKind::none) return std::abs(shift) <= most;
  if (interval.lo >= -most && interval.hi <= most) return true;
  if (interval.hi < -most || interval.lo > most) return false;
  return {};
}

std::optional<bool> RateShift::costs_nothing() const {
  if (std::isnan(penalty)) return {};
  return penalty <= std::max(0.01, 2 * penalty_error);
}

namespace {

/// Of `cell`, seed by seed: what `lr` costs over its own best rate.
void set_penalty(RateShift& shift, const Cell& cell, double lr) {
  shift.penalty = std::nan("");
  const auto tried = std::find_if(cell.rates.begin(), cell.rates.end(),
                                  [lr](const CellRate& rate) { return rate.lr == lr; });
  if (cell.metric != RateMetric::loss || tried == cell.rates.end()) return;
  std::vector<double> costs;
  for (const SeedValue& own : rate_of(cell, cell.choice.lr).tuning) {
    for (const SeedValue& other : tried->tuning)
      if (other.seed == own.seed) costs.push_back(other.value - own.value);
  }
  if (costs.empty()) return;
  const auto n = static_cast<double>(costs.size());
  shift.penalty = std::accumulate(costs.begin(), costs.end(), 0.0) / n;
  if (costs.size() < 2 || !std::isfinite(shift.penalty)) return;
  double squares = 0;
  for (const double cost : costs) squares += (cost - shift.penalty) * (cost - shift.penalty);
  shift.penalty_error = std::sqrt(squares / (n - 1) / n);
}

}  // namespace

std::vector<RateShift> rate_shifts(std::span<const Cell> cells, std::span<const double> sizes,
                                   const Bootstrap& bootstrap) {
  expects(cells.size() == sizes.size(), "as many sizes as cells");
  std::vector<std::size_t> used;
  bool resampled = bootstrap.resamples > 0;
  for (std::size_t c = 0; c < cells.size(); ++c) {
    expects<ConfigError>(c == 0 || sizes[c] > sizes[c - 1], "sizes ascend");
    if (cells[c].choice.censored) continue;
    used.push_back(c);
    for (const CellRate& rate : cells[c].rates)
      resampled = resampled && (!tuned(rate) || rate.tuning.size() >= 2);
  }
  std::vector<RateShift> out;
  if (used.empty()) return out;
  const Cell& least = cells[used.front()];
  std::vector<std::vector<double>> drawn(used.size());  // log₂ of rates
  Random random(bootstrap.seed, 7);
  for (int k = 0; resampled && k < bootstrap.resamples; ++k) {
    std::vector<double> rates;
    for (const std::size_t c : used) rates.push_back(draw(cells[c], random).lr);
    if (*std::min_element(rates.begin(), rates.end()) <= 0) continue;
    for (std::size_t i = 0; i < used.size(); ++i)
      drawn[i].push_back(std::log2(rates[i] / rates[0]));
  }
  for (std::size_t i = 0; i < used.size(); ++i) {
    const Cell& cell = cells[used[i]];
    RateShift shift;
    shift.size = sizes[used[i]];
    shift.shift = std::log2(cell.choice.fitted_lr / least.choice.fitted_lr);
    if (!drawn[i].empty()) {
      shift.interval = percentile_interval(std::move(drawn[i]), bootstrap.level);
      shift.kind = IntervalKind::stratified;
    }
    set_penalty(shift, cell, least.choice.lr);
    out.push_back(shift);
  }
  return out;
}

SeedSpread seed_spread(std::span<const Cell> cells) {
  double squares = 0;
  SeedSpread spread;
  for (const Cell* cell : uncensored(cells)) {
    double mean = 0;
    for (const SeedValue& seed : cell->record) mean += std::log(seed.value);
    mean /= static_cast<double>(cell->record.size());
    for (const SeedValue& seed : cell->record) {
      squares += (std::log(seed.value) - mean) * (std::log(seed.value) - mean);
    }
    spread.freedom += static_cast<int>(cell->record.size()) - 1;
  }
  if (spread.freedom > 0) spread.sigma = std::sqrt(squares / spread.freedom);
  return spread;
}

std::vector<TokenRatio> token_ratios(std::span<const Cell> numerator,
                                     std::span<const Cell> denominator, double level) {
  std::vector<Cell> both(numerator.begin(), numerator.end());
  both.insert(both.end(), denominator.begin(), denominator.end());
  const double sigma = seed_spread(both).sigma;
  std::vector<TokenRatio> ratios;
  for (const Cell* above : uncensored(numerator)) {
    for (const Cell* under : uncensored(denominator)) {
      if (above->batch != under->batch) continue;
      std::vector<double> logs;
      for (const SeedValue& a : above->record) {
        for (const SeedValue& b : under->record) {
          if (a.seed == b.seed) logs.push_back(std::log(a.value / b.value));
        }
      }
      TokenRatio ratio;
      ratio.batch = above->batch;
      ratio.pairs = static_cast<int>(logs.size());
      ratio.interval = {0, infinity};
      double mean = std::log(above->value / under->value);
      if (!logs.empty()) {
        const auto count = static_cast<double>(logs.size());
        mean = std::accumulate(logs.begin(), logs.end(), 0.0) / count;
        if (logs.size() >= 2) {
          double squares = 0;
          for (const double log : logs) squares += (log - mean) * (log - mean);
          const double error = std::sqrt(squares / (count - 1) / count);
          const double reach = student_quantile((1 + level) / 2, count - 1) * error;
          ratio.interval = {std::exp(mean - reach), std::exp(mean + reach)};
        }
      }
      ratio.ratio = std::exp(mean);
      const double share = 1 / static_cast<double>(above->record.size()) +
                           1 / static_cast<double>(under->record.size());
      if (sigma > 0) ratio.sigmas = std::abs(mean) / (sigma * std::sqrt(share));
      ratios.push_back(ratio);
    }
  }
  return ratios;
}

LocalCbs local_cbs(std::span<const Branch> branches, double least_epsilon) {
  expects(!branches.empty(), "a local critical batch is one of at least one branch");
  LocalCbs out;
  double least = infinity;  // of smaller branches
  for (std::size_t k = 0; k < branches.size(); ++k) {
    expects(!branches[k].losses.empty(), "every branch has a seed");
    expects(k == 0 || branches[k].batch > branches[k - 1].batch,
            "branches are in order of their batches");
    out.losses.push_back(mean_of(branches[k].losses, RateMetric::loss));
    out.epsilons.push_back(std::max(least_epsilon, 2 * difference_error(branches.first(k + 1))));
    if (k == 0 || out.losses[k] <= least + out.epsilons[k]) {
      out.batch = branches[k].batch;
      out.next = k + 1 < branches.size() ? branches[k + 1].batch : infinity;
      out.epsilon = out.epsilons[k];
    }
    least = std::min(least, out.losses[k]);
  }
  return out;
}

}  // namespace orthrus::studies
