// Before MPI_Init and after MPI_Finalize: clear errors, no crash. One process, so one test of a
// life.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include <orthrus/error.hpp>
#include <orthrus/mpi.hpp>
#include <string>
#include <vector>

namespace {

using orthrus::CommError;
using orthrus::Communicator;
using testing::HasSubstr;

std::string refusal(MPI_Comm comm) {
  try {
    static_cast<void>(orthrus::borrow(comm));
  } catch (const CommError& e) {
    return e.what();
  }
  return "borrowed";
}

TEST(MpiLifetime, IsTheCallersAndIsRespected) {
  EXPECT_EQ(refusal(MPI_COMM_WORLD), "borrow: MPI is not initialized; call MPI_Init first");
  int initialized = 1;
  MPI_Initialized(&initialized);
  ASSERT_EQ(initialized, 0) << "borrow must not initialize MPI";

  MPI_Init(nullptr, nullptr);  // a single thread: the least there is
  EXPECT_EQ(refusal(MPI_COMM_NULL), "borrow: the communicator is MPI_COMM_NULL");
  Communicator late = orthrus::borrow(MPI_COMM_WORLD);
  {
    Communicator part = late.split(0, 0, "part");
    std::vector<orthrus::BFloat16> one{{0x3f80}};
    part.all_reduce(std::span(one));
    EXPECT_EQ(one[0].bits, 0x3f80);
  }
  MPI_Finalize();
  late = Communicator{};  // released too late: skipped
  EXPECT_EQ(refusal(MPI_COMM_WORLD), "borrow: MPI is finalized already");
}

}  // namespace
