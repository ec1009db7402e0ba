// orthrus bench comm: collectives by size, between all ranks of the launch.
#include <algorithm>
#include <functional>
#include <orthrus/error.hpp>
#include <string>
#include <utility>
#include <vector>

#include "runtime/cli/bench.hpp"
#include "runtime/cli/run_directory.hpp"

namespace orthrus::cli {
namespace {

std::string bytes_text(Index bytes) {
  for (const auto& [unit, suffix] :
       {std::pair{Index{1} << 20, "MiB"}, {Index{1} << 10, "KiB"}, {Index{1}, "B"}}) {
    if (bytes >= unit && bytes % unit == 0) return fmt::format("{} {}", bytes / unit, suffix);
  }
  return "0 B";
}

}  // namespace

void bench_comm(const BenchOptions& options, BenchPrinter& out, Communicator& world) {
  std::vector<Index> sizes(options.sizes.begin(), options.sizes.end());
  if (sizes.empty()) sizes = {1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 26};
  for (const Index bytes : sizes) {
    if (bytes < 1 || bytes > Index{1} << 40) {
      throw ConfigError(fmt::format("--sizes {}: 1 byte to 1 TiB", bytes));
    }
  }
  if (!options.metrics.empty() && (options.collective.empty() || sizes.size() != 1))
    throw ConfigError("--metrics: of one --collective at one of --sizes", ExitCode::usage);
  const auto ranks = static_cast<std::size_t>(world.size());
  const auto me = static_cast<std::size_t>(world.rank());
  const Index most = *std::max_element(sizes.begin(), sizes.end());
  std::vector<float> whole(static_cast<std::size_t>(most) / sizeof(float) + ranks);
  std::vector<float> other(whole.size() + ranks * ranks);
  std::vector<Index> counts(ranks);
  const auto span = [](std::vector<float>& data, Index n) {
    return Span{data.data(), n, DType::f32};
  };
  struct Call {
    const char* name;
    std::function<void(Index)> run;  // on so many elements in all
  };
  const std::vector<Call> calls = {
      {"reduce_scatter",
       [&](Index n) { world.reduce_scatter(span(whole, n), counts, span(other, counts[me])); }},
      {"all_gather",
       [&](Index n) { world.all_gather(span(other, counts[me]), counts, span(whole, n)); }},
      {"all_to_all",
       [&](Index n) {
         const std::vector<Index> equal(ranks, counts[me]);
         world.all_to_all(span(whole, n), counts, span(other, counts[me] * std::ssize(equal)),
                          equal);
       }},
      {"all_reduce", [&](Index n) { world.all_reduce(span(whole, n), ReduceOp::sum); }},
  };
  for (const Call& call : calls) {
    if (!options.collective.empty() && options.collective != call.name) continue;
    const auto time_of = [&](Index n) {
      for (std::size_t r = 0; r < ranks; ++r) {
        counts[r] = n / std::ssize(counts) + (std::cmp_less(r, n % std::ssize(counts)) ? 1 : 0);
      }
      return time_in_turns(world, options.repeats, {{[&] { call.run(n); }}})[0];
    };
    // The latency of a call is its time with one element per rank.
    const double latency_s = time_of(std::ssize(counts)).median_s;
    for (const Index bytes : sizes) {
      const Index n = std::max<Index>(bytes / static_cast<Index>(sizeof(float)), 1);
      const Timing time = time_of(n);
      const Traffic before = world.traffic();
      call.run(n);
      auto sent = static_cast<double>((world.traffic() - before).bytes);
      {
        const TrafficScope setup(world, TrafficClass::setup);
        world.all_reduce(std::span<double>(&sent, 1), ReduceOp::max);
      }
      Measured m{call.name, bytes_text(n * static_cast<Index>(sizeof(float))), "f32", time, sent};
      m.more["latency_us"] = latency_s * 1e6;
      out.row(m);
      if (options.metrics.empty() || world.rank() != 0) continue;
      LineFile file;
      file.open(options.metrics, /*append=*/true);
      nlohmann::ordered_json line;
      line["t"] = "eval";
      line["step"] = 1;
      line["seconds"] = time.median_s;
      line["spread"] = time.spread;
      file.line(line.dump());
    }
  }
}

}  // namespace orthrus::cli
