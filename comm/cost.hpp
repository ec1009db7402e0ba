#pragma once
/// @file
/// Bytes and messages one rank sends in each collective: the definitions the plan and the counters
/// share.
///
/// They are those of bandwidth-optimal algorithms (ring, recursive halving): what any
/// implementation must at least send. `n_r` is the calling rank's own part, in elements; `bytes` is
/// of one element.

#include <cstddef>
#include <orthrus/communicator.hpp>
#include <span>

namespace orthrus::cost {

/// Messages a call of `count` elements becomes: at least one, also for none.
Index chunks(Index count, Index max_chunk);

/// reduce_scatter and all_gather of sum(counts) elements: (N − n_r)·bytes.
Traffic reduce_scatter(std::span<const Index> counts, int rank, std::size_t bytes, Index max_chunk);
Traffic all_gather(std::span<const Index> counts, int rank, std::size_t bytes, Index max_chunk);
/// Either of them, of `total` elements of which `own` are this rank's part.
Traffic all_but_own(Index total, Index own, std::size_t bytes, Index max_chunk);
/// The sum of both, over parts that differ by at most one element (the first N mod P are larger),
/// for each message on its own.
Traffic all_reduce(Index count, int size, int rank, std::size_t bytes, Index max_chunk);
/// What goes to other ranks. One collective message carries the first `max_chunk` elements of every
/// part; what is left of a part follows in point-to-point messages (no other rank need know of
/// them).
Traffic all_to_all(std::span<const Index> send_counts, int rank, std::size_t bytes,
                   Index max_chunk);
/// Along a chain from the root: everyone but the last passes the whole on.
Traffic broadcast(Index count, int size, int rank, int root, std::size_t bytes, Index max_chunk);
/// Along a chain to the root: everyone but the root passes the whole on.
Traffic reduce(Index count, int size, int rank, int root, std::size_t bytes, Index max_chunk);
/// One message of count elements (each chunk is one).
Traffic send(Index count, std::size_t bytes, Index max_chunk);

}  // namespace orthrus::cost
