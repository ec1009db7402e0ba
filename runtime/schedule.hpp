#pragma once
/// @file
/// Schedule: in which order a step walks its buckets, and where in one arena the buffers of what
/// meets lie meanwhile. Pure, and the same order on all ranks: no collective waits for another.

#include <cstdint>
#include <limits>
#include <vector>

#include "runtime/meeting.hpp"
#include "runtime/plan.hpp"

namespace orthrus::runtime {

/// Does the owner of each of its matrices compute it, while others compute others? (Else all
/// compute together, or nothing meets.) So it is with terms of one matrix that ranks share.
bool computed_by_owners(const Bucket& b);

/// Every bucket's turns, wave by wave. A wave is as many consecutive buckets as bring every rank
/// something to compute: their pieces leave one after the other, each while the one before it
/// arrives, then every rank computes what it owns of them, then the results leave, each while the
/// one before it is completed. Before a wave is computed the next one has left: a rank that is done
/// has more, and the last pieces are on their way.
///
/// With matrices of equal cost a bucket that brings one for every rank is a wave alone; smaller
/// ones are joined until there are `plan.depth` for every rank. Depth 0: every bucket is a wave,
/// which takes least memory. What all compute together is computed and completed as it arrives;
/// what meets nobody is completed with the wave it lies in.
std::vector<Turn> make_schedule(const Plan& plan);

/// Where the buffers of one rank's meetings lie: each as low in the arena as it fits at its turn.
class MeetingArena {
 public:
  static constexpr std::size_t nowhere = std::numeric_limits<std::size_t>::max();
  /// What a turn gives room to: offsets in bytes.
  struct Places {
    std::size_t mine = nowhere, theirs = nowhere, undo = nowhere;  ///< at `depart`
    std::size_t back = nowhere;                                    ///< at `send_back`
  };
  /// Does this turn give room to anything? (Only then is its size looked at.)
  static bool takes(Turn turn) {
    return turn.kind == Turn::Kind::depart || turn.kind == Turn::Kind::send_back;
  }
  Places take_turn(const Bucket& b, Turn turn, const MeetingSize& size);
  /// What the arena must hold.
  [[nodiscard]] std::size_t bytes() const { return bytes_; }

 private:
  struct Live {
    int bucket;
    Turn::Kind until;  ///< free after this turn of the bucket
    std::size_t begin, end;
  };
  std::size_t take(int bucket, Turn::Kind until, std::size_t bytes);

  std::vector<Live> live_;  ///< ascending
  std::size_t bytes_ = 0;
};

}  // namespace orthrus::runtime
