#pragma once
/// @file
/// Numbers out of a file of JSON lines: one record per line.

#include <filesystem>
#include <string>
#include <vector>

namespace orthrus::cli {

struct Records {
  std::vector<std::vector<double>> columns;  ///< one for each key, in the order asked for
  std::string warning;  ///< the last line is cut off, and was left out; else empty
};

/// `keys` of every line of `file`, all of them finite and above zero. A key with dots reaches into
/// nested objects where none has that very name. Blank lines are passed over; a last line that was
/// cut off while it was written is left out.
/// @throws ConfigError  missing or unreadable
/// @throws DataError    with file, line and key: not JSON, no such key, no such number; no records
[[nodiscard]] Records read_records(const std::filesystem::path& file,
                                   const std::vector<std::string>& keys);

}  // namespace orthrus::cli
