/** Products of many rows with a weight matrix, `x W^T`: prefill and large batches. mma.sync fed by cp.async, for sm_80 and later.
 *
 *  | kernel | reads | writes |
 *  | --- | --- | --- |
 *  | matmul_64, matmul_128 | x bf16 `[rows, columns]`, weight bf16 `[features, columns]`, bias f32 `[features]` or null | out `[rows, features]`, as `finish` says |
 *  | matmul_swiglu_64, matmul_swiglu_128 | x; gate and up, both as weight; their biases or null | out bf16 `[rows, features]` = silu(gate) * up |
 *
 *  A block has a tile of 64 x 64 or 128 x 128 of the result: `blockIdx.x` counts row tiles, so that blocks that run at the same
 *  time share weights, `blockIdx.y` feature tiles (for SwiGLU half of the tile are features of gate, half the same of up). The
 *  bits are those of matvec.cu for every tile size (product.cuh).
 *
 *      stage k      | x [2 groups][tile rows][32] | w [2 groups][tile features][32] |     64 columns; three stages in shared memory
 *      warps          128 x 128: 2 x 4 warps of 64 x 32      64 x 64: 2 x 2 warps of 32 x 32
 *
 *  A lane reads 8 bytes of its row per instruction (product.cuh); sixteen lanes read 32 bytes of four rows each. So that these lie in
 *  different banks, rows 2 and 3 of each four have the two halves of a group swapped. One barrier a stage: behind it stage k is there for all, and all have left stage k - 1, which is filled
 *  next. The sums go through shared memory once more, so that a row of the tile is written in a line.
 *
 *  Limits: those of product.cuh; 48 KiB (64) or 96 KiB (128) of dynamic shared memory.
 *
 *  Expected on an H200: mma.sync reaches about 60 % of the 790 TFLOP/s that wgmma does. 128 x 128: 32 products of 4096 flop a warp
 *  and group against 6 KiB of shared memory: both about 50 cycles, so 400 TFLOP/s if both overlap well. 2048 x 4096 x 1024 (17 GFLOP): 43 us,
 *  512 blocks on 132 SMs are 3.9 waves. One block of 128 an SM by registers (2 x 64 sums a lane), four of 64 by shared memory. */
#include "product.cuh"

constexpr int kStageGroups = 2;
constexpr int kStageColumns = kStageGroups * kGroupColumns;
constexpr int kStages = 3;
static_assert(kSliceColumns % kStageColumns == 0, "a slice ends with a stage");

/** Sizes of a block's tile. */
template <int size, int warps_across, int warps_along>
struct TileShape {
    static constexpr int kRows = size;
    static constexpr int kFeatures = size;
    static constexpr int kWarpsAcross = warps_across;  // over rows
    static constexpr int kWarpsAlong = warps_along;    // over features
    static constexpr int kThreads = warps_across * warps_along * 32;
    /** Tiles of one warp. */
    static constexpr int kRowTiles = size / warps_across / kTileRows;
    static constexpr int kFeatureTiles = size / warps_along / kTileFeatures;
};

using Tile64 = TileShape<64, 2, 2>;
using Tile128 = TileShape<128, 2, 4>;

/** Activations and weights of some columns. */
template <class Shape>
struct Stage {
    bf16 x[kStageGroups][Shape::kRows][kGroupColumns];
    bf16 w[kStageGroups][Shape::kFeatures][kGroupColumns];
};

/** What a block has in shared memory: stages, and when they are no longer needed, the sums of its tile. */
template <class Shape>
union TileMemory {
    Stage<Shape> stages[kStages];
    /** Eight numbers behind each row keep the rows of a store in different banks. */
    float sums[Shape::kRows][Shape::kFeatures + 8];
};

/** Where a product reads. With gate and up, `second` is up; otherwise nothing reads it. */
struct Sources {
    const bf16* x;
    const bf16* first;
    const bf16* second;
    int rows, columns, features;
};

/** Feature of row `row` of the stage's weights. With two matrices, the first half of the rows are the first one's. */
template <class Shape, bool two_matrices>
__device__ __forceinline__ int feature_of_stage_row(int row) {
    constexpr int kHalf = Shape::kFeatures / 2;
    return two_matrices ? blockIdx.y * kHalf + row % kHalf : blockIdx.y * Shape::kFeatures + row;
}

/** Where in its row of a stage the piece of 16 bytes number `piece` lies. */
__device__ __forceinline__ int place_of_piece(int row, int piece) { return (piece ^ (row & 2)) * kBf16PerVector; }

