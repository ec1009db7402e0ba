#include "runtime/cli/study_export.hpp"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <string>

#include "runtime/cli/json_number.hpp"
#include "runtime/cli/study_table.hpp"

namespace orthrus::cli {

using nlohmann::ordered_json;

namespace {

std::string dump(const ordered_json& value) {
  return value.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

/// Keys of nested objects joined by dots, as columns.
void flatten(const ordered_json& object, const std::string& prefix, ordered_json& out) {
  for (const auto& entry : object.items()) {
    if (entry.value().is_object()) {
      flatten(entry.value(), prefix + entry.key() + ".", out);
    } else {
      out[prefix + entry.key()] = entry.value();
    }
  }
}

std::string csv(const StudyResults& study) {
  StudyTable table;
  std::vector<ordered_json> rows;
  ordered_json columns = ordered_json::object();
  for (const StudyTrial& trial : study.trials) {
    ordered_json flat = ordered_json::object();
    flatten(trial.line, "", flat);
    flat.erase("t");
    for (const auto& entry : flat.items()) columns[entry.key()] = nullptr;
    rows.push_back(std::move(flat));
  }
  for (const auto& entry : columns.items()) table.columns.push_back(entry.key());
  for (const ordered_json& row : rows) {
    std::vector<ordered_json> cells;
    for (const std::string& column : table.columns) {
      const auto found = row.find(column);
      cells.push_back(found == row.end() ? ordered_json(nullptr) : *found);
    }
    table.rows.push_back(std::move(cells));
  }
  return table_csv(table);
}

std::string wandb(const StudyResults& study) {
  ordered_json runs = ordered_json::array();
  for (const StudyTrial& trial : study.trials) {
    ordered_json summary = trial.line, history = ordered_json::array();
    for (const char* key : {"t", "trial", "params", "state"}) summary.erase(key);
    for (ordered_json& line : study.metrics(trial, "eval")) {
      ordered_json row{{"_step", line.value("step", ordered_json(nullptr))},
                       {"_runtime", line.value("wall_s", ordered_json(nullptr))}};
      for (const char* key : {"t", "trial", "step", "wall_s"}) line.erase(key);
      row.update(line);
      history.push_back(std::move(row));
    }
    // What W&B calls a run: finished, crashed or failed.
    const bool failed = trial.state == "failed";
    runs.push_back({{"id", trial.id},
                    {"name", fmt::format("{:04d}-{}", trial.index, trial.id)},
                    {"group", study.name},
                    {"state", failed ? "failed" : "finished"},
                    {"tags", {trial.state}},
                    {"config", trial.params},
                    {"summary", std::move(summary)},
                    {"history", std::move(history)}});
  }
  return dump(runs) + "\n";
}

/// The events of one trial. Its clock starts at 0: results carry durations, not times of day.
class EventLog {
 public:
  explicit EventLog(const StudyTrial& trial) : trial_(trial) {}
  void add(double seconds, const char* type, const char* key, const ordered_json& value,
           const ordered_json& metadata = ordered_json::object()) {
    ordered_json about{{"file", "results.jsonl"}, {"lineno", 0}, {"trial", trial_.id}};
    about.update(metadata);
    const ordered_json line{
        {"namespace", ""},    {"time_ms", std::isfinite(seconds) ? std::llround(1e3 * seconds) : 0},
        {"event_type", type}, {"key", key},
        {"value", value},     {"metadata", about}};
    text += ":::MLLOG " + dump(line) + "\n";
  }
  void point(const char* key, const ordered_json& value) { add(0, "POINT_IN_TIME", key, value); }
  /// A parameter under the key of the log, where the trial has it.
  void param(const char* key, const char* name) {
    if (const auto found = trial_.params.find(name); found != trial_.params.end()) {
      point(key, *found);
    }
  }
  std::string text;

 private:
  const StudyTrial& trial_;
};

std::string mllog_of(const StudyResults& study, const StudyTrial& trial) {
  EventLog log(trial);
  log.add(0, "INTERVAL_START", "init_start", nullptr);
  log.point("submission_benchmark", study.name);
  log.param("seed", "seed");
  log.param("global_batch_size", "batch_size");
  log.point("gradient_accumulation_steps", trial.params.value("accumulation", ordered_json(1)));
  log.param("opt_name", "optimizer");
  log.param("opt_base_learning_rate", "lr");
  log.param("opt_weight_decay", "weight_decay");
  log.param("opt_learning_rate_warmup_steps", "warmup_steps");
  log.param("max_sequence_length", "sequence_length");
  log.add(0, "INTERVAL_END", "init_stop", nullptr);
  log.add(0, "INTERVAL_START", "run_start", nullptr);
  log.add(0, "INTERVAL_START", "block_start", nullptr);
  double last = 0, examples = 0;
  for (const ordered_json& line : study.metrics(trial, "eval")) {
    const auto at = [&](const char* key) { return number_of(line.value(key, ordered_json())); };
    if (std::isfinite(at("wall_s"))) last = at("wall_s");
    if (std::isfinite(at("examples"))) examples = at("examples");
    const ordered_json where{{"samples_count", line.value("examples", ordered_json(nullptr))}};
    log.add(last, "INTERVAL_START", "eval_start", nullptr, where);
    log.add(last, "POINT_IN_TIME", "eval_accuracy", line.value("val_loss", ordered_json(nullptr)),
            where);
    log.add(last, "INTERVAL_END", "eval_stop", nullptr, where);
  }
  log.add(last, "INTERVAL_END", "block_stop", nullptr);
  if (last > 0) {
    log.add(last, "POINT_IN_TIME", "tracked_stats", {{"throughput", examples / last}});
  }
  log.add(last, "INTERVAL_END", "run_stop", nullptr,
          {{"status", trial.state == "complete" ? "success" : "aborted"}});
  return log.text;
}

std::string mllog(const StudyResults& study) {
  std::string out;
  for (const StudyTrial& trial : study.trials) out += mllog_of(study, trial);
  return out;
}

}  // namespace

std::span<const ExportFormat> export_formats() {
  static constexpr std::array formats{
      ExportFormat{"csv", "a row per trial, nested keys joined by dots", csv},
      ExportFormat{"wandb", "config, summary and history per trial, as JSON", wandb},
      ExportFormat{"mllog", "MLPerf's event log, lines :::MLLOG {json}", mllog}};
  return formats;
}

}  // namespace orthrus::cli
