#pragma once
/// @file
/// LMO: the unit-norm T that maximizes ⟨X, T⟩, for each norm Orthrus steps in.

#include <cstddef>
#include <functional>
#include <optional>
#include <orthrus/recipe.hpp>
#include <orthrus/view.hpp>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/msign.hpp"
#include "kernels/zolotarev.hpp"

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
  // ECO. X = P⁻¹·lmo(X), where P is as wide as the norm's symmetry: a symmetric matrix on the short
  // side (spectral), a number per line, one number, or one per entry. `root` is P⁻¹.
  std::size_t (*root_bytes)(Index rows, Index cols);
  /// X ← lmo(X), with `root` of the X that it was.
  void (*lmo_with_root)(const Lmo& self, MatrixView x, std::span<std::byte> root,
                        std::span<std::byte> work, kernels::Backend& backend);
  /// C ← P⁻¹E.
  void (*undo)(const Lmo& self, std::span<std::byte> root, ConstMatrixView e, MatrixView c,
               std::span<std::byte> work, kernels::Backend& backend);
  /// Scratch of both.
  std::size_t (*root_workspace_bytes)(const Lmo& self, Index rows, Index cols);
};

/// Every norm there is. To add one is to add a row (optim/lmo.cpp).
std::span<const NormRow> norms();

/// Where an LMO will run.
struct LmoSite {
  /// On processors f32 is half as fast as bf16, and inverses are fast; on tensor cores neither is
  /// so: there `coefficients: auto` stays with iterations, and bf16 with bf16.
  bool on_host = true;
  bool shares_iterations = false;  ///< among ranks: `coefficients: auto` cannot become rational
  int tasks = 1;                   ///< `Backend::tasks_at_once` of the device it will have room for
};

/// A configured LMO.
class Lmo {
 public:
  /// @throws ConfigError for a norm, table or word it does not know, and for a tolerance that no
  ///         number of terms or iterations reaches, or that rounding in bf16 does not allow (1e-2).
  explicit Lmo(const LmoConfig& config, const LmoSite& site = {});

  /// X ← lmo(X). On a device nothing is waited for, unless `waits`.
  /// @param x whole matrix, f32. @param work at least `workspace_bytes(rows, cols)`.
  /// @par Cost  spectral: `flops(rows, cols)`; the others a few passes over X. No message, no
  /// allocation.
  void operator()(MatrixView x, std::span<std::byte> work, kernels::Backend& backend) const {
    row_->lmo(*this, x, work, backend);
  }
  [[nodiscard]] std::size_t workspace_bytes(Index rows, Index cols) const {
    return row_->workspace_bytes(*this, rows, cols);
  }
  /// The same where of the long side only the first `wanted` lines of lmo(X) are asked for; what
  /// becomes of the others is not defined. @par Cost  spectral: a product the less of the others.
  void first_lines(MatrixView x, Index wanted, std::span<std::byte> work,
                   kernels::Backend& backend) const;

  // ECO: what undoes the LMO. A larger X is no longer step, so this is never exact.
  /// Bytes of the P⁻¹ of a rows×cols matrix.
  [[nodiscard]] std::size_t root_bytes(Index rows, Index cols) const {
    return row_->root_bytes(rows, cols);
  }
  /// Scratch of `with_root` and `undo`; no less than `workspace_bytes`.
  [[nodiscard]] std::size_t root_workspace_bytes(Index rows, Index cols) const {
    return row_->root_workspace_bytes(*this, rows, cols);
  }
  /// X ← lmo(X), and P⁻¹: spectral, (XXᵀ)^½ of the short side, with which C keeps all of E.
  /// @param[out] root  `root_bytes(rows, cols)` bytes, 64-byte aligned.
  /// @par Cost  of the LMO, and (spectral) 2m³ flops after a rational function, 2m²n after
  /// iterations; memory: after iterations a copy of X.
  void with_root(MatrixView x, std::span<std::byte> root, std::span<std::byte> work,
                 kernels::Backend& backend) const {
    row_->lmo_with_root(*this, x, root, work, backend);
  }
  /// C ← P⁻¹E. @param root  spoiled. @param c  f32; not `e`. @par Cost  spectral: 2m²n flops, in
  /// bf16 where the LMO is.
  void undo(std::span<std::byte> root, ConstMatrixView e, MatrixView c, std::span<std::byte> work,
            kernels::Backend& backend) const {
    row_->undo(*this, root, e, c, work, backend);
  }

