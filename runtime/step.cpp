// The walk of one gradient: this file reads like the table in README.md.
#include <xxhash.h>

#include <algorithm>
#include <array>
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
  Traffic sum;
  for_each_communicator(*this, [&](const Communicator& comm) { sum += comm.traffic(c); });
  return sum;
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
    // None will be answered: NCCL's must let go of the device before anybody frees memory there…
    for_each_request([](Request& request) { request.give_up(); });
    // …and MPI may still write to these.
    gradients_->abandon();
    work_arena_.abandon();
    if (working_set_) working_set_->abandon();
    static_cast<void>(control_.release());
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
  matrices_ = spared_ = 0;
  spared_sent_ = {};
  ++steps_;
  report_.step = steps_;
  report_.skip_reason.clear();
  report_.notice.clear();
  problem_.clear();
  is_fatal_ = false;
  set_deadline();
  mirrors_->fetch_weights();
  // Before anything is overwritten: what this step's gradients were computed with.
  if (replica_check_every_ > 0 && (steps_ - 1) % replica_check_every_ == 0) compare_replicas();

  if (working_set_) {
    settle_order();
    working_set_->release_all();  // what was gathered will be old
  }
  measure_noise_of(steps_);
  gradients_->finish();  // 1, 2: what is still on its way
  ms.reduce = gradients_->wait_ms();
  ms.copy = gradients_->copy_ms();

  const auto control = Clock::now();
  report_.skipped = !agree_to_go_on();
  ms.control = ms_since(control);

  if (!report_.skipped) {
    ++updates_;
    skipped_in_a_row_ = 0;
    std::fill_n(control_.get(), plan_.control_after(), 0.0);
    const std::int64_t every = config_.telemetry.every_steps;
    measures_ = plan_.rounding_slots > 0 && every > 0 && steps_ % every == 0;
    for (runtime::OwnSegment& own : own_) own.updated = false;
    for (MeetingState& state : meeting_states_) state.computed = 0;
    owed_.clear();
    first_owed_ = ahead_ = gathered_ = 0;
    find_kappas();
    look_before_update();
    for (const runtime::Turn turn : plan_.schedule) take_turn(turn);
    for (WeightSlot& slot : weight_slots_) deliver(slot);
    backend_->wait();
    look_after_update();
    mirrors_->deliver_weights();
    audit(before);
  }

  const Traffic sent = planned_traffic() - before;
  report_.bytes_sent = sent.bytes;
  report_.messages = sent.messages;
  report_.exceptional_bytes = (traffic(TrafficClass::exceptional) - exceptional).bytes;
  report_.matrices = matrices_;
  report_.lr_multiplier = lr_multiplier_;
  if (const std::string_view problem = backend_->replay_problem(); !problem.empty() && !noticed_) {
    noticed_ = true;
    add_notice("cuda.graph: an LMO could not be recorded, and is launched kernel by kernel: " +
               std::string(problem));
  }
  report_.notice.swap(notice_);
  forget_activations();
  gradients_->reset();
  step_began_ = planned_traffic();
  if (working_set_) working_set_->reset_traffic();
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
  double* const slots = control_.get();
  std::fill_n(slots, plan_.control_before(), 0.0);
  double* norms = slots + 3;
  double* const noise = norms + plan_.norm_slots + plan_.bound_slots;
  const bool measures_noise = is_noise_step(steps_);
  int bad = -1;
  for (const runtime::OwnSegment& own : own_) {
    const auto g = static_cast<std::size_t>(own.group);
    if (own.size() == 0) continue;
    const MatrixView gradient = gradient_of(own);
    double sum = 0;
    if (plan_.blocked[g] && own.segment.matrix < 0) {
      // In blocks that no sharding cuts: the norm must not depend on it.
      Index slot = own.norm_slot;
      const MatrixView flat = row(gradient.data, own.size());  // held ones are not reproducible
      for (Index at = 0; at < own.size(); at += runtime::Plan::norm_block, ++slot) {
        const Index n = std::min(runtime::Plan::norm_block, own.size() - at);
        const double s = backend_->sum_squares(runtime::block(flat, {0, 1, at, n}));
        sum += s;
        norms[slot] += s;
      }
    } else {
      sum = backend_->sum_squares(gradient);
      if (counts(own)) norms[own.norm_slot] += sum;
    }
    const int bound = own.segment.matrix < 0
                          ? -1
                          : plan_.matrices[static_cast<std::size_t>(own.segment.matrix)].bound_slot;
    if (bound >= 0 && counts(own)) norms[plan_.norm_slots + bound] += sum;
    if (measures_noise && counts(own)) noise[plan_.noise_sums() * own.segment.parameter + 1] += sum;
    if (!std::isfinite(sum) && bad < 0) bad = own.segment.parameter;
  }
  if (measures_noise) put_squares(noise);
  slots[0] = (bad >= 0 ? 1 : 0) + (gradients_->misuse().empty() ? 0 : misused);
  slots[1] = lr_multiplier_;
  slots[2] = lr_multiplier_ * lr_multiplier_;
  {
    const TrafficScope scope(all_ranks(), TrafficClass::control);
    all_ranks().all_reduce(Span{slots, plan_.control_before(), DType::f64}, ReduceOp::sum);
  }
  // Equal numbers, and only they, have Σ1·Σx² = (Σx)²; the sums are the same on all ranks.
  const bool rates_differ =
      plan_.ranks * slots[2] - slots[1] * slots[1] > 1e-12 * plan_.ranks * slots[2];
  const std::string uneven = measures_noise ? uneven_examples(noise) : "";
  if (slots[0] >= misused || rates_differ || !uneven.empty()) {
    std::string what = gradients_->misuse();
    if (what.empty() && slots[0] < misused) what = uneven;
    if (what.empty() && slots[0] < misused)
      what = "set_lr_multiplier was given different factors on different ranks";
    gradients_->reset();
    step_began_ = planned_traffic();
    --steps_;
    in_step_ = false;  // nothing has been changed
    runtime::agree(all_ranks(), what, ExitCode::config);
  }
  for (std::size_t g = 0; g < plan_.groups.size(); ++g) {
    const Index first = plan_.group_slot[g];
    const Index n = plan_.group_slots[g];
    const double norm = n == 0 ? 0 : std::sqrt(tree_sum(norms + first, {0, n}));
    report_.gradient_norm[g] = norm;
    const double most = plan_.groups[g].config->clip_norm;
    clip_[g] = most > 0 && norm > most ? most / norm : 1;
  }
  if (slots[0] == 0) {
    if (measures_noise) take_noise(noise);
    for (const runtime::MatrixPlan& m : plan_.matrices) {
      if (plan_.bound_slots == 0) break;
      if (m.bound_slot < 0) continue;
      const auto g =
          static_cast<std::size_t>(plan_.group_of[static_cast<std::size_t>(m.parameter)]);
      double& bound = bounds_[static_cast<std::size_t>(m.bound_slot)];
      const double gradient = clip_[g] * std::sqrt(norms[plan_.norm_slots + m.bound_slot]);
      bound = runtime::bound_at_rest(plan_.groups[g].momentum,
                                     plan_.groups[g].matrix_rule().bound(bound, gradient));
    }
    return true;
  }

  // Rare, and beyond the plan: which rank saw it first, and where.
  const TrafficScope scope(all_ranks(), TrafficClass::exceptional);
  std::array<std::int64_t, 1> first{
      bad < 0 ? INT64_MAX : (static_cast<std::int64_t>(mesh_.world.rank()) << 32) + bad};
  all_ranks().all_reduce(std::span<std::int64_t>(first), ReduceOp::min);
  const auto parameter = static_cast<std::size_t>(first[0] & 0xffffffff);
  report_.skip_reason = "the gradient of '" + plan_.parameters[parameter].name +
                        "' is not finite (first seen by rank " + std::to_string(first[0] >> 32) +
                        ", which holds that part of the mean)";
  std::fill(report_.update_rms.begin(), report_.update_rms.end(), 0.0);
  ++skipped_in_a_row_;
  return false;
}

