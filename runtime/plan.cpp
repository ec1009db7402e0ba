#include "runtime/plan.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <orthrus/error.hpp>
#include <set>

#include "comm/mesh.hpp"
#include "kernels/devices.hpp"
#include "runtime/plan_steps.hpp"
#include "runtime/probing.hpp"
#include "runtime/region.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::runtime {
namespace {

std::string shape_text(const std::vector<Index>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

[[noreturn]] void refuse(const ParameterShape& p, const std::string& why) {
  throw ConfigError("parameter '" + p.name + "' " + shape_text(p.shape) + ": " + why);
}

// ---- parameters --------------------------------------------------------------------------------

void check_parameters(const std::vector<ParameterShape>& parameters) {
  if (parameters.empty()) throw ConfigError("there are no parameters");
  std::set<std::string> names;
  for (const ParameterShape& p : parameters) {
    if (p.name.empty()) throw ConfigError("a parameter has no name");
    const auto ends_with = [&](const std::string& tail) {
      return p.name.size() >= tail.size() &&
             p.name.compare(p.name.size() - tail.size(), tail.size(), tail) == 0;
    };
    if (p.name.starts_with("state/") || ends_with(".codes") || ends_with(".scales")) {
      refuse(p, "names that start with 'state/' or end in '.codes' or '.scales' are reserved");
    }
    if (!names.insert(p.name).second) refuse(p, "the name is used twice");
    if (p.shape.empty()) refuse(p, "the shape is empty (a scalar is [1])");
    double elements = 1;
    for (const Index n : p.shape) {
      if (n < 1) refuse(p, "every dimension must be at least 1");
      elements *= static_cast<double>(n);
    }
    if (elements > 1e17) refuse(p, "its bytes do not fit 64 bits");
    if (!p.strides.empty() && p.strides.size() != p.shape.size()) {
      refuse(p, "it has " + std::to_string(p.strides.size()) + " strides for " +
                    std::to_string(p.shape.size()) + " dimensions");
    }
    std::vector<std::pair<Index, Index>> dimensions;  // stride, extent
    for (std::size_t d = 0; d < p.strides.size(); ++d) {
      if (p.strides[d] < 1) refuse(p, "strides must be at least 1");
      if (p.shape[d] > 1) dimensions.emplace_back(p.strides[d], p.shape[d]);
    }
    std::sort(dimensions.begin(), dimensions.end());
    Index reach = 0;  // of the dimensions so far
    for (const auto& [stride, extent] : dimensions) {
      if (stride <= reach) refuse(p, "its strides let elements overlap");
      reach += stride * (extent - 1);
    }
    if (p.dtype != DType::f32 && p.dtype != DType::bf16) refuse(p, "weights must be f32 or bf16");
    if (p.gradient_dtype != DType::f32 && p.gradient_dtype != DType::bf16) {
      refuse(p, "gradients must be f32 or bf16");
    }
  }
}

/// Heights (or widths) of the blocks that `spec` cuts `extent` into: one number N is N equal
/// blocks.
std::vector<Index> cut(const ParameterShape& p, const std::vector<std::int64_t>& spec, Index extent,
                       const char* what) {
  if (spec.size() == 1) {
    const Index n = spec[0];
    if (n < 1 || extent % n != 0) {
      refuse(p, "split." + std::string(what) + ": " + std::to_string(extent) + " is not " +
                    std::to_string(n) + " equal blocks");
    }
    return std::vector<Index>(static_cast<std::size_t>(n), extent / n);
  }
  if (std::accumulate(spec.begin(), spec.end(), Index{0}) != extent) {
    refuse(p, "split." + std::string(what) + " adds up to " +
                  std::to_string(std::accumulate(spec.begin(), spec.end(), Index{0})) + ", not " +
                  std::to_string(extent));
  }
  return spec;
}

std::vector<Region> logical_matrices(const ParameterShape& p, const SplitConfig& split) {
  const Index rows = p.rows();
  const Index cols = p.cols();
  std::vector<Region> blocks;
  const auto add = [&](Index row0, Index height, Index col0, Index width) {
    blocks.push_back({row0 * cols + col0, height, width, cols});
  };
  if (!p.views.empty()) {
    // Blocks must tile the parameter: what no matrix covers would never be updated.
    Index covered = 0;
    for (std::size_t i = 0; i < p.views.size(); ++i) {
      const LogicalMatrix& v = p.views[i];
      if (v.rows < 1 || v.cols < 1 || v.row0 < 0 || v.col0 < 0 || v.row0 + v.rows > rows ||
          v.col0 + v.cols > cols) {
        refuse(p, "view " + std::to_string(i) + " leaves the parameter");
      }
      for (std::size_t j = 0; j < i; ++j) {
        const LogicalMatrix& o = p.views[j];
        if (v.row0 < o.row0 + o.rows && o.row0 < v.row0 + v.rows && v.col0 < o.col0 + o.cols &&
            o.col0 < v.col0 + v.cols) {
          refuse(p, "views " + std::to_string(j) + " and " + std::to_string(i) + " overlap");
        }
      }
      covered += v.rows * v.cols;
    }
    if (covered != rows * cols) refuse(p, "its views do not cover it");
    for (const LogicalMatrix& v : p.views) add(v.row0, v.rows, v.col0, v.cols);
    return blocks;
  }
  if (split.stack) {
    if (p.shape.size() != 3) refuse(p, "split.stack needs three dimensions");
    for (Index e = 0; e < p.shape[0]; ++e) {
      blocks.push_back({e * cols, p.shape[1], p.shape[2], p.shape[2]});
    }
    return blocks;
  }
  if (!split.rows.empty()) {
    Index row = 0;
    for (const Index h : cut(p, split.rows, rows, "rows")) {
      add(row, h, 0, cols);
      row += h;
    }
    return blocks;
  }
  if (!split.cols.empty()) {
    Index col = 0;
    for (const Index w : cut(p, split.cols, cols, "cols")) {
      add(0, rows, col, w);
      col += w;
    }
    return blocks;
  }
  add(0, rows, 0, cols);
  return blocks;
}

/// Blocks of at most block×block, as even as they can be; 0: none are cut.
std::vector<Region> in_blocks(std::vector<Region> matrices, Index block) {
  if (block == 0) return matrices;
  std::vector<Region> all;
  for (const Region& m : matrices) {
    const Index down = (m.rows + block - 1) / block;
    const Index across = (m.cols + block - 1) / block;
    for (Index i = 0; i < down; ++i) {
      const Index row = m.rows * i / down;
      for (Index j = 0; j < across; ++j) {
        const Index col = m.cols * j / across;
        all.push_back({m.first + row * m.distance + col, m.rows * (i + 1) / down - row,
                       m.cols * (j + 1) / across - col, m.distance});
      }
    }
  }
  return all;
}

/// The `block` of a rule whose direction is made block by block; else 0.
Index block_of(const Group& g) {
  const RuleConfig rule = optim::with_defaults(g.config->rule);
  return rule.values.contains("block") ? static_cast<Index>(rule.number("block")) : 0;
}

/// What a group renews every so many steps is renewed in turns: the costliest matrix first, each in
/// the step in which least is, so that no step has all of it. It depends on the model alone, as the
/// weights do.
void take_turns(Plan& plan) {
  for (int g = 0; g < std::ssize(plan.groups); ++g) {
    const Group& group = plan.groups[static_cast<std::size_t>(g)];
    if (group.lmo == nullptr) continue;
    const RuleConfig rule = optim::with_defaults(group.config->rule);
    if (!rule.values.contains("frequency")) continue;
    std::vector<std::pair<double, MatrixPlan*>> costs;
    for (MatrixPlan& m : plan.matrices) {
      if (plan.group_of[static_cast<std::size_t>(m.parameter)] != g) continue;
      costs.emplace_back(group.direction().product_flops(*group.lmo, m.rows, m.cols), &m);
    }
    if (costs.empty()) continue;
    std::stable_sort(costs.begin(), costs.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    const double steps = std::min(rule.number("frequency"), static_cast<double>(costs.size()));
    std::vector<double> loads(static_cast<std::size_t>(steps), 0);
    for (const auto& [cost, matrix] : costs) {
      const auto least = std::min_element(loads.begin(), loads.end());
      *least += cost;
      constexpr double within = 0x1p-20;  // of its turn, though rounded
      matrix->phase = (static_cast<double>(least - loads.begin()) + within) / steps;
    }
  }
}

// ---- groups ------------------------------------------------------------------------------------

Group make_group(const GroupConfig& config, std::size_t index, bool on_host, int tasks) {
  Group g;
  g.config = &config;
  try {
    g.rule = optim::make_rule(config.rule);
    if (g.rule->is_matrix_rule()) {
      const std::string& mode = config.matrix.mode;
      const bool shares = mode == "gram_steps" || mode == "block_cyclic";
      g.lmo = std::make_shared<optim::Lmo>(config.lmo, optim::LmoSite{on_host, shares, tasks});
      LmoConfig used;
      const optim::LmoUse use = g.direction().lmo_use();
      if (use == optim::LmoUse::scale) used.scale = config.lmo.scale;
      if (use != optim::LmoUse::all && config.lmo != used) {
        throw ConfigError("rule " + config.rule.name + " has no LMO: of lmo it knows " +
                          (use == optim::LmoUse::scale ? "scale alone" : "nothing"));
      }
      if (use == optim::LmoUse::all && g.direction().asks_for_gradient() &&
          !g.lmo->orthogonalizes()) {
        throw ConfigError("rule " + config.rule.name + " is of the spectral norm: lmo.norm " +
                          config.lmo.norm + " is another");
      }
    }
  } catch (const ConfigError& e) {
    throw ConfigError("groups[" + std::to_string(index) + "]: " + e.what());
  }
  const auto* elementwise = dynamic_cast<const optim::ElementwiseRule*>(g.rule.get());
  g.linear = elementwise != nullptr ? elementwise->is_linear() : g.direction().is_linear();
  g.format = weight_format(config.weights);
  g.momentum = momentum_format(config.state);
  const auto state = g.rule->state();
  if (g.compresses() && (state.empty() || state[0].name != "momentum" || state[0].of_matrix())) {
    throw ConfigError("groups[" + std::to_string(index) + "].state.momentum: rule " +
                      config.rule.name + " has no momentum that could rest as " +
                      config.state.momentum);
  }
  g.residual = residual_of(config.weights);
  g.master = g.residual == Residual::master;
  g.stochastic = config.weights.rounding == "stochastic";
  if (g.feeds_back()) {
    const std::string scope = "groups[" + std::to_string(index) + "].weights.residual momentum: ";
    if (!g.rule->gain()) {
      throw ConfigError(scope + "rule " + config.rule.name +
                        " has no momentum that could bring the residual back (its decay is 0)");
    }
    if (g.rule->is_matrix_rule()) {
      const std::string why = g.direction().undo_obstacle();
      if (!why.empty()) throw ConfigError(scope + why);
    }
    // Decay may not take more of W in a step than of M, or nothing comes back to what is left.
    const double rho = 1 - g.lr() * optim::with_defaults(config.rule).number("weight_decay");
    const double decay = g.rule->gain()->decay;
    if (rho <= decay) {
      throw ConfigError(scope + "lr * weight_decay takes " + std::to_string(1 - rho) +
                        " of the weights in a step, as much as the momentum loses (" +
                        std::to_string(1 - decay) + "): what it brings back would be too late");
    }
    // Where the regime is left (optim/README.md): a larger share costs more than it brings.
    const double bearable = 0.7 * std::sqrt(1 - decay * decay);
    const double most = config.weights.eco.max_rel_correction;
    g.max_correction = most >= 0 ? most : g.linear ? 0 : bearable;
  }
  return g;
}

/// The group of each parameter. A matrix rule passes over what has fewer than two dimensions.
void assign_groups(const Config& config, Plan& plan) {
  std::string lost;
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const ParameterShape& p = plan.parameters[i];
    bool passed = false;
    const int g = effective_group(config, p, &passed);
    if (g < 0) {
      lost += (lost.empty() ? "'" : ", '") + p.name + "' " + shape_text(p.shape) +
              (passed ? " (matched by a matrix rule, but it is no matrix)" : "");
    } else if (passed) {
      plan.passed_over.push_back(static_cast<int>(i));
    }
    plan.group_of.push_back(g);
  }
  if (!lost.empty()) {
    throw ConfigError((config.source.empty() ? "" : config.source + ": ") +
                      "groups: no group matches " + lost +
                      "; add a last group with match: \"*\" and an element-wise rule");
  }
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const ParameterShape& p = plan.parameters[i];
    if (plan.virtual_shards > 0 && p.gradient_state != GradientState::local) {
      refuse(p,
             "reproducible sums need every rank's own gradient, but this one is averaged already");
    }
    const Group& g = plan.groups[static_cast<std::size_t>(plan.group_of[i])];
    if (p.f32_only && g.format != WeightFormat{}) {
      refuse(p, "the trainer says it stays in f32, but its group says weights.format: " +
                    g.config->weights.format);
    }
    if (g.format == WeightFormat{} && p.dtype == DType::bf16) {
      refuse(p,
             "its weights are bf16, but its group says weights.format: f32 (say format: bf16, "
             "with residual: master to keep f32 weights beside them)");
    }
    if (p.as_codes && !g.format.quantized()) {
      refuse(p, "the trainer gives codes and scales of it, but its group says weights.format: " +
                    g.config->weights.format);
    }
  }
}

/// What the trainer holds in shards must add up, and leave nothing for the runtime to reduce.
void check_held(const Plan& plan) {
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const ParameterShape& p = plan.parameters[i];
    if (p.held() != (p.gradient_state == GradientState::shard)) {
      refuse(p, p.held() ? "it is cut into shards, so its gradient must be a shard too "
                           "(GradientState::shard)"
                         : "its gradient is a shard, but Parameter::sharding does not say which");
    }
    if (!p.held()) continue;
    if (!p.strides.empty()) refuse(p, "shards are dense: it can have no strides");
    if (plan.micro_batches > 1) {
      refuse(p,
             "its gradient is a shard: micro-batches are added up by the trainer "
             "(train.micro_batches: 1)");
    }
    const Group& g = plan.group(static_cast<int>(i));
    if (!g.format.quantized() && g.format != WeightFormat{p.dtype, std::nullopt}) {
      refuse(p, "its shards rest in the trainer's buffers as " + std::string(name_of(p.dtype)) +
                    ", but its group says weights.format: " + g.config->weights.format);
    }
    if (p.as_codes) refuse(p, "shards that the trainer holds are values: not codes and scales");
    if (g.feeds_back() && g.max_correction > 0 && !g.rule->is_matrix_rule() &&
        (p.sharding.along != Sharding::Along::rows || p.shape.size() < 2)) {
      refuse(p,
             "its shards cut rows, whose corrections are bounded row by row "
             "(weights.eco.max_rel_correction: 0 bounds none)");
    }
    const auto& counts = p.sharding.counts;
    if (counts.empty()) continue;
    if (std::ssize(counts) != plan.shard || *std::min_element(counts.begin(), counts.end()) < 0 ||
        std::accumulate(counts.begin(), counts.end(), Index{0}) != p.lines()) {
      refuse(p, "its " + std::to_string(counts.size()) + " shards hold " +
                    std::to_string(std::accumulate(counts.begin(), counts.end(), Index{0})) +
                    " of " + std::to_string(p.lines()) + " lines, for " +
                    std::to_string(plan.shard) + " ranks");
    }
  }
}

