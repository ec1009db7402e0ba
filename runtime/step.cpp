// The walk of one gradient: this file reads like the table in README.md.
#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <orthrus/error.hpp>

#include "comm/cost.hpp"
#include "optim/matrix_function.hpp"
#include "optim/schedule.hpp"
#include "runtime/agree.hpp"
#include "runtime/clock.hpp"
#include "runtime/engine.hpp"

namespace orthrus {

using runtime::Clock;
using runtime::ms_since;
using runtime::row;

namespace {

/// The tree of `kernels::Backend::sum_block` over slots a … b−1.
double tree_sum(const double* slots, runtime::Leaves n) {
  if (n.size() == 1) return slots[n.begin];
  const Index s = runtime::tree_split(n);
  return tree_sum(slots, {n.begin, s}) + tree_sum(slots, {s, n.end});
}

}  // namespace

Traffic ShardedOptimizer::Impl::traffic(TrafficClass c) const {
  return mesh_.world.traffic(c) + mesh_.shard.traffic(c) + mesh_.replicate.traffic(c);
}

Traffic ShardedOptimizer::Impl::planned_traffic() const {
  return traffic(TrafficClass::payload) + traffic(TrafficClass::control);
}

/// A step that ends in an error may have left some ranks' weights new and others' old: no other
/// follows it.
const StepReport& ShardedOptimizer::Impl::step() {
  if (in_step_) {
    throw Error(
        "an earlier step failed midway: weights and state may not belong together any more; "
        "load a checkpoint into a new optimizer",
        ExitCode::internal);
  }
  in_step_ = true;
  try {
    walk();
  } catch (const CommError&) {
    // The calls given up may still write to these.
    gradients_->abandon();
    work_arena_.abandon();
    throw;
  }
  in_step_ = false;
  return report_;
}

void ShardedOptimizer::Impl::walk() {
  const auto start = Clock::now();
  const Traffic before = step_began_;  // buckets may have left long ago
  const Traffic exceptional = traffic(TrafficClass::exceptional);
  StepTimes& ms = report_.ms;
  ms = {};
  matrices_ = 0;
  ++steps_;
  report_.step = steps_;
  report_.skip_reason.clear();
  set_deadline();
  // Before anything is overwritten: what this step's gradients were computed with.
  if (replica_check_every_ > 0 && (steps_ - 1) % replica_check_every_ == 0) compare_replicas();

  gradients_->finish();  // 1, 2: what is still on its way
  ms.reduce = gradients_->wait_ms();
  ms.copy = gradients_->copy_ms();

  const auto control = Clock::now();
  report_.skipped = !agree_to_go_on();
  ms.control = ms_since(control);

  if (!report_.skipped) {
    ++updates_;
    skipped_in_a_row_ = 0;
    auto* sums = reinterpret_cast<double*>(control_.data());
    std::fill_n(sums, plan_.control_after(), 0.0);
    std::size_t next = 0;
    for (std::size_t b = 0; b < plan_.buckets.size(); ++b) {
      WeightSlot& slot = weight_slots_[b % runtime::weight_slots];
      deliver(slot);
      const auto updating = Clock::now();
      const runtime::Bucket& bucket = plan_.buckets[b];
      std::byte* part =
          slot.bytes.data() + static_cast<std::size_t>(bucket.part_offset(mesh_.shard.rank())) *
                                  bytes_of(bucket.weights);
      for (; next < own_.size() && own_[next].bucket == b; ++next) {
        runtime::OwnSegment& own = own_[next];
        const double sum = update(  // 3 to 7
            own, part + static_cast<std::size_t>(own.offset_in_part) * bytes_of(bucket.weights));
        if (mesh_.replicate.rank() == 0) sums[own.group] += sum;
      }
      ms.update += ms_since(updating);
      gather(b);  // 8: travels while the next bucket is updated
    }
    for (WeightSlot& slot : weight_slots_) deliver(slot);
    audit(before);
  }

  const Traffic sent = planned_traffic() - before;
  report_.bytes_sent = sent.bytes;
  report_.messages = sent.messages;
  report_.exceptional_bytes = (traffic(TrafficClass::exceptional) - exceptional).bytes;
  report_.matrices = matrices_;
  report_.lr_multiplier = lr_multiplier_;
  gradients_->reset();
  step_began_ = planned_traffic();
  ms.total = ms_since(start);
  recent_ms_[static_cast<std::size_t>(steps_) % recent_ms_.size()] = ms.total;
  if (skipped_in_a_row_ > 0 && skipped_in_a_row_ >= config_.train.max_skipped) {
    in_step_ = false;  // nothing has been changed
    throw NumericError(
        "step " + std::to_string(steps_) + ": " + std::to_string(skipped_in_a_row_) +
        " steps in a row had a gradient that is not finite (train.max_skipped); last: " +
        report_.skip_reason);
  }
}

/// One all-reduce for the whole model: is every gradient finite everywhere, was the API used as
/// agreed, and the norms that clipping needs. Nothing has been changed yet. @return false: skip
/// this step.
bool ShardedOptimizer::Impl::agree_to_go_on() {
  constexpr double misused = 1e6;
  auto* slots = reinterpret_cast<double*>(control_.data());
  std::fill_n(slots, plan_.control_before(), 0.0);
  double* norms = slots + 3;
  int bad = -1;
  for (const runtime::OwnSegment& own : own_) {
    const auto g = static_cast<std::size_t>(own.group);
    float* gradient = gradients_->part(own.bucket) + own.offset_in_part;
    // One sum per segment, or in blocks that no sharding cuts where the norm must not depend on it.
    const Index block =
        plan_.blocked[g] && own.segment.matrix < 0 ? runtime::Plan::norm_block : own.segment.size;
    double sum = 0;
    Index slot = own.norm_slot;
    for (Index at = 0; at < own.segment.size; at += block, ++slot) {
      const double s =
          backend_->sum_squares(row(gradient + at, std::min(block, own.segment.size - at)));
      sum += s;
      if (mesh_.replicate.rank() == 0) norms[slot] += s;
    }
    if (!std::isfinite(sum) && bad < 0) bad = own.segment.parameter;
  }
  slots[0] = (bad >= 0 ? 1 : 0) + (gradients_->misuse().empty() ? 0 : misused);
  slots[1] = lr_multiplier_;
  slots[2] = lr_multiplier_ * lr_multiplier_;
  {
    const TrafficScope scope(mesh_.world, TrafficClass::control);
    mesh_.world.all_reduce(Span{slots, plan_.control_before(), DType::f64}, ReduceOp::sum);
  }
  // Equal numbers, and only they, have Σ1·Σx² = (Σx)²; the sums are the same on all ranks.
  const bool rates_differ =
      plan_.ranks * slots[2] - slots[1] * slots[1] > 1e-12 * plan_.ranks * slots[2];
  if (slots[0] >= misused || rates_differ) {
    std::string what = gradients_->misuse();
    if (what.empty() && slots[0] < misused)
      what = "set_lr_multiplier was given different factors on different ranks";
    gradients_->reset();
    step_began_ = planned_traffic();
    --steps_;
    in_step_ = false;  // nothing has been changed
    runtime::agree(mesh_.world, what, ExitCode::config);
  }
  for (std::size_t g = 0; g < plan_.groups.size(); ++g) {
    const Index first = plan_.group_slot[g];
    const Index n = plan_.group_slots[g];
    const double norm = n == 0 ? 0 : std::sqrt(tree_sum(norms + first, {0, n}));
    report_.gradient_norm[g] = norm;
    const double most = plan_.groups[g].config->clip_norm;
    clip_[g] = most > 0 && norm > most ? most / norm : 1;
  }
  if (slots[0] == 0) return true;

  // Rare, and beyond the plan: which rank saw it first, and where.
  const TrafficScope scope(mesh_.world, TrafficClass::exceptional);
  std::array<std::int64_t, 1> first{
      bad < 0 ? INT64_MAX : (static_cast<std::int64_t>(mesh_.world.rank()) << 32) + bad};
  mesh_.world.all_reduce(std::span<std::int64_t>(first), ReduceOp::min);
  const auto parameter = static_cast<std::size_t>(first[0] & 0xffffffff);
  report_.skip_reason = "the gradient of '" + plan_.parameters[parameter].name +
                        "' is not finite (first seen by rank " + std::to_string(first[0] >> 32) +
                        ", which holds that part of the mean)";
  std::fill(report_.update_rms.begin(), report_.update_rms.end(), 0.0);
  ++skipped_in_a_row_;
  return false;
}

/// Lines 3 to 7 for one segment. @param weights  its place in the bucket that will be gathered.
/// @return Σ U².
double ShardedOptimizer::Impl::update(runtime::OwnSegment& own, std::byte* weights) {
  const runtime::Bucket& bucket = plan_.buckets[own.bucket];
  const runtime::Group& group = plan_.groups[static_cast<std::size_t>(own.group)];
  const auto p = static_cast<std::size_t>(own.segment.parameter);
  const runtime::ParameterShape& shape = plan_.parameters[p];
  float* gradient = gradients_->part(own.bucket) + own.offset_in_part;
  const Index size = own.segment.size;

  // f32 weights are worked on where they leave from; rounded ones beside it.
  void* wide = weights;
  if (group.master) {
    wide = own.master.data;
  } else {
    if (bucket.weights != DType::f32) wide = widened_.data();
    runtime::pack(shape, parameters_[p].weights, parameters_[p].dtype, own.region,
                  {wide, size, DType::f32}, *backend_);
  }
  const optim::Piece piece{{wide, own.rows, own.cols, own.cols, DType::f32},
                           {gradient, own.rows, own.cols, own.cols, DType::f32},
                           own.state,
                           scratch_};
  const double factor =
      optim::schedule_factor(group.config->schedule, steps_, config_.train.steps) * lr_multiplier_;
  const optim::StepScalars scalars{updates_, lr_[static_cast<std::size_t>(own.group)] * factor,
                                   weight_decay_[static_cast<std::size_t>(own.group)]};
  if (clip_[static_cast<std::size_t>(own.group)] != 1) {
    backend_->convert(piece.gradient, clip_[static_cast<std::size_t>(own.group)], piece.gradient);
  }

  double sum = 0;
  if (const auto* matrix = dynamic_cast<const optim::MatrixRule*>(group.rule.get())) {
    const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(own.segment.matrix)];
    matrix->accumulate(piece, scalars, *backend_);  // 3
    const auto start = Clock::now();
    matrices_ +=
        optim::matrix_function(m.mode, *group.lmo, piece.gradient, scratch_, *backend_);  // 4, 5
    report_.ms.lmo += ms_since(start);
    sum = matrix->apply(piece, group.lmo->scale(m.rows, m.cols), scalars, *backend_);  // 6
  } else {
    sum = static_cast<const optim::ElementwiseRule&>(*group.rule).update(piece, scalars, *backend_);
  }

