#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <orthrus/error.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/backend_suites.hpp"
#include "kernels/bf16.hpp"
#include "kernels/block_sum.hpp"
#include "kernels/carve.hpp"
#include "kernels/device_memory.hpp"
#include "kernels/devices.hpp"
#include "kernels/eigh.hpp"
#include "kernels/gram.hpp"
#include "kernels/msign.hpp"
#include "kernels/rational_msign.hpp"
#include "kernels/spd_root.hpp"
#include "kernels/triangle.hpp"
#include "support/count_new.hpp"
#include "support/zoo.hpp"

namespace orthrus::kernels {
namespace {

using testing::HasSubstr;

/// A matrix of any type, `offset` elements behind a 64-byte boundary, with `gap` elements after
/// each row and a guard behind the last.
class Buffer {
 public:
  Buffer(Index rows, Index cols, DType dtype, Index gap = 0, Index offset = 0)
      : rows_(rows), cols_(cols), ld_(cols + gap), dtype_(dtype), offset_(offset) {
    const Index elements = rows * ld_ + offset + 16;
    storage_.assign(static_cast<std::size_t>(elements) * bytes_of(dtype) + 64, std::byte{0x7b});
  }
  /// Holds `values`, rounded once to the type.
  Buffer(const zoo::Matrix& values, DType dtype, Index gap = 0, Index offset = 0)
      : Buffer(values.rows, values.cols, dtype, gap, offset) {
    for (Index i = 0; i < rows_; ++i) {
      for (Index j = 0; j < cols_; ++j) set(i, j, values(i, j));
    }
  }

  [[nodiscard]] MatrixView view() {
    auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    const std::size_t aligned = (64 - address % 64) % 64;
    return {storage_.data() + aligned + static_cast<std::size_t>(offset_) * bytes_of(dtype_), rows_,
            cols_, ld_, dtype_};
  }

  void set(Index i, Index j, double value) {
    void* data = view().data;
    const Index at = i * ld_ + j;
    if (dtype_ == DType::f32) static_cast<float*>(data)[at] = static_cast<float>(value);
    if (dtype_ == DType::bf16) static_cast<BFloat16*>(data)[at] = to_bf16(value);
    if (dtype_ == DType::f64) static_cast<double*>(data)[at] = value;
  }
  double operator()(Index i, Index j) {
    const void* data = view().data;
    const Index at = i * ld_ + j;
    if (dtype_ == DType::f32) return static_cast<const float*>(data)[at];
    if (dtype_ == DType::bf16) return to_float(static_cast<const BFloat16*>(data)[at]);
    return static_cast<const double*>(data)[at];
  }
  /// The entries, packed, as bytes.
  std::vector<std::byte> bits() {
    std::vector<std::byte> result;
    const auto* data = static_cast<const std::byte*>(view().data);
    const std::size_t width = bytes_of(dtype_);
    for (Index i = 0; i < rows_; ++i) {
      const std::byte* row = data + static_cast<std::size_t>(i * ld_) * width;
      result.insert(result.end(), row, row + static_cast<std::size_t>(cols_) * width);
    }
    return result;
  }
  zoo::Matrix values() {
    zoo::Matrix result(rows_, cols_);
    for (Index i = 0; i < rows_; ++i) {
      for (Index j = 0; j < cols_; ++j) result(i, j) = (*this)(i, j);
    }
    return result;
  }
  /// Is every byte outside the entries as it was?
  bool gaps_untouched() {
    std::vector<std::byte> copy = storage_;
    auto* data = static_cast<std::byte*>(view().data);
    const std::size_t width = bytes_of(dtype_);
    for (Index i = 0; i < rows_; ++i) {
      const std::size_t at = static_cast<std::size_t>(data - storage_.data()) +
                             static_cast<std::size_t>(i * ld_) * width;
      std::fill_n(copy.begin() + static_cast<std::ptrdiff_t>(at),
                  static_cast<std::size_t>(cols_) * width, std::byte{0x7b});
    }
    return std::all_of(copy.begin(), copy.end(), [](std::byte b) { return b == std::byte{0x7b}; });
  }

 private:
  Index rows_, cols_, ld_;
  DType dtype_;
  Index offset_;
  std::vector<std::byte> storage_;
};

double unit_roundoff(DType dtype) {
  return dtype == DType::f64 ? 0x1p-53 : dtype == DType::f32 ? 0x1p-24 : 0x1p-8;
}
/// Of the sums: bf16 is summed in f32.
double sum_roundoff(DType dtype) { return dtype == DType::f64 ? 0x1p-53 : 0x1p-24; }

zoo::Matrix absolute(zoo::Matrix x) {
  for (double& v : x.data) v = std::abs(v);
  return x;
}

Transpose op_of(bool transposed) { return transposed ? Transpose::yes : Transpose::no; }

zoo::Matrix op(const zoo::Matrix& x, bool transposed) {
  return transposed ? zoo::transposed(x) : x;
}

// 4096 is the block of a sum: shapes around it, empty ones, single rows and columns.
const std::vector<std::pair<Index, Index>> shapes = {
    {0, 0}, {0, 5},  {5, 0},   {1, 1},    {1, 7},    {7, 1},    {1, 257},
    {5, 8}, {7, 13}, {33, 64}, {1, 4096}, {1, 4097}, {70, 129}, {3, 5001}};

// ---- every device, against closed forms
// -----------------------------------------------------------

zoo::Matrix small(Index rows, Index cols, std::vector<double> entries) {
  zoo::Matrix x(rows, cols);
  x.data = std::move(entries);
  return x;
}

// Small integers are exact in every type, so these are equalities.
TEST_P(EveryDevice, MultipliesSmallIntegersExactly) {
  const zoo::Matrix a = small(2, 3, {1, 2, 3, 4, 5, 6});
  const zoo::Matrix b = small(3, 2, {1, 0, -1, 2, 3, 1});
  const zoo::Matrix expected = small(2, 2, {2 * 8 + 10, 2 * 7 + 20, 2 * 17 + 30, 2 * 16 + 40});
  for (const bool ta : {false, true}) {
    for (const bool tb : {false, true}) {
      Buffer left(op(a, ta), dtype);
      Buffer right(op(b, tb), dtype);
      Buffer c(small(2, 2, {1, 2, 3, 4}), dtype);
      device->gemm(2, left.view(), op_of(ta), right.view(), op_of(tb), 10, c.view());
      EXPECT_EQ(c.values().data, expected.data) << ta << tb;
    }
  }
}

TEST_P(EveryDevice, SquaresSmallIntegersExactly) {
  const zoo::Matrix a = small(2, 3, {1, 2, 3, 4, 5, 6});
  for (const bool t : {false, true}) {
    Buffer x(op(a, t), dtype);
    Buffer c(small(2, 2, {1, 2, 2, 5}), dtype);
    device->syrk(2, x.view(), op_of(t), 3, c.view());
    EXPECT_EQ(c.values().data, (std::vector<double>{31, 70, 70, 169}));
  }
}

// 3·127² and more, which bf16 cannot hold: an f32 result is not rounded to it.
TEST_P(EveryDevice, KeepsTheF32SumsOfBf16Factors) {
  if (dtype != DType::bf16) return;  // another type is its own result
  const zoo::Matrix a = small(2, 3, {127, 127, 127, 1, 2, 3});
  for (const bool t : {false, true}) {
    Buffer x(op(a, t), dtype);
    Buffer c(small(2, 2, {1, 2, 2, 5}), DType::f32, 1);
    device->syrk(1, x.view(), op_of(t), 3, c.view());
    EXPECT_EQ(c.values().data, (std::vector<double>{48387 + 3, 762 + 6, 762 + 6, 14 + 15}));
    device->gemm(2, x.view(), op_of(t), x.view(), op_of(!t), 0, c.view());
    EXPECT_EQ(c.values().data, (std::vector<double>{96774, 1524, 1524, 28}));
    EXPECT_TRUE(c.gaps_untouched());
  }
}

// A = LLᵀ with a small L of powers of two on the diagonal: every step is exact. What lies above the
// diagonal is not read.
TEST_P(EveryDevice, InvertsSmallIntegersExactly) {
  if (dtype == DType::bf16) {
    Buffer a(small(2, 2, {4, 2, 2, 2}), dtype);
    EXPECT_THROW((void)device->invert_spd(a.view()), ShapeError);
    return;
  }
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Buffer a(small(2, 2, {4, nan, 2, 2}), dtype, 3);
  EXPECT_TRUE(device->invert_spd(a.view()));
  EXPECT_EQ(a.values().data, (std::vector<double>{0.5, -0.5, -0.5, 1}));
  EXPECT_TRUE(a.gaps_untouched());
  Buffer one(small(1, 1, {0.25}), dtype);
  EXPECT_TRUE(device->invert_spd(one.view()));
  EXPECT_EQ(one(0, 0), 4);
  Buffer empty(0, 0, dtype);
  EXPECT_TRUE(device->invert_spd(empty.view()));
}

TEST_P(EveryDevice, ReportsWhatIsNotPositiveDefinite) {
  if (dtype == DType::bf16) return;  // it is not inverted
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  for (const Index n : {1, 5, 60, 130}) {
    for (const double bad : {0.0, -1.0, nan, inf, -inf}) {
      for (const Index at : {Index{0}, n / 2, n - 1}) {
        Buffer a(zoo::zero(n, n), dtype);
        for (Index i = 0; i < n; ++i) a.set(i, i, i == at ? bad : 2);
        EXPECT_FALSE(device->invert_spd(a.view())) << n << " " << bad << " at " << at;
      }
    }
    if (n == 1) continue;
    Buffer indefinite(zoo::zero(n, n), dtype);  // positive diagonal, eigenvalues −1 and 3
    for (Index i = 0; i < n; ++i) indefinite.set(i, i, 1);
    indefinite.set(n - 1, 0, 2);
    EXPECT_FALSE(device->invert_spd(indefinite.view())) << n;
  }
}

TEST_P(EveryDevice, DoesNotReadTheOutputWithBetaZero) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Buffer a(small(2, 2, {1, 2, 3, 4}), dtype);
  Buffer c(small(2, 2, {nan, nan, nan, nan}), dtype);
  device->gemm(1, a.view(), Transpose::no, a.view(), Transpose::no, 0, c.view());
  EXPECT_EQ(c.values().data, (std::vector<double>{7, 10, 15, 22}));
  Buffer s(small(2, 2, {nan, nan, nan, nan}), dtype);
  device->syrk(1, a.view(), Transpose::no, 0, s.view());
  EXPECT_EQ(s.values().data, (std::vector<double>{5, 11, 11, 25}));
  Buffer y(small(2, 2, {nan, nan, nan, nan}), dtype);
  device->axpby(2, a.view(), 0, y.view());
  EXPECT_EQ(y.values().data, (std::vector<double>{2, 4, 6, 8}));
}

TEST_P(EveryDevice, ScalesTheOutputWhenTheInnerSideIsEmpty) {
  Buffer a(2, 0, dtype);
  Buffer b(0, 2, dtype);
  Buffer c(small(2, 2, {1, 2, 2, 4}), dtype);
  device->gemm(1, a.view(), Transpose::no, b.view(), Transpose::no, 3, c.view());
  EXPECT_EQ(c.values().data, (std::vector<double>{3, 6, 6, 12}));
  device->syrk(1, a.view(), Transpose::no, 2, c.view());
  EXPECT_EQ(c.values().data, (std::vector<double>{6, 12, 12, 24}));
  c.set(0, 0, std::numeric_limits<double>::quiet_NaN());
  device->gemm(1, a.view(), Transpose::no, b.view(), Transpose::no, 0, c.view());
  EXPECT_EQ(c.values().data, (std::vector<double>{0, 0, 0, 0}));
}

TEST_P(EveryDevice, AddsMultiples) {
  Buffer x(small(1, 3, {1, -2, 3}), dtype);
  Buffer y(small(1, 3, {4, 5, -6}), dtype);
  device->axpby(2, x.view(), -1, y.view());
  EXPECT_EQ(y.values().data, (std::vector<double>{-2, -9, 12}));
  device->axpby(3, y.view(), 1, y.view());  // x may be y
  EXPECT_EQ(y.values().data, (std::vector<double>{-8, -36, 48}));
}

TEST_P(EveryDevice, MovesMomentum) {
  for (const bool ahead : {false, true}) {
    Buffer g(small(1, 3, {4, -8, 12}), dtype);
    Buffer m(small(1, 3, {2, 4, -6}), dtype);
    device->momentum(0.5, 2, ahead, g.view(), m.view());
    EXPECT_EQ(m.values().data, (std::vector<double>{9, -14, 21}));
    EXPECT_EQ(g.values().data, ahead ? (std::vector<double>{12.5, -23, 34.5}) : m.values().data);
  }
}

TEST_P(EveryDevice, TakesSigns) {
  const double inf = std::numeric_limits<double>::infinity();
  const double least = dtype == DType::f64 ? std::numeric_limits<double>::denorm_min() : 0x1p-130;
  Buffer x(small(1, 8, {3, -2, 0.0, -0.0, inf, -inf, least, -least}), dtype);
  device->sign(x.view(), x.view());
  EXPECT_EQ(x.values().data, (std::vector<double>{1, -1, 0, 0, 1, -1, 1, -1}));
  Buffer bad(small(1, 1, {std::numeric_limits<double>::quiet_NaN()}), dtype);
  device->sign(bad.view(), bad.view());
  EXPECT_TRUE(std::isnan(bad(0, 0)));
}

TEST_P(EveryDevice, FindsTheLargestMagnitude) {
  Buffer x(small(2, 3, {1, -7, 2, 0, 5, -6}), dtype, 2);
  EXPECT_EQ(device->abs_max(x.view()), 7);
  x.set(1, 1, -std::numeric_limits<double>::infinity());
  EXPECT_EQ(device->abs_max(x.view()), std::numeric_limits<double>::infinity());
  Buffer empty(0, 3, dtype);
  EXPECT_EQ(device->abs_max(empty.view()), 0);
}

// NaN wherever it stands, also before and after larger entries, and with either sign.
TEST_P(EveryDevice, ReportsNanInsteadOfTheLargest) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (Index at = 0; at < 37; ++at) {
    Buffer x(zoo::gaussian(1, 37, 1), dtype);
    x.set(0, at, at % 2 == 0 ? nan : -nan);
    x.set(0, (at + 5) % 37, std::numeric_limits<double>::infinity());
    EXPECT_TRUE(std::isnan(device->abs_max(x.view()))) << at;
    EXPECT_FALSE(std::isfinite(device->sum_squares(x.view()))) << at;
  }
}

