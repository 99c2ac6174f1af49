/* Everything wrong that a caller can do without breaking a promise to the compiler: every function with NULL, 0,
 * freed, foreign and random handles, misaligned pointers, wrong struct sizes, absurd lengths, bytes that are no
 * UTF-8, options out of range, and after fork(). Each is answered with its status, none with a signal, and the
 * engine still works at the end.
 * Arguments: the model's folder, and the most tokens of an answer. */
#include "check.h"

#include <sys/wait.h>
#include <unistd.h>

static ns_llm_engine engine;
static ns_llm_request request;
static heard request_heard;

/* The byte after the start of something that must be aligned. */
#define MISALIGNED(type, pointer) ((type *)(void *)((char *)(pointer) + 1))

/* The callback of requests that are refused. */
static bool never(const ns_llm_event *event, void *user_data) {
    (void)event, (void)user_data;
    fprintf(stderr, "a refused request called back\n");
    exit(1);
}

/* Each function that takes an engine, with a handle that is none. */
static void no_engine(ns_llm_engine bad) {
    size_t size = 7;
    char text[8];
    uint32_t ids[8] = {1};
    ns_llm_request out = 7;
    ns_llm_request_params params = story(1);
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_generate(bad, &params, never, NULL, &out));
    CHECK(out == 0);
    ns_llm_model_info info = {.struct_size = sizeof info, .threads = 7};
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_engine_info(bad, &info));
    CHECK(info.threads == 7);
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_tokenize(bad, "a", 1, 0, ids, 8, &size));
    CHECK(size == 0);
    size = 7;
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_detokenize(bad, ids, 1, text, sizeof text, &size));
    CHECK(size == 0);
    CHECK_STATUS(bad == 0 ? NS_LLM_OK : NS_LLM_BAD_HANDLE, ns_llm_engine_free(bad));
}

/* Each function that takes a request, with a handle that is none. */
static void no_request(ns_llm_request bad) {
    ns_llm_summary summary = {.struct_size = sizeof summary, .seed = 7};
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_request_wait(bad, NS_LLM_FOREVER, &summary));
    CHECK(summary.seed == 7);
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_request_cancel(bad));
    CHECK_STATUS(bad == 0 ? NS_LLM_OK : NS_LLM_BAD_HANDLE, ns_llm_request_free(bad));
}

static void foreign_handles(void) {
    no_engine(request);
    no_request(engine);
    no_engine(0), no_engine(1), no_engine(UINT64_MAX);
    no_request(0), no_request(1), no_request(UINT64_MAX);
    for (int bit = 0; bit < 64; bit++)
        no_engine(engine ^ (uint64_t)1 << bit), no_request(request ^ (uint64_t)1 << bit);
    uint64_t random = 0x9e3779b97f4a7c15u;
    for (int i = 0; i < 1000; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        no_engine(random), no_request(random);
    }
}

static void null_arguments(void) {
    size_t size = 7;
    char text[8];
    uint32_t ids[8] = {1};
    ns_llm_engine out_engine = 7;
    ns_llm_request out = 7;
    ns_llm_engine_params where = {.struct_size = sizeof where, .model = TEXT("x")};
    ns_llm_request_params what = story(1);

    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_engine_open(NULL, &out_engine));
    CHECK(out_engine == 0);
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_engine_open(&where, NULL));
    where.model.data = NULL;
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_engine_open(&where, &out_engine));

    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_generate(engine, NULL, never, NULL, &out));
    CHECK(out == 0);
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_generate(engine, &what, never, NULL, NULL));
    what.prompt.data = NULL;
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_generate(engine, &what, never, NULL, &out));
    what.prompt.size = 0;
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_generate(engine, &what, never, NULL, &out));
    what = story(1), what.num_stop = 1;
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_generate(engine, &what, never, NULL, &out));
    what = story(1), what.num_stop_token_ids = 1;
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_generate(engine, &what, never, NULL, &out));
    what = story(1), what.num_logit_bias = 1;
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_generate(engine, &what, never, NULL, &out));
    what = story(1), what.cache_namespace.size = 1;
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_generate(engine, &what, never, NULL, &out));

    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_engine_info(engine, NULL));
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_tokenize(engine, NULL, 1, 0, ids, 8, &size));
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_tokenize(engine, "a", 1, 0, ids, 8, NULL));
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_tokenize(engine, "a", 1, 0, NULL, 8, &size));
    CHECK_STATUS(NS_LLM_OK, ns_llm_tokenize(engine, NULL, 0, 0, NULL, 0, &size));
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_detokenize(engine, NULL, 1, text, sizeof text, &size));
    CHECK_STATUS(NS_LLM_NULL_ARGUMENT, ns_llm_detokenize(engine, ids, 1, text, sizeof text, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_detokenize(engine, NULL, 0, NULL, 0, &size));

    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(request, NS_LLM_FOREVER, NULL));
    CHECK(ns_llm_last_error(NULL) != NULL);
    CHECK(strcmp(ns_llm_status_name(12345), "unknown") == 0 && strcmp(ns_llm_status_name(-1), "unknown") == 0);
}

