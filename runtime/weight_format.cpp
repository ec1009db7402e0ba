#include "runtime/weight_format.hpp"

#include <charconv>

namespace orthrus::runtime {
namespace {

constexpr Index padded_codes(const Grid& grid, Index rows, Index cols) noexcept {
  return (rows * code_pitch(grid.format, cols) + 3) / 4 * 4;
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
  auto* const scales = reinterpret_cast<float*>(codes + padded_codes(*grid, rows, cols));
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

}  // namespace orthrus::runtime
