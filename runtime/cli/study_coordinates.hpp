#pragma once
/// @file
/// The coordinate check: does what linear layers make of their inputs depend on the model's size?

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "runtime/cli/study_directory.hpp"

namespace orthrus::cli {

/// Of one layer at one rate and step, over all sizes; means over the seeds.
struct CoordinateSlope {
  double lr = 0;
  std::string parameter;
  std::int64_t step = 0;
  double slope = 0;  ///< of ln rms over ln size
  int sizes = 0;
};
/// Steeper ones are a size's doing: the rate will not carry over (arXiv:2310.17813).
inline constexpr double most_coordinate_slope = 0.1;

/// From the probes of all finished trials; empty where `probes.coordinates` was not asked for.
[[nodiscard]] std::vector<CoordinateSlope> coordinate_slopes(
    const StudyRecord& study, const std::filesystem::path& directory);

}  // namespace orthrus::cli
