#pragma once
/// @file
/// How fast a gradient changes along a run, in the norm that the run steps in: what bounds of
/// theory.hpp call L. Both ends on the same examples: of different ones the noise is measured.

#include <orthrus/studies/noise.hpp>
#include <span>
#include <vector>

namespace orthrus::studies {

/// ‖∇f_S(W') − ∇f_S(W)‖†/‖W' − W‖ of a model: dual norms of its matrices add, of the step the
/// largest counts. One extra backward. @throws ShapeError  lists or shapes differ; NumericError  no
/// step.
[[nodiscard]] double path_smoothness(DescentNorm norm, std::span<const ConstMatrixView> before,
                                     std::span<const ConstMatrixView> after,
                                     std::span<const ConstMatrixView> step);
/// 2·(f_S(W + Δ) − f_S(W) − ⟨∇f_S(W), Δ⟩)/‖Δ‖²: along one direction; one extra forward.
/// @param slope  ⟨∇f_S(W), Δ⟩. @throws NumericError  a zero Δ
[[nodiscard]] double directional_smoothness(double loss_before, double loss_after, double slope,
                                            double step_norm);
/// Median and 90 % quantile of such probes. @throws ShapeError  without any
struct SmoothnessSummary {
  double median = 0, upper = 0;
};
[[nodiscard]] SmoothnessSummary summarize_smoothness(std::vector<double> probes);

}  // namespace orthrus::studies
