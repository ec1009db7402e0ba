#pragma once
/// @file
/// Expansion: from a study to its trials. What there is to run depends on the file and on results
/// alone, never on when they come: an interrupted study ends with the trials of an uninterrupted
/// one.

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <orthrus/config.hpp>
#include <orthrus/studies/tuning.hpp>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
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

/// A value for each parameter.
using Point = std::vector<std::pair<std::string, Json>>;

class Expansion {
 public:
  /// @throws ConfigError  with the file's line: a parameter that is nobody's, an expression that
  ///                      fails, a trial whose configuration is refused, more than run_cap trials.
  Expansion(Study study, Bases bases);

  /// Trials that the file alone decides, in the order of the file: the last parameter fastest.
  [[nodiscard]] const std::vector<Trial>& initial() const { return initial_; }
  /// All trials, if every grid of rates were extended as often as it may be.
  [[nodiscard]] std::int64_t most() const { return most_; }
  /// Points left out: by `exclude`, and as equal to an earlier one.
  [[nodiscard]] std::int64_t excluded() const { return excluded_; }
  [[nodiscard]] std::int64_t equal() const { return equal_; }
  /// Every run of a trial that the file alone foresees, and its steps: under asha one from the
  /// start to each rung that it gets to.
  struct Run {
    const Trial* trial;
    std::int64_t steps;
  };
  [[nodiscard]] std::vector<Run> runs() const;
  [[nodiscard]] const Study& study() const { return study_; }
  [[nodiscard]] const Bases& bases() const { return bases_; }

  /// A run of rates at one point of all other parameters but the seed; under asha, whose best go
  /// on; under telescoping, whose grid narrows from size to size.
  struct Cell {
    Point point;                      ///< all but lr, seed, draws, sizes, and what the grid is of
    std::vector<double> rates;        ///< of the grid, ascending
    std::int64_t first_index = 0;     ///< of what results add to it
    std::vector<std::int64_t> rungs;  ///< of all its trials
    std::vector<Point> levels;        ///< sizes, ascending, each with what is zipped to it
    std::vector<std::vector<double>> grids;  ///< of each of `telescope.of`, at the least size
    std::vector<Json> seeds;                 ///< none: there is no such parameter
  };
  [[nodiscard]] const std::vector<Cell>& cells() const { return cells_; }
  /// The rate at a place of the grid: 0 … n−1 are the file's, others lie beyond its ends.
  [[nodiscard]] static double rate(const Cell& cell, int place) {
    return value_at(cell.rates, place);
  }
  /// Of any ascending grid, likewise.
  [[nodiscard]] static double value_at(const std::vector<double>& grid, int place);
  /// The trial of a cell at a place of its grid; nothing where it is excluded.
  [[nodiscard]] std::optional<Trial> trial_of(int cell, int place, std::int64_t seed,
                                              const std::string& role, std::int64_t index) const;
  /// The same point with another seed; nothing where it is excluded.
  [[nodiscard]] std::optional<Trial> with_seed(const Trial& trial, std::int64_t seed,
                                               const std::string& role, std::int64_t index) const;
  /// Under telescoping, the trial of a size at a place of the grid. @param seed  which of the
  /// cell's
  [[nodiscard]] std::optional<Trial> telescoped(int cell, std::size_t level,
                                                const std::vector<int>& places, std::size_t seed,
                                                std::int64_t index) const;
  /// Points of each of `telescope.of` at a size but the least.
  [[nodiscard]] std::int64_t points_at(std::size_t level) const;

 private:
  void check_names() const;
  [[nodiscard]] std::vector<std::vector<Point>> dimensions() const;
  void add_point(Point point);
  Cell& cell_of(const Point& rest);
  [[nodiscard]] std::optional<int> add_level(const Point& point);
  void add_to_grids(Cell& cell, const Point& point);
  void place_in_grids();
  [[nodiscard]] double center_at(const Point& point) const;
  [[nodiscard]] Point in_order(Point point) const;
  [[nodiscard]] bool is_excluded(const Point& point) const;
  [[nodiscard]] Expression::Lookup variables(const Point& point) const;
  [[nodiscard]] std::string base_of(const Point& point) const;
  [[nodiscard]] Trial make_trial(const Point& point, std::int64_t index) const;
  [[nodiscard]] std::int64_t budget_steps(std::int64_t batch, std::int64_t otherwise) const;
  void check_decays(const Config& config) const;
  void check_ramp(const Config& config) const;
  Json configure(const Point& point, Trial& trial) const;
  void make_branch(const Config& base, Trial& trial) const;

  Study study_;
  Bases bases_;
  std::vector<Trial> initial_;
  std::vector<Cell> cells_;
  std::set<std::string> ids_;
  std::int64_t most_ = 0, excluded_ = 0, equal_ = 0;
};

/// What became of a cell's rates.
struct Tuned {
  studies::RateChoice choice;
  int extensions = 0;
  bool edge_optimum = false;  ///< the best rate lies on an end that may not be extended any more
  bool by_loss = false;       ///< no rate reached the target: the least loss chose
  Point best;                 ///< what else was chosen: of asha's draws, of a telescope's grid
};

/// A study and its results so far.
class Campaign {
 public:
  explicit Campaign(const Expansion& expansion);

  /// @param record  a line of results.jsonl. @return cells whose rate it has decided.
  std::vector<int> record(const Json& record);
  /// Trials that are known to be needed and have no result, in the order in which they are to run.
  [[nodiscard]] std::vector<const Trial*> due() const;
  /// All trials known so far, by index.
  [[nodiscard]] const std::map<std::int64_t, Trial>& trials() const { return trials_; }
  [[nodiscard]] const std::map<std::int64_t, Json>& results() const { return results_; }
  /// Has it this record already?
  [[nodiscard]] bool has(const Json& record) const;
  [[nodiscard]] bool complete() const { return results_.size() == trials_.size(); }
  [[nodiscard]] const std::map<int, Tuned>& tuned() const { return tuned_; }

 private:
  struct Search {
    int low = 0, high = 0;  ///< places tried so far: [low, high)
    int extensions = 0;
    std::size_t level = 0;  // of a telescope
    bool decided = false;
  };
  /// What is compared: trials of one point over their seeds.
  struct Entry {
    double value = 0;  ///< less is better
    std::vector<std::int64_t> trials;
  };
  bool advance(int cell);
  bool halve(int cell);
  bool descend(int cell);
  bool report_best(int cell, const std::vector<Entry>& entries);
  [[nodiscard]] double outcome(const Json& result, bool by_steps) const;
  [[nodiscard]] double mean_outcome(const Entry& entry, bool by_steps) const;
  void add(Trial trial);
  [[nodiscard]] studies::RateChoice choose(int cell, bool by_loss) const;

  const Expansion& expansion_;
  std::map<std::int64_t, Trial> trials_;
  std::map<std::int64_t, Json> results_;
  std::vector<Search> searches_;
  /// (cell, place, seed) → index of the tuning trial.
  std::map<std::tuple<int, int, std::int64_t>, std::int64_t> places_;
  std::map<int, Tuned> tuned_;
  std::map<std::int64_t, Json> reports_;  // of asha: what a trial said last
  std::set<std::int64_t> waiting_;        // of asha: on a rung that others have not reached
};

/// How many of `trials` go on from a rung.
[[nodiscard]] inline std::int64_t promoted(std::int64_t trials, std::int64_t eta) {
  return std::max<std::int64_t>(1, trials / eta);
}

}  // namespace orthrus::runner
