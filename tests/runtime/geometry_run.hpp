#pragma once
/// @file
/// Training whose matrices change between spectral and Euclidean steps (`diagnostics.advisor`). The
/// judge is a closed form: with the same gradient G in every step, and momentum from zero, X of
/// step t is (1 − β^(t+1))·G, and the momentum that the look of step t sees is (1 − β^(t−1))·G.

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <memory>
#include <numeric>
#include <orthrus/sharded_optimizer.hpp>
#include <random>
#include <string>
#include <vector>

namespace orthrus::geometry {

// One whose gradient has rank 1 and whose inputs have all directions alike: Euclidean. And the
// contrary.
inline constexpr Index kFlatRows = 12, kFlatCols = 20, kRoundRows = 10, kRoundCols = 16;
inline constexpr double kRate = 0.1, kBeta = 0.9;
/// Five looks that know activations, the first only chooses a vector; and one more.
inline constexpr int kDecided = 7;

inline std::vector<float> normals(Index count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::vector<float> out(static_cast<std::size_t>(count));
  for (float& x : out) x = static_cast<float>(normal(random));
  return out;
}
/// a·bᵀ of two vectors of length 1.
inline std::vector<float> rank_one() {
  auto unit = [](std::vector<float> v) {
    const double length = std::sqrt(std::inner_product(v.begin(), v.end(), v.begin(), 0.0));
    for (float& x : v) x = static_cast<float>(x / length);
    return v;
  };
  const auto a = unit(normals(kFlatRows, 1)), b = unit(normals(kFlatCols, 2));
  std::vector<float> out;
  for (const float x : a) {
    for (const float y : b) out.push_back(x * y);
  }
  return out;
}

inline std::string budget_text(double budget) { return budget > 0 ? "1.0e-9" : "0"; }

struct Layout {
  int ranks = 1;
  const char *text = "", *group = "";
  double gradient = 1;  ///< factor
  double tolerance = 1e-5;
  double budget = 0;  ///< `diagnostics.budget_frac`
};

struct Model {
  Model(const Layout& layout, const std::string& advisor, Communicator& comm)
      : round(normals(kRoundRows * kRoundCols, 3)), flat(rank_one()), comm_(&comm) {
    for (auto* g : {&round, &flat}) {
      for (float& x : *g) x *= static_cast<float>(layout.gradient);
    }
    const Config config = parse_config(
        "schema: 1\ntrain: {save_every: " + std::to_string(kDecided) + "}\n" +
        std::string(layout.text) + "diagnostics: {every_steps: 1, spectra: true, budget_frac: " +
        budget_text(layout.budget) + ", advisor: " + advisor +
        "}\ngroups:\n  - {match: '*', rule: {name: muon, lr: 0.1, momentum: 0.9}, lmo: {scale: "
        "spectral" +
        (std::string(layout.group).starts_with(" ") ? layout.group
                                                    : "}" + std::string(layout.group)) +
        "}\n");
    Parameter p;
    p.name = "m.flat";
    p.shape = {kFlatRows, kFlatCols};
    p.weights = trained_flat.data();
    p.gradient = flat.data();
    Parameter q;
    q.name = "m.round";
    q.shape = {kRoundRows, kRoundCols};
    q.weights = trained_round.data();
    q.gradient = round.data();
    optimizer = std::make_unique<ShardedOptimizer>(config, comm.duplicate("job"),
                                                   std::vector<Parameter>{p, q});
  }

  const StepReport& step() {
    if (optimizer->wants_activations()) {
      std::vector<float> all(static_cast<std::size_t>(kFlatCols * kFlatCols));
      for (Index i = 0; i < kFlatCols; ++i) all[static_cast<std::size_t>(i * (kFlatCols + 1))] = 1;
      const std::vector<float> same(static_cast<std::size_t>(kFlatCols * kFlatCols), 1);
      observe(0, rounds_flat ? same : all, kFlatCols);
      observe(1, same, kRoundCols);
    }
    optimizer->gradient_ready(1);
    optimizer->gradient_ready(0);
    const StepReport& report = optimizer->step();
    read_weights();
    gradient_norm = report.gradient_norm[0];
    if (report.notice.find("m.flat") != std::string::npos) notices.push_back(report.notice);
    std::vector<double> count{static_cast<double>(report.matrices)};
    comm_->all_reduce(std::span(count), ReduceOp::sum);
    matrices = count[0];
    return report;
  }
  /// ZeRO-3 has them elsewhere.
  void read_weights() {
    const std::array ids{0, 1};
    optimizer->gather(ids);
    optimizer->copy_weights(0, w_flat.data());
    optimizer->copy_weights(1, w_round.data());
    optimizer->release(ids);
  }
  void load(const std::string& from) {
    optimizer->load(from);
    read_weights();
  }
  void steps(int count) {
    for (int t = 0; t < count; ++t) step();
  }
  void observe(int id, const std::vector<float>& tokens, Index inputs) {
    optimizer->observe_activation(id, {tokens.data(), kFlatCols, inputs, kFlatCols});
  }
  [[nodiscard]] const MatrixSpectra& seen() const { return optimizer->spectra().front(); }

  std::vector<float> trained_flat = std::vector<float>(kFlatRows * kFlatCols),
                     trained_round = std::vector<float>(kRoundRows * kRoundCols);
  std::vector<float> w_flat = trained_flat, w_round = trained_round;  ///< after a step
  std::vector<float> round, flat;                                     ///< gradients
  bool rounds_flat = false;  ///< the first's inputs are all the same now
  double gradient_norm = 0;
  double matrices = 0;  ///< orthogonalized in the last step, on all ranks
  std::vector<std::string> notices;
  std::unique_ptr<ShardedOptimizer> optimizer;

 private:
  Communicator* comm_;
};

inline std::filesystem::path directory() {
  const auto* const test = testing::UnitTest::GetInstance()->current_test_info();
  return std::filesystem::temp_directory_path() /
         (std::string("orthrus-geometry-") + test->name() + "-" + std::to_string(::getpid()));
}

/// −η·f·X over G in step t, where the look that decided was of step `look`.
inline double euclidean_step(int t, int look) {
  return -kRate * (1 - std::pow(kBeta, t + 1)) / (1 - std::pow(kBeta, look - 1));
}

inline void expect_step(const Model& model, const std::vector<float>& before, double factor,
                        double tolerance) {
  for (std::size_t i = 0; i < before.size(); ++i) {
    const double found = static_cast<double>(model.w_flat[i]) - static_cast<double>(before[i]);
    const double unit = static_cast<double>(rank_one()[i]);
    ASSERT_NEAR(found, factor * unit, tolerance * std::abs(factor)) << i;
  }
}

}  // namespace orthrus::geometry
