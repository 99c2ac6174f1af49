/** What the machine can do at most, for ceilings beside figures: core clock, reading memory, f32 multiply-adds, dot products
 *  of bytes and of bf16. Every test runs on the given number of threads, each on a CPU of its own; a repetition's time is
 *  from the common start to the end of the last thread. One JSON line a figure. Linux on x86-64; instructions that the
 *  compiler's target lacks are left out.
 *
 *      cc -O3 -march=native -pthread limits.c -o limits && ./limits THREADS [REPETITIONS] [MIB]
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define MAX_THREADS 256
#define MAX_REPETITIONS 64
#define HUGE_PAGE ((size_t)2 << 20)
#define PAGE ((size_t)4096)

/** Does the share of one thread; gives the units of work that it did. */
typedef double (*Work)(int thread, int threads, void *argument);

struct Job {
    int thread, threads, repetitions;
    Work work;
    void *argument;
    double *starts, *ends, *units;
};

static _Atomic int arrived, generation;
/** Keeps results alive: a result that nobody reads would not be computed. */
static volatile uint64_t sink;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void wait_for_all(int threads) {
    int before = atomic_load_explicit(&generation, memory_order_acquire);
    if (atomic_fetch_add_explicit(&arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&arrived, 0, memory_order_relaxed);
        atomic_fetch_add_explicit(&generation, 1, memory_order_acq_rel);
        return;
    }
    while (atomic_load_explicit(&generation, memory_order_acquire) == before) {
        sched_yield();
    }
}

/** The `index`-th CPU that this process may use. */
static void pin(int index) {
    cpu_set_t allowed, one;
    CPU_ZERO(&one);
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) <= index) {
        return;
    }
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &allowed) && index-- == 0) {
            CPU_SET(cpu, &one);
            pthread_setaffinity_np(pthread_self(), sizeof one, &one);
            return;
        }
    }
}

