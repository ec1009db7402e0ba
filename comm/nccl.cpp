#include <cuda_runtime.h>
#include <nccl.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <orthrus/error.hpp>
#include <orthrus/nccl.hpp>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "comm/cuda_handle.hpp"
#include "comm/device_check.hpp"
#include "comm/line.hpp"
#include "comm/pool.hpp"
#include "comm/wait.hpp"
#include "kernels/handle.hpp"

// A communicator that does not block hands every call to a thread of NCCL's own, which puts it into
// the stream, at once or after other ranks have connected; until then the communicator takes no
// other call. So calls stand in line, and the front of the line moves whenever anybody asks: that
// is the only way in which a deadline holds for the first call too.
namespace orthrus {
namespace {

static_assert(NCCL_VERSION_CODE >= NCCL_VERSION(2, 18, 0),
              "NCCL 2.18 or later: communicators are split by ncclCommSplit");
constexpr int oldest_version = NCCL_VERSION(2, 18, 0);

void nccl_check(ncclResult_t result, const char* call) {
  if (result == ncclSuccess || result == ncclInProgress) return;
  std::string text = std::string(call) + ": " + ncclGetErrorString(result);
  const char* const last = ncclGetLastError(nullptr);
  if (last != nullptr && *last != '\0') text += std::string(" (") + last + ")";
  throw CommError(text);
}

/// @return NCCL has done with what it was given last. @throws CommError  it has failed.
bool settled(ncclComm_t comm) {
  ncclResult_t state = ncclSuccess;
  nccl_check(ncclCommGetAsyncError(comm, &state), "ncclCommGetAsyncError");
  nccl_check(state, "NCCL");
  return state != ncclInProgress;
}

void wait_settled(ncclComm_t comm, const char* call, double timeout_s) {
  if (comm::wait_until([&] { return settled(comm); }, timeout_s)) return;
  std::ostringstream problem;
  problem << call << ": no answer in " << timeout_s << " s (comm.timeout_s)";
  throw CommError(problem.str(), ExitCode::deadline);
}

// What is not given up in good order is given up at once.
struct CommTraits {
  using Handle = ncclComm_t;
  static Handle null() noexcept { return nullptr; }
  static void release(Handle h) noexcept { static_cast<void>(ncclCommAbort(h)); }
};
using CommHandle = UniqueHandle<CommTraits>;

struct DeviceMemoryTraits {
  using Handle = void*;
  static Handle null() noexcept { return nullptr; }
  static void release(Handle h) noexcept { static_cast<void>(cudaFree(h)); }
};

ncclConfig_t config() {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  return config;
}

ncclDataType_t type_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return ncclFloat32;
    case DType::bf16:
      return ncclBfloat16;
    case DType::f64:
      return ncclFloat64;
    case DType::i64:
      return ncclInt64;
    case DType::u8:
      return ncclUint8;
  }
  return ncclNumTypes;
}

ncclRedOp_t op_of(ReduceOp op) {
  switch (op) {
    case ReduceOp::sum:
      return ncclSum;
    case ReduceOp::max:
      return ncclMax;
    case ReduceOp::min:
      return ncclMin;
  }
  return ncclNumOps;
}

std::size_t size_of(Index count) { return static_cast<std::size_t>(count); }
const void* at(const void* data, Index begin, DType dtype) {
  return static_cast<const std::byte*>(data) + size_of(begin) * bytes_of(dtype);
}
void* at(void* data, Index begin, DType dtype) {
  return static_cast<std::byte*>(data) + size_of(begin) * bytes_of(dtype);
}

/// Calls NCCL is to carry out together.
class Group {
 public:
  Group() { nccl_check(ncclGroupStart(), "ncclGroupStart"); }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;
  ~Group() {
    if (open_) static_cast<void>(ncclGroupEnd());
  }
  void end() {
    open_ = false;
    nccl_check(ncclGroupEnd(), "ncclGroupEnd");
  }

 private:
  bool open_ = true;
};

enum class Kind : std::uint8_t {
  all_reduce,
  reduce_scatter,
  all_gather,
  broadcast,
  reduce,
  all_to_all,
  barrier,
  send,
  receive,
  copy
};

/// Those wait in line until somebody asks: only together do messages in both directions pass, and
/// what is left of an all_to_all comes one by one.
bool joins_others(Kind kind) {
  return kind == Kind::send || kind == Kind::receive || kind == Kind::copy;
}

class NcclBody;

