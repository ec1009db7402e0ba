#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <functional>
#include <numeric>
#include <orthrus/communicator.hpp>
#include <orthrus/error.hpp>
#include <sstream>

#include "comm/core.hpp"
#include "comm/cost.hpp"
#include "comm/wait.hpp"

namespace orthrus {
namespace comm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr Index largest_message = 0x7fffffff;  // MPI 3 counts are int
constexpr int largest_tag = 32766;             // every MPI has 0..32767
constexpr int rest_tag = 32767;                // the rest of an all_to_all
constexpr double unwinding_patience_s = 5;

}  // namespace

Core::Core(std::unique_ptr<CommunicatorBackend> body_, Communicator::Options options_,
           std::shared_ptr<Family> family_)
    : body(std::move(body_)), family(std::move(family_)) {
  set_options(std::move(options_));
  calls.stock(calls_in_flight);
}

void Core::set_options(Communicator::Options o) {
  if (o.max_chunk < 1 || o.max_chunk > largest_message) {
    throw CommError("max_chunk is " + std::to_string(o.max_chunk) +
                    " elements; possible are 1 to 2147483647");
  }
  if (!(o.timeout_s >= 0)) throw CommError("timeout_s is 0 (no deadline) or positive");
  options = std::move(o);
  body->set_blocking(options.blocking && options.timeout_s == 0);
}

CommunicatorBackend& Core::body_of(const Communicator& c) { return *c.core().body; }

void Core::count(const Communicator& c, Traffic t) { c.core().count(Verb::grid, t); }

Communicator Core::child(const Communicator& parent, std::unique_ptr<CommunicatorBackend> body,
                         const std::string& name) {
  const Core& from = parent.core();
  Communicator::Options options = from.options;
  options.name += "." + name;
  Communicator c;
  c.core_ = std::make_shared<Core>(std::move(body), std::move(options), from.family);
  return c;
}

void Core::count(Verb verb, Traffic t) noexcept {
  by_class[static_cast<std::size_t>(traffic_class)] += t;
  by_verb[static_cast<std::size_t>(verb)] += t;
}

std::string Core::describe(Verb verb, std::size_t bytes, const std::string& problem) const {
  std::ostringstream text;
  text << "[rank " << family->rank << '/' << family->size << "] "
       << verb_names[static_cast<std::size_t>(verb)];
  if (verb != Verb::barrier) text << " of " << bytes << " bytes";
  text << " on " << options.name << ": " << problem;
  return text.str();
}

bool Call::test() {
  try {
    while (complete_messages < messages.size() && messages[complete_messages]->test()) {
      ++complete_messages;
    }
  } catch (const Error& e) {
    core->family->given_up = true;
    throw CommError(core->describe(verb, bytes, e.what()), e.exit_code());
  }
  return complete_messages == messages.size();
}

void Call::wait() {
  const double limit_s = core->options.timeout_s;
  const Clock::time_point begin = Clock::now();
  try {
    for (; complete_messages < messages.size(); ++complete_messages) {
      double left_s = 0;
      if (limit_s > 0) {
        const std::chrono::duration<double> waited = Clock::now() - begin;
        left_s = std::max(limit_s - waited.count(), 1e-9);
      }
      if (messages[complete_messages]->wait(left_s)) continue;
      std::ostringstream problem;
      problem << "no answer in " << limit_s << " s (comm.timeout_s)";
      throw CommError(problem.str(), ExitCode::deadline);
    }
  } catch (const Error& e) {
    core->family->given_up = true;
    throw CommError(core->describe(verb, bytes, e.what()), e.exit_code());
  }
}

void Call::complete() noexcept {
  if (core->family->given_up) return;
  // An exception may be the reason why the others will never answer.
  const bool unwinding = std::uncaught_exceptions() > 0;
  const double usual_s = core->options.timeout_s;
  try {
    if (!unwinding) {
      wait();
    } else {
      const double limit_s =
          usual_s > 0 ? std::min(usual_s, unwinding_patience_s) : unwinding_patience_s;
      for (; complete_messages < messages.size(); ++complete_messages) {
        if (messages[complete_messages]->wait(limit_s)) continue;
        core->family->given_up = true;
        return;
      }
    }
  } catch (...) {  // a destructor has nobody to tell; the next call will say it again
    core->family->given_up = true;
  }
}

