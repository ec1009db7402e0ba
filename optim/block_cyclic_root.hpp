#pragma once
/// @file
/// D = A^-½X of a factor A too large for one rank: gradients join it, and its root is made, on a
/// ScaLAPACK grid.

#include <cstddef>
#include <orthrus/communicator.hpp>
#include <span>

#include "comm/block_cyclic.hpp"
#include "comm/process_grid.hpp"
#include "kernels/spd_root.hpp"

namespace orthrus::optim {

/// What a rule wants of it in one step.
struct GridRoot {
  double beta = 0, weight = 1;  ///< A ← βA + weight·GGᵀ
  double correction = 1;        ///< the root is of A/correction…
  kernels::Damping damping;  ///< …with this on its diagonal, `least_damping` of the norm or more
  double scale = 1;          ///< D = scale·(…)^-½X
};

/// The same on all ranks.
struct GridRootReport {
  bool joined = false;   ///< A is finite with G; else it stays as it was
  bool renewed = false;  ///< there is a new root; else the one before serves…
  bool serves = false;   ///< …if there is one. Else D is zero
  double residual = 0;   ///< of the new root: `kernels::RootReport::residual`
};

/// What one m×n matrix and the factor of its shorter side need to meet on a grid: plans and counts,
/// made once. Between steps factor and root rest as packed triangles (row after row), of which each
/// rank has an even run.
class BlockCyclicRoot {
 public:
  /// Smaller eigenvalues than this share of the norm are not told apart in f32 throughout. The
  /// number of steps follows from it alone, so that every step sends the same.
  static constexpr double least_damping = 1e-6;

  /// Pure. @param pieces  what each rank has of the matrix (`comm::Redistribution`).
  BlockCyclicRoot(Index m, Index n, std::span<const Region> pieces, int rank);

  /// Of the factor's packed triangle, that of a side×side matrix: what rank `rank` keeps.
  static comm::Run run(Index side, int ranks, int rank) {
    return comm::even_run(side * (side + 1) / 2, ranks, rank);
  }
  /// Scratch of `operator()`: two buffers as large as a rank's part of X, and five squares. @return
  /// bytes, a multiple of 256.
  [[nodiscard]] std::size_t workspace_bytes() const noexcept;
  /// What `operator()` adds to the communicator's traffic on this rank: exactly.
  [[nodiscard]] Traffic traffic(Index max_chunk = 0x7fffffff) const;

  /// Of all ranks together, for T coupled steps: 3·min²·max, and 7T·min³.
  static double flops(Index m, Index n);
  /// How many matrices of the factor's shape are sent along rows and columns of the grid, as
  /// operands of products.
  static int products();

  /// X ← D. NaN and Inf are computed with like any other number, so that the same bytes are sent.
  /// @param[in,out] x       this rank's elements, densely, f32.
  /// @param         g       of the gradient.
  /// @param[in,out] factor  `run` of the triangle of A. @param[in,out] root  of A^-½; 0: none yet.
  /// @param[out]    work    at least `workspace_bytes()`, 64-byte aligned.
  /// @par Cost  `flops`, shared (`kernels::spd_root`, r = 2, f32 throughout), and what `traffic`
  /// says.
  GridRootReport operator()(float* x, const float* g, float* factor, float* root,
                            const GridRoot& of, std::span<std::byte> work,
                            const comm::ProcessGrid& grid, Communicator& comm,
                            kernels::Backend& backend);

 private:
  int rank_;
  comm::Redistribution move_, triangle_;
  comm::BlockCyclic square_;
  comm::Mirror mirror_;
  Index buffer_size_;  // X, or what is being sent or mirrored
};

}  // namespace orthrus::optim
