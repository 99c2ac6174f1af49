/* Streams two answers at once on one thread, without callbacks: asks each request in turn whether it has something to
 * say, and waits a little where neither has. Lines begin with the number of the answer that they belong to.
 *
 *   cc -std=c11 stream.c $(pkg-config --cflags --libs ns_llm) -o stream
 *   ./stream models/demo "Once upon a time" "The little dog" */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <ns_llm.h>

enum { NUM_ANSWERS = 2, MAX_TOKENS = 48, WAIT_MS = 10 };

static int fail(const char *what, ns_llm_status status) {
    fprintf(stderr, "%s: %s: %s\n", what, ns_llm_status_name(status), ns_llm_last_error(NULL));
    return EXIT_FAILURE;
}

/* Prints one event. What it points to is the library's, and gone with the next call for the same request. */
static void print(int answer, const ns_llm_event *event) {
    switch (event->kind) {
    case NS_LLM_EVENT_DELTA:
        printf("%d: %.*s\n", answer, (int)event->text.size, event->text.data);
        break;
    case NS_LLM_EVENT_FINISHED:
        printf("%d: (%s)\n", answer, event->finish_reason == NS_LLM_FINISH_LENGTH ? "long enough" : "the end");
        break;
    case NS_LLM_EVENT_DONE:
        printf("%d: %llu tokens\n", answer, (unsigned long long)event->summary->completion_tokens);
        break;
    case NS_LLM_EVENT_FAILED:
        printf("%d: %s: %.*s\n", answer, ns_llm_status_name(event->status), (int)event->text.size, event->text.data);
        break;
    default: /* Newer libraries may tell more. */
        break;
    }
}

int main(int argc, char **argv) {
    if (argc != 2 + NUM_ANSWERS) {
        fprintf(stderr, "usage: %s MODEL PROMPT PROMPT\n", argv[0]);
        return EXIT_FAILURE;
    }
    ns_llm_engine engine;
    ns_llm_engine_params where = {.struct_size = sizeof where, .model = {argv[1], strlen(argv[1])}};
    ns_llm_status status = ns_llm_engine_open(&where, &engine);
    if (status != NS_LLM_OK)
        return fail("open", status);

    /* Handles that are 0 can be freed without a question, so cleaning up needs no cases. */
    ns_llm_request requests[NUM_ANSWERS] = {0};
    int code = EXIT_SUCCESS, num_open = 0;
    for (int i = 0; i < NUM_ANSWERS && code == EXIT_SUCCESS; i++) {
        ns_llm_request_params what = {
            .struct_size = sizeof what,
            .set = NS_LLM_SET_MAX_TOKENS,
            .prompt = {argv[2 + i], strlen(argv[2 + i])},
            .max_tokens = MAX_TOKENS,
        };
        status = ns_llm_generate(engine, &what, NULL, NULL, &requests[i]);
        if (status != NS_LLM_OK)
            code = fail("generate", status);
        else
            num_open++;
    }

    bool is_open[NUM_ANSWERS] = {num_open > 0, num_open > 1};
    for (int i = 0; num_open > 0; i = (i + 1) % NUM_ANSWERS) {
        if (!is_open[i])
            continue;
        ns_llm_event event = {.struct_size = sizeof event};
        status = ns_llm_request_next(requests[i], WAIT_MS, &event);
        if (status == NS_LLM_OK) {
            print(i + 1, &event);
        } else if (status != NS_LLM_TIMEOUT) {
            is_open[i] = false;
            num_open--;
            if (status != NS_LLM_ENDED)
                code = fail("next", status);
        }
    }
    for (int i = 0; i < NUM_ANSWERS; i++)
        ns_llm_request_free(requests[i]);
    ns_llm_engine_free(engine);
    return code;
}
