#pragma once
/// @file
/// The MPI communicator inside a `Communicator`, for other libraries that talk between its ranks.

#include <orthrus/communicator.hpp>

namespace orthrus::comm {

/// Fortran's integer for it (MPI_Comm_f2c turns it back), so that mpi.h stays out of headers.
/// @throws CommError  `c` is not over MPI.
int fortran_handle(const Communicator& c);

}  // namespace orthrus::comm
