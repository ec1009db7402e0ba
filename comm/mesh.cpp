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
  if (c.on_device()) return;  // the barrier was an all_reduce there, and `nothing` is not
  std::array<float, 1> nothing{};
  c.all_reduce(std::span<float>(nothing));
}

}  // namespace

namespace {

struct Sizes {
  int shard, replicate;
};

Sizes mesh_sizes(int ranks, int shard, int replicate) {
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
    return shard != 0 ? Sizes{shard, ranks / shard} : Sizes{ranks / replicate, replicate};
  }
  const Index product = Index{shard} * replicate;
  if (product != ranks) {
    throw ConfigError("mesh.shard " + std::to_string(shard) + " x mesh.replicate " +
                      std::to_string(replicate) + " = " + std::to_string(product) + ", but there " +
                      (ranks == 1 ? "is 1 rank" : "are " + std::to_string(ranks) + " ranks"));
  }
  return {shard, replicate};
}

}  // namespace

MeshShape mesh_shape(int ranks, int shard, int replicate, int node) {
  const Sizes sizes = mesh_sizes(ranks, shard, replicate);
  MeshShape shape{sizes.shard, sizes.replicate, {}};
  if (node > 1 && node < shape.shard) {
    if (shape.shard % node != 0) {
      throw ConfigError("mesh.node " + std::to_string(node) + " does not divide mesh.shard " +
                        std::to_string(shape.shard));
    }
    shape.levels = {node, shape.shard / node};
  } else if (shape.shard > 1) {
    shape.levels = {shape.shard};
  }
  if (shape.replicate > 1 || shape.levels.empty()) shape.levels.push_back(shape.replicate);
  return shape;
}

Communicator& Mesh::level(std::size_t i) {
  if (spans_nodes() && i == 0) return node;
  if (spans_nodes() && i == 1) return across;
  return i == 0 && shard.size() > 1 ? shard : replicate;
}

Mesh make_mesh(Communicator world, int shard, int replicate, int node) {
  const MeshShape shape = mesh_shape(world.size(), shard, replicate, node);
  const int column = world.rank() % shape.shard;
  const int row = world.rank() / shape.shard;
  const bool nodes = shape.shard > 1 && shape.levels.front() < shape.shard;
  Mesh mesh;
  mesh.levels = shape.levels;
  if (world.dry()) {
    mesh.shard = comm::dry_part(world, shape.shard, column, "shard");
    mesh.replicate = comm::dry_part(world, shape.replicate, row, "replicate");
    if (nodes) {
      mesh.node = comm::dry_part(world, node, column % node, "node");
      mesh.across = comm::dry_part(world, shape.shard / node, column / node, "across");
    }
  } else {
    mesh.shard = world.split(row, column, "shard");
    mesh.replicate = world.split(column, row, "replicate");
    if (nodes) {
      mesh.node = mesh.shard.split(column / node, column, "node");
      mesh.across = mesh.shard.split(column % node, column, "across");
    }
  }
  mesh.world = std::move(world);
  warm_up(mesh.world);
  warm_up(mesh.shard);
  warm_up(mesh.replicate);
  if (nodes) {
    warm_up(mesh.node);
    warm_up(mesh.across);
  }
  return mesh;
}

}  // namespace orthrus
