#include "support/fake_nccl.hpp"

#include <cuda_runtime.h>
#include <nccl.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/bf16.hpp"

namespace {

std::mutex mutex;  // of everything below
thread_local int current_device = 0;
thread_local std::int64_t sent = 0;
thread_local bool refused = false;
thread_local bool peer_lost = false;
thread_local bool hidden = false;
int broken = 0;
int living = 0;
int aborts = 0;
int waiting = 0;

void breach(const char* what) {
  ++broken;
  std::fprintf(stderr, "fake NCCL: %s\n", what);
}

// ---- CUDA

struct Event {
  std::int64_t recorded = 0, reached = 0;
};

/// Whose first operation is asked again until it answers that it is complete.
struct Stream {
  std::deque<std::function<bool()>> operations;
  bool busy = false;
};

std::set<Stream*> streams;
std::vector<std::unique_ptr<Stream>> busy_streams;
std::map<const char*, std::size_t> device_blocks, pinned_blocks;

bool within(const std::map<const char*, std::size_t>& blocks, const void* p) {
  auto at = blocks.upper_bound(static_cast<const char*>(p));
  if (at == blocks.begin()) return false;
  --at;
  return static_cast<const char*>(p) < at->first + at->second;
}

void pump() {
  for (bool moved = true; moved;) {
    moved = false;
    for (Stream* const s : streams) {
      while (!s->operations.empty() && s->operations.front()()) {
        s->operations.pop_front();
        moved = true;
      }
    }
  }
}

/// The default stream holds nothing for long.
void enqueue(cudaStream_t stream, std::function<bool()> operation) {
  if (stream == nullptr) {
    operation();
  } else {
    reinterpret_cast<Stream*>(stream)->operations.push_back(std::move(operation));
  }
}

// ---- NCCL

enum class Verb : std::uint8_t { all_reduce, reduce, broadcast, reduce_scatter, all_gather };

struct Collective {
  Verb verb;
  const void* send;
  void* recv;
  std::size_t count;
  ncclDataType_t type;
  ncclRedOp_t op;
  int root;
};
struct Message {
  bool out;
  void* data;
  std::size_t bytes;
  int peer;
};

/// What one rank's kernel has to do; gone when all of it is done.
struct Kernel {
  std::deque<std::pair<std::int64_t, Collective>> collectives;  // with their numbers
  std::vector<Message> messages;
  bool started = false;
  int open = 0;  // parts not yet done
};

struct Clique;

}  // namespace

struct ncclComm {
  std::shared_ptr<Clique> clique;
  int rank = 0, device = 0;
  ncclResult_t state = ncclInProgress;
  bool aborted = false;
  bool ready = false;
  int polls = 0;  // until what was handed over is looked at
  std::shared_ptr<Kernel> handed_over;
  cudaStream_t stream = nullptr;
  std::thread::id owner = std::this_thread::get_id();
  std::int64_t collectives = 0;  // ever handed over
  int kernels = 0;               // in streams
  // a split
  ncclComm_t* part = nullptr;
  int color = 0, key = 0;
  std::int64_t splits = 0;
};

