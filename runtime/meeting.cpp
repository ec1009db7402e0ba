#include "runtime/meeting.hpp"

#include <algorithm>
#include <map>

#include "comm/cost.hpp"
#include "kernels/gram.hpp"
#include "optim/block_cyclic_msign.hpp"
#include "optim/block_cyclic_root.hpp"
#include "runtime/arena.hpp"
#include "runtime/plan_steps.hpp"
#include "runtime/rounding.hpp"
#include "runtime/schedule.hpp"

namespace orthrus::runtime {
namespace {

using optim::Mode;

const MatrixPlan& matrix_of(const Plan& plan, int m) {
  return plan.matrices[static_cast<std::size_t>(m)];
}

/// Numbers that travel with a Q: a factor per line, where the rule scales lines.
Index line_factors(const Plan& plan, const MatrixPlan& m) {
  return plan.group(m.parameter).matrix_rule().line_count(m.rows, m.cols);
}

Index triangle(const MatrixPlan& m) { return kernels::packed_size(m.gram_side()); }

/// Triangles that come back for each that leaves: Q, and with ECO what undoes it.
Index triangles_back(const Plan& plan, const Bucket& b) {
  return b.mode == Mode::gram && plan.group(b.parameters.front()).feeds_back() ? 2 : 1;
}

/// Of the direction of a whole matrix, on whoever makes it.
std::size_t undo_of(const Plan& plan, const Bucket& b, const MatrixPlan& m) {
  const Group& g = plan.group(m.parameter);
  const bool whole = b.mode == Mode::exchange || b.mode == Mode::gather || b.mode == Mode::periodic;
  if (!whole || !g.feeds_back()) return 0;
  return Arena::rounded(optim::undo_bytes(g.matrix_rule(), *g.lmo, m.rows, m.cols));
}

}  // namespace

bool sums_grams_in_f64(const Group& group, Mode mode) {
  return mode == Mode::gram && group.direction().sums_in_f64(*group.lmo);
}

namespace {

/// 4 MiB of f32: large enough for products at full speed, small beside any matrix that matters.
constexpr Index panel_of = Index{1} << 20;

}  // namespace

Index lines_panel_elements(const Plan& plan, const MatrixPlan& m, const Segment& s) {
  const Index lines = m.gram_of_rows ? s.region.cols : s.region.rows;
  const Index unit = m.gram_of_rows ? column_unit(plan.group(m.parameter)) : 1;
  const Index most = std::max<Index>(64, panel_of / m.line_length());
  return std::min(lines, (most + unit - 1) / unit * unit) * m.line_length();
}

Index opened_at_a_time(const Plan& plan) {
  // On processors so few that what is done to them, one thing after the other, finds them in cache.
  return plan.on_host ? Index{1} << 15 : panel_of;
}

Index rows_panel_elements(const Plan& plan, const Segment& s) {
  return std::min(s.size(), std::max(s.region.cols, opened_at_a_time(plan)));
}

Index opened_elements(const Plan& plan, const Bucket& b, const Segment& s) {
  if (!plan.group(s.parameter).compresses()) return 0;
  return s.matrix < 0 ? panel_elements(plan, b, s) : rows_panel_elements(plan, s);
}

Index panel_elements(const Plan& plan, const Bucket& b, const Segment& s) {
  if (s.matrix >= 0 && is_panelled(b.mode)) {
    return lines_panel_elements(plan, matrix_of(plan, s.matrix), s);
  }
  const Group& g = plan.group(s.parameter);
  if (s.matrix < 0 && g.compresses() && !g.keeps_rows()) {
    return std::min(s.size(), opened_at_a_time(plan));
  }
  if (g.keeps_rows()) {
    const bool shared = b.weights.quantized() && b.weights.grid->extent == Grid::Extent::tensor;
    return shared && !b.rounds_together ? s.size() : rows_panel_elements(plan, s);
  }
  return std::min(s.size(), panel_of);
}

bool keeps_lines_here(const Plan& plan, const Bucket& b, const Segment& s) {
  const MatrixPlan& m = matrix_of(plan, s.matrix);
  // Of several pieces on one rank, the first.
  if (b.held && s.size() > 0 && pieces(plan, m, s.rank).front() != s.region) return false;
  if (b.mode == Mode::owner || b.mode == Mode::gather || b.mode == Mode::block_cyclic) return true;
  return b.held ? m.owner % plan.shard == s.rank : m.owner == s.rank;
}

comm::Run state_run(const Plan& plan, const MatrixPlan& m, const optim::StateSpec& state,
                    int shard) {
  const Index all = state.rows(m.rows, m.cols) * state.cols(m.rows, m.cols);
  return is_dealt(m, state) ? comm::even_run(all, plan.shard, shard) : comm::Run{0, all};
}

std::vector<Region> pieces_of_z(const Plan& plan, const MatrixPlan& m) {
  const Index width = m.z_cols(m.cols);
  std::vector<Region> all;
  for (int s = 0; s < plan.shard; ++s) {
    const auto found = pieces(plan, m, s);
    if (found.empty()) {
      all.push_back({0, 0, 0, 0});
      continue;
    }
    const auto flat = [&](Index element) {
      const Index from = element - m.region.first;
      return m.z_rows(from / m.region.distance) * width + m.z_cols(from % m.region.distance);
    };
    const Region& first = found.front();
    if (found.size() == 1) {
      all.push_back({flat(first.first), m.z_rows(first.rows), m.z_cols(first.cols), width});
      continue;
    }
    Index size = 0;  // parts of rows and whole rows, one after the other
    for (const Region& r : found) size += r.size();
    all.push_back({flat(first.first), 1, size, size});
  }
  return all;
}

namespace {

/// What the ranks of one replica send while matrix m is on the grid.
void add_grid_traffic(const Plan& plan, const MatrixPlan& m, int first_rank,
                      std::vector<MeetingSize>& sizes) {
  const Group& g = plan.group(m.parameter);
  const auto iterations = g.lmo->iterations();
  const auto all = pieces_of_z(plan, m);
  const Index rows = m.z_rows(m.rows);
  const Index cols = m.z_cols(m.cols);
  for (int s = 0; s < plan.shard; ++s) {
    const auto rank = static_cast<std::size_t>(first_rank) + static_cast<std::size_t>(s);
    Traffic& sent = sizes[rank].grid;
    if (g.direction().has_grid_root()) {
      sent += optim::BlockCyclicRoot(rows, cols, all, s).traffic(plan.max_chunk);
    } else if (rows * cols <= plan.max_chunk) {
      sent +=
          optim::block_cyclic_msign_traffic(rows, cols, plan.shard, s, iterations, plan.max_chunk) +
          comm::Redistribution::traffic_of(rows, cols, all[static_cast<std::size_t>(s)], plan.shard,
                                           s);
    } else {
      sent += optim::BlockCyclicMsign(rows, cols, all, s).traffic(iterations, plan.max_chunk);
    }
  }
}

}  // namespace

std::vector<MeetingSize> meeting_sizes(const Plan& plan, const Bucket& b) {
  std::vector<MeetingSize> sizes(static_cast<std::size_t>(plan.ranks));
  const int replicas = plan.ranks / plan.shard;
  std::vector<MeetingSize> replica(static_cast<std::size_t>(replicas));  // what all its ranks share
  for (const int index : b.matrices) {
    const MatrixPlan& m = matrix_of(plan, index);
    const Index tri = uses_gram(b.mode) ? triangle(m) : 0;
    Index back = triangles_back(plan, b) * tri + (b.mode == Mode::gram ? line_factors(plan, m) : 0);
    const std::size_t undo = undo_of(plan, b, m);
    if (b.shared_terms > 0) back = tri * b.shared_terms;
    for (int k = 0; k < replicas; ++k) {
      if (!b.held && m.owner / plan.shard != k) continue;
      MeetingSize& all = replica[static_cast<std::size_t>(k)];
      ++all.matrices;
      const int rank = k * plan.shard + m.owner % plan.shard;
      MeetingSize& owner = sizes[static_cast<std::size_t>(rank)];
      if (b.mode == Mode::block_cyclic) {
        add_grid_traffic(plan, m, k * plan.shard, sizes);
      } else if (b.mode == Mode::gather) {
        all.theirs += m.rows * m.cols;
        all.undo += undo;
      } else if (uses_gram(b.mode)) {
        all.mine += tri;
        all.back += back;
        owner.theirs += tri;
        for (int s = 0; s < plan.shard && b.shared_terms > 0; ++s) {
          const int other = k * plan.shard + s;
          sizes[static_cast<std::size_t>(other)].own_back =
              tri * terms_of(b.shared_terms, plan.shard, s);
        }
        if (b.shared_terms == 0) owner.own_back += back;
      } else {
        owner.theirs += m.rows * m.cols;
        owner.undo += undo;
      }
    }
  }
  for (const Segment& s : b.segments) {
    const MatrixPlan& m = matrix_of(plan, s.matrix);
    for (int w = s.rank; w < plan.ranks; w += plan.shard) {
      MeetingSize& size = sizes[static_cast<std::size_t>(w)];
      if (!uses_gram(b.mode)) {
        size.mine += s.size();
        if (m.owner % plan.shard == w % plan.shard) size.own += s.size();
      }
      size.pieces += s.size();
      size.largest_piece = std::max(size.largest_piece, s.size());
      if (!b.held) break;
    }
  }
  for (int w = 0; w < plan.ranks; ++w) {
    MeetingSize& size = sizes[static_cast<std::size_t>(w)];
    const MeetingSize& all = replica[static_cast<std::size_t>(w / plan.shard)];
    size.matrices = all.matrices;
    if (b.mode == Mode::gather) {
      size.theirs = all.theirs;
      size.undo = all.undo;
    }
    if (uses_gram(b.mode)) {
      size.mine = all.mine;
      size.back = all.back;
    }
    if (b.mode == Mode::gram_steps) size.theirs = 0;
  }
  return sizes;
}

Meeting make_meeting(const Plan& plan, const Bucket& b, int world_rank) {
  Meeting meeting;
  const auto shard = static_cast<std::size_t>(plan.shard);
  const int me = world_rank % plan.shard;
  for (const int index : b.matrices) {
    const MatrixPlan& m = matrix_of(plan, index);
    if (plan.meets_in(b, m, world_rank)) {
      meeting.matrices.push_back({index, m.owner % plan.shard == me, 0, 0});
    }
  }
  std::stable_sort(meeting.matrices.begin(), meeting.matrices.end(),
                   [&](const auto& x, const auto& y) {
                     return matrix_of(plan, x.matrix).owner % plan.shard <
                            matrix_of(plan, y.matrix).owner % plan.shard;
                   });
  meeting.counts.assign(shard, 0);
  meeting.theirs.assign(shard, 0);
  meeting.back.assign(shard, 0);
  if (uses_gram(b.mode)) {
    Index at = 0;
    for (Meeting::Matrix& entry : meeting.matrices) {
      const MatrixPlan& m = matrix_of(plan, entry.matrix);
      const auto owner = static_cast<std::size_t>(m.owner % plan.shard);
      entry.triangle = at;
      at += triangle(m);
      meeting.counts[owner] += triangle(m);
      meeting.back[owner] += triangles_back(plan, b) * triangle(m) +
                             (b.mode == Mode::gram ? line_factors(plan, m) : 0);
    }
    // Of every owner its Q's, in the places of its triangles, then their roots, then the factors of
    // their lines.
    std::vector<Index> triangles(shard + 1, 0);
    std::vector<Index> runs(shard + 1, 0);
    for (std::size_t r = 0; r < shard; ++r) {
      triangles[r + 1] = triangles[r] + meeting.counts[r];
      runs[r + 1] = runs[r] + meeting.back[r];
    }
    std::vector<Index> factors(shard);
    for (std::size_t r = 0; r < shard; ++r) {
      factors[r] = runs[r] + triangles_back(plan, b) * meeting.counts[r];
    }
    for (Meeting::Matrix& entry : meeting.matrices) {
      const MatrixPlan& m = matrix_of(plan, entry.matrix);
      const auto owner = static_cast<std::size_t>(m.owner % plan.shard);
      entry.back = runs[owner] + entry.triangle - triangles[owner];
      entry.root = entry.back + meeting.counts[owner];
      entry.factors = factors[owner];
      factors[owner] += line_factors(plan, m);
    }
    meeting.back_size = runs[shard];
    if (b.shared_terms > 0) {  // in place of the one Q
      for (std::size_t r = 0; r < shard; ++r) {
        meeting.back[r] = at * terms_of(b.shared_terms, plan.shard, static_cast<int>(r));
      }
      meeting.back_size = at * b.shared_terms;
    }
    meeting.mine_size = at;
    meeting.theirs_size = meeting.counts[static_cast<std::size_t>(me)];
    Index place = 0;  // gram_steps keeps its pieces among `theirs`
    for (const Segment& s : b.segments) {
      if (!plan.has(b, s, world_rank)) continue;
      meeting.departures.push_back(place);
      place += s.size();
    }
    return meeting;
  }
  // Pieces of one matrix, by rank of the shard group.
  std::map<int, std::vector<std::pair<int, const Segment*>>> pieces_of;
  for (const Segment& s : b.segments) {
    if (plan.meets_in(b, matrix_of(plan, s.matrix), world_rank)) {
      pieces_of[s.matrix].emplace_back(s.rank % plan.shard, &s);
    }
  }
  std::map<const Segment*, Index> departs;
  for (Meeting::Matrix& entry : meeting.matrices) {
    auto& list = pieces_of[entry.matrix];
    std::stable_sort(list.begin(), list.end(),
                     [](const auto& x, const auto& y) { return x.first < y.first; });
    const int owner = matrix_of(plan, entry.matrix).owner % plan.shard;
    const bool arrives = b.mode == Mode::gather || entry.mine;
    for (const auto& [rank, s] : list) {
      if (rank == me) {
        departs[s] = meeting.mine_size;
        meeting.mine_size += s->size();
        if (b.mode != Mode::gather) meeting.counts[static_cast<std::size_t>(owner)] += s->size();
      }
      if (arrives) meeting.theirs[static_cast<std::size_t>(rank)] += s->size();
    }
  }
  if (b.mode == Mode::gather) meeting.counts = meeting.theirs;
  const auto brought = [&b](std::vector<Index> counts) {
    for (Index& n : counts) n *= b.brings;
    return counts;
  };
  meeting.counts_brought = brought(meeting.counts);
  meeting.theirs_brought = brought(meeting.theirs);
  for (const Index n : meeting.theirs) meeting.theirs_size += n;
  for (const Segment& s : b.segments) {
    if (plan.has(b, s, world_rank)) meeting.departures.push_back(departs[&s]);
  }
  // What arrives lies rank after rank, and in the order of matrices within a rank's run.
  std::vector<Index> at(shard, 0);
  for (std::size_t r = 1; r < shard; ++r) at[r] = at[r - 1] + meeting.theirs[r - 1];
  std::size_t undo = 0;
  for (Meeting::Matrix& entry : meeting.matrices) {
    if (b.mode != Mode::gather && !entry.mine) continue;
    entry.undo = undo;
    undo += undo_of(plan, b, matrix_of(plan, entry.matrix));
    entry.first = meeting.arrivals.size();
    for (const auto& [rank, s] : pieces_of[entry.matrix]) {
      meeting.arrivals.push_back({s->region, at[static_cast<std::size_t>(rank)]});
      at[static_cast<std::size_t>(rank)] += s->size();
    }
    entry.last = meeting.arrivals.size();
  }
  return meeting;
}

Traffic meeting_traffic(const Plan& plan, const Bucket& b, int w, const MeetingSize& size,
                        int brought) {
  const std::size_t wire = bytes_of(b.wire);
  const int me = w % plan.shard;
  switch (b.mode) {
    case Mode::exchange:
    case Mode::periodic: {
      if (std::max(size.mine, size.theirs) * brought <= plan.max_chunk) {
        return {
            ((size.mine - size.own) * brought + size.theirs - size.own) * static_cast<Index>(wire),
            2};
      }
      const Meeting m = make_meeting(plan, b, w);
      return cost::all_to_all(brought > 1 ? m.counts_brought : m.counts, me, wire, plan.max_chunk) +
             cost::all_to_all(m.theirs, me, wire, plan.max_chunk);
    }
    case Mode::gather:
      return cost::all_but_own(size.theirs * brought, size.mine * brought, wire, plan.max_chunk);
    case Mode::gram:
      return (b.lone ? cost::all_reduce(size.mine, plan.shard, me, 4, plan.max_chunk)
                     : cost::all_but_own(size.mine, size.theirs, 4, plan.max_chunk)) +
             (computed_by_owners(b) ? cost::all_but_own(size.back, size.own_back, 4, plan.max_chunk)
                                    : Traffic{});
    case Mode::gram_steps: {
      Traffic t;
      const auto& lmo = *plan.group(matrix_of(plan, b.matrices.front()).parameter).lmo;
      for (std::size_t i = 0; i < lmo.iterations().size(); ++i) {
        t += cost::all_reduce(size.mine, plan.shard, me, 4, plan.max_chunk);
      }
      return t;
    }
    case Mode::block_cyclic:
      return size.grid;
    default:
      return {};
  }
}

std::size_t mine_bytes(const Bucket& b, const MeetingSize& size) {
  if (b.shared_terms > 0) return static_cast<std::size_t>(size.back) * 4;
  if (uses_gram(b.mode)) return static_cast<std::size_t>(size.mine) * 4;
  return static_cast<std::size_t>(size.mine * b.brings) * bytes_of(b.wire);
}

std::size_t theirs_bytes(const Bucket& b, const MeetingSize& size) {
  if (b.mode == Mode::gram) return b.lone ? 0 : static_cast<std::size_t>(size.own_back) * 4;
  if (b.mode == Mode::gram_steps) return static_cast<std::size_t>(size.pieces * b.brings) * 4;
  const bool makes_beside = b.brings > 1 && b.mode != Mode::gather;
  return static_cast<std::size_t>(size.theirs * (b.brings + (makes_beside ? 1 : 0))) *
         bytes_of(b.wire);
}

std::size_t back_bytes(const Bucket& b, const MeetingSize& size) {
  if (b.mode == Mode::gram) return b.lone ? 0 : static_cast<std::size_t>(size.back) * 4;
  return static_cast<std::size_t>(size.mine) * bytes_of(b.wire);
}

std::size_t meeting_scratch_bytes(const Plan& plan, const MatrixPlan& m) {
  const Group& g = plan.group(m.parameter);
  const optim::MatrixRule& rule = g.matrix_rule();
  const auto side = static_cast<std::size_t>(m.gram_side());
  const std::size_t square = Arena::rounded(side * side * 4);
  switch (m.mode) {
    case Mode::gram: {
      const std::size_t lines = Arena::rounded(
          static_cast<std::size_t>(rule.line_count(m.rows, m.cols)) * sizeof(double));
      // Shared terms are packed as they are made: no Q beside R.
      return (m.shared_terms > 0 ? 1 : 2) * square + lines +
             g.direction().gram_workspace_bytes(*g.lmo, m.gram_side(), g.feeds_back());
    }
    case Mode::gram_steps:
      return 3 * square;
    case Mode::block_cyclic: {
      std::size_t most = 0;
      const auto all = pieces_of_z(plan, m);
      for (int s = 0; s < plan.shard; ++s) {
        if (g.direction().has_grid_root()) {
          const optim::BlockCyclicRoot root(m.rows, m.cols, all, s);
          most = std::max(most, root.workspace_bytes());
          continue;
        }
        most = std::max(most, optim::block_cyclic_msign_workspace_bytes(
                                  m.z_rows(m.rows), m.z_cols(m.cols),
                                  all[static_cast<std::size_t>(s)].size(), plan.shard, s));
      }
      return most;
    }
    default: {
      const std::size_t whole = Arena::rounded(static_cast<std::size_t>(m.rows * m.cols) * 4);
      const std::size_t brought = g.direction().asks_for_gradient() ? 2 * whole : whole;
      const std::size_t lmo = optim::whole_matrix_workspace_bytes(rule, *g.lmo, m.rows, m.cols);
      if (!g.feeds_back() || !optim::is_sharded(m.mode)) return brought + lmo;
      // E and C of it, when the direction has gone.
      return std::max(brought + lmo,
                      2 * whole + optim::undo_workspace_bytes(rule, *g.lmo, m.rows, m.cols));
    }
  }
}

std::size_t piece_scratch_bytes(const Plan& plan, const Bucket& b, const Segment& s) {
  const MatrixPlan& m = matrix_of(plan, s.matrix);
  const auto panel = Arena::rounded(static_cast<std::size_t>(panel_elements(plan, b, s)) * 4);
  // ECO where roots are summed over pieces: a square, and panels of Z and of a momentum.
  const auto lines_panel =
      Arena::rounded(static_cast<std::size_t>(lines_panel_elements(plan, m, s)) * 4);
  const bool sums_roots = plan.group(s.parameter).feeds_back() &&
                          (b.mode == Mode::gram_steps || b.mode == Mode::block_cyclic);
  const std::size_t roots =
      sums_roots ? Arena::rounded(static_cast<std::size_t>(m.gram_side() * m.gram_side()) * 4) +
                       (1 + static_cast<std::size_t>(b.brings)) * lines_panel
                 : 0;
  if (!uses_gram(b.mode)) {
    const auto copies = static_cast<std::size_t>(b.wire == DType::f32 ? 0 : b.brings);
    return std::max(roots, copies * Arena::rounded(static_cast<std::size_t>(s.size()) * 4));
  }
  const auto side = static_cast<std::size_t>(m.gram_side());
  const std::size_t square = Arena::rounded(side * side * 4);
  if (b.mode == Mode::gram_steps) return std::max(square, roots);
  const std::size_t sums = sums_grams_in_f64(plan.group(m.parameter), b.mode)
                               ? kernels::gram_accumulate_workspace_bytes(m.gram_side())
                               : 0;
  const std::size_t lines = Arena::rounded(static_cast<std::size_t>(line_factors(plan, m)) * 8);
  const std::size_t stacked = m.stack == optim::Stack::x ? panel : 2 * panel;
  return square + stacked + std::max(sums, lines + panel);
}

}  // namespace orthrus::runtime
