// A device that knows shapes only, in the place of kernels/open.cpp: what a simulated program
// opens, whatever device its configuration names. Arguments are checked as on any device; the time
// a verb would take on the machine of the profile goes to the rank's clock; of the data only the
// first element of what is written becomes 1, so that no trace or norm is zero.
#include "kernels/check.hpp"
#include "kernels/host_backend.hpp"
#include "smpi/rank_clock.hpp"

namespace orthrus::kernels {
namespace {

using smpi::rank_clock;

void mark(MatrixView v) {
  if (v.size() == 0) return;
  switch (v.dtype) {
    case DType::f32:
      *static_cast<float*>(v.data) = 1;
      break;
    case DType::bf16:
      static_cast<BFloat16*>(v.data)->bits = 0x3f80;
      break;
    default:
      *static_cast<double*>(v.data) = 1;
  }
}

/// One element-wise pass over views that are read or written.
void pass(std::initializer_list<ConstMatrixView> views) {
  double bytes = 0;
  for (const ConstMatrixView v : views) {
    bytes += static_cast<double>(v.size()) * static_cast<double>(bytes_of(v.dtype));
  }
  if (bytes > 0) rank_clock().compute(runtime::pass_seconds(rank_clock().profile, bytes));
}

/// Its bytes.
ConstMatrixView codes_of(ConstQuantizedView q, const Grid& grid) {
  return {q.codes, q.rows, code_pitch(grid.format, q.cols), q.pitch, DType::u8};
}

/// As if every element were 1.
double sum_of(ConstMatrixView x) { return static_cast<double>(x.size()); }

class ShapeBackend final : public HostBackend {
 public:
  [[nodiscard]] std::string_view name() const override { return "shape"; }

  void gemm(double, ConstMatrixView a, Transpose op_a, ConstMatrixView b, Transpose op_b, double,
            MatrixView c) override {
    const ProductShape s = check_gemm(a, op_a, b, op_b, c);
    mark(c);
    if (s.m * s.n * s.k == 0) return;
    rank_clock().compute(runtime::gemm_seconds(rank_clock().profile, a.dtype, s.m, s.n, s.k));
  }

  void syrk(double, ConstMatrixView a, Transpose op_a, double, MatrixView c) override {
    const ProductShape s = check_syrk(a, op_a, c);
    mark(c);
    if (s.n * s.k == 0) return;
    rank_clock().compute(runtime::syrk_seconds(rank_clock().profile, a.dtype, s.n, s.k));
  }

  bool invert_spd(MatrixView a) override {
    check_invert_spd(a);
    mark(a);
    // m³ flops, nearly all of them in products of half that shape.
    if (a.rows > 0) {
      rank_clock().compute(runtime::syrk_seconds(rank_clock().profile, a.dtype, a.rows, a.rows));
    }
    return true;
  }

  void convert(ConstMatrixView from, double scale, MatrixView to) override {
    check_same_shape("convert", {from, to});
    mark(to);
    if (from.data != to.data || scale != 1) pass({from, to});
  }

  void round_stochastic(ConstMatrixView from, MatrixView to, std::uint64_t, std::uint64_t,
                        std::uint64_t, Index) override {
    check_same_shape("round_stochastic", {from, to});
    check_dtype("round_stochastic", from, DType::f32);
    check_dtype("round_stochastic", to, DType::bf16);
    mark(to);
    pass({from, to});
  }

  void momentum(double, double, bool, MatrixView g, MatrixView m) override {
    check_same("momentum", {m, g});
    mark(m);
    mark(g);
    pass({g, g, m, m});
  }
  void axpby(double, ConstMatrixView x, double b, MatrixView y) override {
    check_same("axpby", {x, y});
    mark(y);
    b == 0 ? pass({x, y}) : pass({x, y, y});
  }

  void sign(ConstMatrixView from, MatrixView to) override {
    check_same("sign", {from, to});
    mark(to);
    pass({from, to});
  }

