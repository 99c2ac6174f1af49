/* One of everything, as a program would do it: open, ask, tokenize, submit, hear, wait, cancel, free.
 * Arguments: the model's folder, the most tokens of an answer, and "no-chat" where the machine is slower than the
 * time that a chat template may take. */
#include "check.h"

#include "surroundings.h"

static ns_llm_engine engine;
static size_t max_tokens;

static void versions_agree(void) {
    CHECK(ns_llm_version_number() == NS_LLM_VERSION_NUMBER && ns_llm_abi_version() == NS_LLM_ABI_VERSION);
    char text[32];
    snprintf(text, sizeof text, "%d.%d.%d", NS_LLM_VERSION_MAJOR, NS_LLM_VERSION_MINOR, NS_LLM_VERSION_PATCH);
    CHECK(strcmp(text, ns_llm_version()) == 0);
}

static bool count_progress(uint64_t loaded_bytes, uint64_t total_bytes, void *user_data) {
    CHECK(loaded_bytes <= total_bytes);
    return ++*(int *)user_data != 1;
}

/* A load can be watched, and stopped: the callback stops it at its first call. */
static void loading_can_be_cancelled(const char *model) {
    int num_calls = 0;
    ns_llm_engine none = 7;
    ns_llm_engine_params params = {.struct_size = sizeof params,
                                   .model = {model, strlen(model)},
                                   .progress = count_progress,
                                   .progress_user_data = &num_calls};
    CHECK_STATUS(NS_LLM_CANCELLED, ns_llm_engine_open(&params, &none));
    CHECK(num_calls == 1 && none == 0);
}

static void missing_models_are_told(void) {
    ns_llm_engine none = 7;
    ns_llm_engine_params params = {.struct_size = sizeof params, .model = TEXT("no/such/folder")};
    ns_llm_status status = ns_llm_engine_open(&params, &none);
    CHECK(status == NS_LLM_IO || status == NS_LLM_MISSING_FILE);
    CHECK(none == 0 && strstr(ns_llm_last_error(NULL), "no/such/folder") != NULL);
}

/* Text survives the way to tokens and back, and the sizes that are asked for are the sizes that come. */
static void tokens_and_back(void) {
    static const char text[] = "The little \xc3\xa4pfel fell.";
    size_t num = 0, size = 0;
    CHECK_STATUS(NS_LLM_BUFFER_TOO_SMALL, ns_llm_tokenize(engine, text, sizeof text - 1, 0, NULL, 0, &num));
    CHECK(num > 0 && num < 64);
    uint32_t ids[64];
    CHECK_STATUS(NS_LLM_OK, ns_llm_tokenize(engine, text, sizeof text - 1, 0, ids, 64, &num));
    char back[64] = {0};
    CHECK_STATUS(NS_LLM_OK, ns_llm_detokenize(engine, ids, num, back, sizeof back, &size));
    CHECK(size == sizeof text - 1 && memcmp(back, text, size) == 0);
}

static ns_llm_status run(const ns_llm_request_params *params, heard *h) {
    ns_llm_request request = 0;
    ns_llm_summary summary = {.struct_size = sizeof summary};
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, params, listen, h, &request));
    CHECK(request != 0);
    ns_llm_status status = ns_llm_request_wait(request, NS_LLM_FOREVER, &summary);
    CHECK(status == h->status && h->num_last == 1);
    if (status == NS_LLM_OK) {
        CHECK(summary.completion_tokens == h->summary.completion_tokens && summary.seed == h->summary.seed);
        CHECK(summary.completion_tokens == h->num_token_ids);
    }
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
    CHECK(h->num_after_last == 0);
    return status;
}

/* A story comes in pieces, ends once, and is the same the second time, from tokens in place of text too. */
static void stories_repeat(void) {
    static heard first, second, third;
    ns_llm_request_params params = story(max_tokens);
    CHECK_STATUS(NS_LLM_OK, run(&params, &first));
    CHECK(first.text_size > 0 && first.num_deltas > 0 && first.num_finished == 1);
    CHECK(first.summary.prompt_tokens > 0 && first.num_token_ids <= max_tokens);
    CHECK(first.finish_reason == (first.num_token_ids < max_tokens ? NS_LLM_FINISH_STOP : NS_LLM_FINISH_LENGTH));
    printf("Once upon a time%.*s\n", (int)first.text_size, first.text);

    CHECK_STATUS(NS_LLM_OK, run(&params, &second));
    CHECK(first.text_size == second.text_size && memcmp(first.text, second.text, first.text_size) == 0);

    uint32_t ids[64];
    size_t num = 0;
    CHECK_STATUS(NS_LLM_OK, ns_llm_tokenize(engine, params.prompt.data, params.prompt.size,
                                            NS_LLM_TOKENIZE_ADD_SPECIAL, ids, 64, &num));
    params.prompt.data = NULL;
    params.prompt_token_ids = ids;
    params.num_prompt_token_ids = num;
    CHECK_STATUS(NS_LLM_OK, run(&params, &third));
    CHECK(first.num_token_ids == third.num_token_ids);
    CHECK(memcmp(first.token_ids, third.token_ids, first.num_token_ids * sizeof *ids) == 0);
}

