// Quantized weights without a master copy, on ranks that are threads: the same codes however they
// are sharded, bytes and memory as planned, and what ECO promises, on the real runtime.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <orthrus/error.hpp>
#include <orthrus/orthrus.hpp>
#include <random>

#include "kernels/backend.hpp"
#include "optim/eco.hpp"
#include "runtime/checkpoint.hpp"
#include "runtime/plan.hpp"
#include "runtime/safetensors.hpp"
#include "runtime/weight_format.hpp"
#include "support/zoo.hpp"
#include "toy_model.hpp"

namespace orthrus {
namespace {

using toy::Model;

Config config_of(const std::string& weights, const std::string& extra = "",
                 const char* recipe = toy::muon_and_adamw) {
  std::string text = recipe;
  // Into every group.
  for (const char* end : {"weight_decay: 0.1}}", "weight_decay: 0.1}\n"}) {
    const std::size_t at = text.find(end);
    if (at == std::string::npos) continue;
    const bool inline_group = std::string(end).back() == '}';
    text.insert(at + std::string("weight_decay: 0.1}").size(),
                inline_group ? ", weights: " + weights : "\n    weights: " + weights);
  }
  Config config = parse_config(text + extra);
  for (GroupConfig& g : config.groups) g.matrix.accuracy = "bitwise";
  return config;
}

struct Outcome {
  std::vector<float> weights;
  std::map<std::string, ShardedOptimizer::StateTensor> state;
  std::vector<RoundingReport> rounding;
};

/// Steps whose gradients are the same on all ranks; bytes are checked by every step itself.
Outcome train(const Config& config, int ranks, std::int64_t steps, bool pow2_bf16 = false) {
  Outcome outcome;
  run_thread_ranks(ranks, [&](Communicator& comm) {
    Model model;
    static_cast<void>(pow2_bf16);
    for (Parameter& p : model.parameters) p.gradient_state = GradientState::averaged;
    const int rank = comm.rank();
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    const StepReport* report = nullptr;
    for (std::int64_t s = 1; s <= steps; ++s) {
      model.backward(s, 0);
      report = &optimizer.step();
    }
    std::vector<int> ids;
    for (int i = 0; i < std::ssize(model.parameters); ++i) ids.push_back(i);
    optimizer.gather(ids);
    auto state = optimizer.gather_state();
    if (rank != 0) return;
    for (std::size_t i = 0; i < model.parameters.size(); ++i) {
      std::vector<float> w(model.weights[i].size());
      optimizer.copy_weights(static_cast<int>(i), w.data());
      outcome.weights.insert(outcome.weights.end(), w.begin(), w.end());
    }
    outcome.state = std::move(state);
    outcome.rounding = report->rounding;
  });
  return outcome;
}

void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
  EXPECT_EQ(a.weights, b.weights) << what;
  ASSERT_EQ(a.state.size(), b.state.size()) << what;
  for (const auto& [name, tensor] : a.state) {
    EXPECT_EQ(tensor.values, b.state.at(name).values) << what << " " << name;
  }
}

Parameter parameter_of(zoo::Dense<float>& w, zoo::Dense<float>& g) {
  Parameter p;
  p.name = "w";
  p.shape = {w.rows, w.cols};
  p.weights = w.data.data();
  p.gradient = g.data.data();
  return p;
}

/// Into the buffer that the optimizer was told of.
void put(const zoo::Matrix& from, zoo::Dense<float>& to) {
  std::transform(from.data.begin(), from.data.end(), to.data.begin(),
                 [](double v) { return static_cast<float>(v); });
}

class OnRanks : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, OnRanks, testing::Values(1, 2, 3, 4));

const char* const kFormats[] = {
    "{format: fp8_e4m3, rounding: stochastic, residual: momentum}",
    "{format: fp8_e4m3, residual: none}",
    "{format: fp8_e5m2, scale_format: pow2, residual: momentum}",
    "{format: int8, block: 4, rounding: stochastic, residual: momentum}",
    "{format: int8, scale: tensor, residual: master}",
    "{format: int4, residual: momentum}",
    "{format: bf16, rounding: stochastic, residual: momentum}",
    "{format: bf16, residual: mantissa}",
    "{format: fp8_e4m3, rounding: stochastic, residual: master}",
};

// N6: codes are rounded once, on the rank that updates; blocks are never cut; random bits belong to
// elements.
TEST_P(OnRanks, TheCodesAreThoseOfOneRank) {
  for (const std::string weights : kFormats) {
    // One tensor cannot share a scale among matrices of its own.
    const bool tensor = weights.find("tensor") != std::string::npos;
    Config config = config_of(weights);
    if (tensor) config.groups[0].weights = config_of(kFormats[0]).groups[0].weights;
    const Outcome one = train(config, 1, 4);
    for (const char* extra :
         {"", "zero: {stage: 1}\n", "zero: {stage: 3}\n", "comm: {bucket_bytes: 2KiB}\n"}) {
      Config c = config_of(weights, extra);
      c.groups[0].weights = config.groups[0].weights;
      expect_same(train(c, GetParam(), 4), one, weights + " " + extra);
    }
    if (GetParam() % 2 == 0) {
      Config c = config;
      c.mesh.replicate = 2;
      expect_same(train(c, GetParam(), 4), one, weights + " two replicas");
    }
  }
}

