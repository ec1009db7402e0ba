#include "kernels/check.hpp"

#include <orthrus/error.hpp>

namespace orthrus::kernels {
namespace {

bool is_floating(DType t) noexcept {
  return t == DType::f32 || t == DType::bf16 || t == DType::f64;
}

/// "verb: " and the parts.
[[noreturn]] void refuse(std::string_view verb, std::initializer_list<std::string_view> parts) {
  std::string what(verb);
  what += ": ";
  for (const std::string_view part : parts) what += part;
  throw ShapeError(what);
}

/// Of a product's type, or bf16 like the first factor where the product is f32.
void check_factor(std::string_view verb, ConstMatrixView v, DType first, DType product) {
  check_dtype(verb, v, product == DType::f32 && first == DType::bf16 ? first : product);
}

void check_grid(std::string_view verb, const Grid& grid) {
  if (grid.extent == Grid::Extent::block && grid.block < 1) {
    refuse(verb, {"a block of ", std::to_string(grid.block), " columns"});
  }
}

std::string_view mark(Transpose op) noexcept { return op == Transpose::yes ? "^T" : ""; }

}  // namespace

std::string describe(ConstMatrixView v) {
  std::string text = std::to_string(v.rows);
  text.append("x").append(std::to_string(v.cols)).append(" ").append(name_of(v.dtype));
  return text.append(", ld ").append(std::to_string(v.ld));
}

void check_view(std::string_view verb, ConstMatrixView v) {
  if (v.rows < 0 || v.cols < 0) refuse(verb, {"negative size: ", describe(v)});
  if (v.rows > 1 && v.ld < v.cols) refuse(verb, {"rows overlap: ", describe(v)});
  if (!is_floating(v.dtype)) refuse(verb, {"no arithmetic on this type: ", describe(v)});
  if (v.size() > 0 && v.data == nullptr) refuse(verb, {"no data behind ", describe(v)});
}

void check_same_shape(std::string_view verb, std::initializer_list<ConstMatrixView> views) {
  const ConstMatrixView first = *views.begin();
  for (const ConstMatrixView v : views) {
    check_view(verb, v);
    if (v.rows != first.rows || v.cols != first.cols) {
      refuse(verb, {"shapes differ: ", describe(first), " and ", describe(v)});
    }
  }
}

void check_same(std::string_view verb, std::initializer_list<ConstMatrixView> views) {
  check_same_shape(verb, views);
  for (const ConstMatrixView v : views) check_dtype(verb, v, views.begin()->dtype);
}

void check_dtype(std::string_view verb, ConstMatrixView view, DType dtype) {
  if (view.dtype != dtype) {
    refuse(verb, {describe(view), " where ", name_of(dtype), " is needed"});
  }
}

void check_lines(std::string_view verb, ConstMatrixView x, bool of_columns, ConstMatrixView lines) {
  check_view(verb, x);
  check_view(verb, lines);
  check_dtype(verb, lines, DType::f64);
  const Index rows = of_columns ? 1 : x.rows;
  const Index cols = of_columns ? x.cols : 1;
  if (lines.rows != rows || lines.cols != cols) {
    refuse(verb, {"one number per ", of_columns ? "column" : "row", " of ", describe(x),
                  " does not fit ", describe(lines)});
  }
}

ProductShape check_gemm(ConstMatrixView a, Transpose op_a, ConstMatrixView b, Transpose op_b,
                        ConstMatrixView c) {
  for (const ConstMatrixView v : {a, b, c}) check_view("gemm", v);
  for (const ConstMatrixView v : {a, b}) check_factor("gemm", v, a.dtype, c.dtype);
  const bool ta = op_a == Transpose::yes;
  const bool tb = op_b == Transpose::yes;
  const ProductShape s{ta ? a.cols : a.rows, tb ? b.rows : b.cols, ta ? a.rows : a.cols};
  if ((tb ? b.cols : b.rows) != s.k || c.rows != s.m || c.cols != s.n) {
    refuse("gemm", {"A", mark(op_a), "*B", mark(op_b), " with A ", describe(a), " and B ",
                    describe(b), " does not fit C ", describe(c)});
  }
  return s;
}

ProductShape check_syrk(ConstMatrixView a, Transpose op_a, ConstMatrixView c) {
  for (const ConstMatrixView v : {a, c}) check_view("syrk", v);
  check_factor("syrk", a, a.dtype, c.dtype);
  const bool ta = op_a == Transpose::yes;
  const ProductShape s{ta ? a.cols : a.rows, ta ? a.cols : a.rows, ta ? a.rows : a.cols};
  if (c.rows != s.n || c.cols != s.n) {
    refuse("syrk",
           {ta ? "A^T*A" : "A*A^T", " with A ", describe(a), " does not fit C ", describe(c)});
  }
  return s;
}

void check_square(std::string_view verb, ConstMatrixView c) {
  check_view(verb, c);
  if (c.rows != c.cols) refuse(verb, {"not square: ", describe(c)});
}

void check_invert_spd(ConstMatrixView a) {
  check_square("invert_spd", a);
  if (a.dtype == DType::bf16) refuse("invert_spd", {"f32 or f64 is needed: ", describe(a)});
}

void check_triangle(std::string_view verb, ConstMatrixView full) {
  check_square(verb, full);
  check_dtype(verb, full, DType::f32);
}

void check_divide_by_norm(ConstMatrixView r, ConstMatrixView from, ConstMatrixView to) {
  check_square("divide_by_norm", r);
  check_same_shape("divide_by_norm", {from, to});
}

void check_split_mean(ConstMatrixView c, ConstMatrixView x, ConstMatrixView to) {
  check_square("split_mean", c);
  check_same_shape("split_mean", {x, to});
}

void check_row_dots(ConstMatrixView x, ConstMatrixView y, ConstMatrixView out) {
  check_same("row_dots", {x, y});
  check_lines("row_dots", x, false, out);
}

void check_scales(std::string_view verb, ConstMatrixView w, const Grid& grid,
                  ConstMatrixView scales) {
  check_view(verb, w);
  check_grid(verb, grid);
  check_scales(verb, scales);
  const Index rows = scale_rows(grid, w.rows);
  const Index cols = scale_cols(grid, w.cols);
  if (scales.rows != rows || scales.cols != cols) {
    refuse(verb, {describe(w), " has ", std::to_string(rows), "x", std::to_string(cols),
                  " scales, not ", describe(scales)});
  }
}

void check_scales(std::string_view verb, ConstMatrixView scales) {
  check_view(verb, scales);
  check_dtype(verb, scales, DType::f32);
}

void check_quantized(std::string_view verb, ConstMatrixView w, const Grid& grid,
                     ConstQuantizedView q) {
  check_view(verb, w);
  check_grid(verb, grid);
  if (q.rows != w.rows || q.cols != w.cols) {
    refuse(verb, {std::to_string(q.rows), "x", std::to_string(q.cols), " codes do not fit ",
                  describe(w)});
  }
  if (w.size() == 0) return;
  if (q.codes == nullptr || q.scales == nullptr) {
    refuse(verb, {"no codes or no scales for ", describe(w)});
  }
  if (w.rows == 1) return;
  if (q.pitch < code_pitch(grid.format, w.cols)) {
    refuse(verb, {"rows of ", name_of(grid.format), " codes for ", describe(w),
                  " overlap: ", std::to_string(q.pitch), " bytes from one to the next"});
  }
  const bool shared = grid.extent == Grid::Extent::tensor;
  if (shared ? q.scale_pitch != 0 : q.scale_pitch < scale_cols(grid, w.cols)) {
    refuse(verb, {std::to_string(q.scale_pitch), " floats from row to row of scales, where ",
                  shared ? "all rows share one"
                         : std::to_string(scale_cols(grid, w.cols)) + " are in each"});
  }
}

void check_weights(std::string_view verb, ConstMatrixView w) {
  if (w.dtype == DType::bf16) refuse(verb, {"f32 or f64 is needed: ", describe(w)});
}

void check_halves(std::string_view verb, ConstMatrixView w, ConstMatrixView high,
                  ConstMatrixView low) {
  check_same_shape(verb, {w, high, low});
  check_dtype(verb, w, DType::f32);
  check_dtype(verb, high, DType::bf16);
  check_dtype(verb, low, DType::bf16);
}

void throw_config_error(const std::string& what) { throw ConfigError(what); }
void throw_device_error(const std::string& what) { throw DeviceError(what); }

}  // namespace orthrus::kernels