/// Neither a matrix nor a shard of the trainer's may begin inside a block of columns that share a
/// scale.
void check_blocks(const Plan& plan, std::size_t i, Index block, const char* key) {
  const ParameterShape& p = plan.parameters[i];
  const auto check = [&](const std::string& what, Index first) {
    const Index col = first % plan.row_length[i];
    if (col % block == 0) return;
    refuse(p, what + " begins in column " + std::to_string(col) + ", inside a block of " +
                  std::to_string(block) + " (" + key + ")");
  };
  for (int s = 0; s < plan.shard && p.held(); ++s) {
    const Region part = p.part(s, plan.shard);
    if (part.size() > 0) check("the shard of rank " + std::to_string(s), part.first);
  }
  for (const MatrixPlan& m : plan.matrices) {
    if (m.parameter == static_cast<int>(i)) check("matrix '" + m.name + "'", m.region.first);
  }
}

/// The rows that scales are of, and whether every scale has its weights on one rank.
void check_grids(Plan& plan) {
  for (const ParameterShape& p : plan.parameters) {
    plan.row_length.push_back(p.shape.size() < 2 ? p.size() : p.cols());
  }
  std::vector<int> matrices_of(plan.parameters.size(), 0);
  for (const MatrixPlan& m : plan.matrices) {
    plan.row_length[static_cast<std::size_t>(m.parameter)] = m.region.distance;
    ++matrices_of[static_cast<std::size_t>(m.parameter)];
  }
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const ParameterShape& p = plan.parameters[i];
    const WeightFormat& format = plan.group(static_cast<int>(i)).format;
    if (!format.quantized()) continue;
    const Grid& grid = *format.grid;
    const std::string name(name_of(grid.format));
    if (p.dtype == DType::bf16 && !grid.power_of_two) {
      refuse(p, "its weights are bf16, and " + name +
                    " times an f32 scale is no bf16 number: weights.scale_format pow2");
    }
    if (grid.extent == Grid::Extent::tensor && matrices_of[i] > 1) {
      refuse(p, "it is " + std::to_string(matrices_of[i]) +
                    " matrices, which rest on different ranks and cannot share the one scale of "
                    "weights.scale tensor: row or block");
    }
    if (grid.extent == Grid::Extent::block && grid.format == CodeFormat::int4 &&
        (plan.row_length[i] % grid.block != 0 || grid.block % 2 != 0)) {
      refuse(p, "int4 packs two weights into a byte: weights.block " + std::to_string(grid.block) +
                    " must be even and divide its rows of " + std::to_string(plan.row_length[i]));
    }
  }
  for (const MatrixPlan& m : plan.matrices) {
    const WeightFormat& format = plan.group(m.parameter).format;
    if (!format.quantized() || m.cols == m.region.distance) continue;
    if (format.grid->extent != Grid::Extent::block) {
      refuse(plan.parameters[static_cast<std::size_t>(m.parameter)],
             "its matrices cut its rows, which cannot share a scale then: weights.scale block");
    }
  }
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const Group& g = plan.group(static_cast<int>(i));
    if (g.format.quantized() && g.format.grid->extent == Grid::Extent::block) {
      check_blocks(plan, i, g.format.grid->block, "weights.block");
    }
    if (g.momentum.quantized()) check_blocks(plan, i, g.momentum.grid->block, "state.block");
  }
}

