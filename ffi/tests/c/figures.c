/* What an engine says about itself: what is loaded, what was done, bytes, health, and the lines of its log.
 * Argument: the model's folder. */
#include "check.h"

#include <time.h>

/* The log of one engine; lines can come from several threads, here they come one after the other. */
typedef struct log_book {
    char lines[16][512];
    ns_llm_log_level levels[16];
    atomic_int num_lines;
} log_book;

static void write_down(ns_llm_log_level level, const char *line, size_t size, void *user_data) {
    log_book *book = user_data;
    int i = book->num_lines++;
    CHECK(i < 16 && size > 0 && size < sizeof book->lines[i] && memchr(line, '\n', size) == NULL);
    memcpy(book->lines[i], line, size);
    book->levels[i] = level;
}

static bool is(ns_llm_text text, const char *expected) {
    return text.size == strlen(expected) && memcmp(text.data, expected, text.size) == 0;
}

static void info_is_told(ns_llm_engine engine) {
    ns_llm_model_info info = {.struct_size = sizeof info};
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_info(engine, &info));
    CHECK(is(info.name, "demo") && is(info.architecture, "Qwen3ForCausalLM") && is(info.device, "cpu"));
    CHECK(info.num_parameters > info.num_layer_parameters && info.num_layer_parameters > 1000000);
    CHECK(info.vocab_size > 100 && info.context_tokens > 100 && info.embedding_dimensions > 8);
    CHECK(info.threads == 1 && info.load_ms > 0 && info.can_generate == 1 && info.has_chat_template == 1);
    CHECK(is(info.device_name, "cpu") && info.device_reason.size > 10);
    CHECK(info.weights.size > 0 && info.kv_dtype.size > 0 && info.isa.size > 0 && info.max_embedding_tokens > 0);
}

static void work_is_counted(ns_llm_engine engine) {
    static heard h;
    ns_llm_stats before = {.struct_size = sizeof before}, after = {.struct_size = sizeof after};
    ns_llm_request request = 0;
    ns_llm_request_params params = story(6);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_stats(engine, &before));
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &params, listen, &h, &request));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(request, NS_LLM_FOREVER, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
    /* Counts are as of the last step, which the worker writes down after it has told the end. */
    for (int i = 0; i < 1000 && after.requests_finished_total == before.requests_finished_total; i++) {
        struct timespec moment = {0, 1000000};
        nanosleep(&moment, NULL);
        CHECK_STATUS(NS_LLM_OK, ns_llm_engine_stats(engine, &after));
    }
    CHECK(after.requests_finished_total == before.requests_finished_total + 1);
    CHECK(after.generation_tokens_total == before.generation_tokens_total + h.summary.completion_tokens);
    CHECK(after.prompt_tokens_total == before.prompt_tokens_total + h.summary.prompt_tokens);
    CHECK(after.kv_blocks_total > 0);
    CHECK(after.kv_blocks_total == after.kv_blocks_used + after.kv_blocks_cached + after.kv_blocks_free);

    ns_llm_memory_use memory = {.struct_size = sizeof memory};
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_memory(engine, &memory));
    CHECK(memory.weights_bytes > 1000000 && memory.kv_reserved_bytes > 1000000);
    CHECK(memory.kv_used_bytes + memory.kv_cached_bytes <= memory.kv_reserved_bytes);
}

/* One request waits, the next is refused, and the log has a line about it; the first line and the last are about the
 * engine's life. */
