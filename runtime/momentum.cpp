// How the momentum rests: in f32, where rules work on it, or compressed, as bf16 or as int8 with a
// scale per block. Then a panel of it is opened to f32, updated, and rounded stochastically when it
// is closed: X is made before that.
#include <orthrus/error.hpp>

#include "runtime/engine.hpp"

namespace orthrus {

using runtime::block;
using runtime::Carver;
using runtime::OwnSegment;
using runtime::Panel;
using runtime::Rounded;
using runtime::scales_of;
using runtime::StateViews;
using runtime::WeightFormat;
using runtime::whole;

namespace {

/// `part` of a segment, as a panel of what `panel` is.
Panel within(const Panel& panel, const Panel& part) {
  return {part.row - panel.row, part.rows, part.col - panel.col, part.cols};
}

}  // namespace

/// The state of a panel, as rules take it: where it rests; a compressed momentum opened in scratch.
StateViews ShardedOptimizer::Impl::open_state(const OwnSegment& own, const Panel& panel,
                                              Carver& carver) {
  if (!plan_.groups[static_cast<std::size_t>(own.group)].compresses()) return {own, panel, {}};
  const MatrixView wide = carver.matrix(panel.rows, panel.cols);
  open_momentum(own, panel, wide);
  return {own, panel, wide};
}

/// The momentum as it rests now, after `close_state`.
void ShardedOptimizer::Impl::reopen_state(const OwnSegment& own, const Panel& panel,
                                          const StateViews& state) {
  if (!plan_.groups[static_cast<std::size_t>(own.group)].compresses()) return;
  open_momentum(own, panel, state.momentum());
}

/// A compressed momentum is rounded to where it rests, and spoiled in `state`; f32 is there
/// already.
void ShardedOptimizer::Impl::close_state(const OwnSegment& own, const Panel& panel,
                                         const StateViews& state, Rounded why) {
  if (!plan_.groups[static_cast<std::size_t>(own.group)].compresses()) return;
  round_momentum(own, panel, state.momentum(), rounding_of(own, panel, why));
}

/// to ← M of a panel, whatever it rests as.
void ShardedOptimizer::Impl::open_momentum(const OwnSegment& own, const Panel& panel,
                                           MatrixView to) {
  const WeightFormat& format = plan_.groups[static_cast<std::size_t>(own.group)].momentum;
  if (!format.quantized()) return backend_->convert(block(own.state[0], panel), 1, to);
  const QuantizedView all = format.view(own.state[0].data, own.rows, own.cols);
  backend_->dequantize(block(all, *format.grid, panel.row, panel.rows, panel.col, panel.cols),
                       *format.grid, to);
}

/// M ← round(wide) of a panel that begins with a block. @param wide  spoiled
void ShardedOptimizer::Impl::round_momentum(const OwnSegment& own, const Panel& panel,
                                            MatrixView wide, const kernels::Rounding& rounding) {
  const WeightFormat& format = plan_.groups[static_cast<std::size_t>(own.group)].momentum;
  if (!format.quantized()) return round_to_bf16(wide, block(own.state[0], panel), rounding);
  const QuantizedView all = format.view(own.state[0].data, own.rows, own.cols);
  const QuantizedView codes =
      block(all, *format.grid, panel.row, panel.rows, panel.col, panel.cols);
  const MatrixView scales = scales_of(codes, *format.grid);
  backend_->abs_maxima(wide, *format.grid, scales);
  backend_->scales_from_maxima(*format.grid, scales);
  backend_->quantize(wide, *format.grid, rounding, codes);
}

/// What a checkpoint had: values that rest here as they did there, with the scales that are in
/// place already, or else the nearest to them. @param wide  spoiled
void ShardedOptimizer::Impl::restore_momentum(const OwnSegment& own, MatrixView wide,
                                              bool with_scales) {
  const WeightFormat& format = plan_.groups[static_cast<std::size_t>(own.group)].momentum;
  if (!format.quantized() || !with_scales) return round_momentum(own, whole(own), wide, {});
  backend_->quantize(wide, *format.grid, {}, format.view(own.state[0].data, own.rows, own.cols));
}

/// G of a panel joins the momentum; x, which held it, becomes X. @param stores  else a compressed
/// momentum rests as it did.
void ShardedOptimizer::Impl::accumulate(const OwnSegment& own, const Panel& panel, MatrixView x,
                                        bool stores, Carver scratch) {
  const optim::MatrixRule& rule = plan_.groups[static_cast<std::size_t>(own.group)].matrix_rule();
  for_each_opened(own, panel, [&](const Panel& part) {
    Carver rest(scratch);
    const StateViews state = open_state(own, part, rest);
    rule.accumulate({{}, block(x, within(panel, part)), state.views(), {}}, scalars_of(own),
                    *backend_);
    if (stores) close_state(own, part, state, Rounded::update);
  });
}

/// X once more, of the momentum as it rests.
void ShardedOptimizer::Impl::query(const OwnSegment& own, const Panel& panel, MatrixView x,
                                   Carver scratch) {
  const optim::MatrixRule& rule = plan_.groups[static_cast<std::size_t>(own.group)].matrix_rule();
  for_each_opened(own, panel, [&](const Panel& part) {
    Carver rest(scratch);
    const StateViews state = open_state(own, part, rest);
    rule.query({{}, block(x, within(panel, part)), state.views(), {}}, *backend_);
  });
}

/// ‖M‖² of a segment.
double ShardedOptimizer::Impl::momentum_squares(const OwnSegment& own, Carver scratch) {
  double sum = 0;
  for_each_opened(own, whole(own), [&](const Panel& part) {
    Carver rest(scratch);
    sum += backend_->sum_squares(open_state(own, part, rest).momentum());
  });
  return sum;
}

/// M ← M + factor·C of a segment.
void ShardedOptimizer::Impl::add_to_momentum(const OwnSegment& own, double factor,
                                             MatrixView correction, Carver scratch) {
  for_each_opened(own, whole(own), [&](const Panel& part) {
    Carver rest(scratch);
    const StateViews state = open_state(own, part, rest);
    backend_->axpby(factor, block(correction, part), 1, state.momentum());
    close_state(own, part, state, Rounded::correction);
  });
}

}  // namespace orthrus
