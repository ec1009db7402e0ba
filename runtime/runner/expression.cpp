#include "runtime/runner/expression.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "runtime/config_scalar.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::runner {
namespace {

using Node = Expression::Node;
using namespace std::string_view_literals;

struct Function {
  std::string_view name;
  std::size_t least, most;  // arguments
  double (*of)(double, double);
};

constexpr std::array functions{
    Function{"min", 2, 9, [](double a, double b) { return std::min(a, b); }},
    Function{"max", 2, 9, [](double a, double b) { return std::max(a, b); }},
    Function{"log2", 1, 1, [](double a, double) { return std::log2(a); }},
    Function{"log", 1, 1, [](double a, double) { return std::log(a); }},
    Function{"exp", 1, 1, [](double a, double) { return std::exp(a); }},
    Function{"sqrt", 1, 1, [](double a, double) { return std::sqrt(a); }},
    Function{"abs", 1, 1, [](double a, double) { return std::abs(a); }},
    Function{"floor", 1, 1, [](double a, double) { return std::floor(a); }},
    Function{"ceil", 1, 1, [](double a, double) { return std::ceil(a); }},
    Function{"isfinite", 1, 1, [](double a, double) { return std::isfinite(a) ? 1.0 : 0.0; }},
};

const Function* find_function(std::string_view name) {
  const auto* const found = std::find_if(functions.begin(), functions.end(),
                                         [&](const Function& f) { return f.name == name; });
  return found == functions.end() ? nullptr : found;
}

// Binary operators, loosest first; a longer one before its beginning.
constexpr std::array levels{std::array{"||"sv, ""sv, ""sv, ""sv, ""sv, ""sv},
                            std::array{"&&"sv, ""sv, ""sv, ""sv, ""sv, ""sv},
                            std::array{"=="sv, "!="sv, "<="sv, ">="sv, "<"sv, ">"sv},
                            std::array{"+"sv, "-"sv, ""sv, ""sv, ""sv, ""sv},
                            std::array{"*"sv, "/"sv, ""sv, ""sv, ""sv, ""sv}};

bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

class Parser {
 public:
  Parser(std::string_view text, std::set<std::string>& names) : text_(text), names_(names) {}

  Node parse() {
    Node node = binary(0);
    skip_blanks();
    if (at_ < text_.size()) fail("expects an operator or the end");
    return node;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::invalid_argument(runtime::quoted_for_message(text_) + ", column " +
                                std::to_string(at_ + 1) + ": " + what);
  }
  void skip_blanks() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
  }
  bool take(std::string_view token) {
    skip_blanks();
    if (token.empty() || text_.substr(at_, token.size()) != token) return false;
    at_ += token.size();
    return true;
  }
  static Node call(std::string_view name, std::vector<Node> arguments) {
    return {Node::Kind::call, 0, std::string(name), std::move(arguments)};
  }

