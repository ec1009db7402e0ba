#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <orthrus/error.hpp>
#include <orthrus/studies/fit.hpp>
#include <utility>

#include "runtime/studies/minimize.hpp"
#include "runtime/studies/random.hpp"
#include "runtime/studies/student.hpp"

namespace orthrus::studies {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

double log_of(double x, const char* what) {
  expects<NumericError>(std::isfinite(x) && x > 0, what);
  return std::log(x);
}

std::vector<double> logs_of(std::span<const double> values, const char* what) {
  std::vector<double> logs;
  for (const double x : values) logs.push_back(log_of(x, what));
  return logs;
}

double mean_square(std::span<const double> r) {
  return std::inner_product(r.begin(), r.end(), r.begin(), 0.0) / static_cast<double>(r.size());
}

/// n·ln(RSS/n) + 2k + 2k(k+1)/(n−k−1).
double akaike(double mean_square, std::size_t count, std::size_t parameters) {
  const auto n = static_cast<double>(count), k = static_cast<double>(parameters);
  if (n <= k + 1) return infinity;
  // A perfect fit has no likelihood: the floor is that of rounding.
  return n * std::log(std::max(mean_square, 1e-30)) + 2 * k + 2 * k * (k + 1) / (n - k - 1);
}

/// Weighted straight line y = intercept + slope·x.
struct Line {
  double intercept, slope, squares, slope_error;
};
Line straight_line(std::span<const double> x, std::span<const double> y,
                   std::span<const double> w) {
  double sw = 0, sx = 0, sy = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double weight = w.empty() ? 1 : w[i];
    sw += weight;
    sx += weight * x[i];
    sy += weight * y[i];
  }
  const double mx = sx / sw, my = sy / sw;
  double sxx = 0, sxy = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double weight = w.empty() ? 1 : w[i];
    sxx += weight * (x[i] - mx) * (x[i] - mx);
    sxy += weight * (x[i] - mx) * (y[i] - my);
  }
  expects<NumericError>(sxx > 0, "a line needs two different abscissas");
  Line line{my - sxy / sxx * mx, sxy / sxx, 0, 0};
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double r = y[i] - line.intercept - line.slope * x[i];
    line.squares += (w.empty() ? 1 : w[i]) * r * r;
  }
  if (x.size() > 2) {
    line.slope_error = std::sqrt(line.squares / static_cast<double>(x.size() - 2) / sxx);
  }
  return line;
}

/// Linear least squares with k unknowns (at most 4), columns scaled; Gaussian elimination with
/// pivots.
template <std::size_t K>
std::array<double, K> linear_squares(const std::vector<std::array<double, K>>& rows,
                                     std::span<const double> y) {
  std::array<std::array<double, K + 1>, K> a{};
  std::array<double, K> scale{};
  for (const auto& row : rows) {
    for (std::size_t j = 0; j < K; ++j) scale[j] += row[j] * row[j];
  }
  for (double& s : scale) s = s > 0 ? 1 / std::sqrt(s) : 1;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (std::size_t j = 0; j < K; ++j) {
      for (std::size_t l = 0; l < K; ++l) a[j][l] += rows[i][j] * scale[j] * rows[i][l] * scale[l];
      a[j][K] += rows[i][j] * scale[j] * y[i];
    }
  }
  for (std::size_t j = 0; j < K; ++j) {
    std::size_t pivot = j;
    for (std::size_t i = j + 1; i < K; ++i) {
      if (std::abs(a[i][j]) > std::abs(a[pivot][j])) pivot = i;
    }
    std::swap(a[j], a[pivot]);
    if (std::abs(a[j][j]) < 1e-300) continue;
    for (std::size_t i = 0; i < K; ++i) {
      if (i == j) continue;
      const double factor = a[i][j] / a[j][j];
      for (std::size_t l = j; l <= K; ++l) a[i][l] -= factor * a[j][l];
    }
  }
  std::array<double, K> x{};
  for (std::size_t j = 0; j < K; ++j) {
    x[j] = std::abs(a[j][j]) < 1e-300 ? 0 : a[j][K] / a[j][j] * scale[j];
  }
  return x;
}

// ---- steps to a target ----

std::size_t parameter_count(StepsModel model) {
  return model == StepsModel::hyper ? 2 : model == StepsModel::hyper_alpha ? 3 : 4;
}

/// ln S and its derivatives by the search's parameters: logarithms, and for d of three_term_inv the
/// logit of d·B_min^−β, which keeps 1 − d·B^−β positive at every batch measured.
double log_steps(StepsModel model, std::span<const double> p, double log_batch, double log_least,
                 double* slope) {
  switch (model) {
    case StepsModel::hyper: {
      const double floor = std::exp(p[0]), rest = std::exp(p[1] - log_batch);
      slope[0] = floor / (floor + rest);
      slope[1] = rest / (floor + rest);
      return std::log(floor + rest);
    }
    case StepsModel::hyper_alpha: {
      const double alpha = std::exp(p[2]);
      const double floor = std::exp(p[0]), rest = std::exp(p[1] - alpha * log_batch);
      slope[0] = floor / (floor + rest);
      slope[1] = rest / (floor + rest);
      slope[2] = -slope[1] * alpha * log_batch;
      return std::log(floor + rest);
    }
    case StepsModel::three_term_inv: {
      const double beta = std::exp(p[2]), gamma = std::exp(p[3]);
      const double u = 1 / (1 + std::exp(-p[1])), not_u = 1 / (1 + std::exp(p[1]));
      const double octave = log_batch - log_least;
      const double t = std::exp(-beta * octave);
      const double left = not_u - u * std::expm1(-beta * octave);  // 1 − u·t
      slope[0] = 1;
      slope[1] = t * u * not_u / left / gamma;
      slope[2] = -u * t * beta * octave / left / gamma;
      slope[3] = std::log(left) / gamma;
      return p[0] - std::log(left) / gamma;
    }
  }
  return 0;
}

