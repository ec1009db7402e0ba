#pragma once
/// @file
/// Communicators over NCCL: buffers in the memory of one device per rank.

#include <orthrus/communicator.hpp>
#include <string>

namespace orthrus {

/// What this build and this machine have of NCCL.
struct NcclReport {
  bool built = false;   ///< this build was made with NCCL
  int compiled = 0;     ///< version of its header: 10000·major + 100·minor + patch
  int version = 0;      ///< of the library that was loaded
  int devices = 0;      ///< CUDA devices this process sees
  std::string problem;  ///< why nothing can be opened here; empty when something can
};

/// Looks, and never throws.
[[nodiscard]] NcclReport nccl_report();
/// This build has NCCL, and this process sees a device.
[[nodiscard]] bool nccl_available();

/// The ranks of `bootstrap` (over MPI), each on its own `device`, under the same options.
///
/// `compute_stream` is a cudaStream_t of that device (null: its default stream). A call starts when
/// what that stream holds at `start_*` is complete, and runs on a stream of the communicator's own;
/// the host never blocks but in `wait`, and what uses the results is queued after it. Communicators
/// split from this one follow the same stream.
///
/// - Buffers are in `device`'s memory (not strings: those are for `bootstrap`).
/// - Calls, on this communicator and all that are split from it, start in one order on all ranks.
///   NCCL may wait for other ranks on first use; calls then queue up behind.
/// - Tags are not matched: messages between two ranks meet in the order they are started.
/// - A bf16 sum is rounded after every addition, in an order that depends on NCCL's algorithm.
/// - An error of NCCL, and a deadline that passes, abort the communicator: all its calls throw.
///
/// Collective over `bootstrap`, which carries about 300 bytes per rank (as `setup`).
/// @throws ConfigError  on all ranks: two of them use one device (which NCCL would hang on), one
///                      cannot use its device, or the build has no NCCL.
/// @throws CommError    on all ranks: NCCL could not connect them within `bootstrap`'s deadline.
[[nodiscard]] Communicator open_nccl(Communicator& bootstrap, int device,
                                     void* compute_stream = nullptr);

}  // namespace orthrus
