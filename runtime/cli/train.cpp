// orthrus train: data-parallel training of a bundled workload, written on the public API.
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <exception>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <orthrus/config.hpp>
#include <orthrus/error.hpp>
#include <orthrus/sharded_optimizer.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "optim/rule.hpp"
#include "runtime/agree.hpp"
#include "runtime/cli/command.hpp"
#include "runtime/cli/gns_ramp.hpp"
#include "runtime/cli/learning_times.hpp"
#include "runtime/cli/progress.hpp"
#include "runtime/cli/run_directory.hpp"
#include "runtime/cli/shared_config.hpp"
#include "runtime/cli/signals.hpp"
#include "runtime/cli/training.hpp"
#include "runtime/report.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::cli {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

struct Options {
  std::string config;
  std::string run_dir;
  std::optional<std::int64_t> steps;
  std::vector<std::string> set;
  std::string progress = "auto";
  bool resume = false;
  bool convert = false;
  bool print_config = false;
};

double ms_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

std::string dump(const json& value, int indent = -1) {
  return value.dump(indent, ' ', false, json::error_handler_t::replace);
}

// ---- facts about a model ------------------------------------------------------------------------

/// XXH3 over the names and values of all weights, in order: equal exactly when the weights are.
std::string hash_weights(const std::vector<Parameter>& parameters) {
  std::string digests;
  std::vector<std::byte> packed;
  for (const Parameter& p : parameters) {
    const std::size_t item = bytes_of(p.dtype);
    const auto count = static_cast<std::size_t>(elements_of(p));
    const auto* const data = static_cast<const std::byte*>(p.weights);
    std::string digest;
    std::vector<Index> dense(p.shape.size(), 1);
    for (std::size_t d = p.shape.size(); d-- > 1;) dense[d - 1] = dense[d] * p.shape[d];
    if (p.strides.empty() || p.strides == dense) {
      digest = runtime::xxh3_hex(data, count * item);
    } else {
      packed.resize(count * item);
      std::vector<Index> at(p.shape.size(), 0);
      for (std::size_t i = 0; i < count; ++i) {
        const Index offset = std::inner_product(at.begin(), at.end(), p.strides.begin(), Index{0});
        std::copy_n(data + static_cast<std::size_t>(offset) * item, item, packed.data() + i * item);
        for (std::size_t d = at.size(); d-- > 0;) {
          if (++at[d] < p.shape[d]) break;
          at[d] = 0;
        }
      }
      digest = runtime::xxh3_hex(packed.data(), packed.size());
    }
    digests += p.name + ' ' + digest + '\n';
  }
  return runtime::xxh3_hex(digests.data(), digests.size());
}

/// One line per group for people: what it does to how many parameters.
json describe_groups(const Config& config, const std::vector<Parameter>& parameters) {
  std::vector<std::int64_t> sizes(config.groups.size(), 0);
  for (const Parameter& p : parameters) {
    for (int g = matching_group(config, p.name); g >= 0;
         g = matching_group(config, p.name, g + 1)) {
      const optim::RuleRow* const rule =
          optim::find_rule(config.groups[static_cast<std::size_t>(g)].rule.name);
      if (rule != nullptr && rule->matrix && p.shape.size() < 2) continue;
      sizes[static_cast<std::size_t>(g)] += elements_of(p);
      break;
    }
  }
  json out = json::array();
  for (std::size_t g = 0; g < config.groups.size(); ++g) {
    const GroupConfig& group = config.groups[g];
    const optim::RuleRow* const rule = optim::find_rule(group.rule.name);
    json row{{"match", group.match}, {"rule", group.rule.name}, {"parameters", sizes[g]}};
    if (const auto lr = group.rule.values.find("lr"); lr != group.rule.values.end()) {
      if (const double* const value = std::get_if<double>(&lr->second)) row["lr"] = *value;
    }
    if (rule != nullptr && rule->matrix) row["norm"] = group.lmo.norm;
    row["weights"] = group.weights.format +
                     (group.weights.residual == "none" ? "" : " + " + group.weights.residual);
    row["schedule"] = group.schedule.kind;
    out.push_back(std::move(row));
  }
  return out;
}

