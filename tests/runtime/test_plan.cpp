// The plan: pure, complete, balanced, and free of padding.
#include <gtest/gtest.h>

#include <orthrus/error.hpp>

#include "runtime/plan.hpp"
#include "runtime/region.hpp"
#include "toy_model.hpp"

namespace orthrus::runtime {
namespace {

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

TEST(Plan, EveryElementIsInExactlyOneSegment) {
  Config config = parse_config(toy::muon_and_adamw);
  for (const std::int64_t bucket_bytes : {256, 4096, 1 << 26}) {
    config.comm.bucket_bytes = bucket_bytes;
    for (int ranks = 1; ranks <= 9; ++ranks) {
      const Plan plan = make_plan(config, toy_shapes(), ranks);
      std::vector<std::vector<int>> seen;
      for (const ParameterShape& p : plan.parameters)
        seen.emplace_back(static_cast<std::size_t>(p.size()));
      for (const Bucket& b : plan.buckets) {
        Index offset = 0;
        std::vector<Index> counts(static_cast<std::size_t>(plan.shard));
        for (const Segment& s : b.segments) {
          EXPECT_EQ(s.offset, offset) << "padding";
          offset += s.size();
          counts[static_cast<std::size_t>(s.rank)] += s.size();
          const Region& r = s.region;
          for (Index i = 0; i < r.rows; ++i) {
            for (Index j = 0; j < r.cols; ++j) {
              ++seen[static_cast<std::size_t>(s.parameter)]
                    [static_cast<std::size_t>(r.first + i * r.distance + j)];
            }
          }
        }
        EXPECT_EQ(offset, b.size);
        for (int r = 0; r < ranks; ++r) {
          EXPECT_EQ(counts[static_cast<std::size_t>(r)], b.count_of(plan.slot_of(r)));
        }
      }
      for (const auto& parameter : seen) {
        for (const int n : parameter) ASSERT_EQ(n, 1);
      }
    }
  }
}

TEST(Plan, LogicalMatricesAreTheFusedOnesTheConvolutionAndTheSplit) {
  const Config config = parse_config(R"(
schema: 1
groups:
  - {match: "qkv", rule: {name: muon}, split: {rows: 3}}
  - {match: "gate", rule: {name: muon}, split: {cols: [4, 6]}}
  - {match: "experts", rule: {name: muon}, split: {stack: true}}
  - {match: "*", rule: {name: muon}}
  - {match: "*", rule: {name: adamw}}
)");
  const Plan plan =
      make_plan(config,
                {shape("qkv", {12, 4}), shape("gate", {5, 10}), shape("experts", {3, 4, 7}),
                 shape("conv", {8, 3, 2, 2}), shape("bias", {12})},
                2);
  ASSERT_EQ(plan.matrices.size(), 3U + 2 + 3 + 1);
  EXPECT_EQ(plan.matrices[1].name, "qkv#1");
  EXPECT_EQ(plan.matrices[1].region, (Region{16, 4, 4, 4}));
  EXPECT_EQ(plan.matrices[4].region, (Region{4, 5, 6, 10}));
  EXPECT_EQ(plan.matrices[5].rows, 4);
  EXPECT_EQ(plan.matrices[5].cols, 7);
  EXPECT_EQ(plan.matrices[8].rows, 8);
  EXPECT_EQ(plan.matrices[8].cols, 12);
  EXPECT_EQ(plan.passed_over, std::vector<int>{4});
}

TEST(Plan, NamesAllParametersThatFallThrough) {
  const Config config =
      parse_config("schema: 1\ngroups:\n  - {match: \"*\", rule: {name: muon}}\n");
  try {
    (void)make_plan(config, {shape("w", {4, 4}), shape("b1", {4}), shape("b2", {4})}, 2);
    FAIL();
  } catch (const ConfigError& e) {
    EXPECT_NE(std::string(e.what()).find("'b1' [4] (matched by a matrix rule"), std::string::npos)
        << e.what();
    EXPECT_NE(std::string(e.what()).find("'b2' [4]"), std::string::npos) << e.what();
  }
}

TEST(Plan, RefusesWhatCannotBeRun) {
  const Config config = parse_config(toy::muon_and_adamw);
  const auto fails = [&](std::vector<ParameterShape> shapes, const std::string& why) {
    try {
      (void)make_plan(config, std::move(shapes), 1);
      ADD_FAILURE() << "accepted: " << why;
    } catch (const ConfigError& e) {
      EXPECT_NE(std::string(e.what()).find(why), std::string::npos) << e.what();
    }
  };
  fails({}, "no parameters");
  fails({shape("a", {2}), shape("a", {2})}, "used twice");
  fails({shape("state/a", {2})}, "reserved");
  fails({shape("a.codes", {2})}, "reserved");
  fails({shape("a", {0})}, "at least 1");
  auto overlapping = shape("a.weight", {4, 4});
  overlapping.views = {{0, 3, 0, 4}, {2, 2, 0, 4}};
  fails({overlapping}, "overlap");
  auto outside = shape("a.weight", {4, 4});
  outside.views = {{0, 5, 0, 4}};
  fails({outside}, "leaves the parameter");
  auto gap = shape("a.weight", {4, 4});
  gap.views = {{0, 3, 0, 4}};
  fails({gap}, "do not cover");
}

TEST(Plan, RefusesAMemoryCapThatNothingFitsAndNamesOneThatDoes) {
  Config config = parse_config(toy::muon_and_adamw);
  const Plan plan = make_plan(config, toy_shapes(), 2);
  std::int64_t most = 0;
  for (const RankPlan& r : plan.per_rank) most = std::max(most, r.memory.total());
  config.memory_cap = most;
  EXPECT_NO_THROW((void)make_plan(config, toy_shapes(), 2));
  // Below that other modes are tried, until none fits; then the smallest cap that does is named.
  config.memory_cap = 1000;
  try {
    (void)make_plan(config, toy_shapes(), 2);
    FAIL();
  } catch (const ConfigError& e) {
    const std::string what = e.what();
    config.memory_cap = std::stoll(what.substr(what.rfind(' ') + 1));
    EXPECT_LE(config.memory_cap, most);
    EXPECT_NO_THROW((void)make_plan(config, toy_shapes(), 2)) << what;
    --config.memory_cap;
    EXPECT_THROW((void)make_plan(config, toy_shapes(), 2), ConfigError) << what;
  }
}

TEST(Plan, OwnerModeSendsWhatZeroAdamWSends) {
  const std::string adamw = "schema: 1\ngroups:\n  - {match: \"*\", rule: {name: adamw}}\n";
  for (int ranks = 1; ranks <= 9; ++ranks) {
    std::int64_t bytes[2];
    for (const bool muon : {false, true}) {
      const Plan plan =
          make_plan(parse_config(muon ? toy::muon_and_adamw : adamw), toy_shapes(), ranks);
      Index control = 0;  // one number per group and more: not what travels with the model
      bytes[muon] = 0;
      for (const RankPlan& r : plan.per_rank) bytes[muon] += r.traffic.bytes;
      control = 2 * (ranks - 1) * (plan.control_before() + plan.control_after()) * 8;
      bytes[muon] -= control;
    }
    EXPECT_EQ(bytes[0], bytes[1]) << ranks;
    Index elements = 0;
    for (const ParameterShape& p : toy_shapes()) elements += p.size();
    EXPECT_EQ(bytes[0], 2 * (ranks - 1) * elements * 4) << "reduce-scatter and all-gather in f32";
  }
}

TEST(Plan, BalancesManyMatrices) {
  std::vector<ParameterShape> shapes;
  for (int l = 0; l < 24; ++l) {
    const std::string name = "l" + std::to_string(l) + ".";
    for (const char* m : {"q", "k", "v", "o"})
      shapes.push_back(shape(name + m + ".weight", {512, 512}));
    shapes.push_back(shape(name + "up.weight", {2048, 512}));
    shapes.push_back(shape(name + "down.weight", {512, 2048}));
    shapes.push_back(shape(name + "bias", {512}));
  }
  shapes.push_back(shape("embed", {30000, 512}));
  for (const int ranks : {2, 3, 8, 16}) {
    const Plan plan = make_plan(parse_config(toy::muon_and_adamw), shapes, ranks);
    EXPECT_LE(plan.imbalance, std::max(1.3, 1.05 * plan.load_bound)) << ranks;
    EXPECT_LE(plan.memory_imbalance, 1.3) << ranks;
  }
}

TEST(Plan, PromisesNoExchangeThatMpiCannotMake) {
  const Config config =
      parse_config(toy::muon_and_adamw + std::string("reproducible: {virtual_shards: 64}\n"),
                   "config", std::vector<std::string>{"groups.0.matrix.mode=owner"});
  try {
    (void)make_plan(config, {shape("wte.weight", {50304, 768})}, 64);
    FAIL();
  } catch (const ConfigError& e) {
    EXPECT_NE(std::string(e.what()).find("'wte.weight'"), std::string::npos) << e.what();
  }
}

// Terms of a rational matrix that is the model's only one: bytes, messages and flops by hand.
TEST(Plan, SharesTheTermsOfALoneMatrixWhereThatIsFaster) {
  MachineProfile dear;
  dear.node.any = {0, {{1, 1}}};
  for (const int terms : {2, 3, 4}) {
    const Config config = parse_config(
        "schema: 1\ngroups:\n  - {match: w*, rule: {name: muon}, matrix: {mode: gram}, lmo: "
        "{coefficients: rational, terms: " +
        std::to_string(terms) + "}}\n  - {match: '*', rule: {name: adamw}}\n");
    const auto plan_of = [&](const MachineProfile& profile, int ranks,
                             std::vector<ParameterShape> shapes) {
      return make_plan(config, std::move(shapes), ranks, profile);
    };
    const std::vector<ParameterShape> one{shape("w", {300, 700}), shape("b", {999})};
    for (int ranks = 1; ranks <= 6; ++ranks) {
      const Plan shared = plan_of({}, ranks, one);
      const Plan apart = plan_of(dear, ranks, one);
      EXPECT_EQ(shared.matrices[0].shared_terms, ranks > 1 ? terms : 0);
      EXPECT_EQ(apart.matrices[0].shared_terms, 0);
      EXPECT_EQ(shared.hash == apart.hash, ranks == 1);
      int all = 0;
      for (int w = 0; w < ranks; ++w) {
        const RankPlan& a = shared.per_rank[static_cast<std::size_t>(w)];
        const RankPlan& b = apart.per_rank[static_cast<std::size_t>(w)];
        const int own = ranks == 1 ? terms : terms / ranks + (w < terms % ranks ? 1 : 0);
        all += own;
        EXPECT_EQ(a.traffic.bytes - b.traffic.bytes, (terms - own) * 300 * 301 / 2 * 4);
        EXPECT_EQ(a.traffic.messages - b.traffic.messages, ranks > 1 ? 1 : 0);
        EXPECT_DOUBLE_EQ(b.flops - a.flops, (terms - own) * 300.0 * 300.0 * 300.0);
      }
      EXPECT_EQ(all, terms);
      const int most = (terms + ranks - 1) / ranks;
      EXPECT_DOUBLE_EQ(shared.matrices[0].seconds, most * inverse_seconds({}, 300));
      // Sixteen rows are inverted before a message has left.
      EXPECT_EQ(plan_of({}, ranks, {shape("w", {16, 700})}).matrices[0].shared_terms, 0);
      const Plan two = plan_of({}, ranks, {shape("w1", {300, 700}), shape("w2", {300, 700})});
      for (const MatrixPlan& m : two.matrices) EXPECT_EQ(m.shared_terms, 0);
    }
  }
}

TEST(Plan, SharesNoTermsWhereTheCapHasNoRoomForThem) {
  Config config = parse_config(
      "schema: 1\ngroups: [{match: '*', rule: {name: muon}, matrix: {mode: gram}, lmo: "
      "{coefficients: rational, terms: 4}}]\n");
  const auto most = [](const Plan& plan) {
    std::int64_t bytes = 0;
    for (const RankPlan& r : plan.per_rank) bytes = std::max(bytes, r.memory.total());
    return bytes;
  };
  const Plan shared = make_plan(config, {shape("w", {500, 500})}, 3);
  EXPECT_EQ(shared.matrices[0].shared_terms, 4);
  config.memory_cap = most(shared) - 1;
  const Plan capped = make_plan(config, {shape("w", {500, 500})}, 3);
  EXPECT_EQ(capped.matrices[0].shared_terms, 0);
  EXPECT_LT(most(capped), most(shared));
}

TEST(Plan, IsAFunctionOfItsInput) {
  const Config config = parse_config(toy::muon_and_adamw);
  EXPECT_EQ(make_plan(config, toy_shapes(), 3).hash, make_plan(config, toy_shapes(), 3).hash);
  EXPECT_NE(make_plan(config, toy_shapes(), 3).hash, make_plan(config, toy_shapes(), 4).hash);
  Config other = config;
  other.groups[0].lmo.iterations = 6;
  EXPECT_NE(make_plan(config, toy_shapes(), 3).hash, make_plan(other, toy_shapes(), 3).hash);
}

}  // namespace
}  // namespace orthrus::runtime
