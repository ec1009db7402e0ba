// orthrus bench step: whole optimizer steps on a model's shapes, gradients and new weights
// travelling as in training (but for overlap: no backward pass runs beside them).
#include <algorithm>
#include <orthrus/error.hpp>
#include <orthrus/orthrus.hpp>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "runtime/cli/bench.hpp"
#include "runtime/cli/model_shapes.hpp"
#include "runtime/cli/noise.hpp"
#include "runtime/plan.hpp"

namespace orthrus::cli {
namespace {

constexpr const char* layers = "layers.*.weight";

/// Two layers' matrices of GPT-2.
std::vector<runtime::ParameterShape> two_layers() {
  std::vector<runtime::ParameterShape> list;
  for (runtime::ParameterShape& p : model_shapes("gpt2-124m")) {
    const bool low = p.name.starts_with("layers.0.") || p.name.starts_with("layers.1.");
    if (low && p.shape.size() == 2) list.push_back(std::move(p));
  }
  return list;
}

std::vector<runtime::ParameterShape> shapes_of(const BenchOptions& options) {
  auto list = options.model == "gpt2-2-layers" ? two_layers() : model_shapes(options.model);
  if (options.matrices_only) {
    std::erase_if(list, [](const runtime::ParameterShape& p) {
      return p.shape.size() < 2 || !p.name.starts_with("layers.");
    });
  }
  return list;
}

/// RULE, or RULE:COEFFICIENTS:DTYPE for the matrices of layers; the rest is AdamW's. With @RESIDUAL
/// all weights are fp8 codes, rounded stochastically, and this is what becomes of the residual.
Config config_of(const std::string& rule) {
  std::vector<std::string> parts;
  const std::size_t at = rule.find('@');
  std::stringstream text(rule.substr(0, at));
  for (std::string part; std::getline(text, part, ':');) parts.push_back(part);
  if (parts.size() != 1 && parts.size() != 3) {
    throw ConfigError("--rules '" + rule + "' is neither RULE nor RULE:COEFFICIENTS:DTYPE");
  }
  const std::string weights =
      at == std::string::npos
          ? ""
          : ", weights: {format: fp8_e4m3, rounding: stochastic, residual: " + rule.substr(at + 1) +
                "}";
  std::string groups = "  - {match: \"*\", rule: {name: adamw}" + weights + "}\n";
  if (parts[0] != "adamw") {
    const std::string lmo =
        parts.size() < 3 ? "" : ", lmo: {coefficients: " + parts[1] + ", dtype: " + parts[2] + "}";
    groups = fmt::format("  - {{match: \"{}\", rule: {{name: {}}}{}{}}}\n", layers, parts[0], lmo,
                         weights) +
             groups;
  }
  return parse_config("schema: 1\ngroups:\n" + groups);
}

/// The trainer's side: parameters with weights and gradients of noise.
struct Model {
  explicit Model(const BenchOptions& options) {
    for (const runtime::ParameterShape& shape : shapes_of(options)) {
      weights.push_back(noise(shape.size()));
      gradients.push_back(weights.back());
      Parameter p;
      p.name = shape.name;
      p.shape = shape.shape;
      p.views = shape.views;
      p.weights = weights.back().data();
      p.gradient = gradients.back().data();
      p.gradient_state =
          options.gradients == "averaged" ? GradientState::averaged : GradientState::local;
      parameters.push_back(std::move(p));
      elements += shape.size();
    }
  }
  std::vector<std::vector<float>> weights, gradients;
  std::vector<Parameter> parameters;
  Index elements = 0;
};

}  // namespace

void bench_step(const BenchOptions& options, BenchPrinter& out, Communicator& world) {
  std::vector<std::string> rules = options.rules;
  if (rules.empty()) {
    rules = {"adamw",
             "muon:polar_express_101:f32",
             "muon:polar_express_101:bf16",
             "muon:rational:f32",
             "muon:rational:bf16",
             "muon:auto:bf16"};
  }
  Model model(options);
  const std::string shape = options.model + (options.matrices_only ? " matrices" : std::string());
  for (const std::string& rule : rules) {
    const Config config = config_of(rule);
    ShardedOptimizer optimizer{config, world.duplicate("step"), model.parameters};
    StepTimes sum;
    int steps = 0;
    std::int64_t sent[] = {0, 0, 0};  // bytes, messages, matrices
    const Timing time = time_in_turns(world, options.repeats,
                                      {{[&] {
                                          const StepReport& report = optimizer.step();
                                          sent[0] = report.bytes_sent;
                                          sent[1] = report.messages;
                                          sent[2] = report.matrices;
                                          if (steps++ == 0) return;  // the first warms up
                                          sum.reduce += report.ms.reduce;
                                          sum.update += report.ms.update;
                                          sum.lmo += report.ms.lmo;
                                          sum.meet += report.ms.meet;
                                          sum.gather += report.ms.gather;
                                          sum.copy += report.ms.copy;
                                        },
                                        [] {}}})[0];
    world.all_reduce(std::span<std::int64_t>(sent), ReduceOp::sum);
    Measured m{"step " + rule, shape, config.groups[0].lmo.dtype, time,
               static_cast<double>(sent[0])};
    m.more["parameters"] = model.elements;
    m.more["gradients"] = options.gradients;
    m.more["bytes_sent"] = sent[0];
    m.more["messages"] = sent[1];
    m.more["matrices"] = sent[2];
    const double n = std::max(steps - 1, 1);
    m.more["rank0_ms"] = {{"reduce", sum.reduce / n}, {"update", sum.update / n},
                          {"lmo", sum.lmo / n},       {"meet", sum.meet / n},
                          {"gather", sum.gather / n}, {"copy", sum.copy / n}};
    out.row(m);
  }
}

}  // namespace orthrus::cli
