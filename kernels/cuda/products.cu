#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <string>

#include "kernels/cuda/elementwise.hpp"
#include "kernels/cuda/products.hpp"
#include "kernels/cuda/scratch.hpp"
#include "kernels/cuda/status.hpp"
#include "kernels/cuda/syrk_pieces.hpp"
#include "kernels/handle.hpp"

namespace orthrus::kernels::cuda {
namespace {

struct LtTraits {
  using Handle = cublasLtHandle_t;
  static Handle null() { return nullptr; }
  static void release(Handle handle) noexcept { cublasLtDestroy(handle); }
};
struct BlasTraits {
  using Handle = cublasHandle_t;
  static Handle null() { return nullptr; }
  static void release(Handle handle) noexcept { cublasDestroy(handle); }
};

/// What every row of an operand begins at a multiple of.
constexpr std::size_t row_alignment = 16;

/// The row stride that algorithms are chosen for.
Index chosen_ld(Index cols, DType dtype) {
  const auto width = static_cast<Index>(row_alignment / bytes_of(dtype));
  return std::max<Index>((cols + width - 1) / width, 1) * width;
}

/// A single row has no stride of its own.
Index given_ld(ConstMatrixView v) { return v.rows > 1 ? v.ld : chosen_ld(v.cols, v.dtype); }

bool is_aligned(ConstMatrixView v) {
  return reinterpret_cast<std::uintptr_t>(v.data) % row_alignment == 0 &&
         static_cast<std::size_t>(given_ld(v)) * bytes_of(v.dtype) % row_alignment == 0;
}

/// A multiple of 256.
std::size_t packed_bytes(ConstMatrixView v) {
  const Index elements = v.rows * chosen_ld(v.cols, v.dtype);
  return (static_cast<std::size_t>(elements) * bytes_of(v.dtype) + 255) / 256 * 256;
}

/// A row-major operand with its stride; the number of columns is the product's to know.
struct Operand {
  const void* data;
  Index ld;
};

/// Blocks at equal distances, in elements.
struct Batch {
  Index count = 1;
  Index a = 0, b = 0, c = 0;
};

/// α and β in the type that products of this dtype are scaled in.
struct Scale {
  Scale(double value, DType dtype) : wide(value), narrow(static_cast<float>(value)) {
    address = dtype == DType::f64 ? static_cast<const void*>(&wide) : &narrow;
  }
  Scale(const Scale&) = delete;
  Scale& operator=(const Scale&) = delete;
  double wide;
  float narrow;
  const void* address;
};

cudaDataType_t type_of(DType dtype) {
  return dtype == DType::f32 ? CUDA_R_32F : dtype == DType::bf16 ? CUDA_R_16BF : CUDA_R_64F;
}

/// A matrix as cuBLASLt sees it: the row-major rows×cols is its column-major cols×rows.
struct Layout {
  cublasLtMatrixLayoutOpaque_t opaque;

  Layout(DType dtype, Index rows, Index cols, Index ld, Index count, Index distance) {
    check_cublas(cublasLtMatrixLayoutInit(&opaque, type_of(dtype), static_cast<std::uint64_t>(cols),
                                          static_cast<std::uint64_t>(rows), ld),
                 "cublasLtMatrixLayoutInit");
    if (count == 1) return;
    const auto blocks = static_cast<std::int32_t>(count);
    set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, blocks);
    set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, static_cast<std::int64_t>(distance));
  }

  template <class T>
  void set(cublasLtMatrixLayoutAttribute_t attribute, T value) {
    check_cublas(cublasLtMatrixLayoutSetAttribute(&opaque, attribute, &value, sizeof value),
                 "cublasLtMatrixLayoutSetAttribute");
  }
};

}  // namespace

