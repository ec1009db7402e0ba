// The table of `orthrus bench accuracy` says what it means, and kernels/README.md says the same.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <map>
#include <regex>
#include <string>
#include <vector>

#include "kernels/backend.hpp"
#include "optim/lmo.hpp"
#include "runtime/cli/accuracy.hpp"

namespace orthrus::cli {
namespace {

SignMethod method_named(const std::string& name, int steps) {
  for (const SignMethod& m : sign_methods()) {
    if (m.name == name && m.steps == steps) return m;
  }
  ADD_FAILURE() << "no method " << name << " " << steps;
  return {};
}

std::vector<double> values_of(std::string_view spectrum, Index m) {
  for (const Spectrum& s : spectra()) {
    if (s.name == spectrum) return s.values(m);
  }
  ADD_FAILURE() << "no spectrum " << spectrum;
  return {};
}

TEST(Spectra, FallFromOneToWhatTheirNamesSay) {
  constexpr Index m = 64;
  for (const Spectrum& s : spectra()) {
    const std::vector<double> v = s.values(m);
    ASSERT_EQ(std::ssize(v), m) << s.name;
    EXPECT_TRUE(std::is_sorted(v.rbegin(), v.rend())) << s.name;
    // Of 64, the quarter circle's first is at a share of 1/128: 4θ³/3 = π/128, cos θ = 0.965.
    EXPECT_NEAR(v.front(), 1, 0.04) << s.name;
    EXPECT_GE(v.back(), 0) << s.name;
  }
  EXPECT_DOUBLE_EQ(values_of("i^-1/2", m).back(), 0.125);
  EXPECT_DOUBLE_EQ(values_of("1/i", m).back(), 1.0 / 64);
  EXPECT_NEAR(values_of("cond 1e4", m).back(), 1e-4, 1e-12);
  EXPECT_THAT(values_of("rank m/8", m), testing::Contains(0.0).Times(56));
  // A square Gaussian matrix: the mean of σ² is m for entries of variance 1, where σ₁² tends to 4m;
  // the middle σ of the quarter circle is 0.404 of the largest (θ − sin θ cos θ = π/4).
  const std::vector<double> gaussian = values_of("Gaussian", 4096);
  double squares = 0;
  for (const double v : gaussian) squares += v * v;
  EXPECT_NEAR(squares / 4096, 0.25, 1e-3);
  EXPECT_NEAR(gaussian[2048], 0.40397, 1e-3);
}

// The judge knows its factors: O = U·diag(g)·Vᵀ has exactly the errors |gᵢ − 1|.
TEST(Factors, JudgeWhatTheyAreGiven) {
  const auto backend = kernels::open_backend("reference");
  const Factors factors(8, 20);
  const std::vector<double> sigma = {1, 0.5, 0.1, 0.011, 0.006, 0.003, 1e-3, 0};
  const std::vector<double> result = {1.1, 0.8, 1, 1, 1.3, 0.6, 0.3, 0};
  const std::vector<float> o = factors.matrix(result, *backend);
  const SignError e = factors.error(o, sigma, *backend);
  constexpr double rounding = 1e-6;  // of O's entries to f32
  EXPECT_NEAR(e.above_1e2, 0.2, rounding);
  EXPECT_NEAR(e.above_5e3, 0.3, rounding);
  EXPECT_NEAR(e.above_2e3, 0.4, rounding);
  EXPECT_NEAR(e.largest, 1.3, rounding);
}

// In f32 a table leaves what its composed polynomial says, evaluated in f64 on each σ/ν.
class Accuracy : public testing::TestWithParam<const char*> {};

TEST_P(Accuracy, OfATableIsThatOfItsPolynomial) {
  constexpr Index m = 48;
  constexpr Index n = 96;
  const auto backend = kernels::open_backend("cpu");
  const Factors factors(m, n);
  const SignMethod method = method_named(GetParam(), 5);
  const optim::Lmo lmo(method.config);
  for (const Spectrum& spectrum : spectra()) {
    const std::vector<double> sigma = spectrum.values(m);
    double norm = 0;
    for (const double s : sigma) norm += s * s;
    norm = lmo.safety() * std::sqrt(norm);
    double expected = 0;
    for (const double s : sigma) {
      if (s < 5e-3 * sigma.front()) continue;
      double x = s / norm;
      for (const kernels::Quintic& p : lmo.iterations()) x = p(x);
      expected = std::max(expected, std::abs(x - 1));
    }
    const std::vector<float> x = factors.matrix(sigma, *backend);
    const SignError e = factors.error(run_sign(method.config, x, m, n, *backend), sigma, *backend);
    // Five iterations lift roundings of 6e-8 by the product of their slopes, 500 to 2,000.
    EXPECT_NEAR(e.above_5e3, expected, 5e-4) << spectrum.name;
    EXPECT_GE(e.above_2e3, e.above_5e3) << spectrum.name;
    EXPECT_GE(e.above_5e3, e.above_1e2) << spectrum.name;
  }
}
INSTANTIATE_TEST_SUITE_P(Tables, Accuracy,
                         testing::Values("jordan", "polar_express_101", "torch_pe10", "cubic5"));

// "| `jordan` | 5 | 0.071 / 0.085 | …": the cells of a row of the README, f32 before bf16.
using Rows = std::map<std::pair<std::string, int>, std::vector<std::string>>;
Rows readme_rows(std::vector<std::string>& spectra_there) {
  std::ifstream file(ORTHRUS_KERNELS_README);
  Rows rows;
  bool inside = false;
  for (std::string line; std::getline(file, line);) {
    if (line.find("<!-- accuracy") != std::string::npos) inside = true;
    if (line.find("<!-- end -->") != std::string::npos) inside = false;
    if (!inside || !line.starts_with("| ")) continue;
    std::vector<std::string> cells;
    std::size_t at = 2;
    for (std::size_t end; (end = line.find(" |", at)) != std::string::npos; at = end + 3) {
      cells.push_back(line.substr(at, end - at));
    }
    if (cells.size() < 3) continue;
    if (cells[0] == "coefficients") {
      spectra_there.assign(cells.begin() + 2, cells.end() - 1);
    } else {
      const std::string name = cells[0].substr(1, cells[0].size() - 2);
      rows[{name, std::atoi(cells[1].c_str())}] = {cells.begin() + 2, cells.end()};
    }
  }
  return rows;
}

// Rows whose errors are of the approximation, not of rounding: the same on every machine.
TEST(AccuracyTable, OfTheReadmeIsWhatTheCommandGives) {
  std::vector<std::string> columns;
  const Rows rows = readme_rows(columns);
  ASSERT_EQ(rows.size(), sign_methods().size()) << "regenerate the table: orthrus bench accuracy";
  ASSERT_EQ(std::ssize(columns), std::ssize(spectra()));
  constexpr Index m = 256;
  constexpr Index n = 1024;
  const auto backend = kernels::open_backend("cpu");
  const Factors factors(m, n);
  for (const auto& [name, steps] :
       {std::pair{"jordan", 5}, {"polar_express_101", 5}, {"torch_pe10", 5}, {"rational", 3}}) {
    ASSERT_TRUE(rows.contains({name, steps})) << name;
    const std::vector<std::string>& cells = rows.at({name, steps});
    const SignMethod method = method_named(name, steps);
    double largest = 0;
    for (std::size_t k = 0; k < columns.size(); ++k) {
      EXPECT_EQ(columns[k], spectra()[k].name);
      const std::vector<double> sigma = spectra()[k].values(m);
      const std::vector<float> x = factors.matrix(sigma, *backend);
      const auto error = [&](const char* dtype) {
        LmoConfig config = method.config;
        config.dtype = dtype;
        return factors.error(run_sign(config, x, m, n, *backend), sigma, *backend);
      };
      const SignError e = error("f32");
      largest = std::max(largest, e.largest);
      // Printed with two digits; sums in another order than on the machine that printed it move
      // an f32 result by less than one thousandth, a bf16 one (steps of 4e-3 at 1) by a few of its
      // steps.
      const double printed = std::atof(cells[k].c_str());
      EXPECT_NEAR(e.above_5e3, printed, 0.05 * printed + 1e-3) << name << " " << columns[k];
      const double narrow = std::atof(cells[k].substr(cells[k].find('/') + 1).c_str());
      EXPECT_NEAR(error("bf16").above_5e3, narrow, 0.05 * narrow + 0.02)
          << name << " " << columns[k] << " bf16";
    }
    EXPECT_NEAR(std::atof(cells.back().c_str()), largest, 0.006) << name;
  }
}

}  // namespace
}  // namespace orthrus::cli
