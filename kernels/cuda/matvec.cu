/** Products of up to 16 rows with a weight matrix, `x W^T`: decoding. Bound by the bytes of W, which are read once.
 *
 *  | kernel | reads | writes |
 *  | --- | --- | --- |
 *  | matvec | x bf16 `[rows, columns]`, weight bf16 `[features, columns]`, bias f32 `[features]` or null | out `[rows, features]`, as `finish` says |
 *  | matvec_swiglu | x; gate and up, both as weight; their biases or null | out bf16 `[rows, features]` = silu(gate) * up |
 *
 *  A block has 8 features (`blockIdx.x`; of both matrices for SwiGLU). Its warps share the slices of 256 columns (product.cuh):
 *  warp w computes slices w, w + warps, .. for 16 rows, missing rows being zeros, and leaves each slice's sums in shared memory;
 *  then the slices are added in order. The number of warps may be any: it does not show.
 *
 *      columns   0        256       512       768           A warp has all weights of a slice in flight at once:
 *      W rows  | warp 0  | warp 1  | warp 2  | warp 0 ..    8 loads of 16 bytes a lane, 4 KiB a warp.
 *                  \         |         /
 *              shared [slice][tile][lane][4] -> sum in order -> finish
 *
 *  Limits: those of product.cuh; dynamic shared memory of 512 bytes a slice and matrix.
 *
 *  Expected on an H200 (4.3 TB/s, 132 SMs): two blocks of 8 warps an SM (at most 128 registers) have 64 KiB in flight an SM; by
 *  Little's law 33 GB/s an SM times 0.8 us need 26 KiB. 4096 x 1024 (8.4 MB): 512 blocks of 4 warps, 2.0 us of memory, about 4 us
 *  with launch and tail; 151,936 x 1024 (311 MB): 75 us, 97 % of the ceiling is the aim. The activations of 16 rows come from the
 *  L2 cache twice as often as weights from memory: at 16 rows that is the bound to watch. */
#include "product.cuh"

/** Loads a slice of the weights of a lane's feature: columns `column + 8 (lane % 4) + 32 i`. Behind the last column and behind
 *  the last feature (`row` is null) they are zeros. */
__device__ __forceinline__ void load_weight_slice(const bf16* row, int column, int columns, uint4 (&words)[kSliceGroups]) {
#pragma unroll
    for (int i = 0; i < kSliceGroups; i++) {
        const int first = column + i * kGroupColumns;
        words[i] = row != nullptr && first < columns ? load_streaming(row + first) : make_uint4(0, 0, 0, 0);
    }
}

/** The lane's part of row `row` in the group at `column`, zeros where there is nothing. */
__device__ __forceinline__ GroupWords load_row(const bf16* x, int row, int rows, int column, int columns) {
    const int first = column + first_column_of(threadIdx.x), second = first + kInstructionColumns;
    const bf16* const source = x + static_cast<size_t>(row) * columns;
    GroupWords words = {make_uint2(0, 0), make_uint2(0, 0)};
    if (row < rows && first < columns) words.first = load_8_bytes(source + first);
    if (row < rows && second < columns) words.second = load_8_bytes(source + second);
    return words;
}

/** Computes the slices of this warp for `matrices` weight matrices; `weights[m]` is the row of this lane's feature, or null. The
 *  sums of slice s go to `slice_sums[s][m][lane]`. */
template <int matrices>
__device__ __forceinline__ void compute_slices(const bf16* x, const bf16* const (&weights)[matrices], float4* slice_sums,
                                               int rows, int columns) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, num_warps = blockDim.x / kLanes;
    const int num_slices = count_slices(columns);
    uint4 words[matrices][kSliceGroups];
    const auto load_weights = [&](int slice) {
        // A branch, and not predicates alone: ptxas moves `griddepcontrol.wait` above loads of its own block.
        if (slice >= num_slices) return;
        const int column = slice * kSliceColumns + lane % 4 * kBf16PerVector;
#pragma unroll
        for (int m = 0; m < matrices; m++) load_weight_slice(weights[m], column, columns, words[m]);
    };
    load_weights(warp);
    wait_for_kernels_before();
    for (int slice = warp; slice < num_slices; slice += num_warps, load_weights(slice)) {
        float sums[matrices][4] = {};
#pragma unroll
        for (int i = 0; i < kSliceGroups; i++) {
            // The same for all lanes: groups behind the last column are left out, as in matmul.cu.
            if (slice * kSliceColumns + i * kGroupColumns >= columns) break;
#ifdef PLANT_DIVERGENT_GROUP
            if (lane < kLanes / 2) break;
#endif
            const int group = slice * kSliceColumns + i * kGroupColumns;
            const RowWords row_words = {load_row(x, lane / 4, rows, group, columns),
                                        load_row(x, lane / 4 + 8, rows, group, columns)};
#pragma unroll
            for (int m = 0; m < matrices; m++) multiply_group(sums[m], row_words, swap_halves(words[m][i]));
        }
#pragma unroll
        for (int m = 0; m < matrices; m++) store_slice<matrices>(slice_sums, slice, m, sums[m]);
    }
#ifndef PLANT_MISSING_BARRIER
    __syncthreads();
#endif
}

/** The row of a lane's feature, or null behind the last. */
__device__ __forceinline__ const bf16* weight_row(const bf16* weight, int features, int columns) {
    const int lane = threadIdx.x % kLanes, feature = blockIdx.x * kTileFeatures + lane / 4;
    return feature < features ? weight + static_cast<size_t>(feature) * columns : nullptr;
}

extern "C" __global__ void __launch_bounds__(256, 2) matvec(
    const bf16* x, const bf16* __restrict__ weight, const float* __restrict__ bias, void* __restrict__ out,
    int rows, int columns, int features, int finish) {
    DYNAMIC_SHARED(float4, slice_sums);
    const bf16* const weights[1] = {weight_row(weight, features, columns)};
    compute_slices<1>(x, weights, slice_sums, rows, columns);
    for (int element = threadIdx.x; element < 4 * kLanes; element += blockDim.x) {
        const TileElement at(element, 0, blockIdx.x);
        if (!at.is_inside(rows, features)) continue;
        const float sum = add_slices<1>(slice_sums, 0, element, count_slices(columns));
        finish_sum(sum, at.index(features), at.feature, bias, out, finish);
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) matvec_swiglu(
    const bf16* x, const bf16* __restrict__ gate, const bf16* __restrict__ up,
    const float* __restrict__ gate_bias, const float* __restrict__ up_bias, bf16* __restrict__ out, int rows,
    int columns, int features) {
    DYNAMIC_SHARED(float4, slice_sums);
    const bf16* const weights[2] = {weight_row(gate, features, columns), weight_row(up, features, columns)};
    compute_slices<2>(x, weights, slice_sums, rows, columns);
    for (int element = threadIdx.x; element < 4 * kLanes; element += blockDim.x) {
        const TileElement at(element, 0, blockIdx.x);
        if (!at.is_inside(rows, features)) continue;
        const float gate_sum = add_slices<2>(slice_sums, 0, element, count_slices(columns));
        const float up_sum = add_slices<2>(slice_sums, 1, element, count_slices(columns));
        finish_swiglu(gate_sum, up_sum, at.index(features), at.feature, gate_bias, up_bias, out);
    }
}
