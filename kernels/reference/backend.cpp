// The judge: plain loops in the order of the formulas, sums in f64. Nothing here is fast on
// purpose.

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/bf16.hpp"
#include "kernels/check.hpp"
#include "kernels/devices.hpp"
#include "kernels/host_backend.hpp"
#include "kernels/rng.hpp"

namespace orthrus::kernels {
namespace {

/// Entry (i, j) in the compute type C; exact when C is at least as wide.
template <class C>
C get(ConstMatrixView v, Index i, Index j) {
  const Index at = i * v.ld + j;
  switch (v.dtype) {
    case DType::f32:
      return static_cast<C>(static_cast<const float*>(v.data)[at]);
    case DType::bf16:
      return static_cast<C>(to_float(static_cast<const BFloat16*>(v.data)[at]));
    default:
      return static_cast<C>(static_cast<const double*>(v.data)[at]);
  }
}

/// Stores with one rounding.
template <class C>
void put(MatrixView v, Index i, Index j, C value) {
  const Index at = i * v.ld + j;
  switch (v.dtype) {
    case DType::f32:
      static_cast<float*>(v.data)[at] = static_cast<float>(value);
      break;
    case DType::bf16:
      static_cast<BFloat16*>(v.data)[at] = to_bf16(value);
      break;
    default:
      static_cast<double*>(v.data)[at] = static_cast<double>(value);
  }
}

/// Calls f(i, j) on every entry, row-major.
template <class F>
void for_each(ConstMatrixView shape, F f) {
  for (Index i = 0; i < shape.rows; ++i) {
    for (Index j = 0; j < shape.cols; ++j) f(i, j);
  }
}

/// Calls f with a value of the type this dtype is computed in: f64 for f64, f32 for the rest.
template <class F>
void in_compute_type(bool wide, F f) {
  if (wide) {
    f(double{});
  } else {
    f(float{});
  }
}

/// Bits of an fp8 mantissa without the leading one, and the bias of its exponent.
struct Fp8 {
  int mantissa, bias;
};
Fp8 fp8(CodeFormat format) { return format == CodeFormat::fp8_e4m3 ? Fp8{3, 7} : Fp8{2, 15}; }

bool is_integer(CodeFormat format) {
  return format == CodeFormat::int8 || format == CodeFormat::int4;
}

/// The distance between neighbours of the format's grid, from a ≥ 0 up.
double step_at(CodeFormat format, double a) {
  if (is_integer(format)) return 1;
  const auto [mantissa, bias] = fp8(format);
  const int exponent = a > 0 ? std::max(std::ilogb(a), 1 - bias) : 1 - bias;
  return std::ldexp(1.0, exponent - mantissa);
}

/// The code of a number that has one; int4: both nibbles' worth, sign extended.
std::uint8_t code_of(CodeFormat format, double value) {
  if (is_integer(format)) return static_cast<std::uint8_t>(static_cast<int>(value));
  if (value == 0) return 0;
  const auto [mantissa, bias] = fp8(format);
  const double a = std::abs(value);
  const int exponent = std::max(std::ilogb(a), 1 - bias);
  const int steps = static_cast<int>(a / step_at(format, a));  // below 2^mantissa: subnormal
  const int magnitude = ((exponent - (1 - bias)) << mantissa) + steps;
  return static_cast<std::uint8_t>(magnitude | (value < 0 ? 0x80 : 0));
}

double value_of(CodeFormat format, std::uint8_t code) {
  if (is_integer(format)) return static_cast<std::int8_t>(code);
  const auto [mantissa, bias] = fp8(format);
  const int exponent = (code & 0x7f) >> mantissa;
  const int fraction = code & ((1 << mantissa) - 1);
  const double sign = (code & 0x80) != 0 ? -1 : 1;
  if (format == CodeFormat::fp8_e4m3 ? (code & 0x7f) == 0x7f : exponent == 31) {
    return sign * (format == CodeFormat::fp8_e5m2 && fraction == 0
                       ? std::numeric_limits<double>::infinity()
                       : std::numeric_limits<double>::quiet_NaN());
  }
  const int whole = exponent == 0 ? 0 : 1 << mantissa;
  return sign * std::ldexp(whole + fraction, std::max(exponent, 1) - bias - mantissa);
}

float scale_at(ConstQuantizedView q, const Grid& grid, Index i, Index j) {
  return q.scales[i * q.scale_pitch + (grid.extent == Grid::Extent::block ? j / grid.block : 0)];
}

void put_code(QuantizedView q, CodeFormat format, Index i, Index j, std::uint8_t code) {
  auto* const line = static_cast<std::uint8_t*>(q.codes) + i * q.pitch;
  if (format != CodeFormat::int4) {
    line[j] = code;
  } else if (j % 2 == 0) {
    line[j / 2] = code & 0xf;  // what follows it, or 0 behind the last
  } else {
    line[j / 2] = static_cast<std::uint8_t>(line[j / 2] | (code << 4));
  }
}

std::uint8_t code_at(ConstQuantizedView q, CodeFormat format, Index i, Index j) {
  const auto* const line = static_cast<const std::uint8_t*>(q.codes) + i * q.pitch;
  if (format != CodeFormat::int4) return line[j];
  const int nibble = j % 2 == 0 ? line[j / 2] & 0xf : line[j / 2] >> 4;
  return static_cast<std::uint8_t>(nibble < 8 ? nibble : nibble - 16);
}

class ReferenceBackend final : public HostBackend {
 public:
  [[nodiscard]] std::string_view name() const override { return "reference"; }

