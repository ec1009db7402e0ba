// NorMuon: Muon whose rows are brought to equal size by a second moment per row, at the same
// Frobenius norm (arXiv:2510.05491).
#include <cmath>

#include "optim/momentum.hpp"

namespace orthrus::optim {
namespace {

class NorMuon final : public MomentumRule {
 public:
  explicit NorMuon(const RuleConfig& c)
      : MomentumRule(Momentum(c)),
        beta2_(c.number("beta2")),
        eps_(c.number("eps")),
        long_axis_(c.word("axis") == "long"),
        state_{StateSpec{"momentum", StateSpec::Extent::elements},
               StateSpec{"row_second_moment",
                         long_axis_ ? StateSpec::Extent::short_side : StateSpec::Extent::rows}} {}

  [[nodiscard]] std::span<const StateSpec> state() const override { return state_; }

  [[nodiscard]] Lines scaled_lines(Index rows, Index cols) const override {
    return long_axis_ && cols < rows ? Lines::columns : Lines::rows;
  }

  // c_i = mean_j O_ij²; v ← β₂v + (1−β₂)c; O'_i = O_i/(√v_i + ε); U = s·O'·‖O‖/‖O'‖. Both norms
  // follow from the line sums: no second pass over O.
  void line_factors(MatrixView state, Index length, std::span<double> sums) const override {
    auto* moment = static_cast<float*>(state.data);
    double before = 0;
    double after = 0;
    for (std::size_t i = 0; i < sums.size(); ++i) {
      const double sum = sums[i];
      moment[i] = static_cast<float>(beta2_ * moment[i] +
                                     (1 - beta2_) * (sum / static_cast<double>(length)));
      const double root = std::sqrt(static_cast<double>(moment[i])) + eps_;
      sums[i] = root > 0 ? 1 / root : 0;
      before += sum;
      after += sum * sums[i] * sums[i];
    }
    const double restore = after > 0 ? std::sqrt(before / after) : 0;
    for (double& factor : sums) factor *= restore;
  }

 private:
  double beta2_, eps_;
  bool long_axis_;
  StateSpec state_[2];
};

}  // namespace

RuleRow normuon_row() {
  std::vector<RuleKey> keys = Momentum::keys(0.95, true, "ema");
  keys.insert(keys.begin(), {"lr", 0.02, 0, 1e6, "learning rate of U"});
  keys.push_back({"weight_decay", 0.0, 0, 1e6, "decoupled: W loses lr * weight_decay of itself"});
  keys.push_back({"beta2", 0.95, 0, below_one, "decay of the second moment per line"});
  keys.push_back({"eps", 1e-10, 0, 1, "added to the root of the second moment"});
  keys.push_back({"axis",
                  std::string("rows"),
                  0,
                  0,
                  "one moment per row, or per line of the long side",
                  {"rows", "long"}});
  return {"normuon", "Muon with rows normalized by their second moment; arXiv:2510.05491",
          std::move(keys),
          [](const RuleConfig& c) -> std::unique_ptr<Rule> { return std::make_unique<NorMuon>(c); },
          true};
}

}  // namespace orthrus::optim
