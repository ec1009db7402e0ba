// The plan as its readers see it: a table for people, JSON for scripts.
#include "runtime/plan_text.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "runtime/plan.hpp"

namespace orthrus::runtime {
namespace {

nlohmann::ordered_json plan_document(const Plan& plan, double step_seconds) {
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
                        {"norm", g.config->lmo.norm},
                        {"lmo", g.direction().description(*g.lmo, m.line_length())}});
    if (m.shared_terms > 0) matrices.back()["shared_terms"] = m.shared_terms;
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
                       {"weights", b.weights.name()},
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
  doc["depth"] = plan.depth;
  doc["imbalance"] = plan.imbalance;
  doc["memory_imbalance"] = plan.memory_imbalance;
  doc["load_bound"] = plan.load_bound;
  if (step_seconds > 0) doc["step_seconds"] = step_seconds;
  return doc;
}

/// Matrices that differ in numbers of their names only.
struct MatrixClass {
  const MatrixPlan* first = nullptr;
  std::vector<std::string> name;  ///< in pieces; numbers that differ are "*"
  std::int64_t count = 0;
  std::set<int> owners;
};

/// "layers.12.up" → "layers.", "12", ".up": whole numbers apart.
std::vector<std::string> name_pieces(const std::string& name) {
  const auto is_digit = [](char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; };
  std::vector<std::string> pieces{""};
  for (std::size_t i = 0; i < name.size(); ++i) {
    const bool starts = i == 0 || is_digit(name[i]) != is_digit(name[i - 1]);
    if (starts && i > 0) pieces.emplace_back();
    pieces.back() += name[i];
  }
  return pieces;
}

std::vector<MatrixClass> classes_of(const Plan& plan) {
  using Key = std::tuple<std::string, Index, Index, optim::Mode, double>;
  std::map<Key, std::size_t> found;
  std::vector<MatrixClass> classes;
  for (const MatrixPlan& m : plan.matrices) {
    const std::vector<std::string> pieces = name_pieces(m.name);
    std::string pattern;
    for (const std::string& piece : pieces) {
      pattern += std::isdigit(static_cast<unsigned char>(piece[0])) != 0 ? "*" : piece;
    }
    const auto [it, fresh] =
        found.try_emplace({pattern, m.rows, m.cols, m.mode, m.seconds}, classes.size());
    if (fresh) classes.push_back({&m, pieces, 0, {}});
    MatrixClass& c = classes[it->second];
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      if (c.name[i] != pieces[i]) c.name[i] = "*";
    }
    ++c.count;
    c.owners.insert(m.owner);
  }
  return classes;
}

std::string matrix_table(const Plan& plan) {
  const std::vector<MatrixClass> classes = classes_of(plan);
  std::vector<std::string> names;
  std::size_t width = 8;
  for (const MatrixClass& c : classes) {
    std::string& name = names.emplace_back();
    for (const std::string& piece : c.name) name += piece;
    width = std::max(width, std::min<std::size_t>(name.size(), 44));
  }
  const int columns = static_cast<int>(width);
  std::string out = formatted("\n%7s %-*s %9s %9s  %-12s %11s %11s\n", "", columns, "matrices",
                              "rows", "cols", "mode", "each", "computed by");
  const std::size_t shown = classes.size() > 48 ? 40 : classes.size();
  for (std::size_t i = 0; i < shown; ++i) {
    const MatrixClass& c = classes[i];
    const std::string count = c.count > 1 ? std::to_string(c.count) + " x" : "";
    const bool one = c.owners.size() == 1;
    const std::string by =
        c.first->mode == optim::Mode::gather || c.first->mode == optim::Mode::gram_steps ||
                c.first->mode == optim::Mode::block_cyclic ||
                c.first->mode == optim::Mode::block_local || c.first->shared_terms > 0
            ? "all ranks"
        : one ? "rank " + std::to_string(*c.owners.begin())
              : std::to_string(c.owners.size()) + " ranks";
    out += formatted("%7s %-*.*s %9lld %9lld  %-12s %11s %11s\n", count.c_str(), columns, columns,
                     names[i].c_str(), static_cast<long long>(c.first->rows),
                     static_cast<long long>(c.first->cols),
                     std::string(optim::name_of(c.first->mode)).c_str(),
                     seconds_text(c.first->seconds).c_str(), by.c_str());
  }
  if (shown < classes.size()) out += formatted("… and %zu more\n", classes.size() - shown);
  return out;
}

/// ZeRO-3 has shards and a working set of the runtime's there.
std::string weights_title(const Plan& plan) {
  return plan.weights_sharded() ? "   weights" : "trainer weights";
}

std::string rank_row(const std::string& name, const RankPlan& r, std::size_t width) {
  const auto bytes = [](std::int64_t n) { return bytes_text(static_cast<double>(n)); };
  return formatted("%12s %10s %9lld %9lld %11s %*s %10s %10s %10s %10s\n", name.c_str(),
                   bytes(r.traffic.bytes).c_str(), static_cast<long long>(r.traffic.messages),
                   static_cast<long long>(r.matrices), seconds_text(r.seconds).c_str(),
                   static_cast<int>(width), bytes(r.memory.weights).c_str(),
                   bytes(r.memory.gradients).c_str(), bytes(r.memory.state).c_str(),
                   bytes(r.memory.work).c_str(), bytes(r.memory.total()).c_str());
}