  void gemm(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b, Transpose op_b,
            double beta, MatrixView c) override {
    const ProductShape s = check_gemm(a, op_a, b, op_b, c);
    for_each(c, [&](Index i, Index j) {
      double sum = 0;
      for (Index p = 0; p < s.k; ++p) {
        const double x = op_a == Transpose::yes ? get<double>(a, p, i) : get<double>(a, i, p);
        const double y = op_b == Transpose::yes ? get<double>(b, j, p) : get<double>(b, p, j);
        sum += x * y;
      }
      put(c, i, j, beta == 0 ? alpha * sum : alpha * sum + beta * get<double>(c, i, j));
    });
  }

  void syrk(double alpha, ConstMatrixView a, Transpose op_a, double beta, MatrixView c) override {
    const ProductShape s = check_syrk(a, op_a, c);
    for (Index i = 0; i < s.n; ++i) {
      for (Index j = 0; j <= i; ++j) {
        double sum = 0;
        for (Index p = 0; p < s.k; ++p) {
          sum += op_a == Transpose::yes ? get<double>(a, p, i) * get<double>(a, p, j)
                                        : get<double>(a, i, p) * get<double>(a, j, p);
        }
        put(c, i, j, beta == 0 ? alpha * sum : alpha * sum + beta * get<double>(c, i, j));
        put(c, j, i, get<double>(c, i, j));
      }
    }
  }

  bool invert_spd(MatrixView a) override {
    check_invert_spd(a);
    // A = LLᵀ, then X = L⁻¹, then XᵀX.
    const Index n = a.rows;
    std::vector<double> l(static_cast<std::size_t>(n * n));
    std::vector<double> x(static_cast<std::size_t>(n * n));
    const auto at = [n](Index i, Index j) { return static_cast<std::size_t>(i * n + j); };
    for (Index i = 0; i < n; ++i) {
      for (Index j = 0; j <= i; ++j) {
        double sum = get<double>(a, i, j);
        for (Index p = 0; p < j; ++p) sum -= l[at(i, p)] * l[at(j, p)];
        if (i > j) {
          l[at(i, j)] = sum / l[at(j, j)];
        } else if (sum > 0 && std::isfinite(sum)) {
          l[at(i, i)] = std::sqrt(sum);
        } else {
          return false;
        }
      }
    }
    for (Index j = 0; j < n; ++j) {
      x[at(j, j)] = 1 / l[at(j, j)];
      for (Index i = j + 1; i < n; ++i) {
        double sum = 0;
        for (Index p = j; p < i; ++p) sum -= l[at(i, p)] * x[at(p, j)];
        x[at(i, j)] = sum / l[at(i, i)];
      }
    }
    for (Index i = 0; i < n; ++i) {
      for (Index j = 0; j <= i; ++j) {
        double sum = 0;
        for (Index p = i; p < n; ++p) sum += x[at(p, i)] * x[at(p, j)];
        put(a, i, j, sum);
        put(a, j, i, sum);
      }
    }
    return true;
  }

