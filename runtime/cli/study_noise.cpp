#include "runtime/cli/study_noise.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>
#include <tuple>
#include <utility>

namespace orthrus::cli {
namespace {

using nlohmann::ordered_json;
using studies::NoiseProbe;

constexpr std::array geometries{"l2", "l1", "nuc"};

struct Placed {
  double examples = 0, batch = 0;
  std::size_t run = 0;
  double splits = 0;
  bool near = false;
  NoiseProbe probe;
};
double at(const ordered_json& line, const char* key) {
  const auto found = line.find(key);
  return found == line.end() ? std::nan("") : number_of(*found);
}

/// Of the whole model: lines of groups and matrices are parts of it.
bool is_whole(const ordered_json& line) {
  return line.value("group", "") == "all" || line.value("matrix", "") == "all";
}

NoiseProbe probe_of(const ordered_json& line, const std::string& geometry) {
  if (geometry == "l2") return {at(line, "trS"), at(line, "g2")};
  return {at(line, ("gns_" + geometry).c_str()), 1};
}

SeriesNoise::Bin bin_of(const std::vector<const Placed*>& probes, bool dual) {
  SeriesNoise::Bin bin;
  studies::NoiseScale scale;
  for (const Placed* placed : probes) {
    bin.examples += std::log(placed->examples);
    scale.add(placed->probe);
  }
  bin.probes = probes.size();
  bin.examples = std::exp(bin.examples / static_cast<double>(std::max<std::size_t>(1, bin.probes)));
  bin.value = scale.value();
  if (dual) bin.value.unresolved = probes.empty();
  return bin;
}

}  // namespace

std::vector<SeriesNoise> noise_of_runs(const StudyResults& study,
                                       const std::vector<NoiseRun>& runs) {
  std::vector<std::pair<std::string, std::map<std::string, std::vector<Placed>>>>
      all;  // series, geometry
  for (std::size_t r = 0; r < runs.size(); ++r) {
    const StudyTrial& trial = *runs[r].trial;
    const std::vector<ordered_json> lines = study.metrics(trial, "probe");
    if (lines.empty()) continue;
    auto series = std::find_if(all.begin(), all.end(),
                               [&](const auto& s) { return s.first == runs[r].series; });
    if (series == all.end()) series = all.insert(all.end(), {runs[r].series, {}});
    // Branches count from the fork.
    const double before = trial.number("fork_steps") * trial.number("fork_batch");
    const double base = std::isfinite(before) ? before : 0;
    const double reached = base + trial.number("steps_to_target") * trial.param("batch_size");
    const double end = base + at(lines.back(), "examples");
    double splits = 0;
    for (const ordered_json& line : lines) {
      const double examples = base + at(line, "examples");
      if (!is_whole(line) || !(examples > 0)) continue;
      if (line.contains("n_splits")) splits = at(line, "n_splits");
      for (const std::string geometry : geometries) {
        const NoiseProbe probe = probe_of(line, geometry);
        if (!std::isfinite(probe.trace) || !std::isfinite(probe.signal)) continue;
        const bool near = reached > 0 ? examples >= reached / 2 && examples <= 2 * reached
                                      : examples >= base + (end - base) / 2;
        series->second[geometry].push_back(
            {examples, trial.param("batch_size"), r, splits, near, probe});
      }
    }
  }
  std::vector<SeriesNoise> out;
  for (const auto& [series, by_geometry] : all) {
    for (const char* geometry : geometries) {
      const auto found = by_geometry.find(geometry);
      if (found == by_geometry.end()) continue;
      const bool dual = geometry != std::string("l2");
      const double largest =
          std::max_element(found->second.begin(), found->second.end(),
                           [](const Placed& a, const Placed& b) { return a.batch < b.batch; })
              ->batch;
      std::map<double, std::vector<const Placed*>> bins;
      std::vector<const Placed*> near;
      std::set<std::size_t> trials;
      std::set<double> splits;
      for (const Placed& placed : found->second) {
        if (dual && placed.batch < largest) continue;
        trials.insert(placed.run);
        splits.insert(placed.splits);
        bins[std::floor(2 * std::log2(placed.examples))].push_back(&placed);
        if (placed.near) near.push_back(&placed);
      }
      SeriesNoise noise{series, geometry, trials.size(), {}, bin_of(near, dual), splits.size() < 2};
      for (const auto& [place, probes] : bins) noise.bins.push_back(bin_of(probes, dual));
      out.push_back(std::move(noise));
    }
  }
  return out;
}

}  // namespace orthrus::cli
