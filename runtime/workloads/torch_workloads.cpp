#include "torch_workloads.hpp"

#include <ATen/Parallel.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/cuda.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <orthrus/error.hpp>
#include <utility>

#include "beside.hpp"
#include "torch_model.hpp"

namespace orthrus::workloads {
namespace {

/// Threads of libtorch and of the BLAS below it, for a scope.
class Threads {
 public:
  explicit Threads(std::int64_t count) : torch_(at::get_num_threads()) {
    // OpenBLAS with its own threads does not listen to OpenMP. It is there only if BLAS is
    // OpenBLAS.
    static const auto get =
        reinterpret_cast<int (*)()>(::dlsym(RTLD_DEFAULT, "openblas_get_num_threads"));
    static const auto set =
        reinterpret_cast<void (*)(int)>(::dlsym(RTLD_DEFAULT, "openblas_set_num_threads"));
    if (get != nullptr && set != nullptr) {
      blas_ = get();
      set_blas_ = set;
      if (blas_ != count) set_blas_(static_cast<int>(count));
    }
    if (torch_ != count) at::set_num_threads(static_cast<int>(count));
    count_ = static_cast<int>(count);
  }
  ~Threads() {
    if (set_blas_ != nullptr && blas_ != count_) set_blas_(blas_);
    if (torch_ != count_) at::set_num_threads(torch_);
  }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int torch_ = 1, blas_ = 1, count_ = 1;
  void (*set_blas_)(int) = nullptr;
};

at::Device place_on(int cuda) {
  if (cuda < 0 || !torch::cuda::is_available() ||
      cuda >= static_cast<int>(torch::cuda::device_count())) {
    return at::kCPU;
  }
  return {at::kCUDA, static_cast<at::DeviceIndex>(cuda)};
}

/// The stream this thread's work on a device goes into.
std::optional<c10::Stream> stream_of(at::Device place) {
  if (place.is_cpu()) return std::nullopt;
  return c10::impl::VirtualGuardImpl(place.type()).getStream(place);
}

/// The `cudaStream_t` behind a stream; null: the default stream, whose number is 0. Without CUDA's
/// headers, libtorch tells that of another from 2.6 on.
template <class S>
void* handle_of(const S& stream) {
  if (stream.id() == 0) return nullptr;
  if constexpr (requires { stream.native_handle(); }) return stream.native_handle();
  throw ConfigError(
      "this libtorch does not tell the handle of its current stream: use the default");
}

/// Work of its scope goes into a stream, if there is one.
class InStream {
 public:
  explicit InStream(const std::optional<c10::Stream>& stream) {
    if (stream) guard_.emplace(*stream);
  }

 private:
  std::optional<c10::StreamGuard> guard_;
};

}  // namespace

bool torch_available() { return true; }
bool torch_reaches_cuda() { return torch::cuda::is_available(); }

/// Autograd calls one of these after it has added a parameter's gradient.
struct TorchModel::Hooks {
  struct Announce final : torch::autograd::FunctionPostHook {
    Announce(Hooks& hooks, std::size_t id) : hooks_(hooks), id_(id) {}
    torch::autograd::variable_list operator()(const torch::autograd::variable_list& outputs,
                                              const torch::autograd::variable_list&) override {
      hooks_.announce(id_);
      return outputs;
    }
    Hooks& hooks_;
    std::size_t id_;
  };

  void announce(std::size_t id) {
    if (done[id]) return;
    done[id] = true;
    if (ready != nullptr) (*ready)(static_cast<int>(id));
  }

