#include "runtime/cli/study_table.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "runtime/report_page.hpp"
#include "runtime/report_plots.hpp"

namespace orthrus::cli {

using nlohmann::ordered_json;
using runtime::report::format_number;

std::string shown(const ordered_json& cell) {
  if (cell.is_null()) return "-";
  if (cell.is_number()) return format_number(cell.get<double>());
  return cell.is_string() ? cell.get<std::string>() : cell.dump();
}

std::string table_text(const StudyTable& table) {
  std::vector<std::size_t> widths;
  for (const std::string& column : table.columns) widths.push_back(column.size());
  for (const auto& row : table.rows) {
    for (std::size_t c = 0; c < row.size(); ++c) {
      widths[c] = std::max(widths[c], shown(row[c]).size());
    }
  }
  std::string out = table.title + "\n";
  const auto line = [&](const auto& cell, const auto& numeric) {
    std::string text = " ";
    for (std::size_t c = 0; c < widths.size(); ++c) {
      text += numeric(c) ? fmt::format(" {:>{}} ", cell(c), widths[c])
                         : fmt::format(" {:<{}} ", cell(c), widths[c]);
    }
    text.erase(text.find_last_not_of(' ') + 1);
    out += text + "\n";
  };
  const auto numeric = [&](std::size_t c) {
    return std::any_of(table.rows.begin(), table.rows.end(),
                       [&](const auto& row) { return row[c].is_number(); });
  };
  line([&](std::size_t c) { return table.columns[c]; }, numeric);
  for (const auto& row : table.rows) line([&](std::size_t c) { return shown(row[c]); }, numeric);
  return out;
}

std::string table_csv(const StudyTable& table) {
  std::string out;
  const auto line = [&](std::size_t count, const auto& field) {
    for (std::size_t c = 0; c < count; ++c) out += (c > 0 ? "," : "") + field(c);
    out += "\n";
  };
  line(table.columns.size(),
       [&](std::size_t c) { return runtime::report::csv_field(table.columns[c]); });
  for (const auto& row : table.rows) {
    line(row.size(), [&](std::size_t c) {
      if (row[c].is_null()) return std::string();
      if (row[c].is_number_float()) return runtime::report::csv_number(row[c].get<double>());
      return runtime::report::csv_field(row[c].is_string() ? row[c].get<std::string>()
                                                           : row[c].dump());
    });
  }
  return out;
}

}  // namespace orthrus::cli
