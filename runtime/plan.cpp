#include "runtime/plan.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <orthrus/error.hpp>
#include <set>

#include "comm/cost.hpp"
#include "comm/mesh.hpp"
#include "runtime/arena.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::runtime {
namespace {

std::string shape_text(const std::vector<Index>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

[[noreturn]] void refuse(const ParameterShape& p, const std::string& why) {
  throw ConfigError("parameter '" + p.name + "' " + shape_text(p.shape) + ": " + why);
}

// ---- parameters --------------------------------------------------------------------------------

void check_parameters(const std::vector<ParameterShape>& parameters) {
  if (parameters.empty()) throw ConfigError("there are no parameters");
  std::set<std::string> names;
  for (const ParameterShape& p : parameters) {
    if (p.name.empty()) throw ConfigError("a parameter has no name");
    const auto ends_with = [&](const std::string& tail) {
      return p.name.size() >= tail.size() &&
             p.name.compare(p.name.size() - tail.size(), tail.size(), tail) == 0;
    };
    if (p.name.starts_with("state/") || ends_with(".codes") || ends_with(".scales")) {
      refuse(p, "names that start with 'state/' or end in '.codes' or '.scales' are reserved");
    }
    if (!names.insert(p.name).second) refuse(p, "the name is used twice");
    if (p.shape.empty()) refuse(p, "the shape is empty (a scalar is [1])");
    double elements = 1;
    for (const Index n : p.shape) {
      if (n < 1) refuse(p, "every dimension must be at least 1");
      elements *= static_cast<double>(n);
    }
    if (elements > 1e17) refuse(p, "its bytes do not fit 64 bits");
    if (!p.strides.empty() && p.strides.size() != p.shape.size()) {
      refuse(p, "it has " + std::to_string(p.strides.size()) + " strides for " +
                    std::to_string(p.shape.size()) + " dimensions");
    }
    std::vector<std::pair<Index, Index>> dimensions;  // stride, extent
    for (std::size_t d = 0; d < p.strides.size(); ++d) {
      if (p.strides[d] < 1) refuse(p, "strides must be at least 1");
      if (p.shape[d] > 1) dimensions.emplace_back(p.strides[d], p.shape[d]);
    }
    std::sort(dimensions.begin(), dimensions.end());
    Index reach = 0;  // of the dimensions so far
    for (const auto& [stride, extent] : dimensions) {
      if (stride <= reach) refuse(p, "its strides let elements overlap");
      reach += stride * (extent - 1);
    }
    if (p.dtype != DType::f32 && p.dtype != DType::bf16) refuse(p, "weights must be f32 or bf16");
    if (p.gradient_dtype != DType::f32 && p.gradient_dtype != DType::bf16) {
      refuse(p, "gradients must be f32 or bf16");
    }
  }
}

/// Heights (or widths) of the blocks that `spec` cuts `extent` into: one number N is N equal
/// blocks.
std::vector<Index> cut(const ParameterShape& p, const std::vector<std::int64_t>& spec, Index extent,
                       const char* what) {
  if (spec.size() == 1) {
    const Index n = spec[0];
    if (n < 1 || extent % n != 0) {
      refuse(p, "split." + std::string(what) + ": " + std::to_string(extent) + " is not " +
                    std::to_string(n) + " equal blocks");
    }
    return std::vector<Index>(static_cast<std::size_t>(n), extent / n);
  }
  if (std::accumulate(spec.begin(), spec.end(), Index{0}) != extent) {
    refuse(p, "split." + std::string(what) + " adds up to " +
                  std::to_string(std::accumulate(spec.begin(), spec.end(), Index{0})) + ", not " +
                  std::to_string(extent));
  }
  return spec;
}

std::vector<LogicalMatrix> logical_matrices(const ParameterShape& p, const SplitConfig& split) {
  const Index rows = p.rows();
  const Index cols = p.cols();
  std::vector<LogicalMatrix> blocks;
  if (!p.views.empty()) {
    // Blocks must tile the parameter: what no matrix covers would never be updated.
    Index covered = 0;
    for (std::size_t i = 0; i < p.views.size(); ++i) {
      const LogicalMatrix& v = p.views[i];
      if (v.rows < 1 || v.cols < 1 || v.row0 < 0 || v.col0 < 0 || v.row0 + v.rows > rows ||
          v.col0 + v.cols > cols) {
        refuse(p, "view " + std::to_string(i) + " leaves the parameter");
      }
      for (std::size_t j = 0; j < i; ++j) {
        const LogicalMatrix& o = p.views[j];
        if (v.row0 < o.row0 + o.rows && o.row0 < v.row0 + v.rows && v.col0 < o.col0 + o.cols &&
            o.col0 < v.col0 + v.cols) {
          refuse(p, "views " + std::to_string(j) + " and " + std::to_string(i) + " overlap");
        }
      }
      covered += v.rows * v.cols;
    }
    if (covered != rows * cols) refuse(p, "its views do not cover it");
    return p.views;
  }
  if (split.stack) {
    if (p.shape.size() != 3) refuse(p, "split.stack needs three dimensions");
    // Expert e is rows [e·shape[1], …) of the parameter seen as (shape[0]·shape[1]) × shape[2]; in
    // the coordinates shape[0] × rest it is one row, and its own shape is `matrix_shape`'s.
    for (Index e = 0; e < p.shape[0]; ++e) blocks.push_back({e, 1, 0, cols});
    return blocks;
  }
  if (!split.rows.empty()) {
    Index row = 0;
    for (const Index h : cut(p, split.rows, rows, "rows")) {
      blocks.push_back({row, h, 0, cols});
      row += h;
    }
    return blocks;
  }
  if (!split.cols.empty()) {
    Index col = 0;
    for (const Index w : cut(p, split.cols, cols, "cols")) {
      blocks.push_back({0, rows, col, w});
      col += w;
    }
    return blocks;
  }
  return {{0, rows, 0, cols}};
}

// ---- groups ------------------------------------------------------------------------------------

Group make_group(const GroupConfig& config, std::size_t index) {
  Group g;
  g.config = &config;
  try {
    g.rule = optim::make_rule(config.rule);
    if (g.rule->is_matrix_rule()) g.lmo = std::make_unique<optim::Lmo>(config.lmo);
  } catch (const ConfigError& e) {
    throw ConfigError("groups[" + std::to_string(index) + "]: " + e.what());
  }
  g.format = config.weights.format == "bf16" ? DType::bf16 : DType::f32;
  g.master = config.weights.residual == "master" && g.format != DType::f32;
  g.stochastic = config.weights.rounding == "stochastic";
  return g;
}

/// The group of each parameter. A matrix rule passes over what has fewer than two dimensions.
void assign_groups(const Config& config, Plan& plan) {
  std::string lost;
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const ParameterShape& p = plan.parameters[i];
    bool passed = false;
    const int g = effective_group(config, p, &passed);
    if (g < 0) {
      lost += (lost.empty() ? "'" : ", '") + p.name + "' " + shape_text(p.shape) +
              (passed ? " (matched by a matrix rule, but it is no matrix)" : "");
    } else if (passed) {
      plan.passed_over.push_back(static_cast<int>(i));
    }
    plan.group_of.push_back(g);
  }
  if (!lost.empty()) {
    throw ConfigError((config.source.empty() ? "" : config.source + ": ") +
                      "groups: no group matches " + lost +
                      "; add a last group with match: \"*\" and an element-wise rule");
  }
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const ParameterShape& p = plan.parameters[i];
    if (plan.virtual_shards > 0 && p.gradient_state != GradientState::local) {
      refuse(p,
             "reproducible sums need every rank's own gradient, but this one is averaged already");
    }
    const Group& g = plan.groups[static_cast<std::size_t>(plan.group_of[i])];
    if (g.format == DType::f32 && p.dtype == DType::bf16) {
      refuse(p,
             "its weights are bf16, but its group says weights.format: f32 (say format: bf16, "
             "with residual: master to keep f32 weights beside them)");
    }
  }
}

