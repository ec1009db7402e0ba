// What a plan costs: bytes, messages, memory and seconds of every rank, exactly as they will be
// counted (but for the seconds).
#include <algorithm>
#include <numeric>

#include "comm/cost.hpp"
#include "runtime/arena.hpp"
#include "runtime/meeting.hpp"
#include "runtime/plan_steps.hpp"
#include "runtime/probing.hpp"
#include "runtime/region.hpp"
#include "runtime/rounding.hpp"
#include "runtime/schedule.hpp"
#include "runtime/working_set.hpp"

namespace orthrus::runtime {
namespace {

/// What the buffers of a bucket take, where they are cut from an arena.
std::int64_t room(Index elements, std::size_t bytes) {
  return static_cast<std::int64_t>(Arena::rounded(static_cast<std::size_t>(elements) * bytes));
}
void at_least(std::size_t& size, std::int64_t bytes) {
  size = std::max(size, static_cast<std::size_t>(bytes));
}

RankPlan::Periodic& periodic_of(RankPlan& r, std::int64_t period) {
  for (RankPlan::Periodic& p : r.periodic) {
    if (p.period == period) return p;
  }
  return r.periodic.emplace_back(RankPlan::Periodic{period, {}, 0});
}

/// ECO: what a segment needs beside, to find its correction.
std::int64_t feedback_bytes(const Group& g, const Segment& s, Index panel) {
  if (s.matrix < 0) {  // the correction of a panel, and two numbers per row
    return room(panel, 4) + 2 * room(s.region.rows, 8);
  }
  const Index rows = s.region.rows;
  const Index cols = s.region.cols;
  return static_cast<std::int64_t>(
             optim::undo_bytes(g.matrix_rule(), *g.lmo, rows, cols) +
             Arena::rounded(optim::undo_workspace_bytes(g.matrix_rule(), *g.lmo, rows, cols))) +
         room(s.size(), 4);
}

/// State, scratch and flops of one segment on the rank that has it.
void add_segment(const Plan& plan, const Bucket& b, const Segment& s, const MachineProfile& profile,
                 RankPlan& r) {
  const Group& g = plan.group(s.parameter);
  const Index size = s.size();
  const Index panel = panel_elements(plan, b, s);
  const bool rests = rests_in_place(plan, b, s);
  if ((!g.master && !(rests && b.weights.dtype == DType::f32)) || b.weights.quantized()) {
    at_least(r.work.widened, room(panel, 4));
    // They are rounded, and leave, by rows.
    if (b.rounds_together) at_least(r.work.widened, room(rows_panel_elements(plan, s), 4));
  }
  at_least(r.work.narrowed, static_cast<std::int64_t>(Arena::rounded(narrowed_bytes(plan, b, s))));
  std::int64_t scratch = static_cast<std::int64_t>(g.rule->workspace_bytes(1, panel));
  Index rows = s.region.rows;
  Index cols = s.region.cols;
  // Where pieces meet, what is needed meets, too.
  if (g.feeds_back() && (s.matrix < 0 || b.stays_apart())) scratch += feedback_bytes(g, s, panel);
  if (s.matrix >= 0) {
    const MatrixPlan& m = plan.matrices[static_cast<std::size_t>(s.matrix)];
    rows = m.rows;
    cols = m.cols;
    const optim::MatrixRule& rule = g.matrix_rule();
    if (b.stays_apart()) {  // the piece itself may be orthogonalized
      const std::size_t whole =
          optim::whole_matrix_workspace_bytes(rule, *g.lmo, s.region.rows, s.region.cols);
      scratch = std::max(scratch, static_cast<std::int64_t>(whole));
      if (rule.direction().asks_for_gradient()) scratch += room(size, 4);
    }
    if (b.mode == optim::Mode::owner) {
      r.flops += m.flops;
      r.matrices += g.orthogonalizes() ? 1 : 0;
      r.seconds += m.seconds;
    }
    if (b.mode == optim::Mode::block_local && size > 0) {
      r.flops += g.direction().flops(*g.lmo, s.region.rows, s.region.cols);
      r.matrices += g.orthogonalizes() ? 1 : 0;
      r.seconds += lmo_seconds(profile, g, s.region.rows, s.region.cols) +
                   feedback_seconds(profile, g, s.region.rows, s.region.cols) +
                   pass_seconds(profile, pass_bytes(g) * static_cast<double>(size));
    }
  } else {
    r.flops += 12.0 * static_cast<double>(size);
    r.seconds += pass_seconds(profile, pass_bytes(g) * static_cast<double>(size));
  }
  // Gradients of held parameters are the trainer's: they are worked on in a copy.
  if (b.held && b.stays_apart()) scratch += room(s.matrix < 0 ? panel : size, 4);
  if (!b.matrices.empty() && size > 0) {
    scratch = std::max(scratch, static_cast<std::int64_t>(piece_scratch_bytes(plan, b, s)));
  }
  at_least(r.work.rule, scratch + room(opened_elements(plan, b, s), 4));
  const auto state = g.rule->state();
  for (std::size_t k = 0; k < state.size(); ++k) {
    if (!state[k].of_matrix()) {
      const std::size_t bytes = g.state_bytes(k, s.region.rows, s.region.cols);
      r.memory.state += static_cast<std::int64_t>(Arena::rounded(bytes));
    } else if (s.matrix < 0 || keeps_lines_here(plan, b, s)) {
      const std::size_t bytes =
          s.matrix < 0 ? g.state_bytes(k, rows, cols)
                       : 4 * static_cast<std::size_t>(
                                 state_run(plan, plan.matrices[static_cast<std::size_t>(s.matrix)],
                                           state[k], s.rank % plan.shard)
                                     .count);
      r.memory.state += static_cast<std::int64_t>(Arena::rounded(bytes));
    }
  }
  if (g.master) r.memory.state += room(size, 4);
  if (g.residual == Residual::mantissa) r.memory.state += room(size, 2);
  // Where weights rest as codes, their scales do with them.
  if (b.weights.quantized() && !rests_as_codes(plan, s)) {
    r.memory.state += room(b.weights.scale_count(s.region.rows, s.region.cols), 4);
  }
}

/// Calls f(rank, elements) for every rank that has something of `bucket` after `levels` levels of a
/// reduction. @param what  or what else of its parts
template <class F>
void for_each_share(const Plan& plan, const Bucket& bucket, std::size_t levels, F&& f,
                    Index Bucket::Part::*what = &Bucket::Part::size) {
  int stride = 1;  // slots that share it
  for (std::size_t i = levels; i < plan.levels.size(); ++i) stride *= plan.levels[i];
  for (std::size_t p = 0; p < bucket.parts.size();) {
    const int group = bucket.parts[p].slot / stride;
    Index size = 0;
    for (; p < bucket.parts.size() && bucket.parts[p].slot / stride == group; ++p) {
      size += bucket.parts[p].*what;
    }
    for (int slot = group * stride; slot < (group + 1) * stride; ++slot) {
      f(plan.rank_of(slot), size);
    }
  }
}

/// What the slots that share `slot`'s coordinates below `level`, of `count` levels, have between
/// them: `offset(slot)` is where a slot's begins.
template <class Offset>
Index share_of(const Plan& plan, int slot, std::size_t level, std::size_t count, Offset&& offset) {
  int stride = 1;
  for (std::size_t i = level; i < count; ++i) stride *= plan.levels[i];
  const int base = slot / stride * stride;
  return offset(base + stride) - offset(base);
}

/// What a rank sends over the levels from `first` on, of `count`: a reduction, or the way back.
template <class Offset>
Traffic levels_traffic(const Plan& plan, int slot, std::size_t first, std::size_t count,
                       std::size_t bytes, Offset&& offset) {
  Traffic t;
  for (std::size_t level = first; level < count; ++level) {
    t += cost::all_but_own(share_of(plan, slot, level, count, offset),
                           share_of(plan, slot, level + 1, count, offset), bytes, plan.max_chunk);
  }
  return t;
}

/// One reduction of bucket b over its levels from `first` on.
Traffic level_traffic(const Plan& plan, const Bucket& b, int w, std::size_t bytes,
                      std::size_t first) {
  return levels_traffic(plan, plan.slot_of(w), first, plan.levels.size(), bytes,
                        [&](int slot) { return b.offset_of(slot); });
}

/// Reproducible gradients of bucket b on their way to world rank w.
void add_tree_reduction(const Plan& plan, const Bucket& b, int w, RankPlan& r) {
  const Index roots = plan.roots_of(w);
  r.memory.gradients += plan.depth_of(w) * room(b.size, 4);
  std::vector<Index> to(static_cast<std::size_t>(plan.ranks));
  for (int d = 0; d < plan.ranks; ++d) {
    to[static_cast<std::size_t>(d)] = roots * b.count_of(plan.slot_of(d));
  }
  r.traffic += cost::all_to_all(to, w, 4, plan.max_chunk);
  // One root leaves from where it was summed, if its parts lie in the order of ranks.
  if (roots > 1 || plan.levels.size() > 1) at_least(r.work.gradient_send, room(roots * b.size, 4));
  at_least(r.work.gradient_receive, room(plan.all_roots * b.count_of(plan.slot_of(w)), 4));
}

/// Gradients of one bucket on their way: bytes, messages, buffers, for all ranks.
void add_reductions(const Plan& plan, const Bucket& b, std::vector<RankPlan>& ranks) {
  const bool tree = plan.virtual_shards > 0;
  const std::int64_t sums = tree ? 0 : plan.reductions();
  const std::size_t wire = bytes_of(plan.gradient_wire);
  // In one message each, which nearly always holds, only one's own part differs from rank to rank.
  const bool uncut = b.size <= plan.max_chunk;
  for (int w = 0; w < plan.ranks; ++w) {
    RankPlan& r = ranks[static_cast<std::size_t>(w)];
    if (tree) add_tree_reduction(plan, b, w, r);
    for (std::int64_t k = 0; k < sums; ++k) {
      if (uncut) {
        r.traffic += {b.size * static_cast<Index>(wire), std::ssize(plan.levels)};
      } else {
        r.traffic += level_traffic(plan, b, w, wire, 0);
      }
    }
    if (tree) continue;
    at_least(r.work.gradient_send, room(b.size, wire));
    if (plan.accumulates_locally()) r.memory.gradients += room(b.size, 4);
  }
  if (tree) return;
  if (uncut) {
    for_each_share(plan, b, plan.levels.size(), [&](int w, Index mine) {
      ranks[static_cast<std::size_t>(w)].traffic.bytes -= sums * mine * static_cast<Index>(wire);
    });
  }
  std::vector<std::int64_t> receive(ranks.size(), 0);
  for (std::size_t level = 1; level <= plan.levels.size(); ++level) {
    for_each_share(plan, b, level, [&](int w, Index part) {
      receive[static_cast<std::size_t>(w)] += room(part, wire);
    });
  }
  for (std::size_t w = 0; w < ranks.size(); ++w) {
    at_least(ranks[w].work.gradient_receive, receive[w]);
  }
}

/// New weights of one bucket on their way back: to all ranks, or (ZeRO-3) to the replicas only.
void add_weights(const Plan& plan, const Bucket& b, std::vector<RankPlan>& ranks) {
  const std::size_t unit = bytes_of(b.weights.unit());
  const std::size_t first = plan.weights_sharded() ? plan.shard_levels() : 0;
  const bool uncut = b.units <= plan.max_chunk;
  const auto levels = std::ssize(plan.levels) - static_cast<std::int64_t>(first);
  for (int w = 0; w < plan.ranks; ++w) {
    RankPlan& r = ranks[static_cast<std::size_t>(w)];
    if (!plan.weights_sharded()) at_least(r.work.weight_gather, room(b.units, unit));
    if (!uncut) {
      r.traffic += levels_traffic(plan, plan.slot_of(w), first, plan.levels.size(), unit,
                                  [&](int slot) { return b.place_of(slot); });
    } else if (first == 0) {
      r.traffic += {b.units * static_cast<Index>(unit), levels};
    } else {
      r.traffic.messages += levels;
    }
  }
  for_each_share(plan, b, plan.levels.size(), [&](int w, Index mine) {
    ranks[static_cast<std::size_t>(w)].memory.gradients += room(mine, 4);
  });
  if (uncut) {
    for_each_share(
        plan, b, plan.levels.size(),
        [&](int w, Index mine) {
          ranks[static_cast<std::size_t>(w)].traffic.bytes -= mine * static_cast<Index>(unit);
        },
        &Bucket::Part::units);
  }
  if (!plan.weights_sharded()) return;
  for_each_share(
      plan, b, first,
      [&](int w, Index shard) {
        RankPlan& r = ranks[static_cast<std::size_t>(w)];
        r.memory.weights += room(shard, unit);
        if (uncut && first > 0) r.traffic.bytes += shard * static_cast<Index>(unit);
      },
      &Bucket::Part::units);
}

/// ZeRO-3: whole weights, `gathers` times a step, all in one call.
void add_gathers(const Plan& plan, std::vector<RankPlan>& ranks) {
  std::size_t largest = 0;
  std::size_t all = 0;
  std::int64_t whole = 0;
  const auto at_rest = [&](std::size_t i) { return plan.at_rest[i]; };
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const ParameterShape& p = plan.parameters[i];
    if (p.held()) continue;
    largest = std::max(largest, at_rest(i));
    all += at_rest(i);
    whole += static_cast<std::int64_t>(plan.gathered_bytes(i));
  }
  const std::size_t staging =
      Arena::rounded(std::max(largest, std::min(all, static_cast<std::size_t>(plan.bucket_bytes))));
  // Messages: as many parameters as a staging buffer holds, in their order.
  std::vector<std::vector<std::size_t>> flights(1);
  std::size_t filled = 0;
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    if (plan.parameters[i].held()) continue;
    if (!flights.back().empty() && filled + at_rest(i) > staging) {
      flights.emplace_back();
      filled = 0;
    }
    flights.back().push_back(i);
    filled += at_rest(i);
  }
  const auto levels = static_cast<std::int64_t>(plan.shard_levels());
  const bool uncut = static_cast<Index>(staging) <= plan.max_chunk;
  for (RankPlan& r : ranks) {
    r.work.gathered = staging;
    r.memory.weights += plan.working_set > 0 ? std::min(plan.working_set, whole) : whole;
    if (uncut && levels > 0) {
      r.gathers += {plan.gathers * static_cast<std::int64_t>(all),
                    plan.gathers * levels * std::ssize(flights)};
    }
  }
  if (levels == 0) return;
  if (uncut) {
    for (const Bucket& b : plan.buckets) {
      for_each_share(
          plan, b, plan.shard_levels(),
          [&](int w, Index shard) {
            ranks[static_cast<std::size_t>(w)].gathers.bytes -= plan.gathers * shard;
          },
          &Bucket::Part::at_rest);
    }
    return;
  }
  // What is cut into messages is counted level by level.
  const auto slots = static_cast<std::size_t>(plan.shard);
  std::vector<std::size_t> flight_of(plan.parameters.size(), 0);
  for (std::size_t f = 0; f < flights.size(); ++f) {
    for (const std::size_t i : flights[f]) flight_of[i] = f;
  }
  std::vector<std::vector<Index>> ends(flights.size(), std::vector<Index>(slots + 1, 0));
  for (const Bucket& b : plan.buckets) {
    for (const Segment& s : b.segments) {
      if (b.held) continue;
      ends[flight_of[static_cast<std::size_t>(s.parameter)]]
          [static_cast<std::size_t>(plan.slot_of(s.rank) / plan.replicate) + 1] +=
          static_cast<Index>(plan.piece_bytes(b, s));
    }
  }
  for (std::vector<Index>& e : ends) {
    std::partial_sum(e.begin(), e.end(), e.begin());
    for (int w = 0; w < plan.ranks; ++w) {
      const Traffic once =
          levels_traffic(plan, plan.slot_of(w) / plan.replicate, 0, plan.shard_levels(), 1,
                         [&](int slot) { return e[static_cast<std::size_t>(slot)]; });
      for (std::int64_t k = 0; k < plan.gathers; ++k) {
        ranks[static_cast<std::size_t>(w)].gathers += once;
      }
    }
  }
}

