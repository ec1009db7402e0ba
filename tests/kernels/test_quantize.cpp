// Codes and scales. The judge is the definition of each format, written here as the list of all the
// numbers it has, and a search through that list.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <orthrus/error.hpp>
#include <orthrus/quantized.hpp>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend_suites.hpp"
#include "kernels/bf16.hpp"
#include "kernels/device_memory.hpp"
#include "kernels/rng.hpp"
#include "support/count_new.hpp"
#include "support/zoo.hpp"

namespace orthrus::kernels {
namespace {

using Extent = Grid::Extent;

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float inf = std::numeric_limits<float>::infinity();

/// All nonnegative finite numbers of a format, ascending: number k has code k.
std::vector<double> numbers(CodeFormat format) {
  std::vector<double> all;
  const auto floats = [&](int mantissa_values, int lowest, int highest) {
    const double m = mantissa_values;
    for (int k = 0; k < mantissa_values; ++k) all.push_back(k / m * std::pow(2.0, lowest));
    for (int e = lowest; e <= highest; ++e) {
      for (int k = 0; k < mantissa_values; ++k) all.push_back((1 + k / m) * std::pow(2.0, e));
    }
  };
  if (format == CodeFormat::fp8_e4m3) {
    floats(8, -6, 8);
    all.pop_back();  // 1.875·2⁸ is NaN's
  } else if (format == CodeFormat::fp8_e5m2) {
    floats(4, -14, 15);
  } else {
    for (int k = 0; k <= (format == CodeFormat::int8 ? 127 : 7); ++k) all.push_back(k);
  }
  return all;
}

/// The code of number k with a sign; int4: as a byte.
std::uint8_t code_of(CodeFormat format, std::size_t k, bool negative) {
  if (k == 0) return 0;
  const bool is_float = format == CodeFormat::fp8_e4m3 || format == CodeFormat::fp8_e5m2;
  if (is_float) return static_cast<std::uint8_t>(k | (negative ? 0x80U : 0U));
  return static_cast<std::uint8_t>(negative ? -static_cast<int>(k) : static_cast<int>(k));
}

/// The number nearest to |z|; of two, the one with the even code; the last for all beyond it.
std::size_t nearest(const std::vector<double>& all, double z) {
  const double a = std::min(std::abs(z), all.back());  // differences are exact
  std::size_t best = 0;
  for (std::size_t k = 1; k < all.size(); ++k) {
    const double here = std::abs(all[k] - a);
    const double before = std::abs(all[best] - a);
    if (here < before || (here == before && k % 2 == 0)) best = k;
  }
  return best;
}

/// The last number that is not above |z|.
std::size_t below(const std::vector<double>& all, double z) {
  const auto above = std::upper_bound(all.begin(), all.end(), std::abs(z));
  return static_cast<std::size_t>(above - all.begin()) - 1;
}

/// Codes and scales of one matrix, with gaps between their rows.
class Coded {
 public:
  Coded(const Grid& grid, Index rows, Index cols, Index gap = 0)
      : grid_(grid),
        rows_(rows),
        cols_(cols),
        pitch_(code_pitch(grid.format, cols) + gap),
        scale_pitch_(grid.extent == Extent::tensor ? 0 : scale_cols(grid, cols) + gap),
        codes_(static_cast<std::size_t>(rows * pitch_), 0x7b),
        scales_(static_cast<std::size_t>(std::max(rows * scale_pitch_, Index{1})), 1.0F) {}

  [[nodiscard]] QuantizedView view() {
    return {codes_.data(), pitch_, scales_.data(), scale_pitch_, rows_, cols_};
  }
  [[nodiscard]] MatrixView scales() {
    const Index cols = scale_cols(grid_, cols_);
    return {scales_.data(), scale_rows(grid_, rows_), cols, std::max(scale_pitch_, cols),
            DType::f32};
  }
  float& scale(Index i, Index j) {
    const Index unit = grid_.extent == Extent::block ? j / grid_.block : 0;
    return scales_[static_cast<std::size_t>(i * scale_pitch_ + unit)];
  }
  /// One byte; int4: sign extended.
  [[nodiscard]] std::uint8_t code(Index i, Index j) const {
    const std::uint8_t* line = codes_.data() + i * pitch_;
    if (grid_.format != CodeFormat::int4) return line[j];
    const int nibble = j % 2 == 0 ? line[j / 2] % 16 : line[j / 2] / 16;
    return static_cast<std::uint8_t>(nibble < 8 ? nibble : nibble - 16);
  }
  /// Every byte, those between rows too.
  [[nodiscard]] const std::vector<std::uint8_t>& bytes() const { return codes_; }
  [[nodiscard]] const std::vector<float>& all_scales() const { return scales_; }
  [[nodiscard]] bool gaps_untouched() const {
    const Index used = code_pitch(grid_.format, cols_);
    for (Index i = 0; i < rows_; ++i) {
      for (Index b = used; b < pitch_; ++b) {
        if (codes_[static_cast<std::size_t>(i * pitch_ + b)] != 0x7b) return false;
      }
    }
    return true;
  }

 private:
  Grid grid_;
  Index rows_, cols_, pitch_, scale_pitch_;
  std::vector<std::uint8_t> codes_;
  std::vector<float> scales_;
};

template <class T>
std::vector<std::byte> bits(const std::vector<T>& x) {
  std::vector<std::byte> all(x.size() * sizeof(T));
  if (!x.empty()) std::memcpy(all.data(), x.data(), all.size());
  return all;
}

/// rows×cols of T in rows of cols + gap, between which lies `filler`.
template <class T>
struct Strided {
  static constexpr int filler = 77;
  Strided(const zoo::Matrix& values, Index gap)
      : rows(values.rows),
        cols(values.cols),
        ld(values.cols + gap),
        data(static_cast<std::size_t>(rows * ld), static_cast<T>(filler)) {
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < cols; ++j) (*this)(i, j) = static_cast<T>(values(i, j));
    }
  }
  T& operator()(Index i, Index j) { return data[static_cast<std::size_t>(i * ld + j)]; }
  [[nodiscard]] MatrixView view() { return {data.data(), rows, cols, ld, dtype_of<T>}; }
  [[nodiscard]] bool gaps_untouched() const {
    for (Index i = 0; i < rows; ++i) {
      for (Index j = cols; j < ld; ++j) {
        if (data[static_cast<std::size_t>(i * ld + j)] != static_cast<T>(filler)) return false;
      }
    }
    return true;
  }
  Index rows, cols, ld;
  std::vector<T> data;
};