/// One call: in line → in the stream → done.
struct Flight final : Request::State {
  enum class Phase : std::uint8_t { in_line, in_stream, done };

  explicit Flight(NcclBody& b);
  bool test() override;
  bool wait(double timeout_s) override;
  void release() noexcept override;

  NcclBody& body;
  Flight* next = nullptr;
  comm::CudaEvent ready, complete;
  Phase phase = Phase::done;
  Kind kind = Kind::barrier;
  ReduceOp op = ReduceOp::sum;
  int peer = 0;
  Index limit = 0;
  ConstSpan send;
  Span recv;
  std::vector<Index> counts, recv_counts;
};

/// What a communicator shares with those split from it.
struct Family {
  /// Moves the line on. A call that fails fails where it is asked for.
  void advance() noexcept;
  /// Ends all communicators, of which `first` has failed.
  void fail(const NcclBody& first, const std::string& why) noexcept;

  int device = 0;
  void* compute_stream = nullptr;
  double setup_timeout_s = 0;
  // NCCL wants the calls of all communicators of a device in one order on all ranks: one line.
  comm::Line<Flight> line;
  int handed_over = 0;  // of the line's first; NCCL has not yet put them into the stream
  std::vector<NcclBody*> bodies;
  bool broken = false;
};

class NcclBody final : public CommunicatorBackend {
 public:
  /// `comm` is ready for calls.
  NcclBody(CommHandle comm, std::shared_ptr<Family> family)
      : family_(std::move(family)), comm_(std::move(comm)) {
    const comm::OnDevice on{family_->device};
    nccl_check(ncclCommUserRank(comm_.get(), &rank_), "ncclCommUserRank");
    nccl_check(ncclCommCount(comm_.get(), &size_), "ncclCommCount");
    stream_ = comm::make_stream();
    comm::cuda_check(cudaMalloc(barrier_.out(), sizeof(std::int64_t)), "cudaMalloc");
    comm::cuda_check(cudaMemsetAsync(barrier_.get(), 0, sizeof(std::int64_t), stream()),
                     "cudaMemsetAsync");
    flights_.stock(comm::calls_in_flight, *this);
    family_->bodies.push_back(this);
  }
  NcclBody(const NcclBody&) = delete;
  NcclBody& operator=(const NcclBody&) = delete;
  ~NcclBody() override {
    // Where something went wrong others may never end this communicator.
    std::erase(family_->bodies, this);
    if (family_->broken || std::uncaught_exceptions() > 0) return;  // aborted with its handle
    static_cast<void>(ncclCommDestroy(comm_.release()));
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  const char* kind() const override { return "nccl"; }
  bool on_device() const override { return true; }

  Done all_reduce(Span data, ReduceOp op) override {
    return start(Kind::all_reduce, data, data, [&](Flight& f) { f.op = op; });
  }
  Done reduce_scatter(ConstSpan send, std::span<const Index> counts, Span recv) override {
    return start(Kind::reduce_scatter, send, recv,
                 [&](Flight& f) { f.counts.assign(counts.begin(), counts.end()); });
  }
  Done all_gather(ConstSpan send, std::span<const Index> counts, Span recv) override {
    return start(Kind::all_gather, send, recv,
                 [&](Flight& f) { f.counts.assign(counts.begin(), counts.end()); });
  }
  Done broadcast(Span data, int root) override {
    return start(Kind::broadcast, data, data, [&](Flight& f) { f.peer = root; });
  }
  Done reduce(ConstSpan send, Span recv, ReduceOp op, int root) override {
    if (root != rank_) recv = Span{nullptr, 0, send.dtype};
    return start(Kind::reduce, send, recv, [&](Flight& f) {
      f.op = op;
      f.peer = root;
    });
  }
  Done all_to_all(ConstSpan send, std::span<const Index> send_counts, Span recv,
                  std::span<const Index> recv_counts, Index limit) override {
    return start(Kind::all_to_all, send, recv, [&](Flight& f) {
      f.limit = limit;
      f.counts.assign(send_counts.begin(), send_counts.end());
      f.recv_counts.assign(recv_counts.begin(), recv_counts.end());
    });
  }
  Done send(ConstSpan data, int to, int) override {
    return start(Kind::send, data, Span{}, [&](Flight& f) { f.peer = to; });
  }
  Done receive(Span data, int from, int) override {
    return start(Kind::receive, ConstSpan{}, data, [&](Flight& f) { f.peer = from; });
  }
  Done barrier() override {
    const Span one{barrier_.get(), 1, DType::i64};
    return start(Kind::barrier, one, one, [](Flight&) {});
  }
  Done copy(ConstSpan from, Span to) override {
    return start(Kind::copy, from, to, [](Flight&) {});
  }

  std::unique_ptr<CommunicatorBackend> split(int color, int key) override {
    // Nothing may be on its way: what is asked to be complete is the end of the stream.
    const Done last = join(Kind::copy, ConstSpan{}, Span{}, [](Flight&) {});
    if (!last->wait(family_->setup_timeout_s)) {
      throw CommError("split: earlier calls did not complete in time", ExitCode::deadline);
    }
    ncclComm_t part = nullptr;  // written by NCCL until this communicator is settled, or aborted
    try {
      const comm::OnDevice on{family_->device};
      ncclConfig_t as_here = config();
      nccl_check(ncclCommSplit(comm_.get(), color, key, &part, &as_here), "ncclCommSplit");
      wait_settled(comm_.get(), "ncclCommSplit", family_->setup_timeout_s);
      CommHandle owned{part};
      wait_settled(owned.get(), "ncclCommSplit", family_->setup_timeout_s);
      return std::make_unique<NcclBody>(std::move(owned), family_);
    } catch (const Error& e) {
      fail(e.what());
      throw;
    }
  }

  /// Puts the first of the line, all of this communicator, into NCCL's hands. @return how many.
  int hand_over(Flight& first) {
    if (!joins_others(first.kind)) {
      comm::wait_for(stream(), first.ready);
      hand_over_alone(first);
      return 1;
    }
    int n = 0;
    bool talks = false;
    const auto each = [&](auto&& f) {
      for (Flight* i = &first; i != nullptr && &i->body == this && joins_others(i->kind);
           i = i->next) {
        f(*i);
      }
    };
    each([&](Flight& f) {
      ++n;
      comm::wait_for(stream(), f.ready);
      if (f.kind != Kind::copy) {
        talks = true;
      } else if (f.recv.count > 0) {
        comm::copy_bytes(f.recv.data, f.send.data, f.recv.bytes(), stream());
      }
    });
    if (!talks) return n;
    Group group;
    each([&](Flight& f) {
      if (f.kind == Kind::send) send_to(f.peer, f.send);
      if (f.kind == Kind::receive) receive_from(f.peer, f.recv);
    });
    group.end();
    return n;
  }
  void in_stream(Flight& f) {
    comm::record(f.complete, stream());
    f.phase = Flight::Phase::in_stream;
  }
  bool is_settled() const { return settled(comm_.get()); }

  /// Asks for one call, and whether NCCL is well.
  bool test(Flight& f) {
    family_->advance();
    check_alive();
    if (f.phase == Flight::Phase::done) return true;
    if (f.phase == Flight::Phase::in_line) return false;
    try {
      if (comm::reached(f.complete)) {
        f.phase = Flight::Phase::done;
        return true;
      }
      static_cast<void>(is_settled());
      return false;
    } catch (const Error& e) {
      fail(e.what());
    }
    check_alive();
    return false;
  }

  /// Aborts the family's communicators: NCCL lets go of all buffers, memory of the device can be
  /// freed, and every call throws from here on.
  void fail(const std::string& why) noexcept {
    if (failure_.empty()) family_->fail(*this, why);
  }
  void abort(const std::string& why) noexcept {
    if (!failure_.empty()) return;
    failure_ = why + "; the communicator was aborted";
    comm_ = CommHandle{};
  }

  void give(Flight& f) noexcept { flights_.give(&f); }

 private:
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_.get()); }

  void check_alive() const {
    if (!failure_.empty()) throw CommError(failure_);
  }

  /// What a kernel would crash on, and the whole process with it.
  void check_place(ConstSpan s, const char* name) const {
    if (s.count == 0) return;
    cudaPointerAttributes place{};
    comm::cuda_check(cudaPointerGetAttributes(&place, s.data), "cudaPointerGetAttributes");
    if (place.devicePointer == nullptr) {
      throw CommError(std::string(name) + " is in the host's memory; NCCL takes the device's");
    }
    if (place.type == cudaMemoryTypeDevice && place.device != family_->device) {
      throw CommError(std::string(name) + " is on device " + std::to_string(place.device) +
                      ", the communicator on device " + std::to_string(family_->device));
    }
  }

  template <class Fill>
  Done start(Kind kind, ConstSpan send, Span recv, Fill&& fill) {
    // Where nothing is sent or received by anybody, nothing is said. In the calls of parts a rank
    // may have none and yet be needed.
    const bool of_parts =
        kind == Kind::reduce_scatter || kind == Kind::all_gather || kind == Kind::all_to_all;
    if (!of_parts && send.count == 0 && recv.count == 0) return nullptr;
    check_place(send, "what is sent");
    check_place(recv, "what is received");
    Done done = join(kind, send, recv, std::forward<Fill>(fill));
    if (!joins_others(kind)) {
      family_->advance();
      check_alive();
    }
    return done;
  }

  template <class Fill>
  Done join(Kind kind, ConstSpan send, Span recv, Fill&& fill) {
    check_alive();
    const comm::OnDevice on{family_->device};
    Flight* const f = flights_.take(*this);
    Done done{f};
    f->kind = kind;
    f->send = send;
    f->recv = recv;
    fill(*f);
    comm::record(f->ready, family_->compute_stream);
    f->phase = Flight::Phase::in_line;
    family_->line.push(f);
    return done;
  }

  void send_to(int peer, ConstSpan s) {
    if (s.count == 0) return;
    nccl_check(ncclSend(s.data, size_of(s.count), type_of(s.dtype), peer, comm_.get(), stream()),
               "ncclSend");
  }
  void receive_from(int peer, Span s) {
    if (s.count == 0) return;
    nccl_check(ncclRecv(s.data, size_of(s.count), type_of(s.dtype), peer, comm_.get(), stream()),
               "ncclRecv");
  }

  void hand_over_alone(Flight& f) {
    const ConstSpan& send = f.send;
    const Span& recv = f.recv;
    const ncclDataType_t type = type_of(send.dtype);
    const std::size_t n = size_of(send.count);
    switch (f.kind) {
      case Kind::all_reduce:
        nccl_check(ncclAllReduce(send.data, recv.data, n, type, op_of(f.op), comm_.get(), stream()),
                   "ncclAllReduce");
        break;
      case Kind::barrier:
        nccl_check(ncclAllReduce(send.data, recv.data, n, type, ncclMax, comm_.get(), stream()),
                   "ncclAllReduce");
        break;
      case Kind::broadcast:
        nccl_check(ncclBroadcast(send.data, recv.data, n, type, f.peer, comm_.get(), stream()),
                   "ncclBroadcast");
        break;
      case Kind::reduce:
        nccl_check(
            ncclReduce(send.data, recv.data, n, type, op_of(f.op), f.peer, comm_.get(), stream()),
            "ncclReduce");
        break;
      case Kind::reduce_scatter:
        reduce_scatter_now(f);
        break;
      case Kind::all_gather:
        all_gather_now(f);
        break;
      case Kind::all_to_all:
        all_to_all_now(f);
        break;
      case Kind::send:
      case Kind::receive:
      case Kind::copy:
        break;
    }
  }

  static bool even(const std::vector<Index>& counts) {
    return std::all_of(counts.begin(), counts.end(), [&](Index n) { return n == counts.front(); });
  }

  // Of ragged parts each is a call of its own, with its rank as the root; NCCL joins them.
  void reduce_scatter_now(const Flight& f) {
    const ncclDataType_t type = type_of(f.send.dtype);
    if (even(f.counts)) {
      if (f.recv.count == 0) return;
      nccl_check(ncclReduceScatter(f.send.data, f.recv.data, size_of(f.recv.count), type, ncclSum,
                                   comm_.get(), stream()),
                 "ncclReduceScatter");
      return;
    }
    Group group;
    Index begin = 0;
    for (int r = 0; r < size_; ++r) {
      const Index n = f.counts[static_cast<std::size_t>(r)];
      if (n > 0) {
        nccl_check(
            ncclReduce(at(f.send.data, begin, f.send.dtype), r == rank_ ? f.recv.data : nullptr,
                       size_of(n), type, ncclSum, r, comm_.get(), stream()),
            "ncclReduce");
      }
      begin += n;
    }
    group.end();
  }

  void all_gather_now(const Flight& f) {
    const ncclDataType_t type = type_of(f.send.dtype);
    if (even(f.counts)) {
      if (f.send.count == 0) return;
      nccl_check(ncclAllGather(f.send.data, f.recv.data, size_of(f.send.count), type, comm_.get(),
                               stream()),
                 "ncclAllGather");
      return;
    }
    Group group;
    Index begin = 0;
    for (int r = 0; r < size_; ++r) {
      const Index n = f.counts[static_cast<std::size_t>(r)];
      if (n > 0) {
        void* const place = at(f.recv.data, begin, f.recv.dtype);
        nccl_check(ncclBroadcast(r == rank_ ? f.send.data : place, place, size_of(n), type, r,
                                 comm_.get(), stream()),
                   "ncclBroadcast");
      }
      begin += n;
    }
    group.end();
  }

  void all_to_all_now(const Flight& f) {
    const DType dtype = f.send.dtype;
    const auto part = [&](const std::vector<Index>& counts, int r) {
      return std::min(counts[static_cast<std::size_t>(r)], f.limit);
    };
    const auto begin_of = [&](const std::vector<Index>& counts, int rank) {
      Index begin = 0;
      for (int r = 0; r < rank; ++r) begin += counts[static_cast<std::size_t>(r)];
      return begin;
    };
    if (const Index n = part(f.counts, rank_); n > 0) {
      comm::copy_bytes(at(f.recv.data, begin_of(f.recv_counts, rank_), dtype),
                       at(f.send.data, begin_of(f.counts, rank_), dtype),
                       size_of(n) * bytes_of(dtype), stream());
    }
    Group group;
    Index send_begin = 0;
    Index recv_begin = 0;
    for (int r = 0; r < size_; ++r) {
      if (r != rank_) {
        // An empty buffer may be null, and stays so.
        if (const Index n = part(f.counts, r); n > 0) {
          send_to(r, ConstSpan{at(f.send.data, send_begin, dtype), n, dtype});
        }
        if (const Index n = part(f.recv_counts, r); n > 0) {
          receive_from(r, Span{at(f.recv.data, recv_begin, dtype), n, dtype});
        }
      }
      send_begin += f.counts[static_cast<std::size_t>(r)];
      recv_begin += f.recv_counts[static_cast<std::size_t>(r)];
    }
    group.end();
  }

  std::shared_ptr<Family> family_;
  // The stream and the events of its calls outlast what NCCL may still do in it.
  comm::CudaStream stream_;
  UniqueHandle<DeviceMemoryTraits> barrier_;
  comm::Pool<Flight> flights_;
  CommHandle comm_;
  int rank_ = 0;
  int size_ = 1;
  std::string failure_;
};

