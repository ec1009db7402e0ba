// orthrus bench: speeds of this machine as ratios inside one run. JSON lines with --json.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <numeric>
#include <orthrus/error.hpp>
#include <orthrus/orthrus.hpp>

#include "kernels/backend.hpp"
#include "kernels/msign.hpp"
#include "optim/lmo.hpp"
#include "runtime/arena.hpp"
#include "runtime/cli/bench_profile.hpp"
#include "runtime/cli/command.hpp"
#include "runtime/cli/noise.hpp"

namespace orthrus::cli {
namespace {

using Clock = std::chrono::steady_clock;
using kernels::Transpose;

struct Options {
  std::string what = "kernels";
  std::string profile;
  int repeats = 7;
};

struct Timing {
  double median_s, spread;  ///< spread: (max − min) / median
};

template <class F>
Timing time_it(int repeats, F&& f) {
  f();  // warm-up
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) {
    const auto start = Clock::now();
    f();
    seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2];
  return {median, (seconds.back() - seconds.front()) / median};
}

class Printer {
 public:
  Printer(bool json, bool prints) : json_(json), prints_(prints) {}
  ~Printer() {
    if (json_ && prints_) std::printf("%s\n", rows_.dump().c_str());
  }
  void row(const std::string& name, const std::string& shape, Timing t, const char* unit,
           double rate, double share) {
    if (!prints_) return;
    if (json_) {
      rows_.push_back({{"name", name},
                       {"shape", shape},
                       {"median_ms", t.median_s * 1e3},
                       {"spread", t.spread},
                       {"unit", unit},
                       {"rate", rate},
                       {"share_of_peak", share}});
    } else {
      std::printf("%-24s %-14s %10.3f ms  ±%4.0f%%  %9.2f %-8s", name.c_str(), shape.c_str(),
                  t.median_s * 1e3, t.spread * 50, rate, unit);
      std::printf(share > 0 ? " %5.0f %%\n" : "\n", share * 100);
    }
  }

