/** Paged attention of few queries per sequence: decode. The keys of a sequence are split over blocks, so that one long sequence
 *  fills the machine. The arithmetic, and why it gives the bits of attention_prefill.cu, is in attention.cuh.
 *
 *      grid (sequence, kv head x tile of 16 rows, span of 256 keys)       block: 4 warps, one partition of 64 keys each
 *
 *      warp 0 | keys 0..63    |                                    One row of a tile is one query head of the group,
 *      warp 1 | keys 64..127  |  -> merged in order -> span        or one of several queries with their heads.
 *      warp 2 | keys 128..191 |
 *      warp 3 | keys 192..255 |     spans, by the block that is done last -> merged in order -> out
 *
 *  A warp has room for 64 keys or for 64 values: two tiles of 32, each filled with values as soon as its keys are multiplied. No
 *  warp waits for another before the end; what it waits for, other blocks on the multiprocessor hide.
 *
 *  The last block of a tile is found by counting arrivals; who it is does not show, because it reads all spans in their order.
 *  `arrivals` is left as it was found: zeros.
 *
 *  Limits: see attention.cuh; `gridDim.z` covers the spans that the sequence with the most of them sees.
 *
 *  Expected on an H200 (4.3 TB/s), head_dim 128, f16: 4 KiB of keys and values per token and 8 kv heads. 256 sequences at 768
 *  tokens: 805 MB, 187 us; partial results add 3 %. One sequence at 1024 tokens: 4.2 MB in 32 blocks; bound by latency, about
 *  4 us. 73 KiB of shared memory (head_dim 128): 3 blocks, 12 warps an SM, each with 8 to 16 KiB under way, where the latency of
 *  memory asks for 36 KiB an SM (4.8 TB/s over 132 of them times 1 us). 100 registers. */
#include "attention.cuh"

/** Keys or values of a tile in shared memory. */
constexpr int kTileKeys = 32;

/** Results of spans, for tiles that have more than one. */
struct AttentionPartials {
    /** `[sequences][max_queries][num_heads][gridDim.z][head_dim]` */
    float* outputs;
    /** `[sequences][max_queries][num_heads][gridDim.z]` */
    RowState* states;
    /** `[sequences][gridDim.y]`, zeros between launches. */
    uint32_t* arrivals;
};

/** What a block holds in shared memory. */
template <int head_dim>
struct DecodeShared {
    struct Warp {
        union {
            /** Keys, then values. */
            uint16_t tiles[2][kTileKeys * kPitch<head_dim>];
            /** Results of the warp's partition. */
            float outputs[kTileRows * head_dim];
        };
        RowState states[kTileRows];
    };
    Warp warps[kAttentionWarps];
    uint16_t queries[kTileRows * kPitch<head_dim>];
    /** Spans of the tile that were done before this one. */
    uint32_t arrived;
};

/** The block's part of the work. */
struct DecodeTile {
    AttentionSequence sequence;
    RowRange rows;
    int group, kv_head;
    /** Keys that any row sees. */
    Positions keys;
    int first_span, num_spans;
};

__device__ __forceinline__ DecodeTile decode_tile(const AttentionArguments& args) {
    DecodeTile tile;
    tile.sequence = args.sequences[blockIdx.x];
    tile.group = args.num_heads / args.num_kv_heads;
    const int tiles_per_head = gridDim.y / args.num_kv_heads;
    tile.kv_head = blockIdx.y / tiles_per_head;
    const int num_rows = tile.sequence.num_queries * tile.group;
    const int first_row = blockIdx.y % tiles_per_head * kTileRows;
    tile.rows = {first_row, min(first_row + kTileRows, num_rows)};
    tile.keys = {0, 0};
    tile.first_span = tile.num_spans = 0;
    if (tile.rows.first < tile.rows.end) {
        tile.keys = visible_keys(args, tile.sequence, tile.rows, tile.group);
        tile.first_span = tile.keys.begin / kSpanKeys;
        tile.num_spans = (tile.keys.end - 1) / kSpanKeys + 1 - tile.first_span;
    }
    return tile;
}

