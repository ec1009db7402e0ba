#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <orthrus/error.hpp>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/gram.hpp"
#include "kernels/host_backend.hpp"
#include "support/count_new.hpp"
#include "support/work.hpp"
#include "support/zoo.hpp"

namespace orthrus::kernels {
namespace {

using zoo::Dense;
using zoo::Matrix;
using zoo::same_bits;
using zoo::Work;

std::vector<Quintic> table(std::string_view name, int iterations) {
  return first_iterations(*find_coefficients(name), iterations);
}

/// XXᵀ of a wide x.
Dense<float> gram_of(const Dense<float>& x) {
  Dense<float> r(x.rows, x.rows);
  Work work(gram_accumulate_workspace_bytes(x.rows));
  gram_accumulate(1, x.view(), true, 0, r.view(), work.span(), *open_backend("cpu"));
  return r;
}

struct Polynomial {
  Dense<float> q;
  std::vector<double> row_squares;
};

Polynomial polynomial_of(const Dense<float>& r, std::span<const Quintic> iterations,
                         const GramOptions& options = {}, std::string_view device = "cpu") {
  Polynomial result{Dense<float>(r.rows, r.rows),
                    std::vector<double>(static_cast<std::size_t>(r.rows))};
  Work work(gram_polynomial_workspace_bytes(r.rows, iterations));
  const auto backend = open_backend(device);
  gram_polynomial(r.view(), iterations, options, result.q.view(), result.row_squares, work.span(),
                  *backend);
  return result;
}

/// QX of a wide x.
Matrix applied(const Dense<float>& q, const Dense<float>& x) {
  return zoo::product(zoo::cast<double>(q), zoo::cast<double>(x));
}

template <class T>
bool exactly_symmetric(const Dense<T>& x) {
  return same_bits(x, zoo::transposed(x));
}

/// The polynomial iteration on X itself, in f64 and by plain loops.
Matrix standard_iteration(const Matrix& x, std::span<const Quintic> iterations, double nu) {
  Matrix y = zoo::scaled(x, 1 / nu);
  for (const Quintic& p : iterations) {
    const Matrix a = zoo::product(y, zoo::transposed(y));
    const Matrix aa = zoo::product(a, a);
    Matrix factor(a.rows, a.rows);
    for (Index i = 0; i < a.rows; ++i) {
      for (Index j = 0; j < a.rows; ++j) {
        factor(i, j) = (i == j ? p.a : 0) + p.b * a(i, j) + p.c * aa(i, j);
      }
    }
    y = zoo::product(factor, y);
  }
  return y;
}

// ---- triangles
// ------------------------------------------------------------------------------------

TEST(GramTriangle, ComesBackExactlySymmetric) {
  for (const Index m : {1, 2, 5, 15, 16, 17, 40}) {
    ASSERT_EQ(packed_size(m), m * (m + 1) / 2);
    const Index ld = m + 3;
    std::vector<float> full(static_cast<std::size_t>(m * ld), -7.0F);
    for (Index i = 0; i < m; ++i) {
      for (Index j = 0; j <= i; ++j) {
        full[static_cast<std::size_t>(i * ld + j)] = static_cast<float>(100 * i + j);
      }
    }
    std::vector<float> packed(static_cast<std::size_t>(packed_size(m)) + 1, -9.0F);
    pack_triangle({full.data(), m, m, ld, DType::f32}, packed.data());
    EXPECT_EQ(packed.back(), -9.0F);
    EXPECT_EQ(packed[static_cast<std::size_t>(packed_size(m) - 1)],
              static_cast<float>(101 * (m - 1)));
    std::vector<float> back(static_cast<std::size_t>(m * ld), -7.0F);
    unpack_triangle(packed.data(), {back.data(), m, m, ld, DType::f32});
    for (Index i = 0; i < m; ++i) {
      for (Index j = 0; j < ld; ++j) {
        const auto expected = static_cast<float>(100 * std::max(i, j) + std::min(i, j));
        EXPECT_EQ(back[static_cast<std::size_t>(i * ld + j)], j < m ? expected : -7.0F);
      }
    }
  }
}

// ---- R
// --------------------------------------------------------------------------------------------

// 131 and 300 reach beyond one panel of 128 rows, and one slice of 128 columns.
TEST(GramAccumulate, IsTheProductRoundedOnce) {
  const auto backend = open_backend("cpu");
  for (const auto& [m, n] : {std::pair<Index, Index>{1, 1}, {7, 5}, {24, 300}, {131, 40}}) {
    for (const bool wide : {true, false}) {
      const Dense<float> x =
          zoo::cast<float>(wide ? zoo::gaussian(m, n, 3) : zoo::gaussian(n, m, 3));
      const Matrix o = wide ? zoo::cast<double>(x) : zoo::transposed(zoo::cast<double>(x));
      const Matrix square = zoo::product(o, zoo::transposed(o));
      Dense<float> r = zoo::cast<float>(square);
      Work work(gram_accumulate_workspace_bytes(m));
      gram_accumulate(2, x.view(), wide, 0.5, r.view(), work.span(), *backend);
      EXPECT_TRUE(exactly_symmetric(r));
      // Two roundings to f32 of 6e-8: the one of r before, and the one after.
      EXPECT_LE(zoo::relative_error(r, zoo::scaled(square, 2.5)), 1e-7) << m << "x" << n;
      Dense<float> fresh(m, m);
      std::fill(fresh.data.begin(), fresh.data.end(), std::numeric_limits<float>::quiet_NaN());
      gram_accumulate(1, x.view(), wide, 0, fresh.view(), work.span(), *backend);
      EXPECT_LE(zoo::relative_error(fresh, square), 6e-8) << m << "x" << n;
    }
  }
}

TEST(GramAccumulate, OfNoColumnsOnlyScales) {
  const auto backend = open_backend("cpu");
  Work work(gram_accumulate_workspace_bytes(3));
  for (const bool wide : {true, false}) {
    Dense<float> r = zoo::cast<float>(zoo::scaled(zoo::flat(3, 3, 1), 2));
    r = gram_of(r);
    const Dense<float> before = r;
    const Dense<float> x = wide ? Dense<float>(3, 0) : Dense<float>(0, 3);
    gram_accumulate(1, x.view(), wide, 0.5, r.view(), work.span(), *backend);
    EXPECT_TRUE(same_bits(r, zoo::cast<float>(zoo::scaled(zoo::cast<double>(before), 0.5))));
    std::fill(r.data.begin(), r.data.end(), std::numeric_limits<float>::quiet_NaN());
    gram_accumulate(1, x.view(), wide, 0, r.view(), work.span(), *backend);
    for (const float v : r.data) EXPECT_EQ(v, 0);
  }
}

// ---- the matrix is the scalar
// ---------------------------------------------------------------------

// Section 3.1 in f64: the Gram recursion is the iteration on X. T3.1 without our own code.
TEST(GramPolynomial, RestsOnAnIdentity) {
  for (const CoefficientTable& t : coefficient_tables()) {
    for (const int count : {1, 3, 6}) {
      const std::vector<Quintic> iterations = first_iterations(t, count);
      const Matrix x = zoo::condition(10, 24, 1e3, 2);
      const double nu = t.safety * zoo::frobenius(x);
      Matrix r = zoo::scaled(zoo::product(x, zoo::transposed(x)), 1 / (nu * nu));
      Matrix q(10, 10);
      for (Index i = 0; i < 10; ++i) q(i, i) = 1 / nu;
      for (const Quintic& p : iterations) {
        Matrix z = zoo::scaled(zoo::product(r, r), p.c);
        for (Index i = 0; i < 10; ++i) {
          for (Index j = 0; j < 10; ++j) z(i, j) += p.b * r(i, j) + (i == j ? p.a : 0);
        }
        q = zoo::product(q, z);
        r = zoo::product(zoo::product(z, r), z);
      }
      const Matrix expected = standard_iteration(x, iterations, nu);
      // 1e-16 lifted by (Π a)² <= 3e6.
      EXPECT_LE(zoo::relative_error(zoo::product(q, x), expected), 1e-9) << t.name << " " << count;
    }
  }
}

struct Spectrum {
  std::string name;
  Dense<float> x;
  zoo::Factors svd;  // of x as stored: the judge
  double bound;
};

// The specification's bounds (runtime.md, 9): 1e-4 on flat or Gaussian spectra, 5e-3 where the
// condition exceeds 1e3 or rank is missing. Measured 3e-5 and 2e-3.
const std::vector<Spectrum>& spectra() {
  static const std::vector<Spectrum> all = [] {
    constexpr Index m = 33;
    constexpr Index n = 72;
    const std::vector<std::tuple<const char*, Matrix, double>> chosen{
        {"flat", zoo::flat(m, n, 3), 1e-4},
        {"A", zoo::condition(m, n, 10, 3), 1e-4},
        {"B", zoo::condition(m, n, 1e3, 3), 5e-3},
        {"C", zoo::condition(m, n, 1e7, 3), 5e-3},
        {"D", zoo::rank_deficient(m, n, 10, 3), 5e-3},
        {"E", zoo::gaussian(m, n, 3), 1e-4},
        {"half_rank", zoo::duplicated_rows(m, n, 3), 5e-3},
        {"rank_one", zoo::rank_deficient(m, n, 1, 3), 5e-3},
        {"i^-1", zoo::power_law(m, n, 3), 5e-3},
        {"i^-2", zoo::power_law(m, n, 3, 2), 5e-3},
        {"4_and_1e-6",
         zoo::with_spectrum_of(m, n, 3, [](double i) { return i < 4 ? 1 : 1e-6; }).matrix(), 5e-3},
    };
    std::vector<Spectrum> result;
    for (const auto& [name, x, bound] : chosen) {
      const Dense<float> stored = zoo::cast<float>(x);
      result.push_back({name, stored, zoo::svd(zoo::cast<double>(stored)), bound});
    }
    return result;
  }();
  return all;
}

class GramOfEveryTable : public testing::TestWithParam<std::string_view> {};

TEST_P(GramOfEveryTable, IsThePolynomialOfTheSingularValues) {
  const CoefficientTable& t = *find_coefficients(GetParam());
  for (const int count : {1, 2, 3, 4, 5, 6}) {
    const std::vector<Quintic> iterations = first_iterations(t, count);
    if (!gram_is_stable(iterations)) continue;
    for (const Spectrum& s : spectra()) {
      const double nu = t.safety * s.svd.frobenius();
      const Matrix expected =
          s.svd.map([&](double v) { return zoo::composed(iterations, v / nu); });
      const Dense<float> r = gram_of(s.x);
      const Polynomial p = polynomial_of(r, iterations, {t.safety, EpsMode::none, 0});
      EXPECT_LE(zoo::relative_error(applied(p.q, s.x), expected), s.bound)
          << s.name << ", " << count << " iterations";
      EXPECT_TRUE(exactly_symmetric(p.q));
    }
  }
}

// R by f32 syrk: five iterations keep the bound with the error of those sums, six do not (9e-3).
TEST_P(GramOfEveryTable, BearsAnRSummedInF32) {
  const CoefficientTable& t = *find_coefficients(GetParam());
  const std::vector<Quintic> iterations = first_iterations(t, 5);
  const auto backend = open_backend("cpu");
  for (const Spectrum& s : spectra()) {
    Dense<float> r(s.x.rows, s.x.rows);
    backend->syrk(1, s.x.view(), Transpose::no, 0, r.view());
    const double nu = t.safety * s.svd.frobenius();
    const Matrix expected = s.svd.map([&](double v) { return zoo::composed(iterations, v / nu); });
    const Polynomial p = polynomial_of(r, iterations, {t.safety, EpsMode::none, 0});
    EXPECT_LE(zoo::relative_error(applied(p.q, s.x), expected), s.bound) << s.name;
  }
}

std::vector<std::string_view> table_names() {
  std::vector<std::string_view> names;
  for (const CoefficientTable& t : coefficient_tables()) names.push_back(t.name);
  return names;
}
INSTANTIATE_TEST_SUITE_P(All, GramOfEveryTable, testing::ValuesIn(table_names()),
                         [](const auto& info) { return std::string(info.param); });

TEST(GramPolynomial, OfOddSizesAndOfMoreThanOnePanel) {
  const std::vector<Quintic> iterations = table("polar_express_101", 5);
  for (const auto& [m, n] : {std::pair<Index, Index>{1, 1},
                             {1, 9},
                             {2, 2},
                             {3, 7},
                             {15, 16},
                             {16, 17},
                             {17, 33},
                             {129, 150}}) {
    const Dense<float> x = zoo::cast<float>(zoo::gaussian(m, n, 7));
    const Matrix wide = zoo::cast<double>(x);
    const Matrix expected = standard_iteration(wide, iterations, 1.01 * zoo::frobenius(wide));
    for (const char* device : {"cpu", "reference"}) {
      if (m > 20 && device == std::string_view("reference")) continue;  // plain loops: seconds
      const Polynomial p = polynomial_of(gram_of(x), iterations, {1.01, EpsMode::none, 0}, device);
      EXPECT_LE(zoo::relative_error(applied(p.q, x), expected), 1e-4) << device << " " << m;
    }
  }
}

// ---- shards
// ---------------------------------------------------------------------------------------

// T3.2: R of column shards, summed in f32 in order of rank, is R of the whole up to rounding.
TEST(GramPolynomial, OfSummedShardsIsThatOfTheWhole) {
  const std::vector<Quintic> iterations = table("polar_express_101", 5);
  constexpr Index m = 19;
  constexpr Index n = 50;
  const Dense<float> x = zoo::cast<float>(zoo::condition(m, n, 10, 5));
  const Matrix expected = applied(polynomial_of(gram_of(x), iterations).q, x);
  const auto backend = open_backend("cpu");
  for (const std::vector<Index>& columns :
       {std::vector<Index>{50}, {25, 25}, {0, 49, 1}, {13, 0, 20, 17}, {7, 7, 7, 7, 7, 15, 0}}) {
    std::vector<float> sum(static_cast<std::size_t>(packed_size(m)));
    Index first = 0;
    for (const Index count : columns) {
      Dense<float> r(m, m);
      Work work(gram_accumulate_workspace_bytes(m));
      const ConstMatrixView shard{x.data.data() + first, m, count, n, DType::f32};
      gram_accumulate(1, shard, true, 0, r.view(), work.span(), *backend);
      std::vector<float> packed(sum.size());
      pack_triangle(r.view(), packed.data());
      std::transform(sum.begin(), sum.end(), packed.begin(), sum.begin(), std::plus<>());
      first += count;
    }
    ASSERT_EQ(first, n);
    Dense<float> r(m, m);
    unpack_triangle(sum.data(), r.view());
    // Spectrum A, f32, as the specification asks.
    EXPECT_LE(zoo::relative_error(applied(polynomial_of(r, iterations).q, x), expected), 1e-4)
        << columns.size();
  }
}

// ---- what becomes free
// ------------------------------------------------------------------------

// T3.4, F1. Where rank is missing, R's own error is lifted by (Π a)² and no bound of use holds.
TEST(GramRowSquares, AreTheSquaredNormsOfTheRows) {
  for (const auto& [name, count] : {std::pair<const char*, int>{"jordan", 5},
                                    {"polar_express_101", 1},
                                    {"polar_express_101", 5},
                                    {"pade5", 4}}) {
    const std::vector<Quintic> iterations = table(name, count);
    for (const Spectrum& s : spectra()) {
      if (s.bound > 1e-4) continue;
      const Polynomial p = polynomial_of(gram_of(s.x), iterations);
      const Matrix o = applied(p.q, s.x);
      double mean = 0;
      for (const double v : p.row_squares) mean += v / static_cast<double>(o.rows);
      for (Index i = 0; i < o.rows; ++i) {
        double expected = 0;
        for (Index j = 0; j < o.cols; ++j) expected += o(i, j) * o(i, j);
        // 3e-8 of R, lifted by 100 to 1000 at σ/ν >= 0.03.
        EXPECT_NEAR(p.row_squares[static_cast<std::size_t>(i)], expected, 1e-4 * mean) << s.name;
      }
    }
  }
}

// The sums need no row squares asked for, and are the same with them.
TEST(GramRowSquares, ChangeNothingElse) {
  const std::vector<Quintic> iterations = table("polar_express_101", 5);
  const Dense<float> r = gram_of(zoo::cast<float>(zoo::gaussian(9, 20, 1)));
  const Polynomial with = polynomial_of(r, iterations);
  Dense<float> without(9, 9);
  Work work(gram_polynomial_workspace_bytes(9, iterations));
  gram_polynomial(r.view(), iterations, {}, without.view(), {}, work.span(), *open_backend("cpu"));
  EXPECT_TRUE(same_bits(with.q, without));
}

// T3.5: an R as bf16 would have left it has eigenvalues of either sign, which blow up on spectrum
// D.
TEST(GramGuard, SeesARoundedRBlowUp) {
  const std::vector<Quintic> iterations = table("polar_express_105", 5);
  const Dense<float> x = zoo::cast<float>(zoo::rank_deficient(64, 128, 10, 3));
  const Dense<float> r = gram_of(x);
  EXPECT_TRUE(gram_is_plausible(polynomial_of(r, iterations).row_squares));
  Dense<float> rounded = r;
  for (float& v : rounded.data) {
    v = std::bit_cast<float>((std::bit_cast<std::uint32_t>(v) + 0x8000U) & 0xffff0000U);
  }
  EXPECT_FALSE(gram_is_plausible(polynomial_of(rounded, iterations).row_squares));
}

TEST(GramGuard, AcceptsStableTablesOnEverySpectrum) {
  for (const char* name : {"jordan", "you5", "polar_express_101", "cans", "torch_pe10"}) {
    const double safety = find_coefficients(name)->safety;
    for (const Spectrum& s : spectra()) {
      const Polynomial p = polynomial_of(gram_of(s.x), table(name, 5), {safety, EpsMode::none, 0});
      EXPECT_TRUE(gram_is_plausible(p.row_squares)) << name << " " << s.name;
    }
  }
}

TEST(GramGuard, IsTheIntervalOfTheSpecification) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  constexpr double inf = std::numeric_limits<double>::infinity();
  const auto plausible = [](std::vector<double> v) { return gram_is_plausible(v); };
  EXPECT_TRUE(plausible({0, 0}));
  EXPECT_TRUE(plausible({1.5, 1.5}));
  EXPECT_TRUE(plausible({-1e-3, 1}));
  EXPECT_FALSE(plausible({1.5, 1.6}));
  EXPECT_FALSE(plausible({-1e-3, 0}));
  EXPECT_FALSE(plausible({nan, 1}));
  EXPECT_FALSE(plausible({inf, -inf}));
  EXPECT_FALSE(plausible({-inf, 0}));
}

TEST(GramStability, HoldsForEveryTableUpToSixIterations) {
  for (const CoefficientTable& t : coefficient_tables()) {
    const bool eco = t.name == "eco8";
    for (const int count : {1, 2, 3, 4, 5, 6}) {
      const std::vector<Quintic> iterations = first_iterations(t, count);
      EXPECT_EQ(gram_is_stable(iterations), !(eco && count == 6)) << t.name << " " << count;
      EXPECT_LT(gram_f64_iterations(iterations), count);
    }
  }
  EXPECT_FALSE(gram_is_stable(table("polar_express_101", 8)));
  EXPECT_FALSE(gram_is_stable(table("eco8", 8)));
  EXPECT_TRUE(gram_is_stable(table("pade3", 12)));
}

TEST(GramStability, DecidesHowManyIterationsAreInF64) {
  EXPECT_EQ(gram_f64_iterations(table("polar_express_101", 1)), 0);
  EXPECT_EQ(gram_f64_iterations(table("polar_express_101", 2)), 0);
  EXPECT_EQ(gram_f64_iterations(table("polar_express_101", 5)), 2);
  EXPECT_EQ(gram_f64_iterations(table("polar_express_101", 6)), 3);
  EXPECT_EQ(gram_f64_iterations(table("jordan", 5)), 2);
  EXPECT_EQ(gram_f64_iterations(table("pade3", 6)), 0);
}

// ---- flops
// ----------------------------------------------------------------------------------------

/// Counts the products of another backend.
class Counting final : public HostBackend {
 public:
  double flops = 0;

