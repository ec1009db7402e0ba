#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <orthrus/error.hpp>
#include <orthrus/mpi.hpp>
#include <string>
#include <utility>
#include <vector>

#include "comm/core.hpp"
#include "comm/mpi_handle.hpp"
#include "comm/pool.hpp"
#include "kernels/bf16.hpp"
#include "kernels/handle.hpp"

namespace orthrus {
namespace {

void mpi_check(int rc, const char* call) {
  if (rc == MPI_SUCCESS) return;
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  if (MPI_Error_string(rc, text.data(), &length) != MPI_SUCCESS) length = 0;
  throw CommError(std::string(call) + ": " +
                  (length > 0 ? std::string(text.data(), static_cast<std::size_t>(length))
                              : "error " + std::to_string(rc)));
}

/// MPI can be called: initialized, and not finalized.
bool mpi_lives() noexcept {
  int initialized = 0;
  int finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized != 0 && finalized == 0;
}

// What lives longer than MPI is not released.
struct CommTraits {
  using Handle = MPI_Comm;
  static Handle null() noexcept { return MPI_COMM_NULL; }
  static void release(Handle h) noexcept {
    if (mpi_lives()) MPI_Comm_free(&h);
  }
};
struct OpTraits {
  using Handle = MPI_Op;
  static Handle null() noexcept { return MPI_OP_NULL; }
  static void release(Handle h) noexcept {
    if (mpi_lives()) MPI_Op_free(&h);
  }
};

// ---- bfloat16, which MPI does not know: two bytes each, folded here

template <class Fold>
void fold_bfloat16(void* in, void* inout, const int* length, Fold&& fold) {
  const auto* const a = static_cast<const BFloat16*>(in);
  auto* const b = static_cast<BFloat16*>(inout);
  for (int i = 0; i < *length; ++i) {
    b[i] = kernels::to_bf16(fold(kernels::to_float(a[i]), kernels::to_float(b[i])));
  }
}

extern "C" {
static void orthrus_bfloat16_sum(void* in, void* inout, int* length, MPI_Datatype*) {
  fold_bfloat16(in, inout, length, [](float a, float b) { return a + b; });
}
static void orthrus_bfloat16_max(void* in, void* inout, int* length, MPI_Datatype*) {
  fold_bfloat16(in, inout, length, [](float a, float b) { return a > b ? a : b; });
}
static void orthrus_bfloat16_min(void* in, void* inout, int* length, MPI_Datatype*) {
  fold_bfloat16(in, inout, length, [](float a, float b) { return a < b ? a : b; });
}
}

UniqueHandle<OpTraits> make_op(MPI_User_function* function) {
  MPI_Op op = MPI_OP_NULL;
  mpi_check(MPI_Op_create(function, /*commute=*/1, &op), "MPI_Op_create");
  return UniqueHandle<OpTraits>{op};
}

/// Shared by all communicators split from one.
struct BFloat16Ops {
  UniqueHandle<OpTraits> sum = make_op(orthrus_bfloat16_sum);
  UniqueHandle<OpTraits> max = make_op(orthrus_bfloat16_max);
  UniqueHandle<OpTraits> min = make_op(orthrus_bfloat16_min);
};

MPI_Datatype type_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return MPI_FLOAT;
    case DType::bf16:
      return MPI_UINT16_T;
    case DType::f64:
      return MPI_DOUBLE;
    case DType::i64:
      return MPI_INT64_T;
    case DType::u8:
      return MPI_UINT8_T;
  }
  return MPI_DATATYPE_NULL;
}

// A count of 0 may come with a null pointer, which MPI need not accept, or with that of a
// neighbour: Open MPI takes equal addresses of what is sent and what is received for MPI_IN_PLACE,
// also where one is empty.
const void* address(ConstSpan span) {
  static const std::max_align_t nothing{};
  return span.count > 0 ? span.data : &nothing;
}
void* address(Span span) {
  static std::max_align_t nothing{};
  return span.count > 0 ? span.data : &nothing;
}

