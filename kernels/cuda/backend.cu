#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/check.hpp"
#include "kernels/cuda/elementwise.hpp"
#include "kernels/cuda/pages.hpp"
#include "kernels/cuda/products.hpp"
#include "kernels/cuda/quantize.hpp"
#include "kernels/cuda/scratch.hpp"
#include "kernels/cuda/status.hpp"
#include "kernels/devices.hpp"
#include "kernels/handle.hpp"
#include "kernels/rng.hpp"

namespace orthrus::kernels {
namespace cuda {

void check_cuda(int status, const char* call) {
  if (status == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(status);
  cudaGetLastError();  // or the next call would report it again
  throw_device_error(std::string(call) + ": " + cudaGetErrorString(error) + " (" +
                     cudaGetErrorName(error) + ")");
}

void check_cublas(int status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  const auto error = static_cast<cublasStatus_t>(status);
  throw_device_error(std::string(call) + ": " + cublasGetStatusString(error) + " (" +
                     cublasGetStatusName(error) + ")");
}

Scratch::~Scratch() { cudaFree(data_); }

void* Scratch::at_least(std::size_t bytes) {
  if (bytes <= bytes_) return data_;
  check_cuda(cudaStreamSynchronize(static_cast<cudaStream_t>(stream_.handle)),
             "cudaStreamSynchronize");
  check_cuda(cudaFree(data_), "cudaFree");
  data_ = nullptr;
  bytes_ = 0;
  ++growths_;
  check_cuda(cudaMalloc(&data_, bytes), "cudaMalloc of scratch");
  bytes_ = bytes;
  return data_;
}

}  // namespace cuda

namespace {

using cuda::check_cuda;

struct StreamTraits {
  using Handle = cudaStream_t;
  static Handle null() { return nullptr; }
  static void release(Handle handle) noexcept { cudaStreamDestroy(handle); }
};
struct GraphTraits {
  using Handle = cudaGraph_t;
  static Handle null() { return nullptr; }
  static void release(Handle handle) noexcept { cudaGraphDestroy(handle); }
};
struct GraphExecTraits {
  using Handle = cudaGraphExec_t;
  static Handle null() { return nullptr; }
  static void release(Handle handle) noexcept { cudaGraphExecDestroy(handle); }
};
struct PinnedTraits {
  using Handle = void*;
  static Handle null() { return nullptr; }
  static void release(Handle memory) noexcept { cudaFreeHost(memory); }
};

/// Makes a device the calling thread's current one, for a while.
class Current {
 public:
  explicit Current(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

bool is_empty(ConstMatrixView v) { return v.rows == 0 || v.cols == 0; }

/// Do the bytes between the first and the last entry of two views meet?
bool meet(ConstMatrixView a, ConstMatrixView b) {
  const auto begin = [](ConstMatrixView v) { return reinterpret_cast<std::uintptr_t>(v.data); };
  const auto end = [&](ConstMatrixView v) {
    return begin(v) + static_cast<std::size_t>((v.rows - 1) * v.ld + v.cols) * bytes_of(v.dtype);
  };
  return begin(a) < end(b) && begin(b) < end(a);
}

class CudaBackend final : public Backend {
 public:
  /// @param stream  the caller's; without a handle the object makes one.
  CudaBackend(int device, Stream stream)
      : device_(device),
        stream_(stream.handle != nullptr ? stream : make_stream()),
        scratch_(stream_),
        number_(stream_),
        products_(std::make_unique<cuda::Products>(stream_)) {
    number();
    check_cuda(cudaHostAlloc(answer_.out(), sizeof(double), cudaHostAllocDefault), "cudaHostAlloc");
  }
  ~CudaBackend() override {
    // cuBLAS wants the device its handles were made on.
    int before = device_;
    cudaGetDevice(&before);
    cudaSetDevice(device_);
    cudaStreamSynchronize(queue());
    replays_.clear();
    products_.reset();
    cudaSetDevice(before);
  }

  [[nodiscard]] std::string_view name() const override { return "cuda"; }
  [[nodiscard]] Stream stream() const override { return stream_; }

  // ---- memory

  [[nodiscard]] bool on_host() const override { return false; }

  [[nodiscard]] void* allocate(std::size_t bytes) override {
    if (bytes == 0) return nullptr;
    const Current here(device_);
    void* memory = nullptr;
    const std::string call = "cudaMalloc of " + std::to_string(bytes) + " bytes";
    check_cuda(cudaMalloc(&memory, bytes), call.c_str());
    return memory;
  }

  void deallocate(void* memory) noexcept override {
    cudaStreamSynchronize(queue());
    cudaFree(memory);
  }

  void copy(const void* from, void* to, std::size_t bytes) override {
    if (bytes == 0) return;
    const Current here(device_);
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, queue()), "cudaMemcpyAsync");
  }

