// Line 7 of the walk, where it concerns several ranks: all have updated their pieces of a bucket, W̃
// waits in f32. What is where is said in rounding.hpp.
#include <algorithm>
#include <cmath>

#include "kernels/gram.hpp"
#include "optim/matrix_function.hpp"
#include "runtime/clock.hpp"
#include "runtime/engine.hpp"

namespace orthrus {

using kernels::Transpose;
using optim::Mode;
using runtime::block;
using runtime::Carver;
using runtime::dense;
using runtime::floats;
using runtime::for_each_panel;
using runtime::Meeting;
using runtime::OwnSegment;
using runtime::Panel;
using runtime::place_of;
using runtime::row;
using runtime::StateViews;

ShardedOptimizer::Impl::RoundingBuffers ShardedOptimizer::Impl::rounding_buffers(
    std::size_t b) const {
  const runtime::RoundingSize& size = roundings_[b].size;
  Carver carver(rounding_);
  const auto take = [&](Index n) { return static_cast<float*>(carver.matrix(1, n).data); };
  RoundingBuffers buffers{};
  buffers.pieces = take(size.pieces);
  buffers.scales = take(size.scales);
  buffers.triangles = take(size.triangles);
  buffers.undo = carver.take(size.undo);
  return buffers;
}

/// A segment's weights: W̃, then E, then C.
MatrixView ShardedOptimizer::Impl::kept(const OwnSegment& own) const {
  return matrix_view(rounding_buffers(own.bucket).pieces + own.kept, own.rows, own.cols);
}

/// Its scales, as a column, that other ranks have too; empty without.
MatrixView ShardedOptimizer::Impl::shared_scales(const OwnSegment& own) const {
  if (own.shared_scale < 0) return {};
  const Grid& grid = *plan_.buckets[own.bucket].weights.grid;
  return matrix_view(rounding_buffers(own.bucket).scales + own.shared_scale,
                     scale_rows(grid, own.rows), 1);
}

std::span<std::byte> ShardedOptimizer::Impl::own_undo(const OwnSegment& own) const {
  return rounding_buffers(own.bucket).undo.subspan(own.undo);
}

void ShardedOptimizer::Impl::round_together(std::size_t b) {
  const runtime::Bucket& bucket = plan_.buckets[b];
  const auto start = runtime::Clock::now();
  const StepTimes before = report_.ms;
  share_scales(b);
  for (const OwnSegment& own : segments(b)) {
    if (own.size() > 0) round_kept(own);
  }
  const runtime::Group& group = plan_.group(bucket.parameters.front());
  if (group.lmo != nullptr && group.feeds_back()) {
    if (!meets(b)) {
      for (const OwnSegment& own : segments(b)) {
        if (own.size() > 0) undo_own(own);
      }
    } else if (optim::uses_gram(bucket.mode) || bucket.mode == Mode::block_cyclic) {
      if (bucket.mode != Mode::gram) sum_roots(b);
      undo_pieces(b);
    } else {
      undo_at_owners(b);
    }
    add_corrections(b);
  }
  if (poisons_) poison(rounding_);
  const double elsewhere = report_.ms.meet - before.meet + report_.ms.update - before.update;
  report_.ms.update += runtime::ms_since(start) - elsewhere;
}

/// The largest weight of every row (or tensor) that ranks share becomes its scale.
void ShardedOptimizer::Impl::share_scales(std::size_t b) {
  const Index count = roundings_[b].size.scales;
  if (count == 0) return;
  const runtime::Bucket& bucket = plan_.buckets[b];
  const Grid& grid = *bucket.weights.grid;
  float* const scales = rounding_buffers(b).scales;
  backend_->fill(0, row(scales, count));
  double largest = 0;  // of the pieces of one tensor
  Index last = -1;
  for (const OwnSegment& own : segments(b)) {
    const MatrixView to = shared_scales(own);
    if (to.data == nullptr || own.size() == 0) continue;
    if (grid.extent == Grid::Extent::row) {
      backend_->abs_maxima(kept(own), grid, to);
      continue;
    }
    largest = std::max(own.shared_scale == last ? largest : 0, backend_->abs_max(kept(own)));
    last = own.shared_scale;
    backend_->fill(largest, to);
  }
  start(b, mesh_.shard.start_all_reduce({scales, count, DType::f32}, ReduceOp::max));
  wait_for(b, /*brief=*/false, "finding the largest weights of rows");
  backend_->scales_from_maxima(grid, row(scales, count));
}

/// W̃ of a segment becomes Ŵ, and E is left; an element-wise rule takes it back at once.
void ShardedOptimizer::Impl::round_kept(const OwnSegment& own) {
  const runtime::Group& group = plan_.groups[static_cast<std::size_t>(own.group)];
  const bool pulls_back = group.lmo == nullptr && kappa_[static_cast<std::size_t>(own.group)] != 0;
  for_each_block(own, [&](const Panel& panel) {
    const MatrixView residual = close_weights(own, panel, block(kept(own), panel));
    if (!pulls_back) return;
    Carver carver(scratch_);
    const MatrixView g = carver.matrix(panel.rows, panel.cols);
    load_gradient(own, panel, g);
    const StateViews state = open_state(own, panel, carver);
    pull_back(own, static_cast<const optim::ElementwiseRule&>(*group.rule),
              {residual, g, state.views(), carver.rest()}, scalars_of(own));
    close_state(own, panel, state, runtime::Rounded::correction);
  });
}

/// exchange, gather, periodic: E goes the way X went. What was sent then is not needed any more.
void ShardedOptimizer::Impl::undo_at_owners(std::size_t b) {
  const runtime::Bucket& bucket = plan_.buckets[b];
  const Meeting& meeting = meetings_[b];
  const MeetingState& buffers = meeting_states_[b];
  const bool gathers = bucket.mode == Mode::gather;
  const auto mine = [&](const OwnSegment& own) {
    return dense(buffers.back, own.meeting_offset, own.rows, own.cols, bucket.wire);
  };
  for (const OwnSegment& own : segments(b)) {
    if (own.size() > 0) backend_->convert(kept(own), 1, mine(own));
  }
  const Span pieces{buffers.back.data(), meeting.mine_size, bucket.wire};
  const Span theirs{buffers.theirs.data(), meeting.theirs_size, bucket.wire};
  start(b, gathers ? mesh_.shard.start_all_gather(pieces, meeting.counts, theirs)
                   : mesh_.shard.start_all_to_all(pieces, meeting.counts, theirs, meeting.theirs));
  wait_for(b, /*brief=*/false, "bringing together what rounding took");
  for (const Meeting::Matrix& entry : meeting.matrices) {
    if (gathers || entry.mine) undo_whole(b, entry);
  }
  if (gathers) return;
  start(b, mesh_.shard.start_all_to_all(theirs, meeting.theirs, pieces, meeting.counts));
  wait_for(b, /*brief=*/false, "returning the correction");
  for (const OwnSegment& own : segments(b)) {
    if (own.size() > 0) backend_->convert(mine(own), 1, kept(own));
  }
}

/// C of a whole matrix of which E has come; in mode gather only this rank's pieces of it are kept.
void ShardedOptimizer::Impl::undo_whole(std::size_t b, const Meeting::Matrix& entry) {
  const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(entry.matrix)];
  if (kappa_of(m) == 0) return;  // nothing is pulled back
  const runtime::Bucket& bucket = plan_.buckets[b];
  const runtime::Group& group = plan_.group(m.parameter);
  const MeetingState& buffers = meeting_states_[b];
  Carver carver(scratch_);
  const MatrixView e = carver.matrix(m.rows, m.cols);
  const MatrixView c = carver.matrix(m.rows, m.cols);
  const auto each_arrival = [&](auto&& f) {
    for (std::size_t i = entry.first; i < entry.last; ++i) {
      const Meeting::Arrival& a = meetings_[b].arrivals[i];
      f(a.region, dense(buffers.theirs, a.offset, a.region.rows, a.region.cols, bucket.wire));
    }
  };
  each_arrival([&](const Region& region, MatrixView piece) {
    backend_->convert(piece, 1, place_of(region, m, e));
  });
  std::span<std::byte> room = buffers.undo.subspan(entry.undo);
  const optim::Undo undo = optim::carve_undo(group.matrix_rule(), *group.lmo, m.rows, m.cols, room);
  optim::undo_matrix(group.matrix_rule(), *group.lmo, undo, {e, {}, state_of(b, entry.matrix)},
                     scalars_of(m), c, carver.rest(), *backend_);
  if (bucket.mode == Mode::gather) {
    for (const OwnSegment& own : segments(b)) {
      if (own.segment.matrix != entry.matrix || own.size() == 0) continue;
      backend_->convert(place_of(own.region(), m, c), 1, kept(own));
    }
    return;
  }
  each_arrival([&](const Region& region, MatrixView piece) {
    backend_->convert(place_of(region, m, c), 1, piece);
  });
}

