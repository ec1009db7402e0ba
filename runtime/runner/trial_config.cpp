#include "runtime/runner/trial_config.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <orthrus/error.hpp>
#include <string_view>

#include "optim/rule.hpp"
#include "runtime/config_scalar.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::runner {

using runtime::config_file::shortest;

std::string text_of(const Json& json) {
  if (json.is_string()) return json.get<std::string>();
  return json.is_number_float() ? shortest(json.get<double>()) : json.dump();
}

double rate_of(const GroupConfig& group) {
  const auto lr = group.rule.values.find("lr");
  if (lr == group.rule.values.end()) return 0;
  const double* const value = std::get_if<double>(&lr->second);
  return value == nullptr ? 0 : *value;
}

void override_rule(const Config& base, const std::string& key, double value,
                   std::vector<std::string>& out) {
  const GroupConfig& main = base.groups.at(main_group(base));
  for (std::size_t g = 0; g < base.groups.size(); ++g) {
    if (base.groups[g].rule.name != main.rule.name) continue;
    const double own = rate_of(base.groups[g]), of_main = rate_of(main);
    const bool scaled = key == "lr" && own != of_main && of_main > 0;
    out.push_back(fmt::format("groups.{}.rule.{}={}", g, key,
                              shortest(scaled ? value * own / of_main : value)));
  }
}

void override_beta2(const Config& base, double value, std::vector<std::string>& out) {
  const std::size_t before = out.size();
  for (std::size_t g = 0; g < base.groups.size(); ++g) {
    const RuleConfig rule = optim::with_defaults(base.groups[g].rule);
    if (rule.values.contains("betas"))
      out.push_back(fmt::format("groups.{}.rule.betas.1={}", g, shortest(value)));
  }
  if (out.size() == before) throw ConfigError("beta2: no group has a rule with betas");
}

std::string Trial::directory() const { return fmt::format("{:04}-{}", index, id); }

std::vector<Decay> decays_of(const Study& study, std::int64_t steps) {
  std::vector<Decay> out;
  for (std::int64_t k = study.decay_horizons - 1; k >= 0; --k) {
    const auto horizon = static_cast<std::int64_t>(
        std::llround(static_cast<double>(steps) * std::exp2(-0.5 * static_cast<double>(k))));
    const std::int64_t fork =
        horizon -
        std::max<std::int64_t>(1, std::llround(study.decay_frac * static_cast<double>(horizon)));
    if (fork > 0 && (out.empty() || fork > out.back().fork)) out.push_back({fork, horizon});
  }
  return out;
}

Config decay_config(const Study& study, Config trial, const Decay& decay) {
  trial.train.steps = decay.steps;
  for (GroupConfig& group : trial.groups) {
    group.schedule.kind = "wsd";
    group.schedule.decay_steps = decay.steps - decay.fork;
    group.schedule.final = study.decay_final;
  }
  return trial;
}

Config default_base(const std::string& rule) {
  const optim::RuleRow* const row = optim::find_rule(rule);
  if (row == nullptr) {
    std::vector<std::string_view> known;
    for (const optim::RuleRow& r : optim::rules()) known.push_back(r.name);
    throw ConfigError("search.parameters.optimizer: '" + rule +
                      "' is neither in `bases` nor a rule; rules: " +
                      runtime::config_file::join(known) + runtime::nearest_hint(rule, known));
  }
  std::string text = "schema: 1\ngroups:\n  - {match: \"*\", rule: {name: " + rule + "}}\n";
  if (row->matrix) text += "  - {match: \"*\", rule: {name: adamw}}\n";
  return parse_config(text, "the default base of " + rule);
}

std::vector<std::string> base_words(const Study& study) {
  std::vector<std::string> words;
  const auto add = [&](const Json& value) {
    const std::string word = text_of(value);
    if (std::find(words.begin(), words.end(), word) == words.end()) words.push_back(word);
  };
  if (const ParameterSpec* const optimizer = study.find("optimizer")) {
    for (const Json& value : optimizer->values) add(value);
  }
  for (const Json& point : study.points) {
    if (point.contains("optimizer")) add(point["optimizer"]);
  }
  if (!study.configures()) return {};
  if (words.empty()) return {""};
  if (!study.base.empty()) {
    throw ConfigError(study.source +
                      ": base: the parameter optimizer selects among several; give `bases`, a file "
                      "for each of its words, instead");
  }
  for (const std::string& word : words) {
    if (!study.bases.empty() && study.bases.count(word) == 0)
      throw ConfigError(study.source + ": bases: no file for the optimizer '" + word + "'");
  }
  return words;
}

std::size_t main_group(const Config& config) {
  for (std::size_t g = 0; g < config.groups.size(); ++g) {
    const optim::RuleRow* const rule = optim::find_rule(config.groups[g].rule.name);
    if (rule != nullptr && rule->matrix) return g;
  }
  return 0;
}

std::optional<double> main_rate(const Config& base) {
  if (base.groups.empty()) return {};
  const double rate = rate_of(base.groups[main_group(base)]);
  return rate > 0 ? std::optional(rate) : std::nullopt;
}

Config trial_config(const Config& base, const Trial& trial) {
  return parse_config(to_yaml(base), base.source, trial.overrides);
}

Config fork_config(const Config& base, const Trial& trial) {
  std::vector<std::string> overrides = trial.overrides;
  overrides.insert(overrides.end(), trial.fork_overrides.begin(), trial.fork_overrides.end());
  return parse_config(to_yaml(base), base.source, overrides);
}

std::string filled(const std::string& word, const Trial& trial,
                   const std::map<std::string, std::string>& places) {
  std::string out;
  for (std::size_t at = 0; at < word.size();) {
    const std::size_t open = word.find('{', at);
    const std::size_t close = open == std::string::npos ? open : word.find('}', open);
    if (close == std::string::npos) return out + word.substr(at);
    const std::string name = word.substr(open + 1, close - open - 1);
    out += word.substr(at, open - at);
    at = close + 1;
    if (const auto place = places.find(name); place != places.end()) {
      out += place->second;
    } else if (trial.params.contains(name)) {
      out += text_of(trial.params[name]);
    } else if (name == "seed" || name == "ranks" || name == "steps" || name == "examples") {
      out += std::to_string(name == "seed"    ? trial.seed
                            : name == "ranks" ? trial.ranks
                            : name == "steps" ? trial.steps
                                              : trial.steps * trial.batch);
    } else if (std::find(trial_places.begin(), trial_places.end(), name) == trial_places.end()) {
      std::vector<std::string_view> known(trial_places.begin(), trial_places.end());
      known.insert(known.end(), {"seed", "ranks", "steps", "examples"});
      for (const auto& [parameter, value] : trial.params.items()) known.push_back(parameter);
      throw ConfigError("task.command, execution.launcher: nothing is called '{" + name +
                        "}'; known: " + runtime::config_file::join(known) +
                        runtime::nearest_hint(name, known));
    }
  }
  return out;
}

}  // namespace orthrus::runner