  [[nodiscard]] std::string_view name() const override { return "counting"; }
  void gemm(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b, Transpose op_b,
            double beta, MatrixView c) override {
    const Index k = op_a == Transpose::yes ? a.rows : a.cols;
    flops += 2 * static_cast<double>(c.rows * c.cols * k);
    inner_->gemm(alpha, a, op_a, b, op_b, beta, c);
  }
  void syrk(double alpha, ConstMatrixView a, Transpose op_a, double beta, MatrixView c) override {
    flops += static_cast<double>(c.rows * a.rows * a.cols);
    inner_->syrk(alpha, a, op_a, beta, c);
  }
  bool invert_spd(MatrixView a) override { return inner_->invert_spd(a); }
  void convert(ConstMatrixView from, double scale, MatrixView to) override {
    inner_->convert(from, scale, to);
  }
  void round_stochastic(ConstMatrixView from, MatrixView to, std::uint64_t seed,
                        std::uint64_t stream_id, std::uint64_t step, Index first) override {
    inner_->round_stochastic(from, to, seed, stream_id, step, first);
  }
  void momentum(double beta, double weight, bool ahead, MatrixView g, MatrixView m) override {
    inner_->momentum(beta, weight, ahead, g, m);
  }
  void axpby(double a, ConstMatrixView x, double b, MatrixView y) override {
    inner_->axpby(a, x, b, y);
  }
  void sign(ConstMatrixView from, MatrixView to) override { inner_->sign(from, to); }
  double decay_step(double rho, double eta, ConstMatrixView u, MatrixView w) override {
    return inner_->decay_step(rho, eta, u, w);
  }
  double adamw(const AdamWScalars& s, ConstMatrixView g, MatrixView m, MatrixView v,
               MatrixView w) override {
    return inner_->adamw(s, g, m, v, w);
  }
  double sum_squares(ConstMatrixView x) override { return inner_->sum_squares(x); }
  void line_sum_squares(ConstMatrixView x, bool of_columns, MatrixView out) override {
    inner_->line_sum_squares(x, of_columns, out);
  }
  double abs_max(ConstMatrixView x) override { return inner_->abs_max(x); }
  void scale_lines(ConstMatrixView s, bool of_columns, MatrixView x) override {
    inner_->scale_lines(s, of_columns, x);
  }
  void abs_maxima(ConstMatrixView w, const Grid& grid, MatrixView out) override {
    inner_->abs_maxima(w, grid, out);
  }
  void scales_from_maxima(const Grid& grid, MatrixView scales) override {
    inner_->scales_from_maxima(grid, scales);
  }
  void quantize(MatrixView w, const Grid& grid, const Rounding& rounding,
                QuantizedView q) override {
    inner_->quantize(w, grid, rounding, q);
  }
  void dequantize(ConstQuantizedView q, const Grid& grid, MatrixView to) override {
    inner_->dequantize(q, grid, to);
  }
  std::int64_t count_beyond(ConstMatrixView w, const Grid& grid, ConstMatrixView scales) override {
    return inner_->count_beyond(w, grid, scales);
  }
  void adamw_pull_back(const AdamWScalars& s, double kappa, ConstMatrixView v, ConstMatrixView e,
                       MatrixView m) override {
    inner_->adamw_pull_back(s, kappa, v, e, m);
  }
  void split_f32(ConstMatrixView w, MatrixView high, MatrixView low) override {
    inner_->split_f32(w, high, low);
  }
  void merge_f32(ConstMatrixView high, ConstMatrixView low, MatrixView w) override {
    inner_->merge_f32(high, low, w);
  }

