// The whole runtime on ranks that are threads: sharded equals whole, bytes equal the plan, faults
// are agreed.
#include <gtest/gtest.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <orthrus/error.hpp>
#include <orthrus/orthrus.hpp>

#include "runtime/checkpoint.hpp"
#include "runtime/plan.hpp"
#include "runtime/safetensors.hpp"
#include "toy_model.hpp"

namespace orthrus {
namespace {

using toy::Model;

constexpr Index kLeaves = 8;

Config reproducible(const std::string& extra = "") {
  return parse_config(toy::muon_and_adamw + std::string("reproducible: {virtual_shards: 8}\n") +
                      extra);
}

/// Weights after `steps` steps of kLeaves leaves; `before_step` may change things on the way.
std::vector<float> train(const Config& config, int ranks, std::int64_t steps) {
  std::vector<float> result;
  run_thread_ranks(ranks, [&](Communicator& comm) {
    Model model;
    const int rank = comm.rank();
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    for (std::int64_t s = 1; s <= steps; ++s) toy::reproducible_step(optimizer, model, kLeaves, s);
    if (rank == 0) result = model.all_weights();
  });
  return result;
}

class OnRanks : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, OnRanks, testing::Values(1, 2, 3, 4, 7));

TEST_P(OnRanks, ReproducibleRunsHaveTheBitsOfOneRank) {
  for (const char* extra : {"", "zero: {stage: 1}\n", "comm: {bucket_bytes: 2KiB}\n"}) {
    EXPECT_EQ(train(reproducible(extra), GetParam(), 4), train(reproducible(), 1, 4)) << extra;
  }
}

TEST_P(OnRanks, NothingReadsABufferThatIsFree) {
  // Small buckets, so that every slot is used again within a step; with NaN in what is free,
  // whoever still read it would show.
  for (const char* mode : {"owner", "exchange", "gather", "gram", "gram_steps"}) {
    for (const char* zero : {"zero: {stage: 1}\n", "zero: {stage: 2}\n"}) {
      Config config =
          parse_config(toy::muon_and_adamw + std::string(zero) + "comm: {bucket_bytes: 2KiB}\n");
      config.groups[0].matrix.mode = mode;
      const auto weights = [&](const char* checks) {
        Config c = config;
        c.checks = checks;
        std::vector<float> result;
        run_thread_ranks(GetParam(), [&](Communicator& comm) {
          Model model;
          ShardedOptimizer optimizer{c, comm.duplicate("job"), model.parameters};
          for (std::int64_t s = 1; s <= 3; ++s) {
            model.backward(s, comm.rank());
            optimizer.step();
          }
          if (comm.rank() == 0) result = model.all_weights();
        });
        return result;
      };
      EXPECT_EQ(weights("collective"), weights("local")) << mode << " " << zero;
    }
  }
}

TEST_P(OnRanks, ClippedReproducibleRunsHaveTheBitsOfOneRank) {
  Config config = reproducible();
  for (GroupConfig& g : config.groups) g.clip_norm = 0.5;
  const auto one = train(config, 1, 3);
  EXPECT_EQ(train(config, GetParam(), 3), one);
  EXPECT_NE(train(reproducible(), 1, 3), one) << "clipping did nothing";
}

// η = lr·mass/sensitivity, decay included: 0.02·3/2 is 0.03 in double, too.
TEST_P(OnRanks, LayersOfMoreMassAndLessSensitivityTakeLongerSteps) {
  Config config = reproducible(), longer = reproducible();
  config.groups[0].layer_mass = 3;
  config.groups[0].layer_sensitivity = 2;
  longer.groups[0].rule.values["lr"] = 0.03;
  EXPECT_EQ(train(config, GetParam(), 3), train(longer, 1, 3));
  EXPECT_NE(train(config, GetParam(), 3), train(reproducible(), 1, 3));
}

TEST_P(OnRanks, StochasticRoundingHasTheBitsOfOneRank) {
  Config config = reproducible();
  for (GroupConfig& g : config.groups) {
    g.weights = {"bf16", "stochastic", "none"};
  }
  const auto one = train(config, 1, 3);
  EXPECT_EQ(train(config, GetParam(), 3), one);
  config.groups[0].weights.rounding = "nearest";
  EXPECT_NE(train(config, 1, 3), one) << "rounding did nothing";
}

TEST_P(OnRanks, BytesMessagesAndMatricesAreThePlans) {
  for (const bool leaves : {false, true}) {
    for (const char* extra :
         {"", "zero: {stage: 1}\ntrain: {micro_batches: 2}\n", "train: {micro_batches: 2}\n",
          "comm: {bucket_bytes: 2KiB, gradient_dtype: bf16}\n"}) {
      if (leaves && *extra != '\0') continue;
      const Config config =
          leaves ? reproducible() : parse_config(toy::muon_and_adamw + std::string(extra));
      const int ranks = GetParam();
      run_thread_ranks(ranks, [&](Communicator& comm) {
        Model model;
        std::vector<runtime::ParameterShape> shapes;
        for (const Parameter& p : model.parameters) shapes.push_back(runtime::shape_of(p));
        const runtime::Plan plan = runtime::make_plan(config, shapes, ranks);
        ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
        for (std::int64_t s = 1; s <= 2; ++s) {
          const StepReport* report = nullptr;
          if (leaves) {
            report = &toy::reproducible_step(optimizer, model, kLeaves, s);
          } else {
            for (std::int64_t k = 0; k < config.train.micro_batches; ++k) {
              optimizer.micro_batch(k);
              model.backward(s, comm.rank() + 8 * k);
              for (int id = 0; id < std::ssize(model.parameters); ++id)
                optimizer.gradient_ready(id);
            }
            report = &optimizer.step();
          }
          const auto& mine = plan.per_rank[static_cast<std::size_t>(comm.rank())];
          EXPECT_EQ(report->bytes_sent, mine.traffic.bytes);
          EXPECT_EQ(report->messages, mine.traffic.messages);
          EXPECT_EQ(report->matrices, mine.matrices);
          EXPECT_EQ(report->exceptional_bytes, 0);
        }
      });
    }
  }
}

TEST_P(OnRanks, MicroBatchesEqualOneBatch) {
  // Leaves are exact by construction; here the plain sum: k micro-batches of one rank against the
  // same gradients on one micro-batch, to the rounding of a mean of 4 (a few 1e-8, amplified by
  // Newton–Schulz).
  for (const char* stage : {"zero: {stage: 1}\n", "zero: {stage: 2}\n"}) {
    std::vector<float> results[2];
    for (const std::int64_t k : {std::int64_t{1}, std::int64_t{4}}) {
      const Config config = parse_config(toy::muon_and_adamw + std::string(stage) +
                                         "train: {micro_batches: " + std::to_string(k) + "}\n");
      run_thread_ranks(GetParam(), [&](Communicator& comm) {
        Model model;
        ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
        for (std::int64_t s = 1; s <= 3; ++s) {
          std::vector<std::vector<float>> sum;
          for (Index m = 0; m < 4; ++m) {
            if (k > 1) optimizer.micro_batch(m);
            model.backward(s, 4 * comm.rank() + m);
            if (k > 1) {
              for (int id = 0; id < std::ssize(model.parameters); ++id)
                optimizer.gradient_ready(id);
            } else if (sum.empty()) {
              sum = model.gradients;
            } else {
              for (std::size_t i = 0; i < sum.size(); ++i) {
                for (std::size_t e = 0; e < sum[i].size(); ++e) sum[i][e] += model.gradients[i][e];
              }
            }
          }
          if (k == 1) {
            for (std::size_t i = 0; i < sum.size(); ++i) {
              for (std::size_t e = 0; e < sum[i].size(); ++e)
                model.gradients[i][e] = sum[i][e] * 0.25F;
            }
          }
          optimizer.step();
        }
        if (comm.rank() == 0) results[k == 4] = model.all_weights();
      });
    }
    double difference = 0;
    double size = 0;
    for (std::size_t i = 0; i < results[0].size(); ++i) {
      difference += std::pow(results[0][i] - results[1][i], 2);
      size += std::pow(results[0][i], 2);
    }
    EXPECT_LE(std::sqrt(difference / size), 1e-5) << stage;
  }
}

TEST_P(OnRanks, MicroBatchesAsLeavesAreBitwiseOneBatch) {
  // Four leaves as four micro-batches of rank 0, or one each on up to four ranks.
  const Config config =
      parse_config(toy::muon_and_adamw + std::string("reproducible: {virtual_shards: 4}\n"));
  const auto run = [&](int ranks) {
    std::vector<float> result;
    run_thread_ranks(ranks, [&](Communicator& comm) {
      Model model;
      ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
      for (std::int64_t s = 1; s <= 3; ++s) toy::reproducible_step(optimizer, model, 4, s);
      if (comm.rank() == 0) result = model.all_weights();
    });
    return result;
  };
  EXPECT_EQ(run(GetParam()), run(1));
}

TEST_P(OnRanks, AnyOrderOfReadinessGivesTheSameBits) {
  const Config config =
      parse_config(toy::muon_and_adamw + std::string("comm: {bucket_bytes: 1KiB}\n"));
  std::vector<float> results[2];
  for (const bool shuffled : {false, true}) {
    run_thread_ranks(GetParam(), [&](Communicator& comm) {
      Model model;
      const int n = static_cast<int>(model.parameters.size());
      ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
      for (std::int64_t s = 1; s <= 3; ++s) {
        model.backward(s, comm.rank());
        for (int i = 0; i < n; ++i) {
          // Another order on every rank and step; one parameter is left to step().
          const int id = shuffled ? (i * 3 + comm.rank() + static_cast<int>(s)) % n : n - 1 - i;
          if (!shuffled || i + 1 < n) optimizer.gradient_ready(id);
        }
        optimizer.step();
      }
      if (comm.rank() == 0) results[shuffled] = model.all_weights();
    });
  }
  EXPECT_EQ(results[0], results[1]);
}

TEST_P(OnRanks, ReplicatesHoldTheSameWeights) {
  if (GetParam() % 2 != 0) GTEST_SKIP() << "needs an even number of ranks";
  const Config plain = reproducible();
  Config hybrid = reproducible("checks_every_steps: 1\n");
  hybrid.mesh.shard = GetParam() / 2;
  hybrid.mesh.replicate = 2;
  EXPECT_EQ(train(hybrid, GetParam(), 3), train(plain, 1, 3));
}

TEST_P(OnRanks, HybridMeshWithoutLeavesSendsThePlanAndAgrees) {
  if (GetParam() % 2 != 0) GTEST_SKIP() << "needs an even number of ranks";
  Config config = parse_config(toy::muon_and_adamw + std::string("checks_every_steps: 1\n"));
  config.mesh.shard = GetParam() / 2;
  config.mesh.replicate = 2;
  run_thread_ranks(GetParam(), [&](Communicator& comm) {
    Model model;
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    for (std::int64_t s = 1; s <= 2; ++s) {
      model.backward(s, comm.rank());
      optimizer.step();  // throws if bytes differ from the plan, or replicas from each other
    }
  });
}

TEST_P(OnRanks, ANaNOnOneRankSkipsTheStepEverywhere) {
  for (const bool leaves : {false, true}) {
    const Config config = leaves ? reproducible() : parse_config(toy::muon_and_adamw);
    run_thread_ranks(GetParam(), [&](Communicator& comm) {
      Model model;
      ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
      const auto feed = [&](std::int64_t step, bool poison) -> const StepReport& {
        const runtime::Leaves run =
            leaves ? runtime::leaf_run(kLeaves, comm.size(), comm.rank()) : runtime::Leaves{0, 1};
        for (Index leaf = run.begin; leaf < run.end; ++leaf) {
          if (leaf > run.begin) optimizer.micro_batch(leaf - run.begin);
          model.backward(step, leaves ? leaf : comm.rank());
          if (poison && comm.rank() == comm.size() - 1 && leaf + 1 == run.end) {
            model.gradients[3][17] = std::numeric_limits<float>::quiet_NaN();
          }
          for (int id = 0; id < std::ssize(model.parameters); ++id) optimizer.gradient_ready(id);
        }
        return optimizer.step();
      };
      EXPECT_FALSE(feed(1, false).skipped);
      const auto weights = model.all_weights();
      const auto state = optimizer.gather_state();
      const StepReport& report = feed(2, true);
      EXPECT_TRUE(report.skipped);
      EXPECT_NE(report.skip_reason.find("'qkv.weight'"), std::string::npos) << report.skip_reason;
      EXPECT_EQ(model.all_weights(), weights);
      const auto after = optimizer.gather_state();
      ASSERT_EQ(state.size(), after.size());
      for (const auto& [name, tensor] : state)
        EXPECT_EQ(after.at(name).values, tensor.values) << name;
      EXPECT_FALSE(feed(3, false).skipped);
      EXPECT_NE(model.all_weights(), weights);
    });
  }
}

TEST_P(OnRanks, TooManySkippedStepsStopTheRunOnAllRanks) {
  const Config config =
      parse_config(toy::muon_and_adamw + std::string("train: {max_skipped: 2}\n"));
  run_thread_ranks(GetParam(), [&](Communicator& comm) {
    Model model;
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    const auto poisoned = [&]() -> const StepReport& {
      model.backward(1, comm.rank());
      if (comm.rank() == 0) model.gradients[0][0] = std::numeric_limits<float>::infinity();
      return optimizer.step();
    };
    EXPECT_TRUE(poisoned().skipped);
    EXPECT_THROW(poisoned(), NumericError);
  });
}

TEST_P(OnRanks, ADifferentModelOnOneRankIsNamedOnAll) {
  if (GetParam() == 1) GTEST_SKIP() << "one rank agrees with itself";
  const Config config = parse_config(toy::muon_and_adamw);
  run_thread_ranks(GetParam(), [&](Communicator& comm) {
    Model model;
    const bool odd = comm.rank() == comm.size() - 1;
    if (odd) model.parameters[1].shape = {20, 12};
    try {
      ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
      ADD_FAILURE() << "accepted";
    } catch (const ConfigError& e) {
      EXPECT_NE(std::string(e.what()).find("parameter 1 is 'a.weight' f32 [20, 12]"),
                std::string::npos)
          << e.what();
      EXPECT_NE(std::string(e.what()).find("rank " + std::to_string(comm.size() - 1)),
                std::string::npos)
          << e.what();
    }
  });
}

TEST_P(OnRanks, AMissingBufferOnOneRankIsNamedOnAll) {
  const Config config = parse_config(toy::muon_and_adamw);
  run_thread_ranks(GetParam(), [&](Communicator& comm) {
    Model model;
    if (comm.rank() == comm.size() - 1) model.parameters[2].gradient = nullptr;
    EXPECT_THROW((ShardedOptimizer{config, comm.duplicate("job"), model.parameters}), ConfigError);
  });
}

TEST_P(OnRanks, MisuseIsReportedByStepOnAllRanks) {
  const Config config = parse_config(toy::muon_and_adamw);
  run_thread_ranks(GetParam(), [&](Communicator& comm) {
    Model model;
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    model.backward(1, comm.rank());
    const auto weights = model.all_weights();
    if (comm.rank() == 0) {
      optimizer.gradient_ready(2);
      optimizer.gradient_ready(2);
    }
    try {
      optimizer.step();
      ADD_FAILURE() << "accepted";
    } catch (const ConfigError& e) {
      EXPECT_NE(std::string(e.what()).find("'a.bias' was ready already"), std::string::npos)
          << e.what();
    }
    EXPECT_EQ(model.all_weights(), weights);
    EXPECT_FALSE(optimizer.step().skipped) << "the optimizer goes on";
  });
}

TEST_P(OnRanks, AveragedGradientsAreNotSent) {
  const Config config = parse_config(toy::muon_and_adamw);
  std::vector<float> results[2];
  for (const bool averaged : {false, true}) {
    run_thread_ranks(GetParam(), [&](Communicator& comm) {
      Model model;
      if (averaged) {
        for (Parameter& p : model.parameters) p.gradient_state = GradientState::averaged;
      }
      ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
      std::int64_t bytes = 0;
      for (std::int64_t s = 1; s <= 2; ++s) {
        model.backward(s, 0);  // the same on every rank
        bytes = optimizer.step().bytes_sent;
      }
      if (comm.rank() == 0) results[averaged] = model.all_weights();
      std::array<std::int64_t, 1> sum{bytes};
      comm.all_reduce(std::span<std::int64_t>(sum), ReduceOp::sum);
      const auto elements = static_cast<std::int64_t>(model.all_weights().size());
      // Flag, rate, its square and a norm per group; an update per group and the audit.
      const std::int64_t control = 2 * (comm.size() - 1) * ((3 + 2) + (2 + 1)) * 8;
      EXPECT_EQ(sum[0], (averaged ? 1 : 2) * (comm.size() - 1) * elements * 4 + control);
    });
  }
  for (std::size_t i = 0; i < results[0].size(); ++i) {
    EXPECT_NEAR(results[0][i], results[1][i], 1e-5) << i;  // the mean of equal numbers rounds once
  }
}

// A flip that the next all-gather would heal: the gradients were computed with it.
TEST_P(OnRanks, DriftOfAReplicaIsFoundBeforeTheNextUpdate) {
  if (GetParam() == 1) GTEST_SKIP() << "one rank agrees with itself";
  const Config config = parse_config(toy::muon_and_adamw + std::string("checks: collective\n"));
  run_thread_ranks(GetParam(), [&](Communicator& comm) {
    Model model;
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    model.backward(1, comm.rank());
    optimizer.step();
    if (comm.rank() == comm.size() - 1) model.weights[4][7] += 3;
    const auto before = model.all_weights();
    try {
      optimizer.step();
      ADD_FAILURE() << "not found";
    } catch (const NumericError& e) {
      EXPECT_NE(std::string(e.what()).find("'conv.weight'"), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find("rank " + std::to_string(comm.size() - 1)),
                std::string::npos)
          << e.what();
    }
    EXPECT_EQ(model.all_weights(), before);
    EXPECT_THROW(optimizer.step(), Error) << "no step follows one that failed midway";
  });
}

TEST_P(OnRanks, SavingInTheMiddleOfAStepIsRefusedOnAllRanksAndTheStepGoesOn) {
  for (const char* extra : {"", "reproducible: {virtual_shards: 8}\n"}) {
    const Config config = parse_config(toy::muon_and_adamw + std::string(extra));
    run_thread_ranks(GetParam(), [&](Communicator& comm) {
      Model model;
      ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
      if (config.virtual_shards == 0) {
        model.backward(1, comm.rank());
        if (comm.rank() == 0) {
          for (int id = 0; id < std::ssize(model.parameters); ++id) optimizer.gradient_ready(id);
        }
        EXPECT_THROW(optimizer.save("/tmp/orthrus-never-written"), ConfigError);
        EXPECT_THROW((void)optimizer.gather_state(), ConfigError);
        EXPECT_FALSE(optimizer.step().skipped);
      } else {
        toy::reproducible_step(optimizer, model, kLeaves, 1);
      }
      EXPECT_FALSE(optimizer.gather_state().empty() && comm.rank() == 0);
    });
  }
}

TEST_P(OnRanks, RatesThatDifferBetweenRanksAreRefused) {
  if (GetParam() == 1) GTEST_SKIP() << "one rank agrees with itself";
  const Config config = parse_config(toy::muon_and_adamw);
  run_thread_ranks(GetParam(), [&](Communicator& comm) {
    Model model;
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    model.backward(1, comm.rank());
    optimizer.set_lr_multiplier(1.0 + comm.rank());
    EXPECT_THROW(optimizer.step(), ConfigError);
    optimizer.set_lr_multiplier(std::nan(""));
    EXPECT_THROW(optimizer.step(), ConfigError);
    optimizer.set_lr_multiplier(0.5);
    EXPECT_EQ(optimizer.step().lr_multiplier, 0.5);
  });
}

TEST(Buffers, SharedByTwoTensorsAreRefused) {
  const Config config = parse_config(toy::muon_and_adamw);
  Model tied;
  tied.parameters[2].weights = tied.weights[1].data() + 4;
  EXPECT_THROW((ShardedOptimizer{config, self_communicator(), tied.parameters}), ConfigError);
  Model same;
  same.parameters[1].gradient = same.weights[1].data();
  EXPECT_THROW((ShardedOptimizer{config, self_communicator(), same.parameters}), ConfigError);
  Model folded;
  folded.parameters[1].strides = {1, 1};
  EXPECT_THROW((ShardedOptimizer{config, self_communicator(), folded.parameters}), ConfigError);
}

TEST(RoundedFormats, LieOnTheirGridFromTheStart) {
  Config config = parse_config(toy::muon_and_adamw);
  for (GroupConfig& g : config.groups) g.weights.format = "bf16";
  Model model;
  ShardedOptimizer optimizer{config, self_communicator(), model.parameters};
  for (const float w : model.all_weights()) {
    EXPECT_EQ(std::bit_cast<std::uint32_t>(w) & 0xffffU, 0U) << w;
  }
}

TEST(Strides, ColumnMajorAndPaddedTensorsAreTheSameModel) {
  const Config config = parse_config(toy::muon_and_adamw);
  Model plain;
  Model strided;
  // a.weight column-major with leading dimension 15.
  constexpr Index rows = 12, cols = 20, ld = 15;
  std::vector<float> w(ld * cols, -7);
  std::vector<float> g(ld * cols, -7);
  Parameter& p = strided.parameters[1];
  p.strides = {1, ld};
  p.weights = w.data();
  p.gradient = g.data();
  const auto spread = [&](const std::vector<float>& from, std::vector<float>& to) {
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < cols; ++j)
        to[static_cast<std::size_t>(i + j * ld)] = from[static_cast<std::size_t>(i * cols + j)];
    }
  };
  spread(plain.weights[1], w);
  ShardedOptimizer a{config, self_communicator(), plain.parameters};
  ShardedOptimizer b{config, self_communicator(), strided.parameters};
  for (std::int64_t s = 1; s <= 3; ++s) {
    plain.backward(s, 0);
    strided.backward(s, 0);
    spread(plain.gradients[1], g);
    a.step();
    b.step();
  }
  std::vector<float> expected(w.size(), -7);
  spread(plain.weights[1], expected);
  EXPECT_EQ(w, expected) << "and the padding is untouched";
  EXPECT_EQ(plain.weights[0], strided.weights[0]);
}

