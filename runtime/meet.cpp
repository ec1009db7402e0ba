// Line 4 of the walk, where a matrix does not rest on one rank: its pieces meet, bucket by bucket.
// What is where in the buffers is said in meeting.hpp.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <orthrus/error.hpp>

#include "kernels/gram.hpp"
#include "optim/block_cyclic_msign.hpp"
#include "optim/matrix_function.hpp"
#include "runtime/clock.hpp"
#include "runtime/engine.hpp"
#include "runtime/schedule.hpp"

namespace orthrus {

using kernels::Transpose;
using optim::Mode;
using runtime::block;
using runtime::Carver;
using runtime::Clock;
using runtime::dense;
using runtime::floats;
using runtime::for_each_panel;
using runtime::Meeting;
using runtime::ms_since;
using runtime::OwnSegment;
using runtime::Panel;
using runtime::place_of;
using runtime::whole;

bool ShardedOptimizer::Impl::meets(std::size_t b) const {
  return !meetings_[b].matrices.empty() && plan_.buckets[b].meets(updates_);
}

std::span<OwnSegment> ShardedOptimizer::Impl::segments(std::size_t b) {
  return std::span(own_).subspan(first_own_[b], first_own_[b + 1] - first_own_[b]);
}

void ShardedOptimizer::Impl::start(std::size_t b, Request request) {
  meeting_states_[b].request = std::move(request);
  under_way_.push_back(b);
}

void ShardedOptimizer::Impl::wait_for(std::size_t b, bool brief, const char* what) {
  const auto start = Clock::now();
  const double updating = report_.ms.update;
  try {
    wait_ahead(meeting_states_[b].request, brief);
  } catch (const CommError& e) {
    const runtime::Bucket& bucket = plan_.buckets[b];
    const std::string& first =
        bucket.matrices.empty()
            ? plan_.parameters[static_cast<std::size_t>(bucket.parameters.front())].name
            : plan_.matrices[static_cast<std::size_t>(bucket.matrices.front())].name;
    throw CommError(std::string(e.what()) + "; " + what + " of matrix '" + first + "' (bucket " +
                        std::to_string(b) + ", " + std::to_string(bucket.matrices.size()) +
                        " matrices, mode " + std::string(name_of(bucket.mode)) + ")",
                    e.exit_code());
  }
  std::erase(under_way_, b);
  report_.ms.meet += ms_since(start) - (report_.ms.update - updating);
}

/// Lets what is on its way go on while this rank computes.
void ShardedOptimizer::Impl::progress() {
  for (const std::size_t b : under_way_) static_cast<void>(meeting_states_[b].request.test());
  for (WeightSlot& slot : weight_slots_) static_cast<void>(slot.request.test());
}

void ShardedOptimizer::Impl::depart(std::size_t b) {
  if (!meets(b)) return;
  const auto start = Clock::now();
  switch (plan_.buckets[b].mode) {
    case Mode::gram:
    case Mode::gram_steps:
      send_grams(b);
      break;
    default:
      send_pieces(b);
  }
  report_.ms.update += ms_since(start);
}

/// While pieces are on their way nothing long is begun: the next bucket's could not leave.
void ShardedOptimizer::Impl::arrive(std::size_t b) {
  if (!meets(b)) return;
  wait_for(b, /*brief=*/true, "bringing together the pieces");
  if (!runtime::computed_by_owners(plan_.buckets[b])) return;
  if (poisons_ && !plan_.buckets[b].lone) poison(meeting_states_[b].mine);
  owed_.push_back(b);
}

/// The next matrix of a bucket that this rank computes. @return whether there was one.
bool ShardedOptimizer::Impl::compute_next(std::size_t b) {
  const runtime::Bucket& bucket = plan_.buckets[b];
  const bool owners = runtime::computed_by_owners(bucket);
  const auto start = Clock::now();
  std::size_t& i = meeting_states_[b].computed;
  for (; i < meetings_[b].matrices.size(); ++i) {
    const Meeting::Matrix& entry = meetings_[b].matrices[i];
    if (owners && !bucket.lone && !entry.mine) continue;
    if (bucket.shared_terms > 0) {
      compute_terms(b, entry);
    } else if (bucket.mode == Mode::gram) {
      compute_polynomial(b, entry);
    } else {
      compute_whole(b, entry);
    }
    ++i;
    progress();
    const double ms = ms_since(start);
    report_.ms.lmo += ms;
    report_.ms.update += ms;
    return true;
  }
  return false;
}

void ShardedOptimizer::Impl::compute(std::size_t b) {
  if (!meets(b)) return;
  const Mode mode = plan_.buckets[b].mode;
  if (mode != Mode::gram_steps && mode != Mode::block_cyclic) {
    while (compute_next(b)) {
    }
    return;
  }
  const auto start = Clock::now();
  const StepTimes before = report_.ms;
  mode == Mode::gram_steps ? iterate_grams(b) : compute_on_grid(b);
  const double elsewhere = report_.ms.meet - before.meet + report_.ms.update - before.update;
  const double ms = ms_since(start) - elsewhere;
  report_.ms.lmo += ms;
  report_.ms.update += ms;
}

/// What owners made goes back to all.
void ShardedOptimizer::Impl::send_back(std::size_t b) {
  if (!meets(b)) return;
  const runtime::Bucket& bucket = plan_.buckets[b];
  const Meeting& meeting = meetings_[b];
  MeetingState& buffers = meeting_states_[b];
  if (bucket.mode == Mode::gram) {
    const auto me = static_cast<std::size_t>(mesh_.shard.rank());
    // Shared terms are made where they will be.
    void* const made = bucket.lone ? floats(buffers.back, first_back(meeting))
                                   : static_cast<void*>(buffers.theirs.data());
    return start(
        b, mesh_.shard.start_all_gather({made, meeting.back[me], DType::f32}, meeting.back,
                                        {buffers.back.data(), meeting.back_size, DType::f32}));
  }
  start(b, mesh_.shard.start_all_to_all(
               {made_at(b, 0), meeting.theirs_size, bucket.wire}, meeting.theirs,
               {buffers.back.data(), meeting.mine_size, bucket.wire}, meeting.counts));
}

/// exchange, periodic: where owners put a direction's piece that begins at `offset` among what
/// comes back: over X, or behind all that arrived.
void* ShardedOptimizer::Impl::made_at(std::size_t b, Index offset) {
  const runtime::Bucket& bucket = plan_.buckets[b];
  if (bucket.brings > 1) offset += meetings_[b].theirs_size * bucket.brings;
  return meeting_states_[b].theirs.data() +
         static_cast<std::size_t>(offset) * bytes_of(bucket.wire);
}

// ---- exchange, gather, periodic ----------------------------------------------------------------

/// G joins the state, X leaves for where its matrix is computed.
void ShardedOptimizer::Impl::send_pieces(std::size_t b) {
  const runtime::Bucket& bucket = plan_.buckets[b];
  const Meeting& meeting = meetings_[b];
  MeetingState& buffers = meeting_states_[b];
  for (OwnSegment& own : segments(b)) {
    if (own.size() == 0) continue;
    Carver carver(scratch_);
    const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(own.segment.matrix)];
    if (bucket.mode == Mode::block_cyclic && m.stack != optim::Stack::companion) {
      load_stacked(own, m, whole(own), stacked_piece(own, buffers.mine), /*joins=*/true, carver);
      continue;
    }
    // Its k-th matrix lies behind the ones before.
    const auto bring = [&](Index k, auto&& make) {
      const MatrixView leaves =
          dense(buffers.mine, own.meeting_offset * bucket.brings + k * own.size(), own.rows,
                own.cols, bucket.wire);
      const MatrixView x = bucket.wire == DType::f32 ? leaves : carver.matrix(own.rows, own.cols);
      make(x);
      if (bucket.wire != DType::f32) backend_->convert(x, 1, leaves);
    };
    bring(0, [&](MatrixView x) {
      load_gradient(own, whole(own), x);
      accumulate(own, whole(own), x, /*stores=*/true, carver);
    });
    if (bucket.brings > 1) bring(1, [&](MatrixView g) { load_gradient(own, whole(own), g); });
  }
  if (bucket.mode == Mode::block_cyclic) return;  // the grid's own way
  const ConstSpan mine{buffers.mine.data(), meeting.mine_size * bucket.brings, bucket.wire};
  const Span theirs{buffers.theirs.data(), meeting.theirs_size * bucket.brings, bucket.wire};
  start(b, bucket.mode == Mode::gather
               ? mesh_.shard.start_all_gather(mine, meeting.counts_brought, theirs)
               : mesh_.shard.start_all_to_all(mine, meeting.counts_brought, theirs,
                                              meeting.theirs_brought));
}

