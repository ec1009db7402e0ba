#include <omp.h>

#include "kernels/cpu/tasks.hpp"

namespace orthrus::kernels::cpu {

int threads() { return omp_in_parallel() != 0 ? 1 : omp_get_max_threads(); }

void run_tasks(int count, int threads, void (*f)(void* context, int task, int thread),
               void* context) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int task = 0; task < count; ++task) f(context, task, omp_get_thread_num());
}

}  // namespace orthrus::kernels::cpu
