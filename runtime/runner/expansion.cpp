#include "runtime/runner/expansion.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <orthrus/error.hpp>
#include <orthrus/studies/theory.hpp>
#include <set>
#include <stdexcept>
#include <string_view>

#include "optim/rule.hpp"
#include "runtime/config_scalar.hpp"
#include "runtime/studies/random.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::runner {
namespace {

using runtime::config_file::shortest;

// Parameters that say something to a trial; names with dots are keys of its configuration, others
// only serve expressions.
constexpr std::array<std::string_view, 9> known_parameters{
    "optimizer",    "batch_size", "lr",    "seed",           "ranks",
    "weight_decay", "momentum",   "beta2", "warmup_examples"};

const Json* find(const Point& point, const std::string& name) {
  const auto found =
      std::find_if(point.begin(), point.end(), [&](const auto& p) { return p.first == name; });
  return found == point.end() ? nullptr : &found->second;
}

Value value_of(const Json& json) {
  if (json.is_boolean()) return json.get<bool>() ? 1.0 : 0.0;
  if (json.is_number()) return json.get<double>();
  return json.get<std::string>();
}

double number_of(const Json& json, const std::string& name) {
  if (!json.is_number()) throw ConfigError(name + ": expects a number, found " + json.dump());
  return json.get<double>();
}

std::string text_of(const Json& json) {
  if (json.is_string()) return json.get<std::string>();
  return json.is_number_float() ? shortest(json.get<double>()) : json.dump();
}

std::string describe(const Point& point) {
  std::string out;
  for (const auto& [name, value] : point)
    out += (out.empty() ? "" : ", ") + name + "=" + text_of(value);
  return out;
}

double rate_of(const GroupConfig& group) {
  const auto lr = group.rule.values.find("lr");
  if (lr == group.rule.values.end()) return 0;
  const double* const value = std::get_if<double>(&lr->second);
  return value == nullptr ? 0 : *value;
}

/// Sets a key of the main group's rule in every group of that rule. Rates keep their ratios.
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

/// Sets the second of `betas` in every group whose rule has them.
void override_beta2(const Config& base, double value, std::vector<std::string>& out) {
  const std::size_t before = out.size();
  for (std::size_t g = 0; g < base.groups.size(); ++g) {
    const RuleConfig rule = optim::with_defaults(base.groups[g].rule);
    if (rule.values.contains("betas"))
      out.push_back(fmt::format("groups.{}.rule.betas.1={}", g, shortest(value)));
  }
  if (out.size() == before) throw ConfigError("beta2: no group has a rule with betas");
}

}  // namespace

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

Expansion::Expansion(Study study, Bases bases)
    : study_(std::move(study)), bases_(std::move(bases)) {
  check_names();
  const std::vector<std::vector<Point>> dims = dimensions();
  double points = 1;
  for (const auto& dim : dims) points *= static_cast<double>(dim.size());
  if (points > 1e6) {
    throw ConfigError(fmt::format("{}: search: {:.0f} points; a study has at most a million",
                                  study_.source, points));
  }
  std::vector<std::size_t> at(dims.size(), 0);
  for (bool more = points > 0; more;) {
    Point point;
    for (std::size_t d = 0; d < dims.size(); ++d)
      point.insert(point.end(), dims[d][at[d]].begin(), dims[d][at[d]].end());
    add_point(in_order(std::move(point)));
    more = false;
    for (std::size_t d = dims.size(); d-- > 0 && !more;) {
      more = ++at[d] < dims[d].size();
      if (!more) at[d] = 0;
    }
  }
  if (initial_.empty()) throw ConfigError(study_.source + ": search: no point is left to be tried");

  if (study_.telescopes()) place_in_grids();
  std::int64_t next = std::ssize(initial_);
  for (Cell& cell : cells_) {
    cell.first_index = next;
    if (cell.grids.empty()) continue;
    for (std::size_t level = 1; level < cell.levels.size(); ++level) {
      std::int64_t points = std::max<std::int64_t>(std::ssize(cell.seeds), 1);
      for (std::size_t g = 0; g < cell.grids.size(); ++g) points *= points_at(level);
      next += points;
    }
  }
  if (study_.tunes()) {
    const ParameterSpec& seed = *study_.find("seed");
    const std::int64_t added =
        std::ssize(seed.report) + 2 * study_.find("lr")->extend_on_edge * std::ssize(seed.tune);
    for (Cell& cell : cells_) {
      cell.first_index = next;
      next += added;
    }
  }
  most_ = next;
  if (most_ > study_.run_cap) {
    throw ConfigError(fmt::format(
        "{}: budget.run_cap: {} trials{} are more than {}", study_.source, most_,
        most_ > std::ssize(initial_) ? fmt::format(" ({} of the file, up to {} that results add)",
                                                   initial_.size(), most_ - std::ssize(initial_))
                                     : "",
        study_.run_cap));
  }
}