static void misaligned_pointers(void) {
    uint64_t room[128] = {0};
    char text[8];
    uint32_t ids[8];
    size_t size;
    ns_llm_engine_params where = {.struct_size = sizeof where, .model = TEXT("x")};
    ns_llm_request_params what = story(1);
    ns_llm_request out = 7;
    ns_llm_engine out_engine = 7;
    CHECK_STATUS(NS_LLM_MISALIGNED_POINTER, ns_llm_engine_open(MISALIGNED(ns_llm_engine_params, room), &out_engine));
    CHECK(out_engine == 0);
    CHECK_STATUS(NS_LLM_MISALIGNED_POINTER, ns_llm_engine_open(&where, MISALIGNED(ns_llm_engine, room)));
    CHECK_STATUS(NS_LLM_MISALIGNED_POINTER,
                 ns_llm_generate(engine, MISALIGNED(ns_llm_request_params, room), never, NULL, &out));
    CHECK(out == 0);
    CHECK_STATUS(NS_LLM_MISALIGNED_POINTER,
                 ns_llm_generate(engine, &what, never, NULL, MISALIGNED(ns_llm_request, room)));
    what.prompt = (ns_llm_text){NULL, 0};
    what.messages = MISALIGNED(ns_llm_message, room), what.num_messages = 1;
    CHECK_STATUS(NS_LLM_MISALIGNED_POINTER, ns_llm_generate(engine, &what, never, NULL, &out));
    what = story(1), what.stop = MISALIGNED(ns_llm_text, room), what.num_stop = 1;
    CHECK_STATUS(NS_LLM_MISALIGNED_POINTER, ns_llm_generate(engine, &what, never, NULL, &out));
    CHECK_STATUS(NS_LLM_MISALIGNED_POINTER, ns_llm_request_wait(request, 0, MISALIGNED(ns_llm_summary, room)));
    CHECK_STATUS(NS_LLM_MISALIGNED_POINTER, ns_llm_engine_info(engine, MISALIGNED(ns_llm_model_info, room)));
    CHECK_STATUS(NS_LLM_MISALIGNED_POINTER, ns_llm_tokenize(engine, "a", 1, 0, ids, 8, MISALIGNED(size_t, room)));
    CHECK_STATUS(NS_LLM_MISALIGNED_POINTER,
                 ns_llm_tokenize(engine, "a", 1, 0, MISALIGNED(uint32_t, room), 8, &size));
    CHECK_STATUS(NS_LLM_MISALIGNED_POINTER,
                 ns_llm_detokenize(engine, MISALIGNED(uint32_t, room), 1, text, 8, &size));
    CHECK_STATUS(NS_LLM_MISALIGNED_POINTER, ns_llm_detokenize(engine, ids, 0, text, 8, MISALIGNED(size_t, room)));
    ns_llm_last_error(MISALIGNED(size_t, room));
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

/* Lengths beyond every limit are refused before anything is read: the pointers lead nowhere. */
static void absurd_lengths(void) {
    const char *nowhere = (const char *)(uintptr_t)8;
    size_t size = 7;
    uint32_t ids[8];
    ns_llm_engine out_engine = 7;
    ns_llm_engine_params where = {.struct_size = sizeof where, .model = {nowhere, SIZE_MAX}};
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_engine_open(&where, &out_engine));
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_tokenize(engine, nowhere, SIZE_MAX, 0, ids, 8, &size));
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT,
                 ns_llm_detokenize(engine, (const uint32_t *)(uintptr_t)8, SIZE_MAX / 4, NULL, 0, &size));
    ns_llm_request_params what = story(1);
    what.prompt = (ns_llm_text){nowhere, SIZE_MAX};
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, refused(&what, "prompt"));
    what.prompt = (ns_llm_text){NULL, 0};
    what.prompt_token_ids = (const uint32_t *)(uintptr_t)8, what.num_prompt_token_ids = SIZE_MAX;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, refused(&what, "prompt_token_ids"));
    what.prompt_token_ids = NULL, what.num_prompt_token_ids = 0;
    what.messages = (const ns_llm_message *)(uintptr_t)8, what.num_messages = SIZE_MAX;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, refused(&what, "messages"));
    ns_llm_message message = {TEXT("user"), {nowhere, SIZE_MAX}};
    what.messages = &message, what.num_messages = 1;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, refused(&what, "messages"));
    what = story(1), what.stop = (const ns_llm_text *)(uintptr_t)8, what.num_stop = SIZE_MAX;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, refused(&what, "stop"));
    what = story(1), what.stop_token_ids = (const uint32_t *)(uintptr_t)8, what.num_stop_token_ids = SIZE_MAX;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, refused(&what, "stop_token_ids"));
    what = story(1), what.logit_bias = (const ns_llm_logit_bias *)(uintptr_t)8, what.num_logit_bias = SIZE_MAX;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, refused(&what, "logit_bias"));
    what = story(1), what.cache_namespace = (ns_llm_text){nowhere, SIZE_MAX};
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, refused(&what, "namespace"));
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
    where.weights = 0, where.threads = 100000;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_engine_open(&where, &out_engine));
    where.threads = 0, where.flags = 64;
    CHECK_STATUS(NS_LLM_UNSUPPORTED, ns_llm_engine_open(&where, &out_engine));
}

