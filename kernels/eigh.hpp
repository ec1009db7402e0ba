#pragma once
/// @file
/// eigh: eigenvectors of a symmetric matrix by LAPACK, on the host; and roots by them, as judge of
/// spd_root and for what it cannot do.

#include <cstddef>
#include <cstdint>
#include <orthrus/view.hpp>
#include <span>

#include "kernels/spd_root.hpp"

namespace orthrus::kernels {
class Backend;

/// Flops of one root by eigenvectors, nominal; and of f32 products that take as long on a CPU.
constexpr double eigh_root_flops(double m) { return 10 * m * m * m; }
constexpr double eigh_root_product_flops(double m) { return 38 * m * m * m; }

/// Of a matrix whose eigenvectors LAPACK makes: its scratch is counted in 32 bits.
constexpr Index largest_eigh_side = 32000;

/// Scratch of `eigh` and `spd_root_eigh`. @return bytes, a multiple of 256.
std::size_t eigh_workspace_bytes(Index m);
std::size_t spd_root_eigh_workspace_bytes(Index m);

/// A = VᵀΛV: row i of V is the unit eigenvector of values[i], which ascend.
///
/// By dsyevd, in f64 whatever A's type is. On a device it is the host that works: A goes there and
/// V comes back.
///
/// @param      a        m×m, f32 or f64, all of it finite; the lower triangle is read.
/// @param[out] vectors  m×m, f64, without gaps, on the device; not `a`.
/// @param[out] values   m numbers of the host.
/// @param[out] work     `eigh_workspace_bytes(m)` bytes, 64-byte aligned, on the device.
/// @throws NumericError  an entry is not finite, or dsyevd does not converge.
/// @throws ShapeError    shapes or dtypes contradict each other, `work` is too small, or m >
/// `largest_eigh_side`.
/// @par Cost  about 9·m³ flops in f64, half of them slow: `spd_root_eigh` of 1024×1024 takes the
/// time
///            of 19 f32 products of its size. No message; on a device two copies.
void eigh(ConstMatrixView a, MatrixView vectors, std::span<double> values,
          std::span<std::byte> work, Backend& backend);

/// Scratch of `spectral_function`. @return bytes, a multiple of 256.
std::size_t spectral_function_workspace_bytes(Index m);

/// to ← VᵀFV, exactly symmetric: f(A) for the V of `eigh` and f of its eigenvalues.
/// @param      vectors  as `eigh` left them.
/// @param      f        m numbers, none negative.
/// @param[out] to       m×m, f32 or f64.
/// @throws ShapeError   shapes or dtypes contradict each other, or `work` is too small.
/// @par Cost  m³ flops in f64.
void spectral_function(ConstMatrixView vectors, std::span<const double> f, MatrixView to,
                       std::span<std::byte> work, Backend& backend);

/// Scratch of `orthogonal_iteration`. @return bytes, a multiple of 256.
std::size_t orthogonal_iteration_workspace_bytes(Index m);

/// Flops of one, nominal; and of f32 products that take as long on a CPU.
constexpr double orthogonal_iteration_flops(double m) { return 5 * m * m * m; }
constexpr double orthogonal_iteration_product_flops(double m) { return 24 * m * m * m; }

/// One step towards eigenvectors from others: the rows of V are put in descending order of vᵀAv,
/// then V ← the orthonormal rows that Gram–Schmidt makes of V(A + δI), δ = 2^-20·‖A‖_F. The shift
/// changes no eigenvector; without it those of a singular A's null space would be drawn anew from
/// rounding in every step.
///
/// By dgeqrf, in f64, on the host; signs are LAPACK's.
///
/// @param         a        m×m, f32 or f64, symmetric.
/// @param[in,out] vectors  m×m, f64, without gaps, on the device: orthonormal rows.
/// @param[out]    order    m numbers of the host: row i was row order[i].
/// @param[out]    work     `orthogonal_iteration_workspace_bytes(m)` bytes, 64-byte aligned.
/// @throws NumericError  an entry is not finite.
/// @throws ShapeError    as `eigh`.
/// @par Cost  2·m³ flops of products and 8/3·m³ of reflections, in f64; on a device two copies.
void orthogonal_iteration(ConstMatrixView a, MatrixView vectors, std::span<Index> order,
                          std::span<std::byte> work, Backend& backend);

/// What an eigenvalue λ of P becomes. δ is that of `Damping`.
enum class Eigenvalues : std::uint8_t {
  damp,   ///< max(λ, 0) + δ: for a positive P what `spd_root` means
  shift,  ///< λ − min(λ_min, 0) + δ: Shampoo as released
  clamp,  ///< max(λ, δ): KL-Shampoo
};

struct EighReport {
  double least = 0, largest = 0;  ///< eigenvalues of P, as they were
  double damping = 0;             ///< δ
  Index negative = 0;             ///< how many eigenvalues of P are below 0
};

/// inverse ← D^(−exponent), root ← D^exponent, D = P with its eigenvalues as `how` has them.
/// @param      p        m×m, f32 or f64, symmetric, any ld.
/// @param[out] inverse  m×m of P's type, exactly symmetric, or none. May be `p`.
/// @param[out] root     as `inverse`, and not `inverse`.
/// @param[out] work     `spd_root_eigh_workspace_bytes(m)` bytes, 64-byte aligned, on the device.
/// @throws NumericError  as `eigh`; or D is singular, which only δ = 0 leaves it.
/// @throws ShapeError    as `eigh`. @throws ConfigError  a damping is negative, or exponent ≤ 0.
/// @par Cost  `eigh`, and m³ flops in f64 per output.
EighReport spd_root_eigh(ConstMatrixView p, double exponent, const Damping& damping,
                         Eigenvalues how, MatrixView inverse, MatrixView root,
                         std::span<std::byte> work, Backend& backend);

}  // namespace orthrus::kernels
