#include <algorithm>
#include <cmath>
#include <numbers>

#include "analytic.hpp"
#include "one_matrix.hpp"
#include "options.hpp"

namespace orthrus::workloads {
namespace {

/// a·bᵀ, where a is rows×inner and b is cols×inner.
std::vector<double> products(const std::vector<double>& a, const std::vector<double>& b,
                             std::int64_t inner) {
  std::vector<double> out;
  const auto k = static_cast<std::size_t>(inner);
  for (std::size_t i = 0; i < a.size(); i += k) {
    for (std::size_t j = 0; j < b.size(); j += k) {
      double sum = 0;
      for (std::size_t e = 0; e < k; ++e) sum += a[i + e] * b[j + e];
      out.push_back(sum);
    }
  }
  return out;
}

/// E relu(v·x)·relu(w·x) over x ~ N(0, I), of the squares and the product of v and w: the
/// arc-cosine kernel of degree 1, halved.
double relu_moment(double vv, double ww, double vw) {
  const double length = std::sqrt(vv * ww);
  if (length == 0) return 0;
  const double cosine = std::clamp(vw / length, -1.0, 1.0), angle = std::acos(cosine);
  return length * (std::sin(angle) + (std::numbers::pi - angle) * cosine) / (2 * std::numbers::pi);
}

class RandomFeatures final : public OneMatrix {
 public:
  explicit RandomFeatures(const Config& config) : OneMatrix(config, "readout.weight") {
    Options options(config, "workload", config.workload_values);
    const std::int64_t outputs = options.integer("outputs", 100, 1, 1024);
    const std::int64_t features = options.integer("features", 100, 1, 1024);
    const std::int64_t inputs = options.integer("inputs", 50, 1, 1024);
    samples_ = options.integer("samples", 400, 1, 1 << 16);
    relu_ = options.word("activation", "relu", {"relu", "gated_silu"}) == "relu";
    const bool teacher = options.word("target", "features", {"features", "teacher"}) == "teacher";
    options.done();
    Options(config, "data", config.data).done();
    if (teacher && !relu_)
      options.refuse("target", "a teacher has ReLU features: activation: relu");
    shape(outputs, features);
    order_ = Epochs(seed(), samples_);
    target_ = gaussian(Draws(seed(), Purpose::target), outputs, features,
                       1 / static_cast<double>(features));

    const auto projection = [&](std::int64_t which) {
      return gaussian(Draws(seed(), Purpose::weights, {which}), features, inputs,
                      1 / static_cast<double>(inputs));
    };
    const std::vector<double> v = projection(0);
    const std::vector<double> x =
        gaussian(Draws(seed(), Purpose::measurements), samples_, inputs, 1);
    activations_ = products(x, v, inputs);
    if (teacher) teach(x, projection(2), inputs);
    if (relu_) {
      for (double& a : activations_) a = std::max(a, 0.0);
      const std::vector<double> gram = products(v, v, inputs);
      const auto gram_at = [&](std::int64_t i, std::int64_t j) {
        return gram[static_cast<std::size_t>(i * features + j)];
      };
      for (std::int64_t i = 0; i < features; ++i) {
        for (std::int64_t j = 0; j < features; ++j) {
          moment_.push_back(relu_moment(gram_at(i, i), gram_at(j, j), gram_at(i, j)));
        }
      }
    } else {
      const std::vector<double> gate = products(x, projection(1), inputs);
      for (std::size_t e = 0; e < gate.size(); ++e) {
        activations_[e] *= gate[e] / (1 + std::exp(-activations_[e]));
      }
    }
    for (std::int64_t m = 0; m < samples_; ++m) {
      for (std::int64_t i = 0; i < outputs; ++i) {
        const double y = -residual(i, m);  // W = 0
        start_ += 0.5 * y * y / static_cast<double>(samples_);
      }
    }
  }

  [[nodiscard]] std::int64_t training_units() const override { return samples_; }

 private:
  /// Answers of a network with other features, which no readout of these has exactly.
  void teach(const std::vector<double>& x, const std::vector<double>& v, std::int64_t inputs) {
    std::vector<double> hidden = products(x, v, inputs);
    for (double& a : hidden) a = std::max(a, 0.0);
    answers_ = products(hidden, target_, cols());
    target_.assign(target_.size(), 0);
  }

  double add_unit(std::int64_t unit, std::span<double> sum) override {
    const std::int64_t m = order_(unit);
    const double* const a = sample(m);
    double loss = 0;
    double* g = sum.data();
    for (std::int64_t i = 0; i < rows(); ++i, g += cols()) {
      const double r = residual(i, m);
      for (std::int64_t j = 0; j < cols(); ++j) g[j] += r * a[j];
      loss += 0.5 * r * r;
    }
    return loss;
  }

  std::map<std::string, double> metrics() override {
    double loss = 0;
    for (std::int64_t m = 0; m < samples_; ++m) {
      for (std::int64_t i = 0; i < rows(); ++i) {
        const double r = residual(i, m);
        loss += 0.5 * r * r / static_cast<double>(samples_);
      }
    }
    std::map<std::string, double> all{{"val_loss", loss},
                                      {"relative_loss", start_ > 0 ? loss / start_ : 0}};
    if (relu_ && answers_.empty()) {
      double population = 0;
      for (std::int64_t i = 0; i < rows(); ++i) {
        for (std::int64_t j = 0; j < cols(); ++j) {
          population += 0.5 * off(i, j) * off(i, &moment_[static_cast<std::size_t>(j * cols())]);
        }
      }
      all["population_loss"] = population;
    }
    return all;
  }

  [[nodiscard]] const double* sample(std::int64_t m) const {
    return &activations_[static_cast<std::size_t>(m * cols())];
  }
  [[nodiscard]] double target(std::int64_t i, std::int64_t j) const {
    return target_[static_cast<std::size_t>(i * cols() + j)];
  }
  [[nodiscard]] double off(std::int64_t i, std::int64_t j) const { return at(i, j) - target(i, j); }
  /// Entry i of what W makes of sample m, beyond the answer.
  [[nodiscard]] double residual(std::int64_t i, std::int64_t m) const {
    const double answer = answers_.empty() ? 0 : answers_[static_cast<std::size_t>(m * rows() + i)];
    return off(i, sample(m)) - answer;
  }
  /// Entry i of (W − W♯)a.
  [[nodiscard]] double off(std::int64_t i, const double* a) const {
    double r = 0;
    for (std::int64_t j = 0; j < cols(); ++j) r += off(i, j) * a[j];
    return r;
  }

  std::int64_t samples_ = 0;
  bool relu_ = true;
  Epochs order_;
  double start_ = 0;
  std::vector<double> target_;       // W♯; of a teacher 0, as its answers are known
  std::vector<double> answers_;      // of a teacher, a sample per row
  std::vector<double> activations_;  // a sample per row
  std::vector<double> moment_;       // E aaᵀ, of ReLU
};

}  // namespace

std::unique_ptr<Workload> open_random_features(const Config& config) {
  return std::make_unique<RandomFeatures>(config);
}

}  // namespace orthrus::workloads
