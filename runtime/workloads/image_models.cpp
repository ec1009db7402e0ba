#include <cmath>

#include "torch_model.hpp"

namespace orthrus::workloads {
namespace {

/// He et al. (2015): keeps the scale of activations through ReLU.
double he(std::int64_t fan_in) { return std::sqrt(2.0 / static_cast<double>(fan_in)); }

class Mlp final : public ImageModel {
 public:
  Mlp(const Config& config, Options options, int cuda) : ImageModel(config, options, cuda) {
    const std::int64_t hidden = options.integer("hidden", 256, 1, 1 << 16);
    const std::int64_t depth = options.integer("depth", 2, 1, 64);
    options.done();
    std::int64_t in = images().height * images().width;
    for (std::int64_t l = 0; l < depth; ++l, in = hidden) {
      const std::string at = "layers." + std::to_string(l) + ".";
      at::Tensor* w = &add(at + "weight", {hidden, in}, he(in));
      layers_.emplace_back(w, &add_constant(at + "bias", {hidden}, 0));
    }
    at::Tensor* w = &add("head.weight", {images().classes, in}, 0.5 * he(in));
    layers_.emplace_back(w, &add_constant("head.bias", {images().classes}, 0));
  }

 private:
  at::Tensor logits(const at::Tensor& images) override {
    at::Tensor x = images.flatten(1);
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      x = linear(l > 0 ? at::relu(x) : x, *layers_[l].first, *layers_[l].second);
    }
    return x;
  }

  std::vector<std::pair<at::Tensor*, at::Tensor*>> layers_;
};

class Convnet final : public ImageModel {
 public:
  Convnet(const Config& config, Options options, int cuda) : ImageModel(config, options, cuda) {
    const std::int64_t channels = options.integer("channels", 16, 1, 4096);
    options.done();
    const std::int64_t size = images().height / 4 * (images().width / 4);
    if (size == 0) options.refuse("name", "images below 4×4 cannot be pooled twice");
    const std::int64_t in = 2 * channels * size;
    kernel1_ = &add("layers.0.conv.weight", {channels, 1, 3, 3}, he(9));
    bias1_ = &add_constant("layers.0.conv.bias", {channels}, 0);
    kernel2_ = &add("layers.1.conv.weight", {2 * channels, channels, 3, 3}, he(9 * channels));
    bias2_ = &add_constant("layers.1.conv.bias", {2 * channels}, 0);
    head_ = &add("head.weight", {images().classes, in}, 0.5 * he(in));
    head_bias_ = &add_constant("head.bias", {images().classes}, 0);
  }

 private:
  static at::Tensor stage(const at::Tensor& x, const at::Tensor& kernel, const at::Tensor& bias) {
    return at::max_pool2d(at::relu(at::conv2d(x, kernel, bias, 1, 1)), 2);
  }
  at::Tensor logits(const at::Tensor& images) override {
    const at::Tensor x = stage(stage(images, *kernel1_, *bias1_), *kernel2_, *bias2_);
    return linear(x.flatten(1), *head_, *head_bias_);
  }

  at::Tensor *kernel1_ = nullptr, *bias1_ = nullptr, *kernel2_ = nullptr, *bias2_ = nullptr,
             *head_ = nullptr, *head_bias_ = nullptr;
};

}  // namespace

std::unique_ptr<Workload> open_mlp(const Config& config, int cuda) {
  return std::make_unique<Mlp>(config, Options(config, "workload", config.workload_values), cuda);
}
std::unique_ptr<Workload> open_convnet(const Config& config, int cuda) {
  return std::make_unique<Convnet>(config, Options(config, "workload", config.workload_values),
                                   cuda);
}

}  // namespace orthrus::workloads