void ShardedOptimizer::Impl::gradient_ready(int id) {
  measure_noise_of(steps_ + 1);
  gradients_->ready(id);
}

void ShardedOptimizer::Impl::take_turn(runtime::Turn turn) {
  const auto b = static_cast<std::size_t>(turn.bucket);
  switch (turn.kind) {
    case runtime::Turn::Kind::depart:
      return depart(b);
    case runtime::Turn::Kind::arrive:
      return arrive(b);
    case runtime::Turn::Kind::compute:
      return compute(b);
    case runtime::Turn::Kind::send_back:
      return send_back(b);
    case runtime::Turn::Kind::complete:
      return complete(b);
  }
}

/// Lines 6 to 8 of a bucket (3 to 8 where nothing meets): its new weights leave.
void ShardedOptimizer::Impl::complete(std::size_t b) {
  const runtime::Bucket& bucket = plan_.buckets[b];
  double* const sums = control_.get();
  const bool met = meets(b);
  if (met) wait_for(b, /*brief=*/false, "returning the direction");
  if (met && bucket.shared_terms > 0) sum_terms(b);
  WeightSlot& slot = weight_slots_[gathered_ % weight_slots_.size()];
  if (!bucket.held) deliver(slot);  // its buffer is needed
  for (runtime::OwnSegment& own : segments(b)) {
    if (own.size() == 0) continue;
    if (!own.updated) update(own);
    // In the plan's order, whatever the order of updates: the same bits in every run.
    if (counts(own)) sums[own.group] += own.update_squares;
  }
  if (bucket.rounds_together) round_together(b);
  if (poisons_ && met) {
    poison(meeting_states_[b].theirs);
    poison(meeting_states_[b].back);
  }
  if (bucket.held) return;
  gather(b, slot);
  ++gathered_;
}

