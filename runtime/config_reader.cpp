#include "runtime/config_reader.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <orthrus/error.hpp>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "optim/rule.hpp"
#include "runtime/config_keys.hpp"
#include "runtime/config_scalar.hpp"
#include "runtime/config_tree.hpp"
#include "runtime/name_pattern.hpp"

namespace orthrus::runtime::config_file {
namespace {

/// Turns the tree into a Config. Collects what is wrong instead of stopping at the first.
class Reader {
 public:
  explicit Reader(const YamlNode& root) : root_(root) {}

  Config read() {
    Config config;
    if (root_.kind != YamlNode::Kind::map) {
      error(root_.origin, "", "expects `schema: 1` and more keys, found " + root_.describe());
      finish();
    }
    // Another schema has other keys: nothing more can be said about the file.
    read_schema();
    read_map(root_, "", "", config_rows(), config,
             [&](const std::string& key, const YamlNode& node) {
               if (key == "groups") {
                 read_groups(node, config);
               } else if (key == "workload") {
                 read_free(node, key, config.workload_values, &config.workload);
               } else if (key == "data") {
                 read_free(node, key, config.data, nullptr);
               } else {
                 return false;
               }
               return true;
             });
    if (root_.find("groups") == nullptr) {
      error(root_.origin, "groups", "is required: which rule updates which parameters");
    }
    if (errors_.empty()) conflicts(config);
    finish();
    return config;
  }

 private:
  void error(const Origin& at, const std::string& path, const std::string& what) {
    errors_.push_back(at.str() + ": " + (path.empty() ? "" : path + ": ") + what);
  }
  void finish() const {
    if (errors_.empty()) return;
    constexpr std::size_t shown = 20;
    std::string message;
    for (std::size_t i = 0; i < std::min(shown, errors_.size()); ++i) {
      message += (i == 0 ? "" : "\n") + errors_[i];
    }
    if (errors_.size() > shown)
      message += "\nand " + std::to_string(errors_.size() - shown) + " more";
    throw ConfigError(message);
  }

  void read_schema() {
    const YamlNode* schema = root_.find("schema");
    if (schema == nullptr) {
      const bool study = root_.find("orthrus_study") != nullptr;
      error(root_.origin, "schema",
            study ? "is required; this is a study file, not a configuration"
                  : "is required: schema: 1");
      finish();
    }
    std::int64_t number = 0;
    const bool is_number = schema->kind == YamlNode::Kind::scalar && !schema->quoted &&
                           parse_number(schema->text, number) == Parsed::ok;
    if (is_number && number != 1) {
      error(schema->origin, "schema",
            "this file is of schema " + std::to_string(number) + "; this version reads schema 1");
      finish();
    }
  }

  /// Keys of a map whose rows are `rows`; `special` takes the keys it knows.
  /// @param scope    "" or "groups[0]": before every path in messages.
  /// @param section  "" or "comm": before the keys of this map in the table.
  using Special = std::function<bool(const std::string& key, const YamlNode& node)>;
  template <class Scope>
  void read_map(const YamlNode& map, const std::string& scope, const std::string& section,
                std::span<const Row<Scope>> rows, Scope& object, const Special& special) {
    for (std::size_t i = 0; i < map.keys.size(); ++i) {
      const std::string& key = map.keys[i];
      const YamlNode& node = map.items[i];
      const std::string path = section.empty() ? key : section + "." + key;
      const std::string shown = scope.empty() ? path : scope + "." + path;
      const auto row =
          std::find_if(rows.begin(), rows.end(), [&](const auto& r) { return r.path == path; });
      if (row != rows.end()) {
        read_row(*row, node, shown, object);
      } else if (is_section(rows, path)) {
        if (node.kind != YamlNode::Kind::map) {
          error(node.origin, shown,
                "expects a mapping with " + join(children(rows, path)) + "; found " +
                    node.describe());
        } else {
          read_map(node, scope, path, rows, object, nullptr);
        }
      } else if (!special || !special(key, node)) {
        unknown_key(map.key_origins[i], scope, section, key, rows);
      }
    }
    if (!section.empty()) return;
    for (const auto& row : rows) {
      if (row.required && map.find(row.path) == nullptr) {
        error(map.origin, (scope.empty() ? "" : scope + ".") + std::string(row.path),
              "is required: " + std::string(row.doc));
      }
    }
  }