  // Kept: a leaf only holds them weakly. By what kind of pointer depends on libtorch's version.
  std::vector<decltype(torch::autograd::impl::grad_accumulator(
      std::declval<const torch::autograd::Variable&>()))>
      nodes;
  std::vector<bool> done;
  const std::function<void(int)>* ready = nullptr;
};

TorchModel::TorchModel(std::uint64_t seed, std::int64_t threads, int cuda)
    : seed_(seed),
      threads_(threads),
      place_(place_on(cuda)),
      stream_(stream_of(place_)),
      hooks_(std::make_unique<Hooks>()) {}
TorchModel::~TorchModel() = default;

std::optional<DeviceChoice> TorchModel::device() const {
  if (!stream_) return std::nullopt;
  return DeviceChoice{place_.index(), {handle_of(*stream_)}};
}

at::Tensor& TorchModel::keep(const std::string& name, at::Tensor weights) {
  const InStream queue(stream_);  // its gradient is accumulated in the stream that is current here
  const std::size_t id = list_.size();
  weights = bring(weights);
  weights.requires_grad_(true);
  weights.mutable_grad() = at::zeros_like(weights);
  Parameter p;
  p.name = name;
  p.shape = weights.sizes().vec();
  p.weights = weights.data_ptr<float>();
  p.gradient = weights.grad().data_ptr<float>();
  list_.push_back(std::move(p));

  hooks_->done.push_back(false);
  hooks_->nodes.push_back(torch::autograd::impl::grad_accumulator(weights));
  hooks_->nodes.back()->add_post_hook(std::make_unique<Hooks::Announce>(*hooks_, id));
  weights_.push_back(std::make_unique<at::Tensor>(std::move(weights)));
  return *weights_.back();
}

at::Tensor& TorchModel::add(const std::string& name, const std::vector<std::int64_t>& shape,
                            double deviation) {
  at::Tensor weights = at::zeros(shape, at::kFloat);
  const Draws draws(seed_, Purpose::weights, {static_cast<std::int64_t>(list_.size())});
  float* w = weights.data_ptr<float>();
  for (std::int64_t i = 0; deviation > 0 && i < weights.numel(); ++i) {
    w[i] = static_cast<float>(deviation * draws.normal(i));
  }
  return keep(name, std::move(weights));
}

at::Tensor& TorchModel::add_constant(const std::string& name,
                                     const std::vector<std::int64_t>& shape, double value) {
  return keep(name, at::full(shape, value, at::kFloat));
}

int TorchModel::id_of(const at::Tensor& weight) const {
  const auto own = std::find_if(weights_.begin(), weights_.end(),
                                [&](const auto& w) { return w.get() == &weight; });
  return static_cast<int>(own - weights_.begin());
}

at::Tensor TorchModel::norm(const at::Tensor& x, const at::Tensor& gain,
                            std::int64_t examples) const {
  at::Tensor y = at::layer_norm(x, gain.sizes(), gain);
  if (example_observer_ && y.requires_grad()) {
    // y = gain·x̂: an example's gradient is Σ ∂L/∂y·x̂ over its rows, of the mean loss of all.
    const at::Tensor normalized = at::layer_norm(x.detach(), gain.sizes());
    y.register_hook([this, normalized, examples, id = id_of(gain)](const at::Tensor& back) {
      const at::Tensor g = (back * normalized).view({examples, -1, back.size(1)}).sum(1);
      const at::Tensor own = (g * static_cast<double>(examples)).to(at::kCPU).contiguous();
      example_observer_(id, {own.data_ptr<float>(), own.size(0), own.size(1), own.size(1)});
    });
  }
  return y;
}

at::Tensor TorchModel::linear(const at::Tensor& x, const at::Tensor& weight,
                              const at::Tensor& bias) const {
  if (observer_) {
    const std::int64_t rows = std::min(x.size(0), ShardedOptimizer::activation_rows);
    const at::Tensor inputs = x.detach().narrow(0, 0, rows).to(at::kCPU).contiguous();
    observer_(id_of(weight),
              {inputs.data_ptr<float>(), inputs.size(0), inputs.size(1), inputs.size(1)});
  }
  return at::linear(x, weight, bias);
}

void TorchModel::place_weights(int id, void* data) {
  at::Tensor& w = *weights_[static_cast<std::size_t>(id)];
  // Told where it is: there may be no memory behind these addresses yet.
  w.set_data(at::for_blob(data, w.sizes())
                 .options(w.options().requires_grad(false))
                 .target_device(w.device())
                 .make_tensor());
}

double TorchModel::gradient(const Slice& slice, const std::function<void(int)>& ready) {
  if (!stream_) return differentiate(slice, ready);
  // On a device autograd announces on a thread of its own, but who calls talks to other ranks in
  // `ready`, and MPI may want one thread.
  double value = 0;
  run_beside(
      [&](const std::function<void(int)>& announce) { value = differentiate(slice, announce); },
      ready);
  return value;
}

double TorchModel::differentiate(const Slice& slice, const std::function<void(int)>& ready) {
  const Threads threads(threads_);
  const InStream queue(stream_);
  for (const auto& w : weights_) w->mutable_grad().zero_();
  hooks_->done.assign(list_.size(), false);
  hooks_->ready = &ready;
  double value = 0;
  try {
    if (slice.count > 0) {
      at::Tensor mean = loss(slice);
      mean.backward();
      value = mean.item<double>();
    }
    // What the loss does not depend on has its gradient too: zero.
    for (std::size_t id = 0; id < list_.size(); ++id) hooks_->announce(id);
  } catch (...) {
    hooks_->ready = nullptr;
    throw;
  }
  hooks_->ready = nullptr;
  return value;
}

Workload::Evaluation TorchModel::evaluate(int rank, int size) {
  const Threads threads(threads_);
  const InStream queue(stream_);
  const c10::InferenceMode no_gradients;
  Evaluation result;
  score({}, result);
  std::vector<std::int64_t> examples;
  const auto flush = [&]() {
    if (!examples.empty()) score(examples, result);
    examples.clear();
  };
  for (std::int64_t i = rank; i < held_out(); i += size) {
    examples.push_back(i);
    if (static_cast<std::int64_t>(examples.size()) == evaluation_batch()) flush();
  }
  flush();
  return result;
}

// ---- text

TextModel::TextModel(const Config& config, Options& options, const char* tokenizer, int cuda)
    : TorchModel(config.seed, options.integer("threads", 1, 1, 1024), cuda) {
  context_ = options.integer("context", 64, 1, 1 << 16);
  windows_ = options.integer("eval_windows", 64, 1, 1 << 20);
  Options data(config, "data", config.data);
  const std::string source = data.word("source", "kjv");
  const std::string asked = data.word("tokenizer", tokenizer, {"byte", "char"});
  data.done();
  tokens_ = open_tokens(source);
  vocab_ = tokens_.vocab;
  for (const auto& [part, text] :
       {std::pair{"training", &tokens_.train}, {"validation", &tokens_.val}}) {
    if (static_cast<std::int64_t>(text->size()) <= context_) {
      options.refuse("context",
                     std::to_string(context_) + " tokens and the next one do not fit into the " +
                         std::to_string(text->size()) + " of the " + part + " part of " + source);
    }
  }
  // The next token of the last one is needed too.
  order_ = Epochs(seed(), std::max<std::int64_t>(std::ssize(tokens_.train) / context_ - 1, 1));
  if (asked == "char") {
    // Codes of the distinct bytes, in their order.
    bool seen[256] = {};
    for (const auto* text : {&tokens_.train, &tokens_.val}) {
      for (const std::uint8_t b : *text) seen[b] = true;
    }
    std::uint8_t code[256] = {};
    vocab_ = 0;
    for (int b = 0; b < 256; ++b) {
      if (seen[b]) code[b] = static_cast<std::uint8_t>(vocab_++);
    }
    for (auto* text : {&tokens_.train, &tokens_.val}) {
      for (std::uint8_t& b : *text) b = code[b];
    }
  }
  make_deciles();
}

void TextModel::make_deciles() {
  const auto vocabulary = static_cast<std::size_t>(vocab_);
  std::vector<std::int64_t> counts(vocabulary), order(vocabulary), decile(vocabulary, 9);
  for (const std::uint8_t token : tokens_.train) ++counts[token];
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return counts[static_cast<std::size_t>(a)] > counts[static_cast<std::size_t>(b)];
  });
  const std::int64_t total = std::ssize(tokens_.train);
  std::int64_t before = 0;
  for (const std::int64_t token : order) {
    const std::int64_t here = counts[static_cast<std::size_t>(token)];
    if (here > 0) decile[static_cast<std::size_t>(token)] = 10 * (2 * before + here) / (2 * total);
    before += here;
  }
  decile_of_ = bring(at::tensor(decile, at::kLong));
  std::vector<double> there(10);
  for (std::int64_t i = 0; i < windows_; ++i) {
    for (std::int64_t t = 1; t <= context_; ++t) {
      const std::uint8_t token = tokens_.val[static_cast<std::size_t>(held_out_start(i) + t)];
      ++there[static_cast<std::size_t>(decile[token])];
    }
  }
  for (const double count : there)
    decile_weights_.push_back(count > 0 ? static_cast<double>(windows_) / count : 0);
}

