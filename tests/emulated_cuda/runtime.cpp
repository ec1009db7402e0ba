#include <cuda_runtime.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated_cuda {
namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

// ---- memory: one range of addresses, closed but for `Open`
// ---------------------------------------

class Memory {
 public:
  static Memory& of_device() {
    static Memory memory;
    return memory;
  }

  void* allocate(std::size_t bytes) {
    const std::size_t need = (bytes + page - 1) / page * page;
    std::size_t at = used_;
    if (const auto fit = free_.find(need); fit != free_.end()) {
      at = fit->second;
      free_.erase(fit);
    } else {
      if (used_ + need > size) return nullptr;
      used_ += need;
    }
    given_[at] = need;
    const Open open;
    // The start is enough, and what is never touched costs nothing to open and close.
    std::memset(base_ + at, 0xcd, std::min(need, std::size_t{1} << 20));
    return base_ + at;
  }
  void release(void* memory) {
    const auto given =
        given_.find(static_cast<std::size_t>(static_cast<std::byte*>(memory) - base_));
    if (given == given_.end()) fail("cudaFree of what is not allocated");
    madvise(memory, given->second, MADV_DONTNEED);
    free_.emplace(given->second, given->first);
    given_.erase(given);
  }
  bool holds(const void* memory) const {
    const auto* const at = static_cast<const std::byte*>(memory);
    return base_ <= at && at < base_ + size;
  }
  void open() {
    if (depth_++ == 0) protect(PROT_READ | PROT_WRITE);
  }
  void close() {
    if (--depth_ == 0) protect(PROT_NONE);
  }

 private:
  static constexpr std::size_t page = 4096;
  static constexpr std::size_t size = std::size_t{4} << 30;

  Memory() {
    void* range =
        mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) fail("no addresses");
    base_ = static_cast<std::byte*>(range);
  }
  void protect(int how) const {
    if (used_ > 0 && mprotect(base_, used_, how) != 0) fail("mprotect");
  }

  std::byte* base_ = nullptr;
  std::size_t used_ = 0;
  int depth_ = 0;
  std::map<std::size_t, std::size_t> given_;      // where: how much
  std::multimap<std::size_t, std::size_t> free_;  // how much: where
};

// ---- threads of one block
// ------------------------------------------------------------------------

struct Meeting {
  int arrived = 0, held = 0;
};

/// A thread lives on from block to block. Contexts begin by ucontext.h and go on by jumps, which
/// cost no system call.
struct Thread {
  std::vector<std::byte> stack = std::vector<std::byte>(std::size_t{128} << 10);
  ucontext_t context = {};
  jmp_buf point = {};
  bool begun = false, done = false;
  std::uint64_t slot = 0;
};

struct Block {
  jmp_buf scheduler;
  std::vector<std::unique_ptr<Thread>> threads;
  unsigned count = 0, current = 0;
  int alive = 0;
  Meeting all;
  std::array<Meeting, 32> warps;
  const std::function<void()>* body = nullptr;
};
Block block;

void pause() {
  if (_setjmp(block.threads[block.current]->point) == 0) _longjmp(block.scheduler, 1);
}

void live() {
  for (;;) {
    (*block.body)();
    block.threads[block.current]->done = true;
    --block.alive;
    if (block.all.arrived > 0 && block.all.arrived == block.alive) {
      block.all.arrived = 0;
      ++block.all.held;
    }
    pause();
  }
}

void go_on(Thread& thread) {
  if (_setjmp(block.scheduler) != 0) return;
  if (thread.begun) _longjmp(thread.point, 1);
  thread.begun = true;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = thread.stack.size();
  makecontext(&thread.context, live, 0);
  setcontext(&thread.context);
}

void meet(Meeting& meeting, int count) {
  const int before = meeting.held;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.held;
    return;
  }
  while (meeting.held == before) pause();
}

void run_block(bool backwards) {
  block.alive = static_cast<int>(block.count);
  block.all = {};
  block.warps = {};
  while (block.threads.size() < block.count) block.threads.push_back(std::make_unique<Thread>());
  for (unsigned t = 0; t < block.count; ++t) block.threads[t]->done = false;
  for (int round = 0; block.alive > 0; ++round) {
    if (round > 1000000) fail("threads wait for each other for ever");
    for (unsigned k = 0; k < block.count; ++k) {
      const unsigned t = backwards ? block.count - 1 - k : k;
      if (block.threads[t]->done) continue;
      block.current = t;
      threadIdx = dim3(t % blockDim.x, t / blockDim.x, 0);
      go_on(*block.threads[t]);
    }
  }
}

}  // namespace

Open::Open() { Memory::of_device().open(); }
Open::~Open() { Memory::of_device().close(); }