/// Gaussian entries of the size `deviation`, times 1 to 1000 from row to row.
zoo::Matrix uneven(Index rows, Index cols, std::uint64_t seed) {
  zoo::Matrix x = zoo::gaussian(rows, cols, seed);
  for (Index i = 0; i < rows; ++i) {
    const double factor = 0.02 * std::pow(10.0, static_cast<double>(i % 4));
    for (Index j = 0; j < cols; ++j) x(i, j) *= factor;
  }
  return x;
}

/// Rounds one row by scale 1; leaves residuals in `row`.
std::vector<std::uint8_t> codes_of(Backend& device, CodeFormat format, const Rounding& rounding,
                                   std::vector<float>& row) {
  const Grid grid{format, Extent::tensor, 128, false};
  const auto n = static_cast<Index>(row.size());
  Coded coded(grid, 1, n);
  device.quantize(matrix_view(row.data(), 1, n), grid, rounding, coded.view());
  std::vector<std::uint8_t> codes(row.size());
  for (Index j = 0; j < n; ++j) codes[static_cast<std::size_t>(j)] = coded.code(0, j);
  return codes;
}

std::vector<Grid> grids() {
  std::vector<Grid> all;
  for (const CodeFormat format : code_formats) {
    all.push_back({format, Extent::tensor, 128, false});
    all.push_back({format, Extent::row, 128, true});
    all.push_back({format, Extent::row, 128, false});
    all.push_back({format, Extent::block, 32, false});
    all.push_back({format, Extent::block, 5, true});
  }
  return all;
}

std::string describe(const Grid& g) {
  return std::string(name_of(g.format)) + " extent " + std::to_string(static_cast<int>(g.extent)) +
         " block " + std::to_string(g.block) + (g.power_of_two ? " pow2" : "");
}

// ---- words ----------------------------------------------------------------------------------

TEST(CodeFormat, HasANameAndALargestNumber) {
  for (const CodeFormat format : code_formats) {
    EXPECT_EQ(code_format_named(name_of(format)), format);
    EXPECT_EQ(largest_code(format), numbers(format).back()) << name_of(format);
  }
  EXPECT_EQ(code_format_named("fp8"), std::nullopt);
  EXPECT_EQ(numbers(CodeFormat::fp8_e4m3).size(), 127U);
}

TEST(Grid, SaysHowManyCodesAndScalesThereAre) {
  EXPECT_EQ(code_pitch(CodeFormat::int8, 7), 7);
  EXPECT_EQ(code_pitch(CodeFormat::int4, 7), 4);
  EXPECT_EQ(code_pitch(CodeFormat::int4, 8), 4);
  const Grid tensor{CodeFormat::int8, Extent::tensor, 32, false};
  const Grid row{CodeFormat::int8, Extent::row, 32, false};
  const Grid block{CodeFormat::int8, Extent::block, 32, false};
  EXPECT_EQ(scale_rows(tensor, 9) * scale_cols(tensor, 65), 1);
  EXPECT_EQ(scale_rows(row, 9) * scale_cols(row, 65), 9);
  EXPECT_EQ(scale_rows(block, 9) * scale_cols(block, 65), 27);
  EXPECT_TRUE(block == block);
  EXPECT_TRUE(block != row);
}

// ---- rounding -------------------------------------------------------------------------------

// T7.7: every number of the format is its own code, of either sign, by either rounding, for scales
// that are powers of two and others.
TEST_P(Quantizing, EveryNumberRoundTrips) {
  for (const CodeFormat format : code_formats) {
    const std::vector<double> all = numbers(format);
    const auto count = static_cast<Index>(2 * all.size());
    for (const float s : {1.0F, 0x1p-9F, 0.3F, 1e-12F, 7.7F}) {
      const bool exact = s == 1 || s == 0x1p-9F;
      for (const bool stochastic : {false, true}) {
        if (stochastic && !exact) continue;  // w/s need not be the number itself
        const Grid grid{format, Extent::tensor, 128, false};
        Coded coded(grid, 1, count);
        coded.scale(0, 0) = s;
        std::vector<float> w;
        for (const double v : all) {
          w.push_back(static_cast<float>(v) * s);
          w.push_back(-static_cast<float>(v) * s);
        }
        std::vector<float> residual = w;
        const MatrixView view = matrix_view(residual.data(), 1, count);
        device->quantize(view, grid, {stochastic, 1, 2, 3, 0, 0}, coded.view());
        for (Index j = 0; j < count; ++j) {
          ASSERT_EQ(coded.code(0, j), code_of(format, static_cast<std::size_t>(j / 2), j % 2 == 1))
              << name_of(format) << " " << w[static_cast<std::size_t>(j)];
        }
        EXPECT_THAT(residual, testing::Each(0.0F));
        device->dequantize(coded.view(), grid, view);
        EXPECT_EQ(residual, w) << name_of(format) << " " << s;
      }
    }
  }
}

