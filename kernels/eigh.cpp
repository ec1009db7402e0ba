#include "kernels/eigh.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <orthrus/error.hpp>
#include <string>

#include "kernels/backend.hpp"
#include "kernels/carve.hpp"
#include "kernels/device_memory.hpp"

// LAPACK has no header that every BLAS brings.
extern "C" void dsyevd_(const char* jobz, const char* uplo, const int* n, double* a, const int* lda,
                        double* w, double* work, const int* lwork, int* iwork, const int* liwork,
                        int* info);
extern "C" void dgeqrf_(const int* m, const int* n, double* a, const int* lda, double* tau,
                        double* work, const int* lwork, int* info);
extern "C" void dorgqr_(const int* m, const int* n, const int* k, double* a, const int* lda,
                        const double* tau, double* work, const int* lwork, int* info);

namespace orthrus::kernels {
namespace {

/// Numbers that dsyevd asks for.
constexpr Index work_size(Index m) { return 1 + 6 * m + 2 * m * m; }
constexpr Index integers_size(Index m) { return 3 + 5 * m; }
/// Numbers that dgeqrf and dorgqr work in, 64 reflections at a time; and the reflections' scales.
constexpr Index reflections_size(Index m) { return 65 * m; }

bool is_square(ConstMatrixView v) {
  return v.rows == v.cols && (v.dtype == DType::f32 || v.dtype == DType::f64) &&
         (v.rows <= 1 || v.ld >= v.cols);
}

}  // namespace

std::size_t eigh_workspace_bytes(Index m) {
  return piece_bytes(1, work_size(m), DType::f64) +
         padded(static_cast<std::size_t>(integers_size(m)) * sizeof(int));
}

std::size_t spd_root_eigh_workspace_bytes(Index m) {
  return piece_bytes(m, m, DType::f64) + piece_bytes(m, 1, DType::f64) + eigh_workspace_bytes(m);
}

void eigh(ConstMatrixView a, MatrixView vectors, std::span<double> values,
          std::span<std::byte> work, Backend& backend) {
  const Index m = a.rows;
  expects(m > 0 && m <= largest_eigh_side && is_square(a),
          "eigh takes a square matrix of f32 or f64, of 32000 rows at most");
  expects(vectors.rows == m && vectors.cols == m && vectors.dtype == DType::f64 &&
              vectors.contiguous() && vectors.data != a.data,
          "eigh needs m×m eigenvectors of f64, without gaps, apart from the matrix");
  expects(static_cast<Index>(values.size()) == m, "eigh gives m eigenvalues");
  expects(work.size() >= eigh_workspace_bytes(m), "work is smaller than eigh_workspace_bytes says");
  if (!std::isfinite(backend.abs_max(a))) {
    throw NumericError("no eigenvectors of a " + std::to_string(m) + "x" + std::to_string(m) +
                       " matrix: an entry is not finite");
  }
  backend.convert(a, 1, vectors);
  const MatrixView scratch = carve(work, 1, work_size(m), DType::f64);
  const auto square = static_cast<std::size_t>(m * m);
  OnHost<double> z(backend, static_cast<double*>(vectors.data), square);
  OnHost<double> numbers(backend, static_cast<double*>(scratch.data),
                         static_cast<std::size_t>(work_size(m)), /*fetch=*/false);
  OnHost<int> integers(backend, reinterpret_cast<int*>(work.data()),
                       static_cast<std::size_t>(integers_size(m)), /*fetch=*/false);
  const int side = static_cast<int>(m);
  const int lwork = static_cast<int>(work_size(m));
  const int liwork = static_cast<int>(integers_size(m));
  int info = 0;
  // LAPACK counts by columns: its upper triangle is our lower one, and its columns are our rows.
  dsyevd_("V", "U", &side, z.data(), &side, values.data(), numbers.data(), &lwork, integers.data(),
          &liwork, &info);
  if (info != 0) {
    throw NumericError("no eigenvectors of a " + std::to_string(m) + "x" + std::to_string(m) +
                       " matrix: dsyevd did not converge (info " + std::to_string(info) + ")");
  }
  z.put_back();
}

std::size_t orthogonal_iteration_workspace_bytes(Index m) {
  return 2 * piece_bytes(m, m, DType::f64) + piece_bytes(m, 1, DType::f64) +
         piece_bytes(1, reflections_size(m), DType::f64);
}

void orthogonal_iteration(ConstMatrixView a, MatrixView vectors, std::span<Index> order,
                          std::span<std::byte> work, Backend& backend) {
  const Index m = a.rows;
  expects(m > 0 && m <= largest_eigh_side && is_square(a),
          "orthogonal_iteration takes a square matrix of f32 or f64, of 32000 rows at most");
  expects(vectors.rows == m && vectors.cols == m && vectors.dtype == DType::f64 &&
              vectors.contiguous() && vectors.data != a.data,
          "orthogonal_iteration needs m×m vectors of f64, without gaps, apart from the matrix");
  expects(static_cast<Index>(order.size()) == m, "orthogonal_iteration gives an order of m");
  expects(work.size() >= orthogonal_iteration_workspace_bytes(m),
          "work is smaller than orthogonal_iteration_workspace_bytes says");
  const double norm = std::sqrt(backend.sum_squares(a));
  if (!std::isfinite(norm)) {
    throw NumericError("no eigenvectors of a " + std::to_string(m) + "x" + std::to_string(m) +
                       " matrix: an entry is not finite");
  }
  const MatrixView wide = carve(work, m, m, DType::f64);
  const MatrixView product = carve(work, m, m, DType::f64);
  const MatrixView numbers = carve(work, m, 1, DType::f64);
  const MatrixView scratch = carve(work, 1, reflections_size(m), DType::f64);
  backend.convert(a, 1, wide);
  backend.add_diagonal(std::ldexp(norm, -20), wide);
  backend.gemm(1, vectors, Transpose::no, wide, Transpose::no, 0, product);
  backend.row_dots(product, vectors, numbers);

  const auto square = static_cast<std::size_t>(m * m);
  OnHost<const double> values(backend, static_cast<const double*>(numbers.data),
                              static_cast<std::size_t>(m));
  OnHost<const double> lines(backend, static_cast<const double*>(product.data), square);
  OnHost<double> q(backend, static_cast<double*>(vectors.data), square, /*fetch=*/false);
  OnHost<double> reflections(backend, static_cast<double*>(scratch.data),
                             static_cast<std::size_t>(reflections_size(m)), /*fetch=*/false);
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](Index i, Index j) { return values.data()[i] > values.data()[j]; });
  for (Index i = 0; i < m; ++i) {
    std::copy_n(lines.data() + order[static_cast<std::size_t>(i)] * m, m, q.data() + i * m);
  }
  // LAPACK counts by columns: its columns are our rows.
  const int side = static_cast<int>(m);
  const int lwork = static_cast<int>(reflections_size(m) - m);
  int info = 0;
  double* const tau = reflections.data();
  dgeqrf_(&side, &side, q.data(), &side, tau, tau + m, &lwork, &info);
  if (info == 0) dorgqr_(&side, &side, &side, q.data(), &side, tau, tau + m, &lwork, &info);
  expects<NumericError>(info == 0, "dgeqrf and dorgqr take no such matrix");
  q.put_back();
}

