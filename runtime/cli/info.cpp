// orthrus info: everything a configuration may say, from the tables that read it.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <orthrus/config.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "kernels/coefficients.hpp"
#include "optim/rule.hpp"
#include "runtime/cli/command.hpp"
#include "runtime/workloads/workload.hpp"

namespace orthrus::cli {
namespace {

using nlohmann::ordered_json;

ordered_json to_json(const Value& value) {
  return std::visit([](const auto& v) { return ordered_json(v); }, value);
}

std::string to_text(const Value& value) {
  return std::visit(
      [](const auto& v) -> std::string {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_same_v<T, bool>) {
          return v ? "true" : "false";
        } else if constexpr (std::is_same_v<T, double>) {
          return fmt::format("{:g}", v);
        } else if constexpr (std::is_same_v<T, std::string>) {
          return v;
        } else {
          std::string out = "[";
          for (const double x : v) out += fmt::format("{}{:g}", out.size() > 1 ? ", " : "", x);
          return out + "]";
        }
      },
      value);
}

/// Rows of columns, each as wide as its longest entry; the last one is left as it is.
std::string columns(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()), 0);
    for (std::size_t c = 0; c + 1 < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  }
  std::string out;
  for (const auto& row : rows) {
    std::string line = " ";
    for (std::size_t c = 0; c < row.size(); ++c) {
      line += c + 1 < row.size() ? fmt::format(" {:<{}}", row[c], widths[c]) : " " + row[c];
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

// ---- one function per section: for people and for programs
// ----------------------------------------

ordered_json keys_json() {
  ordered_json out = ordered_json::array();
  for (const KeyDoc& key : config_keys()) {
    out.push_back({{"path", key.path},
                   {"type", key.type},
                   {"default", key.default_value},
                   {"unit", key.unit},
                   {"doc", key.doc}});
  }
  return out;
}

std::string keys_text() {
  std::vector<std::vector<std::string>> rows;
  for (const KeyDoc& key : config_keys()) {
    rows.push_back({key.path, key.type, key.default_value.empty() ? "-" : key.default_value,
                    key.unit, key.doc});
  }
  return "configuration keys: path, type, default, unit\n" + columns(rows);
}

ordered_json rules_json() {
  ordered_json out = ordered_json::array();
  for (const optim::RuleRow& rule : optim::rules()) {
    ordered_json keys = ordered_json::array();
    for (const optim::RuleKey& key : rule.keys) {
      ordered_json row{
          {"name", key.name}, {"default", to_json(key.default_value)}, {"doc", key.doc}};
      if (std::holds_alternative<double>(key.default_value) ||
          std::holds_alternative<std::vector<double>>(key.default_value)) {
        row["min"] = key.min;
        row["max"] = key.max;
      }
      if (!key.words.empty()) row["words"] = key.words;
      keys.push_back(std::move(row));
    }
    out.push_back({{"name", rule.name},
                   {"matrix", rule.matrix},
                   {"doc", rule.doc},
                   {"keys", std::move(keys)}});
  }
  return out;
}

std::string rules_text() {
  std::string out = "rules (rule.name and its keys)\n";
  for (const optim::RuleRow& rule : optim::rules()) {
    out += fmt::format("  {}: {}{}\n", rule.name, rule.doc, rule.matrix ? " [matrices]" : "");
    std::vector<std::vector<std::string>> rows;
    for (const optim::RuleKey& key : rule.keys) {
      std::string doc(key.doc);
      if (!key.words.empty()) doc += fmt::format(" ({})", fmt::join(key.words, " | "));
      rows.push_back({fmt::format("  {}", key.name), to_text(key.default_value), doc});
    }
    out += columns(rows);
  }
  return out;
}

ordered_json norms_json() {
  return {{"norms", optim::norm_names()}, {"scales", optim::scale_names()}};
}

std::string norms_text() {
  return fmt::format("norms (lmo.norm)\n  {}\nscales (lmo.scale)\n  {}\n",
                     fmt::join(optim::norm_names(), ", "), fmt::join(optim::scale_names(), ", "));
}

ordered_json tables_json() {
  ordered_json out = ordered_json::array();
  for (const kernels::CoefficientTable& table : kernels::coefficient_tables()) {
    ordered_json iterations = ordered_json::array();
    for (const kernels::Quintic& q : table.iterations) iterations.push_back({q.a, q.b, q.c});
    out.push_back({{"name", table.name},
                   {"safety", table.safety},
                   {"source", table.source},
                   {"iterations", std::move(iterations)}});
  }
  return out;
}

std::string tables_text() {
  std::string out = "coefficient tables (lmo.coefficients): p(x) = a x + b x^3 + c x^5\n";
  for (const kernels::CoefficientTable& table : kernels::coefficient_tables()) {
    out += fmt::format(
        "  {}: {}{}\n", table.name, table.source,
        table.safety != 1 ? fmt::format("; input divided by {:g}", table.safety) : std::string{});
    for (const kernels::Quintic& q : table.iterations)
      out += fmt::format("    {:.16g}, {:.16g}, {:.16g}\n", q.a, q.b, q.c);
  }
  return out;
}

ordered_json workloads_json() {
  ordered_json out = ordered_json::array();
  for (const workloads::WorkloadRow& row : workloads::workload_table()) {
    out.push_back({{"name", row.name}, {"available", row.available}, {"doc", row.doc}});
  }
  return out;
}

std::string workloads_text() {
  std::vector<std::vector<std::string>> rows;
  for (const workloads::WorkloadRow& row : workloads::workload_table()) {
    rows.push_back(
        {row.name, row.doc + (row.available ? "" : " (not in this build: needs libtorch)")});
  }
  return "workloads (workload.name)\n" + columns(rows);
}

struct Section {
  const char* name;
  const char* doc;
  ordered_json (*json)();
  std::string (*text)();
};
constexpr Section sections[] = {
    {"keys", "Configuration keys with type, default, unit and meaning", keys_json, keys_text},
    {"rules", "Update rules and their keys", rules_json, rules_text},
    {"norms", "Norms and scales of the LMO", norms_json, norms_text},
    {"tables", "Newton-Schulz coefficient tables", tables_json, tables_text},
    {"workloads", "Bundled workloads", workloads_json, workloads_text},
};

int info(const std::vector<std::string>& wanted, Context& context) {
  if (context.rank() != 0) return 0;
  ordered_json document{{"schema", 1}, {"version", ORTHRUS_VERSION}};
  std::string text;
  for (const Section& section : sections) {
    const bool all = wanted.empty();
    if (!all && std::find(wanted.begin(), wanted.end(), section.name) == wanted.end()) continue;
    if (context.json) {
      document[section.name] = section.json();
    } else {
      text += (text.empty() ? "" : "\n") + section.text();
    }
  }
  if (context.json)
    text = document.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n";
  std::fputs(text.c_str(), stdout);
  return 0;
}

}  // namespace

Run add_info(CLI::App& app) {
  auto wanted = std::make_shared<std::vector<std::string>>();
  for (const Section& section : sections) {
    app.add_flag_callback(
        std::string("--") + section.name,
        [wanted, &section] { wanted->emplace_back(section.name); }, section.doc);
  }
  return [wanted](Context& context) { return info(*wanted, context); };
}

}  // namespace orthrus::cli
