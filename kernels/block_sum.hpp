#pragma once
/// @file
/// BlockSum: the tree over blocks that `Backend::sum_block` promises, without storing the blocks.

#include <array>
#include <cstdint>

namespace orthrus::kernels {

/// Adds block sums, given in order, by the binary tree that splits [a, b) at a + the largest power
/// of two below b − a. Equal neighbours merge as the bits of a counter carry; the leftovers fold
/// from the right. 64 slots are enough for any count, so nothing is allocated.
class BlockSum {
 public:
  void add(double block) noexcept {
    for (std::uint64_t carry = count_; (carry & 1U) != 0; carry >>= 1)
      block = slots_[--top_] + block;
    slots_[top_++] = block;
    ++count_;
  }

  [[nodiscard]] double total() const noexcept {
    if (top_ == 0) return 0;
    double sum = slots_[top_ - 1];
    for (int i = top_ - 2; i >= 0; --i) sum = slots_[i] + sum;
    return sum;
  }

 private:
  std::array<double, 64> slots_;  // only [0, top_) is ever read
  std::uint64_t count_ = 0;
  int top_ = 0;
};

}  // namespace orthrus::kernels
