#pragma once
/// @file
/// StagedBackend: a device with memory of its own, as tests of host matrices see it.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/device_memory.hpp"
#include "kernels/host_backend.hpp"

namespace orthrus::kernels {

/// Each verb takes host views, brings what they span to the device (gaps and all, at the same
/// address modulo 256, between guards), runs there, and brings it back. Views that meet on the host
/// meet on the device. So one test body judges every device; speed is another matter.
class StagedBackend final : public HostBackend {
 public:
  explicit StagedBackend(std::shared_ptr<Backend> device) : device_(std::move(device)) {}
  [[nodiscard]] std::string_view name() const override { return device_->name(); }
  [[nodiscard]] Stream stream() const override { return device_->stream(); }

  void gemm(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b, Transpose op_b,
            double beta, MatrixView c) override {
    run({a, b, c},
        [&](const Stage& on) { device_->gemm(alpha, on(a), op_a, on(b), op_b, beta, on(c)); });
  }
  void syrk(double alpha, ConstMatrixView a, Transpose op_a, double beta, MatrixView c) override {
    run({a, c}, [&](const Stage& on) { device_->syrk(alpha, on(a), op_a, beta, on(c)); });
  }
  bool invert_spd(MatrixView a) override {
    bool definite = false;
    run({a}, [&](const Stage& on) { definite = device_->invert_spd(on(a)); });
    return definite;
  }
  void convert(ConstMatrixView from, double scale, MatrixView to) override {
    run({from, to}, [&](const Stage& on) { device_->convert(on(from), scale, on(to)); });
  }
  void round_stochastic(ConstMatrixView from, MatrixView to, std::uint64_t seed,
                        std::uint64_t stream_id, std::uint64_t step, Index first) override {
    run({from, to}, [&](const Stage& on) {
      device_->round_stochastic(on(from), on(to), seed, stream_id, step, first);
    });
  }
  void axpby(double a, ConstMatrixView x, double b, MatrixView y) override {
    run({x, y}, [&](const Stage& on) { device_->axpby(a, on(x), b, on(y)); });
  }
  void momentum(double beta, double weight, bool ahead, MatrixView g, MatrixView m) override {
    run({g, m}, [&](const Stage& on) { device_->momentum(beta, weight, ahead, on(g), on(m)); });
  }
  void sign(ConstMatrixView from, MatrixView to) override {
    run({from, to}, [&](const Stage& on) { device_->sign(on(from), on(to)); });
  }
  double decay_step(double rho, double eta, ConstMatrixView u, MatrixView w) override {
    return number({u, w},
                  [&](const Stage& on) { return device_->decay_step(rho, eta, on(u), on(w)); });
  }
  double adamw(const AdamWScalars& s, ConstMatrixView g, MatrixView m, MatrixView v,
               MatrixView w) override {
    return number({g, m, v, w},
                  [&](const Stage& on) { return device_->adamw(s, on(g), on(m), on(v), on(w)); });
  }
  double sum_squares(ConstMatrixView x) override {
    return number({x}, [&](const Stage& on) { return device_->sum_squares(on(x)); });
  }
  void line_sum_squares(ConstMatrixView x, bool of_columns, MatrixView out) override {
    run({x, out}, [&](const Stage& on) { device_->line_sum_squares(on(x), of_columns, on(out)); });
  }
  double abs_max(ConstMatrixView x) override {
    return number({x}, [&](const Stage& on) { return device_->abs_max(on(x)); });
  }
  void scale_lines(ConstMatrixView s, bool of_columns, MatrixView x) override {
    run({s, x}, [&](const Stage& on) { device_->scale_lines(on(s), of_columns, on(x)); });
  }
  void fill(double value, MatrixView to) override {
    run({to}, [&](const Stage& on) { device_->fill(value, on(to)); });
  }
  void add_diagonal(double a, MatrixView c) override {
    run({c}, [&](const Stage& on) { device_->add_diagonal(a, on(c)); });
  }
  void mirror_lower(MatrixView c) override {
    run({c}, [&](const Stage& on) { device_->mirror_lower(on(c)); });
  }
  void pack_triangle(ConstMatrixView full, float* packed) override {
    const MatrixView triangle = packed_view(packed, full.rows);
    run({full, triangle}, [&](const Stage& on) {
      device_->pack_triangle(on(full), static_cast<float*>(on(triangle).data));
    });
  }
  void unpack_triangle(const float* packed, MatrixView full) override {
    const MatrixView triangle = packed_view(const_cast<float*>(packed), full.rows);
    run({triangle, full}, [&](const Stage& on) {
      device_->unpack_triangle(static_cast<const float*>(on(triangle).data), on(full));
    });
  }
  double trace(ConstMatrixView c) override {
    return number({c}, [&](const Stage& on) { return device_->trace(on(c)); });
  }
  void row_dots(ConstMatrixView x, ConstMatrixView y, MatrixView out) override {
    run({x, y, out}, [&](const Stage& on) { device_->row_dots(on(x), on(y), on(out)); });
  }
  void abs_maxima(ConstMatrixView w, const Grid& grid, MatrixView out) override {
    run({w, out}, [&](const Stage& on) { device_->abs_maxima(on(w), grid, on(out)); });
  }
  void scales_from_maxima(const Grid& grid, MatrixView scales) override {
    run({scales}, [&](const Stage& on) { device_->scales_from_maxima(grid, on(scales)); });
  }
  void quantize(MatrixView w, const Grid& grid, const Rounding& rounding,
                QuantizedView q) override {
    run({w, codes_of(q, grid), scales_of(q, grid)}, [&](const Stage& on) {
      QuantizedView there = q;
      there.codes = const_cast<void*>(on(codes_of(q, grid)).data);
      there.scales = static_cast<float*>(const_cast<void*>(on(scales_of(q, grid)).data));
      device_->quantize(on(w), grid, rounding, there);
    });
  }
  void dequantize(ConstQuantizedView q, const Grid& grid, MatrixView to) override {
    run({codes_of(q, grid), scales_of(q, grid), to}, [&](const Stage& on) {
      ConstQuantizedView there = q;
      there.codes = on(codes_of(q, grid)).data;
      there.scales = static_cast<const float*>(on(scales_of(q, grid)).data);
      device_->dequantize(there, grid, on(to));
    });
  }
  std::int64_t count_beyond(ConstMatrixView w, const Grid& grid, ConstMatrixView scales) override {
    std::int64_t count = 0;
    run({w, scales},
        [&](const Stage& on) { count = device_->count_beyond(on(w), grid, on(scales)); });
    return count;
  }
  void adamw_pull_back(const AdamWScalars& s, double kappa, ConstMatrixView v, ConstMatrixView e,
                       MatrixView m) override {
    run({v, e, m},
        [&](const Stage& on) { device_->adamw_pull_back(s, kappa, on(v), on(e), on(m)); });
  }
  void split_f32(ConstMatrixView w, MatrixView high, MatrixView low) override {
    run({w, high, low}, [&](const Stage& on) { device_->split_f32(on(w), on(high), on(low)); });
  }
  void merge_f32(ConstMatrixView high, ConstMatrixView low, MatrixView w) override {
    run({high, low, w}, [&](const Stage& on) { device_->merge_f32(on(high), on(low), on(w)); });
  }
  bool normalize(MatrixView x, const NormOptions& options, int safe_exponent,
                 MatrixView to) override {
    bool result = false;
    run({x, to}, [&](const Stage& on) {
      result = device_->normalize(on(x), options, safe_exponent, on(to));
    });
    return result;
  }
  void divide_by_norm(ConstMatrixView r, const NormOptions& options, int power,
                      ConstMatrixView from, MatrixView to) override {
    run({r, from, to},
        [&](const Stage& on) { device_->divide_by_norm(on(r), options, power, on(from), on(to)); });
  }
  void split_mean(MatrixView c, ConstMatrixView x, MatrixView to) override {
    run({c, x, to}, [&](const Stage& on) { device_->split_mean(on(c), on(x), on(to)); });
  }
  void inverse_roots(MatrixView s) override {
    run({s}, [&](const Stage& on) { device_->inverse_roots(on(s)); });
  }

