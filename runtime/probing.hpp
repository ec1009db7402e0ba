#pragma once
/// @file
/// How matrices are looked at whole (`diagnostics.spectra`): each meets on one rank, its analyst, a
/// bucket at a time; all ranks then have the numbers that describe it. Pure, as the plan is.

#include <orthrus/communicator.hpp>
#include <vector>

#include "runtime/plan.hpp"

namespace orthrus::runtime {

/// The next step that looks, after one that has: a multiple of `every`, and late enough that looks
/// are at most `budget` of the time. @param cost, step  ms of a look, and of a step without one
std::int64_t next_look(std::int64_t step, std::int64_t every, double cost, double step_ms,
                       double budget);

/// What of a matrix is looked at.
enum class Probe : std::uint8_t { gradient, momentum, weights, update };
inline constexpr std::array probes{Probe::gradient, Probe::momentum, Probe::weights, Probe::update};

/// Every logical matrix of a matrix rule, and every other parameter that has two dimensions or more
/// and two lines at least, in the order of parameters. A matrix that is whole on one rank stays
/// there; the rest are dealt, the costliest first.
std::vector<Probed> choose_probed(const Plan& plan);
/// Seconds that the rank with most to look at may take before others give it up: ten times what a
/// slow core needs.
double look_allowance_s(const Plan& plan);

/// One bucket's all_to_all over all ranks, in f32, of one thing about its matrices.
struct ProbeMeeting {
  std::vector<Index> sends, receives;  ///< per rank, elements
  std::vector<Index> departures;       ///< of each segment this rank has, in their order; -1: stays
  struct Arrival {
    int probed = 0;
    Region region;
    Index offset = 0;  ///< in what arrives
  };
  std::vector<Arrival> arrivals;  ///< ascending `probed`
  Index sent = 0, received = 0;
  bool happens = false;  ///< on any rank, and so on all
};
ProbeMeeting make_probe_meeting(const Plan& plan, const Bucket& b, int world_rank, Probe what);

/// One bucket's share of the noise in dual norms (`diagnostics.dual_noise`), over all ranks:
/// squares of the elements of every rank's own gradient, f32, to those who have their mean; Gram
/// matrices of its matrices of matrix rules, packed triangles in f64, to their analysts. Two
/// reduce_scatters.
struct NoiseMeeting {
  std::vector<Index> squares, triangles;  ///< per rank, elements
  std::vector<std::size_t> segments;      ///< of the bucket, in the order of `squares`
  std::vector<int> probed;                ///< in the order of `triangles`
  Index all_squares = 0, all_triangles = 0;
};
NoiseMeeting make_noise_meeting(const Plan& plan, const Bucket& b);
/// Can it be measured: has every rank one gradient of its own when a step begins?
bool measures_dual_noise(const Plan& plan);

/// Copies a piece of a parameter to its place in a dense matrix of it.
void place_piece(const float* piece, const Region& region, const Probed& matrix, float* whole);

/// The message in which all ranks get all numbers, f64: of each matrix; of what each parameter that
/// is looked at multiplied; two of the noise of each parameter; two of time.
struct ProbeTable {
  static constexpr Index spectrum = 10;  ///< of each of `probes`
  static constexpr Index quantiles = 5;  ///< of the momentum's singular values
  static constexpr Index moved = 8;      ///< singular values of the weights whose change is told
  static constexpr Index of_matrix = spectrum * std::ssize(probes) + 10 + quantiles + moved;
  std::vector<Index> activations;  ///< place of each parameter's; -1: it is not looked at
  Index noise = 0, times = 0, size = 0;
};
ProbeTable make_probe_table(const Plan& plan);

/// Traffic and memory of a step that looks, into `ranks`.
void add_probes(const Plan& plan, std::vector<RankPlan>& ranks);

}  // namespace orthrus::runtime
