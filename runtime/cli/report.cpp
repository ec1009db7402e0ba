// orthrus report: one run's page again, or several runs side by side.
#include "runtime/report.hpp"

#include <fmt/format.h>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <orthrus/error.hpp>
#include <string>
#include <system_error>
#include <vector>

#include "runtime/cli/command.hpp"
#include "runtime/cli/run_directory.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::cli {
namespace {

struct Options {
  std::vector<std::string> runs;
  std::string out;
  std::string title;
};

int report(const Options& options, Context& context) {
  if (context.rank() != 0) return 0;
  std::vector<runtime::RunRecord> runs;
  for (const std::string& directory : options.runs) runs.push_back(read_run(directory));
  // Two runs of one name in two places need the whole path to be told apart.
  for (std::size_t i = 0; i < runs.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (runs[i].label != runs[j].label) continue;
      for (std::size_t k = 0; k < runs.size(); ++k) runs[k].label = options.runs[k];
    }
  }
  if (!options.out.empty()) {
    std::string html;
    if (runs.size() == 1) {
      const std::filesystem::path yaml =
          std::filesystem::path(options.runs.front()) / "config.resolved.yaml";
      std::error_code error;
      html =
          runtime::run_report(runs[0].summary_json, runs[0].metrics_jsonl,
                              std::filesystem::exists(yaml, error) ? runtime::read_file(yaml) : "");
    } else {
      html = runtime::comparison_report(runs, options.title);
    }
    const std::filesystem::path out = options.out;
    make_directories(out.parent_path());
    runtime::write_file_atomically(out, html);
  }
  if (context.json) {
    std::puts(runtime::comparison_json(runs).c_str());
  } else {
    std::fputs(runtime::comparison_table(runs).c_str(), stdout);
    if (!options.out.empty()) std::printf("written: %s\n", options.out.c_str());
  }
  return 0;
}

}  // namespace

Run add_report(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_option("RUN", options->runs, "Run directories")->required();
  app.add_option("--out", options->out,
                 "Write an HTML page here: of the run, or of all runs side by side");
  app.add_option("--title", options->title, "Title of the comparison");
  return [options](Context& context) { return report(*options, context); };
}

}  // namespace orthrus::cli
