#include <cblas.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <orthrus/error.hpp>
#include <vector>

#include "kernels/adamw_constants.hpp"
#include "kernels/block_sum.hpp"
#include "kernels/check.hpp"
#include "kernels/code_format.hpp"
#include "kernels/cpu/bf16_product.hpp"
#include "kernels/cpu/elementwise.hpp"
#include "kernels/cpu/f32_product.hpp"
#include "kernels/cpu/quantize.hpp"
#include "kernels/cpu/spd_inverse.hpp"
#include "kernels/cpu/tasks.hpp"
#include "kernels/devices.hpp"
#include "kernels/host_backend.hpp"
#include "kernels/rng.hpp"

namespace orthrus::kernels {
namespace {

template <class T>
const T* row(ConstMatrixView v, Index i) {
  return static_cast<const T*>(v.data) + i * v.ld;
}
template <class T>
T* row(MatrixView v, Index i) {
  return static_cast<T*>(v.data) + i * v.ld;
}
const std::byte* row_bytes(ConstMatrixView v, Index i) {
  return static_cast<const std::byte*>(v.data) + i * v.ld * static_cast<Index>(bytes_of(v.dtype));
}
std::byte* row_bytes(MatrixView v, Index i) {
  return static_cast<std::byte*>(v.data) + i * v.ld * static_cast<Index>(bytes_of(v.dtype));
}

/// Calls f with a value of the element type.
template <class F>
decltype(auto) with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(BFloat16{});
    default:
      return f(double{});
  }
}

/// The rows that f(i, n) is called on: one long row where nothing lies between them.
template <class F>
void for_rows(bool contiguous, Index rows, Index cols, F f) {
  if (rows == 0 || cols == 0) return;
  if (contiguous) {
    f(Index{0}, rows * cols);
  } else {
    for (Index i = 0; i < rows; ++i) f(i, cols);
  }
}

/// Σ over blocks of the row-major elements. `piece(i, j, at, n)` handles elements (i, j) … (i, j +
/// n − 1), which are number `at` of their block on; `block(n)` then gives the sum of the block's n
/// elements.
template <class Piece, class Block>
double sum_blocks(Index rows, Index cols, Piece piece, Block block) {
  BlockSum tree;
  const Index size = rows * cols;
  Index i = 0;
  Index j = 0;
  for (Index begin = 0; begin < size; begin += Backend::sum_block) {
    const Index n = std::min(Backend::sum_block, size - begin);
    for (Index at = 0; at < n;) {
      const Index length = std::min(cols - j, n - at);
      piece(i, j, at, length);
      at += length;
      j += length;
      if (j == cols) {
        j = 0;
        ++i;
      }
    }
    tree.add(block(n));
  }
  return tree.total();
}

template <class T>
double sum_squares_of(ConstMatrixView x) {
  if (x.contiguous()) {
    BlockSum tree;
    const auto* data = static_cast<const T*>(x.data);
    for (Index begin = 0; begin < x.size(); begin += Backend::sum_block) {
      tree.add(
          cpu::block_sum_squares(data + begin, std::min(Backend::sum_block, x.size() - begin)));
    }
    return tree.total();
  }
  std::array<T, Backend::sum_block> gathered;
  return sum_blocks(
      x.rows, x.cols,
      [&](Index i, Index j, Index at, Index n) {
        std::copy_n(row<T>(x, i) + j, n, gathered.data() + at);
      },
      [&](Index n) { return cpu::block_sum_squares(gathered.data(), n); });
}

int blas_int(Index n) {
  expects(n <= std::numeric_limits<int>::max(), "a side or a row stride is too long for the BLAS");
  return static_cast<int>(n);
}
/// The BLAS wants a stride even where there is no second row.
int blas_ld(ConstMatrixView v) { return blas_int(std::max({v.ld, v.cols, Index{1}})); }
CBLAS_TRANSPOSE blas_op(Transpose op) { return op == Transpose::yes ? CblasTrans : CblasNoTrans; }

