// What every communicator does, on NCCL with a device for each rank. Skipped where there are fewer.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <orthrus/error.hpp>
#include <orthrus/mpi.hpp>
#include <orthrus/nccl.hpp>
#include <string>
#include <vector>

#include "comm/mesh.hpp"
#include "conformance.hpp"
#include "support/devices.hpp"

namespace {

using namespace conformance;
using namespace devices;
using orthrus::borrow;
using orthrus::CommError;
using orthrus::open_nccl;
using testing::HasSubstr;

TEST(Nccl, DoesWhatEveryCommunicatorDoes) {
  if (const std::string why = lack(Need::own); !why.empty()) GTEST_SKIP() << why;
  Communicator world = borrow(MPI_COMM_WORLD, {.timeout_s = 40});
  Communicator c = open_nccl(world, local_rank());
  EXPECT_STREQ(c.kind(), "nccl");
  EXPECT_TRUE(c.on_device());
  EXPECT_EQ(c.rank(), world.rank());
  EXPECT_EQ(c.size(), world.size());
  Communicator host = from_host(c, local_rank());
  everything(host, as_counted(host), Order::same);
}

TEST(Nccl, MakesAMesh) {
  if (const std::string why = lack(Need::own); !why.empty()) GTEST_SKIP() << why;
  Communicator world = borrow(MPI_COMM_WORLD, {.timeout_s = 40});
  const orthrus::Mesh mesh = orthrus::make_mesh(open_nccl(world, local_rank()), 0, 1);
  EXPECT_STREQ(mesh.shard.kind(), "nccl");
}

TEST(Nccl, RefusesHostMemoryByName) {
  if (const std::string why = lack(Need::own); !why.empty()) GTEST_SKIP() << why;
  Communicator world = borrow(MPI_COMM_WORLD, {.timeout_s = 40});
  Communicator c = open_nccl(world, local_rank());
  std::vector<float> data(4);
  try {
    c.all_reduce(span(data), ReduceOp::sum);  // some devices read host memory
  } catch (const CommError& e) {
    EXPECT_THAT(e.what(), HasSubstr("is in the host's memory; NCCL takes the device's"));
  }
}

TEST(Nccl, DeadlineAbortsTheCommunicator) {
  if (const std::string why = lack(Need::own); !why.empty()) GTEST_SKIP() << why;
  Communicator world = borrow(MPI_COMM_WORLD, {.timeout_s = 40});
  if (world.size() < 2) return;  // one rank answers itself
  {
    Communicator c = open_nccl(world, local_rank());
    c.barrier();
    c.set_timeout(0.5);
    if (c.rank() == 0) {
      const auto begin = std::chrono::steady_clock::now();
      try {
        c.barrier();
        ADD_FAILURE() << "no deadline";
      } catch (const CommError& e) {
        EXPECT_THAT(e.what(), HasSubstr("barrier on world: no answer in 0.5 s"));
      }
      try {
        c.barrier();
        ADD_FAILURE() << "not aborted";
      } catch (const CommError& e) {
        EXPECT_THAT(e.what(), HasSubstr("the communicator was aborted"));
      }
      const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - begin;
      EXPECT_LT(waited.count(), 20);
    }
    world.barrier();
  }
  world.barrier();
}

}  // namespace
