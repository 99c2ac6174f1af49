/** IEEE half precision as NVIDIA's header of this name declares it, as far as kernels use it. Rounds to nearest even. */
#pragma once

#include "vector_types.h"

struct __half { uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };

inline float __half2float(__half x) {
    const uint32_t sign = uint32_t{x.bits} >> 15 << 31, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff;
    if (exponent == 31) return shim_bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) {
        const float value = static_cast<float>(mantissa) * 0x1p-24f;
        return sign != 0 ? -value : value;
    }
    return shim_bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline __half __float2half_rn(float x) {
    const uint32_t bits = shim_bit_cast<uint32_t>(x), sign = bits >> 31 << 15, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {0x7fff};
    // 65520 is halfway between the largest number and what would come next.
    if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x38800000) {
        // Below 2^-14 all numbers are multiples of 2^-24: adding 0.5, whose last bit is worth that, rounds.
        const float sum = shim_bit_cast<float>(magnitude) + 0.5f;
        return {static_cast<uint16_t>(sign | (shim_bit_cast<uint32_t>(sum) - 0x3f000000))};
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13))};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
