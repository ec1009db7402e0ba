#pragma once
/// @file
/// The CPU's loops over contiguous runs. Strides, blocks and checks are the backend's.

#include <cstdint>
#include <orthrus/dtype.hpp>

#include "kernels/adamw_constants.hpp"
#include "kernels/bf16.hpp"

namespace orthrus::kernels::cpu {

/// to ← scale·from; `to` may be `from` where the types are equally wide or the result is narrower.
void convert(DType from_type, const void* from, double scale, DType to_type, void* to, Index n);
void round_stochastic(const float* from, BFloat16* to, Index n, std::uint64_t key,
                      std::uint64_t step, std::uint64_t first);

void axpby(double a, const float* x, double b, float* y, Index n);
void axpby(double a, const double* x, double b, double* y, Index n);
void axpby(double a, const BFloat16* x, double b, BFloat16* y, Index n);

void sign(const float* from, float* to, Index n);
void sign(const double* from, double* to, Index n);
void sign(const BFloat16* from, BFloat16* to, Index n);

void decay_step(float rho, float eta, const float* u, float* w, Index n);
/// Writes U too, for the sum of its squares.
void adamw(const AdamWConstants& s, const float* g, float* m, float* v, float* w, float* u,
           Index n);

/// Σ x² of at most `Backend::sum_block` elements: lane l takes elements l, l + 8, …; then
/// ((0+1)+(2+3)) + ((4+5)+(6+7)).
double block_sum_squares(const float* x, Index n);
double block_sum_squares(const double* x, Index n);
double block_sum_squares(const BFloat16* x, Index n);
/// sums[j] += x[j]².
void add_squares(const float* x, double* sums, Index n);
void add_squares(const double* x, double* sums, Index n);
void add_squares(const BFloat16* x, double* sums, Index n);

/// max |x|; NaN when there is one.
double abs_max(const float* x, Index n);
double abs_max(const double* x, Index n);
double abs_max(const BFloat16* x, Index n);

/// x[j] ← x[j]·s[j·step], step 0 or 1.
void scale(const double* s, Index step, float* x, Index n);
void scale(const double* s, Index step, double* x, Index n);
void scale(const double* s, Index step, BFloat16* x, Index n);

/// Cholesky of a small matrix, and the inverse of its factor: A = LLᵀ, x ← L⁻¹. Contiguous.
/// @param[in,out] a  n×n, only i ≤ j is used; ends as Lᵀ.
/// @param[out]    x  n×n, with zeros above the diagonal.
/// @return false when a pivot is not a positive finite number.
bool invert_factor(double* a, double* x, Index n);
/// to ← −xᵀx, its lower triangle, for such an x.
void negative_square(const double* x, double* to, Index n);

}  // namespace orthrus::kernels::cpu
