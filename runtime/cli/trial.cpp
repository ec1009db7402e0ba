#include "runtime/cli/trial.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <map>
#include <optional>
#include <orthrus/error.hpp>
#include <utility>
#include <vector>

#include "runtime/agree.hpp"
#include "runtime/cli/gns_ramp.hpp"
#include "runtime/cli/learning_times.hpp"
#include "runtime/cli/provenance.hpp"
#include "runtime/cli/run_directory.hpp"
#include "runtime/cli/start_window.hpp"
#include "runtime/cli/training.hpp"
#include "runtime/cli/trial_timing.hpp"
#include "runtime/runner/reported.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::cli {
namespace {

using runner::Json;
using Clock = std::chrono::steady_clock;

std::string dump(const Json& value, int indent = -1) {
  return value.dump(indent, ' ', false, Json::error_handler_t::replace);
}

/// Over loss, loss0 and step.
bool holds(const runner::Expression& diverged, double loss, double first, std::int64_t step) {
  return diverged.truth([&](const std::string& name) -> std::optional<runner::Value> {
    if (name == "loss") return loss;
    if (name == "loss0") return first;
    if (name == "step") return static_cast<double>(step);
    return {};
  });
}

/// What a branch starts from.
struct Fork {
  std::filesystem::path checkpoint;
  bool stopped = false;
  std::string diverged;  ///< why; empty: it did not
};

/// The checkpoint of a base run in `forks`: of an earlier trial, or trained now. Collective.
Fork reach_fork(const runner::Study& study, const Config& base, const runner::Trial& trial,
                Communicator& group, const std::filesystem::path& forks,
                const std::function<bool()>& stop) {
  namespace fs = std::filesystem;
  Communicator control = group.duplicate("fork");
  // Another number of ranks adds up in another order.
  Fork fork{forks / fmt::format("{}-np{}", trial.fork, group.size()), false, ""};
  double there = fs::exists(fork.checkpoint) ? 1 : 0;
  control.broadcast(std::span<double>(&there, 1));
  if (there != 0) return fork;

  Training training(runner::fork_config(base, trial), group.duplicate("trial"),
                    group.duplicate("control"), Training::Trust::nobody);
  const runner::Expression diverged(study.diverged);
  double first = 0;
  while (training.steps() < study.branch_steps) {
    Training::Step step;
    try {
      step = training.step([&]() -> Training::Word { return {stop(), false, false}; });
    } catch (const NumericError& error) {
      fork.diverged = error.what();
      return fork;
    }
    if (training.steps() == 1) first = step.loss;
    if (holds(diverged, step.loss, first, training.steps())) {
      fork.diverged = "stop.diverged: " + study.diverged;
      return fork;
    }
    fork.stopped = step.any.stop;
    if (fork.stopped) return fork;
  }
  // Whole or not at all, beside a group that trains the same.
  const fs::path draft = fmt::format("{}.{}", fork.checkpoint.string(), trial.index);
  runtime::agree(control, [&] {
    if (control.rank() != 0) return;
    make_directories(forks);
    fs::remove_all(draft);
  });
  training.optimizer().save(draft.string());
  runtime::agree(control, [&] {
    if (control.rank() != 0) return;
    std::error_code error;
    fs::rename(draft, fork.checkpoint, error);
    if (!error) return;
    fs::remove_all(draft);
    if (!fs::exists(fork.checkpoint))
      throw IoError(fork.checkpoint.string() + ": " + error.message(), ExitCode::cannot_create);
  });
  return fork;
}

class TrialRun {
 public:
  TrialRun(const runner::Study& study, const Config& base, const TrialTask& task,
           Communicator& group, const std::filesystem::path& directory,
           const std::function<bool()>& stop)
      : study_(study),
        trial_(task.trial),
        attempt_(task.attempt),
        directory_(directory),
        stop_(stop),
        training_(runner::trial_config(base, task.trial), group.duplicate("trial"),
                  group.duplicate("control"), Training::Trust::nobody,
                  {first_step_, study.branch_steps * study.branch_batch}),
        diverged_(study.diverged),
        score_(study) {
    if (training_.config().gns_ramp.on()) ramp_.emplace(training_);
    if (study.exclusive) window_.emplace(training_.control());
  }

