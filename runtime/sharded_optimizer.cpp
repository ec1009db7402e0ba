#include <algorithm>
#include <cmath>
#include <orthrus/error.hpp>
#include <orthrus/sharded_optimizer.hpp>

#include "runtime/agree.hpp"
#include "runtime/engine.hpp"

namespace orthrus {

namespace runtime {

Index first_line(const Plan& plan, int matrix, const optim::StateSpec& spec) {
  Index lines = 0;
  const int parameter = plan.matrices[static_cast<std::size_t>(matrix)].parameter;
  for (int m = matrix - 1; m >= 0; --m) {
    const MatrixPlan& before = plan.matrices[static_cast<std::size_t>(m)];
    if (before.parameter != parameter) break;
    lines += spec.rows(before.rows, before.cols);
  }
  return lines;
}

}  // namespace runtime

namespace {

/// All ranks must have been given the same: the first difference is named.
void check_same_everywhere(Communicator& comm, const Config& config,
                           const std::vector<Parameter>& parameters) {
  const TrafficScope scope(comm, TrafficClass::setup);
  std::vector<std::string> mine{to_yaml(config)};
  for (const Parameter& p : parameters) mine.push_back(runtime::describe(runtime::shape_of(p)));
  std::string joined;
  for (const std::string& line : mine) joined += line + '\0';
  std::string first = joined;
  comm.broadcast(first, 0);
  std::string difference;
  if (first != joined) {
    std::vector<std::string> theirs;
    for (std::size_t at = 0; at < first.size();) {
      const std::size_t end = first.find('\0', at);
      theirs.push_back(first.substr(at, end - at));
      at = end + 1;
    }
    if (theirs[0] != mine[0]) {
      difference = "the configuration differs from rank 0's";
    } else {
      std::size_t i = 1;
      while (i < mine.size() && i < theirs.size() && mine[i] == theirs[i]) ++i;
      const auto at = [i](const std::vector<std::string>& list) {
        return i < list.size() ? list[i] : std::string("nothing");
      };
      difference = "parameter " + std::to_string(i - 1) + " is " + at(mine) + " here, but " +
                   at(theirs) + " on rank 0";
    }
  }
  runtime::agree(comm, difference, ExitCode::config);
}

/// How many matrices of its parameter come before it.
Index place_in_parameter(const runtime::Plan& plan, int matrix) {
  const int parameter = plan.matrices[static_cast<std::size_t>(matrix)].parameter;
  int first = matrix;
  while (first > 0 && plan.matrices[static_cast<std::size_t>(first - 1)].parameter == parameter) {
    --first;
  }
  return matrix - first;
}

}  // namespace

constexpr double setup_timeout_s = 600;

ShardedOptimizer::Impl::Impl(const Config& config, Communicator comm,
                             std::vector<Parameter> parameters)
    : config_(config), parameters_(std::move(parameters)) {
  // What happens once, or writes files, has more time than a step.
  comm.set_timeout(std::max(setup_timeout_s, config_.comm.timeout_s));
  check_same_everywhere(comm, config_, parameters_);
  setup_ = comm.duplicate("setup");
  comm.set_blocking(config_.comm.blocking);
  mesh_ = make_mesh(std::move(comm), static_cast<int>(config_.mesh.shard),
                    static_cast<int>(config_.mesh.replicate));
  for (Communicator* c : {&mesh_.world, &mesh_.shard, &mesh_.replicate}) {
    c->set_traffic_class(TrafficClass::payload);
  }
  // From here on every rank decides alike; what only one can see is agreed on.
  std::vector<runtime::ParameterShape> shapes;
  for (const Parameter& p : parameters_) shapes.push_back(runtime::shape_of(p));
  plan_ = runtime::make_plan(config_, std::move(shapes), mesh_.world.size(), {},
                             mesh_.world.options().max_chunk);
  std::string first = plan_.hash;
  setup_.broadcast(first, 0);
  runtime::agree(setup_, first == plan_.hash ? "" : "the plan differs from rank 0's",
                 ExitCode::config);
  runtime::agree(setup_, [this] {
    check_buffers_apart();
    for (const Parameter& p : parameters_) {
      const auto aligned = [](const void* data, DType dtype) {
        return reinterpret_cast<std::uintptr_t>(data) % bytes_of(dtype) == 0;
      };
      if (p.weights == nullptr || p.gradient == nullptr) {
        throw ConfigError("parameter '" + p.name + "': its " +
                          (p.weights == nullptr ? "weights" : "gradient") + " pointer is null");
      }
      if (!aligned(p.weights, p.dtype) || !aligned(p.gradient, p.gradient_dtype)) {
        throw ConfigError("parameter '" + p.name + "': a pointer is not aligned to its elements");
      }
    }
    backend_ = kernels::open_backend(config_.device);
    allocate();
  });
  replica_check_every_ = config_.replica_hash_every > 0   ? config_.replica_hash_every
                         : config_.checks == "collective" ? 1
                                                          : 0;
  step_began_ = planned_traffic();  // the communicator may have talked before it came here
}

std::vector<runtime::OwnSegment> ShardedOptimizer::Impl::segments_of(int shard_rank) const {
  std::vector<runtime::OwnSegment> list;
  for (std::size_t b = 0; b < plan_.buckets.size(); ++b) {
    const runtime::Bucket& bucket = plan_.buckets[b];
    const Index part = bucket.part_offset(shard_rank);
    for (const runtime::Segment& s : bucket.segments) {
      if (s.rank != shard_rank) continue;
      runtime::OwnSegment own;
      own.segment = s;
      own.region = runtime::region_of(plan_, s);
      own.bucket = b;
      own.group = plan_.group_of[static_cast<std::size_t>(s.parameter)];
      own.rows = 1;
      own.cols = s.size;
      own.offset_in_part = s.offset - part;
      own.norm_slot = plan_.parameter_slot[static_cast<std::size_t>(s.parameter)];
      if (s.matrix >= 0) {
        const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(s.matrix)];
        own.rows = m.rows;
        own.cols = m.cols;
      }
      if (plan_.blocked[static_cast<std::size_t>(own.group)]) {
        own.norm_slot += s.matrix >= 0 ? place_in_parameter(plan_, s.matrix)
                                       : s.begin / runtime::Plan::norm_block;
      }
      list.push_back(std::move(own));
    }
  }
  return list;
}

