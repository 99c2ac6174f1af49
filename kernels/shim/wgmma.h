/** The twins of sm90.cuh: barriers in shared memory, copies of tiles, and products of warpgroups, played strictly. What the manual
 *  leaves undefined ends the launch with a message or reads as NaN:
 *
 *  - shared memory has addresses as on a device, which begin at no multiple of a swizzle pattern; descriptors and copies permute them
 *    by what they say, whatever the other one says, and a descriptor with a bit that has no meaning is refused;
 *  - a tile that is copied is poison until somebody waits for its barrier (`WHEN_WAITED_FOR`), or overwrites its target at once;
 *  - products read their operands as late as the kernel allows where copies land at once, and at once where copies land late: each
 *    mistake about who waits for whom is wrong in one of the two;
 *  - the sums of a product are poison until it was committed and waited for, and a product that follows ordinary use of its registers
 *    without a fence is refused. */
#pragma once

#include "block.h"
#include "cuda_bf16.h"

namespace cpu {

/** `TensorMap::kind`. */
constexpr uint64_t kTiledMap = 0x54494c45444d4150;
/** Bytes of a tile's row, and of the pattern in which its pieces of 16 bytes are permuted. */
constexpr uint32_t kTileRow = 128, kPattern = 1024;
/** Where dynamic shared memory begins: behind what the system takes and some static variables. */
constexpr uint32_t kSharedBase = 1024 + 128;

inline unsigned char* at_shared_address(uint32_t address, uint32_t bytes) {
    if (address < kSharedBase || address + bytes > kSharedBase + B->shared_bytes) fail("outside of the block's shared memory");
    return B->dynamic_shared + (address - kSharedBase);
}

}  // namespace cpu

/** An address as on a device. */
inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - cpu::B->dynamic_shared) + cpu::kSharedBase;
}