TEST(MixedPrecision, AMasterKeepsWhatRoundingLoses) {
  // A step too small for bf16: without a master nothing moves, with one it adds up.
  for (const bool master : {false, true}) {
    Config config = parse_config(
        "schema: 1\ngroups:\n  - {match: \"*\", rule: {name: sgd, lr: 1.0, momentum: 0.0}}\n");
    config.groups[0].weights = {"bf16", "nearest", master ? "master" : "none"};
    std::vector<BFloat16> w(64, BFloat16{0x3F80});  // 1.0
    std::vector<float> g(64, 0x1p-12F);             // half a bf16 step below 1 is 2^-9
    Parameter p;
    p.name = "w";
    p.shape = {64};
    p.dtype = DType::bf16;
    p.weights = w.data();
    p.gradient = g.data();
    ShardedOptimizer optimizer{config, self_communicator(), {p}};
    for (int s = 0; s < 32; ++s) optimizer.step();
    const std::uint16_t expected = master ? 0x3F7E : 0x3F80;  // 1 − 32·2^-12 = 1 − 2^-7, exactly
    for (const BFloat16 v : w) EXPECT_EQ(v.bits, expected) << master;
    EXPECT_EQ(optimizer.memory().state, 64 * 4 * (master ? 2 : 1));
  }
}

