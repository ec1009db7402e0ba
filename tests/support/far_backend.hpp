#pragma once
/// @file
/// FarBackend: a device whose memory the host cannot follow and whose queue is late, on any
/// machine. It computes as "cpu" does.

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>

#include "comm/staged.hpp"
#include "kernels/backend.hpp"

namespace far_device {

using orthrus::ConstMatrixView;
using orthrus::ConstQuantizedView;
using orthrus::Grid;
using orthrus::Index;
using orthrus::MatrixView;
using orthrus::QuantizedView;
using orthrus::kernels::AdamWScalars;
using orthrus::kernels::Backend;
using orthrus::kernels::Rounding;
using orthrus::kernels::Transpose;

/// A device's address is the host's plus this: no program of a 64-bit x86 or Arm has it mapped.
inline constexpr std::uintptr_t displacement = std::uintptr_t{1} << 54;

inline bool is_far(const void* p) {
  return (reinterpret_cast<std::uintptr_t>(p) & displacement) != 0;
}
inline void* far_of(void* p) {
  return reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(p) + displacement);
}
/// @throws std::logic_error  the host's address where the device's is needed.
inline void* near_of(const void* p) {
  if (!is_far(p)) throw std::logic_error("a verb of the device was given the host's memory");
  return reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(p) - displacement);
}
/// Of either kind.
inline void* any_near(const void* p) { return is_far(p) ? near_of(p) : const_cast<void*>(p); }

/// What verbs queue is done when somebody waits, or asks for a number: who reads a result too
/// early, or takes a source away, finds out.
class FarBackend final : public Backend {
 public:
  FarBackend() : cpu_(orthrus::kernels::open_backend("cpu")) {}
  ~FarBackend() override { catch_up(); }

  [[nodiscard]] std::string_view name() const override { return "far"; }
  [[nodiscard]] bool on_host() const override { return false; }
  [[nodiscard]] bool reaches(const void* p) const override { return is_far(p); }
  [[nodiscard]] void* allocate(std::size_t bytes) override {
    void* const memory = cpu_->allocate(bytes);
    if (memory == nullptr) return nullptr;
    std::memset(memory, 0xcd, bytes);
    allocated += static_cast<std::int64_t>(bytes);
    return far_of(memory);
  }
  void deallocate(void* memory) noexcept override {
    if (before_free) before_free();
    catch_up();
    cpu_->deallocate(near_of(memory));
  }
  void copy(const void* from, void* to, std::size_t bytes) override {
    if (bytes == 0) return;
    later([=] { std::memcpy(any_near(to), any_near(from), bytes); });
  }
  void wait() override { catch_up(); }
  [[nodiscard]] void* reserve(std::size_t bytes) override { return far_of(cpu_->reserve(bytes)); }
  void unreserve(void* range, std::size_t bytes) noexcept override {
    catch_up();
    cpu_->unreserve(near_of(range), bytes);
  }
  void back(void* pages, std::size_t bytes) override { std::memset(near_of(pages), 0xcd, bytes); }
  void drop(void* pages, std::size_t bytes) noexcept override {
    catch_up();
    cpu_->drop(near_of(pages), bytes);
  }