/// From the search's parameters to those of the fit.
std::vector<double> public_parameters(StepsModel model, std::span<const double> p,
                                      double log_least) {
  std::vector<double> out;
  for (const double x : p) out.push_back(std::exp(x));
  if (model == StepsModel::three_term_inv) {
    out[1] = std::exp(out[2] * log_least) / (1 + std::exp(-p[1]));
  }
  return out;
}

struct StepsData {
  std::vector<double> log_batch, log_steps;
  double log_least;
  std::vector<double> above_batch, above_steps;  ///< logarithms of what is censored
};

double least_batch(const StepsData& data) {
  double least = *std::min_element(data.log_batch.begin(), data.log_batch.end());
  for (const double batch : data.above_batch) least = std::min(least, batch);
  return least;
}

StepsData steps_data(StepsModel model, std::span<const double> batches,
                     std::span<const double> steps, std::span<const StepsAbove> censored) {
  expects(batches.size() == steps.size(), "as many batches as steps");
  expects(batches.size() >= parameter_count(model), "fewer points than the model has parameters");
  StepsData data{logs_of(batches, "batches are finite and positive"),
                 logs_of(steps, "steps are finite and positive"),
                 0,
                 {},
                 {}};
  for (const StepsAbove& above : censored) {
    data.above_batch.push_back(log_of(above.batch, "batches are finite and positive"));
    data.above_steps.push_back(log_of(above.steps, "steps are finite and positive"));
  }
  data.log_least = least_batch(data);
  return data;
}

SearchOptions steps_bounds(StepsModel model) {
  SearchOptions options;
  options.lower.assign(parameter_count(model), -60.0);
  options.upper.assign(parameter_count(model), 200.0);
  if (model != StepsModel::hyper) {
    // Exponents below 1/50 or above 20 are other models in disguise.
    for (std::size_t j = 2; j < parameter_count(model); ++j) {
      options.lower[j] = std::log(0.02);
      options.upper[j] = std::log(20.0);
    }
  }
  if (model == StepsModel::three_term_inv) {
    options.lower[1] = -30;
    options.upper[1] = 30;
  }
  return options;
}

Minimum search_steps(StepsModel model, const StepsData& data, std::span<const double> start) {
  const std::size_t k = parameter_count(model);
  const Residuals residuals = [&](std::span<const double> p, std::span<double> r,
                                  std::span<double> jacobian) {
    for (std::size_t i = 0; i < r.size(); ++i) {
      r[i] = log_steps(model, p, data.log_batch[i], data.log_least, jacobian.data() + i * k) -
             data.log_steps[i];
    }
  };
  return least_squares(residuals, data.log_batch.size(), start, steps_bounds(model));
}

Minimum search_steps(StepsModel model, const StepsData& data) {
  const auto least_at = std::min_element(data.log_batch.begin(), data.log_batch.end());
  const double at_least =
      data.log_steps[static_cast<std::size_t>(least_at - data.log_batch.begin())];
  const double floor =
      std::log(0.9) + *std::min_element(data.log_steps.begin(), data.log_steps.end());
  const std::array<double, 2> plain{floor, at_least + data.log_least};
  Minimum hyper = search_steps(StepsModel::hyper, data, plain);
  if (model == StepsModel::hyper) return hyper;

  Minimum best{{}, infinity};
  Random random(0x57a7);
  for (int attempt = 0; attempt < 20; ++attempt) {
    std::vector<double> start;
    // Exponents between 1/5 and 3; the first start is the hyperbola, or Form A of it.
    const auto exponent = [&] {
      return attempt == 0 ? 0 : std::log(0.2) + std::log(15.0) * random.uniform();
    };
    if (model == StepsModel::hyper_alpha) {
      const double e = exponent();
      start = {hyper.parameters[0], at_least + std::exp(e) * data.log_least, e};
    } else {
      start = {hyper.parameters[0], attempt == 0 ? 0 : 6 * random.uniform() - 2, exponent(),
               exponent()};
    }
    Minimum found = search_steps(model, data, start);
    if (found.cost < best.cost) best = std::move(found);
  }
  expects<NumericError>(!best.parameters.empty(), "no start of the fit has finite residuals");
  return best;
}

// ---- steps that are known to be more ----

double log_normal_share(double z) { return std::log(std::erfc(-z / std::sqrt(2.0)) / 2); }  // ln Φ

/// φ(z)/(1 − Φ(z)): how far above its mean a standard normal lies on average, if it is above z.
double mean_above(double z) {
  if (z > 30) return z + 1 / z;  // 1 − Φ underflows
  return std::exp(-z * z / 2) / std::sqrt(2 * M_PI) / (std::erfc(z / std::sqrt(2.0)) / 2);
}

struct CensoredMinimum {
  Minimum minimum;
  double variance = 0;  ///< σ², of the likelihood
};