TEST_P(Quantizing, CodesThatItNeverMakesMeanWhatTheFormatSays) {
  const auto value = [&](CodeFormat format, std::uint8_t code) {
    const float one = 1;
    float result = 0;
    device->dequantize({&code, 1, &one, 0, 1, 1}, {format, Extent::tensor, 128, false},
                       matrix_view(&result, 1, 1));
    return result;
  };
  EXPECT_TRUE(std::isnan(value(CodeFormat::fp8_e4m3, 0x7f)));
  EXPECT_TRUE(std::isnan(value(CodeFormat::fp8_e4m3, 0xff)));
  EXPECT_EQ(value(CodeFormat::fp8_e5m2, 0x7c), inf);
  EXPECT_EQ(value(CodeFormat::fp8_e5m2, 0xfc), -inf);
  for (const std::uint8_t code : {0x7d, 0x7e, 0x7f, 0xfd}) {
    EXPECT_TRUE(std::isnan(value(CodeFormat::fp8_e5m2, code)));
  }
  EXPECT_EQ(value(CodeFormat::fp8_e4m3, 0x80), 0);
  EXPECT_EQ(value(CodeFormat::int8, 0x80), -128);
  EXPECT_EQ(value(CodeFormat::int4, 0x08), -8);
}

// T7.7: all 2¹⁶ bf16 numbers, which hold every number of every format and every middle between
// two, and 2¹⁶ multiples of 1/64.
TEST_P(Quantizing, NearestIsTheDefinition) {
  std::vector<float> every;
  std::vector<float> even;
  for (std::uint32_t k = 0; k < 0x10000; ++k) {
    every.push_back(to_float(BFloat16{static_cast<std::uint16_t>(k)}));
    even.push_back((static_cast<float>(k) - 32768) / 64);
  }
  for (const CodeFormat format : code_formats) {
    const std::vector<double> all = numbers(format);
    for (const std::vector<float>& inputs : {every, even}) {
      std::vector<float> residual = inputs;
      const std::vector<std::uint8_t> codes = codes_of(*device, format, {}, residual);
      for (std::size_t k = 0; k < inputs.size(); ++k) {
        const float z = inputs[k];
        const std::size_t expected = std::isnan(z) ? 0 : nearest(all, z);
        ASSERT_EQ(codes[k], code_of(format, expected, z < 0)) << name_of(format) << " " << z;
        if (std::isnan(z)) {
          ASSERT_TRUE(std::isnan(residual[k]));
        } else {
          const auto number = static_cast<float>(z < 0 ? -all[expected] : all[expected]);
          ASSERT_EQ(residual[k], z - number) << name_of(format) << " " << z;
        }
      }
    }
  }
}

// D1: an exponent that stops at 7 makes 128 of all that is beyond 256.
TEST_P(Quantizing, D1ValuesFrom256To448KeepTheirBinade) {
  std::vector<float> inputs;
  for (float z = 240; z <= 448; z += 0.25F) {
    inputs.push_back(z);
    inputs.push_back(-z);
  }
  const std::vector<double> all = numbers(CodeFormat::fp8_e4m3);
  for (const bool stochastic : {false, true}) {
    std::vector<float> residual = inputs;
    const Rounding rounding{stochastic, 5, 6, 7, 0, 0};
    const std::vector<std::uint8_t> codes =
        codes_of(*device, CodeFormat::fp8_e4m3, rounding, residual);
    for (std::size_t k = 0; k < inputs.size(); ++k) {
      const double z = inputs[k];
      const double number = all[codes[k] & 0x7fU];
      EXPECT_EQ(codes[k] >= 0x80, z < 0);
      const double step = std::abs(z) < 256 ? 16 : 32;
      if (stochastic) {
        EXPECT_LT(std::abs(number - std::abs(z)), step) << z;
      } else {
        EXPECT_LE(std::abs(number - std::abs(z)), step / 2) << z;
      }
    }
  }
}

// T7.7. A mean of n draws between two neighbours deviates by step·√(f(1−f)/n); 4 of those, and 4
// counts where f·n is too small for a normal law.
TEST_P(Quantizing, StochasticRoundingIsUnbiased) {
  constexpr Index points = 1000;
  constexpr Index draws = 4096;
  const Grid grid{CodeFormat::fp8_e4m3, Extent::tensor, 128, false};
  const std::vector<double> all = numbers(grid.format);
  Coded coded(grid, points, draws);
  std::vector<float> w(points * draws);
  // A third each: up to 448, [240, 448], and around the subnormal numbers below 2⁻⁶.
  const auto point = [&](Index i) {
    const double at = (static_cast<double>(i / 3) + 0.37) / 334;
    const double z = i % 3 == 0 ? 448 * at : i % 3 == 1 ? 240 + 208 * at : 0x1p-5 * at;
    return static_cast<float>(i % 2 == 0 ? z : -z);
  };
  for (Index i = 0; i < points; ++i) std::fill_n(w.begin() + i * draws, draws, point(i));
  device->quantize(matrix_view(w.data(), points, draws), grid, {true, 11, 12, 13, 0, draws},
                   coded.view());
  for (Index i = 0; i < points; ++i) {
    const double z = point(i);
    const std::size_t under = below(all, z);
    const double step = under + 1 < all.size() ? all[under + 1] - all[under] : 0;
    double sum = 0;
    for (Index j = 0; j < draws; ++j) {
      const std::uint8_t code = coded.code(i, j);
      const std::size_t k = code & 0x7fU;
      ASSERT_TRUE(k == under || k == under + 1) << z << " to " << all[k];
      sum += (code >= 0x80 ? -1 : 1) * all[k];
    }
    const double f = step > 0 ? (std::abs(z) - all[under]) / step : 0;
    const double error = 4 * step * (std::sqrt(f * (1 - f) / draws) + 1.0 / draws);
    EXPECT_LE(std::abs(sum / draws - z), error) << z;
  }
}

