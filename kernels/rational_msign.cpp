#include "kernels/rational_msign.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <orthrus/error.hpp>
#include <string>

#include "kernels/backend.hpp"
#include "kernels/carve.hpp"
#include "kernels/device_memory.hpp"
#include "kernels/gram.hpp"
#include "kernels/msign.hpp"
#include "kernels/rng.hpp"
#include "kernels/triangle.hpp"

namespace orthrus::kernels {
namespace {

constexpr Index most_steps = 12;
/// Columns (wide) or rows (tall) of X that are multiplied by K at once, beside a copy of them.
constexpr Index panel = 512;
/// Smaller matrices are inverted before other threads have begun.
constexpr Index least_task = 64;

using Small = std::array<std::array<double, most_steps>, most_steps>;

/// Elements from the first of v to the last.
std::size_t extent(ConstMatrixView v) {
  return static_cast<std::size_t>((v.rows - 1) * v.ld + v.cols);
}

bool is_square_f32(ConstMatrixView v) {
  return v.rows == v.cols && v.dtype == DType::f32 && (v.rows <= 1 || v.ld >= v.cols);
}

/// Scratch of `rational_scale`: a basis and a residual in f64, a vector and its product in f32.
std::size_t scale_bytes(Index m) {
  return piece_bytes(most_steps + 1, m, DType::f64) + 2 * piece_bytes(m, 1, DType::f32);
}

double dot(const double* a, const double* b, Index m) {
  return std::inner_product(a, a + m, b, 0.0);
}

/// max over columns of Σ |entries|: ‖R‖₁, and by symmetry no eigenvalue is larger.
double largest_column(ConstMatrixView r, std::span<std::byte> work, Backend& backend) {
  OnHost<const float> entries(backend, static_cast<const float*>(r.data), extent(r));
  OnHost<double> sums(backend, reinterpret_cast<double*>(work.data()),
                      static_cast<std::size_t>(r.cols), /*fetch=*/false);
  double* const sum = sums.data();
  std::fill_n(sum, r.cols, 0.0);
  for (Index i = 0; i < r.rows; ++i) {
    const float* from = entries.data() + i * r.ld;
    for (Index j = 0; j < r.cols; ++j) sum[j] += static_cast<double>(std::abs(from[j]));
  }
  return *std::max_element(sum, sum + r.cols);
}

/// A unit vector near the top eigenvector of t (k×k, symmetric, semidefinite up to rounding): a
/// column of t^(2^14). Nearness is enough: the caller measures the residual of what it gets.
std::array<double, most_steps> top_vector(Small t, std::size_t k) {
  for (int squaring = 0; squaring < 14; ++squaring) {
    double trace = 0;
    for (std::size_t i = 0; i < k; ++i) trace += t[i][i];
    Small square{};
    for (std::size_t i = 0; i < k; ++i) {
      for (std::size_t p = 0; p < k; ++p) {
        const double factor = t[i][p] / trace / trace;
        for (std::size_t j = 0; j < k; ++j) square[i][j] += factor * t[p][j];
      }
    }
    t = square;
  }
  std::size_t best = 0;
  for (std::size_t i = 1; i < k; ++i) {
    if (t[i][i] > t[best][best]) best = i;
  }
  std::array<double, most_steps> v{};
  std::copy_n(t[best].begin(), k, v.begin());
  const double norm = std::sqrt(std::inner_product(v.begin(), v.end(), v.begin(), 0.0));
  for (double& x : v) x /= norm;
  return v;
}

/// θ + ‖Ry − θy‖ for the top Ritz pair. @pre R is finite and not zero
double ritz_bound(ConstMatrixView r, std::span<std::byte> work, Backend& backend) {
  const Index m = r.rows;
  const auto steps = static_cast<std::size_t>(std::min(most_steps, m));
  const MatrixView basis = carve(work, most_steps + 1, m, DType::f64);
  const MatrixView narrow = carve(work, m, 1, DType::f32);
  const MatrixView product = carve(work, m, 1, DType::f32);
  // The products are the device's, all else is the host's.
  const auto length_of = static_cast<std::size_t>(m);
  OnHost<double> vectors(backend, static_cast<double*>(basis.data), (most_steps + 1) * length_of,
                         /*fetch=*/false);
  const auto vector = [&](std::size_t i) { return vectors.data() + static_cast<Index>(i) * m; };

  double* q = vector(0);
  for (Index i = 0; i < m; ++i) {
    // Any start will do that is not made to be orthogonal to the top eigenvector.
    const std::uint32_t word =
        random_words(0x6c616e637a6f73, 0, 0, static_cast<std::uint64_t>(i))[0];
    q[i] = static_cast<double>(static_cast<std::int32_t>(word)) + 0.5;
  }
  const double length = std::sqrt(dot(q, q, m));
  for (Index i = 0; i < m; ++i) q[i] /= length;

  Small t{};
  std::size_t k = 0;
  double beta = 0;
  double largest = 0;
  while (true) {
    q = vector(k);
    double* next = vector(k + 1);
    {
      OnHost<float> rounded(backend, static_cast<float*>(narrow.data), length_of, /*fetch=*/false);
      std::transform(q, q + m, rounded.data(), [](double v) { return static_cast<float>(v); });
      rounded.put_back();
    }
    backend.gemm(1, r, Transpose::no, narrow, Transpose::no, 0, product);
    OnHost<const float> image(backend, static_cast<const float*>(product.data), length_of);
    std::copy_n(image.data(), m, next);
    t[k][k] = dot(q, next, m);
    for (int pass = 0; pass < 2; ++pass) {
      for (std::size_t i = 0; i <= k; ++i) {
        const double* other = vector(i);
        const double overlap = dot(other, next, m);
        for (Index j = 0; j < m; ++j) next[j] -= overlap * other[j];
      }
    }
    beta = std::sqrt(dot(next, next, m));
    largest = std::max({largest, std::abs(t[k][k]), beta});
    ++k;
    // What is left of an invariant subspace is the rounding of the products.
    if (k == steps || beta <= 1e-6 * largest) break;
    t[k][k - 1] = t[k - 1][k] = beta;
    for (Index j = 0; j < m; ++j) next[j] /= beta;
  }

  const std::array<double, most_steps> v = top_vector(t, k);
  double theta = 0;
  std::array<double, most_steps> image{};
  for (std::size_t i = 0; i < k; ++i) {
    for (std::size_t j = 0; j < k; ++j) image[i] += t[i][j] * v[j];
    theta += v[i] * image[i];
  }
  double residual = beta * v[k - 1] * beta * v[k - 1];
  for (std::size_t i = 0; i < k; ++i) {
    residual += (image[i] - theta * v[i]) * (image[i] - theta * v[i]);
  }
  return theta + std::sqrt(residual);
}

/// Is there nothing to invert? Then `to` gets what the result is.
bool fill_if_degenerate(double s2, MatrixView to, Backend& backend) {
  if (s2 > 0 && std::isfinite(s2)) return false;
  backend.fill(s2 == 0 ? 0.0 : std::numeric_limits<double>::quiet_NaN(), to);
  return true;
}

/// √s₂ = mantissa·2^exponent. Terms are computed for the mantissa: scaling them by an odd power of
/// two would change the bits of the square roots inside an inverse.
struct Root {
  explicit Root(double s2)
      : exponent(std::ilogb(std::sqrt(s2))), mantissa(std::ldexp(std::sqrt(s2), -exponent)) {}
  int exponent;
  double mantissa;
};

/// K from the sum of its terms.
void finish(double s2, const RationalSign& f, MatrixView k, Backend& backend) {
  const Root root(s2);
  backend.add_diagonal(f.scale / root.mantissa, k);
  if (root.exponent != 0) backend.convert(k, std::ldexp(1.0, -root.exponent), k);
}

/// How many terms are computed at a time: as many as there are, threads for, and room in `work`.
int terms_at_once(Index m, int terms, std::span<const std::byte> work, const Backend& backend) {
  if (m < least_task) return 1;
  const auto room = static_cast<int>(work.size() / piece_bytes(m, m, DType::f32));
  return std::clamp(std::min(room, backend.tasks_at_once()), 1, std::max(terms, 1));
}

MatrixView place_of_term(std::span<std::byte> work, Index m, int place) {
  work = work.subspan(static_cast<std::size_t>(place) * piece_bytes(m, m, DType::f32));
  return carve(work, m, m, DType::f32);
}

MatrixView panel_view(MatrixView x, bool wide, Index first, Index count) {
  const Index at = wide ? first : first * x.ld;
  return {static_cast<float*>(x.data) + at, wide ? x.rows : count, wide ? count : x.cols, x.ld,
          x.dtype};
}

}  // namespace

std::size_t rational_gram_workspace_bytes(Index m, int at_once) {
  const int places = m < least_task ? 1 : at_once;
  return std::max(static_cast<std::size_t>(places) * piece_bytes(m, m, DType::f32), scale_bytes(m));
}

double rational_scale(ConstMatrixView r, std::span<std::byte> work, Backend& backend) {
  expects(r.rows > 0 && is_square_f32(r), "rational_scale takes a square f32 matrix");
  expects(work.size() >= scale_bytes(r.rows),
          "work is smaller than rational_gram_workspace_bytes says");
  const double norm = std::sqrt(backend.sum_squares(r));
  if (norm == 0) return 0;
  if (!std::isfinite(norm)) return std::numeric_limits<double>::quiet_NaN();
  const double bound = 1.1 * ritz_bound(r, work, backend);
  return std::min({bound, norm, largest_column(r, work, backend)});
}

bool rational_term(ConstMatrixView r, double s2, const RationalSign& f, int j, MatrixView term,
                   Backend& backend) {
  expects(is_square_f32(r) && is_square_f32(term) && term.rows == r.rows && term.data != r.data,
          "a term is a square f32 matrix of the shape of R, not R itself");
  expects(j >= 0 && j < f.r, "there is no such term");
  if (fill_if_degenerate(s2, term, backend)) return false;
  // w·(R/s₂ + c·I) with w = √s₂/(C·a): its inverse is the term, and needs no pass of its own.
  const auto index = static_cast<std::size_t>(j);
  const double weight = Root(s2).mantissa / (f.scale * f.residues[index]);
  for (const int times : {1, 2}) {
    backend.convert(r, weight / s2, term);
    backend.add_diagonal(weight * f.poles[index] * times, term);
    if (backend.invert_spd(term)) return times == 2;
  }
  throw NumericError(
      "R/s2 + c*I is not positive definite, for c = " + std::to_string(2 * f.poles[index]) +
      " and s2 = " + std::to_string(s2) + ": R is not a Gram matrix, or l is too small for f32");
}

int rational_terms(ConstMatrixView r, double s2, const RationalSign& f, int first, int last,
                   float* packed, std::span<std::byte> work, Backend& backend) {
  expects(work.size() >= rational_gram_workspace_bytes(r.rows),
          "work is smaller than rational_gram_workspace_bytes says");
  const Index m = r.rows;
  std::atomic<int> doubled = 0;
  const int at_once = terms_at_once(m, last - first, work, backend);
  backend.for_tasks(last - first, at_once, [&](int i, int place, Backend& other) {
    const MatrixView term = place_of_term(work, m, place);
    doubled += rational_term(r, s2, f, first + i, term, other) ? 1 : 0;
    other.pack_triangle(term, packed + i * packed_size(m));
  });
  return doubled;
}

void rational_sum(float* packed, const RationalSign& f, Index m, Backend& backend) {
  const Index size = packed_size(m);
  const MatrixView sum = matrix_view(packed, 1, size);
  for (Index t = 1; t < f.r; ++t) {
    backend.axpby(1, matrix_view(packed + t * size, 1, size), 1, sum);
  }
}

void rational_of_sum(const float* packed, double s2, const RationalSign& f, MatrixView k,
                     Backend& backend) {
  expects(is_square_f32(k), "K is a square f32 matrix");
  if (fill_if_degenerate(s2, k, backend)) return;
  backend.unpack_triangle(packed, k);
  finish(s2, f, k, backend);
}

RationalReport rational_gram(ConstMatrixView r, const RationalSign& f, MatrixView k,
                             std::span<std::byte> work, Backend& backend) {
  expects(r.rows > 0 && is_square_f32(r), "rational_gram takes a square f32 matrix");
  expects(is_square_f32(k) && k.rows == r.rows && k.data != r.data,
          "rational_gram needs a K of the shape of R, not R itself");
  expects(work.size() >= rational_gram_workspace_bytes(r.rows),
          "work is smaller than rational_gram_workspace_bytes says");
  RationalReport report{rational_scale(r, work, backend), 0};
  if (fill_if_degenerate(report.s2, k, backend)) return report;
  // So many at a time, each in its place, then added in their order.
  const int at_once = terms_at_once(r.rows, f.r, work, backend);
  std::atomic<int> doubled = 0;
  const auto term = [&](int j) { return j == 0 ? k : place_of_term(work, r.rows, j % at_once); };
  for (int first = 0; first < f.r; first += at_once) {
    const int count = std::min(at_once, f.r - first);
    backend.for_tasks(count, at_once, [&](int i, int, Backend& other) {
      doubled += rational_term(r, report.s2, f, first + i, term(first + i), other) ? 1 : 0;
    });
    for (int j = std::max(first, 1); j < first + count; ++j) backend.axpby(1, term(j), 1, k);
  }
  report.doubled = doubled;
  finish(report.s2, f, k, backend);
  return report;
}

std::size_t rational_msign_workspace_bytes(Index m, Index n, int at_once) {
  const Index side = std::min(m, n);
  // Panels are there before the terms and after them.
  return 2 * piece_bytes(side, side, DType::f32) +
         std::max(rational_gram_workspace_bytes(side) +
                      piece_bytes(side, std::min(panel, std::max(m, n)), DType::f32),
                  rational_gram_workspace_bytes(side, at_once));
}

RationalReport rational_msign(MatrixView x, const RationalSign& f, const RationalOptions& options,
                              std::span<std::byte> work, Backend& backend, MatrixView root) {
  expects(x.rows > 0 && x.cols > 0, "rational_msign of an empty matrix");
  expects(x.rows == 1 || x.ld >= x.cols, "rational_msign of a matrix whose rows overlap");
  expects(x.dtype == DType::f32, "rational_msign takes f32");
  expects(options.gram == DType::f32 || options.gram == DType::bf16, "R comes from f32 or bf16");
  expects(work.size() >= rational_msign_workspace_bytes(x.rows, x.cols),
          "work is smaller than rational_msign_workspace_bytes says");

  expects(root.data == nullptr || (is_square_f32(root) && root.rows == std::min(x.rows, x.cols)),
          "the root is a square f32 matrix of the short side");

  const double largest = backend.abs_max(x);
  if (largest == 0) {
    if (root.data != nullptr) backend.fill(0, root);
    return {};
  }
  if (!std::isfinite(largest)) {
    backend.fill(std::numeric_limits<double>::quiet_NaN(), x);
    if (root.data != nullptr) backend.fill(std::numeric_limits<double>::quiet_NaN(), root);
    return {std::numeric_limits<double>::quiet_NaN(), 0};
  }
  // Within 2^±20, R and its inverses are far from the limits of f32, and the result has the bits it
  // would have with scaling; outside, scaling is exact.
  const int exponent = std::abs(std::ilogb(largest)) > 20 ? std::ilogb(largest) : 0;
  scale_by_power(x, -exponent, backend);

  const bool wide = x.rows <= x.cols;
  const Index side = std::min(x.rows, x.cols);
  const Index length = std::max(x.rows, x.cols);
  const Transpose op = wide ? Transpose::no : Transpose::yes;
  const MatrixView r = carve(work, side, side, DType::f32);
  const MatrixView k = carve(work, side, side, DType::f32);
  const std::span<std::byte> rest = work.subspan(rational_gram_workspace_bytes(side));
  const auto for_panels = [&](DType dtype, auto f_panel) {
    for (Index first = 0; first < length; first += panel) {
      const MatrixView part = panel_view(x, wide, first, std::min(panel, length - first));
      std::span<std::byte> piece = rest;
      f_panel(first, part, carve(piece, part.rows, part.cols, dtype));
    }
  };

  if (options.gram == DType::f32) {
    backend.syrk(1, x, op, 0, r);
  } else {
    // A panel at a time: the sums of a bf16 product are as long as it is, and have one accumulator.
    for_panels(options.gram, [&](Index first, MatrixView part, MatrixView rounded) {
      backend.convert(part, 1, rounded);
      backend.convert(rounded, 1, part);
      backend.syrk(1, rounded, op, first == 0 ? 0 : 1, r);
    });
  }
  const RationalReport report = rational_gram(r, f, k, work, backend);
  if (root.data != nullptr) {
    backend.gemm(1, k, Transpose::no, r, Transpose::no, 0, root);
    backend.mirror_lower(root);  // symmetric but for rounding
    scale_by_power(root, exponent, backend);
  }
  for_panels(DType::f32, [&](Index first, MatrixView part, MatrixView copy) {
    if (options.wanted > 0 && first >= options.wanted) return;
    backend.convert(part, 1, copy);
    if (wide) {
      backend.gemm(1, k, Transpose::no, copy, Transpose::no, 0, part);
    } else {
      backend.gemm(1, copy, Transpose::no, k, Transpose::no, 0, part);
    }
  });
  return report;
}

}  // namespace orthrus::kernels
