#include "kernels/spd_root.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <orthrus/error.hpp>
#include <tuple>
#include <utility>

#include "kernels/backend.hpp"
#include "kernels/carve.hpp"
#include "kernels/commuting.hpp"

namespace orthrus::kernels {
namespace {

bool is_square(ConstMatrixView v) {
  return v.rows == v.cols && (v.dtype == DType::f32 || v.dtype == DType::f64) &&
         (v.rows <= 1 || v.ld >= v.cols);
}

/// Is v none, or as p and apart from it?
bool is_output(ConstMatrixView v, ConstMatrixView p) {
  return v.data == nullptr || (is_square(v) && v.rows == p.rows && v.dtype == p.dtype);
}

/// f64 in f32's stead, for some steps or all?
bool has_f64(DType dtype, const RootOptions& options) {
  return dtype == DType::f64 || std::isfinite(options.lifted);
}

/// Three squares and two panels.
std::size_t coupled_bytes(Index m, DType dtype, const RootOptions& options) {
  const DType wide = has_f64(dtype, options) ? DType::f64 : DType::f32;
  return 3 * piece_bytes(m, m, wide) + 2 * panel_bytes(m);
}

/// How many steps, from the first, are kept in f64, and what the others, but the last, lift an
/// error of a small eigenvalue by: at most `lifted`.
std::pair<int, double> f64_steps(const RootPlan& plan, const RootOptions& options) {
  double lift = 1;
  int k = plan.steps - 1;
  for (; k > 0; --k) {
    const double more = std::pow(plan.table->step(k - 1, options.safety).a, options.r);
    if (lift * more > options.lifted) break;
    lift *= more;
  }
  return {k, lift};
}

/// What is known before the first step.
struct Start {
  RootReport report;
  RootPlan plan;
  double lift = 0;  ///< what the steps in f32 lift an error of a small eigenvalue by
  [[nodiscard]] double scale() const { return report.norm + report.damping; }  ///< ν
};

Start start(ConstMatrixView p, const RootOptions& options, Backend& backend) {
  expects<ConfigError>(0 < options.least && options.least <= 1, "a root needs 0 < least <= 1");
  Start result;
  RootReport& report = result.report;
  report.norm = std::sqrt(backend.sum_squares(p));
  const double trace = backend.trace(p);
  const auto m = static_cast<double>(p.rows);
  report.damping = options.damping.on_diagonal(trace, report.norm, p.rows);
  const double scale = result.scale();
  if (!std::isfinite(scale)) {
    report.status = RootStatus::not_finite;
  } else if (!(trace + m * report.damping > 0)) {
    report.status = RootStatus::not_positive;
  } else if (scale < 0x1p-120 || scale > 0x1p120) {
    report.status = RootStatus::out_of_range;
  } else {
    report.least = std::clamp(report.damping / scale, options.least, 1.0);
    result.plan =
        plan_root(options.r, report.least, options.tolerance, options.safety, options.most_steps);
    report.steps = result.plan.steps;
    report.planned = result.plan.error;
    if (p.dtype == DType::f64) {
      report.steps_f64 = report.steps;
    } else {
      std::tie(report.steps_f64, result.lift) = f64_steps(result.plan, options);
    }
  }
  return result;
}

/// A ← D/ν in its type.
void normalize(ConstMatrixView p, const Start& start, MatrixView a, Backend& backend) {
  backend.convert(p, 1 / start.scale(), a);
  backend.add_diagonal(start.report.damping / start.scale(), a);
}

/// The coupled variable A, from D/ν to I, and what it takes.
struct Coupled {
  MatrixView a, s, s2;  ///< A, W − aI, and for r = 4 W² − a²I
  Panels panels;

  Coupled(Index m, DType dtype, const RootOptions& options, std::span<std::byte>& work)
      : Coupled(m, has_f64(dtype, options) ? DType::f64 : DType::f32, work) {}

  /// From f64 to f32, A in the place of S.
  void narrow(Backend& backend) {
    const Index m = a.rows;
    const MatrixView to = matrix_view(static_cast<float*>(s.data), m, m);
    backend.convert(a, 1, to);
    s = matrix_view(static_cast<float*>(a.data), m, m);
    a = to;
    s2 = matrix_view(static_cast<float*>(s2.data), m, m);
  }

