/** What happens to q, k and v between their projection and attention, in one pass: the norm of each head of q and k (Qwen3),
 *  rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the "rotate half" form, and storing k and v.
 *
 *  `qkv` f32 `[tokens, (num_heads + 2 num_kv_heads) head_dim]`: heads of q, of k, of v. Those of q and k are normed and rotated in
 *  place; k and v of token t also go, rounded to f16 or bf16, to slot `slots[t]` (`block << block_shift | offset`) of the blocks, which lie
 *  outermost first as `[block][layer][kv_head]`, then keys `[block_tokens][head_dim]`, then values `[block_tokens][head_dim]`.
 *
 *      grid (token, heads / 8)         block: 8 warps, a head each; lane l has the pairs l, l + 32, .. of (x[i], x[i + half])
 *
 *  A slot that the blocks do not have is not written. The sum of a norm has one order for each head_dim.
 *
 *  Limits: rotary_dim is even and at most head_dim.
 *
 *  Expected on an H200: 8 bytes an element of q and k in place and 6 of v; Qwen3-0.6B, 512 tokens of 4096: 17 MB, 4 us; one token: the
 *  launch, about 2 us. 8 blocks of 8 warps an SM. */
#include "ptx.cuh"
#include "reduce.cuh"
#include "vec.cuh"

/** Mirrored by `RopeArguments` in src/cuda/rope.rs. */
struct RopeArguments {
    float* qkv;
    /** Weights of the norms, `[head_dim]`; null: the heads are not normed. */
    const float* q_norm;
    const float* k_norm;
    /** `[positions, rotary_dim / 2]` */
    const float* cosines;
    const float* sines;
    /** `[tokens]` */
    const uint32_t* positions;
    const uint32_t* slots;
    /** The blocks, from the keys of this layer's first head in block 0 on. */
    uint16_t* kv;
    /** Elements between two blocks. */
    int64_t block_stride;
    /** Elements between two kv heads of a block; half of them are keys. */
    int32_t head_stride;
    int32_t block_shift;
    uint32_t num_slots;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t rotary_dim;
    float q_eps;
    float k_eps;
    uint32_t num_positions;
};

constexpr int kHeadsPerBlock = 8;

struct AsF16 {
    static __device__ __forceinline__ uint16_t round(float x) { return __half_as_ushort(__float2half_rn(x)); }
};
struct AsBf16 {
    static __device__ __forceinline__ uint16_t round(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
};

/** Multiplies each number of the head by its weight and by 1 / rms. */
__device__ __forceinline__ void norm_head(float* head, const float* weight, float eps, int head_dim) {
    const int lane = threadIdx.x % kLanes;
    float sum = 0.0f;
    for (int i = lane; i < head_dim; i += kLanes) sum += head[i] * head[i];
    const float factor = 1.0f / sqrtf(warp_sum(sum) / head_dim + eps);
    for (int i = lane; i < head_dim; i += kLanes) head[i] = head[i] * factor * weight[i];
    __syncwarp();
}

/** Turns the pairs (`head[i]`, `head[i + half]`). */
__device__ __forceinline__ void rotate_head(float* head, const float* cosines, const float* sines, int half) {
    for (int i = threadIdx.x % kLanes; i < half; i += kLanes) {
        const float first = head[i], second = head[i + half];
        head[i] = first * cosines[i] - second * sines[i];
        head[i + half] = second * cosines[i] + first * sines[i];
    }
    __syncwarp();
}

template <class As>
__device__ __forceinline__ void rope_and_store(const RopeArguments& args) {
    wait_for_kernels_before();
    const int token = blockIdx.x, head = blockIdx.y * kHeadsPerBlock + threadIdx.x / kLanes;
    const int all_heads = args.num_heads + 2 * args.num_kv_heads;
    if (head >= all_heads) return;
    float* x = args.qkv + (static_cast<size_t>(token) * all_heads + head) * args.head_dim;
    const bool is_q = head < args.num_heads, is_v = head >= args.num_heads + args.num_kv_heads;
    if (!is_v) {
        const float* norm = is_q ? args.q_norm : args.k_norm;
        if (norm != nullptr) norm_head(x, norm, is_q ? args.q_eps : args.k_eps, args.head_dim);
        const int half = args.rotary_dim / 2;
        // A position behind the table cannot come from the host, which checks; it would read what is not there.
        const uint32_t position = min(args.positions[token], args.num_positions - 1);
        const size_t angle = static_cast<size_t>(position) * half;
        if (half > 0) rotate_head(x, args.cosines + angle, args.sines + angle, half);
    }
#ifdef PLANT_ROW_BEHIND_THE_END
    const uint32_t slot = args.slots[token + 1];
#else
    const uint32_t slot = args.slots[token];
#endif
    if (is_q || slot >= args.num_slots) return;
    const int kv_head = is_v ? head - args.num_heads - args.num_kv_heads : head - args.num_heads;
#ifdef PLANT_PAGE_OFF_BY_ONE
    const uint32_t offset = (slot + 1) & ((1u << args.block_shift) - 1);
#else
    const uint32_t offset = slot & ((1u << args.block_shift) - 1);
#endif
    uint16_t* stored = args.kv + (slot >> args.block_shift) * args.block_stride +
                       static_cast<size_t>(kv_head) * args.head_stride + (is_v ? args.head_stride / 2 : 0) +
                       static_cast<size_t>(offset) * args.head_dim;
    for (int i = threadIdx.x % kLanes; i < args.head_dim; i += kLanes) stored[i] = As::round(x[i]);
}

extern "C" __global__ void __launch_bounds__(256) rope_and_store_f16(const RopeArguments args) {
    rope_and_store<AsF16>(args);
}

extern "C" __global__ void __launch_bounds__(256) rope_and_store_bf16(const RopeArguments args) {
    rope_and_store<AsBf16>(args);
}
