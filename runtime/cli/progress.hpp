#pragma once
/// @file
/// Progress: how far a run is, for a person at a terminal or a reader of a log.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <map>
#include <orthrus/sharded_optimizer.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace orthrus::cli {

/// What is shown of a step.
struct StepLine {
  std::int64_t step = 0, steps = 0;
  double loss = 0;
  double step_ms = 0;                        ///< gradient and optimizer
  StepTimes ms;                              ///< of the optimizer
  double bytes_sent = 0;                     ///< by all ranks
  std::vector<double> update_rms;            ///< per group
  std::map<std::string, double> validation;  ///< of this step, where it was evaluated
  bool skipped = false;
};

/// "step   120 | 412 ms | reduce 61 | lmo 188 | gather 44 | sent 1.94 GB | update rms 0.199 |
/// loss 3.21".
[[nodiscard]] std::string format_step(const StepLine& line);

/// "120/1000 [=====>         ] loss 3.21 | 2.4 steps/s | 6 min 7 s left", at most `width` columns.
[[nodiscard]] std::string format_bar(std::int64_t step, std::int64_t steps, double loss,
                                     double steps_per_s, int width);

enum class ProgressKind : std::uint8_t {
  automatic,  ///< bar where stderr is a terminal, else lines
  bar,        ///< redrawn in place on stderr
  lines,  ///< one line per ten seconds (evaluated steps: per second), and the first and the last
  off,
};

/// Rank 0 has one of these. Lines go to `out`, the bar to stderr: under a launcher stdout is a
/// terminal of the launcher's making, and no person sits there.
class Progress {
 public:
  Progress(ProgressKind kind, std::FILE* out);
  ~Progress();  ///< leaves the terminal at the start of an empty line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void update(const StepLine& line);
  /// A line of its own: what was saved, how it ended.
  void note(const std::string& text);

 private:
  void clear_bar();

  using Clock = std::chrono::steady_clock;
  ProgressKind kind_;
  std::FILE* out_;
  Clock::time_point last_shown_{};
  Clock::time_point last_step_{};
  double seconds_per_step_ = 0;  ///< exponential mean
  bool bar_shown_ = false;
  bool any_shown_ = false;
};

/// "auto", "bar", "lines" or "off".
[[nodiscard]] ProgressKind progress_kind(std::string_view word);

}  // namespace orthrus::cli
