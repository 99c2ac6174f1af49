/** Rows by their index: of an embedding matrix (written or added as f32), or of activations.
 *
 *  | kernel | reads | writes |
 *  | --- | --- | --- |
 *  | embed | table bf16 `[table_rows, width]`, indices `[rows]` | out f32 `[rows, width]` |
 *  | add_embedding | the same | out f32 `[rows, width]` += |
 *  | select_rows | table f32 `[table_rows, width]`, indices `[rows]` | out f32 `[rows, width]` |
 *  | add_rows | rows f32 `[elements]` | out f32 `[elements]` += |
 *  | feed_back | given and sources `[tokens]`, chosen `[num_chosen]` | out `[tokens]` |
 *
 *  One block a row (of add_rows: as many as the numbers take); a thread takes 8 numbers at a time. An index that no row has makes its row NaN, which ends the sequence it
 *  belongs to and no other: indices may come from sampling on the device, where nobody looks at them in between.
 *
 *  `feed_back` gives tokens the ids that the step before has chosen, so that this one may be launched before the host has seen them: row
 *  `sources[i]` of `chosen`, or `given[i]` where no row has that number.
 *
 *  Limits: width is a multiple of 8.
 *
 *  Expected on an H200: bound by the launch, about 2 us up to 512 rows of 4096 (12 MB, 3 us). */
#include "ptx.cuh"
#include "vec.cuh"

__device__ __forceinline__ void load_numbers(const bf16* source, float (&values)[8]) {
    unpack_bf16x8(load_16_bytes(source), values);
}
__device__ __forceinline__ void load_numbers(const float* source, float (&values)[8]) {
    const float4 low = load_float4(source), high = load_float4(source + 4);
    const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = all[i];
}

/** Gives the block's row of `out` what `table` has at its index. */
template <bool adds, class T>
__device__ __forceinline__ void take_row(const T* table, const uint32_t* indices, float* out, int table_rows, int width) {
    wait_for_kernels_before();
    const uint32_t index = indices[blockIdx.x];
    const bool exists = index < static_cast<uint32_t>(table_rows);
    const T* source = table + (exists ? static_cast<size_t>(index) * width : 0);
    float* target = out + static_cast<size_t>(blockIdx.x) * width;
    for (int i = 8 * threadIdx.x; i < width; i += 8 * blockDim.x) {
        float values[8], before[8] = {};
        load_numbers(source + i, values);
        if (adds) load_numbers(target + i, before);
#pragma unroll
        for (int j = 0; j < 8; j++) values[j] = exists ? before[j] + values[j] : __int_as_float(0x7fc00000);
        store_float4(target + i, make_float4(values[0], values[1], values[2], values[3]));
        store_float4(target + i + 4, make_float4(values[4], values[5], values[6], values[7]));
    }
}

extern "C" __global__ void __launch_bounds__(512) embed(
    const bf16* __restrict__ table, const uint32_t* indices, float* __restrict__ out, int table_rows,
    int width) {
    take_row<false>(table, indices, out, table_rows, width);
}

extern "C" __global__ void __launch_bounds__(512) add_embedding(
    const bf16* __restrict__ table, const uint32_t* indices, float* __restrict__ out, int table_rows,
    int width) {
    take_row<true>(table, indices, out, table_rows, width);
}

extern "C" __global__ void __launch_bounds__(512) select_rows(
    const float* table, const uint32_t* indices, float* __restrict__ out, int table_rows,
    int width) {
    take_row<false>(table, indices, out, table_rows, width);
}

extern "C" __global__ void __launch_bounds__(512) add_rows(
    const float* rows, float* __restrict__ out, int elements) {
#ifndef PLANT_NO_WAIT
    wait_for_kernels_before();
#endif
    const int i = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= elements) return;
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
        const float4 v = load_float4(rows + i + j), w = load_float4(out + i + j);
        store_float4(out + i + j, make_float4(w.x + v.x, w.y + v.y, w.z + v.z, w.w + v.w));
    }
}

extern "C" __global__ void __launch_bounds__(256) feed_back(
    const uint32_t* given, const uint32_t* sources, const uint32_t* chosen,
    uint32_t* __restrict__ out, int num_chosen, int tokens) {
    wait_for_kernels_before();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= tokens) return;
    const uint32_t source = sources[i];
    out[i] = source < static_cast<uint32_t>(num_chosen) ? chosen[source] : given[i];
}
