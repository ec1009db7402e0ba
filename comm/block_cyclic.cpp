#include "comm/block_cyclic.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <orthrus/error.hpp>
#include <string>

#include "comm/cost.hpp"

namespace orthrus::comm {
namespace {

constexpr Index tile = 16;  // 16 floats are a cache line

Index sum(std::span<const Index> counts) {
  return std::accumulate(counts.begin(), counts.end(), Index{0});
}

/// cursors[r] ← where the part of rank r begins.
void begin_parts(std::span<const Index> counts, std::vector<Index>& cursors) {
  Index begin = 0;
  for (std::size_t r = 0; r < counts.size(); ++r) {
    cursors[r] = begin;
    begin += counts[r];
  }
}

Index bytes(Index elements) { return elements * static_cast<Index>(sizeof(float)); }

/// `messages` broadcasts of `elements` together, along a ring: all but the last rank pass them on.
Traffic ring(Index elements, Index messages, int size, int rank, int root) {
  if ((rank + 1) % size == root) return {};
  return {bytes(elements), messages};
}

/// to(i, j) ← from(i, j) for matrices of any strides.
void copy_matrix(Index rows, Index cols, const float* from, Index from_row, Index from_col,
                 float* to, Index to_row, Index to_col) {
  for (Index i0 = 0; i0 < rows; i0 += tile) {
    const Index i1 = std::min(i0 + tile, rows);
    for (Index j0 = 0; j0 < cols; j0 += tile) {
      const Index j1 = std::min(j0 + tile, cols);
      for (Index i = i0; i < i1; ++i) {
        for (Index j = j0; j < j1; ++j) {
          to[i * to_row + j * to_col] = from[i * from_row + j * from_col];
        }
      }
    }
  }
}

}  // namespace

GridShape grid_shape(int ranks) {
  expects(ranks >= 1, "a grid of no ranks");
  int rows = 1;
  for (int r = 2; r <= ranks / r; ++r) {
    if (ranks % r == 0) rows = r;
  }
  return {rows, ranks / rows};
}

Index Dealing::count_below(Index end, int part) const noexcept {
  const Index whole = end / block;  // blocks
  const Index rounds = whole / parts;
  const Index rest = whole % parts;
  return rounds * block + (part < rest ? block : part == rest ? end % block : 0);
}

BlockCyclic::Place BlockCyclic::place(Index i, Index j) const noexcept {
  const int r = rows.part_of(i);
  const int c = cols.part_of(j);
  return {r * cols.parts + c, rows.local(i) + cols.local(j) * rows.count(r)};
}

std::pair<Index, Index> BlockCyclic::element(const Place& place) const noexcept {
  const Index height = local_rows(place.rank);
  return {rows.global(grid_row(place.rank), place.index % height),
          cols.global(grid_col(place.rank), place.index / height)};
}

BlockCyclic block_cyclic(Index m, Index n, int ranks) {
  expects(m > 0 && n > 0, "a block-cyclic matrix without elements");
  const GridShape grid = grid_shape(ranks);
  const Index side = std::min(m, n);
  const Index length = std::max(m, n);
  const auto share = [&](Index extent) { return (extent - 1) / grid.cols + 1; };
  return {{side, std::min(share(side), BlockCyclic::widest_block), grid.rows},
          {length, share(length), grid.cols}};
}

void check_grid_sizes(const BlockCyclic& x) {
  constexpr Index limit = std::numeric_limits<int>::max();
  const Index panel = std::max(x.local_rows(0), x.local_cols(0)) * x.rows.block;  // rank 0 has most
  if (x.cols.extent > limit || bytes(panel) > limit) {
    throw ShapeError("a " + std::to_string(x.rows.extent) + "x" + std::to_string(x.cols.extent) +
                     " matrix on a grid of " + std::to_string(x.rows.parts) + "x" +
                     std::to_string(x.cols.parts) + " ranks has panels of " +
                     std::to_string(bytes(panel)) + " bytes; ScaLAPACK's sizes end at 2147483647");
  }
}

BlockCyclic gram_layout(const BlockCyclic& x) {
  return {x.rows, {x.rows.extent, x.rows.block, x.cols.parts}};
}

// ---- Redistribution

Run even_run(Index total, int parts, int part) {
  const Index share = total / parts;
  const Index more = total % parts;
  return {part * share + std::min<Index>(part, more), share + (part < more ? 1 : 0)};
}

Redistribution::Redistribution(Index m, Index n, int ranks, int rank)
    : Redistribution(block_cyclic(m, n, ranks), m > n, rank) {}

Redistribution::Redistribution(const BlockCyclic& layout, bool turned, int rank)
    : layout_(layout), rank_(rank) {
  const int grid_cols = layout_.cols.parts;
  down_ = turned ? layout_.cols : layout_.rows;
  right_ = turned ? layout_.rows : layout_.cols;
  down_stride_ = turned ? 1 : grid_cols;
  right_stride_ = turned ? grid_cols : 1;
  row_stride_ = turned ? layout_.local_rows(rank) : 1;
  col_stride_ = turned ? 1 : layout_.local_rows(rank);
  local_size_ = layout_.local_size(rank);
}

Redistribution::Redistribution(Index m, Index n, std::span<const Region> pieces, int rank)
    : Redistribution(m, n, static_cast<int>(pieces.size()), rank) {
  piece_size_ = pieces[static_cast<std::size_t>(rank)].size();

  Index total = 0;
  first_rectangle_.reserve(pieces.size() + 1);
  for (const Region& piece : pieces) {
    first_rectangle_.push_back(rectangles_.size());
    total += piece.size();
    if (piece.size() > 0) cut(piece);
  }
  first_rectangle_.push_back(rectangles_.size());
  if (total != m * n) {
    throw ShapeError("the pieces of a " + std::to_string(m) + "x" + std::to_string(n) +
                     " matrix have " + std::to_string(total) + " elements together");
  }
  count();
}

Redistribution Redistribution::of_triangle(const BlockCyclic& square, int rank) {
  Redistribution move{square, /*turned=*/false, rank};
  const int ranks = square.grid().ranks();
  const Index side = square.rows.extent;
  Index row = 0;
  Index col = 0;
  for (int r = 0; r < ranks; ++r) {
    move.first_rectangle_.push_back(move.rectangles_.size());
    Index left = even_run(side * (side + 1) / 2, ranks, r).count;
    if (r == rank) move.piece_size_ = left;
    while (left > 0) {
      const Index cols = std::min(row + 1 - col, left);
      move.rectangles_.push_back({row, 1, col, cols});
      left -= cols;
      col += cols;
      if (col <= row) continue;
      ++row;
      col = 0;
    }
  }
  move.first_rectangle_.push_back(move.rectangles_.size());
  // Half of the square is nobody's: what arrives is what the rank has of the triangle.
  move.count();
  move.local_size_ = sum(move.from_pieces_);
  return move;
}

void Redistribution::count() {
  const std::size_t ranks = first_rectangle_.size() - 1;
  to_grid_.assign(ranks, 0);
  from_pieces_.assign(ranks, 0);
  cursors_.assign(ranks, 0);
  for (std::size_t other = 0; other < ranks; ++other) {
    for (const Rectangle& r : rectangles_of(rank_)) {
      const Patch part = patch(r, static_cast<int>(other));
      to_grid_[other] += part.rows * part.cols;
    }
    for (const Rectangle& r : rectangles_of(static_cast<int>(other))) {
      const Patch part = patch(r, rank_);
      from_pieces_[other] += part.rows * part.cols;
    }
  }
}

void Redistribution::cut(const Region& piece) {
  const Index n = right_.extent;
  const Index last = piece.first + (piece.rows - 1) * piece.distance + piece.cols;
  if (piece.first < 0 || last > down_.extent * n) {
    throw ShapeError("a piece ends at element " + std::to_string(last) + " of a matrix of " +
                     std::to_string(down_.extent * n));
  }
  // A block of columns is one rectangle. A run is up to three: the end of a row, whole rows, the
  // beginning of one.
  if (piece.distance == n && piece.first % n + piece.cols <= n) {
    rectangles_.push_back({piece.first / n, piece.rows, piece.first % n, piece.cols});
    return;
  }
  const bool dense = piece.distance == piece.cols;
  const Index runs = dense ? 1 : piece.rows;
  const Index length = dense ? piece.size() : piece.cols;
  for (Index k = 0; k < runs; ++k) {
    Index at = piece.first + k * piece.distance;
    Index left = length;
    while (left > 0) {
      const Index col = at % n;
      const Index rows = col == 0 && left >= n ? left / n : 1;
      const Index cols = std::min(n - col, left);
      rectangles_.push_back({at / n, rows, col, cols});
      at += rows * cols;
      left -= rows * cols;
    }
  }
}

std::span<const Redistribution::Rectangle> Redistribution::rectangles_of(int rank) const {
  const auto r = static_cast<std::size_t>(rank);
  return std::span(rectangles_)
      .subspan(first_rectangle_[r], first_rectangle_[r + 1] - first_rectangle_[r]);
}

Redistribution::Patch Redistribution::patch(const Rectangle& r, int rank) const {
  const int down = rank / down_stride_ % down_.parts;
  const int right = rank / right_stride_ % right_.parts;
  const Index row = down_.count_below(r.first_row, down);
  const Index col = right_.count_below(r.first_col, right);
  return {row * row_stride_ + col * col_stride_,
          down_.count_below(r.first_row + r.rows, down) - row,
          right_.count_below(r.first_col + r.cols, right) - col};
}

Traffic Redistribution::traffic_of(Index m, Index n, const Region& piece, int ranks, int rank) {
  Redistribution move{m, n, ranks, rank};
  if (piece.size() > 0) move.cut(piece);
  Index kept = 0;
  for (const Rectangle& r : move.rectangles_) {
    const Patch part = move.patch(r, rank);
    kept += part.rows * part.cols;
  }
  return {bytes(piece.size() - kept) + bytes(move.local_size_ - kept), 2};
}

Traffic Redistribution::traffic_to_grid(Index max_chunk) const {
  return cost::all_to_all(to_grid_, rank_, sizeof(float), max_chunk);
}

Traffic Redistribution::traffic(Index max_chunk) const {
  return traffic_to_grid(max_chunk) +
         cost::all_to_all(from_pieces_, rank_, sizeof(float), max_chunk);
}

/// Calls copy(element of the buffer sorted by rank, element of the piece, elements) for each run of
/// the piece that goes to one rank.
template <class Copy>
void Redistribution::walk_piece(Copy&& copy) {
  begin_parts(to_grid_, cursors_);
  Index at = 0;
  for (const Rectangle& r : rectangles_of(rank_)) {
    const Index end = r.first_col + r.cols;
    for (Index i = r.first_row; i < r.first_row + r.rows; ++i) {
      const int row_of_ranks = down_.part_of(i) * down_stride_;
      for (Index j = r.first_col; j < end;) {
        const Index run = std::min(right_.block - j % right_.block, end - j);
        const int to = row_of_ranks + right_.part_of(j) * right_stride_;
        Index& cursor = cursors_[static_cast<std::size_t>(to)];
        copy(cursor, at, run);
        cursor += run;
        at += run;
        j += run;
      }
    }
  }
}

/// Calls copy(element of the buffer sorted by rank, patch) for what this rank holds of each
/// rectangle.
template <class Copy>
void Redistribution::walk_local(Copy&& copy) const {
  Index at = 0;
  for (const Rectangle& r : rectangles_) {  // the pieces of all ranks, in their order
    const Patch part = patch(r, rank_);
    copy(at, part);
    at += part.rows * part.cols;
  }
}

void Redistribution::to_grid(const float* piece, float* sent, float* received, float* local,
                             Communicator& comm) {
  walk_piece([&](Index in_buffer, Index in_piece, Index run) {
    std::memcpy(sent + in_buffer, piece + in_piece, static_cast<std::size_t>(run) * sizeof(float));
  });
  comm.all_to_all({sent, piece_size_, DType::f32}, to_grid_, {received, local_size_, DType::f32},
                  from_pieces_);
  walk_local([&](Index in_buffer, const Patch& part) {
    copy_matrix(part.rows, part.cols, received + in_buffer, part.cols, 1, local + part.first,
                row_stride_, col_stride_);
  });
}

void Redistribution::from_grid(const float* local, float* sent, float* received, float* piece,
                               Communicator& comm) {
  walk_local([&](Index in_buffer, const Patch& part) {
    copy_matrix(part.rows, part.cols, local + part.first, row_stride_, col_stride_,
                sent + in_buffer, part.cols, 1);
  });
  comm.all_to_all({sent, local_size_, DType::f32}, from_pieces_,
                  {received, piece_size_, DType::f32}, to_grid_);
  walk_piece([&](Index in_buffer, Index in_piece, Index run) {
    std::memcpy(piece + in_piece, received + in_buffer,
                static_cast<std::size_t>(run) * sizeof(float));
  });
}

// ---- Mirror

Mirror::Mirror(const BlockCyclic& layout, int rank)
    : layout_(layout),
      rank_(rank),
      send_counts_(static_cast<std::size_t>(layout.grid().ranks())),
      receive_counts_(send_counts_.size()),
      cursors_(send_counts_.size()) {
  expects(layout.rows.extent == layout.cols.extent && layout.rows.block == layout.cols.block,
          "a mirror of a matrix whose blocks are not square");
  blocks_below([&](std::size_t to, const Block& b) { send_counts_[to] += b.rows * b.cols; });
  blocks_above([&](std::size_t from, const Block& b) { receive_counts_[from] += b.rows * b.cols; });
  sent_ = sum(send_counts_);
  received_ = sum(receive_counts_);
}

/// Calls visit(the rank of the transposed block, block) for the rank's blocks below the diagonal,
/// column by column.
template <class Visit>
void Mirror::blocks_below(Visit&& visit) const {
  const Dealing& rows = layout_.rows;
  const Dealing& cols = layout_.cols;
  const Index block = rows.block;
  const Index height = layout_.local_rows(rank_);
  const Index width = layout_.local_cols(rank_);
  for (Index lj = 0; lj < width; lj += block) {
    const Index j = cols.global(layout_.grid_col(rank_), lj);
    for (Index li = rows.count_below(std::min(j + block, rows.extent), layout_.grid_row(rank_));
         li < height; li += block) {
      const Index i = rows.global(layout_.grid_row(rank_), li);
      visit(static_cast<std::size_t>(layout_.place(j, i).rank),
            Block{li + lj * height, std::min(block, rows.extent - i),
                  std::min(block, cols.extent - j)});
    }
  }
}

/// The same for those above the diagonal, row by row: the order in which others send them.
template <class Visit>
void Mirror::blocks_above(Visit&& visit) const {
  const Dealing& rows = layout_.rows;
  const Dealing& cols = layout_.cols;
  const Index block = rows.block;
  const Index height = layout_.local_rows(rank_);
  const Index width = layout_.local_cols(rank_);
  for (Index li = 0; li < height; li += block) {
    const Index i = rows.global(layout_.grid_row(rank_), li);
    for (Index lj = cols.count_below(std::min(i + block, cols.extent), layout_.grid_col(rank_));
         lj < width; lj += block) {
      const Index j = cols.global(layout_.grid_col(rank_), lj);
      visit(static_cast<std::size_t>(layout_.place(j, i).rank),
            Block{li + lj * height, std::min(block, rows.extent - i),
                  std::min(block, cols.extent - j)});
    }
  }
}

Traffic Mirror::traffic(Index max_chunk) const {
  return cost::all_to_all(send_counts_, rank_, sizeof(float), max_chunk);
}

void Mirror::operator()(float* local, float* scratch, Communicator& comm) {
  const Index height = layout_.local_rows(rank_);
  float* const received = scratch + sent_;
  begin_parts(send_counts_, cursors_);
  blocks_below([&](std::size_t to, const Block& b) {
    copy_matrix(b.cols, b.rows, local + b.first, height, 1, scratch + cursors_[to], b.rows, 1);
    cursors_[to] += b.rows * b.cols;
  });
  comm.all_to_all({scratch, sent_, DType::f32}, send_counts_, {received, received_, DType::f32},
                  receive_counts_);
  begin_parts(receive_counts_, cursors_);
  blocks_above([&](std::size_t from, const Block& b) {
    // The block on the other side of the diagonal, column by column, is this one row by row.
    copy_matrix(b.rows, b.cols, received + cursors_[from], b.cols, 1, local + b.first, 1, height);
    cursors_[from] += b.rows * b.cols;
  });
  // On the diagonal: blocks whose rows and columns are this rank's.
  const Dealing& rows = layout_.rows;
  for (Index lj = 0; lj < layout_.local_cols(rank_); lj += rows.block) {
    const Index j = layout_.cols.global(layout_.grid_col(rank_), lj);
    if (rows.part_of(j) != layout_.grid_row(rank_)) continue;
    float* const block = local + rows.local(j) + lj * height;
    const Index side = std::min(rows.block, rows.extent - j);
    for (Index c = 1; c < side; ++c) {
      for (Index r = 0; r < c; ++r) block[r + c * height] = block[c + r * height];
    }
  }
}

// ---- traffic of the products

Traffic gram_traffic(const BlockCyclic& x, int rank) {
  const int grid_row = x.grid_row(rank);
  const int grid_col = x.grid_col(rank);
  const auto [p, q] = x.grid();
  const Index side = x.rows.extent;
  const Index block = x.rows.block;
  const Index local_cols = x.local_cols(rank);
  const bool cols_are_cut = x.cols.extent > x.cols.block;
  Traffic t;
  for (Index j = 0; j < side; j += block) {
    const Index width = std::min(block, side - j);
    const Index panels = (width - 1) / gram_panel + 1;
    const int root_row = x.rows.part_of(j);
    const auto root_col = static_cast<int>(j / block % q);
    if (p > 1 && side - j > block && local_cols > 0) {
      t += ring(width * local_cols, panels, p, grid_row, root_row);
    }
    const Index height = x.rows.count(grid_row) - x.rows.count_below(j, grid_row);
    if (q > 1 && cols_are_cut && height > 0) {
      t += {grid_col == root_col ? 0 : bytes(width * height), panels};
    }
  }
  return t;
}

Traffic product_traffic(const BlockCyclic& x, int rank) {
  const auto [p, q] = x.grid();
  const Index side = x.rows.extent;
  const Index block = x.rows.block;
  Traffic t;
  for (Index j = 0; j < side; j += block) {
    const Index width = std::min(block, side - j);
    const Index local_rows = x.local_rows(rank);
    const Index local_cols = x.local_cols(rank);
    if (q > 1 && x.cols.extent > x.cols.block && local_rows > 0) {
      t += ring(local_rows * width, 1, q, x.grid_col(rank), static_cast<int>(j / block % q));
    }
    if (p > 1 && side > block && local_cols > 0) {
      t += ring(width * local_cols, 1, p, x.grid_row(rank), x.rows.part_of(j));
    }
  }
  return t;
}

}  // namespace orthrus::comm
