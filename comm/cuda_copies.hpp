#pragma once
/// @file
/// Copies between a CUDA device and its host, for `staged`. Twin files: cuda_copies.cpp, or
/// cuda_copies_absent.cpp where the build has no CUDA (ORTHRUS_WITH_CUDA).

#include <memory>

#include "comm/staged.hpp"

namespace orthrus::comm {

/// Staging memory is pinned host memory: for ranks that talk from the host. Copies run on a stream
/// of their own, after what `compute_stream` (a cudaStream_t; null: the device's default stream)
/// holds when the call starts. Callers' buffers may be on the device or on the host.
/// @throws ConfigError  the build has no CUDA. @throws DeviceError  CUDA refuses.
[[nodiscard]] std::shared_ptr<Copies> cuda_copies(int device, void* compute_stream = nullptr);

/// The other way round: staging memory on the device, for callers on the host over ranks that talk
/// from the device. Every copy waits until it is complete: for tests.
[[nodiscard]] std::shared_ptr<Copies> cuda_copies_to_device(int device);

}  // namespace orthrus::comm