/// Lines 6 and 7 of a segment (3 to 7 where it meets nobody).
void ShardedOptimizer::Impl::update(runtime::OwnSegment& own) {
  const auto start = Clock::now();
  own.update_squares = !meets(own.bucket)                                    ? update_here(own)
                       : plan_.buckets[own.bucket].mode == optim::Mode::gram ? finish_gram(own)
                                                                             : finish_piece(own);
  own.updated = true;
  if (poisons_) {
    poison(scratch_);
    poison(widened_);
    poison(narrowed_);
  }
  report_.ms.update += ms_since(start);
}

/// Something is waited for: a matrix that has arrived can be computed now, or a segment updated
/// that meets nobody. What is large on one rank then holds up no other.
/// @param brief  only what does not take long. @return whether there was anything.
bool ShardedOptimizer::Impl::run_ahead(bool brief) {
  for (; !brief && first_owed_ < owed_.size(); ++first_owed_) {
    if (compute_next(owed_[first_owed_])) return true;
  }
  const auto done = [this](const runtime::OwnSegment& own) {
    return own.updated || own.size() == 0 || meets(own.bucket) || rounds_together(own);
  };
  while (ahead_ < own_.size() && done(own_[ahead_])) ++ahead_;
  for (std::size_t i = ahead_; i < own_.size(); ++i) {
    runtime::OwnSegment& own = own_[i];
    if (done(own) || (brief && !runtime::is_brief(own.segment))) continue;
    update(own);
    return true;
  }
  return false;
}

