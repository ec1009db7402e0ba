#pragma once
/// @file
/// Matrix function: brings together what an LMO needs of a sharded matrix, and no more.
///
/// A mode says where the pieces of a matrix meet (runtime/plan chooses it). `owner`: the whole
/// matrix rests on one rank, nothing travels.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <orthrus/view.hpp>
#include <span>
#include <string_view>

namespace orthrus::kernels {
class Backend;
}

namespace orthrus::optim {
class Lmo;

enum class Mode : std::uint8_t { owner };

constexpr std::string_view name_of(Mode mode) noexcept {
  switch (mode) {
    case Mode::owner:
      return "owner";
  }
  return "?";
}

/// Scratch of a rows×cols matrix in `mode`, in bytes, on the rank that computes.
std::size_t matrix_function_workspace_bytes(Mode mode, const Lmo& lmo, Index rows, Index cols);

/// X ← lmo(X). @param x  what this rank holds: with `owner` the whole matrix.
/// @return matrices orthogonalized here.
int matrix_function(Mode mode, const Lmo& lmo, MatrixView x, std::span<std::byte> work,
                    kernels::Backend& backend);

}  // namespace orthrus::optim
