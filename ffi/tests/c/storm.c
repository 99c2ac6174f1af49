/* Every function from many threads at once, in a seeded random order, on handles that all threads share and free under
 * each other's feet, engines included. Each call returns with a status that makes sense; each accepted request with a
 * callback has one last event; nothing hangs (the test that runs this has a time limit).
 * Arguments: the model's folder, threads, calls of each thread. */
#include "check.h"

#include <pthread.h>

enum { NUM_ENGINES = 2, NUM_REQUESTS = 48, MAX_THREADS = 64 };

static const char *model;
static int num_calls_each;
static _Atomic(ns_llm_engine) engines[NUM_ENGINES];
static _Atomic(ns_llm_request) requests[NUM_REQUESTS];
static atomic_int num_accepted, num_last_events;

/* What a thread can do; how often it was answered with NS_LLM_OK. */
enum { CALL, FETCH, EMBED, VECTORS, NEXT, WAIT, CANCEL, FREE, FREE_STALE, TOKENS, FIGURES, HEALTH, REOPEN, NUM_KINDS };
static atomic_int num_ok[NUM_KINDS];

/* xorshift64 (Marsaglia 2003): each thread has its own state. */
static uint64_t next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static bool count_last(const ns_llm_event *event, void *user_data) {
    (void)user_data;
    if (event->kind == NS_LLM_EVENT_DONE || event->kind == NS_LLM_EVENT_FAILED)
        num_last_events++;
    return true;
}

/* A status that a call on shared handles may end with. */
static void count(int kind, ns_llm_status status) {
    switch (status) {
    case NS_LLM_OK:
        num_ok[kind]++;
        break;
    case NS_LLM_TIMEOUT:
    case NS_LLM_ENDED:
    case NS_LLM_BUSY:
    case NS_LLM_WRONG_READER:
    case NS_LLM_BAD_HANDLE:
    case NS_LLM_CANCELLED:
    case NS_LLM_CLOSED:
    case NS_LLM_OVERLOADED:
        break;
    default:
        fprintf(stderr, "kind %d ended with %s: %s\n", kind, ns_llm_status_name(status), ns_llm_last_error(NULL));
        exit(1);
    }
}

/* Puts a new request where others find it; the one that was there is freed. */
static void publish(uint64_t *random, ns_llm_request request) {
    ns_llm_request old = atomic_exchange(&requests[next(random) % NUM_REQUESTS], request);
    ns_llm_status status = ns_llm_request_free(old);
    CHECK(status == NS_LLM_OK || status == NS_LLM_BAD_HANDLE);
}

static void submit(uint64_t *random, int kind, ns_llm_engine engine) {
    ns_llm_event_callback callback = next(random) % 2 ? count_last : NULL;
    ns_llm_request request = 0;
    ns_llm_status status;
    if (kind == VECTORS) {
        ns_llm_embedding_input input = {.text = TEXT("a fox")};
        ns_llm_embedding_params params = {.struct_size = sizeof params, .inputs = &input, .num_inputs = 1};
        status = ns_llm_submit_embedding(engine, &params, callback, NULL, &request);
    } else {
        ns_llm_request_params params = story(1 + next(random) % 4);
        params.flags = next(random) % 2 ? NS_LLM_REQUEST_DO_NOT_WAIT : 0;
        callback = kind == CALL ? count_last : NULL;
        status = ns_llm_generate(engine, &params, callback, NULL, &request);
    }
    CHECK((status == NS_LLM_OK) == (request != 0));
    num_accepted += callback != NULL && status == NS_LLM_OK;
    count(kind, status);
    if (request != 0)
        publish(random, request);
}

static ns_llm_status ask(ns_llm_engine engine, uint64_t which) {
    ns_llm_model_info info = {.struct_size = sizeof info};
    ns_llm_stats stats = {.struct_size = sizeof stats};
    ns_llm_memory_use memory = {.struct_size = sizeof memory};
    return which % 3 == 0   ? ns_llm_engine_info(engine, &info)
           : which % 3 == 1 ? ns_llm_engine_stats(engine, &stats)
                            : ns_llm_engine_memory(engine, &memory);
}

