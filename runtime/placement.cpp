// Where matrices meet: the mode and the owner of each, and what is left for element-wise state.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <orthrus/error.hpp>
#include <set>

#include "comm/cost.hpp"
#include "comm/process_grid.hpp"
#include "kernels/gram.hpp"
#include "optim/block_cyclic_msign.hpp"
#include "optim/block_cyclic_root.hpp"
#include "runtime/meeting.hpp"
#include "runtime/plan_steps.hpp"
#include "runtime/rounding.hpp"

namespace orthrus::runtime {
namespace {

using optim::Mode;

DType iteration_dtype(const Group& g) {
  return g.config->lmo.dtype == "bf16" ? DType::bf16 : DType::f32;
}

/// `flops` of products of matrices of this side.
double products_seconds(const MachineProfile& profile, double flops, Index side, DType dtype) {
  const auto n = static_cast<double>(side);
  return flops / (2 * n * n * n) * gemm_seconds(profile, dtype, side, side, side);
}

/// Parameters whose matrices cost the same in every mode get the same mode.
struct Class {
  std::vector<int> parameters;
  std::vector<int> matrices;     ///< of all of them
  std::vector<Mode> candidates;  ///< that are allowed, `owner` first where it is
  Mode mode = Mode::owner;
};

/// ECO where P⁻¹ is applied to pieces: of the long side it has not full rank, and loses of E what
/// is outside the rows of X.
std::string long_root(const MatrixPlan& m, bool of_rows) {
  if ((of_rows ? m.rows : m.cols) <= std::min(m.rows, m.cols)) return "";
  return "its shards cut the short side, whose root weights.residual momentum needs: exchange or "
         "gather";
}

/// What keeps a matrix from `mode`; empty: nothing.
std::string obstacle(const Plan& plan, const MatrixPlan& m, Mode mode) {
  const Group& g = plan.group(m.parameter);
  const ParameterShape& p = plan.parameters[static_cast<std::size_t>(m.parameter)];
  const MatrixConfig& config = g.config->matrix;
  if (mode == Mode::owner && p.held() && plan.shard > 1) {
    return "the trainer holds it in shards, and owner needs it whole on one rank";
  }
  if (config.accuracy == "bitwise" && !optim::is_bitwise(mode)) {
    return "matrix.accuracy bitwise allows owner, exchange and gather";
  }
  if (plan.virtual_shards > 0 && !optim::is_bitwise(mode)) {
    return "reproducible.virtual_shards promises the same bits on any number of ranks, which "
           "owner, exchange and gather give";
  }
  if (plan.virtual_shards > 0 && optim::is_sharded(mode) && g.config->clip_norm > 0) {
    return "with reproducible.virtual_shards the norm that clip_norm needs is summed over whole "
           "matrices: mode owner";
  }
  if (optim::is_sharded(mode) && config.wire == "bf16" &&
      (config.accuracy != "fast" || plan.virtual_shards > 0)) {
    return "matrix.wire bf16 rounds what is exchanged: it needs matrix.accuracy fast, without "
           "reproducible.virtual_shards";
  }
  if (optim::is_sharded(mode) && config.wire == "bf16" && !g.direction().takes_bf16()) {
    return "matrix.wire bf16 rounds X and the gradient apart, and rule " + g.config->rule.name +
           " divides one by the other: matrix.wire f32";
  }
  const optim::Lines lines = g.matrix_rule().scaled_lines(m.rows, m.cols);
  if (lines != optim::Lines::none && (mode == Mode::gram_steps || mode == Mode::block_cyclic ||
                                      mode == Mode::block_local || mode == Mode::periodic)) {
    return "rule " + g.config->rule.name +
           " scales lines, which needs owner, exchange, gather or "
           "gram";
  }
  const optim::Direction& direction = g.direction();
  bool of_rows = m.gram_of_rows;
  const bool whole_lines = cut_along_lines(plan, m, of_rows);
  if (const std::string why = direction.obstacle(mode, m.rows, m.cols, of_rows, g.feeds_back());
      !why.empty()) {
    return "rule " + g.config->rule.name + ": " + why;
  }
  if (g.lmo->rational(m.gram_side()) != nullptr &&
      (mode == Mode::gram_steps || mode == Mode::block_cyclic)) {
    return "lmo.coefficients rational has no iterations to share: owner, exchange, gather or gram";
  }
  if (mode == Mode::block_cyclic) {
    if (!plan.on_host) return "ScaLAPACK computes in the host's memory: device cpu";
    if (!g.orthogonalizes()) return "lmo.norm " + g.config->lmo.norm + " needs no grid";
    if (g.config->lmo.dtype != "f32") return "ScaLAPACK iterates in f32: lmo.dtype f32";
    if (config.wire != "f32") return "ScaLAPACK takes f32 pieces: matrix.wire f32";
    if (g.feeds_back() && !whole_lines) {
      return "its shards begin or end inside a row: weights.residual momentum needs whole rows or "
             "columns there";
    }
    if (direction.asks_for_gradient() && !whole_lines) {
      return "its shards begin or end inside a row: rule " + g.config->rule.name +
             " needs whole rows or columns there";
    }
    return g.feeds_back() ? long_root(m, of_rows) : "";
  }
  if (!optim::uses_gram(mode)) return "";
  if (!g.orthogonalizes()) return "lmo.norm " + g.config->lmo.norm + " has no Gram form";
  if (!whole_lines) {
    return "its shards begin or end inside a row: the Gram matrix needs whole rows or columns";
  }
  if (g.feeds_back() && !long_root(m, of_rows).empty()) return long_root(m, of_rows);
  if (mode == Mode::gram_steps) return "";
  if (!direction.has_gram_form(*g.lmo, m.gram_side())) {
    return "lmo.coefficients " + g.config->lmo.coefficients + " with " +
           std::to_string(g.lmo->iterations().size()) +
           " iterations is not stable in Gram space in f32; use gram_steps or exchange";
  }
  if ((lines == optim::Lines::rows && !of_rows) || (lines == optim::Lines::columns && of_rows)) {
    return "rule " + g.config->rule.name + " scales lines that its shards cut";
  }
  return "";
}

std::vector<Class> classes_of(const Plan& plan) {
  std::map<std::string, Class> found;
  std::vector<std::string> order;
  std::vector<std::vector<int>> matrices(plan.parameters.size());
  for (std::size_t i = 0; i < plan.matrices.size(); ++i) {
    matrices[static_cast<std::size_t>(plan.matrices[i].parameter)].push_back(static_cast<int>(i));
  }
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    if (matrices[i].empty()) continue;
    const ParameterShape& p = plan.parameters[i];
    std::string key = std::to_string(plan.group_of[i]) + (p.held() ? " held " : " ");
    for (const int m : matrices[i]) {
      const MatrixPlan& matrix = plan.matrices[static_cast<std::size_t>(m)];
      key += std::to_string(matrix.rows) + "x" + std::to_string(matrix.cols) + " ";
    }
    if (p.held()) key += p.name;  // its shards are its own
    auto [it, fresh] = found.try_emplace(key);
    if (fresh) order.push_back(key);
    it->second.parameters.push_back(static_cast<int>(i));
    it->second.matrices.insert(it->second.matrices.end(), matrices[i].begin(), matrices[i].end());
  }
  std::vector<Class> classes;
  for (const std::string& key : order) classes.push_back(std::move(found.at(key)));
  return classes;
}

/// Which modes a class may have: the one its group names, or all that give the full-matrix update.
void find_candidates(const Plan& plan, Preference preference, Class& c) {
  const MatrixPlan& first = plan.matrices[static_cast<std::size_t>(c.matrices.front())];
  const Group& g = plan.group(first.parameter);
  const std::string& named = g.config->matrix.mode;
  const auto check = [&](Mode mode) {
    for (const int m : c.matrices) {
      std::string why = obstacle(plan, plan.matrices[static_cast<std::size_t>(m)], mode);
      if (!why.empty()) return why;
    }
    return std::string();
  };
  if (named != "auto") {
    const Mode mode = *optim::mode_named(named);
    const std::string why = check(mode);
    if (!why.empty()) {
      throw ConfigError("parameter '" +
                        plan.parameters[static_cast<std::size_t>(first.parameter)].name +
                        "': matrix.mode " + named + " cannot be: " + why);
    }
    // On one rank there is nothing to deal out.
    const bool alone = plan.shard == 1 && mode == Mode::block_cyclic;
    c.mode = alone ? (check(Mode::owner).empty() ? Mode::owner : Mode::exchange) : mode;
    c.candidates = {c.mode};
    return;
  }
  for (const Mode mode :
       {Mode::owner, Mode::exchange, Mode::gather, Mode::gram, Mode::block_cyclic}) {
    if (preference == Preference::sharded && mode == Mode::owner) continue;
    if (mode == Mode::block_cyclic &&
        (preference != Preference::leanest || !comm::ProcessGrid::available() || plan.shard == 1)) {
      continue;
    }
    if (check(mode).empty()) c.candidates.push_back(mode);
  }
  if (c.candidates.empty()) {
    throw ConfigError("parameter '" +
                      plan.parameters[static_cast<std::size_t>(first.parameter)].name +
                      "': no mode fits: " + check(Mode::exchange));
  }
  c.mode = c.candidates.front();
}

/// How long the ranks of a shard group take to compute a share each of the terms of matrix m and to
/// bring them together. Where nothing is to share: for ever.
double shared_terms_seconds(const Plan& plan, const MachineProfile& profile, MatrixPlan m) {
  const Group& g = plan.group(m.parameter);
  const auto* rational = g.lmo->rational(m.gram_side());
  if (rational == nullptr || plan.shard == 1 || !g.direction().has_lmo_gram())
    return std::numeric_limits<double>::infinity();
  m.mode = Mode::gram;
  m.shared_terms = rational->r;
  const Index triangle = kernels::packed_size(m.gram_side());
  const Index all = triangle * m.shared_terms;
  const Index least = triangle * terms_of(m.shared_terms, plan.shard, plan.shard - 1);
  const auto calls = static_cast<double>(cost::chunks(all, plan.max_chunk));
  return compute_seconds(plan, profile, m) * computed_share(plan, m, 0) +
         collective_seconds(profile, Collective::all_gather, 4 * static_cast<double>(all - least),
                            calls, plan.shard) +
         pass_seconds(profile, 4 * static_cast<double>(all));
}

/// What one matrix costs in one mode.
struct Cost {
  double owner = 0;  ///< seconds on the rank that computes it
  double every = 0;  ///< on every rank of the shard group
  double wire = 0;   ///< of its collectives, without their latency
};

class Planner {
 public:
  Planner(const Plan& plan, const MachineProfile& profile, std::vector<Class>& classes)
      : plan_(plan), profile_(profile), classes_(classes) {
    for (const Class& c : classes_) {
      auto& costs = costs_.emplace_back();
      for (const Mode mode : c.candidates) costs[static_cast<std::size_t>(mode)] = cost(c, mode);
    }
  }

