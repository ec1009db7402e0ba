#include "runtime/runner/campaign.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace orthrus::runner {

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
