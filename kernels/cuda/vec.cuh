/** Loads and stores of 16 bytes, and the bf16 and f16 numbers in them. Addresses are multiples of the size. */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;

/** bf16 numbers in 16 bytes. */
constexpr int kBf16PerVector = 8;

__device__ __forceinline__ uint4 load_16_bytes(const void* source) { return *reinterpret_cast<const uint4*>(source); }
__device__ __forceinline__ uint2 load_8_bytes(const void* source) { return *reinterpret_cast<const uint2*>(source); }
__device__ __forceinline__ void store_16_bytes(void* target, uint4 value) { *reinterpret_cast<uint4*>(target) = value; }

__device__ __forceinline__ float4 load_float4(const float* source) { return *reinterpret_cast<const float4*>(source); }
__device__ __forceinline__ void store_float4(float* target, float4 value) { *reinterpret_cast<float4*>(target) = value; }

/** The two numbers of a pair; the first lies in the lower half. */
__device__ __forceinline__ float2 unpack_bf16(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

/** Rounds to nearest even. */
__device__ __forceinline__ uint32_t pack_bf16(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return static_cast<uint32_t>(__bfloat16_as_ushort(pair.x)) |
           static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}

/** Eight bf16 numbers as floats. */
__device__ __forceinline__ void unpack_bf16x8(uint4 vector, float (&values)[8]) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = unpack_bf16(words[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
    }
}

/** Eight floats as bf16 numbers. */
__device__ __forceinline__ uint4 pack_bf16x8(const float (&values)[8]) {
    return make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]),
                      pack_bf16(values[6], values[7]));
}