  if (bucket.weights != DType::f32) {  // 7
    if (!group.stochastic) {
      backend_->convert(row(wide, size), 1, row(weights, size, bucket.weights));
    } else {
      for (Index r = 0; r < own.region.rows; ++r) {
        const Index at = r * own.region.cols;
        backend_->round_stochastic(
            row(static_cast<float*>(wide) + at, own.region.cols),
            row(weights + static_cast<std::size_t>(at) * bytes_of(bucket.weights), own.region.cols,
                bucket.weights),
            config_.seed, p, static_cast<std::uint64_t>(steps_),
            own.region.first + r * own.region.distance);
      }
    }
  }
  return sum;
}

/// Line 8 begins: the new weights of bucket b leave.
void ShardedOptimizer::Impl::gather(std::size_t b) {
  WeightSlot& slot = weight_slots_[b % runtime::weight_slots];
  const runtime::Bucket& bucket = plan_.buckets[b];
  const int me = mesh_.shard.rank();
  const std::size_t element = bytes_of(bucket.weights);
  slot.bucket = static_cast<int>(b);
  slot.request = mesh_.shard.start_all_gather(
      {slot.bytes.data() + static_cast<std::size_t>(bucket.part_offset(me)) * element,
       bucket.counts[static_cast<std::size_t>(me)], bucket.weights},
      bucket.counts, {slot.bytes.data(), bucket.size, bucket.weights});
}

