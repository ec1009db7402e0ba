// The runtime on simulated ranks: every rank of this program is ShardedOptimizer over comm's mpi
// body on SimGrid's SMPI. Only products and passes are not computed, but timed by a machine
// profile. Every rank checks what each step sent, as the runtime counts it and as the arguments of
// the MPI calls say, against the plan; rank 0 prints one line of JSON.
//
// smpi_ranks PROFILE LAYERS WIDTH VOCABULARY whole|shards STEPS [key.path=value ...]
//   shards: the trainer holds rows of every matrix, and their mean gradient
#include <mpi.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <orthrus/orthrus.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/plan.hpp"
#include "runtime/plan_steps.hpp"
#include "smpi/rank_clock.hpp"
#include "smpi/simulated_ranks.hpp"
#include "support/pmpi_counter.hpp"

namespace orthrus::smpi {
namespace {

const char* const base_config = R"(
schema: 1
comm: {blocking: true}
groups:
  - {match: "*.weight", rule: {name: muon, lr: 0.02}}
  - {match: "*", rule: {name: adamw, lr: 0.001}}
)";

/// The tensors of a GPT. Their buffers are never touched, and cost address space only.
class Model {
 public:
  Model(Index layers, Index width, Index vocabulary, bool shards) : shards_(shards) {
    add("embedding", {vocabulary, width});
    for (Index l = 0; l < layers; ++l) {
      const std::string block = "block" + std::to_string(l) + ".";
      add(block + "norm1", {width});
      add(block + "qkv.weight", {3 * width, width});
      for (Index k = 0; k < 3; ++k) {
        parameters.back().views.push_back({k * width, width, 0, width});
      }
      add(block + "proj.weight", {width, width});
      add(block + "norm2", {width});
      add(block + "up.weight", {4 * width, width});
      add(block + "down.weight", {width, 4 * width});
    }
    add("norm", {width});
  }

  std::vector<Parameter> parameters;

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  void* zeros(Index elements) {
    buffers_.emplace_back(std::calloc(static_cast<std::size_t>(elements), sizeof(float)));
    if (buffers_.back() == nullptr) throw std::bad_alloc();
    return buffers_.back().get();
  }
  void add(std::string name, std::vector<Index> shape) {
    Parameter p;
    p.name = std::move(name);
    p.shape = std::move(shape);
    Index size = 1;
    for (const Index n : p.shape) size *= n;
    if (shards_ && p.shape.size() > 1) {
      p.sharding.along = Sharding::Along::rows;
      p.gradient_state = GradientState::shard;
    }
    p.weights = zeros(size);  // a shard has room in it
    p.gradient = zeros(size);
    parameters.push_back(std::move(p));
  }

