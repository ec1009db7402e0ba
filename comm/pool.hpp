#pragma once
/// @file
/// Pool: objects that are used again instead of freed, so that steady-state calls allocate nothing.

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

namespace orthrus::comm {

/// Calls of one communicator that may be on their way at once: more than any user of ours has. How
/// many are depends on how fast other ranks are; that alone should not allocate.
inline constexpr std::size_t calls_in_flight = 16;

/// Owns every object it ever made. One thread at a time.
template <class T>
class Pool {
 public:
  /// An idle object, or one new from `args`.
  template <class... Args>
  T* take(Args&&... args) {
    if (idle_.empty()) {
      all_.push_back(std::make_unique<T>(std::forward<Args>(args)...));
      idle_.reserve(all_.size());  // so that `give` cannot fail
      return all_.back().get();
    }
    T* object = idle_.back();
    idle_.pop_back();
    return object;
  }
  /// Makes objects before they are needed, until `count` are idle.
  template <class... Args>
  void stock(std::size_t count, Args&&... args) {
    while (idle_.size() < count) {
      all_.push_back(std::make_unique<T>(args...));
      idle_.reserve(all_.size());
      idle_.push_back(all_.back().get());
    }
  }
  void give(T* object) noexcept { idle_.push_back(object); }

 private:
  std::vector<std::unique_ptr<T>> all_;
  std::vector<T*> idle_;
};

}  // namespace orthrus::comm