/// The matrix of a block: for an expert stack the block is a row that holds shape[1] × shape[2].
std::pair<Index, Index> matrix_shape(const ParameterShape& p, const SplitConfig& split,
                                     const LogicalMatrix& b) {
  if (split.stack && p.views.empty()) return {p.shape[1], p.shape[2]};
  return {b.rows, b.cols};
}

// ---- owners ------------------------------------------------------------------------------------

std::size_t state_bytes_per_element(const Group& g) {
  std::size_t bytes = g.master ? 4 : 0;
  for (const optim::StateSpec& s : g.rule->state()) {
    if (s.extent == optim::StateSpec::Extent::elements) bytes += 4;
  }
  return bytes;
}

std::size_t state_bytes(const Group& g, Index rows, Index cols) {
  std::size_t bytes = g.master ? static_cast<std::size_t>(rows * cols) * 4 : 0;
  for (const optim::StateSpec& s : g.rule->state()) {
    bytes += static_cast<std::size_t>(s.rows(rows, cols) * s.cols(rows, cols)) * 4;
  }
  return bytes;
}

/// Bytes an element-wise update moves per element: gradient, weights and state, read and written.
double pass_bytes(const Group& g) {
  return 12 + 2 * static_cast<double>(state_bytes_per_element(g));
}

