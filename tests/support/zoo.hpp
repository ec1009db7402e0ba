#pragma once
/// @file
/// zoo: matrices whose singular values are known, and an SVD that judges the rest. f64, from a
/// seed, no BLAS: what is tested must not also be the judge.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <orthrus/view.hpp>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/coefficients.hpp"

namespace orthrus::zoo {

/// A row-major matrix that owns its entries.
template <class T>
struct Dense {
  Index rows = 0, cols = 0;
  std::vector<T> data;

  Dense() = default;
  Dense(Index r, Index c) : rows(r), cols(c), data(static_cast<std::size_t>(r * c)) {}

  T& operator()(Index i, Index j) { return data[static_cast<std::size_t>(i * cols + j)]; }
  const T& operator()(Index i, Index j) const {
    return data[static_cast<std::size_t>(i * cols + j)];
  }
  [[nodiscard]] MatrixView view() { return matrix_view(data.data(), rows, cols); }
  [[nodiscard]] ConstMatrixView view() const { return matrix_view(data.data(), rows, cols); }
};
using Matrix = Dense<double>;

// ---- small algebra
// --------------------------------------------------------------------------------

template <class To, class From>
Dense<To> cast(const Dense<From>& x) {
  Dense<To> y(x.rows, x.cols);
  std::transform(x.data.begin(), x.data.end(), y.data.begin(),
                 [](From v) { return static_cast<To>(v); });
  return y;
}

template <class T>
Dense<T> transposed(const Dense<T>& x) {
  Dense<T> y(x.cols, x.rows);
  for (Index i = 0; i < x.rows; ++i) {
    for (Index j = 0; j < x.cols; ++j) y(j, i) = x(i, j);
  }
  return y;
}

inline Matrix product(const Matrix& a, const Matrix& b) {
  Matrix c(a.rows, b.cols);
  for (Index i = 0; i < a.rows; ++i) {
    double* row = c.data.data() + i * c.cols;
    for (Index p = 0; p < a.cols; ++p) {
      const double x = a(i, p);
      const double* from = b.data.data() + p * b.cols;
      for (Index j = 0; j < b.cols; ++j) row[j] += x * from[j];
    }
  }
  return c;
}

inline Matrix scaled(Matrix x, double factor) {
  for (double& v : x.data) v *= factor;
  return x;
}

template <class T>
double frobenius(const Dense<T>& x) {
  double sum = 0;
  for (const T v : x.data) sum += static_cast<double>(v) * static_cast<double>(v);
  return std::sqrt(sum);
}

/// <A, B> = tr(AᵀB).
template <class A, class B>
double inner(const Dense<A>& a, const Dense<B>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.data.size(); ++i) {
    sum += static_cast<double>(a.data[i]) * static_cast<double>(b.data[i]);
  }
  return sum;
}

/// ‖A − E‖_F / ‖E‖_F; ‖A‖_F where E is zero. NaN where A has one, so that `EXPECT_LE` fails.
template <class A, class E>
double relative_error(const Dense<A>& actual, const Dense<E>& expected) {
  double sum = 0;
  for (std::size_t i = 0; i < expected.data.size(); ++i) {
    const double d = static_cast<double>(actual.data[i]) - static_cast<double>(expected.data[i]);
    sum += d * d;
  }
  const double norm = frobenius(expected);
  return std::sqrt(sum) / (norm > 0 ? norm : 1);
}

/// The largest difference of two entries.
template <class A, class E>
double max_difference(const Dense<A>& actual, const Dense<E>& expected) {
  double most = 0;
  for (std::size_t i = 0; i < expected.data.size(); ++i) {
    const double d =
        std::abs(static_cast<double>(actual.data[i]) - static_cast<double>(expected.data[i]));
    if (!(d <= most)) most = d;  // lets NaN through
  }
  return most;
}

// ---- inhabitants
// ----------------------------------------------------------------------------------

/// Independent standard normal entries.
inline Matrix gaussian(Index rows, Index cols, std::uint64_t seed) {
  std::mt19937_64 bits(seed * 0x9E3779B97F4A7C15U + 1);
  std::normal_distribution<double> normal;
  Matrix x(rows, cols);
  for (double& v : x.data) v = normal(bits);
  return x;
}

/// rows×cols with orthonormal columns, rows >= cols: Gram–Schmidt on a Gaussian, twice, after which
/// QᵀQ − I is a few 1e-16.
inline Matrix orthonormal_columns(Index rows, Index cols, std::uint64_t seed) {
  Matrix q = transposed(gaussian(rows, cols, seed));  // columns as rows: contiguous
  for (Index j = 0; j < cols; ++j) {
    double* column = q.data.data() + j * rows;
    for (int pass = 0; pass < 2; ++pass) {
      for (Index k = 0; k < j; ++k) {
        const double* other = q.data.data() + k * rows;
        double dot = 0;
        for (Index i = 0; i < rows; ++i) dot += column[i] * other[i];
        for (Index i = 0; i < rows; ++i) column[i] -= dot * other[i];
      }
    }
    double norm = 0;
    for (Index i = 0; i < rows; ++i) norm += column[i] * column[i];
    norm = std::sqrt(norm);
    for (Index i = 0; i < rows; ++i) column[i] /= norm;
  }
  return transposed(q);
}