/// Expectation and maximization from `start`.
CensoredMinimum search_censored(StepsModel model, const StepsData& data,
                                std::span<const double> start) {
  const std::size_t known = data.log_batch.size(), hidden = data.above_batch.size();
  const auto residual = [&](std::span<const double> p, double batch, double steps) {
    std::array<double, 4> unused{};
    return steps - log_steps(model, p, batch, data.log_least, unused.data());
  };
  StepsData whole = data;
  whole.log_batch.insert(whole.log_batch.end(), data.above_batch.begin(), data.above_batch.end());
  whole.log_steps.resize(known + hidden);
  CensoredMinimum found{{{start.begin(), start.end()}, infinity}, 0};
  for (std::size_t i = 0; i < known; ++i) {
    const double r = residual(start, data.log_batch[i], data.log_steps[i]);
    found.variance += r * r / static_cast<double>(known);
  }
  constexpr double least = 1e-10;  // a perfect fit has no σ
  for (int round = 0; round < 400; ++round) {
    const double sigma = std::sqrt(std::max(found.variance, least));
    double spread = 0;
    for (std::size_t j = 0; j < hidden; ++j) {
      const double below =
          residual(found.minimum.parameters, data.above_batch[j], data.above_steps[j]);
      const double z = below / sigma, h = mean_above(z);
      whole.log_steps[known + j] = data.above_steps[j] - below + sigma * h;
      spread += sigma * sigma * std::max(0.0, 1 + z * h - h * h);
    }
    const std::vector<double> before = found.minimum.parameters;
    found.minimum = search_steps(model, whole, before);
    found.variance = (found.minimum.cost + spread) / static_cast<double>(known + hidden);
    double moved = 0;
    for (std::size_t k = 0; k < before.size(); ++k) {
      moved = std::max(moved, std::abs(found.minimum.parameters[k] - before[k]));
    }
    if (moved < 1e-6) break;
  }
  return found;
}

/// −2·ln L, but for a constant that is n·ln 2π.
double deviance(StepsModel model, const StepsData& data, const CensoredMinimum& found) {
  const double variance = std::max(found.variance, 1e-10), sigma = std::sqrt(variance);
  std::array<double, 4> unused{};
  const auto at = [&](double batch) {
    return log_steps(model, found.minimum.parameters, batch, data.log_least, unused.data());
  };
  double sum = static_cast<double>(data.log_batch.size()) * (std::log(variance) - 1);
  for (std::size_t i = 0; i < data.log_batch.size(); ++i) {
    const double r = data.log_steps[i] - at(data.log_batch[i]);
    sum += r * r / variance;
  }
  for (std::size_t j = 0; j < data.above_batch.size(); ++j) {
    sum -= 2 * log_normal_share((at(data.above_batch[j]) - data.above_steps[j]) / sigma);
  }
  return sum;
}

/// What a fit says of itself, but for left_out_rms.
StepsFit describe(StepsModel model, const StepsData& data, const Minimum& found) {
  StepsFit fit;
  fit.model = model;
  fit.parameters = public_parameters(model, found.parameters, data.log_least);
  std::array<double, 4> unused{};
  for (std::size_t i = 0; i < data.log_batch.size(); ++i) {
    fit.log_residuals.push_back(data.log_steps[i] - log_steps(model, found.parameters,
                                                              data.log_batch[i], data.log_least,
                                                              unused.data()));
  }
  const double square = mean_square(fit.log_residuals);
  fit.rms_log = std::sqrt(square);
  fit.aicc = akaike(square, data.log_batch.size(), parameter_count(model) + 1);
  return fit;
}

/// From `start`, with what is censored.
StepsFit described_search(StepsModel model, const StepsData& data, std::span<const double> start,
                          Minimum* minimum = nullptr) {
  if (data.above_batch.empty()) {
    Minimum found = search_steps(model, data, start);
    StepsFit fit = describe(model, data, found);
    if (minimum != nullptr) *minimum = std::move(found);
    return fit;
  }
  CensoredMinimum found = search_censored(model, data, start);
  StepsFit fit = describe(model, data, found.minimum);
  const auto n = static_cast<double>(data.log_batch.size());
  if (std::isfinite(fit.aicc)) {
    fit.aicc +=
        deviance(model, data, found) - n * std::log(std::max(fit.rms_log * fit.rms_log, 1e-30));
  }
  if (minimum != nullptr) *minimum = std::move(found.minimum);
  return fit;
}

/// t of the quadratic term in a regression of the residuals on 1, ln B, (ln B)².
double curvature_of(std::span<const double> x, std::span<const double> r) {
  const std::size_t n = x.size();
  if (n < 5) return 0;
  std::vector<double> squares;
  for (const double v : x) squares.push_back(v * v);
  // (ln B)² without its own line; then its slope against the residuals without theirs.
  const Line of_squares = straight_line(x, squares, {}), of_residuals = straight_line(x, r, {});
  std::vector<double> bend, rest;
  for (std::size_t i = 0; i < n; ++i) {
    bend.push_back(squares[i] - of_squares.intercept - of_squares.slope * x[i]);
    rest.push_back(r[i] - of_residuals.intercept - of_residuals.slope * x[i]);
  }
  const double bb = std::inner_product(bend.begin(), bend.end(), bend.begin(), 0.0);
  const double br = std::inner_product(bend.begin(), bend.end(), rest.begin(), 0.0);
  const double rr = std::inner_product(rest.begin(), rest.end(), rest.begin(), 0.0);
  const double left = std::max(rr - br * br / bb, 1e-300) / static_cast<double>(n - 3);
  return br / bb / std::sqrt(left / bb);
}