 private:
  static constexpr std::size_t guard = 256;

  /// Host bytes that one or several views span, and where they lie on the device.
  struct Piece {
    std::byte* begin;
    std::byte* end;
    DeviceBuffer buffer = {};
    std::byte* device = nullptr;
  };

  struct Stage {
    std::vector<Piece> pieces;

    [[nodiscard]] MatrixView operator()(MatrixView v) const {
      auto* data = static_cast<std::byte*>(v.data);
      for (const Piece& p : pieces) {
        if (p.begin <= data && data < p.end) {
          return {p.device + (data - p.begin), v.rows, v.cols, v.ld, v.dtype};
        }
      }
      return v;  // spans nothing
    }
    [[nodiscard]] ConstMatrixView operator()(ConstMatrixView v) const {
      return (*this)(MatrixView{const_cast<void*>(v.data), v.rows, v.cols, v.ld, v.dtype});
    }
  };

  static ConstMatrixView codes_of(ConstQuantizedView q, const Grid& grid) {
    return {q.codes, q.rows, code_pitch(grid.format, q.cols), q.pitch, DType::u8};
  }
  static ConstMatrixView scales_of(ConstQuantizedView q, const Grid& grid) {
    const bool there = grid.extent != Grid::Extent::block || grid.block > 0;
    return {q.scales, scale_rows(grid, q.rows), there ? scale_cols(grid, q.cols) : 0, q.scale_pitch,
            DType::f32};
  }
  static MatrixView packed_view(float* packed, Index m) {
    return matrix_view(packed, 1, m * (m + 1) / 2);
  }

