#pragma once
/// @file
/// The element types Orthrus stores, computes with and sends.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace orthrus {

/// Sizes, offsets and counts are signed 64-bit everywhere.
using Index = std::int64_t;

/// Element type of a buffer. `u8` and `i64` are for messages, never for arithmetic on weights.
enum class DType : std::uint8_t { f32, bf16, f64, i64, u8 };

/// Bytes of one element.
constexpr std::size_t bytes_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::f32:
      return 4;
    case DType::bf16:
      return 2;
    case DType::f64:
      return 8;
    case DType::i64:
      return 8;
    case DType::u8:
      return 1;
  }
  return 0;
}

/// "f32", "bf16", "f64", "i64", "u8".
constexpr std::string_view name_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::bf16:
      return "bf16";
    case DType::f64:
      return "f64";
    case DType::i64:
      return "i64";
    case DType::u8:
      return "u8";
  }
  return "?";
}

/// The inverse of `name_of`; nothing when no type has that name.
constexpr std::optional<DType> dtype_named(std::string_view name) noexcept {
  for (const DType d : {DType::f32, DType::bf16, DType::f64, DType::i64, DType::u8}) {
    if (name_of(d) == name) return d;
  }
  return std::nullopt;
}

/// Storage of one bfloat16: the upper half of an f32. Arithmetic happens in f32.
struct BFloat16 {
  std::uint16_t bits;
  // Spelled out: CUDA sources read this header as C++17.
  friend constexpr bool operator==(BFloat16 a, BFloat16 b) noexcept { return a.bits == b.bits; }
};

/// The `DType` of a C++ element type.
template <class T>
inline constexpr DType dtype_of = DType{};
template <>
inline constexpr DType dtype_of<float> = DType::f32;
template <>
inline constexpr DType dtype_of<BFloat16> = DType::bf16;
template <>
inline constexpr DType dtype_of<double> = DType::f64;
template <>
inline constexpr DType dtype_of<std::int64_t> = DType::i64;
template <>
inline constexpr DType dtype_of<std::uint8_t> = DType::u8;

}  // namespace orthrus
