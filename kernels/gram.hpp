#pragma once
/// @file
/// gram: msign through the small matrix XXᵀ. One sum of it over all ranks, and no other message.

#include <cstddef>
#include <orthrus/view.hpp>
#include <span>

#include "kernels/coefficients.hpp"
#include "kernels/norm.hpp"
#include "kernels/triangle.hpp"

namespace orthrus::kernels {
class Backend;

// ---- R = XXᵀ ----------------------------------------------------------------------------------

/// Scratch `gram_accumulate` needs for a short side m. @return bytes, a multiple of 256.
std::size_t gram_accumulate_workspace_bytes(Index m);

/// R ← βR + α·XXᵀ (wide) or βR + α·XᵀX (tall), summed in f64 and rounded to f32 once.
///
/// f32 `syrk` takes less than half the time, and is enough for five iterations. For six it is not,
/// on steep spectra: see the figures at `gram_polynomial`.
///
/// @param         x     m×n (wide) or n×m (tall), f32, any ld; n may be 0.
/// @param[in,out] r     m×m, f32; symmetric on input (β = 0: not read), exactly
///                      symmetric on output.
/// @param[out]    work  `gram_accumulate_workspace_bytes(m)` bytes, 64-byte aligned.
/// @throws ShapeError   shapes or dtypes contradict each other, or `work` is too small.
/// @par Cost  about m²n flops in f64; no message, no allocation.
void gram_accumulate(double alpha, ConstMatrixView x, bool wide, double beta, MatrixView r,
                     std::span<std::byte> work, Backend& backend);

// ---- Q with QX = p(X) -------------------------------------------------------------------------

/// ν = safety·√(tr R), and ε as msign adds it: in units of X as it is scaled here.
using GramOptions = NormOptions;

/// Is R in f32 accurate enough for `iterations`? An error in a small eigenvalue of R is lifted by
/// Π a² over all iterations but the last: yes while 2^-24 of that stays below 0.1. So: every
/// published table up to six iterations, but eco8 up to five. More precision in `gram_polynomial`
/// would not help, the error being in R: all eight of eco8 in f64, 128×512, σ = 1 … 1e-7: 0.24 when
/// R comes from f32 `syrk`, 3e-2 from `gram_accumulate`; rank one: 0.4 and 3e-3.
bool gram_is_stable(std::span<const Quintic> iterations);

/// How many iterations, from the first, `gram_polynomial` keeps in f64: those after which the
/// others still lift a rounding error by more than 16. Pure: the same on every rank. Jordan, You
/// and Polar Express: 2 of 5, 3 of 6.
Index gram_f64_iterations(std::span<const Quintic> iterations);

/// Flops of `gram_polynomial` where a symmetric product counts once: (4T − 3)·m³.
double gram_polynomial_flops(Index m, Index iterations);

/// Scratch `gram_polynomial` needs: 4m² floats (2m² without an f64 iteration) and two panels.
/// @return bytes, a multiple of 256.
std::size_t gram_polynomial_workspace_bytes(Index m, std::span<const Quintic> iterations);

/// Q with QX = U·p(Σ/ν)·Vᵀ for X = UΣVᵀ of which only R = XXᵀ is known; p composes `iterations`.
///
/// With p(x) = x·q(x²): Q = q(R/ν²)/ν. Per iteration S = bR + cR², then Q ← QS + aQ and, but for
/// the last, R ← ZRZ with Z = S + aI as two products with S. All factors commute, so only one
/// triangle of each product is computed, and mirrored.
///
/// There is no restart. R ← sym(QR₀Q) with the factors of Q multiplied at the end costs 2m³ more
/// than none, less than f64, and is about as accurate, but only while that product is left as it
/// is: not symmetric. Made symmetric it is wrong on X (rank one, polar_express_101, five
/// iterations: 1e-3 becomes 7e-2), and Q travels as a triangle. f64 in the first iterations does
/// the same and keeps Q symmetric. There S must be stored in f64 too: a rounded S has other
/// eigenvectors than R (cans, six iterations, 33×72, σ = 1 … 1e-7: 2e-2 instead of 1e-3).
///
/// Measured: largest relative Frobenius error of QX over all published tables (eco8 up to five), on
/// m×n = 5×9, 16×64, 33×72, 128×512, against f64 msign:
///
///     spectrum                  R by gram_accumulate     R by syrk, f32
///     iterations                   5         6             5         6
///     flat, Gaussian, 1 … 0.1    3e-5      6e-5          3e-5      7e-5
///     1 … 1e-3, 1 … 1e-7         2e-3      1e-3          2e-3      7e-3
///     of low rank                2e-3      9e-4          2e-3      5e-4
///     i^-1, i^-1.5, i^-2         5e-4      1e-3          3e-3      9e-3
///
/// `polar_express_101`, five iterations, 128×512: 8e-6, 4e-4, 1e-3, 3e-4; with syrk i^-2 is 2e-3.
///
/// @param         r            m×m, f32, symmetric, any ld. The caller has scaled X
///                             so that tr R lies between 1e-20 and 1e20.
/// @param         iterations   one polynomial each, applied in order; at least one.
/// @param[out]    q            m×m, f32; exactly symmetric. Not `r`.
/// @param[out]    row_squares  m numbers or none: (QRQ)ᵢᵢ, the squared norms of the rows of QX.
///                             An error of R enters lifted by (Π a)². Largest, in units of their
///                             mean, after five polar_express_101: Gaussian 2e-5, σ = 1 … 1e-7
///                             4e-3, rank 10 of 128 7e-3, rank one 0.2.
/// @param[out]    work         `gram_polynomial_workspace_bytes(...)` bytes, 64-byte aligned.
///
/// @post   tr R = 0: Q = 0. tr R = NaN or Inf: Q and the row squares are NaN.
/// @throws ShapeError  shapes or dtypes contradict each other, `iterations` is empty, or `work` is
///                     too small. Not when `gram_is_stable` says no: see `gram_is_plausible`.
/// @par Cost  `gram_polynomial_flops`, in f64 for `gram_f64_iterations`, and m² times the rows of a
///            panel (128) per product; row squares: 2m³ in f64. No message, no allocation.
/// @see    Gram Newton-Schulz, dao-ailab.github.io/blog/2026/gram-newton-schulz.
void gram_polynomial(ConstMatrixView r, std::span<const Quintic> iterations,
                     const GramOptions& options, MatrixView q, std::span<double> row_squares,
                     std::span<std::byte> work, Backend& backend);

/// Scratch of `gram_factor`. @return bytes, a multiple of 256.
std::size_t gram_factor_workspace_bytes(Index m);

/// The same in f32 throughout, for an R that is normalized already and few `iterations`, as `msign`
/// has between two products with X: Q = q(R) where p(x) = x·q(x²). bf16 will not do: factors that
/// are rounded do not commute, and half of a product no longer says what the other half is.
/// @param[in,out] r  m×m, f32, symmetric; spoiled.
/// @param[out]    q  m×m, f32; exactly symmetric. Not `r`.
/// @throws ShapeError  as `gram_polynomial`.
/// @par Cost  `gram_polynomial_flops`.
void gram_factor(MatrixView r, std::span<const Quintic> iterations, MatrixView q,
                 std::span<std::byte> work, Backend& backend);

/// Can these be the row squares of p(X) for a p that ends near 1? Each finite, their sum within
/// [0, 1.5 m]: an iteration that blew up fails this. So do tables cut short, whose p reaches 2.
bool gram_is_plausible(std::span<const double> row_squares);

}  // namespace orthrus::kernels
