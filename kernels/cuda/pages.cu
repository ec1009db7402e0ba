#include <cuda.h>
#include <cuda_runtime.h>

#include <string>

#include "kernels/check.hpp"
#include "kernels/cuda/pages.hpp"
#include "kernels/cuda/status.hpp"

namespace orthrus::kernels::cuda {
namespace {

/// The driver's functions, found by name: a build needs no driver to link to.
struct Driver {
  decltype(&cuMemAddressReserve) address_reserve = nullptr;
  decltype(&cuMemAddressFree) address_free = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

 private:
  Driver() {
    find("cuMemAddressReserve", address_reserve);
    find("cuMemAddressFree", address_free);
    find("cuMemCreate", create);
    find("cuMemRelease", release);
    find("cuMemMap", map);
    find("cuMemUnmap", unmap);
    find("cuMemSetAccess", set_access);
  }
  template <class Function>
  static void find(const char* name, Function& function) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    constexpr unsigned since = 10020;  // the version that brought them
    check_cuda(cudaGetDriverEntryPointByVersion(name, &found, since, cudaEnableDefault, &result),
               name);
    if (found == nullptr) throw_device_error(std::string("the driver has no ") + name);
    function = reinterpret_cast<Function>(found);
  }
};

void check_driver(CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) return;
  throw_device_error(std::string(call) + ": CUDA driver error " + std::to_string(result));
}

CUmemLocation on(int device) {
  CUmemLocation location{};
  location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  location.id = device;
  return location;
}

CUdeviceptr address(const void* p) { return reinterpret_cast<CUdeviceptr>(p); }

}  // namespace

Pages::~Pages() {
  for (const Memory memory : idle_) Driver::get().release(memory);
}

void* Pages::reserve(int device, std::size_t range_bytes) {
  device_ = device;
  CUdeviceptr at = 0;
  check_driver(Driver::get().address_reserve(&at, range_bytes, bytes, 0, 0), "cuMemAddressReserve");
  return reinterpret_cast<void*>(at);
}

void Pages::unreserve(void* range, std::size_t range_bytes) noexcept {
  drop(range, range_bytes);
  Driver::get().address_free(address(range), range_bytes);
}

void Pages::back(void* range, std::size_t range_bytes) {
  const Driver& driver = Driver::get();
  auto* const begin = static_cast<std::byte*>(range);
  for (std::byte* at = begin; at < begin + range_bytes; at += bytes) {
    Memory memory = 0;
    if (!idle_.empty()) {
      memory = idle_.back();
      idle_.pop_back();
    } else {
      CUmemAllocationProp properties{};
      properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
      properties.location = on(device_);
      check_driver(driver.create(&memory, bytes, &properties, 0), "cuMemCreate");
    }
    backed_.emplace(at, memory);
    check_driver(driver.map(address(at), bytes, 0, memory, 0), "cuMemMap");
  }
  CUmemAccessDesc access{};
  access.location = on(device_);
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  if (range_bytes > 0) {
    check_driver(driver.set_access(address(range), range_bytes, &access, 1), "cuMemSetAccess");
  }
}

void Pages::drop(void* range, std::size_t range_bytes) noexcept {
  auto* const begin = static_cast<std::byte*>(range);
  for (auto page = backed_.lower_bound(begin);
       page != backed_.end() && page->first < begin + range_bytes; page = backed_.erase(page)) {
    Driver::get().unmap(address(page->first), bytes);
    idle_.push_back(page->second);
  }
}

}  // namespace orthrus::kernels::cuda
