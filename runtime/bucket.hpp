#pragma once
/// @file
/// Gradient buckets: lines 1 and 2 of the walk. Gradients are packed as they become ready; a full
/// bucket travels while backward goes on; what arrives is this rank's part of the mean, in f32.

#include <orthrus/communicator.hpp>
#include <string>
#include <vector>

#include "comm/mesh.hpp"
#include "kernels/backend.hpp"
#include "runtime/arena.hpp"
#include "runtime/mirrors.hpp"
#include "runtime/plan.hpp"
#include "runtime/region.hpp"

namespace orthrus::runtime {

/// Buckets leave in the plan's order, whatever the order in which gradients become ready: of the
/// `gradient_slots` buckets next in line each has a buffer; a gradient of a later bucket is
/// remembered and packed when its bucket's turn comes (the trainer's buffer must be left alone
/// until then: until `step` returns or the next micro-batch begins).
class GradientBuckets {
 public:
  GradientBuckets(const Plan& plan, const std::vector<Parameter>& parameters, Mirrors& mirrors,
                  Mesh& mesh, kernels::Backend& backend, std::span<std::byte> widened);

  /// Begins micro-batch `index`; the one before is finished first.
  void micro_batch(std::int64_t index);
  /// A misuse (unknown `id`, ready twice) is remembered: no rank throws alone.
  void ready(int id);
  /// Until it is told otherwise, adds what the gradients of this rank that travel square to, each
  /// micro-batch by itself, to `squares`, one per parameter. Empty: does not.
  void measure(std::span<double> squares) { squares_ = squares; }
  /// Sends what is ready and waits for it: ranks with the same gradients ready have then made the
  /// same calls.
  void settle() { advance(/*wait=*/true); }
  /// Asks for every gradient not yet ready and waits for all reductions of the step.
  void finish();
  /// What was called wrongly in this step; empty when nothing was.
  [[nodiscard]] const std::string& misuse() const { return misuse_; }
  /// Has nothing of a new step begun?
  [[nodiscard]] bool idle() const;
  /// Reported by the next step, on all ranks.
  void misuse(const std::string& what);
  template <class F>
  void for_each_request(F&& f) {
    for (Slot& slot : slots_) f(slot.request);
  }
  void abandon() noexcept { arena_.abandon(); }
  /// From now on what is free is filled with NaN: who still reads it shows (`checks: collective`).
  void poison_what_is_free() { poisons_ = true; }
  /// Forgets the step: the next `ready` belongs to a new one.
  void reset();

  /// After `finish`: this rank's part of bucket b, the mean gradient in f32, in the bucket's
  /// layout.
  [[nodiscard]] float* part(std::size_t bucket) { return parts_[bucket]; }
  [[nodiscard]] double copy_ms() const { return copy_ms_; }
  [[nodiscard]] double wait_ms() const { return wait_ms_; }

 private:
  struct Slot {
    std::span<std::byte> send, receive;
    Request request;
    std::size_t level = 0;  ///< on its way over this one
    Index received = 0;     ///< elements of `receive` that hold earlier levels
  };

  void begin_micro_batch();
  void finish_micro_batch();
  void advance(bool wait);
  [[nodiscard]] bool travels() const;
  void pack_parameter(std::size_t bucket, int id);
  void merge_leaf(std::size_t bucket);
  void push_leaf();
  void launch(std::size_t bucket);
  void launch_level(std::size_t bucket, ConstSpan send);
  bool arrived(std::size_t bucket, bool wait);
  void take_in(std::size_t bucket);
  void add_widened(MatrixView from, MatrixView to);
  void sum_trees(std::size_t bucket, const Slot& slot);

  const Plan& plan_;
  const std::vector<Parameter>& parameters_;
  Mirrors& mirrors_;
  Mesh& mesh_;
  kernels::Backend& backend_;
  int rank_;                    ///< in the world
  std::int64_t micro_batches_;  ///< this rank's
  std::int64_t micro_batch_ = 0;
  std::string misuse_;
  std::span<double> squares_;

  Arena arena_;
  std::vector<Slot> slots_;
  std::span<std::byte> widened_;
  std::vector<float*> parts_;
  std::vector<std::vector<float*>>
      locally_;                ///< per bucket: accumulator, or partial sums of the tree
  std::vector<Leaves> stack_;  ///< what the partial sums are of (the same in all buckets)
  struct Own {
    Index offset = 0, count = 0;  ///< this rank's part
    std::vector<Plan::Cut> cuts;  ///< per level
  };
  std::vector<Own> own_;                           ///< per bucket
  std::vector<std::vector<Segment>> segments_of_;  ///< per parameter
  std::vector<bool> ready_, packed_;
  std::vector<std::size_t> missing_;  ///< per bucket: parameters not packed yet
  std::size_t own_roots_ = 0;
  std::vector<Leaves> roots_;                                     ///< of all ranks, in leaf order
  std::vector<std::vector<Index>> send_counts_, receive_counts_;  ///< per bucket (reproducible)
  std::vector<int> slots_of_;                                     ///< per world rank
  std::vector<Leaves> merging_;
  std::vector<Index> merged_at_;
  std::size_t travel_at_once_ = gradient_slots;  ///< buckets
  std::size_t next_ = 0;                         ///< the bucket that leaves next
  std::size_t completed_ = 0;                    ///< buckets of this micro-batch that have arrived
  double copy_ms_ = 0, wait_ms_ = 0;
  bool poisons_ = false;
};

}  // namespace orthrus::runtime
