// `diagnostics.advisor`: steps change between spectral and Euclidean, at checkpoints and nowhere
// else.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <orthrus/error.hpp>

#include "geometry_run.hpp"
#include "runtime/plan.hpp"

namespace orthrus {
namespace {

using testing::HasSubstr;
using namespace geometry;

/// The factor, against the momentum that the look which decided has seen.
void expect_euclidean(const Model& model, const Layout& layout) {
  const double clipped = std::string(layout.group).find("clip_norm") != std::string::npos
                             ? model.gradient_norm / 0.5
                             : 1;
  EXPECT_NEAR(model.seen().euclidean * layout.gradient / clipped,
              1 / (1 - std::pow(kBeta, kDecided - 1)), layout.tolerance);
}

TEST(Geometry, ChangesWhereACheckpointIsDueInEveryMode) {
  const auto path = directory();
  for (const Layout& layout :
       {Layout{1}, Layout{2}, Layout{4, "zero: {stage: 3}\n"}, Layout{4, "mesh: {replicate: 2}\n"},
        Layout{2, "comm: {bucket_bytes: 600}\n"}, Layout{3, "", ", matrix: {mode: exchange}"},
        Layout{3, "", ", matrix: {mode: gather}"}, Layout{3, "", ", matrix: {mode: gram}"},
        Layout{3, "", ", matrix: {mode: gram_steps}"},
        Layout{2, "", ", matrix: {mode: block_local}"},
        Layout{2, "", ", matrix: {mode: periodic, period: 3}"},
        Layout{4, "mesh: {replicate: 2}\n", ", matrix: {mode: gram}"},
        // Of what clipping has left of X: f takes it back.
        Layout{2, "", ", clip_norm: 0.5"},
        // Where Gram matrices are made of 2^e·X.
        Layout{3, "", ", matrix: {mode: gram}", 0x1p-50},
        Layout{3, "", ", matrix: {mode: gram_steps}", 0x1p-50},
        Layout{3, "", " , coefficients: rational}, matrix: {mode: gram}"},
        // What comes back is rounded to bf16; codes are of a 127th of the largest of their block,
        // and the nuclear norm counts what that adds in all 12 directions.
        Layout{3, "", ", matrix: {mode: exchange, wire: bf16, accuracy: fast}", 1, 0x1p-8},
        Layout{2, "", ", state: {momentum: int8}", 1, 5e-2}}) {
    SCOPED_TRACE(std::to_string(layout.ranks) + " ranks, " + layout.text + layout.group + " x " +
                 std::to_string(layout.gradient));
    run_thread_ranks(layout.ranks, [&](Communicator& comm) {
      Model reports(layout, "report", comm), chooses(layout, "auto", comm);
      const auto both = [&](int count) {
        reports.steps(count);
        chooses.steps(count);
      };
      both(kDecided - 3);
      if (comm.rank() == 0) std::filesystem::remove_all(path);
      comm.barrier();
      chooses.optimizer->save((path / "early").string());
      both(3);
      EXPECT_EQ(chooses.seen().advice, studies::GeometryAdvisor::Advice::euclidean);
      EXPECT_EQ(chooses.w_flat, reports.w_flat) << "not before a checkpoint is due";
      const auto at = chooses.w_flat;
      both(1);
      expect_step(chooses, at, euclidean_step(kDecided + 1, kDecided), layout.tolerance);
      EXPECT_LT(chooses.matrices, reports.matrices);
      EXPECT_EQ(chooses.w_round, reports.w_round) << "the other goes on";
      chooses.optimizer->save((path / "late").string());
      both(1);
      expect_euclidean(chooses, layout);
      // Whenever it was saved: who loads goes on so, on these ranks with the same bits.
      for (const auto& [name, steps] : {std::pair{"early", 5}, std::pair{"late", 1}}) {
        Model loads(layout, "auto", comm);
        loads.load((path / name).string());
        loads.steps(steps);
        EXPECT_EQ(loads.w_flat, chooses.w_flat) << name;
        EXPECT_EQ(loads.w_round, chooses.w_round) << name;
        EXPECT_EQ(loads.seen().euclidean, chooses.seen().euclidean) << name;
      }
    });
  }
  std::filesystem::remove_all(path);
}

TEST(Geometry, OfACheckpointIsThatOfAnyRanksThatLoadIt) {
  const auto path = directory();
  for (const int ranks : {2, 1, 3, 4}) {
    run_thread_ranks(ranks, [&](Communicator& comm) {
      Model model({ranks}, "auto", comm);
      if (ranks == 2) {
        model.steps(kDecided);
        model.optimizer->save(path.string());
      } else {
        model.load(path.string());
      }
      const auto at = model.w_flat;
      model.step();
      expect_step(model, at, euclidean_step(kDecided + 1, kDecided), 1e-5);
    });
  }
  // Who does not ask for it takes spectral steps.
  run_thread_ranks(1, [&](Communicator& comm) {
    Model model({1}, "report", comm);
    model.load(path.string());
    model.step();
    EXPECT_EQ(model.seen().euclidean, 0);
    EXPECT_EQ(model.matrices, 2);
  });
  std::filesystem::remove_all(path);
}

TEST(Geometry, ChangesBackWhereTheConditionDoes) {
  run_thread_ranks(2, [&](Communicator& comm) {
    Model model({2}, "auto", comm);
    model.steps(kDecided + 1);
    EXPECT_GT(model.seen().euclidean, 0);
    EXPECT_EQ(model.seen().rho, 0) << "the ball is of spectral steps";
    ASSERT_EQ(model.notices.size(), 2U);
    EXPECT_THAT(model.notices[0], HasSubstr("'m.flat': Euclidean steps promise more"));
    EXPECT_THAT(model.notices[1], HasSubstr("'m.flat': steps are Euclidean from now on"));
    // Now its gradient has all directions, and its inputs have one.
    const auto all_directions = normals(kFlatRows * kFlatCols, 5);
    std::copy(all_directions.begin(), all_directions.end(), model.flat.begin());
    model.rounds_flat = true;
    model.steps(2 * kDecided - 2);  // the last before the third decision
    EXPECT_EQ(model.seen().advice, studies::GeometryAdvisor::Advice::spectral);
    EXPECT_GT(model.seen().euclidean, 0) << "not before a checkpoint is due";
    model.steps(2);
    EXPECT_EQ(model.seen().euclidean, 0);
    EXPECT_EQ(model.matrices, 2);
    ASSERT_EQ(model.notices.size(), 4U);
    EXPECT_THAT(model.notices[3], HasSubstr("'m.flat': steps are spectral again"));
  });
}

TEST(Geometry, IsAdvisedOnceAndLeftAlone) {
  const auto path = directory();
  run_thread_ranks(2, [&](Communicator& comm) {
    Model model({2}, "advise", comm), again({2}, "advise", comm);
    model.steps(kDecided);
    model.optimizer->save(path.string());
    model.steps(2);
    ASSERT_EQ(model.notices.size(), 1U);
    EXPECT_THAT(model.notices[0], HasSubstr("Euclidean steps promise more"));
    EXPECT_EQ(model.seen().euclidean, 0);
    EXPECT_EQ(model.matrices, 2);
    again.load(path.string());
    again.steps(kDecided);
    EXPECT_TRUE(again.notices.empty()) << "it was said before";
    EXPECT_EQ(again.seen().advice, studies::GeometryAdvisor::Advice::euclidean);
  });
  std::filesystem::remove_all(path);
}

TEST(Geometry, KeepsToTheShareOfTheTimeWhateverIsSaved) {
  // A look after the first is due where steps are chosen, and nowhere else: saving asks for none.
  const auto path = directory();
  run_thread_ranks(1, [&](Communicator& comm) {
    Layout layout{1};
    layout.budget = 1e-9;
    Model model(layout, "auto", comm);
    std::vector<std::int64_t> looked;
    for (int t = 1; t <= 3 * kDecided; ++t) {
      model.step();
      if (model.seen().step == t) looked.push_back(t);
      model.optimizer->save((path / std::to_string(t)).string());
    }
    EXPECT_EQ(looked, (std::vector<std::int64_t>{1, 7, 14, 21}));
  });
  std::filesystem::remove_all(path);
}

TEST(Geometry, IsRefusedWhereItCannotBe) {
  const auto refusal = [](const std::string& text) -> std::string {
    try {
      const Config config = parse_config("schema: 1\n" + text);
      Parameter p;
      p.name = "w";
      p.shape = {4, 4};
      static_cast<void>(runtime::make_plan(config, {runtime::shape_of(p)}, 2));
    } catch (const ConfigError& e) {
      return e.what();
    }
    return "accepted";
  };
  const std::string muon = "groups: [{match: '*', rule: {name: muon}}]\n";
  EXPECT_THAT(refusal(muon + "diagnostics: {every_steps: 1, advisor: auto}\n"),
              HasSubstr("diagnostics.advisor: auto needs diagnostics.spectra"));
  EXPECT_THAT(refusal(muon + "diagnostics: {spectra: true, advisor: advise}\n"),
              HasSubstr("diagnostics.every_steps"));
  EXPECT_THAT(refusal(muon + "diagnostics: {every_steps: 1, spectra: true, advisor: auto}\n"),
              HasSubstr("train.save_every"));
  const std::string on =
      "train: {save_every: 5}\ndiagnostics: {every_steps: 1, spectra: true, advisor: auto}\n";
  EXPECT_THAT(refusal(on + "groups:\n  - {match: '*', rule: {name: muon}, weights: {format: int8, "
                           "residual: momentum}}\n"),
              HasSubstr("groups[0].weights.residual momentum"));
  EXPECT_EQ(refusal(on + muon), "accepted");
  EXPECT_THAT(refusal(muon + "diagnostics: {advisor: sometimes}\n"),
              HasSubstr("report, advise, auto"));
}

}  // namespace
}  // namespace orthrus