// The documented layout, for ever: word (element mod 4) of call (element / 4), up iff u < f.
TEST_P(Quantizing, StochasticRoundingDrawsTheDocumentedWords) {
  for (const CodeFormat format : code_formats) {
    const std::vector<double> all = numbers(format);
    const Grid grid{format, Extent::tensor, 128, false};
    for (const Index first : {Index{0}, Index{3}, (Index{1} << 34) + 2}) {
      const Index distance = 1001;
      zoo::Matrix z = zoo::gaussian(3, 71, 9);
      for (double& v : z.data) v *= 0.3 * largest_code(format);
      Strided<float> w(z, 2);
      Coded coded(grid, 3, 71, 1);
      device->quantize(w.view(), grid, {true, 21, 22, 23, first, distance}, coded.view());
      for (Index i = 0; i < 3; ++i) {
        for (Index j = 0; j < 71; ++j) {
          const double v = static_cast<float>(z(i, j));
          const auto element = static_cast<std::uint64_t>(first + i * distance + j);
          const std::uint32_t word = random_words(21, 22, 23, element / 4)[element % 4];
          std::size_t k = below(all, v);
          if (k + 1 < all.size()) {
            const double f = (std::abs(v) - all[k]) / (all[k + 1] - all[k]);
            k += (word >> 8) * 0x1p-24 < f ? 1 : 0;
          }
          ASSERT_EQ(coded.code(i, j), code_of(format, k, v < 0)) << name_of(format) << " " << v;
        }
      }
    }
  }
}

// T7.7, and the published relative errors of Gaussian rows of 1024: 2.64e-2 and 3.75e-2.
TEST_P(Quantizing, RowMaximumMapsToTheLargestCode) {
  const zoo::Matrix values = uneven(64, 1024, 3);
  for (const CodeFormat format : code_formats) {
    for (const bool stochastic : {false, true}) {
      const Grid grid{format, Extent::row, 128, false};
      Strided<float> w(values, 0);
      const std::vector<float> before = w.data;
      Coded coded(grid, 64, 1024);
      device->abs_maxima(w.view(), grid, coded.scales());
      device->scales_from_maxima(grid, coded.scales());
      EXPECT_EQ(device->count_beyond(w.view(), grid, coded.scales()), 0);
      device->quantize(w.view(), grid, {stochastic, 1, 1, 1, 0, 1024}, coded.view());
      double error = 0;
      double size = 0;
      for (Index i = 0; i < 64; ++i) {
        Index largest = 0;
        double row_error = 0;
        double row_size = 0;
        for (Index j = 0; j < 1024; ++j) {
          const auto at = static_cast<std::size_t>(i * 1024 + j);
          const auto most = static_cast<std::size_t>(i * 1024 + largest);
          if (std::abs(before[at]) > std::abs(before[most])) largest = j;
          row_error += static_cast<double>(w.data[at]) * static_cast<double>(w.data[at]);
          row_size += static_cast<double>(before[at]) * static_cast<double>(before[at]);
        }
        error += row_error / row_size;
        size += 1;
        const bool negative = before[static_cast<std::size_t>(i * 1024 + largest)] < 0;
        EXPECT_EQ(coded.code(i, largest), code_of(format, numbers(format).size() - 1, negative));
      }
      if (format == CodeFormat::fp8_e4m3) {
        // 65536 errors: their mean square deviates by less than 1 %.
        EXPECT_NEAR(std::sqrt(error / size), stochastic ? 3.75e-2 : 2.64e-2, 0.02 * 3e-2);
      }
    }
  }
}

TEST_P(Quantizing, WhatIsBeyondSaturates) {
  for (const CodeFormat format : code_formats) {
    const std::vector<double> all = numbers(format);
    const auto most = static_cast<float>(all.back());
    for (const bool stochastic : {false, true}) {
      const std::vector<float> inputs = {most,         -most,      most * 1.001F, -most * 1.2F,
                                         most * 1e10F, -most * 10, inf,           -inf};
      std::vector<float> residual = inputs;
      EXPECT_EQ(
          codes_of(*device, format, {stochastic, 1, 2, 3, 0, 0}, residual),
          (std::vector<std::uint8_t>{
              code_of(format, all.size() - 1, false), code_of(format, all.size() - 1, true),
              code_of(format, all.size() - 1, false), code_of(format, all.size() - 1, true),
              code_of(format, all.size() - 1, false), code_of(format, all.size() - 1, true),
              code_of(format, all.size() - 1, false), code_of(format, all.size() - 1, true)}));
      for (std::size_t k = 0; k < inputs.size(); ++k) {
        EXPECT_EQ(residual[k], inputs[k] - (k % 2 == 0 ? most : -most));
      }
      std::vector<float> count = inputs;
      float one = 1;
      const Grid grid{format, Extent::tensor, 128, false};
      EXPECT_EQ(
          device->count_beyond(matrix_view(count.data(), 2, 4), grid, matrix_view(&one, 1, 1)), 6);
    }
  }
}

TEST_P(Quantizing, CountsWhatIsBeyondItsOwnScale) {
  const Grid grid{CodeFormat::int8, Extent::block, 4, false};
  Strided<float> w(zoo::Matrix(3, 10), 3);
  Coded coded(grid, 3, 10, 2);
  for (Index i = 0; i < 3; ++i) {
    for (Index j = 0; j < 10; ++j) {
      w(i, j) = (i + j) % 2 == 0 ? 200.0F : -200.0F;
      coded.scale(i, j) = i == 1 && j / 4 == 2 ? 1.0F : 2.0F;  // 127 beside 200
    }
  }
  EXPECT_EQ(device->count_beyond(w.view(), grid, coded.scales()), 2);
  w(0, 0) = nan;
  w(2, 9) = -300;
  EXPECT_EQ(device->count_beyond(w.view(), grid, coded.scales()), 3);
}