  void convert(ConstMatrixView from, double scale, MatrixView to) override {
    check_same_shape("convert", {from, to});
    in_compute_type(from.dtype == DType::f64 || to.dtype == DType::f64, [&](auto type) {
      using C = decltype(type);
      const auto s = static_cast<C>(scale);
      for_each(to, [&](Index i, Index j) { put(to, i, j, s * get<C>(from, i, j)); });
    });
  }

  void round_stochastic(ConstMatrixView from, MatrixView to, std::uint64_t seed,
                        std::uint64_t stream_id, std::uint64_t step, Index first_element) override {
    check_same_shape("round_stochastic", {from, to});
    check_dtype("round_stochastic", from, DType::f32);
    check_dtype("round_stochastic", to, DType::bf16);
    for_each(to, [&](Index i, Index j) {
      const auto element = static_cast<std::uint64_t>(first_element + i * to.cols + j);
      const std::uint32_t bits = random_words(seed, stream_id, step, element)[0];
      static_cast<BFloat16*>(to.data)[i * to.ld + j] =
          to_bf16_stochastic(get<float>(from, i, j), bits);
    });
  }

  void axpby(double a, ConstMatrixView x, double b, MatrixView y) override {
    check_same("axpby", {x, y});
    in_compute_type(y.dtype == DType::f64, [&](auto type) {
      using C = decltype(type);
      const auto ca = static_cast<C>(a);
      const auto cb = static_cast<C>(b);
      for_each(y, [&](Index i, Index j) {
        const C ax = ca * get<C>(x, i, j);
        put(y, i, j, b == 0 ? ax : ax + cb * get<C>(y, i, j));
      });
    });
  }

  void momentum(double beta, double weight, bool ahead, MatrixView g, MatrixView m) override {
    axpby(weight, g, beta, m);
    ahead ? axpby(beta, m, weight, g) : axpby(1, m, 0, g);
  }

  void sign(ConstMatrixView from, MatrixView to) override {
    check_same("sign", {from, to});
    for_each(to, [&](Index i, Index j) {
      const auto x = get<double>(from, i, j);
      put(to, i, j, std::isnan(x) ? x : static_cast<double>((x > 0) - (x < 0)));
    });
  }

  double decay_step(double rho, double eta, ConstMatrixView u, MatrixView w) override {
    check_same("decay_step", {w, u});
    check_dtype("decay_step", w, DType::f32);
    const auto r = static_cast<float>(rho);
    const auto e = static_cast<float>(eta);
    for_each(w, [&](Index i, Index j) {
      put(w, i, j, r * get<float>(w, i, j) - e * get<float>(u, i, j));
    });
    return sum_squares(u);
  }

  double adamw(const AdamWScalars& s, ConstMatrixView g, MatrixView m, MatrixView v,
               MatrixView w) override {
    check_same("adamw", {w, g, m, v});
    check_dtype("adamw", w, DType::f32);
    const auto b1 = static_cast<float>(s.beta1);
    const auto b2 = static_cast<float>(s.beta2);
    const auto rest1 = static_cast<float>(1 - s.beta1);
    const auto rest2 = static_cast<float>(1 - s.beta2);
    const auto c1 = static_cast<float>(s.bias_correction1);
    const auto c2 = static_cast<float>(s.bias_correction2);
    const auto root_c2 = static_cast<float>(std::sqrt(s.bias_correction2));
    const auto eps = static_cast<float>(s.eps);
    const auto rho = static_cast<float>(1 - s.lr * s.weight_decay);
    const auto lr = static_cast<float>(s.lr);
    double sum = 0;
    for_each(w, [&](Index i, Index j) {
      const auto gradient = get<float>(g, i, j);
      const float m_new = b1 * get<float>(m, i, j) + rest1 * gradient;
      const float v_new = b2 * get<float>(v, i, j) + rest2 * (gradient * gradient);
      const float divisor = s.eps_before_correction ? (std::sqrt(v_new) + eps) / root_c2
                                                    : std::sqrt(v_new / c2) + eps;
      const float update = (m_new / c1) / divisor;
      put(m, i, j, m_new);
      put(v, i, j, v_new);
      put(w, i, j, rho * get<float>(w, i, j) - lr * update);
      sum += static_cast<double>(update) * static_cast<double>(update);
    });
    return sum;
  }

