// How weights rest: W in f32 for an update, what they are rounded to, what travels; and ECO, where
// what rounding took goes into the momentum.
#include <algorithm>
#include <cmath>
#include <orthrus/error.hpp>

#include "kernels/device_memory.hpp"
#include "optim/matrix_function.hpp"
#include "optim/schedule.hpp"
#include "runtime/engine.hpp"

namespace orthrus {

using runtime::block;
using runtime::Residual;
using runtime::row;
using runtime::scales_of;

namespace {

/// Rows that are one panel of weights that are rounded one after the other.
Index rows_at_a_time(Index rows, Index cols) {
  return std::clamp<Index>((Index{1} << 16) / std::max<Index>(cols, 1), 1,
                           std::max<Index>(rows, 1));
}

}  // namespace

/// Where the weights of a segment rest, when they rest as a matrix of their format: in a shard, or
/// densely in the trainer's buffer. Empty where neither is so.
MatrixView ShardedOptimizer::Impl::weights_of(const runtime::OwnSegment& own) {
  const runtime::Bucket& bucket = plan_.buckets[own.bucket];
  if (bucket.weights.quantized()) return {};
  const DType format = bucket.weights.dtype;
  const Parameter& p = parameter_of(own);
  const auto place = [&](void* data, Index first, Index ld) {
    return MatrixView{
        static_cast<std::byte*>(data) + static_cast<std::size_t>(first) * bytes_of(format),
        own.rows, own.cols, ld, format};
  };
  if (bucket.held) return place(p.weights, own.here.first, own.here.distance);
  if (plan_.weights_sharded()) {
    return place(working_set_->piece(own.bucket, own.segment), 0, own.cols);
  }
  const auto& shape = plan_.parameters[static_cast<std::size_t>(own.segment.parameter)];
  if (p.dtype != format || !runtime::is_contiguous(shape)) return {};
  return place(p.weights, own.region().first, own.region().distance);
}

/// The codes of a segment, where they rest: in a shard, or with the trainer. Empty where the
/// trainer has their values.
QuantizedView ShardedOptimizer::Impl::codes_of(const runtime::OwnSegment& own) {
  const runtime::Bucket& bucket = plan_.buckets[own.bucket];
  const runtime::WeightFormat& format = bucket.weights;
  if (!format.quantized()) return {};
  if (bucket.held || !plan_.weights_sharded()) {
    return trainers_codes(static_cast<std::size_t>(own.segment.parameter), own.region());
  }
  return format.view(working_set_->piece(own.bucket, own.segment), own.rows, own.cols);
}

/// Codes and scales of parameter i, or of a region of it, in the trainer's buffers. Empty where it
/// gave weights.
QuantizedView ShardedOptimizer::Impl::trainers_codes(std::size_t i) const {
  if (!plan_.parameters[i].as_codes) return {};
  return plan_.whole_codes(i, parameters_[i].codes, parameters_[i].scales);
}
QuantizedView ShardedOptimizer::Impl::trainers_codes(std::size_t i, const Region& region) const {
  if (!plan_.parameters[i].as_codes) return {};
  return block(trainers_codes(i), *plan_.group(static_cast<int>(i)).format.grid, region);
}

/// @throws DataError  a code stands for no number, a scale is not positive or not of its format
void ShardedOptimizer::Impl::check_trainers_codes(std::size_t i) {
  const QuantizedView whole = trainers_codes(i);
  if (whole.codes == nullptr) return;
  const Grid& grid = *plan_.group(static_cast<int>(i)).format.grid;
  const auto refuse = [&](const std::string& what) {
    throw DataError("parameter '" + parameters_[i].name + "': " + what);
  };
  const auto scales = static_cast<std::size_t>(scales_of(whole, grid).size());
  kernels::OnHost<const float> factors(*backend_, whole.scales, scales);
  for (std::size_t k = 0; k < scales; ++k) {
    const float scale = factors.data()[k];
    int exponent = 0;
    if (!std::isfinite(scale) || scale <= 0) {
      refuse("scale " + std::to_string(k) + " is " + std::to_string(scale) +
             ", not a positive number");
    }
    if (grid.power_of_two && std::frexp(scale, &exponent) != 0.5F) {
      refuse("scale " + std::to_string(k) + " is " + std::to_string(scale) +
             ", not a power of two (weights.scale_format)");
    }
  }
  kernels::OnHost<const std::uint8_t> codes(*backend_,
                                            static_cast<const std::uint8_t*>(whole.codes),
                                            static_cast<std::size_t>(whole.rows * whole.pitch));
  const std::span<const std::uint8_t> bytes = codes.span();
  const auto bad = std::find_if(bytes.begin(), bytes.end(), [&](std::uint8_t byte) {
    return !runtime::are_numbers(grid.format, byte);
  });
  if (bad != bytes.end()) {
    const auto at = static_cast<Index>(bad - bytes.begin());
    refuse("a code in row " + std::to_string(at / whole.pitch) + ", byte " +
           std::to_string(at % whole.pitch) + ", is no number of " +
           std::string(name_of(grid.format)));
  }
}

/// Where the trainer has the weights of a panel, in dense rows.
MatrixView ShardedOptimizer::Impl::trainers_weights(const runtime::OwnSegment& own,
                                                    const runtime::Panel& panel) {
  const Parameter& p = parameter_of(own);
  const Region& all = plan_.buckets[own.bucket].held ? own.here : own.region();
  const MatrixView segment{
      static_cast<std::byte*>(p.weights) + static_cast<std::size_t>(all.first) * bytes_of(p.dtype),
      own.rows, own.cols, all.distance, p.dtype};
  return runtime::block(segment, panel);
}

/// A panel as a region of its parameter.
Region ShardedOptimizer::Impl::region_of(const runtime::OwnSegment& own,
                                         const runtime::Panel& panel) {
  const Region& r = own.region();
  return {r.first + panel.row * r.distance + panel.col, panel.rows, panel.cols, r.distance};
}

/// W of a panel in f32: where it is, if it is f32 there; else beside.
MatrixView ShardedOptimizer::Impl::open_weights(const runtime::OwnSegment& own,
                                                const runtime::Panel& panel) {
  const runtime::Group& group = plan_.groups[static_cast<std::size_t>(own.group)];
  if (group.master) return runtime::block(own.master, panel);
  const runtime::WeightFormat& format = group.format;
  const MatrixView wide{widened_.data(), panel.rows, panel.cols, panel.cols, DType::f32};
  if (const QuantizedView codes = codes_of(own); codes.codes != nullptr) {
    backend_->dequantize(block(codes, *format.grid, panel.row, panel.rows, panel.col, panel.cols),
                         *format.grid, wide);
    return wide;
  }
  const MatrixView rest = weights_of(own);
  if (rest.data != nullptr && rest.dtype == DType::f32) return runtime::block(rest, panel);
  if (group.residual == Residual::mantissa) {
    MatrixView high{narrowed_.data(), panel.rows, panel.cols, panel.cols, DType::bf16};
    if (rest.data != nullptr) {
      high = runtime::block(rest, panel);
    } else {
      read_trainer(own, panel, high);
    }
    backend_->merge_f32(high, runtime::block(own.low, panel), wide);
  } else if (rest.data != nullptr) {
    backend_->convert(runtime::block(rest, panel), 1, wide);
  } else {
    read_trainer(own, panel, wide);
  }
  return wide;
}

/// to ← a panel of the trainer's weights. @param to  dense
void ShardedOptimizer::Impl::read_trainer(const runtime::OwnSegment& own,
                                          const runtime::Panel& panel, MatrixView to) {
  if (plan_.buckets[own.bucket].held) {
    return backend_->convert(trainers_weights(own, panel), 1, to);
  }
  runtime::pack(plan_.parameters[static_cast<std::size_t>(own.segment.parameter)],
                parameter_of(own).weights, parameter_of(own).dtype, region_of(own, panel),
                {to.data, to.size(), to.dtype}, *backend_);
}

/// Which bits round the elements of a panel stochastically: of the parameter's elements, whoever
/// has them.
kernels::Rounding ShardedOptimizer::Impl::rounding_of(const runtime::OwnSegment& own,
                                                      const runtime::Panel& panel,
                                                      runtime::Rounded what) const {
  const Region region = region_of(own, panel);
  const runtime::Group& group = plan_.groups[static_cast<std::size_t>(own.group)];
  kernels::Rounding rounding;
  rounding.stochastic = what == runtime::Rounded::weights ? group.stochastic : group.compresses();
  rounding.seed = config_.seed;
  // Parameters are fewer than 2^32.
  rounding.stream_id =
      static_cast<std::uint64_t>(own.segment.parameter) | static_cast<std::uint64_t>(what) << 32U;
  rounding.step = static_cast<std::uint64_t>(steps_);
  rounding.first_element = region.first;
  rounding.row_distance = region.distance;
  return rounding;
}

/// Elements are the parameter's: one run where `wide` has whole rows of it, else row by row.
void ShardedOptimizer::Impl::round_to_bf16(MatrixView wide, MatrixView to,
                                           const kernels::Rounding& r) {
  if (!r.stochastic) return backend_->convert(wide, 1, to);
  const Index rows = r.row_distance == wide.cols ? std::max<Index>(wide.rows, 1) : 1;
  for (Index i = 0; i < wide.rows; i += rows) {
    const runtime::Panel run{i, rows, 0, wide.cols};
    backend_->round_stochastic(runtime::block(wide, run), runtime::block(to, run), r.seed,
                               r.stream_id, r.step, r.first_element + i * r.row_distance);
  }
}

/// Line 7: rounded to the format they rest in. @return E = W̃ − Ŵ in f32 where ECO or codes need
/// it, until the next panel is opened; else empty.
MatrixView ShardedOptimizer::Impl::close_weights(const runtime::OwnSegment& own,
                                                 const runtime::Panel& panel, MatrixView wide) {
  const runtime::Group& group = plan_.groups[static_cast<std::size_t>(own.group)];
  if (group.format.quantized()) return close_codes(own, panel, wide);
  const MatrixView rest = weights_of(own);
  const DType format = group.format.dtype;
  MatrixView to{narrowed_.data(), panel.rows, panel.cols, panel.cols, format};
  if (rest.data != nullptr) to = runtime::block(rest, panel);
  if (to.data == wide.data) return {};
  if (group.residual == Residual::mantissa) {
    backend_->split_f32(wide, to, runtime::block(own.low, panel));
  } else {
    round_to_bf16(wide, to, rounding_of(own, panel));
  }
  if (rest.data == nullptr) {
    runtime::unpack({to.data, to.size(), format},
                    plan_.parameters[static_cast<std::size_t>(own.segment.parameter)],
                    parameter_of(own).weights, parameter_of(own).dtype, region_of(own, panel),
                    *backend_);
  }
  if (!group.feeds_back()) return {};
  const std::size_t used =
      rest.data != nullptr
          ? 0
          : runtime::Arena::rounded(static_cast<std::size_t>(to.size()) * bytes_of(format));
  const MatrixView rounded{narrowed_.data() + used, panel.rows, panel.cols, panel.cols, DType::f32};
  backend_->convert(to, 1, rounded);
  if (measures_) {
    measured(own).weights += backend_->sum_squares(wide);
    measured(own).elements += static_cast<double>(wide.size());
  }
  backend_->axpby(-1, rounded, 1, wide);
  if (measures_) measured(own).residual += backend_->sum_squares(wide);
  return wide;
}

/// The same to codes and scales: a row's largest weight decides its scale, then W = code·scale + E.
MatrixView ShardedOptimizer::Impl::close_codes(const runtime::OwnSegment& own,
                                               const runtime::Panel& panel, MatrixView wide) {
  const runtime::Group& group = plan_.groups[static_cast<std::size_t>(own.group)];
  const Grid& grid = *group.format.grid;
  MatrixView w = wide;
  if (group.master && !rounds_together(own)) {
    w = {widened_.data(), panel.rows, panel.cols, panel.cols, DType::f32};
    backend_->convert(wide, 1, w);
  }
  QuantizedView codes = codes_of(own);
  const bool rest_as_codes = codes.codes != nullptr;
  if (rest_as_codes) {
    codes = block(codes, grid, panel.row, panel.rows, panel.col, panel.cols);
  } else {
    codes = beside(own, panel);
  }
  const MatrixView scales = scales_of(codes, grid);
  find_scales(own, panel, w, scales);
  if (measures_) measure_rounding(own, w, grid, scales);
  backend_->quantize(w, grid, rounding_of(own, panel), codes);
  if (measures_) measured(own).residual += backend_->sum_squares(w);
  if (!rest_as_codes) backend_->dequantize(codes, grid, trainers_weights(own, panel));
  return w;
}

/// The scales of a panel of weights: found with other ranks, or its own.
void ShardedOptimizer::Impl::find_scales(const runtime::OwnSegment& own,
                                         const runtime::Panel& panel, ConstMatrixView w,
                                         MatrixView scales) {
  const Grid& grid = *plan_.buckets[own.bucket].weights.grid;
  if (const MatrixView shared = shared_scales(own); shared.data != nullptr) {
    const bool tensor = grid.extent == Grid::Extent::tensor;
    return backend_->convert(
        tensor ? shared : runtime::block(shared, {panel.row, panel.rows, 0, 1}), 1, scales);
  }
  backend_->abs_maxima(w, grid, scales);
  backend_->scales_from_maxima(grid, scales);
}

/// Codes of a panel on their way, with the scales that are kept of them.
QuantizedView ShardedOptimizer::Impl::beside(const runtime::OwnSegment& own,
                                             const runtime::Panel& panel) {
  const Grid& grid = *plan_.groups[static_cast<std::size_t>(own.group)].format.grid;
  const bool blocks = grid.extent == Grid::Extent::block;
  auto* const scales = static_cast<float*>(own.scales.data);
  if (grid.extent == Grid::Extent::tensor) {
    return {narrowed_.data(), code_pitch(grid.format, panel.cols), scales, 0, panel.rows,
            panel.cols};
  }
  return {narrowed_.data(),
          code_pitch(grid.format, panel.cols),
          scales + panel.row * own.scales.ld + (blocks ? panel.col / grid.block : 0),
          own.scales.ld,
          panel.rows,
          panel.cols};
}

/// The weights of a segment as they travel. Ŵ is code·scale: rounded to the nearest with the same
/// scale it is that code again.
void ShardedOptimizer::Impl::write_piece(const runtime::OwnSegment& own, void* piece) {
  const runtime::WeightFormat& format = plan_.buckets[own.bucket].weights;
  if (!format.quantized()) {
    return read_weights(own, {piece, own.rows, own.cols, own.cols, format.dtype});
  }
  if (own.size() == 0) return;
  const QuantizedView codes = format.view(piece, own.rows, own.cols);
  if (const QuantizedView rest = codes_of(own); rest.codes != nullptr) {
    return runtime::copy_codes(rest, *format.grid, codes, *backend_);
  }
  backend_->convert(own.scales, 1, scales_of(codes, *format.grid));
  for_each_block(own, [&](const runtime::Panel& p) {
    const MatrixView w{widened_.data(), p.rows, p.cols, p.cols, DType::f32};
    backend_->convert(trainers_weights(own, p), 1, w);
    backend_->quantize(w, *format.grid, {},
                       block(codes, *format.grid, p.row, p.rows, p.col, p.cols));
  });
}

/// The weights of a segment as the trainer has them. @param to  dense
void ShardedOptimizer::Impl::read_weights(const runtime::OwnSegment& own, MatrixView to) {
  if (const QuantizedView codes = codes_of(own); codes.codes != nullptr) {
    return backend_->dequantize(codes, *plan_.buckets[own.bucket].weights.grid, to);
  }
  if (const MatrixView rest = weights_of(own); rest.data != nullptr) {
    backend_->convert(rest, 1, to);
  } else {
    read_trainer(own, {0, own.rows, 0, own.cols}, to);
  }
}

/// What is kept beside rounded weights, from those the trainer was constructed with.
void ShardedOptimizer::Impl::keep_beside(runtime::OwnSegment& own, const WholeWeights& from) {
  const runtime::Group& group = plan_.groups[static_cast<std::size_t>(own.group)];
  const auto read = [&](MatrixView to) {
    if (plan_.buckets[own.bucket].held) return read_weights(own, to);
    if (from.data == nullptr) {
      const Grid& grid = *group.format.grid;
      return backend_->dequantize(block(from.codes, grid, own.region()), grid, to);
    }
    runtime::pack(*from.shape, from.data, from.dtype, own.region(), {to.data, to.size(), to.dtype},
                  *backend_);
  };
  if (group.master && own.size() > 0) read(own.master);
  if (group.residual == Residual::mantissa && own.size() > 0) {
    const auto n = static_cast<std::size_t>(own.size());
    const kernels::DeviceBuffer wide(*backend_, n * sizeof(float));
    const kernels::DeviceBuffer high(*backend_, n * bytes_of(DType::bf16));
    const auto as = [&](void* data, DType dtype) {
      return MatrixView{data, own.rows, own.cols, own.cols, dtype};
    };
    read(as(wide.data(), DType::f32));
    backend_->split_f32(as(wide.data(), DType::f32), as(high.data(), DType::bf16), own.low);
    backend_->wait();
  }
}

/// What the trainer was constructed with.
ShardedOptimizer::Impl::WholeWeights ShardedOptimizer::Impl::trainers_own(std::size_t i) const {
  return {&plan_.parameters[i], parameters_[i].weights, parameters_[i].dtype, trainers_codes(i)};
}

/// piece ← the weights of a segment, rounded to the nearest.
void ShardedOptimizer::Impl::round_piece(const runtime::Bucket& bucket, const runtime::Segment& s,
                                         const WholeWeights& whole, void* piece) {
  const Region& r = s.region;
  const runtime::WeightFormat& format = bucket.weights;
  if (plan_.group(s.parameter).residual == Residual::mantissa) {
    // The half that `keep_beside` has the other one of.
    const auto n = static_cast<std::size_t>(s.size());
    const kernels::DeviceBuffer wide(*backend_, n * sizeof(float));
    const kernels::DeviceBuffer low(*backend_, n * bytes_of(DType::bf16));
    runtime::pack(*whole.shape, whole.data, whole.dtype, r, {wide.data(), s.size(), DType::f32},
                  *backend_);
    backend_->split_f32(row(wide.data(), s.size()), row(piece, s.size(), DType::bf16),
                        row(low.data(), s.size(), DType::bf16));
    return backend_->wait();  // the buffers go
  }
  if (!format.quantized()) {
    return runtime::pack(*whole.shape, whole.data, whole.dtype, r, {piece, s.size(), format.dtype},
                         *backend_);
  }
  round_codes(*format.grid, s, whole, format.view(piece, r.rows, r.cols));
}

/// The same to codes and scales, wherever they are. Those of such a whole stay what they are.
void ShardedOptimizer::Impl::round_codes(const Grid& grid, const runtime::Segment& s,
                                         const WholeWeights& whole, QuantizedView codes) {
  const Region& r = s.region;
  if (whole.data == nullptr) {
    return runtime::copy_codes(block(whole.codes, grid, r), grid, codes, *backend_);
  }
  auto* const first_of = static_cast<std::byte*>(const_cast<void*>(whole.data));  // only read
  // Scales are of all that shares them: whole rows, also of those that are cut.
  Region sharing = r;
  const runtime::MatrixPlan* m =
      s.matrix < 0 ? nullptr : &plan_.matrices[static_cast<std::size_t>(s.matrix)];
  if (m != nullptr && runtime::shared_scales(plan_, s.parameter, m) > 0) {
    sharing = m->region;
    if (grid.extent == Grid::Extent::row) {
      sharing.first += (r.first - sharing.first) / r.distance * r.distance;
      sharing.rows = r.rows;
    }
  }
  const Index rows = rows_at_a_time(sharing.rows, sharing.cols);
  const kernels::DeviceBuffer buffer(*backend_,
                                     static_cast<std::size_t>(rows * sharing.cols) * sizeof(float));
  const auto panels = [&](const Region& of, auto&& f) {
    const MatrixView all{first_of + static_cast<std::size_t>(of.first) * bytes_of(whole.dtype),
                         of.rows, of.cols, of.distance, whole.dtype};
    for (Index first = 0; first < of.rows; first += rows) {
      const runtime::Panel panel{first, std::min(rows, of.rows - first), 0, of.cols};
      const MatrixView w = matrix_view(static_cast<float*>(buffer.data()), panel.rows, panel.cols);
      backend_->convert(runtime::block(all, panel), 1, w);
      f(panel, w);
    }
  };
  const MatrixView scales = scales_of(codes, grid);
  double largest = 0;
  panels(sharing, [&](const runtime::Panel& panel, MatrixView w) {
    if (grid.extent == Grid::Extent::tensor) {
      largest = std::max(largest, backend_->abs_max(w));
    } else {
      backend_->abs_maxima(w, grid,
                           runtime::block(scales, {panel.row, panel.rows, 0, scales.cols}));
    }
  });
  if (grid.extent == Grid::Extent::tensor) backend_->fill(largest, scales);
  backend_->scales_from_maxima(grid, scales);
  panels(r, [&](const runtime::Panel& panel, MatrixView w) {
    backend_->quantize(w, grid, {}, block(codes, grid, panel.row, panel.rows, 0, panel.cols));
  });
  backend_->wait();  // the buffer goes
}

/// Segment s of bucket b becomes what `whole` has there, in its format: in this shard's store, or
/// in the trainer's buffer, on every rank alike.
void ShardedOptimizer::Impl::round_segment(std::size_t b, const runtime::Segment& s,
                                           const WholeWeights& whole) {
  const runtime::Bucket& bucket = plan_.buckets[b];
  if (bucket.held || s.size() == 0) return;  // no rank has all of it: round_held
  if (plan_.weights_sharded()) {
    if (s.rank % plan_.shard != mesh_.shard.rank()) return;
    return round_piece(bucket, s, whole, working_set_->piece(b, s));
  }
  const auto p = static_cast<std::size_t>(s.parameter);
  const Parameter& parameter = parameters_[p];
  if (const QuantizedView codes = trainers_codes(p, s.region); codes.codes != nullptr) {
    return round_codes(*bucket.weights.grid, s, whole, codes);
  }
  const kernels::DeviceBuffer piece(*backend_, bucket.weights.bytes(s.region.rows, s.region.cols));
  round_piece(bucket, s, whole, piece.data());
  runtime::read_piece(bucket.weights, piece.data(), plan_.parameters[p], parameter.weights,
                      parameter.dtype, s.region, *backend_);
  if (bucket.weights.quantized() && plan_.has(bucket, s, mesh_.world.rank())) {
    for (runtime::OwnSegment& own : segments(b)) {
      if (own.segment.offset != s.offset || own.size() == 0) continue;
      const QuantizedView codes = bucket.weights.view(piece.data(), own.rows, own.cols);
      backend_->convert(scales_of(codes, *bucket.weights.grid), 1, own.scales);
    }
  }
  backend_->wait();  // the buffer goes
}

/// ZeRO-3: the shards of the weights the trainer was constructed with.
void ShardedOptimizer::Impl::store_weights() {
  for (std::size_t b = 0; b < plan_.buckets.size(); ++b) {
    for (const runtime::Segment& s : plan_.buckets[b].segments) {
      round_segment(b, s, trainers_own(static_cast<std::size_t>(s.parameter)));
    }
  }
}

/// The same of shards that the trainer holds.
void ShardedOptimizer::Impl::round_held() {
  for (std::size_t b = 0; b < plan_.buckets.size(); ++b) {
    const runtime::Bucket& bucket = plan_.buckets[b];
    if (!bucket.held || !bucket.weights.quantized()) continue;
    const Grid& grid = *bucket.weights.grid;
    if (bucket.rounds_together) {
      for (const runtime::OwnSegment& own : segments(b)) {
        if (own.size() > 0) read_trainer(own, {0, own.rows, 0, own.cols}, kept(own));
      }
      share_scales(b);
    }
    for (const runtime::OwnSegment& own : segments(b)) {
      if (own.size() == 0) continue;
      for_each_block(own, [&](const runtime::Panel& panel) {
        const MatrixView w{widened_.data(), panel.rows, panel.cols, panel.cols, DType::f32};
        read_trainer(own, panel, w);
        const QuantizedView codes = beside(own, panel);
        find_scales(own, panel, w, scales_of(codes, grid));
        backend_->quantize(w, grid, {}, codes);
        backend_->dequantize(codes, grid, trainers_weights(own, panel));
      });
    }
  }
  backend_->wait();
}

/// Weights of a rounded format lie on its grid from the start. (Codes do.)
void ShardedOptimizer::Impl::round_weights() {
  for (std::size_t b = 0; b < plan_.buckets.size() && !plan_.weights_sharded(); ++b) {
    const runtime::WeightFormat& format = plan_.buckets[b].weights;
    for (const runtime::Segment& s : plan_.buckets[b].segments) {
      const auto p = static_cast<std::size_t>(s.parameter);
      if (plan_.parameters[p].as_codes) continue;
      if (!format.quantized() && parameters_[p].dtype == format.dtype) continue;
      round_segment(b, s, trainers_own(p));
    }
  }
}

/// Parameter i becomes `values`, dense and f32, as if the trainer had come with them.
void ShardedOptimizer::Impl::adopt_weights(std::size_t i, const void* values) {
  runtime::ParameterShape dense = plan_.parameters[i];
  dense.strides.clear();
  const WholeWeights whole{&dense, values, DType::f32, {}};
  for (runtime::OwnSegment& own : own_) {
    if (own.segment.parameter == static_cast<int>(i)) keep_beside(own, whole);
  }
  for (std::size_t b = 0; b < plan_.buckets.size(); ++b) {
    for (const runtime::Segment& s : plan_.buckets[b].segments) {
      if (s.parameter == static_cast<int>(i)) round_segment(b, s, whole);
    }
  }
}

// ---- ECO ----------------------------------------------------------------------------------------

/// κ of this step, per group; 0: nothing is pulled back.
void ShardedOptimizer::Impl::find_kappas() {
  for (std::size_t g = 0; g < plan_.groups.size(); ++g) {
    const runtime::Group& group = plan_.groups[g];
    kappa_[g] = 0;
    if (!group.feeds_back()) continue;
    const EcoConfig& eco = group.config->weights.eco;
    const double next = lr_at(g, steps_ + 1) * lr_multiplier_;
    if (next <= 0 || next < eco.lr_floor * lr_[g] * lr_multiplier_) continue;
    const auto t = static_cast<std::size_t>(steps_ - 1);
    if (!schedule_kappas_[g].empty() && t < schedule_kappas_[g].size()) {
      kappa_[g] = schedule_kappas_[g][t] / lr_multiplier_;
    } else {
      kappa_[g] = optim::kappa(kappa_kind_[g], *group.rule->gain(), next, weight_decay_[g]);
    }
  }
}

/// M ← M + κ·P⁻¹E of a panel of an element-wise rule, row by row no more than the guard allows.
void ShardedOptimizer::Impl::pull_back(const runtime::OwnSegment& own,
                                       const optim::ElementwiseRule& rule,
                                       const optim::Piece& piece, const optim::StepScalars& s) {
  const auto g = static_cast<std::size_t>(own.group);
  const runtime::Group& group = plan_.groups[g];
  const MatrixView momentum = piece.state[0];
  if (group.max_correction <= 0 && !measures_) {
    return rule.pull_back(piece, kappa_[g], momentum, s, *backend_);
  }
  runtime::Carver carver(scratch_.last(correction_bytes(own)));
  const MatrixView correction = carver.matrix(momentum.rows, momentum.cols);
  backend_->fill(0, correction);
  rule.pull_back(piece, kappa_[g], correction, s, *backend_);
  if (measures_) {
    measured(own).correction += backend_->sum_squares(correction);
    measured(own).momentum += backend_->sum_squares(momentum);
  }
  if (group.max_correction > 0) {
    const auto lines = [&] {
      const auto bytes = static_cast<std::size_t>(momentum.rows) * sizeof(double);
      return matrix_view(reinterpret_cast<double*>(carver.take(bytes).data()), momentum.rows, 1);
    };
    const MatrixView of_correction = lines();
    const MatrixView of_momentum = lines();
    backend_->line_sum_squares(correction, false, of_correction);
    backend_->line_sum_squares(momentum, false, of_momentum);
    const auto n = static_cast<std::size_t>(momentum.rows);
    kernels::OnHost<double> c(*backend_, static_cast<double*>(of_correction.data), n);
    kernels::OnHost<const double> m(*backend_, static_cast<const double*>(of_momentum.data), n);
    for (std::size_t i = 0; i < n; ++i) {
      c.data()[i] = guard(group, std::sqrt(c.data()[i]), std::sqrt(m.data()[i]));
    }
    c.put_back();
    backend_->scale_lines(of_correction, false, correction);
  }
  backend_->axpby(1, correction, 1, momentum);
}

/// The same of a whole matrix, of which E is whole.
void ShardedOptimizer::Impl::pull_back(const runtime::OwnSegment& own, const optim::Undo& undo,
                                       MatrixView residual, std::span<std::byte> work) {
  const auto g = static_cast<std::size_t>(own.group);
  const runtime::Group& group = plan_.groups[g];
  const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(own.segment.matrix)];
  runtime::Carver carver(work);
  const MatrixView correction = carver.matrix(own.rows, own.cols);
  optim::undo_matrix(group.matrix_rule(), *group.lmo, undo, {residual, {}, own.state},
                     scalars_of(own), correction, carver.rest(), *backend_);
  double factor = kappa_[g] / group.scale(m);
  if (group.max_correction > 0 || measures_) {
    const double of_correction = factor * factor * backend_->sum_squares(correction);
    const double of_momentum = momentum_squares(own, carver);
    if (measures_) {
      measured(own).correction += of_correction;
      measured(own).momentum += of_momentum;
    }
    factor *= guard(group, std::sqrt(of_correction), std::sqrt(of_momentum));
  }
  add_to_momentum(own, factor, correction, carver);
}

