#pragma once
/// @file
/// One configuration for all ranks.

#include <orthrus/communicator.hpp>
#include <orthrus/config.hpp>
#include <string>
#include <vector>

namespace orthrus::cli {

/// Rank 0 reads file and environment; the others parse what it resolved, so that no two ranks run
/// different configurations. An error is thrown on all ranks. Collective.
[[nodiscard]] Config shared_config(const std::string& file,
                                   const std::vector<std::string>& overrides, Communicator& comm);

}  // namespace orthrus::cli
