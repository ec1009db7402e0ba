#pragma once
/// @file
/// Tasks on threads: of the OpenMP that oneDNN runs on, so that its products take one thread each
/// inside a task, and none waits beside them.

namespace orthrus::kernels::cpu {

/// Threads that OpenMP gives to this thread: 1 inside a parallel region. Twin files:
/// tasks_openmp.cpp, or tasks_absent.cpp where the compiler has another OpenMP than oneDNN, or
/// none.
int threads();

/// f(context, task, thread) for every task < count, on at most `threads` threads, the caller's
/// among them: each task always on the same one, so that its buffers are there the next time.
/// Returns when all are done. f throws nothing.
void run_tasks(int count, int threads, void (*f)(void* context, int task, int thread),
               void* context);

}  // namespace orthrus::kernels::cpu
