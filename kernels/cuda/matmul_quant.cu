/** Products with weights that stay quantized, Q8_0 and Q4_K, and the rows of such matrices. Products are made for decoding, and right
 *  for any number of rows: up to 16 are bound by the bytes of the weights, 1.06 and 0.56 a number; more read them again for every
 *  16. Activations are rounded to 8 bits group by group of their own row, as on the CPU (src/cpu/linear/int8.rs).
 *
 *  | kernel | reads | writes |
 *  | --- | --- | --- |
 *  | quantize_rows | x f32 `[rows, columns]` | codes i8 `[rows, columns]`, scales f32 and sums i32 `[rows, groups]` |
 *  | matvec_q8_0 | codes and scales of x; codes i8 `[features, columns]`, scales f16 `[features, groups]`; bias or null | out `[rows, features]`, as `finish` says |
 *  | matvec_q4_k | codes, scales, sums of x; blocks of 144 bytes `[features, columns / 256]` as in a GGUF file; bias or null | the same |
 *  | embed_q8_0, embed_q4_k | weights as above, indices `[rows]` | out f32 `[rows, columns]`: row `indices[i]` of the matrix; NaN where there is none |
 *
 *  A group is 32 columns. With q the weight's codes, x those of the activations, d the scale(s) of the weight in the group:
 *
 *      dot    q . x                               one m16n8k32 instruction, exact
 *      part   Q8_0  d dot
 *             Q4_K  fma(d, scale dot, -(d_min (min sum(x))))
 *      slice  sum = fma(part, scale of x, sum)    eight groups in order, from zero
 *      total  slices of 256 columns in order      product.cuh
 *
 *  The parts have the bits of the CPU's; integers are exact, so a kernel for many rows may take them in other tiles and give the
 *  same bits. Warps are those of matvec.cu: a block has 16 rows (`blockIdx.x`, so that blocks that run together share weights) and 8
 *  features (`blockIdx.y`), its warps share the slices, with 8 loads of 8 bytes a lane in flight (Q4_K: 4 and the header). A lane's 8
 *  bytes are columns 8 t .. 8 t + 7 of a group, its part of one instruction.
 *
 *  Limits: columns are a multiple of 32 (Q8_0) or 256 (Q4_K); rows are aligned to 16 bytes.
 *
 *  Expected on an H200 (4.3 TB/s): 4096 x 4096 in Q8_0 (17.8 MB) 4.1 us of memory and about 2 us for launch and tail. Q4_K has 1.1 KiB
 *  a warp in flight, a quarter of what bf16 has: 2 blocks of 8 warps an SM (at most 128 registers) are 18 KiB of the 26 KiB that the
 *  latency asks for (matvec.cu), so its 9.4 MB take 3.2 us and not 2.2. Two slices at once would mend that, and need more registers. */
#include "product.cuh"

constexpr int kBytesPerLoad = 8;
/** Bytes of a block of Q4_K, whose 256 numbers are a slice. */
constexpr int kQ4KBytes = 144;
/** Bytes of its header: two scales and twelve bytes of packed scales and minima. */
constexpr int kQ4KHeader = 16;

