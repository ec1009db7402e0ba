#pragma once
/// @file
/// ShardedOptimizer: gradients in, new weights out.

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <orthrus/communicator.hpp>
#include <orthrus/config.hpp>
#include <orthrus/dtype.hpp>
#include <orthrus/quantized.hpp>
#include <orthrus/stream.hpp>
#include <orthrus/studies/spectrum.hpp>
#include <orthrus/view.hpp>
#include <span>
#include <string>
#include <vector>

namespace orthrus {

/// What the gradient buffer of a parameter holds when `gradient_ready` is called.
enum class GradientState : std::uint8_t {
  local,     ///< this rank's own mean; the gradient is the mean of all ranks'
  averaged,  ///< the same on all ranks already: nothing is sent
  shard,     ///< this rank's part (`Parameter::sharding`) of the mean over all ranks
};

/// How the trainer cuts a parameter of which each rank holds only a part. Weights and gradient are
/// that part, dense and row-major; every replica of a shard holds the same.
struct Sharding {
  enum class Along : std::uint8_t {
    none,     ///< the buffers are whole
    rows,     ///< runs of rows (of the parameter seen as shape[0] × the product of the rest)
    columns,  ///< runs of columns
    elements  ///< runs of elements in row-major order: boundaries may lie inside a row
  };
  Along along = Along::none;
  /// Rows, columns or elements of each rank of the shard group, 0 allowed; empty: as even as
  /// possible, the first ranks one more.
  std::vector<Index> counts;
  friend bool operator==(const Sharding&, const Sharding&) = default;
};

/// A block of a parameter that is one matrix for the optimizer (Q, K and V of a fused weight are
/// three). Coordinates are those of the parameter seen as shape[0] × (product of the rest).
struct LogicalMatrix {
  Index row0 = 0, rows = 0, col0 = 0, cols = 0;
  friend bool operator==(const LogicalMatrix&, const LogicalMatrix&) = default;
};

/// Which device of its kind (`Config::device`) a rank computes on, and in which queue. The CPU has
/// one device and no queue.
struct DeviceChoice {
  /// CUDA's number of it; -1: the rank's place among those of its machine, modulo the devices it
  /// sees.
  int ordinal = -1;
  /// The stream the trainer's work is in (a `cudaStream_t`; null: the default stream). All that is
  /// done to the device is queued there: gradients need not be complete when they are said to be
  /// ready, only queued. The optimizer's results are complete when a call returns.
  Stream stream;
};

/// One tensor of the trainer. The buffers stay the trainer's and must outlive the optimizer.
///
/// A trainer may compute with codes: where `weights.format` of the group has them, it gives `codes`
/// and `scales` in place of `weights`, with the initial weights in them (orthrus/codes.hpp makes
/// them). Rows are those of the parameter seen as shape[0] × (product of the rest); with one
/// dimension it is one row, with `split.stack` it has shape[0]·shape[1] rows. Codes and scales are
/// replaced by a step, by nothing else; no buffer of the weights' size is kept beside them. They
/// must be where the optimizer computes (no copies on a device are kept of them), and whole: not of
/// a sharded parameter.
///
/// With `device: cuda` weights and gradient may lie on the rank's device or, each of them, on the
/// host. What lies on the host has a copy on the device as large as itself, beside the planned
/// memory: the gradient is copied when its bucket is packed, all weights before and after a step.
struct Parameter {
  std::string name;  ///< unique; not starting with "state/", not ending in ".codes"/".scales"
  std::vector<Index> shape;    ///< row-major order of dimensions; scalars are {1}
  std::vector<Index> strides;  ///< elements per dimension; empty: contiguous
  DType dtype = DType::f32;    ///< of the weights: f32 or bf16 (of codes: what copies of them are)
  /// The same bits on all ranks; of a sharded parameter, this rank's part. With `zero.stage: 3`
  /// only read by the constructor (`ShardedOptimizer::weights` from then on).
  void* weights = nullptr;
  /// `code_pitch` bytes a row, one row after the other. The same bits on all ranks, and with
  /// `zero.stage: 3` only read by the constructor, as weights are (`ShardedOptimizer::codes`).
  void* codes = nullptr;
  float* scales = nullptr;         ///< `scale_rows` × `scale_cols`, every one positive
  const void* gradient = nullptr;  ///< same shape and strides
  DType gradient_dtype = DType::f32;
  GradientState gradient_state = GradientState::local;
  std::vector<LogicalMatrix> views;  ///< empty: what the group's `split` says, else one matrix
  Sharding sharding;                 ///< with `GradientState::shard`
  bool f32_only = false;             ///< a group whose `weights.format` rounds is refused
};

/// Milliseconds of one step on this rank, in the order of the walk.
struct StepTimes {
  double reduce = 0;   ///< waiting for gradients (exposed)
  double control = 0;  ///< flags and norms
  double update = 0;   ///< momentum, LMO, weights
  double lmo = 0;      ///< of `update`: orthogonalization
  double meet = 0;     ///< waiting for pieces of matrices (exposed)
  double gather = 0;   ///< waiting for weights (exposed)
  double copy = 0;     ///< packing gradients, unpacking weights
  double probe = 0;    ///< `diagnostics.spectra`
  double total = 0;
};

/// What rounding weights did in one step to a group, over all ranks; measured every
/// `telemetry.every_steps` steps, else as it was.
struct RoundingReport {
  std::int64_t step = 0;  ///< when it was measured; 0: never
  /// rms of ηU / distance of neighbouring codes around a typical weight.
  double step_over_grid = 0;
  /// ECO: norm of what is to go into the momentum, before its guard / norm of the momentum.
  double relative_correction = 0;
  double residual_rms = 0;     ///< of W̃ − Ŵ
  std::int64_t saturated = 0;  ///< weights beyond the largest code
  /// ECO with a step whose length does not depend on the momentum's: has the regime been left in
  /// which rounding averages out (step_over_grid < (1 − β)/2, or relative_correction >
  /// 0.7·√(1 − β²))? It stays so once it was.
  bool out_of_regime = false;
};

/// How much of a gradient is chance: what the gradients of single ranks and micro-batches say
/// (arXiv:1812.06162, appendix A), of a parameter, a group or the model, over all ranks. Measured
/// every `diagnostics.every_steps` steps, before clipping, else as it was. Units: gradients
/// squared; examples, or where `train.batch` is not given, contributions.
struct GradientNoise {
  std::int64_t step = 0;  ///< when it was measured; 0: never
  /// Gradients behind the mean: ranks × micro-batches, or virtual shards; of `observe_examples`,
  /// examples. 0: nothing can be said of one alone, nor of gradients that come averaged or in
  /// shards.
  std::int64_t contributions = 0;
  double examples = 1;      ///< of each contribution
  double mean_squared = 0;  ///< mean of the contributions' squared norms
  double squared_mean = 0;  ///< squared norm of their mean
  /// Share of the elements that could be measured: those whose gradients come neither averaged nor
  /// in shards. The rest is in none of these numbers.
  double share = 1;
  /// Averages over measurements, of weight 0.9, 0.9², … of earlier ones. Of `trace` and of
  /// `signal`: ratios are taken last.
  double trace_trend = 0, signal_trend = 0;
  double signal_squares = 0;              ///< the average of `signal`²
  double weight = 0, weight_squares = 0;  ///< of the averages: Σw, Σw²
  /// With `diagnostics.dual_noise`, in the norm dual to the one that sign descent steps in, of one
  /// example: Σ of the elements' standard deviations, and Σ|mean| (arXiv:2602.03001). Their ratio,
  /// squared, is the noise scale of sign-like rules. Noise is in the mean, too: compare equal
  /// `contributions` only.
  double absolute_deviation = 0, absolute_mean = 0;

