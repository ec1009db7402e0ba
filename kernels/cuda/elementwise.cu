// Compiled without fused products and sums (CMakeLists.txt): then +, ·, / and √ round as on the
// CPU. Every entry is read and written by one thread, so that an output may be its input.
#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "kernels/adamw_constants.hpp"
#include "kernels/bf16.hpp"
#include "kernels/code_format.hpp"
#include "kernels/cuda/elementwise.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/status.hpp"
#include "kernels/norm.hpp"
#include "kernels/philox.hpp"

namespace orthrus::kernels::cuda {
namespace {

// ---- types --------------------------------------------------------------------------------------

/// The type T is computed in.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class C, class T>
__device__ C widen(T x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return static_cast<C>(to_float(x));
  } else {
    return static_cast<C>(x);
  }
}

template <class T, class C>
__device__ T narrow(C x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bf16(x);
  } else {
    return static_cast<T>(x);
  }
}

/// A view, as kernels take it.
template <class T>
struct Entries {
  T* data;
  Index ld;
  __device__ T& operator()(Index i, Index j) const { return data[i * ld + j]; }
};

template <class T>
Entries<const T> in(ConstMatrixView v) {
  return {static_cast<const T*>(v.data), v.ld};
}
template <class T>
Entries<T> out(MatrixView v) {
  return {static_cast<T*>(v.data), v.ld};
}

// ---- launching ----------------------------------------------------------------------------------

unsigned blocks_for(Index size, Index per_block, Index limit) {
  return static_cast<unsigned>(std::min((size + per_block - 1) / per_block, limit));
}

constexpr Index most_blocks = 0x7fffffff;
constexpr Index most_blocks_y = 65535;

struct Shape {
  Index rows, cols;
};

/// One long row where nothing lies between the rows of any view.
Shape shape_of(std::initializer_list<ConstMatrixView> views) {
  bool contiguous = true;
  for (const ConstMatrixView& v : views) contiguous = contiguous && v.contiguous();
  const ConstMatrixView first = *views.begin();
  return contiguous ? Shape{1, first.size()} : Shape{first.rows, first.cols};
}

// ---- each entry ---------------------------------------------------------------------------------

constexpr int each_threads = 256;
/// Entries a thread has under way. Their registers leave 1280 to 2048 threads per multiprocessor,
/// so 20 to 40 KiB of f32 on their way, where an H200's bandwidth times latency asks for some 25;
/// twice as many halve the threads. Not measured yet.
constexpr int each_batch = 4;

/// `In f.load(i, j)` of a batch, then `f.store(i, j, in)`.
template <class F>
__global__ void __launch_bounds__(each_threads) each_entry(Shape shape, F f) {
  const Index step = blockDim.x;
  const Index first = static_cast<Index>(blockIdx.x) * step * each_batch + threadIdx.x;
  const Index rows = static_cast<Index>(gridDim.y) * blockDim.y;
  for (Index i = static_cast<Index>(blockIdx.y) * blockDim.y + threadIdx.y; i < shape.rows;
       i += rows) {
    typename F::In loaded[each_batch];
#pragma unroll
    for (int u = 0; u < each_batch; ++u) {
      if (first + u * step < shape.cols) loaded[u] = f.load(i, first + u * step);
    }
#pragma unroll
    for (int u = 0; u < each_batch; ++u) {
      if (first + u * step < shape.cols) f.store(i, first + u * step, loaded[u]);
    }
  }
}

template <class F>
void for_each_entry(const char* verb, Shape shape, Stream stream, F f) {
  unsigned wide = 1;
  while (wide < each_threads && static_cast<Index>(wide) < shape.cols) wide *= 2;
  const dim3 block(wide, each_threads / wide);
  const dim3 grid(blocks_for(shape.cols, static_cast<Index>(wide) * each_batch, most_blocks),
                  blocks_for(shape.rows, block.y, most_blocks_y));
  launch(verb, each_entry<F>, grid, block, stream, shape, f);
}

template <class From, class To>
struct Convert {
  using In = From;
  using C =
      std::conditional_t<std::is_same_v<From, double> || std::is_same_v<To, double>, double, float>;
  Entries<const From> from;
  Entries<To> to;
  C scale;
  __device__ In load(Index i, Index j) const { return from(i, j); }
  __device__ void store(Index i, Index j, In x) const {
    to(i, j) = narrow<To>(scale * widen<C>(x));
  }
};

template <class Bits>
struct CopyBits {
  using In = Bits;
  Entries<const Bits> from;
  Entries<Bits> to;
  __device__ In load(Index i, Index j) const { return from(i, j); }
  __device__ void store(Index i, Index j, In x) const { to(i, j) = x; }
};

struct RoundStochastic {
  using In = float;
  Entries<const float> from;
  Entries<BFloat16> to;
  std::uint64_t key, step, first;
  Index cols;
  __device__ In load(Index i, Index j) const { return from(i, j); }
  __device__ void store(Index i, Index j, In x) const {
    using detail::high;
    using detail::low;
    const std::uint64_t element = first + static_cast<std::uint64_t>(i * cols + j);
    const detail::PhiloxState words =
        detail::philox({low(step), high(step), low(element), high(element)}, low(key), high(key));
    to(i, j) = to_bf16_stochastic(x, words.c0);
  }
};