TEST_P(OnRanks, EveryElementwiseRuleFeedsBack) {
  for (const char* rule :
       {"{name: sgd, lr: 0.02, nesterov: true, momentum_form: ema, weight_decay: 0.1}",
        "{name: adamw, lr: 0.02, weight_decay: 0.1}",
        "{name: lion, lr: 0.02, weight_decay: 0.1}"}) {
    for (const char* format : {"fp8_e4m3", "bf16"}) {
      for (const char* guard : {"-1", "0.1"}) {
        const auto config = [&](const std::string& residual) {
          std::string text = std::string("schema: 1\ngroups:\n  - match: \"*\"\n    rule: ") +
                             rule + "\n    weights: {format: " + format + ", residual: " + residual;
          if (residual == "momentum")
            text += std::string(", eco: {max_rel_correction: ") + guard + "}";
          return parse_config(text + "}\n");
        };
        const std::string what = std::string(rule) + " " + format + " " + guard;
        const Outcome one = train(config("momentum"), 1, 5);
        expect_same(train(config("momentum"), GetParam(), 5), one, what);
        EXPECT_NE(train(config("none"), 1, 5).weights, one.weights) << what;
      }
    }
  }
}

TEST_P(OnRanks, LogicalMatricesAndStacks) {
  // Matrices that cut rows share no scale of a row; those of a stack have rows of their own.
  const Config base = config_of("{format: fp8_e4m3, block: 4, residual: momentum}");
  Config config = base;
  GroupConfig split = base.groups[0];
  split.match = "wide.weight";
  config.groups.insert(config.groups.begin(), split);
  const Outcome one = train(config, 1, 3);
  expect_same(train(config, GetParam(), 3), one, "blocks");
}

TEST(Quantized, OrdinaryWeightsLieOnTheGrid) {
  for (const std::string weights :
       {"{format: fp8_e4m3, rounding: stochastic, residual: momentum}",
        "{format: int4, residual: none}", "{format: int8, residual: momentum}"}) {
    const Config config = config_of(weights);
    run_thread_ranks(2, [&](Communicator& comm) {
      Model model;
      ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
      for (std::int64_t s = 0; s <= 2; ++s) {
        if (s > 0) {
          model.backward(s, comm.rank());
          optimizer.step();
        }
        const runtime::WeightFormat format = runtime::weight_format(config.groups[0].weights);
        for (std::size_t i = 0; i < model.weights.size(); ++i) {
          const auto& p = model.parameters[i];
          const Index rows = p.shape.size() < 2 ? 1 : p.shape[0];
          const Index cols = std::ssize(model.weights[i]) / rows;
          for (Index r = 0; r < rows; ++r) {
            // Some scale makes every entry a code: the row's largest is the largest code (scales
            // are made so), so the scale follows from it.
            const float* row = model.weights[i].data() + r * cols;
            double largest = 0;
            for (Index c = 0; c < cols; ++c) largest = std::max(largest, std::abs(double{row[c]}));
            if (largest == 0) continue;
            const double scale = largest / largest_code(format.grid->format);
            for (Index c = 0; c < cols; ++c) {
              const double z = std::abs(row[c]) / scale;
              double step = 1;
              if (format.grid->format == CodeFormat::fp8_e4m3) {
                step =
                    std::exp2(std::max(std::floor(std::log2(std::max(z, 1e-9)) + 1e-5), -6.0) - 3);
              }
              EXPECT_NEAR(z / step, std::nearbyint(z / step), 1e-4) << p.name << " " << weights;
            }
          }
        }
      }
    });
  }
}

