#include <orthrus/error.hpp>

#include "torch_workloads.hpp"

namespace orthrus::workloads {
namespace {

[[noreturn]] void absent(const Config& config) {
  throw ConfigError((config.source.empty() ? "" : config.source + ": ") + "workload.name: '" +
                    config.workload +
                    "' needs libtorch, which this build lacks (install libtorch-dev, configure "
                    "with ORTHRUS_WITH_TORCH=ON)");
}

}  // namespace

bool torch_available() { return false; }
bool torch_reaches_cuda() { return false; }
std::unique_ptr<Workload> open_gpt(const Config& config, int) { absent(config); }
std::unique_ptr<Workload> open_residual_mlp_lm(const Config& config, int) { absent(config); }
std::unique_ptr<Workload> open_mlp(const Config& config, int) { absent(config); }
std::unique_ptr<Workload> open_convnet(const Config& config, int) { absent(config); }

}  // namespace orthrus::workloads
