/** RMSNorm of rows (Zhang & Sennrich 2019, arXiv:1910.07467): `x / sqrt(mean(x^2) + eps) * weight`.
 *
 *  | kernel | reads | writes |
 *  | --- | --- | --- |
 *  | rms_norm_bf16 | x f32 `[rows, width]`, weight f32 `[width]` | out bf16 `[rows, width]`, what products read |
 *  | rms_norm_f32 | the same | out f32 `[rows, width]` |
 *  | add_rms_norm_bf16 | hidden, added f32 `[rows, width]`, weight | hidden += added; out bf16 of the sum |
 *
 *  One block a row (`blockIdx.x`); thread t has the vectors of four t, t + blockDim.x, .. The row is read twice, the second
 *  time from the L1 cache. The block's size must depend on the width alone: it fixes the order of the sum.
 *
 *  Limits: width is a multiple of 4; rows are aligned to 16 bytes.
 *
 *  Expected on an H200 (4.3 TB/s): 6 bytes an element. 16 rows of 4096 are 0.4 MB: bound by the launch, about 3 us; 8192 rows
 *  are 201 MB: 47 us. 2048 threads an SM. */
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
    const size_t row = static_cast<size_t>(blockIdx.x) * width;
    float sum = 0.0f;
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) sum = add_squares(sum, load_float4(x + row + i));
    store_row(x + row, weight, out + row, width, eps, block_sum(sum, partial));
}

extern "C" __global__ void __launch_bounds__(1024) rms_norm_bf16(
    const float* __restrict__ x, const float* __restrict__ weight, bf16* __restrict__ out, int width, float eps) {
    __shared__ float partial[kMaxWarps];
    rms_norm(x, weight, out, width, eps, partial);
}

extern "C" __global__ void __launch_bounds__(1024) rms_norm_f32(
    const float* __restrict__ x, const float* __restrict__ weight, float* __restrict__ out, int width, float eps) {
    __shared__ float partial[kMaxWarps];
    rms_norm(x, weight, out, width, eps, partial);
}

extern "C" __global__ void __launch_bounds__(1024) add_rms_norm_bf16(
    float* __restrict__ hidden, const float* __restrict__ added, const float* __restrict__ weight,
    bf16* __restrict__ out, int width, float eps) {
    __shared__ float partial[kMaxWarps];
    const size_t row = static_cast<size_t>(blockIdx.x) * width;
    float sum = 0.0f;
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
        const float4 h = load_float4(hidden + row + i), a = load_float4(added + row + i);
        const float4 v = make_float4(h.x + a.x, h.y + a.y, h.z + a.z, h.w + a.w);
        store_float4(hidden + row + i, v);
        sum = add_squares(sum, v);
    }
    // Each thread reads back what it wrote itself.
    store_row(hidden + row, weight, out + row, width, eps, block_sum(sum, partial));
}