/// Lines 3 to 7 of a segment that meets nobody. @return Σ U².
double ShardedOptimizer::Impl::update_here(runtime::OwnSegment& own) {
  const runtime::Group& group = plan_.groups[static_cast<std::size_t>(own.group)];
  const bool held = plan_.buckets[own.bucket].held;
  const auto clip = clip_[static_cast<std::size_t>(own.group)];
  const optim::StepScalars scalars = scalars_of(own);
  // The runtime's gradient is worked on where it is, the trainer's in a copy.
  const auto gradient = [&](const runtime::Panel& panel, runtime::Carver& carver) {
    if (held) {
      const MatrixView copy = carver.matrix(panel.rows, panel.cols);
      load_gradient(own, panel, copy);
      return copy;
    }
    const MatrixView g = runtime::block(gradient_of(own), panel);
    if (clip != 1) backend_->convert(g, clip, g);
    return g;
  };
  if (const auto* rule = dynamic_cast<const optim::MatrixRule*>(group.rule.get())) {
    runtime::Carver carver(scratch_);
    optim::Whole matrix{gradient({0, own.rows, 0, own.cols}, carver), {}, own.state};
    const MatrixView x = matrix.x;
    if (rule->direction().asks_for_gradient()) {
      matrix.g = carver.matrix(own.rows, own.cols);
      backend_->convert(x, 1, matrix.g);
    }
    accumulate(own, runtime::whole(own), x, /*stores=*/true, carver);  // 3
    const auto start = Clock::now();
    const bool feeds_back = kappa_[static_cast<std::size_t>(own.group)] != 0;
    const bool together = rounds_together(own);
    std::span<std::byte> work = carver.rest();
    optim::Undo undo;
    if (feeds_back) {
      std::span<std::byte> kept = together ? own_undo(own) : work;
      undo = optim::carve_undo(*rule, *group.lmo, own.rows, own.cols, kept);
      if (!together) work = kept;
    }
    const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(own.segment.matrix)];
    const bool made = whole_matrix(m, matrix, feeds_back ? &undo : nullptr, work);  // 4, 5
    report_.ms.lmo += ms_since(start);
    progress();
    const double sum = apply(own, x);  // 6, 7
    if (feeds_back && made && !together) pull_back(own, undo, x, work);
    return sum;
  }
  const auto& rule = static_cast<const optim::ElementwiseRule&>(*group.rule);
  double sum = 0;
  for_each_block(own, [&](const runtime::Panel& p) {
    runtime::Carver carver(scratch_);
    const MatrixView g = gradient(p, carver);
    const runtime::StateViews state = open_state(own, p, carver);
    const MatrixView w = open_weights(own, p);
    sum += rule.update({w, g, state.views(), carver.rest()}, scalars, *backend_);
    close_state(own, p, state, runtime::Rounded::update);
    if (rounds_together(own)) return backend_->convert(w, 1, runtime::block(kept(own), p));
    const MatrixView residual = close_weights(own, p, w);
    if (kappa_[static_cast<std::size_t>(own.group)] != 0) {
      reopen_state(own, p, state);
      pull_back(own, rule, {residual, g, state.views(), carver.rest()}, scalars);
      close_state(own, p, state, runtime::Rounded::correction);
    }
  });
  return sum;
}

/// Lines 6 and 7 of a whole segment, given lmo(X) of it. @return Σ U².
double ShardedOptimizer::Impl::apply(const runtime::OwnSegment& own, MatrixView direction) {
  double sum = 0;
  for_each_block(
      own, [&](const runtime::Panel& p) { sum += apply(own, p, runtime::block(direction, p)); });
  return sum;
}

optim::StepScalars ShardedOptimizer::Impl::scalars_of(std::size_t g) const {
  return {updates_, lr_at(g, steps_) * lr_multiplier_, weight_decay_[g]};
}

double ShardedOptimizer::Impl::lr_at(std::size_t group, std::int64_t t) const {
  return lr_[group] *
         optim::schedule_factor(plan_.groups[group].config->schedule, t, config_.train.steps);
}

/// Where the mean gradient of a segment is: in its bucket's part, or with the trainer.
MatrixView ShardedOptimizer::Impl::gradient_of(const runtime::OwnSegment& own) {
  if (!plan_.buckets[own.bucket].held) {
    return {gradients_->part(own.bucket) + own.offset_in_part, own.rows, own.cols, own.cols,
            DType::f32};
  }
  const Parameter& p = parameter_of(own);
  auto* data = static_cast<std::byte*>(const_cast<void*>(p.gradient));  // only read
  return {data + static_cast<std::size_t>(own.here.first) * bytes_of(p.gradient_dtype), own.rows,
          own.cols, own.here.distance, p.gradient_dtype};
}

/// to ← the gradient, clipped, in f32.
void ShardedOptimizer::Impl::load_gradient(const runtime::OwnSegment& own,
                                           const runtime::Panel& panel, MatrixView to) {
  backend_->convert(runtime::block(gradient_of(own), panel),
                    clip_[static_cast<std::size_t>(own.group)], to);
}

/// Lines 6 and 7 of a panel, given lmo(X) of it; 7 later where ranks round together. With ECO what
/// rounding took takes its place.
/// @return Σ U².
double ShardedOptimizer::Impl::apply(const runtime::OwnSegment& own, const runtime::Panel& panel,
                                     MatrixView direction) {
  const runtime::Group& group = plan_.groups[static_cast<std::size_t>(own.group)];
  const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(own.segment.matrix)];
  const MatrixView w = open_weights(own, panel);
  const double sum =
      group.matrix_rule().apply({w, direction, {}, {}}, group.scale(m), scalars_of(own), *backend_);
  if (rounds_together(own)) {
    backend_->convert(w, 1, runtime::block(kept(own), panel));
    return sum;
  }
  const MatrixView residual = close_weights(own, panel, w);
  if (group.feeds_back()) backend_->convert(residual, 1, direction);
  return sum;
}