/** Rounds the group of this warp: `blockIdx.x` is the row, warps share its groups. Not finite: the scale is NaN. */
extern "C" __global__ void __launch_bounds__(256) quantize_rows(
    const float* x, int8_t* __restrict__ codes, float* __restrict__ scales, int* __restrict__ sums,
    int columns) {
    wait_for_kernels_before();
    const int lane = threadIdx.x % kLanes, groups = columns / kGroupColumns;
    for (int group = threadIdx.x / kLanes; group < groups; group += blockDim.x / kLanes) {
        const size_t index = static_cast<size_t>(blockIdx.x) * columns + group * kGroupColumns + lane;
        const float value = x[index];
        // As integers, magnitudes have the order of numbers, infinity and NaN above all.
        uint32_t peak_bits = __float_as_uint(value) & 0x7fffffffu;
#pragma unroll
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
            peak_bits = max(peak_bits, __shfl_xor_sync(kAllLanes, peak_bits, lanes));
        }
        const float peak = __uint_as_float(peak_bits);
        const bool is_finite = peak_bits < 0x7f800000u;
        // Below this the inverse of the scale would not be finite: the group is zero.
        const bool is_zero = peak < 1e-35f;
        const int code = is_finite && !is_zero ? __float2int_rn(value * (127.0f / peak)) : 0;
        int sum = code;
#pragma unroll
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
        codes[index] = static_cast<int8_t>(code);
        if (lane == 0) {
            const size_t at = static_cast<size_t>(blockIdx.x) * groups + group;
            scales[at] = !is_finite ? __int_as_float(0x7fc00000) : is_zero ? 0.0f : peak / 127.0f;
            sums[at] = sum;
        }
    }
}

/** Activations in 8 bits. */
struct QuantRows {
    const int8_t* codes;
    const float* scales;
    /** Null where weights have no minimum. */
    const int* sums;
    int rows, columns;
};

/** `dots[16 rows, 8 features]` of one group; `weights` are the codes of feature `lane / 4`. */
__device__ __forceinline__ void multiply_codes(const QuantRows& x, int group, uint2 weights, int (&dots)[4]) {
    const int lane = threadIdx.x % kLanes, row = blockIdx.x * kTileRows + lane / 4;
    const int8_t* codes = x.codes + static_cast<size_t>(row) * x.columns + group * kGroupColumns + lane % 4 * kBytesPerLoad;
    uint2 low = make_uint2(0, 0), high = make_uint2(0, 0);
    if (row < x.rows) low = *reinterpret_cast<const uint2*>(codes);
    if (row + 8 < x.rows) high = *reinterpret_cast<const uint2*>(codes + static_cast<size_t>(8) * x.columns);
    const uint32_t a[4] = {low.x, high.x, low.y, high.y}, b[2] = {weights.x, weights.y};
    mma_m16n8k32_s8(dots, a, b);
}

/** `values[group]` of row `row`, or 0 behind the last row. */
template <class T>
__device__ __forceinline__ T of_row(const T* values, const QuantRows& x, int row, int group) {
    return row < x.rows ? values[static_cast<size_t>(row) * (x.columns / kGroupColumns) + group] : T(0);
}

/** Adds all slices and finishes the block's 16 x 8 sums. */
__device__ __forceinline__ void finish_block(const float4* slice_sums, const QuantRows& x, const float* bias, void* out,
                                             int features, int finish) {
    __syncthreads();
    for (int element = threadIdx.x; element < 4 * kLanes; element += blockDim.x) {
        const TileElement at(element, blockIdx.x, blockIdx.y);
        if (!at.is_inside(x.rows, features)) continue;
        const float sum = add_slices<1>(slice_sums, 0, element, count_slices(x.columns));
        finish_sum(sum, at.index(features), at.feature, bias, out, finish);
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) matvec_q8_0(
    const int8_t* x_codes, const float* x_scales, const int8_t* __restrict__ codes,
    const __half* __restrict__ scales, const float* __restrict__ bias, void* __restrict__ out, int rows, int columns,
    int features, int finish) {
    DYNAMIC_SHARED(float4, slice_sums);
    const QuantRows x = {x_codes, x_scales, nullptr, rows, columns};
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, num_warps = blockDim.x / kLanes;
    const int groups = columns / kGroupColumns, num_slices = count_slices(columns);
    const int feature = blockIdx.y * kTileFeatures + lane / 4;
    const int8_t* row = codes + static_cast<size_t>(feature) * columns + lane % 4 * kBytesPerLoad;
    uint2 words[kSliceGroups];
    // Behind the last column and behind the last feature they are zeros. A branch, as in matvec.cu.
    const auto load_weights = [&](int slice) {
        if (slice >= num_slices) return;
#pragma unroll
        for (int i = 0; i < kSliceGroups; i++) {
            const int group = slice * kSliceGroups + i;
            const bool exists = feature < features && group < groups;
            words[i] = exists ? load_streaming_8(row + group * kGroupColumns) : make_uint2(0, 0);
        }
    };
    load_weights(warp);
    wait_for_kernels_before();
    for (int slice = warp; slice < num_slices; slice += num_warps, load_weights(slice)) {
        const int first = slice * kSliceGroups;
        float sums[4] = {};
#pragma unroll
        for (int i = 0; i < kSliceGroups; i++) {
            if (first + i >= groups) break;  // the same for all lanes
            int dots[4];
            multiply_codes(x, first + i, words[i], dots);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int sum_feature = blockIdx.y * kTileFeatures + feature_of_sum(lane, j);
                const float d = sum_feature < features
                                    ? __half2float(scales[static_cast<size_t>(sum_feature) * groups + first + i])
                                    : 0.0f;
                const float x_scale = of_row(x.scales, x, blockIdx.x * kTileRows + row_of_sum(lane, j), first + i);
                sums[j] = fmaf(d * static_cast<float>(dots[j]), x_scale, sums[j]);
            }
        }
        store_slice<1>(slice_sums, slice, 0, sums);
    }
    finish_block(slice_sums, x, bias, out, features, finish);
}

