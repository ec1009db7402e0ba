#pragma once
/// @file
/// Presets: study files that commands and `study init` write. Text in, text out.

#include <cstdint>
#include <optional>
#include <orthrus/config.hpp>
#include <string>
#include <vector>

namespace orthrus::cli {

/// A configuration and the name that the study file has for it.
struct PresetBase {
  std::string file;  ///< as the study file says it
  Config config;
};

struct PresetOptions {
  std::string name;                   ///< of the study
  std::optional<double> target;       ///< critical batch; none: to be filled in
  std::vector<std::int64_t> batches;  ///< empty: an eighth to eight times the base's
  std::vector<std::int64_t> ranks;    ///< of scaling
  std::int64_t steps = 0;             ///< per trial; 0: the preset's or the base's
};

struct Preset {
  const char *name, *doc;
  int bases;  ///< configurations it takes at least
  std::string (*text)(const std::vector<PresetBase>& bases, const PresetOptions& options);
};
/// Those that are there.
[[nodiscard]] const std::vector<Preset>& presets();
/// @throws ConfigError  no such preset.
[[nodiscard]] const Preset& find_preset(const std::string& name);
/// The rate that the parameter `lr` replaces.
[[nodiscard]] double base_rate(const Config& config);

}  // namespace orthrus::cli
