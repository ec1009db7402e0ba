#pragma once
/// @file
/// StartWindow: ranks that begin at one moment of a common clock. A barrier lets them go one after
/// the other; what is timed then has that skew in it (T. Hoefler and R. Belli, SC'15).

#include <functional>
#include <orthrus/communicator.hpp>

namespace orthrus::cli {

class StartWindow {
 public:
  using Clock = std::function<double()>;  ///< seconds of this rank, from anywhere on
  /// Compares every rank's clock with rank 0's by twenty round trips, of which the quickest counts.
  /// Collective.
  explicit StartWindow(Communicator& ranks, Clock clock = steady);
  /// Rank 0 names a moment, all wait for it. The moment is farther ahead after one that somebody
  /// was late for. Collective. @return how late this rank begins, in seconds.
  double wait();
  /// What is to be added to this rank's clock for rank 0's; known to half of `round_trip`.
  [[nodiscard]] double offset() const { return offset_; }
  [[nodiscard]] double round_trip() const { return round_trip_; }

  static double steady();

 private:
  void compare();

  Communicator& ranks_;
  const Clock clock_;
  double offset_ = 0, round_trip_ = 0;
  double lead_ = 0, late_ = 0;
};

}  // namespace orthrus::cli
