// The timeline: closed forms on a machine of constant rates, and what holds of any.
#include <gtest/gtest.h>

#include <map>
#include <orthrus/config.hpp>

#include "runtime/timeline.hpp"
#include "toy_model.hpp"

namespace orthrus::runtime {
namespace {

constexpr double pass_rate = 2e9;

/// Every rate the same at any size; all ranks on one node.
MachineProfile constant_machine(double latency_s, double link_rate) {
  MachineProfile p;
  for (ProductRates* rates : {&p.f32, &p.bf16, &p.f64}) *rates = {{{1, 1e10}}, {{1, 1e10}}};
  p.pass = {{1, pass_rate}};
  p.node = p.network = {{latency_s, {{1, link_rate}}}, {}};
  return p;
}

/// Nodes of `ranks` whose network is slow.
MachineProfile cluster(int ranks) {
  MachineProfile p = constant_machine(1e-6, 1e9);
  p.ranks_per_node = ranks;
  p.network = {{1e-5, {{1, 1e8}}}, {}};
  return p;
}

std::vector<ParameterShape> toy_shapes() {
  const toy::Model model;
  std::vector<ParameterShape> shapes;
  for (const Parameter& p : model.parameters) shapes.push_back(shape_of(p));
  return shapes;
}

ParameterShape shape(std::string name, std::vector<Index> dims) {
  ParameterShape p;
  p.name = std::move(name);
  p.shape = std::move(dims);
  return p;
}

struct Case {
  std::string what;
  Plan plan;
};

/// Plans that walk every part of a step. Configs outlive the plans that point into them.
class AnyTimeline : public testing::Test {
 protected:
  void SetUp() override {
    for (const char* mode : {"owner", "exchange", "gather", "gram", "gram_steps", "block_local"}) {
      for (const int ranks : {1, 2, 3, 4})
        add({mode, std::to_string(ranks)}, ranks, {mode_of(mode)});
      add({mode, "on 2 x 2"}, 4, {mode_of(mode), "mesh.replicate=2"});
      add({mode, "on 2 x 2 x 2"}, 8, {mode_of(mode), "mesh.replicate=2", "mesh.node=2"});
      add({mode, "ZeRO-3"}, 4, {mode_of(mode), "zero.stage=3", "mesh.node=2"});
    }
    add({"periodic"}, 3, {mode_of("periodic"), "groups.0.matrix.period=2"});
    for (const char* mode :
         {"exchange", "gather", "gram", "gram_steps", "block_local", "periodic"}) {
      for (const int stage : {2, 3}) {
        add({mode, "ECO"}, 4,
            {mode_of(mode), "groups.0.weights.format=fp8_e4m3",
             "groups.0.weights.residual=momentum", "zero.stage=" + std::to_string(stage),
             "mesh.replicate=2"});
      }
    }
    add({"bf16"}, 3,
        {mode_of("exchange"), "groups.0.matrix.wire=bf16", "groups.0.matrix.accuracy=fast",
         "comm.gradient_dtype=bf16", "groups.0.weights.format=bf16"});
    add({"micro-batches"}, 3, {"train.micro_batches=3"});
    add({"micro-batches, stage 1"}, 3, {"train.micro_batches=3", "zero.stage=1"});
    for (const int ranks : {2, 3, 4}) {
      add({"shared terms", std::to_string(ranks)}, ranks,
          {mode_of("gram"), "groups.0.lmo.coefficients=rational"},
          {shape("a", {50}), shape("lone.weight", {500, 600}), shape("b", {50})});
      EXPECT_EQ(cases_.back().plan.matrices.front().shared_terms, 3);
    }
    add({"reproducible"}, 3, {"reproducible.virtual_shards=7"});
    add({"more ranks than leaves"}, 4, {"reproducible.virtual_shards=3"});
  }

  static std::string mode_of(const std::string& mode) { return "groups.0.matrix.mode=" + mode; }

  void add(const std::vector<std::string>& what, int ranks, std::vector<std::string> set,
           std::vector<ParameterShape> shapes = toy_shapes()) {
    set.emplace_back("comm.bucket_bytes=3000");
    configs_.push_back(std::make_unique<Config>(parse_config(toy::muon_and_adamw, "config", set)));
    std::string name;
    for (const std::string& w : what) name += w + " ";
    cases_.push_back({name, make_plan(*configs_.back(), std::move(shapes), ranks, machine_)});
  }

