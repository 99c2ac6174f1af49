/* Events fetched with ns_llm_request_next(): they are those that a callback would hear; waiting has a limit; the two ways
 * of reading exclude each other; cancelling, freeing and closing from another thread end a wait.
 * Arguments: the model's folder, the most tokens of an answer. */
#include "check.h"

#include <math.h>
#include <pthread.h>
#include <time.h>

static ns_llm_engine engine;
static size_t max_tokens;

static void nap(long milliseconds) {
    struct timespec moment = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    nanosleep(&moment, NULL);
}

static ns_llm_request submit(const ns_llm_request_params *params) {
    ns_llm_request request = 0;
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, params, NULL, NULL, &request));
    CHECK(request != 0);
    return request;
}

/* Reads a request to its end into what a callback would have heard. */
static void read_all(ns_llm_request request, heard *h) {
    ns_llm_event event = {.struct_size = sizeof event};
    ns_llm_status status;
    while ((status = ns_llm_request_next(request, NS_LLM_FOREVER, &event)) == NS_LLM_OK) {
        CHECK(event.request == request);
        listen(&event, h);
    }
    CHECK(status == NS_LLM_ENDED && h->num_last == 1);
    CHECK_STATUS(NS_LLM_ENDED, ns_llm_request_next(request, 0, &event));
}

static ns_llm_request_params endless(void) {
    ns_llm_request_params params = story(1000);
    params.flags = NS_LLM_REQUEST_IGNORE_EOS;
    return params;
}

static void both_ways_tell_the_same(void) {
    static heard called, fetched, unwaited;
    ns_llm_request_params params = story(max_tokens);
    ns_llm_request request = 0;
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &params, listen, &called, &request));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(request, NS_LLM_FOREVER, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));

    request = submit(&params);
    read_all(request, &fetched);
    CHECK(fetched.status == NS_LLM_OK && fetched.num_finished == 1 && fetched.text_size == called.text_size);
    CHECK(memcmp(fetched.text, called.text, called.text_size) == 0);
    CHECK(fetched.summary.completion_tokens == called.summary.completion_tokens);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));

    params.flags |= NS_LLM_REQUEST_DO_NOT_WAIT;
    request = submit(&params);
    read_all(request, &unwaited);
    CHECK(unwaited.text_size == called.text_size);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
}

/* What a request that nobody waits for cannot be, it says in its last event. */
static void late_refusals_are_events(void) {
    static heard h;
    static char words[60000];
    memset(words, 'x', sizeof words);
    ns_llm_request_params params = story(4);
    params.prompt = (ns_llm_text){words, sizeof words};
    ns_llm_request request = 7;
    CHECK_STATUS(NS_LLM_PROMPT_TOO_LONG, ns_llm_generate(engine, &params, NULL, NULL, &request));
    CHECK(request == 0);
    params.flags = NS_LLM_REQUEST_DO_NOT_WAIT;
    request = submit(&params);
    read_all(request, &h);
    CHECK(h.status == NS_LLM_PROMPT_TOO_LONG);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
}

static void the_ways_exclude_each_other(void) {
    static heard h;
    ns_llm_event event = {.struct_size = sizeof event, .choice = 7};
    ns_llm_request_params params = story(2);
    ns_llm_request fetched = submit(&params), called = 0;
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &params, listen, &h, &called));
    CHECK_STATUS(NS_LLM_WRONG_READER, ns_llm_request_next(called, NS_LLM_FOREVER, &event));
    CHECK(event.choice == 7);
    CHECK_STATUS(NS_LLM_WRONG_READER, ns_llm_request_wait(fetched, NS_LLM_FOREVER, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(called));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(fetched));
}

/* A wait ends by its limit, without losing what comes later; the same request goes on and is then cancelled. */
static void waits_have_limits(void) {
    static heard h;
    ns_llm_request_params params = endless();
    ns_llm_request request = submit(&params);
    ns_llm_event event = {.struct_size = sizeof event};
    int num_timeouts = 0, num_events = 0;
    while (num_events < 3) {
        ns_llm_status status = ns_llm_request_next(request, 0, &event);
        CHECK(status == NS_LLM_OK || status == NS_LLM_TIMEOUT);
        status == NS_LLM_OK ? num_events++ : num_timeouts++;
    }
    CHECK(num_timeouts > 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_cancel(request));
    read_all(request, &h);
    CHECK(h.status == NS_LLM_CANCELLED);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
}

/* Who waits in ns_llm_request_next() on another thread, for a request that computes for long before it says anything. */
typedef struct waiter {
    ns_llm_request request;
    ns_llm_status expected_status, expected_end;
} waiter;

