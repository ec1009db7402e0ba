// What the directions of PRISM and Shampoo cost on one core: a step's momentum and direction, in
// turns.
//
//   OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 bench_family [--repeats 7] [--only prism|both|shampoo]
//
// One JSON line per comparison: median and spread in ms of either side, their ratio, and the worst
// step beside the mean one.
//
//   prism    as Muon with the same LMO, in f32 and as `coefficients: auto, dtype: bf16`
//   both     the form that bidirectional_prism is defined by, with an n×n factor, its roots by
//            eigenvectors and by products, beside ours, which has no matrix of the long side
//   shampoo  and its relatives, roots every 10 steps (mean of 10), beside Muon by five published
//            quintics in plain f32 products: five times XXᵀ, its square, and a product with X
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/eigh.hpp"
#include "optim/lmo.hpp"
#include "optim/matrix_function.hpp"
#include "optim/rule.hpp"

namespace {

using namespace orthrus;
using namespace orthrus::optim;
using kernels::Backend;
using kernels::Transpose;
using Clock = std::chrono::steady_clock;

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}
double spread(const std::vector<double>& v) {
  const auto [least, most] = std::minmax_element(v.begin(), v.end());
  return (*most - *least) / median(v);
}

struct Matrix {
  Index rows, cols;
  std::vector<float> data;
  Matrix(Index r, Index c) : rows(r), cols(c), data(static_cast<std::size_t>(r * c)) {}
  MatrixView view() { return matrix_view(data.data(), rows, cols); }
};

Matrix gaussian(Index rows, Index cols, unsigned seed) {
  std::mt19937_64 bits(seed);
  std::normal_distribution<float> normal;
  Matrix x(rows, cols);
  for (float& v : x.data) v = normal(bits);
  return x;
}

/// A rule's steps on one matrix.
class Steps {
 public:
  Steps(const RuleConfig& rule, const LmoConfig& lmo, Index rows, Index cols, Backend& backend)
      : rule_(make_rule(rule)), lmo_(lmo), backend_(backend), x_(rows, cols), g_(rows, cols) {
    for (const StateSpec& s : rule_->state())
      states_.emplace_back(s.rows(rows, cols), s.cols(rows, cols));
    for (Matrix& s : states_) views_.push_back(s.view());
    work_.resize(64 + whole_matrix_workspace_bytes(matrix_rule(), lmo_, rows, cols));
    for (unsigned k = 0; k < 4; ++k) gradients_.push_back(gaussian(rows, cols, k));
  }
  void operator()() {
    x_.data = g_.data = gradients_[static_cast<std::size_t>(t_) % gradients_.size()].data;
    const StepScalars s{++t_, 0, 0};
    matrix_rule().accumulate({{}, x_.view(), views_, {}}, s, backend_);
    void* at = work_.data();
    std::size_t space = work_.size();
    std::align(64, space - 64, at, space);
    whole_matrix(matrix_rule(), lmo_, {x_.view(), g_.view(), views_}, s,
                 {static_cast<std::byte*>(at), work_.size() - 64}, backend_);
  }

 private:
  const MatrixRule& matrix_rule() const { return dynamic_cast<const MatrixRule&>(*rule_); }

  std::unique_ptr<Rule> rule_;
  Lmo lmo_;
  Backend& backend_;
  Matrix x_, g_;
  std::vector<Matrix> states_, gradients_;
  std::vector<MatrixView> views_;
  std::vector<std::byte> work_;
  std::int64_t t_ = 0;
};

/// Five times X ← aX + (bA + cA²)X with A = XXᵀ, by products that know no symmetry.
class PlainQuintics {
 public:
  PlainQuintics(Index rows, Index cols, Backend& backend)
      : backend_(backend),
        gradient_(gaussian(rows, cols, 1)),
        m_(rows, cols),
        x_(rows, cols),
        next_(rows, cols),
        a_(rows, rows),
        b_(rows, rows) {}
  void operator()() {
    x_.data = gradient_.data;
    backend_.momentum(0.95, 0.05, true, x_.view(), m_.view());
    backend_.convert(x_.view(), 1 / std::sqrt(backend_.sum_squares(x_.view())), x_.view());
    for (int i = 0; i < 5; ++i) {
      backend_.gemm(1, x_.view(), Transpose::no, x_.view(), Transpose::yes, 0, a_.view());
      backend_.convert(a_.view(), 1, b_.view());
      backend_.gemm(2.0315, a_.view(), Transpose::no, a_.view(), Transpose::no, -4.7750, b_.view());
      backend_.convert(x_.view(), 1, next_.view());
      backend_.gemm(1, b_.view(), Transpose::no, x_.view(), Transpose::no, 3.4445, next_.view());
      std::swap(x_, next_);
    }
  }

 private:
  Backend& backend_;
  Matrix gradient_, m_, x_, next_, a_, b_;
};

