#include "optim/block_cyclic_root.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <orthrus/error.hpp>
#include <utility>

#include "comm/cost.hpp"
#include "kernels/backend.hpp"
#include "kernels/carve.hpp"
#include "kernels/root_coefficients.hpp"

namespace orthrus::optim {
namespace {

using comm::BlockCyclic;
using kernels::carve;
using kernels::piece_bytes;

constexpr int squares = 5;

/// As many steps as the smallest eigenvalue that the least damping leaves takes.
const kernels::RootPlan& steps() {
  constexpr double least = BlockCyclicRoot::least_damping / (1 + BlockCyclicRoot::least_damping);
  constexpr kernels::RootOptions defaults;
  static const kernels::RootPlan plan =
      kernels::plan_root(2, least, defaults.tolerance, defaults.safety, defaults.most_steps);
  return plan;
}

/// Calls visit(place) for the diagonal elements that rank `rank` has.
template <class Visit>
void on_diagonal(const BlockCyclic& square, int rank, Visit&& visit) {
  for (Index i = 0; i < square.rows.extent; ++i) {
    const BlockCyclic::Place place = square.place(i, i);
    if (place.rank == rank) visit(place.index);
  }
}

}  // namespace

BlockCyclicRoot::BlockCyclicRoot(Index m, Index n, std::span<const Region> pieces, int rank)
    : rank_(rank),
      move_(m, n, pieces, rank),
      triangle_(comm::Redistribution::of_triangle(comm::gram_layout(move_.layout()), rank)),
      square_(comm::gram_layout(move_.layout())),
      mirror_(square_, rank),
      buffer_size_(std::max({move_.local_size(), move_.piece_size(), mirror_.scratch_size(),
                             triangle_.piece_size(), triangle_.local_size()})) {
  comm::check_grid_sizes(move_.layout());
}

std::size_t BlockCyclicRoot::workspace_bytes() const noexcept {
  return 2 * piece_bytes(1, buffer_size_, DType::f32) +
         squares * piece_bytes(1, square_.local_size(rank_), DType::f32) +
         piece_bytes(1, triangle_.piece_size(), DType::f32);
}

double BlockCyclicRoot::flops(Index m, Index n) {
  const auto side = static_cast<double>(std::min(m, n));
  return 3 * side * static_cast<double>(m) * static_cast<double>(n) +
         7 * steps().steps * side * side * side;
}

int BlockCyclicRoot::products() { return 4 * steps().steps; }

Traffic BlockCyclicRoot::traffic(Index max_chunk) const {
  const Traffic mirror = mirror_.traffic(max_chunk);
  const Traffic gram = comm::gram_traffic(square_, rank_) + mirror;
  const Traffic product = comm::product_traffic(square_, rank_);
  const auto sums = [&](Index n) {
    return cost::all_reduce(n, square_.grid().ranks(), rank_, sizeof(double), max_chunk);
  };
  // G, X and back; A and its root, each there and back.
  Traffic t = move_.traffic_to_grid(max_chunk) + move_.traffic(max_chunk);
  t += triangle_.traffic(max_chunk) + triangle_.traffic(max_chunk);
  t += comm::gram_traffic(move_.layout(), rank_) + mirror + sums(3);
  for (int k = 0; k < steps().steps; ++k) {
    t += gram;
    if (k > 0) t += product + mirror;
    if (k + 1 < steps().steps) t += product + mirror + product + mirror;
  }
  t += product + product + sums(1) + mirror;
  return t + comm::product_traffic(move_.layout(), rank_);
}

GridRootReport BlockCyclicRoot::operator()(float* x, const float* g, float* factor, float* root,
                                           const GridRoot& of, std::span<std::byte> work,
                                           const comm::ProcessGrid& grid, Communicator& comm,
                                           kernels::Backend& backend) {
  expects(of.damping.of_norm >= least_damping, "a root on a grid needs more damping");
  expects(work.size() >= workspace_bytes(), "work is smaller than workspace_bytes says");
  const BlockCyclic& layout = move_.layout();
  expects(grid.shape() == layout.grid() && comm.rank() == rank_,
          "a root on a grid of other ranks than it was planned for");
  const Index size = square_.local_size(rank_);
  const auto floats = [&](Index count) {
    return static_cast<float*>(carve(work, 1, count, DType::f32).data);
  };
  float* const lines = floats(buffer_size_);
  float* const spare = floats(buffer_size_);
  float* a = floats(size);
  float* s = floats(size);
  float* k = floats(size);
  float* next = floats(size);
  float* const whole = floats(size);  // A/ν, once more
  float* const run = floats(triangle_.piece_size());
  const auto view = [&](float* square) { return matrix_view(square, 1, size); };
  const auto add_diagonal = [&](double value, float* to) {
    on_diagonal(square_, rank_, [&](Index i) { to[i] += static_cast<float>(value); });
  };
  /// What rests here ← what this rank has of a square, if it is to.
  const auto rest = [&](const float* square, float* to, bool stays) {
    triangle_.from_grid(square, spare, lines, run, comm);
    if (stays) std::copy_n(run, triangle_.piece_size(), to);
  };

  // A ← βA + wGGᵀ
  move_.to_grid(g, lines, spare, lines, comm);
  std::fill_n(a, size, 0.0F);
  triangle_.to_grid(factor, run, spare, a, comm);
  grid.gram(static_cast<float>(of.weight), layout, lines, static_cast<float>(of.beta), a, comm);
  mirror_(a, spare, comm);
  std::array<double, 3> sums{0, backend.sum_squares(view(a)),
                             backend.sum_squares(matrix_view(root, 1, triangle_.piece_size()))};
  on_diagonal(square_, rank_, [&](Index i) { sums[0] += static_cast<double>(a[i]); });
  comm.all_reduce(std::span<double>(sums));
  GridRootReport report;
  report.joined = std::isfinite(sums[1]);
  rest(a, factor, report.joined);

  // D/ν, ν = ‖A‖ + δ; of A = 0 it is 0, as its root is to be.
  const double norm = std::sqrt(sums[1]) / of.correction;
  const double damping = of.damping.on_diagonal(sums[0] / of.correction, norm, square_.rows.extent);
  const double scale = norm + damping;
  backend.convert(view(a), scale > 0 ? 1 / (of.correction * scale) : 0, view(a));
  if (scale > 0) add_diagonal(damping / scale, a);
  std::copy_n(a, size, whole);

  // S = bA + cA², K ← (aI + S)K, A ← A(aI + S)²
  for (int t = 0; t < steps().steps; ++t) {
    const kernels::RootStep w = steps().table->step(t, kernels::RootOptions{}.safety);
    std::copy_n(a, size, s);
    grid.gram(static_cast<float>(w.c), square_, a, static_cast<float>(w.b), s, comm);
    mirror_(s, spare, comm);
    const auto multiply = [&](float*& y) {
      std::copy_n(y, size, next);
      grid.multiply(1, s, square_, y, static_cast<float>(w.a), next, comm);
      std::swap(y, next);
      mirror_(y, spare, comm);
    };
    if (t == 0) {
      std::copy_n(s, size, k);
      add_diagonal(w.a, k);
    } else {
      multiply(k);
    }
    if (t + 1 == steps().steps) break;
    multiply(a);
    multiply(a);
  }

  // K·D/ν·K is I.
  std::fill_n(next, size, 0.0F);
  grid.multiply(1, whole, square_, k, 0, next, comm);
  std::fill_n(a, size, 0.0F);
  grid.multiply(1, k, square_, next, 0, a, comm);
  add_diagonal(-1, a);
  double residual = backend.sum_squares(view(a));
  comm.all_reduce(std::span(&residual, 1));
  report.residual = std::sqrt(residual);
  report.renewed =
      report.joined && (scale == 0 || report.residual <= kernels::RootOptions{}.accepted_residual);
  report.serves = report.renewed || sums[2] > 0;
  backend.convert(view(k), scale > 0 ? 1 / std::sqrt(scale) : 0, view(k));
  rest(k, root, report.renewed);

  // The root that serves, new or not.
  triangle_.to_grid(root, run, spare, k, comm);
  mirror_(k, spare, comm);
  move_.to_grid(x, lines, spare, lines, comm);
  std::fill_n(spare, layout.local_size(rank_), 0.0F);
  grid.multiply(static_cast<float>(of.scale), k, layout, lines, 0, spare, comm);
  move_.from_grid(spare, lines, spare, x, comm);
  return report;
}

}  // namespace orthrus::optim
