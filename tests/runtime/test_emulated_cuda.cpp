// The walk of a step on the CUDA backend's own sources, run by the stand-in of tests/emulated_cuda:
// what their kernels do with the views a runtime gives them. One rank: the stand-in is one device.
#include <gtest/gtest.h>

#include "comm/staged.hpp"
#include "kernels/devices.hpp"
#include "modes_model.hpp"
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
};

/// Three steps on one rank, whose tensors are the host's.
Outcome train(const Config& config, const Model& model, bool on_cuda) {
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
  for (std::int64_t s = 1; s <= 3; ++s) {
    for (std::int64_t k = 0; k < config.train.micro_batches; ++k) {
      optimizer.micro_batch(k);
      trainer.backward(s + k);
      for (int id = 0; id < std::ssize(trainer.parameters); ++id) optimizer.gradient_ready(id);
    }
    outcome.last = optimizer.step();
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

TEST_P(EmulatedCuda, StepsAsTheCpuDoes) {
  const auto& [mode, extra] = GetParam();
  const Model model = modes::held_model();
  const Config config = modes::held_config(mode, Along::none, extra);
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

}  // namespace
}  // namespace orthrus