  /// @param fork  what a branch starts from. @return whether it was stopped.
  bool run(const Fork& fork) {
    open_files();
    if (!fork.diverged.empty()) return finish("diverged", "before the fork: " + fork.diverged);
    if (!fork.checkpoint.empty()) leave(fork.checkpoint.string());
    if (study_.averages()) training_.keep_average(study_.ema_halflife_examples);
    evaluate(0);
    if (!std::isfinite(score_.value()))
      return finish("diverged", "the metric is not finite at the start");
    if (score_.meets(score_.value())) {
      throw ConfigError("search.metric.target: reached before the first step");
    }
    const Config& config = training_.config();
    decays_ = runner::decays_of(study_, config.train.steps);
    while (steps() < config.train.steps) {
      Training::Step step;
      const std::vector<std::int64_t>& looks = study_.coordinate_steps;
      const std::int64_t done = steps();
      if (std::find(looks.begin(), looks.end(), done) != looks.end())
        training_.look_at_preactivations();
      if (study_.sharpness_every > 0 && (done + 1) % study_.sharpness_every == 0)
        training_.look_at_sharpness();
      if (study_.branch_rewarm_frac > 0) rewarm(done);
      const double late_s = window_ ? window_->wait() : 0;
      step_batch_ = training_.batch();
      try {
        step = training_.step([this]() -> Training::Word {
          return {stop_() || out_of_time(), false, problem_ != nullptr};
        });
      } catch (const NumericError& error) {  // all ranks agree on it
        return finish("diverged", error.what());
      }
      if (step.any.problem) {
        runtime::agree(training_.control(), [this] {
          if (problem_) std::rethrow_exception(problem_);
        });
      }
      loss_ = step.loss;
      const std::int64_t at = steps();
      if (at == 1) first_loss_ = smoothed_ = loss_;
      smoothed_ += 0.5 * (loss_ - smoothed_);
      if (study_.exclusive) {
        timing_.add(step.step_ms, step.report.ms, static_cast<double>(step.bytes_max), late_s);
      }
      const bool timed =
          study_.timed_to > 0 && timing_.settled(training_.control(), study_.timed_to);
      probe(step.report);
      if (step.sharpness && training_.rank() == 0) {
        Json row = line_of("probe", at);
        row["dir_sharpness"] = runner::number(*step.sharpness);
        row["update_norm"] = runner::number(step.update_norm);
        write(row);
      }
      for (const auto& [id, rms] : step.preactivations) {
        if (training_.rank() != 0) break;
        write({{"t", "probe"},
               {"trial", trial_.id},
               {"step", done},
               {"examples", done * trial_.batch},
               {"parameter", training_.parameters()[static_cast<std::size_t>(id)].name},
               {"preactivation_rms", runner::number(rms)}});
      }
      if (holds(diverged_, loss_, first_loss_, at))
        return finish("diverged", "stop.diverged: " + study_.diverged);
      if (step.any.stop) return stopped();
      if (const auto decay = leaving(at); decay) {
        if (const std::optional<bool> over = decayed(*decay)) return *over;
        if (score_.reached() && study_.stop_on_target) return finish("complete", "");
        if (decay->fork == decays_.back().fork) break;
      }
      const bool rung =
          std::find(trial_.rungs.begin(), trial_.rungs.end(), at) != trial_.rungs.end();
      const bool over = at >= config.train.steps || (ramp_ && ramped(step));
      if (!over && at % config.train.eval_every != 0 && !rung && !timed) continue;
      lr_multiplier_ = step.report.lr_multiplier;
      evaluate(at);
      if (!std::isfinite(score_.value()))
        return finish("diverged", study_.metric + " is not finite");
      if (score_.reached() && study_.stop_on_target) return finish("complete", "");
      if (rung) rungs_.push_back(score_.value());
      if (at == trial_.until) return finish("paused", "");
      if (timed) return finish("complete", "");
      if (over) break;
    }
    if (study_.has_target() && !score_.reached()) return finish("censored", "");
    return finish("complete", "");
  }

  [[nodiscard]] Json take_record() { return std::move(record_); }

 private:
  /// A base run, where it was when it wrote `checkpoint`.
  void leave(const std::string& checkpoint) {
    if (study_.resets()) {
      training_.begin_with_weights_of(checkpoint);
    } else {
      training_.optimizer().load(checkpoint);
    }
  }

