// orthrus bench kernels: what one device makes of its verbs, and msign of them.
//
// Every line is timed in turns with its own peak: a product with gemm 1024³ of its dtype, a pass
// with a copy of as many arrays of its length.
#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <orthrus/error.hpp>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/devices.hpp"
#include "kernels/device_memory.hpp"
#include "kernels/devices.hpp"
#include "optim/lmo.hpp"
#include "runtime/agree.hpp"
#include "runtime/arena.hpp"
#include "runtime/cli/bench.hpp"
#include "runtime/cli/noise.hpp"
#include "runtime/device.hpp"

namespace orthrus::cli {
namespace {

using kernels::Backend;
using kernels::Transpose;

/// Equal matrices, one after another.
struct Batch {
  Index count, rows, cols;
  [[nodiscard]] Index side() const { return std::min(rows, cols); }
  [[nodiscard]] Index length() const { return std::max(rows, cols); }
  [[nodiscard]] std::string text() const {
    return (count > 1 ? std::to_string(count) + "x" : std::string()) + std::to_string(rows) + "x" +
           std::to_string(cols);
  }
};
constexpr std::array batches{Batch{32, 128, 128}, Batch{1, 256, 256},  Batch{1, 768, 768},
                             Batch{1, 768, 3072}, Batch{1, 3072, 768}, Batch{1, 1024, 4096}};

/// `count` matrices of one shape and dtype, of noise, on the device.
class Matrices {
 public:
  Matrices(Index count, Index rows, Index cols, DType dtype, Backend& backend)
      : backend_(backend),
        data_(backend, static_cast<std::size_t>(count * rows * cols) * bytes_of(dtype)),
        rows_(rows),
        cols_(cols),
        dtype_(dtype) {
    const std::vector<float> values = noise(count * rows * cols);
    const Index n = std::ssize(values);
    const kernels::DeviceBuffer wide(backend, values.size() * sizeof(float));
    backend.copy(values.data(), wide.data(), wide.bytes());
    backend.convert(matrix_view(static_cast<const float*>(wide.data()), 1, n), 1,
                    {data_.data(), 1, n, n, dtype});
    backend.wait();
  }
  Matrices(const Matrices& other)
      : backend_(other.backend_),
        data_(other.backend_, other.data_.bytes()),
        rows_(other.rows_),
        cols_(other.cols_),
        dtype_(other.dtype_) {
    restore(other);
  }
  Matrices(Matrices&&) noexcept = default;
  Matrices& operator=(const Matrices&) = delete;
  ~Matrices() = default;

  [[nodiscard]] MatrixView operator[](Index i) {
    return {static_cast<std::byte*>(data_.data()) +
                static_cast<std::size_t>(i * rows_ * cols_) * bytes_of(dtype_),
            rows_, cols_, cols_, dtype_};
  }
  void restore(const Matrices& from) {
    backend_.copy(from.data_.data(), data_.data(), data_.bytes());
  }

 private:
  Backend& backend_;
  kernels::DeviceBuffer data_;
  Index rows_, cols_;
  DType dtype_;
};

/// `turn`, complete when what `backend` has queued is done.
Turn waited(Turn turn, Backend& backend) {
  if (!backend.on_host()) turn.wait = [&backend] { backend.wait(); };
  return turn;
}

/// Times something made of products beside gemm 1024³.
class Products {
 public:
  Products(const BenchOptions& options, BenchPrinter& out, Communicator& world, Backend& backend)
      : options_(options), out_(out), world_(world), backend_(backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (int i = 0; i < 3; ++i) peak_.emplace_back(1, peak_side, peak_side, dtype, backend);
    }
  }

