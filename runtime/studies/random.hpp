#pragma once
/// @file
/// Draws for experiments and resampling: the same on every machine and with every standard library.

#include <cmath>
#include <cstdint>
#include <numbers>

#include "kernels/rng.hpp"

namespace orthrus::studies {

/// A sequence of draws keyed by (seed, stream), from Philox words.
class Random {
 public:
  explicit Random(std::uint64_t seed, std::uint64_t stream = 0) : seed_(seed), stream_(stream) {}

  /// In (0, 1), of 52 bits.
  double uniform() {
    if (next_ == 2) refill();
    return uniforms_[next_++];
  }
  /// Standard normal (Box and Muller).
  double normal() {
    if (spare_) {
      spare_ = false;
      return kept_;
    }
    const double r = std::sqrt(-2 * std::log(uniform()));
    const double angle = 2 * std::numbers::pi * uniform();
    kept_ = r * std::sin(angle);
    spare_ = true;
    return r * std::cos(angle);
  }
  /// In [0, n).
  std::size_t below(std::size_t n) {
    return static_cast<std::size_t>(uniform() * static_cast<double>(n));
  }

 private:
  void refill() {
    const auto w = kernels::random_words(seed_, stream_, 0, index_++);
    for (int k = 0; k < 2; ++k) {
      const std::uint64_t bits = (std::uint64_t{w[2 * k + 1]} << 32 | w[2 * k]) >> 12;
      uniforms_[k] = (static_cast<double>(bits) + 0.5) * 0x1p-52;
    }
    next_ = 0;
  }
  std::uint64_t seed_, stream_, index_ = 0;
  double uniforms_[2] = {}, kept_ = 0;
  int next_ = 2;
  bool spare_ = false;
};

}  // namespace orthrus::studies
