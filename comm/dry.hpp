#pragma once
/// @file
/// What only a dry communicator needs: nobody is there to say which ranks a split would join.

#include <orthrus/communicator.hpp>
#include <string>

namespace orthrus::comm {

/// The part of `world` a split would give, said instead of asked: rank `rank` of `size` ranks.
[[nodiscard]] Communicator dry_part(const Communicator& world, int size, int rank,
                                    const std::string& name);

}  // namespace orthrus::comm