/// Waits for a call, and works meanwhile.
void ShardedOptimizer::Impl::wait_ahead(Request& request, bool brief) {
  while (!request.test()) {
    if (!in_step_ || !run_ahead(brief)) return request.wait();
  }
}

/// Line 8 begins: the new weights of bucket b leave, over the outermost level first.
void ShardedOptimizer::Impl::gather(std::size_t b, WeightSlot& slot) {
  // The bucket before has had this one's update to cross its levels.
  for (WeightSlot& other : weight_slots_) {
    while (other.bucket >= 0 && other.level > lowest_level()) gather_level(other);
  }
  if (!plan_.weights_sharded()) {
    const auto copying = Clock::now();
    const std::size_t unit = bytes_of(plan_.buckets[b].weights.unit());
    for (const runtime::OwnSegment& own : segments(b)) {
      write_piece(own, slot.bytes.data() + static_cast<std::size_t>(own.segment.place) * unit);
    }
    report_.ms.copy += ms_since(copying);
  }
  slot.bucket = static_cast<int>(b);
  slot.level = plan_.levels.size();
  gather_level(slot);
}

/// Waits for the level on its way and starts the next one inward.
void ShardedOptimizer::Impl::gather_level(WeightSlot& slot) {
  const auto waiting = Clock::now();
  const double updating = report_.ms.update;
  const runtime::Bucket& bucket = plan_.buckets[static_cast<std::size_t>(slot.bucket)];
  try {
    wait_ahead(slot.request);
  } catch (const CommError& e) {
    throw CommError(std::string(e.what()) + "; gathering the weights of '" +
                        plan_.parameters[static_cast<std::size_t>(bucket.parameters.front())].name +
                        "' (bucket " + std::to_string(slot.bucket) + ")",
                    e.exit_code());
  }
  report_.ms.gather += ms_since(waiting) - (report_.ms.update - updating);
  if (slot.level == lowest_level()) return;
  --slot.level;
  const runtime::Plan::Cut& cut = weight_cuts_[static_cast<std::size_t>(slot.bucket)][slot.level];
  const DType unit = bucket.weights.unit();
  const std::size_t element = bytes_of(unit);
  std::byte* const bytes = plan_.weights_sharded()
                               ? working_set_->store(static_cast<std::size_t>(slot.bucket))
                               : slot.bytes.data();
  slot.request =
      mesh_.level(slot.level)
          .start_all_gather(
              {bytes + static_cast<std::size_t>(cut.own_begin()) * element, cut.own(), unit},
              cut.counts, {bytes + static_cast<std::size_t>(cut.begin) * element, cut.size, unit});
}

/// Line 8 ends: what arrived goes to the trainer.
void ShardedOptimizer::Impl::deliver(WeightSlot& slot) {
  if (slot.bucket < 0) return;
  while (slot.level > lowest_level()) gather_level(slot);
  gather_level(slot);
  const runtime::Bucket& bucket = plan_.buckets[static_cast<std::size_t>(slot.bucket)];
  if (plan_.weights_sharded()) {  // it stays where it is
    slot.bucket = -1;
    return;
  }
  const auto copying = Clock::now();
  for (const runtime::Segment& s : bucket.segments) {
    // Its own it has made where they are.
    if (s.size() == 0 || s.rank == mesh_.world.rank()) continue;
    const auto p = static_cast<std::size_t>(s.parameter);
    std::byte* const piece =
        slot.bytes.data() + static_cast<std::size_t>(s.place) * bytes_of(bucket.weights.unit());
    if (const QuantizedView codes = trainers_codes(p, s.region); codes.codes != nullptr) {
      runtime::copy_codes(bucket.weights.view(piece, codes.rows, codes.cols), *bucket.weights.grid,
                          codes, *backend_);
      continue;
    }
    runtime::read_piece(bucket.weights, piece, plan_.parameters[p], parameters_[p].weights,
                        parameters_[p].dtype, s.region, *backend_);
  }
  report_.ms.copy += ms_since(copying);
  slot.bucket = -1;
  if (poisons_) poison(slot.bytes);
}