template <class T>
struct Axpby {
  struct In {
    T x, y;
  };
  using C = Compute<T>;
  C a, b;
  bool read_y;
  Entries<const T> x;
  Entries<T> y;
  __device__ In load(Index i, Index j) const { return {x(i, j), read_y ? y(i, j) : T{}}; }
  __device__ void store(Index i, Index j, In in) const {
    const C ax = a * widen<C>(in.x);
    y(i, j) = narrow<T>(read_y ? ax + b * widen<C>(in.y) : ax);
  }
};

template <class T>
struct Sign {
  using In = T;
  using C = Compute<T>;
  Entries<const T> from;
  Entries<T> to;
  __device__ In load(Index i, Index j) const { return from(i, j); }
  __device__ void store(Index i, Index j, In in) const {
    const C x = widen<C>(in);
    const C s = static_cast<C>(x > 0) - static_cast<C>(x < 0);
    to(i, j) = narrow<T>(x != x ? x : s);
  }
};

template <class T, bool of_columns>
struct ScaleLines {
  struct In {
    T x;
    double s;
  };
  Entries<const double> s;
  Entries<T> x;
  __device__ In load(Index i, Index j) const { return {x(i, j), of_columns ? s(0, j) : s(i, 0)}; }
  __device__ void store(Index i, Index j, In in) const {
    x(i, j) = narrow<T>(widen<double>(in.x) * in.s);
  }
};

template <class T>
struct Fill {
  struct In {};
  double value;
  Entries<T> to;
  __device__ In load(Index, Index) const { return {}; }
  __device__ void store(Index i, Index j, In) const { to(i, j) = narrow<T>(value); }
};

/// A column whose entries lie a row and one apart.
MatrixView diagonal_of(MatrixView c) { return {c.data, c.rows, 1, c.ld + 1, c.dtype}; }

template <class T>
struct AddConstant {
  using In = T;
  using C = Compute<T>;
  C a;
  Entries<T> to;
  __device__ In load(Index i, Index j) const { return to(i, j); }
  __device__ void store(Index i, Index j, In x) const { to(i, j) = narrow<T>(widen<C>(x) + a); }
};

struct PackTriangle {
  using In = float;
  Entries<const float> full;
  float* packed;
  __device__ In load(Index i, Index j) const { return j <= i ? full(i, j) : 0.0F; }
  __device__ void store(Index i, Index j, In x) const {
    if (j <= i) packed[i * (i + 1) / 2 + j] = x;
  }
};

struct UnpackLower {
  using In = float;
  const float* packed;
  Entries<float> full;
  __device__ In load(Index i, Index j) const { return j <= i ? packed[i * (i + 1) / 2 + j] : 0.0F; }
  __device__ void store(Index i, Index j, In x) const {
    if (j <= i) full(i, j) = x;
  }
};

template <bool eps_first>
struct PullBack {
  struct In {
    float v, e, m;
  };
  AdamWConstants s;
  float factor;
  Entries<const float> v, e;
  Entries<float> m;
  __device__ In load(Index i, Index j) const { return {v(i, j), e(i, j), m(i, j)}; }
  __device__ void store(Index i, Index j, In in) const {
    const float divisor = eps_first ? __fdiv_rn(__fsqrt_rn(in.v) + s.eps, s.root_c2)
                                    : __fsqrt_rn(__fdiv_rn(in.v, s.c2)) + s.eps;
    m(i, j) = in.m + (factor * divisor) * in.e;
  }
};

struct SplitF32 {
  using In = float;
  Entries<const float> w;
  Entries<BFloat16> high, low;
  __device__ In load(Index i, Index j) const { return w(i, j); }
  __device__ void store(Index i, Index j, In x) const {
    const detail::Halves halves = detail::split(__float_as_uint(x));
    high(i, j) = {halves.high};
    low(i, j) = {halves.low};
  }
};

struct MergeF32 {
  using In = detail::Halves;
  Entries<const BFloat16> high, low;
  Entries<float> w;
  __device__ In load(Index i, Index j) const { return {high(i, j).bits, low(i, j).bits}; }
  __device__ void store(Index i, Index j, In halves) const {
    w(i, j) = __uint_as_float(detail::merge(halves));
  }
};

/// An unsigned integer as wide as T.
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 2, std::uint16_t,
                                  std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>;

constexpr int mirror_tile = 32;
constexpr int mirror_rows = 8;  // of a tile, at once

