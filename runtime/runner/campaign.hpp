#pragma once
/// @file
/// Campaign: a study and its results so far, and what these ask for: rates beyond the end of a
/// grid, fresh seeds for the best, asha's rungs, a telescope's next size.

#include <cstdint>
#include <map>
#include <orthrus/studies/tuning.hpp>
#include <set>
#include <tuple>
#include <vector>

#include "runtime/runner/expansion.hpp"

namespace orthrus::runner {

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

}  // namespace orthrus::runner