TEST_P(EveryDevice, SumsSquaresFarBeyondTheRangeOfF32) {
  Buffer tiny(small(1, 2, {0x1p-100, 0x1p-100}), dtype);
  EXPECT_EQ(device->sum_squares(tiny.view()), 0x1p-199);
  Buffer huge(small(2, 1, {0x1p100, 0x1p100}), dtype);
  EXPECT_EQ(device->sum_squares(huge.view()), 0x1p201);
  Buffer empty(3, 0, dtype);
  EXPECT_EQ(device->sum_squares(empty.view()), 0);
}

TEST_P(EveryDevice, SumsAndScalesLines) {
  Buffer x(small(2, 3, {1, 2, 3, 4, 5, 6}), dtype, 1);
  Buffer rows(2, 1, DType::f64, 3);
  device->line_sum_squares(x.view(), false, rows.view());
  EXPECT_EQ(rows.values().data, (std::vector<double>{14, 77}));
  EXPECT_TRUE(rows.gaps_untouched());
  Buffer columns(1, 3, DType::f64);
  device->line_sum_squares(x.view(), true, columns.view());
  EXPECT_EQ(columns.values().data, (std::vector<double>{17, 29, 45}));
  Buffer by_row(small(2, 1, {2, -1}), DType::f64, 3);
  device->scale_lines(by_row.view(), false, x.view());
  EXPECT_EQ(x.values().data, (std::vector<double>{2, 4, 6, -4, -5, -6}));
  Buffer by_column(small(1, 3, {1, 0.5, 0}), DType::f64);
  device->scale_lines(by_column.view(), true, x.view());
  EXPECT_EQ(x.values().data, (std::vector<double>{2, 2, 0, -4, -2.5, 0}));
  EXPECT_TRUE(x.gaps_untouched());
}

TEST_P(EveryDevice, FillsAndAddsToTheDiagonal) {
  Buffer x(2, 2, dtype, 3);
  device->fill(1 + 0x1p-9, x.view());  // a tie in bf16: down to even
  const double one = dtype == DType::bf16 ? 1 : 1 + 0x1p-9;
  EXPECT_EQ(x.values().data, (std::vector<double>{one, one, one, one}));
  device->fill(1, x.view());
  device->add_diagonal(2, x.view());
  EXPECT_EQ(x.values().data, (std::vector<double>{3, 1, 1, 3}));
  EXPECT_TRUE(x.gaps_untouched());
  device->fill(std::numeric_limits<double>::quiet_NaN(), x.view());
  EXPECT_TRUE(std::isnan(x(1, 0)));
}

// Around the tiles of 16 and 32 in which it is done.
TEST_P(EveryDevice, MirrorsWhatIsBelowTheDiagonal) {
  for (const Index n : {1, 2, 15, 16, 17, 32, 33, 65, 100}) {
    const zoo::Matrix before = zoo::gaussian(n, n, 5);
    Buffer c(before, dtype, 3);
    Buffer rounded(before, dtype);
    device->mirror_lower(c.view());
    for (Index i = 0; i < n; ++i) {
      for (Index j = 0; j < n; ++j) {
        ASSERT_EQ(c(i, j), rounded(std::max(i, j), std::min(i, j))) << n << ": " << i << "," << j;
      }
    }
    EXPECT_TRUE(c.gaps_untouched());
  }
}

// Numbers that differ by orders of magnitude: another order would round differently.
TEST_P(EveryDevice, AddsTracesAndRowProductsFromTheFirstOn) {
  for (const Index n : {1, 5, 31, 33, 64, 65, 130}) {
    zoo::Matrix wild = zoo::gaussian(n, n, 6);
    for (double& v : wild.data) v = std::exp(5 * v);
    Buffer x(wild, dtype, 3);
    Buffer y(zoo::gaussian(n, n, 7), dtype);
    double trace = 0;
    std::vector<double> dots(static_cast<std::size_t>(n));
    for (Index i = 0; i < n; ++i) {
      trace += x(i, i);
      for (Index j = 0; j < n; ++j) dots[static_cast<std::size_t>(i)] += x(i, j) * y(i, j);
    }
    EXPECT_EQ(device->trace(x.view()), trace) << n;
    Buffer out(n, 1, DType::f64, 2);
    device->row_dots(x.view(), y.view(), out.view());
    EXPECT_EQ(out.values().data, dots) << n;
    EXPECT_TRUE(out.gaps_untouched());
  }
  Buffer nothing(0, 0, dtype);
  EXPECT_EQ(device->trace(nothing.view()), 0);
  Buffer narrow(3, 0, dtype);
  Buffer out(3, 1, DType::f64, 1);
  device->row_dots(narrow.view(), narrow.view(), out.view());
  EXPECT_EQ(out.values().data, (std::vector<double>{0, 0, 0}));
}

// Four equal entries 2^k have the norm 2^(k+1), wherever k lies: no square and no reciprocal leaves
// its range. Equalities: all of it is powers of two.
TEST_P(EveryDevice, NormalizesByAnyPowerOfTwo) {
  std::vector<int> exponents = {-120, -100, -61, -60, -1, 0, 60, 61, 100, 126};
  if (dtype == DType::f32) exponents.push_back(-149);
  if (dtype == DType::f64) exponents.insert(exponents.end(), {-1074, -600, 600, 1022});
  for (const int k : exponents) {
    for (const int safe : {0, 60}) {
      const double e = std::ldexp(1.0, k);
      const double twice = std::ldexp(1.0, std::min(k + 1, 1023));  // ‖X‖, or as large as can be
      struct Case {
        NormOptions options;
        double result;
      };
      for (const Case& c : {Case{{}, 0.5},
                            {{2, EpsMode::none, 1}, 0.25},
                            {{1, EpsMode::add, twice}, k < 1023 ? 0.25 : 0},
                            {{1, EpsMode::clamp, twice / 4}, 0.5},
                            {{0.25, EpsMode::clamp, twice}, 0.5}}) {
        if (c.options.eps == 0) continue;  // it underflows
        Buffer x(small(2, 2, {e, -e, e, e}), dtype, 3);
        Buffer to(2, 2, dtype, 1);
        EXPECT_TRUE(device->normalize(x.view(), c.options, safe, to.view()));
        const double r = c.result;
        EXPECT_EQ(to.values().data, (std::vector<double>{r, -r, r, r})) << k << " " << safe;
        EXPECT_TRUE(to.gaps_untouched());
        Buffer same(small(2, 2, {e, -e, e, e}), dtype, 3);
        EXPECT_TRUE(device->normalize(same.view(), c.options, safe, same.view()));
        EXPECT_EQ(same.bits(), to.bits()) << k;
        EXPECT_TRUE(same.gaps_untouched());
      }
    }
  }
}

TEST_P(EveryDevice, NormalizesZeroToZeroAndWhatIsNotFiniteToNan) {
  for (const EpsMode mode : {EpsMode::none, EpsMode::add, EpsMode::clamp}) {
    const NormOptions options{1.01, mode, 1e-3};
    Buffer zero(zoo::zero(3, 5), dtype);
    Buffer to(3, 5, DType::f32);
    static_cast<void>(device->normalize(zero.view(), options, 60, to.view()));
    EXPECT_EQ(to.values().data, zoo::zero(3, 5).data);
    static_cast<void>(device->normalize(zero.view(), options, 60, zero.view()));
    EXPECT_EQ(zero.values().data, zoo::zero(3, 5).data);
    for (const double bad :
         {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
          -std::numeric_limits<double>::infinity()}) {
      for (const Index at : {0, 4999, 5000}) {
        Buffer x(zoo::gaussian(1, 5001, 3), dtype);
        x.set(0, at, bad);
        EXPECT_TRUE(device->normalize(x.view(), options, 60, x.view()));
        const std::vector<double> result = x.values().data;
        EXPECT_TRUE(
            std::all_of(result.begin(), result.end(), [](double v) { return std::isnan(v); }))
            << bad << " at " << at;
      }
    }
  }
  Buffer empty(0, 3, dtype);
  EXPECT_FALSE(device->normalize(empty.view(), {}, 60, empty.view()));
}