  void abs_maxima(ConstMatrixView w, const Grid& grid, MatrixView out) override {
    check_scales("abs_maxima", w, grid, out);
    for_each(out, [&](Index i, Index j) { put(out, i, j, 0.0); });
    for_each(w, [&](Index i, Index j) {
      const Index r = grid.extent == Grid::Extent::tensor ? 0 : i;
      const Index c = grid.extent == Grid::Extent::block ? j / grid.block : 0;
      const double v = std::abs(get<double>(w, i, j));
      if (std::isnan(v) || v > get<double>(out, r, c)) put(out, r, c, v);
    });
  }

  void scales_from_maxima(const Grid& grid, MatrixView scales) override {
    check_scales("scales_from_maxima", scales);
    for_each(scales, [&](Index i, Index j) {
      const double s = get<double>(scales, i, j) / largest_code(grid.format);
      if (std::isnan(s)) return;
      put(scales, i, j, std::max(s, 1e-12));
      if (!grid.power_of_two || std::isinf(s)) return;
      int exponent = 0;
      const double half_to_one = std::frexp(get<double>(scales, i, j), &exponent);
      put(scales, i, j, std::ldexp(1.0, half_to_one == 0.5 ? exponent - 1 : exponent));
    });
  }

  void quantize(MatrixView w, const Grid& grid, const Rounding& rounding,
                QuantizedView q) override {
    check_quantized("quantize", w, grid, q);
    check_weights("quantize", w);
    for_each(w, [&](Index i, Index j) {
      const float scale = scale_at(q, grid, i, j);
      // A quotient of floats, rounded to f64, is still rounded right when it becomes one.
      const double z = static_cast<float>(get<double>(w, i, j) / static_cast<double>(scale));
      double value = 0;
      if (!std::isnan(z)) {
        const double a = std::min(std::abs(z), largest_code(grid.format));
        const double step = step_at(grid.format, a);
        const double below = std::floor(a / step);
        const double distance = a / step - below;
        bool up = distance > 0.5 || (distance == 0.5 && std::fmod(below, 2) == 1);
        if (rounding.stochastic) {
          const auto element =
              static_cast<std::uint64_t>(rounding.first_element + i * rounding.row_distance + j);
          const std::uint32_t word = random_words(rounding.seed, rounding.stream_id, rounding.step,
                                                  element / 4)[element % 4];
          up = std::ldexp(word >> 8, -24) < distance;
        }
        value = (below + (up ? 1 : 0)) * step;
        if (value != 0 && z < 0) value = -value;
      }
      put_code(q, grid.format, i, j, code_of(grid.format, value));
      if (w.dtype == DType::f32) {
        const float product = static_cast<float>(value) * scale;
        put(w, i, j, get<float>(w, i, j) - product);
      } else {
        put(w, i, j, get<double>(w, i, j) - value * static_cast<double>(scale));
      }
    });
  }

  void dequantize(ConstQuantizedView q, const Grid& grid, MatrixView to) override {
    check_quantized("dequantize", to, grid, q);
    for_each(to, [&](Index i, Index j) {
      const double product = value_of(grid.format, code_at(q, grid.format, i, j)) *
                             static_cast<double>(scale_at(q, grid, i, j));
      to.dtype == DType::f64 ? put(to, i, j, product) : put(to, i, j, static_cast<float>(product));
    });
  }

  std::int64_t count_beyond(ConstMatrixView w, const Grid& grid, ConstMatrixView scales) override {
    check_scales("count_beyond", w, grid, scales);
    std::int64_t count = 0;
    for_each(w, [&](Index i, Index j) {
      const Index r = grid.extent == Grid::Extent::tensor ? 0 : i;
      const Index c = grid.extent == Grid::Extent::block ? j / grid.block : 0;
      const double limit = (1 + 0x1p-22) * (largest_code(grid.format) * get<double>(scales, r, c));
      if (std::abs(get<double>(w, i, j)) > limit) ++count;
    });
    return count;
  }