/// Through a tile of shared memory, so that both sides are read and written along rows.
template <class Bits>
__global__ void __launch_bounds__(mirror_tile* mirror_rows) mirror(Index n, Entries<Bits> c) {
  __shared__ Bits turned[mirror_tile][mirror_tile + 1];
  if (blockIdx.x > blockIdx.y) return;
  const Index row = static_cast<Index>(blockIdx.y) * mirror_tile;
  const Index col = static_cast<Index>(blockIdx.x) * mirror_tile;
  for (int i = threadIdx.y; i < mirror_tile; i += mirror_rows) {
    if (row + i < n && col + threadIdx.x < n) {
      turned[i][threadIdx.x] = c(row + i, col + threadIdx.x);
    }
  }
  __syncthreads();
  for (int j = threadIdx.y; j < mirror_tile; j += mirror_rows) {
    const Index from_row = row + threadIdx.x;
    if (from_row < n && col + j < from_row) c(col + j, from_row) = turned[threadIdx.x][j];
  }
}

// ---- divisions by a number in device memory -----------------------------------------------------

/// Without its sign bit an f64 orders like an integer, and every NaN lies above Inf.
using Bits64 = unsigned long long;
__device__ inline Bits64 magnitude(double x) {
  return static_cast<Bits64>(__double_as_longlong(x)) & 0x7fffffffffffffffU;
}
__device__ inline bool is_finite(double x) { return magnitude(x) < 0x7ff0000000000000U; }
__device__ inline double not_a_number() { return __longlong_as_double(0x7ff8000000000000); }

/// What one kernel leaves for the next: x is multiplied by `first`, `second` and `factor` in turn.
struct Division {
  double factor;
  double first, second;  ///< powers of two, each without reciprocal out of range
  double largest;        ///< of |x|, before
};
static_assert(sizeof(Division) == division_numbers * sizeof(double));

template <class From, class To>
struct Divide {
  using In = From;
  using C =
      std::conditional_t<std::is_same_v<From, double> || std::is_same_v<To, double>, double, float>;
  using P = Compute<From>;
  Entries<const From> from;
  Entries<To> to;
  const Division* by;
  __device__ In load(Index i, Index j) const { return from(i, j); }
  __device__ void store(Index i, Index j, In x) const {
    const auto once = narrow<From>(static_cast<P>(__ldg(&by->first)) * widen<P>(x));
    const auto near = narrow<From>(static_cast<P>(__ldg(&by->second)) * widen<P>(once));
    to(i, j) = narrow<To>(static_cast<C>(__ldg(&by->factor)) * widen<C>(near));
  }
};

template <class T>
struct SubtractNumber {
  using In = T;
  using C = Compute<T>;
  const Division* number;
  Entries<T> to;
  __device__ In load(Index i, Index j) const { return to(i, j); }
  __device__ void store(Index i, Index j, In x) const {
    to(i, j) = narrow<T>(widen<C>(x) + static_cast<C>(-__ldg(&number->factor)));
  }
};

struct InverseRoot {
  using In = double;
  Entries<double> s;
  __device__ In load(Index i, Index j) const { return s(i, j); }
  __device__ void store(Index i, Index j, In x) const {
    s(i, j) = x > 0 ? __ddiv_rn(1, __dsqrt_rn(x)) : 0;
  }
};

void divide(const char* verb, ConstMatrixView from, const Division* by, MatrixView to,
            Stream stream) {
  with_type(from.dtype, [&](auto from_tag) {
    with_type(to.dtype, [&](auto to_tag) {
      using From = typename decltype(from_tag)::Type;
      using To = typename decltype(to_tag)::Type;
      for_each_entry(verb, shape_of({from, to}), stream,
                     Divide<From, To>{in<From>(from), out<To>(to), by});
    });
  });
}

// ---- what becomes of a sum
// -----------------------------------------------------------------------

/// It is the verb's result.
struct Store {
  double* out;
  Index stride;
  __device__ void operator()(Index line, double sum) const { out[line * stride] = sum; }
};

/// Σ x² becomes 1/‖X‖_F; with the exact power of two before it, where there is one.
struct FrobeniusNorm {
  NormOptions options;
  int safe_exponent;
  bool scaled;  ///< the sum is of entries multiplied by that power, which is there already
  Division* division;
  __device__ void operator()(Index, double sum, double largest) const {
    if (scaled) largest = division->largest;
    int shift = largest > 0 && is_finite(largest) ? ilogb(largest) : 0;
    if (shift <= safe_exponent && -shift <= safe_exponent) shift = 0;
    NormOptions there = options;
    there.eps = ldexp(options.eps, -shift);
    const double norm = norm_of(__dsqrt_rn(scaled ? sum : ldexp(sum, -2 * shift)), there);
    double factor = largest == 0 ? 0 : __ddiv_rn(1, norm);
    if (!is_finite(largest)) factor = not_a_number();
    const int half = -shift / 2;
    *division = {factor, ldexp(1.0, half), ldexp(1.0, -shift - half), largest};
  }
};

/// tr R becomes 1/ν or 1/ν².
struct GramNorm {
  NormOptions options;
  bool squared;
  Division* division;
  __device__ void operator()(Index, double trace) const {
    const double inverse = __ddiv_rn(1, norm_of(__dsqrt_rn(trace), options));
    double factor = squared ? inverse * inverse : inverse;
    if (trace == 0) factor = 0;
    if (!is_finite(trace)) factor = not_a_number();
    *division = {factor, 1, 1, 0};
  }
};

