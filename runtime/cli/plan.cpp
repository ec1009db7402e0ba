// orthrus plan: what a job will cost, before it starts. No MPI, no device.
#include "runtime/plan.hpp"

#include <cstdio>
#include <orthrus/config.hpp>
#include <orthrus/error.hpp>

#include "runtime/cli/command.hpp"
#include "runtime/safetensors.hpp"
#include "runtime/workloads/workload.hpp"

namespace orthrus::cli {
namespace {

struct Options {
  std::string config, params, model;
  int ranks = 1;
  std::vector<std::string> set;
};

/// A family of parameters: `copies` layers of the same shapes; {} in a name is the layer.
using Shapes = std::vector<runtime::ParameterShape>;

runtime::ParameterShape shape(std::string name, std::vector<Index> dims) {
  runtime::ParameterShape p;
  p.name = std::move(name);
  p.shape = std::move(dims);
  return p;
}

/// GPT-2 small as published: 124,439,808 parameters (tied head).
Shapes gpt2_124m() {
  constexpr Index c = 768;
  Shapes s{shape("wte.weight", {50257, c}), shape("wpe.weight", {1024, c})};
  for (int l = 0; l < 12; ++l) {
    const std::string layer = "layers." + std::to_string(l) + ".";
    s.push_back(shape(layer + "norm1.weight", {c}));
    s.push_back(shape(layer + "norm1.bias", {c}));
    s.push_back(shape(layer + "attn.qkv.weight", {3 * c, c}));
    s.back().views = {{0, c, 0, c}, {c, c, 0, c}, {2 * c, c, 0, c}};
    s.push_back(shape(layer + "attn.qkv.bias", {3 * c}));
    s.push_back(shape(layer + "attn.proj.weight", {c, c}));
    s.push_back(shape(layer + "attn.proj.bias", {c}));
    s.push_back(shape(layer + "norm2.weight", {c}));
    s.push_back(shape(layer + "norm2.bias", {c}));
    s.push_back(shape(layer + "mlp.fc.weight", {4 * c, c}));
    s.push_back(shape(layer + "mlp.fc.bias", {4 * c}));
    s.push_back(shape(layer + "mlp.proj.weight", {c, 4 * c}));
    s.push_back(shape(layer + "mlp.proj.bias", {c}));
  }
  s.push_back(shape("lnf.weight", {c}));
  s.push_back(shape("lnf.bias", {c}));
  return s;
}

/// Llama 3 (arXiv:2407.21783, table 3): grouped-query attention, SwiGLU, untied head, 128,256
/// tokens.
Shapes llama3(int layers, Index width, Index ffn, Index heads, Index kv_heads) {
  const Index kv = width / heads * kv_heads;
  Shapes s{shape("embed.weight", {128256, width})};
  for (int l = 0; l < layers; ++l) {
    const std::string layer = "layers." + std::to_string(l) + ".";
    s.push_back(shape(layer + "norm1.weight", {width}));
    s.push_back(shape(layer + "attn.q.weight", {width, width}));
    s.push_back(shape(layer + "attn.k.weight", {kv, width}));
    s.push_back(shape(layer + "attn.v.weight", {kv, width}));
    s.push_back(shape(layer + "attn.proj.weight", {width, width}));
    s.push_back(shape(layer + "norm2.weight", {width}));
    s.push_back(shape(layer + "mlp.gate.weight", {ffn, width}));
    s.push_back(shape(layer + "mlp.up.weight", {ffn, width}));
    s.push_back(shape(layer + "mlp.down.weight", {width, ffn}));
  }
  s.push_back(shape("norm.weight", {width}));
  s.push_back(shape("head.weight", {128256, width}));
  return s;
}

Shapes model_named(const std::string& name) {
  if (name == "gpt2-124m") return gpt2_124m();
  if (name == "llama3-8b") return llama3(32, 4096, 14336, 32, 8);
  if (name == "llama3-405b") return llama3(126, 16384, 53248, 128, 8);
  throw ConfigError("--model '" + name +
                    "' is not known; known: gpt2-124m, llama3-8b, llama3-405b");
}

int plan(const Options& o, Context& context) {
  if (context.rank() != 0) return 0;
  if (o.ranks < 1) throw ConfigError("--ranks must be at least 1", ExitCode::usage);
  const Config config = load_config(o.config, o.set);
  Shapes shapes;
  if (!o.params.empty()) {
    const runtime::SafetensorsReader file(o.params);
    for (const runtime::TensorInfo& t : file.tensors()) {
      shapes.push_back(shape(t.name, t.shape.empty() ? std::vector<Index>{1} : t.shape));
    }
  } else if (!o.model.empty()) {
    shapes = model_named(o.model);
    // A shape list has no storage of its own: weights rest in the format their group asks for.
    // (Those of a file are widened to f32, as `replay` does.)
    for (runtime::ParameterShape& p : shapes) {
      const int g = runtime::effective_group(config, p);
      if (g >= 0 && config.groups[static_cast<std::size_t>(g)].weights.format == "bf16") {
        p.dtype = DType::bf16;
      }
    }
  } else if (!config.workload.empty()) {
    for (const Parameter& p : workloads::open_workload(config)->parameters()) {
      shapes.push_back(runtime::shape_of(p));
    }
  } else {
    throw ConfigError("plan needs --params FILE, --model NAME, or a config with a workload",
                      ExitCode::usage);
  }
  const runtime::Plan result = runtime::make_plan(config, std::move(shapes), o.ranks);
  std::printf(
      "%s",
      (context.json ? runtime::plan_json(result) + "\n" : runtime::plan_table(result)).c_str());
  return 0;
}

}  // namespace

Run add_plan(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_option("CONFIG", options->config, "Configuration (YAML)")->required();
  app.add_option("--params", options->params, "Shapes of this safetensors file");
  app.add_option("--model", options->model, "gpt2-124m, llama3-8b or llama3-405b");
  app.add_option("--ranks", options->ranks, "Number of ranks (not this launch's)")->required();
  app.add_option("--set", options->set, "key.path=value, over the file")->allow_extra_args(false);
  return [options](Context& context) { return plan(*options, context); };
}

}  // namespace orthrus::cli