std::size_t spectral_function_workspace_bytes(Index m) {
  return 2 * piece_bytes(m, m, DType::f64) + piece_bytes(m, 1, DType::f64);
}

void spectral_function(ConstMatrixView vectors, std::span<const double> f, MatrixView to,
                       std::span<std::byte> work, Backend& backend) {
  const Index m = vectors.rows;
  expects(is_square(vectors) && vectors.dtype == DType::f64 && is_square(to) && to.rows == m &&
              static_cast<Index>(f.size()) == m,
          "spectral_function takes m eigenvectors and values, and gives an m×m matrix");
  expects(work.size() >= spectral_function_workspace_bytes(m),
          "work is smaller than spectral_function_workspace_bytes says");
  const MatrixView half = carve(work, m, m, DType::f64);
  const MatrixView product = carve(work, m, m, DType::f64);
  const MatrixView factors = carve(work, m, 1, DType::f64);
  OnHost<double> roots(backend, static_cast<double*>(factors.data), f.size(), /*fetch=*/false);
  std::transform(f.begin(), f.end(), roots.span().begin(), [](double x) { return std::sqrt(x); });
  roots.put_back();
  backend.convert(vectors, 1, half);
  backend.scale_lines(factors, false, half);
  backend.syrk(1, half, Transpose::yes, 0, product);  // a product with itself
  backend.convert(product, 1, to);
}

