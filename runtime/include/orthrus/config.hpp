#pragma once
/// @file
/// Config: everything a run is told, read strictly. Unknown, duplicate, mistyped and out-of-range
/// keys are refused with `file:line:col: key.path: what, and a hint`; defaults < file < environment
/// < --set.

#include <cstdint>
#include <filesystem>
#include <map>
#include <orthrus/recipe.hpp>
#include <span>
#include <string>
#include <vector>

namespace orthrus {

/// `mesh:` ranks = shard × replicate; 0 is `auto`.
struct MeshConfig {
  std::int64_t shard = 0;  ///< auto: all ranks, or what `replicate` leaves
  std::int64_t replicate = 1;
  std::int64_t node = 0;  ///< consecutive ranks that share a node; 0: not told, one level
  friend bool operator==(const MeshConfig&, const MeshConfig&) = default;
};

/// `comm:`
struct CommConfig {
  std::string backend = "auto";          ///< mpi, nccl; auto: nccl where devices allow it
  std::int64_t bucket_bytes = 64 << 20;  ///< gradient bytes that travel together
  double timeout_s = 0;                  ///< 0: max(60 s, 10 × the median step)
  std::string gradient_dtype = "f32";    ///< on the wire: f32 | bf16
  bool blocking = false;                 ///< no call overlaps computation
  friend bool operator==(const CommConfig&, const CommConfig&) = default;
};

/// `cuda:` what only that device heeds.
struct CudaConfig {
  bool graph = false;  ///< the LMO of a whole matrix is recorded once, and launched as one
  friend bool operator==(const CudaConfig&, const CudaConfig&) = default;
};

/// `groups[].matrix:` how a matrix meets its shards.
struct MatrixConfig {
  std::string mode = "auto";     ///< auto, or one of optim::Mode
  std::string accuracy = "f32";  ///< bitwise | f32 | fast
  std::string wire = "f32";      ///< f32 | bf16
  std::int64_t period = 1;
  friend bool operator==(const MatrixConfig&, const MatrixConfig&) = default;
};

/// `groups[].split:` logical matrices of a parameter: one of three, or none.
struct SplitConfig {
  std::vector<std::int64_t> rows;  ///< heights of the blocks; one number N: N equal blocks
  std::vector<std::int64_t> cols;  ///< widths, likewise
  bool stack = false;              ///< 3-D: one matrix per leading index (experts)
  friend bool operator==(const SplitConfig&, const SplitConfig&) = default;
};

/// One entry of `groups:`; the first whose pattern matches a parameter's whole name has it.
struct GroupConfig {
  std::string match;  ///< `*` any characters, `?` one, `{a,b}` alternatives
  RuleConfig rule;
  LmoConfig lmo;
  MatrixConfig matrix;
  WeightsConfig weights;
  StateConfig state;
  ScheduleConfig schedule;
  SplitConfig split;
  double clip_norm =
      0;  ///< 0: off. Raw gradients of the group are scaled to at most this Frobenius norm
  /// Of the modular norm (T. Large et al., arXiv:2405.14813): the layers' share of a step, and how
  /// much what follows them may enlarge a change of their output. η = lr·mass/sensitivity.
  double layer_mass = 1, layer_sensitivity = 1;
  friend bool operator==(const GroupConfig&, const GroupConfig&) = default;
};

/// `train:`
struct TrainConfig {
  std::int64_t steps = 100;
  std::int64_t batch = 32;  ///< independent units per step, over all ranks
  std::int64_t micro_batches =
      1;                        ///< per rank and step (with `reproducible`: virtual_shards / ranks)
  std::int64_t eval_every = 0;  ///< steps; 0: only at the end
  std::int64_t save_every = 0;  ///< steps; 0: never
  std::int64_t keep = 2;        ///< checkpoints kept
  std::int64_t max_skipped = 10;  ///< skipped steps in a row before the run stops (exit 80)
  friend bool operator==(const TrainConfig&, const TrainConfig&) = default;
};

/// `gns_ramp:` a batch that grows with the gradient's noise scale (`studies::BatchRamp`); for
/// bundled trainers, a trainer of its own uses that class.
struct GnsRampConfig {
  std::string geometry = "none";  ///< l2, l1 or nuc: of the noise; none: the batch stays
  double factor = 0.6;            ///< κ: without a price the batch is κ times the noise scale
  double decay = 0.9;             ///< of the averages of noise and of signal
  std::int64_t every_steps = 100;
  std::int64_t warmup_steps = 0;  ///< no decision before
  std::int64_t max_batch = 0;     ///< 0: a million
  std::int64_t max_local = 0;     ///< examples of a micro-batch; 0: as train.micro_batches has it
  double price_step = 0, price_example = 0, price_second = 0;
  [[nodiscard]] bool on() const { return geometry != "none"; }
  friend bool operator==(const GnsRampConfig&, const GnsRampConfig&) = default;
};

/// `telemetry:`
struct TelemetryConfig {
  std::int64_t every_steps = 10;
  std::string path;  ///< JSON lines of each rank; `{rank}` and `{name}` are filled in; empty: off
  friend bool operator==(const TelemetryConfig&, const TelemetryConfig&) = default;
};

/// `diagnostics:`
struct DiagnosticsConfig {
  std::int64_t every_steps = 0;
  /// What noise shows between: gradients (of ranks and micro-batches), or norm_layers (of single
  /// examples, of the parameters that the trainer has those of).
  std::string gns_source = "gradients";
  bool spectra = false;     ///< look at matrices, too
  bool dual_noise = false;  ///< and, then, at noise in dual norms
  bool dynamics = false;    ///< and at what steps do to the singular values of weights
  /// What is done with the layerwise condition: report, advise (says so when it changes), or auto
  /// (steps change with it, every `train.save_every`).
  std::string advisor = "report";
  double budget_frac = 0.01;
  friend bool operator==(const DiagnosticsConfig&, const DiagnosticsConfig&) = default;
};

/// Everything, resolved.
struct Config {
  std::int64_t schema = 1;
  std::string name = "run";
  std::uint64_t seed = 1;
  std::string device = "cpu";
  CudaConfig cuda;
  std::string profile = "default-cpu";  ///< machine the planner predicts for: a name, or a file
  std::int64_t memory_cap = 0;          ///< bytes per rank over all planned categories; 0: none
  MeshConfig mesh;
  CommConfig comm;
  std::int64_t zero_stage = 2;
  std::int64_t working_set =
      0;                     ///< `zero.working_set`: bytes of weights gathered at a time; 0: all
  std::int64_t gathers = 2;  ///< `zero.gathers`: of each weight per step, as the plan assumes
  std::int64_t virtual_shards = 0;  ///< `reproducible.virtual_shards`; 0: off
  std::vector<GroupConfig> groups;
  std::string checks = "local";  ///< off | local | collective
  std::int64_t replica_hash_every =
      0;  ///< `checks_every_steps`: compare weights across ranks; 0: never
  TelemetryConfig telemetry;
  TrainConfig train;
  GnsRampConfig gns_ramp;
  DiagnosticsConfig diagnostics;
  std::string workload;  ///< `workload.name`; empty: none
  std::map<std::string, Value>
      workload_values;                ///< the other keys of `workload:`, checked by the workload
  std::map<std::string, Value> data;  ///< keys of `data:`: source, tokenizer, …