/// Longest processing time first, onto the least loaded rank; equal loads go where less state lies.
void assign_owners(Plan& plan, std::vector<double>& load, std::vector<double>& state) {
  std::vector<std::size_t> order(plan.matrices.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return plan.matrices[a].seconds > plan.matrices[b].seconds;
  });
  std::set<std::tuple<double, double, int>> ranks;
  for (int r = 0; r < plan.shard; ++r) ranks.emplace(0.0, 0.0, r);
  for (const std::size_t i : order) {
    MatrixPlan& m = plan.matrices[i];
    const auto [seconds, bytes, rank] = *ranks.begin();
    ranks.erase(ranks.begin());
    m.owner = rank;
    const Group& g =
        plan.groups[static_cast<std::size_t>(plan.group_of[static_cast<std::size_t>(m.parameter)])];
    const double more = static_cast<double>(state_bytes(g, m.rows, m.cols));
    ranks.emplace(seconds + m.seconds, bytes + more, rank);
  }
  load.assign(static_cast<std::size_t>(plan.shard), 0);
  state.assign(static_cast<std::size_t>(plan.shard), 0);
  for (const auto& [seconds, bytes, rank] : ranks) {
    load[static_cast<std::size_t>(rank)] = seconds;
    state[static_cast<std::size_t>(rank)] = bytes;
  }
}

/// Shares of `amount` that bring `levels` as close together as they can: water into uneven vessels.
std::vector<double> fill(const std::vector<double>& levels, double amount) {
  std::vector<double> sorted = levels;
  std::sort(sorted.begin(), sorted.end());
  double surface = 0;
  double below = 0;
  for (std::size_t k = 1; k <= sorted.size(); ++k) {
    below += sorted[k - 1];
    surface = (amount + below) / static_cast<double>(k);
    if (k == sorted.size() || surface <= sorted[k]) break;
  }
  std::vector<double> shares(levels.size());
  for (std::size_t r = 0; r < levels.size(); ++r) shares[r] = std::max(0.0, surface - levels[r]);
  return shares;
}

// ---- buckets -----------------------------------------------------------------------------------

/// Hands the element-wise units of each bucket to ranks so that after every bucket each rank has
/// its share of all elements so far, to within one unit. A unit is at most `norm_block` elements of
/// one parameter.
class ElementDealer {
 public:
  ElementDealer(std::vector<double> shares) : share_(std::move(shares)), got_(share_.size(), 0) {
    const double sum = std::accumulate(share_.begin(), share_.end(), 0.0);
    for (double& s : share_) s = sum > 0 ? s / sum : 1.0 / static_cast<double>(share_.size());
  }

