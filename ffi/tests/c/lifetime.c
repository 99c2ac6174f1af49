/* Freeing in every order and from every place: requests before and after the engine, from outside, from their own
 * callback, while others wait and submit. Nothing hangs (the test that runs this has a time limit), every accepted
 * request hears exactly one last event, and callbacks end when the one who freed is told so.
 * Arguments: the model's folder, rounds. */
#include "check.h"

#include <pthread.h>
#include <time.h>

static const char *model;

static ns_llm_request_params endless(void) {
    ns_llm_request_params params = story(1000);
    params.flags = NS_LLM_REQUEST_IGNORE_EOS;
    return params;
}

static ns_llm_request submit(ns_llm_engine engine, ns_llm_event_callback callback, void *user_data) {
    ns_llm_request request = 0;
    ns_llm_request_params params = endless();
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &params, callback, user_data, &request));
    return request;
}

/* The engine first: its requests end as closed, before ns_llm_engine_free() returns, and are freed later. */
static void engine_before_requests(void) {
    static heard h[3];
    ns_llm_request requests[3];
    ns_llm_engine engine = open_engine(model);
    for (int i = 0; i < 3; i++)
        requests[i] = submit(engine, listen, &h[i]);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    for (int i = 0; i < 3; i++) {
        CHECK(h[i].num_last == 1 && h[i].status == NS_LLM_CLOSED);
        CHECK_STATUS(NS_LLM_CLOSED, ns_llm_request_wait(requests[i], 0, NULL));
        CHECK_STATUS(NS_LLM_OK, ns_llm_request_cancel(requests[i]));
        CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(requests[i]));
    }
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_engine_free(engine));
}

/* A request that is freed while it runs has said its last word when the call returns: its memory is freed at once. */
static void requests_freed_while_running(ns_llm_engine engine, int num_rounds) {
    for (int round = 0; round < num_rounds; round++) {
        heard *h = calloc(1, sizeof *h);
        CHECK(h != NULL);
        ns_llm_request request = submit(engine, listen, h);
        while (round % 2 == 0 && h->num_deltas == 0) {
            struct timespec moment = {0, 100000};
            nanosleep(&moment, NULL);
        }
        CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
        CHECK(h->num_last == 1 && h->status == NS_LLM_CANCELLED);
        free(h);
    }
}

/* What a callback does to the library that called it, at its first delta. */
typedef struct reentry {
    ns_llm_engine engine;
    bool free_request, free_engine;
    ns_llm_request second;
    heard second_heard;
    int num_calls_after;
    atomic_int num_last;
    bool done;
} reentry;

static bool call_back_in(const ns_llm_event *event, void *user_data) {
    reentry *r = user_data;
    if (event->kind == NS_LLM_EVENT_FAILED) {
        CHECK(event->status == (r->free_engine ? NS_LLM_CLOSED : NS_LLM_CANCELLED));
        r->num_last++;
        return true;
    }
    if (r->done) {
        r->num_calls_after++;
        return true;
    }
    r->done = true;
    CHECK(event->kind == NS_LLM_EVENT_DELTA);
    CHECK_STATUS(NS_LLM_IN_CALLBACK, ns_llm_request_wait(event->request, NS_LLM_FOREVER, NULL));
    uint32_t ids[16];
    size_t num = 0;
    CHECK_STATUS(NS_LLM_OK, ns_llm_tokenize(r->engine, "a cat", 5, 0, ids, 16, &num));
    ns_llm_request_params params = story(2);
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(r->engine, &params, listen, &r->second_heard, &r->second));
    if (r->free_request)
        CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(event->request));
    if (r->free_engine)
        CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(r->engine));
    return !(r->free_request || r->free_engine);
}

/* Another request can be submitted from inside a callback, and the callback's own request freed. */
static void callbacks_call_back(ns_llm_engine engine) {
    static reentry r;
    memset(&r, 0, sizeof r);
    r.engine = engine;
    r.free_request = true;
    ns_llm_request request = submit(engine, call_back_in, &r);
    while (r.num_last == 0) {
        struct timespec moment = {0, 100000};
        nanosleep(&moment, NULL);
    }
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_request_wait(request, 0, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(r.second, NS_LLM_FOREVER, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(r.second));
    CHECK(r.second_heard.num_last == 1 && r.second_heard.num_token_ids == 2 && r.num_calls_after == 0);
}

/* The engine can be freed from inside a callback of its own request: both requests still hear their end. */
static void callbacks_free_their_engine(void) {
    static reentry r;
    r.engine = open_engine(model);
    r.free_engine = true;
    ns_llm_request request = submit(r.engine, call_back_in, &r);
    CHECK_STATUS(NS_LLM_CLOSED, ns_llm_request_wait(request, NS_LLM_FOREVER, NULL));
    ns_llm_status second = ns_llm_request_wait(r.second, NS_LLM_FOREVER, NULL);
    CHECK(second == NS_LLM_CLOSED || second == NS_LLM_OK);
    CHECK(r.num_last == 1 && r.second_heard.num_last == 1 && r.num_calls_after == 0);
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_engine_free(r.engine));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(r.second));
}

static atomic_int num_accepted, num_refused;

/* Submits and waits until the engine is gone; every call has a defined end. */
static void *use_until_closed(void *argument) {
    ns_llm_engine engine = *(ns_llm_engine *)argument;
    for (;;) {
        heard *h = calloc(1, sizeof *h);
        CHECK(h != NULL);
        ns_llm_request request = 0;
        ns_llm_request_params params = endless();
        ns_llm_status status = ns_llm_generate(engine, &params, listen, h, &request);
        if (status == NS_LLM_OK) {
            num_accepted++;
            CHECK_STATUS(NS_LLM_CLOSED, ns_llm_request_wait(request, NS_LLM_FOREVER, NULL));
            CHECK(h->num_last == 1);
            CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
        } else {
            num_refused++;
            CHECK((status == NS_LLM_CLOSED || status == NS_LLM_BAD_HANDLE) && request == 0);
        }
        free(h);
        if (status != NS_LLM_OK)
            return NULL;
    }
}

/* An engine is freed while four threads are in the middle of calls on it. */
static void engine_freed_under_load(void) {
    ns_llm_engine engine = open_engine(model);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, use_until_closed, &engine) == 0);
    while (num_accepted < 4) {
        struct timespec moment = {0, 1000000};
        nanosleep(&moment, NULL);
    }
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    for (int i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(num_refused == 4);
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    model = argv[1];
    ns_llm_engine engine = open_engine(model);
    requests_freed_while_running(engine, atoi(argv[2]));
    for (int round = 0; round < atoi(argv[2]) / 10; round++)
        callbacks_call_back(engine);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    engine_before_requests();
    callbacks_free_their_engine();
    engine_freed_under_load();
    return 0;
}
