#pragma once
/// @file
/// F32Product: f32 products where something is faster than the BLAS.

#include "kernels/backend.hpp"

namespace orthrus::kernels::cpu {

/// C ← α·op(A)·op(B) + β·C for f32 views, checked and not empty; with β = 0, C is not read. What
/// has one row or column must lie without gaps along k: there the kernel depends on the stride.
using F32Product = void (*)(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b,
                            Transpose op_b, double beta, MatrixView c);

/// oneDNN; nullptr where it is not built in, or has no AVX-512 for this processor.
F32Product onednn_f32_product();

}  // namespace orthrus::kernels::cpu