class Products::Impl {
 public:
  explicit Impl(Stream stream) : stream_(stream), workspace_(stream), packed_(stream) {
    check_cublas(cublasLtCreate(lt_.out()), "cublasLtCreate");
    check_cublas(cublasCreate(blas_.out()), "cublasCreate");
    enter(stream);
    check_cublas(cublasSetMathMode(blas_.get(), CUBLAS_DEFAULT_MATH),  // no TF32
                 "cublasSetMathMode");
  }

  void enter(Stream stream) {
    stream_ = stream;
    check_cublas(cublasSetStream(blas_.get(), static_cast<cudaStream_t>(stream.handle)),
                 "cublasSetStream");
    // After the stream, which takes the workspace back. Ours, so that nothing is allocated later.
    check_cublas(
        cublasSetWorkspace(blas_.get(), workspace_.at_least(workspace_bytes), workspace_bytes),
        "cublasSetWorkspace");
  }

  [[nodiscard]] int growths() const { return packed_.growths(); }

  void gemm(const ProductShape& s, double alpha, ConstMatrixView a, Transpose op_a,
            ConstMatrixView b, Transpose op_b, double beta, MatrixView c) {
    const bool direct = is_aligned(c);
    std::size_t need = direct ? 0 : packed_bytes(c);
    for (const ConstMatrixView v : {a, b}) need += is_aligned(v) ? 0 : packed_bytes(v);
    auto* room = static_cast<std::byte*>(packed_.at_least(need));
    const Operand left = is_aligned(a) ? Operand{a.data, given_ld(a)} : pack(a, room);
    const Operand right = is_aligned(b) ? Operand{b.data, given_ld(b)} : pack(b, room);
    const MatrixView to = direct ? c : place(c, beta != 0, room);
    multiply(a.dtype, c.dtype, op_a, op_b, s, {}, alpha, left, right, beta, to.data, given_ld(to));
    if (!direct) copy_entries(to, c, stream_);
  }

  void syrk(const ProductShape& s, double alpha, ConstMatrixView a, Transpose op_a, double beta,
            MatrixView c) {
    // cuBLAS chooses its kernels itself, perhaps by the stride: all strides but one are packed.
    const bool strict = a.dtype != DType::bf16;
    const auto fits = [&](ConstMatrixView v) {
      return is_aligned(v) && (!strict || given_ld(v) == chosen_ld(v.cols, v.dtype));
    };
    const bool direct = fits(c);
    auto* room = static_cast<std::byte*>(
        packed_.at_least((direct ? 0 : packed_bytes(c)) + (fits(a) ? 0 : packed_bytes(a))));
    const Operand from = fits(a) ? Operand{a.data, given_ld(a)} : pack(a, room);
    const MatrixView to = direct ? c : place(c, beta != 0, room);
    if (strict) {
      symmetric(c.dtype, op_a, s.n, s.k, alpha, from, beta, to);
    } else {
      triangle(a.dtype, op_a, s.n, s.k, alpha, from, beta, to);
    }
    mirror_lower(to, stream_);
    if (!direct) copy_entries(to, c, stream_);
  }

 private:
  /// What NVIDIA recommends for sm_90; older devices ask for less.
  static constexpr std::size_t workspace_bytes = std::size_t{32} << 20;

  using Shape = std::array<Index, 8>;

  /// Copies v to the front of `room`, at the stride that algorithms are chosen for.
  Operand pack(ConstMatrixView v, std::byte*& room) {
    const Index ld = chosen_ld(v.cols, v.dtype);
    copy_entries(v, {room, v.rows, v.cols, ld, v.dtype}, stream_);
    const Operand packed{room, ld};
    room += packed_bytes(v);
    return packed;
  }

  /// A place for c there, holding c when it is to be read.
  MatrixView place(MatrixView c, bool read, std::byte* room) {
    const MatrixView to{room, c.rows, c.cols, chosen_ld(c.cols, c.dtype), c.dtype};
    if (read) copy_entries(c, to, stream_);
    return to;
  }

