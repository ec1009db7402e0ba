#pragma once
/// @file
/// Sources: data sets as they come, from installed packages or from files, read into memory.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "data.hpp"

namespace orthrus::workloads {

/// A data set before it is cut into shards.
struct RawData {
  /// One run of bytes: `items` of `item_bytes` each.
  struct Part {
    std::string split;  ///< train | val
    std::string what;   ///< tokens | images | labels
    std::int64_t item_bytes = 1;
    std::vector<std::uint8_t> bytes;
  };
  std::string name;                                 ///< kjv, gcide, fashion-mnist, digits, files
  std::string kind;                                 ///< tokens | images
  std::vector<std::string> from;                    ///< the files read
  std::string package;                              ///< Debian package; empty for files
  std::int64_t vocab = 256;                         ///< tokens
  std::int64_t height = 0, width = 0, classes = 0;  ///< images
  std::vector<Part> parts;
};

/// "kjv, gcide, …": the names `read_source` knows.
[[nodiscard]] std::string named_sources();

/// @throws ConfigError, DataError as `prepare_data`.
[[nodiscard]] RawData read_source(std::span<const std::string> sources);

/// Unpacked content of a gzip file. @throws ConfigError missing; DataError damaged, with the
/// offset.
[[nodiscard]] std::vector<std::uint8_t> gunzip(const std::string& file);
/// Images and labels of a pair of IDX files. @throws DataError.
void read_idx(const std::string& images, const std::string& labels, const std::string& split,
              RawData& into);
/// Rows of pixels 0..16 and a label, comma-separated; the last tenth validates. @throws DataError.
void read_digits_csv(const std::string& file, RawData& into);

}  // namespace orthrus::workloads
