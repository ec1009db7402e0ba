#pragma once
/// @file
/// Ranks and devices of tests that need real ones. A test that skips skips on all ranks, and all
/// tests of one program skip for one reason: ctest takes the word SKIPPED for the whole program.

#include <orthrus/error.hpp>
#include <orthrus/mpi.hpp>
#include <orthrus/nccl.hpp>
#include <string>

#include "comm/conformance.hpp"
#include "comm/cuda_copies.hpp"

namespace devices {

using orthrus::Communicator;

/// The rank on this host: the number of its device.
inline int local_rank() {
  MPI_Comm host = MPI_COMM_NULL;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
  int rank = 0;
  MPI_Comm_rank(host, &rank);
  MPI_Comm_free(&host);
  return rank;
}

enum class Need : bool { any, own };

/// Why not every rank has a device, or one of its own and NCCL; empty when they do. Equal on all
/// ranks.
inline std::string lack(Need need) {
  std::string mine;
  if (need == Need::own) {
    const orthrus::NcclReport report = orthrus::nccl_report();
    mine = report.problem;
    if (mine.empty() && local_rank() >= report.devices) {
      mine = std::to_string(report.devices) + " device(s) for more ranks";
    }
  } else {
    try {
      static_cast<void>(orthrus::comm::cuda_copies(0));
    } catch (const orthrus::Error& e) {
      mine = e.what();
    }
  }
  Communicator world = orthrus::borrow(MPI_COMM_WORLD);
  for (const std::string& text : world.all_gather_strings(mine)) {
    if (!text.empty()) return text;
  }
  return {};
}

/// Callers on the host, ranks on the device: so that the same tests run over NCCL.
inline Communicator from_host(const Communicator& c, int device) {
  return orthrus::comm::staged(c, orthrus::comm::cuda_copies_to_device(device));
}

/// Nobody counts beneath: the counts of the front are compared with cost.hpp alone.
inline conformance::Independent as_counted(const Communicator& c) {
  return [&c] { return c.traffic() + c.traffic(orthrus::TrafficClass::setup); };
}

}  // namespace devices