// ---- checkpoints
// ---------------------------------------------------------------------------------

class Checkpoints : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        std::filesystem::temp_directory_path() / ("orthrus-test-" + std::to_string(::getpid()));
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::filesystem::path folder_;
};

TEST_F(Checkpoints, LoadOnAnyNumberOfRanksWithTheBitsOfTheUninterruptedRun) {
  const char* recipes[] = {toy::muon_and_adamw,
                           "\nschema: 1\ngroups:\n  - {match: \"*.weight\", rule: {name: normuon}, "
                           "weights: {format: bf16, residual: "
                           "master}}\n  - {match: \"*\", rule: {name: adamw}, weights: {format: "
                           "bf16, rounding: stochastic}}\n"};
  for (const char* recipe : recipes) {
    const Config config = parse_config(recipe + std::string("reproducible: {virtual_shards: 8}\n"));
    const auto uninterrupted = train(config, 1, 5);
    for (int saver = 1; saver <= 4; ++saver) {
      const std::string path = (folder_ / ("np" + std::to_string(saver))).string();
      std::filesystem::remove_all(path);
      run_thread_ranks(saver, [&](Communicator& comm) {
        Model model;
        ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
        for (std::int64_t s = 1; s <= 2; ++s) toy::reproducible_step(optimizer, model, kLeaves, s);
        optimizer.save(path, {{"cursor", "17"}});
      });
      for (int loader = 1; loader <= 4; ++loader) {
        run_thread_ranks(loader, [&](Communicator& comm) {
          Model model;
          for (auto& w : model.weights) std::fill(w.begin(), w.end(), 99.0F);
          ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
          EXPECT_EQ(optimizer.load(path).at("cursor"), "17");
          EXPECT_EQ(optimizer.steps(), 2);
          for (std::int64_t s = 3; s <= 5; ++s)
            toy::reproducible_step(optimizer, model, kLeaves, s);
          EXPECT_EQ(model.all_weights(), uninterrupted) << saver << " -> " << loader;
        });
      }
    }
  }
}

