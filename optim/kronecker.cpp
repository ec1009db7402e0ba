#include "optim/kronecker.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <orthrus/error.hpp>

#include "kernels/carve.hpp"
#include "kernels/device_memory.hpp"

namespace orthrus::optim {

using kernels::Backend;
using kernels::carve;
using kernels::piece_bytes;

bool Turns::due(std::int64_t step, double phase) const {
  const auto turn = static_cast<std::int64_t>(std::floor(phase * static_cast<double>(every)));
  return step <= every || (step + turn) % every == 0;
}

std::string Turns::description() const {
  return every == 1 ? "every step" : "every " + std::to_string(every) + " steps";
}

double Decay::correction(std::int64_t step) const {
  return corrected && beta < 1 ? 1 - std::pow(beta, static_cast<double>(step)) : 1;
}

// ---- a factor ----------------------------------------------------------------------------------

bool Factor::is_made(Backend& backend) const { return backend.sum_squares(made) > 0; }

void Factor::load(MatrixView full, Backend& backend) const {
  backend.unpack_triangle(static_cast<const float*>(packed.data), full);
}
bool Factor::store(ConstMatrixView full, Backend& backend) const {
  if (!std::isfinite(backend.abs_max(full))) return false;
  backend.pack_triangle(full, static_cast<float*>(packed.data));
  return true;
}
void Factor::load_root(MatrixView full, Backend& backend) const {
  backend.unpack_triangle(static_cast<const float*>(made.data), full);
}
void Factor::store_root(ConstMatrixView full, Backend& backend) const {
  backend.pack_triangle(full, static_cast<float*>(made.data));
}

// ---- failures ----------------------------------------------------------------------------------

void Failures::add(std::string_view what, std::string_view why, bool serves) {
  if (!text_.empty()) text_ += "; ";
  text_ += std::string(what) + ": " + std::string(why);
  serves_ = serves_ && serves;
}

void Failures::not_finite(const Factor& factor, bool serves) {
  add(factor.name(), "with this gradient it would not be finite", serves);
}

void Failures::settle(bool renewed) {
  if (!any()) {
    if (renewed) backend_.fill(0, count_);
    return;
  }
  kernels::OnHost<float> count(backend_, static_cast<float*>(count_.data), 1);
  const double times = static_cast<double>(count.data()[0]) + 1;
  count.data()[0] = static_cast<float>(times);
  count.put_back();
  const std::string of = " of " + std::to_string(tolerated_) + " tolerated in a row";
  std::array<char, 32> number{};
  std::snprintf(number.data(), number.size(), "%.0f", times);
  if (!serves_) throw NumericError(text_ + "; there is none from before");
  if (times > tolerated_) {
    throw NumericError(text_ + "; what was there has served " + std::to_string(tolerated_) +
                       " times in a row, rule.tolerated_failures");
  }
  if (problem_ == nullptr) return;
  if (!problem_->empty()) *problem_ += "; ";
  *problem_ += text_ + "; what was there serves, " + number.data() + of;
}

bool take_in(const Factor& factor, double beta, double weight, ConstMatrixView z, MatrixView full,
             Backend& backend, Failures& failures) {
  using kernels::Transpose;
  factor.load(full, backend);
  backend.syrk(weight, z, factor.of_rows ? Transpose::no : Transpose::yes, beta, full);
  if (factor.store(full, backend)) return true;
  failures.not_finite(factor, factor.is_made(backend));
  return false;
}

// ---- roots -------------------------------------------------------------------------------------

RuleKey InverseRoot::key() {
  return {"root",
          std::string("auto"),
          0,
          0,
          "of a factor: by eigenvectors (eigh), or by products that converge to it (coupled);"
          " auto: eigh where the host computes, coupled on a device",
          {"auto", "eigh", "coupled"}};
}

InverseRoot::InverseRoot(double exponent, kernels::Damping damping, kernels::Eigenvalues how,
                         std::string_view by)
    : exponent_(exponent),
      damping_(damping),
      how_(how),
      by_(by == "eigh"      ? By::eigenvectors
          : by == "coupled" ? By::products
                            : By::automatic) {
  options_.r = exponent == 1                          ? 1
               : exponent == 0.5                      ? 2
               : exponent == 0.25 || exponent == 0.75 ? 4
                                                      : 0;
  power_ = exponent == 0.75 ? 3 : 1;
  options_.damping = damping;
  // Products cannot mend a negative eigenvalue that rounding left; and their number grows with what
  // they are to tell apart.
  options_.damping.of_norm = std::max(damping.of_norm, 1e-6);
  expects<ConfigError>(by_ != By::products || has_products(),
                       "rule.root coupled knows the exponents 1/4, 1/2, 3/4 and 1");
}

std::string InverseRoot::obstacle(Index side) const {
  if (by_ == By::products || side <= kernels::largest_eigh_side) return {};
  return "a factor of " + std::to_string(side) +
         " rows has more eigenvectors than LAPACK has numbers for (" +
         std::to_string(kernels::largest_eigh_side) + ")";
}

std::string InverseRoot::inverse_obstacle() const {
  // A factor's condition is 2^24 at most, its root's 2^(24 exponent), of which f32 must leave some.
  if (exponent_ <= 0.75) return {};
  return "roots of an exponent above 3/4 (rule.exponent) have no inverse in f32";
}

std::size_t InverseRoot::workspace_bytes(Index m) const {
  const std::size_t vectors = kernels::spd_root_eigh_workspace_bytes(m);
  if (by_ == By::eigenvectors || !has_products()) return vectors;
  const std::size_t products = kernels::spd_root_workspace_bytes(m, DType::f32, options_);
  return by_ == By::products ? products : std::max(vectors, products);
}

double InverseRoot::flops(Index m) const {
  return by_ == By::products ? kernels::spd_root_flops(m, options_.r, 8)
                             : kernels::eigh_root_flops(static_cast<double>(m));
}
double InverseRoot::product_flops(Index m) const {
  return by_ == By::products ? flops(m) : kernels::eigh_root_product_flops(static_cast<double>(m));
}

std::string InverseRoot::description() const {
  std::array<char, 64> other{};
  std::snprintf(other.data(), other.size(), "powers -%.3g", exponent_);
  const std::string what = exponent_ == 0.25  ? "inverse fourth roots"
                           : exponent_ == 0.5 ? "inverse square roots"
                                              : std::string(other.data());
  return what + (by_ == By::products       ? " by products"
                 : by_ == By::eigenvectors ? " by eigenvectors"
                                           : " by eigenvectors (a device: by products)");
}

void InverseRoot::make(MatrixView p, std::span<std::byte> work, Backend& backend) const {
  if (by_ == By::products || (by_ == By::automatic && has_products() && !backend.on_host())) {
    const kernels::RootReport report = kernels::spd_root(p, power_, options_, p, {}, work, backend);
    if (!report.ok()) throw NumericError(report.problem());
  } else {
    kernels::spd_root_eigh(p, exponent_, damping_, how_, p, {}, work, backend);
  }
}

void InverseRoot::renew(const Factor& factor, double correction, bool lifts, MatrixView full,
                        std::span<std::byte> work, Backend& backend, Failures& failures) const {
  factor.load(full, backend);
  backend.convert(full, 1 / correction, full);
  const double trace = backend.trace(full);
  if (trace == 0) return backend.fill(0, factor.made);
  try {
    make(full, work, backend);
    if (lifts) backend.convert(full, std::pow(std::max(trace, 0.0), exponent_ / 2), full);
    if (!std::isfinite(backend.abs_max(full))) throw NumericError("its root is beyond f32");
    factor.store_root(full, backend);
  } catch (const NumericError& e) {
    failures.add(factor.name(), e.what(), factor.is_made(backend));
  }
}

std::size_t inverse_workspace_bytes(Index side) { return piece_bytes(side, side, DType::f64); }

void invert_root(const Factor& factor, double scale, MatrixView full, std::span<std::byte> work,
                 Backend& backend) {
  if (!factor.is_made(backend)) return backend.fill(0, full);
  factor.load_root(full, backend);
  const MatrixView wide = carve(work, factor.side, factor.side, DType::f64);
  backend.convert(full, 1, wide);
  if (!backend.invert_spd(wide)) {
    return backend.fill(std::numeric_limits<double>::quiet_NaN(), full);
  }
  backend.convert(wide, scale, full);
}

// ---- directions --------------------------------------------------------------------------------

KroneckerDirection::KroneckerDirection(const RuleConfig& c, Decay momentum, Decay factors,
                                       std::vector<StateSpec> state)
    : turns_{whole_number(c, "frequency")},
      momentum_(momentum),
      factors_(factors),
      tolerated_(static_cast<int>(whole_number(c, "tolerated_failures"))),
      state_(std::move(state)) {}

std::vector<RuleKey> kronecker_keys(double lr, double frequency) {
  return {
      {"lr", lr, 0, 1e6, "learning rate of U = s D"},
      {"weight_decay", 0.0, 0, 1e6, "decoupled: W loses lr * weight_decay of itself"},
      {"frequency", frequency, 1, 1e9,
       "what is made of the factors is renewed in each of the first so many steps, then every so"
       " many; other matrices in other steps"},
      {"tolerated_failures", 3.0, 0, 1e6,
       "so many steps in a row what was there serves, if it cannot be renewed"},
  };
}

}  // namespace orthrus::optim