void Expansion::check_names() const {
  std::set<std::string> used, words;
  std::vector<std::string_view> parameters(known_parameters.begin(), known_parameters.end());
  for (const Expression& e : study_.exclude) used.insert(e.names().begin(), e.names().end());
  for (const auto& [name, e] : study_.derive) {
    used.insert(e.names().begin(), e.names().end());
    parameters.push_back(name);
  }
  for (const auto& group : study_.zip) {
    for (const std::string& name : group) {
      if (study_.find(name) == nullptr)
        throw ConfigError(study_.source + ": search.zip: '" + name + "' is no parameter");
    }
  }
  for (const ParameterSpec& spec : study_.parameters) {
    parameters.push_back(spec.name);
    for (const Json& value : spec.values) {
      if (value.is_string()) words.insert(value.get<std::string>());
    }
    // A program takes any name.
    const bool speaks = study_.runs_command() ||
                        std::find(known_parameters.begin(), known_parameters.end(), spec.name) !=
                            known_parameters.end() ||
                        spec.name.find('.') != std::string::npos || used.count(spec.name) > 0 ||
                        (study_.find("lr") != nullptr && study_.find("lr")->center &&
                         study_.find("lr")->center->per == spec.name);
    if (!speaks) {
      throw ConfigError(
          spec.origin.str() + ": search.parameters." + spec.name +
          ": says nothing to a trial, and no expression uses it; known: " +
          runtime::config_file::join({known_parameters.begin(), known_parameters.end()}) +
          ", keys of the configuration with dots" +
          runtime::nearest_hint(spec.name, {known_parameters.begin(), known_parameters.end()}));
    }
  }
  for (const Json& point : study_.points) {
    for (const auto& [name, value] : point.items()) {
      if (value.is_string()) words.insert(value.get<std::string>());
    }
  }
  parameters.insert(parameters.end(), {"max_examples", "max_steps"});
  for (const std::string& name : used) {
    bool known = std::find(parameters.begin(), parameters.end(), name) != parameters.end() ||
                 words.count(name) > 0;
    for (const Json& point : study_.points) known = known || point.contains(name);
    if (!known) {
      throw ConfigError(study_.source + ": search: an expression names '" + name +
                        "', which is neither a parameter nor a word of one" +
                        runtime::nearest_hint(name, parameters));
    }
  }
}

/// What is combined with what: parameters that advance together are one dimension.
std::vector<std::vector<Point>> Expansion::dimensions() const {
  std::vector<std::vector<Point>> dims;
  if (!study_.points.empty()) {
    std::vector<Point> listed;
    for (const Json& given : study_.points) {
      Point point;
      for (const auto& [name, value] : given.items()) point.emplace_back(name, value);
      listed.push_back(std::move(point));
    }
    dims.push_back(std::move(listed));
  }

  const auto values_of = [](const ParameterSpec& spec) {
    std::vector<Json> values = spec.values;
    for (const std::int64_t seed : spec.tune) values.emplace_back(seed);
    if (spec.center) {
      // Places for now: the rates depend on the point.
      const Center& c = *spec.center;
      const auto places = static_cast<int>(std::lround((c.last - c.first) / c.step)) + 1;
      for (int place = 0; place < places; ++place) values.emplace_back(place);
    }
    return values;
  };
  std::set<std::string> done;
  bool drawn = false;
  for (const ParameterSpec& spec : study_.parameters) {
    if (done.count(spec.name) > 0) continue;
    if (!spec.distribution.empty()) {
      if (std::exchange(drawn, true)) continue;
      std::vector<Point> draws;
      for (std::int64_t k = 0; k < study_.samples; ++k) {
        studies::Random random(static_cast<std::uint64_t>(study_.draw_seed),
                               static_cast<std::uint64_t>(k));
        Point point;
        for (const ParameterSpec& s : study_.parameters) {
          if (s.distribution.empty()) continue;
          const double u = random.uniform();
          point.emplace_back(s.name, s.distribution == "uniform"
                                         ? s.min + u * (s.max - s.min)
                                         : s.min * std::pow(s.max / s.min, u));
        }
        draws.push_back(std::move(point));
      }
      dims.push_back(std::move(draws));
      continue;
    }
    std::vector<std::string> together{spec.name};
    for (const auto& group : study_.zip) {
      if (std::find(group.begin(), group.end(), spec.name) != group.end()) together = group;
    }
    std::vector<Point> dim(values_of(spec).size());
    for (const std::string& name : together) {
      const std::vector<Json> values = values_of(*study_.find(name));
      if (values.size() != dim.size()) {
        throw ConfigError(fmt::format("{}: search.zip: {} has {} values, {} has {}", study_.source,
                                      spec.name, dim.size(), name, values.size()));
      }
      for (std::size_t i = 0; i < values.size(); ++i) dim[i].emplace_back(name, values[i]);
      done.insert(name);
    }
    dims.push_back(std::move(dim));
  }
  return dims;
}

Point Expansion::in_order(Point point) const {
  const auto rank = [this](const std::string& name) {
    return std::find_if(study_.parameters.begin(), study_.parameters.end(),
                        [&](const ParameterSpec& p) { return p.name == name; }) -
           study_.parameters.begin();
  };
  std::stable_sort(point.begin(), point.end(),
                   [&](const auto& a, const auto& b) { return rank(a.first) < rank(b.first); });
  return point;
}

std::string Expansion::base_of(const Point& point) const {
  const Json* const word = find(point, "optimizer");
  return word == nullptr ? "" : text_of(*word);
}

Expression::Lookup Expansion::variables(const Point& point) const {
  return [this, &point](const std::string& name) -> std::optional<Value> {
    if (const Json* const value = find(point, name)) return value_of(*value);
    if (name == "max_examples") return static_cast<double>(study_.max_examples);
    if (name == "max_steps") return static_cast<double>(study_.max_steps);
    if (name == "batch_size" && study_.configures())
      return static_cast<double>(bases_.at(base_of(point)).train.batch);
    return {};
  };
}

double Expansion::center_at(const Point& point) const {
  const ParameterSpec& lr = *study_.find("lr");
  const Center& center = *lr.center;
  std::string word;
  if (!center.per.empty()) {
    const Json* const value = find(point, center.per);
    if (value == nullptr) {
      throw ConfigError(lr.origin.str() + ": search.parameters.lr.center.per: '" + center.per +
                        "' is no parameter");
    }
    word = text_of(*value);
  }
  const auto value = center.values.find(word);
  if (value == center.values.end()) {
    throw ConfigError(lr.origin.str() + ": search.parameters.lr.center.value: no rate for '" +
                      word + "'");
  }
  if (center.reference_batch == 0) return value->second;
  const double batch = std::get<double>(*variables(point)("batch_size"));
  const auto rule = center.rule == "sqrt"     ? studies::LrRule::sqrt
                    : center.rule == "linear" ? studies::LrRule::linear
                    : center.rule == "surge"  ? studies::LrRule::surge
                                              : studies::LrRule::constant;
  return studies::scaled_lr(rule, value->second, center.reference_batch, batch, center.noise_scale);
}

