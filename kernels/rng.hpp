#pragma once
/// @file
/// Counter-based random bits: the same on 1 rank and on 64, in any order.

#include <array>
#include <cstdint>

namespace orthrus::kernels {

/// Philox4x32-10: 128 random bits from a 64-bit key and a 128-bit counter.
/// Source: J. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC'11.
std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key) noexcept;

/// Random 64-bit seed for a purpose: mixes (seed, stream_id) so that different streams do not
/// overlap.
std::uint64_t mix_seed(std::uint64_t seed, std::uint64_t stream_id) noexcept;

/// Four 32-bit words keyed by `mix_seed(seed, stream_id)` at counter (step, index), low words
/// first. The layout is for ever: another version or device draws the same bits.
std::array<std::uint32_t, 4> random_words(std::uint64_t seed, std::uint64_t stream_id,
                                          std::uint64_t step, std::uint64_t index) noexcept;

}  // namespace orthrus::kernels
