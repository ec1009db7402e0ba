#pragma once
/// @file
/// The ranks of a simulated program, on comm's mpi body.

#include <orthrus/communicator.hpp>

namespace orthrus::smpi {

/// MPI_COMM_WORLD, such that every call first shows the simulator what this rank has computed,
/// asks the cost model what it should take, and is one of MPI's blocking calls: the runtime watches
/// a deadline, for which the body would use non-blocking ones, and SMPI's explode at 128 ranks.
[[nodiscard]] Communicator simulated_world();

}  // namespace orthrus::smpi