  void gemm(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b, Transpose op_b,
            double beta, MatrixView c) override {
    later([=, this, a = near(a), b = near(b), c = near(c)] {
      cpu_->gemm(alpha, a, op_a, b, op_b, beta, c);
    });
  }
  void syrk(double alpha, ConstMatrixView a, Transpose op_a, double beta, MatrixView c) override {
    later([=, this, a = near(a), c = near(c)] { cpu_->syrk(alpha, a, op_a, beta, c); });
  }
  [[nodiscard]] bool invert_spd(MatrixView a) override {
    catch_up();
    return !refuses_inverses && cpu_->invert_spd(near(a));
  }
  void convert(ConstMatrixView from, double scale, MatrixView to) override {
    later([=, this, from = near(from), to = near(to)] { cpu_->convert(from, scale, to); });
  }
  void round_stochastic(ConstMatrixView from, MatrixView to, std::uint64_t seed,
                        std::uint64_t stream_id, std::uint64_t step, Index first) override {
    later([=, this, from = near(from), to = near(to)] {
      cpu_->round_stochastic(from, to, seed, stream_id, step, first);
    });
  }
  void axpby(double a, ConstMatrixView x, double b, MatrixView y) override {
    later([=, this, x = near(x), y = near(y)] { cpu_->axpby(a, x, b, y); });
  }
  void momentum(double beta, double weight, bool ahead, MatrixView g, MatrixView m) override {
    later([=, this, g = near(g), m = near(m)] { cpu_->momentum(beta, weight, ahead, g, m); });
  }
  void sign(ConstMatrixView from, MatrixView to) override {
    later([=, this, from = near(from), to = near(to)] { cpu_->sign(from, to); });
  }
  double decay_step(double rho, double eta, ConstMatrixView u, MatrixView w) override {
    catch_up();
    return cpu_->decay_step(rho, eta, near(u), near(w));
  }
  double adamw(const AdamWScalars& s, ConstMatrixView g, MatrixView m, MatrixView v,
               MatrixView w) override {
    catch_up();
    return cpu_->adamw(s, near(g), near(m), near(v), near(w));
  }
  void fill(double value, MatrixView to) override {
    later([=, this, to = near(to)] { cpu_->fill(value, to); });
  }
  void add_diagonal(double a, MatrixView c) override {
    later([=, this, c = near(c)] { cpu_->add_diagonal(a, c); });
  }
  void mirror_lower(MatrixView c) override {
    later([=, this, c = near(c)] { cpu_->mirror_lower(c); });
  }
  void pack_triangle(ConstMatrixView full, float* packed) override {
    later([=, this, full = near(full), packed = static_cast<float*>(near_of(packed))] {
      cpu_->pack_triangle(full, packed);
    });
  }
  void unpack_triangle(const float* packed, MatrixView full) override {
    later([=, this, full = near(full), packed = static_cast<const float*>(near_of(packed))] {
      cpu_->unpack_triangle(packed, full);
    });
  }
  double sum_squares(ConstMatrixView x) override {
    catch_up();
    return cpu_->sum_squares(near(x));
  }
  void line_sum_squares(ConstMatrixView x, bool of_columns, MatrixView out) override {
    later([=, this, x = near(x), out = near(out)] { cpu_->line_sum_squares(x, of_columns, out); });
  }
  double abs_max(ConstMatrixView x) override {
    catch_up();
    return cpu_->abs_max(near(x));
  }
  double trace(ConstMatrixView c) override {
    catch_up();
    return cpu_->trace(near(c));
  }
  void row_dots(ConstMatrixView x, ConstMatrixView y, MatrixView out) override {
    later([=, this, x = near(x), y = near(y), out = near(out)] { cpu_->row_dots(x, y, out); });
  }
  void scale_lines(ConstMatrixView s, bool of_columns, MatrixView x) override {
    later([=, this, s = near(s), x = near(x)] { cpu_->scale_lines(s, of_columns, x); });
  }
  void abs_maxima(ConstMatrixView w, const Grid& grid, MatrixView out) override {
    later([=, this, w = near(w), out = near(out)] { cpu_->abs_maxima(w, grid, out); });
  }
  void scales_from_maxima(const Grid& grid, MatrixView scales) override {
    later([=, this, scales = near(scales)] { cpu_->scales_from_maxima(grid, scales); });
  }
  void quantize(MatrixView w, const Grid& grid, const Rounding& rounding,
                QuantizedView q) override {
    later([=, this, w = near(w), q = near(q)] { cpu_->quantize(w, grid, rounding, q); });
  }
  void dequantize(ConstQuantizedView q, const Grid& grid, MatrixView to) override {
    later([=, this, q = near(q), to = near(to)] { cpu_->dequantize(q, grid, to); });
  }
  std::int64_t count_beyond(ConstMatrixView w, const Grid& grid, ConstMatrixView scales) override {
    catch_up();
    return cpu_->count_beyond(near(w), grid, near(scales));
  }
  void adamw_pull_back(const AdamWScalars& s, double kappa, ConstMatrixView v, ConstMatrixView e,
                       MatrixView m) override {
    later([=, this, v = near(v), e = near(e), m = near(m)] {
      cpu_->adamw_pull_back(s, kappa, v, e, m);
    });
  }
  void split_f32(ConstMatrixView w, MatrixView high, MatrixView low) override {
    later([=, this, w = near(w), high = near(high), low = near(low)] {
      cpu_->split_f32(w, high, low);
    });
  }
  void merge_f32(ConstMatrixView high, ConstMatrixView low, MatrixView w) override {
    later([=, this, high = near(high), low = near(low), w = near(w)] {
      cpu_->merge_f32(high, low, w);
    });
  }
  bool normalize(MatrixView x, const orthrus::kernels::NormOptions& options, int safe_exponent,
                 MatrixView to) override {
    later([=, this, x = near(x), to = near(to)] {
      static_cast<void>(cpu_->normalize(x, options, safe_exponent, to));
    });
    return true;
  }
  void divide_by_norm(ConstMatrixView r, const orthrus::kernels::NormOptions& options, int power,
                      ConstMatrixView from, MatrixView to) override {
    later([=, this, r = near(r), from = near(from), to = near(to)] {
      cpu_->divide_by_norm(r, options, power, from, to);
    });
  }
  void split_mean(MatrixView c, ConstMatrixView x, MatrixView to) override {
    later([=, this, c = near(c), x = near(x), to = near(to)] { cpu_->split_mean(c, x, to); });
  }
  void inverse_roots(MatrixView s) override {
    later([=, this, s = near(s)] { cpu_->inverse_roots(s); });
  }

