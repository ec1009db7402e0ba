// Built without oneDNN.

#include "kernels/cpu/bf16_product.hpp"

namespace orthrus::kernels::cpu {

std::unique_ptr<Bf16Product> open_onednn_product() { return nullptr; }

}  // namespace orthrus::kernels::cpu
