#include <cublasLt.h>
#include <cublas_v2.h>

#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "kernels/bf16.hpp"

struct EmulatedBlas {
  cudaStream_t stream = nullptr;
};

namespace {

using orthrus::BFloat16;
using orthrus::kernels::to_bf16;
using orthrus::kernels::to_float;

double load(float x) { return static_cast<double>(x); }
double load(double x) { return x; }
double load(BFloat16 x) { return static_cast<double>(to_float(x)); }

bool aligned(const void* data, std::int64_t ld, std::size_t width) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 &&
         static_cast<std::size_t>(ld) * width % 16 == 0;
}

/// Column-major C (m×n) ← α·op(A)·op(B) + β·C, summed in C, in an order that `order` picks. The
/// type of the scalars is that of the sums.
template <class T, class R, class C>
void product(cublasOperation_t op_a, cublasOperation_t op_b, std::int64_t m, std::int64_t n,
             std::int64_t k, C alpha, const T* a, std::int64_t lda, const T* b, std::int64_t ldb,
             C beta, R* c, std::int64_t ldc, std::uint64_t order, bool upper_only) {
  for (std::int64_t j = 0; j < n; ++j) {
    for (std::int64_t i = 0; i < (upper_only ? j + 1 : m); ++i) {
      C sum = 0;
      for (std::int64_t q = 0; q < k; ++q) {
        const std::int64_t p =
            (q + static_cast<std::int64_t>(order % static_cast<std::uint64_t>(k))) % k;
        const T x = op_a == CUBLAS_OP_N ? a[i + p * lda] : a[p + i * lda];
        const T y = op_b == CUBLAS_OP_N ? b[p + j * ldb] : b[j + p * ldb];
        sum += static_cast<C>(load(x)) * static_cast<C>(load(y));
      }
      R& to = c[i + j * ldc];
      const C value = beta == 0 ? alpha * sum : alpha * sum + beta * static_cast<C>(load(to));
      if constexpr (std::is_same_v<R, BFloat16>) {
        to = to_bf16(value);
      } else {
        to = value;
      }
    }
  }
}

template <class F>
cublasStatus_t enter(cudaStream_t stream, F work) {
  const cudaError_t status = emulated_cuda::enter(stream, [work] {
    const emulated_cuda::Open open;
    work();
  });
  return status == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

template <class T>
cublasStatus_t syrk(cublasHandle_t handle, cublasFillMode_t uplo, cublasOperation_t op,
                    std::int64_t n, std::int64_t k, T alpha, const T* a, std::int64_t lda, T beta,
                    T* c, std::int64_t ldc) {
  if (uplo != CUBLAS_FILL_MODE_UPPER || lda < (op == CUBLAS_OP_N ? n : k) || ldc < n ||
      !aligned(a, lda, sizeof(T)) || !aligned(c, ldc, sizeof(T))) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const auto order = static_cast<std::uint64_t>(lda + ldc);
  return enter(handle->stream, [=] {
    product<T, T, T>(op, op == CUBLAS_OP_N ? CUBLAS_OP_T : CUBLAS_OP_N, n, n, k, alpha, a, lda, a,
                     lda, beta, c, ldc, order, true);
  });
}

std::uint64_t shape_of(const cublasLtMatmulDescOpaque_t& op, const cublasLtMatrixLayoutOpaque_t& a,
                       const cublasLtMatrixLayoutOpaque_t& b,
                       const cublasLtMatrixLayoutOpaque_t& d) {
  std::uint64_t hash = 17;
  for (const std::uint64_t x :
       {a.rows, a.cols, b.rows, b.cols, d.rows, d.cols, static_cast<std::uint64_t>(d.count),
        static_cast<std::uint64_t>(op.op_a), static_cast<std::uint64_t>(op.op_b),
        static_cast<std::uint64_t>(a.type), static_cast<std::uint64_t>(d.type)}) {
    hash = hash * 1000003 + x;
  }
  return hash;
}

bool fits(const cublasLtMatmulDescOpaque_t& op, const cublasLtMatrixLayoutOpaque_t& a,
          const cublasLtMatrixLayoutOpaque_t& b, const cublasLtMatrixLayoutOpaque_t& d) {
  const std::uint64_t m = op.op_a == CUBLAS_OP_N ? a.rows : a.cols;
  const std::uint64_t ka = op.op_a == CUBLAS_OP_N ? a.cols : a.rows;
  const std::uint64_t kb = op.op_b == CUBLAS_OP_N ? b.rows : b.cols;
  const std::uint64_t n = op.op_b == CUBLAS_OP_N ? b.cols : b.rows;
  for (const cublasLtMatrixLayoutOpaque_t* v : {&a, &b, &d}) {
    const bool widened = v == &d && a.type == CUDA_R_16BF && d.type == CUDA_R_32F;
    if ((v->type != a.type && !widened) || v->count != d.count ||
        v->ld < static_cast<std::int64_t>(v->rows)) {
      return false;
    }
  }
  const bool wide = a.type == CUDA_R_64F;
  return ka == kb && d.rows == m && d.cols == n && m * n * ka > 0 &&
         op.compute == (wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F) &&
         op.scale == (wide ? CUDA_R_64F : CUDA_R_32F);
}

}  // namespace

