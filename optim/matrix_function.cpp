#include "optim/matrix_function.hpp"

#include <algorithm>
#include <orthrus/error.hpp>

#include "kernels/carve.hpp"
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

namespace {

/// D's lines scaled as the rule wants them. @param[out] factors  a double per line.
void scale_directions(const MatrixRule& rule, MatrixView x, MatrixView lines, double* factors,
                      kernels::Backend& backend) {
  const Lines scaled = rule.scaled_lines(x.rows, x.cols);
  if (scaled == Lines::none) return;
  const bool columns = scaled == Lines::columns;
  const Index n = columns ? x.cols : x.rows;
  const MatrixView view = columns ? matrix_view(factors, 1, n) : matrix_view(factors, n, 1);
  backend.line_sum_squares(x, columns, view);
  scale_factors(rule, lines, columns ? x.rows : x.cols,
                std::span(factors, static_cast<std::size_t>(n)), backend);
  backend.scale_lines(view, columns, x);
}

std::size_t factor_bytes(const MatrixRule& rule, Index rows, Index cols) {
  return static_cast<std::size_t>(rule.line_count(rows, cols)) * sizeof(double);
}

}  // namespace

int whole_matrix(const MatrixRule& rule, const Lmo& lmo, MatrixView x, MatrixView lines,
                 std::span<std::byte> work, kernels::Backend& backend) {
  expects(work.size() >= factor_bytes(rule, x.rows, x.cols), "work is too small");
  auto run = [&] { lmo(x, work, backend); };
  if (lmo.waits(std::min(x.rows, x.cols))) {
    run();
  } else {
    const auto address = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
    const auto number = [](Index n) { return static_cast<std::uint64_t>(n); };
    backend.replay({address(&lmo), address(x.data), number(x.rows), number(x.cols), number(x.ld),
                    address(work.data())},
                   run);
  }
  scale_directions(rule, x, lines, reinterpret_cast<double*>(work.data()), backend);
  return lmo.orthogonalizes() ? 1 : 0;
}

std::size_t undo_bytes(const MatrixRule& rule, const Lmo& lmo, Index rows, Index cols) {
  return kernels::padded(lmo.root_bytes(rows, cols)) +
         kernels::padded(factor_bytes(rule, rows, cols));
}

Undo carve_undo(const MatrixRule& rule, const Lmo& lmo, Index rows, Index cols,
                std::span<std::byte>& work) {
  const auto take = [&work](std::size_t bytes) {
    const auto piece = work.first(bytes);
    work = work.subspan(kernels::padded(bytes));
    return piece;
  };
  Undo undo;
  undo.root = take(lmo.root_bytes(rows, cols));
  undo.factors = take(factor_bytes(rule, rows, cols));
  return undo;
}

std::size_t undo_workspace_bytes(const MatrixRule&, const Lmo& lmo, Index rows, Index cols) {
  return lmo.root_workspace_bytes(rows, cols);
}

int whole_matrix_with_undo(const MatrixRule& rule, const Lmo& lmo, MatrixView x, MatrixView lines,
                           const Undo& undo, std::span<std::byte> work, kernels::Backend& backend) {
  lmo.with_root(x, undo.root, work, backend);
  scale_directions(rule, x, lines, reinterpret_cast<double*>(undo.factors.data()), backend);
  return lmo.orthogonalizes() ? 1 : 0;
}

void invert_factors(double* factors, Index count, kernels::Backend& backend) {
  kernels::OnHost<double> here(backend, factors, static_cast<std::size_t>(count));
  for (double& f : here.span()) f = f > 0 ? 1 / f : 0;
  here.put_back();
}

void undo_matrix(const MatrixRule& rule, const Lmo& lmo, const Undo& undo, MatrixView e,
                 MatrixView c, std::span<std::byte> work, kernels::Backend& backend) {
  const Lines scaled = rule.scaled_lines(e.rows, e.cols);
  if (scaled != Lines::none) {
    auto* const factors = reinterpret_cast<double*>(undo.factors.data());
    const Index n = rule.line_count(e.rows, e.cols);
    invert_factors(factors, n, backend);
    const bool columns = scaled == Lines::columns;
    backend.scale_lines(columns ? matrix_view(factors, 1, n) : matrix_view(factors, n, 1), columns,
                        e);
  }
  lmo.undo(undo.root, e, c, work, backend);
}

}  // namespace orthrus::optim
