// The machine profile: read strictly, written exactly, and formulas that are what they say.
#include <gtest/gtest.h>

#include <cmath>
#include <orthrus/error.hpp>
#include <string>

#include "runtime/machine.hpp"

namespace orthrus::runtime {
namespace {

/// Everything costs what its flops and bytes cost, at any size.
MachineProfile flat(double flops, double pass, double latency_s = 0, double bytes_per_s = 1e9) {
  MachineProfile p;
  p.name = "flat";
  p.description = "one rate each";
  p.f32 = p.bf16 = p.f64 = {{{1, flops}}, {{1, flops}}};
  p.pass = {{1, pass}};
  p.node.any.latency_s = latency_s;
  p.node.any.bytes_per_s = {{1, bytes_per_s}};
  p.network = p.node;
  return p;
}

void expect_refused(const std::string& text, const std::string& why) {
  try {
    (void)parse_profile(text, "p.yaml");
    ADD_FAILURE() << "accepted, where expected: " << why;
  } catch (const ConfigError& e) {
    EXPECT_EQ(e.exit_code(), ExitCode::config);
    EXPECT_NE(std::string(e.what()).find(why), std::string::npos) << e.what();
  }
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const auto at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return at == std::string::npos ? text : text.replace(at, from.size(), to);
}

// ---- files --------------------------------------------------------------------------------------

TEST(MachineProfile, SurvivesItsFile) {
  MachineProfile p;
  p.name = "no-1";
  p.description = R"(a "quoted" \ text: with, {all} # that)";
  p.f32.gemm = {{64, 1e11 / 3}, {96.5, 0x1.fffffffffffffp+36}};
  p.pass = {{1 << 18, 1e10 / 7}};
  p.ranks_per_node = 8;
  p.node.any = LinkRate{1e-7 / 3, {{1, 5e9 / 3}}};
  p.node.special[Collective::all_to_all] = LinkRate{0, {{2, 1e20 / 3}}};
  p.network.special[Collective::send] = LinkRate{1e-6, {{1, 1e9}}};
  p.network.special[Collective::all_reduce] = LinkRate{2e-6, {{1024, 1e9}, {1e6, 3e9}}};
  EXPECT_EQ(parse_profile(to_yaml(p), "p.yaml"), p);
  EXPECT_EQ(parse_profile(to_yaml({}), "p.yaml"), MachineProfile{});
}

TEST(MachineProfile, ShippedOnesLoadUnderTheirFileNames) {
  std::string names;
  for (const ShippedProfile& shipped : shipped_profiles()) {
    names += std::string(shipped.name) + " ";
    const MachineProfile p = load_profile(std::string(shipped.name));
    EXPECT_EQ(p.name, shipped.name);
    EXPECT_FALSE(p.description.empty());
  }
  EXPECT_EQ(names, "a100-ib200 default-cpu h100-ib400 h200-ib400 ");
}

TEST(MachineProfile, DefaultIsTheShippedDefault) {
  MachineProfile shipped = load_profile(MachineProfile{}.name);
  shipped.description.clear();
  EXPECT_EQ(shipped, MachineProfile{});
}

TEST(MachineProfile, UnknownNameListsTheKnownOnes) {
  try {
    (void)load_profile("h200-ib40");
    FAIL();
  } catch (const ConfigError& e) {
    const std::string message = e.what();
    EXPECT_EQ(e.exit_code(), ExitCode::config);
    EXPECT_NE(message.find("a100-ib200, default-cpu, h100-ib400, h200-ib400"), std::string::npos);
    EXPECT_NE(message.find("did you mean 'h200-ib400'?"), std::string::npos) << message;
  }
  EXPECT_THROW((void)load_profile("no/such/file.yaml"), ConfigError);
}

TEST(MachineProfile, IsReadStrictly) {
  const std::string good = to_yaml({});
  EXPECT_NO_THROW((void)parse_profile(good, "p.yaml"));
  expect_refused(good + "gpus: 8\n",
                 "p.yaml:19:1: gpus: unknown key; known: orthrus_profile, name");
  expect_refused(replaced(good, "    syrk:", "    sirk:"),
                 "p.yaml:7:5: products.f32.sirk: unknown key; known: gemm, syrk (did you mean");
  expect_refused(replaced(good, "  node: {latency_s", "  node: {latency_ms"),
                 "links.node.latency_ms: unknown key");
  expect_refused(replaced(good, "latency_s: 2e-06, ", ""), "links.node.latency_s: is required");
  expect_refused(replaced(good, "bytes_per_s: 1.25e+09", "bytes_per_s: {}"),
                 "links.network.bytes_per_s: expects {size: rate, ...}");
  expect_refused(replaced(good, "  f64:", "  f16:"), "products.f16: unknown key");
  expect_refused(replaced(good, "orthrus_profile: 1", "orthrus_profile: 2"),
                 "this version reads schema 1");
  expect_refused(replaced(good, "{64: 6e+10", "{512: 6e+10"), "sizes must ascend, 256 does not");
  expect_refused(replaced(good, "6e+10", "-6e+10"), "p.yaml:6:16: products.f32.gemm.64: -6e+10");
  expect_refused(replaced(good, "6e+10", "fast"), "'fast' is not a finite number");
  expect_refused(replaced(good, "6e+10", "inf"), "'inf' is not a finite number");
  expect_refused(replaced(good, "6e+10", "\"6e+10\""), "is not a finite number");
  expect_refused(replaced(good, "6e+10", "[6e+10]"), "expects a number, found a list");
  expect_refused(replaced(good, "ranks_per_node: 0", "ranks_per_node: 1.5"),
                 "ranks_per_node: 1.5 is not a whole number");
  expect_refused("[1, 2]", "expects a mapping with orthrus_profile");
}

// ---- interpolation ------------------------------------------------------------------------------

TEST(RateTable, HitsItsPointsAndStaysBetweenNeighbours) {
  const RateTable table{{64, 1e10}, {256, 3e10}, {1024, 2e10}};
  EXPECT_EQ(rate_at(table, 1), 1e10);
  EXPECT_EQ(rate_at(table, 1e6), 2e10);
  for (const RatePoint& p : table) EXPECT_DOUBLE_EQ(rate_at(table, p.size), p.rate);
  // 128 is half way from 64 to 256 where sizes and rates are seen by their logarithms.
  EXPECT_DOUBLE_EQ(rate_at(table, 128), std::sqrt(1e10 * 3e10));
  for (double size = 64; size < 256; size *= 1.1) {
    EXPECT_LT(rate_at(table, size), rate_at(table, size * 1.05)) << size;
  }
  for (double size = 256; size < 970; size *= 1.1) {
    EXPECT_GT(rate_at(table, size), rate_at(table, size * 1.05)) << size;
  }
}

TEST(MachineProfile, LargerWorkTakesLonger) {
  // Rates that rise with size must not rise faster than the work does; where a call is all there
  // is to pay, two digits of a rate make it 1 % faster or slower.
  for (const ShippedProfile& shipped : shipped_profiles()) {
    const MachineProfile p = load_profile(std::string(shipped.name));
    double before = 0;
    for (double n = 16; n < 20000; n *= 1.2) {
      const auto m = static_cast<Index>(n);
      for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
        const Index more = m + m / 8;
        EXPECT_LT(gemm_seconds(p, dtype, m, m, m), 1.01 * gemm_seconds(p, dtype, more, more, more))
            << p.name << " " << name_of(dtype) << " " << m;
      }
      const double now = msign_seconds(p, m, 4 * m, 5, DType::bf16);
      EXPECT_LT(before, 1.01 * now) << p.name << " " << m;
      EXPECT_LT(pass_seconds(p, 100 * n), 1.01 * pass_seconds(p, 120 * n)) << p.name << " " << n;
      before = now;
    }
  }
}

// ---- formulas: with constant rates, closed forms ------------------------------------------------
// Sums of up to twenty rounded terms: equal to 1e-13.

void expect_close(double a, double b) { EXPECT_NEAR(a, b, 1e-13 * std::abs(b)); }

TEST(Cost, ProductsAreFlopsOverRate) {
  const MachineProfile p = flat(1e11, 1e10);
  expect_close(gemm_seconds(p, DType::f64, 30, 20, 10), 2.0 * 30 * 20 * 10 / 1e11);
  expect_close(syrk_seconds(p, DType::bf16, 30, 20), 30.0 * 30 * 20 / 1e11);
  expect_close(pass_seconds(p, 5e9), 0.5);
}

TEST(Cost, TheSmallestDimensionChoosesTheRate) {
  MachineProfile p;
  p.f32 = {{{10, 1e9}, {1000, 1e11}}, {{10, 2e9}, {1000, 2e11}}};
  expect_close(gemm_seconds(p, DType::f32, 1000, 10, 1000), 2e7 / 1e9);
  expect_close(syrk_seconds(p, DType::f32, 10, 1000), 1e5 / 2e9);
  expect_close(syrk_seconds(p, DType::f32, 1000, 10), 1e7 / 2e9);
}

TEST(Cost, MsignIsItsFlopsAndItsPasses) {
  constexpr double rate = 1e11;
  const double m = 48;
  const double n = 112;
  // Passes that cost nothing: 3·m²n + m³ per iteration, as Lmo::flops counts them.
  const MachineProfile products = flat(rate, 1e30);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    expect_close(msign_seconds(products, 48, 112, 5, dtype),
                 5 * (3 * m * m * n + m * m * m) / rate);
    expect_close(msign_seconds(products, 112, 48, 5, dtype),
                 5 * (3 * m * m * n + m * m * m) / rate);
  }
  const MachineProfile passes = flat(1e30, 1e10);
  expect_close(msign_seconds(passes, 48, 112, 5, DType::f32),
               (5 * (8 * m * m + 8 * m * n) + 16 * m * n) / 1e10);
  expect_close(msign_seconds(passes, 48, 112, 5, DType::bf16),
               (5 * (4 * m * m + 4 * m * n) + 14 * m * n) / 1e10);
  // Five iterations by two products: 3·m²n each, and 4·5 − 3·2 triangles of m³.
  const MachineProfile tall = flat(rate, 1e30);
  expect_close(msign_seconds(tall, 256, 1024, 5, DType::bf16, 2),
               (2 * 3.0 * 256 * 256 * 1024 + 14 * 256.0 * 256 * 256 * (1 + 0.5)) / rate);
}

