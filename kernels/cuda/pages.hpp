#pragma once
/// @file
/// Pages: addresses of a CUDA device behind which memory is put, and taken away again.

#include <cstddef>
#include <map>
#include <vector>

#include "kernels/devices.hpp"

namespace orthrus::kernels::cuda {

/// By the driver's virtual memory. Memory taken away is kept for the next pages that want some:
/// what is held is the most that was ever wanted at a time. The device is the current one.
class Pages {
 public:
  /// Of every page; what CUDA's devices allow is no coarser.
  static constexpr std::size_t bytes = cuda_page_bytes;

  Pages() = default;
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  [[nodiscard]] void* reserve(int device, std::size_t range_bytes);
  void unreserve(void* range, std::size_t range_bytes) noexcept;
  /// Whole pages, that have none. What is in them is not defined.
  void back(void* range, std::size_t range_bytes);
  /// Whole pages; those without memory are passed over. Nothing queued uses them.
  void drop(void* range, std::size_t range_bytes) noexcept;

 private:
  using Memory = unsigned long long;  // CUmemGenericAllocationHandle
  int device_ = 0;
  std::map<std::byte*, Memory> backed_;
  std::vector<Memory> idle_;
};

}  // namespace orthrus::kernels::cuda
