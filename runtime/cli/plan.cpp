// orthrus plan: what a job will cost, before it starts. No MPI, no device.
#include "runtime/plan.hpp"

#include <cstdio>
#include <orthrus/config.hpp>
#include <orthrus/error.hpp>

#include "runtime/cli/command.hpp"
#include "runtime/cli/model_shapes.hpp"
#include "runtime/safetensors.hpp"
#include "runtime/workloads/workload.hpp"

namespace orthrus::cli {
namespace {

struct Options {
  std::string config, params, model;
  std::string profile;
  int ranks = 1;
  std::vector<std::string> set;
};

using Shapes = std::vector<runtime::ParameterShape>;

runtime::ParameterShape shape(std::string name, std::vector<Index> dims) {
  runtime::ParameterShape p;
  p.name = std::move(name);
  p.shape = std::move(dims);
  return p;
}

int plan(const Options& o, Context& context) {
  if (context.rank() != 0) return 0;
  if (o.ranks < 1) throw ConfigError("--ranks must be at least 1", ExitCode::usage);
  Config config = load_config(o.config, o.set);
  const runtime::MachineProfile profile =
      runtime::load_profile(o.profile.empty() ? config.profile : o.profile);
  Shapes shapes;
  if (!o.params.empty()) {
    const runtime::SafetensorsReader file(o.params);
    for (const runtime::TensorInfo& t : file.tensors()) {
      shapes.push_back(shape(t.name, t.shape.empty() ? std::vector<Index>{1} : t.shape));
    }
  } else if (!o.model.empty()) {
    shapes = model_shapes(o.model);
    // A shape list has no storage of its own: weights rest in the format their group asks for.
    // (Those of a file are widened to f32, as `replay` does.)
    for (runtime::ParameterShape& p : shapes) {
      const int g = runtime::effective_group(config, p);
      if (g >= 0 && config.groups[static_cast<std::size_t>(g)].weights.format == "bf16") {
        p.dtype = DType::bf16;
      }
    }
  } else if (!config.workload.empty()) {
    config.gathers = 1;  // as `train` does
    for (const Parameter& p : workloads::open_workload(config)->parameters()) {
      shapes.push_back(runtime::shape_of(p));
    }
  } else {
    throw ConfigError("plan needs --params FILE, --model NAME, or a config with a workload",
                      ExitCode::usage);
  }
  const runtime::Plan result = runtime::make_plan(config, std::move(shapes), o.ranks, profile);
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
  app.add_option("--model", options->model, "Shapes of a known model: " + known_models());
  app.add_option("--ranks", options->ranks, "Number of ranks (not this launch's)")->required();
  app.add_option("--profile", options->profile,
                 "Machine to predict for: a file of `orthrus bench --profile`, or a known name "
                 "(else the config's)");
  app.add_option("--set", options->set, "key.path=value, over the file")->allow_extra_args(false);
  return [options](Context& context) { return plan(*options, context); };
}

}  // namespace orthrus::cli
