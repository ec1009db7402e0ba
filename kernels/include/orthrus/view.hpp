#pragma once
/// @file
/// Views: how buffers are passed around. A view owns nothing.

#include <cstddef>
#include <orthrus/dtype.hpp>

namespace orthrus {

/// Read-only row-major rows×cols matrix; row i starts at element i·ld.
struct ConstMatrixView {
  const void* data = nullptr;
  Index rows = 0, cols = 0, ld = 0;
  DType dtype = DType::f32;

  [[nodiscard]] Index size() const noexcept { return rows * cols; }
  [[nodiscard]] bool contiguous() const noexcept { return ld == cols || rows <= 1; }
};

/// Writable row-major rows×cols matrix; row i starts at element i·ld.
struct MatrixView {
  void* data = nullptr;
  Index rows = 0, cols = 0, ld = 0;
  DType dtype = DType::f32;

  [[nodiscard]] Index size() const noexcept { return rows * cols; }
  [[nodiscard]] bool contiguous() const noexcept { return ld == cols || rows <= 1; }
  operator ConstMatrixView() const noexcept { return {data, rows, cols, ld, dtype}; }
};

/// Contiguous rows×cols view of `data`.
template <class T>
MatrixView matrix_view(T* data, Index rows, Index cols) noexcept {
  return {data, rows, cols, cols, dtype_of<T>};
}
template <class T>
ConstMatrixView matrix_view(const T* data, Index rows, Index cols) noexcept {
  return {data, rows, cols, cols, dtype_of<T>};
}

/// A flat run of `count` elements, as messages carry it.
struct Span {
  void* data = nullptr;
  Index count = 0;
  DType dtype = DType::f32;

  [[nodiscard]] std::size_t bytes() const noexcept {
    return static_cast<std::size_t>(count) * bytes_of(dtype);
  }
};

/// Read-only `Span`.
struct ConstSpan {
  const void* data = nullptr;
  Index count = 0;
  DType dtype = DType::f32;

  ConstSpan() = default;
  ConstSpan(const void* d, Index n, DType t) noexcept : data(d), count(n), dtype(t) {}
  ConstSpan(Span s) noexcept : data(s.data), count(s.count), dtype(s.dtype) {}
  [[nodiscard]] std::size_t bytes() const noexcept {
    return static_cast<std::size_t>(count) * bytes_of(dtype);
  }
};

}  // namespace orthrus