struct Mean {
  double count;
  Division* division;
  __device__ void operator()(Index, double sum) const {
    *division = {__ddiv_rn(sum, count), 1, 1, 0};
  }
};

// ---- block sums -------------------------------------------------------------------------------

struct Squares {
  double sum;
  __device__ static Squares none() { return {0}; }
  __device__ void take(double x) { sum += x * x; }
  __device__ void join(Squares next) { sum += next.sum; }
  __device__ Squares below(unsigned these, unsigned distance) const {
    return {__shfl_down_sync(these, sum, distance)};
  }
  template <class End>
  __device__ void finish(Index line, End end) const {
    end(line, sum);
  }
};

struct SquaresAndLargest {
  double sum;
  Bits64 largest;
  __device__ static SquaresAndLargest none() { return {0, 0}; }
  __device__ void take(double x) {
    sum += x * x;
    const Bits64 bits = magnitude(x);
    largest = bits > largest ? bits : largest;
  }
  __device__ void join(SquaresAndLargest next) {
    sum += next.sum;
    largest = next.largest > largest ? next.largest : largest;
  }
  __device__ SquaresAndLargest below(unsigned these, unsigned distance) const {
    const double other = __shfl_down_sync(these, sum, distance);
    return {other, __shfl_down_sync(these, largest, distance)};
  }
  template <class End>
  __device__ void finish(Index line, End end) const {
    end(line, sum, __longlong_as_double(static_cast<long long>(largest)));
  }
};
constexpr std::size_t numbers_of_pair = sizeof(SquaresAndLargest) / sizeof(double);

constexpr int block_threads = 128;  // 14 blocks of f32 fit: while one adds, the others load
constexpr int lanes = 8;            // of a block of `Backend::sum_block`

