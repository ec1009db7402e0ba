// The shape lists of `orthrus plan --model` have the tensors of the published models.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <orthrus/config.hpp>
#include <orthrus/error.hpp>
#include <string>

#include "runtime/cli/model_shapes.hpp"

namespace orthrus::cli {
namespace {

Index total(const std::string& model) {
  Index sum = 0;
  for (const runtime::ParameterShape& p : model_shapes(model)) sum += p.size();
  return sum;
}

TEST(ModelShapes, TotalsAreThePublishedParameterCounts) {
  EXPECT_EQ(total("gpt2-124m"), 124'439'808);
  EXPECT_EQ(total("llama3-8b"), 8'030'261'248);
  EXPECT_EQ(total("llama3-405b"), 405'853'388'800);
  // Kimi-K2-Instruct's checkpoint without the scales of its fp8 blocks (with them, and what else is
  // stored beside parameters, Hugging Face counts 1,026,470,731,056).
  EXPECT_EQ(total("kimi-k2"), 1'026'408'232'448);
  // The report says 1.04 T (arXiv:2507.20534, table 2), 1.3 % more than the tensors it released.
  EXPECT_NEAR(static_cast<double>(total("kimi-k2")), 1.04e12, 0.015e12);
}

TEST(ModelShapes, KimiK2HasEveryExpertAsItsOwnMatrices) {
  const auto shapes = model_shapes("kimi-k2");
  EXPECT_EQ(shapes.size(), 3U + 61 * 9 + 3 + 60 * (2 + 3 * 385));
  const auto experts = std::count_if(shapes.begin(), shapes.end(), [](const auto& p) {
    return p.name.find(".experts.") != std::string::npos;
  });
  EXPECT_EQ(experts, 60 * 384 * 3);
  const auto named = [&](const std::string& name) {
    const auto found =
        std::find_if(shapes.begin(), shapes.end(), [&](const auto& p) { return p.name == name; });
    EXPECT_NE(found, shapes.end()) << name;
    return found == shapes.end() ? std::vector<Index>{} : found->shape;
  };
  EXPECT_EQ(named("layers.5.mlp.experts.17.up.weight"), (std::vector<Index>{2048, 7168}));
  EXPECT_EQ(named("layers.60.mlp.experts.383.down.weight"), (std::vector<Index>{7168, 2048}));
  EXPECT_EQ(named("layers.0.mlp.gate.weight"), (std::vector<Index>{18432, 7168}));
  EXPECT_EQ(named("layers.1.mlp.router.bias"), std::vector<Index>{384});
}

// A matrix group on attention and feed-forward layers, the rest element-wise: as in configs/.
TEST(ModelShapes, OneConfigFitsAll) {
  const Config config = parse_config(R"(
schema: 1
groups:
  - {match: "layers.*.{attn,mlp}.*.weight", rule: {name: muon}}
  - {match: "*", rule: {name: adamw}}
)");
  for (const char* const model : {"gpt2-124m", "llama3-8b", "llama3-405b", "kimi-k2"}) {
    for (const runtime::ParameterShape& p : model_shapes(model)) {
      const bool in_layer = p.name.starts_with("layers.");
      EXPECT_EQ(runtime::effective_group(config, p), in_layer && p.shape.size() == 2 ? 0 : 1)
          << p.name;
    }
  }
}

TEST(ModelShapes, AreBuiltAtOnce) {
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(model_shapes("kimi-k2").size(), 69'975U);
  // About 20 ms; a list that grew quadratically would take minutes, a busy machine does not.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

TEST(ModelShapes, UnknownNamesListTheKnownOnes) {
  try {
    (void)model_shapes("llama4");
    FAIL();
  } catch (const ConfigError& e) {
    EXPECT_EQ(e.exit_code(), ExitCode::config);
    EXPECT_NE(std::string(e.what()).find("gpt2-124m, llama3-8b, llama3-405b, kimi-k2"),
              std::string::npos)
        << e.what();
  }
}

}  // namespace
}  // namespace orthrus::cli
