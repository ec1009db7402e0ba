#pragma once
/// @file
/// When a run learns which class: of classes of images or of a mixture, or of deciles of tokens by
/// their frequency (B. Vasudeva et al., arXiv 2510.22980; F. Kunstner et al., arXiv 2402.19449).

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace orthrus::cli {

/// Is it a metric of one class or one decile? There are tens: files have them, terminals do not.
[[nodiscard]] bool is_of_class(std::string_view key);

class LearningTimes {
 public:
  /// An evaluation; keys `class_C_accuracy`, `decile_K_accuracy` are taken.
  void add(double step, const std::map<std::string, double>& metrics);
  /// `learning_time` and `learning_time_ratio` into a trial's record; nothing without classes.
  void write_to(nlohmann::ordered_json& record) const;
  /// {"class_0": step, …}: where a class comes to half of its last accuracy, linear between
  /// evaluations; null where that is 0. Empty without such keys.
  [[nodiscard]] nlohmann::ordered_json times() const;
  /// The slowest over the fastest; null where a class has no time, or the fastest takes none.
  [[nodiscard]] nlohmann::ordered_json ratio() const;

 private:
  std::map<std::string, std::vector<std::pair<double, double>>> classes_;  // step, accuracy
};

}  // namespace orthrus::cli