static void conversations_are_answered(void) {
    static heard h;
    ns_llm_message messages[] = {{TEXT("user"), TEXT("Reverse: abc")}};
    ns_llm_request_params params = story(max_tokens);
    params.prompt = (ns_llm_text){NULL, 0};
    params.messages = messages;
    params.num_messages = 1;
    CHECK_STATUS(NS_LLM_OK, run(&params, &h));
    CHECK(h.num_token_ids > 0);
}

/* Sampling repeats with its seed, a seed that was drawn is told, and two choices finish each. */
static void sampling_takes_every_option(void) {
    static heard first, second;
    ns_llm_text stop[] = {TEXT("never in a story \x01")};
    uint32_t stop_token = 5;
    ns_llm_logit_bias bias = {7, -100.0f};
    ns_llm_request_params params = story(max_tokens);
    params.set |= NS_LLM_SET_TOP_K | NS_LLM_SET_TOP_P | NS_LLM_SET_MIN_P | NS_LLM_SET_REPETITION_PENALTY |
                  NS_LLM_SET_PRESENCE_PENALTY | NS_LLM_SET_FREQUENCY_PENALTY;
    params.temperature = 0.8f;
    params.top_k = 40;
    params.top_p = 0.95f;
    params.min_p = 0.01f;
    params.repetition_penalty = 1.1f;
    params.presence_penalty = 0.1f;
    params.frequency_penalty = 0.1f;
    params.n = 2;
    params.priority = NS_LLM_PRIORITY_HIGH;
    params.flags = NS_LLM_REQUEST_IGNORE_EOS | NS_LLM_REQUEST_NO_PREFIX_CACHE;
    params.timeout_ms = 600000;
    params.stop = stop;
    params.num_stop = 1;
    params.stop_token_ids = &stop_token;
    params.num_stop_token_ids = 1;
    params.logit_bias = &bias;
    params.num_logit_bias = 1;
    params.cache_namespace = (ns_llm_text)TEXT("somebody");
    CHECK_STATUS(NS_LLM_OK, run(&params, &first));
    CHECK(first.num_finished == 2);
    params.set |= NS_LLM_SET_SEED;
    params.seed = first.summary.seed;
    CHECK_STATUS(NS_LLM_OK, run(&params, &second));
    CHECK(second.summary.seed == first.summary.seed && second.num_token_ids == first.num_token_ids);
}

/* Cancelling from the callback and from outside both end a request that would run for long. */
static void cancelled_both_ways(void) {
    static heard by_callback, by_call;
    ns_llm_request_params params = story(1000);
    params.flags = NS_LLM_REQUEST_IGNORE_EOS;
    by_callback.cancel_after = 1;
    CHECK_STATUS(NS_LLM_CANCELLED, run(&params, &by_callback));
    CHECK(by_callback.num_deltas == 1 && by_callback.num_finished == 0);

    ns_llm_request request = 0;
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &params, listen, &by_call, &request));
    CHECK_STATUS(NS_LLM_TIMEOUT, ns_llm_request_wait(request, 0, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_cancel(request));
    CHECK_STATUS(NS_LLM_CANCELLED, ns_llm_request_wait(request, NS_LLM_FOREVER, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_cancel(request));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
    CHECK(by_call.num_last == 1 && by_call.status == NS_LLM_CANCELLED);
}

int main(int argc, char **argv) {
    CHECK(argc == 3 || argc == 4);
    max_tokens = (size_t)atoi(argv[2]);
    static surroundings before;
    look_around(&before);
    versions_agree();
    missing_models_are_told();
    loading_can_be_cancelled(argv[1]);
    engine = open_engine(argv[1]);
    tokens_and_back();
    stories_repeat();
    if (argc == 3)
        conversations_are_answered();
    sampling_takes_every_option();
    cancelled_both_ways();
    surroundings_are_as(&before);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    surroundings_are_as(&before);
    return 0;
}