/// As in optim, and counted; where it cannot be computed, X ← NaN. No rank throws alone: an update
/// that is not finite stops them all, when they audit the step.
/// @param undo  null: not asked for. @return it could be computed.
bool ShardedOptimizer::Impl::whole_matrix(const runtime::MatrixPlan& m, const optim::Whole& matrix,
                                          const optim::Undo* undo, std::span<std::byte> work) {
  const runtime::Group& group = plan_.group(m.parameter);
  const optim::MatrixRule& rule = group.matrix_rule();
  if (const double factor = euclidean_of(m); factor > 0) {
    ++spared_;
    backend_->convert(matrix.x, factor, matrix.x);
    return true;
  }
  matrices_ += group.orthogonalizes() ? 1 : 0;
  optim::Whole whole = matrix;
  std::string problem;
  whole.phase = m.phase;
  whole.problem = &problem;
  try {
    if (undo == nullptr) {
      optim::whole_matrix(rule, *group.lmo, whole, scalars_of(m), work, *backend_);
    } else {
      optim::whole_matrix_with_undo(rule, *group.lmo, whole, scalars_of(m), *undo, work, *backend_);
    }
  } catch (const NumericError& e) {
    note_problem(m, e.what(), /*is_fatal=*/true);
    backend_->fill(std::numeric_limits<double>::quiet_NaN(), matrix.x);
    return false;
  }
  note_problem(m, problem);
  return true;
}

