// The runtime over MPI: bytes and messages counted from the arguments of the MPI calls are the
// plan's.
#include <gtest/gtest.h>

#include <orthrus/mpi.hpp>
#include <orthrus/orthrus.hpp>

#include "runtime/plan.hpp"
#include "support/pmpi_counter.hpp"
#include "toy_model.hpp"

namespace orthrus {
namespace {

using toy::Model;

std::string with(const char* extra) { return toy::muon_and_adamw + std::string(extra); }

class OverMpi : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Configurations, OverMpi,
                         testing::Values("", "zero: {stage: 1}\ntrain: {micro_batches: 2}\n",
                                         "zero: {stage: 2}\ntrain: {micro_batches: 2}\n",
                                         "comm: {bucket_bytes: 2KiB, gradient_dtype: bf16}\n",
                                         "comm: {bucket_bytes: 2KiB, blocking: true}\n",
                                         "reproducible: {virtual_shards: 4}\n",
                                         "mesh: {shard: auto, replicate: 2}\n",
                                         "mesh: {shard: auto, replicate: 2}\n"
                                         "reproducible: {virtual_shards: 4}\n"));

TEST_P(OverMpi, SendsWhatThePlanSays) {
  const Config config = parse_config(with(GetParam()));
  Model model;
  std::vector<runtime::ParameterShape> shapes;
  for (const Parameter& p : model.parameters) shapes.push_back(runtime::shape_of(p));
  Communicator comm = borrow(MPI_COMM_WORLD);
  const int rank = comm.rank();
  if (comm.size() % config.mesh.replicate != 0) GTEST_SKIP() << "needs an even number of ranks";
  const runtime::Plan plan = runtime::make_plan(config, shapes, comm.size());
  ShardedOptimizer optimizer{config, std::move(comm), model.parameters};
  for (std::int64_t s = 1; s <= 3; ++s) {
    pmpi::reset();
    const StepReport* report = nullptr;
    if (config.virtual_shards > 0) {
      report = &toy::reproducible_step(optimizer, model, 4, s);
    } else {
      for (std::int64_t k = 0; k < config.train.micro_batches; ++k) {
        optimizer.micro_batch(k);
        model.backward(s, rank);
        for (int id = 0; id < std::ssize(model.parameters); ++id) optimizer.gradient_ready(id);
      }
      report = &optimizer.step();
    }
    const pmpi::Sent sent = pmpi::read();
    const auto& mine = plan.per_rank[static_cast<std::size_t>(rank)];
    EXPECT_EQ(sent.bytes, mine.traffic.bytes);
    EXPECT_EQ(sent.messages, mine.traffic.messages);
    EXPECT_EQ(report->bytes_sent, mine.traffic.bytes);
    EXPECT_EQ(report->matrices, mine.matrices);
  }
}

TEST(OverMpi, ReproducibleStepsHaveTheBitsOfOneRankAlone) {
  const Config config = parse_config(with("reproducible: {virtual_shards: 8}\n"));
  Model together;
  Model alone;
  ShardedOptimizer a{config, borrow(MPI_COMM_WORLD), together.parameters};
  ShardedOptimizer b{config, self_communicator(), alone.parameters};
  for (std::int64_t s = 1; s <= 4; ++s) {
    toy::reproducible_step(a, together, 8, s);
    toy::reproducible_step(b, alone, 8, s);
  }
  EXPECT_EQ(together.all_weights(), alone.all_weights());
}

}  // namespace
}  // namespace orthrus
