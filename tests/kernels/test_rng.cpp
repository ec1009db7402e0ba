#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <unordered_set>

#include "kernels/rng.hpp"

namespace orthrus::kernels {
namespace {

using Words = std::array<std::uint32_t, 4>;

// The known answers that Random123 ships for philox4x32 with ten rounds (kat_vectors).
TEST(Philox, GivesTheKnownAnswers) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
            (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// The layout is a file format: bits drawn by another version or device must be the same.
TEST(RandomWords, AreThePhiloxBlockOfStepAndIndex) {
  const std::uint64_t key = mix_seed(5, 6);
  EXPECT_EQ(random_words(5, 6, 0x0000000700000008, 0x000000090000000a),
            philox4x32({8, 7, 10, 9},
                       {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)}));
}

TEST(RandomWords, DependOnEveryArgument) {
  const Words base = random_words(1, 2, 3, 4);
  EXPECT_NE(base, random_words(2, 2, 3, 4));
  EXPECT_NE(base, random_words(1, 3, 3, 4));
  EXPECT_NE(base, random_words(1, 2, 4, 4));
  EXPECT_NE(base, random_words(1, 2, 3, 5));
  EXPECT_NE(base, random_words(std::uint64_t{1} << 40 | 1, 2, 3, 4));
  EXPECT_NE(base, random_words(1, 2, std::uint64_t{1} << 40 | 3, 4));
  EXPECT_NE(base, random_words(1, 2, 3, std::uint64_t{1} << 40 | 4));
}

// The key is a bijection of the stream, so this holds for all streams; here the first 50000.
TEST(MixSeed, NeverGivesTwoStreamsOfASeedOneKey) {
  for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{1234}, ~std::uint64_t{0}}) {
    std::unordered_set<std::uint64_t> keys;
    for (std::uint64_t stream = 0; stream < 50000; ++stream) keys.insert(mix_seed(seed, stream));
    EXPECT_EQ(keys.size(), 50000U);
  }
}

// Neighbouring seeds and streams are what users choose: about half of the key's bits must differ.
TEST(MixSeed, SpreadsNeighbours) {
  double flips = 0;
  constexpr int pairs = 2000;
  for (std::uint64_t i = 0; i < pairs; ++i) {
    flips += std::popcount(mix_seed(i, 0) ^ mix_seed(i + 1, 0));
    flips += std::popcount(mix_seed(7, i) ^ mix_seed(7, i + 1));
  }
  // 128000·2 fair bits: mean 32 per pair, deviation of the mean 4/sqrt(4000) = 0.063; five of them.
  EXPECT_NEAR(flips / (2 * pairs), 32, 0.32);
}

// Means of uniform words over consecutive elements, in units of their standard deviation.
TEST(RandomWords, AreUniform) {
  constexpr int n = 1 << 16;
  std::array<double, 4> mean{};
  double correlation = 0;
  double previous = 0;
  for (int i = 0; i < n; ++i) {
    const Words w = random_words(1, 2, 3, static_cast<std::uint64_t>(i));
    for (std::size_t k = 0; k < 4; ++k) mean[k] += (w[k] * 0x1p-32 - 0.5) * std::sqrt(12.0);
    const double first = (w[0] * 0x1p-32 - 0.5) * std::sqrt(12.0);
    correlation += first * previous;
    previous = first;
  }
  // Each sum of n standardized words has deviation sqrt(n); five of them pass a fair generator.
  for (const double m : mean) EXPECT_LE(std::abs(m), 5 * std::sqrt(n));
  EXPECT_LE(std::abs(correlation), 5 * std::sqrt(n));
}

}  // namespace
}  // namespace orthrus::kernels
