#include "kernels/rng.hpp"

#include "kernels/philox.hpp"

namespace orthrus::kernels {
namespace {

/// The finalizer of SplitMix64: a bijection. Source: Steele, Lea, Flood, OOPSLA'14 (Stafford's mix
/// 13).
constexpr std::uint64_t mix(std::uint64_t z) noexcept {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return z ^ (z >> 31);
}

}  // namespace

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key) noexcept {
  const detail::PhiloxState s =
      detail::philox({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
  return {s.c0, s.c1, s.c2, s.c3};
}

std::uint64_t mix_seed(std::uint64_t seed, std::uint64_t stream_id) noexcept {
  // For one seed this is a bijection of stream_id: two streams never share a key.
  return mix(mix(seed + 0x9E3779B97F4A7C15U) ^ stream_id);
}

std::array<std::uint32_t, 4> random_words(std::uint64_t seed, std::uint64_t stream_id,
                                          std::uint64_t step, std::uint64_t index) noexcept {
  using detail::high;
  using detail::low;
  const std::uint64_t key = mix_seed(seed, stream_id);
  return philox4x32({low(step), high(step), low(index), high(index)}, {low(key), high(key)});
}

}  // namespace orthrus::kernels
