#pragma once
/// @file
/// LogGP: what a message between two ranks costs, apart from what it costs them (A. Alexandrov et
/// al., SPAA'95), from round trips alone (T. Hoefler, A. Lichei and W. Rehm, IPDPS'07).

#include <span>

namespace orthrus::studies {

/// Seconds from a rank's first send until its answer, a message of `bytes` as well, has come.
struct RoundTrips {
  double bytes = 1;
  double single = 0;   ///< one message, and the answer
  double burst = 0;    ///< `messages` at once, and one answer
  double delayed = 0;  ///< the same, with `delay` seconds of other work between two sends
  double messages = 2, delay = 0;
};

struct LogGp {
  double latency_s = 0;   ///< L, of the wire
  double overhead_s = 0;  ///< o, of the processor, for a send or a receive
  double gap_s = 0;       ///< g, between two messages at least
  double s_per_byte = 0;  ///< G, of long messages
  /// Of the processor, where it copies what it sends (LogGOPS' O): o + (bytes − 1)·O in all.
  double overhead_s_per_byte = 0;
  double rms_relative = 0;  ///< of the gaps g + (bytes − 1)·G
};
/// (burst − single)/(messages − 1) = g + (bytes − 1)·G by least squares of relative errors;
/// (delayed − single)/(messages − 1) − delay = o + (bytes − 1)·O by the same; single/2 = L + 2o +
/// (bytes − 1)·G at the fewest bytes. What comes out negative is 0.
/// @param samples  of 3 sizes or more; delays longer than the gap, or they show no overhead.
/// @throws ConfigError  naming what is missing.
[[nodiscard]] LogGp fit_loggp(std::span<const RoundTrips> samples);

}  // namespace orthrus::studies