/// No two dense tensors may share bytes: a weight registered twice would be updated twice.
void ShardedOptimizer::Impl::check_buffers_apart() const {
  struct Extent {
    std::uintptr_t begin, end;
    std::string what;
  };
  std::vector<Extent> extents;
  for (const Parameter& p : parameters_) {
    if (p.weights == nullptr || p.gradient == nullptr || !p.strides.empty()) continue;
    const auto n = static_cast<std::size_t>(runtime::shape_of(p).size());
    const auto w = reinterpret_cast<std::uintptr_t>(p.weights);
    const auto g = reinterpret_cast<std::uintptr_t>(p.gradient);
    extents.push_back({w, w + n * bytes_of(p.dtype), "the weights of '" + p.name + "'"});
    extents.push_back({g, g + n * bytes_of(p.gradient_dtype), "the gradient of '" + p.name + "'"});
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (std::size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin < extents[i - 1].end) {
      throw ConfigError(extents[i - 1].what + " and " + extents[i].what +
                        " overlap in memory (tied weights are one parameter)");
    }
  }
}

void ShardedOptimizer::Impl::check_between_steps(const char* what) {
  runtime::agree(setup_,
                 gradients_->idle()
                     ? std::string()
                     : std::string(what) +
                           " was called between gradient_ready and step: finish the step first",
                 ExitCode::config);
}

void ShardedOptimizer::Impl::set_lr_multiplier(double factor) {
  if (!(factor >= 0) || !std::isfinite(factor)) {
    gradients_->misuse("set_lr_multiplier(" + std::to_string(factor) +
                       "): it must be finite and not negative");
    return;
  }
  lr_multiplier_ = factor;
}

