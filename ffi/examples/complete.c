/* Completes a text: opens a model, submits one request, prints the answer as the callback hears it, and what it took.
 *
 *   cc -std=c11 complete.c $(pkg-config --cflags --libs ns_llm) -o complete
 *   ./complete models/demo "Once upon a time" */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <ns_llm.h>

static ns_llm_text text_of(const char *string) {
    ns_llm_text text = {string, strlen(string)};
    return text;
}

/* Runs on the engine's callback thread; `user_data` is what main() gave. Returning false would cancel. */
static bool print(const ns_llm_event *event, void *user_data) {
    FILE *out = user_data;
    if (event->kind == NS_LLM_EVENT_DELTA)
        fwrite(event->text.data, 1, event->text.size, out);
    fflush(out);
    return true;
}

/* Bytes of weights that are loaded, on one line that is written over. Returning false would cancel the load. */
static bool show_progress(uint64_t loaded_bytes, uint64_t total_bytes, void *user_data) {
    (void)user_data;
    fprintf(stderr, "\rloading: %3.0f %%", total_bytes ? 100.0 * (double)loaded_bytes / (double)total_bytes : 100.0);
    return true;
}

static int fail(const char *what, ns_llm_status status) {
    fprintf(stderr, "%s: %s: %s\n", what, ns_llm_status_name(status), ns_llm_last_error(NULL));
    return EXIT_FAILURE;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL PROMPT [MAX_TOKENS]\n", argv[0]);
        return EXIT_FAILURE;
    }
    ns_llm_engine engine;
    ns_llm_engine_params where = {
        .struct_size = sizeof where, .model = text_of(argv[1]), .progress = show_progress};
    ns_llm_status status = ns_llm_engine_open(&where, &engine);
    fputc('\n', stderr);
    if (status != NS_LLM_OK)
        return fail("open", status);

    ns_llm_request request;
    ns_llm_request_params what = {
        .struct_size = sizeof what,
        .set = NS_LLM_SET_MAX_TOKENS | NS_LLM_SET_TEMPERATURE,
        .prompt = text_of(argv[2]),
        .max_tokens = argc > 3 ? (size_t)atoi(argv[3]) : 64,
        .temperature = 0,
    };
    ns_llm_summary summary = {.struct_size = sizeof summary};
    fputs(argv[2], stdout);
    status = ns_llm_generate(engine, &what, print, stdout, &request);
    if (status == NS_LLM_OK)
        status = ns_llm_request_wait(request, NS_LLM_FOREVER, &summary);
    /* The next failure on this thread would overwrite the sentence about this one, so it is shown first. */
    int code = status == NS_LLM_OK ? EXIT_SUCCESS : fail("generate", status);
    if (status == NS_LLM_OK)
        fprintf(stderr, "\n%llu tokens in %.0f ms, the first after %.0f ms\n",
                (unsigned long long)summary.completion_tokens, summary.total_ms, summary.first_token_ms);
    putchar('\n');
    ns_llm_request_free(request);
    ns_llm_engine_free(engine);
    return code;
}
