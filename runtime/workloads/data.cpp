#include "data.hpp"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <orthrus/error.hpp>
#include <random>

#include "sources.hpp"

namespace orthrus::workloads {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

const char* const format_name = "orthrus-data";
constexpr int format_version = 1;
const char* const manifest_name = "manifest.json";

std::string sha256(const std::uint8_t* data, std::size_t bytes) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned length = 0;
  if (EVP_Digest(data, bytes, digest, &length, EVP_sha256(), nullptr) != 1) {
    throw Error("SHA-256 is not available in this libcrypto", ExitCode::internal);
  }
  std::string text;
  for (unsigned i = 0; i < length; ++i) {
    constexpr char hex[] = "0123456789abcdef";
    text += hex[digest[i] >> 4];
    text += hex[digest[i] & 15];
  }
  return text;
}

// ---- writing

[[noreturn]] void cannot(const std::string& what, const fs::path& file, int error,
                         ExitCode otherwise) {
  const bool denied = error == EACCES || error == EPERM || error == EROFS;
  throw IoError(file.string() + ": cannot " + what + ": " + std::strerror(error),
                denied ? ExitCode::permission : otherwise);
}

void write_new_file(const fs::path& file, const std::uint8_t* data, std::size_t bytes) {
  const int fd = ::open(file.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
  if (fd < 0) cannot("create", file, errno, ExitCode::cannot_create);
  int error = 0;
  while (bytes > 0 && error == 0) {
    const ssize_t wrote = ::write(fd, data, bytes);
    if (wrote < 0) {
      if (errno != EINTR) error = errno;
      continue;
    }
    data += wrote;
    bytes -= static_cast<std::size_t>(wrote);
  }
  if (error == 0 && ::fsync(fd) != 0) error = errno;
  if (::close(fd) != 0 && error == 0) error = errno;
  if (error != 0) cannot("write", file, error, ExitCode::io);
}

void sync(const fs::path& directory) {
  const int fd = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) cannot("open", directory, errno, ExitCode::io);
  const int failed = ::fsync(fd);
  const int error = errno;
  ::close(fd);
  // Some file systems do not sync directories, and say so.
  if (failed != 0 && error != EINVAL) cannot("sync", directory, error, ExitCode::io);
}

/// A directory that vanishes unless it is published.
class Draft {
 public:
  explicit Draft(const fs::path& final) {
    const fs::path whole = fs::absolute(final).lexically_normal();
    final_ = whole.has_filename() ? whole : whole.parent_path();
    std::error_code error;
    fs::create_directories(final_.parent_path(), error);
    if (error) {
      cannot("create", final_.parent_path(), error.value(), ExitCode::cannot_create);
    }
    std::random_device random;
    char suffix[32];
    std::snprintf(suffix, sizeof suffix, ".tmp-%08x%08x", random(), random());
    path_ = final_.string() + suffix;
    if (::mkdir(path_.c_str(), 0755) != 0) {
      cannot("create", path_, errno, ExitCode::cannot_create);
    }
  }
  ~Draft() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  Draft(const Draft&) = delete;
  Draft& operator=(const Draft&) = delete;

  [[nodiscard]] const fs::path& path() const { return path_; }
  /// @return false when a non-empty directory of that name is there.
  bool publish() {
    sync(path_);
    if (::rename(path_.c_str(), final_.c_str()) != 0) {
      if (errno == ENOTEMPTY || errno == EEXIST) return false;
      cannot("put in place", final_, errno, ExitCode::cannot_create);
    }
    sync(final_.parent_path());
    return true;
  }
  /// Puts this directory where another one is; that one is removed.
  void replace() {
    const fs::path old = path_.string() + ".old";
    if (::rename(final_.c_str(), old.c_str()) != 0 && errno != ENOENT) {
      cannot("replace", final_, errno, ExitCode::cannot_create);
    }
    const bool placed = publish();
    std::error_code ignored;
    fs::remove_all(old, ignored);
    // Not placed: another process was faster, and checks the same content.
    static_cast<void>(placed);
  }

 private:
  fs::path final_, path_;
};

