// Buffers the ranks cannot read: what is staged, when, and that no call notices. The device is
// plain memory here, its copies are as late as they may be.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <latch>
#include <memory>
#include <orthrus/error.hpp>
#include <random>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "comm/cuda_copies.hpp"
#include "comm/staged.hpp"
#include "comm/thread.hpp"
#include "conformance.hpp"
#include "steady_state.hpp"
#include "support/plain_copies.hpp"

namespace {

using namespace conformance;
using orthrus::CommError;
using orthrus::CommunicatorBackend;
using orthrus::DeviceError;
using orthrus::DType;
using orthrus::run_thread_ranks;
using orthrus::comm::Copies;
using orthrus::comm::staged;
using orthrus::comm::staged_over;
using testing::HasSubstr;

/// Copies are made only while somebody asks, a few queries late, in their order.
class LateCopies final : public Copies {
 public:
  explicit LateCopies(unsigned seed, int latest = 4) : random_(seed), latest_(latest) {}
  ~LateCopies() override { EXPECT_TRUE(blocks_.empty()) << "staging memory was not freed"; }

  void* allocate(std::size_t bytes) override {
    void* const block = ::operator new(bytes);
    blocks_.insert(block);
    return block;
  }
  void free(void* block) noexcept override {
    EXPECT_EQ(blocks_.erase(block), 1U);
    ::operator delete(block);
  }
  void forget_blocks() {  // what calls that were given up keep
    for (void* const block : blocks_) ::operator delete(block);
    blocks_.clear();
  }
  std::unique_ptr<Mark> mark() override { return std::make_unique<LateMark>(*this); }
  void follow() override { ++followed; }
  void fetch(void* staging, const void* caller, std::size_t bytes) override {
    fetched += bytes;
    start(staging, caller, bytes);
  }
  void deliver(void* caller, const void* staging, std::size_t bytes) override {
    delivered += bytes;
    start(caller, staging, bytes);
  }

  std::size_t fetched = 0, delivered = 0, followed = 0;
  int copies_until_failure = -1;

 private:
  struct Copy {
    void* to;
    const void* from;
    std::size_t bytes;
  };
  class LateMark final : public Mark {
   public:
    explicit LateMark(LateCopies& copies) : copies_(copies) {}
    void set() override {
      end_ = copies_.started_;
      late_ = std::uniform_int_distribution{0, copies_.latest_}(copies_.random_);
    }
    bool reached() override {
      if (late_-- > 0) return false;
      copies_.carry_out(end_);
      return true;
    }

   private:
    LateCopies& copies_;
    std::size_t end_ = 0;
    int late_ = 0;
  };

  void start(void* to, const void* from, std::size_t bytes) {
    EXPECT_GT(bytes, 0U);
    if (copies_until_failure >= 0 && copies_until_failure-- == 0) {
      throw DeviceError("the device fell off the bus");
    }
    queue_.push_back({to, from, bytes});
    ++started_;
  }
  void carry_out(std::size_t end) {
    for (; done_ < end; ++done_) {
      const Copy& c = queue_[done_];
      std::memcpy(c.to, c.from, c.bytes);
    }
  }

