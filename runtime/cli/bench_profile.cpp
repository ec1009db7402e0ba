// orthrus bench --profile: measures what the planner predicts with. All ranks measure at the same
// time, as they compute and send at the same time in a step; the slowest counts.
#include "runtime/cli/bench_profile.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <orthrus/error.hpp>
#include <utility>
#include <vector>

#include "kernels/backend.hpp"
#include "runtime/agree.hpp"
#include "runtime/cli/bench.hpp"
#include "runtime/cli/noise.hpp"
#include "runtime/clock.hpp"
#include "runtime/machine.hpp"
#include "runtime/posix_file.hpp"

namespace orthrus::cli {
namespace {

using kernels::Transpose;
using nlohmann::ordered_json;
using runtime::Collective;
using runtime::Link;
using runtime::LinkRate;
using runtime::MachineProfile;
using runtime::RateTable;

double real(Index n) { return static_cast<double>(n); }

/// Three digits: more were not measured.
double rounded(double x) { return std::strtod(fmt::format("{:.3g}", x).c_str(), nullptr); }

/// Of one measurement: 80 of them, twice.
constexpr double budget_s = 0.06;

/// Median seconds of one call of `body`, after a warm-up. Calls are repeated for `budget_s`, but at
/// least three times and at most 25; quick ones are timed several at once.
double median_seconds(const std::function<void()>& body) {
  const auto timed = [&](int calls) {
    const auto start = runtime::Clock::now();
    for (int i = 0; i < calls; ++i) body();
    return runtime::ms_since(start) * 1e-3 / calls;
  };
  double once = timed(1);
  if (once < 1e-2) once = std::max(timed(1), 1e-7);  // the first of quick ones is not like the rest
  const int calls = static_cast<int>(std::clamp(2e-4 / once, 1.0, 1000.0));
  const int repeats = static_cast<int>(std::clamp(budget_s / (once * calls), 3.0, 25.0));
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) seconds.push_back(timed(calls));
  std::nth_element(seconds.begin(), seconds.begin() + repeats / 2, seconds.end());
  return seconds[static_cast<std::size_t>(repeats / 2)];
}

// ---- products -----------------------------------------------------------------------------------

/// Rates over square products and, but for the largest, such with one side three times as long:
/// what msign does to a square matrix and to a wide one.
runtime::ProductRates measure_products(DType dtype, std::span<const Index> sides,
                                       kernels::Backend& backend, Communicator& world) {
  const Index most = *std::max_element(sides.begin(), sides.end());
  const auto longest = [&](Index side) { return side < most ? 3 * side : side; };
  Index elements = 0;
  for (const Index s : sides) elements = std::max(elements, s * longest(s));
  const std::vector<float> values = noise(elements);
  std::vector<std::byte> a(values.size() * bytes_of(dtype));
  std::vector<std::byte> b(a.size());
  std::vector<std::byte> c(a.size());
  const auto view = [&](std::vector<std::byte>& data, Index rows, Index cols) {
    return MatrixView{data.data(), rows, cols, cols, dtype};
  };
  const ConstMatrixView source = matrix_view(values.data(), 1, elements);
  backend.convert(source, 1, view(a, 1, elements));
  backend.convert(source, 1, view(b, 1, elements));

  runtime::ProductRates rates;
  for (const Index s : sides) {
    double gemm = 0;
    double syrk = 0;
    double volume = 0;
    for (Index l = s; l <= longest(s); l += 2 * s) {
      volume += real(s) * real(s) * real(l);
      world.barrier();
      gemm += slowest(world, median_seconds([&] {
                        backend.gemm(1, view(a, s, s), Transpose::no, view(b, s, l), Transpose::no,
                                     0, view(c, s, l));
                      }));
      world.barrier();
      syrk += slowest(world, median_seconds([&] {
                        backend.syrk(1, view(a, s, l), Transpose::no, 0, view(c, s, s));
                      }));
    }
    rates.gemm.push_back({real(s), rounded(2 * volume / gemm)});
    rates.syrk.push_back({real(s), rounded(volume / syrk)});
  }
  return rates;
}

/// Rates over a copy and a momentum update, from what a cache holds to what none does.
RateTable measure_passes(kernels::Backend& backend, Communicator& world) {
  constexpr Index sizes[] = {1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28};
  std::vector<float> x = noise(*std::rbegin(sizes) / 8);
  std::vector<float> y = x;
  RateTable table;
  for (const Index bytes : sizes) {
    const auto row = [](std::vector<float>& v, Index n) { return matrix_view(v.data(), 1, n); };
    world.barrier();
    const double copy = slowest(
        world, median_seconds([&] { backend.convert(row(x, bytes / 8), 1, row(y, bytes / 8)); }));
    world.barrier();
    const double update = slowest(
        world,
        median_seconds([&] { backend.axpby(0.05, row(x, bytes / 12), 0.95, row(y, bytes / 12)); }));
    table.push_back({real(bytes), rounded(2 * real(bytes) / (copy + update))});
  }
  return table;
}

// ---- links --------------------------------------------------------------------------------------

/// What one call of a kind took.
struct Sample {
  double bytes = 0;  ///< the most a rank sent
  double seconds = 0;
};

/// What the formula needs to give each sample back on as many ranks. Half of what the smallest
/// message takes counts as latency, which grows with ranks, the other half as what its bytes take:
/// where the library changes its protocol both jump, and one line through all sizes misses half of
/// them by 50 %.
LinkRate rate_of(const std::vector<Sample>& samples, double steps) {
  double least = samples.front().seconds;
  for (const Sample& s : samples) least = std::min(least, s.seconds);
  LinkRate rate{rounded(least / 2 / steps), {}};
  for (const Sample& s : samples) {
    rate.bytes_per_s.push_back({s.bytes, rounded(s.bytes / (s.seconds - least / 2))});
  }
  return rate;
}

/// Runs `call` on messages of 1 KiB to 16 MiB. Collective over `comm`; ranks of the launch that are
/// not in it are in another of the same level.
std::vector<Sample> sample(Communicator& comm, Communicator& world,
                           const std::function<void(Index)>& call) {
  constexpr int repeats = 11;
  std::vector<Sample> samples;
  for (Index bytes = 1 << 10; bytes <= 1 << 24; bytes <<= 2) {
    const int calls = static_cast<int>(std::clamp<Index>((1 << 18) / bytes, 1, 20));
    const Traffic before = comm.traffic();
    call(bytes);
    double sent = real((comm.traffic() - before).bytes);
    comm.all_reduce(std::span<double>(&sent, 1), ReduceOp::max);
    std::vector<double> seconds;
    for (int i = 0; i < repeats; ++i) {
      comm.barrier();
      const auto start = runtime::Clock::now();
      for (int k = 0; k < calls; ++k) call(bytes);
      seconds.push_back(runtime::ms_since(start) * 1e-3 / calls);
    }
    std::nth_element(seconds.begin(), seconds.begin() + repeats / 2, seconds.end());
    samples.push_back({sent, slowest(world, seconds[repeats / 2])});
  }
  return samples;
}

/// @param comm  ranks of one level, two at least.
Link measure_link(Communicator& comm, Communicator& world) {
  const int ranks = comm.size();
  const auto me = static_cast<std::size_t>(comm.rank());
  std::vector<float> whole((1 << 24) / sizeof(float));
  std::vector<float> other(whole.size() + static_cast<std::size_t>(ranks));
  std::vector<Index> counts(static_cast<std::size_t>(ranks));
  const auto cut = [&](Index bytes) {
    const Index n = bytes / static_cast<Index>(sizeof(float));
    for (int r = 0; r < ranks; ++r)
      counts[static_cast<std::size_t>(r)] = n / ranks + (r < n % ranks ? 1 : 0);
    return n;
  };
  const auto span = [](std::vector<float>& data, Index n) {
    return Span{data.data(), n, DType::f32};
  };
  const std::function<void(Index)> reduce_scatter = [&](Index bytes) {
    const Index n = cut(bytes);
    comm.reduce_scatter(span(whole, n), counts, span(other, counts[me]));
  };
  const std::function<void(Index)> all_gather = [&](Index bytes) {
    const Index n = cut(bytes);
    comm.all_gather(span(other, counts[me]), counts, span(whole, n));
  };
  const std::function<void(Index)> all_to_all = [&](Index bytes) {
    const Index n = cut(bytes);
    const std::vector<Index> equal(counts.size(), counts[me]);
    comm.all_to_all(span(whole, n), counts, span(other, counts[me] * ranks), equal);
  };
  const std::function<void(Index)> all_reduce = [&](Index bytes) {
    comm.all_reduce(span(whole, cut(bytes)), ReduceOp::sum);
  };
  // There and back, so the first rank sends and waits for as many bytes as the second.
  const std::function<void(Index)> ping_pong = [&](Index bytes) {
    const Index n = cut(bytes);
    if (me == 0) {
      comm.send(span(whole, n), 1);
      comm.receive(span(other, n), 1);
    } else if (me == 1) {
      comm.receive(span(other, n), 0);
      comm.send(span(whole, n), 0);
    }
  };

  const auto measure = [&](Collective kind, const std::function<void(Index)>& call, double share) {
    std::vector<Sample> samples = sample(comm, world, call);
    for (Sample& s : samples) s.seconds *= share;
    return rate_of(samples, runtime::collective_steps(kind, ranks));
  };
  Link link{measure(Collective::send, ping_pong, 0.5), {}};
  for (const auto& [kind, call] : {std::pair{Collective::reduce_scatter, &reduce_scatter},
                                   {Collective::all_gather, &all_gather},
                                   {Collective::all_to_all, &all_to_all},
                                   {Collective::all_reduce, &all_reduce}}) {
    link.special[kind] = measure(kind, *call, 1);
  }
  return link;
}

// ---- what was measured --------------------------------------------------------------------------

std::string host_name() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 ? name : "unknown";
}

