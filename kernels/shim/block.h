/** Runs a grid: blocks one after the other, the threads of a block as fibers in one of several hostile orders. Barriers and
 *  warp collectives are rendezvous; a block in which nobody can go on is reported, not waited for.
 *
 *  A kernel may be begun before the one in front of it has run, as with programmatic dependent launch: one of its blocks goes as
 *  far as it can, and only when all of its threads wait for the kernel in front does that one run. */
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "vector_types.h"

/** A matrix `[rows, columns]` of bf16 and the tile that a copy takes of it; written by `Tiles` of launch.rs. */
struct TensorMap {
    uint64_t kind, address, rows, columns, tile_rows;
    uint64_t unused[11];
};
static_assert(sizeof(TensorMap) == 128, "as large as a device's");

/** The shared variables of this library; without any, the section is missing and both are null. */
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_shim_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __stop_shim_shared[];

namespace cpu {

constexpr int kWarpLanes = 32;
/** What unwritten memory reads as: NaN in every floating-point format, -1 as an integer. */
constexpr int kPoison = 0xff;

/** Who runs next. */
enum Order {
    FORWARD,      // threads by index
    REVERSE,      // the last one first
    RANDOM,       // shuffled each round
    WARP_GREEDY,  // one warp until it can go no further, then the next, in random order: shows missing barriers
    NUM_ORDERS,
};

/** When an asynchronous copy arrives, both of which a GPU may do. */
enum Landing {
    AT_ONCE,          // shows a buffer that is filled while others still read it
    WHEN_WAITED_FOR,  // until then its target is poison: shows a wait that is missing or allows too many in flight
    NUM_LANDINGS,
};

struct Schedule {
    Order order;
    Landing landing;
    unsigned seed;
};

/** A copy of 16 bytes that was issued; `bytes` of them come from `source`, the rest are zeros. */
struct AsyncCopy {
    void* target;
    const void* source;
    int bytes;
};

/** A copy of a tile by its map that was issued and has not landed (wgmma.h). */
struct TileCopy {
    void* target;
    TensorMap map;
    int column, row;
    uint64_t* barrier;
};

/** A product of a warpgroup, by the descriptors of its operands. */
struct WarpProduct {
    uint64_t x, w;
    bool adds;
};

/** The products of one warp of a warpgroup (wgmma.h). */
struct WarpProducts {
    std::vector<WarpProduct> issued;  // and not waited for, in order
    std::vector<size_t> group_ends;   // committed groups: how many products each and those before it have
    size_t num_issued = 0;            // ever
    bool is_fenced = false;           // since the kernel last had the registers
    float* sums[32];                  // registers of each lane
    float hidden[32][64];             // what they will hold
};

struct Thread {
    void* stack_pointer;
    dim3 index;
    int lane, warp;
    bool done, at_barrier;
    bool has_waited;  // for the kernels in front
    std::vector<AsyncCopy> copies;    // issued and not landed, in order
    std::vector<size_t> group_ends;  // committed groups: how many copies each and those before it have
};

/** Bytes that a lane brings to a collective, or takes from it. */
constexpr size_t kSlotBytes = 64;

struct Warp {
    uint32_t live = 0, arrived = 0;
    uint32_t generation = 0;  // collectives completed
    const void* kind = nullptr;  // of the collective that lanes have arrived in
    alignas(16) unsigned char in[kWarpLanes][kSlotBytes];
    alignas(16) unsigned char out[kWarpLanes][kSlotBytes];
    WarpProducts products;
};

/** The kernel in front, where it has not run yet. */
struct KernelBefore {
    void (*run)(void* context);
    void* context;
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    dim3 index, size, grid;
    int live = 0, at_barrier = 0;
    int votes = 0;  // of __syncthreads_or
    uint32_t barrier_generation = 0;
    uint64_t events = 0;  // arrivals and ends: a round without any is a deadlock
    Thread* current = nullptr;
    void* scheduler_stack_pointer = nullptr;
    const std::function<void()>* body = nullptr;
    unsigned char* dynamic_shared = nullptr;
    size_t shared_bytes = 0;
    std::vector<TileCopy> tile_copies;                     // under way
    std::vector<std::vector<WarpProduct>> group_products;  // of each warpgroup: all that were issued
    bool has_unfenced_barriers = false;
    bool is_early = false;  // the kernel in front has not run
    Landing landing = AT_ONCE;
    std::string error;  // a broken rule; ends the launch
};

/** The block that is running. A launch at a time, because shared variables are the library's; or two, where one waits for the other. */
inline Block* B = nullptr;

inline void yield() {
    Thread* me = B->current;
    shim_switch_fiber(&me->stack_pointer, B->scheduler_stack_pointer);
}

/** Ends the launch with a message; the fiber does not come back. */
[[noreturn]] inline void fail(const std::string& message) {
    if (B->error.empty()) B->error = message;
    for (;;) yield();
}

/** Apart from `thread_entry`, whose frame stays: a sanitizer would guard the message in it for ever. */
__attribute__((noinline)) inline void require_wait() {
    if (!B->current->has_waited) fail("a thread has ended that never waited for the kernels in front");
}

inline void thread_entry() {
    (*B->body)();
    require_wait();
    Thread* me = B->current;
    me->done = true;
    B->live--;
    B->warps[me->warp].live &= ~(1u << me->lane);
    B->events++;
    for (;;) yield();
}

inline void wait_for_kernels_before() {
    B->current->has_waited = true;
    B->events++;
    while (B->is_early) yield();
}

inline void barrier() {
    Thread* me = B->current;
    const uint32_t generation = B->barrier_generation;
    me->at_barrier = true;
    B->at_barrier++;
    B->events++;
    // Threads that have ended no longer count, so the last one may also be released by an end.
    while (B->barrier_generation == generation) {
        if (B->at_barrier == B->live) {
            B->at_barrier = 0;
            B->barrier_generation++;
            B->events++;
            break;
        }
        yield();
    }
    me->at_barrier = false;
}

/** Every lane of the warp brings an `In`; when all have come, `compute(in, out)` runs once over `In[32]` and `Out[32]`;
 *  every lane takes its `Out`. Lanes that have ended bring zeros. */
template <class In, class Out, class Compute>
Out collective(uint32_t mask, const In& in, Compute compute) {
    static_assert(sizeof(In) <= kSlotBytes && sizeof(Out) <= kSlotBytes, "larger than a slot");
    if (mask != ~0u) fail("a warp collective without the full mask");
    Thread* me = B->current;
    Warp& warp = B->warps[me->warp];
    const uint32_t generation = warp.generation;
    static const char kind = 0;  // one for each collective
    if (warp.arrived != 0 && warp.kind != &kind) fail("lanes of a warp are in different collectives");
    warp.kind = &kind;
    memcpy(warp.in[me->lane], &in, sizeof(In));
    warp.arrived |= 1u << me->lane;
    B->events++;
    while (warp.generation == generation) {
        if (warp.arrived == warp.live) {
            static In ins[kWarpLanes];
            static Out outs[kWarpLanes];
            memset(static_cast<void*>(ins), 0, sizeof ins);
            for (int lane = 0; lane < kWarpLanes; lane++) {
                if (warp.live >> lane & 1) memcpy(static_cast<void*>(&ins[lane]), warp.in[lane], sizeof(In));
            }
            compute(ins, outs);
            for (int lane = 0; lane < kWarpLanes; lane++) memcpy(warp.out[lane], &outs[lane], sizeof(Out));
            warp.arrived = 0;
            warp.generation++;
            break;
        }
        yield();
    }
    Out out;
    memcpy(static_cast<void*>(&out), warp.out[me->lane], sizeof(Out));
    return out;
}

inline void resume(Thread& thread) {
    if (thread.done || !B->error.empty()) return;
    B->current = &thread;
    shim_switch_fiber(&B->scheduler_stack_pointer, thread.stack_pointer);
}

/** Runs one warp until all of its threads have ended or wait for others. */
inline void run_warp(int warp) {
    const size_t first = warp * kWarpLanes, end = std::min(first + kWarpLanes, B->threads.size());
    for (uint64_t before = ~uint64_t{0}; before != B->events;) {
        before = B->events;
        for (size_t i = first; i < end; i++) resume(B->threads[i]);
    }
}

inline void run_round(Order order, std::vector<int>& sequence, std::mt19937& random) {
    if (order == WARP_GREEDY || order == RANDOM) std::shuffle(sequence.begin(), sequence.end(), random);
    for (int i : sequence) {
        if (order == WARP_GREEDY) run_warp(i);
        else resume(B->threads[i]);
    }
}

inline std::string deadlock_message(const Block& block) {
    char text[160];
    snprintf(text, sizeof text, "deadlock in block (%u, %u, %u): %d of %d live threads wait at a barrier", block.index.x,
             block.index.y, block.index.z, block.at_barrier, block.live);
    return text;
}

__attribute__((no_sanitize_address)) inline void poison_shared() {
    for (volatile unsigned char* byte = __start_shim_shared; byte != __stop_shim_shared; byte++) *byte = kPoison;
}

/** Stacks of a block, kept from launch to launch; pages are taken as they are used. One set for a launch from outside, one for
 *  the kernel in front that runs in the middle of its early block. */
inline unsigned char* stacks_for(int num_threads) {
    struct Stacks {
        unsigned char* bytes = nullptr;
        int have = 0;
    };
    static Stacks sets[2];
    Stacks& set = sets[B == nullptr ? 0 : 1];
    if (set.have < num_threads) {
        free(set.bytes);
        set.bytes = static_cast<unsigned char*>(malloc(kStackBytes * num_threads));
        set.have = num_threads;
    }
    return set.bytes;
}

/** Runs the kernel in front of the block that waits for it. Both may be of this library. */
__attribute__((no_sanitize_address)) inline void run_before(Block& waiting, const KernelBefore& before) {
    const size_t shared_bytes = __stop_shim_shared - __start_shim_shared;
    std::vector<unsigned char> shared(shared_bytes);
    for (size_t i = 0; i < shared_bytes; i++) shared[i] = __start_shim_shared[i];
    before.run(before.context);
    for (size_t i = 0; i < shared_bytes; i++) __start_shim_shared[i] = shared[i];
    B = &waiting;
    waiting.is_early = false;
    waiting.events++;
}

/** Runs `kernel` (a closure over the arguments) as `grid` blocks of `size` threads with `shared_bytes` of dynamic shared
 *  memory, one of them before the kernel in front where there is one. Returns what went wrong; empty: nothing. */
template <class Kernel>
std::string launch(dim3 grid, dim3 size, size_t shared_bytes, Schedule schedule, const KernelBefore& before, Kernel&& kernel) {
    const int num_threads = size.x * size.y * size.z;
    const uint64_t num_blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (num_blocks == 0) return "a grid without blocks";
    unsigned char* stacks = stacks_for(num_threads);
    Block* const waiting = B;
    // Not rounded up: a sanitizer sees the byte behind the end.
    void* shared_memory = nullptr;
    if (posix_memalign(&shared_memory, 128, std::max(shared_bytes, size_t{1})) != 0) return "no shared memory";
    unsigned char* shared = static_cast<unsigned char*>(shared_memory);
    std::mt19937 random(schedule.seed);
    const std::function<void()> body = kernel;
    std::string error;
    // Any block may be the early one, and it is the first to run.
    static uint64_t num_launches = 0;
    const uint64_t early = before.run == nullptr ? 0 : (schedule.seed + num_launches++) % num_blocks;
    for (uint64_t i = 0; i < num_blocks && error.empty(); i++) {
        const uint64_t index = i == 0 ? early : i <= early ? i - 1 : i;
        Block block;
        B = &block;
        block.index = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
        block.is_early = i == 0 && before.run != nullptr;
        block.size = size;
        block.grid = grid;
        block.body = &body;
        block.landing = schedule.landing;
        block.dynamic_shared = shared;
        block.shared_bytes = shared_bytes;
        block.live = num_threads;
        block.threads.resize(num_threads);
        block.warps.resize((num_threads + kWarpLanes - 1) / kWarpLanes);
        block.group_products.resize(block.warps.size() / 4 + 1);
        memset(shared, kPoison, shared_bytes);
        poison_shared();
        for (int i = 0; i < num_threads; i++) {
            Thread& thread = block.threads[i];
            thread.stack_pointer = new_fiber(stacks + kStackBytes * i, thread_entry);
            thread.index = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
            thread.lane = i % kWarpLanes;
            thread.warp = i / kWarpLanes;
            block.warps[thread.warp].live |= 1u << thread.lane;
        }
        const int units = schedule.order == WARP_GREEDY ? static_cast<int>(block.warps.size()) : num_threads;
        std::vector<int> sequence(units);
        for (int i = 0; i < units; i++) sequence[i] = schedule.order == REVERSE ? units - 1 - i : i;
        while (block.live > 0 && block.error.empty()) {
            const uint64_t events = block.events;
            run_round(schedule.order, sequence, random);
            if (block.events != events || !block.error.empty()) continue;
            if (block.is_early) run_before(block, before);
            else block.error = deadlock_message(block);
        }
        error = block.error;
        B = waiting;
    }
    free(shared);
    return error;
}

}  // namespace cpu

#define threadIdx (cpu::B->current->index)
#define blockIdx (cpu::B->index)
#define blockDim (cpu::B->size)
#define gridDim (cpu::B->grid)
#define __syncthreads() cpu::barrier()
/** The dynamic shared memory of the block, as an array of `T` named `name`. */
#define DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(cpu::B->dynamic_shared)