  std::int64_t allocated = 0;         ///< bytes, since the beginning
  bool refuses_inverses = false;      ///< as if no matrix were positive definite
  std::function<void()> before_free;  ///< memory is about to be freed

 private:
  static MatrixView near(MatrixView v) {
    return {v.size() == 0 ? nullptr : near_of(v.data), v.rows, v.cols, v.ld, v.dtype};
  }
  static ConstMatrixView near(ConstMatrixView v) {
    return {v.size() == 0 ? nullptr : near_of(v.data), v.rows, v.cols, v.ld, v.dtype};
  }
  template <class Quantized>
  static Quantized near(Quantized q) {
    const bool empty = q.rows * q.cols == 0;
    q.codes = empty ? nullptr : near_of(q.codes);
    q.scales = empty ? nullptr : static_cast<float*>(near_of(q.scales));
    return q;
  }
  void later(std::function<void()> verb) { queue_.push_back(std::move(verb)); }
  void catch_up() {
    while (!queue_.empty()) {
      const std::function<void()> verb = std::move(queue_.front());
      queue_.pop_front();
      verb();
    }
  }

  std::unique_ptr<Backend> cpu_;
  std::deque<std::function<void()>> queue_;
};

/// Staging for buffers of either kind. Deliveries are late, too: done when somebody asks for the
/// mark after them.
class FarCopies final : public orthrus::comm::Copies {
 public:
  explicit FarCopies(Backend& device) : device_(device) {}
  void* allocate(std::size_t bytes) override { return ::operator new(bytes); }
  void free(void* block) noexcept override { ::operator delete(block); }
  std::unique_ptr<Mark> mark() override { return std::make_unique<FarMark>(*this); }
  void follow() override { device_.wait(); }
  void fetch(void* to, const void* from, std::size_t bytes) override {
    queue_.push_back([=] { std::memcpy(to, any_near(from), bytes); });
  }
  void deliver(void* to, const void* from, std::size_t bytes) override {
    queue_.push_back([=] { std::memcpy(any_near(to), from, bytes); });
  }

 private:
  struct FarMark final : Mark {
    explicit FarMark(FarCopies& c) : copies(c) {}
    void set() override { asked = 0; }
    bool reached() override {
      if (++asked < 2) return false;  // never at once
      while (!copies.queue_.empty()) {
        copies.queue_.front()();
        copies.queue_.pop_front();
      }
      return true;
    }
    FarCopies& copies;
    int asked = 0;
  };

  Backend& device_;
  std::deque<std::function<void()>> queue_;
};

}  // namespace far_device
