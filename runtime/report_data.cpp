#include "runtime/report_data.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "runtime/report.hpp"

namespace orthrus::runtime {
namespace report {
namespace {

json parse_object(const std::string& document) {
  json value = json::parse(document, nullptr, /*allow_exceptions=*/false);
  return value.is_object() ? value : json::object();
}

double median(std::vector<double> values) {
  std::erase_if(values, [](double v) { return !std::isfinite(v); });
  if (values.empty()) return nan_value;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

template <class Get>
double median_of(const std::vector<Row>& rows, Get get) {
  std::vector<double> values;
  const std::size_t from = rows.size() > 2 ? 1 : 0;
  for (std::size_t i = from; i < rows.size(); ++i) values.push_back(get(rows[i]));
  return median(std::move(values));
}

/// A list of a line's objects, whose `name` says what they are of. An unresolved noise scale is
/// gns_l2_unresolved.
void add_diagnostics(Row& row, const json& line, const char* list, const char* name) {
  const auto found = line.find(list);
  if (found == line.end() || !found->is_array()) return;
  for (const json& of : *found) {
    if (!of.is_object()) continue;
    const bool unresolved = of.value("gns_unresolved", false);
    for (const auto& [key, value] : of.items()) {
      if (!value.is_number()) continue;
      const bool open = unresolved && key == "gns_l2";
      row.diagnostics[open ? "gns_l2_unresolved" : key][text(of, name)] = value.get<double>();
    }
  }
}

}  // namespace

double number(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number() ? it->get<double>() : nan_value;
}

std::string text(const json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return {};
  return it->is_string() ? it->get<std::string>()
                         : it->dump(-1, ' ', false, json::error_handler_t::replace);
}

json child(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_object() ? *it : json::object();
}

std::vector<Row> read_rows(const std::string& metrics_jsonl) {
  std::vector<Row> rows;
  std::size_t at = 0;
  while (at < metrics_jsonl.size()) {
    const std::size_t end = std::min(metrics_jsonl.find('\n', at), metrics_jsonl.size());
    const json line = json::parse(metrics_jsonl.begin() + static_cast<std::ptrdiff_t>(at),
                                  metrics_jsonl.begin() + static_cast<std::ptrdiff_t>(end), nullptr,
                                  /*allow_exceptions=*/false);
    at = end + 1;
    if (!line.is_object()) continue;
    Row row;
    row.step = number(line, "step");
    if (!std::isfinite(row.step)) continue;
    row.loss = number(line, "loss");
    row.lr = number(line, "lr_multiplier");
    if (const auto ms = line.find("ms"); ms != line.end() && ms->is_object()) {
      row.step_ms = number(*ms, "step");
      row.gradient_ms = number(*ms, "gradient");
      row.optimizer_ms = number(*ms, "total");
      double named = 0;
      for (std::size_t p = 0; p < phases.size(); ++p) {
        const double value = number(*ms, phases[p].key);
        row.phase_ms[p] = std::isfinite(value) ? value : 0;
      }
      row.phase_ms[4] = std::max(0.0, row.phase_ms[4] - row.phase_ms[3]);
      for (std::size_t p = 0; p + 1 < phases.size(); ++p) named += row.phase_ms[p];
      row.phase_ms.back() =
          std::isfinite(row.optimizer_ms) ? std::max(0.0, row.optimizer_ms - named) : 0;
    }
    row.bytes = number(line, "bytes_sent");
    row.bytes_max = number(line, "bytes_sent_max");
    row.messages = number(line, "messages");
    row.exceptional = number(line, "exceptional_bytes");
    row.items_per_s = number(line, "items_per_s");
    if (const auto rms = line.find("update_rms"); rms != line.end() && rms->is_array()) {
      for (const json& value : *rms) {
        row.update_rms.push_back(value.is_number() ? value.get<double>() : nan_value);
      }
    }
    if (const auto groups = line.find("rounding"); groups != line.end() && groups->is_array()) {
      for (const json& of : *groups) {
        auto& values = row.rounding.emplace_back();
        values.fill(nan_value);
        if (!of.is_object()) continue;
        values = {number(of, "step_over_grid"), number(of, "relative_correction"),
                  number(of, "residual_rms")};
      }
    }
    for (const auto& [key, value] : line.items()) {
      if (key.starts_with("val_") && value.is_number()) row.validation[key] = value.get<double>();
    }
    add_diagnostics(row, line, "noise", "group");
    add_diagnostics(row, line, "spectra", "matrix");
    const auto skipped = line.find("skipped");
    row.skipped = skipped != line.end() && skipped->is_boolean() && skipped->get<bool>();
    rows.push_back(std::move(row));
  }
  return rows;
}

json number_or_null(double value) { return std::isfinite(value) ? json(value) : json(nullptr); }
json whole_or_null(double value) {
  return std::isfinite(value) ? json(static_cast<std::int64_t>(std::llround(value)))
                              : json(nullptr);
}

namespace {

json summarize(const std::vector<Row>& rows) {
  json out = json::object();
  json final = json::object();
  std::int64_t skipped = 0;
  for (const Row& row : rows) {
    if (std::isfinite(row.loss)) final["loss"] = row.loss;
    for (const auto& [key, value] : row.validation) final[key] = number_or_null(value);
    skipped += row.skipped ? 1 : 0;
  }
  out["steps"] = rows.empty() ? json(0) : whole_or_null(rows.back().step);
  out["final"] = std::move(final);
  out["skipped"] = skipped;
  out["step_ms"] = number_or_null(median_of(rows, [](const Row& r) { return r.step_ms; }));
  out["gradient_ms"] = number_or_null(median_of(rows, [](const Row& r) { return r.gradient_ms; }));
  json optimizer = json::object();
  optimizer["total"] = number_or_null(median_of(rows, [](const Row& r) { return r.optimizer_ms; }));
  for (std::size_t p = 0; p + 1 < phases.size(); ++p) {
    // As in StepTimes: `update` holds `lmo`.
    optimizer[phases[p].key] = number_or_null(median_of(
        rows, [p](const Row& r) { return r.phase_ms[p] + (p == 4 ? r.phase_ms[3] : 0); }));
  }
  out["optimizer_ms"] = std::move(optimizer);
  out["items_per_s"] = number_or_null(median_of(rows, [](const Row& r) { return r.items_per_s; }));
  out["bytes_per_step"] = whole_or_null(median_of(rows, [](const Row& r) { return r.bytes; }));
  out["bytes_per_step_max"] =
      whole_or_null(median_of(rows, [](const Row& r) { return r.bytes_max; }));
  out["messages_per_step"] =
      whole_or_null(median_of(rows, [](const Row& r) { return r.messages; }));
  return out;
}

}  // namespace

json complete_summary(const std::string& summary_json, const std::vector<Row>& rows) {
  json summary = parse_object(summary_json);
  const json from_metrics = summarize(rows);
  for (const auto& [key, value] : from_metrics.items()) {
    if (!summary.contains(key)) summary[key] = value;
  }
  if (!summary.contains("status")) summary["status"] = "unfinished";
  return summary;
}

double state_bytes(const json& summary) {
  double most = number(summary, "state_bytes_max");
  if (std::isfinite(most)) return most;
  const auto memory = summary.find("memory");
  if (memory == summary.end() || !memory->is_array()) return nan_value;
  for (const json& rank : *memory) {
    if (!rank.is_object()) continue;
    const double state = number(rank, "state");
    if (!(most >= state)) most = state;
  }
  return most;
}

std::string rules_of(const json& summary) {
  const auto groups = summary.find("groups");
  if (groups == summary.end() || !groups->is_array()) return {};
  std::string out;
  for (const json& group : *groups) {
    if (!group.is_object()) continue;
    const std::string rule = text(group, "rule");
    if (rule.empty() || (", " + out + ",").find(", " + rule + ",") != std::string::npos) continue;
    out += (out.empty() ? "" : ", ") + rule;
  }
  return out;
}

}  // namespace report

std::string metrics_summary(const std::string& metrics_jsonl) {
  return report::summarize(report::read_rows(metrics_jsonl)).dump();
}

}  // namespace orthrus::runtime
