// On a device whose memory the host cannot follow, whose queue and copies are late, an optimizer
// does to the bit what it does on the CPU, and sends the same bytes.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <latch>
#include <mutex>
#include <orthrus/error.hpp>
#include <tuple>

#include "comm/core.hpp"
#include "kernels/bf16.hpp"
#include "kernels/cuda/devices.hpp"
#include "modes_model.hpp"
#include "runtime/checkpoint.hpp"
#include "runtime/engine.hpp"
#include "support/far_backend.hpp"
#include "toy_model.hpp"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif

namespace orthrus {
namespace {

using far_device::FarBackend;
using far_device::FarCopies;
using modes::Along;
using modes::ModeCase;
using modes::Model;
using modes::Tensor;
using modes::Trainer;

/// Where the trainer has its tensors.
enum class Home : std::uint8_t { host, device, both };

/// What a run is made of, beside its configuration.
struct Run {
  int ranks = 1;
  bool far = false;  ///< computed on the far device
  Home home = Home::host;
  bool local = true;  ///< every rank has gradients of its own, where the trainer holds no shards
  std::int64_t first = 1, last = 3;
  std::string load = {}, save = {};
};

/// All that can be seen of a run.
struct Outcome {
  std::vector<std::vector<float>> weights;
  std::map<std::string, std::vector<float>> state;
  struct Step {
    std::int64_t bytes, messages, matrices, exceptional;
    std::vector<double> update_rms, gradient_norm;
    std::vector<double> seen;  ///< of matrices, where this step looks at them
    friend bool operator==(const Step&, const Step&) = default;
  };
  std::vector<std::vector<Step>> steps;  ///< per rank
};

void expect_same(const Outcome& found, const Outcome& expected, const std::string& where) {
  EXPECT_EQ(found.weights, expected.weights) << where;
  EXPECT_EQ(found.state, expected.state) << where;
  EXPECT_TRUE(found.steps == expected.steps) << where;
}

/// The buffers of one rank, of which the device's are copies of a host trainer's.
class DeviceTrainer {
 public:
  DeviceTrainer(const Model& model, const Run& run, int rank, int shard, int shards)
      : run_(run), rank_(rank), host(model, shard, shards), parameters(host.parameters) {
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      Parameter& p = parameters[i];
      const auto n = modes::elements_of(model.tensors[i], shard, shards).size();
      if (p.sharding.along == Along::none && run.local) p.gradient_state = GradientState::local;
      const bool weights = run.home == Home::device || (run.home == Home::both && i % 2 == 0);
      const bool gradient = run.home == Home::device || (run.home == Home::both && i % 3 == 0);
      weights_.emplace_back(device_, weights ? n * bytes_of(p.dtype) : 0);
      gradients_.emplace_back(device_, gradient ? n * bytes_of(p.gradient_dtype) : 0);
      if (weights) p.weights = weights_[i].data();
      if (gradient) p.gradient = gradients_[i].data();
    }
    upload(weights_, &Parameter::weights);
  }

  void backward(std::int64_t step) {
    host.backward(run_.local ? 1 + (step + rank_) % 4 : step);
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      device_.copy(host.parameters[i].gradient, gradients_[i].data(), gradients_[i].bytes());
    }
    device_.wait();
  }
  /// What stage 3 has read is the trainer's again, for whatever it likes.
  void reuse_weights() {
    for (const Parameter& p : host.parameters) {
      std::size_t bytes = bytes_of(p.dtype);
      for (const Index n : p.shape) bytes *= static_cast<std::size_t>(n);
      if (p.sharding.along == Along::none) std::memset(p.weights, 0xff, bytes);  // NaN
    }
  }
  /// The weights, to the host trainer.
  void fetch(ShardedOptimizer& optimizer) {
    for (int id = 0; id < std::ssize(parameters); ++id) {
      Parameter& p = host.parameters[static_cast<std::size_t>(id)];
      optimizer.gather({&id, 1});
      // What is on the host must be there already.
      const auto i = static_cast<std::size_t>(id);
      if (optimizer.weights(id) != p.weights) optimizer.copy_weights(id, p.weights);
      EXPECT_TRUE(weights_[i].data() == nullptr || parameters[i].weights == weights_[i].data());
      optimizer.release({&id, 1});
    }
  }

 private:
  void upload(const std::vector<kernels::DeviceBuffer>& to, void* Parameter::*from) {
    for (std::size_t i = 0; i < to.size(); ++i) {
      device_.copy(host.parameters[i].*from, to[i].data(), to[i].bytes());
    }
    device_.wait();
  }

  Run run_;
  int rank_;
  FarBackend device_;
  std::vector<kernels::DeviceBuffer> weights_, gradients_;

 public:
  Trainer host;
  std::vector<Parameter> parameters;
};

/// The seat of a rank on the far device. @param made  where the device is to be seen; may be null.
runtime::OpenSeat far_seat(FarBackend** made = nullptr) {
  return [made](const Config&, const DeviceChoice&, Communicator& world) {
    auto backend = std::make_unique<FarBackend>();
    if (made != nullptr) *made = backend.get();
    runtime::Seat seat;
    seat.payload = comm::staged(world, std::make_shared<FarCopies>(*backend));
    seat.backend = std::move(backend);
    return seat;
  };
}

