#pragma once
/// @file
/// Rounding to a code and back, as the loops of the CPU and of CUDA do it: without a branch, so
/// that they vectorize. C++17, for CUDA. The reference says the same in plain words.

#include <cstdint>
#include <orthrus/quantized.hpp>

namespace orthrus::kernels::detail {

constexpr bool is_float(CodeFormat f) noexcept {
  return f == CodeFormat::fp8_e4m3 || f == CodeFormat::fp8_e5m2;
}
/// Bits of the mantissa, without the leading one, and the bias of the exponent.
constexpr int mantissa_bits(CodeFormat f) noexcept { return f == CodeFormat::fp8_e4m3 ? 3 : 2; }
constexpr int exponent_bias(CodeFormat f) noexcept { return f == CodeFormat::fp8_e4m3 ? 7 : 15; }

[[gnu::always_inline]] constexpr std::uint32_t bits_of(float x) noexcept {
  return __builtin_bit_cast(std::uint32_t, x);
}
[[gnu::always_inline]] constexpr float float_of(std::uint32_t bits) noexcept {
  return __builtin_bit_cast(float, bits);
}

/// A code (int4: not packed, sign extended) and the number it stands for.
struct Code {
  std::uint8_t bits;
  float value;
};

/// z to the grid of codes: to nearest with ties to even or, when `stochastic`, up in magnitude iff
/// u = ⌊word/2⁸⌋·2⁻²⁴ lies below the distance from the code below in steps. Beyond the largest
/// code: that one. Zero, of either sign, and NaN: code 0.
template <CodeFormat format, bool stochastic>
[[gnu::always_inline]] constexpr Code round_to_code(float z, std::uint32_t word) noexcept {
  constexpr int one = 127 << 23;  // the exponent of 1 in f32
  constexpr int inf = 255 << 23;
  constexpr auto largest = static_cast<float>(largest_code(format));
  constexpr auto largest_bits = static_cast<std::int32_t>(bits_of(largest));
  // Numbers without a sign order like integers.
  const std::uint32_t sign = bits_of(z) & 0x80000000U;
  const auto magnitude = static_cast<std::int32_t>(bits_of(z) & 0x7fffffffU);
  const std::int32_t clamped = magnitude < largest_bits ? magnitude : largest_bits;
  const float a = float_of(static_cast<std::uint32_t>(clamped));

  // The step of the grid around a is a power of two, so t is exact.
  std::int32_t step = one;
  float t = a;
  std::int32_t exponent = 0;
  if constexpr (is_float(format)) {
    constexpr int mantissa = mantissa_bits(format) << 23;
    constexpr int lowest = one + (1 - exponent_bias(format)) * (1 << 23);
    const std::int32_t own = clamped & inf;
    exponent = own > lowest ? own : lowest;
    step = exponent - mantissa;
    t = a * float_of(static_cast<std::uint32_t>(2 * one - step));
  }
  std::int32_t n = 0;
  if constexpr (stochastic) {
    const auto below = static_cast<std::int32_t>(t);
    const float u = static_cast<float>(static_cast<std::int32_t>(word >> 8)) * 0x1p-24F;
    n = below + (u < t - static_cast<float>(below) ? 1 : 0);
  } else {
    n = static_cast<std::int32_t>((t + 0x1p23F) - 0x1p23F);  // t < 2^23
  }
  // Masks, where GCC would make branches of selects: all ones for a number, and for n not 0.
  n &= -static_cast<std::int32_t>(magnitude <= inf);
  const std::int32_t kept = -static_cast<std::int32_t>(n != 0);
  const std::uint32_t kept_sign = sign & static_cast<std::uint32_t>(kept);
  const float value = static_cast<float>(n) * float_of(static_cast<std::uint32_t>(step));
  std::int32_t code = 0;
  if constexpr (is_float(format)) {
    // n holds the leading one, so it carries into the exponent: 2·2^m is the next one's first.
    constexpr int m = mantissa_bits(format);
    constexpr int lowest_code = (127 - exponent_bias(format) + 1) << m;
    code = ((exponent >> (23 - m)) - lowest_code + n) & kept;
    code |= static_cast<std::int32_t>(kept_sign >> 24);
  } else {
    code = kept_sign != 0 ? -n : n;
  }
  return {static_cast<std::uint8_t>(code), float_of(bits_of(value) | kept_sign)};
}

/// What a code stands for; fp8's NaN and Inf, which `round_to_code` never makes, too. int4: sign
/// extended.
template <CodeFormat format>
[[gnu::always_inline]] constexpr float value_of(std::uint8_t code) noexcept {
  if constexpr (is_float(format)) {
    constexpr int m = mantissa_bits(format);
    constexpr std::uint32_t first_normal = 1U << m;
    constexpr std::uint32_t to_f32 = static_cast<std::uint32_t>(127 - exponent_bias(format)) << 23;
    constexpr float least =
        float_of(static_cast<std::uint32_t>(127 + 1 - exponent_bias(format) - m) << 23);
    // From here on not finite: e4m3 keeps all of the last exponent but its last code.
    constexpr std::uint32_t first_special = format == CodeFormat::fp8_e4m3 ? 0x7fU : 0x7cU;
    const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x80U) << 24;
    const std::uint32_t magnitude = code & 0x7fU;
    const std::uint32_t normal = (magnitude << (23 - m)) + to_f32;
    const std::uint32_t subnormal =
        bits_of(static_cast<float>(static_cast<std::int32_t>(magnitude)) * least);
    const std::uint32_t special =
        format == CodeFormat::fp8_e4m3 ? 0x7fc00000U : (0x7f800000U | ((magnitude & 3U) << 21));
    const std::uint32_t finite = magnitude < first_normal ? subnormal : normal;
    return float_of((magnitude < first_special ? finite : special) | sign);
  } else {
    return static_cast<float>(static_cast<std::int8_t>(code));
  }
}

