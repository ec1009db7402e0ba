// Lion: the sign of an interpolation of momentum and gradient (arXiv:2302.06675).
#include <algorithm>
#include <orthrus/error.hpp>

#include "kernels/backend.hpp"
#include "optim/magnitude.hpp"
#include "optim/rule.hpp"

namespace orthrus::optim {
namespace {

class Lion final : public ElementwiseRule {
 public:
  explicit Lion(const RuleConfig& c) {
    const auto& betas = c.numbers("betas");
    expects<ConfigError>(betas.size() == 2, "rule.betas must be two numbers");
    beta1_ = betas[0];
    beta2_ = betas[1];
  }

  [[nodiscard]] std::span<const StateSpec> state() const override { return kState; }
  [[nodiscard]] std::size_t workspace_bytes(Index rows, Index cols) const override {
    return static_cast<std::size_t>(std::min(rows * cols, kRun)) *
           (sizeof(double) + 2 * sizeof(float));
  }

  // U = sign(β₁M + (1−β₁)G); M ← β₂M + (1−β₂)G; W ← (1−ηλ)W − ηU, in runs that stay in cache.
  double update(const Piece& p, const StepScalars& s, kernels::Backend& backend) const override {
    const Index n = p.weights.size();
    expects(p.weights.contiguous() && p.gradient.contiguous() && p.state[0].contiguous(),
            "element-wise pieces are dense");
    double sum = 0;
    for (Index at = 0; at < n; at += kRun) {
      const Index count = std::min(kRun, n - at);
      const auto run = [&](const MatrixView& v) { return run_of(v, at, count); };
      const MatrixView u = matrix_view(reinterpret_cast<float*>(p.work.data()), 1, count);
      backend.axpby(1, run(p.state[0]), 0, u);
      backend.axpby(1 - beta1_, run(p.gradient), beta1_, u);
      backend.sign(u, u);
      backend.axpby(1 - beta2_, run(p.gradient), beta2_, run(p.state[0]));
      sum += backend.decay_step(1 - s.lr * s.weight_decay, s.lr, u, run(p.weights));
    }
    return sum;
  }
  // U = X/|X|, element by element: P⁻¹ = |X|, of the X that `update` looked at.
  void pull_back(const Piece& p, double kappa, MatrixView to, const StepScalars&,
                 kernels::Backend& backend) const override {
    const Index n = p.weights.size();
    for (Index at = 0; at < n; at += kRun) {
      const Index count = std::min(kRun, n - at);
      auto* const wide = reinterpret_cast<double*>(p.work.data());
      const MatrixView x = matrix_view(reinterpret_cast<float*>(wide + count), 1, count);
      const MatrixView e = matrix_view(static_cast<float*>(x.data) + count, 1, count);
      const double of_momentum = beta1_ / beta2_;  // β₁M + (1−β₁)G, by the M that is there now
      backend.convert(run_of(p.gradient, at, count), 1 - beta1_ - of_momentum * (1 - beta2_), x);
      backend.axpby(of_momentum, run_of(p.state[0], at, count), 1, x);
      backend.convert(run_of(p.weights, at, count), kappa, e);
      multiply_by_magnitude(x, e, wide, backend);
      backend.axpby(1, e, 1, run_of(to, at, count));
    }
  }
  [[nodiscard]] bool is_linear() const override { return false; }
  // M keeps β₂ of itself, and X has β₁ of M.
  [[nodiscard]] std::optional<MomentumGain> gain() const override {
    if (beta1_ <= 0 || beta2_ <= 0) return std::nullopt;
    return MomentumGain{beta1_, beta2_};
  }

 private:
  static MatrixView run_of(const MatrixView& v, Index at, Index count) {
    return matrix_view(static_cast<float*>(v.data) + at, 1, count);
  }
  static constexpr StateSpec kState[] = {{"momentum", StateSpec::Extent::elements}};
  static constexpr Index kRun = 1 << 14;
  double beta1_ = 0.9, beta2_ = 0.99;
};

}  // namespace

RuleRow lion_row() {
  return {"lion",
          "U = sign(b1 M + (1-b1) G), M <- b2 M + (1-b2) G; arXiv:2302.06675",
          {{"lr", 1e-4, 0, 1e6, "learning rate"},
           {"betas", std::vector<double>{0.9, 0.99}, 0, 1, "weight of M in the update, decay of M"},
           {"weight_decay", 0.0, 0, 1e6, "decoupled: W loses lr * weight_decay of itself"}},
          [](const RuleConfig& c) -> std::unique_ptr<Rule> { return std::make_unique<Lion>(c); },
          false};
}

}  // namespace orthrus::optim