  template <class Scope>
  static bool is_section(std::span<const Row<Scope>> rows, const std::string& path) {
    const std::string prefix = path + ".";
    return std::any_of(rows.begin(), rows.end(),
                       [&](const auto& r) { return r.path.substr(0, prefix.size()) == prefix; });
  }
  /// The keys directly below `section`, in the order of the table.
  template <class Scope>
  static Words children(std::span<const Row<Scope>> rows, const std::string& section) {
    Words names;
    for (const auto& row : rows) {
      std::string_view path = row.path;
      if (!section.empty()) {
        if (path.substr(0, section.size() + 1) != section + ".") continue;
        path.remove_prefix(section.size() + 1);
      }
      path = path.substr(0, path.find('.'));
      if (std::find(names.begin(), names.end(), path) == names.end()) names.push_back(path);
    }
    if constexpr (std::is_same_v<Scope, Config>) {
      if (section.empty()) names.insert(names.end(), {"groups", "workload", "data"});
    } else {
      if (section.empty()) names.insert(names.begin() + 1, "rule");
    }
    return names;
  }

  template <class Scope>
  void unknown_key(const Origin& at, const std::string& scope, const std::string& section,
                   const std::string& key, std::span<const Row<Scope>> rows) {
    const std::string path = section.empty() ? key : section + "." + key;
    const std::string shown = (scope.empty() ? "" : scope + ".") + path.substr(0, 120);
    const Words known = children(rows, section);
    std::string hint = nearest_hint(key, known);
    if (hint.empty()) {
      // The right word in the wrong place?
      for (const auto& row : rows) {
        const auto dot = row.path.rfind('.');
        if (dot != std::string_view::npos && row.path.substr(dot + 1) == key) {
          hint = " (did you mean '" + std::string(row.path) + "'?)";
          break;
        }
      }
      if (hint.empty() && !scope.empty() && section.empty()) {
        for (const optim::RuleRow& rule : optim::rules()) {
          for (const optim::RuleKey& k : rule.keys) {
            if (k.name == key) hint = " (did you mean 'rule." + key + "'?)";
          }
        }
      }
    }
    error(at, shown, "unknown key; known: " + join(known) + hint);
  }

  /// Is `node` a single value? Else says what was expected.
  bool scalar(const YamlNode& node, const std::string& path, std::string_view expected) {
    if (node.kind == YamlNode::Kind::scalar) return true;
    error(node.origin, path, "expects " + std::string(expected) + ", found " + node.describe());
    return false;
  }

  static std::string range_text(double min, double max) {
    return shortest(min) + " to " + shortest(max);
  }
  static std::string integer_range(double min, double max) {
    if (max >= 1e18) return "0 to 18446744073709551615";
    return std::to_string(static_cast<std::int64_t>(min)) + " to " +
           std::to_string(static_cast<std::int64_t>(max));
  }

  bool known_word(const YamlNode& node, const std::string& path, std::string_view noun,
                  const Words& words, const Words& absent) {
    if (std::find(words.begin(), words.end(), node.text) != words.end()) return true;
    if (std::find(absent.begin(), absent.end(), node.text) != absent.end()) {
      error(node.origin, path,
            quoted_for_message(node.text) +
                " is not available in this version; available: " + join(words));
    } else {
      error(node.origin, path,
            quoted_for_message(node.text) + " is not " + std::string(noun) +
                "; known: " + join(words) + nearest_hint(node.text, words));
    }
    return false;
  }

  bool read_flag(const YamlNode& node, const std::string& path, bool& value) {
    if (!scalar(node, path, "true or false")) return false;
    if (node.quoted || (node.text != "true" && node.text != "false")) {
      error(node.origin, path,
            quoted_for_message(node.text) + " is not a flag; known: true, false");
      return false;
    }
    value = node.text == "true";
    return true;
  }