  /// Cuts parameter elements [0, size) of `parameters` (in order) into runs per rank, ranks
  /// ascending.
  void deal(const std::vector<std::pair<int, Index>>& parameters,
            std::vector<std::vector<Segment>>& parts) {
    Index total = 0;
    for (const auto& [id, size] : parameters) total += size;
    if (total == 0) return;
    dealt_ += static_cast<double>(total);
    std::vector<double> want(share_.size());
    double sum = 0;
    for (std::size_t r = 0; r < share_.size(); ++r) {
      want[r] = std::max(0.0, share_[r] * dealt_ - got_[r]);
      sum += want[r];
    }
    double cut = 0;  // where the current rank's part should end
    double at = 0;
    std::size_t rank = 0;
    cut = want[0] * static_cast<double>(total) / sum;
    for (const auto& [id, size] : parameters) {
      for (Index begin = 0; begin < size; begin += Plan::norm_block) {
        const Index n = std::min(Plan::norm_block, size - begin);
        // The unit goes to the rank its middle falls on.
        while (rank + 1 < share_.size() && at + static_cast<double>(n) / 2 > cut) {
          ++rank;
          cut += want[rank] * static_cast<double>(total) / sum;
        }
        auto& part = parts[rank];
        if (!part.empty() && part.back().matrix < 0 && part.back().parameter == id &&
            part.back().begin + part.back().size == begin) {
          part.back().size += n;
        } else {
          part.push_back({id, -1, begin, n, 0, static_cast<int>(rank)});
        }
        got_[rank] += static_cast<double>(n);
        at += static_cast<double>(n);
      }
    }
  }

 private:
  std::vector<double> share_, got_;
  double dealt_ = 0;
};

/// Buckets in the order backward produces gradients: the last parameter first.
void make_buckets(const Config& config, Plan& plan, const std::vector<double>& shares) {
  std::vector<std::vector<int>> blocks_of(plan.parameters.size());
  for (std::size_t m = 0; m < plan.matrices.size(); ++m) {
    blocks_of[static_cast<std::size_t>(plan.matrices[m].parameter)].push_back(static_cast<int>(m));
  }
  std::vector<std::vector<int>> lists;
  std::map<std::pair<DType, bool>, std::size_t> open;
  std::map<std::pair<DType, bool>, Index> filled;
  const auto wire = static_cast<Index>(bytes_of(plan.gradient_wire));
  for (int i = static_cast<int>(plan.parameters.size()) - 1; i >= 0; --i) {
    const ParameterShape& p = plan.parameters[static_cast<std::size_t>(i)];
    const DType format =
        plan.groups[static_cast<std::size_t>(plan.group_of[static_cast<std::size_t>(i)])].format;
    const auto kind = std::pair{format, p.gradient_state == GradientState::local};
    const Index bytes = p.size() * wire;
    if (!open.contains(kind) || filled[kind] + bytes > config.comm.bucket_bytes) {
      open[kind] = lists.size();
      filled[kind] = 0;
      lists.emplace_back();
      plan.buckets.emplace_back();
      plan.buckets.back().weights = kind.first;
      plan.buckets.back().reduced = kind.second;
    }
    lists[open[kind]].push_back(i);
    filled[kind] += bytes;
  }
  ElementDealer dealer(shares);
  for (std::size_t b = 0; b < lists.size(); ++b) {
    Bucket& bucket = plan.buckets[b];
    bucket.parameters = lists[b];
    std::vector<std::vector<Segment>> parts(static_cast<std::size_t>(plan.shard));
    std::vector<std::pair<int, Index>> elements;
    for (const int id : lists[b]) {
      const auto& blocks = blocks_of[static_cast<std::size_t>(id)];
      for (const int m : blocks) {
        const MatrixPlan& matrix = plan.matrices[static_cast<std::size_t>(m)];
        parts[static_cast<std::size_t>(matrix.owner)].push_back(
            {id, m, 0, matrix.block.rows * matrix.block.cols, 0, matrix.owner});
      }
      if (blocks.empty())
        elements.emplace_back(id, plan.parameters[static_cast<std::size_t>(id)].size());
    }
    dealer.deal(elements, parts);
    for (const auto& part : parts) {
      Index count = 0;
      for (Segment s : part) {
        s.offset = bucket.size;
        bucket.size += s.size;
        count += s.size;
        bucket.segments.push_back(s);
      }
      bucket.counts.push_back(count);
    }
  }
}

