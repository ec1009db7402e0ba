#include "kernels/cpu/tasks.hpp"

namespace orthrus::kernels::cpu {

int threads() { return 1; }

void run_tasks(int count, int, void (*f)(void* context, int task, int thread), void* context) {
  for (int task = 0; task < count; ++task) f(context, task, 0);
}

}  // namespace orthrus::kernels::cpu