Flight::Flight(NcclBody& b) : body(b), ready(comm::make_event()), complete(comm::make_event()) {
  const auto ranks = static_cast<std::size_t>(b.size());
  counts.reserve(ranks);
  recv_counts.reserve(ranks);
}

bool Flight::test() { return phase == Phase::done || body.test(*this); }

bool Flight::wait(double timeout_s) {
  if (comm::wait_until([this] { return test(); }, timeout_s)) return true;
  body.fail("a call had no answer in time");
  return false;
}

void Flight::release() noexcept {
  if (phase != Phase::done) body.fail("a call was given up");
  phase = Phase::done;
  body.give(*this);
}

void Family::advance() noexcept {
  while (!line.empty()) {
    NcclBody& body = line.first()->body;
    try {
      const comm::OnDevice on{device};
      if (handed_over == 0) handed_over = body.hand_over(*line.first());
      if (!body.is_settled()) return;
      for (; handed_over > 0; --handed_over) body.in_stream(*line.pop());
    } catch (const std::exception& e) {
      body.fail(e.what());
    }
  }
}

void Family::fail(const NcclBody& first, const std::string& why) noexcept {
  broken = true;
  handed_over = 0;
  line.remove_if([](const Flight&) { return true; });
  // To abort one is to free its memory, which waits for the kernels of the others, which wait for
  // ranks that are gone: in a group all are told to stop before anything is freed.
  static_cast<void>(ncclGroupStart());
  for (NcclBody* const body : bodies) {
    body->abort(body == &first ? why : "another communicator of the device failed: " + why);
  }
  static_cast<void>(ncclGroupEnd());
}

