#include <algorithm>
#include <array>
#include <cmath>
#include <orthrus/error.hpp>
#include <orthrus/sharded_optimizer.hpp>

#include "runtime/agree.hpp"
#include "runtime/engine.hpp"
#include "runtime/plan_steps.hpp"
#include "runtime/schedule.hpp"

namespace orthrus {

namespace runtime {
namespace {

/// The per-line state of a parameter puts its matrices' lines one after the other: how many come
/// before matrix `matrix`, for state `spec`.
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

}  // namespace

Region state_region(const Plan& plan, const OwnSegment& own, const optim::StateSpec& spec) {
  if (!spec.of_matrix()) return {0, own.rows, own.cols, own.cols};
  if (own.segment.matrix < 0) {
    return {0, spec.rows(own.rows, own.cols), spec.cols(own.rows, own.cols), 1};
  }
  return {0, lines_region(plan, own, spec).size(), 1, 1};
}

Region lines_region(const Plan& plan, const OwnSegment& own, const optim::StateSpec& spec) {
  if (!own.keeps_lines) return {0, 0, 0, 0};
  const MatrixPlan& m = plan.matrices[static_cast<std::size_t>(own.segment.matrix)];
  const comm::Run run = state_run(plan, m, spec, own.segment.rank % plan.shard);
  return {first_line(plan, own.segment.matrix, spec) + run.first, 1, run.count, run.count};
}

bool saves_state(const Plan& plan, const OwnSegment& own, const optim::StateSpec& spec) {
  const MatrixPlan& m = plan.matrices[static_cast<std::size_t>(own.segment.matrix)];
  return is_dealt(m, spec) ? own.saves_runs : own.saves_lines;
}

}  // namespace runtime

namespace {

/// Triangles of a parameter's matrices become whole symmetric matrices: [m, m], [k, m, m] of k
/// equal ones, and else one after the other.
void unpack_factors(const runtime::Plan& plan, std::size_t parameter,
                    std::map<std::string, ShardedOptimizer::StateTensor>& all) {
  const runtime::Group& g = plan.group(static_cast<int>(parameter));
  for (const optim::StateSpec& spec : g.rule->state()) {
    const auto found =
        all.find("state/" + plan.parameters[parameter].name + "/" + std::string(spec.name));
    if (spec.triangle_of(1, 1) == 0 || found == all.end()) continue;
    std::vector<Index> sides;
    std::vector<float> full;
    std::size_t at = 0;
    for (const runtime::MatrixPlan& m : plan.matrices) {
      if (m.parameter != static_cast<int>(parameter)) continue;
      const Index side = spec.triangle_of(m.rows, m.cols);
      const std::size_t first = full.size();
      const auto n = static_cast<std::size_t>(side);
      full.resize(first + n * n);
      for (std::size_t r = 0; r < n; ++r) {
        for (std::size_t c = 0; c <= r; ++c, ++at) {
          full[first + r * n + c] = full[first + c * n + r] = found->second.values[at];
        }
      }
      sides.push_back(side);
    }
    const bool equal = std::count(sides.begin(), sides.end(), sides.front()) == std::ssize(sides);
    std::vector<Index> shape{std::ssize(full)};
    if (equal) shape = {std::ssize(sides), sides.front(), sides.front()};
    if (sides.size() == 1) shape.erase(shape.begin());
    found->second = {std::move(shape), std::move(full)};
  }
}

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
                             std::vector<Parameter> parameters, const DeviceChoice& device,
                             const runtime::OpenSeat& open)
    : config_(config), parameters_(std::move(parameters)) {
  // What happens once, or writes files, has more time than a step.
  comm.set_timeout(std::max(setup_timeout_s, config_.comm.timeout_s));
  check_same_everywhere(comm, config_, parameters_);
  setup_ = comm.duplicate("setup");
  runtime::Seat seat = open(config_, device, comm);
  backend_ = std::move(seat.backend);
  comm.set_blocking(config_.comm.blocking);
  if (seat.payload) {
    numbers_.emplace();
    numbers_->world = std::move(comm);
    comm = std::move(*seat.payload);
    comm.set_blocking(config_.comm.blocking);
  }
  mesh_ = make_mesh(std::move(comm), static_cast<int>(config_.mesh.shard),
                    static_cast<int>(config_.mesh.replicate), static_cast<int>(config_.mesh.node));
  if (numbers_) {
    numbers_->shard = numbers_->world.split(mesh_.replicate.rank(), mesh_.shard.rank(), "shard");
    numbers_->replicate =
        numbers_->world.split(mesh_.shard.rank(), mesh_.replicate.rank(), "replicate");
  }
  for_each_communicator(*this, [](Communicator& c) { c.set_traffic_class(TrafficClass::payload); });
  // From here on every rank decides alike; what only one can see is agreed on.
  std::vector<runtime::ParameterShape> shapes;
  for (const Parameter& p : parameters_) shapes.push_back(runtime::shape_of(p));
  runtime::MachineProfile profile;
  runtime::agree(setup_, [&] { profile = runtime::load_profile(config_.profile); });
  std::array<std::int64_t, 1> tasks{kernels::tasks_at_once(config_.device)};
  setup_.all_reduce(std::span<std::int64_t>(tasks), ReduceOp::max);  // one plan for all ranks
  plan_ = runtime::make_plan(config_, std::move(shapes), mesh_.world.size(), profile,
                             mesh_.world.options().max_chunk, static_cast<int>(tasks[0]));
  std::string first = plan_.hash;
  setup_.broadcast(first, 0);
  runtime::agree(setup_, first == plan_.hash ? "" : "the plan differs from rank 0's",
                 ExitCode::config);
  // Reductions leave when others have arrived, which each rank sees at another time: gathers
  // between them have an order of their own.
  for (std::size_t i = 0; plan_.weights_sharded() && i < plan_.shard_levels(); ++i) {
    weight_levels_.push_back(mesh_.level(i).duplicate("weights"));
  }
  runtime::agree(setup_, [this] {
    check_buffers_apart();
    for (const Parameter& p : parameters_) {
      const auto aligned = [](const void* data, DType dtype) {
        return reinterpret_cast<std::uintptr_t>(data) % bytes_of(dtype) == 0;
      };
      const runtime::ParameterShape shape = runtime::shape_of(p);
      if (shape.held() && shape.part(mesh_.shard.rank(), plan_.shard).size() == 0) continue;
      const runtime::Group& group = plan_.group(static_cast<int>(&p - parameters_.data()));
      if (group.format.quantized() && !runtime::is_contiguous(shape)) {
        throw ConfigError("parameter '" + p.name + "': it is not dense: weights.format " +
                          group.config->weights.format + " needs rows one after the other");
      }
      const auto refuse = [&](const std::string& why) {
        throw ConfigError("parameter '" + p.name + "': " + why);
      };
      if (shape.as_codes && p.weights != nullptr) {
        refuse("it has weights, and codes or scales beside them: a trainer computes with either");
      }
      if (shape.as_codes && (p.codes == nullptr || p.scales == nullptr)) {
        refuse(std::string("its ") + (p.codes == nullptr ? "codes" : "scales") +
               " pointer is null");
      }
      if ((p.weights == nullptr && !shape.as_codes) || p.gradient == nullptr) {
        refuse(std::string("its ") + (p.gradient != nullptr ? "weights" : "gradient") +
               " pointer is null");
      }
      if (shape.as_codes && (!backend_->reaches(p.codes) || !backend_->reaches(p.scales))) {
        refuse("its codes are on the host, and device " + config_.device +
               " does not reach them: no copies are kept of codes");
      }
      if (!aligned(p.weights, p.dtype) || !aligned(p.gradient, p.gradient_dtype) ||
          !aligned(p.scales, DType::f32)) {
        throw ConfigError("parameter '" + p.name + "': a pointer is not aligned to its elements");
      }
    }
    std::vector<Index> sizes(parameters_.size());
    for (std::size_t i = 0; i < sizes.size(); ++i) sizes[i] = size_here(i);
    for (std::size_t i = 0; i < sizes.size(); ++i) check_trainers_codes(i);
    mirrors_ = std::make_unique<runtime::Mirrors>(parameters_, plan_.parameters, sizes, *backend_);
    allocate();
    mirrors_->deliver_weights();  // rounded
    backend_->wait();
  });
  open_grid();
  {
    const TrafficScope scope(mesh_.shard, TrafficClass::setup);
    round_held();
    mirrors_->deliver_weights();
    backend_->wait();
  }
  if (config_.cuda.graph && !backend_->keep_replays(true)) {
    notice_ = "cuda.graph is ignored: device " + config_.device + " has no graphs";
  }
  replica_check_every_ = config_.replica_hash_every > 0   ? config_.replica_hash_every
                         : config_.checks == "collective" ? 1
                                                          : 0;
  step_began_ = planned_traffic();  // the communicator may have talked before it came here
}

/// First the calls, then what they use. On a device `free` waits for all that runs there, and a
/// kernel of NCCL whose peer is gone runs until its communicator is aborted. A call still on its
/// way completes here; after one that was given up it is let go, which aborts the communicators of
/// a device, all at once. Only then the members follow, memory before the communicators: those that
/// are in order are ended when nothing of theirs runs.
ShardedOptimizer::Impl::~Impl() {
  for_each_request([](Request& request) { request = {}; });
}

std::vector<runtime::OwnSegment> ShardedOptimizer::Impl::segments_of(int world_rank) const {
  std::vector<runtime::OwnSegment> list;
  const int slot = plan_.slot_of(world_rank);
  for (std::size_t b = 0; b < plan_.buckets.size(); ++b) {
    const runtime::Bucket& bucket = plan_.buckets[b];
    const Index part = bucket.offset_of(slot);
    const bool first_replica = world_rank < plan_.shard;
    for (const runtime::Segment& s : bucket.segments) {
      if (!plan_.has(bucket, s, world_rank)) continue;
      runtime::OwnSegment own;
      own.segment = s;
      own.bucket = b;
      own.group = plan_.group_of[static_cast<std::size_t>(s.parameter)];
      own.rows = s.region.rows;
      own.cols = s.region.cols;
      own.offset_in_part = bucket.held ? 0 : s.offset - part;
      own.norm_slot = plan_.parameter_slot[static_cast<std::size_t>(s.parameter)];
      if (bucket.held && s.size() > 0) {
        const runtime::ParameterShape& p = plan_.parameters[static_cast<std::size_t>(s.parameter)];
        const Region all = p.part(world_rank % plan_.shard, plan_.shard);
        const auto place = [&](Index flat) {
          const Index from = flat - all.first;
          return from / all.distance * all.cols + from % all.distance;
        };
        own.here = {place(s.region.first), s.region.rows, s.region.cols, s.region.cols};
        if (s.region.rows > 1) {
          own.here.distance = place(s.region.first + s.region.distance) - own.here.first;
        }
      }
      if (s.matrix >= 0) {
        const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(s.matrix)];
        own.keeps_lines = runtime::keeps_lines_here(plan_, bucket, s);
        own.saves_lines = !own.keeps_lines ? false
                          : bucket.held    ? m.owner % plan_.shard == world_rank && first_replica
                                           : m.owner == world_rank;
        own.saves_runs = own.keeps_lines && (!bucket.held || first_replica);
      }
      if (plan_.blocked[static_cast<std::size_t>(own.group)]) {
        own.norm_slot += s.matrix >= 0 ? place_in_parameter(plan_, s.matrix)
                                       : s.region.first / runtime::Plan::norm_block;
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
    const runtime::ParameterShape shape = runtime::shape_of(p);
    if ((p.weights == nullptr) != shape.as_codes || p.gradient == nullptr || !p.strides.empty()) {
      continue;
    }
    const auto n = static_cast<std::size_t>(
        shape.held() ? shape.part(mesh_.shard.rank(), plan_.shard).size() : shape.size());
    if (n == 0) continue;
    const auto add = [&](const void* data, std::size_t bytes, const char* what) {
      const auto begin = reinterpret_cast<std::uintptr_t>(data);
      if (data != nullptr) {
        extents.push_back({begin, begin + bytes, std::string(what) + " of '" + p.name + "'"});
      }
    };
    add(p.gradient, n * bytes_of(p.gradient_dtype), "the gradient");
    add(p.weights, n * bytes_of(p.dtype), "the weights");
    if (!shape.as_codes) continue;
    const auto i = static_cast<std::size_t>(&p - parameters_.data());
    const QuantizedView whole = trainers_codes(i);
    const auto codes = static_cast<std::size_t>(whole.rows * whole.pitch);
    add(p.codes, codes, "the codes");
    add(p.scales, plan_.trainers_bytes(i) - codes, "the scales");
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

/// Where a bucket's matrices meet on a process grid. The first product opens its connections: here,
/// not inside step 1.
void ShardedOptimizer::Impl::open_grid() {
  if (std::none_of(plan_.buckets.begin(), plan_.buckets.end(),
                   [](const runtime::Bucket& b) { return b.mode == optim::Mode::block_cyclic; })) {
    return;
  }
  const TrafficScope scope(mesh_.shard, TrafficClass::setup);
  grid_ = std::make_unique<comm::ProcessGrid>(mesh_.shard);
  const Index side = 2 * plan_.shard;
  std::vector<Region> rows;
  for (int s = 0; s < plan_.shard; ++s) rows.push_back({2 * s * side, 2, side, side});
  optim::BlockCyclicMsign warm_up(side, side, rows, mesh_.shard.rank());
  std::vector<float> piece(static_cast<std::size_t>(2 * side), 1.0F);
  std::vector<std::byte> work(warm_up.workspace_bytes());
  warm_up(piece.data(), std::vector<kernels::Quintic>{{1, 1, 1}}, 1, {}, work, *grid_, mesh_.shard,
          *backend_);
}

void ShardedOptimizer::Impl::copy_weights(int id, void* to) {
  const auto i = static_cast<std::size_t>(id);
  const runtime::ParameterShape& shape = plan_.parameters[i];
  const Parameter& p = parameters_[i];
  const Index n = size_here(i);
  const std::size_t bytes = static_cast<std::size_t>(n) * bytes_of(p.dtype);
  if (shape.as_codes) return copy_values(codes(id), i, to);
  const bool gathered = working_set_ && !shape.held();
  if (gathered || runtime::is_contiguous(shape)) {
    backend_->copy(gathered ? working_set_->weights(i) : p.weights, to, bytes);
    return backend_->wait();
  }
  const kernels::DeviceBuffer dense(*backend_, bytes);
  runtime::pack(shape, p.weights, p.dtype, {0, 1, n, n}, {dense.data(), n, p.dtype}, *backend_);
  backend_->copy(dense.data(), to, bytes);
  backend_->wait();
}

/// to ← codes · scales, in the dtype of copies of parameter i.
void ShardedOptimizer::Impl::copy_values(const QuantizedView& codes, std::size_t i, void* to) {
  const Grid& grid = *plan_.group(static_cast<int>(i)).format.grid;
  const DType dtype = parameters_[i].dtype;
  if (backend_->reaches(to)) {
    backend_->dequantize(codes, grid, {to, codes.rows, codes.cols, codes.cols, dtype});
    return backend_->wait();
  }
  // Row by row of the grid, in a panel on the device.
  constexpr Index panel = Index{1} << 20;
  const Index most = std::clamp<Index>(panel / codes.cols, 1, codes.rows);
  const auto row = static_cast<std::size_t>(codes.cols) * bytes_of(dtype);
  const kernels::DeviceBuffer values(*backend_, static_cast<std::size_t>(most) * row);
  for (Index first = 0; first < codes.rows; first += most) {
    const Index rows = std::min(most, codes.rows - first);
    backend_->dequantize(runtime::block(codes, grid, first, rows, 0, codes.cols), grid,
                         {values.data(), rows, codes.cols, codes.cols, dtype});
    backend_->copy(values.data(),
                   static_cast<std::byte*>(to) + static_cast<std::size_t>(first) * row,
                   static_cast<std::size_t>(rows) * row);
    backend_->wait();
  }
}

QuantizedView ShardedOptimizer::Impl::codes(int id) const {
  const auto i = static_cast<std::size_t>(id);
  if (working_set_ && plan_.parameters[i].as_codes) {
    return plan_.whole_codes(i, working_set_->weights(i));
  }
  return trainers_codes(i);
}

void ShardedOptimizer::Impl::gather_weights(std::span<const int> ids) {
  if (!working_set_) return;
  settle_order();
  working_set_->gather(ids);
  backend_->wait();
}
void ShardedOptimizer::Impl::release_weights(std::span<const int> ids) {
  if (working_set_) working_set_->release(ids);
}

/// After a load: the norms that the steps until then had bounded.
void ShardedOptimizer::Impl::find_bounds() {
  std::vector<double> sums(bounds_.size(), 0);
  for (const runtime::OwnSegment& own : own_) {
    if (own.segment.matrix < 0 || own.size() == 0 || !counts(own)) continue;
    const int slot = plan_.matrices[static_cast<std::size_t>(own.segment.matrix)].bound_slot;
    if (slot < 0) continue;
    sums[static_cast<std::size_t>(slot)] += momentum_squares(own, runtime::Carver(scratch_));
  }
  if (sums.empty()) return;
  setup_.all_reduce(std::span(sums));
  for (const runtime::MatrixPlan& m : plan_.matrices) {
    if (m.bound_slot < 0) continue;
    const auto i = static_cast<std::size_t>(m.bound_slot);
    bounds_[i] = runtime::bound_at_rest(plan_.group(m.parameter).momentum, std::sqrt(sums[i]));
  }
}

/// The buffers of every bucket's meeting, as the plan has counted them.
void ShardedOptimizer::Impl::place_meetings(std::span<std::byte> arena) {
  const auto me = static_cast<std::size_t>(mesh_.world.rank());
  meeting_states_.resize(plan_.buckets.size());
  owed_.reserve(plan_.buckets.size());
  under_way_.reserve(plan_.buckets.size());
  if (config_.checks == "collective") poison(arena);
  runtime::MeetingArena places;
  for (const runtime::Turn turn : plan_.schedule) {
    const auto b = static_cast<std::size_t>(turn.bucket);
    const runtime::Bucket& bucket = plan_.buckets[b];
    if (bucket.matrices.empty()) continue;
    MeetingState& state = meeting_states_[b];
    runtime::MeetingSize size;
    if (runtime::MeetingArena::takes(turn)) size = runtime::meeting_sizes(plan_, bucket)[me];
    const auto at = places.take_turn(bucket, turn, size);
    constexpr auto nowhere = runtime::MeetingArena::nowhere;
    if (at.mine != nowhere) state.mine = arena.subspan(at.mine, runtime::mine_bytes(bucket, size));
    if (at.theirs != nowhere) {
      state.theirs = arena.subspan(at.theirs, runtime::theirs_bytes(bucket, size));
    }
    if (at.undo != nowhere) state.undo = arena.subspan(at.undo, size.undo);
    if (at.back != nowhere) state.back = arena.subspan(at.back, runtime::back_bytes(bucket, size));
    if (!runtime::computed_by_owners(bucket) || bucket.lone) state.back = state.mine;
  }
}

void ShardedOptimizer::Impl::place_rounding(std::size_t b) {
  runtime::Rounding& r = roundings_[b];
  r = runtime::make_rounding(plan_, plan_.buckets[b], mesh_.world.rank());
  norms_.resize(std::max(norms_.size(), static_cast<std::size_t>(r.size.norms)));
  const auto list = segments(b);
  for (std::size_t i = 0; i < list.size(); ++i) {
    list[i].kept = r.pieces[i];
    list[i].shared_scale = r.scales[i];
    list[i].undo = r.undo[i];
  }
}

void ShardedOptimizer::Impl::allocate() {
  using runtime::Arena;
  own_ = segments_of(mesh_.world.rank());
  first_own_.assign(plan_.buckets.size() + 1, own_.size());
  for (std::size_t i = own_.size(); i-- > 0;) first_own_[own_[i].bucket] = i;
  for (std::size_t b = plan_.buckets.size(); b-- > 0;) {
    first_own_[b] = std::min(first_own_[b], first_own_[b + 1]);
  }
  const auto bytes_of_state = [this](const runtime::OwnSegment& own, std::size_t k) {
    const runtime::Group& g = plan_.groups[static_cast<std::size_t>(own.group)];
    if (k == 0 && g.compresses()) return g.momentum.bytes(own.rows, own.cols);
    const Region r = runtime::state_region(plan_, own, g.rule->state()[k]);
    return static_cast<std::size_t>(r.size()) * sizeof(float);
  };
  struct Beside {
    std::size_t master, low, scales;
  };
  const auto beside = [this](const runtime::Group& g, const runtime::OwnSegment& own) {
    const auto n = static_cast<std::size_t>(own.size());
    const bool scales = !runtime::rests_as_codes(plan_, own.segment);  // else they rest there
    return Beside{
        g.master ? n * sizeof(float) : 0,
        g.residual == runtime::Residual::mantissa ? n * bytes_of(DType::bf16) : 0,
        scales ? static_cast<std::size_t>(g.format.scale_count(own.rows, own.cols)) * sizeof(float)
               : 0};
  };
  std::size_t bytes = 0;
  for (const runtime::OwnSegment& own : own_) {
    const runtime::Group& g = plan_.groups[static_cast<std::size_t>(own.group)];
    for (std::size_t k = 0; k < g.rule->state().size(); ++k) {
      bytes += Arena::rounded(bytes_of_state(own, k));
    }
    bytes += Arena::rounded(beside(g, own).master) + Arena::rounded(beside(g, own).low) +
             Arena::rounded(beside(g, own).scales);
  }
  state_arena_ = Arena(*backend_, bytes);
  if (plan_.weights_sharded()) {
    working_set_ = std::make_unique<runtime::WorkingSet>(plan_, mesh_.world.rank(),
                                                         std::span(weight_levels_), *backend_);
    store_weights();
  }
  for (runtime::OwnSegment& own : own_) {
    const runtime::Group& g = plan_.groups[static_cast<std::size_t>(own.group)];
    for (std::size_t k = 0; k < g.rule->state().size(); ++k) {
      const Region r = runtime::state_region(plan_, own, g.rule->state()[k]);
      const DType dtype = k > 0 ? DType::f32 : g.momentum.unit();
      own.state.push_back(
          {state_arena_.take(bytes_of_state(own, k)).data(), r.rows, r.cols, r.cols, dtype});
    }
    if (g.momentum.quantized() && own.size() > 0) {  // scales of zeros
      const QuantizedView m = g.momentum.view(own.state[0].data, own.rows, own.cols);
      backend_->scales_from_maxima(*g.momentum.grid, runtime::scales_of(m, *g.momentum.grid));
    }
    const auto take = [this](std::size_t size, Index rows, Index cols, DType dtype) {
      return size == 0 ? MatrixView{}
                       : MatrixView{state_arena_.take(size).data(), rows, cols, cols, dtype};
    };
    own.master = take(beside(g, own).master, own.rows, own.cols, DType::f32);
    own.low = take(beside(g, own).low, own.rows, own.cols, DType::bf16);
    if (beside(g, own).scales > 0) {
      own.scales = take(beside(g, own).scales, scale_rows(*g.format.grid, own.rows),
                        scale_cols(*g.format.grid, own.cols), DType::f32);
    }
    keep_beside(own, trainers_own(static_cast<std::size_t>(own.segment.parameter)));
  }

  // From here on weights are the working set's.
  for (std::size_t p = 0; plan_.weights_sharded() && p < parameters_.size(); ++p) {
    if (!plan_.parameters[p].held()) mirrors_->forget_weights(p);
  }

  round_weights();

  const runtime::WorkSizes& sizes =
      plan_.per_rank[static_cast<std::size_t>(mesh_.world.rank())].work;
  work_arena_ =
      Arena(*backend_, Arena::rounded(sizes.rule) + Arena::rounded(sizes.widened) +
                           Arena::rounded(sizes.narrowed) + Arena::rounded(sizes.meetings) +
                           Arena::rounded(sizes.rounding) + Arena::rounded(sizes.probe_send) +
                           Arena::rounded(sizes.probe_receive) + Arena::rounded(sizes.probe_noise) +
                           weight_slots_.size() * Arena::rounded(sizes.weight_gather));
  scratch_ = work_arena_.take(sizes.rule);
  widened_ = work_arena_.take(sizes.widened);
  narrowed_ = work_arena_.take(sizes.narrowed);
  control_ = std::make_unique<double[]>(sizes.control / sizeof(double));
  for (WeightSlot& slot : weight_slots_) slot.bytes = work_arena_.take(sizes.weight_gather);
  place_meetings(work_arena_.take(sizes.meetings));
  rounding_ = work_arena_.take(sizes.rounding);
  looking_.send = work_arena_.take(sizes.probe_send);
  looking_.receive = work_arena_.take(sizes.probe_receive);
  looking_.noise_room = work_arena_.take(sizes.probe_noise);
  for (std::size_t b = 0; b < plan_.buckets.size(); ++b) {
    const runtime::Bucket& bucket = plan_.buckets[b];
    meetings_.emplace_back();
    roundings_.emplace_back();
    if (bucket.rounds_together) place_rounding(b);
    if (bucket.matrices.empty()) continue;
    meetings_.back() = runtime::make_meeting(plan_, bucket, mesh_.world.rank());
    for (std::size_t i = first_own_[b]; i < first_own_[b + 1]; ++i) {
      own_[i].meeting_offset = meetings_.back().departures[i - first_own_[b]];
    }
    if (bucket.mode != optim::Mode::block_cyclic) continue;
    for (const runtime::Meeting::Matrix& entry : meetings_.back().matrices) {
      const runtime::MatrixPlan& m = plan_.matrices[static_cast<std::size_t>(entry.matrix)];
      const std::vector<Region> pieces = runtime::pieces_of_z(plan_, m);
      const int rank = mesh_.shard.rank();
      if (plan_.group(m.parameter).direction().has_grid_root()) {
        grid_roots_.try_emplace(entry.matrix, m.rows, m.cols, pieces, rank);
      } else {
        grid_matrices_.try_emplace(entry.matrix, m.z_rows(m.rows), m.z_cols(m.cols), pieces, rank);
      }
    }
  }
  bounds_.assign(static_cast<std::size_t>(plan_.bound_slots), 0);
  gradients_ = std::make_unique<runtime::GradientBuckets>(plan_, parameters_, *mirrors_, mesh_,
                                                          *backend_, widened_);
  poisons_ = config_.checks == "collective";
  if (poisons_) gradients_->poison_what_is_free();

  const std::size_t groups = plan_.groups.size();
  elements_of_group_.assign(groups, 0);
  for (std::size_t p = 0; p < plan_.parameters.size(); ++p) {
    elements_of_group_[static_cast<std::size_t>(plan_.group_of[p])] +=
        static_cast<double>(plan_.parameters[p].size());
  }
  clip_.assign(groups, 1);
  report_.update_rms.assign(groups, 0);
  report_.gradient_norm.assign(groups, 0);
  report_.noise.assign(groups, {});
  group_sums_.assign(groups, {});
  noise_.assign(plan_.parameters.size(), {});
  local_squares_.assign(plan_.noise_slots > 0 ? plan_.parameters.size() : 0, 0);
  example_squares_ = example_counts_ = local_squares_;
  euclidean_.assign(plan_.matrices.size(), 0);
  prepare_to_look();
  report_.skip_reason.reserve(256);
  for (const runtime::Group& g : plan_.groups) {
    lr_.push_back(g.lr());
    weight_decay_.push_back(optim::with_defaults(g.config->rule).number("weight_decay"));
  }
  kappa_.assign(groups, 0);
  report_.rounding.assign(groups, {});
  for (std::size_t i = 0; i < groups; ++i) {
    const runtime::Group& g = plan_.groups[i];
    const std::string& kind = g.config->weights.eco.kappa;
    kappa_kind_.push_back(kind == "blog"    ? optim::Kappa::blog
                          : kind == "paper" ? optim::Kappa::paper
                                            : optim::Kappa::exact);
    schedule_kappas_.emplace_back();
    if (g.feeds_back() && kind == "exact_schedule") {
      schedule_kappas_.back() =
          optim::schedule_kappas(*g.rule->gain(), weight_decay_[i], config_.train.steps,
                                 [&](std::int64_t t) { return lr_at(i, t); });
    }
  }
  for (const runtime::Bucket& b : plan_.buckets) {
    auto& cuts = weight_cuts_.emplace_back();
    for (std::size_t level = 0; level < plan_.levels.size(); ++level) {
      cuts.push_back(plan_.weights_cut_of(b, mesh_.world.rank(), level));
    }
  }
}

std::map<std::string, ShardedOptimizer::StateTensor> ShardedOptimizer::Impl::gather_state() {
  check_between_steps("gather_state");
  std::map<std::string, StateTensor> all;
  const int me = mesh_.world.rank();
  std::vector<float> piece;
  // The ranks, one after the other, tell rank 0 their segments in the plan's order.
  for (int r = 0; r < plan_.ranks; ++r) {
    if (me != 0 && me != r) continue;
    const auto segments = r == me ? std::vector<runtime::OwnSegment>() : segments_of(r);
    for (const runtime::OwnSegment& own : r == me ? own_ : segments) {
      if (plan_.buckets[own.bucket].held && r >= plan_.shard) continue;  // the first replica's
      const runtime::Group& g = plan_.groups[static_cast<std::size_t>(own.group)];
      const runtime::ParameterShape& p =
          plan_.parameters[static_cast<std::size_t>(own.segment.parameter)];
      const auto take = [&](std::string_view key, const MatrixView* mine, const Region& region,
                            std::vector<Index> shape) {
        const Index count = region.size();
        if (count == 0) return;
        piece.resize(static_cast<std::size_t>(count));
        if (mine != nullptr) {
          backend_->copy(mine->data, piece.data(), piece.size() * sizeof(float));
          backend_->wait();
        }
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
        const MatrixView* mine = r == me ? &own.state[k] : nullptr;
        kernels::DeviceBuffer room;
        MatrixView opened;
        if (mine != nullptr && k == 0 && g.compresses() && own.size() > 0) {
          room = kernels::DeviceBuffer(*backend_,
                                       static_cast<std::size_t>(own.size()) * sizeof(float));
          opened = matrix_view(static_cast<float*>(room.data()), own.rows, own.cols);
          open_momentum(own, runtime::whole(own), opened);
          mine = &opened;
        }
        if (!spec.of_matrix() || own.segment.matrix < 0) {
          take(spec.name, mine, own.region(), p.shape);
        } else if (runtime::saves_state(plan_, own, spec)) {
          Index lines = 0;
          for (const runtime::MatrixPlan& m : plan_.matrices) {
            if (m.parameter == own.segment.parameter) lines += spec.rows(m.rows, m.cols);
          }
          take(spec.name, mine, runtime::lines_region(plan_, own, spec), {lines});
        }
      }
      if (g.master) take("master", r == me ? &own.master : nullptr, own.region(), p.shape);
    }
  }
  if (me == 0) {
    for (std::size_t i = 0; i < plan_.parameters.size(); ++i) unpack_factors(plan_, i, all);
    for (const runtime::ParameterShape& p : plan_.parameters) {
      all["state/" + p.name + "/step"] = {{1}, {static_cast<float>(updates_)}};
    }
  }
  return all;
}

std::map<std::string, ShardedOptimizer::CodesTensor> ShardedOptimizer::Impl::gather_codes() {
  check_between_steps("gather_codes");
  std::map<std::string, CodesTensor> all;
  const int me = mesh_.world.rank();
  std::vector<std::byte> bytes;
  for (int r = 0; r < plan_.ranks; ++r) {
    if (me != 0 && me != r) continue;
    const auto theirs = r == me ? std::vector<runtime::OwnSegment>() : segments_of(r);
    for (const runtime::OwnSegment& own : r == me ? own_ : theirs) {
      const runtime::WeightFormat& format = plan_.buckets[own.bucket].weights;
      if (!format.quantized() || own.size() == 0) continue;
      bytes.resize(format.bytes(own.rows, own.cols));
      if (r == me) {
        const kernels::DeviceBuffer piece(*backend_, bytes.size());
        write_piece(own, piece.data());
        backend_->copy(piece.data(), bytes.data(), bytes.size());
        backend_->wait();
      } else {
        setup_.receive(Span{bytes.data(), std::ssize(bytes), DType::u8}, r);
      }
      if (me != 0) {
        setup_.send(ConstSpan{bytes.data(), std::ssize(bytes), DType::u8}, 0);
        continue;
      }
      const auto i = static_cast<std::size_t>(own.segment.parameter);
      const Grid& grid = *format.grid;
      const Index line = plan_.row_length[i];
      CodesTensor& whole = all[plan_.parameters[i].name];
      if (whole.codes.empty()) {
        whole = {grid, plan_.parameters[i].size() / line, line, {}, {}};
        whole.codes.resize(static_cast<std::size_t>(whole.rows * code_pitch(grid.format, line)));
        whole.scales.resize(static_cast<std::size_t>(format.scale_count(whole.rows, line)));
      }
      runtime::put_piece(format.view(bytes.data(), own.rows, own.cols), grid, own.region(),
                         format.view(whole.codes.data(), whole.scales.data(), whole.rows, line));
    }
  }
  return all;
}

// ---- the front door
// ------------------------------------------------------------------------------

ShardedOptimizer::ShardedOptimizer(const Config& config, Communicator comm,
                                   std::vector<Parameter> parameters, const DeviceChoice& device)
    : impl_(std::make_unique<Impl>(config, std::move(comm), std::move(parameters), device)) {}
ShardedOptimizer::ShardedOptimizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ShardedOptimizer::ShardedOptimizer(ShardedOptimizer&&) noexcept = default;
ShardedOptimizer& ShardedOptimizer::operator=(ShardedOptimizer&&) noexcept = default;
ShardedOptimizer::~ShardedOptimizer() = default;

int ShardedOptimizer::rank() const { return impl_->mesh_.world.rank(); }
int ShardedOptimizer::size() const { return impl_->mesh_.world.size(); }
void ShardedOptimizer::micro_batch(std::int64_t index) { impl_->gradients_->micro_batch(index); }
void ShardedOptimizer::gradient_ready(int id) { impl_->gradient_ready(id); }
const GradientNoise& ShardedOptimizer::noise(int id) const { return impl_->noise(id); }
std::span<const MatrixSpectra> ShardedOptimizer::spectra() const { return impl_->spectra(); }
bool ShardedOptimizer::wants_examples() const { return impl_->wants_examples(); }
void ShardedOptimizer::observe_examples(int id, ConstMatrixView gradients) {
  impl_->observe_examples(id, gradients);
}
bool ShardedOptimizer::wants_activations() const { return impl_->wants_activations(); }
void ShardedOptimizer::observe_activation(int id, ConstMatrixView activations) {
  impl_->observe_activation(id, activations);
}
const StepReport& ShardedOptimizer::step() { return impl_->step(); }
void ShardedOptimizer::parameter_wait(int) {}  // `step` returns with every weight in place
void ShardedOptimizer::gather(std::span<const int> ids) { impl_->gather_weights(ids); }
void ShardedOptimizer::release(std::span<const int> ids) { impl_->release_weights(ids); }
QuantizedView ShardedOptimizer::codes(int id) const { return impl_->codes(id); }
void* ShardedOptimizer::weights(int id) const {
  const auto i = static_cast<std::size_t>(id);
  if (impl_->plan_.parameters[i].as_codes) return nullptr;
  const bool gathered = impl_->working_set_ && !impl_->plan_.parameters[i].held();
  return gathered ? impl_->working_set_->weights(i) : impl_->mirrors_->trainers_weights(i);
}
void ShardedOptimizer::copy_weights(int id, void* to) const { impl_->copy_weights(id, to); }
std::int64_t ShardedOptimizer::steps() const { return impl_->steps_; }
void ShardedOptimizer::set_lr_multiplier(double factor) { impl_->set_lr_multiplier(factor); }
void ShardedOptimizer::save(const std::string& directory,
                            const std::map<std::string, std::string>& user) {
  impl_->save(directory, user);
}
std::map<std::string, std::string> ShardedOptimizer::load(const std::string& directory,
                                                          bool convert) {
  return impl_->load(directory, convert);
}
MemoryPlan ShardedOptimizer::memory() const {
  return impl_->plan_.per_rank[static_cast<std::size_t>(rank())].memory;
}
std::string ShardedOptimizer::plan_hash() const { return impl_->plan_.hash; }
std::string ShardedOptimizer::plan_json() const { return runtime::plan_json(impl_->plan_); }
std::map<std::string, ShardedOptimizer::StateTensor> ShardedOptimizer::gather_state() {
  return impl_->gather_state();
}
std::map<std::string, ShardedOptimizer::CodesTensor> ShardedOptimizer::gather_codes() {
  return impl_->gather_codes();
}

}  // namespace orthrus
