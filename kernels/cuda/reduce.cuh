/** Sums and maxima over a warp and over a block. The order of additions depends on the size of the block alone, and every
 *  thread gets the same bits, so that a row's result depends on nothing but the row (row invariance, ARCHITECTURE.md). */
#pragma once

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
/** Warps of the largest block. */
constexpr int kMaxWarps = 32;

/** Sum over the warp, the same in all lanes: in each step both lanes of a pair add the same two numbers. */
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
    return value;
}

/** Maximum over the warp, the same in all lanes. NaN loses. */
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lanes));
    return value;
}

/** Sum over a block of whole warps, the same in all threads: warps first, then their sums in order. `partial` is shared and
 *  may be used again behind the next barrier. */
__device__ __forceinline__ float block_sum(float value, float (&partial)[kMaxWarps]) {
    const int warp = threadIdx.x / kLanes, num_warps = blockDim.x / kLanes;
    value = warp_sum(value);
    if (threadIdx.x % kLanes == 0) partial[warp] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < num_warps; i++) sum += partial[i];
    return sum;
}
