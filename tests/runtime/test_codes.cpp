// A trainer that computes with codes: the bits of one that has their values, however it is sharded,
// and no buffer of f32 weights anywhere.
#include <gtest/gtest.h>
#include <malloc.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <orthrus/error.hpp>
#include <orthrus/orthrus.hpp>
#include <random>
#include <string>
#include <vector>

#include "runtime/plan.hpp"
#include "runtime/weight_format.hpp"
#include "support/count_new.hpp"
#include "toy_model.hpp"

namespace orthrus {
namespace {

namespace fs = std::filesystem;
using toy::Model;

/// Muon on the matrices and an element-wise rule on the rest. Matrices of one parameter share no
/// scale of a whole tensor, so theirs are of rows there.
Config config_of(const std::string& weights, const std::string& extra = "",
                 const std::string& rule = "{name: adamw, lr: 0.01, weight_decay: 0.1}",
                 const std::string& mode = "owner") {
  std::string of_matrices = weights;
  if (const std::size_t at = weights.find("scale: tensor, "); at != std::string::npos) {
    of_matrices.erase(at, std::string("scale: tensor, ").size());
  }
  return parse_config("schema: 1\n" + extra +
                      "groups:\n  - match: \"*.weight\"\n    rule: {name: muon, lr: 0.02, "
                      "weight_decay: 0.1}\n    matrix: {mode: " +
                      mode + "}\n    weights: " + of_matrices +
                      "\n  - match: \"*\"\n    rule: " + rule + "\n    weights: " + weights + "\n");
}

const WeightsConfig& weights_of(const Config& config, const Parameter& p) {
  const int group = runtime::effective_group(config, runtime::shape_of(p));
  return config.groups[static_cast<std::size_t>(group)].weights;
}

struct Buffers {
  Grid grid;
  Index rows = 0, cols = 0;
  std::vector<std::byte> codes;
  std::vector<float> scales;

