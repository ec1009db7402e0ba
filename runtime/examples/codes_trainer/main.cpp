// A trainer that computes with codes: its weights are fp8 (int8, int4) codes and scales, here and
// in the optimizer. Nobody has them in f32, but for a panel of a few rows at a time.
//
//   mpirun -np 2 ./codes_trainer muon.yaml [WIDTH DEPTH STEPS]
//
// Prints the loss, and what the process has in memory beside what Orthrus has planned.
#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <orthrus/mpi.hpp>
#include <orthrus/orthrus.hpp>
#include <random>
#include <string>
#include <vector>

namespace {

using orthrus::Index;

constexpr Index kInputs = 16, kOutputs = 8, kBatch = 16;
constexpr Index kPanel = 16;  ///< rows of weights that are f32 at a time

/// y = W·x + b, with W as codes and scales. The gradients are f32.
struct Layer {
  Index inputs, outputs;
  orthrus::Grid grid;
  std::vector<std::byte> codes;
  std::vector<float> scales;
  std::vector<float> bias, weight_gradient, bias_gradient;

  Layer(Index in, Index out, const orthrus::Grid& g, std::mt19937& random)
      : inputs(in),
        outputs(out),
        grid(g),
        codes(static_cast<std::size_t>(orthrus::code_bytes(g, out, in))),
        scales(static_cast<std::size_t>(orthrus::scale_count(g, out, in))),
        bias(static_cast<std::size_t>(out)),
        weight_gradient(static_cast<std::size_t>(in * out)),
        bias_gradient(static_cast<std::size_t>(out)) {
    std::normal_distribution<float> normal(0.0F, 1.0F / std::sqrt(static_cast<float>(in)));
    std::vector<float> panel(static_cast<std::size_t>(kPanel * in));
    for (Index row = 0; row < out; row += kPanel) {
      const Index rows = std::min(kPanel, out - row);
      for (float& w : panel) w = normal(random);
      orthrus::quantize(orthrus::matrix_view(panel.data(), rows, in), grid,
                        orthrus::rows_of(weight(), row, rows));
    }
  }

  orthrus::QuantizedView weight() {
    return orthrus::quantized_view(codes.data(), scales.data(), grid, outputs, inputs);
  }

  /// f(output, its row of weights), a panel at a time.
  template <class F>
  void for_each_row(F&& f) {
    std::vector<float> panel(static_cast<std::size_t>(kPanel * inputs));
    for (Index row = 0; row < outputs; row += kPanel) {
      const Index rows = std::min(kPanel, outputs - row);
      orthrus::dequantize(orthrus::rows_of(weight(), row, rows), grid,
                          orthrus::matrix_view(panel.data(), rows, inputs));
      for (Index i = 0; i < rows; ++i) f(row + i, panel.data() + i * inputs);
    }
  }

  void forward(const std::vector<float>& x, std::vector<float>& y) {
    y.resize(static_cast<std::size_t>(kBatch * outputs));
    for_each_row([&](Index o, const float* w) {
      for (Index n = 0; n < kBatch; ++n) {
        float sum = bias[static_cast<std::size_t>(o)];
        for (Index i = 0; i < inputs; ++i)
          sum += w[i] * x[static_cast<std::size_t>(n * inputs + i)];
        y[static_cast<std::size_t>(n * outputs + o)] = sum;
      }
    });
  }

  /// From dL/dy the gradients of weight and bias, and dL/dx.
  void backward(const std::vector<float>& x, const std::vector<float>& dy, std::vector<float>& dx) {
    std::fill(weight_gradient.begin(), weight_gradient.end(), 0.0F);
    std::fill(bias_gradient.begin(), bias_gradient.end(), 0.0F);
    dx.assign(static_cast<std::size_t>(kBatch * inputs), 0.0F);
    for_each_row([&](Index o, const float* w) {
      float* const gradient = weight_gradient.data() + o * inputs;
      for (Index n = 0; n < kBatch; ++n) {
        const float d = dy[static_cast<std::size_t>(n * outputs + o)];
        const float* const in = x.data() + n * inputs;
        float* const out = dx.data() + n * inputs;
        bias_gradient[static_cast<std::size_t>(o)] += d;
        for (Index i = 0; i < inputs; ++i) {
          gradient[i] += d * in[i];
          out[i] += d * w[i];
        }
      }
    });
  }
};

struct Batch {
  std::vector<float> x, target;
};

/// The task: a fixed smooth function of the inputs. Each rank draws its own examples of it.
Batch draw(std::mt19937& random) {
  std::normal_distribution<float> normal;
  Batch batch{std::vector<float>(kBatch * kInputs), std::vector<float>(kBatch * kOutputs)};
  for (float& v : batch.x) v = normal(random);
  for (Index n = 0; n < kBatch; ++n) {
    const float* x = &batch.x[static_cast<std::size_t>(n * kInputs)];
    for (Index o = 0; o < kOutputs; ++o) {
      batch.target[static_cast<std::size_t>(n * kOutputs + o)] =
          std::sin(x[2 * o] - x[2 * o + 1]) + 0.5F * x[o];
    }
  }
  return batch;
}

/// h ← tanh(W₀·x + b₀); h ← h + tanh(W·h + b)/√depth for each of the blocks; y = W·h + b.
struct Network {
  std::vector<Layer> layers;
  float share;

