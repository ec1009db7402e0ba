#pragma once
/// @file
/// The parts of a sub-command. One file, one command: `add_<name>` declares its options on `app`
/// and returns what runs once they are parsed. `--json` is declared by main on every command that
/// does not declare it itself, and found in `Context::json`.

#include <CLI/CLI.hpp>
#include <functional>
#include <orthrus/communicator.hpp>
#include <string>

namespace orthrus::cli {

/// What main gives a command.
class Context {
 public:
  /// All ranks; initializes MPI on first use. A launch that became N singletons is refused (exit
  /// 78).
  [[nodiscard]] Communicator world(double timeout_s = 0);
  /// Before MPI is initialized: what the launcher's environment says, so that only one process
  /// prints.
  [[nodiscard]] int rank() const;
  [[nodiscard]] int size() const;  ///< 1 before MPI is initialized
  /// Called from a catch block while what the error left is still alive: when all ranks come here
  /// within seconds the error is agreed and the caller goes on to unwind; else other ranks are
  /// inside a collective that this one will never join, the error is printed and the job ends.
  /// Before MPI is initialized it does nothing.
  void settle_error();

  bool json = false;  ///< `--json`: one JSON document on stdout, by rank 0 (bench: a line per
                      ///< measurement), and nothing else there
};

/// @return the process's exit code (0); errors are thrown.
using Run = std::function<int(Context&)>;

Run add_train(CLI::App& app);
Run add_replay(CLI::App& app);
Run add_plan(CLI::App& app);
Run add_simulate(CLI::App& app);
Run add_bench(CLI::App& app);
Run add_ckpt(CLI::App& app);
Run add_data(CLI::App& app);
Run add_report(CLI::App& app);
Run add_study(CLI::App& app);
Run add_info(CLI::App& app);
Run add_doctor(CLI::App& app);

}  // namespace orthrus::cli
