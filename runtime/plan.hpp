#pragma once
/// @file
/// Plan: everything decided before step 1. Pure: no MPI, no device; a function of the
/// configuration, the parameters and the mesh, and therefore equal on all ranks.

#include <cstdint>
#include <memory>
#include <numeric>
#include <orthrus/communicator.hpp>
#include <orthrus/config.hpp>
#include <orthrus/sharded_optimizer.hpp>
#include <string>
#include <vector>

#include "kernels/region.hpp"
#include "optim/lmo.hpp"
#include "optim/matrix_function.hpp"
#include "optim/rule.hpp"
#include "runtime/machine.hpp"
#include "runtime/tree.hpp"
#include "runtime/weight_format.hpp"

namespace orthrus::runtime {

/// A parameter without its buffers: all the plan looks at.
struct ParameterShape {
  std::string name;
  std::vector<Index> shape;
  std::vector<Index> strides;
  DType dtype = DType::f32;
  DType gradient_dtype = DType::f32;
  GradientState gradient_state = GradientState::local;
  std::vector<LogicalMatrix> views;
  Sharding sharding;
  bool f32_only = false;
  bool as_codes = false;  ///< the trainer has codes and scales of it, no weights

  [[nodiscard]] Index size() const;
  [[nodiscard]] Index rows() const;  ///< shape[0]
  [[nodiscard]] Index cols() const;  ///< the product of the rest
  /// Do the trainer's buffers hold only this rank's part?
  [[nodiscard]] bool held() const { return sharding.along != Sharding::Along::none; }
  /// What its shards are counted in: rows, columns or elements.
  [[nodiscard]] Index lines() const;
  /// What shard rank `r` of `ranks` holds (of a held parameter).
  [[nodiscard]] Region part(int r, int ranks) const;
};
ParameterShape shape_of(const Parameter& parameter);
/// The group that updates it: a matrix rule passes over what has fewer than two dimensions.
/// @return -1 when there is none. @param[out] passed_over  a matrix rule matched first.
int effective_group(const Config& config, const ParameterShape& parameter,
                    bool* passed_over = nullptr);
/// "name f32 [4, 5] gradient f32 local": what ranks compare.
std::string describe(const ParameterShape& parameter);

struct MatrixPlan;

/// What a group's entries became.
struct Group {
  const GroupConfig* config = nullptr;
  std::shared_ptr<const optim::Rule> rule;
  std::shared_ptr<const optim::Lmo> lmo;  ///< of matrix rules
  WeightFormat format;
  WeightFormat momentum;  ///< how the first of the rule's states rests
  Residual residual = Residual::none;
  bool master = false;  ///< f32 weights kept beside rounded ones
  bool stochastic = false;
  double max_correction = 0;  ///< ECO: share of the momentum's norm; 0: any
  bool linear = false;        ///< is U linear in the momentum?
  /// ECO?
  [[nodiscard]] bool feeds_back() const { return residual == Residual::momentum; }
  /// Does the momentum rest in fewer bits than it is updated in?
  [[nodiscard]] bool compresses() const { return momentum != WeightFormat{}; }
  /// Bytes of state `k` of the rule, of a rows×cols piece (matrix, where it is of a matrix).
  [[nodiscard]] std::size_t state_bytes(std::size_t k, Index rows, Index cols) const {
    if (k == 0 && compresses()) return momentum.bytes(rows, cols);
    const optim::StateSpec& spec = rule->state()[k];
    return static_cast<std::size_t>(spec.rows(rows, cols) * spec.cols(rows, cols)) * sizeof(float);
  }
  /// Do the rows of an element-wise parameter stay whole? They share a scale, or a guard.
  [[nodiscard]] bool keeps_rows() const {
    return format.quantized() || momentum.quantized() || (feeds_back() && max_correction > 0);
  }
  /// The rule of a group with an `lmo`.
  [[nodiscard]] const optim::MatrixRule& matrix_rule() const {
    return static_cast<const optim::MatrixRule&>(*rule);
  }
  [[nodiscard]] const optim::Direction& direction() const { return matrix_rule().direction(); }
  /// s of a matrix's direction.
  [[nodiscard]] double scale(const MatrixPlan& m) const;
  /// η before schedule and multiplier.
  [[nodiscard]] double lr() const;
  /// Steepest descent in the spectral norm, and nothing else: muon.
  [[nodiscard]] bool is_spectral_descent() const {
    return config->rule.name == "muon" && config->lmo.norm == "spectral";
  }
  /// Of a group with an `lmo`: does its step count as orthogonalized?
  [[nodiscard]] bool orthogonalizes() const { return direction().orthogonalizes(*lmo); }
};

/// One logical matrix of a matrix rule.
struct MatrixPlan {
  std::string name;  ///< the parameter's, with "#k" for block k of several
  int parameter = 0;
  Region region;             ///< its rows in the parameter's flat order
  Index rows = 0, cols = 0;  ///< its shape: the region's
  optim::Mode mode = optim::Mode::owner;
  int owner = 0;  ///< world rank that computes it (where several do: that saves its line state)
  /// Gram modes: Z·Zᵀ of the rows (pieces are columns) or ZᵀZ of the columns (pieces are rows).
  bool gram_of_rows = true;
  optim::Stack stack = optim::Stack::x;  ///< what Z is: there, and in block_cyclic
  /// Of what is done in turns, in [0, 1): apart from the other costly matrices of its group.
  double phase = 0;
  int bound_slot = -1;  ///< Gram modes: where its gradient's norm is summed
  /// The model's only matrix, rational, in mode gram: inverses that the ranks of its shard group
  /// compute between them and then all have. 0: every rank computes all that there is.
  int shared_terms = 0;
  double flops = 0;    ///< of its LMO
  double seconds = 0;  ///< predicted: its LMO and update, on the rank that has most of it
  /// Elements of a line across the side that no piece cuts.
  [[nodiscard]] Index line_length() const { return gram_of_rows ? rows : cols; }
  /// Side of the Gram matrix.
  [[nodiscard]] Index gram_side() const {
    return line_length() * optim::gram_blocks(stack, gram_of_rows);
  }
  /// Shape of Z where X is r×c: of the matrix, or of a piece.
  [[nodiscard]] Index z_rows(Index r) const { return stack == optim::Stack::above ? 2 * r : r; }
  [[nodiscard]] Index z_cols(Index c) const { return stack == optim::Stack::beside ? 2 * c : c; }
  /// Lines of Z across the side that no piece cuts.
  [[nodiscard]] Index z_lines(const Region& piece) const {
    return gram_of_rows ? z_cols(piece.cols) : z_rows(piece.rows);
  }
};

inline double Group::scale(const MatrixPlan& m) const {
  return direction().scale(*lmo, m.rows, m.cols);
}

/// A run of elements on one rank: a piece of a logical matrix, or part of a parameter.
struct Segment {
  int parameter = 0;
  int matrix = -1;   ///< index into `Plan::matrices`, or -1: element-wise
  Region region;     ///< in the parameter's flat order
  Index offset = 0;  ///< first element in the bucket
  int rank = 0;      ///< world rank; of held parameters the shard coordinate
  Index place = 0;   ///< of its weights in the bucket, in units of their format
  [[nodiscard]] Index size() const { return region.size(); }
};

/// Parameters that travel together. Parts lie in slot order, each part's segments in parameter
/// order.
struct Bucket {
  struct Part {
    int slot = 0;
    Index offset = 0, size = 0;
    Index place = 0, units = 0;  ///< of its weights
    Index at_rest = 0;           ///< bytes of its weights' pieces, as stage 3 gathers them
  };
  std::vector<int> parameters;
  std::vector<Segment> segments;  ///< ascending offset
  std::vector<Part> parts;        ///< those that are not empty, ascending slot
  std::vector<int> matrices;      ///< of a sharded mode, in the order they meet
  Index size = 0;                 ///< elements that travel (none of held parameters)
  Index units = 0;                ///< of weights that travel
  WeightFormat weights;           ///< on the wire, and at rest
  bool reduced = true;            ///< false: gradients are averaged already, nothing is sent
  bool held = false;  ///< the trainer's buffers are the shards: nothing is reduced or gathered
  optim::Mode mode = optim::Mode::owner;
  std::int64_t period = 1;
  DType wire = DType::f32;  ///< of what meets
  int brings = 1;           ///< pieces of X, or (2) of X and of G; gram_steps, block_cyclic: of Z
  bool lone = false;        ///< gram: holds the model's only matrix, which every rank computes…
  int shared_terms = 0;     ///< …or its share of so many terms
  bool rounds_together = false;  ///< line 7 concerns several ranks (rounding.hpp)

