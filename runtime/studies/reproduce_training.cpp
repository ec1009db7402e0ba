// Experiments that train a small network: minutes, not seconds.
#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <string>

#include "runtime/studies/dense.hpp"
#include "runtime/studies/random.hpp"
#include "runtime/studies/reproduce.hpp"

namespace orthrus::studies {
namespace {

/// ‖A‖_op² by power iterations on AAᵀ, from where the last call ended: activations drift slowly,
/// and their largest singular value stands apart.
class OperatorNorm {
 public:
  double squared(const Matrix& a) {
    if (v_.values.empty()) v_ = Matrix(a.rows, 1);
    if (dot(v_, v_) == 0) std::fill(v_.values.begin(), v_.values.end(), 1.0);
    double last = 0;
    for (int k = 0; k < 1000; ++k) {
      const double length = frobenius(v_);
      for (double& x : v_.values) x /= length;
      v_ = product(a, product(a, v_, Op::transpose));
      const double value = frobenius(v_);
      if (std::abs(value - last) <= 1e-12 * value) return value;
      last = value;
    }
    return last;
  }

 private:
  Matrix v_;
};

/// f(x) = W₄φ(W₃φ(W₂φ(W₁x))), φ(t) = max(t, 0)², on y = x₁x₂x₃ of `samples` Gaussian x; loss
/// ‖f − y‖²/(2·samples), all of them in every step.
class SparseRegression {
 public:
  static constexpr Index samples = 512;
  static constexpr int layers = 4;

  SparseRegression(Index inputs, Index width, std::uint64_t seed) : target_(1, samples) {
    Random random(seed);
    Matrix x(inputs, samples);
    for (double& v : x.values) v = random.normal();
    for (Index j = 0; j < samples; ++j) target_(0, j) = x(0, j) * x(1, j) * x(2, j);
    activations_[0] = std::move(x);
    const std::array<Index, layers + 1> sizes{inputs, width, width, width, 1};
    for (std::size_t l = 0; l < layers; ++l) {
      weights_[l] = Matrix(sizes[l + 1], sizes[l]);
      const double bound = 1 / std::sqrt(static_cast<double>(sizes[l]));
      for (double& v : weights_[l].values) v = bound * (2 * random.uniform() - 1);
    }
  }

  /// One step, of length `kappa` over each layer's curvature: n/‖A‖_op²·G, or where `spectral`, in
  /// the second and the third layer, (n/‖A‖_F²)·‖G‖_*·polar(G). @return the loss before it.
  double step(bool spectral, double kappa) {
    for (std::size_t l = 0; l < layers; ++l) {
      Matrix h = product(weights_[l], activations_[l]);
      if (l + 1 == layers) {
        activations_[layers] = std::move(h);
        break;
      }
      for (double& v : h.values) v = std::max(v, 0.0);
      slopes_[l] = h;  // φ' = 2·max(t, 0)
      for (double& v : h.values) v *= v;
      activations_[l + 1] = std::move(h);
    }
    constexpr auto n = static_cast<double>(samples);
    Matrix back = activations_[layers];
    add(back, -1, target_);
    const double loss = dot(back, back) / (2 * n);
    for (double& v : back.values) v /= n;
    std::array<Matrix, layers> gradients;
    for (std::size_t l = layers; l-- > 0;) {
      gradients[l] = product(back, activations_[l], Op::none, Op::transpose);
      if (l == 0) break;
      back = product(weights_[l], back, Op::transpose);
      for (std::size_t i = 0; i < back.values.size(); ++i) {
        back.values[i] *= 2 * slopes_[l - 1].values[i];
      }
    }
    for (std::size_t l = 0; l < layers; ++l) {
      const Matrix& a = activations_[l];
      const double total = dot(a, a);
      const double top = norms_[l].squared(a);
      if (l > 0) stable_ranks_[l - 1] = total / top;
      if (spectral && (l == 1 || l == 2)) {
        const Svd f = svd(gradients[l]);
        const double nuclear = std::accumulate(f.s.begin(), f.s.end(), 0.0);
        add(weights_[l], -kappa * n / total * nuclear, product(f.u, f.vt));
      } else {
        add(weights_[l], -kappa * n / top, gradients[l]);
      }
    }
    return loss;
  }

  /// Of the activations of the last step, those of hidden layers.
  [[nodiscard]] const std::array<double, layers - 1>& stable_ranks() const { return stable_ranks_; }

 private:
  Matrix target_;
  std::array<Matrix, layers> weights_;
  std::array<Matrix, layers + 1> activations_;
  std::array<Matrix, layers - 1> slopes_;
  std::array<OperatorNorm, layers> norms_;
  std::array<double, layers - 1> stable_ranks_{};
};

/// Over `seeds` networks, an odd number: some lie at the edge of stability, where a loss that has
/// fallen comes back for a while.
/// @param share  of gradient descent's loss that the spectral one's is at most, at step 250.
std::vector<Row> sparse_regression(int inputs, int width, int seeds, double share) {
  constexpr int steps = 250;
  std::array<double, 2> ranks{};
  std::vector<double> losses, shares;
  for (std::uint64_t seed = 1; seed <= static_cast<std::uint64_t>(seeds); ++seed) {
    std::array<double, 2> loss{};
    for (const std::size_t spectral : {0, 1}) {
      for (const SparseRegressionStep& step :
           sparse_regression_run(inputs, width, seed, spectral == 1, steps + 1)) {
        loss[spectral] = step.loss;
        ranks[spectral] = std::max(
            ranks[spectral], *std::max_element(step.stable_ranks.begin(), step.stable_ranks.end()));
      }
    }
    losses.push_back(loss[0]);
    shares.push_back(loss[1] / loss[0]);
  }
  const auto median = [](std::vector<double>& values) {
    const auto middle = values.begin() + std::ssize(values) / 2;
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
  };
  // E φ²/(E φ)² of a Gaussian is 6; the rest is what training does.
  return {
      at_most("largest stable rank of activations, gradient descent", ranks[0], 6.5),
      at_most("largest stable rank of activations, spectral descent", ranks[1], 6.5),
      at_most("loss of gradient descent at step 250, of 0.5 or so before", median(losses), 0.25),
      at_most("loss of spectral descent over gradient descent's at step 250", median(shares),
              share)};
}

}  // namespace

std::vector<SparseRegressionStep> sparse_regression_run(int inputs, int width, std::uint64_t seed,
                                                        bool spectral, int steps) {
  SparseRegression network(inputs, width, seed);
  std::vector<SparseRegressionStep> out;
  for (int t = 0; t < steps; ++t) {
    const double loss = network.step(spectral, spectral ? 0.1 : 0.081);
    out.push_back({loss, network.stable_ranks()});
  }
  return out;
}

std::vector<Row> sparse_regression_small() { return sparse_regression(64, 256, 3, 0.1); }
// The figures read a thousandth, of one network; here it is 3e-3 to 0.2, by seed.
std::vector<Row> sparse_regression_full() { return sparse_regression(128, 512, 3, 0.05); }

}  // namespace orthrus::studies
