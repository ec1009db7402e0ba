#include "runtime/rounding.hpp"

#include <map>
#include <numeric>

#include "comm/cost.hpp"
#include "kernels/gram.hpp"
#include "optim/matrix_function.hpp"
#include "runtime/arena.hpp"
#include "runtime/plan_steps.hpp"

namespace orthrus::runtime {
namespace {

using optim::Mode;

const MatrixPlan* matrix_of(const Plan& plan, const Segment& s) {
  return s.matrix < 0 ? nullptr : &plan.matrices[static_cast<std::size_t>(s.matrix)];
}

/// What shares scales among the segments of a bucket: matrices, or parameters.
using Sharers = std::map<std::pair<int, int>, Index>;
std::pair<int, int> sharer(const Segment& s) { return {s.parameter, s.matrix}; }

/// Where the scales of each begin among those of a replica, and their end.
Index place_scales(const Plan& plan, const Bucket& b, int replica, Sharers& first) {
  Index at = 0;
  for (const Segment& s : b.segments) {
    if (!b.held && s.rank / plan.shard != replica) continue;
    const Index count = shared_scales(plan, s.parameter, matrix_of(plan, s));
    if (count > 0 && first.try_emplace(sharer(s), at).second) at += count;
  }
  return at;
}

/// Are pieces matrices of their own in some steps, whose scales they share with others?
bool keeps_undo(const Plan& plan, const Bucket& b) {
  return b.stays_apart() && plan.group(b.parameters.front()).feeds_back();
}

std::size_t undo_of(const Plan& plan, const Segment& s) {
  if (s.matrix < 0 || s.size() == 0) return 0;
  const Group& g = plan.group(s.parameter);
  return Arena::rounded(optim::undo_bytes(g.matrix_rule(), *g.lmo, s.region.rows, s.region.cols));
}

/// Does every piece find P⁻¹ by summing D·Xᵀ?
bool sums_roots(const Bucket& b) {
  return b.mode == Mode::gram_steps || b.mode == Mode::block_cyclic;
}

/// Of all that meet in a bucket, whose group is one.
bool pulls_back_together(const Plan& plan, const Bucket& b) {
  return !b.matrices.empty() && plan.group(b.parameters.front()).feeds_back();
}

}  // namespace

Index column_unit(const Group& group) {
  const auto unit = [](const WeightFormat& format) -> Index {
    if (!format.quantized()) return 1;
    if (format.grid->extent == Grid::Extent::block) return format.grid->block;
    return format.grid->format == CodeFormat::int4 ? 2 : 1;
  };
  return std::lcm(unit(group.format), unit(group.momentum));
}

Index shared_scales(const Plan& plan, int parameter, const MatrixPlan* m) {
  const WeightFormat& format = plan.group(parameter).format;
  const ParameterShape& p = plan.parameters[static_cast<std::size_t>(parameter)];
  if (!format.quantized() || plan.shard == 1) return 0;
  const bool sharded = m == nullptr ? p.held() : p.held() || optim::is_sharded(m->mode);
  if (!sharded || format.grid->extent == Grid::Extent::block) return 0;
  if (format.grid->extent == Grid::Extent::tensor) return 1;
  // A vector is one row, whatever it is cut along.
  const bool cuts_rows = !p.held()
                             ? m->rows <= m->cols
                             : p.sharding.along != Sharding::Along::rows || p.shape.size() < 2;
  if (!cuts_rows) return 0;
  return m != nullptr ? m->rows : p.size() / plan.row_length[static_cast<std::size_t>(parameter)];
}

bool rounds_together(const Plan& plan, const Bucket& b) {
  if (!b.held && b.mode == Mode::owner) return false;
  if (pulls_back_together(plan, b)) return true;
  Sharers none;
  for (const Segment& s : b.segments) {
    if (shared_scales(plan, s.parameter, matrix_of(plan, s)) > 0) return true;
  }
  return false;
}

std::size_t RoundingSize::bytes() const {
  const auto floats = [](Index n) {
    return Arena::rounded(static_cast<std::size_t>(n) * sizeof(float));
  };
  return floats(pieces) + floats(scales) + floats(triangles) + Arena::rounded(undo);
}

std::vector<RoundingSize> rounding_sizes(const Plan& plan, const Bucket& b) {
  std::vector<RoundingSize> sizes(static_cast<std::size_t>(plan.ranks));
  const bool undoes = keeps_undo(plan, b);
  for (const Segment& s : b.segments) {
    for (int w = s.rank; w < plan.ranks; w += plan.shard) {
      RoundingSize& size = sizes[static_cast<std::size_t>(w)];
      size.pieces += s.size();
      if (undoes) size.undo += undo_of(plan, s);
      if (!b.held) break;
    }
  }
  // Where Gram matrices meet, X must be known not to be too large, with C in it, too.
  const bool sums_norms =
      pulls_back_together(plan, b) &&
      (plan.group(b.parameters.front()).max_correction > 0 || optim::uses_gram(b.mode));
  for (int replica = 0; replica < plan.ranks / plan.shard; ++replica) {
    Sharers first;
    const Index scales = place_scales(plan, b, replica, first);
    Index triangles = 0;
    Index matrices = 0;
    for (const int index : b.matrices) {
      const MatrixPlan& m = plan.matrices[static_cast<std::size_t>(index)];
      if (!plan.meets_in(b, m, replica * plan.shard)) continue;
      ++matrices;
      if (sums_roots(b) && pulls_back_together(plan, b)) {
        triangles += kernels::packed_size(m.gram_side());
      }
    }
    for (int w = replica * plan.shard; w < (replica + 1) * plan.shard; ++w) {
      RoundingSize& size = sizes[static_cast<std::size_t>(w)];
      size.scales = scales;
      size.triangles = triangles;
      size.norms = sums_norms ? 2 * matrices : 0;
    }
  }
  return sizes;
}

Traffic rounding_traffic_of_meeting(const Plan& plan, const Bucket& b, int w,
                                    const RoundingSize& size, const MeetingSize& meeting) {
  Traffic t;
  if (!pulls_back_together(plan, b)) return t;
  const int me = w % plan.shard;
  if (size.triangles > 0) {
    t += cost::all_reduce(size.triangles, plan.shard, me, 4, plan.max_chunk);
  } else if (b.mode != Mode::gram && meeting.matrices > 0) {
    t += meeting_traffic(plan, b, w, meeting, 1);  // E goes the way of X
  }
  if (size.norms > 0) t += cost::all_reduce(size.norms, plan.shard, me, 8, plan.max_chunk);
  return t;
}

Traffic rounding_traffic(const Plan& plan, const Bucket& b, int w, const RoundingSize& size,
                         const MeetingSize& meeting) {
  Traffic t = rounding_traffic_of_meeting(plan, b, w, size, meeting);
  if (size.scales > 0) {
    t += cost::all_reduce(size.scales, plan.shard, w % plan.shard, 4, plan.max_chunk);
  }
  return t;
}

Rounding make_rounding(const Plan& plan, const Bucket& b, int world_rank) {
  Rounding r;
  r.size = rounding_sizes(plan, b)[static_cast<std::size_t>(world_rank)];
  Sharers first;
  place_scales(plan, b, world_rank / plan.shard, first);
  const bool undoes = keeps_undo(plan, b);
  Index at = 0;
  std::size_t undo = 0;
  for (const Segment& s : b.segments) {
    if (!plan.has(b, s, world_rank)) continue;
    r.pieces.push_back(at);
    at += s.size();
    r.undo.push_back(undo);
    if (undoes) undo += undo_of(plan, s);
    const auto found = first.find(sharer(s));
    Index scale = -1;
    if (found != first.end()) {
      scale = found->second;
      const WeightFormat& format = plan.group(s.parameter).format;
      if (format.grid->extent == Grid::Extent::row) {  // rows before its own
        const MatrixPlan* m = matrix_of(plan, s);
        scale += m != nullptr
                     ? (s.region.first - m->region.first) / m->region.distance
                     : s.region.first / plan.row_length[static_cast<std::size_t>(s.parameter)];
      }
    }
    r.scales.push_back(scale);
  }
  Index triangle = 0;
  for (const Meeting::Matrix& entry : make_meeting(plan, b, world_rank).matrices) {
    r.triangles.push_back(triangle);
    triangle +=
        kernels::packed_size(plan.matrices[static_cast<std::size_t>(entry.matrix)].gram_side());
  }
  return r;
}

}  // namespace orthrus::runtime