  /// First element at or after slot `slot`.
  [[nodiscard]] Index offset_of(int slot) const;
  [[nodiscard]] Index count_of(int slot) const { return offset_of(slot + 1) - offset_of(slot); }
  /// First unit of weights at or after slot `slot`.
  [[nodiscard]] Index place_of(int slot) const;
  /// Are there steps in which nothing meets, and every segment is updated where it is?
  [[nodiscard]] bool stays_apart() const {
    return mode == optim::Mode::owner || mode == optim::Mode::block_local ||
           mode == optim::Mode::periodic;
  }
  /// Do pieces meet in the step of update `t`?
  [[nodiscard]] bool meets(std::int64_t t) const {
    return mode == optim::Mode::periodic ? (t - 1) % period == 0 : !stays_apart();
  }
};

/// One bucket's turn in a step (`step.cpp` says what happens then).
struct Turn {
  enum class Kind : std::uint8_t { depart, arrive, compute, send_back, complete };
  Kind kind = Kind::complete;
  int bucket = 0;
};

/// A matrix that diagnostics look at, whole, on one rank (probing.hpp).
struct Probed {
  std::string name;  ///< as a MatrixPlan's, or the parameter's
  int parameter = 0;
  int matrix = -1;  ///< index into `Plan::matrices`, or -1: all of a parameter of another rule
  Region region;    ///< in the parameter's flat order
  int analyst = 0;  ///< world rank
};

/// Buckets in flight: gradients on their way, and new weights.
inline constexpr int gradient_slots = 3;
inline constexpr int weight_slots = 2;

/// Bytes of each work buffer of a rank: what `MemoryPlan::work` adds up.
struct WorkSizes {
  std::size_t gradient_send = 0, gradient_receive = 0;  ///< per gradient slot
  std::size_t meetings = 0;                             ///< what pieces of matrices meet in
  std::size_t weight_gather = 0;                        ///< per weight slot
  std::size_t gathered =
      0;                    ///< ZeRO-3: per staging buffer of the working set, of which there are 2
  std::size_t rule = 0;     ///< LMO and rule scratch
  std::size_t widened = 0;  ///< a panel of weights in f32…
  std::size_t narrowed = 0;  ///< …and rounded, on its way to the trainer
  std::size_t rounding = 0;  ///< pieces of a bucket that ranks round together
  std::size_t control = 0;
  std::size_t probe_send = 0, probe_receive = 0;  ///< of a bucket's matrices on their way
  std::size_t probe_noise = 0;                    ///< of a bucket's noise in dual norms
  std::size_t probe_host = 0;                     ///< what an analyst computes in
  [[nodiscard]] std::int64_t total() const {
    return static_cast<std::int64_t>(gradient_slots * (gradient_send + gradient_receive) +
                                     meetings + weight_slots * weight_gather + 2 * gathered + rule +
                                     widened + narrowed + rounding + control + probe_send +
                                     probe_receive + probe_noise + probe_host);
  }
};

/// Predictions of one rank for one step.
struct RankPlan {
  Traffic traffic;  ///< of a step in which all meet
  Traffic gathers;  ///< of it: whole weights for the trainer (ZeRO-3)
  Traffic probe;    ///< beyond it, in a step in which matrices are looked at (`Plan::probed`)
  double flops = 0;
  double seconds = 0;  ///< of computing
  std::int64_t matrices = 0;
  /// What is different in steps in which matrices of mode `periodic` do not meet.
  struct Periodic {
    std::int64_t period = 1;
    Traffic traffic;            ///< that is not sent
    std::int64_t matrices = 0;  ///< orthogonalized more (or less)
  };
  std::vector<Periodic> periodic;
  MemoryPlan memory;
  WorkSizes work;