void make_norm_slots(Plan& plan) {
  Index next = 0;
  plan.parameter_slot.assign(plan.parameters.size(), 0);
  std::vector<std::vector<Index>> blocks(plan.parameters.size());
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
}

// ---- predictions -------------------------------------------------------------------------------

/// What the buffers of a bucket take, where they are cut from an arena.
std::int64_t room(Index elements, std::size_t bytes) {
  return static_cast<std::int64_t>(Arena::rounded(static_cast<std::size_t>(elements) * bytes));
}

/// What a shard's segments need: the same in every replica.
std::vector<RankPlan> predict_shards(const Plan& plan, const MachineProfile& profile) {
  std::vector<RankPlan> shards(static_cast<std::size_t>(plan.shard));
  // A gradient is widened before it is added to what earlier micro-batches left, the owner's or
  // another's.
  std::size_t widest = 0;
  for (const Bucket& b : plan.buckets) {
    for (const Segment& s : b.segments) {
      RankPlan& r = shards[static_cast<std::size_t>(s.rank)];
      const Group& g = plan.groups[static_cast<std::size_t>(
          plan.group_of[static_cast<std::size_t>(s.parameter)])];
      const std::size_t wide = Arena::rounded(static_cast<std::size_t>(s.size) * 4);
      widest = std::max(widest, wide);
      if (b.weights != DType::f32 && !g.master) r.work.widened = std::max(r.work.widened, wide);
      std::size_t scratch = 0;
      Index rows = 1;
      Index cols = s.size;
      if (s.matrix >= 0) {
        const MatrixPlan& m = plan.matrices[static_cast<std::size_t>(s.matrix)];
        rows = m.rows;
        cols = m.cols;
        scratch = optim::matrix_function_workspace_bytes(m.mode, *g.lmo, rows, cols);
        r.flops += m.flops;
        r.seconds += m.seconds;
        r.matrices += g.lmo->orthogonalizes() ? 1 : 0;
      } else {
        r.flops += 12.0 * static_cast<double>(s.size);
        r.seconds += pass_bytes(g) * static_cast<double>(s.size) / profile.copy_bytes;
      }
      r.work.rule = std::max(
          r.work.rule, Arena::rounded(std::max(scratch, g.rule->workspace_bytes(rows, cols))));
      for (const optim::StateSpec& spec : g.rule->state()) {
        r.memory.state += room(spec.rows(rows, cols) * spec.cols(rows, cols), 4);
      }
      if (g.master) r.memory.state += room(s.size, 4);
    }
  }
  for (RankPlan& r : shards) {
    if (plan.virtual_shards > 0 || plan.micro_batches > 1) r.work.widened = widest;
    r.work.control = Arena::rounded(
        static_cast<std::size_t>(std::max(plan.control_before(), plan.control_after())) *
        sizeof(double));
  }
  return shards;
}

