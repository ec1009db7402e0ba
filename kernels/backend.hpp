#pragma once
/// @file
/// Backend: the verbs of one device. Everything above is written on them.
///
/// Views are row-major. Unless a verb says otherwise: f32, bf16 and f64 are accepted, all views of
/// one call share one dtype, bf16 is computed in f32 and rounded once at the end, scalars arrive in
/// double and are rounded once to the compute type, outputs may alias inputs only when the doc says
/// so, and an empty view is legal and does nothing. Results depend on values and shapes only: never
/// on pointer alignment, on what else runs, or on how a caller batched its calls. Element-wise
/// verbs contract no product with a sum. Shape or dtype mismatch throws `ShapeError`. No verb
/// allocates after the first call with the same shapes (oneDNN, inside itself, does). A backend
/// keeps buffers and compiled products: one object serves one thread at a time.
///
/// Pointers are the device's. Verbs enter `stream()` and return; those that return a number wait
/// for that stream, and for nothing else.

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <orthrus/quantized.hpp>
#include <orthrus/stream.hpp>
#include <orthrus/view.hpp>
#include <string_view>
#include <type_traits>
#include <vector>

#include "kernels/norm.hpp"

namespace orthrus::kernels {

enum class Transpose : bool { no, yes };

/// The scalars of one AdamW step t (Loshchilov & Hutter, arXiv:1711.05101).
struct AdamWScalars {
  double lr = 0, weight_decay = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  /// 1 − β₁ᵗ and 1 − β₂ᵗ, computed in double.
  double bias_correction1 = 1, bias_correction2 = 1;
  /// false: √(v₂/c₂) + ε (torch); true: (√v₂ + ε)/√c₂ (Moonlight).
  bool eps_before_correction = false;
};

/// How `Backend::quantize` rounds. The default: to nearest, ties to even.
struct Rounding {
  bool stochastic = false;
  std::uint64_t seed = 0, stream_id = 0, step = 0;
  /// Entry (i, j) is element first_element + i·row_distance + j of the parameter. Stochastic: it
  /// draws word `element mod 4` of `random_words(seed, stream_id, step, element / 4)`, and of that
  /// the upper 24 bits, as u in [0, 1). The layout is for ever.
  Index first_element = 0, row_distance = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  [[nodiscard]] virtual std::string_view name() const = 0;
  /// The queue all verbs of this object enter.
  [[nodiscard]] virtual Stream stream() const { return {}; }

  // ---- memory ---------------------------------------------------------------------------------
  /// May the host follow this device's pointers?
  [[nodiscard]] virtual bool on_host() const = 0;
  /// Memory of this device that starts at a multiple of 256 bytes; its content is not defined.
  /// nullptr for no bytes. @throws DeviceError  there is not that much.
  [[nodiscard]] virtual void* allocate(std::size_t bytes) = 0;
  /// What is queued is done first. `DeviceBuffer` (device_memory.hpp) calls it.
  virtual void deallocate(void* memory) noexcept = 0;
  /// Copies between this device and the host, or within either: both pointers may be of either
  /// kind, the ranges do not overlap. Enters the stream: host memory is read, or ready, only after
  /// `wait()`.
  virtual void copy(const void* from, void* to, std::size_t bytes) = 0;
  /// Returns when all that this object has queued is done. @throws DeviceError  a verb failed.
  virtual void wait() = 0;
  /// Addresses for `bytes` bytes, a multiple of a page, that have no memory until `back` puts some
  /// there: they stay the same while memory comes and goes. @throws DeviceError
  [[nodiscard]] virtual void* reserve(std::size_t bytes) = 0;
  virtual void unreserve(void* range, std::size_t bytes) noexcept = 0;
  /// Memory behind whole pages that have none; what is in it is not defined.
  virtual void back(void* pages, std::size_t bytes) = 0;
  /// Takes it from whole pages, after all that is queued anywhere on the device.
  virtual void drop(void* pages, std::size_t bytes) noexcept = 0;
  /// May verbs other than `copy` be given this address? A device's own memory, and what its driver
  /// lets it follow.
  [[nodiscard]] virtual bool reaches(const void* memory) const = 0;

