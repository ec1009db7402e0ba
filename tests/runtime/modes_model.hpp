#pragma once
/// @file
/// The modes a matrix may meet in, and a model whose tensors the trainer holds whole or in shards.

#include <unistd.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <orthrus/orthrus.hpp>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.hpp"
#include "optim/rule.hpp"
#include "runtime/plan.hpp"
#include "support/zoo.hpp"
#include "toy_model.hpp"

namespace orthrus::modes {

/// How a mode is asked for, and what it promises.
struct ModeCase {
  const char* name;      ///< `matrix.mode`
  bool bitwise = false;  ///< the bits of one rank, given the same gradient
  bool full = true;      ///< the update of the full matrix
  std::int64_t period = 1;
  const char* wire = "f32";
  const char* accuracy = "f32";
};
inline constexpr ModeCase owner{"owner", true};
inline constexpr ModeCase exchange{"exchange", true};
inline constexpr ModeCase exchange_bf16{"exchange", false, true, 1, "bf16", "fast"};
inline constexpr ModeCase gather{"gather", true};
inline constexpr ModeCase gram{"gram"};
inline constexpr ModeCase gram_steps{"gram_steps"};
inline constexpr ModeCase block_local{"block_local", false, false};
inline constexpr ModeCase periodic{"periodic", false, false, 2};
/// Over MPI, where ScaLAPACK was built in.
inline constexpr ModeCase block_cyclic{"block_cyclic"};

/// Those that run on any communicator.
inline const std::vector<ModeCase> all{owner, exchange,   exchange_bf16, gather,
                                       gram,  gram_steps, block_local,   periodic};

inline std::string label(const ModeCase& m) {
  return m.name + std::string(m.wire == std::string("bf16") ? "_bf16" : "");
}
inline void PrintTo(const ModeCase& m, std::ostream* out) { *out << label(m); }

/// `config` with every matrix rule in that mode; NorMuon only where the mode scales lines.
inline Config in_mode(Config config, const ModeCase& m) {
  for (GroupConfig& g : config.groups) {
    if (!optim::find_rule(g.rule.name)->matrix) continue;
    const bool lines = g.rule.name == "normuon" && !m.bitwise && m.name != std::string("gram");
    g.matrix = lines ? MatrixConfig{"exchange", "f32", "f32", 1}
                     : MatrixConfig{m.name, m.accuracy, m.wire, m.period};
  }
  config.comm.timeout_s = 30;  // a hang is a failure
  return config;
}

/// The toy model's recipe in that mode.
inline Config toy_config(const ModeCase& m, const std::string& extra = "") {
  return in_mode(parse_config(toy::muon_and_adamw + extra), m);
}

/// What the plan says of the model before any rank exists.
inline runtime::Plan plan_of(const Config& config, const std::vector<Parameter>& parameters,
                             int ranks, Index max_chunk = 0x7fffffff) {
  std::vector<runtime::ParameterShape> shapes;
  for (const Parameter& p : parameters) shapes.push_back(runtime::shape_of(p));
  return runtime::make_plan(config, shapes, ranks, runtime::load_profile(config.profile), max_chunk,
                            kernels::tasks_at_once(config.device));
}

/// A file of a machine whose links cost nothing, or far more than any computing.
class LinkProfile {
 public:
  /// @param world  names the file: all ranks of an MPI world write the same one.
  explicit LinkProfile(bool free, const std::string& world = std::to_string(getpid()))
      : path_((std::filesystem::temp_directory_path() /
               ("orthrus-links-" + world + (free ? "-free" : "-dear")))
                  .string()) {
    runtime::MachineProfile profile;
    profile.name = "links";
    profile.node = profile.network = {{free ? 1e-12 : 1, {{1, free ? 1e15 : 1}}}, {}};
    profile.pass = {{1, 1e15}};
    const std::string own = path_ + "-" + std::to_string(getpid());
    std::ofstream(own) << runtime::to_yaml(profile);
    std::filesystem::rename(own, path_);  // never half of it
  }
  LinkProfile(const LinkProfile&) = delete;
  LinkProfile& operator=(const LinkProfile&) = delete;
  ~LinkProfile() { std::filesystem::remove(path_); }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// ---- a model in shards -------------------------------------------------------------------------

struct Tensor {
  std::string name;
  std::vector<Index> shape;
  std::vector<LogicalMatrix> views = {};
  Sharding sharding = {};
  DType dtype = DType::f32;
  DType gradient_dtype = DType::f32;

