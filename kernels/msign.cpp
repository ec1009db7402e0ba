#include "kernels/msign.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <orthrus/error.hpp>
#include <utility>

#include "kernels/backend.hpp"
#include "kernels/carve.hpp"

namespace orthrus::kernels {
namespace {

bool is_floating(DType t) { return t == DType::f32 || t == DType::bf16 || t == DType::f64; }

/// to ← x/ν, ν as `MsignOptions` wants it. @pre x is not zero
void normalize(MatrixView x, double largest, double safety, const MsignOptions& options,
               MatrixView to, Backend& backend) {
  if (!std::isfinite(largest)) {
    return backend.convert(x, std::numeric_limits<double>::quiet_NaN(), to);
  }
  // Between 2^-60 and 2^60 the f64 sum of squares and the f32 reciprocal are far from their limits,
  // and one pass does; outside, the entries are first brought near 1, which is exact.
  int shift = std::ilogb(largest);
  if (std::abs(shift) <= 60) {
    shift = 0;
  } else {
    scale_by_power(x, -shift, backend);
  }
  double norm = safety * std::sqrt(backend.sum_squares(x));
  const double eps = std::ldexp(options.eps, -shift);
  if (options.eps_mode == EpsMode::add) norm += eps;
  if (options.eps_mode == EpsMode::clamp) norm = std::max(norm, eps);
  // ε can dwarf the entries so much that 1/ν underflows in f32, or is 1/Inf: then X/ν is 0, as it
  // should.
  backend.convert(x, 1 / norm, to);
}

}  // namespace

void scale_by_power(MatrixView x, int exponent, Backend& backend) {
  if (exponent == 0) return;
  backend.convert(x, std::ldexp(1.0, exponent / 2), x);
  backend.convert(x, std::ldexp(1.0, exponent - exponent / 2), x);
}

std::size_t msign_workspace_bytes(Index m, Index n, DType input, const MsignOptions& options) {
  const Index side = std::min(m, n);
  const std::size_t whole = piece_bytes(m, n, options.dtype);
  const std::size_t gram = piece_bytes(side, side, options.dtype);
  return (input == options.dtype ? 1 : 2) * whole + 2 * gram;
}

void msign(MatrixView x, std::span<const Quintic> iterations, double safety,
           const MsignOptions& options, std::span<std::byte> work, Backend& backend) {
  expects(x.rows > 0 && x.cols > 0, "msign of an empty matrix");
  expects(x.rows == 1 || x.ld >= x.cols, "msign of a matrix whose rows overlap");
  expects(x.dtype == DType::f32 || x.dtype == DType::f64, "msign takes f32 or f64");
  expects(is_floating(options.dtype), "msign iterates in f32, bf16 or f64");
  expects(!iterations.empty(), "msign without iterations");
  expects(safety > 0, "msign with a safety factor that is not positive");
  expects(work.size() >= msign_workspace_bytes(x.rows, x.cols, x.dtype, options),
          "work is smaller than msign_workspace_bytes says");

  const double largest = backend.abs_max(x);
  if (largest == 0) return;

  const Index m = x.rows;
  const Index n = x.cols;
  const bool wide = m <= n;
  const Index side = std::min(m, n);
  // Two buffers take turns. Where x has the iteration's type it is one of them: the first, if the
  // last iteration then ends in it.
  const bool in_place = x.dtype == options.dtype;
  MatrixView current = carve(work, m, n, options.dtype);
  MatrixView next = in_place ? x : carve(work, m, n, options.dtype);
  if (in_place && iterations.size() % 2 == 0) std::swap(current, next);
  const MatrixView gram = carve(work, side, side, options.dtype);
  const MatrixView polynomial = carve(work, side, side, options.dtype);

  normalize(x, largest, safety, options, current, backend);
  for (const Quintic& p : iterations) {
    // A = XXᵀ or XᵀX, then X ← aX + (bA + cA²)X from the side A is on.
    backend.syrk(1, current, wide ? Transpose::no : Transpose::yes, 0, gram);
    MatrixView factor = gram;
    double weight = p.b;
    if (p.c != 0) {
      backend.convert(gram, 1, polynomial);
      backend.syrk(p.c, gram, Transpose::no, p.b, polynomial);  // A is symmetric: A² = AAᵀ
      factor = polynomial;
      weight = 1;
    }
    backend.convert(current, 1, next);
    if (wide) {
      backend.gemm(weight, factor, Transpose::no, current, Transpose::no, p.a, next);
    } else {
      backend.gemm(weight, current, Transpose::no, factor, Transpose::no, p.a, next);
    }
    std::swap(current, next);
  }
  if (!in_place) backend.convert(current, 1, x);
}

}  // namespace orthrus::kernels