Outcome train(const Config& config, const Model& model, const Run& run) {
  Outcome outcome;
  outcome.weights = model.weights;
  outcome.steps.resize(static_cast<std::size_t>(run.ranks));
  run_thread_ranks(run.ranks, [&](Communicator& comm) {
    const int shards = config.mesh.shard > 0 ? static_cast<int>(config.mesh.shard) : run.ranks;
    DeviceTrainer trainer(model, run, comm.rank(), comm.rank() % shards, shards);
    const runtime::Plan plan = modes::plan_of(config, trainer.parameters, run.ranks);
    FarBackend* device = nullptr;
    ShardedOptimizer optimizer =
        run.far ? ShardedOptimizer(std::make_unique<ShardedOptimizer::Impl>(
                      config, comm.duplicate("job"), trainer.parameters, DeviceChoice{},
                      far_seat(&device)))
                : ShardedOptimizer(config, comm.duplicate("job"), trainer.parameters);
    if (config.zero_stage == 3) trainer.reuse_weights();
    if (!run.load.empty()) optimizer.load(run.load);
    std::int64_t allocated = 0;
    std::vector<int> ids(trainer.parameters.size());
    std::iota(ids.begin(), ids.end(), 0);
    for (std::int64_t s = run.first; s <= run.last; ++s) {
      if (config.zero_stage == 3) {
        optimizer.gather(ids);
        optimizer.release(ids);
      }
      const std::int64_t batches =
          config.virtual_shards > 0
              ? runtime::leaf_run(config.virtual_shards, run.ranks, comm.rank()).size()
              : config.train.micro_batches;
      for (std::int64_t k = 0; k < batches; ++k) {
        optimizer.micro_batch(k);
        trainer.backward(s + k);
        for (int id = static_cast<int>(ids.size()) - 1; id >= 0; --id) {
          if ((id + s) % 4 != 0) optimizer.gradient_ready(id);  // `step` asks for the others
        }
      }
      const StepReport& report = optimizer.step();
      EXPECT_FALSE(report.skipped) << report.skip_reason;
      const runtime::RankPlan& mine = plan.per_rank[static_cast<std::size_t>(comm.rank())];
      Traffic planned = mine.traffic_of(report.step);
      std::vector<double> seen;
      for (const MatrixSpectra& m : optimizer.spectra()) {
        if (m.step != report.step) continue;
        if (seen.empty()) planned += mine.probe;
        seen.insert(seen.end(), {m.gradient.nuclear_rank, m.momentum.erank1, m.weights.stable_rank,
                                 m.update.operator_norm, m.alignment, m.nuclear_noise,
                                 report.model_noise.absolute_deviation});
      }
      EXPECT_EQ(seen.empty(), !plan.looks || report.step % config.diagnostics.every_steps != 0);
      if (config.zero_stage < 3) {
        EXPECT_EQ(report.bytes_sent, planned.bytes);
        EXPECT_EQ(report.messages, planned.messages);
      }
      outcome.steps[static_cast<std::size_t>(comm.rank())].push_back(
          {report.bytes_sent, report.messages, report.matrices, report.exceptional_bytes,
           report.update_rms, report.gradient_norm, seen});
      if (device != nullptr && config.checks != "collective") {
        EXPECT_TRUE(s == run.first || device->allocated == allocated) << "in step " << s;
        allocated = device->allocated;
      }
    }
    auto state = optimizer.gather_state();
    if (comm.rank() == 0) {
      for (auto& [name, tensor] : state) outcome.state[name] = std::move(tensor.values);
    }
    if (!run.save.empty()) optimizer.save(run.save);
    trainer.fetch(optimizer);
    if (comm.rank() < shards) {
      static std::mutex writing;  // whole tensors are written by every rank that has them
      const std::lock_guard lock(writing);
      trainer.host.take(outcome.weights);
    }
    comm.barrier();
    EXPECT_EQ(trainer.host.different(outcome.weights), 0) << "on rank " << comm.rank();
  });
  return outcome;
}

/// The far device must do what the CPU does, wherever the trainer has its tensors.
void expect_as_on_cpu(const Config& config, const Model& model, Run run, const std::string& where,
                      std::vector<Home> homes = {Home::device}) {
  const Outcome expected = train(config, model, run);
  run.far = true;
  for (const Home home : homes) {
    run.home = home;
    expect_same(train(config, model, run), expected,
                where + ", home " + std::to_string(static_cast<int>(home)));
  }
}

/// Weights rounded to bf16, whatever buffer the trainer has them in.
Config in_bf16(Config config) {
  for (GroupConfig& g : config.groups) g.weights.format = "bf16";
  return config;
}

// ---- codes --------------------------------------------------------------------------------------

