// Several problems of one size in one call, such as the experts of a block: tensors with one leading dimension more.
//
// A thread solves whole problems, so that threads wait for each other once a call. Problems that do not fill all threads are shared
// by all of them, one after another. Either way a problem has the bits that it has alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <initializer_list>
#include <new>
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

// The error of one problem. An exception cannot leave its thread, and std::exception_ptr has symbols without a version in libstdc++.
struct ProblemError {
  enum class Kind { none, argument, memory, other } kind = Kind::none;
  std::string text;

  // Remembers the exception that is being handled.
  void take() {
    try {
      throw;
    } catch (const std::invalid_argument& refused) {
      kind = Kind::argument, text = refused.what();
    } catch (const std::bad_alloc&) {
      kind = Kind::memory;
    } catch (const std::exception& error) {
      kind = Kind::other, text = error.what();
    }
  }

  // Throws the error of problem `index`, if there is one, with the index after the argument's name.
  void raise(int64_t index) const {
    if (kind == Kind::memory) throw std::bad_alloc();
    if (kind == Kind::other) throw std::runtime_error(text);
    if (kind == Kind::argument) {
      const size_t colon = std::min(text.find(':'), text.size());
      const std::string place = colon < text.size() ? "[" + std::to_string(index) + "]" : "";
      throw std::invalid_argument(text.substr(0, colon) + place + text.substr(colon));
    }
  }
};

// Calls f(i, executor) once for each problem i, with the threads that it may use. Of several that throw, the first one's error is
// thrown.
template <class F>
void for_each_problem(const Batch& batch, const Executor& executor, const F& f) {
  if (!batch.given) {
    f(int64_t{0}, executor);
    return;
  }
  std::vector<ProblemError> errors(static_cast<size_t>(batch.count));
  std::atomic<bool> failed{false};
  const auto solve = [&](int64_t i, const Executor& threads) {
    if (failed.load(std::memory_order_relaxed)) return;  // every problem before the one that failed has been started
    try {
      f(i, threads);
    } catch (...) {
      errors[static_cast<size_t>(i)].take();
      failed.store(true, std::memory_order_relaxed);
    }
  };
  const Executor alone{1, nullptr};
  const int64_t threads = executor.threads;
  const int64_t one_each = threads > 1 ? batch.count / threads * threads : 0;
  parallel_tasks(executor, one_each, [&](int64_t i) { solve(i, alone); });
  for (int64_t i = one_each; i < batch.count; ++i) solve(i, executor);
  for (int64_t i = 0; i < batch.count; ++i) errors[static_cast<size_t>(i)].raise(i);
}

}  // namespace sparsekern::cpu
