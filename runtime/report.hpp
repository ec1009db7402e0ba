#pragma once
/// @file
/// report: what a run left behind, as one HTML file that opens anywhere (no network, no script),
/// and several runs side by side. Text in, text out: nothing here reads a file or knows a rank.
///
/// A run is its `summary.json` (one object) and its `metrics.jsonl` (one object per step). Both may
/// be incomplete: unknown keys are passed over, missing ones leave a part of the page out, and
/// lines that do not parse (the torn last line of a killed run) are skipped.

#include <cstdint>
#include <span>
#include <string>

namespace orthrus::runtime {

/// The page of one run. @param config_yaml  shown whole at the end; empty: left out.
[[nodiscard]] std::string run_report(const std::string& summary_json,
                                     const std::string& metrics_jsonl,
                                     const std::string& config_yaml = {});

/// A run among others.
struct RunRecord {
  std::string label;         ///< as it is called in the table; the directory's name
  std::string summary_json;  ///< empty: the run did not end; what the metrics say is shown
  std::string metrics_jsonl;
};

/// The page that lays runs side by side: a table of final figures, loss curves over each other.
[[nodiscard]] std::string comparison_report(std::span<const RunRecord> runs,
                                            const std::string& title = {});
/// The same table for a terminal, columns aligned.
[[nodiscard]] std::string comparison_table(std::span<const RunRecord> runs);
/// The same table as one JSON document: {"schema": 1, "runs": [{"label", "status", "loss", …}]}.
[[nodiscard]] std::string comparison_json(std::span<const RunRecord> runs);

/// What metrics alone say, as a JSON object with the keys of summary.json: last losses, medians of
/// times, bytes and messages per step. The median leaves out the first step when there are more
/// than two (it pays for page faults and for plans of libraries).
[[nodiscard]] std::string metrics_summary(const std::string& metrics_jsonl);

/// 1940000000 → "1.94 GB"; powers of ten.
[[nodiscard]] std::string format_bytes(double bytes);
/// 0.25 → "250 ms", 95 → "1 min 35 s" for seconds; "-" when not finite.
[[nodiscard]] std::string format_seconds(double seconds);

}  // namespace orthrus::runtime
