#include "runtime/cli/study_coordinates.hpp"

#include <fmt/format.h>

#include <cmath>
#include <map>
#include <tuple>
#include <utility>

#include "runtime/runner/journal.hpp"

namespace orthrus::cli {

using runner::Json;

std::vector<CoordinateSlope> coordinate_slopes(const StudyRecord& study,
                                               const std::filesystem::path& directory) {
  const Json over = study.resolved.value(Json::json_pointer("/probes/coordinates/over"), Json(""));
  if (over == "") return {};
  // Of each rate, layer and step: by size, the sum of ln rms over seeds, and their number.
  using Sums = std::map<double, std::pair<double, int>>;
  std::map<std::tuple<double, std::string, std::int64_t>, Sums> found;
  for (const auto& [index, trial] : study.trials) {
    if (!trial.finished() || !trial.record["params"].contains(over)) continue;
    const Json& params = trial.record["params"];
    const double size = params[over.get<std::string>()];
    const double lr = params.value("lr", 0.0);
    const auto file =
        directory / "trials" / fmt::format("{:04}-{}", index, trial.id) / "metrics.jsonl";
    for (const Json& line : runner::read_lines(file)) {
      if (!line.contains("preactivation_rms") || !line["preactivation_rms"].is_number()) continue;
      auto& [sum, count] = found[{lr, line["parameter"], line["step"]}][size];
      sum += std::log(line["preactivation_rms"].get<double>());
      ++count;
    }
  }
  std::vector<CoordinateSlope> out;
  for (const auto& [key, sums] : found) {
    if (sums.size() < 2) continue;
    double x = 0, y = 0, xx = 0, xy = 0;
    const auto n = static_cast<double>(sums.size());
    for (const auto& [size, sum] : sums) {
      const double u = std::log(size), v = sum.first / sum.second;
      x += u / n;
      y += v / n;
      xx += u * u / n;
      xy += u * v / n;
    }
    out.push_back({std::get<0>(key), std::get<1>(key), std::get<2>(key),
                   (xy - x * y) / (xx - x * x), static_cast<int>(sums.size())});
  }
  return out;
}

}  // namespace orthrus::cli
