#pragma once
/// @file
/// Plan: everything decided before step 1. Pure: no MPI, no device; a function of the
/// configuration, the parameters and the mesh, and therefore equal on all ranks.

#include <cstdint>
#include <memory>
#include <orthrus/communicator.hpp>
#include <orthrus/config.hpp>
#include <orthrus/sharded_optimizer.hpp>
#include <string>
#include <vector>

#include "optim/lmo.hpp"
#include "optim/matrix_function.hpp"
#include "optim/rule.hpp"
#include "runtime/tree.hpp"

namespace orthrus::runtime {

/// Rates the planner predicts with. The defaults are one core of a current server.
struct MachineProfile {
  std::string name = "default-cpu";
  double gemm_flops_f32 = 8e10;
  double gemm_flops_bf16 = 1.8e11;
  double copy_bytes = 8e9;  ///< element-wise passes, bytes read and written per second
  double latency_s = 2e-6;  ///< per message
  double wire_bytes = 5e9;  ///< per second and rank
};

/// A parameter without its buffers: all the plan looks at.
struct ParameterShape {
  std::string name;
  std::vector<Index> shape;
  std::vector<Index> strides;
  DType dtype = DType::f32;
  DType gradient_dtype = DType::f32;
  GradientState gradient_state = GradientState::local;
  std::vector<LogicalMatrix> views;

  [[nodiscard]] Index size() const;
  [[nodiscard]] Index rows() const;  ///< shape[0]
  [[nodiscard]] Index cols() const;  ///< the product of the rest
};
ParameterShape shape_of(const Parameter& parameter);
/// The group that updates it: a matrix rule passes over what has fewer than two dimensions.
/// @return -1 when there is none. @param[out] passed_over  a matrix rule matched first.
int effective_group(const Config& config, const ParameterShape& parameter,
                    bool* passed_over = nullptr);
/// "name f32 [4, 5] gradient f32 local": what ranks compare.
std::string describe(const ParameterShape& parameter);

/// What a group's entries became.
struct Group {
  const GroupConfig* config = nullptr;
  std::unique_ptr<optim::Rule> rule;
  std::unique_ptr<optim::Lmo> lmo;  ///< of matrix rules
  bool master = false;              ///< f32 weights kept beside rounded ones
  bool stochastic = false;
  DType format = DType::f32;
};

/// One logical matrix of a matrix rule.
struct MatrixPlan {
  std::string name;  ///< the parameter's, with "#k" for block k of several
  int parameter = 0;
  LogicalMatrix block;       ///< where it lies in the parameter
  Index rows = 0, cols = 0;  ///< its shape (an expert of a stack lies in one row of the parameter)
  optim::Mode mode = optim::Mode::owner;
  int owner = 0;
  double flops = 0, seconds = 0;
};

/// A run of elements in a bucket, on one rank: a whole logical matrix, or part of a parameter.
struct Segment {
  int parameter = 0;
  int matrix = -1;  ///< index into `Plan::matrices`, or -1: elements [begin, begin + size)
  Index begin = 0;  ///< first flat element of the parameter (element-wise)
  Index size = 0;
  Index offset = 0;  ///< first element in the bucket
  int rank = 0;      ///< in the shard group
};

/// Parameters that travel together. Parts lie in rank order, each rank's segments in parameter
/// order.
struct Bucket {
  std::vector<int> parameters;
  std::vector<Segment> segments;  ///< ascending offset
  std::vector<Index> counts;      ///< elements per rank of the shard group
  Index size = 0;
  DType weights = DType::f32;  ///< on the wire, and at rest
  bool reduced = true;         ///< false: gradients are averaged already, nothing is sent

  [[nodiscard]] Index part_offset(int rank) const;
};

/// Buckets in flight: gradients on their way, and new weights on theirs.
inline constexpr int gradient_slots = 3;
inline constexpr int weight_slots = 2;

/// Bytes of each work buffer of a rank: what `MemoryPlan::work` adds up.
struct WorkSizes {
  std::size_t gradient_send = 0, gradient_receive = 0;  ///< per gradient slot
  std::size_t weight_gather = 0;                        ///< per weight slot
  std::size_t rule = 0;                                 ///< LMO and rule scratch
  std::size_t widened = 0;                              ///< a segment in f32
  std::size_t control = 0;
  [[nodiscard]] std::int64_t total() const {
    return static_cast<std::int64_t>(gradient_slots * (gradient_send + gradient_receive) +
                                     weight_slots * weight_gather + rule + widened + control);
  }
};

/// Predictions of one rank for one step.
struct RankPlan {
  Traffic traffic;
  double flops = 0, seconds = 0;
  std::int64_t matrices = 0;
  MemoryPlan memory;
  WorkSizes work;
};

struct Plan {
  int ranks = 1, shard = 1, replicate = 1;
  int virtual_shards = 0;          ///< leaves of reproducible sums; 0: off
  std::int64_t micro_batches = 1;  ///< per step and rank where not reproducible
  int stage = 2;
  DType gradient_wire = DType::f32;
  Index max_chunk = 0x7fffffff;
  std::vector<ParameterShape> parameters;
  std::vector<int> group_of;  ///< per parameter
  std::vector<Group> groups;
  std::vector<MatrixPlan> matrices;
  std::vector<int> passed_over;  ///< parameters that a matrix rule matched but that are no matrices
  std::vector<Bucket> buckets;   ///< in the global order of collectives
  std::vector<RankPlan> per_rank;  ///< by world rank
  double imbalance = 1;            ///< max/mean of predicted seconds
  double memory_imbalance = 1;
  double load_bound = 1;  ///< (largest unsplittable matrix or the mean) / mean: what is reachable
  std::string hash;       ///< 32 hex digits over all of the above

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
  /// Elements of the first control all-reduce (flag, rate, its square, then sums
  /// of squared gradients) and of
  /// the second (sums of squared updates, then the audit's flag).
  [[nodiscard]] Index control_before() const { return 3 + norm_slots; }
  [[nodiscard]] Index control_after() const { return static_cast<Index>(groups.size()) + 1; }

  /// Sums of squares: one slot per group; in clipped groups of a reproducible run one per matrix
  /// and per block of `norm_block` elements, added up by the tree.
  Index norm_slots = 0;
  std::vector<Index> group_slot;   ///< first slot of each group
  std::vector<Index> group_slots;  ///< how many
  std::vector<Index>
      parameter_slot;         ///< first slot of each parameter (blocked groups), else its group's
  std::vector<bool> blocked;  ///< per group
  static constexpr Index norm_block = 4096;
};

/// @throws ConfigError  no group matches a parameter, a view leaves its parameter or overlaps
/// another, a
///         format contradicts a dtype, the memory cap is too small: the message names the
///         parameter.
Plan make_plan(const Config& config, std::vector<ParameterShape> parameters, int ranks,
               const MachineProfile& profile = {}, Index max_chunk = 0x7fffffff);

/// The document of `orthrus plan --json`. @param indent  -1: one line.
std::string plan_json(const Plan& plan, int indent = -1);
/// The table of `orthrus plan`.
std::string plan_table(const Plan& plan);

}  // namespace orthrus::runtime
