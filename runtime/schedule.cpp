#include "runtime/schedule.hpp"

#include <algorithm>

#include "runtime/arena.hpp"

namespace orthrus::runtime {

using optim::Mode;

namespace {

struct Wave {
  std::vector<int> buckets;
  int owned = 0;        ///< of them are computed by owners
  bool common = false;  ///< one of them is computed by all together
  double seconds = 0;   ///< of all matrices that owners compute
  double largest = 0;   ///< of one
};

std::vector<Wave> waves_of(const Plan& plan) {
  std::vector<Wave> waves(1);
  for (int index = 0; index < static_cast<int>(std::ssize(plan.buckets)); ++index) {
    const Bucket& b = plan.buckets[static_cast<std::size_t>(index)];
    if (!b.matrices.empty()) {
      const Wave& last = waves.back();
      const double round = last.largest * plan.ranks;
      const int rounds = last.owned == 1 ? std::min(plan.depth, 1) : plan.depth;
      const bool full = last.common || (last.owned > 0 && last.seconds >= rounds * round);
      if (full) waves.emplace_back();
    }
    Wave& wave = waves.back();
    wave.buckets.push_back(index);
    if (b.matrices.empty()) continue;
    if (!computed_by_owners(b)) {
      wave.common = true;
      continue;
    }
    ++wave.owned;
    for (const int m : b.matrices) {
      const double seconds = plan.matrices[static_cast<std::size_t>(m)].seconds;
      wave.seconds += seconds * (b.held ? plan.replicate : 1);
      wave.largest = std::max(wave.largest, seconds);
    }
  }
  return waves;
}

/// Puts turns in order.
class Scheduler {
 public:
  explicit Scheduler(const Plan& plan) : plan_(plan) {}

  void send(const Wave& wave) {
    for (const int b : wave.buckets) {
      if (bucket(b).matrices.empty()) continue;
      add(Turn::Kind::depart, b);
      receive();
      travelling_ = b;
    }
  }
  /// What is still on its way.
  void receive() {
    if (travelling_ < 0) return;
    add(Turn::Kind::arrive, travelling_);
    if (!computed_by_owners(bucket(travelling_))) {
      add(Turn::Kind::compute, travelling_);
      add(Turn::Kind::complete, travelling_);
    }
    travelling_ = -1;
  }
  void send_back(const Wave& wave) {
    for (const int b : wave.buckets) {
      if (computed_by_owners(bucket(b))) add(Turn::Kind::compute, b);
    }
    for (const int b : wave.buckets) {
      if (bucket(b).matrices.empty()) add(Turn::Kind::complete, b);
      if (!computed_by_owners(bucket(b))) continue;
      add(Turn::Kind::send_back, b);
      receive_back();
      returning_ = b;
    }
  }
  void receive_back() {
    if (returning_ >= 0) add(Turn::Kind::complete, returning_);
    returning_ = -1;
  }
  std::vector<Turn> take() { return std::move(turns_); }

 private:
  [[nodiscard]] const Bucket& bucket(int b) const {
    return plan_.buckets[static_cast<std::size_t>(b)];
  }
  void add(Turn::Kind kind, int b) { turns_.push_back({kind, b}); }

  const Plan& plan_;
  std::vector<Turn> turns_;
  int travelling_ = -1, returning_ = -1;
};

}  // namespace

bool computed_by_owners(const Bucket& b) {
  if (b.matrices.empty()) return false;
  return b.mode == Mode::exchange || b.mode == Mode::periodic ||
         (b.mode == Mode::gram && (!b.lone || b.shared_terms > 0));
}

std::vector<Turn> make_schedule(const Plan& plan) {
  const std::vector<Wave> waves = waves_of(plan);
  Scheduler scheduler(plan);
  scheduler.send(waves.front());
  for (std::size_t k = 0; k < waves.size(); ++k) {
    if (k + 1 < waves.size()) {
      scheduler.send(waves[k + 1]);
    } else {
      scheduler.receive();
    }
    scheduler.send_back(waves[k]);
  }
  scheduler.receive_back();
  return scheduler.take();
}

MeetingArena::Places MeetingArena::take_turn(const Bucket& b, Turn turn, const MeetingSize& size) {
  Places places;
  if (turn.kind == Turn::Kind::depart) {
    // What was sent is not needed after it has arrived; where it is summed in place it is.
    const bool moves_on = computed_by_owners(b) && !b.lone;
    const auto until = moves_on ? Turn::Kind::arrive : Turn::Kind::complete;
    places.mine = take(turn.bucket, until, mine_bytes(b, size));
    places.theirs = take(turn.bucket, Turn::Kind::complete, theirs_bytes(b, size));
    places.undo = take(turn.bucket, Turn::Kind::complete, size.undo);
  } else if (turn.kind == Turn::Kind::send_back) {
    places.back = take(turn.bucket, Turn::Kind::complete, back_bytes(b, size));
  }
  std::erase_if(live_,
                [&](const Live& l) { return l.bucket == turn.bucket && l.until == turn.kind; });
  return places;
}

std::size_t MeetingArena::take(int bucket, Turn::Kind until, std::size_t bytes) {
  bytes = Arena::rounded(bytes);
  if (bytes == 0) return nowhere;
  std::size_t begin = 0;
  auto at = live_.begin();
  for (; at != live_.end() && at->begin < begin + bytes; ++at) begin = at->end;
  live_.insert(at, {bucket, until, begin, begin + bytes});
  bytes_ = std::max(bytes_, begin + bytes);
  return begin;
}

}  // namespace orthrus::runtime