/// What ranks tell one another to round bucket b together.
void add_rounding(const Plan& plan, const Bucket& b, const std::vector<MeetingSize>& meetings,
                  std::vector<RankPlan>& ranks) {
  const std::vector<RoundingSize> sizes = rounding_sizes(plan, b);
  for (int w = 0; w < plan.ranks; ++w) {
    const auto i = static_cast<std::size_t>(w);
    RankPlan& r = ranks[i];
    r.traffic += rounding_traffic(plan, b, w, sizes[i], meetings[i]);
    at_least(r.work.rounding, static_cast<std::int64_t>(sizes[i].bytes()));
    if (b.mode == optim::Mode::periodic) {
      periodic_of(r, b.period).traffic +=
          rounding_traffic_of_meeting(plan, b, w, sizes[i], meetings[i]);
    }
  }
}

/// Pieces of bucket b that meet: bytes, messages, scratch and flops of all ranks.
void add_meeting(const Plan& plan, const Bucket& b, const MachineProfile& profile,
                 std::vector<RankPlan>& ranks) {
  const std::vector<MeetingSize> sizes = meeting_sizes(plan, b);
  for (int w = 0; w < plan.ranks; ++w) {
    RankPlan& r = ranks[static_cast<std::size_t>(w)];
    const MeetingSize& size = sizes[static_cast<std::size_t>(w)];
    if (size.matrices == 0) continue;  // nothing meets in this replica
    const Traffic sent = meeting_traffic(plan, b, w, size, b.brings);
    r.traffic += sent;
    if (b.mode == optim::Mode::periodic) periodic_of(r, b.period).traffic += sent;
  }
  if (b.rounds_together) add_rounding(plan, b, sizes, ranks);
  for (const int index : b.matrices) {
    const MatrixPlan& m = plan.matrices[static_cast<std::size_t>(index)];
    const Group& g = plan.group(m.parameter);
    const std::int64_t counted = g.orthogonalizes() ? 1 : 0;
    const auto scratch = static_cast<std::int64_t>(meeting_scratch_bytes(plan, m));
    for (int w = 0; w < plan.ranks; ++w) {
      if (!plan.meets_in(b, m, w)) continue;
      RankPlan& r = ranks[static_cast<std::size_t>(w)];
      const MeetingSize& size = sizes[static_cast<std::size_t>(w)];
      const bool all = b.mode == optim::Mode::gather || b.mode == optim::Mode::gram_steps ||
                       b.mode == optim::Mode::block_cyclic || b.lone;
      std::int64_t needed = all || m.owner % plan.shard == w % plan.shard ? scratch : 0;
      if (b.mode == optim::Mode::gram_steps) needed += room(size.largest_piece * b.brings, 4);
      at_least(r.work.rule, needed);
      if (!all && m.owner % plan.shard != w % plan.shard) continue;
      r.flops += m.flops * computed_share(plan, m, w);
      r.seconds += compute_seconds(plan, profile, m) * computed_share(plan, m, w);
      // What all compute together counts once; gather computes it as often as there are ranks.
      if (b.mode != optim::Mode::gather && m.owner % plan.shard != w % plan.shard) continue;
      r.matrices += counted;
      if (b.mode == optim::Mode::periodic) periodic_of(r, b.period).matrices -= counted;
    }
  }
  for (const Segment& s : b.segments) {
    if (s.size() == 0) continue;
    const MatrixPlan& m = plan.matrices[static_cast<std::size_t>(s.matrix)];
    const bool counted = plan.group(m.parameter).orthogonalizes();
    for (int w = s.rank; w < plan.ranks; w += plan.shard) {
      RankPlan& r = ranks[static_cast<std::size_t>(w)];
      r.seconds += piece_seconds(plan, profile, m, s);
      if (b.mode == optim::Mode::periodic && counted) ++periodic_of(r, b.period).matrices;
      if (!b.held) break;
    }
  }
}

