#pragma once
/// @file
/// NamePattern: `*` any characters (dots and slashes too), `?` one byte, `{a,b}` alternatives,
/// nested or empty.

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace orthrus::runtime {

class NamePattern {
 public:
  /// @throws ConfigError empty, longer than 4096 bytes, braces unbalanced or nested more than 32
  /// deep.
  explicit NamePattern(std::string_view pattern);
  /// Does the pattern match the whole of `name`?
  /// @par Cost  at most name × pattern steps: all ways through the pattern are walked at once.
  [[nodiscard]] bool matches(std::string_view name) const;

 private:
  /// One state of the automaton. A byte or any goes on with the next state, a fork with all its
  /// branches before a byte is read.
  struct State {
    enum class Kind : std::uint8_t { byte, any, fork, accept } kind;
    char byte = 0;
    std::vector<std::size_t> branches = {};
  };
  /// Appends the states of a sequence up to its end, or to the ',' or '}' that ends an alternative.
  std::size_t parse(std::string_view pattern, std::size_t at, int depth);
  void enter(std::size_t state, std::vector<std::size_t>& list,
             std::vector<std::size_t>& entered_at, std::size_t mark) const;

  std::vector<State> states_;
};

}  // namespace orthrus::runtime
