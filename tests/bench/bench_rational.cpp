// The rational msign beside five quintics, on Gaussian matrices, one core.
//
//   OMP_NUM_THREADS=1 bench_rational [--shapes 768x768,768x3072] [--repeats 7]
//
// With more threads its terms run side by side, and `rational_3_in_turns` is what it would be if
// they took turns, each with all threads in its products.
//
// One JSON line per shape: median and spread of each method in ms, the methods taking turns so that
// all of them see the same machine, and max |uᵢᵀOvᵢ − 1| over the singular values of at least 2e-3
// and 5e-3 of the largest. A last line times the parts.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/coefficients.hpp"
#include "kernels/msign.hpp"
#include "kernels/rational_msign.hpp"

extern "C" void dsyevd_(const char*, const char*, const int*, double*, const int*, double*, double*,
                        const int*, int*, const int*, int*);

namespace {

using namespace orthrus;
using namespace orthrus::kernels;
using Clock = std::chrono::steady_clock;

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

double spread(const std::vector<double>& v) {
  const auto [least, most] = std::minmax_element(v.begin(), v.end());
  return (*most - *least) / median(v);
}

double elapsed(const std::function<void()>& f) {
  const auto start = Clock::now();
  f();
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

/// U and σ of a wide X, from XXᵀ in f64: σ keeps 8 digits at 1e-4 of the largest.
struct LeftFactors {
  LeftFactors(const std::vector<float>& x, Index m, Index n, Backend& backend)
      : m_(m), n_(n), wide_(x.begin(), x.end()), u_(static_cast<std::size_t>(m * m)) {
    backend.syrk(1, matrix_view(wide_.data(), m, n), Transpose::no, 0,
                 matrix_view(u_.data(), m, m));
    const int side = static_cast<int>(m);
    int info = 0;
    std::vector<double> work(static_cast<std::size_t>(1 + 6 * m + 2 * m * m));
    std::vector<int> integers(static_cast<std::size_t>(3 + 5 * m));
    const int work_size = static_cast<int>(work.size());
    const int integers_size = static_cast<int>(integers.size());
    sigma_.resize(static_cast<std::size_t>(m));
    dsyevd_("V", "U", &side, u_.data(), &side, sigma_.data(), work.data(), &work_size,
            integers.data(), &integers_size, &info);
    if (info != 0) std::abort();
    for (double& s : sigma_) s = std::sqrt(std::max(s, 0.0));
  }
  /// max |uᵢᵀOvᵢ − 1| over σᵢ ≥ l·σ_max, with vᵢ = Xᵀuᵢ/σᵢ.
  double error(const std::vector<float>& o, double l, Backend& backend) const {
    std::vector<double> wide(o.begin(), o.end());
    std::vector<double> a(static_cast<std::size_t>(m_ * m_));
    std::vector<double> b(a.size());
    backend.gemm(1, matrix_view(wide.data(), m_, n_), Transpose::no,
                 matrix_view(wide_.data(), m_, n_), Transpose::yes, 0,
                 matrix_view(a.data(), m_, m_));
    // Rows of u_ are the eigenvectors: LAPACK counts by columns.
    backend.gemm(1, matrix_view(u_.data(), m_, m_), Transpose::no, matrix_view(a.data(), m_, m_),
                 Transpose::no, 0, matrix_view(b.data(), m_, m_));
    double worst = 0;
    for (Index i = 0; i < m_; ++i) {
      const double sigma = sigma_[static_cast<std::size_t>(i)];
      if (sigma < l * sigma_.back()) continue;
      double d = 0;
      for (Index j = 0; j < m_; ++j) {
        const auto at = static_cast<std::size_t>(i * m_ + j);
        d += b[at] * u_[at];
      }
      worst = std::max(worst, std::abs(d / sigma - 1));
    }
    return worst;
  }

 private:
  Index m_, n_;
  std::vector<double> wide_, u_, sigma_;
};

int run(int argc, char** argv) {
  std::string shapes = "768x768,768x2304,768x3072,1024x4096";
  int repeats = 7;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string key = argv[i];
    if (key == "--shapes") shapes = argv[i + 1];
    if (key == "--repeats") repeats = std::atoi(argv[i + 1]);
  }
  const auto backend = open_backend("cpu");
  const std::vector<Quintic> jordan = first_iterations(*find_coefficients("jordan"), 5);
  const std::vector<Quintic> polar = first_iterations(*find_coefficients("polar_express_101"), 5);
  const RationalSign three = rational_sign(2e-3, 3);
  const RationalSign two = rational_sign(5e-3, 2);

  std::stringstream list(shapes);
  for (std::string shape; std::getline(list, shape, ',');) {
    const Index m = std::stoll(shape);
    const Index n = std::stoll(shape.substr(shape.find('x') + 1));
    std::mt19937_64 bits(1);
    std::normal_distribution<float> normal;
    std::vector<float> original(static_cast<std::size_t>(m * n));
    for (float& v : original) v = normal(bits);
    std::vector<float> x = original;
    const MatrixView view = matrix_view(x.data(), m, n);
    std::vector<std::byte> work(
        std::max(msign_workspace_bytes(m, n, DType::f32, {DType::bf16, EpsMode::none, 0}),
                 msign_workspace_bytes(m, n, DType::f32, {})) +
        rational_msign_workspace_bytes(m, n, backend->tasks_at_once()));

    const auto quintics = [&](const std::vector<Quintic>& p, DType dtype) {
      return [&, dtype] { msign(view, p, 1.01, {dtype, EpsMode::none, 0}, work, *backend); };
    };
    const auto rational = [&](const RationalSign& f, DType gram) {
      return [&, gram] { rational_msign(view, f, {gram}, work, *backend); };
    };
    const std::span<std::byte> one_term(work.data(), rational_msign_workspace_bytes(m, n));
    std::vector<std::pair<const char*, std::function<void()>>> methods = {
        {"jordan_f32", quintics(jordan, DType::f32)},
        {"jordan_bf16", quintics(jordan, DType::bf16)},
        {"polar_express_bf16", quintics(polar, DType::bf16)},
        {"rational_3_f32", rational(three, DType::f32)},
        {"rational_3_bf16", rational(three, DType::bf16)},
        {"rational_2_f32", rational(two, DType::f32)},
        {"rational_2_bf16", rational(two, DType::bf16)}};
    if (backend->tasks_at_once() > 1) {
      methods.emplace_back("rational_3_in_turns",
                           [&] { rational_msign(view, three, {DType::f32}, one_term, *backend); });
      methods.emplace_back("rational_2_in_turns",
                           [&] { rational_msign(view, two, {DType::f32}, one_term, *backend); });
    }
    std::vector<std::vector<double>> ms(methods.size());
    std::vector<std::vector<float>> results(methods.size());
    for (int repeat = -1; repeat < repeats; ++repeat) {
      for (std::size_t i = 0; i < methods.size(); ++i) {
        x = original;
        const double t = elapsed(methods[i].second);
        if (repeat >= 0) ms[i].push_back(t);
        if (repeat < 0) results[i] = x;
      }
    }
    const LeftFactors factors(original, m, n, *backend);
    nlohmann::ordered_json line{{"shape", shape}, {"repeats", repeats}};
    for (std::size_t i = 0; i < methods.size(); ++i) {
      line[methods[i].first] = {{"ms", median(ms[i])},
                                {"spread", spread(ms[i])},
                                {"error_2e-3", factors.error(results[i], 2e-3, *backend)},
                                {"error_5e-3", factors.error(results[i], 5e-3, *backend)}};
    }

    // The parts of rational_3, on the same data.
    std::vector<float> r(static_cast<std::size_t>(m * m));
    std::vector<float> k(r.size());
    const MatrixView rv = matrix_view(r.data(), m, m);
    const MatrixView kv = matrix_view(k.data(), m, m);
    std::vector<BFloat16> half(x.size());
    const MatrixView hv = matrix_view(half.data(), m, n);
    std::vector<float> o(x.size());
    x = original;
    backend->convert(view, 1, hv);
    backend->syrk(1, view, Transpose::no, 0, rv);
    const double s2 = rational_scale(rv, work, *backend);
    const std::vector<std::pair<const char*, std::function<void()>>> parts = {
        {"syrk_f32", [&] { backend->syrk(1, view, Transpose::no, 0, kv); }},
        {"syrk_bf16_to_f32", [&] { backend->syrk(1, hv, Transpose::no, 0, kv); }},
        {"scale", [&] { rational_scale(rv, work, *backend); }},
        {"term", [&] { rational_term(rv, s2, three, 0, kv, *backend); }},
        {"gram", [&] { rational_gram(rv, three, kv, work, *backend); }},
        {"gram_in_turns",
         [&] {
           rational_gram(rv, three, kv, {work.data(), rational_gram_workspace_bytes(m)}, *backend);
         }},
        {"apply_f32", [&] {
           backend->gemm(1, kv, Transpose::no, view, Transpose::no, 0, matrix_view(o.data(), m, n));
         }}};
    for (const auto& [name, part] : parts) {
      std::vector<double> t;
      for (int repeat = -1; repeat < repeats; ++repeat) {
        const double now = elapsed(part);
        if (repeat >= 0) t.push_back(now);
      }
      line["parts_ms"][name] = median(t);
    }
    std::printf("%s\n", line.dump().c_str());
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv); }
