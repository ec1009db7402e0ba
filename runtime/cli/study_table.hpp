#pragma once
/// @file
/// A table of a study's report, and how it is written.

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace orthrus::cli {

/// A table for a terminal, for the page and for a spreadsheet. Cells are numbers, texts or null.
struct StudyTable {
  std::string name, title, why;
  std::vector<std::string> columns;
  std::vector<std::vector<nlohmann::ordered_json>> rows;
};
/// A number with four digits, a text as it is, "-" for null.
[[nodiscard]] std::string shown(const nlohmann::ordered_json& cell);
[[nodiscard]] std::string table_text(const StudyTable& table);
[[nodiscard]] std::string table_csv(const StudyTable& table);

}  // namespace orthrus::cli