std::string processor_name() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    const auto colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown processor";
}

/// Where the ranks are.
struct Layout {
  int nodes = 1;
  int node = 0, place = 0;  ///< of this rank: its node, and its number there
  int most = 1;             ///< ranks on the fullest node
};

Layout layout_of(Communicator& world) {
  const std::vector<std::string> hosts = world.all_gather_strings(host_name());
  std::vector<std::pair<std::string, int>> nodes;
  Layout layout;
  for (int r = 0; r < world.size(); ++r) {
    const std::string& host = hosts[static_cast<std::size_t>(r)];
    auto found =
        std::find_if(nodes.begin(), nodes.end(), [&](const auto& n) { return n.first == host; });
    if (found == nodes.end()) found = nodes.insert(nodes.end(), {host, 0});
    if (r == world.rank()) {
      layout.node = static_cast<int>(found - nodes.begin());
      layout.place = found->second;
    }
    layout.most = std::max(layout.most, ++found->second);
  }
  layout.nodes = static_cast<int>(nodes.size());
  return layout;
}

/// 1536, or 4Mi.
std::string size_text(double size) {
  for (const auto& [unit, suffix] : {std::pair{0x1p20, "Mi"}, {0x1p10, "Ki"}}) {
    if (size >= unit && std::fmod(size, unit) == 0) {
      return fmt::format("{:g}{}", size / unit, suffix);
    }
  }
  return fmt::format("{:g}", size);
}