  [[nodiscard]] Traffic traffic_of(std::int64_t update) const;
  [[nodiscard]] std::int64_t matrices_of(std::int64_t update) const;
};

struct Plan {
  int ranks = 1, shard = 1, replicate = 1;
  /// How collectives over all slots are walked, innermost first: ranks of a node, nodes of a shard
  /// group, replicas. World rank w has coordinate w mod levels[0] in the first, and so on.
  std::vector<int> levels;
  int virtual_shards = 0;          ///< leaves of reproducible sums; 0: off
  std::int64_t micro_batches = 1;  ///< per step and rank where not reproducible
  int stage = 2;
  DType gradient_wire = DType::f32;
  Index max_chunk = 0x7fffffff;
  std::vector<ParameterShape> parameters;
  std::vector<int> group_of;  ///< per parameter
  std::vector<Group> groups;
  std::vector<MatrixPlan> matrices;
  std::vector<Index> row_length;  ///< per parameter: elements of a row, where rows have scales
  std::vector<std::size_t>
      at_rest;  ///< per parameter: bytes of its pieces, as stage 3 gathers them
  /// Codes and scales of parameter i, whole: an address each, or one after the other.
  /// @pre its trainer has it as codes; `both` is a multiple of 4
  [[nodiscard]] QuantizedView whole_codes(std::size_t i, void* codes, float* scales) const;
  [[nodiscard]] QuantizedView whole_codes(std::size_t i, void* both) const;
  /// Bytes of parameter i as its trainer has it, whole; and as stage 3 makes it whole.
  [[nodiscard]] std::size_t trainers_bytes(std::size_t i) const;
  [[nodiscard]] std::size_t gathered_bytes(std::size_t i) const;
  /// Stage 3: every piece in a message begins at a multiple of so many bytes.
  std::size_t piece_alignment = 1;
  /// Bytes of a segment's weights in such a message.
  [[nodiscard]] std::size_t piece_bytes(const Bucket& bucket, const Segment& s) const;
  std::vector<int> passed_over;  ///< parameters that a matrix rule matched but that are no matrices
  std::vector<Bucket> buckets;   ///< in the order backward fills them
  int depth = 2;                 ///< matrices per rank that are computed at a time (schedule.hpp)
  std::vector<Turn> schedule;    ///< the global order of what follows backward
  std::vector<RankPlan> per_rank;  ///< by world rank
  double imbalance = 1;            ///< max/mean of predicted seconds of computing
  double memory_imbalance = 1;     ///< max/mean of weights, gradients and state
  double load_bound = 1;  ///< (largest unsplittable matrix or the mean) / mean: what is reachable
  std::string hash;       ///< 32 hex digits over all of the above