/** Byte `i` of the twelve with the packed scales, which are words 1 to 3 of the header. */
__device__ __forceinline__ uint32_t scale_byte(uint4 header, int i) {
    const uint32_t words[3] = {header.y, header.z, header.w};
    return words[i / 4] >> 8 * (i % 4) & 0xff;
}

/** Scale and minimum, of 6 bits each, of group `g` (src/quant/q4_k.rs draws where they lie). */
struct GroupScale {
    int scale, min;
    __device__ __forceinline__ GroupScale(uint4 header, int g) {
        if (g < 4) {
            scale = scale_byte(header, g) & 63;
            min = scale_byte(header, g + 4) & 63;
        } else {
            scale = (scale_byte(header, g + 4) & 15) | scale_byte(header, g - 4) >> 6 << 4;
            min = scale_byte(header, g + 4) >> 4 | scale_byte(header, g) >> 6 << 4;
        }
    }
};

/** What lane `source` has. */
__device__ __forceinline__ uint4 shuffle_words(uint4 value, int source) {
    return make_uint4(__shfl_sync(kAllLanes, value.x, source), __shfl_sync(kAllLanes, value.y, source),
                      __shfl_sync(kAllLanes, value.z, source), __shfl_sync(kAllLanes, value.w, source));
}

/** The f16 number in the lower (0) or upper (1) half of a word. */
__device__ __forceinline__ float half_of(uint32_t word, int part) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16 * part)));
}

