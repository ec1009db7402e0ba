#pragma once
/// @file
/// What a study will cost, before it runs.

#include <orthrus/communicator.hpp>
#include <string>

#include "runtime/runner/expansion.hpp"

namespace orthrus::cli {

/// "study s: 200 trials, up to 500 with what results add; 1.2e+07 examples".
[[nodiscard]] std::string describe_size(const runner::Expansion& expansion);

/// Takes a few steps of the first trial of each base, and predicts the rest from them; writes no
/// file. Prints it on rank 0, unless `quiet`. Collective. @param expansion  on rank 0
/// @return on rank 0 the same as JSON.
[[nodiscard]] runner::Json dry_run(const runner::Study& study, const runner::Bases& bases,
                                   const runner::Expansion* expansion, Communicator& world,
                                   bool quiet);

}  // namespace orthrus::cli
