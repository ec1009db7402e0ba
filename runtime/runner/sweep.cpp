#include "runtime/runner/sweep.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <orthrus/error.hpp>
#include <set>
#include <utility>
#include <vector>

#include "runtime/runner/identity.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::runner {
namespace {

class Sweep {
 public:
  Sweep(const std::string& text, std::string source, std::string base)
      : source_(std::move(source)),
        base_(std::move(base)),
        sweep_(to_json(runtime::parse_yaml(text, source_))) {
    if (!sweep_.is_object() || !sweep_.contains("parameters"))
      throw ConfigError(source_ + ": no sweep: it has no parameters");
    for (const char* const key : {"parameters", "metric"})
      if (sweep_.contains(key) && !sweep_[key].is_object()) refuse(key, "expects a mapping");
  }

  std::string study() {
    Json search{{"method", method()}};
    const Json parameters = parameters_of(sweep_["parameters"], "");
    Json cap = sweep_.value("run_cap", Json());
    if (search["method"] == "random") draw(parameters, search, cap);
    if (sweep_.contains("metric")) search["metric"] = metric();
    search["parameters"] = parameters;
    Json study{{"orthrus_study", 1}, {"name", name()}, {"search", std::move(search)}};
    if (sweep_.contains("description")) study["description"] = sweep_["description"];
    if (!base_.empty()) {
      study["base"] = base_;
    } else {
      study["task"] = {{"command", command(parameters)}};
      study["execution"] = {{"mode", "subprocess"}};
      note("the program is to append a line for each evaluation to {metrics}: see README");
    }
    if (!cap.is_null()) study["budget"] = {{"run_cap", cap}};
    static const std::set<std::string> taken{"method",      "metric",  "parameters", "run_cap",
                                             "description", "program", "command",    "name"};
    for (const auto& [key, value] : sweep_.items())
      if (taken.count(key) == 0) note("left out: " + key + ": " + value.dump());
    std::string out = "# Of the sweep " + source_ + ".\n";
    for (const std::string& line : notes_) out += "# " + line + "\n";
    for (const char* const key :
         {"orthrus_study", "name", "description", "task", "base", "search", "budget", "execution"})
      if (study.contains(key)) out += std::string(key) + ": " + study[key].dump() + "\n";
    return out;
  }

 private:
  [[noreturn]] void refuse(const std::string& key, const std::string& what) const {
    throw ConfigError(source_ + ": " + key + ": " + what);
  }
  void note(std::string line) {
    std::replace(line.begin(), line.end(), '\n', ' ');
    notes_.push_back(std::move(line));
  }

  [[nodiscard]] std::string method() const {
    const Json method = sweep_.value("method", Json("grid"));
    if (method != "grid" && method != "random")
      refuse("method", method.dump() + " has no counterpart; known: grid, random");
    return method.get<std::string>();
  }

  /// A study draws from distributions, and combines values: each combination gets as many draws as
  /// leave about `cap` of them in all.
  void draw(const Json& parameters, Json& search, Json& cap) {
    if (!cap.is_number_integer())
      refuse("run_cap", "method random needs it: how many points are drawn");
    std::int64_t combined = 1;
    bool drawn = false;
    for (const auto& [name, spec] : parameters.items()) {
      if (!spec.is_object()) continue;
      drawn = drawn || spec.contains("distribution");
      if (spec.contains("values")) combined *= std::ssize(spec["values"]);
      if (spec.contains("range"))
        combined *=
            std::llround(spec["range"][1].get<double>() - spec["range"][0].get<double>()) + 1;
    }
    const std::int64_t draws =
        drawn ? std::max<std::int64_t>(cap.get<std::int64_t>() / combined, 1) : 1;
    if (drawn) {
      search["samples"] = draws;
    } else {
      search["method"] = "grid";
    }
    if (combined > 1)
      note("values are combined, not drawn: " + std::to_string(combined) + " times " +
           std::to_string(draws));
    cap = std::max(cap.get<std::int64_t>(), combined * draws);
  }

  [[nodiscard]] std::string name() const {
    const Json given = sweep_.value("name", Json("sweep"));
    std::string out = given.is_string() ? given.get<std::string>() : "sweep";
    for (char& c : out) {
      const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                         (c >= '0' && c <= '9') || c == '_' || c == '-';
      if (!plain) c = '-';
    }
    return out.empty() ? "sweep" : out;
  }

