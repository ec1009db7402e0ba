// A momentum that rests in bf16 or int8, on ranks that are threads: X is made of what was not
// rounded, the bits do not depend on who rounds, and rounding stochastically costs no step its way.
#include <gtest/gtest.h>
#include <malloc.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <mutex>
#include <orthrus/error.hpp>
#include <thread>

#include "modes_model.hpp"
#include "runtime/checkpoint.hpp"
#include "runtime/safetensors.hpp"
#include "support/count_new.hpp"

namespace orthrus {
namespace {

using modes::Along;
using modes::ModeCase;
using modes::Trainer;

const char* const kFormats[] = {"{momentum: bf16}", "{momentum: int8, block: 32}"};

/// Every group with this state.
Config with_state(Config config, const std::string& state) {
  const Config parsed = parse_config(
      "schema: 1\ngroups:\n  - {match: \"*\", rule: {name: sgd}, state: " + state + "}\n");
  for (GroupConfig& g : config.groups) g.state = parsed.groups[0].state;
  return config;
}

/// Muon and NorMuon on matrices, `rule` on the rest.
Config recipe(const std::string& rule, const std::string& state) {
  return with_state(parse_config(R"(
schema: 1
groups:
  - match: "m.*"
    rule: {name: muon, lr: 0.05, weight_decay: 0.1, momentum: 0.9}
  - match: "n.*"
    rule: {name: normuon, lr: 0.05, weight_decay: 0.1, momentum: 0.9}
  - match: "*"
    rule: )" + rule + "\n"),
                    state);
}

const char* const kRules[] = {"{name: sgd, lr: 0.02, nesterov: true, weight_decay: 0.1}",
                              "{name: adamw, lr: 0.02, weight_decay: 0.1}",
                              "{name: lion, lr: 0.02, weight_decay: 0.1}"};

/// Rows of several blocks of 32, with and without a short one at the end; cut and dealt.
modes::Model model_of(std::int64_t steps = 4) {
  modes::Model model;
  model.tensors = {{"m.wide", {6, 200}}, {"m.tall", {150, 40}},
                   {"m.few", {3, 33}},   {"m.stack", {12, 70}, {{0, 4, 0, 70}, {4, 8, 0, 70}}},
                   {"n.wide", {5, 96}},  {"e.table", {450, 20}},
                   {"e.long", {3, 130}}, {"e.bias", {77}}};
  std::mt19937_64 bits(3);
  std::normal_distribution<float> normal;
  const auto values = [&](const modes::Tensor& t, float scale) {
    std::vector<float> v;
    for (Index i = 0; i < t.size(); ++i) v.push_back(scale * normal(bits));
    return v;
  };
  for (const modes::Tensor& t : model.tensors) model.weights.push_back(values(t, 0.1F));
  model.gradients.resize(static_cast<std::size_t>(steps));
  for (auto& step : model.gradients) {
    for (const modes::Tensor& t : model.tensors) step.push_back(values(t, 1));
  }
  return model;
}

struct Outcome {
  std::vector<std::vector<float>> weights;
  std::map<std::string, ShardedOptimizer::StateTensor> state;
  [[nodiscard]] const std::vector<float>& momentum(const std::string& name) const {
    return state.at("state/" + name + "/momentum").values;
  }
};

struct Run {
  int ranks = 1;
  std::int64_t last = 4;
  std::string load = {}, save = {};
  bool convert = false;
  /// Called on rank 0 after every step.
  std::function<void(std::int64_t, const Outcome&)> watch = {};
};

Outcome train(const Config& config, const modes::Model& model, const Run& run) {
  Outcome outcome;
  outcome.weights = model.weights;
  const int shards = static_cast<int>(config.mesh.shard > 0 ? config.mesh.shard
                                                            : run.ranks / config.mesh.replicate);
  std::mutex mutex;
  run_thread_ranks(run.ranks, [&](Communicator& comm) {
    Trainer trainer(model, comm.rank() % shards, shards);
    ShardedOptimizer optimizer{config, comm.duplicate("job"), trainer.parameters};
    if (!run.load.empty()) optimizer.load(run.load, run.convert);
    std::vector<int> ids(model.tensors.size());
    std::iota(ids.begin(), ids.end(), 0);
    const auto look = [&] {
      auto state = optimizer.gather_state();
      optimizer.gather(ids);
      const std::scoped_lock lock(mutex);
      if (comm.rank() == 0) outcome.state = std::move(state);
      for (const int id : ids) {
        const auto i = static_cast<std::size_t>(id);
        const auto mine = modes::elements_of(model.tensors[i], comm.rank() % shards, shards);
        std::vector<float> here(mine.size());
        if (!mine.empty()) optimizer.copy_weights(id, here.data());
        for (std::size_t e = 0; e < mine.size(); ++e) {
          outcome.weights[i][static_cast<std::size_t>(mine[e])] = here[e];
        }
      }
      optimizer.release(ids);
    };
    for (std::int64_t s = optimizer.steps() + 1; s <= run.last; ++s) {
      trainer.backward(std::min<std::int64_t>(s, std::ssize(model.gradients)));
      optimizer.step();
      if (!run.watch) continue;
      look();
      if (comm.rank() == 0) run.watch(s, outcome);
      comm.barrier();
    }
    if (!run.save.empty()) optimizer.save(run.save);
    look();
  });
  return outcome;
}

void expect_same_state(const Outcome& a, const Outcome& b, const std::string& what) {
  ASSERT_EQ(a.state.size(), b.state.size()) << what;
  for (const auto& [name, tensor] : a.state) {
    EXPECT_EQ(tensor.values, b.state.at(name).values) << what << " " << name;
  }
}
void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
  EXPECT_EQ(a.weights, b.weights) << what;
  expect_same_state(a, b, what);
}

// ---- what a stored momentum may be -------------------------------------------------------------

/// The distance of neighbours around m in the grid that `row`, a whole row of f32 momentum, is
/// rounded to: of bf16 2^-7 of the power of two below (and one more where a number is rounded up
/// onto that), of int8 the scale of its block.
double spacing(const StateConfig& state, const double* row, Index cols, Index col) {
  if (state.momentum == "bf16") {
    return std::ldexp(1.0, std::max(std::ilogb(std::max(std::abs(row[col]), 1e-38)), -126) - 7);
  }
  const Index first = col / state.block * state.block;
  double largest = 0;
  for (Index c = first; c < std::min(cols, first + state.block); ++c) {
    largest = std::max(largest, std::abs(row[c]));
  }
  return std::max(largest / 127, 1e-12);
}

Index columns_of(const modes::Tensor& t) { return t.shape.size() < 2 ? t.size() : t.cols(); }

class OnRanks : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, OnRanks, testing::Values(1, 2, 3, 4));

