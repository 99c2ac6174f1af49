/* What a wrong call is told, where the kind of answer is not all (that is generated for every function, see
 * every_function_survives.rs): structs of other versions work as far as they can, sentences name the field and the place,
 * options out of range are refused one by one, and the engine still works at the end.
 * Arguments: the model's folder, and the most tokens of an answer. */
#include "check.h"

static ns_llm_engine engine;
static ns_llm_request request;
static heard request_heard;

/* The callback of requests that are refused. */
static bool never(const ns_llm_event *event, void *user_data) {
    (void)event, (void)user_data;
    fprintf(stderr, "a refused request called back\n");
    exit(1);
}

/* A program of another version: smaller structs have defaults for the rest, larger ones work with a tail of zeros. */
static void wrong_struct_sizes(void) {
    ns_llm_request out = 7;
    ns_llm_engine out_engine = 7;
    static const size_t absurd[] = {0, 1, 7, 9, 4104, SIZE_MAX, SIZE_MAX - 7};
    for (size_t i = 0; i < sizeof absurd / sizeof *absurd; i++) {
        ns_llm_engine_params where = {.struct_size = absurd[i], .model = TEXT("x")};
        ns_llm_request_params what = story(1);
        ns_llm_summary summary = {.struct_size = absurd[i]};
        what.struct_size = absurd[i];
        CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_engine_open(&where, &out_engine));
        CHECK(strstr(ns_llm_last_error(NULL), "struct_size") != NULL && out_engine == 0);
        CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_generate(engine, &what, never, NULL, &out));
        CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_request_wait(request, 0, &summary));
    }

    struct {
        ns_llm_request_params known;
        uint64_t unknown;
    } newer = {.known = story(1)};
    static heard h;
    newer.known.struct_size = sizeof newer;
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &newer.known, listen, &h, &out));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(out, NS_LLM_FOREVER, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(out));
    newer.unknown = 1;
    CHECK_STATUS(NS_LLM_UNSUPPORTED, ns_llm_generate(engine, &newer.known, never, NULL, &out));

    /* An older program, whose struct ended before `stop`: what lies behind it is not looked at. */
    static heard older_heard;
    ns_llm_request_params older = story(1);
    older.struct_size = offsetof(ns_llm_request_params, stop);
    older.num_stop = SIZE_MAX;
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &older, listen, &older_heard, &out));
    ns_llm_summary summary = {.struct_size = offsetof(ns_llm_summary, cached_tokens), .seed = 7};
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(out, NS_LLM_FOREVER, &summary));
    CHECK(summary.completion_tokens == 1 && summary.seed == 7);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(out));
}

static ns_llm_status refused(const ns_llm_request_params *params, const char *field) {
    ns_llm_request out = 7;
    ns_llm_status status = ns_llm_generate(engine, params, never, NULL, &out);
    CHECK(status != NS_LLM_OK && out == 0);
    size_t size = 0;
    const char *sentence = ns_llm_last_error(&size);
    CHECK(strlen(sentence) == size && strstr(sentence, field) != NULL);
    return status;
}

static void bytes_that_are_no_text(void) {
    size_t size = 7;
    ns_llm_engine out_engine = 7;
    ns_llm_engine_params where = {.struct_size = sizeof where, .model = TEXT("models/\xff")};
    CHECK_STATUS(NS_LLM_INVALID_UTF8, ns_llm_engine_open(&where, &out_engine));
    CHECK_STATUS(NS_LLM_INVALID_UTF8, ns_llm_tokenize(engine, "ab\xc3", 3, 0, NULL, 0, &size));
    CHECK(strstr(ns_llm_last_error(NULL), "byte 2") != NULL);
    ns_llm_request_params what = story(1);
    what.prompt = (ns_llm_text)TEXT("\xed\xa0\x80");
    CHECK_STATUS(NS_LLM_INVALID_UTF8, refused(&what, "prompt"));
    ns_llm_message message = {TEXT("user"), TEXT("\xfe")};
    what.prompt = (ns_llm_text){NULL, 0}, what.messages = &message, what.num_messages = 1;
    CHECK_STATUS(NS_LLM_INVALID_UTF8, refused(&what, "content"));
    ns_llm_text stop = TEXT("\x80");
    what = story(1), what.stop = &stop, what.num_stop = 1;
    CHECK_STATUS(NS_LLM_INVALID_UTF8, refused(&what, "stop"));
}