/// X = U diag(σ) Vᵀ with U rows×k and V cols×k, k = σ.size().
struct Factors {
  Matrix u;
  std::vector<double> sigma;
  Matrix v;

  /// U diag(f(σ)) Vᵀ.
  template <class F>
  [[nodiscard]] Matrix map(F f) const {
    Matrix scaled_u = u;
    for (Index i = 0; i < u.rows; ++i) {
      for (Index j = 0; j < u.cols; ++j) scaled_u(i, j) *= f(sigma[static_cast<std::size_t>(j)]);
    }
    return product(scaled_u, transposed(v));
  }
  [[nodiscard]] Matrix matrix() const {
    return map([](double s) { return s; });
  }
  [[nodiscard]] double frobenius() const {
    double sum = 0;
    for (const double s : sigma) sum += s * s;
    return std::sqrt(sum);
  }
  [[nodiscard]] double nuclear() const {
    double sum = 0;
    for (const double s : sigma) sum += s;
    return sum;
  }
};

/// Random orthonormal factors around given singular values, at most min(rows, cols) of them.
inline Factors with_spectrum(Index rows, Index cols, std::vector<double> sigma,
                             std::uint64_t seed) {
  const auto k = static_cast<Index>(sigma.size());
  return {orthonormal_columns(rows, k, 2 * seed), std::move(sigma),
          orthonormal_columns(cols, k, 2 * seed + 1)};
}

/// f(0), …, f(min(rows, cols) − 1) as singular values.
template <class F>
Factors with_spectrum_of(Index rows, Index cols, std::uint64_t seed, F f) {
  std::vector<double> sigma(static_cast<std::size_t>(std::min(rows, cols)));
  for (std::size_t i = 0; i < sigma.size(); ++i) sigma[i] = f(static_cast<double>(i));
  return with_spectrum(rows, cols, std::move(sigma), seed);
}

/// All singular values 1: already its own msign.
inline Matrix flat(Index rows, Index cols, std::uint64_t seed) {
  return with_spectrum_of(rows, cols, seed, [](double) { return 1.0; }).matrix();
}
/// σᵢ = i^−power, i from 1: what momentum of a trained network looks like.
inline Matrix power_law(Index rows, Index cols, std::uint64_t seed, double power = 1) {
  return with_spectrum_of(rows, cols, seed, [=](double i) { return std::pow(i + 1, -power); })
      .matrix();
}
/// `rank` singular values 1, the others 0 up to rounding.
inline Matrix rank_deficient(Index rows, Index cols, Index rank, std::uint64_t seed) {
  return with_spectrum(rows, cols, std::vector<double>(static_cast<std::size_t>(rank), 1.0), seed)
      .matrix();
}
/// Singular values from 1 down to 1/cond, evenly on a logarithmic scale.
inline Matrix condition(Index rows, Index cols, double cond, std::uint64_t seed) {
  const double steps = std::max<double>(1, static_cast<double>(std::min(rows, cols) - 1));
  return with_spectrum_of(rows, cols, seed, [=](double i) { return std::pow(cond, -i / steps); })
      .matrix();
}
/// Each row twice (the last once, when `rows` is odd): exactly half the rank.
inline Matrix duplicated_rows(Index rows, Index cols, std::uint64_t seed) {
  const Matrix half = gaussian((rows + 1) / 2, cols, seed);
  Matrix x(rows, cols);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) x(i, j) = half(i / 2, j);
  }
  return x;
}
inline Matrix zero(Index rows, Index cols) { return {rows, cols}; }
/// Entries around 1e-30 or 1e30: their squares leave the range of f32.
inline Matrix tiny(Index rows, Index cols, std::uint64_t seed) {
  return scaled(gaussian(rows, cols, seed), 1e-30);
}
inline Matrix huge(Index rows, Index cols, std::uint64_t seed) {
  return scaled(gaussian(rows, cols, seed), 1e30);
}

struct Inhabitant {
  std::string name;
  Matrix matrix;
};

