// The predicted step beside the measured one.
//
//   mpirun -np 2 bench_timeline --profile me.yaml [--width 512] [--layers 2] [--repeats 9]
//
// One JSON line per case, and a last one with the largest error. The cases take turns, so that all
// of them see the same machine.
#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <orthrus/mpi.hpp>
#include <orthrus/orthrus.hpp>
#include <string>
#include <vector>

#include "comm/launch.hpp"
#include "runtime/plan.hpp"
#include "runtime/timeline.hpp"

namespace {

using namespace orthrus;
using Clock = std::chrono::steady_clock;
using runtime::Phase;

/// A GPT's tensors, and what a trainer has of them.
struct Model {
  Model(Index layers, Index width) {
    add("embedding", {8 * width, width});
    for (Index l = 0; l < layers; ++l) {
      const std::string block = "block" + std::to_string(l) + ".";
      add(block + "norm", {width});
      add(block + "qkv.weight", {3 * width, width});
      for (Index k = 0; k < 3; ++k) {
        parameters.back().views.push_back({k * width, width, 0, width});
      }
      add(block + "proj.weight", {width, width});
      add(block + "up.weight", {4 * width, width});
      add(block + "down.weight", {width, 4 * width});
    }
  }
  void add(std::string name, std::vector<Index> shape) {
    Parameter p;
    p.name = std::move(name);
    p.shape = std::move(shape);
    Index size = 1;
    for (const Index n : p.shape) size *= n;
    std::uint32_t s = static_cast<std::uint32_t>(parameters.size());
    for (auto* values : {&weights, &gradients}) {
      auto& v = values->emplace_back(static_cast<std::size_t>(size));
      for (float& x : v) {
        s = s * 1664525U + 1013904223U;
        x = static_cast<float>(static_cast<std::int32_t>(s)) * 0x1p-31F;
      }
    }
    p.weights = weights.back().data();
    p.gradient = gradients.back().data();
    parameters.push_back(std::move(p));
  }
  std::vector<std::vector<float>> weights, gradients;
  std::vector<Parameter> parameters;
};

struct Case {
  std::string name;
  Config config;
  std::unique_ptr<ShardedOptimizer> optimizer;
  std::vector<double> ms;
  std::vector<StepTimes> parts;  ///< of rank 0
};

template <class Of>
double median(const std::vector<StepTimes>& times, Of&& of) {
  std::vector<double> v;
  for (const StepTimes& t : times) v.push_back(of(t));
  std::nth_element(v.begin(), v.begin() + std::ssize(v) / 2, v.end());
  return v[v.size() / 2];
}

Config config_of(const std::string& rule, const std::string& mode, const std::string& dtype,
                 const std::string& bucket, const std::string& profile) {
  const bool muon = rule == "muon";
  const std::string matrices = "  - {match: '*.weight', rule: {name: muon}, lmo: {dtype: " + dtype +
                               "}, matrix: {mode: " + mode + "}}\n";
  return parse_config("schema: 1\nprofile: " + profile + "\ncomm: {bucket_bytes: " + bucket +
                      "}\ngroups:\n" + (muon ? matrices : "") +
                      "  - {match: '*', rule: {name: adamw}}\n");
}

int run(int argc, char** argv) {
  std::string profile = "default-cpu";
  Index width = 512;
  Index layers = 2;
  int repeats = 9;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string key = argv[i];
    if (key == "--profile") profile = argv[i + 1];
    if (key == "--width") width = std::atoll(argv[i + 1]);
    if (key == "--layers") layers = std::atoll(argv[i + 1]);
    if (key == "--repeats") repeats = std::atoi(argv[i + 1]);
  }
  Communicator world = borrow(MPI_COMM_WORLD);
  Model model(layers, width);
  std::vector<Case> cases;
  const auto add = [&](const std::string& rule, const std::string& mode, const std::string& dtype,
                       const std::string& bucket) {
    Case c;
    c.name = rule + (rule == "muon" ? " " + mode + " " + dtype : "") + ", buckets of " + bucket;
    c.config = config_of(rule, mode, dtype, bucket, profile);
    c.optimizer =
        std::make_unique<ShardedOptimizer>(c.config, world.duplicate("case"), model.parameters);
    cases.push_back(std::move(c));
  };
  add("adamw", "", "", "64MiB");
  add("muon", "owner", "f32", "64MiB");
  add("muon", "owner", "bf16", "64MiB");
  add("muon", "owner", "f32", "4MiB");
  for (const char* mode : {"exchange", "gather", "gram", "gram_steps"}) {
    add("muon", mode, "f32", "64MiB");
  }
  add("muon", "exchange", "f32", "4MiB");
  add("muon", "gram", "f32", "4MiB");
  for (int repeat = -2; repeat < repeats; ++repeat) {
    for (Case& c : cases) {
      world.barrier();
      const auto start = Clock::now();
      const StepReport& report = c.optimizer->step();
      double ms = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
      world.all_reduce(std::span<double>(&ms, 1), ReduceOp::max);
      if (repeat < 0) continue;
      c.ms.push_back(ms);
      c.parts.push_back(report.ms);
    }
  }
  if (world.rank() != 0) return 0;
  double worst = 0;
  for (Case& c : cases) {
    std::vector<runtime::ParameterShape> shapes;
    for (const Parameter& p : model.parameters) shapes.push_back(runtime::shape_of(p));
    const runtime::MachineProfile machine = runtime::load_profile(profile);
    const runtime::Plan plan =
        runtime::make_plan(c.config, std::move(shapes), world.size(), machine);
    const runtime::Timeline t = runtime::make_timeline(plan, machine, {});
    const auto predicted = [&](std::initializer_list<Phase> phases, bool compute) {
      double s = 0;
      for (const Phase phase : phases) {
        const runtime::PhaseTime& p = t.ranks[0][static_cast<std::size_t>(phase)];
        s += compute ? p.compute : p.exposed + p.waiting;
      }
      return s * 1e3;
    };
    const auto measured = [&](auto&& of) { return median(c.parts, of); };
    std::sort(c.ms.begin(), c.ms.end());
    const double median_ms = c.ms[c.ms.size() / 2];
    const double ratio = t.seconds * 1e3 / median_ms;
    worst = std::max(worst, std::abs(std::log(ratio)));
    const nlohmann::ordered_json row{
        {"case", c.name},
        {"ranks", world.size()},
        {"measured_ms", median_ms},
        {"fastest_ms", c.ms.front()},
        {"predicted_ms", t.seconds * 1e3},
        {"predicted/measured", ratio},
        {"predicted_waiting_ms", t.total(0).waiting * 1e3},
        {"compute",
         {measured([](const StepTimes& s) { return s.update + s.copy; }),
          predicted(
              {Phase::pack, Phase::reduce, Phase::update, Phase::meet, Phase::lmo, Phase::unpack},
              true)}},
        {"control",
         {measured([](const StepTimes& s) { return s.control; }),
          predicted({Phase::control}, true) + predicted({Phase::control}, false)}},
        {"reduce",
         {measured([](const StepTimes& s) { return s.reduce; }),
          predicted({Phase::reduce}, false)}},
        {"meet",
         {measured([](const StepTimes& s) { return s.meet; }), predicted({Phase::meet}, false)}},
        {"gather",
         {measured([](const StepTimes& s) { return s.gather; }),
          predicted({Phase::gather}, false)}}};
    std::printf("%s\n", row.dump().c_str());
  }
  std::printf("%s\n",
              nlohmann::ordered_json{{"largest_factor", std::exp(worst)}, {"cases", cases.size()}}
                  .dump()
                  .c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  comm::keep_freed_memory();
  MPI_Init(&argc, &argv);
  const int code = run(argc, argv);
  MPI_Finalize();
  return code;
}