  /// The mode in which the fullest rank needs least.
  void choose_leanest() {
    for (Class& c : classes_) {
      const auto bytes = [&](Mode mode) {
        MatrixPlan m = plan_.matrices[static_cast<std::size_t>(c.matrices.front())];
        m.mode = mode;
        return peak_bytes(m);
      };
      c.mode = *std::min_element(c.candidates.begin(), c.candidates.end(),
                                 [&](Mode a, Mode b) { return bytes(a) < bytes(b); });
    }
  }

  /// Changes one class at a time for as long as that makes the step shorter.
  void choose() {
    std::vector<std::size_t> order(classes_.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto weight = [&](std::size_t i) {
      const auto& cost = costs_[i][static_cast<std::size_t>(classes_[i].mode)];
      return (cost.owner + cost.every) * static_cast<double>(classes_[i].matrices.size());
    };
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return weight(a) > weight(b); });
    double best = seconds();
    for (int pass = 0; pass < 2; ++pass) {
      bool changed = false;
      for (const std::size_t i : order) {
        const Mode before = classes_[i].mode;
        Mode chosen = before;
        for (const Mode mode : classes_[i].candidates) {
          if (mode == chosen) continue;
          classes_[i].mode = mode;
          const double t = seconds();
          if (t < best * (1 - 1e-9)) {
            best = t;
            chosen = mode;
          }
        }
        classes_[i].mode = chosen;
        changed = changed || chosen != before;
      }
      if (!changed) break;
    }
  }

