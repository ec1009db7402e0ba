#include "runtime/cli/study_run.hpp"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <orthrus/error.hpp>
#include <set>
#include <span>
#include <thread>
#include <utility>

#include "runtime/agree.hpp"
#include "runtime/cli/isolated_trial.hpp"
#include "runtime/cli/program_trial.hpp"
#include "runtime/cli/run_directory.hpp"
#include "runtime/cli/signals.hpp"
#include "runtime/cli/study_directory.hpp"
#include "runtime/cli/study_dry_run.hpp"
#include "runtime/cli/trial.hpp"
#include "runtime/config_scalar.hpp"
#include "runtime/report.hpp"
#include "runtime/runner/campaign.hpp"
#include "runtime/runner/groups.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::cli {
namespace {

namespace fs = std::filesystem;
using runner::Json;
using runner::Trial;
using Clock = std::chrono::steady_clock;

std::string dump(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// ---- messages -----------------------------------------------------------------------------------

void send(Communicator& comm, const Json& message, int to) {
  std::string text = dump(message);
  const std::int64_t bytes = std::ssize(text);
  comm.send(ConstSpan{&bytes, 1, DType::i64}, to);
  comm.send(ConstSpan{text.data(), bytes, DType::u8}, to);
}

/// Messages of one rank to this one; one is always awaited until `close`.
class Inbox {
 public:
  Inbox(Communicator& comm, int from) : comm_(comm), from_(from) { await(); }
  Inbox(const Inbox&) = delete;
  Inbox& operator=(const Inbox&) = delete;

  /// Has something come?
  bool test() { return coming_.test(); }
  /// @param more  whether another one will come
  Json take(const std::function<bool(const Json&)>& more) {
    coming_.wait();
    std::string text(static_cast<std::size_t>(bytes_), '\0');
    comm_.receive(Span{text.data(), bytes_, DType::u8}, from_);
    Json message = Json::parse(text);
    if (more(message)) await();
    return message;
  }

 private:
  void await() { coming_ = comm_.start_receive(Span{&bytes_, 1, DType::i64}, from_); }

  Communicator& comm_;
  const int from_;
  std::int64_t bytes_ = 0;  // of the message to come
  Request coming_;
};

// ---- the scheduler ------------------------------------------------------------------------------

/// Which trial runs where. On rank 0 alone; nobody else writes the journal and the results.
class Scheduler {
 public:
  Scheduler(const runner::Expansion& expansion, StudyDirectory& directory, double time_limit_s,
            bool quiet)
      : expansion_(expansion),
        directory_(directory),
        campaign_(expansion),
        time_limit_s_(time_limit_s),
        quiet_(quiet) {
    costs_ = directory.before().costs;
    for (const auto& [index, trial] : directory.before().trials) {
      attempts_[index] = trial.attempts;
      if (!trial.record.is_null()) kept_[index] = trial.record;
    }
    absorb();
    directory_.write_results(campaign_.results());
  }

  [[nodiscard]] const runner::Campaign& campaign() const { return campaign_; }
  [[nodiscard]] bool stopping() const { return stopping_; }

  /// Runs what is due on groups of `ranks` ranks each, until nothing is or a stop is asked for.
  struct Ground {
    std::int64_t ranks = 1;
    Communicator* leaders = nullptr;  ///< of other groups, from rank 1 on; null: there are none
    /// Runs a trial on this rank's group; null: it is in none, and only schedules.
    std::function<TrialEnd(const TrialTask&, const std::function<bool()>& stop)> own;
  };
  void run(const Ground& ground) {
    ranks_ = ground.ranks;
    leaders_ = ground.leaders;
    groups_.clear();
    const int groups = leaders_ == nullptr ? 1 : leaders_->size();
    write({{"t", "phase"}, {"ranks", ranks_}, {"groups", groups - (ground.own ? 0 : 1)}});
    for (int g = 1; g < groups; ++g) {
      groups_.push_back({g, std::make_unique<Inbox>(*leaders_, g), Group::State::starting, {}});
    }
    // The longest trials go to all at once, rather than the first one here.
    while (std::any_of(groups_.begin(), groups_.end(),
                       [](const Group& g) { return g.state == Group::State::starting; })) {
      poll();
      pause();
    }
    for (;;) {
      poll();
      if (stopping_ || over()) break;
      const std::optional<TrialTask> task = ground.own ? take(0) : std::nullopt;
      if (!task) {
        pause();
        continue;
      }
      const TrialEnd end = ground.own(*task, [this] {
        poll();
        return stopping_;
      });
      finished(*task, end);
    }
    for (;;) {
      poll();
      if (std::all_of(groups_.begin(), groups_.end(),
                      [](const Group& g) { return g.state == Group::State::gone; }))
        break;
      pause();
    }
  }

  void close() {
    directory_.write_results(campaign_.results());
    write({{"t", "end"}, {"state", campaign_.complete() ? "complete" : "preempted"}});
  }

 private:
  struct Group {
    enum class State : std::uint8_t { starting, idle, busy, ended, gone };
    int number = 0;
    std::unique_ptr<Inbox> inbox;
    State state = State::starting;
    TrialTask task;
  };

  static void pause() { std::this_thread::sleep_for(std::chrono::microseconds(100)); }

  void write(Json line) {
    line["time"] = utc_now();
    directory_.journal().write(line);
    last_line_ = Clock::now();
  }

  [[nodiscard]] bool over() const {
    return running_.empty() &&
           std::none_of(due_.begin(), due_.end(), [this](const Trial* t) { return fits(*t); });
  }
  /// Ranks of a job of its own are not this job's.
  [[nodiscard]] bool fits(const Trial& trial) const {
    return expansion_.study().isolates() || trial.ranks == ranks_;
  }

  /// Looks once at everything that may have happened.
  void poll() {
    for (Group& group : groups_) {
      while (group.state != Group::State::gone && group.inbox->test()) hear(group);
    }
    const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
    stopping_ = stopping_ || stop_requested() || (time_limit_s_ > 0 && seconds > time_limit_s_);
    const bool end = stopping_ || over();
    for (Group& group : groups_) {
      if (group.state != Group::State::idle && !(stopping_ && group.state == Group::State::busy))
        continue;
      if (end) {
        send(*leaders_, {{"t", "end"}}, group.number);
        group.state = Group::State::ended;
      } else if (const std::optional<TrialTask> task = take(group.number)) {
        group.task = *task;
        group.state = Group::State::busy;
        send(*leaders_, Json::parse(to_text(*task)), group.number);
      }
    }
    const std::chrono::duration<double> silent = Clock::now() - last_line_;
    if (silent.count() > expansion_.study().heartbeat_s) write({{"t", "beat"}});
  }

  void hear(Group& group) {
    const Json message = group.inbox->take([](const Json& m) { return m.at("t") != "bye"; });
    const std::string type = message.at("t");
    if (type == "bye") {
      group.state = Group::State::gone;
      return;
    }
    if (type == "result" || type == "stopped") {
      TrialEnd end;
      end.stopped = type == "stopped";
      end.retry = message.value("retry", false);
      end.seconds = message.value("seconds", 0.0);
      if (message.contains("record")) end.record = message["record"];
      finished(group.task, end);
      // One rank that was asked to stop speaks for the job.
      stopping_ = stopping_ || end.stopped;
    }
    if (group.state != Group::State::ended) group.state = Group::State::idle;
  }

  /// The next trial for a group; nothing where all that is due is running.
  std::optional<TrialTask> take(int group) {
    for (const Trial* const trial : due_) {
      if (!fits(*trial) || running_.count(trial->index) > 0) continue;
      running_.insert(trial->index);
      const int attempt = ++attempts_[trial->index];
      write({{"t", "assign"},
             {"index", trial->index},
             {"trial", trial->id},
             {"group", group},
             {"attempt", attempt}});
      return TrialTask{*trial, attempt};
    }
    return {};
  }

  void finished(const TrialTask& task, const TrialEnd& end) {
    const std::int64_t index = task.trial.index;
    running_.erase(index);
    Json line{{"t", "state"}, {"index", index}, {"trial", task.trial.id}};
    const bool again =
        !end.stopped && end.retry && failures_[index]++ < expansion_.study().max_retries;
    if (end.stopped || again) {
      line["state"] = "waiting";
      if (const auto rung = kept_.find(index); rung != kept_.end()) line["result"] = rung->second;
      if (again) {
        line["message"] = end.record.value("message", "");
        spdlog::warn("trial {}: failed, and is tried again: {}", task.trial.directory(),
                     end.record.value("message", ""));
      }
      write(std::move(line));
      return;
    }
    line["state"] = end.record.at("state");
    line["attempt"] = task.attempt;
    line["seconds"] = end.seconds;
    line["result"] = end.record;
    kept_[index] = end.record;
    write(std::move(line));
    if (end.record.at("state") != "paused") directory_.append_result(end.record);
    absorb();
    report(task.trial, end);
  }

  /// Takes what results there are into the campaign, and says what that has decided. A result may
  /// wait for the trials before it to say that it is needed: after a `retry`.
  void absorb() {
    for (bool more = true; more;) {
      more = false;
      std::vector<std::int64_t> found;
      for (const auto& [index, record] : kept_) {
        const auto trial = campaign_.trials().find(index);
        if (trial != campaign_.trials().end() && !campaign_.has(record) &&
            record.at("trial") == trial->second.id)
          found.push_back(index);
      }
      for (const std::int64_t index : found) {
        more = true;
        for (const int cell : campaign_.record(kept_.at(index))) decided(cell);
      }
    }
    for (const auto& [index, record] : campaign_.results()) {
      if (record.at("state") != "pruned" || kept_.at(index).at("state") == "pruned") continue;
      kept_[index] = record;
      write({{"t", "state"},
             {"index", index},
             {"trial", record.at("trial")},
             {"state", "pruned"},
             {"result", record}});
      directory_.append_result(record);
    }
    due_ = campaign_.due();
    foretell();
  }

  /// Writes down what the trials that are due will cost, once.
  void foretell() {
    Json news = Json::array();
    for (const Trial* const trial : due_) {
      const auto [at, first] = costs_.try_emplace(trial->index, trial->cost());
      if (!first && std::exchange(at->second, trial->cost()) == trial->cost()) continue;
      news.push_back({trial->index, trial->cost()});
    }
    if (!news.empty()) write({{"t", "due"}, {"costs", std::move(news)}});
  }

  void decided(int cell) {
    const runner::Tuned& tuned = campaign_.tuned().at(cell);
    Json point = Json::object();
    for (const auto& [name, value] : expansion_.cells()[static_cast<std::size_t>(cell)].point)
      point[name] = value;
    for (const auto& [name, value] : tuned.best) point[name] = value;
    Json line{{"t", "choice"},
              {"cell", cell},
              {"params", std::move(point)},
              {"lr", tuned.choice.censored ? Json(nullptr) : Json(tuned.choice.lr)},
              {"fitted_lr", tuned.choice.fitted_lr},
              {"plateau_octaves", tuned.choice.plateau_octaves},
              {"extensions", tuned.extensions},
              {"edge_optimum", tuned.edge_optimum},
              {"by_loss", tuned.by_loss},
              {"known", std::ssize(campaign_.trials())}};
    const std::vector<Json>& before = directory_.before().choices;
    const auto last = std::find_if(before.rbegin(), before.rend(),
                                   [&](const Json& c) { return c.at("cell") == cell; });
    const bool said = last != before.rend() && last->at("lr") == line["lr"];
    if (!said) write(std::move(line));
  }

  void report(const Trial& trial, const TrialEnd& end) const {
    if (quiet_) return;
    std::string line =
        fmt::format("{}/{} | {} |", campaign_.results().size(), campaign_.trials().size(),
                    end.record["state"].get<std::string>());
    for (const auto& [name, value] : trial.params.items()) {
      line += " " + name + "=" +
              (value.is_number_float() ? fmt::format("{:.4g}", value.get<double>())
               : value.is_string()     ? value.get<std::string>()
                                       : value.dump());
    }
    const Json& r = end.record;
    if (r["steps"].is_number()) line += fmt::format(" | {} steps", r["steps"].get<std::int64_t>());
    if (r["steps_to_target"].is_number())
      line += fmt::format(" | target at {:.1f}", r["steps_to_target"].get<double>());
    if (r["final_val"].is_number())
      line += fmt::format(" | {} {:.5g}", expansion_.study().metric, r["final_val"].get<double>());
    line += " | " + runtime::format_seconds(end.seconds);
    if (const std::string message = r.value("message", "");
        !message.empty() && r["state"] == "failed")
      line += " | " + message;
    fmt::print("{}\n", line);
    std::fflush(stdout);
  }

  const runner::Expansion& expansion_;
  StudyDirectory& directory_;
  runner::Campaign campaign_;
  std::vector<const Trial*> due_;  // in the order in which they are to run
  const double time_limit_s_;
  const bool quiet_;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point last_line_ = Clock::now();
  bool stopping_ = false;

  std::int64_t ranks_ = 1;
  Communicator* leaders_ = nullptr;
  std::vector<Group> groups_;
  std::set<std::int64_t> running_;
  std::map<std::int64_t, int> attempts_, failures_;
  std::map<std::int64_t, Json> kept_;     // results, needed or not
  std::map<std::int64_t, double> costs_;  // as the journal has them
};

// ---- groups -------------------------------------------------------------------------------------

/// What every rank knows of the study.
struct Shared {
  runner::Study study;
  runner::Bases bases;
  fs::path directory;
  Json source;  ///< all of it, for other processes
};

/// A group of ranks: orders by its leader, work among its ranks.
struct Squad {
  Communicator orders;  ///< without a deadline: nobody knows when the next trial comes
  Communicator work;
};

/// Runs one trial on all ranks of a group; the leader knows it.
TrialEnd run_on_group(const Shared& shared, Squad& squad, const std::string& text,
                      const std::function<bool()>& stop) {
  const TrialTask task = trial_task(text);
  const fs::path directory = shared.directory / "trials" / task.trial.directory();
  if (shared.study.runs_command()) {
    const Config* const base =
        shared.study.configures() ? &shared.bases.at(task.trial.base) : nullptr;
    return run_program(shared.study, base, task, directory, stop);
  }
  if (shared.study.isolates())
    return run_isolated(shared.study, shared.source, task, directory, stop);
  return run_trial(shared.study, shared.bases.at(task.trial.base), task, squad.work, directory,
                   stop);
}

/// Every rank of a group but its leader.
void follow(const Shared& shared, Squad& squad) {
  for (;;) {
    std::string text;
    squad.orders.broadcast(text, 0);
    if (text.empty()) return;
    static_cast<void>(run_on_group(shared, squad, text, [] { return stop_requested(); }));
  }
}

/// The leader of a group other than the first.
void serve(const Shared& shared, Squad& squad, Communicator& leaders) {
  const auto more = [](const Json& message) { return message.at("t") != "end"; };
  Inbox inbox(leaders, 0);
  send(leaders, {{"t", "ready"}}, 0);
  for (;;) {
    const Json order = inbox.take(more);
    std::string text = order.at("t") == "end" ? "" : dump(order);
    squad.orders.broadcast(text, 0);
    if (text.empty()) break;
    // While a trial runs, the scheduler has nothing to say but that it is to end.
    const TrialEnd end =
        run_on_group(shared, squad, text, [&] { return stop_requested() || inbox.test(); });
    Json answer{{"t", end.stopped ? "stopped" : "result"}};
    if (!end.stopped) {
      answer["record"] = end.record;
      answer["retry"] = end.retry;
      answer["seconds"] = end.seconds;
    }
    send(leaders, answer, 0);
  }
  send(leaders, {{"t", "bye"}}, 0);
}

/// Cuts the world into groups of `ranks`, at most `most` of them (0: as many as there is room for),
/// none of them over two nodes where it has room on one, and runs what is due. Collective over the
/// world.
void run_phase(const Shared& shared, Communicator& world, std::int64_t ranks, std::int64_t most,
               Scheduler* scheduler) {
  const auto size = static_cast<int>(ranks);
  // A dedicated scheduler is a leader without a group.
  const std::vector<int> groups =
      runner::groups_of(world.all_gather_strings(host_name()), size,
                        shared.study.dedicated_scheduler ? 1 : 0, static_cast<int>(most));
  const int group = groups[static_cast<std::size_t>(world.rank())];
  const int count = 1 + *std::max_element(groups.begin(), groups.end());
  const bool works = group >= 0;
  const bool leads =
      world.rank() == 0 ||
      (works && std::find(groups.begin(), groups.end(), group) - groups.begin() == world.rank());
  Squad squad{world.split(works ? group : count, world.rank(), "orders"), {}};
  squad.orders.set_timeout(0);
  squad.work = squad.orders.duplicate("group");
  squad.work.set_timeout(60);
  Communicator leaders = world.split(leads ? 0 : 1, world.rank(), "leaders");
  leaders.set_timeout(0);
  if (scheduler != nullptr && !works) return scheduler->run({ranks, &leaders, nullptr});
  if (!works) return;
  if (!leads) return follow(shared, squad);
  if (scheduler == nullptr) return serve(shared, squad, leaders);
  scheduler->run({ranks, count > 1 ? &leaders : nullptr,
                  [&](const TrialTask& task, const std::function<bool()>& stop) {
                    std::string text = to_text(task);
                    squad.orders.broadcast(text, 0);
                    return run_on_group(shared, squad, text, stop);
                  }});
  std::string nothing;
  squad.orders.broadcast(nothing, 0);
}

// ---- the study ----------------------------------------------------------------------------------

/// What rank 0 has resolved, elsewhere.
Shared shared_of(const Json& source) {
  Shared shared;
  shared.source = source;
  shared.study = runner::parse_study(source.at("text").get<std::string>(), source.at("file"),
                                     source.at("set").get<std::vector<std::string>>());
  for (const auto& [word, base] : source.at("bases").items()) {
    Config config = parse_config(base["yaml"].get<std::string>(), base["source"]);
    config.source = base["source"];
    shared.bases[word] = std::move(config);
  }
  shared.directory = source.at("directory").get<std::string>();
  return shared;
}

/// Rank 0 reads the files and the environment; the others parse what it resolved.
Shared shared_study(const StudyRunOptions& options, Communicator& world, std::string& text,
                    std::optional<runner::Expansion>& expansion) {
  Shared shared;
  std::string sent;
  runtime::agree(world, [&] {
    if (world.rank() != 0) return;
    text =
        options.text.empty()
            ? runtime::read_file(options.file, static_cast<std::int64_t>(runtime::yaml_max_bytes))
            : options.text;
    shared.study = runner::parse_study(text, options.file, options.set);
    const fs::path beside = fs::path(options.file).parent_path();
    Json bases = Json::object();
    for (const std::string& word : runner::base_words(shared.study)) {
      const auto named = shared.study.bases.find(word);
      const std::string file =
          named != shared.study.bases.end() ? named->second : shared.study.base;
      if (file.empty() && word.empty()) {
        throw ConfigError(options.file +
                          ": base: a configuration is missing: base, bases, or the parameter "
                          "optimizer with the name of a rule");
      }
      shared.bases[word] = file.empty() ? runner::default_base(word) : load_config(beside / file);
      bases[word] = {{"yaml", to_yaml(shared.bases[word])}, {"source", shared.bases[word].source}};
    }
    shared.directory = options.directory.empty() ? fs::path("studies") / shared.study.name
                                                 : fs::path(options.directory);
    expansion.emplace(shared.study, shared.bases);
    shared.source = {{"text", text},
                     {"file", options.file},
                     {"set", options.set},
                     {"bases", std::move(bases)},
                     {"directory", shared.directory.string()}};
    sent = dump(shared.source);
  });
  world.broadcast(sent, 0);
  return world.rank() == 0 ? shared : shared_of(Json::parse(sent));
}

/// Numbers of ranks that trials want of this job, ascending.
std::vector<std::int64_t> phases_of(const runner::Expansion& expansion) {
  if (expansion.study().isolates()) return {1};
  std::set<std::int64_t> ranks;
  for (const Trial& trial : expansion.initial()) ranks.insert(trial.ranks);
  return {ranks.begin(), ranks.end()};
}

void check_ranks(const runner::Study& study, const std::vector<std::int64_t>& phases, int world) {
  const int ranks = study.dedicated_scheduler ? world - 1 : world;
  if (phases.back() > ranks) {
    throw ConfigError(fmt::format(
        "{}: execution.ranks_per_trial: a trial wants {} ranks, and there {} {}{}; start more, or "
        "fewer for a trial",
        study.source, phases.back(), ranks == 1 ? "is" : "are", ranks,
        study.dedicated_scheduler ? " beside execution.dedicated_scheduler" : ""));
  }
  if (phases.size() > 1 && !study.exclusive) {
    throw ConfigError(study.source +
                      ": search.parameters.ranks: trials of several sizes are for times; "
                      "execution: {exclusive: true} runs them one at a time");
  }
}

/// Noise that no trial can measure would be silently missing from its metrics.
void check_probes(const runner::Expansion& expansion) {
  const runner::Study& study = expansion.study();
  if (study.gns_every == 0) return;
  for (const Trial& trial : expansion.initial()) {
    const Config config = runner::trial_config(expansion.bases().at(trial.base), trial);
    const std::int64_t gradients =
        config.virtual_shards > 0
            ? config.virtual_shards
            : trial.ranks * std::max<std::int64_t>(config.train.micro_batches, 1);
    const bool of_ranks = config.virtual_shards == 0 && gradients == trial.ranks;
    if (study.asks_dual_noise() && gradients > 1 && !of_ranks) {
      throw ConfigError(fmt::format(
          "{}: probes.gns.geometry: trial {}: noise in norms other than l2 is of ranks with one "
          "gradient each: no train.micro_batches, no reproducible.virtual_shards",
          study.source, trial.directory()));
    }
    if (gradients > 1 || config.diagnostics.gns_source == "norm_layers") continue;
    throw ConfigError(fmt::format(
        "{}: probes.gns.every: trial {} has one gradient a step, and one alone says nothing of "
        "noise; execution.ranks_per_trial, or train.micro_batches of its base, of at least 2",
        study.source, trial.directory()));
  }
}

Json document_of(const runner::Expansion& expansion, const Scheduler& scheduler,
                 const fs::path& directory, double seconds) {
  std::map<std::string, int> states;
  for (const auto& [index, record] : scheduler.campaign().results())
    ++states[record.at("state").get<std::string>()];
  Json tuned = Json::array();
  for (const auto& [cell, t] : scheduler.campaign().tuned()) {
    Json row = Json::object();
    for (const auto& [name, value] : expansion.cells()[static_cast<std::size_t>(cell)].point)
      row[name] = value;
    for (const auto& [name, value] : t.best) row[name] = value;
    row["lr"] = t.choice.censored ? Json(nullptr) : Json(t.choice.lr);
    row["fitted_lr"] = t.choice.fitted_lr;
    row["plateau_octaves"] = t.choice.plateau_octaves;
    row["extensions"] = t.extensions;
    row["edge_optimum"] = t.edge_optimum;
    tuned.push_back(std::move(row));
  }
  return {{"schema", 1},
          {"study", expansion.study().name},
          {"directory", directory.string()},
          {"status", scheduler.campaign().complete() ? "complete" : "preempted"},
          {"trials", scheduler.campaign().trials().size()},
          {"finished", scheduler.campaign().results().size()},
          {"states", states},
          {"tuned", std::move(tuned)},
          {"seconds", seconds}};
}

}  // namespace

double duration_s(const std::string& text) {
  double total = 0;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = text.find_first_not_of("0123456789.", at);
    double value = 0;
    if (runtime::config_file::parse_real(text.substr(at, end - at), value) !=
        runtime::config_file::Parsed::ok)
      break;
    if (end == std::string::npos) return total + value;
    const double unit = text[end] == 'h' ? 3600 : text[end] == 'm' ? 60 : text[end] == 's' ? 1 : 0;
    if (unit == 0) break;
    total += unit * value;
    at = end + 1;
    if (at == text.size()) return total;
  }
  throw ConfigError("'" + text + "' is no duration; examples: 3h, 90m, 2h30m, 45s",
                    ExitCode::usage);
}