/** Starts copying keys or values `32 * half..` of the warp's partition, which begins at position `start`. */
template <int head_dim>
__device__ __forceinline__ void copy_half(const AttentionArguments& args, const DecodeTile& tile, bool values, int start, int half,
                                          typename DecodeShared<head_dim>::Warp& shared) {
    const uint32_t* block_table = args.block_tables + tile.sequence.first_block;
    const uint16_t* head = args.kv + static_cast<size_t>(tile.kv_head) * args.head_stride + (values ? args.head_stride / 2 : 0);
    copy_tile<head_dim, kTileKeys>(args, block_table, head, start + half * kTileKeys, tile.keys, shared.tiles[half],
                                   threadIdx.x % kLanes, kLanes);
    cp_async_commit();
}

/** One partition, by one warp, whose keys are on their way: the results of its rows to shared memory. */
template <class Kv, int head_dim>
__device__ __forceinline__ void attend_partition(const AttentionArguments& args, const DecodeTile& tile, int start,
                                                 const uint16_t* queries, typename DecodeShared<head_dim>::Warp& shared) {
    const int lane = threadIdx.x % kLanes;
    float scores[kPartitionKeys / 8][4];
    const auto load_query = [&](uint32_t (&a)[4], int step) { load_query_words<head_dim>(a, queries, step); };
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float(&half)[kTileKeys / 8][4] = *reinterpret_cast<float(*)[kTileKeys / 8][4]>(scores[i * kTileKeys / 8]);
        cp_async_wait<1>();
        __syncwarp();
        multiply_keys<Kv, head_dim, kTileKeys>(load_query, shared.tiles[i], half);
        __syncwarp();  // all lanes have read the keys that the values replace
        copy_half<head_dim>(args, tile, true, start, i, shared);
    }
    Positions visible[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = tile.rows.first + lane / 4 + 8 * half;
        visible[half] = visible_keys(args, tile.sequence, row, tile.group);
        visible[half] = row < tile.rows.end ? Positions{visible[half].begin - start, visible[half].end - start} : Positions{0, 0};
    }
    RowState states[2];
    uint32_t weights[kPartitionKeys / 16][4];
    softmax_partition<Kv>(scores, visible, args.scale_log2, states, weights);

    constexpr int kTileSteps = kTileKeys / 16;
    float outputs[head_dim / 16][2][4] = {};
#ifdef PLANT_LOOSE_WAIT
    cp_async_wait<2>();
#else
    cp_async_wait<1>();
#endif
    __syncwarp();
#pragma unroll
    for (int i = 0; i < head_dim / 16; i++) {
        multiply_values<Kv, head_dim, kTileSteps>(weights, shared.tiles[0] + 16 * i, outputs[i]);
    }
    cp_async_wait<0>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < head_dim / 16; i++) {
        multiply_values<Kv, head_dim, kTileSteps>(weights + kTileSteps, shared.tiles[1] + 16 * i, outputs[i]);
    }
    __syncwarp();  // all lanes have read the values that the results replace
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = lane / 4 + 8 * half;
        if (lane % 4 == 0) shared.states[row] = states[half];
#pragma unroll
        for (int i = 0; i < head_dim / 8; i++) {
            const float* pair = &outputs[i / 2][i % 2][2 * half];
            *reinterpret_cast<float2*>(shared.outputs + row * head_dim + 8 * i + lane % 4 * 2) = make_float2(pair[0], pair[1]);
        }
    }
}

