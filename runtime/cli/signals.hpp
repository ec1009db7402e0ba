#pragma once
/// @file
/// Signals that ask a run to save or to stop: seen between two steps.

#include <array>
#include <csignal>

namespace orthrus::cli {

/// SIGUSR1 and SIGTERM: save and leave with 75. SIGUSR2: save and go on. One scope at a time; what
/// was in force before returns with its end.
class SignalScope {
 public:
  SignalScope();
  ~SignalScope();
  SignalScope(const SignalScope&) = delete;
  SignalScope& operator=(const SignalScope&) = delete;

 private:
  static constexpr std::array signals{SIGUSR1, SIGTERM, SIGUSR2};
  std::array<struct sigaction, signals.size()> before_{};
};

/// Has this process been asked to stop?
[[nodiscard]] bool stop_requested();
/// Has it been asked to save since this was last asked?
[[nodiscard]] bool take_save_request();

}  // namespace orthrus::cli