/// Where this rank computes, and whether it can.
comm::DevicePlace place_of(int device) {
  comm::DevicePlace place = comm::this_host();
  place.device = device;
  const NcclReport report = nccl_report();
  if (!report.problem.empty()) {
    place.problem = report.problem;
  } else if (device < 0 || device >= report.devices) {
    place.problem = "it sees " + std::to_string(report.devices) + " devices";
  } else {
    char bus[32] = {};
    const cudaError_t status = cudaDeviceGetPCIBusId(bus, sizeof bus, device);
    place.bus = bus;
    if (status != cudaSuccess) place.problem = cudaGetErrorString(status);
  }
  return place;
}

std::vector<comm::DevicePlace> gather_places(Communicator& bootstrap,
                                             const comm::DevicePlace& mine) {
  std::vector<comm::DevicePlace> places;
  for (const std::string& text : bootstrap.all_gather_strings(to_text(mine))) {
    comm::DevicePlace unclear;
    unclear.problem = "its answer is unclear";
    places.push_back(comm::device_place(text).value_or(unclear));
  }
  return places;
}

/// Runs `part` on every rank. No rank throws alone. @throws CommError  on all, when one threw.
template <class Part>
void together(Communicator& bootstrap, Part&& part) {
  std::string problem;
  Index code = 0;
  try {
    part();
  } catch (const Error& e) {
    problem = e.what();
    code = static_cast<Index>(e.exit_code());
  }
  bootstrap.all_reduce(Span{&code, 1, DType::i64}, ReduceOp::max);
  if (code == 0) return;
  const std::vector<std::string> problems = bootstrap.all_gather_strings(problem);
  const auto first =
      std::find_if(problems.begin(), problems.end(), [](const auto& p) { return !p.empty(); });
  throw CommError("open_nccl: rank " + std::to_string(first - problems.begin()) + ": " + *first,
                  static_cast<ExitCode>(code));
}