/// The search's parameters of a fit: where a refit to like data starts.
std::vector<double> search_parameters(const StepsFit& fit, double log_least) {
  std::vector<double> p;
  for (const double x : fit.parameters) p.push_back(std::log(x));
  if (fit.model == StepsModel::three_term_inv) {
    const double u =
        std::min(fit.parameters[1] * std::exp(-fit.parameters[2] * log_least), 1 - 1e-12);
    p[1] = std::log(u / (1 - u));
  }
  return p;
}

}  // namespace

std::string_view name_of(StepsModel model) noexcept {
  switch (model) {
    case StepsModel::hyper:
      return "hyper";
    case StepsModel::hyper_alpha:
      return "hyper_alpha";
    case StepsModel::three_term_inv:
      return "three_term_inv";
  }
  return "?";
}

std::string_view name_of(CbsDefinition definition) noexcept {
  switch (definition) {
    case CbsDefinition::mccandlish:
      return "mccandlish";
    case CbsDefinition::overhead:
      return "overhead";
    case CbsDefinition::token_optimal:
      return "token_optimal";
  }
  return "?";
}

double StepsFit::steps(double batch) const {
  switch (model) {
    case StepsModel::hyper:
      return parameters[0] + parameters[1] / batch;
    case StepsModel::hyper_alpha:
      return parameters[0] + parameters[1] / std::pow(batch, parameters[2]);
    case StepsModel::three_term_inv: {
      const double left = 1 - parameters[1] * std::pow(batch, -parameters[2]);
      return left > 0 ? parameters[0] * std::pow(left, -1 / parameters[3]) : infinity;
    }
  }
  return infinity;
}

bool StepsFit::structured() const noexcept { return std::abs(trend) > 2.5; }

StepsFit fit_steps(StepsModel model, std::span<const double> batches, std::span<const double> steps,
                   std::span<const StepsAbove> censored) {
  const StepsData data = steps_data(model, batches, steps, censored);
  Minimum found = search_steps(model, data);
  StepsFit fit = described_search(model, data, found.parameters, &found);
  fit.trend = curvature_of(data.log_batch, fit.log_residuals);
  const std::size_t n = data.log_batch.size();
  if (n > parameter_count(model)) {
    double squares = 0;
    std::array<double, 4> unused{};
    for (std::size_t out = 0; out < n; ++out) {
      StepsData others = data;
      others.log_batch.erase(others.log_batch.begin() + static_cast<std::ptrdiff_t>(out));
      others.log_steps.erase(others.log_steps.begin() + static_cast<std::ptrdiff_t>(out));
      Minimum without;
      described_search(model, others, found.parameters, &without);
      const double error =
          data.log_steps[out] -
          log_steps(model, without.parameters, data.log_batch[out], data.log_least, unused.data());
      squares += error * error;
    }
    fit.left_out_rms = std::sqrt(squares / static_cast<double>(n));
  }
  return fit;
}

StepsFit select_steps(std::span<const double> batches, std::span<const double> steps,
                      std::span<const StepsAbove> censored) {
  StepsFit best = fit_steps(StepsModel::hyper, batches, steps, censored);
  for (const StepsModel model : {StepsModel::hyper_alpha, StepsModel::three_term_inv}) {
    if (batches.size() <= parameter_count(model) + 2) continue;  // its AICc is infinite
    StepsFit fit = fit_steps(model, batches, steps, censored);
    if (fit.aicc < best.aicc) best = std::move(fit);
  }
  return best;
}

StepsFit refit_steps(const StepsFit& fit, std::span<const double> batches,
                     std::span<const double> steps, std::span<const StepsAbove> censored) {
  const StepsData data = steps_data(fit.model, batches, steps, censored);
  return described_search(fit.model, data, search_parameters(fit, data.log_least));
}

CbsEstimate critical_batch(const StepsFit& fit, CbsDefinition definition, double reference_batch,
                           double overhead) {
  CbsEstimate estimate;
  estimate.definition = definition;
  const std::vector<double>& p = fit.parameters;
  if (definition == CbsDefinition::token_optimal) {
    expects<ConfigError>(fit.model == StepsModel::three_term_inv,
                         "token_optimal needs the three_term_inv model: no other has an optimum");
    estimate.value = std::pow(p[1] * (1 + p[2] / p[3]), 1 / p[2]);
  } else {
    expects<ConfigError>(fit.model == StepsModel::hyper,
                         "mccandlish and overhead are defined on the hyper model");
    const double ratio = p[1] / p[0];
    estimate.value = definition == CbsDefinition::mccandlish
                         ? ratio
                         : (1 + overhead) * reference_batch + overhead * ratio;
  }
  return estimate;
}

Interval percentile_interval(std::vector<double> values, double level) {
  expects(!values.empty(), "an interval needs values");
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    const double place = share * static_cast<double>(values.size() - 1);
    const auto i = static_cast<std::size_t>(place);
    const std::size_t j = std::min(i + 1, values.size() - 1);
    const double rest = place - static_cast<double>(i);
    // Infinite statistics (no optimum in a resample) may stand at the end.
    return rest == 0 ? values[i] : values[i] + rest * (values[j] - values[i]);
  };
  return {at((1 - level) / 2), at((1 + level) / 2)};
}