void Call::recycle() noexcept {
  messages.clear();
  complete_messages = 0;
  const std::shared_ptr<Core> last = std::move(core);  // may end this call with its pool
  last->calls.give(this);
}

Request Call::request(Call* call) {
  Request r;
  r.call_.reset(call);
  return r;
}

namespace {

/// Collects the messages of one call.
class Start {
 public:
  Start(const std::shared_ptr<Core>& core, Verb verb, std::size_t bytes, Traffic traffic)
      : core_(core), verb_(verb), bytes_(bytes) {
    core->count(verb, traffic);
  }
  Start(const Start&) = delete;
  Start& operator=(const Start&) = delete;
  ~Start() {
    if (call_ != nullptr) call_->recycle();
  }

  template <class Message>
  void add(Message&& message) {
    CommunicatorBackend::Done done;
    try {
      done = message(*core_->body);
    } catch (const Error& e) {
      core_->family->given_up = true;
      throw CommError(core_->describe(verb_, bytes_, e.what()), e.exit_code());
    }
    if (done == nullptr) return;
    if (call_ == nullptr) {
      call_ = core_->calls.take();
      call_->core = core_;
      call_->verb = verb_;
      call_->bytes = bytes_;
    }
    call_->messages.push_back(std::move(done));
  }

  Request finish() {
    if (call_ == nullptr) return {};
    Request request = Call::request(std::exchange(call_, nullptr));
    if (core_->options.blocking) request.wait();
    return request;
  }

 private:
  const std::shared_ptr<Core>& core_;
  Verb verb_;
  std::size_t bytes_;
  Call* call_ = nullptr;
};

/// Calls `message(begin, count)` for each message of a call of `count` elements.
template <class Message>
void each_message(Index count, Index max_chunk, Message&& message) {
  Index begin = 0;
  do {
    const Index n = std::min(max_chunk, count - begin);
    message(begin, n);
    begin += n;
  } while (begin < count);
}

Span slice(Span s, Index begin, Index count) {
  if (s.data != nullptr) {
    s.data = static_cast<char*>(s.data) + static_cast<std::size_t>(begin) * bytes_of(s.dtype);
  }
  s.count = count;
  return s;
}

ConstSpan slice(ConstSpan s, Index begin, Index count) {
  if (s.data != nullptr) {
    s.data = static_cast<const char*>(s.data) + static_cast<std::size_t>(begin) * bytes_of(s.dtype);
  }
  s.count = count;
  return s;
}

bool overlap(ConstSpan a, ConstSpan b) {
  if (a.count == 0 || b.count == 0) return false;
  const std::less<const char*> before;
  const auto* const a0 = static_cast<const char*>(a.data);
  const auto* const b0 = static_cast<const char*>(b.data);
  return before(a0, b0 + b.bytes()) && before(b0, a0 + a.bytes());
}

/// What `start_*` asks of its arguments; the message is only made when the answer is no.
class Checks {
 public:
  Checks(const Core& core, Verb verb, std::size_t bytes)
      : core_(core), verb_(verb), bytes_(bytes) {}