  Buffers(const Grid& g, const std::vector<Index>& shape) : grid(g), rows(1), cols(1) {
    for (const Index n : shape) cols *= n;
    if (shape.size() > 1) rows = shape[0];
    cols /= rows;
    codes.resize(static_cast<std::size_t>(code_bytes(grid, rows, cols)));
    scales.resize(static_cast<std::size_t>(scale_count(grid, rows, cols)));
  }
  QuantizedView view() { return quantized_view(codes.data(), scales.data(), grid, rows, cols); }
  friend bool operator==(const Buffers&, const Buffers&) = default;
};

/// A trainer with codes of `model`'s weights, which it forgets.
std::vector<Buffers> to_codes(Model& model, const Config& config) {
  std::vector<Buffers> all;
  for (std::size_t i = 0; i < model.parameters.size(); ++i) {
    Parameter& p = model.parameters[i];
    const auto grid = grid_of(weights_of(config, p));
    if (!grid) throw ConfigError("not quantized");
    Buffers& b = all.emplace_back(*grid, p.shape);
    quantize(matrix_view(std::as_const(model.weights[i]).data(), b.rows, b.cols), *grid, b.view());
    model.weights[i].clear();
    model.weights[i].shrink_to_fit();
    p.weights = nullptr;
  }
  for (std::size_t i = 0; i < all.size(); ++i) {
    model.parameters[i].codes = all[i].codes.data();
    model.parameters[i].scales = all[i].scales.data();
  }
  return all;
}

/// Weights that are code · 2^k, with the largest code in every row: rounding them changes nothing,
/// so that a master copy of them is the same whoever has them.
void put_on_grid(Model& model, const Config& config) {
  for (std::size_t i = 0; i < model.parameters.size(); ++i) {
    Grid grid = *grid_of(weights_of(config, model.parameters[i]));
    grid.power_of_two = true;
    Buffers b(grid, model.parameters[i].shape);
    const MatrixView w = matrix_view(model.weights[i].data(), b.rows, b.cols);
    quantize(w, grid, b.view());
    dequantize(b.view(), grid, w);
    const Index unit = grid.extent == Grid::Extent::block ? grid.block : b.cols;
    for (Index r = 0; r < b.rows; ++r) {
      for (Index c = 0; c < b.cols; c += unit) {
        const Index tensor = grid.extent == Grid::Extent::tensor ? 0 : r;
        const float scale = b.scales[static_cast<std::size_t>(
            tensor * scale_cols(grid, b.cols) +
            (grid.extent == Grid::Extent::block ? c / grid.block : 0))];
        model.weights[i][static_cast<std::size_t>(r * b.cols + c)] =
            static_cast<float>(largest_code(grid.format)) * scale;
      }
    }
  }
}

struct Outcome {
  std::map<std::string, ShardedOptimizer::CodesTensor> codes;
  std::map<std::string, ShardedOptimizer::StateTensor> state;
  std::vector<float> weights;
};

struct Job {
  int ranks = 1;
  bool as_codes = false, on_grid = false;
  std::int64_t first = 1, last = 4;
  std::string load = {}, save = {};
  bool convert = false;
};

Outcome train(const Config& config, const Job& run) {
  Outcome outcome;
  run_thread_ranks(run.ranks, [&](Communicator& comm) {
    Model model;
    for (Parameter& p : model.parameters) p.gradient_state = GradientState::averaged;
    if (run.on_grid) put_on_grid(model, config);
    std::vector<std::size_t> sizes;
    for (const auto& w : model.weights) sizes.push_back(w.size());
    std::vector<Buffers> mine;
    if (run.as_codes) mine = to_codes(model, config);
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    if (!run.load.empty()) optimizer.load(run.load, run.convert);
    for (std::int64_t s = run.first; s <= run.last; ++s) {
      model.backward(s, 0);
      optimizer.step();
    }
    if (!run.save.empty()) optimizer.save(run.save);
    std::vector<int> ids;
    for (int i = 0; i < std::ssize(model.parameters); ++i) ids.push_back(i);
    optimizer.gather(ids);
    auto state = optimizer.gather_state();
    auto codes = optimizer.gather_codes();
    // What every rank's trainer sees is what is gathered.
    for (std::size_t i = 0; run.as_codes && i < mine.size(); ++i) {
      const QuantizedView seen = optimizer.codes(static_cast<int>(i));
      EXPECT_EQ(optimizer.weights(static_cast<int>(i)), nullptr);
      EXPECT_EQ(config.zero_stage < 3, seen.codes == mine[i].codes.data());
      Buffers copy(mine[i].grid, model.parameters[i].shape);
      ASSERT_EQ(seen.rows, copy.rows);
      ASSERT_EQ(seen.cols, copy.cols);
      std::memcpy(copy.codes.data(), seen.codes, copy.codes.size());
      std::memcpy(copy.scales.data(), seen.scales, copy.scales.size() * sizeof(float));
      std::vector<std::int64_t> words(copy.codes.size() + copy.scales.size());
      if (comm.rank() == 0) {
        const auto& whole = codes.at(model.parameters[i].name);
        EXPECT_EQ(whole.codes, copy.codes);
        EXPECT_EQ(whole.scales, copy.scales);
      }
      for (std::size_t k = 0; k < words.size(); ++k) {
        words[k] = k < copy.codes.size()
                       ? static_cast<std::int64_t>(copy.codes[k])
                       : std::bit_cast<std::int32_t>(copy.scales[k - copy.codes.size()]);
      }
      const auto own = words;
      comm.broadcast(std::span(words), 0);
      EXPECT_EQ(own, words) << "rank " << comm.rank();
    }
    if (comm.rank() != 0) return;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      std::vector<float> w(sizes[i]);
      optimizer.copy_weights(static_cast<int>(i), w.data());
      outcome.weights.insert(outcome.weights.end(), w.begin(), w.end());
    }
    outcome.state = std::move(state);
    outcome.codes = std::move(codes);
  });
  return outcome;
}

void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
  EXPECT_EQ(a.weights, b.weights) << what;
  ASSERT_EQ(a.codes.size(), b.codes.size()) << what;
  for (const auto& [name, tensor] : a.codes) {
    EXPECT_EQ(tensor.codes, b.codes.at(name).codes) << what << " " << name;
    EXPECT_EQ(tensor.scales, b.codes.at(name).scales) << what << " " << name;
  }
  ASSERT_EQ(a.state.size(), b.state.size()) << what;
  for (const auto& [name, tensor] : a.state) {
    EXPECT_EQ(tensor.values, b.state.at(name).values) << what << " " << name;
  }
}

class OnRanks : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, OnRanks, testing::Values(1, 2, 3, 4));

const char* const kFormats[] = {
    "{format: fp8_e4m3, rounding: stochastic, residual: momentum}",
    "{format: int8, block: 4, residual: momentum}",
    "{format: int4, residual: none}",
    "{format: int8, scale: tensor, residual: momentum}",
    "{format: fp8_e5m2, scale_format: pow2, residual: momentum}",
    "{format: fp8_e4m3, residual: master}",
};

TEST_P(OnRanks, CodesAreThoseOfATrainerWithTheirValues) {
  for (const std::string weights : kFormats) {
    const bool on_grid = weights.find("master") != std::string::npos;
    for (const char* rule : {"{name: adamw, lr: 0.01, weight_decay: 0.1}",
                             "{name: sgd, lr: 0.02, momentum_form: ema}"}) {
      const Outcome ordinary = train(config_of(weights, "", rule), {.on_grid = on_grid});
      for (const char* extra :
           {"", "zero: {stage: 1}\n", "zero: {stage: 3}\n", "comm: {bucket_bytes: 2KiB}\n",
            "mesh: {replicate: 2}\n", "checks: collective\n"}) {
        const Config config = config_of(weights, extra, rule);
        if (GetParam() % config.mesh.replicate != 0) continue;
        expect_same(train(config, {.ranks = GetParam(), .as_codes = true, .on_grid = on_grid}),
                    ordinary, weights + " " + extra + rule);
      }
    }
  }
}

