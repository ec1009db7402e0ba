// The walk of a step on the CUDA backend's own sources, run by the stand-in of tests/emulated_cuda:
// what their kernels do with the views a runtime gives them. One rank: the stand-in is one device.
#include <cuda_runtime.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "comm/staged.hpp"
#include "kernels/device_memory.hpp"
#include "kernels/devices.hpp"
#include "kernels/gram.hpp"
#include "kernels/msign.hpp"
#include "modes_model.hpp"
#include "optim/lmo.hpp"
#include "runtime/engine.hpp"

namespace orthrus {
namespace {

using modes::Along;
using modes::ModeCase;
using modes::Model;

/// Staging by the device's own copies.
class DeviceCopies final : public comm::Copies {
 public:
  explicit DeviceCopies(kernels::Backend& device) : device_(device) {}
  void* allocate(std::size_t bytes) override { return ::operator new(bytes); }
  void free(void* block) noexcept override { ::operator delete(block); }
  std::unique_ptr<Mark> mark() override { return std::make_unique<Waited>(device_); }
  void follow() override {}
  void fetch(void* to, const void* from, std::size_t bytes) override {
    device_.copy(from, to, bytes);
  }
  void deliver(void* to, const void* from, std::size_t bytes) override {
    device_.copy(from, to, bytes);
  }

