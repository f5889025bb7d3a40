// Runs the body of a CUDA kernel on a CPU, for tests: this file takes the place of the toolkit's <cuda_runtime.h>, so a .cu file
// that launches by cuda/launch.h compiles with any C++ compiler. Blocks run one after the other; the threads of a block are fibers
// that give way at __syncthreads. Fibers run in the order that `simt::reversed` says: a kernel whose result depends on it lacks a
// barrier. Every thread of a block must come to the same barriers, which is checked.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time, so one copy is enough
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

inline bool reversed = false;

class Block {
 public:
  Block(dim3 index, const std::function<void()>& body) : body_(body) {
    blockIdx = index;
    for (unsigned z = 0; z < blockDim.z; ++z) {
      for (unsigned y = 0; y < blockDim.y; ++y) {
        for (unsigned x = 0; x < blockDim.x; ++x) fibers_.push_back(start(dim3(x, y, z)));
      }
    }
  }

  void run() {
    running_ = this;
    for (size_t finished = 0; finished == 0;) {
      for (size_t i = 0; i < fibers_.size(); ++i) {
        current_ = fibers_[reversed ? fibers_.size() - 1 - i : i].get();
        threadIdx = current_->index;
        swapcontext(&scheduler_, &current_->context);
        finished += current_->finished;
      }
      if (finished != 0 && finished != fibers_.size()) {
        throw std::logic_error("some threads of a block left the kernel while others wait at __syncthreads");
      }
    }
  }

  static void synchronize() { swapcontext(&running_->current_->context, &running_->scheduler_); }

 private:
  static constexpr size_t kStack = 64 * 1024;
  struct Fiber {
    dim3 index;
    ucontext_t context;
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
    bool finished = false;
  };

  std::unique_ptr<Fiber> start(dim3 index) {
    auto fiber = std::make_unique<Fiber>();
    fiber->index = index;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = &scheduler_;
    makecontext(&fiber->context, &Block::enter, 0);
    return fiber;
  }

  static void enter() {
    running_->body_();
    running_->current_->finished = true;
  }

  static inline Block* running_ = nullptr;
  const std::function<void()>& body_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* current_ = nullptr;
  ucontext_t scheduler_;
};

}  // namespace simt

inline void __syncthreads() { simt::Block::synchronize(); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const std::function<void()> body = [&] { kernel(arguments...); };
  const dim3 grid = config->gridDim;
  gridDim = grid;
  blockDim = config->blockDim;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) simt::Block(dim3(x, y, z), body).run();
    }
  }
  return cudaSuccess;
}
