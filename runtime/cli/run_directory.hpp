#pragma once
/// @file
/// RunDirectory: the files of one training run. Rank 0 has one; errors are `IoError` with the exit
/// code that fits (73 cannot create, 74 write failed, 77 not permitted).
///
///     RUN/config.resolved.yaml  metrics.jsonl  summary.json  report.html
///     RUN/checkpoints/step-000120/

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "runtime/report.hpp"

namespace orthrus::cli {

/// "step-000120".
[[nodiscard]] std::string checkpoint_name(std::int64_t step);
/// Of this machine.
[[nodiscard]] std::string host_name();

/// A file that grows by whole lines: each is in the kernel's hands when `line` returns.
class LineFile {
 public:
  LineFile() = default;
  ~LineFile();
  LineFile(const LineFile&) = delete;
  LineFile& operator=(const LineFile&) = delete;

  /// Creates missing directories above; a file that was open is closed.
  /// @param append  false: starts empty.
  void open(const std::filesystem::path& file, bool append);
  [[nodiscard]] bool is_open() const { return file_ != nullptr; }
  void line(const std::string& text);

 private:
  std::filesystem::path path_;
  std::FILE* file_ = nullptr;
};

/// A directory that one process writes to: its lock, which the system releases with the process.
class DirectoryLock {
 public:
  /// @throws IoError  another process has it (73), or the directory cannot be written to.
  explicit DirectoryLock(const std::filesystem::path& directory);
  ~DirectoryLock();
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;

 private:
  int lock_ = -1;
};

class RunDirectory {
 public:
  /// Creates `directory` and takes its lock, which the system releases with the process. Without
  /// `resume` the directory must not exist or be empty.
  RunDirectory(std::filesystem::path directory, bool resume);
  RunDirectory(const RunDirectory&) = delete;
  RunDirectory& operator=(const RunDirectory&) = delete;

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] std::filesystem::path checkpoints() const { return path_ / "checkpoints"; }

  /// Steps of the checkpoints that are there, newest first. Half-written ones are not among them.
  [[nodiscard]] std::vector<std::int64_t> saved_steps() const;
  /// Removes what a killed save left. @return how many.
  int remove_half_written() const;
  /// Moves checkpoints newer than `step` out of the way (damaged-step-…): they could not be loaded,
  /// and a new one of the same step must find its place free.
  void set_aside_after(std::int64_t step) const;
  /// Removes all but the `keep` newest, and at least one stays. @return a warning, or nothing.
  [[nodiscard]] std::string prune(std::int64_t keep) const;

  /// Opens metrics.jsonl for appending; rows after `step` (of a run that was cut off) and torn
  /// lines go.
  void open_metrics(std::int64_t step);
  void metrics_line(const std::string& json) { metrics_.line(json); }
  [[nodiscard]] std::string metrics() const;

  void write(const std::string& name, const std::string& text) const;

 private:
  std::filesystem::path path_;
  std::optional<DirectoryLock> lock_;
  LineFile metrics_;
};

/// mkdir -p. @throws IoError 73 or 77.
void make_directories(const std::filesystem::path& directory);

/// The newest "<parent>/<name>-<timestamp>" directory; empty when there is none.
[[nodiscard]] std::filesystem::path newest_run(const std::filesystem::path& parent,
                                               const std::string& name);

/// What is in a run's directory, for reports. @throws ConfigError  no such directory, or neither
/// summary nor metrics in it.
[[nodiscard]] runtime::RunRecord read_run(const std::filesystem::path& directory);

}  // namespace orthrus::cli
