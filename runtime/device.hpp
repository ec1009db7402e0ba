#pragma once
/// @file
/// Where a rank computes: the verbs of its device, and what carries messages about its memory.

#include <functional>
#include <memory>
#include <optional>
#include <orthrus/communicator.hpp>
#include <orthrus/config.hpp>
#include <orthrus/sharded_optimizer.hpp>

#include "kernels/backend.hpp"

namespace orthrus::runtime {

/// A rank's place: everything above asks nothing else about devices.
struct Seat {
  std::unique_ptr<kernels::Backend> backend;
  /// The same ranks, for buffers of the device. Empty: the ranks' own communicator reads them.
  std::optional<Communicator> payload;
};

/// How a `ShardedOptimizer` gets its seat. Collective over `world`.
using OpenSeat = std::function<Seat(const Config&, const DeviceChoice&, Communicator& world)>;

/// The seat of `config.device`. On CUDA, gradients and weights travel as `comm.backend` says: over
/// NCCL, or staged through pinned host memory over `world`; `auto` is NCCL where this build has it
/// and every rank has a device of its own.
/// @throws ConfigError  on all ranks: one has no such device (named), or NCCL was named and cannot
///                      be.
[[nodiscard]] Seat open_seat(const Config& config, const DeviceChoice& choice, Communicator& world);

/// The ordinal of each rank that names none: its place among the ranks of its machine, modulo the
/// devices it sees. Collective over `world`, one string per rank.
[[nodiscard]] int default_ordinal(Communicator& world, int devices);

}  // namespace orthrus::runtime
