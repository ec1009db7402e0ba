#pragma once
/// @file
/// What every communicator must do: run by test_communicator.cpp on self and thread ranks, by
/// test_mpi.cpp under mpirun. Every rank of the communicator calls the same function.
///
/// All values are small integers, exact in every dtype (sums stay below 256, which bf16 holds), so
/// every result has one right value, known in closed form. `independent` counts what this rank
/// really sends.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <orthrus/communicator.hpp>
#include <orthrus/error.hpp>
#include <string>
#include <vector>

#include "comm/cost.hpp"
#include "kernels/bf16.hpp"

namespace conformance {

using orthrus::BFloat16;
using orthrus::Communicator;
using orthrus::ConstSpan;
using orthrus::Index;
using orthrus::ReduceOp;
using orthrus::Request;
using orthrus::Span;
using orthrus::Traffic;
using orthrus::TrafficClass;
namespace cost = orthrus::cost;

/// The message of the `E` that `f` throws; "nothing thrown" otherwise.
template <class E = orthrus::Error, class F>
std::string thrown(F&& f) {
  try {
    f();
  } catch (const E& e) {
    return e.what();
  }
  return "nothing thrown";
}

using Independent = std::function<Traffic()>;

template <class T>
T value(Index x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return orthrus::kernels::to_bf16(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}
template <class T>
Index number(T x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return static_cast<Index>(orthrus::kernels::to_float(x));
  } else {
    return static_cast<Index>(x);
  }
}
template <class T>
std::vector<Index> numbers(const std::vector<T>& v) {
  std::vector<Index> n;
  for (const T x : v) n.push_back(number(x));
  return n;
}

template <class T>
Span span(std::vector<T>& v) {
  return {v.data(), static_cast<Index>(v.size()), orthrus::dtype_of<T>};
}
template <class T>
ConstSpan span(const std::vector<T>& v) {
  return {v.data(), static_cast<Index>(v.size()), orthrus::dtype_of<T>};
}

/// Parts of every shape: even, ragged with empty ones, one rank has all, nobody has anything.
inline std::vector<std::vector<Index>> partitions(int ranks) {
  const auto p = static_cast<std::size_t>(ranks);
  std::vector<std::vector<Index>> all;
  all.emplace_back(p, 7);
  std::vector<Index> ragged(p);
  for (std::size_t r = 0; r < p; ++r) ragged[r] = static_cast<Index>((3 * r + 2) % 5);  // 2 0 3 1 4
  all.push_back(ragged);
  std::vector<Index> last(p, 0);
  last.back() = 13;
  all.push_back(last);
  all.emplace_back(p, 0);
  return all;
}

inline Index total(const std::vector<Index>& counts) {
  return std::accumulate(counts.begin(), counts.end(), Index{0});
}
inline Index first_of(const std::vector<Index>& counts, int rank) {
  return std::accumulate(counts.begin(), counts.begin() + rank, Index{0});
}

// What rank r holds at element i before a reduction; over P ranks the sum is P(P+1)/2 + P·(i mod
// 5), the greatest P + (i mod 5), the least 1 + (i mod 5).
inline Index before(int rank, Index i) { return rank + 1 + i % 5; }
inline Index after(int ranks, Index i, ReduceOp op) {
  switch (op) {
    case ReduceOp::sum:
      return Index{ranks} * (ranks + 1) / 2 + ranks * (i % 5);
    case ReduceOp::max:
      return ranks + i % 5;
    case ReduceOp::min:
      return 1 + i % 5;
  }
  return -1;
}
template <class T>
std::vector<T> before(int rank, Index begin, Index count) {
  std::vector<T> v;
  for (Index i = 0; i < count; ++i) v.push_back(value<T>(before(rank, begin + i)));
  return v;
}
inline std::vector<Index> after(int ranks, Index begin, Index count, ReduceOp op) {
  std::vector<Index> v;
  for (Index i = 0; i < count; ++i) v.push_back(after(ranks, begin + i, op));
  return v;
}
// What rank r contributes to a gather at element i of its part.
inline Index own(int rank, Index i) { return 16 * rank + i % 16; }

/// Expects that the calls between construction and end sent `expected`, by both counters.
class Counted {
 public:
  Counted(Communicator& c, const Independent& independent, Traffic expected, std::string what)
      : c_(c),
        independent_(independent),
        expected_(expected),
        what_(std::move(what)),
        before_(c.traffic()),
        independent_before_(independent()) {}
  ~Counted() {
    const Traffic counted = c_.traffic() - before_;
    const Traffic really = independent_() - independent_before_;
    EXPECT_EQ(counted.bytes, expected_.bytes) << what_;
    EXPECT_EQ(counted.messages, expected_.messages) << what_;
    EXPECT_EQ(really.bytes, expected_.bytes) << what_ << ", independently";
    EXPECT_EQ(really.messages, expected_.messages) << what_ << ", independently";
  }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

