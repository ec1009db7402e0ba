#pragma once
/// @file
/// DeviceBuffer: memory of a device with one owner.

#include <cstddef>
#include <span>
#include <utility>

#include "kernels/backend.hpp"

namespace orthrus::kernels {

/// Memory from `Backend::allocate`, which outlives it. Move-only; assigns by swap.
class DeviceBuffer {
 public:
  DeviceBuffer() noexcept = default;
  DeviceBuffer(Backend& backend, std::size_t bytes)
      : backend_(&backend), data_(backend.allocate(bytes)), bytes_(bytes) {}
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : backend_(std::exchange(other.backend_, nullptr)),
        data_(std::exchange(other.data_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) backend_->deallocate(data_);
  }

  [[nodiscard]] void* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }
  /// The device's addresses; on a device that is not `on_host()`, not to be followed.
  [[nodiscard]] std::span<std::byte> span() const noexcept {
    return {static_cast<std::byte*>(data_), bytes_};
  }

 private:
  Backend* backend_ = nullptr;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace orthrus::kernels
