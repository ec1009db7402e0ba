#include "runtime/cli/ceilings.hpp"

#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>
#include <orthrus/view.hpp>
#include <span>
#include <vector>

#include "kernels/backend.hpp"

namespace orthrus::cli {
namespace {

/// Seconds of the fastest of five, of the slowest rank.
double seconds(Communicator& ranks, const std::function<void()>& work) {
  using Clock = std::chrono::steady_clock;
  double best = std::numeric_limits<double>::infinity();
  for (int k = 0; k < 5; ++k) {
    ranks.barrier();
    const Clock::time_point begin = Clock::now();
    work();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  ranks.all_reduce(std::span<double>(&best, 1), ReduceOp::max);
  return best;
}

}  // namespace

Ceilings measure_ceilings(Communicator& ranks) {
  Ceilings out;
  constexpr Index side = 512;
  const auto backend = kernels::open_backend("cpu");
  std::vector<float> a(side * side, 1), b(a), c(a);
  const auto square = [](std::vector<float>& x) { return matrix_view(x.data(), side, side); };
  out.flops_per_s = 2.0 * side * side * side / seconds(ranks, [&] {
                      backend->gemm(1, square(a), kernels::Transpose::no, square(b),
                                    kernels::Transpose::no, 0, square(c));
                      backend->wait();
                    });
  constexpr std::size_t length = 8 << 20;
  std::vector<float> x(length, 1), y(length, 2), z(length);
  float scale = 0.5F;
  out.memory_bytes_per_s = 3.0 * sizeof(float) * length / seconds(ranks, [&] {
                             for (std::size_t i = 0; i < length; ++i) z[i] = x[i] + scale * y[i];
                             scale = z[length / 2] > 0 ? 0.25F : 0.5F;  // somebody reads it
                           });
  if (ranks.size() == 1) return out;
  std::vector<float> message(1 << 20);
  const double time = seconds(ranks, [&] { ranks.all_reduce(std::span(message), ReduceOp::sum); });
  const auto p = static_cast<double>(ranks.size());
  out.network_bytes_per_s =
      2 * (p - 1) / p * sizeof(float) * static_cast<double>(message.size()) / time;
  return out;
}

}  // namespace orthrus::cli
