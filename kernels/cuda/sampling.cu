/** From rows of logits to tokens: bias, penalties, temperature, top-k, top-p, min-p and the draw, in the order and with the results
 *  of the engine's sampler on the CPU (engine/src/sampler.rs): the same logits give the same token ids.
 *
 *      grid (row)        block: 1024 threads over the row's vocabulary
 *
 *  That the results are equal rests on integers. A weight is `exp((logit - max) / temperature)` in fixed point with 40
 *  fraction bits, by the same sequence of roundings as on the CPU (intrinsics, because a fused multiply-add would round once less); sums of
 *  weights are exact in 64 bits, so neither their order nor that of the atomics shows.
 *
 *  Nothing is sorted. What top-k and top-p keep is a head of one order, logits descending and equal ones by ascending id. Its
 *  last logit is found by radix selection: three histograms of 11, 11 and 10 bits of the logit as an ordered integer, with
 *  the number and the weight of the tokens in each bin. Tokens with equal logits weigh the same, so how many of them belong to the head
 *  is a division. The draw walks along the ids: each warp sums up its part of the vocabulary, and the one in which the drawn
 *  weight lies looks for the token.
 *
 *  A row with a NaN, `+inf` or nothing but `-inf` has no token (`kNoToken`): its sequence ends, the other rows do not notice.
 *  Logprobs are not computed here.
 *
 *  Limits: token ids of bias and history are below vocab_size (checked at admission); 2^23 tokens, so that sums of weights fit.
 *
 *  Expected on an H200, vocabulary 151,936 (608 KB a row, in the L2 cache since the product): an SM reads about 110 GB/s from
 *  there, so a pass is 5.5 us. Greedy takes 1 pass, 2 with bias or penalties; a draw 1 more; top-p 3 more and one for the sum;
 *  top-k 3 more: 6 to 50 us a row, 132 rows at the same time (one block of 1024 threads, 25 KiB and 56 registers an SM). To be
 *  gained at batch 1: several blocks a row. */
#include <math.h>
#include <stdint.h>

#include "ptx.cuh"
#include "reduce.cuh"

/** Atomics and shuffles know 64 bits under this name. */
using Weight = unsigned long long;

constexpr int kSamplingThreads = 1024;
constexpr int kSamplingWarps = kSamplingThreads / kLanes;
constexpr int kBins = 2048;
constexpr int kBinsPerThread = kBins / kSamplingThreads;
/** Result of a row that is not finite. */
constexpr uint32_t kNoToken = 0xffffffffu;
/** Mark of a token that occurs, beside the number of its occurrences in the answer. */
constexpr uint32_t kOccurs = 1u << 31;
/** Weight of the most likely token. */
constexpr float kOne = 1099511627776.0f;
constexpr Weight kMostWeight = 1ull << 40;

/** How the token of a row is chosen. Mirrored by `SamplingRow` in src/cuda/sampling.rs. */
struct SamplingRow {
    uint64_t seed;
    /** Position of the token that is drawn: the counter of the random numbers. */
    uint64_t position;
    /** 0: the largest logit, the lowest id among equals. */
    float temperature;
    /** 0: all. */
    uint32_t top_k;
    float top_p;
    float min_p;
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    /** Its entries of `bias`; each id once. */
    uint32_t first_bias;
    uint32_t num_bias;
    /** Its tokens in `history`, prompt first; none where no penalty is asked for. */
    uint32_t first_history;
    uint32_t num_history;
    uint32_t prompt_tokens;
};

struct LogitBias {
    uint32_t token_id;
    float bias;
};

struct SamplingShared {
    /** Tokens of each bin, and their weight. */
    uint32_t counts[kBins];
    Weight weights[kBins];
    Weight of_warps[kSamplingWarps];
    Weight kept_of_warps[kSamplingWarps];
    /** What one thread found for all. */
    Weight before_count, before_weight;
    uint32_t bin;
};

/** The tokens that may be drawn: those above `ordered`, and the first `ties` ids of those equal to it; of all these, what weighs
 *  at least `least`. */
struct Kept {
    uint32_t ordered;
    Weight ties;
    Weight least;
};