  /// The rate of a branch's step after `done` of them.
  void rewarm(std::int64_t done) {
    const double steps = std::ceil(study_.branch_rewarm_frac * static_cast<double>(trial_.steps));
    training_.optimizer().set_lr_multiplier(std::min(1.0, static_cast<double>(done + 1) / steps));
  }

  /// Takes another batch where the noise asks for one. @return whether the examples that the trial
  /// may see do not suffice for another step.
  bool ramped(const Training::Step& step) {
    if (const auto next = ramp_->after(step, training_); next) {
      const std::filesystem::path checkpoint = directory_ / "ramp";
      remove(checkpoint);  // of an attempt that was killed
      training_.optimizer().set_lr_multiplier(next->lr_multiplier);
      training_.optimizer().save(checkpoint.string());
      training_.go_on_from(checkpoint.string(), training_.units(), next->batch,
                           next->micro_batches);
      remove(checkpoint);
    }
    return training_.units() + training_.batch() > trial_.steps * trial_.batch;
  }

  /// By the first rank; all wait for it.
  void remove(const std::filesystem::path& checkpoint) {
    runtime::agree(training_.control(), [&] {
      if (training_.rank() == 0) std::filesystem::remove_all(checkpoint);
    });
  }

  /// The branch that leaves after `at` steps.
  [[nodiscard]] std::optional<runner::Decay> leaving(std::int64_t at) const {
    const auto found = std::find_if(decays_.begin(), decays_.end(),
                                    [at](const runner::Decay& d) { return d.fork == at; });
    return found == decays_.end() ? std::optional<runner::Decay>() : *found;
  }
  /// Trains a branch to its horizon, whose loss is the trial's there. @return whether the trial was
  /// stopped or has diverged; nothing where it goes on.
  std::optional<bool> decayed(const runner::Decay& decay) {
    const std::filesystem::path checkpoint = directory_ / fmt::format("fork-{}", decay.fork);
    remove(checkpoint);
    training_.optimizer().save(checkpoint.string());
    Training branch(runner::decay_config(study_, training_.config(), decay),
                    training_.control().duplicate("branch"),
                    training_.control().duplicate("branch control"), Training::Trust::nobody);
    branch.optimizer().load(checkpoint.string());
    remove(checkpoint);
    while (branch.steps() < decay.steps) {
      Training::Step step;
      try {
        step = branch.step([this]() -> Training::Word {
          return {stop_() || out_of_time(), false, problem_ != nullptr};
        });
      } catch (const NumericError& error) {
        return finish("diverged", error.what());
      }
      ++branch_steps_;
      if (step.any.stop) return stopped();
      if (holds(diverged_, step.loss, first_loss_, branch.steps()))
        return finish("diverged", "stop.diverged: " + study_.diverged);
    }
    const std::map<std::string, double> all = branch.evaluate();
    horizon_ = decay.steps;
    score_.add(decay.steps, all.at(study_.metric));
    learning_.add(static_cast<double>(decay.steps), all);
    if (training_.rank() == 0) {
      Json row = line_of("branch", decay.steps);
      row["fork_step"] = decay.fork;
      for (const auto& [key, x] : all) row[key] = runner::number(x);
      write(row);
    }
    if (!std::isfinite(score_.value()))
      return finish("diverged", study_.metric + " is not finite after the decay");
    return {};
  }

  /// Of its own: those of a base run before it do not count.
  [[nodiscard]] std::int64_t steps() const { return training_.steps() - first_step_; }

  /// Only the first rank looks at a clock; another's may be ahead of it.
  bool out_of_time() {
    if (training_.rank() != 0 || study_.max_seconds <= 0) return false;
    timed_out_ = seconds() > study_.max_seconds;
    return timed_out_;
  }
  [[nodiscard]] double seconds() const {
    return std::chrono::duration<double>(Clock::now() - start_).count();
  }
  bool stopped() {
    double timed_out = timed_out_ ? 1 : 0;
    training_.control().broadcast(std::span<double>(&timed_out, 1));
    if (timed_out == 0) return true;
    return finish("censored", "budget.max_seconds");
  }

