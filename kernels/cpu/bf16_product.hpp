#pragma once
/// @file
/// Bf16Product: how this CPU multiplies bf16 matrices.

#include <memory>

#include "kernels/backend.hpp"

namespace orthrus::kernels::cpu {

/// C ← α·op(A)·op(B) + β·C for bf16 A and B, checked and not empty: f32 sums, one rounding at the
/// end, none where C is f32. Buffers and compiled kernels are kept, so one object serves one thread
/// at a time.
class Bf16Product {
 public:
  virtual ~Bf16Product() = default;
  virtual void gemm(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b,
                    Transpose op_b, double beta, MatrixView c) = 0;
};

/// Widens to f32 and leaves the product to the BLAS; runs everywhere.
std::unique_ptr<Bf16Product> open_widened_product();
/// oneDNN; nullptr where it is not built in or has no bf16 kernel for this processor.
std::unique_ptr<Bf16Product> open_onednn_product();

}  // namespace orthrus::kernels::cpu