/// The block of v from (i, j) on.
ConstMatrixView block(ConstMatrixView v, Index i, Index j, Index rows, Index cols) {
  const auto width = static_cast<Index>(bytes_of(v.dtype));
  return {static_cast<const std::byte*>(v.data) + (i * v.ld + j) * width, rows, cols, v.ld,
          v.dtype};
}
MatrixView block(MatrixView v, Index i, Index j, Index rows, Index cols) {
  const auto width = static_cast<Index>(bytes_of(v.dtype));
  return {static_cast<std::byte*>(v.data) + (i * v.ld + j) * width, rows, cols, v.ld, v.dtype};
}
/// Lines i … of op(A), all of its other side.
ConstMatrixView lines(ConstMatrixView a, Transpose op, Index i, Index count) {
  return op == Transpose::yes ? block(a, 0, i, a.rows, count) : block(a, i, 0, count, a.cols);
}
Transpose other(Transpose op) { return op == Transpose::yes ? Transpose::no : Transpose::yes; }

/// Columns of a row that share a scale, where they do not share it with all others.
Index unit_of(const Grid& grid, Index cols) {
  return grid.extent == Grid::Extent::block ? grid.block : std::max(cols, Index{1});
}

/// f(j, n, scale) for the runs of equal scale among `count` columns of row i, from `begin` on.
template <class F>
void for_runs(ConstQuantizedView q, const Grid& grid, Index i, Index begin, Index count, F f) {
  const Index unit = unit_of(grid, q.cols);
  const float* scales = q.scales + i * q.scale_pitch;
  for (Index j = begin; j < begin + count;) {
    const Index n = std::min(begin + count - j, unit - j % unit);
    f(j, n, scales[j / unit]);
    j += n;
  }
}

/// Columns whose codes, or words, are held apart from the matrix; even, for int4.
constexpr Index code_piece = 1024;

class CpuBackend final : public HostBackend {
 public:
  [[nodiscard]] std::string_view name() const override { return "cpu"; }

  /// The BLAS has threads of its own, which tasks would share: its products take turns.
  [[nodiscard]] int tasks_at_once() const override { return kernels::tasks_at_once(name()); }

  void gemm(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b, Transpose op_b,
            double beta, MatrixView c) override {
    const ProductShape s = check_gemm(a, op_a, b, op_b, c);
    if (s.m == 0 || s.n == 0) return;
    if (s.k == 0) return scale_whole(beta, c);
    if (a.dtype == DType::f32) {
      product_f32(alpha, a, op_a, b, op_b, beta, c);
    } else if (c.dtype == DType::f64) {
      product_f64(alpha, a, op_a, b, op_b, beta, c);
    } else {
      bf16().gemm(alpha, a, op_a, b, op_b, beta, c);
    }
  }

  void syrk(double alpha, ConstMatrixView a, Transpose op_a, double beta, MatrixView c) override {
    const ProductShape s = check_syrk(a, op_a, c);
    if (s.n == 0) return;
    if (s.k == 0) return scale_whole(beta, c);
    const int n = blas_int(s.n);
    const int k = blas_int(s.k);
    if (a.dtype == DType::f32 && f32_ != nullptr) {
      // oneDNN has no symmetric product: what lies on and below the diagonal, in columns.
      constexpr Index width = 192;
      for (Index j = 0; j < s.n; j += width) {
        const Index cols = std::min(width, s.n - j);
        product_f32(alpha, lines(a, op_a, j, s.n - j), op_a, lines(a, op_a, j, cols), other(op_a),
                    beta, block(c, j, j, s.n - j, cols));
      }
      mirror_lower(c);
    } else if (a.dtype == DType::f32) {
      cblas_ssyrk(CblasRowMajor, CblasLower, blas_op(op_a), n, k, static_cast<float>(alpha),
                  static_cast<const float*>(a.data), blas_ld(a), static_cast<float>(beta),
                  static_cast<float*>(c.data), blas_ld(c));
      mirror_lower(c);
    } else if (c.dtype == DType::f64) {
      cblas_dsyrk(CblasRowMajor, CblasLower, blas_op(op_a), n, k, alpha,
                  static_cast<const double*>(a.data), blas_ld(a), beta,
                  static_cast<double*>(c.data), blas_ld(c));
      mirror_lower(c);
    } else {
      // As above, but by rows. Those of AᵀA have gaps and are packed again and again: it takes 0.7
      // of the time of one whole product nevertheless.
      constexpr Index height = 256;
      for (Index i = 0; i < s.n; i += height) {
        const Index rows = std::min(height, s.n - i);
        bf16().gemm(alpha, lines(a, op_a, i, rows), op_a, lines(a, op_a, 0, i + rows), other(op_a),
                    beta, block(c, i, 0, rows, i + rows));
      }
      mirror_lower(c);
    }
  }

