#include "optim/lmo.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <orthrus/error.hpp>
#include <sstream>
#include <string>

#include "kernels/backend.hpp"
#include "kernels/carve.hpp"
#include "kernels/device_memory.hpp"
#include "kernels/gram.hpp"
#include "kernels/rational_msign.hpp"
#include "optim/magnitude.hpp"
#include "optim/rule.hpp"

namespace orthrus::optim {
namespace {

using kernels::Backend;

/// Of Polar Express (arXiv:2505.16932), as released.
constexpr double cushion = 0.02407327424182761;

std::size_t no_workspace(const Lmo&, Index, Index) { return 0; }

/// A copy in f64.
class Wide {
 public:
  Wide(ConstMatrixView x, Backend& backend)
      : backend_(backend),
        buffer_(backend, static_cast<std::size_t>(x.size()) * sizeof(double)),
        view_(matrix_view(static_cast<double*>(buffer_.data()), x.rows, x.cols)) {
    backend.convert(x, 1, view_);
  }
  [[nodiscard]] MatrixView view() const { return view_; }
  [[nodiscard]] kernels::OnHost<const double> entries() const {
    return {backend_, static_cast<const double*>(view_.data),
            static_cast<std::size_t>(view_.size())};
  }

 private:
  Backend& backend_;
  kernels::DeviceBuffer buffer_;
  MatrixView view_;
};

double inner_product_norm(ConstMatrixView x, Backend& backend) {
  return std::sqrt(backend.sum_squares(x));
}

// ---- spectral ----------------------------------------------------------------------------------
/// @param wanted  lines of the long side; 0: all
void spectral_lines(const Lmo& self, MatrixView x, Index wanted, std::span<std::byte> work,
                    Backend& backend) {
  const kernels::RationalSign* rational = self.rational(std::min(x.rows, x.cols));
  if (rational == nullptr) {
    kernels::MsignOptions options = self.options();
    options.wanted = wanted;
    return kernels::msign(x, self.iterations(), self.safety(), options, work, backend);
  }
  kernels::rational_msign(x, *rational, {self.options().dtype, wanted}, work, backend);
}
void spectral_lmo(const Lmo& self, MatrixView x, std::span<std::byte> work, Backend& backend) {
  spectral_lines(self, x, 0, work, backend);
}

std::size_t spectral_workspace(const Lmo& self, Index rows, Index cols) {
  return self.rational(std::min(rows, cols)) != nullptr
             ? kernels::rational_msign_workspace_bytes(rows, cols, self.terms_at_once())
             : kernels::msign_workspace_bytes(rows, cols, DType::f32, self.options());
}

std::size_t spectral_root_bytes(Index rows, Index cols) {
  const Index m = std::min(rows, cols);
  return static_cast<std::size_t>(m * m) * sizeof(float);
}
MatrixView spectral_root(void* root, Index rows, Index cols) {
  const Index m = std::min(rows, cols);
  return matrix_view(static_cast<float*>(root), m, m);
}
/// What products outside the LMO are computed in: no better than it is.
DType product_dtype(const Lmo& self) {
  return self.options().dtype == DType::bf16 ? DType::bf16 : DType::f32;
}
std::size_t spectral_root_workspace(const Lmo& self, Index rows, Index cols) {
  const Index m = std::min(rows, cols);
  const DType dtype = product_dtype(self);
  const std::size_t whole = kernels::piece_bytes(rows, cols, dtype);
  const std::size_t lmo = spectral_workspace(self, rows, cols);
  const bool rational = self.rational(m) != nullptr;
  return std::max(rational ? lmo : whole + std::max(lmo, whole),
                  dtype == DType::bf16 ? whole + kernels::piece_bytes(m, m, dtype) : 0);
}
/// (XXᵀ)^½ = OXᵀ on the short side, O = lmo(X): as accurate as O.
void spectral_lmo_with_root(const Lmo& self, MatrixView x, std::span<std::byte> root,
                            std::span<std::byte> work, Backend& backend) {
  using kernels::Transpose;
  const MatrixView half = spectral_root(root.data(), x.rows, x.cols);
  if (const auto* f = self.rational(half.rows)) {
    kernels::rational_msign(x, *f, {self.options().dtype}, work, backend, half);
    return;
  }
  const DType dtype = product_dtype(self);
  const MatrixView before = kernels::carve(work, x.rows, x.cols, dtype);
  backend.convert(x, 1, before);
  spectral_lmo(self, x, work, backend);
  MatrixView after = x;
  if (dtype != DType::f32) {
    after = kernels::carve(work, x.rows, x.cols, dtype);
    backend.convert(x, 1, after);
  }
  if (x.rows <= x.cols) {
    backend.gemm(1, after, Transpose::no, before, Transpose::yes, 0, half);
  } else {
    backend.gemm(1, before, Transpose::yes, after, Transpose::no, 0, half);
  }
  backend.mirror_lower(half);  // symmetric but for rounding
}
void spectral_undo(const Lmo& self, std::span<std::byte> root, ConstMatrixView e, MatrixView c,
                   std::span<std::byte> work, Backend& backend) {
  using kernels::Transpose;
  ConstMatrixView half = spectral_root(root.data(), e.rows, e.cols);
  if (const DType dtype = product_dtype(self); dtype != DType::f32) {
    const auto narrow = [&](const ConstMatrixView& from) {
      const MatrixView to = kernels::carve(work, from.rows, from.cols, dtype);
      backend.convert(from, 1, to);
      return ConstMatrixView(to);
    };
    half = narrow(half);
    e = narrow(e);
  }
  if (e.rows <= e.cols) {
    backend.gemm(1, half, Transpose::no, e, Transpose::no, 0, c);
  } else {
    backend.gemm(1, e, Transpose::no, half, Transpose::no, 0, c);
  }
}

/// σ_max: with A = XXᵀ/‖X‖², ‖A‖₂ = lim tr(A^(2^j))^(2^-j); after 24 squarings the excess is below
/// ln(m)/2^24.
double spectral_norm(ConstMatrixView x, Backend& backend) {
  const Index m = std::min(x.rows, x.cols);
  const double scale = backend.abs_max(x);
  if (m == 0 || scale == 0) return 0;
  const Wide wide(x, backend);
  const MatrixView w = wide.view();
  backend.convert(w, 1 / scale, w);
  const kernels::DeviceBuffer a(backend, static_cast<std::size_t>(m * m) * sizeof(double));
  const kernels::DeviceBuffer b(backend, a.bytes());
  MatrixView p = matrix_view(static_cast<double*>(a.data()), m, m);
  MatrixView q = matrix_view(static_cast<double*>(b.data()), m, m);
  const auto transposed = x.rows <= x.cols ? kernels::Transpose::no : kernels::Transpose::yes;
  backend.syrk(1, w, transposed, 0, p);
  double log_norm = 0;  // of A, what the normalizations took out
  double weight = 1;
  for (int j = 0; j < 24; ++j) {
    const double t = backend.trace(p);
    log_norm += weight * std::log(t);
    weight /= 2;
    backend.convert(p, 1 / t, p);
    backend.syrk(1, p, kernels::Transpose::no, 0, q);
    std::swap(p, q);
  }
  log_norm += weight * std::log(backend.trace(p));
  return scale * std::exp(log_norm / 2);
}

/// Σσ = ⟨X, msign(X)⟩, with the polar factor converged in f64 for σ ≥ 1e-8·‖X‖_F.
double nuclear_norm(ConstMatrixView x, Backend& backend) {
  if (x.size() == 0 || backend.abs_max(x) == 0) return 0;
  const Wide original(x, backend);
  const Wide polar(x, backend);
  static const std::vector<kernels::Quintic> converged =
      kernels::optimal_composition(1e-8, kernels::iterations_for(1e-8, 1e-12), cushion);
  const kernels::MsignOptions options{DType::f64, kernels::EpsMode::none, 0};
  const kernels::DeviceBuffer work(
      backend, kernels::msign_workspace_bytes(x.rows, x.cols, DType::f64, options));
  kernels::msign(polar.view(), converged, 1 + 1e-12, options, work.span(), backend);
  auto a = polar.entries();
  auto b = original.entries();
  return std::inner_product(a.span().begin(), a.span().end(), b.span().begin(), 0.0);
}

// ---- frobenius ---------------------------------------------------------------------------------
void frobenius_lmo(const Lmo&, MatrixView x, std::span<std::byte>, Backend& backend) {
  // Always by way of a power of two, so that no square under- or overflows; 0 stays 0.
  static_cast<void>(backend.normalize(x, {}, 0, x));
}
std::size_t one_number(Index, Index) { return sizeof(double); }
void frobenius_lmo_with_root(const Lmo& self, MatrixView x, std::span<std::byte> root,
                             std::span<std::byte> work, Backend& backend) {
  kernels::OnHost<double> norm(backend, reinterpret_cast<double*>(root.data()), 1, /*fetch=*/false);
  norm.data()[0] = std::sqrt(backend.sum_squares(x));
  norm.put_back();
  frobenius_lmo(self, x, work, backend);
}
void frobenius_undo(const Lmo&, std::span<std::byte> root, ConstMatrixView e, MatrixView c,
                    std::span<std::byte>, Backend& backend) {
  kernels::OnHost<const double> norm(backend, reinterpret_cast<const double*>(root.data()), 1);
  backend.convert(e, norm.data()[0], c);
}

// ---- sign: the largest entry
// ---------------------------------------------------------------------
void sign_lmo(const Lmo&, MatrixView x, std::span<std::byte>, Backend& backend) {
  backend.sign(x, x);
}
std::size_t all_entries(Index rows, Index cols) {
  return static_cast<std::size_t>(rows * cols) * sizeof(float);
}
void sign_lmo_with_root(const Lmo&, MatrixView x, std::span<std::byte> root, std::span<std::byte>,
                        Backend& backend) {
  backend.convert(x, 1, matrix_view(reinterpret_cast<float*>(root.data()), x.rows, x.cols));
  backend.sign(x, x);
}
std::size_t one_row(const Lmo&, Index, Index cols) {
  return static_cast<std::size_t>(cols) * sizeof(double);
}
void sign_undo(const Lmo&, std::span<std::byte> root, ConstMatrixView e, MatrixView c,
               std::span<std::byte> work, Backend& backend) {
  backend.convert(e, 1, c);
  for (Index i = 0; i < e.rows; ++i) {
    multiply_by_magnitude(
        matrix_view(reinterpret_cast<float*>(root.data()) + i * e.cols, 1, e.cols),
        {static_cast<float*>(c.data) + i * c.ld, 1, c.cols, c.ld, c.dtype},
        reinterpret_cast<double*>(work.data()), backend);
  }
}
double largest_entry(ConstMatrixView x, Backend& backend) { return backend.abs_max(x); }
double sum_of_entries(ConstMatrixView x, Backend& backend) {
  const Wide wide(x, backend);
  auto entries = wide.entries();
  double sum = 0;
  for (const double e : entries.span()) sum += std::abs(e);
  return sum;
}

// ---- row, column: the largest line
// -----------------------------------------------------------------
/// One number per row (rows×1) or column (1×cols) of x.
MatrixView lines_view(double* data, ConstMatrixView x, bool of_columns) {
  return of_columns ? matrix_view(data, 1, x.cols) : matrix_view(data, x.rows, 1);
}
template <bool of_columns>
std::vector<double> line_norms(ConstMatrixView x, Backend& backend) {
  const auto lines = static_cast<std::size_t>(of_columns ? x.cols : x.rows);
  const kernels::DeviceBuffer buffer(backend, lines * sizeof(double));
  auto* const sums = static_cast<double*>(buffer.data());
  backend.line_sum_squares(x, of_columns, lines_view(sums, x, of_columns));
  kernels::OnHost<const double> on_host(backend, sums, lines);
  std::vector<double> s(on_host.span().begin(), on_host.span().end());
  for (double& v : s) v = std::sqrt(v);
  return s;
}
template <bool of_columns>
double largest_line(ConstMatrixView x, Backend& backend) {
  const auto s = line_norms<of_columns>(x, backend);
  return s.empty() ? 0 : *std::max_element(s.begin(), s.end());
}
template <bool of_columns>
double sum_of_lines(ConstMatrixView x, Backend& backend) {
  double sum = 0;
  for (const double v : line_norms<of_columns>(x, backend)) sum += v;
  return sum;
}
template <bool of_columns>
std::size_t line_workspace(const Lmo&, Index rows, Index cols) {
  return static_cast<std::size_t>(of_columns ? cols : rows) * sizeof(double);
}
/// Each line divided by its l2 norm (sums in f64: no f32 square leaves its range); zero lines stay
/// zero.
template <bool of_columns>
void line_lmo(const Lmo&, MatrixView x, std::span<std::byte> work, Backend& backend) {
  const Index lines = of_columns ? x.cols : x.rows;
  expects(work.size() >= static_cast<std::size_t>(lines) * sizeof(double), "work is too small");
  const MatrixView view = lines_view(reinterpret_cast<double*>(work.data()), x, of_columns);
  backend.line_sum_squares(x, of_columns, view);
  backend.inverse_roots(view);
  backend.scale_lines(view, of_columns, x);
}

template <bool of_columns>
std::size_t line_root_bytes(Index rows, Index cols) {
  return static_cast<std::size_t>(of_columns ? cols : rows) * sizeof(double);
}
template <bool of_columns>
void line_lmo_with_root(const Lmo& self, MatrixView x, std::span<std::byte> root,
                        std::span<std::byte> work, Backend& backend) {
  auto* s = reinterpret_cast<double*>(root.data());
  backend.line_sum_squares(x, of_columns, lines_view(s, x, of_columns));
  kernels::OnHost<double> norms(backend, s, root.size() / sizeof(double));
  for (double& v : norms.span()) v = std::sqrt(v);
  norms.put_back();
  line_lmo<of_columns>(self, x, work, backend);
}
template <bool of_columns>
void line_undo(const Lmo&, std::span<std::byte> root, ConstMatrixView e, MatrixView c,
               std::span<std::byte>, Backend& backend) {
  backend.convert(e, 1, c);
  auto* s = reinterpret_cast<double*>(root.data());
  backend.scale_lines(lines_view(s, e, of_columns), of_columns, c);
}

// ---- the tables --------------------------------------------------------------------------------
constexpr std::array<NormRow, 5> kNorms{{
    {"spectral", "largest singular value; dual: nuclear; lmo: msign(X) = UV^T (Muon)", spectral_lmo,
     spectral_workspace, spectral_norm, nuclear_norm, true, spectral_root_bytes,
     spectral_lmo_with_root, spectral_undo, spectral_root_workspace},
    {"frobenius", "root of the sum of squares; its own dual; lmo: X/|X| (normalized SGD)",
     frobenius_lmo, no_workspace, inner_product_norm, inner_product_norm, false, one_number,
     frobenius_lmo_with_root, frobenius_undo, no_workspace},
    {"sign", "largest entry; dual: sum of entries; lmo: sign(X) (SignSGD)", sign_lmo, no_workspace,
     largest_entry, sum_of_entries, false, all_entries, sign_lmo_with_root, sign_undo, one_row},
    {"row", "largest row (2 to inf); dual: sum of row norms; lmo: rows of length 1",
     line_lmo<false>, line_workspace<false>, largest_line<false>, sum_of_lines<false>, false,
     line_root_bytes<false>, line_lmo_with_root<false>, line_undo<false>, line_workspace<false>},
    {"column", "largest column (1 to 2); dual: sum of column norms; lmo: columns of length 1",
     line_lmo<true>, line_workspace<true>, largest_line<true>, sum_of_lines<true>, false,
     line_root_bytes<true>, line_lmo_with_root<true>, line_undo<true>, line_workspace<true>},
}};

struct ScaleRow {
  std::string_view name;
  double (*factor)(double rows, double cols);
};
constexpr std::array<ScaleRow, 5> kScales{{
    {"original", [](double a, double b) { return std::sqrt(std::max(1.0, a / b)); }},
    {"match_rms_adamw", [](double a, double b) { return 0.2 * std::sqrt(std::max(a, b)); }},
    {"rms_to_rms", [](double a, double b) { return std::sqrt(a / b); }},
    {"rms_to_rms_max", [](double a, double b) { return std::max(1.0, std::sqrt(a / b)); }},
    {"spectral", [](double, double) { return 1.0; }},
}};

template <class Rows>
const auto& row_named(const Rows& rows, std::string_view what, std::string_view name) {
  std::string known;
  for (const auto& row : rows) {
    if (row.name == name) return row;
    known += (known.empty() ? "" : ", ") + std::string(row.name);
  }
  throw ConfigError("'" + std::string(name) + "' is not a " + std::string(what) +
                    "; known: " + known);
}

kernels::EpsMode eps_mode_named(std::string_view name) {
  if (name == "none") return kernels::EpsMode::none;
  if (name == "add") return kernels::EpsMode::add;
  if (name == "clamp") return kernels::EpsMode::clamp;
  throw ConfigError("'" + std::string(name) + "' is not an eps_mode; known: none, add, clamp");
}

/// The rational function of so many terms: more of them reach smaller singular values, and leave
/// less (.10, .042 and .019).
kernels::RationalSign rational_of(const LmoConfig& config, DType dtype) {
  constexpr std::array<double, 3> lower{5e-3, 2e-3, 1e-3};
  expects<ConfigError>(config.terms >= 2 && config.terms <= 4, "lmo.terms must be 2, 3 or 4");
  expects<ConfigError>(config.eps_mode == "none",
                       "lmo.coefficients rational divides by no norm: lmo.eps_mode none");
  // In bf16 R is known to 9e-7 of its norm, and the smallest pole of four terms is 1.1e-6.
  expects<ConfigError>(dtype == DType::f32 || config.terms <= 3, "lmo.terms 4 needs lmo.dtype f32");
  return kernels::rational_sign(lower[static_cast<std::size_t>(config.terms - 2)], config.terms);
}

// What `auto` resolves to. Measured on one core, square and 1 × 4 (bench_rational): below these
// sides five products with X beat the inverses.
constexpr Index rational_from_f32 = 96;
constexpr Index rational_from_bf16 = 192;

/// The safety factor of Polar Express, which with its cushion keeps rounding in bf16 from leaving
/// the intervals.
constexpr double auto_safety = 1.01;

/// What rounding in bf16 leaves of singular values that f32 brings within .001 of 1: up to .009
/// (`orthrus bench accuracy`, polar_express with 8 iterations).
constexpr double least_tolerance_bf16 = 1e-2;

/// max |p(x/safety) − 1| for x in [l, 1], on a grid so fine that p turns between no two points.
double error_of(std::span<const kernels::Quintic> iterations, double l) {
  constexpr int points = 4000;
  double worst = 0;
  for (int i = 0; i <= points; ++i) {
    double x = std::pow(l, 1 - static_cast<double>(i) / points) / auto_safety;
    for (const kernels::Quintic& p : iterations) x = p(x);
    worst = std::max(worst, std::abs(x - 1));
  }
  return worst;
}

/// The fewest iterations that hold `lower` and `tolerance`.
std::vector<kernels::Quintic> iterations_for(double lower, double tolerance) {
  for (int count = kernels::iterations_for(lower, tolerance); count <= 12; ++count) {
    std::vector<kernels::Quintic> found =
        kernels::optimal_composition(lower, count, cushion, auto_safety);
    if (error_of(found, lower) <= tolerance) return found;
  }
  throw ConfigError("no 12 iterations hold lmo.lower " + std::to_string(lower) +
                    " within lmo.tolerance " + std::to_string(tolerance));
}

/// The fewest terms that hold `lower` and `tolerance`; none where f32 (or R in bf16) cannot.
std::optional<kernels::RationalSign> rational_for(double lower, double tolerance, DType dtype) {
  if (lower < (dtype == DType::f32 ? 1e-3 : 2e-3)) return std::nullopt;  // the smallest pole
  for (int terms = 2; terms <= 4; ++terms) {
    kernels::RationalSign f = kernels::rational_sign(lower, terms);
    if (f.error <= tolerance) return f;
  }
  return std::nullopt;
}

}  // namespace

std::span<const NormRow> norms() { return kNorms; }

std::vector<std::string_view> norm_names() {
  std::vector<std::string_view> names;
  for (const NormRow& row : kNorms) names.push_back(row.name);
  return names;
}

std::vector<std::string_view> scale_names() {
  std::vector<std::string_view> names;
  for (const ScaleRow& row : kScales) names.push_back(row.name);
  return names;
}

Lmo::Lmo(const LmoConfig& config, const LmoSite& site)
    : row_(&row_named(kNorms, "norm", config.norm)),
      scale_(row_named(kScales, "scale", config.scale).factor) {
  const auto dtype = dtype_named(config.dtype);
  expects<ConfigError>(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f64,
                       "lmo.dtype must be f32 or bf16");
  options_ = {*dtype, eps_mode_named(config.eps_mode), config.eps, site.on_host};
  name_ = config.coefficients;
  if (config.coefficients == "auto") {
    expects<ConfigError>(config.lower > 0 && config.lower < 1, "lmo.lower must be between 0 and 1");
    expects<ConfigError>(config.tolerance > 0 && config.tolerance < 1,
                         "lmo.tolerance must be between 0 and 1");
    if (*dtype == DType::bf16 && config.tolerance < least_tolerance_bf16) {
      std::ostringstream problem;
      problem << "lmo.tolerance: " << config.tolerance
              << " is less than rounding leaves in lmo.dtype "
              << "bf16: at least " << least_tolerance_bf16 << ", or lmo.dtype f32";
      throw ConfigError(problem.str());
    }
    // Rational divides by no norm, so an ε has nowhere to go.
    if (site.on_host && !site.shares_iterations && config.eps_mode == "none") {
      rational_ = rational_for(config.lower, config.tolerance, *dtype);
      rational_from_ = *dtype == DType::bf16 ? rational_from_bf16 : rational_from_f32;
      if (rational_) terms_at_once_ = std::min(site.tasks, rational_->r);
    }
    iterations_ = iterations_for(config.lower, config.tolerance);
    safety_ = auto_safety;
    return;
  }
  if (config.coefficients == "rational") {
    rational_ = rational_of(config, *dtype);
    terms_at_once_ = std::min(site.tasks, rational_->r);
    return;
  }
  const kernels::CoefficientTable& table =
      row_named(kernels::coefficient_tables(), "table of coefficients", config.coefficients);
  expects<ConfigError>(config.iterations >= 1, "lmo.iterations must be at least 1");
  iterations_ = kernels::first_iterations(table, config.iterations);
  safety_ = table.safety;
}

double Lmo::scale(Index rows, Index cols) const {
  return scale_(static_cast<double>(rows), static_cast<double>(cols));
}

double Lmo::flops(Index rows, Index cols) const {
  const auto m = static_cast<double>(std::min(rows, cols));
  const auto n = static_cast<double>(std::max(rows, cols));
  if (!row_->orthogonalizes) return 4 * m * n;
  if (const auto* f = rational(std::min(rows, cols))) return 3 * m * m * n + f->r * m * m * m;
  const auto steps = static_cast<double>(iterations_.size());
  const auto products =
      static_cast<double>(kernels::msign_gram_products(rows, cols, iterations_, options_));
  if (products > 0) return products * 3 * m * m * n + (4 * steps - 3 * products) * m * m * m;
  return steps * (3 * m * m * n + m * m * m) + 3 * m * n;
}

std::string Lmo::description(Index side) const {
  if (!row_->orthogonalizes) return std::string(row_->name);
  const kernels::RationalSign* const f = rational(side);
  std::string text = name_;
  if (f != nullptr) {
    text = name_ == "rational" ? name_ : name_ + ": rational";
    return text + ", " + std::to_string(f->r) + " terms";
  }
  return text + ", " + std::to_string(iterations_.size()) + " iterations";
}

bool Lmo::has_gram_form(Index side) const {
  return row_->orthogonalizes &&
         (rational(side) != nullptr || kernels::gram_is_stable(iterations_));
}

void Lmo::first_lines(MatrixView x, Index wanted, std::span<std::byte> work,
                      Backend& backend) const {
  if (!row_->orthogonalizes) return (*this)(x, work, backend);
  spectral_lines(*this, x, wanted, work, backend);
}

std::size_t Lmo::gram_workspace_bytes(Index m) const {
  if (rational(m) == nullptr) return kernels::gram_polynomial_workspace_bytes(m, iterations_);
  return std::max(kernels::rational_gram_workspace_bytes(m, terms_at_once_),
                  kernels::piece_bytes(m, m, DType::f32));
}

double Lmo::gram_flops(Index m) const {
  const auto side = static_cast<double>(m);
  const kernels::RationalSign* const f = rational(m);
  return f != nullptr ? f->r * side * side * side
                      : kernels::gram_polynomial_flops(m, std::ssize(iterations_));
}

void Lmo::gram(MatrixView r, double eps, MatrixView q, std::span<double> squares,
               std::span<std::byte> work, Backend& backend) const {
  const kernels::RationalSign* const f = rational(r.rows);
  if (f == nullptr) {
    return kernels::gram_polynomial(r, iterations_, {safety_, options_.eps_mode, eps}, q, squares,
                                    work, backend);
  }
  kernels::rational_gram(r, *f, q, work, backend);
  if (squares.empty()) return;
  // ‖QX‖² by lines: the diagonal of QRQ.
  const MatrixView product = kernels::carve(work, r.rows, r.cols, DType::f32);
  backend.gemm(1, q, kernels::Transpose::no, r, kernels::Transpose::no, 0, product);
  backend.row_dots(product, q, matrix_view(squares.data(), std::ssize(squares), 1));
}

double Lmo::gram_terms(ConstMatrixView r, int first, int last, float* packed,
                       std::span<std::byte> work, Backend& backend) const {
  const double scale = kernels::rational_scale(r, work, backend);
  kernels::rational_terms(r, scale, *rational(r.rows), first, last, packed, work, backend);
  return scale;
}

void Lmo::sum_terms(float* packed, Index m, Backend& backend) const {
  kernels::rational_sum(packed, *rational(m), m, backend);
}

void Lmo::gram_of_sum(const float* packed, double scale, MatrixView q, Backend& backend) const {
  kernels::rational_of_sum(packed, scale, *rational(q.rows), q, backend);
}

}  // namespace orthrus::optim
