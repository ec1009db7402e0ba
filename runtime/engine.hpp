#pragma once
/// @file
/// What a ShardedOptimizer holds. `step.cpp` walks it, `checkpoint.cpp` saves it.

#include <algorithm>
#include <array>
#include <memory>
#include <orthrus/error.hpp>
#include <orthrus/sharded_optimizer.hpp>
#include <string>
#include <vector>

#include "comm/mesh.hpp"
#include "comm/process_grid.hpp"
#include "kernels/backend.hpp"
#include "kernels/carve.hpp"
#include "optim/block_cyclic_msign.hpp"
#include "optim/block_cyclic_root.hpp"
#include "optim/matrix_function.hpp"
#include "runtime/arena.hpp"
#include "runtime/bucket.hpp"
#include "runtime/clock.hpp"
#include "runtime/device.hpp"
#include "runtime/meeting.hpp"
#include "runtime/mirrors.hpp"
#include "runtime/plan.hpp"
#include "runtime/probing.hpp"
#include "runtime/rounding.hpp"
#include "runtime/working_set.hpp"

namespace orthrus::runtime {

struct Manifest;

/// A segment this rank updates, with its state.
struct OwnSegment {
  Segment segment;
  std::size_t bucket = 0;
  int group = 0;
  Index rows = 1, cols = 0;   ///< its shape
  Index offset_in_part = 0;   ///< where its gradient is
  Index meeting_offset = 0;   ///< where it lies among what meets
  Index kept = 0;             ///< where its weights wait to be rounded together…
  Index shared_scale = -1;    ///< …and its first scale among those that ranks share
  std::size_t undo = 0;       ///< …and, of a matrix of its own, what undoes its direction
  Region here;                ///< of held parameters: in the trainer's buffers
  Index norm_slot = 0;        ///< the first of its sums of squares among the plan's
  bool keeps_lines = false;   ///< the state per line of its matrix is here…
  bool saves_runs = false;    ///< …a run of it (`is_dealt`) is written from here…
  bool saves_lines = false;   ///< …and written from here
  bool updated = false;       ///< in this step
  double update_squares = 0;  ///< Σ U²
  /// In the order of the rule's `state()`. A compressed momentum as it rests: bf16, or the codes of
  /// a piece of `Group::momentum`, as bytes, with their scales behind them.
  std::vector<MatrixView> state;
  MatrixView master;  ///< f32 weights; empty without
  MatrixView low;     ///< the bits that bf16 weights have not, 16 each (as bf16); empty without
  MatrixView scales;  ///< of codes, where the trainer has their values; empty without

  [[nodiscard]] const Region& region() const { return segment.region; }
  [[nodiscard]] Index size() const { return segment.size(); }
};

/// The shape of a state tensor of `own`: of its piece, or per line of its matrix.
Region state_region(const Plan& plan, const OwnSegment& own, const optim::StateSpec& spec);
/// What of a state of its matrix `own` has, among those of its parameter's matrices…
Region lines_region(const Plan& plan, const OwnSegment& own, const optim::StateSpec& spec);
/// …and whether it is written from here: what several ranks keep alike is on one of them.
bool saves_state(const Plan& plan, const OwnSegment& own, const optim::StateSpec& spec);

/// A block of a segment.
struct Panel {
  Index row = 0, rows = 0, col = 0, cols = 0;
};
/// That block of a view as large as the segment.
inline MatrixView block(const MatrixView& v, const Panel& p) {
  return kernels::part(v, p.row, p.rows, p.col, p.cols);
}

/// The state of a panel, as rules take it: no allocation. `Impl::open_state` makes it.
class StateViews {
 public:
  /// @param opened  a compressed momentum in f32; else empty.
  StateViews(const OwnSegment& own, const Panel& panel, MatrixView opened)
      : count_(own.state.size()) {
    for (std::size_t k = 0; k < count_; ++k) {
      const MatrixView& v = own.state[k];
      const bool elements = v.rows == own.rows && v.cols == own.cols;
      views_[k] = elements ? block(v, panel) : v;
    }
    if (opened.data != nullptr) views_[0] = opened;
  }
  [[nodiscard]] std::span<const MatrixView> views() const { return {views_.data(), count_}; }
  [[nodiscard]] MatrixView momentum() const { return views_[0]; }

