// A matrix that no rank could hold twice trains from its shards, within a cap that counts the
// trainer's buffers too; and the memory of the process agrees with the plan.
#include <gtest/gtest.h>
#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <memory>
#include <orthrus/error.hpp>
#include <orthrus/mpi.hpp>
#include <orthrus/orthrus.hpp>
#include <vector>

namespace orthrus {
namespace {

constexpr Index kRows = 512;
constexpr Index kCols = 50304;
constexpr std::int64_t kMiB = 1 << 20;

Config config_of(std::int64_t cap) {
  Config c = parse_config(R"(
schema: 1
zero: {stage: 3}
groups:
  - {match: "*", rule: {name: muon, lr: 0.02}}
)");
  c.memory_cap = cap;
  return c;
}

/// Peak resident memory of this process, bytes.
std::int64_t peak_resident() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6)) * 1024;
  }
  return 0;
}

/// The trainer's side: this rank's columns of the weights and of the gradient, and nothing else.
struct Shard {
  explicit Shard(const Communicator& comm)
      : cols(kCols / comm.size() + (comm.rank() < kCols % comm.size() ? 1 : 0)),
        weights(std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(size()))),
        gradient(std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(size()))) {
    std::uint32_t s = static_cast<std::uint32_t>(comm.rank()) + 1;
    for (Index i = 0; i < size(); ++i) {
      s = s * 1664525U + 1013904223U;
      weights[static_cast<std::size_t>(i)] = 0;
      gradient[static_cast<std::size_t>(i)] =
          static_cast<float>(static_cast<std::int32_t>(s)) * 0x1p-31F;
    }
  }
  [[nodiscard]] Index size() const { return kRows * cols; }
  [[nodiscard]] Parameter parameter() const {
    Parameter p;
    p.name = "head.weight";
    p.shape = {kRows, kCols};
    p.weights = weights.get();
    p.gradient = gradient.get();
    p.gradient_state = GradientState::shard;
    p.sharding = {Sharding::Along::columns, {}};
    return p;
  }
  Index cols;
  std::unique_ptr<float[]> weights, gradient;
};

/// What libraries make once, whatever the model: oneDNN's compiled kernels (7 MiB), the BLAS's
/// buffers, MPI's. A small matrix walks the same way.
void warm_up(Communicator& world) {
  constexpr Index rows = 64;
  const Index cols = 64 * world.size();
  std::vector<float> weights(static_cast<std::size_t>(rows * 64));
  std::vector<float> gradient(weights.size(), 1.0F);
  Parameter p;
  p.name = "warm_up.weight";
  p.shape = {rows, cols};
  p.weights = weights.data();
  p.gradient = gradient.data();
  p.gradient_state = GradientState::shard;
  p.sharding = {Sharding::Along::columns, {}};
  Config config = config_of(0);
  config.groups[0].matrix.mode = "gram";
  ShardedOptimizer{config, world.duplicate("warm_up"), {p}}.step();
}

TEST(MemoryCap, ALoneMatrixOfAVocabularyTrainsFromItsShards) {
  Communicator world = borrow(MPI_COMM_WORLD);
  const std::int64_t at_start = peak_resident();
  warm_up(world);
  const std::int64_t before = peak_resident();
  const Shard shard(world);
  // Four ranks: 24.6 MiB each of weights, gradient and momentum, and panels of the rest.
  const std::int64_t cap = world.size() == 4 ? 96 * kMiB : 4 * 96 * kMiB / world.size();
  ShardedOptimizer optimizer{config_of(cap), world.duplicate("job"), {shard.parameter()}};
  EXPECT_LE(optimizer.memory().total(), cap);
  EXPECT_NE(optimizer.plan_json().find("\"mode\":\"gram\""), std::string::npos);
  for (int step = 1; step <= 2; ++step) {
    const StepReport& report = optimizer.step();
    EXPECT_FALSE(report.skipped);
    // U has min(m, n) singular values near 1: its entries' rms is 1/sqrt(n), to the 15 % that five
    // iterations leave.
    EXPECT_NEAR(report.update_rms[0] * std::sqrt(static_cast<double>(kCols)), 1, 0.15);
  }
  // The whole matrix has 98 MiB. Beside the plan, 8 MiB for MPI's and BLAS's own buffers.
  const std::int64_t grown = peak_resident() - before;
  RecordProperty("rss_growth_mib", static_cast<int>(grown / kMiB));
  if (world.rank() == 0) {
    std::printf("planned %.1f MiB, resident memory grew by %.1f MiB (libraries before: %.1f)\n",
                static_cast<double>(optimizer.memory().total()) / kMiB,
                static_cast<double>(grown) / kMiB, static_cast<double>(before - at_start) / kMiB);
  }
  EXPECT_LE(grown, optimizer.memory().total() + 8 * kMiB);
}

TEST(MemoryCap, TooSmallACapIsRefusedNamingOneThatFits) {
  Communicator world = borrow(MPI_COMM_WORLD);
  const Shard shard(world);
  try {
    ShardedOptimizer optimizer{
        config_of(256 * kMiB / world.size()), world.duplicate("job"), {shard.parameter()}};
    FAIL() << "three shards alone take more";
  } catch (const ConfigError& e) {
    EXPECT_EQ(e.exit_code(), ExitCode::config);
    const std::string what = e.what();
    const std::string words = "the smallest cap that fits is ";
    ASSERT_NE(what.find(words), std::string::npos) << what;
    const std::int64_t fits = std::stoll(what.substr(what.find(words) + words.size()));
    EXPECT_NO_THROW(
        (ShardedOptimizer{config_of(fits), world.duplicate("job"), {shard.parameter()}}))
        << what;
    EXPECT_THROW(
        (ShardedOptimizer{config_of(fits - 1), world.duplicate("job"), {shard.parameter()}}),
        ConfigError);
  }
}

}  // namespace
}  // namespace orthrus
