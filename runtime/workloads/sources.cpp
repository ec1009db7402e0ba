#include "sources.hpp"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <orthrus/error.hpp>

extern char** environ;

namespace orthrus::workloads {
namespace {

namespace fs = std::filesystem;

const char* const bible_program = "/usr/bin/bible";
const char* const bible_data = "/usr/lib/bible.data";
const char* const gcide_file = "/usr/share/dictd/gcide.dict.dz";
const char* const fashion_directory = "/usr/share/datasets/fashion-mnist/";
const char* const digits_file =
    "/usr/lib/python3/dist-packages/sklearn/datasets/data/digits.csv.gz";

/// A file that a Debian package brings must be there.
void need(const std::string& file, const std::string& package) {
  if (::access(file.c_str(), R_OK) == 0) return;
  throw ConfigError(file + ": not there, or not readable; it comes with the Debian package " +
                    package + " (apt install " + package + ")");
}

/// What a program writes to its standard output. No shell takes part.
std::vector<std::uint8_t> output_of(const std::vector<std::string>& command) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) {
    throw Error(command[0] + ": no pipe: " + std::strerror(errno), ExitCode::internal);
  }
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
  pid_t child = 0;
  const int failed = ::posix_spawn(&child, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  ::close(ends[1]);
  std::vector<std::uint8_t> out;
  int status = 0;
  if (failed == 0) {
    std::uint8_t piece[1 << 16];
    for (;;) {
      const ssize_t got = ::read(ends[0], piece, sizeof piece);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) break;
      out.insert(out.end(), piece, piece + got);
    }
    while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
  }
  ::close(ends[0]);
  if (failed != 0) throw ConfigError(command[0] + ": does not start: " + std::strerror(failed));
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    throw ConfigError(command[0] + ": ended with wait status " + std::to_string(status));
  }
  return out;
}

/// The first 90 % train, the rest validates.
void add_text(std::vector<std::uint8_t> text, RawData& into) {
  const auto cut =
      text.begin() + static_cast<std::ptrdiff_t>(text.size() / 10 * 9 + text.size() % 10 * 9 / 10);
  into.kind = "tokens";
  into.parts.push_back({"train", "tokens", 1, {text.begin(), cut}});
  into.parts.push_back({"val", "tokens", 1, {cut, text.end()}});
}

RawData read_kjv() {
  RawData raw;
  raw.package = "bible-kjv-text";
  need(bible_program, "bible-kjv");
  need(bible_data, "bible-kjv-text");
  const fs::path data(bible_data);
  std::vector<std::uint8_t> text = output_of(
      {bible_program, "-f", "-p", data.parent_path(), "-d", data.filename(), "gen1:1-rev22:21"});
  constexpr std::ptrdiff_t verses = 31102;
  const std::ptrdiff_t lines = std::count(text.begin(), text.end(), '\n');
  if (lines != verses) {
    throw DataError(std::string(bible_data) + ": offset " + std::to_string(text.size()) +
                    " of the text: it ends after " + std::to_string(lines) + " verses of " +
                    std::to_string(verses));
  }
  raw.from = {bible_data};
  add_text(std::move(text), raw);
  return raw;
}

RawData read_gcide() {
  RawData raw;
  raw.package = "dict-gcide";
  need(gcide_file, raw.package);
  raw.from = {gcide_file};
  add_text(gunzip(gcide_file), raw);
  return raw;
}

RawData read_fashion_mnist() {
  RawData raw;
  raw.package = "dataset-fashion-mnist";
  const std::string at = fashion_directory;
  for (const auto& [split, stem] : {std::pair{"train", "train"}, std::pair{"val", "t10k"}}) {
    const std::string images = at + stem + "-images-idx3-ubyte.gz";
    const std::string labels = at + stem + "-labels-idx1-ubyte.gz";
    need(images, raw.package);
    need(labels, raw.package);
    read_idx(images, labels, split, raw);
    raw.from.insert(raw.from.end(), {images, labels});
  }
  raw.classes = 10;
  return raw;
}