/// What a correction is multiplied by, so that it stays within its share of the momentum. In 16
/// bits: norms summed over pieces end in other bits than those of whole matrices.
double ShardedOptimizer::Impl::guard(const runtime::Group& group, double correction,
                                     double momentum) {
  const double most = group.max_correction * momentum;
  if (group.max_correction <= 0 || correction <= most) return 1;
  int exponent = 0;
  const double mantissa = std::frexp(most / correction, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, 16)), exponent - 16);
}

/// Bytes at the end of the scratch where the correction of a panel of an element-wise rule is.
std::size_t ShardedOptimizer::Impl::correction_bytes(const runtime::OwnSegment& own) const {
  const Index panel = runtime::panel_elements(plan_, plan_.buckets[own.bucket], own.segment);
  return runtime::Arena::rounded(static_cast<std::size_t>(panel) * sizeof(float)) +
         2 * runtime::Arena::rounded(static_cast<std::size_t>(own.rows) * sizeof(double));
}

void ShardedOptimizer::Impl::measure_rounding(const runtime::OwnSegment& own, MatrixView w,
                                              const Grid& grid, MatrixView scales) {
  Measured& sums = measured(own);
  sums.beyond += static_cast<double>(backend_->count_beyond(w, grid, scales));
  sums.weights += backend_->sum_squares(w);
  sums.elements += static_cast<double>(w.size());
  // Integers lie one scale apart.
  double squares = 0;
  if (grid.extent == Grid::Extent::block) {
    const Index last = w.cols % grid.block == 0 ? grid.block : w.cols % grid.block;
    const auto columns = [&](Index first, Index count) {
      return MatrixView{static_cast<float*>(scales.data) + first, scales.rows, count, scales.ld,
                        DType::f32};
    };
    squares = static_cast<double>(grid.block) *
                  (scales.cols > 1 ? backend_->sum_squares(columns(0, scales.cols - 1)) : 0) +
              static_cast<double>(last) * backend_->sum_squares(columns(scales.cols - 1, 1));
  } else {
    const Index shared = grid.extent == Grid::Extent::tensor ? w.size() : w.cols;
    squares = static_cast<double>(shared) * backend_->sum_squares(scales);
  }
  sums.scales += squares;
}

