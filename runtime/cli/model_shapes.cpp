#include "runtime/cli/model_shapes.hpp"

#include <array>
#include <orthrus/error.hpp>
#include <string_view>
#include <utility>

namespace orthrus::cli {
namespace {

/// Parameters in the making; names begin with `prefix`.
class Shapes {
 public:
  std::string prefix;

  runtime::ParameterShape& add(const char* name, std::vector<Index> dims) {
    runtime::ParameterShape& p = list_.emplace_back();
    p.name = prefix + name;
    p.shape = std::move(dims);
    return p;
  }
  void layer(int number) { prefix = "layers." + std::to_string(number) + "."; }
  [[nodiscard]] std::vector<runtime::ParameterShape> take() { return std::move(list_); }

 private:
  std::vector<runtime::ParameterShape> list_;
};

/// GPT-2 small as published: 124,439,808 parameters (tied head).
std::vector<runtime::ParameterShape> gpt2_124m() {
  constexpr Index c = 768;
  Shapes s;
  s.add("wte.weight", {50257, c});
  s.add("wpe.weight", {1024, c});
  for (int l = 0; l < 12; ++l) {
    s.layer(l);
    s.add("norm1.weight", {c});
    s.add("norm1.bias", {c});
    s.add("attn.qkv.weight", {3 * c, c}).views = {{0, c, 0, c}, {c, c, 0, c}, {2 * c, c, 0, c}};
    s.add("attn.qkv.bias", {3 * c});
    s.add("attn.proj.weight", {c, c});
    s.add("attn.proj.bias", {c});
    s.add("norm2.weight", {c});
    s.add("norm2.bias", {c});
    s.add("mlp.fc.weight", {4 * c, c});
    s.add("mlp.fc.bias", {4 * c});
    s.add("mlp.proj.weight", {c, 4 * c});
    s.add("mlp.proj.bias", {c});
  }
  s.prefix.clear();
  s.add("lnf.weight", {c});
  s.add("lnf.bias", {c});
  return s.take();
}

/// The matrices of a gated feed-forward layer.
void add_gated(Shapes& s, Index width, Index ffn) {
  s.add("gate.weight", {ffn, width});
  s.add("up.weight", {ffn, width});
  s.add("down.weight", {width, ffn});
}

/// Llama 3 (arXiv:2407.21783, table 3): grouped-query attention, SwiGLU, untied head, 128,256
/// tokens.
std::vector<runtime::ParameterShape> llama3(int layers, Index width, Index ffn, Index heads,
                                            Index kv_heads) {
  const Index kv = width / heads * kv_heads;
  Shapes s;
  s.add("embed.weight", {128256, width});
  for (int l = 0; l < layers; ++l) {
    s.layer(l);
    s.add("norm1.weight", {width});
    s.add("attn.q.weight", {width, width});
    s.add("attn.k.weight", {kv, width});
    s.add("attn.v.weight", {kv, width});
    s.add("attn.proj.weight", {width, width});
    s.add("norm2.weight", {width});
    s.prefix += "mlp.";
    add_gated(s, width, ffn);
  }
  s.prefix.clear();
  s.add("norm.weight", {width});
  s.add("head.weight", {128256, width});
  return s.take();
}

/// Kimi K2 (arXiv:2507.20534; the numbers are those of its config.json): latent attention as in
/// DeepSeek-V3 (arXiv:2412.19437), one dense layer, then 384 experts and a shared one per layer.
/// The router's bias is its load-balancing correction.
std::vector<runtime::ParameterShape> kimi_k2() {
  constexpr Index width = 7168;
  constexpr Index vocabulary = 163840;
  constexpr Index heads = 64;
  constexpr Index query_rank = 1536;
  constexpr Index kv_rank = 512;
  constexpr Index nope = 128;  // of a head's query and key: without rotary positions,
  constexpr Index rope = 64;   // and with them (keys share one)
  constexpr Index value = 128;
  constexpr int experts = 384;
  constexpr Index expert_ffn = 2048;
  constexpr Index dense_ffn = 18432;
  Shapes s;
  s.add("embed.weight", {vocabulary, width});
  for (int l = 0; l < 61; ++l) {
    s.layer(l);
    s.add("norm1.weight", {width});
    s.add("attn.q_a.weight", {query_rank, width});
    s.add("attn.q_norm.weight", {query_rank});
    s.add("attn.q_b.weight", {heads * (nope + rope), query_rank});
    s.add("attn.kv_a.weight", {kv_rank + rope, width});
    s.add("attn.kv_norm.weight", {kv_rank});
    s.add("attn.kv_b.weight", {heads * (nope + value), kv_rank});
    s.add("attn.proj.weight", {width, heads * value});
    s.add("norm2.weight", {width});
    s.prefix += "mlp.";
    if (l == 0) {
      add_gated(s, width, dense_ffn);
      continue;
    }
    s.add("router.weight", {experts, width});
    s.add("router.bias", {experts});
    const std::string mlp = s.prefix;
    s.prefix = mlp + "shared.";
    add_gated(s, width, expert_ffn);
    for (int e = 0; e < experts; ++e) {
      s.prefix = mlp + "experts." + std::to_string(e) + ".";
      add_gated(s, width, expert_ffn);
    }
  }
  s.prefix.clear();
  s.add("norm.weight", {width});
  s.add("head.weight", {vocabulary, width});
  return s.take();
}

struct Model {
  std::string_view name;
  std::vector<runtime::ParameterShape> (*shapes)();
};
constexpr std::array models{
    Model{"gpt2-124m", gpt2_124m},
    Model{"llama3-8b", [] { return llama3(32, 4096, 14336, 32, 8); }},
    Model{"llama3-405b", [] { return llama3(126, 16384, 53248, 128, 8); }},
    Model{"kimi-k2", kimi_k2},
};

}  // namespace

std::vector<runtime::ParameterShape> model_shapes(const std::string& model) {
  for (const Model& m : models) {
    if (m.name == model) return m.shapes();
  }
  throw ConfigError("--model '" + model + "' is not known; known: " + known_models());
}

std::string known_models() {
  std::string text;
  for (const Model& m : models) text += (text.empty() ? "" : ", ") + std::string(m.name);
  return text;
}

}  // namespace orthrus::cli
