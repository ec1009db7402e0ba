#include "smpi/simulated_ranks.hpp"

#include <algorithm>
#include <numeric>
#include <orthrus/mpi.hpp>
#include <utility>
#include <vector>

#include "comm/core.hpp"
#include "smpi/host_speed.hpp"
#include "smpi/rank_clock.hpp"

namespace orthrus::smpi {
namespace {

using runtime::Collective;

class SimulatedBody final : public CommunicatorBackend {
 public:
  /// @param owner  keeps `body` alive.
  SimulatedBody(CommunicatorBackend& body, std::shared_ptr<void> owner, int world_rank)
      : owner_(std::move(owner)), body_(body), world_rank_(world_rank) {
    body_.set_blocking(true);
    // How many of these ranks share a node, at most.
    const auto ranks = static_cast<std::size_t>(body_.size());
    std::vector<Index> worlds(ranks);
    const Index mine = world_rank;
    const std::vector<Index> ones(ranks, 1);
    body_.all_gather({&mine, 1, DType::i64}, ones,
                     {worlds.data(), static_cast<Index>(ranks), DType::i64});
    const int node = rank_clock().profile.ranks_per_node;
    std::vector<Index> on_node;
    for (const Index w : worlds) {
      const auto at = static_cast<std::size_t>(node > 0 ? w / node : 0);
      if (on_node.size() <= at) on_node.resize(at + 1);
      ++on_node[at];
    }
    per_node_ = static_cast<int>(*std::max_element(on_node.begin(), on_node.end()));
  }

  int rank() const override { return body_.rank(); }
  int size() const override { return body_.size(); }
  const char* kind() const override { return body_.kind(); }

  Done all_reduce(Span data, ReduceOp op) override {
    begin(Collective::all_reduce, 2 * share(data.count) * bytes_of(data.dtype));
    return body_.all_reduce(data, op);
  }
  Done reduce_scatter(ConstSpan send, std::span<const Index> counts, Span recv) override {
    begin(Collective::reduce_scatter, most_others(counts) * bytes_of(send.dtype));
    return body_.reduce_scatter(send, counts, recv);
  }
  Done all_gather(ConstSpan send, std::span<const Index> counts, Span recv) override {
    begin(Collective::all_gather, most_others(counts) * bytes_of(send.dtype));
    return body_.all_gather(send, counts, recv);
  }
  Done broadcast(Span data, int root) override {
    begin(Collective::broadcast, static_cast<double>(data.bytes()));
    return body_.broadcast(data, root);
  }
  Done reduce(ConstSpan send, Span recv, ReduceOp op, int root) override {
    begin(Collective::reduce, static_cast<double>(send.bytes()));
    return body_.reduce(send, recv, op, root);
  }
  Done all_to_all(ConstSpan send, std::span<const Index> send_counts, Span recv,
                  std::span<const Index> recv_counts, Index limit) override {
    // What leaves or arrives, whichever is more.
    const auto others = [&](std::span<const Index> counts) {
      return std::accumulate(counts.begin(), counts.end(), Index{0}) -
             counts[static_cast<std::size_t>(rank())];
    };
    begin(Collective::all_to_all,
          static_cast<double>(std::max(others(send_counts), others(recv_counts))) *
              bytes_of(send.dtype));
    return body_.all_to_all(send, send_counts, recv, recv_counts, limit);
  }
  Done send(ConstSpan data, int to, int tag) override {
    begin(Collective::send, static_cast<double>(data.bytes()));
    return body_.send(data, to, tag);
  }
  Done receive(Span data, int from, int tag) override { return body_.receive(data, from, tag); }
  Done barrier() override {
    rank_clock().show();
    return body_.barrier();
  }
  std::unique_ptr<CommunicatorBackend> split(int color, int key) override {
    return wrapped(body_.split(color, key));
  }
  std::unique_ptr<CommunicatorBackend> duplicate() override { return wrapped(body_.duplicate()); }
  void set_blocking(bool) override {}

 private:
  std::unique_ptr<CommunicatorBackend> wrapped(std::unique_ptr<CommunicatorBackend> body) const {
    CommunicatorBackend& b = *body;
    return std::make_unique<SimulatedBody>(b, std::shared_ptr<void>(std::move(body)), world_rank_);
  }
  void begin(Collective kind, double bytes) const {
    rank_clock().show();
    rank_clock().modelled_s +=
        runtime::collective_seconds(rank_clock().profile, kind, bytes, 1, body_.size(), per_node_);
  }
  /// Elements the busiest rank sends in half an all-reduce.
  [[nodiscard]] double share(Index count) const {
    return static_cast<double>(count - count / body_.size());
  }
  static double most_others(std::span<const Index> counts) {
    return static_cast<double>(std::accumulate(counts.begin(), counts.end(), Index{0}) -
                               *std::min_element(counts.begin(), counts.end()));
  }

  std::shared_ptr<void> owner_;
  CommunicatorBackend& body_;
  int world_rank_;
  int per_node_ = 1;
};

}  // namespace

void RankClock::show() {
  const double seconds = std::exchange(owed_s, 0);
  if (seconds > 0) smpi_execute_flops(seconds * flops_per_s);
}

RankClock& rank_clock() {
  static RankClock clock;
  return clock;
}

Communicator simulated_world() {
  auto world = std::make_shared<Communicator>(borrow(MPI_COMM_WORLD));
  CommunicatorBackend& body = comm::Core::body_of(*world);
  const int rank = world->rank();
  return Communicator{std::make_unique<SimulatedBody>(body, std::move(world), rank)};
}

}  // namespace orthrus::smpi
