// N programs of one rank are not one program of N ranks.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <orthrus/error.hpp>
#include <string>

#include "comm/launch.hpp"

namespace {

class Singletons : public testing::Test {
 protected:
  Singletons() {
    for (const char* const name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"}) {
      unsetenv(name);
    }
  }
  static std::string refusal(int ranks) {
    try {
      orthrus::comm::refuse_singletons(ranks);
    } catch (const orthrus::ConfigError& e) {
      return e.what();
    }
    return "accepted";
  }
};

TEST_F(Singletons, AreRefusedWithTheWayOut) {
  setenv("SLURM_NTASKS", "4", 1);
  EXPECT_EQ(
      refusal(1),
      "SLURM_NTASKS is 4, but this MPI program has 1 rank: it was started as 4 programs of one "
      "rank each; start it with mpirun or srun --mpi=pmix");
}

TEST_F(Singletons, TheInnermostLauncherDecides) {
  setenv("SLURM_NTASKS", "4", 1);  // mpirun -np 1 inside a job of four tasks
  setenv("OMPI_COMM_WORLD_SIZE", "1", 1);
  EXPECT_EQ(refusal(1), "accepted");
}

TEST_F(Singletons, AreNotSeenWhereThereAreNone) {
  EXPECT_EQ(refusal(1), "accepted");
  setenv("SLURM_NTASKS", "4", 1);
  EXPECT_EQ(refusal(4), "accepted");
  EXPECT_EQ(refusal(2), "accepted");  // a job step may use a part of the allocation
  for (const char* const value : {"1", "0", "-4", "", "four", "4x"}) {
    setenv("SLURM_NTASKS", value, 1);
    EXPECT_EQ(refusal(1), "accepted") << value;
  }
}

}  // namespace
