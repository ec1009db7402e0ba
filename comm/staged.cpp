#include "comm/staged.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <exception>
#include <numeric>
#include <orthrus/error.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "comm/core.hpp"
#include "comm/line.hpp"
#include "comm/pool.hpp"
#include "comm/wait.hpp"

namespace orthrus::comm {
namespace {

/// Staging memory that was used before is used again, by sizes of powers of two. What a call that
/// was given up holds is never freed: the ranks beneath may still write to it.
class Memory {
 public:
  explicit Memory(Copies& copies) : copies_(copies) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (const Size& size : sizes_) {
      for (void* const block : size.idle) copies_.free(block);
    }
  }
  void* take(std::size_t bytes) {
    Size& size = of(bytes);
    if (size.idle.empty()) {
      size.idle.reserve(size.made + 1);  // so that `give` cannot fail
      void* const block = copies_.allocate(std::bit_ceil(std::max(bytes, least)));
      ++size.made;
      return block;
    }
    void* const block = size.idle.back();
    size.idle.pop_back();
    return block;
  }
  void give(void* block, std::size_t bytes) noexcept { of(bytes).idle.push_back(block); }

 private:
  struct Size {
    std::vector<void*> idle;
    std::size_t made = 0;
  };
  static constexpr std::size_t least = 4096;
  Size& of(std::size_t bytes) {
    return sizes_[static_cast<std::size_t>(std::bit_width(std::max(bytes, least) - 1))];
  }

  Copies& copies_;
  std::array<Size, 65> sizes_;
};

enum class Kind : std::uint8_t {
  all_reduce,
  reduce_scatter,
  all_gather,
  broadcast,
  reduce,
  all_to_all,
  send,
  receive,
  barrier,
  copy
};

struct Flight;

/// What a communicator shares with those split from it.
struct Stage {
  explicit Stage(std::shared_ptr<Copies> c) : copies(std::move(c)), memory(*copies) {}
  void advance() noexcept;

  std::shared_ptr<Copies> copies;
  Memory memory;
  Line<Flight> line;  // calls whose bytes are still on their way to the staging memory
};

class StagedBody;

/// One call: fetching → talking → delivering → done.
struct Flight final : Request::State {
  enum class Phase : std::uint8_t { fetching, talking, delivering, done };

  explicit Flight(StagedBody& b);
  bool test() override;
  bool wait(double timeout_s) override;
  void release() noexcept override;

  void talk();
  void deliver();
  void finish() noexcept;

  StagedBody& body;
  std::unique_ptr<Copies::Mark> mark;
  Flight* next = nullptr;

  Phase phase = Phase::done;
  Kind kind = Kind::barrier;
  ReduceOp op = ReduceOp::sum;
  int peer = 0, tag = 0;
  Index limit = 0;
  bool marked = false;                     // bytes are fetched: the mark says when they are here
  Span in, out;                            // in staging memory
  Span to;                                 // the caller's, for what is in `out`
  std::vector<Index> counts, recv_counts;  // of the call beneath
  std::vector<Index> to_counts;  // the caller's parts, where those beneath are shorter; else empty
  std::array<Span, 2> held;      // staging memory
  std::size_t holds = 0;
  CommunicatorBackend::Done inner;
  std::exception_ptr failure;
};

class StagedBody final : public CommunicatorBackend {
 public:
  StagedBody(std::unique_ptr<CommunicatorBackend> inner, std::shared_ptr<Stage> stage)
      : stage_(std::move(stage)),
        inner_(std::move(inner)),
        kind_(std::string(inner_->kind()) + "+staging") {
    flights_.stock(calls_in_flight, *this);
  }

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  const char* kind() const override { return kind_.c_str(); }

