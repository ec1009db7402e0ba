// orthrus bench kernels: what one device makes of its verbs, and msign of them.
//
// Every line is timed in turns with its own peak: a product with gemm 1024³ of its dtype, a pass
// with a copy of as many arrays of its length.
#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.hpp"
#include "optim/lmo.hpp"
#include "runtime/arena.hpp"
#include "runtime/cli/bench.hpp"
#include "runtime/cli/noise.hpp"

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

/// `count` matrices of one shape and dtype, of noise.
class Matrices {
 public:
  Matrices(Index count, Index rows, Index cols, DType dtype, Backend& backend)
      : rows_(rows), cols_(cols), dtype_(dtype) {
    const std::vector<float> values = noise(count * rows * cols);
    data_.resize(values.size() * bytes_of(dtype));
    backend.convert(matrix_view(values.data(), 1, std::ssize(values)), 1,
                    {data_.data(), 1, std::ssize(values), std::ssize(values), dtype});
  }
  [[nodiscard]] MatrixView operator[](Index i) {
    return {data_.data() + static_cast<std::size_t>(i * rows_ * cols_) * bytes_of(dtype_), rows_,
            cols_, cols_, dtype_};
  }
  void restore(const Matrices& from) { data_ = from.data_; }

 private:
  std::vector<std::byte> data_;
  Index rows_, cols_;
  DType dtype_;
};

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
    const auto times = time_in_turns(world_, options_.repeats,
                                     {std::move(turn), {[&] { multiply(narrow ? 3 : 0); }}});
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
  const optim::Lmo lmo(config);
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
  std::array<std::vector<float>, 4> arrays;
  arrays.fill(noise(n));
  std::vector<BFloat16> narrow(n);
  const auto view = [](std::vector<float>& v) { return matrix_view(v.data(), 1, n); };
  const MatrixView g = view(arrays[0]);
  const MatrixView m = view(arrays[1]);
  const MatrixView v = view(arrays[2]);
  const MatrixView w = view(arrays[3]);
  const MatrixView half = matrix_view(narrow.data(), 1, n);
  backend.fill(0, v);  // a second moment is not negative

  // The copy runs over as many arrays of n floats: whole ones one after another, or in turns of a
  // block, whichever is faster here.
  constexpr std::size_t block = 1 << 15;
  const auto copy = [&](std::size_t pairs, std::size_t piece) {
    for (std::size_t at = 0; at < n * sizeof(float); at += piece) {
      for (std::size_t p = 0; p < pairs; ++p) {
        std::memcpy(reinterpret_cast<std::byte*>(arrays[2 * p + 1].data()) + at,
                    reinterpret_cast<const std::byte*>(arrays[2 * p].data()) + at, piece);
      }
    }
  };
  const auto pass = [&](const char* name, std::string_view dtype, std::size_t pairs, double bytes,
                        std::function<void()> body) {
    const auto times = time_in_turns(world, options.repeats,
                                     {{std::move(body)},
                                      {[&] { copy(pairs, n * sizeof(float)); }},
                                      {[&] { copy(pairs, block); }}});
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
}

}  // namespace

void bench_kernels(const BenchOptions& options, BenchPrinter& out, Communicator& world) {
  const auto backend = kernels::open_backend("cpu");
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
