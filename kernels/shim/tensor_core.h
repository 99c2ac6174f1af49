/** The twins of ptx.cuh: what each of its instructions does, over all lanes of a warp. */
#pragma once

#include <algorithm>

#include "block.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace cpu {

/** Makes the copies of all but the newest `allowed` groups arrive. */
inline void land_copies(size_t allowed) {
    Thread* me = B->current;
    if (me->group_ends.size() <= allowed) return;
    const size_t num_groups = me->group_ends.size() - allowed;
    const size_t num_copies = me->group_ends[num_groups - 1];
    for (size_t i = 0; i < num_copies; i++) {
        const AsyncCopy& copy = me->copies[i];
        memset(copy.target, 0, 16);
        if (copy.bytes > 0) memcpy(copy.target, copy.source, copy.bytes);
    }
    me->copies.erase(me->copies.begin(), me->copies.begin() + num_copies);
    me->group_ends.erase(me->group_ends.begin(), me->group_ends.begin() + num_groups);
    for (size_t& end : me->group_ends) end -= num_copies;
}

}  // namespace cpu

namespace cpu {

/** `d += a b` with a `[16, 16]`, b `[16, 8]`, d `[16, 8]` in the lanes as PTX ISA 9.7.14.5.8 draws them. All sixteen
 *  products and d are added before anything is rounded, as far as a double goes, so that the order of k does not show. Whether that is
 *  so on a device nobody relies on but sm90_matmul.cu, and the device is asked first. `widen` turns 16 bits into a float. */
template <class Widen>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Widen widen) {
    struct In { uint32_t a[4], b[2]; float d[4]; };
    struct Out { float d[4]; };
    In in;
    memcpy(in.a, a, sizeof in.a);
    memcpy(in.b, b, sizeof in.b);
    memcpy(in.d, d, sizeof in.d);
    const Out result = collective<In, Out>(~0u, in, [widen](In* in, Out* out) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; lane++) {
            const int group = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; i++) {
                const int row = group + i % 2 * 8, k = 2 * t + i / 2 * 8;
                a[row][k] = widen(static_cast<uint16_t>(in[lane].a[i]));
                a[row][k + 1] = widen(static_cast<uint16_t>(in[lane].a[i] >> 16));
            }
            for (int i = 0; i < 2; i++) {
                const int k = 2 * t + i * 8;
                b[k][group] = widen(static_cast<uint16_t>(in[lane].b[i]));
                b[k + 1][group] = widen(static_cast<uint16_t>(in[lane].b[i] >> 16));
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
                double sum = in[lane].d[i];
                for (int k = 0; k < 16; k++) sum += static_cast<double>(a[row][k]) * b[k][column];
                out[lane].d[i] = static_cast<float>(sum);
            }
        }
    });
    memcpy(d, result.d, sizeof result.d);
}

}  // namespace cpu

/** `d += a b` of bf16. */
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    cpu::mma_m16n8k16(d, a, b, [](uint16_t bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); });
}
/** `d += a b` of f16. */
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    cpu::mma_m16n8k16(d, a, b, [](uint16_t bits) { return __half2float(__ushort_as_half(bits)); });
}

/** `d = a b` of signed bytes: a `[16, 32]`, b `[32, 8]`, in the lanes as PTX ISA 9.7.14.5.10 draws them; exact. */
inline void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct In { uint32_t a[4], b[2]; };
    struct Out { int d[4]; };
    In in;
    memcpy(in.a, a, sizeof in.a);
    memcpy(in.b, b, sizeof in.b);
    const Out result = cpu::collective<In, Out>(~0u, in, [](In* in, Out* out) {
        int8_t a[16][32], b[32][8];
        for (int lane = 0; lane < 32; lane++) {
            const int group = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; i++) memcpy(&a[group + i % 2 * 8][4 * t + i / 2 * 16], &in[lane].a[i], 4);
            for (int i = 0; i < 2; i++) {
                int8_t bytes[4];
                memcpy(bytes, &in[lane].b[i], 4);
                for (int j = 0; j < 4; j++) b[4 * t + i * 16 + j][group] = bytes[j];
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
                int sum = 0;
                for (int k = 0; k < 32; k++) sum += a[row][k] * b[k][column];
                out[lane].d[i] = sum;
            }
        }
    });
    memcpy(d, result.d, sizeof result.d);
}

