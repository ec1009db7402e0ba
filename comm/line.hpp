#pragma once
/// @file
/// Line: calls that start in the order they were asked for, though not always at once.

#include <utility>

namespace orthrus::comm {

/// First in, first out. Members are linked by their `next`, so that standing in line allocates
/// nothing; one line at a time.
template <class Member>
class Line {
 public:
  [[nodiscard]] bool empty() const noexcept { return first_ == nullptr; }
  [[nodiscard]] Member* first() const noexcept { return first_; }
  void push(Member* m) noexcept {
    m->next = nullptr;
    (last_ == nullptr ? first_ : last_->next) = m;
    last_ = m;
  }
  Member* pop() noexcept {
    Member* const m = first_;
    first_ = std::exchange(m->next, nullptr);
    if (first_ == nullptr) last_ = nullptr;
    return m;
  }
  /// Those for whom `leaves(member)` is true go; the others stay in their order.
  template <class Leaves>
  void remove_if(Leaves&& leaves) noexcept {
    Line stay;
    while (!empty()) {
      Member* const m = pop();
      if (!leaves(*m)) stay.push(m);
    }
    *this = stay;
  }

 private:
  Member* first_ = nullptr;
  Member* last_ = nullptr;
};

}  // namespace orthrus::comm
