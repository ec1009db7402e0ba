// Where everything lies: buckets, the parts of slots in them, and the segments of parts.
#include <algorithm>
#include <map>
#include <numeric>
#include <tuple>

#include "runtime/plan_steps.hpp"
#include "runtime/rounding.hpp"
#include "runtime/schedule.hpp"

namespace orthrus::runtime {
namespace {

/// Shares of `extent` lines as even as can be: the first ranks have one more.
std::pair<Index, Index> even_share(Index extent, int rank, int ranks) {
  const Index each = extent / ranks;
  const Index more = extent % ranks;
  return {rank * each + std::min<Index>(rank, more), each + (rank < more ? 1 : 0)};
}

/// Rows [begin, end) of a matrix in ascending order become the fewest blocks of equal rows.
class BlockBuilder {
 public:
  void add(Index begin, Index end) {
    if (begin >= end) return;
    if (!blocks_.empty()) {
      Region& last = blocks_.back();
      const Index length = end - begin;
      const Index distance = begin - (last.first + (last.rows - 1) * last.distance);
      if (length == last.cols && (last.rows == 1 || distance == last.distance)) {
        last.distance = distance;
        ++last.rows;
        return;
      }
    }
    blocks_.push_back({begin, 1, end - begin, end - begin});
  }
  std::vector<Region> take() { return std::move(blocks_); }

 private:
  std::vector<Region> blocks_;
};

/// The rows of matrix region `m` that lie in `part`: whole rows of it stay rows.
std::vector<Region> intersection(const Region& m, const Region& part) {
  const Index part_end = part.first + (part.rows - 1) * part.distance + part.cols;
  if (part.rows > 1 && part.distance > part.cols) {  // columns of the parameter
    BlockBuilder blocks;
    for (Index i = 0; i < m.rows; ++i) {
      const Index begin = m.first + i * m.distance;
      const Index end = begin + m.cols;
      const Index from =
          std::clamp<Index>((begin - part.first) / part.distance - 1, 0, part.rows - 1);
      for (Index q = from; q < part.rows && part.first + q * part.distance < end; ++q) {
        const Index start = part.first + q * part.distance;
        blocks.add(std::max(begin, start), std::min(end, start + part.cols));
      }
    }
    return blocks.take();
  }
  // One run of elements: a partial row, whole rows, a partial row.
  const Index begin = part.first;
  const Index end = part_end;
  std::vector<Region> found;
  const auto row_of = [&](Index flat) {
    return flat <= m.first ? Index{0} : (flat - m.first) / m.distance;
  };
  Index first = row_of(begin);
  const auto clipped = [&](Index row) {
    const Index at = m.first + row * m.distance;
    return std::pair{std::max(begin, at), std::min(end, at + m.cols)};
  };
  const auto whole = [&](Index row) {
    const auto [a, b] = clipped(row);
    return b - a == m.cols;
  };
  while (first < m.rows) {
    const auto [a, b] = clipped(first);
    if (a >= b) {
      if (m.first + first * m.distance >= end) break;
      ++first;
      continue;
    }
    if (!whole(first)) {
      found.push_back({a, 1, b - a, b - a});
      ++first;
      continue;
    }
    Index last = std::min(m.rows - 1, row_of(end - 1));
    while (last > first && !whole(last)) --last;
    found.push_back({a, last - first + 1, m.cols, m.distance});
    first = last + 1;
  }
  return found;
}

/// Hands the element-wise units of each bucket to slots so that after every bucket each slot has
/// its share of all elements so far, to within one unit. A unit is at most so many elements of one
/// parameter as its `Whole` says; the first of a parameter counts as at least `least`, what a call
/// costs.
class ElementDealer {
 public:
  ElementDealer(std::vector<double> shares, double least)
      : share_(std::move(shares)), got_(share_.size(), 0), least_(least) {
    const double sum = std::accumulate(share_.begin(), share_.end(), 0.0);
    for (double& s : share_) s = sum > 0 ? s / sum : 1.0 / static_cast<double>(share_.size());
  }