TEST_P(EveryDevice, DividesByTheNormOfATrace) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const DType type : {DType::f32, DType::bf16, DType::f64}) {
    Buffer r(small(2, 2, {7, nan, nan, 9}), dtype, 3);
    Buffer from(small(1, 3, {8, -16, 1}), dtype);
    Buffer to(1, 3, type);
    device->divide_by_norm(r.view(), {}, 1, from.view(), to.view());
    EXPECT_EQ(to.values().data, (std::vector<double>{2, -4, 0.25}));
    device->divide_by_norm(r.view(), {}, 2, from.view(), to.view());
    EXPECT_EQ(to.values().data, (std::vector<double>{0.5, -1, 0.0625}));
    device->divide_by_norm(r.view(), {0.5, EpsMode::add, 6}, 1, from.view(), to.view());
    EXPECT_EQ(to.values().data, (std::vector<double>{1, -2, 0.125}));
    device->divide_by_norm(r.view(), {1, EpsMode::clamp, 8}, 2, from.view(), to.view());
    EXPECT_EQ(to.values().data, (std::vector<double>{0.125, -0.25, 0x1p-6}));
    r.set(0, 0, -9);
    device->divide_by_norm(r.view(), {}, 2, from.view(), to.view());
    EXPECT_EQ(to.values().data, (std::vector<double>{0, 0, 0}));
    r.set(0, 0, nan);
    device->divide_by_norm(r.view(), {}, 1, from.view(), to.view());
    for (Index j = 0; j < 3; ++j) EXPECT_TRUE(std::isnan(to(0, j)));
  }
}

TEST_P(EveryDevice, SplitsTheMeanOffADiagonal) {
  for (const DType type : {DType::f32, DType::bf16, DType::f64}) {
    Buffer c(small(2, 2, {1, 5, 6, 3}), dtype, 3);
    Buffer x(small(2, 3, {1, 2, 3, -4, -5, -6}), type, 1);
    Buffer to(2, 3, type);
    device->split_mean(c.view(), x.view(), to.view());
    EXPECT_EQ(c.values().data, (std::vector<double>{-1, 5, 6, 1}));
    EXPECT_EQ(to.values().data, (std::vector<double>{2, 4, 6, -8, -10, -12}));
    EXPECT_TRUE(c.gaps_untouched());
  }
}

TEST_P(EveryDevice, TakesInverseRootsOfWhatIsPositive) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Buffer s(small(2, 3, {4, 0, -1, 0.25, nan, 0x1p-1022}), DType::f64, 3);
  device->inverse_roots(s.view());
  EXPECT_EQ(s.values().data, (std::vector<double>{0.5, 0, 0, 2, 0, 0x1p511}));
  EXPECT_TRUE(s.gaps_untouched());
}

// The result is narrower, or wider, than what it is written over.
TEST_P(EveryDevice, ConvertsInPlaceToAnotherWidth) {
  for (const DType to : {DType::f32, DType::bf16, DType::f64}) {
    if (bytes_of(to) > bytes_of(dtype)) continue;
    const zoo::Matrix values = zoo::gaussian(7, 300, 8);
    Buffer x(values, dtype);
    Buffer apart(values, dtype);
    Buffer expected(7, 300, to);
    reference->convert(apart.view(), 1, expected.view());
    MatrixView over = x.view();
    over.dtype = to;
    device->convert(x.view(), 1, over);
    const auto* bytes = static_cast<const std::byte*>(over.data);
    EXPECT_EQ(std::vector<std::byte>(bytes, bytes + 2100 * bytes_of(to)), expected.bits());
  }
}

TEST_P(EveryDevice, RefusesShapesThatDoNotFit) {
  Buffer a(2, 3, dtype);
  Buffer b(2, 3, dtype);
  Buffer c(2, 2, dtype);
  Buffer other(2, 3, dtype == DType::f32 ? DType::f64 : DType::f32);
  Buffer lines(2, 1, DType::f64);
  // Beside bf16 factors only an f32 result may be wider, and only when both are bf16.
  Buffer half(2, 3, dtype == DType::bf16 ? DType::f32 : DType::bf16);
  Buffer single(2, 2, DType::f32);
  Buffer wide(2, 2, DType::f64);
  const auto no = Transpose::no;
  const auto yes = Transpose::yes;
  MatrixView overlapping = a.view();
  overlapping.ld = 2;
  std::vector<std::int64_t> integers(6);
  const MatrixView counted = matrix_view(integers.data(), 2, 3);
  const std::vector<std::function<void()>> calls = {
      [&] { device->gemm(1, a.view(), no, b.view(), no, 0, c.view()); },
      [&] { device->gemm(1, a.view(), yes, b.view(), no, 0, c.view()); },
      [&] { device->gemm(1, a.view(), no, other.view(), yes, 0, c.view()); },
      [&] { device->gemm(1, overlapping, no, b.view(), yes, 0, c.view()); },
      [&] { device->syrk(1, a.view(), yes, 0, c.view()); },
      [&] { device->syrk(1, other.view(), no, 0, c.view()); },
      [&] { device->gemm(1, a.view(), no, half.view(), yes, 0, single.view()); },
      [&] { device->syrk(1, half.view(), no, 0, wide.view()); },
      [&] { (void)device->invert_spd(a.view()); },
      [&] { device->convert(a.view(), 1, c.view()); },
      [&] { device->convert(a.view(), 1, counted); },
      [&] { device->axpby(1, a.view(), 1, c.view()); },
      [&] { device->axpby(1, a.view(), 1, other.view()); },
      [&] { device->sign(a.view(), c.view()); },
      [&] { device->round_stochastic(c.view(), a.view(), 1, 2, 3, 0); },
      [&] { device->decay_step(1, 1, a.view(), c.view()); },
      [&] { device->adamw({}, a.view(), b.view(), b.view(), c.view()); },
      [&] { device->sum_squares(counted); },
      [&] { device->abs_max(overlapping); },
      [&] { device->line_sum_squares(a.view(), true, lines.view()); },
      [&] { device->line_sum_squares(a.view(), false, c.view()); },
      [&] { device->scale_lines(lines.view(), true, a.view()); },
      [&] { device->fill(0, counted); },
      [&] { device->add_diagonal(1, a.view()); },
      [&] { device->mirror_lower(a.view()); },
      [&] { device->trace(a.view()); },
      [&] { device->row_dots(a.view(), c.view(), lines.view()); },
      [&] { device->row_dots(a.view(), other.view(), lines.view()); },
      [&] { device->row_dots(a.view(), b.view(), c.view()); },
      [&] { static_cast<void>(device->normalize(a.view(), {}, 60, c.view())); },
      [&] { static_cast<void>(device->normalize(counted, {}, 60, counted)); },
      [&] { device->divide_by_norm(a.view(), {}, 1, b.view(), b.view()); },
      [&] { device->divide_by_norm(c.view(), {}, 1, a.view(), c.view()); },
      [&] { device->split_mean(a.view(), a.view(), b.view()); },
      [&] { device->split_mean(c.view(), a.view(), c.view()); },
      [&] { device->inverse_roots(single.view()); },
  };
  for (std::size_t i = 0; i < calls.size(); ++i) EXPECT_THROW(calls[i](), ShapeError) << i;
  try {
    device->gemm(1, a.view(), no, b.view(), no, 0, c.view());
  } catch (const ShapeError& e) {
    EXPECT_THAT(e.what(), HasSubstr("A 2x3"));
    EXPECT_THAT(e.what(), HasSubstr("C 2x2"));
  }
}

// ---- the optimizer's fused steps, f32
// -------------------------------------------------------------

TEST_P(FusedSteps, DecayThenStep) {
  Buffer w(small(1, 3, {1, 2, -4}), DType::f32);
  Buffer u(small(1, 3, {8, 0, -2}), DType::f32);
  EXPECT_EQ(device->decay_step(0.5, 0.25, u.view(), w.view()), 68);
  EXPECT_EQ(w.values().data, (std::vector<double>{-1.5, 1, -1.5}));
}

// From zero moments the first step is the sign of the gradient: m/c₁ = g and v/c₂ = g².
TEST_P(FusedSteps, FirstAdamWStepIsTheSign) {
  Buffer g(small(1, 3, {0.5, -3, 100}), DType::f32);
  Buffer m(zoo::zero(1, 3), DType::f32);
  Buffer v(zoo::zero(1, 3), DType::f32);
  Buffer w(small(1, 3, {1, 1, 1}), DType::f32);
  const AdamWScalars s{0.1, 0.5, 0.9, 0.95, 1e-8, 1 - 0.9, 1 - 0.95, false};
  // eps moves a unit update by 2e-8, f32 by a few 6e-8.
  EXPECT_NEAR(device->adamw(s, g.view(), m.view(), v.view(), w.view()), 3, 2e-6);
  EXPECT_NEAR(w(0, 0), 0.95 - 0.1, 1e-6);
  EXPECT_NEAR(w(0, 1), 0.95 + 0.1, 1e-6);
  EXPECT_NEAR(w(0, 2), 0.95 - 0.1, 1e-6);
  EXPECT_NEAR(m(0, 1), -0.3, 1e-7);
  EXPECT_NEAR(v(0, 1), 0.45, 1e-7);
}

// Three steps of the textbook recursion in f64.
TEST_P(FusedSteps, FollowTheRecursion) {
  for (const bool eps_first : {false, true}) {
    double ew = 1;
    double em = 0;
    double ev = 0;
    Buffer m(zoo::zero(1, 1), DType::f32);
    Buffer v(zoo::zero(1, 1), DType::f32);
    Buffer w(small(1, 1, {1}), DType::f32);
    for (int t = 1; t <= 3; ++t) {
      AdamWScalars s{0.1, 0.01, 0.9, 0.99, 1e-3, 0, 0, eps_first};
      s.bias_correction1 = 1 - std::pow(s.beta1, t);
      s.bias_correction2 = 1 - std::pow(s.beta2, t);
      const double gradient = 0.01 * t - 0.015;
      em = s.beta1 * em + (1 - s.beta1) * gradient;
      ev = s.beta2 * ev + (1 - s.beta2) * gradient * gradient;
      const double divisor = eps_first ? (std::sqrt(ev) + s.eps) / std::sqrt(s.bias_correction2)
                                       : std::sqrt(ev / s.bias_correction2) + s.eps;
      const double update = em / s.bias_correction1 / divisor;
      ew = (1 - s.lr * s.weight_decay) * ew - s.lr * update;
      Buffer g(small(1, 1, {gradient}), DType::f32);
      const double sum = device->adamw(s, g.view(), m.view(), v.view(), w.view());
      EXPECT_NEAR(sum, update * update, 1e-5 * update * update);  // some ten f32 roundings
      EXPECT_NEAR(w(0, 0), ew, 1e-6);
    }
  }
}

// The two places of epsilon differ most where v is small: g = ε.
TEST_P(FusedSteps, PutEpsilonWhereTold) {
  for (const bool eps_first : {false, true}) {
    Buffer g(small(1, 1, {1e-8}), DType::f32);
    Buffer m(zoo::zero(1, 1), DType::f32);
    Buffer v(zoo::zero(1, 1), DType::f32);
    Buffer w(zoo::zero(1, 1), DType::f32);
    const AdamWScalars s{1, 0, 0.9, 0.95, 1e-8, 1 - 0.9, 1 - 0.95, eps_first};
    device->adamw(s, g.view(), m.view(), v.view(), w.view());
    EXPECT_NEAR(w(0, 0), eps_first ? -1 / (1 + 1 / std::sqrt(0.05)) : -0.5, 1e-6);
  }
}