  /// trΣ of one example, without bias.
  [[nodiscard]] double trace() const {
    if (contributions < 2) return 0;
    const auto n = static_cast<double>(contributions);
    return examples * n / (n - 1) * (mean_squared - squared_mean);
  }
  /// |G|² of the expected gradient, without bias; by chance it may be negative.
  [[nodiscard]] double signal() const {
    if (contributions < 2) return 0;
    const auto n = static_cast<double>(contributions);
    return (n * squared_mean - mean_squared) / (n - 1);
  }
  /// The batch of which half the squared norm is noise (B_simple), by the trends. Infinite where
  /// the signal is not above 0.
  [[nodiscard]] double scale() const {
    if (trace_trend == 0) return 0;
    return signal_trend > 0 ? trace_trend / signal_trend : std::numeric_limits<double>::infinity();
  }
  /// Is the averaged signal less than two of its standard errors, or of fewer than three
  /// measurements? `scale` then says only that noise is much.
  [[nodiscard]] bool unresolved() const {
    const double counted = weight_squares > 0 ? weight * weight / weight_squares : 0;
    if (counted < 2) return true;
    const double variance = signal_squares - signal_trend * signal_trend;
    return signal_trend * signal_trend * (counted - 1) <= 4 * variance || signal_trend <= 0;
  }
};

/// What singular values say of one matrix of the model (arXiv:2512.04299, 2606.08388): measured
/// with `diagnostics: {every_steps, spectra: true}`, over all ranks, the same numbers on all of
/// them and whatever the sharding. Of every logical matrix of a matrix rule, and of every other
/// parameter of two dimensions or more, seen as shape[0] × the rest. Numbers that could not be made
/// (of entries that are not finite) are NaN; what a matrix has not is zero.
struct MatrixSpectra {
  std::string name;  ///< the parameter's, with "#k" for block k of several
  int parameter = 0;
  std::int64_t step = 0;       ///< when it was measured; 0: never
  studies::Spectrum gradient;  ///< of the mean over ranks and micro-batches, before clipping
  studies::Spectrum momentum;  ///< before the step
  studies::Spectrum weights;   ///< before the step, as the trainer has them
  studies::Spectrum update;    ///< what the step added to them: decay and rounding, too
  /// λ‖W‖_op/s of muon with weight decay λ, s its update's scale: below 1 where the weights are in
  /// the ball that steps keep them in (at most its start and 1, and what the LMO is off by); the ρ
  /// of `studies::form_b`. 0 without decay.
  double rho = 0;
  /// Of the angle between the gradient and the update's opposite.
  double cosine = 0;
  /// −⟨G, ΔW⟩/(‖ΔW‖_op·‖G‖_*): 1 for a step along polar(G); noise and stale momentum take from it.
  double alignment = 0;
  /// Muon with Nesterov's EMA and without clipping, where the gradient's noise is measured: the
  /// batch at which noise and signal of a polar update are equal, their ratio at this batch, and
  /// whether the smallest singular values are noise (`studies::polar_batch`).
  studies::PolarBatch polar;
  /// Of the momentum's singular values over the largest: the least, the quantiles .01, .1, .5, .9.
  /// What Newton-Schulz must lift (arXiv:2606.04058).
  std::array<double, 5> momentum_quantiles{};
  /// With `diagnostics.dynamics`, of Muon's spectral steps: O of ΔW = −η(λW + sO), as the rounding
  /// of weights lets it be seen: ‖OOᵀ − I‖_F/√k on the shorter side k, and its extreme singular
  /// values. 0 of other steps.
  double orthogonality_error = 0, direction_least = 0, direction_largest = 0;
  /// With `diagnostics.dynamics`: dσᵢ = uᵢᵀΔW·vᵢ of the weights' four largest singular values,
  /// largest first, and of the four least, least first (NaN beyond their number); and what all of
  /// them do to the entropy of σᵢ/Σσ: positive where the spectrum flattens (arXiv:2606.08388).
  std::array<double, 8> dsigma{};
  double flattening_rate = 0;
  /// With `diagnostics.dual_noise`, of one example's gradient: tr C^½ of its covariance C on the
  /// shorter side, which bounds the noise in the nuclear norm (arXiv:2602.03001). Squared, over
  /// ‖G‖_*², it is the noise scale of spectral rules; of several matrices sums are squared.
  double nuclear_noise = 0;
  /// Where the trainer gives `observe_activation`: ‖A‖_F²/‖A‖_op² of what the parameter multiplied,
  /// over all ranks. The vector of the operator norm takes one step of the power iteration in every
  /// step that looks: from above, close after a few. 0: not known
  /// (yet).
  double activation_rank = 0;
  /// Nuclear rank of the gradient / `activation_rank`, averaged over steps that looked, in logs.
  /// Above 1 the guaranteed decrease of one plain spectral step is larger than of one plain
  /// gradient step, with ideal lengths of both: it says nothing of AdamW, of momentum, of many
  /// steps.
  double spectral_ratio = 0;
  /// What five looks in a row say of it (`studies::GeometryAdvisor`).
  studies::GeometryAdvisor::Advice advice = studies::GeometryAdvisor::Advice::keep;
  /// With `diagnostics.advisor: auto`, which steps in this direction: 0 for polar(M), else the
  /// factor f of f·M. It is ‖M‖_*/‖M‖_F² of the look that it was decided by, so that the decrease
  /// which that momentum promised goes on as it was, η‖M‖_* = ηf‖M‖_F²; from then on steps are as
  /// long as the momentum is.
  double euclidean = 0;
};

/// What one step did.
struct StepReport {
  std::int64_t step = 0;
  bool skipped = false;     ///< a gradient was not finite on some rank; nothing was changed
  std::string skip_reason;  ///< names the parameter and the first rank that saw it
  /// By this rank: payload and control. Equals the plan, less what ScaLAPACK would have sent for
  /// matrices that `diagnostics.advisor: auto` has changed (in block_cyclic).
  std::int64_t bytes_sent = 0;
  std::int64_t messages = 0;
  std::int64_t exceptional_bytes = 0;  ///< beyond the plan, with cause in `skip_reason`
  /// Orthogonalized here; equals the plan, less those that `diagnostics.advisor: auto` has changed.
  std::int64_t matrices = 0;
  std::vector<double> update_rms;     ///< per group, over all ranks, without lr
  std::vector<double> gradient_norm;  ///< per group, before clipping
  double lr_multiplier = 1;
  std::vector<RoundingReport> rounding;  ///< per group
  std::vector<GradientNoise> noise;      ///< per group
  GradientNoise model_noise;
  /// What this rank cannot do as configured, and does otherwise; said once, in the step that showed
  /// it. What a direction could not be made of on some rank, and was made up for: on all ranks.
  /// Mostly empty.
  std::string notice;
  StepTimes ms;
};

/// Bytes of this rank per category, as planned and allocated.
struct MemoryPlan {
  /// The trainer's: values, or codes and scales. With `zero.stage: 3` shards and the working set.
  std::int64_t weights = 0;
  std::int64_t gradients =
      0;                   ///< gradient buffers of the runtime (the trainer's own are not counted)
  std::int64_t state = 0;  ///< optimizer state, master weights included
  std::int64_t work = 0;   ///< buckets in flight and scratch
  [[nodiscard]] std::int64_t total() const { return weights + gradients + state + work; }
};

/// A sharded matrix optimizer. Constructor, `step`, `save` and `load` are collective: every rank of
/// the communicator calls them, with the same configuration and the same parameters in the same
/// order.
class ShardedOptimizer {
 public:
  /// Plans, checks that all ranks were given the same, allocates everything a step needs. Weights
  /// must have their initial values (a master copy is taken here, and weights of a rounded format
  /// are rounded).
  /// @throws ConfigError  no group matches a parameter, two groups contradict, ranks differ
  /// (named).
  /// @param comm  between hosts, whatever the device: MPI. What the devices' buffers travel over is
  /// made of it (`comm.backend`).
  ShardedOptimizer(const Config& config, Communicator comm, std::vector<Parameter> parameters,
                   const DeviceChoice& device = {});
  ShardedOptimizer(ShardedOptimizer&&) noexcept;
  ShardedOptimizer& operator=(ShardedOptimizer&&) noexcept;
  ~ShardedOptimizer();

