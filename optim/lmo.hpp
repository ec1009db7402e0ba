#pragma once
/// @file
/// LMO: the unit-norm T that maximizes ⟨X, T⟩, for each norm Orthrus steps in.

#include <cstddef>
#include <functional>
#include <orthrus/recipe.hpp>
#include <orthrus/view.hpp>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/msign.hpp"

namespace orthrus::kernels {
class Backend;
}

namespace orthrus::optim {

class Lmo;

/// A row of the table of norms: the norm, its dual, and the maximizer. ⟨X, lmo(X)⟩ = ‖X‖†.
struct NormRow {
  std::string_view name;
  std::string_view doc;
  /// X ← lmo(X), in place; 0 stays 0. `work` has `workspace_bytes` bytes.
  void (*lmo)(const Lmo& self, MatrixView x, std::span<std::byte> work, kernels::Backend& backend);
  std::size_t (*workspace_bytes)(const Lmo& self, Index rows, Index cols);
  /// ‖X‖ and ‖X‖†. For diagnostics and tests: they allocate, and the spectral ones cost ~60·min³
  /// flops.
  double (*norm)(ConstMatrixView x, kernels::Backend& backend);
  double (*dual_norm)(ConstMatrixView x, kernels::Backend& backend);
  /// Does it count as a matrix orthogonalized?
  bool orthogonalizes;
};

/// Every norm there is. To add one is to add a row (optim/lmo.cpp).
std::span<const NormRow> norms();

/// A configured LMO.
class Lmo {
 public:
  /// @throws ConfigError for a norm, table or word it does not know.
  explicit Lmo(const LmoConfig& config);

  /// X ← lmo(X). @param x whole matrix, f32. @param work at least `workspace_bytes(rows, cols)`.
  /// @par Cost  spectral: `flops(rows, cols)`; the others a few passes over X. No message, no
  /// allocation.
  void operator()(MatrixView x, std::span<std::byte> work, kernels::Backend& backend) const {
    row_->lmo(*this, x, work, backend);
  }
  [[nodiscard]] std::size_t workspace_bytes(Index rows, Index cols) const {
    return row_->workspace_bytes(*this, rows, cols);
  }
  /// s(a, b): what multiplies lmo(X) of a rows×cols matrix, from its global logical shape.
  [[nodiscard]] double scale(Index rows, Index cols) const;
  /// Nominal flops (symmetric products counted once).
  [[nodiscard]] double flops(Index rows, Index cols) const;
  [[nodiscard]] bool orthogonalizes() const { return row_->orthogonalizes; }
  [[nodiscard]] const NormRow& row() const { return *row_; }

  /// What the spectral row runs.
  [[nodiscard]] std::span<const kernels::Quintic> iterations() const { return iterations_; }
  [[nodiscard]] double safety() const { return safety_; }
  [[nodiscard]] const kernels::MsignOptions& options() const { return options_; }

 private:
  const NormRow* row_;
  double (*scale_)(double rows, double cols);
  std::vector<kernels::Quintic> iterations_;
  double safety_ = 1;
  kernels::MsignOptions options_;
};

}  // namespace orthrus::optim
