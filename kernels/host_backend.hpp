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

  void fill(double value, MatrixView to) override;
  void add_diagonal(double a, MatrixView c) override;
  void mirror_lower(MatrixView c) override;
  void pack_triangle(ConstMatrixView full, float* packed) override;
  void unpack_triangle(const float* packed, MatrixView full) override;
  double trace(ConstMatrixView c) override;
  void row_dots(ConstMatrixView x, ConstMatrixView y, MatrixView out) override;
};

}  // namespace orthrus::kernels
