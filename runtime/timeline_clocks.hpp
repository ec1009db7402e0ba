#pragma once
/// @file
/// Clocks: what ranks and their links have done until when. What a timeline is walked on.

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "runtime/timeline.hpp"

namespace orthrus::runtime {

inline std::size_t at(int i) { return static_cast<std::size_t>(i); }

/// Ranks that talk: first, first + stride, …, `size` of them.
struct Peers {
  int stride = 1, size = 1;
  [[nodiscard]] int first_of(int rank) const {
    return rank / (stride * size) * (stride * size) + rank % stride;
  }
};

/// One call of some peers.
struct Call {
  bool made = true;
  Collective kind = Collective::send;
  double most = 0;       ///< bytes the rank with most sends
  double messages = 1;   ///< of a rank
  std::int64_t all = 0;  ///< bytes all its ranks send
  double copied = 0;     ///< bytes a lone rank copies from one buffer to the other
};

/// The call of all ranks, peers with peers, on its way.
struct Flight {
  bool active = false;
  Phase phase = Phase::meet;
  int bucket = -1;
  Peers peers;
  Lane lane = Lane::node;
  std::vector<double> duration, end;    ///< per rank; end −1: its peers make no call
  std::vector<TimelineEvent> of_shown;  ///< per shown rank
};

/// Seconds of work on some ranks.
class Work {
 public:
  explicit Work(int ranks) : seconds_(at(ranks), 0) {}
  void add(int rank, double seconds) {
    if (seconds <= 0) return;
    if (seconds_[at(rank)] == 0) touched_.push_back(rank);
    seconds_[at(rank)] += seconds;
  }
  /// f(rank, seconds), and forgets them.
  template <class F>
  void drain(F&& f) {
    for (const int rank : touched_) f(rank, std::exchange(seconds_[at(rank)], 0));
    touched_.clear();
  }

 private:
  std::vector<double> seconds_;
  std::vector<int> touched_;
};

/// The largest of the peers' numbers, of which `x` is the first. Eight at a time: one after the
/// other each would wait for the one before, and this is where most of the walk's time goes.
inline double largest(const double* x, Peers peers) {
  double most = x[0];
  int i = 0;
  if (peers.stride == 1) {
    std::array<double, 8> lanes;
    lanes.fill(most);
    for (; i + 8 <= peers.size; i += 8) {
      for (int k = 0; k < 8; ++k) lanes[at(k)] = lanes[at(k)] < x[i + k] ? x[i + k] : lanes[at(k)];
    }
    most = *std::max_element(lanes.begin(), lanes.end());
  }
  for (; i < peers.size; ++i) most = std::max(most, x[Index{i} * peers.stride]);
  return most;
}

inline void fill(std::vector<double>& x, int first, Peers peers, double value) {
  if (peers.stride == 1) {
    std::fill_n(x.begin() + first, peers.size, value);
    return;
  }
  for (int i = 0; i < peers.size; ++i) x[at(first + i * peers.stride)] = value;
}

/// What all ranks have done until when.
class Clocks {
 public:
  Clocks(const MachineProfile& profile, const TimelineOptions& options, std::vector<int> shown,
         int ranks)
      : profile_(profile),
        ranks_(ranks),
        blocking_(options.blocking),
        progress_(!options.blocking && options.progress.value_or(profile.ranks_per_node > 0)),
        now_(at(ranks), 0),
        node_free_(at(ranks), 0),
        network_free_(at(ranks), 0),
        shown_(std::move(shown)),
        shown_at_(at(ranks), -1) {
    for (PhaseClock& phase : phases_) {
      for (auto* seconds : {&phase.compute, &phase.communication, &phase.exposed, &phase.waiting}) {
        seconds->assign(at(ranks), 0);
      }
    }
    for (std::size_t i = 0; i < shown_.size(); ++i) shown_at_[at(shown_[i])] = static_cast<int>(i);
  }

