#include "runtime/mirrors.hpp"

#include <orthrus/error.hpp>

#include "runtime/region.hpp"

namespace orthrus::runtime {

Mirrors::Mirrors(std::vector<Parameter>& parameters, std::vector<ParameterShape>& shapes,
                 std::span<const Index> sizes, kernels::Backend& backend)
    : backend_(backend), tensors_(parameters.size()) {
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    Parameter& p = parameters[i];
    Tensor& t = tensors_[i];
    t.size = sizes[i];
    t.weights = {p.weights, p.dtype, {}};
    t.gradient = {const_cast<void*>(p.gradient), p.gradient_dtype, {}};  // only read
    if (t.size == 0) continue;
    const bool weights = p.weights != nullptr && !backend.reaches(p.weights);
    const bool gradient = !backend.reaches(p.gradient);
    if (!weights && !gradient) continue;
    if (!is_contiguous(shapes[i])) {
      if (weights != gradient) {
        throw ConfigError("parameter '" + p.name + "' has strides, and its " +
                          (weights ? "weights" : "gradient") + " on the host, its " +
                          (weights ? "gradient" : "weights") +
                          " on the device: both must be on one side");
      }
      if (host_ == nullptr) host_ = kernels::open_backend("cpu");
      t.strided = shapes[i];
    }
    shapes[i].strides.clear();
    const auto bytes = [&](DType dtype) {
      return static_cast<std::size_t>(t.size) * bytes_of(dtype);
    };
    if (weights) {
      t.weights.device = kernels::DeviceBuffer(backend, bytes(p.dtype));
      p.weights = t.weights.device.data();
    }
    if (gradient) {
      t.gradient.device = kernels::DeviceBuffer(backend, bytes(p.gradient_dtype));
      p.gradient = t.gradient.device.data();
    }
  }
  fetch_weights();
}

/// The host's memory may change as soon as this returns.
void Mirrors::fetch(const Tensor& tensor, const Mirror& mirror) {
  if (mirror.device.data() == nullptr) return;
  const void* from = mirror.trainer;
  if (!tensor.strided.strides.empty()) {
    dense_.resize(mirror.device.bytes());
    pack(tensor.strided, from, mirror.dtype, {0, 1, tensor.size, tensor.size},
         {dense_.data(), tensor.size, mirror.dtype}, *host_);
    from = dense_.data();
  }
  backend_.copy(from, mirror.device.data(), mirror.device.bytes());
  backend_.wait();
}

void Mirrors::fetch_gradient(std::size_t i) { fetch(tensors_[i], tensors_[i].gradient); }

void Mirrors::fetch_weights() {
  for (const Tensor& t : tensors_) fetch(t, t.weights);
}

void Mirrors::deliver_weights() {
  for (const Tensor& t : tensors_) {
    const Mirror& mirror = t.weights;
    if (mirror.device.data() == nullptr) continue;
    const bool strided = !t.strided.strides.empty();
    if (strided) dense_.resize(mirror.device.bytes());
    backend_.copy(mirror.device.data(), strided ? dense_.data() : mirror.trainer,
                  mirror.device.bytes());
    backend_.wait();
    if (!strided) continue;
    unpack({dense_.data(), t.size, mirror.dtype}, t.strided, mirror.trainer, mirror.dtype,
           {0, 1, t.size, t.size}, *host_);
  }
}

void Mirrors::forget_weights(std::size_t i) { tensors_[i].weights.device = {}; }

}  // namespace orthrus::runtime
