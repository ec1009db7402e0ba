#include "kernels/msign.hpp"

#include <algorithm>
#include <cmath>
#include <orthrus/error.hpp>
#include <utility>

#include "kernels/backend.hpp"
#include "kernels/carve.hpp"
#include "kernels/gram.hpp"

namespace orthrus::kernels {
namespace {

bool is_floating(DType t) { return t == DType::f32 || t == DType::bf16 || t == DType::f64; }

/// Between 2^-60 and 2^60 the f64 sum of squares and the f32 reciprocal are far from their limits,
/// and one pass does; outside, the entries are first brought near 1, which is exact.
constexpr int safe_exponent = 60;

}  // namespace

void scale_by_power(MatrixView x, int exponent, Backend& backend) {
  if (exponent == 0) return;
  backend.convert(x, std::ldexp(1.0, exponent / 2), x);
  backend.convert(x, std::ldexp(1.0, exponent - exponent / 2), x);
}

namespace {

// ---- the Gram form ------------------------------------------------------------------------------

/// Do products of the short side, in f32, pay for those with X they replace? As measured on one
/// core, in turns with the direct form: f32 gains 1.02 (64×128) to 1.7 (n = 4m), bf16, whose
/// products with X are twice as fast, 1.04 to 1.25; what is shorter loses.
bool has_gram_form(Index m, Index n, const MsignOptions& options) {
  const Index side = std::min(m, n);
  const Index length = std::max(m, n);
  if (options.dtype == DType::f32) return side >= 64 && length >= 2 * side;
  return options.dtype == DType::bf16 && options.fast_f32 && side >= 256 &&
         length >= (side >= 768 ? 3 : 4) * side;
}

/// How many of `iterations`, from the first, one R = XXᵀ serves. In f32 R's rounding decides, which
/// is lifted by (Πa)² over all of them but the last; in bf16 that of Q, whose entries span Πa.
std::size_t served(std::span<const Quintic> iterations, DType dtype) {
  double lifted = std::abs(iterations.front().a);
  std::size_t count = 1;
  for (; count < iterations.size(); ++count) {
    const double next = lifted * std::abs(iterations[count].a);
    if (dtype == DType::bf16 ? next > 64 : lifted > 12) break;
    lifted = next;
  }
  return count;
}

/// The buffers that hold X by turns.
struct Turns {
  MatrixView current, next;
  MatrixView result;  ///< what msign was given
  Index wanted = 0;   ///< of the last product

  bool is_wide;  ///< before it was narrowed

  [[nodiscard]] bool wide() const { return is_wide; }
  [[nodiscard]] Transpose to_short_side() const { return wide() ? Transpose::no : Transpose::yes; }