TEST_P(FusedSteps, TakeF32Only) {
  Buffer w(2, 2, DType::bf16);
  EXPECT_THROW(device->decay_step(1, 1, w.view(), w.view()), ShapeError);
  EXPECT_THROW(device->adamw({}, w.view(), w.view(), w.view(), w.view()), ShapeError);
}

// ---- triangles and memory
// -------------------------------------------------------------------------

TEST_P(Triangles, TravelPacked) {
  for (const Index n : {1, 2, 17, 33, 100}) {
    Buffer full(zoo::gaussian(n, n, 9), DType::f32, 3);
    std::vector<float> packed(static_cast<std::size_t>(packed_size(n)) + 1, -7.0F);
    device->pack_triangle(full.view(), packed.data());
    EXPECT_EQ(packed.back(), -7.0F);
    Buffer back(n, n, DType::f32, 2);
    device->unpack_triangle(packed.data(), back.view());
    std::size_t at = 0;
    for (Index i = 0; i < n; ++i) {
      for (Index j = 0; j <= i; ++j) {
        ASSERT_EQ(static_cast<double>(packed[at++]), full(i, j)) << n << ": " << i << "," << j;
        ASSERT_EQ(back(i, j), full(i, j));
        ASSERT_EQ(back(j, i), full(i, j));
      }
    }
    EXPECT_TRUE(back.gaps_untouched());
  }
  Buffer wide(2, 3, DType::f32);
  Buffer other(2, 2, DType::f64);
  float nothing = 0;
  EXPECT_THROW(device->pack_triangle(wide.view(), &nothing), ShapeError);
  EXPECT_THROW(device->unpack_triangle(&nothing, other.view()), ShapeError);
}

TEST_P(Memory, IsAlignedAndComesBackAsItWent) {
  std::vector<std::uint64_t> sent(1000);
  std::iota(sent.begin(), sent.end(), 1);
  const std::size_t bytes = sent.size() * 8;
  DeviceBuffer first(*raw, bytes);
  DeviceBuffer second(*raw, bytes + 8);
  for (const DeviceBuffer* b : {&first, &second}) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(b->data()) % 256, 0U);
  }
  raw->copy(sent.data(), first.data(), bytes);
  raw->copy(first.data(), second.span().data() + 8, bytes);  // within the device, unaligned
  std::vector<std::uint64_t> back(sent.size());
  raw->copy(second.span().data() + 8, back.data(), bytes);
  raw->wait();
  EXPECT_EQ(back, sent);
  std::fill(back.begin(), back.end(), 0);
  raw->copy(sent.data(), back.data(), bytes);  // from the host to the host
  raw->wait();
  EXPECT_EQ(back, sent);
}

TEST_P(Memory, HasOneOwner) {
  DeviceBuffer first(*raw, 10);
  const void* address = first.data();
  DeviceBuffer second = std::move(first);
  EXPECT_EQ(second.data(), address);
  EXPECT_EQ(second.bytes(), 10U);
  second = DeviceBuffer(*raw, 0);
  EXPECT_EQ(second.data(), nullptr);
  raw->copy(nullptr, second.data(), 0);
}

TEST_P(Memory, IsToldFromTheHosts) {
  const DeviceBuffer buffer(*raw, 64);
  const std::vector<float> on_host(16);
  EXPECT_TRUE(raw->reaches(buffer.data()));
  EXPECT_TRUE(raw->reaches(buffer.span().data() + 63));
  EXPECT_EQ(raw->reaches(on_host.data()), raw->on_host());
}

TEST_P(Memory, IsShownToTheHostAndPutBack) {
  const DeviceBuffer buffer(*raw, 3 * sizeof(double));
  auto* const numbers = static_cast<double*>(buffer.data());
  raw->fill(2, matrix_view(numbers, 1, 3));
  {
    OnHost<double> shown(*raw, numbers, 3);
    for (double& x : shown.span()) EXPECT_EQ(x, 2);
    shown.span()[1] = 5;
    shown.put_back();
  }
  {
    OnHost<double> overwritten(*raw, numbers + 2, 1, /*fetch=*/false);
    *overwritten.data() = 7;
    overwritten.put_back();
  }
  OnHost<const double> shown(*raw, numbers, 3);
  EXPECT_THAT(std::vector<double>(shown.span().begin(), shown.span().end()),
              testing::ElementsAre(2, 5, 7));
}

// Pages come and go, addresses stay.
TEST_P(Memory, ComesAndGoesBehindReservedAddresses) {
  const std::size_t page = cuda_page_bytes;  // a multiple of every device's
  void* const range = raw->reserve(3 * page);
  auto* const middle = static_cast<std::byte*>(range) + page;
  for (const double value : {1.0, 2.0}) {
    raw->back(middle, 2 * page);
    const auto n = static_cast<Index>(2 * page / sizeof(float));
    raw->fill(value, {middle, 1, n, n, DType::f32});
    EXPECT_EQ(raw->abs_max({middle, 1, n, n, DType::f32}), value);
    raw->drop(middle, 2 * page);
  }
  raw->back(range, page);  // some are left when all goes
  raw->unreserve(range, 3 * page);
}

TEST_P(Memory, SaysHowMuchIsMissing) {
  if (raw->on_host()) return;  // ASan's malloc ends the program where others return nothing
  const std::size_t absurd = std::size_t{1} << 60;
  try {
    DeviceBuffer buffer(*raw, absurd);
    FAIL() << "allocated";
  } catch (const DeviceError& e) {
    EXPECT_THAT(e.what(), HasSubstr(std::to_string(absurd) + " bytes"));
  }
  DeviceBuffer small(*raw, 8);  // and works on
  raw->copy(&absurd, small.data(), 8);
  raw->wait();
}

// ---- devices against the reference
// ----------------------------------------------------------------

struct ProductCase {
  Index m, n, k;
};
const std::vector<ProductCase> product_shapes = {
    {0, 3, 4}, {3, 0, 4}, {3, 4, 0},   {1, 1, 1},    {1, 5, 7},    {5, 1, 7},   {5, 7, 1},
    {3, 5, 7}, {8, 8, 8}, {17, 33, 9}, {33, 31, 65}, {64, 16, 40}, {2, 70, 130}};

// Exact: the f64 product of the same numbers. A sum of k products has error at most (k +
// 2)·u·Σ|a||b| (Higham, section 3.5), then one rounding to the type.
TEST_P(Conformance, Gemm) {
  int seed = 0;
  for (const auto& [m, n, k] : product_shapes) {
    for (const bool ta : {false, true}) {
      for (const bool tb : {false, true}) {
        for (const auto& [alpha, beta] : {std::pair{1.0, 0.0}, {-1.5, 0.75}}) {
          for (const Index gap : {0, 3}) {
            ++seed;
            Buffer a(op(zoo::gaussian(m, k, seed), ta), dtype, gap);
            Buffer b(op(zoo::gaussian(k, n, seed + 1), tb), dtype, gap);
            Buffer c(zoo::gaussian(m, n, seed + 2), dtype, gap);
            const zoo::Matrix left = op(a.values(), ta);
            const zoo::Matrix right = op(b.values(), tb);
            const zoo::Matrix old = c.values();
            const zoo::Matrix product = zoo::product(left, right);
            const zoo::Matrix size = zoo::product(absolute(left), absolute(right));
            device->gemm(alpha, a.view(), op_of(ta), b.view(), op_of(tb), beta, c.view());
            for (Index i = 0; i < m; ++i) {
              for (Index j = 0; j < n; ++j) {
                const double exact = alpha * product(i, j) + beta * old(i, j);
                const double sum_error =
                    static_cast<double>(k + 3) * sum_roundoff(dtype) *
                    (std::abs(alpha) * size(i, j) + std::abs(beta * old(i, j)));
                const double bound =
                    sum_error + unit_roundoff(dtype) * (std::abs(exact) + sum_error);
                ASSERT_LE(std::abs(c(i, j) - exact), bound)
                    << m << "x" << n << "x" << k << " ops " << ta << tb << " gap " << gap;
              }
            }
            EXPECT_TRUE(c.gaps_untouched());
          }
        }
      }
    }
  }
}

TEST_P(Conformance, Syrk) {
  int seed = 100;
  for (const auto& [n, k] : std::vector<std::pair<Index, Index>>{
           {0, 3}, {3, 0}, {1, 1}, {1, 9}, {5, 1}, {7, 13}, {31, 20}, {33, 70}, {65, 40}}) {
    for (const bool t : {false, true}) {
      for (const auto& [alpha, beta] : {std::pair{1.0, 0.0}, {-1.5, 0.75}}) {
        for (const Index gap : {0, 3}) {
          ++seed;
          Buffer a(op(zoo::gaussian(n, k, seed), t), dtype, gap);
          const zoo::Matrix left = op(a.values(), t);
          zoo::Matrix symmetric = zoo::gaussian(n, n, seed + 1);
          for (Index i = 0; i < n; ++i) {
            for (Index j = 0; j < i; ++j) symmetric(i, j) = symmetric(j, i);
          }
          Buffer c(symmetric, dtype, gap);
          const zoo::Matrix old = c.values();
          const zoo::Matrix product = zoo::product(left, zoo::transposed(left));
          const zoo::Matrix size = zoo::product(absolute(left), zoo::transposed(absolute(left)));
          device->syrk(alpha, a.view(), op_of(t), beta, c.view());
          for (Index i = 0; i < n; ++i) {
            for (Index j = 0; j < n; ++j) {
              const double exact = alpha * product(i, j) + beta * old(i, j);
              const double sum_error = static_cast<double>(k + 3) * sum_roundoff(dtype) *
                                       (std::abs(alpha) * size(i, j) + std::abs(beta * old(i, j)));
              const double bound = sum_error + unit_roundoff(dtype) * (std::abs(exact) + sum_error);
              ASSERT_LE(std::abs(c(i, j) - exact), bound) << n << "x" << k << " op " << t;
              ASSERT_EQ(c(i, j), c(j, i)) << n << "x" << k << " op " << t;
            }
          }
          EXPECT_TRUE(c.gaps_untouched());
        }
      }
    }
  }
}

// Larger than the pieces a product is cut into, and not a multiple of them; bf16 with an f32
// result.
TEST_P(Conformance, SyrkOfManyPieces) {
  for (const auto& [n, k] : std::vector<std::pair<Index, Index>>{{193, 31}, {300, 20}, {530, 9}}) {
    for (const bool t : {false, true}) {
      for (const double beta : {0.0, 0.75}) {
        for (const Index gap : {0, 3}) {
          Buffer a(op(zoo::gaussian(n, k, 7), t), dtype, gap);
          zoo::Matrix start = zoo::gaussian(n, n, 8);
          for (Index i = 0; i < n; ++i) {
            for (Index j = 0; j < i; ++j) start(i, j) = start(j, i);
          }
          const DType type = dtype == DType::bf16 ? DType::f32 : dtype;
          Buffer c(start, type, gap);
          const zoo::Matrix old = c.values();
          const zoo::Matrix left = op(a.values(), t);
          const zoo::Matrix product = zoo::product(left, zoo::transposed(left));
          const zoo::Matrix size = zoo::product(absolute(left), zoo::transposed(absolute(left)));
          device->syrk(1, a.view(), op_of(t), beta, c.view());
          for (Index i = 0; i < n; ++i) {
            for (Index j = 0; j < n; ++j) {
              const double exact = product(i, j) + beta * old(i, j);
              const double bound = static_cast<double>(k + 4) * unit_roundoff(type) *
                                   (size(i, j) + std::abs(beta * old(i, j)));
              ASSERT_LE(std::abs(c(i, j) - exact), bound) << n << "x" << k << " op " << t;
              ASSERT_EQ(c(i, j), c(j, i)) << n << "x" << k << " op " << t;
            }
          }
          EXPECT_TRUE(c.gaps_untouched());
        }
      }
    }
  }
}

