#pragma once
/// @file
/// Mirrors: stand-ins on the device for tensors that the trainer has on the host.

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "kernels/device_memory.hpp"
#include "runtime/plan.hpp"

namespace orthrus::runtime {

/// Whatever the device does not reach gets a dense copy on it, which everything else takes for the
/// trainer's: gradients are fetched when they are packed, weights before a step and brought back
/// after it. Where the device reaches all, nothing is kept and nothing done.
class Mirrors {
 public:
  /// Puts the mirrors' addresses into `parameters`, and takes the strides of what is dense now out
  /// of `shapes`. @param sizes  elements this rank has of each.
  /// @throws ConfigError  a tensor with strides is half on the host and half on the device.
  Mirrors(std::vector<Parameter>& parameters, std::vector<ParameterShape>& shapes,
          std::span<const Index> sizes, kernels::Backend& backend);

  /// Gradient i as the trainer has it now.
  void fetch_gradient(std::size_t i);
  void fetch_weights();
  /// Returns when the trainer's weights are the mirrors'.
  void deliver_weights();
  /// Weights i are not looked at any more.
  void forget_weights(std::size_t i);
  /// Where the trainer has weights i.
  [[nodiscard]] void* trainers_weights(std::size_t i) const { return tensors_[i].weights.trainer; }

 private:
  struct Mirror {
    void* trainer = nullptr;
    DType dtype = DType::f32;
    kernels::DeviceBuffer device;  ///< empty: the device reaches the trainer's
  };
  struct Tensor {
    Mirror weights, gradient;
    Index size = 0;
    ParameterShape strided;  ///< as the trainer has it, where that is not dense
  };

  void fetch(const Tensor& tensor, const Mirror& mirror);

  kernels::Backend& backend_;
  std::unique_ptr<kernels::Backend> host_;  ///< packs what has strides
  std::vector<std::byte> dense_;
  std::vector<Tensor> tensors_;
};

}  // namespace orthrus::runtime