  /// C ← α·op(A)·op(B) + β·C of aligned operands. The column-major twin is Cᵀ = op(B)ᵀ·op(A)ᵀ: B is
  /// its first operand, and each op stays as it is.
  /// @param result_dtype  C's: that of the factors, or f32.
  void multiply(DType dtype, DType result_dtype, Transpose op_a, Transpose op_b,
                const ProductShape& s, const Batch& batch, double alpha, Operand a, Operand b,
                double beta, void* c, Index ldc) {
    const bool ta = op_a == Transpose::yes;
    const bool tb = op_b == Transpose::yes;
    const Index a_rows = ta ? s.k : s.m;
    const Index a_cols = ta ? s.m : s.k;
    const Index b_rows = tb ? s.n : s.k;
    const Index b_cols = tb ? s.k : s.n;
    cublasLtMatmulDescOpaque_t operation;
    check_cublas(cublasLtMatmulDescInit(
                     &operation, dtype == DType::f64 ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
                     dtype == DType::f64 ? CUDA_R_64F : CUDA_R_32F),
                 "cublasLtMatmulDescInit");
    set_op(operation, CUBLASLT_MATMUL_DESC_TRANSA, tb);
    set_op(operation, CUBLASLT_MATMUL_DESC_TRANSB, ta);

    const Shape shape{
        s.m,        s.n, s.k, ta, tb, static_cast<Index>(dtype), static_cast<Index>(result_dtype),
        batch.count};
    auto found = algorithms_.find(shape);
    if (found == algorithms_.end()) {
      const auto layout = [&](DType type, Index rows, Index cols) {
        const Index ld = chosen_ld(cols, type);
        return Layout(type, rows, cols, ld, batch.count, rows * ld);
      };
      found = algorithms_
                  .emplace(shape, choose(operation, layout(dtype, b_rows, b_cols),
                                         layout(dtype, a_rows, a_cols),
                                         layout(result_dtype, s.m, s.n), describe(dtype, s)))
                  .first;
    }
    Layout first(dtype, b_rows, b_cols, b.ld, batch.count, batch.b);
    Layout second(dtype, a_rows, a_cols, a.ld, batch.count, batch.a);
    Layout result(result_dtype, s.m, s.n, ldc, batch.count, batch.c);
    const Scale scale_product(alpha, dtype);
    const Scale scale_c(beta, dtype);
    check_cublas(
        cublasLtMatmul(lt_.get(), &operation, scale_product.address, b.data, &first.opaque, a.data,
                       &second.opaque, scale_c.address, c, &result.opaque, c, &result.opaque,
                       &found->second, workspace_.at_least(workspace_bytes), workspace_bytes,
                       static_cast<cudaStream_t>(stream_.handle)),
        "cublasLtMatmul");
  }

  static void set_op(cublasLtMatmulDescOpaque_t& operation,
                     cublasLtMatmulDescAttributes_t attribute, bool transposed) {
    const cublasOperation_t op = transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    check_cublas(cublasLtMatmulDescSetAttribute(&operation, attribute, &op, sizeof op),
                 "cublasLtMatmulDescSetAttribute");
  }

  static std::string describe(DType dtype, const ProductShape& s) {
    return std::to_string(s.m) + "x" + std::to_string(s.n) + "x" + std::to_string(s.k) + " " +
           std::string(name_of(dtype));
  }