 private:
  std::array<MatrixView, 8> views_;
  std::size_t count_;
};

/// Cuts buffers off the front of scratch that the plan has measured.
class Carver {
 public:
  explicit Carver(std::span<std::byte> scratch) : rest_(scratch) {}
  std::span<std::byte> take(std::size_t bytes) {
    expects(bytes <= rest_.size(), "the plan has measured less scratch than is used");
    const auto piece = rest_.first(bytes);
    rest_ = rest_.subspan(std::min(rest_.size(), Arena::rounded(bytes)));
    return piece;
  }
  MatrixView matrix(Index rows, Index cols) {
    return {take(static_cast<std::size_t>(rows * cols) * 4).data(), rows, cols, cols, DType::f32};
  }
  [[nodiscard]] std::span<std::byte> rest() const { return rest_; }

 private:
  std::span<std::byte> rest_;
};

/// f(panel) for runs of lines of `own`, each of at most `elements` elements.
template <class F>
void for_each_panel(const OwnSegment& own, bool columns, Index elements, F&& f) {
  const Index lines = columns ? own.cols : own.rows;
  const Index width =
      std::max<Index>(1, elements / std::max<Index>(1, columns ? own.rows : own.cols));
  for (Index at = 0; at < lines; at += width) {
    const Index n = std::min(width, lines - at);
    f(columns ? Panel{0, own.rows, at, n} : Panel{at, n, 0, own.cols});
  }
}

constexpr Panel whole(const OwnSegment& own) { return {0, own.rows, 0, own.cols}; }

/// Rounding of a compressed momentum in a step: each draws bits of its own.
enum class Rounded : std::uint8_t { weights, update, correction };

/// The block of a matrix that a region of its parameter is.
inline MatrixView place_of(const Region& piece, const MatrixPlan& m, MatrixView whole) {
  const Index from = piece.first - m.region.first;
  return block(whole, {from / m.region.distance, piece.rows, from % m.region.distance, piece.cols});
}

// Of a meeting's buffers.
inline MatrixView dense(std::span<std::byte> bytes, Index offset, Index rows, Index cols,
                        DType dtype) {
  return {bytes.data() + static_cast<std::size_t>(offset) * bytes_of(dtype), rows, cols, cols,
          dtype};
}
inline float* floats(std::span<std::byte> bytes, Index offset) {
  return reinterpret_cast<float*>(bytes.data()) + offset;
}

}  // namespace orthrus::runtime

namespace orthrus {

struct ShardedOptimizer::Impl {
  Impl(const Config& config, Communicator comm, std::vector<Parameter> parameters,
       const DeviceChoice& device = {}, const runtime::OpenSeat& open = runtime::open_seat);
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl();

  void gradient_ready(int id);
  const StepReport& step();
  [[nodiscard]] const GradientNoise& noise(int id) const;
  [[nodiscard]] std::span<const MatrixSpectra> spectra() const { return looking_.results; }
  [[nodiscard]] bool looks_in(std::int64_t step) const;
  [[nodiscard]] bool wants_activations() const { return looks_in(steps_ + 1); }
  void observe_activation(int id, ConstMatrixView activations);
  [[nodiscard]] bool wants_examples() const {
    return plan_.noise_of_examples && is_noise_step(steps_ + 1);
  }
  void observe_examples(int id, ConstMatrixView gradients);
  void set_lr_multiplier(double factor);
  void save(const std::string& directory, const std::map<std::string, std::string>& user);
  std::map<std::string, std::string> load(const std::string& directory, bool convert);
  std::map<std::string, StateTensor> gather_state();
  std::map<std::string, CodesTensor> gather_codes();
  void gather_weights(std::span<const int> ids);
  void release_weights(std::span<const int> ids);
  void copy_weights(int id, void* to);
  [[nodiscard]] QuantizedView codes(int id) const;
  void copy_values(const QuantizedView& codes, std::size_t parameter, void* to);

  /// The segments of one rank, without state.
  [[nodiscard]] std::vector<runtime::OwnSegment> segments_of(int world_rank) const;

