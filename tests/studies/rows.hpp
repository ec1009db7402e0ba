#pragma once
/// @file
/// An experiment's rows as expectations: every row is printed, and must hold.

#include <gtest/gtest.h>

#include <cstdio>
#include <string_view>

#include "runtime/studies/reproduce.hpp"

namespace orthrus::test {

inline void expect_rows(std::string_view name) {
  const studies::Experiment* found = nullptr;
  for (const studies::Experiment& e : studies::experiments()) {
    if (e.name == name) found = &e;
  }
  ASSERT_NE(found, nullptr) << name << " is not in the list of experiments";
  const std::vector<studies::Row> rows = found->run();
  ASSERT_FALSE(rows.empty());
  for (const studies::Row& row : rows) {
    const char* relation = row.relation == studies::Relation::at_most    ? "at most"
                           : row.relation == studies::Relation::at_least ? "at least"
                                                                         : "expected";
    std::printf("%-72s %-14.7g %s %.7g +- %.2g%s\n", row.quantity.c_str(), row.value, relation,
                row.expected, row.tolerance, row.holds() ? "" : "   <-- no");
    EXPECT_TRUE(row.holds()) << name << ": " << row.quantity << " is " << row.value << ", "
                             << relation << " " << row.expected << " +- " << row.tolerance;
  }
}

}  // namespace orthrus::test
