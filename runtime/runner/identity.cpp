#include "runtime/runner/identity.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "runtime/config_scalar.hpp"
#include "runtime/safetensors.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::runner {
namespace {

void write(std::string& out, const Json& value) {
  if (value.is_object()) {
    std::vector<std::string> keys;
    for (const auto& [key, item] : value.items()) keys.push_back(key);
    std::sort(keys.begin(), keys.end());
    char between = '{';
    for (const std::string& key : keys) {
      out += between;
      out += Json(key).dump() + ":";
      write(out, value.at(key));
      between = ',';
    }
    out += between == '{' ? "{}" : "}";
  } else if (value.is_array()) {
    char between = '[';
    for (const Json& item : value) {
      out += between;
      write(out, item);
      between = ',';
    }
    out += between == '[' ? "[]" : "]";
  } else if (value.is_number_float()) {
    const Json x = number(value.get<double>());
    out += x.is_string() ? x.dump() : runtime::config_file::shortest(x.get<double>());
  } else {
    out += value.dump();
  }
}

}  // namespace

std::string canonical_json(const Json& value) {
  std::string out;
  write(out, value);
  return out;
}

std::string identity_of(const Json& value) {
  const std::string text = canonical_json(value);
  return runtime::sha256_hex(text.data(), text.size()).substr(0, 16);
}

Json number(double x) {
  if (std::isnan(x)) return "NaN";
  if (std::isinf(x)) return x > 0 ? "inf" : "-inf";
  return x;
}

Json to_json(const runtime::YamlNode& node) {
  using Kind = runtime::YamlNode::Kind;
  using runtime::config_file::Parsed;
  switch (node.kind) {
    case Kind::null:
      return nullptr;
    case Kind::list: {
      Json out = Json::array();
      for (const runtime::YamlNode& item : node.items) out.push_back(to_json(item));
      return out;
    }
    case Kind::map: {
      Json out = Json::object();
      for (std::size_t i = 0; i < node.keys.size(); ++i) out[node.keys[i]] = to_json(node.items[i]);
      return out;
    }
    case Kind::scalar:
      break;
  }
  if (node.quoted) return node.text;
  if (node.text == "true" || node.text == "false") return node.text == "true";
  std::int64_t whole = 0;
  if (runtime::config_file::parse_number(node.text, whole) == Parsed::ok) return whole;
  double real = 0;
  if (runtime::config_file::parse_real(node.text, real) == Parsed::ok) return real;
  return node.text;
}

}  // namespace orthrus::runner
