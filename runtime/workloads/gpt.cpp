#include <cmath>

#include "torch_model.hpp"

namespace orthrus::workloads {
namespace {

class Gpt final : public TextModel {
 public:
  Gpt(const Config& config, Options options, int cuda) : TextModel(config, options, "byte", cuda) {
    const std::int64_t layers = options.integer("layers", 4, 1, 1024);
    width_ = options.integer("width", 128, 1, 1 << 16);
    heads_ = options.integer("heads", 4, 1, 1024);
    options.done();
    if (width_ % heads_ != 0) {
      options.refuse("heads", std::to_string(heads_) + " heads do not divide a width of " +
                                  std::to_string(width_));
    }
    const std::int64_t c = width_;
    constexpr double deviation = 0.02;
    const double residual = deviation / std::sqrt(2.0 * static_cast<double>(layers));
    embed_ = &add("embed.weight", {vocab(), c}, deviation);
    position_ = &add("position.weight", {context(), c}, deviation);
    for (std::int64_t l = 0; l < layers; ++l) {
      const std::string at = "layers." + std::to_string(l) + ".";
      Layer layer;
      layer.norm1 = &add_constant(at + "norm1.weight", {c}, 1);
      layer.qkv = &add(at + "attn.qkv.weight", {3 * c, c}, deviation);
      set_views({{0, c, 0, c}, {c, c, 0, c}, {2 * c, c, 0, c}});
      layer.project = &add(at + "attn.proj.weight", {c, c}, residual);
      layer.norm2 = &add_constant(at + "norm2.weight", {c}, 1);
      layer.up = &add(at + "mlp.fc.weight", {4 * c, c}, deviation);
      layer.down = &add(at + "mlp.proj.weight", {c, 4 * c}, residual);
      layers_.push_back(layer);
    }
    norm_ = &add_constant("norm.weight", {c}, 1);
    says_it_has_norms();
    head_ = &add("head.weight", {vocab(), c}, deviation);
    // −∞ above the diagonal: no token sees a later one.
    mask_ = bring(at::full({context(), context()}, -INFINITY, at::kFloat).triu_(1));
  }

 private:
  struct Layer {
    at::Tensor *norm1, *qkv, *project, *norm2, *up, *down;
  };

  [[nodiscard]] at::Tensor attention(const at::Tensor& x, const Layer& layer,
                                     std::int64_t windows) const {
    const std::int64_t t = context(), d = width_ / heads_;
    // 3 × (windows·heads) × tokens × d
    const at::Tensor qkv = linear(x, *layer.qkv)
                               .view({windows, t, 3, heads_, d})
                               .permute({2, 0, 3, 1, 4})
                               .reshape({3, windows * heads_, t, d});
    const at::Tensor scores = at::baddbmm(mask_, qkv[0], qkv[1].transpose(1, 2), 1.0,
                                          1.0 / std::sqrt(static_cast<double>(d)));
    const at::Tensor mixed = at::bmm(at::softmax(scores, -1), qkv[2]);
    return linear(
        mixed.view({windows, heads_, t, d}).transpose(1, 2).reshape({windows * t, width_}),
        *layer.project);
  }

  at::Tensor logits(const at::Tensor& tokens) override {
    const std::int64_t windows = tokens.size(0);
    at::Tensor x =
        (at::embedding(*embed_, tokens) + *position_).view({windows * context(), width_});
    for (const Layer& layer : layers_) {
      x = x + attention(norm(x, *layer.norm1, windows), layer, windows);
      x = x +
          linear(at::gelu(linear(norm(x, *layer.norm2, windows), *layer.up), "tanh"), *layer.down);
    }
    return linear(norm(x, *norm_, windows), *head_);
  }

  std::int64_t width_ = 0, heads_ = 0;
  at::Tensor *embed_ = nullptr, *position_ = nullptr, *norm_ = nullptr, *head_ = nullptr;
  std::vector<Layer> layers_;
  at::Tensor mask_;
};

}  // namespace

std::unique_ptr<Workload> open_gpt(const Config& config, int cuda) {
  return std::make_unique<Gpt>(config, Options(config, "workload", config.workload_values), cuda);
}

}  // namespace orthrus::workloads
