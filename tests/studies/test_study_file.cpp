// A study file says what it says, and what it does not say is an error with a line.
#include <gmock/gmock.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <orthrus/error.hpp>
#include <stdexcept>

#include "runtime/runner/example_study.hpp"
#include "runtime/runner/expansion.hpp"
#include "runtime/runner/expression.hpp"
#include "runtime/runner/journal.hpp"
#include "runtime/runner/study_file.hpp"
#include "runtime/runner/study_keys.hpp"
#include "runtime/runner/sweep.hpp"

namespace orthrus::runner {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

std::string replaced(std::string text, const std::string& what, const std::string& by) {
  const auto at = text.find(what);
  EXPECT_NE(at, std::string::npos) << what;
  return text.replace(at, what.size(), by);
}

std::string refusal(const std::string& text) {
  return error_of([&] { static_cast<void>(parse_study(text, "s.yaml")); });
}

double evaluated(const std::string& text) {
  return Expression(text).number([](const std::string& name) -> std::optional<Value> {
    if (name == "x") return 3.0;
    if (name == "optimizer") return "muon";
    return {};
  });
}

TEST(AnExpression, HasTheUsualPrecedence) {
  EXPECT_EQ(evaluated("2 + 3*4^2/8 - 1"), 7);
  EXPECT_EQ(evaluated("2^3^2"), 512);  // to the right
  EXPECT_EQ(evaluated("-x^2"), -9);
  EXPECT_EQ(evaluated("2^-1"), 0.5);
  EXPECT_EQ(evaluated("10 - 4 - 3"), 3);
  EXPECT_EQ(evaluated("(1 + 2)*-x"), -9);
  EXPECT_EQ(evaluated("1 || 0 && 0"), 1);
  EXPECT_EQ(evaluated("!(x < 3) && x <= 3 && x != 4"), 1);
  EXPECT_EQ(evaluated("min(x, 2, 5) + max(1e2, x) + log2(8)"), 105);
  EXPECT_EQ(evaluated("x > 10*x || !isfinite(x)"), 0);
}

TEST(AnExpression, ComparesWordsWithoutQuotes) {
  EXPECT_EQ(evaluated("optimizer == muon"), 1);
  EXPECT_EQ(evaluated("optimizer != 'adamw' && x == 3"), 1);
  EXPECT_THAT(Expression("a*b + a").names(), ElementsAre("a", "b"));
}

TEST(AnExpression, SaysWhereItIsWrong) {
  EXPECT_THAT(error_of([] { Expression("1 + "); }), HasSubstr("column 5"));
  EXPECT_THAT(error_of([] { Expression("a b"); }), HasSubstr("column 3"));
  EXPECT_THAT(error_of([] { Expression("mni(1, 2)"); }), HasSubstr("did you mean 'min'"));
  EXPECT_THAT(error_of([] { Expression("log2(1, 2)"); }), HasSubstr("takes 1"));
  EXPECT_THAT(error_of([] { evaluated("optimizer + 1"); }), HasSubstr("'muon'"));
  EXPECT_THAT(error_of([] { Expression(std::string(200, '(') + "1"); }), HasSubstr("deep"));
}

TEST(AStudyFile, OfTheContractIsRead) {
  const Study study = parse_study(example_study, "s.yaml");
  EXPECT_EQ(study.name, "muon-cbs-resmlp");
  EXPECT_EQ(study.target, 0.05);
  ASSERT_EQ(study.parameters.size(), 5U);
  EXPECT_THAT(study.find("batch_size")->values, ElementsAre(16, 32, 64, 128, 256, 512, 1024));
  const Center& center = *study.find("lr")->center;
  EXPECT_EQ(center.first, -1);
  EXPECT_EQ(center.last, 1);
  EXPECT_EQ(center.step, 0.5);
  EXPECT_EQ(study.find("lr")->extend_on_edge, 3);
  EXPECT_TRUE(study.tunes());
  EXPECT_THAT(study.eval_on, ElementsAre("raw", "ema"));
  EXPECT_EQ(resolved(study)["analysis"]["items"].size(), 4U);
  EXPECT_EQ(resolved(study)["execution"]["max_parallel"], "auto");
}

TEST(AStudyFile, WithAMisspeltKeyIsRefusedWithItsLineAndTheNearestOne) {
  EXPECT_THAT(refusal(replaced(example_study, "  metric:", "  metrik:")),
              AllOf(HasSubstr("s.yaml:7:3: search.metrik"), HasSubstr("did you mean 'metric'?")));
  EXPECT_THAT(refusal(replaced(example_study, "log2: [4, 10]", "logg2: [4, 10]")),
              AllOf(HasSubstr("s.yaml:10:"), HasSubstr("did you mean 'log2'?")));
  EXPECT_THAT(refusal(replaced(example_study, "run_cap", "run_cup")),
              AllOf(HasSubstr("s.yaml:22:"), HasSubstr("did you mean 'run_cap'?")));
  EXPECT_THAT(refusal(replaced(example_study, "multipliers: {sqrt2", "multipliers: {sqrt")),
              HasSubstr("did you mean 'sqrt2'?"));
  EXPECT_THAT(refusal(replaced(example_study, "value: {sgd", "valeu: {sgd")),
              HasSubstr("did you mean 'value'?"));
}

TEST(AStudyFile, WithImpossibleValuesIsRefused) {
  const auto with = [](const std::string& what, const std::string& by) {
    return refusal(replaced(example_study, what, by));
  };
  EXPECT_THAT(with("orthrus_study: 1", "orthrus_study: 2"), HasSubstr("orthrus_study"));
  EXPECT_THAT(with("orthrus_study: 1", "schema: 1"), HasSubstr("a configuration"));
  EXPECT_THAT(with("name: muon-cbs-resmlp", "name: ../up"), HasSubstr("becomes a directory"));
  EXPECT_THAT(with("[4, 10]", "[10, 4]"), HasSubstr("lo <= hi"));
  EXPECT_THAT(with("every_frac: 0.02", "every_frac: 2"), HasSubstr("from 1e-06 to 1"));
  EXPECT_THAT(with("report: [10, 11, 12]", "report: [10, 1]"), HasSubstr("seed 1 both tunes"));
  EXPECT_THAT(with("loss > 10*loss0", "loss > 10*lossO"), HasSubstr("'lossO' is no variable"));
  EXPECT_THAT(with("values: [sgd, adamw, muon]", "values: [sgd, sgd]"), HasSubstr("there twice"));
  EXPECT_THAT(with("at: {batch_size: 64}, ", ""), HasSubstr("rule sqrt needs at"));
  EXPECT_THAT(with("on: [raw, ema]", "on: [ema]"), HasSubstr("[raw, ema]"));
  EXPECT_THAT(with(", ema_halflife_examples: 5000", ""), HasSubstr("ema_halflife_examples"));
  EXPECT_THAT(refusal("orthrus_study: 1\nname: s\nsearch: {metric: {name: val_loss_ema}}\n"),
              AllOf(HasSubstr("s.yaml:3:"), HasSubstr("averaged weights")));
}

// https://docs.wandb.ai/models/sweeps/sweep-config-keys
TEST(ASweep, BecomesAStudyOfItsProgram) {
  const std::string sweep = R"(program: train.py
name: my sweep
method: random
run_cap: 12
metric: {name: accuracy, goal: maximize, target: 0.9}
early_terminate: {type: hyperband, min_iter: 3}
parameters:
  lr: {distribution: log_uniform_values, min: 0.001, max: 0.1}
  momentum: {min: 0.5, max: 0.9}
  layers: {min: 1, max: 3}
  optimizer:
    parameters:
      kind: {values: [adam, sgd]}
  epochs: {value: 5}
)";
  const std::string text = study_of_sweep(sweep, "sweep.yaml", "");
  const Study study = parse_study(text, "s.yaml", {});
  EXPECT_EQ(study.name, "my-sweep");
  EXPECT_EQ(study.method, "random");
  EXPECT_EQ(study.samples, 2) << "of each of three layers with two optimizers";
  EXPECT_EQ(study.run_cap, 12);
  EXPECT_EQ(std::tie(study.metric, study.goal, study.target),
            std::make_tuple(std::string("accuracy"), std::string("maximize"), 0.9));
  EXPECT_EQ(study.command,
            (std::vector<std::string>{"/usr/bin/env", "python3", "train.py", "--lr={lr}",
                                      "--momentum={momentum}", "--layers={layers}",
                                      "--optimizer.kind={optimizer.kind}", "--epochs={epochs}"}));
  EXPECT_TRUE(study.isolates());
  EXPECT_EQ(study.find("layers")->values, (std::vector<Json>{1, 2, 3}));
  EXPECT_EQ(study.find("lr")->distribution, "log_uniform");
  EXPECT_EQ(study.find("momentum")->max, 0.9);
  EXPECT_THAT(text, HasSubstr("# left out: early_terminate: {\"type\":\"hyperband\""));
  EXPECT_EQ(Expansion(study, {}).initial().size(), 12U);
}

