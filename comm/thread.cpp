#include "comm/thread.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <orthrus/error.hpp>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "comm/core.hpp"
#include "comm/pool.hpp"
#include "kernels/bf16.hpp"

// Every call is an `Op` in a table its ranks share. A rank that starts a call writes its buffers
// there and goes on. Once all have, the first rank that tests or waits carries the whole call out,
// alone, on everybody's buffers; so no rank depends on the order in which others wait, and every
// sum has one order.
namespace orthrus {
namespace {

enum class Kind : std::uint8_t {
  all_reduce,
  reduce_scatter,
  all_gather,
  broadcast,
  reduce,
  all_to_all,
  barrier,
  mail,
  split
};
constexpr std::array<const char*, 9> kind_names{"all_reduce", "reduce_scatter", "all_gather",
                                                "broadcast",  "reduce",         "all_to_all",
                                                "barrier",    "message",        "split"};

/// All ranks of one `run_thread_ranks`, and how they end. One mutex for all their groups.
struct World {
  explicit World(int ranks)
      : ended(static_cast<std::size_t>(ranks)), exceptions(static_cast<std::size_t>(ranks)) {}

  /// Under the mutex. The first poison stays.
  void poison(int rank, const std::string& text) {
    if (poisoned) return;
    poisoned = true;
    poisoner = rank;
    poison_text = text;
  }

  std::mutex mutex;
  std::condition_variable changed;
  bool poisoned = false;
  int poisoner = -1;
  std::string poison_text;
  std::vector<char> ended;                     // ranks that call no more
  std::vector<std::exception_ptr> exceptions;  // what they ended with
  int first_exception = -1;
};

struct Group;

/// One rank's part in a call.
struct Slot {
  bool here = false;
  Kind kind{};
  DType dtype{};
  ReduceOp op{};
  int root = 0;
  const void* send = nullptr;
  void* recv = nullptr;
  Index send_count = 0, recv_count = 0, limit = 0;
  std::span<Index> send_counts, recv_counts;  // of the op's `counts`; zeros where the call has none
  int color = 0, key = 0;
  std::shared_ptr<Group> part;  // of a split
  int part_rank = 0;
};

struct Op {
  explicit Op(std::size_t ranks) : slots(ranks), counts(2 * ranks * ranks) {
    std::span<Index> rest{counts};
    for (Slot& slot : slots) {
      slot.send_counts = rest.first(ranks);
      slot.recv_counts = rest.subspan(ranks, ranks);
      rest = rest.subspan(2 * ranks);
    }
  }

  enum class Phase : std::uint8_t { gathering, ready, running, done, failed };
  Phase phase = Phase::gathering;
  Kind kind{};
  std::int64_t number = 0;        // of a collective: equal numbers meet
  int from = 0, to = 0, tag = 0;  // of a mail
  int expected = 0, arrived = 0, released = 0;
  std::vector<Slot> slots;  // by rank
  std::vector<Index> counts;
};

/// The ranks of one communicator and their calls. Everything under the world's mutex, but for the
/// buffers and slots of a running op, which are its executor's.
struct Group {
  Group(std::shared_ptr<World> w, std::vector<int> ranks)
      : world(std::move(w)), world_ranks(std::move(ranks)), copied(world_ranks.size()) {
    // Ranks run ahead of each other as they happen to; that alone should not allocate.
    ops.stock(calls_in_flight, world_ranks.size());
    active.reserve(calls_in_flight);
  }
  static constexpr std::size_t calls_in_flight = 64;

  [[nodiscard]] int size() const { return static_cast<int>(world_ranks.size()); }

  Op& open(Kind kind, int expected) {
    Op* op = ops.take(world_ranks.size());
    op->phase = Op::Phase::gathering;
    op->kind = kind;
    op->expected = expected;
    op->arrived = op->released = 0;
    for (Slot& slot : op->slots) slot.here = false;
    active.push_back(op);
    return *op;
  }
  Op& collective(Kind kind, std::int64_t number) {
    for (Op* op : active) {
      if (op->kind != Kind::mail && op->number == number) return *op;
    }
    Op& op = open(kind, size());
    op.number = number;
    return op;
  }
  /// The oldest mail of this address that `rank`'s side has not come to.
  Op& mail(int from, int to, int tag, int rank) {
    for (Op* op : active) {
      if (op->kind == Kind::mail && op->from == from && op->to == to && op->tag == tag &&
          !op->slots[static_cast<std::size_t>(rank)].here) {
        return *op;
      }
    }
    Op& op = open(Kind::mail, 2);
    op.from = from;
    op.to = to;
    op.tag = tag;
    return op;
  }
  /// A rank whose call is complete needs `op` no more.
  void leave(Op& op) {
    if (++op.released < op.expected) return;
    active.erase(std::find(active.begin(), active.end(), &op));
    ops.give(&op);
  }