// `mantissa` keeps every bit: the weights are those of an f32 run, rounded.
// Halfway between two bf16 numbers, too: before the first step and after it.
TEST(Quantized, MantissaKeepsEveryBitOfATie) {
  const Config config = parse_config(
      "schema: 1\ngroups:\n  - match: \"*\"\n    rule: {name: sgd, lr: 1}\n"
      "    weights: {format: bf16, residual: mantissa}\n");
  for (const int stage : {2, 3}) {
    Config c = config;
    c.zero_stage = stage;
    run_thread_ranks(2, [&](Communicator& comm) {
      std::vector<float> w{1.00390625F, -1.01171875F, 3.5F, 1e-3F, 1.001F};
      std::vector<float> g(w.size(), 0.0F);
      Parameter p;
      p.name = "w";
      p.shape = {5};
      p.weights = w.data();
      p.gradient = g.data();
      const std::vector<float> start = w;
      ShardedOptimizer optimizer{c, comm.duplicate("job"), {p}};
      optimizer.step();
      // To where f32 would come to, whose bits show what was kept.
      std::fill(g.begin(), g.end(), -1.0F);
      optimizer.step();
      const int id = 0;
      optimizer.gather({&id, 1});
      std::vector<float> now(w.size());
      optimizer.copy_weights(0, now.data());
      for (std::size_t i = 0; i < now.size(); ++i) {
        const float exact = start[i] + 1;
        EXPECT_NEAR(now[i], exact, std::abs(exact) * 0x1p-9 * 1.001 + 1e-4) << stage << " " << i;
      }
    });
  }
}

TEST(Quantized, MantissaIsTheF32Run) {
  const Outcome exact = train(config_of("{format: f32}"), 2, 6);
  const Outcome master = train(config_of("{format: bf16, residual: master}"), 2, 6);
  const Outcome mantissa = train(config_of("{format: bf16, residual: mantissa}"), 2, 6);
  ASSERT_EQ(mantissa.weights.size(), exact.weights.size());
  for (std::size_t i = 0; i < exact.weights.size(); ++i) {
    EXPECT_NEAR(mantissa.weights[i], exact.weights[i], std::abs(exact.weights[i]) * 0x1p-8 + 1e-30);
    EXPECT_NEAR(mantissa.weights[i], master.weights[i], std::abs(exact.weights[i]) * 0x1p-7);
  }
}

// ---- what ECO promises, on the real thing -------------------------------------------------------

struct Sgd {
  double lr = 0.05, beta = 0.9, decay = 0;
  bool nesterov = false;
  std::string kappa = "exact", format = "int8", rounding = "nearest", schedule;
};

/// The largest |Φ − Φ*| of a run with given gradients, Φ = Ŵ − sM; and how far rounding alone moves
/// a weight.
double phi_gap(const Sgd& s, int steps) {
  const std::string rule = "{name: sgd, lr: " + std::to_string(s.lr) +
                           ", momentum: " + std::to_string(s.beta) +
                           ", nesterov: " + (s.nesterov ? "true" : "false") +
                           ", momentum_form: ema, weight_decay: " + std::to_string(s.decay) + "}";
  const Config config = parse_config(
      "schema: 1\ntrain: {steps: " + std::to_string(steps) + "}\ngroups:\n  - match: \"*\"\n" +
      "    rule: " + rule + "\n    weights: {format: " + s.format + ", rounding: " + s.rounding +
      ", residual: momentum, eco: {kappa: " + s.kappa + ", lr_floor: 0}}\n" + s.schedule);
  double worst = 0;
  run_thread_ranks(1, [&](Communicator& comm) {
    constexpr Index rows = 4, cols = 16;
    const zoo::Matrix start = zoo::gaussian(rows, cols, 1);
    zoo::Dense<float> w = zoo::cast<float>(start);
    zoo::Dense<float> g(rows, cols);
    const Parameter p = parameter_of(w, g);
    ShardedOptimizer optimizer{config, comm.duplicate("job"), {p}};
    const optim::MomentumGain gain{s.nesterov ? s.beta * s.beta : s.beta, s.beta};
    const ScheduleConfig& schedule = config.groups[0].schedule;
    const auto lr = [&](std::int64_t t) {
      if (schedule.kind != "cosine") return s.lr;
      const double x = std::min(1.0, static_cast<double>(t) / steps);
      return s.lr * (schedule.final + (1 - schedule.final) * 0.5 * (1 + std::cos(M_PI * x)));
    };
    const auto kappas = optim::schedule_kappas(gain, s.decay, steps, lr);
    std::vector<double> master(w.data.begin(), w.data.end());
    std::vector<double> of_master(w.data.size(), 0);
    for (int t = 1; t <= steps; ++t) {
      put(zoo::gaussian(rows, cols, 100 + static_cast<std::uint64_t>(t)), g);
      optimizer.step();
      auto state = optimizer.gather_state();
      const auto& m = state.at("state/w/momentum").values;
      const double returns = -1 / kappas[static_cast<std::size_t>(t - 1)];
      for (std::size_t i = 0; i < master.size(); ++i) {
        const double gradient = g.data[i];
        of_master[i] = s.beta * of_master[i] + (1 - s.beta) * gradient;
        const double x =
            s.nesterov ? s.beta * of_master[i] + (1 - s.beta) * gradient : of_master[i];
        master[i] = (1 - lr(t) * s.decay) * master[i] - lr(t) * x;
        const double phi = w.data[i] - returns * m[i];
        worst = std::max(worst, std::abs(phi - (master[i] - returns * of_master[i])));
      }
    }
  });
  return worst;
}

