/** Instructions of compute capability 9.0 (Hopper), one function each: barriers in shared memory that count bytes, copies of tiles
 *  by the tensor memory accelerator, and products of a warpgroup. Sections are those of the PTX ISA, version 9.0; the CPU shim's
 *  twins are in kernels/shim/wgmma.h. */
#pragma once

#include "ptx.cuh"

/** Threads of a warpgroup: four warps, the first of which has a number that is a multiple of four. */
constexpr int kWarpgroupThreads = 128;
/** A tile's rows are 128 bytes, and its pieces of 16 bytes lie permuted within each eight of them: in row r piece p lies at p ^ r % 8.
 *  Where this pattern begins is a multiple of its size. */
constexpr int kTileRowBytes = 128;
constexpr int kSwizzleBytes = 8 * kTileRowBytes;

/** How the tensor cores find a tile in shared memory (9.7.15.5.1.2.2, Matrix Descriptor Format), K-major with swizzling of 128 bytes:
 *
 *      bits  0..13   address / 16, of its low 18 bits
 *      bits 16..29   leading dimension offset / 16: not used when swizzled, 1 (9.7.15.5.1.2.1.1)
 *      bits 32..45   stride dimension offset / 16: from eight rows to the next eight (9.7.15.5.1.2.1.2)
 *      bits 49..51   base offset: 0, since the pattern begins at a multiple of its size
 *      bits 62..63   swizzling: 1 is 128 bytes
 *
 *  Sixteen columns further is 32 bytes further: the address is permuted as a whole, after everything is added. */
__host__ __device__ __forceinline__ constexpr uint64_t tile_descriptor(uint32_t address) {
#ifdef PLANT_WRONG_DESCRIPTOR
    constexpr int kEightRows = kTileRowBytes;
#else
    constexpr int kEightRows = kSwizzleBytes;
#endif
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | 1ull << 16 | static_cast<uint64_t>(kEightRows >> 4) << 32 |
           1ull << 62;
}

#ifndef CUDA_CPU
/** What cuTensorMapEncodeTiled makes of a matrix; a kernel's parameter, `__grid_constant__`, because copies read it in place. */
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

/** Makes a barrier whose phase ends after so many arrivals (9.7.13.15.9, mbarrier.init). */
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

/** Lets copies, too, see barriers that this thread made (9.7.13.4, fence.mbarrier_init and fence.proxy.async); a `__syncthreads`
 *  follows for the other threads. */
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/** Arrives, and lets the phase wait for so many bytes of copies (9.7.13.15.13, mbarrier.arrive.expect_tx). */
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

/** Arrives (9.7.13.15.13, mbarrier.arrive). */
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/** Waits until the last phase of this parity has ended; the first phase has parity 0, and one of parity 1 ended before it
 *  (9.7.13.15.16, mbarrier.try_wait). */
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t has_ended = 0;
    while (has_ended == 0) {
        asm volatile(
            "{\n"
            ".reg .pred ended;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
            "selp.u32 %0, 1, 0, ended;\n"
            "}"
            : "=r"(has_ended)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    }
}

/** Starts copying the map's tile at column `column` and row `row` to shared memory, zeros standing for what is outside of the matrix;
 *  the barrier counts its bytes (9.7.9, cp.async.bulk.tensor). */
__device__ __forceinline__ void copy_tile(void* target, const TensorMap& map, int column, int row, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(target)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

/** Loads the map ahead of its first use (9.7.9, prefetch.tensormap). */
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/** Orders what the warpgroup did with its registers before the products that follow (9.7.15.7.1, wgmma.fence). */
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/** Ends a group of products (9.7.15.7.2, wgmma.commit_group). */
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/** Waits until at most `allowed` groups of the warpgroup are under way (9.7.15.7.3, wgmma.wait_group). */
template <int allowed>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(allowed) : "memory");
}

// Operands %0..%63 and their constraints: the sums of a thread.
#define SM90_EIGHT(d, i)                                                                                        \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define SM90_SUMS(d)                                                                                         \
    SM90_EIGHT(d, 0), SM90_EIGHT(d, 8), SM90_EIGHT(d, 16), SM90_EIGHT(d, 24), SM90_EIGHT(d, 32), SM90_EIGHT(d, 40), \
        SM90_EIGHT(d, 48), SM90_EIGHT(d, 56)

/** Waits for all groups; behind it the sums may be read. */
__device__ __forceinline__ void wgmma_wait_all(float (&sums)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : SM90_SUMS(sums)::"memory");
}

/** `sums = x w` or, if `adds`, `sums += x w`, under way when it returns: x `[64, 16]`, w `[128, 16]` of bf16 by their descriptors
 *  (9.7.15.5.2, wgmma.mma_async). Warp i of the warpgroup has rows 16 i ..; sums 4 j .. 4 j + 3 of a lane are those that
 *  mma.m16n8k16 gives it for features 8 j .. 8 j + 7 (9.7.15.5.1.1.1). */
__device__ __forceinline__ void wgmma_m64n128k16_bf16(float (&sums)[64], uint64_t x, uint64_t w, bool adds) {
    asm volatile(
        "{\n"
        ".reg .pred adds;\n"
        "setp.ne.b32 adds, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
        "%62,%63}, %64, %65, adds, 1, 1, 0, 0;\n"  // neither operand negated, both K-major
        "}"
        : SM90_SUMS(sums)
        : "l"(x), "l"(w), "r"(static_cast<int>(adds)));
}
#undef SM90_SUMS
#undef SM90_EIGHT
#endif