/** The logit's bits, sorted as the logit is; -0 counts as 0. */
__device__ __forceinline__ uint32_t ordered_bits(float logit) {
    const uint32_t bits = logit == 0.0f ? 0u : __float_as_uint(logit);
    return bits >> 31 != 0 ? ~bits : bits | 1u << 31;
}

/** The logit back, -0 as 0. */
__device__ __forceinline__ float from_ordered_bits(uint32_t ordered) {
    return __uint_as_float(ordered >> 31 != 0 ? ordered & ~(1u << 31) : ~ordered);
}

/** `e^x` for `x <= 0`; see the CPU's `sampler/weights.rs`, whose every rounding this repeats. */
__device__ __forceinline__ float exp_as_sampler(float x) {
    constexpr float kLog2E = 1.44269504088896340736f, kLn2High = 355.0f / 512.0f, kLn2Low = -2.1219444e-4f;
    constexpr float kRound = 12582912.0f, kSmallest = -87.0f;
    const float clamped = fmaxf(x, kSmallest);
    const float n = __fsub_rn(__fadd_rn(__fmul_rn(clamped, kLog2E), kRound), kRound);
    const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, kLn2High)), __fmul_rn(n, kLn2Low));
    constexpr float kTaylor[7] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
    float p = 1.0f / 5040.0f;
#pragma unroll
    for (int i = 0; i < 7; i++) p = __fadd_rn(__fmul_rn(p, r), kTaylor[i]);
    const float power_of_two = __int_as_float((static_cast<int>(n) + 127) << 23);
    return x < kSmallest ? 0.0f : __fmul_rn(p, power_of_two);
}

__device__ __forceinline__ Weight weight_of(float logit, float max, float temperature) {
    return static_cast<Weight>(__fmul_rn(exp_as_sampler(__fdiv_rn(__fsub_rn(logit, max), temperature)), kOne));
}

/** SplitMix64's finaliser. */
__device__ __forceinline__ uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

/** The random number of `seed` at `position` (`sampler/rng.rs`). */
__device__ __forceinline__ uint64_t random_at(uint64_t seed, uint64_t position) {
    constexpr uint64_t kGoldenGamma = 0x9E3779B97F4A7C15ull;
    return mix(mix(seed + kGoldenGamma) + (position + 1) * kGoldenGamma);
}

/** The sum over the block, the same in all threads. A barrier stands at the end. */
__device__ __forceinline__ Weight sum_over_block(Weight value, Weight (&of_warps)[kSamplingWarps]) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
    if (threadIdx.x % kLanes == 0) of_warps[threadIdx.x / kLanes] = value;
    __syncthreads();
    Weight sum = 0;
    for (int warp = 0; warp < kSamplingWarps; warp++) sum += of_warps[warp];
    __syncthreads();
    return sum;
}

__device__ __forceinline__ Weight max_over_block(Weight value, Weight (&of_warps)[kSamplingWarps]) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
        const Weight other = __shfl_xor_sync(kAllLanes, value, lanes);
        value = other > value ? other : value;
    }
    if (threadIdx.x % kLanes == 0) of_warps[threadIdx.x / kLanes] = value;
    __syncthreads();
    Weight max = 0;
    for (int warp = 0; warp < kSamplingWarps; warp++) max = of_warps[warp] > max ? of_warps[warp] : max;
    __syncthreads();
    return max;
}

/** The sum of a value over this and all lower lanes. */
__device__ __forceinline__ Weight sum_up_to_lane(Weight value) {
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
        const Weight below = __shfl_up_sync(kAllLanes, value, lanes);
        value += lane >= lanes ? below : 0;
    }
    return value;
}

/** What one pass over a row finds. */
struct RowScan {
    /** The best token: its logit's ordered bits, and the lowest of its ids, turned around so that the largest number wins. */
    Weight best;
    /** Whether the row holds no NaN, no `+inf`, and more than `-inf`. */
    bool is_finite;
    __device__ __forceinline__ uint32_t token_id() const { return ~static_cast<uint32_t>(best); }
    __device__ __forceinline__ float max() const { return from_ordered_bits(static_cast<uint32_t>(best >> 32)); }
};

