#pragma once
/// @file
/// Workloads whose models libtorch differentiates. Twin files: torch_workloads.cpp and its models,
/// or torch_absent.cpp.

#include <memory>

#include "workload.hpp"

namespace orthrus::workloads {

[[nodiscard]] bool torch_available();
/// Is libtorch here, with CUDA, and is there a device?
[[nodiscard]] bool torch_reaches_cuda();

// `cuda`: the device to compute on, if libtorch reaches it; -1: the host.

/// Decoder-only transformer on bytes: learned positions, pre-norm blocks (LayerNorm without bias),
/// fused query-key-value weight, GELU, untied head. Initial weights N(0, 0.02), residual
/// projections over √(2L).
[[nodiscard]] std::unique_ptr<Workload> open_gpt(const Config& config, int cuda);

/// Next-character prediction without attention: h = embedding + position, then L blocks
/// h ← (1 − 1/L)·h + (1/L)·fc2(GELU(fc1(rmsnorm(h)))), rmsnorm, linear head. No biases, no gains.
/// Linear layers start orthogonal (8 Newton–Schulz iterations), embeddings at N(0, 0.02).
[[nodiscard]] std::unique_ptr<Workload> open_residual_mlp_lm(const Config& config, int cuda);

/// Fully connected ReLU classifier, `depth` hidden layers of `hidden` units.
[[nodiscard]] std::unique_ptr<Workload> open_mlp(const Config& config, int cuda);

/// Two 3×3 convolutions with ReLU and 2×2 max-pooling, then a linear layer.
[[nodiscard]] std::unique_ptr<Workload> open_convnet(const Config& config, int cuda);

}  // namespace orthrus::workloads