/// Line 8 ends: what arrived goes to the trainer.
void ShardedOptimizer::Impl::deliver(WeightSlot& slot) {
  if (slot.bucket < 0) return;
  const auto waiting = Clock::now();
  const runtime::Bucket& bucket = plan_.buckets[static_cast<std::size_t>(slot.bucket)];
  try {
    slot.request.wait();
  } catch (const CommError& e) {
    throw CommError(std::string(e.what()) + "; gathering the weights of '" +
                        plan_.parameters[static_cast<std::size_t>(bucket.parameters.front())].name +
                        "' (bucket " + std::to_string(slot.bucket) + ")",
                    e.exit_code());
  }
  report_.ms.gather += ms_since(waiting);
  const auto copying = Clock::now();
  for (const runtime::Segment& s : bucket.segments) {
    const auto p = static_cast<std::size_t>(s.parameter);
    runtime::unpack(
        {slot.bytes.data() + static_cast<std::size_t>(s.offset) * bytes_of(bucket.weights), s.size,
         bucket.weights},
        plan_.parameters[p], parameters_[p].weights, parameters_[p].dtype,
        runtime::region_of(plan_, s), *backend_);
  }
  report_.ms.copy += ms_since(copying);
  slot.bucket = -1;
}

/// Reality against the plan, on all ranks at once: bytes, messages, matrices; and the update's
/// size.
void ShardedOptimizer::Impl::audit(const Traffic& before) {
  auto* sums = reinterpret_cast<double*>(control_.data());
  const int me = mesh_.world.rank();
  const runtime::RankPlan& mine = plan_.per_rank[static_cast<std::size_t>(me)];
  const Traffic this_message =
      cost::all_reduce(plan_.control_after(), plan_.ranks, me, sizeof(double), plan_.max_chunk);
  const Traffic sent = planned_traffic() - before + this_message;
  const bool as_planned = sent == mine.traffic && matrices_ == mine.matrices;
  double& differs = sums[plan_.control_after() - 1];
  differs = as_planned ? 0 : 1;
  {
    const TrafficScope scope(mesh_.world, TrafficClass::control);
    mesh_.world.all_reduce(Span{sums, plan_.control_after(), DType::f64}, ReduceOp::sum);
  }
  if (differs != 0) {
    runtime::agree(
        mesh_.world,
        as_planned
            ? std::string()
            : "step " + std::to_string(steps_) + " differs from the plan: sent " +
                  std::to_string(sent.bytes) + " bytes in " + std::to_string(sent.messages) +
                  " messages, planned " + std::to_string(mine.traffic.bytes) + " in " +
                  std::to_string(mine.traffic.messages) + "; orthogonalized " +
                  std::to_string(matrices_) + " matrices, planned " + std::to_string(mine.matrices),
        ExitCode::internal);
  }
  for (std::size_t g = 0; g < plan_.groups.size(); ++g) {
    if (!std::isfinite(sums[g])) {
      throw NumericError("step " + std::to_string(steps_) + ": the update of groups[" +
                         std::to_string(g) + "] (" + plan_.groups[g].config->match +
                         ") is not finite; its weights are damaged");
    }
    report_.update_rms[g] =
        elements_of_group_[g] > 0 ? std::sqrt(sums[g] / elements_of_group_[g]) : 0;
  }
}