  bool read_real(const YamlNode& node, const std::string& path, double min, double max,
                 double& value) {
    if (!scalar(node, path, "a number")) return false;
    if (!node.quoted && names_nonfinite(node.text)) {
      error(node.origin, path, quoted_for_message(node.text) + " is not a finite number");
      return false;
    }
    double parsed = 0;
    const Parsed result = node.quoted ? Parsed::malformed : parse_real(node.text, parsed);
    if (result == Parsed::malformed) {
      error(node.origin, path,
            quoted_for_message(node.text) + " is not a number" +
                (node.quoted ? " but text, being in quotes" : ""));
      return false;
    }
    if (result == Parsed::out_of_range || !(parsed >= min && parsed <= max)) {
      error(node.origin, path,
            node.text.substr(0, 60) + " is out of range: " + range_text(min, max));
      return false;
    }
    value = parsed;
    return true;
  }

  template <class Number>
  bool read_integer(const YamlNode& node, const std::string& path, double min, double max,
                    Kind kind, Number& value) {
    const std::string_view expected = kind == Kind::bytes       ? "a number of bytes such as 64MiB"
                                      : kind == Kind::automatic ? "a whole number or auto"
                                                                : "a whole number";
    if (!scalar(node, path, expected)) return false;
    if (kind == Kind::automatic && !node.quoted && node.text == "auto") {
      value = 0;
      return true;
    }
    Number parsed = 0;
    Parsed result = Parsed::malformed;
    if (!node.quoted) {
      if constexpr (std::is_same_v<Number, std::int64_t>) {
        result =
            kind == Kind::bytes ? parse_bytes(node.text, parsed) : parse_number(node.text, parsed);
      } else {
        result = parse_number(node.text, parsed);
      }
      // An unsigned target calls "-1" malformed; it is a whole number all the same.
      std::int64_t negative = 0;
      if (result == Parsed::malformed && parse_number(node.text, negative) == Parsed::ok) {
        result = Parsed::out_of_range;
      }
    }
    if (result == Parsed::malformed) {
      const std::string what =
          kind == Kind::bytes
              ? "a number of bytes; a whole number, alone or with B, KiB, MiB, GiB, TiB, "
                "kB, MB, GB, TB"
              : std::string(expected);
      error(node.origin, path,
            quoted_for_message(node.text) + " is not " + what +
                (node.quoted ? " but text, being in quotes" : ""));
      return false;
    }
    const double as_real = static_cast<double>(parsed);
    if (result == Parsed::out_of_range || as_real < min || as_real > max) {
      error(node.origin, path,
            node.text.substr(0, 60) + " is out of range: " + integer_range(min, max));
      return false;
    }
    value = parsed;
    return true;
  }

  void read_blocks(const YamlNode& node, const std::string& path,
                   std::vector<std::int64_t>& value) {
    std::vector<std::int64_t> blocks;
    const auto one = [&](const YamlNode& n, const std::string& p) {
      std::int64_t size = 0;
      if (read_integer(n, p, 1, 1LL << 40, Kind::integer, size)) blocks.push_back(size);
    };
    if (node.kind == YamlNode::Kind::list) {
      if (node.items.size() < 2) {
        error(node.origin, path,
              "a list of block sizes has at least two; N alone means N equal blocks");
        return;
      }
      for (std::size_t i = 0; i < node.items.size(); ++i) {
        one(node.items[i], path + "[" + std::to_string(i) + "]");
      }
    } else if (node.kind == YamlNode::Kind::scalar) {
      one(node, path);
    } else {
      error(node.origin, path,
            "expects a number of equal blocks or a list of sizes, found " + node.describe());
    }
    value = std::move(blocks);
  }

