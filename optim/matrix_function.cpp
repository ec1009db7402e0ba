#include "optim/matrix_function.hpp"

#include <algorithm>
#include <orthrus/error.hpp>

#include "kernels/device_memory.hpp"
#include "optim/lmo.hpp"
#include "optim/rule.hpp"

namespace orthrus::optim {

std::optional<Mode> mode_named(std::string_view name) {
  for (std::size_t i = 0; i < mode_count; ++i) {
    if (name_of(static_cast<Mode>(i)) == name) return static_cast<Mode>(i);
  }
  return std::nullopt;
}

std::size_t whole_matrix_workspace_bytes(const MatrixRule& rule, const Lmo& lmo, Index rows,
                                         Index cols) {
  const Index lines = rule.line_count(rows, cols);
  return std::max(lmo.workspace_bytes(rows, cols),
                  static_cast<std::size_t>(lines) * sizeof(double));
}

void scale_factors(const MatrixRule& rule, MatrixView lines, Index length, std::span<double> sums,
                   kernels::Backend& backend) {
  kernels::OnHost<double> factors(backend, sums.data(), sums.size());
  kernels::OnHost<float> state(backend, static_cast<float*>(lines.data),
                               static_cast<std::size_t>(lines.size()));
  for (double& sum : factors.span()) sum = std::max(sum, 0.0);  // rounding may leave less
  rule.line_factors({state.data(), lines.rows, lines.cols, lines.ld, lines.dtype}, length,
                    factors.span());
  state.put_back();
  factors.put_back();
}

int whole_matrix(const MatrixRule& rule, const Lmo& lmo, MatrixView x, MatrixView lines,
                 std::span<std::byte> work, kernels::Backend& backend) {
  lmo(x, work, backend);
  const Lines scaled = rule.scaled_lines(x.rows, x.cols);
  if (scaled != Lines::none) {
    const bool columns = scaled == Lines::columns;
    const Index n = columns ? x.cols : x.rows;
    expects(work.size() >= static_cast<std::size_t>(n) * sizeof(double), "work is too small");
    auto* sums = reinterpret_cast<double*>(work.data());
    const MatrixView view = columns ? matrix_view(sums, 1, n) : matrix_view(sums, n, 1);
    backend.line_sum_squares(x, columns, view);
    scale_factors(rule, lines, columns ? x.rows : x.cols,
                  std::span(sums, static_cast<std::size_t>(n)), backend);
    backend.scale_lines(view, columns, x);
  }
  return lmo.orthogonalizes() ? 1 : 0;
}

}  // namespace orthrus::optim