  std::shared_ptr<World> world;
  std::vector<int> world_ranks;
  std::vector<Traffic> copied;
  comm::Pool<Op> ops;
  std::vector<Op*> active;  // oldest first
};

// ---- carrying a call out

template <class T>
struct Sum {
  using Wide = T;
  static Wide widen(T x) { return x; }
  static T narrow(Wide x) { return x; }
};
template <>
struct Sum<BFloat16> {
  using Wide = float;
  static Wide widen(BFloat16 x) { return kernels::to_float(x); }
  static BFloat16 narrow(float x) { return kernels::to_bf16(x); }
};

/// out[i] = op over ranks of in(rank)[i], in rank order.
template <class T, class Input>
void fold(int ranks, Index count, ReduceOp op, T* out, Input&& in) {
  using Wide = typename Sum<T>::Wide;
  constexpr Index block = 1024;
  std::array<Wide, block> acc;
  for (Index begin = 0; begin < count; begin += block) {
    const Index n = std::min(block, count - begin);
    for (int r = 0; r < ranks; ++r) {
      const T* x = in(r) + begin;
      for (Index i = 0; i < n; ++i) {
        const Wide v = Sum<T>::widen(x[i]);
        Wide& a = acc[static_cast<std::size_t>(i)];
        if (r == 0) {
          a = v;
        } else if (op == ReduceOp::sum) {
          a = static_cast<Wide>(a + v);
        } else if (op == ReduceOp::max) {
          a = v > a ? v : a;
        } else {
          a = v < a ? v : a;
        }
      }
    }
    for (Index i = 0; i < n; ++i) out[begin + i] = Sum<T>::narrow(acc[static_cast<std::size_t>(i)]);
  }
}

template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(BFloat16{});
    case DType::f64:
      return f(double{});
    case DType::i64:
      return f(std::int64_t{});
    case DType::u8:
      return f(std::uint8_t{});
  }
}

/// Carries one op out, without the mutex.
class Execution {
 public:
  Execution(Op& op, Group& group)
      : op_(op),
        group_(group),
        ranks_(group.size()),
        element_(bytes_of(slot(op.kind == Kind::mail ? op.from : 0).dtype)) {}

  /// @return what the ranks disagree about; empty when the call was carried out.
  std::string run(std::vector<Index>& bytes) {
    bytes_ = &bytes;
    bytes.assign(static_cast<std::size_t>(ranks_), 0);
    std::string trouble = disagreement();
    if (!trouble.empty()) return trouble;
    switch (op_.kind) {
      case Kind::all_reduce:
        all_reduce();
        break;
      case Kind::reduce_scatter:
        reduce_scatter();
        break;
      case Kind::all_gather:
        all_gather();
        break;
      case Kind::broadcast:
        broadcast();
        break;
      case Kind::reduce:
        reduce();
        break;
      case Kind::all_to_all:
        all_to_all();
        break;
      case Kind::mail:
        mail();
        break;
      case Kind::split:
        split();
        break;
      case Kind::barrier:
        break;
    }
    return {};
  }

 private:
  Slot& slot(int rank) { return op_.slots[static_cast<std::size_t>(rank)]; }
  const char* sent(int rank) { return static_cast<const char*>(slot(rank).send); }
  char* received(int rank) { return static_cast<char*>(slot(rank).recv); }
  std::size_t size_of(Index count) const { return static_cast<std::size_t>(count) * element_; }
  void charge(int rank, Index count) {
    (*bytes_)[static_cast<std::size_t>(rank)] += static_cast<Index>(size_of(count));
  }
  void copy(char* to, const char* from, Index count) const {
    if (count > 0 && to != from) std::memcpy(to, from, size_of(count));
  }
  /// Every other rank has sent its `count` elements.
  void charge_all_but(int rank, Index count) {
    for (int r = 0; r < ranks_; ++r) {
      if (r != rank) charge(r, count);
    }
  }