// Sizes around the block of 48 and the 128 rows of an update. What is left of A·A⁻¹ − I is the
// condition, some times the rounding, at any condition the type can bear.
TEST_P(Conformance, InvertSpd) {
  if (dtype == DType::bf16) return;  // it is not inverted
  for (const Index n : {1, 2, 3, 47, 48, 49, 95, 97, 128, 145, 300}) {
    for (const double condition : {1.0, 10.0, 1e4}) {
      for (const Index gap : {0, 3}) {
        const zoo::Matrix root = zoo::condition(n, n, std::sqrt(condition), 11);
        Buffer a(zoo::product(root, zoo::transposed(root)), dtype, gap);
        Buffer judge(a.values(), DType::f64);
        ASSERT_TRUE(reference->invert_spd(judge.view()));
        for (Index i = 0; i < n; ++i) {
          for (Index j = i + 1; j < n; ++j) a.set(i, j, std::numeric_limits<double>::quiet_NaN());
        }
        ASSERT_TRUE(device->invert_spd(a.view()));
        const zoo::Matrix actual = a.values();
        const zoo::Matrix expected = judge.values();
        EXPECT_LE(zoo::relative_error(actual, expected), 8 * condition * unit_roundoff(dtype))
            << n << " " << condition;
        EXPECT_EQ(zoo::max_difference(actual, zoo::transposed(actual)), 0) << n;
        EXPECT_TRUE(a.gaps_untouched());
      }
    }
  }
}

// Large enough that a device may take it apart, with a rest. Small integers: equalities.
TEST_P(Conformance, SyrkOfManyBlocks) {
  constexpr Index n = 3072 + 130;
  constexpr Index k = 8;
  const auto entry = [](Index i, Index p) {
    return static_cast<double>((i * 7 + p * p * 3) % 5 - 2);
  };
  for (const bool t : {false, true}) {
    Buffer a(t ? k : n, t ? n : k, dtype);
    for (Index i = 0; i < n; ++i) {
      for (Index p = 0; p < k; ++p) a.set(t ? p : i, t ? i : p, entry(i, p));
    }
    Buffer c(n, n, dtype);
    device->fill(1, c.view());
    device->syrk(1, a.view(), op_of(t), 2, c.view());
    const zoo::Matrix result = c.values();
    Index wrong = 0;
    for (Index i = 0; i < n; ++i) {
      for (Index j = 0; j <= i; ++j) {
        double expected = 2;
        for (Index p = 0; p < k; ++p) expected += entry(i, p) * entry(j, p);
        if (result(i, j) != expected || result(j, i) != expected) ++wrong;
      }
    }
    EXPECT_EQ(wrong, 0) << "op " << t;
  }
}

// Element-wise verbs round where the formula says, so both devices give the same bits.
TEST_P(Conformance, ElementWiseVerbsToTheBit) {
  int seed = 200;
  for (const auto& [rows, cols] : shapes) {
    for (const Index gap : {0, 3}) {
      ++seed;
      const zoo::Matrix xs = zoo::gaussian(rows, cols, seed);
      const zoo::Matrix ys = zoo::gaussian(rows, cols, seed + 1);
      Buffer x(xs, dtype, gap);
      const auto check = [&](const char* verb, const std::function<void(Backend&, Buffer&)>& call) {
        Buffer actual(ys, dtype, gap);
        Buffer expected(ys, dtype, gap);
        call(*device, actual);
        call(*reference, expected);
        EXPECT_EQ(actual.bits(), expected.bits()) << verb << " " << rows << "x" << cols;
        EXPECT_TRUE(actual.gaps_untouched()) << verb;
      };
      check("axpby", [&](Backend& b, Buffer& y) { b.axpby(0.3, x.view(), -1.7, y.view()); });
      check("axpby, b = 0", [&](Backend& b, Buffer& y) { b.axpby(0.3, x.view(), 0, y.view()); });
      for (const bool ahead : {false, true}) {
        check("momentum", [&](Backend& b, Buffer& m) {
          Buffer g(xs, dtype, gap);
          b.momentum(0.95, 0.05, ahead, g.view(), m.view());
        });
        check("momentum's gradient", [&](Backend& b, Buffer& g) {
          Buffer m(xs, dtype, gap);
          b.momentum(0.95, 0.05, ahead, g.view(), m.view());
        });
      }
      check("sign", [&](Backend& b, Buffer& y) { b.sign(x.view(), y.view()); });
      Buffer by_row(zoo::gaussian(rows, 1, seed + 2), DType::f64, 2);
      Buffer by_column(zoo::gaussian(1, cols, seed + 3), DType::f64);
      check("scale rows",
            [&](Backend& b, Buffer& y) { b.scale_lines(by_row.view(), false, y.view()); });
      check("scale columns",
            [&](Backend& b, Buffer& y) { b.scale_lines(by_column.view(), true, y.view()); });
      for (const DType from : {DType::f32, DType::bf16, DType::f64}) {
        Buffer source(xs, from, gap);
        for (const double scale : {1.0, 0.3, 0x1p20}) {
          check("convert",
                [&](Backend& b, Buffer& y) { b.convert(source.view(), scale, y.view()); });
        }
      }
    }
  }
}

TEST_P(Conformance, SumsOfSquares) {
  int seed = 300;
  for (const auto& [rows, cols] : shapes) {
    for (const Index gap : {0, 3}) {
      Buffer x(zoo::gaussian(rows, cols, ++seed), dtype, gap);
      // Sums of n positive terms in f64, in whatever order: n·2^-53, twice.
      const double bound = 2 * static_cast<double>(rows * cols + 1) * 0x1p-53;
      const double expected = reference->sum_squares(x.view());
      EXPECT_NEAR(device->sum_squares(x.view()), expected, bound * expected);
      EXPECT_EQ(device->abs_max(x.view()), reference->abs_max(x.view()));
      for (const bool of_columns : {false, true}) {
        Buffer actual(of_columns ? 1 : rows, of_columns ? cols : 1, DType::f64);
        Buffer judge(of_columns ? 1 : rows, of_columns ? cols : 1, DType::f64);
        device->line_sum_squares(x.view(), of_columns, actual.view());
        reference->line_sum_squares(x.view(), of_columns, judge.view());
        EXPECT_LE(zoo::max_difference(actual.values(), judge.values()), bound * expected);
      }
    }
  }
}

/// The sum of blocks [a, b) as `Backend::sum_block` documents it, written as it reads.
double documented_tree(const std::vector<double>& blocks, std::size_t a, std::size_t b) {
  if (b - a == 0) return 0;
  if (b - a == 1) return blocks[a];
  std::size_t half = 1;
  while (half * 2 < b - a) half *= 2;
  return documented_tree(blocks, a, a + half) + documented_tree(blocks, a + half, b);
}

double documented_sum(const std::vector<double>& x) {
  std::vector<double> blocks;
  for (std::size_t begin = 0; begin < x.size(); begin += 4096) {
    std::array<double, 8> lanes{};
    const std::size_t end = std::min(begin + 4096, x.size());
    for (std::size_t i = begin; i < end; ++i) lanes[(i - begin) % 8] += x[i] * x[i];
    blocks.push_back(((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
                     ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7])));
  }
  return documented_tree(blocks, 0, blocks.size());
}

// Numbers that differ by orders of magnitude: nearly every other order rounds differently.
TEST(BlockSum, IsTheDocumentedTreeForAnyCount) {
  const zoo::Matrix noise = zoo::gaussian(1, 300, 1);
  std::vector<double> blocks;
  BlockSum sum;
  EXPECT_EQ(sum.total(), 0);
  for (const double x : noise.data) {
    blocks.push_back(std::exp(5 * x));
    sum.add(blocks.back());
    ASSERT_EQ(sum.total(), documented_tree(blocks, 0, blocks.size())) << blocks.size();
  }
}

TEST_P(Conformance, SumsInTheDocumentedOrder) {
  // 1, 2, 3, 5, 7 and 8 blocks, with and without a rest.
  for (const auto& [rows, cols] : std::vector<std::pair<Index, Index>>{{1, 9},
                                                                       {1, 4096},
                                                                       {2, 4096},
                                                                       {3, 4000},
                                                                       {1, 5 * 4096},
                                                                       {7, 4093},
                                                                       {8, 4096},
                                                                       {331, 61},
                                                                       {1030, 4096}}) {
    for (const Index gap : {0, 5}) {
      Buffer x(zoo::gaussian(rows, cols, 77), dtype, gap);
      EXPECT_EQ(device->sum_squares(x.view()), documented_sum(x.values().data))
          << rows << "x" << cols << " gap " << gap;
    }
  }
}

// The same numbers at another address give the same bits: offsets of 0 to 3 elements and gaps.
TEST_P(Conformance, DoesNotDependOnAlignmentOrStride) {
  for (const auto& [m, n, k] : {ProductCase{37, 43, 29},
                                {130, 66, 257},
                                {1, 100, 64},
                                {64, 1, 9},
                                {7, 1, 600},
                                {1, 5, 600},
                                {300, 5, 33}}) {
    const zoo::Matrix as = zoo::gaussian(m, k, 1);
    const zoo::Matrix bs = zoo::gaussian(k, n, 2);
    const zoo::Matrix cs = zoo::gaussian(m, n, 3);
    const zoo::Matrix longs = zoo::gaussian(3, 3001, 4);
    zoo::Matrix definite = zoo::product(as, zoo::transposed(as));
    for (Index i = 0; i < m; ++i) definite(i, i) += 1;
    std::vector<std::vector<std::byte>> results;
    std::vector<double> sums;
    for (const auto& [offset, gap] : std::vector<std::pair<Index, Index>>{
             {0, 0}, {1, 0}, {2, 0}, {3, 0}, {0, 3}, {1, 5}, {0, 16 - n % 16}, {32, 48 - k % 16}}) {
      open(GetParam().device);  // what it chose for one placement must not serve the next
      Buffer a(as, dtype, gap, offset);
      Buffer b(bs, dtype, gap, offset);
      Buffer at(zoo::transposed(as), dtype, gap, offset);
      Buffer bt(zoo::transposed(bs), dtype, gap, offset);
      Buffer c(cs, dtype, gap, offset);
      Buffer d(cs, dtype, gap, offset);
      Buffer s(zoo::zero(m, m), dtype, gap, offset);
      Buffer x(longs, dtype, gap, offset);
      Buffer y(longs, dtype, gap, offset);
      device->gemm(1.25, a.view(), Transpose::no, b.view(), Transpose::no, 0.5, c.view());
      device->gemm(1, at.view(), Transpose::yes, bt.view(), Transpose::yes, 0, d.view());
      device->syrk(1, a.view(), Transpose::no, 0, s.view());
      device->axpby(0.1, x.view(), 0.7, y.view());
      Buffer inverse(definite, dtype, gap, offset);
      if (dtype != DType::bf16) {
        EXPECT_TRUE(device->invert_spd(inverse.view()));
      }
      std::vector<std::byte> bits;
      for (Buffer* part : {&c, &d, &s, &y, &inverse}) {
        const std::vector<std::byte> more = part->bits();
        bits.insert(bits.end(), more.begin(), more.end());
      }
      results.push_back(std::move(bits));
      sums.push_back(device->sum_squares(x.view()));
    }
    for (std::size_t i = 1; i < results.size(); ++i) {
      EXPECT_TRUE(results[i] == results[0]) << m << "x" << n << "x" << k << " placement " << i;
      EXPECT_EQ(sums[i], sums[0]) << i;
    }
  }
}

