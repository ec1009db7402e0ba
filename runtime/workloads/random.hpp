#pragma once
/// @file
/// Random numbers by counter: draw `i` of a key is the same whoever asks, whenever, on any rank.

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <numbers>
#include <numeric>
#include <utility>
#include <vector>

namespace orthrus::workloads {

/// What a stream of draws is for; the second word of every key.
enum class Purpose : std::uint64_t { weights = 1, units, noise, measurements, target, held_out };

/// One stream: the sequence of splitmix64 (Steele, Lea, Flood 2014) that starts at the hash of the
/// key.
class Draws {
 public:
  Draws(std::uint64_t seed, Purpose purpose, std::initializer_list<std::int64_t> more = {})
      : key_(scramble(scramble(seed) ^ static_cast<std::uint64_t>(purpose))) {
    for (const std::int64_t word : more) key_ = scramble(key_ ^ static_cast<std::uint64_t>(word));
  }

  [[nodiscard]] std::uint64_t bits(std::int64_t i) const {
    return scramble(key_ + golden * static_cast<std::uint64_t>(i));
  }
  /// In (0, 1].
  [[nodiscard]] double uniform(std::int64_t i) const {
    return (static_cast<double>(bits(i) >> 11) + 1.0) * 0x1p-53;
  }
  /// Standard normal (Box and Muller), from draws 2i and 2i + 1.
  [[nodiscard]] double normal(std::int64_t i) const {
    return std::sqrt(-2.0 * std::log(uniform(2 * i))) *
           std::cos(2.0 * std::numbers::pi * uniform(2 * i + 1));
  }
  /// In [0, n); the bias is below n·2⁻⁶⁴.
  [[nodiscard]] std::int64_t below(std::int64_t i, std::int64_t n) const {
    return static_cast<std::int64_t>(bits(i) % static_cast<std::uint64_t>(n));
  }

 private:
  static constexpr std::uint64_t golden = 0x9e3779b97f4a7c15;
  static constexpr std::uint64_t scramble(std::uint64_t x) {
    x += golden;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }
  std::uint64_t key_;
};

/// Examples without replacement: epoch by epoch each of them once, in an order of its own.
class Epochs {
 public:
  Epochs() = default;
  Epochs(std::uint64_t seed, std::int64_t examples) : seed_(seed), examples_(examples) {}
  [[nodiscard]] std::int64_t size() const { return examples_; }
  /// Which example unit `unit` of the stream is. @par Cost  the first of an epoch shuffles it; 8
  /// bytes an example.
  std::int64_t operator()(std::int64_t unit) {
    const std::int64_t epoch = unit / examples_;
    if (epoch != epoch_) shuffle(epoch);
    return order_[static_cast<std::size_t>(unit % examples_)];
  }

 private:
  void shuffle(std::int64_t epoch) {
    const Draws draws(seed_, Purpose::units, {epoch});
    order_.resize(static_cast<std::size_t>(examples_));
    std::iota(order_.begin(), order_.end(), std::int64_t{0});
    for (std::int64_t i = examples_ - 1; i > 0; --i)
      std::swap(order_[static_cast<std::size_t>(i)],
                order_[static_cast<std::size_t>(draws.below(i, i + 1))]);
    epoch_ = epoch;
  }

  std::uint64_t seed_ = 0;
  std::int64_t examples_ = 0, epoch_ = -1;
  std::vector<std::int64_t> order_;
};

}  // namespace orthrus::workloads
