// ranks = shard × replicate, on threads and on ranks that are not there.
#include <gtest/gtest.h>

#include <orthrus/error.hpp>
#include <string>
#include <vector>

#include "comm/mesh.hpp"
#include "comm/thread.hpp"

namespace {

using orthrus::Communicator;
using orthrus::ConfigError;
using orthrus::Mesh;
using orthrus::MeshShape;
using orthrus::ReduceOp;
using orthrus::Span;
using orthrus::Traffic;
using orthrus::TrafficClass;

struct Case {
  int ranks, shard, replicate;  // asked for
  int real_shard, real_replicate;
};

class MeshShapes : public testing::TestWithParam<Case> {};

TEST_P(MeshShapes, FillInWhatIsLeftOpen) {
  const Case c = GetParam();
  const MeshShape shape = orthrus::mesh_shape(c.ranks, c.shard, c.replicate);
  EXPECT_EQ(shape.shard, c.real_shard);
  EXPECT_EQ(shape.replicate, c.real_replicate);
}

TEST_P(MeshShapes, PutRankWAtShardWModSAndReplicaWDivS) {
  const Case k = GetParam();
  if (k.ranks > 8) GTEST_SKIP() << "more threads than this shows anything new with";
  orthrus::run_thread_ranks(k.ranks, [&](Communicator& world) {
    world.set_timeout(50);
    const int w = world.rank();
    const Mesh mesh = orthrus::make_mesh(std::move(world), k.shard, k.replicate);
    EXPECT_EQ(mesh.world.rank(), w);
    EXPECT_EQ(mesh.shard.size(), k.real_shard);
    EXPECT_EQ(mesh.shard.rank(), w % k.real_shard);
    EXPECT_EQ(mesh.replicate.size(), k.real_replicate);
    EXPECT_EQ(mesh.replicate.rank(), w / k.real_shard);
    EXPECT_EQ(mesh.shard.options().name, "world.shard");
    EXPECT_EQ(mesh.replicate.options().name, "world.replicate");
    EXPECT_EQ(mesh.shard.options().timeout_s, 50);
  });
}

TEST_P(MeshShapes, GroupTheRanksThatShareAStateAndThoseThatShareAShard) {
  const Case k = GetParam();
  if (k.ranks > 8) GTEST_SKIP() << "more threads than this shows anything new with";
  orthrus::run_thread_ranks(k.ranks, [&](Communicator& world) {
    const int w = world.rank();
    Mesh mesh = orthrus::make_mesh(std::move(world), k.shard, k.replicate);
    std::vector<std::int64_t> in_shard{std::int64_t{1} << w};
    std::vector<std::int64_t> in_replicate = in_shard;
    mesh.shard.all_reduce(std::span(in_shard));
    mesh.replicate.all_reduce(std::span(in_replicate));
    std::int64_t shard_ranks = 0;
    std::int64_t replicate_ranks = 0;
    for (int r = 0; r < k.ranks; ++r) {
      if (r / k.real_shard == w / k.real_shard) shard_ranks |= std::int64_t{1} << r;
      if (r % k.real_shard == w % k.real_shard) replicate_ranks |= std::int64_t{1} << r;
    }
    EXPECT_EQ(in_shard[0], shard_ranks);
    EXPECT_EQ(in_replicate[0], replicate_ranks);
  });
}

TEST_P(MeshShapes, AreTheSameOnDryRanks) {
  const Case k = GetParam();
  for (int w = 0; w < k.ranks; ++w) {
    const Mesh mesh =
        orthrus::make_mesh(orthrus::dry_communicator(k.ranks, w), k.shard, k.replicate);
    EXPECT_TRUE(mesh.shard.dry());
    EXPECT_EQ(mesh.world.size(), k.ranks);
    EXPECT_EQ(mesh.shard.size(), k.real_shard);
    EXPECT_EQ(mesh.shard.rank(), w % k.real_shard);
    EXPECT_EQ(mesh.replicate.size(), k.real_replicate);
    EXPECT_EQ(mesh.replicate.rank(), w / k.real_shard);
    EXPECT_EQ(mesh.shard.options().name, "world.shard");
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, MeshShapes,
                         testing::Values(Case{1, 0, 0, 1, 1}, Case{1, 1, 1, 1, 1},
                                         Case{4, 0, 0, 4, 1}, Case{4, 2, 0, 2, 2},
                                         Case{4, 0, 4, 1, 4}, Case{6, 3, 2, 3, 2},
                                         Case{6, 0, 3, 2, 3}, Case{8, 4, 2, 4, 2},
                                         Case{5, 5, 0, 5, 1}, Case{96, 8, 0, 8, 12}));

TEST(Mesh, WarmsUpEveryCommunicatorAndCallsItSetup) {
  orthrus::run_thread_ranks(4, [&](Communicator& world) {
    const Mesh mesh = orthrus::make_mesh(std::move(world), 2, 2);
    for (const Communicator* c : {&mesh.world, &mesh.shard, &mesh.replicate}) {
      EXPECT_EQ(c->traffic(), Traffic{});
      EXPECT_EQ(c->traffic(TrafficClass::setup).messages, 2);
      EXPECT_EQ(orthrus::comm::thread_copied(*c), c->traffic(TrafficClass::setup));
    }
  });
}

std::string refusal(int ranks, int shard, int replicate) {
  try {
    static_cast<void>(orthrus::mesh_shape(ranks, shard, replicate));
  } catch (const ConfigError& e) {
    EXPECT_EQ(e.exit_code(), orthrus::ExitCode::config);
    return e.what();
  }
  return "accepted";
}

TEST(Mesh, RefusesShapesThatAreNotTheRanksAndSaysTheNumbers) {
  EXPECT_EQ(refusal(4, 3, 2), "mesh.shard 3 x mesh.replicate 2 = 6, but there are 4 ranks");
  EXPECT_EQ(refusal(1, 2, 1), "mesh.shard 2 x mesh.replicate 1 = 2, but there is 1 rank");
  EXPECT_EQ(refusal(4, 3, 0), "mesh.shard 3 does not divide the 4 ranks there are");
  EXPECT_EQ(refusal(4, 0, 8), "mesh.replicate 8 does not divide the 4 ranks there are");
  EXPECT_EQ(refusal(4, -1, 0), "mesh.shard -1 x mesh.replicate 0: sizes are 1 or more, or auto");
  EXPECT_EQ(refusal(4, 65536, 65536),  // 2^32, which an int would call 0
            "mesh.shard 65536 x mesh.replicate 65536 = 4294967296, but there are 4 ranks");
}

TEST(Mesh, RefusesOnEveryRankAlike) {
  EXPECT_THROW(
      orthrus::run_thread_ranks(4,
                                [](Communicator& world) {
                                  static_cast<void>(orthrus::make_mesh(std::move(world), 3, 2));
                                }),
      ConfigError);
}

}  // namespace
