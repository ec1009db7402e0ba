#pragma once
/// @file
/// Work: scratch that shows who writes beyond it. Bits: are two matrices the same?

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "support/zoo.hpp"

namespace orthrus::zoo {

/// Bytes 0x5a that start at a cache line.
class Work {
 public:
  explicit Work(std::size_t bytes) : data_(bytes + 128, std::byte{0x5a}), bytes_(bytes) {}
  std::span<std::byte> span() {
    void* start = data_.data();
    std::size_t space = data_.size();
    std::align(64, bytes_, start, space);
    return {static_cast<std::byte*>(start), bytes_};
  }
  /// Is every byte behind the span as it was?
  bool end_untouched() {
    const std::byte* end = span().data() + bytes_;
    return std::all_of(end, static_cast<const std::byte*>(data_.data() + data_.size()),
                       [](std::byte b) { return b == std::byte{0x5a}; });
  }

 private:
  std::vector<std::byte> data_;
  std::size_t bytes_;
};

template <class T>
bool same_bits(const Dense<T>& a, const Dense<T>& b) {
  return std::memcmp(a.data.data(), b.data.data(), a.data.size() * sizeof(T)) == 0;
}

}  // namespace orthrus::zoo
