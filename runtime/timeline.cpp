// A step walked without taking it: call by call what bucket.cpp, step.cpp, meet.cpp and
// working_set.cpp do, on the clocks of all ranks.
#include "runtime/timeline.hpp"

#include <algorithm>
#include <climits>
#include <numeric>

#include "comm/cost.hpp"
#include "kernels/gram.hpp"
#include "runtime/meeting.hpp"
#include "runtime/plan_steps.hpp"
#include "runtime/region.hpp"
#include "runtime/rounding.hpp"
#include "runtime/schedule.hpp"
#include "runtime/timeline_clocks.hpp"

namespace orthrus::runtime {
namespace {

using optim::Mode;

double real(Index n) { return static_cast<double>(n); }

/// What the rank of a piece does with it: the parts of `piece_seconds`.
struct PieceSeconds {
  double begin_update = 0, begin_lmo = 0;  ///< momentum; the first Gram matrix
  double compute_lmo = 0;                  ///< gram_steps: per iteration
  double finish_update = 0, finish_lmo = 0;
};

/// The plan's part of the step.
class Walk {
 public:
  Walk(const Plan& plan, const MachineProfile& profile, const TimelineOptions& options,
       Clocks& clocks)
      : plan_(plan),
        profile_(profile),
        backward_s_(options.backward_s),
        clocks_(clocks),
        work_(plan.ranks),
        lmo_(plan.ranks),
        copies_(plan.ranks) {
    double held = 0;
    for (const RankPlan& r : plan.per_rank) held += real(r.memory.total()) / plan.ranks;
    cold_rate_ = rate_at(profile.pass, held);
    for (int w = 0; w < plan.ranks; ++w) slot_of_.push_back(plan.slot_of(w));
    rank_of_.resize(slot_of_.size());
    for (int w = 0; w < plan.ranks; ++w) rank_of_[at(slot_of_[at(w)])] = w;
    for (const Bucket& b : plan.buckets) {
      Bucket& codes = codes_.emplace_back();
      if (!b.weights.quantized()) continue;
      codes.size = b.units;
      for (const Bucket::Part& p : b.parts) codes.parts.push_back({p.slot, p.place, p.units});
    }
  }

  void step() {
    for (std::int64_t k = 0; k < plan_.gathers && plan_.weights_sharded(); ++k) gather_all();
    reduce();
    control();
    find_tasks();
    for (const Turn turn : plan_.schedule) take_turn(turn);
    for (WeightSlot& slot : weights_) deliver(slot);
    all_reduce(Phase::audit, plan_.control_after());
  }

 private:
  void take_turn(Turn turn) {
    if (turn.kind == Turn::Kind::complete) return complete(turn.bucket);
    if (!meets(turn.bucket)) return;
    if (turn.kind == Turn::Kind::depart) return depart(turn.bucket);
    if (turn.kind == Turn::Kind::arrive) return arrive(turn.bucket);
    if (turn.kind == Turn::Kind::compute) return compute(turn.bucket);
    send_back(turn.bucket);
  }

  [[nodiscard]] const Bucket& bucket(int b) const { return plan_.buckets[at(b)]; }
  [[nodiscard]] const MatrixPlan& matrix(int m) const { return plan_.matrices[at(m)]; }
  [[nodiscard]] const ParameterShape& parameter(int i) const { return plan_.parameters[at(i)]; }
  [[nodiscard]] bool keeps_locally() const {
    return plan_.virtual_shards > 0 || plan_.accumulates_locally();
  }
  [[nodiscard]] bool meets(int b) const { return !bucket(b).matrices.empty(); }
  [[nodiscard]] std::size_t lowest_level() const {
    return plan_.weights_sharded() ? plan_.shard_levels() : 0;
  }

  /// A pass over what was last touched a step ago: no faster than one over all that a rank holds,
  /// of which a cache keeps what it would of that. Remembered, as neighbours are alike.
  double pass(double bytes) {
    if (bytes != last_bytes_) {
      last_bytes_ = bytes;
      last_pass_ = bytes > 0 ? std::max(pass_seconds(profile_, bytes), bytes / cold_rate_) : 0;
    }
    return last_pass_;
  }

  // ---- calls of a level -------------------------------------------------------------------------

  /// How a bucket is cut at a level, by what is cut (the ranks that share all coordinates below).
  void find_shares(const Bucket& b, std::size_t level, std::size_t levels) {
    int stride = 1;  // slots that share a part
    for (std::size_t i = level + 1; i < levels; ++i) stride *= plan_.levels[i];
    const int size = plan_.levels[level];
    for (const int g : cut_) whole_[at(g)] = most_[at(g)] = 0;
    cut_.clear();
    whole_.resize(slot_of_.size(), 0);
    most_.resize(slot_of_.size(), 0);
    for (std::size_t p = 0; p < b.parts.size();) {
      const int g = b.parts[p].slot / (stride * size);
      Index sum = 0;
      Index least = INT64_MAX;
      int parts = 0;
      while (p < b.parts.size() && b.parts[p].slot / (stride * size) == g) {
        const int part = b.parts[p].slot / stride;
        Index own = 0;
        for (; p < b.parts.size() && b.parts[p].slot / stride == part; ++p) own += b.parts[p].size;
        sum += own;
        least = std::min(least, own);
        ++parts;
      }
      cut_.push_back(g);
      whole_[at(g)] = sum;
      most_[at(g)] = parts == size ? sum - least : sum;
    }
  }

