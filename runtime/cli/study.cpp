// orthrus study: trials of a study, known results beside what comes out here, laws through
// measurements.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <orthrus/error.hpp>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "runtime/cli/command.hpp"
#include "runtime/cli/run_directory.hpp"
#include "runtime/cli/runner_experiments.hpp"
#include "runtime/cli/study_analysis.hpp"
#include "runtime/cli/study_export.hpp"
#include "runtime/cli/study_fit.hpp"
#include "runtime/cli/study_page.hpp"
#include "runtime/cli/study_report.hpp"
#include "runtime/cli/study_reproduce.hpp"
#include "runtime/cli/study_runner.hpp"
#include "runtime/safetensors.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::cli {
namespace {

/// A check of CLI11: nothing, or what is wrong. Its errors are of usage.
template <class List>
auto known_in(const List& list, const char* what) {
  return [&list, what](const std::string& word) -> std::string {
    std::vector<std::string_view> known;
    for (const auto& entry : list) known.emplace_back(entry.name);
    if (std::find(known.begin(), known.end(), word) != known.end()) return "";
    return fmt::format("{} is not {}{}; known: {}", runtime::quoted_for_message(word), what,
                       runtime::nearest_hint(word, known), fmt::join(known, ", "));
  };
}

struct Given {
  ReproduceOptions reproduce;
  FitOptions fit;
  std::string study, format;
  std::vector<std::string> formats;
  std::string law, x, collective, out;
  int ranks = 0;
};

std::vector<std::string> keys_of(const std::string& text) {
  std::vector<std::string> keys{""};
  for (const char c : text) {
    if (c == ',') {
      keys.emplace_back();
    } else {
      keys.back() += c;
    }
  }
  return keys;
}

void complete(Given& given, const CLI::App& app) {
  FitOptions& o = given.fit;
  const auto laws = fit_laws();
  o.law = &*std::find_if(laws.begin(), laws.end(),
                         [&](const FitLaw& law) { return law.name == given.law; });
  const std::string_view law = o.law->name;
  if (given.x.empty()) given.x = o.law->x;
  if (o.y.empty()) o.y = o.law->y;
  if (given.x.empty() || o.y.empty()) {
    throw CLI::ValidationError(fmt::format("--law {}: name the keys by --x and --y", law));
  }
  o.x = keys_of(given.x);
  const bool losses = law == "three_term";
  if (std::find(o.x.begin(), o.x.end(), "") != o.x.end() ||
      (losses ? o.x.size() != 2 && o.x.size() != 3 : o.x.size() != 1)) {
    throw CLI::ValidationError(
        fmt::format("--x {}: the law {} takes {}", given.x, law,
                    losses ? "BATCH,STEPS or BATCH,STEPS,PARAMETERS" : "one key"));
  }
  for (const char* const option : {"--bootstrap", "--seed", "--b-ref"}) {
    if (app.count(option) > 0 && !o.law->resampled) {
      throw CLI::ValidationError(fmt::format("{}: not for the law {}", option, law));
    }
  }
  if (!given.collective.empty()) {
    if (law != "alpha_beta") {
      throw CLI::ValidationError(fmt::format("--collective: not for the law {}", law));
    }
    o.collective = ring_shape(given.collective, given.ranks);
  }
}

void print_analysis(const StudyResults& study, const StudyAnalysis& analysis, bool json) {
  const std::string text =
      json ? analysis_json(study, analysis)
                     .dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) +
                 "\n"
           : verdict_text(study, analysis);
  std::fputs(text.c_str(), stdout);
}

/// A study that its tables can say something of.
StudyResults read_analysed(const std::string& directory) {
  StudyResults study = read_study(directory);
  if (study.setting("search.metric.goal") == "maximize" &&
      !study.setting("search.metric.target").is_number()) {
    throw ConfigError(directory +
                      ": search.metric.goal: maximize without a target: tables compare losses, or "
                      "steps to search.metric.target; results.jsonl has best_val");
  }
  return study;
}

int report_study(const Given& given, Context& context) {
  if (context.rank() != 0) return 0;
  const StudyResults study = read_analysed(given.study);
  const StudyAnalysis analysis = analyse(study);
  const std::vector<std::string> said = write_study_report(study, analysis, given.formats);
  print_analysis(study, analysis, context.json);
  if (!context.json) std::printf("\n%s\n", fmt::format("{}", fmt::join(said, "\n")).c_str());
  return 0;
}

int export_study(const Given& given, Context& context) {
  if (context.rank() != 0) return 0;
  const auto formats = export_formats();
  const ExportFormat& format =
      *std::find_if(formats.begin(), formats.end(),
                    [&](const ExportFormat& f) { return f.name == given.format; });
  const std::string text = format.text(read_study(given.study));
  if (given.out.empty()) {
    std::fputs(text.c_str(), stdout);
  } else {
    make_directories(std::filesystem::path(given.out).parent_path());
    runtime::write_file_atomically(given.out, text);
  }
  return 0;
}