namespace {

struct Arrived {
  Collective what;
  std::shared_ptr<Kernel> kernel;
};

/// The ranks of one communicator.
struct Clique {
  explicit Clique(int ranks) : members(static_cast<std::size_t>(ranks)) {}
  std::vector<ncclComm*> members;
  std::map<std::int64_t, int> announced;                   // collectives handed over, by number
  std::map<std::int64_t, std::map<int, Arrived>> running;  // kernels that run, by number and rank
  std::map<std::pair<int, int>, std::deque<std::pair<Message, std::shared_ptr<Kernel>>>> sends,
      receives;                                                       // from, to
  std::map<std::int64_t, std::map<int, std::pair<int, int>>> splits;  // color, key by rank
  std::map<std::pair<std::int64_t, int>, std::shared_ptr<Clique>> parts;
  [[nodiscard]] int size() const { return static_cast<int>(members.size()); }
};

/// All that ever were: streams may hold their kernels after they have ended.
std::vector<std::unique_ptr<ncclComm>> communicators;
ncclComm* new_communicator() {
  communicators.push_back(std::make_unique<ncclComm>());
  ++living;
  return communicators.back().get();
}

int own_kernels() {
  int n = 0;
  for (const auto& comm : communicators) {
    if (comm->owner == std::this_thread::get_id() && !comm->aborted) n += comm->kernels;
  }
  return n;
}
/// Memory of the device is freed.
void free_waits() {
  pump();
  if (own_kernels() > 0) ++waiting;
}

std::map<std::int64_t, std::shared_ptr<Clique>> cliques;
std::int64_t last_id = 0;

thread_local int depth = 0;
thread_local std::map<ncclComm_t, std::shared_ptr<Kernel>> group;
thread_local std::map<ncclComm_t, cudaStream_t> group_stream;

std::size_t bytes_of(ncclDataType_t type) {
  switch (type) {
    case ncclUint8:
      return 1;
    case ncclBfloat16:
      return 2;
    case ncclFloat32:
      return 4;
    default:
      return 8;
  }
}

template <class T, class Fold>
void fold_as(void* into, const void* from, std::size_t n, Fold&& fold) {
  auto* const a = static_cast<T*>(into);
  const auto* const b = static_cast<const T*>(from);
  for (std::size_t i = 0; i < n; ++i) a[i] = fold(a[i], b[i]);
}

template <class T>
void fold_plain(void* into, const void* from, std::size_t n, ncclRedOp_t op) {
  fold_as<T>(into, from, n, [op](T x, T y) {
    return op == ncclSum ? static_cast<T>(x + y) : op == ncclMax ? std::max(x, y) : std::min(x, y);
  });
}

void fold(void* into, const void* from, std::size_t n, ncclDataType_t type, ncclRedOp_t op) {
  using orthrus::BFloat16;
  using orthrus::kernels::to_bf16;
  using orthrus::kernels::to_float;
  switch (type) {
    case ncclUint8:
      return fold_plain<std::uint8_t>(into, from, n, op);
    case ncclInt64:
      return fold_plain<std::int64_t>(into, from, n, op);
    case ncclFloat32:
      return fold_plain<float>(into, from, n, op);
    case ncclFloat64:
      return fold_plain<double>(into, from, n, op);
    default:
      fold_as<BFloat16>(into, from, n, [op](BFloat16 x, BFloat16 y) {
        const float a = to_float(x);
        const float b = to_float(y);
        return to_bf16(op == ncclSum ? a + b : op == ncclMax ? std::max(a, b) : std::min(a, b));
      });
  }
}

/// All ranks' kernels run: the collective is carried out.
void carry_out(std::map<int, Arrived>& ranks) {
  const Collective& first = ranks.at(0).what;
  const std::size_t n = first.count;
  const std::size_t b = bytes_of(first.type);
  const auto p = ranks.size();
  for (const auto& [rank, a] : ranks) {
    if (a.what.verb != first.verb || a.what.count != n || a.what.type != first.type ||
        a.what.op != first.op || a.what.root != first.root) {
      breach("the ranks disagree");
      return;
    }
  }
  const bool all = first.verb == Verb::reduce_scatter;
  std::vector<char> sum(n * b * (all ? p : 1));
  if (first.verb == Verb::all_reduce || first.verb == Verb::reduce || all) {
    const std::size_t elements = n * (all ? p : 1);
    for (const auto& [rank, a] : ranks) {
      if (rank == 0) {
        std::memcpy(sum.data(), a.what.send, elements * b);
      } else {
        fold(sum.data(), a.what.send, elements, first.type, first.op);
      }
    }
  }
  for (const auto& [rank, a] : ranks) {
    const auto r = static_cast<std::size_t>(rank);
    switch (first.verb) {
      case Verb::all_reduce:
        std::memcpy(a.what.recv, sum.data(), n * b);
        break;
      case Verb::reduce:
        if (rank == first.root) std::memcpy(a.what.recv, sum.data(), n * b);
        break;
      case Verb::broadcast:
        std::memmove(a.what.recv, ranks.at(first.root).what.send, n * b);
        break;
      case Verb::reduce_scatter:
        std::memcpy(a.what.recv, sum.data() + r * n * b, n * b);
        break;
      case Verb::all_gather:
        for (const auto& [other, from] : ranks) {
          std::memmove(static_cast<char*>(a.what.recv) + static_cast<std::size_t>(other) * n * b,
                       from.what.send, n * b);
        }
        break;
    }
  }
  for (auto& [rank, a] : ranks) --a.kernel->open;
}

void meet(Clique& clique, std::pair<int, int> pair) {
  auto& out = clique.sends[pair];
  auto& in = clique.receives[pair];
  while (!out.empty() && !in.empty()) {
    auto [s, sender] = out.front();
    auto [r, receiver] = in.front();
    if (s.bytes != r.bytes) breach("a message of another length");
    std::memcpy(r.data, s.data, std::min(s.bytes, r.bytes));
    --sender->open;
    --receiver->open;
    out.pop_front();
    in.pop_front();
  }
}

/// @return the kernel is done.
bool run(ncclComm& comm, const std::shared_ptr<Kernel>& kernel) {
  if (comm.aborted) {
    return true;
  }
  Clique& clique = *comm.clique;
  if (!kernel->started) {
    kernel->started = true;
    kernel->open = static_cast<int>(kernel->collectives.size() + kernel->messages.size());
    for (const auto& [number, what] : kernel->collectives) {
      auto& ranks = clique.running[number];
      ranks.emplace(comm.rank, Arrived{what, kernel});
      if (static_cast<int>(ranks.size()) == clique.size()) {
        carry_out(ranks);
        clique.running.erase(number);
      }
    }
    for (const Message& m : kernel->messages) {
      const std::pair<int, int> pair =
          m.out ? std::pair{comm.rank, m.peer} : std::pair{m.peer, comm.rank};
      (m.out ? clique.sends : clique.receives)[pair].emplace_back(m, kernel);
      meet(clique, pair);
    }
  }
  if (kernel->open > 0) return false;
  --comm.kernels;
  return true;
}

/// As NCCL's own thread would, some time after `ncclGroupEnd`.
void look_at(ncclComm& comm) {
  if (comm.polls-- > 0) return;
  Clique& clique = *comm.clique;
  if (!comm.ready) {
    for (const ncclComm* const m : clique.members) {
      if (m == nullptr) return;
    }
    comm.ready = true;
    comm.state = ncclSuccess;
    return;
  }
  if (comm.part != nullptr) {
    auto& ranks = clique.splits[comm.splits];
    if (static_cast<int>(ranks.size()) < clique.size()) return;
    std::vector<std::pair<int, int>> order;  // key, rank
    for (const auto& [rank, what] : ranks) {
      if (what.first == comm.color) order.emplace_back(what.second, rank);
    }
    std::sort(order.begin(), order.end());
    auto& part = clique.parts[{comm.splits, comm.color}];
    if (part == nullptr) part = std::make_shared<Clique>(static_cast<int>(order.size()));
    ncclComm* const child = new_communicator();
    child->clique = part;
    child->device = comm.device;
    child->polls = 2;
    for (std::size_t i = 0; i < order.size(); ++i) {
      if (order[i].second == comm.rank) child->rank = static_cast<int>(i);
    }
    part->members[static_cast<std::size_t>(child->rank)] = child;
    *std::exchange(comm.part, nullptr) = child;
    comm.state = ncclSuccess;
    return;
  }
  if (comm.handed_over != nullptr) {
    // Two of three collectives have to connect first: all ranks must have handed them over.
    for (const auto& [number, what] : comm.handed_over->collectives) {
      if (number % 3 != 2 && clique.announced[number] < clique.size()) return;
    }
    ++comm.kernels;
    enqueue(comm.stream, [&comm, kernel = std::exchange(comm.handed_over, nullptr)] {
      return run(comm, kernel);
    });
    comm.state = ncclSuccess;
  }
}

ncclResult_t usable(ncclComm& comm) {
  if (comm.aborted || comm.state == ncclInProgress) {
    breach("a communicator is used before it is ready, or after it was aborted");
    return ncclInvalidArgument;
  }
  return comm.state;
}

ncclResult_t end_group() {
  for (auto& [comm, kernel] : group) {
    comm->state = ncclInProgress;
    comm->polls = static_cast<int>(comm->collectives % 3) + comm->rank % 2;
    for (auto& [number, what] : kernel->collectives) ++comm->clique->announced[number];
    comm->stream = group_stream[comm];
    comm->handed_over = std::move(kernel);
  }
  const bool any = !group.empty();
  group.clear();
  group_stream.clear();
  return any ? ncclInProgress : ncclSuccess;
}

template <class Add>
ncclResult_t call(ncclComm_t comm, cudaStream_t stream, Add&& add) {
  const std::lock_guard lock{mutex};
  if (const ncclResult_t r = usable(*comm); r != ncclSuccess) return r;
  auto& kernel = group[comm];
  if (kernel == nullptr) kernel = std::make_shared<Kernel>();
  group_stream[comm] = stream;
  add(*kernel);
  return depth == 0 ? end_group() : ncclSuccess;
}

void check_place(const void* p, std::size_t bytes) {
  if (bytes > 0 && !within(device_blocks, p)) breach("a buffer is not the device's");
}

ncclResult_t collective(Verb verb, const void* send, void* recv, std::size_t count,
                        ncclDataType_t type, ncclRedOp_t op, int root, ncclComm_t comm,
                        cudaStream_t stream) {
  if (count == 0) return ncclSuccess;
  return call(comm, stream, [&](Kernel& kernel) {
    const bool root_only = verb == Verb::reduce;
    if (verb != Verb::broadcast || comm->rank == root) check_place(send, count);
    if (!root_only || comm->rank == root) check_place(recv, count);
    kernel.collectives.emplace_back(comm->collectives++,
                                    Collective{verb, send, recv, count, type, op, root});
    const auto p = static_cast<std::int64_t>(comm->clique->size());
    const auto n = static_cast<std::int64_t>(count);
    const std::int64_t own = n / p + (comm->rank < n % p ? 1 : 0);
    const auto b = static_cast<std::int64_t>(bytes_of(type));
    switch (verb) {
      case Verb::all_reduce:
        sent += 2 * (n - own) * b;
        break;
      case Verb::reduce:
        sent += comm->rank == root ? 0 : n * b;
        break;
      case Verb::broadcast:  // in a group it is a part of an all_gather
        if (depth > 0 ? comm->rank != root : (comm->rank + 1) % p != root) sent += n * b;
        break;
      case Verb::reduce_scatter:
      case Verb::all_gather:
        sent += (p - 1) * n * b;
        break;
    }
  });
}

}  // namespace

