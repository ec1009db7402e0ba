#pragma once
/// @file
/// What the tests may ask of a communicator whose ranks are threads.

#include <orthrus/communicator.hpp>

namespace orthrus::comm {

/// The bytes that really went between the buffers of rank `c.rank()` and those of other ranks, and
/// the calls it joined: counted where they are copied, from nothing that comm/cost.hpp knows.
///
/// A copy is counted once, at the rank runtime.md 4.1 counts it at: an all_gather (also that inside
/// an all_reduce) where it arrives, all else where it comes from. A call counts when it is
/// complete.
/// @throws CommError  `c` is not of kind "thread".
[[nodiscard]] Traffic thread_copied(const Communicator& c);
[[nodiscard]] Traffic thread_copied(const CommunicatorBackend& body);

}  // namespace orthrus::comm