  /// Slots: the order of ranks inside a bucket, such that what one rank has after each level of a
  /// reduction is one run. The outermost level counts fastest.
  [[nodiscard]] int slot_of(int world_rank) const;
  [[nodiscard]] int rank_of(int slot) const;
  /// What the ranks that share `world_rank`'s coordinates below `level` have of a bucket, cut by
  /// their coordinate at `level`.
  struct Cut {
    Index begin = 0, size = 0;
    std::vector<Index> counts;
    int coordinate = 0;
    [[nodiscard]] Index own() const { return counts[static_cast<std::size_t>(coordinate)]; }
    [[nodiscard]] Index own_begin() const {
      return std::accumulate(counts.begin(), counts.begin() + coordinate, begin);
    }
  };
  [[nodiscard]] Cut cut_of(const Bucket& bucket, int world_rank, std::size_t level) const;
  /// The same of its weights, in their units.
  [[nodiscard]] Cut weights_cut_of(const Bucket& bucket, int world_rank, std::size_t level) const;
  /// The same of anything that lies in slot order over the first `count` levels: `offset(slot)` is
  /// where a slot's begins (also of the slot after the last).
  template <class Offset>
  void cut_slots(int slot, std::size_t level, std::size_t count, Offset&& offset, Cut& cut) const {
    int stride = 1;  // slots that share all coordinates up to `level`
    for (std::size_t i = level + 1; i < count; ++i) stride *= levels[i];
    const int group = stride * levels[level];
    const int base = slot / group * group;
    cut.begin = offset(base);
    cut.coordinate = (slot - base) / stride;
    cut.counts.clear();
    Index at = cut.begin;
    for (int c = 1; c <= levels[level]; ++c) {
      const Index end = offset(base + c * stride);
      cut.counts.push_back(end - at);
      at = end;
    }
    cut.size = at - cut.begin;
  }
  /// Levels inside the shard group.
  [[nodiscard]] std::size_t shard_levels() const { return levels.size() - (replicate > 1 ? 1 : 0); }
  /// ZeRO-3: weights rest in shards, and are whole only while they are used.
  [[nodiscard]] bool weights_sharded() const { return stage == 3; }
  /// `bytes` in whole pages of the device: how whole weights lie in a working set.
  [[nodiscard]] std::size_t pages(std::size_t bytes) const {
    return (bytes + page_bytes - 1) / page_bytes * page_bytes;
  }
  std::size_t page_bytes = 4096;
  bool on_host = true;  ///< the ranks' processors compute, not a device of theirs
  std::int64_t bucket_bytes = 0;
  std::int64_t working_set = 0;  ///< bytes of weights gathered at a time; 0: all
  std::int64_t gathers = 2;      ///< of each weight per step, for predictions

