// The order in which a step walks its buckets, and where what meets lies meanwhile.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <orthrus/error.hpp>

#include "runtime/arena.hpp"
#include "runtime/schedule.hpp"

namespace orthrus::runtime {
namespace {

using Kind = Turn::Kind;

/// Matrices of 32×32 and wider ones, and vectors between them, one or a few to a bucket.
Plan plan_of(const std::string& mode, int ranks, int matrices, int per_bucket, int replicas = 1,
             const std::string& extra = "") {
  std::vector<ParameterShape> shapes;
  for (int i = 0; i < matrices; ++i) {
    ParameterShape p;
    p.name = "w" + std::to_string(i);
    p.shape = {32, i % 3 == 0 ? 96 : 32};
    if (mode == "shared terms") p.shape = {512, 600};  // large enough to pay
    shapes.push_back(p);
    if (i % 4 != 1) continue;
    p.name = "b" + std::to_string(i);
    p.shape = {100};
    shapes.push_back(p);
  }
  const auto group = [](const std::string& match, const std::string& m) {
    const bool rational = m == "shared terms";
    return "  - {match: '" + match + "', rule: {name: muon}, matrix: {mode: " +
           (rational ? "gram}, lmo: {coefficients: rational" : m) + "}}\n";
  };
  const std::string groups = mode != "mixed" ? group("w*", mode)
                                             : group("w*1", "gather") + group("w*2", "exchange") +
                                                   group("w*3", "gram_steps") +
                                                   group("w*4", "owner") + group("w*", "gram");
  return make_plan(
      parse_config("schema: 1\ncomm: {bucket_bytes: " + std::to_string(per_bucket * 4096) +
                   "}\nmesh: {replicate: " + std::to_string(replicas) + "}\n" + extra +
                   "groups:\n" + groups + "  - {match: 'b*', rule: {name: adamw}}\n"),
      std::move(shapes), ranks);
}

struct Case {
  const char* mode;
  int ranks, matrices, per_bucket, replicas = 1;
};
std::vector<Case> cases() {
  std::vector<Case> all;
  for (const char* mode :
       {"owner", "exchange", "gather", "gram", "gram_steps", "block_local", "mixed"}) {
    for (const int ranks : {1, 2, 3, 5, 8}) {
      for (const int per_bucket : {1, 3, 100}) {
        all.push_back({mode, ranks, 31, per_bucket});
        all.push_back({mode, ranks, 1, per_bucket});
        if (ranks % 2 == 0) all.push_back({mode, ranks, 31, per_bucket, 2});
      }
    }
  }
  for (const int ranks : {1, 2, 3, 5, 8}) {
    all.push_back({"shared terms", ranks, 1, 3});
    if (ranks % 2 == 0) all.push_back({"shared terms", ranks, 1, 3, 2});
  }
  return all;
}
Plan plan_of(const Case& c) {
  return plan_of(c.mode, c.ranks, c.matrices, c.per_bucket, c.replicas);
}
std::string label(const Case& c) {
  return std::string(c.mode) + ", " + std::to_string(c.ranks) + " ranks, " +
         std::to_string(c.matrices) + " matrices, " + std::to_string(c.per_bucket) +
         " per bucket, " + std::to_string(c.replicas) + " replicas";
}

TEST(Schedule, EveryBucketHasItsTurnsInTheirOrder) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(label(c));
    const Plan plan = plan_of(c);
    std::map<int, std::vector<Kind>> turns;
    for (const Turn& t : plan.schedule) turns[t.bucket].push_back(t.kind);
    ASSERT_EQ(std::ssize(turns), std::ssize(plan.buckets));
    for (const auto& [b, kinds] : turns) {
      const Bucket& bucket = plan.buckets[static_cast<std::size_t>(b)];
      std::vector<Kind> expected{Kind::complete};
      if (computed_by_owners(bucket)) {
        expected = {Kind::depart, Kind::arrive, Kind::compute, Kind::send_back, Kind::complete};
      } else if (!bucket.matrices.empty()) {
        expected = {Kind::depart, Kind::arrive, Kind::compute, Kind::complete};
      }
      EXPECT_EQ(kinds, expected) << "bucket " << b;
    }
  }
}

TEST(Schedule, SharedTermsComeBackAndTakeThePlaceOfTheirSum) {
  int seen = 0;
  for (const Case& c : cases()) {
    if (c.mode != std::string("shared terms")) continue;
    SCOPED_TRACE(label(c));
    const Plan plan = plan_of(c);
    for (const Bucket& b : plan.buckets) {
      if (b.matrices.empty()) continue;
      EXPECT_EQ(b.shared_terms, plan.shard > 1 ? 3 : 0);
      EXPECT_EQ(computed_by_owners(b), plan.shard > 1);
      ++seen;
    }
    if (plan.shard == 1) continue;
    const std::size_t triangle = 512 * 513 / 2 * 4;
    for (int w = 0; w < plan.ranks; ++w) {
      const bool meets = plan.meets_in(plan.buckets.front(), plan.matrices.front(), w);
      EXPECT_EQ(plan.per_rank[static_cast<std::size_t>(w)].work.meetings, meets ? 3 * triangle : 0);
    }
  }
  EXPECT_EQ(seen, 7);
}

