// A step's calls allocate nothing: what they need was kept from the steps before.
#include <gtest/gtest.h>

#include "steady_state.hpp"

namespace {

using orthrus::Communicator;

TEST(SteadyState, ACounterThatCountsIsUsed) {
  const long before = count_new::calls;
  delete new int{3};  // NOLINT
  std::vector<int> v(100);
  EXPECT_GE(count_new::calls - before, 1);
}

TEST(SteadyState, SelfAllocatesNothing) {
  Communicator c = orthrus::self_communicator();
  EXPECT_EQ(steady_state::allocations(c), 0);
}

TEST(SteadyState, DryAllocatesNothing) {
  Communicator c = orthrus::dry_communicator(16, 3);
  EXPECT_EQ(steady_state::allocations(c), 0);
}

TEST(SteadyState, ThreadRanksAllocateNothing) {
  for (const int ranks : {1, 2, 3, 4}) {
    orthrus::run_thread_ranks(ranks, [](Communicator& c) {
      EXPECT_EQ(steady_state::allocations(c), 0) << c.size() << " ranks";
    });
  }
}

}  // namespace
