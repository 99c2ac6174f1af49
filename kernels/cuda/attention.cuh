/** Paged attention (Kwon et al. 2023, arXiv:2309.06180) with an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867;
 *  Dao 2023, arXiv:2307.08691) on tensor cores: what attention_decode.cu and attention_prefill.cu have in common, so that both
 *  give the same bits.
 *
 *  The arithmetic of one row (one query of one head), which both kernels run and which depends on nothing but its query, its
 *  position and the keys and values that it sees (row invariance, ARCHITECTURE.md):
 *
 *  1. Keys are visited in *partitions* of 64, counted from position 0. A partition is computed from nothing: each score is one
 *     chain of m16n8k16 products over head_dim; the maximum; weights `exp2(score * c - max * c)`, rounded to the type of the
 *     values; their sum, after rounding, so that the result is a true mean of values; each output is one chain of four
 *     products over the 64 keys.
 *  2. Four partitions are a *span* of 256 keys: they are merged in order into an empty row.
 *  3. Spans are merged in order into an empty row, and the result is divided by its sum.
 *
 *  The second level lets blocks of decode take a span each without writing out every partition; prefill pays one
 *  merge per 256 keys for it. A partition or a span of which a row sees no key leaves it as it was, bit for bit, so it makes no
 *  difference whether a kernel visits it. Multiplications and additions that a compiler might fuse in one kernel and not in
 *  the other are intrinsics.
 *
 *  Rests on: an element of a tensor core's product depends on its own row and column alone, not on where in the tile they lie.
 *  Holds on the CPU shim by construction; on GPUs it is what a comparison of both kernels must show.
 *
 *  Keys and values lie in blocks, outermost first `[block][layer][kv_head]`, then keys `[block_tokens][head_dim]`, then values
 *  `[block_tokens][head_dim]`. Rows are (query, head of the group), heads fastest: a tile of 16 rows holds the heads that share a
 *  kv head (Ainslie et al. 2023, arXiv:2305.13245) of several queries, or of one.
 *
 *  A slot that no row of a tile may see is never read: it may hold anything. A slot that another row of the tile sees is
 *  multiplied by a weight of zero, so values have to be finite: a NaN is the end of its sequence anyway, and may reach rows
 *  before it that are computed in the same step. */
#pragma once

#include <math.h>

#include "ptx.cuh"
#include "reduce.cuh"
#include "vec.cuh"

constexpr int kPartitionKeys = 64;
constexpr int kSpanPartitions = 4;
constexpr int kSpanKeys = kSpanPartitions * kPartitionKeys;
/** Rows of a warp's products. */
constexpr int kTileRows = 16;
/** Warps of a block of either kernel. */
constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kLanes;

/** Type of the queries or of the results, which need not be that of the blocks. */
enum ActivationType : int { kF32 = 0, kF16 = 1, kBf16 = 2 };

/** The rows of one sequence in a step. */
struct AttentionSequence {
    /** Its first row in `q` and in `out`. */
    uint32_t first_row;
    uint32_t num_queries;
    /** Position of the first query; the others follow it one by one. */
    uint32_t first_position;
    /** Where its block table begins in `block_tables`; it covers the last query's position. */
    uint32_t first_block;
};

/** Arguments of both kernels. Mirrored by `AttentionArguments` in src/cuda/attention.rs. */
struct AttentionArguments {
    /** `[rows, num_heads * head_dim]` of `q_type`, rows `q_stride` elements apart. */
    const void* q;
    /** `[rows, num_heads * head_dim]` of `out_type`. */
    void* out;
    /** The blocks, from the keys of this layer's first head in block 0 on. */
    const uint16_t* kv;
    const uint32_t* block_tables;
    const AttentionSequence* sequences;
    /** Elements between two blocks. */
    int64_t block_stride;
    /** Elements between two kv heads of a block; half of them are keys. */
    int32_t head_stride;
    int32_t q_stride;
    int32_t num_heads;
    int32_t num_kv_heads;
    /** Tokens of a block are `1 << block_shift`, at least 16. */
    int32_t block_shift;
    /** A query sees this many keys at most, its own with them; at least 1. */
    int32_t window;
    /** 0: a query also sees the keys behind its own, up to its sequence's last in this step. */
    int32_t causal;
    /** Scores are multiplied by this: `scale * log2(e)`, above 0. */
    float scale_log2;
    int32_t q_type;
    int32_t out_type;
};