  Node binary(std::size_t level) {
    if (level == levels.size()) return unary();
    Node left = binary(level + 1);
    for (;;) {
      const auto* const op = std::find_if(levels[level].begin(), levels[level].end(),
                                          [this](std::string_view o) { return take(o); });
      if (op == levels[level].end()) return left;
      left = call(*op, {std::move(left), binary(level + 1)});
    }
  }
  Node unary() {
    if (++depth_ > 64) fail("nested more than 64 deep");
    Node node = take("-")   ? call("negative", {unary()})
                : take("!") ? call("!", {unary()})
                            : power();
    --depth_;
    return node;
  }
  Node power() {
    Node base = primary();
    if (!take("^")) return base;
    return call("^", {std::move(base), unary()});
  }
  Node primary() {
    skip_blanks();
    if (take("(")) {
      Node inside = binary(0);
      if (!take(")")) fail("expects ')'");
      return inside;
    }
    if (at_ == text_.size()) fail("ends where a value is expected");
    const char first = text_[at_];
    if (first == '\'' || first == '"') {
      const std::size_t end = text_.find(first, at_ + 1);
      if (end == std::string_view::npos) fail("a quote that is not closed");
      Node word{Node::Kind::word, 0, std::string(text_.substr(at_ + 1, end - at_ - 1)), {}};
      at_ = end + 1;
      return word;
    }
    if (is_digit(first) || first == '.') return number();
    if (is_letter(first)) return name();
    fail("expects a number, a name or '('");
  }
  Node number() {
    std::size_t end = at_;
    while (end < text_.size() &&
           (is_digit(text_[end]) || text_[end] == '.' || text_[end] == 'e' || text_[end] == 'E' ||
            ((text_[end] == '+' || text_[end] == '-') &&
             (text_[end - 1] == 'e' || text_[end - 1] == 'E')))) {
      ++end;
    }
    Node node;
    if (runtime::config_file::parse_real(text_.substr(at_, end - at_), node.number) !=
        runtime::config_file::Parsed::ok) {
      fail("not a number");
    }
    at_ = end;
    return node;
  }
  Node name() {
    std::size_t end = at_;
    while (end < text_.size() &&
           (is_letter(text_[end]) || is_digit(text_[end]) || text_[end] == '.'))
      ++end;
    const std::string word(text_.substr(at_, end - at_));
    const Function* const function = find_function(word);
    if (end < text_.size() && text_[end] == '(') {
      if (function == nullptr) {
        std::vector<std::string_view> known;
        for (const Function& f : functions) known.push_back(f.name);
        fail("no function '" + word + "'; known: " + runtime::config_file::join(known) +
             runtime::nearest_hint(word, known));
      }
      at_ = end + 1;
      std::vector<Node> arguments;
      do {
        arguments.push_back(binary(0));
      } while (take(","));
      if (!take(")")) fail("expects ')'");
      if (arguments.size() < function->least || arguments.size() > function->most)
        fail(word + " takes " + std::to_string(function->least) +
             (function->most > function->least ? " or more" : "") + ", not " +
             std::to_string(arguments.size()));
      return call(word, std::move(arguments));
    }
    at_ = end;
    names_.insert(word);
    return {Node::Kind::name, 0, word, {}};
  }

  std::string_view text_;
  std::set<std::string>& names_;
  std::size_t at_ = 0;
  int depth_ = 0;
};

double as_number(const Value& value) {
  if (const auto* const number = std::get_if<double>(&value)) return *number;
  throw std::invalid_argument(runtime::quoted_for_message(std::get<std::string>(value)) +
                              " is neither a number nor a variable here");
}

Value evaluate_node(const Node& node, const Expression::Lookup& variable) {
  if (node.kind == Node::Kind::number) return node.number;
  if (node.kind == Node::Kind::word) return node.text;
  if (node.kind == Node::Kind::name) return variable(node.text).value_or(node.text);

  const auto of = [&](std::size_t i) { return evaluate_node(node.arguments[i], variable); };
  const auto x = [&](std::size_t i) { return as_number(of(i)); };
  const auto truth = [](bool yes) { return yes ? 1.0 : 0.0; };
  const std::string_view op = node.text;
  if (const Function* const function = find_function(op)) {
    double folded = function->least == 1 ? function->of(x(0), 0) : x(0);
    for (std::size_t i = 1; i < node.arguments.size(); ++i) folded = function->of(folded, x(i));
    return folded;
  }
  if (op == "==") return truth(of(0) == of(1));
  if (op == "!=") return truth(of(0) != of(1));
  if (op == "||") return truth(x(0) != 0 || x(1) != 0);
  if (op == "&&") return truth(x(0) != 0 && x(1) != 0);
  if (op == "<=") return truth(x(0) <= x(1));
  if (op == ">=") return truth(x(0) >= x(1));
  if (op == "<") return truth(x(0) < x(1));
  if (op == ">") return truth(x(0) > x(1));
  if (op == "!") return truth(x(0) == 0);
  if (op == "negative") return -x(0);
  if (op == "+") return x(0) + x(1);
  if (op == "-") return x(0) - x(1);
  if (op == "*") return x(0) * x(1);
  if (op == "/") return x(0) / x(1);
  return std::pow(x(0), x(1));
}

}  // namespace

Expression::Expression(const std::string& text) : text_(text) {
  root_ = Parser(text_, names_).parse();
}

Value Expression::evaluate(const Lookup& variable) const { return evaluate_node(root_, variable); }

double Expression::number(const Lookup& variable) const {
  try {
    return as_number(evaluate(variable));
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(runtime::quoted_for_message(text_) + ": " + error.what());
  }
}

}  // namespace orthrus::runner