  /// A parameter, and the elements that stay together.
  struct Whole {
    int id = 0;
    Index size = 0, unit = Plan::norm_block;
  };

  /// Cuts parameter elements [0, size) of `parameters` (in order) into runs per slot, slots
  /// ascending: f(slot, parameter, begin, size).
  template <class F>
  void deal(const std::vector<Whole>& parameters, F&& f) {
    double total = 0;
    for (const auto& [id, size, unit] : parameters) {
      const Index first = std::min(size, unit);
      total += weight(first, true) + static_cast<double>(size - first);
    }
    if (parameters.empty()) return;
    dealt_ += total;
    std::vector<double> want(share_.size());
    double sum = 0;
    for (std::size_t r = 0; r < share_.size(); ++r) {
      want[r] = std::max(0.0, share_[r] * dealt_ - got_[r]);
      sum += want[r];
    }
    double at = 0;
    std::size_t slot = 0;
    double cut = want[0] * total / sum;  // where this slot's part should end
    for (const auto& [id, size, unit] : parameters) {
      Index run = 0;
      for (Index begin = 0; begin < size; begin += unit) {
        const double n = weight(std::min(unit, size - begin), begin == 0);
        // The unit goes to the slot its middle falls on.
        if (slot + 1 < share_.size() && at + n / 2 > cut) {
          if (begin > run) f(static_cast<int>(slot), id, run, begin - run);
          run = begin;
          while (slot + 1 < share_.size() && at + n / 2 > cut) {
            ++slot;
            cut += want[slot] * total / sum;
          }
        }
        got_[slot] += n;
        at += n;
      }
      f(static_cast<int>(slot), id, run, size - run);
    }
  }

 private:
  [[nodiscard]] double weight(Index n, bool first) const {
    return first ? std::max(static_cast<double>(n), least_) : static_cast<double>(n);
  }

  std::vector<double> share_, got_;
  double least_, dealt_ = 0;
};

/// What travels together must agree in all of this; what meets, in its group too.
using Kind = std::tuple<std::string, bool, bool, optim::Mode, DType, int>;

/// Segments of a bucket, before they have offsets: by slot, then in parameter order.
class SegmentList {
 public:
  void add(int slot, const Segment& s) { found_.emplace_back(slot, s); }