// Whatever matrices meet in, and whoever else has part of what shares a scale.
TEST_P(OnRanks, InEveryModeAsBesideATrainerWithValues) {
  for (const std::string weights : kFormats) {
    const bool on_grid = weights.find("master") != std::string::npos;
    for (const char* mode : {"exchange", "gather", "gram", "gram_steps"}) {
      for (const char* extra : {"", "zero: {stage: 3}\n"}) {
        const Config config =
            config_of(weights, extra, "{name: adamw, lr: 0.01, weight_decay: 0.1}", mode);
        const Job ordinary{.ranks = GetParam(), .on_grid = on_grid, .last = 3};
        Job codes = ordinary;
        codes.as_codes = true;
        expect_same(train(config, codes), train(config, ordinary), weights + " " + mode + extra);
      }
    }
  }
}

// Also where a scale is not what rounding would make it: nothing is rounded again before a step.
TEST_P(OnRanks, TheInitialCodesStayBitForBit) {
  for (const std::string weights :
       {"{format: fp8_e4m3, residual: momentum}", "{format: int4, residual: momentum}",
        "{format: int8, block: 4, residual: master}",
        "{format: int8, scale: tensor, residual: momentum}"}) {
    for (const char* extra : {"", "zero: {stage: 3}\n"}) {
      const Config config = config_of(weights, extra);
      run_thread_ranks(GetParam(), [&](Communicator& comm) {
        Model model;
        std::vector<Buffers> mine = to_codes(model, config);
        std::mt19937 random(7);  // alike on all ranks
        std::uniform_real_distribution<float> uniform(0.001F, 0.1F);
        for (Buffers& b : mine) {
          for (std::byte& code : b.codes) {
            do {
              code = static_cast<std::byte>(random() & 0xffU);
            } while (!runtime::are_numbers(b.grid.format, std::to_integer<std::uint8_t>(code)));
          }
          for (float& scale : b.scales) scale = uniform(random);
          for (Index r = 0; b.grid.format == CodeFormat::int4 && b.cols % 2 != 0 && r < b.rows;
               ++r) {
            b.codes[static_cast<std::size_t>((r + 1) * b.view().pitch - 1)] &= std::byte{0x0f};
          }
        }
        const std::vector<Buffers> before = mine;
        ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
        EXPECT_EQ(mine, before);
        const auto codes = optimizer.gather_codes();
        const auto state = optimizer.gather_state();
        std::vector<int> ids;
        for (int i = 0; i < std::ssize(model.parameters); ++i) ids.push_back(i);
        optimizer.gather(ids);
        for (std::size_t i = 0; i < mine.size(); ++i) {
          Buffers& b = mine[i];
          std::vector<float> values(static_cast<std::size_t>(b.rows * b.cols));
          std::vector<float> copied(values.size());
          dequantize(b.view(), b.grid, matrix_view(values.data(), b.rows, b.cols));
          optimizer.copy_weights(static_cast<int>(i), copied.data());
          EXPECT_EQ(copied, values);
          const QuantizedView seen = optimizer.codes(static_cast<int>(i));
          EXPECT_EQ(std::memcmp(seen.codes, b.codes.data(), b.codes.size()), 0);
          EXPECT_EQ(std::memcmp(seen.scales, b.scales.data(), b.scales.size() * 4), 0);
          if (comm.rank() != 0) continue;
          const std::string& name = model.parameters[i].name;
          EXPECT_EQ(codes.at(name).codes, b.codes);
          EXPECT_EQ(codes.at(name).scales, b.scales);
          if (const auto it = state.find("state/" + name + "/master"); it != state.end()) {
            EXPECT_EQ(it->second.values, values);  // starts from the products
          }
        }
      });
    }
  }
}

