// After the first steps nothing is allocated any more: no operator new inside step() and
// gradient_ready(), and the process does not grow.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <orthrus/orthrus.hpp>

#include "support/count_new.hpp"
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

}  // namespace
}  // namespace orthrus