/** IEEE half in the blocks. */
struct F16Kv {
    static __device__ __forceinline__ uint32_t pack(float first, float second) {
        const __half2 pair = __floats2half2_rn(first, second);
        return static_cast<uint32_t>(__half_as_ushort(pair.x)) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
    }
    /** The same for queries, which may be beyond the range: the largest number instead of infinity. NaN stays. */
    static __device__ __forceinline__ uint32_t pack_query(float first, float second) {
        return pack(saturate(first), saturate(second));
    }
    static __device__ __forceinline__ float2 unpack(uint32_t pair) {
        return make_float2(__half2float(__ushort_as_half(static_cast<uint16_t>(pair))),
                           __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16))));
    }
    static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        mma_m16n8k16_f16(d, a, b);
    }

   private:
    static __device__ __forceinline__ float saturate(float x) {
        constexpr float kLargest = 65504.0f;
        return x > kLargest ? kLargest : x < -kLargest ? -kLargest : x;
    }
};

/** bfloat16 in the blocks. */
struct Bf16Kv {
    static __device__ __forceinline__ uint32_t pack(float first, float second) { return pack_bf16(first, second); }
    static __device__ __forceinline__ uint32_t pack_query(float first, float second) { return pack_bf16(first, second); }
    static __device__ __forceinline__ float2 unpack(uint32_t pair) { return unpack_bf16(pair); }
    static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        mma_m16n8k16_bf16(d, a, b);
    }
};

/** Elements between two rows of keys, values or queries in shared memory: an odd number of 16 bytes, so that the eight rows of an
 *  `ldmatrix` lie in different banks. */
template <int head_dim>
constexpr int kPitch = head_dim + 8;

/** Positions `begin..end`. */
struct Positions {
    int begin, end;
};

/** Where the rows of a tile are: row r is head `r % group` of query `r / group`. */
struct RowRange {
    int first, end;
};

/** The keys that a row of `sequence` sees. */
__device__ __forceinline__ Positions visible_keys(const AttentionArguments& args, const AttentionSequence& sequence, int row,
                                                  int group) {
    const int own_end = static_cast<int>(sequence.first_position) + row / group + 1;
    const int last_end = static_cast<int>(sequence.first_position + sequence.num_queries);
    return {max(own_end - args.window, 0), args.causal != 0 ? own_end : last_end};
}

/** The keys that any of these rows sees. */
__device__ __forceinline__ Positions visible_keys(const AttentionArguments& args, const AttentionSequence& sequence,
                                                  RowRange rows, int group) {
    const Positions first = visible_keys(args, sequence, rows.first, group);
    const Positions last = visible_keys(args, sequence, rows.end - 1, group);
    return {first.begin, last.end};
}

/** Two neighbouring numbers of an activation. */
__device__ __forceinline__ float2 load_pair(const void* source, size_t index, int type) {
    if (type == kF32) {
        const float2 pair = *reinterpret_cast<const float2*>(static_cast<const float*>(source) + index);
        return pair;
    }
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(source) + index);
    return type == kF16 ? F16Kv::unpack(pair) : Bf16Kv::unpack(pair);
}

__device__ __forceinline__ void store_pair(void* target, size_t index, int type, float first, float second) {
    if (type == kF32) {
        *reinterpret_cast<float2*>(static_cast<float*>(target) + index) = make_float2(first, second);
        return;
    }
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(target) + index) =
        type == kF16 ? F16Kv::pack(first, second) : Bf16Kv::pack(first, second);
}

/** Where row `row` of a sequence begins in `q` (rows `stride` apart) or in `out`. */
__device__ __forceinline__ size_t row_offset(const AttentionSequence& sequence, int row, int group, int kv_head, int stride,
                                             int head_dim) {
    const size_t token = static_cast<size_t>(sequence.first_row) + row / group;
    return token * stride + static_cast<size_t>(kv_head * group + row % group) * head_dim;
}

/** Copies the queries of `rows` to shared memory `[num_rows][kPitch]` in the type of the blocks; rows behind the end are zeros. All
 *  threads of the block take part; a barrier has to follow. */
