#pragma once
/// @file
/// Recipe: what a group of parameters asks of the optimizer, as plain values.

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace orthrus {

/// A hyper-parameter: flag, number, word or list of numbers.
using Value = std::variant<bool, double, std::string, std::vector<double>>;

/// `rule:` — its name and every hyper-parameter the rule knows, defaults filled in. Which keys a
/// rule has is a row of optim/registry.cpp (`orthrus info --rules` prints them).
struct RuleConfig {
  std::string name;
  std::map<std::string, Value> values;

  [[nodiscard]] double number(const std::string& key) const {
    return std::get<double>(values.at(key));
  }
  [[nodiscard]] bool flag(const std::string& key) const { return std::get<bool>(values.at(key)); }
  [[nodiscard]] const std::string& word(const std::string& key) const {
    return std::get<std::string>(values.at(key));
  }
  [[nodiscard]] const std::vector<double>& numbers(const std::string& key) const {
    return std::get<std::vector<double>>(values.at(key));
  }
  friend bool operator==(const RuleConfig&, const RuleConfig&) = default;
};

/// `lmo:` — the norm whose unit ball a matrix rule steps in, and how its maximizer is computed.
struct LmoConfig {
  std::string norm = "spectral";  ///< spectral | frobenius | sign | row | column
  /// A Newton–Schulz table, "rational", or "auto": `rational` where it is faster, else iterations
  /// made for `tolerance` and `lower`.
  std::string coefficients = "polar_express_101";
  int iterations = 5;  ///< of the table
  std::string scale =
      "original";  ///< original | match_rms_adamw | rms_to_rms | rms_to_rms_max | spectral
  std::string eps_mode = "none";  ///< none | add | clamp
  double eps = 1e-7;
  std::string dtype = "f32";  ///< of the iteration: f32 | bf16
  int terms = 3;              ///< of the rational function: 2 to 4
  /// auto: singular values from `lower` on come within `tolerance` of 1. Units of `lower`: the
  /// largest of them where it resolves to rational, else the Frobenius norm.
  double tolerance = 0.1;
  double lower = 5e-3;
  friend bool operator==(const LmoConfig&, const LmoConfig&) = default;
};

/// `schedule:` — multiplies lr. Step t = 1 is the first.
struct ScheduleConfig {
  std::string kind = "constant";  ///< constant | cosine | wsd
  std::int64_t warmup_steps = 0;  ///< linear from 0
  std::int64_t decay_steps = 0;   ///< cosine: to here from the end of warm-up; wsd: length of the
                                  ///< last decay; 0: to train.steps
  double final = 0.0;             ///< fraction of lr at the end
  friend bool operator==(const ScheduleConfig&, const ScheduleConfig&) = default;
};

/// `weights.eco:` — how what rounding loses goes into the momentum (`residual: momentum`).
struct EcoConfig {
  /// exact | blog | paper | exact_schedule: optim/eco.hpp.
  std::string kappa = "exact";
  /// The correction of a matrix (of a row, where the rule is element-wise) is at most this share of
  /// its momentum's norm; 0: not bounded; −1: 0.7·√(1 − β²) where the step's length does not depend
  /// on the momentum's (Muon, Lion), else not bounded.
  double max_rel_correction = -1;
  /// Nothing goes into the momentum once lr is below this share of its peak.
  double lr_floor = 1e-3;
  friend bool operator==(const EcoConfig&, const EcoConfig&) = default;
};

/// `weights:` — how weights rest between steps.
struct WeightsConfig {
  std::string format = "f32";        ///< f32 | bf16 | fp8_e4m3 | fp8_e5m2 | int8 | int4
  std::string rounding = "nearest";  ///< nearest | stochastic
  /// What rounding loses: `none` forgets it, `momentum` lets the momentum bring it back (ECO),
  /// `master` keeps f32 weights beside (sharded: 4/S bytes each), `mantissa` the 16 bits that bf16
  /// has not (2/S).
  std::string residual = "none";
  /// What shares a scale: tensor | row | block; auto: block where `block` says how long, else row.
  std::string scale = "auto";
  std::int64_t block = 0;            ///< columns; 0: not said
  std::string scale_format = "f32";  ///< f32 | pow2
  EcoConfig eco = {};
  friend bool operator==(const WeightsConfig&, const WeightsConfig&) = default;
};

/// `state:` — how what a rule keeps rests between steps. Second moments and numbers per line stay
/// f32.
struct StateConfig {
  std::string momentum = "f32";  ///< f32 | bf16 | int8, the latter two rounded stochastically
  std::int64_t block = 128;      ///< of int8: columns of a row that share a scale
  friend bool operator==(const StateConfig&, const StateConfig&) = default;
};

}  // namespace orthrus