  void wait() override {
    const Current here(device_);
    check_cuda(cudaStreamSynchronize(queue()), "cudaStreamSynchronize");
  }

  [[nodiscard]] void* reserve(std::size_t bytes) override {
    const Current here(device_);
    return pages_.reserve(device_, bytes);
  }
  void unreserve(void* range, std::size_t bytes) noexcept override {
    wait_for_all();
    pages_.unreserve(range, bytes);
  }
  void back(void* pages, std::size_t bytes) override {
    const Current here(device_);
    pages_.back(pages, bytes);
  }
  void drop(void* pages, std::size_t bytes) noexcept override {
    wait_for_all();
    pages_.drop(pages, bytes);
  }

  [[nodiscard]] bool reaches(const void* memory) const override {
    const Current here(device_);
    cudaPointerAttributes attributes{};
    check_cuda(cudaPointerGetAttributes(&attributes, memory), "cudaPointerGetAttributes");
    return attributes.type == cudaMemoryTypeManaged ||
           (attributes.type == cudaMemoryTypeDevice && attributes.device == device_);
  }

  // ---- replays

  bool keep_replays(bool on) override {
    keeps_ = on;
    return true;
  }
  [[nodiscard]] std::string_view replay_problem() const override { return problem_; }

  // ---- products

  void gemm(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b, Transpose op_b,
            double beta, MatrixView c) override {
    const ProductShape s = check_gemm(a, op_a, b, op_b, c);
    if (s.m == 0 || s.n == 0) return;
    const Current here(device_);
    if (s.k == 0) return scale_whole(beta, c);
    products_->gemm(s, alpha, a, op_a, b, op_b, beta, c);
  }

  void syrk(double alpha, ConstMatrixView a, Transpose op_a, double beta, MatrixView c) override {
    const ProductShape s = check_syrk(a, op_a, c);
    if (s.n == 0) return;
    const Current here(device_);
    if (s.k == 0) return scale_whole(beta, c);
    products_->syrk(s, alpha, a, op_a, beta, c);
  }

  /// By the host: the steps of an inverse are short, and a device would wait between them.
  [[nodiscard]] bool invert_spd(MatrixView a) override {
    check_invert_spd(a);
    if (is_empty(a)) return true;
    const Current here(device_);
    const std::size_t bytes = static_cast<std::size_t>(a.size()) * bytes_of(a.dtype);
    const MatrixView dense{scratch_.at_least(bytes), a.rows, a.cols, a.cols, a.dtype};
    if (host_ == nullptr) host_ = open_cpu();
    host_matrix_.resize(bytes);
    cuda::copy_entries(a, dense, stream_);
    copy(dense.data, host_matrix_.data(), bytes);
    wait();
    const bool definite = host_->invert_spd({host_matrix_.data(), a.rows, a.cols, a.cols, a.dtype});
    copy(host_matrix_.data(), dense.data, bytes);
    wait();
    cuda::copy_entries(dense, a, stream_);
    return definite;
  }

  // ---- element-wise

