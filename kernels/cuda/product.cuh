/** What matvec.cu (few rows), matmul.cu (many) and sm90_matmul.cu (many, on Hopper) have in common: the order in which a product
 *  is summed, and what happens to a sum. Which of them computes a row must not show in its bits (row invariance, ARCHITECTURE.md),
 *  so the order is fixed here and is a function of the number of columns alone.
 *
 *  All products run on tensor cores, one row of activations as well as thousands. The alternative, dot products on ordinary
 *  cores for few rows, adds in an order that no tensor core follows; a model would then give other tokens when its
 *  prompt is cut otherwise. For few rows the cores have time to spare, since the weights arrive no faster.
 *
 *  The sum of element (row, feature), with x the activations and w the weights, both bf16:
 *
 *      slice  columns 256 i .. 256 i + 255: one accumulator from zero, 32 columns (a group) at a time, in order
 *      group  two instructions of 16 columns: 0 .. 15, then 16 .. 31
 *      total  ((0 + slice 0) + slice 1) + ..        in f32
 *
 *  Slices are what may be computed apart, by another warp. Within the sixteen columns of an instruction the order is not that of
 *  memory: lane (g, t) gives four neighbouring columns of its row, 8 bytes, for activations and weights alike, without `ldmatrix` and
 *  without repacking weights, which stay as the checkpoint has them.
 *
 *      slot of an instruction    2t   2t+1   2t+8   2t+9
 *      column, c = 8(t%2)+4(t/2)  c    c+1    c+2    c+3       second instruction: 16 more
 *
 *  Rests on: an element of a tensor core's product does not depend on where in its tile it lies. True of the CPU shim
 *  by construction; `gpu/check kernels` compares the two kernels bit for bit on a GPU. sm90_matmul.cu, whose instruction is another
 *  one, rests on more and is asked about it on each device.
 *
 *  Limits: columns are a multiple of 8; rows are aligned to 16 bytes. */
#pragma once

#include "math.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "vec.cuh"

/** Columns of one accumulator. */
constexpr int kSliceColumns = 256;
/** Columns that a warp takes at once. */
constexpr int kGroupColumns = 32;
constexpr int kSliceGroups = kSliceColumns / kGroupColumns;
/** Rows and features of an instruction. */
constexpr int kTileRows = 16;
constexpr int kTileFeatures = 8;

/** What becomes of a sum; mirrored by `Finish` in src/cuda/product.rs. */
enum Finish : int {
    kStore = 0,     // out f32 = sum
    kAdd = 1,       // out f32 += sum
    kGeluErf = 2,   // out bf16 = gelu(sum)
    kGeluTanh = 3,  // out bf16 = gelu(sum), the other form
};

/** Columns between the two instructions of a group. */
constexpr int kInstructionColumns = 16;

/** A lane's part of a row's group: four columns of each instruction. */
struct GroupWords {
    uint2 first, second;
};

/** Where the four columns of a lane begin in those of an instruction. */
__device__ __forceinline__ int first_column_of(int lane) { return lane % 2 * 8 + lane % 4 / 2 * 4; }

/** A lane's part of a row's group, from the 16 bytes at column `8 (lane % 4)` that it loaded: lanes t and t + 2 swap halves. */
__device__ __forceinline__ GroupWords swap_halves(uint4 words) {
    const bool keeps_low = threadIdx.x % 4 < 2;
    const uint2 low = make_uint2(words.x, words.y), high = make_uint2(words.z, words.w);
    const uint2 given = keeps_low ? high : low;
    const uint2 got = make_uint2(__shfl_xor_sync(kAllLanes, given.x, 2), __shfl_xor_sync(kAllLanes, given.y, 2));
    return keeps_low ? GroupWords{low, got} : GroupWords{got, high};
}

/** A group's columns of the activations of rows `lane / 4` and `lane / 4 + 8`, as lane `lane` has them. */
struct RowWords {
    GroupWords low, high;
};

/** `sums[16 rows, 8 features] += x w` over one group; `weights` are those of feature `lane / 4`. */
__device__ __forceinline__ void multiply_group(float (&sums)[4], const RowWords& x, const GroupWords& weights) {
    const uint2 low = x.low.first, high = x.high.first, next_low = x.low.second, next_high = x.high.second;
    const uint32_t first_x[4] = {low.x, high.x, low.y, high.y}, first_w[2] = {weights.first.x, weights.first.y};
    const uint32_t second_x[4] = {next_low.x, next_high.x, next_low.y, next_high.y};
    const uint32_t second_w[2] = {weights.second.x, weights.second.y};
    mma_m16n8k16_bf16(sums, first_x, first_w);
    mma_m16n8k16_bf16(sums, second_x, second_w);
}

