#include "optim/matrix_function.hpp"

#include "kernels/backend.hpp"
#include "optim/lmo.hpp"

namespace orthrus::optim {

std::size_t matrix_function_workspace_bytes(Mode, const Lmo& lmo, Index rows, Index cols) {
  return lmo.workspace_bytes(rows, cols);
}

int matrix_function(Mode, const Lmo& lmo, MatrixView x, std::span<std::byte> work,
                    kernels::Backend& backend) {
  lmo(x, work, backend);
  return lmo.orthogonalizes() ? 1 : 0;
}

}  // namespace orthrus::optim
