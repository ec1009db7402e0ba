// Fits give back the laws that made the data, and say when they do not fit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <orthrus/error.hpp>
#include <orthrus/studies/fit.hpp>
#include <orthrus/studies/loggp.hpp>
#include <orthrus/studies/theory.hpp>

#include "runtime/studies/random.hpp"

namespace orthrus::studies {
namespace {

std::vector<double> octaves(int first, int last) {
  std::vector<double> out;
  for (int k = first; k <= last; ++k) out.push_back(std::pow(2.0, k));
  return out;
}

template <class F>
std::vector<double> map(const std::vector<double>& x, F f) {
  std::vector<double> out;
  for (const double v : x) out.push_back(f(v));
  return out;
}

void expect_parameters(const StepsFit& fit, const std::vector<double>& truth, double tolerance) {
  ASSERT_EQ(fit.parameters.size(), truth.size());
  for (std::size_t i = 0; i < truth.size(); ++i) {
    EXPECT_NEAR(fit.parameters[i] / truth[i], 1, tolerance) << name_of(fit.model) << " " << i;
  }
}

TEST(FitSteps, FindsTheParametersOfExactData) {
  const std::vector<double> batches = octaves(3, 14);
  expect_parameters(
      fit_steps(StepsModel::hyper, batches, map(batches, [](double b) { return 40 + 9000 / b; })),
      {40, 9000}, 1e-8);
  expect_parameters(fit_steps(StepsModel::hyper_alpha, batches,
                              map(batches, [](double b) { return 40 + 9000 / std::pow(b, 0.8); })),
                    {40, 9000, 0.8}, 1e-6);
  const StepsFit law = fit_steps(StepsModel::three_term_inv, batches, map(batches, [](double b) {
                                   return 30 * std::pow(1 - 2 / std::sqrt(b), -1 / 0.7);
                                 }));
  expect_parameters(law, {30, 2, 0.5, 0.7}, 1e-4);
  EXPECT_LT(law.rms_log, 1e-6);
  for (const double b : batches) {
    EXPECT_NEAR(law.steps(b) / (30 * std::pow(1 - 2 / std::sqrt(b), -1 / 0.7)), 1, 1e-5);
  }
  // The same law as theory writes it: floor 0, target 1.
  const StepsBatchLaw same{0, std::pow(30, 0.7), 0.7, 2, 0.5};
  EXPECT_NEAR(critical_batch(law, CbsDefinition::token_optimal).value / same.token_optimal_batch(1),
              1, 1e-3);
}

TEST(FitSteps, ReportsWhatFollowsFromItsResiduals) {
  const std::vector<double> batches = octaves(4, 11);
  Random random(3);
  const std::vector<double> steps =
      map(batches, [&](double b) { return (40 + 9000 / b) * std::exp(0.05 * random.normal()); });
  const StepsFit fit = fit_steps(StepsModel::hyper, batches, steps);
  double squares = 0, left_out = 0;
  for (std::size_t i = 0; i < batches.size(); ++i) {
    const double r = std::log(steps[i] / fit.steps(batches[i]));
    EXPECT_NEAR(fit.log_residuals[i], r, 1e-12);
    squares += r * r;
    std::vector<double> fewer = batches, rest = steps;
    fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(i));
    rest.erase(rest.begin() + static_cast<std::ptrdiff_t>(i));
    const double off =
        std::log(steps[i] / fit_steps(StepsModel::hyper, fewer, rest).steps(batches[i]));
    left_out += off * off;
  }
  EXPECT_NEAR(fit.rms_log, std::sqrt(squares / 8), 1e-12);
  EXPECT_NEAR(fit.aicc, 8 * std::log(squares / 8) + 6 + 24.0 / 4, 1e-9);  // k = 3
  EXPECT_NEAR(fit.left_out_rms, std::sqrt(left_out / 8), 1e-7);
  // No other parameters have smaller squares.
  for (const double da : {-0.01, 0.01}) {
    for (const double db : {-0.01, 0.0, 0.01}) {
      StepsFit other = fit;
      other.parameters[0] *= 1 + da;
      other.parameters[1] *= 1 + db;
      double more = 0;
      for (std::size_t i = 0; i < batches.size(); ++i) {
        const double r = std::log(steps[i] / other.steps(batches[i]));
        more += r * r;
      }
      EXPECT_GT(more, squares);
    }
  }
  EXPECT_TRUE(std::isinf(
      fit_steps(StepsModel::three_term_inv, octaves(0, 4), std::vector<double>{100, 60, 40, 30, 25})
          .aicc));
}

TEST(FitSteps, BentResidualsAreFlaggedAndWhiteOnesSeldom) {
  const std::vector<double> batches = octaves(0, 9);
  int white = 0, bent = 0, chosen = 0;
  for (std::uint64_t k = 0; k < 300; ++k) {
    Random random(4, k);
    const auto noisy = [&](double s) { return s * std::exp(0.03 * random.normal()); };
    const StepsFit plain = fit_steps(StepsModel::hyper, batches,
                                     map(batches, [&](double b) { return noisy(30 + 1000 / b); }));
    if (plain.structured()) ++white;
    const std::vector<double> data =
        map(batches, [&](double b) { return noisy(20 + 1000 / std::pow(b, 0.75)); });
    if (fit_steps(StepsModel::hyper, batches, data).structured()) ++bent;
    if (k < 50 && select_steps(batches, data).model != StepsModel::hyper) ++chosen;
  }
  // 4 of 100 by Student's t; 12 ± 3.5 of 300.
  EXPECT_LE(white, 24);
  EXPECT_GE(white, 3);
  EXPECT_GE(bent, 270);
  EXPECT_GE(chosen, 45);
}

TEST(SelectSteps, KeepsTheHyperbolaItWasMadeFrom) {
  const std::vector<double> batches = octaves(0, 12);
  int kept = 0;
  for (std::uint64_t k = 0; k < 50; ++k) {
    Random random(5, k);
    kept += select_steps(
                batches,
                map(batches,
                    [&](double b) {
                      return (30 + 1000 / b) * std::exp(0.03 * random.normal());
                    })).model == StepsModel::hyper
                ? 1
                : 0;
  }
  EXPECT_GE(kept, 40);  // AICc's price for one parameter errs about once in ten
}

/// S = 100 + 6400/B with noise of `sigma` at half octaves from 8 to 4096, measured up to as many
/// examples as `budget`.
struct Budgeted {
  std::vector<double> batches, steps;
  std::vector<StepsAbove> censored;
};
Budgeted budgeted(double sigma, double budget, Random& random) {
  Budgeted out;
  for (int k = 6; k <= 24; ++k) {
    const double b = std::pow(2.0, 0.5 * k);
    const double steps = (100 + 6400 / b) * std::exp(sigma * random.normal());
    if (steps * b > budget) {
      out.censored.push_back({b, budget / b});
    } else {
      out.batches.push_back(b);
      out.steps.push_back(steps);
    }
  }
  return out;
}

TEST(CensoredSteps, AreWhereTheLikelihoodIsLargest) {
  Random random(11);
  const Budgeted data = budgeted(0.2, 1.8e5, random);
  ASSERT_GE(data.censored.size(), 3U);
  const StepsFit fit = fit_steps(StepsModel::hyper, data.batches, data.steps, data.censored);
  const auto deviance = [&](double a, double b, double sigma) {
    double sum = 0;
    for (std::size_t i = 0; i < data.batches.size(); ++i) {
      const double r = std::log(data.steps[i] / (a + b / data.batches[i])) / sigma;
      sum += r * r + 2 * std::log(sigma);
    }
    for (const StepsAbove& above : data.censored) {
      const double z = std::log((a + b / above.batch) / above.steps) / sigma;
      sum -= 2 * std::log(std::erfc(-z / std::sqrt(2.0)) / 2);
    }
    return sum;
  };
  const auto profile = [&](double a, double b) {
    double least = std::numeric_limits<double>::infinity();
    for (double sigma = 0.05; sigma < 0.6; sigma *= 1.001) {
      least = std::min(least, deviance(a, b, sigma));
    }
    return least;
  };
  const double a = fit.parameters[0], b = fit.parameters[1], here = profile(a, b);
  for (const double nudge : {0.98, 1.02}) {
    EXPECT_GT(profile(a * nudge, b), here);
    EXPECT_GT(profile(a, b * nudge), here);
  }
  const auto n = static_cast<double>(data.batches.size());
  EXPECT_NEAR(fit.aicc, here - n + 6 + 24 / (n - 4), 1e-3);  // k = 3; its constant is left out
  // What is far below the law says nothing; without any, it is the fit of least squares.
  const std::vector<StepsAbove> known{{1 << 13, 1}};
  EXPECT_NEAR(fit_steps(StepsModel::hyper, data.batches, data.steps, known).parameters[0] /
                  fit_steps(StepsModel::hyper, data.batches, data.steps).parameters[0],
              1, 1e-6);
}

// Where noise decides which batches are censored, those that are left came out low.
TEST(CensoredSteps, LeaveTheCriticalBatchWithoutTheBiasOfLeavingThemOut) {
  constexpr int studies = 100;
  Random random(5);
  Bootstrap bootstrap;
  bootstrap.resamples = 100;
  std::vector<double> with, without;
  int covered = 0;
  const auto critical = [](const StepsFit& fit) { return fit.parameters[1] / fit.parameters[0]; };
  for (int i = 0; i < studies; ++i) {
    // 100 B + 6400 reaches it at batch 1036: the cells around are a matter of luck.
    const Budgeted data = budgeted(0.5, 1.1e5, random);
    const StepsFit tobit = fit_steps(StepsModel::hyper, data.batches, data.steps, data.censored);
    with.push_back(std::log(critical(tobit) / 64));
    without.push_back(
        std::log(critical(fit_steps(StepsModel::hyper, data.batches, data.steps)) / 64));
    const Interval interval =
        residual_interval(tobit, data.batches, critical, bootstrap, data.censored);
    covered += interval.lo <= 64 && 64 <= interval.hi ? 1 : 0;
  }
  const auto median = [](const std::vector<double>& v) { return percentile_interval(v, 0.0).lo; };
  // One study spreads by 0.4 (its middle 80 % reach from -0.5 to 0.5): the median of 100 by 0.05.
  EXPECT_NEAR(median(with), 0, 0.15);
  EXPECT_GT(median(without), 0.2);
  EXPECT_GE(covered, 88);  // of 95 expected, three standard errors of 2.2
}

TEST(CriticalBatch, HasTheDefinitionAskedFor) {
  StepsFit fit;
  fit.parameters = {100, 50000};
  EXPECT_DOUBLE_EQ(critical_batch(fit, CbsDefinition::mccandlish).value, 500);
  // At the overhead batch, examples are 20 % above the linear scaling from 256.
  const double at = critical_batch(fit, CbsDefinition::overhead, 256, 0.2).value;
  EXPECT_NEAR(at * fit.steps(at), 1.2 * 256 * fit.steps(256), 1e-6);
  EXPECT_THROW((void)critical_batch(fit, CbsDefinition::token_optimal), ConfigError);
  fit.model = StepsModel::three_term_inv;
  EXPECT_THROW((void)critical_batch(fit, CbsDefinition::mccandlish), ConfigError);
}

TEST(Intervals, ArePercentiles) {
  const Interval i = percentile_interval({5, 1, 3, 2, 4}, 0.5);
  EXPECT_DOUBLE_EQ(i.lo, 2);
  EXPECT_DOUBLE_EQ(i.hi, 4);
  EXPECT_DOUBLE_EQ(percentile_interval({1, 2}, 0).lo, 1.5);
}

TEST(Intervals, AreTheSameTwiceAndWidenWithNoise) {
  const std::vector<double> batches = octaves(3, 12);
  const auto interval = [&](double noise) {
    Random random(6);
    const StepsFit fit = fit_steps(StepsModel::hyper, batches, map(batches, [&](double b) {
                                     return (40 + 9000 / b) * std::exp(noise * random.normal());
                                   }));
    return residual_interval(fit, batches, [](const StepsFit& f) { return f.parameters[0]; });
  };
  const Interval once = interval(0.02), again = interval(0.02), wide = interval(0.06);
  EXPECT_EQ(once.lo, again.lo);
  EXPECT_EQ(once.hi, again.hi);
  EXPECT_LT(2 * (once.hi - once.lo), wide.hi - wide.lo);
  EXPECT_LT(once.lo, 40);
  EXPECT_GT(once.hi, 40);
}

TEST(FitPower, HasTextbookErrors) {
  // y = x + 1 − 1 + … in logs: ln x = 0, 1, 2, 3 and ln y = 0, 1, 2, 4: slope 1.3, RSS 0.3.
  std::vector<double> x, y;
  for (int k = 0; k < 4; ++k) {
    x.push_back(std::exp(k));
    y.push_back(std::exp(k == 3 ? 4 : k));
  }
  const PowerLaw law = fit_power(x, y);
  EXPECT_NEAR(law.exponent, 1.3, 1e-12);
  EXPECT_NEAR(std::log(law.factor), -0.2, 1e-12);
  EXPECT_NEAR(law.exponent_error, std::sqrt(0.3 / 2 / 5), 1e-12);
  EXPECT_NEAR(law.exponent_interval.hi - law.exponent, 4.302653 * law.exponent_error, 1e-5);
  EXPECT_NEAR(law.rms_log, std::sqrt(0.3 / 4), 1e-12);
  // A weight of two is the point twice.
  const std::vector<double> weights{1, 1, 1, 2};
  x.push_back(x.back());
  y.push_back(y.back());
  EXPECT_NEAR(fit_power(std::span(x).first(4), std::span(y).first(4), weights).exponent,
              fit_power(x, y).exponent, 1e-12);
}

TEST(FitSaturatingPower, FindsTheKneeAndPrefersItOnlyWhereThereIsOne) {
  const std::vector<double> x = octaves(0, 9);
  Random random(7);
  const auto noise = [&] { return std::exp(0.02 * random.normal()); };
  const SaturatingPowerLaw bent = fit_saturating_power(
      x, map(x, [&](double b) { return 0.01 * std::pow(std::min(b, 48.0), 0.7) * noise(); }));
  EXPECT_TRUE(bent.preferred);
  EXPECT_NEAR(std::log2(bent.knee / 48), 0, 0.2);
  EXPECT_NEAR(bent.below.exponent, 0.7, 0.03);
  EXPECT_FALSE(fit_saturating_power(x, map(x, [&](double b) { return std::pow(b, 0.7) * noise(); }))
                   .preferred);
}

TEST(FitSurge, FindsTheTopOfWhatItIsMadeOf) {
  const SurgeLaw law{0.02, 96, 0, 0};
  EXPECT_DOUBLE_EQ(law(96), 0.02);
  // Of batches on one side of the top alone, and on both.
  for (const auto& batches : {std::vector<double>{4, 8, 16, 32, 64}, {16, 64, 256, 1024, 4096}}) {
    std::vector<double> rates;
    for (const double b : batches)
      rates.push_back(scaled_lr(LrRule::surge, law(16), 16, b, law.at));
    const SurgeLaw found = fit_surge(batches, rates);
    EXPECT_NEAR(found.at, law.at, 1e-4 * law.at);
    EXPECT_NEAR(found.peak, law.peak, 1e-6 * law.peak);
    EXPECT_LT(found.rms_log, 1e-6);
  }
  // A power law of another exponent is none.
  std::vector<double> x, y;
  for (double b = 1; b <= 1024; b *= 2) {
    x.push_back(b);
    y.push_back(1e-3 * std::pow(b, 0.9));
  }
  EXPECT_GT(fit_surge(x, y).aicc, fit_power(x, y).aicc);
  EXPECT_THROW((void)fit_surge(std::vector<double>{1, 2}, std::vector<double>{1, 2}), ShapeError);
}

TEST(TunedLr, FindsTheBottomOfAParabola) {
  std::vector<double> lrs, values;
  constexpr double best = -4.1;
  for (int k = 0; k < 9; ++k) {
    const double x = -6 + 0.5 * std::log(2.0) * k;
    lrs.push_back(std::exp(x));
    values.push_back(2 + 0.5 * (x - best) * (x - best));
  }
  // The best of nine lies inside, its neighbours are two on each side.
  const Tuned tuned = tuned_lr(lrs, values);
  EXPECT_FALSE(tuned.edge);
  EXPECT_NEAR(std::log(tuned.lr), best, 1e-9);
  EXPECT_NEAR(tuned.value, 2, 1e-9);
  EXPECT_NEAR(tuned.curvature, 1, 1e-9);
  // ½d² = 1 % of 2: d = 0.2 on both sides; interpolation between grid points is coarser.
  EXPECT_NEAR(tuned.plateau_octaves, 0.4 / std::log(2.0), 0.25);
  values.back() = std::numeric_limits<double>::infinity();
  EXPECT_NEAR(std::log(tuned_lr(lrs, values).lr), best, 1e-9);
  EXPECT_TRUE(tuned_lr(std::span(lrs).first(3), std::span(values).first(3)).edge);
  std::fill(values.begin(), values.end(), std::nan(""));
  EXPECT_THROW((void)tuned_lr(lrs, values), NumericError);
}

TEST(FitLoss, FindsSizeBatchAndStepsTerms) {
  std::vector<LossCell> cells;
  for (const double n : {1e7, 1e8, 1e9}) {
    for (const double batch : {16.0, 64.0, 256.0, 1024.0}) {
      for (const double steps : {500.0, 2000.0, 8000.0, 32000.0}) {
        cells.push_back({n, steps, batch,
                         1.8 + 480 / std::pow(n, 0.35) + 5 / std::pow(batch, 0.6) +
                             300 / std::pow(steps, 0.55)});
      }
    }
  }
  for (const double huber : {0.0, 1e-3}) {
    const LossLaw law = fit_loss(cells, huber);
    EXPECT_NEAR(law.irreducible, 1.8, 1e-3) << huber;
    EXPECT_NEAR(law.size_exponent, 0.35, 1e-3);
    EXPECT_NEAR(law.batch_exponent, 0.6, 1e-3);
    EXPECT_NEAR(law.steps_exponent, 0.55, 1e-3);
    EXPECT_NEAR(law.loss(cells[7]) / cells[7].loss, 1, 1e-5);
  }
  // A run gone wrong moves squares, not Huber.
  cells[20].loss *= 1.3;
  EXPECT_NEAR(fit_loss(cells, 1e-3).steps_exponent, 0.55, 0.005);
  EXPECT_GT(std::abs(fit_loss(cells, 0).steps_exponent - 0.55), 0.01);
}

TEST(LossLaw, BestBatchIsWhereTheLossIsLeast) {
  LossLaw law;
  law.irreducible = 2;
  law.batch_factor = 20;
  law.batch_exponent = 0.5;
  law.steps_factor = 300;
  law.steps_exponent = 0.6;
  constexpr double examples = 1e7;
  const double best = law.best_batch(examples);
  const auto loss = [&](double m) { return law.loss({0, examples / m, m, 0}); };
  EXPECT_LT(loss(best), loss(1.01 * best));
  EXPECT_LT(loss(best), loss(0.99 * best));
  EXPECT_NEAR(std::log(law.best_batch(10 * examples) / best), std::log(10.0) * 0.6 / 1.1, 1e-12);
}

TEST(FitMessage, KeepsCostsPositiveAndPredicts) {
  const std::vector<double> bytes = octaves(3, 20);
  // Faster than the wire at small sizes: a plain line would have a negative latency.
  const MessageFit fit = fit_message(
      bytes, map(bytes, [](double n) { return 1e-10 * n * (1 + 0.02 * std::log2(n)); }));
  for (const MessageCost& c : fit.pieces) {
    EXPECT_GE(c.latency_s, 0);
    EXPECT_GE(c.s_per_byte, 0);
  }
  const CollectiveShape shape{7, 0.875};
  const MessageFit exact =
      fit_message(bytes, map(bytes, [&](double n) { return 3e-6 * 7 + 2e-10 * 0.875 * n; }), shape);
  EXPECT_NEAR(exact.pieces[0].latency_s, 3e-6, 1e-12);
  EXPECT_NEAR(exact.pieces[0].s_per_byte, 2e-10, 1e-16);
  EXPECT_NEAR(exact.pieces[0].half_bytes(), 15000, 1e-3);
  EXPECT_NEAR(exact.seconds(1e6, shape), 3e-6 * 7 + 2e-10 * 0.875 * 1e6, 1e-12);
}

/// A round trip on a machine that LogGP describes, event by event: the processor is busy for o with
/// each send and receive, the wire for g + (bytes − 1)·G with each message.
double round_trip(const LogGp& machine, double bytes, int messages, double delay) {
  const double o = machine.overhead_s,
               flight = machine.latency_s + (bytes - 1) * machine.s_per_byte;
  double processor = 0, wire = 0, there = 0;
  for (int k = 0; k < messages; ++k) {
    if (k > 0) processor += delay;
    processor = std::max(processor + o, wire);  // a send waits for the wire
    wire = processor + machine.gap_s + (bytes - 1) * machine.s_per_byte;
    there = std::max(there, processor + flight) + o;
  }
  return there + o + flight + o;
}

TEST(FitLogGp, FindsTheMachineThatTookTheTimes) {
  const LogGp machine{2e-6, 0.4e-6, 0.9e-6, 0.12e-9, 0, 0};
  for (const double noise : {0.0, 0.02}) {
    Random random(7);
    std::vector<RoundTrips> samples;
    const auto seen = [&](double seconds) { return seconds * std::exp(noise * random.normal()); };
    for (double bytes = 1; bytes < 1e7; bytes *= 4) {
      const double delay = 2 * (machine.gap_s + bytes * machine.s_per_byte);
      samples.push_back({bytes, seen(round_trip(machine, bytes, 1, 0)),
                         seen(round_trip(machine, bytes, 64, 0)),
                         seen(round_trip(machine, bytes, 64, delay)), 64, delay});
    }
    const LogGp found = fit_loggp(samples);
    // The overhead is what is left of a delay twice the gap, 2 % of which is noise, of a few sizes.
    // Without noise only what a burst hides of the first gap is left.
    const double tolerance = noise > 0 ? 0.1 : 0.01;
    EXPECT_NEAR(found.gap_s, machine.gap_s, tolerance * machine.gap_s);
    EXPECT_NEAR(found.s_per_byte, machine.s_per_byte, tolerance * machine.s_per_byte);
    EXPECT_NEAR(found.overhead_s, machine.overhead_s, (noise > 0 ? 0.5 : 0.02) * 0.4e-6);
    EXPECT_NEAR(found.latency_s, machine.latency_s, (noise > 0 ? 0.3 : 0.02) * 2e-6);
    EXPECT_LE(found.rms_relative, noise > 0 ? 0.05 : 0.01);
  }
}

TEST(FitLogGp, HasNoNegativeTerms) {
  // Gaps that grow faster than messages: without a bound the line would begin below 0. Of those
  // through 0 the best has the slope Σwxy / Σwx², with relative errors Σ(x/y) / Σ(x/y)².
  std::vector<RoundTrips> samples;
  double sum = 0, squares = 0;
  for (const auto& [x, gap] : {std::pair(100.0, 1e-7), {200.0, 3e-7}, {300.0, 6e-7}}) {
    samples.push_back({x + 1, 5e-6, 5e-6 + 15 * gap, 5e-6 + 15 * 10e-6, 16, 10e-6});
    sum += x / gap;
    squares += (x / gap) * (x / gap);
  }
  const LogGp found = fit_loggp(samples);
  EXPECT_EQ(found.gap_s, 0);
  EXPECT_NEAR(found.s_per_byte, sum / squares, 1e-12 * found.s_per_byte);
}

TEST(FitLogGp, NamesWhatIsMissing) {
  const RoundTrips good{1, 5e-6, 20e-6, 60e-6, 16, 3e-6};
  RoundTrips quick = good, alone = good;
  quick.delay = 0.5e-6;
  alone.messages = 1;
  const auto refused = [](std::vector<RoundTrips> samples) -> std::string {
    try {
      static_cast<void>(fit_loggp(samples));
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_NE(refused({good, good}).find("3 sizes"), std::string::npos);
  EXPECT_NE(refused({good, good, good}).find("different sizes"), std::string::npos);
  EXPECT_NE(refused({good, good, quick}).find("longer than the gap"), std::string::npos);
  EXPECT_NE(refused({good, good, alone}).find("2 messages"), std::string::npos);
}

TEST(StrongScaling, SeparatesSerialWorkFromCommunication) {
  const std::vector<double> ranks{1, 2, 4, 8};
  // A tenth is serial: Karp–Flatt stays at it.
  const std::vector<double> serial = map(ranks, [](double p) { return 5 * (0.1 + 0.9 / p); });
  const std::vector<Scaling> curve = strong_scaling(ranks, serial);
  EXPECT_DOUBLE_EQ(curve[0].efficiency, 1);
  for (std::size_t i = 1; i < 4; ++i) {
    EXPECT_NEAR(curve[i].serial_fraction, 0.1, 1e-12);
    EXPECT_NEAR(curve[i].efficiency, 1 / (ranks[i] * (0.1 + 0.9 / ranks[i])), 1e-12);
  }
  EXPECT_NEAR(amdahl_fraction(ranks, serial), 0.1, 1e-12);
  // Communication that grows with p raises it.
  const std::vector<Scaling> chatty =
      strong_scaling(ranks, map(ranks, [](double p) { return 1 / p + 0.02 * (p - 1); }));
  EXPECT_GT(chatty[3].serial_fraction, chatty[1].serial_fraction);
}

TEST(Fits, RefuseWhatIsNoData) {
  const std::vector<double> two{1, 2}, three{1, 2, 3}, negative{1, -2};
  EXPECT_THROW((void)fit_steps(StepsModel::hyper, two, three), ShapeError);
  EXPECT_THROW((void)fit_steps(StepsModel::three_term_inv, three, three), ShapeError);
  EXPECT_THROW((void)fit_steps(StepsModel::hyper, two, negative), NumericError);
  EXPECT_THROW((void)fit_power(std::vector<double>{2, 2}, two), NumericError);
  EXPECT_THROW((void)fit_message(three, three), ShapeError);
  EXPECT_THROW((void)fit_loss({}), ShapeError);
  EXPECT_THROW(
      (void)stratified_interval(StepsModel::hyper, two, std::vector<std::vector<double>>{{1}, {2}},
                                [](const StepsFit&) { return 0.0; }),
      ShapeError);
}

}  // namespace
}  // namespace orthrus::studies
