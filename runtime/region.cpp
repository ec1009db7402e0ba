#include "runtime/region.hpp"

#include <algorithm>
#include <type_traits>

#include "kernels/bf16.hpp"

namespace orthrus::runtime {
namespace {

/// Element of the tensor's buffer that holds flat element `flat`.
Index position(const ParameterShape& p, Index flat) {
  Index at = 0;
  for (std::size_t d = p.shape.size(); d-- > 0;) {
    at += flat % p.shape[d] * p.strides[d];
    flat /= p.shape[d];
  }
  return at;
}

template <class Tensor>
auto element(Tensor* data, Index at, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<Tensor>, const std::byte, std::byte>;
  return static_cast<Byte*>(data) + static_cast<std::size_t>(at) * bytes_of(dtype);
}

/// Runs of the innermost dimension: `f(flat, place in the dense region, count)`.
template <class F>
void for_each_run(const ParameterShape& p, const Region& r, F&& f) {
  const Index inner = p.shape.back();
  for (Index row = 0; row < r.rows; ++row) {
    Index flat = r.first + row * r.distance;
    const Index end = flat + r.cols;
    while (flat < end) {
      const Index n = std::min(end - flat, inner - flat % inner);
      f(flat, row * r.cols + (flat - r.first - row * r.distance), n);
      flat += n;
    }
  }
}

float load(const void* data, DType dtype, Index at) {
  const auto* p = element(data, at, dtype);
  return dtype == DType::bf16 ? kernels::to_float(*reinterpret_cast<const BFloat16*>(p))
                              : *reinterpret_cast<const float*>(p);
}
void store(void* data, DType dtype, Index at, float value) {
  auto* p = element(data, at, dtype);
  if (dtype == DType::bf16) {
    *reinterpret_cast<BFloat16*>(p) = kernels::to_bf16(value);
  } else {
    *reinterpret_cast<float*>(p) = value;
  }
}

/// `count` elements at equal distances, as one column.
template <class Tensor>
auto column(Tensor* data, Index at, Index count, Index stride, DType dtype) {
  using View = std::conditional_t<std::is_const_v<Tensor>, ConstMatrixView, MatrixView>;
  return View{element(data, at, dtype), count, 1, stride, dtype};
}

}  // namespace

bool is_contiguous(const ParameterShape& p) {
  if (p.strides.empty()) return true;
  Index expected = 1;
  for (std::size_t d = p.shape.size(); d-- > 0;) {
    if (p.shape[d] != 1 && p.strides[d] != expected) return false;
    expected *= p.shape[d];
  }
  return true;
}

void pack(const ParameterShape& p, const void* from, DType dtype, const Region& r, Span to,
          kernels::Backend& backend) {
  if (is_contiguous(p)) {
    backend.convert({element(from, r.first, dtype), r.rows, r.cols, r.distance, dtype}, 1,
                    {to.data, r.rows, r.cols, r.cols, to.dtype});
    return;
  }
  const Index stride = p.strides.back();
  for_each_run(p, r, [&](Index flat, Index dense, Index n) {
    const Index at = position(p, flat);
    if (!backend.on_host()) {
      return backend.convert(column(from, at, n, stride, dtype), 1,
                             column(to.data, dense, n, 1, to.dtype));
    }
    for (Index i = 0; i < n; ++i) {
      store(to.data, to.dtype, dense + i, load(from, dtype, at + i * stride));
    }
  });
}

void unpack(ConstSpan from, const ParameterShape& p, void* to, DType dtype, const Region& r,
            kernels::Backend& backend) {
  if (is_contiguous(p)) {
    backend.convert({from.data, r.rows, r.cols, r.cols, from.dtype}, 1,
                    {element(to, r.first, dtype), r.rows, r.cols, r.distance, dtype});
    return;
  }
  const Index stride = p.strides.back();
  for_each_run(p, r, [&](Index flat, Index dense, Index n) {
    const Index at = position(p, flat);
    if (!backend.on_host()) {
      return backend.convert(column(from.data, dense, n, 1, from.dtype), 1,
                             column(to, at, n, stride, dtype));
    }
    for (Index i = 0; i < n; ++i) {
      store(to, dtype, at + i * stride, load(from.data, from.dtype, dense + i));
    }
  });
}

void read_piece(const WeightFormat& format, const void* piece, const ParameterShape& p, void* to,
                DType dtype, const Region& r, kernels::Backend& backend) {
  if (!format.quantized()) {
    return unpack({piece, r.size(), format.dtype}, p, to, dtype, r, backend);
  }
  const QuantizedView codes = format.view(const_cast<void*>(piece), r.rows, r.cols);  // only read
  backend.dequantize(codes, *format.grid,
                     {element(to, r.first, dtype), r.rows, r.cols, r.distance, dtype});
}

void copy_codes(ConstQuantizedView from, const Grid& grid, QuantizedView to,
                kernels::Backend& backend) {
  const Index row = code_pitch(grid.format, to.cols);
  const bool dense = to.rows <= 1 || (from.pitch == row && to.pitch == row);
  const Index times = dense ? 1 : to.rows;
  const auto bytes = static_cast<std::size_t>(dense ? to.rows * row : row);
  for (Index i = 0; i < times; ++i) {
    backend.copy(static_cast<const std::byte*>(from.codes) + i * from.pitch,
                 static_cast<std::byte*>(to.codes) + i * to.pitch, bytes);
  }
  const Index rows = scale_rows(grid, to.rows);
  const Index cols = scale_cols(grid, to.cols);
  backend.convert({from.scales, rows, cols, rows == 1 ? cols : from.scale_pitch, DType::f32}, 1,
                  {to.scales, rows, cols, rows == 1 ? cols : to.scale_pitch, DType::f32});
}

}  // namespace orthrus::runtime
