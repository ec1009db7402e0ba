#include <algorithm>
#include <array>
#include <cmath>
#include <orthrus/studies/cells.hpp>
#include <orthrus/studies/fit.hpp>
#include <orthrus/studies/theory.hpp>
#include <string>

#include "runtime/studies/minimize.hpp"
#include "runtime/studies/random.hpp"
#include "runtime/studies/reproduce.hpp"
#include "runtime/studies/simulated_study.hpp"

namespace orthrus::studies {
namespace {

double median(std::vector<double> values) { return percentile_interval(std::move(values), 0).lo; }

/// Rows for the median and the middle 95 % of estimates.
void report(std::vector<Row>& rows, const std::string& what, const std::vector<double>& values,
            double truth, double lo, double hi, double slack) {
  const Interval middle = percentile_interval(values, 0.95);
  rows.push_back({what + ", median", median(values), truth, slack});
  rows.push_back({what + ", 2.5 %", middle.lo, lo, slack});
  rows.push_back({what + ", 97.5 %", middle.hi, hi, slack});
}

/// What simulated studies say: how many of their intervals hold the critical batch, and ln of their
/// least steps over the true ones, on average.
struct Chain {
  double covered = 0, bias = 0;

  Chain(const Protocol& protocol, int studies, int resamples) {
    for (int i = 0; i < studies; ++i) {
      Random random(100 + static_cast<std::uint64_t>(i));
      StepsQuestion question;
      question.definitions = {CbsDefinition::mccandlish};
      question.bootstrap.resamples = resamples;
      question.bootstrap.seed = static_cast<std::uint64_t>(i);
      const StepsStudy study =
          study_steps(cells_of(simulate(protocol, random), RateMetric::steps_to_target), question);
      const Interval interval = study.critical[0].interval;
      covered += interval.lo <= critical && critical <= interval.hi ? 1.0 / studies : 0;
      bias += std::log(study.fit.parameters[0] / least_steps) / studies;
    }
  }
};

}  // namespace

std::vector<Row> closed_forms() {
  std::vector<Row> rows;
  struct Case {
    double momentum, variance, gain, bound;
  };
  // Four digits, as printed: half a unit of the last.
  for (const Case& c : {Case{0.90, 0.07063, 14.2, 0.0939},
                        {0.95, 0.03039, 32.9, 0.0409},
                        {0.99, 0.00522, 191, 0.00643}}) {
    const std::string at = " at momentum " + std::to_string(c.momentum).substr(0, 4);
    rows.push_back({"v" + at, momentum_variance(c.momentum), c.variance, 5e-6});
    rows.push_back({"effective batch" + at, effective_batch(1, c.momentum), c.gain,
                    c.gain > 100 ? 0.6 : 0.05});
    const double phi = momentum_noise(c.momentum);
    rows.push_back({"phi squared" + at, phi * phi, c.bound, c.bound > 0.01 ? 5e-5 : 5e-6});
  }

  Assumptions a;
  a.momentum = 0.9;
  a.weight_decay = 0.1;
  a.noise = 10;
  const FrankWolfeGap gap(a);
  rows.push_back({"Frank-Wolfe gap Y", gap.batch_term, 61.295, 5e-4});
  rows.push_back({"Frank-Wolfe gap Z", gap.lr_term, 344.0, 1e-9});
  struct Published {
    double examples, batch, lr;
  };
  for (const Published& p : {Published{1e8, 5225.3, 1.2325e-3}, {1e10, 52253.0, 3.8974e-4}}) {
    const double examples = p.examples;
    const BatchAndLr best = best_batch(a, gap, examples);
    const std::string at = examples > 1e9 ? " at 1e10 examples" : " at 1e8 examples";
    rows.push_back(relative("Frank-Wolfe best batch" + at, best.batch, p.batch, 2e-5));
    rows.push_back(relative("Frank-Wolfe best lr" + at, best.lr, p.lr, 5e-5));
    // By search over both, without the closed form. A minimum is flat: its place is known to the
    // root of what its value is known to.
    const auto over_lr = [&](double batch_size) {
      return golden_section(
          [&](double x) { return gap.bound(examples / batch_size, batch_size, std::exp(x)); }, -20,
          0);
    };
    const double searched = std::exp(golden_section(
        [&](double x) {
          const double b = std::exp(x);
          return gap.bound(examples / b, b, std::exp(over_lr(b)));
        },
        0, 18));
    rows.push_back(relative("same, by search", searched, best.batch, 2e-6));
    rows.push_back(relative("same, lr", std::exp(over_lr(searched)), best.lr, 2e-6));
  }

  const StarConvex star(a);
  const BatchAndLr far = best_batch(star, 1e12);
  rows.push_back(relative("star-convex best batch at 1e12 examples", far.batch, 1.360e6, 5e-4));
  rows.push_back(relative("star-convex best lr at 1e12 examples", far.lr, 7.22e-5, 1e-3));
  const std::array slopes{0.631, 0.648, 0.655}, lr_slopes{-0.316, -0.324, -0.327};
  BatchAndLr before = best_batch(star, 1e10);
  double before_x = std::log(1e10 / std::log(1e10));
  for (std::size_t i = 0; i < 3; ++i) {
    const double examples = 1e12 * std::pow(100.0, static_cast<double>(i));
    const BatchAndLr next = best_batch(star, examples);
    const double x = std::log(examples / std::log(examples));
    const std::string between =
        " between 1e" + std::to_string(10 + 2 * i) + " and 1e" + std::to_string(12 + 2 * i);
    rows.push_back({"slope of ln best batch in ln(N/ln N)" + between,
                    std::log(next.batch / before.batch) / (x - before_x), slopes[i], 0.003});
    rows.push_back({"slope of ln best lr" + between, std::log(next.lr / before.lr) / (x - before_x),
                    lr_slopes[i], 0.003});
    before = next;
    before_x = x;
  }

  Assumptions decay;
  decay.momentum = 0.99;
  decay.gap = 100;
  rows.push_back(
      relative("critical weight decay", critical_weight_decay(decay, 1e6), 1.990e-3, 3e-4));
  decay.weight_decay = 1.001 * critical_weight_decay(decay, 1e6);
  rows.push_back(at_least("best lr just above it", StarConvex(decay).best_lr(1e6), 1e-12));
  decay.weight_decay = 0.999 * critical_weight_decay(decay, 1e6);
  rows.push_back({"best lr just below it", StarConvex(decay).best_lr(1e6), 0, 0});

  const StepsBatchLaw law = form_a(a, 0.01, 0.5);
  const double target = 1.5;
  const double searched = std::exp(
      golden_section([&](double x) { return std::exp(x) * law.steps_to(target, std::exp(x)); },
                     std::log(1.01 * law.batch_factor), 20));
  rows.push_back(relative("Form A critical batch 2Y/eps', by search", searched,
                          law.token_optimal_batch(target), 1e-6));
  rows.push_back(relative("same, closed form", law.token_optimal_batch(target),
                          ((2 * 0.9 + 1) * 0.1 + 0.1) * 100, 1e-12));
  rows.push_back(relative("Form A bound after T(b) steps",
                          law.level(law.steps_to(target, 100), 100), target, 1e-12));
  const StepsBatchLaw root = form_b(a, 0.01, 0.5);
  const double aim = root.floor + 1;
  rows.push_back(
      relative("Form B token-optimal batch, by search",
               std::exp(golden_section(
                   [&](double x) { return std::exp(x) * root.steps_to(aim, std::exp(x)); },
                   2 * std::log(1.01 * root.batch_factor), 30)),
               std::pow(1.5 * root.batch_factor, 2), 1e-6));
  return rows;
}

std::vector<Row> published_critical_batches() {
  struct Model {
    double millions;
    std::array<double, 9> steps;
    double a, b, overhead20, mccandlish, rms, lo, hi;
  };
  static constexpr std::array<Model, 5> models{
      {{85,
        {46000, 23000, 13282, 7000, 3840, 2528, 1917, 1600, 1600},
        1293.827,
        2834258,
        745.32,
        2190.6,
        0.0495,
        697,
        802},
       {151,
        {96000, 49000, 24000, 12000, 7128, 4350, 2940, 2400, 2300},
        1752.421,
        5677479,
        955.16,
        3239.8,
        0.0547,
        870,
        1054},
       {302,
        {196000, 90000, 46000, 23400, 13300, 7224, 4980, 3400, 2879},
        2095.350,
        11383270,
        1393.73,
        5432.6,
        0.0402,
        1271,
        1527},
       {604,
        {311000, 166000, 81000, 37440, 21320, 11400, 7199, 4700, 3800},
        2459.927,
        19449688,
        1888.52,
        7906.6,
        0.0438,
        1691,
        2143},
       {1200,
        {642000, 331000, 176000, 94000, 46500, 25000, 15360, 8900, 6500},
        3897.307,
        43381130,
        2533.41,
        11131.1,
        0.0381,
        2234,
        2882}}};
  std::array<double, 9> batches{};
  for (std::size_t i = 0; i < batches.size(); ++i) {
    batches[i] = 64 * std::pow(2.0, static_cast<double>(i));
  }
  std::vector<Row> rows;
  std::vector<double> sizes, overheads, ratios;
  for (const Model& m : models) {
    const std::string of = " of " + std::to_string(static_cast<int>(m.millions)) + " M";
    const StepsFit fit = fit_steps(StepsModel::hyper, batches, m.steps);
    const auto overhead20 = [](const StepsFit& f) {
      return critical_batch(f, CbsDefinition::overhead).value;
    };
    rows.push_back(relative("a" + of, fit.parameters[0], m.a, 1e-4));
    rows.push_back(relative("b" + of, fit.parameters[1], m.b, 1e-4));
    rows.push_back(relative("overhead20" + of, overhead20(fit), m.overhead20, 1e-4));
    rows.push_back(relative("mccandlish" + of, critical_batch(fit, CbsDefinition::mccandlish).value,
                            m.mccandlish, 1e-4));
    rows.push_back({"RMS log residual" + of, fit.rms_log, m.rms, 5.1e-5});
    const Interval interval = residual_interval(fit, batches, overhead20);
    rows.push_back(relative("overhead20" + of + ", 2.5 %", interval.lo, m.lo, 0.05));
    rows.push_back(relative("overhead20" + of + ", 97.5 %", interval.hi, m.hi, 0.05));
    sizes.push_back(m.millions);
    overheads.push_back(overhead20(fit));
    ratios.push_back(critical_batch(fit, CbsDefinition::mccandlish).value);
  }
  const PowerLaw overhead = fit_power(sizes, overheads), ratio = fit_power(sizes, ratios);
  rows.push_back({"overhead20 over size: factor (published 93.2)", overhead.factor, 93.197, 0.01});
  rows.push_back(
      {"overhead20 over size: exponent (published 0.468)", overhead.exponent, 0.46828, 2e-5});
  rows.push_back({"mccandlish over size: factor", ratio.factor, 146.1, 0.1});
  rows.push_back({"mccandlish over size: exponent", ratio.exponent, 0.6191, 1e-4});
  return rows;
}

std::vector<Row> fit_recovery() {
  std::vector<Row> rows;
  std::vector<double> batches;
  for (int i = 0; i <= 12; ++i) batches.push_back(std::pow(2.0, i));
  const auto ratio = [](const StepsFit& f) { return f.parameters[1] / f.parameters[0]; };

  std::vector<double> estimates;
  int over_residuals = 0, over_seeds = 0;
  Bootstrap resampling;
  resampling.resamples = 250;
  constexpr int studies = 400;
  for (int study = 0; study < studies; ++study) {
    Random random(11, static_cast<std::uint64_t>(study));
    std::vector<std::vector<double>> seeds;
    std::vector<double> means;
    for (const double batch : batches) {
      const double truth = 100 * (1 + 64 / batch);
      std::vector<double> values;
      for (int s = 0; s < 3; ++s) values.push_back(truth * std::exp(0.02 * random.normal()));
      means.push_back((values[0] + values[1] + values[2]) / 3);
      seeds.push_back(std::move(values));
    }
    const StepsFit fit = fit_steps(StepsModel::hyper, batches, means);
    estimates.push_back(ratio(fit));
    resampling.seed = static_cast<std::uint64_t>(study);
    const auto covers = [](const Interval& i) { return i.lo <= 64 && 64 <= i.hi; };
    over_residuals += covers(residual_interval(fit, batches, ratio, resampling)) ? 1 : 0;
    over_seeds +=
        covers(stratified_interval(StepsModel::hyper, batches, seeds, ratio, resampling)) ? 1 : 0;
  }
  report(rows, "critical batch of the hyperbola", estimates, 64.0, 62.8, 65.1, 1);
  // 400 studies know a coverage of 94 % to ±1.2.
  rows.push_back(within("its residual interval covers the truth, share",
                        static_cast<double>(over_residuals) / studies, 0.90, 0.98));
  rows.push_back(within("its interval over seeds covers the truth, share",
                        static_cast<double>(over_seeds) / studies, 0.90, 0.98));

  std::vector<double> betas, gammas, exponents;
  for (int study = 0; study < 200; ++study) {
    Random random(12, static_cast<std::uint64_t>(study));
    std::vector<LossCell> cells;
    for (double batch = 16; batch <= 512; batch *= 2) {
      for (double steps = 256; steps <= 8192; steps *= 2) {
        const double loss = 2 + 20 / std::sqrt(batch) + 300 / std::pow(steps, 0.6);
        cells.push_back({0, steps, batch, loss * std::exp(0.003 * random.normal())});
      }
    }
    // The noise is normal: plain squares, as Huber's threshold would be a third of it.
    const LossLaw law = fit_loss(cells, 0);
    betas.push_back(law.batch_exponent);
    gammas.push_back(law.steps_exponent);
    exponents.push_back(law.best_batch_exponent());
  }
  report(rows, "batch exponent of the loss law", betas, 0.500, 0.489, 0.516, 0.005);
  report(rows, "steps exponent of the loss law", gammas, 0.600, 0.594, 0.606, 0.003);
  report(rows, "exponent of its best batch", exponents, 0.5455, 0.537, 0.552, 0.003);
  return rows;
}

std::vector<Row> message_cost() {
  std::vector<Row> rows;
  std::vector<double> bytes;
  for (int i = 3; i <= 26; ++i) bytes.push_back(std::pow(2.0, i));
  Random random(13);
  const CollectiveShape ring{3, 0.75};  // an all-gather among four
  std::vector<double> seconds;
  for (const double n : bytes) {
    seconds.push_back((5e-6 * ring.latency_steps + n / 10e9 * ring.traffic) *
                      (1 + 0.05 * random.normal()));
  }
  const MessageFit one = fit_message(bytes, seconds, ring);
  rows.push_back({"pieces where there is one", static_cast<double>(one.pieces.size()), 1, 0});
  rows.push_back(relative("latency, us", 1e6 * one.pieces[0].latency_s, 5, 0.1));
  rows.push_back(relative("bandwidth, GB/s", 1e-9 * one.pieces[0].bytes_per_s(), 10, 0.1));
  rows.push_back(relative("RMS relative error", one.pieces[0].rms_relative, 0.05, 0.5));

  // An eager protocol below 64 KiB: 2 us and 4 GB/s; above, 12 us and 10 GB/s.
  constexpr double threshold = 65536;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const bool eager = bytes[i] < threshold;
    seconds[i] =
        ((eager ? 2e-6 : 12e-6) + bytes[i] / (eager ? 4e9 : 10e9)) * (1 + 0.05 * random.normal());
  }
  const MessageFit two = fit_message(bytes, seconds);
  rows.push_back({"pieces where there are two", static_cast<double>(two.pieces.size()), 2, 0});
  rows.push_back({"breakpoint, octaves off", std::log2(two.breakpoint_bytes / threshold), 0, 1});
  rows.push_back(relative("latency below, us", 1e6 * two.pieces[0].latency_s, 2, 0.1));
  rows.push_back(
      relative("bandwidth above, GB/s", 1e-9 * two.pieces.back().bytes_per_s(), 10, 0.1));
  return rows;
}

// Of 200 studies of nine batches, five rates, 10 % of noise: the standard error of a coverage is
// 1.6 %, of a mean bias 0.4 %.
std::vector<Row> study_statistics() {
  Protocol protocol;
  protocol.noise = 0.1;
  std::vector<Row> rows;
  // Of 400 such studies 94.5 % did.
  rows.push_back(within("share of 95 % intervals that hold the critical batch",
                        Chain(protocol, 200, 400).covered, 0.90, 0.98));
  // Seeds that both choose and report say 2.4 % too few steps; fresh ones 2.4 % too many, which is
  // what it costs to choose by noisy seeds.
  protocol.reporting_seeds = 2;
  rows.push_back(at_least("ln of steps over the true ones, reported by fresh seeds",
                          Chain(protocol, 200, 1).bias, 0.01));
  protocol.fresh = false;
  rows.push_back(at_most("same, by the seeds that chose: the winner's curse",
                         Chain(protocol, 200, 1).bias, -0.01));
  return rows;
}

}  // namespace orthrus::studies
