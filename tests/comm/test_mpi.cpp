// What every communicator does, on MPI, judged by the arguments MPI was called with.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <orthrus/error.hpp>
#include <orthrus/mpi.hpp>
#include <string>
#include <thread>
#include <vector>

#include "comm/mesh.hpp"
#include "conformance.hpp"
#include "steady_state.hpp"
#include "support/plain_copies.hpp"
#include "support/pmpi_counter.hpp"

namespace {

using namespace conformance;
using orthrus::borrow;
using orthrus::CommError;

Traffic through_mpi() {
  const pmpi::Sent sent = pmpi::read();
  return {sent.bytes, sent.messages};
}

TEST(Mpi, DoesWhatEveryCommunicatorDoes) {
  Communicator c = borrow(MPI_COMM_WORLD);
  EXPECT_STREQ(c.kind(), "mpi");
  everything(c, through_mpi);
  EXPECT_EQ(pmpi::aliased(), 0);
}

TEST(Mpi, DoesItWithADeadlineToo) {
  Communicator c = borrow(MPI_COMM_WORLD, {.timeout_s = 50});
  for (const bool blocking : {false, true}) {  // blocking with a deadline is not MPI's blocking
    c.set_blocking(blocking);
    collectives<float>(c, through_mpi);
    requests(c);
    splitting(c);
  }
}

TEST(Mpi, DoesItForBuffersItCannotRead) {
  Communicator world = borrow(MPI_COMM_WORLD);
  Communicator c = orthrus::comm::staged(world, std::make_shared<PlainCopies>());
  EXPECT_STREQ(c.kind(), "mpi+staging");
  everything(c, through_mpi);
  EXPECT_EQ(pmpi::aliased(), 0);
  EXPECT_EQ(steady_state::allocations(c), 0);
}

TEST(Mpi, PredictedBytesAreCountedBytesAndThoseInTheArguments) {
  Communicator world = borrow(MPI_COMM_WORLD);
  pmpi::reset();
  orthrus::Mesh mesh = orthrus::make_mesh(std::move(world), 0, 1);
  std::vector<float> data(1000);
  mesh.shard.all_reduce(span(data), ReduceOp::sum);
  mesh.world.broadcast(span(data), 0);
  Traffic all;
  for (const Communicator* c : {&mesh.world, &mesh.shard, &mesh.replicate}) {
    all += c->traffic() + c->traffic(TrafficClass::setup);
  }
  EXPECT_EQ(through_mpi(), all);
}

// Open MPI reads equal addresses as MPI_IN_PLACE: an empty buffer may share one with its neighbour.
TEST(Mpi, EmptyBuffersMayLieWhereOthersBegin) {
  Communicator c = borrow(MPI_COMM_WORLD, {.timeout_s = 20});
  const int last = c.size() - 1;
  const bool empty = c.rank() == last;
  // The last rank sends nothing and gets 2 numbers from each other rank.
  std::vector<float> data(static_cast<std::size_t>(2 * c.size() + 2), static_cast<float>(c.rank()));
  std::vector<float> got = data;
  std::vector<Index> send(static_cast<std::size_t>(c.size()), 0);
  std::vector<Index> receive(send);
  if (!empty) send[static_cast<std::size_t>(last)] = 2;
  if (empty) std::fill(receive.begin(), receive.end() - 1, 2);
  const Index n = empty ? 2 * last : 0;
  c.all_to_all({got.data(), empty ? 0 : 2, orthrus::DType::f32}, send,
               {got.data(), n, orthrus::DType::f32}, receive);
  for (Index i = 0; i < n; ++i) {
    EXPECT_EQ(got[static_cast<std::size_t>(i)], static_cast<float>(i / 2));
  }
  // Everything is summed into rank 0; the others receive nothing, where they send from.
  std::vector<Index> counts(static_cast<std::size_t>(c.size()), 0);
  counts[0] = 2;
  std::vector<float> sum(2);
  float* to = c.rank() == 0 ? sum.data() : data.data();
  c.reduce_scatter({data.data(), 2, orthrus::DType::f32}, counts,
                   {to, c.rank() == 0 ? 2 : 0, orthrus::DType::f32});
  if (c.rank() == 0) {
    EXPECT_EQ(sum[0], static_cast<float>(last * (last + 1) / 2));
  }
}

TEST(Mpi, TheCallersMessagesAndOrthrussNeverMeet) {
  Communicator c = borrow(MPI_COMM_WORLD);
  if (c.size() < 2) GTEST_SKIP() << "one rank";
  if (c.rank() > 1) return;
  // The same ranks and tags, sent in one order and received in the other.
  const int other = 1 - c.rank();
  int theirs = 10 + c.rank();
  int got = -1;
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Irecv(&got, 1, MPI_INT, other, 5, MPI_COMM_WORLD, &request);
  MPI_Request sent = MPI_REQUEST_NULL;
  MPI_Isend(&theirs, 1, MPI_INT, other, 5, MPI_COMM_WORLD, &sent);
  std::vector<std::int64_t> ours{100 + c.rank()};
  if (c.rank() == 0) {
    c.send(span(ours), 1, 5);
  } else {
    c.receive(span(ours), 0, 5);
    EXPECT_EQ(ours[0], 100);
  }
  MPI_Wait(&request, MPI_STATUS_IGNORE);
  MPI_Wait(&sent, MPI_STATUS_IGNORE);
  EXPECT_EQ(got, 10 + other);
}

TEST(Mpi, DeadlineNamesTheCallAndTheRank) {
  Communicator c = borrow(MPI_COMM_WORLD, {.name = "world", .timeout_s = 0.2});
  if (c.size() < 2) GTEST_SKIP() << "one rank answers itself";
  // Static: MPI may write to them after they were given up.
  static std::vector<double> data(50, 1.0);
  MPI_Barrier(MPI_COMM_WORLD);
  if (c.rank() == c.size() - 1) {
    MPI_Barrier(MPI_COMM_WORLD);  // the others have given up
    c.set_timeout(0);
    c.all_reduce(span(data), ReduceOp::sum);  // lets MPI finish what they started
  } else {
    try {
      c.all_reduce(span(data), ReduceOp::sum);
      ADD_FAILURE() << "no deadline";
    } catch (const CommError& e) {
      EXPECT_EQ(e.what(), "[rank " + std::to_string(c.rank()) + "/" + std::to_string(c.size()) +
                              "] all_reduce of 400 bytes on world: no answer in 0.2 s "
                              "(comm.timeout_s)");
      EXPECT_EQ(e.exit_code(), orthrus::ExitCode::deadline);
    }
    MPI_Barrier(MPI_COMM_WORLD);
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

TEST(Mpi, AfterADeadlineNoRequestIsWaitedForAgain) {
  Communicator c = borrow(MPI_COMM_WORLD, {.name = "world", .timeout_s = 0.5});
  if (c.size() < 2) GTEST_SKIP() << "one rank answers itself";
  static std::vector<std::vector<double>> data(20, std::vector<double>(3));
  MPI_Barrier(MPI_COMM_WORLD);
  if (c.rank() == c.size() - 1) {
    MPI_Barrier(MPI_COMM_WORLD);
    c.set_timeout(0);
    for (auto& d : data) c.all_reduce(span(d), ReduceOp::sum);
  } else {
    const auto begin = std::chrono::steady_clock::now();
    {
      std::vector<Request> requests;
      for (auto& d : data) requests.push_back(c.start_all_reduce(span(d), ReduceOp::sum));
      EXPECT_THROW(requests[0].wait(), CommError);
    }
    const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - begin;
    EXPECT_LT(waited.count(), 5);  // one deadline of 0.5 s, not twenty
    MPI_Barrier(MPI_COMM_WORLD);
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

TEST(Mpi, ErrorsOfMpiAreThrownWithItsWords) {
  Communicator c = borrow(MPI_COMM_WORLD);
  if (c.size() < 2) GTEST_SKIP() << "nobody to send to";
  // Rank 1 receives less than rank 0 sends.
  std::vector<float> data(100);
  if (c.rank() == 0) c.send(span(data), 1);
  if (c.rank() == 1) {
    try {
      c.receive(Span{data.data(), 10, orthrus::DType::f32}, 0);
      ADD_FAILURE() << "truncated in silence";
    } catch (const CommError& e) {
      EXPECT_THAT(e.what(), testing::StartsWith("[rank 1/"));
      EXPECT_THAT(e.what(), testing::HasSubstr("receive of 40 bytes on world: MPI_Test: "));
      EXPECT_THAT(e.what(), testing::HasSubstr("MPI_ERR_TRUNCATE"));
    }
  }
  // Rank 0 sends less than rank 1 receives: MPI finds that fine.
  Communicator d = borrow(MPI_COMM_WORLD);
  if (d.rank() == 0) d.send(Span{data.data(), 10, orthrus::DType::f32}, 1);
  if (d.rank() == 1) {
    try {
      d.receive(span(data), 0);
      ADD_FAILURE() << "short in silence";
    } catch (const CommError& e) {
      EXPECT_THAT(e.what(), testing::HasSubstr("received 10 elements instead of 100"));
    }
  }
}

TEST(Mpi, AllocatesNothingInSteadyState) {
  Communicator c = borrow(MPI_COMM_WORLD);
  EXPECT_EQ(steady_state::allocations(c), 0);
}

TEST(Mpi, AddsBfloat16WithinOneRoundingPerRank) {
  // Every partial sum is rounded to 8 bits: at most 2^-9 of it each time, and partial sums only
  // grow.
  Communicator c = borrow(MPI_COMM_WORLD);
  const int p = c.size();
  std::vector<BFloat16> data(257);
  for (std::size_t i = 0; i < data.size(); ++i) {
    data[i] = orthrus::kernels::to_bf16(1.0F + static_cast<float>(i) / 100.0F +
                                        static_cast<float>(c.rank()));
  }
  std::vector<double> exact;
  for (const BFloat16 x : data) exact.push_back(orthrus::kernels::to_float(x));
  c.all_reduce(span(data), ReduceOp::sum);
  c.all_reduce(span(exact), ReduceOp::sum);
  for (std::size_t i = 0; i < data.size(); ++i) {
    EXPECT_NEAR(orthrus::kernels::to_float(data[i]), exact[i], p * exact[i] / 512.0);
  }
}

}  // namespace