template <class Kv, int head_dim>
__device__ __forceinline__ void load_queries(const AttentionArguments& args, const AttentionSequence& sequence, RowRange rows,
                                             int num_rows, int kv_head, uint16_t* queries) {
    const int group = args.num_heads / args.num_kv_heads;
    for (int i = threadIdx.x; i < num_rows * (head_dim / 2); i += kAttentionThreads) {
        const int row = i / (head_dim / 2), d = i % (head_dim / 2) * 2;
        float2 pair = make_float2(0.0f, 0.0f);
        if (rows.first + row < rows.end) {
            const size_t start = row_offset(sequence, rows.first + row, group, kv_head, args.q_stride, head_dim);
            pair = load_pair(args.q, start + d, args.q_type);
        }
        *reinterpret_cast<uint32_t*>(queries + row * kPitch<head_dim> + d) = Kv::pack_query(pair.x, pair.y);
    }
}

/** Starts copying positions `first..first + num_keys` of one head to shared memory `[num_keys][kPitch]`; those outside `wanted`
 *  arrive as zeros. `head` is the head's keys or values in block 0. Thread `thread` of `num_threads` does its share. */
template <int head_dim, int num_keys>
__device__ __forceinline__ void copy_tile(const AttentionArguments& args, const uint32_t* block_table, const uint16_t* head,
                                          int first, Positions wanted, uint16_t* tile, int thread, int num_threads) {
    constexpr int kPieces = head_dim / 8;  // of 16 bytes
#pragma unroll 2
    for (int i = thread; i < num_keys * kPieces; i += num_threads) {
        const int key = i / kPieces, piece = i % kPieces;
        const int position = first + key;
        const bool is_wanted = wanted.begin <= position && position < wanted.end;
        const uint16_t* source = head;
        if (is_wanted) {
#ifdef PLANT_PAGE_OFF_BY_ONE
            const int slot = (position + 1) & ((1 << args.block_shift) - 1);
#else
            const int slot = position & ((1 << args.block_shift) - 1);
#endif
            source += block_table[position >> args.block_shift] * args.block_stride + slot * head_dim + piece * 8;
        }
        cp_async_16(tile + key * kPitch<head_dim> + piece * 8, source, is_wanted ? 16 : 0);
    }
}

/** Scores of 16 rows against `num_keys` keys in shared memory. `load_query(a, step)` gives the rows' numbers `16 step..` as
 *  the left side of a product. Of `scores[i]`, a lane has row `lane / 4` (0, 1) and 8 rows on (2, 3) at keys `8 i + lane % 4 * 2` and the
 *  next. */
template <class Kv, int head_dim, int num_keys, class LoadQuery>
__device__ __forceinline__ void multiply_keys(LoadQuery load_query, const uint16_t* keys, float (&scores)[num_keys / 8][4]) {
    const int lane = threadIdx.x % kLanes;
    // Lanes 0 to 7 point to the first 8 keys, lanes 8 to 15 to the same 8 numbers on, the others to the next 8 keys.
    const uint16_t* row = keys + (lane % 8 + lane / 16 * 8) * kPitch<head_dim> + lane / 8 % 2 * 8;
#pragma unroll
    for (int i = 0; i < num_keys / 8; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) scores[i][j] = 0.0f;
    }
    // Neither this loop nor that of `copy_tile` is unrolled whole: it would take the registers of the outputs.
#pragma unroll 1
    for (int step = 0; step < head_dim / 16; step++) {
        uint32_t a[4];
        load_query(a, step);
#pragma unroll
        for (int i = 0; i < num_keys / 16; i++) {
            uint32_t words[4];
            ldmatrix_x4(words, row + i * 16 * kPitch<head_dim> + step * 16);
            const uint32_t first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
            Kv::mma(scores[2 * i], a, first);
            Kv::mma(scores[2 * i + 1], a, second);
        }
    }
}

/** Rows of queries in shared memory `[16][kPitch]` as the left side of a product, numbers `16 step..`. */
template <int head_dim>
__device__ __forceinline__ void load_query_words(uint32_t (&a)[4], const uint16_t* queries, int step) {
    const int lane = threadIdx.x % kLanes;
    ldmatrix_x4(a, queries + lane % 16 * kPitch<head_dim> + step * 16 + lane / 16 * 8);
}

/** Online softmax of a row, or of a part of it. A part without keys has a sum of 0; one with keys has at least about 1, or NaN. */
struct RowState {
    /** Largest score times `scale_log2`. */
    float max;
    /** Sum of `exp2(score * scale_log2 - max)`. */
    float sum;
};