  /// The steps; `multiply(a, S, k)` is called with W = aI + S of step k. a and a² stay apart from
  /// the matrices: they would round them. @param closes  A of the last step is wanted, too.
  template <class Multiply>
  void iterate(ConstMatrixView p, const RootOptions& options, const Start& start, bool closes,
               Backend& backend, Multiply multiply) {
    const RootReport& report = start.report;
    if (report.steps_f64 == 0 && a.dtype == DType::f64) narrow(backend);
    normalize(p, start, a, backend);
    for (int k = 0; k < report.steps; ++k) {
      if (k > 0 && k == report.steps_f64) narrow(backend);
      const RootStep w = start.plan.table->step(k, options.safety);
      commuting_product(w.c, a, a, w.b, s, panels, backend);
      multiply(w.a, s, k);
      if (k + 1 == report.steps && !closes) return;
      if (options.r == 4) commuting_product(1, s, s, 2 * w.a, s2, panels, backend);
      const MatrixView factor = options.r == 4 ? s2 : s;
      const double diagonal = options.r == 4 ? w.a * w.a : w.a;
      for (int i = 0; i < std::min(options.r, 2); ++i) {
        commuting_product(1, a, factor, diagonal, a, panels, backend);
      }
    }
  }

 private:
  Coupled(Index m, DType wide, std::span<std::byte>& work)
      : a(carve(work, m, m, wide)),
        s(carve(work, m, m, wide)),
        s2(carve(work, m, m, wide)),
        panels(m, work) {}
};

/// ‖X − I‖_F; X is spoiled.
double distance_from_one(MatrixView x, Backend& backend) {
  backend.add_diagonal(-1, x);
  return std::sqrt(backend.sum_squares(x));
}

void judge(RootReport& report, double residual, const RootOptions& options) {
  report.residual = residual;
  if (!(residual <= options.accepted_residual)) report.status = RootStatus::not_converged;
}

/// What follows from K, in the squares that the iteration has left: in f64, if they are.
struct Closing {
  MatrixView x, k, y;  ///< three squares
  const Panels& panels;
  Backend& backend;