  std::mt19937 random_;
  int latest_;
  std::set<void*> blocks_;
  std::vector<Copy> queue_;
  std::size_t started_ = 0, done_ = 0;
};

std::shared_ptr<LateCopies> late(const Communicator& c) {
  return std::make_shared<LateCopies>(static_cast<unsigned>(c.rank()) + 17);
}

class StagedConformance : public testing::TestWithParam<int> {};

TEST_P(StagedConformance, DoWhatEveryCommunicatorDoes) {
  run_thread_ranks(GetParam(), [](Communicator& over) {
    Communicator c = staged(over, late(over));
    EXPECT_STREQ(c.kind(), "thread+staging");
    EXPECT_FALSE(c.on_device());
    everything(c, [&] { return orthrus::comm::thread_copied(staged_over(c)); });
  });
}
INSTANTIATE_TEST_SUITE_P(Ranks, StagedConformance, testing::Values(1, 2, 3, 5));

TEST(Staged, AndStagedAgain) {
  run_thread_ranks(3, [](Communicator& over) {
    Communicator once = staged(over, late(over));
    Communicator twice = staged(once, std::make_shared<PlainCopies>());
    collectives<float>(twice, [&] { return twice.traffic(); });
    requests(twice);
    splitting(twice);
  });
}

TEST(Staged, CopiesWhatACallReadsAndWritesAndNoMore) {
  run_thread_ranks(2, [](Communicator& over) {
    const auto copies = late(over);
    Communicator c = staged(over, copies);
    const auto me = static_cast<std::size_t>(c.rank());
    std::vector<float> all(7, 1.0F), mine(me == 0 ? 5 : 2);
    const std::vector<Index> counts{5, 2};
    const auto expect = [&](std::size_t in, std::size_t out, const char* what) {
      EXPECT_EQ(copies->fetched, 4 * in) << what;
      EXPECT_EQ(copies->delivered, 4 * out) << what;
      EXPECT_EQ(copies->followed, 1U) << what;
      copies->fetched = copies->delivered = copies->followed = 0;
    };
    c.all_reduce(span(all), ReduceOp::sum);
    expect(7, 7, "all_reduce");
    c.reduce_scatter(span(std::as_const(all)), counts, span(mine));
    expect(7, mine.size(), "reduce_scatter");
    c.all_gather(span(std::as_const(mine)), counts, span(all));
    expect(mine.size(), 7, "all_gather");
    c.broadcast(span(all), 1);
    expect(me == 1 ? 7 : 0, me == 1 ? 0 : 7, "broadcast");
    c.reduce(span(std::as_const(mine)).count == 5 ? ConstSpan{all.data(), 2, DType::f32}
                                                  : span(std::as_const(mine)),
             Span{mine.data(), 2, DType::f32}, ReduceOp::max, 0);
    expect(2, me == 0 ? 2 : 0, "reduce");
    c.barrier();
    expect(0, 0, "barrier");
    // Parts of 3 in messages of 2: the rest, also of its own part, is three calls more.
    c.set_max_chunk(2);
    std::vector<float> out{1, 2, 3, 4, 5, 6}, in(6);
    for (float& x : out) x += 10 * static_cast<float>(me);
    const std::vector<Index> threes{3, 3};
    c.all_to_all(span(std::as_const(out)), threes, span(in), threes);
    EXPECT_EQ(copies->fetched, 24U);
    EXPECT_EQ(copies->delivered, 24U);
    EXPECT_EQ(in, me == 0 ? (std::vector<float>{1, 2, 3, 11, 12, 13})
                          : (std::vector<float>{4, 5, 6, 14, 15, 16}));
  });
}

TEST(Staged, StartsDoNotWait) {
  std::latch started{1};
  run_thread_ranks(2, [&](Communicator& over) {
    Communicator c = staged(over, late(over));
    std::vector<float> data = before<float>(c.rank(), 0, 8);
    if (c.rank() == 1) started.wait();
    Request request = c.start_all_reduce(span(data), ReduceOp::sum);
    if (c.rank() == 0) {
      EXPECT_FALSE(request.test());
      started.count_down();
    }
    request.wait();
    EXPECT_EQ(numbers(data), after(2, 0, 8, ReduceOp::sum));
  });
}

// Rank 1 asks only for its call on `copy`, and rank 0 only for the other: each must move what the
// other waits for.
TEST(Staged, AskingForOneCallMovesThoseOfAllCommunicatorsSplitFromOne) {
  run_thread_ranks(2, [](Communicator& over) {
    Communicator c = staged(over, std::make_shared<LateCopies>(3, 50));
    Communicator copy = c.duplicate("copy");
    c.set_timeout(30);
    copy.set_timeout(30);
    std::vector<float> a(5, 1.0F), b(5, 1.0F);
    Request one = c.start_all_reduce(span(a), ReduceOp::sum);
    Request two = copy.start_all_reduce(span(b), ReduceOp::sum);
    (c.rank() == 0 ? one : two).wait();
    (c.rank() == 0 ? two : one).wait();
    EXPECT_EQ(a[4] + b[4], 4.0F);
  });
}

TEST(Staged, DeadlineNamesTheCall) {
  std::latch over_and_out{1};
  run_thread_ranks(2, [&](Communicator& over) {
    const auto copies = late(over);
    {
      Communicator c = staged(over, copies);
      if (c.rank() == 1) {
        over_and_out.wait();
        return;
      }
      c.set_timeout(0.05);
      std::vector<float> data(4);
      EXPECT_EQ(thrown<CommError>([&] { c.all_reduce(span(data), ReduceOp::sum); }),
                "[rank 0/2] all_reduce of 16 bytes on world: no answer in 0.05 s (comm.timeout_s)");
      over_and_out.count_down();
    }
    copies->forget_blocks();
  });
}

TEST(Staged, ErrorsOfRanksAndOfCopiesAreThrownWhereTheCallIsAsked) {
  EXPECT_EQ(thrown<std::runtime_error>([] {
              run_thread_ranks(3, [](Communicator& over) {
                const auto copies = late(over);
                {
                  Communicator c = staged(over, copies);
                  if (c.rank() == 2) throw std::runtime_error("rank 2 is out of luck");
                  std::vector<float> data(4);
                  EXPECT_THAT(thrown<CommError>([&] { c.all_reduce(span(data), ReduceOp::sum); }),
                              HasSubstr("rank 2 threw: rank 2 is out of luck"));
                }
                copies->forget_blocks();
              });
            }),
            "rank 2 is out of luck");
  // The first copy in fails where the call starts; the first one back where it is asked.
  for (const int copies_until_failure : {0, 1}) {
    Communicator self = orthrus::self_communicator();
    const auto copies = std::make_shared<LateCopies>(5);
    copies->copies_until_failure = copies_until_failure;
    {
      Communicator c = staged(self, copies);
      std::vector<float> data(4);
      EXPECT_EQ(thrown<CommError>([&] { c.all_reduce(span(data), ReduceOp::sum); }),
                "[rank 0/1] all_reduce of 16 bytes on world: the device fell off the bus");
    }
    copies->forget_blocks();
  }
}

TEST(Staged, AllocatesNothingInSteadyState) {
  for (const int ranks : {1, 2, 4}) {
    run_thread_ranks(ranks, [](Communicator& over) {
      Communicator c = staged(over, std::make_shared<PlainCopies>());
      EXPECT_EQ(steady_state::allocations(c), 0) << c.size() << " ranks";
    });
  }
}

/// One rank that sees how it is to call.
class Seen final : public CommunicatorBackend {
 public:
  explicit Seen(std::shared_ptr<std::vector<bool>> blocking) : blocking_(std::move(blocking)) {}
  int rank() const override { return 0; }
  int size() const override { return 1; }
  const char* kind() const override { return "seen"; }
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
    return std::make_unique<Seen>(blocking_);
  }
  void set_blocking(bool blocking) override { blocking_->push_back(blocking); }

