#pragma once
/// @file
/// orthrus study fit: a law of `Orthrus::studies` through the numbers of a file.

#include <nlohmann/json.hpp>
#include <orthrus/studies/fit.hpp>
#include <span>
#include <string>
#include <vector>

namespace orthrus::cli {

struct FitOptions;
class FitPage;

/// A law as the command knows it.
struct FitLaw {
  const char* name;
  const char* formula;
  const char* x;  ///< keys by default, by commas; empty: they must be given
  const char* y;
  bool resampled;  ///< its intervals are a bootstrap's
  void (*fit)(FitPage& page, const std::vector<std::vector<double>>& columns,
              const FitOptions& options);
};
/// All of them, in the order of the README.
[[nodiscard]] std::span<const FitLaw> fit_laws();

struct FitOptions {
  std::string file;
  const FitLaw* law = nullptr;
  std::vector<std::string> x;  ///< keys
  std::string y;
  studies::Bootstrap bootstrap;  ///< 0 resamples: no intervals
  double b_ref = 256;            ///< reference batch of the definition `overhead20`
  studies::CollectiveShape collective;
};

/// How a ring's time splits: of `all_gather`, `reduce_scatter`, `all_reduce`, over at least 2
/// ranks.
[[nodiscard]] studies::CollectiveShape ring_shape(const std::string& collective, int ranks);

struct FitReport {
  nlohmann::ordered_json document;  ///< one line of type `fit`
  std::string text;                 ///< the same for people
};
/// @throws ConfigError, DataError  as `read_records`; DataError: fewer points than the law needs
[[nodiscard]] FitReport fit_file(const FitOptions& options);

}  // namespace orthrus::cli