/// Codes of all parameters after some steps, of a trainer that has them; saved and loaded on the
/// way.
std::vector<std::vector<std::byte>> train_codes(const Config& config, int ranks, bool far,
                                                bool codes_on_host = false) {
  std::vector<std::vector<std::byte>> outcome;
  const auto directory =
      std::filesystem::temp_directory_path() / ("orthrus_far_codes_" + std::to_string(::getpid()));
  std::filesystem::remove_all(directory);
  run_thread_ranks(ranks, [&](Communicator& comm) {
    toy::Model model;
    FarBackend device;
    std::vector<std::vector<std::byte>> codes;
    std::vector<std::vector<float>> scales;
    std::vector<kernels::DeviceBuffer> there;
    const Grid grid = *grid_of(config.groups[0].weights);
    for (std::size_t i = 0; i < model.parameters.size(); ++i) {
      Parameter& p = model.parameters[i];
      p.gradient_state = GradientState::averaged;
      const Index rows = p.shape.size() < 2 ? 1 : p.shape[0];
      const Index cols = std::ssize(model.weights[i]) / rows;
      auto& c = codes.emplace_back(static_cast<std::size_t>(code_bytes(grid, rows, cols)));
      auto& s = scales.emplace_back(static_cast<std::size_t>(scale_count(grid, rows, cols)));
      quantize(matrix_view(std::as_const(model.weights[i]).data(), rows, cols), grid,
               quantized_view(c.data(), s.data(), grid, rows, cols));
      p.weights = nullptr;
      p.codes = c.data();
      p.scales = s.data();
      if (!far || codes_on_host) continue;
      p.codes = there.emplace_back(device, c.size()).data();
      device.copy(c.data(), p.codes, c.size());
      p.scales = static_cast<float*>(there.emplace_back(device, s.size() * 4).data());
      device.copy(s.data(), p.scales, s.size() * 4);
    }
    device.wait();
    ShardedOptimizer optimizer =
        far ? ShardedOptimizer(std::make_unique<ShardedOptimizer::Impl>(
                  config, comm.duplicate("job"), model.parameters, DeviceChoice{}, far_seat()))
            : ShardedOptimizer(config, comm.duplicate("job"), model.parameters);
    const auto step = [&](std::int64_t s) {
      model.backward(s, 0);
      optimizer.step();
    };
    step(1), step(2);
    optimizer.save(directory);
    step(7);
    optimizer.load(directory);
    step(3);
    for (int id = 0; id < std::ssize(model.parameters); ++id) {
      const auto i = static_cast<std::size_t>(id);
      optimizer.gather({&id, 1});
      std::vector<float> values(model.weights[i].size());
      optimizer.copy_weights(id, values.data());
      if (comm.rank() == 0) {
        const auto bytes = std::as_bytes(std::span(values));
        outcome.emplace_back(bytes.begin(), bytes.end());
      }
      optimizer.release({&id, 1});
    }
    for (auto& [name, tensor] : optimizer.gather_codes()) {
      const auto bytes = std::as_bytes(std::span(tensor.scales));
      outcome.push_back(tensor.codes);
      outcome.emplace_back(bytes.begin(), bytes.end());
    }
  });
  std::filesystem::remove_all(directory);
  return outcome;
}

TEST(Device, ATrainerWithCodesThereIsAsOnTheCpu) {
  for (const char* weights :
       {"{format: fp8_e4m3, rounding: stochastic, residual: momentum}",
        "{format: int8, block: 4, residual: master}", "{format: int4, residual: none}"}) {
    for (const char* extra : {"checks: collective\n", "zero: {stage: 3}\n"}) {
      const Config config =
          parse_config("schema: 1\n" + std::string(extra) +
                       "groups:\n  - {match: '*.weight', rule: {name: muon}, weights: " + weights +
                       "}\n  - {match: '*', rule: {name: adamw}, weights: " + weights + "}\n");
      for (const int ranks : {1, 3}) {
        EXPECT_TRUE(train_codes(config, ranks, true) == train_codes(config, ranks, false))
            << weights << " " << extra;
      }
      EXPECT_THROW(
          {
            try {
              train_codes(config, 2, true, /*codes_on_host=*/true);
            } catch (const ConfigError& e) {
              EXPECT_NE(std::string(e.what()).find("'embed': its codes are on the host"),
                        std::string::npos)
                  << e.what();
              throw;
            }
          },
          ConfigError);
    }
  }
}

class DeviceInMode : public testing::TestWithParam<ModeCase> {};
INSTANTIATE_TEST_SUITE_P(Modes, DeviceInMode, testing::ValuesIn(modes::all),
                         [](const auto& info) { return modes::label(info.param); });

TEST_P(DeviceInMode, IsAsOnTheCpuWhereverTheTrainersTensorsAre) {
  const Model model = modes::held_model();
  // Whose columns no rank's piece cuts: NorMuon then has no Gram form.
  for (const int ranks : {1, 2, 3}) {
    for (const char* extra :
         {"comm: {bucket_bytes: 2KiB}\n",
          "zero: {stage: 1}\nchecks: collective\ntrain: {micro_batches: 2}\n"}) {
      const Config config = modes::held_config(GetParam(), Along::none, extra);
      expect_as_on_cpu(config, model, {.ranks = ranks},
                       modes::label(GetParam()) + " on " + std::to_string(ranks) + " ranks",
                       {Home::device, Home::host, Home::both});
    }
  }
}

TEST_P(DeviceInMode, IsAsOnTheCpuForShardsThatTheTrainerHolds) {
  if (GetParam().name == std::string("owner")) return;  // shards are no whole matrices
  Model model = modes::held_model();
  modes::cut(model, {Along::columns, true}, 3);
  const Config config = modes::held_config(GetParam(), Along::columns, "checks: collective\n");
  expect_as_on_cpu(config, model, {.ranks = 3}, modes::label(GetParam()),
                   {Home::device, Home::both});
}