// ---- 1: one step -------------------------------------------------------------------------------

// From what rests and G follow what rests next, to one step of its grid, and W to the bits of f32:
// U is of the momentum before it is rounded.
TEST(Momentum, IsRoundedToANeighbourAfterItsUse) {
  for (const char* format : kFormats) {
    Config config = recipe("{name: sgd, lr: 0.05, momentum: 0.9, momentum_form: ema}", format);
    config.groups.erase(config.groups.begin(), config.groups.begin() + 2);
    const StateConfig& rests = config.groups[0].state;
    const modes::Model model = model_of(6);
    Outcome before;
    before.weights = model.weights;
    int inexact = 0;
    train(config, model,
          {.ranks = 2, .last = 6, .watch = [&](std::int64_t step, const Outcome& now) {
             for (std::size_t i = 0; i < model.tensors.size(); ++i) {
               const modes::Tensor& t = model.tensors[i];
               const Index cols = columns_of(t);
               const auto& gradient = model.gradients[static_cast<std::size_t>(step - 1)][i];
               std::vector<float> m(gradient.size());
               const float beta = 0.9;
               const auto weight = static_cast<float>(1 - 0.9);
               for (std::size_t e = 0; e < m.size(); ++e) {
                 const float old = step == 1 ? 0 : before.momentum(t.name)[e];
                 m[e] = beta * old + weight * gradient[e];
                 const float w = before.weights[i][e] - static_cast<float>(0.05) * m[e];
                 // The last bit of the product is the compiler's affair, no more.
                 ASSERT_NEAR(now.weights[i][e], w, 0x1p-22 * std::abs(w) + 0x1p-22 * 0.05 * 4)
                     << format << " " << t.name;
               }
               const std::vector<double> exact(m.begin(), m.end());
               for (std::size_t e = 0; e < m.size(); ++e) {
                 const auto col = static_cast<Index>(e) % cols;
                 const double* row = exact.data() + (static_cast<Index>(e) - col);
                 const double gap = now.momentum(t.name)[e] - exact[e];
                 ASSERT_LE(std::abs(gap), spacing(rests, row, cols, col) * (1 + 1e-5))
                     << format << " " << t.name << " " << e;
                 inexact += gap != 0 ? 1 : 0;
                 if (rests.momentum == "bf16") {
                   ASSERT_EQ(std::bit_cast<std::uint32_t>(now.momentum(t.name)[e]) & 0xffffU, 0U);
                 }
               }
             }
             before = now;
           }});
    EXPECT_GT(inexact, 10000) << format;  // of some 60000
  }
}

/// A tensor "w", and one gradient.
modes::Model one_step_of(Index rows, Index cols) {
  modes::Model model;
  model.tensors = {{"w", {rows, cols}}};
  model.weights = {modes::floats(zoo::gaussian(rows, cols, 1))};
  model.gradients = {{modes::floats(zoo::gaussian(rows, cols, 2))}};
  return model;
}

// The mean over seeds is the f32 momentum: of every element within 5 sigma (of 2000 elements one in
// 1e3 such tests is beyond), of all together within 4.
TEST(Momentum, IsRoundedWithoutBias) {
  constexpr int seeds = 400;
  constexpr Index rows = 4, cols = 100;
  const modes::Model model = one_step_of(rows, cols);
  for (const char* format : kFormats) {
    Config config =
        with_state(parse_config("schema: 1\ngroups: [{match: '*', rule: {name: sgd, lr: 0.1, "
                                "momentum_form: ema}}]\n"),
                   format);
    const auto weight = static_cast<float>(1 - 0.9);
    std::vector<double> exact;
    for (const float g : model.gradients[0][0]) {
      exact.push_back(static_cast<double>(weight * g));
    }
    std::vector<double> sum(exact.size(), 0);
    std::vector<double> squares(exact.size(), 0);
    for (int seed = 0; seed < seeds; ++seed) {
      config.seed = static_cast<std::uint64_t>(seed + 1);
      const Outcome found = train(config, model, {.last = 1});
      for (std::size_t e = 0; e < exact.size(); ++e) {
        sum[e] += found.momentum("w")[e] - exact[e];
      }
    }
    double all = 0;
    double variance_of_all = 0;
    for (std::size_t e = 0; e < exact.size(); ++e) {
      const auto col = static_cast<Index>(e) % cols;
      const double* row = exact.data() + (static_cast<Index>(e) - col);
      const double unit = spacing(config.groups[0].state, row, cols, col);
      // Up with probability d, down with 1 − d: the variance of one rounding.
      const double place = std::abs(exact[e]) / unit;
      const double d = place - std::floor(place);
      const double variance = d * (1 - d) * unit * unit * seeds;
      EXPECT_LE(std::abs(sum[e]), 5 * std::sqrt(variance) + seeds * 1e-6 * unit) << format << e;
      all += sum[e];
      variance_of_all += variance;
    }
    EXPECT_LE(std::abs(all), 4 * std::sqrt(variance_of_all)) << format;
    EXPECT_GT(variance_of_all, 0);
  }
}

// ---- 2: bits -----------------------------------------------------------------------------------

TEST_P(OnRanks, TheBitsAreThoseOfOneRank) {
  const modes::Model model = model_of();
  for (const char* format : kFormats) {
    for (const char* rule : kRules) {
      const Config base = recipe(rule, format);
      const Outcome one = train(modes::in_mode(base, modes::owner), model, {});
      for (const ModeCase& mode : {modes::owner, modes::exchange, modes::gather}) {
        for (const int stage : {1, 2, 3}) {
          Config config = modes::in_mode(base, mode);
          config.zero_stage = stage;
          if (stage == 1) config.comm.bucket_bytes = 4096;
          if (stage == 2) config.checks = "collective";  // what is free is NaN
          const std::string what =
              std::string(format) + rule + mode.name + " ZeRO-" + std::to_string(stage);
          expect_same(train(config, model, {.ranks = GetParam()}), one, what);
          if (stage == 1 || GetParam() % 2 != 0) continue;
          config.mesh.replicate = 2;
          expect_same(train(config, model, {.ranks = GetParam()}), one, what + " two replicas");
        }
      }
    }
  }
}

