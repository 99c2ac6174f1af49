/** Products of many rows with a weight matrix, `x W^T`, on Hopper: prefill and large batches. Products of warpgroups (`wgmma`), fed by
 *  the tensor memory accelerator. Compiled for sm_90a alone; other devices have matmul.cu.
 *
 *  | kernel | reads | writes |
 *  | --- | --- | --- |
 *  | sm90_matmul | x bf16 `[rows, columns]`, weight bf16 `[features, columns]`, both by tensor maps; bias f32 `[features]` or null | out f32 `[rows, features]`, kStore or kAdd |
 *  | sm90_matmul_gelu | the same | out bf16, kGeluErf or kGeluTanh |
 *  | sm90_matmul_swiglu | x; gate and up, both as weight; their biases or null | out bf16 `[rows, features]` = silu(gate) * up |
 *
 *  A block computes tiles of 128 x 128, `gridDim.x` apart; rows count first, so that blocks that run at the same time share
 *  weights. For SwiGLU half of a tile are features of gate, half the same of up. One thread copies, 256 multiply:
 *
 *      warp 8         empty[s] --> copy x, w of 64 columns to stage s --> full[s]       six stages, 32 KiB each
 *      warps 0..3     full[s]  --> rows  0..63  of the tile: 4 products of 64 x 128 x 16 --> empty[s]
 *      warps 4..7     full[s]  --> rows 64..127
 *
 *  The copying thread goes on with the next tile while the others write theirs. A stage is given back when the products that
 *  read it have ended, one stage behind those under way.
 *
 *  Bits: the order is that of product.cuh: slices of 256 columns, each one accumulator from zero, sixteen columns at a time, and slices in
 *  order. The sixteen columns of an instruction are the same as in matvec.cu and matmul.cu, at other places. So the three give the same
 *  bits where the hardware adds sixteen products and the accumulator in a way that depends neither on their order nor on which of the
 *  two instructions is asked. No manual promises that (how such units add is the matter of arXiv:2511.10909 and arXiv:2512.07004), so each
 *  device is asked when it is opened (`Forms::of` in src/cuda/forms.rs): where a bit differs this kernel is not used. Columns behind
 *  the last are zeros that add nothing.
 *
 *  Limits: those of product.cuh, whose 16 bytes are also what tensor maps ask of rows; 193 KiB of dynamic shared memory.
 *
 *  Expected on an H200 (790 TFLOP/s): a tile's stage is 512 cycles of tensor cores against 32 KiB into shared memory and 96 of 128 bytes a
 *  cycle out of it. A slice ends with 64 additions a thread, in which the other warpgroup multiplies. The end of a tile, some 600 cycles
 *  of stores, overlaps with nothing but copies: 7 % at 1024 columns. 2048 x 4096 x 1024 (17 GFLOP): 512 tiles on 132 SMs, 3.9 waves, 31 us,
 *  550 TFLOP/s; 4096^3: 7.8 waves, 230 us, 600 TFLOP/s, 75 %. One block an SM. */
#include "product.cuh"
#include "sm90.cuh"

constexpr int kRows = 128;
constexpr int kFeatures = 128;
constexpr int kStageColumns = kTileRowBytes / sizeof(bf16);
constexpr int kStages = 6;
constexpr int kSliceStages = kSliceColumns / kStageColumns;
/** Warps that multiply; one more copies. */
constexpr int kProductWarps = 2 * kWarpgroupThreads / kLanes;
constexpr int kThreads = (kProductWarps + 1) * kLanes;
/** Rows of a warpgroup, and of a warp. */
constexpr int kWarpgroupRows = 64;
constexpr int kWarpRows = kTileRows;
constexpr int kSums = kFeatures / 2;  // of a thread
static_assert(kSliceColumns % kStageColumns == 0, "a slice ends with a stage");
static_assert(kSums == 64, "as many as wgmma_m64n128k16_bf16 has");

/** Activations and weights of 64 columns, swizzled. */
struct Stage {
    bf16 x[kRows][kStageColumns];
    bf16 w[kFeatures][kStageColumns];
};
static_assert(sizeof(Stage) % kSwizzleBytes == 0 && sizeof(Stage::x) % kSwizzleBytes == 0, "tiles begin with a pattern");

/** What a block has in shared memory. */
struct Pipeline {
    Stage stages[kStages];
    uint64_t full[kStages];   // a phase ends when the copies of a stage have arrived
    uint64_t empty[kStages];  // a phase ends when every warp that multiplies has left the stage
};

/** A stage, and the parity of the phase in which it is filled. */
struct Position {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        stage++;
        if (stage < kStages) return;
        stage = 0;
        parity ^= 1;
    }
};