constexpr float kNegativeInfinity = -INFINITY;

__device__ __forceinline__ RowState empty_row() { return {kNegativeInfinity, 0.0f}; }

/** Factors of the outputs of two parts that become one. */
struct MergeFactors {
    float keep, add;
};

/** Takes `part` into `row`. */
__device__ __forceinline__ MergeFactors merge(RowState& row, RowState part) {
    // x * 1 + 0 * -0 is x for every x, -0 among them.
    if (part.sum == 0.0f) return {1.0f, -0.0f};
    const float max = fmaxf(row.max, part.max);
    const MergeFactors factors = {exp2_approx(row.max - max), exp2_approx(part.max - max)};
    row.sum = __fmaf_rn(part.sum, factors.add, __fmul_rn(row.sum, factors.keep));
    row.max = max;
    return factors;
}

__device__ __forceinline__ float merge_output(float output, float part, MergeFactors factors) {
    return __fmaf_rn(part, factors.add, __fmul_rn(output, factors.keep));
}

/** Softmax of one partition: from the scores of the two rows of a lane (see `multiply_keys`), which are overwritten, to weights, as
 *  the left sides of products with 16 values each. `visible[i]`: the keys that the row sees, counted from the partition's first. */
template <class Kv>
__device__ __forceinline__ void softmax_partition(float (&scores)[kPartitionKeys / 8][4], const Positions (&visible)[2],
                                                  float scale_log2, RowState (&states)[2],
                                                  uint32_t (&weights)[kPartitionKeys / 16][4]) {
    const int first_key = threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        RowState state = empty_row();
#pragma unroll
        for (int i = 0; i < kPartitionKeys / 8; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int key = 8 * i + first_key + j;
                float& score = scores[i][2 * half + j];
                // What a slot holds that the row does not see is dropped here, NaN too.
                score = visible[half].begin <= key && key < visible[half].end ? score : kNegativeInfinity;
                state.max = fmaxf(state.max, score);
            }
        }
        state.max = fmaxf(state.max, __shfl_xor_sync(kAllLanes, state.max, 1));
        state.max = fmaxf(state.max, __shfl_xor_sync(kAllLanes, state.max, 2));
        state.max = __fmul_rn(state.max, scale_log2);
        // Without any key the weights are 0, not those of -inf minus -inf.
        const float zero = state.max == kNegativeInfinity ? 0.0f : state.max;
#pragma unroll
        for (int i = 0; i < kPartitionKeys / 8; i++) {
            const float* pair = &scores[i][2 * half];
            const uint32_t rounded = Kv::pack(exp2_approx(__fmaf_rn(pair[0], scale_log2, -zero)),
                                              exp2_approx(__fmaf_rn(pair[1], scale_log2, -zero)));
            const float2 values = Kv::unpack(rounded);
            state.sum = __fadd_rn(__fadd_rn(state.sum, values.x), values.y);
            weights[i / 2][i % 2 * 2 + half] = rounded;
        }
        state.sum = __fadd_rn(state.sum, __shfl_xor_sync(kAllLanes, state.sum, 1));
        state.sum = __fadd_rn(state.sum, __shfl_xor_sync(kAllLanes, state.sum, 2));
        states[half] = state;
    }
}

/** `output += weights values` for 16 columns: `values` points to the first of them, of the first of `16 num_steps` keys in
 *  shared memory. Of `output[i]`, a lane has row `lane / 4` (0, 1) and 8 rows on (2, 3) at columns `8 i + lane % 4 * 2` and the next. */
template <class Kv, int head_dim, int num_steps>
__device__ __forceinline__ void multiply_values(const uint32_t (*weights)[4], const uint16_t* values, float (&output)[2][4]) {
    const int lane = threadIdx.x % kLanes;
    // Lanes 0 to 15 point to 16 keys, the others to the same ones 8 columns on.
    const uint16_t* row = values + lane % 16 * kPitch<head_dim> + lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < num_steps; step++) {
        uint32_t words[4];
        ldmatrix_x4_transposed(words, row + step * 16 * kPitch<head_dim>);
        const uint32_t first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
        Kv::mma(output[0], weights[step], first);
        Kv::mma(output[1], weights[step], second);
    }
}