__device__ __forceinline__ RowScan scan_row(const float* logits, int vocab_size, SamplingShared& shared) {
    Weight best = 0, bad = 0;
    for (int id = threadIdx.x; id < vocab_size; id += kSamplingThreads) {
        const float logit = logits[id];
        bad |= logit < INFINITY ? 0 : 1;  // NaN is not below anything
        const Weight key = static_cast<Weight>(ordered_bits(logit)) << 32 | ~static_cast<uint32_t>(id);
        best = key > best ? key : best;
    }
    RowScan scan;
    scan.best = max_over_block(best, shared.of_warps);
    scan.is_finite = max_over_block(bad, shared.of_warps) == 0 && scan.max() > -INFINITY;
    return scan;
}

/** A logit after a change: what is masked stays so, an overflow becomes the largest finite number of its sign. */
__device__ __forceinline__ float kept_finite(float before, float after) {
    constexpr float kLargest = 3.40282346638528859812e38f;
    if (before == -INFINITY) return before;
    return after > kLargest ? kLargest : after < -kLargest ? -kLargest : after;
}

__device__ __forceinline__ void apply_bias(float* logits, const SamplingRow& row, const LogitBias* bias) {
    for (uint32_t i = threadIdx.x; i < row.num_bias; i += kSamplingThreads) {
        const LogitBias entry = bias[row.first_bias + i];
        logits[entry.token_id] = kept_finite(logits[entry.token_id], __fadd_rn(logits[entry.token_id], entry.bias));
    }
    __syncthreads();
}

/** Each token once: repetition to what occurs, then frequency and presence to what occurs in the answer. `occurrences`
 *  `[vocab_size]` is zero before and after. */
__device__ __forceinline__ void apply_penalties(float* logits, const SamplingRow& row, const uint32_t* history,
                                                uint32_t* occurrences) {
    for (uint32_t i = threadIdx.x; i < row.num_history; i += kSamplingThreads) {
        uint32_t* const of_token = &occurrences[history[row.first_history + i]];
        atomicOr(of_token, kOccurs);
        if (i >= row.prompt_tokens) atomicAdd(of_token, 1u);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < row.num_history; i += kSamplingThreads) {
        const uint32_t token_id = history[row.first_history + i];
        // Of the threads that have this token, one gets its count and leaves zero.
        const uint32_t found = atomicExch(&occurrences[token_id], 0u);
        if (found == 0) continue;
        const float before = logits[token_id], penalty = row.repetition_penalty;
        float logit = before > 0.0f ? __fdiv_rn(before, penalty) : __fmul_rn(before, penalty);
        const uint32_t in_answer = found & ~kOccurs;
        if (in_answer > 0) {
            const float frequency = __fmul_rn(row.frequency_penalty, static_cast<float>(in_answer));
            logit = __fsub_rn(__fsub_rn(logit, frequency), row.presence_penalty);
        }
        logits[token_id] = kept_finite(before, logit);
    }
    __syncthreads();
}

/** Where a head of the order ends: its last logit, and how many tokens and how much weight come before that logit's. */
struct HeadEnd {
    bool found;
    uint32_t ordered;
    Weight before_count, before_weight;
};