TEST_P(Quantizing, NanHasCodeZeroAndStays) {
  for (const CodeFormat format : code_formats) {
    for (const bool stochastic : {false, true}) {
      std::vector<float> residual = {1, nan, -nan, -1, 0.0F, -0.0F};
      const std::vector<std::uint8_t> codes =
          codes_of(*device, format, {stochastic, 1, 2, 3, 0, 0}, residual);
      EXPECT_EQ(codes[0], code_of(format, below(numbers(format), 1), false));
      EXPECT_THAT((std::vector<int>{codes[1], codes[2], codes[4], codes[5]}), testing::Each(0));
      EXPECT_TRUE(std::isnan(residual[1]) && std::isnan(residual[2]));
      EXPECT_EQ(residual[0] + residual[3] + residual[4] + residual[5], 0);
    }
    const Grid grid{format, Extent::row, 128, false};
    std::vector<float> w = {1, 2, 3, 4};
    Coded coded(grid, 2, 2);
    coded.scale(0, 0) = nan;
    device->quantize(matrix_view(w.data(), 2, 2), grid, {}, coded.view());
    EXPECT_EQ(coded.code(0, 0), 0);
    EXPECT_EQ(coded.code(0, 1), 0);
    EXPECT_TRUE(std::isnan(w[0]) && std::isnan(w[1]));
    EXPECT_EQ(w[2] + w[3], 0) << name_of(format);
  }
}

// ---- scales ---------------------------------------------------------------------------------

TEST_P(Quantizing, FindsTheMaximumOfWhatSharesAScale) {
  const auto judge = [&](auto type, Index rows, Index cols, Index gap) {
    using T = decltype(type);
    for (Grid grid : grids()) {
      if (grid.format != CodeFormat::int8) continue;  // the format has no part in it
      Strided<T> w(uneven(rows, cols, 5), gap);
      if (rows > 2 && cols > 6) {
        w(2, 6) = static_cast<T>(nan);
        w(1, 0) = static_cast<T>(-inf);
      }
      Coded coded(grid, rows, cols, gap);
      const MatrixView scales = coded.scales();
      std::vector<float> expected(static_cast<std::size_t>(scales.rows * scales.cols));
      for (Index i = 0; i < rows; ++i) {
        for (Index j = 0; j < cols; ++j) {
          const Index unit = grid.extent == Extent::block ? j / grid.block : 0;
          const Index line = grid.extent == Extent::tensor ? 0 : i;
          float& most = expected[static_cast<std::size_t>(line * scales.cols + unit)];
          const auto here = static_cast<float>(std::abs(w(i, j)));
          if (std::isnan(here) || here > most) most = here;
        }
      }
      device->abs_maxima(w.view(), grid, scales);
      for (Index i = 0; i < scales.rows; ++i) {
        for (Index j = 0; j < scales.cols; ++j) {
          const float found = static_cast<const float*>(scales.data)[i * scales.ld + j];
          const float most = expected[static_cast<std::size_t>(i * scales.cols + j)];
          EXPECT_TRUE(found == most || (std::isnan(found) && std::isnan(most)))
              << describe(grid) << " " << rows << "x" << cols << ": " << i << "," << j << " "
              << found << " for " << most;
        }
      }
    }
  };
  for (const auto& [rows, cols] : std::vector<std::pair<Index, Index>>{
           {1, 1}, {3, 7}, {5, 64}, {4, 133}, {9, 2500}, {300, 3}, {3, 0}, {0, 3}}) {
    for (const Index gap : {0, 3}) {
      judge(float{}, rows, cols, gap);
      judge(double{}, rows, cols, gap);
    }
  }
  std::vector<BFloat16> half = {to_bf16(1.0F), to_bf16(-3.0F)};
  float most = -1;
  device->abs_maxima(matrix_view(half.data(), 1, 2), {}, matrix_view(&most, 1, 1));
  EXPECT_EQ(most, 3);
}

TEST_P(Quantizing, ScalesAreTheMaximaOverTheLargestCode) {
  std::vector<float> maxima = {0, 1, 448, 1e-15F, 3.7F, 1e30F, 57344, 127, 7, 896, 0x1p-30F, 1e-9F};
  for (int k = 0; k < 500; ++k) maxima.push_back(std::exp(0.1F * static_cast<float>(k) - 20));
  const auto n = static_cast<Index>(maxima.size());
  for (const CodeFormat format : code_formats) {
    for (const bool power_of_two : {false, true}) {
      const Grid grid{format, Extent::block, 32, power_of_two};
      std::vector<float> scales = maxima;
      scales.push_back(nan);
      device->scales_from_maxima(grid, matrix_view(scales.data(), 1, n + 1));
      EXPECT_TRUE(std::isnan(scales.back()));
      for (std::size_t k = 0; k < maxima.size(); ++k) {
        const double exact = static_cast<double>(maxima[k]) / largest_code(format);
        const float plain = std::max(static_cast<float>(exact), 1e-12F);
        if (!power_of_two) {
          EXPECT_EQ(scales[k], plain) << name_of(format) << " " << maxima[k];
        } else {
          EXPECT_EQ(std::exp2(std::round(std::log2(scales[k]))), scales[k]);
          EXPECT_TRUE(scales[k] >= plain && scales[k] / 2 < plain) << maxima[k];
        }
      }
    }
  }
}

// With the same scales: the same codes. With those of its own, now smaller, maxima: the same
// matrix, since the finer grid holds the coarser one's numbers.
TEST_P(Quantizing, PowersOfTwoAreIdempotent) {
  for (const CodeFormat format : code_formats) {
    for (const bool stochastic : {false, true}) {
      const Grid grid{format, Extent::block, 16, true};
      Strided<float> w(uneven(20, 100, 8), 1);
      Coded coded(grid, 20, 100);
      device->abs_maxima(w.view(), grid, coded.scales());
      device->scales_from_maxima(grid, coded.scales());
      const Rounding rounding{stochastic, 1, 2, 3, 0, 100};
      device->quantize(w.view(), grid, rounding, coded.view());
      Strided<float> once(zoo::Matrix(20, 100), 0);
      device->dequantize(coded.view(), grid, once.view());
      Strided<float> residual = once;
      Coded again = coded;
      device->quantize(residual.view(), grid, rounding, again.view());
      EXPECT_EQ(again.bytes(), coded.bytes()) << name_of(format);
      EXPECT_THAT(residual.data, testing::Each(0.0F));
      Strided<float> other = once;
      Coded fresh(grid, 20, 100);
      device->abs_maxima(other.view(), grid, fresh.scales());
      device->scales_from_maxima(grid, fresh.scales());
      device->quantize(other.view(), grid, rounding, fresh.view());
      EXPECT_THAT(other.data, testing::Each(0.0F));
      device->dequantize(fresh.view(), grid, other.view());
      EXPECT_EQ(other.data, once.data);
    }
  }
}

