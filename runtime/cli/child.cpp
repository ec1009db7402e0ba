#include "runtime/cli/child.hpp"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fstream>
#include <iterator>
#include <orthrus/error.hpp>
#include <string_view>
#include <system_error>
#include <thread>

namespace orthrus::cli {
namespace {

constexpr std::string_view mark_name = "ORTHRUS_TRIAL_DIR=";

/// What Open MPI's, PMIx's and MPICH's launchers tell their ranks. Settings of the user stay:
/// OMPI_MCA_* of other frameworks, and what lets root run.
bool of_launcher(std::string_view entry) {
  static constexpr std::array<std::string_view, 2> kept{"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_"};
  static constexpr std::array<std::string_view, 6> own{
      "OMPI_MCA_orte_",        "OMPI_MCA_ess",           "OMPI_MCA_pmix",
      "OMPI_MCA_initial_wdir", "OMPI_MCA_shmem_RUNTIME", "OMPI_MCA_mpi_oversubscribe"};
  static constexpr std::array<std::string_view, 7> families{"OMPI_",  "PMIX_", "PMI_",     "PRTE_",
                                                            "PRRTE_", "ORTE_", "MPI_LOCAL"};
  const auto begins = [entry](std::string_view prefix) { return entry.starts_with(prefix); };
  if (std::any_of(own.begin(), own.end(), begins)) return true;
  return std::any_of(families.begin(), families.end(), begins) &&
         std::none_of(kept.begin(), kept.end(), begins);
}

std::vector<std::string> environment(const std::string& mark) {
  std::vector<std::string> out{std::string(mark_name) + mark};
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    if (!of_launcher(text) && !text.starts_with(mark_name)) out.emplace_back(text);
  }
  return out;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (std::string& text : texts) out.push_back(text.data());
  out.push_back(nullptr);
  return out;
}

}  // namespace

Child::Child(const std::vector<std::string>& command, const std::filesystem::path& output,
             const std::string& mark, const char* key) {
  std::vector<std::string> words = command, entries = environment(mark);
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, output.c_str(),
                                   O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0644);
  posix_spawn_file_actions_adddup2(&files, STDOUT_FILENO, STDERR_FILENO);
  // MPI's sockets and the study's lock are not its business.
  posix_spawn_file_actions_addclosefrom_np(&files, STDERR_FILENO + 1);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t none, ignored;
  sigemptyset(&none);
  sigemptyset(&ignored);
  sigaddset(&ignored, SIGPIPE);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &ignored);
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setflags(&attributes,
                           POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  const int error = ::posix_spawnp(&pid_, words[0].c_str(), &files, &attributes,
                                   pointers(words).data(), pointers(entries).data());
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&files);
  if (error != 0) {
    pid_ = -1;
    throw ConfigError(std::string(key) + ": " + words[0] +
                      ": cannot be started: " + std::strerror(error));
  }
}

Child::~Child() {
  if (pid_ < 0 || ending_) return;
  signal(SIGKILL);
  while (::waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
  }
}

std::optional<Child::Ending> Child::poll() {
  if (ending_) return ending_;
  siginfo_t info = {};
  // Its number, and so its group's, stays its own until it has been waited for.
  if (::waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT) != 0 ||
      info.si_pid != pid_)
    return {};
  signal(SIGKILL);
  int status = 0;
  ::waitpid(pid_, &status, 0);
  ending_ = WIFSIGNALED(status) ? Ending{0, WTERMSIG(status)} : Ending{WEXITSTATUS(status), 0};
  return ending_;
}

void Child::signal(int number) const { ::kill(-pid_, number); }

void kill_orphan(pid_t pid, const std::string& mark) {
  if (pid <= 1) return;
  std::ifstream in("/proc/" + std::to_string(pid) + "/environ", std::ios::binary);
  const std::string entries{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  std::string marked(mark_name);
  marked += mark;
  marked += '\0';
  if (entries.starts_with(marked) || entries.find('\0' + marked) != std::string::npos)
    ::kill(-pid, SIGKILL);
}

bool Pulse::moved() {
  const std::vector<State> now = look();
  return std::exchange(last_, now) != now;
}

std::vector<Pulse::State> Pulse::look() const {
  std::vector<State> out;
  for (const std::filesystem::path& file : files_) {
    std::error_code gone;
    out.emplace_back(std::filesystem::file_size(file, gone),
                     std::filesystem::last_write_time(file, gone));
  }
  return out;
}

Watched watch(Child& child, const Watch& watch) {
  using Clock = std::chrono::steady_clock;
  using Why = Watched::Why;
  const auto since = [](Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  const Clock::time_point start = Clock::now();
  Pulse pulse(watch.alive);
  Clock::time_point heard = start, asked = start;
  Watched out;
  bool killed = false;
  std::optional<Child::Ending> ending;
  for (auto pause = std::chrono::microseconds(500); !(ending = child.poll());
       pause = std::min(2 * pause, std::chrono::microseconds(20000))) {
    const bool stopping = watch.stop();
    if (out.why == Why::none) {
      if (pulse.moved()) heard = Clock::now();
      if (watch.decided()) {
        out.why = Why::decided;
      } else if (stopping) {
        out.why = Why::stopped;
      } else if (watch.max_seconds > 0 && since(start) > watch.max_seconds) {
        out.why = Why::late;
      } else if (since(heard) > 4 * watch.heartbeat_s) {
        out.why = Why::silent;
      }
      if (out.why != Why::none) {
        child.signal(SIGTERM);
        asked = Clock::now();
      }
    } else if (!killed && since(asked) > watch.heartbeat_s) {
      child.signal(SIGKILL);
      killed = true;
    }
    std::this_thread::sleep_for(pause);
  }
  out.ending = *ending;
  return out;
}

std::string last_line(const std::filesystem::path& file) {
  std::ifstream in(file);
  std::string last;
  for (std::string line; std::getline(in, line);) {
    if (line.find_first_not_of(" \t\r") != std::string::npos) last = line;
  }
  return last.substr(0, 300);
}

}  // namespace orthrus::cli