/// What went wrong with a matrix here, for the report of all ranks: the first of a step stands for
/// all, but one that cannot be made up for goes before those that can.
void ShardedOptimizer::Impl::note_problem(const runtime::MatrixPlan& m, std::string_view what,
                                          bool is_fatal) {
  if (what.empty() || (!problem_.empty() && (is_fatal_ || !is_fatal))) return;
  is_fatal_ = is_fatal;
  problem_ = "matrix '" + m.name + "': " + std::string(what);
}

/// A matrix is put together, and what becomes of it is taken apart again.
void ShardedOptimizer::Impl::compute_whole(std::size_t b, const Meeting::Matrix& entry) {
  const runtime::Bucket& bucket = plan_.buckets[b];
  const Meeting& meeting = meetings_[b];
  const MeetingState& buffers = meeting_states_[b];
  const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(entry.matrix)];
  const runtime::Group& group = plan_.group(m.parameter);
  Carver carver(scratch_);
  optim::Whole matrix{carver.matrix(m.rows, m.cols), {}, state_of(b, entry.matrix)};
  if (bucket.brings > 1) matrix.g = carver.matrix(m.rows, m.cols);
  for (std::size_t i = entry.first; i < entry.last; ++i) {
    const Meeting::Arrival& a = meeting.arrivals[i];
    const auto put = [&](Index k, MatrixView to) {
      backend_->convert(dense(buffers.theirs, a.offset * bucket.brings + k * a.region.size(),
                              a.region.rows, a.region.cols, bucket.wire),
                        1, place_of(a.region, m, to));
    };
    put(0, matrix.x);
    if (bucket.brings > 1) put(1, matrix.g);
  }
  const bool feeds_back = kappa_of(m) != 0;
  optim::Undo undo;
  if (feeds_back) {
    std::span<std::byte> room = buffers.undo.subspan(entry.undo);
    undo = optim::carve_undo(group.matrix_rule(), *group.lmo, m.rows, m.cols, room);
  }
  whole_matrix(m, matrix, feeds_back ? &undo : nullptr, carver.rest());
  if (bucket.mode == Mode::gather) {
    for (const OwnSegment& own : segments(b)) {
      if (own.segment.matrix != entry.matrix || own.size() == 0) continue;
      backend_->convert(place_of(own.region(), m, matrix.x), 1,
                        dense(buffers.mine, own.meeting_offset, own.rows, own.cols, bucket.wire));
    }
    return;
  }
  for (std::size_t i = entry.first; i < entry.last; ++i) {
    const Region& region = meeting.arrivals[i].region;
    backend_->convert(place_of(region, m, matrix.x), 1,
                      {made_at(b, meeting.arrivals[i].offset), region.rows, region.cols,
                       region.cols, bucket.wire});
  }
}

