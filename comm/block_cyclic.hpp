#pragma once
/// @file
/// Block-cyclic: a matrix dealt in blocks to a grid of ranks, as ScaLAPACK has it, and the way
/// there and back. Pure, but for the two calls that move elements.
///
/// Rank r of a p×q grid sits at (r / q, r % q). A rank holds its rows and columns densely, in their
/// order, column-major. The matrix is turned so that its short side is dealt to the grid's rows, in
/// blocks of at most `widest_block`; the long side is cut once per grid column, because nothing
/// walks along it in panels and uncut rows make long copies.

#include <cstddef>
#include <orthrus/communicator.hpp>
#include <span>
#include <utility>
#include <vector>

#include "kernels/region.hpp"

namespace orthrus::comm {

struct GridShape {
  int rows = 1, cols = 1;
  [[nodiscard]] int ranks() const noexcept { return rows * cols; }
  friend bool operator==(const GridShape&, const GridShape&) = default;
};

/// As square as can be with rows·cols == `ranks` and rows <= cols: 4 is 2×2, 7 is 1×7.
GridShape grid_shape(int ranks);

/// Indices 0 … extent − 1, dealt to `parts` in turn, `block` at a time.
struct Dealing {
  Index extent = 0, block = 1;
  int parts = 1;

  [[nodiscard]] int part_of(Index i) const noexcept { return static_cast<int>(i / block % parts); }
  /// Where index i lies among those of its part.
  [[nodiscard]] Index local(Index i) const noexcept {
    return i / block / parts * block + i % block;
  }
  [[nodiscard]] Index global(int part, Index l) const noexcept {
    return (l / block * parts + part) * block + l % block;
  }
  /// Indices of `part` below `end` (ScaLAPACK's numroc).
  [[nodiscard]] Index count_below(Index end, int part) const noexcept;
  [[nodiscard]] Index count(int part) const noexcept { return count_below(extent, part); }
  friend bool operator==(const Dealing&, const Dealing&) = default;
};

/// A matrix on a grid: its rows dealt to grid rows, its columns to grid columns.
struct BlockCyclic {
  static constexpr Index widest_block = 128;

  Dealing rows, cols;

  struct Place {
    int rank;
    Index index;  ///< in the rank's column-major array
    friend bool operator==(const Place&, const Place&) = default;
  };

  [[nodiscard]] GridShape grid() const noexcept { return {rows.parts, cols.parts}; }
  [[nodiscard]] int grid_row(int rank) const noexcept { return rank / cols.parts; }
  [[nodiscard]] int grid_col(int rank) const noexcept { return rank % cols.parts; }
  [[nodiscard]] Index local_rows(int rank) const noexcept { return rows.count(grid_row(rank)); }
  [[nodiscard]] Index local_cols(int rank) const noexcept { return cols.count(grid_col(rank)); }
  [[nodiscard]] Index local_size(int rank) const noexcept {
    return local_rows(rank) * local_cols(rank);
  }
  [[nodiscard]] Place place(Index i, Index j) const noexcept;
  /// The row and column of an element of a rank: the inverse of `place`.
  [[nodiscard]] std::pair<Index, Index> element(const Place& place) const noexcept;
  friend bool operator==(const BlockCyclic&, const BlockCyclic&) = default;
};

/// The layout of an m×n matrix, turned: min(m, n) rows and max(m, n) columns.
BlockCyclic block_cyclic(Index m, Index n, int ranks);
/// ScaLAPACK's sizes are 32-bit, those of its messages in bytes too. @throws ShapeError  the
/// largest panel on the grid of `x` is more than 2 GiB, or a side 2³¹.
void check_grid_sizes(const BlockCyclic& x);
/// The layout of XXᵀ for an X laid out as `x`: square, in blocks that are square too.
BlockCyclic gram_layout(const BlockCyclic& x);

/// A part of a row of elements.
struct Run {
  Index first = 0, count = 0;
  friend bool operator==(const Run&, const Run&) = default;
};
/// Of `total` elements dealt to `parts` as evenly as can be, the first parts one more.
Run even_run(Index total, int parts, int part);

/// Moves an m×n row-major matrix, of which every rank has a piece, to its block-cyclic layout and
/// back: one all_to_all each, of f32, that allocates nothing after the first calls. What a rank
/// sends is sorted by rank, then lies in the order of its piece.
class Redistribution {
 public:
  /// Pure. @param pieces  one per rank, of the matrix's flat elements; together each element once.
  /// @throws ShapeError  a piece lies outside the matrix, or the pieces are not m·n elements.
  Redistribution(Index m, Index n, std::span<const Region> pieces, int rank);
  /// Of a symmetric matrix of which every rank has an even run of the packed lower triangle (row
  /// after row). Its upper triangle on the grid is neither written nor read. Pure.
  /// @param square  a `gram_layout`.
  static Redistribution of_triangle(const BlockCyclic& square, int rank);