  void finish(Plan& plan, Bucket& bucket) {
    std::stable_sort(found_.begin(), found_.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    for (auto& [slot, segment] : found_) {
      const Index size = segment.size();
      segment.offset = bucket.size;
      segment.place = bucket.units;
      if (!bucket.held && size > 0) {
        if (bucket.parts.empty() || bucket.parts.back().slot != slot) {
          bucket.parts.push_back({slot, bucket.size, 0, bucket.units, 0, 0});
        }
        const Index units = bucket.weights.units(segment.region.rows, segment.region.cols);
        const std::size_t bytes = plan.piece_bytes(bucket, segment);
        bucket.parts.back().size += size;
        bucket.parts.back().units += units;
        bucket.parts.back().at_rest += static_cast<Index>(bytes);
        bucket.size += size;
        bucket.units += units;
        plan.at_rest[static_cast<std::size_t>(segment.parameter)] += bytes;
      }
      bucket.segments.push_back(segment);
    }
    bucket.segments.shrink_to_fit();
  }

 private:
  std::vector<std::pair<int, Segment>> found_;
};

void add_matrix(const Plan& plan, const Bucket& bucket, int index, SegmentList& list) {
  const MatrixPlan& m = plan.matrices[static_cast<std::size_t>(index)];
  const auto slot = [&](int rank) { return bucket.held ? rank : plan.slot_of(rank); };
  if (!optim::is_sharded(m.mode) && !bucket.held) {
    list.add(slot(m.owner), {m.parameter, index, m.region, 0, m.owner});
    return;
  }
  const bool lines = keeps_lines(plan.group(m.parameter));
  const int first = bucket.held ? 0 : m.owner / plan.shard * plan.shard;
  for (int s = 0; s < plan.shard; ++s) {
    const int rank = first + s;
    const auto regions = pieces(plan, m, s);
    for (const Region& region : regions) {
      list.add(slot(rank), {m.parameter, index, region, 0, rank});
    }
    // Who computes keeps the numbers per line, with or without a piece.
    const bool computes = m.mode == optim::Mode::gather || m.mode == optim::Mode::block_cyclic ||
                          m.owner % plan.shard == s;
    if (regions.empty() && lines && computes) {
      list.add(slot(rank), {m.parameter, index, {m.region.first, 0, 0, 0}, 0, rank});
    }
  }
}

void make_norm_slots(Plan& plan) {
  Index next = 0;
  plan.parameter_slot.assign(plan.parameters.size(), 0);
  std::vector<Index> matrices_of(plan.parameters.size(), 0);
  for (const MatrixPlan& m : plan.matrices) ++matrices_of[static_cast<std::size_t>(m.parameter)];
  for (std::size_t g = 0; g < plan.groups.size(); ++g) {
    plan.group_slot.push_back(next);
    plan.blocked.push_back(plan.virtual_shards > 0 && plan.groups[g].config->clip_norm > 0);
    if (!plan.blocked.back()) {
      ++next;
    } else {
      for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
        if (plan.group_of[i] != static_cast<int>(g)) continue;
        plan.parameter_slot[i] = next;
        next += matrices_of[i] > 0
                    ? matrices_of[i]
                    : (plan.parameters[i].size() + Plan::norm_block - 1) / Plan::norm_block;
      }
    }
    plan.group_slots.push_back(next - plan.group_slot.back());
  }
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const auto g = static_cast<std::size_t>(plan.group_of[i]);
    if (!plan.blocked[g]) plan.parameter_slot[i] = plan.group_slot[g];
  }
  plan.norm_slots = next;
  for (const Group& g : plan.groups) {
    plan.rounding_slot.push_back(std::ssize(plan.groups) + plan.rounding_slots);
    if (g.format.quantized() || g.feeds_back()) plan.rounding_slots += Plan::rounding_sums;
  }
  for (MatrixPlan& m : plan.matrices) {
    if (optim::uses_gram(m.mode)) m.bound_slot = static_cast<int>(plan.bound_slots++);
  }
}

}  // namespace

Index ParameterShape::lines() const {
  return sharding.along == Sharding::Along::rows      ? rows()
         : sharding.along == Sharding::Along::columns ? cols()
                                                      : size();
}

Region ParameterShape::part(int r, int ranks) const {
  Index begin = 0;
  Index count = 0;
  if (sharding.counts.empty()) {
    std::tie(begin, count) = even_share(lines(), r, ranks);
  } else {
    begin = std::accumulate(sharding.counts.begin(), sharding.counts.begin() + r, Index{0});
    count = sharding.counts[static_cast<std::size_t>(r)];
  }
  switch (sharding.along) {
    case Sharding::Along::rows:
      return {begin * cols(), count, cols(), cols()};
    case Sharding::Along::columns:
      return {begin, rows(), count, cols()};
    default:
      return {begin, 1, count, count};
  }
}

std::vector<Region> pieces(const Plan& plan, const MatrixPlan& m, int s) {
  const ParameterShape& p = plan.parameters[static_cast<std::size_t>(m.parameter)];
  if (p.held()) {
    const Region part = p.part(s, plan.shard);
    if (part.size() == 0) return {};
    return intersection(m.region, part);
  }
  // The long side is cut: the Gram matrix of the short one is what pieces have in common.
  const bool columns = m.rows <= m.cols;
  const Index unit = columns ? column_unit(plan.group(m.parameter)) : 1;
  const Index extent = columns ? m.cols : m.rows;
  auto [begin, count] = even_share((extent + unit - 1) / unit, s, plan.shard);
  begin = std::min(extent, begin * unit);
  count = std::min(extent - begin, count * unit);
  if (count == 0) return {};
  if (columns) return {{m.region.first + begin, m.rows, count, m.region.distance}};
  return {{m.region.first + begin * m.region.distance, count, m.cols, m.region.distance}};
}