  std::string disagreement() {
    if (op_.kind == Kind::mail) {
      const Slot& a = slot(op_.from);
      const Slot& b = slot(op_.to);
      if (a.dtype == b.dtype && a.send_count == b.recv_count) return {};
      return "rank " + std::to_string(op_.from) + " sends " + std::to_string(a.send_count) + " " +
             std::string(name_of(a.dtype)) + ", rank " + std::to_string(op_.to) + " receives " +
             std::to_string(b.recv_count) + " " + std::string(name_of(b.dtype));
    }
    const Slot& a = slot(0);
    for (int r = 1; r < ranks_; ++r) {
      const Slot& b = slot(r);
      bool same = a.kind == b.kind && a.dtype == b.dtype && a.op == b.op && a.root == b.root &&
                  a.limit == b.limit;
      if (op_.kind == Kind::all_reduce || op_.kind == Kind::broadcast || op_.kind == Kind::reduce ||
          op_.kind == Kind::reduce_scatter) {
        same = same && a.send_count == b.send_count;
      }
      if (op_.kind == Kind::reduce_scatter || op_.kind == Kind::all_gather) {
        same =
            same && std::equal(a.send_counts.begin(), a.send_counts.end(), b.send_counts.begin());
      }
      if (same) continue;
      return "the ranks disagree: " + said(0) + ", " + said(r);
    }
    if (op_.kind == Kind::all_to_all) {
      for (int r = 0; r < ranks_; ++r) {
        for (int q = 0; q < ranks_; ++q) {
          const Index s = slot(r).send_counts[static_cast<std::size_t>(q)];
          const Index t = slot(q).recv_counts[static_cast<std::size_t>(r)];
          if (s == t) continue;
          return "the ranks disagree: rank " + std::to_string(r) + " sends " + std::to_string(s) +
                 " elements to rank " + std::to_string(q) + ", which receives " + std::to_string(t);
        }
      }
    }
    return {};
  }
  std::string said(int rank) {
    const Slot& s = slot(rank);
    return "rank " + std::to_string(rank) + " calls " +
           kind_names[static_cast<std::size_t>(s.kind)] + " of " + std::to_string(s.send_count) +
           " " + std::string(name_of(s.dtype)) + ", root " + std::to_string(s.root) + ", op " +
           std::to_string(static_cast<int>(s.op));
  }

  /// Elements [begin, begin + count) of everybody's `send`, folded into `out` of `rank`.
  void fold_to(int rank, char* out, Index begin, Index count) {
    with_type(slot(0).dtype, [&](auto zero) {
      using T = decltype(zero);
      fold<T>(ranks_, count, slot(0).op, reinterpret_cast<T*>(out),
              [&](int r) { return static_cast<const T*>(slot(r).send) + begin; });
    });
    charge_all_but(rank, count);
  }