TEST(Cost, TheGramPolynomialIsFourTrianglesPerIterationButThree) {
  MachineProfile p = flat(1e11, 1e30);
  p.f64 = flat(5e10, 1e30).f64;
  const double cube = 1024.0 * 1024 * 1024 * (1 + 1.0 / 8);  // panels of 128 on the diagonal
  expect_close(gram_polynomial_seconds(p, 1024, 1), cube / 1e11);
  expect_close(gram_polynomial_seconds(p, 1024, 5), 17 * cube / 1e11);
  expect_close(gram_polynomial_seconds(p, 1024, 5, 2), (11 + 6 * 2) * cube / 1e11);
  expect_close(gram_polynomial_seconds(p, 100, 5), 17 * 2e6 / 1e11);  // one panel: the square
  const MachineProfile passes = flat(1e30, 1e10);
  expect_close(gram_polynomial_seconds(passes, 256, 5, 1),
               (14 * 16 + 3 * (30 + 3 * 6)) * 65536.0 / 1e10);
}

TEST(Cost, CollectivesOnOneNodeAreAlphaAndBeta) {
  MachineProfile p = flat(1, 1, 1e-6, 1e9);
  EXPECT_EQ(collective_seconds(p, Collective::all_reduce, 0, 1, 1), 0);
  expect_close(collective_seconds(p, Collective::send, 1e9, 2, 2), 1 + 2e-6);
  expect_close(collective_seconds(p, Collective::all_gather, 1e9, 1, 5), 1 + 3e-6);
  expect_close(collective_seconds(p, Collective::reduce_scatter, 1e9, 1, 8), 1 + 3e-6);
  expect_close(collective_seconds(p, Collective::all_reduce, 1e9, 3, 8), 1 + 3 * 6e-6);
  expect_close(collective_seconds(p, Collective::all_to_all, 1e9, 1, 8), 1 + 7e-6);
  p.node.special[Collective::all_to_all] = {2e-6, {{1, 5e8}}};
  expect_close(collective_seconds(p, Collective::all_to_all, 1e9, 1, 8), 2 + 14e-6);
  expect_close(collective_seconds(p, Collective::all_gather, 1e9, 1, 8), 1 + 3e-6);
  // Without a call of its own it is bytes in another's; many calls are as fast as one of them is.
  p.node.special[Collective::send] = {1e-6, {{1e3, 1e8}, {1e6, 1e9}}};
  expect_close(collective_seconds(p, Collective::send, 1e6, 0, 2), 1e-3);
  expect_close(collective_seconds(p, Collective::send, 1e6, 1000, 2), 1e-2 + 1e-3);
}

