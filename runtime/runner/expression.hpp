#pragma once
/// @file
/// Expression: what a study file says in a line of arithmetic: `exclude`, `derive`,
/// `stop.diverged`, and `ls --where`.

#include <functional>
#include <optional>
#include <set>
#include <string>
#include <variant>
#include <vector>

namespace orthrus::runner {

/// A number (truth is 1 or 0), or a word such as `muon`.
using Value = std::variant<double, std::string>;

/// + - * / ^, comparisons, && || !, parentheses; min max log2 log exp sqrt abs floor ceil isfinite.
/// Loosest first: || && (== != < <= > >=) (+ -) (* /) (unary - !) ^, which binds to the right.
///
/// A name is a variable where `evaluate` is told its value, else the word itself: `optimizer ==
/// muon` needs no quotes. Words compare by == and != alone.
class Expression {
 public:
  /// @throws std::invalid_argument  says what is wrong, and at which column.
  explicit Expression(const std::string& text);

  using Lookup = std::function<std::optional<Value>(const std::string& name)>;
  /// @throws std::invalid_argument  arithmetic with a word.
  [[nodiscard]] Value evaluate(const Lookup& variable) const;
  [[nodiscard]] double number(const Lookup& variable) const;
  [[nodiscard]] bool truth(const Lookup& variable) const { return number(variable) != 0; }

  [[nodiscard]] const std::set<std::string>& names() const { return names_; }
  [[nodiscard]] const std::string& text() const { return text_; }

  struct Node {
    enum class Kind : std::uint8_t { number, word, name, call };
    Kind kind = Kind::number;
    double number = 0;
    std::string text;  ///< of a word, a name, or what is called: "+", "min"
    std::vector<Node> arguments;
  };

 private:
  std::string text_;
  Node root_;
  std::set<std::string> names_;
};

}  // namespace orthrus::runner