/// Reality against the plan, on all ranks at once: bytes, messages, matrices; and the update's
/// size.
void ShardedOptimizer::Impl::audit(const Traffic& before) {
  double* const sums = control_.get();
  const int me = mesh_.world.rank();
  const runtime::RankPlan& mine = plan_.per_rank[static_cast<std::size_t>(me)];
  const Traffic this_message =
      cost::all_reduce(plan_.control_after(), plan_.ranks, me, sizeof(double), plan_.max_chunk);
  const Traffic sent = planned_traffic() - before + this_message;
  // The plan assumes so many gathers; how often it was is the trainer's affair.
  Traffic planned = mine.traffic_of(updates_) - spared_sent_;
  if (looking_.now) planned += mine.probe;
  if (working_set_) planned = planned - mine.gathers + working_set_->expected();
  const std::int64_t matrices = mine.matrices_of(updates_);
  const bool as_planned = sent == planned && matrices_ + spared_ == matrices;
  constexpr double noted = 0x1p-30;  // of any number of ranks less than one that differs
  double& differs = sums[plan_.control_after() - 1];
  differs = (as_planned ? 0 : 1) + (problem_.empty() ? 0 : noted);
  {
    const TrafficScope scope(all_ranks(), TrafficClass::control);
    all_ranks().all_reduce(Span{sums, plan_.control_after(), DType::f64}, ReduceOp::sum);
  }
  if (differs >= 1) {
    runtime::agree(
        all_ranks(),
        as_planned ? std::string()
                   : "step " + std::to_string(steps_) + " differs from the plan: sent " +
                         std::to_string(sent.bytes) + " bytes in " + std::to_string(sent.messages) +
                         " messages, planned " + std::to_string(planned.bytes) + " in " +
                         std::to_string(planned.messages) + "; orthogonalized " +
                         std::to_string(matrices_) + " matrices and spared " +
                         std::to_string(spared_) + ", planned " + std::to_string(matrices),
        ExitCode::internal);
  }
  if (differs > 0) share_problems();
  if (measures_) report_rounding(sums);
  for (std::size_t g = 0; g < plan_.groups.size(); ++g) {
    if (!std::isfinite(sums[g])) {
      const std::string what = "step " + std::to_string(steps_) + ": the update of groups[" +
                               std::to_string(g) + "] (" + plan_.groups[g].config->match +
                               ") is not finite; its weights are damaged";
      runtime::agree(all_ranks(), is_fatal_ ? what + ": " + problem_ : "", ExitCode::numeric);
      throw NumericError(what);
    }
    report_.update_rms[g] =
        elements_of_group_[g] > 0 ? std::sqrt(sums[g] / elements_of_group_[g]) : 0;
  }
}

/// What directions could not be made as they should, on whichever rank: rare, and beyond the plan.
void ShardedOptimizer::Impl::share_problems() {
  const TrafficScope scope(all_ranks(), TrafficClass::exceptional);
  for (const std::string& theirs : all_ranks().all_gather_strings(problem_)) {
    if (theirs.empty() || notice_.find(theirs) != std::string::npos) continue;
    add_notice(theirs);
  }
}

/// Replicated weights must be the same bits everywhere; shards that rest on several replicas,
/// there. Where a trainer has the values of codes, they must be that still.
/// @throws NumericError naming parameter and rank.
void ShardedOptimizer::Impl::compare_replicas() {
  const bool sharded = plan_.weights_sharded();
  Communicator& replicas = !sharded   ? all_ranks()
                           : numbers_ ? numbers_->replicate
                                      : mesh_.replicate;
  const TrafficScope scope(replicas, TrafficClass::setup);
  std::vector<std::int64_t> hashes(sharded ? plan_.buckets.size() : parameters_.size());
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    hashes[i] = static_cast<std::int64_t>(sharded ? hash_of_store(i) : hash_of_weights(i));
  }
  std::vector<std::int64_t> reference = hashes;
  replicas.broadcast(std::span(reference), 0);
  const auto [here, there] = std::mismatch(hashes.begin(), hashes.end(), reference.begin());
  std::string difference;
  if (here != hashes.end()) {
    const auto i = static_cast<std::size_t>(here - hashes.begin());
    const auto p = sharded ? static_cast<std::size_t>(plan_.buckets[i].parameters.front()) : i;
    difference = "step " + std::to_string(steps_) + ": the weights of '" +
                 plan_.parameters[p].name + "'" +
                 (sharded ? " (bucket " + std::to_string(i) + ") differ from the first replica's"
                          : " differ from rank 0's");
  }
  if (difference.empty()) difference = off_grid();
  runtime::agree(all_ranks(), difference, ExitCode::numeric);
}