// ---- limits ------------------------------------------------------------------------------------

/// One exchange of a reproducible sum is one MPI call, whose displacements are 32-bit.
void check_exchange_sizes(const Plan& plan) {
  constexpr Index most = 0x7fffffff;
  if (plan.virtual_shards == 0) return;
  const Index most_roots = *std::max_element(plan.roots.begin(), plan.roots.end());
  for (const Bucket& b : plan.buckets) {
    Index largest = 0;
    for (const Bucket::Part& part : b.parts) largest = std::max(largest, part.size);
    if (b.reduced && (plan.all_roots > most / std::max<Index>(largest, 1) ||
                      most_roots > most / std::max<Index>(b.size, 1))) {
      throw ConfigError("reproducible.virtual_shards: the sums of '" +
                        plan.parameters[static_cast<std::size_t>(b.parameters.front())].name +
                        "' and what travels with it are " + std::to_string(plan.all_roots) +
                        " partial sums of up to " + std::to_string(largest) +
                        " elements, more than one exchange holds (" + std::to_string(most) +
                        "); use fewer virtual shards or a smaller comm.bucket_bytes");
    }
  }
}

std::int64_t most_memory(const Plan& plan) {
  std::int64_t most = 0;
  for (const RankPlan& r : plan.per_rank) most = std::max(most, r.memory.total());
  return most;
}

