#pragma once
/// @file
/// Journal: what happened in a study, one JSON object per line, each on disk before the next thing
/// happens. Its last line may be cut off; everything else can be built again from it.

#include <filesystem>
#include <vector>

#include "runtime/runner/identity.hpp"

namespace orthrus::runner {

class Journal {
 public:
  /// Opens for appending, and ends a line that was cut off.
  explicit Journal(const std::filesystem::path& file);
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  /// Returns when the line is on disk. @throws IoError.
  void write(const Json& line);

 private:
  std::filesystem::path path_;
  int fd_ = -1;
};

/// The objects of a file of JSON lines; lines that do not parse are passed over. No file: none.
[[nodiscard]] std::vector<Json> read_lines(const std::filesystem::path& file);

}  // namespace orthrus::runner
