#include "kernels/cpu/quantize.hpp"

#include <cmath>
#include <cstddef>
#include <type_traits>

#include "kernels/code_format.hpp"
#include "kernels/cpu/clones.hpp"
#include "kernels/philox.hpp"

// As in elementwise.cpp: a loop is an always-inlined template, cloned through plain functions.

namespace orthrus::kernels::cpu {
namespace {

template <CodeFormat format, bool stochastic, class T>
[[gnu::always_inline]] inline void quantize_loop(T* __restrict w, float scale,
                                                 std::uint8_t* __restrict codes,
                                                 const std::uint32_t* __restrict words, Index n) {
  const auto s = static_cast<T>(scale);
  for (Index i = 0; i < n; ++i) {
    const std::uint32_t word = stochastic ? words[i] : 0;
    const detail::Code code =
        detail::round_to_code<format, stochastic>(static_cast<float>(w[i] / s), word);
    codes[i] = code.bits;
    w[i] = w[i] - static_cast<T>(code.value) * s;
  }
}

using F32Loop = void(float*, float, std::uint8_t*, const std::uint32_t*, Index);
using F64Loop = void(double*, float, std::uint8_t*, const std::uint32_t*, Index);

#define ORTHRUS_QUANTIZE(name, format, stochastic)                                                 \
  ORTHRUS_CLONES void name(float* w, float scale, std::uint8_t* codes, const std::uint32_t* words, \
                           Index n) {                                                              \
    quantize_loop<CodeFormat::format, stochastic>(w, scale, codes, words, n);                      \
  }                                                                                                \
  ORTHRUS_CLONES void name##_f64(double* w, float scale, std::uint8_t* codes,                      \
                                 const std::uint32_t* words, Index n) {                            \
    quantize_loop<CodeFormat::format, stochastic>(w, scale, codes, words, n);                      \
  }
ORTHRUS_QUANTIZE(e4m3_nearest, fp8_e4m3, false)
ORTHRUS_QUANTIZE(e5m2_nearest, fp8_e5m2, false)
ORTHRUS_QUANTIZE(int8_nearest, int8, false)
ORTHRUS_QUANTIZE(int4_nearest, int4, false)
ORTHRUS_QUANTIZE(e4m3_stochastic, fp8_e4m3, true)
ORTHRUS_QUANTIZE(e5m2_stochastic, fp8_e5m2, true)
ORTHRUS_QUANTIZE(int8_stochastic, int8, true)
ORTHRUS_QUANTIZE(int4_stochastic, int4, true)
#undef ORTHRUS_QUANTIZE

constexpr std::size_t row_of(CodeFormat format) { return static_cast<std::size_t>(format); }

template <CodeFormat format, class T>
[[gnu::always_inline]] inline void dequantize_loop(const std::uint8_t* __restrict codes,
                                                   float scale, T* __restrict to, Index n) {
  for (Index i = 0; i < n; ++i) {
    const float value = detail::value_of<format>(codes[i]);
    if constexpr (std::is_same_v<T, BFloat16>) {
      to[i] = to_bf16(value * scale);
    } else {
      to[i] = static_cast<T>(value) * static_cast<T>(scale);
    }
  }
}

ORTHRUS_CLONES void from_e4m3(const std::uint8_t* codes, float scale, float* to, Index n) {
  dequantize_loop<CodeFormat::fp8_e4m3>(codes, scale, to, n);
}
ORTHRUS_CLONES void from_e5m2(const std::uint8_t* codes, float scale, float* to, Index n) {
  dequantize_loop<CodeFormat::fp8_e5m2>(codes, scale, to, n);
}
ORTHRUS_CLONES void from_int(const std::uint8_t* codes, float scale, float* to, Index n) {
  dequantize_loop<CodeFormat::int8>(codes, scale, to, n);
}
ORTHRUS_CLONES void from_e4m3(const std::uint8_t* codes, float scale, BFloat16* to, Index n) {
  dequantize_loop<CodeFormat::fp8_e4m3>(codes, scale, to, n);
}
ORTHRUS_CLONES void from_e5m2(const std::uint8_t* codes, float scale, BFloat16* to, Index n) {
  dequantize_loop<CodeFormat::fp8_e5m2>(codes, scale, to, n);
}
ORTHRUS_CLONES void from_int(const std::uint8_t* codes, float scale, BFloat16* to, Index n) {
  dequantize_loop<CodeFormat::int8>(codes, scale, to, n);
}
ORTHRUS_CLONES void from_e4m3(const std::uint8_t* codes, float scale, double* to, Index n) {
  dequantize_loop<CodeFormat::fp8_e4m3>(codes, scale, to, n);
}
ORTHRUS_CLONES void from_e5m2(const std::uint8_t* codes, float scale, double* to, Index n) {
  dequantize_loop<CodeFormat::fp8_e5m2>(codes, scale, to, n);
}
ORTHRUS_CLONES void from_int(const std::uint8_t* codes, float scale, double* to, Index n) {
  dequantize_loop<CodeFormat::int8>(codes, scale, to, n);
}

template <class T>
void dequantize_any(CodeFormat format, const std::uint8_t* codes, float scale, T* to, Index n) {
  if (format == CodeFormat::fp8_e4m3) return from_e4m3(codes, scale, to, n);
  if (format == CodeFormat::fp8_e5m2) return from_e5m2(codes, scale, to, n);
  from_int(codes, scale, to, n);
}

template <class T>
[[gnu::always_inline]] inline Index count_loop(const T* w, double limit, Index n) {
  Index count = 0;
  for (Index i = 0; i < n; ++i) {
    double x = 0;
    if constexpr (std::is_same_v<T, BFloat16>) {
      x = static_cast<double>(to_float(w[i]));
    } else {
      x = static_cast<double>(w[i]);
    }
    count += std::abs(x) > limit ? 1 : 0;
  }
  return count;
}

template <bool eps_first>
[[gnu::always_inline]] inline void pull_back_loop(const AdamWConstants s, float factor,
                                                  const float* __restrict v,
                                                  const float* __restrict e, float* __restrict m,
                                                  Index n) {
  for (Index i = 0; i < n; ++i) {
    const float divisor =
        eps_first ? (std::sqrt(v[i]) + s.eps) / s.root_c2 : std::sqrt(v[i] / s.c2) + s.eps;
    m[i] = m[i] + (factor * divisor) * e[i];
  }
}
ORTHRUS_CLONES void pull_back_eps_last(const AdamWConstants& s, float factor, const float* v,
                                       const float* e, float* m, Index n) {
  pull_back_loop<false>(s, factor, v, e, m, n);
}
ORTHRUS_CLONES void pull_back_eps_first(const AdamWConstants& s, float factor, const float* v,
                                        const float* e, float* m, Index n) {
  pull_back_loop<true>(s, factor, v, e, m, n);
}

}  // namespace

