#include "runtime/studies/dense.hpp"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <orthrus/error.hpp>
#include <string>

#include "kernels/bf16.hpp"

// LAPACK has no header that every BLAS brings.
extern "C" {
void dgesdd_(const char* jobz, const int* m, const int* n, double* a, const int* lda, double* s,
             double* u, const int* ldu, double* vt, const int* ldvt, double* work, const int* lwork,
             int* iwork, int* info);
void dsyevd_(const char* jobz, const char* uplo, const int* n, double* a, const int* lda, double* w,
             double* work, const int* lwork, int* iwork, const int* liwork, int* info);
void dposv_(const char* uplo, const int* n, const int* nrhs, double* a, const int* lda, double* b,
            const int* ldb, int* info);
}

namespace orthrus::studies {
namespace {

/// LAPACK reads our m×n as its n×m: its left vectors are our right ones.
std::vector<double> decompose(const Matrix& a, Matrix* u, Matrix* vt) {
  const Index k = std::min(a.rows, a.cols);
  std::vector<double> copy = a.values, s(static_cast<std::size_t>(k));
  std::vector<int> integers(static_cast<std::size_t>(8 * k));
  const int m = static_cast<int>(a.cols), n = static_cast<int>(a.rows), side = static_cast<int>(k);
  if (u != nullptr) {
    *u = Matrix(a.rows, k);
    *vt = Matrix(k, a.cols);
  }
  const char* job = u != nullptr ? "S" : "N";
  double* left = u != nullptr ? vt->values.data() : nullptr;
  double* right = u != nullptr ? u->values.data() : nullptr;
  double size = 0;
  int query = -1, info = 0;
  dgesdd_(job, &m, &n, copy.data(), &m, s.data(), left, &m, right, &side, &size, &query,
          integers.data(), &info);
  const int lwork = static_cast<int>(size);
  std::vector<double> work(static_cast<std::size_t>(lwork));
  dgesdd_(job, &m, &n, copy.data(), &m, s.data(), left, &m, right, &side, work.data(), &lwork,
          integers.data(), &info);
  if (info != 0) {
    throw NumericError("no singular values of a " + std::to_string(a.rows) + "x" +
                       std::to_string(a.cols) + " matrix: dgesdd info " + std::to_string(info));
  }
  return s;
}

}  // namespace

Matrix to_double(ConstMatrixView a) {
  expects(a.rows > 0 && a.cols > 0, "a matrix with entries");
  expects(a.dtype == DType::f32 || a.dtype == DType::f64 || a.dtype == DType::bf16,
          "a matrix of f32, bf16 or f64");
  Matrix out(a.rows, a.cols);
  for (Index i = 0; i < a.rows; ++i) {
    for (Index j = 0; j < a.cols; ++j) {
      const Index e = i * a.ld + j;
      double x = 0;
      if (a.dtype == DType::f64) {
        x = static_cast<const double*>(a.data)[e];
      } else if (a.dtype == DType::f32) {
        x = static_cast<double>(static_cast<const float*>(a.data)[e]);
      } else {
        x = static_cast<double>(kernels::to_float(static_cast<const BFloat16*>(a.data)[e]));
      }
      expects<NumericError>(std::isfinite(x), "a matrix of finite entries");
      out(i, j) = x;
    }
  }
  return out;
}

Matrix product(const Matrix& a, const Matrix& b, Op on_a, Op on_b) {
  const bool ta = on_a == Op::transpose, tb = on_b == Op::transpose;
  const Index m = ta ? a.cols : a.rows, k = ta ? a.rows : a.cols;
  const Index n = tb ? b.rows : b.cols;
  expects((tb ? b.cols : b.rows) == k, "a product of matrices that fit");
  Matrix c(m, n);
  cblas_dgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans,
              static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), 1, a.values.data(),
              static_cast<int>(a.cols), b.values.data(), static_cast<int>(b.cols), 0,
              c.values.data(), static_cast<int>(n));
  return c;
}

void add(Matrix& y, double alpha, const Matrix& x) {
  expects(y.rows == x.rows && y.cols == x.cols, "a sum of matrices of one shape");
  for (std::size_t i = 0; i < y.values.size(); ++i) y.values[i] += alpha * x.values[i];
}

