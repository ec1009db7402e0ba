// The devices whose memory is the host's pass the suites of test_backend.cpp.
#include "kernels/backend_suites.hpp"

namespace orthrus::kernels {

const auto host_devices = testing::Values("cpu", "reference");

INSTANTIATE_TEST_SUITE_P(Devices, EveryDevice,
                         testing::Combine(host_devices,
                                          testing::Values(DType::f32, DType::bf16, DType::f64)),
                         DeviceAndDtypeName());
INSTANTIATE_TEST_SUITE_P(Devices, FusedSteps, host_devices);
INSTANTIATE_TEST_SUITE_P(Devices, Triangles, host_devices);
INSTANTIATE_TEST_SUITE_P(Devices, Memory, host_devices);
INSTANTIATE_TEST_SUITE_P(Devices, StochasticRounding, host_devices);
INSTANTIATE_TEST_SUITE_P(Devices, Quantizing, host_devices);
INSTANTIATE_TEST_SUITE_P(Devices, Conformance,
                         testing::Values(ConformanceCase{"cpu", DType::f32},
                                         ConformanceCase{"cpu", DType::bf16},
                                         ConformanceCase{"cpu", DType::f64}),
                         DeviceAndDtypeName());
INSTANTIATE_TEST_SUITE_P(Devices, StepBits,
                         testing::Combine(testing::Values("cpu"), testing::Values(0, 3)));
INSTANTIATE_TEST_SUITE_P(Devices, MatrixFunctions, testing::Values("cpu"));

}  // namespace orthrus::kernels