/// A line of sizes and rates, the rates times 1e-9.
void print_rates(const std::string& name, const RateTable& table, const char* unit) {
  std::string line = fmt::format("{:<32}", name);
  for (const runtime::RatePoint& p : table) {
    line += fmt::format(" {:>6} {:<5.3g}", size_text(p.size), p.rate * 1e-9);
  }
  std::printf("%s %s\n", line.c_str(), unit);
}

void print_link(const char* name, const Link& link) {
  const auto print = [&](std::string_view kind, const LinkRate& rate) {
    print_rates(fmt::format("{} {} {:.3g} us", name, kind, rate.latency_s * 1e6), rate.bytes_per_s,
                "GB/s");
  };
  print("send", link.any);
  for (const auto& [kind, rate] : link.special) print(name_of(kind), rate);
}

ordered_json to_json(const RateTable& table) {
  ordered_json rows = ordered_json::array();
  for (const runtime::RatePoint& p : table) rows.push_back({{"size", p.size}, {"rate", p.rate}});
  return rows;
}

ordered_json to_json(const Link& link) {
  const auto rate = [](const LinkRate& r) {
    return ordered_json{{"latency_s", r.latency_s}, {"bytes_per_s", to_json(r.bytes_per_s)}};
  };
  ordered_json object = rate(link.any);
  for (const auto& [kind, r] : link.special) object[std::string(name_of(kind))] = rate(r);
  return object;
}

ordered_json to_json(const MachineProfile& profile) {
  ordered_json products;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
    const runtime::ProductRates& rates = profile.products(dtype);
    products[std::string(name_of(dtype))] = {{"gemm", to_json(rates.gemm)},
                                             {"syrk", to_json(rates.syrk)}};
  }
  return {{"name", profile.name},
          {"description", profile.description},
          {"products", std::move(products)},
          {"pass", to_json(profile.pass)},
          {"ranks_per_node", profile.ranks_per_node},
          {"links", {{"node", to_json(profile.node)}, {"network", to_json(profile.network)}}}};
}

/// What is between this rank and others.
struct Levels {
  Communicator inside, across;
  bool has_node = false, has_network = false;

  Levels(Communicator& world, const Layout& layout)
      : inside(world.split(layout.node, world.rank(), "node")),
        across(world.split(layout.place, world.rank(), "network")) {
    // Of every level all groups measure, or none: those not in one would wait for the others.
    has_node = slowest(world, inside.size() < 2 ? 1 : 0) == 0;
    has_network = slowest(world, across.size() < 2 ? 1 : 0) == 0;
  }
};

