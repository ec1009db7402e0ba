// Runs side by side: as a page, for a terminal, and as JSON.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <string_view>
#include <utility>
#include <vector>

#include "runtime/report.hpp"
#include "runtime/report_charts.hpp"
#include "runtime/report_data.hpp"
#include "runtime/report_page.hpp"

namespace orthrus::runtime {
namespace {

using namespace report;

struct Compared {
  std::string label;
  json summary;
  std::vector<Row> rows;
};

std::vector<Compared> read_runs(std::span<const RunRecord> runs) {
  std::vector<Compared> out;
  for (const RunRecord& run : runs) {
    std::vector<Row> rows = read_rows(run.metrics_jsonl);
    json summary = complete_summary(run.summary_json, rows);
    out.push_back({run.label, std::move(summary), std::move(rows)});
  }
  return out;
}

/// A column of the comparison: where it comes from, how it looks, and whether less is better.
struct Column {
  const char* key;  ///< in the JSON document
  const char* title;
  std::function<json(const json&)> value;
  std::function<std::string(double)> format;  ///< none: text
  int better = 0;                             ///< -1: the least is best, +1: the most
};

std::vector<Column> columns() {
  const auto top_level = [](const char* key) {
    return [key](const json& s) { return number_or_null(number(s, key)); };
  };
  const auto whole = [](const char* key) {
    return [key](const json& s) { return whole_or_null(number(s, key)); };
  };
  const auto string = [](const char* key) {
    return [key](const json& s) { return json(text(s, key)); };
  };
  const auto final = [](const char* key) {
    return [key](const json& s) { return number_or_null(number(child(s, "final"), key)); };
  };
  return {
      {"rules", "rules", [](const json& s) { return json(rules_of(s)); }, {}, 0},
      {"workload", "workload", string("workload"), {}, 0},
      {"status", "status", string("status"), {}, 0},
      {"ranks", "ranks", whole("ranks"), format_count, 0},
      {"steps", "steps", whole("steps"), format_count, 0},
      {"loss", "loss", final("loss"), format_number, 0},
      {"val_loss", "val loss", final("val_loss"), format_number, -1},
      {"val_accuracy", "val accuracy", final("val_accuracy"), format_number, +1},
      {"optimizer_ms", "optimizer",
       [](const json& s) { return number_or_null(number(child(s, "optimizer_ms"), "total")); },
       format_ms, -1},
      {"step_ms", "step", top_level("step_ms"), format_ms, 0},
      {"bytes_per_step", "bytes per step", whole("bytes_per_step"), format_bytes, -1},
      {"state_bytes_max", "state per rank",
       [](const json& s) { return whole_or_null(state_bytes(s)); }, format_bytes, -1},
      {"items_per_s", "items/s", top_level("items_per_s"), format_number, 0},
      {"weights_hash", "weights", string("weights_hash"), {}, 0},
  };
}

struct Cell {
  json value;
  std::string shown;
  bool best = false, numeric = false;
};
struct Table {
  std::vector<std::string> titles;
  std::vector<bool> numeric;
  std::vector<std::vector<Cell>> rows;  ///< one per run
};

/// Columns that no run has anything for are left out, and those that say the same of all runs
/// without being a result.
Table compare(const std::vector<Compared>& runs) {
  Table table;
  table.rows.resize(runs.size());
  for (const Column& column : columns()) {
    std::vector<Cell> cells;
    bool any = false;
    double best = nan_value;
    std::size_t numbers = 0;
    for (const Compared& run : runs) {
      Cell cell;
      cell.value = column.value(run.summary);
      cell.numeric = static_cast<bool>(column.format);
      if (cell.value.is_number()) {
        const double value = cell.value.get<double>();
        cell.shown = column.format(value);
        any = true;
        ++numbers;
        if (column.better != 0 && !(column.better * best >= column.better * value)) best = value;
      } else if (cell.value.is_string() && !cell.value.get_ref<const std::string&>().empty()) {
        cell.shown = cell.value.get<std::string>();
        if (std::string_view(column.key) == "weights_hash") cell.shown = cell.shown.substr(0, 8);
        any = true;
      } else {
        cell.shown = "-";
      }
      cells.push_back(std::move(cell));
    }
    if (!any) continue;
    bool all_equal = true;
    for (const Cell& cell : cells) all_equal = all_equal && cell.shown == cells.front().shown;
    const std::string_view key = column.key;
    if (all_equal && key == "status" && cells.front().shown == "finished") continue;
    if (all_equal && key == "workload" && runs.size() > 1) continue;
    for (Cell& cell : cells) {
      cell.best = numbers > 1 && !all_equal && column.better != 0 && cell.value.is_number() &&
                  cell.value.get<double>() == best;
    }
    table.titles.emplace_back(column.title);
    table.numeric.push_back(static_cast<bool>(column.format));
    for (std::size_t r = 0; r < runs.size(); ++r) table.rows[r].push_back(std::move(cells[r]));
  }
  return table;
}

}  // namespace

std::string comparison_report(std::span<const RunRecord> records, const std::string& title) {
  const std::vector<Compared> runs = read_runs(records);
  const Table table = compare(runs);
  const std::string heading = title.empty() ? "Comparison of runs" : title;
  std::string body = fmt::format("<h1>{}</h1>\n<p class=\"sub\">{} run{}</p>\n", escape(heading),
                                 runs.size(), runs.size() == 1 ? "" : "s");

  std::string html = "<div class=\"scroll\"><table><thead><tr><th>run</th>";
  for (std::size_t c = 0; c < table.titles.size(); ++c) {
    html += fmt::format("<th{}>{}</th>", table.numeric[c] ? " class=\"num\"" : "",
                        escape(table.titles[c]));
  }
  html += "</tr></thead><tbody>\n";
  for (std::size_t r = 0; r < runs.size(); ++r) {
    html += fmt::format("<tr><th scope=\"row\"><span class=\"key f{}\"></span>{}</th>", r % palette,
                        escape(runs[r].label));
    for (const Cell& cell : table.rows[r]) {
      const std::string classes =
          fmt::format("{}{}", cell.numeric ? "num" : "", cell.best ? " best" : "");
      html += fmt::format("<td{}>{}</td>", classes.empty() ? "" : " class=\"" + classes + "\"",
                          escape(cell.shown));
    }
    html += "</tr>\n";
  }
  html += "</tbody></table></div>\n";
  body += card("Final figures",
               "Times are medians of rank 0, without the first step; bytes are sums over ranks. "
               "The best of a column is bold.",
               html);

  // Beyond the palette's end colours come again, dashed.
  const auto stroke = [](std::size_t r) {
    return (r / palette) % 2 == 0 ? Stroke::plain : Stroke::dashed;
  };
  std::vector<Line> validation, training, accuracy;
  for (std::size_t r = 0; r < runs.size(); ++r) {
    const int color = static_cast<int>(r);
    validation.push_back(
        {runs[r].label, color, stroke(r), validation_series(runs[r].rows, "val_loss"), true});
    accuracy.push_back(
        {runs[r].label, color, stroke(r), validation_series(runs[r].rows, "val_accuracy"), true});
    add_train_loss(training, runs[r].rows, runs[r].label, color, false);
    training.back().stroke = stroke(r);
  }
  const auto any = [](const std::vector<Line>& lines) {
    return std::any_of(lines.begin(), lines.end(), [](const Line& l) { return !l.points.empty(); });
  };
  if (any(validation)) {
    body +=
        card("Validation loss", "On held-out data, at equal steps.",
             line_chart("Validation loss per step", validation, {false, true, format_number, 290}));
  }
  if (any(accuracy)) {
    body += card(
        "Validation accuracy", "On held-out data, at equal steps.",
        line_chart("Validation accuracy per step", accuracy, {false, false, format_number, 240}));
  }
  if (any(training)) {
    body += card("Training loss", "Smoothed where there are 60 steps or more.",
                 line_chart("Training loss per step", training, {false, true, format_number, 290}));
  }
  struct Cost {
    const char* title;
    const char* why;
    std::function<double(const json&)> get;
    std::string (*format)(double);
  };
  const std::array<Cost, 3> costs{{
      {"Optimizer per step", "Median milliseconds of step(), gradient not included.",
       [](const json& s) { return number(child(s, "optimizer_ms"), "total"); }, format_ms},
      {"Bytes per step", "Sent by all ranks together.",
       [](const json& s) { return number(s, "bytes_per_step"); }, format_bytes},
      {"Optimizer state per rank", "On the rank that holds most.", state_bytes, format_bytes},
  }};
  for (const Cost& cost : costs) {
    std::vector<HorizontalBar> bars;
    for (std::size_t r = 0; r < runs.size(); ++r) {
      const double value = cost.get(runs[r].summary);
      if (std::isfinite(value)) bars.push_back({runs[r].label, {{static_cast<int>(r), value, ""}}});
    }
    if (!bars.empty())
      body += card(cost.title, cost.why, bars_chart(cost.title, bars, cost.format));
  }
  return page(heading + " - Orthrus", body, /*wide=*/true);
}

std::string comparison_table(std::span<const RunRecord> records) {
  const std::vector<Compared> runs = read_runs(records);
  const Table table = compare(runs);
  std::vector<std::size_t> widths{3};
  for (const Compared& run : runs) widths[0] = std::max(widths[0], run.label.size());
  for (std::size_t c = 0; c < table.titles.size(); ++c) {
    std::size_t width = table.titles[c].size();
    for (const auto& row : table.rows) width = std::max(width, row[c].shown.size());
    widths.push_back(width);
  }
  std::string out = fmt::format("{:<{}}", "run", widths[0]);
  for (std::size_t c = 0; c < table.titles.size(); ++c) {
    out += table.numeric[c] ? fmt::format("  {:>{}}", table.titles[c], widths[c + 1])
                            : fmt::format("  {:<{}}", table.titles[c], widths[c + 1]);
  }
  const auto end_line = [&] {
    out.erase(out.find_last_not_of(' ') + 1);
    out += '\n';
  };
  end_line();
  for (std::size_t r = 0; r < runs.size(); ++r) {
    out += fmt::format("{:<{}}", runs[r].label, widths[0]);
    for (std::size_t c = 0; c < table.titles.size(); ++c) {
      const Cell& cell = table.rows[r][c];
      out += cell.numeric ? fmt::format("  {:>{}}", cell.shown, widths[c + 1])
                          : fmt::format("  {:<{}}", cell.shown, widths[c + 1]);
    }
    end_line();
  }
  return out;
}

std::string comparison_json(std::span<const RunRecord> records) {
  json document{{"schema", 1}, {"runs", json::array()}};
  for (const Compared& run : read_runs(records)) {
    json row{{"label", run.label}};
    for (const Column& column : columns()) {
      const json value = column.value(run.summary);
      row[column.key] =
          value.is_string() && value.get_ref<const std::string&>().empty() ? json(nullptr) : value;
    }
    document["runs"].push_back(std::move(row));
  }
  return document.dump(2, ' ', false, json::error_handler_t::replace);
}

}  // namespace orthrus::runtime