Interval residual_interval(const StepsFit& fit, std::span<const double> batches,
                           const std::function<double(const StepsFit&)>& statistic,
                           const Bootstrap& options, std::span<const StepsAbove> censored) {
  const std::size_t n = fit.log_residuals.size(), k = fit.parameters.size();
  expects(batches.size() == n, "as many batches as the fit had");
  expects(n > k, "residuals need more points than parameters");
  expects<ConfigError>(options.resamples > 0, "resamples is positive");
  const std::vector<double> ones(n, 1.0);
  const StepsData measured = steps_data(fit.model, batches, ones, censored);
  const double scale = std::sqrt(static_cast<double>(n) / static_cast<double>(n - k));
  const std::vector<double> start = search_parameters(fit, measured.log_least);
  std::vector<double> values;
  Random random(options.seed, 1);
  const auto drawn = [&](double batch) {
    return std::log(fit.steps(batch)) + scale * fit.log_residuals[random.below(n)];
  };
  for (int i = 0; i < options.resamples; ++i) {
    StepsData data{measured.log_batch, {}, measured.log_least, {}, {}};
    for (std::size_t j = 0; j < n; ++j) data.log_steps.push_back(drawn(batches[j]));
    for (std::size_t j = 0; j < censored.size(); ++j) {
      const double value = drawn(censored[j].batch);
      const bool hidden = !(value <= measured.above_steps[j]);
      (hidden ? data.above_batch : data.log_batch).push_back(measured.above_batch[j]);
      (hidden ? data.above_steps : data.log_steps)
          .push_back(hidden ? measured.above_steps[j] : value);
    }
    values.push_back(statistic(described_search(fit.model, data, start)));
  }
  return percentile_interval(std::move(values), options.level);
}

Interval stratified_interval(StepsModel model, std::span<const double> batches,
                             std::span<const std::vector<double>> steps,
                             const std::function<double(const StepsFit&)>& statistic,
                             const Bootstrap& options) {
  expects(batches.size() == steps.size(), "as many batches as lists of steps");
  expects(batches.size() >= parameter_count(model), "fewer points than the model has parameters");
  expects<ConfigError>(options.resamples > 0, "resamples is positive");
  StepsData data{logs_of(batches, "batches are finite and positive"), {}, 0, {}, {}};
  data.log_least = *std::min_element(data.log_batch.begin(), data.log_batch.end());
  std::vector<std::vector<double>> log_seeds;
  for (const std::vector<double>& seeds : steps) {
    expects(seeds.size() >= 2, "a stratified interval needs two seeds for every batch");
    log_seeds.push_back(logs_of(seeds, "steps are finite and positive"));
    data.log_steps.push_back(
        std::accumulate(log_seeds.back().begin(), log_seeds.back().end(), 0.0) /
        static_cast<double>(seeds.size()));
  }
  const std::vector<double> means = data.log_steps;
  const std::vector<double> start = search_steps(model, data).parameters;
  std::vector<double> values;
  Random random(options.seed, 2);
  for (int i = 0; i < options.resamples; ++i) {
    for (std::size_t j = 0; j < means.size(); ++j) {
      const std::size_t m = log_seeds[j].size();
      double sum = 0;
      for (std::size_t s = 0; s < m; ++s) sum += log_seeds[j][random.below(m)];
      const auto count = static_cast<double>(m);
      data.log_steps[j] = means[j] + std::sqrt(count / (count - 1)) * (sum / count - means[j]);
    }
    values.push_back(statistic(described_search(model, data, start)));
  }
  return percentile_interval(std::move(values), options.level);
}

// ---- power laws, learning rates ----

double PowerLaw::operator()(double x) const { return factor * std::pow(x, exponent); }

PowerLaw fit_power(std::span<const double> x, std::span<const double> y,
                   std::span<const double> weights) {
  expects(x.size() == y.size() && (weights.empty() || weights.size() == x.size()),
          "as many ordinates and weights as abscissas");
  expects(x.size() >= 2, "a power law needs two points");
  const std::vector<double> lx = logs_of(x, "abscissas are finite and positive"),
                            ly = logs_of(y, "ordinates are finite and positive");
  for (const double w : weights) expects<NumericError>(w >= 0, "weights are not negative");
  const Line line = straight_line(lx, ly, weights);
  PowerLaw law;
  law.factor = std::exp(line.intercept);
  law.exponent = line.slope;
  law.exponent_error = line.slope_error;
  const double total = weights.empty() ? static_cast<double>(x.size())
                                       : std::accumulate(weights.begin(), weights.end(), 0.0);
  law.rms_log = std::sqrt(line.squares / total);
  law.aicc = akaike(line.squares / total, x.size(), 3);
  law.exponent_interval = {line.slope, line.slope};
  if (x.size() > 2) {
    const double reach =
        student_quantile(0.975, static_cast<double>(x.size() - 2)) * line.slope_error;
    law.exponent_interval = {line.slope - reach, line.slope + reach};
  }
  return law;
}

