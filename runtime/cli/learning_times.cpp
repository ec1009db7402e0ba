#include "runtime/cli/learning_times.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

namespace orthrus::cli {
namespace {

/// NaN: its last accuracy is 0, or none.
double half_time(const std::vector<std::pair<double, double>>& seen) {
  const double half = seen.back().second / 2;
  if (!(half > 0)) return std::numeric_limits<double>::quiet_NaN();
  for (std::size_t i = 0; i < seen.size(); ++i) {
    const auto [step, accuracy] = seen[i];
    if (accuracy < half) continue;
    if (i == 0) return step;
    const auto [step0, before] = seen[i - 1];
    return step0 + (step - step0) * (half - before) / (accuracy - before);
  }
  return std::numeric_limits<double>::quiet_NaN();
}

}  // namespace

bool is_of_class(std::string_view key) {
  return key.starts_with("class_") || key.starts_with("decile_");
}

void LearningTimes::add(double step, const std::map<std::string, double>& metrics) {
  constexpr std::string_view suffix = "_accuracy";
  for (const auto& [key, value] : metrics) {
    if (is_of_class(key) && key.ends_with(suffix))
      classes_[key.substr(0, key.size() - suffix.size())].emplace_back(step, value);
  }
}

void LearningTimes::write_to(nlohmann::ordered_json& record) const {
  if (classes_.empty()) return;
  record["learning_time"] = times();
  record["learning_time_ratio"] = ratio();
}

nlohmann::ordered_json LearningTimes::times() const {
  nlohmann::ordered_json out = nlohmann::ordered_json::object();
  for (const auto& [name, seen] : classes_) {
    const double time = half_time(seen);
    out[name] = std::isnan(time) ? nlohmann::ordered_json(nullptr) : nlohmann::ordered_json(time);
  }
  return out;
}

nlohmann::ordered_json LearningTimes::ratio() const {
  double slowest = 0, fastest = std::numeric_limits<double>::infinity();
  for (const auto& [name, seen] : classes_) {
    const double time = half_time(seen);
    if (std::isnan(time)) return nullptr;
    slowest = std::max(slowest, time);
    fastest = std::min(fastest, time);
  }
  if (classes_.empty() || !(fastest > 0)) return nullptr;
  return slowest / fastest;
}

}  // namespace orthrus::cli
