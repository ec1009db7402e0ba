#pragma once
/// @file
/// Rounding that concerns several ranks: line 7 of a bucket in which pieces of a row share a scale,
/// or what undoes a direction is not where the error is. Pure: what lies where, and what is sent.
/// `round.cpp` walks it, when all segments of the bucket have been updated:
///
/// 1. the largest weights of shared rows meet (one all_reduce): all have the same scales;
/// 2. every rank rounds its pieces, and is left with E;
/// 3. ECO: E goes the way X went and C = P⁻¹E comes back as the direction did (exchange, gather,
///    periodic); or P⁻¹, of the side that no piece cuts, is where the pieces are (gram: it came
///    with Q; gram_steps, block_cyclic: one all_reduce of its triangle);
/// 4. the guard, and the Gram modes' bound of ‖M‖: norms of C and M are summed (one all_reduce of
/// two
///    numbers per matrix).

#include <vector>

#include "runtime/meeting.hpp"

namespace orthrus::runtime {

/// Do pieces of `bucket` wait for one another before they are rounded, or pulled back? Pure.
bool rounds_together(const Plan& plan, const Bucket& bucket);
/// Scales of matrix `m` (of an element-wise parameter that the trainer holds: m null) that pieces
/// on several ranks share: 0, 1 (tensor), or as many as it has rows.
Index shared_scales(const Plan& plan, int parameter, const MatrixPlan* m);
/// Columns at whose multiples a piece may be cut: of codes of weights or momentum that share a
/// byte, or a scale.
Index column_unit(const Group& group);

/// Elements (bytes where it says so) in the buffers of one rank.
struct RoundingSize {
  Index pieces = 0;      ///< f32: W̃, then E, then C
  Index scales = 0;      ///< f32, of its replica
  Index triangles = 0;   ///< f32: roots that are summed over pieces
  Index norms = 0;       ///< f64: ‖C‖², ‖M‖² of matrices
  std::size_t undo = 0;  ///< bytes: of pieces that are matrices of their own
  [[nodiscard]] std::size_t bytes() const;
};
/// Of every rank, by world rank. @pre rounds_together
std::vector<RoundingSize> rounding_sizes(const Plan& plan, const Bucket& b);

/// What rank w sends for it. @param meeting  its entry of `meeting_sizes`
Traffic rounding_traffic(const Plan& plan, const Bucket& b, int w, const RoundingSize& size,
                         const MeetingSize& meeting);
/// Of that, what mode periodic does not send where nothing meets.
Traffic rounding_traffic_of_meeting(const Plan& plan, const Bucket& b, int w,
                                    const RoundingSize& size, const MeetingSize& meeting);

/// One rank's view, places within the buffers.
struct Rounding {
  RoundingSize size;
  std::vector<Index> pieces, scales;  ///< of each of its segments, in their order; −1: not shared
  std::vector<std::size_t> undo;      ///< likewise
  std::vector<Index> triangles;       ///< of each matrix of its meeting, in its order
};
Rounding make_rounding(const Plan& plan, const Bucket& b, int world_rank);

}  // namespace orthrus::runtime
