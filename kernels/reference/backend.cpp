// The judge: plain loops in the order of the formulas, sums in f64. Nothing here is fast on
// purpose.

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