/// All ranks of the replica together, one matrix after the other.
void ShardedOptimizer::Impl::compute_on_grid(std::size_t b) {
  const Meeting& meeting = meetings_[b];
  MeetingState& buffers = meeting_states_[b];
  const Index brings = plan_.buckets[b].brings;
  for (const Meeting::Matrix& entry : meeting.matrices) {
    const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(entry.matrix)];
    const runtime::Group& group = plan_.group(m.parameter);
    float* piece = floats(buffers.mine, 0);
    Index size = 0;
    for (const OwnSegment& own : segments(b)) {
      if (own.segment.matrix != entry.matrix) continue;
      if (size == 0) piece = floats(buffers.mine, own.meeting_offset * brings);  // of its first
      size += own.size();
    }
    if (const double factor = scaled_euclidean_of(m); factor > 0) {
      spared_ += entry.mine ? 1 : 0;
      spared_sent_ +=
          grid_matrices_.at(entry.matrix).traffic(group.lmo->iterations(), plan_.max_chunk);
      const MatrixView x = runtime::row(piece, size);
      backend_->convert(x, factor, x);
      continue;
    }
    if (group.direction().has_grid_root()) {
      root_on_grid(m, piece, piece + size, state_of(b, entry.matrix));
    } else {
      const optim::Lmo& lmo = *group.lmo;
      grid_matrices_.at(entry.matrix)(piece, lmo.iterations(), lmo.safety(), lmo.options(),
                                      scratch_, *grid_, mesh_.shard, *backend_);
    }
    matrices_ += entry.mine ? 1 : 0;
  }
}

/// X ← D of this rank's pieces; as in `whole_matrix` where it cannot be made.
void ShardedOptimizer::Impl::root_on_grid(const runtime::MatrixPlan& m, float* x, const float* g,
                                          std::span<const MatrixView> state) {
  const optim::Direction& direction = plan_.group(m.parameter).direction();
  const auto index = static_cast<int>(&m - plan_.matrices.data());
  const Index size = g - x;
  const optim::GridRootReport report = grid_roots_.at(index)(
      x, g, static_cast<float*>(state[1].data), static_cast<float*>(state[2].data),
      direction.grid_root(scalars_of(m)), scratch_, *grid_, mesh_.shard, *backend_);
  std::string problem;
  optim::Whole whole{{nullptr, m.rows, m.cols, m.cols, DType::f32}, {}, state};
  whole.problem = &problem;
  try {
    direction.settle(report, whole, *backend_);
    note_problem(m, problem);
  } catch (const NumericError& e) {
    note_problem(m, e.what(), /*is_fatal=*/true);
    backend_->fill(std::numeric_limits<double>::quiet_NaN(), runtime::row(x, size));
  }
}

/// The state of a matrix where its direction is made; empty where its rule has none of it.
std::span<const MatrixView> ShardedOptimizer::Impl::state_of(std::size_t b, int matrix) {
  for (const OwnSegment& own : segments(b)) {
    if (own.segment.matrix == matrix && own.keeps_lines) return own.state;
  }
  return {};
}

/// Lines 6 and 7 of a piece whose direction has come back.
double ShardedOptimizer::Impl::finish_piece(OwnSegment& own) {
  const runtime::Bucket& bucket = plan_.buckets[own.bucket];
  const MeetingState& buffers = meeting_states_[own.bucket];
  if (bucket.mode == Mode::gram_steps) return apply(own, stacked_piece(own, buffers.theirs).x);
  if (bucket.mode == Mode::block_cyclic) return apply(own, stacked_piece(own, buffers.back).x);
  MatrixView direction = dense(buffers.back, own.meeting_offset, own.rows, own.cols, bucket.wire);
  if (bucket.wire != DType::f32) {
    const MatrixView wide = Carver(scratch_).matrix(own.rows, own.cols);
    backend_->convert(direction, 1, wide);
    direction = wide;
  }
  return apply(own, direction);
}

// ---- gram, gram_steps --------------------------------------------------------------------------