TEST(Eco, PhiMovesAsWithoutRounding) {
  // f32: W and sM are rounded to 2^-24 of about 4, a few times a step, 100 steps.
  constexpr double rounding = 100 * 4 * 4 * 0x1p-24;
  for (const char* format : {"int8", "int4", "fp8_e4m3", "fp8_e5m2", "bf16"}) {
    for (const char* mode : {"nearest", "stochastic"}) {
      for (const bool nesterov : {false, true}) {
        for (const double decay : {0.0, 0.5}) {
          Sgd s;
          s.format = format;
          s.rounding = mode;
          s.nesterov = nesterov;
          s.decay = decay;
          EXPECT_LE(phi_gap(s, 100), rounding)
              << format << " " << mode << " " << nesterov << " " << decay;
        }
      }
    }
  }
}

TEST(Eco, PhiMovesAsWithoutRoundingUnderASchedule) {
  Sgd s;
  s.schedule = "    schedule: {kind: cosine, final: 0.2}\n";
  s.kappa = "exact_schedule";
  s.decay = 0.5;
  s.rounding = "stochastic";
  EXPECT_LE(phi_gap(s, 100), 100 * 4 * 4 * 0x1p-24);
  s.kappa = "exact";
  EXPECT_GT(phi_gap(s, 100), 1e-3) << "one constant should not do";
}

TEST(Eco, AWrongKappaIsSeen) {
  Sgd s;
  s.decay = 0.5;
  s.kappa = "blog";
  EXPECT_GT(phi_gap(s, 100), 1e-3);
  s.kappa = "paper";
  EXPECT_GT(phi_gap(s, 100), 1e-3);
}

/// The quadratic of the toy: f(W) = tr((W − W*)H(W − W*)ᵀ)/2, noisy gradients, fp8 with row scales.
double toy_loss(const std::string& residual, double lr, double beta, double guard, int seed) {
  constexpr Index m = 24, n = 48;
  constexpr int steps = 500;
  const std::string eco =
      residual == "momentum"
          ? ", eco: {kappa: paper, max_rel_correction: " + std::to_string(guard) + "}"
          : "";
  const Config config = parse_config(
      "schema: 1\nseed: " + std::to_string(seed) +
      "\ngroups:\n  - match: \"*\"\n    rule: {name: muon, lr: " + std::to_string(lr) +
      ", momentum: " + std::to_string(beta) + ", nesterov: false}\n" +
      "    lmo: {coefficients: polar_express, iterations: 8, scale: match_rms_adamw}\n" +
      "    weights: {format: fp8_e4m3, rounding: stochastic, residual: " + residual + eco + "}\n");
  const auto scaled = [](Index rows, Index cols, std::uint64_t stream, double factor) {
    return zoo::scaled(zoo::gaussian(rows, cols, stream), factor);
  };
  const auto base = static_cast<std::uint64_t>(seed) * 100000;
  const double unit = 1 / std::sqrt(static_cast<double>(n));
  const zoo::Matrix a = scaled(n, n, base + 1, unit);
  const zoo::Matrix target = scaled(m, n, base + 2, unit);
  zoo::Matrix h = zoo::product(a, zoo::transposed(a));
  for (Index i = 0; i < n; ++i) h(i, i) += 0.05;
  zoo::Matrix start = scaled(m, n, base + 3, 0.3 * unit);
  for (std::size_t i = 0; i < start.data.size(); ++i) start.data[i] += target.data[i];
  double sum = 0;
  run_thread_ranks(1, [&](Communicator& comm) {
    zoo::Dense<float> w = zoo::cast<float>(start);
    zoo::Dense<float> g(m, n);
    const Parameter p = parameter_of(w, g);
    ShardedOptimizer optimizer{config, comm.duplicate("job"), {p}};
    for (int t = 0; t < steps; ++t) {
      zoo::Matrix gap = zoo::cast<double>(w);
      for (std::size_t i = 0; i < gap.data.size(); ++i) gap.data[i] -= target.data[i];
      zoo::Matrix slope = zoo::product(gap, h);
      if (t >= steps - 50) sum += zoo::inner(slope, gap) / 2;
      const zoo::Matrix noise = scaled(m, n, base + 10 + static_cast<std::uint64_t>(t), 0.3 * unit);
      for (std::size_t i = 0; i < slope.data.size(); ++i) slope.data[i] += noise.data[i];
      put(slope, g);
      optimizer.step();
    }
  });
  return sum / 50;
}

