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
/// Of its pages (`Backend::reserve`).
inline constexpr std::size_t cuda_page_bytes = std::size_t{2} << 20;
/// CUDA device `ordinal`; its verbs enter `stream` (a `cudaStream_t`, which outlives the object).
std::unique_ptr<Backend> open_cuda_on(int ordinal, Stream stream);
/// The default stream by a name that is not null: what enters it comes after what the caller has
/// queued there, and in all streams that are not `cudaStreamNonBlocking`. Null without CUDA.
Stream cuda_default_stream();

}  // namespace orthrus::kernels
