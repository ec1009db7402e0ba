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

/// Does the owner of each of its matrices compute it, while others go on? (Else all compute
/// together, and what they made is used at once.)
bool computed_by_owners(const Bucket& b);

/// How many buckets more have departed before the first one's results come back: so many that there
/// are about two matrices for every rank to compute in the meantime. 0 where one bucket brings a
/// matrix for each.
int lag_of(const Plan& plan);

/// Every bucket's turns. A bucket departs while the one before it arrives, and comes back while the
/// one before that is completed; between arriving and coming back lie `plan.lag` buckets. What
/// meets nobody is only completed, between those that do.
std::vector<Turn> make_schedule(const Plan& plan);

/// Where the buffers of one rank's meetings lie: each as low in the arena as it fits at its turn.
class MeetingArena {
 public:
  static constexpr std::size_t nowhere = std::numeric_limits<std::size_t>::max();
  /// What a turn gives room to: offsets in bytes.
  struct Places {
    std::size_t mine = nowhere, theirs = nowhere;  ///< at `depart`
    std::size_t back = nowhere;                    ///< at `send_back`, of owners' results
  };
  Places turn(const Bucket& b, Turn turn, const MeetingSize& size);
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
