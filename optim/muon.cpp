// Muon: W ← (1 − ηλ)W − η·s·lmo(X), X the momentum (K. Jordan et al., 2024; with norm: sign,
// frobenius, row or column the same step in another norm, arXiv:2409.20325).
#include "optim/momentum.hpp"

namespace orthrus::optim {
namespace {

class Muon final : public MomentumRule {
 public:
  explicit Muon(const RuleConfig& c) : MomentumRule(Momentum(c)) {}

  [[nodiscard]] std::span<const StateSpec> state() const override { return kState; }

 private:
  static constexpr StateSpec kState[] = {{"momentum", StateSpec::Extent::elements}};
};

}  // namespace

RuleRow muon_row() {
  std::vector<RuleKey> keys = Momentum::keys(0.95, true, "ema");
  keys.insert(keys.begin(), {"lr", 0.02, 0, 1e6, "learning rate of U = s lmo(X)"});
  keys.push_back({"weight_decay", 0.0, 0, 1e6, "decoupled: W loses lr * weight_decay of itself"});
  return {"muon", "W <- (1-lr wd) W - lr s lmo(M); K. Jordan et al., 2024", std::move(keys),
          [](const RuleConfig& c) -> std::unique_ptr<Rule> { return std::make_unique<Muon>(c); },
          true};
}

}  // namespace orthrus::optim
