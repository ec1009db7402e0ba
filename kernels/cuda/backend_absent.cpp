#include "kernels/check.hpp"
#include "kernels/devices.hpp"

namespace orthrus::kernels {

std::unique_ptr<Backend> open_cuda() {
  throw_config_error(
      "device 'cuda': this build has no CUDA backend: configure with -DORTHRUS_WITH_CUDA=ON");
}

std::unique_ptr<Backend> open_cuda_on(int, Stream) { return open_cuda(); }
Stream cuda_default_stream() { return {}; }

}  // namespace orthrus::kernels
