#include "runtime/cli/study_classes.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <utility>

#include "runtime/cli/study_verdicts.hpp"

namespace orthrus::cli {
namespace {

using nlohmann::ordered_json;
using runtime::report::Curve;
using runtime::report::Measured;
using runtime::report::Plot;
using runtime::report::Scale;
using runtime::report::Stroke;

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

double mean_of(const std::vector<double>& values) {
  double sum = 0;
  for (const double x : values) sum += x;
  return values.empty() ? nan_value : sum / static_cast<double>(values.size());
}

/// "class_3" and "decile_3": 3.
std::optional<std::pair<bool, int>> class_of(const std::string& name) {
  for (const bool decile : {false, true}) {
    const std::string prefix = decile ? "decile_" : "class_";
    if (name.starts_with(prefix) && name.size() > prefix.size() &&
        name.size() < prefix.size() + 6 &&
        name.find_first_not_of("0123456789", prefix.size()) == std::string::npos)
      return std::pair(decile, std::stoi(name.substr(prefix.size())));
  }
  return {};
}

/// What the runs of one cell have of one class.
struct Gathered {
  std::vector<double> times, losses, accuracies;
};

SeriesClasses gather(const StudyResults& study, const std::string& series, double batch,
                     const std::vector<const StudyTrial*>& trials) {
  SeriesClasses out;
  out.series = series;
  out.batch = batch;
  std::map<int, Gathered> classes;
  std::map<std::string, std::map<double, std::vector<double>>> along;  // key → examples → values
  std::vector<double> ratios;
  for (const StudyTrial* const trial : trials) {
    const auto times = trial->line.find("learning_time");
    if (times == trial->line.end() || !times->is_object()) continue;
    const std::vector<ordered_json> lines = study.metrics(*trial, "eval");
    if (lines.empty()) continue;
    ++out.runs;
    ratios.push_back(trial->number("learning_time_ratio"));
    for (const auto& [name, time] : times->items()) {
      const auto known = class_of(name);
      if (!known) continue;
      out.deciles = known->first;
      Gathered& of = classes[known->second];
      of.times.push_back(number_of(time));
      of.losses.push_back(number_at(lines.back(), name + "_loss"));
      of.accuracies.push_back(number_at(lines.back(), name + "_accuracy"));
      const std::string key = name + (out.deciles ? "_loss" : "_accuracy");
      for (const ordered_json& line : lines) {
        const double examples = number_at(line, "examples"), value = number_at(line, key);
        if (examples > 0 && std::isfinite(value)) along[key][examples].push_back(value);
      }
    }
  }
  out.ratio = mean_of(ratios);
  for (const auto& [number, of] : classes) {
    SeriesClasses::Class& one = out.classes.emplace_back();
    one.number = number;
    one.time = mean_of(of.times);
    one.loss = mean_of(of.losses);
    one.accuracy = mean_of(of.accuracies);
    const std::vector<double>& values = std::isnan(one.loss) ? of.accuracies : of.losses;
    one.lo = *std::min_element(values.begin(), values.end());
    one.hi = *std::max_element(values.begin(), values.end());
  }
  if (out.classes.empty()) return out;
  for (const int number : {out.classes.front().number, out.classes.back().number}) {
    SeriesClasses::Curve curve{number, {}};
    for (const auto& [examples, values] :
         along[fmt::format("{}_{}_{}", out.deciles ? "decile" : "class", number,
                           out.deciles ? "loss" : "accuracy")])
      curve.points.push_back({examples, mean_of(values)});
    out.curves.push_back(std::move(curve));
  }
  return out;
}

}  // namespace

double SeriesClasses::Class::value() const { return std::isnan(loss) ? accuracy : loss; }

std::vector<SeriesClasses> classes_of(const StudyResults& study,
                                      const std::vector<NoiseRun>& runs) {
  std::map<std::pair<std::string, double>, std::vector<const StudyTrial*>> cells;
  for (const NoiseRun& run : runs)
    cells[{run.series, run.trial->param("batch_size")}].push_back(run.trial);
  std::vector<SeriesClasses> out;
  for (const auto& [cell, trials] : cells) {
    SeriesClasses found = gather(study, cell.first, cell.second, trials);
    if (!found.classes.empty()) out.push_back(std::move(found));
  }
  return out;
}

StudyTable classes_table(const std::vector<SeriesClasses>& all) {
  StudyTable table{
      "classes",
      "Frequent and rare classes",
      "Learned: the step at which a class comes to half of its last accuracy, the mean "
      "over reporting seeds. Deciles of tokens make a tenth of the text each. Ratio: "
      "the slowest class over the fastest. Loss of tokens, accuracy of classes.",
      {"series", "batch", "of", "classes", "frequent learned", "rare learned", "ratio", "frequent",
       "rare", "runs"},
      {}};
  for (const SeriesClasses& of : all) {
    const SeriesClasses::Class &frequent = of.classes.front(), &rare = of.classes.back();
    table.rows.push_back({of.series, of.batch, of.deciles ? "tokens" : "classes", of.classes.size(),
                          or_null(frequent.time), or_null(rare.time), or_null(of.ratio),
                          or_null(frequent.value()), or_null(rare.value()), of.runs});
  }
  return table;
}

std::vector<StudyFigure> class_figures(const std::vector<SeriesClasses>& all,
                                       const std::vector<std::string>& series) {
  if (all.empty()) return {};
  // At one batch size: the one that most series have, of several the least.
  std::map<double, int> having;
  for (const SeriesClasses& one : all) ++having[one.batch];
  const double batch =
      std::max_element(having.begin(), having.end(), [](const auto& a, const auto& b) {
        return a.second < b.second;
      })->first;
  const bool deciles = all.front().deciles;
  const std::string value = deciles ? "loss" : "accuracy";
  const std::string what = deciles ? "decile of tokens" : "class";
  Plot ends{"classes",
            deciles ? "Loss by frequency of tokens" : "Accuracy of classes",
            fmt::format("At the end, batch {:g}, from the most frequent {} to the rarest; mean and "
                        "range over seeds.",
                        batch, what),
            what,
            value,
            Scale::linear,
            Scale::linear,
            {},
            {}};
  Plot along{"classes-over-examples",
             deciles ? "Frequent and rare tokens" : "Frequent and rare classes",
             fmt::format("Batch {:g}; the most frequent {} faint, the rarest plain.", batch, what),
             "examples",
             value,
             Scale::log10,
             Scale::linear,
             {},
             {}};
  for (const SeriesClasses& one : all) {
    if (one.batch != batch || one.deciles != deciles) continue;
    const auto color =
        static_cast<int>(std::find(series.begin(), series.end(), one.series) - series.begin());
    Curve curve{one.series, color, Stroke::plain, {}, true, true};
    for (const SeriesClasses::Class& of : one.classes)
      curve.points.push_back({static_cast<double>(of.number), of.value(), of.lo, of.hi});
    ends.curves.push_back(std::move(curve));
    for (std::size_t k = 0; k < one.curves.size(); ++k) {
      along.curves.push_back({fmt::format("{}, {}", one.series, k == 0 ? "frequent" : "rare"),
                              color, k == 0 ? Stroke::faint : Stroke::plain, one.curves[k].points});
    }
  }
  return {figure(ends), figure(along)};
}

}  // namespace orthrus::cli