  [[nodiscard]] Leaves leaves_of(int world_rank) const;
  /// Roots `world_rank` sends of each gradient (reproducible).
  [[nodiscard]] Index roots_of(int world_rank) const {
    return roots[static_cast<std::size_t>(world_rank)];
  }
  /// Partial sums `world_rank` holds at most (reproducible).
  [[nodiscard]] int depth_of(int world_rank) const {
    return depths[static_cast<std::size_t>(world_rank)];
  }
  std::vector<Index> roots;  ///< per world rank; 0 where not reproducible
  std::vector<int> depths;
  Index all_roots = 0;
  /// Gradients accumulate here before one reduction (stage 1 with several micro-batches).
  [[nodiscard]] bool accumulates_locally() const {
    return virtual_shards == 0 && stage == 1 && micro_batches > 1;
  }
  /// Reductions of a bucket per step.
  [[nodiscard]] std::int64_t reductions() const {
    return virtual_shards > 0 || accumulates_locally() ? 1 : micro_batches;
  }
  [[nodiscard]] const Group& group(int parameter) const {
    return groups[static_cast<std::size_t>(group_of[static_cast<std::size_t>(parameter)])];
  }
  /// Does `world_rank` have this segment? (Of held parameters every replica has it.)
  [[nodiscard]] bool has(const Bucket& b, const Segment& s, int world_rank) const {
    return s.rank == (b.held ? world_rank % shard : world_rank);
  }
  /// Does matrix m meet in the replica of `world_rank`?
  [[nodiscard]] bool meets_in(const Bucket& b, const MatrixPlan& m, int world_rank) const {
    return b.held || m.owner / shard == world_rank / shard;
  }
  /// Elements of the first control all-reduce (flag, rate, its square, then sums
  /// of squared gradients) and of
  /// the second (sums of squared updates, what rounding did, then the audit's flag).
  [[nodiscard]] Index control_before() const { return 3 + norm_slots + bound_slots + noise_slots; }
  [[nodiscard]] Index control_after() const {
    return static_cast<Index>(groups.size()) + rounding_slots + 1;
  }
  /// Of each group whose weights are rounded, between those: sums over what rounding did.
  static constexpr Index rounding_sums = 7;
  Index rounding_slots = 0;
  std::vector<Index> rounding_slot;  ///< first of each group

  /// Sums of squares: one slot per group; in clipped groups of a reproducible run one per matrix
  /// and per block of `norm_block` elements, added up by the tree.
  Index norm_slots = 0;
  std::vector<Index> group_slot;   ///< first slot of each group
  std::vector<Index> group_slots;  ///< how many
  std::vector<Index>
      parameter_slot;         ///< first slot of each parameter (blocked groups), else its group's
  std::vector<bool> blocked;  ///< per group
  Index bound_slots = 0;      ///< matrices in a Gram mode, whose norm is kept in bounds
  /// Where gradient noise is measured: two per parameter, what contributions squared and what their
  /// mean squared come to. In the other steps they are zeros, so that every step sends the same.
  Index noise_slots = 0;
  /// Noise between single examples, as the trainer hands them over: a third one per parameter, how
  /// many there were.
  bool noise_of_examples = false;
  [[nodiscard]] Index noise_sums() const { return noise_of_examples ? 3 : 2; }
  /// Gradients behind a mean.
  [[nodiscard]] std::int64_t contributions() const {
    return virtual_shards > 0 ? virtual_shards : ranks * micro_batches;
  }
  static constexpr Index norm_block = 4096;
  bool looks = false;              ///< `diagnostics.spectra`
  bool looks_at_noise = false;     ///< `diagnostics.dual_noise`
  bool looks_at_dynamics = false;  ///< `diagnostics.dynamics`
  std::vector<Probed> probed;      ///< in the order of parameters; empty where it does not
};

/// @throws ConfigError  no group matches a parameter, a view leaves its parameter or overlaps
/// another, a
///         format contradicts a dtype, the memory cap is too small: the message names the
///         parameter.
/// @param tasks  `Backend::tasks_at_once` of every rank, for which there is to be scratch.
Plan make_plan(const Config& config, std::vector<ParameterShape> parameters, int ranks,
               const MachineProfile& profile = {}, Index max_chunk = 0x7fffffff, int tasks = 1);

/// The document of `orthrus plan --json`. @param indent  -1: one line. @param step_seconds  of
/// `make_timeline`; 0: not predicted.
std::string plan_json(const Plan& plan, int indent = -1, double step_seconds = 0);
/// The table of `orthrus plan`: equal matrices in one line.
std::string plan_table(const Plan& plan, double step_seconds = 0);

}  // namespace orthrus::runtime
