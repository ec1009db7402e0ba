// A configuration says exactly what is meant, or is refused with the place and the reason.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <orthrus/config.hpp>
#include <orthrus/error.hpp>
#include <random>
#include <set>

namespace orthrus {
namespace {

using testing::HasSubstr;
using testing::StartsWith;
using Overrides = std::vector<std::string>;

/// A file with `lines` after the schema: they begin on line 2. The group is the last line.
std::string with(const std::string& lines) {
  return "schema: 1\n" + lines + (lines.empty() ? "" : "\n") +
         "groups: [{match: '*', rule: {name: muon}}]\n";
}
/// One group whose keys beside match and rule begin on line 5, column 5.
std::string group(const std::string& lines, const std::string& rule = "{name: muon}") {
  return "schema: 1\ngroups:\n  - match: '*'\n    rule: " + rule + "\n    " + lines + "\n";
}

/// What the refusal says; a configuration that is not refused fails the test.
std::string refusal(const std::string& text, const Overrides& overrides = {}) {
  try {
    (void)parse_config(text, "a.yaml", overrides);
  } catch (const ConfigError& e) {
    EXPECT_EQ(e.exit_code(), ExitCode::config);
    return e.what();
  }
  ADD_FAILURE() << "accepted:\n" << text.substr(0, 300);
  return "";
}

Config changed(Config config, const std::string& source) {
  config.source = source;
  return config;
}

// ---------------------------------------------------------------- what is read

TEST(Config, OfSchemaAndGroupsAloneHasEveryDefault) {
  const Config c = parse_config(with(""), "a.yaml");
  Config expected;
  expected.source = "a.yaml";
  expected.groups = c.groups;
  EXPECT_EQ(c, expected);
  ASSERT_EQ(c.groups.size(), 1U);
  EXPECT_EQ(c.groups[0].match, "*");
  EXPECT_EQ(c.groups[0].rule.name, "muon");
  EXPECT_DOUBLE_EQ(c.groups[0].rule.number("lr"), 0.02);
  EXPECT_TRUE(c.groups[0].rule.flag("nesterov"));
  EXPECT_EQ(c.groups[0].lmo, LmoConfig{});
  EXPECT_EQ(c.groups[0].weights, WeightsConfig{});
}

const char* const everything = R"(schema: 1
name: all-of.it_2
seed: 18446744073709551615
device: cpu
cuda: {graph: true}
memory_cap: 2GiB
mesh: {shard: 4, replicate: auto}
comm: {backend: mpi, bucket_bytes: 512KiB, timeout_s: 12.5, gradient_dtype: f32, blocking: true}
zero: {stage: 1}
reproducible: {virtual_shards: 8}
groups:
  - match: "layers.{0,1}.*"
    rule: {name: muon, lr: 0.1, momentum: 0.3, nesterov: false, momentum_form: heavy_ball, weight_decay: 1e-300}
    lmo: {norm: sign, coefficients: jordan, iterations: 64, scale: spectral, eps_mode: clamp, eps: 1e-6, dtype: bf16}
    matrix: {mode: exchange, accuracy: fast, wire: bf16, period: 1}
    weights: {format: bf16, rounding: nearest, residual: master}
    schedule: {kind: wsd, warmup_steps: 7, decay_steps: 9, final: 0.25}
    split: {rows: [1, 2, 3]}
    clip_norm: 1.5
    layer_mass: 2
    layer_sensitivity: 0.25
  - {match: experts, rule: {name: muon}, split: {stack: true}}
  - {match: qkv, rule: {name: muon}, split: {cols: 3}}
  - {match: "*", rule: {name: adamw, betas: [0.8, 0.99], eps_placement: moonlight}, weights: {format: bf16, rounding: stochastic}}
checks: off
checks_every_steps: 50
telemetry: {every_steps: 0, path: "runs/{name}/rank{rank}.jsonl"}
train: {steps: 5, batch: 6, micro_batches: 2, eval_every: 3, save_every: 4, keep: 9, max_skipped: 1}
diagnostics: {every_steps: 11, budget_frac: 0.5}
workload: {name: gpt, layers: 2, widths: [16, 32.5], tie: true, activation: gelu, tag: "12"}
data: {source: "/data/a b\\c\"d.bin", tokenizer: bytes, empty: "", nothing: [], huge: 1e300}
)";

TEST(Config, HasEveryKeyWhereTheHeaderSays) {
  const Config c = parse_config(everything);
  EXPECT_EQ(c.name, "all-of.it_2");
  EXPECT_EQ(c.seed, 18446744073709551615ULL);
  EXPECT_EQ(c.cuda, CudaConfig{true});
  EXPECT_EQ(c.memory_cap, 2LL << 30);
  EXPECT_EQ(c.mesh, (MeshConfig{4, 0}));
  EXPECT_EQ(c.comm, (CommConfig{"mpi", 512 << 10, 12.5, "f32", true}));
  EXPECT_EQ(c.zero_stage, 1);
  EXPECT_EQ(c.virtual_shards, 8);
  EXPECT_EQ(c.checks, "off");
  EXPECT_EQ(c.replica_hash_every, 50);
  EXPECT_EQ(c.telemetry, (TelemetryConfig{0, "runs/{name}/rank{rank}.jsonl"}));
  EXPECT_EQ(c.train, (TrainConfig{5, 6, 2, 3, 4, 9, 1}));
  EXPECT_EQ(c.diagnostics, (DiagnosticsConfig{.every_steps = 11, .budget_frac = 0.5}));
  EXPECT_EQ(c.workload, "gpt");
  const std::map<std::string, Value> workload = {{"layers", 2.0},
                                                 {"widths", std::vector<double>{16, 32.5}},
                                                 {"tie", true},
                                                 {"activation", std::string("gelu")},
                                                 {"tag", std::string("12")}};
  EXPECT_EQ(c.workload_values, workload);
  EXPECT_EQ(c.data.at("source"), Value(std::string("/data/a b\\c\"d.bin")));
  EXPECT_EQ(c.data.at("nothing"), Value(std::vector<double>{}));
  EXPECT_EQ(c.data.at("huge"), Value(1e300));
  ASSERT_EQ(c.groups.size(), 4U);
  const GroupConfig& g = c.groups[0];
  EXPECT_EQ(g.match, "layers.{0,1}.*");
  EXPECT_EQ(g.rule.number("weight_decay"), 1e-300);
  EXPECT_EQ(g.rule.word("momentum_form"), "heavy_ball");
  EXPECT_FALSE(g.rule.flag("nesterov"));
  EXPECT_EQ(g.lmo, (LmoConfig{"sign", "jordan", 64, "spectral", "clamp", 1e-6, "bf16"}));
  EXPECT_EQ(g.matrix, (MatrixConfig{"exchange", "fast", "bf16", 1}));
  EXPECT_EQ(g.weights, (WeightsConfig{"bf16", "nearest", "master"}));
  EXPECT_EQ(g.schedule, (ScheduleConfig{"wsd", 7, 9, 0.25}));
  EXPECT_EQ(g.split, (SplitConfig{{1, 2, 3}, {}, false}));
  EXPECT_EQ(g.clip_norm, 1.5);
  EXPECT_EQ(g.layer_mass, 2);
  EXPECT_EQ(g.layer_sensitivity, 0.25);
  EXPECT_EQ(c.groups[1].split, (SplitConfig{{}, {}, true}));
  EXPECT_EQ(c.groups[2].split, (SplitConfig{{}, {3}, false}));
  EXPECT_EQ(c.groups[3].rule.numbers("betas"), (std::vector<double>{0.8, 0.99}));
  EXPECT_EQ(c.groups[3].weights.residual, "none");
}

TEST(Config, WrittenOutReadsBackTheSame) {
  const Config c = parse_config(everything, "a.yaml");
  const std::string text = to_yaml(c);
  EXPECT_EQ(changed(parse_config(text, "b.yaml"), "a.yaml"), c) << text;
  EXPECT_EQ(to_yaml(parse_config(text)), text);

  std::mt19937_64 bits(1);
  Config random = parse_config(with(""), "a.yaml");
  for (int i = 0; i < 1000; ++i) {
    const double exponent = static_cast<double>(bits() % 1160) / 2 - 300;  // up to 3e295
    const double value =
        std::pow(10.0, exponent) * static_cast<double>(bits() % 9007199254740992ULL);
    random.workload = "w";
    random.workload_values["x" + std::to_string(i)] = bits() % 2 == 0 ? value : -value;
  }
  EXPECT_EQ(parse_config(to_yaml(random), "a.yaml"), random);
  // Text that would be something else without quotes.
  for (const char* text_value :
       {"true", "null", "~",   "1",    "1e3", ".5",           "nan", "-inf", "",
        " ",    "a: b", "# c", "- d",  "{e}", "[f]",          "*g",  "&h",   "!i",
        "%j",   "\"k",  "'l",  "m\\n", "ü",   "\xE2\x80\xA8", "o #p"}) {
    random.data["text"] = std::string(text_value);
    random.telemetry.path = std::string(text_value) == "{e}" ? "" : text_value;
    EXPECT_EQ(parse_config(to_yaml(random), "a.yaml"), random) << "'" << text_value << "'";
  }
}

TEST(Config, HashSeesEveryValueAndNoSpelling) {
  const std::string hash = config_hash(parse_config(with("comm: {bucket_bytes: 64MiB}")));
  EXPECT_EQ(hash.size(), 32U);
  EXPECT_EQ(hash.find_first_not_of("0123456789abcdef"), std::string::npos);
  EXPECT_EQ(hash, config_hash(parse_config(with("# the default\ncomm:\n  bucket_bytes: 67108864"),
                                           "elsewhere")));
  std::set<std::string> hashes = {hash};
  for (const char* change :
       {"seed=2", "groups.0.rule.lr=0.02000000000000001", "groups.0.lmo.iterations=6",
        "train.steps=101", "data.x=1", "checks=off", "cuda.graph=true"}) {
    EXPECT_TRUE(
        hashes.insert(config_hash(parse_config(with(""), "a.yaml", Overrides{change}))).second)
        << change;
  }
}

TEST(Config, BytesHaveUnits) {
  const auto bytes = [](const std::string& text) {
    return parse_config(with("memory_cap: " + text)).memory_cap;
  };
  EXPECT_EQ(bytes("12345"), 12345);
  EXPECT_EQ(bytes("7B"), 7);
  EXPECT_EQ(bytes("512KiB"), 512 << 10);
  EXPECT_EQ(bytes("64MiB"), 64 << 20);
  EXPECT_EQ(bytes("1GiB"), 1 << 30);
  EXPECT_EQ(bytes("2TiB"), 2LL << 40);
  EXPECT_EQ(bytes("3kB"), 3000);
  EXPECT_EQ(bytes("96MB"), 96'000'000);
  EXPECT_EQ(bytes("5GB"), 5'000'000'000);
  const std::string wrong =
      "is not a number of bytes; a whole number, alone or with B, KiB, MiB, GiB, TiB, kB, MB, GB, "
      "TB";
  EXPECT_EQ(refusal(with("memory_cap: 64mib")), "a.yaml:2:13: memory_cap: '64mib' " + wrong);
  EXPECT_EQ(refusal(with("memory_cap: 1.5GiB")), "a.yaml:2:13: memory_cap: '1.5GiB' " + wrong);
  EXPECT_EQ(refusal(with("memory_cap: MiB")), "a.yaml:2:13: memory_cap: 'MiB' " + wrong);
  EXPECT_EQ(refusal(with("memory_cap: 9999999TiB")),
            "a.yaml:2:13: memory_cap: 9999999TiB is out of range: 0 to 1000000000000000");
  EXPECT_EQ(refusal(with("memory_cap: -1")),
            "a.yaml:2:13: memory_cap: -1 is out of range: 0 to 1000000000000000");
}

// ---------------------------------------------------------------- what is refused

struct Refused {
  const char* name;
  std::string text;
  std::string message;
};
void PrintTo(const Refused& r, std::ostream* out) { *out << r.name; }

class ConfigRefuses : public testing::TestWithParam<Refused> {};

TEST_P(ConfigRefuses, WithPlaceAndReason) {
  EXPECT_EQ(refusal(GetParam().text), GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Keys, ConfigRefuses,
    testing::Values(
        Refused{"misspelt_word", group("lmo: {norm: spectal}"),
                "a.yaml:5:17: groups[0].lmo.norm: 'spectal' is not a norm; known: spectral, "
                "frobenius, sign, row, "
                "column (did you mean 'spectral'?)"},
        Refused{"word_without_neighbour", group("lmo: {norm: operator}"),
                "a.yaml:5:17: groups[0].lmo.norm: 'operator' is not a norm; known: spectral, "
                "frobenius, sign, row, "
                "column"},
        Refused{"ramp_without_measurement", with("gns_ramp: {geometry: l2}"),
                "a.yaml:2:22: gns_ramp.geometry: l2 needs diagnostics.every_steps"},
        Refused{"ramp_without_dual_noise",
                with("gns_ramp: {geometry: nuc}\ndiagnostics: {every_steps: 5}"),
                "a.yaml:2:22: gns_ramp.geometry: nuc needs diagnostics.spectra and "
                "diagnostics.dual_noise"},
        Refused{"ramp_to_less",
                with("gns_ramp: {geometry: l2, max_batch: 8}\ndiagnostics: {every_steps: 5}"),
                "a.yaml:2:37: gns_ramp.max_batch: 8 is less than train.batch = 32"},
        Refused{"half_a_price",
                with("gns_ramp: {geometry: l2, price: {step: 2}}\ndiagnostics: {every_steps: 5}"),
                "a.yaml:2:33: gns_ramp.price: of a step without that of an example, or the other "
                "way round: the best batch is the largest or the smallest"},
        Refused{"misspelt_price", with("gns_ramp: {price: {steps: 2}}"),
                "a.yaml:2:20: gns_ramp.price.steps: unknown key; known: step, example, second (did "
                "you mean 'step'?)"},
        Refused{"misspelt_key", with("comm: {timeuot_s: 3}"),
                "a.yaml:2:8: comm.timeuot_s: unknown key; known: backend, bucket_bytes, timeout_s, "
                "gradient_dtype, "
                "blocking (did you mean 'timeout_s'?)"},
        Refused{"unknown_top_key", with("sede: 3"),
                "a.yaml:2:1: sede: unknown key; known: schema, name, seed, device, cuda, profile, "
                "memory_cap, "
                "mesh, comm, zero, "
                "reproducible, checks, checks_every_steps, telemetry, train, gns_ramp, "
                "diagnostics, groups, "
                "workload, data "
                "(did you mean 'seed'?)"},
        Refused{"key_in_the_wrong_place", group("iterations: 3"),
                "a.yaml:5:5: groups[0].iterations: unknown key; known: match, rule, lmo, matrix, "
                "weights, state, schedule, "
                "split, clip_norm, layer_mass, layer_sensitivity (did you mean 'lmo.iterations'?)"},
        Refused{"rule_key_in_the_group", group("nesterov: true"),
                "a.yaml:5:5: groups[0].nesterov: unknown key; known: match, rule, lmo, matrix, "
                "weights, state, schedule, "
                "split, clip_norm, layer_mass, layer_sensitivity (did you mean 'rule.nesterov'?)"},
        Refused{"duplicate_key",
                "schema: 1\ncomm:\n  blocking: true\n  timeout_s: 1\n  blocking: false\n",
                "a.yaml:5:3: comm.blocking: duplicate key; first given at line 3, column 3"},
        Refused{"duplicate_in_a_group",
                "schema: 1\ngroups:\n- {match: a, rule: {name: muon}}\n- {match: b, match: c}",
                "a.yaml:4:14: groups[1].match: duplicate key; first given at line 4, column 4"},
        Refused{"missing_schema", "groups: [{match: '*', rule: {name: muon}}]",
                "a.yaml:1:1: schema: is required: schema: 1"},
        Refused{"other_schema", "schema: 2\nnonsense: 1",
                "a.yaml:1:9: schema: this file is of schema 2; this version reads schema 1"},
        Refused{"schema_as_text", "schema: one\ngroups: [{match: '*', rule: {name: muon}}]",
                "a.yaml:1:9: schema: 'one' is not a schema this version reads; known: 1"},
        Refused{"study_file", "orthrus_study: 1\n",
                "a.yaml:1:1: schema: is required; this is a study file, not a configuration"},
        Refused{"missing_groups", "\n\nschema: 1\n",
                "a.yaml:3:1: groups: is required: which rule updates which parameters"},
        Refused{"no_groups", "schema: 1\ngroups: []",
                "a.yaml:2:9: groups: expects a list of groups, found an empty one"},
        Refused{"missing_match", "schema: 1\ngroups:\n  - rule: {name: muon}\n",
                "a.yaml:3:5: groups[0].match: is required: whole parameter names: * any "
                "characters, ? one, {a,b} "
                "alternatives; the first group has it"},
        Refused{"missing_rule", "schema: 1\ngroups:\n  - match: x\n",
                "a.yaml:3:5: groups[0].rule: is required: {name: ..., lr: ...}"},
        Refused{"rule_as_word", "schema: 1\ngroups: [{match: x, rule: muon}]\n",
                "a.yaml:2:27: groups[0].rule: expects a mapping such as {name: muon, lr: 0.02}, "
                "found 'muon'"},
        Refused{"root_is_a_list", "- schema: 1\n",
                "a.yaml:1:1: expects `schema: 1` and more keys, found a list"},
        Refused{"section_is_a_scalar", with("zero: 2"),
                "a.yaml:2:7: zero: expects a mapping with stage, working_set, gathers; found '2'"},
        Refused{
            "section_is_empty", with("zero:"),
            "a.yaml:2:1: zero: expects a mapping with stage, working_set, gathers; found nothing"},
        Refused{"mapping_for_scalar", with("seed: {a: 1}"),
                "a.yaml:2:7: seed: expects a whole number, found a mapping"},
        Refused{"list_for_scalar", with("train: {steps: [1, 2]}"),
                "a.yaml:2:16: train.steps: expects a whole number, found a list"},
        Refused{"nothing_for_scalar", with("seed: ~"),
                "a.yaml:2:7: seed: expects a whole number, found nothing"},
        Refused{"list_for_word", with("checks: [local]"),
                "a.yaml:2:9: checks: expects one of off, local, collective, found a list"},
        Refused{"list_for_flag", with("comm: {blocking: [true]}"),
                "a.yaml:2:18: comm.blocking: expects true or false, found a list"},
        Refused{"flag_spelt_yes", with("comm: {blocking: yes}"),
                "a.yaml:2:18: comm.blocking: 'yes' is not a flag; known: true, false"},
        Refused{"integer_with_a_point", with("train: {steps: 1.5}"),
                "a.yaml:2:16: train.steps: '1.5' is not a whole number"},
        Refused{"integer_in_quotes", with("train: {steps: '15'}"),
                "a.yaml:2:16: train.steps: '15' is not a whole number but text, being in quotes"},
        Refused{"integer_too_large", with("train: {steps: 99999999999999999999}"),
                "a.yaml:2:16: train.steps: 99999999999999999999 is out of range: 1 to "
                "1000000000000000"},
        Refused{"negative_seed", with("seed: -1"),
                "a.yaml:2:7: seed: -1 is out of range: 0 to 18446744073709551615"},
        Refused{
            "seed_of_65_bits", with("seed: 18446744073709551616"),
            "a.yaml:2:7: seed: 18446744073709551616 is out of range: 0 to 18446744073709551615"},
        Refused{"number_is_text", with("comm: {timeout_s: soon}"),
                "a.yaml:2:19: comm.timeout_s: 'soon' is not a number"},
        Refused{"number_with_unit", with("comm: {timeout_s: 3s}"),
                "a.yaml:2:19: comm.timeout_s: '3s' is not a number"},
        Refused{"number_in_hexadecimal", with("comm: {timeout_s: 0x10}"),
                "a.yaml:2:19: comm.timeout_s: '0x10' is not a number"},
        Refused{"nan", with("comm: {timeout_s: .nan}"),
                "a.yaml:2:19: comm.timeout_s: '.nan' is not a finite number"},
        Refused{"infinity", with("comm: {timeout_s: -.INF}"),
                "a.yaml:2:19: comm.timeout_s: '-.INF' is not a finite number"},
        Refused{"overflowing_number", with("comm: {timeout_s: 1e999}"),
                "a.yaml:2:19: comm.timeout_s: 1e999 is out of range: 0 to 1e+09"},
        Refused{"negative_time", with("comm: {timeout_s: -1}"),
                "a.yaml:2:19: comm.timeout_s: -1 is out of range: 0 to 1e+09"},
        Refused{"zero_iterations", group("lmo: {iterations: 0}"),
                "a.yaml:5:23: groups[0].lmo.iterations: 0 is out of range: 1 to 64"},
        Refused{"too_many_iterations", group("lmo: {iterations: 65}"),
                "a.yaml:5:23: groups[0].lmo.iterations: 65 is out of range: 1 to 64"},
        Refused{"bad_eps_mode", group("lmo: {eps_mode: clam}"),
                "a.yaml:5:21: groups[0].lmo.eps_mode: 'clam' is not an eps mode; known: none, add, "
                "clamp (did you "
                "mean 'clamp'?)"},
        Refused{"keep_one", with("train: {keep: 1}"),
                "a.yaml:2:15: train.keep: 1 is out of range: 2 to 1000000"},
        Refused{"mesh_of_nobody", with("mesh: {shard: 0}"),
                "a.yaml:2:15: mesh.shard: 0 is out of range: 1 to 1000000"},
        Refused{"mesh_word", with("mesh: {shard: all}"),
                "a.yaml:2:15: mesh.shard: 'all' is not a whole number or auto"},
        Refused{"path_in_a_name", with("name: ../x"),
                "a.yaml:2:7: name: '../x' cannot be part of a path; letters, digits, '_', '-' and "
                "'.', not first"},
        Refused{"placeholder", with("telemetry: {path: 'a{node}'}"),
                "a.yaml:2:19: telemetry.path: 'a{node}': only {rank} and {name} are filled in"},
        Refused{"open_brace", "schema: 1\ngroups: [{match: 'a{b,c', rule: {name: muon}}]",
                "a.yaml:2:18: groups[0].match: in the pattern 'a{b,c': '{' at character 2 is not "
                "closed"},
        Refused{"stray_brace", "schema: 1\ngroups: [{match: 'a}b', rule: {name: muon}}]",
                "a.yaml:2:18: groups[0].match: in the pattern 'a}b': '}' at character 2 closes "
                "nothing"},
        Refused{"empty_match", "schema: 1\ngroups: [{match: '', rule: {name: muon}}]",
                "a.yaml:2:18: groups[0].match: the pattern is empty"}),
    [](const auto& info) { return info.param.name; });

INSTANTIATE_TEST_SUITE_P(
    Values, ConfigRefuses,
    testing::Values(
        Refused{"lr_out_of_range", group("clip_norm: 0", "{name: muon, lr: -1}"),
                "a.yaml:4:28: groups[0].rule.lr: -1 is out of range: 0 to 1e+06"},
        Refused{"lr_nan", group("clip_norm: 0", "{name: muon, lr: nan}"),
                "a.yaml:4:28: groups[0].rule.lr: 'nan' is not a finite number"},
        Refused{"flag_of_a_rule", group("clip_norm: 0", "{name: muon, nesterov: 1}"),
                "a.yaml:4:34: groups[0].rule.nesterov: '1' is not a flag; known: true, false"},
        Refused{"number_for_betas", group("clip_norm: 0", "{name: adamw, betas: 0.9}"),
                "a.yaml:4:32: groups[0].rule.betas: expects a list of 2 numbers, found '0.9'"},
        Refused{"three_betas", group("clip_norm: 0", "{name: adamw, betas: [0.9, 0.9, 0.9]}"),
                "a.yaml:4:32: groups[0].rule.betas: expects a list of 2 numbers, found one of 3"},
        Refused{"beta_out_of_range", group("clip_norm: 0", "{name: adamw, betas: [0.9, 2]}"),
                "a.yaml:4:38: groups[0].rule.betas[1]: 2 is out of range: 0 to 0.999999999"},
        Refused{"list_for_lr", group("clip_norm: 0", "{name: muon, lr: [1]}"),
                "a.yaml:4:28: groups[0].rule.lr: expects a number, found a list"},
        Refused{"rule_word", group("clip_norm: 0", "{name: muon, momentum_form: emu}"),
                "a.yaml:4:39: groups[0].rule.momentum_form: 'emu' is not a value of it; known: "
                "ema, heavy_ball (did "
                "you mean 'ema'?)"},
        Refused{"sensitivity", group("layer_sensitivity: 0"),
                "a.yaml:5:24: groups[0].layer_sensitivity: 0 is out of range: 1e-06 to 1e+06"},
        Refused{"clip", group("clip_norm: -0.5"),
                "a.yaml:5:16: groups[0].clip_norm: -0.5 is out of range: 0 to 1e+30"},
        Refused{
            "split_of_nothing", group("split: {}"),
            "a.yaml:5:12: groups[0].split: expects exactly one of rows, cols and stack, found 0"},
        Refused{
            "split_both_ways", group("split: {rows: 2, cols: 2}"),
            "a.yaml:5:12: groups[0].split: expects exactly one of rows, cols and stack, found 2"},
        Refused{"split_into_zero", group("split: {rows: 0}"),
                "a.yaml:5:19: groups[0].split.rows: 0 is out of range: 1 to 1099511627776"},
        Refused{"split_with_a_negative_block", group("split: {cols: [4, -4]}"),
                "a.yaml:5:23: groups[0].split.cols[1]: -4 is out of range: 1 to 1099511627776"},
        Refused{"split_into_one_block", group("split: {cols: [4]}"),
                "a.yaml:5:19: groups[0].split.cols: a list of block sizes has at least two; N "
                "alone means N equal "
                "blocks"},
        Refused{
            "split_not_stacked", group("split: {stack: false}"),
            "a.yaml:5:20: groups[0].split.stack: can only be true; leave split out for no split"},
        Refused{"workload_without_name", with("workload: {layers: 2}"),
                "a.yaml:2:11: workload.name: is required: which workload"},
        Refused{"mapping_in_a_workload", with("workload: {name: gpt, size: {a: 1}}"),
                "a.yaml:2:29: workload.size: expects a flag, number, word or list of numbers, "
                "found a mapping"},
        Refused{"words_in_a_list", with("data: {files: [a, b]}"),
                "a.yaml:2:16: data.files[0]: 'a' is not a number\na.yaml:2:19: data.files[1]: 'b' "
                "is not a number"},
        Refused{"nan_in_a_workload", with("workload: {name: gpt, noise: .nan}"),
                "a.yaml:2:30: workload.noise: '.nan' is not a finite number"},
        Refused{"number_no_double_holds", with("workload: {name: gpt, id: 9007199254740993999}"),
                "a.yaml:2:27: workload.id: 9007199254740993999 is a whole number above 2^53 and "
                "would be rounded"},
        Refused{"odd_workload_key", with("workload: {name: gpt, 'a.b': 1}"),
                "a.yaml:2:23: workload.a.b: is not a name; letters, digits and '_'"}),
    [](const auto& info) { return info.param.name; });

// Words and keys that the contract knows are told from misspelt ones.
INSTANTIATE_TEST_SUITE_P(
    NotYet, ConfigRefuses,
    testing::Values(Refused{"hip", with("device: hip"),
                            "a.yaml:2:9: device: 'hip' is not a device; known: cpu, cuda"},
                    Refused{"zero_4", with("zero: {stage: 4}"),
                            "a.yaml:2:15: zero.stage: '4' is not a ZeRO stage; known: 1, 2, 3 (did "
                            "you mean '1'?)"}),
    [](const auto& info) { return info.param.name; });

TEST(Config, RefusesARuleItDoesNotKnow) {
  EXPECT_THAT(
      refusal(group("clip_norm: 0", "{name: moun}")),
      testing::AllOf(StartsWith("a.yaml:4:18: groups[0].rule.name: 'moun' is not a rule; known: "),
                     HasSubstr("adamw"), testing::EndsWith(" (did you mean 'muon'?)")));
  EXPECT_THAT(refusal(group("clip_norm: 0", "{name: adamuon}")),
              StartsWith("a.yaml:4:18: groups[0].rule.name: 'adamuon' is not available in this "
                         "version; available: "));
  EXPECT_THAT(refusal(group("clip_norm: 0", "{lr: 1}")),
              StartsWith("a.yaml:4:11: groups[0].rule.name: is required; known rules: "));
}

TEST(Config, RefusesAKeyTheRuleDoesNotHave) {
  EXPECT_THAT(
      refusal(group("clip_norm: 0", "{name: muon, momentun: 0.9}")),
      testing::AllOf(
          StartsWith("a.yaml:4:24: groups[0].rule.momentun: the rule muon has no such key; known: "
                     "name, lr, "),
          testing::EndsWith(" (did you mean 'momentum'?)")));
  EXPECT_THAT(refusal(group("clip_norm: 0", "{name: adamw, nesterov: true}")),
              StartsWith("a.yaml:4:25: groups[0].rule.nesterov: the rule adamw has no such key; "
                         "known: name, lr, "));
}

TEST(Config, RefusesAnLmoThatAnElementwiseRuleCannotUse) {
  EXPECT_THAT(
      refusal(group("lmo: {norm: spectral}", "{name: adamw}")),
      StartsWith(
          "a.yaml:5:5: groups[0].lmo: the rule adamw is element-wise and has no use for it; matrix "
          "rules: "));
  EXPECT_THAT(refusal(group("matrix: {mode: owner}", "{name: adamw}")),
              StartsWith("a.yaml:5:5: groups[0].matrix: the rule adamw is element-wise"));
}

TEST(Config, RefusesCoefficientsNobodyKnows) {
  EXPECT_THAT(
      refusal(group("lmo: {coefficients: polar_expres}")),
      testing::AllOf(
          StartsWith("a.yaml:5:25: groups[0].lmo.coefficients: 'polar_expres' is not a table of "
                     "coefficients; known: "),
          testing::EndsWith(" (did you mean 'polar_express'?)")));
  EXPECT_THAT(refusal(group("lmo: {coefficients: auto, tolerance: 2}")),
              testing::AllOf(HasSubstr("groups[0].lmo.tolerance"), HasSubstr("out of range")));
}

TEST(Config, ListsAllThatIsWrongInTheOrderOfTheFile) {
  EXPECT_EQ(refusal(with("seed: x\ncomm: {blocking: 2, backend: tcp}\ntrain: {steps: 0}")),
            "a.yaml:2:7: seed: 'x' is not a whole number\n"
            "a.yaml:3:18: comm.blocking: '2' is not a flag; known: true, false\n"
            "a.yaml:3:30: comm.backend: 'tcp' is not a communicator; known: auto, mpi, nccl\n"
            "a.yaml:4:16: train.steps: 0 is out of range: 1 to 1000000000000000");
  std::string many = "schema: 1\n";
  for (int i = 0; i < 30; ++i) many += "unknown" + std::to_string(i) + ": 1\n";
  EXPECT_THAT(refusal(many),
              testing::EndsWith("\nand 11 more"));  // 30 keys and the groups, 20 shown
}

TEST(Config, ListsAllContradictions) {
  const std::string text = R"(schema: 1
mesh: {shard: auto, replicate: auto}
comm: {gradient_dtype: bf16}
reproducible: {virtual_shards: 4}
groups:
  - match: a
    rule: {name: muon}
    weights: {residual: master, rounding: stochastic}
    matrix: {period: 2}
  - match: b
    rule: {name: muon}
    weights: {format: bf16, residual: mantissa, rounding: stochastic}
    schedule: {decay_steps: 5}
  - match: c
    rule: {name: muon}
    schedule: {final: 0.1}
  - match: d
    rule: {name: muon}
    schedule: {kind: cosine, warmup_steps: 10, decay_steps: 10}
)";
  EXPECT_EQ(refusal(text),
            "a.yaml:2:7: mesh: shard and replicate cannot both be auto; give one of them a number\n"
            "a.yaml:3:24: comm.gradient_dtype: bf16 contradicts reproducible.virtual_shards, which "
            "sums in f32\n"
            "a.yaml:8:25: groups[0].weights.residual: master contradicts weights.format f32, where "
            "nothing is lost\n"
            "a.yaml:8:43: groups[0].weights.rounding: stochastic contradicts weights.format f32, "
            "where nothing is "
            "rounded\n"
            "a.yaml:9:22: groups[0].matrix.period: other than 1 needs matrix.mode periodic\n"
            "a.yaml:12:59: groups[1].weights.rounding: stochastic contradicts weights.residual "
            "mantissa, which keeps every bit\n"
            "a.yaml:13:29: groups[1].schedule.decay_steps: contradicts schedule.kind constant, "
            "which does not decay\n"
            "a.yaml:16:23: groups[2].schedule.final: contradicts schedule.kind constant, which "
            "does not decay\n"
            "a.yaml:19:61: groups[3].schedule.decay_steps: 10 is not after the end of warm-up (10 "
            "steps)");
}

TEST(Config, RefusesWeightsThatContradictThemselves) {
  const auto of = [](const std::string& weights) {
    return refusal("schema: 1\ngroups:\n  - match: a\n    rule: {name: muon}\n    weights: {" +
                   weights + "}\n");
  };
  const std::string at = "a.yaml:5:";
  EXPECT_EQ(of("format: fp7"),
            at + "23: groups[0].weights.format: 'fp7' is not a weight format; known: f32, bf16, "
                 "fp8_e4m3, fp8_e5m2, int8, int4");
  EXPECT_EQ(of("residual: momentum"),
            at + "25: groups[0].weights.residual: momentum contradicts weights.format f32, where "
                 "nothing is lost");
  EXPECT_EQ(of("block: 128"), at + "22: groups[0].weights.block: 128 contradicts weights.format "
                                   "f32, which has no scales");
  EXPECT_EQ(of("format: int8, scale: row, block: 32"),
            at + "48: groups[0].weights.block: 32 contradicts weights.scale row");
  EXPECT_EQ(of("format: int8, scale: block"),
            at + "36: groups[0].weights.scale: block needs weights.block");
  EXPECT_EQ(of("format: bf16, scale_format: pow2"),
            at + "43: groups[0].weights.scale_format: pow2 contradicts weights.format bf16, which "
                 "has no scales");
  EXPECT_EQ(of("format: int8, residual: mantissa"),
            at + "39: groups[0].weights.residual: mantissa keeps the bits that bf16 has not: "
                 "weights.format bf16");
  EXPECT_EQ(of("format: int8, eco: {kappa: blog}"),
            at + "34: groups[0].weights.eco: is of weights.residual momentum (it is none)");
  EXPECT_EQ(of("format: int8, residual: momentum, eco: {max_rel_correction: -0.5}"),
            at + "75: groups[0].weights.eco.max_rel_correction: is 0 or more, or -1");
  const std::string valid =
      "format: fp8_e4m3, block: 128, rounding: stochastic, residual: momentum";
  EXPECT_NO_THROW(
      (void)parse_config("schema: 1\ngroups:\n  - match: a\n    rule: {name: muon}\n"
                         "    weights: {" +
                         valid + "}\n"));
}

// ---------------------------------------------------------------- YAML that a configuration does
// not need

INSTANTIATE_TEST_SUITE_P(
    Yaml, ConfigRefuses,
    testing::Values(
        Refused{"empty", "", "a.yaml: is empty"},
        Refused{"comments_only", "# nothing\n\n", "a.yaml: is empty"},
        Refused{"empty_document", "---\n", "a.yaml: is empty"},
        Refused{"two_documents", with("") + "---\nschema: 1\n",
                "a.yaml:3:1: something follows the end of the document; a file holds exactly one"},
        Refused{"anchor", with("comm: &c {blocking: true}"),
                "a.yaml:2:7: comm: anchors are refused ('&c'); write the value out"},
        Refused{"alias", "schema: 1\ngroups: [{match: *, rule: {name: muon}}]",
                "a.yaml:2:19: not YAML: alias not found after *"},
        Refused{"tag", with("seed: !!int 3"),
                "a.yaml:2:7: seed: tags are refused ('tag:yaml.org,2002:int')"},
        Refused{"mapping_as_key", with("{a: 1}: 2"),
                "a.yaml:2:1: a list or mapping as a key, or a bracket that is not closed"},
        Refused{"tab_indents", "schema: 1\ncomm:\n\tblocking: true\n",
                "a.yaml:3:1: a tab in the indentation; YAML indents with spaces"},
        Refused{"tab_after_spaces", "schema: 1\ncomm:\n  \tblocking: true\n",
                "a.yaml:3:3: a tab in the indentation; YAML indents with spaces"},
        Refused{"tab_before_a_comment", "schema: 1\n\t# c\n",
                "a.yaml:2:1: a tab in the indentation; YAML indents with spaces"},
        Refused{"control_character", std::string("schema: 1\nname: a\x01") + "b\n",
                "a.yaml:2:8: the character 0x1 has no place in a configuration"},
        Refused{"nul", std::string("schema: 1\nname: a\0b\n", 20),
                "a.yaml:2:8: the character 0x0 has no place in a configuration"},
        Refused{"lone_carriage_return", "schema: 1\rname: a\n",
                "a.yaml:1:10: the character 0xD has no place in a configuration"},
        Refused{"c1_control", "schema: 1\nname: \xC2\x85\n",
                "a.yaml:2:7: the character 0x85 has no place in a configuration"},
        Refused{"escaped_control", with("name: \"a\\x07\""),
                "a.yaml:2:7: name: a value is one line of text without control characters"},
        Refused{"block_text", with("name: |\n  a\n  b"),
                "a.yaml:2:7: name: a value is one line of text without control characters"},
        Refused{"latin_1", "schema: 1\nname: caf\xE9\n",
                "a.yaml:2:10: is not UTF-8 here (byte 0xE9)"},
        Refused{"overlong", "schema: 1\nname: \xC0\xAF\n",
                "a.yaml:2:7: is not UTF-8 here (byte 0xC0)"},
        Refused{"surrogate", "schema: 1\nname: \xED\xA0\x80\n",
                "a.yaml:2:7: is not UTF-8 here (byte 0xED)"},
        Refused{"cut_character", "schema: 1\nname: \xE2\x82",
                "a.yaml:2:7: is not UTF-8 here (byte 0xE2)"},
        Refused{"utf_16", std::string("\xFF\xFEs\0", 4),
                "a.yaml:1:1: is not UTF-8 here (byte 0xFF)"},
        Refused{"open_bracket", "schema: 1\ngroups: [",
                "a.yaml:2:1: not YAML: end of sequence flow not found"}),
    [](const auto& info) { return info.param.name; });

TEST(Config, AcceptsCarriageReturnsBeforeLineFeedsAByteOrderMarkAndTabsBetweenWords) {
  const std::string unix_text = with("comm:\n  timeout_s: 5");
  std::string dos = "\xEF\xBB\xBF";
  for (const char c : unix_text) dos += c == '\n' ? "\r\n" : std::string(1, c);
  EXPECT_EQ(parse_config(dos, "a.yaml"), parse_config(unix_text, "a.yaml"));
  EXPECT_EQ(parse_config(with("# a\tcomment\nseed:\t1 \t# one"), "a.yaml"),
            parse_config(with(""), "a.yaml"));
  // Lines and columns are those an editor shows.
  EXPECT_THAT(refusal("\xEF\xBB\xBFschema: 1\r\nseed: x\r\n"), StartsWith("a.yaml:2:7: seed: "));
}

/// What grows with a power of the input takes years, what grows with the input a second, or ten
/// with sanitizers on a busy machine.
constexpr std::chrono::seconds kNotForever{60};

/// Hostile sizes end early: `text` is refused with `message`.
void expect_refused_quickly(const std::string& text, const std::string& message) {
  const auto start = std::chrono::steady_clock::now();
  EXPECT_THAT(refusal(text), HasSubstr(message));
  EXPECT_LT(std::chrono::steady_clock::now() - start, kNotForever);
}

std::string repeat(const std::string& part, std::size_t count) {
  std::string result;
  for (std::size_t i = 0; i < count; ++i) result += part;
  return result;
}

TEST(Config, BoundsSizeDepthAndNumberOfValues) {
  expect_refused_quickly(with("#" + std::string(2 << 20, 'x')),
                         "a.yaml: is larger than 1 MiB (2097");
  expect_refused_quickly("a: " + repeat("[", 3000) + repeat("]", 3000),
                         "a.yaml:1:35: nested more than 32 deep");
  expect_refused_quickly(repeat("{a: ", 3000) + "1" + repeat("}", 3000),
                         "nested more than 32 deep");
  expect_refused_quickly("a: " + repeat("[", 1'000'000), "a bracket that is not closed");
  expect_refused_quickly(repeat("- ", 100'000), "nested more than 32 deep");
  expect_refused_quickly(repeat("? ", 100'000), "a list or mapping as a key");
  std::string wide = "schema: 1\nx: [";
  for (int i = 0; i < 100'001; ++i) wide += "1,";
  expect_refused_quickly(wide + "1]\n", "more than 100000 values");
  std::string keys = "schema: 1\n";
  for (int i = 0; i < 60'000; ++i) keys += "k" + std::to_string(i) + ": 1\n";
  expect_refused_quickly(keys, "more than 100000 values");
  std::string bomb = "a: &a [1]\n";
  for (char c = 'b'; c < 'k'; ++c) {
    bomb += std::string(1, c) + ": &" + c + " [" +
            repeat("*" + std::string(1, static_cast<char>(c - 1)) + ",", 9) + "]\n";
  }
  expect_refused_quickly(bomb, "a.yaml:1:4: a: anchors are refused ('&a')");
}

// ---------------------------------------------------------------- overrides and environment

TEST(Config, TakesOverridesAfterTheFile) {
  const Overrides overrides = {
      "comm.timeout_s=7",       "groups[0].rule.lr=0.5", "groups.0.lmo.iterations=9",
      "groups.0.match=*.{a,b}", "telemetry.path=",       "train.steps=3",
      "workload.name=gpt",      "workload.sizes=[1, 2]", "data.source='a # b'",
      "train.steps=4",          "mesh.replicate=auto",   "mesh.shard=2"};
  const Config c =
      parse_config(with("comm: {timeout_s: 5}\ntelemetry: {path: x}"), "a.yaml", overrides);
  EXPECT_EQ(c.comm.timeout_s, 7);
  EXPECT_EQ(c.groups[0].rule.number("lr"), 0.5);
  EXPECT_EQ(c.groups[0].lmo.iterations, 9);
  EXPECT_EQ(c.groups[0].match, "*.{a,b}");
  EXPECT_EQ(c.telemetry.path, "");
  EXPECT_EQ(c.train.steps, 4) << "the later one wins";
  EXPECT_EQ(c.workload, "gpt");
  EXPECT_EQ(c.workload_values.at("sizes"), Value(std::vector<double>{1, 2}));
  EXPECT_EQ(c.data.at("source"), Value(std::string("a # b")));
  EXPECT_EQ(c.mesh, (MeshConfig{2, 0}));
  EXPECT_EQ(parse_config(with(""), "a", Overrides{"groups.0.match=**"}).groups[0].match, "**")
      << "not an alias";
}

struct BadOverride {
  const char* text;
  const char* message;
};
TEST(Config, NamesTheOverrideThatIsWrong) {
  const BadOverride cases[] = {
      {"train.steps", "--set train.steps: expected key.path=value"},
      {"train.stesp=3",
       "--set train.stesp=3: train.stesp: unknown key; known: steps, batch, micro_batches, "
       "eval_every, "
       "save_every, keep, max_skipped (did you mean 'steps'?)"},
      {"train.steps=many", "--set train.steps=many: train.steps: 'many' is not a whole number"},
      {"train.steps=[3]",
       "--set train.steps=[3]: train.steps: expects a whole number, found a list"},
      {"train.steps=",
       "--set train.steps=: train.steps: '' is not a whole number but text, being in quotes"},
      {"seed.x=3", "--set seed.x=3: seed.x: unknown key: seed is a single value"},
      {"groups.1.rule.lr=3",
       "--set groups.1.rule.lr=3: groups[1]: the list has 1 entries, numbered from 0"},
      {"groups.first.rule.lr=3",
       "--set groups.first.rule.lr=3: groups.first: the parts of a list are numbered from 0"},
      {"groups[0].rule.lr=-3",
       "--set groups[0].rule.lr=-3: groups[0].rule.lr: -3 is out of range: 0 to 1e+06"},
      {"a..b=1", "--set a..b=1: the key path is malformed; an example: groups[0].rule.lr=0.02"},
      {"=1", "--set =1: the key path is malformed; an example: groups[0].rule.lr=0.02"},
      {"groups[x].rule=1",
       "--set groups[x].rule=1: the key path is malformed; an example: groups[0].rule.lr=0.02"},
      {"name=a\nb", "--set name=a\nb: the character 0xA has no place in a configuration"},
      {"comm.gradient_dtype=f16",
       "--set comm.gradient_dtype=f16: comm.gradient_dtype: 'f16' is not a dtype of "
       "gradients; known: f32, bf16 (did you mean 'bf16'?)"},
  };
  for (const BadOverride& c : cases) {
    EXPECT_EQ(refusal(with("seed: 1"), {c.text}), c.message) << c.text;
  }
  // A contradiction is shown where its later half was said.
  EXPECT_EQ(refusal(with("reproducible: {virtual_shards: 4}"), {"comm.gradient_dtype=bf16"}),
            "--set comm.gradient_dtype=bf16: comm.gradient_dtype: bf16 contradicts "
            "reproducible.virtual_shards, which "
            "sums in f32");
}

/// A directory of files and variables that are gone after the test.
class ConfigFile : public testing::Test {
 protected:
  void SetUp() override {
    const std::string name = testing::UnitTest::GetInstance()->current_test_info()->name();
    directory_ = std::filesystem::temp_directory_path() /
                 ("orthrus-config-" + name + std::to_string(::getpid()));
    std::filesystem::remove_all(directory_);
    std::filesystem::create_directories(directory_);
  }
  void TearDown() override {
    for (const std::string& name : variables_) ::unsetenv(name.c_str());
    std::filesystem::remove_all(directory_);
  }
  std::filesystem::path file(const std::string& text) const {
    std::ofstream(directory_ / "a.yaml") << text;
    return directory_ / "a.yaml";
  }
  void variable(const std::string& name, const std::string& value) {
    ::setenv(name.c_str(), value.c_str(), 1);
    variables_.push_back(name);
  }
  static std::string load_refusal(const std::filesystem::path& path,
                                  const Overrides& overrides = {}) {
    try {
      (void)load_config(path, overrides);
    } catch (const ConfigError& e) {
      EXPECT_EQ(e.exit_code(), ExitCode::config);
      return e.what();
    }
    ADD_FAILURE() << "accepted";
    return "";
  }
  std::filesystem::path directory_;
  std::vector<std::string> variables_;
};

TEST_F(ConfigFile, DefaultsGiveWayToFileThenEnvironmentThenOverrides) {
  const auto path = file(with("comm: {timeout_s: 1}\nseed: 2\nname: f"));
  EXPECT_EQ(load_config(path).comm.timeout_s, 1);
  EXPECT_EQ(load_config(path).source, path.string());
  variable("ORTHRUS__COMM__TIMEOUT_S", "2");
  variable("ORTHRUS__SEED", "3");
  variable("ORTHRUS__GROUPS__0__RULE__LR", "0.25");
  variable("ORTHRUS__TRAIN__STEPS", "17");
  variable("ORTHRUS_OTHER", "not ours");
  const Config c = load_config(path, Overrides{"comm.timeout_s=3"});
  EXPECT_EQ(c.comm.timeout_s, 3);
  EXPECT_EQ(c.seed, 3U);
  EXPECT_EQ(c.name, "f");
  EXPECT_EQ(c.groups[0].rule.number("lr"), 0.25);
  EXPECT_EQ(c.train.steps, 17);
  EXPECT_EQ(parse_config(with("seed: 2")).seed, 2U) << "text is read without the environment";

  const std::string explained = explain_config(path, Overrides{"comm.timeout_s=3"});
  EXPECT_THAT(explained, HasSubstr("\ncomm.timeout_s: 3  # --set comm.timeout_s=3\n"));
  EXPECT_THAT(explained, HasSubstr("\nseed: 3  # environment variable ORTHRUS__SEED\n"));
  EXPECT_THAT(explained, HasSubstr("\nname: f  # " + path.string() + ":4:7\n"));
  EXPECT_THAT(explained, HasSubstr("\ngroups[0].lmo.norm: spectral  # default\n"));
  EXPECT_THAT(
      explained,
      HasSubstr(
          "\ngroups[0].rule.lr: 0.25  # environment variable ORTHRUS__GROUPS__0__RULE__LR\n"));
}

TEST_F(ConfigFile, NamesTheVariableThatIsWrong) {
  const auto path = file(with(""));
  const std::pair<const char*, std::string> cases[] = {
      {"ORTHRUS__COMM__TIMEOUTS",
       "comm.timeouts: unknown key; known: backend, bucket_bytes, timeout_s, gradient_dtype, "
       "blocking (did you mean 'timeout_s'?)"},
      {"ORTHRUS__NOTHING__HERE", "nothing: unknown key; "},
      {"ORTHRUS__SEED__X__Y", "seed: expects a whole number, found a mapping"},
      {"ORTHRUS__GROUPS__7__MATCH", "groups[7]: the list has 1 entries, numbered from 0"},
      {"ORTHRUS__", "names no key; an example: ORTHRUS__COMM__TIMEOUT_S"},
      {"ORTHRUS__TRAIN__STEPS", "train.steps: '4 x' is not a whole number"},
      {"ORTHRUS__TELEMETRY__PATH", ""},
  };
  for (const auto& [name, message] : cases) {
    const bool bad_bytes = message.empty();
    ::setenv(name, bad_bytes ? "\xFF" : "4 x", 1);
    const std::string reason = bad_bytes ? "is not UTF-8 here (byte 0xFF)" : message;
    EXPECT_THAT(load_refusal(path),
                StartsWith("environment variable " + std::string(name) + ": " + reason));
    ::unsetenv(name);
  }
  EXPECT_NO_THROW((void)load_config(path));
}

TEST_F(ConfigFile, NamesTheFileThatCannotBeRead) {
  const auto missing = directory_ / "missing.yaml";
  EXPECT_EQ(load_refusal(missing),
            missing.string() + ": cannot be read: No such file or directory");
  EXPECT_EQ(load_refusal(directory_), directory_.string() + ": is not a regular file");
  EXPECT_EQ(load_refusal(file(with("seed: x"))),
            (directory_ / "a.yaml").string() + ":2:7: seed: 'x' is not a whole number");
  EXPECT_THAT(load_refusal(file(std::string(2 << 20, '#'))),
              StartsWith((directory_ / "a.yaml").string() + ": is larger than"));
}

// ---------------------------------------------------------------- patterns

TEST(MatchingGroup, TakesWholeNamesAndTheFirstPattern) {
  const auto matches = [](const std::string& pattern, const std::string& name) {
    Config c;
    c.groups.resize(1);
    c.groups[0].match = pattern;
    return matching_group(c, name) == 0;
  };
  struct Case {
    const char *pattern, *name;
    bool expected;
  };
  const Case cases[] = {
      {"*", "", true},
      {"*", "a.b/c", true},
      {"a", "a", true},
      {"a", "ab", false},
      {"a", "ba", false},
      {"layers.*.weight", "layers.0.attn/q.weight", true},
      {"layers.*.weight", "layers.weight", false},
      {"layers.*.weight", "layers..weight", true},
      {"layers.*.weight", "layers.0.weight.x", false},
      {"?", "", false},
      {"?", "a", true},
      {"?", "ab", false},
      {"a?c", "a.c", true},
      {"{a,b}", "a", true},
      {"{a,b}", "b", true},
      {"{a,b}", "ab", false},
      {"{a,b}", "{a,b}", false},
      {"x{,y}", "x", true},
      {"x{,y}", "xy", true},
      {"x{,y}", "xyy", false},
      {"x{}", "x", true},
      {"{a{b,c},d}e", "abe", true},
      {"{a{b,c},d}e", "ace", true},
      {"{a{b,c},d}e", "de", true},
      {"{a{b,c},d}e", "ae", false},
      {"{a*,b?}.w", "axyz.w", true},
      {"{a*,b?}.w", "bx.w", true},
      {"{a*,b?}.w", "b.w", false},
      {"a,b", "a,b", true},
      {"*a*", "bab", true},
      {"*a*", "bbb", false},
      {"**", "x", true},
      {"[a]", "[a]", true},
      {"a.b", "axb", false},
      {"layers.*.{attn,mlp}.*.weight", "layers.11.mlp.up.weight", true},
      {"layers.*.{attn,mlp}.*.weight", "layers.11.norm.weight", false},
  };
  for (const Case& c : cases)
    EXPECT_EQ(matches(c.pattern, c.name), c.expected) << c.pattern << " on " << c.name;

  const Config c = parse_config(
      "schema: 1\ngroups: [{match: 'a*', rule: {name: muon}}, {match: b, rule: {name: muon}}, "
      "{match: '*', rule: {name: adamw}}]");
  EXPECT_EQ(matching_group(c, "ab"), 0);
  EXPECT_EQ(matching_group(c, "b"), 1);
  EXPECT_EQ(matching_group(c, "ab", 1), 2);
  EXPECT_EQ(matching_group(c, "ab", 3), -1);
}

TEST(MatchingGroup, NeedsTimeProportionalToThePattern) {
  Config c;
  c.groups.resize(2);
  c.groups[0].match = repeat("*a", 500) + "b";
  c.groups[1].match = repeat("{a,a,aa}", 400) + "b";
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(matching_group(c, std::string(2000, 'a')),
            -1);  // tried one way after the other: 2^400 ways
  EXPECT_LT(std::chrono::steady_clock::now() - start, kNotForever);
  c.groups[0].match = repeat("{", 40) + "a" + repeat("}", 40);
  EXPECT_THROW((void)matching_group(c, "a"), ConfigError);
}

// ---------------------------------------------------------------- documentation and examples

TEST(Config, DocumentsEveryKeyItWrites) {
  std::map<std::string, KeyDoc> docs;
  for (const KeyDoc& doc : config_keys()) {
    EXPECT_FALSE(doc.doc.empty()) << doc.path;
    EXPECT_FALSE(doc.type.empty()) << doc.path;
    docs.emplace(doc.path, doc);
  }
  for (const char* path :
       {"schema", "comm.timeout_s", "zero.stage", "reproducible.virtual_shards", "train.keep",
        "checks_every_steps", "groups[].match", "groups[].rule.name", "groups[].rule.lr",
        "groups[].rule.betas", "groups[].lmo.norm", "groups[].split.rows", "workload.name"}) {
    EXPECT_EQ(docs.count(path), 1U) << path;
  }
  EXPECT_EQ(docs["comm.bucket_bytes"].default_value, "67108864");
  EXPECT_EQ(docs["comm.bucket_bytes"].unit, "bytes");
  EXPECT_EQ(docs["mesh.shard"].default_value, "auto");
  EXPECT_EQ(docs["groups[].lmo.norm"].type, "spectral | frobenius | sign | row | column");
  EXPECT_EQ(docs["groups[].lmo.iterations"].type, "integer 1..64");
  EXPECT_EQ(docs["schema"].default_value, "required");
}

TEST(Config, SaysWhatAWordOfAnyKeyIsNot) {
  int words = 0;
  for (const KeyDoc& doc : config_keys()) {
    if (doc.type.find(" | ") == std::string::npos || doc.type.find_first_of("0123456789[{.") == 0)
      continue;
    std::string path = doc.path;
    if (const auto at = path.find("[]"); at != std::string::npos) path.replace(at, 2, ".0");
    const std::string said =
        refusal("schema: 1\ngroups: [{match: \"*\", rule: {name: muon}, lmo: {norm: spectral}}]\n",
                {path + "=no-such-word"});
    EXPECT_NE(said.find(path), std::string::npos) << said;
    EXPECT_EQ(said.find(" is not ;"), std::string::npos) << said;
    ++words;
  }
  EXPECT_GE(words, 20);
}

TEST(Config, AcceptsTheExamples) {
  int examples = 0;
  for (const auto& entry : std::filesystem::directory_iterator(ORTHRUS_CONFIGS)) {
    if (entry.path().extension() != ".yaml") continue;
    ++examples;
    std::ifstream in(entry.path());
    const std::string text((std::istreambuf_iterator<char>(in)), {});
    const Config c = parse_config(text, entry.path().string());
    EXPECT_EQ(changed(parse_config(to_yaml(c)), c.source), c) << entry.path();
    EXPECT_EQ(c.name + ".yaml", entry.path().filename().string());
    EXPECT_GE(matching_group(c, "anything.weight"), 0) << entry.path();
  }
  EXPECT_GE(examples, 3);
}

// ---------------------------------------------------------------- mutations

// Whatever is done to a valid file, it is read or refused with an orthrus::Error, and what is read
// can be written and read again.
TEST(Config, SurvivesMutations) {
  const std::string valid = everything;
  const std::vector<std::string> pieces = {
      "\n",   ": ",   "- ",   "{",     "}",  "[",    "]",     "\"",    "'",
      "*",    "&a ",  "!!x ", "#",     "\t", ",",    "---\n", "...\n", "? ",
      "| ",   "> ",   "%",    "@",     "\\", "\\x0", ".nan",  "~",     "\xEF\xBB\xBF",
      "\xC3", "\r\n", "  ",   "1e999", "-",  "0",    "<<: ",  "auto"};
  std::mt19937 bits(20240);
  const auto pick = [&](std::size_t n) { return static_cast<std::size_t>(bits()) % n; };
  int read = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string text = valid;
    const std::size_t edits = 1 + pick(4);
    for (std::size_t e = 0; e < edits && !text.empty(); ++e) {
      const std::size_t at = pick(text.size());
      switch (pick(5)) {
        case 0:
          text[at] = static_cast<char>(text[at] ^ (1 << pick(8)));
          break;
        case 1:
          text.erase(at, 1 + pick(20));
          break;
        case 2:
          text.insert(at, pieces[pick(pieces.size())]);
          break;
        case 3:
          text.insert(at, text.substr(pick(text.size()), pick(40)));
          break;
        case 4:
          text.resize(at + (pick(8) == 0 ? 0 : text.size() - at));
          break;
      }
    }
    try {
      const Config c = parse_config(text, "a.yaml");
      ++read;
      ASSERT_EQ(parse_config(to_yaml(c), "a.yaml"), c) << text;
    } catch (const Error& e) {
      ASSERT_THAT(e.what(), StartsWith("a.yaml")) << text;
    }
  }
  // Both outcomes occur, or the mutations are not worth their name.
  EXPECT_GT(read, 200);
  EXPECT_LT(read, 4500);
}

}  // namespace
}  // namespace orthrus
