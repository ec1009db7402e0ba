#pragma once
/// @file
/// The CUDA devices this build can see. Twin files: devices.cu, or devices_absent.cpp where the
/// build has no CUDA (ORTHRUS_WITH_CUDA).

#include <cstdint>
#include <string>
#include <vector>

namespace orthrus::kernels {

struct CudaDevice {
  std::string name;
  int major = 0, minor = 0;  ///< compute capability
  std::int64_t memory_bytes = 0;
  std::string bus;  ///< PCI bus id: numbers depend on what a process may see
};

struct CudaReport {
  bool built = false;   ///< this build was made with CUDA
  int runtime = 0;      ///< 1000·major + 10·minor
  std::string problem;  ///< why there is no device, in the runtime's words; empty when there is one
  std::vector<CudaDevice> devices;
};

/// Looks, and never throws: a missing driver is a report.
CudaReport cuda_report();

}  // namespace orthrus::kernels
