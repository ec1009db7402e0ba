#include <orthrus/error.hpp>
#include <orthrus/nccl.hpp>

namespace orthrus {

NcclReport nccl_report() {
  NcclReport report;
  report.problem =
      "this build has no NCCL: configure with -DORTHRUS_WITH_CUDA=ON -DORTHRUS_WITH_NCCL=ON";
  return report;
}

bool nccl_available() { return false; }

Communicator open_nccl(Communicator&, int, void*) { throw ConfigError(nccl_report().problem); }

}  // namespace orthrus