  // ---- tasks ----------------------------------------------------------------------------------
  /// How many tasks of a few m³ flops are faster side by side than one after the other, each with
  /// all of the device's threads: so many threads, on the CPU; 1: none.
  [[nodiscard]] virtual int tasks_at_once() const { return 1; }
  /// f(task, place, backend) for every task < count, at most `at_once` at a time: each on an object
  /// of this device and in a place < at_once that no other has meanwhile. Returns when all are
  /// done. In which order they are done is not defined.
  /// @throws  what f throws: of several tasks, the first one's.
  template <class F>
  void for_tasks(int count, int at_once, F&& f) {
    using Function = std::remove_reference_t<F>;
    run_tasks(
        count, at_once,
        [](void* context, int task, int place, Backend& backend) {
          (*static_cast<Function*>(context))(task, place, backend);
        },
        &f);
  }

  // ---- replays --------------------------------------------------------------------------------
  /// What a sequence of verbs is known by: the same key, the same verbs on the same addresses.
  using ReplayKey = std::array<std::uint64_t, 8>;
  /// Lets `replay` keep what it was given. Off when opened.
  /// @return whether this device can: the CPU has no queue, and nothing to keep.
  virtual bool keep_replays(bool /*on*/) { return false; }
  /// Enters f(), a sequence of verbs that return nothing. A device that keeps replays (CUDA: as
  /// graphs) calls f the first time, keeps what it enters the second, and from then on enters that
  /// as a whole, without f: the launches cost the host one call. f must not wait, nor ask for a
  /// number, nor read or write host memory; one that does is called every time, and
  /// `replay_problem` says so. What f works on must live as long as this object.
  template <class F>
  void replay(const ReplayKey& key, F&& f) {
    using Function = std::remove_reference_t<F>;
    run_replay(
        key, [](void* context) { (*static_cast<Function*>(context))(); }, &f);
  }
  /// Empty; or why a sequence could not be kept, and runs as without replays: the first such.
  [[nodiscard]] virtual std::string_view replay_problem() const { return {}; }

  // ---- products -------------------------------------------------------------------------------
  /// C ← α·op(A)·op(B) + β·C. bf16 in accumulates in f32; C may then be f32 too, and is not rounded
  /// to bf16. C must not alias A or B. With β = 0, C is not read. @par Cost 2·m·n·k flops.
  virtual void gemm(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b,
                    Transpose op_b, double beta, MatrixView c) = 0;
  /// C ← α·A·Aᵀ + β·C (`Transpose::yes`: AᵀA); C is written whole and exactly symmetric, and is
  /// taken to be symmetric on input. Types as for `gemm`. @par Cost n²·k flops, and what the
  /// squares on the diagonal waste.
  virtual void syrk(double alpha, ConstMatrixView a, Transpose op_a, double beta, MatrixView c) = 0;
  /// A ← A⁻¹ for a symmetric positive definite A, f32 or f64, of which the lower triangle is read;
  /// written whole and exactly symmetric.
  /// @return false, and A spoiled, when A is not positive definite to working precision, or holds
  ///         NaN or Inf where that is noticed: the caller may shift its diagonal and try again.
  /// @par Cost m³ flops.
  [[nodiscard]] virtual bool invert_spd(MatrixView a) = 0;

  // ---- element-wise ---------------------------------------------------------------------------
  /// to ← scale·from, any two of {f32, bf16, f64}; round to nearest even. `to` may be `from`.
  virtual void convert(ConstMatrixView from, double scale, MatrixView to) = 0;
  /// bf16 ← f32 by stochastic rounding; the bits of element i come from Philox(seed, stream_id;
  /// step, first_element + i), i row-major: the low 16 bits of word 0 of `random_words`.
  virtual void round_stochastic(ConstMatrixView from, MatrixView to, std::uint64_t seed,
                                std::uint64_t stream_id, std::uint64_t step,
                                Index first_element) = 0;
  /// y ← a·x + b·y: two products and one sum, each rounded. With b = 0, y is not read. x may be y.
  virtual void axpby(double a, ConstMatrixView x, double b, MatrixView y) = 0;
  /// M ← β·M + w·G, then G ← β·M + w·G of the new M (`ahead`, Nesterov) or G ← M: the same bits as
  /// two `axpby`, in one pass over memory. @par Cost 16 bytes per f32 element.
  virtual void momentum(double beta, double weight, bool ahead, MatrixView g, MatrixView m) = 0;
  /// to ← sign(from), sign(±0) = 0, NaN stays NaN. `to` may be `from`.
  virtual void sign(ConstMatrixView from, MatrixView to) = 0;
  /// W ← ρ·W − η·U. f32. @return Σ U² in f64 (as `sum_squares`).
  virtual double decay_step(double rho, double eta, ConstMatrixView u, MatrixView w) = 0;
  /// One AdamW step on f32 weights w, gradient g, moments m and v (all the same shape, updated in
  /// place): m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; U = (m/c₁)/(√(v/c₂) + ε); w ← (1−ηλ)w − ηU.
  /// @return Σ U² in f64 (as `sum_squares`).
  virtual double adamw(const AdamWScalars& s, ConstMatrixView g, MatrixView m, MatrixView v,
                       MatrixView w) = 0;

