#pragma once
/// @file
/// The norm that a matrix is divided by, on every device alike.

#include <cstdint>

namespace orthrus::kernels {

/// What is added to the norm before dividing by it. `none` needs nothing: a zero matrix stays zero.
/// `add` (ν + ε, Keller Jordan) and `clamp` (max(ν, ε), torch) reproduce other engines.
enum class EpsMode : std::uint8_t { none, add, clamp };

/// ν = safety·‖X‖, and ε as `eps_mode` has it.
struct NormOptions {
  double safety = 1;
  EpsMode eps_mode = EpsMode::none;
  double eps = 1e-7;
};

/// ν of a matrix whose norm is `length`.
constexpr double norm_of(double length, const NormOptions& options) {
  const double norm = options.safety * length;
  if (options.eps_mode == EpsMode::add) return norm + options.eps;
  if (options.eps_mode == EpsMode::clamp) return norm < options.eps ? options.eps : norm;
  return norm;
}

}  // namespace orthrus::kernels
