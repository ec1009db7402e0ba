#pragma once
/// @file
/// Core: what a `Communicator` and its calls in flight share.

#include <array>
#include <cstdint>
#include <memory>
#include <orthrus/communicator.hpp>
#include <string>
#include <vector>

#include "comm/pool.hpp"

namespace orthrus::comm {

/// The kinds of call that are counted apart.
enum class Verb : std::uint8_t {
  all_reduce,
  reduce_scatter,
  all_gather,
  all_to_all,
  broadcast,
  reduce,
  send,
  receive,
  barrier,
  grid  // what ScaLAPACK sends beside the communicator
};
inline constexpr std::array<const char*, 10> verb_names{
    "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast",
    "reduce",     "send",           "receive",    "barrier",    "grid"};

/// Shared by all communicators split from one: the rank that errors name, and whether a call was
/// given up.
struct Family {
  int rank = 0;
  int size = 1;
  bool given_up = false;
};

/// One call: the messages it was cut into. Lives in its core's pool; `core` is set while it is in
/// flight.
struct Call {
  Call() { messages.reserve(16); }  // more than one message is rare
  /// @return complete. @throws CommError  the body failed; the message says which call.
  bool test();
  /// @throws CommError  as `test`, or the deadline passed.
  void wait();
  /// Waits without a throw, unless waiting is pointless.
  void complete() noexcept;
  void recycle() noexcept;
  /// The call as the caller of `start_*` holds it.
  static Request request(Call* call);

  std::shared_ptr<Core> core;
  std::vector<CommunicatorBackend::Done> messages;
  std::size_t complete_messages = 0;
  Verb verb = Verb::barrier;
  std::size_t bytes = 0;
};

struct Core {
  Core(std::unique_ptr<CommunicatorBackend> body_, Communicator::Options options_,
       std::shared_ptr<Family> family_);

  /// The body behind `c`. @throws CommError  `c` is empty.
  static CommunicatorBackend& body_of(const Communicator& c);
  /// Adds what another library sent between the ranks of `c` to its traffic.
  static void count(const Communicator& c, Traffic t);
  /// A communicator over `body` that inherits from `parent` as one split from it does.
  static Communicator child(const Communicator& parent, std::unique_ptr<CommunicatorBackend> body,
                            const std::string& name);

  void count(Verb verb, Traffic t) noexcept;
  void set_options(Communicator::Options o);
  /// "[rank 3/16] reduce_scatter of 33554432 bytes on world.shard: " + `problem`.
  [[nodiscard]] std::string describe(Verb verb, std::size_t bytes,
                                     const std::string& problem) const;

  // First the pool, whose idle calls need nothing; the body goes before it.
  Pool<Call> calls;
  std::unique_ptr<CommunicatorBackend> body;
  Communicator::Options options;
  std::shared_ptr<Family> family;
  TrafficClass traffic_class = TrafficClass::payload;
  std::array<Traffic, 4> by_class{};
  std::array<Traffic, verb_names.size()> by_verb{};
  std::vector<Index> message_counts, receive_counts;  // scratch of `start_*`
};

}  // namespace orthrus::comm