  void row(const std::string& name, const std::string& shape, DType dtype, double flops,
           Turn turn) {
    const bool narrow = dtype == DType::bf16;
    const auto times = time_in_turns(
        world_, options_.repeats,
        {waited(std::move(turn), backend_), waited({[&] { multiply(narrow ? 3 : 0); }}, backend_)});
    out_.row({name, shape, name_of(dtype), times[0], flops, true,
              Peak{narrow ? "gemm bf16 1024^3" : "gemm f32 1024^3",
                   2.0 * peak_side * peak_side * peak_side / times[1].median_s}});
  }

 private:
  static constexpr Index peak_side = 1024;
  void multiply(std::size_t first) {
    backend_.gemm(1, peak_[first][0], Transpose::no, peak_[first + 1][0], Transpose::no, 0,
                  peak_[first + 2][0]);
  }

  const BenchOptions& options_;
  BenchPrinter& out_;
  Communicator& world_;
  Backend& backend_;
  std::vector<Matrices> peak_;  // A, B, C in f32, then in bf16
};

/// The products msign is made of: A·X and XXᵀ with A on the short side.
void bench_products(const Batch& b, DType dtype, Products& products, Backend& backend) {
  const bool wide = b.rows <= b.cols;
  const auto count = static_cast<double>(b.count);
  const auto s = static_cast<double>(b.side());
  const auto l = static_cast<double>(b.length());
  Matrices x(b.count, b.rows, b.cols, dtype, backend);
  Matrices y(b.count, b.rows, b.cols, dtype, backend);
  Matrices a(b.count, b.side(), b.side(), dtype, backend);
  products.row("gemm", b.text(), dtype, count * 2 * s * s * l, {[&] {
                 for (Index i = 0; i < b.count; ++i) {
                   backend.gemm(1, wide ? a[i] : x[i], Transpose::no, wide ? x[i] : a[i],
                                Transpose::no, 0, y[i]);
                 }
               }});
  products.row("syrk", b.text(), dtype, count * s * s * l, {[&] {
                 for (Index i = 0; i < b.count; ++i) {
                   backend.syrk(1, x[i], wide ? Transpose::no : Transpose::yes, 0, a[i]);
                 }
               }});
}

/// A⁻¹ of XXᵀ/length + I.
void bench_inverse(const Batch& b, Products& products, Backend& backend) {
  Matrices x(b.count, b.side(), b.length(), DType::f32, backend);
  Matrices a(b.count, b.side(), b.side(), DType::f32, backend);
  for (Index i = 0; i < b.count; ++i) {
    backend.syrk(1.0 / static_cast<double>(b.length()), x[i], Transpose::no, 0, a[i]);
    backend.add_diagonal(1, a[i]);
  }
  Matrices inverse = a;
  const auto s = static_cast<double>(b.side());
  const std::string shape = Batch{b.count, b.side(), b.side()}.text();
  products.row("invert_spd", shape, DType::f32, static_cast<double>(b.count) * s * s * s,
               {[&] {
                  for (Index i = 0; i < b.count; ++i) (void)backend.invert_spd(inverse[i]);
                },
                [&] { inverse.restore(a); }});
}

void bench_msign(const Batch& b, const std::string& name, const LmoConfig& config,
                 Products& products, Backend& backend) {
  const optim::Lmo lmo(config, {.on_host = backend.on_host()});
  // Most flops of a rational function are in f32, whatever XXᵀ is computed in.
  const DType peak = lmo.rational(b.side()) != nullptr ? DType::f32 : *dtype_named(config.dtype);
  Matrices x(b.count, b.rows, b.cols, DType::f32, backend);
  Matrices y = x;
  const std::size_t bytes = lmo.workspace_bytes(b.rows, b.cols);
  runtime::Arena arena(backend, bytes);
  const auto work = arena.take(bytes);
  products.row(name, b.text(), peak, static_cast<double>(b.count) * lmo.flops(b.rows, b.cols),
               {[&] {
                  for (Index i = 0; i < b.count; ++i) lmo(y[i], work, backend);
                },
                [&] { y.restore(x); }});
}

/// Element-wise verbs on arrays that no cache holds.
void bench_passes(const BenchOptions& options, BenchPrinter& out, Communicator& world,
                  Backend& backend) {
  constexpr Index n = 1 << 24;
  const Matrices drawn(1, 1, n, DType::f32, backend);
  std::array<Matrices, 4> arrays{drawn, drawn, drawn, drawn};
  Matrices narrow(1, 1, n, DType::bf16, backend);
  const MatrixView g = arrays[0][0];
  const MatrixView m = arrays[1][0];
  const MatrixView v = arrays[2][0];
  const MatrixView w = arrays[3][0];
  const MatrixView half = narrow[0];
  backend.fill(0, v);  // a second moment is not negative

  // The copy runs over as many arrays of n floats: whole ones one after another, or in turns of a
  // block, whichever is faster here.
  constexpr std::size_t block = 1 << 15;
  const auto copy = [&](std::size_t pairs, std::size_t piece) {
    for (std::size_t at = 0; at < n * sizeof(float); at += piece) {
      for (std::size_t p = 0; p < pairs; ++p) {
        backend.copy(static_cast<const std::byte*>(arrays[2 * p][0].data) + at,
                     static_cast<std::byte*>(arrays[2 * p + 1][0].data) + at, piece);
      }
    }
  };
  const auto pass = [&](const char* name, std::string_view dtype, std::size_t pairs, double bytes,
                        std::function<void()> body) {
    const auto times = time_in_turns(world, options.repeats,
                                     {waited({std::move(body)}, backend),
                                      waited({[&] { copy(pairs, n * sizeof(float)); }}, backend),
                                      waited({[&] { copy(pairs, block); }}, backend)});
    const double copy_s = std::min(times[1].median_s, times[2].median_s);
    out.row({name, "16Mi", dtype, times[0], bytes * n, false,
             Peak{pairs == 1 ? "copy of 2 arrays" : "copy of 4 arrays",
                  8.0 * n * static_cast<double>(pairs) / copy_s}});
  };
  pass("adamw", "f32", 2, 28, [&] {
    kernels::AdamWScalars s;
    s.lr = 1e-3;
    backend.adamw(s, g, m, v, w);
  });
  pass("momentum", "f32", 1, 16, [&] { backend.momentum(0.95, 0.05, true, g, m); });
  pass("decay_step", "f32", 1, 12, [&] { backend.decay_step(0.999, 1e-3, g, w); });
  pass("axpby", "f32", 1, 12, [&] { backend.axpby(0.05, g, 0.95, w); });
  pass("convert", "f32", 1, 8, [&] { backend.convert(g, 0.5, w); });
  pass("convert to bf16", "f32", 1, 6, [&] { backend.convert(g, 1, half); });
  pass("convert to f32", "bf16", 1, 6, [&] { backend.convert(half, 1, w); });
  pass("sum_squares", "f32", 1, 4, [&] { (void)backend.sum_squares(g); });

  // Codes, a scale per row of 4096. Residuals are rounded again and again: no branch sees them.
  constexpr Index side = 4096;
  static_assert(side * side == n);
  const auto square = [](MatrixView x) { return MatrixView{x.data, side, side, side, x.dtype}; };
  std::vector<std::uint8_t> codes(n);
  std::vector<float> scales(side);
  const MatrixView maxima = matrix_view(scales.data(), side, 1);
  const auto codes_of = [&](CodeFormat format) {
    return QuantizedView{codes.data(), code_pitch(format, side), scales.data(), 1, side, side};
  };
  pass("abs_maxima", "f32", 1, 4, [&] { backend.abs_maxima(square(w), {}, maxima); });
  for (const CodeFormat format : code_formats) {
    const Grid grid{format, Grid::Extent::row, 128, false};
    const double code_bytes = format == CodeFormat::int4 ? 0.5 : 1;
    const std::string name = " " + std::string(name_of(format));
    backend.abs_maxima(square(w), grid, maxima);
    backend.scales_from_maxima(grid, maxima);
    pass(("quantize" + name).c_str(), "f32", 1, 8 + code_bytes,
         [&] { backend.quantize(square(w), grid, {}, codes_of(format)); });
    pass(("quantize" + name + ", stochastic").c_str(), "f32", 1, 8 + code_bytes, [&] {
      backend.quantize(square(w), grid, {true, 1, 2, 3, 0, side}, codes_of(format));
    });
    pass(("dequantize" + name).c_str(), "f32", 1, 4 + code_bytes,
         [&] { backend.dequantize(codes_of(format), grid, square(w)); });
    pass(("dequantize" + name).c_str(), "bf16", 1, 2 + code_bytes,
         [&] { backend.dequantize(codes_of(format), grid, square(half)); });
  }
  const Grid blocks{CodeFormat::fp8_e4m3, Grid::Extent::block, 32, false};
  scales.resize(side * static_cast<std::size_t>(scale_cols(blocks, side)));
  const Index across = scale_cols(blocks, side);
  const QuantizedView blocked{codes.data(), side, scales.data(), across, side, side};
  backend.abs_maxima(square(w), blocks, matrix_view(scales.data(), side, across));
  backend.scales_from_maxima(blocks, matrix_view(scales.data(), side, across));
  pass("quantize fp8_e4m3, blocks", "f32", 1, 9,
       [&] { backend.quantize(square(w), blocks, {}, blocked); });
  pass("adamw_pull_back", "f32", 2, 16, [&] { backend.adamw_pull_back({}, -1e-6, v, g, m); });
  std::vector<BFloat16> missing(n);
  const MatrixView low = matrix_view(missing.data(), 1, n);
  pass("split_f32", "f32", 1, 8, [&] { backend.split_f32(g, half, low); });
  pass("merge_f32", "f32", 1, 8, [&] { backend.merge_f32(half, low, w); });
}

}  // namespace