  /// All ranks reduce-scatter or all-gather their cut of `b` over one of the first `levels` levels.
  void start_level(Flight& flight, Phase phase, int index, const Bucket& b, std::size_t level,
                   std::size_t levels, Collective kind, std::size_t element) {
    find_shares(b, level, levels);
    Peers peers{1, plan_.levels[level]};
    for (std::size_t i = 0; i < level; ++i) peers.stride *= plan_.levels[i];
    int outer = 1;  // slots per slot of these levels
    for (std::size_t i = levels; i < plan_.levels.size(); ++i) outer *= plan_.levels[i];
    int stride = 1;
    for (std::size_t i = level + 1; i < levels; ++i) stride *= plan_.levels[i];
    const auto bytes = static_cast<std::int64_t>(element);
    clocks_.start(
        flight, phase, index, peers,
        [&](int first) {
          const auto g = at(slot_of_[at(first)] / outer / (stride * peers.size));
          Call c{.kind = kind, .most = real(most_[g] * bytes)};
          c.messages = real(cost::chunks(whole_[g], plan_.max_chunk));
          c.all = (peers.size - 1) * whole_[g] * bytes;
          if (kind == Collective::reduce_scatter) c.copied = real(whole_[g] * bytes);
          return c;
        },
        [&](int rank) {
          const int slot = slot_of_[at(rank)] / outer;
          const int begin = slot / stride * stride;
          const auto g = at(slot / (stride * peers.size));
          return (whole_[g] - (b.offset_of(begin + stride) - b.offset_of(begin))) * bytes;
        });
  }

  /// Of the whole model, waited for.
  void all_reduce(Phase phase, Index count) {
    const auto traffic = [&](int rank) {
      return cost::all_reduce(count, plan_.ranks, rank, sizeof(double), plan_.max_chunk);
    };
    clocks_.start(
        control_, phase, -1, {1, plan_.ranks},
        [&](int) {
          const Traffic most = traffic(plan_.ranks - 1);  // its own part is the smallest
          Call c{.kind = Collective::all_reduce, .most = real(most.bytes)};
          c.messages = real(most.messages);
          c.all = 2 * (plan_.ranks - 1) * count * static_cast<std::int64_t>(sizeof(double));
          return c;
        },
        [&](int rank) { return traffic(rank).bytes; });
    clocks_.wait(control_);
  }

  // ---- bucket.cpp -------------------------------------------------------------------------------

  [[nodiscard]] Index elements(const Bucket& b) const {
    return std::accumulate(b.parameters.begin(), b.parameters.end(), Index{0},
                           [&](Index n, int id) { return n + parameter(id).size(); });
  }
  /// Micro-batches of `rank` that are added up where they are.
  [[nodiscard]] std::int64_t local_rounds(int rank) const {
    if (plan_.virtual_shards > 0) return std::max<Index>(plan_.leaves_of(rank).size() - 1, 0);
    return plan_.accumulates_locally() ? plan_.micro_batches - 1 : 0;
  }

  void reduce() {
    if (keeps_locally()) accumulate();
    for (round_ = 0; round_ < plan_.reductions(); ++round_) {
      ready_ = packed_ = next_ = arrived_ = 0;
      const auto buckets = std::ssize(plan_.buckets);
      if (backward_s_ > 0) {
        double all = 0;
        for (const Bucket& b : plan_.buckets) all += real(elements(b));
        for (ready_ = 1; ready_ <= buckets; ++ready_) {
          const int b = static_cast<int>(ready_) - 1;
          clocks_.compute_all(Phase::backward, b, backward_s_ * real(elements(bucket(b))) / all);
          advance(/*wait=*/false);
        }
      }
      ready_ = buckets;
      advance(/*wait=*/true);
    }
  }

  /// All micro-batches but the last, where only sums travel.
  void accumulate() {
    double packing = 0;
    for (int b = 0; b < std::ssize(plan_.buckets); ++b) {
      if (bucket(b).reduced && !bucket(b).held) packing += pack_seconds(b);
    }
    for (int w = 0; w < plan_.ranks; ++w) work_.add(w, real(local_rounds(w)) * backward_s_);
    clocks_.compute(Phase::backward, -1, work_);
    for (int w = 0; w < plan_.ranks; ++w) work_.add(w, real(local_rounds(w)) * packing);
    clocks_.compute(Phase::pack, -1, work_);
  }

  /// As `GradientBuckets::advance`. Without `wait` what has arrived is what has on the rank that is
  /// furthest, so that all ranks do the same.
  void advance(bool wait) {
    const auto buckets = std::ssize(plan_.buckets);
    for (;;) {
      const auto window =
          keeps_locally() ? buckets : std::min<Index>(buckets, arrived_ + gradient_slots);
      for (; packed_ < std::min(window, ready_); ++packed_) pack(static_cast<int>(packed_));
      while (next_ < std::min<Index>(packed_, arrived_ + gradient_slots)) {
        launch(static_cast<int>(next_++));
      }
      bool moved = false;
      while (arrived_ < next_ && has_arrived(static_cast<int>(arrived_), wait)) {
        take_in(static_cast<int>(arrived_++));
        moved = true;
        if (wait) break;
      }
      if (arrived_ == buckets || (!moved && !wait)) return;
    }
  }

  double pack_seconds(int b) {
    double bytes = 0;
    const std::size_t to = keeps_locally() ? 4 : bytes_of(plan_.gradient_wire);
    // What is added to is read and written once more, beside a wide copy.
    const std::size_t added = plan_.accumulates_locally() ? 12 : 0;
    for (const int id : bucket(b).parameters) {
      bytes += real(parameter(id).size()) *
               static_cast<double>(bytes_of(parameter(id).gradient_dtype) + to + added);
    }
    return pass(bytes);
  }

