#include "runtime/cli/study_reproduce.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <orthrus/error.hpp>

#include "runtime/cli/json_number.hpp"
#include "runtime/cli/run_directory.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::cli {
namespace {

using nlohmann::ordered_json;
using studies::Experiment;
using studies::Relation;
using studies::Row;

const char* name_of(Relation relation) {
  return relation == Relation::at_most    ? "at_most"
         : relation == Relation::at_least ? "at_least"
                                          : "about";
}

ordered_json to_json(const Row& row) {
  return {{"quantity", row.quantity},
          {"value", json_number(row.value)},
          {"expected", json_number(row.expected)},
          {"tolerance", json_number(row.tolerance)},
          {"relation", name_of(row.relation)},
          {"pass", row.holds()}};
}

std::string to_text(const Row& row) {
  const char* const relation = row.relation == Relation::at_most    ? "<="
                               : row.relation == Relation::at_least ? ">="
                                                                    : "";
  return fmt::format("  {:<68} {:>13.7g}  {:>2} {:>13.7g} +- {:<8.2g} {}\n", row.quantity,
                     row.value, relation, row.expected, row.tolerance,
                     row.holds() ? "met" : "NOT MET");
}

ordered_json head(const Experiment& e) {
  return {{"test", e.name}, {"title", e.title}, {"source", e.source}, {"slow", e.slow}};
}

void print(const std::string& text) {
  std::fputs(text.c_str(), stdout);
  std::fflush(stdout);  // seconds pass until the next experiment is done
}

}  // namespace

int reproduce(std::span<const Experiment> experiments, const ReproduceOptions& options) {
  ordered_json tests = ordered_json::array();
  std::string lines;
  int met = 0, not_met = 0;
  for (const Experiment& e : experiments) {
    const std::vector<std::string>& names = options.names;
    const bool named = std::find(names.begin(), names.end(), e.name) != names.end();
    if (!named && !(names.empty() && (options.slow || options.list || !e.slow))) continue;
    ordered_json test = head(e);
    if (options.list) {
      if (!options.json) {
        print(fmt::format("{:<28} {}{}\n", e.name, e.title, e.slow ? " (minutes)" : ""));
      }
      tests.push_back(std::move(test));
      continue;
    }
    if (!options.json) print(fmt::format("{}: {}\n  ({})\n", e.name, e.title, e.source));
    bool pass = true;
    test["pass"] = true;
    for (const Row& row : e.run()) {
      ordered_json line{{"test", e.name}};
      line.update(to_json(row));
      lines += line.dump() + "\n";
      test["rows"].push_back(to_json(row));
      if (!options.json) print(to_text(row));
      pass = pass && row.holds();
      ++(row.holds() ? met : not_met);
    }
    test["pass"] = pass;
    tests.push_back(std::move(test));
    if (!options.json) print("\n");
  }
  if (!options.out.empty()) {
    make_directories(std::filesystem::path(options.out).parent_path());
    runtime::write_file_atomically(options.out, lines);
  }
  if (options.json) {
    ordered_json document{{"tests", std::move(tests)}};
    if (!options.list) {
      document["met"] = met;
      document["not_met"] = not_met;
    }
    print(document.dump(2) + "\n");
  } else if (!options.list) {
    print(fmt::format("{} met, {} not met\n", met, not_met));
  }
  // What is known to come out and does not is a defect, of this build or of its machine.
  return not_met == 0 ? 0 : static_cast<int>(ExitCode::internal);
}

}  // namespace orthrus::cli