// Shards that the trainer holds on the host are rounded there, too, before the first step.
TEST(Device, IsAsOnTheCpuForQuantizedShardsThatTheTrainerHolds) {
  for (const std::string weights :
       {"{format: int4, residual: none}",
        "{format: int8, residual: momentum, eco: {max_rel_correction: 0}}"}) {
    Model model = modes::model_for(weights);
    modes::cut(model, {Along::columns, true}, 3);
    const Config config = modes::with_weights(
        modes::held_config(modes::exchange, Along::columns, "checks: collective\n"), weights);
    expect_as_on_cpu(config, model, {.ranks = 3}, weights, {Home::device, Home::host, Home::both});
  }
}

TEST_P(DeviceInMode, IsAsOnTheCpuForWeightsThatRanksRoundTogether) {
  for (const std::string weights :
       {"{format: fp8_e4m3, rounding: stochastic, residual: momentum}",
        "{format: int8, block: 5, residual: momentum}", "{format: int4, residual: none}"}) {
    const Model model = modes::model_for(weights);
    Config config = modes::with_weights(
        modes::held_config(GetParam(), Along::none, "checks: collective\n"), weights);
    for (const int stage : {2, 3}) {
      config.zero_stage = stage;
      expect_as_on_cpu(config, model, {.ranks = 3},
                       modes::label(GetParam()) + " " + weights + " stage " + std::to_string(stage),
                       {Home::device, Home::both});
    }
  }
}

// A momentum that is opened, updated and rounded there; with ECO twice.
TEST_P(DeviceInMode, IsAsOnTheCpuForACompressedMomentum) {
  const Model model = modes::model_for("");
  for (const char* momentum : {"bf16", "int8"}) {
    for (const char* weights : {"{format: f32}", "{format: fp8_e4m3, residual: momentum}"}) {
      Config config = modes::with_weights(
          modes::held_config(GetParam(), Along::none, "checks: collective\n"), weights);
      for (GroupConfig& g : config.groups) g.state.momentum = momentum;
      expect_as_on_cpu(config, model, {.ranks = 3},
                       modes::label(GetParam()) + " " + momentum + " " + weights,
                       {Home::device, Home::both});
    }
  }
}

TEST(Device, IsAsOnTheCpuForRoundedWeightsAndWires) {
  for (const DType dtype : {DType::bf16, DType::f32}) {
    const Model model = modes::held_model(dtype, dtype);
    for (const char* extra : {"comm: {gradient_dtype: bf16}\ntrain: {micro_batches: 3}\n",
                              "reproducible: {virtual_shards: 4}\n"}) {
      Config config = in_bf16(modes::held_config(modes::exchange, Along::none, extra));
      for (GroupConfig& g : config.groups) g.weights.rounding = "stochastic";
      config.groups.front().weights.residual = "master";
      expect_as_on_cpu(config, model, {.ranks = 2, .last = 2}, extra, {Home::device, Home::both});
    }
  }
}

// Sides that have another form of msign, and runs longer than a block of sums or a rule's own.
TEST(Device, IsAsOnTheCpuForLongerTensors) {
  Model model;
  model.gradients.resize(4);
  for (const auto& [name, rows, cols] :
       std::vector<std::tuple<std::string, Index, Index>>{{"muon.wide", 66, 140},
                                                          {"muon.tall", 210, 100},
                                                          {"normuon.wide", 64, 130},
                                                          {"adamw.a", 1, 9000},
                                                          {"lion.a", 2, 20000},
                                                          {"sgd.a", 33, 300}}) {
    const auto seed = 10 * (model.tensors.size() + 1);
    model.tensors.push_back({name, {rows, cols}});
    model.weights.push_back(modes::floats(zoo::gaussian(rows, cols, seed)));
    for (std::size_t s = 0; s < 4; ++s) {
      model.gradients[s].push_back(modes::floats(zoo::gaussian(rows, cols, seed + s + 1)));
    }
  }
  for (const ModeCase& mode : {modes::owner, modes::exchange, modes::gram}) {
    for (const char* coefficients : {"polar_express_101", "rational", "auto"}) {
      for (const char* dtype : {"f32", "bf16"}) {
        Config config = modes::held_config(mode, Along::none);
        for (GroupConfig& g : config.groups) {
          g.lmo.coefficients = coefficients;
          g.lmo.dtype = dtype;
        }
        expect_as_on_cpu(config, model, {.ranks = 2, .last = 2},
                         modes::label(mode) + " " + coefficients + " " + dtype);
      }
    }
  }
}

// The LMOs: every norm, and the spectral one by a rational function.
TEST(Device, IsAsOnTheCpuForEveryNorm) {
  const Model model = modes::held_model();
  for (const std::string_view norm : optim::norm_names()) {
    Config config = modes::held_config(modes::exchange, Along::none);
    for (GroupConfig& g : config.groups) {
      if (g.rule.name == "muon") g.lmo.norm = norm;
    }
    expect_as_on_cpu(config, model, {.ranks = 2, .last = 2}, std::string(norm));
  }
}

TEST(Device, IsAsOnTheCpuForRationalFunctions) {
  const Model model = modes::held_model();
  for (const ModeCase& mode : {modes::owner, modes::exchange, modes::gather, modes::gram}) {
    for (const char* dtype : {"f32", "bf16"}) {
      Config config = modes::held_config(mode, Along::none, "checks: collective\n");
      for (GroupConfig& g : config.groups) {
        g.lmo.coefficients = "rational";
        g.lmo.dtype = dtype;
      }
      expect_as_on_cpu(config, model, {.ranks = 2, .last = 2}, modes::label(mode) + dtype);
    }
  }
}