  void pack(int index) {
    const Bucket& b = bucket(index);
    if (b.held) return;
    if (!b.reduced) {
      for (const Segment& s : b.segments) {
        work_.add(s.rank,
                  pass(real(s.size()) *
                       static_cast<double>(4 + bytes_of(parameter(s.parameter).gradient_dtype))));
      }
      clocks_.compute(Phase::pack, index, work_);
    } else if (plan_.virtual_shards > 0) {
      const double copy = pack_seconds(index);
      for (int w = 0; w < plan_.ranks; ++w) {
        const Index leaves = plan_.leaves_of(w).size();
        if (leaves == 0) continue;
        work_.add(w, copy + real(leaves - plan_.roots_of(w)) * pass(12 * real(b.size)));
      }
      clocks_.compute(Phase::pack, index, work_);
    } else {
      clocks_.compute_all(Phase::pack, index, pack_seconds(index));
    }
  }

  void launch(int index) {
    const Bucket& b = bucket(index);
    level_[at(index % gradient_slots)] = 0;
    if (!b.reduced || b.held) return;
    Flight& flight = gradients_[at(index % gradient_slots)];
    if (plan_.virtual_shards == 0) {
      if (plan_.accumulates_locally()) {
        clocks_.compute_all(
            Phase::pack, index,
            pass(real(b.size) * static_cast<double>(4 + bytes_of(plan_.gradient_wire))));
      }
      return start_reduction(flight, index, 0);
    }
    for (int w = 0; w < plan_.ranks; ++w) {
      const Index roots = plan_.roots_of(w);
      if (roots > 1 || plan_.levels.size() > 1) {
        work_.add(w, real(roots) * pass(8 * real(b.size)));
      }
    }
    clocks_.compute(Phase::pack, index, work_);
    const auto sent = [&](int rank) {
      return 4 * plan_.roots_of(rank) * (b.size - b.count_of(slot_of_[at(rank)]));
    };
    clocks_.start(
        flight, Phase::reduce, index, {1, plan_.ranks},
        [&](int) {
          Call c{.kind = Collective::all_to_all};
          c.copied = 4 * real(plan_.all_roots * b.size);
          for (int w = 0; w < plan_.ranks; ++w) {
            c.most = std::max(c.most, real(sent(w)));
            c.all += sent(w);
          }
          return c;
        },
        sent);
  }

  void start_reduction(Flight& flight, int index, std::size_t level) {
    start_level(flight, Phase::reduce, index, bucket(index), level, plan_.levels.size(),
                Collective::reduce_scatter, bytes_of(plan_.gradient_wire));
  }

  bool has_arrived(int index, bool wait) {
    Flight& flight = gradients_[at(index % gradient_slots)];
    const bool levelled = plan_.virtual_shards == 0 && bucket(index).reduced && !bucket(index).held;
    std::size_t& level = level_[at(index % gradient_slots)];
    for (;;) {
      if (!wait && !clocks_.is_over(flight)) return false;
      clocks_.wait(flight);
      if (!levelled || level + 1 >= plan_.levels.size()) return true;
      start_reduction(flight, index, ++level);
    }
  }

  void take_in(int index) {
    const Bucket& b = bucket(index);
    if (b.held) return;
    const bool last = round_ + 1 >= plan_.reductions();
    const auto wire = static_cast<double>(bytes_of(plan_.gradient_wire));
    for (const Bucket::Part& part : b.parts) {
      const double n = real(part.size);
      double seconds = 0;
      if (!b.reduced) {
        if (last && plan_.micro_batches > 1) seconds = pass(8 * n);
      } else if (plan_.virtual_shards > 0) {
        seconds = real(plan_.all_roots - 1) * pass(12 * n) + pass(8 * n);
      } else {
        seconds = pass((wire + 4) * n);
        if (round_ > 0) seconds += pass(12 * n) + (last ? pass(8 * n) : 0);
      }
      work_.add(rank_of_[at(part.slot)], seconds);
    }
    clocks_.compute(Phase::reduce, index, work_);
  }

  // ---- step.cpp ---------------------------------------------------------------------------------

  void control() {
    std::vector<double> bytes(slot_of_.size(), 0);
    for (const Bucket& b : plan_.buckets) {
      for (const Bucket::Part& part : b.parts) {
        bytes[at(rank_of_[at(part.slot)])] += 4 * real(part.size);
      }
      if (!b.held) continue;
      for (const Segment& s : b.segments) {
        for_each_rank(b, s, [&](int w) {
          bytes[at(w)] +=
              real(s.size()) * static_cast<double>(bytes_of(parameter(s.parameter).gradient_dtype));
        });
      }
    }
    for (int w = 0; w < plan_.ranks; ++w) work_.add(w, pass(bytes[at(w)]));
    clocks_.compute(Phase::control, -1, work_);
    all_reduce(Phase::control, plan_.control_before());
  }

  template <class F>
  void for_each_rank(const Bucket& b, const Segment& s, F&& f) const {
    for (int w = s.rank; w < plan_.ranks; w += plan_.shard) {
      f(w);
      if (!b.held) return;
    }
  }