  void read_string(const YamlNode& node, const std::string& path, Kind kind, std::string& value) {
    if (!scalar(node, path, kind == Kind::pattern ? "a pattern of names" : "text")) return;
    if (kind == Kind::identifier) {
      const bool allowed = node.text.find_first_not_of(
                               "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                               "0123456789._-") == std::string::npos;
      if (!allowed || node.text.empty() || node.text[0] == '.' || node.text.size() > 128) {
        error(node.origin, path,
              quoted_for_message(node.text) +
                  " cannot be part of a path; letters, digits, '_', '-' and '.', not first");
        return;
      }
    } else if (kind == Kind::pattern) {
      try {
        (void)runtime::NamePattern(node.text);
      } catch (const ConfigError& e) {
        error(node.origin, path, e.what());
        return;
      }
    } else if (path == "telemetry.path") {
      for (auto open = node.text.find('{'); open != std::string::npos;
           open = node.text.find('{', open + 1)) {
        if (node.text.compare(open, 6, "{rank}") != 0 &&
            node.text.compare(open, 6, "{name}") != 0) {
          error(node.origin, path,
                quoted_for_message(node.text) + ": only {rank} and {name} are filled in");
          return;
        }
      }
    }
    value = node.text;
  }

  template <class Scope>
  void read_row(const Row<Scope>& row, const YamlNode& node, const std::string& path,
                Scope& object) {
    const Words words = words_of(row);
    if (!words.empty()) {
      const std::string expected = "one of " + join(words);
      if (!scalar(node, path, expected)) return;
      if (!known_word(node, path, row.noun, words, nonempty(row.absent))) return;
      if (row.kind == Kind::integer && node.quoted) {
        error(node.origin, path,
              quoted_for_message(node.text) + " is not a whole number but text, being in quotes");
        return;
      }
    }
    const double max = words.empty() ? row.max : many;
    std::visit(
        Overloaded{[&](bool* v) { (void)read_flag(node, path, *v); },
                   [&](double* v) { (void)read_real(node, path, row.min, max, *v); },
                   [&](std::string* v) {
                     if (row.kind == Kind::word) {
                       *v = node.text;
                     } else {
                       read_string(node, path, row.kind, *v);
                     }
                   },
                   [&](std::vector<std::int64_t>* v) { read_blocks(node, path, *v); },
                   [&](auto* v) { (void)read_integer(node, path, row.min, max, row.kind, *v); }},
        row.at(object));
  }

  void read_groups(const YamlNode& node, Config& config) {
    if (node.kind != YamlNode::Kind::list || node.items.empty()) {
      error(node.origin, "groups",
            "expects a list of groups, found " +
                (node.kind == YamlNode::Kind::list ? "an empty one" : node.describe()));
      return;
    }
    for (std::size_t i = 0; i < node.items.size(); ++i) {
      const YamlNode& item = node.items[i];
      const std::string scope = "groups[" + std::to_string(i) + "]";
      if (item.kind != YamlNode::Kind::map) {
        error(item.origin, scope,
              "expects a mapping with match and rule, found " + item.describe());
        continue;
      }
      GroupConfig group;
      read_map(item, scope, "", group_rows(), group,
               [&](const std::string& key, const YamlNode& child) {
                 if (key != "rule") return false;
                 read_rule(child, scope + ".rule", group.rule);
                 return true;
               });
      if (item.find("rule") == nullptr) {
        error(item.origin, scope + ".rule", "is required: {name: ..., lr: ...}");
      }
      const optim::RuleRow* rule = optim::find_rule(group.rule.name);
      for (const char* section : {"lmo", "matrix"}) {
        const auto given = std::find(item.keys.begin(), item.keys.end(), section);
        if (rule == nullptr || rule->matrix || given == item.keys.end()) continue;
        error(item.key_origins[static_cast<std::size_t>(given - item.keys.begin())],
              scope + "." + section,
              "the rule " + group.rule.name +
                  " is element-wise and has no use for it; matrix rules: " +
                  join(rule_names(/*matrix_only=*/true)));
      }
      check_split(item, scope);
      config.groups.push_back(std::move(group));
    }
  }

  void check_split(const YamlNode& group, const std::string& scope) {
    const YamlNode* split = group.find("split");
    if (split == nullptr || split->kind != YamlNode::Kind::map) return;
    if (split->keys.size() != 1) {
      error(split->origin, scope + ".split",
            "expects exactly one of rows, cols and stack, found " +
                std::to_string(split->keys.size()));
      return;
    }
    const YamlNode& value = split->items.front();
    if (split->keys.front() == "stack" && value.kind == YamlNode::Kind::scalar &&
        value.text == "false") {
      error(value.origin, scope + ".split.stack", "can only be true; leave split out for no split");
    }
  }

  static Words rule_names(bool matrix_only) {
    Words names;
    for (const optim::RuleRow& row : optim::rules()) {
      if (row.matrix || !matrix_only) names.push_back(row.name);
    }
    return names;
  }

  void read_rule(const YamlNode& node, const std::string& path, RuleConfig& rule) {
    if (node.kind != YamlNode::Kind::map) {
      error(node.origin, path,
            "expects a mapping such as {name: muon, lr: 0.02}, found " + node.describe());
      return;
    }
    const YamlNode* name = node.find("name");
    if (name == nullptr) {
      error(node.origin, path + ".name", "is required; known rules: " + join(rule_names(false)));
      return;
    }
    if (!scalar(*name, path + ".name", "the name of a rule")) return;
    const Words absent(absent_rules.begin(), absent_rules.end());
    if (!known_word(*name, path + ".name", "a rule", rule_names(false), absent)) return;
    const optim::RuleRow& row = *optim::find_rule(name->text);
    rule.name = name->text;
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      const std::string& key = node.keys[i];
      if (key == "name") continue;
      const auto known = std::find_if(row.keys.begin(), row.keys.end(),
                                      [&](const auto& k) { return k.name == key; });
      if (known == row.keys.end()) {
        Words names = {"name"};
        for (const optim::RuleKey& k : row.keys) names.push_back(k.name);
        error(node.key_origins[i], path + "." + key.substr(0, 80),
              "the rule " + rule.name + " has no such key; known: " + join(names) +
                  nearest_hint(key, names));
        continue;
      }
      read_rule_value(*known, node.items[i], path + "." + key, rule);
    }
    rule = optim::with_defaults(std::move(rule));
  }