  /// to ← K·X·K for a symmetric X, `to` X or K. K on both sides: an error of K between a large and
  /// a small eigenvalue meets the large one of K once in place of twice.
  void congruence(MatrixView to) const {
    backend.gemm(1, x, Transpose::no, k, Transpose::no, 0, y);
    commuting_product(1, k, y, 0, to, panels, backend);
  }
  /// y ← Kⁿ, n ≥ 2.
  void power(int n) const {
    commuting_product(1, k, k, 0, y, panels, backend);
    for (int i = 2; i < n; ++i) commuting_product(1, y, k, 0, y, panels, backend);
  }
};

}  // namespace

double Damping::on_diagonal(double trace, double norm, Index m) const {
  expects<ConfigError>(absolute >= 0 && of_mean >= 0 && of_norm >= 0,
                       "a damping of a root is negative");
  return absolute + of_mean * std::max(trace, 0.0) / static_cast<double>(m) + of_norm * norm;
}

std::string RootReport::problem() const {
  const auto number = [](double x) {
    std::array<char, 32> text{};
    std::snprintf(text.data(), text.size(), "%.3g", x);
    return std::string(text.data());
  };
  const std::string matrix =
      "P, with norm " + number(norm) + " and " + number(damping) + " on its diagonal,";
  switch (status) {
    case RootStatus::ok:
      return {};
    case RootStatus::not_finite:
      return "P has an entry that is not finite";
    case RootStatus::out_of_range:
      return matrix + " is beyond 2^-120 ... 2^120: scale it";
    case RootStatus::not_positive:
      return matrix + " is not positive definite: its trace is not positive";
    case RootStatus::not_converged:
      break;
  }
  return matrix + " has no root after " + std::to_string(steps) + " steps: the residual is " +
         number(residual) + "; an eigenvalue is negative, below " +
         number(least * (norm + damping)) + ", or too small for f32";
}

std::size_t spd_root_workspace_bytes(Index m, DType dtype, const RootOptions& options) {
  return coupled_bytes(m, dtype, options) + piece_bytes(m, m, dtype);
}

double spd_root_flops(Index m, int r, int steps) {
  const auto side = static_cast<double>(m);
  const int products = (r == 4 ? 5 * steps + 2 : (2 + r) * steps) + (r == 1 ? 1 : 0);
  return products * side * side * side;
}

RootReport spd_root(ConstMatrixView p, int s, const RootOptions& options, MatrixView inverse,
                    MatrixView root, std::span<std::byte> work, Backend& backend) {
  const Index m = p.rows;
  expects(m > 0 && is_square(p), "spd_root takes a square matrix of f32 or f64");
  expects(is_output(inverse, p) && is_output(root, p),
          "the roots are of the shape and the type of P");
  expects(root.data == nullptr || (root.data != p.data && root.data != inverse.data),
          "D^(s/r) needs a place of its own");
  expects<ConfigError>(1 <= s && s <= options.r, "spd_root needs 1 <= s <= r");
  expects(work.size() >= spd_root_workspace_bytes(m, p.dtype, options),
          "work is smaller than spd_root_workspace_bytes says");

  Start begun = start(p, options, backend);
  RootReport& report = begun.report;
  if (!report.ok()) return report;
  Coupled coupled(m, p.dtype, options, work);
  const Coupled squares = coupled;  // as they are before they are narrowed
  const MatrixView k = carve(work, m, m, p.dtype);
  coupled.iterate(p, options, begun, false, backend, [&](double a, ConstMatrixView w, int step) {
    if (step == 0) {
      backend.convert(w, 1, k);
      backend.add_diagonal(a, k);
    } else {
      commuting_product(1, k, w, a, k, squares.panels, backend);
    }
  });

  // What K is, not what A says it should be: K·D·K is K, I, or D^½, of which K·D^½·K is I.
  const Closing closing{squares.a, squares.s, squares.s2, squares.panels, backend};
  normalize(p, begun, closing.x, backend);
  backend.convert(k, 1, closing.k);
  if (options.r == 4) closing.congruence(closing.x);
  if (options.r == 1) {
    closing.congruence(closing.x);
    backend.axpby(-1, closing.k, 1, closing.x);
    judge(report, std::sqrt(backend.sum_squares(closing.x) / backend.sum_squares(closing.k)),
          options);
  } else {
    closing.congruence(closing.k);
    judge(report, distance_from_one(closing.k, backend), options);
    backend.convert(k, 1, closing.k);
  }
  if (!report.ok()) return report;

  const double unit = std::pow(begun.scale(), static_cast<double>(s) / options.r);
  if (root.data != nullptr) {
    // From D or, for r = 4, D^½ = D^(2/4) one factor K at most leads to D^(s/r).
    if (options.r == 1 || s > 2) normalize(p, begun, closing.x, backend);
    const int given = options.r == 4 && s <= 2 ? 2 : options.r;
    if (s < given) {
      commuting_product(1, closing.x, closing.k, 0, closing.y, squares.panels, backend);
    }
    backend.convert(s < given ? closing.y : closing.x, unit, root);
  }
  if (inverse.data != nullptr) {
    if (s > 1) closing.power(s);
    backend.convert(s > 1 ? ConstMatrixView(closing.y) : k, 1 / unit, inverse);
  }
  return report;
}

std::size_t multiply_spd_root_workspace_bytes(Index rows, Index cols, Side side, DType dtype,
                                              const RootOptions& options) {
  const Index m = side == Side::left ? rows : cols;
  const bool rounded = dtype == DType::f32 && has_f64(dtype, options);
  return coupled_bytes(m, dtype, options) + 2 * piece_bytes(rows, cols, dtype) +
         (rounded ? piece_bytes(m, m, DType::f32) : 0);
}

RootReport multiply_spd_root(ConstMatrixView p, int s, const RootOptions& options, Side side,
                             MatrixView g, std::span<std::byte> work, Backend& backend) {
  const Index m = p.rows;
  expects(m > 0 && is_square(p), "multiply_spd_root takes a square matrix of f32 or f64");
  expects((side == Side::left ? g.rows : g.cols) == m && g.dtype == p.dtype &&
              (g.rows <= 1 || g.ld >= g.cols),
          "G has P's type, and its size on the side it is multiplied from");
  expects<ConfigError>(s >= 1, "multiply_spd_root needs s >= 1");
  expects(work.size() >= multiply_spd_root_workspace_bytes(g.rows, g.cols, side, g.dtype, options),
          "work is smaller than multiply_spd_root_workspace_bytes says");

  Start begun = start(p, options, backend);
  if (!begun.report.ok()) return begun.report;
  Coupled coupled(m, p.dtype, options, work);
  MatrixView next = carve(work, g.rows, g.cols, g.dtype);
  MatrixView spare = carve(work, g.rows, g.cols, g.dtype);
  ConstMatrixView current = g;
  coupled.iterate(p, options, begun, true, backend, [&](double a, ConstMatrixView w, int) {
    if (w.dtype != g.dtype) {
      std::span<std::byte> rest = work;
      const MatrixView rounded = carve(rest, m, m, g.dtype);
      backend.convert(w, 1, rounded);
      w = rounded;
    }
    for (int i = 0; i < s; ++i) {
      backend.convert(current, 1, next);
      if (side == Side::left) {
        backend.gemm(1, w, Transpose::no, current, Transpose::no, a, next);
      } else {
        backend.gemm(1, current, Transpose::no, w, Transpose::no, a, next);
      }
      current = next;
      std::swap(next, spare);
    }
  });
  judge(begun.report, distance_from_one(coupled.a, backend) + begun.lift * 0x1p-24, options);
  if (!begun.report.ok()) return begun.report;
  backend.convert(current, std::pow(begun.scale(), -static_cast<double>(s) / options.r), g);
  return begun.report;
}

}  // namespace orthrus::kernels
