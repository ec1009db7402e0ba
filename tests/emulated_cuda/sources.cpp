// The CUDA backend, compiled for the host: <cuda_runtime.h> and its like are those beside this
// file.
#include "kernels/cuda/backend.cu"
#include "kernels/cuda/elementwise.cu"
#include "kernels/cuda/products.cu"
#include "kernels/cuda/quantize.cu"

// The driver's virtual memory has no stand-in: all of a range is backed from the beginning.
namespace orthrus::kernels::cuda {

Pages::~Pages() = default;
void* Pages::reserve(int device, std::size_t range_bytes) {
  device_ = device;
  void* range = nullptr;
  check_cuda(cudaMalloc(&range, range_bytes), "cudaMalloc");
  return range;
}
void Pages::unreserve(void* range, std::size_t) noexcept { cudaFree(range); }
void Pages::back(void*, std::size_t) {}
void Pages::drop(void*, std::size_t) noexcept {}

}  // namespace orthrus::kernels::cuda
