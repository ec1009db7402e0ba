#pragma once
/// @file
/// The doors of the devices this build may have; `open.cpp` holds the table.

#include <memory>

#include "kernels/backend.hpp"

namespace orthrus::kernels {

std::unique_ptr<Backend> open_cpu();
std::unique_ptr<Backend> open_reference();
/// The calling thread's current CUDA device, on a stream of its own. Twin files: cuda/backend.cu,
/// or cuda/backend_absent.cpp where the build has no CUDA (ORTHRUS_WITH_CUDA).
/// @throws ConfigError  there is no CUDA in this build, or no device.
std::unique_ptr<Backend> open_cuda();
/// CUDA device `ordinal`; its verbs enter `stream` (a `cudaStream_t`, which outlives the object).
std::unique_ptr<Backend> open_cuda_on(int ordinal, Stream stream);

}  // namespace orthrus::kernels
