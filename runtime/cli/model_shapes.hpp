#pragma once
/// @file
/// Shape lists of published models: what `orthrus plan --model` plans for. Names are those of the
/// bundled workloads, so that one config fits all: layers.3.attn.q.weight, layers.3.mlp.up.weight.

#include <string>
#include <vector>

#include "runtime/plan.hpp"

namespace orthrus::cli {

/// Every parameter of a model, f32, in the order of the forward pass.
/// @throws ConfigError  naming the known models.
std::vector<runtime::ParameterShape> model_shapes(const std::string& model);
/// "gpt2-124m, llama3-8b, …".
std::string known_models();

}  // namespace orthrus::cli
