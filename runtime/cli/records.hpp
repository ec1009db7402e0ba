#pragma once
/// @file
/// Records out of a file of JSON lines, one per line, and numbers out of records.

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace orthrus::cli {

struct JsonLine {
  std::size_t number = 0;  ///< in the file, from 1
  nlohmann::ordered_json record;
};
struct JsonLines {
  std::vector<JsonLine> lines;
  std::string warning;  ///< the last line is cut off, and was left out; else empty
};
/// Every line of `file`, an object each. Blank lines are passed over; a last line that was cut off
/// while it was written is left out.
/// @throws ConfigError  missing or unreadable
/// @throws DataError    with file and line: not JSON, no object
[[nodiscard]] JsonLines read_json_lines(const std::filesystem::path& file);

struct Records {
  std::vector<std::vector<double>> columns;  ///< one for each key, in the order asked for
  std::string warning;  ///< the last line is cut off, and was left out; else empty
};

/// `keys` of every line of `file`, all of them finite and above zero. A key with dots reaches into
/// nested objects where none has that very name.
/// @throws ConfigError, DataError  as `read_json_lines`; DataError with the key, too: no such key,
/// no such number; no records
[[nodiscard]] Records read_records(const std::filesystem::path& file,
                                   const std::vector<std::string>& keys);

}  // namespace orthrus::cli
