#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <orthrus/error.hpp>
#include <orthrus/studies/noise.hpp>

#include "runtime/studies/dense.hpp"
#include "runtime/studies/random.hpp"

namespace orthrus::studies {
namespace {

std::vector<Matrix> copies(std::span<const ConstMatrixView> gradients) {
  expects(gradients.size() >= 2, "noise shows in two gradients or more");
  std::vector<Matrix> out;
  for (const ConstMatrixView& g : gradients) {
    expects(g.rows == gradients[0].rows && g.cols == gradients[0].cols, "gradients of one shape");
    out.push_back(to_double(g));
  }
  return out;
}

double line_norm(const Matrix& a, Index i, bool row) {
  double sum = 0;
  const Index n = row ? a.cols : a.rows;
  for (Index j = 0; j < n; ++j) {
    const double x = row ? a(i, j) : a(j, i);
    sum += x * x;
  }
  return std::sqrt(sum);
}

double sum_of(const std::vector<double>& x) { return std::accumulate(x.begin(), x.end(), 0.0); }

double dual_norm(DescentNorm norm, const Matrix& a) {
  switch (norm) {
    case DescentNorm::frobenius:
      return frobenius(a);
    case DescentNorm::sign: {
      double sum = 0;
      for (const double x : a.values) sum += std::abs(x);
      return sum;
    }
    case DescentNorm::spectral:
      return sum_of(singular_values(a));
    case DescentNorm::row:
    case DescentNorm::column: {
      const bool row = norm == DescentNorm::row;
      double sum = 0;
      for (Index i = 0; i < (row ? a.rows : a.cols); ++i) sum += line_norm(a, i, row);
      return sum;
    }
  }
  return 0;
}

double dual_noise(DescentNorm norm, const std::vector<Matrix>& gradients) {
  double sum = 0;
  Index pairs = 0;
  for (std::size_t i = 0; i + 1 < gradients.size(); i += 2, ++pairs) {
    Matrix difference = gradients[i];
    add(difference, -1, gradients[i + 1]);
    const double length = dual_norm(norm, difference);
    sum += length * length / 2;
  }
  return sum / static_cast<double>(pairs);
}

}  // namespace

NoiseProbe two_batch_noise(double small_batch, double small_squared, double large_batch,
                           double large_squared) {
  expects<ConfigError>(small_batch > 0 && small_batch < large_batch,
                       "a positive batch and a larger one");
  return {
      (small_squared - large_squared) / (1 / small_batch - 1 / large_batch),
      (large_batch * large_squared - small_batch * small_squared) / (large_batch - small_batch)};
}

NoiseProbe distributed_noise(Index gradients, double examples_each, double mean_squared,
                             double squared_of_mean) {
  expects<ConfigError>(gradients >= 2 && examples_each > 0,
                       "noise shows in two gradients or more, over a positive batch each");
  const auto n = static_cast<double>(gradients);
  return {examples_each * n / (n - 1) * (mean_squared - squared_of_mean),
          (n * squared_of_mean - mean_squared) / (n - 1)};
}

NoiseProbe distributed_noise(std::span<const double> examples, std::span<const double> squared,
                             double squared_of_weighted_mean) {
  expects(examples.size() == squared.size(), "as many squared norms as counts");
  expects<ConfigError>(examples.size() >= 2, "noise shows in two gradients or more");
  double total = 0, q = 0;
  for (std::size_t i = 0; i < examples.size(); ++i) {
    expects<ConfigError>(examples[i] > 0, "counts of examples are positive");
    total += examples[i];
    q += examples[i] * squared[i];
  }
  q /= total;
  const double trace =
      total * (q - squared_of_weighted_mean) / static_cast<double>(examples.size() - 1);
  return {trace, squared_of_weighted_mean - trace / total};
}

NoiseScale::Value NoiseScale::value(Index block, int resamples, std::uint64_t seed) const {
  expects<ConfigError>(block > 0 && resamples > 0, "block and resamples are positive");
  Value value;
  const auto n = static_cast<Index>(probes_.size());
  if (n == 0) return value;
  double trace = 0, signal = 0, squares = 0;
  for (const NoiseProbe& p : probes_) {
    trace += p.trace;
    signal += p.signal;
  }
  const auto count = static_cast<double>(n);
  for (const NoiseProbe& p : probes_) {
    squares += (p.signal - signal / count) * (p.signal - signal / count);
  }
  const auto ratio = [](double t, double s) {
    return s > 0 ? t / s : std::numeric_limits<double>::infinity();
  };
  value.scale = ratio(trace, signal);
  if (n > 1) {
    const double error = std::sqrt(squares / (count - 1) / count);
    value.unresolved = signal / count < 2 * error || signal <= 0;
  }
  if (n < 2 * block) return value;
  // Neighbouring probes are alike: whole blocks are drawn, which may start anywhere.
  std::vector<double> ratios;
  Random random(seed, 3);
  const Index blocks = (n + block - 1) / block;
  for (int i = 0; i < resamples; ++i) {
    double t = 0, s = 0;
    for (Index b = 0; b < blocks; ++b) {
      const std::size_t first = random.below(static_cast<std::size_t>(n - block + 1));
      for (std::size_t k = first; k < first + static_cast<std::size_t>(block); ++k) {
        t += probes_[k].trace;
        s += probes_[k].signal;
      }
    }
    ratios.push_back(ratio(t, s));
  }
  value.interval = percentile_interval(std::move(ratios), 0.95);
  return value;
}

NoiseProbe example_noise(ConstMatrixView gradients) {
  const Matrix g = to_double(gradients);
  std::vector<double> mean(static_cast<std::size_t>(g.cols));
  double squared = 0;
  for (Index i = 0; i < g.rows; ++i) {
    for (Index j = 0; j < g.cols; ++j) {
      mean[static_cast<std::size_t>(j)] += g(i, j) / static_cast<double>(g.rows);
      squared += g(i, j) * g(i, j) / static_cast<double>(g.rows);
    }
  }
  const double of_mean = std::inner_product(mean.begin(), mean.end(), mean.begin(), 0.0);
  return distributed_noise(g.rows, 1, squared, of_mean);
}

double extrapolated_noise_scale(Index n1, double scale1, Index n2, double scale2) {
  expects<ConfigError>(n1 >= 2 && n2 >= 2 && n1 != n2, "two numbers of gradients, 2 or more each");
  // s(n) = s + c/n through both.
  const auto a = static_cast<double>(n1), b = static_cast<double>(n2);
  return (a * scale1 - b * scale2) / (a - b);
}

double NoiseScale::trend(double decay) const {
  double trace = 0, signal = 0;
  for (const NoiseProbe& p : probes_) {
    trace = decay * trace + (1 - decay) * p.trace;
    signal = decay * signal + (1 - decay) * p.signal;
  }
  if (probes_.empty()) return 0;
  return signal > 0 ? trace / signal : std::numeric_limits<double>::infinity();
}

double norm(DescentNorm norm, ConstMatrixView view) {
  const Matrix a = to_double(view);
  double largest = 0;
  switch (norm) {
    case DescentNorm::frobenius:
      return frobenius(a);
    case DescentNorm::sign:
      for (const double x : a.values) largest = std::max(largest, std::abs(x));
      return largest;
    case DescentNorm::spectral:
      return singular_values(a)[0];
    case DescentNorm::row:
    case DescentNorm::column: {
      const bool row = norm == DescentNorm::row;
      for (Index i = 0; i < (row ? a.rows : a.cols); ++i) {
        largest = std::max(largest, line_norm(a, i, row));
      }
      return largest;
    }
  }
  return 0;
}

double dual_norm(DescentNorm norm, ConstMatrixView a) { return dual_norm(norm, to_double(a)); }

std::vector<double> descent_direction(DescentNorm norm, ConstMatrixView view) {
  Matrix a = to_double(view);
  switch (norm) {
    case DescentNorm::frobenius: {
      const double length = frobenius(a);
      for (double& x : a.values) x = length > 0 ? -x / length : 0;
      break;
    }
    case DescentNorm::sign:
      for (double& x : a.values) x = x > 0 ? -1 : x < 0 ? 1 : 0;
      break;
    case DescentNorm::spectral:
      a = polar(a, 1e-14);
      for (double& x : a.values) x = -x;
      break;
    case DescentNorm::row:
    case DescentNorm::column: {
      const bool row = norm == DescentNorm::row;
      for (Index i = 0; i < (row ? a.rows : a.cols); ++i) {
        const double length = line_norm(a, i, row);
        for (Index j = 0; j < (row ? a.cols : a.rows); ++j) {
          double& x = row ? a(i, j) : a(j, i);
          x = length > 0 ? -x / length : 0;
        }
      }
      break;
    }
  }
  return std::move(a.values);
}

double dual_noise(DescentNorm norm, std::span<const ConstMatrixView> gradients) {
  return dual_noise(norm, copies(gradients));
}

NoiseDecay dual_noise_decay(DescentNorm norm, std::span<const ConstMatrixView> gradients) {
  std::vector<Matrix> level = copies(gradients);
  NoiseDecay out;
  for (double batch = 1; level.size() >= 2; batch *= 2) {
    out.batches.push_back(batch);
    out.noise.push_back(dual_noise(norm, level));
    out.distortion.push_back(batch * out.noise.back() / out.noise.front());
    std::vector<Matrix> next;
    for (std::size_t i = 0; i + 1 < level.size(); i += 2) {
      Matrix mean = level[i];
      add(mean, 1, level[i + 1]);
      for (double& x : mean.values) x /= 2;
      next.push_back(std::move(mean));
    }
    level = std::move(next);
  }
  if (out.batches.size() > 1 && *std::min_element(out.noise.begin(), out.noise.end()) > 0) {
    out.exponent = fit_power(out.batches, out.noise).exponent;
  }
  return out;
}

DualNoise dual_noise_scale(DescentNorm norm, double examples_each,
                           std::span<const ConstMatrixView> views) {
  expects<ConfigError>(examples_each > 0, "a positive batch each");
  expects<ConfigError>(
      norm == DescentNorm::frobenius || norm == DescentNorm::sign || norm == DescentNorm::spectral,
      "a noise scale is defined for frobenius, sign and spectral");
  std::vector<Matrix> g = copies(views);
  const auto n = static_cast<double>(g.size());
  Matrix mean(g[0].rows, g[0].cols);
  for (const Matrix& x : g) add(mean, 1 / n, x);
  for (Matrix& x : g) add(x, -1, mean);
  const double scale = examples_each / (n - 1);
  DualNoise out{0, dual_norm(norm, mean)};
  if (norm == DescentNorm::spectral) {
    const bool wide = mean.rows <= mean.cols;
    const Index k = std::min(mean.rows, mean.cols);
    Matrix covariance(k, k);
    for (const Matrix& x : g) {
      add(covariance, scale,
          wide ? product(x, x, Op::none, Op::transpose) : product(x, x, Op::transpose));
    }
    for (const double l : eigen(covariance).values) out.noise += std::sqrt(std::max(l, 0.0));
    return out;
  }
  double trace = 0;
  for (std::size_t e = 0; e < mean.values.size(); ++e) {
    double squares = 0;
    for (const Matrix& x : g) squares += x.values[e] * x.values[e];
    trace += scale * squares;
    out.noise += std::sqrt(scale * squares);
  }
  if (norm == DescentNorm::frobenius) out.noise = std::sqrt(trace);
  return out;
}

void add_gram(ConstMatrixView gradient, std::span<double> triangle) {
  const Matrix gram = gram_upper(to_double(gradient));
  expects(std::ssize(triangle) == gram.rows * (gram.rows + 1) / 2, "a packed triangle of its size");
  std::size_t at = 0;
  for (Index i = 0; i < gram.rows; ++i) {
    for (Index j = i; j < gram.rows; ++j) triangle[at++] += gram(i, j);
  }
}

double spectral_noise(Index gradients, double examples_each, std::span<const double> gram_sum,
                      ConstMatrixView mean) {
  expects<ConfigError>(gradients >= 2 && examples_each > 0, "two gradients of some examples");
  Matrix covariance = gram_upper(to_double(mean));
  expects(std::ssize(gram_sum) == covariance.rows * (covariance.rows + 1) / 2,
          "a packed triangle of the mean's smaller side");
  const auto n = static_cast<double>(gradients);
  std::size_t at = 0;
  for (Index i = 0; i < covariance.rows; ++i) {
    for (Index j = i; j < covariance.rows; ++j) {
      covariance(i, j) = examples_each / (n - 1) * (gram_sum[at++] - n * covariance(i, j));
    }
  }
  double sum = 0;
  for (const double x : eigenvalues(covariance)) sum += std::sqrt(std::max(x, 0.0));
  return sum;
}

}  // namespace orthrus::studies