bool ShardedOptimizer::Impl::has_piece(std::size_t b, int matrix) {
  const auto list = segments(b);
  return std::any_of(list.begin(), list.end(), [&](const OwnSegment& own) {
    return own.segment.matrix == matrix && own.size() > 0;
  });
}

/// gram_steps, block_cyclic: P⁻¹ = msign(Z)·Zᵀ, summed over pieces as the Gram matrices were.
void ShardedOptimizer::Impl::sum_roots(std::size_t b) {
  const runtime::Bucket& bucket = plan_.buckets[b];
  const MeetingState& buffers = meeting_states_[b];
  const auto directions = bucket.mode == Mode::gram_steps ? buffers.theirs : buffers.back;
  float* const triangles = rounding_buffers(b).triangles;
  for (std::size_t i = 0; i < meetings_[b].matrices.size(); ++i) {
    const int index = meetings_[b].matrices[i].matrix;
    const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(index)];
    const Index side = m.gram_side();
    float* const triangle = triangles + roundings_[b].triangles[i];
    if (kappa_of(m) == 0 || !has_piece(b, index)) {
      backend_->fill(0, row(triangle, kernels::packed_size(side)));
      continue;
    }
    Carver carver(scratch_);
    const MatrixView root = carver.matrix(side, side);
    bool any = false;
    for (const OwnSegment& own : segments(b)) {
      if (own.segment.matrix != index || own.size() == 0) continue;
      const Stacked made = stacked_piece(own, directions);
      const Index elements = runtime::lines_panel_elements(plan_, m, own.segment);
      for_each_panel(own, m.gram_of_rows, elements, [&](const Panel& panel) {
        Carver rest(carver);
        const Stacked of = stack_panel(m, panel, rest);
        load_stacked(own, m, panel, of, /*joins=*/false, rest);
        for (const auto& [d, x] : {std::pair{made.x, of.x}, std::pair{made.y, of.y}}) {
          if (x.data == nullptr) continue;
          const MatrixView o = block(d, panel);
          if (m.gram_of_rows) {
            backend_->gemm(1, o, Transpose::no, x, Transpose::yes, any ? 1 : 0, root);
          } else {
            backend_->gemm(1, o, Transpose::yes, x, Transpose::no, any ? 1 : 0, root);
          }
          any = true;
        }
      });
    }
    backend_->pack_triangle(root, triangle);
  }
  const Index all = roundings_[b].size.triangles;
  start(b, mesh_.shard.start_all_reduce({triangles, all, DType::f32}, ReduceOp::sum));
  wait_for(b, /*brief=*/false, "summing the roots");
}

