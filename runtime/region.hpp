#pragma once
/// @file
/// Copies between a parameter of the trainer and the segments of a bucket.

#include "kernels/backend.hpp"
#include "kernels/region.hpp"
#include "runtime/plan.hpp"

namespace orthrus::runtime {

/// `count` elements as one row, which is how runs of a bucket are worked on.
inline MatrixView row(void* data, Index count, DType dtype = DType::f32) {
  return {data, 1, count, count, dtype};
}

/// Are its elements where the row-major order of its shape puts them?
bool is_contiguous(const ParameterShape& parameter);

/// to ← from's region, densely, rounded to `to.dtype`. `from` is the whole tensor (strides as
/// described).
void pack(const ParameterShape& parameter, const void* from, DType from_dtype, const Region& region,
          Span to, kernels::Backend& backend);
/// The region of `to` ← `from`.
void unpack(ConstSpan from, const ParameterShape& parameter, void* to, DType to_dtype,
            const Region& region, kernels::Backend& backend);

/// A piece of weights, as they travel, becomes what the trainer has there: the exact product of
/// codes and scales where they are quantized. @pre such a tensor is dense
void read_piece(const WeightFormat& format, const void* piece, const ParameterShape& parameter,
                void* to, DType to_dtype, const Region& region, kernels::Backend& backend);

/// to ← from, bit for bit: codes and scales of equally many rows and columns.
/// @par Cost  one copy where both are dense, else one per row
void copy_codes(ConstQuantizedView from, const Grid& grid, QuantizedView to,
                kernels::Backend& backend);

}  // namespace orthrus::runtime