int run_trial_job(const std::string& file, Context& context) {
  const SignalScope signals;
  Communicator world = context.world(60);
  std::string text;
  runtime::agree(world, [&] {
    if (world.rank() == 0) text = dump(read_job(file));
  });
  world.broadcast(text, 0);
  const Json job = Json::parse(text);
  const Shared shared = shared_of(job["study"]);
  const TrialTask task = trial_task(job["task"]);
  const fs::path directory = job["trial_dir"].get<std::string>();
  Clock::time_point last = Clock::now();
  const std::chrono::duration<double> between(shared.study.heartbeat_s / 4);
  try {
    const TrialEnd end =
        run_trial(shared.study, shared.bases.at(task.trial.base), task, world, directory, [&] {
          if (world.rank() == 0 && Clock::now() - last > between) {
            touch_beat(directory);
            last = Clock::now();
          }
          return stop_requested();
        });
    if (world.rank() == 0) write_end(directory, end);
    return end.stopped ? static_cast<int>(ExitCode::preempted) : 0;
  } catch (...) {
    context.settle_error();
    throw;
  }
}

StudyEnd run_study(const StudyRunOptions& options, Context& context) {
  const SignalScope signals;
  return run_study(options, context.world(60), context.json, [&] { context.settle_error(); });
}

