// A matrix on a ScaLAPACK grid: the way there and back, msign against an SVD, and every byte.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <optional>
#include <orthrus/mpi.hpp>
#include <string>
#include <utility>
#include <vector>

#include "comm/block_cyclic.hpp"
#include "comm/process_grid.hpp"
#include "kernels/backend.hpp"
#include "kernels/coefficients.hpp"
#include "optim/block_cyclic_msign.hpp"
#include "pieces.hpp"
#include "support/count_new.hpp"
#include "support/pmpi_counter.hpp"
#include "support/zoo.hpp"

extern "C" {
void pb_topget_(const int* context, const char* operation, const char* scope, char* topology);
void pb_topset_(const int* context, const char* operation, const char* scope, const char* topology);
void pdgesvd_(const char* job_u, const char* job_v, const int* m, const int* n, double* a,
              const int* ia, const int* ja, const int* desc_a, double* s, double* u, const int* iu,
              const int* ju, const int* desc_u, double* vt, const int* ivt, const int* jvt,
              const int* desc_vt, double* work, const int* work_size, int* info);
void pdgemm_(const char* op_a, const char* op_b, const int* m, const int* n, const int* k,
             const double* alpha, const double* a, const int* ia, const int* ja, const int* desc_a,
             const double* b, const int* ib, const int* jb, const int* desc_b, const double* beta,
             double* c, const int* ic, const int* jc, const int* desc_c);
}

namespace {

using namespace orthrus;
using namespace orthrus::pieces;
using comm::BlockCyclic;
using comm::GridShape;
using comm::ProcessGrid;
using optim::BlockCyclicMsign;

std::vector<kernels::Quintic> polar_express(int count) {
  return kernels::first_iterations(*kernels::find_coefficients("polar_express_101"), count);
}
const double safety = kernels::find_coefficients("polar_express_101")->safety;

class OnGrid : public testing::Test {
 protected:
  void SetUp() override {
    world.emplace(borrow(MPI_COMM_WORLD));
    grid.emplace(*world);
  }

  /// This rank's piece of msign(x).
  std::vector<float> msign(const zoo::Dense<float>& x, Cut cut,
                           const std::vector<kernels::Quintic>& iterations) {
    const std::vector<Region> pieces = pieces_of(x.rows, x.cols, world->size(), cut);
    BlockCyclicMsign plan{x.rows, x.cols, pieces, world->rank()};
    std::vector<float> piece = piece_of(x, pieces[static_cast<std::size_t>(world->rank())]);
    // NaN, so that whoever reads what was not written is found.
    std::vector<float> work(plan.workspace_bytes() / sizeof(float),
                            std::numeric_limits<float>::quiet_NaN());
    EXPECT_EQ(plan.workspace_bytes(),
              optim::block_cyclic_msign_workspace_bytes(
                  x.rows, x.cols, static_cast<Index>(piece.size()), world->size(), world->rank()));
    const Traffic before = world->traffic();
    pmpi::reset();
    plan(piece.data(), iterations, safety, {}, std::as_writable_bytes(std::span(work)), *grid,
         *world, *backend);
    const pmpi::Sent sent = pmpi::read();
    const Traffic predicted = plan.traffic(iterations);
    EXPECT_EQ((Traffic{sent.bytes, sent.messages}), predicted)
        << x.rows << "x" << x.cols << ": MPI " << sent.bytes << " B in " << sent.messages
        << ", predicted " << predicted.bytes << " B in " << predicted.messages;
    EXPECT_EQ(world->traffic() - before, predicted);
    EXPECT_EQ(predicted, comm::Redistribution::traffic_of(
                             x.rows, x.cols, pieces[static_cast<std::size_t>(world->rank())],
                             world->size(), world->rank()) +
                             optim::block_cyclic_msign_traffic(x.rows, x.cols, world->size(),
                                                               world->rank(), iterations));
    return piece;
  }

  /// ‖piece − expected‖/‖expected‖ over all ranks.
  double error(const std::vector<float>& piece, const zoo::Matrix& expected, Cut cut) {
    const std::vector<Region> pieces = pieces_of(expected.rows, expected.cols, world->size(), cut);
    const Region& region = pieces[static_cast<std::size_t>(world->rank())];
    std::array<double, 2> sums{};
    std::size_t k = 0;
    for (Index i = 0; i < region.rows; ++i) {
      for (Index j = 0; j < region.cols; ++j, ++k) {
        const double e =
            expected.data[static_cast<std::size_t>(region.first + i * region.distance + j)];
        sums[0] += (piece[k] - e) * (piece[k] - e);
        sums[1] += e * e;
      }
    }
    world->all_reduce(std::span<double>(sums));
    return std::sqrt(sums[0] / sums[1]);
  }

