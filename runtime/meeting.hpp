#pragma once
/// @file
/// Meeting: how the pieces of a bucket's matrices meet, rank by rank. Pure: what is sent, in which
/// order it lies in the buffers, and how much room it takes. `meet.cpp` walks it.
///
/// Buffers of rank r, per bucket. Matrices are ordered by owner, then as in the plan:
/// - exchange: `mine` is r's pieces, which go to their owners; `theirs` the pieces of the matrices
///   r owns, from rank 0, 1, …, replaced by what they become; `back` r's pieces of that. Where G
///   meets, too, it lies behind X of the same piece, and what they become behind all that arrived.
/// - gather: `mine` is r's pieces (and of G), `theirs` all ranks'; `mine` takes the result.
/// - gram: `mine` is the packed triangle of every matrix, summed into the owners' `theirs`, where
///   their Q's replace them, followed with ECO by the roots that undo them, and by a factor per
///   line where the rule scales lines; `back` is all of that, owner by owner. A lone matrix is
///   summed on all ranks instead, and its Q replaces it in `mine`; where they share its terms,
///   those do, in their order.
/// - gram_steps: `mine` is the packed triangles, summed on all ranks; `theirs` r's pieces of Z, in
///   f32.
/// - block_cyclic: `mine` is r's pieces of Z, or of X and G; they go to the grid and come back
/// matrix
///   by matrix.

#include <vector>

#include "comm/block_cyclic.hpp"
#include "runtime/plan.hpp"

namespace orthrus::runtime {

/// Is the update done in panels, so that a piece is never copied whole?
constexpr bool is_panelled(optim::Mode mode) { return mode == optim::Mode::gram; }
/// Is it updated so quickly, where it meets nobody, that no other rank notices the wait?
inline bool is_brief(const Segment& s) { return s.matrix < 0 && s.size() <= Index{1} << 20; }
/// Elements of a panel of this segment: what its rank keeps of it in f32 beside the state.
Index panel_elements(const Plan& plan, const Bucket& b, const Segment& s);
/// How many elements are opened, worked on and rounded together.
Index opened_at_a_time(const Plan& plan);
/// The same of a compressed momentum, opened to f32; 0 where it is f32, and worked on where it
/// rests.
Index opened_elements(const Plan& plan, const Bucket& b, const Segment& s);
/// The same of panels of whole rows, in which a segment is rounded after its update.
Index rows_panel_elements(const Plan& plan, const Segment& s);
/// The same of panels of whole lines across the side that no piece cuts, whatever the mode.
Index lines_panel_elements(const Plan& plan, const MatrixPlan& m, const Segment& s);

/// Does the rank of `s` keep the numbers per line of its matrix?
bool keeps_lines_here(const Plan& plan, const Bucket& b, const Segment& s);

/// Do the ranks of a shard group keep even runs of this state of matrix m? In block_cyclic they do
/// of a triangle: it may be too large for one.
inline bool is_dealt(const MatrixPlan& m, const optim::StateSpec& state) {
  return m.mode == optim::Mode::block_cyclic && state.triangle_of(m.rows, m.cols) > 0;
}
/// What rank `shard` of a shard group keeps of a state of matrix m, if it keeps any.
comm::Run state_run(const Plan& plan, const MatrixPlan& m, const optim::StateSpec& state,
                    int shard);

/// Elements in the buffers of one rank.
struct MeetingSize {
  Index mine = 0;    ///< exchange, gather: its pieces. gram: all triangles of its replica
  Index theirs = 0;  ///< exchange: the matrices it owns. gather: all pieces. gram: its triangles
  Index own = 0;     ///< exchange: its pieces of what it owns
  Index back = 0, own_back = 0;  ///< gram: all Q's (or shared terms) of its replica, and its own
  Index pieces = 0;              ///< gram_steps: its pieces
  std::size_t undo = 0;          ///< ECO: bytes of what undoes the directions it makes
  Traffic grid;                  ///< block_cyclic: what its matrices' iterations send
  Index largest_piece = 0;
  int matrices = 0;  ///< that meet in its replica
};
/// What each rank of the shard group has of matrix m's Z. In which order Z's lines lie does not
/// matter to its Gram matrix: those of Y follow X's piece by piece.
std::vector<Region> pieces_of_z(const Plan& plan, const MatrixPlan& m);
/// Of every rank, by world rank.
std::vector<MeetingSize> meeting_sizes(const Plan& plan, const Bucket& b);

/// One rank's view of a meeting, with the counts its collectives need.
struct Meeting {
  struct Matrix {
    int matrix = 0;
    bool mine = false;      ///< this rank computes it
    Index triangle = 0;     ///< gram: its place among the triangles…
    Index back = 0;         ///< …its Q's in `back`…
    Index factors = 0;      ///< …and its line factors' there…
    Index root = 0;         ///< …and, with ECO, the root's
    std::size_t undo = 0;   ///< exchange, gather: of its direction, in bytes
    std::size_t first = 0;  ///< exchange, gather: its pieces among `arrivals`
    std::size_t last = 0;
  };
  struct Arrival {
    Region region;     ///< in the parameter
    Index offset = 0;  ///< in `theirs`
  };
  std::vector<Matrix> matrices;  ///< that meet in this rank's replica
  std::vector<Index> counts, theirs,
      back;  ///< per rank of the shard group, of one matrix of W's shape
  std::vector<Index> counts_brought, theirs_brought;  ///< the same of all that is brought
  std::vector<Arrival> arrivals;
  std::vector<Index>
      departures;  ///< place in `mine` of each of the rank's segments, in their order
  Index mine_size = 0, theirs_size = 0, back_size = 0;
};
Meeting make_meeting(const Plan& plan, const Bucket& b, int world_rank);

/// What rank w sends in one meeting. @param size  its entry of `meeting_sizes`.
/// @param brought  matrices of W's shape that go to where the direction is made.
Traffic meeting_traffic(const Plan& plan, const Bucket& b, int w, const MeetingSize& size,
                        int brought);
/// Bytes of `mine`, `theirs` and `back`.
std::size_t mine_bytes(const Bucket& b, const MeetingSize& size);
std::size_t theirs_bytes(const Bucket& b, const MeetingSize& size);
std::size_t back_bytes(const Bucket& b, const MeetingSize& size);
/// Scratch of one matrix for whoever computes it.
std::size_t meeting_scratch_bytes(const Plan& plan, const MatrixPlan& m);
/// Scratch of a piece before and after: what `send_grams`, say, cuts up.
std::size_t piece_scratch_bytes(const Plan& plan, const Bucket& b, const Segment& s);
/// Are the Gram matrices summed in f64 on their rank? Six iterations lift the rounding of an f32
/// sum above what mode gram promises (kernels/gram.hpp).
bool sums_grams_in_f64(const Group& group, optim::Mode mode);

}  // namespace orthrus::runtime