RawData read_digits() {
  RawData raw;
  raw.package = "python3-sklearn";
  need(digits_file, raw.package);
  raw.from = {digits_file};
  read_digits_csv(digits_file, raw);
  return raw;
}

RawData read_files(std::span<const std::string> files) {
  RawData raw;
  raw.name = "files";
  std::vector<std::uint8_t> text;
  for (const std::string& file : files) {
    std::error_code error;
    if (!fs::is_regular_file(file, error)) {
      throw ConfigError(file + ": not a regular file, nor a data set known by name (" +
                        named_sources() + ")");
    }
    std::ifstream in(file, std::ios::binary);
    const std::size_t before = text.size();
    text.resize(before + static_cast<std::size_t>(fs::file_size(file)));
    in.read(reinterpret_cast<char*>(text.data() + before),
            static_cast<std::streamsize>(text.size() - before));
    if (!in) throw ConfigError(file + ": cannot be read");
    raw.from.push_back(file);
  }
  if (text.size() < 10) {
    throw DataError(raw.from.back() + ": offset " + std::to_string(text.size()) +
                    ": the text ends here; at least 10 bytes are needed for two parts");
  }
  add_text(std::move(text), raw);
  return raw;
}

struct NamedSource {
  const char* name;
  std::function<RawData()> read;
};

const std::vector<NamedSource>& table() {
  static const std::vector<NamedSource> rows{{"kjv", read_kjv},
                                             {"gcide", read_gcide},
                                             {"fashion-mnist", read_fashion_mnist},
                                             {"digits", read_digits}};
  return rows;
}

std::int64_t big_endian(const std::vector<std::uint8_t>& bytes, std::size_t at) {
  std::int64_t value = 0;
  for (std::size_t i = 0; i < 4; ++i) value = value << 8 | bytes[at + i];
  return value;
}

/// An IDX file of unsigned bytes: its dimensions, and the bytes behind the header.
std::vector<std::uint8_t> idx(const std::string& file, std::size_t dimensions,
                              std::vector<std::int64_t>& shape) {
  std::vector<std::uint8_t> bytes = gunzip(file);
  const std::size_t header = 4 + 4 * dimensions;
  if (bytes.size() < header || big_endian(bytes, 0) != 0x800 + static_cast<int>(dimensions)) {
    throw DataError(file + ": offset 0: not an IDX file of unsigned bytes in " +
                    std::to_string(dimensions) + " dimensions");
  }
  std::int64_t size = 1;
  for (std::size_t d = 0; d < dimensions; ++d) {
    shape.push_back(big_endian(bytes, 4 + 4 * d));
    if (shape.back() <= 0 || shape.back() > (std::int64_t{1} << 40) / size) {
      throw DataError(file + ": offset " + std::to_string(4 + 4 * d) + ": dimension " +
                      std::to_string(shape.back()));
    }
    size *= shape.back();
  }
  if (static_cast<std::int64_t>(bytes.size() - header) != size) {
    throw DataError(file + ": offset " + std::to_string(bytes.size()) +
                    ": the unpacked file ends here; its header promises " +
                    std::to_string(size + static_cast<std::int64_t>(header)) + " bytes");
  }
  bytes.erase(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(header));
  return bytes;
}

}  // namespace

std::vector<std::uint8_t> gunzip(const std::string& file) {
  const std::unique_ptr<gzFile_s, int (*)(gzFile)> in(::gzopen(file.c_str(), "rb"), ::gzclose);
  if (!in) throw ConfigError(file + ": cannot be opened: " + std::strerror(errno));
  ::gzbuffer(in.get(), 1 << 17);
  std::vector<std::uint8_t> out;
  std::vector<std::uint8_t> piece(1 << 20);
  for (;;) {
    const int got = ::gzread(in.get(), piece.data(), static_cast<unsigned>(piece.size()));
    int state = 0;
    const char* what = ::gzerror(in.get(), &state);
    // A file that ends early is read as far as it goes, with Z_BUF_ERROR.
    if (got < 0 || state < 0) {
      throw DataError(file + ": offset " + std::to_string(::gzoffset(in.get())) + ": " + what);
    }
    if (got == 0) break;
    out.insert(out.end(), piece.begin(), piece.begin() + got);
  }
  return out;
}