/** Starts copying columns `column..column + 64`; zeros stand for rows, features and columns behind the last. */
template <class Shape, bool two_matrices>
__device__ __forceinline__ void copy_stage(const Sources& sources, int column, Stage<Shape>& stage) {
    constexpr int kPieces = kGroupColumns / kBf16PerVector;  // of 16 bytes in a row of a group
    static_assert(Shape::kRows == Shape::kFeatures, "one loop copies both");
    for (int i = threadIdx.x; i < kStageGroups * Shape::kRows * kPieces; i += Shape::kThreads) {
        const int piece = i % kPieces, row = i / kPieces % Shape::kRows, group = i / kPieces / Shape::kRows;
        const int first = column + group * kGroupColumns + piece * kBf16PerVector;
        const int x_row = blockIdx.x * Shape::kRows + row;
        const bool has_x = x_row < sources.rows && first < sources.columns;
        const bf16* x = has_x ? sources.x + static_cast<size_t>(x_row) * sources.columns + first : sources.x;
        cp_async_16(&stage.x[group][row][place_of_piece(row, piece)], x, has_x ? 16 : 0);

        const bf16* matrix = two_matrices && row >= Shape::kFeatures / 2 ? sources.second : sources.first;
        const int feature = feature_of_stage_row<Shape, two_matrices>(row);
        const bool has_w = feature < sources.features && first < sources.columns;
        const bf16* w = has_w ? matrix + static_cast<size_t>(feature) * sources.columns + first : matrix;
        cp_async_16(&stage.w[group][row][place_of_piece(row, piece)], w, has_w ? 16 : 0);
    }
}

/** The sums of one warp: of row tile r and feature tile f, sum i. */
template <class Shape>
using Sums = float[Shape::kRowTiles][Shape::kFeatureTiles][4];

/** A lane's part of row `row` of a stage's group. */
__device__ __forceinline__ GroupWords load_stage_row(const bf16 (*rows)[kGroupColumns], int row) {
    const int column = first_column_of(threadIdx.x), piece = column / kBf16PerVector, rest = column % kBf16PerVector;
    constexpr int kPieces = kInstructionColumns / kBf16PerVector;
    return {load_8_bytes(&rows[row][place_of_piece(row, piece) + rest]),
            load_8_bytes(&rows[row][place_of_piece(row, piece + kPieces) + rest])};
}

/** `sums += x w` over one group of a stage. */
template <class Shape>
__device__ __forceinline__ void multiply_stage_group(const Stage<Shape>& stage, int group, Sums<Shape>& sums) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int across = warp / Shape::kWarpsAlong, along = warp % Shape::kWarpsAlong;
    GroupWords weights[Shape::kFeatureTiles];
#pragma unroll
    for (int f = 0; f < Shape::kFeatureTiles; f++) {
        const int row = (along * Shape::kFeatureTiles + f) * kTileFeatures + lane / 4;
        weights[f] = load_stage_row(stage.w[group], row);
    }
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; r++) {
        const int row = (across * Shape::kRowTiles + r) * kTileRows + lane / 4;
        const RowWords words = {load_stage_row(stage.x[group], row), load_stage_row(stage.x[group], row + 8)};
#pragma unroll
        for (int f = 0; f < Shape::kFeatureTiles; f++) multiply_group(sums[r][f], words, weights[f]);
    }
}

/** `totals += sums`, and new sums from zero: the end of a slice. */
template <class Shape>
__device__ __forceinline__ void add_slice(Sums<Shape>& sums, Sums<Shape>& totals) {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; r++) {
#pragma unroll
        for (int f = 0; f < Shape::kFeatureTiles; f++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                totals[r][f][i] += sums[r][f][i];
                sums[r][f][i] = 0.0f;
            }
        }
    }
}

/** Puts the sums of this warp where they belong in the tile. */
template <class Shape>
__device__ __forceinline__ void store_totals(const Sums<Shape>& totals, TileMemory<Shape>& memory) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int across = warp / Shape::kWarpsAlong, along = warp % Shape::kWarpsAlong;
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; r++) {
#pragma unroll
        for (int f = 0; f < Shape::kFeatureTiles; f++) {
            const int row = (across * Shape::kRowTiles + r) * kTileRows + row_of_sum(lane, 0);
            const int feature = (along * Shape::kFeatureTiles + f) * kTileFeatures + feature_of_sum(lane, 0);
            const float(&sums)[4] = totals[r][f];
            *reinterpret_cast<float2*>(&memory.sums[row][feature]) = make_float2(sums[0], sums[1]);
            *reinterpret_cast<float2*>(&memory.sums[row + 8][feature]) = make_float2(sums[2], sums[3]);
        }
    }
}