// M knows G alone: its bits are those of one rank where the direction's are not; the weights follow
// within what the mode promises of an update.
TEST_P(OnRanks, InEveryModeTheMomentumIsThatOfOneRank) {
  const modes::Model model = model_of();
  for (const char* format : kFormats) {
    const Config base = recipe(kRules[1], format);
    const Outcome one = train(modes::in_mode(base, modes::owner), model, {});
    for (const ModeCase& mode : modes::all) {
      // What NorMuon keeps of directions may differ where they do.
      Outcome found = train(modes::in_mode(base, mode), model, {.ranks = GetParam()});
      found.state["state/n.wide/row_second_moment"] =
          one.state.at("state/n.wide/row_second_moment");
      expect_same_state(found, one, std::string(format) + modes::label(mode));
      if (!mode.full || mode.wire == std::string("bf16")) continue;
      for (std::size_t i = 0; i < 4; ++i) {
        double difference = 0;
        double moved = 0;
        for (std::size_t e = 0; e < one.weights[i].size(); ++e) {
          const double gap = found.weights[i][e] - one.weights[i][e];
          const double step = one.weights[i][e] - model.weights[i][e];
          difference += gap * gap;
          moved += step * step;
        }
        EXPECT_LE(std::sqrt(difference / moved), 1e-4)
            << format << modes::label(mode) << " " << model.tensors[i].name;
      }
    }
  }
}

TEST_P(OnRanks, HeldShardsHaveTheBitsOfOneRank) {
  const modes::Model whole = model_of();
  for (const char* rule : {kRules[0], kRules[1]}) {
    const Config base = recipe(rule, kFormats[0]);
    const Outcome one = train(modes::in_mode(base, modes::owner), whole, {});
    for (const modes::ShardCase& c : modes::kCuts) {
      modes::Model model = whole;
      cut(model, c, GetParam());
      expect_same(train(modes::in_mode(base, modes::exchange), model, {.ranks = GetParam()}), one,
                  std::string(rule) + " along " + modes::name_of(c.along));
    }
  }
  // int8: rows, and columns in blocks.
  const Config base = recipe(kRules[1], kFormats[1]);
  const Outcome one = train(modes::in_mode(base, modes::owner), whole, {});
  modes::Model model = whole;
  for (modes::Tensor& t : model.tensors) {
    t.sharding.along = t.shape.size() > 1 ? Along::rows : Along::none;
  }
  for (const std::size_t i : {0U, 4U, 6U}) {  // 200, 96 and 130 columns
    modes::Tensor& t = model.tensors[i];
    t.sharding.along = Along::columns;
    t.sharding.counts.assign(static_cast<std::size_t>(GetParam()), 0);
    t.sharding.counts.back() = t.cols();
    for (std::size_t r = 0; r + 1 < t.sharding.counts.size() && r < 2; ++r) {
      t.sharding.counts[r] = 32;
      t.sharding.counts.back() -= 32;
    }
  }
  for (const ModeCase& mode : {modes::exchange, modes::gather}) {
    expect_same(train(modes::in_mode(base, mode), model, {.ranks = GetParam()}), one, mode.name);
  }
}

// Reductions, not averaged gradients; and f32 is not touched by what others do.
TEST(Momentum, OfOneGroupLeavesTheOthersAsTheyWere) {
  const modes::Model model = model_of();
  const Config plain = recipe(kRules[1], "{momentum: f32}");
  const Outcome exact = train(modes::in_mode(plain, modes::exchange), model, {.ranks = 3});
  for (const char* format : kFormats) {
    Config config = plain;
    config.groups[0].state = with_state(plain, format).groups[0].state;
    const Outcome found = train(modes::in_mode(config, modes::exchange), model, {.ranks = 3});
    for (std::size_t i = 0; i < model.tensors.size(); ++i) {
      const bool touched = model.tensors[i].name.starts_with("m.");
      EXPECT_EQ(found.weights[i] != exact.weights[i], touched) << model.tensors[i].name;
    }
  }
}

// ---- 3: memory ---------------------------------------------------------------------------------

TEST(Momentum, TakesTheBytesThatItSays) {
  // Two tensors on one rank: sizes beside which what allocations are rounded up by is nothing.
  constexpr Index rows = 96, cols = 1000;
  const auto state = [](const char* rule, const std::string& rests) {
    const Config config =
        with_state(parse_config(std::string("schema: 1\ngroups: [{match: '*', rule: {name: ") +
                                rule + "}}]\n"),
                   rests);
    runtime::ParameterShape p;
    p.name = "w";
    p.shape = {rows, cols};
    const runtime::Plan plan = runtime::make_plan(config, {p}, 1);
    return plan.per_rank[0].memory.state;
  };
  const auto padded = [](std::int64_t n) { return (n + 255) / 256 * 256; };
  constexpr std::int64_t n = rows * cols;
  for (const char* rule : {"sgd", "lion", "muon", "adamw"}) {
    const std::int64_t second = rule == std::string("adamw") ? padded(4 * n) : 0;
    EXPECT_EQ(state(rule, "{momentum: f32}"), padded(4 * n) + second);
    EXPECT_EQ(state(rule, "{momentum: bf16}"), padded(2 * n) + second);
    // 8 blocks of 128 in a row of 1000, 32 of 32.
    EXPECT_EQ(state(rule, "{momentum: int8}"), padded(n + rows * 8 * 4) + second);
    EXPECT_EQ(state(rule, "{momentum: int8, block: 32}"), padded(n + rows * 32 * 4) + second);
  }
}

std::int64_t allocated_bytes() {
  const auto info = mallinfo2();
  return static_cast<std::int64_t>(info.uordblks + info.hblkhd);
}