  [[nodiscard]] int rank() const;
  [[nodiscard]] int size() const;

  /// Starts micro-batch `index` (0-based) of `train.micro_batches`; not needed when there is one.
  /// The gradient is the mean over ranks and micro-batches; momentum and LMO happen only in `step`.
  void micro_batch(std::int64_t index);
  /// Parameter `id` (its position in the list) has its gradient in place: it is taken here, and its
  /// bucket travels as soon as it is full. Any order, and another order on every rank. At most once
  /// per parameter and micro-batch; `step` asks for what is missing. The gradient must stay as it
  /// is until `step` returns or the next `micro_batch` begins. A misuse is reported by `step`, on
  /// all ranks.
  void gradient_ready(int id);
  /// Finishes the reductions, updates, gathers the new weights.
  /// @throws NumericError when `train.max_skipped` steps in a row were skipped; Error when bytes,
  /// messages
  ///         or matrices differ from the plan. All ranks throw together.
  /// The report is valid until the next call.
  const StepReport& step();
  /// Of parameter `id`, when it was measured last.
  [[nodiscard]] const GradientNoise& noise(int id) const;
  /// Of all matrices, when they were looked at last (`StepReport::step` says whether just now).
  /// Empty without `diagnostics.spectra`.
  /// @par Cost  in a step that looks, planned and counted: pieces of gradient, momentum, weights
  /// and update in f32 to one rank per matrix, nothing where a matrix is whole on a rank; there a
  /// Gram matrix of the shorter side k and its eigenvalues in f64, four times 2k²·max flops and
  /// more. Where that is more than `diagnostics.budget_frac` of the run's time, steps that look
  /// become rarer.
  [[nodiscard]] std::span<const MatrixSpectra> spectra() const;
  /// Will the step that gradients are made for now look at matrices?
  [[nodiscard]] bool wants_activations() const;
  /// Hands over what parameter `id`, seen as outputs × inputs, multiplied on this rank in this
  /// step: tokens × inputs, f32 or bf16, of the host; the first `activation_rows` of a call are
  /// looked at, no others. Any number of calls between two steps, of several micro-batches too;
  /// without effect where `wants_activations` is false.
  /// @throws ShapeError  the parameter has other inputs. @par Cost  4·inputs flops per token; its
  /// time is part of `diagnostics.budget_frac`.
  void observe_activation(int id, ConstMatrixView activations);
  static constexpr Index activation_rows = 4096;
  /// With `diagnostics.gns_source: norm_layers`: will the step that gradients are made for now
  /// measure noise?
  [[nodiscard]] bool wants_examples() const;
  /// Hands over the gradients of single examples of parameter `id`, examples × elements, f32, of
  /// the host, each of that example's own loss (not divided by the batch). Any number of calls
  /// between two steps; in all every example of the step on this rank, of each parameter that is
  /// given at all. Its noise then is that between them, known to a batch of one, on a single rank
  /// too: gains of normalization layers have such gradients at hand, and follow the noise of the
  /// whole model (G. Gray et al., NeurIPS 2024). Groups and model are sums over the parameters
  /// given. Without effect where `wants_examples` is false.
  /// @throws ShapeError  other elements; ConfigError, by `step` on all ranks, unequal numbers.
  /// @par Cost  2 flops per element; 8 bytes per parameter more in every step's first all-reduce.
  void observe_examples(int id, ConstMatrixView gradients);
  /// Waits until the weights of `id` are new (with `step` this is so on return).
  void parameter_wait(int id);

