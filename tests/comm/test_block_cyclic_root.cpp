// An inverse root times X on a ScaLAPACK grid: against eigenvalues in f64, and every byte.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <optional>
#include <orthrus/mpi.hpp>
#include <vector>

#include "comm/block_cyclic.hpp"
#include "comm/process_grid.hpp"
#include "kernels/backend.hpp"
#include "optim/block_cyclic_root.hpp"
#include "pieces.hpp"
#include "support/pmpi_counter.hpp"
#include "support/zoo.hpp"

namespace {

using namespace orthrus;
using namespace orthrus::pieces;
using optim::BlockCyclicRoot;
using optim::GridRoot;
using optim::GridRootReport;

constexpr double beta = 0.75;

class RootOnGrid : public testing::Test {
 protected:
  void SetUp() override {
    world.emplace(borrow(MPI_COMM_WORLD));
    grid.emplace(*world);
  }

  /// One matrix through steps.
  struct Run {
    Run(const RootOnGrid& test, Index m, Index n, Cut cut)
        : m_(m),
          n_(n),
          pieces(pieces_of(m, n, test.world->size(), cut)),
          plan(m, n, pieces, test.world->rank()) {
      const comm::Run run =
          BlockCyclicRoot::run(std::min(m, n), test.world->size(), test.world->rank());
      factor.assign(static_cast<std::size_t>(run.count), 0);
      root = factor;
      // NaN, so that whoever reads what was not written is found.
      work.assign(plan.workspace_bytes() / sizeof(float), std::numeric_limits<float>::quiet_NaN());
    }
    Index m_, n_;
    std::vector<Region> pieces;
    BlockCyclicRoot plan;
    std::vector<float> factor, root, work;
    int step = 0;
  };

  static GridRoot of_step(int step) {
    return {beta, 1 - beta, 1 - std::pow(beta, step), {0, 0, BlockCyclicRoot::least_damping}, 2};
  }

  /// x ← this rank's piece of D.
  GridRootReport step(Run& run, const zoo::Dense<float>& g, std::vector<float>& x) {
    const Region& mine = run.pieces[static_cast<std::size_t>(world->rank())];
    const std::vector<float> gradient = piece_of(g, mine);
    const Traffic before = world->traffic();
    pmpi::reset();
    const GridRootReport report =
        run.plan(x.data(), gradient.data(), run.factor.data(), run.root.data(), of_step(++run.step),
                 std::as_writable_bytes(std::span(run.work)), *grid, *world, *backend);
    const pmpi::Sent sent = pmpi::read();
    const Traffic predicted = run.plan.traffic();
    EXPECT_EQ((Traffic{sent.bytes, sent.messages}), predicted) << run.m_ << "x" << run.n_;
    EXPECT_EQ(world->traffic() - before, predicted);
    return report;
  }

  /// All of a matrix of which every rank has a piece.
  zoo::Matrix together(const Run& run, const std::vector<float>& piece) {
    const Region& region = run.pieces[static_cast<std::size_t>(world->rank())];
    zoo::Matrix all(run.m_, run.n_);
    std::size_t k = 0;
    for (Index i = 0; i < region.rows; ++i) {
      for (Index j = 0; j < region.cols; ++j, ++k) {
        all.data[static_cast<std::size_t>(region.first + i * region.distance + j)] = piece[k];
      }
    }
    world->all_reduce(std::span<double>(all.data));
    return all;
  }
  std::vector<float> my_piece(const Run& run, const zoo::Dense<float>& x) {
    return piece_of(x, run.pieces[static_cast<std::size_t>(world->rank())]);
  }