  /// s(a, b): what multiplies lmo(X) of a rows×cols matrix, from its global logical shape.
  [[nodiscard]] double scale(Index rows, Index cols) const;
  /// Nominal flops (symmetric products counted once).
  [[nodiscard]] double flops(Index rows, Index cols) const;
  [[nodiscard]] bool orthogonalizes() const { return row_->orthogonalizes; }
  [[nodiscard]] const NormRow& row() const { return *row_; }

  // What the spectral row runs: iterations, or one rational function.
  /// Empty where every matrix takes the rational function.
  [[nodiscard]] std::span<const kernels::Quintic> iterations() const { return iterations_; }
  /// nullptr where a matrix with this short side is iterated. Pure: side, dtype and configuration.
  [[nodiscard]] const kernels::RationalSign* rational(Index side) const {
    return rational_ && side >= rational_from_ ? &*rational_ : nullptr;
  }
  /// Does the LMO of such a matrix wait on a device? The inverses of a rational one are the host's.
  [[nodiscard]] bool waits(Index side) const {
    return row_->orthogonalizes && rational(side) != nullptr;
  }
  /// Its terms that there is to be room for at a time.
  [[nodiscard]] int terms_at_once() const { return terms_at_once_; }
  /// "polar_express_101, 5 iterations", or "rational, 2 terms, l = 0.005".
  [[nodiscard]] std::string description(Index side) const;
  [[nodiscard]] double safety() const { return safety_; }
  [[nodiscard]] const kernels::MsignOptions& options() const { return options_; }

  // The same from a Gram matrix alone: lmo(X) = Q·X for R = XXᵀ, m×m.
  /// Is that accurate in f32, with this short side?
  [[nodiscard]] bool has_gram_form(Index side) const;
  /// Scratch of `gram` for an m×m R, in bytes.
  [[nodiscard]] std::size_t gram_workspace_bytes(Index m) const;
  [[nodiscard]] double gram_flops(Index m) const;
  /// @param r        XXᵀ, f32, symmetric; may be spoiled.
  /// @param eps      `options().eps`, in units of the X that R is of.
  /// @param[out] q   m×m, f32.
  /// @param[out] squares  Σ of squares of each line of QX; may be empty.
  void gram(MatrixView r, double eps, MatrixView q, std::span<double> squares,
            std::span<std::byte> work, kernels::Backend& backend) const;
  // A rational Q is a sum of `rational(m)->r` terms that need nothing of each other.
  /// Terms `first` … `last` − 1 as packed triangles. @param r  as for `gram`.
  /// @param[out] packed  (last − first)·m(m+1)/2 floats. @return the scale that all terms have.
  double gram_terms(ConstMatrixView r, int first, int last, float* packed,
                    std::span<std::byte> work, kernels::Backend& backend) const;
  /// All of them of an m×m Q, added into the first.
  void sum_terms(float* packed, Index m, kernels::Backend& backend) const;
  /// Q from their sum, with the bits of `gram`.
  void gram_of_sum(const float* packed, double scale, MatrixView q,
                   kernels::Backend& backend) const;

 private:
  const NormRow* row_;
  double (*scale_)(double rows, double cols);
  std::vector<kernels::Quintic> iterations_;
  std::optional<kernels::RationalSign> rational_;
  Index rational_from_ = 0;  ///< the shortest side it is for
  std::string name_;
  int terms_at_once_ = 1;
  double safety_ = 1;
  kernels::MsignOptions options_;
};

}  // namespace orthrus::optim