  [[nodiscard]] double now(int rank) const { return now_[at(rank)]; }

  void compute(int rank, Phase phase, int bucket, double seconds) {
    if (seconds <= 0) return;
    const double start = now_[at(rank)];
    now_[at(rank)] += seconds;
    phases_[static_cast<std::size_t>(phase)].compute[at(rank)] += seconds;
    if (shown_at_[at(rank)] >= 0) computed(rank, phase, bucket, start);
  }
  void compute(Phase phase, int bucket, Work& work) {
    work.drain([&](int rank, double seconds) { compute(rank, phase, bucket, seconds); });
  }
  /// The same on all ranks.
  void compute_all(Phase phase, int bucket, double seconds) {
    if (seconds <= 0) return;
    phases_[static_cast<std::size_t>(phase)].compute_all += seconds;
    for (double& now : now_) now += seconds;
    for (const int rank : shown_) computed(rank, phase, bucket, now_[at(rank)] - seconds);
  }

  /// All ranks make a call. @param call  call(first): of the peers whose first rank that is.
  /// @param sent  sent(rank): its bytes.
  template <class OfPeers, class OfRank>
  void start(Flight& f, Phase phase, int bucket, Peers peers, OfPeers&& call, OfRank&& sent) {
    f.active = true;
    f.phase = phase;
    f.bucket = bucket;
    f.peers = peers;
    f.duration.resize(now_.size());
    f.end.resize(now_.size());
    // Of ranks that lie s apart a node has fewer.
    const int per_node =
        profile_.ranks_per_node > 0 ? std::max(1, profile_.ranks_per_node / peers.stride) : 0;
    f.lane = per_node > 0 && per_node < peers.size ? Lane::network : Lane::node;
    const bool uses_node = f.lane == Lane::node || per_node > 1;
    const bool uses_network = f.lane == Lane::network;
    for_each_peers(peers, [&](int first) {
      const Call c = call(first);
      bytes_sent_[static_cast<std::size_t>(phase)] += c.all;
      const double seconds = !c.made          ? 0
                             : peers.size > 1 ? seconds_of(c, peers, per_node)
                             : c.copied > 0   ? pass_seconds(profile_, 2 * c.copied)
                                              : 0;
      double end = -1;
      if (c.made) {
        end = largest(&now_[at(first)], peers);
        if (uses_node) end = std::max(end, largest(&node_free_[at(first)], peers));
        if (uses_network) end = std::max(end, largest(&network_free_[at(first)], peers));
        end += seconds;
        if (progress_ && uses_node) fill(node_free_, first, peers, end);
        if (progress_ && uses_network) fill(network_free_, first, peers, end);
      }
      fill(f.duration, first, peers, seconds);
      fill(f.end, first, peers, end);
    });
    f.of_shown.clear();
    for (const int rank : shown_) {
      const double end = f.end[at(rank)];
      if (end < 0) continue;
      f.of_shown.push_back({rank, f.lane, phase, call(peers.first_of(rank)).kind, bucket,
                            end - f.duration[at(rank)], end, sent(rank)});
      if (progress_) happened(f.of_shown.back());
    }
    if (blocking_) wait(f);
  }

  /// Is it over on all ranks, seen from the one that is furthest?
  [[nodiscard]] bool is_over(const Flight& f) const {
    const Peers all{1, ranks_};
    return !f.active || (progress_ && largest(f.end.data(), all) <= largest(now_.data(), all));
  }

