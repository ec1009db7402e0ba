#include "runtime/cli/shape_source.hpp"

#include <orthrus/codes.hpp>
#include <orthrus/error.hpp>

#include "runtime/cli/model_shapes.hpp"
#include "runtime/safetensors.hpp"
#include "runtime/workloads/workload.hpp"

namespace orthrus::cli {

void add_plan_options(CLI::App& app, PlanOptions& options) {
  app.add_option("CONFIG", options.config, "Configuration (YAML)")->required();
  app.add_option("--params", options.params, "Shapes of this safetensors file");
  app.add_option("--model", options.model, "Shapes of a known model: " + known_models());
  app.add_option("--ranks", options.ranks, "Number of ranks (not this launch's)")->required();
  app.add_option("--profile", options.profile,
                 "Machine to predict for: a file of `orthrus bench --profile`, or a known name "
                 "(else the config's)");
  app.add_flag("--codes", options.codes,
               "The trainer computes with codes and scales, where weights.format has them");
  app.add_option("--set", options.set, "key.path=value, over the file")->allow_extra_args(false);
}

PlanInput load_plan_input(const PlanOptions& o) {
  if (o.ranks < 1) throw ConfigError("--ranks must be at least 1", ExitCode::usage);
  PlanInput input;
  input.config = load_config(o.config, o.set);
  input.profile = runtime::load_profile(o.profile.empty() ? input.config.profile : o.profile);
  if (!o.params.empty()) {
    const runtime::SafetensorsReader file(o.params);
    for (const runtime::TensorInfo& t : file.tensors()) {
      runtime::ParameterShape& p = input.shapes.emplace_back();
      p.name = t.name;
      p.shape = t.shape.empty() ? std::vector<Index>{1} : t.shape;
    }
  } else if (!o.model.empty()) {
    input.shapes = model_shapes(o.model);
    // A shape list has no storage of its own: weights rest in the format their group asks for.
    // (Those of a file are widened to f32, as `replay` does.)
    for (runtime::ParameterShape& p : input.shapes) {
      const int g = runtime::effective_group(input.config, p);
      if (g >= 0 && input.config.groups[static_cast<std::size_t>(g)].weights.format == "bf16") {
        p.dtype = DType::bf16;
      }
    }
  } else if (!input.config.workload.empty()) {
    input.config.gathers = 1;  // as `train` does
    for (const Parameter& p : workloads::open_workload(input.config)->parameters()) {
      input.shapes.push_back(runtime::shape_of(p));
    }
  } else {
    throw ConfigError("--params FILE, --model NAME, or a config with a workload is needed",
                      ExitCode::usage);
  }
  for (runtime::ParameterShape& p : input.shapes) {
    const int g = runtime::effective_group(input.config, p);
    if (g < 0 || !o.codes) continue;
    p.as_codes = grid_of(input.config.groups[static_cast<std::size_t>(g)].weights).has_value();
  }
  return input;
}

}  // namespace orthrus::cli