bool cut_along_lines(const Plan& plan, const MatrixPlan& m, bool& of_rows) {
  const ParameterShape& p = plan.parameters[static_cast<std::size_t>(m.parameter)];
  of_rows = m.rows <= m.cols;
  if (!p.held()) return true;
  bool columns = true;
  bool rows = true;
  for (int s = 0; s < plan.shard; ++s) {
    const auto found = pieces(plan, m, s);
    if (found.empty()) continue;
    if (found.size() > 1) return false;
    columns = columns && found[0].rows == m.rows;
    rows = rows && found[0].cols == m.cols;
  }
  if (columns && rows) {  // one rank has all of it: as if there were more
    if (p.sharding.along == Sharding::Along::rows) of_rows = false;
    if (p.sharding.along == Sharding::Along::columns) of_rows = true;
    return true;
  }
  of_rows = columns;
  return columns || rows;
}

Index Bucket::offset_of(int slot) const {
  const auto at = std::lower_bound(parts.begin(), parts.end(), slot,
                                   [](const Part& p, int s) { return p.slot < s; });
  return at == parts.end() ? size : at->offset;
}

Index Bucket::place_of(int slot) const {
  const auto at = std::lower_bound(parts.begin(), parts.end(), slot,
                                   [](const Part& p, int s) { return p.slot < s; });
  return at == parts.end() ? units : at->place;
}

std::size_t Plan::piece_bytes(const Bucket& bucket, const Segment& s) const {
  const std::size_t bytes = bucket.weights.bytes(s.region.rows, s.region.cols);
  return (bytes + piece_alignment - 1) / piece_alignment * piece_alignment;
}

int Plan::slot_of(int world_rank) const {
  int slot = 0;
  for (const int level : levels) {
    slot = slot * level + world_rank % level;
    world_rank /= level;
  }
  return slot;
}

int Plan::rank_of(int slot) const {
  int rank = 0;
  for (std::size_t i = levels.size(); i-- > 0;) {
    rank = rank * levels[i] + slot % levels[i];
    slot /= levels[i];
  }
  return rank;
}

Plan::Cut Plan::cut_of(const Bucket& bucket, int world_rank, std::size_t level) const {
  Cut cut;
  cut_slots(
      slot_of(world_rank), level, levels.size(), [&](int slot) { return bucket.offset_of(slot); },
      cut);
  return cut;
}

Plan::Cut Plan::weights_cut_of(const Bucket& bucket, int world_rank, std::size_t level) const {
  Cut cut;
  cut_slots(
      slot_of(world_rank), level, levels.size(), [&](int slot) { return bucket.place_of(slot); },
      cut);
  return cut;
}

namespace {

/// How many elements of an element-wise parameter stay on one rank at least: no scale is shared
/// between two, and the norms of a clipped group are summed in blocks that no sharding cuts.
Index unit_of(const Plan& plan, int id) {
  const Group& g = plan.group(id);
  const auto i = static_cast<std::size_t>(id);
  if (!g.keeps_rows()) return Plan::norm_block;
  const Index size = plan.parameters[i].size();
  if (g.format.quantized() && g.format.grid->extent == Grid::Extent::tensor)
    return std::max<Index>(size, 1);
  const Index row = plan.row_length[i];
  if (plan.blocked[static_cast<std::size_t>(plan.group_of[i])]) {
    return std::lcm(row, Plan::norm_block);
  }
  return (Plan::norm_block + row - 1) / row * row;
}

}  // namespace