TEST(ASweep, MayBeOfAConfiguration) {
  const std::string text =
      study_of_sweep("method: grid\nparameters: {batch_size: {values: [4, 8]}, lr: {value: 0.1}}\n",
                     "w.yaml", "quad.yaml");
  const Study study = parse_study(text, "s.yaml", {});
  EXPECT_EQ(study.base, "quad.yaml");
  EXPECT_FALSE(study.runs_command());
  EXPECT_EQ(study.find("batch_size")->values.size(), 2U);
}

TEST(ASweep, NamesWhatAStudyHasNot) {
  const auto said = [](const std::string& sweep, const char* base = "q.yaml") -> std::string {
    try {
      static_cast<void>(study_of_sweep(sweep, "w.yaml", base));
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(said("method: bayes\nparameters: {lr: {value: 1}}\n"),
              HasSubstr("w.yaml: method: \"bayes\""));
  EXPECT_THAT(said("method: random\nparameters: {lr: {value: 1}}\n"), HasSubstr("run_cap"));
  EXPECT_THAT(said("parameters: {lr: {min: 0.1, max: 1}}\n"),
              HasSubstr("parameters.lr: a grid needs values"));
  EXPECT_THAT(
      said(
          "method: random\nrun_cap: 1\nparameters: {lr: {distribution: normal, min: 1, max: 2}}\n"),
      HasSubstr("'normal'"));
  EXPECT_THAT(said("name: x\n"), HasSubstr("no parameters"));
  EXPECT_THAT(said("parameters: [lr]\n"), HasSubstr("parameters: expects a mapping"));
  EXPECT_THAT(said("metric: loss\nparameters: {lr: {value: 1}}\n"),
              HasSubstr("metric: expects a mapping"));
  EXPECT_THAT(said("parameters: {lr: {distribution: 3, min: 0.1, max: 1}}\n"),
              HasSubstr("parameters.lr.distribution: expects a name"));
  EXPECT_THAT(said("parameters: {lr: {values: 0.1}}\n"),
              HasSubstr("parameters.lr.values: expects a list"));
  EXPECT_THAT(said("parameters: {lr: {values: [[0.1]]}}\n"),
              HasSubstr("parameters.lr.values: expects scalars"));
  EXPECT_THAT(said("parameters: {n: {min: 5, max: 1}}\n"),
              HasSubstr("parameters.n: expects min < max"));
  EXPECT_THAT(said("method: random\nrun_cap: 1\nparameters: {lr: {distribution: "
                   "log_uniform_values, min: 0, max: 1}}\n"),
              HasSubstr("parameters.lr: expects min > 0"));
  EXPECT_THAT(said("program: t.py\ncommand: python t.py\nparameters: {lr: {value: 1}}\n", ""),
              HasSubstr("command: expects a list"));
}

TEST(AStudyFile, OfAProgramSaysWhatAProgramCanDo) {
  const std::string program = "orthrus_study: 1\nname: s\ntask: {command: [./t, \"{config}\"]}\n";
  EXPECT_THAT(refusal(program),
              HasSubstr("execution.mode: a program (task.command) needs subprocess"));
  EXPECT_EQ(refusal("orthrus_study: 1\nname: s\nexecution: {mode: subprocess}\n"), "");
  EXPECT_THAT(refusal("orthrus_study: 1\nname: s\nexecution: {launcher: [srun]}\n"),
              AllOf(HasSubstr("s.yaml:3:"), HasSubstr("execution.launcher")));
  const auto with = [&](const std::string& more) {
    return refusal(program + "execution: {mode: subprocess}\n" + more);
  };
  EXPECT_EQ(with(""), "");
  EXPECT_THAT(with("probes: {gns: {every: 5}}\n"), HasSubstr("measures its own noise"));
  EXPECT_THAT(with("search: {method: asha, early_terminate: {min_examples: 5}}\n"),
              HasSubstr("a program goes to its end"));
  EXPECT_THAT(with("branch: {steps: 5, batch: 4}\nbudget: {max_examples: 16}\n"),
              HasSubstr("leaves no base run"));
  EXPECT_THAT(refusal("orthrus_study: 1\nname: s\ntask: {command: []}\n"),
              HasSubstr("expects [PROGRAM"));
  EXPECT_THAT(refusal("orthrus_study: 1\nname: s\ntask: {command: [t], d: 3}\n"),
              HasSubstr("a command has no sizes"));
  EXPECT_THAT(refusal("orthrus_study: 1\nname: s\nprobes: {advisor: report}\n"),
              AllOf(HasSubstr("s.yaml:3:"), HasSubstr("probes.gns.every")));
}

TEST(AStudyFile, ThatMaximizesFitsNoLosses) {
  EXPECT_THAT(refusal("orthrus_study: 1\nname: s\nsearch: {metric: {goal: maximize}}\n"
                      "analysis: {items: [{fit: loss_law}]}\n"),
              AllOf(HasSubstr("s.yaml:4:"), HasSubstr("'loss_law' is of losses")));
}

TEST(AStudyFile, TakesOverridesOfItsKeysAndOfParameters) {
  const std::vector<std::string> set{"budget.max_examples=500", "lr=0.1,0.2", "workload.rows=8"};
  const Study study =
      parse_study("orthrus_study: 1\nname: s\nsearch: {parameters: {lr: 0.3}}\n", "s.yaml", set);
  EXPECT_EQ(study.max_examples, 500);
  EXPECT_THAT(study.find("lr")->values, ElementsAre(0.1, 0.2));
  EXPECT_THAT(study.find("workload.rows")->values, ElementsAre(8));
}

TEST(AStudyFile, DiffersWhereItWasChanged) {
  const Json a = resolved(parse_study(example_study, "s.yaml"));
  const std::vector<std::string> set{"budget.max_examples=5", "tau=0.3"};
  const Json b = resolved(parse_study(example_study, "s.yaml", set));
  EXPECT_THAT(differences(a, b),
              testing::UnorderedElementsAre("budget.max_examples", "search.parameters.tau"));
  EXPECT_TRUE(differences(a, a).empty());
}

TEST(AStudyFile, HasADocLineForEveryKey) {
  for (const StudyKey& key : study_keys()) EXPECT_FALSE(key.doc.empty()) << key.path;
}

TEST(AnIdentity, IsOfValuesAndNotOfTheirOrderOrSpelling) {
  const Json a = Json::parse(R"({"b": 64.0, "a": [0.1, true, null, "x"]})");
  const Json b = Json::parse(R"({"a": [1e-1, true, null, "x"], "b": 64})");
  EXPECT_EQ(canonical_json(a), R"({"a":[0.1,true,null,"x"],"b":64})");
  EXPECT_EQ(identity_of(a), identity_of(b));
  EXPECT_NE(identity_of(a), identity_of(Json::parse(R"({"a": [0.1, true, null, "x"], "b": 65})")));
  // printf '{"a":1}' | sha256sum
  EXPECT_EQ(identity_of(Json::parse(R"({"a": 1})")), "015abd7f5cc57a2d");
  EXPECT_EQ(canonical_json(Json{{"x", std::nan("")}}), R"({"x":"NaN"})");
}

class AJournal : public testing::Test {
 protected:
  void SetUp() override { std::filesystem::create_directories(directory_); }
  void TearDown() override { std::filesystem::remove_all(directory_); }
  const std::filesystem::path directory_ =
      std::filesystem::path(testing::TempDir()) /
      testing::UnitTest::GetInstance()->current_test_info()->name();
  const std::filesystem::path file_ = directory_ / "journal.jsonl";
};

TEST_F(AJournal, OutlivesALineThatWasCutOff) {
  {
    Journal journal(file_);
    journal.write({{"t", "assign"}, {"index", 1}});
  }
  std::ofstream(file_, std::ios::app) << R"({"t":"state","ind)";
  EXPECT_EQ(read_lines(file_).size(), 1U);
  {
    Journal journal(file_);
    journal.write({{"t", "assign"}, {"index", 2}});
  }
  const std::vector<Json> lines = read_lines(file_);
  ASSERT_EQ(lines.size(), 2U);
  EXPECT_EQ(lines[1]["index"], 2);
}

TEST_F(AJournal, ThatIsNotThereIsEmpty) { EXPECT_TRUE(read_lines(directory_ / "none").empty()); }

}  // namespace
}  // namespace orthrus::runner
