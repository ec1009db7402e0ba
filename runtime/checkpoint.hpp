#pragma once
/// @file
/// Checkpoints: a directory of safetensors shards and one checksummed manifest. Everything is keyed
/// by parameter and region, so that any number of ranks can load what any other number saved.

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <orthrus/dtype.hpp>
#include <orthrus/studies/spectrum.hpp>
#include <string>
#include <vector>

#include "runtime/weight_format.hpp"

namespace orthrus::runtime {

/// A file of a checkpoint.
struct CheckpointFile {
  std::string name;
  std::int64_t bytes = 0;
};

/// Rows of a tensor of a parameter, and where they are stored.
struct CheckpointPiece {
  std::string parameter, key;                         ///< key: "weights", "master", "momentum", …
  Index first = 0, rows = 1, cols = 0, distance = 0;  ///< flat elements of the whole tensor
  int file = 0;
  std::string tensor, dtype, xxh3;
};

struct CheckpointParameter {
  std::string name;
  std::vector<Index> shape;
  std::string format, rule;       ///< of the weights; the rule that kept its state
  std::vector<std::string> keys;  ///< state keys, and "master"
  /// Per key: elements of each of its matrices' per-line state, in order; empty for one number per
  /// element.
  std::vector<std::vector<Index>> lines;
  std::string momentum = "f32";  ///< how its momentum rests; said where that is not f32
};

/// Of int8 codes: the key of their scales, which is no state of a rule's.
inline constexpr const char* scales_of_momentum = "momentum.scales";

/// How key `key` of a parameter rests; nothing where the manifest names no format of ours.
std::optional<WeightFormat> format_of(const CheckpointParameter& p, const std::string& key);

/// manifest.json
struct Manifest {
  static constexpr int version = 1;
  std::int64_t ranks = 1, step = 0, updates = 0;
  double lr_multiplier = 1;
  std::string plan_hash, config_hash;
  std::map<std::string, std::string> user;
  std::vector<CheckpointFile> files;
  std::vector<CheckpointParameter> parameters;
  std::vector<CheckpointPiece> pieces;
  /// Averages of gradient noise (`GradientNoise`): those of parameters by name, of groups by place,
  /// of the model. Trace, signal, signal², Σw, Σw².
  using NoiseTrend = std::array<double, 5>;
  std::map<std::string, NoiseTrend> parameter_noise;
  std::vector<NoiseTrend> group_noise;
  NoiseTrend model_noise{};
  /// By matrix, of those that were looked at beside their activations; and, with
  /// `diagnostics.advisor: auto`, what it decides by.
  struct Geometry {
    double euclidean = 0;  ///< `MatrixSpectra::euclidean` of the next step
    studies::GeometryAdvisor::State advisor;
  };
  std::map<std::string, Geometry> geometry;
  std::int64_t next_look = 0;                             ///< no step before it looks
  std::map<std::string, std::vector<float>> activations;  ///< by parameter: power iterations'
};

/// The document, with its own SHA-256 as last member.
std::string manifest_text(const Manifest& manifest);
/// Reads and checks `directory`/manifest.json and the sizes of the files it names.
/// @throws ConfigError missing; DataError damaged, another version, a file missing or of another
/// size.
Manifest read_manifest(const std::filesystem::path& directory);
/// Reads every byte and compares digests. @throws DataError naming file and tensor.
void verify_checkpoint(const std::filesystem::path& directory);

/// Directories step-* below `directory` whose manifest reads, newest step first.
std::vector<std::filesystem::path> list_checkpoints(const std::filesystem::path& directory);

}  // namespace orthrus::runtime
