#pragma once
/// @file
/// Philox4x32-10 inline, so that a loop over counters can be vectorized.

#include <cstdint>

namespace orthrus::kernels::detail {

struct PhiloxState {
  std::uint32_t c0, c1, c2, c3;
};

[[gnu::always_inline]] constexpr PhiloxState philox_round(PhiloxState c, std::uint32_t k0,
                                                          std::uint32_t k1,
                                                          std::uint32_t round) noexcept {
  const std::uint64_t p0 = std::uint64_t{0xD2511F53U} * c.c0;
  const std::uint64_t p1 = std::uint64_t{0xCD9E8D57U} * c.c2;
  return {static_cast<std::uint32_t>(p1 >> 32) ^ c.c1 ^ (k0 + round * 0x9E3779B9U),
          static_cast<std::uint32_t>(p1),
          static_cast<std::uint32_t>(p0 >> 32) ^ c.c3 ^ (k1 + round * 0xBB67AE85U),
          static_cast<std::uint32_t>(p0)};
}

/// The ten rounds are written out: GCC vectorizes the loop around them only when it holds no other
/// loop.
[[gnu::always_inline]] constexpr PhiloxState philox(PhiloxState c, std::uint32_t k0,
                                                    std::uint32_t k1) noexcept {
  c = philox_round(c, k0, k1, 0);
  c = philox_round(c, k0, k1, 1);
  c = philox_round(c, k0, k1, 2);
  c = philox_round(c, k0, k1, 3);
  c = philox_round(c, k0, k1, 4);
  c = philox_round(c, k0, k1, 5);
  c = philox_round(c, k0, k1, 6);
  c = philox_round(c, k0, k1, 7);
  c = philox_round(c, k0, k1, 8);
  return philox_round(c, k0, k1, 9);
}

constexpr std::uint32_t low(std::uint64_t x) noexcept { return static_cast<std::uint32_t>(x); }
constexpr std::uint32_t high(std::uint64_t x) noexcept {
  return static_cast<std::uint32_t>(x >> 32);
}

}  // namespace orthrus::kernels::detail