// δ/d = .019: the correction outweighs the gradient in the momentum, unless it is bounded.
TEST(Eco, TheGuardKeepsAScaleInvariantRuleOnItsWay) {
  const double naive = toy_loss("none", 0.00125, 0.9, 0, 1);
  EXPECT_GT(toy_loss("momentum", 0.00125, 0.9, 0, 1), 5 * naive) << "without guard";
  EXPECT_LE(toy_loss("momentum", 0.00125, 0.9, 0.1, 1), naive);
  // In the healthy regime ECO helps, and the default guard leaves it alone.
  const double healthy = toy_loss("none", 0.005, 0.9, 0, 1);
  EXPECT_LT(toy_loss("momentum", 0.005, 0.9, 0.3, 1), 0.8 * healthy);
}

TEST(Eco, SaysWhenItsRegimeIsLeft) {
  const auto report = [](double lr) {
    const Config config = parse_config(
        "schema: 1\ntelemetry: {every_steps: 1}\ngroups:\n  - match: \"*\"\n    rule: {name: muon, "
        "lr: " +
        std::to_string(lr) + ", momentum: 0.9}\n    lmo: {scale: match_rms_adamw}\n" +
        "    weights: {format: fp8_e4m3, rounding: stochastic, residual: momentum}\n");
    std::pair<RoundingReport, double> found;  // and the rms of the weights
    run_thread_ranks(2, [&](Communicator& comm) {
      zoo::Dense<float> w = zoo::cast<float>(zoo::gaussian(32, 64, 3));
      zoo::Dense<float> g(32, 64);
      Parameter p = parameter_of(w, g);
      p.gradient_state = GradientState::averaged;
      ShardedOptimizer optimizer{config, comm.duplicate("job"), {p}};
      for (int t = 0; t < 20; ++t) {
        put(zoo::gaussian(32, 64, 50 + static_cast<std::uint64_t>(t)), g);
        const RoundingReport rounding = optimizer.step().rounding[0];
        if (comm.rank() == 0) found = {rounding, zoo::frobenius(w) / std::sqrt(w.data.size())};
      }
    });
    return found;
  };
  // rms of ηU is .2η, of the distance of two codes .09 of a weight.
  const auto [far, of_far] = report(0.5);
  EXPECT_NEAR(far.step_over_grid * 0.09 * of_far, 0.2 * 0.5, 0.1 * 0.2 * 0.5);
  EXPECT_FALSE(far.out_of_regime);
  EXPECT_EQ(far.step, 20);
  EXPECT_EQ(far.saturated, 0);
  // Rounded stochastically a code is off by at most its distance: (.0375 of a weight, fp8).
  EXPECT_GT(far.residual_rms, 0.01);
  EXPECT_LT(far.residual_rms, 0.06);
  const auto [near, of_near] = report(0.002);
  EXPECT_NEAR(near.step_over_grid * 0.09 * of_near, 0.2 * 0.002, 0.1 * 0.2 * 0.002);
  EXPECT_TRUE(near.out_of_regime);
  EXPECT_GT(near.relative_correction, 0.3) << "before the guard";
}

// ---- bytes, memory, checkpoints -----------------------------------------------------------------

TEST(Quantized, WeightsTravelAsCodes) {
  // One matrix per rank, rows of 256: bytes of a step against bf16's, by the plan, which every step
  // is checked against.
  const auto bytes = [](const std::string& weights, const std::string& extra) {
    const Config config = parse_config(
        "schema: 1\ncomm: {gradient_dtype: bf16}\n" + extra +
        "groups:\n  - match: \"*\"\n    rule: {name: muon}\n    matrix: {mode: owner}\n"
        "    weights: " +
        weights + "\n");
    std::int64_t sum = 0;
    run_thread_ranks(4, [&](Communicator& comm) {
      std::vector<std::vector<float>> data(16, std::vector<float>(128 * 256, 0.5F));
      std::vector<Parameter> parameters(8);
      for (std::size_t i = 0; i < 8; ++i) {
        Parameter& p = parameters[i];
        p.name = "w" + std::to_string(i);
        p.shape = {128, 256};
        p.weights = data[i].data();
        p.gradient = data[8 + i].data();
      }
      ShardedOptimizer optimizer{config, comm.duplicate("job"), parameters};
      const StepReport& report = optimizer.step();
      std::array<std::int64_t, 1> all{report.bytes_sent};
      comm.all_reduce(std::span<std::int64_t>(all), ReduceOp::sum);
      if (comm.rank() == 0) sum = all[0];
    });
    return static_cast<double>(sum);
  };
  constexpr double elements = 8 * 128 * 256;
  const double control = 4 * 1000;  // numbers of control messages, at most
  const double bf16 = bytes("{format: bf16}", "");
  EXPECT_NEAR(bf16, 3 * elements * (2 + 2), control);
  const double fp8 = bytes("{format: fp8_e4m3, block: 128, residual: momentum}", "");
  EXPECT_NEAR(fp8, 3 * elements * (2 + 1 + 4.0 / 128), control);
  EXPECT_LE(fp8, 0.76 * bf16);
  const double int4 = bytes("{format: int4, block: 128, residual: momentum}", "");
  EXPECT_NEAR(int4, 3 * elements * (2 + 0.5 + 4.0 / 128), control);
}