  void read_rule_value(const optim::RuleKey& key, const YamlNode& node, const std::string& path,
                       RuleConfig& rule) {
    Value& value = rule.values[std::string(key.name)];
    value = key.default_value;
    std::visit(Overloaded{[&](bool& v) { (void)read_flag(node, path, v); },
                          [&](double& v) { (void)read_real(node, path, key.min, key.max, v); },
                          [&](std::string& v) {
                            if (!scalar(node, path, "one of " + join(key.words))) return;
                            if (known_word(node, path, "a value of it", key.words, {}))
                              v = node.text;
                          },
                          [&](std::vector<double>& v) {
                            const std::size_t count = v.size();
                            if (node.kind != YamlNode::Kind::list || node.items.size() != count) {
                              error(node.origin, path,
                                    "expects a list of " + std::to_string(count) +
                                        " numbers, found " +
                                        (node.kind == YamlNode::Kind::list
                                             ? "one of " + std::to_string(node.items.size())
                                             : node.describe()));
                              return;
                            }
                            for (std::size_t i = 0; i < count; ++i) {
                              (void)read_real(node.items[i], path + "[" + std::to_string(i) + "]",
                                              key.min, key.max, v[i]);
                            }
                          }},
               value);
  }

  /// `workload:` and `data:` — keys that only their reader knows, with plain values.
  void read_free(const YamlNode& node, const std::string& path,
                 std::map<std::string, Value>& values, std::string* name) {
    if (node.kind != YamlNode::Kind::map) {
      error(node.origin, path, "expects a mapping, found " + node.describe());
      return;
    }
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      const std::string& key = node.keys[i];
      const YamlNode& child = node.items[i];
      const std::string shown = path + "." + key.substr(0, 80);
      if (name != nullptr && key == "name") {
        if (!scalar(child, shown, "a name")) continue;
        if (is_identifier(child.text)) {
          *name = child.text;
        } else {
          error(child.origin, shown,
                quoted_for_message(child.text) + " is not a name; letters, digits and '_'");
        }
      } else if (!is_identifier(key)) {
        error(node.key_origins[i], shown, "is not a name; letters, digits and '_'");
      } else if (auto value = free_value(child, shown)) {
        values.emplace(key, std::move(*value));
      }
    }
    if (name != nullptr && node.find("name") == nullptr) {
      error(node.origin, path + ".name", "is required: which workload");
    }
  }

