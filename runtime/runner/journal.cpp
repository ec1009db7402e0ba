#include "runtime/runner/journal.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <orthrus/error.hpp>
#include <string>
#include <utility>

#include "runtime/posix_file.hpp"

namespace orthrus::runner {

Journal::Journal(const std::filesystem::path& file) : path_(file) {
  fd_ = ::open(file.c_str(), O_CREAT | O_RDWR | O_APPEND | O_CLOEXEC, 0644);
  if (fd_ < 0) runtime::throw_io(file, "cannot create", errno, ExitCode::cannot_create);
  char last = '\n';
  const off_t size = ::lseek(fd_, 0, SEEK_END);
  if (size > 0 && ::pread(fd_, &last, 1, size - 1) == 1 && last != '\n' &&
      ::write(fd_, "\n", 1) != 1) {
    const int why = errno;
    ::close(std::exchange(fd_, -1));
    runtime::throw_io(file, "cannot write", why, ExitCode::io);
  }
}

Journal::~Journal() {
  if (fd_ >= 0) ::close(fd_);
}

void Journal::write(const Json& line) {
  const std::string text = line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  // One call: a reader sees whole lines, and a kill leaves at most one torn.
  const ssize_t written = ::write(fd_, text.data(), text.size());
  if (written != static_cast<ssize_t>(text.size()) || ::fdatasync(fd_) != 0) {
    runtime::throw_io(path_, "cannot write", written < 0 ? errno : EIO, ExitCode::io);
  }
}

std::vector<Json> read_lines(const std::filesystem::path& file) {
  std::vector<Json> out;
  std::ifstream in(file, std::ios::binary);
  for (std::string line; std::getline(in, line);) {
    Json value = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (value.is_object()) out.push_back(std::move(value));
  }
  return out;
}

}  // namespace orthrus::runner
