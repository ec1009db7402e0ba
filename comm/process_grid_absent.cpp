#include <orthrus/error.hpp>

#include "comm/process_grid.hpp"

namespace orthrus::comm {
namespace {

[[noreturn]] void refuse() {
  throw ConfigError(
      "block_cyclic: this build has no ScaLAPACK; configure with -DORTHRUS_WITH_SCALAPACK=ON where "
      "libscalapack-openmpi-dev is installed");
}

}  // namespace

bool ProcessGrid::available() noexcept { return false; }
ProcessGrid::ProcessGrid(const Communicator&) { refuse(); }
void ProcessGrid::Context::release(Handle) noexcept {}
void ProcessGrid::gram(float, const BlockCyclic&, const float*, float, float*,
                       Communicator&) const {
  refuse();
}
void ProcessGrid::multiply(float, const float*, const BlockCyclic&, const float*, float, float*,
                           Communicator&) const {
  refuse();
}

}  // namespace orthrus::comm
