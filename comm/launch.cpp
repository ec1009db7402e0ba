#include "comm/launch.hpp"

#if __has_include(<malloc.h>)
#include <malloc.h>
#endif

#include <charconv>
#include <cstdlib>
#include <orthrus/error.hpp>
#include <string>
#include <string_view>

namespace orthrus::comm {

void refuse_singletons(int world_size) {
  if (world_size != 1) return;
  for (const char* const name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"}) {
    const char* const value = std::getenv(name);
    if (value == nullptr) continue;
    const std::string_view text{value};
    int tasks = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), tasks);
    // The innermost launcher decides: mpirun -np 1 inside a job of four tasks is one rank by
    // intention.
    if (error != std::errc{} || end != text.data() + text.size() || tasks <= 1) return;
    throw ConfigError(std::string(name) + " is " + std::to_string(tasks) +
                      ", but this MPI program has 1 rank: it was started as " +
                      std::to_string(tasks) +
                      " programs of one rank each; start it with mpirun or srun --mpi=pmix");
  }
}

void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, 256 << 20);
#endif
}

}  // namespace orthrus::comm