  void all_reduce() {
    const Index count = slot(0).send_count;
    Index begin = 0;
    for (int r = 0; r < ranks_; ++r) {
      const Index own = count / ranks_ + (r < count % ranks_ ? 1 : 0);
      char* const sum = received(r) + size_of(begin);
      fold_to(r, sum, begin, own);
      for (int other = 0; other < ranks_; ++other) {
        if (other == r) continue;
        copy(received(other) + size_of(begin), sum, own);
        charge(other, own);
      }
      begin += own;
    }
  }
  void reduce_scatter() {
    Index begin = 0;
    for (int r = 0; r < ranks_; ++r) {
      const Index own = slot(0).send_counts[static_cast<std::size_t>(r)];
      fold_to(r, received(r), begin, own);
      begin += own;
    }
  }
  void all_gather() {
    Index begin = 0;
    for (int from = 0; from < ranks_; ++from) {
      const Index part = slot(0).send_counts[static_cast<std::size_t>(from)];
      for (int to = 0; to < ranks_; ++to) {
        copy(received(to) + size_of(begin), sent(from), part);
        if (to != from) charge(to, part);
      }
      begin += part;
    }
  }
  void broadcast() {
    const int root = slot(0).root;
    for (int i = 1; i < ranks_; ++i) {
      const int from = (root + i - 1) % ranks_;
      copy(received((root + i) % ranks_), received(from), slot(0).send_count);
      charge(from, slot(0).send_count);
    }
  }
  void reduce() { fold_to(slot(0).root, received(slot(0).root), 0, slot(0).send_count); }
  void all_to_all() {
    for (int to = 0; to < ranks_; ++to) {
      Index recv_begin = 0;
      for (int from = 0; from < ranks_; ++from) {
        const std::span<const Index> counts = slot(from).send_counts;
        const Index send_begin = std::accumulate(counts.begin(), counts.begin() + to, Index{0});
        const Index all = counts[static_cast<std::size_t>(to)];
        const Index part = std::min(all, slot(to).limit);
        copy(received(to) + size_of(recv_begin), sent(from) + size_of(send_begin), part);
        if (to != from) charge(from, part);
        recv_begin += all;
      }
    }
  }
  void mail() {
    copy(received(op_.to), sent(op_.from), slot(op_.from).send_count);
    charge(op_.from, slot(op_.from).send_count);
  }
  void split() {
    std::vector<int> order(static_cast<std::size_t>(ranks_));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return std::pair(slot(a).color, slot(a).key) < std::pair(slot(b).color, slot(b).key);
    });
    for (std::size_t i = 0; i < order.size();) {
      std::vector<int> members;
      std::size_t end = i;
      while (end < order.size() && slot(order[end]).color == slot(order[i]).color) {
        members.push_back(group_.world_ranks[static_cast<std::size_t>(order[end++])]);
      }
      const auto part = std::make_shared<Group>(group_.world, std::move(members));
      for (int rank = 0; i < end; ++i, ++rank) {
        slot(order[i]).part = part;
        slot(order[i]).part_rank = rank;
      }
    }
  }

  Op& op_;
  Group& group_;
  int ranks_;
  std::size_t element_;
  std::vector<Index>* bytes_ = nullptr;
};

// ---- one rank