/// Replicated weights must be the same bits everywhere. @throws NumericError naming parameter and
/// rank.
void ShardedOptimizer::Impl::compare_replicas() {
  const TrafficScope scope(mesh_.world, TrafficClass::setup);
  const auto hash = [&](std::size_t p) {
    const runtime::ParameterShape& shape = plan_.parameters[p];
    if (shape.strides.empty()) {
      return XXH3_64bits(parameters_[p].weights,
                         static_cast<std::size_t>(shape.size()) * bytes_of(shape.dtype));
    }
    std::vector<float> dense(static_cast<std::size_t>(shape.size()));
    runtime::pack(shape, parameters_[p].weights, shape.dtype, {0, 1, shape.size(), shape.size()},
                  {dense.data(), shape.size(), DType::f32}, *backend_);
    return XXH3_64bits(dense.data(), dense.size() * sizeof(float));
  };
  std::vector<std::int64_t> hashes(parameters_.size());
  for (std::size_t p = 0; p < hashes.size(); ++p) hashes[p] = static_cast<std::int64_t>(hash(p));
  std::vector<std::int64_t> reference = hashes;
  mesh_.world.broadcast(std::span(reference), 0);
  std::string difference;
  for (std::size_t p = 0; p < hashes.size() && difference.empty(); ++p) {
    if (hashes[p] != reference[p]) {
      difference = "step " + std::to_string(steps_) + ": the weights of '" +
                   plan_.parameters[p].name + "' differ from rank 0's";
    }
  }
  runtime::agree(mesh_.world, difference, ExitCode::numeric);
}

/// Without comm.timeout_s: a minute, or ten times the median of the last steps.
void ShardedOptimizer::Impl::set_deadline() {
  double seconds = config_.comm.timeout_s;
  if (seconds <= 0) {
    auto recent = recent_ms_;
    std::nth_element(recent.begin(), recent.begin() + recent.size() / 2, recent.end());
    seconds = std::max(60.0, std::ceil(1e-3 * recent[recent.size() / 2]) * 10);
  }
  if (seconds == deadline_s_) return;
  deadline_s_ = seconds;
  for (Communicator* c : {&mesh_.world, &mesh_.shard, &mesh_.replicate}) c->set_timeout(seconds);
}

}  // namespace orthrus