  [[nodiscard]] Index rows() const { return shape.front(); }
  [[nodiscard]] Index size() const {
    return std::accumulate(shape.begin(), shape.end(), Index{1}, std::multiplies<>());
  }
  [[nodiscard]] Index cols() const { return size() / rows(); }
};

/// Tensors, their first weights, and the mean gradient of every step. Values of bf16 tensors lie on
/// the grid.
struct Model {
  std::vector<Tensor> tensors;
  std::vector<std::vector<float>> weights;
  std::vector<std::vector<std::vector<float>>> gradients;  ///< per step
};

inline float on_grid(float x, DType dtype) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return dtype == DType::bf16 ? std::bit_cast<float>(bits & 0xffff0000U) : x;
}

/// Values of f32 or bf16.
class Buffer {
 public:
  Buffer(DType dtype, std::size_t size) : dtype_(dtype), bytes_(size * bytes_of(dtype)) {}
  void* data() { return bytes_.data(); }
  void set(std::size_t i, float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    if (dtype_ == DType::bf16) {
      reinterpret_cast<BFloat16*>(bytes_.data())[i] = {static_cast<std::uint16_t>(bits >> 16)};
    } else {
      reinterpret_cast<float*>(bytes_.data())[i] = x;
    }
  }
  [[nodiscard]] float get(std::size_t i) const {
    if (dtype_ == DType::f32) return reinterpret_cast<const float*>(bytes_.data())[i];
    const BFloat16 x = reinterpret_cast<const BFloat16*>(bytes_.data())[i];
    return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
  }

 private:
  DType dtype_;
  std::vector<std::byte> bytes_;
};

/// Lines of `extent` on each of `shards` ranks, as even as possible, the first ones more.
inline std::vector<Index> even_counts(Index extent, int shards) {
  std::vector<Index> counts(static_cast<std::size_t>(shards));
  for (Index i = 0; i < extent; ++i) ++counts[static_cast<std::size_t>(i % shards)];
  return counts;
}

/// The elements of `t` that `shard` of `shards` has, in the order it has them: by definition, not
/// by the runtime's arithmetic.
inline std::vector<Index> elements_of(const Tensor& t, int shard, int shards) {
  using Along = Sharding::Along;
  const Along along = t.sharding.along;
  const Index extent = along == Along::rows      ? t.rows()
                       : along == Along::columns ? t.cols()
                                                 : t.size();
  const auto counts = t.sharding.counts.empty() ? even_counts(extent, shards) : t.sharding.counts;
  std::vector<int> who;  // has line i
  for (int r = 0; r < shards; ++r) {
    who.insert(who.end(), static_cast<std::size_t>(counts[static_cast<std::size_t>(r)]), r);
  }
  std::vector<Index> mine;
  for (Index e = 0; e < t.size(); ++e) {
    const Index line = along == Along::rows      ? e / t.cols()
                       : along == Along::columns ? e % t.cols()
                                                 : e;
    if (along == Along::none || who[static_cast<std::size_t>(line)] == shard) mine.push_back(e);
  }
  return mine;
}

/// The buffers of one rank, and their description.
class Trainer {
 public:
  Trainer(const Model& model, int shard, int shards) : model_(model) {
    for (std::size_t i = 0; i < model.tensors.size(); ++i) {
      const Tensor& t = model.tensors[i];
      elements_.push_back(elements_of(t, shard, shards));
      weights_.emplace_back(t.dtype, elements_[i].size());
      gradients_.emplace_back(t.gradient_dtype, elements_[i].size());
      Parameter p;
      p.name = t.name;
      p.shape = t.shape;
      p.dtype = t.dtype;
      p.gradient_dtype = t.gradient_dtype;
      p.views = t.views;
      p.sharding = t.sharding;
      const bool held = t.sharding.along != Sharding::Along::none;
      p.gradient_state = held ? GradientState::shard : GradientState::averaged;
      parameters.push_back(std::move(p));
    }
    for (std::size_t i = 0; i < parameters.size(); ++i) {  // an empty shard's are null
      parameters[i].weights = weights_[i].data();
      parameters[i].gradient = gradients_[i].data();
    }
    put(model.weights);
  }