namespace cpu {

struct MatrixRows { uint32_t words[4]; };

/** Lanes 8m to 8m + 7 point to the rows of matrix m. */
template <bool transposed>
inline void load_matrices(uint32_t (&words)[4], const void* row, int num_matrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix from an address that is no multiple of 16");
    const MatrixRows result = collective<const void*, MatrixRows>(~0u, row, [=](const void** rows, MatrixRows* out) {
        for (int m = 0; m < num_matrices; m++) {
            uint16_t matrix[8][8];
            for (int i = 0; i < 8; i++) memcpy(matrix[i], rows[8 * m + i], 16);
            for (int lane = 0; lane < 32; lane++) {
                const int group = lane / 4, t = lane % 4;
                const uint32_t low = transposed ? matrix[2 * t][group] : matrix[group][2 * t];
                const uint32_t high = transposed ? matrix[2 * t + 1][group] : matrix[group][2 * t + 1];
                out[lane].words[m] = low | high << 16;
            }
        }
    });
    memcpy(words, result.words, 4 * num_matrices);
}

}  // namespace cpu

/** Four matrices of 8 x 8 16-bit numbers, row `lane % 8` of matrix `lane / 8` at `row`. */
inline void ldmatrix_x4(uint32_t (&words)[4], const void* row) { cpu::load_matrices<false>(words, row, 4); }
/** The same, each matrix transposed. */
inline void ldmatrix_x4_transposed(uint32_t (&words)[4], const void* row) {
    cpu::load_matrices<true>(words, row, 4);
}

/** Copies the first `bytes` of 16 to shared memory and fills the rest with zeros, in the background. */
inline void cp_async_16(void* target, const void* source, int bytes = 16) {
    if (reinterpret_cast<uintptr_t>(target) % 16 != 0) cpu::fail("cp.async to an address that is no multiple of 16");
    if (reinterpret_cast<uintptr_t>(source) % 16 != 0) cpu::fail("cp.async from an address that is no multiple of 16");
    if (cpu::B->landing == cpu::AT_ONCE) {
        memset(target, 0, 16);
        if (bytes > 0) memcpy(target, source, bytes);
        return;
    }
    memset(target, cpu::kPoison, 16);
    cpu::B->current->copies.push_back({target, source, bytes});
}

/** Ends a group of copies. */
inline void cp_async_commit() {
    cpu::Thread* me = cpu::B->current;
    me->group_ends.push_back(me->copies.size());
}

/** Waits until at most `allowed` groups of this thread are under way. */
template <int allowed>
inline void cp_async_wait() { cpu::land_copies(allowed); }

/** 16 bytes that are read once and should not push others out of the caches. */
inline uint4 load_streaming(const void* source) {
    if (reinterpret_cast<uintptr_t>(source) % 16 != 0) cpu::fail("a load from an address that is no multiple of 16");
    uint4 value;
    memcpy(&value, source, sizeof value);
    return value;
}

/** The same of 8 bytes. */
inline uint2 load_streaming_8(const void* source) {
    if (reinterpret_cast<uintptr_t>(source) % 8 != 0) cpu::fail("a load from an address that is no multiple of 8");
    uint2 value;
    memcpy(&value, source, sizeof value);
    return value;
}

/** Waits until the kernel in front has run, if this block was begun before; a thread that never asks is found out. */
inline void wait_for_kernels_before() { cpu::wait_for_kernels_before(); }

/** `2^x`; a GPU's is off by about 2 units in the last place. Results below the normal numbers are 0. */
inline float exp2_approx(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
