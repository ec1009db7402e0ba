#pragma once
/// @file
/// spd_root: P^(±s/r) of a symmetric positive definite P, by products alone.

#include <cstddef>
#include <cstdint>
#include <orthrus/view.hpp>
#include <span>
#include <string>

#include "kernels/root_coefficients.hpp"

namespace orthrus::kernels {
class Backend;

/// What is added to the diagonal: D = P + δI, δ = absolute + of_mean·tr P/m + of_norm·‖P‖_F.
struct Damping {
  double absolute = 0;
  double of_mean = 0;
  /// f32 knows no eigenvalue below a few 2^-24 of the norm. 1e-12 will do for f64.
  double of_norm = 1e-5;

  /// δ, the trace taken as 0 if it is negative. @throws ConfigError  one of them is negative.
  [[nodiscard]] double on_diagonal(double trace, double norm, Index m) const;
};

struct RootOptions {
  int r = 2;  ///< 1, 2 or 4
  Damping damping;
  /// Eigenvalues of D are at least this share of ‖P‖_F + δ, or what δ is of it, if that is more.
  /// How many steps there are depends on it: a matrix with smaller ones is reported.
  double least = 0x1p-24;
  double tolerance = 1e-5;         ///< of λ^(1/r) = 1 as planned, in exact arithmetic
  double accepted_residual = 0.1;  ///< of `RootReport::residual`
  double safety = 1.001;           ///< what rounding may lift an eigenvalue above 1 by
  int most_steps = 20;             ///< what is not converged then is reported
  /// f32: the first steps in f64, until the others lift a rounding error of P's small eigenvalues
  /// by no more than this. Infinity: f32 throughout.
  double lifted = 256;
};

enum class RootStatus : std::uint8_t {
  ok,
  not_finite,     ///< an entry is NaN or Inf
  out_of_range,   ///< ‖P‖_F + δ is not within 2^±120
  not_positive,   ///< tr D ≤ 0: D is zero, or negative on average
  not_converged,  ///< an eigenvalue of D is below `least`, perhaps negative, or too small for f32
};

struct RootReport {
  RootStatus status = RootStatus::ok;
  double norm = 0;     ///< ‖P‖_F
  double damping = 0;  ///< δ
  double least = 0;    ///< what the steps are planned for, a share of norm + damping
  int steps = 0, steps_f64 = 0;
  double planned = 0;  ///< max |x − 1| in exact arithmetic, x^r the eigenvalues of what is iterated
  /// How far K came out from (D/ν)^(−1/r), whatever rounding did: ‖K^(r/2)·D/ν·K^(r/2) − I‖_F, so
  /// no λ·k^r is further from 1; r = 1: ‖K·D/ν·K − K‖_F/‖K‖_F. In f32 throughout it does not see
  /// that D/ν is rounded, to 2^-24. `multiply_spd_root`, which has no K: ‖A − I‖_F and, as an
  /// estimate, the rounding that its f32 steps can lift.
  double residual = 0;

  [[nodiscard]] bool ok() const noexcept { return status == RootStatus::ok; }
  /// Empty; or what went wrong, with the numbers.
  [[nodiscard]] std::string problem() const;
};

/// Scratch of `spd_root`. @return bytes, a multiple of 256.
std::size_t spd_root_workspace_bytes(Index m, DType dtype, const RootOptions& options);

/// Flops where a symmetric product counts once: (r + 2)·T·m³ for T steps, of which 3 are for the
/// residual; r = 1: m³ more; r = 4: (5T + 2)·m³. At most m³ more gives D^(s/r), and s − 1 D^(−s/r).
double spd_root_flops(Index m, int r, int steps);

/// inverse ← D^(−s/r), root ← D^(s/r) of D = P + δI, both from one iteration.
///
/// A ← D/ν, ν = ‖P‖_F + δ, then per step W = aI + bA + cA², K ← KW and A ← AW^r: A → I and
/// K → (D/ν)^(−1/r). In the end inverse = K^s·ν^(−s/r) and root = (D/ν)K^(r−s)·ν^(s/r), for r = 4
/// as (K·D/ν·K)K^(2−s). All factors commute, so only one triangle of each product is computed, and
/// mirrored.
///
/// The number of steps is planned from δ (`plan_root`), not found by asking after every step. The
/// host waits for tr P and ‖P‖_F before, and the residual after; for nothing in between. Calls
/// share nothing but scratch: a batch is a call for each, on the rank that owns it. Equal P, equal
/// bits.
///
/// On a CPU it is `spd_root_eigh` that is faster, unless in f32 throughout: see README.md.
///
/// @param      p        m×m, f32 or f64, symmetric, any ld.
/// @param      s        1 … r.
/// @param[out] inverse  m×m of P's type, exactly symmetric, or none. May be `p`.
/// @param[out] root     as `inverse`; neither `p` nor `inverse`.
/// @param[out] work     `spd_root_workspace_bytes(...)` bytes, 64-byte aligned.
/// @return what happened. Unless it is `ok()` no output is written: what was there may serve again.
/// @throws ShapeError   shapes or dtypes contradict each other, or `work` is too small.
/// @throws ConfigError  as `plan_root`, or a damping is negative.
/// @par Cost  `spd_root_flops`, of `steps_f64` steps in f64; no message, no allocation.
/// @see    J. Su, kexue.fm/archives/11158 and 11175.
RootReport spd_root(ConstMatrixView p, int s, const RootOptions& options, MatrixView inverse,
                    MatrixView root, std::span<std::byte> work, Backend& backend);

enum class Side : bool { left, right };

/// Scratch of `multiply_spd_root` for a G of rows×cols. @return bytes, a multiple of 256.
std::size_t multiply_spd_root_workspace_bytes(Index rows, Index cols, Side side, DType dtype,
                                              const RootOptions& options);

/// G ← D^(−s/r)G (left) or GD^(−s/r) (right), without the root: per step G ← GW^s. Pays where G is
/// shorter than P: s·T·2m²·n flops for its n lines, in place of T·m³ for K and 2m²·n for the
/// product with it. With G = D and s = r − 1 it is D^(1/r); s = 1 gives D^(1−1/r).
/// @param         p  m×m, as for `spd_root`.
/// @param         s  at least 1.
/// @param[in,out] g  m×n (left) or n×m (right) of P's type, not `p`; as it was unless the report is
///                   `ok()`.
/// @throws ShapeError, ConfigError  as `spd_root`.
RootReport multiply_spd_root(ConstMatrixView p, int s, const RootOptions& options, Side side,
                             MatrixView g, std::span<std::byte> work, Backend& backend);

}  // namespace orthrus::kernels