void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  static bool backwards = false;
  backwards = !backwards;
  const Open open;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  block.count = blockDim.x * blockDim.y;
  if (blockDim.z != 1 || gridDim.z != 1 || block.count == 0 || block.count > 1024 ||
      gridDim.x == 0 || gridDim.y == 0 || gridDim.x > 0x7fffffffU || gridDim.y > 65535) {
    fail("a launch that CUDA would refuse");
  }
  block.body = &thread;
  for (unsigned y = 0; y < gridDim.y; ++y) {
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block(backwards);
    }
  }
}

Counts& counts() {
  static Counts made;
  return made;
}

bool& captures_fail() {
  static bool fail = false;
  return fail;
}

void meet_block() { meet(block.all, block.alive); }
void meet_warp(int count) { meet(block.warps[block.current / 32], count); }
std::uint64_t& slot(unsigned thread) { return block.threads[thread]->slot; }
unsigned this_thread() { return block.current; }

}  // namespace emulated_cuda

using emulated_cuda::is_captured;
using emulated_cuda::Memory;
using emulated_cuda::Open;

// ---- streams and graphs: all is done at once, but for what is captured
// ---------------------------

struct EmulatedGraph {
  std::vector<std::function<void()>> nodes;
};
struct EmulatedGraphExec {
  std::vector<std::function<void()>> nodes;
};
struct EmulatedStream {
  std::unique_ptr<EmulatedGraph> capture;
  bool invalid = false;  ///< something has been asked that a capture does not allow
};

namespace {

EmulatedStream* captured = nullptr;  // one at a time

/// What no capture of this thread allows, whatever the stream.
cudaError_t unsafe() {
  if (captured == nullptr) return cudaSuccess;
  captured->invalid = true;
  return cudaErrorStreamCaptureUnsupported;
}

}  // namespace

bool emulated_cuda::is_captured(cudaStream_t stream) {
  return captured != nullptr && stream == captured;
}

cudaError_t emulated_cuda::keep(cudaStream_t stream, std::function<void()> work) {
  if (stream->invalid) return cudaErrorStreamCaptureInvalidated;
  stream->capture->nodes.push_back(std::move(work));
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  // Of another mode, other threads could not allocate, or this one could.
  if (mode != cudaStreamCaptureModeThreadLocal || stream == nullptr || stream == cudaStreamLegacy ||
      captured != nullptr) {
    return cudaErrorStreamCaptureUnsupported;
  }
  captured = stream;
  stream->capture = std::make_unique<EmulatedGraph>();
  stream->invalid = false;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  if (!is_captured(stream)) return cudaErrorInvalidValue;
  captured = nullptr;
  const std::unique_ptr<EmulatedGraph> made = std::move(stream->capture);
  if (stream->invalid || emulated_cuda::captures_fail()) return cudaErrorStreamCaptureInvalidated;
  *graph = new EmulatedGraph(std::move(*made));
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  if (graph == nullptr) return cudaErrorInvalidValue;
  *exec = new EmulatedGraphExec{graph->nodes};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  if (exec == nullptr || is_captured(stream)) return cudaErrorInvalidValue;
  ++emulated_cuda::counts().graphs;
  emulated_cuda::counts().launches += static_cast<long>(exec->nodes.size());
  for (const std::function<void()>& node : exec->nodes) node();
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  if (error >= cudaErrorStreamCaptureUnsupported) return "a capture does not allow it";
  return error == cudaErrorMemoryAllocation ? "out of memory" : "emulated error";
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorInvalidValue";
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 8;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new EmulatedStream;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ++emulated_cuda::counts().waits;
  return is_captured(stream) ? unsafe() : cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  if (const cudaError_t status = unsafe(); status != cudaSuccess) return status;
  *memory = Memory::of_device().allocate(bytes);
  return *memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* memory) {
  if (const cudaError_t status = unsafe(); status != cudaSuccess) return status;
  if (memory != nullptr) Memory::of_device().release(memory);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  ++emulated_cuda::counts().waits;
  return unsafe();
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  const bool here = Memory::of_device().holds(memory);
  *attributes = {here ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered, 0};
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
  if (const cudaError_t status = unsafe(); status != cudaSuccess) return status;
  *memory = std::malloc(bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  // Stricter than CUDA, which would take the host's address into the graph.
  const Memory& device = Memory::of_device();
  if (is_captured(stream) && !(device.holds(to) && device.holds(from))) return unsafe();
  return emulated_cuda::enter(stream, [=] {
    const Open open;
    std::memcpy(to, from, bytes);
  });
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  return emulated_cuda::enter(stream, [=] {
    const Open open;
    std::memset(to, value, bytes);
  });
}