/// What the buffers of meetings take on every rank, all of their lives considered.
void find_meeting_room(const Plan& plan, std::vector<RankPlan>& ranks) {
  std::vector<MeetingArena> arenas(ranks.size());
  const std::vector<MeetingSize> none(ranks.size());
  for (const Turn& turn : plan.schedule) {
    const Bucket& b = plan.buckets[static_cast<std::size_t>(turn.bucket)];
    if (b.matrices.empty()) continue;
    const std::vector<MeetingSize> sizes =
        MeetingArena::takes(turn) ? meeting_sizes(plan, b) : none;
    for (std::size_t w = 0; w < ranks.size(); ++w) arenas[w].take_turn(b, turn, sizes[w]);
  }
  for (std::size_t w = 0; w < ranks.size(); ++w) ranks[w].work.meetings = arenas[w].bytes();
}

}  // namespace

bool rests_as_codes(const Plan& plan, const Segment& s) {
  const ParameterShape& p = plan.parameters[static_cast<std::size_t>(s.parameter)];
  return plan.group(s.parameter).format.quantized() &&
         (p.as_codes || (plan.weights_sharded() && !p.held()));
}

bool rests_in_place(const Plan& plan, const Bucket& b, const Segment& s) {
  const ParameterShape& p = plan.parameters[static_cast<std::size_t>(s.parameter)];
  if (b.weights.quantized()) return false;
  return b.held || plan.weights_sharded() || (p.dtype == b.weights.dtype && is_contiguous(p));
}

