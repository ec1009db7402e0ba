// The CUDA device passes the suites of test_backend.cpp. Without one they are skipped, never
// passed: CMakeLists.txt filters out all but these, so that a skip can hide no failure.
#include "kernels/backend_suites.hpp"

namespace orthrus::kernels {

INSTANTIATE_TEST_SUITE_P(Cuda, EveryDevice,
                         testing::Combine(testing::Values("cuda"),
                                          testing::Values(DType::f32, DType::bf16, DType::f64)),
                         DeviceAndDtypeName());
INSTANTIATE_TEST_SUITE_P(Cuda, FusedSteps, testing::Values("cuda"));
INSTANTIATE_TEST_SUITE_P(Cuda, Triangles, testing::Values("cuda"));
INSTANTIATE_TEST_SUITE_P(Cuda, Memory, testing::Values("cuda"));
INSTANTIATE_TEST_SUITE_P(Cuda, StochasticRounding, testing::Values("cuda"));
INSTANTIATE_TEST_SUITE_P(Cuda, Quantizing, testing::Values("cuda"));
INSTANTIATE_TEST_SUITE_P(Cuda, Conformance,
                         testing::Values(ConformanceCase{"cuda", DType::f32},
                                         ConformanceCase{"cuda", DType::bf16},
                                         ConformanceCase{"cuda", DType::f64}),
                         DeviceAndDtypeName());
INSTANTIATE_TEST_SUITE_P(Cuda, StepBits,
                         testing::Combine(testing::Values("cuda"), testing::Values(0, 3)));
INSTANTIATE_TEST_SUITE_P(Cuda, MatrixFunctions, testing::Values("cuda"));

}  // namespace orthrus::kernels
