#pragma once
/// @file
/// Timeline: what each rank does when in one optimizer step, on a machine one need not have. Pure:
/// a function of the plan and the machine's profile, which walks what `step.cpp` walks.

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/machine.hpp"
#include "runtime/plan.hpp"

namespace orthrus::runtime {

/// What a step is made of, in the order of the walk.
enum class Phase : std::uint8_t {
  backward,  ///< the trainer's
  pack,      ///< copies into buckets: gradients, weights, triangles, shards (ZeRO-3)
  reduce,    ///< gradients on their way, and what arrived turned into their mean
  control,   ///< norms, and the all-reduce before anything is changed
  update,    ///< momentum and weights
  meet,      ///< pieces of matrices on their way; put together, and taken apart again
  lmo,       ///< products and copies of the LMO
  gather,    ///< weights on their way
  unpack,    ///< copies out of buckets: weights, triangles
  audit      ///< the all-reduce after everything
};
inline constexpr std::size_t phase_count = 10;
constexpr std::string_view name_of(Phase phase) noexcept {
  constexpr std::array<std::string_view, phase_count> names{"backward", "pack", "reduce", "control",
                                                            "update",   "meet", "lmo",    "gather",
                                                            "unpack",   "audit"};
  return names[static_cast<std::size_t>(phase)];
}

/// What of a rank is busy. A call across nodes uses both links, and is listed under `network`.
enum class Lane : std::uint8_t { compute, node, network };
inline constexpr std::size_t lane_count = 3;
constexpr std::string_view name_of(Lane lane) noexcept {
  constexpr std::array<std::string_view, lane_count> names{"compute", "node", "network"};
  return names[static_cast<std::size_t>(lane)];
}

struct TimelineOptions {
  double backward_s = 0;  ///< of each micro-batch; 0: all gradients are ready when the step begins
  /// Do calls advance while their ranks compute? They do where an adapter or a thread of its own
  /// moves the bytes. Where the core that computes also copies they do not: a call then takes place
  /// when all its ranks wait for it. Unless told: where the profile has more than one node.
  std::optional<bool> progress;
  bool blocking = false;  ///< `comm.blocking`: every call is waited for where it is made
  /// Ranks whose events are kept: the one that computes most, rank 0, and more at equal distances.
  int ranks_shown = 8;
};

/// Seconds of one rank in one phase.
struct PhaseTime {
  double compute = 0;
  double communication = 0;  ///< in calls that were on their way, `exposed` included
  double exposed = 0;        ///< of it: while this rank had nothing else to do
  double waiting = 0;        ///< before a call was on its way: for other ranks, or for the link
  [[nodiscard]] double hidden() const { return communication - exposed; }
};

/// Something a rank does.
struct TimelineEvent {
  int rank = 0;
  Lane lane = Lane::compute;
  Phase phase = Phase::update;
  Collective kind = Collective::send;  ///< on the links' lanes
  int bucket = -1;                     ///< -1: of the whole model
  double start = 0, end = 0;           ///< seconds since the step (or its backward) began
  std::int64_t bytes = 0;              ///< sent by this rank
  friend bool operator==(const TimelineEvent&, const TimelineEvent&) = default;
};

struct Timeline {
  double seconds = 0;     ///< until the last rank is done, `backward_s` included
  bool progress = false;  ///< as resolved
  int busiest = 0;        ///< the rank that computes longest
  std::vector<std::array<PhaseTime, phase_count>> ranks;  ///< by world rank and phase
  std::array<std::int64_t, phase_count> bytes_sent{};     ///< by all ranks
  std::vector<int> shown;                                 ///< ascending
  std::vector<TimelineEvent> events;  ///< of `shown`; by rank, then lane, then start

  /// Of one rank in all phases: compute + exposed + waiting is when it is done.
  [[nodiscard]] PhaseTime total(int rank) const;
};

/// Predicts a step in which all pieces meet (the first one, of mode `periodic`).
///
/// Ranks walk the plan's schedule as `ShardedOptimizer` does, with its buffers; while they wait
/// they compute matrices that have arrived and update what meets nobody. A call begins when all its
/// ranks have made it and its links are free, and takes `collective_seconds`; a link carries one
/// call of a rank at a time, in order. Passes over what was last touched a step ago find no cache
/// warm: they run at the profile's rate of a pass over all that a rank holds. Weights that ZeRO-3
/// gathers come first, one message after the other: when the trainer will use them is not known.
/// Replicas in which nothing of a bucket meets walk it like those in which something does: its
/// weights leave together in any case.
///
/// @param profile  of the machine: its rates count, not those that `plan` was made with.
/// @par Cost  a few passes over all ranks per bucket and level: 0.1 s for 1100 buckets on 4096
/// ranks.
Timeline make_timeline(const Plan& plan, const MachineProfile& profile,
                       const TimelineOptions& options = {});

/// The first matrix or parameter of an event's bucket; empty for the whole model's.
[[nodiscard]] std::string label_of(const Plan& plan, const TimelineEvent& event);
/// The document of `orthrus simulate --json`. @param indent  -1: one line.
[[nodiscard]] std::string timeline_json(const Plan& plan, const Timeline& timeline,
                                        int indent = -1);
/// The table of `orthrus simulate`.
[[nodiscard]] std::string timeline_table(const Plan& plan, const Timeline& timeline);
/// The events as Chrome and Perfetto read them: a process per rank, a thread per lane,
/// microseconds.
/// @param write  is given the text piece by piece.
void write_trace(const Plan& plan, const Timeline& timeline,
                 const std::function<void(const std::string&)>& write);

}  // namespace orthrus::runtime
