#include <algorithm>
#include <cmath>
#include <orthrus/error.hpp>
#include <orthrus/studies/smoothness.hpp>

#include "runtime/studies/dense.hpp"

namespace orthrus::studies {

double path_smoothness(DescentNorm norm, std::span<const ConstMatrixView> before,
                       std::span<const ConstMatrixView> after,
                       std::span<const ConstMatrixView> step) {
  expects(!before.empty() && before.size() == after.size() && before.size() == step.size(),
          "two gradients and a step of the same matrices");
  double change = 0, length = 0;
  for (std::size_t i = 0; i < before.size(); ++i) {
    Matrix difference = to_double(after[i]);
    const Matrix first = to_double(before[i]);
    expects(first.rows == difference.rows && first.cols == difference.cols &&
                step[i].rows == first.rows && step[i].cols == first.cols,
            "a matrix has one shape");
    add(difference, -1, first);
    change += dual_norm(norm, difference.view());
    length = std::max(length, studies::norm(norm, step[i]));
  }
  expects<NumericError>(length > 0, "without a step nothing is known of the smoothness");
  return change / length;
}

double directional_smoothness(double loss_before, double loss_after, double slope,
                              double step_norm) {
  expects<NumericError>(step_norm > 0, "without a step nothing is known of the smoothness");
  return 2 * (loss_after - loss_before - slope) / (step_norm * step_norm);
}

SmoothnessSummary summarize_smoothness(std::vector<double> probes) {
  expects(!probes.empty(), "a summary of one probe or more");
  std::sort(probes.begin(), probes.end());
  const auto quantile = [&](double q) {
    const double at = q * static_cast<double>(probes.size() - 1);
    const auto i = static_cast<std::size_t>(at);
    const std::size_t j = std::min(i + 1, probes.size() - 1);
    return probes[i] + (at - static_cast<double>(i)) * (probes[j] - probes[i]);
  };
  return {quantile(0.5), quantile(0.9)};
}

}  // namespace orthrus::studies
