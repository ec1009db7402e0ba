#pragma once
/// @file
/// Expansion: from a study to its trials. What there is to run depends on the file and on results
/// alone, never on when they come: an interrupted study ends with the trials of an uninterrupted
/// one.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "runtime/runner/trial_config.hpp"

namespace orthrus::runner {

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

/// How many of `trials` go on from a rung.
[[nodiscard]] inline std::int64_t promoted(std::int64_t trials, std::int64_t eta) {
  return std::max<std::int64_t>(1, trials / eta);
}

}  // namespace orthrus::runner