/// X is taken times 2^-e where its squares might leave f32; e follows from the bound on ‖X‖, which
/// all ranks know.
int ShardedOptimizer::Impl::gram_exponent(const runtime::MatrixPlan& m) const {
  // block_cyclic squares nothing; what is kept is G's as it is.
  if (m.bound_slot < 0 || m.stack == optim::Stack::companion) return 0;
  double bound = 2 * bounds_[static_cast<std::size_t>(m.bound_slot)];
  if (plan_.group(m.parameter).compresses()) {  // of its entries
    bound *= std::sqrt(static_cast<double>(m.rows * m.cols));
  }
  if (bound == 0 || !std::isfinite(bound)) return 0;
  const int e = std::ilogb(bound) + 1;
  return std::abs(e) <= 30 ? 0 : e;
}

/// G joins the state; what leaves is ZZᵀ of this rank's pieces.
void ShardedOptimizer::Impl::send_grams(std::size_t b) {
  const runtime::Bucket& bucket = plan_.buckets[b];
  const Meeting& meeting = meetings_[b];
  MeetingState& buffers = meeting_states_[b];
  const bool steps = bucket.mode == Mode::gram_steps;
  for (const Meeting::Matrix& entry : meeting.matrices) {
    const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(entry.matrix)];
    const Index side = m.gram_side();
    float* const triangle = floats(buffers.mine, entry.triangle);
    bool any = false;
    for (OwnSegment& own : segments(b)) {
      if (own.segment.matrix != entry.matrix || own.size() == 0) continue;
      Carver carver(scratch_);
      const MatrixView r = carver.matrix(side, side);
      const Index elements =
          steps ? own.size() : runtime::panel_elements(plan_, bucket, own.segment);
      for_each_panel(own, m.gram_of_rows, elements, [&](const Panel& panel) {
        Carver rest(carver);
        const Stacked all =
            steps ? stacked_piece(own, buffers.theirs) : stack_panel(m, panel, rest);
        load_stacked(own, m, panel, all, /*joins=*/true, rest);
        add_gram(m, all.z, any, r, rest);
        any = true;
      });
      backend_->pack_triangle(r, triangle);
    }
    if (!any) backend_->fill(0, runtime::row(triangle, kernels::packed_size(side)));
    progress();
  }
  const Index all = meeting.mine_size;
  if (steps || bucket.lone) {
    start(b, mesh_.shard.start_all_reduce({buffers.mine.data(), all, DType::f32}, ReduceOp::sum));
  } else {
    start(b, mesh_.shard.start_reduce_scatter(
                 {buffers.mine.data(), all, DType::f32}, meeting.counts,
                 {buffers.theirs.data(), meeting.theirs_size, DType::f32}));
  }
}

ShardedOptimizer::Impl::Stacked ShardedOptimizer::Impl::parts_of(MatrixView z, optim::Stack stack,
                                                                 Index rows, Index cols) {
  switch (stack) {
    case optim::Stack::beside:
      return {block(z, {0, rows, 0, cols}), block(z, {0, rows, cols, cols}), z};
    case optim::Stack::above:
      return {block(z, {0, rows, 0, cols}), block(z, {rows, rows, 0, cols}), z};
    default:
      return {z, {}, z};
  }
}

ShardedOptimizer::Impl::Stacked ShardedOptimizer::Impl::stack_panel(const runtime::MatrixPlan& m,
                                                                    const Panel& panel,
                                                                    Carver& carver) {
  const MatrixView z = carver.matrix(m.z_rows(panel.rows), m.z_cols(panel.cols));
  if (m.stack != optim::Stack::companion) return parts_of(z, m.stack, panel.rows, panel.cols);
  return {carver.matrix(panel.rows, panel.cols), z, z};
}

ShardedOptimizer::Impl::Stacked ShardedOptimizer::Impl::stacked_piece(
    const OwnSegment& own, std::span<std::byte> pieces) const {
  const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(own.segment.matrix)];
  const Index begin = own.meeting_offset * plan_.buckets[own.bucket].brings;
  return parts_of(dense(pieces, begin, m.z_rows(own.rows), m.z_cols(own.cols), DType::f32), m.stack,
                  own.rows, own.cols);
}

