#include "comm/cuda_copies.hpp"

#include <cuda_runtime.h>

#include <memory>

#include "comm/cuda_handle.hpp"

namespace orthrus::comm {
namespace {

enum class Staging : bool { host, device };

class CudaCopies final : public Copies {
 public:
  CudaCopies(int device, void* compute, Staging staging)
      : device_(device), compute_(compute), staging_(staging) {
    const OnDevice on{device_};
    stream_ = make_stream();
    ready_ = make_event();
  }

  void* allocate(std::size_t bytes) override {
    const OnDevice on{device_};
    void* memory = nullptr;
    if (staging_ == Staging::host) {
      cuda_check(cudaHostAlloc(&memory, bytes, cudaHostAllocDefault), "cudaHostAlloc");
    } else {
      cuda_check(cudaMalloc(&memory, bytes), "cudaMalloc");
    }
    return memory;
  }
  void free(void* memory) noexcept override {
    static_cast<void>(staging_ == Staging::host ? cudaFreeHost(memory) : cudaFree(memory));
  }
  std::unique_ptr<Mark> mark() override { return std::make_unique<EventMark>(*this); }
  void follow() override {
    const OnDevice on{device_};
    record(ready_, compute_);
    wait_for(stream_.get(), ready_);
  }
  void fetch(void* staging, const void* caller, std::size_t bytes) override {
    copy(staging, caller, bytes);
  }
  void deliver(void* caller, const void* staging, std::size_t bytes) override {
    copy(caller, staging, bytes);
  }

 private:
  class EventMark final : public Mark {
   public:
    explicit EventMark(CudaCopies& copies) : copies_(copies) {
      const OnDevice on{copies.device_};
      event_ = make_event();
    }
    void set() override {
      const OnDevice on{copies_.device_};
      record(event_, copies_.stream_.get());
    }
    bool reached() override { return comm::reached(event_); }

   private:
    CudaCopies& copies_;
    CudaEvent event_;
  };

  void copy(void* to, const void* from, std::size_t bytes) {
    const OnDevice on{device_};
    copy_bytes(to, from, bytes, stream_.get());
    if (staging_ == Staging::device) {
      cuda_check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream_.get())),
                 "cudaStreamSynchronize");
    }
  }

  int device_;
  void* compute_;
  Staging staging_;
  CudaStream stream_;
  CudaEvent ready_;
};

}  // namespace

std::shared_ptr<Copies> cuda_copies(int device, void* compute_stream) {
  return std::make_shared<CudaCopies>(device, compute_stream, Staging::host);
}

std::shared_ptr<Copies> cuda_copies_to_device(int device) {
  return std::make_shared<CudaCopies>(device, nullptr, Staging::device);
}

}  // namespace orthrus::comm
