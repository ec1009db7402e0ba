#pragma once
/// @file
/// Trial: one run of a study, and the configuration that its parameters make of a base.

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <orthrus/config.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/runner/study_file.hpp"

namespace orthrus::runner {

struct Trial {
  std::int64_t index = 0;
  std::string id;
  std::string role = "only";           ///< tune | report | only: which list its seed is of
  Json params;                         ///< swept, fixed and derived, in the order of the file
  std::string base;                    ///< key of the base configurations; where there are any
  std::vector<std::string> overrides;  ///< of the base: key.path=value
  /// Of a branch: the base run up to the fork, as its identity and as overrides beside those above.
  std::string fork;
  std::vector<std::string> fork_overrides;
  std::int64_t ranks = 1, batch = 0, steps = 0;  ///< from the fork on
  int cell = -1, place = 0;                      ///< where its rate lies in which grid; -1: in none
  std::size_t level = 0;                         ///< of method telescoping: which size,
  std::vector<int> places;                       ///< and where in the grid
  std::vector<std::int64_t> rungs;               ///< of method asha: steps, before the last
  std::int64_t until = 0;  ///< the rung it waits on for the others; 0: it goes to its end
  std::int64_t seed = 0;

  /// What it is expected to take, up to a factor that all trials share.
  [[nodiscard]] double cost() const {
    return static_cast<double>((until > 0 ? until : steps) * batch) / static_cast<double>(ranks);
  }
  /// "0042-3fa9c1…": of its directory.
  [[nodiscard]] std::string directory() const;
};

/// A decaying run of `steps` steps that leaves a constant one after `fork` of them.
struct Decay {
  std::int64_t fork = 0, steps = 0;
};
/// Those of a trial of a study with `wsd_branch`, shortest first; none that has nothing before it.
[[nodiscard]] std::vector<Decay> decays_of(const Study& study, std::int64_t steps);
/// Its configuration: that of a run from the start under `wsd`.
[[nodiscard]] Config decay_config(const Study& study, Config trial, const Decay& decay);

/// Base configurations: of each word of `optimizer`, or of "" where there is one for all.
using Bases = std::map<std::string, Config>;

/// The base of a study that names none: the rule of that name, AdamW for what it passes over.
[[nodiscard]] Config default_base(const std::string& rule);
/// The words of `optimizer` that need a base; {""} where there is one for all.
[[nodiscard]] std::vector<std::string> base_words(const Study& study);

/// The group whose rule a study's parameters address: the first of a matrix rule, else the first.
[[nodiscard]] std::size_t main_group(const Config& config);
/// The rate that the parameter `lr` replaces: of the main group. Groups of the same rule keep their
/// ratio to it; those of another rule keep their rates.
[[nodiscard]] std::optional<double> main_rate(const Config& base);
/// The rate of a group; 0 where its rule has none.
[[nodiscard]] double rate_of(const GroupConfig& group);
/// Sets a key of the main group's rule in every group of that rule. Rates keep their ratios.
void override_rule(const Config& base, const std::string& key, double value,
                   std::vector<std::string>& out);
/// Sets the second of `betas` in every group whose rule has them.
/// @throws ConfigError  where none has.
void override_beta2(const Config& base, double value, std::vector<std::string>& out);
/// A parameter's value, as an override says it.
[[nodiscard]] std::string text_of(const Json& json);
/// The configuration of a trial. @throws ConfigError  naming the parameter.
[[nodiscard]] Config trial_config(const Config& base, const Trial& trial);
/// Of the base run of a branch.
[[nodiscard]] Config fork_config(const Config& base, const Trial& trial);

/// Paths that a trial's program asks for by name.
inline constexpr std::array<std::string_view, 3> trial_places{"config", "metrics", "trial_dir"};
/// A word of `task.command` with a trial's values for the names in braces.
/// @param places  of `trial_places`; those that are not there stay empty
/// @throws ConfigError  a name that is nothing's.
[[nodiscard]] std::string filled(const std::string& word, const Trial& trial,
                                 const std::map<std::string, std::string>& places);

}  // namespace orthrus::runner
