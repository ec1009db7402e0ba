#pragma once
/// @file
/// What a ShardedOptimizer holds. `step.cpp` walks it, `checkpoint.cpp` saves it.

#include <array>
#include <memory>
#include <orthrus/sharded_optimizer.hpp>
#include <string>
#include <vector>

#include "comm/mesh.hpp"
#include "kernels/backend.hpp"
#include "runtime/arena.hpp"
#include "runtime/bucket.hpp"
#include "runtime/plan.hpp"

namespace orthrus::runtime {

/// A segment this rank updates, with its state.
struct OwnSegment {
  Segment segment;
  Region region;
  std::size_t bucket = 0;
  int group = 0;
  Index rows = 1, cols = 0;  ///< as the rule sees it
  Index offset_in_part = 0;
  Index norm_slot = 0;            ///< the first of its sums of squares among the plan's
  std::vector<MatrixView> state;  ///< in the order of the rule's `state()`
  MatrixView master;              ///< f32 weights; empty without
};

/// The per-line state of a parameter puts its matrices' lines one after the other: how many come
/// before matrix `matrix`, for state `spec`.
Index first_line(const Plan& plan, int matrix, const optim::StateSpec& spec);

}  // namespace orthrus::runtime

namespace orthrus {

struct ShardedOptimizer::Impl {
  Impl(const Config& config, Communicator comm, std::vector<Parameter> parameters);

  const StepReport& step();
  void set_lr_multiplier(double factor);
  void save(const std::string& directory, const std::map<std::string, std::string>& user);
  std::map<std::string, std::string> load(const std::string& directory);
  std::map<std::string, StateTensor> gather_state();

  /// The segments of one rank of the shard group, without state.
  [[nodiscard]] std::vector<runtime::OwnSegment> segments_of(int shard_rank) const;

  Config config_;
  std::vector<Parameter> parameters_;
  Mesh mesh_;
  /// For what happens between steps (save, load, gather_state): it never meets a bucket on its way,
  /// and waits longer than a step does.
  Communicator setup_;
  std::unique_ptr<kernels::Backend> backend_;
  runtime::Plan plan_;

  runtime::Arena state_arena_, work_arena_;
  std::vector<runtime::OwnSegment> own_;  ///< ascending bucket, then offset
  std::span<std::byte> scratch_, widened_, control_;
  struct WeightSlot {
    std::span<std::byte> bytes;
    Request request;
    int bucket = -1;
  };
  std::array<WeightSlot, runtime::weight_slots> weight_slots_;
  std::unique_ptr<runtime::GradientBuckets> gradients_;

  std::int64_t steps_ = 0;    ///< taken, skipped ones included
  std::int64_t updates_ = 0;  ///< not skipped
  std::int64_t skipped_in_a_row_ = 0;
  double lr_multiplier_ = 1;
  StepReport report_;
  std::vector<double> elements_of_group_, clip_, lr_, weight_decay_;  ///< per group
  std::array<double, 9> recent_ms_{};
  double deadline_s_ = 0;
  bool in_step_ = false;  ///< also after a step that failed midway: no other follows it
  std::int64_t replica_check_every_ = 0;

 private:
  void walk();
  void check_between_steps(const char* what);
  void check_buffers_apart() const;
  void allocate();
  // The walk, in order.
  bool agree_to_go_on();
  double update(runtime::OwnSegment& own, std::byte* weights);
  void gather(std::size_t bucket);
  void deliver(WeightSlot& slot);
  void audit(const Traffic& before);
  void compare_replicas();
  void set_deadline();
  [[nodiscard]] Traffic traffic(TrafficClass c) const;
  [[nodiscard]] Traffic planned_traffic() const;
  Traffic step_began_;         ///< what had been sent before this step's first bucket
  std::int64_t matrices_ = 0;  ///< orthogonalized in this step
};

}  // namespace orthrus