  Network(Index width, Index depth, const orthrus::Grid& grid, std::mt19937& random)
      : share(1.0F / std::sqrt(static_cast<float>(std::max<Index>(depth, 1)))) {
    layers.reserve(static_cast<std::size_t>(depth + 2));
    layers.emplace_back(kInputs, width, grid, random);
    for (Index l = 0; l < depth; ++l) layers.emplace_back(width, width, grid, random);
    layers.emplace_back(width, kOutputs, grid, random);
  }

  [[nodiscard]] bool is_block(std::size_t l) const { return l > 0 && l + 1 < layers.size(); }

  /// Mean squared error. With `ready`, backward too: ready(id) is called when gradient `id` is in
  /// place.
  double loss(const Batch& batch, const std::function<void(int)>& ready = nullptr) {
    std::vector<std::vector<float>> x{batch.x};  // the input of each layer
    std::vector<std::vector<float>> slope;       // of its tanh
    std::vector<float> y;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      layers[l].forward(x.back(), y);
      if (l + 1 == layers.size()) break;
      slope.push_back(y);
      x.push_back(is_block(l) ? x.back() : std::vector<float>(y.size(), 0.0F));
      for (std::size_t i = 0; i < y.size(); ++i) {
        const float t = std::tanh(y[i]);
        x.back()[i] += is_block(l) ? share * t : t;
        slope.back()[i] = (is_block(l) ? share : 1.0F) * (1 - t * t);
      }
    }
    double sum = 0;
    std::vector<float> dy(y.size());
    for (std::size_t i = 0; i < y.size(); ++i) {
      const float off = y[i] - batch.target[i];
      sum += static_cast<double>(off) * static_cast<double>(off);
      dy[i] = 2 * off / static_cast<float>(y.size());
    }
    std::vector<float> dx;
    std::vector<float> past;  // what goes around a block
    for (std::size_t l = layers.size(); ready && l-- > 0;) {
      layers[l].backward(x[l], dy, dx);
      const int id = 2 * static_cast<int>(l);
      ready(id);      // the weight of layer l: its reduction may start now,
      ready(id + 1);  // while backward goes on below
      if (l == 0) break;
      if (is_block(l)) {
        for (std::size_t i = 0; i < dx.size(); ++i) dx[i] += past[i];
      }
      past = dx;
      dy = dx;
      for (std::size_t i = 0; i < dy.size(); ++i) dy[i] *= slope[l - 1][i];
    }
    return sum / static_cast<double>(y.size());
  }

  /// What Orthrus needs to know of each tensor: codes and scales where others have weights.
  std::vector<orthrus::Parameter> describe() {
    std::vector<orthrus::Parameter> list;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      Layer& layer = layers[l];
      const std::string name = "layers." + std::to_string(l);
      orthrus::Parameter weight, bias;
      weight.name = name + ".weight";
      weight.shape = {layer.outputs, layer.inputs};
      weight.codes = layer.codes.data();
      weight.scales = layer.scales.data();
      weight.gradient = layer.weight_gradient.data();
      bias.name = name + ".bias";
      bias.shape = {layer.outputs};
      bias.weights = layer.bias.data();
      bias.gradient = layer.bias_gradient.data();
      list.insert(list.end(), {weight, bias});
    }
    return list;
  }
};