 private:
  std::unique_ptr<Backend> inner_ = open_backend("cpu");
};

// T3.6: section 3.4 for T = 5, of which 3r are XXᵀ and QX; and what is spent is what is promised,
// plus half a panel of 128 rows per product.
TEST(GramFlops, AreThoseOfTheSpecification) {
  EXPECT_EQ(gram_polynomial_flops(10, 5), 17e3);
  EXPECT_EQ(gram_polynomial_flops(10, 1), 1e3);
  constexpr Index m = 512;
  const Dense<float> r = [] {
    Dense<float> flat(m, m);
    for (Index i = 0; i < m; ++i) flat(i, i) = 1;
    return flat;
  }();
  for (const auto& [name, count] :
       {std::pair<const char*, int>{"polar_express_101", 1}, {"polar_express_101", 5}}) {
    const std::vector<Quintic> iterations = table(name, count);
    Dense<float> q(m, m);
    Work work(gram_polynomial_workspace_bytes(m, iterations));
    Counting backend;
    gram_polynomial(r.view(), iterations, {}, q.view(), {}, work.span(), backend);
    EXPECT_EQ(backend.flops, gram_polynomial_flops(m, count) * (1 + 128.0 / m)) << count;
  }
}

// ---- degenerate inputs
// ------------------------------------------------------------------------

TEST(GramPolynomial, OfZeroIsExactlyZero) {
  for (const EpsMode mode : {EpsMode::none, EpsMode::add, EpsMode::clamp}) {
    const Polynomial p = polynomial_of(Dense<float>(5, 5), table("jordan", 5), {1, mode, 1e-7});
    for (const float v : p.q.data) EXPECT_EQ(v, 0);
    for (const double v : p.row_squares) EXPECT_EQ(v, 0);
    EXPECT_TRUE(gram_is_plausible(p.row_squares));
  }
}

TEST(GramPolynomial, CarriesNanAndInfThrough) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Dense<float> x = zoo::cast<float>(zoo::gaussian(4, 6, 1));
    x(1, 2) = bad;
    const Polynomial p = polynomial_of(gram_of(x), table("polar_express_101", 5));
    for (const float v : p.q.data) EXPECT_TRUE(std::isnan(v));
    for (const double v : p.row_squares) EXPECT_TRUE(std::isnan(v));
    EXPECT_FALSE(gram_is_plausible(p.row_squares));
  }
}