/* One field out of its range each; the sentence names it. */
static void options_out_of_range(void) {
    ns_llm_request_params what;
    uint32_t ids[] = {0x7fffffff};
    ns_llm_text empty = TEXT("");
#define REFUSED(expected, change, field)                                                                               \
    do {                                                                                                               \
        what = story(1);                                                                                               \
        change;                                                                                                        \
        CHECK_STATUS(expected, refused(&what, field));                                                                 \
    } while (0)
    REFUSED(NS_LLM_INVALID_ARGUMENT, what.temperature = -1.0f, "temperature");
    REFUSED(NS_LLM_INVALID_ARGUMENT, what.temperature = 0.0f / 0.0f, "temperature");
    REFUSED(NS_LLM_INVALID_ARGUMENT, (what.set = 0, what.temperature = 0.5f), "`set`");
    REFUSED(NS_LLM_INVALID_ARGUMENT, (what.set |= NS_LLM_SET_TOP_P, what.top_p = 0.0f), "top_p");
    REFUSED(NS_LLM_INVALID_ARGUMENT, (what.set |= NS_LLM_SET_MIN_P, what.min_p = 2.0f), "min_p");
    REFUSED(NS_LLM_INVALID_ARGUMENT, what.max_tokens = SIZE_MAX, "max_tokens");
    REFUSED(NS_LLM_INVALID_ARGUMENT, what.seed = 1, "seed");
    REFUSED(NS_LLM_INVALID_ARGUMENT, what.n = 1000, "n is 1000");
    REFUSED(NS_LLM_INVALID_ARGUMENT, what.priority = 9, "priority");
    REFUSED(NS_LLM_INVALID_ARGUMENT, what.timeout_ms = UINT64_MAX, "timeout_ms");
    REFUSED(NS_LLM_INVALID_ARGUMENT, (what.stop = &empty, what.num_stop = 1), "stop");
    REFUSED(NS_LLM_INVALID_ARGUMENT, (what.prompt_token_ids = ids, what.num_prompt_token_ids = 1), "prompt");
    REFUSED(NS_LLM_INVALID_ARGUMENT,
            (what.prompt.data = NULL, what.prompt_token_ids = ids, what.num_prompt_token_ids = 1), "2147483647");
    REFUSED(NS_LLM_UNSUPPORTED, what.flags = 1u << 31, "flags");
    REFUSED(NS_LLM_UNSUPPORTED, what.set |= (uint64_t)1 << 63, "set");
#undef REFUSED

    size_t size;
    char text[8];
    ns_llm_engine out_engine;
    CHECK_STATUS(NS_LLM_UNSUPPORTED, ns_llm_tokenize(engine, "a", 1, 2, NULL, 0, &size));
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_detokenize(engine, ids, 1, text, 8, &size));
    ns_llm_engine_params where = {.struct_size = sizeof where, .model = TEXT("x"), .device = 77};
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_engine_open(&where, &out_engine));
    where.device = 0, where.weights = 77;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_engine_open(&where, &out_engine));
    where.weights = 0, where.kv_dtype = NS_LLM_KV_DTYPE_INT8 + 1;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_engine_open(&where, &out_engine));
    where.kv_dtype = 0, where.device_ordinal = 1;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_engine_open(&where, &out_engine));
    where.device_ordinal = 0, where.kv_tier_encoding = NS_LLM_KV_TIER_ENCODING_INT8 + 1;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_engine_open(&where, &out_engine));
    where.kv_tier_encoding = 0, where.reserved = 1;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_engine_open(&where, &out_engine));
    where.reserved = 0, where.threads = 100000;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_engine_open(&where, &out_engine));
    where.threads = 0, where.flags = 64;
    CHECK_STATUS(NS_LLM_UNSUPPORTED, ns_llm_engine_open(&where, &out_engine));
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    CHECK(ns_llm_last_error(NULL)[0] == 0);
    engine = open_engine(argv[1]);
    ns_llm_request_params params = story((size_t)atoi(argv[2]));
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &params, listen, &request_heard, &request));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(request, NS_LLM_FOREVER, NULL));

    wrong_struct_sizes();
    bytes_that_are_no_text();
    options_out_of_range();

    static heard again;
    ns_llm_request second = 0;
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &params, listen, &again, &second));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(second, NS_LLM_FOREVER, NULL));
    CHECK(again.text_size == request_heard.text_size && memcmp(again.text, request_heard.text, again.text_size) == 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(second));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    for (int twice = 0; twice < 2; twice++) {
        CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_request_free(request));
        CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_request_cancel(second));
        CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_engine_free(engine));
    }
    return 0;
}
