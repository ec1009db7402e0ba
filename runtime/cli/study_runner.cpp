#include "runtime/cli/study_runner.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <orthrus/error.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "runtime/agree.hpp"
#include "runtime/cli/shared_config.hpp"
#include "runtime/cli/study_analysis.hpp"
#include "runtime/cli/study_coordinates.hpp"
#include "runtime/cli/study_directory.hpp"
#include "runtime/cli/study_presets.hpp"
#include "runtime/cli/study_run.hpp"
#include "runtime/cli/study_scaling.hpp"
#include "runtime/cli/training.hpp"
#include "runtime/report.hpp"
#include "runtime/runner/study_keys.hpp"
#include "runtime/runner/sweep.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::cli {
namespace {

namespace fs = std::filesystem;
using runner::Json;

struct Given {
  StudyRunOptions run;
  PresetOptions preset;
  double target = std::nan("");
  std::string preset_name, out, where, trial, directory, import_base;
  std::vector<std::string> configs;
};

void print(const Json& document) {
  fmt::print("{}\n", document.dump(2, ' ', false, Json::error_handler_t::replace));
}

std::string text_of(const Json& value) {
  if (value.is_null()) return "-";
  if (value.is_number_float()) return fmt::format("{:.5g}", value.get<double>());
  return value.is_string() ? value.get<std::string>() : value.dump();
}

/// Columns as wide as they need be.
void print_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> width;
  for (const auto& row : rows) {
    width.resize(std::max(width.size(), row.size()));
    for (std::size_t c = 0; c < row.size(); ++c) width[c] = std::max(width[c], row[c].size());
  }
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t c = 0; c < row.size(); ++c) line += fmt::format("{:<{}}  ", row[c], width[c]);
    fmt::print("{}\n", line.substr(0, line.find_last_not_of(' ') + 1));
  }
}

// ---- looking at a study -------------------------------------------------------------------------

int status(const Given& given, Context& context) {
  const StudyRecord study = read_study_record(given.directory);
  std::map<std::string, std::int64_t> states;
  double seconds = 0;
  std::int64_t finished = 0;
  for (const auto& [index, trial] : study.trials) {
    ++states[trial.state];
    if (!trial.finished()) continue;
    ++finished;
    seconds += trial.seconds;
  }
  const std::int64_t known = std::max(study.known, std::ssize(study.trials));
  states["waiting"] += known - std::ssize(study.trials);
  const double rest = study.seconds_left();
  const bool ended = study.last.value("t", "") == "end";
  Json out{{"schema", 1},
           {"study", study.resolved.value("name", "")},
           {"status", ended ? study.last.value("state", "") : "running or killed"},
           {"last_line", study.last.value("time", "")},
           {"trials", known},
           {"finished", finished},
           {"states", states},
           {"trial_seconds", seconds},
           {"groups", study.groups},
           {"seconds_left", std::isnan(rest) ? Json(nullptr) : Json(rest)},
           {"tuned", study.choices}};
  if (context.json) {
    print(out);
    return 0;
  }
  fmt::print("study {}: {}; last line of the journal {}\n", text_of(out["study"]),
             text_of(out["status"]), text_of(out["last_line"]));
  for (const auto& [state, count] : states) {
    if (count > 0) fmt::print("  {:<9} {}\n", state, count);
  }
  if (finished < known && finished > 0) {
    fmt::print("about {} left on {} group{}, longest first, at the pace of the trials that ended\n",
               runtime::format_seconds(rest), study.groups, study.groups == 1 ? "" : "s");
  }
  for (const Json& choice : study.choices) {
    std::string point;
    for (const auto& [name, value] : choice.at("params").items())
      point += name + "=" + text_of(value) + " ";
    fmt::print("  {}lr {}{}\n", point, text_of(choice.at("lr")),
               choice.value("edge_optimum", false) ? " (at the edge of what was tried)" : "");
  }
  return 0;
}