  std::optional<Communicator> world;
  std::optional<ProcessGrid> grid;
  std::unique_ptr<kernels::Backend> backend = kernels::open_backend("cpu");
};

TEST_F(OnGrid, PiecesGoToTheirPlacesAndBack) {
  const int me = world->rank();
  for (const auto& [m, n] : shapes) {
    zoo::Dense<float> x(m, n);
    for (std::size_t i = 0; i < x.data.size(); ++i) x.data[i] = static_cast<float>(i + 1);
    for (const Cut cut : {Cut::rows, Cut::columns, Cut::runs, Cut::alone}) {
      const std::vector<Region> pieces = pieces_of(m, n, world->size(), cut);
      comm::Redistribution move{m, n, pieces, me};
      const std::vector<float> piece = piece_of(x, pieces[static_cast<std::size_t>(me)]);
      const auto size = static_cast<std::size_t>(std::max(move.local_size(), move.piece_size()));
      std::vector<float> local(size), scratch(size), back(piece.size());
      pmpi::reset();
      move.to_grid(piece.data(), local.data(), scratch.data(), local.data(), *world);
      for (Index e = 0; e < move.local_size(); ++e) {
        const auto [i, j] = move.layout().element({me, e});
        ASSERT_EQ(local[static_cast<std::size_t>(e)], m > n ? x(j, i) : x(i, j));
      }
      move.from_grid(local.data(), scratch.data(), local.data(), back.data(), *world);
      EXPECT_EQ(back, piece);
      const pmpi::Sent sent = pmpi::read();
      EXPECT_EQ((Traffic{sent.bytes, sent.messages}), move.traffic(0x7fffffff));
    }
  }
}

TEST_F(OnGrid, MirrorMakesTheMatrixSymmetric) {
  const int me = world->rank();
  for (const auto& [m, n] : shapes) {
    const BlockCyclic layout = comm::gram_layout(comm::block_cyclic(m, n, world->size()));
    comm::Mirror mirror{layout, me};
    std::vector<float> local(static_cast<std::size_t>(layout.local_size(me)), -1);
    std::vector<float> scratch(static_cast<std::size_t>(mirror.scratch_size()));
    const auto value = [&](Index i, Index j) {
      return static_cast<float>(std::max(i, j) * 1000 + std::min(i, j));
    };
    for (std::size_t e = 0; e < local.size(); ++e) {
      const auto [i, j] = layout.element({me, static_cast<Index>(e)});
      if (i >= j) local[e] = value(i, j);
    }
    mirror(local.data(), scratch.data(), *world);
    for (std::size_t e = 0; e < local.size(); ++e) {
      const auto [i, j] = layout.element({me, static_cast<Index>(e)});
      ASSERT_EQ(local[e], value(i, j)) << i << ", " << j;
    }
  }
}

TEST_F(OnGrid, PredictsEveryByteAndMessageScalapackSends) {
  const std::vector<Cut> cuts{Cut::rows, Cut::columns, Cut::runs, Cut::alone};
  std::size_t cut = 0;
  for (const auto& [m, n] : shapes) {
    const auto x = zoo::cast<float>(zoo::gaussian(m, n, 3));
    const Cut c = cuts[cut++ % cuts.size()];
    for (const int count : {1, 2}) msign(x, c, polar_express(count));
    msign(x, c, {{1.5, -0.5, 0.0}});  // a cubic: no A²
  }
}

// PBLAS keeps topologies for the whole process.
TEST_F(OnGrid, SendsTheSameWhateverTopologyTheTrainerHasSet) {
  const auto x = zoo::cast<float>(zoo::gaussian(70, 90, 3));
  const int context = grid->context();
  for (const char* operation : {"Broadcast", "Combine"}) {
    for (const char* scope : {"Row", "Column"}) pb_topset_(&context, operation, scope, "1");
  }
  const std::vector<float> piece = msign(x, Cut::rows, polar_express(2));
  for (const char* operation : {"Broadcast", "Combine"}) {
    for (const char* scope : {"Row", "Column"}) {
      char topology = '?';
      pb_topget_(&context, operation, scope, &topology);
      EXPECT_EQ(topology, '1') << operation << " " << scope;
      pb_topset_(&context, operation, scope, " ");
    }
  }
  EXPECT_EQ(msign(x, Cut::rows, polar_express(2)), piece);
}

TEST_F(OnGrid, SharesAProcessWithOtherGrids) {
  const auto x = zoo::cast<float>(zoo::gaussian(70, 90, 3));
  Communicator half = world->split(world->rank() % 2, world->rank(), "half");
  const ProcessGrid second{half};
  EXPECT_EQ(second.shape(), comm::grid_shape(half.size()));
  msign(x, Cut::columns, polar_express(2));
}

TEST_F(OnGrid, MsignIsThatOfAnExactSvd) {
  const std::vector<kernels::Quintic> iterations = polar_express(5);
  struct Case {
    const char* name;
    zoo::Matrix x;
    double bound;
  };
  // runtime.md 9: f32, 1e-4 on every spectrum.
  const std::vector<Case> cases{{"gaussian", zoo::gaussian(48, 80, 1), 1e-4},
                                {"tall", zoo::gaussian(90, 41, 2), 1e-4},
                                {"flat", zoo::flat(40, 64, 3), 1e-4},
                                {"1e4", zoo::condition(64, 48, 1e4, 4), 1e-4},
                                {"power law", zoo::power_law(37, 53, 5), 1e-4},
                                {"rank 5", zoo::rank_deficient(33, 47, 5, 6), 1e-4},
                                {"1e30", zoo::huge(20, 30, 7), 1e-4},
                                {"1e-30", zoo::tiny(20, 30, 8), 1e-4}};
  for (const Case& c : cases) {
    const auto x = zoo::cast<float>(c.x);
    const zoo::Matrix exact = zoo::cast<double>(x);
    const zoo::Matrix expected =
        zoo::polynomial_oracle(exact, iterations, safety * zoo::frobenius(exact));
    for (const Cut cut : {Cut::rows, Cut::runs}) {
      const double e = error(msign(x, cut, iterations), expected, cut);
      EXPECT_LE(e, c.bound) << c.name;
      if (cut == Cut::rows && world->rank() == 0) {
        std::printf("  %-10s error %.2e\n", c.name, e);
      }
    }
  }
}

TEST_F(OnGrid, ZeroStaysZeroAndNaNIsCarriedThrough) {
  for (const float v : msign(zoo::Dense<float>(20, 31), Cut::rows, polar_express(3))) {
    ASSERT_EQ(v, 0);
  }
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    auto x = zoo::cast<float>(zoo::gaussian(20, 31, 1));
    x(19, 30) = bad;
    for (const float v : msign(x, Cut::rows, polar_express(3))) ASSERT_TRUE(std::isnan(v));
  }
}

