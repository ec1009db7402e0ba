// Which trials a study has, and that results alone decide what is added to them.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <orthrus/error.hpp>
#include <random>
#include <set>

#include "runtime/runner/campaign.hpp"
#include "runtime/runner/example_study.hpp"
#include "runtime/runner/groups.hpp"

namespace orthrus::runner {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

Bases bases_of(const Study& study) {
  Bases bases;
  for (const std::string& word : base_words(study))
    bases[word] = default_base(word.empty() ? "muon" : word);
  return bases;
}

Expansion expand(const std::string& text, const std::vector<std::string>& set = {}) {
  Study study = parse_study(text, "s.yaml", set);
  Bases bases = bases_of(study);
  return {std::move(study), std::move(bases)};
}

Expansion expand_parameters(const std::string& search) {
  return expand("orthrus_study: 1\nname: s\nbudget: {max_examples: 6400}\nsearch:\n" + search);
}

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

TEST(TheExample, HasItsTrialsInTheOrderOfTheFile) {
  const Expansion e = expand(example_study);
  // Of 3 optimizers × 7 batch sizes one pair is excluded; 5 rates and 2 seeds each. A cell adds 3
  // report seeds, and in at most 3 extensions 2 rates with 2 seeds.
  EXPECT_EQ(e.cells().size(), 20U);
  EXPECT_EQ(e.initial().size(), 200U);
  EXPECT_EQ(e.excluded(), 10);
  EXPECT_EQ(e.most(), 200 + 20 * (3 + 3 * 2 * 2));

  const auto value = [&](std::size_t i, const char* name) { return e.initial()[i].params[name]; };
  EXPECT_EQ(value(0, "optimizer"), "sgd");
  EXPECT_EQ(value(0, "batch_size"), 16);
  // 0.1·√(16/64)·2^−1
  EXPECT_DOUBLE_EQ(value(0, "lr").get<double>(), 0.025);
  EXPECT_EQ(value(0, "seed"), 0);
  EXPECT_EQ(value(1, "seed"), 1);
  EXPECT_DOUBLE_EQ(value(2, "lr").get<double>(), 0.025 * std::sqrt(2.0));
  EXPECT_EQ(value(10, "batch_size"), 32);
  EXPECT_EQ(value(60, "optimizer"), "adamw");
  EXPECT_EQ(value(199, "optimizer"), "muon");
  EXPECT_EQ(value(199, "batch_size"), 1024);
  // 0.02·√(1024/64)·2
  EXPECT_DOUBLE_EQ(value(199, "lr").get<double>(), 0.16);
  EXPECT_EQ(value(0, "warmup_examples"), 2000);
  EXPECT_DOUBLE_EQ(value(0, "weight_decay").get<double>(), 16 / (0.025 * 0.2 * 1e5));
  EXPECT_EQ(e.initial()[0].steps, 100000 / 16);
  EXPECT_EQ(e.initial()[0].role, "tune");

  std::set<std::string> ids;
  for (const Trial& trial : e.initial()) ids.insert(trial.id);
  EXPECT_EQ(ids.size(), 200U);
  EXPECT_THAT(e.initial()[0].directory(), testing::MatchesRegex("0000-[0-9a-f]{16}"));
}

TEST(TheExample, BecomesConfigurations) {
  const Expansion e = expand(example_study);
  const Trial& muon = e.initial()[199];
  const Config config = trial_config(e.bases().at("muon"), muon);
  EXPECT_EQ(config.workload, "residual_mlp");
  EXPECT_EQ(config.train.batch, 1024);
  EXPECT_EQ(config.train.steps, 97);
  EXPECT_EQ(config.train.eval_every, 1);
  EXPECT_EQ(config.seed, 1U);
  EXPECT_EQ(std::get<double>(config.groups[0].rule.values.at("lr")), 0.16);
  // AdamW, for what Muon passes over, keeps its own.
  EXPECT_EQ(config.groups[1].rule.values.at("lr"),
            e.bases().at("muon").groups[1].rule.values.at("lr"));
  // Two batches of warm-up examples, but never under ten steps.
  EXPECT_EQ(config.groups[0].schedule.warmup_steps, 10);
}

TEST(Trials, MeasureNoiseAsOftenAsTheStudySays) {
  const Config probed =
      trial_config(expand(example_study).bases().at("sgd"), expand(example_study).initial()[0]);
  EXPECT_EQ(probed.diagnostics.every_steps, 50);
  EXPECT_EQ(probed.diagnostics.budget_frac, 0.01);
  EXPECT_TRUE(probed.diagnostics.spectra) << "the advisor, and the nuclear norm";
  EXPECT_TRUE(probed.diagnostics.dual_noise);
  EXPECT_EQ(probed.diagnostics.advisor, "report");
  EXPECT_EQ(probed.train.save_every, 0);
  // Auto decides at every look: when it looks must not be the clock's choice.
  const Expansion changing = expand(example_study, {"probes.advisor=auto"});
  const Config chosen = trial_config(changing.bases().at("muon"), changing.initial()[199]);
  EXPECT_EQ(chosen.diagnostics.advisor, "auto");
  EXPECT_EQ(chosen.train.save_every, chosen.diagnostics.every_steps);
  // Without a word of the study the base has it.
  Config base = default_base("muon");
  base.diagnostics.every_steps = 7;
  const Expansion e({parse_study("orthrus_study: 1\nname: s\n", "s.yaml")}, {{"", base}});
  EXPECT_EQ(trial_config(base, e.initial()[0]).diagnostics.every_steps, 7);
}

TEST(Trials, OfAStudyAboveItsCapAreRefused) {
  EXPECT_THAT(error_of([] { expand(example_study, {"budget.run_cap=499"}); }),
              AllOf(HasSubstr("500 trials"), HasSubstr("200 of the file"), HasSubstr("499")));
}

TEST(Parameters, ThatAreZippedAdvanceTogether) {
  const Expansion e = expand_parameters(
      "  parameters: {batch_size: {values: [1, 2, 4]}, lr: {values: [0.1, 0.2, 0.4]},\n"
      "               seed: {values: [0, 1]}}\n  zip: [[batch_size, lr]]\n");
  ASSERT_EQ(e.initial().size(), 6U);
  EXPECT_EQ(e.initial()[2].params.dump(), R"({"batch_size":2,"lr":0.2,"seed":0})");
  EXPECT_THAT(error_of([] {
                expand_parameters(
                    "  parameters: {batch_size: {values: [1, 2]}, lr: {values: [1]}}\n"
                    "  zip: [[batch_size, lr]]\n");
              }),
              HasSubstr("batch_size has 2 values, lr has 1"));
}

TEST(Parameters, OfAListAreItsPoints) {
  const Expansion e = expand_parameters(
      "  method: list\n  points: [{batch_size: 4, lr: 0.1}, {batch_size: 8, lr: 0.3}]\n"
      "  parameters: {seed: {values: [0, 1]}}\n");
  ASSERT_EQ(e.initial().size(), 4U);
  EXPECT_EQ(e.initial()[3].params["lr"], 0.3);
  EXPECT_EQ(e.initial()[3].params["seed"], 1);
}

TEST(Parameters, OfEqualValuesAreOneTrial) {
  const Expansion e =
      expand_parameters("  method: list\n  points: [{lr: 0.1}, {lr: 1e-1}, {lr: 0.2}]\n");
  EXPECT_EQ(e.initial().size(), 2U);
  EXPECT_EQ(e.equal(), 1);
}

TEST(Parameters, ThatAreDrawnAreWithinBoundsAndTheSameAgain) {
  const char* const search =
      "  method: random\n  samples: 200\n  seed: 5\n"
      "  parameters: {lr: {distribution: log_uniform, min: 1.0e-4, max: 1.0}}\n";
  const Expansion a = expand_parameters(search), b = expand_parameters(search);
  ASSERT_EQ(a.initial().size(), 200U);
  int below = 0;
  for (std::size_t i = 0; i < 200; ++i) {
    const double lr = a.initial()[i].params["lr"];
    EXPECT_GE(lr, 1e-4);
    EXPECT_LE(lr, 1);
    below += lr < 1e-2 ? 1 : 0;
    EXPECT_EQ(a.initial()[i].id, b.initial()[i].id);
  }
  EXPECT_NEAR(below, 100, 28);  // four standard deviations of a fair coin
}

TEST(Parameters, ThatSayNothingAreRefused) {
  EXPECT_THAT(error_of([] { expand_parameters("  parameters: {lrr: 0.1}\n"); }),
              AllOf(HasSubstr("s.yaml:5:"), HasSubstr("did you mean 'lr'?")));
  EXPECT_THAT(
      error_of([] {
        expand_parameters("  parameters: {optimizer: muon}\n  exclude: [\"optimzer == muon\"]\n");
      }),
      HasSubstr("'optimzer'"));
  EXPECT_THAT(error_of([] { expand_parameters("  parameters: {train.stpes: 3}\n"); }),
              HasSubstr("train.stpes"));
  EXPECT_THAT(error_of([] { expand_parameters("  parameters: {optimizer: moun}\n"); }),
              HasSubstr("did you mean 'muon'?"));
}

TEST(TheRate, OfOtherGroupsOfTheRuleKeepsItsRatio) {
  Config base = parse_config(
      "schema: 1\ngroups:\n"
      "  - {match: \"a*\", rule: {name: adamw, lr: 0.5}}\n"
      "  - {match: \"b*\", rule: {name: muon, lr: 0.2}}\n"
      "  - {match: \"c*\", rule: {name: muon, lr: 0.1}}\n");
  const Expansion e(
      {parse_study("orthrus_study: 1\nname: s\nsearch: {parameters: {lr: 0.04}}\n", "s.yaml")},
      {{"", base}});
  const Config config = trial_config(base, e.initial()[0]);
  EXPECT_EQ(std::get<double>(config.groups[0].rule.values.at("lr")), 0.5);
  EXPECT_EQ(std::get<double>(config.groups[1].rule.values.at("lr")), 0.04);
  EXPECT_DOUBLE_EQ(std::get<double>(config.groups[2].rule.values.at("lr")), 0.02);
}

/// The lines of README.md: what is to stay as it is when batch and rate move.
TEST(Derived, ParametersKeepTimescalesFromBatchToBatch) {
  const auto configs = [](const std::string& weight_decay) {
    const Study study = parse_study(
        "orthrus_study: 1\nname: s\nbudget: {max_examples: 6400}\nsearch:\n"
        "  parameters: {batch_size: {values: [16, 64, 256]}, lr: {values: [0.01, 0.02]}}\n"
        "  derive:\n"
        "    groups.0.rule.betas.1: \"0.95^(batch_size/64)\"\n"
        "    weight_decay: \"" +
            weight_decay + "\"\n",
        "s.yaml");
    const Config base = parse_config(
        "schema: 1\ngroups:\n"
        "  - {match: \"*\", rule: {name: adamw, lr: 0.01, betas: [0.9, 0.95]}}\n");
    const Expansion e(study, {{"", base}});
    std::vector<Config> out;
    for (const Trial& trial : e.initial()) out.push_back(trial_config(base, trial));
    return out;
  };
  const auto rule = [](const Config& c, const char* key) { return c.groups[0].rule.number(key); };
  const std::vector<Config> timescale = configs("batch_size/(lr*0.2*max_examples)");
  ASSERT_EQ(timescale.size(), 6U);
  for (const Config& c : timescale) {
    const auto batch = static_cast<double>(c.train.batch);
    // τ = B/(ηλD), the share of the data that a weight remembers.
    EXPECT_NEAR(batch / (rule(c, "lr") * rule(c, "weight_decay") * 6400), 0.2, 1e-12);
    // β₂ forgets half within as many examples as 0.95 does at batch 64.
    const auto betas = std::get<std::vector<double>>(c.groups[0].rule.values.at("betas"));
    EXPECT_EQ(betas[0], 0.9);
    EXPECT_NEAR(batch / std::log(betas[1]), 64 / std::log(0.95), 1e-9);
  }
  for (const Config& c : configs("0.1*0.01/lr")) {
    EXPECT_NEAR(rule(c, "lr") * rule(c, "weight_decay"), 0.1 * 0.01, 1e-15);
  }
}

// The same by `keep`: no expression to get wrong.
TEST(Derived, WhatIsKeptIsKept) {
  const Config base = parse_config(
      "schema: 1\ngroups:\n"
      "  - {match: \"m*\", rule: {name: muon, lr: 0.01}}\n"
      "  - {match: \"*\", rule: {name: adamw, lr: 0.01, betas: [0.9, 0.99]}}\n");
  const auto configs = [&](const std::string& keep) {
    const Study study = parse_study(
        "orthrus_study: 1\nname: s\nbudget: {max_examples: 6400}\nsearch:\n"
        "  parameters: {batch_size: {values: [16, 64, 256]}, lr: {values: [0.01, 0.02]}}\n"
        "  keep: {" +
            keep +
            ", momentum: {value: 0.9, at: {batch_size: 64}}, beta2: {value: 0.95, at: "
            "{batch_size: 64}}}\n",
        "s.yaml");
    const Expansion e(study, {{"", base}});
    std::vector<Config> out;
    for (const Trial& trial : e.initial()) out.push_back(trial_config(base, trial));
    return out;
  };
  const auto rule = [](const Config& c, const char* key) { return c.groups[0].rule.number(key); };
  const std::vector<Config> timescale = configs("tau: 0.2");
  ASSERT_EQ(timescale.size(), 6U);
  for (const Config& c : timescale) {
    const auto batch = static_cast<double>(c.train.batch);
    EXPECT_NEAR(batch / (rule(c, "lr") * rule(c, "weight_decay") * 6400), 0.2, 1e-12);
    EXPECT_NEAR(batch / std::log(rule(c, "momentum")), 64 / std::log(0.9), 1e-9);
    const auto betas = std::get<std::vector<double>>(c.groups[1].rule.values.at("betas"));
    EXPECT_EQ(betas[0], 0.9);
    EXPECT_NEAR(batch / std::log(betas[1]), 64 / std::log(0.95), 1e-9);
    if (c.train.batch == 64) {
      EXPECT_EQ(betas[1], 0.95) << "as it is given";
    }
  }
  for (const Config& c : configs("lambda_eta: 0.001"))
    EXPECT_NEAR(rule(c, "lr") * rule(c, "weight_decay"), 1e-3, 1e-15);

  const auto refused = [&](const std::string& search) {
    return error_of([&] { expand_parameters("  parameters: {batch_size: 4, lr: 0.1" + search); });
  };
  EXPECT_THAT(refused("}\n  keep: {tua: 0.2}\n"),
              AllOf(HasSubstr("s.yaml:6:"), HasSubstr("did you mean 'tau'?")));
  EXPECT_THAT(refused("}\n  keep: {tau: 0.2, lambda_eta: 1}\n"), HasSubstr("weight_decay"));
  EXPECT_THAT(refused(", weight_decay: 1}\n  keep: {tau: 0.2}\n"), HasSubstr("search.keep"));
  EXPECT_THAT(refused("}\n  keep: {tau: 0}\n"), HasSubstr("above 0"));
  EXPECT_THAT(refused("}\n  keep: {beta2: 0.9}\n"), HasSubstr("search.keep.beta2"));
  EXPECT_THAT(refused("}\n  keep: {momentum: {value: 0.9}}\n"), HasSubstr("batch_size: N"));
}

// Half octaves below 6400/16 = 400 steps: 400, 283, 200, 141, the last fifth of each a decay.
TEST(DecayingBranches, HaveHorizonsHalfOctavesApart) {
  const std::string text =
      "orthrus_study: 1\nname: s\nbudget: {max_examples: 6400}\nwsd_branch: {horizons: 4}\n"
      "search: {parameters: {batch_size: 16, lr: 0.1}}\n";
  const Expansion e = expand(text);
  const std::vector<Decay> decays = decays_of(e.study(), 400);
  std::vector<std::pair<std::int64_t, std::int64_t>> found;
  for (const Decay& d : decays) found.emplace_back(d.fork, d.steps);
  EXPECT_THAT(found, ElementsAre(std::pair(113, 141), std::pair(160, 200), std::pair(226, 283),
                                 std::pair(320, 400)));
  // The constant run to the last fork, and the four decays.
  EXPECT_EQ(e.runs()[0].steps, 320 + 28 + 40 + 57 + 80);
  const Config whole = trial_config(e.bases().begin()->second, e.initial()[0]);
  const Config branch = decay_config(e.study(), whole, decays[1]);
  EXPECT_EQ(branch.train.steps, 200);
  EXPECT_EQ(branch.groups[0].schedule.kind, "wsd");
  EXPECT_EQ(branch.groups[0].schedule.decay_steps, 40);
  EXPECT_EQ(branch.groups[0].schedule.final, 0);
  // Horizons that leave nothing before a decay are none.
  EXPECT_EQ(decays_of(e.study(), 2).size(), 1U);

  const auto refused = [&](const std::vector<std::string>& set) {
    return error_of([&] { expand(text, set); });
  };
  EXPECT_THAT(refused({"groups.0.schedule.kind=cosine"}), HasSubstr("decays from a constant rate"));
  EXPECT_THAT(refused({"budget.max_examples=16"}), HasSubstr("leave nothing before a decay"));
  EXPECT_THAT(refused({"execution.exclusive=true"}), HasSubstr("wsd_branch.horizons"));
  EXPECT_THAT(refused({"warmup_examples=6400"}), HasSubstr("400 steps of warm-up"));
  EXPECT_THAT(refused({"wsd_branch.decay_frac=1"}), HasSubstr("wsd_branch.decay_frac"));
}

// ---- rates ------------------------------------------------------------------------------------

/// Steps to the target that are least at the rate `best`, in octaves; above `cliff` it diverges.
struct Valley {
  double best, cliff = std::numeric_limits<double>::infinity();
  Json operator()(const Trial& trial) const {
    const double lr = trial.params["lr"], octaves = std::log2(lr / best);
    const bool diverged = lr > cliff;
    const double noise = 1e-3 * static_cast<double>(trial.seed % 7);
    const Json steps = diverged ? Json(nullptr) : Json(100 * (1 + octaves * octaves + noise));
    return {{"index", trial.index},
            {"state", diverged ? "diverged" : "complete"},
            {"steps_to_target", steps},
            {"best_val", 1 + std::abs(octaves - 2)},  // on the way there: decides nothing
            {"final_val", diverged ? Json("inf") : Json(1 + octaves * octaves)}};
  }
};

constexpr const char* tuned_study =
    "orthrus_study: 1\nname: s\nbudget: {max_examples: 6400}\n"
    "search:\n  metric: {target: 0.5}\n  parameters:\n"
    "    batch_size: {values: [8, 16]}\n"
    "    lr: {center: {value: 1.0}, multipliers: {log2: [-1, 1]}, extend_on_edge: 3}\n"
    "    seed: {tune: [0, 1], report: [10, 11]}\n";

/// Runs a study whose trials end in the order that `next` picks. @return index → id of all trials.
std::map<std::int64_t, std::string> run(const Expansion& e, const Valley& valley,
                                        const std::function<std::size_t(std::size_t)>& next,
                                        Campaign& campaign) {
  for (int guard = 0; guard < 1000; ++guard) {
    const std::vector<const Trial*> due = campaign.due();
    if (due.empty()) break;
    campaign.record(valley(*due[next(due.size())]));
  }
  EXPECT_TRUE(campaign.complete());
  std::map<std::int64_t, std::string> all;
  for (const auto& [index, trial] : campaign.trials()) all[index] = trial.id;
  EXPECT_LE(std::ssize(all), e.most());
  return all;
}

// What 4 of the base's batches make one takes its rate times 4 (SGD), or times √4.
TEST(ABranch, HasTheRatesOfItsBaseRunGrownWithItsBatch) {
  const Expansion e = expand(R"(orthrus_study: 1
name: s
branch: {steps: 30, batch: 8}
budget: {max_examples: 64}
search:
  parameters:
    optimizer: {values: [sgd, muon]}
    batch_size: {values: [8, 32]}
    lr: 0.02
)");
  ASSERT_EQ(e.initial().size(), 4U);
  const auto rate = [](const Config& c, std::size_t g) {
    return std::get<double>(c.groups.at(g).rule.values.at("lr"));
  };
  for (const Trial& trial : e.initial()) {
    const Config& base = e.bases().at(trial.base);
    const Config before = fork_config(base, trial), after = trial_config(base, trial);
    const bool sgd = trial.params["optimizer"] == "sgd", grown = trial.batch == 32;
    EXPECT_EQ(before.train.batch, 8);
    EXPECT_EQ(before.train.steps, 30);
    EXPECT_DOUBLE_EQ(rate(before, 0), 0.02);
    EXPECT_EQ(after.train.steps, 64 / trial.batch);
    EXPECT_DOUBLE_EQ(rate(after, 0), !grown ? 0.02 : sgd ? 0.08 : 0.04);
    // AdamW's, beside Muon's.
    if (sgd) continue;
    EXPECT_DOUBLE_EQ(rate(after, 1), (grown ? 2 : 1) * rate(before, 1));
  }
  EXPECT_EQ(e.initial()[0].fork, e.initial()[1].fork);
  EXPECT_NE(e.initial()[0].fork, e.initial()[2].fork);
  EXPECT_NE(e.initial()[0].id, e.initial()[1].id);
}

// arXiv:2405.14578: largest at the noise scale, the same an octave below and above it.
TEST(ACentre, MaySurge) {
  const std::string head =
                        "orthrus_study: 1\nname: s\nsearch:\n  parameters:\n    batch_size: "
                        "{values: [32, 64, 128, 512]}\n"
                        "    lr: {center: {rule: surge, at: {batch_size: 32}, ",
                    tail = "value: 0.1}, multipliers: {log2: [0, 0]}}\n";
  const Expansion e = expand(head + "noise_scale: 64, " + tail);
  std::vector<double> rates;
  for (const Trial& trial : e.initial()) rates.push_back(trial.params["lr"].get<double>());
  ASSERT_EQ(rates.size(), 4U);
  const double top = 0.1 * (std::sqrt(2) + std::sqrt(0.5)) / 2;
  EXPECT_NEAR(rates[0], 0.1, 1e-12);
  EXPECT_NEAR(rates[1], top, 1e-12);
  EXPECT_NEAR(rates[2], 0.1, 1e-12);
  EXPECT_NEAR(rates[3], 2 * top / (std::sqrt(8) + std::sqrt(0.125)), 1e-12);
  try {
    static_cast<void>(expand(head + tail));
    FAIL() << "which batch has the largest rate?";
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("noise_scale"));
  }
}

