#include "runtime/probing.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "comm/cost.hpp"
#include "runtime/arena.hpp"

namespace orthrus::runtime {
namespace {

/// Per matrix of the plan, or per parameter without any: place in `Plan::probed`, or -1.
struct Places {
  std::vector<int> of_matrix, of_parameter;
  Places(const Plan& plan, const std::vector<Probed>& probed)
      : of_matrix(plan.matrices.size(), -1), of_parameter(plan.parameters.size(), -1) {
    for (std::size_t i = 0; i < probed.size(); ++i) {
      const Probed& p = probed[i];
      (p.matrix >= 0 ? of_matrix[static_cast<std::size_t>(p.matrix)]
                     : of_parameter[static_cast<std::size_t>(p.parameter)]) = static_cast<int>(i);
    }
  }
  [[nodiscard]] int operator()(const Segment& s) const {
    return s.matrix >= 0 ? of_matrix[static_cast<std::size_t>(s.matrix)]
                         : of_parameter[static_cast<std::size_t>(s.parameter)];
  }
};

/// Has `s` what is looked at? A momentum is the first of a rule's states, where that has its shape.
bool has(const Plan& plan, const Segment& s, Probe what) {
  if (what != Probe::momentum) return true;
  const auto state = plan.group(s.parameter).rule->state();
  return !state.empty() && state.front().extent == optim::StateSpec::Extent::elements;
}

double work_of(const Probed& p) {
  const auto k = static_cast<double>(std::min(p.region.rows, p.region.cols));
  const auto l = static_cast<double>(std::max(p.region.rows, p.region.cols));
  return k * k * l + 8 * k * k * k;  // the Gram matrix, and its eigenvalues at a memory's pace
}

}  // namespace

std::int64_t next_look(std::int64_t step, std::int64_t every, double cost, double step_ms,
                       double budget) {
  constexpr double most = 1e9;
  const double wanted =
      budget > 0 ? std::ceil(std::clamp(cost / (budget * std::max(step_ms, 1e-6)), 1.0, most)) : 1;
  return step + (static_cast<std::int64_t>(wanted) + every - 1) / every * every;
}

double look_allowance_s(const Plan& plan) {
  constexpr double slow = 1e9;  // of `work_of` a second
  std::vector<double> load(static_cast<std::size_t>(plan.ranks));
  for (const Probed& p : plan.probed) {
    load[static_cast<std::size_t>(p.analyst)] += 10 * std::ssize(probes) * work_of(p) / slow;
  }
  return std::ceil(*std::max_element(load.begin(), load.end()));
}

std::vector<Probed> choose_probed(const Plan& plan) {
  std::vector<Probed> list;
  std::vector<bool> has_matrices(plan.parameters.size());
  for (const MatrixPlan& m : plan.matrices)
    has_matrices[static_cast<std::size_t>(m.parameter)] = true;
  std::size_t next = 0;
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const ParameterShape& p = plan.parameters[i];
    if (has_matrices[i]) {
      for (; next < plan.matrices.size() && plan.matrices[next].parameter == static_cast<int>(i);
           ++next) {
        const MatrixPlan& m = plan.matrices[next];
        if (std::min(m.rows, m.cols) < 2) continue;
        list.push_back({m.name, static_cast<int>(i), static_cast<int>(next), m.region, -1});
      }
    } else if (p.shape.size() > 1 && std::min(p.rows(), p.cols()) > 1) {
      list.push_back({p.name, static_cast<int>(i), -1, {0, p.rows(), p.cols(), p.cols()}, -1});
    }
  }

  const Places place(plan, list);
  std::vector<int> pieces(list.size()), ranks(list.size());
  for (const Bucket& b : plan.buckets) {
    for (const Segment& s : b.segments) {
      if (place(s) < 0 || s.size() == 0) continue;
      const auto i = static_cast<std::size_t>(place(s));
      ++pieces[i];
      ranks[i] = s.rank;
    }
  }
  std::vector<double> load(static_cast<std::size_t>(plan.ranks));
  std::vector<std::size_t> dealt;
  for (std::size_t i = 0; i < list.size(); ++i) {
    if (pieces[i] > 1) {
      dealt.push_back(i);
      continue;
    }
    list[i].analyst = ranks[i];
    load[static_cast<std::size_t>(ranks[i])] += work_of(list[i]);
  }
  std::stable_sort(dealt.begin(), dealt.end(), [&](std::size_t a, std::size_t b) {
    return work_of(list[a]) > work_of(list[b]);
  });
  for (const std::size_t i : dealt) {
    const auto least = std::min_element(load.begin(), load.end());
    list[i].analyst = static_cast<int>(least - load.begin());
    *least += work_of(list[i]);
  }
  return list;
}