SaturatingPowerLaw fit_saturating_power(std::span<const double> x, std::span<const double> y) {
  expects(x.size() >= 5, "a saturating power law needs five points");
  const PowerLaw pure = fit_power(x, y);
  const std::vector<double> lx = logs_of(x, "abscissas are finite and positive"),
                            ly = logs_of(y, "ordinates are finite and positive");
  std::vector<double> sorted = lx;
  std::sort(sorted.begin(), sorted.end());
  const auto clipped = [&](double knee) {
    std::vector<double> out;
    for (const double v : lx) out.push_back(std::min(v, knee));
    return straight_line(out, ly, {});
  };
  // Between two points the cost is smooth in the knee, over all of them it need not be.
  double best = infinity, knee = sorted[1];
  for (std::size_t i = 1; i + 2 < sorted.size(); ++i) {
    if (!(sorted[i + 1] > sorted[i])) continue;
    const double at =
        golden_section([&](double v) { return clipped(v).squares; }, sorted[i], sorted[i + 1]);
    if (const double cost = clipped(at).squares; cost < best) {
      best = cost;
      knee = at;
    }
  }
  const Line line = clipped(knee);
  SaturatingPowerLaw law;
  law.knee = std::exp(knee);
  law.below.factor = std::exp(line.intercept);
  law.below.exponent = line.slope;
  law.below.exponent_error = line.slope_error;
  const auto n = static_cast<double>(x.size());
  const double reach = student_quantile(0.975, n - 3) * line.slope_error;
  law.below.exponent_interval = {line.slope - reach, line.slope + reach};
  law.below.rms_log = std::sqrt(line.squares / n);
  law.below.aicc = akaike(line.squares / n, x.size(), 4);
  law.preferred = law.below.aicc < pure.aicc;
  return law;
}

double SurgeLaw::operator()(double x) const {
  return 2 * peak / (std::sqrt(at / x) + std::sqrt(x / at));
}

SurgeLaw fit_surge(std::span<const double> x, std::span<const double> y) {
  expects(x.size() == y.size() && x.size() >= 3, "a surge needs three points");
  const std::vector<double> lx = logs_of(x, "abscissas are finite and positive"),
                            ly = logs_of(y, "ordinates are finite and positive");
  const auto n = static_cast<double>(x.size());
  // Of the top's place the height follows: the mean of what is left.
  const auto height = [&](double top) {
    double sum = 0;
    for (std::size_t i = 0; i < lx.size(); ++i)
      sum += ly[i] + std::log(std::cosh((lx[i] - top) / 2));
    return sum / n;
  };
  const auto squares = [&](double top) {
    const double h = height(top);
    double sum = 0;
    for (std::size_t i = 0; i < lx.size(); ++i) {
      const double off = ly[i] + std::log(std::cosh((lx[i] - top) / 2)) - h;
      sum += off * off;
    }
    return sum;
  };
  const double reach = std::log(1000.0);
  const double first = *std::min_element(lx.begin(), lx.end()) - reach,
               last = *std::max_element(lx.begin(), lx.end()) + reach;
  // The cost may have several valleys; a scan finds the deepest.
  constexpr int places = 400;
  const double apart = (last - first) / places;
  double best = first;
  for (int k = 0; k <= places; ++k) {
    if (squares(first + k * apart) < squares(best)) best = first + k * apart;
  }
  const double top = golden_section(squares, best - apart, best + apart);
  SurgeLaw law;
  law.at = std::exp(top);
  law.peak = std::exp(height(top));
  law.rms_log = std::sqrt(squares(top) / n);
  law.aicc = akaike(squares(top) / n, x.size(), 3);
  return law;
}

Tuned tuned_lr(std::span<const double> lrs, std::span<const double> values, double slack) {
  expects(lrs.size() == values.size(), "as many values as learning rates");
  expects(lrs.size() >= 3, "a tuning curve needs three learning rates");
  const std::vector<double> x = logs_of(lrs, "learning rates are finite and positive");
  expects(std::is_sorted(x.begin(), x.end()), "learning rates ascend");
  // Diverged runs (infinite, NaN) are no minimum and no neighbour.
  const auto finite = [&](std::size_t i) { return std::isfinite(values[i]); };
  std::size_t best = lrs.size();
  for (std::size_t i = 0; i < lrs.size(); ++i) {
    if (finite(i) && (best == lrs.size() || values[i] < values[best])) best = i;
  }
  expects<NumericError>(best < lrs.size(), "no learning rate has a finite value");
  Tuned tuned{lrs[best], values[best], 0, 0, best == 0 || best + 1 == lrs.size()};
  if (!tuned.edge && finite(best - 1) && finite(best + 1)) {
    // Five points where both sides have two; their parabola must be least between the neighbours.
    const bool wide = best >= 2 && best + 2 < lrs.size() && finite(best - 2) && finite(best + 2);
    for (const std::size_t reach :
         wide ? std::vector<std::size_t>{2, 1} : std::vector<std::size_t>{1}) {
      std::vector<std::array<double, 3>> rows;
      std::vector<double> y;
      for (std::size_t i = best - reach; i <= best + reach; ++i) {
        const double d = x[i] - x[best];
        rows.push_back({1, d, d * d});
        y.push_back(values[i]);
      }
      const std::array<double, 3> c = linear_squares<3>(rows, y);
      const double at = -c[1] / (2 * c[2]);
      if (c[2] > 0 && x[best] + at >= x[best - 1] && x[best] + at <= x[best + 1]) {
        tuned.lr = std::exp(x[best] + at);
        tuned.value = c[0] + c[1] * at / 2;
        tuned.curvature = 2 * c[2];
        break;
      }
    }
  }
  // The plateau ends where the curve between two points crosses the level.
  const double level = values[best] + slack * std::abs(values[best]);
  const auto crossing = [&](std::size_t in, std::size_t out) {
    if (!finite(out)) return x[in];
    return x[in] + (level - values[in]) / (values[out] - values[in]) * (x[out] - x[in]);
  };
  std::size_t left = best, right = best;
  while (left > 0 && finite(left - 1) && values[left - 1] <= level) --left;
  while (right + 1 < lrs.size() && finite(right + 1) && values[right + 1] <= level) ++right;
  const double lo = left > 0 ? crossing(left, left - 1) : x[left];
  const double hi = right + 1 < lrs.size() ? crossing(right, right + 1) : x[right];
  tuned.plateau_octaves = (hi - lo) / std::log(2.0);
  return tuned;
}