  bool shards_;
  std::vector<std::unique_ptr<void, Free>> buffers_;
};

/// What the plan promises of one rank, per step.
struct Promise {
  std::int64_t bytes = 0, messages = 0, matrices = 0;
  friend bool operator==(const Promise&, const Promise&) = default;
};
static_assert(sizeof(Promise) == 3 * sizeof(std::int64_t));

/// What rank 0 knows of the plan.
struct Outlook {
  std::vector<Promise> promises;  ///< of every rank in step 1, then in step 2, …
  double compute_s = 0;           ///< of the rank with most, on the machine of the profile
  std::string modes;
  std::size_t buckets = 0;
};

Outlook look_ahead(const Config& config, const std::vector<Parameter>& parameters, int ranks,
                   std::int64_t steps, const runtime::MachineProfile& profile) {
  std::vector<runtime::ParameterShape> shapes;
  for (const Parameter& p : parameters) shapes.push_back(runtime::shape_of(p));
  runtime::Plan plan = runtime::make_plan(config, std::move(shapes), ranks);
  Outlook outlook;
  outlook.buckets = plan.buckets.size();
  for (std::int64_t step = 1; step <= steps; ++step) {
    for (const runtime::RankPlan& r : plan.per_rank) {
      const Traffic traffic = r.traffic_of(step);
      outlook.promises.push_back({traffic.bytes, traffic.messages, r.matrices_of(step)});
    }
  }
  std::set<std::string> modes;
  for (const runtime::MatrixPlan& m : plan.matrices) modes.emplace(optim::name_of(m.mode));
  for (const std::string& mode : modes) outlook.modes += (outlook.modes.empty() ? "" : "+") + mode;
  // The runtime plans for the default machine; the same plan's seconds on this one.
  for (runtime::MatrixPlan& m : plan.matrices) {
    const runtime::Group& g = plan.group(m.parameter);
    m.seconds = m.mode == optim::Mode::owner
                    ? runtime::lmo_seconds(profile, g, m.rows, m.cols) +
                          runtime::pass_seconds(profile, runtime::pass_bytes(g) *
                                                             static_cast<double>(m.rows * m.cols))
                    : runtime::compute_seconds(plan, profile, m);
  }
  runtime::predict(profile, plan);
  for (const runtime::RankPlan& r : plan.per_rank) {
    outlook.compute_s = std::max(outlook.compute_s, r.seconds);
  }
  return outlook;
}

/// Steps, checked. @return how many things were not as promised, on this rank.
int take_steps(ShardedOptimizer& optimizer, const Config& config, std::size_t parameters,
               const std::vector<Promise>& promises) {
  int wrong = 0;
  const auto check = [&](std::int64_t step, const char* who, const Promise& found) {
    const Promise& promised = promises[static_cast<std::size_t>(step - 1)];
    if (found == promised) return;
    ++wrong;
    std::fprintf(stderr,
                 "rank %d, step %lld, %s: %lld bytes in %lld messages, %lld matrices; the plan: "
                 "%lld, %lld, %lld\n",
                 optimizer.rank(), static_cast<long long>(step), who,
                 static_cast<long long>(found.bytes), static_cast<long long>(found.messages),
                 static_cast<long long>(found.matrices), static_cast<long long>(promised.bytes),
                 static_cast<long long>(promised.messages),
                 static_cast<long long>(promised.matrices));
  };
  for (std::int64_t s = 1; s <= std::ssize(promises); ++s) {
    pmpi::reset();
    for (std::int64_t k = 0; k < config.train.micro_batches; ++k) {
      optimizer.micro_batch(k);
      for (std::size_t id = parameters; id-- > 0;) optimizer.gradient_ready(static_cast<int>(id));
    }
    const StepReport& report = optimizer.step();
    const pmpi::Sent sent = pmpi::read();
    check(s, "as reported", {report.bytes_sent, report.messages, report.matrices});
    check(s, "of MPI's arguments", {sent.bytes, sent.messages, report.matrices});
    if (report.skipped) {
      ++wrong;
      std::fprintf(stderr, "step %lld was skipped: %s\n", static_cast<long long>(s),
                   report.skip_reason.c_str());
    }
  }
  return wrong;
}

int run(int argc, char** argv) {
  if (argc < 7) {
    std::fprintf(
        stderr,
        "usage: smpi_ranks PROFILE LAYERS WIDTH VOCABULARY whole|shards STEPS [key=value]\n");
    return 64;
  }
  int rank = 0;
  int ranks = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  RankClock& clock = rank_clock();
  clock.profile = runtime::load_profile(argv[1]);
  Model model(std::atoll(argv[2]), std::atoll(argv[3]), std::atoll(argv[4]),
              std::string_view(argv[5]) == "shards");
  const std::int64_t steps = std::atoll(argv[6]);
  const Config config =
      parse_config(base_config, "smpi", std::vector<std::string>(argv + 7, argv + argc));

  Outlook outlook;
  if (rank == 0) outlook = look_ahead(config, model.parameters, ranks, steps, clock.profile);
  std::vector<Promise> promises(static_cast<std::size_t>(steps));
  for (std::size_t s = 0; s < promises.size(); ++s) {
    const Promise* all =
        rank == 0 ? &outlook.promises[s * static_cast<std::size_t>(ranks)] : nullptr;
    MPI_Scatter(all, 3, MPI_INT64_T, &promises[s], 3, MPI_INT64_T, 0, MPI_COMM_WORLD);
  }

  ShardedOptimizer optimizer{config, simulated_world(), model.parameters};
  clock.owed_s = clock.computed_s = clock.modelled_s = 0;
  MPI_Barrier(MPI_COMM_WORLD);
  const double begin = MPI_Wtime();
  std::array<std::int64_t, 1> wrong{
      take_steps(optimizer, config, model.parameters.size(), promises)};
  clock.show();
  const double all = static_cast<double>(steps);
  std::array<double, 3> most{(MPI_Wtime() - begin) / all, clock.computed_s / all,
                             clock.modelled_s / all};
  std::array<std::int64_t, 3> sums{promises.front().bytes, promises.front().messages, wrong[0]};
  MPI_Allreduce(MPI_IN_PLACE, most.data(), 3, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  MPI_Allreduce(MPI_IN_PLACE, sums.data(), 3, MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD);
  if (rank == 0) {
    std::printf(
        "{\"ranks\": %d, \"modes\": \"%s\", \"buckets\": %zu, \"bytes\": %lld, \"messages\": %lld, "
        "\"simulated_s\": %.17g, \"model_s\": %.17g, \"verbs_s\": %.17g, \"plan_s\": %.17g, "
        "\"wrong\": %lld}\n",
        ranks, outlook.modes.c_str(), outlook.buckets, static_cast<long long>(sums[0]),
        static_cast<long long>(sums[1]), most[0], most[2] + outlook.compute_s, most[1],
        outlook.compute_s, static_cast<long long>(sums[2]));
  }
  return sums[2] == 0 ? 0 : 1;
}

}  // namespace
}  // namespace orthrus::smpi

int main(int argc, char** argv) {
  // SMPI gives MPI_THREAD_SINGLE whatever is asked for. One thread is all Orthrus calls MPI from.
  int provided = MPI_THREAD_SINGLE;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  int status = 1;
  try {
    status = orthrus::smpi::run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  MPI_Finalize();
  return status;
}