void lay_out(const Placement& placement, Plan& plan) {
  plan.at_rest.assign(plan.parameters.size(), 0);
  for (const Group& g : plan.groups) {
    if (g.format.quantized() && plan.weights_sharded()) plan.piece_alignment = sizeof(float);
  }
  make_norm_slots(plan);
  std::vector<std::vector<int>> matrices_of(plan.parameters.size());
  for (std::size_t m = 0; m < plan.matrices.size(); ++m) {
    matrices_of[static_cast<std::size_t>(plan.matrices[m].parameter)].push_back(
        static_cast<int>(m));
  }
  // In the order backward produces gradients: the last parameter first.
  std::map<Kind, std::size_t> open;
  std::map<Kind, Index> filled;
  const auto wire = static_cast<Index>(bytes_of(plan.gradient_wire));
  for (int i = static_cast<int>(plan.parameters.size()) - 1; i >= 0; --i) {
    const ParameterShape& p = plan.parameters[static_cast<std::size_t>(i)];
    const Group& g = plan.group(i);
    const auto& matrices = matrices_of[static_cast<std::size_t>(i)];
    optim::Mode mode = optim::Mode::owner;
    if (!matrices.empty()) mode = plan.matrices[static_cast<std::size_t>(matrices[0])].mode;
    const bool sharded = optim::is_sharded(mode);
    const Kind kind{g.format.name(),
                    p.gradient_state == GradientState::local,
                    p.held(),
                    mode,
                    sharded && g.config->matrix.wire == "bf16" ? DType::bf16 : DType::f32,
                    sharded ? plan.group_of[static_cast<std::size_t>(i)] : -1};
    const Index bytes = p.size() * wire;
    if (!open.contains(kind) || filled[kind] + bytes > plan.bucket_bytes) {
      open[kind] = plan.buckets.size();
      filled[kind] = 0;
      Bucket b;
      std::tie(std::ignore, b.reduced, b.held, b.mode, b.wire, std::ignore) = kind;
      b.weights = g.format;
      if (mode == optim::Mode::periodic) b.period = g.config->matrix.period;
      plan.buckets.push_back(std::move(b));
    }
    plan.buckets[open[kind]].parameters.push_back(i);
    filled[kind] += bytes;
  }
  ElementDealer dealer(placement.shares, placement.least_unit);
  for (Bucket& bucket : plan.buckets) {
    SegmentList list;
    std::vector<ElementDealer::Whole> elements;
    for (const int id : bucket.parameters) {
      const ParameterShape& p = plan.parameters[static_cast<std::size_t>(id)];
      const auto& matrices = matrices_of[static_cast<std::size_t>(id)];
      for (const int m : matrices) {
        add_matrix(plan, bucket, m, list);
        if (bucket.mode != optim::Mode::owner && bucket.mode != optim::Mode::block_local) {
          bucket.matrices.push_back(m);
        }
      }
      if (!matrices.empty()) continue;
      if (!p.held()) {
        elements.push_back({id, p.size(), unit_of(plan, id)});
        continue;
      }
      for (int s = 0; s < plan.shard; ++s) {
        const Region part = p.part(s, plan.shard);
        if (part.size() == 0) continue;
        if (!plan.group(id).keeps_rows()) {
          list.add(s, {id, -1, part, 0, s});
          continue;
        }
        const Index row = plan.row_length[static_cast<std::size_t>(id)];
        for (const Region& rows : intersection({0, p.size() / row, row, row}, part)) {
          list.add(s, {id, -1, rows, 0, s});
        }
      }
    }
    dealer.deal(elements, [&](int slot, int id, Index begin, Index size) {
      if (size == 0) return;
      const Index row =
          plan.group(id).keeps_rows() ? plan.row_length[static_cast<std::size_t>(id)] : size;
      list.add(slot, {id, -1, {begin, size / row, row, row}, 0, plan.rank_of(slot)});
    });
    list.finish(plan, bucket);
  }
  // Nobody could compute anything beside it: all do, and nothing comes back but shared terms.
  for (Bucket& bucket : plan.buckets) {
    bucket.lone = bucket.mode == optim::Mode::gram && has_lone_matrix(plan);
    if (bucket.lone) bucket.shared_terms = plan.matrices.front().shared_terms;
    bucket.rounds_together = rounds_together(plan, bucket);
    const bool brings = !bucket.matrices.empty() && bucket.mode != optim::Mode::gram &&
                        bucket.mode != optim::Mode::block_local;
    if (brings && plan.group(bucket.parameters.front()).direction().asks_for_gradient()) {
      bucket.brings = 2;
    }
  }
  plan.schedule = make_schedule(plan);
}

}  // namespace orthrus::runtime