/// One thread block per block of a sum: all threads visit the elements, and leave the terms to be
/// squared in shared memory; then 8 threads add, each the lane that `Backend::sum_block` documents.
/// A line has `size` elements: those of row `line`, or, when `strided`, all of a matrix of `cols`
/// columns.
/// Lines of one block end here, others in `fold`.
template <bool strided, class Sum, class F, class End>
__global__ void __launch_bounds__(block_threads)
    block_sums(Index blocks_per_line, Index size, Index cols, F f, Sum* sums, End end) {
  __shared__ typename F::Term terms[Backend::sum_block];
  const Index line = blockIdx.x / blocks_per_line;
  const Index begin = (blockIdx.x - line * blocks_per_line) * Backend::sum_block;
  const int n =
      static_cast<int>(size - begin < Backend::sum_block ? size - begin : Backend::sum_block);
  Index i = line;
  Index j = begin + threadIdx.x;
  Index step_i = 0;
  Index step_j = block_threads;
  if constexpr (strided) {  // only these divide: each next element is some rows and columns on
    i = j / cols;
    j -= i * cols;
    step_i = block_threads / cols;
    step_j = block_threads - step_i * cols;
  }
  for (int at = static_cast<int>(threadIdx.x); at < n; at += F::batch * block_threads) {
    typename F::In loaded[F::batch];
    Index rows[F::batch];
    Index columns[F::batch];
#pragma unroll
    for (int u = 0; u < F::batch; ++u) {
      rows[u] = i;
      columns[u] = j;
      if (at + u * block_threads < n) loaded[u] = f.load(i, j);
      i += step_i;
      j += step_j;
      if (strided && j >= cols) {
        j -= cols;
        ++i;
      }
    }
#pragma unroll
    for (int u = 0; u < F::batch; ++u) {
      if (at + u * block_threads < n) {
        terms[at + u * block_threads] = f.store(rows[u], columns[u], loaded[u]);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x >= lanes) return;
  Sum sum = Sum::none();
#pragma unroll 16
  for (int k = static_cast<int>(threadIdx.x); k < n; k += lanes) {
    sum.take(widen<double>(terms[k]));
  }
  // ((0+1)+(2+3)) + ((4+5)+(6+7)) in lane 0; sums do not mind the order of two.
  constexpr unsigned these = (1U << lanes) - 1;
  sum.join(sum.below(these, 1));
  sum.join(sum.below(these, 2));
  sum.join(sum.below(these, 4));
  if (threadIdx.x != 0) return;
  if (blocks_per_line == 1) {
    sum.finish(line, end);
  } else {
    sums[blockIdx.x] = sum;
  }
}

constexpr Index fold_size = 1024;

/// Up to 1024 neighbours of one line by the binary tree over blocks: at stride 1, 2, 4, … each left
/// neighbour takes its right one, and one without a partner waits. That is the tree which splits
/// [a, b) at a + the largest power of two below b − a.
template <class Sum, class End>
__global__ void fold(const Sum* in, Index count, Index chunks, Sum* out, End end) {
  __shared__ Sum slots[fold_size];
  const Index line = blockIdx.x / chunks;
  const Index begin = (blockIdx.x - line * chunks) * fold_size;
  const Index n = count - begin < fold_size ? count - begin : fold_size;
  for (Index k = threadIdx.x; k < n; k += blockDim.x) slots[k] = in[line * count + begin + k];
  for (Index stride = 1; stride < n; stride *= 2) {
    __syncthreads();
    for (Index left = 2 * stride * threadIdx.x; left + stride < n;
         left += 2 * stride * blockDim.x) {
      slots[left].join(slots[left + stride]);
    }
  }
  if (threadIdx.x != 0) return;
  if (chunks == 1) {
    slots[0].finish(line, end);
  } else {
    out[blockIdx.x] = slots[0];
  }
}

Index blocks_of(Index size) { return (size + Backend::sum_block - 1) / Backend::sum_block; }

/// end(line, sum) for each of `lines` lines of `size` elements.
template <class Sum, class F, class End>
void sum_blocks(const char* verb, Index lines, Index size, Index cols, bool strided, F f, Sum* sums,
                End end, Stream stream) {
  Index count = blocks_of(size);
  const dim3 grid(static_cast<unsigned>(lines * count));
  if (strided) {
    launch(verb, block_sums<true, Sum, F, End>, grid, block_threads, stream, count, size, cols, f,
           sums, end);
  } else {
    launch(verb, block_sums<false, Sum, F, End>, grid, block_threads, stream, count, size, cols, f,
           sums, end);
  }
  while (count > 1) {
    const Index chunks = (count + fold_size - 1) / fold_size;
    Sum* const folded = sums + lines * count;
    const Index threads = std::min<Index>(std::max<Index>((count + 63) / 64 * 32, 32), 512);
    launch(verb, fold<Sum, End>, dim3(static_cast<unsigned>(lines * chunks)),
           dim3(static_cast<unsigned>(threads)), stream, static_cast<const Sum*>(sums), count,
           chunks, folded, end);
    sums = folded;
    count = chunks;
  }
}

template <class Sum, class F, class End>
void sum_matrix(const char* verb, std::initializer_list<ConstMatrixView> views, F f,
                double* scratch, End end, Stream stream) {
  const ConstMatrixView first = *views.begin();
  const bool strided = shape_of(views).rows > 1;
  sum_blocks(verb, 1, first.size(), first.cols, strided, f, reinterpret_cast<Sum*>(scratch), end,
             stream);
}
template <class F>
void sum_matrix(const char* verb, std::initializer_list<ConstMatrixView> views, F f,
                double* scratch, double* out, Stream stream) {
  sum_matrix<Squares>(verb, views, f, scratch, Store{out, 1}, stream);
}

template <class T>
struct SquaresOf {
  using In = T;
  using Term = T;
  static constexpr int batch = 8;
  Entries<const T> x;
  __device__ In load(Index i, Index j) const { return x(i, j); }
  __device__ Term store(Index, Index, In in) const { return in; }
};

/// As `Divide` has them, before the norm is known.
struct ScaledSquares {
  using In = double;
  using Term = double;
  static constexpr int batch = 8;
  Entries<const double> x;
  const Division* by;
  __device__ In load(Index i, Index j) const { return x(i, j); }
  __device__ Term store(Index, Index, In in) const {
    return __ldg(&by->second) * (__ldg(&by->first) * in);
  }
};

struct DecayStep {
  struct In {
    float u, w;
  };
  using Term = float;
  static constexpr int batch = 8;
  float rho, eta;
  Entries<const float> u;
  Entries<float> w;
  __device__ In load(Index i, Index j) const { return {u(i, j), w(i, j)}; }
  __device__ Term store(Index i, Index j, In in) const {
    w(i, j) = rho * in.w - eta * in.u;
    return in.u;
  }
};

template <bool eps_first>
struct AdamW {
  struct In {
    float g, m, v, w;
  };
  using Term = float;
  static constexpr int batch = 4;
  AdamWConstants s;
  Entries<const float> g;
  Entries<float> m, v, w;
  __device__ In load(Index i, Index j) const { return {g(i, j), m(i, j), v(i, j), w(i, j)}; }
  __device__ Term store(Index i, Index j, In in) const {
    const float m_new = s.b1 * in.m + s.rest1 * in.g;
    const float v_new = s.b2 * in.v + s.rest2 * (in.g * in.g);
    const float divisor = eps_first ? __fdiv_rn(__fsqrt_rn(v_new) + s.eps, s.root_c2)
                                    : __fsqrt_rn(__fdiv_rn(v_new, s.c2)) + s.eps;
    const float update = __fdiv_rn(__fdiv_rn(m_new, s.c1), divisor);
    m(i, j) = m_new;
    v(i, j) = v_new;
    w(i, j) = s.rho * in.w - s.lr * update;
    return update;
  }
};

// ---- sums from the first term on ----------------------------------------------------------------

constexpr int running_threads = 256;
constexpr int running_lines = 32;
constexpr int running_steps = 64;

/// end(line, Σ f(line, step)), added one after the other. A tile of terms is fetched by all threads
/// while the tile before it is added by the first 32, a line each. `lines_adjoin`: neighbouring
/// lines, not neighbouring steps, are neighbours in memory.
template <bool lines_adjoin, class F, class End>
__global__ void __launch_bounds__(running_threads)
    running_sums(Index lines, Index steps, F f, End end) {
  constexpr int per_thread = running_lines * running_steps / running_threads;
  constexpr int line_step = lines_adjoin ? 0 : running_threads / running_steps;
  constexpr int step_step = lines_adjoin ? running_threads / running_lines : 0;
  __shared__ double terms[running_steps][running_lines + 1];
  const int t = static_cast<int>(threadIdx.x);
  const int line0 = lines_adjoin ? t % running_lines : t / running_steps;
  const int step0 = lines_adjoin ? t / running_lines : t % running_steps;
  const Index first = static_cast<Index>(blockIdx.x) * running_lines;
  double fetched[per_thread];
  const auto fetch = [&](Index from) {
#pragma unroll
    for (int u = 0; u < per_thread; ++u) {
      const Index line = first + line0 + u * line_step;
      const Index step = from + step0 + u * step_step;
      fetched[u] = line < lines && step < steps ? f(line, step) : 0;
    }
  };
  double sum = 0;
  fetch(0);
  for (Index from = 0; from < steps; from += running_steps) {
#pragma unroll
    for (int u = 0; u < per_thread; ++u) {
      terms[step0 + u * step_step][line0 + u * line_step] = fetched[u];
    }
    __syncthreads();
    fetch(from + running_steps);
    if (t < running_lines) {
      const int n = static_cast<int>(steps - from < running_steps ? steps - from : running_steps);
#pragma unroll 16
      for (int k = 0; k < n; ++k) sum += terms[k][t];
    }
    __syncthreads();
  }
  if (t < running_lines && first + t < lines) end(first + t, sum);
}

template <bool lines_adjoin, class F, class End>
void sum_running(const char* verb, Index lines, Index steps, F f, End end, Stream stream) {
  launch(verb, running_sums<lines_adjoin, F, End>, blocks_for(lines, running_lines, most_blocks),
         running_threads, stream, lines, steps, f, end);
}

template <class T>
struct ColumnSquares {
  Entries<const T> x;
  __device__ double operator()(Index line, Index step) const {
    const auto v = widen<double>(x(step, line));
    return v * v;
  }
};

template <class T>
struct Diagonal {
  Entries<const T> c;
  __device__ double operator()(Index, Index step) const { return widen<double>(c(step, step)); }
};

template <class T>
struct RowProducts {
  Entries<const T> x, y;
  __device__ double operator()(Index line, Index step) const {
    return widen<double>(x(line, step)) * widen<double>(y(line, step));
  }
};

// ---- the largest --------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(each_threads)
    largest(Shape shape, Entries<const T> x, Bits64* out) {
  const Index step = blockDim.x;
  const Index cols = static_cast<Index>(gridDim.x) * step * each_batch;
  const Index rows = static_cast<Index>(gridDim.y) * blockDim.y;
  Bits64 most = 0;
  for (Index i = static_cast<Index>(blockIdx.y) * blockDim.y + threadIdx.y; i < shape.rows;
       i += rows) {
    for (Index first = static_cast<Index>(blockIdx.x) * step * each_batch + threadIdx.x;
         first < shape.cols; first += cols) {
#pragma unroll
      for (int u = 0; u < each_batch; ++u) {
        if (first + u * step < shape.cols) {
          const Bits64 bits = magnitude(widen<double>(x(i, first + u * step)));
          most = bits > most ? bits : most;
        }
      }
    }
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    const Bits64 other = __shfl_down_sync(0xffffffffU, most, distance);
    most = other > most ? other : most;
  }
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  if (thread % 32 == 0) atomicMax(out, most);
}

}  // namespace

// ---- the verbs ----------------------------------------------------------------------------------

void convert(ConstMatrixView from, double scale, MatrixView to, Stream stream) {
  with_type(from.dtype, [&](auto from_tag) {
    with_type(to.dtype, [&](auto to_tag) {
      using From = typename decltype(from_tag)::Type;
      using To = typename decltype(to_tag)::Type;
      using F = Convert<From, To>;
      for_each_entry("convert", shape_of({from, to}), stream,
                     F{in<From>(from), out<To>(to), static_cast<typename F::C>(scale)});
    });
  });
}

void copy_entries(ConstMatrixView from, MatrixView to, Stream stream) {
  with_type(to.dtype, [&](auto tag) {
    using Bits = BitsOf<typename decltype(tag)::Type>;
    for_each_entry("copy_entries", shape_of({from, to}), stream,
                   CopyBits<Bits>{in<Bits>(from), out<Bits>(to)});
  });
}

void round_stochastic(ConstMatrixView from, MatrixView to, std::uint64_t key, std::uint64_t step,
                      std::uint64_t first, Stream stream) {
  for_each_entry("round_stochastic", shape_of({from, to}), stream,
                 RoundStochastic{in<float>(from), out<BFloat16>(to), key, step, first, to.cols});
}

void axpby(double a, ConstMatrixView x, double b, MatrixView y, Stream stream) {
  with_type(y.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using C = Compute<T>;
    for_each_entry("axpby", shape_of({x, y}), stream,
                   Axpby<T>{static_cast<C>(a), static_cast<C>(b), b != 0, in<T>(x), out<T>(y)});
  });
}