int ls(const Given& given, Context& context) {
  const StudyRecord study = read_study_record(given.directory);
  std::optional<runner::Expression> where;
  try {
    if (!given.where.empty()) where.emplace(given.where);
  } catch (const std::invalid_argument& wrong) {
    throw ConfigError(std::string("--where: ") + wrong.what(), ExitCode::usage);
  }
  Json all = Json::array();
  std::vector<std::vector<std::string>> rows{
      {"trial", "state", "role", "steps", "target", "best", "s", "params"}};
  for (const auto& [index, trial] : study.trials) {
    Json row =
        trial.record.is_object() ? trial.record : Json{{"index", index}, {"trial", trial.id}};
    row["state"] = trial.state;
    row["attempt"] = trial.attempts;
    row["seconds"] = trial.seconds;
    const auto variable = [&](const std::string& name) -> std::optional<runner::Value> {
      const Json* value = nullptr;
      if (row.contains("params") && row["params"].contains(name)) value = &row["params"][name];
      if (row.contains(name)) value = &row[name];
      if (value == nullptr || value->is_structured()) return {};
      if (value->is_null()) return std::nan("");
      if (value->is_boolean()) return value->get<bool>() ? 1.0 : 0.0;
      if (value->is_number()) return value->get<double>();
      return value->get<std::string>();
    };
    try {
      if (where && !where->truth(variable)) continue;
    } catch (const std::invalid_argument& wrong) {
      throw ConfigError(std::string("--where: ") + wrong.what(), ExitCode::usage);
    }
    std::string params;
    if (row.contains("params")) {
      for (const auto& [name, value] : row["params"].items())
        params += name + "=" + text_of(value) + " ";
    }
    const auto at = [&](const char* key) { return row.contains(key) ? text_of(row[key]) : "-"; };
    rows.push_back({fmt::format("{:04}-{}", index, trial.id), trial.state, at("role"), at("steps"),
                    at("steps_to_target"), at("best_val"), fmt::format("{:.2f}", trial.seconds),
                    params});
    all.push_back(std::move(row));
  }
  if (context.json) {
    print(all);
  } else {
    print_table(rows);
  }
  return 0;
}

int retry(const Given& given) {
  const fs::path directory = given.directory;
  const StudyRecord study = read_study_record(directory);
  std::vector<std::pair<std::int64_t, std::string>> found;
  // Digits alone are an index: an id has 16 hex digits, and rarely begins with none but digits.
  const bool is_index =
      given.trial.size() < 8 && given.trial.find_first_not_of("0123456789") == std::string::npos;
  for (const auto& [index, trial] : study.trials) {
    const std::string name = fmt::format("{:04}-{}", index, trial.id);
    if (is_index ? index == std::stoll(given.trial)
                 : trial.id.starts_with(given.trial) || name == given.trial)
      found.emplace_back(index, trial.id);
  }
  if (found.size() != 1) {
    throw ConfigError(fmt::format("{}: {}: {} trials of that id; `orthrus study ls` has them",
                                  directory.string(), given.trial,
                                  found.empty() ? "no" : "several"));
  }
  const DirectoryLock lock(directory);
  runner::Journal journal(directory / "journal.jsonl");
  journal.write({{"t", "state"},
                 {"index", found[0].first},
                 {"trial", found[0].second},
                 {"state", "waiting"},
                 {"message", "retry"},
                 {"time", utc_now()}});
  fmt::print("{:04}-{} waits; `orthrus study run --resume` runs it again\n", found[0].first,
             found[0].second);
  return 0;
}

/// What a reader of the results should know. @return lines.
std::vector<std::string> findings(const StudyRecord& study) {
  std::vector<std::string> out;
  std::int64_t finished = 0, censored = 0, failed = 0, quantized = 0;
  for (const auto& [index, trial] : study.trials) {
    if (!trial.finished()) continue;
    ++finished;
    censored += trial.state == "censored" ? 1 : 0;
    failed += trial.state == "failed" ? 1 : 0;
    const Json& steps = trial.record["steps_to_target"];
    quantized += steps.is_number() && steps.get<double>() < 20 ? 1 : 0;
  }
  const std::int64_t known = std::max(study.known, std::ssize(study.trials));
  if (finished < known)
    out.push_back(fmt::format("{} of {} trials have no result", known - finished, known));
  if (failed > 0) out.push_back(fmt::format("{} trials failed", failed));
  if (finished > 0 && 10 * censored > 3 * finished)
    out.push_back(fmt::format("{} of {} trials are censored: a longer budget, or an easier target",
                              censored, finished));
  if (quantized > 0)
    out.push_back(
        fmt::format("{} trials reach the target in under 20 steps: counts that coarse are "
                    "poor measurements",
                    quantized));
  std::map<int, Json> last;
  for (const Json& choice : study.choices) last[choice.at("cell").get<int>()] = choice;
  for (const auto& [cell, choice] : last) {
    if (choice.value("edge_optimum", false))
      out.push_back("the best rate is at the edge of what was tried: " + choice["params"].dump());
    if (choice["lr"].is_null()) out.push_back("every rate diverged: " + choice["params"].dump());
  }
  const Json& parameters = study.resolved["search"]["parameters"];
  std::size_t seeds = 1;
  if (parameters.contains("seed") && parameters["seed"].is_object()) {
    const Json& seed = parameters["seed"];
    seeds = seed.contains("report") ? seed["report"].size()
                                    : seed.value("values", Json::array()).size();
  }
  if (seeds < 3) out.push_back(fmt::format("{} seeds are reported; three are the least", seeds));
  if (study.versions.size() > 1)
    out.push_back(fmt::format("run by several versions: {}", fmt::join(study.versions, ", ")));
  return out;
}