/// X of a panel, and Y, within the range of f32 squares. @param joins  G joins the state; else it
/// has, and X is made once more. In mode gram it joins a compressed momentum both times, which is
/// rounded only then: both X are the same, and of what was not rounded.
void ShardedOptimizer::Impl::load_stacked(const OwnSegment& own, const runtime::MatrixPlan& m,
                                          const Panel& panel, const Stacked& to, bool joins,
                                          Carver scratch) {
  const runtime::Group& group = plan_.group(m.parameter);
  const optim::MatrixRule& rule = group.matrix_rule();
  load_gradient(own, panel, to.x);
  if (to.y.data != nullptr) backend_->convert(to.x, 1, to.y);
  const bool again = m.mode == Mode::gram && group.compresses();
  if (joins || again) {
    accumulate(own, panel, to.x, /*stores=*/!joins || !again, scratch);
  } else {
    query(own, panel, to.x, scratch);
  }
  if (to.y.data != nullptr) {
    rule.direction().companion(to.x, to.y, scalars_of(own), *backend_);
  }
  kernels::scale_by_power(to.z, -gram_exponent(m), *backend_);
}

void ShardedOptimizer::Impl::add_gram(const runtime::MatrixPlan& m, MatrixView x, bool add,
                                      MatrixView r, Carver scratch) {
  if (runtime::sums_grams_in_f64(plan_.group(m.parameter), m.mode)) {
    const auto work = scratch.take(kernels::gram_accumulate_workspace_bytes(m.gram_side()));
    return kernels::gram_accumulate(1, x, m.gram_of_rows, add ? 1 : 0, r, work, *backend_);
  }
  backend_->syrk(1, x, m.gram_of_rows ? Transpose::no : Transpose::yes, add ? 1 : 0, r);
}

/// Where this rank's run of what comes back begins.
Index ShardedOptimizer::Impl::first_back(const Meeting& meeting) const {
  const auto& back = meeting.back;
  return std::accumulate(back.begin(), back.begin() + mesh_.shard.rank(), Index{0});
}

/// This rank's terms of Q; R's triangle is no longer needed then.
void ShardedOptimizer::Impl::compute_terms(std::size_t b, const Meeting::Matrix& entry) {
  const Meeting& meeting = meetings_[b];
  MeetingState& buffers = meeting_states_[b];
  const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(entry.matrix)];
  const Index side = m.gram_side();
  const Index triangle = kernels::packed_size(side);
  Carver carver(scratch_);
  const MatrixView r = carver.matrix(side, side);
  backend_->unpack_triangle(floats(buffers.mine, entry.triangle), r);
  if (poisons_) poison(buffers.mine);
  const Index begin = first_back(meeting);
  const Index size = meeting.back[static_cast<std::size_t>(mesh_.shard.rank())];
  const int first = static_cast<int>(begin / triangle);
  if (euclidean_of(m) > 0) {  // nobody asks for Q
    spared_ += entry.mine ? 1 : 0;
    return backend_->fill(0, runtime::row(floats(buffers.back, begin), size));
  }
  try {
    buffers.scale = plan_.group(m.parameter)
                        .lmo->gram_terms(r, first, first + static_cast<int>(size / triangle),
                                         floats(buffers.back, begin), carver.rest(), *backend_);
  } catch (const NumericError& e) {
    note_problem(m, e.what(), /*is_fatal=*/true);  // as in `whole_matrix`
    buffers.scale = std::numeric_limits<double>::quiet_NaN();
    backend_->fill(buffers.scale, runtime::row(floats(buffers.back, begin), size));
  }
  matrices_ += entry.mine ? 1 : 0;
}

/// The terms of all ranks, each once: pieces of the matrix ask for Q one by one.
void ShardedOptimizer::Impl::sum_terms(std::size_t b) {
  const runtime::MatrixPlan& m =
      plan_.matrices[static_cast<std::size_t>(meetings_[b].matrices.front().matrix)];  // lone
  plan_.group(m.parameter)
      .lmo->sum_terms(floats(meeting_states_[b].back, 0), m.gram_side(), *backend_);
}

