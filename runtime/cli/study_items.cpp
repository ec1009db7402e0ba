#include "runtime/cli/study_items.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <orthrus/error.hpp>
#include <set>
#include <string_view>

#include "runtime/yaml_tree.hpp"

namespace orthrus::cli {

using nlohmann::ordered_json;
using studies::CbsDefinition;

namespace {

[[noreturn]] void refuse(const StudyResults& study, const std::string& what) {
  throw DataError((study.directory / "study.resolved.json").string() + ": " + what);
}

std::string text_of(const ordered_json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

std::vector<std::string> texts_of(const ordered_json& object, const char* key) {
  std::vector<std::string> texts;
  const auto found = object.find(key);
  if (found == object.end() || !found->is_array()) return texts;
  for (const ordered_json& value : *found) {
    if (value.is_string()) texts.push_back(value.get<std::string>());
  }
  return texts;
}

/// Reads "overhead20" as an overhead of 20 %.
void add_definition(AnalysisItem& item, const std::string& name,
                    std::vector<StudyWarning>& warnings) {
  if (name == "mccandlish") {
    item.definitions.push_back(CbsDefinition::mccandlish);
  } else if (name == "token_optimal") {
    item.definitions.push_back(CbsDefinition::token_optimal);
  } else if (name == "noise_scale") {
    item.noise_scale = true;  // of probes: it has a row wherever there are any
  } else if (name.starts_with("overhead") && name.size() > 8 &&
             name.find_first_not_of("0123456789", 8) == std::string::npos && name.size() < 12) {
    item.definitions.push_back(CbsDefinition::overhead);
    item.overhead = std::stod(name.substr(8)) / 100;
  } else {
    warnings.push_back(
        {"not_measured", fmt::format("definition {}: not one that a curve of steps "
                                     "against batch gives; known: mccandlish, "
                                     "overhead20, token_optimal; of probes noise_scale",
                                     runtime::quoted_for_message(name))});
  }
}

}  // namespace

bool is_branched(const StudyResults& study) { return number_of(study.setting("branch.steps")) > 0; }

std::vector<AnalysisItem> items_of(const StudyResults& study, std::vector<StudyWarning>& warnings) {
  static constexpr std::array<std::string_view, 9> fits{
      "hyper",       "hyper_alpha", "three_term_inv", "three_term",        "auto",
      "lr_exponent", "local_cbs",   "loss_law",       "convergence_points"};
  static constexpr std::array<std::string_view, 3> comparisons{"token_ratio", "data_efficiency",
                                                               "lr_transfer"};
  const ordered_json& listed = study.setting("analysis.items");
  std::vector<AnalysisItem> items;
  for (const ordered_json& entry : listed) {
    if (!entry.is_object()) refuse(study, "analysis.items: not a list of objects");
    AnalysisItem item;
    item.fit = text_of(entry, "fit");
    item.compare = text_of(entry, "compare");
    if (!item.compare.empty()) {
      if (std::find(comparisons.begin(), comparisons.end(), item.compare) == comparisons.end()) {
        refuse(study, fmt::format("analysis.items: compare: {} is not known; known: {}",
                                  runtime::quoted_for_message(item.compare),
                                  fmt::join(comparisons, ", ")));
      }
      item.fit.clear();
      item.numerator = text_of(entry, "numerator");
      item.denominator = text_of(entry, "denominator");
    } else if (std::find(fits.begin(), fits.end(), item.fit) == fits.end()) {
      refuse(study, fmt::format("analysis.items: fit: {} is not known; known: {}",
                                runtime::quoted_for_message(item.fit), fmt::join(fits, ", ")));
    }
    item.reference = text_of(entry, "reference");
    item.over = text_of(entry, "over");
    if (item.compare == "lr_transfer" && item.over.empty())
      refuse(study, "analysis.items: lr_transfer: over is missing, the parameter that is the size");
    // To one target, the three-term law of the loss is this law of the steps.
    if (item.fit == "three_term") item.fit = "three_term_inv";
    for (const std::string& name : texts_of(entry, "definitions")) {
      add_definition(item, name, warnings);
    }
    if (item.definitions.empty()) {
      item.definitions = {CbsDefinition::mccandlish, CbsDefinition::overhead,
                          CbsDefinition::token_optimal};
    }
    if (entry.contains("b_ref") && number_of(entry["b_ref"]) > 0) {
      item.reference_batch = number_of(entry["b_ref"]);
    }
    if (entry.contains("epsilon") && number_of(entry["epsilon"]) >= 0) {
      item.epsilon = number_of(entry["epsilon"]);
    }
    if (const std::string censored = text_of(entry, "censored"); censored == "exclude") {
      item.tobit = false;
    } else if (!censored.empty() && censored != "tobit") {
      refuse(study, fmt::format("analysis.items: censored: {} is not known; known: tobit, exclude",
                                runtime::quoted_for_message(censored)));
    }
    if (const std::string loss = text_of(entry, "loss"); loss == "final") {
      item.loss = "final_val";
    } else if (!loss.empty() && loss != "smoothed") {
      refuse(study, fmt::format("analysis.items: loss: {} is not known; known: smoothed, final",
                                runtime::quoted_for_message(loss)));
    }
    items.push_back(std::move(item));
  }
  if (items.empty() && is_branched(study)) {
    items.emplace_back().fit = "local_cbs";
  } else if (items.empty()) {
    AnalysisItem hyper, rates, ratio;
    hyper.fit = "hyper";
    hyper.definitions = {CbsDefinition::mccandlish, CbsDefinition::overhead};
    rates.fit = "lr_exponent";
    items = {hyper, rates, ratio};
  }
  return items;
}

studies::Bootstrap bootstrap_of(const StudyResults& study) {
  studies::Bootstrap bootstrap;
  const double resamples = number_of(study.setting("analysis.bootstrap.resamples"));
  const double level = number_of(study.setting("analysis.bootstrap.level"));
  if (resamples >= 0 && resamples <= 1e6) bootstrap.resamples = static_cast<int>(resamples);
  if (level > 0 && level < 1) bootstrap.level = level;
  return bootstrap;
}

std::vector<std::string> series_keys(const StudyResults& study) {
  static const std::set<std::string> own{"batch_size", "lr", "seed"};
  std::vector<std::string> keys;
  const auto add = [&](const std::string& key) {
    const bool known = std::any_of(study.trials.begin(), study.trials.end(),
                                   [&](const StudyTrial& t) { return t.params.contains(key); });
    if (known && !own.contains(key) && std::find(keys.begin(), keys.end(), key) == keys.end()) {
      keys.push_back(key);
    }
  };
  add("optimizer");
  for (const ordered_json& item : study.setting("analysis.items")) {
    if (!item.is_object()) continue;
    for (const std::string& key : texts_of(item, "per")) add(key);
    add(text_of(item, "over"));  // what grows with it has no name of its own
  }
  std::set<std::string> others;
  for (const StudyTrial& trial : study.trials) {
    for (const auto& entry : trial.params.items()) {
      if (!own.contains(entry.key())) others.insert(entry.key());
    }
  }
  for (const std::string& other : others) {
    std::map<std::string, std::string> values;
    for (const StudyTrial& trial : study.trials) {
      std::string place;
      for (const std::string& key : keys) place += trial.param_text(key) + "\n";
      for (const std::string& key : own) place += trial.param_text(key) + "\n";
      const std::string value = trial.param_text(other);
      if (values.emplace(place, value).first->second != value) {
        add(other);
        break;
      }
    }
  }
  return keys;
}

std::string SeriesName::label() const {
  if (optimizer.empty()) return rest.empty() ? "all" : rest;
  return rest.empty() ? optimizer : optimizer + ", " + rest;
}

SeriesName series_name(const StudyTrial& trial, const std::vector<std::string>& keys) {
  SeriesName name;
  for (const std::string& key : keys) {
    if (key == "optimizer") {
      name.optimizer = trial.param_text(key);
    } else {
      name.rest += (name.rest.empty() ? "" : ", ") + key + "=" + trial.param_text(key);
    }
  }
  return name;
}

}  // namespace orthrus::cli