/// `study fit DIRECTORY`: the analysis of a study again, without its page.
int fit_study(const Given& given, Context& context) {
  if (context.rank() != 0) return 0;
  const StudyResults study = read_analysed(given.fit.file);
  const StudyAnalysis analysis = analyse(study);
  write_analysis(study, analysis);
  print_analysis(study, analysis, context.json);
  return 0;
}

int fit(Given& given, const CLI::App& app, Context& context) {
  std::error_code error;
  if (given.law.empty() && std::filesystem::is_directory(given.fit.file, error)) {
    return fit_study(given, context);
  }
  if (given.law.empty()) throw CLI::RequiredError("--law");
  complete(given, app);
  if (context.rank() != 0) return 0;
  const FitReport report = fit_file(given.fit);
  const std::string line =
      report.document.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  if (!given.out.empty()) {
    make_directories(std::filesystem::path(given.out).parent_path());
    runtime::write_file_atomically(given.out, line);
  }
  std::fputs(context.json ? line.c_str() : report.text.c_str(), stdout);
  return 0;
}

std::string laws_text() {
  std::string out = "Laws, with their keys x and y:\n";
  for (const FitLaw& law : fit_laws()) {
    const std::string keys = *law.x == '\0' ? "--x, --y" : fmt::format("{}: {}", law.x, law.y);
    out += fmt::format("  {:<15} {:<28} {}\n", law.name, keys, law.formula);
  }
  return out;
}

}  // namespace

Run add_study(CLI::App& app) {
  app.require_subcommand(1);
  const auto given = std::make_shared<Given>();
  CLI::App* known = app.add_subcommand(
      "reproduce", "Known results beside what comes out here (exit 70 when one is not met)");
  static const std::vector<studies::Experiment> experiments = [] {
    std::vector<studies::Experiment> all;
    for (const auto& some : {studies::experiments(), runner_experiments()})
      all.insert(all.end(), some.begin(), some.end());
    return all;
  }();
  known->add_option("NAME", given->reproduce.names, "Experiments; all quick ones unless named")
      ->check(known_in(experiments, "an experiment"));
  known->add_flag("--slow", given->reproduce.slow, "All: those of minutes, too");
  known->add_flag("--list", given->reproduce.list, "Names, and what each shows");
  known->add_option("--out", given->reproduce.out, "Write a JSON line per row to this file");

  CLI::App* laws = app.add_subcommand("fit", "A law through the records of a file, with intervals");
  FitOptions& o = given->fit;
  static const std::span<const FitLaw> all_laws = fit_laws();
  laws->add_option("FILE", o.file,
                   "JSON lines, one record per line; or a study's directory: its analysis again")
      ->required();
  laws->add_option("--law", given->law, "See below")->check(known_in(all_laws, "a law"));
  laws->add_option("--x", given->x,
                   "Key of the abscissa (three_term: BATCH,STEPS[,PARAMETERS]); a.b reaches into "
                   "nested objects");
  laws->add_option("--y", o.y, "Key of the ordinate; times of keys in _ms and _us become seconds");
  laws->add_option("--bootstrap", o.bootstrap.resamples,
                   "Resamples behind an interval (2000); 0: no intervals")
      ->check(CLI::Range(0, 1000000));
  laws->add_option("--seed", o.bootstrap.seed, "Of the resamples (0)");
  laws->add_option("--b-ref", o.b_ref, "Reference batch of overhead20 (256)")
      ->check(CLI::PositiveNumber);
  CLI::Option* const collective =
      laws->add_option("--collective", given->collective,
                       "alpha_beta: the times are of a ring, x its whole buffer: all_gather, "
                       "reduce_scatter or all_reduce")
          ->check(CLI::IsMember({"all_gather", "reduce_scatter", "all_reduce"}));
  CLI::Option* const ranks =
      laws->add_option("--ranks", given->ranks, "Ranks of the ring")->check(CLI::Range(2, 1 << 20));
  collective->needs(ranks);
  ranks->needs(collective);
  laws->add_option("--out", given->out, "Write the JSON line of the fit to this file");
  laws->footer(laws_text());

  CLI::App* page = app.add_subcommand("report", "What a study came to: verdict, page, tables");
  page->add_option("DIR", given->study, "The study's directory")->required();
  page->add_option("--formats", given->formats,
                   "Instead of the study's report.formats: html, json, csv, mllog, png")
      ->delimiter(',')
      ->check(CLI::IsMember(report_formats()));
  CLI::App* other = app.add_subcommand("export", "A study for other trackers");
  other->add_option("DIR", given->study, "The study's directory")->required();
  static const std::span<const ExportFormat> formats = export_formats();
  other->add_option("--format", given->format, "csv, wandb or mllog")
      ->required()
      ->check(known_in(formats, "a format"));
  other->add_option("--out", given->out, "Write to this file instead of stdout");

  return [given, laws, page, other, runner = add_study_runner(app)](Context& context) {
    if (const std::optional<int> code = runner(context)) return *code;
    if (page->parsed()) return report_study(*given, context);
    if (other->parsed()) return export_study(*given, context);
    if (laws->parsed()) return fit(*given, *laws, context);
    if (context.rank() != 0) return 0;
    given->reproduce.json = context.json;
    return reproduce(experiments, given->reproduce);
  };
}

}  // namespace orthrus::cli
