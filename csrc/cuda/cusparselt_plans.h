// Cached plans of cuSPARSELt. PyTorch makes handle, descriptors and plan in every call, which on an H100 takes 2.8 times as long as
// the product itself (pytorch issue 153825).
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <tuple>

#include "cuda/cusparselt_api.h"

namespace sparsekern::cusparselt {

// The key of a plan: product[tokens, out_features] = x[tokens, in_features] weight^T + bias, all row-major. The bias is identified
// by its address, which a plan may have copied.
struct Problem {
  int type;
  int64_t out_features, in_features, tokens;
  const void* bias;  // null: none
};

// An algorithm; the defaults are the library's own.
struct Algorithm {
  int id = 0, split_k = 1, split_k_mode = 0;

  auto key() const { return std::make_tuple(id, split_k, split_k_mode); }
};

// Number of plans and searches of this process, to check that plans are reused.
struct Counts {
  std::atomic<int64_t> plans{0}, searches{0};
};
inline Counts& counts() {
  static Counts in_process;
  return in_process;
}

// A library object that must be destroyed.
class Object {
 public:
  explicit Object(Api::Status (*destroy)(const Opaque*)) : destroy_(destroy) {}
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() {
    if (made_) destroy_(&memory_);
  }

  // `init` fills the memory, and throws if it cannot.
  template <class Init>
  void make(const Init& init) {
    init(&memory_);
    made_ = true;
  }
  const Opaque* get() const { return &memory_; }
  Opaque* get() { return &memory_; }

 private:
  Opaque memory_ = {};
  Api::Status (*destroy_)(const Opaque*);
  bool made_ = false;
};

class Plan {
 public:
  Plan(const Api& api, const Opaque* handle, const Problem& problem, const Algorithm& algorithm) : api_(api), handle_(handle) {
    const auto [type, out, in, tokens, bias] = problem;
    weight_.make([&, out = out, in = in, type = type](Opaque* matrix) {
      api.check(
          api.structured(handle, matrix, out, in, in, kAlignment, type, kRowMajor, kHalfOfThem),
          "cusparseLtStructuredDescriptorInit");
    });
    x_.make([&, tokens = tokens, in = in, type = type](Opaque* matrix) {
      api.check(api.dense(handle, matrix, tokens, in, in, kAlignment, type, kRowMajor), "cusparseLtDenseDescriptorInit");
    });
    // The library computes weight x^T; stored column-major, that is the row-major product.
    product_.make([&, tokens = tokens, out = out, type = type](Opaque* matrix) {
      api.check(api.dense(handle, matrix, out, tokens, out, kAlignment, type, kColumnMajor), "cusparseLtDenseDescriptorInit");
    });
    api.check(
        api.matmul(handle, &matmul_, kAsItIs, kTransposed, weight_.get(), x_.get(), product_.get(), product_.get(), kFloat),
        "cusparseLtMatmulDescriptorInit");
    if (bias != nullptr) {
      const void* address = bias;
      api.check(
          api.set_matmul(handle, &matmul_, kBiasPointer, &address, sizeof address),
          "cusparseLtMatmulDescSetAttribute for the bias");
    }
    selection_.make(
        [&](Opaque* selection) { api.check(api.selection(handle, selection, &matmul_, 0), "cusparseLtMatmulAlgSelectionInit"); });
    set(kAlgorithm, algorithm.id);
    if (algorithm.split_k > 1) {
      set(kSplitK, algorithm.split_k);
      if (algorithm.split_k_mode > 0) set(kSplitKMode, algorithm.split_k_mode);
    }
    plan_.make([&](Opaque* plan) { api.check(api.plan(handle, plan, &matmul_, selection_.get()), "cusparseLtMatmulPlanInit"); });
    counts().plans += 1;
  }

  size_t workspace_bytes() const {
    size_t bytes = 0;
    api_.check(api_.workspace(handle_, plan_.get(), &bytes), "cusparseLtMatmulGetWorkspace");
    return bytes;
  }

