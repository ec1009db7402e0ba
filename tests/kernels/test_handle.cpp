#include <gtest/gtest.h>

#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/handle.hpp"

namespace orthrus {
namespace {

std::vector<int> released;

struct Number {
  using Handle = int;
  static Handle null() noexcept { return -1; }
  static void release(Handle h) noexcept { released.push_back(h); }
};
using Handle = UniqueHandle<Number>;

// A C library's way of making one.
int create(int* out, int value) {
  *out = value;
  return 0;
}

class UniqueHandleTest : public testing::Test {
 protected:
  void SetUp() override { released.clear(); }
};

TEST_F(UniqueHandleTest, CannotBeCopied) {
  EXPECT_FALSE(std::is_copy_constructible_v<Handle>);
  EXPECT_FALSE(std::is_copy_assignable_v<Handle>);
  EXPECT_TRUE(std::is_nothrow_move_constructible_v<Handle>);
  EXPECT_TRUE(std::is_nothrow_move_assignable_v<Handle>);
}

TEST_F(UniqueHandleTest, ReleasesOnceAtTheEnd) {
  {
    const Handle h(7);
    EXPECT_TRUE(h);
    EXPECT_EQ(h.get(), 7);
    EXPECT_TRUE(released.empty());
  }
  EXPECT_EQ(released, std::vector{7});
}

TEST_F(UniqueHandleTest, ReleasesNothingWhenEmpty) {
  {
    const Handle h;
    EXPECT_FALSE(h);
    EXPECT_EQ(h.get(), Number::null());
  }
  EXPECT_TRUE(released.empty());
}

// 0 is a valid handle for some libraries: only null() means empty.
TEST_F(UniqueHandleTest, TakesEmptinessFromTheTraits) {
  { const Handle h(0); }
  EXPECT_EQ(released, std::vector{0});
}

TEST_F(UniqueHandleTest, MovesLeaveTheSourceEmpty) {
  Handle from(1);
  {
    const Handle to(std::move(from));
    EXPECT_FALSE(from);  // NOLINT(bugprone-use-after-move): this is the promise
    EXPECT_EQ(to.get(), 1);
  }
  EXPECT_EQ(released, std::vector{1});
}

TEST_F(UniqueHandleTest, AssignmentReleasesTheOldOne) {
  Handle h(1);
  h = Handle(2);
  EXPECT_EQ(released, std::vector{1});
  EXPECT_EQ(h.get(), 2);
}

TEST_F(UniqueHandleTest, SelfAssignmentKeepsTheHandle) {
  Handle h(3);
  Handle& same = h;
  h = std::move(same);
  EXPECT_EQ(h.get(), 3);
  EXPECT_TRUE(released.empty());
}

TEST_F(UniqueHandleTest, OutReleasesBeforeACallWrites) {
  Handle h(4);
  EXPECT_EQ(create(h.out(), 5), 0);
  EXPECT_EQ(released, std::vector{4});
  EXPECT_EQ(h.get(), 5);
}

TEST_F(UniqueHandleTest, ReleaseGivesOwnershipUp) {
  {
    Handle h(6);
    EXPECT_EQ(h.release(), 6);
    EXPECT_FALSE(h);
  }
  EXPECT_TRUE(released.empty());
}

}  // namespace
}  // namespace orthrus