  /// What a rank may do while it waits.
  struct Task {
    int bucket = 0;
    double lmo = 0, update = 0, copies = 0;
    Phase copied = Phase::pack;
  };
  /// In the order in which it does them.
  class Tasks {
   public:
    void push(const Task& task) { tasks_.push_back(task); }
    [[nodiscard]] bool any() const { return next_ < tasks_.size(); }
    /// Of which bucket is the next? (Beyond all of them where there is none.)
    [[nodiscard]] int bucket() const { return any() ? tasks_[next_].bucket : INT_MAX; }
    const Task& pop() { return tasks_[next_++]; }

   private:
    std::vector<Task> tasks_;
    std::size_t next_ = 0;
  };
  /// Of one rank.
  struct Ahead {
    Tasks owed;           ///< matrices that have arrived, to be computed
    Tasks longer, brief;  ///< what it updates without meeting anyone
  };

  void find_tasks() {
    ahead_.resize(slot_of_.size());
    for (int b = 0; b < std::ssize(plan_.buckets); ++b) {
      if (meets(b) || bucket(b).rounds_together) continue;
      for (const Segment& s : bucket(b).segments) {
        if (s.size() == 0) continue;
        const Task task = task_alone(b, s);
        for_each_rank(bucket(b), s, [&](int w) {
          (is_brief(s) ? ahead_[at(w)].brief : ahead_[at(w)].longer).push(task);
        });
      }
    }
  }
  /// A segment that meets nobody.
  Task task_alone(int b, const Segment& s) {
    const Group& group = plan_.group(s.parameter);
    return {b, s.matrix < 0 ? 0 : of_whole(group, s.region.rows, s.region.cols),
            pass(pass_bytes(group) * real(s.size())), copy_seconds(bucket(b), s)};
  }
  void take(int rank, const Task& task) {
    clocks_.compute(rank, Phase::lmo, task.bucket, task.lmo);
    clocks_.compute(rank, Phase::update, task.bucket, task.update);
    clocks_.compute(rank, task.copied, task.bucket, task.copies);
  }
  /// As `run_ahead`.
  bool run_ahead(int rank, bool brief) {
    Ahead& ahead = ahead_[at(rank)];
    Tasks* next = &ahead.brief;
    if (!brief && ahead.longer.bucket() <= ahead.brief.bucket()) next = &ahead.longer;
    if (!brief && ahead.owed.any()) next = &ahead.owed;
    if (!next->any()) return false;
    take(rank, next->pop());
    return true;
  }
  /// As `wait_ahead`.
  void wait_ahead(Flight& flight, bool brief = false) {
    clocks_.wait(flight, [&](int rank, double until) {
      while (clocks_.now(rank) < until && run_ahead(rank, brief)) {
      }
    });
  }

  void complete(int index) {
    const Bucket& b = bucket(index);
    const bool met = meets(index);
    if (met) {
      wait_ahead(flight_of(index));
      if (b.mode == Mode::gram) unpack_polynomials(index);
    }
    WeightSlot& slot = weights_[at(gathered_ % weight_slots)];
    if (!b.held) deliver(slot);
    for (const Segment& s : b.segments) {
      if (s.size() == 0) continue;
      if (!met && b.rounds_together) {
        const Task task = task_alone(index, s);
        for_each_rank(b, s, [&](int w) { take(w, task); });
        continue;
      }
      if (!met) {
        for_each_rank(b, s, [&](int w) {
          Ahead& ahead = ahead_[at(w)];
          for (Tasks* tasks : {&ahead.longer, &ahead.brief}) {
            while (tasks->bucket() <= index) take(w, tasks->pop());
          }
        });
        continue;
      }
      const PieceSeconds& piece = of_piece(b, s);
      const double copies = copy_seconds(b, s);
      for_each_rank(b, s, [&](int w) {
        lmo_.add(w, piece.finish_lmo);
        work_.add(w, piece.finish_update);
        copies_.add(w, copies);
      });
    }
    clocks_.compute(Phase::lmo, index, lmo_);
    clocks_.compute(Phase::update, index, work_);
    clocks_.compute(Phase::pack, index, copies_);
    if (b.rounds_together) round_together(index);
    if (b.held) return;
    gather(index, slot);
    ++gathered_;
  }

  /// As in round.cpp; what it computes is of its pieces' updates, and of the matrices.
  void round_together(int index) {
    const Bucket& b = bucket(index);
    const std::vector<RoundingSize> sizes = rounding_sizes(plan_, b);
    const auto all_reduce = [&](Index RoundingSize::*count, int bytes) {
      const auto sent = [&](int w) {
        return cost::all_reduce(sizes[at(w)].*count, plan_.shard, w % plan_.shard,
                                static_cast<std::size_t>(bytes), plan_.max_chunk)
            .bytes;
      };
      Flight& flight = flight_of(index);
      clocks_.start(
          flight, Phase::meet, index, {1, plan_.shard},
          [&](int first) {
            const Index n = sizes[at(first)].*count;
            Call c{.made = n > 0, .kind = Collective::all_reduce};
            c.messages = real(cost::chunks(n, plan_.max_chunk));
            for (int w = first; w < first + plan_.shard && c.made; ++w) {
              c.most = std::max(c.most, real(sent(w)));
              c.all += sent(w);
            }
            return c;
          },
          sent);
      wait_ahead(flight);
    };
    all_reduce(&RoundingSize::scales, 4);
    if (!meets(index) || !plan_.group(b.parameters.front()).feeds_back()) return;
    if (b.mode == Mode::gram_steps || b.mode == Mode::block_cyclic) {
      all_reduce(&RoundingSize::triangles, 4);
    } else if (b.mode != Mode::gram) {
      send_pieces(index);
      wait_ahead(flight_of(index));
      if (b.mode != Mode::gather) {
        send_back(index);
        wait_ahead(flight_of(index));
      }
    }
    all_reduce(&RoundingSize::norms, 8);
  }

