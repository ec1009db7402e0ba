#pragma once
/// @file
/// The suites of test_backend.cpp that every device passes. A program links that file beside one
/// that instantiates them: host_devices.cpp, or test_backend_cuda.cpp.

#include <gtest/gtest.h>

#include <memory>
#include <orthrus/error.hpp>
#include <string>
#include <tuple>

#include "kernels/backend.hpp"
#include "kernels/staged_backend.hpp"

namespace orthrus::kernels {

/// Opens a device as it is, and for host matrices. One that cannot be opened skips the test.
class DeviceTest : public testing::Test {
 protected:
  void open(const char* name) {
    try {
      raw = open_backend(name);
    } catch (const ConfigError& e) {
      GTEST_SKIP() << e.what();
    }
    device = staged(raw);
    reference = open_backend("reference");
  }
  std::shared_ptr<Backend> raw, device;
  std::unique_ptr<Backend> reference;
};

/// Closed forms, every dtype.
class EveryDevice : public DeviceTest,
                    public testing::WithParamInterface<std::tuple<const char*, DType>> {
 protected:
  void SetUp() override {
    dtype = std::get<1>(GetParam());
    open(std::get<0>(GetParam()));
  }
  DType dtype{};
};

/// The optimizer's fused steps, triangles, memory, stochastic rounding: one dtype each.
class DeviceByName : public DeviceTest, public testing::WithParamInterface<const char*> {
 protected:
  void SetUp() override { open(GetParam()); }
};
class FusedSteps : public DeviceByName {};
class Triangles : public DeviceByName {};
class Memory : public DeviceByName {};
class StochasticRounding : public DeviceByName {};
class Quantizing : public DeviceByName {};  // test_quantize.cpp

struct ConformanceCase {
  const char* device;
  DType dtype;
};

/// Against the reference.
class Conformance : public DeviceTest, public testing::WithParamInterface<ConformanceCase> {
 protected:
  void SetUp() override {
    dtype = GetParam().dtype;
    open(GetParam().device);
  }
  DType dtype{};
};

/// Fast devices, whose bits are the reference's. The parameter: device, gap after each row.
class StepBits : public DeviceTest,
                 public testing::WithParamInterface<std::tuple<const char*, Index>> {
 protected:
  void SetUp() override { open(std::get<0>(GetParam())); }
};
/// msign and its kind, on the device's own memory, against the reference.
class MatrixFunctions : public DeviceByName {};

struct DeviceAndDtypeName {
  std::string operator()(const testing::TestParamInfo<std::tuple<const char*, DType>>& info) const {
    return std::string(std::get<0>(info.param)) + "_" +
           std::string(name_of(std::get<1>(info.param)));
  }
  std::string operator()(const testing::TestParamInfo<ConformanceCase>& info) const {
    return std::string(info.param.device) + "_" + std::string(name_of(info.param.dtype));
  }
};

}  // namespace orthrus::kernels
