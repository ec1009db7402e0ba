// The networks of the experiment sparse-regression, step by step: gradient and spectral descent.
//
//   OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 bench_sparse_regression [INPUTS WIDTH NETWORKS STEPS]
//
// 128 512 3 400 unless given: the published size. One JSON line per step;
// scripts/spectral_picture.py draws them.
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "runtime/studies/reproduce.hpp"

int main(int count, char** words) {
  int given[] = {128, 512, 3, 400};
  for (int i = 1; i < count && i <= 4; ++i) given[i - 1] = std::atoi(words[i]);
  const auto [inputs, width, networks, steps] = given;
  for (int seed = 1; seed <= networks; ++seed) {
    for (const bool spectral : {false, true}) {
      int step = 0;
      for (const auto& at : orthrus::studies::sparse_regression_run(
               inputs, width, static_cast<std::uint64_t>(seed), spectral, steps)) {
        const nlohmann::json line{{"method", spectral ? "spectral" : "gradient"},
                                  {"seed", seed},
                                  {"step", step++},
                                  {"loss", at.loss},
                                  {"stable_ranks", at.stable_ranks}};
        std::puts(line.dump().c_str());
      }
      std::fflush(stdout);
    }
  }
}