// ---- layouts --------------------------------------------------------------------------------

TEST_P(Quantizing, PacksTwoInt4InAByte) {
  const Grid grid{CodeFormat::int4, Extent::tensor, 128, false};
  std::vector<float> w = {1, -2, 3, -7, 7, 0, 5, 6, -1, -3};
  Coded coded(grid, 2, 5, 1);
  device->quantize(matrix_view(w.data(), 2, 5), grid, {}, coded.view());
  EXPECT_EQ(coded.bytes(), (std::vector<std::uint8_t>{0xe1, 0x93, 0x07, 0x7b,  //
                                                      0x50, 0xf6, 0x0d, 0x7b}));
}

/// Against the reference, every byte.
TEST_P(Quantizing, GivesTheReferencesBits) {
  const auto judge = [&](auto type, Index rows, Index cols, Index gap, const Grid& grid,
                         bool stochastic) {
    using T = decltype(type);
    const std::string where = describe(grid) + " " + std::to_string(rows) + "x" +
                              std::to_string(cols) + " gap " + std::to_string(gap);
    zoo::Matrix values = uneven(rows, cols, 31);
    for (std::size_t k = 7; k < values.data.size(); k += 101) values.data[k] = 0;
    for (std::size_t k = 9; k < values.data.size(); k += 301) values.data[k] *= 1e-30;
    const Rounding rounding{stochastic, 41, 42, 43, 5, cols + 3};
    Strided<T> actual_w(values, gap);
    Strided<T> expected_w(values, gap);
    Coded actual(grid, rows, cols, gap);
    Coded expected(grid, rows, cols, gap);
    device->abs_maxima(actual_w.view(), grid, actual.scales());
    reference->abs_maxima(expected_w.view(), grid, expected.scales());
    device->scales_from_maxima(grid, actual.scales());
    reference->scales_from_maxima(grid, expected.scales());
    ASSERT_EQ(bits(actual.all_scales()), bits(expected.all_scales())) << where;
    if (rows > 1) {
      actual.scale(1, 0) *= 0.5F;  // half of a row, or block, saturates
      expected.scale(1, 0) *= 0.5F;
    }
    EXPECT_EQ(device->count_beyond(actual_w.view(), grid, actual.scales()),
              reference->count_beyond(expected_w.view(), grid, expected.scales()))
        << where;
    device->quantize(actual_w.view(), grid, rounding, actual.view());
    reference->quantize(expected_w.view(), grid, rounding, expected.view());
    ASSERT_EQ(actual.bytes(), expected.bytes()) << where;
    ASSERT_EQ(bits(actual_w.data), bits(expected_w.data)) << where;
    EXPECT_TRUE(actual.gaps_untouched() && actual_w.gaps_untouched()) << where;
    for (const DType to : {DType::f32, DType::bf16, DType::f64}) {
      std::vector<std::byte> one(static_cast<std::size_t>(rows * (cols + gap)) * bytes_of(to));
      std::vector<std::byte> two = one;
      device->dequantize(actual.view(), grid, {one.data(), rows, cols, cols + gap, to});
      reference->dequantize(actual.view(), grid, {two.data(), rows, cols, cols + gap, to});
      ASSERT_EQ(one, two) << where << " to " << name_of(to);
    }
  };
  for (const Grid& grid : grids()) {
    for (const bool stochastic : {false, true}) {
      for (const auto& [rows, cols] : std::vector<std::pair<Index, Index>>{
               {0, 0}, {0, 5}, {5, 0}, {1, 1}, {7, 1}, {2, 3}, {5, 8}, {7, 13}, {3, 2051}}) {
        for (const Index gap : {0, 3}) {
          if (cols > 100 && gap == 0) continue;
          judge(float{}, rows, cols, gap, grid, stochastic);
          if (cols < 100 && gap > 0) judge(double{}, rows, cols, gap, grid, stochastic);
        }
      }
    }
  }
}

// f64 weights: the codes of the f32 ones, and a residual with no rounding but the difference's.
TEST_P(Quantizing, TakesF64Weights) {
  const Grid grid{CodeFormat::fp8_e4m3, Extent::row, 128, false};
  zoo::Matrix w = zoo::gaussian(3, 40, 4);
  const zoo::Matrix before = w;
  Coded coded(grid, 3, 40);
  device->abs_maxima(w.view(), grid, coded.scales());
  device->scales_from_maxima(grid, coded.scales());
  device->quantize(w.view(), grid, {}, coded.view());
  const std::vector<double> all = numbers(grid.format);
  zoo::Matrix back(3, 40);
  device->dequantize(coded.view(), grid, back.view());
  for (Index i = 0; i < 3; ++i) {
    const auto s = static_cast<double>(coded.scale(i, 0));
    for (Index j = 0; j < 40; ++j) {
      const std::size_t k = nearest(all, static_cast<float>(before(i, j) / s));
      const double number = before(i, j) < 0 ? -all[k] : all[k];
      EXPECT_EQ(coded.code(i, j), code_of(grid.format, k, before(i, j) < 0));
      EXPECT_EQ(w(i, j), before(i, j) - number * s);
      EXPECT_EQ(back(i, j), number * s);
    }
  }
}