// Weights that rest in shards, state over replicas, sums that no number of ranks changes, norms.
TEST(Device, IsAsOnTheCpuInEveryStageAndOnEveryMesh) {
  const Model model = modes::held_model();
  for (const char* extra :
       {"zero: {stage: 3}\n", "zero: {stage: 3}\nmesh: {shard: 2, replicate: 2}\n",
        "mesh: {shard: 2, replicate: 2}\nchecks: collective\n", "mesh: {node: 2}\n",
        "zero: {stage: 3}\nchecks: collective\n", "reproducible: {virtual_shards: 8}\n"}) {
    Config config = modes::held_config(modes::exchange, Along::none, extra);
    config.groups.back().clip_norm = 0.5;
    expect_as_on_cpu(config, model, {.ranks = 4}, extra, {Home::device, Home::host});
  }
}

// Matrices that are looked at whole, and noise in dual norms, over memory the host cannot follow.
TEST(Device, SeesMatricesAsTheCpuDoes) {
  const Model model = modes::held_model();
  for (const char* extra : {"", "zero: {stage: 3}\n", "mesh: {shard: 2, replicate: 2}\n",
                            "checks: collective\n", "comm: {bucket_bytes: 4KiB}\n"}) {
    const Config config = modes::held_config(
        modes::exchange, Along::none,
        std::string(extra) +
            "diagnostics: {every_steps: 2, spectra: true, dual_noise: true, budget_frac: 0}\n");
    expect_as_on_cpu(config, model, {.ranks = 4}, extra, {Home::device, Home::host, Home::both});
  }
}

// What is saved on one side goes on, on the other, as if nothing had been.
TEST(Device, CheckpointsMoveToTheCpuAndBack) {
  const Model model = modes::held_model(DType::bf16, DType::bf16);
  const std::string folder =
      (std::filesystem::temp_directory_path() / ("orthrus_far_" + std::to_string(::getpid())))
          .string();
  for (const char* extra : {"", "zero: {stage: 3}\n"}) {
    const Config config = in_bf16(modes::held_config(modes::exchange, Along::none, extra));
    Outcome expected = train(config, model, {.ranks = 3, .last = 4});
    for (auto& steps : expected.steps) steps.erase(steps.begin(), steps.begin() + 2);
    for (const bool far : {false, true}) {
      std::filesystem::remove_all(folder);
      const auto home = [](bool on_device) { return on_device ? Home::both : Home::host; };
      train(config, model,
            {.ranks = 3, .far = !far, .home = home(!far), .last = 2, .save = folder});
      expect_same(
          train(config, model,
                {.ranks = 3, .far = far, .home = home(far), .first = 3, .last = 4, .load = folder}),
          expected, std::string(extra) + (far ? "to the device" : "to the CPU"));
    }
  }
  std::filesystem::remove_all(folder);
}

// Euclidean steps, which a checkpoint says some matrices take.
TEST_P(DeviceInMode, TakesEuclideanStepsAsTheCpuDoes) {
  const Model model = modes::held_model();
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("orthrus_far_auto_" + std::to_string(::getpid()));
  for (const char* extra : {"", "checks: collective\n", "mesh: {shard: 2, replicate: 2}\n"}) {
    Config config = modes::held_config(GetParam(), Along::none, extra);
    config.train.save_every = 1000;
    config.diagnostics = {.every_steps = 1000, .spectra = true, .advisor = "auto"};
    std::filesystem::remove_all(folder);
    train(config, model, {.ranks = 4, .last = 1, .save = folder});
    runtime::Manifest manifest = runtime::read_manifest(folder);
    std::size_t chosen = 0;
    for (auto& [name, geometry] : manifest.geometry) {
      if (chosen++ % 2 == 0) geometry.euclidean = 3;
    }
    ASSERT_GE(chosen, 2U);
    std::ofstream(folder / "manifest.json") << runtime::manifest_text(manifest);
    const orthrus::Run run{.ranks = 4, .first = 2, .load = folder};
    expect_as_on_cpu(config, model, run, modes::label(GetParam()) + extra,
                     {Home::device, Home::host});
    std::int64_t here = 0, there = 0;
    for (const auto& steps : train(config, model, run).steps) here += steps.front().matrices;
    config.diagnostics.advisor = "report";
    for (const auto& steps : train(config, model, run).steps) there += steps.front().matrices;
    EXPECT_LT(here, there) << "some are spared";
  }
  std::filesystem::remove_all(folder);
}

/// One matrix that the trainer has by columns, and one with gaps between its rows.
struct Strided {
  Strided() : weights{std::vector<float>(48), std::vector<float>(70)}, gradients(weights) {
    for (std::size_t t = 0; t < 2; ++t) {
      for (std::size_t i = 0; i < weights[t].size(); ++i) {
        weights[t][i] = 0.01F * static_cast<float>(i % 17);
        gradients[t][i] = 0.1F * static_cast<float>((i * 7 + t) % 13) - 0.5F;
      }
    }
  }
  [[nodiscard]] std::vector<Parameter> parameters() {
    std::vector<Parameter> list(2);
    list[0].name = "columns";
    list[0].shape = {6, 8};
    list[0].strides = {1, 6};
    list[1].name = "gaps";
    list[1].shape = {7, 5};
    list[1].strides = {10, 2};
    for (std::size_t t = 0; t < 2; ++t) {
      list[t].weights = weights[t].data();
      list[t].gradient = gradients[t].data();
    }
    return list;
  }
  std::vector<std::vector<float>> weights, gradients;
};

