#pragma once
/// @file
/// Counts the calls of `operator new` in this program. Include it in one source file: it defines
/// the replacements.

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace orthrus {
inline std::atomic<long> allocations{0};
}  // namespace orthrus

[[gnu::noinline]] void* operator new(std::size_t size) {
  ++orthrus::allocations;
  if (void* p = std::malloc(size == 0 ? 1 : size)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