ORTHRUS_CLONES void random_run(std::uint32_t* words, Index calls, std::uint64_t key,
                               std::uint64_t step, std::uint64_t first_call) {
  using detail::high;
  using detail::low;
  for (Index i = 0; i < calls; ++i) {
    const std::uint64_t call = first_call + static_cast<std::uint64_t>(i);
    const detail::PhiloxState s =
        detail::philox({low(step), high(step), low(call), high(call)}, low(key), high(key));
    words[4 * i] = s.c0;
    words[4 * i + 1] = s.c1;
    words[4 * i + 2] = s.c2;
    words[4 * i + 3] = s.c3;
  }
}

void quantize(CodeFormat format, bool stochastic, float* w, float scale, std::uint8_t* codes,
              const std::uint32_t* words, Index n) {
  static constexpr F32Loop* loops[][2] = {{e4m3_nearest, e4m3_stochastic},
                                          {e5m2_nearest, e5m2_stochastic},
                                          {int8_nearest, int8_stochastic},
                                          {int4_nearest, int4_stochastic}};
  loops[row_of(format)][stochastic ? 1 : 0](w, scale, codes, words, n);
}

void quantize(CodeFormat format, bool stochastic, double* w, float scale, std::uint8_t* codes,
              const std::uint32_t* words, Index n) {
  static constexpr F64Loop* loops[][2] = {{e4m3_nearest_f64, e4m3_stochastic_f64},
                                          {e5m2_nearest_f64, e5m2_stochastic_f64},
                                          {int8_nearest_f64, int8_stochastic_f64},
                                          {int4_nearest_f64, int4_stochastic_f64}};
  loops[row_of(format)][stochastic ? 1 : 0](w, scale, codes, words, n);
}

void dequantize(CodeFormat format, const std::uint8_t* codes, float scale, float* to, Index n) {
  dequantize_any(format, codes, scale, to, n);
}
void dequantize(CodeFormat format, const std::uint8_t* codes, float scale, BFloat16* to, Index n) {
  dequantize_any(format, codes, scale, to, n);
}
void dequantize(CodeFormat format, const std::uint8_t* codes, float scale, double* to, Index n) {
  dequantize_any(format, codes, scale, to, n);
}

ORTHRUS_CLONES void pack_nibbles(const std::uint8_t* __restrict codes, Index count,
                                 std::uint8_t* __restrict packed) {
  for (Index i = 0; i < count / 2; ++i) {
    packed[i] = detail::packed_nibbles(codes[2 * i], codes[2 * i + 1]);
  }
  if (count % 2 != 0) packed[count / 2] = detail::packed_nibbles(codes[count - 1], 0);
}

ORTHRUS_CLONES void unpack_nibbles(const std::uint8_t* __restrict packed, Index count,
                                   std::uint8_t* __restrict codes) {
  for (Index i = 0; i < count / 2; ++i) {
    codes[2 * i] = detail::even_nibble(packed[i]);
    codes[2 * i + 1] = detail::odd_nibble(packed[i]);
  }
  if (count % 2 != 0) codes[count - 1] = detail::even_nibble(packed[count / 2]);
}

ORTHRUS_CLONES Index count_larger(const float* w, double limit, Index n) {
  return count_loop(w, limit, n);
}
ORTHRUS_CLONES Index count_larger(const double* w, double limit, Index n) {
  return count_loop(w, limit, n);
}
ORTHRUS_CLONES Index count_larger(const BFloat16* w, double limit, Index n) {
  return count_loop(w, limit, n);
}

void adamw_pull_back(const AdamWConstants& s, float factor, const float* v, const float* e,
                     float* m, Index n) {
  (s.eps_before_correction ? pull_back_eps_first : pull_back_eps_last)(s, factor, v, e, m, n);
}

ORTHRUS_CLONES void split(const float* __restrict w, BFloat16* __restrict high,
                          BFloat16* __restrict low, Index n) {
  for (Index i = 0; i < n; ++i) {
    const detail::Halves halves = detail::split(detail::bits_of(w[i]));
    high[i] = {halves.high};
    low[i] = {halves.low};
  }
}

ORTHRUS_CLONES void merge(const BFloat16* __restrict high, const BFloat16* __restrict low,
                          float* __restrict w, Index n) {
  for (Index i = 0; i < n; ++i) {
    w[i] = detail::float_of(detail::merge({high[i].bits, low[i].bits}));
  }
}

}  // namespace orthrus::kernels::cpu
