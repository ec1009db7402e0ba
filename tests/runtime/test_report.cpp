// A report is one well-formed page, whatever the run left behind.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/report.hpp"

namespace orthrus::runtime {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using testing::Not;

/// The first thing wrong with the page's tags, or nothing: every tag is closed in order or closes
/// itself, attributes are quoted, and outside of tags '<', '>' and '&' appear only escaped.
std::string first_fault(const std::string& html) {
  std::vector<std::string> open;
  for (std::size_t at = 0; at < html.size(); ++at) {
    const char c = html[at];
    if (c == '>') return "bare '>' at " + std::to_string(at);
    if (c == '&' && html.substr(at, 10).find(';') == std::string::npos)
      return "bare '&' at " + std::to_string(at);
    if (c != '<') continue;
    std::size_t end = at + 1;
    bool quoted = false;
    while (end < html.size() && (quoted || html[end] != '>')) {
      if (html[end] == '"') quoted = !quoted;
      if (html[end] == '<') return "'<' inside a tag at " + std::to_string(end);
      ++end;
    }
    if (end >= html.size()) return "unclosed tag at " + std::to_string(at);
    const std::string tag = html.substr(at + 1, end - at - 1);
    at = end;
    if (tag.starts_with("!DOCTYPE")) continue;
    const std::string name =
        tag.substr(tag.front() == '/', tag.find_first_of(" /", 1) - (tag.front() == '/'));
    if (tag.front() == '/') {
      if (open.empty() || open.back() != tag.substr(1)) {
        return "</" + tag.substr(1) + "> closes <" + (open.empty() ? "" : open.back()) + ">";
      }
      open.pop_back();
    } else if (tag.back() != '/') {
      open.push_back(name);
      if (name == "style") {  // CSS has '>' of its own
        at = html.find("</style>", at);
        if (at == std::string::npos) return "unclosed <style>";
        --at;
      }
    }
  }
  return open.empty() ? "" : "<" + open.back() + "> is not closed";
}

json row(int step) {
  return {{"schema", 1},
          {"step", step},
          {"loss", 2 + std::exp(-step / 50.0)},
          {"lr_multiplier", 1.0},
          {"ms",
           {{"step", 120.0},
            {"gradient", 80.0},
            {"total", 40.0},
            {"reduce", 5.0},
            {"control", 0.5},
            {"update", 28.0},
            {"lmo", 20.0},
            {"gather", 4.0},
            {"copy", 2.0}}},
          {"bytes_sent", 1000000},
          {"bytes_sent_max", 600000},
          {"messages", 12},
          {"update_rms", {0.2, 1.0}},
          {"skipped", false},
          {"items_per_s", 512.0}};
}

std::string metrics(int steps) {
  std::string out;
  for (int s = 1; s <= steps; ++s) {
    json line = row(s);
    if (s % 10 == 0 || s == steps) line["val_loss"] = 2.1 + std::exp(-s / 50.0);
    out += line.dump() + "\n";
  }
  return out;
}

std::string summary(int ranks = 2) {
  json memory = json::array();
  for (int r = 0; r < ranks; ++r) {
    memory.push_back(
        {{"rank", r}, {"weights", 400}, {"gradients", 200}, {"state", 300 + r}, {"work", 100}});
  }
  return json{{"schema", 1},
              {"name", "tiny"},
              {"workload", "noisy_quadratic"},
              {"status", "finished"},
              {"ranks", ranks},
              {"memory", memory},
              {"planned_bytes_per_step", 1000000},
              {"groups",
               {{{"match", "*.weight"}, {"rule", "muon"}, {"lr", 0.02}},
                {{"match", "*"}, {"rule", "adamw"}}}},
              {"weights_hash", "00112233445566778899aabbccddeeff"}}
      .dump();
}

TEST(Report, IsWellFormedForAnyNumberOfSteps) {
  for (const int steps : {0, 1, 2, 3, 59, 60, 111, 1000}) {
    EXPECT_EQ(first_fault(run_report(summary(), metrics(steps), "schema: 1\n")), "")
        << steps << " steps";
  }
}

TEST(Report, NeedsNothingFromOutside) {
  const std::string html = run_report(summary(), metrics(100), "a: b\n");
  for (const char* outside : {"http:", "https:", "<script", "<link", "@import", "url(", "<img"}) {
    EXPECT_THAT(html, Not(HasSubstr(outside)));
  }
}

TEST(Report, EscapesEveryTextOfARun) {
  json s = json::parse(summary());
  const std::string hostile = "<script>alert(\"1\")</script>&'\x01";
  for (const char* key :
       {"name", "workload", "status", "config", "run_dir", "plan_hash", "error", "version"}) {
    s[key] = hostile;
  }
  s["groups"][0]["match"] = hostile;
  s["groups"][0]["rule"] = hostile;
  s["final"]["val_<b>"] = 1.0;
  json line = row(1);
  line["val_<i>\""] = 0.5;
  const std::string html = run_report(s.dump(), line.dump() + "\n" + row(2).dump() + "\n", hostile);
  EXPECT_EQ(first_fault(html), "");
  EXPECT_THAT(html, Not(HasSubstr("<script")));
  EXPECT_THAT(html, Not(HasSubstr("<b>")));
  EXPECT_THAT(html, Not(HasSubstr("<i>")));
  EXPECT_THAT(html, HasSubstr("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;&#39;"));
  const std::vector<RunRecord> runs{{hostile, s.dump(), line.dump()}, {"b", s.dump(), ""}};
  EXPECT_EQ(first_fault(comparison_report(runs, hostile)), "");
  EXPECT_THAT(comparison_report(runs, hostile), Not(HasSubstr("<script")));
}

TEST(Report, OfOneStepShowsItsPoint) {
  const std::string html = run_report(summary(), metrics(1));
  EXPECT_THAT(html, HasSubstr("<circle"));
  EXPECT_THAT(html, HasSubstr("1 step"));
  EXPECT_THAT(html, Not(HasSubstr("nan")));
  EXPECT_THAT(html, Not(HasSubstr("inf\"")));
}

TEST(Report, DoesNotGrowWithTheRun) {
  const std::size_t ten_thousand = run_report(summary(), metrics(10000)).size();
  const std::size_t one_hundred_thousand = run_report(summary(), metrics(100000)).size();
  // Two points per bucket and line, whatever the number of steps; labels get a little longer.
  EXPECT_LT(one_hundred_thousand, 1.1 * static_cast<double>(ten_thousand));
  EXPECT_LT(one_hundred_thousand, 400000U);
}

TEST(Report, KeepsASpikeThatLastsOneStepOfManyThousands) {
  std::string lines;
  for (int s = 1; s <= 20000; ++s) {
    json line = row(s);
    if (s == 12345) line["update_rms"] = {0.2, 77.0};
    lines += line.dump() + "\n";
  }
  // The highest point of a chart decides its scale: a lost spike would lose the tick above it.
  EXPECT_THAT(run_report(summary(), lines), HasSubstr(">10</text>"));
}

TEST(Report, SkipsLinesThatDoNotParse) {
  const std::string whole = metrics(20);
  const std::string torn =
      "not json\n[1]\n{\"step\": null}\n" + whole + "{\"schema\":1,\"step\":21,\"lo";
  EXPECT_EQ(run_report(summary(), torn), run_report(summary(), whole));
  EXPECT_EQ(metrics_summary(torn), metrics_summary(whole));
}

TEST(Report, SurvivesWrongTypesAndMissingKeys) {
  for (const char* s :
       {"", "[]", "{}", "{\"memory\": 3, \"groups\": {}, \"final\": [], \"ranks\": \"two\"}",
        "{\"memory\": [1, {}], \"groups\": [1, {}], \"optimizer_ms\": 3}"}) {
    for (const char* m : {"", "{}\n", "{\"step\": 1}\n",
                          "{\"step\": 1, \"loss\": null, \"ms\": 3, \"update_rms\": [null]}\n"}) {
      EXPECT_EQ(first_fault(run_report(s, m)), "") << s << ' ' << m;
      const std::vector<RunRecord> runs{{"a", s, m}, {"b", s, m}};
      EXPECT_EQ(first_fault(comparison_report(runs)), "") << s << ' ' << m;
      EXPECT_FALSE(comparison_table(runs).empty());
      EXPECT_TRUE(json::accept(comparison_json(runs)));
    }
  }
}

TEST(Report, ShowsEveryRankUpToALimitAndTheFullestBeyond) {
  EXPECT_THAT(run_report(summary(16), metrics(3)), HasSubstr("rank 15"));
  const std::string many = run_report(summary(512), metrics(3));
  EXPECT_EQ(first_fault(many), "");
  EXPECT_THAT(many, HasSubstr("rank 511 of 480 to 511"));
}

TEST(MetricsSummary, TakesMediansWithoutTheFirstStep) {
  std::string lines;
  for (int s = 1; s <= 4; ++s) {
    json line = row(s);
    line["ms"]["total"] = s == 1 ? 1000.0 : 10.0 * s;
    line["skipped"] = s == 2;
    lines += line.dump() + "\n";
  }
  const json out = json::parse(metrics_summary(lines));
  EXPECT_EQ(out["optimizer_ms"]["total"], 30.0);
  EXPECT_EQ(out["optimizer_ms"]["update"], 28.0);  // lmo included, as in StepTimes
  EXPECT_EQ(out["optimizer_ms"]["lmo"], 20.0);
  EXPECT_EQ(out["bytes_per_step"], 1000000);
  EXPECT_EQ(out["steps"], 4);
  EXPECT_EQ(out["skipped"], 1);
  EXPECT_TRUE(json::parse(metrics_summary(""))["optimizer_ms"]["total"].is_null());
}

TEST(Comparison, ShowsEachRunOnceAndMarksTheBest) {
  json a = json::parse(summary()), b = a;
  a["final"]["val_loss"] = 2.5;
  b["final"]["val_loss"] = 2.25;
  b["groups"] = {{{"match", "*"}, {"rule", "adamw"}}};
  const std::vector<RunRecord> runs{{"first", a.dump(), metrics(80)},
                                    {"second", b.dump(), metrics(40)}};
  const std::string html = comparison_report(runs, "AdamW and Muon");
  EXPECT_EQ(first_fault(html), "");
  EXPECT_THAT(html, HasSubstr("<h1>AdamW and Muon</h1>"));
  EXPECT_THAT(html, HasSubstr("best\">2.25<"));
  const std::string table = comparison_table(runs);
  EXPECT_THAT(table, HasSubstr("first"));
  EXPECT_THAT(table, HasSubstr("muon, adamw"));
  const json document = json::parse(comparison_json(runs));
  ASSERT_EQ(document["runs"].size(), 2U);
  EXPECT_EQ(document["runs"][1]["val_loss"], 2.25);
  EXPECT_EQ(document["runs"][0]["state_bytes_max"], 301);
  EXPECT_EQ(document["runs"][0]["optimizer_ms"], 40.0);
}

TEST(Comparison, OfARunThatWasKilledComesFromItsMetrics) {
  const std::vector<RunRecord> runs{{"killed", "", metrics(30)}};
  const json document = json::parse(comparison_json(runs));
  EXPECT_EQ(document["runs"][0]["status"], "unfinished");
  EXPECT_EQ(document["runs"][0]["steps"], 30);
  EXPECT_EQ(document["runs"][0]["bytes_per_step"], 1000000);
}

TEST(FormatBytes, UsesPowersOfTenAndThreeDigits) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(999), "999 B");
  EXPECT_EQ(format_bytes(1000), "1.00 kB");
  EXPECT_EQ(format_bytes(1.94e9), "1.94 GB");
  EXPECT_EQ(format_bytes(9.996e6), "10.0 MB");
  EXPECT_EQ(format_bytes(999.9e6), "1.00 GB");
  EXPECT_EQ(format_bytes(std::nan("")), "-");
}