// ---- the body

class MpiBody final : public CommunicatorBackend {
 public:
  MpiBody(MPI_Comm comm, std::shared_ptr<const BFloat16Ops> ops)
      : comm_(comm), ops_(std::move(ops)) {
    mpi_check(MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    mpi_check(MPI_Comm_rank(comm, &rank_), "MPI_Comm_rank");
    mpi_check(MPI_Comm_size(comm, &size_), "MPI_Comm_size");
    pending_.stock(comm::calls_in_flight, *this);
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  const char* kind() const override { return "mpi"; }
  MPI_Comm handle() const { return comm_.get(); }
  void set_blocking(bool blocking) override { blocking_ = blocking; }

  Done all_reduce(Span data, ReduceOp op) override {
    const int n = to_int(data.count);
    if (blocking_) {
      mpi_check(MPI_Allreduce(MPI_IN_PLACE, address(data), n, type_of(data.dtype),
                              op_of(op, data.dtype), comm_.get()),
                "MPI_Allreduce");
      return nullptr;
    }
    Flight flight{*this};
    mpi_check(MPI_Iallreduce(MPI_IN_PLACE, address(data), n, type_of(data.dtype),
                             op_of(op, data.dtype), comm_.get(), &flight->request),
              "MPI_Iallreduce");
    return flight.leave();
  }

  Done reduce_scatter(ConstSpan send, std::span<const Index> counts, Span recv) override {
    Flight flight{*this};
    set_counts(counts, counts_limit, flight->counts, flight->displacements);
    const MPI_Datatype type = type_of(send.dtype);
    const MPI_Op op = op_of(ReduceOp::sum, send.dtype);
    if (blocking_) {
      mpi_check(MPI_Reduce_scatter(address(send), address(recv), flight->counts.data(), type, op,
                                   comm_.get()),
                "MPI_Reduce_scatter");
      return nullptr;
    }
    mpi_check(MPI_Ireduce_scatter(address(send), address(recv), flight->counts.data(), type, op,
                                  comm_.get(), &flight->request),
              "MPI_Ireduce_scatter");
    return flight.leave();
  }

  Done all_gather(ConstSpan send, std::span<const Index> counts, Span recv) override {
    Flight flight{*this};
    set_counts(counts, counts_limit, flight->counts, flight->displacements);
    const MPI_Datatype type = type_of(send.dtype);
    const auto own_begin =
        static_cast<std::size_t>(flight->displacements[static_cast<std::size_t>(rank_)]);
    const void* own = static_cast<const char*>(recv.data) + own_begin * bytes_of(recv.dtype);
    const void* from = send.data == own ? MPI_IN_PLACE : address(send);
    if (blocking_) {
      mpi_check(MPI_Allgatherv(from, to_int(send.count), type, address(recv), flight->counts.data(),
                               flight->displacements.data(), type, comm_.get()),
                "MPI_Allgatherv");
      return nullptr;
    }
    mpi_check(MPI_Iallgatherv(from, to_int(send.count), type, address(recv), flight->counts.data(),
                              flight->displacements.data(), type, comm_.get(), &flight->request),
              "MPI_Iallgatherv");
    return flight.leave();
  }

  Done broadcast(Span data, int root) override {
    const int n = to_int(data.count);
    if (blocking_) {
      mpi_check(MPI_Bcast(address(data), n, type_of(data.dtype), root, comm_.get()), "MPI_Bcast");
      return nullptr;
    }
    Flight flight{*this};
    mpi_check(
        MPI_Ibcast(address(data), n, type_of(data.dtype), root, comm_.get(), &flight->request),
        "MPI_Ibcast");
    return flight.leave();
  }

  Done reduce(ConstSpan send, Span recv, ReduceOp op, int root) override {
    const int n = to_int(send.count);
    const MPI_Datatype type = type_of(send.dtype);
    if (blocking_) {
      mpi_check(MPI_Reduce(address(send), address(recv), n, type, op_of(op, send.dtype), root,
                           comm_.get()),
                "MPI_Reduce");
      return nullptr;
    }
    Flight flight{*this};
    mpi_check(MPI_Ireduce(address(send), address(recv), n, type, op_of(op, send.dtype), root,
                          comm_.get(), &flight->request),
              "MPI_Ireduce");
    return flight.leave();
  }

  Done all_to_all(ConstSpan send, std::span<const Index> send_counts, Span recv,
                  std::span<const Index> recv_counts, Index limit) override {
    Flight flight{*this};
    set_counts(send_counts, limit, flight->counts, flight->displacements);
    set_counts(recv_counts, limit, flight->recv_counts, flight->recv_displacements);
    const MPI_Datatype type = type_of(send.dtype);
    if (blocking_) {
      mpi_check(MPI_Alltoallv(address(send), flight->counts.data(), flight->displacements.data(),
                              type, address(recv), flight->recv_counts.data(),
                              flight->recv_displacements.data(), type, comm_.get()),
                "MPI_Alltoallv");
      return nullptr;
    }
    mpi_check(
        MPI_Ialltoallv(address(send), flight->counts.data(), flight->displacements.data(), type,
                       address(recv), flight->recv_counts.data(), flight->recv_displacements.data(),
                       type, comm_.get(), &flight->request),
        "MPI_Ialltoallv");
    return flight.leave();
  }

  // Never the blocking calls: an all_to_all sends and receives at once.
  Done send(ConstSpan data, int to, int tag) override {
    Flight flight{*this};
    mpi_check(MPI_Isend(address(data), to_int(data.count), type_of(data.dtype), to, tag,
                        comm_.get(), &flight->request),
              "MPI_Isend");
    return flight.leave();
  }

  Done receive(Span data, int from, int tag) override {
    Flight flight{*this};
    flight->receives = data.count;
    flight->type = type_of(data.dtype);
    mpi_check(MPI_Irecv(address(data), to_int(data.count), flight->type, from, tag, comm_.get(),
                        &flight->request),
              "MPI_Irecv");
    return flight.leave();
  }

  Done barrier() override {
    if (blocking_) {
      mpi_check(MPI_Barrier(comm_.get()), "MPI_Barrier");
      return nullptr;
    }
    Flight flight{*this};
    mpi_check(MPI_Ibarrier(comm_.get(), &flight->request), "MPI_Ibarrier");
    return flight.leave();
  }

  std::unique_ptr<CommunicatorBackend> split(int color, int key) override {
    MPI_Comm part = MPI_COMM_NULL;
    mpi_check(MPI_Comm_split(comm_.get(), color, key, &part), "MPI_Comm_split");
    return std::make_unique<MpiBody>(part, ops_);
  }

  std::unique_ptr<CommunicatorBackend> duplicate() override {
    MPI_Comm copy = MPI_COMM_NULL;
    mpi_check(MPI_Comm_dup(comm_.get(), &copy), "MPI_Comm_dup");
    return std::make_unique<MpiBody>(copy, ops_);
  }

 private:
  static constexpr Index counts_limit = std::numeric_limits<int>::max();

  struct Pending final : Request::State {
    explicit Pending(MpiBody& b) : body(b) {
      const auto ranks = static_cast<std::size_t>(b.size_);
      for (auto* v : {&counts, &displacements, &recv_counts, &recv_displacements})
        v->reserve(ranks);
    }
    bool test() override {
      if (request == MPI_REQUEST_NULL) return true;
      int done = 0;
      MPI_Status status{};
      mpi_check(MPI_Test(&request, &done, &status), "MPI_Test");
      if (done == 0) return false;
      if (receives >= 0) {
        int got = 0;
        mpi_check(MPI_Get_count(&status, type, &got), "MPI_Get_count");
        if (got != receives) {
          throw CommError("received " + std::to_string(got) + " elements instead of " +
                          std::to_string(receives));
        }
      }
      return true;
    }
    void release() noexcept override {
      // Given up while MPI still reads the counts: they stay where they are, for ever.
      if (request == MPI_REQUEST_NULL) body.pending_.give(this);
    }

    MpiBody& body;
    MPI_Request request = MPI_REQUEST_NULL;
    MPI_Datatype type = MPI_DATATYPE_NULL;
    Index receives = -1;  // elements a receive waits for
    std::vector<int> counts, displacements, recv_counts, recv_displacements;
  };

  /// A `Pending` that goes back to the pool unless its call was made.
  class Flight {
   public:
    explicit Flight(MpiBody& body) : pending_(body.pending_.take(body)) { pending_->receives = -1; }
    Flight(const Flight&) = delete;
    Flight& operator=(const Flight&) = delete;
    ~Flight() {
      if (pending_ != nullptr) pending_->release();
    }
    Pending* operator->() const { return pending_; }
    Done leave() { return Done(std::exchange(pending_, nullptr)); }

   private:
    Pending* pending_;
  };

  static int to_int(Index n) {
    if (n > counts_limit) {
      throw CommError(std::to_string(n) +
                      " elements in one message; MPI counts and displacements end at 2147483647");
    }
    return static_cast<int>(n);
  }

  /// Parts of at most `limit` elements, at the places of the whole parts.
  static void set_counts(std::span<const Index> parts, Index limit, std::vector<int>& counts,
                         std::vector<int>& displacements) {
    counts.resize(parts.size());
    displacements.resize(parts.size());
    Index begin = 0;
    for (std::size_t r = 0; r < parts.size(); ++r) {
      counts[r] = to_int(std::min(parts[r], limit));
      displacements[r] = counts[r] > 0 ? to_int(begin) : 0;
      begin += parts[r];
    }
  }

  MPI_Op op_of(ReduceOp op, DType dtype) const {
    const bool bf16 = dtype == DType::bf16;
    switch (op) {
      case ReduceOp::sum:
        return bf16 ? ops_->sum.get() : MPI_SUM;
      case ReduceOp::max:
        return bf16 ? ops_->max.get() : MPI_MAX;
      case ReduceOp::min:
        return bf16 ? ops_->min.get() : MPI_MIN;
    }
    return MPI_OP_NULL;
  }

  UniqueHandle<CommTraits> comm_;
  std::shared_ptr<const BFloat16Ops> ops_;
  int rank_ = 0;
  int size_ = 1;
  bool blocking_ = false;
  comm::Pool<Pending> pending_;
};

}  // namespace

int comm::fortran_handle(const Communicator& c) {
  const auto* const body = dynamic_cast<const MpiBody*>(&Core::body_of(c));
  if (body == nullptr) {
    throw CommError(std::string("ranks of kind ") + c.kind() + " have no MPI_Comm");
  }
  return MPI_Comm_c2f(body->handle());
}

Communicator borrow(MPI_Comm comm, Communicator::Options options) {
  int initialized = 0;
  int finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  if (initialized == 0) {
    throw CommError("borrow: MPI is not initialized; call MPI_Init first");
  }
  if (finalized != 0) throw CommError("borrow: MPI is finalized already");
  if (comm == MPI_COMM_NULL) throw CommError("borrow: the communicator is MPI_COMM_NULL");
  int inter = 0;
  mpi_check(MPI_Comm_test_inter(comm, &inter), "MPI_Comm_test_inter");
  if (inter != 0) throw CommError("borrow: the communicator is an inter-communicator");
  MPI_Comm copy = MPI_COMM_NULL;
  mpi_check(MPI_Comm_dup(comm, &copy), "MPI_Comm_dup");
  return Communicator{std::make_unique<MpiBody>(copy, std::make_shared<const BFloat16Ops>()),
                      std::move(options)};
}

}  // namespace orthrus