/// Everything once. What there is none of stays as it is by default.
MachineProfile measure(Levels& levels, kernels::Backend& backend, Communicator& world) {
  // Sides and shapes are none of those that modes are compared on.
  constexpr Index sides[] = {64, 96, 192, 384, 640, 896, 1536};
  constexpr Index few_sides[] = {96, 384, 896};
  MachineProfile profile;
  profile.f32 = measure_products(DType::f32, sides, backend, world);
  profile.bf16 = measure_products(DType::bf16, sides, backend, world);
  profile.f64 = measure_products(DType::f64, few_sides, backend, world);
  profile.pass = measure_passes(backend, world);
  if (levels.has_node) profile.node = measure_link(levels.inside, world);
  if (levels.has_network) profile.network = measure_link(levels.across, world);
  return profile;
}

void keep_faster(RateTable& table, const RateTable& other) {
  for (std::size_t i = 0; i < table.size(); ++i) {
    table[i].rate = std::max(table[i].rate, other[i].rate);
  }
}
void keep_faster(Link& link, const Link& other) {
  const auto keep = [](LinkRate& rate, const LinkRate& from) {
    rate.latency_s = std::min(rate.latency_s, from.latency_s);
    keep_faster(rate.bytes_per_s, from.bytes_per_s);
  };
  keep(link.any, other.any);
  for (auto& [kind, rate] : link.special) keep(rate, other.special.at(kind));
}
/// Of two rounds: what else runs on a machine slows down one of them more often than both.
void keep_faster(MachineProfile& profile, const MachineProfile& other) {
  keep_faster(profile.f32.gemm, other.f32.gemm), keep_faster(profile.f32.syrk, other.f32.syrk);
  keep_faster(profile.bf16.gemm, other.bf16.gemm), keep_faster(profile.bf16.syrk, other.bf16.syrk);
  keep_faster(profile.f64.gemm, other.f64.gemm), keep_faster(profile.f64.syrk, other.f64.syrk);
  keep_faster(profile.pass, other.pass);
  keep_faster(profile.node, other.node), keep_faster(profile.network, other.network);
}

}  // namespace

int bench_profile(const std::string& file, Context& context) {
  const auto start = runtime::Clock::now();
  Communicator world = context.world(60);
  const bool first = world.rank() == 0;
  std::optional<runtime::NewFile> out;
  runtime::agree(world, [&] {
    if (first) out.emplace(file);
  });
  const TrafficScope setup(world, TrafficClass::setup);
  const Layout layout = layout_of(world);
  Levels levels(world, layout);
  auto backend = kernels::open_backend("cpu");
  MachineProfile profile = measure(levels, *backend, world);
  keep_faster(profile, measure(levels, *backend, world));

  std::string assumed;
  if (!levels.has_node || !levels.has_network) {
    const char* const what = levels.has_node      ? "the network is"
                             : levels.has_network ? "the link inside a node is"
                                                  : "links are";
    assumed = fmt::format("; {} not measured but taken from {}", what, profile.name);
  }
  profile.name = "measured";
  profile.ranks_per_node = layout.nodes > 1 ? layout.most : 0;
  profile.description =
      fmt::format("measured by orthrus bench --profile on {}: {} rank{} on {} node{}{}",
                  processor_name(), world.size(), world.size() == 1 ? "" : "s", layout.nodes,
                  layout.nodes == 1 ? "" : "s", assumed);
  std::replace_if(
      profile.description.begin(), profile.description.end(),
      [](char c) { return static_cast<unsigned char>(c) < 0x20; }, ' ');

  runtime::agree(world, [&] {
    if (!first) return;
    const std::string text = to_yaml(profile);
    out->write(text.data(), static_cast<std::int64_t>(text.size()));
    out->commit();
  });
  if (!first) return 0;
  const double seconds = runtime::ms_since(start) * 1e-3;
  if (context.json) {
    const ordered_json document{
        {"file", file}, {"seconds", seconds}, {"profile", to_json(profile)}};
    std::printf("%s\n",
                document.dump(2, ' ', false, ordered_json::error_handler_t::replace).c_str());
    return 0;
  }
  std::printf("%s\n", profile.description.c_str());
  for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
    const std::string name(name_of(dtype));
    print_rates("gemm " + name, profile.products(dtype).gemm, "GFLOP/s");
    print_rates("syrk " + name, profile.products(dtype).syrk, "GFLOP/s");
  }
  print_rates("pass", profile.pass, "GB/s");
  if (levels.has_node) print_link("node", profile.node);
  if (levels.has_network) print_link("network", profile.network);
  std::printf("written to %s in %.0f s\n", file.c_str(), seconds);
  return 0;
}

}  // namespace orthrus::cli
