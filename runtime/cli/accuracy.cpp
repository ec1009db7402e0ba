#include "runtime/cli/accuracy.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <numeric>

#include "kernels/backend.hpp"
#include "kernels/device_memory.hpp"
#include "kernels/rng.hpp"
#include "optim/lmo.hpp"

namespace orthrus::cli {
namespace {

template <class F>
std::vector<double> sequence(Index m, F&& value) {
  std::vector<double> v(static_cast<std::size_t>(m));
  for (Index i = 0; i < m; ++i) v[static_cast<std::size_t>(i)] = value(static_cast<double>(i));
  return v;
}

/// σ = 2·cos θ of the quarter circle: a share (2θ − sin 2θ)/π is larger. Halved, so that the
/// largest is about 1.
std::vector<double> quarter_circle(Index m) {
  return sequence(m, [m](double i) {
    const double share = (i + 0.5) / static_cast<double>(m);
    double low = 0;
    double high = std::numbers::pi / 2;
    for (int k = 0; k < 60; ++k) {
      const double theta = (low + high) / 2;
      (2 * theta - std::sin(2 * theta) < share * std::numbers::pi ? low : high) = theta;
    }
    return std::cos(low);
  });
}

constexpr std::array kSpectra{
    Spectrum{"flat", [](Index m) { return sequence(m, [](double) { return 1.0; }); }},
    Spectrum{"Gaussian", quarter_circle},
    Spectrum{"i^-1/2",
             [](Index m) { return sequence(m, [](double i) { return 1 / std::sqrt(i + 1); }); }},
    Spectrum{"1/i", [](Index m) { return sequence(m, [](double i) { return 1 / (i + 1); }); }},
    Spectrum{"cond 1e4",
             [](Index m) {
               const double last = std::max<double>(static_cast<double>(m - 1), 1);
               return sequence(m, [last](double i) { return std::pow(1e-4, i / last); });
             }},
    Spectrum{"rank m/8",
             [](Index m) {
               const auto rank = static_cast<double>(std::max<Index>(m / 8, 1));
               return sequence(m, [rank](double i) { return i < rank ? 1.0 : 0.0; });
             }},
};

/// `count` orthonormal rows of length n.
std::vector<double> orthonormal(Index count, Index n, std::uint64_t stream) {
  const auto length = static_cast<std::size_t>(n);
  std::vector<double> rows(static_cast<std::size_t>(count) * length);
  for (std::size_t k = 0; k < rows.size(); ++k) {
    const auto words = kernels::random_words(1, stream, 0, k);
    // Four uniform numbers make a bell that is wide enough for random directions.
    for (const std::uint32_t w : words) rows[k] += w * 0x1p-32 - 0.5;
  }
  const auto row = [&](std::size_t i) { return rows.data() + i * length; };
  for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
    for (int pass = 0; pass < 2; ++pass) {
      for (std::size_t j = 0; j < i; ++j) {
        const double dot = std::inner_product(row(i), row(i) + n, row(j), 0.0);
        for (std::size_t k = 0; k < length; ++k) row(i)[k] -= dot * row(j)[k];
      }
    }
    const double norm = std::sqrt(std::inner_product(row(i), row(i) + n, row(i), 0.0));
    for (std::size_t k = 0; k < length; ++k) row(i)[k] /= norm;
  }
  return rows;
}

ConstMatrixView view(const std::vector<double>& v, Index rows, Index cols) {
  return matrix_view(v.data(), rows, cols);
}

}  // namespace

std::span<const Spectrum> spectra() { return kSpectra; }

Factors::Factors(Index m, Index n)
    : m_(m), n_(n), u_(orthonormal(m, m, 1)), v_(orthonormal(m, n, 2)) {}

std::vector<float> Factors::matrix(std::span<const double> sigma, kernels::Backend& backend) const {
  std::vector<double> scaled = u_;
  backend.scale_lines(matrix_view(sigma.data(), m_, 1), false, matrix_view(scaled.data(), m_, m_));
  std::vector<double> x(v_.size());
  backend.gemm(1, view(scaled, m_, m_), kernels::Transpose::yes, view(v_, m_, n_),
               kernels::Transpose::no, 0, matrix_view(x.data(), m_, n_));
  return {x.begin(), x.end()};
}

SignError Factors::error(std::span<const float> o, std::span<const double> sigma,
                         kernels::Backend& backend) const {
  const std::vector<double> wide(o.begin(), o.end());
  std::vector<double> turned(v_.size());  // UᵀO
  std::vector<double> diagonal(sigma.size());
  backend.gemm(1, view(u_, m_, m_), kernels::Transpose::no, view(wide, m_, n_),
               kernels::Transpose::no, 0, matrix_view(turned.data(), m_, n_));
  backend.row_dots(view(turned, m_, n_), view(v_, m_, n_), matrix_view(diagonal.data(), m_, 1));
  SignError e;
  const double top = *std::max_element(sigma.begin(), sigma.end());
  for (std::size_t i = 0; i < sigma.size(); ++i) {
    const double off = std::abs(diagonal[i] - 1);
    if (sigma[i] >= 1e-2 * top) e.above_1e2 = std::max(e.above_1e2, off);
    if (sigma[i] >= 5e-3 * top) e.above_5e3 = std::max(e.above_5e3, off);
    if (sigma[i] >= 2e-3 * top) e.above_2e3 = std::max(e.above_2e3, off);
  }
  for (const optim::NormRow& norm : optim::norms()) {
    if (norm.name == "spectral") e.largest = norm.norm(matrix_view(o.data(), m_, n_), backend);
  }
  return e;
}

std::vector<SignMethod> sign_methods() {
  std::vector<SignMethod> methods;
  for (const kernels::CoefficientTable& table : kernels::coefficient_tables()) {
    const auto listed = static_cast<int>(table.iterations.size());
    for (int steps = 5; steps <= std::max(5, listed); steps += std::max(1, listed - 5)) {
      SignMethod method;
      method.name = table.name;
      method.steps = steps;
      method.config.coefficients = table.name;
      method.config.iterations = steps;
      methods.push_back(std::move(method));
    }
  }
  for (const int terms : {2, 3, 4}) {
    SignMethod method;
    method.name = "rational";
    method.steps = terms;
    method.config.coefficients = "rational";
    method.config.terms = terms;
    method.in_bf16 = terms < 4;  // refused: its smallest pole is below what bf16 sums leave
    methods.push_back(std::move(method));
  }
  return methods;
}

std::vector<float> run_sign(const LmoConfig& config, std::span<const float> x, Index m, Index n,
                            kernels::Backend& backend) {
  const optim::Lmo lmo(config);
  std::vector<float> o(x.begin(), x.end());
  kernels::DeviceBuffer work(backend, lmo.workspace_bytes(m, n));
  lmo(matrix_view(o.data(), m, n), work.span(), backend);
  return o;
}

std::string error_text(double error) {
  if (error < 1e-3) return "<.001";
  return error < 0.1 ? fmt::format("{:.3f}", error) : fmt::format("{:.2f}", error);
}

}  // namespace orthrus::cli