  void momentum(double beta, double weight, bool ahead, MatrixView g, MatrixView m) override {
    axpby(weight, g, beta, m);
    ahead ? axpby(beta, m, weight, g) : axpby(1, m, 0, g);
  }

  void convert(ConstMatrixView from, double scale, MatrixView to) override {
    check_same_shape("convert", {from, to});
    if (is_empty(to)) return;
    const Current here(device_);
    if (from.dtype == to.dtype) {
      if (scale != 1) return cuda::convert(from, scale, to, stream_);
      if (from.data == to.data && from.ld == to.ld) return;
      return cuda::copy_entries(from, to, stream_);
    }
    if (!meet(from, to)) return cuda::convert(from, scale, to, stream_);
    // In place with another width: what one thread writes, another has yet to read.
    const std::size_t bytes = static_cast<std::size_t>(to.size()) * bytes_of(to.dtype);
    const MatrixView staged{scratch_.at_least(bytes), to.rows, to.cols, to.cols, to.dtype};
    cuda::convert(from, scale, staged, stream_);
    cuda::copy_entries(staged, to, stream_);
  }

  void round_stochastic(ConstMatrixView from, MatrixView to, std::uint64_t seed,
                        std::uint64_t stream_id, std::uint64_t step, Index first_element) override {
    check_same_shape("round_stochastic", {from, to});
    check_dtype("round_stochastic", from, DType::f32);
    check_dtype("round_stochastic", to, DType::bf16);
    if (is_empty(to)) return;
    const Current here(device_);
    cuda::round_stochastic(from, to, mix_seed(seed, stream_id), step,
                           static_cast<std::uint64_t>(first_element), stream_);
  }

  void axpby(double a, ConstMatrixView x, double b, MatrixView y) override {
    check_same("axpby", {x, y});
    if (is_empty(y)) return;
    const Current here(device_);
    cuda::axpby(a, x, b, y, stream_);
  }

  void sign(ConstMatrixView from, MatrixView to) override {
    check_same("sign", {from, to});
    if (is_empty(to)) return;
    const Current here(device_);
    cuda::sign(from, to, stream_);
  }

  double decay_step(double rho, double eta, ConstMatrixView u, MatrixView w) override {
    check_same("decay_step", {w, u});
    check_dtype("decay_step", w, DType::f32);
    if (is_empty(w)) return 0;
    const Current here(device_);
    cuda::decay_step(rho, eta, u, w, sums(1, w.size()), number(), stream_);
    return answer();
  }

  double adamw(const AdamWScalars& s, ConstMatrixView g, MatrixView m, MatrixView v,
               MatrixView w) override {
    check_same("adamw", {w, g, m, v});
    check_dtype("adamw", w, DType::f32);
    if (is_empty(w)) return 0;
    const Current here(device_);
    cuda::adamw(s, g, m, v, w, sums(1, w.size()), number(), stream_);
    return answer();
  }

  // ---- codes

  void abs_maxima(ConstMatrixView w, const Grid& grid, MatrixView out) override {
    check_scales("abs_maxima", w, grid, out);
    if (is_empty(out)) return;
    const Current here(device_);
    cuda::fill(0, out, stream_);
    if (!is_empty(w)) cuda::abs_maxima(w, grid, out, stream_);
  }

  void scales_from_maxima(const Grid& grid, MatrixView scales) override {
    check_scales("scales_from_maxima", scales);
    if (is_empty(scales)) return;
    const Current here(device_);
    cuda::scales_from_maxima(grid, scales, stream_);
  }

  void quantize(MatrixView w, const Grid& grid, const Rounding& rounding,
                QuantizedView q) override {
    check_quantized("quantize", w, grid, q);
    check_weights("quantize", w);
    if (is_empty(w)) return;
    const Current here(device_);
    cuda::quantize(w, grid, rounding, mix_seed(rounding.seed, rounding.stream_id), q, stream_);
  }

  void dequantize(ConstQuantizedView q, const Grid& grid, MatrixView to) override {
    check_quantized("dequantize", to, grid, q);
    if (is_empty(to)) return;
    const Current here(device_);
    cuda::dequantize(q, grid, to, stream_);
  }

