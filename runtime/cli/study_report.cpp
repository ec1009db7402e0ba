#include "runtime/cli/study_report.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <orthrus/error.hpp>
#include <string_view>
#include <system_error>
#include <thread>

#include "runtime/cli/child.hpp"
#include "runtime/cli/run_directory.hpp"
#include "runtime/cli/study_export.hpp"
#include "runtime/cli/study_page.hpp"
#include "runtime/runner/study_file.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::cli {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds patience{120};  // a browser's first start is slow

/// A program that turns one file into another; {in} and {out} stand for them.
struct Converter {
  const char* program;
  std::vector<std::string> arguments;
};
const std::vector<Converter>& of_pages() {
  static const std::vector<Converter> converters{
      {"weasyprint", {"{in}", "{out}"}},
      {"wkhtmltopdf", {"--quiet", "--enable-local-file-access", "{in}", "{out}"}},
      {"chromium",
       {"--headless", "--no-sandbox", "--disable-gpu", "--print-to-pdf={out}", "file://{in}"}}};
  return converters;
}
const std::vector<Converter>& of_figures() {
  static const std::vector<Converter> converters{
      {"rsvg-convert", {"--zoom=2", "--background-color=white", "-o", "{out}", "{in}"}},
      {"inkscape", {"--export-type=png", "--export-filename={out}", "{in}"}}};
  return converters;
}

bool is_in_path(const std::string& program) {
  const char* const path = std::getenv("PATH");
  std::string_view rest = path == nullptr ? "" : path;
  while (!rest.empty()) {
    const std::size_t colon = std::min(rest.find(':'), rest.size());
    const fs::path file = fs::path(rest.substr(0, colon)) / program;
    std::error_code error;
    if (fs::is_regular_file(file, error) && ::access(file.c_str(), X_OK) == 0) return true;
    rest.remove_prefix(std::min(colon + 1, rest.size()));
  }
  return false;
}

/// The first one that is installed; nothing where none is.
const Converter* found(const std::vector<Converter>& converters) {
  const auto at = std::find_if(converters.begin(), converters.end(),
                               [](const Converter& c) { return is_in_path(c.program); });
  return at == converters.end() ? nullptr : &*at;
}

std::string names_of(const std::vector<Converter>& converters) {
  std::vector<std::string_view> names;
  for (const Converter& c : converters) names.emplace_back(c.program);
  return fmt::format("{}", fmt::join(names, ", "));
}

std::string filled(std::string word, const std::string& name, const std::string& value) {
  if (const std::size_t at = word.find(name); at != std::string::npos)
    word.replace(at, name.size(), value);
  return word;
}

/// @return what went wrong; empty: `out` is there.
std::string convert(const Converter& converter, const fs::path& in, const fs::path& out) {
  std::vector<std::string> command{converter.program};
  for (const std::string& word : converter.arguments) {
    command.push_back(filled(filled(word, "{in}", fs::absolute(in).string()), "{out}",
                             fs::absolute(out).string()));
  }
  std::error_code error;
  fs::remove(out, error);
  const Clock::time_point start = Clock::now();
  Child child(command, "/dev/null", out.string(), "report");
  std::optional<Child::Ending> ending;
  while (!(ending = child.poll())) {
    if (Clock::now() - start > patience)
      return fmt::format("{} took more than {} s", converter.program, patience.count());
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  if (ending->code == 0 && ending->signal == 0 && fs::exists(out, error)) return "";
  return fmt::format("{} ended with {}", converter.program,
                     ending->signal != 0 ? 128 + ending->signal : ending->code);
}

/// A key of the study file's `report`, or its default.
std::string setting(const StudyResults& study, const char* key, const std::string& otherwise) {
  const ordered_json& value = study.setting(std::string("report.") + key);
  return value.is_string() ? value.get<std::string>() : otherwise;
}

std::vector<std::string> formats_of(const StudyResults& study) {
  const ordered_json& list = study.setting("report.formats");
  if (!list.is_array()) return runner::Study().report_formats;
  std::vector<std::string> formats;
  for (const ordered_json& word : list) {
    if (word.is_string()) formats.push_back(word.get<std::string>());
  }
  return formats;
}

std::string print(const fs::path& page) {
  const fs::path out = page.parent_path() / "report.pdf";
  const Converter* const converter = found(of_pages());
  if (converter == nullptr) {
    return fmt::format("not written: {}: none of {} is installed; the page prints as it is",
                       out.string(), names_of(of_pages()));
  }
  const std::string problem = convert(*converter, page, out);
  return problem.empty() ? "written: " + out.string()
                         : fmt::format("not written: {}: {}", out.string(), problem);
}

std::string rasterize(const fs::path& figures) {
  const Converter* const converter = found(of_figures());
  if (converter == nullptr) {
    return fmt::format("not written: {}: none of {} is installed", (figures / "*.png").string(),
                       names_of(of_figures()));
  }
  std::vector<fs::path> drawn;
  for (const fs::directory_entry& entry : fs::directory_iterator(figures)) {
    if (entry.path().extension() == ".svg") drawn.push_back(entry.path());
  }
  for (const fs::path& svg : drawn) {
    const fs::path png = fs::path(svg).replace_extension(".png");
    const std::string problem = convert(*converter, svg, png);
    if (!problem.empty()) return fmt::format("not written: {}: {}", png.string(), problem);
  }
  return "written: " + (figures / "*.png").string();
}

}  // namespace

std::vector<std::string> report_formats() { return {"html", "json", "csv", "mllog", "png"}; }

std::vector<std::string> write_study_report(const StudyResults& study,
                                            const StudyAnalysis& analysis,
                                            const std::vector<std::string>& given) {
  const std::vector<std::string> formats = given.empty() ? formats_of(study) : given;
  const auto asks = [&](std::string_view format) {
    return std::find(formats.begin(), formats.end(), format) != formats.end();
  };
  const runner::Study defaults;
  const bool plots = setting(study, "plots", defaults.report_plots) != "none";
  const bool pdf = setting(study, "pdf", defaults.report_pdf) != "never";

  std::vector<std::string> said;
  if (asks("json")) {
    write_analysis(study, analysis);
    said.push_back("written: " + (study.directory / "analysis" / "*.json").string());
  }
  const fs::path page = write_report(study, analysis, {asks("html"), asks("csv"), plots});
  const fs::path directory = page.parent_path();
  if (asks("csv")) said.push_back("written: " + (directory / "tables" / "*.csv").string());
  if (asks("mllog")) {
    const auto known = export_formats();
    const ExportFormat& log = *std::find_if(known.begin(), known.end(), [](const ExportFormat& f) {
      return std::string_view(f.name) == "mllog";
    });
    runtime::write_file_atomically(directory / "mllog.txt", log.text(study));
    said.push_back("written: " + (directory / "mllog.txt").string());
  }
  if (plots && asks("png")) said.push_back(rasterize(directory / "figures"));
  if (asks("html") && pdf) said.push_back(print(page));
  if (asks("html")) said.push_back("written: " + page.string());
  return said;
}

}  // namespace orthrus::cli
