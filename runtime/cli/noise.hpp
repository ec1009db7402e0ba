#pragma once
/// @file
/// Noise: numbers to multiply when only the time matters.

#include <cstdint>
#include <orthrus/dtype.hpp>
#include <vector>

namespace orthrus::cli {

/// Uniform in [−1, 1), the same every time.
inline std::vector<float> noise(Index n) {
  std::vector<float> v(static_cast<std::size_t>(n));
  std::uint32_t s = 1;
  for (float& x : v) {
    s = s * 1664525U + 1013904223U;
    x = static_cast<float>(static_cast<std::int32_t>(s)) * 0x1p-31F;
  }
  return v;
}

}  // namespace orthrus::cli