 private:
  struct Waited final : Mark {
    explicit Waited(kernels::Backend& d) : device(d) {}
    void set() override {}
    bool reached() override {
      device.wait();
      return true;
    }
    kernels::Backend& device;
  };
  kernels::Backend& device_;
};

struct Outcome {
  std::vector<std::vector<float>> weights;
  std::map<std::string, ShardedOptimizer::StateTensor> state;
  StepReport last;
  std::vector<std::string> notices;  ///< of each step
  long graphs = 0;                   ///< launched in the last step
};

/// Some steps on one rank, whose tensors are the host's.
Outcome train(const Config& config, const Model& model, bool on_cuda, std::int64_t steps = 3) {
  Outcome outcome;
  outcome.weights = model.weights;
  modes::Trainer trainer(model, 0, 1);
  const auto seat = [](const Config&, const DeviceChoice&, Communicator& world) {
    runtime::Seat made;
    made.backend = kernels::open_cuda_on(0, {});
    made.payload = comm::staged(world, std::make_shared<DeviceCopies>(*made.backend));
    return made;
  };
  ShardedOptimizer optimizer =
      on_cuda ? ShardedOptimizer(std::make_unique<ShardedOptimizer::Impl>(
                    config, self_communicator(), trainer.parameters, DeviceChoice{}, seat))
              : ShardedOptimizer(config, self_communicator(), trainer.parameters);
  for (std::int64_t s = 1; s <= steps; ++s) {
    for (std::int64_t k = 0; k < config.train.micro_batches; ++k) {
      optimizer.micro_batch(k);
      trainer.backward(s + k);
      for (int id = 0; id < std::ssize(trainer.parameters); ++id) optimizer.gradient_ready(id);
    }
    const long before = emulated_cuda::counts().graphs;
    outcome.last = optimizer.step();
    outcome.graphs = emulated_cuda::counts().graphs - before;
    outcome.notices.push_back(outcome.last.notice);
    EXPECT_FALSE(outcome.last.skipped) << outcome.last.skip_reason;
  }
  for (int id = 0; id < std::ssize(trainer.parameters); ++id) {
    optimizer.gather({&id, 1});
    optimizer.copy_weights(id, trainer.parameters[static_cast<std::size_t>(id)].weights);
    optimizer.release({&id, 1});
  }
  trainer.take(outcome.weights);
  outcome.state = optimizer.gather_state();
  return outcome;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += std::pow(a[i] - b[i], 2);
  return std::sqrt(sum);
}

class EmulatedCuda : public testing::TestWithParam<std::pair<ModeCase, const char*>> {};
INSTANTIATE_TEST_SUITE_P(
    Modes, EmulatedCuda,
    testing::Values(std::pair{modes::owner, "checks: collective\n"},
                    std::pair{modes::exchange, "train: {micro_batches: 2}\nzero: {stage: 1}\n"},
                    std::pair{modes::gather, "zero: {stage: 3}\n"},
                    std::pair{modes::gram,
                              "comm: {gradient_dtype: bf16}\ntrain: {micro_batches: 2}\n"},
                    std::pair{modes::gram_steps, "checks: collective\n"}),
    [](const auto& info) { return modes::label(info.param.first); });

void expect_as_the_cpu_does(const Config& config, const Model& model) {
  const Outcome expected = train(config, model, false);
  const Outcome found = train(config, model, true);
  EXPECT_EQ(found.last.bytes_sent, expected.last.bytes_sent);
  EXPECT_EQ(found.last.messages, expected.last.messages);
  EXPECT_EQ(found.last.matrices, expected.last.matrices);
  for (std::size_t i = 0; i < model.tensors.size(); ++i) {
    const std::string& name = model.tensors[i].name;
    if (!name.starts_with("muon") && !name.starts_with("normuon")) {
      EXPECT_EQ(found.weights[i], expected.weights[i]) << name;
      continue;
    }
    // Products add in another order: roundoff of f32, lifted by the iterations' slope at 0 (1e3) at
    // the smallest singular values.
    EXPECT_LE(distance(found.weights[i], expected.weights[i]),
              1e-4 * distance(expected.weights[i], model.weights[i]))
        << name;
  }
  ASSERT_EQ(found.state.size(), expected.state.size());
  for (const auto& [name, tensor] : expected.state) {
    // Everything that no product has gone into has the CPU's bits.
    if (name.find("row_second_moment") != std::string::npos) continue;
    EXPECT_EQ(found.state.at(name).values, tensor.values) << name;
  }
}

TEST_P(EmulatedCuda, StepsAsTheCpuDoes) {
  const auto& [mode, extra] = GetParam();
  Config config = modes::held_config(mode, Along::none, extra);
  expect_as_the_cpu_does(config, modes::held_model());
  for (const char* momentum : {"bf16", "int8"}) {
    SCOPED_TRACE(momentum);
    for (GroupConfig& g : config.groups) g.state.momentum = momentum;
    expect_as_the_cpu_does(config, modes::model_for(""));
  }
}

// ---- nothing is waited for
// ------------------------------------------------------------------------

struct Asked {
  long waits, launches;
};
/// What f asks of the device the second time: the first time scratch grows.
template <class F>
Asked asked_by(F f) {
  f();
  const emulated_cuda::Counts before = emulated_cuda::counts();
  f();
  return {emulated_cuda::counts().waits - before.waits,
          emulated_cuda::counts().launches - before.launches};
}

/// Floats in a device's memory.
kernels::DeviceBuffer placed(kernels::Backend& device, const zoo::Dense<float>& x) {
  kernels::DeviceBuffer buffer(device, x.data.size() * sizeof(float));
  device.copy(x.data.data(), buffer.data(), buffer.bytes());
  device.wait();
  return buffer;
}
MatrixView view(const kernels::DeviceBuffer& buffer, Index rows, Index cols) {
  return matrix_view(static_cast<float*>(buffer.data()), rows, cols);
}

TEST(NothingIsWaitedFor, InMsign) {
  const auto device = kernels::open_cuda_on(0, {});
  const auto iterations =
      kernels::first_iterations(*kernels::find_coefficients("polar_express_101"), 5);
  struct Case {
    Index rows, cols;
    DType dtype;
    bool gram;  ///< are some iterations done on XXᵀ?
  };
  for (const Case& c : {Case{24, 40, DType::f32, false}, Case{41, 23, DType::bf16, false},
                        Case{64, 130, DType::f32, true}, Case{256, 1024, DType::bf16, true},
                        Case{12, 9, DType::f64, false}}) {
    for (const double size : {1.0, 0.0, 1e-30}) {
      if (c.rows == 256 && size != 1) continue;  // it takes its time
      const zoo::Dense<float> g =
          zoo::cast<float>(zoo::scaled(zoo::gaussian(c.rows, c.cols, 1), size));
      const kernels::DeviceBuffer x = placed(*device, g);
      const kernels::MsignOptions options{c.dtype, kernels::EpsMode::add, 1e-7};
      ASSERT_EQ(kernels::msign_gram_products(c.rows, c.cols, iterations, options) > 0, c.gram);
      const kernels::DeviceBuffer work(
          *device, kernels::msign_workspace_bytes(c.rows, c.cols, DType::f32, options));
      const Asked asked = asked_by([&] {
        kernels::msign(view(x, c.rows, c.cols), iterations, 1.01, options, work.span(), *device);
      });
      EXPECT_EQ(asked.waits, 0) << c.rows << "x" << c.cols << " " << size;
      EXPECT_GT(asked.launches, 15);  // five iterations of three products
    }
  }
}

TEST(NothingIsWaitedFor, InGramPolynomials) {
  const auto device = kernels::open_cuda_on(0, {});
  const auto iterations = kernels::first_iterations(*kernels::find_coefficients("jordan"), 5);
  constexpr Index m = 20;
  const kernels::DeviceBuffer r = placed(*device, zoo::cast<float>(zoo::flat(m, m, 1)));
  const kernels::DeviceBuffer q(*device, r.bytes());
  const kernels::DeviceBuffer squares(*device, m * sizeof(double));
  const kernels::DeviceBuffer work(*device,
                                   kernels::gram_polynomial_workspace_bytes(m, iterations));
  const Asked asked = asked_by([&] {
    kernels::gram_polynomial(view(r, m, m), iterations, {}, view(q, m, m),
                             {static_cast<double*>(squares.data()), m}, work.span(), *device);
  });
  EXPECT_EQ(asked.waits, 0);
  EXPECT_GT(asked.launches, 15);
}

// Every norm there is; the sums that they divide by have the CPU's bits.
TEST(NothingIsWaitedFor, InAnyLmo) {
  const auto device = kernels::open_cuda_on(0, {});
  const auto cpu = kernels::open_backend("cpu");
  for (const optim::NormRow& row : optim::norms()) {
    for (const double size : {1.0, 0.0, 1e-30}) {
      LmoConfig config;
      config.norm = std::string(row.name);
      const optim::Lmo lmo(config, {.on_host = false});
      ASSERT_FALSE(lmo.waits(13)) << row.name;
      const zoo::Dense<float> g = zoo::cast<float>(zoo::scaled(zoo::gaussian(13, 30, 1), size));
      const kernels::DeviceBuffer x = placed(*device, g);
      const kernels::DeviceBuffer work(*device, lmo.workspace_bytes(13, 30));
      const kernels::DeviceBuffer work_here(*cpu, lmo.workspace_bytes(13, 30));
      zoo::Dense<float> expected = g;
      zoo::Dense<float> found = g;
      const Asked asked = asked_by([&] {
        lmo(view(x, 13, 30), work.span(), *device);
        lmo(expected.view(), work_here.span(), *cpu);
      });
      EXPECT_EQ(asked.waits, 0) << row.name;
      EXPECT_GT(asked.launches, 0) << row.name;
      device->copy(x.data(), found.data.data(), x.bytes());
      device->wait();
      if (!row.orthogonalizes) {
        EXPECT_EQ(found.data, expected.data) << row.name << " " << size;
      }
    }
  }
}

// ---- graphs
// ----------------------------------------------------------------------------------------

class EmulatedGraphs : public testing::TestWithParam<std::pair<ModeCase, const char*>> {};
INSTANTIATE_TEST_SUITE_P(Modes, EmulatedGraphs,
                         testing::Values(std::pair{modes::owner, "checks: collective\n"},
                                         std::pair{modes::exchange, "zero: {stage: 1}\n"},
                                         std::pair{modes::gather, "zero: {stage: 3}\n"}),
                         [](const auto& info) { return modes::label(info.param.first); });

TEST_P(EmulatedGraphs, GiveTheBitsOfDirectLaunches) {
  const auto& [mode, extra] = GetParam();
  const Model model = modes::held_model();
  Config config = modes::held_config(mode, Along::none, extra);
  const Outcome direct = train(config, model, true, 4);
  config.cuda.graph = true;
  const Outcome replayed = train(config, model, true, 4);
  EXPECT_EQ(direct.graphs, 0);
  EXPECT_EQ(replayed.graphs, replayed.last.matrices) << "one launch per LMO";
  EXPECT_EQ(replayed.weights, direct.weights);
  for (const auto& [name, tensor] : direct.state) {
    EXPECT_EQ(replayed.state.at(name).values, tensor.values) << name;
  }
  EXPECT_THAT(replayed.notices, testing::Each(testing::IsEmpty()));
}

// The inverses of a rational function are the host's: it is launched as ever, and nothing fails.
TEST(EmulatedGraph, LeavesRationalFunctionsAsTheyAre) {
  const Model model = modes::held_model();
  Config config = modes::held_config(modes::owner, Along::none);
  for (GroupConfig& g : config.groups) g.lmo.coefficients = "rational";
  const Outcome direct = train(config, model, true, 4);
  config.cuda.graph = true;
  const Outcome replayed = train(config, model, true, 4);
  EXPECT_EQ(replayed.graphs, 0);
  EXPECT_EQ(replayed.weights, direct.weights);
  EXPECT_THAT(replayed.notices, testing::Each(testing::IsEmpty()));
}

TEST(EmulatedGraph, ThatCannotBeRecordedIsSaidOnceAndChangesNothing) {
  const Model model = modes::held_model();
  Config config = modes::held_config(modes::owner, Along::none);
  const Outcome direct = train(config, model, true, 4);
  config.cuda.graph = true;
  emulated_cuda::captures_fail() = true;
  const Outcome found = train(config, model, true, 4);
  emulated_cuda::captures_fail() = false;
  EXPECT_EQ(found.graphs, 0);
  EXPECT_EQ(found.weights, direct.weights);
  EXPECT_EQ(found.notices[0], "") << "nothing is recorded in the first step";
  EXPECT_THAT(found.notices[1],
              testing::AllOf(testing::StartsWith("cuda.graph: an LMO could not be recorded"),
                             testing::HasSubstr("cudaStreamEndCapture")));
  EXPECT_EQ(found.notices[2] + found.notices[3], "");
}

TEST(EmulatedGraph, IsIgnoredOnTheCpuWithOneNotice) {
  const Model model = modes::held_model();
  Config config = modes::held_config(modes::owner, Along::none);
  config.cuda.graph = true;
  const Outcome outcome = train(config, model, false);
  EXPECT_THAT(outcome.notices[0], testing::StartsWith("cuda.graph is ignored: device cpu"));
  EXPECT_EQ(outcome.notices[1] + outcome.notices[2], "");
}

}  // namespace
}  // namespace orthrus