  /// Brings the weights of these parameters together, for forward or backward (`zero.stage: 3`;
  /// otherwise they are where they always are, and this does nothing). All ranks gather and release
  /// the same parameters in the same order; what followed last time is fetched ahead. `step`
  /// releases what is still gathered: it would be old.
  /// @throws ConfigError  more than `zero.working_set` bytes would be gathered.
  /// @par Cost  an all-gather of the tensors in their format, several in one message.
  void gather(std::span<const int> ids);
  void release(std::span<const int> ids);
  /// The weights of `id`: `Parameter::weights`, or with `zero.stage: 3` a dense tensor at an
  /// address that never changes, which has them while they are gathered.
  /// Null where the trainer computes with codes.
  [[nodiscard]] void* weights(int id) const;
  /// Codes and scales of `id`: the trainer's, or with `zero.stage: 3` whole ones at an address that
  /// never changes, which are there while they are gathered. Empty where the trainer has weights.
  [[nodiscard]] QuantizedView codes(int id) const;
  /// Copies the weights of `id`, codes · scales if they are that (with `zero.stage: 3` while they
  /// are gathered; of a sharded parameter this rank's part), densely and in their dtype, to memory
  /// of the host.
  void copy_weights(int id, void* to) const;

  /// The number of steps taken (skipped ones included).
  [[nodiscard]] std::int64_t steps() const;
  /// Multiplies the rate of every group from the next step on (1 at start), beside the schedule.
  void set_lr_multiplier(double factor);

