// SGD with momentum: X = M, or G + βM with Nesterov; W ← (1 − ηλ)W − ηX.
#include "optim/momentum.hpp"

namespace orthrus::optim {
namespace {

class Sgd final : public ElementwiseRule {
 public:
  explicit Sgd(const RuleConfig& c) : momentum_(c) {}

  [[nodiscard]] std::span<const StateSpec> state() const override { return kState; }
  [[nodiscard]] std::optional<MomentumGain> gain() const override { return momentum_.gain(); }

  double update(const Piece& p, const StepScalars& s, kernels::Backend& backend) const override {
    momentum_.accumulate(p.state[0], p.gradient, backend);
    return backend.decay_step(1 - s.lr * s.weight_decay, s.lr, p.gradient, p.weights);
  }
  // P = 1.
  void pull_back(const Piece& p, double kappa, MatrixView to, const StepScalars&,
                 kernels::Backend& backend) const override {
    backend.axpby(kappa, p.weights, 1, to);
  }

 private:
  static constexpr StateSpec kState[] = {{"momentum", StateSpec::Extent::elements}};
  Momentum momentum_;
};

}  // namespace

RuleRow sgd_row() {
  std::vector<RuleKey> keys = Momentum::keys(0.9, false, "heavy_ball");
  keys.insert(keys.begin(), {"lr", 0.1, 0, 1e6, "learning rate"});
  keys.push_back({"weight_decay", 0.0, 0, 1e6, "decoupled: W loses lr * weight_decay of itself"});
  return {"sgd", "M <- beta M + G; W <- (1-lr wd) W - lr M", std::move(keys),
          [](const RuleConfig& c) -> std::unique_ptr<Rule> { return std::make_unique<Sgd>(c); },
          false};
}

}  // namespace orthrus::optim
