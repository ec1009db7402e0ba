#include <cuda_runtime.h>

#include "kernels/cuda/devices.hpp"

namespace orthrus::kernels {

CudaReport cuda_report() {
  CudaReport report;
  report.built = true;
  cudaRuntimeGetVersion(&report.runtime);
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    report.problem = status != cudaSuccess ? cudaGetErrorString(status) : "there is no device";
    return report;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    char bus[32] = {};
    cudaDeviceGetPCIBusId(bus, sizeof bus, i);
    report.devices.push_back({properties.name, properties.major, properties.minor,
                              static_cast<std::int64_t>(properties.totalGlobalMem), bus});
  }
  return report;
}

}  // namespace orthrus::kernels
