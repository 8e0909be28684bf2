// A fiber: a function on its own stack that runs until it suspends, known to AddressSanitizer.
//
// On x86-64 a switch saves the callee-saved registers by hand, because swapcontext makes a system
// call each time; elsewhere ucontext serves.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <utility>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

#if defined(__x86_64__)

struct Context {
  void* stack_pointer = nullptr;
};

__attribute__((naked, noinline, unused)) static void switch_stack(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}

inline void start_context(Context& context, char* stack, size_t size, void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>(stack + size);
  *--top = 0;  // where entry's return address would be, which also aligns the stack for it
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  context.stack_pointer = top;
}

inline void switch_context(Context& from, Context& to) {
  switch_stack(&from.stack_pointer, to.stack_pointer);
}

#else

using Context = ucontext_t;

inline void start_context(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

#endif

class Fiber {
 public:
  // `body` runs once for each time that the fiber is resumed after it returned.
  explicit Fiber(std::function<void()> body) : body_(std::move(body)) {
    void* memory =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stack_ = static_cast<char*>(memory);
    start_context(context_, stack_, kStack, &Fiber::entry);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStack);
#endif
    munmap(stack_, kStack);
  }

  // From the scheduler: runs until the fiber suspends or its body returns.
  void resume() {
    running() = this;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, kStack);
#endif
    switch_context(caller_, context_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // From the fiber: back to the scheduler.
  void suspend() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, caller_stack_, caller_size_);
#endif
    switch_context(context_, caller_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &caller_stack_, &caller_size_);
#endif
  }

 private:
  static constexpr size_t kStack = 256 * 1024;

  static Fiber*& running() {
    static Fiber* fiber = nullptr;
    return fiber;
  }

  static void entry() {
    Fiber* fiber = running();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &fiber->caller_stack_, &fiber->caller_size_);
#endif
    for (;;) {
      fiber->body_();
      fiber->suspend();
    }
  }

  std::function<void()> body_;
  Context context_, caller_;
  char* stack_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_size_ = 0;
};

}  // namespace emulator
