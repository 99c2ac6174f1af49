/* The frame of the generated program: what a right call needs, and how an answer is checked. */
#include "check.h"

#include <limits.h>
#include <math.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *model;
static ns_llm_engine live_engine, freed_engine;
static ns_llm_request live_called, live_fetched, freed_request;
static int num_tried;

/* Something that has no alignment, in the middle of readable memory. */
static uint64_t random_room[16];
#define MISALIGNED(type, pointer) ((type *)(void *)((char *)(uintptr_t)random_room + 1 + 0 * sizeof(pointer)))

/* An address that must not be read. */
#define NOWHERE ((const void *)(uintptr_t)4096)

#define ANSWERS(what, expected, call)                                                                                  \
    do {                                                                                                               \
        ns_llm_status answer_ = (call);                                                                                \
        num_tried++;                                                                                                   \
        if (answer_ != (expected)) {                                                                                   \
            fprintf(stderr, "%s: %s, not %s (%s)\n", what, ns_llm_status_name(answer_),                                \
                    ns_llm_status_name(expected), ns_llm_last_error(NULL));                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

#define ANSWERS_LISTED(what, listed, call)                                                                             \
    do {                                                                                                               \
        ns_llm_status answer_ = (call);                                                                                \
        const int *status_ = (listed);                                                                                 \
        num_tried++;                                                                                                   \
        while (*status_ != -1 && *status_ != (int)answer_)                                                             \
            status_++;                                                                                                 \
        if (*status_ == -1) {                                                                                          \
            fprintf(stderr, "%s: %s, which the header does not list (%s)\n", what, ns_llm_status_name(answer_),        \
                    ns_llm_last_error(NULL));                                                                          \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

#define RETURNS(what, call)                                                                                            \
    do {                                                                                                               \
        num_tried++;                                                                                                   \
        if ((call) == 0) {                                                                                             \
            fprintf(stderr, "%s: nothing\n", what);                                                                    \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static inline bool hear_nothing(const ns_llm_event *event, void *user_data) {
    (void)event, (void)user_data;
    return true;
}

/* xorshift64 (Marsaglia 2003). */
static inline uint64_t next_random(void) {
    static uint64_t state = 0x9e3779b97f4a7c15u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static inline ns_llm_engine_params right_ns_llm_engine_params(void) {
    ns_llm_engine_params params = {
        .struct_size = sizeof params, .model = {model, strlen(model)}, .threads = 1, .kv_bytes = 32 << 20};
    return params;
}

static inline ns_llm_request_params right_ns_llm_request_params(void) {
    return story(1);
}

static inline ns_llm_embedding_params right_ns_llm_embedding_params(void) {
    static const ns_llm_embedding_input inputs[] = {{.text = TEXT("a cat")}};
    ns_llm_embedding_params params = {.struct_size = sizeof params, .inputs = inputs, .num_inputs = 1};
    return params;
}