  /// Writes a checkpoint directory: `directory` appears whole or not at all. It loads on any number
  /// of ranks. `user` is kept in the manifest (data cursor, …).
  void save(const std::string& directory, const std::map<std::string, std::string>& user = {});
  /// Restores weights, state and step. @return what `save` was given as `user`.
  /// @param convert  Weights of another format or `weights.residual` are taken, too: the most exact
  /// that the checkpoint has of them (masters, missing bits, else codes · scales), rounded to the
  /// nearest as the constructor does. The rule and its state must be the same.
  /// @throws DataError damaged; ConfigError all differences between the checkpoint's model and this
  /// one.
  std::map<std::string, std::string> load(const std::string& directory, bool convert = false);

  [[nodiscard]] MemoryPlan memory() const;
  [[nodiscard]] std::string plan_hash() const;
  /// The plan as JSON (spec of `orthrus plan --json`).
  [[nodiscard]] std::string plan_json() const;
  /// All state in full on rank 0: "state/<name>/<key>" → f32 values in the parameter's row-major
  /// order (empty elsewhere). Collective; counted as setup traffic.
  struct StateTensor {
    std::vector<Index> shape;
    std::vector<float> values;
  };
  [[nodiscard]] std::map<std::string, StateTensor> gather_state();
  /// Quantized weights as they travel: name → codes and scales of the whole parameter, on rank 0
  /// (empty elsewhere). Collective; counted as setup traffic.
  struct CodesTensor {
    Grid grid;
    Index rows = 0, cols = 0;      ///< scales are of rows of so many weights
    std::vector<std::byte> codes;  ///< rows of `code_pitch(grid.format, cols)` bytes
    std::vector<float> scales;     ///< `scale_rows` × `scale_cols`
  };
  [[nodiscard]] std::map<std::string, CodesTensor> gather_codes();

  struct Impl;
  /// Ours: for tests that bring a device of their own.
  explicit ShardedOptimizer(std::unique_ptr<Impl> impl);

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace orthrus
