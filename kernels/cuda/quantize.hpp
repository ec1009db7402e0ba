#pragma once
/// @file
/// CUDA's loops over codes, with the CPU's bits. As in elementwise.hpp: arguments have been
/// checked, no view is empty, everything enters `stream`.

#include <cstdint>
#include <orthrus/quantized.hpp>
#include <orthrus/stream.hpp>
#include <orthrus/view.hpp>

#include "kernels/backend.hpp"

namespace orthrus::kernels::cuda {

/// `out` holds zeros.
void abs_maxima(ConstMatrixView w, const Grid& grid, MatrixView out, Stream stream);
void scales_from_maxima(const Grid& grid, MatrixView scales, Stream stream);
/// `key` is `mix_seed(seed, stream_id)`.
void quantize(MatrixView w, const Grid& grid, const Rounding& rounding, std::uint64_t key,
              QuantizedView q, Stream stream);
void dequantize(ConstQuantizedView q, const Grid& grid, MatrixView to, Stream stream);
/// As the bits of an int64.
void count_beyond(ConstMatrixView w, const Grid& grid, ConstMatrixView scales, double* out,
                  Stream stream);

}  // namespace orthrus::kernels::cuda