TEST(Momentum, WhatIsAllocatedIsPlanned) {
  if (allocated_bytes() == 0) GTEST_SKIP() << "this build's allocator does not count";
  for (const char* format : kFormats) {
    for (const char* mode : {"owner", "exchange", "gram", "gram_steps"}) {
      const Config config = with_state(
          parse_config("schema: 1\ngroups:\n  - {match: 'w*', rule: {name: muon}, matrix: {mode: " +
                       std::string(mode) + "}}\n  - {match: '*', rule: {name: adamw}}\n"),
          format);
      constexpr int ranks = 3;
      std::atomic<std::int64_t> planned = 0;
      std::int64_t before = 0;
      std::int64_t after = 0;
      run_thread_ranks(ranks, [&](Communicator& comm) {
        const std::vector<std::vector<Index>> shapes{{512, 768}, {768, 512}, {600, 500}, {300000}};
        std::vector<std::vector<float>> data;
        std::vector<Parameter> parameters;
        for (const auto& shape : shapes) {
          Index n = 1;
          for (const Index d : shape) n *= d;
          Parameter p;
          p.name = (shape.size() > 1 ? "w" : "b") + std::to_string(data.size());
          p.shape = shape;
          data.emplace_back(static_cast<std::size_t>(n), 1.0F);
          p.weights = data.back().data();
          data.emplace_back(static_cast<std::size_t>(n), 0.5F);
          p.gradient = data.back().data();
          parameters.push_back(p);
        }
        comm.barrier();
        if (comm.rank() == 0) before = allocated_bytes();
        comm.barrier();
        ShardedOptimizer optimizer{config, comm.duplicate("job"), parameters};
        planned += optimizer.memory().total() - optimizer.memory().weights;
        comm.barrier();
        if (comm.rank() == 0) after = allocated_bytes();
        comm.barrier();
        for (int s = 0; s < 3; ++s) optimizer.step();
        comm.barrier();
        comm.barrier();
        const long news = count_new::calls;
        for (int s = 0; s < 3; ++s) optimizer.step();
        EXPECT_EQ(count_new::calls, news) << "a step allocates";
        comm.barrier();
      });
      const double difference = static_cast<double>(after - before) / static_cast<double>(planned);
      EXPECT_NEAR(difference, 1, 0.01) << format << " " << mode << ": planned " << planned;
    }
  }
}

// ---- 4: checkpoints ----------------------------------------------------------------------------

class Checkpoints : public testing::Test {
 protected:
  std::filesystem::path folder_ =
      std::filesystem::temp_directory_path() / ("orthrus-momentum-" + std::to_string(::getpid()));
  void SetUp() override { std::filesystem::remove_all(folder_); }
  void TearDown() override { std::filesystem::remove_all(folder_); }
};

TEST_F(Checkpoints, GoOnWithTheBitsOfTheUninterruptedRun) {
  const modes::Model model = model_of();
  for (const char* format : kFormats) {
    const Config base = recipe(kRules[1], format);
    const Outcome whole = train(modes::in_mode(base, modes::owner), model, {});
    for (const auto& [from, to, saver, loader, stage] :
         std::vector<std::tuple<int, int, ModeCase, ModeCase, int>>{
             {1, 3, modes::owner, modes::exchange, 2},
             {4, 2, modes::exchange, modes::owner, 2},
             {3, 1, modes::gather, modes::owner, 3},
             {2, 4, modes::owner, modes::gather, 3}}) {
      const std::string path = folder_.string();
      std::filesystem::remove_all(folder_);
      for (const std::int64_t at : {0, 2}) {  // before any step, too
        std::filesystem::remove_all(folder_);
        train(modes::in_mode(base, saver), model, {.ranks = from, .last = at, .save = path});
        runtime::verify_checkpoint(path);
        Config config = modes::in_mode(base, loader);
        config.zero_stage = stage;
        expect_same(train(config, model, {.ranks = to, .load = path}), whole,
                    std::string(format) + std::to_string(from) + " to " + std::to_string(to));
      }
    }
  }
}

// What is saved in one format and loaded into another is the nearest that it has; into f32, the
// same.
TEST_F(Checkpoints, ConvertWhenAskedTo) {
  const modes::Model model = model_of();
  const char* const all[] = {"{momentum: f32}", kFormats[0], kFormats[1],
                             "{momentum: int8, block: 64}"};
  for (const std::string from : all) {
    for (const std::string to : all) {
      if (from == to) continue;
      std::filesystem::remove_all(folder_);
      const std::string path = folder_.string();
      const Config saver = modes::in_mode(recipe(kRules[1], from), modes::exchange);
      const Config loader = modes::in_mode(recipe(kRules[1], to), modes::owner);
      const Outcome saved = train(saver, model, {.ranks = 3, .last = 2, .save = path});
      try {
        train(loader, model, {.ranks = 2, .last = 2, .load = path});
        ADD_FAILURE() << from << " to " << to << " without being asked";
      } catch (const ConfigError& e) {
        const std::string what = e.what();
        const auto name = [](const std::string& state) {
          return state.find("bf16") != std::string::npos ? "bf16"
                 : state.find("32}") != std::string::npos && state.find("int8") != std::string::npos
                     ? "int8/block32"
                 : state.find("int8") != std::string::npos ? "int8/block64"
                                                           : "f32";
        };
        EXPECT_NE(what.find("'m.wide' has a momentum of " + std::string(name(from)) +
                            " in the checkpoint, of " + name(to) + " here (load can convert it)"),
                  std::string::npos)
            << what;
      }
      const Outcome found =
          train(loader, model, {.ranks = 2, .last = 2, .load = path, .convert = true});
      EXPECT_EQ(found.weights, saved.weights);
      const StateConfig& rests = loader.groups[0].state;
      for (const modes::Tensor& t : model.tensors) {
        const std::vector<double> m(saved.momentum(t.name).begin(), saved.momentum(t.name).end());
        const Index cols = columns_of(t);
        for (std::size_t e = 0; e < m.size(); ++e) {
          const auto col = static_cast<Index>(e) % cols;
          const double* row = m.data() + (static_cast<Index>(e) - col);
          const double unit = rests.momentum == "f32" ? 0 : spacing(rests, row, cols, col);
          ASSERT_NEAR(found.momentum(t.name)[e], m[e], unit * 0.50001) << from << " to " << to;
        }
        if (t.name == "e.table") {
          const std::string key = "state/e.table/second_moment";
          EXPECT_EQ(found.state.at(key).values, saved.state.at(key).values);
        }
      }
      // And it goes on.
      EXPECT_NO_THROW(train(loader, model, {.ranks = 2, .load = path, .convert = true}));
    }
  }
}