/// The steepest of each rate.
std::vector<const CoordinateSlope*> steepest_of(const std::vector<CoordinateSlope>& slopes) {
  std::map<double, const CoordinateSlope*> steepest;
  for (const CoordinateSlope& s : slopes) {
    const CoordinateSlope*& most = steepest[s.lr];
    if (most == nullptr || std::abs(s.slope) > std::abs(most->slope)) most = &s;
  }
  std::vector<const CoordinateSlope*> out;
  for (const auto& [lr, s] : steepest) out.push_back(s);
  return out;
}

int check(const Given& given, Context& context) {
  const fs::path directory = given.directory;
  const StudyRecord study = read_study_record(directory);
  static_cast<void>(runner::load_study((directory / "study.yaml").string()));
  std::vector<std::string> lines = findings(study);
  if (fs::exists(directory / "results.jsonl")) {
    for (const StudyWarning& missing : missing_cells(read_study(directory)))
      lines.push_back(missing.text);
  }
  const std::vector<CoordinateSlope> slopes = coordinate_slopes(study, directory);
  for (const CoordinateSlope* const s : steepest_of(slopes)) {
    if (std::abs(s->slope) <= most_coordinate_slope) continue;
    lines.push_back(
        fmt::format("coordinate check: lr {:g}: pre-activations go with size^{:.2f} ({} after {} "
                    "steps): its effect hangs on the size",
                    s->lr, s->slope, s->parameter, s->step));
  }
  if (context.json) {
    Json coordinates = Json::array();
    for (const CoordinateSlope& s : slopes) {
      coordinates.push_back({{"lr", s.lr},
                             {"parameter", s.parameter},
                             {"step", s.step},
                             {"slope", runner::number(s.slope)},
                             {"sizes", s.sizes}});
    }
    print({{"schema", 1},
           {"study", study.resolved.value("name", "")},
           {"findings", lines},
           {"coordinates", std::move(coordinates)}});
    return 0;
  }
  for (const CoordinateSlope* const s : steepest_of(slopes)) {
    if (std::abs(s->slope) > most_coordinate_slope) continue;
    fmt::print("coordinate check: lr {:g}: passed; at most size^{:+.3f}\n", s->lr, s->slope);
  }
  for (const std::string& line : lines) fmt::print("warning: {}\n", line);
  if (lines.empty()) fmt::print("nothing to warn of\n");
  return 0;
}

int schema(Context& context) {
  Json all = Json::array();
  std::vector<std::vector<std::string>> rows;
  for (const runner::StudyKey& key : runner::study_keys()) {
    all.push_back(
        {{"path", key.path}, {"type", key.type}, {"default", key.default_value}, {"doc", key.doc}});
    const std::string value = key.default_value.empty() ? "" : " (" + key.default_value + ")";
    rows.push_back({key.path + value, key.type.size() > 40 ? "see the doc" : key.type, key.doc});
  }
  if (context.json) {
    print(all);
  } else {
    print_table(rows);
  }
  return 0;
}

// ---- running ------------------------------------------------------------------------------------

int finish(const StudyEnd& end, Context& context) {
  if (context.rank() == 0) {
    if (context.json) {
      print(end.document);
    } else if (end.document.contains("status")) {
      std::string states;
      for (const auto& [state, count] : end.document["states"].items())
        states += fmt::format(", {} {}", count.get<int>(), state);
      fmt::print("{}: {} of {} trials{} | {} | {}\n", text_of(end.document["status"]),
                 end.document["finished"].get<std::int64_t>(),
                 end.document["trials"].get<std::int64_t>(), states,
                 runtime::format_seconds(end.document["seconds"].get<double>()),
                 (end.directory / "results.jsonl").string());
    }
  }
  return end.complete ? 0 : static_cast<int>(ExitCode::preempted);
}