// oneDNN keeps its arguments in a map of its own, and libraries of devices may do the like: their
// products are not counted here.
// ν from the documented sum of entries that an exact power of two has brought near 1, then one
// rounding per entry: on all fast devices the same bits.
TEST_P(Conformance, NormalizesToTheBit) {
  int seed = 700;
  for (const auto& [rows, cols] : shapes) {
    if (rows * cols == 0) continue;
    for (const Index gap : {0, 3}) {
      for (const double size : {1.0, 1e-30, 1e30}) {
        for (const DType type : {DType::f32, DType::bf16, DType::f64}) {
          const int safe = ++seed % 2 == 0 ? 0 : 60;
          const NormOptions options{1.01, static_cast<EpsMode>(seed % 3), size};
          const zoo::Matrix values = zoo::scaled(zoo::gaussian(rows, cols, seed), size);
          Buffer x(values, dtype, gap);
          Buffer scaled(values, dtype, gap);
          int shift = std::ilogb(reference->abs_max(scaled.view()));
          if (std::abs(shift) <= safe) shift = 0;
          reference->convert(scaled.view(), std::ldexp(1.0, -shift / 2), scaled.view());
          reference->convert(scaled.view(), std::ldexp(1.0, -shift - -shift / 2), scaled.view());
          double norm = 1.01 * std::sqrt(documented_sum(scaled.values().data));
          const double eps = std::ldexp(options.eps, -shift);
          if (options.eps_mode == EpsMode::add) norm += eps;
          if (options.eps_mode == EpsMode::clamp) norm = std::max(norm, eps);
          Buffer expected(rows, cols, type);
          reference->convert(scaled.view(), 1 / norm, expected.view());
          Buffer to(rows, cols, type, gap);
          EXPECT_TRUE(device->normalize(x.view(), options, safe, to.view()));
          EXPECT_EQ(to.bits(), expected.bits()) << rows << "x" << cols << " " << size;
          EXPECT_TRUE(to.gaps_untouched());
        }
      }
    }
  }
}

TEST_P(Conformance, AllocatesNothingAfterTheFirstCall) {
  std::vector<DeviceBuffer> placed;
  const auto place = [&](const zoo::Matrix& values, DType type, Index gap = 0) {
    Buffer buffer(values, type, gap);
    MatrixView view = buffer.view();
    const std::size_t bytes = static_cast<std::size_t>(view.rows * view.ld) * bytes_of(type);
    placed.emplace_back(*raw, bytes);
    raw->copy(view.data, placed.back().data(), bytes);
    raw->wait();
    view.data = placed.back().data();
    return view;
  };
  const MatrixView av = place(zoo::gaussian(20, 30, 1), dtype, 3);
  const MatrixView bv = place(zoo::gaussian(30, 25, 2), dtype);
  const MatrixView cv = place(zoo::gaussian(20, 25, 3), dtype, 1);
  const MatrixView sv = place(zoo::zero(20, 20), dtype);
  const zoo::Matrix flat = zoo::flat(60, 60, 5);
  const MatrixView dv = place(zoo::product(flat, zoo::transposed(flat)), dtype);
  const MatrixView xv = place(zoo::gaussian(3, 5000, 4), dtype, 3);
  const MatrixView lv = place(zoo::zero(3, 1), DType::f64);
  const MatrixView kv = place(zoo::zero(1, 5000), DType::f64);
  const bool products = raw->on_host() && (dtype != DType::bf16 || !cpu_bf16_native());
  double sink = 0;
  long counted = 0;
  for (int round = 0; round < 2; ++round) {
    const long before = count_new::calls;
    if (products) {
      raw->gemm(1, av, Transpose::no, bv, Transpose::no, 0.5, cv);
      raw->syrk(1, av, Transpose::no, 0, sv);
    }
    if (dtype != DType::bf16) sink += raw->invert_spd(dv) ? 1 : 0;
    raw->convert(xv, 0.5, xv);
    raw->axpby(0.1, xv, 0.2, xv);
    raw->sign(cv, cv);
    sink += raw->sum_squares(xv) + raw->abs_max(xv);
    raw->line_sum_squares(xv, false, lv);
    raw->line_sum_squares(xv, true, kv);
    raw->scale_lines(lv, false, xv);
    raw->add_diagonal(0.5, sv);
    raw->mirror_lower(sv);
    sink += raw->trace(sv);
    sink += raw->normalize(xv, {}, 0, xv) ? 1 : 0;
    raw->divide_by_norm(dv, {}, 1, dv, dv);
    raw->split_mean(sv, dv, dv);
    raw->inverse_roots(lv);
    raw->row_dots(xv, xv, lv);
    raw->fill(1, cv);
    counted = count_new::calls - before;
  }
  EXPECT_EQ(counted, 0) << sink;
}

TEST_P(StepBits, AreTheReferencesWithTheDocumentedSum) {
  const Index gap = std::get<1>(GetParam());
  int seed = 400;
  for (const auto& [rows, cols] : shapes) {
    ++seed;
    for (const bool eps_first : {false, true}) {
      struct State {
        Buffer g, m, v, w;
      };
      const auto state = [&, rows = rows, cols = cols] {
        return State{Buffer(zoo::gaussian(rows, cols, seed), DType::f32, gap),
                     Buffer(zoo::gaussian(rows, cols, seed + 1), DType::f32, gap),
                     Buffer(absolute(zoo::gaussian(rows, cols, seed + 2)), DType::f32, gap),
                     Buffer(zoo::gaussian(rows, cols, seed + 3), DType::f32, gap)};
      };
      State actual = state();
      State expected = state();
      const AdamWScalars s{0.01, 0.1, 0.9, 0.95, 1e-8, 0.271, 0.1426, eps_first};
      const double sum =
          device->adamw(s, actual.g.view(), actual.m.view(), actual.v.view(), actual.w.view());
      const double judge = reference->adamw(s, expected.g.view(), expected.m.view(),
                                            expected.v.view(), expected.w.view());
      EXPECT_EQ(actual.m.bits(), expected.m.bits());
      EXPECT_EQ(actual.v.bits(), expected.v.bits());
      EXPECT_EQ(actual.w.bits(), expected.w.bits());
      EXPECT_TRUE(actual.w.gaps_untouched());
      // Positive terms in f64, two orders: as in SumsOfSquares.
      EXPECT_NEAR(sum, judge, 2 * static_cast<double>(rows * cols + 1) * 0x1p-53 * judge);
    }
    Buffer u(zoo::gaussian(rows, cols, seed), DType::f32, gap);
    Buffer actual(zoo::gaussian(rows, cols, seed + 1), DType::f32, gap);
    Buffer expected(zoo::gaussian(rows, cols, seed + 1), DType::f32, gap);
    EXPECT_EQ(device->decay_step(0.999, 0.02, u.view(), actual.view()),
              documented_sum(u.values().data));
    reference->decay_step(0.999, 0.02, u.view(), expected.view());
    EXPECT_EQ(actual.bits(), expected.bits());
    EXPECT_TRUE(actual.gaps_untouched());
  }
}

TEST(CpuFusedSteps, AllocateNothing) {
  const auto device = open_backend("cpu");
  Buffer g(zoo::gaussian(3, 5000, 1), DType::f32, 1);
  Buffer m(zoo::zero(3, 5000), DType::f32);
  Buffer v(zoo::zero(3, 5000), DType::f32);
  Buffer w(zoo::zero(3, 5000), DType::f32);
  Buffer h(3, 5000, DType::bf16);
  const std::array views{g.view(), m.view(), v.view(), w.view(), h.view()};
  const long before = count_new::calls;
  device->adamw({}, views[0], views[1], views[2], views[3]);
  device->decay_step(1, 0.1, views[0], views[3]);
  device->round_stochastic(views[0], views[4], 1, 2, 3, 0);
  EXPECT_EQ(count_new::calls - before, 0);
}

// ---- matrix functions on the memory of a device
// --------------------------------------------------

/// A matrix in the device's memory.
template <class T>
class Placed {
 public:
  Placed(Backend& device, const zoo::Dense<T>& x)
      : device_(&device), rows_(x.rows), cols_(x.cols), buffer_(device, x.data.size() * sizeof(T)) {
    device.copy(x.data.data(), buffer_.data(), buffer_.bytes());
    device.wait();
  }
  [[nodiscard]] MatrixView view() const {
    return {buffer_.data(), rows_, cols_, cols_, dtype_of<T>};
  }
  [[nodiscard]] zoo::Dense<T> fetch() const {
    zoo::Dense<T> x(rows_, cols_);
    device_->copy(buffer_.data(), x.data.data(), buffer_.bytes());
    device_->wait();
    return x;
  }

 private:
  Backend* device_;
  Index rows_, cols_;
  DeviceBuffer buffer_;
};

std::vector<Quintic> five() { return first_iterations(*find_coefficients("jordan"), 5); }

TEST_P(MatrixFunctions, MsignIsTheReferences) {
  for (const auto& [rows, cols] : std::vector<std::pair<Index, Index>>{{24, 40}, {41, 23}}) {
    const zoo::Dense<float> x = zoo::cast<float>(zoo::power_law(rows, cols, 3, 1.5));
    // Roundoff of the iteration's type, lifted by Jordan's slope of 3.4445^5 at 0: f32 6e-8·485.
    for (const auto& [type, bound] : {std::pair{DType::f32, 1e-4}, {DType::bf16, 0.2}}) {
      const MsignOptions options{type, EpsMode::none, 0};
      const auto run = [&, rows = rows, cols = cols](Backend& on) {
        const Placed<float> placed(on, x);
        const DeviceBuffer work(on, msign_workspace_bytes(rows, cols, DType::f32, options));
        msign(placed.view(), five(), 1, options, work.span(), on);
        return placed.fetch();
      };
      const zoo::Dense<float> expected = run(*reference);
      EXPECT_LE(zoo::relative_error(run(*raw), expected), bound) << rows << "x" << cols;
    }
  }
}

TEST_P(MatrixFunctions, MsignScalesTinyAndKeepsZero) {
  for (const double size : {0.0, 1e-30}) {
    const zoo::Dense<float> x = zoo::cast<float>(zoo::scaled(zoo::gaussian(8, 12, 1), size));
    const Placed<float> placed(*raw, x);
    const MsignOptions options;
    const DeviceBuffer work(*raw, msign_workspace_bytes(8, 12, DType::f32, options));
    msign(placed.view(), five(), 1, options, work.span(), *raw);
    const double norm = zoo::frobenius(placed.fetch());
    EXPECT_NEAR(norm, size == 0 ? 0 : std::sqrt(8), 1.5);
  }
}

