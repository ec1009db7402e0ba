#pragma once
/// @file
/// orthrus study reproduce: experiments whose results are known, beside what comes out here.

#include <span>
#include <string>
#include <vector>

#include "runtime/studies/reproduce.hpp"

namespace orthrus::cli {

struct ReproduceOptions {
  std::vector<std::string> names;  ///< empty: all
  std::string out;                 ///< a file for one JSON line per row; empty: none
  bool list = false, json = false;
  bool slow = false;  ///< those of minutes, too
};

/// Prints each row as value, expected value, tolerance, and whether it is met.
/// @return 0, or 70 where a row is not met.
int reproduce(std::span<const studies::Experiment> experiments, const ReproduceOptions& options);

}  // namespace orthrus::cli
