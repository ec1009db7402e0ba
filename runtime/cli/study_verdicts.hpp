#pragma once
/// @file
/// The tables of a study's analysis.

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/cli/json_number.hpp"
#include "runtime/cli/study_analysis.hpp"
#include "runtime/cli/study_results.hpp"

namespace orthrus::cli {

/// Critical batch sizes, learning rates, token ratios, …: those that have rows.
[[nodiscard]] std::vector<StudyTable> verdict_tables(const StudyAnalysis& analysis);
[[nodiscard]] StudyTable cells_table(const StudyAnalysis& analysis);
[[nodiscard]] StudyTable trials_table(const StudyResults& study);

/// As the study file has it: "overhead20".
[[nodiscard]] std::string definition_name(const studies::CbsEstimate& cbs, double overhead);
[[nodiscard]] std::string_view edge_name(studies::GridEdge edge);
/// NaN as null.
[[nodiscard]] nlohmann::ordered_json or_null(double value);
/// Null where it is not known.
[[nodiscard]] inline nlohmann::ordered_json end_of(double value, bool known) {
  return known ? json_number(value) : nullptr;
}

}  // namespace orthrus::cli