  /// The weights of a segment into f32 and out of it, where they do not rest in it.
  double copy_seconds(const Bucket& b, const Segment& s) {
    const ParameterShape& p = parameter(s.parameter);
    if (b.weights.quantized()) return 0;  // of the update: pass_bytes
    const bool rests = rests_in_place(plan_, b, s);
    if (rests && b.weights.dtype == DType::f32) return 0;
    const std::size_t format = bytes_of(b.weights.dtype);
    const std::size_t theirs = bytes_of(p.dtype);
    std::size_t bytes = plan_.group(s.parameter).master ? 0 : (rests ? format : theirs) + 4;
    bytes += 4 + format + (rests ? 0 : format + theirs);
    return pass(real(s.size()) * static_cast<double>(bytes));
  }

  /// Bytes moved per weight between the trainer and a message.
  static double travelling_bytes(const Bucket& b, const ParameterShape& p) {
    const double each = b.size > 0 ? real(b.units) / real(b.size) : 1;
    return each * static_cast<double>(bytes_of(b.weights.unit())) +
           static_cast<double>(bytes_of(p.dtype));
  }

  struct WeightSlot {
    Flight flight;
    int bucket = -1;
    std::size_t level = 0;
  };

  void gather(int index, WeightSlot& slot) {
    for (WeightSlot& other : weights_) {
      while (other.bucket >= 0 && other.level > lowest_level()) gather_level(other);
    }
    const Bucket& b = bucket(index);
    for (const Segment& s : b.segments) {
      if (plan_.weights_sharded()) break;  // they leave from where they rest
      work_.add(s.rank, pass(real(s.size()) * travelling_bytes(b, parameter(s.parameter))));
    }
    clocks_.compute(Phase::pack, index, work_);
    slot.bucket = index;
    slot.level = plan_.levels.size();
    gather_level(slot);
  }

  void gather_level(WeightSlot& slot) {
    wait_ahead(slot.flight);
    if (slot.level == lowest_level()) return;
    --slot.level;
    const Bucket& b = bucket(slot.bucket);
    start_level(slot.flight, Phase::gather, slot.bucket,
                b.weights.quantized() ? codes_[at(slot.bucket)] : b, slot.level,
                plan_.levels.size(), Collective::all_gather, bytes_of(b.weights.unit()));
  }

  void deliver(WeightSlot& slot) {
    if (slot.bucket < 0) return;
    while (slot.level > lowest_level()) gather_level(slot);
    gather_level(slot);
    if (!plan_.weights_sharded()) {
      const Bucket& b = bucket(slot.bucket);
      double bytes = 0;
      for (const int id : b.parameters) {
        bytes += real(parameter(id).size()) * travelling_bytes(b, parameter(id));
      }
      clocks_.compute_all(Phase::unpack, slot.bucket, pass(bytes));
    }
    slot.bucket = -1;
  }

  // ---- meet.cpp ---------------------------------------------------------------------------------

  /// A bucket's call, if one is on its way: no more than three are at a time.
  Flight& flight_of(int index) {
    for (Flight& f : meetings_) {
      if (f.active && f.bucket == index) return f;
    }
    for (Flight& f : meetings_) {
      if (!f.active) return f;
    }
    return meetings_.emplace_back();
  }
  const std::vector<MeetingSize>& sizes_of(int index) {
    if (index != sized_) sizes_ = meeting_sizes(plan_, bucket(index));
    sized_ = index;
    return sizes_;
  }

  /// What a rank gives to a call of a meeting.
  struct Sent {
    Collective kind = Collective::send;
    std::int64_t bytes = 0;
    Index elements = 0;       ///< that make up messages
    std::int64_t copied = 0;  ///< bytes, by a rank alone
  };
  /// A call of every shard group in which something meets. @param sent  sent(rank, its size)
  template <class OfRank>
  void start_meeting(int index, OfRank&& sent) {
    const std::vector<MeetingSize>& sizes = sizes_of(index);
    clocks_.start(
        flight_of(index), Phase::meet, index, {1, plan_.shard},
        [&](int first) {
          const Sent one = sent(first, sizes[at(first)]);
          Call c{.made = sizes[at(first)].matrices > 0, .kind = one.kind};
          c.messages = real(cost::chunks(one.elements, plan_.max_chunk));
          c.copied = real(one.copied);
          for (int w = first; w < first + plan_.shard && c.made; ++w) {
            const std::int64_t bytes = sent(w, sizes[at(w)]).bytes;
            c.most = std::max(c.most, real(bytes));
            c.all += bytes;
          }
          return c;
        },
        [&](int rank) { return sent(rank, sizes[at(rank)]).bytes; });
  }
  std::int64_t all_reduce_bytes(int rank, Index count) const {
    return cost::all_reduce(count, plan_.shard, rank % plan_.shard, 4, plan_.max_chunk).bytes;
  }

  void depart(int index) {
    const Bucket& b = bucket(index);
    for (const Segment& s : b.segments) {
      if (s.size() == 0) continue;
      const PieceSeconds& piece = of_piece(b, s);
      for_each_rank(b, s, [&](int w) {
        work_.add(w, piece.begin_update);
        lmo_.add(w, piece.begin_lmo);
      });
    }
    clocks_.compute(Phase::update, index, work_);
    clocks_.compute(Phase::lmo, index, lmo_);
    if (uses_gram(b.mode)) {
      const std::vector<MeetingSize>& sizes = sizes_of(index);
      for (int w = 0; w < plan_.ranks; ++w) work_.add(w, pass(8 * real(sizes[at(w)].mine)));
      clocks_.compute(Phase::pack, index, work_);
    }
    if (b.mode != Mode::block_cyclic) send_pieces(index);
  }

