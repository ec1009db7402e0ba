#pragma once
/// @file
/// Carve: matrices cut off the front of scratch, and out of one another.

#include <cstddef>
#include <orthrus/view.hpp>
#include <span>

namespace orthrus::kernels {

inline constexpr std::size_t piece_alignment = 256;

/// `bytes` up to the next multiple of the alignment.
constexpr std::size_t padded(std::size_t bytes) {
  return (bytes + piece_alignment - 1) / piece_alignment * piece_alignment;
}
/// What a rows×cols matrix takes of scratch: a multiple of the alignment.
constexpr std::size_t piece_bytes(Index rows, Index cols, DType dtype) {
  return padded(static_cast<std::size_t>(rows * cols) * bytes_of(dtype));
}

/// Cuts matrices off the front of `work`.
inline MatrixView carve(std::span<std::byte>& work, Index rows, Index cols, DType dtype) {
  const MatrixView piece{work.data(), rows, cols, cols, dtype};
  work = work.subspan(piece_bytes(rows, cols, dtype));
  return piece;
}

/// A block of a matrix.
inline MatrixView part(const MatrixView& m, Index row, Index rows, Index col, Index cols) {
  return {static_cast<std::byte*>(m.data) +
              static_cast<std::size_t>(row * m.ld + col) * bytes_of(m.dtype),
          rows, cols, m.ld, m.dtype};
}

}  // namespace orthrus::kernels