TEST_F(Checkpoints, NameAllDifferencesToAnotherModel) {
  const std::string path = (folder_ / "c").string();
  Model model;
  ShardedOptimizer optimizer{parse_config(toy::muon_and_adamw), self_communicator(),
                             model.parameters};
  optimizer.save(path);
  Model other;
  other.parameters[0].name = "embedding";
  other.parameters[1].shape = {20, 12};
  ShardedOptimizer loader{parse_config(toy::muon_and_adamw), self_communicator(), other.parameters};
  try {
    (void)loader.load(path);
    FAIL();
  } catch (const ConfigError& e) {
    const std::string what = e.what();
    EXPECT_NE(what.find("'embedding' is not in the checkpoint"), std::string::npos) << what;
    EXPECT_NE(what.find("'embed' is in the checkpoint only"), std::string::npos) << what;
    EXPECT_NE(what.find("'a.weight' has another shape"), std::string::npos) << what;
  }
  EXPECT_EQ(other.all_weights(), Model().all_weights()) << "nothing was changed";
}

TEST_F(Checkpoints, DetectEveryFlippedBitAndEveryCutFile) {
  const std::string path = (folder_ / "c").string();
  Model model;
  const Config config = parse_config(toy::muon_and_adamw);
  ShardedOptimizer optimizer{config, self_communicator(), model.parameters};
  optimizer.save(path);
  for (const char* name : {"manifest.json", "rank-0.safetensors"}) {
    const auto file = std::filesystem::path(path) / name;
    const auto size = std::filesystem::file_size(file);
    std::FILE* f = std::fopen(file.c_str(), "r+b");
    ASSERT_NE(f, nullptr);
    for (int trial = 0; trial < 200; ++trial) {
      const auto at = static_cast<long>((static_cast<std::uint64_t>(trial) * 2654435761U) % size);
      const auto flip = [&](int bit) {
        std::fseek(f, at, SEEK_SET);
        const int c = std::fgetc(f);
        std::fseek(f, at, SEEK_SET);
        std::fputc(c ^ (1 << bit), f);
        std::fflush(f);
      };
      flip(trial % 8);
      Model victim;
      ShardedOptimizer loader{config, self_communicator(), victim.parameters};
      EXPECT_THROW((void)loader.load(path), Error)
          << name << " byte " << at << " bit " << trial % 8;
      EXPECT_EQ(victim.all_weights(), Model().all_weights());
      flip(trial % 8);
    }
    std::fclose(f);
    for (const auto cut : {std::uintmax_t{0}, std::uintmax_t{7}, size / 2, size - 1}) {
      const auto copy = folder_ / "copy";
      std::filesystem::copy_file(file, copy, std::filesystem::copy_options::overwrite_existing);
      std::filesystem::resize_file(file, cut);
      EXPECT_THROW((void)optimizer.load(path), Error) << name << " cut to " << cut;
      std::filesystem::copy_file(copy, file, std::filesystem::copy_options::overwrite_existing);
    }
  }
  EXPECT_NO_THROW((void)optimizer.load(path)) << "the original is whole again";
}

