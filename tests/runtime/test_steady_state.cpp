// After the first steps nothing is allocated any more: no operator new inside step() and
// gradient_ready(), and the process does not grow.
#include <gtest/gtest.h>
#include <malloc.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <map>
#include <orthrus/orthrus.hpp>
#include <tuple>

#include "kernels/backend.hpp"
#include "modes_model.hpp"
#include "support/count_new.hpp"
#include "support/openmp.hpp"
#include "toy_model.hpp"

namespace orthrus {
namespace {

using toy::Model;

long resident_bytes() {
  long size = 0;
  long resident = 0;
  std::FILE* f = std::fopen("/proc/self/statm", "r");
  if (f == nullptr || std::fscanf(f, "%ld %ld", &size, &resident) != 2) resident = 0;
  if (f != nullptr) std::fclose(f);
  return resident * sysconf(_SC_PAGESIZE);
}

const char* const recipes[] = {toy::muon_and_adamw,
                               R"(
schema: 1
reproducible: {virtual_shards: 8}
groups:
  - {match: "*.weight", rule: {name: normuon}, clip_norm: 1.0}
  - {match: "*", rule: {name: sgd}, weights: {format: bf16, residual: master}}
)"};

class SteadyState : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Recipes, SteadyState, testing::ValuesIn(recipes));

TEST_P(SteadyState, StepsAllocateNothing) {
  const Config config = parse_config(GetParam());
  for (const int ranks : {1, 3}) {
    run_thread_ranks(ranks, [&](Communicator& comm) {
      Model model;
      ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
      const auto one = [&](std::int64_t s) {
        if (config.virtual_shards > 0) {
          toy::reproducible_step(optimizer, model, 8, s);
          return;
        }
        model.backward(s, comm.rank());
        for (int id = 0; id < std::ssize(model.parameters); ++id) optimizer.gradient_ready(id);
        optimizer.step();
      };
      for (std::int64_t s = 1; s <= 3; ++s) one(s);
      comm.barrier();  // the first one allocates
      comm.barrier();
      const long before = count_new::calls;
      for (std::int64_t s = 4; s <= 10; ++s) one(s);
      EXPECT_EQ(count_new::calls,
                before);  // of all threads: some rank may still be in its last step
      comm.barrier();
    });
  }
}

TEST(SteadyState, SharedTermsAllocateNothing) {
  const modes::LinkProfile links(true);
  const modes::Model model = modes::lone_model("gaussian", 48, 90);
  const Config config = modes::lone_config(links, 3);
  for (const int ranks : {1, 2, 3, 5}) {
    run_thread_ranks(ranks, [&](Communicator& comm) {
      modes::Trainer trainer(model, 0, 1);
      ShardedOptimizer optimizer{config, comm.duplicate("job"), trainer.parameters};
      trainer.backward(1);
      for (int s = 0; s < 3; ++s) optimizer.step();
      comm.barrier();
      comm.barrier();
      const long before = count_new::calls;
      for (int s = 0; s < 5; ++s) optimizer.step();
      EXPECT_EQ(count_new::calls, before);
      comm.barrier();
    });
  }
}

TEST(SteadyState, TheProcessDoesNotGrow) {
  const Config config = parse_config(toy::muon_and_adamw);
  Model model;
  ShardedOptimizer optimizer{config, self_communicator(), model.parameters};
  model.backward(1, 0);
  const auto steps = [&](int n) {
    for (int s = 0; s < n; ++s) optimizer.step();
  };
  steps(200);
  const long before = resident_bytes();
  constexpr int n = 2000;
  steps(n);
  EXPECT_LT(resident_bytes() - before, 1024L * n);  // below 1 KiB per step
}

/// Bytes this process has from malloc and from the mappings malloc makes.
std::int64_t allocated_bytes() {
  const auto info = mallinfo2();
  return static_cast<std::int64_t>(info.uordblks + info.hblkhd);
}

TEST(SteadyState, WhatIsAllocatedIsPlanned) {
  if (allocated_bytes() == 0) GTEST_SKIP() << "this build's allocator does not count";
  // Large enough for the plan's own tables to be small beside it.
  std::vector<std::vector<Index>> shapes;
  for (int i = 0; i < 4; ++i) shapes.push_back({512, 768});
  shapes.insert(shapes.end(), {{1024, 256}, {300000}});
  const char* const rational = "gram}, lmo: {coefficients: rational";
  std::map<std::string, std::int64_t> work_of_lone;  // by `extra`, on one thread
  for (const auto& [mode, lone, threads] :
       std::vector<std::tuple<const char*, bool, int>>{{"owner", false, 1},
                                                       {"exchange", false, 1},
                                                       {"gather", false, 1},
                                                       {"gram", false, 1},
                                                       {"gram_steps", false, 1},
                                                       {"block_local", false, 1},
                                                       {rational, false, 1},
                                                       {rational, true, 1},
                                                       {rational, true, 3}}) {
    if (lone) shapes = {{768, 1024}, {300000}};
    for (const char* extra :
         {"", "comm: {bucket_bytes: 1}\n", "zero: {stage: 1}\ntrain: {micro_batches: 2}\n",
          "mesh: {replicate: 2}\n"}) {
      const Config config = parse_config("schema: 1\n" + std::string(extra) +
                                         "groups:\n  - {match: 'w*', rule: {name: muon}, matrix: "
                                         "{mode: " +
                                         mode + "}}\n  - {match: '*', rule: {name: adamw}}\n");
      const int ranks = config.mesh.replicate == 2 ? 4 : 3;
      std::vector<std::vector<std::vector<float>>> buffers(static_cast<std::size_t>(ranks));
      for (auto& of_rank : buffers) {
        for (const auto& dims : shapes) {
          Index n = 1;
          for (const Index d : dims) n *= d;
          of_rank.emplace_back(static_cast<std::size_t>(n), 1.0F);
        }
      }
      std::atomic<std::int64_t> planned = 0;
      std::int64_t before = 0;
      std::int64_t after = 0;
      run_thread_ranks(ranks, [&, terms = lone, limit = threads](Communicator& comm) {
        const openmp::Threads limited(limit);
        std::vector<Parameter> parameters;
        auto& mine = buffers[static_cast<std::size_t>(comm.rank())];
        for (std::size_t i = 0; i < shapes.size(); ++i) {
          Parameter p;
          p.name = (shapes[i].size() > 1 ? "w" : "b") + std::to_string(i);
          p.shape = shapes[i];
          p.weights = mine[i].data();
          parameters.push_back(p);
        }
        std::vector<std::vector<float>> room;
        for (Parameter& p : parameters) {
          room.emplace_back(mine[room.size()].size());
          p.gradient = room.back().data();
        }
        comm.barrier();
        if (comm.rank() == 0) before = allocated_bytes();
        comm.barrier();
        const ShardedOptimizer optimizer{config, comm.duplicate("job"), parameters};
        planned += optimizer.memory().total() - optimizer.memory().weights;
        EXPECT_EQ(optimizer.plan_json().find("shared_terms") != std::string::npos, terms);
        if (comm.rank() == 0) {
          const std::int64_t work = optimizer.memory().work;
          if (terms && limit == 1) work_of_lone[extra] = work;
          // A square for every term that has a thread, of three. (Pieces of two ranks are so large
          // that their panels take more than one term at a time.)
          const std::int64_t squares = (kernels::tasks_at_once("cpu") - 1) * 768 * 768 * 4;
          const bool compared = terms && limit > 1 && ranks == 3;
          EXPECT_EQ(compared ? work - work_of_lone[extra] : squares, squares) << extra;
        }
        comm.barrier();
        if (comm.rank() == 0) after = allocated_bytes();
        comm.barrier();
      });
      const double difference = static_cast<double>(after - before) / static_cast<double>(planned);
      EXPECT_NEAR(difference, 1, 0.01) << mode << " " << extra << ": planned " << planned;
    }
  }
}

}  // namespace
}  // namespace orthrus