double Expansion::value_at(const std::vector<double>& grid, int place) {
  const auto n = static_cast<int>(grid.size());
  if (place >= 0 && place < n) return grid[static_cast<std::size_t>(place)];
  if (n == 1) return grid[0] * std::exp2(0.5 * place);
  // On with the ratio of the last two.
  const double low = grid[0] / grid[1];
  const double high = grid[grid.size() - 1] / grid[grid.size() - 2];
  return place < 0 ? grid.front() * std::pow(low, -place)
                   : grid.back() * std::pow(high, place - n + 1);
}

bool Expansion::is_excluded(const Point& point) const {
  try {
    return std::any_of(study_.exclude.begin(), study_.exclude.end(),
                       [&](const Expression& e) { return e.truth(variables(point)); });
  } catch (const std::invalid_argument& wrong) {
    throw ConfigError(study_.source + ": search.exclude: " + wrong.what());
  }
}

Expansion::Cell& Expansion::cell_of(const Point& rest) {
  const auto cell =
      std::find_if(cells_.begin(), cells_.end(), [&](const Cell& c) { return c.point == rest; });
  if (cell != cells_.end()) return *cell;
  cells_.emplace_back();
  cells_.back().point = rest;
  return cells_.back();
}

void Expansion::add_point(Point point) {
  const ParameterSpec* const lr = study_.find("lr");
  const auto entry =
      std::find_if(point.begin(), point.end(), [](const auto& p) { return p.first == "lr"; });
  if (lr != nullptr && lr->center && entry != point.end()) {
    const Center& c = *lr->center;
    entry->second = center_at(point) * std::exp2(c.first + c.step * entry->second.get<int>());
  }
  std::optional<int> telescope;
  if (study_.telescopes() && !(telescope = add_level(point))) return;
  if (is_excluded(point)) {
    ++excluded_;
    return;
  }
  Trial trial = make_trial(point, std::ssize(initial_));
  if (!ids_.insert(trial.id).second) {
    ++equal_;
    return;
  }
  if (telescope) {
    trial.cell = *telescope;
    add_to_grids(cells_[static_cast<std::size_t>(*telescope)], point);
  } else if (study_.tunes() || study_.halves()) {
    Point rest;
    for (const auto& p : point) {
      const ParameterSpec* const spec = study_.find(p.first);
      const bool drawn = spec != nullptr && !spec->distribution.empty();
      if (p.first != "lr" && p.first != "seed" && !(study_.halves() && drawn)) rest.push_back(p);
    }
    const std::size_t known = cells_.size();
    Cell& cell = cell_of(rest);
    if (cells_.size() > known) {
      if (study_.halves()) {
        cell.rungs = trial.rungs;
      } else if (lr->center) {
        const Center& c = *lr->center;
        const double center = center_at(point);
        const auto places = static_cast<int>(std::lround((c.last - c.first) / c.step)) + 1;
        for (int k = 0; k < places; ++k)
          cell.rates.push_back(center * std::exp2(c.first + c.step * k));
      } else {
        for (const Json& value : lr->values) cell.rates.push_back(number_of(value, "lr"));
        std::sort(cell.rates.begin(), cell.rates.end());
      }
    }
    trial.cell = static_cast<int>(&cell - cells_.data());
    if (cell.rungs != trial.rungs) {
      throw ConfigError(study_.source + ": search.method: asha compares trials of " +
                        describe(rest) + ", whose rungs differ");
    }
    if (study_.tunes()) trial.role = "tune";
    if (!cell.rates.empty()) {
      const double rate = number_of(*find(point, "lr"), "lr");
      trial.place = static_cast<int>(std::find(cell.rates.begin(), cell.rates.end(), rate) -
                                     cell.rates.begin());
    }
  }
  initial_.push_back(std::move(trial));
}

// ---- telescopes ---------------------------------------------------------------------------------

