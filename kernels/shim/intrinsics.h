/** CUDA's built-in functions: warp collectives, atomics, bits, and arithmetic with stated rounding. */
#pragma once

#include <math.h>

#include <cmath>

#include "block.h"

inline void __syncwarp(uint32_t mask = ~0u) {
    cpu::collective<char, char>(mask, 0, [](char*, char*) {});
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
    return cpu::collective<T, T>(mask, value, [lanes](T* in, T* out) {
        for (int lane = 0; lane < 32; lane++) out[lane] = in[lane ^ lanes];
    });
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
    struct In { T value; int source; };
    return cpu::collective<In, T>(mask, In{value, source}, [](In* in, T* out) {
        for (int lane = 0; lane < 32; lane++) out[lane] = in[in[lane].source & 31].value;
    });
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta) {
    return cpu::collective<T, T>(mask, value, [delta](T* in, T* out) {
        for (int lane = 0; lane < 32; lane++) out[lane] = in[lane + delta < 32 ? lane + delta : lane];
    });
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, int delta) {
    return cpu::collective<T, T>(mask, value, [delta](T* in, T* out) {
        for (int lane = 0; lane < 32; lane++) out[lane] = in[lane >= delta ? lane - delta : lane];
    });
}

inline unsigned __ballot_sync(uint32_t mask, int predicate) {
    return cpu::collective<int, unsigned>(mask, predicate, [](int* in, unsigned* out) {
        unsigned ballot = 0;
        for (int lane = 0; lane < 32; lane++) ballot |= (in[lane] != 0 ? 1u : 0u) << lane;
        for (int lane = 0; lane < 32; lane++) out[lane] = ballot;
    });
}

inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) {
    return __ballot_sync(mask, !predicate) == 0;
}

inline int __syncthreads_or(int predicate) {
    cpu::B->votes |= predicate != 0;
    cpu::barrier();
    const int any = cpu::B->votes;
    cpu::barrier();
    cpu::B->votes = 0;
    cpu::barrier();
    return any;
}

template <class T>
T atomicAdd(T* target, T value) { T old = *target; *target = old + value; return old; }
template <class T>
T atomicMax(T* target, T value) { T old = *target; *target = old > value ? old : value; return old; }
template <class T>
T atomicExch(T* target, T value) { T old = *target; *target = value; return old; }
template <class T>
T atomicOr(T* target, T value) { T old = *target; *target = old | value; return old; }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* source) { return *source; }
template <class T>
T __ldcg(const T* source) { return *source; }

template <class To, class From>
To shim_bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline uint32_t __float_as_uint(float x) { return shim_bit_cast<uint32_t>(x); }
inline int __float_as_int(float x) { return shim_bit_cast<int>(x); }
inline float __uint_as_float(uint32_t x) { return shim_bit_cast<float>(x); }
inline float __int_as_float(int x) { return shim_bit_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }

inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

/** `sum + a . b` over four signed bytes. */
inline int __dp4a(int a, int b, int sum) {
    for (int byte = 0; byte < 4; byte++) {
        sum += static_cast<int8_t>(a >> 8 * byte) * static_cast<int8_t>(b >> 8 * byte);
    }
    return sum;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
