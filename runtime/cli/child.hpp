#pragma once
/// @file
/// Child: a program with a process group of its own, started by a rank.

#include <sys/types.h>

#include <filesystem>
#include <optional>
#include <string>
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
  /// @throws ConfigError  it cannot be started.
  Child(const std::vector<std::string>& command, const std::filesystem::path& output,
        const std::string& mark);
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

/// Kills the group of a child that outlived the process which started it; of another process of
/// that number nothing is done to.
void kill_orphan(pid_t pid, const std::string& mark);

}  // namespace orthrus::cli