  Config config_;
  std::vector<Parameter> parameters_;
  std::unique_ptr<kernels::Backend> backend_;
  Mesh mesh_;  ///< for buffers of the device
  /// Numbers of the host travel between the same ranks and the same replicas: over these where the
  /// mesh's communicators do not carry them.
  struct Numbers {
    Communicator world, shard, replicate;
  };
  std::optional<Numbers> numbers_;
  /// For what happens between steps (save, load, gather_state): it never meets a bucket on its way,
  /// and waits longer than a step does.
  Communicator setup_;
  runtime::Plan plan_;
  std::unique_ptr<runtime::Mirrors> mirrors_;

  runtime::Arena state_arena_, work_arena_;
  std::vector<runtime::OwnSegment> own_;  ///< ascending bucket, then offset
  std::vector<std::size_t> first_own_;    ///< of each bucket, and the end
  std::span<std::byte> scratch_, widened_, narrowed_;
  std::vector<runtime::Rounding> roundings_;  ///< per bucket; empty where nothing is shared
  std::span<std::byte> rounding_;             ///< of the bucket that is being completed
  std::vector<double> norms_;                 ///< ‖C‖², ‖M‖² of its matrices
  std::unique_ptr<double[]> control_;         ///< what the control messages carry: the host's
  struct WeightSlot {
    std::span<std::byte> bytes;
    Request request;
    int bucket = -1;
    std::size_t level = 0;  ///< levels it still has to cross
  };
  std::array<WeightSlot, runtime::weight_slots> weight_slots_;
  /// A bucket's meeting on its way.
  struct MeetingState {
    std::span<std::byte> mine, theirs, back;  ///< back: where what comes back is
    std::span<std::byte> undo;                ///< ECO: of the directions it made
    Request request;
    std::size_t computed = 0;  ///< of its matrices, those this rank has done or need not do
    double scale = 0;          ///< of shared terms: `Lmo::gram_terms`
  };
  std::vector<runtime::Meeting> meetings_;    ///< per bucket
  std::vector<MeetingState> meeting_states_;  ///< per bucket
  std::vector<std::size_t> under_way_;        ///< buckets whose request is not waited for yet
  std::vector<std::size_t> owed_;  ///< buckets that have arrived and have matrices to compute
  std::size_t first_owed_ = 0;     ///< those before it have none left
  std::unique_ptr<comm::ProcessGrid> grid_;               ///< where a bucket is block_cyclic
  std::map<int, optim::BlockCyclicMsign> grid_matrices_;  ///< by matrix
  std::map<int, optim::BlockCyclicRoot> grid_roots_;      ///< of others
  /// Per bound slot: no less than the momentum's norm; of a compressed one than any of its entries,
  /// as rounding may make norms larger, but no entry than that (`bound_at_rest`).
  std::vector<double> bounds_;
  std::unique_ptr<runtime::GradientBuckets> gradients_;
  std::vector<Communicator> weight_levels_;           ///< ZeRO-3: of the shard group, for gathers
  std::unique_ptr<runtime::WorkingSet> working_set_;  ///< ZeRO-3: where weights rest