TEST(Cost, TheNetworkCarriesWhatLeavesTheNode) {
  MachineProfile p = flat(1, 1, 1e-6, 1e30);
  p.ranks_per_node = 8;
  p.network.any = {1e-5, {{1, 1e9}}};
  // 4 nodes of 8: of 31 shares a rank sends, 3 leave the node where nodes work together, 24 in
  // all_to_all.
  expect_close(collective_seconds(p, Collective::all_gather, 31e9, 1, 32), 3 + 3e-6 + 2e-5);
  expect_close(collective_seconds(p, Collective::all_reduce, 31e9, 1, 32), 3 + 6e-6 + 4e-5);
  expect_close(collective_seconds(p, Collective::all_to_all, 31e9, 1, 32), 24 + 7e-6 + 24e-5);
  expect_close(collective_seconds(p, Collective::broadcast, 1e9, 1, 32), 1 + 3e-6 + 2e-5);
  // One rank per node: all of it leaves.
  expect_close(collective_seconds(p, Collective::all_gather, 3e9, 1, 4, 1), 3 + 2e-5);
  expect_close(collective_seconds(p, Collective::send, 1e9, 1, 2, 1), 1 + 1e-5);
  // Both levels move bytes at once: the slower one counts.
  p.node.any.bytes_per_s = {{1, 1e9}};
  expect_close(collective_seconds(p, Collective::all_gather, 31e9, 1, 32), 28 + 3e-6 + 2e-5);
  // A second node that is not full: one of 8 shares leaves.
  expect_close(collective_seconds(p, Collective::all_gather, 8e9, 1, 9), 7 + 3e-6 + 1e-5);
}

TEST(Cost, MoreRanksNeverMakeACollectiveFaster) {
  for (const ShippedProfile& shipped : shipped_profiles()) {
    const MachineProfile p = load_profile(std::string(shipped.name));
    for (const Collective kind : collectives) {
      if (kind == Collective::send) continue;
      double before = 0;
      for (int ranks = 2; ranks <= 4096; ranks *= 2) {
        const double times = kind == Collective::all_reduce ? 2 : 1;
        const bool chain = kind == Collective::broadcast || kind == Collective::reduce;
        const double sent = 1e8 * times * (chain ? 1 : (ranks - 1.0) / ranks);
        const double now = collective_seconds(p, kind, sent, 1, ranks);
        // Where nodes work together, several adapters carry what one link of a node carried: a
        // step down of as much is right when the second node joins.
        if (p.ranks_per_node == 0 || ranks != 2 * p.ranks_per_node) {
          EXPECT_GE(now, before * 0.999) << p.name << " " << name_of(kind) << " " << ranks;
        }
        before = now;
      }
    }
  }
}

}  // namespace
}  // namespace orthrus::runtime
