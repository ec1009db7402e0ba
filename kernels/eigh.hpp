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
/// @throws ShapeError    shapes or dtypes contradict each other, `work` is too small, or m > 32000.
/// @par Cost  about 9·m³ flops in f64, half of them slow: `spd_root_eigh` of 1024×1024 takes the
/// time
///            of 19 f32 products of its size. No message; on a device two copies.
void eigh(ConstMatrixView a, MatrixView vectors, std::span<double> values,
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
