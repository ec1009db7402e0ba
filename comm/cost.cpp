#include "comm/cost.hpp"

#include <algorithm>
#include <numeric>

namespace orthrus::cost {
namespace {

Index sum(std::span<const Index> counts) {
  return std::accumulate(counts.begin(), counts.end(), Index{0});
}

Index in_bytes(Index elements, std::size_t bytes) { return elements * static_cast<Index>(bytes); }

}  // namespace

Index chunks(Index count, Index max_chunk) { return count == 0 ? 1 : (count - 1) / max_chunk + 1; }

Traffic all_but_own(Index total, Index own, std::size_t bytes, Index max_chunk) {
  return {in_bytes(total - own, bytes), chunks(total, max_chunk)};
}

Traffic reduce_scatter(std::span<const Index> counts, int rank, std::size_t bytes,
                       Index max_chunk) {
  return all_but_own(sum(counts), counts[static_cast<std::size_t>(rank)], bytes, max_chunk);
}

Traffic all_gather(std::span<const Index> counts, int rank, std::size_t bytes, Index max_chunk) {
  return all_but_own(sum(counts), counts[static_cast<std::size_t>(rank)], bytes, max_chunk);
}

Traffic all_reduce(Index count, int size, int rank, std::size_t bytes, Index max_chunk) {
  const auto sent_in_message = [&](Index n) {
    const Index own = n / size + (rank < n % size ? 1 : 0);
    return 2 * (n - own);
  };
  const Index full = count / max_chunk;
  const Index sent = full * sent_in_message(max_chunk) + sent_in_message(count % max_chunk);
  return {in_bytes(sent, bytes), chunks(count, max_chunk)};
}

Traffic all_to_all(std::span<const Index> send_counts, int rank, std::size_t bytes,
                   Index max_chunk) {
  Traffic t{0, 1};
  for (std::size_t to = 0; to < send_counts.size(); ++to) {
    if (to == static_cast<std::size_t>(rank)) continue;
    t.bytes += in_bytes(send_counts[to], bytes);
    t.messages += chunks(send_counts[to], max_chunk) - 1;
  }
  return t;
}

Traffic broadcast(Index count, int size, int rank, int root, std::size_t bytes, Index max_chunk) {
  const int last = (root + size - 1) % size;
  return {rank == last ? 0 : in_bytes(count, bytes), chunks(count, max_chunk)};
}

Traffic reduce(Index count, int /*size*/, int rank, int root, std::size_t bytes, Index max_chunk) {
  return {rank == root ? 0 : in_bytes(count, bytes), chunks(count, max_chunk)};
}

Traffic send(Index count, std::size_t bytes, Index max_chunk) {
  return {in_bytes(count, bytes), chunks(count, max_chunk)};
}

}  // namespace orthrus::cost
