/** Fibers: stacks that one thread switches between. Only what a System V x86-64 function must keep is kept. */
#pragma once

#include <cstddef>
#include <cstdint>

namespace cpu {

/** Bytes of a fiber's stack. Kernels keep their arrays in registers; a sanitizer's frames are the largest user. */
constexpr size_t kStackBytes = 64 << 10;

/** Saves the registers and the stack pointer of the caller in `*from` and continues where `to` was saved. */
extern "C" void shim_switch_fiber(void** from, void* to);
__asm__(
    ".text\n"
    ".weak shim_switch_fiber\n"
    ".hidden shim_switch_fiber\n"
    "shim_switch_fiber:\n"
    "  push %rbp\n"
    "  push %rbx\n"
    "  push %r12\n"
    "  push %r13\n"
    "  push %r14\n"
    "  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n"
    "  pop %r14\n"
    "  pop %r13\n"
    "  pop %r12\n"
    "  pop %rbx\n"
    "  pop %rbp\n"
    "  ret\n");

/** A stack on which the first switch enters `entry`, which never returns. */
inline void* new_fiber(unsigned char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + kStackBytes) & ~uintptr_t{15});
    *--top = nullptr;  // a function is entered with its stack 8 bytes off a multiple of 16, as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    return top;
}

}  // namespace cpu