TEST(Codes, CheckpointsGoToAnyRanksAndAnyTrainer) {
  const fs::path directory =
      fs::temp_directory_path() / ("orthrus_codes_" + std::to_string(::getpid()));
  for (const char* weights :
       {"{format: fp8_e4m3, rounding: stochastic, residual: momentum}",
        "{format: int4, residual: momentum}", "{format: int8, block: 4, residual: master}"}) {
    const auto config = [&](int stage) {
      return config_of(weights, "zero: {stage: " + std::to_string(stage) + "}\n");
    };
    const bool on_grid = std::string(weights).find("master") != std::string::npos;
    const Outcome whole = train(config(2), {.on_grid = on_grid});
    for (const int from : {1, 3}) {
      for (const int to : {2, 4}) {
        for (const bool codes_save : {false, true}) {
          for (const int stage : {2, 3}) {
            fs::remove_all(directory);
            train(config(stage), {.ranks = from,
                                  .as_codes = codes_save,
                                  .on_grid = on_grid,
                                  .last = 2,
                                  .save = directory.string()});
            // At least one of the two has codes.
            for (const bool codes_load : {true, !codes_save}) {
              expect_same(train(config(5 - stage), {.ranks = to,
                                                    .as_codes = codes_load,
                                                    .first = 3,
                                                    .load = directory.string()}),
                          whole,
                          std::string(weights) + " from " + std::to_string(from) + " to " +
                              std::to_string(to));
            }
          }
        }
      }
    }
  }
  // And to another format.
  const Config other = config_of("{format: int8, residual: momentum}");
  const Job converted{
      .ranks = 2, .first = 5, .last = 6, .load = directory.string(), .convert = true};
  Job with_codes = converted;
  with_codes.as_codes = true;
  const Outcome ordinary = train(other, converted);
  expect_same(train(other, with_codes), ordinary, "converted");
  Config sharded = other;
  sharded.zero_stage = 3;
  expect_same(train(sharded, with_codes), ordinary, "converted, stage 3");
  fs::remove_all(directory);
}

TEST(Codes, BlocksOfColumnsAreRectanglesOfTheTrainersCodes) {
  // Four matrices of 3×12 in 3×48 codes; and a stack, whose rows are its matrices'.
  for (const char* format : {"int4, block: 4", "fp8_e4m3, block: 6"}) {
    const auto config = [&](const char* extra) {
      return parse_config("schema: 1\n" + std::string(extra) +
                          "groups:\n  - match: \"stack\"\n    rule: {name: muon}\n    split: "
                          "{stack: true}\n    weights: {format: fp8_e4m3, residual: momentum}\n"
                          "  - match: \"*\"\n    rule: {name: muon}\n    split: {cols: 4}\n"
                          "    weights: {format: " +
                          format + ", residual: momentum}\n");
    };
    const auto run = [&](const char* extra, int ranks, bool as_codes) {
      std::map<std::string, ShardedOptimizer::CodesTensor> all;
      run_thread_ranks(ranks, [&](Communicator& comm) {
        const Config c = config(extra);
        const std::vector<std::vector<Index>> shapes{{3, 48}, {4, 5, 6}};
        std::vector<std::vector<float>> weights;
        std::vector<std::vector<float>> gradients;
        std::vector<Parameter> parameters(2);
        std::vector<Buffers> buffers;
        for (std::size_t i = 0; i < shapes.size(); ++i) {
          parameters[i].name = i == 0 ? "wide" : "stack";
          parameters[i].shape = shapes[i];
          parameters[i].gradient_state = GradientState::averaged;
          const std::size_t n = i == 0 ? 144 : 120;
          std::vector<float>& w = weights.emplace_back(n);
          std::vector<float>& g = gradients.emplace_back(n);
          for (std::size_t e = 0; e < n; ++e) {
            w[e] = static_cast<float>(std::sin(1.0 + static_cast<double>(e * (i + 1))));
            g[e] = static_cast<float>(std::cos(2.0 + static_cast<double>(e * (i + 3))));
          }
          parameters[i].gradient = g.data();
          const Grid grid = *grid_of(c.groups[i == 0 ? 1 : 0].weights);
          Buffers& b = buffers.emplace_back(
              grid, i == 0 ? shapes[0] : std::vector<Index>{20, 6});  // rows of the matrices
          quantize(matrix_view(std::as_const(w).data(), b.rows, b.cols), grid, b.view());
        }
        for (std::size_t i = 0; i < shapes.size(); ++i) {
          parameters[i].weights = as_codes ? nullptr : weights[i].data();
          parameters[i].codes = as_codes ? buffers[i].codes.data() : nullptr;
          parameters[i].scales = as_codes ? buffers[i].scales.data() : nullptr;
        }
        ShardedOptimizer optimizer{c, comm.duplicate("job"), parameters};
        for (int s = 0; s < 3; ++s) optimizer.step();
        auto codes = optimizer.gather_codes();
        if (as_codes && c.zero_stage < 3) {
          for (std::size_t i = 0; comm.rank() == 0 && i < 2; ++i) {
            EXPECT_EQ(codes.at(parameters[i].name).codes, buffers[i].codes);
            EXPECT_EQ(codes.at(parameters[i].name).scales, buffers[i].scales);
          }
        }
        if (comm.rank() == 0) all = std::move(codes);
      });
      return all;
    };
    const auto ordinary = run("", 1, false);
    for (const int ranks : {1, 2, 3}) {
      for (const char* extra : {"", "zero: {stage: 3}\n"}) {
        const auto codes = run(extra, ranks, true);
        for (const auto& [name, tensor] : ordinary) {
          EXPECT_EQ(codes.at(name).codes, tensor.codes) << format << " " << name;
          EXPECT_EQ(codes.at(name).scales, tensor.scales) << format << " " << name;
        }
      }
    }
  }
}

