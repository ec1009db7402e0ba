#pragma once
/// @file
/// Communicator: ranks, and what they say to each other. Every collective is called by all ranks of
/// the communicator, in the same order, with matching counts.
///
/// Counts are 64-bit; a call is cut into messages of at most `max_chunk` elements. Every call adds
/// the bytes this rank must send, as comm/cost.hpp defines them, and its messages to `traffic()`. A
/// wait that lasts longer than `timeout_s` throws `CommError` (exit code 79) naming the call, the
/// bytes of its buffer, the communicator and the rank (that in the communicator all others were
/// split from). Only one thread may use the communicators of one process at a time.

#include <cstdint>
#include <functional>
#include <memory>
#include <orthrus/view.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace orthrus {
namespace comm {
struct Call;
struct Core;
}  // namespace comm

enum class ReduceOp : std::uint8_t { sum, max, min };

/// What a message belongs to: only `payload` and `control` are planned; `setup` is before step 1
/// and in saves; `exceptional` is data-dependent (a skipped step, a recomputation) and 0 in every
/// plan.
enum class TrafficClass : std::uint8_t { payload, control, setup, exceptional };

/// Bytes and messages one rank sent.
struct Traffic {
  std::int64_t bytes = 0;
  std::int64_t messages = 0;
  Traffic& operator+=(const Traffic& o) noexcept {
    bytes += o.bytes;
    messages += o.messages;
    return *this;
  }
  friend Traffic operator+(Traffic a, const Traffic& b) noexcept { return a += b; }
  friend Traffic operator-(Traffic a, const Traffic& b) noexcept {
    return {a.bytes - b.bytes, a.messages - b.messages};
  }
  friend bool operator==(const Traffic&, const Traffic&) = default;
};

/// One call on its way. Move-only; destroying it unwaited completes it first.
///
/// A call that failed, or whose deadline passed, is given up: its buffers must stay where they are
/// until the process ends (MPI may still write to them). After one such call, and 5 s into the
/// unwinding of an exception, destroyed requests no longer wait.
class Request {
 public:
  /// What a body knows about a call in flight.
  class State {
   public:
    virtual ~State() = default;
    /// Advances the call without blocking. @return true when it is complete.
    virtual bool test() = 0;
    /// Blocks until complete or `timeout_s` passed (0: for ever). @return complete.
    virtual bool wait(double timeout_s);
    /// The caller lets go, of a complete call or of one given up: delete, or keep for the next
    /// call.
    virtual void release() noexcept { delete this; }
  };
  struct Release {
    void operator()(State* state) const noexcept { state->release(); }
  };

  Request() = default;
  Request(Request&&) noexcept = default;
  Request& operator=(Request&& other) noexcept;  ///< the call held until now completes first
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;
  ~Request();

  /// Advances the call. @return true when nothing is left to wait for (also when empty).
  bool test();
  /// Blocks until the call is complete; the buffers may then be used again. @throws CommError on
  /// time-out.
  void wait();
  /// Gives the call up, as after its deadline: nothing is waited for.
  void give_up() noexcept;
  [[nodiscard]] bool active() const noexcept { return call_ != nullptr; }

 private:
  friend struct comm::Call;
  struct Recycle {
    void operator()(comm::Call* call) const noexcept;
  };
  void complete() noexcept;

  std::unique_ptr<comm::Call, Recycle> call_;  // all messages of one call
};

/// One way to talk: the body behind a `Communicator`. Buffers are typed, counts 64-bit; a body need
/// not cut messages (the `Communicator` has done so), check arguments, count, or watch the clock.
/// `counts` are read before a call returns, buffers until its `Done` is complete. A body outlives
/// its `Done`s.
class CommunicatorBackend {
 public:
  using Done = std::unique_ptr<Request::State, Request::Release>;  ///< null: already complete

