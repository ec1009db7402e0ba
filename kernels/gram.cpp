#include "kernels/gram.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <orthrus/error.hpp>

#include "kernels/backend.hpp"
#include "kernels/carve.hpp"
#include "kernels/commuting.hpp"

namespace orthrus::kernels {
namespace {

bool is_square_f32(ConstMatrixView v) {
  return v.rows == v.cols && v.dtype == DType::f32 && (v.rows <= 1 || v.ld >= v.cols);
}

/// One iteration on R: S ← bR + cR², Q ← unit·(QS + aQ), and unless it is the last R ← ZRZ with
/// Z = S + aI.
void step(const Quintic& p, bool first, bool last, double unit, MatrixView r, MatrixView s,
          MatrixView q, const Panels& panels, Backend& backend) {
  if (p.c == 0) {
    backend.convert(r, p.b, s);
  } else {
    commuting_product(p.c, r, r, p.b, s, panels, backend);
  }
  if (first) {
    backend.convert(s, unit, q);
    backend.add_diagonal(p.a * unit, q);
  } else {
    commuting_product(unit, q, s, p.a * unit, q, panels, backend);
  }
  if (last) return;
  // Z is never formed: a would round S.
  commuting_product(1, r, s, p.a, r, panels, backend);
  commuting_product(1, r, s, p.a, r, panels, backend);
}

/// (QRQ)ᵢᵢ = Σⱼ (QR)ᵢⱼQᵢⱼ. In f64: Q spans the inverse of the spectrum, and all of that cancels.
/// @param r  f64
void row_squares_of(ConstMatrixView q, ConstMatrixView r, std::span<double> row_squares,
                    const Panels& panels, Backend& backend) {
  const Index m = q.rows;
  for (Index i = 0; i < m; i += panels.left.rows) {
    const Index rows = std::min(panels.left.rows, m - i);
    const MatrixView left = part(panels.left, rows, m, DType::f64);
    const MatrixView out = part(panels.out, rows, m, DType::f64);
    backend.convert(block(q, i, 0, rows, m), 1, left);
    backend.gemm(1, left, Transpose::no, r, Transpose::no, 0, out);
    backend.row_dots(left, out, matrix_view(row_squares.data() + i, rows, 1));
  }
}

/// What a small singular value of the input of iteration `first` is lifted by before the last one.
double growth(std::span<const Quintic> iterations, std::size_t first) {
  double product = 1;
  for (std::size_t t = first; t + 1 < iterations.size(); ++t) product *= std::abs(iterations[t].a);
  return product;
}

}  // namespace

std::size_t gram_accumulate_workspace_bytes(Index m) { return 3 * panel_bytes(m); }

void gram_accumulate(double alpha, ConstMatrixView x, bool wide, double beta, MatrixView r,
                     std::span<std::byte> work, Backend& backend) {
  const Index m = wide ? x.rows : x.cols;
  const Index n = wide ? x.cols : x.rows;
  expects(is_square_f32(r) && r.rows == m && x.dtype == DType::f32,
          "gram_accumulate needs f32 and an R as large as the short side");
  expects(work.size() >= gram_accumulate_workspace_bytes(m),
          "work is smaller than gram_accumulate_workspace_bytes says");
  const Index step = panel_rows(m);
  const MatrixView left_piece = carve(work, step, m, DType::f64);
  const MatrixView right_piece = carve(work, step, m, DType::f64);
  const MatrixView out_piece = carve(work, step, m, DType::f64);
  // `lines` rows (wide) or columns (tall) of x, of each `count` entries from k, in f64.
  const auto widened = [&](Index line, Index lines, Index k, Index count, MatrixView piece) {
    const Index rows = wide ? lines : count;
    const Index cols = wide ? count : lines;
    const MatrixView to{piece.data, rows, cols, cols, DType::f64};
    backend.convert(wide ? block(x, line, k, rows, cols) : block(x, k, line, rows, cols), 1, to);
    return to;
  };
  for (Index i = 0; i < m; i += step) {
    const Index rows = std::min(step, m - i);
    const Index cols = i + rows;
    const MatrixView to = block(r, i, 0, rows, cols);
    const MatrixView out = part(out_piece, rows, cols, DType::f64);
    if (beta != 0) backend.convert(to, 1, out);
    Index k = 0;
    do {  // at least once: without columns R ← βR is left to do
      const Index count = std::min(step, n - k);
      const MatrixView left = widened(i, rows, k, count, left_piece);
      const MatrixView right = widened(0, cols, k, count, right_piece);
      backend.gemm(alpha, left, wide ? Transpose::no : Transpose::yes, right,
                   wide ? Transpose::yes : Transpose::no, k == 0 ? beta : 1, out);
      k += count;
    } while (k < n);
    backend.convert(out, 1, to);
  }
  backend.mirror_lower(r);
}

bool gram_is_stable(std::span<const Quintic> iterations) {
  const double lifted = growth(iterations, 0);
  return std::ldexp(lifted * lifted, -24) <= 0.1;
}

Index gram_f64_iterations(std::span<const Quintic> iterations) {
  std::size_t t = 0;
  while (t < iterations.size() && growth(iterations, t) > 16) ++t;
  return static_cast<Index>(t);
}

double gram_polynomial_flops(Index m, Index iterations) {
  const auto side = static_cast<double>(m);
  return static_cast<double>(4 * iterations - 3) * side * side * side;
}

std::size_t gram_factor_workspace_bytes(Index m) {
  return piece_bytes(m, m, DType::f32) + 2 * panel_bytes(m);
}

void gram_factor(MatrixView r, std::span<const Quintic> iterations, MatrixView q,
                 std::span<std::byte> work, Backend& backend) {
  const Index m = r.rows;
  expects(m > 0 && is_square_f32(r) && is_square_f32(q) && q.rows == m && q.data != r.data,
          "gram_factor takes a square f32 matrix, and a Q of its shape");
  expects(!iterations.empty(), "gram_factor without iterations");
  expects(work.size() >= gram_factor_workspace_bytes(m),
          "work is smaller than gram_factor_workspace_bytes says");
  const MatrixView s = carve(work, m, m, DType::f32);
  const Panels panels(m, work);
  for (const Quintic& p : iterations) {
    step(p, &p == &iterations.front(), &p == &iterations.back(), 1, r, s, q, panels, backend);
  }
}

std::size_t gram_polynomial_workspace_bytes(Index m, std::span<const Quintic> iterations) {
  const std::size_t whole = piece_bytes(m, m, DType::f64);
  return (gram_f64_iterations(iterations) > 0 ? 2 : 1) * whole + 2 * panel_bytes(m);
}

void gram_polynomial(ConstMatrixView r, std::span<const Quintic> iterations,
                     const GramOptions& options, MatrixView q, std::span<double> row_squares,
                     std::span<std::byte> work, Backend& backend) {
  const Index m = r.rows;
  expects(m > 0 && is_square_f32(r), "gram_polynomial takes a square f32 matrix");
  expects(is_square_f32(q) && q.rows == m && q.data != r.data,
          "gram_polynomial needs a Q of the shape of R, not R itself");
  expects(row_squares.empty() || static_cast<Index>(row_squares.size()) == m,
          "gram_polynomial gives m row squares or none");
  expects(!iterations.empty(), "gram_polynomial without iterations");
  expects(options.safety > 0, "gram_polynomial with a safety factor that is not positive");
  expects(work.size() >= gram_polynomial_workspace_bytes(m, iterations),
          "work is smaller than gram_polynomial_workspace_bytes says");

  // Where it costs a wait, the norm stays on the device, and Q is divided by it at the end.
  const bool stays = backend.numbers_wait();
  const double squares = stays ? 1 : backend.trace(r);
  if (squares == 0 || !std::isfinite(squares)) {
    const double all = squares == 0 ? 0 : std::numeric_limits<double>::quiet_NaN();
    backend.fill(all, q);
    if (!row_squares.empty()) backend.fill(all, matrix_view(row_squares.data(), m, 1));
    return;
  }

  // One or two matrices of f64; what holds one of f64 holds R and S of f32.
  const auto in_f64 = static_cast<std::size_t>(gram_f64_iterations(iterations));
  const MatrixView first = carve(work, m, m, DType::f64);
  const MatrixView second = in_f64 > 0 ? carve(work, m, m, DType::f64) : first;
  const Panels panels(m, work);
  const MatrixView narrow_power = matrix_view(static_cast<float*>(second.data), m, m);
  const MatrixView narrow_s = matrix_view(static_cast<float*>(second.data) + m * m, m, m);
  MatrixView power = in_f64 > 0 ? first : narrow_power;  // R as the iterations change it
  MatrixView s = in_f64 > 0 ? second : narrow_s;

  const double inverse = stays ? 1 : 1 / norm_of(std::sqrt(squares), options);
  if (stays) {
    backend.divide_by_norm(r, options, 2, r, power);
  } else {
    backend.convert(r, inverse * inverse, power);
  }
  for (std::size_t t = 0; t < iterations.size(); ++t) {
    if (t > 0 && t == in_f64) {
      backend.convert(power, 1, narrow_power);
      power = narrow_power;
      s = narrow_s;
    }
    const bool last = t + 1 == iterations.size();
    const double unit = last ? inverse : 1;  // Q is scaled where it is written anyway
    step(iterations[t], t == 0, last, unit, power, s, q, panels, backend);
  }
  if (stays) backend.divide_by_norm(r, options, 1, q, q);
  if (!row_squares.empty()) {
    backend.convert(r, 1, first);
    row_squares_of(q, first, row_squares, panels, backend);
  }
}

bool gram_is_plausible(std::span<const double> row_squares) {
  const double sum = std::accumulate(row_squares.begin(), row_squares.end(), 0.0);
  return sum >= 0 && sum <= 1.5 * static_cast<double>(row_squares.size());
}

}  // namespace orthrus::kernels
