// comm/nccl.cpp against a NCCL whose ranks are threads: what it calls, in which order, and that it
// waits for NCCL's answers. Real devices are test_nccl's.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <memory>
#include <orthrus/error.hpp>
#include <orthrus/nccl.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "comm/cuda_copies.hpp"
#include "comm/mesh.hpp"
#include "conformance.hpp"
#include "support/fake_nccl.hpp"

namespace {

using namespace conformance;
using orthrus::CommError;
using orthrus::ConfigError;
using orthrus::DType;
using orthrus::ExitCode;
using orthrus::open_nccl;
using orthrus::run_thread_ranks;
using orthrus::comm::cuda_copies;
using orthrus::comm::cuda_copies_to_device;
using orthrus::comm::staged;
using testing::HasSubstr;

/// `count` zeros on this thread's device.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(Index count)
      : copies_(cuda_copies_to_device(0)),
        count_(count),
        data_(copies_->allocate(static_cast<std::size_t>(count) * sizeof(T))) {
    set(std::vector<T>(static_cast<std::size_t>(count)));
  }
  ~OnDevice() { copies_->free(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  void set(const std::vector<T>& v) { copies_->fetch(data_, v.data(), v.size() * sizeof(T)); }
  std::vector<T> get() {
    std::vector<T> v(static_cast<std::size_t>(count_));
    copies_->deliver(v.data(), data_, v.size() * sizeof(T));
    return v;
  }
  operator Span() const { return {data_, count_, orthrus::dtype_of<T>}; }

 private:
  std::shared_ptr<orthrus::comm::Copies> copies_;
  Index count_;
  void* data_;
};

class NcclRules : public testing::TestWithParam<int> {
 protected:
  void TearDown() override {
    EXPECT_EQ(fake::broken_rules(), 0);
    EXPECT_EQ(fake::communicators(), 0) << "neither destroyed nor aborted";
  }
};

TEST_P(NcclRules, DoesWhatEveryCommunicatorDoes) {
  const int aborted = fake::aborted();
  run_thread_ranks(GetParam(), [](Communicator& world) {
    Communicator c = open_nccl(world, world.rank());
    EXPECT_TRUE(c.on_device());
    EXPECT_EQ(world.traffic(), Traffic{}) << "opening is setup";
    Communicator host = staged(c, cuda_copies_to_device(world.rank()));
    everything(
        host,
        [&] {
          return Traffic{fake::sent_bytes(),
                         (host.traffic() + host.traffic(TrafficClass::setup)).messages};
        },
        Order::same);
  });
  EXPECT_EQ(fake::aborted(), aborted);
}
INSTANTIATE_TEST_SUITE_P(Ranks, NcclRules, testing::Values(1, 2, 3, 4));

class Nccl : public NcclRules {};

TEST_F(Nccl, StartsDoNotWaitAndQueueUp) {
  std::latch started{1};
  run_thread_ranks(2, [&](Communicator& world) {
    Communicator c = open_nccl(world, world.rank());
    Communicator other = c.duplicate("other");
    std::vector<std::unique_ptr<OnDevice<float>>> data;
    for (int k = 0; k < 30; ++k) {
      data.push_back(std::make_unique<OnDevice<float>>(3));
      data.back()->set(std::vector<float>(3, static_cast<float>(k)));
    }
    if (c.rank() == 1) started.wait();
    std::vector<Request> requests;
    for (std::size_t k = 0; k < data.size(); ++k) {
      requests.push_back((k % 3 == 0 ? other : c).start_all_reduce(*data[k], ReduceOp::sum));
    }
    if (c.rank() == 0) {
      for (Request& r : requests) EXPECT_FALSE(r.test());
      started.count_down();
    }
    // Last ones first on one rank.
    for (std::size_t k = 0; k < requests.size(); ++k) {
      requests[c.rank() == 0 ? requests.size() - 1 - k : k].wait();
    }
    for (std::size_t k = 0; k < data.size(); ++k) {
      EXPECT_EQ(data[k]->get(), std::vector<float>(3, 2 * static_cast<float>(k)));
    }
  });
}

TEST_F(Nccl, CallsComeAfterWhatTheComputeStreamHolds) {
  run_thread_ranks(2, [](Communicator& world) {
    OnDevice<float> data(2);
    void* const compute = fake::busy_stream();
    Communicator c = open_nccl(world, world.rank(), compute);
    Communicator shared = staged(world, cuda_copies(0, compute));
    Request request = c.start_all_reduce(data, ReduceOp::sum);
    Request beside = shared.start_all_reduce(data, ReduceOp::max);
    for (int i = 0; i < 100; ++i) {
      EXPECT_FALSE(request.test());
      EXPECT_FALSE(beside.test());
    }
    data.set({1, 2});  // what the stream was busy with
    world.barrier();
    fake::let_go(compute);
    request.wait();
    EXPECT_EQ(data.get(), (std::vector<float>{2, 4}));
    beside.wait();
  });
}

TEST_F(Nccl, MakesAMeshAndStagesDeviceBuffersOverOtherRanks) {
  run_thread_ranks(4, [](Communicator& world) {
    orthrus::Mesh mesh = orthrus::make_mesh(open_nccl(world, world.rank()), 2, 2);
    EXPECT_EQ(mesh.shard.size(), 2);
    OnDevice<float> data(3);
    data.set({1, 2, 3});
    mesh.shard.all_reduce(data, ReduceOp::sum);
    mesh.replicate.all_reduce(data, ReduceOp::sum);
    EXPECT_EQ(data.get(), (std::vector<float>{4, 8, 12}));

    Communicator shared = staged(world, cuda_copies(0));
    shared.all_reduce(data, ReduceOp::sum);
    EXPECT_EQ(data.get(), (std::vector<float>{16, 32, 48}));
    everything(shared, [&] { return shared.traffic() + shared.traffic(TrafficClass::setup); });
  });
}

TEST_F(Nccl, HostMemoryIsRefusedByName) {
  run_thread_ranks(2, [](Communicator& world) {
    Communicator c = open_nccl(world, world.rank());
    std::vector<float> data(4);
    EXPECT_EQ(thrown<CommError>([&] { c.all_reduce(span(data), ReduceOp::sum); }),
              "[rank " + std::to_string(c.rank()) +
                  "/2] all_reduce of 16 bytes on world: what is sent is in the host's memory; NCCL "
                  "takes the device's");
  });
}

TEST_F(Nccl, TwoRanksOnOneDeviceAreNamedOnEveryRank) {
  run_thread_ranks(3, [](Communicator& world) {
    EXPECT_THAT(thrown<ConfigError>(
                    [&] { static_cast<void>(open_nccl(world, world.rank() == 0 ? 5 : 6)); }),
                HasSubstr("ranks 1 and 2 both use device 0000:16:00.0 of host "));
    EXPECT_THAT(thrown<ConfigError>(
                    [&] { static_cast<void>(open_nccl(world, world.rank() == 1 ? 8 : 0)); }),
                HasSubstr("cannot use device 8: it sees 8 devices"));
    world.barrier();
  });
}

TEST_F(Nccl, WhereOneRankIsRefusedAllThrow) {
  run_thread_ranks(3, [](Communicator& world) {
    const auto opening = [&] {
      return thrown<CommError>([&] { static_cast<void>(open_nccl(world, world.rank())); });
    };
    if (world.rank() == 1) fake::refuse_next();
    EXPECT_EQ(opening(), "open_nccl: rank 1: ncclCommInitRankConfig: an error of the fake");
    // What goes wrong while they connect.
    if (world.rank() == 2) fake::lose_peer();
    EXPECT_EQ(opening(), "open_nccl: rank 2: NCCL: remote process exited");
    world.barrier();
  });
}

TEST_F(Nccl, ARankThatIsNotThereIsNotWaitedForWithoutEnd) {
  run_thread_ranks(2, [](Communicator& world) {
    world.set_timeout(0.2);
    if (world.rank() == 1) fake::hide_next();
    try {
      static_cast<void>(open_nccl(world, world.rank()));
      ADD_FAILURE() << "opened";
    } catch (const CommError& e) {
      EXPECT_STREQ(e.what(),
                   "open_nccl: rank 0: ncclCommInitRankConfig: no answer in 0.2 s "
                   "(comm.timeout_s)");
      EXPECT_EQ(e.exit_code(), ExitCode::deadline);
    }
    EXPECT_EQ(world.options().timeout_s, 0.2);
  });
}

TEST_F(Nccl, ADeadlineAbortsTheCommunicator) {
  const int aborted = fake::aborted();
  std::latch over{1};
  run_thread_ranks(2, [&](Communicator& world) {
    OnDevice<double> data(50);  // outlives what may use it
    Communicator c = open_nccl(world, world.rank());
    c.barrier();
    if (c.rank() == 1) {
      over.wait();
      // Rank 0 is gone: its peer's calls have no answer either.
      c.set_timeout(0.05);
      EXPECT_THROW(c.barrier(), CommError);
      return;
    }
    c.set_timeout(0.1);
    std::vector<Request> requests;
    for (int k = 0; k < 3; ++k) requests.push_back(c.start_all_reduce(data, ReduceOp::sum));
    try {
      requests[1].wait();
      ADD_FAILURE() << "no deadline";
    } catch (const CommError& e) {
      EXPECT_STREQ(e.what(),
                   "[rank 0/2] all_reduce of 400 bytes on world: no answer in 0.1 s "
                   "(comm.timeout_s)");
      EXPECT_EQ(e.exit_code(), ExitCode::deadline);
    }
    EXPECT_EQ(fake::aborted(), aborted + 1);
    EXPECT_EQ(thrown<CommError>([&] { c.barrier(); }),
              "[rank 0/2] barrier on world: a call had no answer in time; the communicator was "
              "aborted");
    over.count_down();
  });
  EXPECT_EQ(fake::aborted(), aborted + 2);
}

// One kernel waits for a rank that will not come, and something else fails: a deadline of another
// communicator, or the caller, who gives up. Nothing may be left running when memory is freed.
TEST_F(Nccl, WhereOneCommunicatorFailsNoneHoldsTheDevice) {
  for (const bool given_up : {false, true}) {
    const int waiting = fake::waiting_frees();
    const int aborted = fake::aborted();
    std::latch over{1};
    run_thread_ranks(2, [&](Communicator& world) {
      Communicator c = open_nccl(world, world.rank());
      Communicator other = c.duplicate("other");
      for (int k = 0; k < 2; ++k) {
        c.barrier();
        other.barrier();
      }
      if (c.rank() == 1) {
        over.wait();
        return;
      }
      auto data = std::make_unique<OnDevice<float>>(4);
      Request lost = other.start_all_reduce(*data, ReduceOp::sum);
      while (fake::kernels() == 0) EXPECT_FALSE(lost.test());
      if (given_up) {
        lost.give_up();
        EXPECT_FALSE(lost.active());
        EXPECT_THAT(thrown<CommError>([&] { c.barrier(); }),
                    HasSubstr("another communicator of the device failed: a call was given up"));
      } else {
        c.set_timeout(0.1);
        EXPECT_THROW(c.barrier(), CommError);
        EXPECT_THAT(thrown<CommError>([&] { lost.wait(); }),
                    HasSubstr("another communicator of the device failed: a call had no answer"));
      }
      EXPECT_EQ(fake::aborted(), aborted + 2);
      EXPECT_EQ(fake::kernels(), 0);
      data.reset();
      over.count_down();
    });
    EXPECT_EQ(fake::waiting_frees(), waiting);
  }
}

TEST_F(Nccl, AnErrorOfNcclAbortsTheCommunicatorAndNamesTheCall) {
  run_thread_ranks(2, [](Communicator& world) {
    OnDevice<float> data(4);
    Communicator c = open_nccl(world, world.rank());
    Communicator part = c.duplicate("shard");
    c.barrier();
    world.barrier();
    const int aborted = fake::aborted();
    world.barrier();
    Request request = part.start_all_reduce(data, ReduceOp::sum);
    fake::lose_peer();
    EXPECT_EQ(thrown<CommError>([&] { request.wait(); }),
              "[rank " + std::to_string(c.rank()) +
                  "/2] all_reduce of 16 bytes on world.shard: NCCL: remote process exited; the "
                  "communicator was aborted");
    EXPECT_GT(fake::aborted(), aborted);
  });
}

TEST_F(Nccl, ARankThatThrowsAbortsWhatItStarted) {
  EXPECT_EQ(thrown<std::runtime_error>([] {
              run_thread_ranks(2, [](Communicator& world) {
                OnDevice<float> data(4);
                Communicator c = open_nccl(world, world.rank());
                c.set_timeout(0.2);
                if (c.rank() == 0) {
                  Request request = c.start_all_reduce(data, ReduceOp::sum);
                  throw std::runtime_error("rank 0 is out of luck");
                }
                EXPECT_THROW(world.barrier(), CommError);
              });
            }),
            "rank 0 is out of luck");
}

}  // namespace