// ---- memory -------------------------------------------------------------------------------------

/// Bytes this process has from malloc and from the mappings malloc makes.
std::int64_t allocated_bytes() {
  const auto info = mallinfo2();
  return static_cast<std::int64_t>(info.uordblks + info.hblkhd);
}

const std::vector<std::vector<Index>> kLarge{{512, 768}, {512, 768}, {1024, 256}, {600, 500}};

TEST(CodesMemory, IsCodesScalesMomentumAndWork) {
  if (allocated_bytes() == 0) GTEST_SKIP() << "this build's allocator does not count";
  for (const auto& [weights, bits] :
       std::vector<std::pair<const char*, int>>{{"{format: fp8_e4m3, residual: momentum}", 8},
                                                {"{format: int4, residual: momentum}", 4},
                                                {"{format: int8, block: 32, residual: none}", 8}}) {
    for (const char* extra :
         {"", "zero: {stage: 1}\n", "zero: {stage: 3}\n", "mesh: {replicate: 2}\n"}) {
      const Config config = parse_config(
          "schema: 1\ncomm: {bucket_bytes: 256KiB}\n" + std::string(extra) +
          "groups:\n  - {match: 'w*', rule: {name: sgd, momentum_form: ema}, weights: " + weights +
          "}\n");
      const int ranks = config.mesh.replicate == 2 ? 4 : 3;
      std::int64_t elements = 0;
      std::int64_t scales = 0;
      std::atomic<std::int64_t> planned = 0;
      std::atomic<std::int64_t> of_trainers = 0;
      std::int64_t before = 0;
      std::int64_t after = 0;
      for (const auto& dims : kLarge) {
        elements += dims[0] * dims[1];
        scales += scale_count(*grid_of(config.groups[0].weights), dims[0], dims[1]);
      }
      run_thread_ranks(ranks, [&](Communicator& comm) {
        std::vector<float> gradient(static_cast<std::size_t>(elements), 1.0F);  // not counted
        comm.barrier();
        if (comm.rank() == 0) before = allocated_bytes();
        comm.barrier();
        std::vector<Buffers> buffers;
        std::vector<Parameter> parameters;
        const float* next = gradient.data();
        std::int64_t mine = 0;
        for (std::size_t i = 0; i < kLarge.size(); ++i) {
          const Grid grid = *grid_of(config.groups[0].weights);
          Buffers& b = buffers.emplace_back(grid, kLarge[i]);
          std::fill(b.codes.begin(), b.codes.end(), std::byte{0x11});
          std::fill(b.scales.begin(), b.scales.end(), 0.01F);
          mine += std::ssize(b.codes) + std::ssize(b.scales) * 4;
          Parameter& p = parameters.emplace_back();
          p.name = "w" + std::to_string(i);
          p.shape = kLarge[i];
          p.gradient = next;
          p.gradient_state = GradientState::averaged;
          next += b.rows * b.cols;
        }
        for (std::size_t i = 0; i < kLarge.size(); ++i) {
          parameters[i].codes = buffers[i].codes.data();
          parameters[i].scales = buffers[i].scales.data();
        }
        const bool sharded = config.zero_stage == 3;
        ShardedOptimizer optimizer{config, comm.duplicate("job"), parameters};
        if (sharded) {  // only the constructor reads them
          buffers.clear();
          buffers.shrink_to_fit();
        }
        const MemoryPlan plan = optimizer.memory();
        if (!sharded) {
          EXPECT_EQ(plan.weights, mine);
          EXPECT_EQ(plan.weights, elements * bits / 8 + 4 * scales);
        }
        // What a working set has is mapped, not from malloc; it is counted without its shard here.
        planned += plan.total();
        if (sharded) {
          std::int64_t whole = 0;
          for (std::size_t i = 0; i < kLarge.size(); ++i) {
            const Grid grid = *grid_of(config.groups[0].weights);
            const std::int64_t page = ::sysconf(_SC_PAGESIZE);
            const std::int64_t bytes = code_bytes(grid, kLarge[i][0], kLarge[i][1]) +
                                       4 * scale_count(grid, kLarge[i][0], kLarge[i][1]);
            whole += (bytes + page - 1) / page * page;
          }
          EXPECT_LE(whole, plan.weights);
          EXPECT_LE(plan.weights, whole + elements * bits / 8 / 3 + 4 * scales + 64 * 256);
          planned -= whole;
        }
        for (int s = 0; s < 3; ++s) {
          std::vector<int> ids;
          for (int i = 0; i < std::ssize(parameters); ++i) ids.push_back(i);
          optimizer.gather(ids);
          optimizer.step();
        }
        comm.barrier();
        if (comm.rank() == 0) after = allocated_bytes();
        comm.barrier();
        const long news = count_new::calls;
        comm.barrier();
        optimizer.step();
        comm.barrier();
        EXPECT_EQ(count_new::calls, news);
        comm.barrier();
      });
      // Beside what is planned: configuration, plan and tables, what thread ranks talk through;
      // 150 KB a rank. The shards of f32 weights alone are six times that.
      const std::int64_t beside = ranks * std::int64_t{192} * 1024;
      EXPECT_GE(after - before, planned) << weights << " " << extra;
      EXPECT_LE(after - before, planned + beside) << weights << " " << extra;
      EXPECT_GT(4 * elements, 6 * beside);
    }
  }
}