  void backward(std::int64_t step) {
    const auto& gradients = model_.gradients[static_cast<std::size_t>(step - 1)];
    for (std::size_t i = 0; i < elements_.size(); ++i) {
      for (std::size_t e = 0; e < elements_[i].size(); ++e) {
        gradients_[i].set(e, gradients[i][static_cast<std::size_t>(elements_[i][e])]);
      }
    }
  }
  /// This rank's part of whole weights, in and out.
  void put(const std::vector<std::vector<float>>& whole) {
    for (std::size_t i = 0; i < elements_.size(); ++i) {
      for (std::size_t e = 0; e < elements_[i].size(); ++e) {
        weights_[i].set(e, whole[i][static_cast<std::size_t>(elements_[i][e])]);
      }
    }
  }
  void take(std::vector<std::vector<float>>& whole) const {
    for (std::size_t i = 0; i < elements_.size(); ++i) {
      for (std::size_t e = 0; e < elements_[i].size(); ++e) {
        whole[i][static_cast<std::size_t>(elements_[i][e])] = weights_[i].get(e);
      }
    }
  }
  /// Elements whose value is not that of `whole`.
  [[nodiscard]] Index different(const std::vector<std::vector<float>>& whole) const {
    Index n = 0;
    for (std::size_t i = 0; i < elements_.size(); ++i) {
      for (std::size_t e = 0; e < elements_[i].size(); ++e) {
        n += whole[i][static_cast<std::size_t>(elements_[i][e])] == weights_[i].get(e) ? 0 : 1;
      }
    }
    return n;
  }

  std::vector<Parameter> parameters;

 private:
  const Model& model_;
  std::vector<std::vector<Index>> elements_;
  std::vector<Buffer> weights_, gradients_;
};

// ---- models ------------------------------------------------------------------------------------

/// ‖W − W_one‖ / ‖W_one − W_0‖ of a tensor.
inline double change_error(const Model& model, std::size_t tensor, const std::vector<float>& w,
                           const std::vector<float>& one) {
  double off = 0;
  double moved = 0;
  for (std::size_t i = 0; i < w.size(); ++i) {
    off += std::pow(w[i] - one[i], 2);
    moved += std::pow(one[i] - model.weights[tensor][i], 2);
  }
  EXPECT_GT(moved, 0) << model.tensors[tensor].name;
  return std::sqrt(off / moved);
}

using zoo::Matrix;

inline const char* const kSpectra[] = {"flat",           "gaussian", "power_law", "condition_1e4",
                                       "rank_deficient", "tiny",     "huge",      "zero"};
inline constexpr std::pair<Index, Index> kShapes[] = {{12, 40}, {40, 12}, {16, 16}, {7, 23},
                                                      {1, 17},  {19, 1},  {3, 5},   {2, 3}};
inline constexpr std::int64_t kZooSteps = 4;

/// Gradients whose momentum keeps the spectrum: fixed singular vectors, values that jitter.
inline std::vector<Matrix> zoo_gradients(const std::string& spectrum, Index m, Index n,
                                         std::uint64_t seed) {
  const Index k = std::min(m, n);
  const Matrix u = zoo::orthonormal_columns(m, k, 2 * seed);
  const Matrix v = zoo::orthonormal_columns(n, k, 2 * seed + 1);
  std::vector<Matrix> steps;
  for (std::int64_t s = 0; s < kZooSteps; ++s) {
    const Matrix jitter = zoo::gaussian(k, 1, 1000 + 31 * seed + static_cast<std::uint64_t>(s));
    const Matrix noise = zoo::gaussian(m, n, 2000 + 31 * seed + static_cast<std::uint64_t>(s));
    const auto with = [&](auto&& sigma) {
      std::vector<double> values(static_cast<std::size_t>(k));
      for (Index i = 0; i < k; ++i) {
        const bool alike = spectrum == "flat";
        values[static_cast<std::size_t>(i)] = sigma(i) * (1 + 0.2 * jitter(alike ? 0 : i, 0));
      }
      return zoo::Factors{u, values, v}.matrix();
    };
    const auto last = static_cast<double>(std::max<Index>(1, k - 1));
    if (spectrum == "flat") steps.push_back(with([](Index) { return 1.0; }));
    if (spectrum == "gaussian") steps.push_back(noise);
    if (spectrum == "power_law") steps.push_back(with([](Index i) { return 1.0 / (i + 1.0); }));
    if (spectrum == "condition_1e4") {
      steps.push_back(with([&](Index i) { return std::pow(1e-4, static_cast<double>(i) / last); }));
    }
    if (spectrum == "rank_deficient") {
      steps.push_back(with([&](Index i) { return i < std::max<Index>(1, k / 2) ? 1.0 : 0.0; }));
    }
    if (spectrum == "tiny") steps.push_back(zoo::scaled(noise, 1e-30));
    if (spectrum == "huge") steps.push_back(zoo::scaled(noise, 1e30));
    if (spectrum == "zero") steps.push_back(zoo::zero(m, n));
  }
  return steps;
}

inline std::vector<float> floats(const Matrix& x) {
  return std::vector<float>(x.data.begin(), x.data.end());
}

/// Names are "<group>.<spectrum>.<m>x<n>.weight".
inline void add_zoo(Model& model, const std::string& group, const std::string& spectrum, Index m,
                    Index n) {
  const auto seed = static_cast<std::uint64_t>(model.tensors.size() + 1);
  const auto name =
      group + "." + spectrum + "." + std::to_string(m) + "x" + std::to_string(n) + ".weight";
  model.tensors.push_back({name, {m, n}});
  // Under a zero gradient the weights must be exactly the decayed ones: four bits, times 15/16 for
  // each of four steps, fit into the 24 of f32, however they are multiplied.
  std::vector<float> w;
  std::mt19937_64 bits(seed);
  for (Index i = 0; i < m * n; ++i) {
    w.push_back(static_cast<float>(static_cast<int>(bits() % 31) - 15) / 64);
  }
  model.weights.push_back(std::move(w));
  model.gradients.resize(kZooSteps);
  const auto steps = zoo_gradients(spectrum, m, n, seed);
  for (std::size_t s = 0; s < steps.size(); ++s) model.gradients[s].push_back(floats(steps[s]));
}

inline const char* const kZooRecipe = R"(
schema: 1
groups:
  - match: "nesterov.*"
    rule: {name: muon, lr: 0.125, weight_decay: 0.5, momentum: 0.9}
  - match: "plain.*"
    rule: {name: muon, lr: 0.125, weight_decay: 0.5, momentum: 0.9, nesterov: false,
           momentum_form: heavy_ball}
    lmo: {scale: match_rms_adamw}
)";