std::int64_t fake::sent_bytes() { return sent; }
int fake::broken_rules() {
  const std::lock_guard lock{mutex};
  return broken;
}
int fake::communicators() {
  const std::lock_guard lock{mutex};
  return living;
}
int fake::aborted() {
  const std::lock_guard lock{mutex};
  return aborts;
}
int fake::waiting_frees() {
  const std::lock_guard lock{mutex};
  return waiting;
}
int fake::kernels() {
  const std::lock_guard lock{mutex};
  return own_kernels();
}
void fake::lose_peer() { peer_lost = true; }
void* fake::busy_stream() {
  const std::lock_guard lock{mutex};
  busy_streams.push_back(std::make_unique<Stream>());
  Stream* const s = busy_streams.back().get();
  streams.insert(s);
  s->operations.emplace_back([s] { return !s->busy; });
  s->busy = true;
  return s;
}
void fake::let_go(void* stream) {
  const std::lock_guard lock{mutex};
  static_cast<Stream*>(stream)->busy = false;
}
void fake::refuse_next() { refused = true; }
void fake::hide_next() { hidden = true; }

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 8;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  std::snprintf(id, static_cast<std::size_t>(length), "0000:%02x:00.0", 16 + device);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "an error of the fake"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  const std::lock_guard lock{mutex};
  auto* const s = new Stream;
  streams.insert(s);
  *stream = reinterpret_cast<cudaStream_t>(s);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const std::lock_guard lock{mutex};
  auto* const s = reinterpret_cast<Stream*>(stream);
  pump();
  streams.erase(s);
  delete s;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  for (;; std::this_thread::yield()) {
    const std::lock_guard lock{mutex};
    pump();
    if (stream == nullptr || reinterpret_cast<Stream*>(stream)->operations.empty()) {
      return cudaSuccess;
    }
  }
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const std::lock_guard lock{mutex};
  auto* const e = reinterpret_cast<Event*>(event);
  enqueue(stream, [e, n = e->recorded] { return e->reached >= n; });
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const std::lock_guard lock{mutex};
  pump();
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard lock{mutex};
  auto* const e = reinterpret_cast<Event*>(event);
  enqueue(stream, [e, n = ++e->recorded] {
    e->reached = n;
    return true;
  });
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const std::lock_guard lock{mutex};
  pump();
  const auto* const e = reinterpret_cast<Event*>(event);
  return e->reached >= e->recorded ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  const std::lock_guard lock{mutex};
  *p = std::malloc(bytes);
  device_blocks[static_cast<char*>(*p)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  const std::lock_guard lock{mutex};
  free_waits();
  device_blocks.erase(static_cast<char*>(p));
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  const std::lock_guard lock{mutex};
  *p = std::malloc(bytes);
  pinned_blocks[static_cast<char*>(*p)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  const std::lock_guard lock{mutex};
  pinned_blocks.erase(static_cast<char*>(p));
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  const std::lock_guard lock{mutex};
  enqueue(stream, [=] {
    std::memcpy(to, from, bytes);
    return true;
  });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  const std::lock_guard lock{mutex};
  enqueue(stream, [=] {
    std::memset(p, value, bytes);
    return true;
  });
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  const std::lock_guard lock{mutex};
  *attributes = cudaPointerAttributes{};
  attributes->device = current_device;
  if (within(device_blocks, p)) {
    attributes->type = cudaMemoryTypeManaged;  // whose device nobody asks for
    attributes->devicePointer = const_cast<void*>(p);
  } else {
    attributes->type = cudaMemoryTypeUnregistered;
  }
  return cudaSuccess;
}

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t result) {
  return result == ncclRemoteError ? "remote process exited" : "an error of the fake";
}
const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  const std::lock_guard lock{mutex};
  *id = ncclUniqueId{};
  ++last_id;
  std::memcpy(id->internal, &last_id, sizeof last_id);
  return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
  const std::lock_guard lock{mutex};
  if (config->blocking != 0) breach("a blocking communicator");
  if (std::exchange(refused, false)) return ncclSystemError;
  std::int64_t number = 0;
  std::memcpy(&number, id.internal, sizeof number);
  auto& clique = cliques[number];
  if (clique == nullptr) clique = std::make_shared<Clique>(ranks);
  *comm = new_communicator();
  (*comm)->clique = clique;
  (*comm)->rank = rank;
  (*comm)->device = current_device;
  (*comm)->polls = 3;
  if (!std::exchange(hidden, false)) clique->members[static_cast<std::size_t>(rank)] = *comm;
  return ncclInProgress;
}
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* part,
                           ncclConfig_t* config) {
  const std::lock_guard lock{mutex};
  if (config->blocking != 0) breach("a blocking communicator");
  if (const ncclResult_t r = usable(*comm); r != ncclSuccess) return r;
  if (comm->kernels > 0) breach("a communicator is split with calls in it");
  *part = nullptr;
  comm->part = part;
  comm->color = color;
  comm->key = key;
  comm->clique->splits[++comm->splits][comm->rank] = {color, key};
  comm->state = ncclInProgress;
  comm->polls = 2;
  return ncclInProgress;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  const std::lock_guard lock{mutex};
  if (comm->state == ncclInProgress) look_at(*comm);
  if (peer_lost) comm->state = ncclRemoteError;
  *state = comm->state;
  return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  *rank = comm->rank;
  return ncclSuccess;
}
ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  *count = comm->clique->size();
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  const std::lock_guard lock{mutex};
  comm->aborted = true;
  comm->handed_over = nullptr;
  --living;
  ++aborts;
  if (depth == 0) free_waits();  // in a group all have been told to stop before it frees
  return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  const std::lock_guard lock{mutex};
  pump();
  if (comm->aborted || comm->state != ncclSuccess || comm->kernels > 0) {
    breach("a communicator is destroyed with calls in it");
  }
  comm->aborted = true;
  --living;
  return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
  ++depth;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  const std::lock_guard lock{mutex};
  if (--depth > 0) return ncclSuccess;
  return end_group();
}
ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  return collective(Verb::all_reduce, send, recv, count, type, op, 0, comm, stream);
}
ncclResult_t ncclReduce(const void* send, void* recv, size_t count, ncclDataType_t type,
                        ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream) {
  return collective(Verb::reduce, send, recv, count, type, op, root, comm, stream);
}
ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type,
                           int root, ncclComm_t comm, cudaStream_t stream) {
  return collective(Verb::broadcast, send, recv, count, type, ncclSum, root, comm, stream);
}
ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  return collective(Verb::reduce_scatter, send, recv, count, type, op, 0, comm, stream);
}
ncclResult_t ncclAllGather(const void* send, void* recv, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
  return collective(Verb::all_gather, send, recv, count, type, ncclSum, 0, comm, stream);
}
ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
  return call(comm, stream, [&](Kernel& kernel) {
    check_place(data, count);
    const std::size_t bytes = count * bytes_of(type);
    sent += static_cast<std::int64_t>(bytes);
    kernel.messages.push_back({true, const_cast<void*>(data), bytes, peer});
  });
}
ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return call(comm, stream, [&](Kernel& kernel) {
    check_place(data, count);
    kernel.messages.push_back({false, data, count * bytes_of(type), peer});
  });
}
}