/** Row and feature, within a tile, of sum `i` of a lane. */
__device__ __forceinline__ int row_of_sum(int lane, int i) { return lane / 4 + i / 2 * 8; }
__device__ __forceinline__ int feature_of_sum(int lane, int i) { return 2 * (lane % 4) + i % 2; }

/** Slices of so many columns. */
__device__ __forceinline__ int count_slices(int columns) { return (columns + kSliceColumns - 1) / kSliceColumns; }

/** Leaves a warp's sums of a slice in shared memory `[slices][matrices][lane][4]`. */
template <int matrices>
__device__ __forceinline__ void store_slice(float4* slice_sums, int slice, int matrix, const float (&sums)[4]) {
    const float4 values = make_float4(sums[0], sums[1], sums[2], sums[3]);
    slice_sums[(slice * matrices + matrix) * kLanes + threadIdx.x % kLanes] = values;
}

/** Sum `element % 4` of lane `element / 4`, all slices in order. */
template <int matrices>
__device__ __forceinline__ float add_slices(const float4* slice_sums, int matrix, int element, int num_slices) {
    const float* sums = reinterpret_cast<const float*>(slice_sums) + matrix * 4 * kLanes + element;
    float total = 0.0f;
    for (int slice = 0; slice < num_slices; slice++) total += sums[slice * matrices * 4 * kLanes];
    return total;
}

/** Where sum `element % 4` of lane `element / 4` belongs, in a tile of 16 rows and 8 features. */
struct TileElement {
    int row, feature;
    __device__ __forceinline__ TileElement(int element, int row_tile, int feature_tile)
        : row(row_tile * kTileRows + row_of_sum(element / 4, element % 4)),
          feature(feature_tile * kTileFeatures + feature_of_sum(element / 4, element % 4)) {}
    __device__ __forceinline__ bool is_inside(int rows, int features) const { return row < rows && feature < features; }
    __device__ __forceinline__ size_t index(int features) const { return static_cast<size_t>(row) * features + feature; }
};

/** Gives a sum with its bias (or null) its place in `out` `[rows, features]`. */
__device__ __forceinline__ void finish_sum(float sum, size_t index, int feature, const float* bias, void* out,
                                           int finish) {
    if (bias != nullptr) sum += bias[feature];
    if (finish == kStore) static_cast<float*>(out)[index] = sum;
    else if (finish == kAdd) static_cast<float*>(out)[index] += sum;
    else static_cast<bf16*>(out)[index] = __float2bfloat16_rn(finish == kGeluErf ? gelu_erf(sum) : gelu_tanh(sum));
}

/** The same of two neighbours in a row, `index` being even: written at once. */
__device__ __forceinline__ void finish_pair(float2 sums, size_t index, int feature, const float* bias, void* out,
                                            int finish) {
    if (bias != nullptr) sums = make_float2(sums.x + bias[feature], sums.y + bias[feature + 1]);
    if (finish == kStore || finish == kAdd) {
        float2* const pair = reinterpret_cast<float2*>(static_cast<float*>(out) + index);
        *pair = finish == kStore ? sums : make_float2(pair->x + sums.x, pair->y + sums.y);
        return;
    }
    const bool is_erf = finish == kGeluErf;
    const float first = is_erf ? gelu_erf(sums.x) : gelu_tanh(sums.x), second = is_erf ? gelu_erf(sums.y) : gelu_tanh(sums.y);
    *reinterpret_cast<uint32_t*>(static_cast<bf16*>(out) + index) = pack_bf16(first, second);
}

/** The product of SiLU's gate and up projection (Shazeer 2020, arXiv:2002.05202). */
__device__ __forceinline__ void finish_swiglu(float gate, float up, size_t index, int feature, const float* gate_bias,
                                              const float* up_bias, bf16* out) {
    if (gate_bias != nullptr) gate += gate_bias[feature];
    if (up_bias != nullptr) up += up_bias[feature];
    out[index] = __float2bfloat16_rn(silu(gate) * up);
}