TEST_F(Checkpoints, DamageIsRefusedByName) {
  const modes::Model model = model_of();
  const Config config = modes::in_mode(recipe(kRules[1], kFormats[1]), modes::exchange);
  const std::string path = folder_.string();
  for (const std::string key : {"momentum/m.wide/0", "momentum.scales/m.wide/0"}) {
    for (const bool digests_fit : {false, true}) {
      std::filesystem::remove_all(folder_);
      train(config, model, {.ranks = 2, .last = 1, .save = path});
      const std::filesystem::path file = folder_ / "rank-0.safetensors";
      std::int64_t at = 0;
      {
        runtime::SafetensorsReader reader(file);
        at = reader.find(key)->begin;
      }
      std::fstream bytes(file, std::ios::in | std::ios::out | std::ios::binary);
      std::uint64_t header = 0;
      bytes.read(reinterpret_cast<char*>(&header), 8);
      bytes.seekp(static_cast<std::streamoff>(8 + header) + at);
      const float nan = std::nanf("");
      bytes.write(reinterpret_cast<const char*>(&nan), 4);
      bytes.close();
      if (digests_fit) {                             // as of a writer gone wrong
        if (key.starts_with("momentum/")) continue;  // any byte but one is a code
        runtime::Manifest m = runtime::read_manifest(path);
        runtime::SafetensorsReader reader(file);
        for (runtime::CheckpointPiece& p : m.pieces) {
          const runtime::TensorInfo* info = reader.find(p.tensor);
          if (info == nullptr || p.file != 0) continue;
          std::vector<std::byte> data(static_cast<std::size_t>(info->end - info->begin));
          reader.read(*info, 0, info->end - info->begin, data.data());
          p.xxh3 = runtime::xxh3_hex(data.data(), data.size());
        }
        std::ofstream(folder_ / "manifest.json") << runtime::manifest_text(m);
      }
      EXPECT_THROW(runtime::verify_checkpoint(path), DataError);
      try {
        train(config, model, {.ranks = 3, .last = 1, .load = path});
        ADD_FAILURE() << "loaded";
      } catch (const DataError& e) {
        EXPECT_NE(std::string(e.what()).find(digests_fit ? "a scale of 'm.wide' is nan" : key),
                  std::string::npos)
            << e.what();
        EXPECT_EQ(e.exit_code(), ExitCode::data);
      }
    }
  }
  // A format that no momentum has.
  std::filesystem::remove_all(folder_);
  train(config, model, {.ranks = 1, .last = 1, .save = path});
  runtime::Manifest m = runtime::read_manifest(path);
  for (auto& p : m.parameters) p.momentum = "int8/row";
  std::ofstream(folder_ / "manifest.json") << runtime::manifest_text(m);
  EXPECT_THROW(static_cast<void>(runtime::read_manifest(path)), DataError);
}

// ---- 5: with ECO -------------------------------------------------------------------------------

const char* const kEco =
    "{format: fp8_e4m3, rounding: stochastic, residual: momentum, eco: {max_rel_correction: 0}}";

// SGD, whose P is 1: the momentum that rests is M + κE, rounded twice; E is of the weights that the
// momentum before any rounding made.
TEST(Eco, TheMomentumIsWhatItWasAndTheCorrection) {
  for (const char* format : kFormats) {
    Config config =
        with_state(modes::with_weights(
                       parse_config("schema: 1\ngroups: [{match: '*', rule: {name: sgd, lr: 0.05, "
                                    "momentum: 0.9, momentum_form: ema}}]\n"),
                       kEco),
                   format);
    const StateConfig& rests = config.groups[0].state;
    const modes::Model model = model_of(6);
    const double kappa = -(1 - 0.9) / (0.05 * 0.9);
    Outcome before = train(config, model, {.last = 0});  // on the grid
    double corrections = 0;
    train(config, model,
          {.ranks = 3, .last = 6, .watch = [&](std::int64_t step, const Outcome& now) {
             for (std::size_t i = 0; i < model.tensors.size(); ++i) {
               const modes::Tensor& t = model.tensors[i];
               const Index cols = columns_of(t);
               std::vector<double> m(now.weights[i].size());
               std::vector<double> corrected(m.size());
               for (std::size_t e = 0; e < m.size(); ++e) {
                 const double g = model.gradients[static_cast<std::size_t>(step - 1)][i][e];
                 m[e] = 0.9 * before.momentum(t.name)[e] + 0.1 * g;
                 const double wide = before.weights[i][e] - 0.05 * m[e];
                 corrected[e] = m[e] + kappa * (wide - now.weights[i][e]);
               }
               for (std::size_t e = 0; e < m.size(); ++e) {
                 const auto col = static_cast<Index>(e) % cols;
                 const Index row = static_cast<Index>(e) - col;
                 const double first = spacing(rests, m.data() + row, cols, col);
                 const double second = spacing(rests, corrected.data() + row, cols, col);
                 // The grid of the second is that of what the first has left: one step of the first
                 // larger, which is 1 % (a power of two more for bf16). W̃ is rounded to 2^-24.
                 const double slack = 4 * std::abs(kappa) * 0x1p-24;
                 ASSERT_LE(std::abs(now.momentum(t.name)[e] - corrected[e]),
                           first + 2 * second + slack)
                     << format << " " << t.name << " " << e;
                 corrections += std::abs(corrected[e] - m[e]) > 4 * (first + second) ? 1 : 0;
               }
             }
             before = now;
           }});
    EXPECT_GT(corrections, 1000) << format;  // there was something to be seen
  }
}