double dot(const Matrix& a, const Matrix& b) {
  expects(a.rows == b.rows && a.cols == b.cols, "an inner product of matrices of one shape");
  double sum = 0;
  for (std::size_t i = 0; i < a.values.size(); ++i) sum += a.values[i] * b.values[i];
  return sum;
}

double frobenius(const Matrix& a) { return std::sqrt(dot(a, a)); }

Matrix transposed(const Matrix& a) {
  Matrix t(a.cols, a.rows);
  for (Index i = 0; i < a.rows; ++i) {
    for (Index j = 0; j < a.cols; ++j) t(j, i) = a(i, j);
  }
  return t;
}

Svd svd(const Matrix& a) {
  Svd out;
  out.s = decompose(a, &out.u, &out.vt);
  return out;
}

std::vector<double> singular_values(const Matrix& a) { return decompose(a, nullptr, nullptr); }

Matrix polar(const Matrix& a, double cutoff) {
  Svd f = svd(a);
  for (std::size_t k = 0; k < f.s.size(); ++k) {
    if (f.s[k] > cutoff * f.s[0]) continue;
    for (Index i = 0; i < f.u.rows; ++i) f.u(i, static_cast<Index>(k)) = 0;
  }
  return product(f.u, f.vt);
}

Eigen eigen(const Matrix& a) {
  expects(a.rows == a.cols && a.rows > 0, "eigenvalues of a square matrix");
  Eigen out{std::vector<double>(static_cast<std::size_t>(a.rows)), a};
  const int n = static_cast<int>(a.rows);
  const int lwork = 1 + 6 * n + 2 * n * n, liwork = 3 + 5 * n;
  std::vector<double> work(static_cast<std::size_t>(lwork));
  std::vector<int> integers(static_cast<std::size_t>(liwork));
  int info = 0;
  dsyevd_("V", "U", &n, out.vectors.values.data(), &n, out.values.data(), work.data(), &lwork,
          integers.data(), &liwork, &info);
  expects<NumericError>(info == 0, "eigenvalues that converge");
  return out;
}

Matrix gram_upper(const Matrix& a) {
  const bool wide = a.rows <= a.cols;
  const Index n = std::min(a.rows, a.cols);
  Matrix gram(n, n);
  cblas_dsyrk(CblasRowMajor, CblasUpper, wide ? CblasNoTrans : CblasTrans, static_cast<int>(n),
              static_cast<int>(std::max(a.rows, a.cols)), 1, a.values.data(),
              static_cast<int>(a.cols), 0, gram.values.data(), static_cast<int>(n));
  return gram;
}

std::vector<double> eigenvalues(Matrix& a) {
  expects(a.rows == a.cols && a.rows > 0, "eigenvalues of a square matrix");
  const int n = static_cast<int>(a.rows);
  std::vector<double> values(static_cast<std::size_t>(n));
  double size = 0;
  int query = -1, integers_size = 0, info = 0;
  // LAPACK reads our upper triangle as its lower one.
  dsyevd_("N", "L", &n, a.values.data(), &n, values.data(), &size, &query, &integers_size, &query,
          &info);
  const int lwork = static_cast<int>(size);
  std::vector<double> work(static_cast<std::size_t>(lwork));
  std::vector<int> integers(static_cast<std::size_t>(std::max(integers_size, 1)));
  dsyevd_("N", "L", &n, a.values.data(), &n, values.data(), work.data(), &lwork, integers.data(),
          &integers_size, &info);
  expects<NumericError>(info == 0, "eigenvalues that converge");
  return values;
}

Matrix solve_positive(const Matrix& a, const Matrix& b) {
  expects(a.rows == a.cols && a.rows == b.rows, "a square system and a right side that fits");
  Matrix factor = a, x = transposed(b);  // its columns are our rows
  const int n = static_cast<int>(a.rows), sides = static_cast<int>(b.cols);
  int info = 0;
  dposv_("U", &n, &sides, factor.values.data(), &n, x.values.data(), &n, &info);
  expects<NumericError>(info == 0, "a positive matrix");
  return transposed(x);
}

}  // namespace orthrus::studies
