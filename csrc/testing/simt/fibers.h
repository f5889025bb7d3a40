// Threads of CUDA blocks as fibers of one CPU thread: one runs at a time, and gives way where CUDA threads wait for each other.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/stack.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr unsigned kWarp = 32;

// The order in which runnable threads run. A kernel whose result depends on it lacks a barrier.
enum class Order { forward, reversed };
inline Order order =
    std::getenv("SPARSEKERN_SIMT_ORDER") != nullptr && std::strcmp(std::getenv("SPARSEKERN_SIMT_ORDER"), "reversed") == 0
        ? Order::reversed
        : Order::forward;

// A meeting of the lanes named by a mask: each brings a word and reads those of the others. There are two buffers, because a lane
// may reach the next meeting while another still reads from this one.
struct Meeting {
  uint64_t words[2][kWarp] = {};
  unsigned arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  std::map<unsigned, Meeting> meetings;  // by mask
  unsigned finished = 0;
};

struct Block {
  dim3 index;
  size_t threads = 0;
  size_t finished = 0;
  size_t arrived = 0;  // at __syncthreads
  uint64_t generation = 0;
  int64_t tally[2] = {};  // sums of __syncthreads_count and related functions
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
};

// 16 bytes on their way to shared memory (tensor_core.h).
struct AsyncCopy {
  void* to;
  const void* from;
  unsigned group;
};

struct Fiber {
  Block* block = nullptr;
  dim3 index;
  unsigned linear = 0;
  Stack stack;
  bool finished = false;
  std::vector<AsyncCopy> copies;
  unsigned copy_groups = 0;  // that are complete: further copies belong to the next
};

// Runs blocks: one after the other, or all at once for a cooperative launch.
class Scheduler {
 public:
  explicit Scheduler(const std::function<void()>& body) : body_(body) {}

  void run(const std::vector<dim3>& blocks, size_t shared_bytes) {
    for (const dim3& index : blocks) start(index, shared_bytes);
    running = this;
    for (size_t left = fibers_.size(); left != 0;) {
      progress_ = false;
      for (size_t i = 0; i < fibers_.size(); ++i) {
        Fiber& fiber = *fibers_[order == Order::forward ? i : fibers_.size() - 1 - i];
        if (fiber.finished) continue;
        resume(fiber);
        if (!error_.empty()) throw std::logic_error(error_);
        left -= fiber.finished;
      }
      if (left != 0 && !progress_)
        throw std::logic_error("deadlock: every thread waits for one that will not come, or spins for ever");
    }
    running = nullptr;
    for (auto& fiber : fibers_) fiber->stack.give_back();
  }

  Fiber& current() { return *current_; }

  void give_way() { current_->stack.leave(main_); }

  // Notes that something has happened for which another thread may be waiting.
  void progressed() { progress_ = true; }

  // An error cannot be thrown across fibers: it is stored, and thrown from the launch.
  [[noreturn]] void fail(const std::string& what) {
    error_ = what;
    for (;;) give_way();
  }

  // Lets a thread that spins on memory give way. That counts as progress for a while, because another thread may be about to write.
  void spin() {
    if (++spins_ < kMostSpins) progress_ = true;
    give_way();
  }

  static inline Scheduler* running = nullptr;

 private:
  static constexpr uint64_t kMostSpins = 4'000'000;

  void start(dim3 index, size_t shared_bytes) {
    blocks_.push_back(std::make_unique<Block>());
    Block& block = *blocks_.back();
    block.index = index;
    block.threads = size_t{blockDim.x} * blockDim.y * blockDim.z;
    block.warps.resize((block.threads + kWarp - 1) / kWarp);
    block.shared.reset(new unsigned char[shared_bytes]);
    std::memset(block.shared.get(), 0xff, shared_bytes);  // NaN: unwritten shared memory must not pass for zeros
    for (unsigned linear = 0; linear < block.threads; ++linear) {
      fibers_.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *fibers_.back();
      fiber.block = &block;
      fiber.linear = linear;
      fiber.index = dim3(linear % blockDim.x, linear / blockDim.x % blockDim.y, linear / blockDim.x / blockDim.y);
      fiber.stack = Stack::take(&Scheduler::enter);
    }
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = fiber.index;
    blockIdx = fiber.block->index;
    fiber.stack.enter(main_);
  }

  static void enter() {
    Scheduler& scheduler = *running;
    scheduler.body_();
    Fiber& fiber = scheduler.current();
    Block& block = *fiber.block;
    fiber.finished = true;
    scheduler.progressed();
    block.finished += 1;
    block.warps[fiber.linear / kWarp].finished |= 1u << fiber.linear % kWarp;
    if (block.arrived != 0) scheduler.error_ = "some threads of a block left the kernel while others wait at __syncthreads";
    scheduler.give_way();  // forever
  }

  const std::function<void()>& body_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* current_ = nullptr;
  Context main_;
  bool progress_ = false;
  uint64_t spins_ = 0;
  std::string error_;
};

// __syncthreads; returns the sum of `brought` over the block's threads.
inline int64_t block_barrier(int64_t brought = 0) {
  Scheduler& scheduler = *Scheduler::running;
  Block& block = *scheduler.current().block;
  if (block.finished != 0) scheduler.fail("some threads of a block left the kernel while others wait at __syncthreads");
  const uint64_t generation = block.generation;
  int64_t& tally = block.tally[generation % 2];
  if (block.arrived == 0) tally = 0;
  tally += brought;
  block.arrived += 1;
  scheduler.progressed();
  if (block.arrived == block.threads) {
    block.arrived = 0;
    block.generation += 1;
  } else {
    while (block.generation == generation) scheduler.give_way();
  }
  return tally;
}

// Lets the lanes of `mask` meet: each brings a word; `read` gets all of them.
template <class Read>
auto warp_meeting(unsigned mask, uint64_t word, const Read& read) {
  Scheduler& scheduler = *Scheduler::running;
  const unsigned linear = scheduler.current().linear, lane = linear % kWarp;
  Warp& warp = scheduler.current().block->warps[linear / kWarp];
  if ((mask >> lane & 1) == 0) scheduler.fail("a lane calls a warp function with a mask that does not name it");
  if ((mask & warp.finished) != 0) scheduler.fail("a warp function waits for a lane that has left the kernel");
  const size_t lanes_here = std::min<size_t>(kWarp, scheduler.current().block->threads - linear / kWarp * kWarp);
  if (lanes_here < kWarp && mask >> lanes_here != 0) mask &= (1u << lanes_here) - 1;  // a block's last warp may be short
  Meeting& meeting = warp.meetings[mask];
  const uint64_t generation = meeting.generation;
  const auto& words = meeting.words[generation % 2];
  meeting.words[generation % 2][lane] = word;
  meeting.arrived |= 1u << lane;
  scheduler.progressed();
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    meeting.generation += 1;
  } else {
    while (meeting.generation == generation) scheduler.give_way();
  }
  return read(words, lane, mask);
}

inline void* dynamic_shared() { return Scheduler::running->current().block->shared.get(); }

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, bool cooperative, const std::function<void()>& body) {
  gridDim = grid;
  blockDim = block;
  std::vector<dim3> blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blocks.emplace_back(x, y, z);
        if (!cooperative) {
          Scheduler(body).run(blocks, shared_bytes);
          blocks.clear();
        }
      }
    }
  }
  if (cooperative) Scheduler(body).run(blocks, shared_bytes);
}

}  // namespace simt
