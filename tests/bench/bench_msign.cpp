// msign on request, for a program that times something else in between (bench_torch.py).
//
//   bench_msign
//
// Reads one request per line from stdin and answers each with one line on stdout:
//
//   matrices COUNT ROWS COLS FILE   COUNT dense matrices of f32, one after another     → ok
//   run METHOD                      msign of all of them, from the input on             → ms
//   check METHOD                    may METHOD run on this shape?                       → ok
//   save FILE                       writes the last results, f32                        → ok
//   version                                                                             → one line
//
// or "error: …". METHOD is plain_f32, plain_bf16, or COEFFICIENTS:DTYPE[:TERMS] as in a config's
// `lmo`: jordan:bf16, polar_express_101:f32, rational:bf16:2. The clock runs from f32 entries to
// bf16 ones: normalization and casts are inside.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <orthrus/error.hpp>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/coefficients.hpp"
#include "kernels/device_memory.hpp"
#include "optim/lmo.hpp"

namespace {

using namespace orthrus;
using kernels::DeviceBuffer;
using kernels::Transpose;
using Clock = std::chrono::steady_clock;

/// X ← msign(X) by what a method keeps between calls.
using Method = std::function<void(MatrixView)>;

MatrixView view(DeviceBuffer& buffer, Index rows, Index cols, DType dtype) {
  return {buffer.data(), rows, cols, cols, dtype};
}

/// Five Jordan iterations by plain products, A = XXᵀ and A² whole: what the same library of
/// products gives without the other half of what it does here.
class PlainNewtonSchulz {
 public:
  PlainNewtonSchulz(Index rows, Index cols, DType dtype, kernels::Backend& backend)
      : backend_(backend),
        wide_(rows <= cols),
        x_(backend, bytes(rows, cols, dtype)),
        y_(backend, bytes(rows, cols, dtype)),
        a_(backend, bytes(std::min(rows, cols), std::min(rows, cols), dtype)),
        b_(backend, bytes(std::min(rows, cols), std::min(rows, cols), dtype)),
        dtype_(dtype) {}

  void operator()(MatrixView target) {
    const Index side = std::min(target.rows, target.cols);
    MatrixView x = view(x_, target.rows, target.cols, dtype_);
    MatrixView y = view(y_, target.rows, target.cols, dtype_);
    const MatrixView a = view(a_, side, side, dtype_);
    const MatrixView b = view(b_, side, side, dtype_);
    backend_.convert(target, 1 / (std::sqrt(backend_.sum_squares(target)) + 1e-7), x);
    for (const kernels::Quintic& p : iterations_) {
      // A = XXᵀ (tall: XᵀX); B = bA + cA²; X ← aX + BX (tall: aX + XB).
      backend_.gemm(1, x, wide_ ? Transpose::no : Transpose::yes, x,
                    wide_ ? Transpose::yes : Transpose::no, 0, a);
      backend_.convert(a, 1, b);
      backend_.gemm(p.c, a, Transpose::no, a, Transpose::no, p.b, b);
      backend_.convert(x, 1, y);
      backend_.gemm(1, wide_ ? b : x, Transpose::no, wide_ ? x : b, Transpose::no, p.a, y);
      std::swap(x, y);
    }
    backend_.convert(x, 1, target);
  }

