#pragma once
/// @file
/// Workloads with a formula: no torch, no data, gradients exact (or, of the network, in f32).

#include <memory>

#include "workload.hpp"

namespace orthrus::workloads {

/// Find W (rows×cols) from `measurements` products ⟨A_i, W⟩ with a target of rank `rank`, from W =
/// 0. A_i has N(0, 1/measurements) entries; the target is a product of Gaussian factors over
/// √(rank·cols). The loss of unit i is measurements/2·(⟨A_i, W⟩ − y_i)², so that the mean over all
/// of them, which is an epoch, is ½‖A(W) − y‖².
[[nodiscard]] std::unique_ptr<Workload> open_matrix_sensing(const Config& config);

/// ½ Σ h_ij w_ij² over `matrices` matrices of rows×cols, with h_ij = i^−row_decay · j^−col_decay:
/// the curvature is a Kronecker product of two diagonals. Weights start at N(0, 1). Unit u adds the
/// linear term noise·Σ √h_ij z_ij w_ij to its loss, z standard normal by the key (seed, u).
[[nodiscard]] std::unique_ptr<Workload> open_noisy_quadratic(const Config& config);

/// Online least squares: unit u is a fresh x ~ N(0, diag(j^−decay)) with the answer
/// W*x + noise·z, where W* (rows×cols) has N(0, 1/cols) entries and z is standard normal; its loss
/// is ½‖Wx − answer‖², from W = 0. "val_loss" is ½E‖(W − W*)x‖², exact: 0 at W*, where a step's own
/// loss is ½·rows·noise² on average. "gradient_squared" is ‖G‖² of the expected gradient
/// G = (W − W*)·diag(j^−decay), "gradient_variance" the trace of the covariance of one unit's.
[[nodiscard]] std::unique_ptr<Workload> open_matrix_least_squares(const Config& config);

/// L(W) = ‖(W − W♯)A‖²/(2·samples) from W = 0, where W♯ (outputs×features) has N(0, 1/features)
/// entries. A = relu(VX), or silu(V₁X)∘V₂X with `activation: gated_silu`; V has N(0, 1/inputs)
/// entries, X (inputs×samples) N(0, 1). A unit is a column of A, an epoch all of them. "val_loss"
/// is L; with ReLU "population_loss" is its expectation over X, in closed form.
[[nodiscard]] std::unique_ptr<Workload> open_random_features(const Config& config);

/// Class c of `classes` has the prior p ∝ imbalance^(−c/(classes − 1)) and examples μ_c + noise·z,
/// with orthonormal means; a linear model W (classes×inputs) from W = 0 with the loss ½‖Wx − e_c‖².
/// `samples` examples are drawn once, which are an epoch; 0: every unit is a fresh one. "val_loss"
/// is the exact expected loss where all classes are equally frequent,
/// "prior_loss" where they are as frequent as in training: least, ½(1 − Σp²/(p + noise²)), at
/// rows p/(p + noise²)·μ. Accuracies are of `tests` fixed examples per class; "rare_accuracy" of
/// the last three classes. "majority_learnt" and "minority_learnt": the share of that optimum that
/// the first and the last class's rows have along their means.
[[nodiscard]] std::unique_ptr<Workload> open_imbalanced_mixture(const Config& config);

/// Teacher and student: y = W_out·h with h = W_in·x, then `blocks` times
/// h ← h + W_down·relu(W_up·h)/blocks. Both are `width` wide, their weights drawn apart; the
/// teacher's answers to x ~ N(0, I_d), `outputs` of them, have unit variance. Every unit is a fresh
/// x with noise·z on the answers, its loss ½‖y − answer‖²; "val_loss" is of `tests` held-out x
/// without noise: outputs/2 for who answers 0, 0 at the teacher. Teacher and held-out x are of
/// `task`, what the student begins with and sees of the seed: runs of other seeds are of one
/// problem.
[[nodiscard]] std::unique_ptr<Workload> open_residual_regression(const Config& config);

}  // namespace orthrus::workloads
