/** Instructions that CUDA C++ has no word for, one function each; those of Hopper are in sm90.cuh. Inline assembly lives in these
 *  two and nowhere else; the CPU shim has a twin of each function (kernels/shim/tensor_core.h, kernels/shim/wgmma.h). */
#pragma once

#ifndef CUDA_CPU
#include <stdint.h>

/** The dynamic shared memory of the block, as an array of `T` named `name`. */
#define DYNAMIC_SHARED(T, name)                                        \
    extern __shared__ __align__(16) unsigned char dynamic_shared[];    \
    T* const name = reinterpret_cast<T*>(dynamic_shared)

/** An address in shared memory as instructions take it. */
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/** `d += a b` on a tensor core: a `[16, 16]`, b `[16, 8]` of bf16, d `[16, 8]` of f32, spread over the warp. */
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/** The same of f16. */
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/** `d = a b` on a tensor core: a `[16, 32]`, b `[32, 8]` of signed bytes, d `[16, 8]` of 32-bit integers. */
__device__ __forceinline__ void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(0));
}

/** Four matrices of 8 x 8 16-bit numbers from shared memory, row `lane % 8` of matrix `lane / 8` at `row`. */
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/** The same, each matrix transposed. */
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/** Copies the first `bytes` of 16 to shared memory and fills the rest with zeros, in the background, past the L1 cache. */
__device__ __forceinline__ void cp_async_16(void* target, const void* source, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(bytes)
                 : "memory");
}

/** Ends a group of copies. */
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/** Waits until at most `allowed` groups of this thread are under way. */
template <int allowed>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(allowed) : "memory");
}

/** 16 bytes that are read once, and should push nothing out of the L1 cache. */
__device__ __forceinline__ uint4 load_streaming(const void* source) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(source));
    return value;
}

/** The same of 8 bytes. */
__device__ __forceinline__ uint2 load_streaming_8(const void* source) {
    uint2 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];"
                 : "=r"(value.x), "=r"(value.y)
                 : "l"(source));
    return value;
}

/** Every kernel calls this, in every thread, before it reads what an earlier kernel writes and before it writes anything. Where the
 *  kernel was launched before those in front of it had run (programmatic dependent launch, sm_90; device.rs) it waits until
 *  they have, and all that they wrote is seen; anywhere else it is over at once. The kernel behind may be launched from then on; not
 *  sooner, as its blocks would do nothing but take up room.
 *
 *  What an earlier kernel writes is never `const T* __restrict__`: compilers take that for memory which nobody writes, and may
 *  load it before the wait. */
__device__ __forceinline__ void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/** `2^x` to about 2 units in the last place: 1 at 0, 0 at `-inf`, and 0 for results below the normal numbers. */
__device__ __forceinline__ float exp2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
#endif
