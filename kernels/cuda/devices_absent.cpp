#include "kernels/cuda/devices.hpp"

namespace orthrus::kernels {

CudaReport cuda_report() {
  CudaReport report;
  report.problem = "this build has no CUDA: configure with -DORTHRUS_WITH_CUDA=ON";
  return report;
}

}  // namespace orthrus::kernels
