#pragma once
/// @file
/// Hands an existing MPI communicator to Orthrus.

#include <mpi.h>

#include <orthrus/communicator.hpp>

namespace orthrus {

/// A communicator over the ranks of `comm`, which is duplicated (collective over `comm`): the
/// caller's messages and Orthrus's never meet. Orthrus calls MPI from the thread that calls
/// Orthrus, never calls MPI_Init, MPI_Finalize or MPI_Abort, and must be released before
/// MPI_Finalize (later releases are skipped, not crashed on).
/// @throws CommError  MPI is not initialized, or is finalized already.
[[nodiscard]] Communicator borrow(MPI_Comm comm, Communicator::Options options = {});

}  // namespace orthrus
