#include "optim/block_cyclic_msign.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <orthrus/error.hpp>
#include <utility>

#include "comm/cost.hpp"
#include "kernels/backend.hpp"

namespace orthrus::optim {
namespace {

constexpr std::size_t piece_alignment = 256;

std::size_t piece_bytes(Index elements) {
  const std::size_t bytes = static_cast<std::size_t>(elements) * sizeof(float);
  return (bytes + piece_alignment - 1) / piece_alignment * piece_alignment;
}

/// Cuts an array off the front of `work`.
float* carve(std::span<std::byte>& work, Index elements) {
  auto* const piece = reinterpret_cast<float*>(work.data());
  work = work.subspan(piece_bytes(elements));
  return piece;
}

/// 1/ν. @return 1 for a zero matrix, NaN for one that is not finite.
double reciprocal_norm(const float* x, Index size, double safety,
                       const kernels::MsignOptions& options, Communicator& comm,
                       kernels::Backend& backend) {
  double squares = backend.sum_squares(matrix_view(x, 1, size));
  comm.all_reduce(std::span(&squares, 1));
  if (!std::isfinite(squares)) return std::numeric_limits<double>::quiet_NaN();
  if (squares == 0) return 1;
  double norm = safety * std::sqrt(squares);
  if (options.eps_mode == kernels::EpsMode::add) norm += options.eps;
  if (options.eps_mode == kernels::EpsMode::clamp) norm = std::max(norm, options.eps);
  return 1 / norm;
}

Index buffer_size(const comm::BlockCyclic& x, const comm::Mirror& mirror, Index piece_size,
                  int rank) {
  return std::max({x.local_size(rank), mirror.scratch_size(), piece_size});
}

std::size_t work_bytes(const comm::BlockCyclic& x, Index buffer, int rank) {
  return 2 * piece_bytes(buffer) + 2 * piece_bytes(comm::gram_layout(x).local_size(rank));
}

Traffic iteration_traffic(const comm::BlockCyclic& x, const comm::Mirror& mirror, int rank,
                          std::span<const kernels::Quintic> iterations, Index max_chunk) {
  const Traffic gram = comm::gram_traffic(x, rank) + mirror.traffic(max_chunk);
  const Traffic square = comm::gram_traffic(comm::gram_layout(x), rank) + mirror.traffic(max_chunk);
  const Traffic product = comm::product_traffic(x, rank);
  Traffic t = cost::all_reduce(1, x.grid().ranks(), rank, sizeof(double), max_chunk);
  for (const kernels::Quintic& p : iterations) {
    t += gram + product;
    if (p.c != 0) t += square;
  }
  return t;
}

}  // namespace

Traffic block_cyclic_msign_traffic(Index m, Index n, int ranks, int rank,
                                   std::span<const kernels::Quintic> iterations, Index max_chunk) {
  const comm::BlockCyclic x = comm::block_cyclic(m, n, ranks);
  return iteration_traffic(x, comm::Mirror{comm::gram_layout(x), rank}, rank, iterations,
                           max_chunk);
}

std::size_t block_cyclic_msign_workspace_bytes(Index m, Index n, Index piece_size, int ranks,
                                               int rank) {
  const comm::BlockCyclic x = comm::block_cyclic(m, n, ranks);
  const comm::Mirror mirror{comm::gram_layout(x), rank};
  return work_bytes(x, buffer_size(x, mirror, piece_size, rank), rank);
}

BlockCyclicMsign::BlockCyclicMsign(Index m, Index n, std::span<const Region> pieces, int rank)
    : rank_(rank),
      move_(m, n, pieces, rank),
      mirror_(comm::gram_layout(move_.layout()), rank),
      buffer_size_(buffer_size(move_.layout(), mirror_, move_.piece_size(), rank)) {
  comm::check_grid_sizes(move_.layout());
}

std::size_t BlockCyclicMsign::workspace_bytes() const noexcept {
  return work_bytes(move_.layout(), buffer_size_, rank_);
}

Traffic BlockCyclicMsign::traffic(std::span<const kernels::Quintic> iterations,
                                  Index max_chunk) const {
  return move_.traffic(max_chunk) +
         iteration_traffic(move_.layout(), mirror_, rank_, iterations, max_chunk);
}

void BlockCyclicMsign::operator()(float* piece, std::span<const kernels::Quintic> iterations,
                                  double safety, const kernels::MsignOptions& options,
                                  std::span<std::byte> work, const comm::ProcessGrid& grid,
                                  Communicator& comm, kernels::Backend& backend) {
  expects(options.dtype == DType::f32, "msign on a grid iterates in f32");
  expects(!iterations.empty(), "msign without iterations");
  expects(safety > 0, "msign with a safety factor that is not positive");
  expects(work.size() >= workspace_bytes(), "work is smaller than workspace_bytes says");
  const comm::BlockCyclic& layout = move_.layout();
  const comm::BlockCyclic square = comm::gram_layout(layout);
  expects(grid.shape() == layout.grid() && comm.rank() == rank_,
          "msign on a grid of other ranks than it was planned for");

  float* current = carve(work, buffer_size_);
  float* next = carve(work, buffer_size_);
  float* const gram = carve(work, square.local_size(rank_));
  float* const polynomial = carve(work, square.local_size(rank_));
  const Index size = move_.local_size();
  const Index square_size = square.local_size(rank_);

  move_.to_grid(piece, current, next, current, comm);
  const double scale = reciprocal_norm(current, size, safety, options, comm, backend);
  // In f64: 1/ν may lie outside the range of f32.
  for (Index i = 0; i < size; ++i) {
    current[i] = static_cast<float>(scale * static_cast<double>(current[i]));
  }
  for (const kernels::Quintic& p : iterations) {
    // A = XXᵀ, then X ← aX + (bA + cA²)X; `next` is the mirror's scratch until then.
    grid.gram(1, layout, current, 0, gram, comm);
    mirror_(gram, next, comm);
    const float* factor = gram;
    float weight = static_cast<float>(p.b);
    if (p.c != 0) {
      std::copy_n(gram, square_size, polynomial);
      grid.gram(static_cast<float>(p.c), square, gram, weight, polynomial, comm);
      mirror_(polynomial, next, comm);
      factor = polynomial;
      weight = 1;
    }
    std::copy_n(current, size, next);
    grid.multiply(weight, factor, layout, current, static_cast<float>(p.a), next, comm);
    std::swap(current, next);
  }
  move_.from_grid(current, next, current, piece, comm);
}

}  // namespace orthrus::optim