json to_json(const StepTimes& ms) {
  return {{"reduce", ms.reduce}, {"control", ms.control}, {"update", ms.update},
          {"lmo", ms.lmo},       {"gather", ms.gather},   {"meet", ms.meet},
          {"copy", ms.copy},     {"probe", ms.probe},     {"total", ms.total}};
}

std::string replace_all(std::string text, const std::string& what, const std::string& by) {
  for (std::size_t at = text.find(what); at != std::string::npos;
       at = text.find(what, at + by.size())) {
    text.replace(at, what.size(), by);
  }
  return text;
}

std::string utc(const char* format) {
  return fmt::format(fmt::runtime(std::string("{:") + format + "}"),
                     fmt::gmtime(std::time(nullptr)));
}

// ---- the run ------------------------------------------------------------------------------------

class Trainer {
 public:
  Trainer(const Options& options, Context& context, Config config, Communicator world,
          Communicator control)
      : options_(options),
        context_(context),
        training_(std::move(config), std::move(world), std::move(control)) {
    if (config_.gns_ramp.on()) ramp_.emplace(training_);
    // What cannot be run as given has ended here, and left nothing behind.
    open_directory();
    if (options_.resume) resume();
    open_files();
  }

  int run() {
    announce();
    const Clock::time_point start = Clock::now();
    bool stop = false;
    try {
      while (!stop && optimizer_.steps() < config_.train.steps) stop = step();
    } catch (const NumericError& error) {
      // All ranks are here: the optimizer agrees on it.
      if (rank_ == 0) leave_diagnosis(error.what(), start);
      throw;
    }
    const bool finished = optimizer_.steps() >= config_.train.steps;
    if (finished && !evaluated_) {
      // Nothing was left to do: the figures of the loaded weights are still asked for.
      evaluation_ = training_.evaluate();
    }
    if (!finished || config_.train.save_every > 0) save();
    finish(finished ? "finished" : "preempted", start);
    return finished ? 0 : static_cast<int>(ExitCode::preempted);
  }

 private:
  // ---- before the first step --------------------------------------------------------------------

  void open_directory() {
    std::string path;
    runtime::agree(control_, [&] {
      if (rank_ != 0) return;
      std::filesystem::path directory = options_.run_dir;
      if (directory.empty() && options_.resume) {
        directory = newest_run("runs", config_.name);
        if (directory.empty()) {
          throw ConfigError("--resume: no directory runs/" + config_.name +
                            "-* to continue; name one with --run-dir");
        }
      } else if (directory.empty()) {
        directory = std::filesystem::path("runs") / (config_.name + "-" + utc("%Y%m%d-%H%M%S"));
      }
      directory_ = std::make_unique<RunDirectory>(directory, options_.resume);
      if (const int removed = directory_->remove_half_written(); removed > 0) {
        spdlog::warn("{}: removed {} half-written checkpoint{}", directory_->checkpoints().string(),
                     removed, removed == 1 ? "" : "s");
      }
      path = directory.string();
    });
    control_.broadcast(path, 0);
    run_path_ = path;
  }

  /// Loads the newest checkpoint that verifies.
  void resume() {
    std::string list;
    if (rank_ == 0) {
      for (const std::int64_t step : directory_->saved_steps()) list += std::to_string(step) + "\n";
    }
    control_.broadcast(list, 0);
    std::vector<std::int64_t> steps;
    for (std::size_t at = 0; at < list.size(); at = list.find('\n', at) + 1) {
      steps.push_back(std::stoll(list.substr(at)));
    }
    std::string last_problem;
    for (const std::int64_t step : steps) {
      const std::string directory = (run_path_ / "checkpoints" / checkpoint_name(step)).string();
      try {
        const std::map<std::string, std::string> user =
            optimizer_.load(directory, options_.convert);
        first_step_ = optimizer_.steps();
        saved_step_ = first_step_;
        warn_of_changes(user);
        go_on(directory, user);
        break;
      } catch (const DataError& error) {
        last_problem = error.what();
        if (rank_ == 0) spdlog::warn("{}; trying an older checkpoint", last_problem);
      }
    }
    if (!steps.empty() && saved_step_ < 0) {
      throw DataError(fmt::format("{}: none of {} checkpoints can be loaded; the oldest: {}",
                                  (run_path_ / "checkpoints").string(), steps.size(),
                                  last_problem));
    }
    runtime::agree(control_, [&] {
      if (rank_ == 0) directory_->set_aside_after(std::max<std::int64_t>(saved_step_, 0));
    });
  }