  std::optional<Value> free_value(const YamlNode& node, const std::string& path) {
    constexpr double huge = std::numeric_limits<double>::max();
    if (node.kind == YamlNode::Kind::list) {
      std::vector<double> list(node.items.size());
      for (std::size_t i = 0; i < list.size(); ++i) {
        (void)read_real(node.items[i], path + "[" + std::to_string(i) + "]", -huge, huge, list[i]);
      }
      return list;
    }
    if (!scalar(node, path, "a flag, number, word or list of numbers")) return std::nullopt;
    if (node.quoted) return node.text;
    if (node.text == "true" || node.text == "false") return node.text == "true";
    double number = 0;
    if (!names_nonfinite(node.text) && parse_real(node.text, number) == Parsed::malformed)
      return node.text;
    if (!read_real(node, path, -huge, huge, number)) return std::nullopt;
    const bool whole = node.text.find_first_of(".eE") == std::string::npos;
    if (whole && std::abs(number) > 9007199254740992.0) {
      error(node.origin, path,
            node.text.substr(0, 60) + " is a whole number above 2^53 and would be rounded");
      return std::nullopt;
    }
    return number;
  }

  template <class Conflict>
  static void weights_conflicts(const WeightsConfig& w, Conflict&& conflict) {
    const bool codes = w.format != "f32" && w.format != "bf16";
    if (!codes && w.scale != "auto") {
      conflict("scale", w.scale + " contradicts weights.format " + w.format + ", which has none");
    }
    if (!codes && w.scale_format != "f32") {
      conflict("scale_format", w.scale_format + " contradicts weights.format " + w.format +
                                   ", which has no scales");
    }
    if (w.block != 0 && (!codes || w.scale == "row" || w.scale == "tensor")) {
      conflict("block", std::to_string(w.block) + " contradicts " +
                            (codes ? "weights.scale " + w.scale
                                   : "weights.format " + w.format + ", which has no scales"));
    }
    if (w.scale == "block" && w.block == 0) conflict("scale", "block needs weights.block");
    if (w.residual == "mantissa" && w.format != "bf16") {
      conflict("residual", "mantissa keeps the bits that bf16 has not: weights.format bf16");
    }
    if (w.residual == "mantissa" && w.rounding == "stochastic") {
      conflict("rounding",
               "stochastic contradicts weights.residual mantissa, which keeps every bit");
    }
    if (w.residual != "momentum" && w.eco != EcoConfig{}) {
      conflict("eco", "is of weights.residual momentum (it is " + w.residual + ")");
    }
    const double most = w.eco.max_rel_correction;
    if (most < 0 && most != -1) conflict("eco.max_rel_correction", "is 0 or more, or -1");
  }

