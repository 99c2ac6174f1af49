/* The C half of boundary.rs: the same requests, read by one thread a stream with ns_llm_request_next(), or by callback.
 * Prints nanoseconds of CPU time of the process and of those who read, and the tokens.
 * Arguments: "next" or "callback", streams, repeats, the model's folder. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ns_llm.h"

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: not true: %s (%s)\n", __FILE__, __LINE__, #condition, ns_llm_last_error(NULL));    \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* Small stacks, as in boundary.rs: making 64 threads is part of the run, and none of them needs more. */
enum { TOKENS = 64, MAX_STREAMS = 64, STACK_BYTES = 1 << 20 };

static ns_llm_engine engine;
static atomic_ullong num_tokens, readers_ns;
/* CPU time of the callback thread when it was last heard. */
static atomic_ullong callback_ns;

static unsigned long long cpu_ns(clockid_t clock) {
    struct timespec time;
    CHECK(clock_gettime(clock, &time) == 0);
    return (unsigned long long)time.tv_sec * 1000000000u + (unsigned long long)time.tv_nsec;
}

static ns_llm_request submit(ns_llm_event_callback callback) {
    ns_llm_request request = 0;
    ns_llm_request_params params = {
        .struct_size = sizeof params,
        .set = NS_LLM_SET_TEMPERATURE | NS_LLM_SET_MAX_TOKENS,
        .prompt = {"Once upon a time", 16},
        .max_tokens = TOKENS,
        .flags = NS_LLM_REQUEST_IGNORE_EOS,
    };
    CHECK(ns_llm_generate(engine, &params, callback, NULL, &request) == NS_LLM_OK);
    return request;
}

static void *fetch_one(void *unused) {
    (void)unused;
    unsigned long long started_ns = cpu_ns(CLOCK_THREAD_CPUTIME_ID);
    ns_llm_request request = submit(NULL);
    ns_llm_event event = {.struct_size = sizeof event};
    while (ns_llm_request_next(request, NS_LLM_FOREVER, &event) == NS_LLM_OK)
        num_tokens += event.num_token_ids;
    CHECK(ns_llm_request_free(request) == NS_LLM_OK);
    readers_ns += cpu_ns(CLOCK_THREAD_CPUTIME_ID) - started_ns;
    return NULL;
}

static bool hear(const ns_llm_event *event, void *user_data) {
    (void)user_data;
    num_tokens += event->num_token_ids;
    if (event->kind == NS_LLM_EVENT_DONE)
        callback_ns = cpu_ns(CLOCK_THREAD_CPUTIME_ID);
    return true;
}

/* Submits from one thread a stream too, as the others do: submitting is tokenizing, and waiting for it. */
static void *hear_one(void *unused) {
    (void)unused;
    unsigned long long started_ns = cpu_ns(CLOCK_THREAD_CPUTIME_ID);
    ns_llm_request request = submit(hear);
    CHECK(ns_llm_request_wait(request, NS_LLM_FOREVER, NULL) == NS_LLM_OK);
    CHECK(ns_llm_request_free(request) == NS_LLM_OK);
    readers_ns += cpu_ns(CLOCK_THREAD_CPUTIME_ID) - started_ns;
    return NULL;
}

/* One thread a stream. */
static void run(void *(*one)(void *), int num_streams) {
    pthread_t threads[MAX_STREAMS];
    pthread_attr_t small;
    CHECK(pthread_attr_init(&small) == 0 && pthread_attr_setstacksize(&small, STACK_BYTES) == 0);
    for (int i = 0; i < num_streams; i++)
        CHECK(pthread_create(&threads[i], &small, one, NULL) == 0);
    for (int i = 0; i < num_streams; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    pthread_attr_destroy(&small);
}

int main(int argc, char **argv) {
    CHECK(argc == 5);
    void *(*one)(void *) = strcmp(argv[1], "next") == 0 ? fetch_one : hear_one;
    int num_streams = atoi(argv[2]), num_repeats = atoi(argv[3]);
    CHECK(num_streams <= MAX_STREAMS);
    ns_llm_engine_params params = {.struct_size = sizeof params, .model = {argv[4], strlen(argv[4])}, .threads = 1};
    CHECK(ns_llm_engine_open(&params, &engine) == NS_LLM_OK);
    run(one, num_streams);
    num_tokens = 0;
    readers_ns = 0;
    unsigned long long callbacks_before = callback_ns, before = cpu_ns(CLOCK_PROCESS_CPUTIME_ID);
    for (int i = 0; i < num_repeats; i++)
        run(one, num_streams);
    unsigned long long process_ns = cpu_ns(CLOCK_PROCESS_CPUTIME_ID) - before;
    printf("%llu %llu %llu\n", process_ns, (unsigned long long)readers_ns + callback_ns - callbacks_before,
           (unsigned long long)num_tokens);
    CHECK(ns_llm_engine_free(engine) == NS_LLM_OK);
    return 0;
}
