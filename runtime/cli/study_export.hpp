#pragma once
/// @file
/// A study for other trackers: one flat table, W&B's config/summary/history, or MLPerf's event log.

#include <span>
#include <string>
#include <string_view>

#include "runtime/cli/study_results.hpp"

namespace orthrus::cli {

struct ExportFormat {
  const char* name;
  const char* what;
  std::string (*text)(const StudyResults& study);
};
/// csv: a row per trial. wandb: one JSON array, a run {id, name, group, state, config, summary,
/// history} per trial. mllog: lines `:::MLLOG {json}`, trial after trial.
[[nodiscard]] std::span<const ExportFormat> export_formats();

}  // namespace orthrus::cli
