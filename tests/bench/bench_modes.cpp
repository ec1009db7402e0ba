// Every way a matrix can meet its shards, measured, beside the one the planner chooses.
//
//   mpirun -np 2 bench_modes --profile me.yaml [--sizes 128,256] [--repeats 5]
//
// One JSON line per case and a last one with the verdict: in how many cases the planner's mode is
// within 15 % of the fastest measured one. The modes of a case take turns, so that all of them see
// the same machine.
#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <orthrus/mpi.hpp>
#include <orthrus/orthrus.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "comm/launch.hpp"

namespace {

using namespace orthrus;
using Clock = std::chrono::steady_clock;

constexpr const char* kModes[] = {"owner", "exchange", "gather", "gram"};

struct Case {
  Index rows, cols, count;
};

/// The trainer's buffers of one case; every mode has weights of its own size, not of its own.
struct Buffers {
  explicit Buffers(const Case& c) {
    std::uint32_t s = 12345;
    for (Index k = 0; k < c.count; ++k) {
      weights.emplace_back(static_cast<std::size_t>(c.rows * c.cols), 0.0F);
      gradients.emplace_back(static_cast<std::size_t>(c.rows * c.cols));
      for (float& g : gradients.back()) {
        s = s * 1664525U + 1013904223U;
        g = static_cast<float>(static_cast<std::int32_t>(s)) * 0x1p-31F;
      }
      Parameter p;
      p.name = "w" + std::to_string(k);
      p.shape = {c.rows, c.cols};
      p.weights = weights.back().data();
      p.gradient = gradients.back().data();
      parameters.push_back(std::move(p));
    }
  }
  std::vector<std::vector<float>> weights, gradients;
  std::vector<Parameter> parameters;
};

Config config_of(const std::string& mode, const std::string& profile) {
  Config c = parse_config(
      "schema: 1\ncomm: {bucket_bytes: 1GiB}\ngroups: [{match: '*', rule: {name: muon}}]\n");
  c.groups[0].matrix.mode = mode;
  c.profile = profile;
  return c;
}

struct Runner {
  std::unique_ptr<ShardedOptimizer> optimizer;
  std::vector<double> ms;
  std::int64_t bytes = 0;
};

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

std::vector<Index> numbers(const std::string& text) {
  std::vector<Index> list;
  std::stringstream in(text);
  for (std::string item; std::getline(in, item, ',');) list.push_back(std::stoll(item));
  return list;
}

int run(int argc, char** argv) {
  std::string profile = "default-cpu";
  std::vector<Index> sizes{128, 256, 512, 768, 1024};
  std::vector<Index> ratios{1, 2, 4, 8};
  std::vector<Index> counts{1, 8};
  int repeats = 5;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string key = argv[i];
    if (key == "--profile") profile = argv[i + 1];
    if (key == "--sizes") sizes = numbers(argv[i + 1]);
    if (key == "--ratios") ratios = numbers(argv[i + 1]);
    if (key == "--counts") counts = numbers(argv[i + 1]);
    if (key == "--repeats") repeats = std::atoi(argv[i + 1]);
  }
  Communicator world = borrow(MPI_COMM_WORLD);
  const bool prints = world.rank() == 0;
  int cases = 0;
  int good = 0;
  for (const Index m : sizes) {
    for (const Index ratio : ratios) {
      for (const Index count : counts) {
        const Case c{m, m * ratio, count};
        std::map<std::string, Runner> runners;
        Buffers buffers(c);
        std::string chosen;
        {
          const ShardedOptimizer planned{config_of("auto", profile), world.duplicate("plan"),
                                         buffers.parameters};
          chosen = nlohmann::json::parse(planned.plan_json())["matrices"][0]["mode"];
        }
        for (const char* mode : kModes) {
          runners[mode].optimizer = std::make_unique<ShardedOptimizer>(
              config_of(mode, profile), world.duplicate(mode), buffers.parameters);
        }
        for (int repeat = -1; repeat < repeats; ++repeat) {
          for (auto& [mode, runner] : runners) {
            world.barrier();
            const auto start = Clock::now();
            const StepReport& report = runner.optimizer->step();
            double ms = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
            world.all_reduce(std::span<double>(&ms, 1), ReduceOp::max);
            std::int64_t bytes = report.bytes_sent;
            world.all_reduce(std::span<std::int64_t>(&bytes, 1), ReduceOp::sum);
            runner.bytes = bytes;
            if (repeat >= 0) runner.ms.push_back(ms);
          }
        }
        double best = 1e300;
        nlohmann::ordered_json row{{"ranks", world.size()},
                                   {"rows", c.rows},
                                   {"cols", c.cols},
                                   {"matrices", c.count},
                                   {"planned", chosen}};
        for (auto& [mode, runner] : runners) {
          const double ms = median(runner.ms);
          best = std::min(best, ms);
          row["ms"][mode] = ms;
          row["spread"][mode] = (*std::max_element(runner.ms.begin(), runner.ms.end()) -
                                 *std::min_element(runner.ms.begin(), runner.ms.end())) /
                                ms;
          row["bytes"][mode] = runner.bytes;
        }
        const double ratio_to_best = row["ms"][chosen].get<double>() / best;
        row["planned_over_best"] = ratio_to_best;
        ++cases;
        good += ratio_to_best <= 1.15 ? 1 : 0;
        if (prints) {
          std::printf("%s\n", row.dump().c_str());
          std::fflush(stdout);
        }
      }
    }
  }
  if (prints) {
    const nlohmann::ordered_json verdict{{"cases", cases},
                                         {"within_15_percent", good},
                                         {"share", static_cast<double>(good) / cases},
                                         {"profile", profile}};
    std::printf("%s\n", verdict.dump().c_str());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  int provided = 0;
  orthrus::comm::keep_freed_memory();
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  const int status = run(argc, argv);
  MPI_Finalize();
  return status;
}
