#include "runtime/config_tree.hpp"

#include <map>
#include <optional>
#include <orthrus/error.hpp>
#include <utility>
#include <vector>

#include "runtime/config_scalar.hpp"
#include "runtime/safetensors.hpp"

extern char** environ;

namespace orthrus::runtime::config_file {
namespace {

// ---------------------------------------------------------------------------------------------------------
// Paths: "groups[0].rule.lr", "groups.0.rule.lr"
// ---------------------------------------------------------------------------------------------------------

/// @return nothing when `path` has an empty part or unbalanced brackets.
std::optional<std::vector<std::string>> split_path(std::string_view path) {
  std::vector<std::string> parts(1);
  bool closed = false;  // just after ']'
  for (std::size_t i = 0; i < path.size(); ++i) {
    const char c = path[i];
    if (c == '.') {
      if (parts.back().empty()) return std::nullopt;
      parts.emplace_back();
      closed = false;
    } else if (c == '[') {
      const auto end = path.find(']', i);
      if (parts.back().empty() || end == std::string_view::npos || end == i + 1)
        return std::nullopt;
      const std::string_view index = path.substr(i + 1, end - i - 1);
      if (index.find_first_not_of("0123456789") != std::string_view::npos) return std::nullopt;
      parts.emplace_back(index);
      i = end;
      closed = true;
    } else {
      if (closed || c == ']') return std::nullopt;
      parts.back() += c;
    }
  }
  if (parts.back().empty() || parts.size() > static_cast<std::size_t>(runtime::yaml_max_depth)) {
    return std::nullopt;
  }
  return parts;
}

std::string path_text(const std::vector<std::string>& parts, std::size_t count) {
  std::string result;
  for (std::size_t i = 0; i < count; ++i) {
    const bool index = parts[i].find_first_not_of("0123456789") == std::string::npos;
    if (index && i > 0) {
      result += "[" + parts[i] + "]";
    } else {
      result += (i == 0 ? "" : ".") + parts[i];
    }
  }
  return result;
}

/// Puts `value` into the tree as if the file had said it there.
void put(YamlNode& root, const std::vector<std::string>& parts, YamlNode value) {
  const Origin at = value.origin;
  YamlNode* node = &root;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const auto refuse = [&](const std::string& what) {
      throw ConfigError(at.str() + ": " + path_text(parts, i + 1) + ": " + what);
    };
    if (node->kind == YamlNode::Kind::null) node->kind = YamlNode::Kind::map;
    if (node->kind == YamlNode::Kind::list) {
      std::size_t index = 0;
      if (parse_number(parts[i], index) != Parsed::ok)
        refuse("the parts of a list are numbered from 0");
      if (index >= node->items.size()) {
        refuse("the list has " + std::to_string(node->items.size()) + " entries, numbered from 0");
      }
      node = &node->items[index];
    } else if (node->kind == YamlNode::Kind::map) {
      YamlNode* child = node->find(parts[i]);
      if (child == nullptr) {
        node->keys.push_back(parts[i]);
        node->key_origins.push_back(at);
        YamlNode fresh;
        fresh.origin = at;
        node->items.push_back(std::move(fresh));
        child = &node->items.back();
      } else if (i + 1 == parts.size()) {
        node->key_origins[static_cast<std::size_t>(child - node->items.data())] = at;
      }
      node = child;
    } else {
      refuse("unknown key: " + path_text(parts, i) + " is a single value");
    }
  }
  *node = std::move(value);
}

/// Variables ORTHRUS__A__B=value as overrides of a.b, in the order of their names.
void apply_environment(YamlNode& root) {
  constexpr std::string_view prefix = "ORTHRUS__";
  std::map<std::string, std::string> variables;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    const auto equals = text.find('=');
    if (text.substr(0, prefix.size()) == prefix && equals != std::string_view::npos) {
      variables.emplace(text.substr(0, equals), text.substr(equals + 1));
    }
  }
  for (const auto& [name, value] : variables) {
    std::string path;
    const std::string_view rest = std::string_view(name).substr(prefix.size());
    for (std::size_t i = 0; i < rest.size(); ++i) {
      if (rest.substr(i, 2) == "__") {
        path += '.';
        ++i;
      } else {
        path += static_cast<char>(rest[i] >= 'A' && rest[i] <= 'Z' ? rest[i] - 'A' + 'a' : rest[i]);
      }
    }
    const auto parts = split_path(path);
    if (!parts) {
      throw ConfigError("environment variable " + name +
                        ": names no key; an example: ORTHRUS__COMM__TIMEOUT_S");
    }
    put(root, *parts, parse_yaml_value(value, "environment variable " + name));
  }
}

}  // namespace

Origin origin_of(const YamlNode& root, std::string_view path, bool* said) {
  const YamlNode* node = &root;
  bool found = true;
  const auto parts = split_path(path).value_or(std::vector<std::string>{});
  for (const std::string& part : parts) {
    const YamlNode* child = nullptr;
    if (node->kind == YamlNode::Kind::map) child = node->find(part);
    if (node->kind == YamlNode::Kind::list) {
      std::size_t index = 0;
      if (parse_number(part, index) == Parsed::ok && index < node->items.size())
        child = &node->items[index];
    }
    if (child == nullptr) {
      found = false;
      break;
    }
    node = child;
  }
  if (said != nullptr) *said = found;
  return node->origin;
}

void apply_override(YamlNode& root, const std::string& text) {
  const std::string source = "--set " + text.substr(0, 200);
  const auto equals = text.find('=');
  if (equals == std::string::npos) throw ConfigError(source + ": expected key.path=value");
  const auto parts = split_path(std::string_view(text).substr(0, equals));
  if (!parts)
    throw ConfigError(source + ": the key path is malformed; an example: groups[0].rule.lr=0.02");
  put(root, *parts, parse_yaml_value(text.substr(equals + 1), source));
}

YamlNode tree_of_file(const std::filesystem::path& file, std::span<const std::string> overrides) {
  std::string text;
  try {
    text = runtime::read_file(file, static_cast<std::int64_t>(runtime::yaml_max_bytes));
  } catch (const DataError& e) {  // too large: what was given, not damaged data
    throw ConfigError(e.what());
  }
  YamlNode root = parse_yaml(text, file.string());
  apply_environment(root);
  for (const std::string& text_of : overrides) apply_override(root, text_of);
  return root;
}

}  // namespace orthrus::runtime::config_file
