#pragma once
/// @file
/// Files as the operating system has them: one open for reading that is regular, one that appears
/// complete or not at all.

#include <xxhash.h>

#include <cstdint>
#include <filesystem>
#include <orthrus/error.hpp>
#include <string>
#include <utility>

namespace orthrus::runtime {

/// A regular file open for reading.
class File {
 public:
  /// @param follow_link      refuse a symbolic link otherwise.
  /// @param missing_is_data  a missing or unreadable file is damage (65), else a wrong request
  /// (78).
  /// @throws ConfigError, DataError (FIFO, device, directory).
  static File open_regular(const std::filesystem::path& file, bool follow_link,
                           bool missing_is_data);
  File(File&& other) noexcept : fd_(std::exchange(other.fd_, -1)), size_(other.size_) {}
  File& operator=(File&&) = delete;
  ~File();

  [[nodiscard]] int fd() const { return fd_; }
  [[nodiscard]] std::int64_t size() const { return size_; }  ///< when it was opened
  /// @return bytes read, fewer at the end of the file; −errno on an error.
  std::int64_t read_at(std::int64_t offset, std::int64_t bytes, void* out) const;

 private:
  explicit File(int fd) : fd_(fd) {}
  int fd_ = -1;
  std::int64_t size_ = 0;
};

/// A file written beside its final name and renamed to it by `commit`; without, it is removed.
class NewFile {
 public:
  /// @throws IoError (73 cannot create, 77 permission).
  explicit NewFile(std::filesystem::path file);
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  /// Asks for space first, so that a full disk is found before work is done. @throws IoError.
  void reserve(std::int64_t bytes);
  void write(const void* data, std::int64_t bytes);
  /// fsync, rename, fsync of the directory. @throws IoError.
  void commit();

 private:
  std::filesystem::path file_, temporary_;
  int fd_ = -1;
  bool committed_ = false;
};

std::string errno_text(int error);
/// @throws IoError with 77 for what permissions forbid, else with `otherwise`.
[[noreturn]] void throw_io(const std::filesystem::path& file, const std::string& doing, int error,
                           ExitCode otherwise);
std::string hex(const unsigned char* bytes, std::size_t count);
std::string hex(const XXH128_hash_t& hash);

}  // namespace orthrus::runtime