// T7.10: any cut by rows, and by columns where a block ends.
TEST_P(Quantizing, DoesNotDependOnHowTheMatrixIsCut) {
  constexpr Index rows = 13;
  constexpr Index cols = 303;  // every row, and every piece, begins at another word of its block
  const Index begin = (Index{1} << 33) + 1;
  const zoo::Matrix values = uneven(rows, cols, 6);
  for (const CodeFormat format : code_formats) {
    const Grid grid{format, Extent::block, 6, false};
    Strided<float> whole_w(values, 0);
    Coded whole(grid, rows, cols);
    device->abs_maxima(whole_w.view(), grid, whole.scales());
    device->scales_from_maxima(grid, whole.scales());
    const Coded scaled = whole;
    device->quantize(whole_w.view(), grid, {true, 1, 2, 3, begin, cols}, whole.view());
    for (const auto& [high, wide] :
         std::vector<std::pair<Index, Index>>{{1, 303}, {5, 303}, {13, 60}, {4, 102}, {2, 18}}) {
      Strided<float> w(values, 0);
      Coded pieces = scaled;
      for (Index i = 0; i < rows; i += high) {
        for (Index j = 0; j < cols; j += wide) {
          MatrixView part = w.view();
          QuantizedView q = pieces.view();
          part.data = &w(i, j);
          q.codes = static_cast<std::uint8_t*>(q.codes) + i * q.pitch + code_pitch(format, j);
          q.scales = &pieces.scale(i, j);
          part.rows = q.rows = std::min(high, rows - i);
          part.cols = q.cols = std::min(wide, cols - j);
          device->quantize(part, grid, {true, 1, 2, 3, begin + i * cols + j, cols}, q);
        }
      }
      EXPECT_EQ(pieces.bytes(), whole.bytes()) << name_of(format) << " " << high << "x" << wide;
      EXPECT_EQ(bits(w.data), bits(whole_w.data));
    }
    Strided<float> w(values, 0);
    Coded other = scaled;
    device->quantize(w.view(), grid, {true, 1, 2, 4, begin, cols}, other.view());
    EXPECT_NE(other.bytes(), whole.bytes()) << "the step must matter";
  }
}

// ---- the pull-back --------------------------------------------------------------------------

// Against f64. Six roundings of at most 2⁻²⁴, and those of the f32 scalars.
TEST_P(Quantizing, PullsBackThroughTheDivisorOfAdamW) {
  for (const bool eps_first : {false, true}) {
    for (const Index gap : {0, 3}) {
      const AdamWScalars s{0.01, 0.1, 0.9, 0.95, 1e-3, 0.271, 0.1426, eps_first};
      const double kappa = -11.1;
      Strided<float> m(zoo::gaussian(7, 33, 1), gap);
      zoo::Matrix squares = zoo::gaussian(7, 33, 2);
      for (double& x : squares.data) x = x * x;
      Strided<float> v(squares, gap);
      Strided<float> e(uneven(7, 33, 3), gap);
      Strided<float> judge = m;
      const Strided<float> before = m;
      device->adamw_pull_back(s, kappa, v.view(), e.view(), m.view());
      reference->adamw_pull_back(s, kappa, v.view(), e.view(), judge.view());
      EXPECT_EQ(bits(m.data), bits(judge.data));
      EXPECT_TRUE(m.gaps_untouched());
      for (Index i = 0; i < 7; ++i) {
        for (Index j = 0; j < 33; ++j) {
          const auto second = static_cast<double>(v(i, j));
          const double divisor = eps_first
                                     ? (std::sqrt(second) + s.eps) / std::sqrt(s.bias_correction2)
                                     : std::sqrt(second / s.bias_correction2) + s.eps;
          const double term = kappa * s.bias_correction1 * divisor * static_cast<double>(e(i, j));
          const auto old = static_cast<double>(before.data[static_cast<std::size_t>(i * m.ld + j)]);
          EXPECT_NEAR(m(i, j), old + term, 0x1p-21 * (std::abs(old) + std::abs(term)));
        }
      }
    }
  }
}

// What it is for: with g = 0, λ = 0 and a frozen v, the next step puts back what was lost. κ for
// λ = 0 is (1 − 1/β₁)/η; the moment then decays by β₁, so the first step returns 1 − β₁ of e.
TEST_P(Quantizing, PullBackReturnsTheResidualInTheNextSteps) {
  const double lr = 0.01;
  const double beta = 0.9;
  Strided<float> m(zoo::Matrix(1, 50), 0);
  zoo::Matrix squares = zoo::gaussian(1, 50, 2);
  for (double& x : squares.data) x = 0.1 + x * x;
  Strided<float> v(squares, 0);
  const Strided<float> e(zoo::gaussian(1, 50, 3), 0);
  Strided<float> residual = e;
  // Frozen: β₂ = 1. Bias corrections of the pull-back's step are those of the next here.
  const AdamWScalars s{lr, 0, beta, 1, 1e-8, 0.5, 0.7, false};
  device->adamw_pull_back(s, (1 - 1 / beta) / lr, v.view(), residual.view(), m.view());
  Strided<float> g(zoo::Matrix(1, 50), 0);
  Strided<float> w(zoo::Matrix(1, 50), 0);
  for (int step = 0; step < 300; ++step) device->adamw(s, g.view(), m.view(), v.view(), w.view());
  for (Index j = 0; j < 50; ++j) {
    // 300 sums of f32.
    EXPECT_NEAR(w(0, j), residual(0, j), 300 * 0x1p-24 * std::abs(residual(0, j))) << j;
  }
}

// ---- halves ---------------------------------------------------------------------------------