/// gram, gram_steps, block_cyclic: C = P⁻¹F⁻¹E of pieces where they are, in panels.
void ShardedOptimizer::Impl::undo_pieces(std::size_t b) {
  const runtime::Bucket& bucket = plan_.buckets[b];
  const MeetingState& buffers = meeting_states_[b];
  for (std::size_t i = 0; i < meetings_[b].matrices.size(); ++i) {
    const Meeting::Matrix& entry = meetings_[b].matrices[i];
    const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(entry.matrix)];
    if (kappa_of(m) == 0 || !has_piece(b, entry.matrix)) continue;  // nothing is pulled back here
    const runtime::Group& group = plan_.group(m.parameter);
    const Index side = m.gram_side();
    Carver carver(scratch_);
    const MatrixView root = carver.matrix(side, side);
    backend_->unpack_triangle(bucket.mode == Mode::gram
                                  ? floats(buffers.back, entry.root)
                                  : rounding_buffers(b).triangles + roundings_[b].triangles[i],
                              root);
    const Index lines = group.matrix_rule().line_count(m.rows, m.cols);
    if (lines > 0) {  // of the gram side, or its mode would be another
      const auto bytes = static_cast<std::size_t>(lines) * sizeof(double);
      auto* const factors = reinterpret_cast<double*>(carver.take(bytes).data());
      backend_->convert(row(floats(buffers.back, entry.factors), lines), 1,
                        matrix_view(factors, 1, lines));
      optim::invert_factors(factors, lines, *backend_);
      backend_->scale_lines(
          m.gram_of_rows ? matrix_view(factors, 1, lines) : matrix_view(factors, lines, 1),
          m.gram_of_rows, root);
    }
    for (const OwnSegment& own : segments(b)) {
      if (own.segment.matrix != entry.matrix || own.size() == 0) continue;
      const Index elements = runtime::lines_panel_elements(plan_, m, own.segment);
      for_each_panel(own, m.gram_of_rows, elements, [&](const Panel& panel) {
        const MatrixView e = block(kept(own), panel);
        const MatrixView c = Carver(carver).matrix(panel.rows, panel.cols);
        if (m.gram_of_rows) {
          backend_->gemm(1, root, Transpose::no, e, Transpose::no, 0, c);
        } else {
          backend_->gemm(1, e, Transpose::no, root, Transpose::no, 0, c);
        }
        backend_->convert(c, 1, e);
      });
    }
  }
}

