// What is seen of matrices (`diagnostics.spectra`), whatever the sharding: an SVD in f64 of what
// the trainer gave and got is the judge. Every step's bytes are audited by the step itself.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <orthrus/studies/noise.hpp>
#include <random>

#include "modes_run.hpp"
#include "optim/rule.hpp"
#include "runtime/probing.hpp"
#include "runtime/studies/dense.hpp"

namespace orthrus {
namespace {

using studies::Spectrum;

struct Shape {
  const char* name;
  Index rows, cols;
};
// Wide, tall, of two matrices above and beside each other, an embedding with AdamW, and no matrix.
constexpr Shape kShapes[] = {{"m.wide", 12, 20}, {"m.tall", 21, 8},  {"m.fused", 16, 10},
                             {"m.pair", 14, 12}, {"e.table", 30, 6}, {"v.gain", 1, 9}};
constexpr int kSteps = 4;
constexpr Index kTokens = 40;

std::vector<float> normals(std::size_t count, std::uint64_t seed, double mean = 0) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(mean);
  std::vector<float> out(count);
  for (float& x : out) x = static_cast<float>(normal(random));
  return out;
}
std::size_t size_of(std::size_t i) {
  return static_cast<std::size_t>(kShapes[i].rows * kShapes[i].cols);
}
/// Contribution k to the gradient of tensor i in step t: of rank 2, and noise.
std::vector<float> contribution(std::size_t i, std::int64_t t, std::int64_t k) {
  std::vector<float> g = normals(size_of(i), 1 + 100003 * i + 1009 * static_cast<std::uint64_t>(t) +
                                                 static_cast<std::uint64_t>(k));
  for (Index r = 0; r < kShapes[i].rows; ++r) {
    for (Index c = 0; c < kShapes[i].cols; ++c) {
      const double low_rank =
          3 * std::sin(static_cast<double>(r)) + 2 * std::cos(static_cast<double>(r * c));
      g[static_cast<std::size_t>(r * kShapes[i].cols + c)] += static_cast<float>(low_rank);
    }
  }
  return g;
}
/// What tensor i multiplied on rank r: columns with a mean, as activations have.
std::vector<float> activation(std::size_t i, int r) {
  return normals(static_cast<std::size_t>(kTokens * kShapes[i].cols),
                 7000 + 10 * i + static_cast<std::uint64_t>(r), 0.7);
}

std::vector<float> block(const std::vector<float>& whole, Index cols, const LogicalMatrix& m) {
  std::vector<float> out;
  for (Index r = 0; r < m.rows; ++r) {
    const auto first = whole.begin() + (m.row0 + r) * cols + m.col0;
    out.insert(out.end(), first, first + m.cols);
  }
  return out;
}

struct Matrix {
  std::string name;
  std::size_t tensor;
  LogicalMatrix place;
};
std::vector<Matrix> matrices() {
  return {{"m.wide", 0, {0, 12, 0, 20}},   {"m.tall", 1, {0, 21, 0, 8}},
          {"m.fused#0", 2, {0, 8, 0, 10}}, {"m.fused#1", 2, {8, 8, 0, 10}},
          {"m.pair#0", 3, {0, 14, 0, 6}},  {"m.pair#1", 3, {0, 14, 6, 6}},
          {"e.table", 4, {0, 30, 0, 6}}};
}

std::string groups(const std::string& matrix = "", const std::string& rule = "") {
  if (!rule.empty())
    return "groups: [{match: '*', rule: {name: " + rule +
           ", lr: 0.01}}, {match: '*', rule: {name: adamw}}]\n";
  return "groups:\n"
         "  - {match: m.pair, rule: {name: muon, lr: 0.02, momentum: 0.9}, split: {cols: 2}}\n"
         "  - {match: m.fused, rule: {name: muon, lr: 0.02, momentum: 0.9}, split: {rows: 2}" +
         matrix +
         "}\n"
         "  - {match: 'm.*', rule: {name: muon, lr: 0.02, momentum: 0.9}, clip_norm: 0.01" +
         matrix +
         "}\n"
         "  - {match: '*', rule: {name: adamw, lr: 0.01, weight_decay: 0.1}}\n";
}

struct Trained {
  std::vector<std::vector<MatrixSpectra>> seen;          ///< after each step, on rank 0
  std::vector<std::vector<std::vector<float>>> weights;  ///< before the first step, after each
  std::vector<std::map<std::string, std::vector<float>>> momenta;  ///< before each step
  std::vector<GradientNoise> noise;                                ///< per parameter, at the end
  GradientNoise model;
  bool same_on_all_ranks = true;
};

struct Job {
  int ranks = 1, contributions = 1;
  std::string text{};
  std::string matrix{};
  Sharding::Along along = Sharding::Along::none;
  bool observes = false;
  std::int64_t bad_step = 0;  ///< whose first gradient is no number
  std::string rule{};         ///< of all matrices; empty: `groups`'
  bool averaged = false;      ///< the trainer has averaged the gradients
};

Trained train(const Job& job) {
  const Config config = parse_config("schema: 1\n" + job.text + groups(job.matrix, job.rule));
  Trained out;
  std::mutex mutex;
  std::vector<std::vector<double>> numbers;
  run_thread_ranks(job.ranks, [&](Communicator& comm) {
    const bool held = job.along != Sharding::Along::none;
    const int shard = comm.size() / (job.text.find("replicate: 2") == std::string::npos ? 1 : 2);
    std::vector<std::vector<float>> weights, gradients;
    std::vector<Parameter> list;
    std::vector<Region> mine;
    for (std::size_t i = 0; i < std::size(kShapes); ++i) {
      Parameter p;
      p.name = kShapes[i].name;
      p.shape = {kShapes[i].rows, kShapes[i].cols};
      if (kShapes[i].rows == 1) p.shape = {kShapes[i].cols};
      if (job.averaged) p.gradient_state = GradientState::averaged;
      if (held) {
        p.sharding.along = p.shape.size() == 1 ? Sharding::Along::elements : job.along;
        p.gradient_state = GradientState::shard;
      }
      const Region part =
          held ? runtime::shape_of(p).part(comm.rank() % shard, shard)
               : Region{0, 1, static_cast<Index>(size_of(i)), static_cast<Index>(size_of(i))};
      mine.push_back(part);
      weights.emplace_back(static_cast<std::size_t>(part.size()));
      gradients.emplace_back(static_cast<std::size_t>(part.size()));
      list.push_back(p);
    }
    const auto cut = [&](std::size_t i, const std::vector<float>& whole, std::vector<float>& to) {
      for (Index r = 0; r < mine[i].rows; ++r) {
        std::copy_n(whole.begin() + mine[i].first + r * mine[i].distance, mine[i].cols,
                    to.begin() + r * mine[i].cols);
      }
    };
    for (std::size_t i = 0; i < std::size(kShapes); ++i) {
      cut(i, normals(size_of(i), 5 + i), weights[i]);
      list[i].weights = weights[i].data();
      list[i].gradient = gradients[i].data();
    }
    ShardedOptimizer optimizer(config, comm.duplicate("job"), list);
    const auto all_weights = [&] {
      std::vector<std::vector<float>> all;
      for (std::size_t i = 0; i < std::size(kShapes); ++i) {
        const int id = static_cast<int>(i);
        optimizer.gather(std::span(&id, 1));
        std::vector<float> whole(size_of(i));
        std::vector<float> part(static_cast<std::size_t>(mine[i].size()));
        optimizer.copy_weights(id, part.data());
        optimizer.release(std::span(&id, 1));
        for (Index r = 0; r < mine[i].rows && comm.rank() < shard; ++r) {
          std::copy_n(part.begin() + r * mine[i].cols, mine[i].cols,
                      whole.begin() + mine[i].first + r * mine[i].distance);
        }
        if (!held) whole = part;
        if (held) comm.all_reduce(std::span(whole), ReduceOp::sum);
        all.push_back(std::move(whole));
      }
      return all;
    };
    std::vector<std::vector<std::vector<float>>> history{all_weights()};
    const int each = job.contributions / job.ranks;
    for (std::int64_t t = 1; t <= kSteps; ++t) {
      std::map<std::string, std::vector<float>> momenta;
      for (auto& [name, tensor] : optimizer.gather_state()) momenta[name] = tensor.values;
      if (job.observes && optimizer.wants_activations()) {
        for (std::size_t i = 0; i < 5; ++i) {
          const auto a = activation(i, comm.rank());
          optimizer.observe_activation(static_cast<int>(i),
                                       {a.data(), kTokens, kShapes[i].cols, kShapes[i].cols});
        }
      }
      for (int k = 0; k < each; ++k) {
        optimizer.micro_batch(k);
        for (std::size_t i = std::size(kShapes); i-- > 0;) {
          std::vector<float> g(size_of(i));
          if (held || job.averaged) {  // the mean, as the trainer has made it
            for (int c = 0; c < job.contributions; ++c) {
              const auto one = contribution(i, t, c);
              for (std::size_t e = 0; e < g.size(); ++e)
                g[e] += one[e] / static_cast<float>(job.contributions);
            }
          } else {
            g = contribution(i, t, comm.rank() * each + k);
          }
          if (t == job.bad_step) g[0] = std::numeric_limits<float>::quiet_NaN();
          cut(i, g, gradients[i]);
          optimizer.gradient_ready(static_cast<int>(i));
        }
      }
      const StepReport& report = optimizer.step();
      history.push_back(all_weights());
      const std::vector<MatrixSpectra> seen(optimizer.spectra().begin(), optimizer.spectra().end());
      if (comm.rank() == 0) {
        out.seen.push_back(seen);
        out.momenta.push_back(momenta);
        out.model = report.model_noise;
      }
      std::vector<double> flat;
      for (const MatrixSpectra& m : seen) {
        flat.insert(flat.end(), {m.gradient.nuclear_rank, m.momentum.erank1, m.weights.stable_rank,
                                 m.update.operator_norm, m.alignment, m.activation_rank});
      }
      const std::scoped_lock lock(mutex);
      if (static_cast<std::int64_t>(numbers.size()) < t) numbers.push_back(flat);
      if (numbers[static_cast<std::size_t>(t) - 1] != flat) out.same_on_all_ranks = false;
    }
    if (comm.rank() != 0) return;
    out.weights = history;
    for (std::size_t i = 0; i < list.size(); ++i)
      out.noise.push_back(optimizer.noise(static_cast<int>(i)));
  });
  return out;
}

Spectrum by_svd(const std::vector<float>& values, const LogicalMatrix& m) {
  const ConstMatrixView view{values.data(), m.rows, m.cols, m.cols, DType::f32};
  return studies::spectrum_of(studies::singular_values(view),
                              0x1p-23 * static_cast<double>(std::max(m.rows, m.cols)));
}

void expect_close(const Spectrum& a, const Spectrum& b, double tolerance, const std::string& what) {
  const auto near = [&](double x, double y, const char* which) {
    EXPECT_NEAR(x, y, tolerance * std::abs(y)) << what << " " << which;
  };
  near(a.operator_norm, b.operator_norm, "operator norm");
  near(a.frobenius_norm, b.frobenius_norm, "Frobenius norm");
  near(a.nuclear_norm, b.nuclear_norm, "nuclear norm");
  near(a.stable_rank, b.stable_rank, "stable rank");
  near(a.nuclear_rank, b.nuclear_rank, "nuclear rank");
  near(a.erank1, b.erank1, "erank1");
  near(a.erank2, b.erank2, "erank2");
  near(a.participation, b.participation, "participation");
  near(a.cond_eff, b.cond_eff, "cond_eff");
  EXPECT_EQ(a.rank, b.rank) << what;
}

std::vector<float> mean(std::size_t i, std::int64_t t, int contributions) {
  std::vector<double> sum(size_of(i));
  for (int k = 0; k < contributions; ++k) {
    const auto g = contribution(i, t, k);
    for (std::size_t e = 0; e < g.size(); ++e) sum[e] += static_cast<double>(g[e]) / contributions;
  }
  return {sum.begin(), sum.end()};
}

std::string with_steps(int contributions, int ranks, bool tree) {
  return "train: {batch: 40, micro_batches: " + std::to_string(tree ? 1 : contributions / ranks) +
         "}\n";
}

TEST(Spectra, AreThoseOfTheWholeMatrixHoweverItIsSharded) {
  struct Layout {
    int ranks, contributions;
    const char* text;
    const char* matrix;
    double gradient = 1e-5;  // sums in f32, of at most 8 terms: 8·2^-24 of each entry
    Sharding::Along along = Sharding::Along::none;
  };
  using Along = Sharding::Along;
  for (const Layout& c :
       {Layout{1, 1, "", ""}, Layout{2, 2, "", ""}, Layout{3, 3, "zero: {stage: 1}\n", ""},
        Layout{4, 4, "zero: {stage: 3}\n", ""}, Layout{4, 4, "mesh: {replicate: 2}\n", ""},
        Layout{4, 4, "mesh: {replicate: 2, node: 2}\ncomm: {bucket_bytes: 900}\n", ""},
        Layout{2, 8, "reproducible: {virtual_shards: 8}\n", ""}, Layout{2, 6, "", ""},
        Layout{2, 4, "zero: {stage: 1}\n", ""}, Layout{3, 3, "", ", matrix: {mode: exchange}"},
        Layout{3, 3, "", ", matrix: {mode: gather}"}, Layout{3, 3, "", ", matrix: {mode: gram}"},
        Layout{4, 4, "mesh: {replicate: 2}\n", ", matrix: {mode: gram_steps}"},
        Layout{2, 2, "", ", state: {momentum: bf16}"},
        Layout{3, 3, "", ", state: {momentum: int8, block: 32}"},
        Layout{2, 2, "", ", matrix: {mode: block_local}"},
        Layout{3, 3, "comm: {bucket_bytes: 900}\n", ", matrix: {mode: periodic, period: 2}"},
        // A mean of bf16 numbers is off by 2^-9 of its terms, which are up to four times as large.
        Layout{2, 2, "comm: {gradient_dtype: bf16}\n", "", 3e-2},
        Layout{3, 3, "", ", matrix: {mode: gram}", 1e-5, Along::rows},
        Layout{2, 2, "", ", matrix: {mode: exchange}", 1e-5, Along::columns},
        Layout{4, 4, "mesh: {replicate: 2}\n", ", matrix: {mode: exchange}", 1e-5,
               Along::elements}}) {
    SCOPED_TRACE(std::to_string(c.ranks) + " ranks, " + c.text + c.matrix + ", held " +
                 std::to_string(static_cast<int>(c.along)));
    const bool tree = std::string(c.text).find("virtual") != std::string::npos;
    Job job{c.ranks, c.contributions, c.text + with_steps(c.contributions, c.ranks, tree), c.matrix,
            c.along};
    const Trained off = train(job);
    EXPECT_TRUE(off.seen[0].empty());
    job.text += "diagnostics: {every_steps: 2, spectra: true, budget_frac: 0}\n";
    const Trained run = train(job);
    EXPECT_EQ(run.weights, off.weights) << "a bit of the training has changed";
    EXPECT_TRUE(run.same_on_all_ranks);
    const auto list = matrices();
    for (const std::int64_t t : {2, 4}) {
      const auto& seen = run.seen[static_cast<std::size_t>(t) - 1];
      ASSERT_EQ(seen.size(), list.size());
      for (std::size_t k = 0; k < list.size(); ++k) {
        const Matrix& m = list[k];
        const MatrixSpectra& s = seen[k];
        EXPECT_EQ(s.name, m.name);
        EXPECT_EQ(s.step, t);
        const Index cols = kShapes[m.tensor].cols;
        const auto part = [&](const std::vector<float>& whole) {
          return block(whole, cols, m.place);
        };
        const std::vector<float> g = part(mean(m.tensor, t, c.contributions));
        expect_close(s.gradient, by_svd(g, m.place), c.gradient, m.name + " gradient");
        const auto& before = run.weights[static_cast<std::size_t>(t) - 1][m.tensor];
        const auto& after = run.weights[static_cast<std::size_t>(t)][m.tensor];
        expect_close(s.weights, by_svd(part(before), m.place), 1e-5, m.name + " weights");
        const auto& momentum = run.momenta[static_cast<std::size_t>(t) - 1].at(
            std::string("state/") + kShapes[m.tensor].name + "/momentum");
        expect_close(s.momentum, by_svd(part(momentum), m.place), 1e-5, m.name + " momentum");
        std::vector<float> update(after.size());
        for (std::size_t e = 0; e < update.size(); ++e) update[e] = after[e] - before[e];
        update = part(update);
        const Spectrum u = by_svd(update, m.place);
        expect_close(s.update, u, 1e-5, m.name + " update");
        double both = 0;
        for (std::size_t e = 0; e < g.size(); ++e)
          both -= static_cast<double>(g[e]) * static_cast<double>(update[e]);
        const Spectrum of_gradient = by_svd(g, m.place);
        EXPECT_NEAR(s.cosine, both / (u.frobenius_norm * of_gradient.frobenius_norm), c.gradient);
        EXPECT_NEAR(s.alignment, both / (u.operator_norm * of_gradient.nuclear_norm), c.gradient);
      }
      EXPECT_EQ(run.seen[static_cast<std::size_t>(t) - 2].front().step, t - 2) << "only every 2nd";
    }
  }
}

/// H of σ/Σσ.
double entropy(const std::vector<double>& s) {
  const double sum = std::accumulate(s.begin(), s.end(), 0.0);
  double h = 0;
  for (const double x : s) h -= x / sum * std::log(x / sum);
  return h;
}

// O of ΔW = −η(λW + sO) is the polar factor of the LMO's input:
// Newton-Schulz of f32, whose singular values the test takes from ΔW itself.
TEST(Spectra, DynamicsAreWhatStepsDoToSingularValues) {
  struct Layout {
    int ranks;
    const char *text, *matrix;
    Sharding::Along along = Sharding::Along::none;
  };
  using Along = Sharding::Along;
  for (const Layout& c : {Layout{1, "", ""}, Layout{3, "zero: {stage: 3}\n", ""},
                          Layout{2, "zero: {stage: 1}\n", ", matrix: {mode: gram}"},
                          Layout{4, "mesh: {replicate: 2}\n", ", matrix: {mode: exchange}"},
                          Layout{3, "", ", matrix: {mode: gram}", Along::rows}}) {
    SCOPED_TRACE(std::to_string(c.ranks) + " ranks, " + c.text + c.matrix);
    Job job{c.ranks, c.ranks, c.text + with_steps(c.ranks, c.ranks, false), c.matrix, c.along};
    const Trained off = train(job);
    job.text += "diagnostics: {every_steps: 2, spectra: true, dynamics: true, budget_frac: 0}\n";
    const Trained run = train(job);
    EXPECT_EQ(run.weights, off.weights) << "a bit of the training has changed";
    for (std::size_t k = 0; k < matrices().size(); ++k) {
      const Matrix m = matrices()[k];
      const MatrixSpectra& seen = run.seen[3][k];
      const Index cols = kShapes[m.tensor].cols;
      const auto values = [&](std::size_t t) {
        const std::vector<float> w = block(run.weights[t][m.tensor], cols, m.place);
        return studies::singular_values(
            ConstMatrixView{w.data(), m.place.rows, m.place.cols, m.place.cols, DType::f32});
      };
      const std::vector<double> before = values(3), after = values(4);
      const std::size_t n = before.size();
      const double size = seen.update.frobenius_norm;
      // By definition, in f64.
      studies::Matrix w(m.place.rows, m.place.cols), dw(m.place.rows, m.place.cols);
      const std::vector<float> old = block(run.weights[3][m.tensor], cols, m.place);
      const std::vector<float> now = block(run.weights[4][m.tensor], cols, m.place);
      for (std::size_t e = 0; e < old.size(); ++e) {
        w.values[e] = static_cast<double>(old[e]);
        dw.values[e] = static_cast<double>(now[e]) - static_cast<double>(old[e]);
      }
      const studies::Svd parts = studies::svd(w);
      const studies::Matrix turned =
          studies::product(studies::product(parts.u, dw, studies::Op::transpose), parts.vt,
                           studies::Op::none, studies::Op::transpose);
      const double sum = std::accumulate(before.begin(), before.end(), 0.0);
      double rate = 0;
      for (std::size_t i = 0; i < n; ++i) {
        const double dsigma = turned(static_cast<Index>(i), static_cast<Index>(i));
        rate -= dsigma * (std::log(before[i] / sum) + entropy(before)) / sum;
        if (i < 4) {
          EXPECT_NEAR(seen.dsigma[i], dsigma, 1e-5 * size) << m.name;
        }
        if (i + 4 >= n) {
          EXPECT_NEAR(seen.dsigma[4 + n - 1 - i], dsigma, 1e-5 * size) << m.name;
        }
      }
      EXPECT_NEAR(seen.flattening_rate, rate, 1e-5 * size) << m.name;
      // And by what became of them: to second order in the step.
      for (std::size_t i = 0; i < n; ++i) {
        EXPECT_NEAR(turned(static_cast<Index>(i), static_cast<Index>(i)), after[i] - before[i],
                    2 * size * size);
      }
      EXPECT_NEAR(seen.flattening_rate, entropy(after) - entropy(before), 0.1 * size * size)
          << m.name;
      // The momentum's quantiles.
      const auto& momentum =
          run.momenta[3].at(std::string("state/") + kShapes[m.tensor].name + "/momentum");
      const std::vector<float> part = block(momentum, cols, m.place);
      std::vector<double> mu = studies::singular_values(
          ConstMatrixView{part.data(), m.place.rows, m.place.cols, m.place.cols, DType::f32});
      std::reverse(mu.begin(), mu.end());
      EXPECT_NEAR(seen.momentum_quantiles[0], mu.front() / mu.back(), 1e-5);
      EXPECT_NEAR(seen.momentum_quantiles[3], mu[(n - 1) / 2 + (n - 1) % 2] / mu.back(), 1e-5);
      EXPECT_TRUE(std::is_sorted(seen.momentum_quantiles.begin(), seen.momentum_quantiles.end()));
      if (m.name == "e.table") {
        EXPECT_EQ(seen.orthogonality_error, 0) << "AdamW's";
        continue;
      }
      // Without decay: the singular values of ΔW over η·s, which their ratio does not need.
      const std::vector<double> moved = studies::singular_values(dw);
      EXPECT_NEAR(seen.direction_least / seen.direction_largest, moved.back() / moved.front(),
                  1e-4);
      // Jordan's coefficients leave singular values of a full spectrum between .68 and 1.13.
      EXPECT_GT(seen.direction_least, 0.3);
      EXPECT_LT(seen.direction_largest, 1.2);
      double squares = 0;
      for (const double s : moved) {
        const double o = s * seen.direction_largest / moved.front();
        squares += (o * o - 1) * (o * o - 1);
      }
      EXPECT_NEAR(seen.orthogonality_error, std::sqrt(squares / static_cast<double>(n)), 1e-3);
    }
  }
}

TEST(Spectra, OfQuantizedWeightsAreOfWhatTheTrainerHas) {
  const Job job{
      2, 2,
      with_steps(2, 2, false) + "diagnostics: {every_steps: 1, spectra: true, budget_frac: 0}\n",
      ", weights: {format: int8, rounding: nearest, residual: momentum}"};
  const Trained run = train(job);
  for (std::size_t k = 0; k < 4; ++k) {
    const Matrix m = matrices()[k];
    const Index cols = kShapes[m.tensor].cols;
    expect_close(run.seen[3][k].weights,
                 by_svd(block(run.weights[3][m.tensor], cols, m.place), m.place), 1e-5, m.name);
  }
}

TEST(Spectra, OfEveryRuleAreThoseOfTheWholeMatrix) {
  for (const optim::RuleRow& rule : optim::rules()) {
    for (const bool averaged : {false, true}) {
      SCOPED_TRACE(std::string(rule.name) + (averaged ? ", averaged" : ""));
      Job job{3, 3, with_steps(3, 3, false)};
      job.rule = rule.name;
      job.averaged = averaged;
      const Trained off = train(job);
      job.text +=
          "diagnostics: {every_steps: 2, spectra: true, dual_noise: true, budget_frac: 0}\n";
      const Trained run = train(job);
      EXPECT_EQ(run.weights, off.weights) << "a bit of the training has changed";
      EXPECT_TRUE(run.same_on_all_ranks);
      for (const MatrixSpectra& s : run.seen[3]) {
        const auto tensor = static_cast<std::size_t>(s.parameter);
        const LogicalMatrix all{0, kShapes[tensor].rows, 0, kShapes[tensor].cols};
        EXPECT_EQ(s.step, 4);
        expect_close(s.gradient, by_svd(mean(tensor, 4, 3), all), 1e-5, s.name + " gradient");
        expect_close(s.weights, by_svd(run.weights[3][tensor], all), 1e-5, s.name + " weights");
        const auto momentum = run.momenta[3].find("state/" + s.name + "/momentum");
        const bool has_momentum = rule.name != "adamw" && rule.name != "sgd";
        EXPECT_TRUE(momentum != run.momenta[3].end() || !has_momentum) << s.name;
        if (momentum != run.momenta[3].end()) {
          expect_close(s.momentum, by_svd(momentum->second, all), 1e-5, s.name + " momentum");
        }
        if (averaged) {
          EXPECT_EQ(s.nuclear_noise, 0) << "of a mean alone nothing can be said";
        }
      }
    }
  }
}

/// 4·Σ_{i<j} 1/(µᵢ+µⱼ)² + (n−m)·Σ 1/µᵢ² with `floor` added to every square (arXiv:2606.08388).
double sensitivity(const std::vector<double>& mu, Index longer, double floor) {
  double sum = 0;
  for (std::size_t i = 0; i < mu.size(); ++i) {
    for (std::size_t j = i + 1; j < mu.size(); ++j) {
      sum += 4 / ((mu[i] + mu[j]) * (mu[i] + mu[j]) + floor);
    }
    sum += static_cast<double>(longer - std::ssize(mu)) / (mu[i] * mu[i] + floor);
  }
  return sum;
}

TEST(Spectra, PolarBatchIsThatOfTheMomentumAndTheNoise) {
  const Trained run = train(
      {3, 3,
       with_steps(3, 3, false) + "diagnostics: {every_steps: 1, spectra: true, budget_frac: 0}\n"});
  constexpr double beta = 0.9;
  const double v = std::pow(1 - beta, 2) * std::pow(1 + beta, 2) +
                   std::pow(beta, 4) * (1 - beta) / (1 + beta);  // 0.07063
  for (std::size_t k = 0; k < matrices().size(); ++k) {
    const Matrix m = matrices()[k];
    const studies::PolarBatch& found = run.seen[3][k].polar;
    if (m.tensor != 2 && m.tensor != 3) {
      EXPECT_EQ(found.batch, 0) << m.name << ": AdamW's, or clipped";
      continue;
    }
    const auto momentum =
        block(run.momenta[3].at(std::string("state/") + kShapes[m.tensor].name + "/momentum"),
              kShapes[m.tensor].cols, m.place);
    const std::vector<double> mu = studies::singular_values(
        {momentum.data(), m.place.rows, m.place.cols, m.place.cols, DType::f32});
    const double longer = static_cast<double>(std::max(m.place.rows, m.place.cols));
    const double entry = run.noise[m.tensor].trace_trend / static_cast<double>(size_of(m.tensor));
    const double variance = v * entry / 40;  // of the momentum, at this batch
    const bool saturated = mu.back() * mu.back() <= variance * longer;
    const double s = sensitivity(mu, static_cast<Index>(longer), saturated ? variance * longer : 0);
    EXPECT_EQ(found.saturated, saturated) << m.name;
    EXPECT_NEAR(found.noise_ratio, variance * s / static_cast<double>(mu.size()),
                1e-4 * found.noise_ratio);
    EXPECT_NEAR(found.batch, 40 * found.noise_ratio, 1e-9 * found.batch);
  }
}

TEST(Spectra, WeightsStayInTheBallOfTheirDecay) {
  // With the same gradient in every step W_t = −(1 − (1 − λη)^t)·s/λ·polar(G), from zero.
  constexpr double lr = 0.05, decay = 4;
  run_thread_ranks(2, [&](Communicator& comm) {
    std::vector<float> w(240), g = normals(240, 2);
    Parameter p;
    p.name = "m.wide";
    p.shape = {12, 20};
    p.weights = w.data();
    p.gradient = g.data();
    ShardedOptimizer optimizer(
        parse_config(
            "schema: 1\ndiagnostics: {every_steps: 1, spectra: true, budget_frac: 0}\n"
            "groups: [{match: '*', rule: {name: muon, lr: 0.05, weight_decay: 4}, lmo: "
            "{scale: match_rms_adamw, coefficients: auto, tolerance: 1.0e-4, lower: 0.01}}]\n"),
        comm.duplicate("job"), {p});
    for (int t = 1; t <= 30; ++t) {
      optimizer.gradient_ready(0);
      optimizer.step();
      const double rho = optimizer.spectra().front().rho;
      EXPECT_NEAR(rho, 1 - std::pow(1 - lr * decay, t - 1), 2e-4) << t;  // lmo.tolerance, and f32
      EXPECT_LE(rho, 1 + 2e-4);
    }
  });
}

TEST(Spectra, NextLookKeepsToItsShareOfTheTime) {
  // A look of 10 ms beside steps of 100 ms: 1 % is one look in 10 steps, .1 % one in 100.
  EXPECT_EQ(runtime::next_look(20, 10, 10, 100, 0.01), 30);
  EXPECT_EQ(runtime::next_look(20, 10, 10.1, 100, 0.01), 40);
  EXPECT_EQ(runtime::next_look(20, 10, 10, 100, 0.001), 120);
  EXPECT_EQ(runtime::next_look(20, 10, 0, 100, 0.01), 30);
  EXPECT_EQ(runtime::next_look(20, 10, 1e300, 100, 0), 30) << "any share";
  for (const double cost : {1e-3, 0.3, 7.0, 1e4}) {
    for (const std::int64_t every : {1, 7, 50}) {
      const std::int64_t apart = runtime::next_look(every, every, cost, 3, 0.01) - every;
      EXPECT_EQ(apart % every, 0);
      EXPECT_LE(cost, 0.01 * 3 * static_cast<double>(apart) * (1 + 1e-12));
      EXPECT_GT(cost, 0.01 * 3 * static_cast<double>(apart - every)) << "and no rarer";
    }
  }
  EXPECT_GT(runtime::next_look(1, 1, 1e12, 1e-12, 1e-9), 1) << "no overflow";
}

TEST(Spectra, OfALargeMatrixHaveTheirTime) {
  const auto allowance = [](Index rows, Index cols) {
    Parameter p;
    p.name = "m.large";
    p.shape = {rows, cols};
    const auto plan = runtime::make_plan(
        parse_config("schema: 1\ndiagnostics: {every_steps: 1, spectra: true}\n" + groups()),
        {runtime::shape_of(p)}, 2);
    return runtime::look_allowance_s(plan);
  };
  EXPECT_LE(allowance(64, 256), 1);
  // A Gram matrix of 2·8192²·28672 flops, and its eigenvalues: a minute or more on one core.
  EXPECT_GE(allowance(8192, 28672), 600);
}

TEST(Spectra, NoiseInDualNormsIsThatOfAllRanksGradients) {
  for (const int ranks : {2, 3, 4}) {
    for (const char* const text : {"", "zero: {stage: 3}\n", "comm: {bucket_bytes: 900}\n"}) {
      SCOPED_TRACE(std::to_string(ranks) + " ranks " + text);
      const Trained run = train(
          {ranks, ranks,
           text + with_steps(ranks, ranks, false) +
               "diagnostics: {every_steps: 2, spectra: true, dual_noise: true, budget_frac: 0}\n"});
      const double each = 40.0 / ranks;
      studies::DualNoise all;
      for (std::size_t i = 0; i < std::size(kShapes); ++i) {
        std::vector<std::vector<float>> gradients;
        std::vector<ConstMatrixView> views;
        for (int k = 0; k < ranks; ++k) gradients.push_back(contribution(i, 4, k));
        for (const auto& g : gradients)
          views.push_back({g.data(), kShapes[i].rows, kShapes[i].cols, kShapes[i].cols});
        const auto of = studies::dual_noise_scale(studies::DescentNorm::sign, each, views);
        // Deviations are differences of squares of up to 36 times the noise, in f32.
        EXPECT_NEAR(run.noise[i].absolute_deviation, of.noise, 1e-4 * of.noise);
        EXPECT_NEAR(run.noise[i].absolute_mean, of.signal, 1e-5 * of.signal);
        all += of;
      }
      EXPECT_NEAR(run.model.absolute_deviation, all.noise, 1e-4 * all.noise);
      EXPECT_NEAR(run.model.absolute_mean, all.signal, 1e-5 * all.signal);
      for (std::size_t k = 0; k < matrices().size(); ++k) {
        const Matrix m = matrices()[k];
        if (m.tensor == 4) {
          EXPECT_EQ(run.seen[3][k].nuclear_noise, 0) << "of AdamW's the other norm is asked";
          continue;
        }
        std::vector<std::vector<float>> gradients;
        std::vector<ConstMatrixView> views;
        for (int r = 0; r < ranks; ++r) {
          gradients.push_back(block(contribution(m.tensor, 4, r), kShapes[m.tensor].cols, m.place));
        }
        for (const auto& g : gradients)
          views.push_back({g.data(), m.place.rows, m.place.cols, m.place.cols});
        const auto of = studies::dual_noise_scale(studies::DescentNorm::spectral, each, views);
        // C has n − 1 directions per column of rank; the others' eigenvalues are rounding of the
        // mean, 1e-7 of the signal, and their roots add up to 1e-3 of it.
        EXPECT_NEAR(run.seen[3][k].nuclear_noise, of.noise, 3e-3 * of.noise) << m.name;
      }
    }
  }
  // One gradient alone, or several of a rank's, say nothing.
  for (const int contributions : {1, 4}) {
    const int ranks = contributions == 1 ? 1 : 2;
    const Trained run =
        train({ranks, contributions,
               with_steps(contributions, ranks, false) +
                   "diagnostics: {every_steps: 2, spectra: true, dual_noise: true}\n"});
    EXPECT_EQ(run.seen[1][0].nuclear_noise, 0);
    EXPECT_EQ(run.model.absolute_deviation, 0);
  }
}

TEST(Spectra, StableRankOfActivationsIsThatOfAllRanksTokens) {
  for (const int ranks : {1, 3}) {
    Job job{ranks, ranks,
            with_steps(ranks, ranks, false) +
                "diagnostics: {every_steps: 1, spectra: true, budget_frac: 0}\n"};
    EXPECT_EQ(train(job).seen[3][0].activation_rank, 0) << "nobody has told";
    job.observes = true;
    const Trained run = train(job);
    EXPECT_TRUE(run.same_on_all_ranks);
    for (std::size_t k = 0; k < matrices().size(); ++k) {
      const Matrix m = matrices()[k];
      if (m.place.cols != kShapes[m.tensor].cols) {
        EXPECT_EQ(run.seen[3][k].activation_rank, 0) << "it multiplies a part of them";
        continue;
      }
      std::vector<float> all;
      for (int r = 0; r < ranks; ++r) {
        const auto a = activation(m.tensor, r);
        all.insert(all.end(), a.begin(), a.end());
      }
      const double expected =
          by_svd(all, {0, kTokens * ranks, 0, kShapes[m.tensor].cols}).stable_rank;
      EXPECT_EQ(run.seen[0][k].activation_rank, 0) << "the first look only chooses a vector";
      double last = std::numeric_limits<double>::infinity();
      for (std::size_t t = 1; t < kSteps; ++t) {
        const double found = run.seen[t][k].activation_rank;
        EXPECT_GE(found, expected * (1 - 1e-12)) << "‖AAᵀv‖ is at most ‖A‖²";
        EXPECT_LE(found, last * (1 + 1e-12)) << "and grows";
        last = found;
      }
      // Begun at the mean; the next eigenvalue is about a third of the first: (1/3)^(2·2) is 1 %.
      EXPECT_NEAR(last, expected, 0.01 * expected) << m.name;
      const MatrixSpectra& s = run.seen[3][k];
      double log_ratio = 0, weight = 0;
      for (std::size_t t = 1; t < kSteps; ++t) {
        log_ratio = 0.8 * log_ratio + 0.2 * std::log(run.seen[t][k].gradient.nuclear_rank /
                                                     run.seen[t][k].activation_rank);
        weight = 0.8 * weight + 0.2;
      }
      EXPECT_NEAR(s.spectral_ratio, std::exp(log_ratio / weight), 1e-12);
      EXPECT_EQ(s.advice, studies::GeometryAdvisor::Advice::keep) << "not five looks yet";
    }
  }
  run_thread_ranks(1, [&](Communicator& comm) {
    std::vector<float> w(240), g(240);
    Parameter p;
    p.name = "m.wide";
    p.shape = {12, 20};
    p.weights = w.data();
    p.gradient = g.data();
    ShardedOptimizer optimizer(
        parse_config("schema: 1\ndiagnostics: {every_steps: 1, spectra: true}\n" + groups()),
        comm.duplicate("job"), {p});
    EXPECT_THROW(optimizer.observe_activation(0, {w.data(), 4, 12, 12}), ShapeError);
    EXPECT_THROW(optimizer.observe_activation(1, {w.data(), 4, 20, 20}), ConfigError);
    EXPECT_THROW(static_cast<void>(optimizer.noise(1)), ConfigError);
  });
}

TEST(Spectra, OfAStepThatIsSkippedNothingIsSaid) {
  Job job{
      2, 2,
      with_steps(2, 2, false) + "diagnostics: {every_steps: 1, spectra: true, budget_frac: 0}\n"};
  job.observes = true;
  job.bad_step = 2;
  const Trained run = train(job);
  EXPECT_EQ(run.seen[1][0].step, 1);
  EXPECT_EQ(run.seen[2][0].step, 3);
  const auto a = activation(0, 0), b = activation(0, 1);
  std::vector<float> all(a);
  all.insert(all.end(), b.begin(), b.end());
  // What was told in the skipped step is not counted twice.
  EXPECT_GE(run.seen[2][0].activation_rank,
            by_svd(all, {0, 2 * kTokens, 0, 20}).stable_rank * (1 - 1e-12));
  EXPECT_LE(run.seen[2][0].activation_rank, 1.1 * by_svd(all, {0, 2 * kTokens, 0, 20}).stable_rank);
}

TEST(Spectra, BecomeRarerWhereTheyCostMoreThanTheirShare) {
  const std::string text =
      with_steps(2, 2, false) + "diagnostics: {every_steps: 1, spectra: true, ";
  const Trained seldom = train({2, 2, text + "budget_frac: 1.0e-9}\n"});
  EXPECT_EQ(seldom.seen[kSteps - 1][0].step, 1) << "the first tells what it costs";
  const Trained always = train({2, 2, text + "budget_frac: 0}\n"});
  EXPECT_EQ(always.seen[kSteps - 1][0].step, kSteps);
}

TEST(Spectra, GoOnAfterAnEarlierStepIsLoaded) {
  const auto directory =
      std::filesystem::temp_directory_path() / ("orthrus-spectra-" + std::to_string(::getpid()));
  run_thread_ranks(2, [&](Communicator& comm) {
    std::vector<float> w = normals(240, 1), g = normals(240, 2);
    Parameter p;
    p.name = "m.wide";
    p.shape = {12, 20};
    p.weights = w.data();
    p.gradient = g.data();
    ShardedOptimizer optimizer(parse_config("schema: 1\ndiagnostics: {every_steps: 2, spectra: "
                                            "true, budget_frac: 0}\n" +
                                            groups()),
                               comm.duplicate("job"), {p});
    std::vector<std::int64_t> seen;
    const auto steps = [&](int count) {
      for (int t = 0; t < count; ++t) {
        optimizer.gradient_ready(0);
        const StepReport& report = optimizer.step();
        if (optimizer.spectra().front().step == report.step) seen.push_back(report.step);
      }
    };
    steps(3);
    optimizer.save(directory.string());
    steps(3);
    optimizer.load(directory.string());
    steps(3);
    EXPECT_EQ(seen, (std::vector<std::int64_t>{2, 4, 6, 4, 6}));
  });
  std::filesystem::remove_all(directory);
}

TEST(Spectra, AreInThePlan) {
  std::vector<runtime::ParameterShape> shapes;
  for (const Shape& s : kShapes) {
    Parameter p;
    p.name = s.name;
    p.shape = {s.rows, s.cols};
    shapes.push_back(runtime::shape_of(p));
  }
  const auto planned = [&](const std::string& text, int ranks) {
    return runtime::make_plan(parse_config("schema: 1\n" + text + groups()), shapes, ranks);
  };
  const std::string on = "diagnostics: {every_steps: 10, spectra: true}\n";
  const runtime::Plan none = planned("", 2), looks = planned(on, 2);
  EXPECT_EQ(none.per_rank[0].probe.bytes, 0);
  EXPECT_EQ(looks.per_rank[0].traffic.bytes,
            planned("diagnostics: {every_steps: 10}\n", 2).per_rank[0].traffic.bytes)
      << "other steps send what they sent";
  EXPECT_GT(looks.per_rank[0].probe.bytes, 0);
  EXPECT_GT(looks.per_rank[0].memory.work, none.per_rank[0].memory.work);
  EXPECT_NE(looks.hash, none.hash);
  // Alone a rank sends nothing, and a matrix that rests whole stays where it is.
  EXPECT_EQ(planned(on, 1).per_rank[0].probe.bytes, 0);
  for (const runtime::Probed& p : looks.probed) {
    if (p.matrix < 0) continue;
    const auto& m = looks.matrices[static_cast<std::size_t>(p.matrix)];
    if (m.mode != optim::Mode::owner) continue;
    EXPECT_EQ(p.analyst, m.owner) << p.name;
  }
}

}  // namespace
}  // namespace orthrus