/// What the hash covers: every decision, nothing predicted from a profile's rates.
std::string decisions(const Plan& plan) {
  std::string text;
  const auto add = [&text](auto value) {
    if constexpr (std::is_arithmetic_v<decltype(value)>) {
      text.append(reinterpret_cast<const char*>(&value), sizeof value);
    } else {
      text += value;
      text += '\0';
    }
  };
  add(plan.ranks), add(plan.shard), add(plan.replicate), add(plan.virtual_shards);
  add(plan.micro_batches), add(plan.noise_slots), add(plan.stage),
      add(std::string(name_of(plan.gradient_wire)));
  add(plan.max_chunk);
  if (plan.looks) add(plan.looks_at_noise ? "looks at noise" : "looks");
  if (plan.looks_at_dynamics) add("looks at dynamics");
  for (const int level : plan.levels) add(level);
  if (plan.weights_sharded()) add(plan.working_set);
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    add(describe(plan.parameters[i]));
    add(plan.group_of[i]);
  }
  for (const Group& g : plan.groups) {
    const GroupConfig& c = *g.config;
    add(c.rule.name), add(c.lmo.norm), add(c.lmo.coefficients), add(c.lmo.iterations);
    if (c.lmo.coefficients == "rational") add(c.lmo.terms);
    if (c.lmo.coefficients == "auto") {
      add(c.lmo.tolerance), add(c.lmo.lower), add(plan.on_host ? 1 : 0);
    }
    add(c.lmo.scale), add(c.lmo.eps_mode), add(c.lmo.dtype), add(c.weights.format);
    add(c.weights.rounding), add(c.weights.residual);
    if (g.format.quantized()) add(g.format.name());
    if (g.compresses()) add("momentum " + g.momentum.name());
    if (g.feeds_back()) {
      add(c.weights.eco.kappa), add(g.max_correction), add(c.weights.eco.lr_floor);
    }
  }
  const auto add_region = [&](const Region& r) {
    add(r.first), add(r.rows), add(r.cols), add(r.distance);
  };
  for (const MatrixPlan& m : plan.matrices) {
    add(m.name), add_region(m.region), add(std::string(optim::name_of(m.mode))), add(m.owner);
    add(m.gram_of_rows ? 1 : 0);
  }
  for (const Bucket& b : plan.buckets) {
    add(b.weights.name()), add(b.reduced ? 1 : 0), add(b.held ? 1 : 0);
    add(std::string(name_of(b.wire))), add(b.period), add(b.lone ? 1 : 0);
    if (b.shared_terms > 0) add(b.shared_terms);
    for (const Segment& s : b.segments) {
      add(s.parameter), add(s.matrix), add_region(s.region), add(s.rank);
    }
  }
  for (const Turn& turn : plan.schedule) add(static_cast<int>(turn.kind)), add(turn.bucket);
  return text;
}

