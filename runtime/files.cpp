#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <orthrus/error.hpp>

#include "runtime/posix_file.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::runtime {

std::string errno_text(int error) { return std::generic_category().message(error); }

void throw_io(const std::filesystem::path& file, const std::string& doing, int error,
              ExitCode otherwise) {
  const bool permission = error == EACCES || error == EPERM || error == EROFS;
  throw IoError(file.string() + ": " + doing + ": " + errno_text(error),
                permission ? ExitCode::permission : otherwise);
}

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

File File::open_regular(const std::filesystem::path& file, bool follow_link, bool missing_is_data) {
  const auto fail = [&](const std::string& what, bool data) {
    if (data) throw DataError(file.string() + ": " + what);
    throw ConfigError(file.string() + ": " + what);
  };
  // O_NONBLOCK: opening a FIFO must not wait for its writer.
  const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | (follow_link ? 0 : O_NOFOLLOW);
  File result(::open(file.c_str(), flags));
  if (result.fd() < 0) {
    const int error = errno;
    if (error == ELOOP && !follow_link) fail("is a symbolic link; give the file itself", true);
    if (error == ENXIO) fail("is not a regular file", true);
    fail("cannot be read: " + errno_text(error), missing_is_data);
  }
  struct stat status {};
  if (::fstat(result.fd(), &status) != 0)
    fail("cannot be read: " + errno_text(errno), missing_is_data);
  // A link to something else is as given as the name was; not so in a checkpoint.
  if (!S_ISREG(status.st_mode)) fail("is not a regular file", !follow_link);
  result.size_ = status.st_size;
  return result;
}

std::int64_t File::read_at(std::int64_t offset, std::int64_t bytes, void* out) const {
  std::int64_t done = 0;
  while (done < bytes) {
    // Linux moves at most 2^31 bytes per call anyway.
    const std::size_t piece =
        static_cast<std::size_t>(std::min<std::int64_t>(bytes - done, 1 << 30));
    const ssize_t got = ::pread(fd_, static_cast<char*>(out) + done, piece, offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -errno;
    if (got == 0) break;
    done += got;
  }
  return done;
}

NewFile::NewFile(std::filesystem::path file) : file_(std::move(file)) {
  if (file_.filename().empty() || file_.filename() == "." || file_.filename() == "..") {
    throw IoError(file_.string() + ": names no file", ExitCode::cannot_create);
  }
  struct stat status {};
  if (::lstat(file_.c_str(), &status) == 0 && !S_ISREG(status.st_mode)) {
    throw IoError(file_.string() + ": exists and is not a regular file", ExitCode::cannot_create);
  }
  std::uint64_t random = 0;
  if (::getrandom(&random, sizeof random, GRND_NONBLOCK) != static_cast<ssize_t>(sizeof random)) {
    random = static_cast<std::uint64_t>(::getpid());
  }
  const std::string suffix = ".tmp-" + xxh3_hex(&random, sizeof random).substr(0, 8);
  temporary_ = file_.parent_path() / (file_.filename().string() + suffix);
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (fd_ < 0) throw_io(file_, "cannot create", errno, ExitCode::cannot_create);
}

NewFile::~NewFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!committed_) ::unlink(temporary_.c_str());
}

void NewFile::reserve(std::int64_t bytes) {
  // Not every file system can; then `write` finds out.
  if (bytes > 0 && ::fallocate(fd_, 0, 0, bytes) != 0 && errno == ENOSPC) {
    throw_io(file_, "cannot reserve " + std::to_string(bytes) + " bytes", ENOSPC, ExitCode::io);
  }
}

void NewFile::write(const void* data, std::int64_t bytes) {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const std::size_t piece = static_cast<std::size_t>(std::min<std::int64_t>(bytes, 1 << 30));
    const ssize_t done = ::write(fd_, from, piece);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) throw_io(file_, "write", errno, ExitCode::io);
    from += done;
    bytes -= done;
  }
}

