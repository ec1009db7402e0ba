// orthrus bench: speeds of this machine as ratios inside one run, and errors of every msign.
#include "runtime/cli/bench.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <orthrus/error.hpp>
#include <span>

#include "runtime/cli/bench_profile.hpp"
#include "runtime/cli/command.hpp"
#include "runtime/cli/model_shapes.hpp"
#include "runtime/clock.hpp"

namespace orthrus::cli {
namespace {

/// What the clock sees of one turn, so that its own grain does not count.
constexpr double least_s = 1e-3;

double timed(Communicator& world, const Turn& turn, int calls) {
  if (turn.prepare) turn.prepare();
  if (turn.wait) turn.wait();
  world.barrier();
  const auto start = runtime::Clock::now();
  for (int i = 0; i < calls; ++i) turn.body();
  if (turn.wait) turn.wait();
  return slowest(world, runtime::ms_since(start) * 1e-3 / calls);
}

std::string time_text(double seconds) {
  return seconds < 1e-3 ? fmt::format("{:.2f} us", seconds * 1e6)
                        : fmt::format("{:.3f} ms", seconds * 1e3);
}

}  // namespace

double slowest(Communicator& world, double seconds) {
  world.all_reduce(std::span<double>(&seconds, 1), ReduceOp::max);
  return seconds;
}

std::vector<Timing> time_in_turns(Communicator& world, int repeats,
                                  const std::vector<Turn>& turns) {
  const TrafficScope setup(world, TrafficClass::setup);
  std::vector<int> calls;
  for (const Turn& turn : turns) {
    timed(world, turn, 1);
    const double once = turn.prepare ? least_s : std::max(timed(world, turn, 1), 1e-8);
    calls.push_back(static_cast<int>(std::clamp(std::ceil(least_s / once), 1.0, 10000.0)));
  }
  std::vector<std::vector<double>> seconds(turns.size());
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (std::size_t i = 0; i < turns.size(); ++i) {
      seconds[i].push_back(timed(world, turns[i], calls[i]));
    }
  }
  std::vector<Timing> timings;
  for (std::vector<double>& s : seconds) {
    std::sort(s.begin(), s.end());
    const double median = s[s.size() / 2];
    timings.push_back({median, (s.back() - s.front()) / median});
  }
  return timings;
}

void BenchPrinter::row(const Measured& m) {
  if (!prints_) return;
  const double rate = m.work / m.time.median_s * 1e-9;
  const char* const unit = m.is_flops ? "GFLOP/s" : "GB/s";
  const double share = m.peak.name.empty() ? 0 : rate * 1e9 / m.peak.rate;
  if (json_) {
    nlohmann::ordered_json line{{"name", m.name},
                                {"shape", m.shape},
                                {"dtype", m.dtype},
                                {"device", device_},
                                {"ranks", ranks_},
                                {"repeats", repeats_},
                                {"median_ms", m.time.median_s * 1e3},
                                {"spread", m.time.spread},
                                {m.is_flops ? "flops" : "bytes", m.work},
                                {"rate", rate},
                                {"unit", unit}};
    if (!m.peak.name.empty()) {
      line["share_of_peak"] = share;
      line["peak"] = m.peak.name;
      line["peak_rate"] = m.peak.rate * 1e-9;
    }
    line.update(m.more);
    std::printf("%s\n", line.dump().c_str());
  } else {
    std::string line =
        fmt::format("{:<30} {:<4} {:<16} {:>11} ±{:>4.0f}% {:>9.2f} {:<7}", m.name, m.dtype,
                    m.shape, time_text(m.time.median_s), m.time.spread * 50, rate, unit);
    if (!m.peak.name.empty()) line += fmt::format(" {:>4.0f}% of {}", share * 100, m.peak.name);
    for (const auto& [key, value] : m.more.items()) {
      if (value.is_number()) line += fmt::format("  {} {:.6g}", key, value.get<double>());
    }
    std::printf("%s\n", line.c_str());
  }
  std::fflush(stdout);
}

void BenchPrinter::note(const std::string& name, const nlohmann::ordered_json& numbers) {
  if (!prints_) return;
  if (json_) {
    nlohmann::ordered_json line{{"name", name}, {"device", device_}, {"ranks", ranks_}};
    line.update(numbers);
    std::printf("%s\n", line.dump().c_str());
  } else {
    std::string line = name + ":";
    for (const auto& [key, value] : numbers.items())
      line += fmt::format("  {} {:.4g}", key, value.get<double>());
    std::printf("%s\n", line.c_str());
  }
  std::fflush(stdout);
}

Run add_bench(CLI::App& app) {
  auto options = std::make_shared<BenchOptions>();
  app.add_option("WHAT", options->what,
                 "kernels, step, comm, messages or accuracy; with --json a line per measurement")
      ->check(CLI::IsMember({"kernels", "step", "comm", "messages", "accuracy"}));
  app.add_option("--repeats", options->repeats, "Timed rounds, after a warm-up")
      ->check(CLI::Range(5, 1000));
  app.add_option("--device", options->device, "kernels: cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--profile", options->profile,
                 "Measure what `orthrus plan` predicts with, all of it, and write it to this file");
  app.add_option("--model", options->model,
                 "step: gpt2-2-layers (two layers' matrices), " + known_models());
  app.add_option("--rules", options->rules,
                 "step: RULE, or RULE:COEFFICIENTS:DTYPE of the matrices, AdamW for the rest; "
                 "several by commas")
      ->delimiter(',');
  app.add_option("--gradients", options->gradients,
                 "step: local (they are reduced in the step) or averaged (they are the same on all "
                 "ranks already)")
      ->check(CLI::IsMember({"local", "averaged"}));
  app.add_flag("--matrices-only", options->matrices_only,
               "step: leave embeddings, norms and biases out");
  app.add_option("--sizes", options->sizes, "comm, messages: bytes, several by commas")
      ->delimiter(',')
      ->transform(CLI::AsSizeValue(false));
  app.add_option("--collective", options->collective, "comm: this one alone")
      ->check(CLI::IsMember({"reduce_scatter", "all_gather", "all_to_all", "all_reduce"}));
  app.add_option(
      "--metrics", options->metrics,
      "comm: append the seconds of one collective at one size to this file, for a study");
  app.add_option("--shape", options->shape, "accuracy: MxN, M <= N");
  app.add_option("--tables", options->tables, "accuracy: these coefficients only, by commas")
      ->delimiter(',');
  return [options](Context& context) {
    if (options->device != "cpu" && (options->what != "kernels" || !options->profile.empty())) {
      throw ConfigError("--device " + options->device + ": only `bench kernels` measures a device");
    }
    if (!options->profile.empty()) return bench_profile(options->profile, context);
    if (options->what == "accuracy") {
      bench_accuracy(*options, context.json, context.rank() == 0);
      return 0;
    }
    Communicator world = context.world(600);
    BenchPrinter out(context.json, world, options->repeats, options->device);
    if (options->what == "kernels") bench_kernels(*options, out, world);
    if (options->what == "step") bench_step(*options, out, world);
    if (options->what == "comm") bench_comm(*options, out, world);
    if (options->what == "messages") bench_messages(*options, out, world);
    return 0;
  };
}

}  // namespace orthrus::cli
