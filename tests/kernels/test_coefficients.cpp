#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <orthrus/error.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/coefficients.hpp"

namespace orthrus::kernels {
namespace {

// The cushion of the released Polar Express code.
constexpr double released_cushion = 0.02407327424182761;

double compose(std::span<const Quintic> iterations, double x) {
  for (const Quintic& p : iterations) x = p(x);
  return x;
}

/// max |p − 1| on [l, 1] over points that are dense near l and near 1.
double worst(std::span<const Quintic> iterations, double l) {
  constexpr int points = 40000;
  double most = 0;
  for (int i = 0; i <= points; ++i) {
    const double t = static_cast<double>(i) / points;
    for (const double x : {std::pow(l, 1 - t), l + (1 - l) * t}) {
      most = std::max(most, std::abs(compose(iterations, x) - 1));
    }
  }
  return most;
}

/// A printed number: its value, and what its last digit leaves open.
struct Printed {
  double value, tolerance;

  explicit Printed(const std::string& text) : value(std::strtod(text.c_str(), nullptr)) {
    const std::string mantissa = text.substr(0, text.find('e'));
    const auto dot = mantissa.find('.');
    const int decimals = dot == std::string::npos ? 0 : static_cast<int>(mantissa.size() - dot - 1);
    const double exponent = text.find('e') == std::string::npos
                                ? 0
                                : std::atof(text.substr(text.find('e') + 1).c_str());
    // A unit of the last digit: not half, since jordan's printed .530 is .52946 at x = l.
    tolerance = std::pow(10.0, exponent - decimals);
  }
};

void expect_close(const Quintic& actual, const Quintic& expected, double relative) {
  EXPECT_NEAR(actual.a, expected.a, relative * std::abs(expected.a));
  EXPECT_NEAR(actual.b, expected.b, relative * std::abs(expected.b));
  EXPECT_NEAR(actual.c, expected.c, relative * std::abs(expected.c));
}

/// The inner extrema of p: the roots of a + 3bx² + 5cx⁴.
std::pair<double, double> extrema(const Quintic& p) {
  const double root = std::sqrt(9 * p.b * p.b - 20 * p.a * p.c);
  return {std::sqrt((-3 * p.b - root) / (10 * p.c)), std::sqrt((-3 * p.b + root) / (10 * p.c))};
}

// ---- tables
// ---------------------------------------------------------------------------------------

struct ErrorRow {
  const char* table;
  int iterations;
  const char* printed[4];  // l = 1e-1, 1e-2, 1e-3, 1e-4
};

class ErrorTable : public testing::TestWithParam<ErrorRow> {};

TEST_P(ErrorTable, HoldsToThePrintedDigits) {
  const ErrorRow& row = GetParam();
  const CoefficientTable* table = find_coefficients(row.table);
  ASSERT_NE(table, nullptr);
  const std::vector<Quintic> iterations = first_iterations(*table, row.iterations);
  const double lower[] = {1e-1, 1e-2, 1e-3, 1e-4};
  for (int i = 0; i < 4; ++i) {
    const Printed expected(row.printed[i]);
    const double actual = worst(iterations, lower[i]);
    if (expected.value < 1e-14) {
      // Below that, the table shows rounding noise of the composition.
      EXPECT_LE(actual, 1e-14) << "l = " << lower[i];
    } else {
      EXPECT_NEAR(actual, expected.value, expected.tolerance) << "l = " << lower[i];
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Published, ErrorTable,
    testing::Values(ErrorRow{"jordan", 5, {".318", ".318", ".530", ".952"}},
                    ErrorRow{"jordan", 6, {".318", ".318", ".318", ".834"}},
                    ErrorRow{"jordan", 8, {".318", ".318", ".318", ".318"}},
                    ErrorRow{"you5", 4, {".147", ".147", ".827", ".983"}},
                    ErrorRow{"you5", 5, {".0318", ".0318", ".525", ".951"}},
                    ErrorRow{"you5", 6, {".0215", ".0215", ".145", ".861"}},
                    ErrorRow{"you5", 8, {".0125", ".0125", ".0213", ".145"}},
                    ErrorRow{"polar_express", 3, {".866", ".866", ".866", ".987"}},
                    ErrorRow{"polar_express", 4, {".560", ".560", ".560", ".955"}},
                    ErrorRow{"polar_express", 5, {".1236", ".1236", ".1236", ".898"}},
                    ErrorRow{"polar_express", 6, {"1.19e-3", "1.19e-3", "1.19e-3", ".808"}},
                    ErrorRow{"polar_express", 7, {"1.0e-9", "1.0e-9", "1.0e-9", ".648"}},
                    ErrorRow{"polar_express", 8, {"2e-16", "2e-16", "2e-16", ".393"}},
                    ErrorRow{"polar_express", 10, {"1e-16", "1e-16", "1e-16", "3.08e-3"}},
                    ErrorRow{"polar_express_101", 5, {".130", ".130", ".154", ".903"}},
                    ErrorRow{"polar_express_101", 6, {"2.56e-3", "2.56e-3", "5.59e-3", ".819"}},
                    ErrorRow{"polar_express_101", 7, {"4.7e-6", "4.7e-6", "9.1e-6", ".670"}},
                    ErrorRow{"polar_express_101", 8, {"1e-15", "1e-15", "1e-15", ".425"}},
                    ErrorRow{"polar_express_101", 10, {"1e-16", "1e-16", "1e-16", "5.7e-3"}},
                    ErrorRow{"polar_express_105", 4, {".560", ".560", ".637", ".963"}},
                    ErrorRow{"polar_express_105", 5, {".154", ".154", ".271", ".920"}},
                    ErrorRow{"polar_express_105", 8, {".075", ".075", ".075", ".250"}},
                    ErrorRow{"torch_pe10", 5, {".131", ".131", ".137", ".900"}},
                    ErrorRow{"torch_pe10", 6, {"1.88e-3", "1.88e-3", "2.53e-3", ".814"}},
                    ErrorRow{"torch_pe10", 8, {"3e-6", "3e-6", "3e-6", ".418"}},
                    ErrorRow{"torch_pe10", 10, {"1e-6", "1e-6", "1e-6", "5.5e-3"}},
                    ErrorRow{"dion_pe102", 5, {".141", ".141", ".141", ".901"}},
                    ErrorRow{"cans", 5, {".113", ".113", ".113", ".895"}},
                    ErrorRow{"eco8", 5, {".834", ".834", ".834", ".837"}},
                    ErrorRow{"eco8", 6, {".493", ".493", ".493", ".498"}},
                    ErrorRow{"eco8", 7, {".085", ".085", ".085", ".090"}},
                    ErrorRow{"eco8", 8, {"7.26e-4", "7.26e-4", "7.26e-4", "9.8e-4"}},
                    ErrorRow{"cubic5", 5, {".300", ".300", ".881", ".988"}},
                    ErrorRow{"dsv4_10", 10, {"5.4e-4", "5.4e-4", "5.4e-4", "2.0e-3"}},
                    ErrorRow{"pade5", 5, {"4.2e-3", ".772", ".977", ".998"}},
                    ErrorRow{"pade5", 8, {"1e-16", ".057", ".848", ".985"}},
                    ErrorRow{"pade5", 10, {"1e-16", "2.3e-10", ".501", ".946"}},
                    ErrorRow{"pade3", 8, {"1.7e-3", ".748", ".974", ".997"}},
                    ErrorRow{"pade3", 10, {"3e-11", ".471", ".942", ".994"}},
                    ErrorRow{"modula", 5, {".0185", ".188", ".759", ".976"}},
                    ErrorRow{"modula", 8, {"3.7e-3", ".0123", ".0706", ".380"}}),
    [](const auto& info) {
      return std::string(info.param.table) + "_" + std::to_string(info.param.iterations);
    });

// Digits are copied from papers and programs. These sums, weighted by position, were computed from
// the published text by another program in decimal arithmetic: any other digit or order shows.
TEST(Tables, HaveTheirPublishedDigits) {
  struct Row {
    const char* table;
    std::size_t entries;
    double a, b, c;
  };
  const Row rows[] = {
      {"jordan", 1, 3.4445, -4.7750, 2.0315},
      {"you5", 5, 48.9018, -64.1076, 25.9379},
      {"polar_express", 8, 92.5971603436319341, -82.8747512015639094, 32.0655889564284745},
      {"polar_express_101", 8, 91.82887162735838, -80.73151554891616, 30.654910582123328},
      {"polar_express_105", 5, 50.59461098184134, -48.82130631300876, 18.945477219244066},
      {"dion_pe102", 5, 52.7931390624347296, -54.4400124817621239, 22.37113858675413349},
      {"torch_pe10", 10, 127.421990, -104.415704, 37.739750},
      {"cans", 7, 77.6939610317137545, -74.6107938952155591, 30.4739162819599889},
      {"eco8", 8, 110.1153, -85.6228, 23.8632},
      {"cubic5", 5, 37.0080150, -20.5482864, 0},
      {"dsv4_10", 10, 36 * 3.4445 + 19 * 2, 36 * -4.7750 + 19 * -1.5, 36 * 2.0315 + 19 * 0.5},
      {"pade5", 1, 15.0 / 8, -10.0 / 8, 3.0 / 8},
      {"pade3", 1, 1.5, -0.5, 0},
      {"modula", 1, 3, -3.2, 1.2}};
  EXPECT_EQ(std::size(rows), coefficient_tables().size());
  for (const Row& row : rows) {
    const CoefficientTable* table = find_coefficients(row.table);
    ASSERT_NE(table, nullptr) << row.table;
    ASSERT_EQ(table->iterations.size(), row.entries) << row.table;
    double a = 0;
    double b = 0;
    double c = 0;
    double position = 0;
    for (const Quintic& p : table->iterations) {
      ++position;
      a += position * p.a;
      b += position * p.b;
      c += position * p.c;
    }
    // Some ten roundings of sums near 100, each 2^-53 of them.
    EXPECT_NEAR(a, row.a, 1e-13) << row.table;
    EXPECT_NEAR(b, row.b, 1e-13) << row.table;
    EXPECT_NEAR(c, row.c, 1e-13) << row.table;
  }
}

// Tiny singular values see only the slope at zero: the product of all a.
TEST(Tables, HaveThePublishedSlopesAfterFiveIterations) {
  const std::pair<const char*, const char*> rows[] = {{"jordan", "484.9"},
                                                      {"you5", "492.7"},
                                                      {"polar_express", "1026"},
                                                      {"polar_express_101", "976"},
                                                      {"polar_express_105", "804"},
                                                      {"cans", "1049"},
                                                      {"eco8", "1634"},
                                                      {"cubic5", "119"},
                                                      {"pade5", "23.2"}};
  for (const auto& [name, text] : rows) {
    double slope = 1;
    for (const Quintic& p : first_iterations(*find_coefficients(name), 5)) slope *= p.a;
    const Printed expected(text);
    EXPECT_NEAR(slope, expected.value, expected.tolerance) << name;
  }
}

// The largest input after which all entries of a table still converge, or stay in their band.
TEST(Tables, ToleratePublishedOvershoot) {
  const std::pair<const char*, double> rows[] = {
      {"jordan", 1.264},     {"polar_express_101", 1.011}, {"torch_pe10", 1.011},
      {"dion_pe102", 1.022}, {"polar_express_105", 1.055}, {"eco8", 1.112}};
  for (const auto& [name, most] : rows) {
    const auto& table = *find_coefficients(name);
    // Published to three digits: a little below stays bounded and positive.
    const double end = compose(table.iterations, most - 0.002);
    EXPECT_GT(end, 0.2) << name;
    EXPECT_LT(end, 1.5) << name;
  }
}

TEST(Tables, AreFoundByTheirNames) {
  std::vector<std::string_view> names;
  for (const CoefficientTable& t : coefficient_tables()) {
    EXPECT_EQ(find_coefficients(t.name), &t);
    EXPECT_FALSE(t.iterations.empty());
    EXPECT_FALSE(t.source.empty());
    names.push_back(t.name);
  }
  std::sort(names.begin(), names.end());
  EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end()) << "a name twice";
  EXPECT_EQ(find_coefficients("jordn"), nullptr);
  // Its first polynomial turns singular values near 1 around.
  EXPECT_EQ(find_coefficients("aol4"), nullptr);
}

TEST(Tables, KnowWhatTheirAuthorsFeedThem) {
  for (const CoefficientTable& t : coefficient_tables()) {
    const double expected = t.name == "polar_express_101" ? 1.01
                            : t.name == "dion_pe102"      ? 1.02
                                                          : 1;
    EXPECT_EQ(t.safety, expected) << t.name;
  }
}

TEST(Tables, RepeatTheirLastEntry) {
  const auto& you5 = *find_coefficients("you5");
  const std::vector<Quintic> seven = first_iterations(you5, 7);
  ASSERT_EQ(seven.size(), 7U);
  EXPECT_EQ(seven[3], you5.iterations[3]);
  EXPECT_EQ(seven[5], you5.iterations[4]);
  EXPECT_EQ(seven[6], you5.iterations[4]);
  EXPECT_EQ(first_iterations(you5, 2).size(), 2U);
  EXPECT_THROW(first_iterations(you5, 0), ConfigError);
}

// Dividing the argument by s divides (a, b, c) by (s, s³, s⁵): ties two tables' digits to a
// third's.
TEST(Tables, WithASafetyFactorArePolarExpressOfXOverIt) {
  const auto& plain = *find_coefficients("polar_express");
  for (const auto& [name, s, entries] :
       {std::tuple{"polar_express_101", 1.01, 7}, std::tuple{"polar_express_105", 1.05, 5}}) {
    const auto& table = *find_coefficients(name);
    for (std::size_t i = 0; i < static_cast<std::size_t>(entries); ++i) {
      const Quintic& p = plain.iterations[i];
      // 15 digits are printed.
      expect_close(table.iterations[i], {p.a / s, p.b / std::pow(s, 3), p.c / std::pow(s, 5)},
                   3e-14);
    }
  }
}

// ---- solver
// ---------------------------------------------------------------------------------------

TEST(OptimalComposition, ReproducesPolarExpress) {
  const auto& table = *find_coefficients("polar_express");
  const std::vector<Quintic> solved = optimal_composition(1e-3, 8, released_cushion);
  for (std::size_t i = 0; i < 6; ++i) expect_close(solved[i], table.iterations[i], 1e-12);
  // On [1 − 1e-3, 1 + 1e-3] the four points nearly coincide, and the table's authors, in double,
  // lost five digits. With 60 digits the seventh entry is this one:
  expect_close(solved[6], {1.8750014808442192, -1.2500016453814815, 0.37500016453818624}, 1e-12);
  expect_close(solved[6], table.iterations[6], 3e-11);
  // The table's last entry is the limit; the solver's still carries an interval of 1e-9.
  expect_close(solved[7], table.iterations[7], 1e-8);
}

TEST(OptimalComposition, ReproducesCans) {
  const auto& table = *find_coefficients("cans");
  const std::vector<Quintic> solved = optimal_composition(1e-3, 7, 0);
  for (std::size_t i = 0; i < 6; ++i) expect_close(solved[i], table.iterations[i], 1e-12);
  // "the seventh optimal entry differs from it by 9e-7"
  expect_close(solved[6], table.iterations[6], 2e-6);
}

TEST(OptimalComposition, WithSafetyReproducesTheReleasedTable) {
  const auto& table = *find_coefficients("polar_express_101");
  const std::vector<Quintic> solved = optimal_composition(1e-3, 8, released_cushion, 1.01);
  for (std::size_t i = 0; i < 6; ++i) expect_close(solved[i], table.iterations[i], 1e-12);
  expect_close(solved[6], table.iterations[6], 3e-11);  // as without safety
  expect_close(solved[7], table.iterations[7], 1e-8);   // not divided
}

TEST(OptimalComposition, ReproducesRegressionValues) {
  const std::vector<Quintic> two = {{7.98936321422251, -22.74783212374479, 16.678598023544318},
                                    {3.643418147795085, -2.7268652746987314, 0.5371078953570536},
                                    {2.6712664799600776, -1.9853154429743896, 0.45352251714071573},
                                    {1.9588931234180296, -1.3403574223940036, 0.3841442199832841},
                                    {1.8751820661808165, -1.2502022808794249, 0.3750202286638878}};
  const std::vector<Quintic> four = {{8.318232651023681, -23.684210473106337, 17.365145998841236},
                                     {4.155384068827714, -2.960331588962446, 0.543076770433038},
                                     {4.138240733859021, -2.955875006262373, 0.5436858842722397},
                                     {4.0688827916258195, -2.9381736328156083, 0.5463505852330667},
                                     {3.792131546221321, -2.8336653640462224, 0.5492610128964645},
                                     {2.918343149217708, -2.183036739818929, 0.4756000498872031}};
  const std::vector<Quintic> solved_two = optimal_composition(1e-2, 5, released_cushion);
  const std::vector<Quintic> solved_four = optimal_composition(1e-4, 6, released_cushion);
  for (std::size_t i = 0; i < two.size(); ++i) expect_close(solved_two[i], two[i], 1e-12);
  for (std::size_t i = 0; i < four.size(); ++i) expect_close(solved_four[i], four[i], 1e-12);
}

TEST(OptimalQuintic, EquioscillatesAtFourPoints) {
  for (const double start : {0.5, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5}) {
    double l = start;
    double u = 1;
    for (int t = 0; t < 12 && l / u < 0.999; ++t) {
      const Quintic p = optimal_quintic(l, u);
      const auto [q, r] = extrema(p);
      const double e = 1 - p(l);
      EXPECT_LT(l, q);
      EXPECT_LT(r, u);
      EXPECT_NEAR(p(q) - 1, e, 1e-10) << start << " step " << t;
      EXPECT_NEAR(1 - p(r), e, 1e-10) << start << " step " << t;
      EXPECT_NEAR(p(u) - 1, e, 1e-10) << start << " step " << t;
      l = p(l);
      u = 2 - l;
    }
  }
}

// Near 1 the Remez system is singular and the closed limit takes over: no jump there.
TEST(OptimalQuintic, IsContinuousWhereTheLimitTakesOver) {
  expect_close(optimal_quintic(1 - 5.1e-6, 1), optimal_quintic(1 - 4.9e-6, 1), 1e-4);
  const Quintic at_one = optimal_quintic(1, 1);
  expect_close(at_one, {1.875, -1.25, 0.375}, 1e-15);
}

TEST(OptimalQuintic, ScalesWithItsInterval) {
  // The best p on [sl, su] is the best on [l, u] of x/s.
  const Quintic p = optimal_quintic(0.05, 1);
  const Quintic scaled = optimal_quintic(0.15, 3);
  expect_close(scaled, {p.a / 3, p.b / 27, p.c / 243}, 1e-12);
}

TEST(OptimalQuintic, RefusesBadIntervals) {
  EXPECT_THROW(optimal_quintic(0, 1), ConfigError);
  EXPECT_THROW(optimal_quintic(-1, 1), ConfigError);
  EXPECT_THROW(optimal_quintic(2, 1), ConfigError);
  EXPECT_THROW(optimal_quintic(std::nan(""), 1), ConfigError);
  EXPECT_THROW(optimal_composition(0.1, 0, 0), ConfigError);
  EXPECT_THROW(iterations_for(0, 0.1), ConfigError);
}

TEST(OptimalCubic, EquioscillatesAtThreePoints) {
  for (const double l : {1e-4, 1e-2, 0.1, 0.5, 0.9}) {
    const Quintic p = optimal_cubic(l, 1);
    EXPECT_EQ(p.c, 0);
    const double e = std::sqrt(-p.a / (3 * p.b));  // p'(e) = 0
    EXPECT_NEAR(1 - p(l), p(e) - 1, 1e-14);
    EXPECT_NEAR(1 - p(1), p(e) - 1, 1e-14);
  }
}

struct OptimalError {
  double l;
  int iterations;
  const char* printed;
};

// Error of the exactly optimal composition, degree 5, printed digits; 0: below double precision.
TEST(OptimalComposition, HasThePublishedErrors) {
  const OptimalError rows[] = {
      {1e-1, 1, ".453"},    {1e-1, 2, "6.27e-2"}, {1e-1, 3, "1.54e-4"}, {1e-1, 4, "2.3e-12"},
      {1e-1, 5, "0"},       {1e-2, 2, ".707"},    {1e-2, 3, ".269"},    {1e-2, 4, "1.25e-2"},
      {1e-2, 5, "1.23e-6"}, {1e-2, 6, "0"},       {1e-3, 4, ".546"},    {1e-3, 5, ".113"},
      {1e-3, 6, "9.16e-4"}, {1e-3, 7, "4.8e-10"}, {1e-3, 8, "0"},       {1e-4, 5, ".764"},
      {1e-4, 6, ".353"},    {1e-4, 7, "2.88e-2"}, {1e-4, 8, "1.49e-5"}, {1e-5, 7, ".622"},
      {1e-5, 8, ".174"},    {1e-5, 9, "3.34e-3"}};
  for (const OptimalError& row : rows) {
    const double actual = worst(optimal_composition(row.l, row.iterations, 0), row.l);
    const Printed expected(row.printed);
    if (expected.value == 0) {
      EXPECT_LE(actual, 1e-14) << row.l << " " << row.iterations;
    } else {
      EXPECT_NEAR(actual, expected.value, expected.tolerance) << row.l << " " << row.iterations;
    }
  }
}

TEST(OptimalCubic, ComposedHasThePublishedErrors) {
  const OptimalError rows[] = {{1e-1, 2, ".307"},    {1e-1, 4, "3.94e-3"}, {1e-2, 5, ".156"},
                               {1e-2, 7, "2.55e-4"}, {1e-3, 6, ".568"},    {1e-3, 9, "2.17e-3"},
                               {1e-4, 10, ".119"},   {1e-4, 12, "8.56e-5"}};
  for (const OptimalError& row : rows) {
    std::vector<Quintic> iterations;
    double l = row.l;
    double u = 1;
    for (int i = 0; i < row.iterations; ++i) {
      iterations.push_back(optimal_cubic(l, u));
      l = iterations.back()(l);
      u = 2 - l;
    }
    const Printed expected(row.printed);
    EXPECT_NEAR(worst(iterations, row.l), expected.value, expected.tolerance)
        << row.l << " " << row.iterations;
  }
}

TEST(OptimalComposition, KeepsTheTheoremsBound) {
  for (const double l : {0.5, 0.3, 1e-1, 1e-2, 1e-3}) {
    for (int t = 1; t <= 6; ++t) {
      const double bound = std::pow(1 - l * l, std::pow(3, t));
      // 1e-14 is the rounding of the evaluation.
      EXPECT_LE(worst(optimal_composition(l, t, 0), l), bound + 1e-14) << l << " " << t;
    }
  }
}

TEST(IterationsFor, IsTheSmallestNumberInThePublishedTable) {
  EXPECT_EQ(iterations_for(1e-1, 0.46), 1);
  EXPECT_EQ(iterations_for(1e-1, 0.45), 2);
  EXPECT_EQ(iterations_for(1e-2, 0.0126), 4);
  EXPECT_EQ(iterations_for(1e-2, 0.0124), 5);
  EXPECT_EQ(iterations_for(1e-3, 0.114), 5);
  EXPECT_EQ(iterations_for(1e-3, 0.112), 6);
  EXPECT_EQ(iterations_for(1e-5, 3.35e-3), 9);
  EXPECT_EQ(iterations_for(1e-3, -1), 64);  // no number is enough: the cap
}

}  // namespace
}  // namespace orthrus::kernels