/// Line 9: what rounding did, of all ranks.
void ShardedOptimizer::Impl::report_rounding(const double* sums) {
  for (std::size_t g = 0; g < plan_.groups.size(); ++g) {
    const runtime::Group& group = plan_.groups[g];
    if (!group.format.quantized() && !group.feeds_back()) continue;
    Measured of;
    std::copy_n(sums + plan_.rounding_slot[g], runtime::Plan::rounding_sums,
                reinterpret_cast<double*>(&of));
    RoundingReport& report = report_.rounding[g];
    report.step = steps_;
    if (of.elements == 0) continue;
    report.residual_rms = std::sqrt(of.residual / of.elements);
    report.saturated = static_cast<std::int64_t>(of.beyond);
    report.relative_correction = of.momentum > 0 ? std::sqrt(of.correction / of.momentum) : 0;
    // Between powers of two floating-point codes lie evenly: 2^-bits/1.39 of a weight apart in the
    // mean over a logarithm's length.
    double spacing = std::sqrt(of.scales / of.elements);
    const double weights = std::sqrt(of.weights / of.elements);
    if (!group.format.quantized()) {
      spacing = std::ldexp(weights, -7) / 1.39;
    } else if (group.format.grid->format == CodeFormat::fp8_e4m3) {
      spacing = std::ldexp(weights, -3) / 1.39;
    } else if (group.format.grid->format == CodeFormat::fp8_e5m2) {
      spacing = std::ldexp(weights, -2) / 1.39;
    }
    const double step = lr_at(g, steps_) * lr_multiplier_ * std::sqrt(sums[g] / of.elements);
    report.step_over_grid = spacing > 0 ? step / spacing : 0;
    if (kappa_[g] == 0 || group.linear) continue;
    const double decay = group.rule->gain()->decay;
    report.out_of_regime = report.out_of_regime || report.step_over_grid < (1 - decay) / 2 ||
                           report.relative_correction > 0.7 * std::sqrt(1 - decay * decay);
  }
}

}  // namespace orthrus
