#include "one_matrix.hpp"

#include <algorithm>
#include <cmath>

namespace orthrus::workloads {

void OneMatrix::shape(std::int64_t rows, std::int64_t cols) {
  rows_ = rows;
  cols_ = cols;
  own_.assign(static_cast<std::size_t>(rows * cols), 0.0F);
  gradient_ = own_;
  weights_ = own_;
}

std::vector<Parameter> OneMatrix::parameters() {
  Parameter p;
  p.name = name_;
  p.shape = {rows_, cols_};
  p.weights = weights_.data();
  p.gradient = gradient_.data();
  return {p};
}

void OneMatrix::place_weights(int, void* data) {
  weights_ = {static_cast<float*>(data), weights_.size()};
  own_ = {};
}

double OneMatrix::gradient(const Slice& slice, const std::function<void(int)>& ready) {
  std::vector<double> sum(gradient_.size(), 0.0);
  double loss = 0;
  for (std::int64_t u = slice.first; u < slice.first + slice.count; ++u) {
    loss += add_unit(u, sum);
  }
  const double over = slice.count > 0 ? 1.0 / static_cast<double>(slice.count) : 0.0;
  std::transform(sum.begin(), sum.end(), gradient_.begin(),
                 [over](double x) { return static_cast<float>(x * over); });
  ready(0);
  return loss * over;
}

Workload::Evaluation OneMatrix::evaluate(int rank, int) {
  Evaluation e;
  e.sums = metrics();
  e.count = rank == 0 ? 1 : 0;
  if (rank != 0) {
    for (auto& [key, sum] : e.sums) sum = 0;
  }
  return e;
}

std::vector<double> gaussian(const Draws& draws, std::int64_t rows, std::int64_t cols,
                             double variance) {
  const double deviation = std::sqrt(variance);
  std::vector<double> a(static_cast<std::size_t>(rows * cols));
  for (std::size_t e = 0; e < a.size(); ++e) {
    a[e] = deviation * draws.normal(static_cast<std::int64_t>(e));
  }
  return a;
}

}  // namespace orthrus::workloads