  /// The stream goes on where it was, whatever the batch was; a ramp with its batch.
  void go_on(const std::string& checkpoint, const std::map<std::string, std::string>& user) {
    const auto number = [&user](const char* key) -> std::optional<std::int64_t> {
      const auto found = user.find(key);
      return found == user.end() ? std::nullopt : std::optional(std::stoll(found->second));
    };
    std::optional<std::int64_t> unit = number("unit");
    if (const auto batch = number("batch"); !unit && batch) unit = *batch * first_step_;
    const std::int64_t begin = unit.value_or(training_.units());
    if (ramp_ && ramp_->read_from(user) && ramp_->now().batch != training_.batch()) {
      training_.go_on_from(checkpoint, begin, ramp_->now().batch, ramp_->now().micro_batches);
    } else {
      training_.begin_at(begin);
    }
    if (!ramp_ && user.count("gns_ramp") > 0) {
      optimizer_.set_lr_multiplier(1);
      if (rank_ == 0)
        spdlog::warn(
            "gns_ramp was on when the checkpoint was written: from here on batches are of "
            "{}, at the rate of the configuration",
            training_.batch());
    }
  }

  /// The examples of a step follow from these: other values continue with other data.
  [[nodiscard]] std::map<std::string, std::string> user_values() const {
    std::map<std::string, std::string> user{{"workload", config_.workload},
                                            {"batch", std::to_string(training_.batch())},
                                            {"unit", std::to_string(training_.units())},
                                            {"seed", std::to_string(config_.seed)},
                                            {"config_hash", config_hash(config_)}};
    if (ramp_) ramp_->write_to(user);
    return user;
  }

  void warn_of_changes(const std::map<std::string, std::string>& user) const {
    if (rank_ != 0) return;
    for (const auto& [key, value] : user_values()) {
      const auto before = user.find(key);
      if ((key != "workload" && key != "seed") || before == user.end() || before->second == value)
        continue;
      spdlog::warn(
          "{} was {} when the checkpoint was written and is {} now: the data will not continue "
          "where it stopped",
          key, before->second, value);
    }
  }

  void open_files() {
    runtime::agree(control_, [&] {
      if (rank_ == 0) {
        directory_->write("config.resolved.yaml", to_yaml(config_));
        directory_->open_metrics(first_step_);
      }
      if (!config_.telemetry.path.empty()) {
        std::string path = replace_all(config_.telemetry.path, "{rank}", std::to_string(rank_));
        path = replace_all(path, "{name}", config_.name);
        telemetry_.open(replace_all(path, "{run}", run_path_.string()), options_.resume);
      }
    });
  }

  void announce() {
    if (rank_ != 0) return;
    progress_.emplace(progress_kind(options_.progress), context_.json ? stderr : stdout);
    const MemoryPlan memory = optimizer_.memory();
    progress_->note(fmt::format(
        "{} | {} | {} rank{} | {} parameters in {} tensors | state {} on rank 0 | {}{}{}",
        config_.name, config_.workload, size_, size_ == 1 ? "" : "s", training_.elements(),
        parameters_.size(), runtime::format_bytes(static_cast<double>(memory.state)),
        config_.device == "cpu" ? ""
        : training_.place()     ? fmt::format("model on device {} | ", training_.place()->ordinal)
                                : "model on the host, mirrored on the device | ",
        run_path_.string(),
        first_step_ > 0 ? fmt::format(" | from step {}", first_step_) : std::string{}));
    if (options_.resume && saved_step_ < 0)
      progress_->note("no checkpoint yet: starting at the beginning");
  }