void sign(ConstMatrixView from, MatrixView to, Stream stream) {
  with_type(to.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    for_each_entry("sign", shape_of({from, to}), stream, Sign<T>{in<T>(from), out<T>(to)});
  });
}

void scale_lines(ConstMatrixView s, bool of_columns, MatrixView x, Stream stream) {
  const Shape shape{x.rows, x.cols};
  with_type(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (of_columns) {
      for_each_entry("scale_lines", shape, stream, ScaleLines<T, true>{in<double>(s), out<T>(x)});
    } else {
      for_each_entry("scale_lines", shape, stream, ScaleLines<T, false>{in<double>(s), out<T>(x)});
    }
  });
}

void fill(double value, MatrixView to, Stream stream) {
  with_type(to.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    for_each_entry("fill", shape_of({to}), stream, Fill<T>{value, out<T>(to)});
  });
}

void add_diagonal(double a, MatrixView c, Stream stream) {
  const MatrixView diagonal = diagonal_of(c);
  with_type(c.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    for_each_entry("add_diagonal", {diagonal.rows, 1}, stream,
                   AddConstant<T>{static_cast<Compute<T>>(a), out<T>(diagonal)});
  });
}

void mirror_lower(MatrixView c, Stream stream) {
  const auto tiles = static_cast<unsigned>((c.rows + mirror_tile - 1) / mirror_tile);
  with_type(c.dtype, [&](auto tag) {
    using Bits = BitsOf<typename decltype(tag)::Type>;
    launch("mirror_lower", mirror<Bits>, dim3(tiles, tiles), dim3(mirror_tile, mirror_rows), stream,
           c.rows, out<Bits>(c));
  });
}