  bool invert_spd(MatrixView a) override {
    check_invert_spd(a);
    if (a.dtype == DType::f32) {
      const bool definite = cpu::invert_lower(
          a, scratch_f32_, [this](auto... arguments) { product_f32(arguments...); });
      if (definite) mirror_lower(a);
      return definite;
    }
    const bool definite =
        cpu::invert_lower(a, scratch_f64_, [](auto... arguments) { product_f64(arguments...); });
    if (definite) mirror_lower(a);
    return definite;
  }

  void convert(ConstMatrixView from, double scale, MatrixView to) override {
    check_same_shape("convert", {from, to});
    for_rows(from.contiguous() && to.contiguous(), to.rows, to.cols, [&](Index i, Index n) {
      cpu::convert(from.dtype, row_bytes(from, i), scale, to.dtype, row_bytes(to, i), n);
    });
  }

  void round_stochastic(ConstMatrixView from, MatrixView to, std::uint64_t seed,
                        std::uint64_t stream_id, std::uint64_t step, Index first_element) override {
    check_same_shape("round_stochastic", {from, to});
    check_dtype("round_stochastic", from, DType::f32);
    check_dtype("round_stochastic", to, DType::bf16);
    const std::uint64_t key = mix_seed(seed, stream_id);
    for_rows(from.contiguous() && to.contiguous(), to.rows, to.cols, [&](Index i, Index n) {
      cpu::round_stochastic(row<float>(from, i), row<BFloat16>(to, i), n, key, step,
                            static_cast<std::uint64_t>(first_element + i * to.cols));
    });
  }

  void axpby(double a, ConstMatrixView x, double b, MatrixView y) override {
    check_same("axpby", {x, y});
    with_type(y.dtype, [&](auto type) {
      using T = decltype(type);
      for_rows(x.contiguous() && y.contiguous(), y.rows, y.cols,
               [&](Index i, Index n) { cpu::axpby(a, row<T>(x, i), b, row<T>(y, i), n); });
    });
  }

  void momentum(double beta, double weight, bool ahead, MatrixView g, MatrixView m) override {
    check_same("momentum", {m, g});
    with_type(m.dtype, [&](auto type) {
      using T = decltype(type);
      for_rows(m.contiguous() && g.contiguous(), m.rows, m.cols, [&](Index i, Index n) {
        for (Index at = 0; at < n; at += sum_block) {  // a run is still in cache the second time
          const Index count = std::min(sum_block, n - at);
          T* const gradient = row<T>(g, i) + at;
          T* const moment = row<T>(m, i) + at;
          cpu::axpby(weight, gradient, beta, moment, count);
          cpu::axpby(ahead ? beta : 1, moment, ahead ? weight : 0, gradient, count);
        }
      });
    });
  }

  void sign(ConstMatrixView from, MatrixView to) override {
    check_same("sign", {from, to});
    with_type(to.dtype, [&](auto type) {
      using T = decltype(type);
      for_rows(from.contiguous() && to.contiguous(), to.rows, to.cols,
               [&](Index i, Index n) { cpu::sign(row<T>(from, i), row<T>(to, i), n); });
    });
  }

  double decay_step(double rho, double eta, ConstMatrixView u, MatrixView w) override {
    check_same("decay_step", {w, u});
    check_dtype("decay_step", w, DType::f32);
    const bool flat = w.contiguous() && u.contiguous();
    std::array<float, sum_block> gathered;
    const float* block = gathered.data();
    return sum_blocks(
        flat ? 1 : w.rows, flat ? w.size() : w.cols,
        [&](Index i, Index j, Index at, Index n) {
          const float* update = row<float>(u, i) + j;
          cpu::decay_step(static_cast<float>(rho), static_cast<float>(eta), update,
                          row<float>(w, i) + j, n);
          if (flat) {
            block = update;  // still in cache, and whole
          } else {
            std::copy_n(update, n, gathered.data() + at);
          }
        },
        [&](Index n) { return cpu::block_sum_squares(block, n); });
  }

  double adamw(const AdamWScalars& s, ConstMatrixView g, MatrixView m, MatrixView v,
               MatrixView w) override {
    check_same("adamw", {w, g, m, v});
    check_dtype("adamw", w, DType::f32);
    const AdamWConstants constants = constants_of(s);
    const bool flat = g.contiguous() && m.contiguous() && v.contiguous() && w.contiguous();
    std::array<float, sum_block> update;
    return sum_blocks(
        flat ? 1 : w.rows, flat ? w.size() : w.cols,
        [&](Index i, Index j, Index at, Index n) {
          cpu::adamw(constants, row<float>(g, i) + j, row<float>(m, i) + j, row<float>(v, i) + j,
                     row<float>(w, i) + j, update.data() + at, n);
        },
        [&](Index n) { return cpu::block_sum_squares(update.data(), n); });
  }

