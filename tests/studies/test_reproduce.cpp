// Every experiment gives what its source says, or what a comment there explains.
#include <sstream>
#include <string>

#include "studies/rows.hpp"

namespace orthrus::test {
namespace {

class Reproduces : public testing::TestWithParam<std::string> {};

TEST_P(Reproduces, EveryRowHolds) { expect_rows(GetParam()); }

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const studies::Experiment& e : studies::experiments()) all.emplace_back(e.name);
  return all;
}

INSTANTIATE_TEST_SUITE_P(Experiments, Reproduces, testing::ValuesIn(names()), [](const auto& i) {
  std::string name = i.param;
  for (char& c : name) {
    if (c == '-') c = '_';
  }
  return name;
});

TEST(Experiments, AreAllRegisteredAsTests) {
  std::vector<std::string> registered;
  std::istringstream list(ORTHRUS_EXPERIMENTS);
  for (std::string name; std::getline(list, name, ',');) registered.push_back(name);
  EXPECT_EQ(registered, names());
}

TEST(Rows, HoldWithinTheirTolerance) {
  using studies::Relation;
  using studies::Row;
  EXPECT_TRUE((Row{"", 1.1, 1, 0.11}.holds()));
  EXPECT_FALSE((Row{"", 1.1, 1, 0.09}.holds()));
  EXPECT_FALSE((Row{"", 0.8, 1, 0.1}.holds()));
  EXPECT_TRUE((Row{"", -5, 1, 0, Relation::at_most}.holds()));
  EXPECT_FALSE((Row{"", 1.1, 1, 0, Relation::at_most}.holds()));
  EXPECT_FALSE((Row{"", 0.9, 1, 0, Relation::at_least}.holds()));
  for (const Relation r : {Relation::about, Relation::at_most, Relation::at_least}) {
    EXPECT_FALSE((Row{"", std::nan(""), 1, 0.1, r}.holds()));
  }
  EXPECT_DOUBLE_EQ(studies::within("", 0, 2, 6).expected, 4);
  EXPECT_DOUBLE_EQ(studies::within("", 0, 2, 6).tolerance, 2);
  EXPECT_DOUBLE_EQ(studies::relative("", 0, -2, 0.1).tolerance, 0.2);
}

}  // namespace
}  // namespace orthrus::test
