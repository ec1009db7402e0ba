// The regression network: y = W_out·h, h ← h + W_down·relu(W_up·h)/blocks, by plain loops, so that
// many small trainings need no library.
#include <algorithm>
#include <cmath>
#include <vector>

#include "analytic.hpp"
#include "options.hpp"
#include "random.hpp"

namespace orthrus::workloads {
namespace {

/// A column per example.
struct Columns {
  std::int64_t rows = 0, cols = 0;
  std::vector<float> values;

  Columns() = default;
  Columns(std::int64_t m, std::int64_t n)
      : rows(m), cols(n), values(static_cast<std::size_t>(m * n)) {}
  float* row(std::int64_t i) { return values.data() + i * cols; }
  [[nodiscard]] const float* row(std::int64_t i) const { return values.data() + i * cols; }
};

void add(std::int64_t n, float alpha, const float* x, float* y) {
  for (std::int64_t j = 0; j < n; ++j) y[j] += alpha * x[j];
}

/// W·X, W m×X.rows.
Columns product(const float* w, std::int64_t m, const Columns& x) {
  Columns y(m, x.cols);
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t p = 0; p < x.rows; ++p) add(x.cols, w[i * x.rows + p], x.row(p), y.row(i));
  }
  return y;
}
/// Wᵀ·D, W D.rows×m.
Columns transposed_product(const float* w, std::int64_t m, const Columns& d) {
  Columns y(m, d.cols);
  for (std::int64_t p = 0; p < d.rows; ++p) {
    for (std::int64_t i = 0; i < m; ++i) add(d.cols, w[p * m + i], d.row(p), y.row(i));
  }
  return y;
}
Columns transposed(const Columns& x) {
  Columns turned(x.cols, x.rows);
  for (std::int64_t i = 0; i < x.rows; ++i) {
    for (std::int64_t j = 0; j < x.cols; ++j) turned.row(j)[i] = x.row(i)[j];
  }
  return turned;
}
/// G += D·Xᵀ.
void add_outer(const Columns& d, const Columns& x, float* g) {
  const Columns turned = transposed(x);
  for (std::int64_t i = 0; i < d.rows; ++i) {
    for (std::int64_t j = 0; j < d.cols; ++j) {
      add(x.rows, d.row(i)[j], turned.row(j), g + i * x.rows);
    }
  }
}

struct Sizes {
  std::int64_t inputs, width, blocks, outputs;
  /// Of the embedding, two matrices per block, and the head.
  [[nodiscard]] std::int64_t matrices() const { return 2 * blocks + 2; }
  [[nodiscard]] std::int64_t rows(std::int64_t k) const {
    return k + 1 == matrices() ? outputs : width;
  }
  [[nodiscard]] std::int64_t cols(std::int64_t k) const { return k == 0 ? inputs : width; }
  [[nodiscard]] std::size_t elements(std::int64_t k) const {
    return static_cast<std::size_t>(rows(k) * cols(k));
  }
};

/// What forward leaves for backward.
struct Pass {
  std::vector<Columns> streams;    ///< h before each block, and at last
  std::vector<Columns> activated;  ///< relu(W_up·h) of each block
  Columns outputs;
};

Pass forward(const Sizes& sizes, const std::vector<float*>& weights, const Columns& x) {
  Pass pass;
  pass.streams.push_back(product(weights[0], sizes.width, x));
  const float share = 1 / static_cast<float>(sizes.blocks);
  for (std::int64_t b = 0; b < sizes.blocks; ++b) {
    const auto k = static_cast<std::size_t>(2 * b + 1);
    Columns a = product(weights[k], sizes.width, pass.streams.back());
    for (float& v : a.values) v = std::max(v, 0.0F);
    const Columns branch = product(weights[k + 1], sizes.width, a);
    Columns h = pass.streams.back();
    add(std::ssize(h.values), share, branch.values.data(), h.values.data());
    pass.activated.push_back(std::move(a));
    pass.streams.push_back(std::move(h));
  }
  pass.outputs = product(weights.back(), sizes.outputs, pass.streams.back());
  return pass;
}