extern "C" __global__ void __launch_bounds__(256, 2) matvec_q4_k(
    const int8_t* x_codes, const float* x_scales, const int* x_sums,
    const uint8_t* __restrict__ blocks, const float* __restrict__ bias, void* __restrict__ out, int rows, int columns,
    int features, int finish) {
    DYNAMIC_SHARED(float4, slice_sums);
    const QuantRows x = {x_codes, x_scales, x_sums, rows, columns};
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, num_warps = blockDim.x / kLanes;
    const int num_slices = columns / kSliceColumns;
    const int feature = blockIdx.y * kTileFeatures + lane / 4;
    uint4 header = make_uint4(0, 0, 0, 0);
    // A plane of 32 bytes has two groups: the first in the lower halves of its bytes, the second in the upper.
    uint2 planes[kSliceGroups / 2] = {};
    const auto load_weights = [&](int slice) {
        if (feature >= features || slice >= num_slices) return;
        const uint8_t* block = blocks + (static_cast<size_t>(feature) * num_slices + slice) * kQ4KBytes;
#pragma unroll
        for (int i = 0; i < kSliceGroups / 2; i++) {
            planes[i] = load_streaming_8(block + kQ4KHeader + i * kGroupColumns + lane % 4 * kBytesPerLoad);
        }
        header = load_streaming(block);
    };
    load_weights(warp);
    wait_for_kernels_before();
    for (int slice = warp; slice < num_slices; slice += num_warps, load_weights(slice)) {
        // The two features whose sums this lane has: their headers are with the lanes that loaded them.
        const uint4 headers[2] = {shuffle_words(header, 4 * feature_of_sum(lane, 0)),
                                  shuffle_words(header, 4 * feature_of_sum(lane, 1))};
        float sums[4] = {};
#pragma unroll
        for (int i = 0; i < kSliceGroups; i++) {
            const uint2 plane = planes[i / 2];
            const int shift = i % 2 * 4, group = slice * kSliceGroups + i;
            int dots[4];
            multiply_codes(x, group, make_uint2(plane.x >> shift & 0x0f0f0f0fu, plane.y >> shift & 0x0f0f0f0fu), dots);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint4 of_feature = headers[j % 2];
                const GroupScale group_scale(of_feature, i);
                const int row = blockIdx.x * kTileRows + row_of_sum(lane, j);
                const float dot = static_cast<float>(group_scale.scale * dots[j]);
                const float min = static_cast<float>(group_scale.min * of_row(x.sums, x, row, group));
                const float part = fmaf(half_of(of_feature.x, 0), dot, -(half_of(of_feature.x, 1) * min));
                sums[j] = fmaf(part, of_row(x.scales, x, row, group), sums[j]);
            }
        }
        store_slice<1>(slice_sums, slice, 0, sums);
    }
    finish_block(slice_sums, x, bias, out, features, finish);
}

/** Numbers of the matrix as they are, for tokens: a block has a row, a thread a number at a time. */
extern "C" __global__ void __launch_bounds__(256) embed_q8_0(
    const int8_t* __restrict__ codes, const __half* __restrict__ scales, const uint32_t* indices,
    float* __restrict__ out, int table_rows, int columns) {
    wait_for_kernels_before();
    const uint32_t index = indices[blockIdx.x];
    const bool exists = index < static_cast<uint32_t>(table_rows);
    const size_t source = exists ? static_cast<size_t>(index) * columns : 0;
    float* target = out + static_cast<size_t>(blockIdx.x) * columns;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        const float value = __half2float(scales[(source + i) / kGroupColumns]) * static_cast<float>(codes[source + i]);
        target[i] = exists ? value : __int_as_float(0x7fc00000);
    }
}

extern "C" __global__ void __launch_bounds__(256) embed_q4_k(
    const uint8_t* __restrict__ blocks, const uint32_t* indices, float* __restrict__ out, int table_rows,
    int columns) {
    wait_for_kernels_before();
    const uint32_t index = indices[blockIdx.x];
    const bool exists = index < static_cast<uint32_t>(table_rows);
    const uint8_t* row = blocks + (exists ? static_cast<size_t>(index) * (columns / kSliceColumns) * kQ4KBytes : 0);
    float* target = out + static_cast<size_t>(blockIdx.x) * columns;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        const uint8_t* block = row + i / kSliceColumns * kQ4KBytes;
        const uint4 header = load_16_bytes(block);
        // Two groups share a plane of 32 bytes: the first has the lower halves.
        const int group = i % kSliceColumns / kGroupColumns;
        const uint32_t byte = block[kQ4KHeader + group / 2 * kGroupColumns + i % kGroupColumns];
        const GroupScale group_scale(header, group);
        const float code = static_cast<float>(byte >> group % 2 * 4 & 15);
        const float scale = half_of(header.x, 0) * static_cast<float>(group_scale.scale);
        const float min = half_of(header.x, 1) * static_cast<float>(group_scale.min);
        target[i] = exists ? scale * code - min : __int_as_float(0x7fc00000);
    }
}