  std::int64_t steps_ = 0;    ///< taken, skipped ones included
  std::int64_t updates_ = 0;  ///< not skipped
  std::int64_t skipped_in_a_row_ = 0;
  double lr_multiplier_ = 1;
  StepReport report_;
  std::string notice_;     ///< for the next report
  bool noticed_ = false;   ///< that a sequence could not be recorded
  std::string problem_;    ///< with a direction, in this step on this rank
  bool is_fatal_ = false;  ///< it ends the run
  std::vector<double> elements_of_group_, clip_, lr_, weight_decay_;  ///< per group
  // ECO, per group.
  std::vector<optim::Kappa> kappa_kind_;
  std::vector<std::vector<double>> schedule_kappas_;  ///< of every step, where all are asked for
  std::vector<double> kappa_;                         ///< of this step; 0: nothing is pulled back
  std::vector<std::vector<runtime::Plan::Cut>> weight_cuts_;  ///< per bucket and level
  /// What rounding did in this step, in sums over this rank's segments of a group; then over all.
  struct Measured {
    double residual = 0, weights = 0, elements = 0, scales = 0, correction = 0, momentum = 0,
           beyond = 0;
  };
  static_assert(sizeof(Measured) == runtime::Plan::rounding_sums * sizeof(double));
  Measured not_counted_;               ///< what another replica measures, too
  bool measures_ = false;              ///< in this step: `telemetry.every_steps`
  std::vector<double> local_squares_;  ///< per parameter: of this rank's gradients, where measured
  /// Per parameter: of this rank's single examples, and how many there were.
  std::vector<double> example_squares_, example_counts_;
  std::vector<GradientNoise> noise_;  ///< per parameter
  struct NoiseSums {
    double q = 0, r = 0, measured = 0, all = 0;
  };
  std::vector<NoiseSums> group_sums_;  ///< over parameters
  /// `diagnostics.spectra`: spectra.cpp.
  struct Looking {
    std::vector<std::array<runtime::ProbeMeeting, runtime::probes.size()>>
        meetings;  ///< per bucket
    std::span<std::byte> send, receive;
    std::vector<float> before;  ///< this rank's weights before the step
    /// Of the matrices it is the analyst of: the gradient, and what else is looked at now.
    std::vector<std::vector<float>> gradients, wholes, weights;  ///< weights: for dynamics
    std::vector<double> table;                                   ///< what all ranks get of them
    /// Of a parameter that is looked at: what its activations came to in this step — Σ (aᵀv)a and
    /// Σ‖a‖², or, before there is a v, Σ a — and that vector, of length 1.
    struct Activation {
      std::vector<double> sum;
      std::vector<float> vector;  ///< f32, so that checkpoints keep it as it is
      double squares = 0;
    };
    std::vector<Activation> activations;  ///< per parameter; empty where it is not looked at
    bool observed = false;                ///< any, since the last step
    std::vector<studies::GeometryAdvisor> advisors;  ///< per matrix
    std::vector<runtime::NoiseMeeting> noise;        ///< per bucket: `diagnostics.dual_noise`
    std::span<std::byte> noise_room;
    runtime::ProbeTable places;
    std::vector<MatrixSpectra> results;
    std::int64_t next = 0;             ///< no step before it looks
    runtime::Clock::time_point since;  ///< when the step after the last that looked began…
    std::int64_t since_step = 0;       ///< …and how many there had been
    double observing_ms = 0;           ///< in `observe_activation`, since the last look
    double allowance_s = 0;            ///< that a look may take beyond a step
    bool now = false;                  ///< in this step
  };
  Looking looking_;
  std::array<double, 9> recent_ms_{};
  double deadline_s_ = 0;
  std::vector<double> euclidean_;  ///< per matrix of the plan: `MatrixSpectra::euclidean`
  bool in_step_ = false;           ///< also after a step that failed midway: no other follows it
  std::int64_t replica_check_every_ = 0;
  bool poisons_ = false;  ///< `checks: collective`: what is free is filled with NaN