/// A file as it is called from another place.
std::string seen_from(const fs::path& file, const fs::path& from) {
  return fs::proximate(file, from.empty() ? "." : from).string();
}

std::vector<PresetBase> read_bases(const std::vector<std::string>& files, const fs::path& from) {
  std::vector<PresetBase> bases;
  for (const std::string& file : files) bases.push_back({seen_from(file, from), load_config(file)});
  return bases;
}

int init(Given& given) {
  const Preset& preset = find_preset(given.preset_name);
  if (std::ssize(given.configs) < preset.bases) {
    throw ConfigError(
        fmt::format("study init {}: give {}", preset.name,
                    preset.bases == 1 ? "a configuration" : "two or more configurations"),
        ExitCode::usage);
  }
  if (preset.bases == 0 && !given.configs.empty()) {
    throw ConfigError(fmt::format("study init {}: takes no configuration", preset.name),
                      ExitCode::usage);
  }
  const fs::path out =
      given.out.empty() ? fs::path(given.preset_name + ".yaml") : fs::path(given.out);
  if (fs::exists(out)) throw ConfigError(out.string() + ": exists; give another --out");
  if (given.preset.name.empty()) given.preset.name = out.stem().string();
  if (!std::isnan(given.target)) given.preset.target = given.target;
  if (given.preset.ranks.empty() && preset.bases == 0) given.preset.ranks = {2, 4};
  if (given.preset.ranks.empty()) given.preset.ranks = {1, 2, 4};
  make_directories(out.parent_path());
  runtime::write_file_atomically(
      out, preset.text(read_bases(given.configs, out.parent_path()), given.preset));
  fmt::print("{}: orthrus study run {}\n", out.string(), out.string());
  return 0;
}

/// `study import SWEEP.yaml`
int import_sweep(const Given& given) {
  const fs::path out = given.out.empty()
                           ? fs::path(fs::path(given.run.file).stem().string() + ".study.yaml")
                           : fs::path(given.out);
  if (fs::exists(out)) throw ConfigError(out.string() + ": exists; give another --out");
  const std::string text =
      runner::study_of_sweep(runtime::read_file(given.run.file), given.run.file, given.import_base);
  // What comes out is a study, or it is said here why not.
  static_cast<void>(runner::parse_study(text, out.string(), {}));
  make_directories(out.parent_path());
  runtime::write_file_atomically(out, text);
  fmt::print("{}: orthrus study run {}\n", out.string(), out.string());
  return 0;
}

/// The loss that the base comes to with a constant rate: what steps to a target are counted to.
double reference_loss(const PresetBase& base, std::int64_t steps) {
  Config config = base.config;
  for (GroupConfig& group : config.groups) group.schedule.kind = "constant";
  if (steps > 0) config.train.steps = steps;
  Training training(config, self_communicator(), self_communicator());
  while (training.steps() < config.train.steps)
    static_cast<void>(training.step([] { return Training::Word{}; }));
  return training.evaluate().at("val_loss");
}

std::vector<std::int64_t> powers_of_two_to(std::int64_t n) {
  std::vector<std::int64_t> out;
  for (std::int64_t r = 1; r <= n; r *= 2) out.push_back(r);
  return out;
}

/// Times over numbers of ranks, and of messages, where trials have measured them.
void print_times(const StudyEnd& end) {
  const StudyResults study = read_study(end.directory);
  const std::vector<ScalingSeries> scaling = scaling_of(study);
  for (const StudyTable& table :
       {scaling_table(scaling), planned_table(scaling), phases_table(scaling),
        roofline_table(scaling), messages_table(messages_of(study))}) {
    if (!table.rows.empty()) fmt::print("{}\n", table_text(table));
  }
  if (std::any_of(scaling.begin(), scaling.end(), [](const auto& s) { return s.suppressed(); }))
    fmt::print("more ranks than cores: times of those rows say nothing about scaling\n");
}