 private:
  /// What one matrix takes on its fullest rank: state, buffers and scratch.
  [[nodiscard]] double peak_bytes(const MatrixPlan& m) const {
    const auto whole = static_cast<double>(m.rows) * static_cast<double>(m.cols) * 4;
    const auto state = static_cast<double>(state_bytes(plan_.group(m.parameter), m.rows, m.cols));
    const double piece = (state + whole) / plan_.shard;
    switch (m.mode) {
      case Mode::owner:
        return state + whole + static_cast<double>(meeting_scratch_bytes(plan_, m));
      case Mode::gram:
        return piece + static_cast<double>(meeting_scratch_bytes(plan_, m)) +
               2 * static_cast<double>(kernels::packed_size(m.gram_side())) * 4;
      case Mode::block_cyclic:
        if (plan_.group(m.parameter).direction().has_grid_root()) {
          const optim::BlockCyclicRoot root(m.rows, m.cols, pieces_of_z(plan_, m), 0);
          return piece + static_cast<double>(root.workspace_bytes());
        }
        return piece + static_cast<double>(optim::block_cyclic_msign_workspace_bytes(
                           m.z_rows(m.rows), m.z_cols(m.cols),
                           m.z_rows(m.rows) * m.z_cols(m.cols) / plan_.shard, plan_.shard, 0));
      default:  // whole once more, on its way
        return piece + whole + static_cast<double>(meeting_scratch_bytes(plan_, m));
    }
  }

