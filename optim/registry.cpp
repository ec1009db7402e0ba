// The table of rules: all there is can be read here.
#include <cmath>
#include <orthrus/error.hpp>

#include "optim/rule.hpp"

namespace orthrus::optim {

// One file, one rule, one row.
RuleRow adamw_row();
RuleRow bidirectional_prism_row();
RuleRow kl_shampoo_row();
RuleRow lion_row();
RuleRow muon_row();
RuleRow normuon_row();
RuleRow one_sided_shampoo_row();
RuleRow prism_row();
RuleRow sgd_row();
RuleRow shampoo_row();
RuleRow soap_row();

std::span<const RuleRow> rules() {
  static const std::vector<RuleRow> table = [] {
    std::vector<RuleRow> rows;
    rows.push_back(adamw_row());
    rows.push_back(bidirectional_prism_row());
    rows.push_back(kl_shampoo_row());
    rows.push_back(lion_row());
    rows.push_back(muon_row());
    rows.push_back(normuon_row());
    rows.push_back(one_sided_shampoo_row());
    rows.push_back(prism_row());
    rows.push_back(sgd_row());
    rows.push_back(shampoo_row());
    rows.push_back(soap_row());
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

std::int64_t whole_number(const RuleConfig& config, std::string_view key) {
  const double x = config.number(std::string(key));
  if (x != std::floor(x)) throw ConfigError("rule." + std::string(key) + " must be a whole number");
  return static_cast<std::int64_t>(x);
}

std::unique_ptr<Rule> make_rule(const RuleConfig& config) {
  const RuleConfig full = with_defaults(config);
  return find_rule(full.name)->make(full);
}

}  // namespace orthrus::optim