/// Decides and predicts all that follows from parameters and groups. @return whether there was a
/// choice of modes.
bool complete_plan(const MachineProfile& profile, Preference preference, Plan& plan) {
  const Placement placement = place(profile, preference, plan);
  lay_out(placement, plan);
  check_exchange_sizes(plan);
  if (plan.looks) plan.probed = choose_probed(plan);
  predict(profile, plan);
  const std::string text = decisions(plan);
  plan.hash = xxh3_hex(text.data(), text.size());
  return placement.had_choice;
}

}  // namespace

double Group::lr() const {
  return optim::with_defaults(config->rule).number("lr") * config->layer_mass /
         config->layer_sensitivity;
}

Index ParameterShape::size() const {
  Index n = 1;
  for (const Index d : shape) n *= d;
  return n;
}
Index ParameterShape::rows() const { return shape.front(); }
Index ParameterShape::cols() const { return size() / shape.front(); }

int effective_group(const Config& config, const ParameterShape& p, bool* passed_over) {
  int g = matching_group(config, p.name);
  while (g >= 0 && p.shape.size() < 2) {
    const optim::RuleRow* rule =
        optim::find_rule(config.groups[static_cast<std::size_t>(g)].rule.name);
    if (rule == nullptr || !rule->matrix) break;
    if (passed_over != nullptr) *passed_over = true;
    g = matching_group(config, p.name, g + 1);
  }
  return g;
}

