// Every body does the same; what only threads and dry ranks can show is shown here.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <latch>
#include <optional>
#include <orthrus/error.hpp>
#include <stdexcept>
#include <thread>
#include <vector>

#include "comm/thread.hpp"
#include "conformance.hpp"

namespace {

using namespace conformance;
using orthrus::CommError;
using orthrus::DType;
using orthrus::ExitCode;
using orthrus::run_thread_ranks;
using testing::HasSubstr;

class ThreadConformance : public testing::TestWithParam<int> {};

TEST_P(ThreadConformance, DoWhatEveryCommunicatorDoes) {
  run_thread_ranks(GetParam(), [](Communicator& c) {
    EXPECT_STREQ(c.kind(), "thread");
    everything(c, [&] { return orthrus::comm::thread_copied(c); });
  });
}
INSTANTIATE_TEST_SUITE_P(Ranks, ThreadConformance, testing::Values(1, 2, 3, 4, 5, 8));

TEST(Self, DoesWhatEveryCommunicatorDoes) {
  Communicator c = orthrus::self_communicator();
  // One rank sends no byte; its calls are counted all the same.
  everything(c, [&] { return Traffic{0, c.traffic().messages}; });
}

TEST(ThreadRanks, KnowTheirNumbers) {
  std::array<std::atomic<int>, 3> seen{};
  run_thread_ranks(3, [&](Communicator& c) {
    EXPECT_EQ(c.size(), 3);
    ++seen[static_cast<std::size_t>(c.rank())];
  });
  for (const auto& n : seen) EXPECT_EQ(n, 1);
  EXPECT_THROW(run_thread_ranks(0, [](Communicator&) {}), CommError);
}

TEST(ThreadRanks, AddInRankOrder) {
  // 1e8 + 1 − 1e8 is 0 in f32 in this order, 1 in the other.
  const std::array<float, 3> order{1e8F, 1.0F, -1e8F};
  const std::array<float, 3> other{1e8F, -1e8F, 1.0F};
  run_thread_ranks(3, [&](Communicator& c) {
    const auto me = static_cast<std::size_t>(c.rank());
    std::vector<float> data{order[me], other[me]};
    c.all_reduce(span(data), ReduceOp::sum);
    EXPECT_EQ(data, (std::vector<float>{0.0F, 1.0F}));
  });
}

TEST(ThreadRanks, AddBfloat16InF32AndRoundOnce) {
  // 256 + 1 + 1 = 258 is a bf16; rounding after every term would stay at 256 (257 is a tie to
  // even).
  run_thread_ranks(3, [&](Communicator& c) {
    std::vector<BFloat16> data{value<BFloat16>(c.rank() == 0 ? 256 : 1)};
    c.all_reduce(span(data), ReduceOp::sum);
    EXPECT_EQ(number(data[0]), 258);
  });
}

TEST(ThreadRanks, StartsDoNotWait) {
  // Rank 1 starts only after rank 0's start has returned: a start that waits would hang here.
  std::latch started{1};
  run_thread_ranks(2, [&](Communicator& c) {
    std::vector<float> data = before<float>(c.rank(), 0, 8);
    if (c.rank() == 1) started.wait();
    Request request = c.start_all_reduce(span(data), ReduceOp::sum);
    if (c.rank() == 0) {
      EXPECT_FALSE(request.test());
      EXPECT_TRUE(request.active());
      started.count_down();
    }
    request.wait();
    EXPECT_EQ(numbers(data), after(2, 0, 8, ReduceOp::sum));
  });
}

TEST(ThreadRanks, DeadlineNamesTheCallItsBytesTheCommunicatorAndTheRank) {
  std::latch over{1};
  run_thread_ranks(2, [&](Communicator& world) {
    Communicator c = world.split(0, 0, "shard");
    c.set_timeout(0.05);
    if (c.rank() == 1) {  // never calls
      over.wait();
      return;
    }
    const std::vector<float> send(64);
    const std::vector<Index> counts{32, 32};
    std::vector<float> recv(32);
    const auto begin = std::chrono::steady_clock::now();
    try {
      c.reduce_scatter(span(send), counts, span(recv));
      ADD_FAILURE() << "no deadline";
    } catch (const CommError& e) {
      EXPECT_STREQ(e.what(),
                   "[rank 0/2] reduce_scatter of 256 bytes on world.shard: no answer in 0.05 s "
                   "(comm.timeout_s)");
      EXPECT_EQ(e.exit_code(), ExitCode::deadline);
    }
    const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - begin;
    EXPECT_GE(waited.count(), 0.05);
    over.count_down();
  });
}

TEST(ThreadRanks, AfterADeadlineNoRequestIsWaitedForAgain) {
  std::latch over{1};
  run_thread_ranks(2, [&](Communicator& c) {
    c.set_timeout(1);
    if (c.rank() == 1) {
      over.wait();
      return;
    }
    std::vector<std::vector<float>> data(20, std::vector<float>(3));
    const auto begin = std::chrono::steady_clock::now();
    {
      std::vector<Request> requests;
      for (auto& d : data) requests.push_back(c.start_all_reduce(span(d), ReduceOp::sum));
      EXPECT_THROW(requests[0].wait(), CommError);
    }
    const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - begin;
    EXPECT_LT(waited.count(), 15);  // one deadline, not twenty
    over.count_down();
  });
}

TEST(ThreadRanks, ARankThatThrowsEndsTheOthersCalls) {
  std::atomic<int> ended{0};
  const auto body = [&](Communicator& c) {
    Communicator part = c.split(c.rank() % 2, 0, "part");
    if (c.rank() == 2) throw std::runtime_error("rank 2 is out of luck");
    std::vector<float> data(4);
    try {
      // Rank 2 was in part 0 only; everybody learns of it.
      part.all_reduce(span(data), ReduceOp::sum);
      c.barrier();
    } catch (const CommError& e) {
      EXPECT_THAT(e.what(), HasSubstr("rank 2 threw: rank 2 is out of luck"));
      ++ended;
      throw;
    }
  };
  EXPECT_EQ(thrown<std::runtime_error>([&] { run_thread_ranks(4, body); }),
            "rank 2 is out of luck");
  EXPECT_EQ(ended, 3);
}

TEST(ThreadRanks, ARankThatThrowsDoesNotWaitForItsRequestsForEver) {
  // Rank 1 waits for a call that rank 0 never makes; rank 0's request waits for one that rank 1
  // makes only after that. Without a deadline, nothing but the exception can end it (it takes 5 s).
  std::vector<float> data(8);
  EXPECT_EQ(thrown<std::runtime_error>([&] {
              run_thread_ranks(2, [&](Communicator& c) {
                Communicator copy = c.duplicate("copy");
                const Request request =
                    c.rank() == 0
                        ? copy.start_all_reduce(Span{data.data(), 4, DType::f32}, ReduceOp::sum)
                        : Request{};
                if (c.rank() == 0) throw std::runtime_error("rank 0 is out of luck");
                c.barrier();
              });
            }),
            "rank 0 is out of luck");
}

TEST(ThreadRanks, ARankThatEndsIsNotWaitedFor) {
  const auto body = [](Communicator& c) {
    if (c.rank() == 1) return;
    c.barrier();
  };
  EXPECT_THAT(thrown<CommError>([&] { run_thread_ranks(3, body); }),
              HasSubstr("rank 1 has ended without this call"));
}

TEST(ThreadRanks, DisagreementIsNamedOnEveryRank) {
  const auto error_of = [](const std::function<void(Communicator&)>& body) {
    std::atomic<int> threw{0};
    const std::string text = thrown<CommError>([&] {
      run_thread_ranks(2, [&](Communicator& c) {
        try {
          body(c);
        } catch (const CommError&) {
          ++threw;
          throw;
        }
      });
    });
    EXPECT_EQ(threw, 2);
    return text;
  };
  std::vector<float> a(4);
  EXPECT_THAT(
      error_of([](Communicator& c) {
        std::vector<float> data(static_cast<std::size_t>(c.rank()) + 4);
        c.all_reduce(span(data), ReduceOp::sum);
      }),
      HasSubstr(
          "rank 0 calls all_reduce of 4 f32, root 0, op 0, rank 1 calls all_reduce of 5 f32"));
  EXPECT_THAT(error_of([](Communicator& c) {
                std::vector<float> data(4);
                if (c.rank() == 0) {
                  c.all_reduce(span(data), ReduceOp::sum);
                } else {
                  c.broadcast(span(data), 0);
                }
              }),
              HasSubstr("rank 1 calls broadcast of 4 f32"));
  EXPECT_THAT(error_of([](Communicator& c) {
                std::vector<float> f(2);
                std::vector<double> d(2);
                c.all_reduce(c.rank() == 0 ? span(f) : span(d), ReduceOp::sum);
              }),
              HasSubstr("rank 1 calls all_reduce of 2 f64"));
  EXPECT_THAT(error_of([](Communicator& c) {
                const std::vector<Index> sends{0, c.rank() == 0 ? 3 : 0};
                const std::vector<Index> receives{0, 0};
                const std::vector<float> send(c.rank() == 0 ? 3 : 0);
                std::vector<float> recv;
                if (c.rank() == 0) {
                  c.all_to_all(span(send), sends, span(recv), receives);
                } else {
                  c.all_to_all(span(send), receives, span(recv), receives);
                }
              }),
              HasSubstr("rank 0 sends 3 elements to rank 1, which receives 0"));
  EXPECT_THAT(error_of([](Communicator& c) {
                std::vector<float> data(static_cast<std::size_t>(c.rank()) + 4);
                if (c.rank() == 0) {
                  c.send(span(data), 1);
                } else {
                  c.receive(span(data), 0);
                }
              }),
              HasSubstr("rank 0 sends 4 f32, rank 1 receives 5 f32"));
}

TEST(ThreadRanks, MessagesMeetByTagInTheOrderTheyWereSent) {
  run_thread_ranks(3, [](Communicator& c) {
    std::vector<std::int64_t> x{0};
    if (c.rank() == 0) {
      // Sends wait for their receive: rank 2's one comes through while rank 1 is still waited for.
      for (std::int64_t i = 0; i < 4; ++i) {
        std::vector<std::int64_t> out{i};
        c.send(span(out), i % 2 == 0 ? 2 : 1, static_cast<int>(i));
      }
    } else {
      for (int i = c.rank() == 2 ? 0 : 1; i < 4; i += 2) {
        c.receive(span(x), 0, i);
        EXPECT_EQ(x[0], i);
      }
    }
  });
}

TEST(ThreadRanks, ManySplitsAndCallsLeaveNothingBehind) {
  run_thread_ranks(4, [](Communicator& c) {
    for (int i = 0; i < 50; ++i) {
      Communicator part = c.split(c.rank() / 2, 0, "half");
      std::vector<std::int64_t> one{1};
      part.all_reduce(span(one), ReduceOp::sum);
      c.all_reduce(span(one), ReduceOp::sum);
      EXPECT_EQ(one[0], 8);
    }
  });
}

TEST(ThreadRanks, ACommunicatorMayEndBeforeItsRequests) {
  run_thread_ranks(2, [](Communicator& c) {
    std::vector<float> data = before<float>(c.rank(), 0, 5);
    Request request;
    {
      Communicator copy = c.duplicate("copy");
      request = copy.start_all_reduce(span(data), ReduceOp::sum);
    }
    request.wait();
    EXPECT_EQ(numbers(data), after(2, 0, 5, ReduceOp::sum));
  });
}

TEST(Dry, CountsWhatThreadRanksCount) {
  constexpr int p = 4;
  const auto calls = [](Communicator& c, bool buffers) {
    c.set_max_chunk(6);
    const std::vector<Index> counts{5, 0, 9, 3};
    const auto me = static_cast<std::size_t>(c.rank());
    std::vector<float> all(17), mine(static_cast<std::size_t>(counts[me]));
    const auto at = [&](std::vector<float>& v) {
      return buffers ? span(v) : Span{nullptr, static_cast<Index>(v.size()), DType::f32};
    };
    c.all_reduce(at(all), ReduceOp::sum);
    c.reduce_scatter(at(all), counts, at(mine));
    c.all_gather(at(mine), counts, at(all));
    c.broadcast(at(all), 2);
    std::vector<float> sum(17);
    c.reduce(at(all), at(sum), ReduceOp::max, 1);
    std::vector<Index> sends(p), receives(p);
    for (int q = 0; q < p; ++q) {
      sends[static_cast<std::size_t>(q)] = 7 * c.rank() + q;
      receives[static_cast<std::size_t>(q)] = 7 * q + c.rank();
    }
    std::vector<float> out(static_cast<std::size_t>(total(sends)));
    std::vector<float> in(static_cast<std::size_t>(total(receives)));
    c.all_to_all(at(out), sends, at(in), receives);
    c.barrier();
    {
      const orthrus::TrafficScope setup{c, TrafficClass::setup};
      static_cast<void>(c.all_gather_strings("four"));
    }
    Request request = c.start_all_reduce(at(all), ReduceOp::min);
    request.wait();
  };
  run_thread_ranks(p, [&](Communicator& c) {
    calls(c, true);
    Communicator dry = orthrus::dry_communicator(p, c.rank());
    EXPECT_TRUE(dry.dry());
    EXPECT_STREQ(dry.kind(), "dry");
    calls(dry, false);
    EXPECT_EQ(dry.traffic(), c.traffic());
    EXPECT_EQ(dry.traffic(TrafficClass::setup), c.traffic(TrafficClass::setup));
    EXPECT_EQ(dry.traffic_by_call(), c.traffic_by_call());
    EXPECT_EQ(orthrus::comm::thread_copied(c), c.traffic() + c.traffic(TrafficClass::setup));
  });
}

TEST(Dry, RanksThatAreNotThereCannotSayTheirColor) {
  Communicator c = orthrus::dry_communicator(512, 511);
  EXPECT_EQ(c.rank(), 511);
  EXPECT_EQ(c.size(), 512);
  EXPECT_EQ(c.duplicate("copy").size(), 512);
  EXPECT_THROW(static_cast<void>(c.split(0, 0, "part")), CommError);
  EXPECT_THROW(static_cast<void>(orthrus::dry_communicator(4, 4)), CommError);
  EXPECT_THROW(static_cast<void>(orthrus::dry_communicator(0)), CommError);
}

TEST(Communicator, RefusesWhatCannotBeMeantAndSaysTheNumbers) {
  run_thread_ranks(2, [](Communicator& c) {
    std::vector<float> a(6), b(3);
    const std::string rank = "[rank " + std::to_string(c.rank()) + "/2] ";
    const std::vector<Index> three{1, 1, 1}, six{3, 3}, negative{7, -1};
    EXPECT_EQ(thrown<orthrus::ShapeError>([&] { c.reduce_scatter(span(a), three, span(b)); }),
              rank + "reduce_scatter of 24 bytes on world: 3 counts for 2 ranks");
    EXPECT_EQ(thrown<orthrus::ShapeError>([&] { c.reduce_scatter(span(b), six, span(a)); }),
              rank + "reduce_scatter of 12 bytes on world: send has 3 elements, counts say 6");
    EXPECT_THAT(thrown<orthrus::ShapeError>([&] { c.all_gather(span(b), negative, span(a)); }),
                HasSubstr("a count is -1"));
    EXPECT_THAT(thrown<orthrus::ShapeError>([&] {
                  c.all_gather(ConstSpan{a.data() + 1, 3, DType::f32}, six, span(a));
                }),
                HasSubstr("send and recv overlap"));
    EXPECT_THAT(thrown<orthrus::ShapeError>([&] {
                  c.reduce_scatter(span(a), six, Span{a.data(), 3, DType::f32});
                }),
                HasSubstr("send and recv overlap"));
    EXPECT_THAT(thrown<orthrus::ShapeError>([&] {
                  c.reduce_scatter(span(a), six, Span{b.data(), 3, DType::bf16});
                }),
                HasSubstr("sends f32, receives bf16"));
    EXPECT_THAT(thrown<orthrus::ShapeError>([&] {
                  c.all_reduce(Span{nullptr, 3, DType::f32}, ReduceOp::sum);
                }),
                HasSubstr("data is null"));
    EXPECT_THAT(thrown<orthrus::ShapeError>([&] { c.broadcast(span(a), 2); }),
                HasSubstr("root is 2 of 2 ranks"));
    EXPECT_THAT(thrown<orthrus::ShapeError>([&] { c.send(span(a), c.rank()); }),
                HasSubstr("a rank cannot talk to itself"));
    EXPECT_THAT(thrown<orthrus::ShapeError>([&] { c.receive(span(a), 1 - c.rank(), 32767); }),
                HasSubstr("tag 32767 is not in 0...32766"));
    EXPECT_THAT(thrown<CommError>([&] { c.set_max_chunk(0); }), HasSubstr("max_chunk is 0"));
    EXPECT_THAT(thrown<CommError>([&] { c.set_max_chunk(Index{1} << 31); }),
                HasSubstr("max_chunk is 2147483648"));
    EXPECT_THROW(static_cast<void>(c.split(-1, 0, "part")), CommError);
    EXPECT_EQ(c.traffic(), Traffic{});  // nothing was sent, nothing counted
    c.barrier();                        // and nothing is broken
  });
}

TEST(Communicator, EmptyOnesSaySo) {
  Communicator empty;
  EXPECT_THAT(thrown<CommError>([&] { static_cast<void>(empty.rank()); }),
              HasSubstr("empty communicator"));
  EXPECT_THAT(thrown<CommError>([&] { empty.barrier(); }), HasSubstr("empty communicator"));
  Communicator self = orthrus::self_communicator();
  const Communicator taken = std::move(self);
  EXPECT_EQ(taken.size(), 1);
  EXPECT_THROW(self.barrier(),
               CommError);  // NOLINT(bugprone-use-after-move): empty is what is asked
  Request request;
  EXPECT_FALSE(request.active());
  EXPECT_TRUE(request.test());
  request.wait();
}

}  // namespace