  // ---- codes ----------------------------------------------------------------------------------
  // Weights are f32 or f64, scales f32; column 0 of a view begins a block of its grid.

  /// out ← max |w| of what shares a scale, f32 of `scale_rows` × `scale_cols`; NaN where an entry
  /// is NaN. bf16 is taken, too. An empty row's is 0.
  virtual void abs_maxima(ConstMatrixView w, const Grid& grid, MatrixView out) = 0;
  /// In place: s ← max(s / largest_code, 1e-12) in f32, or the smallest power of two from there on.
  /// NaN stays NaN. Apart from `abs_maxima`, because maxima of several ranks may meet in between.
  virtual void scales_from_maxima(const Grid& grid, MatrixView scales) = 0;
  /// codes ← round(w / scale), then w ← w − code·scale, the residual: quotient, product and
  /// difference each rounded in f32 (f64 w: quotient in f64, then f32; product exact). Scales are
  /// given, positive.
  /// Stochastic: up in magnitude iff u is below the distance from the code below, in steps of
  /// the format's. Beyond ±largest_code: that code. What rounds to 0 has code 0, without a sign.
  /// NaN w / scale: code 0, and NaN stays in w; else no code is NaN or Inf.
  /// @pre |w| ≤ 2¹²⁷, or code·scale may overflow and leave Inf.
  /// @par Cost 9 bytes per f32 element and fp8; stochastic, a quarter of a Philox block more.
  virtual void quantize(MatrixView w, const Grid& grid, const Rounding& rounding,
                        QuantizedView q) = 0;
  /// to ← code·scale, rounded once in f32, from there once to bf16; exact in f64.
  virtual void dequantize(ConstQuantizedView q, const Grid& grid, MatrixView to) = 0;
  /// How many |w| are larger than (1 + 2⁻²²)·largest_code·scale: would saturate, by more than the
  /// rounding of a scale that `scales_from_maxima` made of them. Before `quantize`; for telemetry.
  virtual std::int64_t count_beyond(ConstMatrixView w, const Grid& grid,
                                    ConstMatrixView scales) = 0;
  /// m ← m + (κc₁·D)⊙e, f32, D the divisor of `adamw`: √(v/c₂) + ε or (√v + ε)/√c₂, v after that
  /// step. κc₁ is rounded once; each product and the sum, too. @par Cost 16 bytes per element.
  virtual void adamw_pull_back(const AdamWScalars& s, double kappa, ConstMatrixView v,
                               ConstMatrixView e, MatrixView m) = 0;
  /// f32 → high, bf16: the nearest, ties away from zero; and low: the 16 bits that are missing, an
  /// int16 in a bf16 view, bits(w) − high·2¹⁶. (With ties to even, an even high has 2¹⁶ + 1
  /// origins, which no 16 bits tell apart.) NaN: high is NaN, low 0.
  virtual void split_f32(ConstMatrixView w, MatrixView high, MatrixView low) = 0;
  /// The exact inverse, bit for bit but for NaN, which stays NaN.
  virtual void merge_f32(ConstMatrixView high, ConstMatrixView low, MatrixView w) = 0;

  // ---- entries as they stand ------------------------------------------------------------------
  /// Every entry ← value, rounded once.
  virtual void fill(double value, MatrixView to) = 0;
  /// c(i,i) ← c(i,i) + a, c square.
  virtual void add_diagonal(double a, MatrixView c) = 0;
  /// c(j,i) ← c(i,j) for j < i, bit for bit, c square.
  virtual void mirror_lower(MatrixView c) = 0;
  /// packed ← the lower triangle of a square f32 matrix, row after row (`packed_size` of
  /// triangle.hpp); what is above the diagonal is not read.
  virtual void pack_triangle(ConstMatrixView full, float* packed) = 0;
  /// The other way; `full` is written whole and is exactly symmetric.
  virtual void unpack_triangle(const float* packed, MatrixView full) = 0;

