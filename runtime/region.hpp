#pragma once
/// @file
/// Region: where a segment of a bucket lies in its parameter, and the copies between the two.

#include "kernels/backend.hpp"
#include "runtime/plan.hpp"

namespace orthrus::runtime {

/// Rows of elements at equal distances in the row-major order of a parameter: a block of it, or a
/// run.
struct Region {
  Index first = 0;  ///< flat element of the first row
  Index rows = 1, cols = 0;
  Index distance = 0;  ///< flat elements between rows
  [[nodiscard]] Index size() const noexcept { return rows * cols; }
};

/// `count` elements as one row, which is how runs of a bucket are worked on.
inline MatrixView row(void* data, Index count, DType dtype = DType::f32) {
  return {data, 1, count, count, dtype};
}

Region region_of(const Plan& plan, const Segment& segment);

/// to ← from's region, densely, rounded to `to.dtype`. `from` is the whole tensor (strides as
/// described).
void pack(const ParameterShape& parameter, const void* from, DType from_dtype, const Region& region,
          Span to, kernels::Backend& backend);
/// The region of `to` ← `from`.
void unpack(ConstSpan from, const ParameterShape& parameter, void* to, DType to_dtype,
            const Region& region, kernels::Backend& backend);

}  // namespace orthrus::runtime
