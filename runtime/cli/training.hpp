#pragma once
/// @file
/// Training: a workload and its optimizer on the ranks of a communicator, taken through steps. What
/// `train` and a trial of a study share: no file, no signal, no clock that decides anything.

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <orthrus/communicator.hpp>
#include <orthrus/config.hpp>
#include <orthrus/sharded_optimizer.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "runtime/workloads/workload.hpp"

namespace orthrus::cli {

class Training {
 public:
  enum class Trust : std::uint8_t {
    gradients,  ///< a workload that throws on one rank leaves the others waiting for it
    nobody,     ///< it throws on all ranks; a small message per step more
  };

  /// Where a run goes on that another began: its step `step` begins with unit `unit` of the stream.
  struct Start {
    std::int64_t step = 0, unit = 0;
  };

  /// Opens the workload, plans, allocates. Collective.
  /// @param control  the ranks of `world` under a context of their own: messages apart from the
  ///                 optimizer's, so that its audit counts only those.
  /// @throws ConfigError  on all ranks: the batch cannot be dealt to so many, or as the workload
  ///                      and the optimizer say.
  Training(Config config, Communicator world, Communicator control, Trust trust = Trust::gradients,
           Start start = {0, 0});

  /// What a rank has to say after a step; true for all when any rank says so.
  struct Word {
    bool stop = false, save = false, problem = false;
  };
  struct Step {
    StepReport report;  ///< of this rank
    Word any;
    double loss = 0;      ///< mean over all parts, added up in their order: the same on any number
                          ///< of ranks
    double own_loss = 0;  ///< of this rank's parts
    double bytes = 0, bytes_max = 0, messages = 0, exceptional = 0, matrices = 0;  ///< of all ranks
    double gradient_ms = 0, step_ms = 0;
    /// Of each linear layer that was looked at: its parameter, and the root mean square of W x over
    /// the batch.
    std::vector<std::pair<int, double>> preactivations;
    /// Where it was measured and the weights have moved, and ‖ΔW‖_F of all of them.
    std::optional<double> sharpness;
    double update_norm = 0;
  };
  /// Gradients, then the optimizer's step. Collective. @param word  asked when both are done.
  Step step(const std::function<Word()>& word);
  /// The next step measures pre-activations, of workloads that show what their layers multiply. On
  /// all ranks.
  /// @throws ConfigError  the weights are not f32 on the host.
  void look_at_preactivations();
  /// The next step measures the curvature along what it adds to the weights, on its own batch:
  /// 4·(f(W) − 2f(W + ½ΔW) + f(W + ΔW))/‖ΔW‖², which is ΔWᵀHΔW/‖ΔW‖² of a quadratic and needs no
  /// gradient (`studies::directional_smoothness` has one). The batch is passed twice more, and the
  /// weights are kept twice. On all ranks.
  /// @throws ConfigError  the weights are not f32 on the host.
  void look_at_sharpness();
  /// Means over the held-out data of all ranks. Collective.
  std::map<std::string, double> evaluate();
  /// From now on an exponential average of the weights follows every step, whole on every rank;
  /// weights of `halflife_examples` ago count half. Under ZeRO-3 a step gathers once more for it.
  /// Collective.
  /// @throws ConfigError  on all ranks: the weights are not f32 on the host.
  void keep_average(double halflife_examples);
  /// `evaluate` of the average. The training goes on from its own weights, bit for bit. Collective.
  std::map<std::string, double> evaluate_average();

  /// The next step begins with unit `unit` of the stream.
  void begin_at(std::int64_t unit) { start_ = {steps(), unit}; }
  /// Goes on from a checkpoint of this training with batches of other sizes, from unit `unit` of
  /// the stream; what was trained since is lost. Plans anew, as another batch may have other
  /// messages. Collective.
  void go_on_from(const std::string& checkpoint, std::int64_t unit, std::int64_t batch,
                  std::int64_t micro_batches);

  /// Takes the weights of a checkpoint, and nothing else: the optimizer begins anew. Collective.
  /// @throws ConfigError  on all ranks: the weights are not f32 on the host.
  void begin_with_weights_of(const std::string& checkpoint);