  std::optional<Communicator> world;
  std::optional<comm::ProcessGrid> grid;
  std::unique_ptr<kernels::Backend> backend = kernels::open_backend("cpu");
};

/// 2·(A/c + δI)^-½X of the short side, by the eigenvalues of A, which are its singular values.
zoo::Matrix expected_direction(const zoo::Matrix& factor, const zoo::Matrix& x, int step) {
  const double correction = 1 - std::pow(beta, step);
  const double damping = BlockCyclicRoot::least_damping * zoo::frobenius(factor) / correction;
  const zoo::Matrix root =
      zoo::svd(factor).map([&](double s) { return 2 / std::sqrt(s / correction + damping); });
  return x.rows <= x.cols ? zoo::product(root, x) : zoo::product(x, root);
}

zoo::Matrix gram_of(const zoo::Matrix& g) {
  const zoo::Matrix t = zoo::transposed(g);
  return g.rows <= g.cols ? zoo::product(g, t) : zoo::product(t, g);
}

TEST_F(RootOnGrid, IsTheInverseRootOfAllGradientsSquares) {
  struct Case {
    const char* name;
    Index m, n;
    double condition, bound;
  };
  // f32 knows A to 2^-24 of its norm, of which the smallest eigenvalue λ feels 2^-24·‖A‖/λ, and its
  // root half. Of condition 1e4 λ is the damping, 1e-6 of the norm: 3e-2, in one direction of 33.
  for (const Case& c : {Case{"gaussian", 48, 80, 0, 1e-4}, Case{"tall", 90, 41, 0, 1e-4},
                        Case{"blocks", 150, 290, 0, 1e-4}, Case{"flat", 40, 64, 1, 1e-5},
                        Case{"30", 37, 53, 30, 1e-4}, Case{"1e4", 33, 47, 1e4, 3e-2},
                        Case{"row", 1, 17, 1, 1e-5}, Case{"two", 3, 2, 2, 1e-4}}) {
    for (const Cut cut : {Cut::rows, Cut::columns}) {
      Run run(*this, c.m, c.n, cut);
      zoo::Matrix factor;
      double worst = 0;
      for (int t = 1; t <= 3; ++t) {
        const auto seed = static_cast<unsigned>(10 * t);
        const zoo::Dense<float> g =
            zoo::cast<float>(c.condition > 0 ? zoo::condition(c.m, c.n, c.condition, seed)
                                             : zoo::gaussian(c.m, c.n, seed));
        const zoo::Dense<float> x = zoo::cast<float>(zoo::gaussian(c.m, c.n, seed + 1));
        const zoo::Matrix gram = gram_of(zoo::cast<double>(g));
        if (t == 1) factor = zoo::Matrix(gram.rows, gram.cols);
        for (std::size_t i = 0; i < gram.data.size(); ++i) {
          factor.data[i] = beta * factor.data[i] + (1 - beta) * gram.data[i];
        }
        std::vector<float> piece = my_piece(run, x);
        const GridRootReport report = step(run, g, piece);
        EXPECT_TRUE(report.joined && report.renewed && report.serves) << c.name;
        const zoo::Matrix expected = expected_direction(factor, zoo::cast<double>(x), t);
        const double error = zoo::relative_error(together(run, piece), expected);
        EXPECT_LE(error, c.bound) << c.name << ", step " << t;
        worst = std::max(worst, error);
      }
      if (cut == Cut::rows && world->rank() == 0) {
        std::printf("  %-10s error %.1e\n", c.name, worst);
      }
      // What rests is the packed triangle, run after run.
      std::vector<double> packed(static_cast<std::size_t>(factor.rows * (factor.rows + 1) / 2));
      const comm::Run mine = BlockCyclicRoot::run(factor.rows, world->size(), world->rank());
      std::copy(run.factor.begin(), run.factor.end(), packed.begin() + mine.first);
      world->all_reduce(std::span<double>(packed));
      double off = 0;
      std::size_t at = 0;
      for (Index i = 0; i < factor.rows; ++i) {
        for (Index j = 0; j <= i; ++j, ++at) off += std::pow(packed[at] - factor(i, j), 2);
      }
      EXPECT_LE(std::sqrt(off), 1e-6 * zoo::frobenius(factor)) << c.name;
    }
  }
}

TEST_F(RootOnGrid, ServesOnWhereAGradientIsNotFinite) {
  const auto good = zoo::cast<float>(zoo::gaussian(20, 31, 1));
  const auto x = zoo::cast<float>(zoo::gaussian(20, 31, 2));
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), 1e30F}) {  // its square is Inf
    auto g = good;
    g(19, 30) = bad;
    Run run(*this, 20, 31, Cut::columns);
    std::vector<float> piece = my_piece(run, x);
    GridRootReport report = step(run, g, piece);
    EXPECT_FALSE(report.joined || report.renewed || report.serves);
    for (const float v : piece) ASSERT_EQ(v, 0) << "there is no root yet";

    piece = my_piece(run, x);
    EXPECT_TRUE(step(run, good, piece).renewed);
    const std::vector<float> factor = run.factor;
    const std::vector<float> root = run.root;
    const std::vector<float> direction = piece;
    piece = my_piece(run, x);
    report = step(run, g, piece);
    EXPECT_FALSE(report.joined || report.renewed);
    EXPECT_TRUE(report.serves);
    EXPECT_EQ(run.factor, factor);
    EXPECT_EQ(run.root, root);
    EXPECT_EQ(piece, direction);
  }
}

TEST_F(RootOnGrid, OfZeroIsZero) {
  Run run(*this, 20, 31, Cut::rows);
  std::vector<float> piece = my_piece(run, zoo::cast<float>(zoo::gaussian(20, 31, 2)));
  const GridRootReport report = step(run, zoo::Dense<float>(20, 31), piece);
  EXPECT_TRUE(report.joined && report.renewed);
  for (const float v : piece) ASSERT_EQ(v, 0);
}

TEST_F(RootOnGrid, GivesTheSameBitsInEveryRun) {
  const auto g = zoo::cast<float>(zoo::gaussian(150, 170, 1));
  std::vector<float> first;
  for (int repeat = 0; repeat < 3; ++repeat) {
    Run run(*this, 150, 170, Cut::rows);
    std::vector<float> piece = my_piece(run, g);
    step(run, g, piece);
    if (repeat == 0) first = piece;
    EXPECT_EQ(piece, first);
  }
}

}  // namespace