  /// `traffic` of rank `rank` of `ranks` alone, in whole messages: what a plan of thousands of
  /// ranks asks for.
  static Traffic traffic_of(Index m, Index n, const Region& piece, int ranks, int rank);

  [[nodiscard]] const BlockCyclic& layout() const noexcept { return layout_; }
  [[nodiscard]] Index piece_size() const noexcept { return piece_size_; }
  [[nodiscard]] Index local_size() const noexcept { return local_size_; }
  /// Elements this rank sends to each rank on the way to the grid, and gets from each: on the way
  /// back the two change places.
  [[nodiscard]] std::span<const Index> send_counts() const noexcept { return to_grid_; }
  [[nodiscard]] std::span<const Index> receive_counts() const noexcept { return from_pieces_; }
  /// What `to_grid` and `from_grid` together add to the communicator's traffic.
  [[nodiscard]] Traffic traffic(Index max_chunk) const;
  /// `to_grid` alone.
  [[nodiscard]] Traffic traffic_to_grid(Index max_chunk) const;

  /// Collective. `local` gets this rank's part of the layout. @param piece  this rank's elements,
  /// densely; @param sent, received  scratch of `piece_size` and `local_size` elements (`sent` may
  /// be `local`).
  void to_grid(const float* piece, float* sent, float* received, float* local, Communicator& comm);
  /// Collective: the way back. Scratch of `local_size` and `piece_size` elements (`received` may be
  /// `local`).
  void from_grid(const float* local, float* sent, float* received, float* piece,
                 Communicator& comm);

 private:
  struct Rectangle {  // of the matrix as it lies in memory, not turned
    Index first_row, rows, first_col, cols;
  };
  /// Where the elements of a rectangle that one rank holds lie in its array.
  struct Patch {
    Index first, rows, cols;
  };
  /// Without pieces.
  Redistribution(Index m, Index n, int ranks, int rank);
  Redistribution(const BlockCyclic& layout, bool turned, int rank);
  void cut(const Region& piece);
  /// What goes where, when all pieces are cut.
  void count();
  [[nodiscard]] std::span<const Rectangle> rectangles_of(int rank) const;
  [[nodiscard]] Patch patch(const Rectangle& r, int rank) const;
  template <class Copy>
  void walk_piece(Copy&& copy);
  template <class Copy>
  void walk_local(Copy&& copy) const;

  BlockCyclic layout_;
  Dealing down_, right_;            // of the matrix's own rows and columns
  int down_stride_, right_stride_;  // ranks from one part to the next
  Index row_stride_, col_stride_;   // elements of the local array
  int rank_;
  Index piece_size_ = 0, local_size_ = 0;
  std::vector<Rectangle> rectangles_;         // of all pieces, in their order
  std::vector<std::size_t> first_rectangle_;  // of each rank, and the end
  std::vector<Index> to_grid_, from_pieces_, cursors_;
};

/// Copies the blocks below the diagonal of a square block-cyclic matrix, transposed, to those above
/// it, and the lower triangle of the diagonal blocks to the upper one: then the matrix is exactly
/// symmetric. One all_to_all, no allocation after the first calls.
class Mirror {
 public:
  /// Pure. @param layout  a `gram_layout`.
  Mirror(const BlockCyclic& layout, int rank);
  /// Scratch of `operator()`, in elements: at most those of the rank's part.
  [[nodiscard]] Index scratch_size() const noexcept { return sent_ + received_; }
  [[nodiscard]] Traffic traffic(Index max_chunk) const;
  /// Collective.
  void operator()(float* local, float* scratch, Communicator& comm);

 private:
  struct Block {
    Index first, rows, cols;  ///< in the local array
  };
  template <class Visit>
  void blocks_above(Visit&& visit) const;
  template <class Visit>
  void blocks_below(Visit&& visit) const;

  BlockCyclic layout_;
  int rank_;
  Index sent_ = 0, received_ = 0;
  std::vector<Index> send_counts_, receive_counts_, cursors_;
};

/// Widest panel of columns `ProcessGrid::gram` computes at a time: PBLAS's own (pilaenv).
inline constexpr int gram_panel = 32;

/// What `ProcessGrid::gram` sends for an X laid out as `x`, by BLACS: per block of rows, panels of
/// X broadcast along grid columns (a ring, point to point) and partial products summed along grid
/// rows (MPI_Reduce).
Traffic gram_traffic(const BlockCyclic& x, int rank);
/// What `ProcessGrid::multiply` sends: per block, columns of the factor broadcast along grid rows
/// and rows of X along grid columns, both on rings.
Traffic product_traffic(const BlockCyclic& x, int rank);

}  // namespace orthrus::comm