namespace cpu {

/** Swizzling of 128 bytes: bits 7 to 9 are added to bits 4 to 6, without carry. */
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

/** A barrier's 64 bits. A device's are opaque; those of unwritten memory are no barrier. */
struct BarrierState {
    uint32_t parity, arrivals_left, arrivals;
    int32_t bytes;
};

constexpr uint64_t kBarrierMark = 2;

inline BarrierState load_barrier(const uint64_t* barrier) {
    at_shared_address(shared_address(barrier), sizeof *barrier);
    const uint64_t bits = *barrier;
    if (bits >> 62 != kBarrierMark) fail("a barrier that was not initialized");
    const int32_t bytes = static_cast<int32_t>(static_cast<uint32_t>(bits >> 41 & 0x1fffff) << 11) >> 11;
    return {static_cast<uint32_t>(bits & 1), static_cast<uint32_t>(bits >> 1 & 0xfffff),
            static_cast<uint32_t>(bits >> 21 & 0xfffff), bytes};
}

/** Ends the phase if nothing is missing, and writes the barrier. */
inline void store_barrier(uint64_t* barrier, BarrierState state) {
    if (state.arrivals_left == 0 && state.bytes == 0) {
        state.parity ^= 1;
        state.arrivals_left = state.arrivals;
    }
    *barrier = kBarrierMark << 62 | static_cast<uint64_t>(state.bytes & 0x1fffff) << 41 |
               static_cast<uint64_t>(state.arrivals) << 21 | static_cast<uint64_t>(state.arrivals_left) << 1 | state.parity;
    B->events++;
}

inline void arrive(uint64_t* barrier, uint32_t bytes) {
    BarrierState state = load_barrier(barrier);
    if (state.arrivals_left == 0) fail("more arrivals than a phase of the barrier has");
    state.arrivals_left--;
    state.bytes += static_cast<int32_t>(bytes);
    store_barrier(barrier, state);
}

/** Writes a tile, or poison in its place. */
inline void write_tile(const TileCopy& copy, bool is_poison) {
    const TensorMap& map = copy.map;
    const uint32_t target = shared_address(copy.target);
    for (uint32_t i = 0; i < map.tile_rows; i++) {
        for (uint32_t offset = 0; offset < kTileRow; offset += 16) {
            unsigned char* piece = at_shared_address(swizzled(target + i * kTileRow + offset), 16);
            const int64_t row = copy.row + static_cast<int64_t>(i), column = copy.column + static_cast<int64_t>(offset) / 2;
            const bool is_inside = row >= 0 && row < static_cast<int64_t>(map.rows) && column >= 0 &&
                                   column < static_cast<int64_t>(map.columns);
            memset(piece, is_poison ? kPoison : 0, 16);
            if (is_poison || !is_inside) continue;
            memcpy(piece, reinterpret_cast<const unsigned char*>(map.address) + (row * map.columns + column) * 2, 16);
        }
    }
}

inline void land_tile(const TileCopy& copy) {
    write_tile(copy, false);
    BarrierState state = load_barrier(copy.barrier);
    state.bytes -= static_cast<int32_t>(copy.map.tile_rows * kTileRow);
    store_barrier(copy.barrier, state);
}

/** Makes the tiles arrive that `barrier` counts; whether there were any. */
inline bool land_tiles_of(const uint64_t* barrier) {
    std::vector<TileCopy> landing;
    const auto is_other = [=](const TileCopy& copy) { return copy.barrier != barrier; };
    const auto first = std::stable_partition(B->tile_copies.begin(), B->tile_copies.end(), is_other);
    landing.assign(first, B->tile_copies.end());
    B->tile_copies.erase(first, B->tile_copies.end());
    for (const TileCopy& copy : landing) land_tile(copy);
    return !landing.empty();
}

/** A bf16 operand in shared memory, as its descriptor finds it: 16 columns of row `row`. */
inline void load_operand_row(uint64_t descriptor, uint32_t row, float (&values)[16]) {
    constexpr uint64_t kMeaningful = 0x3fff | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62;
    if ((descriptor & ~kMeaningful) != 0) fail("a descriptor with bits that mean nothing");
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("a descriptor of other than whole patterns of 128 bytes");
    const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    const uint32_t eight_rows = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    for (uint32_t k = 0; k < 16; k += 8) {
        const uint32_t address = swizzled(start + row / 8 * eight_rows + row % 8 * kTileRow + 2 * k);
        uint16_t bits[8];
        memcpy(bits, at_shared_address(address, 16), sizeof bits);
        for (uint32_t i = 0; i < 8; i++) values[k + i] = __bfloat162float(__ushort_as_bfloat16(bits[i]));
    }
}

/** One warp's sixteen rows of a product. All products of an element and its accumulator are added before anything is rounded, as
 *  in tensor_core.h. */
inline void compute_product(Warp& warp, int warp_in_group, const WarpProduct& product) {
    constexpr int kFeatures = 128;
    static float w[16][kFeatures];
    for (int n = 0; n < kFeatures; n++) {
        float row[16];
        load_operand_row(product.w, n, row);
        for (int k = 0; k < 16; k++) w[k][n] = row[k];
    }
    for (int r = 0; r < 16; r++) {
        float x[16];
        load_operand_row(product.x, 16 * warp_in_group + r, x);
        double sums[kFeatures];
        const auto sum_of = [&](int n) -> float& {
            return warp.products.hidden[r % 8 * 4 + n % 8 / 2][n / 8 * 4 + r / 8 * 2 + n % 2];
        };
        for (int n = 0; n < kFeatures; n++) sums[n] = product.adds ? sum_of(n) : 0.0f;
        for (int k = 0; k < 16; k++) {
#ifdef PLANT_OTHER_ARITHMETIC
            if (k == 8) for (double& sum : sums) sum = static_cast<float>(sum);
#endif
            for (int n = 0; n < kFeatures; n++) sums[n] += static_cast<double>(x[k]) * w[k][n];
        }
        for (int n = 0; n < kFeatures; n++) sum_of(n) = static_cast<float>(sums[n]);
    }
}

/** Starts a product of the running warp. */
inline void issue_product(const WarpProduct& product, float* const (&sums)[kWarpLanes]) {
    const int number = B->current->warp, group = number / 4;
    WarpProducts& products = B->warps[number].products;
    if (group * 4 + 4 > static_cast<int>(B->warps.size())) fail("wgmma by fewer than four warps");
    if (products.issued.empty()) {
        if (!products.is_fenced) fail("wgmma without a fence behind other use of its registers");
        for (int lane = 0; lane < kWarpLanes; lane++) {
            products.sums[lane] = sums[lane];
            memcpy(products.hidden[lane], sums[lane], sizeof products.hidden[lane]);
            memset(static_cast<void*>(sums[lane]), kPoison, sizeof products.hidden[lane]);
        }
    }
    for (int lane = 0; lane < kWarpLanes; lane++) {
        if (products.sums[lane] != sums[lane]) fail("wgmma into other registers while products are under way");
    }
    // The four warps issue the same products in the same order, if not at the same time.
    std::vector<WarpProduct>& of_group = B->group_products[group];
    const size_t place = products.num_issued++;
    if (place == of_group.size()) of_group.push_back(product);
    const WarpProduct& first = of_group[place];
    if (first.x != product.x || first.w != product.w || first.adds != product.adds) {
        fail("the warps of a warpgroup issue different products");
    }
    products.issued.push_back(product);
    if (B->landing == WHEN_WAITED_FOR) compute_product(B->warps[number], number % 4, product);
}

/** Waits until at most `allowed` groups of the running warp are under way, and hands out the sums when no product is. */
inline void finish_products(size_t allowed) {
    const int number = B->current->warp;
    WarpProducts& products = B->warps[number].products;
    if (products.group_ends.size() <= allowed) return;
    const size_t num_groups = products.group_ends.size() - allowed, num_products = products.group_ends[num_groups - 1];
    for (size_t i = 0; i < num_products && B->landing != WHEN_WAITED_FOR; i++) {
        compute_product(B->warps[number], number % 4, products.issued[i]);
    }
    products.issued.erase(products.issued.begin(), products.issued.begin() + num_products);
    products.group_ends.erase(products.group_ends.begin(), products.group_ends.begin() + num_groups);
    for (size_t& end : products.group_ends) end -= num_products;
    if (!products.issued.empty() || num_products == 0) return;
    for (int lane = 0; lane < kWarpLanes; lane++) {
        memcpy(static_cast<void*>(products.sums[lane]), products.hidden[lane], sizeof products.hidden[lane]);
    }
    products.is_fenced = false;
}

/** What all lanes of a warp do together, with nothing to bring. */
template <class Action>
inline void together(Action action) {
    collective<char, char>(~0u, 0, [=](char*, char*) { action(); });
}

}  // namespace cpu

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    cpu::at_shared_address(shared_address(barrier), sizeof *barrier);
    if (shared_address(barrier) % sizeof *barrier != 0) cpu::fail("a barrier that is not aligned");
    *barrier = cpu::kBarrierMark << 62 | static_cast<uint64_t>(arrivals) << 21 | static_cast<uint64_t>(arrivals) << 1;
    cpu::B->has_unfenced_barriers = true;
}
inline void barrier_init_fence() { cpu::B->has_unfenced_barriers = false; }
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) { cpu::arrive(barrier, bytes); }
inline void barrier_arrive(uint64_t* barrier) { cpu::arrive(barrier, 0); }

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    while (cpu::load_barrier(barrier).parity == parity) {
        if (!cpu::land_tiles_of(barrier)) cpu::yield();
    }
}

