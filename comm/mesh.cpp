#include "comm/mesh.hpp"

#include <array>
#include <orthrus/error.hpp>
#include <string>
#include <utility>

#include "comm/dry.hpp"

namespace orthrus {
namespace {

// The first message on a communicator may open connections: not inside step 1.
void warm_up(Communicator& c) {
  const TrafficScope scope{c, TrafficClass::setup};
  c.barrier();
  std::array<float, 1> nothing{};
  c.all_reduce(std::span<float>(nothing));
}

}  // namespace

MeshShape mesh_shape(int ranks, int shard, int replicate) {
  if (shard < 0 || replicate < 0) {
    throw ConfigError("mesh.shard " + std::to_string(shard) + " x mesh.replicate " +
                      std::to_string(replicate) + ": sizes are 1 or more, or auto");
  }
  const int given = shard != 0 ? shard : replicate;
  const char* const name = shard != 0 ? "mesh.shard " : "mesh.replicate ";
  if (shard == 0 || replicate == 0) {
    if (given == 0) return {ranks, 1};
    if (ranks % given != 0) {
      throw ConfigError(name + std::to_string(given) + " does not divide the " +
                        std::to_string(ranks) + " ranks there are");
    }
    return shard != 0 ? MeshShape{shard, ranks / shard} : MeshShape{ranks / replicate, replicate};
  }
  const Index product = Index{shard} * replicate;
  if (product != ranks) {
    throw ConfigError("mesh.shard " + std::to_string(shard) + " x mesh.replicate " +
                      std::to_string(replicate) + " = " + std::to_string(product) + ", but there " +
                      (ranks == 1 ? "is 1 rank" : "are " + std::to_string(ranks) + " ranks"));
  }
  return {shard, replicate};
}

Mesh make_mesh(Communicator world, int shard, int replicate) {
  const MeshShape shape = mesh_shape(world.size(), shard, replicate);
  const int column = world.rank() % shape.shard;
  const int row = world.rank() / shape.shard;
  Mesh mesh;
  if (world.dry()) {
    mesh.shard = comm::dry_part(world, shape.shard, column, "shard");
    mesh.replicate = comm::dry_part(world, shape.replicate, row, "replicate");
  } else {
    mesh.shard = world.split(row, column, "shard");
    mesh.replicate = world.split(column, row, "replicate");
  }
  mesh.world = std::move(world);
  warm_up(mesh.world);
  warm_up(mesh.shard);
  warm_up(mesh.replicate);
  return mesh;
}

}  // namespace orthrus
