#pragma once
/// @file
/// What the parts of `orthrus bench` share: how a time is taken, and how it is said.

#include <fmt/format.h>

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <orthrus/communicator.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace orthrus::cli {

struct BenchOptions {
  std::string what = "kernels";
  std::string profile;
  int repeats = 7;
  // kernels
  std::string device = "cpu";
  // step
  std::string model = "gpt2-2-layers";
  std::vector<std::string> rules;
  std::string gradients = "local";
  bool matrices_only = false;
  // comm
  std::vector<std::int64_t> sizes;
  std::string collective;  ///< empty: all
  std::string metrics;     ///< file for a line that a study reads; empty: none
  // accuracy
  std::string shape = "256x1024";
  std::vector<std::string> tables;
};

/// Seconds of one call. All ranks work at the same time, and the slowest counts.
struct Timing {
  double median_s = 0;
  double spread = 0;  ///< (most − least)/median
};

/// The largest of every rank's. Collective.
double slowest(Communicator& world, double seconds);

/// Something to time.
struct Turn {
  std::function<void()> body;
  /// Before each call, outside the clock; empty: the body can be called again as it is.
  std::function<void()> prepare = {};
  /// Returns when what was queued is done; empty: bodies return when they are done.
  std::function<void()> wait = {};
};

/// Times several things in turns, so that all of them see the same machine: a warm-up of each, then
/// `repeats` rounds. Quick bodies without `prepare` are called several times per round. Collective.
std::vector<Timing> time_in_turns(Communicator& world, int repeats, const std::vector<Turn>& turns);

/// What a time is compared with, measured in the same turns.
struct Peak {
  std::string_view name;  ///< empty: nothing
  double rate = 0;        ///< in units of `Measured::work` per second
};

struct Measured {
  std::string name, shape;
  std::string_view dtype;
  Timing time;
  /// Useful flops (symmetric products counted once) or bytes of one call on one rank.
  double work = 0;
  bool is_flops = false;
  Peak peak = {};
  nlohmann::ordered_json more = nlohmann::ordered_json::object();  ///< further fields
};

/// One line per measurement, at once: a table for people, or JSON lines. Only rank 0's prints.
class BenchPrinter {
 public:
  /// @param device  where it is measured
  BenchPrinter(bool json, const Communicator& world, int repeats, std::string device = "cpu")
      : json_(json),
        prints_(world.rank() == 0),
        ranks_(world.size()),
        repeats_(repeats),
        device_(std::move(device)) {}
  void row(const Measured& m);
  /// Numbers that measurements came to.
  void note(const std::string& name, const nlohmann::ordered_json& numbers);

 private:
  bool json_, prints_;
  int ranks_, repeats_;
  std::string device_;
};

/// Products, msign and element-wise verbs on this machine: on its processor, or on the CUDA device
/// that is each rank's. Collective. @throws ConfigError  on all ranks: one has no such device.
void bench_kernels(const BenchOptions& options, BenchPrinter& out, Communicator& world);
/// Whole optimizer steps on a model's shapes. Collective.
void bench_step(const BenchOptions& options, BenchPrinter& out, Communicator& world);
/// Collectives by size. Collective.
void bench_comm(const BenchOptions& options, BenchPrinter& out, Communicator& world);
/// Round trips between the first rank and the last by size, and the LogGP of them. Collective.
void bench_messages(const BenchOptions& options, BenchPrinter& out, Communicator& world);
/// How far from 1 every way to msign leaves singular values, where `prints`; elsewhere options are
/// checked, and that is all.
void bench_accuracy(const BenchOptions& options, bool json, bool prints);

}  // namespace orthrus::cli