  /// f(plan, timeline, what) of every plan under every way calls may overlap.
  template <class F>
  void for_each(F&& f) {
    for (const Case& c : cases_) {
      for (const char* how : {"overlapping", "in turn", "blocking"}) {
        for (const double backward_s : {0.0, 1e-4}) {
          TimelineOptions options;
          options.progress = how == std::string("overlapping");
          options.blocking = how == std::string("blocking");
          options.backward_s = backward_s;
          options.ranks_shown = c.plan.ranks;
          const std::string what = c.what + how + (backward_s > 0 ? ", backward" : "");
          f(c.plan, make_timeline(c.plan, machine_, options), what);
        }
      }
    }
  }

  MachineProfile machine_ = cluster(2);
  std::vector<std::unique_ptr<Config>> configs_;
  std::vector<Case> cases_;
};

TEST_F(AnyTimeline, SendsWhatThePlanSends) {
  for_each([](const Plan& plan, const Timeline& t, const std::string& what) {
    std::vector<std::int64_t> sent(static_cast<std::size_t>(plan.ranks), 0);
    for (const TimelineEvent& e : t.events) sent[static_cast<std::size_t>(e.rank)] += e.bytes;
    std::int64_t all = 0;
    for (std::size_t w = 0; w < sent.size(); ++w) {
      EXPECT_EQ(sent[w], plan.per_rank[w].traffic.bytes) << what << ", rank " << w;
      all += sent[w];
    }
    std::int64_t phases = 0;
    for (const std::int64_t bytes : t.bytes_sent) phases += bytes;
    EXPECT_EQ(phases, all) << what;
  });
}

TEST_F(AnyTimeline, ComputesWhatThePlanComputesAndCopies) {
  for_each([](const Plan& plan, const Timeline& t, const std::string& what) {
    for (std::size_t w = 0; w < t.ranks.size(); ++w) {
      double planned = 0;
      for (const Phase phase : {Phase::update, Phase::lmo, Phase::meet}) {
        planned += t.ranks[w][static_cast<std::size_t>(phase)].compute;
      }
      // Sums of the same numbers in another order.
      EXPECT_NEAR(planned, plan.per_rank[w].seconds, 1e-12 + 1e-9 * planned)
          << what << ", rank " << w;
    }
  });
}

TEST_F(AnyTimeline, DoesOneThingAtATimeOnEveryLane) {
  for_each([](const Plan&, const Timeline& t, const std::string& what) {
    constexpr double rounding = 1e-12;
    const TimelineEvent* last = nullptr;
    for (const TimelineEvent& e : t.events) {
      EXPECT_LE(e.start, e.end) << what;
      EXPECT_GE(e.start, -rounding) << what;
      EXPECT_LE(e.end, t.seconds + rounding) << what;
      if (last != nullptr && last->rank == e.rank && last->lane == e.lane) {
        EXPECT_GE(e.start, last->end - rounding)
            << what << ": " << name_of(e.phase) << " after " << name_of(last->phase);
      }
      last = &e;
    }
  });
}

TEST_F(AnyTimeline, LeavesNoTimeOfARankUnexplained) {
  for_each([](const Plan& plan, const Timeline& t, const std::string& what) {
    for (int w = 0; w < plan.ranks; ++w) {
      const PhaseTime all = t.total(w);
      // The audit ends on all ranks at once.
      EXPECT_NEAR(all.compute + all.exposed + all.waiting, t.seconds, 1e-9) << what;
      EXPECT_GE(all.hidden(), -1e-12) << what;
      if (!t.progress) {
        EXPECT_NEAR(all.hidden(), 0, 1e-12) << what;
      }
      EXPECT_LE(all.compute, t.seconds + 1e-12) << what;
      double events = 0;
      for (const TimelineEvent& e : t.events) {
        if (e.rank == w && e.lane == Lane::compute) events += e.end - e.start;
      }
      EXPECT_NEAR(events, all.compute, 1e-9) << what;
    }
  });
}

TEST_F(AnyTimeline, IsAFunctionOfThePlan) {
  for_each([this](const Plan& plan, const Timeline& t, const std::string& what) {
    TimelineOptions options;
    options.ranks_shown = 2;
    const Timeline a = make_timeline(plan, machine_, options);
    const Timeline b = make_timeline(plan, machine_, options);
    EXPECT_EQ(a.seconds, b.seconds) << what;
    EXPECT_EQ(a.events, b.events) << what;
    EXPECT_EQ(a.bytes_sent, t.bytes_sent) << what;
  });
}

TEST(Timeline, OfOneRankIsTheSumOfItsParts) {
  const MachineProfile machine = constant_machine(1e-6, 1e9);
  const Config config = parse_config(toy::muon_and_adamw);
  const Plan plan = make_plan(config, {shape("a.weight", {64, 96})}, 1, machine);
  const double n = 64 * 96;
  // Gradients packed, copied by the reduce-scatter and divided; norms read; weights taken before
  // and given back after the update, which is the plan's.
  const double copies = (8 + 8 + 8 + 4 + 8 + 8) * n / pass_rate;
  const Timeline t = make_timeline(plan, machine);
  EXPECT_NEAR(t.seconds, plan.per_rank[0].seconds + copies, 1e-12);
  EXPECT_EQ(t.busiest, 0);
}

TEST(Timeline, OverlapHidesTheLesserOfTwo) {
  // Three buckets of one parameter each: as many as there are buffers, so that none waits for one.
  const Config config = parse_config(
      "schema: 1\ncomm: {bucket_bytes: 4096}\ngroups: [{match: '*', rule: {name: adamw}}]\n");
  MachineProfile machine = constant_machine(0, 1e8);
  machine.pass = {{1, 1e30}};
  const Plan plan =
      make_plan(config, {shape("a", {1024}), shape("b", {1024}), shape("c", {1024})}, 2, machine);
  ASSERT_EQ(plan.buckets.size(), 3U);
  const auto seconds = [&](bool progress, double backward_s) {
    TimelineOptions options;
    options.progress = progress;
    options.backward_s = backward_s;
    return make_timeline(plan, machine, options).seconds;
  };
  const double call = 4096 / 1e8;  // of one bucket: one rank sends all of it
  for (const double share : {0.1, 0.5, 1.0, 2.0, 10.0}) {
    const double backward = 3 * share * call;
    // Only the first bucket's backward and the last one's call have nothing beside them.
    EXPECT_NEAR(seconds(false, backward) - seconds(true, backward),
                2 * std::min(share * call, call), 1e-12)
        << share;
  }
}

TEST(Timeline, LetsNoOwnerHoldUpAnother) {
  // Four buckets of one matrix each, on four ranks, and two buffers for their new weights.
  const Config config = parse_config(
      "schema: 1\ncomm: {bucket_bytes: 4096}\n"
      "groups: [{match: '*', rule: {name: muon}, matrix: {mode: owner}}]\n");
  MachineProfile machine = constant_machine(0, 1e15);
  machine.pass = {{1, 1e30}};
  const Plan plan = make_plan(
      config,
      {shape("a", {32, 32}), shape("b", {32, 32}), shape("c", {32, 32}), shape("d", {32, 32})}, 4,
      machine);
  ASSERT_EQ(plan.buckets.size(), 4U);
  const double lmo = msign_seconds(machine, 32, 32, 5, DType::f32);
  for (const bool progress : {false, true}) {
    TimelineOptions options;
    options.progress = progress;
    EXPECT_NEAR(make_timeline(plan, machine, options).seconds, lmo, 1e-3 * lmo) << progress;
  }
}

/// Seconds of the optimizer's step on two ranks that exchange `matrices` matrices of 4096 bytes,
/// but for the control messages; with the seconds of half a matrix's way and of an LMO.
struct Exchanged {
  double seconds, half, lmo;
};
Exchanged exchange_on_two_ranks(int matrices, int bucket_bytes, int buckets) {
  const Config config =
      parse_config("schema: 1\ncomm: {bucket_bytes: " + std::to_string(bucket_bytes) +
                   "}\ngroups: [{match: '*', rule: {name: muon}, matrix: {mode: exchange}}]\n");
  MachineProfile machine = constant_machine(0, 1e8);
  machine.pass = {{1, 1e30}};
  std::vector<ParameterShape> shapes;
  for (int i = 0; i < matrices; ++i) shapes.push_back(shape(std::to_string(i), {32, 32}));
  const Plan plan = make_plan(config, std::move(shapes), 2, machine);
  EXPECT_EQ(std::ssize(plan.buckets), buckets);
  TimelineOptions options;
  options.progress = true;
  const Timeline t = make_timeline(plan, machine, options);
  double seconds = t.seconds;
  for (const Phase phase : {Phase::control, Phase::audit}) {
    seconds -= t.ranks[0][static_cast<std::size_t>(phase)].exposed;
  }
  const Exchanged found{seconds, 2048 / 1e8, msign_seconds(machine, 32, 32, 5, DType::f32)};
  EXPECT_GT(found.lmo, found.half);
  return found;
}

TEST(Timeline, ComputesOneMatrixWhileAnotherTravels) {
  // A matrix per rank and bucket: each is a wave. Two reductions of 8192 bytes, of which a rank
  // sends half; the pieces of the first bucket; its LMOs beside the second's pieces, the second's
  // beside what comes back; that of the second; then the weights of both.
  const Exchanged t = exchange_on_two_ranks(4, 8192, 2);
  EXPECT_NEAR(t.seconds, 4 * t.half + t.half + 2 * t.lmo + t.half + 4 * t.half, 1e-12);
}

TEST(Timeline, ComputesMatricesOfSeveralBucketsAtOnce) {
  // A matrix per bucket. Reductions, all pieces, both LMOs at the same time, both directions back,
  // and the weights.
  const Exchanged t = exchange_on_two_ranks(2, 4096, 2);
  EXPECT_NEAR(t.seconds, 2 * t.half + 2 * t.half + t.lmo + 2 * t.half + 2 * t.half, 1e-12);
}

TEST(Timeline, KeepsEveryRankComputingThroughManyWaves) {
  // Links and passes that cost nothing, and a matrix per bucket: all that is left is computing.
  MachineProfile machine = constant_machine(0, 1e30);
  machine.pass = {{1, 1e30}};
  for (const char* mode : {"exchange", "gram", "owner"}) {
    const Config config = parse_config(
        "schema: 1\ncomm: {bucket_bytes: 1}\ngroups: [{match: '*', rule: {name: muon}, matrix: "
        "{mode: " +
        std::string(mode) + "}}]\n");
    for (const int ranks : {2, 4, 8, 16}) {
      for (const bool equal : {true, false}) {
        std::vector<ParameterShape> shapes;
        for (int i = 0; i < 12 * ranks; ++i) {
          shapes.push_back(shape(std::to_string(i), {equal || i % 3 == 0 ? 64 : 32, 96}));
        }
        const Plan plan = make_plan(config, std::move(shapes), ranks, machine);
        double busiest = 0;
        for (const RankPlan& r : plan.per_rank) busiest = std::max(busiest, r.seconds);
        for (const bool progress : {false, true}) {
          TimelineOptions options;
          options.progress = progress;
          const double seconds = make_timeline(plan, machine, options).seconds;
          // Equal matrices: nobody waits. Else a rank may wait for the end of a wave, of which
          // there are about five, each two matrices long on every rank.
          EXPECT_LE(seconds, (equal ? 1.001 : 1.3) * busiest)
              << mode << ", " << ranks << " ranks, " << (equal ? "equal" : "mixed");
        }
      }
    }
  }
}

TEST(Timeline, UsesTheLinksOfItsLevels) {
  const MachineProfile machine = cluster(4);
  const Config config =
      parse_config(toy::muon_and_adamw, "config", std::vector<std::string>{"mesh.node=4"});
  const Plan plan = make_plan(config, toy_shapes(), 8, machine);
  std::map<Lane, double> reduced;
  TimelineOptions options;
  options.ranks_shown = 1;
  const Timeline t = make_timeline(plan, machine, options);
  EXPECT_TRUE(t.progress) << "the profile has nodes";
  ASSERT_EQ(t.shown.size(), 1U);
  for (const TimelineEvent& e : t.events) {
    if (e.phase == Phase::reduce && e.lane != Lane::compute) reduced[e.lane] += e.end - e.start;
  }
  EXPECT_GT(reduced[Lane::node], 0);
  EXPECT_GT(reduced[Lane::network], 0);
}

}  // namespace
}  // namespace orthrus::runtime
