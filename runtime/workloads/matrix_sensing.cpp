#include <algorithm>
#include <cmath>

#include "analytic.hpp"
#include "options.hpp"
#include "random.hpp"

namespace orthrus::workloads {
namespace {

/// Singular values of a small matrix, by one-sided Jacobi rotations.
std::vector<double> singular_values(std::vector<double> a, std::int64_t rows, std::int64_t cols) {
  const auto at = [&](std::int64_t i, std::int64_t j) -> double& {
    return a[static_cast<std::size_t>(i * cols + j)];
  };
  for (int sweep = 0; sweep < 60; ++sweep) {
    double worst = 0;
    for (std::int64_t p = 0; p < cols; ++p) {
      for (std::int64_t q = p + 1; q < cols; ++q) {
        double pp = 0, qq = 0, pq = 0;
        for (std::int64_t i = 0; i < rows; ++i) {
          pp += at(i, p) * at(i, p);
          qq += at(i, q) * at(i, q);
          pq += at(i, p) * at(i, q);
        }
        if (std::abs(pq) <= 1e-15 * std::sqrt(pp * qq) || pq == 0) continue;
        worst = std::max(worst, std::abs(pq) / std::sqrt(pp * qq));
        const double zeta = (qq - pp) / (2 * pq);
        const double t = std::copysign(1.0, zeta) / (std::abs(zeta) + std::hypot(1.0, zeta));
        const double c = 1 / std::hypot(1.0, t);
        for (std::int64_t i = 0; i < rows; ++i) {
          const double x = at(i, p), y = at(i, q);
          at(i, p) = c * (x - t * y);
          at(i, q) = c * (t * x + y);
        }
      }
    }
    if (worst < 1e-13) break;
  }
  std::vector<double> values;
  for (std::int64_t j = 0; j < cols; ++j) {
    double sum = 0;
    for (std::int64_t i = 0; i < rows; ++i) sum += at(i, j) * at(i, j);
    values.push_back(std::sqrt(sum));
  }
  return values;
}

class MatrixSensing final : public Workload {
 public:
  explicit MatrixSensing(const Config& config) : seed_(config.seed) {
    Options options(config, "workload", config.workload_values);
    rows_ = options.integer("rows", 10, 1, 1024);
    cols_ = options.integer("cols", 10, 1, 1024);
    count_ = options.integer("measurements", 50, 1, 1 << 20);
    order_ = Epochs(seed_, count_);
    const std::int64_t rank = options.integer("rank", 2, 1, 1024);
    options.done();
    if (rank > std::min(rows_, cols_)) options.refuse("rank", "more than min(rows, cols)");
    Options(config, "data", config.data).done();

    const std::int64_t size = rows_ * cols_;
    own_.assign(static_cast<std::size_t>(size), 0.0F);
    weights_ = own_;
    gradient_.assign(static_cast<std::size_t>(size), 0.0F);

    const Draws left(seed_, Purpose::target, {0}), right(seed_, Purpose::target, {1});
    target_.assign(static_cast<std::size_t>(size), 0.0);
    const double scale = 1 / std::sqrt(static_cast<double>(rank * cols_));
    for (std::int64_t i = 0; i < rows_; ++i) {
      for (std::int64_t j = 0; j < cols_; ++j) {
        double sum = 0;
        for (std::int64_t k = 0; k < rank; ++k) {
          sum += left.normal(i * rank + k) * right.normal(k * cols_ + j);
        }
        target_[static_cast<std::size_t>(i * cols_ + j)] = sum * scale;
      }
    }
    const double deviation = 1 / std::sqrt(static_cast<double>(count_));
    for (std::int64_t m = 0; m < count_; ++m) {
      const Draws draws(seed_, Purpose::measurements, {m});
      double y = 0;
      for (std::int64_t e = 0; e < size; ++e) {
        const double a = deviation * draws.normal(e);
        measurements_.push_back(a);
        y += a * target_[static_cast<std::size_t>(e)];
      }
      answers_.push_back(y);
    }
  }

  std::vector<Parameter> parameters() override {
    Parameter p;
    p.name = "matrix.weight";
    p.shape = {rows_, cols_};
    p.weights = weights_.data();
    p.gradient = gradient_.data();
    return {p};
  }

  void place_weights(int, void* data) override {
    weights_ = {static_cast<float*>(data), weights_.size()};
    own_ = {};
  }

  double gradient(const Slice& slice, const std::function<void(int)>& ready) override {
    std::vector<double> sum(weights_.size(), 0.0);
    double loss = 0;
    const auto n = static_cast<double>(count_);
    for (std::int64_t u = slice.first; u < slice.first + slice.count; ++u) {
      const std::int64_t m = order_(u);
      const double r = residual(m);
      loss += 0.5 * n * r * r;
      const double* a = measurements_.data() + static_cast<std::size_t>(m) * sum.size();
      for (std::size_t e = 0; e < sum.size(); ++e) sum[e] += n * r * a[e];
    }
    const double over = slice.count > 0 ? 1.0 / static_cast<double>(slice.count) : 0.0;
    for (std::size_t e = 0; e < sum.size(); ++e) gradient_[e] = static_cast<float>(sum[e] * over);
    ready(0);
    return loss * over;
  }

  /// The whole matrix is seen at once: rank 0 does it, as one example.
  [[nodiscard]] std::int64_t training_units() const override { return count_; }

  Evaluation evaluate(int rank, int) override {
    Evaluation e;
    e.count = rank == 0 ? 1 : 0;
    for (const char* key : {"val_loss", "relative_residual", "relative_error", "nuclear_norm",
                            "operator_norm", "stable_rank"}) {
      e.sums[key] = 0;
    }
    if (rank != 0) return e;
    double squares = 0, answers = 0, wrong = 0, truth = 0;
    for (std::int64_t m = 0; m < count_; ++m) {
      const double r = residual(m), y = answers_[static_cast<std::size_t>(m)];
      squares += r * r;
      answers += y * y;
    }
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      wrong += (weights_[i] - target_[i]) * (weights_[i] - target_[i]);
      truth += target_[i] * target_[i];
    }
    const std::vector<double> sigma =
        singular_values({weights_.begin(), weights_.end()}, rows_, cols_);
    double nuclear = 0, frobenius = 0, largest = 0;
    for (const double s : sigma) {
      nuclear += s;
      frobenius += s * s;
      largest = std::max(largest, s);
    }
    e.sums["val_loss"] = 0.5 * squares;
    e.sums["relative_residual"] = std::sqrt(squares / answers);
    e.sums["relative_error"] = std::sqrt(wrong / truth);
    e.sums["nuclear_norm"] = nuclear;
    e.sums["operator_norm"] = largest;
    e.sums["stable_rank"] = largest > 0 ? frobenius / (largest * largest) : 0;
    return e;
  }

 private:
  [[nodiscard]] double residual(std::int64_t m) const {
    const double* a = measurements_.data() + static_cast<std::size_t>(m) * weights_.size();
    double sum = 0;
    for (std::size_t e = 0; e < weights_.size(); ++e) sum += a[e] * weights_[e];
    return sum - answers_[static_cast<std::size_t>(m)];
  }

  std::uint64_t seed_;
  std::int64_t rows_ = 0, cols_ = 0, count_ = 0;
  Epochs order_;
  std::vector<float> own_, gradient_;
  std::span<float> weights_;  // where they are
  std::vector<double> target_, measurements_, answers_;
};

}  // namespace

std::unique_ptr<Workload> open_matrix_sensing(const Config& config) {
  return std::make_unique<MatrixSensing>(config);
}

}  // namespace orthrus::workloads
