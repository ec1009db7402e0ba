// Where a block-cyclic matrix lies, and what its ways there send: without MPI, for any number of
// ranks.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <orthrus/error.hpp>
#include <utility>
#include <vector>

#include "comm/block_cyclic.hpp"
#include "comm/process_grid.hpp"
#include "kernels/coefficients.hpp"
#include "optim/block_cyclic_msign.hpp"
#include "pieces.hpp"

namespace {

using namespace orthrus;
using namespace orthrus::pieces;
using comm::BlockCyclic;
using comm::Dealing;
using comm::GridShape;
using comm::ProcessGrid;

std::vector<kernels::Quintic> polar_express(int count) {
  return kernels::first_iterations(*kernels::find_coefficients("polar_express_101"), count);
}

TEST(Grid, IsAsSquareAsTheRanksAllow) {
  EXPECT_EQ(comm::grid_shape(1), (GridShape{1, 1}));
  EXPECT_EQ(comm::grid_shape(2), (GridShape{1, 2}));
  EXPECT_EQ(comm::grid_shape(3), (GridShape{1, 3}));
  EXPECT_EQ(comm::grid_shape(4), (GridShape{2, 2}));
  EXPECT_EQ(comm::grid_shape(7), (GridShape{1, 7}));
  EXPECT_EQ(comm::grid_shape(12), (GridShape{3, 4}));
  EXPECT_EQ(comm::grid_shape(4096), (GridShape{64, 64}));
}

TEST(Layout, GivesEveryElementOnePlace) {
  for (const int ranks : {1, 2, 3, 4, 6, 7, 12}) {
    for (const auto& [m, n] : shapes) {
      const BlockCyclic x = comm::block_cyclic(m, n, ranks);
      for (const BlockCyclic& layout : {x, comm::gram_layout(x)}) {
        Index total = 0;
        for (int r = 0; r < ranks; ++r) total += layout.local_size(r);
        ASSERT_EQ(total, layout.rows.extent * layout.cols.extent);
        for (Index i = 0; i < layout.rows.extent; i += 3) {
          for (Index j = 0; j < layout.cols.extent; j += 5) {
            const BlockCyclic::Place place = layout.place(i, j);
            ASSERT_LT(place.index, layout.local_size(place.rank));
            ASSERT_EQ(layout.element(place), std::pair(i, j));
          }
        }
      }
    }
  }
}

TEST(Layout, IsThereForFourThousandRanks) {
  const BlockCyclic x = comm::block_cyclic(16384, 53248, 4096);
  EXPECT_EQ(x.rows, (Dealing{16384, 128, 64}));
  EXPECT_EQ(x.cols, (Dealing{53248, 832, 64}));
  EXPECT_EQ(x.local_size(4095), 16384 * 53248 / 4096);
  Traffic most;
  for (int rank = 0; rank < 4096; rank += 41) {
    const Traffic t = optim::block_cyclic_msign_traffic(16384, 53248, 4096, rank, polar_express(5));
    most = {std::max(most.bytes, t.bytes), std::max(most.messages, t.messages)};
  }
  // Five iterations that move, per rank, at most m·n/q + m²/p for A, the same for A², and both
  // operands of the product; a mirror adds less than 2·m²/S.
  const Index m = 16384, n = 53248, q = 64;
  EXPECT_LE(most.bytes, 5 * 4 * (2 * m * n / q + 4 * m * m / q + 4 * m * m / 4096));
  EXPECT_GT(most.messages, 0);
}

TEST(Layout, RefusesPiecesThatAreNotTheMatrix) {
  const std::vector<Region> short_piece{{0, 1, 11, 11}};
  const std::vector<Region> beyond{{1, 1, 12, 12}};
  EXPECT_THROW((comm::Redistribution{3, 4, short_piece, 0}), ShapeError);
  EXPECT_THROW((comm::Redistribution{3, 4, beyond, 0}), ShapeError);
  EXPECT_THROW((comm::block_cyclic(0, 4, 1)), ShapeError);
}

TEST(Redistribution, AgreesOnCountsBetweenAllRanks) {
  for (const int ranks : {1, 2, 3, 4, 6, 12}) {
    for (const auto& [m, n] : shapes) {
      for (const Cut cut : {Cut::rows, Cut::columns, Cut::runs, Cut::alone}) {
        const std::vector<Region> pieces = pieces_of(m, n, ranks, cut);
        std::vector<comm::Redistribution> all;
        for (int r = 0; r < ranks; ++r) all.emplace_back(m, n, pieces, r);
        for (std::size_t a = 0; a < all.size(); ++a) {
          Index sent = 0;
          for (std::size_t b = 0; b < all.size(); ++b) {
            ASSERT_EQ(all[a].send_counts()[b], all[b].receive_counts()[a]);
            sent += all[a].send_counts()[b];
          }
          ASSERT_EQ(sent, all[a].piece_size());
        }
      }
    }
  }
}

// PBLAS's p?gemm picks one of three algorithms by an estimate of what they move (psgemm_.c); the
// estimates, for the calls ProcessGrid makes, on all grids and many shapes.
TEST(Grid, LeavesPblasOneChoiceOfAlgorithm) {
  const auto most = [](Index extent, const Dealing& d) {  // DNROC
    const Index blocks = (extent - 1) / d.block + 1;
    const Index rounds = (blocks - 1) / d.parts + 1;
    return static_cast<double>(rounds * d.block);
  };
  const auto gram_is_bc = [&](const BlockCyclic& x, Index height, Index width) {
    const bool tall = x.rows.parts > 1;
    const bool wide = x.cols.parts > 1;
    const Dealing across{x.rows.extent, x.rows.block, x.cols.parts};  // columns of C
    const double mp = most(height, x.rows);
    const double np = most(width, x.rows);
    const double nq = most(width, across);
    const double kq = most(x.cols.extent, x.cols);
    const double ab =
        static_cast<double>(x.cols.extent) * ((wide ? mp : 0) + (tall ? nq : 0) + std::max(nq, np));
    const double ac =
        static_cast<double>(height) * (1.3 * (wide ? np : 0) + std::max(np, nq) + (tall ? kq : 0));
    const double bc = static_cast<double>(width) * (1.3 * (wide ? mp : 0) + (tall ? kq : 0));
    return !(ab <= 1.3 * bc && ab <= 1.3 * ac) && bc <= ac && 1.3 * bc <= ab;
  };
  const auto product_is_ab = [&](const BlockCyclic& x, Index width) {
    const bool tall = x.rows.parts > 1;
    const bool wide = x.cols.parts > 1;
    const Dealing across{x.rows.extent, x.rows.block, x.cols.parts};  // columns of A
    const double mp = most(x.rows.extent, x.rows);
    const double nq = most(x.cols.extent, x.cols);
    const double kp = most(width, x.rows);
    const double kq = most(width, across);
    const double ab = static_cast<double>(width) * ((wide ? mp : 0) + (tall ? nq : 0));
    const double ac = static_cast<double>(x.rows.extent) *
                      ((wide ? kp : 0) + std::max(kp, kq) + 1.3 * (tall ? nq : 0));
    const double bc = static_cast<double>(x.cols.extent) *
                      (1.3 * (wide ? mp : 0) + (tall ? kq : 0) + std::max(kq, kp));
    return ab <= 1.3 * bc && ab <= 1.3 * ac;
  };
  const std::array<Index, 25> sides{1,   2,   3,   4,    5,    7,    9,    16,  31,
                                    32,  33,  64,  65,   99,   100,  127,  128, 129,
                                    200, 257, 500, 1000, 1025, 4096, 16384};
  for (const int ranks : {2, 3, 4, 5, 6, 8, 9, 12, 16, 24, 30, 64, 100, 120, 256, 1000, 4096}) {
    for (const Index side : sides) {
      for (const Index more : {Index{0}, Index{1}, side / 2, side, 3 * side, Index{100000}}) {
        const BlockCyclic x = comm::block_cyclic(side, side + more, ranks);
        if (side == 1 && more == 0) continue;  // one element: nothing moves, whatever is chosen
        for (Index j = 0; j < side; j += x.rows.block) {
          const Index width = std::min(x.rows.block, side - j);
          ASSERT_TRUE(product_is_ab(x, width)) << ranks << ": " << side << "+" << more;
          for (Index k = 0; k < width; k += comm::gram_panel) {
            const Index panel = std::min<Index>(comm::gram_panel, width - k);
            ASSERT_TRUE(gram_is_bc(x, side - j, panel))
                << ranks << ": " << side << "+" << more << " at " << j;
            ASSERT_TRUE(side == 1 || gram_is_bc(comm::gram_layout(x), side - j, panel))
                << ranks << ": " << side << "+" << more << " at " << j;
          }
        }
      }
    }
  }
}

TEST(Grid, RefusesRanksThatAreNotMpis) {
  Communicator self = self_communicator();
  Communicator dry = dry_communicator(4);
  for (const Communicator* c : {&self, &dry}) {
    try {
      const ProcessGrid grid{*c};
      ADD_FAILURE() << "a grid of ranks of kind " << c->kind();
    } catch (const ConfigError& e) {
      EXPECT_THAT(e.what(), testing::HasSubstr(
                                ProcessGrid::available() ? c->kind() : "ORTHRUS_WITH_SCALAPACK"));
      EXPECT_THAT(e.what(), testing::HasSubstr(ProcessGrid::available() ? "MPI" : "block_cyclic"));
    }
  }
}

}  // namespace