std::int64_t TextModel::held_out_start(std::int64_t window) const {
  const auto last = static_cast<std::int64_t>(tokens_.val.size()) - context_ - 1;
  return windows_ > 1 ? last * window / (windows_ - 1) : last / 2;
}

at::Tensor TextModel::windows(const std::vector<std::uint8_t>& text,
                              const std::vector<std::int64_t>& starts) const {
  at::Tensor out = at::empty({static_cast<std::int64_t>(starts.size()), context_ + 1}, at::kLong);
  std::int64_t* to = out.data_ptr<std::int64_t>();
  for (const std::int64_t start : starts) {
    for (std::int64_t i = 0; i <= context_; ++i) *to++ = text[static_cast<std::size_t>(start + i)];
  }
  return bring(out);
}

at::Tensor TextModel::loss(const Slice& slice) {
  const std::int64_t beyond = std::ssize(tokens_.train) - order_.size() * context_;
  std::vector<std::int64_t> starts;
  for (std::int64_t u = slice.first; u < slice.first + slice.count; ++u) {
    const std::int64_t epoch = u / order_.size();
    const std::int64_t begin =
        Draws(seed(), Purpose::measurements, {epoch}).below(0, std::min(beyond, context_));
    starts.push_back(begin + order_(u) * context_);
  }
  const at::Tensor w = windows(tokens_.train, starts);
  return at::cross_entropy_loss(logits(w.slice(1, 0, context_)),
                                w.slice(1, 1, context_ + 1).reshape({-1}));
}