/// Gives a communicator time for ranks that themselves wait until its deadline.
class TwiceThePatience {
 public:
  explicit TwiceThePatience(Communicator& c) : comm_(c), usual_s_(c.options().timeout_s) {
    comm_.set_timeout(2 * usual_s_);
  }
  ~TwiceThePatience() { comm_.set_timeout(usual_s_); }
  TwiceThePatience(const TwiceThePatience&) = delete;
  TwiceThePatience& operator=(const TwiceThePatience&) = delete;

 private:
  Communicator& comm_;
  double usual_s_;
};

}  // namespace

NcclReport nccl_report() {
  NcclReport report;
  report.built = true;
  report.compiled = NCCL_VERSION_CODE;
  if (ncclGetVersion(&report.version) != ncclSuccess) report.version = 0;
  const cudaError_t status = cudaGetDeviceCount(&report.devices);
  if (status != cudaSuccess) {
    report.devices = 0;
    report.problem = cudaGetErrorString(status);
  } else if (report.devices == 0) {
    report.problem = "there is no device";
  } else if (report.version < oldest_version) {
    report.problem = "the NCCL that was loaded is older than 2.18";
  }
  return report;
}

bool nccl_available() { return nccl_report().problem.empty(); }

Communicator open_nccl(Communicator& bootstrap, int device, void* compute_stream) {
  if (bootstrap.dry() || bootstrap.on_device()) {
    throw ConfigError(std::string("open_nccl: ranks of kind ") + bootstrap.kind() +
                      " cannot find each other; give the communicator over MPI");
  }
  const TrafficScope setup{bootstrap, TrafficClass::setup};
  comm::DevicePlace mine = place_of(device);
  ncclUniqueId id{};
  if (bootstrap.rank() == 0 && mine.problem.empty()) {
    try {
      nccl_check(ncclGetUniqueId(&id), "ncclGetUniqueId");
    } catch (const Error& e) {
      mine.problem = e.what();
    }
  }
  const std::string conflict = comm::device_conflict(gather_places(bootstrap, mine));
  if (!conflict.empty()) throw ConfigError("open_nccl: " + conflict);

  bootstrap.broadcast(Span{id.internal, NCCL_UNIQUE_ID_BYTES, DType::u8}, 0);
  auto family = std::make_shared<Family>();
  family->device = device;
  family->compute_stream = compute_stream;
  family->setup_timeout_s = bootstrap.options().timeout_s;
  CommHandle handle;
  std::unique_ptr<NcclBody> body;
  // A rank that is refused says so before the others wait for it.
  together(bootstrap, [&] {
    const comm::OnDevice on{device};
    ncclConfig_t not_blocking = config();
    nccl_check(
        ncclCommInitRankConfig(handle.out(), bootstrap.size(), id, bootstrap.rank(), &not_blocking),
        "ncclCommInitRankConfig");
  });
  {
    const TwiceThePatience patience{bootstrap};
    together(bootstrap, [&] {
      wait_settled(handle.get(), "ncclCommInitRankConfig", family->setup_timeout_s);
      body = std::make_unique<NcclBody>(std::move(handle), family);
    });
  }
  return Communicator{std::move(body), bootstrap.options()};
}

}  // namespace orthrus
