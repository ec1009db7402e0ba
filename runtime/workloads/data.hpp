#pragma once
/// @file
/// Data sets on disk: a directory of byte shards and a manifest that says what they must be.
///
/// `manifest.json` holds format, version, kind (`tokens` or `images`), dtype, vocabulary or image
/// shape, counts, the source, and of each shard its name, bytes and SHA-256.

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace orthrus::workloads {

/// True for the data sets known by name: kjv, gcide, fashion-mnist, digits.
[[nodiscard]] bool is_named_source(const std::string& name);

/// What `prepare_data` did.
struct Prepared {
  std::filesystem::path directory;
  bool kept = false;     ///< the directory already held exactly this
  std::string manifest;  ///< JSON text
};

/// Largest shard `prepare_data` writes.
inline constexpr std::int64_t default_shard_bytes = std::int64_t{1} << 28;

/// Writes a data set to `out`, which appears whole or not at all; safe beside other processes that
/// do the same. @param sources  `kjv`, `gcide`, `fashion-mnist` or `digits` alone, or files, whose
/// bytes are strung together. Text is split: the first 90 % train, the rest validates.
/// @throws ConfigError  a package is not installed (it is named), a file is missing, `out` holds
/// something
///         else. DataError: an input is malformed. IoError: `out` cannot be written.
Prepared prepare_data(std::span<const std::string> sources, const std::filesystem::path& out,
                      std::int64_t shard_bytes = default_shard_bytes);

/// Where a named data set is looked for: `data/<name>` when it is there, else
/// `$XDG_CACHE_HOME/orthrus/<name>`, else (that variable unset) `data/<name>` again.
[[nodiscard]] std::filesystem::path named_directory(const std::string& name);

/// Tokens of a text, one byte each.
struct Tokens {
  std::vector<std::uint8_t> train, val;
  std::int64_t vocab = 256;
};

/// Images of one channel with a label each.
struct Images {
  struct Part {
    std::vector<std::uint8_t> pixels, labels;
    [[nodiscard]] std::int64_t count() const { return static_cast<std::int64_t>(labels.size()); }
  };
  std::int64_t height = 0, width = 0, classes = 0;
  Part train, val;
};

/// Opens `source`: a prepared directory, or a name (prepared first where it is missing). All of it
/// is checked: lengths, hashes, every token against the vocabulary, every label against the
/// classes.
/// @throws DataError with file and offset; ConfigError for what is not there, or is of the other
/// kind.
[[nodiscard]] Tokens open_tokens(const std::string& source);
[[nodiscard]] Images open_images(const std::string& source);

}  // namespace orthrus::workloads