  void open_files() {
    Json origin = provenance(training_.control());
    origin["plan_hash"] = training_.optimizer().plan_hash();
    runtime::agree(training_.control(), [&] {
      if (training_.rank() != 0) return;
      make_directories(directory_);
      runtime::write_file_atomically(directory_ / "config.resolved.yaml",
                                     to_yaml(training_.config()));
      std::string overrides;
      for (const std::string& entry : trial_.overrides) overrides += entry + "\n";
      runtime::write_file_atomically(directory_ / "overrides.txt", overrides);
      write_provenance(directory_ / "provenance.json", std::move(origin), attempt_);
      metrics_.open(directory_ / "metrics.jsonl", /*append=*/false);
    });
  }

  /// Seen after so many steps of its own.
  [[nodiscard]] std::int64_t examples(std::int64_t steps) const {
    return ramp_ && steps == this->steps() ? training_.units() : steps * trial_.batch;
  }
  [[nodiscard]] std::int64_t tokens(std::int64_t steps) const {
    return examples(steps) * training_.workload().items_per_unit();
  }
  /// What every line of its metrics begins with.
  [[nodiscard]] Json line_of(const char* type, std::int64_t step) const {
    return {{"t", type},
            {"trial", trial_.id},
            {"step", step},
            {"examples", examples(step)},
            {"tokens", tokens(step)},
            {"wall_s", seconds()}};
  }
  /// How often it has seen its training part, with a base run before it; null: that has no end.
  [[nodiscard]] Json epochs_seen() const {
    const std::int64_t epoch = training_.workload().training_units();
    if (epoch == 0) return nullptr;
    const std::int64_t own = examples(std::max<std::int64_t>(steps(), 0));
    return static_cast<double>(own + study_.branch_steps * study_.branch_batch) /
           static_cast<double>(epoch);
  }

  void evaluate(std::int64_t step) {
    std::map<std::string, double> all = training_.evaluate();
    if (study_.averages()) {
      for (const auto& [key, x] : training_.evaluate_average()) all[key + "_ema"] = x;
    }
    const auto found = all.find(study_.metric);
    if (found == all.end()) {
      std::string known;
      for (const auto& [key, x] : all) known += (known.empty() ? "" : ", ") + key;
      throw ConfigError("search.metric.name: '" + study_.metric +
                        "' is not evaluated by this workload; it has " + known);
    }
    // With branches that decay, only what they end with counts.
    if (!study_.decays() || step == 0) {
      score_.add(step, found->second);
      learning_.add(static_cast<double>(step), all);
    }
    if (training_.rank() != 0) return;
    Json row = line_of("eval", step);
    row["val_loss"] = runner::number(found->second);
    row["train_loss"] = step > 0 ? runner::number(loss_) : Json(nullptr);
    if (ramp_) row["batch"] = step_batch_;
    for (const auto& [key, x] : all) row[key] = runner::number(x);
    if (trial_.params.contains("lr"))
      row["lr"] = trial_.params["lr"].get<double>() * (step > 0 ? lr_multiplier_ : 1);
    write(row);
  }

  /// What was measured beside the training, as lines of their own.
  void probe(const StepReport& report) {
    if (training_.rank() != 0) return;
    for (const nlohmann::json& rows :
         {noise_of(report, training_.config()),
          spectra_of(training_.optimizer(), report, training_.parameters())}) {
      for (const Json probed : rows) {
        Json row = line_of("probe", steps());
        row.update(probed);
        write(row);
      }
    }
  }

  /// A failure is kept for the next agreement: the other ranks are ahead already.
  void write(const Json& row) try { metrics_.line(dump(row)); } catch (...) {
    problem_ = std::current_exception();
  }

  /// @return false: it was not stopped.
  bool finish(const char* state, const std::string& message) {
    // Of branches that decay, the longest stands for the trial.
    const std::int64_t steps = std::max<std::int64_t>({this->steps(), 0, horizon_});
    record_ = runner::summary(trial_, attempt_, state, message, &score_,
                              {steps, examples(steps), loss_, tokens(steps), seconds()});
    record_["epochs_seen"] = epochs_seen();
    if (ramp_) record_["final_batch"] = training_.batch();
    if (!trial_.rungs.empty()) record_["rungs"] = rungs_;
    if (const auto share = training_.clip_fraction()) record_["clip_fraction"] = *share;
    learning_.write_to(record_);
    if (study_.decays()) record_["trained_steps"] = this->steps() + branch_steps_;
    if (study_.exclusive) record_["timing"] = timing_.summary(training_);
    if (study_.branches()) {
      record_["fork_steps"] = study_.branch_steps;
      record_["fork_batch"] = study_.branch_batch;
      record_["fork_optimizer_state"] = study_.branch_state;
      record_["rewarm_frac"] = study_.branch_rewarm_frac;
      record_["smoothed_loss"] = steps > 0 ? runner::number(smoothed_) : Json(nullptr);
    }
    runtime::agree(training_.control(), [&] {
      if (problem_) std::rethrow_exception(problem_);
      if (training_.rank() != 0) return;
      Json summary = record_;
      summary["parameters"] = training_.elements();
      runtime::write_file_atomically(directory_ / "summary.json", dump(summary, 2) + "\n");
    });
    return false;
  }

