/** Paged attention of many queries per sequence: prefill in chunks, behind a prefix that lies in blocks. FlashAttention-2
 *  (Dao 2023, arXiv:2307.08691) with mma.sync. The arithmetic, and why it gives the bits of attention_decode.cu, is in attention.cuh.
 *
 *      grid (tile of 64 rows, kv head)        block: 4 warps, 16 rows (query x head of the group) each
 *
 *      keys     | partition p   |  load of the next one runs beside softmax and values
 *      values   |   partition p |  load runs beside the product with the keys
 *      rows     a warp's 16 rows stay in registers, with the outputs of the span at hand;
 *               the outputs of the spans before are in shared memory, each thread's own.
 *
 *  `tiles` says which 64 rows of which sequence a block has: sequences are ragged, and a grid of (sequence, tile) would be mostly
 *  empty. The order of tiles does not show in the result; the longest first ends soonest.
 *
 *  Limits: see attention.cuh. No head_dim of 256: its outputs and scores do not fit the registers; attention_decode.cu takes
 *  any number of queries.
 *
 *  Expected on an H200: 2048 queries of one sequence, 32 heads, 8 kv heads of 128: 34 GFLOP causal. Shared memory is the bound:
 *  a warp reads 32 KiB for 128 products, 256 cycles of the SM's 128 B; four warps 1024 cycles against 830 for the products at the
 *  60 % of the peak that mma.sync reaches on Hopper. That is 270 TFLOP/s, 130 us.
 *  83 KiB of shared memory and 255 registers: two blocks an SM. 32 rows a warp would halve the reads, and give the same bits. */
#include "attention.cuh"

/** Rows of a block. */
constexpr int kBlockRows = kAttentionWarps * kTileRows;
/** Rows `64 * tile..` of a sequence. */
struct PrefillTile {
    uint32_t sequence, tile;
};

/** What a block holds in shared memory. */
template <int head_dim>
struct PrefillShared {
    uint16_t keys[kPartitionKeys * kPitch<head_dim>];
    uint16_t values[kPartitionKeys * kPitch<head_dim>];
    uint16_t queries[kBlockRows * kPitch<head_dim>];
    /** Outputs of the spans before, `[head_dim / 8][thread]`. */
    float4 totals[head_dim / 8 * kAttentionThreads];
};

/** The rows of a lane (see `multiply_keys`): online softmax and outputs of a span, and of the spans before. */
template <int head_dim>
struct LaneRows {
    RowState span[2], total[2];
    float outputs[head_dim / 8][4];
};

/** Merges the rows' outputs of a partition into their span's. */
template <class Kv, int head_dim>
__device__ __forceinline__ void add_partition(const uint32_t (&weights)[kPartitionKeys / 16][4], const uint16_t* values,
                                              const RowState (&states)[2], LaneRows<head_dim>& rows) {
    const MergeFactors factors[2] = {merge(rows.span[0], states[0]), merge(rows.span[1], states[1])};
#pragma unroll
    for (int i = 0; i < head_dim / 16; i++) {
        float part[2][4] = {};
        multiply_values<Kv, head_dim, kPartitionKeys / 16>(weights, values + 16 * i, part);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float& output = rows.outputs[2 * i + j / 4][j % 4];
            output = merge_output(output, part[j / 4][j % 4], factors[j % 4 / 2]);
        }
    }
}

/** Merges the span into the spans before, which are none where `is_first`. */
template <int head_dim>
__device__ __forceinline__ void add_span(LaneRows<head_dim>& rows, bool is_first, float4* totals) {
    const MergeFactors factors[2] = {merge(rows.total[0], rows.span[0]), merge(rows.total[1], rows.span[1])};
#pragma unroll
    for (int i = 0; i < head_dim / 8; i++) {
        const float* output = rows.outputs[i];
        float4& total = totals[i * kAttentionThreads + threadIdx.x];
        const float4 before = is_first ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : total;
        total = make_float4(merge_output(before.x, output[0], factors[0]), merge_output(before.y, output[1], factors[0]),
                            merge_output(before.z, output[2], factors[1]), merge_output(before.w, output[3], factors[1]));
    }
}

template <int head_dim>
__device__ __forceinline__ void begin_span(LaneRows<head_dim>& rows) {
    rows.span[0] = rows.span[1] = empty_row();
#pragma unroll
    for (int i = 0; i < head_dim / 8; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) rows.outputs[i][j] = 0.0f;
    }
}

