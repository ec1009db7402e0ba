#include "kernels/host_backend.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <type_traits>

#include "kernels/bf16.hpp"
#include "kernels/check.hpp"
#include "kernels/triangle.hpp"

namespace orthrus::kernels {
namespace {

constexpr std::align_val_t alignment{256};

template <class T>
struct Tag {
  using Type = T;
};

/// Calls f with the element type.
template <class F>
decltype(auto) with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(Tag<float>{});
    case DType::bf16:
      return f(Tag<BFloat16>{});
    default:
      return f(Tag<double>{});
  }
}

template <class T>
const T* row(ConstMatrixView v, Index i) {
  return static_cast<const T*>(v.data) + i * v.ld;
}
template <class T>
T* row(MatrixView v, Index i) {
  return static_cast<T*>(v.data) + i * v.ld;
}

double wide(float x) { return static_cast<double>(x); }
double wide(double x) { return x; }
double wide(BFloat16 x) { return static_cast<double>(to_float(x)); }

/// x + a in the compute type, stored with one rounding.
float plus(float x, double a) { return x + static_cast<float>(a); }
double plus(double x, double a) { return x + a; }
BFloat16 plus(BFloat16 x, double a) { return to_bf16(to_float(x) + static_cast<float>(a)); }

template <class T>
T narrow(double x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bf16(x);
  } else {
    return static_cast<T>(x);
  }
}

}  // namespace

void* HostBackend::allocate(std::size_t bytes) {
  if (bytes == 0) return nullptr;
  try {
    return ::operator new(bytes, alignment);
  } catch (const std::bad_alloc&) {
    throw_device_error("allocate: no " + std::to_string(bytes) + " bytes of memory on device '" +
                       std::string(name()) + "'");
  }
}

void HostBackend::deallocate(void* memory) noexcept { ::operator delete(memory, alignment); }

void HostBackend::copy(const void* from, void* to, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

void* HostBackend::reserve(std::size_t bytes) {
  void* const range = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) {
    throw_device_error("reserve: no addresses for " + std::to_string(bytes) + " bytes");
  }
  return range;
}

void HostBackend::unreserve(void* range, std::size_t bytes) noexcept {
  static_cast<void>(::munmap(range, bytes));
}

void HostBackend::drop(void* pages, std::size_t bytes) noexcept {
  static_cast<void>(::madvise(pages, bytes, MADV_DONTNEED));
}

void HostBackend::fill(double value, MatrixView to) {
  check_view("fill", to);
  with_type(to.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    for (Index i = 0; i < to.rows; ++i) std::fill_n(row<T>(to, i), to.cols, narrow<T>(value));
  });
}

void HostBackend::add_diagonal(double a, MatrixView c) {
  check_square("add_diagonal", c);
  with_type(c.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    for (Index i = 0; i < c.rows; ++i) row<T>(c, i)[i] = plus(row<T>(c, i)[i], a);
  });
}

void HostBackend::mirror_lower(MatrixView c) { kernels::mirror_lower(c); }

void HostBackend::pack_triangle(ConstMatrixView full, float* packed) {
  kernels::pack_triangle(full, packed);
}

void HostBackend::unpack_triangle(const float* packed, MatrixView full) {
  kernels::unpack_triangle(packed, full);
}

double HostBackend::trace(ConstMatrixView c) {
  check_square("trace", c);
  return with_type(c.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    double sum = 0;
    for (Index i = 0; i < c.rows; ++i) sum += wide(row<T>(c, i)[i]);
    return sum;
  });
}

void HostBackend::row_dots(ConstMatrixView x, ConstMatrixView y, MatrixView out) {
  check_row_dots(x, y, out);
  with_type(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    for (Index i = 0; i < x.rows; ++i) {
      const T* left = row<T>(x, i);
      const T* right = row<T>(y, i);
      double sum = 0;
      for (Index j = 0; j < x.cols; ++j) sum += wide(left[j]) * wide(right[j]);
      *row<double>(out, i) = sum;
    }
  });
}

}  // namespace orthrus::kernels