  void abs_maxima(ConstMatrixView w, const Grid& grid, MatrixView out) override {
    check_scales("abs_maxima", w, grid, out);
    with_type(w.dtype, [&](auto type) {
      using T = decltype(type);
      const bool shared = grid.extent == Grid::Extent::tensor;
      const Index unit = unit_of(grid, w.cols);
      for (Index i = 0; i < out.rows; ++i) std::fill_n(row<float>(out, i), out.cols, 0.0F);
      for_rows(shared && w.contiguous(), w.rows, w.cols, [&](Index i, Index n) {
        float* const maxima = row<float>(out, shared ? 0 : i);
        const Index length = shared ? n : unit;
        for (Index begin = 0; begin < n; begin += length) {
          float& most = maxima[begin / length];
          const auto here =
              static_cast<float>(cpu::abs_max(row<T>(w, i) + begin, std::min(length, n - begin)));
          if (std::isnan(here) || here > most) most = here;  // once NaN, nothing takes it back
        }
      });
    });
  }

  void scales_from_maxima(const Grid& grid, MatrixView scales) override {
    check_scales("scales_from_maxima", scales);
    for (Index i = 0; i < scales.rows; ++i) {
      float* const line = row<float>(scales, i);
      for (Index j = 0; j < scales.cols; ++j) {
        line[j] = detail::scale_from_maximum(grid.format, grid.power_of_two, line[j]);
      }
    }
  }

  void quantize(MatrixView w, const Grid& grid, const Rounding& rounding,
                QuantizedView q) override {
    check_quantized("quantize", w, grid, q);
    check_weights("quantize", w);
    const std::uint64_t key = mix_seed(rounding.seed, rounding.stream_id);
    const bool packed = grid.format == CodeFormat::int4;
    std::array<std::uint32_t, code_piece + 4> words;
    std::array<std::uint8_t, code_piece> wide;
    for (Index i = 0; i < w.rows; ++i) {
      auto* const line = static_cast<std::uint8_t*>(q.codes) + i * q.pitch;
      const auto first =
          static_cast<std::uint64_t>(rounding.first_element + i * rounding.row_distance);
      for (Index begin = 0; begin < w.cols; begin += code_piece) {
        const Index count = std::min(code_piece, w.cols - begin);
        const std::uint64_t element = first + static_cast<std::uint64_t>(begin);
        const auto skipped = static_cast<Index>(element % 4);
        if (rounding.stochastic) {
          cpu::random_run(words.data(), (skipped + count + 3) / 4, key, rounding.step, element / 4);
        }
        std::uint8_t* const codes = packed ? wide.data() : line + begin;
        for_runs(q, grid, i, begin, count, [&](Index j, Index n, float scale) {
          const auto round = [&](auto* weights) {
            cpu::quantize(grid.format, rounding.stochastic, weights + j, scale, codes + (j - begin),
                          words.data() + skipped + (j - begin), n);
          };
          w.dtype == DType::f32 ? round(row<float>(w, i)) : round(row<double>(w, i));
        });
        if (packed) cpu::pack_nibbles(codes, count, line + begin / 2);
      }
    }
  }

  void dequantize(ConstQuantizedView q, const Grid& grid, MatrixView to) override {
    check_quantized("dequantize", to, grid, q);
    const bool packed = grid.format == CodeFormat::int4;
    std::array<std::uint8_t, code_piece> wide;
    with_type(to.dtype, [&](auto type) {
      using T = decltype(type);
      for (Index i = 0; i < to.rows; ++i) {
        const auto* const line = static_cast<const std::uint8_t*>(q.codes) + i * q.pitch;
        for (Index begin = 0; begin < to.cols; begin += code_piece) {
          const Index count = std::min(code_piece, to.cols - begin);
          if (packed) cpu::unpack_nibbles(line + begin / 2, count, wide.data());
          const std::uint8_t* const codes = packed ? wide.data() : line + begin;
          for_runs(q, grid, i, begin, count, [&](Index j, Index n, float scale) {
            cpu::dequantize(grid.format, codes + (j - begin), scale, row<T>(to, i) + j, n);
          });
        }
      }
    });
  }