TEST(Quantized, NoMasterCopyIsKept) {
  // State beside codes: the momentum, and scales.
  const auto memory = [](const std::string& weights, const std::string& extra) {
    MemoryPlan plan;
    const Config config = config_of(weights, extra);
    run_thread_ranks(2, [&](Communicator& comm) {
      Model model;
      ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
      if (comm.rank() == 0) plan = optimizer.memory();
    });
    return plan;
  };
  const MemoryPlan none = memory("{format: f32}", "");
  const MemoryPlan eco = memory("{format: fp8_e4m3, residual: momentum}", "");
  const MemoryPlan master = memory("{format: fp8_e4m3, residual: master}", "");
  // 448 scales of 4 bytes, and what every piece is padded by (256 bytes at most, 10 pieces).
  EXPECT_LE(eco.state - none.state, 448 * 4 + 10 * 256);
  EXPECT_GE(master.state - eco.state, 7000 / 2 * 4);
  const MemoryPlan sharded = memory("{format: fp8_e4m3, residual: momentum}", "zero: {stage: 3}\n");
  EXPECT_LE(sharded.state, none.state + 1024);  // rows stay together: dealt a little otherwise
}

class Checkpoints : public testing::Test {
 protected:
  std::filesystem::path directory_ =
      std::filesystem::temp_directory_path() / ("orthrus_eco_" + std::to_string(::getpid()));
  void SetUp() override { std::filesystem::create_directories(directory_); }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  /// `before` steps on `from` ranks, a checkpoint, `after` more on `to` ranks.
  Outcome resumed(const Config& saver, int from, const Config& loader, int to, int before,
                  int after) {
    static int count = 0;
    const std::string path = (directory_ / ("c" + std::to_string(++count))).string();
    run_thread_ranks(from, [&](Communicator& comm) {
      Model model;
      for (Parameter& p : model.parameters) p.gradient_state = GradientState::averaged;
      ShardedOptimizer optimizer{saver, comm.duplicate("job"), model.parameters};
      for (std::int64_t s = 1; s <= before; ++s) {
        model.backward(s, 0);
        optimizer.step();
      }
      optimizer.save(path);
    });
    last_ = path;
    Outcome outcome;
    run_thread_ranks(to, [&](Communicator& comm) {
      Model model;
      for (Parameter& p : model.parameters) p.gradient_state = GradientState::averaged;
      ShardedOptimizer optimizer{loader, comm.duplicate("job"), model.parameters};
      optimizer.load(path);
      for (std::int64_t s = before + 1; s <= before + after; ++s) {
        model.backward(s, 0);
        optimizer.step();
      }
      std::vector<int> ids;
      for (int i = 0; i < std::ssize(model.parameters); ++i) ids.push_back(i);
      optimizer.gather(ids);
      auto state = optimizer.gather_state();
      if (comm.rank() != 0) return;
      for (std::size_t i = 0; i < model.parameters.size(); ++i) {
        std::vector<float> w(model.weights[i].size());
        optimizer.copy_weights(static_cast<int>(i), w.data());
        outcome.weights.insert(outcome.weights.end(), w.begin(), w.end());
      }
      outcome.state = std::move(state);
    });
    return outcome;
  }
  std::string last_;
};

TEST_F(Checkpoints, GoOnWithTheBitsOfTheUninterruptedRun) {
  for (const std::string weights : kFormats) {
    if (weights.find("tensor") != std::string::npos) continue;
    const Config config = config_of(weights);
    const Config third = config_of(weights, "zero: {stage: 3}\n");
    const Outcome whole = train(config, 1, 5);
    expect_same(resumed(config, 1, config, 3, 3, 2), whole, weights + " 1 to 3");
    expect_same(resumed(config, 4, config, 2, 3, 2), whole, weights + " 4 to 2");
    expect_same(resumed(third, 3, config, 2, 3, 2), whole, weights + " stage 3 to 2");
    expect_same(resumed(config, 2, third, 3, 3, 2), whole, weights + " stage 2 to 3");
  }
}

TEST_F(Checkpoints, OfAnotherFormatAreRefusedByName) {
  const Config fp8 = config_of("{format: fp8_e4m3, residual: momentum}");
  const Config int8 = config_of("{format: int8, residual: momentum}");
  try {
    resumed(fp8, 1, int8, 2, 1, 1);
    ADD_FAILURE() << "loaded";
  } catch (const ConfigError& e) {
    EXPECT_NE(std::string(e.what()).find(
                  "'embed' is fp8_e4m3/row in the checkpoint, int8/row here (load can convert it)"),
              std::string::npos)
        << e.what();
  }
}

