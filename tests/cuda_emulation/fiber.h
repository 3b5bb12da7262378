// Stacks to switch between in a few nanoseconds, where ucontext's system calls take hundreds.
#pragma once

#include <pthread.h>

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) || defined(__aarch64__)
// Pushes what a call must preserve, leaves the stack's top in *save, and returns on the stack whose top is `to`.
extern "C" __attribute__((visibility("hidden"))) void fastsparse_switch_stack(void** save, void* to);
#else
#include <ucontext.h>
#endif

namespace fastsparse::emulator {

// Where a thread of execution stands while another runs. As constructed: the thread that runs.
class Fiber {
 public:
  // To start at `entry`, which calls arrived() first and never returns.
  void prepare(void (*entry)(), char* stack, size_t bytes) {
    stack_ = stack;
    bytes_ = bytes;
#if defined(__SANITIZE_ADDRESS__)
    fake_stack_ = nullptr;
    __asan_unpoison_memory_region(stack, bytes);  // what an abandoned fiber left
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack + bytes) - 2;
    top[0] = reinterpret_cast<void*>(entry);  // where ret goes, leaving the stack as a call would
    top[1] = nullptr;
    top_ = top - 6;  // rbp, rbx, r12 to r15
#elif defined(__aarch64__)
    void** top = reinterpret_cast<void**>(stack + bytes) - 20;  // x19 to x30, d8 to d15
    top[11] = reinterpret_cast<void*>(entry);
    top_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Goes on with the other until another comes back to this one; `for_good`: none will.
  void switch_to(Fiber& other, [[maybe_unused]] bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
    if (stack_ == nullptr) find_stack();
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, other.stack_, other.bytes_);
#endif
#if defined(__x86_64__) || defined(__aarch64__)
    fastsparse_switch_stack(&top_, other.top_);
#else
    swapcontext(&context_, &other.context_);
#endif
    arrived();
  }

  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  void find_stack() {
    pthread_attr_t attributes;
    void* stack = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &bytes_);
    pthread_attr_destroy(&attributes);
    stack_ = static_cast<char*>(stack);
  }

#if defined(__x86_64__) || defined(__aarch64__)
  void* top_ = nullptr;
#else
  ucontext_t context_;
#endif
  char* stack_ = nullptr;
  size_t bytes_ = 0;
  [[maybe_unused]] void* fake_stack_ = nullptr;
};

}  // namespace fastsparse::emulator