  std::int64_t count_beyond(ConstMatrixView w, const Grid& grid, ConstMatrixView scales) override {
    check_scales("count_beyond", w, grid, scales);
    return with_type(w.dtype, [&](auto type) {
      using T = decltype(type);
      const Index unit = unit_of(grid, w.cols);
      Index count = 0;
      for (Index i = 0; i < w.rows; ++i) {
        const float* const line = row<float>(scales, scales.rows == 1 ? 0 : i);
        for (Index j = 0; j < w.cols; j += unit) {
          count += cpu::count_larger(row<T>(w, i) + j, detail::beyond(grid.format, line[j / unit]),
                                     std::min(unit, w.cols - j));
        }
      }
      return count;
    });
  }

  void adamw_pull_back(const AdamWScalars& s, double kappa, ConstMatrixView v, ConstMatrixView e,
                       MatrixView m) override {
    check_same("adamw_pull_back", {m, v, e});
    check_dtype("adamw_pull_back", m, DType::f32);
    const AdamWConstants constants = constants_of(s);
    const auto factor = static_cast<float>(kappa * s.bias_correction1);
    for_rows(m.contiguous() && v.contiguous() && e.contiguous(), m.rows, m.cols,
             [&](Index i, Index n) {
               cpu::adamw_pull_back(constants, factor, row<float>(v, i), row<float>(e, i),
                                    row<float>(m, i), n);
             });
  }

  void split_f32(ConstMatrixView w, MatrixView high, MatrixView low) override {
    check_halves("split_f32", w, high, low);
    for_rows(w.contiguous() && high.contiguous() && low.contiguous(), w.rows, w.cols,
             [&](Index i, Index n) {
               cpu::split(row<float>(w, i), row<BFloat16>(high, i), row<BFloat16>(low, i), n);
             });
  }

  void merge_f32(ConstMatrixView high, ConstMatrixView low, MatrixView w) override {
    check_halves("merge_f32", w, high, low);
    for_rows(w.contiguous() && high.contiguous() && low.contiguous(), w.rows, w.cols,
             [&](Index i, Index n) {
               cpu::merge(row<BFloat16>(high, i), row<BFloat16>(low, i), row<float>(w, i), n);
             });
  }

  double sum_squares(ConstMatrixView x) override {
    check_view("sum_squares", x);
    return with_type(x.dtype, [&](auto type) { return sum_squares_of<decltype(type)>(x); });
  }

  void line_sum_squares(ConstMatrixView x, bool of_columns, MatrixView out) override {
    check_lines("line_sum_squares", x, of_columns, out);
    with_type(x.dtype, [&](auto type) {
      using T = decltype(type);
      if (of_columns) {
        auto* sums = static_cast<double*>(out.data);
        std::fill_n(sums, out.cols, 0.0);
        for (Index i = 0; x.cols > 0 && i < x.rows; ++i) {
          cpu::add_squares(row<T>(x, i), sums, x.cols);
        }
      } else {
        for (Index i = 0; i < x.rows; ++i) {
          *row<double>(out, i) =
              x.cols == 0 ? 0 : sum_squares_of<T>({row<T>(x, i), 1, x.cols, x.cols, x.dtype});
        }
      }
    });
  }

  double abs_max(ConstMatrixView x) override {
    check_view("abs_max", x);
    return with_type(x.dtype, [&](auto type) {
      using T = decltype(type);
      double most = 0;
      for_rows(x.contiguous(), x.rows, x.cols, [&](Index i, Index n) {
        const double here = cpu::abs_max(row<T>(x, i), n);
        if (std::isnan(here) || here > most) most = here;
      });
      return most;
    });
  }

  void scale_lines(ConstMatrixView s, bool of_columns, MatrixView x) override {
    check_lines("scale_lines", x, of_columns, s);
    if (x.size() == 0) return;
    with_type(x.dtype, [&](auto type) {
      using T = decltype(type);
      for (Index i = 0; i < x.rows; ++i) {
        cpu::scale(of_columns ? row<double>(s, 0) : row<double>(s, i), of_columns ? 1 : 0,
                   row<T>(x, i), x.cols);
      }
    });
  }

