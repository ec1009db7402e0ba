#pragma once
/// @file
/// Matrices in pieces: one per rank, cut in several ways.

#include <algorithm>
#include <orthrus/view.hpp>
#include <vector>

#include "kernels/region.hpp"
#include "support/zoo.hpp"

namespace orthrus::pieces {

enum class Cut { rows, columns, runs, alone };

/// One piece per rank; with more ranks than rows some are empty.
inline std::vector<Region> pieces_of(Index m, Index n, int ranks, Cut cut) {
  std::vector<Region> pieces;
  const auto part = [&](Index total, int r) { return total * r / ranks; };
  for (int r = 0; r < ranks; ++r) {
    switch (cut) {
      case Cut::rows: {
        const Index first = part(m, r);
        const Index rows = part(m, r + 1) - first;
        pieces.push_back({first * n, rows, n, n});
        break;
      }
      case Cut::columns: {
        const Index first = part(n, r);
        pieces.push_back({first, m, part(n, r + 1) - first, n});
        break;
      }
      case Cut::runs: {  // of lengths that have nothing to do with rows; the first is small
        const auto at = [&](int i) {
          return i == ranks ? m * n : std::min(m * n, part(m * n, i) / 3 + 2 * i);
        };
        pieces.push_back({at(r), 1, at(r + 1) - at(r), at(r + 1) - at(r)});
        break;
      }
      case Cut::alone:
        pieces.push_back(r == ranks - 1 ? Region{0, m, n, n} : Region{});
    }
  }
  return pieces;
}

inline std::vector<float> piece_of(const zoo::Dense<float>& x, const Region& region) {
  std::vector<float> piece;
  for (Index i = 0; i < region.rows; ++i) {
    const auto begin = x.data.begin() + region.first + i * region.distance;
    piece.insert(piece.end(), begin, begin + region.cols);
  }
  return piece;
}

struct Shape {
  Index m, n;
};
// Odd sizes, one row, one column, fewer rows than ranks, tall, more blocks than ranks, panels of
// more than 32 columns that are cut in two and in three.
inline const std::vector<Shape> shapes{
    {1, 1},    {1, 5},    {5, 1},    {1, 300},  {2, 3},    {3, 2},     {3, 3},     {4, 7},
    {5, 5},    {7, 16},   {16, 7},   {17, 33},  {33, 33},  {50, 20},   {65, 90},   {66, 66},
    {97, 100}, {131, 61}, {64, 256}, {128, 65}, {33, 700}, {260, 300}, {300, 270}, {385, 400}};

}  // namespace orthrus::pieces
