// The plan as its readers see it: a table for people, JSON for scripts.
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "runtime/plan.hpp"

namespace orthrus::runtime {
namespace {

std::string bytes_text(double bytes) {
  const char* units[] = {"B", "KB", "MB", "GB", "TB", "PB"};
  int u = 0;
  while (bytes >= 1000 && u < 5) {
    bytes /= 1000;
    ++u;
  }
  char text[32];
  std::snprintf(text, sizeof text, u == 0 ? "%.0f %s" : "%.2f %s", bytes, units[u]);
  return text;
}

nlohmann::ordered_json plan_document(const Plan& plan) {
  nlohmann::ordered_json doc;
  doc["ranks"] = plan.ranks;
  doc["plan_hash"] = plan.hash;
  doc["mesh"] = {{"shard", plan.shard}, {"replicate", plan.replicate}};
  doc["zero_stage"] = plan.stage;
  doc["virtual_shards"] = plan.virtual_shards;
  auto& matrices = doc["matrices"] = nlohmann::ordered_json::array();
  for (const MatrixPlan& m : plan.matrices) {
    const Group& g =
        plan.groups[static_cast<std::size_t>(plan.group_of[static_cast<std::size_t>(m.parameter)])];
    matrices.push_back({{"name", m.name},
                        {"rows", m.rows},
                        {"cols", m.cols},
                        {"mode", std::string(optim::name_of(m.mode))},
                        {"owner", m.owner},
                        {"seconds", m.seconds},
                        {"norm", g.config->lmo.norm}});
  }
  auto& passed = doc["passed_over"] = nlohmann::ordered_json::array();
  for (const int i : plan.passed_over) {
    passed.push_back(plan.parameters[static_cast<std::size_t>(i)].name);
  }
  auto& buckets = doc["buckets"] = nlohmann::ordered_json::array();
  for (const Bucket& b : plan.buckets) {
    Index largest = 0;
    for (const Bucket::Part& part : b.parts) largest = std::max(largest, part.size);
    buckets.push_back({{"parameters", b.parameters.size()},
                       {"elements", b.size},
                       {"weights", std::string(name_of(b.weights))},
                       {"mode", std::string(optim::name_of(b.mode))},
                       {"most_on_a_rank", largest}});
  }
  auto& ranks = doc["per_rank"] = nlohmann::ordered_json::array();
  for (const RankPlan& r : plan.per_rank) {
    ranks.push_back({{"bytes_sent", r.traffic.bytes},
                     {"messages", r.traffic.messages},
                     {"flops", r.flops},
                     {"seconds", r.seconds},
                     {"matrices", r.matrices},
                     {"memory",
                      {{"weights", r.memory.weights},
                       {"gradients", r.memory.gradients},
                       {"state", r.memory.state},
                       {"work", r.memory.work}}}});
  }
  doc["imbalance"] = plan.imbalance;
  doc["memory_imbalance"] = plan.memory_imbalance;
  doc["load_bound"] = plan.load_bound;
  return doc;
}

}  // namespace

std::string plan_json(const Plan& plan, int indent) { return plan_document(plan).dump(indent); }

std::string plan_table(const Plan& plan) {
  std::string out;
  char line[256];
  const auto print = [&](auto... args) {
    std::snprintf(line, sizeof line, args...);
    out += line;
  };
  print("plan %s: %d ranks = shard %d x replicate %d, ZeRO-%d%s\n", plan.hash.substr(0, 12).c_str(),
        plan.ranks, plan.shard, plan.replicate, plan.stage,
        plan.virtual_shards > 0 ? ", reproducible" : "");
  std::size_t longest = 6;
  for (const MatrixPlan& m : plan.matrices) longest = std::max(longest, m.name.size());
  const int width = static_cast<int>(std::min<std::size_t>(longest, 48));
  if (!plan.matrices.empty()) {
    print("\n%-*s %9s %9s  %-8s %6s %11s\n", width, "matrix", "rows", "cols", "mode", "owner",
          "predicted");
  }
  const std::size_t shown = plan.matrices.size() > 48 ? 40 : plan.matrices.size();
  for (std::size_t i = 0; i < shown; ++i) {
    const MatrixPlan& m = plan.matrices[i];
    print("%-*.*s %9lld %9lld  %-8s %6d %8.3f ms\n", width, width, m.name.c_str(),
          static_cast<long long>(m.rows), static_cast<long long>(m.cols),
          std::string(optim::name_of(m.mode)).c_str(), m.owner, m.seconds * 1e3);
  }
  if (shown < plan.matrices.size()) print("… and %zu more\n", plan.matrices.size() - shown);
  for (const int i : plan.passed_over) {
    out +=
        "passed over by a matrix rule: " + plan.parameters[static_cast<std::size_t>(i)].name + "\n";
  }
  print("\n%6s %12s %9s %9s %11s %11s %11s %11s %11s\n", "rank", "sent/step", "messages",
        "matrices", "predicted", "weights", "gradients", "state", "work");
  const std::size_t rows = plan.per_rank.size() > 20 ? 16 : plan.per_rank.size();
  for (std::size_t w = 0; w < rows; ++w) {
    const RankPlan& r = plan.per_rank[w];
    print("%6zu %12s %9lld %9lld %8.3f ms %11s %11s %11s %11s\n", w,
          bytes_text(static_cast<double>(r.traffic.bytes)).c_str(),
          static_cast<long long>(r.traffic.messages), static_cast<long long>(r.matrices),
          r.seconds * 1e3, bytes_text(static_cast<double>(r.memory.weights)).c_str(),
          bytes_text(static_cast<double>(r.memory.gradients)).c_str(),
          bytes_text(static_cast<double>(r.memory.state)).c_str(),
          bytes_text(static_cast<double>(r.memory.work)).c_str());
  }
  if (rows < plan.per_rank.size()) print("… and %zu more\n", plan.per_rank.size() - rows);
  std::int64_t bytes = 0;
  for (const RankPlan& r : plan.per_rank) bytes += r.traffic.bytes;
  print("\nall ranks: %s per step in %zu buckets; imbalance %.3f (reachable: %.3f), memory %.3f\n",
        bytes_text(static_cast<double>(bytes)).c_str(), plan.buckets.size(), plan.imbalance,
        std::max(1.0, plan.load_bound), plan.memory_imbalance);
  return out;
}

}  // namespace orthrus::runtime