/// Q of a matrix takes the place of its triangle.
void ShardedOptimizer::Impl::compute_polynomial(std::size_t b, const Meeting::Matrix& entry) {
  const bool lone = plan_.buckets[b].lone;
  const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(entry.matrix)];
  const runtime::Group& group = plan_.group(m.parameter);
  const Index side = m.gram_side();
  const Index lines = group.matrix_rule().line_count(m.rows, m.cols);
  const Index run = lone ? 0 : first_back(meetings_[b]);
  const std::span<std::byte> here = lone ? meeting_states_[b].mine : meeting_states_[b].theirs;
  if (euclidean_of(m) > 0) {  // nobody asks for Q
    spared_ += entry.mine ? 1 : 0;
    return;
  }
  Carver carver(scratch_);
  const MatrixView r = carver.matrix(side, side);
  const MatrixView q = carver.matrix(side, side);
  const std::span<double> squares(
      reinterpret_cast<double*>(carver.take(static_cast<std::size_t>(lines) * 8).data()),
      static_cast<std::size_t>(lines));
  backend_->unpack_triangle(floats(here, entry.back - run), r);
  const optim::Direction& direction = group.direction();
  const bool with_root = kappa_of(m) != 0;
  std::string problem;
  try {
    direction.gram({r, m.gram_of_rows, gram_exponent(m), with_root, state_of(b, entry.matrix),
                    m.phase, &problem, q, squares},
                   *group.lmo, scalars_of(m), carver.rest(), *backend_);
    note_problem(m, problem);
  } catch (const NumericError& e) {  // as in `whole_matrix`
    note_problem(m, e.what(), /*is_fatal=*/true);
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    backend_->fill(nan, q);
    backend_->fill(nan, matrix_view(squares.data(), 1, lines));
  }
  if (direction.has_symmetric_gram()) {
    backend_->pack_triangle(q, floats(here, entry.back - run));
  } else {
    backend_->convert(block(q, {0, m.line_length(), 0, side}), 1,
                      matrix_view(floats(here, entry.back - run), m.line_length(), side));
  }
  if (with_root) backend_->pack_triangle(r, floats(here, entry.root - run));
  if (lines > 0) {
    optim::scale_factors(group.matrix_rule(), state_of(b, entry.matrix),
                         m.gram_of_rows ? m.cols : m.rows, squares, *backend_);
    backend_->convert(matrix_view(squares.data(), 1, lines), 1,
                      runtime::row(floats(here, entry.factors - run), lines));
  }
  matrices_ += entry.mine ? 1 : 0;
}

/// O = Q·X (f·X of a Euclidean step), panel by panel: X is made again from G and the momentum.
double ShardedOptimizer::Impl::finish_gram(OwnSegment& own) {
  const runtime::Bucket& bucket = plan_.buckets[own.bucket];
  const Meeting& meeting = meetings_[own.bucket];
  const MeetingState& buffers = meeting_states_[own.bucket];
  const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(own.segment.matrix)];
  const runtime::Group& group = plan_.group(m.parameter);
  const Index side = m.gram_side();
  const auto entry =
      std::find_if(meeting.matrices.begin(), meeting.matrices.end(),
                   [&](const Meeting::Matrix& e) { return e.matrix == own.segment.matrix; });
  Carver carver(scratch_);
  MatrixView q = carver.matrix(side, side);
  if (!group.direction().has_symmetric_gram()) {
    q = matrix_view(floats(buffers.back, entry->back), m.line_length(), side);
  } else if (bucket.shared_terms > 0) {
    group.lmo->gram_of_sum(floats(buffers.back, 0), buffers.scale, q, *backend_);
  } else {
    backend_->unpack_triangle(floats(buffers.back, entry->back), q);
  }
  const Index lines = group.matrix_rule().line_count(m.rows, m.cols);
  if (lines > 0) {
    auto* factors =
        reinterpret_cast<double*>(carver.take(static_cast<std::size_t>(lines) * 8).data());
    backend_->convert(runtime::row(floats(buffers.back, entry->factors), lines), 1,
                      matrix_view(factors, 1, lines));
    backend_->scale_lines(
        m.gram_of_rows ? matrix_view(factors, lines, 1) : matrix_view(factors, 1, lines),
        !m.gram_of_rows, q);
  }
  const double factor = scaled_euclidean_of(m);
  const bool stacked = side != m.line_length();
  const MatrixView used = block(q, {0, m.line_length(), 0, side});
  double sum = 0;
  for_each_panel(own, m.gram_of_rows, runtime::panel_elements(plan_, bucket, own.segment),
                 [&](const Panel& panel) {
                   Carver rest(carver);
                   const Stacked all = stack_panel(m, panel, rest);
                   const MatrixView o = rest.matrix(panel.rows, panel.cols);
                   load_stacked(own, m, panel, all, /*joins=*/false, rest);
                   const MatrixView x = stacked ? all.z : all.x;
                   if (factor > 0) {
                     backend_->convert(x, factor, o);
                   } else if (m.gram_of_rows) {
                     backend_->gemm(1, used, Transpose::no, x, Transpose::no, 0, o);
                   } else {
                     backend_->gemm(1, x, Transpose::no, used,
                                    stacked ? Transpose::yes : Transpose::no, 0, o);
                   }
                   sum += apply(own, panel, o);
                 });
  return sum;
}