  /// The heuristic's first choice for operands of the chosen strides, aligned to 16 bytes, among
  /// algorithms that add partial sums, if they do, in the compute type.
  cublasLtMatmulAlgo_t choose(cublasLtMatmulDescOpaque_t& operation, Layout first, Layout second,
                              Layout result, const std::string& what) {
    cublasLtMatmulPreferenceOpaque_t preference;
    check_cublas(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      check_cublas(
          cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value),
          "cublasLtMatmulPreferenceSetAttribute");
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(workspace_bytes));
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      set(attribute, static_cast<std::uint32_t>(row_alignment));
    }
    cublasLtMatmulHeuristicResult_t best{};
    int count = 0;
    const std::string call = "cublasLtMatmulAlgoGetHeuristic for " + what;
    check_cublas(cublasLtMatmulAlgoGetHeuristic(lt_.get(), &operation, &first.opaque,
                                                &second.opaque, &result.opaque, &result.opaque,
                                                &preference, 1, &best, &count),
                 call.c_str());
    if (count == 0) throw_device_error(call + ": no algorithm");
    check_cublas(best.state, call.c_str());
    return best.algo;
  }

  /// The lower triangle of C by cuBLAS. Row-major lower is column-major upper, and a row-major n×k
  /// A is its transpose there.
  void symmetric(DType dtype, Transpose op_a, Index n, Index k, double alpha, Operand a,
                 double beta, MatrixView c) {
    const cublasOperation_t op = op_a == Transpose::yes ? CUBLAS_OP_N : CUBLAS_OP_T;
    const Index ldc = given_ld(c);
    if (dtype == DType::f32) {
      const auto alpha32 = static_cast<float>(alpha);
      const auto beta32 = static_cast<float>(beta);
      check_cublas(cublasSsyrk_64(blas_.get(), CUBLAS_FILL_MODE_UPPER, op, n, k, &alpha32,
                                  static_cast<const float*>(a.data), a.ld, &beta32,
                                  static_cast<float*>(c.data), ldc),
                   "cublasSsyrk");
    } else {
      check_cublas(cublasDsyrk_64(blas_.get(), CUBLAS_FILL_MODE_UPPER, op, n, k, &alpha,
                                  static_cast<const double*>(a.data), a.ld, &beta,
                                  static_cast<double*>(c.data), ldc),
                   "cublasDsyrk");
    }
  }

  /// The lower triangle of C, and a little above it, by products of blocks.
  void triangle(DType dtype, Transpose op_a, Index n, Index k, double alpha, Operand a, double beta,
                MatrixView c) {
    const auto width = static_cast<Index>(bytes_of(dtype));
    const auto width_c = static_cast<Index>(bytes_of(c.dtype));
    const Index ldc = given_ld(c);
    const Transpose other = op_a == Transpose::yes ? Transpose::no : Transpose::yes;
    // From one line of op(A) to the next.
    const Index line = op_a == Transpose::yes ? 1 : a.ld;
    const auto from = [&](Index i) {
      return Operand{static_cast<const std::byte*>(a.data) + i * line * width, a.ld};
    };
    for_each_syrk_piece(n, syrk_leaf(n), [&](const SyrkPiece& p) {
      const Batch batch{p.count, p.step * line, p.step * line, p.step * (ldc + 1)};
      multiply(dtype, c.dtype, op_a, other, {p.rows, p.cols, k}, batch, alpha, from(p.row),
               from(p.col), beta, static_cast<std::byte*>(c.data) + (p.row * ldc + p.col) * width_c,
               ldc);
    });
  }

  Stream stream_;
  Scratch workspace_;
  Scratch packed_;
  UniqueHandle<LtTraits> lt_;
  UniqueHandle<BlasTraits> blas_;
  std::map<Shape, cublasLtMatmulAlgo_t> algorithms_;
};

Products::Products(Stream stream) : impl_(std::make_unique<Impl>(stream)) {}
Products::~Products() = default;

void Products::enter(Stream stream) { impl_->enter(stream); }
int Products::growths() const { return impl_->growths(); }

void Products::gemm(const ProductShape& shape, double alpha, ConstMatrixView a, Transpose op_a,
                    ConstMatrixView b, Transpose op_b, double beta, MatrixView c) {
  impl_->gemm(shape, alpha, a, op_a, b, op_b, beta, c);
}

void Products::syrk(const ProductShape& shape, double alpha, ConstMatrixView a, Transpose op_a,
                    double beta, MatrixView c) {
  impl_->syrk(shape, alpha, a, op_a, beta, c);
}

}  // namespace orthrus::kernels::cuda