/** The head that first has `target` tokens, or that much weight. Not found: all of them together are less. */
template <bool by_weight>
__device__ __forceinline__ HeadEnd find_head(const float* logits, int vocab_size, float max, float temperature, Weight target,
                                             SamplingShared& shared) {
    HeadEnd end = {true, 0, 0, 0};
    uint32_t known = 0;  // bits of `ordered` that are known
#pragma unroll 1
    for (int shift = 21; shift >= 0; shift -= shift == 21 ? 11 : 10) {
        for (int bin = threadIdx.x; bin < kBins; bin += kSamplingThreads) shared.counts[bin] = 0, shared.weights[bin] = 0;
        if (threadIdx.x == 0) shared.bin = kBins;
        __syncthreads();
        for (int id = threadIdx.x; id < vocab_size; id += kSamplingThreads) {
            const float logit = logits[id];
            const uint32_t ordered = ordered_bits(logit);
            if (logit == -INFINITY || (ordered & known) != end.ordered) continue;
            const uint32_t bin = (ordered & ~known) >> shift;
            atomicAdd(&shared.counts[bin], 1u);
            const Weight weight = weight_of(logit, max, temperature);
            if (weight > 0) atomicAdd(&shared.weights[bin], weight);
        }
        __syncthreads();
        // Bins from the top: thread t has the t-th pair of them.
        Weight count = 0, weight = 0;
        const int top = kBins - 1 - kBinsPerThread * threadIdx.x;
        for (int i = 0; i < kBinsPerThread; i++) count += shared.counts[top - i], weight += shared.weights[top - i];
        Weight count_before = sum_up_to_lane(count), weight_before = sum_up_to_lane(weight);
        const int warp = threadIdx.x / kLanes;
        if (threadIdx.x % kLanes == kLanes - 1) {
            shared.of_warps[warp] = count_before;
            shared.kept_of_warps[warp] = weight_before;
        }
        __syncthreads();
        count_before += end.before_count - count;
        weight_before += end.before_weight - weight;
        for (int w = 0; w < warp; w++) count_before += shared.of_warps[w], weight_before += shared.kept_of_warps[w];
        for (int i = 0; i < kBinsPerThread; i++) {
            const Weight next_count = count_before + shared.counts[top - i], next_weight = weight_before + shared.weights[top - i];
            const Weight before = by_weight ? weight_before : count_before, next = by_weight ? next_weight : next_count;
            // True of one bin of one thread, or of none.
            if (before < target && target <= next) {
                shared.bin = top - i;
                shared.before_count = count_before;
                shared.before_weight = weight_before;
            }
            count_before = next_count;
            weight_before = next_weight;
        }
        __syncthreads();
        if (shared.bin == kBins) return {false, 0, 0, 0};
        end.ordered |= shared.bin << shift;
        end.before_count = shared.before_count;
        end.before_weight = shared.before_weight;
        known = ~((1u << shift) - 1);
        __syncthreads();
    }
    return end;
}

/** Top-k, top-p and min-p. */
__device__ __forceinline__ Kept truncate(const float* logits, int vocab_size, float max, const SamplingRow& row,
                                         SamplingShared& shared) {
    Kept kept = {0, ~Weight{0}, 1};
    Weight total = 0;
    HeadEnd head = {false, 0, 0, 0};
    if (row.top_k > 0 && row.top_k < static_cast<uint32_t>(vocab_size)) {
        head = find_head<false>(logits, vocab_size, max, row.temperature, row.top_k, shared);
    }
    if (head.found) {
        kept.ordered = head.ordered;
        kept.ties = row.top_k - head.before_count;
        total = head.before_weight + kept.ties * weight_of(from_ordered_bits(head.ordered), max, row.temperature);
    } else if (row.top_p < 1.0f) {
        for (int id = threadIdx.x; id < vocab_size; id += kSamplingThreads) total += weight_of(logits[id], max, row.temperature);
        total = sum_over_block(total, shared.of_warps);
    }
    if (row.top_p < 1.0f) {
        const double share = ceil(__dmul_rn(static_cast<double>(total), static_cast<double>(row.top_p)));
        Weight needed = static_cast<Weight>(share);
        needed = needed < 1 ? 1 : needed > total ? total : needed;
        head = find_head<true>(logits, vocab_size, max, row.temperature, needed, shared);
        const Weight each = weight_of(from_ordered_bits(head.ordered), max, row.temperature);
        kept.ordered = head.ordered;
        kept.ties = (needed - head.before_weight + each - 1) / each;
    }
    if (row.min_p > 0.0f) {
        const double share = ceil(__dmul_rn(static_cast<double>(kMostWeight), static_cast<double>(row.min_p)));
        const Weight least = static_cast<Weight>(share);
        kept.least = least > 1 ? least : 1;
    }
    return kept;
}