static ns_llm_status tokens_and_back(ns_llm_engine engine) {
    uint32_t ids[16];
    char text[16];
    size_t num = 0, size = 0;
    ns_llm_status status = ns_llm_tokenize(engine, "a cat", 5, 0, ids, 16, &num);
    return status == NS_LLM_OK ? ns_llm_detokenize(engine, ids, num, text, sizeof text, &size) : status;
}

static ns_llm_status embed(ns_llm_engine engine) {
    static _Thread_local float vector[8192];
    ns_llm_embedding_input input = {.text = TEXT("a fox")};
    ns_llm_embedding_params params = {.struct_size = sizeof params, .inputs = &input, .num_inputs = 1};
    size_t num = 0;
    return ns_llm_embed(engine, &params, vector, 8192, &num, NULL);
}

/* Only one of the engines comes and goes, so that the other always has work. */
static ns_llm_status reopen(void) {
    ns_llm_engine old = atomic_exchange(&engines[1], 0);
    if (old == 0)
        return NS_LLM_CLOSED;
    ns_llm_status status = ns_llm_engine_free(old);
    atomic_store(&engines[1], open_engine(model));
    return status;
}

static void one_call(uint64_t *random, int kind) {
    ns_llm_engine engine = engines[next(random) % NUM_ENGINES];
    _Atomic(ns_llm_request) *slot = &requests[next(random) % NUM_REQUESTS];
    ns_llm_event event = {.struct_size = sizeof event};
    ns_llm_status status = NS_LLM_OK;
    switch (kind) {
    case CALL:
    case FETCH:
    case VECTORS:
        submit(random, kind, engine);
        return;
    case EMBED: status = embed(engine); break;
    case NEXT: status = ns_llm_request_next(*slot, next(random) % 3, &event); break;
    case WAIT: status = ns_llm_request_wait(*slot, next(random) % 3, NULL); break;
    case CANCEL: status = ns_llm_request_cancel(*slot); break;
    case FREE: status = ns_llm_request_free(atomic_exchange(slot, 0)); break;
    case FREE_STALE: status = ns_llm_request_free(*slot); break;
    case TOKENS: status = tokens_and_back(engine); break;
    case FIGURES: status = ask(engine, next(random)); break;
    case HEALTH: status = ns_llm_engine_health(engine); break;
    case REOPEN: status = next(random) % 32 == 0 ? reopen() : NS_LLM_CLOSED; break;
    }
    count(kind, status);
}

static void *work(void *seed) {
    uint64_t random = (uint64_t)(uintptr_t)seed * 0x9e3779b97f4a7c15u + 1;
    for (int i = 0; i < num_calls_each; i++)
        one_call(&random, (int)(next(&random) % NUM_KINDS));
    return NULL;
}

int main(int argc, char **argv) {
    CHECK(argc == 4);
    model = argv[1];
    int num_threads = atoi(argv[2]);
    num_calls_each = atoi(argv[3]);
    CHECK(num_threads <= MAX_THREADS);
    for (int i = 0; i < NUM_ENGINES; i++)
        engines[i] = open_engine(model);
    pthread_t threads[MAX_THREADS];
    for (int i = 0; i < num_threads; i++)
        CHECK(pthread_create(&threads[i], NULL, work, (void *)(uintptr_t)(i + 1)) == 0);
    for (int i = 0; i < num_threads; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    for (int i = 0; i < NUM_REQUESTS; i++) {
        ns_llm_status status = ns_llm_request_free(requests[i]);
        CHECK(status == NS_LLM_OK || status == NS_LLM_BAD_HANDLE);
    }
    for (int i = 0; i < NUM_ENGINES; i++)
        CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engines[i]));
    for (int kind = 0; kind < NUM_KINDS; kind++)
        CHECK(num_ok[kind] > 0);
    CHECK(num_accepted > 0 && num_last_events == num_accepted);
    printf("%d calls, %d requests with a callback, %d engines freed\n", num_threads * num_calls_each, num_last_events,
           num_ok[REOPEN]);
    return 0;
}
