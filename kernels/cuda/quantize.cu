// Compiled without fused products and sums, as elementwise.cu.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "kernels/bf16.hpp"
#include "kernels/code_format.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/quantize.hpp"
#include "kernels/cuda/status.hpp"
#include "kernels/philox.hpp"

namespace orthrus::kernels::cuda {
namespace codes {
namespace {

using Bits64 = unsigned long long;

constexpr int threads = 256;

Index pieces_of(Index size, Index piece) { return (size + piece - 1) / piece; }

/// Columns of a row that share a scale; all of them where the rest of the matrix may, too.
Index unit_of(const Grid& grid, Index cols) {
  return grid.extent == Grid::Extent::block ? grid.block : cols;
}
/// From the scales of one row to those of the next.
Index pitch_of(const Grid& grid, ConstMatrixView scales) {
  return grid.extent == Grid::Extent::tensor ? 0 : scales.ld;
}

template <CodeFormat value>
using Format = std::integral_constant<CodeFormat, value>;
template <class F>
void with_format(CodeFormat format, F f) {
  if (format == CodeFormat::fp8_e4m3) return f(Format<CodeFormat::fp8_e4m3>{});
  if (format == CodeFormat::fp8_e5m2) return f(Format<CodeFormat::fp8_e5m2>{});
  if (format == CodeFormat::int8) return f(Format<CodeFormat::int8>{});
  f(Format<CodeFormat::int4>{});
}

__device__ inline float quotient(float w, float s) { return __fdiv_rn(w, s); }
__device__ inline float quotient(double w, double s) { return static_cast<float>(w / s); }

__device__ inline double wide(float x) { return static_cast<double>(x); }
__device__ inline double wide(double x) { return x; }
__device__ inline double wide(BFloat16 x) { return static_cast<double>(to_float(x)); }

__device__ inline float single(float x) { return x; }
__device__ inline float single(double x) { return static_cast<float>(x); }
__device__ inline float single(BFloat16 x) { return to_float(x); }

// ---- four columns -------------------------------------------------------------------------------

/// Columns of a thread: those of one Philox block, where the first element is a multiple of 4, and
/// whole bytes of int4.
constexpr int quad = 4;

template <class F>
__global__ void __launch_bounds__(threads) each_quad(Index rows, Index cols, F f) {
  const Index j = (static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x) * quad;
  if (j >= cols) return;
  const int n = static_cast<int>(cols - j < quad ? cols - j : quad);
  const Index step = static_cast<Index>(gridDim.y) * blockDim.y;
  for (Index i = static_cast<Index>(blockIdx.y) * blockDim.y + threadIdx.y; i < rows; i += step) {
    f(i, j, n);
  }
}

template <class F>
void for_each_quad(const char* verb, Index rows, Index cols, Stream stream, F f) {
  const Index quads = pieces_of(cols, quad);
  unsigned across = 1;
  while (across < threads && static_cast<Index>(across) < quads) across *= 2;
  const dim3 block(across, threads / across);
  const dim3 grid(static_cast<unsigned>(pieces_of(quads, across)),
                  static_cast<unsigned>(std::min<Index>(pieces_of(rows, block.y), 65535)));
  launch(verb, each_quad<F>, grid, block, stream, rows, cols, f);
}

/// The scales of consecutive columns of a row.
struct Scales {
  const float* data;
  Index pitch, unit;

  struct Walk {
    const float* at;
    Index unit, left;
    __device__ float next() {
      if (left == 0) {
        ++at;
        left = unit;
      }
      --left;
      return *at;
    }
  };
  __device__ Walk from(Index i, Index j) const {
    const Index k = j / unit;
    return {data + i * pitch + k, unit, unit - (j - k * unit)};
  }
};

/// The words of `quad` elements from this one on.
struct Words {
  std::uint32_t word[2 * quad];
};
__device__ inline Words words_from(std::uint64_t element, std::uint64_t key, std::uint64_t step) {
  using detail::high;
  using detail::low;
  const auto call = [&](std::uint64_t index) {
    return detail::philox({low(step), high(step), low(index), high(index)}, low(key), high(key));
  };
  const detail::PhiloxState here = call(element / quad);
  Words w{{here.c0, here.c1, here.c2, here.c3}};
  const auto skipped = static_cast<unsigned>(element % quad);
  if (skipped == 0) return w;
  const detail::PhiloxState there = call(element / quad + 1);
  w.word[4] = there.c0;
  w.word[5] = there.c1;
  w.word[6] = there.c2;
  w.word[7] = there.c3;
  // By fixed distances, so that all of it stays in registers.
  for (unsigned distance = 1; distance < quad; distance *= 2) {
    if ((skipped & distance) == 0) continue;
#pragma unroll
    for (int k = 0; k < 2 * quad; ++k) {
      w.word[k] = k + static_cast<int>(distance) < 2 * quad ? w.word[k + distance] : 0;
    }
  }
  return w;
}

template <CodeFormat format, bool stochastic, class T>
struct Quantize {
  T* w;
  Index ld;
  std::uint8_t* codes;
  Index pitch;
  Scales scales;
  std::uint64_t key, step;
  Index first, row_distance;