/// C of a segment that is a matrix of its own.
void ShardedOptimizer::Impl::undo_own(const OwnSegment& own) {
  const runtime::Group& group = plan_.groups[static_cast<std::size_t>(own.group)];
  if (kappa_[static_cast<std::size_t>(own.group)] == 0) return;  // nothing is pulled back
  Carver carver(scratch_);
  const MatrixView c = carver.matrix(own.rows, own.cols);
  std::span<std::byte> room = own_undo(own);
  const optim::Undo undo =
      optim::carve_undo(group.matrix_rule(), *group.lmo, own.rows, own.cols, room);
  optim::undo_matrix(group.matrix_rule(), *group.lmo, undo, {kept(own), {}, own.state},
                     scalars_of(own), c, carver.rest(), *backend_);
  backend_->convert(c, 1, kept(own));
}

/// M ← M + κ·C, each matrix (or piece that is one) within its guard.
void ShardedOptimizer::Impl::add_corrections(std::size_t b) {
  const runtime::Bucket& bucket = plan_.buckets[b];
  const runtime::Group& group = plan_.group(bucket.parameters.front());
  const bool met = meets(b);
  const bool guarded = group.max_correction > 0;
  const bool summed = roundings_[b].size.norms > 0;  // of all pieces of a matrix that meets
  const auto matrix_of = [&](const OwnSegment& own) -> const runtime::MatrixPlan& {
    return plan_.matrices[static_cast<std::size_t>(own.segment.matrix)];
  };
  // Roots of the Gram modes are in units of the X that they were made of.
  const auto factor = [&](const OwnSegment& own) {
    const runtime::MatrixPlan& m = matrix_of(own);
    const bool of_power = met && (optim::uses_gram(m.mode) || m.mode == Mode::block_cyclic);
    return std::ldexp(kappa_of(m) / group.scale(m), of_power ? gram_exponent(m) : 0);
  };
  const auto squares_of = [&](const OwnSegment& own) {
    const double f = factor(own);
    const std::pair squares{f * f * backend_->sum_squares(kept(own)),
                            momentum_squares(own, Carver(scratch_))};
    if (measures_) {
      measured(own).correction += squares.first;
      measured(own).momentum += squares.second;
    }
    return squares;
  };
  const auto add = [&](const OwnSegment& own, double correction, double momentum) {
    if (kappa_of(matrix_of(own)) == 0) return;
    const double f = factor(own) * guard(group, std::sqrt(correction), std::sqrt(momentum));
    add_to_momentum(own, f, kept(own), Carver(scratch_));
  };
  if (!met) {
    for (const OwnSegment& own : segments(b)) {
      if (own.size() == 0) continue;
      const auto [c, m] = guarded || measures_ ? squares_of(own) : std::pair{0.0, 0.0};
      add(own, c, m);
    }
    return;
  }
  const auto& matrices = meetings_[b].matrices;
  const auto norms_of = [&](const OwnSegment& own) {
    const auto entry =
        std::find_if(matrices.begin(), matrices.end(),
                     [&](const Meeting::Matrix& e) { return e.matrix == own.segment.matrix; });
    return norms_.data() + 2 * (entry - matrices.begin());
  };
  if (summed) std::fill_n(norms_.begin(), 2 * matrices.size(), 0.0);
  for (const OwnSegment& own : segments(b)) {
    if (own.size() == 0 || !(summed || measures_)) continue;
    const auto [c, m] = squares_of(own);
    if (!summed) continue;
    norms_of(own)[0] += c;
    norms_of(own)[1] += m;
  }
  if (summed) {
    Communicator& shard = numbers_ ? numbers_->shard : mesh_.shard;
    start(b, shard.start_all_reduce({norms_.data(), roundings_[b].size.norms, DType::f64},
                                    ReduceOp::sum));
    wait_for(b, /*brief=*/false, "summing the norms of corrections");
  }
  for (const OwnSegment& own : segments(b)) {
    if (own.size() == 0) continue;
    summed ? add(own, norms_of(own)[0], norms_of(own)[1]) : add(own, 0, 0);
  }
  // What the Gram matrices of later steps are scaled by: M has C now.
  for (std::size_t i = 0; summed && i < matrices.size(); ++i) {
    const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(matrices[i].matrix)];
    if (m.bound_slot < 0 || kappa_of(m) == 0) continue;
    const double of_c = std::sqrt(norms_[2 * i]);
    const double of_m = std::sqrt(norms_[2 * i + 1]);
    bounds_[static_cast<std::size_t>(m.bound_slot)] =
        runtime::bound_at_rest(group.momentum, of_m + guard(group, of_c, of_m) * of_c);
  }
}

}  // namespace orthrus
