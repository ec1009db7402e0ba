// orthrus bench messages: round trips between the first rank and the last, and LogGP of them.
#include <algorithm>
#include <orthrus/error.hpp>
#include <orthrus/studies/loggp.hpp>
#include <string>
#include <vector>

#include "runtime/cli/bench.hpp"
#include "runtime/clock.hpp"

namespace orthrus::cli {
namespace {

constexpr int messages = 16;

class RoundTripBench {
 public:
  RoundTripBench(Communicator& world, Index most)
      : world_(world), peer_(world.size() - 1), data_(static_cast<std::size_t>(most)) {}

  /// Seconds on the first rank from its first send to the answer, the median of `repeats`, of
  /// `count` messages with other work between two. The other ranks wait.
  Timing time(Index bytes, int count, double delay_s, int repeats) {
    std::vector<double> seconds;
    for (int k = 0; k <= repeats; ++k) {
      world_.barrier();
      const auto start = runtime::Clock::now();
      if (world_.rank() == 0) {
        for (int m = 0; m < count; ++m) {
          if (m > 0) work(delay_s);
          world_.send(out(bytes), peer_);
        }
        world_.receive(in(bytes), peer_);
      } else if (world_.rank() == peer_) {
        for (int m = 0; m < count; ++m) world_.receive(in(bytes), 0);
        world_.send(out(bytes), 0);
      }
      if (k > 0) seconds.push_back(runtime::ms_since(start) * 1e-3);  // the first warms up
    }
    std::sort(seconds.begin(), seconds.end());
    const double median = seconds[seconds.size() / 2];
    Timing timing{median, (seconds.back() - seconds.front()) / median};
    // Only the first rank's clock has seen both ends.
    world_.broadcast(std::span<double>(&timing.median_s, 1), 0);
    world_.broadcast(std::span<double>(&timing.spread, 1), 0);
    return timing;
  }

 private:
  static void work(double seconds) {
    const auto start = runtime::Clock::now();
    while (runtime::ms_since(start) < 1e3 * seconds) {
    }
  }
  [[nodiscard]] ConstSpan out(Index bytes) const { return {data_.data(), bytes, DType::u8}; }
  [[nodiscard]] Span in(Index bytes) { return {data_.data(), bytes, DType::u8}; }

  Communicator& world_;
  const int peer_;
  std::vector<std::uint8_t> data_;
};

}  // namespace

void bench_messages(const BenchOptions& options, BenchPrinter& out, Communicator& world) {
  std::vector<Index> sizes(options.sizes.begin(), options.sizes.end());
  if (sizes.empty()) {
    for (Index bytes = 1; bytes <= 1 << 22; bytes *= 4) sizes.push_back(bytes);
  }
  std::sort(sizes.begin(), sizes.end());
  if (sizes.front() < 1 || sizes.back() > Index{1} << 32 || sizes.size() < 3)
    throw ConfigError("--sizes: 3 sizes or more of 1 byte to 4 GiB", ExitCode::usage);
  if (world.size() < 2) throw ConfigError("bench messages: between two ranks, and here is one");
  const TrafficScope setup(world, TrafficClass::setup);
  RoundTripBench bench(world, sizes.back());
  std::vector<studies::RoundTrips> samples;
  for (const Index bytes : sizes) {
    const Timing single = bench.time(bytes, 1, 0, options.repeats);
    const Timing burst = bench.time(bytes, messages, 0, options.repeats);
    // A burst may be quicker than its messages one by one: they are under way together.
    const double gap = std::max(burst.median_s - single.median_s, 1e-9) / (messages - 1);
    const double delay = 2 * gap + 5e-6;
    const Timing delayed = bench.time(bytes, messages, delay, options.repeats);
    samples.push_back({static_cast<double>(bytes), single.median_s,
                       single.median_s + gap * (messages - 1), delayed.median_s, messages, delay});
    Measured m{"message, there and back", std::to_string(bytes) + " B", "u8", single,
               2.0 * static_cast<double>(bytes)};
    m.more["gap_us"] = 1e6 * gap;
    m.more["burst_us"] = 1e6 * burst.median_s;
    m.more["delay_us"] = 1e6 * delay;
    m.more["delayed_us"] = 1e6 * delayed.median_s;
    out.row(m);
  }
  const studies::LogGp law = studies::fit_loggp(samples);
  out.note("loggp", {{"L_us", 1e6 * law.latency_s},
                     {"o_us", 1e6 * law.overhead_s},
                     {"O_ns_per_byte", 1e9 * law.overhead_s_per_byte},
                     {"g_us", 1e6 * law.gap_s},
                     {"G_ns_per_byte", 1e9 * law.s_per_byte},
                     {"rms_relative", law.rms_relative}});
}

}  // namespace orthrus::cli
