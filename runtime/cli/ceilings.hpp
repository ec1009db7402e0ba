#pragma once
/// @file
/// What this machine can do at most, measured in place: the roofs of a roofline.

#include <orthrus/communicator.hpp>

namespace orthrus::cli {

/// Of the slowest rank, while all of them are at it.
struct Ceilings {
  double flops_per_s = 0;          ///< a product of 512×512 matrices, f32
  double memory_bytes_per_s = 0;   ///< a triad a = b + s·c over 96 MB
  double network_bytes_per_s = 0;  ///< what a rank sends in an all-reduce of 4 MB; 0: it is alone
};
/// The best of five each. Collective. @par Cost  a fifth of a second, 100 MB.
[[nodiscard]] Ceilings measure_ceilings(Communicator& ranks);

}  // namespace orthrus::cli