  /// Elements that products on the grid walk along.
  [[nodiscard]] double grid_operands(const MatrixPlan& m) const {
    const Group& g = plan_.group(m.parameter);
    const auto side = static_cast<double>(std::min(m.rows, m.cols));
    if (g.direction().has_grid_root()) {
      return optim::BlockCyclicRoot::products() * side * side;
    }
    return static_cast<double>(g.lmo->iterations().size()) *
           static_cast<double>(m.z_rows(m.rows) * m.z_cols(m.cols));
  }

  [[nodiscard]] Cost cost(const Class& c, Mode mode) const {
    const MatrixPlan& first = plan_.matrices[static_cast<std::size_t>(c.matrices.front())];
    MatrixPlan m = first;
    m.mode = mode;
    bool rows = true;
    if (cut_along_lines(plan_, m, rows)) m.gram_of_rows = rows;
    const Group& g = plan_.group(m.parameter);
    const double elements = static_cast<double>(m.rows) * static_cast<double>(m.cols);
    Cost cost;
    cost.owner = compute_seconds(plan_, profile_, m);
    if (mode == Mode::owner) {
      cost.owner = m.seconds;
      return cost;
    }
    // An even piece stands for all.
    const Index lines =
        std::max<Index>(1, (m.gram_of_rows ? m.cols : m.rows) / static_cast<Index>(plan_.shard));
    Segment piece{m.parameter, 0, {0, m.rows, m.cols, m.cols}, 0, 0};
    (m.gram_of_rows ? piece.region.cols : piece.region.rows) = lines;
    cost.every = piece_seconds(plan_, profile_, m, piece);
    const double others = 1 - 1.0 / plan_.shard;
    const double wire = g.config->matrix.wire == "bf16" ? 2 : 4;
    const auto gram = static_cast<double>(kernels::packed_size(m.gram_side())) * 4;
    const int ways = g.feeds_back() ? 2 : 1;  // E goes where X went
    const double more = g.direction().asks_for_gradient() ? 1 : 0;
    switch (mode) {
      case Mode::exchange:
        cost.wire = seconds(Collective::all_to_all,
                            (ways * 2 + more) * others * elements * wire / plan_.shard);
        break;
      case Mode::gather:
        cost.wire = seconds(Collective::all_gather, (ways + more) * others * elements * wire);
        cost.every += cost.owner;
        cost.owner = 0;
        break;
      case Mode::gram:
        if (has_lone_matrix(plan_)) {
          cost.wire = seconds(Collective::all_reduce, 2 * others * gram);
          cost.every += std::min(cost.owner, shared_terms_seconds(plan_, profile_, m));
          cost.owner = 0;
        } else {
          cost.wire = seconds(Collective::reduce_scatter, others * gram) +
                      seconds(Collective::all_gather, ways * others * gram);
        }
        break;
      case Mode::block_cyclic:  // every iteration's panels travel once along rows and columns
        cost.every += cost.owner;
        cost.owner = 0;
        cost.wire = seconds(Collective::broadcast,
                            2 * 4 * grid_operands(m) / std::sqrt(static_cast<double>(plan_.shard)));
        break;
      default:
        break;
    }
    return cost;
  }

  /// Of a collective's bytes, its latency apart.
  [[nodiscard]] double seconds(Collective kind, double bytes) const {
    return collective_seconds(profile_, kind, bytes, 0, plan_.shard);
  }
  /// Of the calls a bucket of this mode makes. @param feeds_back  E goes where X went.
  [[nodiscard]] double latency(Mode mode, bool feeds_back) const {
    const int ways = feeds_back ? 2 : 1;
    const auto calls = [&](Collective kind, double n) {
      return collective_seconds(profile_, kind, 0, n, plan_.shard);
    };
    switch (mode) {
      case Mode::exchange:
        return calls(Collective::all_to_all, 2 * ways);
      case Mode::gather:
        return calls(Collective::all_gather, ways);
      case Mode::gram:
        return calls(Collective::reduce_scatter, 1) + calls(Collective::all_gather, 1);
      default:
        return 0;
    }
  }

