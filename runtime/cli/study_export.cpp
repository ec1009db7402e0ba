#include "runtime/cli/study_export.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <orthrus/config.hpp>
#include <orthrus/error.hpp>
#include <string>
#include <system_error>
#include <variant>
#include <vector>

#include "runtime/cli/study_table.hpp"
#include "runtime/runner/expansion.hpp"
#include "runtime/safetensors.hpp"

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

/// What a trial was trained with: of its configuration where it has one, else of its parameters.
struct Recipe {
  ordered_json seed, batch, accumulation, optimizer, rate, weight_decay, warmup_steps;
};

ordered_json number_in(const RuleConfig& rule, const char* key) {
  const auto found = rule.values.find(key);
  const double* const value =
      found == rule.values.end() ? nullptr : std::get_if<double>(&found->second);
  return value == nullptr ? ordered_json(nullptr) : ordered_json(*value);
}

Recipe recipe_of(const StudyResults& study, const StudyTrial& trial) {
  const auto param = [&](const char* name) { return trial.params.value(name, ordered_json()); };
  Recipe out{param("seed"), param("batch_size"),   param("accumulation"), param("optimizer"),
             param("lr"),   param("weight_decay"), param("warmup_steps")};
  const std::filesystem::path file = study.directory / trial.directory() / "config.resolved.yaml";
  std::error_code error;
  if (!std::filesystem::exists(file, error)) return out;
  Config config;
  try {
    config = parse_config(runtime::read_file(file), file.string());
  } catch (const ConfigError&) {
    return out;  // of a program: its parameters alone
  }
  const GroupConfig& main = config.groups.at(runner::main_group(config));
  double ranks = trial.param("ranks");
  if (!(ranks >= 1)) ranks = number_of(study.setting("execution.ranks_per_trial"));
  out.seed = config.seed;
  out.batch = config.train.batch;
  out.accumulation = config.virtual_shards > 0 && ranks >= 1
                         ? config.virtual_shards / static_cast<std::int64_t>(ranks)
                         : std::max<std::int64_t>(config.train.micro_batches, 1);
  out.optimizer = main.rule.name;
  out.rate = number_in(main.rule, "lr");
  out.weight_decay = number_in(main.rule, "weight_decay");
  out.warmup_steps = main.schedule.warmup_steps;
  return out;
}

/// The events of one trial, with the line of the study's files that each is of. Its clock starts at
/// 0: results carry durations, not times of day.
class EventLog {
 public:
  explicit EventLog(const StudyTrial& trial)
      : about_{{"file", "results.jsonl"}, {"lineno", trial.line_number}, {"trial", trial.id}} {}
  void add(double seconds, const char* type, const char* key, const ordered_json& value,
           const ordered_json& metadata = ordered_json::object()) {
    ordered_json about = about_;
    about.update(metadata);
    const ordered_json line{
        {"namespace", ""},    {"time_ms", std::isfinite(seconds) ? std::llround(1e3 * seconds) : 0},
        {"event_type", type}, {"key", key},
        {"value", value},     {"metadata", about}};
    text += ":::MLLOG " + dump(line) + "\n";
  }
  void point(const char* key, const ordered_json& value) { add(0, "POINT_IN_TIME", key, value); }
  std::string text;

 private:
  const ordered_json about_;
};

std::string mllog_of(const StudyResults& study, const StudyTrial& trial) {
  const ordered_json& name = study.setting("search.metric.name");
  const std::string metric = name.is_string() ? name.get<std::string>() : "val_loss";
  const std::vector<JsonLine> evaluations = study.metric_lines(trial, "eval");
  ordered_json length;  // of a sequence: items of an example
  for (const auto& [number, line] : evaluations) {
    const double examples = number_of(line.value("examples", ordered_json())),
                 tokens = number_of(line.value("tokens", ordered_json()));
    if (examples > 0 && tokens > 0) length = std::llround(tokens / examples);
  }
  const Recipe recipe = recipe_of(study, trial);
  EventLog log(trial);
  log.add(0, "INTERVAL_START", "init_start", nullptr);
  log.point("submission_benchmark", study.name);
  log.point("seed", recipe.seed);
  log.point("global_batch_size", recipe.batch);
  log.point("gradient_accumulation_steps", recipe.accumulation);
  log.point("opt_name", recipe.optimizer);
  log.point("opt_base_learning_rate", recipe.rate);
  log.point("opt_weight_decay", recipe.weight_decay);
  log.point("opt_learning_rate_warmup_steps", recipe.warmup_steps);
  log.point("max_sequence_length", length);
  log.add(0, "INTERVAL_END", "init_stop", nullptr);
  log.add(0, "INTERVAL_START", "run_start", nullptr);
  log.add(0, "INTERVAL_START", "block_start", nullptr);
  double last = 0, examples = 0;
  for (const auto& [number, line] : evaluations) {
    const auto at = [&, &line = line](const char* key) { return line.value(key, ordered_json()); };
    if (const double s = number_of(at("wall_s")); std::isfinite(s)) last = s;
    if (const double n = number_of(at("examples")); std::isfinite(n)) examples = n;
    const ordered_json where{{"file", trial.directory() + "/metrics.jsonl"},
                             {"lineno", number},
                             {"samples_count", at("examples")}};
    log.add(last, "INTERVAL_START", "eval_start", nullptr, where);
    log.add(last, "POINT_IN_TIME", "eval_accuracy", at(metric.c_str()), where);
    log.add(last, "INTERVAL_END", "eval_stop", nullptr, where);
  }
  log.add(last, "INTERVAL_END", "block_stop", nullptr);
  const ordered_json rate = last > 0 ? ordered_json(examples / last) : ordered_json(nullptr);
  log.add(last, "POINT_IN_TIME", "tracked_stats", {{"throughput", rate}});
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