void NewFile::commit() {
  if (::fsync(fd_) != 0) throw_io(file_, "fsync", errno, ExitCode::io);
  const int closed = ::close(fd_);
  fd_ = -1;
  if (closed != 0) throw_io(file_, "close", errno, ExitCode::io);
  if (::rename(temporary_.c_str(), file_.c_str()) != 0)
    throw_io(file_, "rename", errno, ExitCode::io);
  committed_ = true;
  sync_directory(file_.has_parent_path() ? file_.parent_path() : ".");
}

std::string xxh3_hex(const void* data, std::size_t bytes) { return hex(XXH3_128bits(data, bytes)); }

std::string hex(const XXH128_hash_t& hash) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  return hex(canonical.digest, sizeof canonical.digest);
}

std::string hex(const unsigned char* bytes, std::size_t count) {
  constexpr char digits[] = "0123456789abcdef";
  std::string text;
  text.reserve(2 * count);
  for (std::size_t i = 0; i < count; ++i) {
    text += digits[bytes[i] >> 4U];
    text += digits[bytes[i] & 15U];
  }
  return text;
}

std::string sha256_hex(const void* data, std::size_t bytes) {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int length = 0;
  if (EVP_Digest(data, bytes, digest.data(), &length, EVP_sha256(), nullptr) != 1) {
    throw Error("SHA-256 is not available in this OpenSSL", ExitCode::internal);
  }
  return hex(digest.data(), length);
}

std::string xxh3_file(const std::filesystem::path& file) {
  const File open = File::open_regular(file, /*follow_link=*/false, /*missing_is_data=*/true);
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(),
                                                                       XXH3_freeState);
  if (state == nullptr) throw std::bad_alloc();
  XXH3_128bits_reset(state.get());
  std::vector<char> buffer(1 << 20);
  for (std::int64_t offset = 0;;) {
    const std::int64_t got =
        open.read_at(offset, static_cast<std::int64_t>(buffer.size()), buffer.data());
    if (got < 0) throw DataError(file.string() + ": read: " + errno_text(static_cast<int>(-got)));
    if (got == 0) break;
    XXH3_128bits_update(state.get(), buffer.data(), static_cast<std::size_t>(got));
    offset += got;
  }
  return hex(XXH3_128bits_digest(state.get()));
}

void write_file_atomically(const std::filesystem::path& file, const std::string& text) {
  NewFile fresh(file);
  fresh.write(text.data(), static_cast<std::int64_t>(text.size()));
  fresh.commit();
}

std::string read_file(const std::filesystem::path& file, std::int64_t max_bytes) {
  const File open = File::open_regular(file, /*follow_link=*/true, /*missing_is_data=*/false);
  const auto too_large = [&] {
    throw DataError(file.string() + ": is larger than " + std::to_string(max_bytes) + " bytes");
  };
  if (open.size() > max_bytes) too_large();
  // One byte more than its size, to notice that it grew (and for /proc, whose files claim to be
  // empty).
  std::string text;
  std::int64_t got = 0;
  do {
    text.resize(static_cast<std::size_t>(
                    std::min(max_bytes, std::max<std::int64_t>(2 * got, open.size()))) +
                1);
    const auto room = static_cast<std::int64_t>(text.size()) - got;
    const std::int64_t more = open.read_at(got, room, text.data() + got);
    if (more < 0)
      throw ConfigError(file.string() + ": read: " + errno_text(static_cast<int>(-more)));
    got += more;
    if (got > max_bytes) too_large();
  } while (got == static_cast<std::int64_t>(text.size()));
  text.resize(static_cast<std::size_t>(got));
  return text;
}

void sync_directory(const std::filesystem::path& directory) {
  const int fd = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) throw_io(directory, "open", errno, ExitCode::io);
  const int result = ::fsync(fd);
  const int error = errno;
  ::close(fd);
  // Some file systems cannot sync a directory and say so; they have nothing to lose then.
  if (result != 0 && error != EINVAL && error != ENOTSUP)
    throw_io(directory, "fsync", error, ExitCode::io);
}

}  // namespace orthrus::runtime