  /// Predicted seconds of the matrices: the busiest rank, what every rank does, and the wires.
  [[nodiscard]] double seconds() const {
    double every = 0;
    std::set<std::pair<Mode, bool>> modes;        // and whether they feed back
    std::vector<std::pair<double, Index>> tasks;  // seconds, how many
    for (std::size_t i = 0; i < classes_.size(); ++i) {
      const Class& c = classes_[i];
      const Cost& cost = costs_[i][static_cast<std::size_t>(c.mode)];
      const auto n = static_cast<double>(c.matrices.size());
      modes.emplace(c.mode, feeds_back(c));
      // Matrices of one replica only: the others do theirs meanwhile.
      const double per_replica = std::ceil(n / plan_.replicate);
      every += (cost.every + cost.wire) * per_replica;
      // One bucket after the other, two at a time: where they hold few matrices, most owners wait.
      const double at_a_time = 2 * matrices_per_bucket(c);
      if (c.mode != Mode::owner && plan_.depth == 0 && at_a_time < plan_.shard) {
        every += cost.owner * std::ceil(per_replica / at_a_time);
      } else if (cost.owner > 0) {
        tasks.emplace_back(cost.owner, std::ssize(c.matrices));
      }
    }
    for (const auto& [mode, back] : modes) every += latency(mode, back);
    return every + busiest(tasks);
  }

  [[nodiscard]] bool feeds_back(const Class& c) const {
    return plan_.group(plan_.matrices[static_cast<std::size_t>(c.matrices.front())].parameter)
        .feeds_back();
  }
  [[nodiscard]] double matrices_per_bucket(const Class& c) const {
    const MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(c.matrices.front())];
    const double bytes = static_cast<double>(m.rows) * static_cast<double>(m.cols) *
                         static_cast<double>(bytes_of(plan_.gradient_wire));
    return std::max(1.0, std::floor(static_cast<double>(plan_.bucket_bytes) / bytes));
  }

  /// The longest processing time first, whole rounds of equal tasks at once.
  [[nodiscard]] double busiest(std::vector<std::pair<double, Index>>& tasks) const {
    std::sort(tasks.begin(), tasks.end(), std::greater<>());
    double floor = 0;
    std::multiset<double> loads;
    for (int r = 0; r < plan_.ranks; ++r) loads.insert(0);
    for (const auto& [t, count] : tasks) {
      const Index rounds = count / plan_.ranks;
      floor += t * static_cast<double>(rounds);
      for (Index i = 0; i < count % plan_.ranks; ++i) {
        const double least = *loads.begin();
        loads.erase(loads.begin());
        loads.insert(least + t);
      }
    }
    return floor + *loads.rbegin();
  }

  const Plan& plan_;
  const MachineProfile& profile_;
  std::vector<Class>& classes_;
  std::vector<std::array<Cost, optim::mode_count>> costs_;
};

/// Loads of world ranks, in seconds and bytes of state.
struct Loads {
  std::vector<double> seconds, bytes;
};

