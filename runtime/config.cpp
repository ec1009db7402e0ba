// What config.hpp promises: loading, explaining, writing back and documenting.
#include <algorithm>
#include <orthrus/config.hpp>
#include <orthrus/error.hpp>
#include <utility>
#include <variant>

#include "optim/rule.hpp"
#include "runtime/config_keys.hpp"
#include "runtime/config_reader.hpp"
#include "runtime/config_scalar.hpp"
#include "runtime/config_tree.hpp"
#include "runtime/name_pattern.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus {
namespace {

using namespace runtime::config_file;
using runtime::Origin;
using runtime::parse_yaml;
using runtime::YamlNode;

/// `text` as a YAML scalar that reads back as the same text.
std::string yaml_text(const std::string& text) {
  static constexpr std::array<std::string_view, 5> taken = {"true", "false", "null", "Null",
                                                            "NULL"};
  const bool plain = is_identifier(text) && !names_nonfinite(text) &&
                     std::find(taken.begin(), taken.end(), text) == taken.end();
  if (plain) return text;
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}

std::string yaml_value(const Value& value) {
  return std::visit(Overloaded{[](bool v) -> std::string { return v ? "true" : "false"; },
                               [](double v) { return shortest(v); },
                               [](const std::string& v) { return yaml_text(v); },
                               [](const std::vector<double>& v) {
                                 std::string list;
                                 for (const double x : v)
                                   (list += list.empty() ? "" : ", ") += shortest(x);
                                 return "[" + list + "]";
                               }},
                    value);
}

std::string yaml_slot(const Slot& slot, Kind kind) {
  return std::visit(Overloaded{[](const bool* v) -> std::string { return *v ? "true" : "false"; },
                               [](const int* v) { return std::to_string(*v); },
                               [&](const std::int64_t* v) {
                                 return kind == Kind::automatic && *v == 0 ? "auto"
                                                                           : std::to_string(*v);
                               },
                               [](const std::uint64_t* v) { return std::to_string(*v); },
                               [](const double* v) { return shortest(*v); },
                               [](const std::string* v) { return yaml_text(*v); },
                               [](const std::vector<std::int64_t>* v) {
                                 if (v->size() == 1) return std::to_string(v->front());
                                 std::string list;
                                 for (const std::int64_t x : *v)
                                   (list += list.empty() ? "" : ", ") += std::to_string(x);
                                 return "[" + list + "]";
                               }},
                    slot);
}

using Leaves = std::vector<std::pair<std::string, std::string>>;  // path, YAML value

template <class Scope>
Leaves row_leaves(std::span<const Row<Scope>> rows, const Scope& object) {
  Scope copy = object;  // rows hand out pointers to write through
  Leaves leaves;
  for (const Row<Scope>& row : rows) {
    leaves.emplace_back(row.path, yaml_slot(row.at(copy), row.kind));
  }
  return leaves;
}

Leaves group_leaves(const GroupConfig& group) {
  const optim::RuleRow* rule = optim::find_rule(group.rule.name);
  const bool elementwise = rule != nullptr && !rule->matrix;
  Leaves leaves;
  for (auto& leaf : row_leaves(group_rows(), group)) {
    const std::string section = leaf.first.substr(0, leaf.first.find('.'));
    if (elementwise && (section == "lmo" || section == "matrix")) continue;
    if (leaf.first == "split.rows" && group.split.rows.empty()) continue;
    if (leaf.first == "split.cols" && group.split.cols.empty()) continue;
    if (leaf.first == "split.stack" && !group.split.stack) continue;
    leaves.push_back(std::move(leaf));
    if (section == "match") {
      leaves.emplace_back("rule.name", group.rule.name);
      for (const auto& [key, value] : group.rule.values)
        leaves.emplace_back("rule." + key, yaml_value(value));
    }
  }
  return leaves;
}

Leaves free_leaves(const Config& config) {
  Leaves leaves;
  if (!config.workload.empty()) leaves.emplace_back("workload.name", config.workload);
  for (const auto& [key, value] : config.workload_values) {
    leaves.emplace_back("workload." + key, yaml_value(value));
  }
  for (const auto& [key, value] : config.data)
    leaves.emplace_back("data." + key, yaml_value(value));
  return leaves;
}

void print_leaves(std::string& out, const Leaves& leaves, const std::string& indent) {
  std::string open;  // the sections that the last line was in, each with its dot
  for (const auto& [path, value] : leaves) {
    std::size_t at = 0, depth = 0;
    for (auto dot = path.find('.'); dot != std::string::npos; dot = path.find('.', at), ++depth) {
      if (path.compare(0, dot + 1, open, 0, dot + 1) != 0)
        out += indent + std::string(2 * depth, ' ') + path.substr(at, dot - at) + ":\n";
      at = dot + 1;
    }
    open = path.substr(0, at);
    out += indent + std::string(2 * depth, ' ') + path.substr(at) + ": " + value + "\n";
  }
}

}  // namespace

