#pragma once
/// @file
/// JSON has neither infinity nor NaN: such numbers are written as texts.

#include <cmath>
#include <nlohmann/json.hpp>

namespace orthrus::cli {

inline nlohmann::ordered_json json_number(double x) {
  if (std::isfinite(x)) return x;
  return std::isnan(x) ? "NaN" : x > 0 ? "Infinity" : "-Infinity";
}

}  // namespace orthrus::cli