ProbeMeeting make_probe_meeting(const Plan& plan, const Bucket& b, int world_rank, Probe what) {
  const Places place(plan, plan.probed);
  ProbeMeeting out;
  const auto ranks = static_cast<std::size_t>(plan.ranks);
  out.sends.assign(ranks, 0);
  out.receives.assign(ranks, 0);
  // Held parameters are alike in all replicas: the first one's leave.
  const auto leaves = [&](const Segment& s) {
    return place(s) >= 0 && s.size() > 0 && has(plan, s, what);
  };
  const auto analyst = [&](const Segment& s) {
    return static_cast<std::size_t>(plan.probed[static_cast<std::size_t>(place(s))].analyst);
  };
  for (const Segment& s : b.segments) {
    if (!leaves(s)) continue;
    out.happens = true;
    if (s.rank == world_rank) out.sends[analyst(s)] += s.size();
    if (analyst(s) == static_cast<std::size_t>(world_rank))
      out.receives[static_cast<std::size_t>(s.rank)] += s.size();
  }
  std::vector<Index> to(ranks), from(ranks);
  std::exclusive_scan(out.sends.begin(), out.sends.end(), to.begin(), Index{0});
  std::exclusive_scan(out.receives.begin(), out.receives.end(), from.begin(), Index{0});
  out.sent = std::accumulate(out.sends.begin(), out.sends.end(), Index{0});
  out.received = std::accumulate(out.receives.begin(), out.receives.end(), Index{0});
  for (const Segment& s : b.segments) {
    const bool goes = leaves(s);
    if (plan.has(b, s, world_rank)) {
      out.departures.push_back(-1);
      if (goes && s.rank == world_rank) {
        out.departures.back() = to[analyst(s)];
        to[analyst(s)] += s.size();
      }
    }
    if (goes && analyst(s) == static_cast<std::size_t>(world_rank)) {
      Index& at = from[static_cast<std::size_t>(s.rank)];
      out.arrivals.push_back({place(s), s.region, at});
      at += s.size();
    }
  }
  std::stable_sort(
      out.arrivals.begin(), out.arrivals.end(),
      [](const auto& first, const auto& second) { return first.probed < second.probed; });
  return out;
}

void place_piece(const float* piece, const Region& region, const Probed& matrix, float* whole) {
  const Region& m = matrix.region;
  for (Index r = 0; r < region.rows; ++r) {
    const Index from = region.first + r * region.distance - m.first;
    std::copy_n(piece + r * region.cols, region.cols,
                whole + from / m.distance * m.cols + from % m.distance);
  }
}

ProbeTable make_probe_table(const Plan& plan) {
  ProbeTable t;
  t.activations.assign(plan.parameters.size(), -1);
  t.size = std::ssize(plan.probed) * ProbeTable::of_matrix;
  for (const Probed& p : plan.probed) {
    const auto i = static_cast<std::size_t>(p.parameter);
    if (t.activations[i] >= 0) continue;
    t.activations[i] = t.size;
    t.size += plan.parameters[i].cols() + 1;
  }
  t.noise = t.size;
  t.times = t.noise + (measures_dual_noise(plan) ? 2 * std::ssize(plan.parameters) : 0);
  t.size = t.times + 2;
  return t;
}

bool measures_dual_noise(const Plan& plan) {
  return plan.looks_at_noise && plan.ranks > 1 && plan.micro_batches == 1 &&
         plan.virtual_shards == 0;
}

NoiseMeeting make_noise_meeting(const Plan& plan, const Bucket& b) {
  NoiseMeeting out;
  const auto ranks = static_cast<std::size_t>(plan.ranks);
  out.squares.assign(ranks, 0);
  out.triangles.assign(ranks, 0);
  if (!b.reduced || b.held) return out;
  for (int r = 0; r < plan.ranks; ++r) {
    for (std::size_t i = 0; i < b.segments.size(); ++i) {
      const Segment& s = b.segments[i];
      if (s.rank != r || s.size() == 0) continue;
      out.segments.push_back(i);
      out.squares[static_cast<std::size_t>(r)] += s.size();
    }
    for (std::size_t i = 0; i < plan.probed.size(); ++i) {
      const Probed& p = plan.probed[i];
      if (p.analyst != r || p.matrix < 0 ||
          std::find(b.parameters.begin(), b.parameters.end(), p.parameter) == b.parameters.end()) {
        continue;
      }
      const Index k = std::min(p.region.rows, p.region.cols);
      out.probed.push_back(static_cast<int>(i));
      out.triangles[static_cast<std::size_t>(r)] += k * (k + 1) / 2;
    }
  }
  out.all_squares = std::accumulate(out.squares.begin(), out.squares.end(), Index{0});
  out.all_triangles = std::accumulate(out.triangles.begin(), out.triangles.end(), Index{0});
  return out;
}

