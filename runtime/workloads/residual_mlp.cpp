#include "torch_model.hpp"

namespace orthrus::workloads {
namespace {

/// The nearest (semi-)orthogonal matrix, in place: eight Newton–Schulz iterations with the
/// polynomials of Polar Express (arXiv:2505.16932) for singular values above 1e-3 of the norm. On
/// the host, whatever the device: the same weights everywhere.
void orthogonalize(at::Tensor& weights) {
  constexpr double table[8][3] = {{8.28721201814563, -23.595886519098837, 17.300387312530933},
                                  {4.107059111542203, -2.9478499167379106, 0.5448431082926601},
                                  {3.9486908534822946, -2.908902115952949, 0.5518191394370137},
                                  {3.3184196573706015, -2.488488024314874, 0.51004894012372},
                                  {2.300652019954817, -1.6689039845747493, 0.4188073119525673},
                                  {1.891301407787398, -1.2679958271945868, 0.37680408948524835},
                                  {1.8750014808534479, -1.2500016453999487, 0.3750001645474248},
                                  {1.875, -1.25, 0.375}};
  const at::NoGradGuard no_gradients;
  const bool tall = weights.size(0) > weights.size(1);
  at::Tensor x = (tall ? weights.t() : weights).to(at::kCPU, at::kDouble);
  x = x / x.norm();
  for (const auto& [a, b, c] : table) {
    const at::Tensor gram = at::mm(x, x.t());
    x = a * x + at::mm(b * gram + c * at::mm(gram, gram), x);
  }
  weights.copy_(tall ? x.t() : x);
}

class ResidualMlpLm final : public TextModel {
 public:
  ResidualMlpLm(const Config& config, Options options, int cuda)
      : TextModel(config, options, "char", cuda) {
    const std::int64_t layers = options.integer("layers", 2, 1, 1024);
    width_ = options.integer("width", 256, 1, 1 << 16);
    const std::int64_t hidden = options.integer("hidden", 1024, 1, 1 << 18);
    options.done();
    embed_ = &add("embed.weight", {vocab(), width_}, 0.02);
    position_ = &add("position.weight", {context(), width_}, 0.02);
    // The scale of a draw is lost when it is orthogonalized.
    const auto orthogonal = [&](const std::string& name, std::int64_t out, std::int64_t in) {
      at::Tensor& w = add(name, {out, in}, 1);
      orthogonalize(w);
      return &w;
    };
    for (std::int64_t l = 0; l < layers; ++l) {
      const std::string at = "layers." + std::to_string(l) + ".mlp.";
      at::Tensor* up = orthogonal(at + "fc1.weight", hidden, width_);
      at::Tensor* down = orthogonal(at + "fc2.weight", width_, hidden);
      layers_.emplace_back(up, down);
    }
    head_ = orthogonal("head.weight", vocab(), width_);
  }

 private:
  static at::Tensor rmsnorm(const at::Tensor& x) {
    return x * at::rsqrt(x.square().mean(-1, true) + 1e-5);
  }

  at::Tensor logits(const at::Tensor& tokens) override {
    at::Tensor h = (at::embedding(*embed_, tokens) + *position_).view({-1, width_});
    const double share = 1.0 / static_cast<double>(layers_.size());
    for (const auto& [up, down] : layers_) {
      h = (1 - share) * h + share * linear(at::gelu(linear(rmsnorm(h), *up)), *down);
    }
    return linear(rmsnorm(h), *head_);
  }

  std::int64_t width_ = 0;
  at::Tensor *embed_ = nullptr, *position_ = nullptr, *head_ = nullptr;
  std::vector<std::pair<at::Tensor*, at::Tensor*>> layers_;
};

}  // namespace

std::unique_ptr<Workload> open_residual_mlp_lm(const Config& config, int cuda) {
  return std::make_unique<ResidualMlpLm>(config,
                                         Options(config, "workload", config.workload_values), cuda);
}

}  // namespace orthrus::workloads
