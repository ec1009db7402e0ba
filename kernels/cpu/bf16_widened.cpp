#include <cblas.h>

#include <vector>

#include "kernels/cpu/bf16_product.hpp"
#include "kernels/cpu/elementwise.hpp"

namespace orthrus::kernels::cpu {
namespace {

void convert_rows(ConstMatrixView from, MatrixView to) {
  for (Index i = 0; i < from.rows; ++i) {
    const auto* source = static_cast<const std::byte*>(from.data);
    auto* target = static_cast<std::byte*>(to.data);
    convert(from.dtype, source + i * from.ld * static_cast<Index>(bytes_of(from.dtype)), 1,
            to.dtype, target + i * to.ld * static_cast<Index>(bytes_of(to.dtype)), from.cols);
  }
}

/// A contiguous f32 matrix of this shape in `storage`, which only grows.
MatrixView scratch(std::vector<float>& storage, ConstMatrixView shape) {
  const auto need = static_cast<std::size_t>(shape.size());
  if (storage.size() < need) storage.resize(need);
  return matrix_view(storage.data(), shape.rows, shape.cols);
}

class WidenedProduct final : public Bf16Product {
 public:
  void gemm(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b, Transpose op_b,
            double beta, MatrixView c) override {
    const MatrixView wide_a = scratch(a_, a);
    const MatrixView wide_b = scratch(b_, b);
    const bool narrow = c.dtype != DType::f32;
    const MatrixView wide_c = narrow ? scratch(c_, c) : c;
    convert_rows(a, wide_a);
    convert_rows(b, wide_b);
    if (narrow && beta != 0) convert_rows(c, wide_c);
    const Index k = op_a == Transpose::yes ? a.rows : a.cols;
    cblas_sgemm(CblasRowMajor, op_a == Transpose::yes ? CblasTrans : CblasNoTrans,
                op_b == Transpose::yes ? CblasTrans : CblasNoTrans, static_cast<int>(c.rows),
                static_cast<int>(c.cols), static_cast<int>(k), static_cast<float>(alpha), a_.data(),
                static_cast<int>(a.cols), b_.data(), static_cast<int>(b.cols),
                static_cast<float>(beta), static_cast<float*>(wide_c.data),
                static_cast<int>(wide_c.ld));
    if (narrow) convert_rows(wide_c, c);
  }

 private:
  std::vector<float> a_, b_, c_;
};

}  // namespace

std::unique_ptr<Bf16Product> open_widened_product() { return std::make_unique<WidenedProduct>(); }

}  // namespace orthrus::kernels::cpu