void TextModel::score(const std::vector<std::int64_t>& examples, Evaluation& into) {
  double& sum = into.sums["val_loss"];
  // Of the deciles that have tokens, on every rank.
  std::vector<std::pair<double*, double*>> deciles;  // loss, accuracy
  for (std::size_t k = 0; k < decile_weights_.size(); ++k) {
    const std::string name = "decile_" + std::to_string(k);
    const bool there = decile_weights_[k] > 0;
    deciles.emplace_back(there ? &into.sums[name + "_loss"] : nullptr,
                         there ? &into.sums[name + "_accuracy"] : nullptr);
  }
  if (examples.empty()) return;
  std::vector<std::int64_t> starts;
  for (const std::int64_t i : examples) starts.push_back(held_out_start(i));
  const at::Tensor w = windows(tokens_.val, starts);
  const at::Tensor z = logits(w.slice(1, 0, context_));
  const at::Tensor next = w.slice(1, 1, context_ + 1).reshape({-1});
  const at::Tensor losses = at::cross_entropy_loss(z, next, {}, at::Reduction::None);
  sum += losses.sum(at::kDouble).item<double>() / static_cast<double>(context_);
  into.count += static_cast<double>(examples.size());
  const at::Tensor of = decile_of_.index_select(0, next);
  const auto sums_of = [&](const at::Tensor& values) {
    const at::Tensor wide = values.to(at::kDouble);
    return at::zeros({std::ssize(decile_weights_)}, wide.options())
        .index_add(0, of, wide)
        .to(at::kCPU);
  };
  const at::Tensor lost = sums_of(losses), hit = sums_of(at::eq(z.argmax(1), next));
  for (std::size_t k = 0; k < deciles.size(); ++k) {
    if (deciles[k].first == nullptr) continue;
    *deciles[k].first += decile_weights_[k] * lost.data_ptr<double>()[k];
    *deciles[k].second += decile_weights_[k] * hit.data_ptr<double>()[k];
  }
}

// ---- images

ImageModel::ImageModel(const Config& config, Options& options, int cuda)
    : TorchModel(config.seed, options.integer("threads", 1, 1, 1024), cuda) {
  const std::int64_t most = options.integer("eval_count", 0, 0);
  const double ratio = options.number("imbalance", 1, 1, 1e6);
  Options data(config, "data", config.data);
  const std::string source = data.word("source", "fashion-mnist");
  data.done();
  images_ = open_images(source);
  eval_count_ = most > 0 ? std::min(most, images_.val.count()) : images_.val.count();
  if (ratio > 1) imbalance(ratio, options, source);
  order_ = Epochs(seed(), images_.train.count());
  double sum = 0, squares = 0;
  for (const std::uint8_t p : images_.train.pixels) {
    sum += p;
    squares += static_cast<double>(p) * p;
  }
  const auto n = static_cast<double>(images_.train.pixels.size());
  mean_ = static_cast<float>(sum / n);
  const double variance = squares / n - sum / n * (sum / n);
  deviation_ = variance > 0 ? static_cast<float>(std::sqrt(variance)) : 1.0F;
}

