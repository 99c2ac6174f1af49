/** The functions between two products of a feed-forward, where no product has them fused (quantized weights), and rounding to the
 *  numbers that products read.
 *
 *  | kernel | reads | writes |
 *  | --- | --- | --- |
 *  | swiglu | gate_up f32 `[rows, 2 width]`: gate, then up | out bf16 `[rows, width]` = silu(gate) * up |
 *  | swiglu_rows | the same | the same as f32, to be rounded to 8 bits |
 *  | round_rows | x f32 `[elements]` | out bf16 `[elements]` |
 *  | gelu | x f32 `[elements]`; `tanh_form` chooses the form | out bf16 `[elements]` |
 *  | gelu_rows | the same | the same as f32, to be rounded to 8 bits |
 *
 *  A thread takes 8 neighbouring numbers; blocks cover all of them along x (of both swiglu: of a row, `blockIdx.y`).
 *
 *  Limits: width and elements are multiples of 8.
 *
 *  Expected on an H200: 10 bytes an element of out; 16 rows of 12,288: the launch, about 2 us. */
#include "math.cuh"
#include "ptx.cuh"
#include "vec.cuh"

__device__ __forceinline__ void load_8_floats(const float* source, float (&values)[8]) {
    *reinterpret_cast<float4*>(values) = load_float4(source);
    *reinterpret_cast<float4*>(values + 4) = load_float4(source + 4);
}

__device__ __forceinline__ void store_8(bf16* target, const float (&values)[8]) {
    store_16_bytes(target, pack_bf16x8(values));
}
__device__ __forceinline__ void store_8(float* target, const float (&values)[8]) {
    store_float4(target, make_float4(values[0], values[1], values[2], values[3]));
    store_float4(target + 4, make_float4(values[4], values[5], values[6], values[7]));
}

template <class T>
__device__ __forceinline__ void swiglu_of(const float* gate_up, T* out, int width) {
    wait_for_kernels_before();
    const int i = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= width) return;
    const float* gate_row = gate_up + static_cast<size_t>(blockIdx.y) * 2 * width;
    alignas(16) float gate[8], up[8];
    load_8_floats(gate_row + i, gate);
    load_8_floats(gate_row + width + i, up);
#pragma unroll
    for (int j = 0; j < 8; j++) gate[j] = silu(gate[j]) * up[j];
    store_8(out + static_cast<size_t>(blockIdx.y) * width + i, gate);
}

extern "C" __global__ void __launch_bounds__(256) swiglu(
    const float* gate_up, bf16* __restrict__ out, int width) {
    swiglu_of(gate_up, out, width);
}

extern "C" __global__ void __launch_bounds__(256) swiglu_rows(
    const float* gate_up, float* __restrict__ out, int width) {
    swiglu_of(gate_up, out, width);
}

extern "C" __global__ void __launch_bounds__(256) round_rows(
    const float* x, bf16* __restrict__ out, int elements) {
    wait_for_kernels_before();
    const int i = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= elements) return;
    alignas(16) float values[8];
    load_8_floats(x + i, values);
    store_16_bytes(out + i, pack_bf16x8(values));
}

template <class T>
__device__ __forceinline__ void gelu_of(const float* x, T* out, int elements, int tanh_form) {
    wait_for_kernels_before();
    const int i = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= elements) return;
    alignas(16) float values[8];
    load_8_floats(x + i, values);
#pragma unroll
    for (int j = 0; j < 8; j++) values[j] = tanh_form != 0 ? gelu_tanh(values[j]) : gelu_erf(values[j]);
    store_8(out + i, values);
}

extern "C" __global__ void __launch_bounds__(256) gelu(
    const float* x, bf16* __restrict__ out, int elements, int tanh_form) {
    gelu_of(x, out, elements, tanh_form);
}

extern "C" __global__ void __launch_bounds__(256) gelu_rows(
    const float* x, float* __restrict__ out, int elements, int tanh_form) {
    gelu_of(x, out, elements, tanh_form);
}