TEST(GramPolynomial, KeepsZeroRowsZero) {
  Dense<float> x = zoo::cast<float>(zoo::gaussian(6, 9, 2));
  for (Index j = 0; j < 9; ++j) x(2, j) = 0;
  const Polynomial p = polynomial_of(gram_of(x), table("polar_express_101", 5));
  const Matrix o = applied(p.q, x);
  for (Index j = 0; j < 9; ++j) EXPECT_EQ(o(2, j), 0);  // sums of exact zeros
  EXPECT_EQ(p.row_squares[2], 0);
}

// X·2^k has R·4^k and Q·2^-k, all exact, from one end of the promised range of tr R to the other.
TEST(GramPolynomial, FollowsPowersOfTwoToTheBit) {
  const std::vector<Quintic> iterations = table("polar_express_101", 5);
  const Dense<float> r = gram_of(zoo::cast<float>(zoo::gaussian(8, 20, 4)));
  const Polynomial expected = polynomial_of(r, iterations);
  for (const int k : {-36, -20, -1, 1, 20, 29}) {
    Dense<float> scaled = r;
    for (float& v : scaled.data) v = std::ldexp(v, 2 * k);
    Polynomial actual = polynomial_of(scaled, iterations);
    for (float& v : actual.q.data) v = std::ldexp(v, k);
    EXPECT_TRUE(same_bits(actual.q, expected.q)) << k;
    EXPECT_EQ(actual.row_squares, expected.row_squares) << k;
  }
}