TEST(Device, IsAsOnTheCpuForTensorsWithStrides) {
  const Config config = parse_config(R"(
schema: 1
checks: collective
groups:
  - {match: "*", rule: {name: muon, lr: 0.1}}
)");
  Strided expected;
  {
    ShardedOptimizer optimizer(config, self_communicator(), expected.parameters());
    for (int s = 0; s < 2; ++s) optimizer.step();
  }
  for (const bool on_device : {false, true}) {
    Strided found;
    FarBackend device;
    auto parameters = found.parameters();
    std::vector<kernels::DeviceBuffer> copies;
    for (std::size_t t = 0; t < 2 && on_device; ++t) {
      const std::size_t bytes = found.weights[t].size() * sizeof(float);
      device.copy(parameters[t].weights, copies.emplace_back(device, bytes).data(), bytes);
      device.copy(parameters[t].gradient, copies.emplace_back(device, bytes).data(), bytes);
      parameters[t].weights = copies[2 * t].data();
      parameters[t].gradient = copies[2 * t + 1].data();
    }
    device.wait();
    {
      ShardedOptimizer optimizer(std::make_unique<ShardedOptimizer::Impl>(
          config, self_communicator(), parameters, DeviceChoice{}, far_seat()));
      for (int s = 0; s < 2; ++s) optimizer.step();
      std::vector<float> dense(35);
      optimizer.copy_weights(1, dense.data());
      for (std::size_t i = 0; i < 35; ++i) {
        EXPECT_EQ(dense[i], expected.weights[1][i / 5 * 10 + i % 5 * 2]);
      }
    }
    for (std::size_t t = 0; t < 2 && on_device; ++t) {
      device.copy(copies[2 * t].data(), found.weights[t].data(), copies[2 * t].bytes());
    }
    device.wait();
    EXPECT_EQ(found.weights, expected.weights) << on_device;  // what lies between them, too
  }
  // Half here, half there: whose strides?
  Strided half;
  FarBackend device;
  const kernels::DeviceBuffer there(device, 48 * sizeof(float));
  auto parameters = half.parameters();
  parameters[0].weights = there.data();
  try {
    ShardedOptimizer(std::make_unique<ShardedOptimizer::Impl>(
        config, self_communicator(), parameters, DeviceChoice{}, far_seat()));
    ADD_FAILURE() << "nothing was thrown";
  } catch (const ConfigError& e) {
    EXPECT_NE(std::string(e.what()).find("'columns' has strides"), std::string::npos) << e.what();
  }
}

// One rank has its tensors on the device, the other on the host: their replicas are compared.
TEST(Device, ReplicasWithStridesAreComparedWhereverTheyAre) {
  const Config config = parse_config(
      "schema: 1\nchecks: collective\ngroups: [{match: '*', rule: {name: muon, lr: 0.1}, "
      "weights: {format: bf16}}]\n");
  run_thread_ranks(2, [&](Communicator& comm) {
    FarBackend device;
    Strided model;
    auto parameters = model.parameters();
    std::vector<std::vector<BFloat16>> weights(2);
    std::vector<kernels::DeviceBuffer> copies;
    for (std::size_t t = 0; t < 2; ++t) {
      Parameter& p = parameters[t];
      for (const float w : model.weights[t]) weights[t].push_back(kernels::to_bf16(w));
      p.dtype = DType::bf16;
      p.weights = weights[t].data();
      if (comm.rank() == 1) continue;
      const auto there = [&](const void* here, std::size_t bytes) {
        device.copy(here, copies.emplace_back(device, bytes).data(), bytes);
        return copies.back().data();
      };
      p.weights = there(p.weights, weights[t].size() * sizeof(BFloat16));
      p.gradient = there(p.gradient, model.gradients[t].size() * sizeof(float));
    }
    device.wait();
    ShardedOptimizer optimizer(std::make_unique<ShardedOptimizer::Impl>(
        config, comm.duplicate("job"), parameters, DeviceChoice{}, far_seat()));
    for (int s = 0; s < 3; ++s) EXPECT_NO_THROW(optimizer.step());
  });
}

// An inverse that one rank cannot make stops all of them in the same step, by name.
void expect_one_failed_inverse_to_stop_all(Config config, const Model& model,
                                           const std::string& where) {
  config.comm.timeout_s = 20;  // nobody waits for it
  run_thread_ranks(3, [&](Communicator& comm) {
    DeviceTrainer trainer(model, {.ranks = 3}, comm.rank(), comm.rank(), 3);
    FarBackend* device = nullptr;
    ShardedOptimizer optimizer(std::make_unique<ShardedOptimizer::Impl>(
        config, comm.duplicate("job"), trainer.parameters, DeviceChoice{}, far_seat(&device)));
    trainer.backward(1);
    EXPECT_FALSE(optimizer.step().skipped);
    device->refuses_inverses = comm.rank() == 1;
    trainer.backward(2);
    try {
      optimizer.step();
      ADD_FAILURE() << where << ": nothing was thrown";
    } catch (const NumericError& e) {
      EXPECT_EQ(e.exit_code(), ExitCode::numeric);
      const std::string what = e.what();
      EXPECT_NE(what.find("step 2: the update of groups[0]"), std::string::npos) << where << what;
      EXPECT_NE(what.find("is not finite"), std::string::npos) << where << what;
    }
    EXPECT_THROW(optimizer.step(), Error) << "no step follows";
  });
}

