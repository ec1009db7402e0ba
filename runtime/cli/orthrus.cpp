// orthrus: the command. Parses, runs one sub-command, and ends the job with one exit code on all
// ranks.
#include <fmt/format.h>
#include <mpi.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <orthrus/error.hpp>
#include <orthrus/mpi.hpp>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "comm/launch.hpp"
#include "runtime/cli/command.hpp"

namespace orthrus::cli {
namespace {

/// Every command there is.
struct Command {
  const char* name;
  const char* doc;
  Run (*add)(CLI::App&);
};
constexpr std::array commands{
    Command{"train", "Train a bundled workload", add_train},
    Command{"replay", "Run the optimizer alone on recorded weights and gradients", add_replay},
    Command{"plan", "What a run will cost on any number of ranks", add_plan},
    Command{"simulate", "When each rank does what in a step, on any machine", add_simulate},
    Command{"bench", "Speeds of this machine", add_bench},
    Command{"ckpt", "List, verify, export and compare checkpoints", add_ckpt},
    Command{"data", "Prepare text and image data", add_data},
    Command{"report", "Lay runs side by side", add_report},
    Command{"study", "Known results again, and laws through measurements", add_study},
    Command{"info", "Configuration keys, rules, norms, tables, workloads", add_info},
    Command{"doctor", "What this machine and this build can do", add_doctor},
};

/// The first of `names` that is set to a number. Launchers' variables decide what is printed and
/// when to give up early, never how a run is divided.
int environment_number(std::initializer_list<const char*> names, int otherwise) {
  for (const char* const name : names) {
    const char* const value = std::getenv(name);
    if (value == nullptr) continue;
    int number = 0;
    const char* const last = value + std::strlen(value);
    if (const auto [end, error] = std::from_chars(value, last, number);
        error == std::errc{} && end == last) {
      return number;
    }
  }
  return otherwise;
}

int launched_rank() {
  return environment_number({"OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"}, 0);
}
int launched_size() { return environment_number({"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}, 1); }

/// MPI of this process. The one mutable object with static storage: MPI itself is one per process.
struct Mpi {
  bool initialized = false;
  bool settled = false;  ///< this rank has told the others how it ends,
  int settled_code = 0;  ///< and this is what was agreed
  int rank = 0, size = 1;
  MPI_Comm farewell = MPI_COMM_NULL;  ///< apart from all other messages
};
Mpi mpi;

void initialize_mpi() {
  if (mpi.initialized) return;
  int provided = MPI_THREAD_SINGLE;
  // Less than asked for is good enough where nobody else starts threads (SMPI offers SINGLE).
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  MPI_Comm_rank(MPI_COMM_WORLD, &mpi.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &mpi.size);
  MPI_Comm_dup(MPI_COMM_WORLD, &mpi.farewell);
  mpi.initialized = true;
}

/// How a rank ends.
struct Outcome {
  int code = 0;
  std::string message;  ///< empty: nothing to say
};

/// What the exception being handled means.
Outcome current_outcome() {
  constexpr int internal = static_cast<int>(ExitCode::internal);
  try {
    throw;
  } catch (const Error& error) {
    return {static_cast<int>(error.exit_code()), error.what()};
  } catch (const std::bad_alloc&) {
    return {internal, "out of memory"};
  } catch (const CLI::Error& error) {
    return {static_cast<int>(ExitCode::usage), error.what()};
  } catch (const std::exception& error) {
    return {internal, error.what()};
  } catch (...) {
    return {internal, "unknown exception"};
  }
}

void print_error(const std::string& message) {
  std::fflush(stdout);
  const std::string line = "orthrus: " + message + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);
  std::fflush(stderr);
}

void print_error_of_rank(const std::string& message) {
  // Messages of the library name their rank already.
  if (mpi.size == 1 || message.starts_with("[rank ")) {
    print_error(message);
  } else {
    print_error(fmt::format("[rank {}/{}] {}", mpi.rank, mpi.size, message));
  }
}

/// Tells all ranks how this one ends. An error common to all ranks is printed once, others by the
/// first rank that has them. @return the code all ranks end with. Does not return when this rank
/// failed and others do not come: they are inside a collective, and would wait for ever.
int settle(const Outcome& mine) {
  if (!mpi.initialized || mpi.size == 1) {
    if (!mine.message.empty()) print_error(mine.message);
    return mine.code;
  }
  struct Word {
    int code = 0;
    char message[508] = {};
  };
  Word word;
  word.code = mine.code;
  std::memcpy(word.message, mine.message.data(),
              std::min(mine.message.size(), sizeof word.message - 1));
  std::vector<Word> words(static_cast<std::size_t>(mpi.size));
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Iallgather(&word, sizeof word, MPI_BYTE, words.data(), sizeof word, MPI_BYTE, mpi.farewell,
                 &request);
  // A deadline has let the others wait long enough; a rank that succeeded may be far ahead of rank
  // 0, which writes the report.
  const bool deadline = mine.code == static_cast<int>(ExitCode::deadline);
  const auto until =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(deadline ? 2000 : 5000);
  int done = 0;
  while (true) {
    if (MPI_Test(&request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done != 0) break;
    if (mine.code != 0 && std::chrono::steady_clock::now() > until) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  if (done == 0) {
    if (!mine.message.empty()) print_error_of_rank(mine.message);
    MPI_Abort(MPI_COMM_WORLD, mine.code != 0 ? mine.code : static_cast<int>(ExitCode::internal));
    std::_Exit(mine.code);
  }
  int code = 0;
  bool first = true, common = true;
  const Word& own = words[static_cast<std::size_t>(mpi.rank)];
  for (int r = 0; r < mpi.size; ++r) {
    const Word& other = words[static_cast<std::size_t>(r)];
    if (code == 0) code = other.code;
    const bool same = std::strcmp(own.message, other.message) == 0;
    common = common && same;
    if (same && r < mpi.rank) first = false;
  }
  if (first && !mine.message.empty()) {
    if (common) {
      print_error(mine.message);
    } else {
      print_error_of_rank(mine.message);
    }
  }
  return code;
}

/// Agrees on the end, leaves MPI. @return the exit code.
int leave(const Outcome& mine) {
  if (!mpi.initialized) {
    if (mine.message.empty()) return mine.code;
    if (launched_size() > 1 && launched_rank() != 0) {
      print_error(fmt::format("[rank {}/{}] {}", launched_rank(), launched_size(), mine.message));
    } else {
      print_error(mine.message);
    }
    return mine.code;
  }
  const int code = mpi.settled ? mpi.settled_code : settle(mine);
  std::fflush(stdout);
  MPI_Comm_free(&mpi.farewell);
  MPI_Finalize();
  return code;
}

/// `--json` on `app` and on all below, where a command has not declared it with a meaning of its
/// own.
void add_json_flag(CLI::App& app, bool& json) {
  if (app.get_option_no_throw("--json") == nullptr) {
    app.add_flag("--json", json, "Print one JSON document on stdout, and nothing else there");
  }
  for (CLI::App* const child : app.get_subcommands(nullptr)) add_json_flag(*child, json);
}

void set_up_log() {
  auto logger = std::make_shared<spdlog::logger>("orthrus",
                                                 std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_pattern("orthrus: %l: %v");
  logger->set_level(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
}

int run(int argc, char** argv) {
  comm::keep_freed_memory();
  set_up_log();
  // A reader of a pipe that has gone (`orthrus info | head`) ends output, not the job.
  std::signal(SIGPIPE, SIG_IGN);

  Context context;
  CLI::App app{"Orthrus: a sharded matrix-optimizer runtime"};
  app.name("orthrus");
  app.set_version_flag("--version", "orthrus " ORTHRUS_VERSION);
  app.require_subcommand(1);
  app.footer(
      "Exit codes: 0 ok, 64 usage, 65 malformed input, 70 internal, 73 cannot create output, 74 "
      "write\n"
      "failed, 75 preempted and saved, 77 permission, 78 configuration, 79 deadline, 80 numerical "
      "stop.");
  std::vector<std::pair<CLI::App*, Run>> table;
  for (const Command& command : commands) {
    CLI::App* const sub = app.add_subcommand(command.name, command.doc);
    table.emplace_back(sub, command.add(*sub));
    add_json_flag(*sub, context.json);
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) {  // --help, --version
      return launched_rank() == 0 ? app.exit(error) : 0;
    }
    const CLI::App* at = &app;
    std::string path = "orthrus";
    while (!at->get_subcommands().empty()) {
      at = at->get_subcommands().front();
      path += " " + at->get_name();
    }
    // Every rank has the same arguments and is here. The first to end would have the launcher kill
    // the others, maybe before rank 0 has printed: they end together.
    if (launched_size() > 1) initialize_mpi();
    return leave({static_cast<int>(ExitCode::usage),
                  fmt::format("{}\nTry '{} --help'.", error.what(), path)});
  }
  Outcome outcome;
  try {
    for (const auto& [sub, command] : table) {
      if (sub->parsed()) outcome.code = command(context);
    }
  } catch (...) {
    outcome = current_outcome();
  }
  if (std::fflush(stdout) != 0 && outcome.code == 0 && errno != EPIPE) {
    outcome = {static_cast<int>(ExitCode::io), std::string("stdout: ") + std::strerror(errno)};
  }
  return leave(outcome);
}

}  // namespace

Communicator Context::world(double timeout_s) {
  initialize_mpi();
  comm::refuse_singletons(mpi.size);
  Communicator::Options options;
  options.timeout_s = timeout_s;
  return borrow(MPI_COMM_WORLD, options);
}

int Context::rank() const { return mpi.initialized ? mpi.rank : launched_rank(); }

int Context::size() const { return mpi.size; }

void Context::settle_error() {
  if (!mpi.initialized || mpi.size == 1 || mpi.settled) return;
  mpi.settled_code = settle(current_outcome());
  mpi.settled = true;
}

}  // namespace orthrus::cli

int main(int argc, char** argv) {
  try {
    return orthrus::cli::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "orthrus: %s\n", error.what());
    return static_cast<int>(orthrus::ExitCode::internal);
  }
}