  double decay_step(double, double, ConstMatrixView u, MatrixView w) override {
    check_same("decay_step", {w, u});
    check_dtype("decay_step", w, DType::f32);
    mark(w);
    pass({u, w, w});
    return sum_of(u);
  }

  double adamw(const AdamWScalars&, ConstMatrixView g, MatrixView m, MatrixView v,
               MatrixView w) override {
    check_same("adamw", {w, g, m, v});
    check_dtype("adamw", w, DType::f32);
    for (const MatrixView& written : {m, v, w}) mark(written);
    pass({g, m, m, v, v, w, w});
    return sum_of(w);
  }

  double sum_squares(ConstMatrixView x) override {
    check_view("sum_squares", x);
    pass({x});
    return sum_of(x);
  }

  void line_sum_squares(ConstMatrixView x, bool of_columns, MatrixView out) override {
    check_lines("line_sum_squares", x, of_columns, out);
    mark(out);
    pass({x});
  }

  double abs_max(ConstMatrixView x) override {
    check_view("abs_max", x);
    pass({x});
    return x.size() > 0 ? 1 : 0;
  }

  void abs_maxima(ConstMatrixView w, const Grid& grid, MatrixView out) override {
    check_scales("abs_maxima", w, grid, out);
    mark(out);
    pass({w});
  }
  void scales_from_maxima(const Grid&, MatrixView scales) override {
    check_scales("scales_from_maxima", scales);
    pass({scales, scales});
  }
  void quantize(MatrixView w, const Grid& grid, const Rounding&, QuantizedView q) override {
    check_quantized("quantize", w, grid, q);
    check_weights("quantize", w);
    mark(w);
    pass({w, w, codes_of(q, grid)});
  }
  void dequantize(ConstQuantizedView q, const Grid& grid, MatrixView to) override {
    check_quantized("dequantize", to, grid, q);
    mark(to);
    pass({codes_of(q, grid), to});
  }
  std::int64_t count_beyond(ConstMatrixView w, const Grid& grid, ConstMatrixView scales) override {
    check_scales("count_beyond", w, grid, scales);
    pass({w});
    return 0;
  }
  void adamw_pull_back(const AdamWScalars&, double, ConstMatrixView v, ConstMatrixView e,
                       MatrixView m) override {
    check_same("adamw_pull_back", {m, v, e});
    check_dtype("adamw_pull_back", m, DType::f32);
    mark(m);
    pass({v, e, m, m});
  }
  void split_f32(ConstMatrixView w, MatrixView high, MatrixView low) override {
    check_halves("split_f32", w, high, low);
    mark(high);
    pass({w, high, low});
  }
  void merge_f32(ConstMatrixView high, ConstMatrixView low, MatrixView w) override {
    check_halves("merge_f32", w, high, low);
    mark(w);
    pass({high, low, w});
  }

  void scale_lines(ConstMatrixView s, bool of_columns, MatrixView x) override {
    check_lines("scale_lines", x, of_columns, s);
    mark(x);
    pass({x, x});
  }
};

}  // namespace

std::unique_ptr<Backend> open_backend(std::string_view) { return std::make_unique<ShapeBackend>(); }
int tasks_at_once(std::string_view) { return 1; }

}  // namespace orthrus::kernels

// LAPACK, as eigh.cpp calls it: every eigenvalue is 1, every basis what it was. Time is not
// predicted.
extern "C" {
void dsyevd_(const char*, const char*, const int* n, double*, const int*, double* w, double*,
             const int*, int*, const int*, int* info) {
  for (int i = 0; i < *n; ++i) w[i] = 1;
  *info = 0;
}
void dgeqrf_(const int*, const int*, double*, const int*, double*, double*, const int*, int* info) {
  *info = 0;
}
void dorgqr_(const int*, const int*, const int*, double*, const int*, const double*, double*,
             const int*, int* info) {
  *info = 0;
}
}
