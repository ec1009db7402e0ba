#pragma once
/// @file
/// ProcessGrid: a ScaLAPACK process grid, and the products that msign needs, on block-cyclic
/// matrices.
///
/// ScaLAPACK sends beside the communicator, by MPI calls of its own (BLACS): they wait without a
/// deadline, whatever `timeout_s` says, and an error of MPI in them ends the program. Their bytes
/// and messages are added to the communicator's traffic as `gram_traffic` and `product_traffic`
/// predict them; tests/comm/test_block_cyclic counts MPI's arguments to show that this is what is
/// sent.

#include <orthrus/communicator.hpp>

#include "comm/block_cyclic.hpp"
#include "kernels/handle.hpp"

namespace orthrus::comm {

/// One BLACS context over the ranks of a communicator; a process may have several. To be released
/// before MPI_Finalize, by all ranks in the same order (later releases are skipped).
class ProcessGrid {
 public:
  /// Was ScaLAPACK built in (ORTHRUS_WITH_SCALAPACK)?
  static bool available() noexcept;

  /// Collective. @throws ConfigError  `comm` is not over MPI, or ScaLAPACK was not built in.
  explicit ProcessGrid(const Communicator& comm);

  [[nodiscard]] GridShape shape() const noexcept { return shape_; }
  /// BLACS's number of this grid, as descriptors have it.
  [[nodiscard]] int context() const noexcept { return context_.get(); }

  // All pointers are to local parts. `comm` is the communicator the grid was made of; all its ranks
  // call, with the same scalars. Each call is a row of p?gemm calls whose shapes leave PBLAS one
  // choice of algorithm. Matrices must fit 32-bit sizes (`check_grid_sizes`).

  /// C ← α·X·Xᵀ + β·C on and below the block diagonal; the rest of C is not touched.
  /// @param c  laid out as `gram_layout(x_layout)`. @par Cost  side²·length flops over all ranks.
  void gram(float alpha, const BlockCyclic& x_layout, const float* x, float beta, float* c,
            Communicator& comm) const;
  /// C ← α·A·X + β·C. @param a  laid out as `gram_layout(x_layout)`; @param c  as X, not X.
  /// @par Cost  2·side²·length flops over all ranks.
  void multiply(float alpha, const float* a, const BlockCyclic& x_layout, const float* x,
                float beta, float* c, Communicator& comm) const;

 private:
  struct Context {
    using Handle = int;
    static Handle null() noexcept { return -1; }
    static void release(Handle context) noexcept;
  };
  UniqueHandle<Context> context_;
  GridShape shape_;
};

}  // namespace orthrus::comm
