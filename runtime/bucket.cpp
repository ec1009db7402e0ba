#include "runtime/bucket.hpp"

#include <algorithm>
#include <orthrus/error.hpp>

#include "runtime/clock.hpp"

namespace orthrus::runtime {
GradientBuckets::GradientBuckets(const Plan& plan, const std::vector<Parameter>& parameters,
                                 Mirrors& mirrors, Mesh& mesh, kernels::Backend& backend,
                                 std::span<std::byte> widened)
    : plan_(plan),
      parameters_(parameters),
      mirrors_(mirrors),
      mesh_(mesh),
      backend_(backend),
      rank_(mesh.world.rank()),
      widened_(widened),
      segments_of_(plan.parameters.size()),
      ready_(plan.parameters.size()),
      packed_(plan.parameters.size()),
      missing_(plan.buckets.size()) {
  const int world = rank_;
  micro_batches_ = plan.virtual_shards > 0 ? plan.leaves_of(world).size() : plan.micro_batches;
  const WorkSizes& sizes = plan.per_rank[static_cast<std::size_t>(world)].work;
  const int levels = plan.virtual_shards > 0      ? plan.depth_of(world)
                     : plan.accumulates_locally() ? 1
                                                  : 0;
  std::size_t bytes = gradient_slots * (Arena::rounded(sizes.gradient_send) +
                                        Arena::rounded(sizes.gradient_receive));
  const int slot = plan.slot_of(world);
  for (const Bucket& b : plan.buckets) {
    Own& own = own_.emplace_back(Own{b.offset_of(slot), b.count_of(slot), {}});
    for (std::size_t level = 0; level < plan.levels.size(); ++level) {
      own.cuts.push_back(plan.cut_of(b, world, level));
    }
    bytes += Arena::rounded(static_cast<std::size_t>(own.count) * 4) +
             (b.reduced ? static_cast<std::size_t>(levels) : 0) *
                 Arena::rounded(static_cast<std::size_t>(b.size) * 4);
  }
  arena_ = Arena(backend, bytes);
  slots_.resize(gradient_slots);
  for (Slot& slot : slots_) {
    slot.send = arena_.take(sizes.gradient_send);
    slot.receive = arena_.take(sizes.gradient_receive);
  }
  for (std::size_t b = 0; b < plan.buckets.size(); ++b) {
    const Bucket& bucket = plan.buckets[b];
    const auto floats = [&](Index count) {
      return reinterpret_cast<float*>(arena_.take(static_cast<std::size_t>(count) * 4).data());
    };
    parts_.push_back(floats(own_[b].count));
    locally_.emplace_back();
    for (int l = 0; l < levels && bucket.reduced; ++l) {
      locally_.back().push_back(floats(bucket.size));
    }
    for (const Segment& s : bucket.segments) {
      if (s.size() > 0) segments_of_[static_cast<std::size_t>(s.parameter)].push_back(s);
    }
  }
  if (plan.virtual_shards > 0) {
    own_roots_ = static_cast<std::size_t>(plan.roots_of(world));
    for (int w = 0; w < plan.ranks; ++w) {
      for (const Leaves& n : subtree_roots(plan.virtual_shards, plan.leaves_of(w))) {
        roots_.push_back(n);
      }
    }
    merging_.reserve(roots_.size());
    merged_at_.reserve(roots_.size());
    stack_.reserve(static_cast<std::size_t>(levels) + 1);
    for (int w = 0; w < plan.ranks; ++w) slots_of_.push_back(plan.slot_of(w));
    for (std::size_t b = 0; b < plan.buckets.size(); ++b) {
      std::vector<Index> send;
      std::vector<Index> receive;
      for (int w = 0; w < plan.ranks; ++w) {
        send.push_back(plan.roots_of(world) *
                       plan.buckets[b].count_of(slots_of_[static_cast<std::size_t>(w)]));
        receive.push_back(plan.roots_of(w) * own_[b].count);
      }
      send_counts_.push_back(std::move(send));
      receive_counts_.push_back(std::move(receive));
    }
  }
  // NCCL wants calls on all communicators in one order; when a level is through, and the next one
  // begins, is a rank's own affair.
  if (mesh.world.on_device() && plan.levels.size() > 1) travel_at_once_ = 1;
  reset();
}

void GradientBuckets::reset() {
  micro_batch_ = 0;
  stack_.clear();
  copy_ms_ = wait_ms_ = 0;
  misuse_.clear();
  begin_micro_batch();
}

bool GradientBuckets::idle() const {
  return micro_batch_ == 0 &&
         (micro_batches_ == 0 || std::find(ready_.begin(), ready_.end(), true) == ready_.end());
}

void GradientBuckets::begin_micro_batch() {
  // A rank without leaves has nothing to give, but takes part in every exchange.
  const bool nothing = micro_batches_ == 0;
  std::fill(ready_.begin(), ready_.end(), nothing);
  std::fill(packed_.begin(), packed_.end(), nothing);
  for (std::size_t b = 0; b < missing_.size(); ++b) {
    missing_[b] = nothing ? 0 : plan_.buckets[b].parameters.size();
  }
  next_ = completed_ = 0;
}

bool GradientBuckets::travels() const {
  const bool last = micro_batch_ + 1 >= micro_batches_;
  return last || !(plan_.virtual_shards > 0 || plan_.accumulates_locally());
}

void GradientBuckets::micro_batch(std::int64_t index) {
  if (index == 0 && micro_batch_ == 0) return;
  if (index != micro_batch_ + 1 || index >= micro_batches_) {
    misuse("micro_batch(" + std::to_string(index) + ") came after micro-batch " +
           std::to_string(micro_batch_) + " of " + std::to_string(micro_batches_));
    return;
  }
  finish_micro_batch();
  micro_batch_ = index;
  begin_micro_batch();
}

void GradientBuckets::misuse(const std::string& what) {
  if (misuse_.empty()) misuse_ = what;
}

void GradientBuckets::ready(int id) {
  if (id < 0 || static_cast<std::size_t>(id) >= ready_.size()) {
    misuse("gradient_ready(" + std::to_string(id) + "): there are " +
           std::to_string(ready_.size()) + " parameters");
    return;
  }
  const auto i = static_cast<std::size_t>(id);
  if (ready_[i]) {
    misuse("gradient_ready(" + std::to_string(id) + "): '" + plan_.parameters[i].name +
           (micro_batches_ == 0 ? "' on a rank without virtual shards" : "' was ready already"));
    return;
  }
  ready_[i] = true;
  advance(/*wait=*/false);
}

void GradientBuckets::finish() {
  if (micro_batch_ + 1 < micro_batches_) {
    misuse("step() came after micro-batch " + std::to_string(micro_batch_) + " of " +
           std::to_string(micro_batches_) + " (train.micro_batches, or virtual shards per rank)");
    // The other ranks may have all of theirs on the way, and wait for this rank's.
    while (micro_batch_ + 1 < micro_batches_) {
      finish_micro_batch();
      ++micro_batch_;
      begin_micro_batch();
    }
  }
  finish_micro_batch();
}

void GradientBuckets::finish_micro_batch() {
  std::fill(ready_.begin(), ready_.end(), true);
  advance(/*wait=*/true);
  backend_.wait();  // the trainer may write to its gradients again
  if (plan_.virtual_shards > 0 && micro_batches_ > 0) push_leaf();
}

/// The sums of all buckets have moved one leaf on: so does what describes them.
void GradientBuckets::push_leaf() {
  const Index leaf = plan_.leaves_of(mesh_.world.rank()).begin + micro_batch_;
  stack_.push_back({leaf, leaf + 1});
  while (stack_.size() >= 2 &&
         are_tree_siblings(plan_.virtual_shards, stack_[stack_.size() - 2], stack_.back())) {
    const Index end = stack_.back().end;
    stack_.pop_back();
    stack_.back().end = end;
  }
}

/// Packs what is ready, sends what is full, takes in what has arrived (with `wait`, all that has
/// left), until nothing moves any more.
void GradientBuckets::advance(bool wait) {
  const std::size_t buckets = plan_.buckets.size();
  const bool travelling = travels();
  const bool keeps_locally = plan_.virtual_shards > 0 || plan_.accumulates_locally();
  for (;;) {
    const std::size_t window =
        keeps_locally ? buckets : std::min(buckets, completed_ + gradient_slots);
    for (std::size_t b = next_; b < window; ++b) {
      if (missing_[b] == 0) continue;
      for (const int id : plan_.buckets[b].parameters) {
        const auto i = static_cast<std::size_t>(id);
        if (ready_[i] && !packed_[i]) pack_parameter(b, id);
      }
    }
    while (next_ < std::min(buckets, completed_ + travel_at_once_) && missing_[next_] == 0) {
      if (travelling) launch(next_);
      ++next_;
      if (!travelling) ++completed_;
    }
    bool moved = false;
    while (completed_ < next_ && arrived(completed_, wait)) {
      take_in(completed_);
      ++completed_;
      moved = true;
      if (wait) break;  // something may leave now; wait for the next one only then
    }
    if (completed_ == buckets || !moved) return;
  }
}

void GradientBuckets::pack_parameter(std::size_t b, int id) {
  const auto start = Clock::now();
  const auto i = static_cast<std::size_t>(id);
  const ParameterShape& shape = plan_.parameters[i];
  const Parameter& p = parameters_[i];
  const Bucket& bucket = plan_.buckets[b];
  mirrors_.fetch_gradient(i);
  // Where a segment's gradient goes, and whether something lies there already.
  const bool own_only = !bucket.reduced;
  const bool tree = plan_.virtual_shards > 0;
  const bool locally = plan_.accumulates_locally();
  const bool add = !tree && micro_batch_ > 0 && (own_only || locally);
  for (const Segment& s : segments_of_[i]) {
    if (bucket.held) break;  // it is where it will be used
    if (own_only && s.rank != rank_) continue;
    const Index size = s.size();
    Span to;
    if (own_only) {
      to = {parts_[b] + (s.offset - own_[b].offset), size, DType::f32};
    } else if (tree || locally) {
      to = {locally_[b][tree ? stack_.size() : 0] + s.offset, size, DType::f32};
    } else {
      const DType wire = plan_.gradient_wire;
      to = {slots_[b % gradient_slots].send.data() +
                static_cast<std::size_t>(s.offset) * bytes_of(wire),
            size, wire};
    }
    const Span packed = add ? Span{widened_.data(), size, DType::f32} : to;
    pack(shape, p.gradient, p.gradient_dtype, s.region, packed, backend_);
    if (!squares_.empty() && bucket.reduced) {
      squares_[i] += backend_.sum_squares(row(packed.data, size, packed.dtype));
    }
    if (add) backend_.axpby(1, row(packed.data, size), 1, row(to.data, size));
  }
  packed_[i] = true;
  if (--missing_[b] == 0 && tree) merge_leaf(b);
  copy_ms_ += ms_since(start);
}

/// Adds the leaf just packed to the partial sums it completes.
void GradientBuckets::merge_leaf(std::size_t b) {
  const Index leaf = plan_.leaves_of(mesh_.world.rank()).begin + micro_batch_;
  Leaves top{leaf, leaf + 1};
  const Index size = plan_.buckets[b].size;
  for (std::size_t level = stack_.size(); level > 0; --level) {
    if (!are_tree_siblings(plan_.virtual_shards, stack_[level - 1], top)) break;
    backend_.axpby(1, row(locally_[b][level], size), 1, row(locally_[b][level - 1], size));
    top.begin = stack_[level - 1].begin;
  }
}

void GradientBuckets::launch(std::size_t b) {
  const Bucket& bucket = plan_.buckets[b];
  Slot& slot = slots_[b % gradient_slots];
  slot.level = 0;
  slot.received = 0;
  if (!bucket.reduced) return;
  if (plan_.virtual_shards > 0) {
    const auto roots = own_roots_;
    ConstSpan send{slot.send.data(), 0, DType::f32};
    for (const Index n : send_counts_[b]) send.count += n;
    if (roots == 1 && plan_.levels.size() == 1) {
      send.data = locally_[b][0];
    } else {
      auto* to = reinterpret_cast<float*>(slot.send.data());
      for (int w = 0; w < plan_.ranks && roots > 0; ++w) {
        const int place = slots_of_[static_cast<std::size_t>(w)];
        const Index offset = bucket.offset_of(place);
        const Index n = bucket.count_of(place);
        for (std::size_t r = 0; r < roots; ++r, to += n) {
          backend_.convert(row(locally_[b][r] + offset, n), 1, row(to, n));
        }
      }
    }
    Index receive = 0;
    for (const Index n : receive_counts_[b]) receive += n;
    slot.request = mesh_.world.start_all_to_all(
        send, send_counts_[b], {slot.receive.data(), receive, DType::f32}, receive_counts_[b]);
    return;
  }
  const DType wire = plan_.gradient_wire;
  if (plan_.accumulates_locally()) {
    backend_.convert(row(locally_[b][0], bucket.size), 1, row(slot.send.data(), bucket.size, wire));
  }
  launch_level(b, {slot.send.data(), bucket.size, wire});
}

/// Level by level a rank keeps less, of more ranks' sum.
void GradientBuckets::launch_level(std::size_t b, ConstSpan send) {
  Slot& slot = slots_[b % gradient_slots];
  const Plan::Cut& cut = own_[b].cuts[slot.level];
  const DType wire = plan_.gradient_wire;
  const Span receive{slot.receive.data() + static_cast<std::size_t>(slot.received) * bytes_of(wire),
                     cut.own(), wire};
  slot.request = mesh_.level(slot.level).start_reduce_scatter(send, cut.counts, receive);
}

/// Has bucket b arrived here, summed over all levels?
bool GradientBuckets::arrived(std::size_t b, bool wait) {
  Slot& slot = slots_[b % gradient_slots];
  const auto start = Clock::now();
  const auto done = [&](Request& request) {
    if (request.test()) return true;
    if (!wait) return false;
    try {
      request.wait();
    } catch (const CommError& e) {
      const Bucket& bucket = plan_.buckets[b];
      throw CommError(
          std::string(e.what()) + "; reducing the gradients of '" +
              plan_.parameters[static_cast<std::size_t>(bucket.parameters.front())].name +
              "' (bucket " + std::to_string(b) + ", " + std::to_string(bucket.parameters.size()) +
              " parameters)",
          e.exit_code());
    }
    return true;
  };
  bool complete = done(slot.request);
  const bool levelled = plan_.virtual_shards == 0 && plan_.buckets[b].reduced && travels();
  while (complete && levelled && slot.level + 1 < plan_.levels.size()) {
    const Plan::Cut& cut = own_[b].cuts[slot.level];
    const Index n = cut.own();
    const DType wire = plan_.gradient_wire;
    auto* sum = slot.receive.data() + static_cast<std::size_t>(slot.received) * bytes_of(wire);
    slot.received += static_cast<Index>(
        Arena::rounded(static_cast<std::size_t>(n) * bytes_of(wire)) / bytes_of(wire));
    ++slot.level;
    launch_level(b, {sum, n, wire});
    complete = done(slot.request);
  }
  wait_ms_ += ms_since(start);
  return complete;
}

/// Turns what bucket b brought into (more of) the mean gradient of this rank's part.
void GradientBuckets::take_in(std::size_t b) {
  if (!travels()) return;
  const auto start = Clock::now();
  const Bucket& bucket = plan_.buckets[b];
  if (bucket.held) return;
  const Index n = own_[b].count;
  Slot& slot = slots_[b % gradient_slots];
  const MatrixView part = row(parts_[b], n);
  const bool last = micro_batch_ + 1 >= micro_batches_;
  if (!bucket.reduced) {
    if (last && plan_.micro_batches > 1) {
      backend_.convert(part, 1.0 / static_cast<double>(plan_.micro_batches), part);
    }
  } else if (plan_.virtual_shards > 0) {
    sum_trees(b, slot);
  } else {
    const double mean = 1.0 / static_cast<double>(plan_.ranks * plan_.micro_batches);
    const MatrixView sum = row(slot.receive.data() + static_cast<std::size_t>(slot.received) *
                                                         bytes_of(plan_.gradient_wire),
                               n, plan_.gradient_wire);
    if (plan_.reductions() == 1) {
      backend_.convert(sum, mean, part);
    } else if (micro_batch_ == 0) {
      backend_.convert(sum, 1, part);
    } else {
      add_widened(sum, part);
      if (last) backend_.convert(part, mean, part);
    }
  }
  if (poisons_ && bucket.reduced) {
    poison(slot.send, backend_);
    poison(slot.receive, backend_);
  }
  copy_ms_ += ms_since(start);
}

/// to += from, where `from` may be narrower.
void GradientBuckets::add_widened(MatrixView from, MatrixView to) {
  const Index most = std::min(std::ssize(widened_) / Index{sizeof(float)}, Index{1} << 14);
  for (Index at = 0; at < from.cols; at += most) {
    const Index n = std::min(from.cols - at, most);
    auto* narrow =
        static_cast<std::byte*>(from.data) + static_cast<std::size_t>(at) * bytes_of(from.dtype);
    const MatrixView wide = row(widened_.data(), n);
    backend_.convert(row(narrow, n, from.dtype), 1, wide);
    backend_.axpby(1, wide, 1, row(static_cast<float*>(to.data) + at, n));
  }
}

/// The roots of all ranks lie in leaf order: the rest of the tree is summed here, then divided by
/// V.
void GradientBuckets::sum_trees(std::size_t b, const Slot& slot) {
  const Index n = own_[b].count;
  auto* sums = reinterpret_cast<float*>(slot.receive.data());
  merging_.clear();
  merged_at_.clear();
  for (std::size_t i = 0; i < roots_.size(); ++i) {
    merging_.push_back(roots_[i]);
    merged_at_.push_back(static_cast<Index>(i));
    while (
        merging_.size() >= 2 &&
        are_tree_siblings(plan_.virtual_shards, merging_[merging_.size() - 2], merging_.back())) {
      const Index from = merged_at_.back();
      const Index end = merging_.back().end;
      merging_.pop_back();
      merged_at_.pop_back();
      merging_.back().end = end;
      backend_.axpby(1, row(sums + from * n, n), 1, row(sums + merged_at_.back() * n, n));
    }
  }
  backend_.convert(row(sums + merged_at_.back() * n, n), 1.0 / plan_.virtual_shards,
                   row(parts_[b], n));
}

}  // namespace orthrus::runtime