// Beside a trainer with values, an optimizer keeps scales; beside one with codes it does not.
TEST(CodesMemory, NoScalesAreKeptTwice) {
  const Config config = config_of("{format: fp8_e4m3, residual: momentum}");
  Model model;
  std::vector<runtime::ParameterShape> shapes;
  for (const Parameter& p : model.parameters) shapes.push_back(runtime::shape_of(p));
  const runtime::Plan ordinary = runtime::make_plan(config, shapes, 3);
  for (runtime::ParameterShape& p : shapes) p.as_codes = true;
  const runtime::Plan codes = runtime::make_plan(config, shapes, 3);
  EXPECT_NE(ordinary.hash, codes.hash);
  for (std::size_t r = 0; r < 3; ++r) {
    EXPECT_LT(codes.per_rank[r].memory.state, ordinary.per_rank[r].memory.state);
    EXPECT_LT(codes.per_rank[r].memory.work, ordinary.per_rank[r].memory.work);
    EXPECT_EQ(codes.per_rank[r].traffic, ordinary.per_rank[r].traffic);
    EXPECT_EQ(codes.per_rank[r].memory.gradients, ordinary.per_rank[r].memory.gradients);
  }
}

// ---- what is made of f32 ------------------------------------------------------------------------

TEST(Quantize, LeavesTheWeightsAndGivesTheMaxima) {
  for (const CodeFormat format : code_formats) {
    for (const auto extent : {Grid::Extent::tensor, Grid::Extent::row, Grid::Extent::block}) {
      const Grid grid{format, extent, 6, false};
      constexpr Index rows = 300, cols = 97;
      std::vector<float> w(rows * cols);
      for (std::size_t i = 0; i < w.size(); ++i) w[i] = std::sin(static_cast<float>(i) * 0.37F);
      const std::vector<float> before = w;
      Buffers b(grid, {rows, cols});
      std::vector<float> maxima(b.scales.size());
      quantize(matrix_view(std::as_const(w).data(), rows, cols), grid, b.view(),
               matrix_view(maxima.data(), scale_rows(grid, rows), scale_cols(grid, cols)));
      EXPECT_EQ(w, before);
      std::vector<float> expected(maxima.size(), 0.0F);
      const Index unit = extent == Grid::Extent::block ? grid.block : cols;
      std::vector<float> values(w.size());
      dequantize(b.view(), grid, matrix_view(values.data(), rows, cols));
      for (Index r = 0; r < rows; ++r) {
        for (Index c = 0; c < cols; ++c) {
          const auto at = static_cast<std::size_t>(r * cols + c);
          float& most = expected[static_cast<std::size_t>(
              extent == Grid::Extent::tensor ? 0 : r * scale_cols(grid, cols) + c / unit)];
          most = std::max(most, std::abs(w[at]));
        }
      }
      EXPECT_EQ(maxima, expected);
      for (Index r = 0; r < rows; ++r) {
        for (Index c = 0; c < cols; ++c) {
          const auto at = static_cast<std::size_t>(r * cols + c);
          const auto k = static_cast<std::size_t>(
              extent == Grid::Extent::tensor ? 0 : r * scale_cols(grid, cols) + c / unit);
          const double scale = maxima[k] / largest_code(format);
          EXPECT_NEAR(b.scales[k], scale, scale * 0x1p-22);
          // Half a step: integers lie one apart, fp8 2⁻³ (2⁻²) of their power of two.
          const double z = std::abs(w[at]) / scale;
          const bool is_float = format == CodeFormat::fp8_e4m3 || format == CodeFormat::fp8_e5m2;
          const int bits = format == CodeFormat::fp8_e4m3 ? 3 : 2;
          const int lowest = format == CodeFormat::fp8_e4m3 ? -6 : -14;
          const double step =
              is_float ? std::exp2(std::max(std::floor(std::log2(z)), double{lowest + 0.0}) - bits)
                       : 1;
          EXPECT_LE(std::abs(values[at] - w[at]), scale * (step / 2 + z * 0x1p-21));
        }
      }
    }
  }
  std::vector<float> w{1.0F, NAN};
  Buffers b({}, {1, 2});
  EXPECT_THROW(quantize(matrix_view(std::as_const(w).data(), 1, 2), {}, b.view()), NumericError);
  EXPECT_THROW(quantize(matrix_view(std::as_const(w).data(), 2, 1), {}, b.view()), ShapeError);
}

