#include "runtime/agree.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <exception>
#include <new>

namespace orthrus::runtime {
namespace {

[[noreturn]] void throw_as(ExitCode code, const std::string& what) {
  switch (code) {
    case ExitCode::config:
      throw ConfigError(what);
    case ExitCode::data:
      throw DataError(what);
    case ExitCode::numeric:
      throw NumericError(what);
    case ExitCode::cannot_create:
    case ExitCode::io:
    case ExitCode::permission:
      throw IoError(what, code);
    default:
      throw Error(what, code);
  }
}

}  // namespace

void agree(Communicator& comm, const std::string& error, ExitCode code) {
  const TrafficScope scope(comm, TrafficClass::setup);
  std::array<std::int64_t, 1> failed{error.empty() ? 0 : 1};
  comm.all_reduce(std::span<std::int64_t>(failed), ReduceOp::max);
  if (failed[0] == 0) return;
  // "code message" of every rank; the first that failed speaks for all.
  const auto all = comm.all_gather_strings(
      error.empty() ? std::string() : std::to_string(static_cast<int>(code)) + " " + error);
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (all[r].empty()) continue;
    int value = 0;
    const char* end = all[r].data() + all[r].size();
    const auto parsed = std::from_chars(all[r].data(), end, value);
    const std::string what(parsed.ptr + 1, end);
    // What rank 0 says, or all say alike, is about the job, not about a rank.
    bool common = r == 0;
    if (!common) common = std::count(all.begin(), all.end(), all[r]) == std::ssize(all);
    throw_as(static_cast<ExitCode>(value), common ? what
                                                  : "[rank " + std::to_string(r) + "/" +
                                                        std::to_string(all.size()) + "] " + what);
  }
}

void agree(Communicator& comm, const std::function<void()>& local) {
  std::string error;
  ExitCode code = ExitCode::internal;
  try {
    local();
  } catch (const Error& e) {
    error = e.what();
    code = e.exit_code();
  } catch (const std::bad_alloc&) {
    error = "out of memory";
  } catch (const std::exception& e) {
    error = e.what();
  }
  agree(comm, error, code);
}

}  // namespace orthrus::runtime
