#pragma once
/// @file
/// TorchModel: what all libtorch workloads share. Only the torch sources include this.

#include <c10/core/Stream.h>
#include <torch/types.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data.hpp"
#include "options.hpp"
#include "random.hpp"
#include "torch_workloads.hpp"

namespace orthrus::workloads {

/// Owns parameters and gradients; a model says what its loss is. Each gradient buffer is allocated
/// once and accumulated into, and is announced by autograd at the moment it is complete.
///
/// All tensors are on one device. Initial weights and examples are drawn on the host: the same
/// ones, whatever the device.
class TorchModel : public Workload {
 public:
  ~TorchModel() override;
  std::vector<Parameter> parameters() final { return list_; }
  [[nodiscard]] std::optional<DeviceChoice> device() const final;
  void place_weights(int id, void* data) final;
  double gradient(const Slice& slice, const std::function<void(int)>& ready) final;
  void watch(const Observer& observer) final { observer_ = observer; }
  bool watch_examples(const Observer& observer) final {
    example_observer_ = observer;
    return has_norms_;
  }
  Evaluation evaluate(int rank, int size) final;

 protected:
  /// @param cuda  as for `open_workload`
  TorchModel(std::uint64_t seed, std::int64_t threads, int cuda);

  /// A new parameter, drawn from N(0, deviation²) by (seed, position, element); 0 draws nothing.
  at::Tensor& add(const std::string& name, const std::vector<std::int64_t>& shape,
                  double deviation);
  at::Tensor& add_constant(const std::string& name, const std::vector<std::int64_t>& shape,
                           double value);
  /// Views of the parameter added last.
  void set_views(std::vector<LogicalMatrix> views) { list_.back().views = std::move(views); }

  /// x·Wᵀ (+ bias), and tells who watches what W multiplies. @param x  tokens×inputs
  [[nodiscard]] at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                                  const at::Tensor& bias = {}) const;

  /// Layer normalization of rows, scaled by the gain, and tells who watches examples what the
  /// gain's gradient is of each. @param x  examples·rows × elements, the rows of an example side by
  /// side
  [[nodiscard]] at::Tensor norm(const at::Tensor& x, const at::Tensor& gain,
                                std::int64_t examples) const;
  /// It normalizes by `norm`.
  void says_it_has_norms() { has_norms_ = true; }

  /// Mean loss over a slice that is not empty.
  virtual at::Tensor loss(const Slice& slice) = 0;
  /// Held-out examples, and the sums of the metrics over some of them.
  [[nodiscard]] virtual std::int64_t held_out() const = 0;
  [[nodiscard]] virtual std::int64_t evaluation_batch() const = 0;
  virtual void score(const std::vector<std::int64_t>& examples, Evaluation& into) = 0;

  [[nodiscard]] std::uint64_t seed() const { return seed_; }
  /// A tensor of the host, where the model computes.
  [[nodiscard]] at::Tensor bring(const at::Tensor& tensor) const { return tensor.to(place_); }

 private:
  struct Hooks;
  [[nodiscard]] int id_of(const at::Tensor& weight) const;
  at::Tensor& keep(const std::string& name, at::Tensor weights);
  double differentiate(const Slice& slice, const std::function<void(int)>& ready);

  std::uint64_t seed_;
  std::int64_t threads_;
  at::Device place_;
  std::optional<c10::Stream> stream_;                 // of the device; the host has none
  std::vector<std::unique_ptr<at::Tensor>> weights_;  // references to them stay valid
  std::vector<Parameter> list_;
  std::unique_ptr<Hooks> hooks_;
  Observer observer_, example_observer_;
  bool has_norms_ = false;
};

/// A model that predicts the next token of windows of text.
class TextModel : public TorchModel {
 public:
  [[nodiscard]] std::int64_t items_per_unit() const final { return context_; }
  /// Windows that do not overlap; where they begin is another token in every epoch.
  [[nodiscard]] std::int64_t training_units() const final { return order_.size(); }

 protected:
  /// Reads keys `context`, `eval_windows`, and `data.source`, `data.tokenizer`.
  TextModel(const Config& config, Options& options, const char* tokenizer, int cuda);

  /// tokens: windows×context. @return (windows·context)×vocabulary.
  virtual at::Tensor logits(const at::Tensor& tokens) = 0;
  [[nodiscard]] std::int64_t context() const { return context_; }
  [[nodiscard]] std::int64_t vocab() const { return vocab_; }

 private:
  at::Tensor loss(const Slice& slice) final;
  [[nodiscard]] std::int64_t held_out() const final { return windows_; }
  [[nodiscard]] std::int64_t evaluation_batch() const final { return 8; }
  void score(const std::vector<std::int64_t>& examples, Evaluation& into) final;
  /// Deciles of the tokens by how often they are in the training part: groups that make a tenth of
  /// it each, the most frequent first (arXiv 2402.19449). A token lies where the middle of its
  /// share does, so that one that is more than a tenth leaves a group empty.
  void make_deciles();
  [[nodiscard]] std::int64_t held_out_start(std::int64_t window) const;
  /// Windows of context + 1 tokens from `starts`.
  [[nodiscard]] at::Tensor windows(const std::vector<std::uint8_t>& text,
                                   const std::vector<std::int64_t>& starts) const;

  Tokens tokens_;
  Epochs order_;  // of windows
  std::int64_t context_ = 0, windows_ = 0, vocab_ = 0;
  at::Tensor decile_of_;  ///< per token of the vocabulary
  /// What a token of each decile counts for in a mean over its decile, times windows_; 0: the
  /// held-out windows have none.
  std::vector<double> decile_weights_;
};

/// A model that names what an image shows.
class ImageModel : public TorchModel {
 public:
  [[nodiscard]] std::int64_t training_units() const final { return order_.size(); }

 protected:
  /// Reads keys `eval_count`, `imbalance`, and `data.source`.
  ImageModel(const Config& config, Options& options, int cuda);

  /// images: count×1×height×width, of mean 0 and deviation 1 over the training part. @return
  /// count×classes.
  virtual at::Tensor logits(const at::Tensor& images) = 0;
  [[nodiscard]] const Images& images() const { return images_; }

 private:
  at::Tensor loss(const Slice& slice) final;
  [[nodiscard]] std::int64_t held_out() const final { return eval_count_; }
  [[nodiscard]] std::int64_t evaluation_batch() const final { return 250; }
  void score(const std::vector<std::int64_t>& examples, Evaluation& into) final;
  [[nodiscard]] std::pair<at::Tensor, at::Tensor> batch(
      const Images::Part& part, const std::vector<std::int64_t>& examples) const;
  /// Leaves of class c imbalance^(−c/(classes − 1)) of what it leaves of class 0.
  void imbalance(double imbalance, const Options& options, const std::string& source);

  Images images_;
  Epochs order_;
  std::int64_t eval_count_ = 0;
  /// Of an imbalanced training part: what an example of each class counts for in a mean over
  /// classes, times eval_count_; 0: there is none. Empty: classes are as they come.
  std::vector<double> class_weights_;
  float mean_ = 0, deviation_ = 1;
};

}  // namespace orthrus::workloads
