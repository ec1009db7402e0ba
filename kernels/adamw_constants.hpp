#pragma once
/// @file
/// The AdamW scalars as loops over f32 use them.

#include <cmath>

#include "kernels/backend.hpp"

namespace orthrus::kernels {

/// Computed in double, each rounded once.
struct AdamWConstants {
  float b1, b2, rest1, rest2, c1, c2, root_c2, eps, rho, lr;
  bool eps_before_correction;
};

inline AdamWConstants constants_of(const AdamWScalars& s) {
  return {
      static_cast<float>(s.beta1),
      static_cast<float>(s.beta2),
      static_cast<float>(1 - s.beta1),
      static_cast<float>(1 - s.beta2),
      static_cast<float>(s.bias_correction1),
      static_cast<float>(s.bias_correction2),
      static_cast<float>(std::sqrt(s.bias_correction2)),
      static_cast<float>(s.eps),
      static_cast<float>(1 - s.lr * s.weight_decay),
      static_cast<float>(s.lr),
      s.eps_before_correction,
  };
}

}  // namespace orthrus::kernels
