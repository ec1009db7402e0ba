#pragma once
/// @file
/// UniqueHandle: one owner for what a C library hands out.

#include <utility>

namespace orthrus {

/// Owns one C handle. `Traits` says how: `using Handle = …`, `static Handle null()`, and
/// `static void release(Handle) noexcept`, which is never called with `null()`. A library that can
/// be shut down before its handles (MPI) looks for that itself in `release`.
template <class Traits>
class UniqueHandle {
 public:
  using Handle = typename Traits::Handle;

  UniqueHandle() noexcept = default;
  explicit UniqueHandle(Handle handle) noexcept : handle_(handle) {}
  UniqueHandle(UniqueHandle&& other) noexcept
      : handle_(std::exchange(other.handle_, Traits::null())) {}
  /// Assigns by swap: the old handle goes with the argument, also in `h = std::move(h)`.
  UniqueHandle& operator=(UniqueHandle other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~UniqueHandle() {
    if (*this) Traits::release(handle_);
  }

  [[nodiscard]] Handle get() const noexcept { return handle_; }
  explicit operator bool() const noexcept { return handle_ != Traits::null(); }

  /// Where a C call may write a new handle; the old one is released first.
  [[nodiscard]] Handle* out() noexcept {
    *this = UniqueHandle();
    return &handle_;
  }
  /// Gives the handle up to the caller.
  [[nodiscard]] Handle release() noexcept { return std::exchange(handle_, Traits::null()); }

 private:
  Handle handle_ = Traits::null();
};

}  // namespace orthrus