// On a 1×1 matrix everything is a formula.
TEST(GramPolynomial, TreatsEpsAsMsignDoes) {
  const std::vector<Quintic> iterations = table("polar_express_101", 5);
  constexpr double eps = 1e-7;
  for (const float x : {1e-9F, 5e-8F, 1e-7F, 4e-7F, 1.0F}) {
    const auto at = [&](EpsMode mode) {
      Dense<float> r(1, 1);
      r(0, 0) = x * x;
      const auto q = static_cast<double>(polynomial_of(r, iterations, {1.01, mode, eps}).q(0, 0));
      return q * static_cast<double>(x);
    };
    const auto wide = static_cast<double>(x);
    const double norm = 1.01 * wide;
    const auto p = [&](double nu) { return zoo::composed(iterations, wide / nu); };
    // A few roundings of 6e-8, lifted by p' x/p < 10.
    EXPECT_NEAR(at(EpsMode::none), p(norm), 5e-6) << x;
    EXPECT_NEAR(at(EpsMode::add), p(norm + eps), 5e-6) << x;
    EXPECT_NEAR(at(EpsMode::clamp), p(std::max(norm, eps)), 5e-6) << x;
  }
}

// ---- memory
// ---------------------------------------------------------------------------------------

TEST(GramPolynomial, LeavesItsInputGapsAndTheEndOfItsWorkspaceAlone) {
  const auto backend = open_backend("cpu");
  constexpr Index m = 21;
  constexpr Index ld = m + 3;
  const Dense<float> r = gram_of(zoo::cast<float>(zoo::gaussian(m, 40, 3)));
  std::vector<float> strided(m * ld, -7.0F);
  for (Index i = 0; i < m; ++i) {
    for (Index j = 0; j < m; ++j) strided[static_cast<std::size_t>(i * ld + j)] = r(i, j);
  }
  const std::vector<float> before = strided;
  for (const int count : {2, 5}) {
    const std::vector<Quintic> iterations = table("polar_express_101", count);
    const Polynomial expected = polynomial_of(r, iterations);
    std::vector<float> q(m * ld, -7.0F);
    std::vector<double> row_squares(m);
    const std::size_t need = gram_polynomial_workspace_bytes(m, iterations);
    EXPECT_EQ(need % 256, 0U);
    Work work(need + 64);
    gram_polynomial({strided.data(), m, m, ld, DType::f32}, iterations, {},
                    {q.data(), m, m, ld, DType::f32}, row_squares, work.span().first(need),
                    *backend);
    EXPECT_EQ(strided, before);
    EXPECT_EQ(row_squares, expected.row_squares);
    for (Index i = 0; i < m; ++i) {
      for (Index j = 0; j < ld; ++j) {
        EXPECT_EQ(q[static_cast<std::size_t>(i * ld + j)], j < m ? expected.q(i, j) : -7.0F);
      }
    }
    for (const std::byte b : work.span().subspan(need)) EXPECT_EQ(b, std::byte{0x5a});
  }
}