  /// The first call of a meeting.
  void send_pieces(int index) {
    const Bucket& b = bucket(index);
    const auto wire = static_cast<std::int64_t>(bytes_of(b.wire));
    start_meeting(index, [&](int w, const MeetingSize& n) {
      switch (b.mode) {
        case Mode::gather:
          return Sent{Collective::all_gather, (n.theirs - n.mine) * wire, n.theirs, n.mine * wire};
        case Mode::gram:
          if (!b.lone) {
            return Sent{Collective::reduce_scatter, (n.mine - n.theirs) * 4, n.mine, n.mine * 4};
          }
          [[fallthrough]];
        case Mode::gram_steps:
          return Sent{Collective::all_reduce, all_reduce_bytes(w, n.mine), n.mine};
        default:
          return Sent{Collective::all_to_all, (n.mine - n.own) * wire, 0, n.mine * wire};
      }
    });
  }

  void arrive(int index) {
    const Bucket& b = bucket(index);
    wait_ahead(flight_of(index), /*brief=*/true);
    if (!computed_by_owners(b)) return;
    for (const int i : b.matrices) {
      for_each_computing(b, matrix(i), b.lone,
                         [&](int w) { ahead_[at(w)].owed.push(task_of(b, matrix(i), w)); });
    }
  }

  void compute(int index) {
    const Bucket& b = bucket(index);
    if (b.mode == Mode::gram_steps) return iterate_grams(index);
    if (b.mode == Mode::block_cyclic) return compute_on_grid(index);
    for (const int i : b.matrices) {
      const MatrixPlan& m = matrix(i);
      if (computed_by_owners(b)) {
        for_each_computing(b, m, b.lone, [&](int w) {
          Tasks& owed = ahead_[at(w)].owed;
          while (owed.bucket() <= index) take(w, owed.pop());
        });
      } else {
        for_each_computing(b, m, true, [&](int w) { take(w, task_of(b, m, w)); });
      }
    }
  }

  void send_back(int index) {
    const Bucket& b = bucket(index);
    const auto wire = static_cast<std::int64_t>(bytes_of(b.wire));
    start_meeting(index, [&](int, const MeetingSize& n) {
      if (b.mode == Mode::gram) {
        return Sent{Collective::all_gather, (n.back - n.own_back) * 4, n.back, 0};
      }
      return Sent{Collective::all_to_all, (n.theirs - n.own) * wire, 0, n.theirs * wire};
    });
  }

  /// What a matrix takes of rank w, which computes it or a share of it.
  Task task_of(const Bucket& b, const MatrixPlan& m, int w) {
    const int index = static_cast<int>(&b - plan_.buckets.data());
    if (b.mode == Mode::gram) {
      const double share = computed_share(plan_, m, w);
      const double packed = std::max(1, m.shared_terms) * triangle(m) * share;
      return {index, compute_seconds(plan_, profile_, m) * share, 0,
              pass(unpack_bytes(m)) + pass(8 * packed)};
    }
    return {index, of_whole(plan_.group(m.parameter), m.rows, m.cols), 0,
            pass(16 * real(m.rows) * real(m.cols)), Phase::meet};
  }

  /// f(rank) for those that compute matrix m.
  template <class F>
  void for_each_computing(const Bucket& b, const MatrixPlan& m, bool all, F&& f) const {
    for (int first = 0; first < plan_.ranks; first += plan_.shard) {
      if (!plan_.meets_in(b, m, first)) continue;
      if (!all) {
        f(first + m.owner % plan_.shard);
        continue;
      }
      for (int w = first; w < first + plan_.shard; ++w) f(w);
    }
  }

  void unpack_polynomials(int index) {
    const Bucket& b = bucket(index);
    for (const Segment& s : b.segments) {
      if (s.size() == 0) continue;
      const MatrixPlan& m = matrix(s.matrix);
      const double more_terms = std::max(0, m.shared_terms - 1) * triangle(m);
      const double seconds = pass(unpack_bytes(m) + 4 * more_terms);
      for_each_rank(b, s, [&](int w) { work_.add(w, seconds); });
    }
    clocks_.compute(Phase::unpack, index, work_);
  }

  void iterate_grams(int index) {
    const Bucket& b = bucket(index);
    const Group& group = plan_.group(matrix(b.matrices.front()).parameter);
    const auto iterations = std::ssize(group.lmo->iterations());
    for (std::ptrdiff_t t = 0; t < iterations; ++t) {
      if (t > 0) {
        send_pieces(index);
        wait_ahead(flight_of(index), /*brief=*/true);
      }
      for (const int i : b.matrices) {
        const MatrixPlan& m = matrix(i);
        const double lmo = compute_seconds(plan_, profile_, m) / static_cast<double>(iterations);
        const double copies =
            pass(unpack_bytes(m)) + (t + 1 < iterations ? pass(8 * triangle(m)) : 0);
        for_each_computing(b, m, /*all=*/true, [&](int w) {
          lmo_.add(w, lmo);
          work_.add(w, copies);
        });
      }
      for (const Segment& s : b.segments) {
        if (s.size() == 0) continue;
        const PieceSeconds& piece = of_piece(b, s);
        const double gram = t + 1 < iterations ? piece.begin_lmo : 0;
        for_each_rank(b, s, [&](int w) { lmo_.add(w, piece.compute_lmo + gram); });
      }
      clocks_.compute(Phase::unpack, index, work_);
      clocks_.compute(Phase::lmo, index, lmo_);
    }
  }

