#include "runtime/schedule.hpp"

#include <algorithm>
#include <tuple>

#include "runtime/arena.hpp"

namespace orthrus::runtime {

using optim::Mode;

bool computed_by_owners(const Bucket& b) {
  return b.mode == Mode::exchange || b.mode == Mode::periodic || (b.mode == Mode::gram && !b.lone);
}

int lag_of(const Plan& plan) {
  Index buckets = 0;
  Index matrices = 0;
  for (const Bucket& b : plan.buckets) {
    if (b.matrices.empty() || !computed_by_owners(b)) continue;
    ++buckets;
    matrices += std::ssize(b.matrices) * (b.held ? plan.replicate : 1);
  }
  if (matrices >= buckets * plan.ranks) return 0;
  const Index at_once = (2 * plan.ranks * buckets + matrices - 1) / matrices;
  return static_cast<int>(std::min(buckets, at_once) - 1);
}

std::vector<Turn> make_schedule(const Plan& plan) {
  // Time counts meetings: meeting n departs at n, and at each time these happen in this order.
  std::vector<std::tuple<int, Turn::Kind, int>> turns;
  int met = 0;
  for (int b = 0; b < static_cast<int>(std::ssize(plan.buckets)); ++b) {
    const Bucket& bucket = plan.buckets[static_cast<std::size_t>(b)];
    if (bucket.matrices.empty()) {
      turns.emplace_back(met + 1 + plan.lag, Turn::Kind::complete, b);
      continue;
    }
    const int lag = computed_by_owners(bucket) ? plan.lag : 0;
    turns.emplace_back(met, Turn::Kind::depart, b);
    turns.emplace_back(met + 1, Turn::Kind::arrive, b);
    turns.emplace_back(met + 1 + lag, Turn::Kind::send_back, b);
    turns.emplace_back(met + 2 + lag, Turn::Kind::complete, b);
    ++met;
  }
  std::sort(turns.begin(), turns.end());
  std::vector<Turn> schedule;
  for (const auto& [time, kind, bucket] : turns) schedule.push_back({kind, bucket});
  return schedule;
}

MeetingArena::Places MeetingArena::turn(const Bucket& b, Turn turn, const MeetingSize& size) {
  Places places;
  const bool owners = computed_by_owners(b);
  if (turn.kind == Turn::Kind::depart) {
    // What was sent is not needed after it has arrived; where all compute together it is.
    const auto until = owners ? Turn::Kind::arrive : Turn::Kind::complete;
    places.mine = take(turn.bucket, until, mine_bytes(b, size));
    places.theirs = take(turn.bucket, Turn::Kind::complete, theirs_bytes(b, size));
  } else if (turn.kind == Turn::Kind::send_back && owners) {
    places.back = take(turn.bucket, Turn::Kind::complete, back_bytes(b, size));
  }
  std::erase_if(live_,
                [&](const Live& l) { return l.bucket == turn.bucket && l.until == turn.kind; });
  return places;
}

std::size_t MeetingArena::take(int bucket, Turn::Kind until, std::size_t bytes) {
  bytes = Arena::rounded(bytes);
  if (bytes == 0) return 0;
  std::size_t begin = 0;
  auto at = live_.begin();
  for (; at != live_.end() && at->begin < begin + bytes; ++at) begin = at->end;
  live_.insert(at, {bucket, until, begin, begin + bytes});
  bytes_ = std::max(bytes_, begin + bytes);
  return begin;
}

}  // namespace orthrus::runtime