  std::int64_t count_beyond(ConstMatrixView w, const Grid& grid, ConstMatrixView scales) override {
    check_scales("count_beyond", w, grid, scales);
    if (is_empty(w)) return 0;
    const Current here(device_);
    cuda::count_beyond(w, grid, scales, number(), stream_);
    const double bits = answer();
    std::int64_t count = 0;
    std::memcpy(&count, &bits, sizeof count);
    return count;
  }

  void adamw_pull_back(const AdamWScalars& s, double kappa, ConstMatrixView v, ConstMatrixView e,
                       MatrixView m) override {
    check_same("adamw_pull_back", {m, v, e});
    check_dtype("adamw_pull_back", m, DType::f32);
    if (is_empty(m)) return;
    const Current here(device_);
    cuda::adamw_pull_back(s, kappa, v, e, m, stream_);
  }

  void split_f32(ConstMatrixView w, MatrixView high, MatrixView low) override {
    check_halves("split_f32", w, high, low);
    if (is_empty(w)) return;
    const Current here(device_);
    cuda::split_f32(w, high, low, stream_);
  }

  void merge_f32(ConstMatrixView high, ConstMatrixView low, MatrixView w) override {
    check_halves("merge_f32", w, high, low);
    if (is_empty(w)) return;
    const Current here(device_);
    cuda::merge_f32(high, low, w, stream_);
  }

  // ---- entries as they stand

  void fill(double value, MatrixView to) override {
    check_view("fill", to);
    if (is_empty(to)) return;
    const Current here(device_);
    cuda::fill(value, to, stream_);
  }

  void add_diagonal(double a, MatrixView c) override {
    check_square("add_diagonal", c);
    if (is_empty(c)) return;
    const Current here(device_);
    cuda::add_diagonal(a, c, stream_);
  }

  void mirror_lower(MatrixView c) override {
    check_square("mirror_lower", c);
    if (is_empty(c)) return;
    const Current here(device_);
    cuda::mirror_lower(c, stream_);
  }

  void pack_triangle(ConstMatrixView full, float* packed) override {
    check_triangle("pack_triangle", full);
    if (is_empty(full)) return;
    const Current here(device_);
    cuda::pack_triangle(full, packed, stream_);
  }

  void unpack_triangle(const float* packed, MatrixView full) override {
    check_triangle("unpack_triangle", full);
    if (is_empty(full)) return;
    const Current here(device_);
    cuda::unpack_lower(packed, full, stream_);
    cuda::mirror_lower(full, stream_);
  }

  // ---- sums

  double sum_squares(ConstMatrixView x) override {
    check_view("sum_squares", x);
    if (is_empty(x)) return 0;
    const Current here(device_);
    cuda::sum_squares(x, sums(1, x.size()), number(), stream_);
    return answer();
  }

  void line_sum_squares(ConstMatrixView x, bool of_columns, MatrixView out) override {
    check_lines("line_sum_squares", x, of_columns, out);
    if (is_empty(out)) return;
    const Current here(device_);
    if (is_empty(x)) return cuda::fill(0, out, stream_);
    cuda::line_sum_squares(x, of_columns, of_columns ? nullptr : sums(x.rows, x.cols), out,
                           stream_);
  }

  double abs_max(ConstMatrixView x) override {
    check_view("abs_max", x);
    if (is_empty(x)) return 0;
    const Current here(device_);
    cuda::abs_max(x, number(), stream_);
    return answer();
  }

  double trace(ConstMatrixView c) override {
    check_square("trace", c);
    if (is_empty(c)) return 0;
    const Current here(device_);
    cuda::trace(c, number(), stream_);
    return answer();
  }

  void row_dots(ConstMatrixView x, ConstMatrixView y, MatrixView out) override {
    check_row_dots(x, y, out);
    if (is_empty(out)) return;
    const Current here(device_);
    if (is_empty(x)) return cuda::fill(0, out, stream_);
    cuda::row_dots(x, y, out, stream_);
  }

