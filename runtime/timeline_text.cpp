// The timeline as its readers see it: a table for people, JSON for scripts, a trace for browsers.
#include <cstdio>
#include <nlohmann/json.hpp>
#include <numeric>

#include "runtime/plan_text.hpp"
#include "runtime/timeline.hpp"

namespace orthrus::runtime {
namespace {

constexpr std::array<Phase, phase_count> phases{
    Phase::backward, Phase::pack, Phase::reduce, Phase::control, Phase::update,
    Phase::meet,     Phase::lmo,  Phase::gather, Phase::unpack,  Phase::audit};

/// Over all ranks.
PhaseTime mean_of(const Timeline& t, Phase phase) {
  PhaseTime sum;
  const double share = 1 / static_cast<double>(t.ranks.size());
  for (const auto& rank : t.ranks) {
    const PhaseTime& p = rank[static_cast<std::size_t>(phase)];
    sum.compute += p.compute * share;
    sum.communication += p.communication * share;
    sum.exposed += p.exposed * share;
    sum.waiting += p.waiting * share;
  }
  return sum;
}

nlohmann::ordered_json to_json(const PhaseTime& t) {
  return {{"seconds", t.compute},
          {"communication_seconds", t.communication},
          {"exposed_seconds", t.exposed},
          {"hidden_seconds", t.hidden()},
          {"waiting_seconds", t.waiting}};
}

}  // namespace

std::string timeline_json(const Plan& plan, const Timeline& t, int indent) {
  nlohmann::ordered_json doc;
  doc["ranks"] = plan.ranks;
  doc["plan_hash"] = plan.hash;
  doc["step_seconds"] = t.seconds;
  doc["overlaps"] = t.progress;
  doc["busiest_rank"] = t.busiest;
  auto& list = doc["phases"] = nlohmann::ordered_json::array();
  for (const Phase phase : phases) {
    const auto p = static_cast<std::size_t>(phase);
    list.push_back({{"phase", std::string(name_of(phase))},
                    {"busiest", to_json(t.ranks[static_cast<std::size_t>(t.busiest)][p])},
                    {"mean", to_json(mean_of(t, phase))},
                    {"bytes_sent", t.bytes_sent[p]}});
  }
  auto& ranks = doc["per_rank"] = nlohmann::ordered_json::array();
  for (int w = 0; w < plan.ranks; ++w) {
    const Traffic& sent = plan.per_rank[static_cast<std::size_t>(w)].traffic;
    nlohmann::ordered_json row = {{"bytes_sent", sent.bytes}, {"messages", sent.messages}};
    row.update(to_json(t.total(w)));
    ranks.push_back(std::move(row));
  }
  return doc.dump(indent);
}

std::string timeline_table(const Plan& plan, const Timeline& t) {
  std::string out = formatted("plan %s: %d ranks = shard %d x replicate %d, ZeRO-%d, %zu buckets\n",
                              plan.hash.substr(0, 12).c_str(), plan.ranks, plan.shard,
                              plan.replicate, plan.stage, plan.buckets.size());
  out += formatted(
      "predicted step: %s; %s\n\n", seconds_text(t.seconds).c_str(),
      t.progress ? "calls go on while ranks compute" : "no call goes on while its ranks compute");
  const std::string busiest = formatted("rank %d, which computes most", t.busiest);
  out += formatted("%-9s %-47s %-35s %s\n", "", busiest.c_str(), "mean of all ranks", "all ranks");
  out += formatted("%-9s %11s %11s %11s %11s %11s %11s %11s %10s\n", "phase", "compute", "exposed",
                   "hidden", "waiting", "compute", "exposed", "waiting", "sent");
  constexpr double shown = 5e-8;  // 0.1 us, rounded
  const auto row = [&](const char* name, const PhaseTime& most, const PhaseTime& mean,
                       std::int64_t sent) {
    out += formatted("%-9s", name);
    for (const double s : {most.compute, most.exposed, most.hidden(), most.waiting, mean.compute,
                           mean.exposed, mean.waiting}) {
      out += formatted(" %11s", s < shown ? "-" : seconds_text(s).c_str());
    }
    out += formatted(" %10s\n", sent > 0 ? bytes_text(static_cast<double>(sent)).c_str() : "-");
  };
  PhaseTime all;
  for (const Phase phase : phases) {
    const auto p = static_cast<std::size_t>(phase);
    const PhaseTime mean = mean_of(t, phase);
    all.compute += mean.compute;
    all.exposed += mean.exposed;
    all.waiting += mean.waiting;
    if (mean.compute + mean.communication + mean.waiting == 0) continue;
    row(std::string(name_of(phase)).c_str(), t.ranks[static_cast<std::size_t>(t.busiest)][p], mean,
        t.bytes_sent[p]);
  }
  row("step", t.total(t.busiest), all,
      std::accumulate(t.bytes_sent.begin(), t.bytes_sent.end(), std::int64_t{0}));
  return out;
}

void write_trace(const Plan& plan, const Timeline& t,
                 const std::function<void(const std::string&)>& write) {
  std::string text = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[";
  const char* separator = "\n";
  const auto flush_at = [&](std::size_t size) {
    if (text.size() < size) return;
    write(text);
    text.clear();
  };
  const auto name = [&](const char* what, int rank, std::size_t lane, const std::string& called) {
    text += formatted(
        "%s{\"ph\":\"M\",\"name\":\"%s\",\"pid\":%d,\"tid\":%zu,\"args\":{\"name\":\"%s\"}}",
        separator, what, rank, lane, called.c_str());
    separator = ",\n";
  };
  for (const int rank : t.shown) {
    name("process_name", rank, 0, formatted("rank %d", rank));
    for (const Lane lane : {Lane::compute, Lane::node, Lane::network}) {
      name("thread_name", rank, static_cast<std::size_t>(lane), std::string(name_of(lane)));
    }
  }
  for (const TimelineEvent& e : t.events) {
    const std::string phase(name_of(e.phase));
    const std::string what = e.lane == Lane::compute ? phase : std::string(name_of(e.kind));
    const std::string label = label_of(plan, e);
    text += formatted(
        "%s{\"ph\":\"X\",\"pid\":%d,\"tid\":%zu,\"ts\":%.3f,\"dur\":%.3f,\"cat\":\"%s\",\"name\":",
        separator, e.rank, static_cast<std::size_t>(e.lane), e.start * 1e6, (e.end - e.start) * 1e6,
        phase.c_str());
    text += nlohmann::json(label.empty() ? what : what + " " + label).dump();
    text += formatted(",\"args\":{\"bucket\":%d,\"bytes\":%lld}}", e.bucket,
                      static_cast<long long>(e.bytes));
    separator = ",\n";
    flush_at(1 << 20);
  }
  text += "\n]}\n";
  flush_at(1);
}

}  // namespace orthrus::runtime