  /// As given; what a step's batch is by now says `batch`.
  [[nodiscard]] const Config& config() const { return config_; }
  [[nodiscard]] std::int64_t batch() const { return now_.train.batch; }
  /// How far the stream has been read, in units.
  [[nodiscard]] std::int64_t units() const { return unit_of(steps()); }
  [[nodiscard]] int rank() const { return rank_; }
  [[nodiscard]] int size() const { return size_; }
  [[nodiscard]] Communicator& control() { return control_; }
  [[nodiscard]] ShardedOptimizer& optimizer() { return *optimizer_; }
  [[nodiscard]] const ShardedOptimizer& optimizer() const { return *optimizer_; }
  [[nodiscard]] const workloads::Workload& workload() const { return *workload_; }
  [[nodiscard]] const std::vector<Parameter>& parameters() const { return parameters_; }
  [[nodiscard]] const std::vector<int>& ids() const { return ids_; }  ///< of all parameters
  /// Of the workload's tensors; empty: the host.
  [[nodiscard]] const std::optional<DeviceChoice>& place() const { return place_; }
  [[nodiscard]] std::int64_t steps() const { return optimizer_->steps(); }
  [[nodiscard]] std::int64_t elements() const;  ///< of all parameters
  /// Of the steps since the start, those in which a group's gradient was scaled down to its
  /// `clip_norm`; nothing where no group has one. GNS is measured before, rules see what is after.
  [[nodiscard]] std::optional<double> clip_fraction() const;
  /// Tokens or other items in a batch.
  [[nodiscard]] std::int64_t items_per_step() const;

 private:
  /// The parts of a step's batch that this rank computes, each one call of the workload.
  struct Deal {
    struct Part {
      std::int64_t first, count;
    };
    std::vector<Part> parts;
    std::int64_t all_parts = 0;  ///< of all ranks
  };
  static Deal divide(const Config& config, int rank, int ranks);
  void deal();
  void open(Communicator world, const std::vector<std::vector<float>>& weights = {});
  /// The first of a step's batch.
  [[nodiscard]] std::int64_t unit_of(std::int64_t step) const {
    return start_.unit + (step - start_.step) * now_.train.batch;
  }
  [[nodiscard]] workloads::Slice slice(std::int64_t step, std::size_t part) const;
  void compute_gradients();
  [[nodiscard]] std::span<float> weights(int id) const;  ///< while they are gathered
  void require_host_weights(const char* what) const;
  void add_preactivations(int id, ConstMatrixView inputs);
  [[nodiscard]] std::vector<std::vector<float>> copy_of_weights();
  double batch_loss(std::int64_t index);
  void measure_sharpness(Step& step);
  void remember();
  void follow();
  std::map<std::string, double> means(const workloads::Workload::Evaluation& mine);
  void exchange_average();
  void share(const Word& mine, Step& step);

  const Config config_;
  Config now_;  // with the batch that steps have by now
  const int rank_, size_;
  const Trust trust_;
  Start start_;
  Communicator control_;
  Deal deal_;
  std::vector<Index> parts_;  // of each rank
  std::unique_ptr<workloads::Workload> workload_;
  std::optional<DeviceChoice> place_;
  std::vector<Parameter> parameters_;
  std::optional<ShardedOptimizer> optimizer_;
  std::vector<int> ids_;
  std::int64_t taken_ = 0, clipped_ = 0;     // steps, and those of them that were clipped
  std::vector<double> losses_;               // of this rank's parts, in the step last taken
  std::vector<std::vector<float>> average_;  // of each parameter; empty: none is kept
  double halflife_ = 0;                      // of the average, in examples
  float forgotten_ = 0;                      // by a step: the weight of what is new
  bool looks_ = false;                       // at pre-activations, in the next step
  bool sharpness_ = false;                   // is measured in the next step
  std::vector<std::vector<float>> before_;   // weights, where it is
  std::vector<double> squares_, counts_;     // of them, by parameter
};

/// What a step measured of gradient noise (`diagnostics.every_steps`): an object per group, by its
/// pattern, and of the model, with the group "all". Empty: nothing.
[[nodiscard]] nlohmann::json noise_of(const StepReport& report, const Config& config);

/// What a step saw of matrices (`diagnostics.spectra`): an object for each, and one of all of them.
/// What an activation would say is null where none was observed. Empty: nothing.
/// @param parameters  those of the optimizer
[[nodiscard]] nlohmann::json spectra_of(const ShardedOptimizer& optimizer, const StepReport& report,
                                        std::span<const Parameter> parameters);

/// The number of elements of a tensor.
[[nodiscard]] std::int64_t elements_of(const Parameter& parameter);

}  // namespace orthrus::cli