TEST(Device, AnInverseThatFailsOnOneRankStopsAll) {
  const Model model = modes::held_model();
  for (const ModeCase& mode : {modes::owner, modes::exchange, modes::gather, modes::gram}) {
    for (const char* extra : {"", "checks: collective\n", "zero: {stage: 3}\n"}) {
      Config config = modes::held_config(mode, Along::none, extra);
      for (GroupConfig& g : config.groups) g.lmo.coefficients = "rational";
      expect_one_failed_inverse_to_stop_all(config, model, modes::label(mode) + extra);
    }
  }
  const modes::LinkProfile links(true);
  expect_one_failed_inverse_to_stop_all(modes::lone_config(links, 3),
                                        modes::lone_model("gaussian", 12, 40), "shared terms");
}

/// Calls of a thread that are on their way.
thread_local int calls_on_their_way = 0;

/// Counts them.
class Counted final : public CommunicatorBackend {
 public:
  explicit Counted(std::unique_ptr<CommunicatorBackend> inner) : inner_(std::move(inner)) {}
  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  const char* kind() const override { return inner_->kind(); }
  Done all_reduce(Span data, ReduceOp op) override { return count(inner_->all_reduce(data, op)); }
  Done reduce_scatter(ConstSpan send, std::span<const Index> counts, Span recv) override {
    return count(inner_->reduce_scatter(send, counts, recv));
  }
  Done all_gather(ConstSpan send, std::span<const Index> counts, Span recv) override {
    return count(inner_->all_gather(send, counts, recv));
  }
  Done broadcast(Span data, int root) override { return count(inner_->broadcast(data, root)); }
  Done reduce(ConstSpan send, Span recv, ReduceOp op, int root) override {
    return count(inner_->reduce(send, recv, op, root));
  }
  Done all_to_all(ConstSpan send, std::span<const Index> send_counts, Span recv,
                  std::span<const Index> recv_counts, Index limit) override {
    return count(inner_->all_to_all(send, send_counts, recv, recv_counts, limit));
  }
  Done send(ConstSpan data, int to, int tag) override { return count(inner_->send(data, to, tag)); }
  Done receive(Span data, int from, int tag) override {
    return count(inner_->receive(data, from, tag));
  }
  Done barrier() override { return count(inner_->barrier()); }
  Done copy(ConstSpan from, Span to) override { return count(inner_->copy(from, to)); }
  std::unique_ptr<CommunicatorBackend> split(int color, int key) override {
    return std::make_unique<Counted>(inner_->split(color, key));
  }
  std::unique_ptr<CommunicatorBackend> duplicate() override {
    return std::make_unique<Counted>(inner_->duplicate());
  }

 private:
  struct Call final : Request::State {
    explicit Call(Done d) : done(std::move(d)) { ++calls_on_their_way; }
    ~Call() override { --calls_on_their_way; }
    bool test() override { return done->test(); }
    bool wait(double timeout_s) override { return done->wait(timeout_s); }
    Done done;
  };
  static Done count(Done done) {
    if (done != nullptr) done = Done(new Call(std::move(done)));
    return done;
  }

  std::unique_ptr<CommunicatorBackend> inner_;
};

// A call that is given up leaves its buffers to the process.
#ifdef __SANITIZE_ADDRESS__
using LeftToTheProcess = __lsan::ScopedDisabler;
#else
struct LeftToTheProcess {
  LeftToTheProcess() {}
};
#endif

// A rank is gone. CUDA frees memory when all kernels have ended, NCCL's among them: when the others
// let go of their optimizers, or their trainers of tensors, no call may be on its way.
TEST(Device, CallsAreLetGoBeforeMemoryIs) {
  const Model model = modes::held_model();
  for (const char* extra : {"", "zero: {stage: 3}\n", "zero: {stage: 1}\n"}) {
    for (const bool in_step : {true, false}) {
      Config config = modes::held_config(modes::exchange, Along::none, extra);
      config.comm.bucket_bytes = 2048;  // several are on their way
      config.comm.timeout_s = 0.3;
      std::latch over{1};
      run_thread_ranks(2, [&](Communicator& comm) {
        const LeftToTheProcess abandoned;
        DeviceTrainer trainer(model, {.ranks = 2}, comm.rank(), comm.rank(), 2);
        FarBackend* device = nullptr;
        const auto seat = [&](const Config&, const DeviceChoice&, Communicator& world) {
          auto backend = std::make_unique<FarBackend>();
          device = backend.get();
          const Communicator staged = comm::staged(world, std::make_shared<FarCopies>(*backend));
          runtime::Seat made;
          made.payload.emplace(std::make_unique<Counted>(comm::Core::body_of(staged).duplicate()),
                               staged.options());
          made.backend = std::move(backend);
          return made;
        };
        int frees = 0, early = 0, most = 0;
        {
          ShardedOptimizer optimizer(std::make_unique<ShardedOptimizer::Impl>(
              config, comm.duplicate("job"), trainer.parameters, DeviceChoice{}, seat));
          device->before_free = [&] {
            ++frees;
            early += calls_on_their_way > 0 ? 1 : 0;
          };
          trainer.backward(1);
          optimizer.step();
          EXPECT_EQ(calls_on_their_way, 0);
          if (comm.rank() == 0) {
            trainer.backward(2);
            for (int id = static_cast<int>(trainer.parameters.size()) - 1; id >= 0; --id) {
              optimizer.gradient_ready(id);
              most = std::max(most, calls_on_their_way);
            }
            if (in_step) {
              EXPECT_THROW(optimizer.step(), CommError);
              EXPECT_EQ(calls_on_their_way, 0) << "the trainer may free what it likes";
            }
            EXPECT_GT(most, 0);
          } else {
            over.wait();
          }
        }
        if (comm.rank() == 0) over.count_down();
        EXPECT_GT(frees, 0);
        EXPECT_EQ(early, 0) << extra << in_step;
      });
    }
  }
}

