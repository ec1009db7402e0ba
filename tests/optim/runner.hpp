#pragma once
/// @file
/// Runs one rule on one matrix, outside of any runtime.

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.hpp"
#include "optim/lmo.hpp"
#include "optim/matrix_function.hpp"
#include "optim/rule.hpp"
#include "support/zoo.hpp"

namespace orthrus::optim {

using zoo::Dense;
using zoo::Matrix;

/// One f32 update rounds a handful of times; 20 steps of it stay below this, relative to the
/// weights.
constexpr double f32_bound = 2e-6;

/// A rule on one matrix, step by step.
class Runner {
 public:
  Runner(RuleConfig rule, Matrix w, LmoConfig lmo = {})
      : rule_(make_rule(rule)),
        config_(with_defaults(std::move(rule))),
        lmo_(lmo),
        weights(zoo::cast<float>(w)) {
    for (const StateSpec& s : rule_->state()) {
      states_.emplace_back(s.rows(w.rows, w.cols), s.cols(w.rows, w.cols));
    }
    const auto* matrix = dynamic_cast<const MatrixRule*>(rule_.get());
    work_.resize(64 + (matrix != nullptr
                           ? std::max(whole_matrix_workspace_bytes(*matrix, lmo_, w.rows, w.cols),
                                      lmo_.workspace_bytes(w.rows, w.cols))
                           : rule_->workspace_bytes(w.rows, w.cols)));
  }

  double step(const Matrix& gradient) {
    Dense<float> g = zoo::cast<float>(gradient);
    std::vector<MatrixView> views;
    for (auto& s : states_) views.push_back(s.view());
    auto* at = work_.data() + (64 - reinterpret_cast<std::uintptr_t>(work_.data()) % 64) % 64;
    const std::span<std::byte> work(at, work_.size() - 64);
    const Piece piece{weights.view(), g.view(), views, work};
    const StepScalars s{++t_, config_.number("lr"), config_.number("weight_decay")};
    if (const auto* m = dynamic_cast<const MatrixRule*>(rule_.get())) {
      Dense<float> before = g;
      m->accumulate(piece, s, *backend_);
      direction = g;
      lmo_(direction.view(), work, *backend_);
      whole_matrix(*m, lmo_, {g.view(), before.view(), views}, s, work, *backend_);
      return m->apply(piece, lmo_.scale(g.rows, g.cols), s, *backend_);
    }
    return dynamic_cast<const ElementwiseRule&>(*rule_).update(piece, s, *backend_);
  }

  [[nodiscard]] const Dense<float>& state(std::size_t i) const { return states_[i]; }

 private:
  std::unique_ptr<Rule> rule_;
  RuleConfig config_;
  Lmo lmo_;
  std::unique_ptr<kernels::Backend> backend_ = kernels::open_backend("cpu");
  std::vector<Dense<float>> states_;
  std::vector<std::byte> work_;
  std::int64_t t_ = 0;

 public:
  Dense<float> weights;
  Dense<float> direction;  ///< what the LMO answered last, about X
};

inline RuleConfig rule(std::string name, std::map<std::string, Value> values = {}) {
  return {std::move(name), std::move(values)};
}

}  // namespace orthrus::optim
