// ZeRO-3: weights rest in shards, are whole while they are gathered, and are what other stages
// make of them.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <orthrus/error.hpp>
#include <orthrus/orthrus.hpp>
#include <thread>

#include "runtime/plan.hpp"
#include "runtime/working_set.hpp"
#include "support/count_new.hpp"
#include "toy_model.hpp"

namespace orthrus {
namespace {

using toy::Model;
namespace fs = std::filesystem;

constexpr Index kLeaves = 8;

Config config_of(const std::string& extra) {
  return parse_config(toy::muon_and_adamw + std::string("reproducible: {virtual_shards: 8}\n") +
                      extra);
}

std::vector<int> all_ids(const Model& model) {
  std::vector<int> ids(model.parameters.size());
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

/// The weights as the trainer would read them, copied into the model.
void read_back(ShardedOptimizer& optimizer, Model& model) {
  const std::vector<int> ids = all_ids(model);
  optimizer.gather(ids);
  for (const int id : ids) {
    const auto i = static_cast<std::size_t>(id);
    const auto* from = static_cast<const float*>(optimizer.weights(id));
    if (from != model.weights[i].data()) {
      std::copy_n(from, model.weights[i].size(), model.weights[i].begin());
    }
  }
  optimizer.release(ids);
}

/// Weights after each of `steps` steps.
std::vector<std::vector<float>> curve(const Config& config, int ranks, std::int64_t steps) {
  std::vector<std::vector<float>> result;
  run_thread_ranks(ranks, [&](Communicator& comm) {
    Model model;
    const int rank = comm.rank();
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    for (std::int64_t s = 1; s <= steps; ++s) {
      toy::reproducible_step(optimizer, model, kLeaves, s);
      read_back(optimizer, model);
      if (rank == 0) result.push_back(model.all_weights());
    }
  });
  return result;
}

TEST(WorkingSet, StagesAndMeshesGiveTheSameCurveBitwise) {
  const auto one = curve(config_of("zero: {stage: 2}\n"), 1, 3);
  for (const char* mode : {"owner", "exchange", "gather"}) {
    for (const char* zero : {"zero: {stage: 1}\n", "zero: {stage: 2}\n", "zero: {stage: 3}\n"}) {
      for (const char* mesh : {"", "mesh: {shard: 2, replicate: 2}\n",
                               "mesh: {shard: 4, node: 2}\n", "mesh: {shard: 1, replicate: 4}\n"}) {
        Config config = config_of(std::string(zero) + mesh);
        config.groups[0].matrix.mode = mode;
        EXPECT_EQ(curve(config, 4, 3), one) << mode << " " << zero << mesh;
      }
    }
  }
  for (const int ranks : {2, 3, 5, 7}) {
    EXPECT_EQ(curve(config_of("zero: {stage: 3}\n"), ranks, 3), one) << ranks;
  }
}

TEST(WorkingSet, RoundedWeightsAreTheSameInEveryStage) {
  for (const char* residual : {"none", "master"}) {
    std::vector<std::vector<float>> expected;
    for (const int stage : {2, 3}) {
      Config config = config_of("zero: {stage: " + std::to_string(stage) + "}\n");
      for (GroupConfig& g : config.groups) g.weights = {"bf16", "nearest", residual};
      const auto got = curve(config, 3, 3);
      if (stage == 2) {
        expected = got;
      } else {
        EXPECT_EQ(got, expected) << residual;
      }
    }
  }
}

TEST(WorkingSet, SendsWhatThePlanSaysHoweverItIsGathered) {
  for (const char* extra : {"", "comm: {bucket_bytes: 2KiB}\n", "mesh: {shard: 2, replicate: 2}\n",
                            "mesh: {shard: 4, node: 2}\n"}) {
    for (const Index max_chunk : {Index{0x7fffffff}, Index{1000}}) {
      const Config config =
          parse_config(toy::muon_and_adamw + std::string("zero: {stage: 3, gathers: 2}\n") + extra);
      run_thread_ranks(4, [&](Communicator& comm) {
        Model model;
        std::vector<runtime::ParameterShape> shapes;
        for (const Parameter& p : model.parameters) shapes.push_back(runtime::shape_of(p));
        const runtime::Plan plan = runtime::make_plan(config, shapes, 4, {}, max_chunk);
        Communicator job = comm.duplicate("job");
        job.set_max_chunk(max_chunk);
        ShardedOptimizer optimizer{config, std::move(job), model.parameters};
        const std::vector<int> ids = all_ids(model);
        for (std::int64_t s = 1; s <= 3; ++s) {
          for (int k = 0; k < 2; ++k) {  // forward, and again for backward
            optimizer.gather(ids);
            optimizer.release(ids);
          }
          model.backward(s, comm.rank());
          const StepReport& report = optimizer.step();
          const auto& mine = plan.per_rank[static_cast<std::size_t>(comm.rank())];
          EXPECT_EQ(report.bytes_sent, mine.traffic.bytes) << extra << max_chunk;
          EXPECT_EQ(report.messages, mine.traffic.messages) << extra << max_chunk;
        }
        // One by one: the bytes are the same, the messages more, and the step's audit agrees.
        for (std::int64_t s = 4; s <= 6; ++s) {
          for (int k = 0; k < 2; ++k) {
            for (const int id : ids) {
              optimizer.gather({&id, 1});
              optimizer.release({&id, 1});
            }
          }
          model.backward(s, comm.rank());
          const StepReport& report = optimizer.step();
          const auto& mine = plan.per_rank[static_cast<std::size_t>(comm.rank())];
          EXPECT_EQ(report.bytes_sent, mine.traffic.bytes) << extra << max_chunk;
        }
      });
    }
  }
}

// A reduction leaves once others have arrived, which every rank sees at another time; a gather
// leaves when it is asked for. Ranks that gather inside backward must not take the one for the
// other.
TEST(WorkingSet, GathersBetweenGradientsWhateverHasArrivedWhere) {
  for (const char* extra :
       {"", "mesh: {shard: 2, replicate: 2}\n", "mesh: {shard: 4, node: 2}\n"}) {
    const Config config = parse_config(
        toy::muon_and_adamw +
        std::string("zero: {stage: 3, gathers: 2}\ncomm: {bucket_bytes: 1KiB}\n") + extra);
    std::vector<float> weights[2];
    for (const bool inside : {false, true}) {
      run_thread_ranks(4, [&](Communicator& comm) {
        Model model;
        const int rank = comm.rank();
        ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
        const std::vector<int> ids = all_ids(model);
        const std::vector<int> backward(ids.rbegin(), ids.rend());
        for (std::int64_t s = 1; s <= 8; ++s) {
          model.backward(s, rank);
          optimizer.gather(ids);
          optimizer.release(ids);
          if (!inside) optimizer.gather(ids);
          // The first has more buckets ready than may travel; for the last they have arrived.
          std::this_thread::sleep_for(std::chrono::milliseconds((s + rank) % 4));
          const auto first = std::span(backward).first(backward.size() - 2);
          const auto later = std::span(backward).last(2);
          for (const int id : first) optimizer.gradient_ready(id);
          if (inside) optimizer.gather(later);
          for (const int id : later) optimizer.gradient_ready(id);
          if (inside) optimizer.release(later);
          optimizer.step();
        }
        read_back(optimizer, model);
        if (rank == 0) weights[inside ? 1 : 0] = model.all_weights();
      });
    }
    EXPECT_EQ(weights[0], weights[1]) << extra;
  }
}

TEST(WorkingSet, FetchesAheadWhatFollowedLastTime) {
  const Config config = config_of("zero: {stage: 3}\n");
  run_thread_ranks(3, [&](Communicator& comm) {
    Model model;
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    std::vector<std::vector<float>> first;
    for (std::int64_t s = 1; s <= 3; ++s) {
      // Another order in the second step: what was fetched ahead is not what is asked for.
      std::vector<int> order = all_ids(model);
      if (s == 2) std::reverse(order.begin(), order.end());
      std::vector<std::vector<float>> seen(order.size());
      for (const int id : order) {
        optimizer.gather({&id, 1});
        const auto i = static_cast<std::size_t>(id);
        const auto* w = static_cast<const float*>(optimizer.weights(id));
        seen[i].assign(w, w + model.weights[i].size());
        optimizer.release({&id, 1});
      }
      optimizer.gather(order);
      for (const int id : order) {
        const auto i = static_cast<std::size_t>(id);
        const auto* w = static_cast<const float*>(optimizer.weights(id));
        EXPECT_TRUE(std::equal(seen[i].begin(), seen[i].end(), w)) << id;
      }
      toy::reproducible_step(optimizer, model, kLeaves, s);  // releases what is still gathered
    }
  });
}

TEST(WorkingSet, RefusesMoreThanItsSizeOnAllRanks) {
  // embed is 24,000 bytes, six pages of 4 KiB; all tensors are 13 pages.
  const Config config = config_of("zero: {stage: 3, working_set: 32KiB}\n");
  run_thread_ranks(2, [&](Communicator& comm) {
    Model model;
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    try {
      optimizer.gather(all_ids(model));
      FAIL();
    } catch (const ConfigError& e) {
      EXPECT_NE(std::string(e.what()).find("zero.working_set"), std::string::npos) << e.what();
    }
    const std::vector<int> some{0};
    optimizer.gather(some);
    EXPECT_EQ(static_cast<const float*>(optimizer.weights(0))[5999], model.weights[0][5999]);
    const std::vector<int> more{1, 2};
    optimizer.gather(more);
    optimizer.release(some);
    optimizer.release(more);
  });
}

TEST(WorkingSet, CheckpointsMoveBetweenStages) {
  const fs::path directory =
      fs::temp_directory_path() / ("orthrus-working-set-" + std::to_string(::getpid()));
  fs::create_directories(directory);
  const auto whole = curve(config_of("zero: {stage: 2}\n"), 1, 4);
  for (const auto& [saved_by, loaded_by] : {std::pair{2, 3}, std::pair{3, 2}, std::pair{3, 3}}) {
    const fs::path file = directory / (std::to_string(saved_by) + "-" + std::to_string(loaded_by));
    const Config save = config_of("zero: {stage: " + std::to_string(saved_by) + "}\n");
    const Config load = config_of("zero: {stage: " + std::to_string(loaded_by) +
                                  "}\nmesh: {shard: 2, replicate: 2}\n");
    run_thread_ranks(3, [&](Communicator& comm) {
      Model model;
      ShardedOptimizer optimizer{save, comm.duplicate("job"), model.parameters};
      for (std::int64_t s = 1; s <= 2; ++s) {
        toy::reproducible_step(optimizer, model, kLeaves, s);
      }
      optimizer.save(file.string());
    });
    run_thread_ranks(4, [&](Communicator& comm) {
      Model model;
      ShardedOptimizer optimizer{load, comm.duplicate("job"), model.parameters};
      optimizer.load(file.string());
      for (std::int64_t s = 3; s <= 4; ++s) {
        toy::reproducible_step(optimizer, model, kLeaves, s);
      }
      read_back(optimizer, model);
      EXPECT_EQ(model.all_weights(), whole.back()) << saved_by << " to " << loaded_by;
    });
  }
  fs::remove_all(directory);
}

TEST(WorkingSet, AllocatesNothingInSteadyState) {
  const Config config = config_of("zero: {stage: 3}\ncomm: {bucket_bytes: 4KiB}\n");
  run_thread_ranks(1, [&](Communicator& comm) {
    Model model;
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    const std::vector<int> ids = all_ids(model);
    std::int64_t calls = 0;
    for (std::int64_t s = 1; s <= 6; ++s) {
      const long before = count_new::calls.load();
      optimizer.gather(ids);
      optimizer.release(ids);
      toy::reproducible_step(optimizer, model, kLeaves, s);
      if (s > 3) calls += count_new::calls.load() - before;
    }
    EXPECT_EQ(calls, 0);
  });
}

std::int64_t resident_kib() {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line)) {
    if (line.starts_with("VmRSS:")) return std::stoll(line.substr(6));
  }
  return 0;
}

TEST(Reserve, HasMemoryOnlyWhileItIsUsed) {
  constexpr std::size_t bytes = 64 << 20;
  const std::int64_t before = resident_kib();
  const auto cpu = kernels::open_backend("cpu");
  runtime::Reserve reserve(*cpu, bytes);
  EXPECT_LT(resident_kib() - before, 4 << 10);
  std::fill_n(reserve.data(), bytes, std::byte{1});
  const std::int64_t used = resident_kib();
  EXPECT_GT(used - before, 60 << 10);
  reserve.drop(0, bytes);
  EXPECT_LT(resident_kib() - before, 4 << 10);
}

}  // namespace
}  // namespace orthrus
