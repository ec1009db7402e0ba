#pragma once
/// @file
/// Workloads with a formula: no torch, no data, gradients exact.

#include <memory>

#include "workload.hpp"

namespace orthrus::workloads {

/// Find W (rows×cols) from `measurements` products ⟨A_i, W⟩ with a target of rank `rank`, from W =
/// 0. A_i has N(0, 1/measurements) entries; the target is a product of Gaussian factors over
/// √(rank·cols). The loss of unit i is measurements/2·(⟨A_i, W⟩ − y_i)², so that the mean over all
/// of them is ½‖A(W) − y‖². With `train.batch` a multiple of `measurements`, unit u is measurement
/// u (modulo); any other batch draws them.
[[nodiscard]] std::unique_ptr<Workload> open_matrix_sensing(const Config& config);

/// ½ Σ h_ij w_ij² over `matrices` matrices of rows×cols, with h_ij = i^−row_decay · j^−col_decay:
/// the curvature is a Kronecker product of two diagonals. Weights start at N(0, 1). Unit u of step
/// t adds the linear term noise·Σ √h_ij z_ij w_ij to its loss, z standard normal by the key (seed,
/// t, u).
[[nodiscard]] std::unique_ptr<Workload> open_noisy_quadratic(const Config& config);

}  // namespace orthrus::workloads