  __device__ void operator()(Index i, Index j, int n) const {
    T* const entries = w + i * ld + j;
    T x[quad];
#pragma unroll
    for (int u = 0; u < quad; ++u) {
      if (u < n) x[u] = entries[u];
    }
    Words words{};
    if constexpr (stochastic) {
      words = words_from(static_cast<std::uint64_t>(first + i * row_distance + j), key, step);
    }
    Scales::Walk walk = scales.from(i, j);
    std::uint8_t code[quad] = {};
#pragma unroll
    for (int u = 0; u < quad; ++u) {
      if (u < n) {
        const auto s = static_cast<T>(walk.next());
        const detail::Code c =
            detail::round_to_code<format, stochastic>(quotient(x[u], s), words.word[u]);
        code[u] = c.bits;
        entries[u] = x[u] - static_cast<T>(c.value) * s;
      }
    }
    std::uint8_t* const line = codes + i * pitch;
    if constexpr (format == CodeFormat::int4) {
      line[j / 2] = detail::packed_nibbles(code[0], code[1]);
      if (n > 2) line[j / 2 + 1] = detail::packed_nibbles(code[2], code[3]);
    } else {
#pragma unroll
      for (int u = 0; u < quad; ++u) {
        if (u < n) line[j + u] = code[u];
      }
    }
  }
};

template <CodeFormat format, class T>
struct Dequantize {
  const std::uint8_t* codes;
  Index pitch;
  Scales scales;
  T* to;
  Index ld;

  __device__ void operator()(Index i, Index j, int n) const {
    const std::uint8_t* const line = codes + i * pitch;
    std::uint8_t code[quad] = {};
    if constexpr (format == CodeFormat::int4) {
      code[0] = detail::even_nibble(line[j / 2]);
      code[1] = detail::odd_nibble(line[j / 2]);
      if (n > 2) {
        code[2] = detail::even_nibble(line[j / 2 + 1]);
        code[3] = detail::odd_nibble(line[j / 2 + 1]);
      }
    } else {
#pragma unroll
      for (int u = 0; u < quad; ++u) {
        if (u < n) code[u] = line[j + u];
      }
    }
    Scales::Walk walk = scales.from(i, j);
    T* const entries = to + i * ld + j;
#pragma unroll
    for (int u = 0; u < quad; ++u) {
      if (u < n) {
        const float s = walk.next();
        const float value = detail::value_of<format>(code[u]);
        if constexpr (std::is_same_v<T, BFloat16>) {
          entries[u] = to_bf16(value * s);
        } else {
          entries[u] = static_cast<T>(value) * static_cast<T>(s);
        }
      }
    }
  }
};

struct ScalesFromMaxima {
  float* scales;
  Index ld;
  CodeFormat format;
  bool power_of_two;
  __device__ void operator()(Index i, Index j, int n) const {
    for (int u = 0; u < n; ++u) {
      float& s = scales[i * ld + j + u];
      s = detail::scale_from_maximum(format, power_of_two, s);
    }
  }
};

// ---- over what shares a scale -------------------------------------------------------------------

/// A matrix in pieces of one row and one scale each; a warp takes every so manieth.
struct Pieces {
  static constexpr Index longest = 1024;
  Index rows, cols, unit, units, per_unit;