  void multiply(const void* weight, const void* x, void* product, void* workspace, cudaStream_t stream) const {
    constexpr float alpha = 1.0f, beta = 0.0f;
    api_.check(
        api_.multiply(handle_, plan_.get(), &alpha, weight, x, &beta, product, product, workspace, &stream, 1), "cusparseLtMatmul");
  }

  // Runs every algorithm several times, waits, and returns the fastest. The plan must not be used afterwards.
  Algorithm search(const void* weight, const void* x, void* product, void* workspace, cudaStream_t stream) {
    constexpr float alpha = 1.0f, beta = 0.0f;
    api_.check(
        api_.search(handle_, plan_.get(), &alpha, weight, x, &beta, product, product, workspace, &stream, 1),
        "cusparseLtMatmulSearch");
    counts().searches += 1;
    return {get(kAlgorithm), get(kSplitK), get(kSplitKMode)};
  }

 private:
  void set(SelectionAttribute attribute, int value) {
    api_.check(api_.set_selection(handle_, selection_.get(), attribute, &value, sizeof value), "cusparseLtMatmulAlgSetAttribute");
  }
  int get(SelectionAttribute attribute) const {
    int value = 0;
    api_.check(api_.get_selection(handle_, selection_.get(), attribute, &value, sizeof value), "cusparseLtMatmulAlgGetAttribute");
    return value;
  }

  const Api& api_;
  const Opaque* handle_;
  Object weight_{api_.destroy_matrix}, x_{api_.destroy_matrix}, product_{api_.destroy_matrix};
  Opaque matmul_ = {};  // the library has no function to destroy one
  Object selection_{api_.destroy_selection}, plan_{api_.destroy_plan};
};

// The plans of one thread for one device; the library binds a handle to both.
class Plans {
 public:
  explicit Plans(const Api& api) : api_(api) {
    handle_.make([&](Opaque* handle) { api.check(api.init(handle), "cusparseLtInit"); });
  }

  std::optional<Algorithm> algorithm(const Problem& problem) const {
    const auto found = algorithms_.find(shape(problem));
    return found == algorithms_.end() ? std::nullopt : std::optional<Algorithm>(found->second);
  }
  void remember(const Problem& problem, const Algorithm& algorithm) { algorithms_[shape(problem)] = algorithm; }

  std::unique_ptr<Plan> make(const Problem& problem, const Algorithm& algorithm) const {
    return std::make_unique<Plan>(api_, handle_.get(), problem, algorithm);
  }

  Plan& get(const Problem& problem, const Algorithm& algorithm) {
    const Key key{problem.type, problem.out_features, problem.in_features, problem.tokens, problem.bias, algorithm.key()};
    const auto found = plans_.find(key);
    if (found != plans_.end()) return *found->second;
    if (plans_.size() >= kMostPlans) plans_.clear();
    return *(plans_[key] = make(problem, algorithm));
  }

 private:
  static constexpr size_t kMostPlans = 1024;
  using Key = std::tuple<int, int64_t, int64_t, int64_t, const void*, std::tuple<int, int, int>>;
  using Shape = std::tuple<int, int64_t, int64_t, int, bool>;

  // Numbers of tokens up to the next power of two share an algorithm, so that prompts of any length cost at most a dozen searches.
  static Shape shape(const Problem& problem) {
    int power = 0;
    while (int64_t{1} << power < problem.tokens) ++power;
    return {problem.type, problem.out_features, problem.in_features, power, problem.bias != nullptr};
  }

  const Api& api_;
  Object handle_{api_.destroy};
  std::map<Shape, Algorithm> algorithms_;
  std::map<Key, std::unique_ptr<Plan>> plans_;  // destroyed before the handle
};

inline Plans& plans_of(int device) {
  thread_local std::map<int, Plans> devices;
  return devices.try_emplace(device, api()).first->second;
}

}  // namespace sparsekern::cusparselt
