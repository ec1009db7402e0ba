#pragma once
/// @file
/// What a run left behind, read for its page: metrics as rows, the summary as JSON. What is missing
/// reads as NaN or as an empty text.

#include <array>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace orthrus::runtime::report {

using nlohmann::json;

inline constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

double number(const json& object, const char* key);
std::string text(const json& object, const char* key);
/// Empty when there is none.
json child(const json& object, const char* key);

/// What a phase of a step is called in a row's "ms", and what the page says it is.
struct Phase {
  const char* key;
  const char* label;
  const char* doc;
};
// In the order of the walk. `update` is shown without `lmo`, which lies inside it.
inline constexpr std::array<Phase, 7> phases{
    {{"copy", "copy", "packing gradients, unpacking weights"},
     {"reduce", "reduce", "waiting for gradients"},
     {"control", "control", "flags and norms"},
     {"lmo", "lmo", "orthogonalization"},
     {"update", "update", "momentum and weights"},
     {"gather", "gather", "waiting for weights"},
     {"rest", "rest", "everything else in step()"}}};

/// One line of metrics.jsonl, as far as charts need it.
struct Row {
  double step = nan_value, loss = nan_value, lr = nan_value;
  double step_ms = nan_value, gradient_ms = nan_value, optimizer_ms = nan_value;
  std::array<double, phases.size()> phase_ms{};
  double bytes = nan_value, bytes_max = nan_value, messages = nan_value, items_per_s = nan_value;
  double exceptional = nan_value;
  std::vector<double> update_rms;
  /// Per group, where weights are rounded and it was measured: step / grid, correction / momentum,
  /// rms of the residual.
  std::vector<std::array<double, 3>> rounding;
  std::map<std::string, double> validation;
  /// Of steps with `diagnostics`: nr_grad, spec_ratio, gns_l2, … by matrix or group.
  std::map<std::string, std::map<std::string, double>> diagnostics;
  bool skipped = false;
};

std::vector<Row> read_rows(const std::string& metrics_jsonl);
/// The summary, with what it lacks taken from the metrics.
json complete_summary(const std::string& summary_json, const std::vector<Row>& rows);

json number_or_null(double value);
json whole_or_null(double value);
/// Of the rank that holds most.
double state_bytes(const json& summary);
/// The rules of all groups, each once, with commas between.
std::string rules_of(const json& summary);

}  // namespace orthrus::runtime::report