// Weights, momentum and its correction are rounded by bits of their own: with those of the first
// the second rounding of a step would go where the first went, and be off in the mean; with those
// of the weights, errors of W and M would go together.
TEST(Eco, RoundingsOfAStepKnowNothingOfEachOther) {
  constexpr int seeds = 400;
  constexpr Index rows = 4, cols = 100;
  const modes::Model model = one_step_of(rows, cols);
  const auto with = [&](const char* weights, const char* format) {
    return with_state(
        modes::with_weights(parse_config("schema: 1\ngroups: [{match: '*', rule: {name: sgd, lr: "
                                         "0.1, momentum_form: ema}}]\n"),
                            weights),
        format);
  };
  for (const char* format : kFormats) {
    for (const bool corrects : {true, false}) {
      // Rounded to the nearest, E and so C are the same for every seed.
      Config config = with(corrects ? "{format: int8, block: 32, residual: momentum}"
                           : format == kFormats[0]
                               ? "{format: bf16, rounding: stochastic, residual: none}"
                               : "{format: int8, block: 32, rounding: stochastic, residual: none}",
                           format);
      const Outcome start = train(config, model, {.last = 0});
      const double kappa = corrects ? -(1 - 0.9) / (0.1 * 0.9) : 0;
      std::vector<double> sum(model.weights[0].size(), 0);
      double together = 0;
      double of_weights = 0;
      double of_momentum = 0;
      std::vector<double> unit(sum.size());
      for (int seed = 0; seed < seeds; ++seed) {
        config.seed = static_cast<std::uint64_t>(seed + 1);
        const Outcome found = train(config, model, {.last = 1});
        std::vector<double> m(sum.size());
        std::vector<double> lost(sum.size());
        for (std::size_t e = 0; e < m.size(); ++e) {
          m[e] = 0.1 * model.gradients[0][0][e];
          lost[e] = start.weights[0][e] - 0.1 * m[e] - found.weights[0][e];
          m[e] += kappa * lost[e];
        }
        for (std::size_t e = 0; e < m.size(); ++e) {
          const auto col = static_cast<Index>(e) % cols;
          const double* row = m.data() + (static_cast<Index>(e) - col);
          unit[e] = spacing(config.groups[0].state, row, cols, col);
          const double gap = found.momentum("w")[e] - m[e];
          sum[e] += gap;
          // Away from 0 where u is small: both, if it were the same u.
          together += std::copysign(lost[e], lost[e] * start.weights[0][e]) *
                      std::copysign(gap, gap * m[e]);
          of_weights += lost[e] * lost[e];
          of_momentum += gap * gap;
        }
      }
      if (!corrects) {
        // Of 160000 independent pairs: 1/400, and four of that.
        EXPECT_LE(std::abs(together) / std::sqrt(of_weights * of_momentum), 0.01) << format;
        continue;
      }
      // Two roundings have at most a quarter of a step squared each, by steps that may be twice as
      // long in between; 400 elements are independent.
      double all = 0;
      for (std::size_t e = 0; e < sum.size(); ++e) {
        const double of_mean = std::sqrt(seeds * (0.25 + 0.25 * 4)) * unit[e];
        EXPECT_LE(std::abs(sum[e]), 5 * of_mean) << format << " " << e;
        all += sum[e] * (model.gradients[0][0][e] > 0 ? 1 : -1) / of_mean;
      }
      EXPECT_LE(std::abs(all), 4 * std::sqrt(static_cast<double>(sum.size()))) << format;
    }
  }
}

// A first step of matrices: X is that of f32, so are Ŵ, E and C, to the bit where the mode has
// those of one rank; and M + C is rounded.
TEST_P(OnRanks, MatricesPullBackWhatTheF32MomentumDoes) {
  modes::Model model = model_of();
  for (const char* format : kFormats) {
    for (const ModeCase& mode : {modes::owner, modes::exchange, modes::gather, modes::gram,
                                 modes::gram_steps, modes::periodic, modes::block_local}) {
      Config exact = modes::with_weights(recipe(kRules[0], "{momentum: f32}"), kEco);
      exact = modes::in_mode(exact, mode);
      // A column unit of 32 cuts pieces elsewhere: the same ones, then.
      for (GroupConfig& g : exact.groups) {
        g.weights.block = 32;
        g.weights.scale = "block";
      }
      const Config config = with_state(exact, format);
      const Outcome wanted = train(exact, model, {.ranks = GetParam(), .last = 1});
      const Outcome found = train(config, model, {.ranks = GetParam(), .last = 1});
      const std::string what = std::string(format) + modes::label(mode);
      EXPECT_EQ(found.weights, wanted.weights) << what;
      const StateConfig& rests = config.groups[0].state;
      for (std::size_t i = 0; i < 4; ++i) {
        const modes::Tensor& t = model.tensors[i];
        const Index cols = columns_of(t);
        std::vector<double> m;
        double correction = 0;
        for (std::size_t e = 0; e < wanted.weights[i].size(); ++e) {
          m.push_back(0.1 * model.gradients[0][i][e]);
          correction = std::max(correction, std::abs(wanted.momentum(t.name)[e] - m[e]));
        }
        const std::vector<double> all(wanted.momentum(t.name).begin(),
                                      wanted.momentum(t.name).end());
        // gram_steps finds P⁻¹ of an X whose momentum has been rounded.
        const double root = mode.name == std::string("gram_steps") ? 0.1 * correction : 0;
        double largest = 0;
        for (std::size_t e = 0; e < m.size(); ++e) {
          const auto col = static_cast<Index>(e) % cols;
          const Index row = static_cast<Index>(e) - col;
          const double first = spacing(rests, m.data() + row, cols, col);
          const double second = spacing(rests, all.data() + row, cols, col);
          ASSERT_LE(std::abs(found.momentum(t.name)[e] - all[e]), first + 2 * second + root + 1e-6)
              << what << " " << t.name << " " << e;
          largest = std::max(largest, first + second);
        }
        if (t.name != "m.few") {
          EXPECT_GT(correction, 2 * largest) << what << t.name;  // there was something to be seen
        }
      }
    }
  }
}

