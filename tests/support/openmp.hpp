#pragma once
/// @file
/// How many threads OpenMP gives to the calling thread, changed by a test without linking it.

#include <dlfcn.h>

namespace orthrus::openmp {

/// Until it dies, so many threads. Where the program has no OpenMP nothing happens.
class Threads {
 public:
  explicit Threads(int count) {
    auto* const get = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
    if (get == nullptr) return;
    before_ = get();
    set(count);
  }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;
  ~Threads() {
    if (before_ > 0) set(before_);
  }

 private:
  static void set(int count) {
    reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"))(count);
  }
  int before_ = 0;
};

}  // namespace orthrus::openmp
