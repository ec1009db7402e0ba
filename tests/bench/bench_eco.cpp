// Where quantized weights can do without a master copy: a quadratic with noisy gradients, of which
// each step is a given share of the distance of two codes. On the runtime itself, one rank.
//
//   OMP_NUM_THREADS=1 bench_eco [--seeds 3] [--rules muon,adamw] [--betas 0.9,0.95,0.98]
//                               [--roundings stochastic,nearest] [--lrs 0.02,…] [--guards 0.3,0.1]
//                               [--format fp8_e4m3]
//
// f(W) = tr((W − W*)H(W − W*)ᵀ)/2, 24×48, H = AAᵀ + I/20; entries of A and W* ~ N(0, 1/48), W
// starts 0.3 N(0, 1/48) from W*, and every gradient has as much noise. Row scales, momentum as a
// mean, no Nesterov, no decay, constant lr from 0.02 down to 0.0003; Muon's step is
// lr·0.2·√48·msign(M), AdamW's 0.2·lr·(Adam's direction). 500 steps, below lr 1/800 as many more as
// lr is smaller, so that all can come as far.
//
// The ways share start and noise: an f32 master beside (gradients at the rounded weights, loss at
// the master), rounding forgotten, and ECO, for Muon also with guards: those asked for, and "edge",
// 0.7·√(1 − β²), from where on the telemetry warns. One JSON line each: the loss over the last 50
// steps (mean and standard deviation over seeds), at the rounded weights too, and what the
// telemetry measured in these steps: the step over the distance of two codes, and the correction
// over the momentum. The first line is the error of the msign at a gradient that is all noise:
// max |σ − 1|.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <orthrus/communicator.hpp>
#include <orthrus/orthrus.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "support/zoo.hpp"

namespace {

using namespace orthrus;

constexpr Index rows = 24;
constexpr Index cols = 48;
constexpr std::int64_t tail = 50;

struct Way {
  std::string name, residual;
  double guard = 0;  ///< of ECO; 0: none; -1: at the edge
};

struct Case {
  std::string rule, rounding, format;
  double beta, lr;
  Way way;
};

std::string text(double x) { return nlohmann::json(x).dump(); }

Config config_of(const Case& c, int seed) {
  const bool muon = c.rule == "muon";
  const std::string rule =
      muon ? "{name: muon, lr: " + text(c.lr) + ", momentum: " + text(c.beta) +
                 ", nesterov: false}\n    lmo: {coefficients: polar_express, iterations: 8, "
                 "scale: match_rms_adamw}"
           : "{name: adamw, lr: " + text(0.2 * c.lr) + ", betas: [" + text(c.beta) + ", 0.95]}";
  const double guard = c.way.guard < 0 ? 0.7 * std::sqrt(1 - c.beta * c.beta) : c.way.guard;
  const std::string eco =
      c.way.residual == "momentum" ? ", eco: {max_rel_correction: " + text(guard) + "}" : "";
  const std::string weights = c.format == "f32"
                                  ? "{format: f32}"
                                  : "{format: " + c.format + ", rounding: " + c.rounding +
                                        ", residual: " + c.way.residual + eco + "}";
  return parse_config("schema: 1\nseed: " + std::to_string(seed) +
                      "\ntelemetry: {every_steps: 5}\ngroups:\n  - match: \"*\"\n    rule: " +
                      rule + "\n    weights: " + weights + "\n");
}

/// The quadratic of a seed, and the noise of its gradients.
class Quadratic {
 public:
  explicit Quadratic(int seed) : base_(static_cast<std::uint64_t>(seed) * 100000) {
    const zoo::Matrix a = gaussian(cols, 1, 1);
    hessian_ = zoo::product(a, zoo::transposed(a));
    for (Index i = 0; i < cols; ++i) hessian_(i, i) += 0.05;
    target_ = gaussian(rows, 1, 2);
    start_ = gaussian(rows, 0.3, 3);
    for (std::size_t i = 0; i < start_.data.size(); ++i) start_.data[i] += target_.data[i];
  }
  [[nodiscard]] const zoo::Matrix& start() const { return start_; }
  /// @param[out] slope  (W − W*)H. @return the loss.
  template <class Weights>
  double loss(const Weights& w, zoo::Matrix& slope) const {
    zoo::Matrix gap = target_;
    for (std::size_t i = 0; i < gap.data.size(); ++i) {
      gap.data[i] = static_cast<double>(w[i]) - gap.data[i];
    }
    slope = zoo::product(gap, hessian_);
    return zoo::inner(slope, gap) / 2;
  }
  /// Of step `step`; all ways see the same.
  const zoo::Matrix& noise(std::int64_t step) {
    while (std::ssize(noise_) <= step) {
      noise_.push_back(gaussian(rows, 0.3, 10 + static_cast<std::uint64_t>(std::ssize(noise_))));
    }
    return noise_[static_cast<std::size_t>(step)];
  }