  void adamw_pull_back(const AdamWScalars& s, double kappa, ConstMatrixView v, ConstMatrixView e,
                       MatrixView m) override {
    check_same("adamw_pull_back", {m, v, e});
    check_dtype("adamw_pull_back", m, DType::f32);
    const auto factor = static_cast<float>(kappa * s.bias_correction1);
    const auto c2 = static_cast<float>(s.bias_correction2);
    const auto root_c2 = static_cast<float>(std::sqrt(s.bias_correction2));
    const auto eps = static_cast<float>(s.eps);
    for_each(m, [&](Index i, Index j) {
      const auto second = get<float>(v, i, j);
      const float divisor = s.eps_before_correction ? (std::sqrt(second) + eps) / root_c2
                                                    : std::sqrt(second / c2) + eps;
      put(m, i, j, get<float>(m, i, j) + (factor * divisor) * get<float>(e, i, j));
    });
  }

  void split_f32(ConstMatrixView w, MatrixView high, MatrixView low) override {
    check_halves("split_f32", w, high, low);
    for_each(w, [&](Index i, Index j) {
      const auto x = get<float>(w, i, j);
      auto& upper = static_cast<BFloat16*>(high.data)[i * high.ld + j];
      auto& lower = static_cast<BFloat16*>(low.data)[i * low.ld + j];
      if (std::isnan(x)) {
        upper = to_bf16(x);
        lower = {0};
        return;
      }
      const std::int64_t bits = std::bit_cast<std::uint32_t>(x);
      const std::int64_t nearest = (bits + 0x8000) / 0x10000;
      upper = {static_cast<std::uint16_t>(nearest)};
      lower = {static_cast<std::uint16_t>(bits - nearest * 0x10000)};
    });
  }

  void merge_f32(ConstMatrixView high, ConstMatrixView low, MatrixView w) override {
    check_halves("merge_f32", w, high, low);
    for_each(w, [&](Index i, Index j) {
      const std::int64_t upper = static_cast<const BFloat16*>(high.data)[i * high.ld + j].bits;
      const auto lower =
          static_cast<std::int16_t>(static_cast<const BFloat16*>(low.data)[i * low.ld + j].bits);
      put(w, i, j, std::bit_cast<float>(static_cast<std::uint32_t>(upper * 0x10000 + lower)));
    });
  }

  double sum_squares(ConstMatrixView x) override {
    check_view("sum_squares", x);
    double sum = 0;
    for_each(x, [&](Index i, Index j) { sum += get<double>(x, i, j) * get<double>(x, i, j); });
    return sum;
  }

  void line_sum_squares(ConstMatrixView x, bool of_columns, MatrixView out) override {
    check_lines("line_sum_squares", x, of_columns, out);
    for_each(out, [&](Index i, Index j) { put(out, i, j, 0.0); });
    for_each(x, [&](Index i, Index j) {
      const Index r = of_columns ? 0 : i;
      const Index c = of_columns ? j : 0;
      const auto v = get<double>(x, i, j);
      put(out, r, c, get<double>(out, r, c) + v * v);
    });
  }

  double abs_max(ConstMatrixView x) override {
    check_view("abs_max", x);
    double most = 0;
    for_each(x, [&](Index i, Index j) {
      const double v = std::abs(get<double>(x, i, j));
      if (std::isnan(v) || v > most) most = v;  // once NaN, no comparison takes it back
    });
    return most;
  }

  void scale_lines(ConstMatrixView s, bool of_columns, MatrixView x) override {
    check_lines("scale_lines", x, of_columns, s);
    for_each(x, [&](Index i, Index j) {
      const double factor = of_columns ? get<double>(s, 0, j) : get<double>(s, i, 0);
      put(x, i, j, get<double>(x, i, j) * factor);
    });
  }
};

}  // namespace

std::unique_ptr<Backend> open_reference() { return std::make_unique<ReferenceBackend>(); }

}  // namespace orthrus::kernels