class ThreadBody final : public CommunicatorBackend {
 public:
  ThreadBody(std::shared_ptr<Group> group, int rank) : group_(std::move(group)), rank_(rank) {
    bytes_.reserve(group_->world_ranks.size());
    pending_.stock(comm::calls_in_flight, *this);
  }

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }
  const char* kind() const override { return "thread"; }

  Done all_reduce(Span data, ReduceOp op) override {
    return join(Kind::all_reduce, data, data, [&](Slot& s) { s.op = op; });
  }
  Done reduce_scatter(ConstSpan send, std::span<const Index> counts, Span recv) override {
    return join(Kind::reduce_scatter, send, recv,
                [&](Slot& s) { std::copy(counts.begin(), counts.end(), s.send_counts.begin()); });
  }
  Done all_gather(ConstSpan send, std::span<const Index> counts, Span recv) override {
    return join(Kind::all_gather, send, recv,
                [&](Slot& s) { std::copy(counts.begin(), counts.end(), s.send_counts.begin()); });
  }
  Done broadcast(Span data, int root) override {
    return join(Kind::broadcast, data, data, [&](Slot& s) { s.root = root; });
  }
  Done reduce(ConstSpan send, Span recv, ReduceOp op, int root) override {
    return join(Kind::reduce, send, recv, [&](Slot& s) {
      s.op = op;
      s.root = root;
    });
  }
  Done all_to_all(ConstSpan send, std::span<const Index> send_counts, Span recv,
                  std::span<const Index> recv_counts, Index limit) override {
    return join(Kind::all_to_all, send, recv, [&](Slot& s) {
      s.limit = limit;
      std::copy(send_counts.begin(), send_counts.end(), s.send_counts.begin());
      std::copy(recv_counts.begin(), recv_counts.end(), s.recv_counts.begin());
    });
  }
  Done send(ConstSpan data, int to, int tag) override {
    return enter_mail(rank_, to, tag, data, Span{});
  }
  Done receive(Span data, int from, int tag) override {
    return enter_mail(from, rank_, tag, ConstSpan{}, data);
  }
  Done barrier() override {
    return join(Kind::barrier, ConstSpan{}, Span{}, [](Slot&) {});
  }
  std::unique_ptr<CommunicatorBackend> split(int color, int key) override {
    const Done done = join(Kind::split, ConstSpan{}, Span{}, [&](Slot& s) {
      s.color = color;
      s.key = key;
    });
    done->wait(0);
    auto* const state = static_cast<Pending*>(done.get());
    return std::make_unique<ThreadBody>(std::move(state->part), state->part_rank);
  }

  Traffic copied() const {
    const std::lock_guard lock{group_->world->mutex};
    return group_->copied[static_cast<std::size_t>(rank_)];
  }

 private:
  struct Pending final : Request::State {
    explicit Pending(ThreadBody& b) : body(b) {}
    bool test() override {
      if (op == nullptr) return true;
      std::unique_lock lock{body.group_->world->mutex};
      return body.advance(*this, lock);
    }
    bool wait(double timeout_s) override {
      if (op == nullptr) return true;
      std::unique_lock lock{body.group_->world->mutex};
      const auto deadline = std::chrono::steady_clock::now() +
                            std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                std::chrono::duration<double>(std::min(timeout_s, 1e9)));
      for (;;) {
        if (body.advance(*this, lock)) return true;
        if (timeout_s <= 0) {
          body.group_->world->changed.wait(lock);
        } else if (body.group_->world->changed.wait_until(lock, deadline) ==
                   std::cv_status::timeout) {
          return body.advance(*this, lock);
        }
      }
    }
    void release() noexcept override {
      if (op != nullptr) body.give_up(*this);
      body.pending_.give(this);
    }

    ThreadBody& body;
    Op* op = nullptr;  // null: complete
    std::shared_ptr<Group> part;
    int part_rank = 0;
  };

  template <class Fill>
  Done join(Kind kind, ConstSpan send, Span recv, Fill&& fill) {
    const std::lock_guard lock{group_->world->mutex};
    Op& op = group_->collective(kind, next_++);
    return arrive(op, kind, send, recv, fill);
  }

  Done enter_mail(int from, int to, int tag, ConstSpan send, Span recv) {
    const std::lock_guard lock{group_->world->mutex};
    return arrive(group_->mail(from, to, tag, rank_), Kind::mail, send, recv, [](Slot&) {});
  }

  template <class Fill>
  Done arrive(Op& op, Kind kind, ConstSpan send, Span recv, Fill&& fill) {
    Slot& s = op.slots[static_cast<std::size_t>(rank_)];
    s.here = true;
    s.kind = kind;
    s.dtype = kind == Kind::mail && op.to == rank_ ? recv.dtype : send.dtype;
    s.op = ReduceOp::sum;
    s.root = 0;
    s.send = send.data;
    s.recv = recv.data;
    s.send_count = send.count;
    s.recv_count = recv.count;
    s.limit = 0;
    std::fill(s.send_counts.begin(), s.send_counts.end(), Index{0});
    std::fill(s.recv_counts.begin(), s.recv_counts.end(), Index{0});
    fill(s);
    if (++op.arrived == op.expected) {
      op.phase = Op::Phase::ready;
      group_->world->changed.notify_all();
    }
    Pending* pending = pending_.take(*this);
    pending->op = &op;
    return Done(pending);
  }

  /// Does what can be done without waiting. @return complete; then `pending` has left its op.
  bool advance(Pending& pending, std::unique_lock<std::mutex>& lock) {
    Op& op = *pending.op;
    World& world = *group_->world;
    if (op.phase == Op::Phase::ready && !world.poisoned) {
      op.phase = Op::Phase::running;
      lock.unlock();
      const std::string trouble = Execution(op, *group_).run(bytes_);
      lock.lock();
      op.phase = trouble.empty() ? Op::Phase::done : Op::Phase::failed;
      if (trouble.empty()) {
        for (int r = 0; r < size(); ++r) {
          if (!op.slots[static_cast<std::size_t>(r)].here) continue;
          Traffic& t = group_->copied[static_cast<std::size_t>(r)];
          t.bytes += bytes_[static_cast<std::size_t>(r)];
          t.messages += op.kind == Kind::split || (op.kind == Kind::mail && r == op.to) ? 0 : 1;
        }
      } else {
        world.poison(group_->world_ranks[static_cast<std::size_t>(rank_)], trouble);
      }
      world.changed.notify_all();
    }
    if (op.phase == Op::Phase::done) {
      Slot& s = op.slots[static_cast<std::size_t>(rank_)];
      pending.part = std::move(s.part);
      pending.part_rank = s.part_rank;
      pending.op = nullptr;
      group_->leave(op);
      return true;
    }
    if (world.poisoned) throw CommError(world.poison_text);
    if (op.phase == Op::Phase::gathering) {
      for (int r = 0; r < size(); ++r) {
        if (op.kind == Kind::mail && r != op.from && r != op.to) continue;
        const int there = group_->world_ranks[static_cast<std::size_t>(r)];
        if (!op.slots[static_cast<std::size_t>(r)].here &&
            world.ended[static_cast<std::size_t>(there)] != 0) {
          throw CommError("rank " + std::to_string(r) + " has ended without this call");
        }
      }
    }
    return false;
  }

  /// The caller lets its buffers go: from here on nobody may touch them.
  void give_up(Pending& pending) noexcept {
    World& world = *group_->world;
    std::unique_lock lock{world.mutex};
    Op& op = *pending.op;
    world.changed.wait(lock, [&] { return op.phase != Op::Phase::running; });
    if (op.phase != Op::Phase::done && op.phase != Op::Phase::failed) {
      const int me = group_->world_ranks[static_cast<std::size_t>(rank_)];
      world.poison(me, "rank " + std::to_string(me) + " gave up a call");
    }
    group_->leave(op);
    pending.op = nullptr;
    world.changed.notify_all();
  }

  std::shared_ptr<Group> group_;
  int rank_;
  std::int64_t next_ = 0;
  std::vector<Index> bytes_;
  comm::Pool<Pending> pending_;
};