  Done all_reduce(Span data, ReduceOp op) override {
    Start start{*this, Kind::all_reduce};
    start->op = op;
    start->in = start->out = start.fetch(data);
    start->to = data;
    return start.go();
  }
  Done reduce_scatter(ConstSpan send, std::span<const Index> counts, Span recv) override {
    Start start{*this, Kind::reduce_scatter};
    start->counts.assign(counts.begin(), counts.end());
    start->in = start.fetch(send);
    start->out = start.hold(recv);
    start->to = recv;
    return start.go();
  }
  Done all_gather(ConstSpan send, std::span<const Index> counts, Span recv) override {
    Start start{*this, Kind::all_gather};
    start->counts.assign(counts.begin(), counts.end());
    start->out = start.hold(recv);
    // Beneath, every all_gather is in place.
    const Index begin = std::accumulate(counts.begin(), counts.begin() + rank(), Index{0});
    start->in = part(start->out, begin, send.count);
    start.fetch(start->in, send);
    start->to = recv;
    return start.go();
  }
  Done broadcast(Span data, int root) override {
    Start start{*this, Kind::broadcast};
    start->peer = root;
    const bool here = root == rank();
    start->out = here ? start.fetch(data) : start.hold(data);
    if (!here) start->to = data;
    return start.go();
  }
  Done reduce(ConstSpan send, Span recv, ReduceOp op, int root) override {
    Start start{*this, Kind::reduce};
    start->op = op;
    start->peer = root;
    start->in = start.fetch(send);
    if (root == rank()) {
      start->out = start.hold(recv);
      start->to = recv;
    } else {
      start->out = Span{nullptr, 0, send.dtype};
    }
    return start.go();
  }
  Done all_to_all(ConstSpan send, std::span<const Index> send_counts, Span recv,
                  std::span<const Index> recv_counts, Index limit) override {
    Start start{*this, Kind::all_to_all};
    start->limit = limit;
    // Only what travels is staged: parts cut at the limit, without gaps.
    const Index out = cut(send_counts, limit, start->counts);
    const Index in = cut(recv_counts, limit, start->recv_counts);
    if (out == send.count) {
      start->in = start.fetch(send);
    } else {
      start->in = start.hold(Span{nullptr, out, send.dtype});
      Index staged = 0;
      Index begin = 0;
      for (std::size_t r = 0; r < send_counts.size(); ++r) {
        const Index n = start->counts[r];
        start.fetch(part(start->in, staged, n), part(send, begin, n));
        staged += n;
        begin += send_counts[r];
      }
    }
    if (in != recv.count) start->to_counts.assign(recv_counts.begin(), recv_counts.end());
    start->out = start.hold(Span{nullptr, in, recv.dtype});
    start->to = recv;
    return start.go();
  }
  Done send(ConstSpan data, int to, int tag) override {
    Start start{*this, Kind::send};
    start->peer = to;
    start->tag = tag;
    start->in = start.fetch(data);
    return start.go();
  }
  Done receive(Span data, int from, int tag) override {
    Start start{*this, Kind::receive};
    start->peer = from;
    start->tag = tag;
    start->out = start.hold(data);
    start->to = data;
    return start.go();
  }
  // Like all else a barrier comes after what the caller's stream holds.
  Done barrier() override {
    Start start{*this, Kind::barrier};
    start->marked = true;
    return start.go();
  }
  Done copy(ConstSpan from, Span to) override {
    Start start{*this, Kind::copy};
    start->out = start.fetch(from);
    start->to = to;
    return start.go();
  }
  // Calls that complete one by one may block beneath as well as wait here.
  void set_blocking(bool blocking) override { inner_->set_blocking(blocking); }
  std::unique_ptr<CommunicatorBackend> split(int color, int key) override {
    return std::make_unique<StagedBody>(inner_->split(color, key), stage_);
  }
  std::unique_ptr<CommunicatorBackend> duplicate() override {
    return std::make_unique<StagedBody>(inner_->duplicate(), stage_);
  }

  CommunicatorBackend& inner() const { return *inner_; }
  Stage& stage() const { return *stage_; }
  void give(Flight& flight) noexcept { flights_.give(&flight); }

 private:
  static Span part(Span s, Index begin, Index count) {
    if (s.data != nullptr) {
      s.data =
          static_cast<std::byte*>(s.data) + static_cast<std::size_t>(begin) * bytes_of(s.dtype);
    }
    return {s.data, count, s.dtype};
  }
  static ConstSpan part(ConstSpan s, Index begin, Index count) {
    return part(Span{const_cast<void*>(s.data), s.count, s.dtype}, begin, count);
  }
  /// @return their sum.
  static Index cut(std::span<const Index> counts, Index limit, std::vector<Index>& cut) {
    cut.clear();
    for (const Index n : counts) cut.push_back(std::min(n, limit));
    return std::accumulate(cut.begin(), cut.end(), Index{0});
  }

  /// A flight that goes back to the pool unless its call stands in line.
  class Start {
   public:
    Start(StagedBody& body, Kind kind) : stage_(*body.stage_), flight_(body.flights_.take(body)) {
      done_.reset(flight_);
      flight_->kind = kind;
      flight_->marked = false;
      flight_->in = flight_->out = flight_->to = Span{};
      flight_->to_counts.clear();
      stage_.copies->follow();
    }
    Flight* operator->() const { return flight_; }
    /// Staging memory for as much as `like` holds.
    Span hold(Span like) {
      like.data = nullptr;
      if (like.count == 0) return like;
      like.data = stage_.memory.take(like.bytes());
      flight_->held[flight_->holds++] = like;
      return like;
    }
    void fetch(Span staging, ConstSpan caller) {
      if (caller.count == 0) return;
      stage_.copies->fetch(staging.data, caller.data, caller.bytes());
      flight_->marked = true;
    }
    Span fetch(ConstSpan caller) {
      const Span staging = hold(Span{nullptr, caller.count, caller.dtype});
      fetch(staging, caller);
      return staging;
    }
    Done go() {
      if (flight_->marked) flight_->mark->set();
      flight_->phase = Flight::Phase::fetching;
      stage_.line.push(flight_);
      stage_.advance();
      return std::move(done_);
    }

