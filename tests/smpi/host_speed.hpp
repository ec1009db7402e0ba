#pragma once
/// @file
/// What a host of the simulated platform does per second, so that seconds can be asked of it.

namespace orthrus::smpi {

inline constexpr double flops_per_s = 1e12;

}  // namespace orthrus::smpi