class ResidualRegression final : public Workload {
 public:
  explicit ResidualRegression(const Config& config) : seed_(config.seed) {
    Options options(config, "workload", config.workload_values);
    sizes_.inputs = options.integer("d", 32, 1, 1 << 16);
    sizes_.width = options.integer("width", 64, 1, 1 << 14);
    sizes_.blocks = options.integer("blocks", 4, 1, 1024);
    sizes_.outputs = options.integer("outputs", 8, 1, 1 << 14);
    noise_ = options.number("noise", 0.1, 0, 1e6);
    tests_ = options.integer("tests", 512, 1, 1 << 24);
    task_ = static_cast<std::uint64_t>(options.integer("task", 1, 0));
    options.done();
    Options(config, "data", config.data).done();
    for (std::int64_t k = 0; k < sizes_.matrices(); ++k) {
      own_.push_back(draw({seed_, Purpose::weights, {k}}, k));
      teacher_.push_back(draw({task_, Purpose::target, {k}}, k));
      gradients_.emplace_back(own_.back().size());
    }
    for (auto& w : own_) weights_.push_back(w.data());
    for (auto& w : teacher_) teachers_.push_back(w.data());
    // What the teacher says has unit variance, on the held-out examples.
    const Columns y = answers(held_out(0, tests_));
    double squares = 0;
    for (const float v : y.values) squares += static_cast<double>(v) * static_cast<double>(v);
    const double deviation = std::sqrt(squares / static_cast<double>(y.values.size()));
    for (float& v : teacher_.back()) v = static_cast<float>(v / deviation);
  }

  std::vector<Parameter> parameters() override {
    std::vector<Parameter> list;
    for (std::int64_t k = 0; k < sizes_.matrices(); ++k) {
      const auto i = static_cast<std::size_t>(k);
      Parameter p;
      p.name = k == 0                       ? "embed.weight"
               : k + 1 == sizes_.matrices() ? "head.weight"
                                            : "blocks." + std::to_string((k - 1) / 2) +
                                                  (k % 2 == 1 ? ".up.weight" : ".down.weight");
      p.shape = {sizes_.rows(k), sizes_.cols(k)};
      p.weights = weights_[i];
      p.gradient = gradients_[i].data();
      list.push_back(std::move(p));
    }
    return list;
  }

  void place_weights(int id, void* data) override {
    weights_[static_cast<std::size_t>(id)] = static_cast<float*>(data);
    own_[static_cast<std::size_t>(id)] = {};
  }

  double gradient(const Slice& slice, const std::function<void(int)>& ready) override {
    for (auto& g : gradients_) std::fill(g.begin(), g.end(), 0.0F);
    double loss = 0;
    for (std::int64_t done = 0; done < slice.count; done += at_a_time) {
      const std::int64_t count = std::min(at_a_time, slice.count - done);
      loss += backward(slice, slice.first + done, count);
    }
    for (std::int64_t k = sizes_.matrices(); k-- > 0;) ready(static_cast<int>(k));
    return slice.count > 0 ? loss / static_cast<double>(slice.count) : 0;
  }

  void watch(const Observer& observer) override { observer_ = observer; }

  Evaluation evaluate(int rank, int size) override {
    Evaluation e;
    double& loss = e.sums["val_loss"];
    const std::int64_t begin = tests_ * rank / size;
    const std::int64_t end = tests_ * (rank + 1) / size;
    for (std::int64_t first = begin; first < end; first += at_a_time) {
      const Columns x = held_out(first, std::min(at_a_time, end - first));
      const Columns y = answers(x);
      const Pass pass = forward(sizes_, weights_, x);
      for (std::size_t i = 0; i < y.values.size(); ++i) {
        const double off = static_cast<double>(pass.outputs.values[i] - y.values[i]);
        loss += 0.5 * off * off;
      }
    }
    e.count = static_cast<double>(end - begin);
    return e;
  }

 private:
  static constexpr std::int64_t at_a_time = 64;

