#include <algorithm>
#include <cmath>
#include <orthrus/codes.hpp>
#include <orthrus/error.hpp>
#include <vector>

#include "kernels/backend.hpp"
#include "runtime/weight_format.hpp"

namespace orthrus {

std::optional<Grid> grid_of(const WeightsConfig& weights) {
  return runtime::weight_format(weights).grid;
}

void quantize(ConstMatrixView w, const Grid& grid, QuantizedView q, MatrixView maxima) {
  if (q.rows != w.rows || q.cols != w.cols) {
    throw ShapeError("quantize: " + std::to_string(q.rows) + "x" + std::to_string(q.cols) +
                     " codes do not fit " + std::to_string(w.rows) + "x" + std::to_string(w.cols) +
                     " weights");
  }
  if (w.size() == 0) return;
  const auto backend = kernels::open_backend("cpu");
  const MatrixView scales = runtime::scales_of(q, grid);
  backend->abs_maxima(w, grid, scales);
  for (Index i = 0; i < scales.rows; ++i) {
    const float* const row = static_cast<const float*>(scales.data) + i * scales.ld;
    if (!std::all_of(row, row + scales.cols, [](float m) { return std::isfinite(m); })) {
      throw NumericError("quantize: a weight in row " + std::to_string(i) + " is not finite");
    }
  }
  if (maxima.data != nullptr) backend->convert(scales, 1, maxima);
  backend->scales_from_maxima(grid, scales);
  // The verb leaves what rounding took in place of the weights.
  const Index rows = std::clamp<Index>((Index{1} << 14) / w.cols, 1, w.rows);
  std::vector<float> panel(static_cast<std::size_t>(rows * w.cols));
  for (Index first = 0; first < w.rows; first += rows) {
    const Index count = std::min(rows, w.rows - first);
    const MatrixView values = matrix_view(panel.data(), count, w.cols);
    backend->convert({static_cast<const std::byte*>(w.data) +
                          static_cast<std::size_t>(first * w.ld) * bytes_of(w.dtype),
                      count, w.cols, w.ld, w.dtype},
                     1, values);
    backend->quantize(values, grid, {}, rows_of(q, first, count));
  }
}

void dequantize(ConstQuantizedView q, const Grid& grid, MatrixView to) {
  kernels::open_backend("cpu")->dequantize(q, grid, to);
}

}  // namespace orthrus
