#pragma once
/// @file
/// HostBackend: the verbs that are the same on every device whose memory is the host's.

#include "kernels/backend.hpp"

namespace orthrus::kernels {

class HostBackend : public Backend {
 public:
  [[nodiscard]] bool on_host() const override { return true; }
  [[nodiscard]] void* allocate(std::size_t bytes) override;
  void deallocate(void* memory) noexcept override;
  void copy(const void* from, void* to, std::size_t bytes) override;
  void wait() override {}
  /// The system backs a page when it is written to first.
  [[nodiscard]] void* reserve(std::size_t bytes) override;
  void unreserve(void* range, std::size_t bytes) noexcept override;
  void back(void*, std::size_t) override {}
  void drop(void* pages, std::size_t bytes) noexcept override;
  [[nodiscard]] bool reaches(const void*) const override { return true; }

  void fill(double value, MatrixView to) override;
  void add_diagonal(double a, MatrixView c) override;
  void mirror_lower(MatrixView c) override;
  void pack_triangle(ConstMatrixView full, float* packed) override;
  void unpack_triangle(const float* packed, MatrixView full) override;
  double trace(ConstMatrixView c) override;
  void row_dots(ConstMatrixView x, ConstMatrixView y, MatrixView out) override;
  // Written on other verbs.
  bool normalize(MatrixView x, const NormOptions& options, int safe_exponent,
                 MatrixView to) override;
  void divide_by_norm(ConstMatrixView r, const NormOptions& options, int power,
                      ConstMatrixView from, MatrixView to) override;
  void split_mean(MatrixView c, ConstMatrixView x, MatrixView to) override;
  void inverse_roots(MatrixView s) override;
};

}  // namespace orthrus::kernels
