// The definitions of runtime.md 4.1, in numbers worked out by hand.
#include <gtest/gtest.h>

#include <array>
#include <numeric>
#include <vector>

#include "comm/cost.hpp"

namespace {

using orthrus::Index;
using orthrus::Traffic;
namespace cost = orthrus::cost;
constexpr Index whole = 0x7fffffff;

TEST(Cost, ACallIsAtLeastOneMessage) {
  EXPECT_EQ(cost::chunks(0, 3), 1);
  EXPECT_EQ(cost::chunks(1, 3), 1);
  EXPECT_EQ(cost::chunks(3, 3), 1);
  EXPECT_EQ(cost::chunks(4, 3), 2);
  EXPECT_EQ(cost::chunks(whole, whole), 1);
  EXPECT_EQ(cost::chunks(whole + 1, whole), 2);
  EXPECT_EQ(cost::chunks(Index{5} << 31, whole), 6);
}

TEST(Cost, ReduceScatterAndAllGatherSendAllButTheOwnPart) {
  const std::vector<Index> counts{4, 0, 10};
  const std::array<Index, 3> bytes{40, 56, 16};  // 4·(14 − 4), 4·14, 4·(14 − 10)
  for (int r = 0; r < 3; ++r) {
    EXPECT_EQ(cost::reduce_scatter(counts, r, 4, whole),
              (Traffic{bytes[static_cast<std::size_t>(r)], 1}));
    EXPECT_EQ(cost::all_gather(counts, r, 4, 5), (Traffic{bytes[static_cast<std::size_t>(r)], 3}));
  }
  EXPECT_EQ(cost::all_gather(std::vector<Index>{9}, 0, 8, whole), (Traffic{0, 1}));
}

TEST(Cost, AllReduceIsBothOverNearlyEqualParts) {
  // 14 = 4 + 4 + 3 + 3 elements of 2 bytes
  EXPECT_EQ(cost::all_reduce(14, 4, 0, 2, whole), (Traffic{40, 1}));
  EXPECT_EQ(cost::all_reduce(14, 4, 3, 2, whole), (Traffic{44, 1}));
  // messages of 5, 5, 4: parts 2 1 1 1, 2 1 1 1, 1 1 1 1
  EXPECT_EQ(cost::all_reduce(14, 4, 0, 2, 5), (Traffic{2 * 2 * (3 + 3 + 3), 3}));
  EXPECT_EQ(cost::all_reduce(14, 4, 1, 2, 5), (Traffic{2 * 2 * (4 + 4 + 3), 3}));
  EXPECT_EQ(cost::all_reduce(0, 4, 1, 2, whole), (Traffic{0, 1}));
  EXPECT_EQ(cost::all_reduce(14, 1, 0, 2, whole), (Traffic{0, 1}));
}

TEST(Cost, AllReduceSumsToTheRingsBytesOverTheRanks) {
  for (int p = 1; p <= 9; ++p) {
    for (const Index n : {0, 1, 7, 64, 1001}) {
      Index sent = 0;
      for (int r = 0; r < p; ++r) sent += cost::all_reduce(n, p, r, 4, whole).bytes;
      EXPECT_EQ(sent, 2 * (p - 1) * n * 4) << p << " ranks, " << n << " elements";
    }
  }
}

TEST(Cost, AllToAllSendsWhatGoesToOthers) {
  const std::vector<Index> counts{7, 3, 0, 8};
  EXPECT_EQ(cost::all_to_all(counts, 0, 4, whole), (Traffic{44, 1}));
  EXPECT_EQ(cost::all_to_all(counts, 3, 4, whole), (Traffic{40, 1}));
  // Parts cut at 3: 7 = 3 + 3 + 1 and 8 = 3 + 3 + 2 leave two messages each behind.
  EXPECT_EQ(cost::all_to_all(counts, 0, 4, 3), (Traffic{44, 3}));
  EXPECT_EQ(cost::all_to_all(counts, 1, 4, 3), (Traffic{60, 5}));
}

TEST(Cost, ChainsPassTheWholeOn) {
  EXPECT_EQ(cost::broadcast(10, 4, 1, 1, 8, whole), (Traffic{80, 1}));  // root
  EXPECT_EQ(cost::broadcast(10, 4, 3, 1, 8, whole), (Traffic{80, 1}));
  EXPECT_EQ(cost::broadcast(10, 4, 0, 1, 8, whole), (Traffic{0, 1}));  // last: 1 → 2 → 3 → 0
  EXPECT_EQ(cost::broadcast(10, 1, 0, 0, 8, 4), (Traffic{0, 3}));
  EXPECT_EQ(cost::reduce(10, 4, 1, 1, 8, whole), (Traffic{0, 1}));  // root
  EXPECT_EQ(cost::reduce(10, 4, 0, 1, 8, 4), (Traffic{80, 3}));
  EXPECT_EQ(cost::send(10, 8, 4), (Traffic{80, 3}));
}

TEST(Cost, CountsHaveSixtyFourBits) {
  const Index n = Index{3} << 40;
  const std::vector<Index> counts{n, n};
  EXPECT_EQ(cost::reduce_scatter(counts, 0, 8, whole),
            (Traffic{8 * n, 3073}));  // 6·2^40 / (2^31 − 1)
  EXPECT_EQ(cost::all_reduce(n, 2, 0, 4, whole).messages, 1537);
}

}  // namespace