  // ---- a step -----------------------------------------------------------------------------------

  /// @return whether the run was asked to stop.
  bool step() {
    const Training::Step done = training_.step([this]() -> Training::Word {
      return {stop_requested(), take_save_request(), problem_ != nullptr};
    });
    if (done.any.problem) {
      runtime::agree(control_, [this] {
        if (problem_) std::rethrow_exception(problem_);
      });
    }
    const std::int64_t at = done.report.step;
    const bool last = at >= config_.train.steps;
    evaluated_ = last || (config_.train.eval_every > 0 && at % config_.train.eval_every == 0);
    if (evaluated_) evaluation_ = training_.evaluate();
    record(done);
    const bool due = config_.train.save_every > 0 && at % config_.train.save_every == 0;
    const std::optional<GnsRamp::Decision> other =
        ramp_ && !last ? ramp_->after(done, training_) : std::nullopt;
    if (other) optimizer_.set_lr_multiplier(other->lr_multiplier);
    if (due || done.any.save || other) save();
    if (other) take_other_batch(*other);
    return done.any.stop;
  }

  /// Goes on from the checkpoint that was just written.
  void take_other_batch(const GnsRamp::Decision& next) {
    const std::int64_t at = optimizer_.steps(), before = training_.batch();
    training_.go_on_from((run_path_ / "checkpoints" / checkpoint_name(at)).string(),
                         training_.units(), next.batch, next.micro_batches);
    if (rank_ != 0) return;
    progress_->note(
        fmt::format("step {:5d} | batch {} -> {} in {} micro-batch{} | lr x {:.3g} | noise scale "
                    "{:.4g} | price: {}",
                    at, before, next.batch, next.micro_batches, next.micro_batches == 1 ? "" : "es",
                    next.lr_multiplier, ramp_->noise_scale(), ramp_->objective()));
  }

  std::string hash_gathered_weights() {
    optimizer_.gather(training_.ids());
    std::vector<Parameter> gathered = parameters_;
    for (std::size_t i = 0; i < gathered.size() && config_.zero_stage == 3; ++i) {
      gathered[i].weights = optimizer_.weights(static_cast<int>(i));
      gathered[i].strides.clear();
    }
    // What lies on a device is looked at in copies.
    std::vector<std::vector<std::byte>> copies(training_.place() ? gathered.size() : 0);
    for (std::size_t i = 0; i < copies.size(); ++i) {
      copies[i].resize(static_cast<std::size_t>(elements_of(gathered[i])) *
                       bytes_of(gathered[i].dtype));
      optimizer_.copy_weights(static_cast<int>(i), copies[i].data());
      gathered[i].weights = copies[i].data();
      gathered[i].strides.clear();
    }
    std::string hash = hash_weights(gathered);
    optimizer_.release(training_.ids());
    return hash;
  }

