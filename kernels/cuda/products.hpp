#pragma once
/// @file
/// CUDA's products: cuBLASLt, and cuBLAS for symmetric ones of f32 and f64.

#include <memory>
#include <orthrus/stream.hpp>
#include <orthrus/view.hpp>

#include "kernels/check.hpp"

namespace orthrus::kernels::cuda {

/// Arguments have been checked and no side is 0. Everything enters the stream.
///
/// The same shapes give the same bits wherever the operands lie: an algorithm is chosen once per
/// shape, for rows that begin at multiples of 16 bytes, and operands that do not lie so are packed
/// first. f32 is f32, not TF32; bf16 is summed in f32 and rounded once.
class Products {
 public:
  explicit Products(Stream stream);
  ~Products();
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  void gemm(const ProductShape& shape, double alpha, ConstMatrixView a, Transpose op_a,
            ConstMatrixView b, Transpose op_b, double beta, MatrixView c);
  void syrk(const ProductShape& shape, double alpha, ConstMatrixView a, Transpose op_a, double beta,
            MatrixView c);

  /// Products enter another stream from here on. The caller sees to it that the two do not overlap.
  void enter(Stream stream);
  /// Of its scratch.
  [[nodiscard]] int growths() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace orthrus::kernels::cuda