Json manifest_of(const RawData& raw, std::int64_t shard_bytes) {
  Json source{{"name", raw.name}, {"files", raw.from}};
  if (!raw.package.empty()) source["debian_package"] = raw.package;
  Json m{{"format", format_name}, {"version", format_version}, {"kind", raw.kind},
         {"dtype", "u8"},         {"source", source},          {"counts", Json::object()},
         {"files", Json::array()}};
  if (raw.kind == "tokens") {
    m["tokenizer"] = "byte";
    m["vocab"] = raw.vocab;
  } else {
    m["shape"] = {raw.height, raw.width};
    m["classes"] = raw.classes;
  }
  for (const RawData::Part& part : raw.parts) {
    const auto bytes = static_cast<std::int64_t>(part.bytes.size());
    if (part.what != "labels") m["counts"][part.split] = bytes / part.item_bytes;
    const std::int64_t step =
        std::max(part.item_bytes, shard_bytes / part.item_bytes * part.item_bytes);
    int number = 0;
    for (std::int64_t at = 0; at < bytes; at += step, ++number) {
      const std::int64_t size = std::min(step, bytes - at);
      char name[64];
      std::snprintf(name, sizeof name, "%s%s%s-%05d.bin", part.split.c_str(),
                    part.what == "tokens" ? "" : "-",
                    part.what == "tokens" ? "" : part.what.c_str(), number);
      m["files"].push_back(
          {{"file", name},
           {"split", part.split},
           {"what", part.what},
           {"bytes", size},
           {"sha256", sha256(part.bytes.data() + at, static_cast<std::size_t>(size))}});
    }
  }
  return m;
}

void write_shards(const RawData& raw, const Json& manifest, const fs::path& directory) {
  std::map<std::pair<std::string, std::string>, std::int64_t> done;
  for (const Json& row : manifest["files"]) {
    const auto split = row["split"].get<std::string>();
    const auto what = row["what"].get<std::string>();
    const auto part = std::find_if(raw.parts.begin(), raw.parts.end(), [&](const RawData::Part& p) {
      return p.split == split && p.what == what;
    });
    std::int64_t& at = done[{split, what}];
    const auto bytes = row["bytes"].get<std::int64_t>();
    write_new_file(directory / row["file"].get<std::string>(), part->bytes.data() + at,
                   static_cast<std::size_t>(bytes));
    at += bytes;
  }
  const std::string text = manifest.dump(2) + "\n";
  write_new_file(directory / manifest_name, reinterpret_cast<const std::uint8_t*>(text.data()),
                 text.size());
}

// ---- reading

[[noreturn]] void damaged(const fs::path& file, std::int64_t offset, const std::string& what) {
  throw DataError(file.string() + ": offset " + std::to_string(offset) + ": " + what);
}

/// A data set as a manifest describes it. Nothing in the manifest is believed before it is looked
/// at.
struct Manifest {
  struct Shard {
    std::string file, split, what, sha256;
    std::int64_t bytes = 0;
  };
  fs::path directory;
  Json json;
  std::string kind, source;
  std::int64_t vocab = 0, height = 0, width = 0, classes = 0;
  std::vector<Shard> shards;
};

std::vector<std::uint8_t> read_whole(const fs::path& file, std::int64_t max_bytes) {
  std::error_code error;
  const auto status = fs::status(file, error);
  if (!fs::exists(status)) throw ConfigError(file.string() + ": not there");
  if (!fs::is_regular_file(status)) damaged(file, 0, "not a regular file");
  const auto bytes = static_cast<std::int64_t>(fs::file_size(file, error));
  if (error) throw ConfigError(file.string() + ": " + error.message());
  if (bytes > max_bytes) {
    damaged(file, max_bytes,
            std::to_string(bytes) + " bytes are more than the " + std::to_string(max_bytes) +
                " that belong here");
  }
  std::ifstream in(file, std::ios::binary);
  if (!in) throw ConfigError(file.string() + ": cannot be opened: " + std::strerror(errno));
  std::vector<std::uint8_t> out(static_cast<std::size_t>(bytes));
  in.read(reinterpret_cast<char*>(out.data()), bytes);
  if (in.gcount() != bytes) damaged(file, in.gcount(), "the file ends here");
  return out;
}

template <class T>
T field(const Json& object, const char* key, const fs::path& file) {
  const auto it = object.find(key);
  if (it == object.end()) damaged(file, 0, std::string("no key '") + key + "'");
  try {
    return it->get<T>();
  } catch (const Json::exception&) {
    damaged(file, 0, std::string("key '") + key + "' is " + it->dump() + ", of another type");
  }
}

