#pragma once
/// @file
/// What .cu files share: launching a kernel, and code for the dtype of a view. They include
/// cuda_runtime.h before it.

#include <orthrus/dtype.hpp>
#include <orthrus/stream.hpp>
#include <utility>

#include "kernels/cuda/status.hpp"

namespace orthrus::kernels::cuda {

/// @throws DeviceError naming `verb`.
template <class... Parameters, class... Arguments>
void launch(const char* verb, void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream stream,
            Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), verb);
}

template <class T>
struct Tag {
  using Type = T;
};

/// Calls f with the element type.
template <class F>
void with_type(DType dtype, F f) {
  if (dtype == DType::f32) return f(Tag<float>{});
  if (dtype == DType::bf16) return f(Tag<BFloat16>{});
  f(Tag<double>{});
}

}  // namespace orthrus::kernels::cuda
