// The product of tokens with the packed weights of their experts, shared by bitmask_experts_linear and nm_experts_linear.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/packed_linear.h"

namespace sparsekern::cpu {

// The pairs of a token and one of its experts, sorted stably by expert.
struct Pairs {
  std::vector<int64_t> first;   // the first pair of each expert, and the end of the last
  std::vector<int64_t> places;  // of each pair in the choice

  int64_t count(int64_t expert) const { return first[static_cast<size_t>(expert) + 1] - first[static_cast<size_t>(expert)]; }

  explicit Pairs(const ExpertChoice& choice)
      : first(static_cast<size_t>(choice.experts + 1)), places(static_cast<size_t>(choice.tokens * choice.choices)) {
    for (size_t i = 0; i < places.size(); ++i) {
      const int64_t expert = choice.ids[i];
      if (expert < 0 || expert >= choice.experts) {
        throw std::invalid_argument(
            "experts: expected ids from 0 to " + std::to_string(choice.experts - 1) + ", got " + std::to_string(expert));
      }
      ++first[static_cast<size_t>(expert) + 1];
    }
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (size_t i = 0; i < places.size(); ++i)
      places[static_cast<size_t>(next[static_cast<size_t>(choice.ids[i])]++)] = static_cast<int64_t>(i);
  }
};

// An expert that has tokens: its weight, and its pairs.
template <class Weight, class T>
struct Hit {
  Weight weight;
  TokenBlock x;
  Output<T> output;
};

// Returns into how many tasks an expert is split, one of `hits` that share the threads.
template <class Weight>
int64_t tasks_of_expert(const Weight& weight, int64_t hits, int64_t threads) {
  if (threads <= 1) return 1;
  const int64_t most = threads * kTasksPerThread / hits, by_size = weight.bytes() / kTaskBytes;
  return std::min(packed_rows::tiles(weight.rows), std::max((threads + hits - 1) / hits, std::min(most, by_size)));
}

// Computes y[token][choice] = W x[token] + b for the W and b of the chosen expert. `weight_of(expert)` makes its weight, and
// `order_of(expert)` its order of rows, or null. Returns false if the packed tensors contradict each other.
//
// Experts with few tokens share one parallel region: their tiles are split into tasks. An expert with many tokens is a
// product of its own.
template <class T, class WeightOf, class OrderOf>
bool experts_product(
    const T* x, const ExpertChoice& choice, int64_t columns, const Pairs& pairs, const T* bias, T* y, const Executor& executor,
    const WeightOf& weight_of, const OrderOf& order_of) {
  using Weight = decltype(weight_of(int64_t{}));
  const Activations sorted(x, static_cast<int64_t>(pairs.places.size()), columns, current_isa(), executor, [&](int64_t pair) {
    return pairs.places[static_cast<size_t>(pair)] / choice.choices;
  });
  std::vector<Hit<Weight, T>> few;
  std::atomic<bool> sound{true};
  for (int64_t expert = 0; expert < choice.experts; ++expert) {
    const int64_t first = pairs.first[static_cast<size_t>(expert)], count = pairs.count(expert);
    if (count == 0) continue;
    Weight weight = weight_of(expert);
    const T* own_bias = bias == nullptr ? nullptr : bias + expert * weight.rows;
    const Output<T> output{y, weight.rows, order_of(expert), own_bias, pairs.places.data() + first};
    const TokenBlock block = sorted.block().part(first, count);
    if (count > kFewTokens) {
      if (!product_of_many(weight, block, output, executor)) sound = false;
      continue;
    }
    few.push_back({std::move(weight), block, output});
  }
  struct Task {
    size_t hit;
    int64_t begin, end;  // tiles
  };
  std::vector<Task> tasks;
  for (size_t hit = 0; hit < few.size(); ++hit) {
    const Weight& weight = few[hit].weight;
    const int64_t share = tasks_of_expert(weight, static_cast<int64_t>(few.size()), executor.threads);
    for (int64_t task = 0; task < share; ++task) {
      tasks.push_back({hit, weight.first_tile(task, share), weight.first_tile(task + 1, share)});
    }
  }
  parallel_tasks(executor, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    const Hit<Weight, T>& hit = few[task.hit];
    if (!multiply_range_by_few(hit.weight, task.begin, task.end, hit.x, hit.output)) sound = false;
  });
  return sound;
}

}  // namespace sparsekern::cpu