/// Two codes of int4 in a byte, and back.
constexpr std::uint8_t packed_nibbles(std::uint8_t even, std::uint8_t odd) noexcept {
  return static_cast<std::uint8_t>((even & 0xfU) | (odd << 4));
}
constexpr std::uint8_t even_nibble(std::uint8_t byte) noexcept {
  return static_cast<std::uint8_t>(((byte & 0xfU) ^ 8U) - 8U);
}
constexpr std::uint8_t odd_nibble(std::uint8_t byte) noexcept {
  return static_cast<std::uint8_t>(((static_cast<std::uint32_t>(byte) >> 4) ^ 8U) - 8U);
}

/// s = max(largest/largest_code, 1e-12), or the smallest power of two from there on. NaN stays.
constexpr float scale_from_maximum(CodeFormat format, bool power_of_two, float maximum) noexcept {
  const float s = maximum / static_cast<float>(largest_code(format));
  const float floored = s < 1e-12F ? 1e-12F : s;
  if (!power_of_two) return floored;
  const std::uint32_t up = (bits_of(floored) + 0x7fffffU) & 0x7f800000U;
  return floored < float_of(0x7f800000U) ? float_of(up) : floored;
}

/// `Backend::count_beyond` counts what is larger. Exact but for one rounding.
constexpr double beyond(CodeFormat format, float scale) noexcept {
  return (1 + 0x1p-22) * (largest_code(format) * static_cast<double>(scale));
}

/// high and low of `Backend::split_f32`.
struct Halves {
  std::uint16_t high, low;
};
[[gnu::always_inline]] constexpr Halves split(std::uint32_t bits) noexcept {
  const bool is_nan = (bits & 0x7fffffffU) > 0x7f800000U;
  const std::uint32_t nearest = (bits + 0x8000U) >> 16;
  const std::uint32_t high = is_nan ? (bits >> 16) | 0x40U : nearest;
  return {static_cast<std::uint16_t>(high), static_cast<std::uint16_t>(is_nan ? 0U : bits)};
}
[[gnu::always_inline]] constexpr std::uint32_t merge(Halves h) noexcept {
  const std::uint32_t extended = (static_cast<std::uint32_t>(h.low) ^ 0x8000U) - 0x8000U;
  return (static_cast<std::uint32_t>(h.high) << 16) + extended;
}

}  // namespace orthrus::kernels::detail