ParameterShape shape_of(const Parameter& p) {
  return {
      p.name,           p.shape, p.strides,  p.dtype,    p.gradient_dtype,
      p.gradient_state, p.views, p.sharding, p.f32_only, p.codes != nullptr || p.scales != nullptr};
}

std::string describe(const ParameterShape& p) {
  std::string text = "'" + p.name + "' " + std::string(name_of(p.dtype)) + " " +
                     shape_text(p.shape) + ", gradient " + std::string(name_of(p.gradient_dtype)) +
                     (p.gradient_state == GradientState::local      ? " local"
                      : p.gradient_state == GradientState::averaged ? " averaged"
                                                                    : " shard");
  if (p.f32_only) text += ", f32 only";
  if (p.as_codes) text += ", as codes";
  if (p.held()) {
    constexpr const char* along[] = {"", "rows", "columns", "elements"};
    text += std::string(", cut along ") + along[static_cast<std::size_t>(p.sharding.along)];
    for (const Index n : p.sharding.counts) text += " " + std::to_string(n);
  }
  for (const LogicalMatrix& v : p.views) {
    text += " view(" + std::to_string(v.row0) + "+" + std::to_string(v.rows) + ", " +
            std::to_string(v.col0) + "+" + std::to_string(v.cols) + ")";
  }
  return text;
}