TEST_P(Quantizing, SplitsAndMergesEveryF32) {
  std::vector<std::uint32_t> patterns = {
      0,          0x80000000, 1,          0x80000001, 0x007fffff, 0x00800000, 0x3f800000,
      0x3f808000, 0x3f818000, 0x3f807fff, 0x3f808001, 0xbf808000, 0xbf818000, 0x7f7fffff,
      0xff7fffff, 0x7f7f8000, 0x7f7f7fff, 0x7f800000, 0xff800000, 0x00008000, 0x00018000};
  std::mt19937 random(5);
  while (patterns.size() < 40001) patterns.push_back(random());
  const auto n = static_cast<Index>(patterns.size());
  std::vector<float> w;
  w.reserve(patterns.size());
  for (const std::uint32_t p : patterns) w.push_back(std::bit_cast<float>(p));
  std::vector<BFloat16> high(patterns.size());
  std::vector<BFloat16> low(patterns.size());
  device->split_f32(matrix_view(w.data(), 1, n), matrix_view(high.data(), 1, n),
                    matrix_view(low.data(), 1, n));
  std::vector<float> merged(patterns.size());
  device->merge_f32(matrix_view(high.data(), 1, n), matrix_view(low.data(), 1, n),
                    matrix_view(merged.data(), 1, n));
  for (std::size_t k = 0; k < patterns.size(); ++k) {
    const float upper = to_float(high[k]);
    if (std::isnan(w[k])) {
      ASSERT_TRUE(std::isnan(merged[k]) && std::isnan(upper)) << std::hex << patterns[k];
      continue;
    }
    ASSERT_EQ(std::bit_cast<std::uint32_t>(merged[k]), patterns[k]) << std::hex << patterns[k];
    const bool is_tie = (patterns[k] & 0xffffU) == 0x8000;
    if (!is_tie) {
      ASSERT_EQ(high[k], to_bf16(w[k])) << std::hex << patterns[k];
    } else {
      ASSERT_GT(std::abs(upper), std::abs(w[k])) << std::hex << patterns[k];
    }
  }
}

TEST_P(Quantizing, SplitsStridedViews) {
  Strided<float> w(uneven(5, 9, 2), 3);
  std::vector<BFloat16> high(60, BFloat16{7});
  std::vector<BFloat16> low(55, BFloat16{7});
  const MatrixView upper{high.data(), 5, 9, 12, DType::bf16};
  const MatrixView lower{low.data(), 5, 9, 11, DType::bf16};
  device->split_f32(w.view(), upper, lower);
  Strided<float> merged(zoo::Matrix(5, 9), 1);
  device->merge_f32(upper, lower, merged.view());
  for (Index i = 0; i < 5; ++i) {
    for (Index j = 0; j < 9; ++j) EXPECT_EQ(merged(i, j), w(i, j));
  }
  EXPECT_EQ(high[9], BFloat16{7});
  EXPECT_EQ(low[10], BFloat16{7});
  EXPECT_TRUE(merged.gaps_untouched());
}

// ---- what is refused, and what it costs -----------------------------------------------------

TEST_P(Quantizing, RefusesWhatDoesNotFit) {
  const Grid grid{CodeFormat::int8, Extent::row, 128, false};
  const Grid tensor{CodeFormat::int8, Extent::tensor, 128, false};
  const Grid nothing{CodeFormat::int8, Extent::block, 0, false};
  const Grid block{CodeFormat::int8, Extent::block, 2, false};
  Strided<float> w(zoo::Matrix(2, 3), 0);
  Strided<float> other(zoo::Matrix(2, 4), 0);
  Strided<double> wide(zoo::Matrix(2, 1), 0);
  Strided<float> one(zoo::Matrix(1, 1), 0);
  std::vector<BFloat16> half(6);
  const MatrixView narrow = matrix_view(half.data(), 2, 3);
  Coded coded(grid, 2, 3);
  QuantizedView overlapping = coded.view();
  overlapping.pitch = 2;
  QuantizedView missing = coded.view();
  missing.codes = nullptr;
  const std::vector<std::function<void()>> calls = {
      [&] { device->quantize(other.view(), grid, {}, coded.view()); },
      [&] { device->quantize(narrow, grid, {}, coded.view()); },
      [&] { device->quantize(w.view(), grid, {}, overlapping); },
      [&] { device->quantize(w.view(), grid, {}, missing); },
      [&] { device->quantize(w.view(), tensor, {}, coded.view()); },
      [&] { device->quantize(w.view(), nothing, {}, coded.view()); },
      [&] { device->quantize(w.view(), block, {}, coded.view()); },
      [&] { device->dequantize(coded.view(), grid, other.view()); },
      [&] { device->dequantize(coded.view(), tensor, w.view()); },
      [&] { device->abs_maxima(w.view(), grid, wide.view()); },
      [&] { device->abs_maxima(w.view(), grid, one.view()); },
      [&] { device->abs_maxima(w.view(), nothing, one.view()); },
      [&] { device->scales_from_maxima(grid, wide.view()); },
      [&] { (void)device->count_beyond(w.view(), grid, one.view()); },
      [&] { device->adamw_pull_back({}, 1, w.view(), w.view(), other.view()); },
      [&] { device->adamw_pull_back({}, 1, wide.view(), wide.view(), wide.view()); },
      [&] { device->split_f32(w.view(), narrow, w.view()); },
      [&] { device->merge_f32(narrow, narrow, other.view()); },
  };
  for (std::size_t k = 0; k < calls.size(); ++k) EXPECT_THROW(calls[k](), ShapeError) << k;
}

TEST_P(Quantizing, AllocatesNothing) {
  constexpr Index rows = 3;
  constexpr Index cols = 3000;
  const Grid grid{CodeFormat::int4, Extent::row, 128, false};
  DeviceBuffer w(*raw, rows * cols * 4);
  DeviceBuffer codes(*raw, rows * cols / 2);
  DeviceBuffer scales(*raw, rows * 4);
  const MatrixView view{w.data(), rows, cols, cols, DType::f32};
  const MatrixView scale_view{scales.data(), rows, 1, 1, DType::f32};
  const QuantizedView q{codes.data(), cols / 2, static_cast<float*>(scales.data()), 1, rows, cols};
  raw->fill(1, view);
  (void)raw->sum_squares(view);
  const long before = count_new::calls;
  raw->abs_maxima(view, grid, scale_view);
  raw->scales_from_maxima(grid, scale_view);
  const std::int64_t count = raw->count_beyond(view, grid, scale_view);
  raw->quantize(view, grid, {true, 1, 2, 3, 0, cols}, q);
  raw->dequantize(q, grid, view);
  raw->adamw_pull_back({}, 1, view, view, view);
  EXPECT_EQ(count_new::calls - before, 0) << count;
}

}  // namespace
}  // namespace orthrus::kernels
