#include <cmath>

#include "analytic.hpp"
#include "options.hpp"
#include "random.hpp"

namespace orthrus::workloads {
namespace {

class NoisyQuadratic final : public Workload {
 public:
  explicit NoisyQuadratic(const Config& config) : seed_(config.seed) {
    Options options(config, "workload", config.workload_values);
    rows_ = options.integer("rows", 32);
    cols_ = options.integer("cols", 32);
    matrices_ = options.integer("matrices", 2, 1, 1024);
    const double row_decay = options.number("row_decay", 1, 0, 10);
    const double col_decay = options.number("col_decay", 1, 0, 10);
    noise_ = options.number("noise", 1, 0, 1e6);
    options.done();
    Options(config, "data", config.data).done();
    if (rows_ * cols_ > (1 << 28)) options.refuse("rows", "rows·cols is more than 2^28");

    for (std::int64_t i = 0; i < rows_; ++i) {
      for (std::int64_t j = 0; j < cols_; ++j) {
        curvature_.push_back(std::pow(static_cast<double>(i + 1), -row_decay) *
                             std::pow(static_cast<double>(j + 1), -col_decay));
      }
    }
    for (std::int64_t k = 0; k < matrices_; ++k) {
      const Draws draws(seed_, Purpose::weights, {k});
      std::vector<float> w;
      for (std::int64_t e = 0; e < rows_ * cols_; ++e) {
        w.push_back(static_cast<float>(draws.normal(e)));
      }
      own_.push_back(std::move(w));
      weights_.push_back(own_.back().data());
      gradient_.emplace_back(curvature_.size(), 0.0F);
    }
  }

  std::vector<Parameter> parameters() override {
    std::vector<Parameter> list;
    for (std::size_t k = 0; k < weights_.size(); ++k) {
      Parameter p;
      p.name = "layers." + std::to_string(k) + ".weight";
      p.shape = {rows_, cols_};
      p.weights = weights_[k];
      p.gradient = gradient_[k].data();
      list.push_back(std::move(p));
    }
    return list;
  }

  void place_weights(int id, void* data) override {
    const auto k = static_cast<std::size_t>(id);
    weights_[k] = static_cast<float*>(data);
    own_[k] = {};
  }

  double gradient(const Slice& slice, const std::function<void(int)>& ready) override {
    const double over = slice.count > 0 ? 1.0 / static_cast<double>(slice.count) : 0.0;
    double loss = 0;
    std::vector<double> z(curvature_.size());
    for (std::size_t k = 0; k < weights_.size(); ++k) {
      std::fill(z.begin(), z.end(), 0.0);
      for (std::int64_t u = slice.first; noise_ > 0 && u < slice.first + slice.count; ++u) {
        const Draws draws(seed_, Purpose::noise, {u, static_cast<std::int64_t>(k)});
        for (std::size_t e = 0; e < z.size(); ++e) {
          z[e] += draws.normal(static_cast<std::int64_t>(e));
        }
      }
      for (std::size_t e = 0; e < z.size(); ++e) {
        const double h = curvature_[e], w = weights_[k][e];
        const double push = noise_ * std::sqrt(h) * z[e] * over;
        gradient_[k][e] = slice.count > 0 ? static_cast<float>(h * w + push) : 0.0F;
        if (slice.count > 0) loss += 0.5 * h * w * w + push * w;
      }
      ready(static_cast<int>(k));
    }
    return loss;
  }

  /// The objective without noise, as one example of rank 0.
  Evaluation evaluate(int rank, int) override {
    Evaluation e;
    e.count = rank == 0 ? 1 : 0;
    double& loss = e.sums["val_loss"];
    for (std::size_t k = 0; rank == 0 && k < weights_.size(); ++k) {
      for (std::size_t i = 0; i < curvature_.size(); ++i) {
        const double w = weights_[k][i];
        loss += 0.5 * curvature_[i] * w * w;
      }
    }
    return e;
  }

 private:
  std::uint64_t seed_;
  std::int64_t rows_ = 0, cols_ = 0, matrices_ = 0;
  double noise_ = 0;
  std::vector<double> curvature_;
  std::vector<std::vector<float>> own_, gradient_;
  std::vector<float*> weights_;  // where they are
};

}  // namespace

std::unique_ptr<Workload> open_noisy_quadratic(const Config& config) {
  return std::make_unique<NoisyQuadratic>(config);
}

}  // namespace orthrus::workloads