  void scale_lines(ConstMatrixView s, bool of_columns, MatrixView x) override {
    check_lines("scale_lines", x, of_columns, s);
    if (is_empty(x)) return;
    const Current here(device_);
    cuda::scale_lines(s, of_columns, x, stream_);
  }

  // ---- divisions

  [[nodiscard]] bool numbers_wait() const override { return true; }

  bool normalize(MatrixView x, const NormOptions& options, int safe_exponent,
                 MatrixView to) override {
    check_same_shape("normalize", {x, to});
    if (is_empty(x)) return false;
    const Current here(device_);
    auto* const sums =
        static_cast<double*>(scratch_.at_least(cuda::normalize_scratch(x.size()) * sizeof(double)));
    cuda::normalize(x, options, safe_exponent, sums, number(), to, stream_);
    return true;
  }

  void divide_by_norm(ConstMatrixView r, const NormOptions& options, int power,
                      ConstMatrixView from, MatrixView to) override {
    check_divide_by_norm(r, from, to);
    if (is_empty(to)) return;
    const Current here(device_);
    if (is_empty(r)) return cuda::fill(0, to, stream_);
    cuda::divide_by_norm(r, options, power == 2, from, number(), to, stream_);
  }

  void split_mean(MatrixView c, ConstMatrixView x, MatrixView to) override {
    check_split_mean(c, x, to);
    if (is_empty(c)) return;
    const Current here(device_);
    cuda::split_mean(c, x, number(), to, stream_);
  }

  void inverse_roots(MatrixView s) override {
    check_view("inverse_roots", s);
    check_dtype("inverse_roots", s, DType::f64);
    if (is_empty(s)) return;
    const Current here(device_);
    cuda::inverse_roots(s, stream_);
  }

 protected:
  void run_replay(const ReplayKey& key, Sequence f, void* context) override {
    if (!keeps_ || recording_) return f(context);
    Replay& kept = replays_[key];
    // The first time scratch grows and algorithms are chosen, which a recording must not do.
    if (!kept.known || kept.refused) {
      kept.known = true;
      return f(context);
    }
    const Current here(device_);
    // Scratch that has grown since is elsewhere.
    if (!kept.graph || kept.growths != growths()) {
      const std::string problem = record(f, context, kept);
      if (!problem.empty()) {
        kept = {};
        kept.known = kept.refused = true;
        if (problem_.empty()) problem_ = problem;
        return f(context);
      }
    }
    check_cuda(cudaGraphLaunch(kept.graph.get(), queue()), "cudaGraphLaunch");
  }

 private:
  /// A sequence of verbs, as one launch.
  struct Replay {
    bool known = false, refused = false;
    int growths = 0;  ///< of scratch, when it was recorded
    UniqueHandle<GraphExecTraits> graph;
  };

  [[nodiscard]] int growths() const { return scratch_.growths() + products_->growths(); }

  void enter(Stream stream) {
    stream_ = stream;
    products_->enter(stream);
  }

  /// `kept` ← what f enters, of which nothing is done yet. In a stream of its own: the caller's may
  /// be the default one, which cannot be recorded. @return what stood in the way; empty: nothing.
  std::string record(Sequence f, void* context, Replay& kept) {
    if (!recorder_) {
      check_cuda(cudaStreamCreateWithFlags(recorder_.out(), cudaStreamNonBlocking),
                 "cudaStreamCreateWithFlags");
    }
    const Stream outside = stream_;
    enter({recorder_.get()});
    recording_ = true;
    std::string problem;
    UniqueHandle<GraphTraits> graph;
    try {
      // Of this thread: others may allocate meanwhile.
      check_cuda(cudaStreamBeginCapture(recorder_.get(), cudaStreamCaptureModeThreadLocal),
                 "cudaStreamBeginCapture");
      try {
        f(context);
      } catch (const std::exception& e) {
        problem = e.what();
      }
      const int ended = cudaStreamEndCapture(recorder_.get(), graph.out());
      if (problem.empty()) check_cuda(ended, "cudaStreamEndCapture");
      kept.growths = growths();
      if (problem.empty()) {
        check_cuda(cudaGraphInstantiate(kept.graph.out(), graph.get(), 0), "cudaGraphInstantiate");
      }
    } catch (const std::exception& e) {
      problem = e.what();
    }
    cudaGetLastError();  // or the next call would report it again
    recording_ = false;
    enter(outside);
    return problem;
  }