 protected:
  void run_tasks(int count, int at_once, Task f, void* context) override {
    at_once = std::min(at_once, tasks_at_once());
    if (at_once <= 1) return HostBackend::run_tasks(count, 1, f, context);
    // A task that is left alone has one thread, too: threads inside its products would wait for
    // each other a hundred times.
    while (std::ssize(others_) + 1 < std::min(at_once, count))
      others_.push_back(std::make_unique<CpuBackend>());
    struct Shared {
      Task f;
      void* context;
      CpuBackend& self;
      std::mutex failing;
      std::exception_ptr failure;  ///< of the first task that failed
      int failed;
    } shared{f, context, *this, {}, {}, count};
    cpu::run_tasks(
        count, at_once,
        [](void* pointer, int task, int thread) {
          auto& s = *static_cast<Shared*>(pointer);
          try {
            CpuBackend& other =
                thread == 0 ? s.self : *s.self.others_[static_cast<std::size_t>(thread - 1)];
            s.f(s.context, task, thread, other);
          } catch (...) {
            const std::lock_guard lock(s.failing);
            if (task < s.failed) s.failure = std::current_exception();
            s.failed = std::min(s.failed, task);
          }
        },
        &shared);
    if (shared.failure) std::rethrow_exception(shared.failure);
  }

 private:
  /// C ← β·C, without reading C for β = 0.
  void scale_whole(double beta, MatrixView c) {
    if (beta != 0) return axpby(beta, c, 0, c);
    for (Index i = 0; i < c.rows; ++i) {
      std::memset(row_bytes(c, i), 0, static_cast<std::size_t>(c.cols) * bytes_of(c.dtype));
    }
  }

  static void product_f64(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b,
                          Transpose op_b, double beta, MatrixView c) {
    cblas_dgemm(CblasRowMajor, blas_op(op_a), blas_op(op_b), blas_int(c.rows), blas_int(c.cols),
                blas_int(op_a == Transpose::yes ? a.rows : a.cols), alpha,
                static_cast<const double*>(a.data), blas_ld(a), static_cast<const double*>(b.data),
                blas_ld(b), beta, static_cast<double*>(c.data), blas_ld(c));
  }

  void product_f32(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b,
                   Transpose op_b, double beta, MatrixView c) {
    if (f32_ != nullptr) {
      // One line of op(A), one column of op(B): without gaps, whatever the view, for equal bits.
      if (c.rows == 1 && op_a == Transpose::yes) a = without_gaps(a, line_a_);
      if (c.cols == 1 && op_b == Transpose::no) b = without_gaps(b, line_b_);
      return f32_(alpha, a, op_a, b, op_b, beta, c);
    }
    cblas_sgemm(CblasRowMajor, blas_op(op_a), blas_op(op_b), blas_int(c.rows), blas_int(c.cols),
                blas_int(op_a == Transpose::yes ? a.rows : a.cols), static_cast<float>(alpha),
                static_cast<const float*>(a.data), blas_ld(a), static_cast<const float*>(b.data),
                blas_ld(b), static_cast<float>(beta), static_cast<float*>(c.data), blas_ld(c));
  }

  /// A column, copied where its rows have gaps.
  static ConstMatrixView without_gaps(ConstMatrixView column, std::vector<float>& storage) {
    if (column.contiguous()) return column;
    const auto need = static_cast<std::size_t>(column.rows);
    if (storage.size() < need) storage.resize(need);
    for (Index i = 0; i < column.rows; ++i) {
      storage[static_cast<std::size_t>(i)] = *row<float>(column, i);
    }
    return matrix_view(static_cast<const float*>(storage.data()), column.rows, 1);
  }

  /// Opened by the first bf16 product: most programs that only reduce or plan never need it.
  cpu::Bf16Product& bf16() {
    if (!bf16_) bf16_ = cpu::open_onednn_product();
    if (!bf16_) bf16_ = cpu::open_widened_product();
    return *bf16_;
  }

  std::unique_ptr<cpu::Bf16Product> bf16_;
  /// nullptr: the BLAS.
  cpu::F32Product f32_ = cpu::onednn_f32_product();
  std::vector<float> line_a_, line_b_, scratch_f32_;
  std::vector<double> scratch_f64_;
  std::vector<std::unique_ptr<CpuBackend>> others_;  ///< for tasks on other threads
};

}  // namespace

std::unique_ptr<Backend> open_cpu() { return std::make_unique<CpuBackend>(); }

int tasks_at_once(std::string_view device) {
  return device == "cpu" && cpu::onednn_f32_product() != nullptr ? cpu::threads() : 1;
}

bool cpu_bf16_native() {
  static const bool native = cpu::open_onednn_product() != nullptr;
  return native;
}

}  // namespace orthrus::kernels
