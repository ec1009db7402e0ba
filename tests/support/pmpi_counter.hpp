#pragma once
/// @file
/// Counts what this process sends through MPI, from the arguments of the MPI calls themselves.
///
/// Linking pmpi_counter.cpp puts a wrapper before every MPI call Orthrus and ScaLAPACK
/// send with. The arithmetic
/// is that of runtime.md 4.1, done here again: comm/cost.hpp is what it judges.

#include <cstdint>

namespace pmpi {

struct Sent {
  std::int64_t bytes = 0;
  std::int64_t messages = 0;
};

/// Everything since the start of the process, or since the last `reset`.
Sent read();
void reset();
/// Calls whose send and receive buffers overlapped, which MPI forbids and some implementations
/// forgive.
int aliased();

}  // namespace pmpi