 private:
  std::shared_ptr<std::vector<bool>> blocking_;  // as it was set, by all split from one
};

TEST(Staged, BlockingCallsBlockBeneathToo) {
  const auto seen = std::make_shared<std::vector<bool>>();
  const Communicator over{std::make_unique<Seen>(seen)};
  Communicator c = staged(over, std::make_shared<LateCopies>(1));
  seen->clear();
  c.set_blocking(true);
  EXPECT_EQ(*seen, std::vector<bool>{true});
  std::vector<float> data(4);
  // Complete when started, though copies are late.
  EXPECT_FALSE(c.start_all_reduce(span(data), ReduceOp::sum).active());
  Communicator part = c.split(0, 0, "part");
  EXPECT_EQ(*seen, (std::vector<bool>{true, true})) << "as its parent";
  EXPECT_FALSE(part.start_all_reduce(span(data), ReduceOp::sum).active());
  c.set_timeout(1);  // with a deadline it is the front that waits, with the clock in hand
  EXPECT_EQ(*seen, (std::vector<bool>{true, true, false}));
  EXPECT_FALSE(c.start_all_reduce(span(data), ReduceOp::sum).active());
  c.set_blocking(false);
  Request request = c.start_all_reduce(span(data), ReduceOp::sum);
  EXPECT_TRUE(request.active());
  request.wait();
}

TEST(Staged, OnlyStagedOnesHaveABodyBeneath) {
  Communicator self = orthrus::self_communicator();
  EXPECT_THROW(static_cast<void>(staged_over(self)), CommError);
}

TEST(CudaCopies, WithoutADeviceSayWhy) {
  try {
    static_cast<void>(orthrus::comm::cuda_copies(0));
    GTEST_SKIP() << "there is a device: test_nccl uses it";
  } catch (const orthrus::ConfigError& e) {
    EXPECT_THAT(e.what(), HasSubstr("-DORTHRUS_WITH_CUDA=ON"));
  } catch (const DeviceError& e) {
    EXPECT_THAT(e.what(), HasSubstr("cuda"));
  }
}

}  // namespace
