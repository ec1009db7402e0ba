#pragma once
/// @file
/// msign of a matrix too large for one rank: the pieces meet on a ScaLAPACK grid.

#include <cstddef>
#include <orthrus/communicator.hpp>
#include <span>

#include "comm/block_cyclic.hpp"
#include "comm/process_grid.hpp"
#include "kernels/msign.hpp"

namespace orthrus::optim {

/// Bytes and messages rank `rank` of `ranks` sends in the iteration alone: exactly. Pure.
Traffic block_cyclic_msign_traffic(Index m, Index n, int ranks, int rank,
                                   std::span<const kernels::Quintic> iterations,
                                   Index max_chunk = 0x7fffffff);

/// Scratch on rank `rank` of `ranks`, whose piece has `piece_size` elements: twice its part of X
/// and twice that of XXᵀ, unless the piece is larger. @return bytes, a multiple of 256. Pure.
std::size_t block_cyclic_msign_workspace_bytes(Index m, Index n, Index piece_size, int ranks,
                                               int rank);

/// What one m×n matrix needs to meet on a grid: plans and counts, made once.
class BlockCyclicMsign {
 public:
  /// Pure. @param pieces  what each rank has of the matrix (`comm::Redistribution`).
  /// @throws ShapeError  the pieces are not the matrix, or `comm::check_grid_sizes` does.
  BlockCyclicMsign(Index m, Index n, std::span<const Region> pieces, int rank);

  [[nodiscard]] const comm::Redistribution& redistribution() const noexcept { return move_; }
  /// Scratch of `operator()`: `block_cyclic_msign_workspace_bytes`.
  [[nodiscard]] std::size_t workspace_bytes() const noexcept;
  /// What `operator()` adds to the communicator's traffic on this rank: exactly.
  [[nodiscard]] Traffic traffic(std::span<const kernels::Quintic> iterations,
                                Index max_chunk = 0x7fffffff) const;

  /// Replaces X by U·p(Σ/ν)·Vᵀ as `kernels::msign` does, in f32: redistributes the pieces, iterates
  /// on the grid, and brings the pieces back. Every rank of `comm` calls, with the same scalars.
  ///
  /// ν comes from a sum of squares in f64 over all ranks: squares of f32 numbers neither overflow
  /// nor underflow there, which a power of two is to prevent elsewhere. Zero stays exactly zero,
  /// NaN and Inf make all of it NaN; both are iterated on like any other matrix, so that the same
  /// bytes are sent.
  ///
  /// @param[in,out] piece  this rank's elements, densely, f32.
  /// @param[out]    work   at least `workspace_bytes()`, 64-byte aligned.
  /// @param         grid   made of `comm`. It waits without a deadline (`comm::ProcessGrid`).
  /// @throws ShapeError    `iterations` is empty, `options.dtype` is not f32, or `work` is small.
  /// @par Cost  per rank (3·min²·max + min³)/ranks flops per iteration, 2 + 2·iterations
  /// all_to_alls, one all_reduce, and what `comm::gram_traffic` and `comm::product_traffic` say.
  void operator()(float* piece, std::span<const kernels::Quintic> iterations, double safety,
                  const kernels::MsignOptions& options, std::span<std::byte> work,
                  const comm::ProcessGrid& grid, Communicator& comm, kernels::Backend& backend);

 private:
  int rank_;
  comm::Redistribution move_;
  comm::Mirror mirror_;
  Index buffer_size_;  // X, its next value, or what is being sent or mirrored
};

}  // namespace orthrus::optim
