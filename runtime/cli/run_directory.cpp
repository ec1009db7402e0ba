#include "runtime/cli/run_directory.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <orthrus/error.hpp>
#include <string_view>
#include <system_error>
#include <utility>

#include "runtime/safetensors.hpp"

namespace orthrus::cli {
namespace fs = std::filesystem;

namespace {

bool is_permission(int error) { return error == EACCES || error == EPERM || error == EROFS; }

IoError cannot_create(const fs::path& path, int error) {
  return IoError(path.string() + ": cannot create: " + std::strerror(error),
                 is_permission(error) ? ExitCode::permission : ExitCode::cannot_create);
}

/// The step of "step-000120"; nothing for other names, half-written ones among them.
std::optional<std::int64_t> step_of(const std::string& name) {
  constexpr std::string_view prefix = "step-";
  if (!name.starts_with(prefix) || name.size() < prefix.size() + 6) return {};
  std::int64_t step = 0;
  const char* const last = name.data() + name.size();
  const auto [end, error] = std::from_chars(name.data() + prefix.size(), last, step);
  if (error != std::errc{} || end != last || step < 0) return {};
  return step;
}

std::string slurp(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

}  // namespace

std::string host_name() {
  char name[256] = {};
  ::gethostname(name, sizeof name - 1);
  return name;
}

std::string checkpoint_name(std::int64_t step) { return fmt::format("step-{:06d}", step); }

void make_directories(const fs::path& directory) {
  if (directory.empty()) return;
  std::error_code error;
  fs::create_directories(directory, error);
  // An existing directory is no error; a file in the way is, with a code that differs between
  // systems.
  std::error_code ignored;
  if (!fs::is_directory(directory, ignored))
    throw cannot_create(directory, error ? error.value() : EEXIST);
}

LineFile::~LineFile() {
  if (file_ != nullptr) std::fclose(file_);
}

void LineFile::open(const fs::path& file, bool append) {
  make_directories(file.parent_path());
  if (file_ != nullptr) std::fclose(std::exchange(file_, nullptr));
  path_ = file;
  // "e": not inherited by what a workload may start.
  file_ = std::fopen(file.c_str(), append ? "ae" : "we");
  if (file_ == nullptr) throw cannot_create(file, errno);
}

void LineFile::line(const std::string& text) {
  errno = 0;
  const bool written = std::fwrite(text.data(), 1, text.size(), file_) == text.size() &&
                       std::fputc('\n', file_) != EOF && std::fflush(file_) == 0;
  if (!written) {
    throw IoError(path_.string() + ": cannot write: " + std::strerror(errno != 0 ? errno : EIO),
                  ExitCode::io);
  }
}

DirectoryLock::DirectoryLock(const fs::path& directory) {
  const fs::path lock = directory / ".lock";
  lock_ = ::open(lock.c_str(), O_CREAT | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (lock_ < 0) throw cannot_create(lock, errno);
  if (::flock(lock_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    const std::string holder = slurp(lock);
    ::close(lock_);
    lock_ = -1;
    throw IoError(directory.string() + ": another run writes here (" +
                      holder.substr(0, holder.find('\n')) + ")",
                  ExitCode::cannot_create);
  }
  // A file system without locks leaves the run unprotected, not impossible. The text is for people.
  const std::string holder = fmt::format("host {}, process {}\n", host_name(), ::getpid());
  if (::ftruncate(lock_, 0) != 0 || ::write(lock_, holder.data(), holder.size()) < 0) {
    const int why = errno;
    ::close(lock_);
    lock_ = -1;
    throw IoError(lock.string() + ": cannot write: " + std::strerror(why), ExitCode::io);
  }
}

DirectoryLock::~DirectoryLock() {
  if (lock_ >= 0) ::close(lock_);
}

RunDirectory::RunDirectory(fs::path directory, bool resume) : path_(std::move(directory)) {
  std::error_code error;
  const bool exists = fs::exists(path_, error);
  if (exists && !fs::is_directory(path_, error)) {
    throw IoError(path_.string() + ": exists and is not a directory", ExitCode::cannot_create);
  }
  if (exists && !resume) {
    const bool empty = fs::is_empty(path_, error);
    if (error) throw cannot_create(path_, error.value());
    if (!empty) {
      throw IoError(
          path_.string() +
              ": exists and is not empty; give another --run-dir, or --resume to continue it",
          ExitCode::cannot_create);
    }
  }
  make_directories(path_);
  lock_.emplace(path_);
  make_directories(checkpoints());
}

std::vector<std::int64_t> RunDirectory::saved_steps() const {
  std::vector<std::int64_t> steps;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(checkpoints(), error)) {
    const std::optional<std::int64_t> step = step_of(entry.path().filename().string());
    if (step && entry.symlink_status().type() == fs::file_type::directory) steps.push_back(*step);
  }
  std::sort(steps.begin(), steps.end(), std::greater<>());
  return steps;
}

int RunDirectory::remove_half_written() const {
  std::vector<fs::path> found;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(checkpoints(), error)) {
    const std::string name = entry.path().filename().string();
    const std::size_t mark = name.find(".tmp-");
    if (mark != std::string::npos && step_of(name.substr(0, mark))) found.push_back(entry.path());
  }
  for (const fs::path& path : found) fs::remove_all(path, error);
  return static_cast<int>(found.size());
}

void RunDirectory::set_aside_after(std::int64_t step) const {
  for (const std::int64_t saved : saved_steps()) {
    if (saved <= step) continue;
    const std::string name = checkpoint_name(saved);
    std::error_code error;
    fs::path target = checkpoints() / ("damaged-" + name);
    for (int n = 2; fs::exists(target, error); ++n) {
      target = checkpoints() / fmt::format("damaged-{}-{}", name, n);
    }
    fs::rename(checkpoints() / name, target, error);
    if (error) throw cannot_create(target, error.value());
  }
}

std::string RunDirectory::prune(std::int64_t keep) const {
  const std::vector<std::int64_t> steps = saved_steps();
  std::string problem;
  for (std::size_t i = static_cast<std::size_t>(std::max<std::int64_t>(keep, 1)); i < steps.size();
       ++i) {
    const fs::path victim = checkpoints() / checkpoint_name(steps[i]);
    // Renamed first: a removal that is cut short must not leave something that looks like a
    // checkpoint.
    const fs::path doomed = checkpoints() / (checkpoint_name(steps[i]) + ".tmp-old");
    std::error_code error;
    fs::remove_all(doomed, error);
    fs::rename(victim, doomed, error);
    if (!error) fs::remove_all(doomed, error);
    if (error) problem = victim.string() + ": cannot remove: " + error.message();
  }
  return problem;
}

void RunDirectory::open_metrics(std::int64_t step) {
  const fs::path file = path_ / "metrics.jsonl";
  std::error_code error;
  if (fs::exists(file, error)) {
    const std::string before = slurp(file);
    std::string kept;
    for (std::size_t at = 0; at < before.size();) {
      const std::size_t end = before.find('\n', at);
      if (end == std::string::npos) break;  // torn
      const std::string line = before.substr(at, end - at);
      at = end + 1;
      const nlohmann::json row = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (!row.is_object() || !row.contains("step") || !row["step"].is_number()) continue;
      if (row["step"].get<std::int64_t>() <= step) kept += line + "\n";
    }
    if (kept != before) runtime::write_file_atomically(file, kept);
  }
  metrics_.open(file, /*append=*/true);
}

std::string RunDirectory::metrics() const { return slurp(path_ / "metrics.jsonl"); }

void RunDirectory::write(const std::string& name, const std::string& text) const {
  runtime::write_file_atomically(path_ / name, text);
}

fs::path newest_run(const fs::path& parent, const std::string& name) {
  fs::path newest;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(parent, error)) {
    const std::string found = entry.path().filename().string();
    // "<name>-20260131-235959": a longer run name that begins alike is another run.
    if (found.size() != name.size() + 16 || !found.starts_with(name + "-") ||
        !entry.is_directory(error))
      continue;
    if (found.find_first_not_of("0123456789-", name.size()) != std::string::npos) continue;
    if (newest.empty() || found > newest.filename().string()) newest = entry.path();
  }
  return newest;
}

runtime::RunRecord read_run(const fs::path& directory) {
  std::error_code error;
  if (!fs::is_directory(directory, error)) {
    throw ConfigError(directory.string() + ": no such run directory");
  }
  runtime::RunRecord run;
  const fs::path named = directory.filename().empty() || directory.filename() == "."
                             ? fs::weakly_canonical(directory, error).filename()
                             : directory.filename();
  run.label = named.empty() ? directory.string() : named.string();
  run.summary_json = slurp(directory / "summary.json");
  run.metrics_jsonl = slurp(directory / "metrics.jsonl");
  if (run.summary_json.empty() && run.metrics_jsonl.empty()) {
    throw ConfigError(directory.string() +
                      ": neither summary.json nor metrics.jsonl is there: not a run");
  }
  return run;
}

}  // namespace orthrus::cli
