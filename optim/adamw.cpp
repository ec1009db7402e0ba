// AdamW: decoupled weight decay, bias-corrected moments (arXiv:1711.05101).
#include <cmath>
#include <orthrus/error.hpp>

#include "kernels/backend.hpp"
#include "optim/rule.hpp"

namespace orthrus::optim {
namespace {

class AdamW final : public ElementwiseRule {
 public:
  explicit AdamW(const RuleConfig& c) {
    const auto& betas = c.numbers("betas");
    expects<ConfigError>(betas.size() == 2, "rule.betas must be two numbers");
    scalars_.beta1 = betas[0];
    scalars_.beta2 = betas[1];
    scalars_.eps = c.number("eps");
    scalars_.eps_before_correction = c.word("eps_placement") == "moonlight";
  }

  [[nodiscard]] std::span<const StateSpec> state() const override { return kState; }

  double update(const Piece& p, const StepScalars& s, kernels::Backend& backend) const override {
    return backend.adamw(of_step(s), p.gradient, p.state[0], p.state[1], p.weights);
  }
  // P = 1/(c₁D), D = √(v/c₂) + ε. The second moment never sees the error.
  void pull_back(const Piece& p, double kappa, MatrixView to, const StepScalars& s,
                 kernels::Backend& backend) const override {
    backend.adamw_pull_back(of_step(s), kappa, p.state[1], p.weights, to);
  }
  [[nodiscard]] std::optional<MomentumGain> gain() const override {
    if (scalars_.beta1 <= 0) return std::nullopt;
    return MomentumGain{scalars_.beta1, scalars_.beta1};
  }

 private:
  [[nodiscard]] kernels::AdamWScalars of_step(const StepScalars& s) const {
    kernels::AdamWScalars a = scalars_;
    const auto t = static_cast<double>(s.step);
    a.lr = s.lr;
    a.weight_decay = s.weight_decay;
    a.bias_correction1 = 1 - std::pow(a.beta1, t);
    a.bias_correction2 = 1 - std::pow(a.beta2, t);
    return a;
  }

  static constexpr StateSpec kState[] = {{"momentum", StateSpec::Extent::elements},
                                         {"second_moment", StateSpec::Extent::elements}};
  kernels::AdamWScalars scalars_;
};

}  // namespace

RuleRow adamw_row() {
  return {
      "adamw",
      "W <- (1-lr wd) W - lr m/(sqrt(v) + eps), bias-corrected; arXiv:1711.05101",
      {{"lr", 3e-4, 0, 1e6, "learning rate"},
       {"betas", std::vector<double>{0.9, 0.95}, 0, below_one, "decay of first and second moment"},
       {"eps", 1e-8, 0, 1, "added to the root of the second moment"},
       {"weight_decay", 0.0, 0, 1e6, "decoupled: W loses lr * weight_decay of itself"},
       {"eps_placement",
        std::string("torch"),
        0,
        0,
        "eps after (torch) or before (moonlight) the bias correction",
        {"torch", "moonlight"}}},
      [](const RuleConfig& c) -> std::unique_ptr<Rule> { return std::make_unique<AdamW>(c); },
      false};
}

}  // namespace orthrus::optim
