#include "kernels/commuting.hpp"

#include "kernels/backend.hpp"

namespace orthrus::kernels {

void commuting_product(double alpha, ConstMatrixView a, ConstMatrixView b, double beta,
                       MatrixView c, const Panels& panels, Backend& backend) {
  const Index m = c.rows;
  for (Index i = 0; i < m; i += panels.left.rows) {
    const Index rows = std::min(panels.left.rows, m - i);
    const Index cols = i + rows;
    const MatrixView to = block(c, i, 0, rows, cols);
    const MatrixView out = c.dtype == b.dtype ? to : part(panels.out, rows, cols, b.dtype);
    ConstMatrixView left = block(a, i, 0, rows, m);
    if (out.data != left.data) backend.convert(block(left, 0, 0, rows, cols), 1, out);
    if (a.dtype != b.dtype || a.data == c.data) {
      const MatrixView copy = part(panels.left, rows, m, b.dtype);
      backend.convert(left, 1, copy);
      left = copy;
    }
    backend.gemm(alpha, left, Transpose::no, block(b, 0, 0, m, cols), Transpose::no, beta, out);
    if (c.dtype != b.dtype) backend.convert(out, 1, to);
  }
  backend.mirror_lower(c);
}

}  // namespace orthrus::kernels