  /// Every stream of this device, the caller's too.
  void wait_for_all() const noexcept {
    int before = device_;
    cudaGetDevice(&before);
    cudaSetDevice(device_);
    cudaDeviceSynchronize();
    cudaSetDevice(before);
  }
  Stream make_stream() {
    check_cuda(cudaStreamCreateWithFlags(own_.out(), cudaStreamNonBlocking),
               "cudaStreamCreateWithFlags");
    return {own_.get()};
  }
  [[nodiscard]] cudaStream_t queue() const { return static_cast<cudaStream_t>(stream_.handle); }

  /// C ← β·C, without reading C for β = 0.
  void scale_whole(double beta, MatrixView c) {
    if (beta != 0) return cuda::axpby(beta, c, 0, c, stream_);
    cuda::fill(0, c, stream_);
  }

  double* sums(Index lines, Index size) {
    return static_cast<double*>(
        scratch_.at_least(cuda::block_sum_scratch(lines, size) * sizeof(double)));
  }
  /// Where a verb puts the number it returns, or divides by.
  double* number() {
    return static_cast<double*>(number_.at_least(cuda::division_numbers * sizeof(double)));
  }
  /// That number, when it is there.
  double answer() {
    check_cuda(
        cudaMemcpyAsync(answer_.get(), number(), sizeof(double), cudaMemcpyDeviceToHost, queue()),
        "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(queue()), "cudaStreamSynchronize");
    double value = 0;
    std::memcpy(&value, answer_.get(), sizeof value);
    return value;
  }

  int device_;
  UniqueHandle<StreamTraits> own_;  // before all that works in it
  Stream stream_;
  cuda::Scratch scratch_;
  cuda::Scratch number_;
  UniqueHandle<PinnedTraits> answer_;
  std::unique_ptr<cuda::Products> products_;
  cuda::Pages pages_;
  UniqueHandle<StreamTraits> recorder_;
  std::map<ReplayKey, Replay> replays_;
  std::string problem_;
  bool keeps_ = false, recording_ = false;
  std::unique_ptr<Backend> host_;  ///< for what a device is slow at
  std::vector<std::byte> host_matrix_;
};

/// @throws ConfigError  there is no device, or not this one.
void check_device(int ordinal) {
  const auto refuse = [](const std::string& why) { throw_config_error("device 'cuda': " + why); };
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    cudaGetLastError();
    refuse(std::string("no CUDA device: ") +
           (status != cudaSuccess ? cudaGetErrorString(status) : "the driver sees none"));
  }
  if (ordinal < 0 || ordinal >= count) {
    refuse("no CUDA device " + std::to_string(ordinal) + ": there are " + std::to_string(count));
  }
  int major = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal),
             "cudaDeviceGetAttribute");
  if (major < 8) {
    refuse("CUDA device " + std::to_string(ordinal) + " has compute capability " +
           std::to_string(major) + ".x; the kernels need 8.0 or later");
  }
}

}  // namespace

std::unique_ptr<Backend> open_cuda() {
  check_device(0);
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return open_cuda_on(device, {});
}

std::unique_ptr<Backend> open_cuda_on(int ordinal, Stream stream) {
  check_device(ordinal);
  const Current here(ordinal);
  return std::make_unique<CudaBackend>(ordinal, stream);
}

Stream cuda_default_stream() { return {cudaStreamLegacy}; }

}  // namespace orthrus::kernels