TEST(Schedule, TwoBucketsAreOnTheirWayInEachDirection) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(label(c));
    const Plan plan = plan_of(c);
    int there = 0;
    int back = 0;
    for (const Turn& t : plan.schedule) {
      const Bucket& b = plan.buckets[static_cast<std::size_t>(t.bucket)];
      if (b.matrices.empty()) continue;
      const bool returns = computed_by_owners(b);
      there += t.kind == Kind::depart ? 1 : t.kind == Kind::arrive ? -1 : 0;
      back += t.kind == Kind::send_back ? 1 : t.kind == Kind::complete && returns ? -1 : 0;
      EXPECT_LE(there, 2);
      EXPECT_LE(back, 2);
    }
    EXPECT_EQ(there, 0);
    EXPECT_EQ(back, 0);
  }
}

TEST(Schedule, EveryWaveHasAMatrixForEveryRank) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(label(c));
    const Plan plan = plan_of(c);
    // A wave is computed from the first `compute` after a `send_back` on.
    std::vector<double> waves;  // in seconds of all ranks together
    std::vector<double> largest;
    bool computing = false;
    bool all_by_owners = true;
    for (const Turn& t : plan.schedule) {
      const Bucket& b = plan.buckets[static_cast<std::size_t>(t.bucket)];
      all_by_owners = all_by_owners && (b.matrices.empty() || computed_by_owners(b));
      if (!computed_by_owners(b) || t.kind == Kind::depart || t.kind == Kind::arrive) continue;
      if (t.kind == Kind::compute && !computing) {
        waves.push_back(0);
        largest.push_back(0);
      }
      if (t.kind == Kind::complete && !computing) continue;
      computing = t.kind == Kind::compute;
      if (!computing) continue;
      for (const int m : b.matrices) {
        const double seconds = plan.matrices[static_cast<std::size_t>(m)].seconds;
        waves.back() += seconds;
        largest.back() = std::max(largest.back(), seconds);
      }
    }
    // But for the last, and where what all compute together lies between.
    for (std::size_t k = 0; all_by_owners && k + 1 < waves.size(); ++k) {
      EXPECT_GE(waves[k], plan.ranks * largest[k] * (1 - 1e-12)) << "wave " << k;
    }
  }
}

TEST(Schedule, BuffersThatAreInUseNeverOverlap) {
  struct Span {
    std::size_t begin, end;
  };
  for (const Case& c : cases()) {
    SCOPED_TRACE(label(c));
    const Plan plan = plan_of(c);
    for (int w = 0; w < plan.ranks; ++w) {
      MeetingArena arena;
      std::map<std::pair<int, char>, Span> in_use;
      std::size_t most = 0;
      for (const Turn& t : plan.schedule) {
        const Bucket& b = plan.buckets[static_cast<std::size_t>(t.bucket)];
        if (b.matrices.empty()) continue;
        const MeetingSize size = meeting_sizes(plan, b)[static_cast<std::size_t>(w)];
        const auto places = arena.take_turn(b, t, size);
        const auto use = [&](char what, std::size_t begin, std::size_t bytes) {
          if (begin == MeetingArena::nowhere || bytes == 0) return;
          for (const auto& [key, span] : in_use) {
            EXPECT_TRUE(begin >= span.end || begin + bytes <= span.begin)
                << what << " of bucket " << t.bucket << " lies on " << key.second << " of bucket "
                << key.first;
          }
          EXPECT_EQ(begin % Arena::alignment, 0U);
          EXPECT_LE(begin + bytes, arena.bytes());
          in_use[{t.bucket, what}] = {begin, begin + bytes};
        };
        use('m', places.mine, mine_bytes(b, size));
        use('t', places.theirs, theirs_bytes(b, size));
        use('b', places.back, back_bytes(b, size));
        std::size_t sum = 0;
        for (const auto& [key, span] : in_use) sum += Arena::rounded(span.end - span.begin);
        most = std::max(most, sum);
        // What was sent is read until it has arrived, what arrived until it is applied.
        const bool moved = computed_by_owners(b) && !b.lone;  // else it is summed in place
        if (t.kind == Kind::arrive && moved) in_use.erase({t.bucket, 'm'});
        if (t.kind != Kind::complete) continue;
        for (const char what : {'m', 't', 'b'}) in_use.erase({t.bucket, what});
      }
      EXPECT_EQ(plan.per_rank[static_cast<std::size_t>(w)].work.meetings, arena.bytes());
      EXPECT_GE(arena.bytes(), most);
      // First fit leaves gaps, but not as much again.
      EXPECT_LE(arena.bytes(), 2 * most);
    }
  }
}

TEST(Schedule, BringsFewerTogetherWhereTheCapAsksForIt) {
  std::int64_t cap = 0;
  std::vector<int> depths;
  std::vector<std::string> hashes;
  // Each time one byte less than the last plan needs, until none fits.
  for (;;) {
    try {
      const Plan plan =
          plan_of("exchange", 4, 48, 1, 1, "memory_cap: " + std::to_string(cap) + "\n");
      std::int64_t needed = 0;
      for (const RankPlan& r : plan.per_rank) needed = std::max(needed, r.memory.total());
      EXPECT_TRUE(cap == 0 || needed <= cap);
      depths.push_back(plan.depth);
      hashes.push_back(plan.hash);
      cap = needed - 1;
    } catch (const ConfigError& e) {
      EXPECT_NE(std::string(e.what()).find(std::to_string(cap + 1)), std::string::npos) << e.what();
      break;
    }
  }
  EXPECT_EQ(depths, (std::vector{2, 1, 0}));
  EXPECT_NE(hashes.front(), hashes.back());
}

}  // namespace
}  // namespace orthrus::runtime