void pack_triangle(ConstMatrixView full, float* packed, Stream stream) {
  for_each_entry("pack_triangle", {full.rows, full.cols}, stream,
                 PackTriangle{in<float>(full), packed});
}

void unpack_lower(const float* packed, MatrixView full, Stream stream) {
  for_each_entry("unpack_triangle", {full.rows, full.cols}, stream,
                 UnpackLower{packed, out<float>(full)});
}

void adamw_pull_back(const AdamWScalars& s, double kappa, ConstMatrixView v, ConstMatrixView e,
                     MatrixView m, Stream stream) {
  const Shape shape = shape_of({m, v, e});
  const AdamWConstants c = constants_of(s);
  const auto factor = static_cast<float>(kappa * s.bias_correction1);
  if (s.eps_before_correction) {
    for_each_entry("adamw_pull_back", shape, stream,
                   PullBack<true>{c, factor, in<float>(v), in<float>(e), out<float>(m)});
  } else {
    for_each_entry("adamw_pull_back", shape, stream,
                   PullBack<false>{c, factor, in<float>(v), in<float>(e), out<float>(m)});
  }
}

void split_f32(ConstMatrixView w, MatrixView high, MatrixView low, Stream stream) {
  for_each_entry("split_f32", shape_of({w, high, low}), stream,
                 SplitF32{in<float>(w), out<BFloat16>(high), out<BFloat16>(low)});
}

void merge_f32(ConstMatrixView high, ConstMatrixView low, MatrixView w, Stream stream) {
  for_each_entry("merge_f32", shape_of({w, high, low}), stream,
                 MergeF32{in<BFloat16>(high), in<BFloat16>(low), out<float>(w)});
}

std::size_t block_sum_scratch(Index lines, Index size) {
  Index count = blocks_of(size);
  Index all = count;
  while (count > 1) {
    count = (count + fold_size - 1) / fold_size;
    all += count;
  }
  return static_cast<std::size_t>(lines * all);
}

void sum_squares(ConstMatrixView x, double* scratch, double* out, Stream stream) {
  with_type(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    sum_matrix("sum_squares", {x}, SquaresOf<T>{in<T>(x)}, scratch, out, stream);
  });
}

void decay_step(double rho, double eta, ConstMatrixView u, MatrixView w, double* scratch,
                double* out, Stream stream) {
  sum_matrix("decay_step", {w, u},
             DecayStep{static_cast<float>(rho), static_cast<float>(eta), in<float>(u),
                       cuda::out<float>(w)},
             scratch, out, stream);
}