/** Computes the sums of this block's tile over all columns, and leaves them in shared memory. */
template <class Shape, bool two_matrices>
__device__ __forceinline__ void multiply_tile(const Sources& sources, TileMemory<Shape>& memory) {
    wait_for_kernels_before();
    const int num_stages = (sources.columns + kStageColumns - 1) / kStageColumns;
    Stage<Shape>(&stages)[kStages] = memory.stages;
#pragma unroll
    for (int k = 0; k < kStages - 1; k++) {
        if (k < num_stages) copy_stage<Shape, two_matrices>(sources, k * kStageColumns, stages[k]);
        cp_async_commit();
    }
    Sums<Shape> totals = {};
    Sums<Shape> sums = {};
    for (int k = 0; k < num_stages; k++) {
        // Groups are committed even when empty, so that "all but the newest" is always stage k.
#ifdef PLANT_LOOSE_WAIT
        cp_async_wait<kStages - 1>();
#else
        cp_async_wait<kStages - 2>();
#endif
#ifndef PLANT_MISSING_BARRIER
        __syncthreads();
#endif
        const int next = k + kStages - 1;
        if (next < num_stages) copy_stage<Shape, two_matrices>(sources, next * kStageColumns, stages[next % kStages]);
        cp_async_commit();
#pragma unroll
        for (int group = 0; group < kStageGroups; group++) {
            const int column = k * kStageColumns + group * kGroupColumns;
            if (column < sources.columns) multiply_stage_group<Shape>(stages[k % kStages], group, sums);
        }
        const int end = (k + 1) * kStageColumns;
        if (end % kSliceColumns == 0 || k + 1 == num_stages) add_slice<Shape>(sums, totals);
    }
    __syncthreads();  // the stages are no longer read
    store_totals<Shape>(totals, memory);
    __syncthreads();
}

template <class Shape>
__device__ __forceinline__ void matmul(const Sources& sources, TileMemory<Shape>& memory, const float* bias, void* out,
                                       int finish) {
    multiply_tile<Shape, false>(sources, memory);
    for (int i = threadIdx.x; i < Shape::kRows * Shape::kFeatures; i += Shape::kThreads) {
        const int tile_row = i / Shape::kFeatures, tile_feature = i % Shape::kFeatures;
        const int row = blockIdx.x * Shape::kRows + tile_row, feature = blockIdx.y * Shape::kFeatures + tile_feature;
        if (row >= sources.rows || feature >= sources.features) continue;
        const size_t index = static_cast<size_t>(row) * sources.features + feature;
        finish_sum(memory.sums[tile_row][tile_feature], index, feature, bias, out, finish);
    }
}

template <class Shape>
__device__ __forceinline__ void matmul_swiglu(const Sources& sources, TileMemory<Shape>& memory, const float* gate_bias,
                                              const float* up_bias, bf16* out) {
    multiply_tile<Shape, true>(sources, memory);
    constexpr int kHalf = Shape::kFeatures / 2;
    for (int i = threadIdx.x; i < Shape::kRows * kHalf; i += Shape::kThreads) {
        const int tile_row = i / kHalf, tile_feature = i % kHalf;
        const int row = blockIdx.x * Shape::kRows + tile_row, feature = blockIdx.y * kHalf + tile_feature;
        if (row >= sources.rows || feature >= sources.features) continue;
        const float gate = memory.sums[tile_row][tile_feature], up = memory.sums[tile_row][kHalf + tile_feature];
        const size_t index = static_cast<size_t>(row) * sources.features + feature;
        finish_swiglu(gate, up, index, feature, gate_bias, up_bias, out);
    }
}

extern "C" __global__ void __launch_bounds__(128, 4) matmul_64(
    const bf16* x, const bf16* __restrict__ weight, const float* __restrict__ bias, void* __restrict__ out,
    int rows, int columns, int features, int finish) {
    DYNAMIC_SHARED(TileMemory<Tile64>, memory);
    matmul<Tile64>({x, weight, nullptr, rows, columns, features}, *memory, bias, out, finish);
}

extern "C" __global__ void __launch_bounds__(256, 1) matmul_128(
    const bf16* x, const bf16* __restrict__ weight, const float* __restrict__ bias, void* __restrict__ out,
    int rows, int columns, int features, int finish) {
    DYNAMIC_SHARED(TileMemory<Tile128>, memory);
    matmul<Tile128>({x, weight, nullptr, rows, columns, features}, *memory, bias, out, finish);
}

extern "C" __global__ void __launch_bounds__(128, 4) matmul_swiglu_64(
    const bf16* x, const bf16* __restrict__ gate, const bf16* __restrict__ up,
    const float* __restrict__ gate_bias, const float* __restrict__ up_bias, bf16* __restrict__ out, int rows,
    int columns, int features) {
    DYNAMIC_SHARED(TileMemory<Tile64>, memory);
    matmul_swiglu<Tile64>({x, gate, up, rows, columns, features}, *memory, gate_bias, up_bias, out);
}

extern "C" __global__ void __launch_bounds__(256, 1) matmul_swiglu_128(
    const bf16* x, const bf16* __restrict__ gate, const bf16* __restrict__ up,
    const float* __restrict__ gate_bias, const float* __restrict__ up_bias, bf16* __restrict__ out, int rows,
    int columns, int features) {
    DYNAMIC_SHARED(TileMemory<Tile128>, memory);
    matmul_swiglu<Tile128>({x, gate, up, rows, columns, features}, *memory, gate_bias, up_bias, out);
}