/** The token at the drawn weight, along the ids. */
__device__ __forceinline__ uint32_t draw(const float* logits, int vocab_size, float max, const SamplingRow& row, const Kept& kept,
                                         SamplingShared& shared) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int part = (vocab_size + kSamplingWarps - 1) / kSamplingWarps;
    const int begin = min(warp * part, vocab_size), end = min(begin + part, vocab_size);
    const auto drawable = [&](Weight weight) { return weight >= kept.least ? weight : 0; };
    // What each warp has: tokens equal to the last logit, and the weight of those above it.
    Weight ties = 0, weight = 0;
    for (int id = begin + lane; id < end; id += kLanes) {
        const uint32_t ordered = ordered_bits(logits[id]);
        ties += ordered == kept.ordered ? 1 : 0;
        weight += ordered > kept.ordered ? drawable(weight_of(logits[id], max, row.temperature)) : 0;
    }
    ties = __shfl_sync(kAllLanes, sum_up_to_lane(ties), kLanes - 1);
    weight = __shfl_sync(kAllLanes, sum_up_to_lane(weight), kLanes - 1);
    if (lane == 0) shared.of_warps[warp] = ties;
    __syncthreads();
    Weight ties_before = 0;
    for (int w = 0; w < warp; w++) ties_before += shared.of_warps[w];
    const Weight tie_weight = drawable(weight_of(from_ordered_bits(kept.ordered), max, row.temperature));
    const Weight ties_left = kept.ties > ties_before ? kept.ties - ties_before : 0;
    weight += tie_weight * (ties < ties_left ? ties : ties_left);
    if (lane == 0) shared.kept_of_warps[warp] = weight;
    __syncthreads();
    Weight before = 0, total = 0;
    for (int w = 0; w < kSamplingWarps; w++) {
        before += w < warp ? shared.kept_of_warps[w] : 0;
        total += shared.kept_of_warps[w];
    }
    // The upper half of a 128-bit product maps 64 random bits onto 0..total.
    const Weight target = __umul64hi(random_at(row.seed, row.position), total);
    if (target < before || before + weight <= target) return kNoToken;
    for (int first = begin; first < end; first += kLanes) {
        const int id = first + lane;
        const float logit = id < end ? logits[id] : -INFINITY;
        const uint32_t ordered = ordered_bits(logit);
        const bool is_tie = id < end && ordered == kept.ordered;
        const unsigned tied_lanes = __ballot_sync(kAllLanes, is_tie);
        const Weight tie_idx = ties_before + __popc(tied_lanes & ((1u << lane) - 1));
#ifdef PLANT_ONE_TIE_MORE
        const bool is_kept = is_tie ? tie_idx <= kept.ties : ordered > kept.ordered;
#else
        const bool is_kept = is_tie ? tie_idx < kept.ties : ordered > kept.ordered;
#endif
        const Weight up_to = before + sum_up_to_lane(is_kept ? drawable(weight_of(logit, max, row.temperature)) : 0);
        const unsigned reaching = __ballot_sync(kAllLanes, up_to > target);
        if (reaching != 0) return first + __ffs(static_cast<int>(reaching)) - 1;
        before = __shfl_sync(kAllLanes, up_to, kLanes - 1);
        ties_before += __popc(tied_lanes);
    }
    return kNoToken;
}

/** `logits` `[rows, vocab_size]` are overwritten where a row has bias or penalties; `tokens` `[rows]`; `occurrences`
 *  `[rows, vocab_size]`, zeros between launches, is used for rows with a history only. */
extern "C" __global__ void __launch_bounds__(kSamplingThreads) sample_rows(
    float* __restrict__ logits, int vocab_size, const SamplingRow* __restrict__ rows, const LogitBias* __restrict__ bias,
    const uint32_t* __restrict__ history, uint32_t* __restrict__ occurrences, uint32_t* __restrict__ tokens) {
    __shared__ SamplingShared shared;
    wait_for_kernels_before();
    const SamplingRow row = rows[blockIdx.x];
    const size_t start = static_cast<size_t>(blockIdx.x) * vocab_size;
    logits += start;
    if (threadIdx.x == 0) tokens[blockIdx.x] = kNoToken;
    RowScan scan = scan_row(logits, vocab_size, shared);
    // Before bias and penalties, which make infinity finite.
    if (!scan.is_finite) return;
    if (row.num_bias > 0) apply_bias(logits, row, bias);
    if (row.num_history > 0) apply_penalties(logits, row, history, occurrences + start);
    if (row.num_bias > 0 || row.num_history > 0) scan = scan_row(logits, vocab_size, shared);
    if (row.temperature == 0.0f) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = scan.token_id();
        return;
    }
    const Kept kept = truncate(logits, vocab_size, scan.max(), row, shared);
    const uint32_t token_id = draw(logits, vocab_size, scan.max(), row, kept, shared);
    // One warp found it.
    if (threadIdx.x % kLanes == 0 && token_id != kNoToken) tokens[blockIdx.x] = token_id;
}