   private:
    Stage& stage_;
    Flight* flight_;
    Done done_;
  };

  std::shared_ptr<Stage> stage_;
  std::unique_ptr<CommunicatorBackend> inner_;
  std::string kind_;
  Pool<Flight> flights_;
};

Flight::Flight(StagedBody& b) : body(b), mark(b.stage().copies->mark()) {
  const auto ranks = static_cast<std::size_t>(b.size());
  for (auto* v : {&counts, &recv_counts, &to_counts}) v->reserve(ranks);
}

// A call that fails here fails where it is asked for.
void Stage::advance() noexcept {
  while (!line.empty()) {
    Flight& flight = *line.first();
    try {
      if (flight.marked && !flight.mark->reached()) return;
      flight.talk();
      flight.phase = Flight::Phase::talking;
    } catch (...) {
      flight.failure = std::current_exception();
    }
    line.pop();
  }
}

void Flight::talk() {
  CommunicatorBackend& to_ranks = body.inner();
  switch (kind) {
    case Kind::all_reduce:
      inner = to_ranks.all_reduce(in, op);
      break;
    case Kind::reduce_scatter:
      inner = to_ranks.reduce_scatter(in, counts, out);
      break;
    case Kind::all_gather:
      inner = to_ranks.all_gather(in, counts, out);
      break;
    case Kind::broadcast:
      inner = to_ranks.broadcast(out, peer);
      break;
    case Kind::reduce:
      inner = to_ranks.reduce(in, out, op, peer);
      break;
    case Kind::all_to_all:
      inner = to_ranks.all_to_all(in, counts, out, recv_counts, limit);
      break;
    case Kind::send:
      inner = to_ranks.send(in, peer, tag);
      break;
    case Kind::receive:
      inner = to_ranks.receive(out, peer, tag);
      break;
    case Kind::barrier:
      inner = to_ranks.barrier();
      break;
    case Kind::copy:
      break;
  }
}

void Flight::deliver() {
  Copies& copies = *body.stage().copies;
  const std::size_t element = bytes_of(out.dtype);
  auto* const caller = static_cast<std::byte*>(to.data);
  const auto* const staging = static_cast<const std::byte*>(out.data);
  if (to_counts.empty()) {
    copies.deliver(caller, staging, to.bytes());
  } else {
    std::size_t staged = 0;
    std::size_t begin = 0;
    for (std::size_t r = 0; r < to_counts.size(); ++r) {
      const auto n = static_cast<std::size_t>(recv_counts[r]);
      if (n > 0) copies.deliver(caller + begin * element, staging + staged * element, n * element);
      staged += n;
      begin += static_cast<std::size_t>(to_counts[r]);
    }
  }
  mark->set();
}

void Flight::finish() noexcept {
  while (holds > 0) {
    const Span& span = held[--holds];
    body.stage().memory.give(span.data, span.bytes());
  }
  phase = Phase::done;
}

bool Flight::test() {
  if (phase == Phase::done) return true;
  body.stage().advance();
  if (failure != nullptr) std::rethrow_exception(failure);
  if (phase == Phase::talking) {
    if (inner != nullptr && !inner->test()) return false;
    inner.reset();
    if (to.count == 0) {
      finish();
      return true;
    }
    deliver();
    phase = Phase::delivering;
  }
  if (phase != Phase::delivering || !mark->reached()) return false;
  finish();
  return true;
}

bool Flight::wait(double timeout_s) {
  if (wait_until([this] { return test(); }, timeout_s)) return true;
  // The body beneath may have something to end.
  if (inner != nullptr) static_cast<void>(inner->wait(1e-9));
  return false;
}

void Flight::release() noexcept {
  if (phase != Phase::done) {  // given up: it stays where it is, with all it holds
    body.stage().line.remove_if([this](const Flight& f) { return &f == this; });
    inner.reset();
    return;
  }
  finish();  // what a call holds that never started
  body.give(*this);
}

}  // namespace

Communicator staged(const Communicator& over, std::shared_ptr<Copies> copies) {
  return Communicator{std::make_unique<StagedBody>(Core::body_of(over).duplicate(),
                                                   std::make_shared<Stage>(std::move(copies))),
                      over.options()};
}

const CommunicatorBackend& staged_over(const Communicator& c) {
  const auto* const body = dynamic_cast<const StagedBody*>(&Core::body_of(c));
  if (body == nullptr) {
    throw CommError("staged_over: the communicator is of kind " + std::string(c.kind()));
  }
  return body->inner();
}

}  // namespace orthrus::comm
