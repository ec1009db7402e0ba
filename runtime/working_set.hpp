#pragma once
/// @file
/// WorkingSet: weights under ZeRO-3. Between uses each rank keeps its shard of every bucket; what
/// the trainer gathers is whole until it is released.

#include <memory>
#include <orthrus/communicator.hpp>
#include <span>
#include <vector>

#include "comm/mesh.hpp"
#include "kernels/backend.hpp"
#include "runtime/arena.hpp"
#include "runtime/plan.hpp"

namespace orthrus::runtime {

/// Addresses for whole tensors, of the device.
class Reserve {
 public:
  Reserve(kernels::Backend& backend, std::size_t bytes);
  Reserve(const Reserve&) = delete;
  Reserve& operator=(const Reserve&) = delete;
  ~Reserve();

  [[nodiscard]] std::byte* data() const { return data_; }
  /// Memory for whole pages, and back again.
  void back(std::size_t offset, std::size_t bytes) { backend_.back(data_ + offset, bytes); }
  void drop(std::size_t offset, std::size_t bytes) noexcept {
    backend_.drop(data_ + offset, bytes);
  }

 private:
  kernels::Backend& backend_;
  std::size_t size_;
  std::byte* data_;
};

/// All ranks of a shard group gather and release the same parameters in the same order. A step
/// makes what is gathered stale: it is released.
class WorkingSet {
 public:
  /// @param rank    of the world.
  /// @param levels  of the shard group, innermost first; no other calls are made on them. They
  ///                outlive this.
  WorkingSet(const Plan& plan, int rank, std::span<Communicator> levels, kernels::Backend& backend);

  /// Where bucket b's weights of this shard rest: an address such that unit `place` of the bucket
  /// is at `+ place` units.
  [[nodiscard]] std::byte* store(std::size_t bucket) const { return store_[bucket]; }
  /// Where a segment of this shard rests in it.
  [[nodiscard]] std::byte* piece(std::size_t bucket, const Segment& s) const {
    return store_[bucket] +
           static_cast<std::size_t>(s.place) * bytes_of(plan_.buckets[bucket].weights.unit());
  }
  /// Whole weights of parameter i, dense and of its dtype, or its codes and then scales: the same
  /// address for ever, with the weights there from `gather` to `release`.
  [[nodiscard]] void* weights(std::size_t i) const { return reserve_->data() + places_[i]; }

  /// Collective over the shard group. What was gathered next in the step before is fetched ahead.
  /// @throws ConfigError  the gathered tensors would be larger than the working set.
  void gather(std::span<const int> ids);
  void release(std::span<const int> ids);
  /// A step begins: nothing may be under way.
  void release_all();

  template <class F>
  void for_each_request(F&& f) {
    for (Flight& flight : flights_) f(flight.request);
  }
  /// Leaves what a call that was given up may still write to, to the process.
  void abandon() noexcept { arena_.abandon(); }

  /// What the calls since the last `reset_traffic` should have sent.
  [[nodiscard]] Traffic expected() const { return expected_; }
  void reset_traffic() { expected_ = {}; }

 private:
  /// Several parameters on their way in one message.
  struct Flight {
    std::span<std::byte> staging;
    std::vector<int> ids;
    std::vector<Index> ends;  ///< per slot of the shard group: where its bytes end
    Request request;
    std::size_t level = 0;  ///< levels it still has to cross
  };
  struct Piece {
    std::size_t bucket;
    const Segment* segment;
  };

  /// What the ranks that share this one's coordinates below `level` bring, by coordinate at
  /// `level`: in `cut_`.
  void find_cut(const Flight& flight, std::size_t level);
  std::size_t start(std::span<const int> ids, Flight& flight);
  void advance(Flight& flight);
  void land(Flight& flight);
  void put(const WeightFormat& format, void* piece, std::size_t parameter, const Region& region);
  void fetch_ahead();

  const Plan& plan_;
  std::span<Communicator> ways_;  ///< by level
  kernels::Backend& backend_;
  int slot_;            ///< in the shard group
  int slots_;           ///< ranks of the shard group
  std::size_t levels_;  ///< of the shard group
  Plan::Cut cut_;
  std::vector<ParameterShape> dense_;  ///< as they are when gathered
  Arena arena_;
  std::vector<std::byte*> store_;
  std::vector<std::vector<std::vector<Piece>>> pieces_;  ///< per parameter and slot
  std::unique_ptr<Reserve> reserve_;
  std::vector<std::size_t> places_, sizes_;  ///< per parameter, in the reserve
  std::vector<bool> resident_, under_way_;
  std::int64_t resident_bytes_ = 0;
  Flight flights_[2];                    ///< asked for; fetched ahead
  std::vector<int> order_, last_order_;  ///< as gathered in this step, and in the one before
  std::vector<int> ahead_;
  Traffic expected_;
};

}  // namespace orthrus::runtime
