/** The functions between two products of a feed-forward, where no product has them fused (quantized weights).
 *
 *  | kernel | reads | writes |
 *  | --- | --- | --- |
 *  | swiglu | gate_up f32 `[rows, 2 width]`: gate, then up | out bf16 `[rows, width]` = silu(gate) * up |
 *  | gelu | x f32 `[elements]`; `tanh_form` chooses the form | out bf16 `[elements]` |
 *
 *  A thread takes 8 neighbouring numbers; blocks cover all of them along x (of swiglu: of a row, `blockIdx.y`).
 *
 *  Limits: width and elements are multiples of 8.
 *
 *  Expected on an H200: 10 bytes an element of out; 16 rows of 12,288: the launch, about 2 us. */
#include "math.cuh"
#include "vec.cuh"

__device__ __forceinline__ void load_8_floats(const float* source, float (&values)[8]) {
    *reinterpret_cast<float4*>(values) = load_float4(source);
    *reinterpret_cast<float4*>(values + 4) = load_float4(source + 4);
}

extern "C" __global__ void __launch_bounds__(256) swiglu(
    const float* __restrict__ gate_up, bf16* __restrict__ out, int width) {
    const int i = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= width) return;
    const float* gate_row = gate_up + static_cast<size_t>(blockIdx.y) * 2 * width;
    alignas(16) float gate[8], up[8];
    load_8_floats(gate_row + i, gate);
    load_8_floats(gate_row + width + i, up);
#pragma unroll
    for (int j = 0; j < 8; j++) gate[j] = silu(gate[j]) * up[j];
    store_16_bytes(out + static_cast<size_t>(blockIdx.y) * width + i, pack_bf16x8(gate));
}

extern "C" __global__ void __launch_bounds__(256) gelu(
    const float* __restrict__ x, bf16* __restrict__ out, int elements, int tanh_form) {
    const int i = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= elements) return;
    alignas(16) float values[8];
    load_8_floats(x + i, values);
#pragma unroll
    for (int j = 0; j < 8; j++) values[j] = tanh_form != 0 ? gelu_tanh(values[j]) : gelu_erf(values[j]);
    store_16_bytes(out + i, pack_bf16x8(values));
}