  [[nodiscard]] std::vector<float> draw(const Draws& draws, std::int64_t k) const {
    // Of a relu's output half the squares are left.
    const double gain = k > 0 && k % 2 == 0 && k + 1 < sizes_.matrices() ? 2 : 1;
    const double deviation = std::sqrt(gain / static_cast<double>(sizes_.cols(k)));
    std::vector<float> w(sizes_.elements(k));
    for (std::size_t e = 0; e < w.size(); ++e) {
      w[e] = static_cast<float>(deviation * draws.normal(static_cast<std::int64_t>(e)));
    }
    return w;
  }
  [[nodiscard]] Columns held_out(std::int64_t first, std::int64_t count) const {
    Columns x(sizes_.inputs, count);
    for (std::int64_t u = 0; u < count; ++u) {
      const Draws draws(task_, Purpose::held_out, {first + u});
      for (std::int64_t i = 0; i < sizes_.inputs; ++i) {
        x.row(i)[u] = static_cast<float>(draws.normal(i));
      }
    }
    return x;
  }
  [[nodiscard]] Columns answers(const Columns& x) const {
    return forward(sizes_, teachers_, x).outputs;
  }

  void tell(const Columns& x, const Pass& pass) const {
    const auto told = [&](std::int64_t id, const Columns& inputs) {
      const Columns tokens = transposed(inputs);
      observer_(static_cast<int>(id),
                {tokens.values.data(), tokens.rows, tokens.cols, tokens.cols});
    };
    told(0, x);
    for (std::int64_t b = 0; b < sizes_.blocks; ++b) {
      told(2 * b + 1, pass.streams[static_cast<std::size_t>(b)]);
      told(2 * b + 2, pass.activated[static_cast<std::size_t>(b)]);
    }
    told(sizes_.matrices() - 1, pass.streams.back());
  }

  /// Adds what `count` units from unit `first` give to the gradients. @return their losses' sum.
  double backward(const Slice& slice, std::int64_t first, std::int64_t count) {
    Columns x(sizes_.inputs, count);
    Columns noise(sizes_.outputs, count);
    for (std::int64_t u = 0; u < count; ++u) {
      const Draws draws(seed_, Purpose::units, {first + u});
      for (std::int64_t i = 0; i < sizes_.inputs; ++i) {
        x.row(i)[u] = static_cast<float>(draws.normal(i));
      }
      for (std::int64_t i = 0; i < sizes_.outputs && noise_ > 0; ++i) {
        noise.row(i)[u] = static_cast<float>(noise_ * draws.normal(sizes_.inputs + i));
      }
    }
    const Columns y = answers(x);
    const Pass pass = forward(sizes_, weights_, x);
    if (observer_) tell(x, pass);
    Columns back = pass.outputs;
    double loss = 0;
    for (std::size_t i = 0; i < back.values.size(); ++i) {
      back.values[i] -= y.values[i] + noise.values[i];
      loss += 0.5 * static_cast<double>(back.values[i]) * static_cast<double>(back.values[i]);
      back.values[i] /= static_cast<float>(slice.count);
    }
    const auto gradient_of = [&](std::size_t k) { return gradients_[k].data(); };
    add_outer(back, pass.streams.back(), gradient_of(weights_.size() - 1));
    back = transposed_product(weights_.back(), sizes_.width, back);
    const float share = 1 / static_cast<float>(sizes_.blocks);
    for (std::int64_t b = sizes_.blocks; b-- > 0;) {
      const auto k = static_cast<std::size_t>(2 * b + 1);
      const auto block = static_cast<std::size_t>(b);
      Columns branch = back;
      for (float& v : branch.values) v *= share;
      add_outer(branch, pass.activated[block], gradient_of(k + 1));
      branch = transposed_product(weights_[k + 1], sizes_.width, branch);
      for (std::size_t i = 0; i < branch.values.size(); ++i) {
        if (pass.activated[block].values[i] <= 0) branch.values[i] = 0;
      }
      add_outer(branch, pass.streams[block], gradient_of(k));
      const Columns through = transposed_product(weights_[k], sizes_.width, branch);
      add(std::ssize(back.values), 1, through.values.data(), back.values.data());
    }
    add_outer(back, x, gradient_of(0));
    return loss;
  }

  std::uint64_t seed_, task_ = 0;
  Sizes sizes_{};
  double noise_ = 0;
  std::int64_t tests_ = 0;
  std::vector<std::vector<float>> own_, teacher_, gradients_;
  std::vector<float*> weights_, teachers_;
  Observer observer_;
};

}  // namespace

std::unique_ptr<Workload> open_residual_regression(const Config& config) {
  return std::make_unique<ResidualRegression>(config);
}

}  // namespace orthrus::workloads