/** Merges the spans of a row, in their order, from `next(span)`'s state and pair of outputs, and writes the pair to `out`. */
template <int head_dim, class Next>
__device__ __forceinline__ void finish_pair(const AttentionArguments& args, const DecodeTile& tile, int row, int d, Next next) {
    RowState total = empty_row();
    float2 output = make_float2(0.0f, 0.0f);
#pragma unroll 4
    for (int span = 0; span < tile.num_spans; span++) {
        float2 part;
        const MergeFactors factors = merge(total, next(span, part));
        output = make_float2(merge_output(output.x, part.x, factors), merge_output(output.y, part.y, factors));
    }
    const float factor = __frcp_rn(total.sum);
    const int stride = args.num_heads * head_dim;
    const size_t start = row_offset(tile.sequence, tile.rows.first + row, tile.group, tile.kv_head, stride, head_dim);
    store_pair(args.out, start + d, args.out_type, __fmul_rn(output.x, factor), __fmul_rn(output.y, factor));
}

template <class Kv, int head_dim>
__device__ __forceinline__ void attention_decode(const AttentionArguments& args, const AttentionPartials& partials,
                                                 int max_queries) {
    DYNAMIC_SHARED(DecodeShared<head_dim>, shared);
    wait_for_kernels_before();
    const DecodeTile tile = decode_tile(args);
    const int span = blockIdx.z, warp = threadIdx.x / kLanes;
    if (span >= tile.num_spans) return;
    const int start = (tile.first_span + span) * kSpanKeys + warp * kPartitionKeys;
    const bool sees = start < tile.keys.end && tile.keys.begin < start + kPartitionKeys;
    typename DecodeShared<head_dim>::Warp& own = shared->warps[warp];
    if (sees) {
        copy_half<head_dim>(args, tile, false, start, 0, own);
        copy_half<head_dim>(args, tile, false, start, 1, own);
    }
    load_queries<Kv, head_dim>(args, tile.sequence, tile.rows, kTileRows, tile.kv_head, shared->queries);
    __syncthreads();  // the queries are there
    if (sees) {
        attend_partition<Kv, head_dim>(args, tile, start, shared->queries, own);
    } else if (threadIdx.x % kLanes < kTileRows) {
        own.states[threadIdx.x % kLanes] = empty_row();
    }
    __syncthreads();

    // The span, by pairs of columns: each thread merges the partitions in order.
    const int num_pairs = (tile.rows.end - tile.rows.first) * (head_dim / 2);
    const auto partial_row = [&](int row) {
        const int query = (tile.rows.first + row) / tile.group, head = (tile.rows.first + row) % tile.group;
        const size_t query_idx = static_cast<size_t>(blockIdx.x) * max_queries + query;
        return (query_idx * args.num_heads + tile.kv_head * tile.group + head) * gridDim.z;
    };
    for (int i = threadIdx.x; i < num_pairs; i += kAttentionThreads) {
        const int row = i / (head_dim / 2), d = i % (head_dim / 2) * 2;
        RowState state = empty_row();
        float2 output = make_float2(0.0f, 0.0f);
        for (int w = 0; w < kAttentionWarps; w++) {
            const RowState part_state = shared->warps[w].states[row];
            // What a warp without keys would have written is not there.
            if (part_state.sum == 0.0f) continue;
            const float2 part = *reinterpret_cast<const float2*>(shared->warps[w].outputs + row * head_dim + d);
            const MergeFactors factors = merge(state, part_state);
            output = make_float2(merge_output(output.x, part.x, factors), merge_output(output.y, part.y, factors));
        }
        if (tile.num_spans == 1) {
            finish_pair<head_dim>(args, tile, row, d, [&](int, float2& part) { part = output; return state; });
            continue;
        }
        const size_t at = partial_row(row) + span;
        *reinterpret_cast<float2*>(partials.outputs + at * head_dim + d) = output;
        if (d == 0) partials.states[at] = state;
    }
    if (tile.num_spans == 1) return;

    // Whoever arrives last sees what all others wrote before they arrived.
    uint32_t* arrivals = partials.arrivals + static_cast<size_t>(blockIdx.x) * gridDim.y + blockIdx.y;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared->arrived = atomicAdd(arrivals, 1u);
    __syncthreads();
    if (shared->arrived != static_cast<uint32_t>(tile.num_spans - 1)) return;
    __threadfence();
    if (threadIdx.x == 0) *arrivals = 0;
    for (int i = threadIdx.x; i < num_pairs; i += kAttentionThreads) {
        const int row = i / (head_dim / 2), d = i % (head_dim / 2) * 2;
        const size_t first = partial_row(row);
        finish_pair<head_dim>(args, tile, row, d, [&](int s, float2& part) {
            // Past the L1 cache, which may hold an older content of these addresses.
            part = __ldcg(reinterpret_cast<const float2*>(partials.outputs + (first + s) * head_dim + d));
            const float2 state = __ldcg(reinterpret_cast<const float2*>(partials.states + first + s));
            return RowState{state.x, state.y};
        });
    }
}

