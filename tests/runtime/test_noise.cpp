// Gradient noise from the gradients of single ranks and micro-batches, before they are reduced:
// what sums of f64 over all of them say, counted bytes, and no bit of the training changed.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <orthrus/studies/noise.hpp>
#include <random>

#include "modes_run.hpp"

namespace orthrus {
namespace {

struct Shape {
  const char* name;
  Index rows, cols;
};
constexpr Shape kShapes[] = {{"m.a", 12, 20}, {"m.b", 9, 5}, {"v.bias", 1, 70}};
constexpr int kSteps = 4;

/// Contribution k of step t to tensor i: a mean of `truth` and noise of standard deviation sigma.
std::vector<float> contribution(std::size_t i, std::int64_t t, std::int64_t k, double truth = 1,
                                double sigma = 3) {
  std::mt19937_64 random(1 + 100003 * i + 1009 * static_cast<std::uint64_t>(t) +
                         static_cast<std::uint64_t>(k));
  std::normal_distribution<double> normal;
  std::vector<float> g(static_cast<std::size_t>(kShapes[i].rows * kShapes[i].cols));
  for (float& v : g) v = static_cast<float>(truth + sigma * normal(random));
  return g;
}

const char* const kGroups =
    "groups:\n"
    "  - {match: 'm.*', rule: {name: muon, lr: 0.01}, clip_norm: 0.001}\n"
    "  - {match: '*', rule: {name: adamw, lr: 0.01}}\n";

struct Trained {
  std::vector<GradientNoise> groups, parameters;  ///< after the last step
  GradientNoise model;
  std::vector<std::vector<float>> weights;
  std::vector<std::int64_t> measured_at;
};

/// Steps on ranks that are threads; every step's bytes and messages are audited.
Trained train(const std::string& text, int ranks, int contributions, GradientState state) {
  const Config config = parse_config("schema: 1\n" + text + kGroups);
  Trained out;
  run_thread_ranks(ranks, [&](Communicator& comm) {
    std::vector<std::vector<float>> weights, gradients;
    std::vector<Parameter> list;
    for (std::size_t i = 0; i < std::size(kShapes); ++i) {
      weights.push_back(contribution(i, 77, 0));
      gradients.emplace_back(weights.back().size());
    }
    for (std::size_t i = 0; i < std::size(kShapes); ++i) {
      Parameter p;
      p.name = kShapes[i].name;
      p.shape = {kShapes[i].rows, kShapes[i].cols};
      p.weights = weights[i].data();
      p.gradient = gradients[i].data();
      p.gradient_state = state;
      list.push_back(p);
    }
    ShardedOptimizer optimizer(config, comm.duplicate("job"), list);
    const int each = contributions / ranks;
    std::vector<std::int64_t> measured;
    const StepReport* report = nullptr;
    for (std::int64_t t = 1; t <= kSteps; ++t) {
      for (int k = 0; k < each; ++k) {
        optimizer.micro_batch(k);
        for (std::size_t i = std::size(kShapes); i-- > 0;) {
          const auto g =
              contribution(i, t, state == GradientState::averaged ? 0 : comm.rank() * each + k);
          std::copy(g.begin(), g.end(), gradients[i].begin());
          optimizer.gradient_ready(static_cast<int>(i));
        }
      }
      report = &optimizer.step();
      if (report->model_noise.step == t) measured.push_back(t);
    }
    if (comm.rank() != 0) return;
    out.groups = report->noise;
    out.model = report->model_noise;
    for (std::size_t i = 0; i < list.size(); ++i) {
      out.parameters.push_back(optimizer.noise(static_cast<int>(i)));
    }
    out.weights = weights;
    out.measured_at = measured;
  });
  return out;
}

/// q and r of all contributions in step t, in f64.
std::pair<double, double> serial(std::size_t i, std::int64_t t, int contributions) {
  std::vector<double> mean(static_cast<std::size_t>(kShapes[i].rows * kShapes[i].cols));
  double q = 0;
  for (int k = 0; k < contributions; ++k) {
    const auto g = contribution(i, t, k);
    for (std::size_t e = 0; e < g.size(); ++e) {
      const auto x = static_cast<double>(g[e]);
      q += x * x / contributions;
      mean[e] += x / contributions;
    }
  }
  double r = 0;
  for (const double x : mean) r += x * x;
  return {q, r};
}

TEST(GradientNoise, IsTheSameBitsInEveryStage) {
  const auto run = [](const std::string& stage) {
    return train(
        "zero: {stage: " + stage + "}\ndiagnostics: {every_steps: 2}\ntrain: {batch: 40}\n", 3, 3,
        GradientState::local);
  };
  const Trained first = run("1");
  for (const std::string stage : {"2", "3"}) {
    const Trained other = run(stage);
    for (std::size_t i = 0; i < first.parameters.size(); ++i) {
      EXPECT_EQ(first.parameters[i].mean_squared, other.parameters[i].mean_squared) << stage;
      EXPECT_EQ(first.parameters[i].squared_mean, other.parameters[i].squared_mean) << stage;
    }
    EXPECT_EQ(first.model.scale(), other.model.scale()) << stage;
  }
}

TEST(GradientNoise, IsThatOfAllContributionsOnAnyNumberOfRanks) {
  struct Layout {
    int ranks, contributions;
    const char* extra;
    double tolerance;
  };
  // f32 sums of means: 1e-6. In bf16 a sum is off by 2^-9 of itself, its square by twice that, and
  // so is each contribution's.
  for (const Layout& c :
       {Layout{2, 2, "", 1e-6}, Layout{3, 3, "zero: {stage: 1}\n", 1e-6},
        Layout{4, 4, "mesh: {replicate: 2}\n", 1e-6},
        Layout{4, 4, "mesh: {replicate: 2, node: 2}\ncomm: {bucket_bytes: 600}\n", 1e-6},
        Layout{1, 4, "", 1e-6}, Layout{2, 4, "", 1e-6}, Layout{2, 4, "zero: {stage: 1}\n", 1e-6},
        Layout{2, 4, "zero: {stage: 3}\n", 1e-6},
        Layout{2, 4, "comm: {gradient_dtype: bf16}\n", 0x1p-7},
        Layout{2, 8, "reproducible: {virtual_shards: 8}\n", 1e-6}}) {
    const bool tree = std::string(c.extra).find("virtual") != std::string::npos;
    const int micro = tree ? 1 : c.contributions / c.ranks;
    const Trained run =
        train(std::string(c.extra) + "diagnostics: {every_steps: 2}\n" +
                  "train: {batch: 40, micro_batches: " + std::to_string(micro) + "}\n",
              c.ranks, c.contributions, GradientState::local);
    EXPECT_EQ(run.measured_at, (std::vector<std::int64_t>{2, 4}));
    std::pair<double, double> all(0, 0), matrices(0, 0);
    for (std::size_t i = 0; i < std::size(kShapes); ++i) {
      const auto [q, r] = serial(i, kSteps, c.contributions);
      const GradientNoise& noise = run.parameters[i];
      EXPECT_EQ(noise.step, kSteps);
      EXPECT_EQ(noise.contributions, c.contributions);
      EXPECT_EQ(noise.examples, 40.0 / c.contributions);
      EXPECT_NEAR(noise.mean_squared, q, c.tolerance * q) << c.extra << c.ranks;
      EXPECT_NEAR(noise.squared_mean, r, c.tolerance * r) << c.extra << c.ranks;
      all = {all.first + q, all.second + r};
      if (i < 2) matrices = {matrices.first + q, matrices.second + r};
    }
    // Before clipping, though the matrices' norm is cut to a thousandth.
    EXPECT_NEAR(run.groups[0].mean_squared, matrices.first, c.tolerance * matrices.first);
    EXPECT_NEAR(run.groups[0].squared_mean, matrices.second, c.tolerance * matrices.second);
    EXPECT_NEAR(run.model.mean_squared, all.first, c.tolerance * all.first);
    EXPECT_NEAR(run.model.squared_mean, all.second, c.tolerance * all.second);
    // Measured in steps 2 and 4: the newer one weighs 1, the other 0.9.
    const auto trace = [&](std::int64_t t) {
      double sum = 0;
      for (std::size_t i = 0; i < std::size(kShapes); ++i) {
        const auto [q, r] = serial(i, t, c.contributions);
        sum += 40.0 / (c.contributions - 1) * (q - r);
      }
      return sum;
    };
    const double trend = (0.9 * trace(2) + trace(4)) / 1.9;
    EXPECT_NEAR(run.model.trace_trend, trend, 10 * c.tolerance * trend);
  }
}

// The closed form: n gradients of ‖G‖² = N truth², each over b examples of trΣ = b·N sigma².
TEST(GradientNoise, IsWithoutBias) {
  constexpr int n = 4;
  constexpr int probes = 400;
  for (const double sigma : {0.5, 3.0}) {
    double trace = 0;
    double signal = 0;
    for (int t = 0; t < probes; ++t) {
      GradientNoise noise;
      noise.contributions = n;
      noise.examples = 5;
      std::vector<double> mean(240);
      for (int k = 0; k < n; ++k) {
        const auto g = contribution(0, t, k, 1, sigma);
        for (std::size_t e = 0; e < g.size(); ++e) {
          const auto x = static_cast<double>(g[e]);
          noise.mean_squared += x * x / n;
          mean[e] += x / n;
        }
      }
      for (const double x : mean) noise.squared_mean += x * x;
      trace += noise.trace() / probes;
      signal += noise.signal() / probes;
    }
    // The deviation of a mean of 400: of trΣ √(2/(240·3·400)), of |G|² √(4σ²/n +
    // 2σ⁴/(n(n−1)))/√96000. Four of each.
    const double expected = 5 * 240 * sigma * sigma;
    EXPECT_NEAR(trace, expected, 4 * expected * std::sqrt(2.0 / (240 * 3 * probes)));
    const double spread = std::sqrt(4 * sigma * sigma / n + 2 * std::pow(sigma, 4) / (n * (n - 1)));
    EXPECT_NEAR(signal, 240, 4 * 240 * spread / std::sqrt(240.0 * probes));
  }
}

TEST(GradientNoise, ChangesNoBitOfTheTrainingAndCostsWhatThePlanSays) {
  for (const int ranks : {1, 2, 3}) {
    const std::string batch = "train: {batch: 12, micro_batches: 2}\n";
    const Trained off = train(batch, ranks, 2 * ranks, GradientState::local);
    EXPECT_EQ(off.model.step, 0);
    EXPECT_EQ(off.model.scale(), 0);
    const Trained on =
        train(batch + "diagnostics: {every_steps: 1}\n", ranks, 2 * ranks, GradientState::local);
    EXPECT_EQ(on.weights, off.weights);
    EXPECT_GT(on.model.scale(), 0);
  }
  // Two numbers per parameter more, in the step's first all-reduce.
  std::vector<runtime::ParameterShape> shapes;
  for (const Shape& s : kShapes) {
    Parameter p;
    p.name = s.name;
    p.shape = {s.rows, s.cols};
    shapes.push_back(runtime::shape_of(p));
  }
  const auto planned = [&](const std::string& text, int ranks) {
    const Config config = parse_config("schema: 1\n" + text + kGroups);
    return runtime::make_plan(config, shapes, ranks);
  };
  const std::string on = "diagnostics: {every_steps: 10}\n";
  EXPECT_EQ(planned(on, 4).control_before(), planned("", 4).control_before() + 6);
  EXPECT_EQ(planned(on, 1).control_before(), planned("", 1).control_before()) << "one gradient";
  EXPECT_NE(planned(on, 4).hash, planned("", 4).hash);
}

constexpr int kExamples = 12;

/// Twelve examples a step, dealt to ranks and micro-batches; of tensors 0 and 2 each example's own
/// gradient is handed over.
struct OfExamples {
  std::vector<GradientNoise> parameters;
  GradientNoise model;
  std::vector<std::vector<float>> weights;
};
OfExamples train_with_examples(const std::string& text, int ranks, int micro, bool leave_one_out) {
  const Config config = parse_config(
      "schema: 1\ndiagnostics: {every_steps: 2, gns_source: norm_layers}\ntrain: {batch: 12, "
      "micro_batches: " +
      std::to_string(micro) + "}\n" + text + kGroups);
  OfExamples out;
  run_thread_ranks(ranks, [&](Communicator& comm) {
    std::vector<std::vector<float>> weights, gradients;
    std::vector<Parameter> list;
    for (std::size_t i = 0; i < std::size(kShapes); ++i) weights.push_back(contribution(i, 77, 0));
    gradients = weights;
    for (std::size_t i = 0; i < std::size(kShapes); ++i) {
      Parameter p;
      p.name = kShapes[i].name;
      p.shape = {kShapes[i].rows, kShapes[i].cols};
      p.weights = weights[i].data();
      p.gradient = gradients[i].data();
      list.push_back(p);
    }
    ShardedOptimizer optimizer(config, comm.duplicate("job"), list);
    const int each = kExamples / (ranks * micro);
    const StepReport* report = nullptr;
    for (std::int64_t t = 1; t <= 2; ++t) {
      EXPECT_EQ(optimizer.wants_examples(), t == 2);
      for (int k = 0; k < micro; ++k) {
        if (micro > 1) optimizer.micro_batch(k);
        for (std::size_t i = 0; i < std::size(kShapes); ++i) {
          std::vector<float> rows;
          std::fill(gradients[i].begin(), gradients[i].end(), 0.0F);
          for (int e = 0; e < each; ++e) {
            const auto g = contribution(i, t, (comm.rank() * micro + k) * each + e);
            rows.insert(rows.end(), g.begin(), g.end());
            for (std::size_t x = 0; x < g.size(); ++x)
              gradients[i][x] += g[x] / static_cast<float>(each);
          }
          const auto size = static_cast<Index>(gradients[i].size());
          const Index given = leave_one_out && i == 2 && comm.rank() == 0 ? each - 1 : each;
          if (i != 1)
            optimizer.observe_examples(static_cast<int>(i), {rows.data(), given, size, size});
          optimizer.gradient_ready(static_cast<int>(i));
        }
      }
      report = &optimizer.step();
    }
    if (comm.rank() != 0) return;
    out.model = report->model_noise;
    for (int i = 0; i < 3; ++i) out.parameters.push_back(optimizer.noise(i));
    out.weights = weights;
  });
  return out;
}

TEST(GradientNoise, IsBetweenExamplesWhereTheTrainerHasTheirGradients) {
  for (const auto& [ranks, micro] : {std::pair{1, 1}, {1, 3}, {2, 1}, {3, 2}, {4, 1}}) {
    for (const std::string stage : {"1", "2", "3"}) {
      const OfExamples run =
          train_with_examples("zero: {stage: " + stage + "}\n", ranks, micro, false);
      double trace = 0, signal = 0;
      for (const std::size_t i : {0U, 2U}) {
        std::vector<float> all;
        for (int e = 0; e < kExamples; ++e) {
          const auto g = contribution(i, 2, e);
          all.insert(all.end(), g.begin(), g.end());
        }
        const auto size = static_cast<Index>(all.size()) / kExamples;
        const studies::NoiseProbe serial =
            studies::example_noise({all.data(), kExamples, size, size});
        const GradientNoise& noise = run.parameters[i];
        EXPECT_EQ(noise.contributions, kExamples);
        EXPECT_EQ(noise.examples, 1);
        // q and r are known to the f32 sums of means, of squares ten times the signal's.
        EXPECT_NEAR(noise.trace(), serial.trace, 1e-5 * serial.trace) << ranks << micro << stage;
        EXPECT_NEAR(noise.signal(), serial.signal, 1e-5 * serial.trace) << ranks << micro << stage;
        trace += serial.trace;
        signal += serial.signal;
      }
      EXPECT_EQ(run.parameters[1].contributions, 0) << "nobody has said anything of it";
      EXPECT_NEAR(run.model.trace(), trace, 1e-5 * trace);
      EXPECT_NEAR(run.model.signal(), signal, 1e-5 * trace);
      EXPECT_DOUBLE_EQ(run.model.share, (240.0 + 70) / (240 + 45 + 70));
    }
  }
}

TEST(GradientNoise, AsksForEveryExampleOnAllRanks) {
  try {
    static_cast<void>(train_with_examples("", 2, 1, true));
    FAIL() << "11 of 12 were given";
  } catch (const ConfigError& error) {
    EXPECT_NE(std::string(error.what()).find("11 of 'v.bias'"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("12 gradients of 'm.a'"), std::string::npos);
  }
}

TEST(GradientNoise, IsNotKnownOfAveragedGradientsOrOfOne) {
  const Trained averaged = train("diagnostics: {every_steps: 1}\n", 2, 2, GradientState::averaged);
  const Trained alone = train("diagnostics: {every_steps: 1}\n", 1, 1, GradientState::local);
  for (const Trained& run : {averaged, alone}) {
    EXPECT_EQ(run.model.step, 0);
    EXPECT_EQ(run.model.contributions, 0);
    for (const GradientNoise& noise : run.parameters) EXPECT_EQ(noise.step, 0);
  }
}

TEST(GradientNoise, IsUnresolvedUntilTheSignalIsTwoStandardErrors) {
  // The trends as the runtime makes them, of signals that are drawn: mean 1, deviation `spread`.
  const auto after = [](double spread, int measurements) {
    std::mt19937_64 random(7);
    std::normal_distribution<double> normal(1, spread);
    GradientNoise noise;
    for (int k = 0; k < measurements; ++k) {
      const double x = normal(random);
      const double before = 0.9 * noise.weight;
      noise.weight = before + 1;
      noise.weight_squares = 0.81 * noise.weight_squares + 1;
      noise.signal_trend = (before * noise.signal_trend + x) / noise.weight;
      noise.signal_squares = (before * noise.signal_squares + x * x) / noise.weight;
    }
    return noise.unresolved();
  };
  EXPECT_TRUE(after(0, 1)) << "one measurement has no error";
  EXPECT_FALSE(after(0.1, 10));
  EXPECT_FALSE(after(1, 100)) << "of 19 that count: 1 is 4 standard errors";
  EXPECT_TRUE(after(10, 100)) << "0.4 standard errors";
}

/// One optimizer on `ranks` threads: `steps` steps of contributions from step `from` on, in which
/// the bias has no gradient, and m.b comes averaged.
struct Mixed {
  StepReport report;
  std::vector<GradientNoise> parameters;
};
Mixed mixed(const std::string& text, int ranks, int from, int steps, const std::string& load,
            const std::string& save, std::int64_t bad_step = 0) {
  const Config config = parse_config("schema: 1\ntrain: {batch: 12}\n" + text + kGroups);
  Mixed out;
  run_thread_ranks(ranks, [&](Communicator& comm) {
    std::vector<std::vector<float>> weights, gradients;
    std::vector<Parameter> list;
    for (std::size_t i = 0; i < std::size(kShapes); ++i) {
      weights.push_back(contribution(i, 77, 0));
      gradients.emplace_back(weights.back().size());
    }
    for (std::size_t i = 0; i < std::size(kShapes); ++i) {
      Parameter p;
      p.name = kShapes[i].name;
      p.shape = {kShapes[i].rows, kShapes[i].cols};
      p.weights = weights[i].data();
      p.gradient = gradients[i].data();
      if (i == 1) p.gradient_state = GradientState::averaged;
      list.push_back(p);
    }
    ShardedOptimizer optimizer(config, comm.duplicate("job"), list);
    if (!load.empty()) optimizer.load(load);
    const StepReport* report = nullptr;
    for (std::int64_t t = from; t < from + steps; ++t) {
      for (std::size_t i = std::size(kShapes); i-- > 0;) {
        const auto g = contribution(i, t, i == 1 ? 0 : comm.rank());
        if (i < 2) std::copy(g.begin(), g.end(), gradients[i].begin());
        if (t == bad_step) gradients[0][0] = std::nanf("");
        optimizer.gradient_ready(static_cast<int>(i));
      }
      report = &optimizer.step();
    }
    if (!save.empty()) optimizer.save(save);
    if (comm.rank() != 0) return;
    out.report = *report;
    for (std::size_t i = 0; i < list.size(); ++i)
      out.parameters.push_back(optimizer.noise(static_cast<int>(i)));
  });
  return out;
}

TEST(GradientNoise, SaysWhatItCoversAndKnowsATensorWithoutGradient) {
  const Mixed run = mixed("diagnostics: {every_steps: 1}\n", 3, 1, 2, "", "");
  EXPECT_EQ(run.parameters[0].step, 2);
  EXPECT_EQ(run.parameters[1].step, 0) << "it comes averaged";
  EXPECT_EQ(run.parameters[2].step, 2) << "zeros are a measurement";
  EXPECT_EQ(run.parameters[2].trace(), 0);
  EXPECT_EQ(run.parameters[2].scale(), 0);
  EXPECT_EQ(run.report.noise[0].share, 240.0 / 285);
  EXPECT_EQ(run.report.noise[1].share, 1);
  EXPECT_EQ(run.report.model_noise.share, 310.0 / 355);
}

TEST(GradientNoise, OfASkippedStepIsNotTaken) {
  const std::string text = "diagnostics: {every_steps: 1}\n";
  const Mixed run = mixed(text, 2, 1, 3, "", "", 2);
  const auto [q1, r1] = serial(0, 1, 2);
  const auto [q3, r3] = serial(0, 3, 2);
  const double trend = (0.9 * 12 * (q1 - r1) + 12 * (q3 - r3)) / 1.9;
  EXPECT_EQ(run.parameters[0].step, 3);
  EXPECT_NEAR(run.parameters[0].trace_trend, trend, 1e-5 * trend);
}

TEST(GradientNoise, GoesOnFromACheckpointOnAnotherNumberOfRanks) {
  const auto directory =
      std::filesystem::temp_directory_path() / ("orthrus-noise-" + std::to_string(::getpid()));
  const std::string text = "diagnostics: {every_steps: 1}\n";
  const Mixed first = mixed(text, 2, 1, 3, "", directory.string());
  const Mixed second = mixed(text, 4, 4, 1, directory.string(), "");
  const auto went_on = [&](const GradientNoise& before, const GradientNoise& after) {
    EXPECT_EQ(after.contributions, 4);
    EXPECT_NEAR(after.weight, 0.9 * before.weight + 1, 1e-12);
    const double trend = (0.9 * before.weight * before.trace_trend + after.trace()) / after.weight;
    EXPECT_NEAR(after.trace_trend, trend, 1e-12 * trend);
  };
  went_on(first.parameters[0], second.parameters[0]);
  went_on(first.report.noise[0], second.report.noise[0]);
  went_on(first.report.model_noise, second.report.model_noise);
  // Without diagnostics they are left out, and not asked for.
  const auto plain = directory.string() + "-plain";
  mixed("", 2, 1, 1, directory.string(), plain);
  EXPECT_EQ(mixed(text, 2, 5, 1, plain, "").parameters[0].weight, 1);
  std::filesystem::remove_all(directory);
  std::filesystem::remove_all(plain);
}

}  // namespace
}  // namespace orthrus