/// What fresh seeds say at the rates that were chosen.
void print_reports(const StudyEnd& end) {
  std::map<std::string, std::vector<const Json*>> points;
  std::vector<std::string> order;
  for (const auto& [index, record] : end.results) {
    if (record.at("role") != "report") continue;
    std::string point;
    for (const auto& [name, value] : record["params"].items()) {
      if (name != "seed" && name.find('.') == std::string::npos)
        point += name + "=" + text_of(value) + " ";
    }
    if (points.count(point) == 0) order.push_back(point);
    points[point].push_back(&record);
  }
  for (const std::string& point : order) {
    const auto mean = [&](const char* key) {
      double sum = 0, squares = 0;
      for (const Json* r : points[point]) {
        if (!(*r)[key].is_number()) return std::string("-");
        const double x = (*r)[key];
        sum += x;
        squares += x * x;
      }
      const auto n = static_cast<double>(points[point].size());
      const double m = sum / n,
                   variance = n > 1 ? std::max(0.0, (squares - n * m * m) / (n - 1)) : 0;
      return fmt::format("{:.5g} ± {:.2g}", m, std::sqrt(variance));
    };
    fmt::print("  {}| steps to target {} | final {}\n", point, mean("steps_to_target"),
               mean("final_val"));
  }
}

int run_preset(Given& given, Context& context, const std::string& preset_name,
               const std::string& kind) {
  Communicator world = context.world();
  std::string message;
  runtime::agree(world, [&] {
    if (world.rank() != 0) return;
    const Preset& preset = find_preset(preset_name);
    const fs::path folder = "studies";
    const std::vector<PresetBase> bases = read_bases(given.configs, folder);
    PresetOptions& o = given.preset;
    if (o.name.empty()) {
      for (const PresetBase& base : bases) o.name += base.config.name + "-";
      o.name += kind;
    }
    if (o.ranks.empty()) o.ranks = powers_of_two_to(world.size());
    const fs::path file = folder / (o.name + ".yaml");
    given.run.file = file.string();
    if (kind == "critical-batch") {
      // A study that is continued has its target already.
      if (!std::isnan(given.target)) {
        o.target = given.target;
      } else if (!given.run.resume || !fs::exists(file)) {
        o.target = reference_loss(bases[0], o.steps);
        if (!context.json)
          fmt::print("target: val_loss {:.6g}, of the base with a constant rate\n", *o.target);
      }
    }
    const bool kept = given.run.resume && fs::exists(file);
    const std::string text = kept ? runtime::read_file(file) : preset.text(bases, o);
    if (!kept && !given.run.dry_run) {
      if (fs::exists(file) && runtime::read_file(file) != text) {
        throw ConfigError(
            file.string() +
            ": another study of that name; continue it with --resume, or give --name");
      }
      make_directories(folder);
      runtime::write_file_atomically(file, text);
    }
    given.run.text = text;
    message = Json{{"file", given.run.file}, {"text", text}}.dump();
  });
  world.broadcast(message, 0);
  const Json shared = Json::parse(message);
  given.run.file = shared["file"];
  given.run.text = shared["text"];
  const StudyEnd end = run_study(given.run, context);
  if (context.rank() == 0 && !context.json && !given.run.dry_run) {
    print_times(end);
    if (kind != "scaling") print_reports(end);
  }
  return finish(end, context);
}

}  // namespace

