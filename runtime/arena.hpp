#pragma once
/// @file
/// Arena: one aligned allocation at start, cut into the buffers the plan promised.

#include <cstddef>
#include <limits>
#include <new>
#include <span>
#include <utility>

#include "kernels/device_memory.hpp"

namespace orthrus::runtime {

/// Fills what nobody may read any more: every f32 and bf16 in it is NaN, and every f64 1e307.
inline void poison(std::span<std::byte> free, kernels::Backend& backend) {
  const auto n = static_cast<Index>(free.size() / bytes_of(DType::bf16));
  backend.fill(std::numeric_limits<double>::quiet_NaN(), {free.data(), 1, n, n, DType::bf16});
}

class Arena {
 public:
  static constexpr std::size_t alignment = 256;
  static constexpr std::size_t rounded(std::size_t bytes) {
    return (bytes + alignment - 1) / alignment * alignment;
  }

  Arena() = default;
  /// Zero-filled memory of the device of `backend`, which outlives it.
  /// @throws DeviceError  there is not that much.
  Arena(kernels::Backend& backend, std::size_t bytes) : buffer_(backend, rounded(bytes + 1)) {
    const auto n = static_cast<Index>(buffer_.bytes() / sizeof(float));
    backend.fill(0, matrix_view(static_cast<float*>(buffer_.data()), 1, n));
  }

  /// The next `bytes` bytes, aligned. Taking more than was asked for is a defect of the caller.
  std::span<std::byte> take(std::size_t bytes) {
    if (used_ + bytes > buffer_.bytes()) throw std::bad_alloc();
    const std::span<std::byte> piece = buffer_.span().subspan(used_, bytes);
    used_ = rounded(used_ + bytes);
    return piece;
  }

  /// Leaves the memory to the process: a call that was given up may still write to it.
  void abandon() noexcept { buffer_.abandon(); }

 private:
  kernels::DeviceBuffer buffer_;
  std::size_t used_ = 0;
};

}  // namespace orthrus::runtime
