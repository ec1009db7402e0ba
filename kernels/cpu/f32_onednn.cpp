#include <dnnl.h>

#include <algorithm>
#include <orthrus/error.hpp>
#include <string>

#include "kernels/cpu/f32_product.hpp"

namespace orthrus::kernels::cpu {
namespace {

/// A stride is wanted even where there is no second row.
Index stride(ConstMatrixView v) { return std::max({v.ld, v.cols, Index{1}}); }

void product(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b, Transpose op_b,
             double beta, MatrixView c) {
  const bool ta = op_a == Transpose::yes;
  const bool tb = op_b == Transpose::yes;
  const dnnl_status_t status =
      dnnl_sgemm(ta ? 'T' : 'N', tb ? 'T' : 'N', c.rows, c.cols, ta ? a.rows : a.cols,
                 static_cast<float>(alpha), static_cast<const float*>(a.data), stride(a),
                 static_cast<const float*>(b.data), stride(b), static_cast<float>(beta),
                 static_cast<float*>(c.data), stride(c));
  if (status != dnnl_success) {
    throw DeviceError("dnnl_sgemm: oneDNN status " + std::to_string(status));
  }
}

}  // namespace

F32Product onednn_f32_product() {
  constexpr int needed = dnnl_cpu_isa_avx512_core;
  static const bool works = (dnnl_get_effective_cpu_isa() & needed) == needed;
  return works ? product : nullptr;
}

}  // namespace orthrus::kernels::cpu