/** The tiles of a product, in the order in which they are computed. */
struct Tiles {
    int row_tiles, count;
    int features_of_tile;
    __device__ __forceinline__ Tiles(int rows, int features, int features_of_tile)
        : row_tiles((rows + kRows - 1) / kRows),
          count(row_tiles * ((features + features_of_tile - 1) / features_of_tile)),
          features_of_tile(features_of_tile) {}
    __device__ __forceinline__ int first_row(int tile) const { return tile % row_tiles * kRows; }
    __device__ __forceinline__ int first_feature(int tile) const { return tile / row_tiles * features_of_tile; }
};

__device__ __forceinline__ int count_stages(int columns) { return (columns + kStageColumns - 1) / kStageColumns; }

/** The block's pipeline, where the pattern of its tiles may begin. */
__device__ __forceinline__ Pipeline& pipeline_in(unsigned char* memory) {
    const uint32_t behind = shared_address(memory) % kSwizzleBytes;
    return *reinterpret_cast<Pipeline*>(memory + (behind == 0 ? 0 : kSwizzleBytes - behind));
}

__device__ __forceinline__ void make_barriers(Pipeline& pipeline) {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; stage++) {
            barrier_init(&pipeline.full[stage], 1);
            barrier_init(&pipeline.empty[stage], kProductWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();
}

/** Copies all stages of all tiles of this block, as far ahead as there is room. One thread. */
template <bool two_matrices>
__device__ __forceinline__ void copy_tiles(Pipeline& pipeline, const TensorMap& x, const TensorMap& first,
                                           const TensorMap& second, const Tiles& tiles, int columns) {
    prefetch_map(x);
    prefetch_map(first);
    if (two_matrices) prefetch_map(second);
    Position position;
    for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
        const int row = tiles.first_row(tile), feature = tiles.first_feature(tile);
        for (int k = 0; k < count_stages(columns); k++) {
            Stage& stage = pipeline.stages[position.stage];
            uint64_t* const full = &pipeline.full[position.stage];
#ifndef PLANT_NO_WAIT_FOR_ROOM
            barrier_wait(&pipeline.empty[position.stage], position.parity ^ 1);
#endif
#ifdef PLANT_WRONG_BYTES
            barrier_expect(full, sizeof(Stage) - sizeof(Stage::w));
#else
            barrier_expect(full, sizeof(Stage));
#endif
            const int column = k * kStageColumns;
            copy_tile(stage.x, x, column, row, full);
            copy_tile(stage.w, first, column, feature, full);
            if (two_matrices) copy_tile(stage.w[kFeatures / 2], second, column, feature, full);
            position.advance();
        }
    }
}

/** Tells that this warp reads a stage no more. */
__device__ __forceinline__ void leave_stage(Pipeline& pipeline, int stage) {
    if (threadIdx.x % kLanes == 0) barrier_arrive(&pipeline.empty[stage]);
}

/** Starts the products of one stage: `sums` anew if the stage is the first of a slice. */
__device__ __forceinline__ void multiply_stage(const Stage& stage, int warpgroup, bool is_first, float (&sums)[kSums]) {
    const uint64_t x = tile_descriptor(shared_address(stage.x[warpgroup * kWarpgroupRows]));
    const uint64_t w = tile_descriptor(shared_address(stage.w));
#ifndef PLANT_MISSING_FENCE
    wgmma_fence();
#endif
#pragma unroll
    for (int i = 0; i < kStageColumns / kInstructionColumns; i++) {
        const uint64_t further = i * kInstructionColumns * sizeof(bf16) >> 4;
        wgmma_m64n128k16_bf16(sums, x + further, w + further, !is_first || i > 0);
    }
    wgmma_commit();
}

/** Computes the sums of this thread's part of a tile over all columns. */
__device__ __forceinline__ void multiply_tile(Pipeline& pipeline, Position& position, int columns, float (&totals)[kSums]) {
    const int warpgroup = threadIdx.x / kWarpgroupThreads, num_stages = count_stages(columns);
#pragma unroll
    for (int i = 0; i < kSums; i++) totals[i] = 0.0f;
    for (int slice = 0; slice < num_stages; slice += kSliceStages) {
        float sums[kSums];
        const int end = min(slice + kSliceStages, num_stages);
        int last = 0;
        for (int k = slice; k < end; k++) {
#ifndef PLANT_NO_WAIT_FOR_COPIES
            barrier_wait(&pipeline.full[position.stage], position.parity);
#endif
            multiply_stage(pipeline.stages[position.stage], warpgroup, k == slice, sums);
#ifdef PLANT_EARLY_LEAVE
            leave_stage(pipeline, position.stage);
#else
            wgmma_wait<1>();
            if (k > slice) leave_stage(pipeline, last);
#endif
            last = position.stage;
            position.advance();
        }
#ifndef PLANT_MISSING_WAIT
        wgmma_wait_all(sums);
#endif
#ifndef PLANT_EARLY_LEAVE
        leave_stage(pipeline, last);
#endif
#pragma unroll
        for (int i = 0; i < kSums; i++) totals[i] += sums[i];
    }
}

