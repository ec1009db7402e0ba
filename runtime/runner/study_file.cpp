#include "runtime/runner/study_file.hpp"

#include <algorithm>
#include <orthrus/error.hpp>
#include <string_view>
#include <utility>

#include "runtime/config_tree.hpp"
#include "runtime/runner/study_keys.hpp"
#include "runtime/runner/study_reader.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::runner {
namespace {

using runtime::Origin;
using runtime::YamlNode;
using Kind = YamlNode::Kind;

/// `lr=0.01,0.02` becomes search.parameters.lr: {values: [0.01, 0.02]}.
void apply_override(YamlNode& root, const std::string& text) {
  const auto equals = text.find('=');
  if (equals == std::string::npos)
    throw ConfigError("--set " + text + ": not of the form key=value", ExitCode::usage);
  const std::string key = text.substr(0, equals);
  const Words own = children("");
  if (std::find(own.begin(), own.end(), key.substr(0, key.find('.'))) != own.end()) {
    runtime::config_file::apply_override(root, text);
    return;
  }
  const std::string source = "--set " + text.substr(0, 200);
  const std::string value = text.substr(equals + 1);
  YamlNode given = value.find(',') == std::string::npos
                       ? runtime::parse_yaml_value(value, source)
                       : runtime::parse_yaml_value("[" + value + "]", source);
  if (given.kind == Kind::list) {
    YamlNode values;
    values.kind = Kind::map;
    values.keys = {"values"};
    values.key_origins = {given.origin};
    values.origin = given.origin;
    values.items = {std::move(given)};
    given = std::move(values);
  }
  // A name with dots is one key here.
  const auto child = [](YamlNode& map, const std::string& name, const Origin& at) -> YamlNode& {
    if (map.find(name) == nullptr) {
      map.kind = Kind::map;
      map.keys.push_back(name);
      map.key_origins.push_back(at);
      map.items.emplace_back();
      map.items.back().origin = at;
    }
    return *map.find(name);
  };
  const Origin at = given.origin;
  child(child(child(root, "search", at), "parameters", at), key, at) = std::move(given);
}

void put(Json& out, std::string_view path, Json value) {
  Json* at = &out;
  while (path.find('.') != std::string_view::npos) {
    at = &(*at)[std::string(path.substr(0, path.find('.')))];
    path.remove_prefix(path.find('.') + 1);
  }
  (*at)[std::string(path)] = std::move(value);
}

Json to_json(const ParameterSpec& spec) {
  if (spec.center) {
    const Center& c = *spec.center;
    Json center{{"rule", c.rule}};
    if (c.noise_scale > 0) center["noise_scale"] = c.noise_scale;
    if (c.reference_batch > 0) center["at"] = {{"batch_size", c.reference_batch}};
    if (c.per.empty()) {
      center["value"] = c.values.at("");
    } else {
      center["per"] = c.per;
      center["value"] = c.values;
    }
    return {{"center", std::move(center)},
            {"multipliers", {{"log2", {c.first, c.last, c.step}}}},
            {"extend_on_edge", spec.extend_on_edge}};
  }
  if (!spec.tune.empty()) return {{"tune", spec.tune}, {"report", spec.report}};
  if (!spec.distribution.empty())
    return {{"distribution", spec.distribution}, {"min", spec.min}, {"max", spec.max}};
  if (spec.values.size() == 1 && spec.extend_on_edge == 0) return spec.values.front();
  Json out{{"values", spec.values}};
  if (spec.name == "lr") out["extend_on_edge"] = spec.extend_on_edge;
  return out;
}

void compare(const Json& a, const Json& b, const std::string& path, std::vector<std::string>& out) {
  if (!a.is_object() || !b.is_object()) {
    if (canonical_json(a) != canonical_json(b)) out.push_back(path);
    return;
  }
  const auto below = [&](const std::string& key) { return path.empty() ? key : path + "." + key; };
  for (const auto& [key, value] : a.items()) {
    if (b.contains(key)) {
      compare(value, b[key], below(key), out);
    } else {
      out.push_back(below(key));
    }
  }
  for (const auto& [key, value] : b.items()) {
    if (!a.contains(key)) out.push_back(below(key));
  }
}

}  // namespace

const ParameterSpec* Study::find(const std::string& parameter) const {
  const auto found = std::find_if(parameters.begin(), parameters.end(),
                                  [&](const ParameterSpec& p) { return p.name == parameter; });
  return found == parameters.end() ? nullptr : &*found;
}

bool Study::tunes() const {
  const ParameterSpec* const seed = find("seed");
  return seed != nullptr && !seed->tune.empty();
}

bool Study::averages() const {
  return std::find(eval_on.begin(), eval_on.end(), "ema") != eval_on.end();
}

Study parse_study(const std::string& text, const std::string& source,
                  std::span<const std::string> overrides) {
  YamlNode root = runtime::parse_yaml(text, source);
  for (const std::string& override_text : overrides) apply_override(root, override_text);
  return read_study(root, source);
}

Study load_study(const std::string& file, std::span<const std::string> overrides) {
  try {
    return parse_study(runtime::read_file(file, static_cast<std::int64_t>(runtime::yaml_max_bytes)),
                       file, overrides);
  } catch (const DataError& error) {  // too large: what was given, not damaged data
    throw ConfigError(error.what());
  }
}

Json resolved(const Study& study) {
  Json out = Json::object();
  for (const Row& row : rows()) put(out, row.path, value_of(row, study));
  out["task"] = study.task;
  out["bases"] = study.bases;
  Json parameters = Json::object();
  for (const ParameterSpec& spec : study.parameters) parameters[spec.name] = to_json(spec);
  out["search"]["parameters"] = std::move(parameters);
  out["search"]["telescope"] = Json::object();
  if (study.telescopes()) {
    out["search"]["telescope"] = {{"over", study.telescope.over},
                                  {"of", study.telescope.of},
                                  {"points", study.telescope.points},
                                  {"carry", study.telescope.carry}};
  }
  out["search"]["points"] = study.points;
  out["search"]["zip"] = study.zip;
  out["search"]["exclude"] = Json::array();
  for (const Expression& e : study.exclude) out["search"]["exclude"].push_back(e.text());
  out["search"]["derive"] = Json::object();
  for (const auto& [name, e] : study.derive) out["search"]["derive"][name] = e.text();
  out["analysis"]["items"] = study.analysis_items;
  return out;
}

std::vector<std::string> differences(const Json& a, const Json& b) {
  std::vector<std::string> out;
  compare(a, b, "", out);
  return out;
}

}  // namespace orthrus::runner