  virtual ~CommunicatorBackend() = default;
  [[nodiscard]] virtual int rank() const = 0;
  [[nodiscard]] virtual int size() const = 0;
  /// "mpi", "nccl", "thread", "self", "dry"; "mpi+staging" for device buffers over MPI.
  [[nodiscard]] virtual const char* kind() const = 0;
  /// True when calls only count: buffers may be null.
  [[nodiscard]] virtual bool dry() const { return false; }
  /// True when buffers are in a device's memory, and none in the host's.
  [[nodiscard]] virtual bool on_device() const { return false; }

  /// In place on `data`.
  virtual Done all_reduce(Span data, ReduceOp op) = 0;
  /// `send` holds sum(counts) elements; rank r gets the sum over ranks of its part.
  virtual Done reduce_scatter(ConstSpan send, std::span<const Index> counts, Span recv) = 0;
  /// `recv` gets every rank's part in rank order. `send` may be this rank's place in `recv`.
  virtual Done all_gather(ConstSpan send, std::span<const Index> counts, Span recv) = 0;
  virtual Done broadcast(Span data, int root) = 0;
  /// The sum arrives in `recv` on `root` (ignored elsewhere).
  virtual Done reduce(ConstSpan send, Span recv, ReduceOp op, int root) = 0;
  /// Parts lie in rank order without gaps in both buffers; only the first `limit` elements of each
  /// travel.
  virtual Done all_to_all(ConstSpan send, std::span<const Index> send_counts, Span recv,
                          std::span<const Index> recv_counts, Index limit) = 0;
  virtual Done send(ConstSpan data, int to, int tag) = 0;
  virtual Done receive(Span data, int from, int tag) = 0;
  virtual Done barrier() = 0;
  /// `to` gets `from`, both this rank's: what is left of its own part of an all_to_all.
  virtual Done copy(ConstSpan from, Span to);
  /// Ranks of equal `color` form a new communicator, ordered by `key`, then by rank.
  virtual std::unique_ptr<CommunicatorBackend> split(int color, int key) = 0;
  /// The same ranks in the same order, with their own message space.
  virtual std::unique_ptr<CommunicatorBackend> duplicate() { return split(0, rank()); }
  /// Later calls may block until they are complete (and are then out of reach of deadlines).
  virtual void set_blocking(bool) {}
};

/// Move-only handle of a group of ranks.
class Communicator {
 public:
  struct Options {
    std::string name = "world";    ///< named in errors
    double timeout_s = 0;          ///< 0: no deadline
    Index max_chunk = 0x7fffffff;  ///< elements per message
    /// Every call completes before it returns. Without a deadline, MPI's blocking calls are used
    /// (SMPI's non-blocking ones are slow).
    bool blocking = false;
  };

  Communicator();
  explicit Communicator(std::unique_ptr<CommunicatorBackend> body);
  Communicator(std::unique_ptr<CommunicatorBackend> body, Options options);
  Communicator(Communicator&&) noexcept;
  Communicator& operator=(Communicator&&) noexcept;
  ~Communicator();

  [[nodiscard]] int rank() const;
  [[nodiscard]] int size() const;
  [[nodiscard]] const char* kind() const;
  [[nodiscard]] bool dry() const;
  [[nodiscard]] bool on_device() const;  ///< buffers are in a device's memory
  [[nodiscard]] const Options& options() const;
  void set_timeout(double timeout_s);
  void set_name(std::string name);
  void set_blocking(bool blocking);
  void set_max_chunk(Index elements);

