#pragma once
/// @file
/// Mesh: ranks = shard × replicate. State is sharded inside a shard group; gradients are also
/// reduced across the replicas of a shard.

#include <orthrus/communicator.hpp>
#include <vector>

namespace orthrus {

/// World rank w sits at shard w % shard, replica w / shard.
///
/// Collectives over all of them are walked level by level: inside a node, across the nodes of a
/// shard group, across replicas. Each level sends what the level before has left, so that slow
/// links carry least.
struct Mesh {
  Communicator world;
  Communicator shard;         ///< the ranks that share one copy of the weights' shards
  Communicator replicate;     ///< the ranks that hold the same shard
  Communicator node, across;  ///< of the shard group, where it spans several nodes
  std::vector<int> levels;    ///< sizes, innermost first

  [[nodiscard]] Communicator& level(std::size_t i);
  /// Does a shard group span several nodes?
  [[nodiscard]] bool spans_nodes() const {
    return shard.size() > 1 && levels.front() < shard.size();
  }
};

/// Splits `world` (taken over). Collective. @param shard, replicate  sizes; 0: as many as the other
/// leaves. @param node  consecutive ranks that share a node; 0: not told.
/// @throws ConfigError  shard × replicate is not the number of ranks, or a shard group is no whole
/// number of nodes (the message has the numbers).
[[nodiscard]] Mesh make_mesh(Communicator world, int shard, int replicate, int node = 0);

/// The sizes `make_mesh` would take, without communicating. @throws ConfigError as `make_mesh`.
struct MeshShape {
  int shard, replicate;
  std::vector<int> levels;  ///< sizes, innermost first; those of one rank left out, but for one
};
[[nodiscard]] MeshShape mesh_shape(int ranks, int shard, int replicate, int node = 0);

}  // namespace orthrus