static void *wait_for_the_end(void *argument) {
    waiter *w = argument;
    ns_llm_event event = {.struct_size = sizeof event};
    ns_llm_status status;
    do
        status = ns_llm_request_next(w->request, NS_LLM_FOREVER, &event);
    while (status == NS_LLM_BUSY || (status == NS_LLM_OK && event.kind != NS_LLM_EVENT_FAILED));
    CHECK_STATUS(w->expected_status, status);
    if (status == NS_LLM_OK)
        CHECK_STATUS(w->expected_end, event.status);
    return NULL;
}

static void others_end_a_wait(const char *model) {
    ns_llm_request_params params = endless();
    pthread_t thread;
    waiter cancelled = {submit(&params), NS_LLM_OK, NS_LLM_CANCELLED};
    CHECK(pthread_create(&thread, NULL, wait_for_the_end, &cancelled) == 0);
    /* While one thread waits, another cannot, and finds that out at once. */
    ns_llm_event event = {.struct_size = sizeof event};
    ns_llm_status status;
    while ((status = ns_llm_request_next(cancelled.request, 0, &event)) != NS_LLM_BUSY) {
        CHECK(status == NS_LLM_OK || status == NS_LLM_TIMEOUT);
        nap(1);
    }
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_cancel(cancelled.request));
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(cancelled.request));

    waiter freed = {submit(&params), NS_LLM_BAD_HANDLE, NS_LLM_OK};
    CHECK(pthread_create(&thread, NULL, wait_for_the_end, &freed) == 0);
    nap(5);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(freed.request));
    CHECK(pthread_join(thread, NULL) == 0);

    ns_llm_engine usual = engine;
    engine = open_engine(model);
    waiter closed = {submit(&params), NS_LLM_OK, NS_LLM_CLOSED};
    CHECK(pthread_create(&thread, NULL, wait_for_the_end, &closed) == 0);
    nap(5);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(closed.request));
    engine = usual;
}

/* The chosen token is the likeliest when the answer is greedy, the likeliest come in order, and the prompt has one less
 * than it has tokens. */
static void logprobs_are_told(void) {
    ns_llm_request_params params = story(4);
    params.set |= NS_LLM_SET_LOGPROBS;
    params.logprobs = 3;
    params.flags = NS_LLM_REQUEST_PROMPT_LOGPROBS;
    ns_llm_request request = submit(&params);
    ns_llm_event event = {.struct_size = sizeof event};
    size_t num_logprobs = 0, num_prompt_logprobs = 0, num_prompt_tokens = 0;
    while (ns_llm_request_next(request, NS_LLM_FOREVER, &event) == NS_LLM_OK) {
        if (event.kind == NS_LLM_EVENT_DELTA)
            CHECK(event.num_logprobs == event.num_token_ids);
        for (size_t i = 0; i < event.num_logprobs; i++) {
            const ns_llm_token_logprobs *token = &event.logprobs[i];
            CHECK(token->num_top == 3 && token->chosen.token_id == event.token_ids[i]);
            CHECK(token->top[0].token_id == token->chosen.token_id && token->top[0].logprob == token->chosen.logprob);
            CHECK(token->top[0].logprob >= token->top[1].logprob && token->top[1].logprob >= token->top[2].logprob);
            CHECK(token->chosen.logprob <= 0 && isfinite(token->top[2].logprob));
            num_logprobs++;
        }
        if (event.kind == NS_LLM_EVENT_DONE) {
            num_prompt_logprobs = event.num_prompt_logprobs;
            num_prompt_tokens = event.summary->prompt_tokens;
            for (size_t i = 0; i < event.num_prompt_logprobs; i++)
                CHECK(event.prompt_logprobs[i].chosen.logprob <= 0 && event.prompt_logprobs[i].num_top == 3);
        }
    }
    CHECK(num_logprobs == 4 && num_prompt_tokens > 1 && num_prompt_logprobs == num_prompt_tokens - 1);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
}

/* An older program's event struct is filled as far as it goes, a newer one's beyond is zero. */
static void events_fit_their_reader(void) {
    ns_llm_request_params params = story(1);
    ns_llm_request request = submit(&params);
    struct {
        ns_llm_event known;
        uint64_t unknown;
    } newer = {.known.struct_size = sizeof newer, .unknown = 7};
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_next(request, NS_LLM_FOREVER, &newer.known));
    CHECK(newer.known.struct_size == sizeof newer && newer.unknown == 0 && newer.known.request == request);
    ns_llm_event older = {.struct_size = offsetof(ns_llm_event, text), .text = {NULL, 77}};
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_next(request, NS_LLM_FOREVER, &older));
    CHECK(older.request == request && older.text.size == 77);
    ns_llm_event absurd = {.struct_size = 9};
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_request_next(request, NS_LLM_FOREVER, &absurd));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    max_tokens = (size_t)atoi(argv[2]);
    engine = open_engine(argv[1]);
    both_ways_tell_the_same();
    late_refusals_are_events();
    the_ways_exclude_each_other();
    waits_have_limits();
    others_end_a_wait(argv[1]);
    logprobs_are_told();
    events_fit_their_reader();
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    return 0;
}
