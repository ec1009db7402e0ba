#pragma once
/// @file
/// Scratch: device memory that grows until it is as large as the largest need.

#include <cstddef>
#include <orthrus/stream.hpp>

namespace orthrus::kernels::cuda {

/// For work of one stream, whose order keeps one user's bytes apart from the next one's.
class Scratch {
 public:
  explicit Scratch(Stream stream) noexcept : stream_(stream) {}
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  /// At least `bytes`, from a multiple of 256 on. Where it must grow it waits for the stream first.
  void* at_least(std::size_t bytes);
  /// How often it has: so often it has gone elsewhere.
  [[nodiscard]] int growths() const { return growths_; }

 private:
  Stream stream_;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  int growths_ = 0;
};

}  // namespace orthrus::kernels::cuda
