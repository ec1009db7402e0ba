#pragma once
/// @file
/// Small matrices in double, on BLAS and LAPACK: what studies compute with, exactly.

#include <orthrus/view.hpp>
#include <vector>

namespace orthrus::studies {

/// Row-major rows×cols.
struct Matrix {
  Index rows = 0, cols = 0;
  std::vector<double> values;

  Matrix() = default;
  Matrix(Index m, Index n) : rows(m), cols(n), values(static_cast<std::size_t>(m * n), 0.0) {}
  double& operator()(Index i, Index j) { return values[static_cast<std::size_t>(i * cols + j)]; }
  double operator()(Index i, Index j) const {
    return values[static_cast<std::size_t>(i * cols + j)];
  }
  [[nodiscard]] ConstMatrixView view() const { return matrix_view(values.data(), rows, cols); }
};

/// A copy in double of an f32, bf16 or f64 matrix. @throws ShapeError another type, or no entry.
/// @throws NumericError an entry is not finite.
Matrix to_double(ConstMatrixView a);

enum class Op : bool { none, transpose };
/// op(A)·op(B).
Matrix product(const Matrix& a, const Matrix& b, Op on_a = Op::none, Op on_b = Op::none);
/// y += alpha·x.
void add(Matrix& y, double alpha, const Matrix& x);
double dot(const Matrix& a, const Matrix& b);
double frobenius(const Matrix& a);
Matrix transposed(const Matrix& a);

/// A = U·diag(s)·Vᵀ, thin, s descending, by dgesdd. @throws NumericError it does not converge.
struct Svd {
  Matrix u;  ///< m×k
  std::vector<double> s;
  Matrix vt;  ///< k×n
};
Svd svd(const Matrix& a);
/// Without the vectors.
std::vector<double> singular_values(const Matrix& a);
/// UVᵀ: the nearest matrix with orthonormal rows or columns. Directions of no singular value (below
/// `cutoff`·s₁) stay zero.
Matrix polar(const Matrix& a, double cutoff = 0);

/// A = VᵀΛV: row i of `vectors` belongs to values[i], which ascend. The lower triangle is read.
struct Eigen {
  std::vector<double> values;
  Matrix vectors;
};
Eigen eigen(const Matrix& a);

/// The smaller of AAᵀ and AᵀA: its upper triangle.
Matrix gram_upper(const Matrix& a);
/// Ascending, of a symmetric matrix, of which the upper triangle is read, and all destroyed.
std::vector<double> eigenvalues(Matrix& a);

/// X with AX = B for a symmetric positive A. @throws NumericError it is not.
Matrix solve_positive(const Matrix& a, const Matrix& b);

}  // namespace orthrus::studies
