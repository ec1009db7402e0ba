#pragma once
/// @file
/// The report of a study: verdict, warnings, figures and tables as one HTML file, and the files
/// behind it.

#include <filesystem>
#include <string>
#include <vector>

#include "runtime/cli/study_analysis.hpp"
#include "runtime/cli/study_figure.hpp"

namespace orthrus::cli {

/// Those that the study has data for, in the order of the page.
[[nodiscard]] std::vector<StudyFigure> study_figures(const StudyAnalysis& analysis);

/// The page: no script, no network; every figure carries its CSV as a link.
[[nodiscard]] std::string study_page(const StudyResults& study, const StudyAnalysis& analysis,
                                     const std::vector<StudyFigure>& figures);

/// Writes analysis/{fits,cells,warnings}.json. @throws IoError
void write_analysis(const StudyResults& study, const StudyAnalysis& analysis);
/// Which files a report has.
struct ReportParts {
  bool page = true, tables = true, figures = true;
};
/// Writes report/index.html, report/figures/*.svg, report/tables/*.csv. @return the page's path.
std::filesystem::path write_report(const StudyResults& study, const StudyAnalysis& analysis,
                                   const ReportParts& parts = {});

}  // namespace orthrus::cli
