#pragma once
/// @file
/// Errors: what went wrong, with the numbers, and the exit code a program should end with.

#include <source_location>
#include <stdexcept>
#include <string>

namespace orthrus {

/// Exit codes of every Orthrus program, also under mpirun (sysexits.h where it has one).
enum class ExitCode : int {
  ok = 0,
  usage = 64,
  data = 65,      ///< an input exists but is malformed
  internal = 70,  ///< a defect, or the communication failed
  cannot_create = 73,
  io = 74,         ///< write, fsync or rename failed
  preempted = 75,  ///< asked to stop, and saved
  permission = 77,
  config = 78,    ///< what was given cannot be run
  deadline = 79,  ///< a rank did not answer in time
  numeric = 80,   ///< the numbers left the finite range
};

/// Root of all exceptions thrown by Orthrus.
class Error : public std::runtime_error {
 public:
  Error(const std::string& what, ExitCode code) : std::runtime_error(what), code_(code) {}
  [[nodiscard]] ExitCode exit_code() const noexcept { return code_; }

 private:
  ExitCode code_;
};

/// The configuration, a parameter description or a request cannot be run as given.
struct ConfigError : Error {
  explicit ConfigError(const std::string& what, ExitCode code = ExitCode::config)
      : Error(what, code) {}
};
/// Shapes, strides, dtypes or buffer sizes contradict each other.
struct ShapeError : Error {
  explicit ShapeError(const std::string& what, ExitCode code = ExitCode::config)
      : Error(what, code) {}
};
/// A message was not sent, not answered, or answered wrongly.
struct CommError : Error {
  explicit CommError(const std::string& what, ExitCode code = ExitCode::internal)
      : Error(what, code) {}
};
/// A device or its library refused.
struct DeviceError : Error {
  explicit DeviceError(const std::string& what, ExitCode code = ExitCode::internal)
      : Error(what, code) {}
};
/// Numbers left the range the method can work with.
struct NumericError : Error {
  explicit NumericError(const std::string& what, ExitCode code = ExitCode::numeric)
      : Error(what, code) {}
};
/// A file exists but its content is malformed or damaged.
struct DataError : Error {
  explicit DataError(const std::string& what, ExitCode code = ExitCode::data) : Error(what, code) {}
};
/// A file could not be created, written, synced, renamed or read (`code` says which).
struct IoError : Error {
  explicit IoError(const std::string& what, ExitCode code = ExitCode::io) : Error(what, code) {}
};

/// Guards a promised door: throws `E` with `what` and the caller's name when `condition` is false.
template <class E = ShapeError>
void expects(bool condition, const char* what,
             std::source_location where = std::source_location::current()) {
  if (!condition) throw E(std::string(where.function_name()) + ": " + what);
}

}  // namespace orthrus
