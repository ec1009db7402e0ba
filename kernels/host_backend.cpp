#include "kernels/host_backend.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <type_traits>

#include "kernels/bf16.hpp"
#include "kernels/check.hpp"
#include "kernels/msign.hpp"
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

bool HostBackend::normalize(MatrixView x, const NormOptions& options, int safe_exponent,
                            MatrixView to) {
  check_same_shape("normalize", {x, to});
  const double largest = abs_max(x);
  if (largest == 0) {
    if (to.data != x.data) convert(x, 1, to);
    return false;
  }
  if (!std::isfinite(largest)) {
    convert(x, std::numeric_limits<double>::quiet_NaN(), to);
    return true;
  }
  int shift = std::ilogb(largest);
  if (std::abs(shift) <= safe_exponent) shift = 0;
  scale_by_power(x, -shift, *this);
  NormOptions scaled = options;
  scaled.eps = std::ldexp(options.eps, -shift);
  convert(x, 1 / norm_of(std::sqrt(sum_squares(x)), scaled), to);
  return true;
}

void HostBackend::divide_by_norm(ConstMatrixView r, const NormOptions& options, int power,
                                 ConstMatrixView from, MatrixView to) {
  check_divide_by_norm(r, from, to);
  const double squares = trace(r);
  if (squares == 0) return fill(0, to);
  const double inverse = 1 / norm_of(std::sqrt(squares), options);
  const double factor = power == 2 ? inverse * inverse : inverse;
  convert(from, std::isfinite(squares) ? factor : std::numeric_limits<double>::quiet_NaN(), to);
}

void HostBackend::split_mean(MatrixView c, ConstMatrixView x, MatrixView to) {
  check_split_mean(c, x, to);
  if (c.rows == 0) return;
  const double mean = trace(c) / static_cast<double>(c.rows);
  add_diagonal(-mean, c);
  convert(x, mean, to);
}

void HostBackend::inverse_roots(MatrixView s) {
  check_view("inverse_roots", s);
  check_dtype("inverse_roots", s, DType::f64);
  for (Index i = 0; i < s.rows; ++i) {
    for (Index j = 0; j < s.cols; ++j) {
      double& f = row<double>(s, i)[j];
      f = f > 0 ? 1 / std::sqrt(f) : 0;
    }
  }
}

}  // namespace orthrus::kernels