// ---- losses ----

double LossLaw::loss(const LossCell& cell) const {
  double sum = irreducible + batch_factor / std::pow(cell.batch, batch_exponent) +
               steps_factor / std::pow(cell.steps, steps_exponent);
  if (size_factor > 0) sum += size_factor / std::pow(cell.parameters, size_exponent);
  return sum;
}

double LossLaw::best_batch_exponent() const {
  return steps_exponent / (batch_exponent + steps_exponent);
}

double LossLaw::best_batch(double examples) const {
  return std::pow(batch_exponent * batch_factor / (steps_exponent * steps_factor),
                  1 / (batch_exponent + steps_exponent)) *
         std::pow(examples, best_batch_exponent());
}

LossLaw fit_loss(std::span<const LossCell> cells, double huber) {
  expects<ConfigError>(huber >= 0, "the Huber threshold is not negative");
  const bool sized = !cells.empty() && cells.front().parameters > 0;
  const std::size_t terms = sized ? 3 : 2, k = 1 + 2 * terms;
  expects(cells.size() >= k, "fewer cells than the law has parameters");
  const std::size_t n = cells.size();
  // Columns of logarithms: batch, steps, size.
  std::vector<std::array<double, 3>> x;
  std::vector<double> y;
  for (const LossCell& cell : cells) {
    expects<NumericError>(
        cell.batch > 0 && cell.steps > 0 && cell.loss > 0 && std::isfinite(cell.loss) &&
            (cell.parameters > 0) == sized,
        "batch, steps and loss are positive, and all cells have a size or none has");
    x.push_back(
        {std::log(cell.batch), std::log(cell.steps), sized ? std::log(cell.parameters) : 0});
    y.push_back(std::log(cell.loss));
  }
  // p = ln E, then ln factor and ln exponent of each term.
  const Residuals residuals = [&](std::span<const double> p, std::span<double> r,
                                  std::span<double> jacobian) {
    for (std::size_t i = 0; i < n; ++i) {
      double* row = jacobian.data() + i * k;
      row[0] = std::exp(p[0]);
      double sum = row[0];
      for (std::size_t t = 0; t < terms; ++t) {
        const double exponent = std::exp(p[2 + 2 * t]);
        const double term = std::exp(p[1 + 2 * t] - exponent * x[i][t]);
        row[1 + 2 * t] = term;
        row[2 + 2 * t] = -term * exponent * x[i][t];
        sum += term;
      }
      for (std::size_t j = 0; j < k; ++j) row[j] /= sum;
      r[i] = std::log(sum) - y[i];
    }
  };
  // With exponents given, E and the factors are linear: every pair (or triple) of a grid is a
  // start, and the best few are followed.
  constexpr std::array<double, 5> grid{0.15, 0.35, 0.6, 1.0, 1.6};
  std::vector<std::pair<double, std::vector<double>>> starts;
  std::vector<double> scratch_r(n), scratch_jacobian(n * k);
  for (const double first : grid) {
    for (const double second : grid) {
      for (const double third : grid) {
        if (!sized && third != grid.front()) continue;
        const std::array<double, 3> exponents{first, second, third};
        std::vector<std::array<double, 4>> rows;
        for (std::size_t i = 0; i < n; ++i) {
          std::array<double, 4> row{1, 0, 0, 0};
          for (std::size_t t = 0; t < terms; ++t) row[t + 1] = std::exp(-exponents[t] * x[i][t]);
          for (double& v : row) v /= cells[i].loss;
          rows.push_back(row);
        }
        const std::vector<double> ones(n, 1.0);
        const std::array<double, 4> linear = linear_squares<4>(rows, ones);
        const double least = std::exp(*std::min_element(y.begin(), y.end()));
        std::vector<double> p{std::log(std::clamp(linear[0], 0.05 * least, 0.99 * least))};
        for (std::size_t t = 0; t < terms; ++t) {
          p.push_back(std::log(std::max(linear[t + 1], 1e-3 * least)));
          p.push_back(std::log(exponents[t]));
        }
        residuals(p, scratch_r, scratch_jacobian);
        starts.emplace_back(mean_square(scratch_r), std::move(p));
      }
    }
  }
  std::sort(starts.begin(), starts.end());
  SearchOptions options;
  options.huber = huber;
  options.lower.assign(k, -40.0);
  options.upper.assign(k, 60.0);
  for (std::size_t t = 0; t < terms; ++t) {
    options.lower[2 + 2 * t] = std::log(0.02);
    options.upper[2 + 2 * t] = std::log(10.0);
  }
  Minimum best{{}, infinity};
  for (std::size_t s = 0; s < std::min<std::size_t>(3, starts.size()); ++s) {
    // Squares first: they lead from afar, where Huber's slope is all the same.
    SearchOptions plain = options;
    plain.huber = 0;
    Minimum found = least_squares(residuals, n, starts[s].second, plain);
    if (huber > 0) found = least_squares(residuals, n, found.parameters, options);
    if (found.cost < best.cost) best = std::move(found);
  }
  expects<NumericError>(!best.parameters.empty(), "no start of the fit has finite residuals");
  residuals(best.parameters, scratch_r, scratch_jacobian);
  const std::vector<double>& p = best.parameters;
  LossLaw law;
  law.irreducible = std::exp(p[0]);
  law.batch_factor = std::exp(p[1]);
  law.batch_exponent = std::exp(p[2]);
  law.steps_factor = std::exp(p[3]);
  law.steps_exponent = std::exp(p[4]);
  if (sized) {
    law.size_factor = std::exp(p[5]);
    law.size_exponent = std::exp(p[6]);
  }
  law.rms_log = std::sqrt(mean_square(scratch_r));
  return law;
}