/// Bytes of this process: from malloc, and resident. Anything else than glibc's malloc: 0.
struct Memory {
  long long heap = 0, resident = 0;
};
Memory memory_now() {
  Memory m;
#ifdef __GLIBC__
  const auto info = mallinfo2();
  m.heap = static_cast<long long>(info.uordblks + info.hblkhd);
#endif
  long long size = 0, resident = 0;
  if (std::FILE* f = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(f, "%lld %lld", &size, &resident) == 2) m.resident = resident * getpagesize();
    std::fclose(f);
  }
  return m;
}
double mb(double bytes) { return bytes * 1e-6; }

int train(const char* file, Index width, Index depth, int steps) {
  const orthrus::Config config = orthrus::load_config(file);
  const auto grid = orthrus::grid_of(config.groups.front().weights);
  if (!grid) throw orthrus::ConfigError("the first group's weights.format has no codes");

  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  std::mt19937 same_everywhere(1);
  const Batch held_out = draw(same_everywhere);
  const Memory at_start = memory_now();
  Network network(width, depth, *grid, same_everywhere);  // codes start equal on all ranks
  orthrus::ShardedOptimizer optimizer{config, orthrus::borrow(MPI_COMM_WORLD), network.describe()};

  std::mt19937 my_data(1000 + static_cast<unsigned>(rank));
  const double before = network.loss(held_out);
  Memory now;
  for (int step = 0; step < steps; ++step) {
    network.loss(draw(my_data), [&](int id) { optimizer.gradient_ready(id); });
    const orthrus::StepReport& report = optimizer.step();  // codes and scales are new on return
    const Memory between = memory_now();
    now = {std::max(now.heap, between.heap), std::max(now.resident, between.resident)};
    if (rank == 0 && step % std::max(1, steps / 5) == 0) {
      std::printf("step %3d  loss %.4f  sent %lld bytes\n", step, network.loss(held_out),
                  static_cast<long long>(report.bytes_sent));
    }
  }
  const double after = network.loss(held_out);

  const orthrus::MemoryPlan plan = optimizer.memory();
  std::size_t elements = 0, gradients = 0;
  for (const Layer& layer : network.layers) {
    elements += layer.weight_gradient.size();
    gradients += (layer.weight_gradient.size() + layer.bias_gradient.size()) * sizeof(float);
  }
  const auto planned = static_cast<double>(plan.total()) + static_cast<double>(gradients);
  // What no plan has: MPI's and the BLAS's own buffers, pages that malloc keeps of what was freed,
  // code that is read for the first time, and the activations of a batch.
  constexpr double slack = 24e6;
  constexpr double heap_slack = 8e6;  // of these, what malloc counts
  const auto heap = static_cast<double>(now.heap - at_start.heap);
  const auto resident = static_cast<double>(now.resident - at_start.resident);
  if (rank == 0) {
    std::printf("loss %.4f -> %.4f on %d rank(s)\n", before, after, optimizer.size());
    std::printf("weights %zu: %.2f MB as codes and scales, %.2f MB if they were f32\n", elements,
                mb(static_cast<double>(plan.weights)), mb(4.0 * static_cast<double>(elements)));
    std::printf(
        "planned: trainer weights %.2f, gradients %.2f, state %.2f, work %.2f MB; and the "
        "trainer's gradients %.2f MB: %.2f MB\n",
        mb(static_cast<double>(plan.weights)), mb(static_cast<double>(plan.gradients)),
        mb(static_cast<double>(plan.state)), mb(static_cast<double>(plan.work)),
        mb(static_cast<double>(gradients)), mb(planned));
    std::printf(
        "measured between steps: heap +%.2f MB, resident +%.2f MB (at most %.0f MB more "
        "than planned)\n",
        mb(heap), mb(resident), mb(slack));
  }
  const bool fits = now.heap == 0 || (heap <= planned + heap_slack && resident <= planned + slack);
  if (!fits) {
    std::fprintf(stderr, "rank %d: heap +%.2f MB, resident +%.2f MB, planned %.2f MB\n", rank,
                 mb(heap), mb(resident), mb(planned));
  }
  return after < before && fits ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int status = EXIT_FAILURE;
  const auto number = [&](int i, long otherwise) {
    return argc > i ? std::max(1L, std::atol(argv[i])) : otherwise;
  };
  try {
    status = train(argc > 1 ? argv[1] : "muon.yaml", number(2, 128), number(3, 4),
                   static_cast<int>(number(4, 60)));
  } catch (const orthrus::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    status = static_cast<int>(error.exit_code());
    MPI_Abort(MPI_COMM_WORLD, status);
  }
  MPI_Finalize();
  return status;
}