StudyEnd run_study(const StudyRunOptions& options, Communicator world, bool quiet,
                   const std::function<void()>& settle) {
  const Clock::time_point start = Clock::now();
  const double limit = options.time_limit.empty() ? 0 : duration_s(options.time_limit);
  std::string text;
  std::optional<runner::Expansion> expansion;  // on rank 0
  const Shared shared = shared_study(options, world, text, expansion);
  std::vector<std::int64_t> phases;
  std::string listed;
  runtime::agree(world, [&] {
    if (world.rank() != 0) return;
    phases = phases_of(*expansion);
    check_ranks(shared.study, phases, world.size());
    check_probes(*expansion);
    listed = Json(phases).dump();
  });
  world.broadcast(listed, 0);
  phases = Json::parse(listed).get<std::vector<std::int64_t>>();

  StudyEnd out;
  out.directory = shared.directory;
  if (options.dry_run) {
    out.document = dry_run(shared.study, shared.bases, world.rank() == 0 ? &*expansion : nullptr,
                           world, quiet);
    out.complete = true;
    return out;
  }
  std::optional<StudyDirectory> directory;
  std::optional<Scheduler> scheduler;
  runtime::agree(world, [&] {
    if (world.rank() != 0) return;
    directory.emplace(shared.directory, text, *expansion,
                      StudyDirectory::Terms{options.resume, options.allow_version_mix});
    if (!quiet) fmt::print("{}\n", describe_size(*expansion));
    scheduler.emplace(*expansion, *directory, limit, quiet);
  });
  try {
    double stopping = 0;
    for (const std::int64_t ranks : phases) {
      run_phase(shared, world, ranks, shared.study.exclusive ? 1 : shared.study.max_parallel,
                scheduler ? &*scheduler : nullptr);
      // Ranks without a group wait here, for as long as it takes.
      const double deadline = world.options().timeout_s;
      world.set_timeout(0);
      stopping = scheduler && scheduler->stopping() ? 1 : 0;
      world.broadcast(std::span<double>(&stopping, 1));
      world.set_timeout(deadline);
      if (stopping != 0) break;
    }
  } catch (...) {
    settle();
    throw;
  }
  double complete = 0;
  runtime::agree(world, [&] {
    if (world.rank() != 0) return;
    scheduler->close();
    complete = scheduler->campaign().complete() ? 1 : 0;
    out.results = scheduler->campaign().results();
    out.document = document_of(*expansion, *scheduler, shared.directory,
                               std::chrono::duration<double>(Clock::now() - start).count());
  });
  world.broadcast(std::span<double>(&complete, 1));
  out.complete = complete != 0;
  return out;
}

}  // namespace orthrus::cli