/// Longest processing time first, onto the least loaded rank; where that has much more state than
/// its share, onto the next.
Loads assign_owners(const MachineProfile& profile, Plan& plan) {
  struct Task {
    std::size_t matrix;
    double seconds;  ///< on the owner
  };
  Loads loads{std::vector<double>(static_cast<std::size_t>(plan.ranks), 0),
              std::vector<double>(static_cast<std::size_t>(plan.ranks), 0)};
  std::vector<Task> tasks;
  double all_bytes = 0;
  for (std::size_t i = 0; i < plan.matrices.size(); ++i) {
    const MatrixPlan& m = plan.matrices[i];
    tasks.push_back({i, m.mode == Mode::owner ? m.seconds : compute_seconds(plan, profile, m)});
    all_bytes += static_cast<double>(state_bytes(plan.group(m.parameter), m.rows, m.cols));
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.seconds > b.seconds; });
  using Ranks = std::set<std::tuple<double, double, int>>;  // seconds, bytes at rest, rank
  std::vector<Ranks> replicas(static_cast<std::size_t>(plan.replicate));
  for (int r = 0; r < plan.ranks; ++r) {
    replicas[static_cast<std::size_t>(r / plan.shard)].emplace(0.0, 0.0, r);
  }
  std::vector<double> replica_bytes(replicas.size(), 0);
  const double fair = 1.3 * all_bytes / plan.ranks;
  constexpr int tries = 64;
  for (const Task& task : tasks) {
    MatrixPlan& m = plan.matrices[task.matrix];
    const ParameterShape& p = plan.parameters[static_cast<std::size_t>(m.parameter)];
    const double more = static_cast<double>(state_bytes(plan.group(m.parameter), m.rows, m.cols));
    const bool rests = m.mode == Mode::owner;
    // Of the ranks that would be done about as early as the first: one in the replica that has
    // least, and where the matrix rests on it, one whose state is within its share.
    double first = std::get<0>(*replicas[0].begin());
    for (const Ranks& ranks : replicas) first = std::min(first, std::get<0>(*ranks.begin()));
    const double late = first + 0.1 * task.seconds;
    std::size_t replica = replicas.size();
    for (std::size_t k = 0; k < replicas.size(); ++k) {
      if (std::get<0>(*replicas[k].begin()) > late) continue;
      if (replica == replicas.size() || replica_bytes[k] < replica_bytes[replica]) replica = k;
    }
    Ranks& ranks = replicas[replica];
    auto best = ranks.begin();
    auto at = best;
    for (int k = 0; rests && k < tries && at != ranks.end(); ++k, ++at) {
      if (std::get<0>(*at) > late) break;
      if (std::get<1>(*at) + more <= fair) {
        best = at;
        break;
      }
    }
    const auto [seconds, bytes, rank] = *best;
    ranks.erase(best);
    m.owner = p.held() ? rank % plan.shard : rank;
    ranks.emplace(seconds + task.seconds, bytes + (rests ? more : 0), rank);
    replica_bytes[replica] += more;
    if (rests) continue;
    // Pieces lie on all ranks of the replica.
    for (int s = 0; s < plan.shard; ++s) {
      loads.bytes[replica * static_cast<std::size_t>(plan.shard) + static_cast<std::size_t>(s)] +=
          more / plan.shard;
    }
  }
  for (const Ranks& ranks : replicas) {
    for (const auto& [seconds, bytes, rank] : ranks) {
      loads.seconds[static_cast<std::size_t>(rank)] += seconds;
      loads.bytes[static_cast<std::size_t>(rank)] += bytes;
    }
  }
  return loads;
}

/// Shares of `amount` that bring `levels` as close together as they can without any share above
/// its `most`: water into uneven vessels.
std::vector<double> fill(const std::vector<double>& levels, const std::vector<double>& most,
                         double amount) {
  const auto poured = [&](double surface) {
    double sum = 0;
    for (std::size_t r = 0; r < levels.size(); ++r) {
      sum += std::clamp(surface - levels[r], 0.0, most[r]);
    }
    return sum;
  };
  double low = *std::min_element(levels.begin(), levels.end());
  double high = *std::max_element(levels.begin(), levels.end()) + amount;
  for (int i = 0; i < 100 && poured(high) < amount && high < 1e300; ++i) high *= 2;
  for (int i = 0; i < 100; ++i) {
    const double middle = (low + high) / 2;
    (poured(middle) < amount ? low : high) = middle;
  }
  std::vector<double> shares(levels.size());
  for (std::size_t r = 0; r < levels.size(); ++r) {
    shares[r] = std::clamp(high - levels[r], 0.0, most[r]);
  }
  return shares;
}

/// Bytes an element-wise update moves per element, in the first group that has one.
double pass_bytes_of_elements(const Plan& plan) {
  for (const Group& g : plan.groups) {
    if (g.lmo == nullptr) return pass_bytes(g);
  }
  return 1;
}

}  // namespace

double state_bytes_per_element(const Group& g) {
  double bytes = g.master ? 4 : g.residual == Residual::mantissa ? 2 : 0;
  for (const optim::StateSpec& s : g.rule->state()) bytes += s.of_matrix() ? 0 : 4;
  if (g.momentum.quantized()) {
    bytes += 1 + 4.0 / static_cast<double>(g.momentum.grid->block) - 4;
  } else if (g.compresses()) {
    bytes += 2 - 4;
  }
  return bytes;
}

std::size_t state_bytes(const Group& g, Index rows, Index cols) {
  std::size_t bytes = g.master ? static_cast<std::size_t>(rows * cols) * 4 : 0;
  for (std::size_t k = 0; k < g.rule->state().size(); ++k) bytes += g.state_bytes(k, rows, cols);
  return bytes;
}

double pass_bytes(const Group& g) {
  // Codes: W is copied, its maxima found, rounded, and read back; ECO: M and E once more.
  return 12 + 2 * state_bytes_per_element(g) + (g.format.quantized() ? 24 : 0) +
         (g.feeds_back() ? 16 : 0);
}

bool keeps_lines(const Group& g) {
  const auto state = g.rule->state();
  return std::any_of(state.begin(), state.end(),
                     [](const optim::StateSpec& s) { return s.of_matrix(); });
}

