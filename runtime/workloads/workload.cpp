#include "workload.hpp"

#include <orthrus/error.hpp>

#include "analytic.hpp"
#include "torch_workloads.hpp"

namespace orthrus::workloads {
namespace {

struct Row {
  const char *name, *doc;
  bool needs_torch;
  std::unique_ptr<Workload> (*open)(const Config&, int cuda);
};

constexpr Row rows[] = {
    {"gpt", "decoder-only transformer on bytes", true, open_gpt},
    {"residual_mlp_lm", "next character by a residual MLP without attention", true,
     open_residual_mlp_lm},
    {"mlp", "fully connected image classifier", true, open_mlp},
    {"convnet", "convolutional image classifier", true, open_convnet},
    {"matrix_sensing", "a low-rank matrix from few linear measurements", false,
     [](const Config& c, int) { return open_matrix_sensing(c); }},
    {"noisy_quadratic", "a quadratic with Kronecker curvature and noisy gradients", false,
     [](const Config& c, int) { return open_noisy_quadratic(c); }},
    {"matrix_least_squares", "online least squares: a matrix from fresh noisy answers", false,
     [](const Config& c, int) { return open_matrix_least_squares(c); }},
    {"random_features", "regression on fixed random features", false,
     [](const Config& c, int) { return open_random_features(c); }},
    {"residual_mlp", "regression of a residual network on another", false,
     [](const Config& c, int) { return open_residual_regression(c); }},
    {"imbalanced_mixture", "linear classifier of Gaussian classes of unequal frequency", false,
     [](const Config& c, int) { return open_imbalanced_mixture(c); }},
};

}  // namespace

std::unique_ptr<Workload> open_workload(const Config& config, int cuda) {
  std::string known;
  for (const Row& row : rows) {
    if (config.workload == row.name) return row.open(config, cuda);
    known += (known.empty() ? "" : ", ") + std::string(row.name);
  }
  throw ConfigError(
      (config.source.empty() ? "" : config.source + ": ") + "workload.name: " +
      (config.workload.empty() ? "missing" : "'" + config.workload + "' is not known") +
      "; known: " + known);
}

bool workloads_reach_cuda() { return torch_reaches_cuda(); }

std::vector<WorkloadRow> workload_table() {
  std::vector<WorkloadRow> table;
  for (const Row& row : rows) {
    table.push_back({row.name, row.doc, !row.needs_torch || torch_available()});
  }
  return table;
}

}  // namespace orthrus::workloads