TEST(GramPolynomial, RefusesWhatItCannotDo) {
  const auto backend = open_backend("cpu");
  const std::vector<Quintic> iterations = table("jordan", 5);
  Dense<float> r = gram_of(zoo::cast<float>(zoo::gaussian(4, 6, 1)));
  Dense<float> q(4, 4);
  Dense<float> other(3, 3);
  Dense<double> wide(4, 4);
  std::vector<double> three(3);
  Work piece(gram_polynomial_workspace_bytes(4, iterations));
  const std::span<std::byte> work = piece.span();
  const auto call = [&](ConstMatrixView from, std::span<const Quintic> with, double safety,
                        MatrixView to, std::span<double> squares, std::span<std::byte> scratch) {
    gram_polynomial(from, with, {safety, EpsMode::none, 0}, to, squares, scratch, *backend);
  };
  EXPECT_THROW(call({r.data.data(), 0, 0, 0, DType::f32}, iterations, 1, q.view(), {}, work),
               ShapeError);
  EXPECT_THROW(call({r.data.data(), 4, 3, 4, DType::f32}, iterations, 1, q.view(), {}, work),
               ShapeError);
  EXPECT_THROW(call(wide.view(), iterations, 1, q.view(), {}, work), ShapeError);
  EXPECT_THROW(call(r.view(), iterations, 1, other.view(), {}, work), ShapeError);
  EXPECT_THROW(call(r.view(), iterations, 1, r.view(), {}, work), ShapeError);
  EXPECT_THROW(call(r.view(), {}, 1, q.view(), {}, work), ShapeError);
  EXPECT_THROW(call(r.view(), iterations, 0, q.view(), {}, work), ShapeError);
  EXPECT_THROW(call(r.view(), iterations, 1, q.view(), three, work), ShapeError);
  EXPECT_THROW(call(r.view(), iterations, 1, q.view(), {}, work.first(work.size() - 1)),
               ShapeError);
  const Dense<float> x(4, 6);
  EXPECT_THROW(gram_accumulate(1, x.view(), false, 0, r.view(), work, *backend), ShapeError);
  EXPECT_THROW(gram_accumulate(1, x.view(), true, 0, r.view(), {}, *backend), ShapeError);
  EXPECT_THROW(pack_triangle(x.view(), q.data.data()), ShapeError);
  EXPECT_THROW(unpack_triangle(q.data.data(), wide.view()), ShapeError);
}

TEST(GramPolynomial, AllocatesNothingAfterTheFirstCall) {
  const auto backend = open_backend("cpu");
  const std::vector<Quintic> iterations = table("polar_express_101", 5);
  const Dense<float> x = zoo::cast<float>(zoo::gaussian(24, 40, 1));
  Dense<float> r(24, 24);
  Dense<float> q(24, 24);
  std::vector<double> row_squares(24);
  std::vector<float> packed(static_cast<std::size_t>(packed_size(24)));
  Work piece(std::max(gram_polynomial_workspace_bytes(24, iterations),
                      gram_accumulate_workspace_bytes(24)));
  const std::span<std::byte> work = piece.span();
  const auto once = [&] {
    gram_accumulate(1, x.view(), true, 0, r.view(), work, *backend);
    pack_triangle(r.view(), packed.data());
    unpack_triangle(packed.data(), r.view());
    gram_polynomial(r.view(), iterations, {}, q.view(), row_squares, work, *backend);
  };
  once();
  const long before = count_new::calls;
  once();
  EXPECT_EQ(count_new::calls - before, 0);
}

}  // namespace
}  // namespace orthrus::kernels