// ---- bad input ----------------------------------------------------------------------------------

struct Refusal {
  std::string what;
  ExitCode code = ExitCode::ok;
  int ranks = 0;  ///< that threw
};

/// What all ranks say of a trainer with codes that `change(model, codes, rank)` has spoilt.
Refusal refusal(const Config& config,
                const std::function<void(Model&, std::vector<Buffers>&, int)>& change) {
  Refusal refusal;
  std::atomic<int> threw = 0;
  run_thread_ranks(2, [&](Communicator& comm) {
    Model model;
    std::vector<Buffers> buffers = to_codes(model, config);
    change(model, buffers, comm.rank());
    try {
      ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    } catch (const Error& e) {
      ++threw;
      if (comm.rank() == 0) refusal.what = e.what(), refusal.code = e.exit_code();
    }
  });
  refusal.ranks = threw;
  return refusal;
}

TEST(Codes, BadInputIsRefusedOnAllRanksWithNameAndReason) {
  const Config config = config_of("{format: fp8_e4m3, residual: momentum}");
  const auto expect = [](const Refusal& r, ExitCode code, const std::string& name,
                         const std::string& reason) {
    EXPECT_EQ(r.ranks, 2) << reason;
    EXPECT_EQ(r.code, code) << r.what;
    EXPECT_NE(r.what.find("'" + name + "'"), std::string::npos) << r.what;
    EXPECT_NE(r.what.find(reason), std::string::npos) << r.what;
  };
  const auto scale = [](float value) {
    return [value](Model&, std::vector<Buffers>& b, int rank) {
      if (rank == 1) b[1].scales[2] = value;
    };
  };
  EXPECT_EQ(refusal(config, [](Model&, std::vector<Buffers>&, int) {}).ranks, 0);
  expect(refusal(config, scale(NAN)), ExitCode::data, "a.weight", "scale 2 is");
  expect(refusal(config, scale(INFINITY)), ExitCode::data, "a.weight", "not a positive number");
  expect(refusal(config, scale(0)), ExitCode::data, "a.weight", "not a positive number");
  expect(refusal(config, scale(-1)), ExitCode::data, "a.weight", "not a positive number");
  const Config pow2 = config_of("{format: fp8_e4m3, scale_format: pow2, residual: momentum}");
  expect(refusal(pow2, scale(0.3F)), ExitCode::data, "a.weight", "not a power of two");
  expect(refusal(config,
                 [](Model&, std::vector<Buffers>& b, int) { b[0].codes[50] = std::byte{0x7f}; }),
         ExitCode::data, "embed", "a code in row 2, byte 10");
  const Config int8 = config_of("{format: int8, residual: momentum}");
  expect(
      refusal(int8, [](Model&, std::vector<Buffers>& b, int) { b[0].codes[0] = std::byte{0x80}; }),
      ExitCode::data, "embed", "is no number of int8");
  std::vector<float> room(6000);
  expect(refusal(config,
                 [&](Model& m, std::vector<Buffers>&, int) { m.parameters[0].weights = &room[0]; }),
         ExitCode::config, "embed", "computes with either");
  expect(refusal(config,
                 [](Model& m, std::vector<Buffers>&, int) { m.parameters[0].scales = nullptr; }),
         ExitCode::config, "embed", "its scales pointer is null");
  expect(refusal(config,
                 [](Model& m, std::vector<Buffers>&, int) { m.parameters[0].codes = nullptr; }),
         ExitCode::config, "embed", "its codes pointer is null");
  expect(refusal(config,
                 [](Model& m, std::vector<Buffers>&, int) {
                   m.parameters[0].codes = nullptr, m.parameters[0].scales = nullptr;
                 }),
         ExitCode::config, "embed", "its weights pointer is null");
  expect(refusal(config,
                 [&](Model& m, std::vector<Buffers>&, int rank) {
                   if (rank == 0) return;
                   m.parameters[0].codes = nullptr, m.parameters[0].scales = nullptr;
                   m.parameters[0].weights = &room[0];
                 }),
         ExitCode::config, "embed", "as codes");
  expect(refusal(config, [](Model& m, std::vector<Buffers>&,
                            int) { m.parameters[1].codes = m.parameters[0].codes; }),
         ExitCode::config, "embed", "overlap in memory");
  expect(refusal(config,
                 [](Model& m, std::vector<Buffers>&, int) {
                   m.parameters[1].strides = {1, 12};
                 }),
         ExitCode::config, "a.weight", "it is not dense");
  Config some = config;
  some.groups[1].weights = {};
  Model model;
  std::vector<runtime::ParameterShape> shapes;
  for (const Parameter& p : model.parameters) shapes.push_back(runtime::shape_of(p));
  shapes[0].as_codes = true;
  try {
    runtime::make_plan(some, shapes, 2);
    ADD_FAILURE() << "codes of f32 weights";
  } catch (const ConfigError& e) {
    EXPECT_NE(std::string(e.what()).find("'embed'"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("weights.format: f32"), std::string::npos) << e.what();
  }
  shapes[0].gradient_state = GradientState::shard;
  shapes[0].sharding.along = Sharding::Along::rows;
  try {
    runtime::make_plan(config, shapes, 2);
    ADD_FAILURE() << "codes of a shard";
  } catch (const ConfigError& e) {
    EXPECT_NE(std::string(e.what()).find("'embed'"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("not codes and scales"), std::string::npos) << e.what();
  }
}

TEST(Codes, BlocksThatShareAByteOrAScaleAreRefused) {
  const auto refused = [](const char* format, std::vector<LogicalMatrix> views) {
    runtime::ParameterShape p;
    p.name = "fused";
    p.shape = {4, 12};
    p.views = std::move(views);
    p.as_codes = true;
    const Config config =
        parse_config("schema: 1\ngroups:\n  - {match: '*', rule: {name: muon}, weights: {format: " +
                     std::string(format) + ", residual: momentum}}\n");
    try {
      runtime::make_plan(config, {p}, 2);
    } catch (const ConfigError& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  const std::vector<LogicalMatrix> odd{{0, 4, 0, 5}, {0, 4, 5, 7}};
  const std::vector<LogicalMatrix> even{{0, 4, 0, 8}, {0, 4, 8, 4}};
  EXPECT_NE(refused("int4, block: 4", odd).find("'fused"), std::string::npos);
  EXPECT_NE(refused("int4, block: 4", odd).find("inside a block of 4"), std::string::npos);
  EXPECT_NE(refused("int8, block: 6", even).find("inside a block of 6"), std::string::npos);
  EXPECT_EQ(refused("int4, block: 4", even), "");
  EXPECT_NE(refused("int4", even).find("cannot share a scale"), std::string::npos);
}

// ---- what the trainer did to them ---------------------------------------------------------------

/// What all of two ranks say when `touch` was done to the trainer between two steps.
Refusal touched(const Config& config, bool as_codes,
                const std::function<void(Model&, std::vector<Buffers>&, int)>& touch) {
  Refusal refusal;
  std::atomic<int> threw = 0;
  run_thread_ranks(2, [&](Communicator& comm) {
    Model model;
    std::vector<Buffers> buffers;
    if (as_codes) buffers = to_codes(model, config);
    ShardedOptimizer optimizer{config, comm.duplicate("job"), model.parameters};
    for (std::int64_t s = 1; s <= 2; ++s) {
      model.backward(s, comm.rank());
      optimizer.step();
    }
    touch(model, buffers, comm.rank());
    try {
      optimizer.step();
    } catch (const Error& e) {
      ++threw;
      if (comm.rank() == 0) refusal.what = e.what(), refusal.code = e.exit_code();
    }
  });
  refusal.ranks = threw;
  return refusal;
}

TEST(Collective, ValuesThatATrainerTouchedAreNamed) {
  for (const std::string weights : kFormats) {
    const Config config = config_of(weights, "checks: collective\n");
    const auto nothing = [](Model&, std::vector<Buffers>&, int) {};
    EXPECT_EQ(touched(config, false, nothing).ranks, 0) << weights;
    EXPECT_EQ(touched(config, true, nothing).ranks, 0) << weights;
    // Alike on all ranks, which a comparison of replicas does not see.
    for (const std::size_t parameter : {std::size_t{0}, std::size_t{1}}) {
      const auto move = [parameter](Model& m, std::vector<Buffers>&, int) {
        float& w = m.weights[parameter][7];
        w = std::nextafter(w, 2.0F);
      };
      const Refusal r = touched(config, false, move);
      EXPECT_EQ(r.ranks, 2) << weights;
      EXPECT_EQ(r.code, ExitCode::numeric);
      EXPECT_NE(r.what.find("'" + Model().parameters[parameter].name + "' on rank "),
                std::string::npos)
          << r.what;
    }
  }
  const Config config = config_of(kFormats[0], "checks: collective\n");
  const Refusal nan =
      touched(config, false, [](Model& m, std::vector<Buffers>&, int) { m.weights[2][3] = NAN; });
  EXPECT_NE(nan.what.find("'a.bias' on rank "), std::string::npos) << nan.what;
  for (const bool of_scales : {false, true}) {
    const Refusal r = touched(config, true, [&](Model&, std::vector<Buffers>& b, int rank) {
      if (rank == 0) return;
      if (of_scales) {
        b[3].scales[1] *= 2;
      } else {
        b[3].codes[1] ^= std::byte{1};
      }
    });
    EXPECT_EQ(r.ranks, 2);
    EXPECT_EQ(r.code, ExitCode::numeric);
    EXPECT_NE(r.what.find("'qkv.weight' differ from rank 0's"), std::string::npos) << r.what;
  }
}

}  // namespace
}  // namespace orthrus