TEST_F(OnGrid, GivesTheSameBitsInEveryRun) {
  const auto x = zoo::cast<float>(zoo::gaussian(150, 170, 1));
  const std::vector<float> first = msign(x, Cut::rows, polar_express(5));
  for (int run = 0; run < 3; ++run) EXPECT_EQ(msign(x, Cut::rows, polar_express(5)), first);
}

// The distributed judge: ScaLAPACK's own SVD, in f64, on the same grid and layout.
TEST_F(OnGrid, MsignIsThatOfScalapacksSvd) {
  const int m = 96, n = 160, side = 96, one = 1;
  const int me = world->rank();
  std::vector<double> sigma;
  for (int i = 0; i < side; ++i) sigma.push_back(std::pow(1e3, -i / 95.0));
  const auto x = zoo::cast<float>(zoo::with_spectrum(m, n, sigma, 9).matrix());
  // p?gesvd wants square blocks.
  const GridShape shape = grid->shape();
  const auto square_blocks = [&](Index rows, Index cols) {
    return BlockCyclic{{rows, 16, shape.rows}, {cols, 16, shape.cols}};
  };
  const auto descriptor = [&](const BlockCyclic& layout) {
    return std::array<int, 9>{1,
                              grid->context(),
                              static_cast<int>(layout.rows.extent),
                              static_cast<int>(layout.cols.extent),
                              16,
                              16,
                              0,
                              0,
                              static_cast<int>(std::max<Index>(1, layout.local_rows(me)))};
  };
  const auto array = [&](const BlockCyclic& layout) {
    return std::vector<double>(static_cast<std::size_t>(std::max<Index>(1, layout.local_size(me))));
  };
  const BlockCyclic of_x = square_blocks(m, n), of_u = square_blocks(m, side),
                    of_v = square_blocks(side, n);
  std::vector<double> a = array(of_x), u = array(of_u), vt = array(of_v);
  for (Index e = 0; e < of_x.local_size(me); ++e) {
    const auto [i, j] = of_x.element({me, e});
    a[static_cast<std::size_t>(e)] = x(i, j);
  }
  std::vector<double> s(side), work(1);
  const auto desc_x = descriptor(of_x), desc_u = descriptor(of_u), desc_v = descriptor(of_v);
  int info = 0;
  for (int size : {-1, 0}) {
    if (size == 0) {
      size = static_cast<int>(work[0]);
      work.resize(static_cast<std::size_t>(size));
    }
    pdgesvd_("V", "V", &m, &n, a.data(), &one, &one, desc_x.data(), s.data(), u.data(), &one, &one,
             desc_u.data(), vt.data(), &one, &one, desc_v.data(), work.data(), &size, &info);
    ASSERT_EQ(info, 0);
  }
  for (int i = 0; i < side; ++i) {
    EXPECT_NEAR(s[static_cast<std::size_t>(i)], sigma[static_cast<std::size_t>(i)], 1e-6);
  }
  // U·p(Σ/ν)·Vᵀ
  const std::vector<kernels::Quintic> iterations = polar_express(5);
  double squares = 0;
  for (const double v : s) squares += v * v;
  const double nu = safety * std::sqrt(squares);
  for (Index e = 0; e < of_u.local_size(me); ++e) {
    const Index j = of_u.element({me, e}).second;
    u[static_cast<std::size_t>(e)] *=
        zoo::composed(iterations, s[static_cast<std::size_t>(j)] / nu);
  }
  const double unit = 1, nothing = 0;
  pdgemm_("N", "N", &m, &n, &side, &unit, u.data(), &one, &one, desc_u.data(), vt.data(), &one,
          &one, desc_v.data(), &nothing, a.data(), &one, &one, desc_x.data());
  zoo::Matrix expected(m, n);
  for (Index e = 0; e < of_x.local_size(me); ++e) {
    const auto [i, j] = of_x.element({me, e});
    expected(i, j) = a[static_cast<std::size_t>(e)];
  }
  world->all_reduce(std::span<double>(expected.data));
  const double e = error(msign(x, Cut::runs, iterations), expected, Cut::runs);
  EXPECT_LE(e, 1e-4);
  if (me == 0) std::printf("  against pdgesvd: error %.2e\n", e);
}

