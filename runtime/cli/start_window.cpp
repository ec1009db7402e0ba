#include "runtime/cli/start_window.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>

namespace orthrus::cli {
namespace {

constexpr int tag = 1;
constexpr double tolerated_s = 20e-6;  // of lateness, and the least lead
constexpr double longest_s = 10e-3;    // where ranks share processors somebody is always late

Span one(double& value) { return {&value, 1, DType::f64}; }

}  // namespace

double StartWindow::steady() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

StartWindow::StartWindow(Communicator& ranks, Clock clock)
    : ranks_(ranks), clock_(std::move(clock)) {
  compare();
  double longest = round_trip_;
  ranks_.all_reduce(std::span<double>(&longest, 1), ReduceOp::max);
  double hops = 1;  // of a broadcast's tree
  for (int reached = 1; reached < ranks_.size(); reached *= 2) ++hops;
  lead_ = tolerated_s + hops * longest;
}

/// With rank 0, one rank after the other: nobody else is on the wire.
void StartWindow::compare() {
  constexpr int rounds = 20;
  for (int rank = 1; rank < ranks_.size(); ++rank) {
    ranks_.barrier();
    double ping = 0;
    for (int k = 0; k < rounds && ranks_.rank() == 0; ++k) {
      ranks_.receive(one(ping), rank, tag);
      double now = clock_();
      ranks_.send(one(now), rank, tag);
    }
    double best = std::numeric_limits<double>::infinity();
    for (int k = 0; k < rounds && ranks_.rank() == rank; ++k) {
      double there = 0;
      const double before = clock_();
      ranks_.send(one(ping), 0, tag);
      ranks_.receive(one(there), 0, tag);
      const double after = clock_();
      if (after - before >= best) continue;
      best = round_trip_ = after - before;
      offset_ = there - (before + after) / 2;
    }
  }
}

double StartWindow::wait() {
  double latest = late_;
  ranks_.all_reduce(std::span<double>(&latest, 1), ReduceOp::max);
  if (latest > tolerated_s) lead_ = std::min(2 * lead_, longest_s);
  double moment = clock_() + lead_;
  ranks_.broadcast(std::span<double>(&moment, 1), 0);
  double now = clock_() + offset_;
  while (now < moment) now = clock_() + offset_;
  late_ = now - moment;
  return late_;
}

}  // namespace orthrus::cli
