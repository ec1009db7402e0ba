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

std::string describe(const Point& point) {
  std::string out;
  for (const auto& [name, value] : point)
    out += (out.empty() ? "" : ", ") + name + "=" + text_of(value);
  return out;
}

}  // namespace

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

}  // namespace orthrus::runner