/// Notes the size of a point. @return its cell, where it is the least, whose grid is whole.
std::optional<int> Expansion::add_level(const Point& point) {
  const Telescope& telescope = study_.telescope;
  const std::vector<Json>& sizes = study_.find(telescope.over)->values;
  const auto less = [](const Json& a, const Json& b) { return a.get<double>() < b.get<double>(); };
  std::vector<std::string> together{telescope.over};
  for (const auto& group : study_.zip) {
    if (std::find(group.begin(), group.end(), telescope.over) != group.end()) together = group;
  }
  const auto in = [](const std::vector<std::string>& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  Point rest, level;
  for (const auto& p : point) {
    if (in(together, p.first)) {
      level.push_back(p);
    } else if (!in(telescope.of, p.first) && p.first != "seed") {
      rest.push_back(p);
    }
  }
  Cell& cell = cell_of(rest);
  if (std::find(cell.levels.begin(), cell.levels.end(), level) == cell.levels.end()) {
    cell.levels.push_back(std::move(level));
    std::sort(cell.levels.begin(), cell.levels.end(), [&](const Point& a, const Point& b) {
      return less(*find(a, telescope.over), *find(b, telescope.over));
    });
  }
  if (*find(point, telescope.over) != *std::min_element(sizes.begin(), sizes.end(), less))
    return {};
  return static_cast<int>(&cell - cells_.data());
}

void Expansion::add_to_grids(Cell& cell, const Point& point) {
  const std::vector<std::string>& of = study_.telescope.of;
  cell.grids.resize(of.size());
  for (std::size_t g = 0; g < of.size(); ++g) {
    const double value = number_of(*find(point, of[g]), of[g]);
    std::vector<double>& grid = cell.grids[g];
    if (std::find(grid.begin(), grid.end(), value) == grid.end()) grid.push_back(value);
  }
  const Json* const seed = find(point, "seed");
  if (seed != nullptr && std::find(cell.seeds.begin(), cell.seeds.end(), *seed) == cell.seeds.end())
    cell.seeds.push_back(*seed);
}

/// Now that the grids are whole.
void Expansion::place_in_grids() {
  for (Cell& cell : cells_) {
    for (std::vector<double>& grid : cell.grids) std::sort(grid.begin(), grid.end());
  }
  for (Trial& trial : initial_) {
    const Cell& cell = cells_[static_cast<std::size_t>(trial.cell)];
    for (std::size_t g = 0; g < cell.grids.size(); ++g) {
      const double value = trial.params.at(study_.telescope.of[g]).get<double>();
      trial.places.push_back(static_cast<int>(
          std::find(cell.grids[g].begin(), cell.grids[g].end(), value) - cell.grids[g].begin()));
    }
  }
}

std::int64_t Expansion::points_at(std::size_t level) const {
  const std::vector<std::int64_t>& points = study_.telescope.points;
  return points[std::min(level, points.size()) - 1];
}

std::optional<Trial> Expansion::telescoped(int cell, std::size_t level,
                                           const std::vector<int>& places, std::size_t seed,
                                           std::int64_t index) const {
  const Cell& of = cells_[static_cast<std::size_t>(cell)];
  const Telescope& telescope = study_.telescope;
  Point point = of.point;
  point.insert(point.end(), of.levels[level].begin(), of.levels[level].end());
  const double ratio = find(of.levels[level], telescope.over)->get<double>() /
                       find(of.levels[0], telescope.over)->get<double>();
  for (std::size_t g = 0; g < of.grids.size(); ++g) {
    const auto carry = telescope.carry.find(telescope.of[g]);
    const double exponent = carry == telescope.carry.end() ? 0 : carry->second;
    point.emplace_back(telescope.of[g],
                       value_at(of.grids[g], places[g]) * std::pow(ratio, exponent));
  }
  if (!of.seeds.empty()) point.emplace_back("seed", of.seeds[seed]);
  point = in_order(std::move(point));
  if (is_excluded(point)) return {};
  Trial trial = make_trial(point, index);
  trial.cell = cell;
  trial.level = level;
  trial.places = places;
  return trial;
}

std::optional<Trial> Expansion::with_seed(const Trial& of, std::int64_t seed,
                                          const std::string& role, std::int64_t index) const {
  Point point;
  for (const auto& entry : of.params.items()) {
    const std::string& name = entry.key();
    const bool derived = std::any_of(study_.derive.begin(), study_.derive.end(),
                                     [&](const auto& d) { return d.first == name; });
    if (!derived) point.emplace_back(name, name == "seed" ? Json(seed) : entry.value());
  }
  if (is_excluded(point)) return {};
  Trial trial = make_trial(point, index);
  trial.role = role;
  trial.cell = of.cell;
  return trial;
}

std::optional<Trial> Expansion::trial_of(int cell, int place, std::int64_t seed,
                                         const std::string& role, std::int64_t index) const {
  const Cell& of = cells_[static_cast<std::size_t>(cell)];
  Point point = of.point;
  point.emplace_back("lr", rate(of, place));
  point.emplace_back("seed", seed);
  point = in_order(std::move(point));
  if (is_excluded(point)) return {};
  Trial trial = make_trial(point, index);
  trial.role = role;
  trial.cell = cell;
  trial.place = place;
  return trial;
}

/// Turns a trial with the base run's rates into a branch and what comes before it.
void Expansion::make_branch(const Config& base, Trial& trial) const {
  const Config config = trial_config(base, trial);
  const std::int64_t batch = config.train.batch, examples = study_.max_examples;
  const auto refuse = [](const std::string& what) { throw ConfigError(what); };
  if (batch % study_.branch_batch != 0)
    refuse(fmt::format("batch_size: {} is no multiple of branch.batch = {}", batch,
                       study_.branch_batch));
  if (examples % batch != 0)
    refuse(
        fmt::format("budget.max_examples: {} is no multiple of batch_size = {}: branches see "
                    "the same examples",
                    examples, batch));
  const std::int64_t factor = batch / study_.branch_batch;
  trial.fork_overrides = {fmt::format("train.batch={}", study_.branch_batch),
                          fmt::format("train.steps={}", study_.branch_steps), "train.eval_every=0"};
  for (std::size_t g = 0; g < config.groups.size(); ++g) {
    const GroupConfig& group = config.groups[g];
    if (group.schedule.kind != "constant" || group.schedule.warmup_steps > study_.branch_steps)
      refuse(
          fmt::format("groups.{}.schedule: a fork needs a constant rate, and a warm-up that is "
                      "over after branch.steps = {}",
                      g, study_.branch_steps));
    const std::string rule = study_.branch_rate != "auto" ? study_.branch_rate
                             : group.rule.name == "sgd"   ? "linear"
                                                          : "sqrt";
    const auto k = static_cast<double>(factor);
    const double growth = rule == "linear" ? k : rule == "sqrt" ? std::sqrt(k) : 1;
    if (study_.resets() && group.schedule.warmup_steps > 0) {
      const std::string key = fmt::format("groups.{}.schedule.warmup_steps=", g);
      trial.fork_overrides.push_back(key + std::to_string(group.schedule.warmup_steps));
      trial.overrides.push_back(key + "0");
    }
    const double rate = rate_of(group);
    if (rate == 0) continue;
    trial.fork_overrides.push_back(fmt::format("groups.{}.rule.lr={}", g, shortest(rate)));
    trial.overrides.push_back(fmt::format("groups.{}.rule.lr={}", g, shortest(growth * rate)));
  }
  trial.fork = identity_of(to_json(runtime::parse_yaml(to_yaml(fork_config(base, trial)), "fork")));
}

/// A trial whose batch grows has as many examples as its budget, and fewer steps.
void Expansion::check_ramp(const Config& config) const {
  const auto refuse = [](const char* what) {
    throw ConfigError(std::string("gns_ramp.geometry: a batch that grows ") + what);
  };
  if (config.gns_ramp.price_second > 0)
    throw ConfigError(
        "gns_ramp.price.second: no two runs of a trial take as long; give a price of "
        "steps and examples");
  if (study_.has_target()) refuse("has no steps to a target at a batch: no search.metric.target");
  if (study_.branches() || study_.decays()) refuse("leaves no branches: no branch, no wsd_branch");
  if (study_.halves()) refuse("has no rungs at equal steps: no asha");
  if (study_.exclusive) refuse("has no time of a step: no execution.exclusive");
}

void Expansion::check_decays(const Config& config) const {
  const std::vector<Decay> decays = decays_of(study_, config.train.steps);
  if (decays.empty()) {
    throw ConfigError(
        fmt::format("wsd_branch: {} steps leave nothing before a decay", config.train.steps));
  }
  for (std::size_t g = 0; g < config.groups.size(); ++g) {
    const ScheduleConfig& schedule = config.groups[g].schedule;
    if (schedule.kind != "constant" || schedule.warmup_steps > decays.front().fork) {
      throw ConfigError(fmt::format(
          "groups.{}.schedule: a branch decays from a constant rate, after a warm-up of at most {} "
          "steps; this is {}, {} steps of warm-up",
          g, decays.front().fork, schedule.kind, schedule.warmup_steps));
    }
  }
}

Trial Expansion::make_trial(const Point& given, std::int64_t index) const try {
  Trial trial;
  trial.index = index;
  Point point = given;
  for (const auto& [name, expression] : study_.derive) {
    try {
      const Value value = expression.evaluate(variables(point));
      point.emplace_back(name, std::holds_alternative<double>(value)
                                   ? Json(std::get<double>(value))
                                   : Json(std::get<std::string>(value)));
    } catch (const std::invalid_argument& wrong) {
      throw ConfigError("search.derive." + name + ": " + wrong.what());
    }
  }
  trial.params = Json::object();
  for (const auto& [name, value] : point) {
    trial.params[name] = value;
    if (name == "batch_size") {
      trial.batch = static_cast<std::int64_t>(number_of(value, name));
      if (trial.batch < 1) throw ConfigError("batch_size: expects at least 1");
    } else if (name == "seed") {
      trial.seed = static_cast<std::int64_t>(number_of(value, name));
    } else if (name == "ranks") {
      trial.ranks = static_cast<std::int64_t>(number_of(value, name));
    }
  }
  if (find(point, "ranks") == nullptr) trial.ranks = study_.ranks_per_trial;

  Json all{{"metric", study_.metric},
           {"target", number(study_.target)},
           {"stop_on_target", study_.stop_on_target},
           {"diverged", study_.diverged},
           {"max_seconds", study_.max_seconds}};
  if (study_.goal != "minimize") all["goal"] = study_.goal;
  if (study_.configures()) {
    trial.base = base_of(given);
    all["config"] = configure(point, trial);
  } else {
    trial.batch = std::max<std::int64_t>(trial.batch, 1);
    trial.steps = budget_steps(trial.batch, 0);
    all["params"] = trial.params;
  }
  if (study_.runs_command()) {
    all["command"] = study_.command;
    all["steps"] = trial.steps;
    for (const std::string& word : study_.command) static_cast<void>(filled(word, trial, {}));
  }
  for (const std::string& word : study_.launcher) static_cast<void>(filled(word, trial, {}));
  if (study_.averages()) all["ema_halflife_examples"] = study_.ema_halflife_examples;
  if (!trial.rungs.empty()) all["rungs"] = trial.rungs;
  if (study_.decays())
    all["wsd_branch"] = {study_.decay_horizons, study_.decay_frac, study_.decay_final};
  if (study_.exclusive) all["ranks"] = trial.ranks;
  if (study_.timed_to > 0) all["timed_to"] = study_.timed_to;
  if (study_.branches()) all["fork"] = trial.fork;
  if (study_.branches() && study_.branch_rewarm_frac > 0) all["rewarm"] = study_.branch_rewarm_frac;
  if (study_.branches() && study_.resets()) all["optimizer_state"] = study_.branch_state;
  trial.id = identity_of(all);
  return trial;
} catch (const ConfigError& error) {
  throw ConfigError(
      fmt::format("{}: trial of {}: {}", study_.source, describe(given), error.what()));
}

/// The steps that the budget leaves to a trial, where it has a word in it.
std::int64_t Expansion::budget_steps(std::int64_t batch, std::int64_t otherwise) const {
  std::int64_t steps = otherwise;
  if (study_.max_examples > 0) steps = study_.max_examples / batch;
  if (study_.max_examples > 0 && steps < 1) {
    throw ConfigError(fmt::format("budget.max_examples: {} are less than one batch of {}",
                                  study_.max_examples, batch));
  }
  if (study_.max_steps > 0)
    steps = study_.max_examples > 0 ? std::min(steps, study_.max_steps) : study_.max_steps;
  return steps;
}

/// What a point asks of its base configuration: overrides, steps, rungs. @return the whole of it.
Json Expansion::configure(const Point& point, Trial& trial) const {
  const Config& base = bases_.at(trial.base);
  if (trial.batch == 0) trial.batch = base.train.batch;
  std::vector<std::string>& o = trial.overrides;
  o.emplace_back("name=trial");
  if (!study_.runs_command()) {
    for (const auto& [key, value] : study_.task.items())
      o.push_back("workload." + (key == "builtin" ? "name" : key) + "=" + text_of(value));
  }
  std::vector<std::string> dotted;
  double warmup_examples = -1;
  for (const auto& [name, value] : point) {
    if (name == "seed") {
      o.push_back("seed=" + text_of(value));
    } else if (name == "lr" || name == "weight_decay" || name == "momentum") {
      override_rule(base, name, number_of(value, name), o);
    } else if (name == "beta2") {
      override_beta2(base, number_of(value, name), o);
    } else if (name == "warmup_examples") {
      warmup_examples = number_of(value, name);
    } else if (name.find('.') != std::string::npos) {
      dotted.push_back(name + "=" + text_of(value));
    }
  }
  trial.steps = budget_steps(trial.batch, base.train.steps);
  if (warmup_examples >= 0) {
    // Ten steps at least: the first gradients are the largest.
    const double steps = std::ceil(warmup_examples / static_cast<double>(trial.batch));
    for (std::size_t g = 0; g < base.groups.size(); ++g)
      o.push_back(fmt::format("groups.{}.schedule.warmup_steps={:.0f}", g, std::max(10.0, steps)));
  }
  const double every = std::floor(study_.eval_every_frac * static_cast<double>(trial.steps));
  o.push_back(fmt::format("train.batch={}", trial.batch));
  o.push_back(fmt::format("train.steps={}", trial.steps));
  o.push_back(fmt::format("train.eval_every={:.0f}", std::max(1.0, every)));
  // Where a trial saves nothing, this is when auto decides: at every look, whatever the clock says.
  o.push_back(fmt::format("train.save_every={}", study_.advisor == "auto" ? study_.gns_every : 0));
  o.emplace_back("telemetry.path=");
  if (study_.gns_every > 0) {
    o.push_back(fmt::format("diagnostics.every_steps={}", study_.gns_every));
    o.push_back("diagnostics.budget_frac=" + shortest(study_.probe_budget_frac));
    if (study_.gns_source != "gradients")
      o.push_back("diagnostics.gns_source=" + study_.gns_source);
    if (study_.asks_dual_noise()) o.emplace_back("diagnostics.dual_noise=true");
    if (study_.asks_dual_noise() || study_.advisor != "off")
      o.emplace_back("diagnostics.spectra=true");
    if (study_.advisor != "off") o.push_back("diagnostics.advisor=" + study_.advisor);
  }
  o.insert(o.end(), dotted.begin(), dotted.end());

  if (study_.branches()) make_branch(base, trial);
  const Config config = trial_config(base, trial);
  if (study_.decays()) check_decays(config);
  if (config.gns_ramp.on()) check_ramp(config);
  // A name with dots may have said these, too.
  trial.batch = config.train.batch;
  trial.steps = config.train.steps;
  for (const std::int64_t step : study_.coordinate_steps) {
    if (step < trial.steps) continue;
    throw ConfigError(
        fmt::format("probes.coordinates.steps: after {} steps: measured in the step that follows, "
                    "and there are {}",
                    step, trial.steps));
  }
  if (study_.halves()) {
    for (std::int64_t examples = study_.first_rung; examples / trial.batch < trial.steps;
         examples *= study_.eta) {
      if (examples >= trial.batch) trial.rungs.push_back(examples / trial.batch);
    }
    if (trial.rungs.empty()) {
      throw ConfigError(fmt::format(
          "search.early_terminate.min_examples: no rung lies before the end, at {} examples",
          trial.steps * trial.batch));
    }
  }
  return to_json(runtime::parse_yaml(to_yaml(config), "trial"));
}

std::vector<Expansion::Run> Expansion::runs() const {
  std::vector<Run> out;
  std::map<int, std::vector<const Trial*>> halved;
  for (const Trial& trial : initial_) {
    if (study_.decays()) {
      const std::vector<Decay> decays = decays_of(study_, trial.steps);
      std::int64_t steps = decays.back().fork;
      for (const Decay& decay : decays) steps += decay.steps - decay.fork;
      out.push_back({&trial, steps});
    } else if (trial.rungs.empty()) {
      out.push_back({&trial, trial.steps});
    } else {
      halved[trial.cell].push_back(&trial);
    }
  }
  const std::int64_t seeds = study_.tunes() ? std::ssize(study_.find("seed")->tune) : 1;
  for (auto& [cell, alive] : halved) {
    const std::size_t rungs = cells_[static_cast<std::size_t>(cell)].rungs.size();
    for (std::size_t rung = 0; rung <= rungs; ++rung) {
      for (const Trial* const trial : alive)
        out.push_back({trial, rung < trial->rungs.size() ? trial->rungs[rung] : trial->steps});
      alive.resize(static_cast<std::size_t>(
          std::min(std::ssize(alive), seeds * promoted(std::ssize(alive) / seeds, study_.eta))));
    }
  }
  return out;
}

// ---- results ------------------------------------------------------------------------------------

Campaign::Campaign(const Expansion& expansion)
    : expansion_(expansion), searches_(expansion.cells().size()) {
  for (const Trial& trial : expansion.initial()) add(trial);
  for (std::size_t c = 0; c < searches_.size(); ++c)
    searches_[c].high = static_cast<int>(expansion.cells()[c].rates.size());
  if (expansion.study().halves()) {
    for (int cell = 0; cell < std::ssize(searches_); ++cell) halve(cell);
  }
}

void Campaign::add(Trial trial) {
  if (trial.role == "tune") places_[{trial.cell, trial.place, trial.seed}] = trial.index;
  trials_.emplace(trial.index, std::move(trial));
}

std::vector<int> Campaign::record(const Json& record) {
  const Study& study = expansion_.study();
  const auto index = record.at("index").get<std::int64_t>();
  const auto trial = trials_.find(index);
  const bool known = trial != trials_.end();
  bool decided = false;
  if (study.halves() && !(known && trial->second.role == "report")) {
    reports_[index] = record;
    decided = known && halve(trial->second.cell);
  } else {
    results_[index] = record;
    if (known && study.telescopes()) decided = descend(trial->second.cell);
    if (known && trial->second.role == "tune") decided = advance(trial->second.cell);
  }
  return decided ? std::vector<int>{trial->second.cell} : std::vector<int>{};
}

/// What a trial came to, less being better: steps to the target, or the metric. Infinite: nothing.
double Campaign::outcome(const Json& result, bool by_steps) const {
  const std::string state = result.at("state");
  const Json& value = result.at(by_steps ? "steps_to_target" : "final_val");
  const bool ended = by_steps || state == "complete" || state == "censored";
  if (!ended || !value.is_number()) return std::numeric_limits<double>::infinity();
  return by_steps ? value.get<double>() : expansion_.study().loss_of(value.get<double>());
}

double Campaign::mean_outcome(const Entry& entry, bool by_steps) const {
  double sum = 0;
  for (const std::int64_t index : entry.trials) sum += outcome(results_.at(index), by_steps);
  return sum / static_cast<double>(entry.trials.size());
}

studies::RateChoice Campaign::choose(int cell, bool by_loss) const {
  const bool by_steps = expansion_.study().has_target() && !by_loss;
  std::map<int, studies::RateOutcome> outcomes;
  for (const auto& [key, index] : places_) {
    if (std::get<0>(key) != cell) continue;
    studies::RateOutcome& of_rate = outcomes[std::get<1>(key)];
    of_rate.lr = trials_.at(index).params.at("lr").get<double>();
    of_rate.values.push_back(outcome(results_.at(index), by_steps));
  }
  std::vector<studies::RateOutcome> list;
  for (auto& [place, outcome] : outcomes) list.push_back(std::move(outcome));
  return studies::choose_rate(
      list, by_steps ? studies::RateMetric::steps_to_target : studies::RateMetric::loss);
}

/// Adds what the results of a cell ask for. @return whether its rate has been decided.
bool Campaign::advance(int cell) {
  Search& search = searches_[static_cast<std::size_t>(cell)];
  if (search.decided) return false;
  const Study& study = expansion_.study();
  const ParameterSpec &lr = *study.find("lr"), &seed = *study.find("seed");
  const std::int64_t first = expansion_.cells()[static_cast<std::size_t>(cell)].first_index;
  const auto reports = std::ssize(seed.report), tunes = std::ssize(seed.tune);
  for (;;) {
    for (const auto& [key, index] : places_) {
      if (std::get<0>(key) == cell && results_.count(index) == 0) return false;
    }
    Tuned tuned;
    tuned.choice = choose(cell, false);
    if (tuned.choice.censored && study.has_target()) {
      tuned.choice = choose(cell, true);
      tuned.by_loss = true;
    }
    const studies::GridEdge edge = tuned.choice.edge;
    if (edge != studies::GridEdge::none && search.extensions < lr.extend_on_edge) {
      const bool low = edge == studies::GridEdge::low;
      bool added = false;
      for (int j = 0; j < 2; ++j) {
        const int place = low ? --search.low : search.high++;
        for (std::int64_t s = 0; s < tunes; ++s) {
          const std::int64_t index = first + reports + (2 * search.extensions + j) * tunes + s;
          auto trial = expansion_.trial_of(cell, place, seed.tune[static_cast<std::size_t>(s)],
                                           "tune", index);
          if (!trial) continue;
          add(std::move(*trial));
          added = true;
        }
      }
      ++search.extensions;
      if (added) continue;
    }
    tuned.extensions = search.extensions;
    tuned.edge_optimum = edge != studies::GridEdge::none;
    search.decided = true;
    tuned_[cell] = tuned;
    // Where every rate diverged there is nothing to report.
    if (tuned.choice.censored) return true;
    int chosen = search.low;
    for (const auto& [key, index] : places_) {
      if (std::get<0>(key) == cell &&
          trials_.at(index).params.at("lr").get<double>() == tuned.choice.lr)
        chosen = std::get<1>(key);
    }
    for (std::int64_t s = 0; s < reports; ++s) {
      auto trial = expansion_.trial_of(cell, chosen, seed.report[static_cast<std::size_t>(s)],
                                       "report", first + s);
      if (trial) add(std::move(*trial));
    }
    return true;
  }
}

/// Successive halving of a cell, from the start each time: the best of those that came to a rung go
/// on once all of them have. Nothing hangs on who came first. With seeds to tune and to report, it
/// is means over the first that are compared, and the best is run with the others.
/// @return whether that has been decided now.
bool Campaign::halve(int cell) {
  const Study& study = expansion_.study();
  const double infinity = std::numeric_limits<double>::infinity();
  std::vector<Entry> alive;
  std::map<std::string, std::size_t> known;
  for (const auto& [index, trial] : trials_) {
    if (trial.cell != cell || trial.role == "report") continue;
    results_.erase(index);
    Json point = trial.params;
    if (study.tunes()) point.erase("seed");
    const auto [entry, fresh] = known.emplace(canonical_json(point), alive.size());
    if (fresh) alive.emplace_back();
    alive[entry->second].trials.push_back(index);
  }
  const std::vector<std::int64_t>& rungs = expansion_.cells()[static_cast<std::size_t>(cell)].rungs;
  for (std::size_t rung = 0; rung <= rungs.size(); ++rung) {
    const bool last = rung == rungs.size();
    bool all = true;
    for (Entry& entry : alive) {
      entry.value = 0;
      for (const std::int64_t index : entry.trials) {
        trials_.at(index).until = last ? 0 : rungs[rung];
        waiting_.erase(index);
        const auto found = reports_.find(index);
        if (found == reports_.end()) {
          all = false;
          continue;
        }
        const Json& report = found->second;
        const std::string state = report.at("state");
        const bool open = state == "paused" || state == "pruned";
        const std::size_t reached = report.contains("rungs") ? report["rungs"].size() : 0;
        if (!open) results_[index] = report;
        if (open && (last || reached <= rung)) {
          all = false;
          continue;
        }
        if (open) waiting_.insert(index);
        // Who met the target before the rung is ahead of all, who broke down behind.
        const double value = !last && reached > rung
                                 ? study.loss_of(report["rungs"][rung].get<double>())
                             : state == "complete" ? -infinity
                                                   : infinity;
        entry.value = std::max(entry.value, value) == infinity ? infinity : entry.value + value;
      }
    }
    if (!all) return false;
    if (last) break;
    std::sort(alive.begin(), alive.end(), [](const Entry& a, const Entry& b) {
      return std::tie(a.value, a.trials) < std::tie(b.value, b.trials);
    });
    const auto on = static_cast<std::size_t>(promoted(std::ssize(alive), study.eta));
    for (std::size_t i = on; i < alive.size(); ++i) {
      for (const std::int64_t index : alive[i].trials) {
        if (waiting_.erase(index) == 0) continue;
        results_[index] = reports_.at(index);
        results_[index]["state"] = "pruned";
      }
    }
    alive.resize(std::min(on, alive.size()));
  }
  return study.tunes() && report_best(cell, alive);
}

/// Runs the best of a cell with fresh seeds. @return whether it was not known before.
bool Campaign::report_best(int cell, const std::vector<Entry>& entries) {
  Search& search = searches_[static_cast<std::size_t>(cell)];
  if (search.decided) return false;
  search.decided = true;
  const Study& study = expansion_.study();
  Tuned tuned;
  const Entry* best = nullptr;
  for (const bool by_steps : {study.has_target(), false}) {
    double least = std::numeric_limits<double>::infinity();
    for (const Entry& entry : entries) {
      const double value = mean_outcome(entry, by_steps);
      if (!(value < least)) continue;
      least = value;
      best = &entry;
    }
    if (best != nullptr) {
      tuned.by_loss = study.has_target() && !by_steps;
      tuned.choice.value = least;
      break;
    }
  }
  tuned.choice.censored = best == nullptr;
  if (best != nullptr) {
    const Trial chosen = trials_.at(best->trials.front());
    tuned.choice.lr = tuned.choice.fitted_lr = chosen.params.at("lr").get<double>();
    for (const ParameterSpec& spec : study.parameters) {
      if (!spec.distribution.empty()) tuned.best.emplace_back(spec.name, chosen.params[spec.name]);
    }
    const std::int64_t first = expansion_.cells()[static_cast<std::size_t>(cell)].first_index;
    const std::vector<std::int64_t>& seeds = study.find("seed")->report;
    for (std::int64_t s = 0; s < std::ssize(seeds); ++s) {
      auto trial =
          expansion_.with_seed(chosen, seeds[static_cast<std::size_t>(s)], "report", first + s);
      if (trial) add(std::move(*trial));
    }
  }
  tuned_[cell] = tuned;
  return true;
}

/// From size to size: once all of a cell's trials at one are done, fewer points around their best
/// at the next. @return whether the last size has been decided now.
bool Campaign::descend(int cell) {
  Search& search = searches_[static_cast<std::size_t>(cell)];
  const Study& study = expansion_.study();
  const Expansion::Cell& of = expansion_.cells()[static_cast<std::size_t>(cell)];
  std::int64_t next = of.first_index;
  while (!search.decided) {
    std::map<std::vector<int>, Entry> entries;
    for (const auto& [index, trial] : trials_) {
      if (trial.cell != cell) continue;
      if (trial.level > 0) next = std::max(next, index + 1);
      if (trial.level != search.level) continue;
      if (results_.count(index) == 0) return false;
      entries[trial.places].trials.push_back(index);
    }
    Tuned tuned;
    tuned.choice.value = std::numeric_limits<double>::infinity();
    tuned.choice.censored = true;
    std::vector<int> best;
    for (const bool by_steps : {study.has_target(), false}) {
      for (const auto& [places, entry] : entries) {
        const double value = mean_outcome(entry, by_steps);
        if (!(value < tuned.choice.value)) continue;
        tuned.choice.value = value;
        tuned.choice.censored = false;
        best = places;
      }
      tuned.by_loss = study.has_target() && !by_steps;
      if (!tuned.choice.censored) break;
    }
    search.decided = tuned.choice.censored || search.level + 1 == of.levels.size();
    if (search.decided) {
      tuned.best = of.levels[search.level];
      if (!tuned.choice.censored) {
        const Json& params = trials_.at(entries.at(best).trials.front()).params;
        tuned.choice.lr = tuned.choice.fitted_lr = params.at("lr").get<double>();
        for (const std::string& name : study.telescope.of) {
          if (name != "lr") tuned.best.emplace_back(name, params.at(name));
        }
      }
      tuned_[cell] = tuned;
      return true;
    }
    ++search.level;
    const auto points = static_cast<int>(expansion_.points_at(search.level));
    for (int& place : best) place -= (points - 1) / 2;
    std::vector<int> steps(best.size(), 0);
    for (bool more = true; more;) {
      std::vector<int> places = best;
      for (std::size_t g = 0; g < places.size(); ++g) places[g] += steps[g];
      for (std::size_t s = 0; s < std::max<std::size_t>(of.seeds.size(), 1); ++s, ++next) {
        if (auto trial = expansion_.telescoped(cell, search.level, places, s, next))
          add(std::move(*trial));
      }
      more = false;
      for (std::size_t g = steps.size(); g-- > 0 && !more;) {
        more = ++steps[g] < points;
        if (!more) steps[g] = 0;
      }
    }
  }
  return false;
}

bool Campaign::has(const Json& record) const {
  const auto index = record.at("index").get<std::int64_t>();
  const auto trial = trials_.find(index);
  const bool report = trial != trials_.end() && trial->second.role == "report";
  if (!expansion_.study().halves() || report) return results_.count(index) > 0;
  const auto found = reports_.find(index);
  return found != reports_.end() && found->second.at("state") == record.at("state") &&
         found->second.value("rungs", Json::array()) == record.value("rungs", Json::array());
}

std::vector<const Trial*> Campaign::due() const {
  std::vector<const Trial*> out;
  for (const auto& [index, trial] : trials_) {
    if (results_.count(index) == 0 && waiting_.count(index) == 0) out.push_back(&trial);
  }
  if (expansion_.study().order == "longest_first") {
    std::stable_sort(out.begin(), out.end(),
                     [](const Trial* a, const Trial* b) { return a->cost() > b->cost(); });
  }
  return out;
}

}  // namespace orthrus::runner