// So long that three iterations in bf16 become one product QX, and Q's mean is added apart.
TEST_P(MatrixFunctions, MsignOfLongBf16IsTheReferences) {
  const zoo::Dense<float> x = zoo::cast<float>(zoo::gaussian(256, 1024, 3));
  const MsignOptions options{DType::bf16, EpsMode::none, 0};
  ASSERT_GT(msign_gram_products(256, 1024, five(), options), 0);
  const auto run = [&](Backend& on) {
    const Placed<float> placed(on, x);
    const DeviceBuffer work(on, msign_workspace_bytes(256, 1024, DType::f32, options));
    msign(placed.view(), five(), 1, options, work.span(), on);
    return placed.fetch();
  };
  // Roundoff of bf16, 4e-3, through two products; no singular value is small.
  EXPECT_LE(zoo::relative_error(run(*raw), run(*reference)), 0.02);
}

/// What a kept sequence has to work on again and again: data changes, addresses do not.
std::vector<zoo::Dense<float>> inputs(Index rows, Index cols) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<zoo::Dense<float>> list;
  for (const double size : {1.0, 0.5, 1e-30, 0.0, 1e30, 1.0}) {
    list.push_back(
        zoo::cast<float>(zoo::scaled(zoo::gaussian(rows, cols, 10 + list.size()), size)));
  }
  list.push_back(list[0]);
  list.back()(rows / 2, cols / 2) = nan;
  list.push_back(list[1]);
  list.push_back(list[1]);
  list.back()(0, 0) = std::numeric_limits<float>::infinity();
  list.push_back(list[0]);
  return list;
}

TEST_P(MatrixFunctions, ReplaysMsignToTheBit) {
  const bool keeps = raw->keep_replays(true);
  std::uint64_t key = 0;
  for (const auto& [rows, cols] :
       std::vector<std::pair<Index, Index>>{{24, 40}, {41, 23}, {64, 130}}) {
    for (const DType type : {DType::f32, DType::bf16}) {
      const MsignOptions options{type, EpsMode::none, 0};
      const std::vector<zoo::Dense<float>> list = inputs(rows, cols);
      const Placed<float> direct(*raw, list[0]);
      const Placed<float> replayed(*raw, list[0]);
      const DeviceBuffer work(*raw, msign_workspace_bytes(rows, cols, DType::f32, options));
      const DeviceBuffer other(*raw, work.bytes());
      const auto run = [&](const Placed<float>& x, const DeviceBuffer& scratch) {
        msign(x.view(), five(), 1.01, options, scratch.span(), *raw);
      };
      int calls = 0;
      ++key;
      for (const zoo::Dense<float>& x : list) {
        for (const Placed<float>* p : {&direct, &replayed}) {
          raw->copy(x.data.data(), p->view().data, x.data.size() * sizeof(float));
        }
        run(direct, work);
        raw->replay({key}, [&] {
          ++calls;
          run(replayed, other);
        });
        const zoo::Dense<float> expected = direct.fetch();
        const zoo::Dense<float> found = replayed.fetch();
        for (std::size_t i = 0; i < expected.data.size(); ++i) {
          const bool same = std::memcmp(&expected.data[i], &found.data[i], sizeof(float)) == 0;
          ASSERT_TRUE(same || (std::isnan(expected.data[i]) && std::isnan(found.data[i]))) << i;
        }
        if (zoo::frobenius(x) == 0) {
          EXPECT_EQ(zoo::frobenius(found), 0);
        }
        if (!std::isfinite(zoo::frobenius(x))) {
          EXPECT_TRUE(std::all_of(found.data.begin(), found.data.end(),
                                  [](float v) { return std::isnan(v); }));
        }
      }
      // Directly, and where it is recorded.
      EXPECT_EQ(calls, keeps ? 2 : std::ssize(list)) << rows << "x" << cols;
    }
  }
  EXPECT_EQ(raw->replay_problem(), "");
}

// Where scratch has grown a kept sequence would use memory that has been given back.
TEST_P(MatrixFunctions, ReplaysAreRecordedAnewWhenScratchGrows) {
  const bool keeps = raw->keep_replays(true);
  const std::vector<zoo::Dense<float>> list = inputs(9, 700);
  const Placed<float> x(*raw, list[0]);
  const Placed<float> to(*raw, list[0]);
  int calls = 0;
  Index large = 20000;
  for (int round = 0; round < 9; ++round) {
    raw->copy(list[static_cast<std::size_t>(round % 2)].data.data(), x.view().data, 9 * 700 * 4);
    raw->replay({1}, [&] {
      ++calls;
      static_cast<void>(raw->normalize(x.view(), {}, 60, to.view()));
    });
    EXPECT_NEAR(zoo::frobenius(to.fetch()), 1, 1e-6);  // f32 rounding of 6300 entries
    if (round % 3 == 2) {
      large *= 10;
      const Placed<float> much(*raw, zoo::Dense<float>(1, large));
      EXPECT_EQ(raw->sum_squares(much.view()), 0);
      // Where scratch was there is something else now.
      const Placed<float> poison(*raw, zoo::Dense<float>(1, large / 100));
      raw->fill(std::numeric_limits<double>::quiet_NaN(), poison.view());
    }
  }
  EXPECT_EQ(calls, keeps ? 4 : 9);  // twice before it grew, once after each time it did
  EXPECT_EQ(raw->replay_problem(), "");
}

// A sequence that asks for a number cannot be kept: it runs every time, and the device says why.
TEST_P(MatrixFunctions, WhatAsksForANumberIsNotKept) {
  const bool keeps = raw->keep_replays(true);
  const Placed<float> x(*raw, zoo::cast<float>(zoo::gaussian(4, 6, 1)));
  const Placed<float> y(*raw, zoo::cast<float>(zoo::gaussian(4, 6, 1)));
  int asked = 0;
  int kept = 0;
  for (int round = 1; round <= 4; ++round) {
    raw->fill(round, x.view());
    double sum = 0;
    raw->replay({1}, [&] {
      sum = raw->sum_squares(x.view());
      ++asked;
    });
    EXPECT_EQ(sum, 24 * round * round);
    raw->replay({2}, [&] {
      ++kept;
      raw->axpby(2, x.view(), 0, y.view());
    });
    EXPECT_EQ(zoo::frobenius(y.fetch()), std::sqrt(24 * 4.0 * round * round));
  }
  EXPECT_EQ(asked, 4);
  EXPECT_EQ(kept, keeps ? 2 : 4);
  if (keeps) {
    EXPECT_THAT(std::string(raw->replay_problem()),
                testing::AnyOf(HasSubstr("cudaStreamSynchronize"), HasSubstr("cudaMemcpyAsync")));
  } else {
    EXPECT_EQ(raw->replay_problem(), "");
  }
  EXPECT_THROW(raw->replay({3}, [&] { raw->axpby(1, x.view(), 1, {}); }), ShapeError);
}

TEST_P(MatrixFunctions, GramPolynomialIsTheReferences) {
  constexpr Index m = 37;
  const zoo::Dense<float> x = zoo::cast<float>(zoo::gaussian(m, 90, 3));
  struct Result {
    zoo::Dense<float> q;
    zoo::Dense<double> row_squares;
  };
  const auto run = [&](Backend& on, float scale) {
    zoo::Dense<float> scaled = x;
    for (float& v : scaled.data) v *= scale;
    const Placed<float> placed(on, scaled);
    const Placed<float> r(on, zoo::Dense<float>(m, m));
    const Placed<float> q(on, zoo::Dense<float>(m, m));
    const Placed<double> squares(on, zoo::Dense<double>(m, 1));
    const DeviceBuffer work(on, std::max(gram_accumulate_workspace_bytes(m),
                                         gram_polynomial_workspace_bytes(m, five())));
    gram_accumulate(1, placed.view(), true, 0, r.view(), work.span(), on);
    gram_polynomial(r.view(), five(), {}, q.view(),
                    {static_cast<double*>(squares.view().data), static_cast<std::size_t>(m)},
                    work.span(), on);
    return Result{q.fetch(), squares.fetch()};
  };
  const Result expected = run(*reference, 1);
  const Result actual = run(*raw, 1);
  EXPECT_LE(zoo::relative_error(actual.q, expected.q), 1e-4);  // measured in gram.hpp: 3e-5
  EXPECT_LE(zoo::relative_error(actual.row_squares, expected.row_squares), 1e-3);
  for (Index i = 0; i < m; ++i) {
    for (Index j = 0; j < i; ++j) EXPECT_EQ(actual.q(i, j), actual.q(j, i));
  }
  const Result zero = run(*raw, 0);
  EXPECT_EQ(zoo::frobenius(zero.q), 0);
  EXPECT_EQ(zoo::frobenius(zero.row_squares), 0);
  EXPECT_TRUE(std::isnan(run(*raw, std::numeric_limits<float>::quiet_NaN()).q(0, 0)));
}

// The 12 vectors of its Lanczos steps are the host's, all else is the device's.
TEST_P(MatrixFunctions, RationalMsignIsTheReferences) {
  const RationalSign f = rational_sign(1e-3, 4);
  for (const auto& [rows, cols] : std::vector<std::pair<Index, Index>>{{24, 40}, {41, 23}}) {
    for (const double size : {1.0, 1e-30, 0.0}) {
      const zoo::Dense<float> x =
          zoo::cast<float>(zoo::scaled(zoo::power_law(rows, cols, 3, 1.0), size));
      const auto run = [&, rows = rows, cols = cols](Backend& on) {
        const Placed<float> placed(on, x);
        const DeviceBuffer work(on, rational_msign_workspace_bytes(rows, cols));
        rational_msign(placed.view(), f, {}, work.span(), on);
        return placed.fetch();
      };
      const zoo::Dense<float> expected = run(*reference);
      const zoo::Dense<float> actual = run(*raw);
      if (size == 0) {
        EXPECT_EQ(zoo::frobenius(actual), 0);
        continue;
      }
      // Rounding of R, 6e-8, lifted by 1/l at the smallest of its poles.
      EXPECT_LE(zoo::relative_error(actual, expected), 1e-3) << rows << "x" << cols << " " << size;
    }
  }
}

// Terms that ranks share are those of one rank, to the bit, on every device.
TEST_P(MatrixFunctions, SharedTermsAreThoseOfOneRank) {
  constexpr Index m = 21;
  const RationalSign f = rational_sign(2e-3, 3);
  const Placed<float> x(*raw, zoo::cast<float>(zoo::gaussian(m, 50, 9)));
  const Placed<float> r(*raw, zoo::Dense<float>(m, m));
  const Placed<float> whole(*raw, zoo::Dense<float>(m, m));
  const Placed<float> shared(*raw, zoo::Dense<float>(m, m));
  const Placed<float> packed(*raw, zoo::Dense<float>(3, packed_size(m)));
  const DeviceBuffer work(*raw, rational_gram_workspace_bytes(m));
  raw->syrk(1, x.view(), Transpose::no, 0, r.view());
  rational_gram(r.view(), f, whole.view(), work.span(), *raw);
  const double s2 = rational_scale(r.view(), work.span(), *raw);
  auto* const terms = static_cast<float*>(packed.view().data);
  rational_terms(r.view(), s2, f, 0, 1, terms, work.span(), *raw);
  rational_terms(r.view(), s2, f, 1, 3, terms + packed_size(m), work.span(), *raw);
  rational_sum(terms, f, m, *raw);
  rational_of_sum(terms, s2, f, shared.view(), *raw);
  EXPECT_EQ(shared.fetch().data, whole.fetch().data);
}