/// Every iteration's Gram matrix summed on all ranks; the pieces stay where they are.
void ShardedOptimizer::Impl::iterate_grams(std::size_t b) {
  const Meeting& meeting = meetings_[b];
  MeetingState& buffers = meeting_states_[b];
  const runtime::MatrixPlan& first =
      plan_.matrices[static_cast<std::size_t>(meeting.matrices.front().matrix)];
  const optim::Lmo& lmo = *plan_.group(first.parameter).lmo;
  const auto iterations = lmo.iterations();
  for (std::size_t t = 0; t < iterations.size(); ++t) {
    const kernels::Quintic& p = iterations[t];
    if (t > 0) {
      start(b, mesh_.shard.start_all_reduce({buffers.mine.data(), meeting.mine_size, DType::f32},
                                            ReduceOp::sum));
      wait_for(b, /*brief=*/true, "summing the Gram matrices");
    }
    for (const Meeting::Matrix& entry : meeting.matrices) {
      const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(entry.matrix)];
      const Index side = m.gram_side();
      float* const triangle = floats(buffers.mine, entry.triangle);
      if (const double factor = scaled_euclidean_of(m); factor > 0) {
        backend_->fill(0, runtime::row(triangle, kernels::packed_size(side)));
        if (t > 0) continue;
        spared_ += entry.mine ? 1 : 0;
        for (OwnSegment& own : segments(b)) {
          if (own.segment.matrix != entry.matrix || own.size() == 0) continue;
          const MatrixView z = stacked_piece(own, buffers.theirs).z;
          backend_->convert(z, factor, z);
        }
        continue;
      }
      Carver carver(scratch_);
      const MatrixView r = carver.matrix(side, side);
      const MatrixView s = carver.matrix(side, side);
      backend_->unpack_triangle(triangle, r);
      double inverse = 1;  // 1/ν, in the first iteration
      if (t == 0) {
        const double trace = backend_->trace(r);
        double norm = lmo.safety() * std::sqrt(trace);
        const double eps = std::ldexp(lmo.options().eps, -gram_exponent(m));
        if (lmo.options().eps_mode == kernels::EpsMode::add && norm > 0) norm += eps;
        if (lmo.options().eps_mode == kernels::EpsMode::clamp) norm = std::max(norm, eps);
        inverse = trace == 0 ? 0 : 1 / norm;
        backend_->convert(r, inverse * inverse, r);
        matrices_ += entry.mine ? 1 : 0;
      }
      backend_->convert(r, 1, s);
      backend_->syrk(p.c, r, Transpose::no, p.b, s);  // bR + cR²
      bool any = false;
      for (OwnSegment& own : segments(b)) {
        if (own.segment.matrix != entry.matrix || own.size() == 0) continue;
        const MatrixView z = stacked_piece(own, buffers.theirs).z;
        if (t == 0) backend_->convert(z, inverse, z);
        const MatrixView old = Carver(carver).matrix(z.rows, z.cols);
        backend_->convert(z, 1, old);
        if (m.gram_of_rows) {
          backend_->gemm(1, s, Transpose::no, old, Transpose::no, p.a, z);
        } else {
          backend_->gemm(1, old, Transpose::no, s, Transpose::no, p.a, z);
        }
        if (t + 1 < iterations.size()) {
          add_gram(m, z, any, r, carver);
          any = true;
        }
      }
      if (!any) {
        backend_->fill(0, runtime::row(triangle, kernels::packed_size(side)));
      } else {
        backend_->pack_triangle(r, triangle);
      }
    }
  }
}

}  // namespace orthrus
