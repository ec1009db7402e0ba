#pragma once
/// @file
/// bfloat16 to and from the types arithmetic happens in. CUDA sources read this as C++17, which has
/// no std::bit_cast.

#include <cstdint>
#include <orthrus/dtype.hpp>

namespace orthrus::kernels {

/// Exact.
constexpr float to_float(BFloat16 x) noexcept {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(x.bits) << 16);
}

/// Round to nearest, ties to even. Above the largest bf16 by half a step or more: Inf. NaN stays
/// NaN, quiet, with its sign and the upper payload bits.
constexpr BFloat16 to_bf16(float x) noexcept {
  const auto u = __builtin_bit_cast(std::uint32_t, x);
  const std::uint32_t nearest = (u + 0x7fffU + ((u >> 16) & 1U)) >> 16;
  const std::uint32_t quiet = (u >> 16) | 0x40U;
  const bool is_nan = (u & 0x7fffffffU) > 0x7f800000U;
  return {static_cast<std::uint16_t>(is_nan ? quiet : nearest)};
}

/// One rounding from f64, not two: f64 goes to f32 by truncation with a sticky last bit (rounding
/// to odd), from where the nearest bf16 is the same.
constexpr BFloat16 to_bf16(double x) noexcept {
  const auto f = static_cast<float>(x);
  const auto back = static_cast<double>(f);
  const std::uint64_t magnitude = __builtin_bit_cast(std::uint64_t, x) & 0x7fffffffffffffffU;
  const std::uint64_t back_magnitude =
      __builtin_bit_cast(std::uint64_t, back) & 0x7fffffffffffffffU;
  const std::uint32_t truncated =
      __builtin_bit_cast(std::uint32_t, f) - (back_magnitude > magnitude ? 1U : 0U);
  const std::uint32_t odd = truncated | (back_magnitude != magnitude ? 1U : 0U);
  const bool is_nan = magnitude > 0x7ff0000000000000U;
  return to_bf16(is_nan ? f : __builtin_bit_cast(float, odd));
}

/// Stochastic rounding with 16 random bits: up with probability (distance from below) / (step).
/// Where the next step up is Inf, it can become Inf, as by rounding to nearest. Inf and NaN stay.
constexpr BFloat16 to_bf16_stochastic(float x, std::uint32_t random) noexcept {
  const auto u = __builtin_bit_cast(std::uint32_t, x);
  const std::uint32_t rounded = (u + (random & 0xffffU)) >> 16;
  const bool is_finite = (u & 0x7fffffffU) < 0x7f800000U;
  return is_finite ? BFloat16{static_cast<std::uint16_t>(rounded)} : to_bf16(x);
}

}  // namespace orthrus::kernels