 private:
  bool json_, prints_;
  nlohmann::ordered_json rows_ = nlohmann::ordered_json::array();
};

void bench_kernels(const Options& o, Printer& out) {
  auto backend = kernels::open_backend("cpu");
  constexpr Index k = 1024;
  std::vector<float> a = noise(k * k);
  std::vector<float> c(a.size());
  std::vector<BFloat16> a16(a.size());
  std::vector<BFloat16> c16(a.size());
  const auto f32 = [](std::vector<float>& v) { return matrix_view(v.data(), k, k); };
  const auto b16 = [](std::vector<BFloat16>& v) { return matrix_view(v.data(), k, k); };
  backend->convert(f32(a), 1, b16(a16));
  const double flops = 2.0 * k * k * k;
  const Timing f = time_it(o.repeats, [&] {
    backend->gemm(1, f32(a), Transpose::no, f32(a), Transpose::no, 0, f32(c));
  });
  out.row("gemm f32", "1024^3", f, "GFLOP/s", flops / f.median_s * 1e-9, 1);
  const Timing h = time_it(o.repeats, [&] {
    backend->gemm(1, b16(a16), Transpose::no, b16(a16), Transpose::no, 0, b16(c16));
  });
  out.row("gemm bf16", "1024^3", h, "GFLOP/s", flops / h.median_s * 1e-9, 1);

  for (const auto& [rows, cols] :
       {std::pair<Index, Index>{256, 256}, {768, 768}, {768, 3072}, {1024, 4096}}) {
    for (const char* dtype : {"f32", "bf16"}) {
      LmoConfig config;
      config.dtype = dtype;
      const optim::Lmo lmo(config);
      const std::vector<float> x = noise(rows * cols);
      std::vector<float> y(x.size());
      runtime::Arena arena(lmo.workspace_bytes(rows, cols));
      const auto work = arena.take(lmo.workspace_bytes(rows, cols));
      const Timing t = time_it(o.repeats, [&] {
        std::copy(x.begin(), x.end(), y.begin());
        lmo(matrix_view(y.data(), rows, cols), work, *backend);
      });
      const double peak = flops / (config.dtype == "f32" ? f : h).median_s;
      out.row(std::string("msign ") + dtype, std::to_string(rows) + "x" + std::to_string(cols), t,
              "GFLOP/s", lmo.flops(rows, cols) / t.median_s * 1e-9,
              lmo.flops(rows, cols) / t.median_s / peak);
    }
  }

  constexpr Index n = 1 << 24;
  std::vector<float> g = noise(n);
  std::vector<float> w = g;
  std::vector<float> m(g.size());
  std::vector<float> v(g.size());
  const auto row = [](std::vector<float>& x) { return matrix_view(x.data(), 1, n); };
  const Timing copy = time_it(o.repeats, [&] { std::copy(g.begin(), g.end(), w.begin()); });
  const double copy_rate = 8.0 * n / copy.median_s;
  out.row("copy", "16Mi", copy, "GB/s", copy_rate * 1e-9, 1);
  const auto pass = [&](const char* name, double bytes, auto&& body) {
    const Timing t = time_it(o.repeats, body);
    out.row(name, "16Mi", t, "GB/s", bytes * n / t.median_s * 1e-9,
            bytes * n / t.median_s / copy_rate);
  };
  pass("adamw", 28, [&] {
    kernels::AdamWScalars s;
    s.lr = 1e-3;
    backend->adamw(s, row(g), row(m), row(v), row(w));
  });
  pass("momentum", 16, [&] { backend->momentum(0.95, 0.05, true, row(g), row(m)); });
  pass("decay_step", 12, [&] { backend->decay_step(0.999, 1e-3, row(g), row(w)); });
  pass("sum_squares", 4, [&] { (void)backend->sum_squares(row(g)); });
}

void bench_comm(const Options& o, Printer& out, Communicator& world) {
  for (Index n = 1 << 10; n <= 1 << 22; n <<= 4) {
    std::vector<float> data(static_cast<std::size_t>(n));
    std::vector<Index> counts(static_cast<std::size_t>(world.size()), n / world.size());
    counts[0] += n % world.size();
    std::vector<float> part(static_cast<std::size_t>(counts[0]));
    const Index mine = counts[static_cast<std::size_t>(world.rank())];
    const auto report = [&](const char* name, auto&& body) {
      const Traffic before = world.traffic(TrafficClass::payload);
      body();
      const double bytes =
          static_cast<double>((world.traffic(TrafficClass::payload) - before).bytes);
      const Timing t = time_it(o.repeats, body);
      out.row(name, std::to_string(n * 4) + "B", t, "GB/s", bytes / t.median_s * 1e-9, 0);
    };
    report("reduce_scatter", [&] {
      world.reduce_scatter({data.data(), n, DType::f32}, counts, {part.data(), mine, DType::f32});
    });
    report("all_gather", [&] {
      world.all_gather({part.data(), mine, DType::f32}, counts, {data.data(), n, DType::f32});
    });
    report("all_reduce", [&] {
      world.all_reduce(Span{data.data(), n, DType::f32}, ReduceOp::sum);
    });
  }
}

/// One optimizer step on four GPT-2 blocks' worth of matrices, Muon against AdamW.
void bench_step(const Options& o, Printer& out, Context& context) {
  constexpr Index c = 768;
  const std::vector<std::pair<Index, Index>> shapes = {{c, c}, {c, c},     {c, c},
                                                       {c, c}, {4 * c, c}, {c, 4 * c}};
  for (const char* rule : {"adamw", "muon"}) {
    for (const char* dtype : {"f32", "bf16"}) {
      const bool muon = std::string(rule) == "muon";
      if (!muon && std::string(dtype) == "bf16") continue;
      const Config config = parse_config(
          "schema: 1\ngroups:\n  - {match: \"*\", rule: {name: " + std::string(rule) + "}" +
          (muon ? ", lmo: {dtype: " + std::string(dtype) + "}" : std::string()) + "}\n");
      std::vector<std::vector<float>> weights;
      std::vector<std::vector<float>> gradients;
      std::vector<Parameter> parameters;
      for (int layer = 0; layer < 2; ++layer) {
        for (const auto& [rows, cols] : shapes) {
          weights.push_back(noise(rows * cols));
          gradients.push_back(noise(rows * cols));
        }
      }
      for (std::size_t i = 0; i < weights.size(); ++i) {
        Parameter p;
        p.name = "w" + std::to_string(i);
        p.shape = {shapes[i % shapes.size()].first, shapes[i % shapes.size()].second};
        p.weights = weights[i].data();
        p.gradient = gradients[i].data();
        parameters.push_back(std::move(p));
      }
      ShardedOptimizer optimizer{config, context.world(60), parameters};
      double bytes = 0;
      const Timing t =
          time_it(o.repeats, [&] { bytes = static_cast<double>(optimizer.step().bytes_sent); });
      out.row(std::string("step ") + rule + (muon ? std::string(" ") + dtype : ""), "14.2M", t,
              "MB sent", bytes * 1e-6, 0);
    }
  }
}

}  // namespace

Run add_bench(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_option("WHAT", options->what, "kernels, step or comm")
      ->check(CLI::IsMember({"kernels", "step", "comm"}));
  app.add_option("--repeats", options->repeats, "Timed runs, after one warm-up")
      ->check(CLI::Range(5, 1000));
  app.add_option("--profile", options->profile,
                 "Measure what `orthrus plan` predicts with, all of it, and write it to this file");
  return [options](Context& context) {
    if (!options->profile.empty()) return bench_profile(options->profile, context);
    if (options->what == "kernels") {
      Printer out(context.json, context.rank() == 0);
      if (context.rank() == 0) bench_kernels(*options, out);
      return 0;
    }
    Communicator world = context.world(60);
    Printer out(context.json, world.rank() == 0);
    if (options->what == "comm") {
      bench_comm(*options, out, world);
    } else {
      bench_step(*options, out, context);
    }
    return 0;
  };
}

}  // namespace orthrus::cli