using Along = Sharding::Along;

inline const char* name_of(Along along) {
  constexpr const char* names[] = {"none", "rows", "columns", "elements"};
  return names[static_cast<std::size_t>(along)];
}

/// Ragged: boundaries at extent·(r/shards)², which for few lines leaves the first shards empty; the
/// second one is always empty.
inline std::vector<Index> ragged_counts(Index extent, int shards) {
  std::vector<Index> counts;
  Index at = 0;
  for (int r = 1; r <= shards; ++r) {
    const Index end = r == shards ? extent : r == 2 ? at : extent * r * r / (shards * shards);
    counts.push_back(end - at);
    at = end;
  }
  return counts;
}

/// One way to cut every tensor of a model.
struct ShardCase {
  Along along;
  bool ragged;
};
inline const std::vector<ShardCase> kCuts{{Along::rows, false},     {Along::rows, true},
                                          {Along::columns, false},  {Along::columns, true},
                                          {Along::elements, false}, {Along::elements, true}};

inline void cut(Model& model, const ShardCase& c, int shards) {
  for (Tensor& t : model.tensors) {
    t.sharding.along = c.along;
    const Index extent = c.along == Along::rows      ? t.rows()
                         : c.along == Along::columns ? t.cols()
                                                     : t.size();
    if (c.ragged) t.sharding.counts = ragged_counts(extent, shards);
  }
}

inline const char* const kHeldRecipe = R"(
schema: 1
groups:
  - match: "muon.*"
    rule: {name: muon, lr: 0.125, weight_decay: 0.5, momentum: 0.9}
    lmo: {scale: match_rms_adamw}
  - match: "normuon.*"
    rule: {name: normuon, lr: 0.125, weight_decay: 0.5, momentum: 0.9, beta2: 0.9}
  - match: "adamw.*"
    rule: {name: adamw, lr: 0.01, weight_decay: 0.1}
  - match: "sgd.*"
    rule: {name: sgd, lr: 0.1, nesterov: true}
  - match: "lion.*"
    rule: {name: lion, lr: 0.01}
)";

/// The same model with rules whose direction is made of the gradient, too.
inline std::string family_recipe() {
  std::string text = kHeldRecipe;
  const auto put = [&text](const std::string& before, const std::string& after) {
    text.replace(text.find(before), before.size(), after);
  };
  put("{name: muon,", "{name: prism, gamma: 0.5,");
  put("{name: normuon,", "{name: bidirectional_prism, gamma_left: 0.5,");
  put(", beta2: 0.9", "");
  return text;
}