  /// All of a grid's messages at once: they overlap nothing.
  void compute_on_grid(int index) {
    const Bucket& b = bucket(index);
    const std::vector<MeetingSize>& sizes = sizes_of(index);
    Flight& flight = flight_of(index);
    clocks_.start(
        flight, Phase::meet, index, {1, plan_.shard},
        [&](int first) {
          Call c{.made = sizes[at(first)].matrices > 0, .kind = Collective::broadcast};
          c.messages = 0;
          for (int w = first; w < first + plan_.shard && c.made; ++w) {
            const Traffic& sent = sizes[at(w)].grid;
            c.most = std::max(c.most, real(sent.bytes));
            c.messages = std::max(c.messages, real(sent.messages));
            c.all += sent.bytes;
          }
          return c;
        },
        [&](int rank) { return sizes[at(rank)].grid.bytes; });
    clocks_.wait(flight);
    for (const int i : b.matrices) {
      const double lmo = compute_seconds(plan_, profile_, matrix(i));
      for_each_computing(b, matrix(i), /*all=*/true, [&](int w) { lmo_.add(w, lmo); });
    }
    clocks_.compute(Phase::lmo, index, lmo_);
  }

  static double triangle(const MatrixPlan& m) { return real(kernels::packed_size(m.gram_side())); }
  static double unpack_bytes(const MatrixPlan& m) {
    return 4 * triangle(m) + 4 * real(m.gram_side()) * real(m.gram_side());
  }

  // ---- seconds ----------------------------------------------------------------------------------

  double of_whole(const Group& group, Index rows, Index cols) {
    if (&group != last_whole_.group || rows != last_whole_.rows || cols != last_whole_.cols) {
      last_whole_ = {
          &group, rows, cols,
          lmo_seconds(profile_, group, rows, cols) + feedback_seconds(profile_, group, rows, cols)};
    }
    return last_whole_.seconds;
  }

  /// `piece_seconds` by where it is spent. Passes are divided by their bytes: of the update's the
  /// weights are read and written when the direction is there, the rest with the gradient.
  const PieceSeconds& of_piece(const Bucket& b, const Segment& s) {
    const Index rows = s.region.rows;
    const Index cols = s.region.cols;
    if (s.matrix == last_piece_.matrix && rows == last_piece_.rows && cols == last_piece_.cols) {
      return last_piece_.seconds;
    }
    const MatrixPlan& m = matrix(s.matrix);
    const Group& group = plan_.group(m.parameter);
    const double state = pass_bytes(group) - 8;  // and the gradient
    const auto iterations = static_cast<double>(group.lmo->iterations().size());
    const double undo = undo_seconds(plan_, profile_, m, s);
    const double all = piece_seconds(plan_, profile_, m, s) - undo;
    PieceSeconds piece;
    double copied = 4;   // bytes per element beside them, before what meets has met…
    double finish = 12;  // …and all that come after
    double passes = all;
    if (uses_gram(b.mode)) {
      const Index lines = m.z_lines(s.region);
      const double gram = syrk_seconds(profile_, DType::f32, m.gram_side(), lines);
      const double product =
          gemm_seconds(profile_, DType::f32, m.gram_side(), lines, m.gram_side());
      piece.begin_lmo = gram;
      if (b.mode == Mode::gram) {
        piece.finish_lmo = product;
        passes -= gram + product;
        finish = 20;
      } else {
        const double update = pass_seconds(profile_, pass_bytes(group) * real(s.size()));
        piece.compute_lmo = (all - update) / iterations - gram;
        passes = update;
        copied = 0;
        finish = 8;
      }
    }
    passes = std::max(passes, (state + copied + finish) * real(s.size()) / cold_rate_);
    piece.begin_update = passes * (state + copied) / (state + copied + finish);
    piece.finish_update = passes - piece.begin_update + undo;
    last_piece_ = {s.matrix, rows, cols, piece};
    return last_piece_.seconds;
  }

  // ---- working_set.cpp --------------------------------------------------------------------------

  /// All weights once, as `WorkingSet::gather` of all of them brings them.
  void gather_all() {
    if (shards_.empty()) find_shards();
    const std::size_t levels = plan_.shard_levels();
    for (const Shards& shards : shards_) {
      for (const Bucket::Part& part : shards.pieces.parts) {
        const double copy = pass(2 * real(part.size));
        for (int k = 0; k < plan_.replicate; ++k) {
          work_.add(rank_of_[at(part.slot * plan_.replicate + k)], copy);
        }
      }
      clocks_.compute(Phase::pack, shards.bucket, work_);
      for (std::size_t level = levels; level-- > 0;) {
        start_level(gathers_, Phase::gather, shards.bucket, shards.pieces, level, levels,
                    Collective::all_gather, 1);
        clocks_.wait(gathers_);
      }
      clocks_.compute_all(Phase::unpack, shards.bucket, pass(shards.unpacked));
    }
  }

