// Several problems of one size in one call, such as the experts of a block: tensors with one leading dimension more.
//
// A thread solves whole problems, so that threads wait for each other once a call. Problems that do not fill all threads are shared
// by all of them, one after another. Either way a problem has the bits that it has alone.
#pragma once

#include <atomic>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace sparsekern::cpu {

struct Batch {
  bool given;     // false: the tensors have no leading dimension
  int64_t count;  // 1 without a leading dimension

  Batch(const Tensor& tensor, int64_t dimensions) : given(tensor.dim() == dimensions + 1), count(given ? tensor.size(0) : 1) {}

  std::vector<int64_t> shape(std::initializer_list<int64_t> of_one) const {
    std::vector<int64_t> sizes(of_one);
    if (given) sizes.insert(sizes.begin(), count);
    return sizes;
  }
};

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t axis = 0; axis < a.dim(); ++axis) {
    if (a.size(axis) != b.size(axis)) return false;
  }
  return true;
}

// Throws the error of problem `index`, with the index after the argument's name.
[[noreturn]] inline void rethrow_of(int64_t index, const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::invalid_argument& refused) {
    std::string text = refused.what();
    const size_t colon = text.find(':');
    if (colon != std::string::npos) text.insert(colon, "[" + std::to_string(index) + "]");
    throw std::invalid_argument(text);
  }
}

// Calls f(i, executor) once for each problem i, with the threads that it may use. Of several that throw, the first one's error is
// thrown.
template <class F>
void for_each_problem(const Batch& batch, const Executor& executor, const F& f) {
  if (!batch.given) {
    f(int64_t{0}, executor);
    return;
  }
  std::vector<std::exception_ptr> errors(static_cast<size_t>(batch.count));
  std::atomic<bool> failed{false};
  const auto solve = [&](int64_t i, const Executor& threads) {
    if (failed.load(std::memory_order_relaxed)) return;  // every problem before the one that failed has been started
    try {
      f(i, threads);
    } catch (...) {
      errors[static_cast<size_t>(i)] = std::current_exception();
      failed.store(true, std::memory_order_relaxed);
    }
  };
  const Executor alone{1, nullptr};
  const int64_t threads = executor.threads;
  const int64_t one_each = threads > 1 ? batch.count / threads * threads : 0;
  parallel_tasks(executor, one_each, [&](int64_t i) { solve(i, alone); });
  for (int64_t i = one_each; i < batch.count; ++i) solve(i, executor);
  for (int64_t i = 0; i < batch.count; ++i) {
    if (errors[static_cast<size_t>(i)]) rethrow_of(i, errors[static_cast<size_t>(i)]);
  }
}

}  // namespace sparsekern::cpu
