#include <orthrus/error.hpp>

#include "comm/cuda_copies.hpp"

namespace orthrus::comm {

std::shared_ptr<Copies> cuda_copies(int, void*) {
  throw ConfigError("this build has no CUDA: configure with -DORTHRUS_WITH_CUDA=ON");
}

std::shared_ptr<Copies> cuda_copies_to_device(int) { return cuda_copies(0, nullptr); }

}  // namespace orthrus::comm
