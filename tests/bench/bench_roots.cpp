// Roots of positive definite matrices by products, beside LAPACK's eigenvectors, on one core.
//
//   OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 bench_roots [--sides 256,768,1024] [--repeats 7]
//   bench_roots --accuracy 256     the table of kernels/README.md
//
// One JSON line per side: median and spread of each method in ms, the methods taking turns so that
// all of them see the same machine.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/device_memory.hpp"
#include "kernels/eigh.hpp"
#include "kernels/spd_root.hpp"

extern "C" void ssyevd_(const char*, const char*, const int*, float*, const int*, float*, float*,
                        const int*, int*, const int*, int*);

namespace {

using namespace orthrus;
using namespace orthrus::kernels;
using Clock = std::chrono::steady_clock;

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

double elapsed(const std::function<void()>& f) {
  const auto start = Clock::now();
  f();
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

template <class T>
std::vector<T> square(Index m) {
  return std::vector<T>(static_cast<std::size_t>(m * m));
}

/// XXᵀ/n of a Gaussian X, m×n, in f64.
std::vector<double> wishart(Index m, Index n, Backend& backend) {
  std::mt19937_64 bits(1);
  std::normal_distribution<double> normal;
  std::vector<double> x(static_cast<std::size_t>(m * n));
  for (double& v : x) v = normal(bits);
  std::vector<double> p = square<double>(m);
  backend.syrk(1.0 / static_cast<double>(n), matrix_view(x.data(), m, n), Transpose::no, 0,
               matrix_view(p.data(), m, m));
  return p;
}

RootOptions options_of(int r, double lifted, double of_norm = 1e-5) {
  RootOptions options;
  options.r = r;
  options.lifted = lifted;
  options.damping.of_norm = of_norm;
  return options;
}

constexpr double f32_only = std::numeric_limits<double>::infinity();

// ---- time ---------------------------------------------------------------------------------------

void time_of(Index m, int repeats, Backend& backend) {
  const std::vector<double> exact = wishart(m, 4 * m, backend);
  std::vector<float> p(exact.begin(), exact.end());
  std::vector<float> out = square<float>(m);
  std::vector<float> other = square<float>(m);
  const ConstMatrixView view = matrix_view(std::as_const(p).data(), m, m);
  const MatrixView inverse = matrix_view(out.data(), m, m);
  const MatrixView root = matrix_view(other.data(), m, m);
  const DeviceBuffer work(backend,
                          std::max(spd_root_workspace_bytes(m, DType::f32, options_of(4, 256)),
                                   spd_root_eigh_workspace_bytes(m)));
  std::vector<float> lapack(static_cast<std::size_t>(1 + 6 * m + 2 * m * m));
  std::vector<int> integers(static_cast<std::size_t>(3 + 5 * m));
  std::vector<float> values(static_cast<std::size_t>(m));

  std::vector<std::pair<std::string, std::function<void()>>> methods;
  methods.emplace_back(
      "gemm_f32", [&] { backend.gemm(1, view, Transpose::no, view, Transpose::no, 0, inverse); });
  for (const int r : {1, 2, 4}) {
    for (const auto& [suffix, lifted] : {std::pair{"_f32", f32_only}, {"", 256.0}}) {
      const RootOptions options = options_of(r, lifted);
      methods.emplace_back("root" + std::to_string(r) + suffix, [&, options] {
        const RootReport report = spd_root(view, 1, options, inverse, {}, work.span(), backend);
        if (!report.ok()) std::abort();
      });
    }
  }
  methods.emplace_back("root4_both", [&] {
    static_cast<void>(spd_root(view, 1, options_of(4, 256), inverse, root, work.span(), backend));
  });
  methods.emplace_back("eigh", [&] {
    spd_root_eigh(view, 0.25, {}, Eigenvalues::damp, inverse, {}, work.span(), backend);
  });
  methods.emplace_back("ssyevd_alone", [&] {
    other = p;
    const int side = static_cast<int>(m);
    const int size = static_cast<int>(lapack.size());
    const int integers_size = static_cast<int>(integers.size());
    int info = 0;
    ssyevd_("V", "U", &side, other.data(), &side, values.data(), lapack.data(), &size,
            integers.data(), &integers_size, &info);
    if (info != 0) std::abort();
  });

  std::vector<std::vector<double>> times(methods.size());
  for (int i = -1; i < repeats; ++i) {
    for (std::size_t k = 0; k < methods.size(); ++k) {
      const double ms = elapsed(methods[k].second);
      if (i >= 0) times[k].push_back(ms);
    }
  }
  nlohmann::ordered_json line{{"side", m}, {"repeats", repeats}};
  for (std::size_t k = 0; k < methods.size(); ++k) {
    const auto [least, most] = std::minmax_element(times[k].begin(), times[k].end());
    line[methods[k].first] = {{"median_ms", median(times[k])},
                              {"least_ms", *least},
                              {"spread", (*most - *least) / median(times[k])}};
  }
  std::printf("%s\n", line.dump().c_str());
}

// ---- accuracy -----------------------------------------------------------------------------------

double relative_error(const std::vector<double>& actual, const std::vector<double>& expected) {
  double sum = 0;
  double norm = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    sum += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(sum / norm);
}

std::string text(double x) {
  std::array<char, 16> digits{};
  std::snprintf(digits.data(), digits.size(), "%.1e", x);
  return digits.data();
}

/// P^(−1/r) and P^(1/r) by `how`, both f64.
template <class T, class How>
std::pair<std::vector<double>, std::vector<double>> roots(const std::vector<T>& p, Index m,
                                                          How how) {
  std::vector<T> inverse = square<T>(m);
  std::vector<T> root = square<T>(m);
  how(matrix_view(p.data(), m, m), matrix_view(inverse.data(), m, m),
      matrix_view(root.data(), m, m));
  return {{inverse.begin(), inverse.end()}, {root.begin(), root.end()}};
}

/// Errors of a root beside the eigenvectors, in f64, of the same matrix of f32.
void accuracy_of(Index m, Backend& backend) {
  const DeviceBuffer work(backend,
                          std::max(spd_root_workspace_bytes(m, DType::f64, options_of(4, 256)),
                                   spd_root_eigh_workspace_bytes(m)));
  std::vector<double> vectors = square<double>(m);
  std::vector<double> values(static_cast<std::size_t>(m));
  eigh(matrix_view(wishart(m, m, backend).data(), m, m), matrix_view(vectors.data(), m, m), values,
       work.span(), backend);
  std::printf(
      "| condition | damping | r | steps (f64) | D^(-1/r): f32 | f64 first | f64 "
      "| D^(1/r): f32 | f64 first | f64 |\n|---|---|---|---|---|---|---|---|---|---|\n");
  for (const double condition : {1e2, 1e4, 1e6, 1e8}) {
    std::vector<double> scaled = vectors;
    for (Index i = 0; i < m; ++i) {
      const double root =
          std::pow(condition, -0.5 * static_cast<double>(i) / static_cast<double>(m - 1));
      for (Index j = 0; j < m; ++j) scaled[static_cast<std::size_t>(i * m + j)] *= root;
    }
    std::vector<double> exact = square<double>(m);
    backend.syrk(1, matrix_view(scaled.data(), m, m), Transpose::yes, 0,
                 matrix_view(exact.data(), m, m));
    const std::vector<float> p(exact.begin(), exact.end());
    const std::vector<double> wide(p.begin(), p.end());
    for (const double of_norm : {1e-5, 1e-6}) {
      if (of_norm < 1e-5 && condition < 1e6) continue;
      for (const int r : {1, 2, 4}) {
        const Damping damping{0, 0, of_norm};
        const auto expected = roots(wide, m, [&](auto from, auto inverse, auto root) {
          spd_root_eigh(from, 1.0 / r, damping, Eigenvalues::damp, inverse, root, work.span(),
                        backend);
        });
        RootReport report;
        const auto errors = [&](const auto& from, double lifted) {
          bool refused = false;
          const auto actual = roots(from, m, [&](auto view, auto inverse, auto root) {
            RootOptions options = options_of(r, lifted, of_norm);
            if (view.dtype == DType::f64) options.tolerance = 1e-12;
            const RootReport now = spd_root(view, 1, options, inverse, root, work.span(), backend);
            if (view.dtype == DType::f32) report = now;
            refused = !now.ok();
          });
          return std::pair{
              refused ? "refused" : text(relative_error(actual.first, expected.first)),
              refused ? "refused" : text(relative_error(actual.second, expected.second))};
        };
        const auto narrow = errors(p, f32_only);
        const auto mixed = errors(p, 256);
        const auto all = errors(wide, 256);
        std::printf("| %.0e | %.0e | %d | %d (%d) | %s | %s | %s | %s | %s | %s |\n", condition,
                    of_norm, r, report.steps, report.steps_f64, narrow.first.c_str(),
                    mixed.first.c_str(), all.first.c_str(), narrow.second.c_str(),
                    mixed.second.c_str(), all.second.c_str());
      }
    }
  }
}

int run(int argc, char** argv) {
  std::string sides = "256,768,1024";
  int repeats = 7;
  Index accuracy = 0;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string key = argv[i];
    if (key == "--sides") sides = argv[i + 1];
    if (key == "--repeats") repeats = std::atoi(argv[i + 1]);
    if (key == "--accuracy") accuracy = std::atoi(argv[i + 1]);
  }
  const auto backend = open_backend("cpu");
  if (accuracy > 0) {
    accuracy_of(accuracy, *backend);
    return 0;
  }
  std::stringstream list(sides);
  for (std::string side; std::getline(list, side, ',');) {
    time_of(std::stoll(side), repeats, *backend);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
