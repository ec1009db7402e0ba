#pragma once
/// @file
/// Memory of a device: DeviceBuffer owns some, OnHost shows some to the host.

#include <cstddef>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

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

  /// Leaves the memory to the process.
  void abandon() noexcept { data_ = nullptr; }

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

/// `count` numbers of a device where the host can follow them: where they are if it may
/// (`Backend::on_host`), else in a copy, which waits for all that is queued. For what is small, or
/// rare. Copies use memory that earlier ones have left: the same sizes allocate once.
template <class T>
class OnHost {
 public:
  /// @param fetch  false: what is there now is not wanted.
  OnHost(Backend& backend, T* numbers, std::size_t count, bool fetch = true)
      : backend_(backend), device_(numbers), count_(count) {
    if (backend.on_host()) return;
    if (!backend.idle_.empty()) {
      copy_ = std::move(backend.idle_.back());
      backend.idle_.pop_back();
    }
    copy_.resize(count * sizeof(T));
    if (!fetch || count == 0) return;
    backend.copy(device_, copy_.data(), copy_.size());
    backend.wait();
  }
  ~OnHost() {
    if (!backend_.on_host()) backend_.idle_.push_back(std::move(copy_));
  }
  OnHost(const OnHost&) = delete;
  OnHost& operator=(const OnHost&) = delete;

  [[nodiscard]] T* data() {
    return backend_.on_host() ? device_ : reinterpret_cast<T*>(copy_.data());
  }
  [[nodiscard]] std::span<T> span() { return {data(), count_}; }
  /// The numbers as they are now become the device's.
  void put_back() requires(!std::is_const_v<T>) {
    if (backend_.on_host() || count_ == 0) return;
    backend_.copy(copy_.data(), device_, copy_.size());
    backend_.wait();
  }

 private:
  Backend& backend_;
  T* device_;
  std::size_t count_;
  std::vector<std::byte> copy_;
};

}  // namespace orthrus::kernels