 private:
  [[nodiscard]] zoo::Matrix gaussian(Index m, double factor, std::uint64_t stream) const {
    return zoo::scaled(zoo::gaussian(m, cols, base_ + stream),
                       factor / std::sqrt(static_cast<double>(cols)));
  }
  std::uint64_t base_;
  zoo::Matrix hessian_, target_, start_;
  std::vector<zoo::Matrix> noise_;
};

/// One run's means over its last steps.
struct Outcome {
  double loss = 0, rounded_loss = 0, step_over_grid = 0, relative_correction = 0;
};

std::int64_t steps_of(double lr) { return std::llround(500 * std::max(1.0, 0.00125 / lr)); }

double mean(const std::vector<double>& v) {
  double sum = 0;
  for (const double x : v) sum += x;
  return v.empty() ? 0 : sum / static_cast<double>(v.size());
}

double deviation(const std::vector<double>& v) {
  double sum = 0;
  for (const double x : v) sum += (x - mean(v)) * (x - mean(v));
  return v.size() < 2 ? 0 : std::sqrt(sum / static_cast<double>(v.size() - 1));
}

Outcome run(const Case& c, Quadratic& quadratic, int seed) {
  zoo::Dense<float> w = zoo::cast<float>(quadratic.start());
  zoo::Dense<float> g(rows, cols);
  Parameter p;
  p.name = "w";
  p.shape = {rows, cols};
  p.weights = w.data.data();
  p.gradient = g.data.data();
  ShardedOptimizer optimizer{config_of(c, seed), self_communicator(), {p}};
  const bool master = c.way.residual == "master";
  const std::int64_t steps = steps_of(c.lr);
  std::vector<double> losses, rounded, over_grid, correction;
  zoo::Matrix slope;
  zoo::Matrix unused;
  for (std::int64_t t = 0; t < steps; ++t) {
    const double loss = quadratic.loss(w.data, slope);
    if (t >= steps - tail) {
      rounded.push_back(loss);
      losses.push_back(
          master ? quadratic.loss(optimizer.gather_state().at("state/w/master").values, unused)
                 : loss);
    }
    const zoo::Matrix& noise = quadratic.noise(t);
    for (std::size_t i = 0; i < slope.data.size(); ++i) {
      g.data[i] = static_cast<float>(slope.data[i] + noise.data[i]);
    }
    const RoundingReport& rounding = optimizer.step().rounding[0];
    if (t >= steps - tail && rounding.step == t + 1) {
      over_grid.push_back(rounding.step_over_grid);
      correction.push_back(rounding.relative_correction);
    }
  }
  return {mean(losses), mean(rounded), mean(over_grid), mean(correction)};
}

/// max |σ − 1| of what Muon steps along: a step of length 1 from 0, no rounding.
double msign_error(int seed) {
  Quadratic quadratic(seed);
  zoo::Dense<float> w(rows, cols);
  zoo::Dense<float> g = zoo::cast<float>(quadratic.noise(0));
  Parameter p;
  p.name = "w";
  p.shape = {rows, cols};
  p.weights = w.data.data();
  p.gradient = g.data.data();
  ShardedOptimizer optimizer{
      config_of({"muon", "", "f32", 0.9, 1, {}}, seed), self_communicator(), {p}};
  optimizer.step();
  const double factor = 0.2 * std::sqrt(static_cast<double>(cols));
  double worst = 0;
  for (const double s : zoo::singular_values(w)) worst = std::max(worst, std::abs(s / factor - 1));
  return worst;
}

std::vector<std::string> words(const std::string& list) {
  std::vector<std::string> all;
  std::istringstream in(list);
  for (std::string word; std::getline(in, word, ',');) all.push_back(word);
  return all;
}

std::vector<double> numbers(const std::string& list) {
  std::vector<double> all;
  for (const std::string& word : words(list)) all.push_back(std::stod(word));
  return all;
}

int bench(int argc, char** argv) {
  int seeds = 3;
  std::string format = "fp8_e4m3";
  std::vector<std::string> rules{"muon", "adamw"};
  std::vector<std::string> roundings{"stochastic", "nearest"};
  std::vector<double> betas{0.9, 0.95, 0.98};
  std::vector<double> guards{0.3, 0.1};
  std::vector<double> lrs;
  for (int i = 0; i <= 12; ++i) lrs.push_back(0.02 * std::exp2(-0.5 * i));
  for (int i = 1; i < argc; i += 2) {
    const std::string key = argv[i];
    const std::string value = i + 1 < argc ? argv[i + 1] : "";
    if (key == "--seeds") {
      seeds = std::stoi(value);
    } else if (key == "--format") {
      format = value;
    } else if (key == "--rules") {
      rules = words(value);
    } else if (key == "--roundings") {
      roundings = words(value);
    } else if (key == "--betas") {
      betas = numbers(value);
    } else if (key == "--guards") {
      guards = numbers(value);
    } else if (key == "--lrs") {
      lrs = numbers(value);
    } else {
      std::fprintf(stderr, "bench_eco: '%s' is not an option\n", key.c_str());
      return 64;
    }
  }
  const auto start = std::chrono::steady_clock::now();
  std::printf("%s\n", nlohmann::ordered_json{{"msign_error", msign_error(1)}}.dump().c_str());
  std::vector<Quadratic> quadratics;
  for (int seed = 1; seed <= seeds; ++seed) quadratics.emplace_back(seed);
  std::vector<Way> ways{{"master", "master"}, {"naive", "none"}, {"eco", "momentum"}};
  for (const double guard : guards) ways.push_back({"eco guard " + text(guard), "momentum", guard});
  ways.push_back({"eco guard edge", "momentum", -1});
  std::int64_t steps = 0;
  for (const std::string& rule : rules) {
    for (const std::string& rounding : roundings) {
      for (const double beta : betas) {
        for (const double lr : lrs) {
          for (const Way& way : ways) {
            // The step of AdamW is as long as its momentum: there is nothing to guard.
            if (rule != "muon" && way.guard != 0) continue;
            const Case c{rule, rounding, format, beta, lr, way};
            std::vector<double> loss, rounded, over_grid, correction;
            for (int seed = 1; seed <= seeds; ++seed) {
              const Outcome o = run(c, quadratics[static_cast<std::size_t>(seed - 1)], seed);
              loss.push_back(o.loss);
              rounded.push_back(o.rounded_loss);
              over_grid.push_back(o.step_over_grid);
              correction.push_back(o.relative_correction);
              steps += steps_of(lr);
            }
            const nlohmann::ordered_json row{{"rule", rule},
                                             {"rounding", rounding},
                                             {"format", format},
                                             {"beta", beta},
                                             {"lr", lr},
                                             {"way", way.name},
                                             {"seeds", seeds},
                                             {"steps", steps_of(lr)},
                                             {"loss", mean(loss)},
                                             {"loss_sd", deviation(loss)},
                                             {"rounded_loss", mean(rounded)},
                                             {"step_over_grid", mean(over_grid)},
                                             {"relative_correction", mean(correction)}};
            std::printf("%s\n", row.dump().c_str());
            std::fflush(stdout);
          }
        }
      }
    }
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf(
      "%s\n",
      nlohmann::ordered_json{{"steps", steps}, {"seconds", seconds.count()}}.dump().c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return bench(argc, argv); }
