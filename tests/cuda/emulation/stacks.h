// Stacks of one thread that take turns. swapcontext asks the kernel for the signal mask at every
// turn, two thirds of an emulated kernel's time; on x86-64 nothing but the registers is exchanged.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

// begin: a stack whose first turn calls `run`, which never returns.
// change: leaves this stack at `from`, and goes on where `to` was left.
#if defined(__x86_64__)

using Place = void**;  // the top of a stack that waits

extern "C" void lwkd_change(Place* from, Place to);
asm(R"(
.text
.type lwkd_change, @function
lwkd_change:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size lwkd_change, .-lwkd_change
)");

inline void begin(Place& place, char* stack, size_t size, void (*run)()) {
  place = reinterpret_cast<Place>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t{15});
  *--place = nullptr;  // the return address of `run`, and the alignment that a call leaves
  *--place = reinterpret_cast<void*>(run);
  place -= 6;  // registers
}

inline void change(Place& from, const Place& to) { lwkd_change(&from, to); }

#else

using Place = ucontext_t;

inline void begin(Place& place, char* stack, size_t size, void (*run)()) {
  getcontext(&place);
  place.uc_stack.ss_sp = stack;
  place.uc_stack.ss_size = size;
  place.uc_link = nullptr;
  makecontext(&place, run, 0);
}

inline void change(Place& from, const Place& to) { swapcontext(&from, &to); }

#endif

}  // namespace emulator