// A step whose gradient is not finite is skipped, and nothing has changed on the device.
TEST(Device, SkipsWhatIsNotFinite) {
  const Config config = parse_config("schema: 1\ngroups: [{match: '*', rule: {name: muon}}]\n");
  Strided model;
  const auto before = model.weights;
  model.gradients[1][4] = std::numeric_limits<float>::infinity();
  ShardedOptimizer optimizer(std::make_unique<ShardedOptimizer::Impl>(
      config, self_communicator(), model.parameters(), DeviceChoice{}, far_seat()));
  const StepReport& report = optimizer.step();
  EXPECT_TRUE(report.skipped);
  EXPECT_NE(report.skip_reason.find("'gaps'"), std::string::npos) << report.skip_reason;
  EXPECT_EQ(model.weights, before);
}

// The plan's bytes are the device's, but for the numbers of the control messages, which are the
// host's, and the ends of the arenas.
TEST(Device, AllocatesWhatThePlanSays) {
  const Model model = modes::held_model();
  const Config config = modes::held_config(modes::gram, Along::none);
  run_thread_ranks(2, [&](Communicator& comm) {
    const orthrus::Run run{.ranks = 2, .home = Home::device};
    DeviceTrainer trainer(model, run, comm.rank(), comm.rank(), 2);
    const runtime::Plan plan = modes::plan_of(config, trainer.parameters, 2);
    const runtime::RankPlan& mine = plan.per_rank[static_cast<std::size_t>(comm.rank())];
    FarBackend* device = nullptr;
    const ShardedOptimizer optimizer(std::make_unique<ShardedOptimizer::Impl>(
        config, comm.duplicate("job"), trainer.parameters, DeviceChoice{}, far_seat(&device)));
    const std::int64_t planned = mine.memory.gradients + mine.memory.state + mine.memory.work -
                                 static_cast<std::int64_t>(mine.work.control);
    EXPECT_GE(device->allocated, planned);
    EXPECT_LE(device->allocated,
              planned + 3 * static_cast<std::int64_t>(runtime::Arena::alignment));
  });
}

/// What the constructor says of a configuration, on every rank.
std::vector<std::string> refusals(const Config& config, int ranks) {
  std::vector<std::string> all(static_cast<std::size_t>(ranks));
  run_thread_ranks(ranks, [&](Communicator& comm) {
    toy::Model model;
    try {
      const ShardedOptimizer optimizer(config, comm.duplicate("job"), model.parameters);
      ADD_FAILURE() << "nothing was thrown";
    } catch (const ConfigError& e) {
      EXPECT_EQ(e.exit_code(), ExitCode::config);
      all[static_cast<std::size_t>(comm.rank())] = e.what();
    }
  });
  return all;
}

TEST(Device, IsRefusedOnAllRanksWhereThereIsNone) {
  if (!kernels::cuda_report().devices.empty()) GTEST_SKIP() << "there is a device";
  Config config = parse_config(toy::muon_and_adamw + std::string("device: cuda\n"));
  for (const char* backend : {"auto", "mpi", "nccl"}) {
    config.comm.backend = backend;
    for (const std::string& what : refusals(config, 3)) {
      EXPECT_NE(what.find("CUDA"), std::string::npos) << what;
    }
  }
}

TEST(Device, NamesItsKeysInRefusals) {
  Config config = parse_config(toy::muon_and_adamw + std::string("comm: {backend: nccl}\n"));
  for (const std::string& what : refusals(config, 2)) {
    EXPECT_NE(what.find("comm.backend: nccl"), std::string::npos) << what;
  }
  // What is computed by ScaLAPACK never leaves the host: the plan says so, on any machine.
  const toy::Model model;
  Config grid = parse_config(toy::muon_and_adamw + std::string("device: cuda\n"));
  grid.groups.front().matrix.mode = "block_cyclic";
  try {
    static_cast<void>(modes::plan_of(grid, model.parameters, 2));
    ADD_FAILURE() << "nothing was thrown";
  } catch (const ConfigError& e) {
    const std::string what = e.what();
    EXPECT_NE(what.find("matrix.mode block_cyclic"), std::string::npos) << what;
    EXPECT_NE(what.find("device"), std::string::npos) << what;
  }
}

// Ranks that name no device count those of their machine.
TEST(Device, RanksOfOneMachineTakeItsDevicesInTurn) {
  run_thread_ranks(5, [](Communicator& comm) {
    EXPECT_EQ(runtime::default_ordinal(comm, 2), comm.rank() % 2);
    EXPECT_EQ(runtime::default_ordinal(comm, 8), comm.rank());
  });
}

}  // namespace
}  // namespace orthrus