// ---- messages, scaling ----

namespace {

/// α, β ≥ 0 with Σ((α·f + β·g·n)/T − 1)² least. @return the sum of squares beside them.
std::pair<MessageCost, double> message_piece(std::span<const double> bytes,
                                             std::span<const double> seconds,
                                             const CollectiveShape& shape) {
  std::vector<std::array<double, 2>> rows;
  const std::vector<double> ones(bytes.size(), 1.0);
  double af = 0, aff = 0, bf = 0, bff = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const double a = shape.latency_steps / seconds[i], b = shape.traffic * bytes[i] / seconds[i];
    rows.push_back({a, b});
    af += a;
    aff += a * a;
    bf += b;
    bff += b * b;
  }
  std::array<double, 2> x = linear_squares<2>(rows, ones);
  if (x[0] < 0) x = {0, bff > 0 ? bf / bff : 0};
  if (x[1] < 0) x = {aff > 0 ? af / aff : 0, 0};
  double squares = 0;
  for (const auto& row : rows) {
    const double r = row[0] * x[0] + row[1] * x[1] - 1;
    squares += r * r;
  }
  return {{x[0], x[1], bytes.front(), std::sqrt(squares / static_cast<double>(bytes.size()))},
          squares};
}

}  // namespace

double MessageFit::seconds(double bytes, const CollectiveShape& shape) const {
  const MessageCost& c = pieces.size() > 1 && bytes >= breakpoint_bytes ? pieces[1] : pieces[0];
  return c.latency_s * shape.latency_steps + c.s_per_byte * shape.traffic * bytes;
}

MessageFit fit_message(std::span<const double> bytes, std::span<const double> seconds,
                       const CollectiveShape& shape) {
  expects(bytes.size() == seconds.size(), "as many times as sizes");
  expects(bytes.size() >= 5, "a message fit needs five sizes");
  expects(std::is_sorted(bytes.begin(), bytes.end()), "sizes ascend");
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    expects<NumericError>(bytes[i] > 0 && seconds[i] > 0 && std::isfinite(seconds[i]),
                          "sizes and times are finite and positive");
  }
  const std::size_t n = bytes.size();
  const auto mean = [&](double squares) { return squares / static_cast<double>(n); };
  const auto [whole, squares] = message_piece(bytes, seconds, shape);
  MessageFit fit{{whole}, 0, akaike(mean(squares), n, 3)};
  constexpr std::size_t least = 4;
  for (std::size_t cut = least; cut + least <= n; ++cut) {
    const auto [below, first] = message_piece(bytes.first(cut), seconds.first(cut), shape);
    const auto [above, second] = message_piece(bytes.subspan(cut), seconds.subspan(cut), shape);
    const double aicc = akaike(mean(first + second), n, 6);
    if (aicc < fit.aicc) {
      // The threshold lies between two sizes: their geometric mean is off by half an octave at
      // most.
      fit = {{below, above}, std::sqrt(bytes[cut - 1] * bytes[cut]), aicc};
    }
  }
  return fit;
}

std::vector<Scaling> strong_scaling(std::span<const double> ranks,
                                    std::span<const double> seconds) {
  expects(ranks.size() == seconds.size() && !ranks.empty(), "as many times as rank counts");
  std::vector<Scaling> curve;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    expects<NumericError>(ranks[i] > 0 && seconds[i] > 0, "ranks and times are positive");
    const double times = ranks[i] / ranks[0], speedup = seconds[0] / seconds[i];
    curve.push_back({ranks[i], speedup, speedup / times,
                     times > 1 ? (1 / speedup - 1 / times) / (1 - 1 / times) : 0});
  }
  return curve;
}

double amdahl_fraction(std::span<const double> ranks, std::span<const double> seconds) {
  expects(ranks.size() == seconds.size() && ranks.size() >= 2, "two rank counts, a time for each");
  // T = a + b/p is a message of 1/p bytes.
  std::vector<double> shares;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    expects<NumericError>(ranks[i] > 0 && seconds[i] > 0, "ranks and times are positive");
    shares.push_back(1 / ranks[i]);
  }
  const MessageCost line = message_piece(shares, seconds, {}).first;
  return line.latency_s / (line.latency_s + line.s_per_byte);
}

}  // namespace orthrus::studies