TEST(Groups, AreOfOneNodeWhereTheyFit) {
  using Nodes = std::vector<std::string>;
  using Map = std::vector<int>;
  const Nodes two{"a", "a", "a", "b", "b", "b"}, turns{"a", "b", "a", "b", "a", "b"};
  EXPECT_EQ(groups_of(two, 2, 0, 0), (Map{0, 0, -1, 1, 1, -1})) << "two are left over";
  EXPECT_EQ(groups_of(turns, 2, 0, 0), (Map{0, 1, 0, 1, -1, -1}))
      << "ranks dealt to nodes in turns";
  EXPECT_EQ(groups_of(two, 1, 0, 0), (Map{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(groups_of(two, 1, 0, 2), (Map{0, 1, -1, -1, -1, -1})) << "no more than asked for";
  EXPECT_EQ(groups_of(two, 2, 1, 0), (Map{-1, 0, 0, 1, 1, -1})) << "the first only schedules";
  // Larger than a node: node by node, as they come.
  EXPECT_EQ(groups_of(two, 4, 0, 0), (Map{0, 0, 0, 0, -1, -1}));
  EXPECT_EQ(groups_of(turns, 6, 0, 0), (Map{0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(groups_of(turns, 4, 0, 0), (Map{0, 0, 0, -1, 0, -1}));
  // The first rank's node is too small: it schedules, and trains nothing.
  EXPECT_EQ(groups_of({"small", "b", "b", "c", "c"}, 2, 0, 0), (Map{-1, 0, 0, 1, 1}));
}

TEST(ABatchThatGrows, IsRefusedWhereStepsOfABatchAreAskedFor) {
  const auto refusal = [](const std::string& more, const std::string& price = "") -> std::string {
    try {
      static_cast<void>(expand(R"(orthrus_study: 1
name: s
probes: {gns: {every: 5}}
search:
  parameters:
    batch_size: 8
    lr: 0.02
    gns_ramp.geometry: {values: [none, l2]}
)" + price + more));
    } catch (const ConfigError& e) {
      return e.what();
    }
    return "accepted";
  };
  const std::string budget = "budget: {max_examples: 640}\n";
  EXPECT_EQ(refusal(budget), "accepted");
  EXPECT_THAT(refusal(budget, "    gns_ramp.price.second: 1\n"),
              testing::HasSubstr("gns_ramp.price.second"));
  EXPECT_THAT(refusal(budget + "execution: {exclusive: true}\n"),
              testing::HasSubstr("execution.exclusive"));
  EXPECT_THAT(refusal(budget + "wsd_branch: {horizons: 2}\n"), testing::HasSubstr("wsd_branch"));
}

TEST(ACell, IsReportedWithFreshSeedsAtItsBestRate) {
  const Expansion e = expand(tuned_study);
  Campaign campaign(e);
  const auto all = run(
      e, {1.0}, [](std::size_t) { return 0; }, campaign);
  EXPECT_EQ(all.size(), 2U * (3 * 2 + 2));
  int reports = 0;
  for (const auto& [index, trial] : campaign.trials()) {
    if (trial.role != "report") continue;
    ++reports;
    EXPECT_EQ(trial.params["lr"], 1.0);
    EXPECT_GE(trial.seed, 10);
  }
  EXPECT_EQ(reports, 4);
  EXPECT_FALSE(campaign.tuned().at(0).edge_optimum);
  EXPECT_EQ(campaign.tuned().at(0).extensions, 0);
}

TEST(ACell, IsExtendedByTwoRatesAtAnEdgeUntilTheBestOneLiesWithin) {
  const Expansion e = expand(tuned_study);
  Campaign campaign(e);
  // 0.5 … 2 reach down to 0.125 and 0.03125: 1/16 lies within.
  run(
      e, {1.0 / 16}, [](std::size_t) { return 0; }, campaign);
  EXPECT_EQ(campaign.tuned().at(0).extensions, 2);
  EXPECT_FALSE(campaign.tuned().at(0).edge_optimum);
  EXPECT_DOUBLE_EQ(campaign.tuned().at(0).choice.lr, 1.0 / 16);
}

TEST(ACell, WhoseBestRateStaysAtAnEdgeIsMarked) {
  const Expansion e = expand(tuned_study);
  Campaign campaign(e);
  run(
      e, {1e6}, [](std::size_t) { return 0; }, campaign);
  EXPECT_EQ(campaign.tuned().at(1).extensions, 3);
  EXPECT_TRUE(campaign.tuned().at(1).edge_optimum);
  EXPECT_DOUBLE_EQ(campaign.tuned().at(1).choice.lr, 128);  // 2·2^6
}

TEST(ACell, OfWhichEveryRateDivergesHasNothingToReport) {
  const Expansion e = expand(tuned_study);
  Campaign campaign(e);
  run(
      e, {1.0, 1e-9}, [](std::size_t) { return 0; }, campaign);
  for (const auto& [index, trial] : campaign.trials()) EXPECT_EQ(trial.role, "tune");
}

TEST(AStudy, HasTheSameTrialsInWhateverOrderTheyEnd) {
  const Expansion e = expand(tuned_study);
  Campaign first(e);
  const auto all = run(
      e, {0.2, 1.5}, [](std::size_t) { return 0; }, first);
  for (const unsigned seed : {1U, 2U, 3U, 4U}) {
    std::mt19937 random(seed);
    Campaign other(e);
    EXPECT_EQ(run(
                  e, {0.2, 1.5}, [&](std::size_t n) { return random() % n; }, other),
              all);
  }
}

// ---- successive halving -----------------------------------------------------------------------

constexpr const char* halved_study =
    "orthrus_study: 1\nname: s\nbudget: {max_examples: 6400}\n"
    "search:\n  method: asha\n  early_terminate: {min_examples: 600}\n  parameters:\n"
    "    batch_size: {values: [8, 64]}\n"
    "    lr: {values: [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]}\n";

/// Losses fall with the steps, towards what the rate can reach; a large batch is behind all along.
Json on_its_rung(const Trial& trial) {
  const double lr = trial.params["lr"];
  const auto loss = [&](std::int64_t steps) {
    return std::abs(std::log2(lr) - 4.1) + 1000.0 / static_cast<double>(steps);
  };
  Json rungs = Json::array();
  for (const std::int64_t rung : trial.rungs) {
    if (trial.until == 0 || rung <= trial.until) rungs.push_back(loss(rung));
  }
  if (lr == 512) return {{"index", trial.index}, {"state", "diverged"}, {"rungs", Json::array()}};
  return {
      {"index", trial.index}, {"state", trial.until > 0 ? "paused" : "complete"}, {"rungs", rungs}};
}

TEST(SuccessiveHalving, TakesAThirdFromRungToRungWithinABatchSize) {
  const Expansion e = expand(halved_study);
  EXPECT_THAT(e.initial()[0].rungs, ElementsAre(75, 225, 675));
  EXPECT_THAT(e.initial()[10].rungs, ElementsAre(9, 28, 84));
  // 10, 3, 1 and 1 of each batch size.
  EXPECT_EQ(e.runs().size(), 2U * (10 + 3 + 1 + 1));
  std::map<std::int64_t, std::string> first;
  for (const unsigned seed : {0U, 1U, 2U, 3U}) {
    std::mt19937 random(seed);
    Campaign campaign(e);
    int runs = 0;
    for (auto due = campaign.due(); !due.empty(); due = campaign.due(), ++runs) {
      const Json record = on_its_rung(*due[random() % due.size()]);
      campaign.record(record);
      EXPECT_TRUE(campaign.has(record));
    }
    EXPECT_EQ(runs, 30);
    ASSERT_TRUE(campaign.complete());
    std::map<std::int64_t, std::string> all;
    for (const auto& [index, result] : campaign.results()) {
      all[index] = result["state"].get<std::string>() + std::to_string(result["rungs"].size());
    }
    if (first.empty()) first = all;
    EXPECT_EQ(all, first);
    for (const std::int64_t batch : {0, 10}) {
      EXPECT_EQ(all[batch + 4], "complete3");  // 16
      EXPECT_EQ(all[batch + 5], "pruned2");
      EXPECT_EQ(all[batch + 3], "pruned2");
      EXPECT_EQ(all[batch + 0], "pruned1");
      EXPECT_EQ(all[batch + 9], "diverged0");
    }
  }
}

TEST(SuccessiveHalving, GoesOnFromLastWordsAlone) {
  const Expansion e = expand(halved_study);
  Campaign whole(e);
  for (auto due = whole.due(); !due.empty(); due = whole.due()) whole.record(on_its_rung(*due[0]));
  // As after a kill: what each trial said last, in any order.
  Campaign resumed(e);
  for (auto at = whole.results().rbegin(); at != whole.results().rend(); ++at)
    resumed.record(at->second);
  EXPECT_TRUE(resumed.complete());
  EXPECT_EQ(resumed.results(), whole.results());
}

TEST(SuccessiveHalving, IsRefusedWhereItMeansNothing) {
  const auto said = [](const std::vector<std::string>& set) {
    return error_of([&] { expand(halved_study, set); });
  };
  EXPECT_THAT(said({"search.early_terminate.min_examples=6400"}), HasSubstr("no rung"));
  EXPECT_THAT(said({"search.early_terminate.min_examples=0"}), HasSubstr("come together"));
  EXPECT_THAT(said({"search.method=grid"}), HasSubstr("come together"));
  std::string tuned = halved_study;
  tuned.replace(tuned.find("{values: [1,"), 8, "{extend_on_edge: 1, values:");
  tuned += "    seed: {tune: [0], report: [1]}\n";
  EXPECT_THAT(error_of([&] { expand(tuned); }), HasSubstr("give a wider grid"));
  EXPECT_THAT(error_of([] {
                expand_parameters(
                    "  method: asha\n  early_terminate: {min_examples: 600}\n  samples: 9\n"
                    "  parameters: {batch_size: {distribution: uniform, min: 1, max: 9}, lr: 1}\n");
              }),
              HasSubstr("batch_size: asha compares trials of one batch size"));
}

TEST(SuccessiveHalving, TakesTheBestOfDraws) {
  const Expansion e = expand_parameters(
      "  method: asha\n  early_terminate: {min_examples: 600}\n  samples: 27\n  parameters:\n"
      "    batch_size: {values: [8, 64]}\n"
      "    lr: {distribution: log_uniform, min: 1, max: 256}\n"
      "    momentum: {distribution: uniform, min: 0.5, max: 0.9}\n");
  ASSERT_EQ(e.initial().size(), 54U);
  EXPECT_EQ(e.cells().size(), 2U);
  Campaign campaign(e);
  for (auto due = campaign.due(); !due.empty(); due = campaign.due())
    campaign.record(on_its_rung(*due[0]));
  ASSERT_TRUE(campaign.complete());
  for (const std::int64_t batch : {8, 64}) {
    // Losses of a rung differ by the rate alone: the nearest one to 2^4.1 goes to the end.
    double nearest = 1e9, ended = 0;
    int complete = 0;
    for (const Trial& trial : e.initial()) {
      if (trial.params["batch_size"] != batch) continue;
      const double off = std::abs(std::log2(trial.params["lr"].get<double>()) - 4.1);
      nearest = std::min(nearest, off);
      if (campaign.results().at(trial.index)["state"] != "complete") continue;
      ended = off;
      ++complete;
    }
    EXPECT_EQ(complete, 1);
    EXPECT_EQ(ended, nearest);
  }
}

TEST(SuccessiveHalving, ComparesMeansOverSeedsAndReportsTheBestWithOthers) {
  std::string text = halved_study;
  text += "    seed: {tune: [0, 1], report: [10, 11, 12]}\n";
  const Expansion e = expand(text);
  EXPECT_EQ(e.most(), 2 * (10 * 2 + 3));
  EXPECT_EQ(e.runs().size(), 2U * 2U * (10 + 3 + 1 + 1));
  for (const unsigned order : {0U, 1U, 2U}) {
    std::mt19937 random(order);
    Campaign campaign(e);
    for (auto due = campaign.due(); !due.empty(); due = campaign.due()) {
      const Trial& trial = *due[random() % due.size()];
      Json record = on_its_rung(trial);
      // One seed makes the rate 64 look best, the other worst.
      if (trial.params["lr"] == 64) {
        for (Json& loss : record["rungs"])
          loss = loss.get<double>() + (trial.params["seed"] == 0 ? -3 : 3);
      }
      record["steps_to_target"] = nullptr;
      record["final_val"] = std::abs(std::log2(trial.params["lr"].get<double>()) - 4.1);
      campaign.record(record);
      EXPECT_TRUE(campaign.has(record));
    }
    ASSERT_TRUE(campaign.complete());
    std::vector<std::pair<double, std::int64_t>> reported;
    for (const auto& [index, trial] : campaign.trials()) {
      if (trial.role == "report")
        reported.emplace_back(trial.params["lr"].get<double>(), trial.params["seed"]);
    }
    EXPECT_THAT(reported,
                ElementsAre(std::pair(16.0, 10), std::pair(16.0, 11), std::pair(16.0, 12),
                            std::pair(16.0, 10), std::pair(16.0, 11), std::pair(16.0, 12)));
    EXPECT_EQ(campaign.tuned().at(0).choice.lr, 16);
  }
}

// ---- telescopes ---------------------------------------------------------------------------------

std::string telescoping_study(
    const std::string& telescope = "{over: workload.rows, of: [lr, weight_decay]}") {
  return "orthrus_study: 1\nname: s\nbudget: {max_examples: 6400}\n"
         "task: {builtin: noisy_quadratic}\nsearch:\n  method: telescoping\n  telescope: " +
         telescope +
         "\n  parameters:\n"
         "    workload.rows: {values: [8, 16, 32, 64]}\n"
         "    workload.cols: {values: [4, 8, 16, 32]}\n"
         "    lr: {log2: [-10, -3]}\n"
         "    weight_decay: {log2: [-9, -2]}\n"
         "    seed: {values: [1, 2]}\n"
         "  zip: [[workload.rows, workload.cols]]\n";
}

/// The loss is a bowl in the logarithms, with noise of either sign; the best rate's distance from
/// where it is for a wide model falls as 1/width.
Json in_its_bowl(const Trial& trial, double exponent) {
  const double rows = trial.params["workload.rows"];
  const double lr = std::log2(trial.params["lr"].get<double>());
  const double decay = std::log2(trial.params["weight_decay"].get<double>());
  const double best = -6.2 + exponent * std::log2(rows / 8) + 1.6 * 8 / rows;
  const double noise = trial.params["seed"] == 1 ? 0.004 : -0.004;
  const double loss = 1 + std::pow(lr - best, 2) + 0.5 * std::pow(decay + 5.3, 2) + noise * lr;
  return {{"index", trial.index},
          {"state", "complete"},
          {"steps_to_target", nullptr},
          {"final_val", loss}};
}

TEST(ATelescope, FindsTheBestOfEachSizeWithTheTrialsItAnnounced) {
  for (const double exponent : {0.0, -1.0}) {
    const Expansion e = expand(
        exponent == 0
            ? telescoping_study()
            : telescoping_study("{over: workload.rows, of: [lr, weight_decay], carry: {lr: -1}}"));
    EXPECT_EQ(e.initial().size(), 2U * 64);
    EXPECT_EQ(e.most(), 2 * (64 + 25 + 9 + 1));
    std::vector<Json> first;
    for (const unsigned order : {0U, 1U, 2U}) {
      std::mt19937 random(order);
      Campaign campaign(e);
      int decided = 0;
      for (auto due = campaign.due(); !due.empty(); due = campaign.due()) {
        const Json record = in_its_bowl(*due[random() % due.size()], exponent);
        decided += static_cast<int>(campaign.record(record).size());
      }
      ASSERT_TRUE(campaign.complete());
      EXPECT_EQ(decided, 1);
      EXPECT_EQ(std::ssize(campaign.trials()), e.most());
      std::vector<Json> trials;
      std::map<double, std::set<double>> rates;
      for (const auto& [index, trial] : campaign.trials()) {
        trials.push_back(trial.params);
        EXPECT_EQ(trial.params["workload.rows"].get<int>(),
                  2 * trial.params["workload.cols"].get<int>());
        rates[trial.params["workload.rows"]].insert(
            std::log2(trial.params["lr"].get<double>()) -
            exponent * std::log2(trial.params["workload.rows"].get<double>() / 8));
      }
      if (first.empty()) first = trials;
      EXPECT_EQ(trials, first);
      // Best rates at 2^-4.6, -5.4, -5.8, and nearest to them -5, -5, -6.
      EXPECT_THAT(rates[16], ElementsAre(-7, -6, -5, -4, -3));
      EXPECT_THAT(rates[32], ElementsAre(-6, -5, -4));
      EXPECT_THAT(rates[64], ElementsAre(-6));
      const Tuned& tuned = campaign.tuned().at(0);
      EXPECT_EQ(std::log2(tuned.choice.lr), -6 + exponent * 3);
      EXPECT_THAT(tuned.best, ElementsAre(Point::value_type("workload.rows", 64),
                                          Point::value_type("workload.cols", 32),
                                          Point::value_type("weight_decay", std::exp2(-5))));
      // As after a kill.
      Campaign resumed(e);
      for (const auto& [index, record] : campaign.results()) resumed.record(record);
      EXPECT_EQ(resumed.results(), campaign.results());
      EXPECT_TRUE(resumed.complete());
    }
  }
}

TEST(ATelescope, OfWhichEverythingDivergesGoesNoFurther) {
  const Expansion e = expand(telescoping_study());
  Campaign campaign(e);
  for (auto due = campaign.due(); !due.empty(); due = campaign.due())
    campaign.record({{"index", due[0]->index},
                     {"state", "diverged"},
                     {"steps_to_target", nullptr},
                     {"final_val", 3.0}});
  EXPECT_TRUE(campaign.complete());
  EXPECT_EQ(campaign.trials().size(), 128U);
  EXPECT_TRUE(campaign.tuned().at(0).choice.censored);
}

TEST(ATelescope, IsRefusedWhereItMeansNothing) {
  const auto said = [](const std::string& telescope) {
    return error_of([&] { expand(telescoping_study(telescope)); });
  };
  EXPECT_THAT(said("{of: [lr]}"), HasSubstr("come together"));
  EXPECT_THAT(said("{over: workload.depth}"),
              HasSubstr("'workload.depth' is no parameter with two sizes"));
  EXPECT_THAT(said("{over: workload.rows, of: [weight_decay]}"), HasSubstr("lr is always"));
  EXPECT_THAT(said("{over: workload.rows, of: [lr, momentum]}"),
              HasSubstr("'momentum' is no parameter with two positive values"));
  EXPECT_THAT(said("{over: workload.rows, carry: {weight_decay: 1}}"),
              HasSubstr("'weight_decay' is not in `of`"));
}

TEST(AStudy, BeginsWithWhatTakesLongest) {
  const Expansion e =
      expand_parameters("  parameters: {train.steps: {values: [5, 50, 500]}, batch_size: 4}\n");
  Campaign campaign(e);
  std::vector<std::int64_t> order;
  for (const Trial* trial : campaign.due()) order.push_back(trial->index);
  EXPECT_THAT(order, ElementsAre(2, 1, 0));
}

}  // namespace
}  // namespace orthrus::runner