std::function<std::optional<int>(Context&)> add_study_runner(CLI::App& app) {
  const auto given = std::make_shared<Given>();
  using Command = std::function<int(Context&)>;
  std::vector<std::pair<CLI::App*, Command>> table;

  const auto add_run_options = [given](CLI::App* command) {
    StudyRunOptions& o = given->run;
    command->add_option("--dir", o.directory, "Where it goes; default studies/<name>");
    command->add_flag("--resume", o.resume, "Continue; finished trials are not run again");
    command->add_option("--set", o.set,
                        "Key of the study file, or parameter: lr=0.01,0.02; may be repeated");
    command->add_flag("--dry-run", o.dry_run, "What it would cost, and its first trials");
    command->add_option("--time-limit", o.time_limit, "3h, 90m, 45s: then stop, and end with 75");
    command->add_flag("--allow-version-mix", o.allow_version_mix,
                      "Resume what another version has begun");
  };
  CLI::App* const run = app.add_subcommand("run", "Run the trials of a study");
  run->add_option("STUDY", given->run.file, "Study file (YAML)")->required();
  add_run_options(run);
  table.emplace_back(run, [given](Context& context) {
    const StudyEnd end = run_study(given->run, context);
    if (context.rank() == 0 && !context.json && !given->run.dry_run) print_times(end);
    return finish(end, context);
  });

  CLI::App* const job = app.add_subcommand("trial", "A trial of a running study")->group("");
  job->add_option("JOB", given->run.file)->required();
  table.emplace_back(job,
                     [given](Context& context) { return run_trial_job(given->run.file, context); });

  // What only looks at files is done by one process.
  const auto alone = [](std::function<int(Context&)> command) {
    return [command = std::move(command)](Context& context) {
      return context.rank() == 0 ? command(context) : 0;
    };
  };
  const auto add_alone = [&](const char* name, const char* doc, Command command) {
    CLI::App* const sub = app.add_subcommand(name, doc);
    table.emplace_back(sub, alone(std::move(command)));
    return sub;
  };
  const auto add_directory = [given](CLI::App* sub) {
    sub->add_option("DIR", given->directory, "Directory of the study")->required();
  };

  std::string known;
  for (const Preset& preset : presets())
    known += fmt::format("  {:<20} {}\n", preset.name, preset.doc);
  CLI::App* const make = add_alone("init", "Write the study file of a preset",
                                   [given](Context&) { return init(*given); });
  make->add_option("PRESET", given->preset_name, "See below")->required();
  make->add_option("CONFIG", given->configs, "Configurations that it is made of");
  make->add_option("--out", given->out, "File; default PRESET.yaml");
  make->footer("Presets:\n" + known);

  CLI::App* const sweep = add_alone("import", "A sweep of Weights & Biases as a study file",
                                    [given](Context&) { return import_sweep(*given); });
  sweep->add_option("SWEEP", given->run.file, "Sweep (YAML): grid or random")->required();
  sweep->add_option("--base", given->import_base,
                    "Configuration that its parameters are of; without it, its program is run");
  sweep->add_option("--out", given->out, "File; default SWEEP.study.yaml");

  add_directory(add_alone("status", "How far a study is",
                          [given](Context& context) { return status(*given, context); }));
  CLI::App* const list =
      add_alone("ls", "Its trials", [given](Context& context) { return ls(*given, context); });
  add_directory(list);
  list->add_option("--where", given->where, "\"optimizer == muon && state == diverged\"");
  CLI::App* const again =
      add_alone("retry", "Have a trial run again", [given](Context&) { return retry(*given); });
  again->add_option("TRIAL", given->trial, "Its id, the beginning of it, or its index")->required();
  add_directory(again);
  add_directory(add_alone("check", "What to know before believing it",
                          [given](Context& context) { return check(*given, context); }));
  add_alone("schema", "Every key of a study file",
            [](Context& context) { return schema(context); });

  struct Short {
    const char *name, *preset, *doc;
  };
  for (const Short& s :
       {Short{"critical-batch", "cbs-steps-to-target", "Critical batch size of a configuration"},
        Short{"lr", "learning-rate", "Best learning rate of a configuration"},
        Short{"compare", "compare", "Configurations beside each other, each at its best rate"},
        Short{"scaling", "strong-scaling", "Times of a step over numbers of ranks"}}) {
    CLI::App* const sub = app.add_subcommand(s.name, s.doc);
    CLI::Option* const configs =
        sub->add_option("CONFIG", given->configs, "Configuration (YAML)")->required();
    if (std::string(s.name) == "compare") {
      configs->expected(2, 1000);
    } else {
      configs->expected(1);
    }
    add_run_options(sub);
    sub->add_option("--name", given->preset.name, "Of the study");
    sub->add_option("--steps", given->preset.steps, "Per trial")->check(CLI::PositiveNumber);
    if (std::string(s.name) == "critical-batch") {
      sub->add_option(
          "--target", given->target,
          "val_loss to be reached; default: what the base reaches with a constant rate");
      sub->add_option("--batches", given->preset.batches, "Batch sizes")->delimiter(',');
    }
    if (std::string(s.name) == "scaling")
      sub->add_option("--ranks", given->preset.ranks, "Numbers of ranks")->delimiter(',');
    table.emplace_back(sub, [given, s](Context& context) {
      return run_preset(*given, context, s.preset, s.name);
    });
  }

  return [table](Context& context) -> std::optional<int> {
    for (const auto& [sub, command] : table) {
      if (sub->parsed()) return command(context);
    }
    return {};
  };
}

}  // namespace orthrus::cli
