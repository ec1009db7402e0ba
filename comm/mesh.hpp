#pragma once
/// @file
/// Mesh: ranks = shard × replicate. State is sharded inside a shard group; gradients are also
/// reduced across the replicas of a shard.

#include <orthrus/communicator.hpp>

namespace orthrus {

/// World rank w sits at shard w % shard, replica w / shard.
struct Mesh {
  Communicator world;
  Communicator shard;      ///< the ranks that share one copy of the state
  Communicator replicate;  ///< the ranks that hold the same shard
};

/// Splits `world` (taken over). Collective. @param shard, replicate  sizes; 0: as many as the other
/// leaves.
/// @throws ConfigError  shard × replicate is not the number of ranks (the message has the numbers).
[[nodiscard]] Mesh make_mesh(Communicator world, int shard, int replicate);

/// The sizes `make_mesh` would take, without communicating. @throws ConfigError as `make_mesh`.
struct MeshShape {
  int shard, replicate;
};
[[nodiscard]] MeshShape mesh_shape(int ranks, int shard, int replicate);

}  // namespace orthrus
