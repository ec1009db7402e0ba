#pragma once
/// @file
/// rational_msign: msign by one rational function of the Gram matrix, in place of five polynomials.

#include <cstddef>
#include <orthrus/view.hpp>
#include <span>

#include "kernels/zolotarev.hpp"

namespace orthrus::kernels {
class Backend;

// For X = UΣVᵀ with R = XXᵀ (wide) or XᵀX (tall), m×m, and f of zolotarev.hpp:
//
//   K = C/√s₂·(I + Σⱼ aⱼ(R/s₂ + cⱼI)⁻¹),   KX = U·f(Σ/√s₂)·Vᵀ,   s₂ ≥ σ_max²
//
// so σ in [l·√s₂, √s₂] comes within `error` of 1, none exceeds 1 + error, and zero stays zero. The
// r inverses need nothing of each other: they can be on r ranks.
//
// R in f32 is known to 2^-24 of its norm, which at x = l is a share 2^-24/l² of σ²: 1.5e-2 at
// l = 2e-3, 6e-2 at 1e-3. Measured on thousands of matrices, results are within a quarter of that
// share of f, and exceed 1 + error by a sixth of it at most, where f has a maximum at a small x
// (2.4e-3 at l = 2e-3; in all but one of a hundred by less than 1e-4).

struct RationalReport {
  double s2 = 0;    ///< what σ² was divided by, in units of R; 0: R is zero; NaN: not finite
  int doubled = 0;  ///< shifts that had to be doubled: R was not semidefinite up to rounding
};

// ---- K from R ---------------------------------------------------------------------------------

/// Scratch for `rational_scale`, `rational_terms` and `rational_gram`.
/// @param at_once  terms computed at a time, each in a place of its own. With less room fewer are;
///                 and never more than `Backend::tasks_at_once`. It changes no bit.
/// @return bytes, a multiple of 256.
std::size_t rational_gram_workspace_bytes(Index m, int at_once = 1);

/// s₂: an upper bound, or nearly, of the largest eigenvalue of R.
///
/// 1.1·(θ + ‖Ry − θy‖) for the top Ritz pair (θ, y) of 12 Lanczos steps with full
/// re-orthogonalization from a fixed random vector, but not above min(‖R‖_F, ‖R‖₁), which are
/// bounds. Without the factor it has been at least 0.96 of the largest eigenvalue.
///
/// @param r  m×m, f32, symmetric.
/// @return 0 for R = 0, NaN where an entry is not finite.
/// @throws ShapeError  R is not a square f32 matrix, or `work` is too small.
/// @par Cost  12 products with R, and one pass over it; where the host may not follow the device's
/// pointers, a copy of R and 12 of vectors. Only R decides: equal on all ranks that have equal R.
double rational_scale(ConstMatrixView r, std::span<std::byte> work, Backend& backend);

/// term ← 2^e·C/√s₂·aⱼ·(R/s₂ + cⱼI)⁻¹, j from 0, rounded to f32: one summand of K but for a power
/// of two, e = ⌊log₂ √s₂⌋.
///
/// @param      s2    of `rational_scale`; 0 gives 0 and NaN gives NaN.
/// @param[out] term  m×m, f32, exactly symmetric. Not `r`.
/// @return cⱼ had to be doubled: with a finite semidefinite R and l ≥ 1e-3 that has not been seen.
/// @throws NumericError  R/s₂ + 2cⱼI is not positive definite either.
/// @throws ShapeError    shapes or dtypes contradict each other, or f has no term j.
/// @par Cost  m³ flops; no message, no allocation.
bool rational_term(ConstMatrixView r, double s2, const RationalSign& f, int j, MatrixView term,
                   Backend& backend);

/// Terms first … last − 1 as packed triangles (`pack_triangle`) one after another: what a rank
/// sends. Ranks may share the terms in any way: K of the sum of all r has the bits of
/// `rational_gram`.
/// @param[out] packed  (last − first)·m(m+1)/2 floats.
/// @return how many shifts had to be doubled.
int rational_terms(ConstMatrixView r, double s2, const RationalSign& f, int first, int last,
                   float* packed, std::span<std::byte> work, Backend& backend);

/// t₀ ← (t₀ + t₁) + … in this order.
/// @param[in,out] packed  all f.r terms, as `rational_terms` writes them.
void rational_sum(float* packed, const RationalSign& f, Index m, Backend& backend);
/// K ← 2^-e·(t₀ + 2^e·C/√s₂·I).
/// @param      packed  m(m+1)/2 floats, of `rational_sum`.
/// @param[out] k       m×m, f32; exactly symmetric.
void rational_of_sum(const float* packed, double s2, const RationalSign& f, MatrixView k,
                     Backend& backend);

/// K from R on one rank.
/// @param      r     m×m, f32, symmetric; tr R between 1e-20 and 1e20 or 0.
/// @param[out] k     m×m, f32, exactly symmetric. Not `r`. R = 0: K = 0; R not finite: K is NaN.
/// @param[out] work  `rational_gram_workspace_bytes(m)` bytes, 64-byte aligned.
/// @throws NumericError, ShapeError  as `rational_term`.
/// @par Cost  r·m³ flops.
RationalReport rational_gram(ConstMatrixView r, const RationalSign& f, MatrixView k,
                             std::span<std::byte> work, Backend& backend);

// ---- the whole --------------------------------------------------------------------------------

struct RationalOptions {
  /// What R is computed from: f32, or bf16. bf16 also rounds X, so that K fits it; the sums, the
  /// inverses and KX are f32. Its longer sums leave up to 9e-7 of ‖R‖ where f32 leaves 2e-7: for
  /// l ≥ 2e-3.
  DType gram = DType::f32;
  Index wanted = 0;  ///< as in `MsignOptions`
};

/// Scratch `rational_msign` needs for an m×n matrix. @param at_once  as above. @return bytes, a
/// multiple of 256.
std::size_t rational_msign_workspace_bytes(Index m, Index n, int at_once = 1);

/// Replaces X = UΣVᵀ by U·f(Σ/√s₂)·Vᵀ: X ← KX (wide) or XK (tall).
///
/// Entries far from 1 are first scaled by a power of two, so 1e-30 or 1e30 neither underflow nor
/// overflow; the reported s₂ is that of the scaled X. Zero stays exactly zero.
///
/// Measured on one core of a shared EPYC (Zen 5), ms, medians of 7 in turns (bench_rational),
/// Gaussian X; the error is max |uᵢᵀOvᵢ − 1| over σᵢ ≥ 5e-3·σ_max (768×3072):
///
///                      768×768   768×2304   768×3072   1024×4096   error
///     r = 3, l = 2e-3       20         35         41          94   0.042
///       gram bf16           19         32         37          84   0.042
///     r = 2, l = 5e-3       16         30         37          87   0.100
///       gram bf16           15         28         33          77   0.100
///     five quintics, f32    51        127        165         405   0.32 (Jordan)
///       bf16                26         66         86         205   0.32; 0.13 (Polar Express)
///
/// @param[in,out] x     m×n, row-major, f32; any ld.
/// @param[out]    root  where given: R^½ = (XXᵀ)^½ (wide) or (XᵀX)^½ (tall), f32, exactly
/// symmetric,
///                      as K·R: each singular value as far off as its sign is. 2m³ flops more.
/// @param[out]    work  `rational_msign_workspace_bytes(...)` bytes, 64-byte aligned.
/// @pre    every entry is finite: NaN and Inf make all of X NaN.
/// @throws NumericError  as `rational_term`.
/// @throws ShapeError    m or n is 0, X is not f32, or `work` is too small.
/// @par Cost  with m ≤ n: m²n + r·m³ + 2m²n flops; no message, no allocation.
RationalReport rational_msign(MatrixView x, const RationalSign& f, const RationalOptions& options,
                              std::span<std::byte> work, Backend& backend, MatrixView root = {});

}  // namespace orthrus::kernels
