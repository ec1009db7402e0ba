#pragma once
/// @file
/// What every device refuses, in the same words. All throw `ShapeError` with the numbers.

#include <initializer_list>
#include <orthrus/view.hpp>
#include <string>
#include <string_view>

#include "kernels/backend.hpp"

namespace orthrus::kernels {

/// "3x4 f32, ld 8".
std::string describe(ConstMatrixView view);

struct ProductShape {
  Index m, n, k;
};
/// C (m×n) ← op(A) (m×k) · op(B) (k×n), all of one floating dtype, or C f32 and the others bf16.
ProductShape check_gemm(ConstMatrixView a, Transpose op_a, ConstMatrixView b, Transpose op_b,
                        ConstMatrixView c);
/// C (n×n) ← op(A)·op(A)ᵀ with op(A) n×k; m = n. Types as above.
ProductShape check_syrk(ConstMatrixView a, Transpose op_a, ConstMatrixView c);
/// Square, f32 or f64.
void check_invert_spd(ConstMatrixView a);
/// Floating dtype, sizes not negative, rows that do not overlap.
void check_view(std::string_view verb, ConstMatrixView view);
/// `check_view` of each, all of one shape.
void check_same_shape(std::string_view verb, std::initializer_list<ConstMatrixView> views);
/// `check_same_shape`, all of one dtype.
void check_same(std::string_view verb, std::initializer_list<ConstMatrixView> views);
/// `view` has this dtype.
void check_dtype(std::string_view verb, ConstMatrixView view, DType dtype);
/// `lines` has one f64 per row of x (rows×1), or per column (1×cols).
void check_lines(std::string_view verb, ConstMatrixView x, bool of_columns, ConstMatrixView lines);

/// `c` is square.
void check_square(std::string_view verb, ConstMatrixView c);
/// `check_square`, f32.
void check_triangle(std::string_view verb, ConstMatrixView full);
/// `r` is square, `from` and `to` have one shape.
void check_divide_by_norm(ConstMatrixView r, ConstMatrixView from, ConstMatrixView to);
/// `c` is square, x and `to` have one shape.
void check_split_mean(ConstMatrixView c, ConstMatrixView x, ConstMatrixView to);
/// x and y of one shape and dtype, `out` one f64 per row.
void check_row_dots(ConstMatrixView x, ConstMatrixView y, ConstMatrixView out);

/// w of a floating dtype, `scales` f32 and of the size `grid` asks for.
void check_scales(std::string_view verb, ConstMatrixView w, const Grid& grid,
                  ConstMatrixView scales);
/// f32.
void check_scales(std::string_view verb, ConstMatrixView scales);
/// q has the shape of w, codes that do not overlap, and scales as `grid` says.
void check_quantized(std::string_view verb, ConstMatrixView w, const Grid& grid,
                     ConstQuantizedView q);
/// f32 or f64.
void check_weights(std::string_view verb, ConstMatrixView w);
/// w f32, high and low bf16, of one shape.
void check_halves(std::string_view verb, ConstMatrixView w, ConstMatrixView high,
                  ConstMatrixView low);

// For sources that cannot read error.hpp, being C++17.
[[noreturn]] void throw_config_error(const std::string& what);
[[noreturn]] void throw_device_error(const std::string& what);

}  // namespace orthrus::kernels