void ImageModel::imbalance(double imbalance, const Options& options, const std::string& source) {
  const auto classes = static_cast<std::size_t>(images_.classes);
  std::vector<std::vector<std::int64_t>> members(classes);
  for (std::int64_t i = 0; i < images_.train.count(); ++i) {
    members[images_.train.labels[static_cast<std::size_t>(i)]].push_back(i);
  }
  const auto share = [&](std::size_t c) {
    return std::pow(imbalance, -static_cast<double>(c) / static_cast<double>(classes - 1));
  };
  double first = INFINITY;  // what all classes allow of class 0
  for (std::size_t c = 0; c < classes; ++c) {
    first = std::min(first, static_cast<double>(members[c].size()) / share(c));
  }
  if (classes < 2 || std::round(first * share(classes - 1)) < 1) {
    options.refuse("imbalance", "leaves no example of some class of " + source);
  }
  // The first ones of a shuffled class (Fisher and Yates), in the order of the source.
  std::vector<std::int64_t> kept;
  for (std::size_t c = 0; c < classes; ++c) {
    const Draws draws(seed(), Purpose::measurements, {static_cast<std::int64_t>(c)});
    std::vector<std::int64_t>& of = members[c];
    const auto count = std::lround(first * share(c));
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t from = i + draws.below(i, std::ssize(of) - i);
      std::swap(of[static_cast<std::size_t>(i)], of[static_cast<std::size_t>(from)]);
    }
    kept.insert(kept.end(), of.begin(), of.begin() + count);
  }
  std::sort(kept.begin(), kept.end());
  const std::int64_t size = images_.height * images_.width;
  Images::Part part;
  for (const std::int64_t i : kept) {
    const auto pixels = images_.train.pixels.begin() + i * size;
    part.pixels.insert(part.pixels.end(), pixels, pixels + size);
    part.labels.push_back(images_.train.labels[static_cast<std::size_t>(i)]);
  }
  images_.train = std::move(part);

  std::vector<double> counts(classes);
  for (std::int64_t i = 0; i < eval_count_; ++i) {
    ++counts[images_.val.labels[static_cast<std::size_t>(i)]];
  }
  for (const double count : counts) {
    class_weights_.push_back(count > 0 ? static_cast<double>(eval_count_) / count : 0);
  }
}

std::pair<at::Tensor, at::Tensor> ImageModel::batch(
    const Images::Part& part, const std::vector<std::int64_t>& examples) const {
  const auto count = static_cast<std::int64_t>(examples.size());
  const std::int64_t size = images_.height * images_.width;
  at::Tensor x = at::empty({count, 1, images_.height, images_.width}, at::kFloat);
  at::Tensor y = at::empty({count}, at::kLong);
  float* to = x.data_ptr<float>();
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t example = examples[static_cast<std::size_t>(i)];
    const std::uint8_t* from = part.pixels.data() + example * size;
    for (std::int64_t p = 0; p < size; ++p) {
      *to++ = (static_cast<float>(from[p]) - mean_) / deviation_;
    }
    y.data_ptr<std::int64_t>()[i] = part.labels[static_cast<std::size_t>(example)];
  }
  return {bring(x), bring(y)};
}

at::Tensor ImageModel::loss(const Slice& slice) {
  std::vector<std::int64_t> examples;
  for (std::int64_t u = slice.first; u < slice.first + slice.count; ++u) {
    examples.push_back(order_(u));
  }
  const auto [x, y] = batch(images_.train, examples);
  return at::cross_entropy_loss(logits(x), y);
}

void ImageModel::score(const std::vector<std::int64_t>& examples, Evaluation& into) {
  std::map<std::string, double>& sums = into.sums;
  double& loss = sums["val_loss"];
  double& right = sums["val_accuracy"];
  const auto classes = class_weights_.size();
  const auto accuracy_of = [](std::size_t c) { return "class_" + std::to_string(c) + "_accuracy"; };
  if (classes > 0) {
    for (const char* key : {"balanced_loss", "balanced_accuracy", "rare_accuracy"}) sums[key];
    for (std::size_t c = 0; c < classes; ++c) sums[accuracy_of(c)];
  }
  if (examples.empty()) return;
  const auto [x, y] = batch(images_.val, examples);
  const at::Tensor z = logits(x);
  const at::Tensor losses = at::cross_entropy_loss(z, y, {}, at::Reduction::None);
  const at::Tensor hits = at::eq(z.argmax(1), y);
  loss += losses.sum(at::kDouble).item<double>();
  right += hits.sum().item<double>();
  into.count += static_cast<double>(examples.size());
  if (classes == 0) return;
  const auto there =
      static_cast<double>(classes - static_cast<std::size_t>(std::count(class_weights_.begin(),
                                                                        class_weights_.end(), 0)));
  const std::size_t rare = std::min<std::size_t>(3, classes);
  for (std::size_t c = 0; c < classes; ++c) {
    const at::Tensor of_class = at::eq(y, static_cast<std::int64_t>(c));
    const double weight = class_weights_[c];
    const double found = weight * at::logical_and(hits, of_class).sum().item<double>();
    sums[accuracy_of(c)] += found;
    sums["balanced_accuracy"] += found / there;
    sums["balanced_loss"] += weight / there * (losses * of_class).sum(at::kDouble).item<double>();
    if (c + rare >= classes) sums["rare_accuracy"] += found / static_cast<double>(rare);
  }
}

}  // namespace orthrus::workloads
