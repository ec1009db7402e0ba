#pragma once
/// @file
/// `study report`: the files that the study's `report` block asks for.

#include <string>
#include <vector>

#include "runtime/cli/study_analysis.hpp"

namespace orthrus::cli {

/// What `report.formats` may name: html, json, csv, mllog, png.
[[nodiscard]] std::vector<std::string> report_formats();

/// Writes what `report: {formats, plots, pdf}` says: html: report/index.html; json:
/// analysis/*.json; csv: report/tables/*.csv; mllog: report/mllog.txt; png: report/figures/*.png.
/// Figures (SVG) wherever plots are asked for; report/report.pdf of the page, where a converter is
/// found.
/// @param formats  instead of the study's; empty: the study's
/// @return what was written, and what could not be and why, for people
std::vector<std::string> write_study_report(const StudyResults& study,
                                            const StudyAnalysis& analysis,
                                            const std::vector<std::string>& formats);

}  // namespace orthrus::cli