std::int64_t field_in(const Json& object, const char* key, std::int64_t min, std::int64_t max,
                      const fs::path& file) {
  const auto it = object.find(key);
  if (it == object.end() || !it->is_number_integer() || it->get<std::int64_t>() < min ||
      it->get<std::int64_t>() > max) {
    damaged(file, 0,
            std::string("key '") + key + "' must be a whole number from " + std::to_string(min) +
                " to " + std::to_string(max));
  }
  return it->get<std::int64_t>();
}

Manifest read_manifest(const fs::path& directory) {
  const fs::path file = directory / manifest_name;
  const std::vector<std::uint8_t> text = read_whole(file, 1 << 24);
  Manifest m;
  m.directory = directory;
  try {
    m.json = Json::parse(text.begin(), text.end());
  } catch (const Json::parse_error& e) {
    damaged(file, static_cast<std::int64_t>(e.byte), "not JSON");
  }
  if (!m.json.is_object() || m.json.value("format", Json()) != format_name) {
    damaged(file, 0, std::string("not a manifest of format '") + format_name + "'");
  }
  if (m.json.value("version", Json()) != format_version) {
    damaged(file, 0,
            "version " + m.json.value("version", Json()).dump() +
                " is not known; known: " + std::to_string(format_version));
  }
  m.kind = field<std::string>(m.json, "kind", file);
  if (field<std::string>(m.json, "dtype", file) != "u8") damaged(file, 0, "dtype is not u8");
  const auto source = field<Json>(m.json, "source", file);
  if (source.is_object()) m.source = field<std::string>(source, "name", file);
  if (m.kind == "tokens") {
    m.vocab = field_in(m.json, "vocab", 1, 256, file);
  } else if (m.kind == "images") {
    const auto shape = field<Json>(m.json, "shape", file);
    if (!shape.is_array() || shape.size() != 2) damaged(file, 0, "shape is not [height, width]");
    for (const Json& side : shape) {
      if (!side.is_number_integer() || side < 1 || side > 4096) {
        damaged(file, 0, "shape is not two numbers from 1 to 4096");
      }
    }
    m.height = shape[0].get<std::int64_t>();
    m.width = shape[1].get<std::int64_t>();
    m.classes = field_in(m.json, "classes", 1, 256, file);
  } else {
    damaged(file, 0, "kind '" + m.kind + "' is not known; known: tokens, images");
  }
  const auto files = field<Json>(m.json, "files", file);
  if (!files.is_array() || files.empty()) damaged(file, 0, "files is not a list of shards");
  for (const Json& row : files) {
    if (!row.is_object()) damaged(file, 0, "files is not a list of shards");
    Manifest::Shard shard;
    shard.file = field<std::string>(row, "file", file);
    shard.split = field<std::string>(row, "split", file);
    shard.what = field<std::string>(row, "what", file);
    shard.sha256 = field<std::string>(row, "sha256", file);
    shard.bytes = field_in(row, "bytes", 0, std::int64_t{1} << 40, file);
    if (shard.file.empty() || shard.file[0] == '.' || shard.file.find('/') != std::string::npos) {
      damaged(file, 0, "'" + shard.file + "' is not the name of a shard");
    }
    m.shards.push_back(std::move(shard));
  }
  return m;
}

/// The bytes of all shards of one part, each below `limit` (256: any).
std::vector<std::uint8_t> read_part(const Manifest& m, const std::string& split,
                                    const std::string& what, std::int64_t limit) {
  std::vector<std::uint8_t> all;
  for (const Manifest::Shard& shard : m.shards) {
    if (shard.split != split || shard.what != what) continue;
    const fs::path file = m.directory / shard.file;
    const std::vector<std::uint8_t> bytes = read_whole(file, shard.bytes);
    const auto size = static_cast<std::int64_t>(bytes.size());
    if (size == 0) damaged(file, 0, "an empty shard");
    if (size < shard.bytes) {
      damaged(
          file, size,
          "the file ends here; its manifest promises " + std::to_string(shard.bytes) + " bytes");
    }
    const auto high =
        std::find_if(bytes.begin(), bytes.end(), [&](std::uint8_t b) { return b >= limit; });
    if (high != bytes.end()) {
      damaged(file, high - bytes.begin(),
              (what == "labels" ? "label " : "token ") + std::to_string(*high) + " is not below " +
                  std::to_string(limit) + (what == "labels" ? " (classes)" : " (vocabulary)"));
    }
    if (sha256(bytes.data(), bytes.size()) != shard.sha256) {
      damaged(file, 0,
              "the SHA-256 of its " + std::to_string(size) + " bytes is not the manifest's");
    }
    all.insert(all.end(), bytes.begin(), bytes.end());
  }
  if (all.empty()) damaged(m.directory / manifest_name, 0, "no " + split + " " + what);
  return all;
}

