#pragma once
/// @file
/// The part of the CUDA runtime that kernels/cuda uses, on the host. See README.md.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

// ---- host
// ----------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2
};
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2, cudaMemcpyDefault = 4 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75 };
inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaHostAllocDefault = 0;
using cudaStream_t = struct EmulatedStream*;
using cudaGraph_t = struct EmulatedGraph*;
using cudaGraphExec_t = struct EmulatedGraphExec*;
inline const cudaStream_t cudaStreamLegacy = reinterpret_cast<cudaStream_t>(1);

enum cudaMemoryType {
  cudaMemoryTypeUnregistered = 0,
  cudaMemoryTypeHost = 1,
  cudaMemoryTypeDevice = 2,
  cudaMemoryTypeManaged = 3
};
struct cudaPointerAttributes {
  cudaMemoryType type = cudaMemoryTypeUnregistered;
  int device = 0;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned of_x = 1, unsigned of_y = 1, unsigned of_z = 1) : x(of_x), y(of_y), z(of_z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                 unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory);
cudaError_t cudaMalloc(void** memory, std::size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream);

// ---- device
// --------------------------------------------------------------------------------------

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated_cuda {
/// Device memory is open to this thread as long as one of these lives.
class Open {
 public:
  Open();
  ~Open();
  Open(const Open&) = delete;
  Open& operator=(const Open&) = delete;
};

/// What has been asked of the device since the program began.
struct Counts {
  long waits = 0;     ///< of the host, for a stream or the device
  long launches = 0;  ///< kernels and products, also those of graphs and those that are recorded
  long graphs = 0;    ///< launches of a graph
};
Counts& counts();

/// While this is true, captures end without a graph: as of a driver that cannot.
bool& captures_fail();

bool is_captured(cudaStream_t stream);
cudaError_t keep(cudaStream_t stream, std::function<void()> work);
/// Does `work` now, which allocates nothing; or keeps it, where `stream` is being captured.
template <class F>
cudaError_t enter(cudaStream_t stream, const F& work) {
  ++counts().launches;
  if (is_captured(stream)) return keep(stream, work);
  work();
  return cudaSuccess;
}
void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
/// All threads of the block have come here.
void meet_block();
/// `count` threads of this warp have.
void meet_warp(int count);
/// 8 bytes of each thread of the block.
std::uint64_t& slot(unsigned thread);
unsigned this_thread();

template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace emulated_cuda

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  return emulated_cuda::enter(config->stream, [config = *config, kernel, values] {
    emulated_cuda::run(config, [&] { std::apply(kernel, values); });
  });
}

inline void __syncthreads() { emulated_cuda::meet_block(); }

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  static_assert(sizeof(T) == 8);
  const unsigned me = emulated_cuda::this_thread();
  const unsigned lane = me % 32 + distance;
  emulated_cuda::slot(me) = emulated_cuda::bits<std::uint64_t>(value);
  emulated_cuda::meet_warp(__builtin_popcount(mask));
  const bool there = lane < 32 && ((mask >> lane) & 1U) != 0;
  const T other = emulated_cuda::bits<T>(emulated_cuda::slot(there ? me + distance : me));
  emulated_cuda::meet_warp(__builtin_popcount(mask));
  return other;
}

template <class T>
T atomicMax(T* to, T value) {
  const T before = *to;
  if (value > before) *to = value;
  return before;
}
template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

inline float __uint_as_float(std::uint32_t x) { return emulated_cuda::bits<float>(x); }
inline std::uint32_t __float_as_uint(float x) { return emulated_cuda::bits<std::uint32_t>(x); }
inline long long __double_as_longlong(double x) { return emulated_cuda::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated_cuda::bits<double>(x); }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
template <class T>
T __ldg(const T* at) {
  return *at;
}
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
