#include "optim/direction.hpp"

#include <cmath>
#include <orthrus/error.hpp>

#include "kernels/backend.hpp"
#include "kernels/carve.hpp"
#include "optim/block_cyclic_root.hpp"
#include "optim/lmo.hpp"
#include "optim/rule.hpp"

namespace orthrus::optim {

double Direction::scale(const Lmo& lmo, Index rows, Index cols) const {
  return lmo_use() == LmoUse::none ? 1 : lmo.scale(rows, cols);
}
bool Direction::orthogonalizes(const Lmo& lmo) const { return lmo.orthogonalizes(); }
bool Direction::waits(const Lmo& lmo, Index side) const { return lmo.waits(side); }
double Direction::flops(const Lmo& lmo, Index rows, Index cols) const {
  return lmo.flops(rows, cols);
}
std::string Direction::description(const Lmo& lmo, Index side) const {
  return lmo.description(side);
}

std::size_t Direction::workspace_bytes(const Lmo& lmo, Index rows, Index cols) const {
  return lmo.workspace_bytes(rows, cols);
}
void Direction::make(const Whole& m, const Lmo& lmo, const StepScalars&, std::span<std::byte> work,
                     kernels::Backend& backend) const {
  lmo(m.x, work, backend);
}

std::size_t Direction::root_bytes(const Lmo& lmo, Index rows, Index cols) const {
  return lmo.root_bytes(rows, cols);
}
std::size_t Direction::root_workspace_bytes(const Lmo& lmo, Index rows, Index cols) const {
  return lmo.root_workspace_bytes(rows, cols);
}
void Direction::make_with_root(const Whole& m, const Lmo& lmo, const StepScalars&,
                               std::span<std::byte> root, std::span<std::byte> work,
                               kernels::Backend& backend) const {
  lmo.with_root(m.x, root, work, backend);
}
void Direction::undo(const Lmo& lmo, const StepScalars&, std::span<std::byte> root,
                     std::span<const MatrixView>, ConstMatrixView e, MatrixView c,
                     std::span<std::byte> work, kernels::Backend& backend) const {
  lmo.undo(root, e, c, work, backend);
}

bool Direction::has_gram_form(const Lmo& lmo, Index side) const { return lmo.has_gram_form(side); }
// Six iterations lift the rounding of an f32 sum above what mode gram promises (kernels/gram.hpp).
bool Direction::sums_in_f64(const Lmo& lmo) const { return lmo.iterations().size() > 5; }
double Direction::gram_flops(const Lmo& lmo, Index side) const { return lmo.gram_flops(side); }
std::size_t Direction::gram_workspace_bytes(const Lmo& lmo, Index side, bool with_root) const {
  return lmo.gram_workspace_bytes(side) +
         (with_root ? kernels::piece_bytes(side, side, DType::f32) : 0);
}
void Direction::gram(const GramForm& form, const Lmo& lmo, const StepScalars&,
                     std::span<std::byte> work, kernels::Backend& backend) const {
  const MatrixView r = form.r;
  MatrixView before;  // R, which is spoiled
  if (form.with_root) {
    before = kernels::carve(work, r.rows, r.cols, DType::f32);
    backend.convert(r, 1, before);
  }
  lmo.gram(r, std::ldexp(lmo.options().eps, -form.exponent), form.q, form.squares, work, backend);
  if (form.with_root) {  // R^½ = QR
    backend.gemm(1, form.q, kernels::Transpose::no, before, kernels::Transpose::no, 0, r);
  }
}

GridRoot Direction::grid_root(const StepScalars&) const { return {}; }
void Direction::settle(const GridRootReport&, const Whole&, kernels::Backend&) const {}

const Direction& lmo_direction() {
  static const Direction direction;
  return direction;
}

}  // namespace orthrus::optim