  [[nodiscard]] Json metric() const {
    const Json& given = sweep_["metric"];
    Json out = Json::object();
    for (const auto& [key, value] : given.items()) {
      if (key != "name" && key != "goal" && key != "target")
        refuse("metric." + key, "unknown key; known: name, goal, target");
      out[key] = value;
    }
    return out;
  }

  Json parameters_of(const Json& given, const std::string& scope) {
    Json out = Json::object();
    for (const auto& [key, spec] : given.items()) {
      const std::string name = scope.empty() ? key : scope + "." + key;
      if (spec.is_object() && spec.contains("parameters")) {
        out.update(parameters_of(spec["parameters"], name));
      } else {
        out[name] = one(spec, "parameters." + name);
      }
    }
    return out;
  }

  [[nodiscard]] Json one(const Json& spec, const std::string& path) const {
    if (!spec.is_object()) refuse(path, "expects a mapping, such as {values: [1, 2]}");
    if (spec.contains("value")) return spec["value"];
    if (spec.contains("values")) {
      const Json& values = spec["values"];
      if (!values.is_array() || values.empty()) refuse(path + ".values", "expects a list");
      for (const Json& value : values)
        if (!value.is_primitive()) refuse(path + ".values", "expects scalars");
      return {{"values", values}};
    }
    if (!spec.contains("min") || !spec.contains("max") || !spec["min"].is_number() ||
        !spec["max"].is_number())
      refuse(path, "expects value, values, or the numbers min and max");
    const double min = spec["min"], max = spec["max"];
    const bool whole = spec["min"].is_number_integer() && spec["max"].is_number_integer();
    if (!(min < max || (whole && min == max))) refuse(path, "expects min < max");
    if (spec.contains("distribution") && !spec["distribution"].is_string())
      refuse(path + ".distribution", "expects a name");
    const std::string law = spec.value("distribution", whole ? "int_uniform" : "uniform");
    if (law == "int_uniform") {
      if (max - min > 1000) refuse(path, "int_uniform of more than 1000 numbers: give values");
      return {{"range", {spec["min"], spec["max"], 1}}};
    }
    if (method() == "grid") refuse(path, "a grid needs values");
    if (law == "uniform") return {{"distribution", "uniform"}, {"min", min}, {"max", max}};
    if (law == "log_uniform_values" && !(min > 0)) refuse(path, "expects min > 0");
    if (law == "log_uniform_values")
      return {{"distribution", "log_uniform"}, {"min", min}, {"max", max}};
    if (law == "log_uniform")  // of exponents of e
      return {{"distribution", "log_uniform"}, {"min", std::exp(min)}, {"max", std::exp(max)}};
    refuse(path, "distribution '" + law +
                     "' has no counterpart; known: constant, categorical, int_uniform, uniform, "
                     "log_uniform, log_uniform_values");
  }

  /// With the words that W&B fills in, and those of parameters.
  [[nodiscard]] Json command(const Json& parameters) const {
    const Json program = sweep_.value("program", Json());
    Json given = sweep_.value("command", Json());
    if (given.is_null()) given = {"${env}", "${interpreter}", "${program}", "${args}"};
    if (!given.is_array() || given.empty())
      refuse("command", "expects a list, [PROGRAM, ARGUMENT, …]");
    Json out = Json::array();
    for (const Json& entry : given) {
      const std::string word = entry.is_string() ? entry.get<std::string>() : entry.dump();
      const auto add_args = [&](const std::string& dashes) {
        for (const auto& [name, spec] : parameters.items())
          out.push_back(dashes + name + "={" + name + "}");
      };
      if (word == "${env}") {
        out.push_back("/usr/bin/env");
      } else if (word == "${interpreter}") {
        out.push_back("python3");
      } else if (word == "${program}") {
        if (!program.is_string()) refuse("program", "is required without --base");
        out.push_back(program);
      } else if (word == "${args}" || word == "${args_no_boolean_flags}") {
        add_args("--");
      } else if (word == "${args_no_hyphens}") {
        add_args("");
      } else if (word.find("${") != std::string::npos) {
        refuse("command", "'" + word + "' has no counterpart");
      } else {
        out.push_back(word);
      }
    }
    return out;
  }

  const std::string source_, base_;
  const Json sweep_;
  std::vector<std::string> notes_;
};

}  // namespace

std::string study_of_sweep(const std::string& text, const std::string& source,
                           const std::string& base) {
  return Sweep(text, source, base).study();
}

}  // namespace orthrus::runner