 private:
  Communicator& c_;
  const Independent& independent_;
  Traffic expected_;
  std::string what_;
  Traffic before_, independent_before_;
};

inline std::string label(const Communicator& c, const char* call, orthrus::DType dtype, Index n) {
  return std::string(call) + " of " + std::to_string(n) + " " + std::string(name_of(dtype)) +
         " on rank " + std::to_string(c.rank()) + "/" + std::to_string(c.size()) + ", max_chunk " +
         std::to_string(c.options().max_chunk);
}

template <class T>
void collectives(Communicator& c, const Independent& independent) {
  const int p = c.size();
  const int me = c.rank();
  const Index chunk = c.options().max_chunk;
  const std::size_t bytes = sizeof(T);
  constexpr orthrus::DType dtype = orthrus::dtype_of<T>;

  for (const ReduceOp op : {ReduceOp::sum, ReduceOp::max, ReduceOp::min}) {
    for (const Index n : {0, 1, 3, 29}) {
      const std::string what = label(c, "all_reduce", dtype, n);
      std::vector<T> data = before<T>(me, 0, n);
      {
        const Counted counted{c, independent, cost::all_reduce(n, p, me, bytes, chunk), what};
        c.all_reduce(span(data), op);
      }
      EXPECT_EQ(numbers(data), after(p, 0, n, op)) << what;
    }
    for (const int root : {0, p - 1}) {
      const Index n = 11;
      const std::string what = label(c, "reduce", dtype, n);
      const std::vector<T> send = before<T>(me, 0, n);
      std::vector<T> recv(me == root ? static_cast<std::size_t>(n) : 0);
      {
        const Counted counted{c, independent, cost::reduce(n, p, me, root, bytes, chunk), what};
        c.reduce(span(send), span(recv), op, root);
      }
      if (me == root) {
        EXPECT_EQ(numbers(recv), after(p, 0, n, op)) << what;
      }
      EXPECT_EQ(numbers(send), numbers(before<T>(me, 0, n))) << what;
    }
  }

  for (const std::vector<Index>& counts : partitions(p)) {
    const Index n = total(counts);
    const Index mine = counts[static_cast<std::size_t>(me)];
    const Index begin = first_of(counts, me);
    {
      const std::string what = label(c, "reduce_scatter", dtype, n);
      const std::vector<T> send = before<T>(me, 0, n);
      std::vector<T> recv(static_cast<std::size_t>(mine));
      {
        const Counted counted{c, independent, cost::reduce_scatter(counts, me, bytes, chunk), what};
        c.reduce_scatter(span(send), counts, span(recv));
      }
      EXPECT_EQ(numbers(recv), after(p, begin, mine, ReduceOp::sum)) << what;
      EXPECT_EQ(numbers(send), numbers(before<T>(me, 0, n))) << what;
    }
    std::vector<Index> gathered;
    std::vector<T> send;
    for (int r = 0; r < p; ++r) {
      for (Index i = 0; i < counts[static_cast<std::size_t>(r)]; ++i) {
        gathered.push_back(own(r, i));
        if (r == me) send.push_back(value<T>(own(r, i)));
      }
    }
    for (const bool in_place : {false, true}) {
      const std::string what = label(c, in_place ? "all_gather in place" : "all_gather", dtype, n);
      std::vector<T> recv(static_cast<std::size_t>(n), value<T>(99));
      if (in_place) std::copy(send.begin(), send.end(), recv.begin() + begin);
      const ConstSpan from = in_place ? ConstSpan{recv.data() + begin, mine, dtype} : span(send);
      {
        const Counted counted{c, independent, cost::all_gather(counts, me, bytes, chunk), what};
        c.all_gather(from, counts, span(recv));
      }
      EXPECT_EQ(numbers(recv), gathered) << what;
    }
  }

  for (const int root : {0, p - 1}) {
    for (const Index n : {0, 10}) {
      const std::string what = label(c, "broadcast", dtype, n);
      std::vector<T> data = before<T>(me, 0, n);
      {
        const Counted counted{c, independent, cost::broadcast(n, p, me, root, bytes, chunk), what};
        c.broadcast(span(data), root);
      }
      EXPECT_EQ(numbers(data), numbers(before<T>(root, 0, n))) << what;
    }
  }

  // From rank r to rank q go (r + 2q) mod 4 elements, nothing, or (only from 0 to the last) 10.
  const std::vector<std::function<Index(int, int)>> exchanges{
      [](int r, int q) { return Index{(r + 2 * q) % 4}; }, [](int, int) { return Index{0}; },
      [p](int r, int q) { return Index{r == 0 && q == p - 1 ? 10 : 1}; }};
  for (const auto& count : exchanges) {
    const auto element = [](int from, int to, Index i) { return 8 * from + to + 64 * (i % 3); };
    std::vector<Index> send_counts, recv_counts, expected;
    std::vector<T> send;
    for (int q = 0; q < p; ++q) {
      send_counts.push_back(count(me, q));
      recv_counts.push_back(count(q, me));
      for (Index i = 0; i < count(me, q); ++i) send.push_back(value<T>(element(me, q, i)));
      for (Index i = 0; i < count(q, me); ++i) expected.push_back(element(q, me, i));
    }
    const std::string what = label(c, "all_to_all", dtype, total(send_counts));
    std::vector<T> recv(expected.size(), value<T>(255));
    {
      const Counted counted{c, independent, cost::all_to_all(send_counts, me, bytes, chunk), what};
      c.all_to_all(span(send), send_counts, span(recv), recv_counts);
    }
    EXPECT_EQ(numbers(recv), expected) << what;
  }

  if (p > 1) {  // around the ring, even ranks first, so that a send may wait for its receive
    const Index n = 5;
    const std::string what = label(c, "send", dtype, n);
    const int to = (me + 1) % p;
    const int from = (me + p - 1) % p;
    const std::vector<T> out = before<T>(me, 0, n);
    std::vector<T> in(static_cast<std::size_t>(n));
    {
      const Counted counted{c, independent, cost::send(n, bytes, chunk), what};
      if (me % 2 == 0) {
        c.send(span(out), to, 7);
        c.receive(span(in), from, 7);
      } else {
        c.receive(span(in), from, 7);
        c.send(span(out), to, 7);
      }
    }
    EXPECT_EQ(numbers(in), numbers(before<T>(from, 0, n))) << what;
  }
}

inline void strings(Communicator& c) {
  const auto text_of = [](int r) {
    return std::string(static_cast<std::size_t>(r) * 5, 'a' + static_cast<char>(r));
  };
  const std::vector<std::string> all = c.all_gather_strings(text_of(c.rank()));
  ASSERT_EQ(static_cast<int>(all.size()), c.size());
  for (int r = 0; r < c.size(); ++r) EXPECT_EQ(all[static_cast<std::size_t>(r)], text_of(r));
  for (const std::string& said : {std::string{}, std::string{"schema: 1\n\0x", 12}}) {
    std::string text = c.rank() == c.size() - 1 ? said : "something longer than what is said";
    c.broadcast(text, c.size() - 1);
    EXPECT_EQ(text, said);
  }
}

/// Calls overlap; waiting, testing, moving and destroying may come in any order.
inline void requests(Communicator& c) {
  const int p = c.size();
  const int me = c.rank();
  const Index n = 40;
  std::vector<std::vector<float>> data;
  for (int k = 0; k < 6; ++k) data.push_back(before<float>(me, k, n));
  const auto summed = [&](int k) { return after(p, k, n, ReduceOp::sum); };

  std::vector<Request> started;
  for (auto& d : data) started.push_back(c.start_all_reduce(span(d), ReduceOp::sum));
  // Ranks wait in different orders: forwards on even ones, backwards on odd ones.
  for (int i = 0; i < 4; ++i) started[static_cast<std::size_t>(me % 2 == 0 ? i : 3 - i)].wait();
  for (int k = 0; k < 4; ++k) EXPECT_EQ(numbers(data[static_cast<std::size_t>(k)]), summed(k));
  while (!started[4].test()) {
  }
  EXPECT_FALSE(started[4].active());
  EXPECT_EQ(numbers(data[4]), summed(4));
  started.clear();  // number 5 was never waited for: it completes
  EXPECT_EQ(numbers(data[5]), summed(5));

  std::vector<float> a = before<float>(me, 0, n);
  std::vector<float> b = before<float>(me, 1, n);
  Request request = c.start_all_reduce(span(a), ReduceOp::sum);
  request = c.start_all_reduce(span(b), ReduceOp::max);
  EXPECT_EQ(numbers(a), after(p, 0, n, ReduceOp::sum));  // complete before it was replaced
  Request moved = std::move(request);
  EXPECT_TRUE(request.test());  // NOLINT(bugprone-use-after-move): empty is what is asked
  moved.wait();
  moved.wait();  // nothing left
  EXPECT_EQ(numbers(b), after(p, 1, n, ReduceOp::max));
}

/// Cut into messages of 3 elements, the same bits arrive and the same bytes travel.
inline void cutting(Communicator& c) {
  const int me = c.rank();
  const auto ranks = static_cast<std::size_t>(c.size());
  std::vector<Index> counts(ranks);
  for (std::size_t r = 0; r < ranks; ++r)
    counts[r] = static_cast<Index>((5 * r + 4) % 7);  // 4 2 0 5 3 …
  const Index n = total(counts);
  const auto mine = static_cast<std::size_t>(counts[static_cast<std::size_t>(me)]);
  // Nothing exact here: f32 sums of two terms have one value whatever the order, so at most two
  // ranks add.
  std::vector<float> send(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < send.size(); ++i) {
    send[i] =
        me < 2 ? 1.0F / (3.0F + static_cast<float>(i) + 0.37F * static_cast<float>(me)) : 0.0F;
  }
  const auto run = [&](Index max_chunk) {
    c.set_max_chunk(max_chunk);
    std::vector<float> scattered(mine), gathered(send.size()), reduced = send;
    const Traffic t0 = c.traffic();
    c.reduce_scatter(span(std::as_const(send)), counts, span(scattered));
    c.all_gather(span(std::as_const(scattered)), counts, span(gathered));
    const Traffic t1 = c.traffic();
    c.all_reduce(span(reduced), ReduceOp::sum);
    EXPECT_EQ(c.traffic().messages - t1.messages,
              std::max(Index{1}, (n + max_chunk - 1) / max_chunk));
    return std::tuple(scattered, gathered, reduced, t1 - t0);
  };
  const Index whole = c.options().max_chunk;
  const auto [s1, g1, r1, t1] = run(whole);
  const auto [s3, g3, r3, t3] = run(3);
  c.set_max_chunk(whole);
  EXPECT_EQ(s3, s1);
  EXPECT_EQ(g3, g1);
  EXPECT_EQ(r3, r1);
  EXPECT_EQ(g1, r1);
  EXPECT_EQ(t3.bytes, t1.bytes);
  EXPECT_EQ(t1.messages, 2);
  EXPECT_EQ(t3.messages, 2 * std::max(Index{1}, (n + 2) / 3));
}

/// May ranks start calls on two communicators in different orders?
enum class Order : bool { free, same };

/// Ranks of equal parity, in reverse order; and the parent goes on working.
inline void splitting(Communicator& c, Order order = Order::free) {
  c.set_name("world");
  Communicator part = c.split(c.rank() % 2, -c.rank(), "parity");
  const int size = (c.size() + (c.rank() % 2 == 0 ? 1 : 0)) / 2;
  EXPECT_EQ(part.size(), size);
  EXPECT_EQ(part.rank(), size - 1 - c.rank() / 2);
  EXPECT_EQ(part.options().name, "world.parity");
  EXPECT_STREQ(part.kind(), c.kind());
  std::vector<std::int64_t> who{c.rank()};
  part.all_reduce(span(who), ReduceOp::sum);
  std::int64_t expected = 0;
  for (int r = c.rank() % 2; r < c.size(); r += 2) expected += r;
  EXPECT_EQ(who[0], expected);
  EXPECT_EQ(part.traffic().messages, 1);

  Communicator copy = c.duplicate("copy");
  EXPECT_EQ(copy.rank(), c.rank());
  EXPECT_EQ(copy.size(), c.size());
  EXPECT_EQ(copy.traffic(), Traffic{});
  // Calls on the two meet their own kind, though ranks start and wait for them in different
  // orders (which blocking calls and NCCL's cannot).
  std::vector<float> a = before<float>(c.rank(), 0, 9);
  std::vector<float> b = before<float>(c.rank(), 2, 9);
  if (c.rank() % 2 == 0 || c.options().blocking || order == Order::same) {
    Request one = c.start_all_reduce(span(a), ReduceOp::sum);
    Request two = copy.start_all_reduce(span(b), ReduceOp::min);
    one.wait();
    two.wait();
  } else {
    Request two = copy.start_all_reduce(span(b), ReduceOp::min);
    Request one = c.start_all_reduce(span(a), ReduceOp::sum);
    two.wait();
    one.wait();
  }
  EXPECT_EQ(numbers(a), after(c.size(), 0, 9, ReduceOp::sum));
  EXPECT_EQ(numbers(b), after(c.size(), 2, 9, ReduceOp::min));
}

/// Classes are apart; `traffic()` is what a step sends.
inline void classes(Communicator& c) {
  std::vector<float> data(12, 1.0F);
  const auto once = [&](TrafficClass k) {
    const orthrus::TrafficScope scope{c, k};
    const Traffic t = c.traffic(k);
    c.all_reduce(span(data), ReduceOp::max);
    return c.traffic(k) - t;
  };
  const Traffic all = c.traffic();
  const Traffic one = cost::all_reduce(12, c.size(), c.rank(), 4, c.options().max_chunk);
  for (const TrafficClass k : {TrafficClass::payload, TrafficClass::control, TrafficClass::setup,
                               TrafficClass::exceptional}) {
    EXPECT_EQ(once(k), one);
  }
  EXPECT_EQ(c.traffic() - all, one + one + one);
  Traffic by_call;
  for (const auto& [name, t] : c.traffic_by_call()) by_call += t;
  EXPECT_EQ(by_call, c.traffic() + c.traffic(TrafficClass::setup));
}

inline void everything(Communicator& c, const Independent& independent, Order order = Order::free) {
  for (const bool blocking : {false, true}) {
    c.set_blocking(blocking);
    for (const Index chunk : {Index{0x7fffffff}, Index{3}, Index{1}}) {
      c.set_max_chunk(chunk);
      collectives<float>(c, independent);
      collectives<BFloat16>(c, independent);
      collectives<double>(c, independent);
      collectives<std::int64_t>(c, independent);
      collectives<std::uint8_t>(c, independent);
    }
    c.set_max_chunk(0x7fffffff);
    strings(c);
    requests(c);
    cutting(c);
    splitting(c, order);
    classes(c);
  }
  c.set_blocking(false);
}

}  // namespace conformance