/* In the child of a fork the handles are refused, not waited for: the threads behind them stayed with the parent. */
static void after_fork(const char *model) {
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        ns_llm_model_info info = {.struct_size = sizeof info};
        ns_llm_request out;
        ns_llm_engine out_engine;
        ns_llm_engine_params where = {.struct_size = sizeof where, .model = {model, strlen(model)}};
        ns_llm_request_params what = story(1);
        bool refused_all = ns_llm_engine_open(&where, &out_engine) == NS_LLM_FORKED_PROCESS &&
                           ns_llm_engine_info(engine, &info) == NS_LLM_FORKED_PROCESS &&
                           ns_llm_generate(engine, &what, never, NULL, &out) == NS_LLM_FORKED_PROCESS &&
                           ns_llm_request_wait(request, 0, NULL) == NS_LLM_FORKED_PROCESS &&
                           ns_llm_request_free(request) == NS_LLM_FORKED_PROCESS &&
                           ns_llm_engine_free(engine) == NS_LLM_FORKED_PROCESS;
        /* Another program in the end, so that no tool counts what this copy of the parent leaves behind. */
        if (refused_all)
            execlp("true", "true", (char *)NULL);
        _exit(1);
    }
    int how = 0;
    CHECK(waitpid(child, &how, 0) == child);
    CHECK(WIFEXITED(how) && WEXITSTATUS(how) == 0);
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    CHECK(ns_llm_last_error(NULL)[0] == 0);
    engine = open_engine(argv[1]);
    ns_llm_request_params params = story((size_t)atoi(argv[2]));
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &params, listen, &request_heard, &request));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(request, NS_LLM_FOREVER, NULL));

    foreign_handles();
    null_arguments();
    misaligned_pointers();
    wrong_struct_sizes();
    absurd_lengths();
    bytes_that_are_no_text();
    options_out_of_range();
    after_fork(argv[1]);

    static heard again;
    ns_llm_request second = 0;
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &params, listen, &again, &second));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(second, NS_LLM_FOREVER, NULL));
    CHECK(again.text_size == request_heard.text_size && memcmp(again.text, request_heard.text, again.text_size) == 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(second));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    for (int twice = 0; twice < 2; twice++)
        no_request(request), no_request(second), no_engine(engine);
    return 0;
}