namespace {

std::unique_ptr<Backend> open_for(const BenchOptions& options, Communicator& world) {
  if (options.device == "cpu") return kernels::open_backend("cpu");
  const TrafficScope setup(world, TrafficClass::setup);
  const auto devices = static_cast<int>(kernels::cuda_report().devices.size());
  const int ordinal = runtime::default_ordinal(world, std::max(devices, 1));
  std::unique_ptr<Backend> backend;
  try {
    runtime::agree(
        world, [&] { backend = kernels::open_cuda_on(ordinal, kernels::cuda_default_stream()); });
  } catch (const ConfigError& e) {  // on all ranks
    throw ConfigError("--device " + options.device + ": " + e.what());
  }
  return backend;
}

}  // namespace

void bench_kernels(const BenchOptions& options, BenchPrinter& out, Communicator& world) {
  const auto backend = open_for(options, world);
  Products products(options, out, world, *backend);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const Batch& b : batches) bench_products(b, dtype, products, *backend);
  }
  for (const Batch& b : batches) {
    if (b.rows == b.cols || b.rows == 1024) bench_inverse(b, products, *backend);
  }
  for (const Batch& b : batches) {
    LmoConfig published;
    for (const DType dtype : {DType::f32, DType::bf16}) {
      published.dtype = name_of(dtype);
      bench_msign(b, "msign " + published.coefficients, published, products, *backend);
    }
    LmoConfig automatic;
    automatic.coefficients = "auto";
    automatic.dtype = "bf16";
    bench_msign(b, "msign auto, bf16", automatic, products, *backend);
    LmoConfig rational;
    rational.coefficients = "rational";
    for (const int terms : {2, 3}) {
      for (const char* gram : {"f32", "bf16"}) {
        rational.terms = terms;
        rational.dtype = gram;
        bench_msign(b, fmt::format("msign rational {}, gram {}", terms, gram), rational, products,
                    *backend);
      }
    }
  }
  bench_passes(options, out, world, *backend);
}

}  // namespace orthrus::cli