bool has_lone_matrix(const Plan& plan) {
  if (plan.matrices.size() != 1) return false;
  const Group& g = plan.group(plan.matrices.front().parameter);
  return !keeps_lines(g) && !g.feeds_back();
}

double feedback_seconds(const MachineProfile& profile, const Group& g, Index rows, Index cols) {
  if (!g.feeds_back() || !g.orthogonalizes()) return 0;
  const Index side = std::min(rows, cols);
  const Index length = std::max(rows, cols);
  const double undo = gemm_seconds(profile, iteration_dtype(g), side, length, side);
  const bool rational = g.lmo->rational(side) != nullptr;
  return undo + (rational ? gemm_seconds(profile, DType::f32, side, side, side) : undo);
}

double lmo_seconds(const MachineProfile& profile, const Group& g, Index rows, Index cols) {
  const optim::Direction& direction = g.direction();
  if (&direction != &optim::lmo_direction()) {
    return products_seconds(profile, direction.product_flops(*g.lmo, rows, cols),
                            std::min(rows, cols), iteration_dtype(g));
  }
  if (!g.lmo->orthogonalizes()) {
    return pass_seconds(profile, 16 * static_cast<double>(rows) * static_cast<double>(cols));
  }
  if (const auto* f = g.lmo->rational(std::min(rows, cols))) {
    return rational_msign_seconds(profile, rows, cols, f->r, iteration_dtype(g));
  }
  const auto iterations = g.lmo->iterations();
  const DType dtype = iteration_dtype(g);
  return msign_seconds(profile, rows, cols, std::ssize(iterations), dtype,
                       kernels::msign_gram_products(rows, cols, iterations, g.lmo->options()));
}

double undo_seconds(const Plan& plan, const MachineProfile& profile, const MatrixPlan& m,
                    const Segment& piece) {
  const Group& g = plan.group(m.parameter);
  if (!g.feeds_back() || m.mode == Mode::owner) return 0;
  const double elements = static_cast<double>(piece.size());
  const bool by_pieces = optim::uses_gram(m.mode) || m.mode == Mode::block_cyclic;
  if (m.mode == Mode::block_local) {
    return feedback_seconds(profile, g, piece.region.rows, piece.region.cols);
  }
  if (!by_pieces) return pass_seconds(profile, 16 * elements);
  const Index lines = m.gram_of_rows ? piece.region.cols : piece.region.rows;
  const double product = gemm_seconds(profile, DType::f32, m.gram_side(), lines, m.gram_side());
  return product * (m.mode == Mode::gram ? 1 : 2) + pass_seconds(profile, 16 * elements);
}

double compute_seconds(const Plan& plan, const MachineProfile& profile, const MatrixPlan& m) {
  const Group& g = plan.group(m.parameter);
  const auto iterations = static_cast<Index>(g.lmo->iterations().size());
  const double elements = static_cast<double>(m.rows) * static_cast<double>(m.cols);
  const Index side = m.gram_side();
  const double root = g.feeds_back() ? gemm_seconds(profile, DType::f32, side, side, side) : 0;
  switch (m.mode) {
    case Mode::gram:
      if (!g.direction().has_lmo_gram()) {
        return products_seconds(profile, g.direction().gram_product_flops(*g.lmo, side), side,
                                DType::f32);
      }
      if (const auto* f = g.lmo->rational(side)) {
        return inverse_seconds(profile, side) * f->r + root;
      }
      return gram_polynomial_seconds(profile, side, iterations,
                                     kernels::gram_f64_iterations(g.lmo->iterations())) +
             root;
    case Mode::gram_steps:
      return static_cast<double>(iterations) * syrk_seconds(profile, DType::f32, side, side);
    case Mode::block_local:
      return 0;
    case Mode::block_cyclic:  // the products, shared
      if (g.direction().has_grid_root()) {
        const Index shorter = std::min(m.rows, m.cols);
        const double flops = optim::BlockCyclicRoot::flops(m.rows, m.cols);
        return products_seconds(profile, flops, shorter, DType::f32) / plan.shard;
      }
      return lmo_seconds(profile, g, m.rows, m.cols) / plan.shard;
    case Mode::owner:
      return lmo_seconds(profile, g, m.rows, m.cols);
    default:  // the whole matrix is put together and taken apart again
      return lmo_seconds(profile, g, m.rows, m.cols) +
             feedback_seconds(profile, g, m.rows, m.cols) + pass_seconds(profile, 16 * elements);
  }
}