  /// Writes the step's lines. A failure is kept for the next agreement: the other ranks are ahead
  /// already.
  void record(const Training::Step& done) try {
    const StepReport& report = done.report;
    const auto items = static_cast<double>(training_.items_per_step());
    if (rank_ == 0) {
      json ms = to_json(report.ms);
      ms["gradient"] = done.gradient_ms;
      ms["step"] = done.step_ms;
      json row{{"schema", 1},
               {"step", report.step},
               {"loss", done.loss},
               {"batch", training_.batch()},
               {"examples", training_.units()},
               {"lr_multiplier", report.lr_multiplier},
               {"ms", std::move(ms)},
               {"bytes_sent", static_cast<std::int64_t>(done.bytes)},
               {"bytes_sent_max", static_cast<std::int64_t>(done.bytes_max)},
               {"messages", static_cast<std::int64_t>(done.messages)},
               {"exceptional_bytes", static_cast<std::int64_t>(done.exceptional)},
               {"matrices", static_cast<std::int64_t>(done.matrices)},
               {"update_rms", report.update_rms},
               {"gradient_norm", report.gradient_norm},
               {"skipped", report.skipped},
               {"items_per_s", done.step_ms > 0 ? 1e3 * items / done.step_ms : 0}};
      if (report.skipped) row["skip_reason"] = report.skip_reason;
      if (const auto share = training_.clip_fraction()) row["clip_fraction"] = *share;
      record_rounding(report, row);
      if (json noise = noise_of(report, config_); !noise.empty()) row["noise"] = std::move(noise);
      if (json spectra = spectra_of(optimizer_, report, training_.parameters()); !spectra.empty()) {
        row["spectra"] = std::move(spectra);
      }
      if (!report.notice.empty()) {
        row["notice"] = report.notice;
        spdlog::warn("step {}: {}", report.step, report.notice);
      }
      if (evaluated_) {
        for (const auto& [key, value] : evaluation_) row[key] = value;
      }
      directory_->metrics_line(dump(row));
      matrices_ = static_cast<std::int64_t>(done.matrices);
      StepLine line{report.step, config_.train.steps, done.loss, done.step_ms,  report.ms,
                    done.bytes,  report.update_rms,   {},        report.skipped};
      if (evaluated_) line.validation = evaluation_;
      progress_->update(line);
    }
    const std::int64_t every = std::max<std::int64_t>(config_.telemetry.every_steps, 1);
    if (telemetry_.is_open() && (report.step % every == 0 || !report.notice.empty())) {
      json row{{"schema", 1},
               {"rank", rank_},
               {"step", report.step},
               {"loss", done.own_loss},
               {"gradient_ms", done.gradient_ms},
               {"step_ms", done.step_ms},
               {"ms", to_json(report.ms)},
               {"bytes_sent", report.bytes_sent},
               {"messages", report.messages},
               {"exceptional_bytes", report.exceptional_bytes},
               {"matrices", report.matrices},
               {"skipped", report.skipped}};
      if (report.skipped) row["skip_reason"] = report.skip_reason;
      if (!report.notice.empty()) row["notice"] = report.notice;
      telemetry_.line(dump(row));
    }
  } catch (...) {
    problem_ = std::current_exception();
  }

  /// What rounding did to each group, where it was measured in this step.
  void record_rounding(const StepReport& report, json& row) {
    json groups = json::array();
    bool any = false;
    for (std::size_t g = 0; g < report.rounding.size(); ++g) {
      const RoundingReport& r = report.rounding[g];
      if (r.step != report.step || report.skipped) {
        groups.push_back(nullptr);
        continue;
      }
      any = true;
      groups.push_back({{"step_over_grid", r.step_over_grid},
                        {"relative_correction", r.relative_correction},
                        {"residual_rms", r.residual_rms},
                        {"saturated", r.saturated},
                        {"out_of_regime", r.out_of_regime}});
      if (!r.out_of_regime || !warned_.insert(g).second) continue;
      spdlog::warn(
          "groups[{}] ({}): step {}: a step is {:.3g} of the distance of two codes, a correction "
          "{:.3g} of the momentum: rounding may drown the gradient (weights.eco bounds it; a "
          "larger "
          "lr or momentum, or finer scales, end it)",
          g, config_.groups[g].match, report.step, r.step_over_grid, r.relative_correction);
    }
    if (any) row["rounding"] = std::move(groups);
  }

  // ---- what stays -------------------------------------------------------------------------------

  void save() {
    const std::int64_t step = optimizer_.steps();
    if (step == saved_step_) return;
    const Clock::time_point begin = Clock::now();
    optimizer_.save((run_path_ / "checkpoints" / checkpoint_name(step)).string(), user_values());
    saved_step_ = step;
    if (rank_ != 0) return;
    progress_->note(fmt::format("step {:5d} | saved in {}", step,
                                runtime::format_seconds(ms_between(begin, Clock::now()) / 1e3)));
    if (const std::string problem = directory_->prune(config_.train.keep); !problem.empty())
      spdlog::warn("{}", problem);
  }

