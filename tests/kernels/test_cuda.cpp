// What the build sees of CUDA. Without a device the device tests are skipped, never passed.
#include <gtest/gtest.h>

#include "kernels/cuda/devices.hpp"

namespace orthrus::kernels {
namespace {

TEST(Cuda, EitherSeesADeviceOrSaysWhyNot) {
  const CudaReport report = cuda_report();
  EXPECT_EQ(report.devices.empty(), !report.problem.empty());
  EXPECT_EQ(report.built, report.runtime > 0);
  if (report.devices.empty()) GTEST_SKIP() << report.problem;
  for (const CudaDevice& d : report.devices) {
    EXPECT_FALSE(d.name.empty());
    EXPECT_GE(10 * d.major + d.minor, 80) << "kernels are compiled for sm_80 and sm_90";
    EXPECT_GT(d.memory_bytes, 0);
  }
}

}  // namespace
}  // namespace orthrus::kernels