 private:
  void walk();
  void check_between_steps(const char* what);
  void check_buffers_apart() const;
  void allocate();
  void place_meetings(std::span<std::byte> arena);
  void place_rounding(std::size_t bucket);
  /// All calls that may be on their way.
  template <class F>
  void for_each_request(F&& f) {
    if (gradients_) gradients_->for_each_request(f);
    for (MeetingState& state : meeting_states_) f(state.request);
    for (WeightSlot& slot : weight_slots_) f(slot.request);
    if (working_set_) working_set_->for_each_request(f);
  }
  // The walk, in order.
  [[nodiscard]] bool is_noise_step(std::int64_t step) const;
  void measure_noise_of(std::int64_t step);
  void put_squares(double* sums);
  [[nodiscard]] std::string uneven_examples(const double* sums) const;
  void take_noise(const double* sums);
  void save_noise(runtime::Manifest& m) const;
  void load_noise(const runtime::Manifest& m);
  bool agree_to_go_on();
  // spectra.cpp
  /// Examples behind each gradient that a mean is made of.
  [[nodiscard]] double examples_each() const;
  void prepare_to_look();
  void look_before_update();
  void look_after_update();
  void look(runtime::Probe what);
  void describe(std::size_t matrix, runtime::Probe what);
  void look_at_noise();
  void look_at_squares(std::size_t bucket);
  void look_at_grams(std::size_t bucket);
  void load_own_gradient(int parameter, const Region& region, float* to);
  void take_dual_noise();
  void take_activations();
  std::vector<float>& whole_of(runtime::Probe what, std::size_t i);
  void describe_dynamics(std::size_t i);
  void forget_activations();
  void share_spectra();
  // geometry.cpp
  [[nodiscard]] bool chooses_in(std::int64_t step) const;
  [[nodiscard]] double euclidean_of(const runtime::MatrixPlan& m) const;
  [[nodiscard]] double scaled_euclidean_of(const runtime::MatrixPlan& m) const;
  void choose_geometry();
  void save_geometry(runtime::Manifest& m) const;
  void load_geometry(const runtime::Manifest& m);
  void note_advice(std::size_t probed, studies::GeometryAdvisor::Advice advice);
  void add_notice(const std::string& what);
  void take_turn(runtime::Turn turn);
  void depart(std::size_t bucket);  ///< 3, and the way out of 4
  void arrive(std::size_t bucket);
  void compute(std::size_t bucket);    ///< 5 of what this rank computes, if it has not
  void send_back(std::size_t bucket);  ///< the way back of 4
  void complete(std::size_t bucket);   ///< 6 to 8; all of it where nothing meets
  void gather(std::size_t bucket, WeightSlot& slot);
  void gather_level(WeightSlot& slot);
  void deliver(WeightSlot& slot);
  // meet.cpp
  [[nodiscard]] bool meets(std::size_t bucket) const;
  [[nodiscard]] std::span<runtime::OwnSegment> segments(std::size_t bucket);
  void start(std::size_t bucket, Request request);
  /// @param brief  what it may do meanwhile: nothing that takes long
  void wait_for(std::size_t bucket, bool brief, const char* what);
  void progress();
  [[nodiscard]] std::span<const MatrixView> state_of(std::size_t bucket, int matrix);
  /// X of a panel, Y, and both as they are stacked.
  struct Stacked {
    MatrixView x, y, z;
  };
  /// Of an X that is rows×cols.
  static Stacked parts_of(MatrixView z, optim::Stack stack, Index rows, Index cols);
  static Stacked stack_panel(const runtime::MatrixPlan& m, const runtime::Panel& panel,
                             runtime::Carver& carver);
  /// Of a whole piece: Z where it rests, or the directions that take its place.
  [[nodiscard]] Stacked stacked_piece(const runtime::OwnSegment& own,
                                      std::span<std::byte> pieces) const;
  void load_stacked(const runtime::OwnSegment& own, const runtime::MatrixPlan& m,
                    const runtime::Panel& panel, const Stacked& to, bool joins,
                    runtime::Carver scratch);
  void send_pieces(std::size_t bucket);
  void compute_whole(std::size_t bucket, const runtime::Meeting::Matrix& entry);
  void compute_on_grid(std::size_t bucket);
  void root_on_grid(const runtime::MatrixPlan& m, float* x, const float* g,
                    std::span<const MatrixView> state);
  void send_grams(std::size_t bucket);
  void compute_polynomial(std::size_t bucket, const runtime::Meeting::Matrix& entry);
  void compute_terms(std::size_t bucket, const runtime::Meeting::Matrix& entry);
  bool whole_matrix(const runtime::MatrixPlan& m, const optim::Whole& whole,
                    const optim::Undo* undo, std::span<std::byte> work);
  [[nodiscard]] void* made_at(std::size_t bucket, Index offset);
  void note_problem(const runtime::MatrixPlan& m, std::string_view what, bool is_fatal = false);
  void sum_terms(std::size_t b);
  [[nodiscard]] Index first_back(const runtime::Meeting& meeting) const;
  bool compute_next(std::size_t bucket);
  void iterate_grams(std::size_t bucket);
  void add_gram(const runtime::MatrixPlan& m, MatrixView x, bool add, MatrixView r,
                runtime::Carver scratch);
  [[nodiscard]] int gram_exponent(const runtime::MatrixPlan& m) const;
  double finish_piece(runtime::OwnSegment& own);
  double finish_gram(runtime::OwnSegment& own);
  // One segment, whatever the mode.
  void update(runtime::OwnSegment& own);
  double update_here(runtime::OwnSegment& own);
  bool run_ahead(bool brief);
  void wait_ahead(Request& request, bool brief = false);
  template <class F>
  void for_each_block(const runtime::OwnSegment& own, F&& f);
  [[nodiscard]] static Region region_of(const runtime::OwnSegment& own,
                                        const runtime::Panel& panel);
  double apply(const runtime::OwnSegment& own, MatrixView direction);
  [[nodiscard]] const Parameter& parameter_of(const runtime::OwnSegment& own) const {
    return parameters_[static_cast<std::size_t>(own.segment.parameter)];
  }
  /// Are the weights of a bucket updated where they rest, and not gathered for the trainer?
  [[nodiscard]] bool rests(const runtime::Bucket& b) const {
    return b.held || plan_.weights_sharded();
  }
  /// Levels that new weights cross within a step.
  [[nodiscard]] std::size_t lowest_level() const {
    return plan_.weights_sharded() ? plan_.shard_levels() : 0;
  }
  /// What of parameter i the trainer has on this rank.
  [[nodiscard]] Region region_here(std::size_t i) const {
    const runtime::ParameterShape& p = plan_.parameters[i];
    if (p.held()) return p.part(mesh_.shard.rank(), plan_.shard);
    return {0, 1, p.size(), p.size()};
  }
  /// Is this rank the one that counts `own` in sums over all ranks?
  [[nodiscard]] bool counts(const runtime::OwnSegment& own) const {
    return !plan_.buckets[own.bucket].held || mesh_.replicate.rank() == 0;
  }
  [[nodiscard]] optim::StepScalars scalars_of(std::size_t group) const;
  [[nodiscard]] optim::StepScalars scalars_of(const runtime::OwnSegment& own) const {
    return scalars_of(static_cast<std::size_t>(own.group));
  }
  [[nodiscard]] optim::StepScalars scalars_of(const runtime::MatrixPlan& m) const {
    return scalars_of(
        static_cast<std::size_t>(plan_.group_of[static_cast<std::size_t>(m.parameter)]));
  }
  [[nodiscard]] MatrixView gradient_of(const runtime::OwnSegment& own);
  void load_gradient(const runtime::OwnSegment& own, const runtime::Panel& panel, MatrixView to);
  // momentum.cpp
  template <class F>
  void for_each_opened(const runtime::OwnSegment& own, const runtime::Panel& panel, F&& f);
  [[nodiscard]] runtime::StateViews open_state(const runtime::OwnSegment& own,
                                               const runtime::Panel& panel,
                                               runtime::Carver& carver);
  void reopen_state(const runtime::OwnSegment& own, const runtime::Panel& panel,
                    const runtime::StateViews& state);
  void close_state(const runtime::OwnSegment& own, const runtime::Panel& panel,
                   const runtime::StateViews& state, runtime::Rounded why);
  void open_momentum(const runtime::OwnSegment& own, const runtime::Panel& panel, MatrixView to);
  void round_momentum(const runtime::OwnSegment& own, const runtime::Panel& panel, MatrixView wide,
                      const kernels::Rounding& rounding);
  void restore_momentum(const runtime::OwnSegment& own, MatrixView wide, bool with_scales);
  void accumulate(const runtime::OwnSegment& own, const runtime::Panel& panel, MatrixView x,
                  bool stores, runtime::Carver scratch);
  void query(const runtime::OwnSegment& own, const runtime::Panel& panel, MatrixView x,
             runtime::Carver scratch);
  [[nodiscard]] double momentum_squares(const runtime::OwnSegment& own, runtime::Carver scratch);
  void add_to_momentum(const runtime::OwnSegment& own, double factor, MatrixView correction,
                       runtime::Carver scratch);
  // weights.cpp
  [[nodiscard]] MatrixView weights_of(const runtime::OwnSegment& own);
  [[nodiscard]] QuantizedView codes_of(const runtime::OwnSegment& own);
  [[nodiscard]] QuantizedView trainers_codes(std::size_t parameter) const;
  [[nodiscard]] QuantizedView trainers_codes(std::size_t parameter, const Region& region) const;
  void check_trainers_codes(std::size_t parameter);
  [[nodiscard]] MatrixView trainers_weights(const runtime::OwnSegment& own,
                                            const runtime::Panel& panel);
  void read_trainer(const runtime::OwnSegment& own, const runtime::Panel& panel, MatrixView to);
  [[nodiscard]] MatrixView open_weights(const runtime::OwnSegment& own,
                                        const runtime::Panel& panel);
  [[nodiscard]] kernels::Rounding rounding_of(
      const runtime::OwnSegment& own, const runtime::Panel& panel,
      runtime::Rounded what = runtime::Rounded::weights) const;
  void round_to_bf16(MatrixView wide, MatrixView to, const kernels::Rounding& rounding);
  MatrixView close_weights(const runtime::OwnSegment& own, const runtime::Panel& panel,
                           MatrixView wide);
  MatrixView close_codes(const runtime::OwnSegment& own, const runtime::Panel& panel,
                         MatrixView wide);
  void find_scales(const runtime::OwnSegment& own, const runtime::Panel& panel, ConstMatrixView w,
                   MatrixView scales);
  [[nodiscard]] QuantizedView beside(const runtime::OwnSegment& own, const runtime::Panel& panel);
  void write_piece(const runtime::OwnSegment& own, void* piece);
  void read_weights(const runtime::OwnSegment& own, MatrixView to);
  /// All weights of a parameter, wherever they come from.
  struct WholeWeights {
    const runtime::ParameterShape* shape;
    const void* data;  ///< null: they are codes
    DType dtype;
    QuantizedView codes;  ///< only read
  };
  [[nodiscard]] WholeWeights trainers_own(std::size_t parameter) const;
  void keep_beside(runtime::OwnSegment& own, const WholeWeights& from);
  void round_piece(const runtime::Bucket& bucket, const runtime::Segment& s,
                   const WholeWeights& whole, void* piece);
  void round_codes(const Grid& grid, const runtime::Segment& s, const WholeWeights& whole,
                   QuantizedView codes);
  void round_segment(std::size_t bucket, const runtime::Segment& s, const WholeWeights& whole);
  void adopt_weights(std::size_t parameter, const void* values);
  void store_weights();
  void round_held();
  void round_weights();
  // ECO
  void find_kappas();
  [[nodiscard]] double kappa_of(const runtime::MatrixPlan& m) const {
    return kappa_[static_cast<std::size_t>(plan_.group_of[static_cast<std::size_t>(m.parameter)])];
  }
  void pull_back(const runtime::OwnSegment& own, const optim::ElementwiseRule& rule,
                 const optim::Piece& piece, const optim::StepScalars& s);
  void pull_back(const runtime::OwnSegment& own, const optim::Undo& undo, MatrixView residual,
                 std::span<std::byte> work);
  static double guard(const runtime::Group& group, double correction, double momentum);
  // Line 7 where it concerns several ranks: round.cpp
  [[nodiscard]] bool rounds_together(const runtime::OwnSegment& own) const {
    return plan_.buckets[own.bucket].rounds_together;
  }
  struct RoundingBuffers {
    float *pieces, *scales, *triangles;
    std::span<std::byte> undo;
  };
  [[nodiscard]] RoundingBuffers rounding_buffers(std::size_t bucket) const;
  [[nodiscard]] MatrixView kept(const runtime::OwnSegment& own) const;
  [[nodiscard]] MatrixView shared_scales(const runtime::OwnSegment& own) const;
  [[nodiscard]] std::span<std::byte> own_undo(const runtime::OwnSegment& own) const;
  void round_together(std::size_t bucket);
  void share_scales(std::size_t bucket);
  void round_kept(const runtime::OwnSegment& own);
  void undo_at_owners(std::size_t bucket);
  [[nodiscard]] bool has_piece(std::size_t bucket, int matrix);
  void undo_whole(std::size_t bucket, const runtime::Meeting::Matrix& entry);
  void sum_roots(std::size_t bucket);
  void undo_pieces(std::size_t bucket);
  void undo_own(const runtime::OwnSegment& own);
  void add_corrections(std::size_t bucket);
  [[nodiscard]] std::size_t correction_bytes(const runtime::OwnSegment& own) const;
  void measure_rounding(const runtime::OwnSegment& own, MatrixView w, const Grid& grid,
                        MatrixView scales);
  [[nodiscard]] Measured& measured(const runtime::OwnSegment& own) {
    if (!counts(own)) return not_counted_;
    const Index first = plan_.rounding_slot[static_cast<std::size_t>(own.group)];
    return *reinterpret_cast<Measured*>(control_.get() + first);
  }
  /// η of a group in step t, without the multiplier.
  [[nodiscard]] double lr_at(std::size_t group, std::int64_t t) const;
  double apply(const runtime::OwnSegment& own, const runtime::Panel& panel, MatrixView direction);
  void audit(const Traffic& before);
  void share_problems();
  void report_rounding(const double* sums);
  void compare_replicas();
  [[nodiscard]] std::string off_grid();
  [[nodiscard]] std::uint64_t hash_of_weights(std::size_t parameter);
  [[nodiscard]] std::uint64_t hash_of_store(std::size_t bucket);
  [[nodiscard]] std::uint64_t hash_of(const void* memory, std::size_t bytes);
  void set_deadline();
  /// Every communicator that steps talk on. @param self  *this, const or not.
  template <class Self, class F>
  static void for_each_communicator(Self& self, F&& f) {
    f(self.mesh_.world), f(self.mesh_.shard), f(self.mesh_.replicate);
    if (self.mesh_.spans_nodes()) f(self.mesh_.node), f(self.mesh_.across);
    if (self.numbers_) {
      f(self.numbers_->world), f(self.numbers_->shard), f(self.numbers_->replicate);
    }
    for (auto& level : self.weight_levels_) f(level);
  }
  /// On a device calls of all communicators have one order: what can be reduced is, first.
  void settle_order() {
    if (mesh_.world.on_device()) gradients_->settle();
  }
  /// Between all ranks, for numbers.
  [[nodiscard]] Communicator& all_ranks() { return numbers_ ? numbers_->world : mesh_.world; }
  void poison(std::span<std::byte> free) { runtime::poison(free, *backend_); }
  /// This rank's elements of parameter i.
  [[nodiscard]] Index size_here(std::size_t i) const { return region_here(i).size(); }
  void find_bounds();
  void open_grid();
  [[nodiscard]] Traffic traffic(TrafficClass c) const;
  [[nodiscard]] Traffic planned_traffic() const;
  Traffic step_began_;         ///< what had been sent before this step's first bucket
  std::int64_t matrices_ = 0;  ///< orthogonalized in this step
  std::int64_t spared_ = 0;    ///< and not, as their steps are Euclidean…
  Traffic spared_sent_;        ///< …nor sent for that
  std::size_t gathered_ = 0;   ///< buckets whose new weights have left in this step
  std::size_t ahead_ = 0;      ///< segments before this one need not be looked at again
};

/// f(part) for runs of rows of `panel` in which a compressed momentum is opened; for all of it
/// where it is f32. What is rounded does not depend on how `panel` is cut.
template <class F>
void ShardedOptimizer::Impl::for_each_opened(const runtime::OwnSegment& own,
                                             const runtime::Panel& panel, F&& f) {
  Index rows = panel.rows;
  if (plan_.groups[static_cast<std::size_t>(own.group)].compresses()) {
    rows = std::max<Index>(1, runtime::opened_at_a_time(plan_) / std::max<Index>(panel.cols, 1));
  }
  for (Index r = 0; r < panel.rows; r += rows) {
    f(runtime::Panel{panel.row + r, std::min(rows, panel.rows - r), panel.col, panel.cols});
  }
}

/// f(panel) for blocks of at most `panel_elements` elements: whole rows, if one fits.
template <class F>
void ShardedOptimizer::Impl::for_each_block(const runtime::OwnSegment& own, F&& f) {
  // What is rounded by rows, whatever the panels it was updated in.
  const Index most = rounds_together(own)
                         ? runtime::rows_panel_elements(plan_, own.segment)
                         : runtime::panel_elements(plan_, plan_.buckets[own.bucket], own.segment);
  const Index rows = std::max<Index>(1, std::min(own.rows, most / own.cols));
  const Index cols = std::min(own.cols, most);
  for (Index r = 0; r < own.rows; r += rows) {
    for (Index c = 0; c < own.cols; c += cols) {
      f(runtime::Panel{r, std::min(rows, own.rows - r), c, std::min(cols, own.cols - c)});
    }
  }
}

}  // namespace orthrus
