// Built without oneDNN.

#include "kernels/cpu/f32_product.hpp"

namespace orthrus::kernels::cpu {

F32Product onednn_f32_product() { return nullptr; }

}  // namespace orthrus::kernels::cpu