// What is loaded is rounded as what a trainer comes with is: a new optimizer is the judge.
TEST_F(Checkpoints, ConvertWhenAskedTo) {
  struct Case {
    std::string from, to;
  };
  const std::string eco = "{format: fp8_e4m3, rounding: stochastic, residual: momentum}";
  const std::vector<Case> cases{
      {"{format: f32}", eco},
      {eco, "{format: int4, residual: momentum}"},
      {eco, "{format: fp8_e4m3, residual: master}"},
      {"{format: fp8_e4m3, residual: master}", eco},
      {"{format: bf16, residual: mantissa}", "{format: int8, residual: none}"},
      {"{format: int8, block: 4, residual: momentum}", "{format: bf16, residual: mantissa}"},
      {"{format: fp8_e5m2, residual: none}", "{format: f32}"},
  };
  int count = 0;
  for (const Case& c : cases) {
    for (const auto& [stage_from, stage_to] : {std::pair{2, 2}, {2, 3}, {3, 2}}) {
      Config from = config_of(c.from);
      Config to = config_of(c.to);
      from.zero_stage = stage_from;
      to.zero_stage = stage_to;
      const std::string path = (directory_ / ("convert" + std::to_string(++count))).string();
      std::vector<std::vector<float>> values;  // of the checkpoint, as exactly as it knows them
      std::map<std::string, ShardedOptimizer::StateTensor> state;
      run_thread_ranks(2, [&](Communicator& comm) {
        Model model;
        for (Parameter& p : model.parameters) p.gradient_state = GradientState::averaged;
        ShardedOptimizer optimizer{from, comm.duplicate("job"), model.parameters};
        for (std::int64_t s = 1; s <= 2; ++s) {
          model.backward(s, 0);
          optimizer.step();
        }
        optimizer.save(path);
        std::vector<int> ids;
        for (int i = 0; i < std::ssize(model.parameters); ++i) ids.push_back(i);
        optimizer.gather(ids);
        auto all = optimizer.gather_state();
        if (comm.rank() != 0) return;
        for (std::size_t i = 0; i < model.weights.size(); ++i) {
          std::vector<float> w(model.weights[i].size());
          optimizer.copy_weights(static_cast<int>(i), w.data());
          const auto master = all.find("state/" + model.parameters[i].name + "/master");
          values.push_back(master == all.end() ? w : master->second.values);
        }
        state = std::move(all);
      });
      run_thread_ranks(3, [&](Communicator& comm) {
        Model model;
        ShardedOptimizer optimizer{to, comm.duplicate("job"), model.parameters};
        EXPECT_THROW(optimizer.load(path), ConfigError) << c.from << " without being asked";
        optimizer.load(path, /*convert=*/true);
        EXPECT_EQ(optimizer.steps(), 2);
        std::vector<int> ids;
        for (int i = 0; i < std::ssize(model.parameters); ++i) ids.push_back(i);
        const auto weights_of = [&](ShardedOptimizer& o) {
          o.gather(ids);
          std::vector<std::vector<float>> all;
          for (std::size_t i = 0; i < model.weights.size(); ++i) {
            all.emplace_back(model.weights[i].size());
            o.copy_weights(static_cast<int>(i), all.back().data());
          }
          o.release(ids);
          return all;
        };
        const auto found = weights_of(optimizer);
        const auto momenta = optimizer.gather_state();
        Model fresh;
        const bool missing_bits = c.from.find("mantissa") != std::string::npos;
        if (!missing_bits) fresh.weights = values;
        for (std::size_t i = 0; i < fresh.parameters.size(); ++i) {
          fresh.parameters[i].weights = fresh.weights[i].data();
        }
        ShardedOptimizer judge{to, comm.duplicate("judge"), fresh.parameters};
        if (!missing_bits) {
          EXPECT_EQ(found, weights_of(judge)) << c.from << " to " << c.to;
        }
        if (comm.rank() != 0) return;
        for (const auto& [name, tensor] : momenta) {
          if (name.ends_with("/master") || name.ends_with("/step")) continue;
          EXPECT_EQ(tensor.values, state.at(name).values) << name;
        }
      });
    }
  }
}

// Of bf16 and its missing bits nothing is lost on the way to f32.
TEST_F(Checkpoints, ConvertMissingBitsExactly) {
  const std::string path = (directory_ / "bits").string();
  const auto config = [](const std::string& weights) {
    return parse_config(
        "schema: 1\ngroups:\n  - match: \"*\"\n    rule: {name: sgd, lr: 0.125}\n"
        "    weights: " +
        weights + "\n");
  };
  run_thread_ranks(2, [&](Communicator& comm) {
    Model model;
    for (Parameter& p : model.parameters) p.gradient_state = GradientState::averaged;
    const auto start = model.weights;
    ShardedOptimizer kept{config("{format: bf16, residual: mantissa}"), comm.duplicate("a"),
                          model.parameters};
    kept.save(path);
    Model other;
    for (auto& w : other.weights) std::fill(w.begin(), w.end(), 0.0F);
    ShardedOptimizer exact{config("{format: f32}"), comm.duplicate("b"), other.parameters};
    exact.load(path, /*convert=*/true);
    EXPECT_EQ(other.weights, start);
  });
}