void adamw(const AdamWScalars& s, ConstMatrixView g, MatrixView m, MatrixView v, MatrixView w,
           double* scratch, double* out, Stream stream) {
  const auto run = [&](auto f) { sum_matrix("adamw", {w, g, m, v}, f, scratch, out, stream); };
  const AdamWConstants c = constants_of(s);
  const Entries<const float> gradient = in<float>(g);
  const Entries<float> first = cuda::out<float>(m);
  const Entries<float> second = cuda::out<float>(v);
  const Entries<float> weights = cuda::out<float>(w);
  if (s.eps_before_correction) {
    run(AdamW<true>{c, gradient, first, second, weights});
  } else {
    run(AdamW<false>{c, gradient, first, second, weights});
  }
}

void line_sum_squares(ConstMatrixView x, bool of_columns, double* scratch, MatrixView out,
                      Stream stream) {
  auto* sums = static_cast<double*>(out.data);
  with_type(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (of_columns) {
      sum_running<true>("line_sum_squares", x.cols, x.rows, ColumnSquares<T>{in<T>(x)},
                        Store{sums, 1}, stream);
    } else {
      sum_blocks("line_sum_squares", x.rows, x.cols, x.cols, false, SquaresOf<T>{in<T>(x)},
                 reinterpret_cast<Squares*>(scratch), Store{sums, out.ld}, stream);
    }
  });
}

void abs_max(ConstMatrixView x, double* out, Stream stream) {
  check_cuda(cudaMemsetAsync(out, 0, sizeof(double), static_cast<cudaStream_t>(stream.handle)),
             "cudaMemsetAsync");
  const Shape shape = shape_of({x});
  unsigned wide = 1;
  while (wide < each_threads && static_cast<Index>(wide) < shape.cols) wide *= 2;
  const dim3 block(wide, each_threads / wide);
  constexpr Index enough = 2048;  // blocks: each ends in 8 atomics on one address
  const unsigned grid_x = blocks_for(shape.cols, static_cast<Index>(wide) * each_batch, enough);
  const dim3 grid(grid_x, blocks_for(shape.rows, block.y, std::max<Index>(enough / grid_x, 1)));
  with_type(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch("abs_max", largest<T>, grid, block, stream, shape, in<T>(x),
           reinterpret_cast<Bits64*>(out));
  });
}

void trace(ConstMatrixView c, double* out, Stream stream) {
  with_type(c.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    sum_running<false>("trace", 1, c.rows, Diagonal<T>{in<T>(c)}, Store{out, 1}, stream);
  });
}

void row_dots(ConstMatrixView x, ConstMatrixView y, MatrixView out, Stream stream) {
  with_type(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    sum_running<false>("row_dots", x.rows, x.cols, RowProducts<T>{in<T>(x), in<T>(y)},
                       Store{static_cast<double*>(out.data), out.ld}, stream);
  });
}

std::size_t normalize_scratch(Index size) { return numbers_of_pair * block_sum_scratch(1, size); }

void normalize(ConstMatrixView x, const NormOptions& options, int safe_exponent, double* scratch,
               double* numbers, MatrixView to, Stream stream) {
  auto* const division = reinterpret_cast<Division*>(numbers);
  const FrobeniusNorm end{options, safe_exponent, false, division};
  with_type(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    sum_matrix<SquaresAndLargest>("normalize", {x}, SquaresOf<T>{in<T>(x)}, scratch, end, stream);
    if constexpr (std::is_same_v<T, double>) {
      // Squares of f64 may have left its range, those of f32 cannot.
      sum_matrix<SquaresAndLargest>("normalize", {x}, ScaledSquares{in<double>(x), division},
                                    scratch, FrobeniusNorm{options, safe_exponent, true, division},
                                    stream);
    }
  });
  divide("normalize", x, division, to, stream);
}

void divide_by_norm(ConstMatrixView r, const NormOptions& options, bool squared,
                    ConstMatrixView from, double* numbers, MatrixView to, Stream stream) {
  auto* const division = reinterpret_cast<Division*>(numbers);
  with_type(r.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    sum_running<false>("divide_by_norm", 1, r.rows, Diagonal<T>{in<T>(r)},
                       GramNorm{options, squared, division}, stream);
  });
  divide("divide_by_norm", from, division, to, stream);
}

void split_mean(MatrixView c, ConstMatrixView x, double* numbers, MatrixView to, Stream stream) {
  auto* const division = reinterpret_cast<Division*>(numbers);
  const MatrixView diagonal = diagonal_of(c);
  with_type(c.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    sum_running<false>("split_mean", 1, c.rows, Diagonal<T>{in<T>(c)},
                       Mean{static_cast<double>(c.rows), division}, stream);
    for_each_entry("split_mean", {diagonal.rows, 1}, stream,
                   SubtractNumber<T>{division, out<T>(diagonal)});
  });
  if (to.size() > 0) divide("split_mean", x, division, to, stream);
}

void inverse_roots(MatrixView s, Stream stream) {
  for_each_entry("inverse_roots", shape_of({s}), stream, InverseRoot{out<double>(s)});
}

}  // namespace orthrus::kernels::cuda
