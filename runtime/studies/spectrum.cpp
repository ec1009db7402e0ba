#include <algorithm>
#include <cmath>
#include <numeric>
#include <orthrus/error.hpp>
#include <orthrus/studies/spectrum.hpp>
#include <orthrus/studies/theory.hpp>

#include "runtime/studies/dense.hpp"

namespace orthrus::studies {
namespace {

/// exp(−Σ pᵢ ln pᵢ), pᵢ = xᵢ/Σx.
double exponential_entropy(std::span<const double> x) {
  const double sum = std::accumulate(x.begin(), x.end(), 0.0);
  double entropy = 0;
  for (const double v : x) {
    if (v > 0) entropy -= v / sum * std::log(v / sum);
  }
  return std::exp(entropy);
}

double square_of_inverse_sums(std::span<const double> mu, Index rows, Index cols, double added) {
  double pairs = 0, alone = 0;
  for (std::size_t i = 0; i < mu.size(); ++i) {
    for (std::size_t j = i + 1; j < mu.size(); ++j) {
      pairs += 1 / ((mu[i] + mu[j]) * (mu[i] + mu[j]) + added);
    }
    alone += 1 / (mu[i] * mu[i] + added);
  }
  const double more = static_cast<double>(std::max(rows, cols) - std::min(rows, cols));
  return 4 * pairs + (more > 0 ? more * alone : 0);
}

void check_spectrum(std::span<const double> values, Index rows, Index cols) {
  expects(rows > 0 && cols > 0 && static_cast<Index>(values.size()) == std::min(rows, cols),
          "min(rows, cols) singular values");
  for (const double x : values) {
    expects<NumericError>(std::isfinite(x) && x >= 0, "singular values are finite, none negative");
  }
}

}  // namespace

std::vector<double> singular_values(ConstMatrixView a) { return singular_values(to_double(a)); }

std::vector<double> gram_singular_values(ConstMatrixView a) {
  Matrix gram = gram_upper(to_double(a));
  std::vector<double> s = eigenvalues(gram);
  for (double& x : s) x = std::sqrt(std::max(x, 0.0));
  std::reverse(s.begin(), s.end());
  return s;
}

Spectrum spectrum_of(std::span<const double> values, double cutoff) {
  std::vector<double> s(values.begin(), values.end());
  std::sort(s.begin(), s.end(), std::greater<>());
  for (const double x : s) {
    expects<NumericError>(std::isfinite(x) && x >= 0, "singular values are finite, none negative");
  }
  Spectrum out;
  if (s.empty() || s[0] == 0) return out;
  const double largest = s[0];
  out.operator_norm = largest;
  while (s.back() <= cutoff * largest) s.pop_back();
  // In units of σ₁, where no square over- or underflows.
  for (double& x : s) x /= largest;
  std::vector<double> squares;
  for (const double x : s) squares.push_back(x * x);
  const double first = std::accumulate(s.begin(), s.end(), 0.0);
  const double second = std::accumulate(squares.begin(), squares.end(), 0.0);
  const double fourth = std::inner_product(squares.begin(), squares.end(), squares.begin(), 0.0);
  out.frobenius_norm = largest * std::sqrt(second);
  out.nuclear_norm = largest * first;
  out.stable_rank = second;
  out.nuclear_rank = first * first / second;
  out.erank1 = exponential_entropy(s);
  out.erank2 = exponential_entropy(squares);
  out.participation = second * second / fourth;
  out.rank = static_cast<Index>(s.size());
  out.cond_eff = 1 / s[(9 * s.size() + 9) / 10 - 1];
  return out;
}

Spectrum spectrum_of(ConstMatrixView a, double cutoff) {
  return spectrum_of(singular_values(a), cutoff);
}

Spectrum spectrum_of_gram(std::span<const double> eigenvalues, double cutoff) {
  std::vector<double> s;
  for (const double x : eigenvalues) s.push_back(std::sqrt(std::max(x, 0.0)));
  return spectrum_of(s, cutoff);
}

double polar_sensitivity(std::span<const double> values, Index rows, Index cols, double noise) {
  check_spectrum(values, rows, cols);
  return square_of_inverse_sums(values, rows, cols,
                                noise * noise * static_cast<double>(std::max(rows, cols)));
}

PolarBatch polar_batch(std::span<const double> values, Index rows, Index cols,
                       double entry_variance, double momentum, double at_batch) {
  check_spectrum(values, rows, cols);
  expects<ConfigError>(entry_variance >= 0 && at_batch > 0,
                       "a variance is not negative, a batch positive");
  const double v = momentum_variance(momentum);
  const double variance = v * entry_variance / at_batch;  // τ²
  const double floor = variance * static_cast<double>(std::max(rows, cols));
  const double least = *std::min_element(values.begin(), values.end());
  PolarBatch out;
  out.saturated = least * least <= floor;
  const double s = square_of_inverse_sums(values, rows, cols, out.saturated ? floor : 0);
  const auto m = static_cast<double>(values.size());
  // Without noise nothing need be averaged, however small a value is.
  out.batch = entry_variance > 0 ? v * entry_variance * s / m : 0;
  out.noise_ratio = entry_variance > 0 ? variance * s / m : 0;
  return out;
}

double update_noise(ConstMatrixView a, ConstMatrixView b) {
  expects(a.rows == b.rows && a.cols == b.cols, "two momenta of one shape");
  Matrix difference = polar(to_double(a));
  add(difference, -1, polar(to_double(b)));
  const double squares = dot(difference, difference);
  return squares / (2 * static_cast<double>(std::min(a.rows, a.cols)));
}

Flattening flattening(ConstMatrixView weights, ConstMatrixView update) {
  expects(weights.rows == update.rows && weights.cols == update.cols,
          "an update of the shape of the weights");
  const Svd f = svd(to_double(weights));
  const Matrix moved = product(product(f.u, to_double(update), Op::transpose), f.vt, Op::none,
                               Op::transpose);  // UᵀΔW·V
  Flattening out;
  const double sum = std::accumulate(f.s.begin(), f.s.end(), 0.0);
  double entropy = 0;
  for (const double s : f.s) {
    if (s > 0) entropy -= s / sum * std::log(s / sum);
  }
  for (std::size_t i = 0; i < f.s.size(); ++i) {
    const double d = moved(static_cast<Index>(i), static_cast<Index>(i));
    out.dsigma.push_back(d);
    if (f.s[i] > 0) out.rate -= d * (std::log(f.s[i] / sum) + entropy) / sum;
  }
  return out;
}

double PowerIteration::operator_norm(ConstMatrixView a) {
  const Matrix x = to_double(a);
  const bool wide = x.rows <= x.cols;
  const Index k = std::min(x.rows, x.cols);
  Matrix v(1, k);
  if (static_cast<Index>(start.size()) == k) {
    v.values = start;
  } else {
    // Not parallel to the axes, nor to a constant vector.
    for (Index i = 0; i < k; ++i) v(0, i) = 1 + 0.5 * std::sin(static_cast<double>(i) + 1);
  }
  double before = 0, norm = 0;
  for (int i = 0; i < iterations; ++i) {
    const double length = frobenius(v);
    if (length == 0) break;
    for (double& e : v.values) e /= length;
    start = v.values;
    // ‖Xᵀv‖ for the rows' side, ‖Xv‖ for the columns'.
    const Matrix half = wide ? product(v, x) : product(v, x, Op::none, Op::transpose);
    norm = frobenius(half);
    if (std::abs(norm - before) <= tolerance * norm) break;
    before = norm;
    v = wide ? product(half, x, Op::none, Op::transpose) : product(half, x);
  }
  return norm;
}

double orthogonality_error(ConstMatrixView o) {
  const Matrix x = to_double(o);
  Matrix gram = x.rows <= x.cols ? product(x, x, Op::none, Op::transpose)
                                 : product(x, x, Op::transpose, Op::none);
  for (Index i = 0; i < gram.rows; ++i) gram(i, i) -= 1;
  return frobenius(gram) / std::sqrt(static_cast<double>(gram.rows));
}

double alignment(ConstMatrixView gradient, ConstMatrixView direction) {
  const Matrix g = to_double(gradient);
  const std::vector<double> s = singular_values(g);
  const double nuclear = std::accumulate(s.begin(), s.end(), 0.0);
  return nuclear > 0 ? dot(g, to_double(direction)) / nuclear : 0;
}

GeometryAdvisor::GeometryAdvisor(const Options& options) : options_(options) {
  expects<ConfigError>(options.hysteresis >= 0 && options.hysteresis < 1 &&
                           options.consecutive > 0 && options.decay >= 0 && options.decay < 1,
                       "hysteresis and decay lie in [0, 1), consecutive is positive");
}

GeometryAdvisor::Advice GeometryAdvisor::probe(double nuclear_rank, double stable_rank) {
  expects<NumericError>(nuclear_rank >= 1 - 1e-9 && stable_rank >= 1 - 1e-9,
                        "a nuclear and a stable rank are at least 1");
  State& s = state_;
  s.log_ratio =
      options_.decay * s.log_ratio + (1 - options_.decay) * std::log(nuclear_rank / stable_rank);
  s.weight = options_.decay * s.weight + (1 - options_.decay);
  const double ratio = average_ratio();
  s.above = ratio > 1 + options_.hysteresis ? s.above + 1 : 0;
  s.below = ratio < 1 - options_.hysteresis ? s.below + 1 : 0;
  if (s.above >= options_.consecutive) s.advice = Advice::spectral;
  if (s.below >= options_.consecutive) s.advice = Advice::euclidean;
  return s.advice;
}

double GeometryAdvisor::average_ratio() const noexcept {
  return state_.weight > 0 ? std::exp(state_.log_ratio / state_.weight) : 1;
}

}  // namespace orthrus::studies