  const runner::Study& study_;
  const runner::Trial& trial_;
  const int attempt_;
  const std::filesystem::path directory_;
  const std::function<bool()>& stop_;
  const std::int64_t first_step_ = study_.resets() ? 0 : study_.branch_steps;  // the optimizer's
  const Clock::time_point start_ = Clock::now();
  Training training_;
  std::optional<GnsRamp> ramp_;
  const runner::Expression diverged_;
  runner::Score score_;
  LineFile metrics_;  // of the first rank
  std::exception_ptr problem_;

  double loss_ = std::nan(""), first_loss_ = std::nan(""), lr_multiplier_ = 1;
  std::int64_t step_batch_ = trial_.batch;
  double smoothed_ = std::nan("");  // average of losses, of weight 1/2
  bool timed_out_ = false;
  std::vector<double> rungs_;  // the metric on each
  std::vector<runner::Decay> decays_;
  std::int64_t horizon_ = 0, branch_steps_ = 0;  // reached by a branch; of all branches
  TrialTiming timing_;
  std::optional<StartWindow> window_;  // where times are measured
  LearningTimes learning_;
  Json record_;
};

Json failure(const TrialTask& task, const std::string& message) {
  return runner::summary(task.trial, task.attempt, "failed", message, nullptr, {});
}

}  // namespace

std::string to_text(const TrialTask& task) {
  const runner::Trial& t = task.trial;
  return dump(Json{{"t", "trial"},
                   {"index", t.index},
                   {"id", t.id},
                   {"role", t.role},
                   {"params", t.params},
                   {"base", t.base},
                   {"overrides", t.overrides},
                   {"fork", t.fork},
                   {"fork_overrides", t.fork_overrides},
                   {"ranks", t.ranks},
                   {"batch", t.batch},
                   {"steps", t.steps},
                   {"rungs", t.rungs},
                   {"until", t.until},
                   {"attempt", task.attempt}});
}

TrialTask trial_task(const std::string& text) {
  const Json json = Json::parse(text);
  TrialTask task;
  runner::Trial& t = task.trial;
  t.index = json["index"];
  t.id = json["id"];
  t.role = json["role"];
  t.params = json["params"];
  t.base = json["base"];
  t.overrides = json["overrides"].get<std::vector<std::string>>();
  t.fork = json["fork"];
  t.fork_overrides = json["fork_overrides"].get<std::vector<std::string>>();
  t.ranks = json["ranks"];
  t.batch = json["batch"];
  t.steps = json["steps"];
  t.rungs = json["rungs"].get<std::vector<std::int64_t>>();
  t.until = json["until"];
  task.attempt = json["attempt"];
  return task;
}

TrialEnd run_trial(const runner::Study& study, const Config& base, const TrialTask& task,
                   Communicator& group, const std::filesystem::path& directory,
                   const std::function<bool()>& stop) {
  const Clock::time_point begin = Clock::now();
  TrialEnd end;
  try {
    Fork fork;
    if (study.branches()) {
      fork = reach_fork(study, base, task.trial, group,
                        directory.parent_path().parent_path() / "forks", stop);
    }
    end.stopped = fork.stopped;
    if (!end.stopped) {
      TrialRun run(study, base, task, group, directory, stop);
      end.stopped = run.run(fork);
      end.record = run.take_record();
    }
  } catch (const IoError&) {
    throw;  // the next trial's files would be no better
  } catch (const CommError&) {
    throw;
  } catch (const ConfigError& error) {
    end.record = failure(task, error.what());
  } catch (const std::exception& error) {
    end.record = failure(task, error.what());
    end.retry = true;
  }
  end.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  return end;
}

}  // namespace orthrus::cli
