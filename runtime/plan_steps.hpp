#pragma once
/// @file
/// The steps of `make_plan`, in order: where matrices meet, where everything lies, what it costs.

#include <vector>

#include "runtime/machine.hpp"
#include "runtime/plan.hpp"

namespace orthrus::runtime {

/// What mode `auto` looks for.
enum class Preference : std::uint8_t {
  fastest,
  sharded,  ///< the fastest of those in which no matrix rests on one rank
  leanest   ///< the least memory on any rank
};

struct Placement {
  std::vector<double> shares;  ///< of the element-wise parameters, per slot
  double least_unit = 0;       ///< elements that take as long as one call of none
  bool had_choice = false;     ///< did any matrix have more than one mode to choose from?
};
/// Mode and owner of every matrix.
/// @throws ConfigError  a mode was named that cannot be: the message names parameter and reason.
Placement place(const MachineProfile& profile, Preference preference, Plan& plan);

/// Buckets, their parts and segments, and the order in which a step walks them.
void lay_out(const Placement& placement, Plan& plan);

/// Bytes, messages, memory and seconds of every rank.
void predict(const MachineProfile& profile, Plan& plan);

/// Bytes of state of a rows×cols piece (per line state of a whole matrix included).
std::size_t state_bytes(const Group& g, Index rows, Index cols);
/// Of one element, with its share of a scale.
double state_bytes_per_element(const Group& g);
/// Bytes an element-wise update moves per element: gradient, weights and state, read and written.
double pass_bytes(const Group& g);
/// The LMO of a whole rows×cols matrix on one rank.
double lmo_seconds(const MachineProfile& profile, const Group& g, Index rows, Index cols);
/// ECO, of a spectral LMO of a whole matrix: its root, and the products with it. Else 0.
double feedback_seconds(const MachineProfile& profile, const Group& g, Index rows, Index cols);
/// ECO: what the rank of a piece of m does to find its correction, where m does not rest on one.
double undo_seconds(const Plan& plan, const MachineProfile& profile, const MatrixPlan& m,
                    const Segment& piece);
/// Do the weights of a segment rest as codes and scales, in a shard or with the trainer?
bool rests_as_codes(const Plan& plan, const Segment& s);
/// Do the weights of a segment lie somewhere as a matrix of their format?
bool rests_in_place(const Plan& plan, const Bucket& b, const Segment& s);
/// Bytes of what a panel's weights are rounded to on their way to where they rest.
std::size_t narrowed_bytes(const Plan& plan, const Bucket& b, const Segment& s);
/// What whoever computes matrix m does, beside its piece.
double compute_seconds(const Plan& plan, const MachineProfile& profile, const MatrixPlan& m);
/// How much of it: all, or rank w's share of the terms. Rank 0's is the largest.
double computed_share(const Plan& plan, const MatrixPlan& m, int w);
/// What the rank of a piece of m does with it, in and after the meeting.
double piece_seconds(const Plan& plan, const MachineProfile& profile, const MatrixPlan& m,
                     const Segment& piece);

/// Has its rule a number per line?
bool keeps_lines(const Group& g);
/// Is there one matrix only, without numbers per line or ECO? In mode gram all ranks compute it.
bool has_lone_matrix(const Plan& plan);
/// Of `terms` that a shard group shares in their order: how many shard rank s computes.
constexpr int terms_of(int terms, int shard, int s) {
  return terms / shard + (s < terms % shard ? 1 : 0);
}

/// Pieces of matrix m on shard rank s of `shard`: none, one, or (where a held part begins or ends
/// inside a row) up to three.
std::vector<Region> pieces(const Plan& plan, const MatrixPlan& m, int s);
/// Does every rank hold whole columns (or whole rows) of the matrix? What `gram` needs.
/// @param[out] of_rows  whole columns: the Gram matrix is of the rows
bool cut_along_lines(const Plan& plan, const MatrixPlan& m, bool& of_rows);

}  // namespace orthrus::runtime
