#pragma once
/// @file
/// What quantized weights are rounded to, and how their codes lie in memory.

#include <array>
#include <cstdint>
#include <optional>
#include <orthrus/dtype.hpp>
#include <string_view>

namespace orthrus {

/// How one weight is coded. fp8_e4m3 (FN): sign, 4 exponent bits of bias 7, 3 of the mantissa, no
/// infinity, largest 448. fp8_e5m2: 5 of bias 15 and 2, largest 57344. int8: −127 … 127. int4:
/// −7 … 7, two's complement, two in a byte.
enum class CodeFormat : std::uint8_t { fp8_e4m3, fp8_e5m2, int8, int4 };

inline constexpr std::array code_formats{CodeFormat::fp8_e4m3, CodeFormat::fp8_e5m2,
                                         CodeFormat::int8, CodeFormat::int4};

/// "fp8_e4m3", "fp8_e5m2", "int8", "int4".
constexpr std::string_view name_of(CodeFormat format) noexcept {
  switch (format) {
    case CodeFormat::fp8_e4m3:
      return "fp8_e4m3";
    case CodeFormat::fp8_e5m2:
      return "fp8_e5m2";
    case CodeFormat::int8:
      return "int8";
    case CodeFormat::int4:
      return "int4";
  }
  return "?";
}

/// The inverse of `name_of`; nothing when no format has that name.
constexpr std::optional<CodeFormat> code_format_named(std::string_view name) noexcept {
  for (const CodeFormat f : code_formats) {
    if (name_of(f) == name) return f;
  }
  return std::nullopt;
}

/// The largest number a code stands for: 448, 57344, 127, 7.
constexpr double largest_code(CodeFormat format) noexcept {
  switch (format) {
    case CodeFormat::fp8_e4m3:
      return 448;
    case CodeFormat::fp8_e5m2:
      return 57344;
    case CodeFormat::int8:
      return 127;
    case CodeFormat::int4:
      return 7;
  }
  return 0;
}

/// What weights are rounded to: code · scale.
struct Grid {
  enum class Extent : std::uint8_t { tensor, row, block };  ///< what shares a scale
  CodeFormat format = CodeFormat::fp8_e4m3;
  Extent extent = Extent::row;
  Index block = 128;          ///< columns of a row that share one (Extent::block)
  bool power_of_two = false;  ///< scales are powers of two
  // Spelled out: CUDA sources read this header as C++17.
  friend constexpr bool operator==(const Grid& a, const Grid& b) noexcept {
    return a.format == b.format && a.extent == b.extent && a.block == b.block &&
           a.power_of_two == b.power_of_two;
  }
  friend constexpr bool operator!=(const Grid& a, const Grid& b) noexcept { return !(a == b); }
};

/// Bytes of the codes of `cols` weights of a row. int4: low nibble = even column; the last nibble
/// of an odd row is 0.
constexpr Index code_pitch(CodeFormat format, Index cols) noexcept {
  return format == CodeFormat::int4 ? (cols + 1) / 2 : cols;
}

/// Scales of a rows×cols matrix are `scale_rows` × `scale_cols`; of an empty one there may be none.
constexpr Index scale_rows(const Grid& grid, Index rows) noexcept {
  return grid.extent == Grid::Extent::tensor ? 1 : rows;
}
constexpr Index scale_cols(const Grid& grid, Index cols) noexcept {
  return grid.extent == Grid::Extent::block ? (cols + grid.block - 1) / grid.block : 1;
}

/// Read-only codes and scales of a rows×cols matrix. Entry (i, j) is code(i, j) · scales[i ·
/// scale_pitch + j / block]; without Extent::block, [i · scale_pitch].
struct ConstQuantizedView {
  const void* codes = nullptr;
  Index pitch = 0;  ///< bytes from row to row, at least `code_pitch`
  const float* scales = nullptr;
  Index scale_pitch = 0;  ///< floats from row to row; 0: all rows share (Extent::tensor)
  Index rows = 0, cols = 0;
};

/// Codes and scales of a rows×cols matrix, writable.
struct QuantizedView {
  void* codes = nullptr;
  Index pitch = 0;  ///< bytes from row to row, at least `code_pitch`
  float* scales = nullptr;
  Index scale_pitch = 0;  ///< floats from row to row; 0: all rows share (Extent::tensor)
  Index rows = 0, cols = 0;

  operator ConstQuantizedView() const noexcept {
    return {codes, pitch, scales, scale_pitch, rows, cols};
  }
};

}  // namespace orthrus