inline void copy_tile(void* target, const TensorMap& map, int column, int row, uint64_t* barrier) {
    if (map.kind != cpu::kTiledMap) cpu::fail("a copy by something that is no tensor map");
    if (shared_address(target) % cpu::kPattern != 0) cpu::fail("a tile that does not begin with a pattern");
    if (cpu::B->has_unfenced_barriers) cpu::fail("a copy that may not see its barrier: no fence");
    cpu::load_barrier(barrier);
    const cpu::TileCopy copy = {target, map, column, row, barrier};
    if (cpu::B->landing == cpu::AT_ONCE) return cpu::land_tile(copy);
    cpu::write_tile(copy, true);
    cpu::B->tile_copies.push_back(copy);
}
inline void prefetch_map(const TensorMap&) {}

inline void wgmma_fence() {
    cpu::together([] { cpu::B->warps[cpu::B->current->warp].products.is_fenced = true; });
}
inline void wgmma_commit() {
    cpu::together([] {
        cpu::WarpProducts& products = cpu::B->warps[cpu::B->current->warp].products;
        products.group_ends.push_back(products.issued.size());
    });
}
template <int allowed>
inline void wgmma_wait() {
    cpu::together([] { cpu::finish_products(allowed); });
}
inline void wgmma_wait_all(float (&)[64]) { wgmma_wait<0>(); }

inline void wgmma_m64n128k16_bf16(float (&sums)[64], uint64_t x, uint64_t w, bool adds) {
    struct In { uint64_t x, w; float* sums; bool adds; };
    cpu::collective<In, char>(~0u, In{x, w, sums, adds}, [](In* in, char*) {
        float* all_sums[cpu::kWarpLanes];
        for (int lane = 0; lane < cpu::kWarpLanes; lane++) {
            const bool is_same = in[lane].x == in[0].x && in[lane].w == in[0].w && in[lane].adds == in[0].adds;
            if (!is_same) cpu::fail("lanes of a warp with different descriptors");
            all_sums[lane] = in[lane].sums;
        }
        cpu::issue_product({in[0].x, in[0].w, in[0].adds}, all_sums);
    });
}