template <class Kv, int head_dim>
__device__ __forceinline__ void attention_prefill(const AttentionArguments& args, const PrefillTile* tiles) {
    DYNAMIC_SHARED(PrefillShared<head_dim>, shared);
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, kv_head = blockIdx.y;
    wait_for_kernels_before();
    const PrefillTile tile = tiles[blockIdx.x];
    const AttentionSequence sequence = args.sequences[tile.sequence];
    const int group = args.num_heads / args.num_kv_heads;
    const int end_row = sequence.num_queries * group, first_row = tile.tile * kBlockRows;
    const RowRange block_rows = {first_row, min(first_row + kBlockRows, end_row)};
    const Positions block_keys = visible_keys(args, sequence, block_rows, group);

    const uint32_t* block_table = args.block_tables + sequence.first_block;
    const uint16_t* keys = args.kv + static_cast<size_t>(kv_head) * args.head_stride;
    const auto copy = [&](const uint16_t* head, int partition, uint16_t* target) {
        copy_tile<head_dim, kPartitionKeys>(args, block_table, head, partition * kPartitionKeys, block_keys, target, threadIdx.x,
                                            kAttentionThreads);
    };
    const int first_partition = block_keys.begin / kPartitionKeys;
    const int end_partition = (block_keys.end - 1) / kPartitionKeys + 1;
    copy(keys, first_partition, shared->keys);
    cp_async_commit();

    load_queries<Kv, head_dim>(args, sequence, block_rows, kBlockRows, kv_head, shared->queries);
    __syncthreads();
    const uint16_t* queries = shared->queries + warp * kTileRows * kPitch<head_dim>;
    const auto load_query = [&](uint32_t (&a)[4], int step) { load_query_words<head_dim>(a, queries, step); };

    const int warp_row = first_row + warp * kTileRows;
    const RowRange warp_rows = {warp_row, min(warp_row + kTileRows, end_row)};
    Positions warp_keys = {0, 0}, lane_keys[2] = {{0, 0}, {0, 0}};
    if (warp_rows.first < warp_rows.end) warp_keys = visible_keys(args, sequence, warp_rows, group);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = warp_row + lane / 4 + 8 * half;
        if (row < end_row) lane_keys[half] = visible_keys(args, sequence, row, group);
    }

    LaneRows<head_dim> rows;
    rows.total[0] = rows.total[1] = empty_row();
    for (int partition = first_partition; partition < end_partition;) {
        const bool is_first_span = partition == first_partition;
        const int end_span = min(partition / kSpanPartitions * kSpanPartitions + kSpanPartitions, end_partition);
        begin_span(rows);
        for (; partition < end_span; partition++) {
            const int start = partition * kPartitionKeys;
            const bool sees = start < warp_keys.end && warp_keys.begin < start + kPartitionKeys;
            cp_async_wait<0>();
            __syncthreads();  // the keys are there, and nobody reads the values of the partition before
            copy(keys + args.head_stride / 2, partition, shared->values);
            cp_async_commit();
            float scores[kPartitionKeys / 8][4];
            if (sees) multiply_keys<Kv, head_dim, kPartitionKeys>(load_query, shared->keys, scores);
#ifndef PLANT_MISSING_BARRIER
            __syncthreads();  // nobody reads the keys
#endif
            if (partition + 1 < end_partition) copy(keys, partition + 1, shared->keys);
            cp_async_commit();
            RowState states[2];
            uint32_t weights[kPartitionKeys / 16][4];
            if (sees) {
                const Positions visible[2] = {{lane_keys[0].begin - start, lane_keys[0].end - start},
                                              {lane_keys[1].begin - start, lane_keys[1].end - start}};
                softmax_partition<Kv>(scores, visible, args.scale_log2, states, weights);
            }
            cp_async_wait<1>();
            __syncthreads();  // the values are there
            if (sees) add_partition<Kv, head_dim>(weights, shared->values, states, rows);
        }
        add_span(rows, is_first_span, shared->totals);
    }

    // A lane has read and written no totals but its own.
    const float factors[2] = {__frcp_rn(rows.total[0].sum), __frcp_rn(rows.total[1].sum)};
    for (int i = 0; i < head_dim / 8; i++) {
        const float4 total = shared->totals[i * kAttentionThreads + threadIdx.x];
        const float2 pairs[2] = {make_float2(total.x, total.y), make_float2(total.z, total.w)};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = warp_row + lane / 4 + 8 * half;
            if (row >= end_row) continue;
            const size_t begin = row_offset(sequence, row, group, kv_head, args.num_heads * head_dim, head_dim);
            store_pair(args.out, begin + 8 * i + lane % 4 * 2, args.out_type, __fmul_rn(pairs[half].x, factors[half]),
                       __fmul_rn(pairs[half].y, factors[half]));
        }
    }
}

// The launcher (src/cuda/attention_prefill.rs) gives this many bytes.
static_assert(sizeof(PrefillShared<128>) == 384 * (128 + 8) + 256 * 128, "shared memory");

extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2) attention_prefill_f16_32(
    const __grid_constant__ AttentionArguments args, const PrefillTile* __restrict__ tiles) {
    attention_prefill<F16Kv, 32>(args, tiles);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2) attention_prefill_f16_64(
    const __grid_constant__ AttentionArguments args, const PrefillTile* __restrict__ tiles) {
    attention_prefill<F16Kv, 64>(args, tiles);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2) attention_prefill_f16_80(
    const __grid_constant__ AttentionArguments args, const PrefillTile* __restrict__ tiles) {
    attention_prefill<F16Kv, 80>(args, tiles);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2) attention_prefill_f16_96(
    const __grid_constant__ AttentionArguments args, const PrefillTile* __restrict__ tiles) {
    attention_prefill<F16Kv, 96>(args, tiles);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2) attention_prefill_f16_128(
    const __grid_constant__ AttentionArguments args, const PrefillTile* __restrict__ tiles) {
    attention_prefill<F16Kv, 128>(args, tiles);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2) attention_prefill_bf16_32(
    const __grid_constant__ AttentionArguments args, const PrefillTile* __restrict__ tiles) {
    attention_prefill<Bf16Kv, 32>(args, tiles);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2) attention_prefill_bf16_64(
    const __grid_constant__ AttentionArguments args, const PrefillTile* __restrict__ tiles) {
    attention_prefill<Bf16Kv, 64>(args, tiles);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2) attention_prefill_bf16_80(
    const __grid_constant__ AttentionArguments args, const PrefillTile* __restrict__ tiles) {
    attention_prefill<Bf16Kv, 80>(args, tiles);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2) attention_prefill_bf16_96(
    const __grid_constant__ AttentionArguments args, const PrefillTile* __restrict__ tiles) {
    attention_prefill<Bf16Kv, 96>(args, tiles);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2) attention_prefill_bf16_128(
    const __grid_constant__ AttentionArguments args, const PrefillTile* __restrict__ tiles) {
    attention_prefill<Bf16Kv, 128>(args, tiles);
}
