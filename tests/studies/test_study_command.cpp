// What `orthrus study` is made of: laws are found again in what they made, what cannot be fitted is
// refused by file, line and key, and a result that does not come out again is seen.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <map>
#include <nlohmann/json.hpp>
#include <orthrus/error.hpp>
#include <string>
#include <utility>
#include <vector>

#include "runtime/cli/records.hpp"
#include "runtime/cli/study_fit.hpp"
#include "runtime/cli/study_reproduce.hpp"

namespace orthrus::cli {
namespace {

using nlohmann::ordered_json;
using Lines = std::vector<ordered_json>;

std::string write(const std::string& text) {
  const auto file = std::filesystem::path(testing::TempDir()) /
                    (std::string("study-") +
                     testing::UnitTest::GetInstance()->current_test_info()->name() + ".jsonl");
  std::ofstream(file) << text;
  return file.string();
}

std::string write(const Lines& records) {
  std::string text;
  for (const ordered_json& record : records) text += record.dump() + "\n";
  return write(text);
}

/// Options as the command leaves them when only the law is named.
FitOptions options_for(const std::string& law) {
  FitOptions options;
  for (const FitLaw& row : fit_laws()) {
    if (row.name == law) options.law = &row;
  }
  const std::string x = options.law->x;
  const std::size_t comma = x.find(',');
  options.x = {x.substr(0, comma)};
  if (comma != std::string::npos) options.x.push_back(x.substr(comma + 1));
  options.y = options.law->y;
  return options;
}

ordered_json fit(const Lines& records, FitOptions options) {
  options.file = write(records);
  const FitReport report = fit_file(options);
  // People are told what programs are.
  for (const auto& warning : report.document["warnings"]) {
    EXPECT_NE(report.text.find(warning.get<std::string>()), std::string::npos);
  }
  return report.document;
}
ordered_json fit(const Lines& records, const std::string& law) {
  return fit(records, options_for(law));
}

double parameter(const ordered_json& document, const char* name) {
  return document["parameters"][name]["value"].get<double>();
}

void expect_near(double value, double expected, double share) {
  EXPECT_LE(std::abs(value - expected), share * std::abs(expected))
      << value << " is not " << expected;
}
void expect_parameters(const ordered_json& document,
                       std::initializer_list<std::pair<const char*, double>> expected,
                       double share) {
  for (const auto& [name, value] : expected) {
    SCOPED_TRACE(name);
    expect_near(parameter(document, name), value, share);
  }
}

bool warns(const ordered_json& document, const std::string& text) {
  for (const auto& warning : document["warnings"]) {
    if (warning == text) return true;
  }
  return false;
}

double octave(int k) { return std::pow(2.0, k); }

Lines curve(const std::function<double(double)>& law, int first = 4, int last = 12,
            const char* x = "batch_size", const char* y = "steps_to_target") {
  Lines out;
  for (int k = first; k <= last; ++k) out.push_back({{x, octave(k)}, {y, law(octave(k))}});
  return out;
}

double hyper(double b) { return 100 + 6400 / b; }

/// Three seeds whose geometric mean is the law.
Lines with_seeds(double spread, int first = 4, int last = 12) {
  Lines out;
  for (int k = first; k <= last; ++k) {
    for (const double d : {-spread, 0.0, spread}) {
      out.push_back(
          {{"batch_size", octave(k)}, {"steps_to_target", hyper(octave(k)) * std::exp(d)}});
    }
  }
  return out;
}

ordered_json definition(const ordered_json& document, const std::string& name) {
  for (const auto& row : document["cbs_definitions"]) {
    if (row["definition"] == name) return row;
  }
  ADD_FAILURE() << name << " is not defined";
  return {};
}

TEST(FitFile, FindsTheHyperbola) {
  FitOptions options = options_for("hyper");
  options.b_ref = 50;
  const ordered_json found = fit(curve(hyper), options);
  EXPECT_EQ(found["t"], "fit");
  EXPECT_EQ(found["model"], "hyper");
  EXPECT_EQ(found["n_points"], 9);
  EXPECT_EQ(found["ci_kind"], "residual");
  expect_parameters(found, {{"a", 100}, {"b", 6400}}, 1e-8);
  expect_near(found["S_min"], 100, 1e-8);
  expect_near(found["E_min"], 6400, 1e-8);
  EXPECT_EQ(found["cbs"]["definition"], "mccandlish");
  EXPECT_EQ(found["cbs"]["unit"], "examples");
  expect_near(found["cbs"]["value"], 64, 1e-8);
  expect_near(definition(found, "overhead20")["value"], 1.2 * 50 + 0.2 * 64, 1e-8);
  EXPECT_LT(found["rms_log"].get<double>(), 1e-8);
  EXPECT_EQ(found["accepted"], true);
  for (const auto& point : found["points"]) {
    expect_near(point["fitted"], hyper(point["x"].get<double>()), 1e-8);
  }
  EXPECT_TRUE(warns(found, "fewer than 3 seeds at some batch size"));
}

TEST(FitFile, TakesIntervalsFromSeeds) {
  FitOptions options = options_for("hyper");
  options.bootstrap.resamples = 400;
  const auto width = [](const ordered_json& found) {
    EXPECT_EQ(found["ci_kind"], "stratified");
    EXPECT_EQ(found["resamples"], 400);
    EXPECT_EQ(found["n_records"], 27);
    EXPECT_EQ(found["n_points"], 9);
    const ordered_json cbs = found["cbs"];
    expect_near(cbs["value"], 64, 1e-6);
    EXPECT_LT(cbs["lo"].get<double>(), 64);
    EXPECT_GT(cbs["hi"].get<double>(), 64);
    return std::log(cbs["hi"].get<double>() / cbs["lo"].get<double>());
  };
  const ordered_json narrow = fit(with_seeds(0.02), options);
  EXPECT_FALSE(warns(narrow, "fewer than 3 seeds at some batch size"));
  // Ten times the noise, ten times the interval, but for its curvature.
  expect_near(width(fit(with_seeds(0.2), options)) / width(narrow), 10, 0.1);

  // The same draws whatever the order of the records, others with another seed.
  Lines noisy = with_seeds(0.1);
  const ordered_json once = fit(noisy, options);
  std::reverse(noisy.begin(), noisy.end());
  EXPECT_EQ(fit(noisy, options), once);
  options.bootstrap.seed = 1;
  EXPECT_NE(fit(noisy, options)["cbs"], once["cbs"]);
  options.bootstrap.resamples = 0;
  const ordered_json none = fit(noisy, options);
  EXPECT_EQ(none["ci_kind"], "none");
  EXPECT_FALSE(none["cbs"].contains("lo"));
  // One batch size with one seed.
  options.bootstrap.resamples = 50;
  noisy.erase(noisy.begin(), noisy.begin() + 2);
  const ordered_json mixed = fit(noisy, options);
  EXPECT_EQ(mixed["ci_kind"], "residual");
  EXPECT_TRUE(warns(mixed, "some batch sizes have one seed: intervals are of residuals"));
}

TEST(FitFile, SaysWhichLawItIs) {
  const Lines bent = curve([](double b) { return 40 + 9000 / std::pow(b, 0.8); });
  expect_parameters(fit(bent, "hyper_alpha"), {{"a", 40}, {"b", 9000}, {"alpha", 0.8}}, 1e-6);
  EXPECT_EQ(fit(bent, "auto")["model"], "hyper_alpha");
  EXPECT_EQ(fit(curve(hyper), "auto")["model"], "hyper");
  const ordered_json plain = fit(bent, "hyper");
  EXPECT_TRUE(warns(plain, "AICc prefers hyper_alpha"));
  EXPECT_TRUE(warns(plain, "the residuals bend: the law is another one"));
  std::map<std::string, double> aicc;
  for (const auto& model : plain["models"]) aicc[model["model"]] = model["aicc"];
  ASSERT_EQ(aicc.size(), 3U);
  EXPECT_LT(aicc["hyper_alpha"], std::min(aicc["hyper"], aicc["three_term_inv"]));
  EXPECT_EQ(aicc["hyper"], plain["aicc"]);
  const ordered_json far = fit(curve([](double b) { return 1e4 / (b * b); }, 4, 8), "hyper");
  EXPECT_EQ(far["accepted"], false);
  EXPECT_TRUE(warns(far, "a target reached in under 20 steps is coarse"));
}

TEST(FitFile, FindsTheLawWithAnOptimum) {
  const ordered_json found =
      fit(curve([](double b) { return 30 * std::pow(1 - 2 / std::sqrt(b), -1 / 0.7); }, 3, 14),
          "three_term_inv");
  expect_parameters(found, {{"s", 30}, {"d", 2}, {"beta", 0.5}, {"gamma", 0.7}}, 1e-3);
  // B·S is least where its derivative is 0: B^beta = d (1 + beta/gamma).
  EXPECT_EQ(found["cbs"]["definition"], "token_optimal");
  expect_near(found["cbs"]["value"], std::pow(2 * (1 + 0.5 / 0.7), 2), 5e-3);
}

TEST(FitFile, FindsPowerLaws) {
  FitOptions options = options_for("power");
  options.x = {"N"};
  options.y = "B";
  const ordered_json root =
      fit(curve([](double n) { return 3 * std::sqrt(n); }, 0, 3, "N", "B"), options);
  expect_parameters(root, {{"factor", 3}, {"exponent", 0.5}}, 1e-9);
  EXPECT_FALSE(root.contains("saturating"));

  // ln y = ln x + d(+1, −1, −1, +1): the slope is 1, its standard error d·√(4/2/5)/ln 2, and
  // Student's t of two degrees of freedom is 4.302653 at 97.5 %.
  Lines noisy;
  for (const int k : {0, 1, 2, 3}) {
    const double sign = k == 0 || k == 3 ? 1 : -1;
    noisy.push_back({{"batch_size", octave(k)}, {"lr", octave(k) * std::exp(0.1 * sign)}});
  }
  const ordered_json exponent = fit(noisy, "lr_exponent")["parameters"]["exponent"];
  const double error = 0.1 * std::sqrt(4.0 / 2 / 5) / std::log(2.0);
  expect_near(exponent["value"], 1, 1e-9);
  expect_near(exponent["error"], error, 1e-9);
  expect_near(exponent["lo"], 1 - 4.302653 * error, 1e-5);
  expect_near(exponent["hi"], 1 + 4.302653 * error, 1e-5);

  const ordered_json knee =
      fit(curve([](double b) { return 0.01 * std::min(b, 100.0); }, 4, 12, "batch_size", "lr"),
          "lr_exponent");
  EXPECT_EQ(knee["saturating"]["preferred"], true);
  expect_near(knee["saturating"]["knee"], 100, 1e-4);
  expect_near(knee["saturating"]["exponent"], 1, 1e-4);
}

TEST(FitFile, FindsCriticalBatchesAlongTheLoss) {
  // D = D_min·(1 + B/200), and L = 30·D_min^(-¼): B_crit is the same at every loss.
  Lines lines;
  for (const double batch : {16.0, 64.0, 256.0, 1024.0}) {
    for (double least = 1e3; least < 1e6; least *= 3) {
      lines.push_back({{"batch_size", batch},
                       {"examples", least * (1 + batch / 200)},
                       {"val_loss", 30 / std::pow(least, 0.25)}});
    }
  }
  const ordered_json law = fit(lines, "power_lines");
  ASSERT_EQ(law["targets"].size(), 5U);
  for (const auto& t : law["targets"]) {
    expect_near(t["B_crit"].get<double>(), 200, 1e-4);
    expect_near(t["D_min"].get<double>(), std::pow(30 / t["target"].get<double>(), 4), 1e-4);
  }
  EXPECT_NEAR(law["growth"]["exponent"].get<double>(), 0, 1e-4);
}

TEST(FitFile, FindsTheLawOfLosses) {
  Lines plain, sized;
  for (int m = 4; m <= 9; ++m) {
    for (int k = 8; k <= 13; ++k) {
      const double loss = 2 + 20 / std::sqrt(octave(m)) + 300 / std::pow(octave(k), 0.6);
      plain.push_back({{"batch_size", octave(m)}, {"step", octave(k)}, {"val_loss", loss}});
      for (const double n : {1e4, 1e6, 1e8}) {
        sized.push_back(
            {{"M", octave(m)}, {"K", octave(k)}, {"N", n}, {"L", loss + 50 / std::pow(n, 0.3)}});
      }
    }
  }
  const ordered_json law = fit(plain, "three_term");
  expect_parameters(law, {{"E", 2}, {"B", 20}, {"beta", 0.5}, {"C", 300}, {"gamma", 0.6}}, 1e-3);
  expect_near(law["best_batch"]["exponent"], 0.6 / 1.1, 1e-3);
  expect_near(law["best_batch"]["factor"], std::pow(0.5 * 20 / (0.6 * 300), 1 / 1.1), 1e-2);
  EXPECT_FALSE(law["parameters"].contains("A"));
  FitOptions options = options_for("three_term");
  options.x = {"M", "K", "N"};
  options.y = "L";
  expect_parameters(fit(sized, options),
                    {{"E", 2}, {"B", 20}, {"C", 300}, {"A", 50}, {"alpha", 0.3}}, 1e-2);
}

TEST(FitFile, FindsWhatMessagesCost) {
  FitOptions options = options_for("alpha_beta");
  options.y = "median_ms";
  options.collective = ring_shape("all_gather", 4);
  // 5 us and 10 GB/s, an all-gather of four in a ring.
  Lines ring = curve([](double n) { return 1e3 * (3 * 5e-6 + 0.75 * n / 10e9); }, 3, 26, "bytes",
                     "median_ms");
  std::reverse(ring.begin(), ring.end());
  const ordered_json one = fit(ring, options);
  ASSERT_EQ(one["pieces"].size(), 1U);
  expect_near(one["pieces"][0]["latency_s"], 5e-6, 1e-6);
  expect_near(one["pieces"][0]["bytes_per_s"], 10e9, 1e-6);
  expect_near(one["pieces"][0]["half_bytes"], 5e4, 1e-6);
  options.collective = ring_shape("all_reduce", 4);  // twice the messages, twice the bytes
  const ordered_json twice = fit(ring, options);
  expect_near(twice["pieces"][0]["latency_s"], 2.5e-6, 1e-6);
  expect_near(twice["pieces"][0]["bytes_per_s"], 20e9, 1e-6);

  const ordered_json eager =
      fit(curve([](double n) { return n < 65536 ? 2e-6 + n / 4e9 : 12e-6 + n / 10e9; }, 3, 26,
                "bytes", "seconds"),
          "alpha_beta");
  ASSERT_EQ(eager["pieces"].size(), 2U);
  expect_near(eager["pieces"][0]["latency_s"], 2e-6, 1e-6);
  expect_near(eager["pieces"][1]["latency_s"], 12e-6, 1e-6);
  EXPECT_EQ(eager["pieces"][1]["from_bytes"], 65536);
}

TEST(FitFile, FindsTheSerialFraction) {
  Lines times;
  for (const int p : {4, 1, 2, 8}) {
    times.push_back({{"ranks", p}, {"seconds", 8 * (0.1 + 0.9 / p)}});
  }
  const ordered_json found = fit(times, "amdahl");
  expect_near(parameter(found, "s"), 0.1, 1e-9);
  double before = 0;
  for (const auto& point : found["points"]) {
    const auto p = point["ranks"].get<double>();
    EXPECT_GT(p, before);
    before = p;
    expect_near(point["efficiency"], 1 / (0.1 * p + 0.9), 1e-9);
    if (p > 1) expect_near(point["serial_fraction"], 0.1, 1e-9);
  }
}

/// What is said when `records` cannot be fitted.
std::string refusal(const Lines& records, const std::string& law) {
  try {
    (void)fit(records, law);
  } catch (const DataError& error) {
    return error.what();
  }
  return "fitted";
}

TEST(FitFile, SaysHowManyCurvesPowerLinesNeed) {
  Lines lines;
  for (const double batch : {16.0, 64.0}) {
    for (double d = 1e3; d < 1e5; d *= 3) {
      lines.push_back({{"batch_size", batch}, {"examples", d}, {"val_loss", 30 / std::sqrt(d)}});
    }
  }
  EXPECT_NE(refusal(lines, "power_lines").find("batch_size: 2 different values"),
            std::string::npos);
  lines.push_back({{"batch_size", 256}, {"examples", 1e3}, {"val_loss", 1}});
  EXPECT_NE(refusal(lines, "power_lines").find("batch 256 has 1 records"), std::string::npos);
}

TEST(FitFile, SaysHowManyPointsALawNeeds) {
  const std::vector<std::pair<std::string, int>> needs{
      {"hyper", 3}, {"auto", 3}, {"hyper_alpha", 4}, {"three_term_inv", 5}};
  for (const auto& [law, needed] : needs) {
    // Seeds are no further batch sizes.
    const std::string said = refusal(with_seeds(0.1, 4, 2 + needed), law);
    EXPECT_NE(
        said.find("batch_size: " + std::to_string(needed - 1) + " different values, the law " +
                  law + " needs at least " + std::to_string(needed)),
        std::string::npos)
        << said;
    FitOptions enough = options_for(law);
    enough.bootstrap.resamples = 10;
    EXPECT_EQ(fit(curve(hyper, 4, 3 + needed), enough)["n_points"], needed);
  }
  const auto expect_said = [](const std::string& said, const std::string& what) {
    EXPECT_NE(said.find(what), std::string::npos) << said;
  };
  const Lines times = curve([](double) { return 1e-6; }, 0, 3, "bytes", "seconds");
  expect_said(refusal(times, "alpha_beta"), "bytes: 4 different values");
  Lines ranks = curve([](double p) { return 1 / p; }, 0, 1, "ranks", "seconds");
  expect_said(refusal(ranks, "amdahl"), "needs at least 3");
  ranks.push_back(ranks.front());
  expect_said(refusal(ranks, "amdahl"), "ranks: 1 stands in several records");
  Lines losses;
  for (int k = 1; k <= 6; ++k) {
    losses.push_back({{"batch_size", 16}, {"step", k}, {"val_loss", 1 + 1.0 / k}, {"lr", 1}});
  }
  expect_said(refusal(losses, "three_term"), "batch_size: 1 different values");
  expect_said(refusal(losses, "lr_exponent"), "batch_size: 1 different values");
  losses.pop_back();
  expect_said(refusal(losses, "three_term"), "5 records, the law three_term needs at least 6");
}

TEST(Records, AreReadFromNestedObjectsAndPastBlankLines) {
  const std::string file = write(
      "{\"a\": 1, \"in\": {\"b\": 2.5, \"c.d\": 7}, \"in.b\": 3}\r\n\n"
      "{\"in\": {\"b\": 4, \"c.d\": 8}, \"a\": 1e3}");
  const Records records = read_records(file, {"a", "in.b", "in.c.d"});
  EXPECT_EQ(records.columns, (std::vector<std::vector<double>>{{1, 1000}, {3, 4}, {7, 8}}));
  EXPECT_EQ(records.warning, "");
}

TEST(Records, ThatCannotBeUsedAreNamedByFileLineAndKey) {
  const std::string good = "{\"x\": 16, \"steps\": 500}\n";
  const std::vector<std::pair<std::string, std::string>> cases{
      {R"({"x": 16, "steps": NaN})", "steps: not JSON from column 20 on"},
      {R"({"x": 16, "steps": 1e999})", "steps: not JSON from column"},
      {R"({"x": 16, "steps": null})", "steps: 'null' is not a number"},
      {R"({"x": 16, "steps": "NaN"})", "steps: '\"NaN\"' is not a number"},
      {R"({"x": true, "steps": 9})", "x: 'true' is not a number"},
      {R"({"x": -16, "steps": 9})", "x: -16 is not finite and above zero"},
      {R"({"x": 16, "steps": 0})", "steps: 0 is not finite and above zero"},
      {R"({"x": 16})", "steps: missing; the line has: x"},
      {R"({"x": 16, "step": 9})", "steps: missing (did you mean 'step'?); the line has: "},
      {R"({"x": 16, "steps)", "x: not JSON from column"},
      {"[16, 500]", "not a JSON object"},
      {"sixteen", "not JSON from column 1 on: 'sixteen'"}};
  for (const auto& [bad, what] : cases) {
    const std::string file = write(good + "\n" + bad + "\n" + good);
    try {
      (void)read_records(file, {"x", "steps"});
      ADD_FAILURE() << bad << " was taken";
    } catch (const DataError& error) {
      EXPECT_TRUE(std::string(error.what()).starts_with(file + ":3: " + what)) << error.what();
    }
  }
  EXPECT_THROW((void)read_records(write(std::string("\n \n")), {"x"}), DataError);
  EXPECT_THROW((void)read_records("no/such/file", {"x"}), ConfigError);
}

TEST(Records, LeaveOutALastLineThatWasCutOff) {
  const std::string whole = "{\"x\": 16, \"steps\": 500}";
  // Wherever the writer was stopped.
  for (std::size_t cut = 1; cut < whole.size(); ++cut) {
    const Records records =
        read_records(write(whole + "\n" + whole.substr(0, cut)), {"x", "steps"});
    EXPECT_EQ(records.columns, (std::vector<std::vector<double>>{{16}, {500}})) << cut;
    EXPECT_NE(records.warning.find(":2: the last line is cut off"), std::string::npos) << cut;
  }
  // A line that is wrong before its end is no cut; nor is one that is whole.
  EXPECT_THROW((void)read_records(write(whole + "\n{\"x\": 16, \"steps\": NaN}"), {"x", "steps"}),
               DataError);
  EXPECT_EQ(read_records(write(whole + "\n" + whole), {"x"}).columns[0].size(), 2U);
}

using studies::Experiment;
using studies::Row;

const std::vector<Experiment> made_up{
    {"good", "what holds", "made up",
     [] {
       return std::vector<Row>{{"one", 1, 1, 0}};
     }},
    {"mixed", "what does not all hold", "made up",
     [] {
       return std::vector<Row>{
           {"two", 2, 2.5, 0.5}, {"three", 3, 2.5, 0.4}, {"none", std::nan(""), 1, 9}};
     }},
};

struct Said {
  int code;
  std::string text;
};
Said run(std::vector<std::string> names, bool json) {
  ReproduceOptions options;
  options.names = std::move(names);
  options.json = json;
  testing::internal::CaptureStdout();
  const int code = reproduce(made_up, options);
  return {code, testing::internal::GetCapturedStdout()};
}

TEST(Reproduce, EndsWith70WhereARowIsNotMet) {
  const Said all = run({}, false);
  EXPECT_EQ(all.code, static_cast<int>(ExitCode::internal));
  EXPECT_TRUE(all.text.ends_with("\n2 met, 2 not met\n")) << all.text;
  std::size_t marks = 0;
  for (std::size_t at = all.text.find("NOT MET"); at != std::string::npos;
       at = all.text.find("NOT MET", at + 1)) {
    ++marks;
  }
  EXPECT_EQ(marks, 2U);
  EXPECT_EQ(run({"mixed"}, false).code, static_cast<int>(ExitCode::internal));
  EXPECT_EQ(run({"good"}, false).code, 0);
}

TEST(Reproduce, SaysSoInJson) {
  const Said all = run({}, true);
  EXPECT_EQ(all.code, static_cast<int>(ExitCode::internal));
  const auto document = nlohmann::json::parse(all.text);
  EXPECT_EQ(document["met"], 2);
  EXPECT_EQ(document["not_met"], 2);
  EXPECT_EQ(document["tests"][0]["pass"], true);
  EXPECT_EQ(document["tests"][1]["pass"], false);
  EXPECT_EQ(document["tests"][1]["rows"][1]["pass"], false);
  EXPECT_EQ(document["tests"][1]["rows"][2]["value"], "NaN");
}

}  // namespace
}  // namespace orthrus::cli
