// A small pool that runs fn(task) for task = 0 .. n-1 on the calling thread and its helpers.
// Tasks are handed out dynamically, so a kernel's result must not depend on which thread runs which task: a task owns
// its outputs and reduces in an order of its own. Knows threads; does not know any kernel.
#pragma once
#include <cstdint>

namespace uma {

using TaskFn = void (*)(void* context, int64_t task);

int hardware_threads();            // CPUs this process may use: affinity and cgroup quota considered
void set_num_threads(int n);       // of the calling thread; n >= 1
int get_num_threads();             // of the calling thread
void run_tasks(int64_t n, TaskFn fn, void* context);

// parallel_for(n, [&](int64_t task) { ... }): a plain reference to the callable travels, nothing is allocated.
template <typename Body>
static inline void parallel_for(int64_t n, const Body& body) {
  run_tasks(n, [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); }, const_cast<Body*>(&body));
}

}  // namespace uma