TEST_F(Checkpoints, AScaleThatIsNoNumberIsRefusedByName) {
  const Config config = config_of("{format: fp8_e4m3, residual: momentum}");
  resumed(config, 1, config, 1, 1, 0);
  // The first scale of 'embed' becomes NaN; digests are made to fit, as of a writer gone wrong.
  const std::filesystem::path file = std::filesystem::path(last_) / "rank-0.safetensors";
  std::fstream bytes(file, std::ios::in | std::ios::out | std::ios::binary);
  std::uint64_t header = 0;
  bytes.read(reinterpret_cast<char*>(&header), 8);
  std::string text(header, ' ');
  bytes.read(text.data(), static_cast<std::streamsize>(header));
  const std::size_t at = text.find("\"data_offsets\":[", text.find("scales/embed/0"));
  const auto begin = static_cast<std::streamoff>(std::stoll(text.substr(at + 16)));
  const float nan = std::nanf("");
  bytes.seekp(static_cast<std::streamoff>(8 + header) + begin);
  bytes.write(reinterpret_cast<const char*>(&nan), 4);
  bytes.close();
  runtime::Manifest m;
  {
    const auto read = runtime::read_manifest(last_);
    m = read;
  }
  runtime::SafetensorsReader reader(file);
  for (runtime::CheckpointPiece& p : m.pieces) {
    const runtime::TensorInfo* info = reader.find(p.tensor);
    std::vector<std::byte> data(static_cast<std::size_t>(info->end - info->begin));
    reader.read(*info, 0, info->end - info->begin, data.data());
    p.xxh3 = runtime::xxh3_hex(data.data(), data.size());
  }
  std::ofstream(std::filesystem::path(last_) / "manifest.json") << runtime::manifest_text(m);
  run_thread_ranks(2, [&](Communicator& comm) {
    Model model;
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    const auto before = model.all_weights();
    try {
      optimizer.load(last_);
      ADD_FAILURE() << "loaded";
    } catch (const DataError& e) {
      EXPECT_NE(std::string(e.what()).find("a scale of 'embed' is nan"), std::string::npos)
          << e.what();
    }
    EXPECT_EQ(model.all_weights(), before) << "something was changed";
  });
}

// ---- bad input ----------------------------------------------------------------------------------

std::string refusal(const std::string& weights, const std::function<void(Model&)>& change,
                    const std::string& rule = "{name: adamw}") {
  std::string what;
  const Config config = parse_config("schema: 1\ngroups:\n  - match: \"*\"\n    rule: " + rule +
                                     "\n    weights: " + weights + "\n");
  run_thread_ranks(2, [&](Communicator& comm) {
    Model model;
    change(model);
    try {
      ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    } catch (const ConfigError& e) {
      if (comm.rank() == 1) what = e.what();
    }
  });
  return what;
}

TEST(Quantized, BadInputIsRefusedWithNameAndReason) {
  const auto nothing = [](Model&) {};
  EXPECT_NE(refusal("{format: int4, block: 32}", nothing).find("'embed'"), std::string::npos);
  EXPECT_NE(refusal("{format: int4, block: 32}", nothing)
                .find("must be even and divide its rows of "
                      "20"),
            std::string::npos);
  const auto f32_only = [](Model& m) { m.parameters[2].f32_only = true; };
  EXPECT_NE(refusal("{format: fp8_e4m3}", f32_only).find("'a.bias'"), std::string::npos);
  EXPECT_NE(refusal("{format: fp8_e4m3}", f32_only).find("stays in f32"), std::string::npos);
  EXPECT_EQ(refusal("{format: f32}", f32_only), "");
  EXPECT_NE(
      refusal("{format: fp8_e4m3, residual: momentum}", nothing, "{name: adamw, betas: [0, 0.9]}")
          .find("has no momentum that could bring the residual back"),
      std::string::npos);
  EXPECT_NE(refusal("{format: fp8_e4m3, residual: momentum}", nothing,
                    "{name: lion, lr: 0.01, weight_decay: 2}")
                .find("as much as the momentum loses"),
            std::string::npos);
  const auto strided = [](Model& m) { m.parameters[1].strides = {1, 12}; };
  EXPECT_NE(refusal("{format: fp8_e4m3}", strided).find("it is not dense"), std::string::npos);
}

}  // namespace
}  // namespace orthrus