/// Every rank where there are few, else the least, the mean and the most of each column.
std::string rank_table(const Plan& plan) {
  const std::string weights = weights_title(plan);
  std::string out = formatted("\n%12s %10s %9s %9s %11s %s %10s %10s %10s %10s\n", "rank",
                              "sent/step", "messages", "matrices", "compute", weights.c_str(),
                              "gradients", "state", "work", "memory");
  if (plan.ranks <= 16) {
    for (std::size_t w = 0; w < plan.per_rank.size(); ++w) {
      out += rank_row(std::to_string(w), plan.per_rank[w], weights.size());
    }
    return out;
  }
  // The columns of each line are of different ranks: they need not add up to its total.
  const auto column = [&](auto&& of) {
    std::array<double, 3> values{1e300, 0, 0};
    for (const RankPlan& r : plan.per_rank) {
      const auto x = static_cast<double>(of(r));
      values = {std::min(values[0], x), values[1] + x / plan.ranks, std::max(values[2], x)};
    }
    return values;
  };
  const auto bytes = column([](const RankPlan& r) { return r.traffic.bytes; });
  const auto messages = column([](const RankPlan& r) { return r.traffic.messages; });
  const auto matrices = column([](const RankPlan& r) { return r.matrices; });
  const auto seconds = column([](const RankPlan& r) { return r.seconds; });
  const std::array memory{column([](const RankPlan& r) { return r.memory.weights; }),
                          column([](const RankPlan& r) { return r.memory.gradients; }),
                          column([](const RankPlan& r) { return r.memory.state; }),
                          column([](const RankPlan& r) { return r.memory.work; }),
                          column([](const RankPlan& r) { return r.memory.total(); })};
  constexpr std::array names{"least", "mean", "most"};
  for (std::size_t i = 0; i < names.size(); ++i) {
    out += formatted("%12s %10s %9.0f %9.4g %11s", names[i], bytes_text(bytes[i]).c_str(),
                     messages[i], matrices[i], seconds_text(seconds[i]).c_str());
    for (std::size_t k = 0; k < memory.size(); ++k) {
      const std::size_t width = k == 0 ? weights.size() : 10;
      out += formatted(" %*s", static_cast<int>(width), bytes_text(memory[k][i]).c_str());
    }
    out += "\n";
  }
  return out;
}

}  // namespace

std::string bytes_text(double bytes) {
  const char* units[] = {"B", "KB", "MB", "GB", "TB", "PB"};
  int u = 0;
  while (bytes >= 1000 && u < 5) {
    bytes /= 1000;
    ++u;
  }
  return formatted(u == 0 ? "%.0f %s" : "%.2f %s", bytes, units[u]);
}

std::string seconds_text(double seconds) {
  if (seconds >= 1) return formatted("%.3f s", seconds);
  return seconds >= 1e-3 ? formatted("%.3f ms", seconds * 1e3)
                         : formatted("%.1f us", seconds * 1e6);
}

std::string formatted(const char* format, ...) {
  char text[512];
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

std::string plan_json(const Plan& plan, int indent, double step_seconds) {
  return plan_document(plan, step_seconds).dump(indent);
}

std::string plan_table(const Plan& plan, double step_seconds) {
  std::string out =
      formatted("plan %s: %d ranks = shard %d x replicate %d, ZeRO-%d%s\n",
                plan.hash.substr(0, 12).c_str(), plan.ranks, plan.shard, plan.replicate, plan.stage,
                plan.virtual_shards > 0 ? ", reproducible" : "");
  if (!plan.matrices.empty()) out += matrix_table(plan);
  if (!plan.passed_over.empty()) {
    out +=
        formatted("\nno matrices, so updated by a later group: %zu parameters, such as %s\n",
                  plan.passed_over.size(),
                  plan.parameters[static_cast<std::size_t>(plan.passed_over.front())].name.c_str());
  }
  out += rank_table(plan);
  std::int64_t bytes = 0;
  double most = 0;
  for (const RankPlan& r : plan.per_rank) {
    bytes += r.traffic.bytes;
    most = std::max(most, r.seconds);
  }
  out += formatted("\nall ranks send %s per step in %zu buckets\n",
                   bytes_text(static_cast<double>(bytes)).c_str(), plan.buckets.size());
  out += formatted("compute: %s on the busiest rank, %.3f of the mean (%.3f can be reached: %s)\n",
                   seconds_text(most).c_str(), plan.imbalance, std::max(1.0, plan.load_bound),
                   plan.load_bound > 1 ? "one matrix alone takes that" : "the mean");
  out += formatted("memory at rest (without work): %.3f of the mean on the fullest rank\n",
                   plan.memory_imbalance);
  if (step_seconds > 0) {
    out += formatted("predicted step: %s (when and why: orthrus simulate)\n",
                     seconds_text(step_seconds).c_str());
  }
  return out;
}

}  // namespace orthrus::runtime
