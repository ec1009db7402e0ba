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

TEST(Geometry, ChangesWhenACheckpointIsSavedInEveryMode) {
  const auto path = directory();
  for (const Layout& layout :
       {Layout{1}, Layout{2}, Layout{4, "zero: {stage: 3}\n"}, Layout{4, "mesh: {replicate: 2}\n"},
        Layout{2, "comm: {bucket_bytes: 600}\n"}, Layout{3, "", ", matrix: {mode: exchange}"},
        Layout{3, "", ", matrix: {mode: gather}"}, Layout{3, "", ", matrix: {mode: gram}"},
        Layout{3, "", ", matrix: {mode: gram_steps}"},
        Layout{2, "", ", matrix: {mode: block_local}"},
        Layout{2, "", ", matrix: {mode: periodic, period: 3}"},
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
      both(kAdvised + 1);
      EXPECT_EQ(chooses.seen().advice, studies::GeometryAdvisor::Advice::euclidean);
      EXPECT_EQ(chooses.seen().euclidean, 0) << "not before a checkpoint is saved";
      EXPECT_EQ(chooses.w_flat, reports.w_flat);
      if (comm.rank() == 0) std::filesystem::remove_all(path);
      comm.barrier();
      chooses.optimizer->save(path.string());
      const auto at = chooses.w_flat;
      both(1);
      expect_step(chooses, at, euclidean_step(kAdvised + 2, kAdvised + 1), layout.tolerance);
      EXPECT_NEAR(chooses.seen().euclidean * layout.gradient, 1 / (1 - std::pow(kBeta, kAdvised)),
                  layout.tolerance);
      EXPECT_LT(chooses.matrices, reports.matrices);
      EXPECT_EQ(chooses.w_round, reports.w_round) << "the other goes on";
      // Who loads it goes on so, on these ranks with the same bits.
      Model loads(layout, "auto", comm);
      loads.load(path.string());
      loads.step();
      EXPECT_EQ(loads.w_flat, chooses.w_flat);
      EXPECT_EQ(loads.seen().euclidean, chooses.seen().euclidean);
    });
  }
  std::filesystem::remove_all(path);
}

TEST(Geometry, OfACheckpointIsThatOfAnyRanksThatLoadIt) {
  const auto path = directory();
  std::vector<float> weights;
  for (const int ranks : {2, 1, 3, 4}) {
    run_thread_ranks(ranks, [&](Communicator& comm) {
      Model model({ranks}, "auto", comm);
      if (ranks == 2) {
        model.steps(kAdvised + 1);
        model.optimizer->save(path.string());
      } else {
        model.load(path.string());
      }
      const auto at = model.w_flat;
      model.step();
      expect_step(model, at, euclidean_step(kAdvised + 2, kAdvised + 1), 1e-5);
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
  const auto path = directory();
  run_thread_ranks(2, [&](Communicator& comm) {
    Model model({2}, "auto", comm);
    model.steps(kAdvised);
    model.optimizer->save((path / "1").string());
    model.step();
    EXPECT_GT(model.seen().euclidean, 0);
    ASSERT_EQ(model.notices.size(), 2U);
    EXPECT_THAT(model.notices[0], HasSubstr("'m.flat': Euclidean steps promise more"));
    EXPECT_THAT(model.notices[1], HasSubstr("'m.flat': steps are Euclidean from now on"));
    // Now its gradient has all directions, and its inputs have one.
    const auto all_directions = normals(kFlatRows * kFlatCols, 5);
    std::copy(all_directions.begin(), all_directions.end(), model.flat.begin());
    model.rounds_flat = true;
    model.steps(16);
    EXPECT_EQ(model.seen().advice, studies::GeometryAdvisor::Advice::spectral);
    EXPECT_GT(model.seen().euclidean, 0) << "not before a checkpoint is saved";
    model.optimizer->save((path / "2").string());
    model.step();
    EXPECT_EQ(model.seen().euclidean, 0);
    EXPECT_EQ(model.matrices, 2);
    ASSERT_EQ(model.notices.size(), 4U);
    EXPECT_THAT(model.notices[3], HasSubstr("'m.flat': steps are spectral again"));
  });
  std::filesystem::remove_all(path);
}

TEST(Geometry, IsAdvisedOnceAndLeftAlone) {
  const auto path = directory();
  run_thread_ranks(2, [&](Communicator& comm) {
    Model model({2}, "advise", comm);
    model.steps(kAdvised + 2);
    model.optimizer->save(path.string());
    model.steps(2);
    ASSERT_EQ(model.notices.size(), 1U);
    EXPECT_THAT(model.notices[0], HasSubstr("Euclidean steps promise more"));
    EXPECT_EQ(model.seen().euclidean, 0);
    EXPECT_EQ(model.matrices, 2);
  });
  std::filesystem::remove_all(path);
}

TEST(Geometry, OfASaveThatFailsIsAsItWas) {
  const auto path = directory();
  run_thread_ranks(2, [&](Communicator& comm) {
    Model model({2}, "auto", comm);
    model.steps(kAdvised + 1);
    if (comm.rank() == 0) std::filesystem::create_directories(path);
    comm.barrier();
    EXPECT_THROW(model.optimizer->save(path.string()), IoError);
    model.step();
    EXPECT_EQ(model.seen().euclidean, 0);
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
  const std::string on = "diagnostics: {every_steps: 1, spectra: true, advisor: auto}\n";
  EXPECT_THAT(refusal(on + "groups:\n  - {match: '*', rule: {name: muon}, weights: {format: int8, "
                           "residual: momentum}}\n"),
              HasSubstr("groups[0].weights.residual momentum"));
  EXPECT_EQ(refusal(on + muon), "accepted");
  EXPECT_THAT(refusal(muon + "diagnostics: {advisor: sometimes}\n"),
              HasSubstr("report, advise, auto"));
}

}  // namespace
}  // namespace orthrus