const char* cublasGetStatusString(cublasStatus_t) { return "emulated cuBLAS refuses"; }
const char* cublasGetStatusName(cublasStatus_t status) {
  return status == CUBLAS_STATUS_INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE"
                                               : "CUBLAS_STATUS_NOT_SUPPORTED";
}
cublasStatus_t cublasCreate(cublasHandle_t* handle) {
  *handle = new EmulatedBlas;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t handle) {
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
  handle->stream = stream;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void*, std::size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSsyrk_64(cublasHandle_t handle, cublasFillMode_t uplo, cublasOperation_t op,
                              std::int64_t n, std::int64_t k, const float* alpha, const float* a,
                              std::int64_t lda, const float* beta, float* c, std::int64_t ldc) {
  return syrk(handle, uplo, op, n, k, *alpha, a, lda, *beta, c, ldc);
}
cublasStatus_t cublasDsyrk_64(cublasHandle_t handle, cublasFillMode_t uplo, cublasOperation_t op,
                              std::int64_t n, std::int64_t k, const double* alpha, const double* a,
                              std::int64_t lda, const double* beta, double* c, std::int64_t ldc) {
  return syrk(handle, uplo, op, n, k, *alpha, a, lda, *beta, c, ldc);
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = reinterpret_cast<cublasLtHandle_t>(std::malloc(1));
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  std::free(handle);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t layout, cudaDataType_t type,
                                        std::uint64_t rows, std::uint64_t cols, std::int64_t ld) {
  *layout = {type, rows, cols, ld, 1, 0};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void* value, std::size_t bytes) {
  const bool count = attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT;
  if (bytes != (count ? 4U : 8U)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(count ? static_cast<void*>(&layout->count) : &layout->distance, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDesc_t operation, cublasComputeType_t compute,
                                      cudaDataType_t scale) {
  *operation = {compute, scale, CUBLAS_OP_N, CUBLAS_OP_N};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t operation,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, std::size_t bytes) {
  if (bytes != 4) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(attribute == CUBLASLT_MATMUL_DESC_TRANSA ? &operation->op_a : &operation->op_b, value,
              bytes);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreference_t preference) {
  *preference = {0, 7, 256, 256, 256, 256};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, std::size_t bytes) {
  const bool wide = attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
  if (bytes != (wide ? 8U : 4U)) return CUBLAS_STATUS_INVALID_VALUE;
  void* to = &preference->alignment_d;
  if (wide) to = &preference->workspace;
  if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) to = &preference->reductions;
  if (attribute == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES) to = &preference->alignment_a;
  if (attribute == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES) to = &preference->alignment_b;
  if (attribute == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES) to = &preference->alignment_c;
  std::memcpy(to, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t operation,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t* results,
                                              int* found) {
  *found = 0;
  const cublasLtMatmulPreferenceOpaque_t& p = *preference;
  if (wanted < 1 || c != d || !fits(*operation, *a, *b, *d) || p.alignment_a != 16 ||
      p.alignment_b != 16 || p.alignment_c != 16 || p.alignment_d != 16 || p.reductions != 2) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  results[0] = {
      {shape_of(*operation, *a, *b, *d), static_cast<std::uint64_t>(a->ld * 7 + b->ld * 3 + d->ld)},
      0,
      CUBLAS_STATUS_SUCCESS};
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t operation, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t la, const void* b,
                              cublasLtMatrixLayout_t lb, const void* beta, const void* c,
                              cublasLtMatrixLayout_t lc, void* d, cublasLtMatrixLayout_t ld,
                              const cublasLtMatmulAlgo_t* algo, void*, std::size_t,
                              cudaStream_t stream) {
  const auto width = [](cublasLtMatrixLayout_t layout) -> std::size_t {
    return layout->type == CUDA_R_32F ? 4 : layout->type == CUDA_R_64F ? 8 : 2;
  };
  if (c != d || lc != ld || !fits(*operation, *la, *lb, *ld) ||
      algo->shape != shape_of(*operation, *la, *lb, *ld)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  for (const auto& [data, layout] :
       {std::pair<const void*, cublasLtMatrixLayout_t>{a, la}, {b, lb}, {d, ld}}) {
    if (!aligned(data, layout->ld, width(layout)) ||
        static_cast<std::size_t>(layout->distance) * width(layout) % 16 != 0) {
      return CUBLAS_STATUS_NOT_SUPPORTED;
    }
  }
  // All that is the host's is read now.
  const auto run = [&](auto element, auto result, auto compute) {
    using T = decltype(element);
    using R = decltype(result);
    using C = decltype(compute);
    return enter(
        stream, [op_a = operation->op_a, op_b = operation->op_b, la = *la, lb = *lb, ld = *ld,
                 alpha = *static_cast<const C*>(alpha), beta = *static_cast<const C*>(beta),
                 a = static_cast<const T*>(a), b = static_cast<const T*>(b), d = static_cast<R*>(d),
                 order = algo->strides] {
          for (std::int32_t i = 0; i < ld.count; ++i) {
            product<T, R, C>(op_a, op_b, static_cast<std::int64_t>(ld.rows),
                             static_cast<std::int64_t>(ld.cols),
                             static_cast<std::int64_t>(op_a == CUBLAS_OP_N ? la.cols : la.rows),
                             alpha, a + i * la.distance, la.ld, b + i * lb.distance, lb.ld, beta,
                             d + i * ld.distance, ld.ld, order, false);
          }
        });
  };
  if (la->type == CUDA_R_32F) return run(float{}, float{}, float{});
  if (la->type == CUDA_R_64F) return run(double{}, double{}, double{});
  if (ld->type == CUDA_R_32F) return run(BFloat16{}, float{}, float{});
  return run(BFloat16{}, BFloat16{}, float{});
}