  /// What travels in one message: parameters in their order, as many as a staging buffer holds.
  void find_shards() {
    const std::size_t staging = plan_.per_rank.front().work.gathered;
    std::vector<int> message_of(plan_.parameters.size(), -1);
    std::size_t filled = 0;
    for (std::size_t i = 0; i < plan_.parameters.size(); ++i) {
      const ParameterShape& p = plan_.parameters[i];
      if (p.held()) continue;
      const std::size_t bytes = plan_.at_rest[i];
      if (shards_.empty() || filled + bytes > staging) {
        shards_.emplace_back();
        filled = 0;
      }
      filled += bytes;
      shards_.back().unpacked +=
          static_cast<double>(bytes) + real(p.size()) * static_cast<double>(bytes_of(p.dtype));
      message_of[i] = static_cast<int>(shards_.size()) - 1;
    }
    for (int b = 0; b < std::ssize(plan_.buckets); ++b) {
      for (const Segment& s : bucket(b).segments) {
        const int message = message_of[at(s.parameter)];
        if (message < 0 || s.size() == 0) continue;
        Shards& shards = shards_[at(message)];
        if (shards.bucket < 0) shards.bucket = b;
        shards.pieces.parts.push_back({slot_of_[at(s.rank)] / plan_.replicate, 0,
                                       static_cast<Index>(plan_.piece_bytes(bucket(b), s))});
      }
    }
    for (Shards& shards : shards_) {
      auto& parts = shards.pieces.parts;
      std::stable_sort(parts.begin(), parts.end(),
                       [](const auto& x, const auto& y) { return x.slot < y.slot; });
      std::size_t last = 0;
      for (std::size_t i = 1; i < parts.size(); ++i) {
        if (parts[i].slot == parts[last].slot) {
          parts[last].size += parts[i].size;
        } else {
          parts[++last] = parts[i];
        }
      }
      if (!parts.empty()) parts.resize(last + 1);
      for (Bucket::Part& part : parts) {
        part.offset = shards.pieces.size;
        shards.pieces.size += part.size;
      }
    }
  }

  struct Shards {
    Bucket pieces;  ///< in bytes, by slot of the shard group
    int bucket = -1;
    double unpacked = 0;  ///< bytes read and written where it becomes whole
  };

  const Plan& plan_;
  const MachineProfile& profile_;
  double backward_s_;
  Clocks& clocks_;
  std::vector<int> slot_of_, rank_of_;
  std::vector<Bucket> codes_;  ///< per bucket: its weights in bytes, where they are quantized
  Work work_, lmo_, copies_;
  std::vector<Ahead> ahead_;         ///< per rank
  int gathered_ = 0;                 ///< buckets whose weights have left
  std::vector<int> cut_;             ///< what `find_shares` found
  std::vector<Index> whole_, most_;  ///< elements cut, and the most that one part lacks of them
  std::array<Flight, gradient_slots> gradients_;
  std::array<std::size_t, gradient_slots> level_{};
  std::vector<Flight> meetings_;
  std::vector<MeetingSize> sizes_;  ///< per rank, of bucket `sized_`
  int sized_ = -1;
  std::array<WeightSlot, weight_slots> weights_;
  Flight control_, gathers_;
  std::vector<Shards> shards_;                             ///< messages of `gather_all`
  std::int64_t round_ = 0;                                 ///< of reductions
  Index ready_ = 0, packed_ = 0, next_ = 0, arrived_ = 0;  ///< buckets of it
  double cold_rate_ = 0;                                   ///< bytes per second
  double last_bytes_ = 0, last_pass_ = 0;
  struct {
    const Group* group = nullptr;
    Index rows = 0, cols = 0;
    double seconds = 0;
  } last_whole_;
  struct {
    int matrix = -1;
    Index rows = 0, cols = 0;
    PieceSeconds seconds;
  } last_piece_;
};

/// The rank that computes most by the plan, rank 0, and more at equal distances.
std::vector<int> choose_shown(const Plan& plan, int count) {
  if (count <= 0) return {};
  const auto busiest =
      std::max_element(plan.per_rank.begin(), plan.per_rank.end(),
                       [](const RankPlan& a, const RankPlan& b) { return a.seconds < b.seconds; });
  std::vector<int> shown{static_cast<int>(busiest - plan.per_rank.begin())};
  count = std::min(count, plan.ranks);
  const auto add = [&](int rank) {
    const bool there = std::find(shown.begin(), shown.end(), rank) != shown.end();
    if (!there && std::ssize(shown) < count) shown.push_back(rank);
  };
  for (int i = 0; i < count; ++i) add(static_cast<int>(Index{i} * plan.ranks / count));
  for (int w = 0; w < plan.ranks; ++w) add(w);  // where the busiest was among them
  std::sort(shown.begin(), shown.end());
  return shown;
}

}  // namespace

PhaseTime Timeline::total(int rank) const {
  PhaseTime sum;
  for (const PhaseTime& t : ranks[at(rank)]) {
    sum.compute += t.compute;
    sum.communication += t.communication;
    sum.exposed += t.exposed;
    sum.waiting += t.waiting;
  }
  return sum;
}

Timeline make_timeline(const Plan& plan, const MachineProfile& profile,
                       const TimelineOptions& options) {
  Clocks clocks(profile, options, choose_shown(plan, options.ranks_shown), plan.ranks);
  Walk(plan, profile, options, clocks).step();
  return clocks.result();
}

std::string label_of(const Plan& plan, const TimelineEvent& event) {
  if (event.bucket < 0) return {};
  const Bucket& b = plan.buckets[at(event.bucket)];
  return b.matrices.empty() ? plan.parameters[at(b.parameters.front())].name
                            : plan.matrices[at(b.matrices.front())].name;
}

}  // namespace orthrus::runtime