  void buffer(ConstSpan s, const char* name) const {
    if (s.count < 0) refuse(std::string(name) + " has " + std::to_string(s.count) + " elements");
    if (s.count > 0 && s.data == nullptr && !core_.body->dry()) {
      refuse(std::string(name) + " is null");
    }
  }
  void same_type(ConstSpan a, ConstSpan b) const {
    if (a.dtype != b.dtype) {
      refuse("sends " + std::string(name_of(a.dtype)) + ", receives " +
             std::string(name_of(b.dtype)));
    }
  }
  void disjoint(ConstSpan a, ConstSpan b) const {
    if (!core_.body->dry() && overlap(a, b)) refuse("send and recv overlap");
  }
  void count(Index have, Index need, const char* name) const {
    if (have != need) {
      refuse(std::string(name) + " has " + std::to_string(have) + " elements, counts say " +
             std::to_string(need));
    }
  }
  /// @return their sum.
  Index counts(std::span<const Index> counts) const {
    if (static_cast<int>(counts.size()) != core_.body->size()) {
      refuse(std::to_string(counts.size()) + " counts for " + std::to_string(core_.body->size()) +
             " ranks");
    }
    for (const Index n : counts) {
      if (n < 0) refuse("a count is " + std::to_string(n));
    }
    return std::accumulate(counts.begin(), counts.end(), Index{0});
  }
  void rank(int r, const char* name) const {
    if (r < 0 || r >= core_.body->size()) {
      refuse(std::string(name) + " is " + std::to_string(r) + " of " +
             std::to_string(core_.body->size()) + " ranks");
    }
  }
  void peer(int r, int tag) const {
    rank(r, "the other rank");
    if (r == core_.body->rank()) refuse("a rank cannot talk to itself");
    if (tag < 0 || tag > largest_tag) {
      refuse("tag " + std::to_string(tag) + " is not in 0..." + std::to_string(largest_tag));
    }
  }
  [[noreturn]] void refuse(const std::string& problem) const {
    throw ShapeError(core_.describe(verb_, bytes_, problem));
  }

 private:
  const Core& core_;
  Verb verb_;
  std::size_t bytes_;
};

}  // namespace
}  // namespace comm

using comm::Checks;
using comm::Start;
using comm::Verb;

bool Request::State::wait(double timeout_s) {
  return comm::wait_until([this] { return test(); }, timeout_s);
}

CommunicatorBackend::Done CommunicatorBackend::copy(ConstSpan from, Span to) {
  if (to.data != nullptr && from.data != nullptr) std::memcpy(to.data, from.data, to.bytes());
  return nullptr;
}

void Request::Recycle::operator()(comm::Call* call) const noexcept { call->recycle(); }

void Request::complete() noexcept {
  if (call_ == nullptr) return;
  call_->complete();
  call_.reset();
}

void Request::give_up() noexcept {
  if (call_ == nullptr) return;
  call_->core->family->given_up = true;
  call_.reset();
}

Request& Request::operator=(Request&& other) noexcept {
  if (this != &other) {
    complete();
    call_ = std::move(other.call_);
  }
  return *this;
}

Request::~Request() { complete(); }

bool Request::test() {
  if (call_ == nullptr) return true;
  // Held here, so that a call that throws is let go.
  std::unique_ptr<comm::Call, Recycle> call = std::move(call_);
  if (call->test()) return true;
  call_ = std::move(call);
  return false;
}

void Request::wait() {
  const std::unique_ptr<comm::Call, Recycle> call = std::move(call_);
  if (call != nullptr) call->wait();
}

Communicator::Communicator() = default;
Communicator::Communicator(Communicator&&) noexcept = default;
Communicator& Communicator::operator=(Communicator&&) noexcept = default;
Communicator::~Communicator() = default;

Communicator::Communicator(std::unique_ptr<CommunicatorBackend> body)
    : Communicator(std::move(body), Options{}) {}

Communicator::Communicator(std::unique_ptr<CommunicatorBackend> body, Options options) {
  auto family = std::make_shared<comm::Family>(comm::Family{body->rank(), body->size(), false});
  core_ = std::make_shared<comm::Core>(std::move(body), std::move(options), std::move(family));
}

comm::Core& Communicator::core() const {
  if (core_ == nullptr)
    throw CommError("an empty communicator is used (moved from, or never made)");
  return *core_;
}

int Communicator::rank() const { return core().body->rank(); }
int Communicator::size() const { return core().body->size(); }
const char* Communicator::kind() const { return core().body->kind(); }
bool Communicator::dry() const { return core().body->dry(); }
bool Communicator::on_device() const { return core().body->on_device(); }
const Communicator::Options& Communicator::options() const { return core().options; }