  // ---- sums -----------------------------------------------------------------------------------
  /// Elements per block of a sum: inside a block f64 in 8 interleaved lanes of fixed order, across
  /// blocks the binary tree that splits [a,b) at a + the largest power of two below b − a. Blocks
  /// count row-major elements of the view, so a sum does not depend on ld or alignment. Lanes add
  /// up as ((0+1)+(2+3)) + ((4+5)+(6+7)). The reference, as judge, sums in plain order.
  static constexpr Index sum_block = 4096;
  /// Σ x² in f64. Inf or NaN in x give Inf or NaN.
  virtual double sum_squares(ConstMatrixView x) = 0;
  /// Writes Σ x² of each row (each column when `of_columns`) to `out`, f64, rows×1 (1×cols). Fixed
  /// order.
  virtual void line_sum_squares(ConstMatrixView x, bool of_columns, MatrixView out) = 0;
  /// max |x|; NaN when any entry is NaN.
  virtual double abs_max(ConstMatrixView x) = 0;
  /// Σ c(i,i) in f64, from the first on; c square.
  virtual double trace(ConstMatrixView c) = 0;
  /// out(i) ← Σⱼ x(i,j)·y(i,j), f64, rows×1: each product rounded, added from the first on.
  virtual void row_dots(ConstMatrixView x, ConstMatrixView y, MatrixView out) = 0;
  /// x(i,j) ← x(i,j)·s(i) (s(j) when `of_columns`); s is f64, the product is rounded once.
  virtual void scale_lines(ConstMatrixView s, bool of_columns, MatrixView x) = 0;

  // ---- divisions by numbers that stay on the device: nothing is waited for
  // ------------------------
  /// Does a verb that returns a number make the host wait for a queue?
  [[nodiscard]] virtual bool numbers_wait() const { return false; }
  /// to ← x/ν, ν = norm_of(‖X‖_F, options). Where the largest |x| is not within 2^±safe_exponent, x
  /// is brought near 1 by a power of two first, which is exact, and ε with it; then no square and
  /// no reciprocal leaves its range. ε can dwarf the entries so much that 1/ν underflows: then `to`
  /// is 0, as it should. Of a zero matrix `to` is zero, of one that is not finite it is all NaN.
  /// @param[in,out] x   may be left scaled.
  /// @param[out]    to  x itself, or apart from it; any type.
  /// @return false when the host has learned that x is zero. A device that does not answer at once
  ///         says true.
  /// @par Cost  two passes over x, three in f64, and one over `to`.
  virtual bool normalize(MatrixView x, const NormOptions& options, int safe_exponent,
                         MatrixView to) = 0;
  /// to ← from/νᵖ, ν = norm_of(√tr R, options), p = `power` 1 or 2. Of tr R = 0 `to` is zero, of
  /// one that is not finite all NaN. @param to  `from` itself, or apart from it.
  virtual void divide_by_norm(ConstMatrixView r, const NormOptions& options, int power,
                              ConstMatrixView from, MatrixView to) = 0;
  /// to ← μ·x and C ← C − μI with μ the mean of C's diagonal. Nothing is C; `to` apart from x.
  virtual void split_mean(MatrixView c, ConstMatrixView x, MatrixView to) = 0;
  /// s ← 1/√s where s > 0, else 0; f64.
  virtual void inverse_roots(MatrixView s) = 0;

 protected:
  using Sequence = void (*)(void* context);
  virtual void run_replay(const ReplayKey& /*key*/, Sequence f, void* context) { f(context); }

  using Task = void (*)(void* context, int task, int place, Backend& backend);
  virtual void run_tasks(int count, int /*at_once*/, Task f, void* context) {
    for (int task = 0; task < count; ++task) f(context, task, 0, *this);
  }

 private:
  template <class T>
  friend class OnHost;                        // device_memory.hpp
  std::vector<std::vector<std::byte>> idle_;  // what those before have left
};

/// A device by name: "cpu" (OpenBLAS, oneDNN where built in), "reference" (plain loops in f64: the
/// judge), "cuda" (the calling thread's current device, on a stream of its own).
/// @throws ConfigError naming the known devices, the build option that would add one, or why there
///         is none to open.
std::unique_ptr<Backend> open_backend(std::string_view device);

/// `tasks_at_once()` of a device in the calling thread, without opening it; 1 where it is not
/// known.
int tasks_at_once(std::string_view device);

/// Is bf16 computed by oneDNN here (else: widened to f32 and multiplied by the BLAS)?
bool cpu_bf16_native();

}  // namespace orthrus::kernels