  /// All ranks wait. @param meanwhile  meanwhile(rank, until): what the rank may do instead.
  template <class Meanwhile>
  void wait(Flight& f, Meanwhile&& meanwhile) {
    if (!f.active) return;
    f.active = false;
    PhaseClock& clock = phases_[static_cast<std::size_t>(f.phase)];
    if (!progress_) {
      // It takes place when all of its ranks are here, and have done what they could meanwhile.
      for_each_peers(f.peers, [&](int first) {
        if (f.end[at(first)] < 0) return;
        const double last = largest(&now_[at(first)], f.peers);
        for (int i = 0; i < f.peers.size; ++i) meanwhile(first + i * f.peers.stride, last);
        fill(f.end, first, f.peers, largest(&now_[at(first)], f.peers) + f.duration[at(first)]);
      });
      for (TimelineEvent& e : f.of_shown) {
        e.end = f.end[at(e.rank)];
        e.start = e.end - f.duration[at(e.rank)];
        happened(e);
      }
    }
    for (int r = 0; r < ranks_ && progress_; ++r) meanwhile(r, f.end[at(r)]);
    for (std::size_t r = 0; r < now_.size(); ++r) {
      const double rest = std::max(0.0, f.end[r] - now_[r]);
      const double exposed = std::min(rest, f.duration[r]);
      clock.communication[r] += f.duration[r];
      clock.exposed[r] += exposed;
      clock.waiting[r] += rest - exposed;
      now_[r] += rest;
    }
  }
  void wait(Flight& f) {
    wait(f, [](int, double) {});
  }

  [[nodiscard]] Timeline result() {
    Timeline t;
    t.progress = progress_;
    t.seconds = *std::max_element(now_.begin(), now_.end());
    t.bytes_sent = bytes_sent_;
    t.shown = shown_;
    t.ranks.resize(now_.size());
    double most = -1;
    for (std::size_t r = 0; r < now_.size(); ++r) {
      double compute = 0;
      for (std::size_t p = 0; p < phase_count; ++p) {
        const PhaseClock& clock = phases_[p];
        t.ranks[r][p] = {clock.compute[r] + clock.compute_all, clock.communication[r],
                         clock.exposed[r], clock.waiting[r]};
        compute += t.ranks[r][p].compute;
      }
      if (compute > most) {
        most = compute;
        t.busiest = static_cast<int>(r);
      }
    }
    std::stable_sort(events_.begin(), events_.end(),
                     [](const TimelineEvent& a, const TimelineEvent& b) {
                       return std::tie(a.rank, a.lane, a.start) < std::tie(b.rank, b.lane, b.start);
                     });
    t.events = std::move(events_);
    return t;
  }

 private:
  struct PhaseClock {
    std::vector<double> compute, communication, exposed, waiting;
    double compute_all = 0;  ///< on every rank
  };

  template <class F>
  void for_each_peers(Peers peers, F&& f) const {
    for (int base = 0; base < ranks_; base += peers.stride * peers.size) {
      for (int i = 0; i < peers.stride; ++i) f(base + i);
    }
  }
  double seconds_of(const Call& c, Peers peers, int per_node) {
    // Nearly always the same as of the peers before.
    const auto key = std::tuple(c.kind, c.most, c.messages, peers.size, per_node);
    if (key != last_call_) {
      last_call_ = key;
      last_seconds_ =
          collective_seconds(profile_, c.kind, c.most, c.messages, peers.size, per_node);
    }
    return last_seconds_;
  }
  void computed(int rank, Phase phase, int bucket, double start) {
    events_.push_back(
        {rank, Lane::compute, phase, Collective::send, bucket, start, now_[at(rank)], 0});
  }
  void happened(const TimelineEvent& call) {
    if (call.end > call.start || call.bytes > 0) events_.push_back(call);
  }

  const MachineProfile& profile_;
  int ranks_;
  bool blocking_, progress_;
  std::vector<double> now_;
  std::vector<double> node_free_, network_free_;  ///< from when on
  std::array<PhaseClock, phase_count> phases_;
  std::array<std::int64_t, phase_count> bytes_sent_{};
  std::vector<int> shown_;
  std::vector<int> shown_at_;  ///< per rank: its place in `shown_`, or −1
  std::vector<TimelineEvent> events_;
  std::tuple<Collective, double, double, int, int> last_call_;
  double last_seconds_ = 0;
};

}  // namespace orthrus::runtime