TEST_P(OnRanks, EcoHasTheBitsOfOneRank) {
  const modes::Model model = model_of();
  for (const char* format : kFormats) {
    for (const char* rule : kRules) {
      const Config base = modes::with_weights(recipe(rule, format), kEco);
      const Outcome one = train(modes::in_mode(base, modes::owner), model, {});
      for (const ModeCase& mode : {modes::owner, modes::exchange, modes::gather}) {
        for (const int stage : {2, 3}) {
          Config config = modes::in_mode(base, mode);
          config.zero_stage = stage;
          if (stage == 2) config.checks = "collective";
          expect_same(train(config, model, {.ranks = GetParam()}), one,
                      std::string(format) + rule + mode.name + std::to_string(stage));
        }
      }
    }
  }
  // bf16 and int8 momentum in rows that the trainer has cut, whose scales ranks share.
  const Config base = modes::with_weights(recipe(kRules[1], kFormats[0]), kEco);
  const Outcome one = train(modes::in_mode(base, modes::owner), model, {});
  modes::Model held = model;
  cut(held, {Along::elements, true}, GetParam());
  expect_same(train(modes::in_mode(base, modes::exchange), held, {.ranks = GetParam()}), one,
              "held");
}

// ---- bounds ------------------------------------------------------------------------------------

// Nothing that is rounded leaves the bound, and a bound that a constant gradient leads to stays.
TEST(Bounds, HoldWhatIsRoundedAndDoNotGrow) {
  const runtime::WeightFormat bf16{DType::bf16, std::nullopt};
  const runtime::WeightFormat int8 = runtime::momentum_format({"int8", 64});
  std::mt19937_64 bits(1);
  std::uniform_real_distribution<double> uniform(-30, 30);
  for (int i = 0; i < 20000; ++i) {
    const double b = std::exp2(uniform(bits));
    const double at_rest = runtime::bound_at_rest(bf16, b);
    EXPECT_GE(at_rest, b);
    EXPECT_LE(at_rest, b * (1 + 0x1p-7));
    EXPECT_EQ(runtime::bound_at_rest(bf16, at_rest), at_rest);
    const auto up = static_cast<float>(at_rest);  // a bf16 number: what is below is rounded to it
    EXPECT_EQ(up, at_rest);
    EXPECT_EQ(std::bit_cast<std::uint32_t>(up) & 0xffffU, 0U);
    // The largest of a block is code 127, times its scale.
    const double of_codes = runtime::bound_at_rest(int8, b);
    const auto largest = static_cast<float>(of_codes);
    EXPECT_LE(127.0F * (largest / 127.0F), of_codes);
    EXPECT_LE(127.0F * (static_cast<float>(b) / 127.0F), of_codes);
  }
  EXPECT_GE(runtime::bound_at_rest(int8, 1e-30), 127e-12);  // the least scale
  EXPECT_EQ(runtime::bound_at_rest(int8, 0), 0);
  EXPECT_EQ(runtime::bound_at_rest({}, 0.1), 0.1);
  for (const double beta : {0.9, 0.95, 0.999, 0.99999, 0.9999999}) {
    for (const auto& format : {bf16, int8}) {
      double b = 0;
      for (int t = 0; t < 2000000; ++t) {
        b = runtime::bound_at_rest(format, beta * b + (1 - beta) * 3.14);
      }
      EXPECT_LE(b, 3.14 * (1 + 0x1p-7)) << beta;  // and 3.14 is what it comes to
    }
  }
}

// A gradient that stays: the bound by which Gram matrices are scaled must stay, too. Kept as norms
// of what is rounded up, it would double every 90 steps at best: by 2^60 after 8000, where squares
// are lost.
TEST_P(OnRanks, AConstantGradientKeepsModeGramInRange) {
  constexpr std::int64_t steps = 8000;
  modes::Model model;
  model.tensors = {{"w", {4, 36}}};
  model.weights = {modes::floats(zoo::gaussian(4, 36, 1))};
  model.gradients = {{modes::floats(zoo::gaussian(4, 36, 2))}};
  for (const char* format : kFormats) {
    const Config base = with_state(
        parse_config("schema: 1\ngroups: [{match: '*', rule: {name: muon, lr: 1.0e-4, momentum: "
                     "0.9995}}]\n"),
        format);
    const auto [a, b] = std::pair{
        train(modes::in_mode(base, modes::owner), model, {.ranks = 1, .last = steps}),
        train(modes::in_mode(base, modes::gram), model, {.ranks = GetParam(), .last = steps})};
    expect_same_state(a, b, format);
    double difference = 0;
    double moved = 0;
    for (std::size_t e = 0; e < 144; ++e) {
      const double gap = a.weights[0][e] - b.weights[0][e];
      const double step = a.weights[0][e] - model.weights[0][e];
      difference += gap * gap;
      moved += step * step;
    }
    EXPECT_LE(std::sqrt(difference / moved), 1e-3) << format;
  }
}

// As test_eco_modes has it of f32: rounding takes every step, ECO puts it back, and nothing else
// feeds the momentum.
TEST_P(OnRanks, AMomentumThatOnlyEcoFeedsStaysInRange) {
  constexpr std::int64_t steps = 700;
  for (const char* format : kFormats) {
    for (const ModeCase& mode : {modes::gram, modes::gram_steps, modes::exchange}) {
      for (const char* guard : {"0", "0.3"}) {
        modes::Model model;
        modes::add_zoo(model, "plain", "gaussian", 8, 40);
        model.gradients.resize(1);
        model.gradients.push_back({std::vector<float>(320, 0.0F)});
        Config config = modes::in_mode(
            with_state(modes::with_weights(parse_config(modes::kZooRecipe),
                                           std::string("{format: int8, residual: momentum, eco: "
                                                       "{max_rel_correction: ") +
                                               guard + "}}"),
                       format),
            mode);
        config.groups[1].rule.values["lr"] = 1e-5;
        config.groups[1].rule.values["weight_decay"] = 0.0;
        Outcome found;
        ASSERT_NO_THROW(found = train(config, model, {.ranks = GetParam(), .last = steps}))
            << format << modes::label(mode);
        double squares = 0;
        for (const float v : found.momentum(model.tensors[0].name)) {
          squares += static_cast<double>(v) * v;
        }
        EXPECT_GT(squares, 1e-4) << format << modes::label(mode);
        EXPECT_LT(squares, 1e8) << format << modes::label(mode);
      }
    }
  }
}