double computed_share(const Plan& plan, const MatrixPlan& m, int w) {
  if (m.shared_terms == 0) return 1;
  return static_cast<double>(terms_of(m.shared_terms, plan.shard, w % plan.shard)) / m.shared_terms;
}

double piece_seconds(const Plan& plan, const MachineProfile& profile, const MatrixPlan& m,
                     const Segment& piece) {
  const Group& g = plan.group(m.parameter);
  const Index rows = piece.region.rows;
  const Index cols = piece.region.cols;
  const double elements = static_cast<double>(rows) * static_cast<double>(cols);
  const double update =
      pass_seconds(profile, pass_bytes(g) * elements) + undo_seconds(plan, profile, m, piece);
  const auto iterations = static_cast<double>(g.lmo->iterations().size());
  const Index side = m.gram_side();
  const Index lines = m.z_lines(piece.region);
  const double gram = syrk_seconds(profile, DType::f32, side, lines);
  const double product = gemm_seconds(profile, DType::f32, side, lines, side);
  switch (m.mode) {
    case Mode::gram:  // X is made twice
      return update + pass_seconds(profile, 16 * elements) + gram + product;
    case Mode::gram_steps:
      return update + iterations * (gram + product + pass_seconds(profile, 8 * elements));
    default:
      return update + pass_seconds(profile, 8 * elements);
  }
}

Placement place(const MachineProfile& profile, Preference preference, Plan& plan) {
  Placement placement;
  std::vector<Class> classes = classes_of(plan);
  for (Class& c : classes) {
    find_candidates(plan, preference, c);
    placement.had_choice = placement.had_choice || c.candidates.size() > 1;
  }
  Planner planner(plan, profile, classes);
  if (preference == Preference::leanest) {
    planner.choose_leanest();
  } else {
    planner.choose();
  }
  for (const Class& c : classes) {
    for (const int index : c.matrices) {
      MatrixPlan& m = plan.matrices[static_cast<std::size_t>(index)];
      m.mode = c.mode;
      if (optim::uses_gram(m.mode) || m.mode == Mode::block_cyclic) {
        static_cast<void>(cut_along_lines(plan, m, m.gram_of_rows));
      }
      if (m.mode == Mode::gram) {
        const Group& g = plan.group(m.parameter);
        m.flops = g.direction().gram_flops(*g.lmo, m.gram_side());
        const bool room = preference != Preference::leanest && plan.depth > 0;
        if (room && has_lone_matrix(plan) &&
            shared_terms_seconds(plan, profile, m) < compute_seconds(plan, profile, m)) {
          m.shared_terms = plan.group(m.parameter).lmo->rational(m.gram_side())->r;
        }
      }
      if (m.mode != Mode::owner) {
        m.seconds = compute_seconds(plan, profile, m) * computed_share(plan, m, 0);
      }
    }
  }
  const Loads loads = assign_owners(profile, plan);

  // Element-wise state goes where state is missing, but not where that would make a rank the last.
  double seconds = 0;
  double bytes = 0;
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const Group& g = plan.group(static_cast<int>(i));
    if (g.lmo != nullptr || plan.parameters[i].held()) continue;
    const auto n = static_cast<double>(plan.parameters[i].size());
    seconds += pass_seconds(profile, pass_bytes(g) * n);
    bytes += state_bytes_per_element(g) * n;
  }
  if (seconds > 0) {
    // How many elements of a long pass take as long as the shortest pass there is.
    const double each = pass_bytes_of_elements(plan);
    constexpr double shortest = 4096;
    constexpr double longest = 1e9;
    placement.least_unit =
        pass_seconds(profile, shortest) / (pass_seconds(profile, longest) / longest) / each;
  }
  bytes = std::max(bytes, 1.0);
  const double mean =
      (std::accumulate(loads.seconds.begin(), loads.seconds.end(), 0.0) + seconds) / plan.ranks;
  const double last =
      std::max(1.2 * mean, *std::max_element(loads.seconds.begin(), loads.seconds.end()));
  std::vector<double> most(loads.bytes.size());
  for (std::size_t r = 0; r < most.size(); ++r) {
    most[r] = seconds > 0 ? std::max(0.0, last - loads.seconds[r]) * bytes / seconds : 1e300;
  }
  const std::vector<double> by_rank = fill(loads.bytes, most, bytes);
  placement.shares.resize(by_rank.size());
  for (int r = 0; r < plan.ranks; ++r) {
    placement.shares[static_cast<std::size_t>(plan.slot_of(r))] =
        by_rank[static_cast<std::size_t>(r)];
  }
  return placement;
}

}  // namespace orthrus::runtime