/** Where the sums of a thread belong: row `row(half)`, features `feature(j)` and the next, sums `4 j + 2 half` and the next. */
struct Fragment {
    int first_row, first_feature;
    __device__ __forceinline__ Fragment(int tile_row, int tile_feature) {
        const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
        first_row = tile_row + warp * kWarpRows + row_of_sum(lane, 0);
        first_feature = tile_feature + feature_of_sum(lane, 0);
    }
    __device__ __forceinline__ int row(int half) const { return first_row + half * (kTileRows / 2); }
    __device__ __forceinline__ int feature(int j) const { return first_feature + j * kTileFeatures; }
};

/** Calls `finish(tile, totals)` for each tile of this block, in the threads that multiply. */
template <bool two_matrices, class Finish>
__device__ __forceinline__ void for_each_tile(const TensorMap& x, const TensorMap& first, const TensorMap& second, int rows,
                                              int columns, int features, Finish finish) {
    DYNAMIC_SHARED(unsigned char, memory);
    Pipeline& pipeline = pipeline_in(memory);
    make_barriers(pipeline);
    wait_for_kernels_before();
    const Tiles tiles(rows, features, two_matrices ? kFeatures / 2 : kFeatures);
    if (threadIdx.x / kLanes == kProductWarps) {
        if (threadIdx.x % kLanes == 0) copy_tiles<two_matrices>(pipeline, x, first, second, tiles, columns);
        return;
    }
    Position position;
    for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
        float totals[kSums];
        multiply_tile(pipeline, position, columns, totals);
        finish(Fragment(tiles.first_row(tile), tiles.first_feature(tile)), totals);
    }
}

/** Gives two neighbouring sums their place. They go together where rows begin at even places. */
__device__ __forceinline__ void finish_neighbours(float2 sums, int row, int feature, const float* bias, void* out, int rows,
                                                  int features, int finish) {
    if (row >= rows || feature >= features) return;
    const size_t index = static_cast<size_t>(row) * features + feature;
    if (features % 2 == 0) {
        finish_pair(sums, index, feature, bias, out, finish);
    } else {
        finish_sum(sums.x, index, feature, bias, out, finish);
        if (feature + 1 < features) finish_sum(sums.y, index + 1, feature + 1, bias, out, finish);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) sm90_matmul(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const float* __restrict__ bias,
    float* __restrict__ out, int rows, int columns, int features, int finish) {
    const Finish add_or_store = finish == kAdd ? kAdd : kStore;
    for_each_tile<false>(x, weight, weight, rows, columns, features, [=](const Fragment& at, const float(&totals)[kSums]) {
#pragma unroll
        for (int i = 0; i < kSums; i += 2) {
            const float2 sums = make_float2(totals[i], totals[i + 1]);
            finish_neighbours(sums, at.row(i / 2 % 2), at.feature(i / 4), bias, out, rows, features, add_or_store);
        }
    });
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) sm90_matmul_gelu(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const float* __restrict__ bias,
    bf16* __restrict__ out, int rows, int columns, int features, int finish) {
    // Sums go through shared memory, a few of each thread at a time, so that there is a loop around GELU's many
    // instructions and not sixty-four copies of them. Each thread reads what it wrote itself.
    constexpr int kAtOnce = 8;
    __shared__ float2 strips[kAtOnce / 2][kProductWarps * kLanes];
    const Finish gelu = finish == kGeluErf ? kGeluErf : kGeluTanh;
    for_each_tile<false>(x, weight, weight, rows, columns, features, [=](const Fragment& at, const float(&totals)[kSums]) {
#pragma unroll
        for (int first = 0; first < kSums; first += kAtOnce) {
#pragma unroll
            for (int i = 0; i < kAtOnce; i += 2) {
                strips[i / 2][threadIdx.x] = make_float2(totals[first + i], totals[first + i + 1]);
            }
#pragma unroll 1
            for (int i = 0; i < kAtOnce; i += 2) {
                const int row = at.row(i / 2 % 2), feature = at.feature((first + i) / 4);
                finish_neighbours(strips[i / 2][threadIdx.x], row, feature, bias, out, rows, features, gelu);
            }
        }
    });
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) sm90_matmul_swiglu(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up,
    const float* __restrict__ gate_bias, const float* __restrict__ up_bias, bf16* __restrict__ out, int rows,
    int columns, int features) {
    for_each_tile<true>(x, gate, up, rows, columns, features, [=](const Fragment& at, const float(&totals)[kSums]) {
#pragma unroll
        for (int i = 0; i < kSums / 2; i++) {
            const int row = at.row(i / 2 % 2), feature = at.feature(i / 4) + i % 2;
            if (row >= rows || feature >= features) continue;
            const size_t index = static_cast<size_t>(row) * features + feature;
            finish_swiglu(totals[i], totals[kSums / 2 + i], index, feature, gate_bias, up_bias, out);
        }
    });
}