// What the host asks for between launches are three numbers; what it cannot reach it never follows.
TEST_P(MatrixFunctions, SpdRootsAreTheReferences) {
  constexpr Index m = 37;
  const zoo::Dense<float> x = zoo::cast<float>(zoo::power_law(m, m, 3, 1.0));
  zoo::Dense<float> p(m, m);
  reference->syrk(1, x.view(), Transpose::no, 0, p.view());
  const zoo::Dense<float> g = zoo::cast<float>(zoo::gaussian(m, 11, 4));
  struct Result {
    zoo::Dense<float> inverse, root, product;
    int steps;
  };
  for (const int r : {1, 2, 4}) {
    RootOptions options;
    options.r = r;
    const auto iterated = [&](Backend& on) {
      const Placed<float> from(on, p);
      const Placed<float> inverse(on, zoo::Dense<float>(m, m));
      const Placed<float> root(on, zoo::Dense<float>(m, m));
      const Placed<float> product(on, g);
      const DeviceBuffer work(
          on, std::max(spd_root_workspace_bytes(m, DType::f32, options),
                       multiply_spd_root_workspace_bytes(m, 11, Side::left, DType::f32, options)));
      const RootReport report =
          spd_root(from.view(), 1, options, inverse.view(), root.view(), work.span(), on);
      EXPECT_TRUE(report.ok()) << report.problem();
      EXPECT_TRUE(
          multiply_spd_root(from.view(), 1, options, Side::left, product.view(), work.span(), on)
              .ok());
      return Result{inverse.fetch(), root.fetch(), product.fetch(), report.steps};
    };
    const Result expected = iterated(*reference);
    const Result actual = iterated(*raw);
    EXPECT_EQ(actual.steps, expected.steps);
    // test_spd_root: each of the two is as near to the eigenvectors.
    EXPECT_LE(zoo::relative_error(actual.inverse, expected.inverse), 1e-4) << r;
    EXPECT_LE(zoo::relative_error(actual.root, expected.root), 1e-3) << r;
    EXPECT_LE(zoo::relative_error(actual.product, expected.product), 1e-4) << r;

    const auto direct = [&](Backend& on) {
      const Placed<float> from(on, p);
      const Placed<float> inverse(on, zoo::Dense<float>(m, m));
      const Placed<float> root(on, zoo::Dense<float>(m, m));
      const DeviceBuffer work(on, spd_root_eigh_workspace_bytes(m));
      spd_root_eigh(from.view(), 1.0 / r, {}, Eigenvalues::damp, inverse.view(), root.view(),
                    work.span(), on);
      return Result{inverse.fetch(), root.fetch(), {}, 0};
    };
    const Result judge = direct(*raw);
    EXPECT_LE(zoo::relative_error(judge.inverse, expected.inverse), 1e-4) << r;
    EXPECT_LE(zoo::relative_error(judge.root, expected.root), 1e-3) << r;
    for (Index i = 0; i < m; ++i) {
      for (Index j = 0; j < i; ++j) EXPECT_EQ(actual.inverse(i, j), actual.inverse(j, i));
    }
  }
}

// ---- bf16
// -----------------------------------------------------------------------------------------

// Every bf16 survives the way to f32 or f64 and back; NaN stays NaN.
TEST(BFloat16, RoundTripsThroughWiderTypes) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const BFloat16 x{static_cast<std::uint16_t>(bits)};
    const float wide = to_float(x);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(to_float(to_bf16(wide))));
      EXPECT_TRUE(std::isnan(to_float(to_bf16(static_cast<double>(wide)))));
    } else {
      EXPECT_EQ(to_bf16(wide), x);
      EXPECT_EQ(to_bf16(static_cast<double>(wide)), x);
    }
  }
}

// Nearest, ties to even, decided in f64 between the two neighbours of each cell.
TEST(BFloat16, RoundsToTheNearest) {
  for (std::uint32_t bits = 0; bits + 1 < 0x7f80; ++bits) {  // the cells between finite numbers
    const BFloat16 low{static_cast<std::uint16_t>(bits)};
    const BFloat16 high{static_cast<std::uint16_t>(bits + 1)};
    const double a = to_float(low);
    const double b = to_float(high);
    const double middle = (a + b) / 2;
    const BFloat16 even = bits % 2 == 0 ? low : high;
    EXPECT_EQ(to_bf16(middle), even);
    EXPECT_EQ(to_bf16(static_cast<float>(middle)), even);  // 9 digits: exact in f32
    // A step that f32 cannot see: rounding to f32 first would end in the tie, and on the wrong
    // side.
    const double hair = std::max(middle * 0x1p-50, 0x1p-200);
    EXPECT_EQ(to_bf16(middle - hair), low);
    EXPECT_EQ(to_bf16(middle + hair), high);
    const auto tie = static_cast<float>(middle);
    EXPECT_EQ(to_bf16(std::nextafter(tie, 0.0F)), low);
    EXPECT_EQ(to_bf16(std::nextafter(tie, std::numeric_limits<float>::infinity())), high);
    EXPECT_EQ(to_bf16(-middle).bits, even.bits | 0x8000);
  }
}

TEST(BFloat16, OverflowsLikeAnyFormat) {
  const BFloat16 inf{0x7f80};
  const BFloat16 largest{0x7f7f};
  EXPECT_EQ(to_bf16(std::numeric_limits<float>::infinity()), inf);
  EXPECT_EQ(to_bf16(-std::numeric_limits<double>::infinity()).bits, 0xff80);
  EXPECT_EQ(to_bf16(std::numeric_limits<float>::max()), inf);  // above the middle of the last cell
  EXPECT_EQ(to_bf16(0x1.FEp127), largest);
  EXPECT_EQ(to_bf16(0x1.FEFFFFFFp127), largest);
  EXPECT_EQ(to_bf16(0x1.FFp127), inf);  // the tie goes to even, and that is Inf
  EXPECT_EQ(to_bf16(1e300), inf);
  EXPECT_EQ(to_bf16(1e-300).bits, 0);
  EXPECT_EQ(to_bf16(-1e-300).bits, 0x8000);
  EXPECT_EQ(to_bf16(0.0), BFloat16{0});
}

// Over all 65536 draws, exactly the share of ups that makes the mean right.
TEST(BFloat16, StochasticRoundingIsUnbiased) {
  for (const float x : {1.0F, 1.00123F, -3.14159F, 6.02e23F, 1e-40F}) {
    double sum = 0;
    for (std::uint32_t r = 0; r < 0x10000; ++r) sum += to_float(to_bf16_stochastic(x, r));
    const auto wide = static_cast<double>(x);
    EXPECT_NEAR(sum / 0x10000, wide, 1e-12 * std::abs(wide));  // f64 rounding of the mean
  }
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(to_float(to_bf16_stochastic(inf, 0xffff)), inf);
  EXPECT_EQ(to_float(to_bf16_stochastic(-inf, 0xffff)), -inf);
  EXPECT_TRUE(
      std::isnan(to_float(to_bf16_stochastic(std::numeric_limits<float>::quiet_NaN(), 0xffff))));
}

// One parameter in one piece, or in shards of any size at any stride: the same bits.
TEST_P(StochasticRounding, DoesNotDependOnSharding) {
  constexpr Index n = 2000;
  const zoo::Matrix values = zoo::gaussian(1, n, 1);
  Buffer x(values, DType::f32);
  Buffer whole(1, n, DType::bf16);
  constexpr Index start = (Index{1} << 33) + 5;  // the counter is 64 bits wide
  device->round_stochastic(x.view(), whole.view(), 1, 2, 3, start);
  for (const Index shard : {1, 7, 300}) {
    Buffer pieces(1, n, DType::bf16);
    for (Index at = 0; at < n; at += shard) {
      const Index count = std::min(shard, n - at);
      MatrixView from = x.view();
      MatrixView to = pieces.view();
      from.data = static_cast<float*>(from.data) + at;
      to.data = static_cast<BFloat16*>(to.data) + at;
      from.cols = to.cols = from.ld = to.ld = count;
      device->round_stochastic(from, to, 1, 2, 3, start + at);
    }
    EXPECT_EQ(pieces.bits(), whole.bits()) << shard;
  }
  zoo::Matrix folded(40, 50);
  folded.data = values.data;
  Buffer strided(folded, DType::f32, 3);
  Buffer result(40, 50, DType::bf16, 1);
  device->round_stochastic(strided.view(), result.view(), 1, 2, 3, start);
  EXPECT_EQ(result.bits(), whole.bits());
  Buffer other(1, n, DType::bf16);
  device->round_stochastic(x.view(), other.view(), 1, 2, 4, start);
  EXPECT_NE(other.bits(), whole.bits()) << "the step must matter";
}

TEST_P(StochasticRounding, GivesTheReferencesBits) {
  for (const Index n : {1, 15, 256, 257, 1000}) {
    Buffer x(zoo::gaussian(1, n, 5), DType::f32);
    Buffer actual(1, n, DType::bf16);
    Buffer expected(1, n, DType::bf16);
    device->round_stochastic(x.view(), actual.view(), ~std::uint64_t{0}, 9, 1, 77);
    reference->round_stochastic(x.view(), expected.view(), ~std::uint64_t{0}, 9, 1, 77);
    EXPECT_EQ(actual.bits(), expected.bits());
  }
}

// The draws of consecutive elements are fair: a constant keeps its mean.
TEST_P(StochasticRounding, KeepsTheMean) {
  constexpr Index n = 100000;
  const float x = 1.0F + 0x1p-9F;  // a quarter of the way to 1 + 2^-7
  std::vector<float> from(n, x);
  std::vector<BFloat16> to(n);
  device->round_stochastic(matrix_view(from.data(), 1, n), matrix_view(to.data(), 1, n), 1, 2, 3,
                           0);
  const auto ups = std::count_if(to.begin(), to.end(), [](BFloat16 v) { return to_float(v) > 1; });
  // Binomial(n, 1/4): deviation sqrt(n·3/16) = 137; five of them.
  EXPECT_NEAR(static_cast<double>(ups), n / 4.0, 5 * std::sqrt(n * 3.0 / 16));
}

// ---- opening
// --------------------------------------------------------------------------------------

TEST(OpenBackend, KnowsItsDevices) {
  EXPECT_EQ(open_backend("cpu")->name(), "cpu");
  EXPECT_EQ(open_backend("reference")->name(), "reference");
  EXPECT_EQ(open_backend("cpu")->stream().handle, nullptr);
}

TEST(OpenBackend, NamesWhatItKnowsWhenItRefuses) {
  const auto message = [](const char* device) -> std::string {
    try {
      open_backend(device);
    } catch (const ConfigError& e) {
      return e.what();
    }
    return "opened";
  };
  EXPECT_THAT(message("gpu"), testing::AllOf(HasSubstr("'gpu'"), HasSubstr("cpu, reference")));
  // Built in or not, a message that says what is missing; or a device.
  EXPECT_THAT(message("cuda"),
              testing::AnyOf(HasSubstr("-DORTHRUS_WITH_CUDA=ON"), HasSubstr("no CUDA device"),
                             testing::StrEq("opened")));
}

}  // namespace
}  // namespace orthrus::kernels