 private:
  static std::size_t bytes(Index rows, Index cols, DType dtype) {
    return static_cast<std::size_t>(rows * cols) * bytes_of(dtype);
  }
  kernels::Backend& backend_;
  bool wide_;
  DeviceBuffer x_, y_, a_, b_;
  DType dtype_;
  std::vector<kernels::Quintic> iterations_ =
      kernels::first_iterations(*kernels::find_coefficients("jordan"), 5);
};

Method method_named(const std::string& name, Index rows, Index cols, kernels::Backend& backend) {
  if (name == "plain_f32" || name == "plain_bf16") {
    const DType dtype = name == "plain_f32" ? DType::f32 : DType::bf16;
    auto plain = std::make_shared<PlainNewtonSchulz>(rows, cols, dtype, backend);
    return [plain](MatrixView x) { (*plain)(x); };
  }
  std::vector<std::string> parts;
  std::stringstream text(name);
  for (std::string part; std::getline(text, part, ':');) parts.push_back(part);
  if (parts.size() < 2 || parts.size() > 3) {
    throw ConfigError("'" + name + "' is not COEFFICIENTS:DTYPE[:TERMS]");
  }
  LmoConfig config;
  config.coefficients = parts[0];
  config.dtype = parts[1];
  if (parts.size() == 3) config.terms = std::stoi(parts[2]);
  auto lmo = std::make_shared<optim::Lmo>(config);
  auto work = std::make_shared<DeviceBuffer>(backend, lmo->workspace_bytes(rows, cols));
  return [lmo, work, &backend](MatrixView x) { (*lmo)(x, work->span(), backend); };
}

class Session {
 public:
  /// @return the answer.
  std::string request(const std::string& line) {
    std::stringstream in(line);
    std::string verb;
    in >> verb;
    if (verb == "matrices") return load(in);
    if (verb == "run" || verb == "check") {
      std::string name;
      in >> name;
      if (verb == "run") return run(name);
      method(name);
      return "ok";
    }
    if (verb == "save") return save(rest(in));
    if (verb == "version") {
      return std::string("Orthrus ") + ORTHRUS_VERSION +
             (kernels::cpu_bf16_native() ? ", bf16 by oneDNN" : ", bf16 widened to f32");
    }
    throw ConfigError("'" + verb + "' is not a request");
  }

 private:
  static std::string rest(std::istream& in) {
    std::string text;
    std::getline(in >> std::ws, text);
    return text;
  }

  std::string load(std::istream& in) {
    Index count = 0;
    Index rows = 0;
    Index cols = 0;
    in >> count >> rows >> cols;
    if (!in || count < 1 || rows < 1 || cols < 1 || count * rows * cols > Index{1} << 30) {
      throw ConfigError("matrices COUNT ROWS COLS FILE: not such numbers");
    }
    const std::string name = rest(in);
    std::vector<float> values(static_cast<std::size_t>(count * rows * cols));
    std::ifstream file(name, std::ios::binary);
    file.read(reinterpret_cast<char*>(values.data()),
              static_cast<std::streamsize>(values.size() * sizeof(float)));
    if (!file || file.peek() != std::ifstream::traits_type::eof()) {
      throw ConfigError(name + " does not hold so many numbers");
    }
    input_ = std::move(values);
    x_ = input_;
    bf16_.resize(input_.size());
    count_ = count, rows_ = rows, cols_ = cols;
    methods_.clear();
    return "ok";
  }

  Method& method(const std::string& name) {
    if (input_.empty()) throw ConfigError("no matrices yet");
    const auto found = methods_.find(name);
    if (found != methods_.end()) return found->second;
    return methods_[name] = method_named(name, rows_, cols_, *backend_);
  }

  std::string run(const std::string& name) {
    Method& msign = method(name);
    std::copy(input_.begin(), input_.end(), x_.begin());
    const auto start = Clock::now();
    for (Index i = 0; i < count_; ++i) {
      const auto at = static_cast<std::size_t>(i * rows_ * cols_);
      const MatrixView x = matrix_view(x_.data() + at, rows_, cols_);
      msign(x);
      backend_->convert(x, 1, matrix_view(bf16_.data() + at, rows_, cols_));
    }
    const double ms = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
    return std::to_string(ms);
  }

  std::string save(const std::string& name) {
    const auto n = std::ssize(bf16_);
    backend_->convert(matrix_view(bf16_.data(), 1, n), 1, matrix_view(x_.data(), 1, n));
    std::ofstream file(name, std::ios::binary);
    file.write(reinterpret_cast<const char*>(x_.data()),
               static_cast<std::streamsize>(x_.size() * sizeof(float)));
    file.flush();
    if (!file) throw ConfigError(name + " was not written");
    return "ok";
  }

  std::unique_ptr<kernels::Backend> backend_ = kernels::open_backend("cpu");
  std::vector<float> input_, x_;
  std::vector<BFloat16> bf16_;
  Index count_ = 0, rows_ = 0, cols_ = 0;
  std::map<std::string, Method> methods_;
};

}  // namespace

int main() {
  Session session;
  for (std::string line; std::getline(std::cin, line);) {
    try {
      std::cout << session.request(line) << std::endl;
    } catch (const std::exception& e) {
      std::cout << "error: " << e.what() << std::endl;
    }
  }
  return 0;
}
