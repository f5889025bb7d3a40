// Threads for torch-free kernels, provided by the caller: torch's pool in the extension, std::thread in the tests.
#pragma once

#include <atomic>
#include <cstdint>

namespace sparsekern::cpu {

struct Executor {
  using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
  int threads;
  void (*run)(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);
};

// Calls f(begin, end) over disjoint ranges that cover [0, n), at least `grain` long if n allows it.
template <class F>
void parallel_for(const Executor& executor, int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (executor.threads <= 1 || n <= grain) {
    f(int64_t{0}, n);
    return;
  }
  executor.run(
      0, n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&f));
}

// Calls f(i, state) once for each i in [0, n), handed out one by one: for tasks of unequal length, or on a machine with other work.
// `state` is made once per thread. The result of a task must not depend on its thread, so that results are the same for any number
// of threads.
template <class Make, class F>
void parallel_tasks(const Executor& executor, int64_t n, const Make& make, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t workers = n < executor.threads ? n : executor.threads;
  parallel_for(executor, workers, 1, [&](int64_t begin, int64_t end) {
    auto state = make();
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) f(i, state);
    }
  });
}

template <class F>
void parallel_tasks(const Executor& executor, int64_t n, const F& f) {
  parallel_tasks(executor, n, [] { return 0; }, [&](int64_t i, int) { f(i); });
}

}  // namespace sparsekern::cpu