TEST_F(Checkpoints, WithRegionsOutsideTheirTensorsAreRefusedBeforeTheyAreUsed) {
  const std::string path = (folder_ / "c").string();
  Model model;
  ShardedOptimizer optimizer{parse_config(toy::muon_and_adamw), self_communicator(),
                             model.parameters};
  optimizer.save(path);
  const runtime::Manifest good = runtime::read_manifest(path);
  const auto refused = [&](const std::function<void(runtime::Manifest&)>& harm) {
    runtime::Manifest bad = good;
    harm(bad);
    runtime::write_file_atomically(std::filesystem::path(path) / "manifest.json",
                                   runtime::manifest_text(bad));  // its own digest is right
    EXPECT_THROW((void)runtime::read_manifest(path), DataError);
  };
  refused([](auto& m) { m.pieces[0].first += 1 << 20; });
  refused([](auto& m) {
    m.pieces[0].distance = Index{1} << 62;
    m.pieces[0].rows = 3;
  });
  refused([](auto& m) {
    m.pieces[0].distance = (Index{1} << 62) + (Index{1} << 40);
    m.pieces[0].rows = 3;
  });
  refused([](auto& m) { m.pieces[0].cols = -1; });
  refused([](auto& m) {
    m.pieces[0].rows = 2;
    m.pieces[0].distance = 0;
  });
  refused([](auto& m) { m.pieces[0].file = 1; });
  refused([](auto& m) { m.pieces[0].dtype = "U8"; });
  refused([](auto& m) { m.pieces[0].parameter = "nobody"; });
  refused([](auto& m) { m.parameters[0].shape = {Index{1} << 50}; });
  refused([](auto& m) { m.parameters[0].shape = {Index{1} << 40, Index{1} << 40}; });
  refused([](auto& m) { m.parameters[0].lines.clear(); });
  refused([](auto& m) { m.files[0].name = "../rank-0.safetensors"; });
  refused([](auto& m) { m.files[0].bytes += 1; });
}

