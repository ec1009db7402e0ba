// A data-parallel trainer in plain C++: a three-layer network written by hand, with Orthrus as
// optimizer.
//
//   mpirun -np 2 ./cpp_trainer muon.yaml
//
// Every rank sees other examples, computes its own gradients, and gets the same new weights back.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <orthrus/mpi.hpp>
#include <orthrus/orthrus.hpp>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr int kInputs = 16, kHidden = 64, kOutputs = 8;
constexpr int kBatch = 64, kSteps = 80;

/// y = W·x + b, and the gradients of both: buffers the trainer owns.
struct Layer {
  int inputs, outputs;
  std::vector<float> weight, bias, weight_gradient, bias_gradient;

  Layer(int in, int out, std::mt19937& random)
      : inputs(in),
        outputs(out),
        weight(in * out),
        bias(out),
        weight_gradient(in * out),
        bias_gradient(out) {
    std::normal_distribution<float> normal(0.0F, 1.0F / std::sqrt(static_cast<float>(in)));
    for (float& w : weight) w = normal(random);
  }

  void forward(const std::vector<float>& x, std::vector<float>& y) const {
    y.assign(static_cast<std::size_t>(kBatch) * outputs, 0.0F);
    for (int n = 0; n < kBatch; ++n) {
      for (int o = 0; o < outputs; ++o) {
        float sum = bias[o];
        for (int i = 0; i < inputs; ++i) sum += weight[o * inputs + i] * x[n * inputs + i];
        y[n * outputs + o] = sum;
      }
    }
  }

  /// From dL/dy the gradients of weight and bias, and dL/dx.
  void backward(const std::vector<float>& x, const std::vector<float>& dy, std::vector<float>& dx) {
    weight_gradient.assign(weight_gradient.size(), 0.0F);
    bias_gradient.assign(bias_gradient.size(), 0.0F);
    dx.assign(static_cast<std::size_t>(kBatch) * inputs, 0.0F);
    for (int n = 0; n < kBatch; ++n) {
      for (int o = 0; o < outputs; ++o) {
        const float d = dy[n * outputs + o];
        bias_gradient[o] += d;
        for (int i = 0; i < inputs; ++i) {
          weight_gradient[o * inputs + i] += d * x[n * inputs + i];
          dx[n * inputs + i] += d * weight[o * inputs + i];
        }
      }
    }
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
  for (int n = 0; n < kBatch; ++n) {
    const float* x = &batch.x[n * kInputs];
    for (int o = 0; o < kOutputs; ++o) {
      batch.target[n * kOutputs + o] = std::sin(x[2 * o] - x[2 * o + 1]) + 0.5F * x[o];
    }
  }
  return batch;
}

struct Network {
  std::vector<Layer> layers;

  explicit Network(std::mt19937& random)
      : layers{
            {kInputs, kHidden, random}, {kHidden, kHidden, random}, {kHidden, kOutputs, random}} {}

  /// Mean squared error. With `ready`, backward too: ready(id) is called when gradient `id` is in
  /// place.
  double loss(const Batch& batch, const std::function<void(int)>& ready = nullptr) {
    std::vector<std::vector<float>> x{batch.x};  // the input of each layer
    std::vector<float> y;
    for (const Layer& layer : layers) {
      layer.forward(x.back(), y);
      x.push_back(y);
      if (&layer != &layers.back()) {
        for (float& v : x.back()) v = std::tanh(v);
      }
    }
    double sum = 0;
    std::vector<float> dy(y.size()), dx;
    for (std::size_t i = 0; i < y.size(); ++i) {
      const float off = y[i] - batch.target[i];
      sum += off * off;
      dy[i] = 2 * off / static_cast<float>(y.size());
    }
    for (int l = static_cast<int>(layers.size()) - 1; ready && l >= 0; --l) {
      layers[l].backward(x[l], dy, dx);
      ready(2 * l);      // the weight of layer l: its reduction may start now,
      ready(2 * l + 1);  // while backward goes on below
      dy = dx;
      for (std::size_t i = 0; i < dy.size(); ++i) dy[i] *= 1 - x[l][i] * x[l][i];
    }
    return sum / static_cast<double>(y.size());
  }

  /// What Orthrus needs to know of each tensor: a name, a shape and where it lies.
  std::vector<orthrus::Parameter> describe() {
    std::vector<orthrus::Parameter> list;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      Layer& layer = layers[l];
      const std::string name = "layers." + std::to_string(l);
      orthrus::Parameter weight, bias;
      weight.name = name + ".weight";
      weight.shape = {layer.outputs, layer.inputs};
      weight.weights = layer.weight.data();
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

int train(const char* file) {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  std::mt19937 same_everywhere(1);
  Network network(same_everywhere);  // weights start equal on all ranks
  const Batch held_out = draw(same_everywhere);

  const orthrus::Config config = orthrus::load_config(file);
  orthrus::ShardedOptimizer optimizer{config, orthrus::borrow(MPI_COMM_WORLD), network.describe()};

  std::mt19937 my_data(1000 + rank);
  const double before = network.loss(held_out);
  for (int step = 0; step < kSteps; ++step) {
    network.loss(draw(my_data), [&](int id) { optimizer.gradient_ready(id); });
    const orthrus::StepReport& report = optimizer.step();  // the weights are new on return
    if (rank == 0 && step % 20 == 0) {
      std::printf("step %3d  loss %.4f  sent %lld bytes\n", step, network.loss(held_out),
                  static_cast<long long>(report.bytes_sent));
    }
  }
  const double after = network.loss(held_out);
  if (rank == 0) std::printf("loss %.4f -> %.4f on %d rank(s)\n", before, after, optimizer.size());
  return after < 0.5 * before ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int status = EXIT_FAILURE;
  try {
    status = train(argc > 1 ? argv[1] : "muon.yaml");
  } catch (const orthrus::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    status = static_cast<int>(error.exit_code());
    MPI_Abort(MPI_COMM_WORLD, status);
  }
  MPI_Finalize();
  return status;
}
