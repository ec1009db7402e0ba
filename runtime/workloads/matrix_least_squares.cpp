#include <cmath>

#include "analytic.hpp"
#include "one_matrix.hpp"
#include "options.hpp"

namespace orthrus::workloads {
namespace {

class MatrixLeastSquares final : public OneMatrix {
 public:
  explicit MatrixLeastSquares(const Config& config) : OneMatrix(config, "matrix.weight") {
    Options options(config, "workload", config.workload_values);
    const std::int64_t m = options.integer("rows", 16, 1, 4096);
    const std::int64_t n = options.integer("cols", 16, 1, 4096);
    const double decay = options.number("decay", 1, 0, 10);
    noise_ = options.number("noise", 0.3, 0, 1e6);
    options.done();
    Options(config, "data", config.data).done();
    shape(m, n);
    target_ = gaussian(Draws(seed(), Purpose::target), m, n, 1 / static_cast<double>(n));
    for (std::int64_t j = 1; j <= n; ++j) {
      variance_.push_back(std::pow(static_cast<double>(j), -decay));
    }
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = 0; j < n; ++j)
        start_ += 0.5 * variance(j) * target(i, j) * target(i, j);
    }
    x_.resize(static_cast<std::size_t>(n));
  }

 private:
  double add_unit(std::int64_t unit, std::span<double> sum) override {
    const Draws draws(seed(), Purpose::noise, {unit});
    for (std::int64_t j = 0; j < cols(); ++j) {
      x_[static_cast<std::size_t>(j)] = std::sqrt(variance(j)) * draws.normal(j);
    }
    double loss = 0;
    double* g = sum.data();
    for (std::int64_t i = 0; i < rows(); ++i, g += cols()) {
      double r = -noise_ * draws.normal(cols() + i);
      for (std::int64_t j = 0; j < cols(); ++j) r += off(i, j) * x_[static_cast<std::size_t>(j)];
      for (std::int64_t j = 0; j < cols(); ++j) g[j] += r * x_[static_cast<std::size_t>(j)];
      loss += 0.5 * r * r;
    }
    return loss;
  }

  std::map<std::string, double> metrics() override {
    double loss = 0, squared = 0, inputs = 0;
    for (const double h : variance_) inputs += h;
    for (std::int64_t i = 0; i < rows(); ++i) {
      for (std::int64_t j = 0; j < cols(); ++j) {
        const double e = off(i, j), g = e * variance(j);
        loss += 0.5 * g * e;
        squared += g * g;
      }
    }
    // One unit's gradient is r·xᵀ, r and x Gaussian: by Isserlis' theorem the trace of its
    // covariance is E‖r‖²·E‖x‖² + ‖G‖².
    const double residual = 2 * loss + static_cast<double>(rows()) * noise_ * noise_;
    return {{"val_loss", loss},
            {"relative_loss", loss / start_},
            {"gradient_squared", squared},
            {"gradient_variance", residual * inputs + squared}};
  }

  [[nodiscard]] double variance(std::int64_t j) const {
    return variance_[static_cast<std::size_t>(j)];
  }
  [[nodiscard]] double target(std::int64_t i, std::int64_t j) const {
    return target_[static_cast<std::size_t>(i * cols() + j)];
  }
  [[nodiscard]] double off(std::int64_t i, std::int64_t j) const { return at(i, j) - target(i, j); }

  double noise_ = 0, start_ = 0;
  std::vector<double> target_, variance_;
  std::vector<double> x_;  // of the unit at hand
};

}  // namespace

std::unique_ptr<Workload> open_matrix_least_squares(const Config& config) {
  return std::make_unique<MatrixLeastSquares>(config);
}

}  // namespace orthrus::workloads