/// Gradients of bucket b on their way to world rank w: bytes, messages and the buffers they need.
void add_reduction(const Plan& plan, const Bucket& b, int w, RankPlan& r) {
  const auto s = static_cast<std::size_t>(w % plan.shard);
  const Index mine = b.counts[s];
  WorkSizes& work = r.work;
  const auto at_least = [](std::size_t& size, Index elements, std::size_t bytes) {
    size = std::max(size, static_cast<std::size_t>(room(elements, bytes)));
  };
  if (plan.virtual_shards > 0) {
    const Index roots = plan.roots_of(w);
    r.memory.gradients += plan.depth_of(w) * room(b.size, 4);
    std::vector<Index> to(static_cast<std::size_t>(plan.ranks));
    for (int d = 0; d < plan.ranks; ++d) {
      to[static_cast<std::size_t>(d)] = roots * b.counts[static_cast<std::size_t>(d % plan.shard)];
    }
    r.traffic += cost::all_to_all(to, w, 4, plan.max_chunk);
    // One root to one replica leaves from where it was summed.
    if (roots > 1 || plan.replicate > 1)
      at_least(work.gradient_send, roots * plan.replicate * b.size, 4);
    at_least(work.gradient_receive, plan.all_roots * mine, 4);
    return;
  }
  const std::size_t wire = bytes_of(plan.gradient_wire);
  if (plan.accumulates_locally()) r.memory.gradients += room(b.size, 4);
  at_least(work.gradient_send, b.size, wire);
  at_least(work.gradient_receive, mine, wire);
  for (std::int64_t k = 0; k < plan.reductions(); ++k) {
    r.traffic += cost::all_but_own(b.size, mine, wire, plan.max_chunk);
    if (plan.replicate > 1) {
      r.traffic += cost::all_reduce(mine, plan.replicate, w / plan.shard, wire, plan.max_chunk);
    }
  }
}

void predict(Plan& plan, const MachineProfile& profile) {
  std::int64_t weight_bytes = 0;
  for (const ParameterShape& p : plan.parameters) {
    weight_bytes += p.size() * static_cast<Index>(bytes_of(p.dtype));
  }
  const std::vector<RankPlan> shards = predict_shards(plan, profile);
  plan.per_rank.clear();
  for (int w = 0; w < plan.ranks; ++w) {
    const auto s = static_cast<std::size_t>(w % plan.shard);
    RankPlan r = shards[s];
    r.memory.weights = weight_bytes;
    for (const Bucket& b : plan.buckets) {
      r.memory.gradients += room(b.counts[s], 4);
      if (b.reduced) add_reduction(plan, b, w, r);
      const std::size_t element = bytes_of(b.weights);
      r.traffic += cost::all_but_own(b.size, b.counts[s], element, plan.max_chunk);
      r.work.weight_gather =
          std::max(r.work.weight_gather, static_cast<std::size_t>(room(b.size, element)));
    }
    for (const Index n : {plan.control_before(), plan.control_after()}) {
      r.traffic += cost::all_reduce(n, plan.ranks, w, sizeof(double), plan.max_chunk);
    }
    r.memory.work = r.work.total();
    r.seconds += static_cast<double>(r.traffic.bytes) / profile.wire_bytes +
                 static_cast<double>(r.traffic.messages) * profile.latency_s;
    plan.per_rank.push_back(r);
  }
  double most = 0;
  double sum = 0;
  double most_memory = 0;
  double sum_memory = 0;
  for (const RankPlan& r : plan.per_rank) {
    most = std::max(most, r.seconds);
    sum += r.seconds;
    most_memory = std::max(most_memory, static_cast<double>(r.memory.total()));
    sum_memory += static_cast<double>(r.memory.total());
  }
  const double mean = sum / plan.ranks;
  double largest = mean;
  for (const MatrixPlan& m : plan.matrices) largest = std::max(largest, m.seconds);
  plan.imbalance = mean > 0 ? most / mean : 1;
  plan.memory_imbalance = sum_memory > 0 ? most_memory * plan.ranks / sum_memory : 1;
  plan.load_bound = mean > 0 ? largest / mean : 1;
}