TEST(FormatSeconds, NamesTheUnitAPersonWouldUse) {
  EXPECT_EQ(format_seconds(0.00025), "250 us");
  EXPECT_EQ(format_seconds(0.25), "250 ms");
  EXPECT_EQ(format_seconds(42), "42 s");
  EXPECT_EQ(format_seconds(95), "1 min 35 s");
  EXPECT_EQ(format_seconds(3700), "1 h 1 min");
  EXPECT_EQ(format_seconds(200000), "2 d 7 h");
  EXPECT_EQ(format_seconds(-1), "-");
}

TEST(RunReport, DrawsDiagnosticsByKindOfMatrix) {
  std::string metrics;
  for (int step = 10; step <= 30; step += 10) {
    json spectra = json::array();
    for (const char* layer : {"0", "11"}) {
      spectra.push_back({{"matrix", std::string("layers.") + layer + ".up.weight"},
                         {"nr_grad", *layer == '0' ? 2 : 8},
                         {"st_grad", 1.5},
                         {"elements", *layer == '0' ? 300 : 100},
                         {"spec_ratio", *layer == '0' && step == 30 ? 0.5 : 3}});
    }
    const json noise = {{{"group", "all"}, {"gns_l2", 20.0 * step}, {"gns_unresolved", false}},
                        {{"group", "*<b>"}, {"gns_l2", 7.25}, {"gns_unresolved", true}}};
    metrics +=
        json{{"step", step}, {"loss", 1}, {"noise", noise}, {"spectra", spectra}}.dump() + "\n";
  }
  const std::string page = run_report("{}", metrics);
  EXPECT_EQ(first_fault(page), "");
  for (const char* title : {"Gradient noise scale", "Nuclear rank of the gradient",
                            "Stable rank of the gradient", "Spectral or Euclidean"}) {
    EXPECT_THAT(page, HasSubstr(title));
  }
  EXPECT_THAT(page, HasSubstr("layers.*.up.weight, step 20: 4<"));  // √(2·8)
  EXPECT_THAT(page, HasSubstr("model, l2, step 30: 600<"));
  EXPECT_THAT(page, HasSubstr("Above one in step 30: 25 % of the parameters"));
  EXPECT_THAT(page, Not(HasSubstr("7.25")));  // unresolved
  // Without diagnostics there is no word of them.
  EXPECT_THAT(run_report("{}", R"({"step": 1, "loss": 1})"), Not(HasSubstr("noise scale")));
}

}  // namespace
}  // namespace orthrus::runtime
