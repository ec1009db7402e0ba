#pragma once
/// @file
/// What a trial has to say: the line of results.jsonl, and how the lines that a program writes
/// become one.

#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "runtime/runner/expansion.hpp"
#include "runtime/runner/score.hpp"

namespace orthrus::runner {

/// How far a trial came.
struct Progress {
  std::int64_t steps = 0, examples = 0;
  double train_loss = 0;
  std::int64_t tokens = -1;                                  ///< -1: nobody knows
  double wall_s = std::numeric_limits<double>::quiet_NaN();  ///< of the attempt
};
/// A line of results.jsonl. @param score  null: it failed, and has no numbers
[[nodiscard]] Json summary(const Trial& trial, int attempt, const std::string& state,
                           const std::string& message, const Score* score,
                           const Progress& progress);

/// The eval lines of a metrics file, by step. A line whose step does not lie beyond the last one's
/// replaces what came from there on: the program has gone back to a checkpoint. What does not parse
/// is passed over, but NaN and Infinity as many languages write them.
/// @throws DataError  an eval line without a step.
[[nodiscard]] std::vector<Json> read_evaluations(const std::filesystem::path& file);

/// What evaluations come to.
struct Reported {
  /// complete | censored | diverged, if it ended here; empty: the metric was never evaluated.
  std::string state, message;
  /// Whatever it writes from now on changes nothing: target met, diverged, or budget spent.
  bool decided = false;
  Score score;
  Progress progress;
};
[[nodiscard]] Reported judge(const Study& study, const Trial& trial,
                             const std::vector<Json>& evaluations);

}  // namespace orthrus::runner
