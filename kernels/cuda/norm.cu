/** RMSNorm of rows (Zhang & Sennrich 2019, arXiv:1910.07467): `x / sqrt(mean(x^2) + eps) * weight`; and LayerNorm (Ba et al. 2016,
 *  arXiv:1607.06450): `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`.
 *
 *  | kernel | reads | writes |
 *  | --- | --- | --- |
 *  | rms_norm_bf16 | x f32 `[rows, width]`, weight f32 `[width]` | out bf16 `[rows, width]`, what products read |
 *  | rms_norm_f32 | the same | out f32 `[rows, width]` |
 *  | layer_norm_bf16 | x f32 `[rows, width]`, weight, bias f32 `[width]` | out bf16 `[rows, width]` |
 *  | layer_norm_f32 | the same | out f32 `[rows, width]` |
 *  | layer_norm_both | the same | normed f32 and out bf16, both `[rows, width]`: a residual stream that is normed itself |
 *
 *  One block a row (`blockIdx.x`); thread t has the vectors of four t, t + blockDim.x, .. The row is read twice (of LayerNorm three times:
 *  the variance is summed around the mean, which loses no bits), but for the first time from the L1 cache. The block's size must depend
 *  on the width alone: it fixes the order of the sum.
 *
 *  There is no sum in front of a norm: the product that ends a block adds to the residual stream where it writes it.
 *
 *  Limits: width is a multiple of 4; rows are aligned to 16 bytes.
 *
 *  Expected on an H200 (4.3 TB/s): 6 bytes an element. 16 rows of 4096 are 0.4 MB: bound by the launch, about 3 us; 8192 rows
 *  are 201 MB: 47 us. 2048 threads an SM. */
#include "ptx.cuh"
#include "reduce.cuh"
#include "vec.cuh"

/** Four numbers of a row in the form of the output. */
__device__ __forceinline__ void store_normed(bf16* out, float4 v) {
    *reinterpret_cast<uint2*>(out) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}
__device__ __forceinline__ void store_normed(float* out, float4 v) { store_float4(out, v); }

/** Writes the norm of the block's row; `sum_of_squares` is that of the whole row. */
template <class Out>
__device__ __forceinline__ void store_row(const float* x, const float* weight, Out* out, int width, float eps,
                                          float sum_of_squares) {
    const float factor = 1.0f / sqrtf(sum_of_squares / width + eps);
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
        const float4 v = load_float4(x + i), w = load_float4(weight + i);
        store_normed(out + i, make_float4(v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z, v.w * factor * w.w));
    }
}

__device__ __forceinline__ float add_squares(float sum, float4 v) {
    return sum + v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
}

template <class Out>
__device__ __forceinline__ void rms_norm(const float* x, const float* weight, Out* out, int width, float eps,
                                         float (&partial)[kMaxWarps]) {
#ifndef PLANT_EARLY_READ
    wait_for_kernels_before();
#endif
    const size_t row = static_cast<size_t>(blockIdx.x) * width;
    float sum = 0.0f;
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) sum = add_squares(sum, load_float4(x + row + i));
#ifdef PLANT_EARLY_READ
    wait_for_kernels_before();
#endif
    store_row(x + row, weight, out + row, width, eps, block_sum(sum, partial));
}

extern "C" __global__ void __launch_bounds__(1024) rms_norm_bf16(
    const float* x, const float* __restrict__ weight, bf16* __restrict__ out, int width, float eps) {
    __shared__ float partial[kMaxWarps];
    rms_norm(x, weight, out, width, eps, partial);
}

extern "C" __global__ void __launch_bounds__(1024) rms_norm_f32(
    const float* x, const float* __restrict__ weight, float* __restrict__ out, int width, float eps) {
    __shared__ float partial[kMaxWarps];
    rms_norm(x, weight, out, width, eps, partial);
}

/** Writes the LayerNorm of the block's row: `store(i, v)` gets the four numbers from `i` on. */
template <class Store>
__device__ __forceinline__ void layer_norm(const float* x, const float* weight, const float* bias, int width, float eps,
                                           float (&partial)[2][kMaxWarps], Store store) {
    wait_for_kernels_before();
    float sum = 0.0f;
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
        const float4 v = load_float4(x + i);
        sum = sum + v.x + v.y + v.z + v.w;
    }
    const float mean = block_sum(sum, partial[0]) / width;
    float squares = 0.0f;
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
        const float4 v = load_float4(x + i);
        squares = add_squares(squares, make_float4(v.x - mean, v.y - mean, v.z - mean, v.w - mean));
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, partial[1]) / width + eps);
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
        const float4 v = load_float4(x + i), w = load_float4(weight + i), b = load_float4(bias + i);
        store(i, make_float4((v.x - mean) * factor * w.x + b.x, (v.y - mean) * factor * w.y + b.y,
                             (v.z - mean) * factor * w.z + b.z, (v.w - mean) * factor * w.w + b.w));
    }
}

extern "C" __global__ void __launch_bounds__(1024) layer_norm_bf16(
    const float* x, const float* __restrict__ weight, const float* __restrict__ bias, bf16* __restrict__ out,
    int width, float eps) {
    __shared__ float partial[2][kMaxWarps];
    const size_t row = static_cast<size_t>(blockIdx.x) * width;
    layer_norm(x + row, weight, bias, width, eps, partial, [&](int i, float4 v) { store_normed(out + row + i, v); });
}

extern "C" __global__ void __launch_bounds__(1024) layer_norm_f32(
    const float* x, const float* __restrict__ weight, const float* __restrict__ bias, float* __restrict__ out,
    int width, float eps) {
    __shared__ float partial[2][kMaxWarps];
    const size_t row = static_cast<size_t>(blockIdx.x) * width;
    layer_norm(x + row, weight, bias, width, eps, partial, [&](int i, float4 v) { store_normed(out + row + i, v); });
}

extern "C" __global__ void __launch_bounds__(1024) layer_norm_both(
    const float* x, const float* __restrict__ weight, const float* __restrict__ bias,
    float* __restrict__ normed, bf16* __restrict__ out, int width, float eps) {
    __shared__ float partial[2][kMaxWarps];
    const size_t row = static_cast<size_t>(blockIdx.x) * width;
    layer_norm(x + row, weight, bias, width, eps, partial, [&](int i, float4 v) {
        store_normed(normed + row + i, v);
        store_normed(out + row + i, v);
    });
}
