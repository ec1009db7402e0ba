#include "runtime/cli/runner_experiments.hpp"

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <orthrus/communicator.hpp>
#include <orthrus/error.hpp>
#include <orthrus/sharded_optimizer.hpp>
#include <string>
#include <thread>
#include <vector>

#include "runtime/cli/child.hpp"
#include "runtime/cli/study_run.hpp"
#include "runtime/cli/study_scaling.hpp"
#include "runtime/plan.hpp"
#include "runtime/runner/example_study.hpp"
#include "runtime/safetensors.hpp"
#include "runtime/studies/random.hpp"

namespace orthrus::cli {
namespace {

namespace fs = std::filesystem;
using runner::Expansion;
using runner::Json;
using studies::at_least;
using studies::at_most;
using studies::never;
using studies::Row;

// ---- places and records -------------------------------------------------------------------------

/// A directory of its own, gone with it.
class Place {
 public:
  Place() {
    std::string pattern = (fs::temp_directory_path() / "orthrus-reproduce-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr)
      throw IoError(pattern + ": cannot be created", ExitCode::cannot_create);
    path_ = pattern;
  }
  ~Place() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  [[nodiscard]] fs::path operator/(const std::string& name) const { return path_ / name; }
  void write(const std::string& name, const std::string& text) const {
    runtime::write_file_atomically(path_ / name, text);
  }

 private:
  fs::path path_;
};

std::vector<Json> lines_of(const fs::path& file) {
  std::ifstream in(file);
  std::vector<Json> lines;
  for (std::string line; std::getline(in, line);) {
    Json parsed = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!parsed.is_discarded()) lines.push_back(std::move(parsed));
  }
  return lines;
}

/// What must not depend on when, where and how often a trial was run.
std::vector<std::string> without_times(const fs::path& file) {
  std::vector<std::string> out;
  for (Json line : lines_of(file)) {
    line.erase("attempt");
    line.erase("wall_s");
    out.push_back(line.dump());
  }
  return out;
}

int differing(const std::vector<std::string>& a, const std::vector<std::string>& b) {
  int n = static_cast<int>(std::max(a.size(), b.size()) - std::min(a.size(), b.size()));
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) n += a[i] == b[i] ? 0 : 1;
  return n;
}

fs::path metrics_of(const fs::path& study, std::int64_t index) {
  for (const fs::directory_entry& entry : fs::directory_iterator(study / "trials")) {
    if (entry.path().filename().string().starts_with(fmt::format("{:04}-", index)))
      return entry.path() / "metrics.jsonl";
  }
  return {};
}

constexpr const char* quadratic =
    "schema: 1\n"
    "name: quad\n"
    "seed: 3\n"
    "workload: {name: noisy_quadratic, rows: 8, cols: 8}\n"
    "train: {steps: 60, batch: 8}\n"
    "groups:\n"
    "  - {match: \"*\", rule: {name: muon, lr: 0.1}, lmo: {scale: original}}\n";

/// A study on ranks that are threads; what it warns of is expected. @return its end, of rank 0
StudyEnd run_on_threads(int ranks, const StudyRunOptions& options) {
  struct Silence {
    spdlog::level::level_enum before = spdlog::get_level();
    Silence() { spdlog::set_level(spdlog::level::off); }
    ~Silence() { spdlog::set_level(before); }
    Silence(const Silence&) = delete;
    Silence& operator=(const Silence&) = delete;
  } const silence;
  StudyEnd end;
  run_thread_ranks(ranks, [&](Communicator& world) {
    const int rank = world.rank();
    StudyEnd mine = run_study(options, std::move(world), /*quiet=*/true);
    if (rank == 0) end = std::move(mine);
  });
  return end;
}

StudyRunOptions study_in(const fs::path& file, const fs::path& directory) {
  StudyRunOptions options;
  options.file = file.string();
  options.directory = directory.string();
  return options;
}

// ---- messages -----------------------------------------------------------------------------------

/// Bytes that every rank of `ranks` sent in `call`; 0 where they differ.
std::int64_t bytes_of_each(int ranks, const std::function<void(Communicator&)>& call) {
  std::vector<std::int64_t> sent(static_cast<std::size_t>(ranks));
  run_thread_ranks(ranks, [&](Communicator& world) {
    const std::int64_t before = world.traffic().bytes;
    call(world);
    sent[static_cast<std::size_t>(world.rank())] = world.traffic().bytes - before;
  });
  return std::all_of(sent.begin(), sent.end(), [&](auto b) { return b == sent[0]; }) ? sent[0] : -1;
}

/// Bytes that a step of Muon on `count` matrices of m×n in f32 sends, over all ranks, less those of
/// norms and flags. The runtime throws where they are not the plan's.
std::int64_t bytes_of_step(int ranks, const std::string& mode, int count, Index m, Index n) {
  const Config config = parse_config(
      "schema: 1\ngroups:\n  - {match: \"*\", rule: {name: muon}, matrix: {mode: " + mode + "}}\n");
  std::vector<runtime::ParameterShape> shapes;
  for (int k = 0; k < count; ++k) {
    runtime::ParameterShape shape;
    shape.name = "w" + std::to_string(k);
    shape.shape = {m, n};
    shapes.push_back(std::move(shape));
  }
  const runtime::Plan plan = runtime::make_plan(config, shapes, ranks);
  std::int64_t sent = 0;
  std::mutex mutex;
  run_thread_ranks(ranks, [&](Communicator& world) {
    std::vector<std::vector<float>> weights(shapes.size()), gradients(shapes.size());
    std::vector<Parameter> parameters(shapes.size());
    for (std::size_t k = 0; k < shapes.size(); ++k) {
      studies::Random random(k, static_cast<std::uint64_t>(world.rank()));
      for (std::vector<float>* const buffer : {&weights[k], &gradients[k]})
        buffer->resize(static_cast<std::size_t>(m * n));
      for (float& x : gradients[k]) x = static_cast<float>(random.normal());
      parameters[k].name = shapes[k].name;
      parameters[k].shape = shapes[k].shape;
      parameters[k].weights = weights[k].data();
      parameters[k].gradient = gradients[k].data();
    }
    ShardedOptimizer optimizer(config, std::move(world), std::move(parameters));
    for (int k = 0; k < count; ++k) optimizer.gradient_ready(k);
    const std::int64_t bytes = optimizer.step().bytes_sent;
    const std::lock_guard lock(mutex);
    sent += bytes;
  });
  const Index control = plan.control_before() + plan.control_after();
  return sent - 2 * (ranks - 1) * control * 8;
}

std::vector<Row> message_bytes() {
  std::vector<Row> rows;
  const auto exactly = [&](const std::string& what, std::int64_t bytes, std::int64_t expected) {
    rows.push_back({what, static_cast<double>(bytes), static_cast<double>(expected), 0});
  };
  constexpr Index m = 16, n = 24;
  constexpr std::int64_t v = m * n * 4;
  for (const int p : {1, 2, 4}) {
    const std::string at = fmt::format(", {} rank{}", p, p == 1 ? "" : "s");
    const std::vector<Index> parts(static_cast<std::size_t>(p), m * n / p);
    const std::vector<Index> crumbs(static_cast<std::size_t>(p), m * n / p / p);
    // Buffers of each rank, as large as the matrix.
    const auto each = [&](const std::function<void(Communicator&, float*, float*)>& call) {
      return bytes_of_each(p, [&](Communicator& world) {
        std::vector<float> from(m * n), to(m * n);
        call(world, from.data(), to.data());
      });
    };
    exactly("all-reduce: bytes of a rank" + at, each([&](Communicator& c, float* a, float*) {
              c.all_reduce(Span{a, m * n, DType::f32}, ReduceOp::sum);
            }),
            2 * v * (p - 1) / p);
    exactly(
        "reduce-scatter" + at, each([&](Communicator& c, float* a, float* b) {
          c.reduce_scatter(ConstSpan{a, m * n, DType::f32}, parts, Span{b, m * n / p, DType::f32});
        }),
        v * (p - 1) / p);
    exactly("all-gather" + at, each([&](Communicator& c, float* a, float* b) {
              c.all_gather(ConstSpan{a, m * n / p, DType::f32}, parts, Span{b, m * n, DType::f32});
            }),
            v * (p - 1) / p);
    exactly("all-to-all of a shard" + at, each([&](Communicator& c, float* a, float* b) {
              c.all_to_all(ConstSpan{a, m * n / p, DType::f32}, crumbs,
                           Span{b, m * n / p, DType::f32}, crumbs);
            }),
            v / p * (p - 1) / p);
    constexpr int matrices = 8;
    exactly("step, owners of 8 matrices: all ranks" + at, bytes_of_step(p, "owner", matrices, m, n),
            2 * v * (p - 1) * matrices);
    // Gradients come and weights go as with any sharding; momentum goes to owners and back.
    exactly("step, shards that meet at owners" + at, bytes_of_step(p, "exchange", matrices, m, n),
            (2 * v * (p - 1) + 2 * v * (p - 1) / p) * matrices);
    // Rows stay where they are: one sum of a symmetric matrix, of which a triangle travels.
    exactly("step, rows whose Gram matrix is summed" + at, bytes_of_step(p, "gram", matrices, m, n),
            (2 * v * (p - 1) + 2 * (p - 1) * (m * (m + 1) / 2) * 4) * matrices);
  }
  return rows;
}

/// T(p) = 2 + 6/p ms: efficiencies of 8/(2p + 6), a serial fraction of 1/4, and none where a core
/// had several ranks.
std::vector<Row> scaling_times() {
  std::vector<Row> rows;
  for (const int over : {0, 1, 4}) {
    StudyResults study;
    study.resolved = Json::object();
    for (const int p : {1, 2, 4}) {
      StudyTrial& trial = study.trials.emplace_back();
      trial.state = "complete";
      trial.params = {{"ranks", p}};
      trial.line = {{"timing",
                     {{"ranks", p},
                      {"elements", 1000},
                      {"optimizer_ms", 2 + 6.0 / p},
                      {"oversubscribed", p == over}}}};
    }
    const ScalingSeries series = scaling_of(study).at(0);
    int told = 0;
    for (const ScalingPoint& point : series.points) {
      const std::string at = fmt::format(", {:g} ranks", point.ranks);
      told += std::isnan(point.efficiency) ? 0 : 1;
      if (over != 0) continue;
      rows.push_back(
          studies::relative("efficiency" + at, point.efficiency, 8 / (2 * point.ranks + 6), 1e-12));
      if (point.ranks > 1)
        rows.push_back(studies::relative("serial fraction" + at, point.serial, 0.25, 1e-12));
    }
    if (over == 0) continue;
    rows.push_back({fmt::format("efficiencies told of three, {} ranks sharing cores", over),
                    static_cast<double>(told), over == 1 ? 0.0 : 2.0, 0});
  }
  return rows;
}

// ---- the runner ---------------------------------------------------------------------------------

std::vector<Row> study_expansion() {
  std::vector<Row> rows;
  const auto count = [&](const std::string& what, double value, double expected) {
    rows.push_back({what, value, expected, 0});
  };
  const auto expand = [](const std::string& text) {
    runner::Study study = runner::parse_study(text, "s.yaml");
    runner::Bases bases;
    for (const std::string& word : runner::base_words(study))
      bases[word] = runner::default_base(word.empty() ? "muon" : word);
    return Expansion(std::move(study), std::move(bases));
  };
  const Expansion example = expand(runner::example_study);
  const std::vector<runner::Trial>& trials = example.initial();
  // 3 optimizers × 7 batches less one pair, 5 rates, 2 seeds; a cell adds 3 seeds to report and, in
  // at most 3 extensions, 2 rates with 2 seeds.
  count("trials of the example", static_cast<double>(trials.size()), 200);
  count("most that it may become", static_cast<double>(example.most()), 200 + 20 * (3 + 3 * 2 * 2));
  count("points that `exclude` leaves out", static_cast<double>(example.excluded()), 10);
  count("seed of the second trial: the last parameter moves first",
        trials[1].params["seed"].get<double>(), 1);
  count("batch of the eleventh", trials[10].params["batch_size"].get<double>(), 32);
  rows.push_back(studies::relative("rate of the first: 0.1*sqrt(16/64)/2",
                                   trials[0].params["lr"].get<double>(), 0.025, 1e-15));
  rows.push_back(studies::relative("rate of the last: 0.02*sqrt(1024/64)*2",
                                   trials[199].params["lr"].get<double>(), 0.16, 1e-15));
  count("derived warm-up: min(2000, 0.05*100000)",
        trials[0].params["warmup_examples"].get<double>(), 2000);
  rows.push_back(studies::relative("derived decay: 16/(0.025*0.2*1e5)",
                                   trials[0].params["weight_decay"].get<double>(),
                                   16 / (0.025 * 0.2 * 1e5), 1e-15));
  const Expansion zipped = expand(
      "orthrus_study: 1\nname: z\nbudget: {max_examples: 6400}\nsearch:\n"
      "  parameters: {batch_size: {values: [1, 2, 4]}, lr: {values: [0.1, 0.2, 0.4]},\n"
      "               seed: {values: [0, 1]}}\n  zip: [[batch_size, lr]]\n");
  count("trials of two zipped parameters and two seeds",
        static_cast<double>(zipped.initial().size()), 6);
  std::string said;
  try {
    static_cast<void>(expand("orthrus_study: 1\nname: m\nsearch:\n  parameters: {lrr: 0.1}\n"));
  } catch (const ConfigError& error) {
    said = error.what();
  }
  const bool named = said.find("s.yaml:4:") != std::string::npos &&
                     said.find("did you mean 'lr'?") != std::string::npos;
  rows.push_back(never("misspelt key without its line and the closest key", named ? 0 : 1));
  return rows;
}

constexpr const char* tuned =
    "orthrus_study: 1\n"
    "name: s\n"
    "base: q.yaml\n"
    "search:\n"
    "  metric: {target: 2.0}\n"
    "  parameters:\n"
    "    batch_size: {values: [4, 8]}\n"
    "    lr: {center: {rule: sqrt, at: {batch_size: 8}, value: 0.1}, multipliers: {log2: [-2, "
    "2]},\n"
    "         extend_on_edge: 2}\n"
    "    seed: {tune: [0, 1], report: [10, 11]}\n"
    "budget: {max_examples: 4000}\n";

std::vector<Row> study_resume() {
  const Place place;
  place.write("q.yaml", quadratic);
  place.write("s.yaml", tuned);
  const std::string self = fs::read_symlink("/proc/self/exe").string();
  const auto start = [&](const std::string& directory, bool resume) {
    std::vector<std::string> command{
        self, "study", "run", (place / "s.yaml").string(), "--dir", (place / directory).string()};
    if (resume) command.emplace_back("--resume");
    return std::make_unique<Child>(command, place / "output.txt", (place / directory).string(),
                                   "study run");
  };
  const auto journal_lines = [&](const std::string& directory) {
    return static_cast<int>(lines_of(place / directory / "journal.jsonl").size());
  };
  const auto ended_with = [&](const std::string& directory, bool resume) {
    const std::unique_ptr<Child> child = start(directory, resume);
    for (;;) {
      if (const std::optional<Child::Ending> ending = child->poll())
        return ending->signal != 0 ? 128 + ending->signal : ending->code;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  };
  std::vector<Row> rows;
  rows.push_back(
      {"exit code, uninterrupted", static_cast<double>(ended_with("whole", false)), 0, 0});
  // Each time some lines of its journal later, however fast the machine is.
  studies::Random random(7);
  int kills = 0;
  for (int k = 0; k < 10; ++k) {
    const bool begun = fs::exists(place / "killed" / "study.resolved.json");
    const int enough =
        (begun ? journal_lines("killed") : 0) + 1 + static_cast<int>(random.below(8));
    const std::unique_ptr<Child> child = start("killed", begun);
    while (!child->poll() && journal_lines("killed") < enough)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (!child->poll()) {
      child->signal(SIGKILL);
      ++kills;
    }
  }
  // A busy machine looks late, and finds the study at its end.
  rows.push_back(at_least("SIGKILLs of 10 that met a running study", kills, 5));
  rows.push_back(
      {"exit code of the last resume", static_cast<double>(ended_with("killed", true)), 0, 0});
  const std::vector<std::string> whole = without_times(place / "whole" / "results.jsonl");
  rows.push_back(at_least("trials of the study", static_cast<double>(whole.size()), 20));
  rows.push_back(never("records that differ from the uninterrupted ones, but for times",
                       differing(whole, without_times(place / "killed" / "results.jsonl"))));
  return rows;
}

std::vector<Row> study_groups() {
  const Place place;
  place.write("q.yaml", quadratic);
  place.write("g.yaml",
              "orthrus_study: 1\nname: g\nbase: q.yaml\nsearch: {parameters: {seed: {range: [1, "
              "16]}}}\nbudget: {max_steps: 300}\nexecution: {order: by_index}\n");
  std::vector<Row> rows;
  for (const int ranks : {1, 4}) {
    static_cast<void>(
        run_on_threads(ranks, study_in(place / "g.yaml", place / std::to_string(ranks))));
  }
  int lines = 0, differ = 0;
  for (std::int64_t index = 0; index < 16; ++index) {
    const std::vector<std::string> one = without_times(metrics_of(place / "1", index));
    lines += static_cast<int>(one.size());
    differ += differing(one, without_times(metrics_of(place / "4", index)));
  }
  std::map<std::int64_t, int> trials_of;
  for (const Json& line : lines_of(place / "4" / "journal.jsonl")) {
    if (line.at("t") == "assign") ++trials_of[line.at("group")];
  }
  rows.push_back(at_least("evaluations of 16 trials", lines, 16 * 2));
  rows.push_back(
      at_least("groups that had trials, of 4", static_cast<double>(trials_of.size()), 2));
  rows.push_back(never("evaluations on 4 groups that are not the bits of the only group", differ));

  // Sums over two virtual shards have one order, on one rank and on two.
  place.write("q.yaml", std::string(quadratic) + "reproducible: {virtual_shards: 2}\n");
  place.write("r.yaml",
              "orthrus_study: 1\nname: r\nbase: q.yaml\nsearch: {parameters: {seed: {values: [1, "
              "2]}}}\nbudget: {max_steps: 50}\n");
  double farthest = 0;
  for (const int ranks : {1, 2}) {
    StudyRunOptions options = study_in(place / "r.yaml", place / fmt::format("r{}", ranks));
    options.set = {fmt::format("execution.ranks_per_trial={}", ranks)};
    static_cast<void>(run_on_threads(ranks, options));
  }
  for (const std::int64_t index : {0, 1}) {
    const double one = lines_of(metrics_of(place / "r1", index)).back().at("val_loss");
    const double two = lines_of(metrics_of(place / "r2", index)).back().at("val_loss");
    farthest = std::max(farthest, std::abs(two / one - 1));
  }
  rows.push_back(at_most("relative loss after 50 steps, 1 against 2 ranks", farthest, 1e-10));
  return rows;
}

std::vector<Row> study_faults() {
  const Place place;
  place.write("trial.sh",
              "case $1 in\n"
              "throws) echo 'it threw' >&2; exit 3;;\n"
              "hangs) if [ ! -e \"$3/hung\" ]; then touch \"$3/hung\"; sleep 100; fi;;\n"
              "esac\n"
              "echo '{\"t\": \"eval\", \"step\": 0, \"val_loss\": 1}' > \"$2\"\n"
              "last=0.5\n"
              "if [ \"$1\" = diverges ]; then last=1e9; fi\n"
              "echo '{\"t\": \"eval\", \"step\": 20, \"val_loss\": '$last'}' >> \"$2\"\n");
  place.write("f.yaml", fmt::format("orthrus_study: 1\nname: f\ntask: {{command: [sh, {}, "
                                    "\"{{mode}}\", \"{{metrics}}\", \"{{trial_dir}}\"]}}\n"
                                    "search: {{parameters: {{mode: {{values: [ends, throws, "
                                    "diverges, hangs]}}}}}}\nbudget: {{max_steps: 20}}\n"
                                    "execution: {{mode: subprocess, max_retries: 1, "
                                    "heartbeat_s: 0.5}}\n",
                                    (place / "trial.sh").string()));
  const StudyEnd end = run_on_threads(1, study_in(place / "f.yaml", place / "f"));
  std::map<std::string, std::pair<std::string, int>> ends;
  for (const Json& line : lines_of(place / "f" / "results.jsonl")) {
    ends[line.at("params").at("mode")] = {line.at("state"), line.at("attempt")};
  }
  int retries = 0;
  for (const Json& line : lines_of(place / "f" / "journal.jsonl"))
    retries += line.at("t") == "state" && line.at("state") == "waiting" ? 1 : 0;
  std::vector<Row> rows;
  const auto expect = [&](const std::string& mode, const std::string& state, int attempt) {
    const auto& [is, at] = ends[mode];
    rows.push_back(never(fmt::format("trial that {}: not {} at attempt {}", mode, state, attempt),
                         is == state && at == attempt ? 0 : 1));
  };
  expect("ends", "complete", 1);
  expect("throws", "failed", 2);
  expect("diverges", "diverged", 1);
  expect("hangs", "complete", 2);
  rows.push_back({"times that a trial went back to wait", static_cast<double>(retries), 2, 0});
  rows.push_back(never("study that did not come to its end", end.complete ? 0 : 1));
  return rows;
}

std::vector<Row> study_throughput() {
  const Place place;
  place.write("q.yaml", quadratic);
  place.write("n.yaml",
              "orthrus_study: 1\nname: n\nbase: q.yaml\nsearch: {parameters: {seed: {range: [1, "
              "1000]}}}\nbudget: {max_steps: 1}\n");
  const StudyEnd end = run_on_threads(4, study_in(place / "n.yaml", place / "n"));
  return {{"trials that are complete, of 1000",
           static_cast<double>(end.document.at("states").value("complete", 0)), 1000, 0},
          at_most("seconds on 4 groups (3 on two quiet cores)", end.document.at("seconds"), 60),
          at_most("bytes of journal per trial",
                  static_cast<double>(fs::file_size(place / "n" / "journal.jsonl")) / 1000, 1000)};
}

}  // namespace

std::span<const studies::Experiment> runner_experiments() {
  static constexpr std::array<studies::Experiment, 7> all{{
      {"message-bytes", "what collectives and steps send, counted", "closed forms", message_bytes},
      {"scaling-times", "efficiencies and serial fractions, and where there are none",
       "closed forms", scaling_times},
      {"study-expansion", "the trials of a study: counts, order, rates, derived values", "by hand",
       study_expansion},
      {"study-resume", "a study killed ten times leaves the record of one that was not",
       "itself, uninterrupted", study_resume},
      {"study-groups", "a trial is the same in any group, and on one rank or two",
       "itself, in one group", study_groups},
      {"study-faults", "trials that throw, diverge and hang end as such, and the study ends",
       "by hand", study_faults},
      {"study-throughput", "a thousand trials cost little beside themselves", "a bar",
       study_throughput},
  }};
  return all;
}

}  // namespace orthrus::cli