/// One of each.
inline std::vector<Inhabitant> inhabitants(Index rows, Index cols, std::uint64_t seed) {
  const Index rank = std::max<Index>(1, std::min(rows, cols) / 2);
  return {
      {"gaussian", gaussian(rows, cols, seed)},
      {"flat", flat(rows, cols, seed)},
      {"power_law", power_law(rows, cols, seed)},
      {"rank_deficient", rank_deficient(rows, cols, rank, seed)},
      {"rank_one", rank_deficient(rows, cols, 1, seed)},
      {"condition_1e3", condition(rows, cols, 1e3, seed)},
      {"duplicated_rows", duplicated_rows(rows, cols, seed)},
      {"zero", zero(rows, cols)},
      {"single_row", gaussian(1, cols, seed)},
      {"single_column", gaussian(rows, 1, seed)},
      {"tiny", tiny(rows, cols, seed)},
      {"huge", huge(rows, cols, seed)},
  };
}

// ---- the judge
// ------------------------------------------------------------------------------------

/// Thin SVD by one-sided Jacobi, singular values descending: each to high relative accuracy.
/// Columns of zero singular values are zero.
inline Factors svd(const Matrix& x) {
  if (x.rows < x.cols) {
    Factors t = svd(transposed(x));
    return {std::move(t.v), std::move(t.sigma), std::move(t.u)};
  }
  const Index m = x.rows;
  const Index n = x.cols;
  // Columns of XV and of V, as rows. Entries near 1, so that squares neither over- nor underflow.
  double largest = 0;
  for (const double v : x.data) largest = std::max(largest, std::abs(v));
  const double unit = largest > 0 ? std::ldexp(1.0, std::ilogb(largest)) : 1;
  Matrix xv = transposed(x);
  for (double& v : xv.data) v /= unit;
  Matrix v(n, n);
  for (Index i = 0; i < n; ++i) v(i, i) = 1;
  const auto dot = [m](const double* a, const double* b) {
    double sum = 0;
    for (Index i = 0; i < m; ++i) sum += a[i] * b[i];
    return sum;
  };
  bool rotated = true;
  for (int sweep = 0; rotated && sweep < 60; ++sweep) {
    rotated = false;
    for (Index p = 0; p < n; ++p) {
      for (Index q = p + 1; q < n; ++q) {
        double* a = xv.data.data() + p * m;
        double* b = xv.data.data() + q * m;
        const double aa = dot(a, a);
        const double bb = dot(b, b);
        const double ab = dot(a, b);
        if (std::abs(ab) <= 1e-15 * std::sqrt(aa * bb) || ab == 0) continue;
        rotated = true;
        const double zeta = (bb - aa) / (2 * ab);
        const double t = (zeta >= 0 ? 1 : -1) / (std::abs(zeta) + std::hypot(1.0, zeta));
        const double c = 1 / std::hypot(1.0, t);
        const double s = c * t;
        const auto rotate = [c, s](double* left, double* right, Index count) {
          for (Index i = 0; i < count; ++i) {
            const double l = left[i];
            left[i] = c * l - s * right[i];
            right[i] = s * l + c * right[i];
          }
        };
        rotate(a, b, m);
        rotate(v.data.data() + p * n, v.data.data() + q * n, n);
      }
    }
  }
  std::vector<std::pair<double, Index>> order;
  for (Index j = 0; j < n; ++j) {
    const double* a = xv.data.data() + j * m;
    order.emplace_back(std::sqrt(dot(a, a)), j);
  }
  std::sort(order.rbegin(), order.rend());
  Factors result{Matrix(m, n), {}, Matrix(n, n)};
  for (Index k = 0; k < n; ++k) {
    const auto [sigma, j] = order[static_cast<std::size_t>(k)];
    result.sigma.push_back(sigma * unit);
    for (Index i = 0; i < m; ++i) result.u(i, k) = sigma > 0 ? xv(j, i) / sigma : 0;
    for (Index i = 0; i < n; ++i) result.v(i, k) = v(j, i);
  }
  return result;
}

/// Singular values, descending.
template <class T>
std::vector<double> singular_values(const Dense<T>& x) {
  return svd(cast<double>(x)).sigma;
}

/// p(x) for the composition p of `iterations`.
inline double composed(std::span<const kernels::Quintic> iterations, double x) {
  for (const kernels::Quintic& p : iterations) x = p(x);
  return x;
}

/// U p(Σ/ν) Vᵀ: what Newton–Schulz gives in exact arithmetic.
inline Matrix polynomial_oracle(const Matrix& x, std::span<const kernels::Quintic> iterations,
                                double nu) {
  return svd(x).map([&](double s) { return composed(iterations, s / nu); });
}

/// U_r V_rᵀ over the singular values above `cutoff` times the largest: what `msign` approximates.
inline Matrix msign_oracle(const Matrix& x, double cutoff = 1e-12) {
  const Factors f = svd(x);
  const double least = f.sigma.empty() ? 0 : cutoff * f.sigma.front();
  return f.map([=](double s) { return s > least ? 1.0 : 0.0; });
}

}  // namespace orthrus::zoo