std::uint64_t ShardedOptimizer::Impl::hash_of_weights(std::size_t p) {
  const runtime::ParameterShape& shape = plan_.parameters[p];
  if (shape.held()) return 0;  // not replicated, or by the trainer
  if (const QuantizedView codes = trainers_codes(p); codes.codes != nullptr) {
    const Grid& grid = *plan_.group(static_cast<int>(p)).format.grid;
    const auto scales = static_cast<std::size_t>(runtime::scales_of(codes, grid).size());
    const std::array<std::uint64_t, 2> both{
        hash_of(codes.codes, static_cast<std::size_t>(codes.rows * codes.pitch)),
        hash_of(codes.scales, scales * sizeof(float))};
    return XXH3_64bits(both.data(), sizeof both);
  }
  if (shape.strides.empty()) {
    return hash_of(parameters_[p].weights,
                   static_cast<std::size_t>(shape.size()) * bytes_of(shape.dtype));
  }
  // As dense as a mirror: ranks may differ in where they have their weights.
  const kernels::DeviceBuffer dense(*backend_,
                                    static_cast<std::size_t>(shape.size()) * bytes_of(shape.dtype));
  runtime::pack(shape, parameters_[p].weights, shape.dtype, {0, 1, shape.size(), shape.size()},
                {dense.data(), shape.size(), shape.dtype}, *backend_);
  return hash_of(dense.data(), dense.bytes());
}

/// What a rank updates it has the scales of: the nearest code · scale of every value must be the
/// value. @return the first parameter of which that is not so, in words; else empty.
std::string ShardedOptimizer::Impl::off_grid() {
  for (const runtime::OwnSegment& own : own_) {
    if (own.scales.data == nullptr || own.size() == 0) continue;
    const Grid& grid = *plan_.buckets[own.bucket].weights.grid;
    double squares = 0;
    for_each_block(own, [&](const runtime::Panel& p) {
      const MatrixView w{widened_.data(), p.rows, p.cols, p.cols, DType::f32};
      backend_->convert(trainers_weights(own, p), 1, w);
      backend_->quantize(w, grid, {}, beside(own, p));
      squares += backend_->sum_squares(w);
    });
    if (squares == 0) continue;
    return "step " + std::to_string(steps_) + ": the weights of '" +
           plan_.parameters[static_cast<std::size_t>(own.segment.parameter)].name + "' on rank " +
           std::to_string(mesh_.world.rank()) +
           " are not what the last step left there: they lie off the grid of " +
           plan_.buckets[own.bucket].weights.name();
  }
  return {};
}

/// Of this shard's part of bucket b.
std::uint64_t ShardedOptimizer::Impl::hash_of_store(std::size_t b) {
  const runtime::Bucket& bucket = plan_.buckets[b];
  const int slot = plan_.slot_of(mesh_.world.rank()) / plan_.replicate * plan_.replicate;
  const Index begin = bucket.place_of(slot);
  const std::size_t unit = bytes_of(bucket.weights.unit());
  return hash_of(working_set_->store(b) + static_cast<std::size_t>(begin) * unit,
                 static_cast<std::size_t>(bucket.place_of(slot + plan_.replicate) - begin) * unit);
}

std::uint64_t ShardedOptimizer::Impl::hash_of(const void* memory, std::size_t bytes) {
  kernels::OnHost<const std::byte> here(*backend_, static_cast<const std::byte*>(memory), bytes);
  return XXH3_64bits(here.data(), bytes);
}

/// Without comm.timeout_s: a minute, or ten times the median of the last steps, and in a step that
/// looks at matrices what that may take.
void ShardedOptimizer::Impl::set_deadline() {
  double seconds = config_.comm.timeout_s;
  if (seconds <= 0) {
    auto recent = recent_ms_;
    std::nth_element(recent.begin(), recent.begin() + recent.size() / 2, recent.end());
    seconds = std::max(60.0, std::ceil(1e-3 * recent[recent.size() / 2]) * 10);
    if (looks_in(steps_)) seconds += looking_.allowance_s;
  }
  if (seconds == deadline_s_) return;
  deadline_s_ = seconds;
  for_each_communicator(*this, [&](Communicator& comm) { comm.set_timeout(seconds); });
}

}  // namespace orthrus