EighReport spd_root_eigh(ConstMatrixView p, double exponent, const Damping& damping,
                         Eigenvalues how, MatrixView inverse, MatrixView root,
                         std::span<std::byte> work, Backend& backend) {
  const Index m = p.rows;
  const auto is_output = [&](ConstMatrixView v) {
    return v.data == nullptr || (is_square(v) && v.rows == m && v.dtype == p.dtype);
  };
  expects(m > 0 && is_square(p), "spd_root_eigh takes a square matrix of f32 or f64");
  expects(
      is_output(inverse) && is_output(root) && (root.data == nullptr || root.data != inverse.data),
      "the roots are of the shape and the type of P, each in a place of its own");
  expects<ConfigError>(exponent > 0, "spd_root_eigh needs an exponent above 0");
  expects(work.size() >= spd_root_eigh_workspace_bytes(m),
          "work is smaller than spd_root_eigh_workspace_bytes says");

  const MatrixView v = carve(work, m, m, DType::f64);
  const MatrixView factors = carve(work, m, 1, DType::f64);
  OnHost<double> values(backend, static_cast<double*>(factors.data), static_cast<std::size_t>(m),
                        /*fetch=*/false);
  const std::span<double> lambda = values.span();
  eigh(p, v, lambda, work, backend);
  const MatrixView product = carve(work, m, m, DType::f64);  // where dsyevd worked

  EighReport report{lambda.front(), lambda.back(), 0, 0};
  report.negative = std::count_if(lambda.begin(), lambda.end(), [](double x) { return x < 0; });
  const double norm =
      std::sqrt(std::inner_product(lambda.begin(), lambda.end(), lambda.begin(), 0.0));
  const double trace = std::accumulate(lambda.begin(), lambda.end(), 0.0);
  report.damping = damping.on_diagonal(trace, norm, m);
  const double shift = how == Eigenvalues::shift ? std::min(report.least, 0.0) : 0.0;
  for (double& x : lambda) {
    x = how == Eigenvalues::clamp ? std::max(x, report.damping)
                                  : std::max(x - shift, 0.0) + report.damping;
  }
  if (!(lambda.front() > 0)) {
    throw NumericError("no root of a singular matrix: its least eigenvalue is " +
                       std::to_string(report.least) + ", and nothing is added to it");
  }

  // VᵀFV as a product of F^½V with itself: exactly symmetric.
  const auto write = [&](double power, MatrixView to) {
    for (double& x : lambda) x = std::pow(x, power);
    values.put_back();
    backend.scale_lines(factors, false, v);
    backend.syrk(1, v, Transpose::yes, 0, product);
    backend.convert(product, 1, to);
  };
  if (inverse.data != nullptr) write(-exponent / 2, inverse);
  // From μ^(−e/2), which V's rows have by then, to μ^(e/2).
  if (root.data != nullptr) write(inverse.data != nullptr ? -2 : exponent / 2, root);
  return report;
}

}  // namespace orthrus::kernels
