#include "runtime/weight_format.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>

namespace orthrus::runtime {
namespace {

constexpr Index padded_codes(const Grid& grid, Index rows, Index cols) noexcept {
  return (rows * code_pitch(grid.format, cols) + 3) / 4 * 4;
}

/// `count` codes of a row become those of another from column `col` on.
void put_codes(CodeFormat format, const std::byte* from, Index count, std::byte* to,
               Index col) noexcept {
  if (format != CodeFormat::int4) {
    std::copy_n(from, count, to + col);
    return;
  }
  for (Index i = 0; i < count; ++i) {  // the low half is the even column
    const std::byte code = (i % 2 == 0 ? from[i / 2] : from[i / 2] >> 4) & std::byte{0x0f};
    std::byte& at = to[(col + i) / 2];
    at = (col + i) % 2 == 0 ? (at & std::byte{0xf0}) | code : (at & std::byte{0x0f}) | (code << 4);
  }
}

}  // namespace

Index WeightFormat::units(Index rows, Index cols) const noexcept {
  if (!quantized()) return rows * cols;
  if (rows * cols == 0) return 0;
  return padded_codes(*grid, rows, cols) +
         scale_count(rows, cols) * static_cast<Index>(sizeof(float));
}

QuantizedView WeightFormat::view(void* piece, Index rows, Index cols) const noexcept {
  auto* const codes = static_cast<std::byte*>(piece);
  return view(codes, reinterpret_cast<float*>(codes + padded_codes(*grid, rows, cols)), rows, cols);
}

QuantizedView WeightFormat::view(void* codes, float* scales, Index rows,
                                 Index cols) const noexcept {
  const Index pitch = grid->extent == Grid::Extent::tensor ? 0 : scale_cols(*grid, cols);
  return {codes, code_pitch(grid->format, cols), scales, pitch, rows, cols};
}

Region WeightFormat::scale_region(const Region& piece, Index line) const noexcept {
  if (grid->extent == Grid::Extent::tensor) return {0, 1, 1, 1};
  const Index all = scale_cols(*grid, line);
  const Index row = piece.first / line;
  const Index col = grid->extent == Grid::Extent::block ? piece.first % line / grid->block : 0;
  return {row * all + col, piece.rows, scale_cols(*grid, piece.cols), all};
}

std::string WeightFormat::name() const {
  if (!quantized()) return std::string(name_of(dtype));
  std::string text(name_of(grid->format));
  text += grid->extent == Grid::Extent::tensor ? "/tensor"
          : grid->extent == Grid::Extent::row  ? "/row"
                                               : "/block" + std::to_string(grid->block);
  return grid->power_of_two ? text + "/pow2" : text;
}

std::optional<WeightFormat> WeightFormat::named(std::string_view name) {
  if (const auto dtype = dtype_named(name)) return WeightFormat{*dtype, std::nullopt};
  Grid grid;
  const auto take = [&name] {
    const std::size_t end = std::min(name.find('/'), name.size());
    const std::string_view word = name.substr(0, end);
    name.remove_prefix(std::min(end + 1, name.size()));
    return word;
  };
  const auto codes = code_format_named(take());
  if (!codes) return std::nullopt;
  grid.format = *codes;
  std::string_view extent = take();
  if (extent == "tensor") {
    grid.extent = Grid::Extent::tensor;
  } else if (extent.starts_with("block")) {
    grid.extent = Grid::Extent::block;
    extent.remove_prefix(5);
    const auto [end, error] =
        std::from_chars(extent.data(), extent.data() + extent.size(), grid.block);
    if (error != std::errc() || end != extent.data() + extent.size() || grid.block < 1) {
      return std::nullopt;
    }
  } else if (extent != "row") {
    return std::nullopt;
  }
  if (!name.empty()) {
    grid.power_of_two = true;
    if (take() != "pow2" || !name.empty()) return std::nullopt;
  }
  return WeightFormat{DType::f32, grid};
}

WeightFormat weight_format(const WeightsConfig& config) {
  const auto codes = code_format_named(config.format);
  if (!codes) {
    return {config.format == "bf16" ? DType::bf16 : DType::f32, std::nullopt};
  }
  Grid grid;
  grid.format = *codes;
  grid.block = config.block > 0 ? config.block : Grid{}.block;
  const std::string& scale = config.scale;
  grid.extent = scale == "tensor"                                           ? Grid::Extent::tensor
                : scale == "block" || (scale == "auto" && config.block > 0) ? Grid::Extent::block
                                                                            : Grid::Extent::row;
  if (grid.extent != Grid::Extent::block) grid.block = Grid{}.block;
  grid.power_of_two = config.scale_format == "pow2";
  return {DType::f32, grid};
}

WeightFormat momentum_format(const StateConfig& config) {
  if (config.momentum == "bf16") return {DType::bf16, std::nullopt};
  if (config.momentum != "int8") return {};
  Grid grid;
  grid.format = CodeFormat::int8;
  grid.extent = Grid::Extent::block;
  grid.block = config.block;
  return {DType::f32, grid};
}

bool is_of_momentum(const WeightFormat& format) {
  if (!format.quantized()) return format.dtype == DType::f32 || format.dtype == DType::bf16;
  return format.grid->format == CodeFormat::int8 && format.grid->extent == Grid::Extent::block &&
         !format.grid->power_of_two;
}

double bound_at_rest(const WeightFormat& format, double bound) {
  if (format == WeightFormat{} || bound == 0 || !std::isfinite(bound)) return bound;
  // The least scale is 1e-12; below 2^-126 bf16 is coarser than its mantissa.
  bound =
      std::max(bound, format.quantized() ? largest_code(format.grid->format) * 1e-12 : 0x1p-126);
  int exponent = 0;
  const double mantissa = std::frexp(bound, &exponent);
  return std::ldexp(std::ceil(std::ldexp(mantissa, 8)), exponent - 8);
}

Residual residual_of(const WeightsConfig& config) {
  if (config.format == "f32") return Residual::none;  // nothing is lost
  return config.residual == "momentum"   ? Residual::momentum
         : config.residual == "master"   ? Residual::master
         : config.residual == "mantissa" ? Residual::mantissa
                                         : Residual::none;
}

QuantizedView block(const QuantizedView& v, const Grid& grid, Index row, Index rows, Index col,
                    Index cols) noexcept {
  auto* const codes =
      static_cast<std::byte*>(v.codes) + row * v.pitch + code_pitch(grid.format, col);
  float* const scales =
      v.scales + row * v.scale_pitch + (grid.extent == Grid::Extent::block ? col / grid.block : 0);
  return {codes, v.pitch, scales, v.scale_pitch, rows, cols};
}

bool is_block(const Grid& grid, const QuantizedView& whole, const Region& r) noexcept {
  const Index col = r.first % whole.cols;
  const Index end = col + r.cols;
  // Where a run of columns may begin, or end before the row does.
  const Index unit = grid.extent == Grid::Extent::block ? grid.block : 1;
  return r.first >= 0 && r.rows >= 0 && r.cols >= 0 && end <= whole.cols &&
         r.first / whole.cols + r.rows <= whole.rows && (r.rows < 2 || r.distance == whole.cols) &&
         col % unit == 0 && (end % unit == 0 || end == whole.cols);
}

bool are_numbers(CodeFormat format, std::uint8_t byte) noexcept {
  switch (format) {
    case CodeFormat::fp8_e4m3:
      return (byte & 0x7fU) != 0x7fU;
    case CodeFormat::fp8_e5m2:
      return (byte & 0x7fU) < 0x7cU;
    case CodeFormat::int8:
      return byte != 0x80U;
    case CodeFormat::int4:
      return (byte & 0xfU) != 0x8U && (byte >> 4) != 0x8U;
  }
  return false;
}

void put_piece(const ConstQuantizedView& piece, const Grid& grid, const Region& region,
               const QuantizedView& whole) noexcept {
  const Index col = region.first % whole.cols;
  for (Index r = 0; r < piece.rows; ++r) {
    put_codes(grid.format, static_cast<const std::byte*>(piece.codes) + r * piece.pitch, piece.cols,
              static_cast<std::byte*>(whole.codes) + (region.first / whole.cols + r) * whole.pitch,
              col);
  }
  const QuantizedView to = block(whole, grid, region);
  for (Index r = 0; r < scale_rows(grid, piece.rows); ++r) {
    std::copy_n(piece.scales + r * piece.scale_pitch, scale_cols(grid, piece.cols),
                to.scales + r * to.scale_pitch);
  }
}

}  // namespace orthrus::runtime
