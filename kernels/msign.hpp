#pragma once
/// @file
/// msign: the direction Muon walks in.

#include <cstddef>
#include <orthrus/view.hpp>
#include <span>

#include "kernels/coefficients.hpp"
#include "kernels/norm.hpp"

namespace orthrus::kernels {
class Backend;

struct MsignOptions {
  DType dtype = DType::f32;  ///< the iteration's: f32, bf16 or f64
  EpsMode eps_mode = EpsMode::none;
  double eps = 1e-7;
  /// f32 products take about twice the time of bf16 ones, as on processors, not 15 times.
  bool fast_f32 = true;
  /// So many lines of the long side, from the first, are all that is asked for: the last product
  /// makes no others, and what is left of them is not defined. 0: all.
  Index wanted = 0;
};

/// x ← x·2^exponent, exactly. In two halves: 2^-149, say, has no f32 reciprocal.
void scale_by_power(MatrixView x, int exponent, Backend& backend);

/// How often `msign` multiplies an m×n X where it has R = XXᵀ of the short side serve several
/// iterations, which then run on R (`gram_factor`, f32); 0: every iteration multiplies X. Long
/// matrices in f32 and bf16, as measured. Pure: shape, options and coefficients decide.
Index msign_gram_products(Index m, Index n, std::span<const Quintic> iterations,
                          const MsignOptions& options);

/// Scratch `msign` needs for an m×n matrix. @return bytes, a multiple of 256.
std::size_t msign_workspace_bytes(Index m, Index n, DType input, const MsignOptions& options);

/// Replaces X = UΣVᵀ by U·p(Σ/ν)·Vᵀ, where p composes `iterations` and ν = safety·‖X‖_F:
/// approximately its nearest semi-orthogonal matrix UVᵀ.
///
/// X ← X/ν, then per iteration X ← aX + (bA + cA²)X with A = XXᵀ (wide) or X ← aX + X(bA + cA²)
/// with A = XᵀX (tall): A is always on the short side. For long X (`msign_gram_products`) two or
/// three iterations become one product QX, Q being their polynomial of R = XXᵀ; R is then computed
/// anew, so errors are those of X ← aX + … (test_msign). The norm is taken after an exact scaling
/// by a power of two, so entries of 1e-30 or 1e30 neither underflow nor overflow, and the cast to
/// `options.dtype` follows the normalization; the last product of bf16 is stored in f32. Zero stays
/// exactly zero. No number comes to the host: on a device msign is a sequence of launches, which
/// `Backend::replay` can keep, and nothing is waited for.
///
/// @param[in,out] x           m×n, row-major, f32 or f64; any ld.
/// @param         iterations  one polynomial each, applied in order; at least one.
/// @param         safety      ν = safety·‖X‖_F; a table's own input factor
/// (`CoefficientTable::safety`).
/// @param[out]    work        at least `msign_workspace_bytes(...)` bytes, 64-byte aligned.
/// @pre    every entry is finite: NaN and Inf are carried through, not looked for.
/// @throws ShapeError  m or n is 0, `iterations` is empty, or `work` is too small.
/// @par Cost  with m the short side, per iteration 3m²n + m³ flops (symmetric products count once);
///            T iterations by G products with R: 3G·m²n + (4T − 3G)·m³. No message, no allocation.
/// @see    K. Jordan et al., Muon, 2024, kellerjordan.github.io/posts/muon; arXiv:2409.20325, why;
///         Gram Newton-Schulz, dao-ailab.github.io/blog/2026/gram-newton-schulz.
void msign(MatrixView x, std::span<const Quintic> iterations, double safety,
           const MsignOptions& options, std::span<std::byte> work, Backend& backend);

}  // namespace orthrus::kernels
