/* What the C programs share: checks that end the program with a sentence, and a listener that counts what it hears. */
#ifndef CHECK_H
#define CHECK_H

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ns_llm.h"

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: not true: %s (last error: %s)\n", __FILE__, __LINE__, #condition,                  \
                    ns_llm_last_error(NULL));                                                                          \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* Says both statuses by name when they differ. */
#define CHECK_STATUS(expected, call)                                                                                   \
    do {                                                                                                               \
        ns_llm_status expected_ = (expected), actual_ = (call);                                                        \
        if (actual_ != expected_) {                                                                                    \
            fprintf(stderr, "%s:%d: %s is %s, not %s (last error: %s)\n", __FILE__, __LINE__, #call,                   \
                    ns_llm_status_name(actual_), ns_llm_status_name(expected_), ns_llm_last_error(NULL));              \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

#define TEXT(literal) {(literal), sizeof(literal) - 1}

/* What one request has said. Written by the callback thread, read after the end, but for the atomic. */
typedef struct heard {
    char text[16384];
    size_t text_size;
    uint32_t token_ids[4096];
    size_t num_token_ids;
    int num_finished;
    int num_vectors;
    int num_last;
    int num_after_last;
    ns_llm_finish_reason finish_reason;
    ns_llm_status status;
    ns_llm_summary summary;
    /* Cancel after so many deltas; 0 never does. */
    int cancel_after;
    atomic_int num_deltas;
} heard;

static inline bool listen(const ns_llm_event *event, void *user_data) {
    heard *h = user_data;
    CHECK(event->struct_size == sizeof *event);
    if (h->num_last != 0)
        h->num_after_last++;
    switch (event->kind) {
    case NS_LLM_EVENT_DELTA:
        CHECK(h->text_size + event->text.size < sizeof h->text);
        memcpy(h->text + h->text_size, event->text.data, event->text.size);
        h->text_size += event->text.size;
        CHECK(h->num_token_ids + event->num_token_ids <= 4096);
        for (size_t i = 0; i < event->num_token_ids; i++)
            h->token_ids[h->num_token_ids++] = event->token_ids[i];
        return ++h->num_deltas != h->cancel_after;
    case NS_LLM_EVENT_FINISHED:
        h->num_finished++;
        h->finish_reason = event->finish_reason;
        break;
    case NS_LLM_EVENT_DONE:
        h->num_last++;
        h->status = NS_LLM_OK;
        h->summary = *event->summary;
        break;
    case NS_LLM_EVENT_FAILED:
        h->num_last++;
        h->status = event->status;
        CHECK(event->text.size > 0);
        break;
    case NS_LLM_EVENT_EMBEDDING:
        CHECK(event->num_dimensions > 0 && event->embedding != NULL && event->num_input_tokens > 0);
        h->num_vectors++;
        break;
    }
    return true;
}

/* A request for a story of at most `max_tokens`, always the same one. */
static inline ns_llm_request_params story(size_t max_tokens) {
    ns_llm_request_params params = {
        .struct_size = sizeof params,
        .set = NS_LLM_SET_TEMPERATURE | NS_LLM_SET_MAX_TOKENS,
        .prompt = TEXT("Once upon a time"),
        .max_tokens = max_tokens,
    };
    return params;
}

static inline ns_llm_engine open_engine(const char *model) {
    ns_llm_engine engine = 0;
    ns_llm_engine_params params = {
        .struct_size = sizeof params, .model = {model, strlen(model)}, .threads = 1, .kv_bytes = 32 << 20};
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_open(&params, &engine));
    CHECK(engine != 0);
    return engine;
}

#endif
