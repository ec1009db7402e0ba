#pragma once
/// @file
/// OneMatrix: what the workloads share that have a single matrix, gradients of f64 sums and an
/// objective that is known exactly.

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "random.hpp"
#include "workload.hpp"

namespace orthrus::workloads {

/// One parameter W (rows×cols, f32) that starts at 0. What derives from it says what a unit adds.
class OneMatrix : public Workload {
 public:
  std::vector<Parameter> parameters() override;
  void place_weights(int id, void* data) override;
  double gradient(const Slice& slice, const std::function<void(int)>& ready) override;
  /// The whole objective is seen at once, as one example of rank 0.
  Evaluation evaluate(int rank, int size) override;

 protected:
  OneMatrix(const Config& config, std::string name) : seed_(config.seed), name_(std::move(name)) {}
  /// Sizes are known: the buffers of W and its gradient.
  void shape(std::int64_t rows, std::int64_t cols);

  /// Adds the gradient of one unit to `sum` (rows·cols). @return the unit's loss.
  virtual double add_unit(std::int64_t unit, std::span<double> sum) = 0;
  /// "val_loss" and what else is known of W; the same keys whatever W is.
  virtual std::map<std::string, double> metrics() = 0;

  /// W_ij.
  [[nodiscard]] double at(std::int64_t i, std::int64_t j) const {
    return weights_[static_cast<std::size_t>(i * cols_ + j)];
  }
  [[nodiscard]] std::uint64_t seed() const { return seed_; }
  [[nodiscard]] std::int64_t rows() const { return rows_; }
  [[nodiscard]] std::int64_t cols() const { return cols_; }

 private:
  std::uint64_t seed_;
  std::string name_;
  std::int64_t rows_ = 0, cols_ = 0;
  std::vector<float> own_, gradient_;
  std::span<float> weights_;  // where they are
};

/// rows×cols entries of N(0, variance), row by row.
[[nodiscard]] std::vector<double> gaussian(const Draws& draws, std::int64_t rows, std::int64_t cols,
                                           double variance);

}  // namespace orthrus::workloads
