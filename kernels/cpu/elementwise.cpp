#include "kernels/cpu/elementwise.hpp"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/cpu/clones.hpp"
#include "kernels/philox.hpp"

// A loop is written once as an always-inlined template and cloned through a plain function per
// type: templates themselves cannot be cloned.
#define ORTHRUS_LOOP \
  template <class T> \
  [[gnu::always_inline]] inline

namespace orthrus::kernels::cpu {
namespace {

/// The type T is computed in.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class C>
[[gnu::always_inline]] inline C load(float x) {
  return static_cast<C>(x);
}
template <class C>
[[gnu::always_inline]] inline C load(double x) {
  return static_cast<C>(x);
}
template <class C>
[[gnu::always_inline]] inline C load(BFloat16 x) {
  return static_cast<C>(to_float(x));
}

template <class T, class C>
[[gnu::always_inline]] inline T store(C x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bf16(x);
  } else {
    return static_cast<T>(x);
  }
}

// ---- convert ------------------------------------------------------------------------------------

template <class From, class To>
[[gnu::always_inline]] inline void convert_loop(const void* from, double scale, void* to, Index n) {
  constexpr bool wide = std::is_same_v<From, double> || std::is_same_v<To, double>;
  using C = std::conditional_t<wide, double, float>;
  const auto* x = static_cast<const From*>(from);
  auto* y = static_cast<To*>(to);
  const auto s = static_cast<C>(scale);
  for (Index i = 0; i < n; ++i) y[i] = store<To, C>(s * load<C>(x[i]));
}

using ConvertLoop = void(const void*, double, void*, Index);

ORTHRUS_CLONES void f32_to_f32(const void* x, double s, void* y, Index n) {
  convert_loop<float, float>(x, s, y, n);
}
ORTHRUS_CLONES void f32_to_bf16(const void* x, double s, void* y, Index n) {
  convert_loop<float, BFloat16>(x, s, y, n);
}
ORTHRUS_CLONES void f32_to_f64(const void* x, double s, void* y, Index n) {
  convert_loop<float, double>(x, s, y, n);
}
ORTHRUS_CLONES void bf16_to_f32(const void* x, double s, void* y, Index n) {
  convert_loop<BFloat16, float>(x, s, y, n);
}
ORTHRUS_CLONES void bf16_to_bf16(const void* x, double s, void* y, Index n) {
  convert_loop<BFloat16, BFloat16>(x, s, y, n);
}
ORTHRUS_CLONES void bf16_to_f64(const void* x, double s, void* y, Index n) {
  convert_loop<BFloat16, double>(x, s, y, n);
}
ORTHRUS_CLONES void f64_to_f32(const void* x, double s, void* y, Index n) {
  convert_loop<double, float>(x, s, y, n);
}
ORTHRUS_CLONES void f64_to_bf16(const void* x, double s, void* y, Index n) {
  convert_loop<double, BFloat16>(x, s, y, n);
}
ORTHRUS_CLONES void f64_to_f64(const void* x, double s, void* y, Index n) {
  convert_loop<double, double>(x, s, y, n);
}

constexpr int row_of(DType t) { return t == DType::f32 ? 0 : t == DType::bf16 ? 1 : 2; }

// ---- the rest, as templates ---------------------------------------------------------------------

ORTHRUS_LOOP void axpby_loop(double a, const T* x, double b, T* y, Index n) {
  using C = Compute<T>;
  const auto ca = static_cast<C>(a);
  const auto cb = static_cast<C>(b);
  if (b == 0) {
    for (Index i = 0; i < n; ++i) y[i] = store<T, C>(ca * load<C>(x[i]));
  } else {
    for (Index i = 0; i < n; ++i) y[i] = store<T, C>(ca * load<C>(x[i]) + cb * load<C>(y[i]));
  }
}

ORTHRUS_LOOP void sign_loop(const T* from, T* to, Index n) {
  using C = Compute<T>;
  for (Index i = 0; i < n; ++i) {
    const C x = load<C>(from[i]);
    const C s = static_cast<C>(x > 0) - static_cast<C>(x < 0);
    to[i] = store<T, C>(x != x ? x : s);
  }
}

// 8 numbers at a time: GCC turns these into the widest registers the clone has, where it would not
// find eight interleaved sums in a plain loop by itself.
using F32x8 = float __attribute__((vector_size(32)));
using F64x8 = double __attribute__((vector_size(64)));
using U16x8 = std::uint16_t __attribute__((vector_size(16)));
using U32x8 = std::uint32_t __attribute__((vector_size(32)));

[[gnu::always_inline]] inline void load8(const float* x, F64x8& out) {
  F32x8 v;
  std::memcpy(&v, x, sizeof v);
  out = __builtin_convertvector(v, F64x8);
}
[[gnu::always_inline]] inline void load8(const double* x, F64x8& out) {
  std::memcpy(&out, x, sizeof out);
}
[[gnu::always_inline]] inline void load8(const BFloat16* x, F64x8& out) {
  U16x8 half;
  std::memcpy(&half, x, sizeof half);
  const U32x8 word = __builtin_convertvector(half, U32x8) << 16;
  F32x8 v;
  std::memcpy(&v, &word, sizeof v);
  out = __builtin_convertvector(v, F64x8);
}

ORTHRUS_LOOP double block_loop(const T* x, Index n) {
  F64x8 sums{};
  Index i = 0;
  for (; i + 8 <= n; i += 8) {
    F64x8 v;
    load8(x + i, v);
    sums += v * v;
  }
  for (Index lane = 0; i < n; ++i, ++lane) {
    const auto v = load<double>(x[i]);
    sums[lane] += v * v;
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

ORTHRUS_LOOP void add_squares_loop(const T* x, double* sums, Index n) {
  for (Index i = 0; i < n; ++i) {
    const auto v = load<double>(x[i]);
    sums[i] += v * v;
  }
}

// Without its sign bit a float orders like an integer, and every NaN lies above Inf: one integer
// maximum finds both the largest entry and the NaN.
template <class Bits, class T>
[[gnu::always_inline]] inline Bits largest_bits(const T* x, Index n, Bits magnitude) {
  Bits most = 0;
  for (Index i = 0; i < n; ++i) {
    const auto bits = static_cast<Bits>(std::bit_cast<Bits>(x[i]) & magnitude);
    most = bits > most ? bits : most;
  }
  return most;
}

ORTHRUS_LOOP void scale_loop(const double* s, Index step, T* x, Index n) {
  if (step == 0) {
    const double factor = *s;
    for (Index i = 0; i < n; ++i) x[i] = store<T, double>(load<double>(x[i]) * factor);
  } else {
    for (Index i = 0; i < n; ++i) x[i] = store<T, double>(load<double>(x[i]) * s[i]);
  }
}

template <bool eps_first>
[[gnu::always_inline]] inline void adamw_loop(const AdamWConstants s, const float* __restrict g,
                                              float* __restrict m, float* __restrict v,
                                              float* __restrict w, float* __restrict u, Index n) {
  for (Index i = 0; i < n; ++i) {
    const float m_new = s.b1 * m[i] + s.rest1 * g[i];
    const float v_new = s.b2 * v[i] + s.rest2 * (g[i] * g[i]);
    const float divisor =
        eps_first ? (std::sqrt(v_new) + s.eps) / s.root_c2 : std::sqrt(v_new / s.c2) + s.eps;
    const float update = (m_new / s.c1) / divisor;
    m[i] = m_new;
    v[i] = v_new;
    u[i] = update;
    w[i] = s.rho * w[i] - s.lr * update;
  }
}

ORTHRUS_CLONES void adamw_eps_last(const AdamWConstants& s, const float* g, float* m, float* v,
                                   float* w, float* u, Index n) {
  adamw_loop<false>(s, g, m, v, w, u, n);
}
ORTHRUS_CLONES void adamw_eps_first(const AdamWConstants& s, const float* g, float* m, float* v,
                                    float* w, float* u, Index n) {
  adamw_loop<true>(s, g, m, v, w, u, n);
}

ORTHRUS_CLONES std::int32_t largest(const float* x, Index n) {
  return largest_bits<std::int32_t>(x, n, 0x7fffffff);
}
ORTHRUS_CLONES std::int64_t largest(const double* x, Index n) {
  return largest_bits<std::int64_t>(x, n, 0x7fffffffffffffff);
}
ORTHRUS_CLONES std::int16_t largest(const BFloat16* x, Index n) {
  return largest_bits<std::int16_t>(x, n, 0x7fff);
}

}  // namespace

void convert(DType from_type, const void* from, double scale, DType to_type, void* to, Index n) {
  if (from_type == to_type && scale == 1) {
    std::memmove(to, from, static_cast<std::size_t>(n) * bytes_of(to_type));
    return;
  }
  static constexpr ConvertLoop* table[3][3] = {{f32_to_f32, f32_to_bf16, f32_to_f64},
                                               {bf16_to_f32, bf16_to_bf16, bf16_to_f64},
                                               {f64_to_f32, f64_to_bf16, f64_to_f64}};
  table[row_of(from_type)][row_of(to_type)](from, scale, to, n);
}

ORTHRUS_CLONES void round_stochastic(const float* from, BFloat16* to, Index n, std::uint64_t key,
                                     std::uint64_t step, std::uint64_t first) {
  using detail::high;
  using detail::low;
  // Words first, then rounding: each of the two loops vectorizes, their fusion does not.
  constexpr Index batch = 256;
  std::uint32_t words[batch];
  for (Index begin = 0; begin < n; begin += batch) {
    const Index count = n - begin < batch ? n - begin : batch;
    const std::uint64_t base = first + static_cast<std::uint64_t>(begin);
    for (Index i = 0; i < count; ++i) {
      const std::uint64_t element = base + static_cast<std::uint64_t>(i);
      words[i] =
          detail::philox({low(step), high(step), low(element), high(element)}, low(key), high(key))
              .c0;
    }
    for (Index i = 0; i < count; ++i) {
      to[begin + i] = to_bf16_stochastic(from[begin + i], words[i]);
    }
  }
}

ORTHRUS_CLONES void axpby(double a, const float* x, double b, float* y, Index n) {
  axpby_loop(a, x, b, y, n);
}
ORTHRUS_CLONES void axpby(double a, const double* x, double b, double* y, Index n) {
  axpby_loop(a, x, b, y, n);
}
ORTHRUS_CLONES void axpby(double a, const BFloat16* x, double b, BFloat16* y, Index n) {
  axpby_loop(a, x, b, y, n);
}

ORTHRUS_CLONES void sign(const float* from, float* to, Index n) { sign_loop(from, to, n); }
ORTHRUS_CLONES void sign(const double* from, double* to, Index n) { sign_loop(from, to, n); }
ORTHRUS_CLONES void sign(const BFloat16* from, BFloat16* to, Index n) { sign_loop(from, to, n); }

ORTHRUS_CLONES void decay_step(float rho, float eta, const float* u, float* w, Index n) {
  for (Index i = 0; i < n; ++i) w[i] = rho * w[i] - eta * u[i];
}

void adamw(const AdamWConstants& s, const float* g, float* m, float* v, float* w, float* u,
           Index n) {
  (s.eps_before_correction ? adamw_eps_first : adamw_eps_last)(s, g, m, v, w, u, n);
}

ORTHRUS_CLONES double block_sum_squares(const float* x, Index n) { return block_loop(x, n); }
ORTHRUS_CLONES double block_sum_squares(const double* x, Index n) { return block_loop(x, n); }
ORTHRUS_CLONES double block_sum_squares(const BFloat16* x, Index n) { return block_loop(x, n); }

ORTHRUS_CLONES void add_squares(const float* x, double* sums, Index n) {
  add_squares_loop(x, sums, n);
}
ORTHRUS_CLONES void add_squares(const double* x, double* sums, Index n) {
  add_squares_loop(x, sums, n);
}
ORTHRUS_CLONES void add_squares(const BFloat16* x, double* sums, Index n) {
  add_squares_loop(x, sums, n);
}

double abs_max(const float* x, Index n) { return std::bit_cast<float>(largest(x, n)); }
double abs_max(const double* x, Index n) { return std::bit_cast<double>(largest(x, n)); }
double abs_max(const BFloat16* x, Index n) {
  return to_float(std::bit_cast<BFloat16>(largest(x, n)));
}

ORTHRUS_CLONES void scale(const double* s, Index step, float* x, Index n) {
  scale_loop(s, step, x, n);
}
ORTHRUS_CLONES void scale(const double* s, Index step, double* x, Index n) {
  scale_loop(s, step, x, n);
}
ORTHRUS_CLONES void scale(const double* s, Index step, BFloat16* x, Index n) {
  scale_loop(s, step, x, n);
}

ORTHRUS_CLONES bool invert_factor(double* a, double* x, Index n) {
  // By rows of Lᵀ and of L⁻¹: every inner loop is a multiple of one row added to another.
  for (Index p = 0; p < n; ++p) {
    const double* pivot = a + p * n;
    if (!(pivot[p] > 0 && pivot[p] <= std::numeric_limits<double>::max())) return false;
    const double scale = 1 / std::sqrt(pivot[p]);
    for (Index j = p; j < n; ++j) a[p * n + j] *= scale;
    for (Index i = p + 1; i < n; ++i) {
      const double factor = pivot[i];
      for (Index j = i; j < n; ++j) a[i * n + j] -= factor * pivot[j];
    }
  }
  for (Index i = 0; i < n; ++i) {
    double* row = x + i * n;
    for (Index j = 0; j < n; ++j) row[j] = i == j ? 1 : 0;
    for (Index p = 0; p < i; ++p) {
      const double factor = a[p * n + i];
      const double* other = x + p * n;
      for (Index j = 0; j <= p; ++j) row[j] -= factor * other[j];
    }
    const double scale = 1 / a[i * n + i];
    for (Index j = 0; j <= i; ++j) row[j] *= scale;
  }
  return true;
}

ORTHRUS_CLONES void negative_square(const double* x, double* to, Index n) {
  for (Index i = 0; i < n; ++i) {
    double* row = to + i * n;
    for (Index j = 0; j <= i; ++j) row[j] = 0;
    for (Index p = i; p < n; ++p) {
      const double* from = x + p * n;
      const double factor = from[i];
      for (Index j = 0; j <= i; ++j) row[j] -= factor * from[j];
    }
  }
}

}  // namespace orthrus::kernels::cpu
