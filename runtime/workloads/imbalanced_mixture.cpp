#include <algorithm>
#include <cmath>

#include "analytic.hpp"
#include "one_matrix.hpp"
#include "options.hpp"

namespace orthrus::workloads {
namespace {

double dot(std::span<const double> a, std::span<const double> b) {
  double sum = 0;
  for (std::size_t e = 0; e < a.size(); ++e) sum += a[e] * b[e];
  return sum;
}

class ImbalancedMixture final : public OneMatrix {
 public:
  explicit ImbalancedMixture(const Config& config) : OneMatrix(config, "linear.weight") {
    Options options(config, "workload", config.workload_values);
    const std::int64_t classes = options.integer("classes", 10, 2, 1024);
    const std::int64_t inputs = options.integer("inputs", 64, 2, 4096);
    noise_ = options.number("noise", 0.2, 0, 1e3);
    const double imbalance = options.number("imbalance", 20, 1, 1e6);
    samples_ = options.integer("samples", 2000, 0, 1 << 20);
    tests_ = options.integer("tests", 200, 1, 1 << 16);
    options.done();
    Options(config, "data", config.data).done();
    if (classes > inputs)
      options.refuse("classes", "more than inputs: no room for orthogonal means");
    shape(classes, inputs);
    if (samples_ > 0) order_ = Epochs(seed(), samples_);

    double sum = 0;
    for (std::int64_t c = 0; c < classes; ++c) {
      prior_.push_back(
          std::pow(imbalance, -static_cast<double>(c) / static_cast<double>(classes - 1)));
      sum += prior_.back();
    }
    for (double& p : prior_) p /= sum;
    draw_means();
    x_.resize(static_cast<std::size_t>(inputs));
  }

  [[nodiscard]] std::int64_t training_units() const override { return samples_; }

 private:
  /// Gaussian rows, made orthonormal one by one; twice, as once leaves what rounding did.
  void draw_means() {
    means_ = gaussian(Draws(seed(), Purpose::target), rows(), cols(), 1);
    for (std::int64_t c = 0; c < rows(); ++c) {
      const std::span<double> row = mean(c);
      for (int pass = 0; pass < 2; ++pass) {
        for (std::int64_t b = 0; b < c; ++b) {
          const std::span<const double> before = mean(b);
          const double along = dot(row, before);
          for (std::size_t e = 0; e < row.size(); ++e) row[e] -= along * before[e];
        }
        const double length = std::sqrt(dot(row, row));
        for (double& v : row) v /= length;
      }
    }
  }

  /// x ← the class's mean and noise; draw 0 was the class's.
  void draw(const Draws& draws, std::int64_t c) {
    const std::span<const double> center = mean(c);
    for (std::size_t e = 0; e < x_.size(); ++e) {
      x_[e] = center[e] + noise_ * draws.normal(static_cast<std::int64_t>(e) + 1);
    }
  }

  [[nodiscard]] std::int64_t draw_class(const Draws& draws) const {
    double u = draws.uniform(0);
    std::int64_t c = 0;
    for (; c + 1 < rows() && u > prior(c); ++c) u -= prior(c);
    return c;
  }

  double add_unit(std::int64_t unit, std::span<double> sum) override {
    const Draws draws = samples_ > 0 ? Draws(seed(), Purpose::measurements, {order_(unit)})
                                     : Draws(seed(), Purpose::noise, {unit});
    const std::int64_t truth = draw_class(draws);
    draw(draws, truth);
    double loss = 0;
    double* g = sum.data();
    for (std::int64_t c = 0; c < rows(); ++c, g += cols()) {
      const double r = score(c, x_) - (c == truth ? 1 : 0);
      for (std::size_t e = 0; e < x_.size(); ++e) g[e] += r * x_[e];
      loss += 0.5 * r * r;
    }
    return loss;
  }

  std::map<std::string, double> metrics() override {
    double squares = 0;
    for (std::int64_t c = 0; c < rows(); ++c) {
      for (std::int64_t j = 0; j < cols(); ++j) squares += at(c, j) * at(c, j);
    }
    // A class's expected loss: of its mean, and what the noise adds.
    double balanced = 0, by_prior = 0;
    for (std::int64_t truth = 0; truth < rows(); ++truth) {
      double loss = 0.5 * noise_ * noise_ * squares;
      for (std::int64_t c = 0; c < rows(); ++c) {
        const double r = score(c, mean(truth)) - (c == truth ? 1 : 0);
        loss += 0.5 * r * r;
      }
      balanced += loss / static_cast<double>(rows());
      by_prior += loss * prior(truth);
    }
    const std::int64_t rare = std::min<std::int64_t>(3, rows());
    std::vector<std::int64_t> right(static_cast<std::size_t>(rows()));
    for (std::int64_t i = 0; i < rows() * tests_; ++i) {
      const std::int64_t truth = i / tests_;
      draw(Draws(seed(), Purpose::held_out, {truth, i % tests_}), truth);
      std::int64_t best = 0;
      double highest = score(0, x_);
      for (std::int64_t c = 1; c < rows(); ++c) {
        const double s = score(c, x_);
        if (s > highest) {
          highest = s;
          best = c;
        }
      }
      if (best == truth) ++right[static_cast<std::size_t>(truth)];
    }
    std::map<std::string, double> all{{"val_loss", balanced},
                                      {"prior_loss", by_prior},
                                      {"majority_learnt", learnt(0)},
                                      {"minority_learnt", learnt(rows() - 1)}};
    for (std::int64_t c = 0; c < rows(); ++c) {
      const double share =
          static_cast<double>(right[static_cast<std::size_t>(c)]) / static_cast<double>(tests_);
      all["class_" + std::to_string(c) + "_accuracy"] = share;
      all["val_accuracy"] += share / static_cast<double>(rows());
      if (c >= rows() - rare) all["rare_accuracy"] += share / static_cast<double>(rare);
    }
    return all;
  }

  /// Row c along its class's mean, as a share of what is optimal: p/(p + noise²).
  [[nodiscard]] double learnt(std::int64_t c) const {
    return score(c, mean(c)) * (prior(c) + noise_ * noise_) / prior(c);
  }
  [[nodiscard]] double score(std::int64_t c, std::span<const double> x) const {
    double sum = 0;
    for (std::int64_t j = 0; j < cols(); ++j) sum += at(c, j) * x[static_cast<std::size_t>(j)];
    return sum;
  }
  [[nodiscard]] double prior(std::int64_t c) const { return prior_[static_cast<std::size_t>(c)]; }
  [[nodiscard]] std::span<double> mean(std::int64_t c) {
    const auto n = static_cast<std::size_t>(cols());
    return std::span(means_).subspan(static_cast<std::size_t>(c) * n, n);
  }
  [[nodiscard]] std::span<const double> mean(std::int64_t c) const {
    const auto n = static_cast<std::size_t>(cols());
    return std::span(means_).subspan(static_cast<std::size_t>(c) * n, n);
  }

  double noise_ = 0;
  std::int64_t samples_ = 0, tests_ = 0;
  Epochs order_;
  std::vector<double> prior_, means_;
  std::vector<double> x_;  // of the unit at hand
};

}  // namespace

std::unique_ptr<Workload> open_imbalanced_mixture(const Config& config) {
  return std::make_unique<ImbalancedMixture>(config);
}

}  // namespace orthrus::workloads
