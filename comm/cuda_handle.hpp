#pragma once
/// @file
/// Streams, events and the current device, for comm's sources that know CUDA. cuda_runtime.h stays
/// out of headers: handles are opaque here.

#include <cstddef>

#include "kernels/handle.hpp"

namespace orthrus::comm {

/// Makes `device` the current one while it lives. @throws DeviceError
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

struct CudaStreamTraits {
  using Handle = void*;
  static Handle null() noexcept { return nullptr; }
  static void release(Handle h) noexcept;
};
struct CudaEventTraits {
  using Handle = void*;
  static Handle null() noexcept { return nullptr; }
  static void release(Handle h) noexcept;
};
using CudaStream = UniqueHandle<CudaStreamTraits>;  ///< a cudaStream_t
using CudaEvent = UniqueHandle<CudaEventTraits>;    ///< a cudaEvent_t

/// On the current device; does not wait for its default stream, and goes before other work.
[[nodiscard]] CudaStream make_stream();
[[nodiscard]] CudaEvent make_event();
void record(const CudaEvent& event, void* stream);
void wait_for(void* stream, const CudaEvent& event);  ///< the stream waits, not the host
/// @return what was recorded last is complete. @throws DeviceError  the device failed.
[[nodiscard]] bool reached(const CudaEvent& event);
/// Between any two places CUDA knows, in the order of `stream`.
void copy_bytes(void* to, const void* from, std::size_t bytes, void* stream);
/// @throws DeviceError  "call: what CUDA says"; `status` is a cudaError_t.
void cuda_check(int status, const char* call);

}  // namespace orthrus::comm
