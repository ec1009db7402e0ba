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
  return std::max(rule.direction().workspace_bytes(lmo, rows, cols),
                  static_cast<std::size_t>(lines) * sizeof(double));
}

namespace {

/// The state per line.
MatrixView lines_of(const MatrixRule& rule, std::span<const MatrixView> state) {
  const auto specs = rule.state();
  for (std::size_t k = 0; k < specs.size(); ++k) {
    if (specs[k].of_matrix()) return state[k];
  }
  return {};
}

}  // namespace

void scale_factors(const MatrixRule& rule, std::span<const MatrixView> state, Index length,
                   std::span<double> sums, kernels::Backend& backend) {
  const MatrixView lines = lines_of(rule, state);
  kernels::OnHost<double> factors(backend, sums.data(), sums.size());
  kernels::OnHost<float> moments(backend, static_cast<float*>(lines.data),
                                 static_cast<std::size_t>(lines.size()));
  for (double& sum : factors.span()) sum = std::max(sum, 0.0);  // rounding may leave less
  rule.line_factors({moments.data(), lines.rows, lines.cols, lines.ld, lines.dtype}, length,
                    factors.span());
  moments.put_back();
  factors.put_back();
}

namespace {

/// D's lines scaled as the rule wants them. @param[out] factors  a double per line.
void scale_directions(const MatrixRule& rule, const Whole& m, double* factors,
                      kernels::Backend& backend) {
  const MatrixView x = m.x;
  const Lines scaled = rule.scaled_lines(x.rows, x.cols);
  if (scaled == Lines::none) return;
  const bool columns = scaled == Lines::columns;
  const Index n = columns ? x.cols : x.rows;
  const MatrixView view = columns ? matrix_view(factors, 1, n) : matrix_view(factors, n, 1);
  backend.line_sum_squares(x, columns, view);
  scale_factors(rule, m.state, columns ? x.rows : x.cols,
                std::span(factors, static_cast<std::size_t>(n)), backend);
  backend.scale_lines(view, columns, x);
}

std::size_t factor_bytes(const MatrixRule& rule, Index rows, Index cols) {
  return static_cast<std::size_t>(rule.line_count(rows, cols)) * sizeof(double);
}

}  // namespace

void whole_matrix(const MatrixRule& rule, const Lmo& lmo, const Whole& m, const StepScalars& s,
                  std::span<std::byte> work, kernels::Backend& backend) {
  const MatrixView x = m.x;
  expects(work.size() >= factor_bytes(rule, x.rows, x.cols), "work is too small");
  const Direction& direction = rule.direction();
  auto run = [&] { direction.make(m, lmo, s, work, backend); };
  // Of X alone, and of the same numbers in every step.
  const bool replays = &direction == &lmo_direction();
  if (!replays || direction.waits(lmo, std::min(x.rows, x.cols))) {
    run();
  } else {
    const auto address = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
    const auto number = [](Index n) { return static_cast<std::uint64_t>(n); };
    backend.replay({address(&lmo), address(x.data), number(x.rows), number(x.cols), number(x.ld),
                    address(work.data())},
                   run);
  }
  scale_directions(rule, m, reinterpret_cast<double*>(work.data()), backend);
}

std::size_t undo_bytes(const MatrixRule& rule, const Lmo& lmo, Index rows, Index cols) {
  return kernels::padded(rule.direction().root_bytes(lmo, rows, cols)) +
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
  undo.root = take(rule.direction().root_bytes(lmo, rows, cols));
  undo.factors = take(factor_bytes(rule, rows, cols));
  return undo;
}

std::size_t undo_workspace_bytes(const MatrixRule& rule, const Lmo& lmo, Index rows, Index cols) {
  return rule.direction().root_workspace_bytes(lmo, rows, cols);
}

void whole_matrix_with_undo(const MatrixRule& rule, const Lmo& lmo, const Whole& m,
                            const StepScalars& s, const Undo& undo, std::span<std::byte> work,
                            kernels::Backend& backend) {
  rule.direction().make_with_root(m, lmo, s, undo.root, work, backend);
  scale_directions(rule, m, reinterpret_cast<double*>(undo.factors.data()), backend);
}

void invert_factors(double* factors, Index count, kernels::Backend& backend) {
  kernels::OnHost<double> here(backend, factors, static_cast<std::size_t>(count));
  for (double& f : here.span()) f = f > 0 ? 1 / f : 0;
  here.put_back();
}

void undo_matrix(const MatrixRule& rule, const Lmo& lmo, const Undo& undo, const Whole& m,
                 const StepScalars& s, MatrixView c, std::span<std::byte> work,
                 kernels::Backend& backend) {
  const MatrixView e = m.x;
  const Lines scaled = rule.scaled_lines(e.rows, e.cols);
  if (scaled != Lines::none) {
    auto* const factors = reinterpret_cast<double*>(undo.factors.data());
    const Index n = rule.line_count(e.rows, e.cols);
    invert_factors(factors, n, backend);
    const bool columns = scaled == Lines::columns;
    backend.scale_lines(columns ? matrix_view(factors, 1, n) : matrix_view(factors, n, 1), columns,
                        e);
  }
  rule.direction().undo(lmo, s, undo.root, m.state, e, c, work, backend);
}

}  // namespace orthrus::optim