Config parse_config(const std::string& text, const std::string& name,
                    std::span<const std::string> overrides) {
  YamlNode root = parse_yaml(text, name);
  for (const std::string& text_of : overrides) apply_override(root, text_of);
  return read_tree(root, name);
}

Config load_config(const std::filesystem::path& file, std::span<const std::string> overrides) {
  return read_tree(tree_of_file(file, overrides), file.string());
}

std::string explain_config(const std::filesystem::path& file,
                           std::span<const std::string> overrides) {
  const YamlNode root = tree_of_file(file, overrides);
  const Config config = read_tree(root, file.string());
  std::string out;
  const auto explain = [&](const std::string& scope, const Leaves& leaves) {
    for (const auto& [path, value] : leaves) {
      bool said = false;
      const Origin origin = origin_of(root, scope + path, &said);
      out += scope + path + ": " + value + "  # " + (said ? origin.str() : "default") + "\n";
    }
  };
  explain("", row_leaves(config_rows(), config));
  for (std::size_t i = 0; i < config.groups.size(); ++i) {
    explain("groups[" + std::to_string(i) + "].", group_leaves(config.groups[i]));
  }
  explain("", free_leaves(config));
  return out;
}

std::string to_yaml(const Config& config) {
  std::string out;
  print_leaves(out, row_leaves(config_rows(), config), "");
  out += config.groups.empty() ? "groups: []\n" : "groups:\n";
  for (const GroupConfig& group : config.groups) {
    std::string item;
    print_leaves(item, group_leaves(group), "    ");
    item[2] = '-';  // "    match:" becomes "  - match:"
    out += item;
  }
  print_leaves(out, free_leaves(config), "");
  return out;
}

std::string config_hash(const Config& config) {
  const std::string text = to_yaml(config);
  return runtime::xxh3_hex(text.data(), text.size());
}

int matching_group(const Config& config, const std::string& name, int from) {
  for (std::size_t i = static_cast<std::size_t>(std::max(from, 0)); i < config.groups.size(); ++i) {
    if (runtime::NamePattern(config.groups[i].match).matches(name)) return static_cast<int>(i);
  }
  return -1;
}

std::vector<KeyDoc> config_keys() {
  std::vector<KeyDoc> docs;
  const auto type_of = [](const auto& row) -> std::string {
    std::string words;
    for (const std::string_view w : words_of(row)) (words += words.empty() ? "" : " | ") += w;
    if (!words.empty()) return words;
    const std::string range = row.max >= many ? " >= " + shortest(row.min)
                                              : " " + shortest(row.min) + ".." + shortest(row.max);
    switch (row.kind) {
      case Kind::flag:
        return "flag";
      case Kind::integer:
        return "integer" + range;
      case Kind::automatic:
        return "integer" + range + " | auto";
      case Kind::bytes:
        return "bytes" + range;
      case Kind::real:
        return "number" + range;
      case Kind::word:
      case Kind::text:
        return "text";
      case Kind::identifier:
        return "name";
      case Kind::pattern:
        return "pattern";
      case Kind::blocks:
        return "integer | list of integers";
    }
    return "?";
  };
  const auto add = [&](const auto& rows, const std::string& scope, auto object) {
    for (const auto& row : rows) {
      const std::string value = row.required ? "required" : yaml_slot(row.at(object), row.kind);
      docs.push_back({scope + std::string(row.path), type_of(row), value == "[]" ? "" : value,
                      std::string(row.unit), std::string(row.doc)});
    }
  };
  add(config_rows(), "", Config{});
  add(group_rows(), "groups[].", GroupConfig{});
  std::string names;
  for (const optim::RuleRow& rule : optim::rules())
    (names += names.empty() ? "" : " | ") += rule.name;
  docs.push_back({"groups[].rule.name", names, "required", "", "which update"});
  for (const optim::RuleRow& rule : optim::rules()) {
    for (const optim::RuleKey& key : rule.keys) {
      const std::string range = " " + shortest(key.min) + ".." + shortest(key.max);
      std::string type =
          std::visit(Overloaded{[](bool) -> std::string { return "flag"; },
                                [&](double) { return "number" + range; },
                                [&](const std::string&) {
                                  std::string words;
                                  for (const std::string_view w : key.words)
                                    (words += words.empty() ? "" : " | ") += w;
                                  return words;
                                },
                                [&](const std::vector<double>& v) {
                                  return std::to_string(v.size()) + " numbers" + range;
                                }},
                     key.default_value);
      docs.push_back({"groups[].rule." + std::string(key.name), std::move(type),
                      yaml_value(key.default_value), "",
                      std::string(rule.name) + ": " + std::string(key.doc)});
    }
  }
  docs.push_back({"workload.name", "name", "", "",
                  "what `orthrus train` trains; its other keys are the workload's"});
  docs.push_back(
      {"workload.*", "flag | number | text | list of numbers", "", "", "sizes of the workload"});
  docs.push_back({"data.*", "flag | number | text | list of numbers", "", "",
                  "source, tokenizer and the like"});
  return docs;
}

}  // namespace orthrus