  /// Everything rank 0 can say without asking others.
  json summary(const char* status, Clock::time_point start) const {
    json out = json::parse(runtime::metrics_summary(directory_->metrics()));
    out["schema"] = 1;
    out["version"] = ORTHRUS_VERSION;
    out["status"] = status;
    out["name"] = config_.name;
    out["workload"] = config_.workload;
    out["config"] = options_.config;
    out["run_dir"] = run_path_.string();
    out["started"] = started_;
    out["ranks"] = size_;
    out["zero_stage"] = config_.zero_stage;
    out["batch"] = config_.train.batch;
    out["final_batch"] = training_.batch();
    out["examples"] = training_.units();
    if (config_.virtual_shards > 0) {
      out["virtual_shards"] = config_.virtual_shards;
    } else {
      out["micro_batches"] = config_.train.micro_batches;
    }
    out["seed"] = config_.seed;
    out["steps"] = optimizer_.steps();
    out["first_step"] = first_step_;
    out["seconds"] = std::chrono::duration<double>(Clock::now() - start).count();
    for (const auto& [key, value] : evaluation_) out["final"][key] = value;
    out["parameters"] = training_.elements();
    out["tensors"] = parameters_.size();
    if (matrices_ >= 0) out["matrices_per_step"] = matrices_;
    out["groups"] = describe_groups(config_, parameters_);
    out["plan_hash"] = optimizer_.plan_hash();
    out["config_hash"] = config_hash(config_);
    const json plan = json::parse(optimizer_.plan_json(), nullptr, /*allow_exceptions=*/false);
    if (plan.is_object() && plan.contains("per_rank")) {
      std::int64_t bytes = 0;
      for (const json& rank : plan["per_rank"]) bytes += rank.value("bytes_sent", std::int64_t{0});
      out["planned_bytes_per_step"] = bytes;
    }
    return out;
  }

  void write_summary(const json& summary) const {
    directory_->write("summary.json", dump(summary, 2) + "\n");
    directory_->write("report.html",
                      runtime::run_report(dump(summary), directory_->metrics(), to_yaml(config_)));
  }

  /// Collective.
  void finish(const char* status, Clock::time_point start) {
    const MemoryPlan m = optimizer_.memory();
    const std::string hash = hash_gathered_weights();
    const json mine{{"rank", rank_},    {"weights", m.weights}, {"gradients", m.gradients},
                    {"state", m.state}, {"work", m.work},       {"total", m.total()},
                    {"hash", hash}};
    const std::vector<std::string> all = control_.all_gather_strings(mine.dump());
    json memory = json::array();
    std::int64_t state_max = 0;
    std::string stray;
    for (const std::string& text : all) {
      json row = json::parse(text);
      if (row["hash"] != hash && stray.empty())
        stray = fmt::format("rank {} has other weights than rank {}: {} and {}",
                            row["rank"].get<int>(), rank_, row["hash"].get<std::string>(), hash);
      state_max = std::max(state_max, row["state"].get<std::int64_t>());
      row.erase("hash");
      memory.push_back(std::move(row));
    }
    runtime::agree(control_, [&] {
      if (rank_ == 0) {
        json out = summary(status, start);
        out["memory"] = std::move(memory);
        out["state_bytes_max"] = state_max;
        out["weights_hash"] = hash;
        write_summary(out);
        say_goodbye(out);
      }
      if (problem_) std::rethrow_exception(problem_);
    });
    // Replicas are promised to be equal bit by bit.
    runtime::agree(control_, [&] {
      if (rank_ == 0 && !stray.empty()) throw Error(stray, ExitCode::internal);
    });
  }

  void say_goodbye(const json& out) {
    std::string line =
        fmt::format("{} | {} steps", out["status"].get<std::string>(), optimizer_.steps());
    for (const auto& [key, value] : out["final"].items()) {
      if (value.is_number() && !is_of_class(key))
        line += fmt::format(" | {} {:.5g}", key, value.get<double>());
    }
    line += fmt::format(" | {} | {}", runtime::format_seconds(out["seconds"].get<double>()),
                        (run_path_ / "report.html").string());
    progress_->note(line);
    progress_.reset();
    if (context_.json) std::puts(dump(out, 2).c_str());
  }