QuantizedView Plan::whole_codes(std::size_t i, void* codes, float* scales) const {
  const Index line = row_length[i];
  return group(static_cast<int>(i)).format.view(codes, scales, parameters[i].size() / line, line);
}
QuantizedView Plan::whole_codes(std::size_t i, void* both) const {
  const Index line = row_length[i];
  return group(static_cast<int>(i)).format.view(both, parameters[i].size() / line, line);
}

std::size_t Plan::trainers_bytes(std::size_t i) const {
  const ParameterShape& p = parameters[i];
  if (!p.as_codes) return static_cast<std::size_t>(p.size()) * bytes_of(p.dtype);
  const WeightFormat& format = group(static_cast<int>(i)).format;
  const Index line = row_length[i];
  const Index rows = p.size() / line;
  return static_cast<std::size_t>(rows * code_pitch(format.grid->format, line)) +
         static_cast<std::size_t>(format.scale_count(rows, line)) * sizeof(float);
}

std::size_t Plan::gathered_bytes(std::size_t i) const {
  const ParameterShape& p = parameters[i];
  if (!p.as_codes) return pages(trainers_bytes(i));
  const Index line = row_length[i];
  return pages(group(static_cast<int>(i)).format.bytes(p.size() / line, line));
}

Leaves Plan::leaves_of(int world_rank) const { return leaf_run(virtual_shards, ranks, world_rank); }