/// Bidirectional PRISM as it is written: both factors, both roots.
class DirectTwoSided {
 public:
  DirectTwoSided(Index rows, Index cols, Backend& backend)
      : backend_(backend),
        g_(gaussian(rows, cols, 1)),
        m_(gaussian(rows, cols, 2)),
        n_(rows, cols),
        between_(rows, cols),
        l_(rows, rows),
        r_(cols, cols) {
    const Index side = std::max(rows, cols);
    work_.resize(64 + std::max(kernels::spd_root_eigh_workspace_bytes(side),
                               kernels::spd_root_workspace_bytes(side, DType::f32, options())));
  }
  void operator()(bool by_products) {
    n_.data = g_.data;
    backend_.axpby(-1, m_.view(), 1, n_.view());
    for (const bool left : {true, false}) {
      const MatrixView p = left ? l_.view() : r_.view();
      const Transpose op = left ? Transpose::no : Transpose::yes;
      backend_.syrk(1, m_.view(), op, 0, p);
      backend_.syrk(1, n_.view(), op, 1, p);
      void* at = work_.data();
      std::size_t space = work_.size();
      std::align(64, space - 64, at, space);
      const std::span<std::byte> work(static_cast<std::byte*>(at), work_.size() - 64);
      if (by_products) {
        if (!kernels::spd_root(p, 1, options(), p, {}, work, backend_).ok()) std::abort();
      } else {
        kernels::spd_root_eigh(p, 0.25, {0, 1e-6, 0}, kernels::Eigenvalues::damp, p, {}, work,
                               backend_);
      }
    }
    backend_.gemm(1, l_.view(), Transpose::no, m_.view(), Transpose::no, 0, between_.view());
    backend_.gemm(1, between_.view(), Transpose::no, r_.view(), Transpose::no, 0, n_.view());
  }

 private:
  static kernels::RootOptions options() {
    kernels::RootOptions o;
    o.r = 4;
    o.damping = {0, 1e-6, 1e-6};
    return o;
  }
  Backend& backend_;
  Matrix g_, m_, n_, between_, l_, r_;
  std::vector<std::byte> work_;
};

using Way = std::pair<std::string, std::function<void()>>;

/// All ways in turns, each `steps` at a time; a line for each way beside the first.
void compare(const std::string& what, Index rows, Index cols, const std::vector<Way>& ways,
             int steps, int repeats, double bar) {
  std::vector<std::vector<double>> ms(ways.size());
  std::vector<double> worst(ways.size());
  for (int i = -1; i < repeats; ++i) {  // the first warms up: it holds a Shampoo's first roots
    for (std::size_t k = 0; k < ways.size(); ++k) {
      double sum = 0;
      for (int s = 0; s < steps; ++s) {
        const auto start = Clock::now();
        ways[k].second();
        const double one = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
        sum += one;
        if (i >= 0) worst[k] = std::max(worst[k], one);
      }
      if (i >= 0) ms[k].push_back(sum / steps);
    }
  }
  for (std::size_t k = 1; k < ways.size(); ++k) {
    const nlohmann::ordered_json line = {{"bench", what},
                                         {"shape", {rows, cols}},
                                         {"way", ways[k].first},
                                         {"ms", median(ms[k])},
                                         {"spread", spread(ms[k])},
                                         {"worst_ms", worst[k]},
                                         {"beside", ways[0].first},
                                         {"beside_ms", median(ms[0])},
                                         {"beside_spread", spread(ms[0])},
                                         {"ratio", median(ms[k]) / median(ms[0])},
                                         {"bar", bar}};
    std::printf("%s\n", line.dump().c_str());
    std::fflush(stdout);
  }
}

int run(int argc, char** argv) {
  int repeats = 7;
  std::string only;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string key = argv[i];
    if (key == "--repeats") repeats = std::atoi(argv[i + 1]);
    if (key == "--only") only = argv[i + 1];
  }
  const auto backend = kernels::open_backend("cpu");
  const auto way = [&](const std::string& name, Index rows, Index cols, const LmoConfig& lmo = {}) {
    const auto steps = std::make_shared<Steps>(RuleConfig{name, {}}, lmo, rows, cols, *backend);
    return Way{name, [steps] { (*steps)(); }};
  };
  for (const auto& [m, n] : {std::pair<Index, Index>{768, 768}, {768, 3072}}) {
    if (only.empty() || only == "prism") {
      compare("prism", m, n, {way("muon", m, n), way("prism", m, n)}, 1, repeats, 1.6);
      LmoConfig fast;
      fast.coefficients = "auto";
      fast.dtype = "bf16";
      compare("prism, auto, bf16", m, n, {way("muon", m, n, fast), way("prism", m, n, fast)}, 1,
              repeats, 1.6);
    }
    if (only.empty() || only == "shampoo") {
      const auto plain = std::make_shared<PlainQuintics>(m, n, *backend);
      compare("shampoo", m, n,
              {{"plain_quintics", [plain] { (*plain)(); }},
               way("shampoo", m, n),
               way("one_sided_shampoo", m, n),
               way("kl_shampoo", m, n),
               way("soap", m, n)},
              10, m == n ? repeats : std::min(repeats, 3), 1.5);
    }
  }
  if (only.empty() || only == "both") {
    const Index m = 768, n = 3072;
    const auto direct = std::make_shared<DirectTwoSided>(m, n, *backend);
    compare("both", m, n,
            {way("bidirectional_prism", m, n),
             {"direct_by_eigenvectors", [direct] { (*direct)(false); }},
             {"direct_by_products", [direct] { (*direct)(true); }}},
            1, std::min(repeats, 5), 3);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bench_family: %s\n", e.what());
    return 1;
  }
}