  template <class F>
  double number(std::initializer_list<ConstMatrixView> views, F verb) {
    double result = 0;
    run(views, [&](const Stage& on) { result = verb(on); });
    return result;
  }

  template <class F>
  void run(std::initializer_list<ConstMatrixView> views, F verb) {
    Stage stage;
    for (const ConstMatrixView v : views) {
      // Shapes that a verb refuses must not be followed here.
      if (v.rows <= 0 || v.cols <= 0 || v.data == nullptr) continue;
      auto* begin = static_cast<std::byte*>(const_cast<void*>(v.data));
      const Index span = (v.rows - 1) * std::max(v.ld, Index{0}) + v.cols;
      Piece piece{begin, begin + static_cast<std::size_t>(span) * bytes_of(v.dtype)};
      const auto meets = [&](const Piece& p) { return p.begin < piece.end && piece.begin < p.end; };
      for (auto p = stage.pieces.begin(); p != stage.pieces.end();) {
        if (meets(*p)) {
          piece.begin = std::min(piece.begin, p->begin);
          piece.end = std::max(piece.end, p->end);
          stage.pieces.erase(p);
          p = stage.pieces.begin();
        } else {
          ++p;
        }
      }
      stage.pieces.push_back(std::move(piece));
    }
    for (Piece& p : stage.pieces) bring(p);
    verb(std::as_const(stage));
    for (Piece& p : stage.pieces) fetch(p);
  }

  void bring(Piece& p) {
    const auto bytes = static_cast<std::size_t>(p.end - p.begin);
    const std::size_t offset = reinterpret_cast<std::uintptr_t>(p.begin) % 256;
    p.buffer = DeviceBuffer(*device_, guard + offset + bytes + guard);
    p.device = static_cast<std::byte*>(p.buffer.data()) + guard + offset;
    std::vector<std::byte> image(p.buffer.bytes(), std::byte{0x3c});
    std::memcpy(image.data() + guard + offset, p.begin, bytes);
    device_->copy(image.data(), p.buffer.data(), image.size());
    device_->wait();
  }

  void fetch(Piece& p) {
    const auto bytes = static_cast<std::size_t>(p.end - p.begin);
    const auto before =
        static_cast<std::size_t>(p.device - static_cast<std::byte*>(p.buffer.data()));
    std::vector<std::byte> image(p.buffer.bytes());
    device_->copy(p.buffer.data(), image.data(), image.size());
    device_->wait();
    std::memcpy(p.begin, image.data() + before, bytes);
    std::fill_n(image.begin() + static_cast<std::ptrdiff_t>(before), bytes, std::byte{0x3c});
    EXPECT_TRUE(std::all_of(image.begin(), image.end(), [](std::byte b) {
      return b == std::byte{0x3c};
    })) << "a verb wrote outside of its views";
  }

  std::shared_ptr<Backend> device_;
};

/// `device`, for tests on host matrices.
inline std::shared_ptr<Backend> staged(std::shared_ptr<Backend> device) {
  if (device->on_host()) return device;
  return std::make_shared<StagedBackend>(std::move(device));
}

}  // namespace orthrus::kernels