  /// What a person needs after a numerical stop; nothing here may hide the error itself.
  void leave_diagnosis(const std::string& error, Clock::time_point start) try {
    json out = summary("stopped", start);
    out["error"] = error;
    const MemoryPlan m = optimizer_.memory();
    out["state_bytes_max"] = m.state;
    write_summary(out);
    json last = json::array();
    const std::string metrics = directory_->metrics();
    std::size_t from = metrics.size();
    for (int lines = 0; from > 0 && lines < 20; ++lines) {
      from = from >= 2 ? metrics.rfind('\n', from - 2) : std::string::npos;
      from = from == std::string::npos ? 0 : from + 1;
    }
    for (std::size_t at = from; at < metrics.size();) {
      const std::size_t end = std::min(metrics.find('\n', at), metrics.size());
      last.push_back(
          json::parse(metrics.substr(at, end - at), nullptr, /*allow_exceptions=*/false));
      at = end + 1;
    }
    directory_->write(
        "diagnosis.json",
        dump({{"schema", 1},
              {"step", optimizer_.steps()},
              {"error", error},
              {"last_saved_step", saved_step_ >= 0 ? json(saved_step_) : json(nullptr)},
              {"config_hash", config_hash(config_)},
              {"last_steps", std::move(last)}},
             2) +
            "\n");
  } catch (const std::exception& failure) {
    spdlog::warn("no diagnosis was written: {}", failure.what());
  }

  const Options& options_;
  Context& context_;
  Training training_;
  const Config& config_ = training_.config();
  const int rank_ = training_.rank(), size_ = training_.size();
  Communicator& control_ = training_.control();
  ShardedOptimizer& optimizer_ = training_.optimizer();
  const std::vector<Parameter>& parameters_ = training_.parameters();
  const std::string started_ = utc("%Y-%m-%dT%H:%M:%SZ");

  std::filesystem::path run_path_;
  std::unique_ptr<RunDirectory> directory_;  // on rank 0
  std::optional<GnsRamp> ramp_;
  LineFile telemetry_;
  std::set<std::size_t> warned_;      ///< groups that have left ECO's regime
  std::optional<Progress> progress_;  // on rank 0

  std::int64_t first_step_ = 0;
  std::int64_t saved_step_ = -1;
  std::int64_t matrices_ = -1;
  bool evaluated_ = false;
  std::map<std::string, double> evaluation_;
  std::exception_ptr problem_;
};

int train(const Options& options, Context& context) {
  const SignalScope signals;
  Communicator world = context.world(60);
  std::vector<std::string> overrides = options.set;
  if (options.steps) overrides.push_back(fmt::format("train.steps={}", *options.steps));
  const Config config = shared_config(options.config, overrides, world);
  if (options.print_config) {
    if (world.rank() == 0) std::fputs(to_yaml(config).c_str(), stdout);
    return 0;
  }
  if (config.comm.timeout_s > 0) world.set_timeout(config.comm.timeout_s);
  Communicator control = world.duplicate("train");
  Trainer trainer{options, context, config, std::move(world), std::move(control)};
  try {
    return trainer.run();
  } catch (...) {
    context.settle_error();
    throw;
  }
}

}  // namespace

Run add_train(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_option("CONFIG", options->config, "Configuration (YAML)")->required();
  app.add_option("--run-dir", options->run_dir, "Where results go; default runs/<name>-<time>");
  app.add_option("--steps", options->steps, "Instead of train.steps");
  app.add_option("--set", options->set,
                 "key.path=value, after file and environment; may be repeated");
  auto* const resume = app.add_flag("--resume", options->resume,
                                    "Continue from the newest checkpoint that verifies");
  app.add_flag(
         "--convert", options->convert,
         "With --resume: weights saved in another format or with another residual are rounded "
         "anew")
      ->needs(resume);
  app.add_option("--progress", options->progress, "auto, bar, lines or off")
      ->check(CLI::IsMember({"auto", "bar", "lines", "off"}));
  app.add_flag("--print-config", options->print_config)->group("");
  return [options](Context& context) { return train(*options, context); };
}

}  // namespace orthrus::cli
