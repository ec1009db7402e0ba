// Steps change between spectral and Euclidean over MPI, also where a matrix is on a grid of ranks.
#include <orthrus/mpi.hpp>

#include "comm/process_grid.hpp"
#include "geometry_run.hpp"

namespace orthrus {
namespace {

using namespace geometry;

TEST(GeometryOverMpi, ChangesWhereACheckpointIsDue) {
  Communicator comm = borrow(MPI_COMM_WORLD);
  for (const std::string mode : {"exchange", "gram", "gram_steps", "block_cyclic"}) {
    if (mode == "block_cyclic" && !comm::ProcessGrid::available()) continue;
    // Also where Gram matrices, and the grid's, are made of 2^e·X.
    for (const double gradient : {1.0, 0x1p-50}) {
      SCOPED_TRACE(mode + " x " + std::to_string(gradient));
      const std::string group = ", matrix: {mode: " + mode + "}";
      const Layout layout{comm.size(), "", group.c_str(), gradient};
      Model reports(layout, "report", comm), chooses(layout, "auto", comm);
      reports.steps(kDecided);
      chooses.steps(kDecided);
      EXPECT_EQ(chooses.w_flat, reports.w_flat);
      std::vector<std::int64_t> process{::getpid()};  // rank 0's names the directory
      comm.broadcast(std::span(process), 0);
      const auto shared = std::filesystem::temp_directory_path() /
                          ("orthrus-geometry-mpi-" + std::to_string(process[0]));
      chooses.optimizer->save(shared.string());
      const auto at = chooses.w_flat;
      reports.step();
      chooses.step();
      expect_step(chooses, at, euclidean_step(kDecided + 1, kDecided), 1e-5);
      EXPECT_EQ(chooses.w_round, reports.w_round) << "the other goes on";
      EXPECT_EQ(chooses.matrices, reports.matrices - 1);
      Model loads(layout, "auto", comm);
      loads.load(shared.string());
      loads.step();
      EXPECT_EQ(loads.w_flat, chooses.w_flat);
      comm.barrier();
      if (comm.rank() == 0) std::filesystem::remove_all(shared);
      comm.barrier();
    }
  }
}

}  // namespace
}  // namespace orthrus