// ---- 6: training -------------------------------------------------------------------------------

// A quadratic with a long memory: f = |w|²/2, β = 0.999, η = 1e-4. M follows G = w, and w goes as
// e^{-η(1 + η/(1−β))t}: to e^{-3.3} after 30000 steps. A step changes M by (1−β)(G − M), half a
// step of bf16 is 2^-9 to 2^-8 of M: to the nearest M stays for good where it has come to a third
// to a fifth of the first G, and w falls along a line, to about 1 − 30000·η/4. Stochastically each
// of n elements is off by some 2^-8 of M in a step, and the mean of 1000 steps by a thirtieth of
// that.
TEST(Training, StochasticConvergesAsF32WhereNearestStalls) {
  constexpr Index n = 64;
  constexpr int steps = 30000;
  const zoo::Matrix start = zoo::gaussian(1, n, 5);
  const auto rms = [](const std::vector<float>& w) {
    double sum = 0;
    for (const float v : w) sum += static_cast<double>(v) * v;
    return std::sqrt(sum / static_cast<double>(w.size()));
  };
  const auto run = [&](const std::string& state) {
    const Config config = with_state(
        parse_config("schema: 1\ngroups: [{match: '*', rule: {name: sgd, lr: 1.0e-4, momentum: "
                     "0.999, momentum_form: ema}}]\n"),
        state);
    std::vector<float> w = modes::floats(start);
    std::vector<float> g(w.size());
    Parameter p;
    p.name = "w";
    p.shape = {n};
    p.weights = w.data();
    p.gradient = g.data();
    ShardedOptimizer optimizer{config, self_communicator(), {p}};
    for (int t = 0; t < steps; ++t) {
      g = w;
      optimizer.step();
    }
    return rms(w);
  };
  const auto nearest = [&] {
    std::vector<float> w = modes::floats(start);
    std::vector<float> m(w.size(), 0);
    for (int t = 0; t < steps; ++t) {
      for (std::size_t i = 0; i < w.size(); ++i) {
        const float wide = 0.999F * m[i] + 0.001F * w[i];
        w[i] -= 1e-4F * wide;
        const auto bits = std::bit_cast<std::uint32_t>(wide);
        m[i] = std::bit_cast<float>((bits + 0x7fffU + (bits >> 16 & 1U)) & 0xffff0000U);
      }
    }
    return rms(w);
  };
  const double first = rms(modes::floats(start));
  const double exact = run("{momentum: f32}") / first;
  const double bf16 = run("{momentum: bf16}") / first;
  const double int8 = run("{momentum: int8, block: 32}") / first;
  const double stalled = nearest() / first;
  RecordProperty("f32", std::to_string(exact));
  RecordProperty("bf16", std::to_string(bf16));
  RecordProperty("int8", std::to_string(int8));
  RecordProperty("nearest", std::to_string(stalled));
  EXPECT_NEAR(exact, std::exp(-3.3), 0.3 * std::exp(-3.3));
  EXPECT_NEAR(bf16, exact, 0.05 * exact);
  EXPECT_NEAR(int8, exact, 0.3 * exact);  // a step of the largest of its block
  EXPECT_GE(stalled, 4 * exact);
}

// ---- 7: refusals -------------------------------------------------------------------------------

std::string refused(const std::function<void()>& f) {
  try {
    f();
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "";
}

TEST(Refused, BadLinesWithTheirKeys) {
  const auto parse = [](const std::string& state) {
    return refused([&] {
      static_cast<void>(parse_config(
          "schema: 1\ngroups:\n  - {match: \"*\", rule: {name: sgd}, state: " + state + "}\n"));
    });
  };
  const auto says = [](const std::string& what, const char* part) {
    EXPECT_NE(what.find(part), std::string::npos) << what << " lacks " << part;
  };
  says(parse("{momentum: fp16}"), "groups[0].state.momentum: 'fp16' is not a format of momentum");
  says(parse("{momentum: int8, block: 16}"),
       "groups[0].state.block: 16 is out of range: 32 to 1024");
  says(parse("{momentum: int8, block: 2048}"), "groups[0].state.block");
  says(parse("{momentum: int8, block: 33}"), "groups[0].state.block: 33 is not a power of two");
  says(parse("{momentum: int8, block: 96}"), "groups[0].state.block: 96 is not a power of two");
  says(parse("{momentum: bf16, block: 64}"),
       "groups[0].state.block: 64 contradicts state.momentum bf16, which has no scales");
  says(parse("{block: 64}"), "groups[0].state.block");
  says(parse("{second_moment: bf16}"), "groups[0].state.second_moment: unknown key");
  says(parse("bf16"), "groups[0].state");
  EXPECT_EQ(parse("{momentum: int8}"), "");
  EXPECT_EQ(parse("{momentum: int8, block: 1024}"), "");
}

TEST(Refused, ABlockThatSomethingCuts) {
  const auto says = [](const std::string& what, const char* part) {
    EXPECT_NE(what.find(part), std::string::npos) << what << " lacks " << part;
  };
  modes::Model model = model_of();
  cut(model, {Along::columns, false}, 3);
  const Config config = modes::in_mode(recipe(kRules[0], kFormats[1]), modes::exchange);
  says(refused([&] { train(config, model, {.ranks = 3, .last = 0}); }),
       "inside a block of 32 (state.block)");
  model = model_of();
  model.tensors[0].views = {{0, 6, 0, 100}, {0, 6, 100, 100}};
  const std::string what = refused([&] { train(config, model, {.ranks = 2, .last = 0}); });
  says(what, "'m.wide'");
  says(what, "begins in column 100, inside a block of 32 (state.block)");
}

TEST(Refused, TheHashKnowsTheFormat) {
  const auto hash = [](const std::string& state) {
    const Config config = recipe(kRules[0], state);
    const modes::Model model = model_of();
    const Trainer trainer(model, 0, 1);
    return modes::plan_of(config, trainer.parameters, 2).hash;
  };
  EXPECT_NE(hash("{momentum: f32}"), hash("{momentum: bf16}"));
  EXPECT_NE(hash("{momentum: int8, block: 64}"), hash("{momentum: int8, block: 32}"));
}

}  // namespace
}  // namespace orthrus