  // Each `start_*` returns at once; the buffers belong to the call until its `wait()` (the counts
  // do not). Bodies are described at `CommunicatorBackend`. Buffers do not overlap, but for `send`
  // of all_gather.
  [[nodiscard]] Request start_all_reduce(Span data, ReduceOp op);
  [[nodiscard]] Request start_reduce_scatter(ConstSpan send, std::span<const Index> counts,
                                             Span recv);
  [[nodiscard]] Request start_all_gather(ConstSpan send, std::span<const Index> counts, Span recv);
  [[nodiscard]] Request start_all_to_all(ConstSpan send, std::span<const Index> send_counts,
                                         Span recv, std::span<const Index> recv_counts);
  void all_reduce(Span data, ReduceOp op) { start_all_reduce(data, op).wait(); }
  void reduce_scatter(ConstSpan send, std::span<const Index> counts, Span recv) {
    start_reduce_scatter(send, counts, recv).wait();
  }
  void all_gather(ConstSpan send, std::span<const Index> counts, Span recv) {
    start_all_gather(send, counts, recv).wait();
  }
  void all_to_all(ConstSpan send, std::span<const Index> send_counts, Span recv,
                  std::span<const Index> recv_counts) {
    start_all_to_all(send, send_counts, recv, recv_counts).wait();
  }
  void broadcast(Span data, int root);
  void reduce(ConstSpan send, Span recv, ReduceOp op, int root);
  /// Point to point, never to oneself; `send` may wait for its `receive`. 0 <= tag <= 32766.
  [[nodiscard]] Request start_send(ConstSpan data, int to, int tag = 0);
  [[nodiscard]] Request start_receive(Span data, int from, int tag = 0);
  void send(ConstSpan data, int to, int tag = 0) { start_send(data, to, tag).wait(); }
  void receive(Span data, int from, int tag = 0) { start_receive(data, from, tag).wait(); }
  void barrier();

  /// Typed short forms.
  template <class T>
  void all_reduce(std::span<T> data, ReduceOp op = ReduceOp::sum) {
    all_reduce(Span{data.data(), static_cast<Index>(data.size()), dtype_of<T>}, op);
  }
  template <class T>
  void broadcast(std::span<T> data, int root = 0) {
    broadcast(Span{data.data(), static_cast<Index>(data.size()), dtype_of<T>}, root);
  }
  /// Broadcasts a string of any length from `root`. Strings are host memory: not where `on_device`.
  void broadcast(std::string& text, int root = 0);
  /// Every rank's string, in rank order, on every rank.
  [[nodiscard]] std::vector<std::string> all_gather_strings(const std::string& mine);

  /// Collective. The name of the new communicator is this one's + "." + `name`.
  [[nodiscard]] Communicator split(int color, int key, const std::string& name);
  /// Collective: the same ranks in the same order under a private context (their own message
  /// space).
  [[nodiscard]] Communicator duplicate(const std::string& name);

  /// All traffic since construction, by class. `set_traffic_class` says what later calls count as.
  [[nodiscard]] Traffic traffic(TrafficClass c) const;
  [[nodiscard]] Traffic traffic() const;  ///< payload + control + exceptional: what a step sends
  TrafficClass set_traffic_class(TrafficClass c);  ///< @return the class until now
  /// Bytes sent per kind of call, since construction ("reduce_scatter", "all_gather", …); all
  /// classes.
  [[nodiscard]] std::vector<std::pair<std::string, Traffic>> traffic_by_call() const;

 private:
  friend struct comm::Core;
  [[nodiscard]] comm::Core& core() const;

  std::shared_ptr<comm::Core> core_;  // shared with calls in flight
};

/// Sets a traffic class for a scope.
class TrafficScope {
 public:
  TrafficScope(Communicator& comm, TrafficClass c)
      : comm_(comm), before_(comm.set_traffic_class(c)) {}
  ~TrafficScope() { comm_.set_traffic_class(before_); }
  TrafficScope(const TrafficScope&) = delete;
  TrafficScope& operator=(const TrafficScope&) = delete;

 private:
  Communicator& comm_;
  TrafficClass before_;
};

/// The communicator of a single process.
[[nodiscard]] Communicator self_communicator();
/// Rank `rank` of `size` ranks that are not there: calls return at once and are only counted.
[[nodiscard]] Communicator dry_communicator(int size, int rank = 0);
/// Runs `body` on `ranks` threads, each with its own communicator; rethrows the first exception
/// after all threads have ended (a rank that throws makes the others' pending calls throw
/// `CommError` too).
void run_thread_ranks(int ranks, const std::function<void(Communicator&)>& body);

}  // namespace orthrus
