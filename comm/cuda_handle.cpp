#include "comm/cuda_handle.hpp"

#include <cuda_runtime.h>

#include <orthrus/error.hpp>
#include <string>

namespace orthrus::comm {

void cuda_check(int status, const char* call) {
  if (status == cudaSuccess) return;
  throw DeviceError(std::string(call) + ": " +
                    cudaGetErrorString(static_cast<cudaError_t>(status)));
}

OnDevice::OnDevice(int device) {
  int current = 0;
  cuda_check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device) return;
  cuda_check(cudaSetDevice(device), "cudaSetDevice");
  before_ = current;
}

OnDevice::~OnDevice() {
  if (before_ >= 0) static_cast<void>(cudaSetDevice(before_));
}

// When the process ends CUDA may be gone already: there is nobody to tell.
void CudaStreamTraits::release(Handle h) noexcept {
  static_cast<void>(cudaStreamDestroy(static_cast<cudaStream_t>(h)));
}
void CudaEventTraits::release(Handle h) noexcept {
  static_cast<void>(cudaEventDestroy(static_cast<cudaEvent_t>(h)));
}

CudaStream make_stream() {
  int least = 0;
  int greatest = 0;
  cuda_check(cudaDeviceGetStreamPriorityRange(&least, &greatest),
             "cudaDeviceGetStreamPriorityRange");
  cudaStream_t stream = nullptr;
  cuda_check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
             "cudaStreamCreateWithPriority");
  return CudaStream{stream};
}

CudaEvent make_event() {
  cudaEvent_t event = nullptr;
  cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return CudaEvent{event};
}

void record(const CudaEvent& event, void* stream) {
  cuda_check(
      cudaEventRecord(static_cast<cudaEvent_t>(event.get()), static_cast<cudaStream_t>(stream)),
      "cudaEventRecord");
}

void wait_for(void* stream, const CudaEvent& event) {
  cuda_check(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream),
                                 static_cast<cudaEvent_t>(event.get()), 0),
             "cudaStreamWaitEvent");
}

bool reached(const CudaEvent& event) {
  const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(event.get()));
  if (status == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());  // not an error the trainer should find
    return false;
  }
  cuda_check(status, "cudaEventQuery");
  return true;
}

void copy_bytes(void* to, const void* from, std::size_t bytes, void* stream) {
  cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
             "cudaMemcpyAsync");
}

}  // namespace orthrus::comm