std::size_t narrowed_bytes(const Plan& plan, const Bucket& b, const Segment& s) {
  const Group& g = plan.group(s.parameter);
  const auto panel = static_cast<std::size_t>(b.rounds_together ? rows_panel_elements(plan, s)
                                                                : panel_elements(plan, b, s));
  if (b.weights.quantized()) {
    // Codes are where they rest, or on their way to the trainer.
    return rests_as_codes(plan, s) ? 0 : panel;
  }
  // ECO: what the weights were rounded to, in f32 again.
  const std::size_t again = g.feeds_back() ? Arena::rounded(panel * 4) : 0;
  return again + (rests_in_place(plan, b, s) ? 0 : panel * bytes_of(b.weights.dtype));
}

Traffic RankPlan::traffic_of(std::int64_t update) const {
  Traffic t = traffic;
  for (const Periodic& p : periodic) {
    if ((update - 1) % p.period != 0) t = t - p.traffic;
  }
  return t;
}

std::int64_t RankPlan::matrices_of(std::int64_t update) const {
  std::int64_t n = matrices;
  for (const Periodic& p : periodic) {
    if ((update - 1) % p.period != 0) n += p.matrices;
  }
  return n;
}

void predict(const MachineProfile& profile, Plan& plan) {
  std::int64_t whole_weights = 0;
  std::vector<int> held;
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const ParameterShape& p = plan.parameters[i];
    if (p.held()) {
      held.push_back(static_cast<int>(i));
    } else {
      whole_weights += static_cast<std::int64_t>(plan.trainers_bytes(i));
    }
  }
  plan.per_rank.assign(static_cast<std::size_t>(plan.ranks), {});
  // A gradient is widened before it is added to what earlier micro-batches left, the owner's or
  // another's.
  std::size_t widest = 0;
  for (const Bucket& b : plan.buckets) {
    for (const Segment& s : b.segments) {
      widest = std::max(widest, static_cast<std::size_t>(room(s.size(), 4)));
      for (int w = s.rank; w < plan.ranks; w += plan.shard) {
        add_segment(plan, b, s, profile, plan.per_rank[static_cast<std::size_t>(w)]);
        if (!b.held) break;
      }
    }
  }
  for (int w = 0; w < plan.ranks; ++w) {
    RankPlan& r = plan.per_rank[static_cast<std::size_t>(w)];
    if (plan.virtual_shards > 0 || plan.micro_batches > 1) r.work.widened = widest;
    r.work.control = Arena::rounded(
        static_cast<std::size_t>(std::max(plan.control_before(), plan.control_after())) *
        sizeof(double));
    r.memory.weights = plan.weights_sharded() ? 0 : whole_weights;
    for (const int id : held) {
      const ParameterShape& p = plan.parameters[static_cast<std::size_t>(id)];
      const Index n = p.part(w % plan.shard, plan.shard).size();
      r.memory.weights += n * static_cast<Index>(bytes_of(p.dtype));
      r.memory.gradients += n * static_cast<Index>(bytes_of(p.gradient_dtype));
    }
    for (const Index n : {plan.control_before(), plan.control_after()}) {
      r.traffic += cost::all_reduce(n, plan.ranks, w, sizeof(double), plan.max_chunk);
    }
  }
  for (const Bucket& b : plan.buckets) {
    if (!b.matrices.empty()) {
      add_meeting(plan, b, profile, plan.per_rank);
    } else if (b.rounds_together) {
      add_rounding(plan, b, std::vector<MeetingSize>(plan.per_rank.size()), plan.per_rank);
    }
    if (b.held) continue;
    if (b.reduced) add_reductions(plan, b, plan.per_rank);
    add_weights(plan, b, plan.per_rank);
  }
  if (plan.weights_sharded()) add_gathers(plan, plan.per_rank);
  find_meeting_room(plan, plan.per_rank);
  add_probes(plan, plan.per_rank);
  for (RankPlan& r : plan.per_rank) {
    r.traffic += r.gathers;
    r.work.rule = Arena::rounded(r.work.rule);
    r.memory.work = r.work.total();
  }
  double most = 0;
  double sum = 0;
  double most_memory = 0;
  double sum_memory = 0;
  for (const RankPlan& r : plan.per_rank) {
    most = std::max(most, r.seconds);
    sum += r.seconds;
    // What rests. Scratch is as large as the largest matrix a rank computes, which nothing splits.
    const auto rests = static_cast<double>(r.memory.total() - r.memory.work);
    most_memory = std::max(most_memory, rests);
    sum_memory += rests;
  }
  const double mean = sum / plan.ranks;
  double largest = mean;
  for (const MatrixPlan& m : plan.matrices) largest = std::max(largest, m.seconds);
  plan.imbalance = mean > 0 ? most / mean : 1;
  plan.memory_imbalance = sum_memory > 0 ? most_memory * plan.ranks / sum_memory : 1;
  plan.load_bound = mean > 0 ? largest / mean : 1;
}

}  // namespace orthrus::runtime