void Communicator::set_timeout(double timeout_s) {
  Options o = options();
  o.timeout_s = timeout_s;
  core().set_options(std::move(o));
}

void Communicator::set_name(std::string name) { core().options.name = std::move(name); }

void Communicator::set_blocking(bool blocking) {
  Options o = options();
  o.blocking = blocking;
  core().set_options(std::move(o));
}

void Communicator::set_max_chunk(Index elements) {
  Options o = options();
  o.max_chunk = elements;
  core().set_options(std::move(o));
}

Request Communicator::start_all_reduce(Span data, ReduceOp op) {
  const comm::Core& c = core();
  const Checks check{c, Verb::all_reduce, data.bytes()};
  check.buffer(data, "data");
  const Index max_chunk = c.options.max_chunk;
  Start start{core_, Verb::all_reduce, data.bytes(),
              cost::all_reduce(data.count, size(), rank(), bytes_of(data.dtype), max_chunk)};
  comm::each_message(data.count, max_chunk, [&](Index begin, Index n) {
    start.add([&](auto& body) { return body.all_reduce(comm::slice(data, begin, n), op); });
  });
  return start.finish();
}

namespace {

/// Where a message of elements [begin, begin + n) of all parts meets each part.
/// @return the elements of part `own` that came before, in earlier messages.
Index cut_counts(std::span<const Index> counts, Index begin, Index n, int own,
                 std::vector<Index>& in_message) {
  in_message.resize(counts.size());
  Index before = 0;
  Index first = 0;
  for (std::size_t r = 0; r < counts.size(); ++r) {
    const Index last = first + counts[r];
    in_message[r] = std::max(Index{0}, std::min(last, begin + n) - std::max(first, begin));
    if (r == static_cast<std::size_t>(own)) before = std::clamp(begin - first, Index{0}, counts[r]);
    first = last;
  }
  return before;
}

}  // namespace

Request Communicator::start_reduce_scatter(ConstSpan send, std::span<const Index> counts,
                                           Span recv) {
  comm::Core& c = core();
  const Checks check{c, Verb::reduce_scatter, send.bytes()};
  const Index total = check.counts(counts);
  const auto me = static_cast<std::size_t>(rank());
  check.same_type(send, recv);
  check.buffer(send, "send");
  check.buffer(recv, "recv");
  check.count(send.count, total, "send");
  check.count(recv.count, counts[me], "recv");
  check.disjoint(send, recv);
  const Index max_chunk = c.options.max_chunk;
  Start start{core_, Verb::reduce_scatter, send.bytes(),
              cost::reduce_scatter(counts, rank(), bytes_of(send.dtype), max_chunk)};
  comm::each_message(total, max_chunk, [&](Index begin, Index n) {
    const Index before = cut_counts(counts, begin, n, rank(), c.message_counts);
    start.add([&](auto& body) {
      return body.reduce_scatter(comm::slice(send, begin, n), c.message_counts,
                                 comm::slice(recv, before, c.message_counts[me]));
    });
  });
  return start.finish();
}

Request Communicator::start_all_gather(ConstSpan send, std::span<const Index> counts, Span recv) {
  comm::Core& c = core();
  const Checks check{c, Verb::all_gather, recv.bytes()};
  const Index total = check.counts(counts);
  const auto me = static_cast<std::size_t>(rank());
  check.same_type(send, recv);
  check.buffer(send, "send");
  check.buffer(recv, "recv");
  check.count(send.count, counts[me], "send");
  check.count(recv.count, total, "recv");
  const Index own_begin = std::accumulate(counts.begin(), counts.begin() + rank(), Index{0});
  if (send.data != comm::slice(recv, own_begin, send.count).data) check.disjoint(send, recv);
  const Index max_chunk = c.options.max_chunk;
  Start start{core_, Verb::all_gather, recv.bytes(),
              cost::all_gather(counts, rank(), bytes_of(send.dtype), max_chunk)};
  comm::each_message(total, max_chunk, [&](Index begin, Index n) {
    const Index before = cut_counts(counts, begin, n, rank(), c.message_counts);
    start.add([&](auto& body) {
      return body.all_gather(comm::slice(send, before, c.message_counts[me]), c.message_counts,
                             comm::slice(recv, begin, n));
    });
  });
  return start.finish();
}

