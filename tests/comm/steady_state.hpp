#pragma once
/// @file
/// After a few steps a communicator allocates nothing more.

#include <gtest/gtest.h>

#include <vector>

#include "conformance.hpp"
#include "support/count_new.hpp"

namespace steady_state {

using namespace conformance;

/// Calls of operator new while every rank does ten steps of every kind of call, after three.
inline long allocations(Communicator& c) {
  const int p = c.size();
  const auto ranks = static_cast<std::size_t>(p);
  std::vector<Index> counts(ranks, 5);
  counts[0] = 0;
  std::vector<float> all(static_cast<std::size_t>(total(counts)));
  std::vector<float> mine(static_cast<std::size_t>(counts[static_cast<std::size_t>(c.rank())]));
  std::vector<Index> exchange(ranks, 4);
  std::vector<float> out(4 * ranks), in(4 * ranks);
  std::vector<BFloat16> half(17);
  const auto step = [&] {
    Request a = c.start_all_reduce(span(half), ReduceOp::sum);
    Request b = c.start_reduce_scatter(span(std::as_const(all)), counts, span(mine));
    Request d = c.start_all_to_all(span(std::as_const(out)), exchange, span(in), exchange);
    d.wait();
    a.wait();
    b.wait();
    c.all_gather(span(std::as_const(mine)), counts, span(all));
    c.broadcast(span(all), 0);
    c.reduce(span(std::as_const(out)), span(in), ReduceOp::max, 0);
    c.barrier();
  };
  c.set_max_chunk(3);
  for (int i = 0; i < 3; ++i) step();
  c.barrier();
  const long before = count_new::calls;
  c.barrier();
  for (int i = 0; i < 10; ++i) step();
  c.barrier();
  return count_new::calls - before;
}

}  // namespace steady_state
