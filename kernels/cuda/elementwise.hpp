#pragma once
/// @file
/// CUDA's loops over entries: what arithmetic the CPU's loops do, in the same order, with the same
/// bits. Arguments have been checked and no view is empty; everything enters `stream`. Where a
/// result is one number, `out` is an f64 in device memory.

#include <cstddef>
#include <cstdint>
#include <orthrus/stream.hpp>
#include <orthrus/view.hpp>

#include "kernels/backend.hpp"

namespace orthrus::kernels::cuda {

/// to ← scale·from. `to` may be `from` where the types are the same.
void convert(ConstMatrixView from, double scale, MatrixView to, Stream stream);
/// The bits, of one dtype.
void copy_entries(ConstMatrixView from, MatrixView to, Stream stream);
/// `key` is `mix_seed(seed, stream_id)`.
void round_stochastic(ConstMatrixView from, MatrixView to, std::uint64_t key, std::uint64_t step,
                      std::uint64_t first, Stream stream);
void axpby(double a, ConstMatrixView x, double b, MatrixView y, Stream stream);
void sign(ConstMatrixView from, MatrixView to, Stream stream);
void scale_lines(ConstMatrixView s, bool of_columns, MatrixView x, Stream stream);

void fill(double value, MatrixView to, Stream stream);
void add_diagonal(double a, MatrixView c, Stream stream);
void mirror_lower(MatrixView c, Stream stream);
void pack_triangle(ConstMatrixView full, float* packed, Stream stream);
/// The lower triangle only.
void unpack_lower(const float* packed, MatrixView full, Stream stream);

void adamw_pull_back(const AdamWScalars& s, double kappa, ConstMatrixView v, ConstMatrixView e,
                     MatrixView m, Stream stream);
void split_f32(ConstMatrixView w, MatrixView high, MatrixView low, Stream stream);
void merge_f32(ConstMatrixView high, ConstMatrixView low, MatrixView w, Stream stream);

/// Numbers of scratch that block sums of `lines` lines of `size` elements need.
std::size_t block_sum_scratch(Index lines, Index size);
void sum_squares(ConstMatrixView x, double* scratch, double* out, Stream stream);
void decay_step(double rho, double eta, ConstMatrixView u, MatrixView w, double* scratch,
                double* out, Stream stream);
void adamw(const AdamWScalars& s, ConstMatrixView g, MatrixView m, MatrixView v, MatrixView w,
           double* scratch, double* out, Stream stream);
/// Rows need `block_sum_scratch(x.rows, x.cols)`, columns nothing.
void line_sum_squares(ConstMatrixView x, bool of_columns, double* scratch, MatrixView out,
                      Stream stream);
/// As the bits of an f64.
void abs_max(ConstMatrixView x, double* out, Stream stream);
void trace(ConstMatrixView c, double* out, Stream stream);
void row_dots(ConstMatrixView x, ConstMatrixView y, MatrixView out, Stream stream);

// Each by a kernel that ends with the number, in `numbers`, and one that divides by it.
inline constexpr std::size_t division_numbers = 4;
/// Numbers of scratch.
std::size_t normalize_scratch(Index size);
/// Squares of f32 are summed as they are, where the CPU sums those of scaled entries: the same sum
/// but for ties with what is 2^-149 of the largest.
void normalize(ConstMatrixView x, const NormOptions& options, int safe_exponent, double* scratch,
               double* numbers, MatrixView to, Stream stream);
void divide_by_norm(ConstMatrixView r, const NormOptions& options, bool squared,
                    ConstMatrixView from, double* numbers, MatrixView to, Stream stream);
void split_mean(MatrixView c, ConstMatrixView x, double* numbers, MatrixView to, Stream stream);
void inverse_roots(MatrixView s, Stream stream);

}  // namespace orthrus::kernels::cuda