static void the_log_is_kept(const char *model) {
    static log_book book;
    ns_llm_engine engine = 0;
    ns_llm_engine_params params = {.struct_size = sizeof params,
                                   .model = {model, strlen(model)},
                                   .threads = 1,
                                   .kv_bytes = 32 << 20,
                                   .max_running_sequences = 1,
                                   .max_waiting_requests = 1,
                                   .kv_dtype = NS_LLM_KV_DTYPE_INT8,
                                   .log = write_down,
                                   .log_user_data = &book};
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_open(&params, &engine));
    CHECK(book.num_lines == 1 && book.levels[0] == NS_LLM_LOG_INFO);
    CHECK(strstr(book.lines[0], "loaded demo (Qwen3ForCausalLM") != NULL && strstr(book.lines[0], "1 threads") != NULL);
    ns_llm_model_info info = {.struct_size = sizeof info};
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_info(engine, &info));
    CHECK(is(info.kv_dtype, "int8"));
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_health(engine));

    ns_llm_request requests[68];
    ns_llm_request_params what = story(1000);
    what.flags = NS_LLM_REQUEST_IGNORE_EOS;
    int num = 0;
    ns_llm_status status = NS_LLM_OK;
    while (num < 64 && (status = ns_llm_generate(engine, &what, NULL, NULL, &requests[num])) == NS_LLM_OK)
        num++;
    CHECK(num > 0);
    CHECK_STATUS(NS_LLM_OVERLOADED, status);
    CHECK(book.num_lines == 2 && book.levels[1] == NS_LLM_LOG_WARN);
    CHECK(strstr(book.lines[1], "at most 1") != NULL);

    /* What is refused only after ns_llm_generate() has returned has its line when it is heard of. */
    what.flags |= NS_LLM_REQUEST_DO_NOT_WAIT;
    int num_refused = 0, first_late = num;
    for (int i = 0; i < 4; i++)
        num_refused += ns_llm_generate(engine, &what, NULL, NULL, &requests[num++]) == NS_LLM_OVERLOADED;
    ns_llm_event event = {.struct_size = sizeof event};
    for (int i = first_late; num_refused < 4; i = i + 1 < num ? i + 1 : first_late)
        num_refused += ns_llm_request_next(requests[i], 1, &event) == NS_LLM_OK &&
                       event.kind == NS_LLM_EVENT_FAILED && event.status == NS_LLM_OVERLOADED;
    CHECK(book.num_lines == 6 && book.levels[5] == NS_LLM_LOG_WARN);

    for (int i = 0; i < num; i++)
        CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(requests[i]));
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    CHECK(book.num_lines == 7 && book.levels[6] == NS_LLM_LOG_INFO && strstr(book.lines[6], "freed demo") != NULL);
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_engine_health(engine));
}

static void free_the_engine(ns_llm_log_level level, const char *line, size_t size, void *user_data) {
    (void)line, (void)size;
    if (level == NS_LLM_LOG_WARN)
        CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(*(ns_llm_engine *)user_data));
}

/* A line of the log comes inside a call, and the engine of that call can be freed there; requests hear of it. */
static void the_log_may_free_its_engine(const char *model) {
    static ns_llm_engine engine;
    ns_llm_engine_params params = {.struct_size = sizeof params,
                                   .model = {model, strlen(model)},
                                   .threads = 1,
                                   .kv_bytes = 32 << 20,
                                   .max_running_sequences = 1,
                                   .max_waiting_requests = 1,
                                   .log = free_the_engine,
                                   .log_user_data = &engine};
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_open(&params, &engine));
    static heard h;
    ns_llm_request first = 0, other = 0;
    ns_llm_request_params what = story(1000);
    what.flags = NS_LLM_REQUEST_IGNORE_EOS;
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &what, listen, &h, &first));
    ns_llm_status status = NS_LLM_OK;
    for (int i = 0; i < 64 && status == NS_LLM_OK; i++) {
        CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(other));
        status = ns_llm_generate(engine, &what, NULL, NULL, &other);
        ns_llm_request third = 0;
        if (status == NS_LLM_OK)
            status = ns_llm_generate(engine, &what, NULL, NULL, &third);
        CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(third));
    }
    CHECK_STATUS(NS_LLM_OVERLOADED, status);
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_engine_free(engine));
    CHECK_STATUS(NS_LLM_CLOSED, ns_llm_request_wait(first, NS_LLM_FOREVER, NULL));
    CHECK(h.num_last == 1);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(first));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(other));
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    ns_llm_engine engine = open_engine(argv[1]);
    info_is_told(engine);
    work_is_counted(engine);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    the_log_is_kept(argv[1]);
    the_log_may_free_its_engine(argv[1]);
    return 0;
}