void read_idx(const std::string& images, const std::string& labels, const std::string& split,
              RawData& into) {
  std::vector<std::int64_t> image_shape, label_shape;
  std::vector<std::uint8_t> pixels = idx(images, 3, image_shape);
  std::vector<std::uint8_t> classes = idx(labels, 1, label_shape);
  if (image_shape[0] != label_shape[0]) {
    throw DataError(labels + ": offset 4: " + std::to_string(label_shape[0]) + " labels for " +
                    std::to_string(image_shape[0]) + " images");
  }
  into.kind = "images";
  into.height = image_shape[1];
  into.width = image_shape[2];
  into.parts.push_back({split, "images", into.height * into.width, std::move(pixels)});
  into.parts.push_back({split, "labels", 1, std::move(classes)});
}

void read_digits_csv(const std::string& file, RawData& into) {
  const std::vector<std::uint8_t> text = gunzip(file);
  constexpr std::size_t columns = 65;  // 8×8 pixels and the digit
  std::vector<std::uint8_t> values;
  const char* const begin = reinterpret_cast<const char*>(text.data());
  const char* const end = begin + text.size();
  for (const char* at = begin; at < end;) {
    double value = -1;
    const auto [next, error] = std::from_chars(at, end, value);
    const bool label = values.size() % columns == columns - 1;
    const char separator = label ? '\n' : ',';
    const bool last = next == end && label;
    if (error != std::errc() || value < 0 || value > (label ? 9 : 16) ||
        (!last && (next == end || (*next != separator && *next != '\r')))) {
      throw DataError(file + ": offset " + std::to_string(at - begin) +
                      " of the text: expected rows of 64 numbers up to 16 and a digit");
    }
    values.push_back(static_cast<std::uint8_t>(value));
    at = next;
    while (at < end && (*at == separator || *at == '\r')) ++at;
  }
  const std::size_t count = values.size() / columns;
  if (count < 10 || values.size() % columns != 0) {
    throw DataError(file + ": offset " + std::to_string(text.size()) +
                    " of the text: it ends inside a row, or after fewer than 10");
  }
  into.kind = "images";
  into.height = into.width = 8;
  into.classes = 10;
  const std::size_t cut = count * 9 / 10;
  for (const auto& [split, first, last] :
       {std::tuple{"train", std::size_t{0}, cut}, std::tuple{"val", cut, count}}) {
    RawData::Part images{split, "images", 64, {}};
    RawData::Part labels{split, "labels", 1, {}};
    for (std::size_t i = first; i < last; ++i) {
      const auto row = values.begin() + static_cast<std::ptrdiff_t>(i * columns);
      images.bytes.insert(images.bytes.end(), row, row + 64);
      labels.bytes.push_back(row[64]);
    }
    into.parts.push_back(std::move(images));
    into.parts.push_back(std::move(labels));
  }
}

bool is_named_source(const std::string& name) {
  return std::any_of(table().begin(), table().end(),
                     [&](const NamedSource& row) { return name == row.name; });
}

std::string named_sources() {
  std::string names;
  for (const NamedSource& row : table())
    names += (names.empty() ? "" : ", ") + std::string(row.name);
  return names;
}

RawData read_source(std::span<const std::string> sources) {
  if (sources.empty()) throw ConfigError("no data source given; known: " + named_sources());
  for (const NamedSource& row : table()) {
    if (sources[0] != row.name) continue;
    if (sources.size() > 1) {
      throw ConfigError("'" + sources[0] + "' is a data set of its own and cannot be joined with " +
                        sources[1] + " (a file of that name is ./" + sources[0] + ")");
    }
    RawData raw = row.read();
    raw.name = row.name;
    return raw;
  }
  return read_files(sources);
}

}  // namespace orthrus::workloads