void ShardedOptimizer::Impl::allocate() {
  using runtime::Arena;
  own_ = segments_of(mesh_.shard.rank());
  const auto spec_bytes = [](const optim::StateSpec& spec, const runtime::OwnSegment& own) {
    return static_cast<std::size_t>(spec.rows(own.rows, own.cols) * spec.cols(own.rows, own.cols)) *
           sizeof(float);
  };
  std::size_t bytes = 0;
  for (const runtime::OwnSegment& own : own_) {
    const runtime::Group& g = plan_.groups[static_cast<std::size_t>(own.group)];
    for (const optim::StateSpec& spec : g.rule->state())
      bytes += Arena::rounded(spec_bytes(spec, own));
    if (g.master)
      bytes += Arena::rounded(static_cast<std::size_t>(own.segment.size) * sizeof(float));
  }
  state_arena_ = Arena(bytes);
  for (runtime::OwnSegment& own : own_) {
    const runtime::Group& g = plan_.groups[static_cast<std::size_t>(own.group)];
    for (const optim::StateSpec& spec : g.rule->state()) {
      const Index rows = spec.rows(own.rows, own.cols);
      const Index cols = spec.cols(own.rows, own.cols);
      own.state.push_back(
          {state_arena_.take(spec_bytes(spec, own)).data(), rows, cols, cols, DType::f32});
    }
    if (g.master) {
      const Index n = own.segment.size;
      own.master = {state_arena_.take(static_cast<std::size_t>(n) * sizeof(float)).data(), 1, n, n,
                    DType::f32};
      const auto p = static_cast<std::size_t>(own.segment.parameter);
      runtime::pack(plan_.parameters[p], parameters_[p].weights, parameters_[p].dtype, own.region,
                    {own.master.data, n, DType::f32}, *backend_);
    }
  }

  // Weights of a rounded format held in a wider buffer lie on its grid from the start.
  for (std::size_t p = 0; p < parameters_.size(); ++p) {
    const DType format = plan_.groups[static_cast<std::size_t>(plan_.group_of[p])].format;
    if (format == parameters_[p].dtype) continue;
    const Index n = plan_.parameters[p].size();
    std::vector<BFloat16> rounded(static_cast<std::size_t>(n));
    const runtime::Region whole{0, 1, n, n};
    runtime::pack(plan_.parameters[p], parameters_[p].weights, parameters_[p].dtype, whole,
                  {rounded.data(), n, DType::bf16}, *backend_);
    runtime::unpack({rounded.data(), n, DType::bf16}, plan_.parameters[p], parameters_[p].weights,
                    parameters_[p].dtype, whole, *backend_);
  }

  const runtime::WorkSizes& sizes =
      plan_.per_rank[static_cast<std::size_t>(mesh_.world.rank())].work;
  work_arena_ = Arena(Arena::rounded(sizes.rule) + Arena::rounded(sizes.widened) +
                      Arena::rounded(sizes.control) +
                      weight_slots_.size() * Arena::rounded(sizes.weight_gather));
  scratch_ = work_arena_.take(sizes.rule);
  widened_ = work_arena_.take(sizes.widened);
  control_ = work_arena_.take(sizes.control);
  for (WeightSlot& slot : weight_slots_) slot.bytes = work_arena_.take(sizes.weight_gather);
  gradients_ =
      std::make_unique<runtime::GradientBuckets>(plan_, parameters_, mesh_, *backend_, widened_);

  const std::size_t groups = plan_.groups.size();
  elements_of_group_.assign(groups, 0);
  for (std::size_t p = 0; p < plan_.parameters.size(); ++p) {
    elements_of_group_[static_cast<std::size_t>(plan_.group_of[p])] +=
        static_cast<double>(plan_.parameters[p].size());
  }
  clip_.assign(groups, 1);
  report_.update_rms.assign(groups, 0);
  report_.gradient_norm.assign(groups, 0);
  report_.skip_reason.reserve(256);
  for (const runtime::Group& g : plan_.groups) {
    const RuleConfig rule = optim::with_defaults(g.config->rule);
    lr_.push_back(rule.number("lr"));
    weight_decay_.push_back(rule.number("weight_decay"));
  }
}

