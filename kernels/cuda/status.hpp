#pragma once
/// @file
/// What CUDA and cuBLAS answer, turned into exceptions. Their enumerations arrive as int: their
/// headers stay in .cu files.

namespace orthrus::kernels::cuda {

/// @throws DeviceError "call: the runtime's words (name)"; a status of 0 is success.
void check_cuda(int status, const char* call);
void check_cublas(int status, const char* call);

}  // namespace orthrus::kernels::cuda