Request Communicator::start_all_to_all(ConstSpan send, std::span<const Index> send_counts,
                                       Span recv, std::span<const Index> recv_counts) {
  const comm::Core& c = core();
  const Checks check{c, Verb::all_to_all, send.bytes()};
  const auto me = static_cast<std::size_t>(rank());
  check.same_type(send, recv);
  check.buffer(send, "send");
  check.buffer(recv, "recv");
  check.count(send.count, check.counts(send_counts), "send");
  check.count(recv.count, check.counts(recv_counts), "recv");
  check.disjoint(send, recv);
  if (send_counts[me] != recv_counts[me]) {
    check.refuse("sends " + std::to_string(send_counts[me]) + " elements to itself, receives " +
                 std::to_string(recv_counts[me]));
  }
  const Index max_chunk = c.options.max_chunk;
  Start start{core_, Verb::all_to_all, send.bytes(),
              cost::all_to_all(send_counts, rank(), bytes_of(send.dtype), max_chunk)};
  start.add(
      [&](auto& body) { return body.all_to_all(send, send_counts, recv, recv_counts, max_chunk); });
  Index send_begin = 0;
  Index recv_begin = 0;
  for (std::size_t r = 0; r < send_counts.size(); ++r) {
    const auto other = static_cast<int>(r);
    for (Index done = max_chunk; done < recv_counts[r]; done += max_chunk) {
      const Index n = std::min(max_chunk, recv_counts[r] - done);
      const Span to = comm::slice(recv, recv_begin + done, n);
      if (r != me) {
        start.add([&](auto& body) { return body.receive(to, other, comm::rest_tag); });
      } else {
        start.add(
            [&](auto& body) { return body.copy(comm::slice(send, send_begin + done, n), to); });
      }
    }
    for (Index done = max_chunk; r != me && done < send_counts[r]; done += max_chunk) {
      const Index n = std::min(max_chunk, send_counts[r] - done);
      start.add([&](auto& body) {
        return body.send(comm::slice(send, send_begin + done, n), other, comm::rest_tag);
      });
    }
    send_begin += send_counts[r];
    recv_begin += recv_counts[r];
  }
  return start.finish();
}

void Communicator::broadcast(Span data, int root) {
  const comm::Core& c = core();
  const Checks check{c, Verb::broadcast, data.bytes()};
  check.buffer(data, "data");
  check.rank(root, "root");
  const Index max_chunk = c.options.max_chunk;
  Start start{core_, Verb::broadcast, data.bytes(),
              cost::broadcast(data.count, size(), rank(), root, bytes_of(data.dtype), max_chunk)};
  comm::each_message(data.count, max_chunk, [&](Index begin, Index n) {
    start.add([&](auto& body) { return body.broadcast(comm::slice(data, begin, n), root); });
  });
  start.finish().wait();
}

void Communicator::reduce(ConstSpan send, Span recv, ReduceOp op, int root) {
  const comm::Core& c = core();
  const Checks check{c, Verb::reduce, send.bytes()};
  check.buffer(send, "send");
  check.rank(root, "root");
  const bool here = root == rank();
  if (here) {
    check.same_type(send, recv);
    check.buffer(recv, "recv");
    check.count(recv.count, send.count, "recv");
    check.disjoint(send, recv);
  }
  const Index max_chunk = c.options.max_chunk;
  Start start{core_, Verb::reduce, send.bytes(),
              cost::reduce(send.count, size(), rank(), root, bytes_of(send.dtype), max_chunk)};
  comm::each_message(send.count, max_chunk, [&](Index begin, Index n) {
    const Span to = here ? comm::slice(recv, begin, n) : Span{nullptr, 0, send.dtype};
    start.add([&](auto& body) { return body.reduce(comm::slice(send, begin, n), to, op, root); });
  });
  start.finish().wait();
}