  /// X ← weight·AX + aX, or weight·XA + aX from the side A is on. The last of bf16 goes straight to
  /// an f32 result, and is not rounded.
  void multiply(double weight, MatrixView factor, double a, bool last, Backend& backend) {
    if (last) narrow();
    const MatrixView to = target(last);
    if (a != 0) backend.convert(current, 1, to);
    product(weight, factor, a, to, backend);
  }
  /// From here on only what is wanted.
  void narrow() {
    if (wanted == 0) return;
    const auto lines = [&](const MatrixView& x, bool of_columns) {
      return part(x, 0, of_columns ? x.rows : wanted, 0, of_columns ? wanted : x.cols);
    };
    const bool of_columns = wide();
    for (MatrixView* x : {&current, &next, &result}) *x = lines(*x, of_columns);
  }
  /// Where the next product goes.
  [[nodiscard]] MatrixView target(bool last) const {
    const bool lands = last && current.dtype == DType::bf16 && result.dtype == DType::f32;
    return lands ? result : next;
  }
  /// X ← weight·AX + a·to.
  void product(double weight, MatrixView factor, double a, MatrixView to, Backend& backend) {
    if (wide()) {
      backend.gemm(weight, factor, Transpose::no, current, Transpose::no, a, to);
    } else {
      backend.gemm(weight, current, Transpose::no, factor, Transpose::no, a, to);
    }
    next = current;
    current = to;
  }
};

}  // namespace

Index msign_gram_products(Index m, Index n, std::span<const Quintic> iterations,
                          const MsignOptions& options) {
  if (!has_gram_form(m, n, options)) return 0;
  Index products = 0;
  for (; !iterations.empty(); ++products)
    iterations = iterations.subspan(served(iterations, options.dtype));
  return products;
}

std::size_t msign_workspace_bytes(Index m, Index n, DType input, const MsignOptions& options) {
  const Index side = std::min(m, n);
  const std::size_t whole = piece_bytes(m, n, options.dtype);
  const std::size_t square = piece_bytes(side, side, options.dtype);
  const std::size_t squares =
      has_gram_form(m, n, options)
          ? 2 * piece_bytes(side, side, DType::f32) + gram_factor_workspace_bytes(side)
          : 2 * square;
  return (input == options.dtype ? 1 : 2) * whole + squares;
}

void msign(MatrixView x, std::span<const Quintic> iterations, double safety,
           const MsignOptions& options, std::span<std::byte> work, Backend& backend) {
  expects(x.rows > 0 && x.cols > 0, "msign of an empty matrix");
  expects(x.rows == 1 || x.ld >= x.cols, "msign of a matrix whose rows overlap");
  expects(x.dtype == DType::f32 || x.dtype == DType::f64, "msign takes f32 or f64");
  expects(is_floating(options.dtype), "msign iterates in f32, bf16 or f64");
  expects(!iterations.empty(), "msign without iterations");
  expects(safety > 0, "msign with a safety factor that is not positive");
  expects(options.wanted >= 0 && options.wanted <= std::max(x.rows, x.cols),
          "msign is asked for more lines than there are");
  expects(work.size() >= msign_workspace_bytes(x.rows, x.cols, x.dtype, options),
          "work is smaller than msign_workspace_bytes says");

  const Index side = std::min(x.rows, x.cols);
  const Index gram_products = msign_gram_products(x.rows, x.cols, iterations, options);
  const Index products = gram_products > 0 ? gram_products : std::ssize(iterations);
  // Two buffers take turns. Where x has the iteration's type it is one of them: the first, if the
  // last product then ends in it.
  const bool in_place = x.dtype == options.dtype;
  Turns turns{carve(work, x.rows, x.cols, options.dtype),
              in_place ? x : carve(work, x.rows, x.cols, options.dtype), x, options.wanted,
              x.rows <= x.cols};
  if (in_place && products % 2 == 0) std::swap(turns.current, turns.next);
  const NormOptions norm{safety, options.eps_mode, options.eps};
  if (!backend.normalize(x, norm, safe_exponent, turns.current)) return;  // it was 0

  if (gram_products > 0) {
    const MatrixView r = carve(work, side, side, DType::f32);
    const MatrixView q = carve(work, side, side, DType::f32);
    const MatrixView narrow{r.data, side, side, side, DType::bf16};  // Q, where R was
    for (auto left = iterations; !left.empty();) {
      const std::size_t count = served(left, options.dtype);
      backend.syrk(1, turns.current, turns.to_short_side(), 0, r);
      gram_factor(r, left.first(count), q, work, backend);
      left = left.subspan(count);
      if (options.dtype == DType::f32) {
        turns.multiply(1, q, 0, left.empty(), backend);
      } else {
        // Q spans what singular values differ by. Its mean is added apart: it would round the rest.
        // And not as a multiple in the product: oneDNN compiles one for each multiple of C.
        if (left.empty()) turns.narrow();
        const MatrixView to = turns.target(left.empty());
        backend.split_mean(q, turns.current, to);
        backend.convert(q, 1, narrow);
        turns.product(1, narrow, 1, to, backend);
      }
    }
  } else {
    // Of so small a product half is not less work than all of it, and need not be mirrored.
    const bool one_block = side <= 256 && options.dtype == DType::bf16;
    const MatrixView gram = carve(work, side, side, options.dtype);
    const MatrixView polynomial = carve(work, side, side, options.dtype);
    for (const Quintic& p : iterations) {
      const bool last = &p == &iterations.back();
      const Transpose op = turns.to_short_side();
      if (one_block) {
        const Transpose other = op == Transpose::no ? Transpose::yes : Transpose::no;
        backend.gemm(1, turns.current, op, turns.current, other, 0, gram);
      } else {
        backend.syrk(1, turns.current, op, 0, gram);
      }
      if (p.c == 0) {
        turns.multiply(p.b, gram, p.a, last, backend);
      } else {
        backend.convert(gram, 1, polynomial);
        if (one_block) {
          backend.gemm(p.c, gram, Transpose::no, gram, Transpose::no, p.b, polynomial);
        } else {
          backend.syrk(p.c, gram, Transpose::no, p.b, polynomial);  // A is symmetric: A² = AAᵀ
        }
        turns.multiply(1, polynomial, p.a, last, backend);
      }
    }
  }
  if (turns.current.data != x.data) backend.convert(turns.current, 1, turns.result);
}

}  // namespace orthrus::kernels