/// A model of one matrix, which a rational function orthogonalizes, and of vectors around it.
inline Model lone_model(const std::string& spectrum, Index m, Index n) {
  Model model;
  const auto add_vector = [&](const std::string& name) {
    model.tensors.push_back({name, {33}});
    model.weights.emplace_back(33, 0.5F);
    model.gradients.resize(kZooSteps);
    for (auto& step : model.gradients) step.emplace_back(33, 0.25F);
  };
  add_vector("adamw.before");
  add_zoo(model, "muon", spectrum, m, n);
  add_vector("adamw.after");
  return model;
}
inline Config lone_config(const LinkProfile& links, int terms, const std::string& extra = "") {
  Config config = in_mode(parse_config(std::string(kHeldRecipe) + extra), gram);
  config.profile = links.path();
  for (GroupConfig& g : config.groups) {
    g.lmo.coefficients = "rational";
    g.lmo.terms = terms;
  }
  return config;
}

/// The recipe in that mode; NorMuon meets by Gram matrices only where no rank has part of a row's
/// norm alone, which is where columns are cut.
inline Config held_config(const ModeCase& mode, Along along, const std::string& extra = "") {
  Config config = in_mode(parse_config(kHeldRecipe + extra), mode);
  if (mode.name == std::string("gram") && along != Along::columns) {
    config.groups[1].matrix.mode = "exchange";
  }
  return config;
}

/// Every rule, on shapes of all kinds; Gaussian gradients.
inline Model held_model(DType dtype = DType::f32, DType gradient_dtype = DType::f32) {
  Model model;
  const auto add = [&](std::string name, std::vector<Index> shape,
                       std::vector<LogicalMatrix> views = {}) {
    model.tensors.push_back(
        {std::move(name), std::move(shape), std::move(views), {}, dtype, gradient_dtype});
  };
  add("muon.wide", {6, 20});
  add("muon.tall", {21, 8});
  add("muon.odd", {9, 11});
  add("muon.few", {2, 13});
  add("muon.row", {1, 9});
  add("muon.conv", {5, 2, 3, 3});
  add("muon.fused", {12, 10}, {{0, 4, 0, 10}, {4, 4, 0, 10}, {8, 4, 0, 10}});
  add("muon.gates", {7, 12}, {{0, 7, 0, 5}, {0, 7, 5, 7}});
  add("normuon.wide", {6, 20});
  add("normuon.tall", {21, 8});
  add("normuon.few", {2, 13});
  add("normuon.fused", {12, 10}, {{0, 4, 0, 10}, {4, 4, 0, 10}, {8, 4, 0, 10}});
  add("adamw.a", {33});
  add("adamw.b", {5, 7});
  add("sgd.a", {4, 9});
  add("sgd.b", {3});
  add("lion.a", {17});
  add("lion.b", {1, 5});
  std::mt19937_64 bits(5);
  std::normal_distribution<float> normal;
  const auto values = [&](const Tensor& t, DType type, float scale) {
    std::vector<float> v;
    for (Index i = 0; i < t.size(); ++i) v.push_back(on_grid(scale * normal(bits), type));
    return v;
  };
  for (const Tensor& t : model.tensors) model.weights.push_back(values(t, dtype, 0.1F));
  model.gradients.resize(4);
  for (auto& step : model.gradients) {
    for (const Tensor& t : model.tensors) step.push_back(values(t, gradient_dtype, 1));
  }
  return model;
}

/// Every group of the recipe with these weights.
inline Config with_weights(Config config, const std::string& weights) {
  const Config parsed = parse_config(
      "schema: 1\ngroups:\n  - {match: \"*\", rule: {name: sgd}, weights: " + weights + "}\n");
  for (GroupConfig& g : config.groups) g.weights = parsed.groups[0].weights;
  config.telemetry.every_steps = 1;
  return config;
}

/// The model without what the format cannot have: matrices that share rows share no scale.
inline Model model_for(const std::string& weights) {
  Model model = held_model();
  if (weights.find("block") != std::string::npos || weights.find("bf16") != std::string::npos) {
    return model;
  }
  for (Tensor& t : model.tensors) {
    if (t.name == "muon.gates") t.views.clear();
  }
  return model;
}

}  // namespace orthrus::modes