/// True when all shards are there and intact.
bool intact(const Manifest& m) {
  try {
    for (const Manifest::Shard& shard : m.shards) {
      const auto bytes = read_whole(m.directory / shard.file, shard.bytes);
      if (sha256(bytes.data(), bytes.size()) != shard.sha256) return false;
    }
    return true;
  } catch (const Error&) {
    return false;
  }
}

fs::path located(const std::string& source) {
  if (fs::is_directory(source)) return source;
  if (!is_named_source(source)) {
    throw ConfigError("data.source: '" + source + "' is not a directory, nor one of " +
                      named_sources());
  }
  fs::path directory = named_directory(source);
  if (!fs::exists(directory / manifest_name)) {
    prepare_data(std::span<const std::string>(&source, 1), directory);
  }
  return directory;
}

Manifest open_manifest(const std::string& source, const std::string& kind) {
  Manifest m = read_manifest(located(source));
  if (m.kind != kind) {
    throw ConfigError("data.source: " + m.directory.string() + " holds " + m.kind +
                      "; this workload reads " + kind);
  }
  return m;
}

}  // namespace

fs::path named_directory(const std::string& name) {
  const fs::path here = fs::path("data") / name;
  if (fs::exists(here / manifest_name)) return here;
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && cache[0] == '/') return fs::path(cache) / "orthrus" / name;
  return here;
}

Prepared prepare_data(std::span<const std::string> sources, const fs::path& out,
                      std::int64_t shard_bytes) {
  const RawData raw = read_source(sources);
  const Json manifest = manifest_of(raw, shard_bytes);
  const auto same = [&]() {
    try {
      const Manifest there = read_manifest(out);
      return there.json == manifest && intact(there);
    } catch (const Error&) {
      return false;
    }
  };
  Prepared result{out, false, manifest.dump(2)};
  const bool occupied = fs::exists(out) && !(fs::is_directory(out) && fs::is_empty(out));
  if (occupied) {
    if (same()) {
      result.kept = true;
      return result;
    }
    // Only what this command made may be overwritten, and only by a new version of itself.
    std::string holds = "something else";
    try {
      const Manifest there = read_manifest(out);
      if (there.source == raw.name)
        holds.clear();
      else
        holds = "the data set '" + there.source + "'";
    } catch (const Error&) {
    }
    if (!holds.empty()) {
      throw ConfigError(out.string() + ": holds " + holds +
                        "; remove it, or choose another directory (--out)");
    }
  }
  Draft draft(out);
  write_shards(raw, manifest, draft.path());
  if (occupied) {
    draft.replace();
  } else if (!draft.publish()) {
    // Another process published first; its content must be ours.
    if (!same()) {
      throw ConfigError(out.string() + ": appeared while it was prepared, with other content");
    }
    result.kept = true;
  }
  return result;
}

Tokens open_tokens(const std::string& source) {
  const Manifest m = open_manifest(source, "tokens");
  Tokens tokens;
  tokens.vocab = m.vocab;
  tokens.train = read_part(m, "train", "tokens", m.vocab);
  tokens.val = read_part(m, "val", "tokens", m.vocab);
  return tokens;
}

Images open_images(const std::string& source) {
  const Manifest m = open_manifest(source, "images");
  Images images;
  images.height = m.height;
  images.width = m.width;
  images.classes = m.classes;
  for (const auto& [split, part] : {std::pair{"train", &images.train}, {"val", &images.val}}) {
    part->pixels = read_part(m, split, "images", 256);
    part->labels = read_part(m, split, "labels", m.classes);
    if (static_cast<std::int64_t>(part->pixels.size()) != part->count() * m.height * m.width) {
      damaged(m.directory / manifest_name, 0,
              std::to_string(part->pixels.size()) + " bytes of " + split + " images for " +
                  std::to_string(part->count()) + " labels");
    }
  }
  return images;
}

}  // namespace orthrus::workloads
