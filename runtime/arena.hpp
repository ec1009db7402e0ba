#pragma once
/// @file
/// Arena: one aligned allocation at start, cut into the buffers the plan promised.

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>

namespace orthrus::runtime {

/// Fills what nobody may read any more: every f32 and bf16 in it is NaN.
inline void poison(std::span<std::byte> free) {
  std::fill(free.begin(), free.end(), std::byte{0xff});
}

class Arena {
 public:
  static constexpr std::size_t alignment = 256;
  static constexpr std::size_t rounded(std::size_t bytes) {
    return (bytes + alignment - 1) / alignment * alignment;
  }

  Arena() = default;
  /// Zero-filled. @throws std::bad_alloc
  explicit Arena(std::size_t bytes)
      : data_(static_cast<std::byte*>(std::aligned_alloc(alignment, rounded(bytes + 1)))),
        size_(rounded(bytes + 1)) {
    if (data_ == nullptr) throw std::bad_alloc();
    std::fill_n(data_.get(), size_, std::byte{});
  }

  /// The next `bytes` bytes, aligned. Taking more than was asked for is a defect of the caller.
  std::span<std::byte> take(std::size_t bytes) {
    if (used_ + bytes > size_) throw std::bad_alloc();
    const std::span<std::byte> piece{data_.get() + used_, bytes};
    used_ = rounded(used_ + bytes);
    return piece;
  }

  /// Leaves the memory to the process: a call that was given up may still write to it.
  void abandon() noexcept { static_cast<void>(data_.release()); }

 private:
  struct Free {
    void operator()(std::byte* p) const noexcept { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_ = 0, used_ = 0;
};

}  // namespace orthrus::runtime