TEST_F(Checkpoints, OfAnotherSplitAreNamedNotMixedUp) {
  const std::string path = (folder_ / "c").string();
  const std::string recipe =
      "schema: 1\ngroups:\n  - {match: \"*.weight\", rule: {name: normuon}}\n"
      "  - {match: \"*\", rule: {name: adamw}}\n";
  Model model;
  ShardedOptimizer optimizer{parse_config(recipe), self_communicator(), model.parameters};
  optimizer.save(path + "/");  // a trailing slash is no other name
  Model other;
  other.parameters[3].views.clear();
  other.parameters[1].views = {{0, 12, 0, 10}, {0, 12, 10, 10}};
  ShardedOptimizer loader{parse_config(recipe), self_communicator(), other.parameters};
  try {
    (void)loader.load(path);
    FAIL();
  } catch (const ConfigError& e) {
    const std::string what = e.what();
    EXPECT_NE(what.find("'a.weight' was split into other matrices"), std::string::npos) << what;
    EXPECT_NE(what.find("'qkv.weight' was split into other matrices"), std::string::npos) << what;
  }
}

TEST_F(Checkpoints, NeverOverwriteAndLeaveNothingBehind) {
  const std::string path = (folder_ / "c").string();
  Model model;
  ShardedOptimizer optimizer{parse_config(toy::muon_and_adamw), self_communicator(),
                             model.parameters};
  optimizer.save(path);
  try {
    optimizer.save(path);
    FAIL();
  } catch (const IoError& e) {
    EXPECT_EQ(e.exit_code(), ExitCode::cannot_create);
  }
  int entries = 0;
  for ([[maybe_unused]] const auto& e : std::filesystem::directory_iterator(folder_)) ++entries;
  EXPECT_EQ(entries, 1);
}

}  // namespace
}  // namespace orthrus