  /// What no single key can see. All of it is listed, not only the first.
  void conflicts(const Config& c) {
    const auto conflict = [&](const std::string& path, const std::string& what) {
      error(origin_of(root_, path), path, what);
    };
    if (c.mesh.shard == 0 && c.mesh.replicate == 0) {
      conflict("mesh", "shard and replicate cannot both be auto; give one of them a number");
    }
    if (c.virtual_shards > 0 && c.comm.gradient_dtype != "f32") {
      conflict(
          "comm.gradient_dtype",
          c.comm.gradient_dtype + " contradicts reproducible.virtual_shards, which sums in f32");
    }
    if (c.diagnostics.advisor != "report" &&
        (!c.diagnostics.spectra || c.diagnostics.every_steps == 0)) {
      conflict("diagnostics.advisor",
               c.diagnostics.advisor + " needs diagnostics.spectra and diagnostics.every_steps");
    }
    const GnsRampConfig& ramp = c.gns_ramp;
    if (ramp.on() && c.diagnostics.every_steps == 0) {
      conflict("gns_ramp.geometry", ramp.geometry + " needs diagnostics.every_steps");
    } else if (ramp.on() && ramp.geometry != "l2" &&
               !(c.diagnostics.spectra && c.diagnostics.dual_noise)) {
      conflict("gns_ramp.geometry",
               ramp.geometry + " needs diagnostics.spectra and diagnostics.dual_noise");
    } else if (ramp.on() && ramp.geometry != "l2" &&
               (c.virtual_shards > 0 || c.train.micro_batches > 1 || ramp.max_local > 0)) {
      conflict("gns_ramp.geometry",
               ramp.geometry +
                   " is measured between ranks: no reproducible.virtual_shards, "
                   "train.micro_batches or gns_ramp.max_local");
    }
    if (ramp.on() && ramp.max_local > 0 && c.virtual_shards > 0) {
      conflict("gns_ramp.max_local",
               "contradicts reproducible.virtual_shards, which are what a batch is cut into");
    }
    if (ramp.on() && ramp.max_batch > 0 && ramp.max_batch < c.train.batch) {
      conflict("gns_ramp.max_batch",
               std::to_string(ramp.max_batch) +
                   " is less than train.batch = " + std::to_string(c.train.batch));
    }
    if (ramp.on() && ramp.price_second == 0 && (ramp.price_step > 0) != (ramp.price_example > 0)) {
      conflict("gns_ramp.price",
               "of a step without that of an example, or the other way round: the best batch is "
               "the largest or the smallest");
    }
    if (c.diagnostics.advisor == "auto" && c.train.save_every == 0) {
      conflict("diagnostics.advisor",
               "auto decides every train.save_every steps, which is 0 here: never");
    }
    for (std::size_t i = 0; i < c.groups.size(); ++i) {
      const GroupConfig& g = c.groups[i];
      const std::string scope = "groups[" + std::to_string(i) + "].";
      if (g.weights.format == "f32" && g.weights.residual != "none") {
        conflict(scope + "weights.residual",
                 g.weights.residual + " contradicts weights.format f32, where nothing is lost");
      }
      if (g.weights.format == "f32" && g.weights.rounding != "nearest") {
        conflict(scope + "weights.rounding",
                 g.weights.rounding + " contradicts weights.format f32, where nothing is rounded");
      }
      constexpr std::int64_t most_steps = 10'000'000;
      if (g.weights.eco.kappa == "exact_schedule" && c.train.steps > most_steps) {
        conflict(scope + "weights.eco.kappa",
                 "exact_schedule keeps a number per step: train.steps " +
                     std::to_string(c.train.steps) + " are more than " +
                     std::to_string(most_steps));
      }
      weights_conflicts(g.weights, [&](const std::string& key, const std::string& what) {
        conflict(scope + "weights." + key, what);
      });
      if ((g.state.block & (g.state.block - 1)) != 0) {
        conflict(scope + "state.block",
                 std::to_string(g.state.block) + " is not a power of two from 32 to 1024");
      } else if (g.state.block != StateConfig{}.block && g.state.momentum != "int8") {
        conflict(scope + "state.block", std::to_string(g.state.block) +
                                            " contradicts state.momentum " + g.state.momentum +
                                            ", which has no scales");
      }
      if (g.matrix.period != 1 && g.matrix.mode != "periodic") {
        conflict(scope + "matrix.period", "other than 1 needs matrix.mode periodic");
      }
      if (g.matrix.wire == "bf16" && g.matrix.accuracy != "fast") {
        conflict(scope + "matrix.wire",
                 "bf16 rounds what is exchanged, which needs matrix.accuracy fast (it is " +
                     g.matrix.accuracy + ")");
      }
      if (g.schedule.kind == "constant" && (g.schedule.decay_steps != 0 || g.schedule.final != 0)) {
        conflict(scope + (g.schedule.decay_steps != 0 ? "schedule.decay_steps" : "schedule.final"),
                 "contradicts schedule.kind constant, which does not decay");
      }
      if (g.schedule.kind == "cosine" && g.schedule.decay_steps != 0 &&
          g.schedule.decay_steps <= g.schedule.warmup_steps) {
        conflict(scope + "schedule.decay_steps",
                 std::to_string(g.schedule.decay_steps) + " is not after the end of warm-up (" +
                     std::to_string(g.schedule.warmup_steps) + " steps)");
      }
    }
  }

  const YamlNode& root_;
  std::vector<std::string> errors_;
};

}  // namespace

Config read_tree(const YamlNode& root, const std::string& name) {
  Config config = Reader(root).read();
  config.source = name;
  return config;
}

}  // namespace orthrus::runtime::config_file