Plan make_plan(const Config& config, std::vector<ParameterShape> parameters, int ranks,
               const MachineProfile& profile, Index max_chunk, int tasks) {
  check_parameters(parameters);
  Plan plan;
  const MeshShape mesh =
      mesh_shape(ranks, static_cast<int>(config.mesh.shard),
                 static_cast<int>(config.mesh.replicate), static_cast<int>(config.mesh.node));
  plan.ranks = ranks;
  plan.shard = mesh.shard;
  plan.replicate = mesh.replicate;
  plan.levels = mesh.levels;
  plan.virtual_shards = static_cast<int>(config.virtual_shards);
  plan.micro_batches = config.train.micro_batches;
  plan.noise_of_examples = config.diagnostics.gns_source == "norm_layers";
  if (config.diagnostics.every_steps > 0 && (plan.noise_of_examples || plan.contributions() > 1)) {
    plan.noise_slots = plan.noise_sums() * std::ssize(parameters);
  }
  plan.looks = config.diagnostics.every_steps > 0 && config.diagnostics.spectra;
  plan.looks_at_noise = plan.looks && config.diagnostics.dual_noise;
  plan.looks_at_dynamics = plan.looks && config.diagnostics.dynamics;
  plan.stage = static_cast<int>(config.zero_stage);
  plan.bucket_bytes = config.comm.bucket_bytes;
  plan.working_set = config.working_set;
  plan.on_host = config.device == "cpu";
  plan.page_bytes =
      plan.on_host ? static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)) : kernels::cuda_page_bytes;
  plan.gathers = config.gathers;
  plan.gradient_wire = config.comm.gradient_dtype == "bf16" ? DType::bf16 : DType::f32;
  plan.max_chunk = max_chunk;
  for (int w = 0; w < ranks; ++w) {
    int depth = 0;
    const auto roots = plan.virtual_shards > 0
                           ? subtree_roots(plan.virtual_shards, plan.leaves_of(w), &depth)
                           : std::vector<Leaves>{};
    plan.roots.push_back(std::ssize(roots));
    plan.depths.push_back(depth);
    plan.all_roots += std::ssize(roots);
  }
  plan.parameters = std::move(parameters);
  for (std::size_t g = 0; g < config.groups.size(); ++g) {
    plan.groups.push_back(make_group(config.groups[g], g, config.device == "cpu", tasks));
    const Group& made = plan.groups.back();
    if (config.diagnostics.advisor == "auto" && made.feeds_back() && made.is_spectral_descent()) {
      throw ConfigError("groups[" + std::to_string(g) +
                        "].weights.residual momentum: what rounding took is undone of spectral "
                        "steps only; diagnostics.advisor auto may make them others");
    }
  }
  assign_groups(config, plan);
  check_held(plan);

  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const ParameterShape& p = plan.parameters[i];
    const Group& g = plan.group(static_cast<int>(i));
    if (g.lmo == nullptr) continue;
    const auto blocks = in_blocks(logical_matrices(p, g.config->split), block_of(g));
    for (std::size_t k = 0; k < blocks.size(); ++k) {
      MatrixPlan m;
      m.name = blocks.size() == 1 ? p.name : p.name + "#" + std::to_string(k);
      m.parameter = static_cast<int>(i);
      m.region = blocks[k];
      m.rows = m.region.rows;
      m.cols = m.region.cols;
      m.gram_of_rows = m.rows <= m.cols;
      m.stack = g.direction().stack(m.rows, m.cols);
      m.flops = g.direction().flops(*g.lmo, m.rows, m.cols);
      m.seconds = lmo_seconds(profile, g, m.rows, m.cols) +
                  pass_seconds(profile, pass_bytes(g) * static_cast<double>(m.rows * m.cols));
      if (g.feeds_back() && g.orthogonalizes()) {
        const auto side = static_cast<double>(std::min(m.rows, m.cols));
        m.flops += 2 * side * static_cast<double>(m.rows * m.cols);
      }
      m.seconds += feedback_seconds(profile, g, m.rows, m.cols);
      plan.matrices.push_back(std::move(m));
    }
  }
  take_turns(plan);
  check_grids(plan);
  // The fastest that fits. What rests whole on few ranks gives way to shards where the cap or an
  // even use of memory asks for it; then fewer matrices are brought together at a time.
  struct Attempt {
    Preference preference;
    int depth;
  };
  constexpr Attempt attempts[] = {{Preference::fastest, 2}, {Preference::sharded, 2},
                                  {Preference::fastest, 1}, {Preference::sharded, 1},
                                  {Preference::fastest, 0}, {Preference::sharded, 0},
                                  {Preference::leanest, 0}};
  std::int64_t least = INT64_MAX;
  std::optional<Plan> fitting;
  bool has_choice = true;
  for (const Attempt& attempt : attempts) {
    if (!has_choice && attempt.preference != Preference::fastest) continue;
    if (attempt.depth < 2 && (config.memory_cap <= 0 || fitting)) break;
    Plan candidate = plan;
    candidate.depth = attempt.depth;
    has_choice = complete_plan(profile, attempt.preference, candidate);
    const std::int64_t most = most_memory(candidate);
    least = std::min(least, most);
    if (config.memory_cap > 0 && most > config.memory_cap) continue;
    // What a rank has more than its share matters where it is large.
    constexpr double negligible = 64 << 20;
    const bool even = candidate.memory_imbalance <= 1.3 ||
                      static_cast<double>(most) * (1 - 1 / candidate.memory_imbalance) < negligible;
    if (even || !has_choice || attempt.preference == Preference::sharded) return candidate;
    if (!fitting) fitting = std::move(candidate);
  }
  if (fitting) return std::move(*fitting);
  throw ConfigError("memory_cap: a rank needs " + std::to_string(least) + " bytes, the cap is " +
                    std::to_string(config.memory_cap) + "; the smallest cap that fits is " +
                    std::to_string(least));
}

}  // namespace orthrus::runtime
