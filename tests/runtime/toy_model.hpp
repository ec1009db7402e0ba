#pragma once
/// @file
/// A model of odd shapes whose gradients are a function of (step, leaf): the same on any number of
/// ranks.

#include <cmath>
#include <functional>
#include <orthrus/orthrus.hpp>
#include <string>
#include <vector>

#include "runtime/tree.hpp"

namespace orthrus::toy {

inline const char* muon_and_adamw = R"(
schema: 1
groups:
  - match: "*.weight"
    rule: {name: muon, lr: 0.02, weight_decay: 0.1}
  - {match: "*", rule: {name: adamw, lr: 0.01, weight_decay: 0.1}}
)";

/// The trainer's side: buffers and their description.
class Model {
 public:
  Model() {
    add("embed", {300, 20});  // 6000 elements: more than one block of element-wise sharding
    add("a.weight", {12, 20});
    add("a.bias", {12});
    add("qkv.weight", {24, 8});
    parameters.back().views = {{0, 8, 0, 8}, {8, 8, 0, 8}, {16, 8, 0, 8}};
    add("conv.weight", {6, 3, 3, 3});
    add("wide.weight", {3, 50});
    add("one.weight", {1, 9});
    add("scalar", {1});
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      parameters[i].weights = weights[i].data();
      parameters[i].gradient = gradients[i].data();
      for (std::size_t e = 0; e < weights[i].size(); ++e) weights[i][e] = noise(1000 + i, e);
    }
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  /// Gradients of `leaf` in `step`, into the buffers.
  void backward(std::int64_t step, Index leaf) {
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      for (std::size_t e = 0; e < gradients[i].size(); ++e) {
        gradients[i][e] = noise(static_cast<std::uint64_t>(step * 64 + leaf) * 16 + i, e);
      }
    }
  }

  [[nodiscard]] std::vector<float> all_weights() const {
    std::vector<float> all;
    for (const auto& w : weights) all.insert(all.end(), w.begin(), w.end());
    return all;
  }

  std::vector<Parameter> parameters;
  std::vector<std::vector<float>> weights, gradients;

 private:
  void add(std::string name, std::vector<Index> shape) {
    Parameter p;
    p.name = std::move(name);
    p.shape = std::move(shape);
    Index size = 1;
    for (const Index n : p.shape) size *= n;
    parameters.push_back(std::move(p));
    weights.emplace_back(static_cast<std::size_t>(size));
    gradients.emplace_back(static_cast<std::size_t>(size));
  }
  /// Uniform in [−1, 1): splitmix64 of (stream, element).
  static float noise(std::uint64_t stream, std::uint64_t element) {
    std::uint64_t z = stream * 0x9E3779B97F4A7C15U + (element + 1) * 0xD1B54A32D192ED03U;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    z ^= z >> 31;
    return static_cast<float>(static_cast<std::int64_t>(z >> 11)) * 0x1p-52F - 1.0F;
  }
};

/// One step of `leaves` leaves dealt to the ranks of `optimizer` as virtual shards are.
inline const StepReport& reproducible_step(ShardedOptimizer& optimizer, Model& model, Index leaves,
                                           std::int64_t step) {
  const runtime::Leaves run = runtime::leaf_run(leaves, optimizer.size(), optimizer.rank());
  for (Index leaf = run.begin; leaf < run.end; ++leaf) {
    if (leaf > run.begin) optimizer.micro_batch(leaf - run.begin);
    model.backward(step, leaf);
    for (int id = static_cast<int>(model.parameters.size()) - 1; id >= 0; --id)
      optimizer.gradient_ready(id);
  }
  return optimizer.step();
}

}  // namespace orthrus::toy