/// One exchange of a reproducible sum is one MPI call, whose displacements are 32-bit.
void check_exchange_sizes(const Plan& plan) {
  constexpr Index most = 0x7fffffff;
  if (plan.virtual_shards == 0) return;
  const Index most_roots = *std::max_element(plan.roots.begin(), plan.roots.end());
  for (const Bucket& b : plan.buckets) {
    const Index largest = *std::max_element(b.counts.begin(), b.counts.end());
    if (b.reduced && (plan.all_roots > most / std::max<Index>(largest, 1) ||
                      most_roots > most / std::max<Index>(plan.replicate * b.size, 1))) {
      throw ConfigError("reproducible.virtual_shards: the sums of '" +
                        plan.parameters[static_cast<std::size_t>(b.parameters.front())].name +
                        "' and what travels with it are " + std::to_string(plan.all_roots) +
                        " partial sums of up to " + std::to_string(largest) +
                        " elements, more than one exchange holds (" + std::to_string(most) +
                        "); use fewer virtual shards or a smaller comm.bucket_bytes");
    }
  }
}

void check_memory_cap(const Config& config, const Plan& plan) {
  if (config.memory_cap <= 0) return;
  std::int64_t most = 0;
  int rank = 0;
  for (int w = 0; w < plan.ranks; ++w) {
    const auto total = plan.per_rank[static_cast<std::size_t>(w)].memory.total();
    if (total > most) {
      most = total;
      rank = w;
    }
  }
  if (most > config.memory_cap) {
    throw ConfigError("memory_cap: rank " + std::to_string(rank) + " needs " +
                      std::to_string(most) + " bytes, the cap is " +
                      std::to_string(config.memory_cap) + "; the smallest cap that fits is " +
                      std::to_string(most));
  }
}

/// What the hash covers: every decision, nothing predicted from a profile's rates.
std::string decisions(const Plan& plan) {
  std::string text;
  const auto add = [&text](auto value) {
    if constexpr (std::is_arithmetic_v<decltype(value)>) {
      text.append(reinterpret_cast<const char*>(&value), sizeof value);
    } else {
      text += value;
      text += '\0';
    }
  };
  add(plan.ranks), add(plan.shard), add(plan.replicate), add(plan.virtual_shards);
  add(plan.micro_batches), add(plan.stage), add(std::string(name_of(plan.gradient_wire)));
  add(plan.max_chunk);
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    add(describe(plan.parameters[i]));
    add(plan.group_of[i]);
  }
  for (const Group& g : plan.groups) {
    const GroupConfig& c = *g.config;
    add(c.rule.name), add(c.lmo.norm), add(c.lmo.coefficients), add(c.lmo.iterations);
    add(c.lmo.scale), add(c.lmo.eps_mode), add(c.lmo.dtype), add(c.weights.format);
    add(c.weights.rounding), add(c.weights.residual);
  }
  for (const MatrixPlan& m : plan.matrices) {
    add(m.name), add(m.block.row0), add(m.block.rows), add(m.block.col0), add(m.block.cols);
    add(std::string(optim::name_of(m.mode))), add(m.owner);
  }
  for (const Bucket& b : plan.buckets) {
    add(std::string(name_of(b.weights))), add(b.reduced ? 1 : 0);
    for (const Segment& s : b.segments) {
      add(s.parameter), add(s.matrix), add(s.begin), add(s.size), add(s.rank);
    }
  }
  return text;
}

}  // namespace

Index ParameterShape::size() const {
  Index n = 1;
  for (const Index d : shape) n *= d;
  return n;
}
Index ParameterShape::rows() const { return shape.front(); }
Index ParameterShape::cols() const { return size() / shape.front(); }

int effective_group(const Config& config, const ParameterShape& p, bool* passed_over) {
  int g = matching_group(config, p.name);
  while (g >= 0 && p.shape.size() < 2) {
    const optim::RuleRow* rule =
        optim::find_rule(config.groups[static_cast<std::size_t>(g)].rule.name);
    if (rule == nullptr || !rule->matrix) break;
    if (passed_over != nullptr) *passed_over = true;
    g = matching_group(config, p.name, g + 1);
  }
  return g;
}

ParameterShape shape_of(const Parameter& p) {
  return {p.name, p.shape, p.strides, p.dtype, p.gradient_dtype, p.gradient_state, p.views};
}

