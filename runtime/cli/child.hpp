#pragma once
/// @file
/// Child: a program with a process group of its own, started by a rank.

#include <sys/types.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace orthrus::cli {

class Child {
 public:
  /// How it ended.
  struct Ending {
    int code = 0;    ///< of exit
    int signal = 0;  ///< that killed it; 0: it exited
  };

  /// Starts `command`, found in PATH, with /dev/null as input, and its output in a file. It has
  /// this process's environment without what an MPI launcher has told its ranks, so that it may be
  /// a launcher itself, and no other file of this process.
  /// @param mark  ORTHRUS_TRIAL_DIR of the program and of all that it starts
  /// @param key   of the study, which says what is started
  /// @throws ConfigError  it cannot be started.
  Child(const std::vector<std::string>& command, const std::filesystem::path& output,
        const std::string& mark, const char* key);
  /// Kills what is left of the group.
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  [[nodiscard]] pid_t pid() const { return pid_; }
  /// Nothing while it runs. Once it has ended, what is left of its group is killed.
  [[nodiscard]] std::optional<Ending> poll();
  /// Sends a signal to the group.
  void signal(int number) const;

 private:
  pid_t pid_ = -1;
  std::optional<Ending> ending_;
};

/// Files whose growth, or whose new time, is a sign of life.
class Pulse {
 public:
  explicit Pulse(std::vector<std::filesystem::path> files)
      : files_(std::move(files)), last_(look()) {}
  /// Since this was asked last?
  [[nodiscard]] bool moved();

 private:
  using State = std::pair<std::uintmax_t, std::filesystem::file_time_type>;
  [[nodiscard]] std::vector<State> look() const;

  std::vector<std::filesystem::path> files_;
  std::vector<State> last_;
};

/// When a child is to be ended before it ends by itself.
struct Watch {
  std::vector<std::filesystem::path> alive;  ///< silent for four heartbeats: it hangs
  double heartbeat_s = 30;
  double max_seconds = 0;         ///< 0: any
  std::function<bool()> decided;  ///< asked some fifty times a second, as is the next
  std::function<bool()> stop;
};
struct Watched {
  enum class Why : std::uint8_t { none, decided, stopped, silent, late };
  Why why = Why::none;  ///< it was ended; none: it has ended by itself
  Child::Ending ending;
};
/// Waits for its end, with SIGTERM to its process group where it is to be ended, and a heartbeat
/// later SIGKILL.
[[nodiscard]] Watched watch(Child& child, const Watch& watch);

/// Of its output: the last line that says something, for messages.
[[nodiscard]] std::string last_line(const std::filesystem::path& file);

/// Kills the group of a child that outlived the process which started it; of another process of
/// that number nothing is done to.
void kill_orphan(pid_t pid, const std::string& mark);

}  // namespace orthrus::cli
