#pragma once
/// @file
/// Momentum: M ← βM + (1−β)G (`ema`) or M ← βM + G (`heavy_ball`), and what the step looks at.

#include <optional>

#include "kernels/backend.hpp"
#include "optim/rule.hpp"

namespace orthrus::optim {

/// The two conventions differ by the factor 1 − β from the first step on: a scale-invariant LMO
/// sees no difference; SGD does.
struct Momentum {
  double beta = 0.95;
  bool nesterov = true;
  bool ema = true;

  explicit Momentum(const RuleConfig& c)
      : beta(c.number("momentum")),
        nesterov(c.flag("nesterov")),
        ema(c.word("momentum_form") == "ema") {}
  /// M ← βM + (1−β)G, and X = M.
  explicit Momentum(double decay) : beta(decay), nesterov(false) {}

  [[nodiscard]] double weight() const { return ema ? 1 - beta : 1; }

  /// M takes G in; G becomes X = M, or with Nesterov X = (1−β)G + βM (heavy_ball: G + βM).
  void accumulate(MatrixView m, MatrixView g, kernels::Backend& backend) const {
    backend.momentum(beta, weight(), nesterov, g, m);
  }
  /// G becomes X.
  void query(MatrixView m, MatrixView g, kernels::Backend& backend) const {
    if (nesterov) {
      backend.axpby(beta, m, weight(), g);
    } else {
      backend.axpby(1, m, 0, g);
    }
  }
  /// What is added to M is β of itself in the next M, and with Nesterov β² in the next X.
  [[nodiscard]] std::optional<MomentumGain> gain() const {
    if (beta <= 0) return std::nullopt;
    return MomentumGain{nesterov ? beta * beta : beta, beta};
  }
  /// ‖M‖ ≤ β·before + w‖G‖ = b, and ‖X‖ ≤ βb + w‖G‖ ≤ 2b.
  [[nodiscard]] double bound(double before, double gradient) const {
    return beta * before + weight() * gradient;
  }

  static std::vector<RuleKey> keys(double beta, bool nesterov, std::string form) {
    return {
        {"momentum", beta, 0, 1, "beta of the momentum"},
        {"nesterov", nesterov, 0, 0, "look one gradient ahead"},
        {"momentum_form",
         std::move(form),
         0,
         0,
         "M <- bM + (1-b)G (ema) or bM + G (heavy_ball)",
         {"ema", "heavy_ball"}},
    };
  }
};

/// A matrix rule whose X is of its momentum, the first of its states.
class MomentumRule : public MatrixRule {
 public:
  void accumulate(const Piece& p, const StepScalars&, kernels::Backend& backend) const final {
    momentum_.accumulate(p.state[0], p.gradient, backend);
  }
  void query(const Piece& p, kernels::Backend& backend) const final {
    momentum_.query(p.state[0], p.gradient, backend);
  }
  [[nodiscard]] std::optional<MomentumGain> gain() const final { return momentum_.gain(); }
  [[nodiscard]] double bound(double before, double gradient) const final {
    return momentum_.bound(before, gradient);
  }

 protected:
  explicit MomentumRule(const Momentum& momentum) : momentum_(momentum) {}

 private:
  Momentum momentum_;
};

}  // namespace orthrus::optim