Request Communicator::start_send(ConstSpan data, int to, int tag) {
  const comm::Core& c = core();
  const Checks check{c, Verb::send, data.bytes()};
  check.buffer(data, "data");
  check.peer(to, tag);
  Start start{core_, Verb::send, data.bytes(),
              cost::send(data.count, bytes_of(data.dtype), c.options.max_chunk)};
  comm::each_message(data.count, c.options.max_chunk, [&](Index begin, Index n) {
    start.add([&](auto& body) { return body.send(comm::slice(data, begin, n), to, tag); });
  });
  return start.finish();
}

Request Communicator::start_receive(Span data, int from, int tag) {
  const comm::Core& c = core();
  const Checks check{c, Verb::receive, data.bytes()};
  check.buffer(data, "data");
  check.peer(from, tag);
  Start start{core_, Verb::receive, data.bytes(), Traffic{}};
  comm::each_message(data.count, c.options.max_chunk, [&](Index begin, Index n) {
    start.add([&](auto& body) { return body.receive(comm::slice(data, begin, n), from, tag); });
  });
  return start.finish();
}

void Communicator::barrier() {
  static_cast<void>(core());  // throws when there is none
  Start start{core_, Verb::barrier, 0, Traffic{0, 1}};
  start.add([](auto& body) { return body.barrier(); });
  start.finish().wait();
}

void Communicator::broadcast(std::string& text, int root) {
  auto length = static_cast<Index>(text.size());
  broadcast(Span{&length, 1, DType::i64}, root);
  text.resize(static_cast<std::size_t>(length));
  broadcast(Span{text.data(), length, DType::u8}, root);
}

std::vector<std::string> Communicator::all_gather_strings(const std::string& mine) {
  const auto ranks = static_cast<std::size_t>(size());
  const auto own = static_cast<Index>(mine.size());
  const std::vector<Index> ones(ranks, 1);
  std::vector<Index> lengths(ranks, own);  // what the ranks of a dry communicator would answer
  all_gather(ConstSpan{&own, 1, DType::i64}, ones,
             Span{lengths.data(), static_cast<Index>(ranks), DType::i64});
  const Index total = std::accumulate(lengths.begin(), lengths.end(), Index{0});
  std::string all(static_cast<std::size_t>(total), '\0');
  all_gather(ConstSpan{mine.data(), own, DType::u8}, lengths, Span{all.data(), total, DType::u8});
  std::vector<std::string> texts;
  std::size_t begin = 0;
  for (const Index n : lengths) {
    texts.push_back(dry() ? mine : all.substr(begin, static_cast<std::size_t>(n)));
    begin += static_cast<std::size_t>(n);
  }
  return texts;
}

Communicator Communicator::split(int color, int key, const std::string& name) {
  if (color < 0) throw CommError("split: color " + std::to_string(color) + " is negative");
  return comm::Core::child(*this, core().body->split(color, key), name);
}

Communicator Communicator::duplicate(const std::string& name) {
  return comm::Core::child(*this, core().body->duplicate(), name);
}

Traffic Communicator::traffic(TrafficClass c) const {
  return core().by_class[static_cast<std::size_t>(c)];
}

Traffic Communicator::traffic() const {
  return traffic(TrafficClass::payload) + traffic(TrafficClass::control) +
         traffic(TrafficClass::exceptional);
}

TrafficClass Communicator::set_traffic_class(TrafficClass c) {
  return std::exchange(core().traffic_class, c);
}

std::vector<std::pair<std::string, Traffic>> Communicator::traffic_by_call() const {
  std::vector<std::pair<std::string, Traffic>> calls;
  for (std::size_t v = 0; v < comm::verb_names.size(); ++v) {
    const Traffic t = core().by_verb[v];
    if (t.messages > 0) calls.emplace_back(comm::verb_names[v], t);
  }
  return calls;
}

}  // namespace orthrus