static void *run_job(void *pointer) {
    struct Job *job = pointer;
    pin(job->thread);
    for (int i = 0; i < job->repetitions; i++) {
        wait_for_all(job->threads);
        if (job->thread == 0) {
            job->starts[i] = now();
        }
        job->units[i] = job->work(job->thread, job->threads, job->argument);
        job->ends[i] = now();
    }
    wait_for_all(job->threads);
    return 0;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure(const char *limit, double scale, int threads, int repetitions, Work work, void *argument) {
    static double starts[MAX_REPETITIONS], rates[MAX_REPETITIONS];
    static double ends[MAX_THREADS][MAX_REPETITIONS], units[MAX_THREADS][MAX_REPETITIONS];
    static struct Job jobs[MAX_THREADS];
    pthread_t ids[MAX_THREADS];
    for (int t = 0; t < threads; t++) {
        jobs[t] = (struct Job){t, threads, repetitions, work, argument, starts, ends[t], units[t]};
        if (pthread_create(&ids[t], 0, run_job, &jobs[t]) != 0) {
            perror("pthread_create");
            exit(1);
        }
    }
    for (int t = 0; t < threads; t++) {
        pthread_join(ids[t], 0);
    }
    for (int i = 0; i < repetitions; i++) {
        double end = 0, done = 0;
        for (int t = 0; t < threads; t++) {
            end = ends[t][i] > end ? ends[t][i] : end;
            done += units[t][i];
        }
        rates[i] = done / (end - starts[i]) * scale;
    }
    qsort(rates, (size_t)repetitions, sizeof rates[0], ascending);
    printf("{\"limit\":\"%s\",\"threads\":%d,\"min\":%.4g,\"median\":%.4g,\"max\":%.4g}\n", limit, threads, rates[0],
           rates[repetitions / 2], rates[repetitions - 1]);
    fflush(stdout);
}

/* Memory. */

struct Memory {
    uint8_t *bytes;
    size_t len_bytes;
    /** How far ahead lines are asked for; 0: the hardware alone decides. */
    size_t prefetch_bytes;
};

static double read_memory(int thread, int threads, void *argument) {
    struct Memory *memory = argument;
    size_t share = memory->len_bytes / (size_t)threads & ~(PAGE - 1);
    const uint8_t *bytes = memory->bytes + share * (size_t)thread;
    __m256i sums[4] = {0};
    for (size_t i = 0; i < share; i += 128) {
        if (memory->prefetch_bytes) {
            _mm_prefetch((const char *)bytes + i + memory->prefetch_bytes, _MM_HINT_T0);
            _mm_prefetch((const char *)bytes + i + memory->prefetch_bytes + 64, _MM_HINT_T0);
        }
        for (size_t part = 0; part < 4; part++) {
            __m256i line = _mm256_load_si256((const __m256i *)(const void *)(bytes + i + 32 * part));
            sums[part] = _mm256_xor_si256(sums[part], line);
        }
    }
    __m256i sum = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
    sink += (uint64_t)_mm256_extract_epi64(sum, 0);
    return (double)share;
}

/** Memory in pages of 2 MiB where the system gives them, every page touched. */
static uint8_t *huge_memory(size_t len_bytes) {
    uint8_t *bytes = mmap(0, len_bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (bytes == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    bytes = (uint8_t *)(((uintptr_t)bytes + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
    madvise(bytes, len_bytes, MADV_HUGEPAGE);
    memset(bytes, 1, len_bytes);
    return bytes;
}

/* Arithmetic. Assembly, so that no compiler finds out that all numbers are zero. */

#define ROUNDS 5000000L

/** Additions that wait for each other: one a cycle. */
static double count_cycles(int thread, int threads, void *argument) {
    (void)thread, (void)threads, (void)argument;
    uint64_t x = 1;
    for (long i = 0; i < 12 * ROUNDS; i++) {
        __asm__ volatile("add $1,%0\n add $1,%0\n add $1,%0\n add $1,%0\n" : "+r"(x));
    }
    sink += x;
    return 48.0 * ROUNDS;
}

/** A function that does `line` on twelve independent accumulators, enough to hide the latency of each instruction here. */
#define TWELVE(line) line(0) line(1) line(2) line(3) line(4) line(5) line(6) line(7) line(8) line(9) line(10) line(11)
#define ARITHMETIC(name, vector, zero, line, operations)                                                              \
    static double name(int thread, int threads, void *argument) {                                                     \
        (void)thread, (void)threads, (void)argument;                                                                  \
        vector x = zero, y = zero, c0 = zero, c1 = zero, c2 = zero, c3 = zero, c4 = zero, c5 = zero, c6 = zero;         \
        vector c7 = zero, c8 = zero, c9 = zero, c10 = zero, c11 = zero;                                               \
        for (long i = 0; i < ROUNDS; i++) {                                                                           \
            __asm__ volatile(TWELVE(line)                                                                             \
                             : "+v"(c0), "+v"(c1), "+v"(c2), "+v"(c3), "+v"(c4), "+v"(c5), "+v"(c6), "+v"(c7),          \
                               "+v"(c8), "+v"(c9), "+v"(c10), "+v"(c11)                                               \
                             : "v"(x), "v"(y));                                                                       \
        }                                                                                                             \
        uint64_t first;                                                                                               \
        memcpy(&first, &c0, sizeof first);                                                                            \
        sink += first;                                                                                                \
        return 12.0 * ROUNDS * (operations);                                                                          \
    }

#define FMA_LINE(n) "vfmadd231ps %12,%13,%" #n "\n"
ARITHMETIC(f32_ymm, __m256, _mm256_setzero_ps(), FMA_LINE, 16)
#ifdef __AVX512F__
ARITHMETIC(f32_zmm, __m512, _mm512_setzero_ps(), FMA_LINE, 32)
#endif

#define VNNI_LINE(n) "vpdpbusd %12,%13,%" #n "\n"
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
ARITHMETIC(int8_vnni_ymm, __m256i, _mm256_setzero_si256(), VNNI_LINE, 64)
ARITHMETIC(int8_vnni_zmm, __m512i, _mm512_setzero_si512(), VNNI_LINE, 128)
#elif defined(__AVXVNNI__)
#define VEX_VNNI_LINE(n) "%{vex%} vpdpbusd %12,%13,%" #n "\n"
ARITHMETIC(int8_vnni_ymm, __m256i, _mm256_setzero_si256(), VEX_VNNI_LINE, 64)
#endif

#ifdef __AVX512BF16__
#define BF16_LINE(n) "vdpbf16ps %12,%13,%" #n "\n"
ARITHMETIC(bf16_dot_zmm, __m512, _mm512_setzero_ps(), BF16_LINE, 64)
#endif

/** Bytes without VNNI: 32 products in pairs to 16 bits, pairs of these to 32 bits, and the sum. Two multiplications for 32
 *  multiply-adds: where two of them start in a cycle, that is 32 multiply-adds a cycle and core. */
static double int8_madd(int thread, int threads, void *argument) {
    (void)thread, (void)threads, (void)argument;
    __m256i x = _mm256_setzero_si256(), y = x, ones = x, t0, t1, t2, t3, t4, t5, c0 = x, c1 = x, c2 = x, c3 = x, c4 = x, c5 = x;
#define MADD_LINE(n)                                                                                                  \
    "vpmaddubsw %[x],%[y],%[t" #n "]\n vpmaddwd %[ones],%[t" #n "],%[t" #n "]\n vpaddd %[t" #n "],%[c" #n "],%[c" #n "]\n"
    for (long i = 0; i < 2 * ROUNDS; i++) {
        __asm__ volatile(MADD_LINE(0) MADD_LINE(1) MADD_LINE(2) MADD_LINE(3) MADD_LINE(4) MADD_LINE(5)
                         : [c0] "+x"(c0), [c1] "+x"(c1), [c2] "+x"(c2), [c3] "+x"(c3), [c4] "+x"(c4), [c5] "+x"(c5),
                           [t0] "=&x"(t0), [t1] "=&x"(t1), [t2] "=&x"(t2), [t3] "=&x"(t3), [t4] "=&x"(t4), [t5] "=&x"(t5)
                         : [x] "x"(x), [y] "x"(y), [ones] "x"(ones));
    }
    sink += (uint64_t)_mm256_extract_epi64(_mm256_add_epi32(c0, c5), 0);
    return 12.0 * ROUNDS * 64;
}

int main(int count, char **arguments) {
    int threads = count > 1 ? atoi(arguments[1]) : 1;
    int repetitions = count > 2 ? atoi(arguments[2]) : 5;
    size_t len_bytes = (size_t)(count > 3 ? atoi(arguments[3]) : 1024) << 20;
    if (threads < 1 || threads > MAX_THREADS || repetitions < 1 || repetitions > MAX_REPETITIONS || len_bytes == 0) {
        fprintf(stderr, "usage: limits THREADS (1 to %d) [REPETITIONS (1 to %d)] [MIB]\n", MAX_THREADS, MAX_REPETITIONS);
        return 2;
    }
    // The prefetch of the last lines reaches beyond what is read.
    struct Memory memory = {huge_memory(len_bytes + HUGE_PAGE), len_bytes, 0};
    measure("clock_ghz", 1e-9 / threads, threads, repetitions, count_cycles, 0);
    measure("ram_gb_per_s", 1e-9, threads, repetitions, read_memory, &memory);
    memory.prefetch_bytes = 4096;
    measure("ram_prefetch_gb_per_s", 1e-9, threads, repetitions, read_memory, &memory);
    measure("f32_ymm_gflops", 1e-9, threads, repetitions, f32_ymm, 0);
#ifdef __AVX512F__
    measure("f32_zmm_gflops", 1e-9, threads, repetitions, f32_zmm, 0);
#endif
    measure("int8_madd_gops", 1e-9, threads, repetitions, int8_madd, 0);
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
    measure("int8_vnni_ymm_gops", 1e-9, threads, repetitions, int8_vnni_ymm, 0);
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    measure("int8_vnni_zmm_gops", 1e-9, threads, repetitions, int8_vnni_zmm, 0);
#endif
#ifdef __AVX512BF16__
    measure("bf16_dot_gflops", 1e-9, threads, repetitions, bf16_dot_zmm, 0);
#endif
    return 0;
}
