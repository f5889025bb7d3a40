// The stack of a fiber, and the switch to it and back.
//
// The C library's swapcontext makes two system calls, and AddressSanitizer clears the shadow of the whole stack: 12 us per switch.
// A dozen instructions do the same on architectures for which they are written here; others use swapcontext.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace simt {

constexpr size_t kStackBytes = 128 * 1024;

#ifdef __x86_64__

struct Context {
  void* top = nullptr;
};

// Saves the callee-saved registers on the current stack, stores its top, and continues where `next` stopped.
__attribute__((naked, noinline, no_sanitize("address", "undefined"))) inline void switch_stacks(void** /*top*/, void* /*next*/) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\t"
      "ret");
}

inline void switch_contexts(Context& from, Context& to) { switch_stacks(&from.top, to.top); }

// `begin` must never return.
inline void prepare(Context& context, char* memory, void (*begin)()) {
  constexpr size_t kSaved = 6;
  // The return address, and above it one word: a function is entered with its stack eight bytes off a multiple of sixteen.
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + kStackBytes) / 16 * 16;
  void** top = reinterpret_cast<void**>(end - 16 - kSaved * sizeof(void*));
  for (size_t i = 0; i < kSaved; ++i) top[i] = nullptr;
  top[kSaved] = reinterpret_cast<void*>(begin);
  top[kSaved + 1] = nullptr;
  context.top = top;
}

#else

struct Context {
  ucontext_t context;
};

inline void switch_contexts(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

inline void prepare(Context& context, char* memory, void (*begin)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = memory;
  context.context.uc_stack.ss_size = kStackBytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, begin, 0);
}

#endif

class Stack {
 public:
  // `begin` runs when the stack is first entered, and must never return.
  static Stack take(void (*begin)()) {
    Stack stack;
    if (unused().empty()) {
      stack.memory_.reset(new char[kStackBytes]);
    } else {
      stack.memory_ = std::move(unused().back());
      unused().pop_back();
    }
    stack.own_ = std::make_unique<Context>();
    prepare(*stack.own_, stack.memory_.get(), begin);
    return stack;
  }

  void enter(Context& from) { switch_contexts(from, *own_); }
  void leave(Context& to) { switch_contexts(*own_, to); }

  // Returns the stack of a finished fiber for reuse. Others are discarded, with what AddressSanitizer knows of their variables.
  void give_back() { unused().push_back(std::move(memory_)); }

 private:
  static std::vector<std::unique_ptr<char[]>>& unused() {
    static std::vector<std::unique_ptr<char[]>> stacks;
    return stacks;
  }

  std::unique_ptr<char[]> memory_;
  std::unique_ptr<Context> own_;
};

}  // namespace simt
