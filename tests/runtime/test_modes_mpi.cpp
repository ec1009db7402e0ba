// Matrices that meet over MPI: bytes and messages counted from the arguments of the MPI calls are
// the plan's, and the weights those of one rank alone.
#include <gtest/gtest.h>

#include <filesystem>
#include <orthrus/mpi.hpp>
#include <string>
#include <vector>

#include "comm/process_grid.hpp"
#include "modes_run.hpp"
#include "support/pmpi_counter.hpp"

namespace orthrus {
namespace {

using modes::Along;
using modes::held_config;
using modes::kZooRecipe;
using modes::ModeCase;
using modes::Model;
using modes::Trainer;

std::vector<ModeCase> modes_here() {
  std::vector<ModeCase> list = modes::all;
  if (comm::ProcessGrid::available()) list.push_back(modes::block_cyclic);
  return list;
}

/// One step's report against the plan, and both against what MPI was told to send (one rank alone
/// has nobody to call).
void expect_as_planned(const StepReport& report, const runtime::RankPlan& plan, bool over_mpi) {
  const pmpi::Sent sent = pmpi::read();
  const Traffic planned = plan.traffic_of(report.step);
  EXPECT_FALSE(report.skipped);
  EXPECT_EQ(sent.bytes, planned.bytes) << "step " << report.step;
  EXPECT_EQ(sent.messages, over_mpi ? planned.messages : 0) << "step " << report.step;
  EXPECT_EQ(report.bytes_sent, planned.bytes) << "step " << report.step;
  EXPECT_EQ(report.messages, planned.messages) << "step " << report.step;
  EXPECT_EQ(report.matrices, plan.matrices_of(report.step)) << "step " << report.step;
}

/// Steps of the toy model, each as planned. @return the weights.
std::vector<float> train_toy(const Config& config, Communicator comm, std::int64_t first,
                             std::int64_t last, const std::string& load = "",
                             const std::string& save = "") {
  toy::Model model;
  const int rank = comm.rank();
  const bool over_mpi = comm.kind() == std::string("mpi");
  const runtime::Plan plan =
      modes::plan_of(config, model.parameters, comm.size(), comm.options().max_chunk);
  ShardedOptimizer optimizer{config, std::move(comm), model.parameters};
  if (!load.empty()) optimizer.load(load);
  for (std::int64_t s = first; s <= last; ++s) {
    pmpi::reset();
    const StepReport* report = nullptr;
    if (config.virtual_shards > 0) {
      report = &toy::reproducible_step(optimizer, model, config.virtual_shards, s);
    } else {
      for (std::int64_t k = 0; k < config.train.micro_batches; ++k) {
        optimizer.micro_batch(k);
        model.backward(s, rank + 8 * k);
        for (int id = 0; id < std::ssize(model.parameters); ++id) optimizer.gradient_ready(id);
      }
      report = &optimizer.step();
    }
    expect_as_planned(*report, plan.per_rank[static_cast<std::size_t>(rank)], over_mpi);
  }
  if (!save.empty()) optimizer.save(save);
  EXPECT_EQ(pmpi::aliased(), 0) << "MPI forbids overlapping buffers";
  return model.all_weights();
}

/// Steps of a model whose gradients are averaged, or in shards. @return this rank's weights.
Trainer train(const Config& config, Communicator comm, const Model& model) {
  const int rank = comm.rank();
  const int size = comm.size();
  const bool over_mpi = comm.kind() == std::string("mpi");
  const int shards = config.mesh.replicate > 0 ? size / static_cast<int>(config.mesh.replicate) : 1;
  Trainer trainer(model, rank % shards, shards);
  const runtime::Plan plan =
      modes::plan_of(config, trainer.parameters, size, comm.options().max_chunk);
  ShardedOptimizer optimizer{config, std::move(comm), trainer.parameters};
  for (std::int64_t s = 1; s <= std::ssize(model.gradients); ++s) {
    trainer.backward(s);
    pmpi::reset();
    const StepReport& report = optimizer.step();
    expect_as_planned(report, plan.per_rank[static_cast<std::size_t>(rank)], over_mpi);
  }
  return trainer;
}

class ModesOverMpi : public testing::TestWithParam<ModeCase> {
 protected:
  /// Meshes of the ranks there are.
  static std::vector<MeshConfig> meshes() {
    const int ranks = borrow(MPI_COMM_WORLD).size();
    std::vector<MeshConfig> list{{0, 1, 0}};
    if (ranks == 4) list.push_back({4, 1, 2});
    if (ranks % 2 == 0) list.push_back({ranks / 2, 2, 0});
    return list;
  }
};
INSTANTIATE_TEST_SUITE_P(Modes, ModesOverMpi, testing::ValuesIn(modes_here()),
                         [](const auto& info) { return modes::label(info.param); });

TEST_P(ModesOverMpi, SendWhatThePlanSays) {
  for (const MeshConfig& mesh : meshes()) {
    for (const char* extra :
         {"", "zero: {stage: 1}\ntrain: {micro_batches: 2}\n",
          "comm: {bucket_bytes: 1, gradient_dtype: bf16}\ntrain: {micro_batches: 2}\n",
          "comm: {bucket_bytes: 2KiB, blocking: true}\n"}) {
      SCOPED_TRACE(std::to_string(mesh.replicate) + " replicas, node " + std::to_string(mesh.node) +
                   " " + extra);
      Config config = modes::toy_config(GetParam(), extra);
      config.mesh = mesh;
      train_toy(config, borrow(MPI_COMM_WORLD), 1, 2);
    }
  }
}

TEST_P(ModesOverMpi, SendWhatThePlanSaysInSmallMessages) {
  for (const MeshConfig& mesh : meshes()) {
    for (const Index max_chunk : {41, 300}) {
      SCOPED_TRACE(std::to_string(mesh.replicate) + " replicas, node " + std::to_string(mesh.node) +
                   ", chunks of " + std::to_string(max_chunk));
      Config config = modes::toy_config(GetParam());
      config.mesh = mesh;
      Communicator comm = borrow(MPI_COMM_WORLD);
      comm.set_max_chunk(max_chunk);
      train_toy(config, std::move(comm), 1, 2);
    }
  }
}

TEST_P(ModesOverMpi, SendWhatThePlanSaysOfShardsTheTrainerHolds) {
  const std::string name = GetParam().name;
  const int ranks = borrow(MPI_COMM_WORLD).size();
  if (name == "owner" && ranks > 1) GTEST_SKIP() << "owner needs whole matrices";
  for (const MeshConfig& mesh : meshes()) {
    for (const modes::ShardCase& c : modes::kCuts) {
      const bool gram = name == "gram" || name == "gram_steps";
      if (gram && c.along == Along::elements) continue;
      SCOPED_TRACE(modes::name_of(c.along) + std::string(c.ragged ? ", ragged" : ""));
      const int shards = ranks / static_cast<int>(mesh.replicate);
      if (name == "owner" && shards > 1) continue;
      Model model = modes::held_model();
      modes::cut(model, c, shards);
      Config config = held_config(GetParam(), c.along);
      config.mesh = mesh;
      train(config, borrow(MPI_COMM_WORLD), model);
    }
  }
}

// Scales that ranks share, what rounding took, and the norms of the guard are counted, too.
TEST_P(ModesOverMpi, SendWhatThePlanSaysOfQuantizedWeights) {
  for (const MeshConfig& mesh : meshes()) {
    for (const char* weights :
         {"{format: fp8_e4m3, rounding: stochastic, residual: momentum}",
          "{format: int4, residual: none}",
          "{format: bf16, residual: momentum, eco: {max_rel_correction: 0}}"}) {
      for (const Index max_chunk : {0x7fffffff, 300}) {
        SCOPED_TRACE(std::to_string(mesh.replicate) + " replicas, node " +
                     std::to_string(mesh.node) + " " + weights);
        Config config = modes::with_weights(modes::toy_config(GetParam()), weights);
        config.mesh = mesh;
        Communicator comm = borrow(MPI_COMM_WORLD);
        comm.set_max_chunk(max_chunk);
        train_toy(config, std::move(comm), 1, 2);
      }
    }
  }
}

TEST_P(ModesOverMpi, SendWhatThePlanSaysOfQuantizedShardsTheTrainerHolds) {
  const std::string name = GetParam().name;
  const int ranks = borrow(MPI_COMM_WORLD).size();
  if (name == "owner" && ranks > 1) GTEST_SKIP() << "owner needs whole matrices";
  const std::string weights =
      "{format: int8, rounding: stochastic, residual: momentum, eco: {max_rel_correction: 0}}";
  for (const modes::ShardCase& c : modes::kCuts) {
    SCOPED_TRACE(modes::name_of(c.along) + std::string(c.ragged ? ", ragged" : ""));
    Model model = modes::model_for(weights);
    // What sums roots over pieces has that of the side no piece cuts: it must be the short one.
    if (name == "gram" || name == "gram_steps" || name == "block_cyclic") {
      if (c.along == Along::elements) continue;
      Model few;
      const bool wide = c.along == Along::columns;
      modes::add_zoo(few, "muon", "gaussian", wide ? 6 : 21, wide ? 20 : 8);
      model = few;
    }
    modes::cut(model, c, ranks);
    const Config recipe = modes::with_weights(parse_config(modes::kHeldRecipe), weights);
    train(modes::in_mode(recipe, GetParam()), borrow(MPI_COMM_WORLD), model);
  }
}

// C of a column is P⁻¹ times what rounding took from that column: where its codes are those of one
// rank, so is the momentum, but for the mode's own error.
void expect_corrections_of_one_rank(const Config& rule, const ModeCase& wanted) {
  Model model;
  for (const auto& [m, n] : {std::pair<Index, Index>{12, 60}, {16, 90}}) {
    modes::add_zoo(model, "nesterov", "gaussian", m, n);
  }
  model.gradients.resize(1);
  const Config recipe =
      modes::with_weights(rule, "{format: int4, residual: momentum, eco: {max_rel_correction: 0}}");
  const auto run = [&](const ModeCase& mode, Communicator comm, std::vector<float>& weights,
                       std::vector<float>& momentum) {
    Trainer trainer(model, 0, 1);
    ShardedOptimizer optimizer{modes::in_mode(recipe, mode), std::move(comm), trainer.parameters};
    trainer.backward(1);
    optimizer.step();
    auto all = model.weights;
    trainer.take(all);
    const auto state = optimizer.gather_state();
    for (std::size_t i = 0; i < all.size(); ++i) {
      weights.insert(weights.end(), all[i].begin(), all[i].end());
      if (state.empty()) continue;  // on rank 0 alone
      const auto& m = state.at("state/" + model.tensors[i].name + "/momentum").values;
      momentum.insert(momentum.end(), m.begin(), m.end());
    }
  };
  std::vector<float> expected, expected_momentum, found, momentum;
  run(modes::owner, self_communicator(), expected, expected_momentum);
  run(wanted, borrow(MPI_COMM_WORLD), found, momentum);
  if (momentum.empty()) return;
  std::size_t first = 0;
  for (const modes::Tensor& t : model.tensors) {
    int equal = 0;
    double off = 0;
    double norm = 0;
    for (Index j = 0; j < t.cols(); ++j) {
      bool same = true;
      const auto at = [&](Index i) { return first + static_cast<std::size_t>(i * t.cols() + j); };
      for (Index i = 0; i < t.rows(); ++i) {
        same = same && std::abs(found[at(i)] - expected[at(i)]) < 1e-4;
      }
      if (!same) continue;
      ++equal;
      for (Index i = 0; i < t.rows(); ++i) {
        off += std::pow(momentum[at(i)] - expected_momentum[at(i)], 2);
        norm += std::pow(expected_momentum[at(i)], 2);
      }
    }
    EXPECT_GE(equal, t.cols() / 2) << t.name;
    const double bound = wanted.wire == std::string("bf16") ? 3e-2 : 5e-3;
    EXPECT_LE(std::sqrt(off), wanted.bitwise ? 0 : bound * std::sqrt(norm)) << t.name;
    first += static_cast<std::size_t>(t.size());
  }
}
TEST_P(ModesOverMpi, GiveTheCorrectionsOfOneRankAlone) {
  if (!GetParam().full) GTEST_SKIP() << "another update rule";
  expect_corrections_of_one_rank(parse_config(kZooRecipe), GetParam());
}

TEST_P(ModesOverMpi, GiveTheWeightsOfOneRankAlone) {
  if (!GetParam().full) GTEST_SKIP() << "another update rule";
  Model model;
  for (const char* spectrum : {"gaussian", "flat", "condition_1e4", "tiny", "zero"}) {
    for (const auto& [m, n] : modes::kShapes) modes::add_zoo(model, "plain", spectrum, m, n);
  }
  const Trainer alone =
      train(modes::in_mode(parse_config(kZooRecipe), modes::owner), self_communicator(), model);
  std::vector<std::vector<float>> expected = model.weights;
  alone.take(expected);
  for (const MeshConfig& mesh : meshes()) {
    for (const std::int64_t bucket_bytes : {1, 1 << 20}) {
      Config config = modes::in_mode(parse_config(kZooRecipe), GetParam());
      config.mesh = mesh;
      config.comm.bucket_bytes = bucket_bytes;
      const Trainer here = train(config, borrow(MPI_COMM_WORLD), model);
      if (GetParam().bitwise) {
        EXPECT_EQ(here.different(expected), 0);
        continue;
      }
      std::vector<std::vector<float>> found = model.weights;
      here.take(found);
      for (std::size_t i = 0; i < found.size(); ++i) {
        // The bounds against f64 and their reasons are in test_modes.cpp; one rank is within 1e-5
        // of it. A square Gaussian matrix is ill-conditioned when chance has it (here 2e5).
        const modes::Tensor& t = model.tensors[i];
        const bool ill = t.name.find("condition") != std::string::npos || t.rows() == t.cols();
        const double bound = GetParam().wire == std::string("bf16")          ? (ill ? 0.3 : 3e-2)
                             : GetParam().name == std::string("gram") && ill ? 5e-3
                                                                             : 1e-4;
        EXPECT_LE(modes::change_error(model, i, found[i], expected[i]), bound) << t.name;
      }
    }
  }
}

// PRISM's Z on the grid, and where every iteration's Gram matrix is summed: X and Y of a piece lie
// beside or above each other there.
class PrismOverMpi : public testing::TestWithParam<ModeCase> {};
INSTANTIATE_TEST_SUITE_P(Modes, PrismOverMpi, testing::ValuesIn([] {
                           std::vector<ModeCase> list{modes::exchange, modes::gram_steps};
                           if (comm::ProcessGrid::available()) list.push_back(modes::block_cyclic);
                           return list;
                         }()),
                         [](const auto& info) { return modes::label(info.param); });

Config prism(const ModeCase& mode, const std::string& side, const std::string& extra = "") {
  return modes::in_mode(
      parse_config("schema: 1\ngroups: [{match: '*', rule: {name: prism, lr: 0.125, "
                   "weight_decay: 0.5, momentum: 0.9, gamma: 0.75, side: " +
                   side + "}}]\n" + extra),
      mode);
}

TEST_P(PrismOverMpi, GivesTheWeightsOfOneRankAlone) {
  const int ranks = borrow(MPI_COMM_WORLD).size();
  Model model;
  for (const char* spectrum : {"gaussian", "flat", "condition_1e4", "rank_deficient", "zero"}) {
    for (const auto& [m, n] : {std::pair<Index, Index>{12, 40}, {40, 12}, {9, 9}, {300, 150}}) {
      if (m == 300 && spectrum != std::string("gaussian")) continue;  // more than one block
      modes::add_zoo(model, "w", spectrum, m, n);
    }
  }
  for (const char* side : {"short", "long", "left"}) {
    const Trainer alone = train(prism(modes::owner, side), self_communicator(), model);
    std::vector<std::vector<float>> expected = model.weights;
    alone.take(expected);
    for (const int replicas : {1, 2}) {
      if (ranks % replicas != 0) continue;
      for (const Index max_chunk : {0x7fffffff, 300}) {
        if (max_chunk == 300 && side != std::string("short")) continue;  // it only cuts messages
        Config config = prism(GetParam(), side);
        config.mesh.replicate = replicas;
        Communicator comm = borrow(MPI_COMM_WORLD);
        comm.set_max_chunk(max_chunk);
        const Trainer here = train(config, std::move(comm), model);
        std::vector<std::vector<float>> found = model.weights;
        here.take(found);
        for (std::size_t i = 0; i < found.size(); ++i) {
          EXPECT_LE(modes::change_error(model, i, found[i], expected[i]),
                    GetParam().bitwise ? 0 : 1e-4)
              << model.tensors[i].name << ", " << side;
        }
      }
    }
  }
}

TEST_P(PrismOverMpi, GivesTheCorrectionsOfOneRankAlone) {
  expect_corrections_of_one_rank(prism(modes::owner, "short"), GetParam());
}

TEST_P(PrismOverMpi, TakesShardsTheTrainerHolds) {
  const int ranks = borrow(MPI_COMM_WORLD).size();
  for (const modes::ShardCase& c : modes::kCuts) {
    if (c.along == Along::elements && !GetParam().bitwise) continue;
    Model model;
    modes::add_zoo(model, "w", "gaussian", 21, 8);
    modes::add_zoo(model, "w", "flat", 6, 20);
    const Trainer alone = train(prism(modes::owner, "short"), self_communicator(), model);
    std::vector<std::vector<float>> expected = model.weights;
    alone.take(expected);
    modes::cut(model, c, ranks);
    const Trainer here = train(prism(GetParam(), "short"), borrow(MPI_COMM_WORLD), model);
    auto found = expected;
    here.take(found);  // its own
    for (std::size_t i = 0; i < found.size(); ++i) {
      EXPECT_LE(modes::change_error(model, i, found[i], expected[i]), GetParam().bitwise ? 0 : 1e-4)
          << modes::name_of(c.along);
    }
  }
}

// One-sided Shampoo's factor, dealt to the ranks of the grid.
class FactorOnGrid : public testing::Test {
 protected:
  void SetUp() override {
    if (!comm::ProcessGrid::available()) GTEST_SKIP() << "no ScaLAPACK";
  }
  static Config recipe(const ModeCase& mode, const std::string& extra = "") {
    return modes::in_mode(
        parse_config("schema: 1\ngroups: [{match: '*', rule: {name: one_sided_shampoo, lr: 0.125, "
                     "weight_decay: 0.5, momentum: 0.9, root: coupled}}]\n" +
                     extra),
        mode);
  }
  static Model zoo() {
    Model model;
    for (const auto& [m, n] : {std::pair<Index, Index>{12, 40}, {40, 12}, {3, 2}, {300, 150}}) {
      modes::add_zoo(model, "w", "gaussian", m, n);
    }
    modes::add_zoo(model, "w", "flat", 9, 20);
    modes::add_zoo(model, "w", "zero", 9, 20);
    return model;
  }
  /// 1e-4, as runtime.md 9 has it of block_cyclic.
  static void expect_near(const Model& model, const Trainer& here, const Trainer& alone) {
    std::vector<std::vector<float>> expected = model.weights;
    alone.take(expected);
    auto found = expected;
    here.take(found);
    for (std::size_t i = 0; i < found.size(); ++i) {
      EXPECT_LE(modes::change_error(model, i, found[i], expected[i]), 1e-4)
          << model.tensors[i].name;
    }
  }
};

TEST_F(FactorOnGrid, GivesTheWeightsOfOneRankAlone) {
  const int ranks = borrow(MPI_COMM_WORLD).size();
  const Model model = zoo();
  const Trainer alone = train(recipe(modes::owner), self_communicator(), model);
  for (const int replicas : {1, 2}) {
    if (ranks % replicas != 0) continue;
    for (const Index max_chunk : {0x7fffffff, 300}) {
      Config config = recipe(modes::block_cyclic);
      config.mesh.replicate = replicas;
      Communicator comm = borrow(MPI_COMM_WORLD);
      comm.set_max_chunk(max_chunk);
      expect_near(model, train(config, std::move(comm), model), alone);
    }
  }
}

TEST_F(FactorOnGrid, TakesShardsTheTrainerHolds) {
  Model model;
  modes::add_zoo(model, "w", "gaussian", 21, 8);
  modes::add_zoo(model, "w", "flat", 6, 20);
  const Trainer alone = train(recipe(modes::owner), self_communicator(), model);
  for (const modes::ShardCase& c : modes::kCuts) {
    if (c.along == Along::elements) continue;
    Model held = model;
    modes::cut(held, c, borrow(MPI_COMM_WORLD).size());
    expect_near(model, train(recipe(modes::block_cyclic), borrow(MPI_COMM_WORLD), held), alone);
  }
}

// Runs of a triangle are saved by whoever has them; in a checkpoint it is whole.
TEST_F(FactorOnGrid, IsSavedWholeAndDealtAnew) {
  const Model model = zoo();
  const int rank = borrow(MPI_COMM_WORLD).rank();
  const int ranks = borrow(MPI_COMM_WORLD).size();
  const std::string path = testing::TempDir() + "factor-on-grid-" + std::to_string(ranks);
  const auto steps = [&](const Config& config, Communicator comm, std::int64_t first,
                         std::int64_t last, bool loads, bool saves) {
    Trainer trainer(model, 0, 1);
    ShardedOptimizer optimizer{config, std::move(comm), trainer.parameters};
    if (loads) optimizer.load(path);
    for (std::int64_t s = first; s <= last; ++s) {
      trainer.backward(s);
      optimizer.step();
    }
    if (saves) optimizer.save(path);
    return trainer;
  };
  const auto last = std::ssize(model.gradients);
  const Config grid = recipe(modes::block_cyclic);
  if (rank == 0) std::filesystem::remove_all(path);
  borrow(MPI_COMM_WORLD).barrier();
  const Trainer through = steps(grid, borrow(MPI_COMM_WORLD), 1, last, false, false);
  steps(grid, borrow(MPI_COMM_WORLD), 1, 2, false, true);
  std::vector<std::vector<float>> expected = model.weights;
  through.take(expected);
  EXPECT_EQ(steps(grid, borrow(MPI_COMM_WORLD), 3, last, true, false).different(expected), 0);
  // On one rank, which has it whole.
  expect_near(model, steps(recipe(modes::owner), self_communicator(), 3, last, true, false),
              through);
  borrow(MPI_COMM_WORLD).barrier();
  if (rank == 0) std::filesystem::remove_all(path);
}

TEST_F(FactorOnGrid, IsRefusedWhereItWouldHaveToBeWhole) {
  Model model;
  modes::add_zoo(model, "w", "gaussian", 12, 40);
  const Trainer trainer(model, 0, 1);
  const auto refused = [&](const std::string& keys, const std::string& group = "") {
    return modes::thrown<ConfigError>([&] {
      const Config config = modes::in_mode(
          parse_config("schema: 1\ngroups: [{match: '*', rule: {name: one_sided_shampoo" + keys +
                       "}" + group + "}]\n"),
          modes::block_cyclic);
      static_cast<void>(modes::plan_of(config, trainer.parameters, 2));
    });
  };
  modes::expect_says(refused(", frequency: 2"), {"rule.frequency 1"});
  modes::expect_says(refused(", root: eigh"), {"rule.root eigh", "coupled"});
  modes::expect_says(refused("", ", weights: {format: int8, residual: momentum}"),
                     {"weights.residual momentum", "gram"});
}

// A gradient whose square is beyond f32: the root before serves, so often as the rule says; then
// all ranks stop, told which matrix.
TEST_F(FactorOnGrid, SaysWhatWasNotRenewedOnAllRanks) {
  Model model;
  for (const char* spectrum : {"gaussian", "flat"}) modes::add_zoo(model, "w", spectrum, 12, 40);
  for (const int step : {1, 2}) {
    for (float& g : model.gradients[static_cast<std::size_t>(step)][1]) g *= 1e25F;
  }
  Config config = recipe(modes::block_cyclic);
  config.groups.front().rule.values["tolerated_failures"] = 1.0;
  Trainer trainer(model, 0, 1);
  ShardedOptimizer optimizer{config, borrow(MPI_COMM_WORLD), trainer.parameters};
  trainer.backward(1);
  EXPECT_EQ(optimizer.step().notice, "");
  trainer.backward(2);
  modes::expect_says(optimizer.step().notice, {"w.flat", "factor", "not be finite", "1 of 1"});
  trainer.backward(3);
  modes::expect_says(modes::thrown<NumericError>([&] { optimizer.step(); }, ExitCode::numeric),
                     {"w.flat", "tolerated_failures"});
}

// Terms of one rational matrix on several ranks: what MPI was told to send, and the bits of every
// rank computing all of them.
TEST(SharedTermsOverMpi, SendWhatThePlanSaysAndChangeNoBit) {
  const int ranks = borrow(MPI_COMM_WORLD).size();
  const modes::LinkProfile free(true, "mpi" + std::to_string(ranks));
  const modes::LinkProfile dear(false, "mpi" + std::to_string(ranks));
  for (const auto& [m, n] : std::vector<std::pair<Index, Index>>{{12, 40}, {150, 31}, {1, 17}}) {
    const Model model = modes::lone_model("gaussian", m, n);
    for (const int terms : {2, 3, 4}) {
      for (const Index max_chunk : {0x7fffffff, 300}) {
        for (const int replicas : {1, 2}) {
          if (ranks % replicas != 0) continue;
          std::vector<std::vector<std::vector<float>>> found;
          for (const modes::LinkProfile* links : {&free, &dear}) {
            Config config = modes::lone_config(*links, terms);
            config.mesh.replicate = replicas;
            Communicator comm = borrow(MPI_COMM_WORLD);
            comm.set_max_chunk(max_chunk);
            const Trainer trained = train(config, std::move(comm), model);
            const runtime::Plan plan = modes::plan_of(config, trained.parameters, ranks, max_chunk);
            EXPECT_EQ(plan.matrices.front().shared_terms,
                      links == &free && ranks > replicas ? terms : 0);
            found.push_back(model.weights);
            trained.take(found.back());
          }
          EXPECT_EQ(found[0], found[1]) << m << "x" << n << ", " << terms << " terms";
          EXPECT_NE(found[0], model.weights);
        }
      }
    }
  }
  EXPECT_EQ(pmpi::aliased(), 0) << "MPI forbids overlapping buffers";
  borrow(MPI_COMM_WORLD).barrier();  // all have read the profiles
}

TEST_P(ModesOverMpi, GiveTheSameBitsAgainAndAfterARestart) {
  Communicator comm = borrow(MPI_COMM_WORLD);
  std::string folder = (std::filesystem::temp_directory_path() / "orthrus-modes-mpi-").string();
  folder += std::to_string(comm.size()) + "-" + modes::label(GetParam());
  for (const MeshConfig& mesh : meshes()) {
    Config config = modes::toy_config(GetParam());
    config.mesh = mesh;
    const auto fresh = [&] {
      comm.barrier();
      if (comm.rank() == 0) std::filesystem::remove_all(folder);
      comm.barrier();
    };
    const auto uninterrupted = train_toy(config, borrow(MPI_COMM_WORLD), 1, 4);
    EXPECT_EQ(train_toy(config, borrow(MPI_COMM_WORLD), 1, 4), uninterrupted);
    fresh();
    train_toy(config, borrow(MPI_COMM_WORLD), 1, 2, "", folder);
    EXPECT_EQ(train_toy(config, borrow(MPI_COMM_WORLD), 3, 4, folder), uninterrupted);
    fresh();
  }
}

// D3, and every rank of every mesh against one rank alone.
TEST_P(ModesOverMpi, GiveTheBitsOfOneRankWhereTheyPromiseTo) {
  if (!GetParam().bitwise) GTEST_SKIP() << "not promised";
  const std::string leaves = "reproducible: {virtual_shards: 8}\n";
  const auto alone = train_toy(modes::toy_config(modes::owner, leaves), self_communicator(), 1, 3);
  for (const MeshConfig& mesh : meshes()) {
    Config config = modes::toy_config(GetParam(), leaves);
    config.mesh = mesh;
    EXPECT_EQ(train_toy(config, borrow(MPI_COMM_WORLD), 1, 3), alone);
  }
}

// Which matrices share a message decides how MPI sums it, but not what comes out.
TEST_P(ModesOverMpi, AMatrixKnowsNothingOfWhoSharesItsBucket) {
  Model alone;
  modes::add_zoo(alone, "plain", "gaussian", 150, 170);
  Model company;
  modes::add_zoo(company, "plain", "condition_1e4", 40, 12);
  company.tensors.push_back(alone.tensors[0]);
  company.weights.push_back(alone.weights[0]);
  for (std::size_t s = 0; s < alone.gradients.size(); ++s) {
    company.gradients[s].push_back(alone.gradients[s][0]);
  }
  modes::add_zoo(company, "plain", "huge", 31, 20);
  const Config config = modes::in_mode(parse_config(kZooRecipe), GetParam());
  std::vector<std::vector<float>> one = alone.weights;
  train(config, borrow(MPI_COMM_WORLD), alone).take(one);
  std::vector<std::vector<float>> three = company.weights;
  train(config, borrow(MPI_COMM_WORLD), company).take(three);
  EXPECT_EQ(three[1], one[0]);
}

}  // namespace
}  // namespace orthrus
