#pragma once
/// @file
/// Workload: a trainer in the sense of the public API — a model with parameters, a loss and data.
/// It includes installed headers only, knows its rank's share of a batch, and nothing of sharding.

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <orthrus/config.hpp>
#include <orthrus/sharded_optimizer.hpp>
#include <orthrus/view.hpp>
#include <string>
#include <vector>

namespace orthrus::workloads {

/// Which examples: `count` units from unit `first` of the training stream (units are independent:
/// sequences, images). A unit is the same example for any batch and on any number of ranks. Where
/// the examples have an end, every `training_units` of the stream are each of them once, in an
/// order of their own.
struct Slice {
  std::int64_t first = 0, count = 0;
};

class Workload {
 public:
  virtual ~Workload() = default;
  /// Names, shapes, buffers. Initial weights depend on config.seed alone.
  [[nodiscard]] virtual std::vector<Parameter> parameters() = 0;
  /// The device that its weights and gradients are on, and the queue its work is in: what the
  /// optimizer is to be constructed with. Nothing: they are the host's.
  [[nodiscard]] virtual std::optional<DeviceChoice> device() const { return std::nullopt; }
  /// From now on the weights of parameter `id` are at `data`, dense (`zero.stage: 3`: gathered
  /// before each use). The buffer of `parameters()` is used no more.
  virtual void place_weights(int id, void* data) = 0;
  /// Forward and backward on `slice`; every gradient is the mean over the slice. Calls `ready(id)`
  /// (position in `parameters()`) as soon as a gradient is in place. @return the mean loss of the
  /// slice. On a device a gradient in place is one that is queued there; `ready` is called by the
  /// thread that called this.
  virtual double gradient(const Slice& slice, const std::function<void(int)>& ready) = 0;
  /// Until told otherwise `gradient` hands over what parameters multiply: `observer(id, inputs)`,
  /// one row per token, of the host, f32, at least the first `ShardedOptimizer::activation_rows` of
  /// each pass. Empty: it does not. A workload need not, for any of its parameters.
  using Observer = std::function<void(int id, ConstMatrixView inputs)>;
  virtual void watch(const Observer&) {}
  /// Until told otherwise `gradient` hands over the gradients of single examples that it has at
  /// hand, of gains of normalization layers: `observer(id, examples × elements)`, f32, of the host.
  /// Empty: it does not. @return whether it has any.
  virtual bool watch_examples(const Observer&) { return false; }
  /// Metrics on held-out data, computed on the share of rank `rank` of `size`: sums over examples
  /// and their number; the caller adds the ranks up and divides. Key "val_loss" is always there
  /// (analytic workloads: the true objective), "val_accuracy" for classifiers.
  struct Evaluation {
    std::map<std::string, double> sums;
    double count = 0;
  };
  [[nodiscard]] virtual Evaluation evaluate(int rank, int size) = 0;
  /// Tokens (or other items) per unit, for throughput; 1 when a unit is the item.
  [[nodiscard]] virtual std::int64_t items_per_unit() const { return 1; }
  /// Units of the training part, which is an epoch; 0: it has no end, every unit is a fresh one.
  [[nodiscard]] virtual std::int64_t training_units() const { return 0; }
};

/// The workload `config.workload` names. @throws ConfigError unknown name or key (with the known
/// ones), or a workload this build lacks libtorch for; data errors name the file.
/// @param cuda  the CUDA device it may compute on; -1: none. One that cannot stays on the host:
///              see `Workload::device`.
[[nodiscard]] std::unique_ptr<Workload> open_workload(const Config& config, int cuda = -1);

/// Do libtorch's workloads find a CUDA device?
[[nodiscard]] bool workloads_reach_cuda();

/// Names and one-line descriptions, with whether this build has them.
struct WorkloadRow {
  std::string name, doc;
  bool available;
};
[[nodiscard]] std::vector<WorkloadRow> workload_table();

}  // namespace orthrus::workloads