  std::string source;  ///< file name, for messages
  friend bool operator==(const Config&, const Config&) = default;
};

/// Reads a YAML file. @param overrides  "key.path=value" each, applied after file and environment
/// (`ORTHRUS__COMM__TIMEOUT_S` is comm.timeout_s; `groups.0.rule.lr=0.01` reaches into lists).
/// @throws ConfigError with position and hint.
[[nodiscard]] Config load_config(const std::filesystem::path& file,
                                 std::span<const std::string> overrides = {});
/// The same from text; `name` stands for the file in messages. Reads no environment.
[[nodiscard]] Config parse_config(const std::string& text, const std::string& name = "config",
                                  std::span<const std::string> overrides = {});
/// The resolved configuration as YAML: `parse_config(to_yaml(c)) == c` (but for `source`).
[[nodiscard]] std::string to_yaml(const Config& config);
/// Every key with its value and where it was said, a line each: `comm.timeout_s: 30  #
/// configs/a.yaml:5:20`. Reads what `load_config` reads, and refuses what it refuses.
[[nodiscard]] std::string explain_config(const std::filesystem::path& file,
                                         std::span<const std::string> overrides = {});
/// 32 hex digits over the resolved configuration (XXH3-128 of `to_yaml`).
[[nodiscard]] std::string config_hash(const Config& config);
/// The first group whose pattern matches `name`, starting at `from`; -1 when there is none.
[[nodiscard]] int matching_group(const Config& config, const std::string& name, int from = 0);

/// One documented key, for `orthrus info --keys`.
struct KeyDoc {
  std::string path, type, default_value, unit, doc;
};
[[nodiscard]] std::vector<KeyDoc> config_keys();

}  // namespace orthrus