TEST_F(OnGrid, AllocatesNothingInSteadyState) {
  const auto x = zoo::cast<float>(zoo::gaussian(60, 75, 1));
  const std::vector<Region> pieces = pieces_of(60, 75, world->size(), Cut::rows);
  BlockCyclicMsign plan{60, 75, pieces, world->rank()};
  std::vector<float> piece = piece_of(x, pieces[static_cast<std::size_t>(world->rank())]);
  std::vector<std::byte> work(plan.workspace_bytes());
  const std::vector<kernels::Quintic> iterations = polar_express(3);
  const auto step = [&] {
    plan(piece.data(), iterations, safety, {}, work, *grid, *world, *backend);
  };
  for (int i = 0; i < 3; ++i) step();
  world->barrier();
  const long before = count_new::calls;
  for (int i = 0; i < 5; ++i) step();
  EXPECT_EQ(count_new::calls - before, 0);
}

TEST_F(OnGrid, CountsApartWhatWentBesideTheCommunicator) {
  Communicator fresh = world->duplicate("fresh");
  comm::BlockCyclic layout = comm::block_cyclic(40, 60, fresh.size());
  const auto size = static_cast<std::size_t>(layout.local_size(fresh.rank()));
  const auto square = static_cast<std::size_t>(comm::gram_layout(layout).local_size(fresh.rank()));
  std::vector<float> x(size, 1), a(square, 0), y(size, 2);
  const ProcessGrid own{fresh};
  own.gram(1, layout, x.data(), 0, a.data(), fresh);
  own.multiply(1, a.data(), layout, x.data(), 1, y.data(), fresh);
  const Traffic t =
      comm::gram_traffic(layout, fresh.rank()) + comm::product_traffic(layout, fresh.rank());
  EXPECT_EQ(fresh.traffic(), t);
  if (t.messages > 0) {
    EXPECT_EQ(fresh.traffic_by_call(), (std::vector<std::pair<std::string, Traffic>>{{"grid", t}}));
  }
}

TEST_F(OnGrid, MayOutliveMpi) {
  static std::optional<Communicator> late_world;
  static std::optional<ProcessGrid> late;  // destroyed after MPI_Finalize
  late_world.emplace(borrow(MPI_COMM_WORLD));
  late.emplace(*late_world);
  EXPECT_EQ(late->shape(), comm::grid_shape(late_world->size()));
}

}  // namespace