std::map<std::string, ShardedOptimizer::StateTensor> ShardedOptimizer::Impl::gather_state() {
  check_between_steps("gather_state");
  std::map<std::string, StateTensor> all;
  const int me = mesh_.world.rank();
  std::vector<float> piece;
  // The first replica's ranks, one after the other, tell rank 0 their segments in the plan's order.
  for (int r = 0; r < plan_.shard && me < plan_.shard; ++r) {
    if (me != 0 && me != r) continue;
    const auto segments = r == me ? own_ : segments_of(r);
    for (const runtime::OwnSegment& own : segments) {
      const runtime::Group& g = plan_.groups[static_cast<std::size_t>(own.group)];
      const runtime::ParameterShape& p =
          plan_.parameters[static_cast<std::size_t>(own.segment.parameter)];
      const auto take = [&](std::string_view key, Index count, const MatrixView* mine,
                            const runtime::Region& region, std::vector<Index> shape) {
        piece.resize(static_cast<std::size_t>(count));
        if (mine != nullptr)
          std::copy_n(static_cast<const float*>(mine->data), count, piece.begin());
        if (r != me) setup_.receive(Span{piece.data(), count, DType::f32}, r);
        if (me != 0) {
          setup_.send(ConstSpan{piece.data(), count, DType::f32}, 0);
          return;
        }
        StateTensor& tensor = all["state/" + p.name + "/" + std::string(key)];
        if (tensor.values.empty()) {
          Index size = 1;
          for (const Index n : shape) size *= n;
          tensor.shape = std::move(shape);
          tensor.values.resize(static_cast<std::size_t>(size));
        }
        for (Index row = 0; row < region.rows; ++row) {
          std::copy_n(piece.begin() + row * region.cols, region.cols,
                      tensor.values.begin() + region.first + row * region.distance);
        }
      };
      const auto specs = g.rule->state();
      for (std::size_t k = 0; k < specs.size(); ++k) {
        const optim::StateSpec& spec = specs[k];
        const Index count = spec.rows(own.rows, own.cols) * spec.cols(own.rows, own.cols);
        const MatrixView* mine = r == me ? &own.state[k] : nullptr;
        if (spec.extent == optim::StateSpec::Extent::elements) {
          take(spec.name, count, mine, own.region, p.shape);
        } else {
          Index lines = 0;
          for (const runtime::MatrixPlan& m : plan_.matrices) {
            if (m.parameter == own.segment.parameter) lines += spec.rows(m.rows, m.cols);
          }
          take(spec.name, count, mine,
               {runtime::first_line(plan_, own.segment.matrix, spec), 1, count, count}, {lines});
        }
      }
      if (g.master) {
        take("master", own.segment.size, r == me ? &own.master : nullptr, own.region, p.shape);
      }
    }
  }
  if (me == 0) {
    for (const runtime::ParameterShape& p : plan_.parameters) {
      all["state/" + p.name + "/step"] = {{1}, {static_cast<float>(updates_)}};
    }
  }
  return all;
}

// ---- the front door
// ------------------------------------------------------------------------------

ShardedOptimizer::ShardedOptimizer(const Config& config, Communicator comm,
                                   std::vector<Parameter> parameters)
    : impl_(std::make_unique<Impl>(config, std::move(comm), std::move(parameters))) {}
ShardedOptimizer::ShardedOptimizer(ShardedOptimizer&&) noexcept = default;
ShardedOptimizer& ShardedOptimizer::operator=(ShardedOptimizer&&) noexcept = default;
ShardedOptimizer::~ShardedOptimizer() = default;

int ShardedOptimizer::rank() const { return impl_->mesh_.world.rank(); }
int ShardedOptimizer::size() const { return impl_->mesh_.world.size(); }
void ShardedOptimizer::micro_batch(std::int64_t index) { impl_->gradients_->micro_batch(index); }
void ShardedOptimizer::gradient_ready(int id) { impl_->gradients_->ready(id); }
const StepReport& ShardedOptimizer::step() { return impl_->step(); }
void ShardedOptimizer::parameter_wait(int) {}  // `step` returns with every weight in place
std::int64_t ShardedOptimizer::steps() const { return impl_->steps_; }
void ShardedOptimizer::set_lr_multiplier(double factor) { impl_->set_lr_multiplier(factor); }
void ShardedOptimizer::save(const std::string& directory,
                            const std::map<std::string, std::string>& user) {
  impl_->save(directory, user);
}
std::map<std::string, std::string> ShardedOptimizer::load(const std::string& directory) {
  return impl_->load(directory);
}
MemoryPlan ShardedOptimizer::memory() const {
  return impl_->plan_.per_rank[static_cast<std::size_t>(rank())].memory;
}
std::string ShardedOptimizer::plan_hash() const { return impl_->plan_.hash; }
std::string ShardedOptimizer::plan_json() const { return runtime::plan_json(impl_->plan_); }
std::map<std::string, ShardedOptimizer::StateTensor> ShardedOptimizer::gather_state() {
  return impl_->gather_state();
}

}  // namespace orthrus