void run_rank(const std::shared_ptr<World>& world, const std::shared_ptr<Group>& group, int rank,
              const std::function<void(Communicator&)>& body) {
  std::exception_ptr exception;
  std::string text;
  try {
    Communicator comm{std::make_unique<ThreadBody>(group, rank)};
    body(comm);
  } catch (const std::exception& e) {
    exception = std::current_exception();
    text = e.what();
  } catch (...) {
    exception = std::current_exception();
    text = "an unknown exception";
  }
  const std::lock_guard lock{world->mutex};
  const auto me = static_cast<std::size_t>(rank);
  world->ended[me] = 1;
  if (exception != nullptr) {
    world->exceptions[me] = exception;
    if (world->first_exception < 0) world->first_exception = rank;
    world->poison(rank, "rank " + std::to_string(rank) + " threw: " + text);
  }
  world->changed.notify_all();
}

}  // namespace

Traffic comm::thread_copied(const Communicator& c) { return thread_copied(comm::Core::body_of(c)); }

Traffic comm::thread_copied(const CommunicatorBackend& body) {
  const auto* const threads = dynamic_cast<const ThreadBody*>(&body);
  if (threads == nullptr)
    throw CommError("thread_copied: the communicator is of kind " + std::string(body.kind()));
  return threads->copied();
}

void run_thread_ranks(int ranks, const std::function<void(Communicator&)>& body) {
  if (ranks < 1) throw CommError("run_thread_ranks: " + std::to_string(ranks) + " ranks");
  const auto world = std::make_shared<World>(ranks);
  std::vector<int> everyone(static_cast<std::size_t>(ranks));
  std::iota(everyone.begin(), everyone.end(), 0);
  const auto group = std::make_shared<Group>(world, std::move(everyone));
  std::vector<std::thread> threads;
  try {
    threads.reserve(static_cast<std::size_t>(ranks));
    for (int r = 0; r < ranks; ++r) {
      threads.emplace_back([&, r] { run_rank(world, group, r, body); });
    }
  } catch (...) {  // no more threads to be had: those that run must not wait for the rest
    {
      const std::lock_guard lock{world->mutex};
      std::fill(world->ended.begin() + static_cast<std::ptrdiff_t>(threads.size()),
                world->ended.end(), char{1});
      world->changed.notify_all();
    }
    for (std::thread& t : threads) t.join();
    throw;
  }
  for (std::thread& t : threads) t.join();
  // The cause rather than its consequence: the rank that ended the others' calls, if it threw.
  for (const int rank : {world->poisoner, world->first_exception}) {
    if (rank < 0) continue;
    const auto& exception = world->exceptions[static_cast<std::size_t>(rank)];
    if (exception != nullptr) std::rethrow_exception(exception);
  }
}

}  // namespace orthrus
