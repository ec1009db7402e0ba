#include "runtime/device.hpp"

#include <algorithm>
#include <orthrus/error.hpp>
#include <orthrus/nccl.hpp>
#include <string>

#include "comm/cuda_copies.hpp"
#include "comm/device_check.hpp"
#include "comm/staged.hpp"
#include "kernels/cuda/devices.hpp"
#include "kernels/devices.hpp"
#include "runtime/agree.hpp"

namespace orthrus::runtime {
namespace {

/// Has every rank NCCL, and a device that no other has? The same answer on all.
bool nccl_suits(Communicator& world, const kernels::CudaReport& report, int ordinal) {
  comm::DevicePlace mine = comm::this_host();
  mine.device = ordinal;
  mine.problem = nccl_report().problem;
  if (const auto i = static_cast<std::size_t>(ordinal); i < report.devices.size()) {
    mine.bus = report.devices[i].bus;
  } else {
    mine.problem = "its device is not listed";
  }
  std::vector<comm::DevicePlace> all;
  for (const std::string& text : world.all_gather_strings(to_text(mine))) {
    comm::DevicePlace unclear;
    unclear.problem = "its answer is unclear";
    all.push_back(comm::device_place(text).value_or(unclear));
  }
  return comm::device_conflict(all).empty();
}

Seat open_cuda_seat(const Config& config, const DeviceChoice& choice, Communicator& world) {
  const kernels::CudaReport report = kernels::cuda_report();
  const auto devices = static_cast<int>(report.devices.size());
  const int usual = default_ordinal(world, std::max(devices, 1));
  const int ordinal = choice.ordinal >= 0 ? choice.ordinal : usual;
  // The trainer's default stream, where none is named: what it has queued there comes first.
  const Stream stream =
      choice.stream.handle != nullptr ? choice.stream : kernels::cuda_default_stream();
  Seat seat;
  agree(world, [&] { seat.backend = kernels::open_cuda_on(ordinal, stream); });
  const std::string& wish = config.comm.backend;
  if (wish == "nccl" || (wish == "auto" && nccl_suits(world, report, ordinal))) {
    try {
      seat.payload = open_nccl(world, ordinal, stream.handle);
    } catch (const ConfigError& e) {  // on all ranks
      throw ConfigError("comm.backend: " + wish + ": " + e.what());
    }
    return seat;
  }
  std::shared_ptr<comm::Copies> copies;
  agree(world, [&] { copies = comm::cuda_copies(ordinal, stream.handle); });
  seat.payload = comm::staged(world, std::move(copies));
  return seat;
}

}  // namespace

int default_ordinal(Communicator& world, int devices) {
  const auto machines = world.all_gather_strings(comm::this_host().machine);
  const auto me = machines.begin() + world.rank();
  return static_cast<int>(std::count(machines.begin(), me, *me)) % devices;
}

Seat open_seat(const Config& config, const DeviceChoice& choice, Communicator& world) {
  const TrafficScope scope(world, TrafficClass::setup);
  if (config.device == "cuda") return open_cuda_seat(config, choice, world);
  if (config.comm.backend == "nccl") {  // on all ranks: they were given the same
    throw ConfigError("comm.backend: nccl carries the memory of CUDA devices, but device is " +
                      config.device);
  }
  return {kernels::open_backend(config.device), std::nullopt};
}

}  // namespace orthrus::runtime
