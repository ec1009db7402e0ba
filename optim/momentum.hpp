#pragma once
/// @file
/// Momentum: M ← βM + (1−β)G (`ema`) or M ← βM + G (`heavy_ball`), and what the step looks at.

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

  /// M takes G in; G becomes X = M, or with Nesterov X = (1−β)G + βM (heavy_ball: G + βM).
  void accumulate(MatrixView m, MatrixView g, kernels::Backend& backend) const {
    const double weight = ema ? 1 - beta : 1;
    backend.axpby(weight, g, beta, m);
    if (nesterov) {
      backend.axpby(beta, m, weight, g);
    } else {
      backend.axpby(1, m, 0, g);
    }
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

}  // namespace orthrus::optim