  /// f(i, unit, begin, end), by all threads of a warp alike.
  template <class F>
  __device__ void walk(F f) const {
    const Index warps = static_cast<Index>(gridDim.x) * (threads / 32);
    const Index warp = static_cast<Index>(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
    const Index per_row = units * per_unit;
    for (Index k = warp; k < rows * per_row; k += warps) {
      const Index i = k / per_row;
      const Index c = (k - i * per_row) / per_unit;
      const Index begin = c * unit + (k - i * per_row - c * per_unit) * longest;
      const Index unit_end = (c + 1) * unit < cols ? (c + 1) * unit : cols;
      f(i, c, begin, begin + longest < unit_end ? begin + longest : unit_end);
    }
  }
  [[nodiscard]] dim3 grid() const {
    constexpr Index enough = 2048;  // blocks
    return {
        static_cast<unsigned>(std::min(pieces_of(rows * units * per_unit, threads / 32), enough))};
  }
};

Pieces pieces_of(ConstMatrixView w, const Grid& grid) {
  const Index unit = unit_of(grid, w.cols);
  return {w.rows, w.cols, unit, pieces_of(w.cols, unit), pieces_of(unit, Pieces::longest)};
}

template <class T>
__global__ void __launch_bounds__(threads)
    maxima(Pieces pieces, const T* w, Index ld, unsigned* out, Index out_pitch) {
  Bits64 most = 0;
  unsigned* target = nullptr;
  // Without its sign bit an f32 orders like an integer, and every NaN lies above Inf.
  const auto flush = [&] {
    if (target == nullptr) return;
    for (int distance = 16; distance > 0; distance /= 2) {
      const Bits64 other = __shfl_down_sync(0xffffffffU, most, distance);
      most = other > most ? other : most;
    }
    if (threadIdx.x % 32 == 0) atomicMax(target, static_cast<unsigned>(most));
  };
  pieces.walk([&](Index i, Index unit, Index begin, Index end) {
    unsigned* const here = out + i * out_pitch + unit;
    if (here != target) {
      flush();
      target = here;
      most = 0;
    }
    for (Index j = begin + threadIdx.x % 32; j < end; j += 32) {
      const Bits64 bits = __float_as_uint(single(w[i * ld + j])) & 0x7fffffffU;
      most = bits > most ? bits : most;
    }
  });
  flush();
}

template <class T>
__global__ void __launch_bounds__(threads)
    larger(Pieces pieces, const T* w, Index ld, CodeFormat format, const float* scales,
           Index scale_pitch, Bits64* out) {
  Bits64 count = 0;
  pieces.walk([&](Index i, Index unit, Index begin, Index end) {
    const double limit = detail::beyond(format, scales[i * scale_pitch + unit]);
    for (Index j = begin + threadIdx.x % 32; j < end; j += 32) {
      const double x = wide(w[i * ld + j]);
      count += x > limit || -x > limit ? 1 : 0;
    }
  });
  for (int distance = 16; distance > 0; distance /= 2) {
    count += __shfl_down_sync(0xffffffffU, count, distance);
  }
  if (threadIdx.x % 32 == 0) atomicAdd(out, count);
}

}  // namespace
}  // namespace codes

// ---- the verbs ----------------------------------------------------------------------------------

void abs_maxima(ConstMatrixView w, const Grid& grid, MatrixView out, Stream stream) {
  const codes::Pieces pieces = codes::pieces_of(w, grid);
  with_type(w.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch("abs_maxima", codes::maxima<T>, pieces.grid(), codes::threads, stream, pieces,
           static_cast<const T*>(w.data), w.ld, static_cast<unsigned*>(out.data),
           codes::pitch_of(grid, out));
  });
}

void scales_from_maxima(const Grid& grid, MatrixView scales, Stream stream) {
  codes::for_each_quad("scales_from_maxima", scales.rows, scales.cols, stream,
                       codes::ScalesFromMaxima{static_cast<float*>(scales.data), scales.ld,
                                               grid.format, grid.power_of_two});
}

void quantize(MatrixView w, const Grid& grid, const Rounding& rounding, std::uint64_t key,
              QuantizedView q, Stream stream) {
  const auto run = [&](auto format, auto stochastic, auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    codes::for_each_quad("quantize", w.rows, w.cols, stream,
                         codes::Quantize<decltype(format)::value, decltype(stochastic)::value, T>{
                             data,
                             w.ld,
                             static_cast<std::uint8_t*>(q.codes),
                             q.pitch,
                             {q.scales, q.scale_pitch, codes::unit_of(grid, w.cols)},
                             key,
                             rounding.step,
                             rounding.first_element,
                             rounding.row_distance});
  };
  const auto of_type = [&](auto format, auto stochastic) {
    if (w.dtype == DType::f32) return run(format, stochastic, static_cast<float*>(w.data));
    run(format, stochastic, static_cast<double*>(w.data));
  };
  codes::with_format(grid.format, [&](auto format) {
    if (rounding.stochastic) return of_type(format, std::true_type{});
    of_type(format, std::false_type{});
  });
}

void dequantize(ConstQuantizedView q, const Grid& grid, MatrixView to, Stream stream) {
  codes::with_format(grid.format, [&](auto format) {
    with_type(to.dtype, [&](auto tag) {
      using T = typename decltype(tag)::Type;
      codes::for_each_quad("dequantize", to.rows, to.cols, stream,
                           codes::Dequantize<decltype(format)::value, T>{
                               static_cast<const std::uint8_t*>(q.codes),
                               q.pitch,
                               {q.scales, q.scale_pitch, codes::unit_of(grid, to.cols)},
                               static_cast<T*>(to.data),
                               to.ld});
    });
  });
}

void count_beyond(ConstMatrixView w, const Grid& grid, ConstMatrixView scales, double* out,
                  Stream stream) {
  check_cuda(cudaMemsetAsync(out, 0, sizeof(double), static_cast<cudaStream_t>(stream.handle)),
             "cudaMemsetAsync");
  const codes::Pieces pieces = codes::pieces_of(w, grid);
  with_type(w.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch("count_beyond", codes::larger<T>, pieces.grid(), codes::threads, stream, pieces,
           static_cast<const T*>(w.data), w.ld, grid.format, static_cast<const float*>(scales.data),
           codes::pitch_of(grid, scales), reinterpret_cast<codes::Bits64*>(out));
  });
}

}  // namespace orthrus::kernels::cuda