/// Bytes of a bucket's two reduce_scatters, one after the other, and of a matrix beside the second.
std::size_t noise_room(const NoiseMeeting& m, int rank, std::size_t matrix) {
  const auto me = static_cast<std::size_t>(rank);
  const auto room = [](Index n, std::size_t element) {
    return Arena::rounded(static_cast<std::size_t>(n) * element);
  };
  return std::max(
      room(m.all_squares, sizeof(float)) + room(m.squares[me], sizeof(float)),
      room(m.all_triangles, sizeof(double)) + room(m.triangles[me], sizeof(double)) + matrix);
}

void add_probes(const Plan& plan, std::vector<RankPlan>& ranks) {
  if (plan.probed.empty()) return;
  const Index table = make_probe_table(plan).size;
  std::vector<NoiseMeeting> noise;
  std::size_t matrix = 0;  // the largest, which every rank has a gradient of
  if (measures_dual_noise(plan)) {
    for (const Bucket& b : plan.buckets) noise.push_back(make_noise_meeting(plan, b));
    for (const Probed& p : plan.probed) {
      if (p.matrix < 0) continue;
      matrix = std::max(matrix, Arena::rounded(static_cast<std::size_t>(p.region.size()) * 4));
    }
  }
  for (int w = 0; w < plan.ranks; ++w) {
    RankPlan& r = ranks[static_cast<std::size_t>(w)];
    Index own = 0, sent = 0, received = 0;
    for (const Bucket& b : plan.buckets) {
      for (const Probe what : probes) {
        const ProbeMeeting meeting = make_probe_meeting(plan, b, w, what);
        if (!meeting.happens) continue;
        r.probe += cost::all_to_all(meeting.sends, w, sizeof(float), plan.max_chunk);
        sent = std::max(sent, meeting.sent);
        received = std::max(received, meeting.received);
        if (what == Probe::weights) own += meeting.sent;
      }
    }
    for (const NoiseMeeting& meeting : noise) {
      if (meeting.all_squares == 0) continue;
      r.probe += cost::reduce_scatter(meeting.squares, w, sizeof(float), plan.max_chunk);
      r.probe += cost::reduce_scatter(meeting.triangles, w, sizeof(double), plan.max_chunk);
      r.work.probe_noise = std::max(r.work.probe_noise, noise_room(meeting, w, matrix));
    }
    r.probe += cost::all_reduce(table, plan.ranks, w, sizeof(double), plan.max_chunk);
    r.work.probe_send = static_cast<std::size_t>(sent) * sizeof(float);
    r.work.probe_receive = static_cast<std::size_t>(received) * sizeof(float);
    // Weights before the step; of its matrices gradients, what else is looked at, and, for
    // dynamics, weights; of the largest a copy in f64, the Gram matrix, and LAPACK's two columns of
    // blocks; for dynamics weights, update and singular vectors in f64 beside what LAPACK's SVD
    // takes.
    Index kept = own, largest = 0;
    for (const Probed& p : plan.probed) {
      const bool own_matrix = p.analyst == w;
      if (own_matrix) kept += (plan.looks_at_dynamics ? 3 : 2) * p.region.size();
      // Of every rank's own gradient a Gram matrix is made.
      if (!own_matrix && (noise.empty() || p.matrix < 0)) continue;
      const Index k = std::min(p.region.rows, p.region.cols);
      largest = std::max(largest, 8 * p.region.size() + 8 * k * (k + 70));
      if (plan.looks_at_dynamics && own_matrix)
        largest = std::max(largest, 8 * 4 * p.region.size() + 8 * k * (6 * k + 70));
    }
    r.work.probe_host = static_cast<std::size_t>(4 * kept + largest + 8 * table);
  }
}

}  // namespace orthrus::runtime
