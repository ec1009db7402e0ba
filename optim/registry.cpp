// The table of rules: all there is can be read here.
#include <orthrus/error.hpp>

#include "optim/rule.hpp"

namespace orthrus::optim {

// One file, one rule, one row.
RuleRow adamw_row();
RuleRow lion_row();
RuleRow muon_row();
RuleRow normuon_row();
RuleRow sgd_row();

std::span<const RuleRow> rules() {
  static const std::vector<RuleRow> table = [] {
    std::vector<RuleRow> rows;
    rows.push_back(adamw_row());
    rows.push_back(lion_row());
    rows.push_back(muon_row());
    rows.push_back(normuon_row());
    rows.push_back(sgd_row());
    return rows;
  }();
  return table;
}

const RuleRow* find_rule(std::string_view name) {
  for (const RuleRow& row : rules()) {
    if (row.name == name) return &row;
  }
  return nullptr;
}

RuleConfig with_defaults(RuleConfig config) {
  const RuleRow* row = find_rule(config.name);
  if (row == nullptr) {
    std::string known;
    for (const RuleRow& r : rules()) known += (known.empty() ? "" : ", ") + std::string(r.name);
    throw ConfigError("'" + config.name + "' is not a rule; known: " + known);
  }
  for (const RuleKey& key : row->keys) {
    config.values.try_emplace(std::string(key.name), key.default_value);
  }
  return config;
}

std::unique_ptr<Rule> make_rule(const RuleConfig& config) {
  const RuleConfig full = with_defaults(config);
  return find_rule(full.name)->make(full);
}

}  // namespace orthrus::optim
