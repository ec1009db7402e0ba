// MPI for device buffers, also of ranks that share a device, and what NCCL says to such ranks.
// Skipped where there is no device.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <orthrus/error.hpp>
#include <orthrus/mpi.hpp>
#include <orthrus/nccl.hpp>
#include <string>

#include "comm/cuda_copies.hpp"
#include "conformance.hpp"
#include "support/devices.hpp"

namespace {

using namespace conformance;
using namespace devices;
using orthrus::borrow;
using orthrus::ConfigError;
using orthrus::open_nccl;
using orthrus::comm::cuda_copies;
using orthrus::comm::staged;
using testing::HasSubstr;

TEST(StagedMpi, ServesDeviceBuffersAlsoOfRanksThatShareADevice) {
  if (const std::string why = lack(Need::any); !why.empty()) GTEST_SKIP() << why;
  Communicator world = borrow(MPI_COMM_WORLD);
  Communicator c = staged(world, cuda_copies(0));
  EXPECT_STREQ(c.kind(), "mpi+staging");
  everything(c, as_counted(c));         // callers on the host are served, too
  Communicator host = from_host(c, 0);  // host, device, pinned, MPI, and back
  everything(host, as_counted(host));
}

TEST(StagedMpi, TwoRanksOnOneDeviceAreNamedOnEveryRank) {
  if (const std::string why = lack(Need::any); !why.empty()) GTEST_SKIP() << why;
  Communicator world = borrow(MPI_COMM_WORLD, {.timeout_s = 40});
  if (world.size() < 2 || !orthrus::nccl_report().built) return;
  try {
    static_cast<void>(open_nccl(world, 0));
    ADD_FAILURE() << "opened";
  } catch (const ConfigError& e) {
    EXPECT_THAT(e.what(), HasSubstr("ranks 0 and 1 both use device "));
  }
  world.barrier();  // and nothing is broken
}

}  // namespace
