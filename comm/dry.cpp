#include "comm/dry.hpp"

#include <memory>
#include <orthrus/error.hpp>
#include <string>

#include "comm/core.hpp"

namespace orthrus {
namespace {

/// Ranks that are not there. The `Communicator` in front of it has counted already.
class DryBody final : public CommunicatorBackend {
 public:
  DryBody(int size, int rank) : size_(size), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  const char* kind() const override { return "dry"; }
  bool dry() const override { return true; }

  Done all_reduce(Span, ReduceOp) override { return nullptr; }
  Done reduce_scatter(ConstSpan, std::span<const Index>, Span) override { return nullptr; }
  Done all_gather(ConstSpan, std::span<const Index>, Span) override { return nullptr; }
  Done broadcast(Span, int) override { return nullptr; }
  Done reduce(ConstSpan, Span, ReduceOp, int) override { return nullptr; }
  Done all_to_all(ConstSpan, std::span<const Index>, Span, std::span<const Index>, Index) override {
    return nullptr;
  }
  Done send(ConstSpan, int, int) override { return nullptr; }
  Done receive(Span, int, int) override { return nullptr; }
  Done barrier() override { return nullptr; }
  std::unique_ptr<CommunicatorBackend> split(int, int) override {
    throw CommError("a dry communicator cannot be split: the other ranks' colors are unknown");
  }
  std::unique_ptr<CommunicatorBackend> duplicate() override {
    return std::make_unique<DryBody>(size_, rank_);
  }

 private:
  int size_, rank_;
};

std::unique_ptr<CommunicatorBackend> dry_body(int size, int rank) {
  if (size < 1 || rank < 0 || rank >= size) {
    throw CommError("no rank " + std::to_string(rank) + " among " + std::to_string(size) +
                    " dry ranks");
  }
  return std::make_unique<DryBody>(size, rank);
}

}  // namespace

Communicator dry_communicator(int size, int rank) { return Communicator(dry_body(size, rank)); }

Communicator comm::dry_part(const Communicator& world, int size, int rank,
                            const std::string& name) {
  return comm::Core::child(world, dry_body(size, rank), name);
}

}  // namespace orthrus