// The launcher (src/cuda/attention_decode.rs) gives this many bytes.
static_assert(sizeof(DecodeShared<128>) == 512 * (128 + 9) + 32 * (128 + 8) + 4, "shared memory");

extern "C" __global__ void __launch_bounds__(kAttentionThreads) attention_decode_f16_32(
    const __grid_constant__ AttentionArguments args, const __grid_constant__ AttentionPartials partials, int max_queries) {
    attention_decode<F16Kv, 32>(args, partials, max_queries);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads) attention_decode_f16_64(
    const __grid_constant__ AttentionArguments args, const __grid_constant__ AttentionPartials partials, int max_queries) {
    attention_decode<F16Kv, 64>(args, partials, max_queries);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads) attention_decode_f16_80(
    const __grid_constant__ AttentionArguments args, const __grid_constant__ AttentionPartials partials, int max_queries) {
    attention_decode<F16Kv, 80>(args, partials, max_queries);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads) attention_decode_f16_96(
    const __grid_constant__ AttentionArguments args, const __grid_constant__ AttentionPartials partials, int max_queries) {
    attention_decode<F16Kv, 96>(args, partials, max_queries);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads) attention_decode_f16_128(
    const __grid_constant__ AttentionArguments args, const __grid_constant__ AttentionPartials partials, int max_queries) {
    attention_decode<F16Kv, 128>(args, partials, max_queries);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads) attention_decode_f16_256(
    const __grid_constant__ AttentionArguments args, const __grid_constant__ AttentionPartials partials, int max_queries) {
    attention_decode<F16Kv, 256>(args, partials, max_queries);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads) attention_decode_bf16_32(
    const __grid_constant__ AttentionArguments args, const __grid_constant__ AttentionPartials partials, int max_queries) {
    attention_decode<Bf16Kv, 32>(args, partials, max_queries);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads) attention_decode_bf16_64(
    const __grid_constant__ AttentionArguments args, const __grid_constant__ AttentionPartials partials, int max_queries) {
    attention_decode<Bf16Kv, 64>(args, partials, max_queries);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads) attention_decode_bf16_80(
    const __grid_constant__ AttentionArguments args, const __grid_constant__ AttentionPartials partials, int max_queries) {
    attention_decode<Bf16Kv, 80>(args, partials, max_queries);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads) attention_decode_bf16_96(
    const __grid_constant__ AttentionArguments args, const __grid_constant__ AttentionPartials partials, int max_queries) {
    attention_decode<Bf16Kv, 96>(args, partials, max_queries);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads) attention_decode_bf16_128(
    const __grid_constant__ AttentionArguments args, const __grid_constant__ AttentionPartials partials, int max_queries) {
    attention_decode<Bf16Kv, 128>(args, partials, max_queries);
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads) attention_decode_bf16_256(
    const __grid_constant__ AttentionArguments args, const __grid_constant__ AttentionPartials partials, int max_queries) {
    attention_decode<Bf16Kv, 256>(args, partials, max_queries);
}