std::string describe(const ParameterShape& p) {
  std::string text = "'" + p.name + "' " + std::string(name_of(p.dtype)) + " " +
                     shape_text(p.shape) + ", gradient " + std::string(name_of(p.gradient_dtype)) +
                     (p.gradient_state == GradientState::local ? " local" : " averaged");
  for (const LogicalMatrix& v : p.views) {
    text += " view(" + std::to_string(v.row0) + "+" + std::to_string(v.rows) + ", " +
            std::to_string(v.col0) + "+" + std::to_string(v.cols) + ")";
  }
  return text;
}

Index Bucket::part_offset(int rank) const {
  return std::accumulate(counts.begin(), counts.begin() + rank, Index{0});
}

Leaves Plan::leaves_of(int world_rank) const { return leaf_run(virtual_shards, ranks, world_rank); }

Plan make_plan(const Config& config, std::vector<ParameterShape> parameters, int ranks,
               const MachineProfile& profile, Index max_chunk) {
  check_parameters(parameters);
  Plan plan;
  const MeshShape mesh = mesh_shape(ranks, static_cast<int>(config.mesh.shard),
                                    static_cast<int>(config.mesh.replicate));
  plan.ranks = ranks;
  plan.shard = mesh.shard;
  plan.replicate = mesh.replicate;
  plan.virtual_shards = static_cast<int>(config.virtual_shards);
  plan.micro_batches = config.train.micro_batches;
  plan.stage = static_cast<int>(config.zero_stage);
  plan.gradient_wire = config.comm.gradient_dtype == "bf16" ? DType::bf16 : DType::f32;
  plan.max_chunk = max_chunk;
  for (int w = 0; w < ranks; ++w) {
    int depth = 0;
    const auto roots = plan.virtual_shards > 0
                           ? subtree_roots(plan.virtual_shards, plan.leaves_of(w), &depth)
                           : std::vector<Leaves>{};
    plan.roots.push_back(std::ssize(roots));
    plan.depths.push_back(depth);
    plan.all_roots += std::ssize(roots);
  }
  plan.parameters = std::move(parameters);
  for (std::size_t g = 0; g < config.groups.size(); ++g) {
    plan.groups.push_back(make_group(config.groups[g], g));
  }
  assign_groups(config, plan);

  double element_bytes = 0;
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const ParameterShape& p = plan.parameters[i];
    const Group& g = plan.groups[static_cast<std::size_t>(plan.group_of[i])];
    if (g.lmo == nullptr) {
      element_bytes +=
          static_cast<double>(state_bytes_per_element(g)) * static_cast<double>(p.size());
      continue;
    }
    const auto blocks = logical_matrices(p, g.config->split);
    for (std::size_t k = 0; k < blocks.size(); ++k) {
      MatrixPlan m;
      m.name = blocks.size() == 1 ? p.name : p.name + "#" + std::to_string(k);
      m.parameter = static_cast<int>(i);
      m.block = blocks[k];
      std::tie(m.rows, m.cols) = matrix_shape(p, g.config->split, blocks[k]);
      m.flops = g.lmo->flops(m.rows, m.cols);
      m.seconds = m.flops / (g.config->lmo.dtype == "bf16" ? profile.gemm_flops_bf16
                                                           : profile.gemm_flops_f32) +
                  pass_bytes(g) * static_cast<double>(m.rows * m.cols) / profile.copy_bytes;
      plan.matrices.push_back(std::move(m));
    }
  }
  std::vector<double> load;
  std::vector<double> state;
  assign_owners(plan, load, state);
  make_buckets(config, plan, fill(state, std::max(element_bytes, 1.0)));
  make_norm_slots(plan);
  check_exchange_sizes(plan);
  predict(plan, profile);
  const std::string text = decisions(plan);
  plan.hash = xxh3_hex(text.data(), text.size());
  check_memory_cap(config, plan);
  return plan;
}

}  // namespace orthrus::runtime
